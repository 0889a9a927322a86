"""What accelerate leaves on a model that it has prepared for a training: its autocast around `forward`, and a mark.

Both stay when the training is over, and a second Trainer believes them: after a training in bf16 one in fp32 still runs
under autocast, after one in fp32 one in bf16 runs without. Here they are read and taken off, accelerate's layers alone:
transformers' own decorators, and a `forward` that someone else has put there, stay.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType, MethodType
from typing import Any

import torch
from torch import nn

__all__ = ["autocast_left", "is_being_trained", "take_off_autocast"]

_MARK, _ORIGINAL = "_is_accelerate_prepared", "_original_forward"


def autocast_left(model: nn.Module) -> torch.dtype | None:
    """The dtype of the autocast that accelerate has put around the forward of a model, or of one inside it.

    >>> autocast_left(nn.Linear(2, 2)) is None
    True
    """
    for _, autocast, _ in _wrapped(model):
        for cell in getattr(autocast, "__closure__", None) or ():
            if isinstance(cell.cell_contents, torch.autocast):
                return cell.cell_contents.fast_dtype
    return None


def take_off_autocast(model: nn.Module) -> None:
    """Leaves a model as it was before accelerate prepared it. Under DDP, give the model inside."""
    for module, _, inside in list(_wrapped(model)):
        bound = hasattr(module.forward, "__func__")
        del module.__dict__["forward"]
        if inside is not getattr(type(module).forward, "__func__", type(module).forward):
            module.__dict__["forward"] = MethodType(inside, module) if bound else inside
    for module in model.modules():
        module.__dict__.pop(_ORIGINAL, None)
        module.__dict__.pop(_MARK, None)


def is_being_trained(model: nn.Module) -> bool:
    """Whether what accelerate put on a model is in use: called from within a Trainer's `train`, or from a loop of one's
    own with an Accelerator that prepared it. The callers tell, since the model itself looks alike before and after.
    """
    accelerator = getattr(sys.modules.get("accelerate"), "Accelerator", ())
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", ())
    inside = set(model.modules())
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, trainer) and caller.is_in_train and caller.model in inside:
            return True
        for value in list(frame.f_locals.values()):
            if isinstance(value, accelerator) and any(getattr(m, "module", m) in inside for m in value._models):
                return True
        frame = frame.f_back
    return False


def _wrapped(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Any], Callable[..., Any]]]:
    """Every module whose own `forward` is accelerate's: the module, the outermost autocast, what stands inside."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        inside: Any = getattr(forward, "__func__", forward)
        outermost = None
        while type(getattr(inside, "__wrapped__", None)).__name__ == "ConvertOutputsToFp32":
            inside = inside.__wrapped__.model_forward
            if hasattr(inside, "__script_unsupported"):  # torch's own sign of a function that autocast decorates
                outermost = outermost or inside
                inside = inside.__wrapped__
        if inside is not getattr(forward, "__func__", forward):
            yield module, outermost or inside, inside
