"""What runs before the first block: told by running a stack on two tokens and stopping at its first block.

On an image, where the stack takes one; where it cannot be run, by the order of registration, and the notes say so.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from hf_freeze.anatomy.place import towers_of
from hf_freeze.anatomy.structure import ancestors
from hf_freeze.anatomy.value import Stack
from hf_freeze.trial import on_trial

__all__ = ["config_width", "image_parameter", "run_on_sample", "sample_inputs", "with_inputs"]


class _FirstBlock(Exception):
    """Raised by the hook on a block, to stop the probe."""


def with_inputs(stack: Stack, model: nn.Module, name_of: dict[nn.Module, str], notes: list[str]) -> Stack:
    """The stack with its holders and the modules that run before its first block."""
    in_blocks = {module for block in stack.blocks for piece in block.modules for module in piece.modules()}
    holders = [stack.root] if stack.root is not model or not stack.path else []
    modules = dict(model.named_modules())
    root_name = name_of[stack.root]
    path = stack.path
    while path != root_name and path:
        if modules[path] not in holders and not isinstance(modules[path], nn.ModuleList | nn.Sequential):
            holders.append(modules[path])
        path = path.rpartition(".")[0]
    if stack.root not in holders:
        holders.append(stack.root)
    outside = [m for m in stack.root.modules() if m not in in_blocks and m not in holders]
    bare = {f"{name_of[h]}.{leaf}".strip("."): p for h in holders for leaf, p in h.named_parameters(recurse=False)}
    called, used, failure = _probe(stack, outside)
    if failure:
        notes.append(
            f"{stack.name}: its embeddings could not be run on {_sample_words(stack.root)} ({failure}); "
            "what lies before the first block was told by the order of registration."
        )
        called, used = called | _registered_before(stack, outside), set(bare.values())
    towers = towers_of(stack.root, in_blocks)
    called |= {
        _outermost(module, {*in_blocks, *holders}, name_of)
        for module in outside
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module not in towers and module not in called
    }
    for module in [m for m in called if _contains_block(m, in_blocks)]:
        called.discard(module)
    covered = {child for module in called for child in list(module.modules())[1:]}
    inputs = tuple(sorted(name_of[module] for module in called - covered if module in name_of))
    return replace(
        stack,
        holders=tuple(name_of[holder] for holder in holders),
        inputs=inputs,
        input_parameters=tuple(name for name, parameter in bare.items() if parameter in used),
    )


def _outermost(module: nn.Module, bounds: set[nn.Module], name_of: dict[nn.Module, str]) -> nn.Module:
    """The largest module around this one that holds none of the bounds: LUKE's entity embeddings with their norm."""
    for ancestor in ancestors(module, name_of):
        if bounds & set(ancestor.modules()):
            break
        module = ancestor
    return module


def _contains_block(module: nn.Module, in_blocks: set[nn.Module]) -> bool:
    return any(child in in_blocks for child in module.modules())


class _ParametersUsed(TorchFunctionMode):
    """Records the parameters that torch functions get. Looking at one (`weight.dtype`) is no use of it."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[nn.Parameter] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "__get__":
            for value in (*args, *kwargs.values()):
                values = value if isinstance(value, list | tuple) else (value,)
                self.used.update(v for v in values if isinstance(v, nn.Parameter))
        return func(*args, **kwargs)


def _probe(stack: Stack, outside: list[nn.Module]) -> tuple[set[nn.Module], set[nn.Parameter], str]:
    """Runs the stack on two tokens, or on an image, up to its first block.

    Returns:
        The modules called and the parameters used until then, and why it cannot be run where it cannot.
    """
    called: set[nn.Module] = set()

    def stop(*_: Any) -> None:
        raise _FirstBlock

    def record(module: nn.Module, *_: Any) -> None:
        called.add(module)

    handles = [module.register_forward_pre_hook(record) for module in outside]
    handles += [
        piece.register_forward_pre_hook(stop, prepend=True) for block in stack.blocks for piece in block.modules
    ]
    with _ParametersUsed() as parameters:
        failure = run_on_sample(stack.root, handles)
    if isinstance(failure, _FirstBlock):
        return called, parameters.used, ""
    if failure is None:
        return set(), set(), "its forward ended without calling a block"
    return called, set(), f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:120]}"


def image_parameter(module: nn.Module) -> str:
    """Under which name a module's forward takes images; "" where it takes something else, or text with them.

    `pixel_values`; in a model from elsewhere the first name, where the first layer with parameters is a convolution.
    """
    parameters = inspect.signature(module.forward).parameters
    if "input_ids" in parameters:
        return ""
    if "pixel_values" in parameters:
        return "pixel_values"
    first = next((m for m in module.modules() if next(m.parameters(recurse=False), None) is not None), None)
    return next(iter(parameters), "") if isinstance(first, nn.Conv2d) else ""


def _sample_words(module: nn.Module) -> str:
    return "an image" if image_parameter(module) else "two tokens"


def _image(module: nn.Module) -> torch.Tensor:
    """A black image [1, channels, height, width] of the size that the config says, or as the first convolution asks."""
    config = getattr(module, "config", None)
    first = next((m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d)), 3)
    channels, size = getattr(config, "num_channels", first), getattr(config, "image_size", 224)
    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    height_width = tuple(size) if isinstance(size, list | tuple) else (size, size)
    return weight.new_zeros((1, channels, *height_width))


def sample_inputs(module: nn.Module, tokens: int) -> dict[str, Any]:
    """What a forward is given to see it run: so many equal tokens, or a black image, on its device; the rest None."""
    parameters = inspect.signature(module.forward).parameters
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    sample: dict[str, Any] = {}
    if image := image_parameter(module):
        sample[image] = _image(module)
    else:
        sample["input_ids"] = torch.zeros((1, tokens), dtype=torch.long, device=device)
    asked = [name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    sample |= {name: None for name in asked if name not in sample}
    if "use_cache" in parameters:
        sample["use_cache"] = False  # hybrid caches look for attention blocks that a small model may lack
    return sample


def run_on_sample(module: nn.Module, handles: list[RemovableHandle]) -> Exception | None:
    """Calls a module on two token ids, or on an image where it takes one, without a graph, then removes the hooks;
    returns what it raised.
    """
    given = sample_inputs(module, 2)
    device = next(iter(given.values())).device
    parameters = inspect.signature(module.forward).parameters
    attempts = [given]
    if "encoder_hidden_states" in parameters and (width := config_width(module)):
        attempts.append(given | {"encoder_hidden_states": torch.zeros((1, 2, width), device=device)})
    if device.type == "meta":  # a ready mask, where nobody can look at the values of one
        mask = torch.zeros((1, 1, 2, 2), device=device)
        attempts += [arguments | {"attention_mask": mask} for arguments in attempts]
    failure: Exception | None = None
    try:
        for arguments in attempts:
            try:
                with torch.no_grad(), on_trial(module, training=None), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    module(**arguments)
                return None
            except _FirstBlock as reached:
                return reached
            except Exception as error:  # a foreign forward may raise anything; its reason goes into the notes
                failure = failure or error
    finally:
        for handle in handles:
            handle.remove()
    return failure


def config_width(module: nn.Module) -> int:
    """The width of the states between blocks, where a config says it; else 0."""
    config = getattr(module, "config", None)
    width = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
    return width if isinstance(width, int) else 0


def _registered_before(stack: Stack, outside: list[nn.Module]) -> set[nn.Module]:
    """Modules registered before the first block, and those called an embedding wherever they stand."""
    first = stack.blocks[0].modules[0]
    before: set[nn.Module] = set()
    names = {module: name for name, module in stack.root.named_modules()}
    reached = False
    for module in stack.root.modules():
        reached = reached or module is first
        if module in outside and (not reached or "emb" in names[module].rpartition(".")[2].lower()):
            before.add(module)
    return before
