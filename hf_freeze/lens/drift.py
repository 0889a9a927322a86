"""How far the weights of each block are from the pretrained ones. Runs nothing and changes no model.

Adapters of PEFT count as what they add to their matrix.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_freeze.anatomy import Anatomy, BlocksGiven, Part, read_anatomy
from hf_freeze.errors import FreezeError
from hf_freeze.lens.results import Numbers, label_of, part_of, parts_of, six_digits
from hf_freeze.lens.states import core_of
from hf_freeze.tables import Table
from hf_freeze.tensors import unwrap

__all__ = ["WeightDrift", "weight_drift"]

Pretrained = nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str]


@dataclass(frozen=True)
class WeightDrift(Numbers):
    """How far each part is from its pretrained weights.

    Attributes:
        parts: Labels from the bottom up, those of `FreezeMonitor`: "embeddings", "decoder.0", ..., "final", "head".
        drift: ||w - w0|| / ||w0|| (Frobenius) over all tensors of the part.
        left_out: Names without a counterpart, or with one of another shape.
    """

    parts: tuple[str, ...]
    drift: tuple[float, ...]
    left_out: tuple[str, ...] = ()

    def table(self) -> Table:
        """One row a part."""
        rows = tuple((part, f"{drift:.3g}") for part, drift in zip(self.parts, self.drift, strict=True))
        lines = (f"Left out: {', '.join(self.left_out[:4])}{', ...' * (len(self.left_out) > 4)}.",)
        return Table("Drift from the pretrained weights", ("part", "drift"), rows, lines if self.left_out else ())


def weight_drift(
    model: nn.Module, pretrained: Pretrained | None = None, *, blocks: BlocksGiven | None = None
) -> WeightDrift:
    """Measures how far each block is from its pretrained weights: ||w - w0|| / ||w0||, the Frobenius norms.

    Args:
        model: The fine-tuned model; adapters on it are counted as merged.
        pretrained: The model before, its state dict, a folder with its `model*.safetensors`, or one such file. None
            is the model without its adapters.
        blocks: Handed to `read_anatomy` where structure does not tell.

    Returns:
        The drift of each part that has a counterpart and is not all zero there.

    Raises:
        FreezeError: A block that one of them has not, or has in other shapes; a folder without weights; weights that
            are not finite; a model compared with itself.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16))
        >>> before = copy.deepcopy(model)
        >>> with torch.no_grad():
        ...     for parameter in model.transformer.h[1].parameters():
        ...         _ = parameter.mul_(1.5)
        >>> drift = weight_drift(model, before)
        >>> dict(zip(drift.parts, drift.drift))
        {'embeddings': 0.0, 'decoder.0': 0.0, 'decoder.1': 0.5, 'final': 0.0}
    """
    anatomy = read_anatomy(model, blocks=blocks)
    before, origin = _weights_before(model, pretrained)
    base = _base_prefix(model)
    moved: dict[Part, float] = defaultdict(float)
    sizes: dict[Part, float] = defaultdict(float)
    left_out = []
    for name, weight in _plain_weights(model, adapted=True):
        twins = anatomy.tie_of[name].names if name in anatomy.tie_of else ()
        names = [_plain_name(model, twin) for twin in (name, *twins)]
        names += [names[0].removeprefix(base), base + names[0]]
        start = next((before[candidate] for candidate in names if candidate in before), None)
        if start is None or start.shape != weight.shape:
            left_out.append(names[0])
            continue
        start = start.to(weight.device, torch.float32)
        part = part_of(anatomy, name)
        moved[part] += _square(weight.float() - start)
        sizes[part] += _square(start)
    _check_blocks(anatomy, model, before, origin, sizes)
    shown = [part for part in parts_of(anatomy) if sizes[part]]
    for part in shown:
        if not math.isfinite(moved[part] + sizes[part]):
            raise FreezeError(
                f"The drift of {part} was asked for; its weights, or those of {origin}, are not all finite. Give a "
                "checkpoint from before training diverged."
            )
    drift = six_digits([math.sqrt(moved[part] / sizes[part]) for part in shown])
    return WeightDrift(tuple(map(label_of, shown)), drift, tuple(left_out))


def _check_blocks(
    anatomy: Anatomy, model: nn.Module, before: Mapping[str, torch.Tensor], origin: str, sizes: Mapping[Part, float]
) -> None:
    """Refuses pretrained weights with more or fewer blocks than the model has."""
    blocks = [part for part in parts_of(anatomy) if part.kind == "block"]
    if missing := [part for part in blocks if part not in sizes]:
        raise FreezeError(
            f"The drift of {missing[0]} was asked for; {origin} has no tensor of its names and shapes. Give the model "
            "that this one was trained from; where files name tensors otherwise, load them and give the model."
        )
    base = _base_prefix(model)
    for stack in anatomy.stacks:
        inside = re.escape(_plain_name(model, stack.path).removeprefix(base))
        index = re.compile(rf"(?:{re.escape(base)})?{inside}\.(\d+)\.")
        if more := [name for name in before if (found := index.match(name)) and int(found[1]) >= len(stack)]:
            raise FreezeError(
                f"The drift of {len(stack)} {stack.name} blocks was asked for; {origin} has more: {more[0]}. Give the "
                "model that this one was trained from."
            )


def _weights_before(model: nn.Module, pretrained: Any) -> tuple[Mapping[str, torch.Tensor], str]:
    """Weights by name, and what to call where they come from."""
    if pretrained is None:
        if not any(map(_is_adapted, core_of(model).modules())):
            raise FreezeError(
                f"The drift of {type(core_of(model)).__name__} was asked for without pretrained weights; it has no "
                "adapters that could be left out. Give the model before, its state dict, or its folder."
            )
        return _weights_by_plain_name(model, adapted=False), "the model without its adapters"
    if isinstance(pretrained, nn.Module):
        if core_of(pretrained) is core_of(model):
            raise FreezeError(
                f"The drift of {type(core_of(model)).__name__} from itself was asked for. Give a copy from before "
                "training; where adapters were trained, leave pretrained out."
            )
        origin = f"the {type(core_of(pretrained)).__name__} that was given"
        return _weights_by_plain_name(pretrained, adapted=True), origin
    if isinstance(pretrained, Mapping):
        return pretrained, "the state dict"
    path = Path(pretrained).expanduser()
    files = [path] if path.is_file() and path.suffix == ".safetensors" else sorted(path.glob("model*.safetensors"))
    if not files:
        names = ", ".join(sorted(file.name for file in path.iterdir())[:5]) if path.is_dir() else "no such folder"
        raise FreezeError(
            f"Pretrained weights were to be read from {path}; it has no model*.safetensors ({names or 'empty'}). Give "
            "a folder that save_pretrained wrote; for a delta, an adapter or a hub id, load it and give the model."
        )
    from safetensors.torch import load_file

    return {name: tensor for file in files for name, tensor in load_file(file).items()}, str(path)  # mapped, not read


def _weights_by_plain_name(model: nn.Module, *, adapted: bool) -> dict[str, torch.Tensor]:
    weights = _plain_weights(model, adapted=adapted, once=False)
    return {_plain_name(model, name): weight for name, weight in weights}


def _plain_weights(model: nn.Module, *, adapted: bool, once: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight under its name in the model, `once` or by all names of a tie.

    A layer with adapters comes as the matrix that it amounts to, or (not `adapted`) as the one below them. One layer
    at a time is copied for that, so the model keeps its bits.
    """

    def walk(module: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        if _is_adapted(module):
            apply = adapted and not module.disable_adapters
            if bool(module.merged) is not apply:
                module = copy.deepcopy(module)
                (module.merge if apply else module.unmerge)()
            for leaf, weight in module.base_layer.named_parameters():
                yield f"{name}base_layer.{leaf}", weight
        elif hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            if adapted and not module.disable_adapters:
                active = module.active_adapters[0]
                yield from walk(module.modules_to_save[active], f"{name}modules_to_save.{active}.")
            else:
                yield from walk(module.original_module, f"{name}original_module.")
        else:
            for leaf, weight in module.named_parameters(recurse=False):
                if not (once and id(weight) in seen):
                    seen.add(id(weight))
                    yield f"{name}{leaf}", weight
            for leaf, child in module.named_children():
                yield from walk(child, f"{name}{leaf}.")

    seen: set[int] = set()
    for name, weight in walk(core_of(model), _core_path(model)):
        yield name, weight.detach()


def _is_adapted(module: nn.Module) -> bool:
    """Whether this is one of PEFT's layers, told from what these have."""
    return hasattr(module, "base_layer") and hasattr(module, "merge")


def _base_prefix(model: nn.Module) -> str:
    """What a checkpoint of the model without its head leaves out of the names."""
    return f"{getattr(core_of(model), 'base_model_prefix', '')}."


def _core_path(model: nn.Module) -> str:
    core = core_of(model)
    path = next(name for name, module in unwrap(model).named_modules() if module is core)
    return f"{path}." if path else ""


def _plain_name(model: nn.Module, name: str) -> str:
    """A name in the model as it is in the transformer inside, without adapters."""
    name = name.removeprefix(_core_path(model))
    return re.sub(r"\.base_layer\b|\.original_module\b|\.modules_to_save\.[^.]+", "", name)


def _square(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float32)) ** 2
