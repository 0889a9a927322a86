"""Proves on a few rows, before any other is computed, that a cache of a prefix is exact.

`check_states`: a row's states are its own, alone and among others, in training and in evaluation. `check_training`:
from stored states the loss and the gradients are the plain ones, and nothing above the cut looks at padding. Runs the
model in fp32 where all weights are, whatever the training's precision: rounding would hide a shifted position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_freeze.errors import CannotCache
from hf_freeze.prefix.build import capture, move, pad_states, split_rows
from hf_freeze.prefix.crossing import same_results
from hf_freeze.prefix.dataset import Collator, Rows, collate
from hf_freeze.prefix.replay import Prefix, Replay, autocast
from hf_freeze.prefix.rows import PREFIX_KEY, TARGET, read_rows
from hf_freeze.trial import on_trial

__all__ = ["check_states", "check_training"]

# Relative bounds, in fp32 and where some weights are in 16 bits: rounding does 1e-6 and 1e-2, a shifted position 1e-1.
INDEPENDENT, INDEPENDENT_LOW = 2e-3, 0.05
SAME_LOSS, SAME_LOSS_LOW = 1e-4, 2e-2
SAME_GRADIENT, SAME_GRADIENT_LOW = 1e-3, 1e-1  # of the largest tensor's
BLIND_TO_PADDING = 1e-6  # the same arithmetic on the same real tokens: nothing but padding can move it


def check_states(model: nn.Module, prefix: Prefix, rows: Rows, sample: list[int], collator: Collator) -> None:
    """Runs the prefix of some rows together, in both modes, and of each by itself.

    Raises:
        CannotCache: A row's states change with its neighbours, its padding or the mode.
    """
    device = next(model.parameters()).device
    leaves = prefix.leaves("stream")
    exact, low = _exact(model, prefix)
    batch = collate(collator, [rows.features[row] for row in sample])
    moved = move(batch, device)
    with autocast(exact.precision, device), on_trial(model, training=True):
        in_training = capture(model, exact, moved)
    with autocast(exact.precision, device), on_trial(model, training=False):
        taken = capture(model, exact, moved)
        if moving := [name for name in taken if not _close(in_training[name], taken[name], BLIND_TO_PADDING)]:
            raise CannotCache(
                f"The frozen prefix gives other states in training than in evaluation ({moving[0].split(':')[0]}): a "
                "dropout that stands outside of its modules is on, so its states change at every step. Set that "
                "dropout in model.config to 0, or train without the cache."
            )
        together = read_rows(batch, with_target=TARGET in prefix.sides)
        for place, among in enumerate(split_rows(taken, leaves, together)):
            alone = _states_alone(model, exact, rows, sample[place], collator)
            for name, tensor in alone.items():
                same_shape = tensor.shape == among[name].shape
                if not same_shape or not _close(among[name], tensor, INDEPENDENT_LOW if low else INDEPENDENT):
                    raise CannotCache(
                        f"The frozen prefix gives row {sample[place]} other states among longer rows than alone "
                        f"({name.split(':')[0]}). A model with absolute positions needs padding on the right, or "
                        "position_ids; experts with a capacity and batch norms look at the whole batch and cannot be "
                        "cached."
                    )


def check_training(model: nn.Module, prefix: Prefix, rows: Rows, sample: list[int], collator: Collator) -> None:
    """Runs a batch plainly and from states that were computed row by row.

    Raises:
        CannotCache: Loss or gradients differ, or change with what stands at padded places.
    """
    device = next(model.parameters()).device
    sides = {name: leaf.side for name, leaf in prefix.leaves("stream").items()}
    exact, low = _exact(model, prefix)
    batch = collate(collator, [rows.features[row] for row in sample])
    together = read_rows(batch, with_target=TARGET in prefix.sides)
    moved = move(batch, device)
    with autocast(exact.precision, device), on_trial(model, training=False):
        taken = capture(model, exact, moved)
        alone = [_states_alone(model, exact, rows, row, collator) for row in sample]
    zeros, noise = pad_states(alone, sides, together), pad_states(alone, sides, together, noise=True)
    if zeros is None or noise is None:
        raise CannotCache(
            "The frozen prefix gives rows states of unlike shapes; they cannot be one batch. Train without the cache."
        )
    replay = Replay(exact, {name: taken[name] for name in prefix.leaves("table")}, {})
    with autocast(exact.precision, device):
        plain, gradients = _run(model, moved)
        handles = replay.attach([model])
        try:
            replayed, from_states = _run(model, moved | {PREFIX_KEY: zeros})
            with torch.no_grad(), on_trial(model, training=True):
                disturbed = model(**moved, **{PREFIX_KEY: noise})
        finally:
            replay.detach([model], handles)
    if differs := same_results(replayed, disturbed, BLIND_TO_PADDING, together):
        raise CannotCache(
            f"What stands above the cut looks at padding: {differs} when the padding's states change. Experts with a "
            "capacity and balancing losses over all tokens do so; rows stored without padding cannot replay them."
        )
    if differs := same_results(plain, replayed, SAME_LOSS_LOW if low else SAME_LOSS, together):
        raise CannotCache(
            f"Training from the stored states gives another result than the plain forward: {differs}. What stands "
            "above the cut looks at more of the prefix than its states. Train without the cache."
        )
    gap = max((float((a - b).norm()) for a, b in zip(gradients, from_states, strict=True)), default=0.0)
    largest = max((float(gradient.norm()) for gradient in gradients), default=0.0)
    if not gap <= (SAME_GRADIENT_LOW if low else SAME_GRADIENT) * largest:
        raise CannotCache(
            "Training from the stored states gives other gradients than the plain forward. What stands above the cut "
            "looks at more of the prefix than its states. Train without the cache."
        )


def _exact(model: nn.Module, prefix: Prefix) -> tuple[Prefix, bool]:
    """The prefix in the highest precision that its weights allow, and whether that is a low one."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    mixed = len(dtypes) > 1  # such weights may need the autocast
    return prefix if mixed else replace(prefix, precision=None), dtypes != {torch.float32}


def _states_alone(model: nn.Module, exact: Prefix, rows: Rows, row: int, collator: Collator) -> dict[str, torch.Tensor]:
    single = collate(collator, [rows.features[row]])
    states = capture(model, exact, move(single, next(model.parameters()).device))
    return next(split_rows(states, exact.leaves("stream"), read_rows(single, with_target=TARGET in exact.sides)))


def _run(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Any, list[torch.Tensor]]:
    """A result in training, and in fp32 the gradients of what trains, [] where there is no loss; kept off the model."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad(), on_trial(model, training=True):
        result = model(**batch)
        loss = getattr(result, "loss", None)
        if loss is None or not loss.requires_grad:
            return result, []
        found = torch.autograd.grad(loss, trained, allow_unused=True)
    return result, [torch.zeros(()) if gradient is None else gradient.float() for gradient in found]


def _close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by at most that part of their size, and half of their tokens do: a few tokens are
    larger than all others by far and would hide the rest.
    """
    one, other = one.double(), other.double()
    gap, size = (one - other).norm(), other.norm().clamp(min=1e-30)
    if one.dim() > 1:
        gaps, sizes = (one - other).flatten(1).norm(dim=1), other.flatten(1).norm(dim=1).clamp(min=1e-30)
        if not (gaps / sizes).median() <= tolerance:
            return False
    return bool(gap <= tolerance * size)
