"""Runs a model on trial: modes and seed as asked, and everything a forward may leave behind put back afterwards.

The one runner of a model on a sample: whoever runs one to learn something does it in `on_trial`. It runs nothing
itself and knows nothing of what is tried; weights and gradients are the caller's to leave alone.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_freeze.machine import find_device
from hf_freeze.marks import ON_TRIAL, is_mark
from hf_freeze.prepared import take_off_autocast

__all__ = ["on_trial", "random_numbers", "seed_all"]


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
