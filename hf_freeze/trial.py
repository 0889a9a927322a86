"""Runs a model on trial: modes and seed as asked, and everything a forward may leave behind put back afterwards.

It runs nothing itself and knows nothing of what is tried; weights and gradients are the caller's to leave alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

__all__ = ["ON_TRIAL", "on_trial", "seed_all"]

ON_TRIAL = "_hf_freeze_on_trial"  # on the model meanwhile: such a forward is no training


@contextmanager
def on_trial(model: nn.Module, *, training: bool | None) -> Iterator[None]:
    """Modes as in training, in evaluation or as they are (None), and a fixed seed; afterwards the model is as it was.

    Put back are modes, the random states of torch, numpy and Python, buffers, and modules that a model trades for
    others (BigBird its attention at its first short row, noted in a string).

    Example:
        >>> model = nn.Dropout()
        >>> with on_trial(model, training=False):
        ...     model.training, torch.initial_seed()
        (False, 0)
        >>> model.training
        True
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    children = {module: dict(module._modules) for module in model.modules()}
    notes = {module: {k: v for k, v in module.__dict__.items() if isinstance(v, str)} for module in children}
    outermost = ON_TRIAL not in model.__dict__
    python, numpy_state = random.getstate(), np.random.get_state()
    devices = _accelerators(model)
    with torch.random.fork_rng(devices=devices):
        try:
            seed_all(model)
            random.seed(0)
            np.random.seed(0)
            model.__dict__[ON_TRIAL] = True
            if training:
                model.train()
            elif training is False:
                for module in children:  # not by eval(): a module that freeze() holds, or a user's, may have its own
                    module.training = False
            yield
        finally:
            if outermost:
                del model.__dict__[ON_TRIAL]
            for module, mode in modes:
                module._modules.update(children[module])
                module.__dict__.update(notes[module])
                module.training = mode
            random.setstate(python)
            np.random.set_state(numpy_state)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def seed_all(model: nn.Module) -> None:
    """Seeds the CPU's generator and those of the model's devices; not every device, as torch.manual_seed does."""
    torch.default_generator.manual_seed(0)
    for device in _accelerators(model):
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(0)
        else:
            torch.get_device_module(device).manual_seed(0)


def _accelerators(model: nn.Module) -> list[torch.device]:
    return list({p.device: None for p in model.parameters() if p.device.type not in ("cpu", "meta")})
