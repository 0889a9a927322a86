"""Runs a model on trial: modes and seed as asked, and everything a forward may leave behind put back afterwards.

The one runner of a model on a sample: whoever runs one to learn something does it in `on_trial`. It runs nothing
itself and knows nothing of what is tried; weights and gradients are the caller's to leave alone.

accelerate leaves its autocast around the `forward` of a model that it has prepared for a training, and a mark. Both
stay when the training is over, and a second Trainer believes them: after a training in bf16 one in fp32 still runs
under autocast, after one in fp32 one in bf16 runs without. Here they are read and taken off, accelerate's layers alone:
transformers' own decorators, and a `forward` that someone else has put there, stay.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_freeze.machine import find_device
from hf_freeze.marks import ON_TRIAL, is_mark

__all__ = [
    "autocast_left",
    "is_being_trained",
    "on_trial",
    "random_numbers",
    "seed_all",
    "take_off_autocast",
]

_MARK, _ORIGINAL = "_is_accelerate_prepared", "_original_forward"  # accelerate's


@contextmanager
def on_trial(model: nn.Module, *, training: bool | None) -> Iterator[None]:
    """Modes as in training, in evaluation or as they are (None), and a fixed seed; afterwards the model is as it was.

    Put back are modes and all other attributes of every module, the random states of torch on every device, of numpy
    and of Python, the grad mode, buffers, modules that a model trades for others (BigBird its attention at its first
    short row) and what a config says of them. Meanwhile the forward is the model's own: the autocast that accelerate
    leaves around it after a training is off.

    Example:
        >>> model = nn.Dropout()
        >>> with on_trial(model, training=False):
        ...     model.training, torch.initial_seed()
        (False, 0)
        >>> model.training
        True
    """
    put_back = [_random_states(), *_states(model)]
    grad = torch.is_grad_enabled()
    try:
        take_off_autocast(model)
        seed_all(model)
        random.seed(0)
        np.random.seed(0)
        model.__dict__[ON_TRIAL] = True
        if training:
            model.train()
        elif training is False:
            for module in model.modules():  # not by eval(): what freeze() holds, or a user's own, may have another
                module.training = False
        yield
    finally:
        torch.set_grad_enabled(grad)
        for action in put_back:
            action()


def seed_all(model: nn.Module, seed: int = 0) -> None:
    """Seeds the CPU's generator and those of the model's devices; not every device, as torch.manual_seed does."""
    torch.default_generator.manual_seed(seed)
    for device in _accelerators(model):
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        else:
            torch.get_device_module(device).manual_seed(seed)


def random_numbers(model: nn.Module) -> list[torch.Tensor]:
    """The states of the CPU's generator and of those of the model's devices: equal where the same was drawn."""
    modules = [(torch.get_device_module(device), device) for device in _accelerators(model)]
    states = [module.get_rng_state(*([] if device.type == "mps" else [device])) for module, device in modules]
    return [torch.get_rng_state(), *states]


def _accelerators(model: nn.Module) -> list[torch.device]:
    return list({p.device: None for p in model.parameters() if p.device.type not in ("cpu", "meta")})


def _random_states() -> Callable[[], None]:
    """Puts back every random state: Python's, numpy's, and torch's on the CPU and on every device that is in use."""
    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices: list[tuple[Callable[..., None], Any]] = []
    for module in (torch.cuda, torch.xpu):
        if module.is_initialized():  # else nothing was drawn there, and looking would start it
            devices.append((module.set_rng_state_all, module.get_rng_state_all()))
    if find_device().type == "mps":
        devices.append((torch.mps.set_rng_state, torch.mps.get_rng_state()))

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        for setter, state in devices:
            setter(state)

    return put_back


def _states(model: nn.Module) -> list[Callable[[], None]]:
    """Puts back what stands on a model beside its weights.

    A model that rescales its weights by its mode notes that it did (RWKV): where weights moved, its numbers stay.
    """
    actions: list[Callable[[], None]] = []
    configs: dict[int, Any] = {}
    versions = [(weight, _version(weight)) for weight in model.parameters()]

    @functools.cache  # of all weights, once for all modules; putting back moves none
    def weights_moved() -> bool:
        return any(_version(weight) != version for weight, version in versions)

    for module in model.modules():
        # The dictionaries of hooks, parameters, modules and buffers are values of this one and stay the same objects.
        actions.append(_putter(module.__dict__, weights_moved))
        actions.append(_putter(module._modules))
        actions.append(_putter(module._buffers))
        actions.extend(_buffer_putter(buffer) for buffer in module._buffers.values() if buffer is not None)
        _collect(module.__dict__.get("config"), configs)
    return actions + [_putter(vars(config)) for config in configs.values()]


def _collect(config: Any, configs: dict[int, Any]) -> None:
    """A config and those in it, each once."""
    if hasattr(config, "to_dict") and hasattr(config, "__dict__") and id(config) not in configs:
        configs[id(config)] = config
        for value in vars(config).values():
            _collect(value, configs)


def _putter(values: dict[str, Any], keeps_notes: Callable[[], bool] = lambda: False) -> Callable[[], None]:
    before = dict(values)

    def put_back() -> None:
        if list(values) == list(before) and all(values[name] is before[name] for name in before):
            return
        kept = {name: value for name, value in values.items() if _is_note(name, value)} if keeps_notes() else {}
        values.clear()
        values.update(before | kept)

    return put_back


def _is_note(name: str, value: Any) -> bool:
    return name != "training" and not is_mark(name) and isinstance(value, bool | int | float)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _buffer_putter(buffer: torch.Tensor) -> Callable[[], None]:
    before = buffer.detach().clone()

    def put_back() -> None:
        # Only what moved, since a write tells whoever watches; a batch norm moves its statistics without a new version.
        if buffer.device.type != "meta" and not torch.equal(buffer, before):
            with torch.no_grad():
                buffer.copy_(before)

    return put_back


# ------------------------------------------------------------------------------------ what accelerate leaves on a model


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
