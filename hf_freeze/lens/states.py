"""Runs a model on a batch and keeps what enters and leaves each of its blocks, by hooks: no config flag is needed.

Row 0 of a stack's layers is what enters block 0, row i + 1 what block i hands on. The model is left as it was.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_freeze.anatomy import Anatomy, Stack
from hf_freeze.errors import FreezeError
from hf_freeze.lens.results import layer_name
from hf_freeze.prefix.rows import PREFIX_KEY
from hf_freeze.tensors import unwrap
from hf_freeze.trial import on_trial

__all__ = ["Kept", "call", "core_of", "looking", "record", "takes", "without_labels"]


def core_of(model: nn.Module) -> Any:
    """The transformer, out of its wrappers and out of a PeftModel.

    >>> inner = nn.Linear(2, 2)
    >>> core_of(nn.DataParallel(inner)) is inner
    True
    """
    model = unwrap(model)
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def takes(core: nn.Module, name: str) -> bool:
    """Whether a model's forward accepts an argument."""
    parameters = inspect.signature(core.forward).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch for a call that computes no loss."""
    return {name: value for name, value in batch.items() if name != "labels"}


def call(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Runs the model on what of the batch it takes, the whole of it also where a cache has its prefix's states.

    Raises:
        FreezeError: The model refuses the batch.
    """
    core = core_of(model)
    device = next((weight.device for weight in core.parameters()), torch.device("cpu"))
    given = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name != PREFIX_KEY and takes(core, name)
    }
    if "use_cache" in inspect.signature(core.forward).parameters:
        given["use_cache"] = False  # keys and values of every block, for nothing
    try:
        return unwrap(model)(**given)
    except (AssertionError, TypeError, ValueError) as error:  # of a foreign forward: it wants an image, sound, a mode
        if isinstance(error, FreezeError):
            raise
        raise FreezeError(
            f"{type(core).__name__} was run on token ids in eval mode; it refused: {type(error).__name__}: {error} "
            "Only models that read text alone, and batches that they take, can be looked at."
        ) from error


@contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """Evaluation without a graph; the model is afterwards as it was."""
    with on_trial(unwrap(model), training=False), torch.no_grad():
        yield


@dataclass
class Kept:
    """What one forward made.

    Attributes:
        entries: By stack, the states that entered its first block.
        outputs: By module, what it returned, and which tensor in that is the states.
        states: By block, a copy of those states: a later block may write into them.
        last: By block, the module of it that was called last; most have one only.
    """

    anatomy: Anatomy
    output: Any = None
    entries: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[nn.Module, tuple[Any, torch.Tensor]] = field(default_factory=dict)
    states: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    last: dict[tuple[str, int], nn.Module] = field(default_factory=dict)

    def enter(self, stack: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook before the first block: a block that is called again and again is entered once."""
        states = _find_states((*args, *kwargs.values()))
        if stack not in self.entries and states is not None:
            self.entries[stack] = states.detach().clone()

    def leave(self, place: tuple[str, int], module: nn.Module, _: Any, output: Any) -> None:
        """Hook after every module of a block: the last call counts."""
        states = _find_states(output)
        if states is not None:
            self.outputs[module], self.last[place] = (output, states), module
            self.states[place] = states.detach().clone()

    def layers(self, stack: Stack, real: torch.Tensor) -> list[torch.Tensor]:
        """The states of every layer [texts, tokens, width]; `real` says which are no padding.

        Raises:
            FreezeError: A layer without a state for each token, or one with numbers that are not finite.
        """
        kept: list[torch.Tensor | None] = [self.entries.get(stack.name)]
        kept += [self.states.get((stack.name, block.index)) for block in stack.blocks]
        layers = []
        for layer, states in enumerate(kept):
            name = layer_name(stack.name, layer)
            if states is not None and states.shape[:2] != real.shape:  # tokens before texts, as in XLNet
                states = states.transpose(0, 1) if states.shape[:2] == real.T.shape else None
            if states is None:
                raise FreezeError(
                    f"The states of {name} were asked for; {self.anatomy.model_class} has none there of {len(real)} "
                    f"texts x {real.shape[1]} tokens. A model that adds tokens (prompt tuning, a window "
                    "to fill), joins them or carries several streams has not one state for each token of a text."
                )
            if not torch.isfinite(states[real.to(states.device)]).all():
                raise FreezeError(
                    f"The states of {name} were asked for; {self.anatomy.model_class} gives numbers that are not "
                    "finite. fp16 may overflow: load the model in fp32 or bf16."
                )
            layers.append(states)
        return layers


def record(model: nn.Module, anatomy: Anatomy, batch: Mapping[str, torch.Tensor]) -> Kept:
    """Runs a batch and keeps what enters and leaves every block."""
    kept = Kept(anatomy)
    with ExitStack() as hooks:
        for stack in anatomy.stacks:
            enter = functools.partial(kept.enter, stack.name)
            first = stack.blocks[0].modules[0]
            hooks.callback(first.register_forward_pre_hook(enter, with_kwargs=True).remove)
            for block in stack.blocks:
                leave = functools.partial(kept.leave, (stack.name, block.index))
                for module in block.modules:
                    hooks.callback(module.register_forward_hook(leave).remove)
        kept.output = call(model, without_labels(batch))
    return kept


def _find_states(value: Any) -> torch.Tensor | None:
    """The first tensor of three dimensions and floats in what a block takes or returns."""
    if isinstance(value, torch.Tensor):
        return value if value.dim() == 3 and value.is_floating_point() else None
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((states for each in values if (states := _find_states(each)) is not None), None)
