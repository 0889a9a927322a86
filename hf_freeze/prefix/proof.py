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
from hf_freeze.exactness import ROUNDING, compare, copy_row, grain_of, relative_gaps, row_gap, step_tensors
from hf_freeze.prefix.replay import replaying
from hf_freeze.prefix.rows import PREFIX_KEY, Collator, Rows, collate, read_rows
from hf_freeze.prefix.search import same_results
from hf_freeze.prefix.states import (
    Prefix,
    autocast,
    capture,
    device_of,
    move,
    pad_states,
    running,
    states_alone,
    states_of,
)
from hf_freeze.trial import on_trial

__all__ = ["check_states", "check_training"]

# Relative bounds, in fp32 and where some weights are in 16 bits: rounding does 1e-6 and 1e-2, a shifted position 1e-1.
INDEPENDENT, INDEPENDENT_LOW = 2e-3, 0.05
SAME_RESULT, SAME_RESULT_LOW = 1e-4, 2e-2  # of a result without a loss; gradients have bars of their own
# Of every tensor, from the very states: nothing but the device's own order.
SAME_GRADIENT, SAME_GRADIENT_LOW = 1e-3, 1e-2
DRAWS = 4  # of noise at most: one may miss the token that rounding sends to another expert
BLIND_TO_PADDING = 1e-6  # the same arithmetic on the same real tokens: nothing but padding can move it


def check_states(model: nn.Module, prefix: Prefix, rows: Rows, sample: list[int], collator: Collator) -> None:
    """Runs the prefix of some rows together, in both modes, and of each by itself.

    Raises:
        CannotCache: A row's states change with its neighbours, its padding or the mode.
    """
    exact, grain = _exact(model, prefix)
    batch = collate(collator, [rows.features[row] for row in sample])
    with running(model, exact.precision, training=True):
        in_training = capture(model, exact, move(batch, device_of(model)))
    with running(model, exact.precision, training=False):
        taken, among_others = states_of(model, exact, batch)
        if moving := [name for name in taken if not _close(in_training[name], taken[name], BLIND_TO_PADDING)]:
            raise CannotCache(
                f"The frozen prefix gives other states in training than in evaluation ({moving[0].split(':')[0]}): a "
                "dropout that stands outside of its modules is on, so its states change at every step. Set that "
                "dropout in model.config to 0, or train without the cache."
            )
        for row, among in zip(sample, among_others, strict=True):
            alone = states_alone(model, exact, collator, rows.features[row])
            for name, tensor in alone.items():
                if not _close(among[name], tensor, INDEPENDENT if grain == "fp32" else INDEPENDENT_LOW):
                    raise CannotCache(
                        f"The frozen prefix gives row {row} other states among longer rows than alone "
                        f"({name.split(':')[0]}). A model with absolute positions needs padding on the right, or "
                        "position_ids; experts with a capacity and batch norms look at the whole batch and cannot be "
                        "cached."
                    )


def check_training(model: nn.Module, prefix: Prefix, rows: Rows, sample: list[int], collator: Collator) -> None:
    """Runs a batch plainly and from states that were computed row by row: the loss and every gradient must be the same.

    In 16 bits, and where a gradient is over its bar, the batch is also run from the states that it has itself, where
    nothing is rounded otherwise; what rounding of states does to a gradient is then measured. The proof is tried in
    turn, with a row's states in the place of another's.

    Raises:
        CannotCache: Loss or gradients differ, or change with what stands at padded places; or they would not differ
            with the states of other rows either.
    """
    sides = prefix.stream_sides()
    exact, grain = _exact(model, prefix)
    low = grain != "fp32"
    batch = collate(collator, [rows.features[row] for row in sample])
    together = read_rows(batch, with_target=prefix.with_target)
    moved = move(batch, device_of(model))
    with running(model, exact.precision, training=False):
        taken, among_others = states_of(model, exact, batch)
        alone = [states_alone(model, exact, collator, rows.features[row]) for row in sample]
    states, noisy = pad_states(alone, sides, together), pad_states(alone, sides, together, noise=True)
    own = pad_states(among_others, sides, together)
    if states is None or noisy is None or own is None or any(own[name].shape != states[name].shape for name in own):
        raise CannotCache(
            "The frozen prefix gives rows states of unlike shapes; they cannot be one batch. Train without the cache."
        )
    if far := [name for name in own if not _close(states[name], own[name], INDEPENDENT_LOW if low else INDEPENDENT)]:
        raise CannotCache(
            f"The frozen prefix gives rows other states among longer rows than alone ({far[0].split(':')[0]}); they "
            "cannot be stored one by one. Train without the cache."
        )
    tables = {name: taken[name] for name in prefix.leaves("table")}
    rounding = ROUNDING[grain] if low else SAME_GRADIENT
    noise: list[dict[str, float]] = []

    def differs(result: Any, gaps: dict[str, float], bar: float = rounding) -> str:
        """ "" where a run from states is the plain one, else what differs and by how much."""
        if gaps:
            agreement = compare(gaps, noise, bar)
            return "" if agreement.same else str(agreement)
        return same_results(plain, result, SAME_RESULT_LOW if low else SAME_RESULT, together)

    def run_from(given: dict[str, torch.Tensor]) -> tuple[Any, dict[str, float]]:
        result, tensors = _run(model, moved | {PREFIX_KEY: given})
        return result, relative_gaps(gradients, tensors)

    def measure_noise(draw: int) -> dict[str, float]:
        """What other rounding of the states does to a step from states; plain ones have no part in it."""
        both = (own, _rounded_otherwise(own, states, draw))
        return relative_gaps(*(_run(model, moved | {PREFIX_KEY: given})[1] for given in both))

    with autocast(exact.precision, device_of(model)):
        plain, gradients = _run(model, moved)
        with replaying(model, exact, tables):
            replayed, from_own = run_from(states), ""
            with torch.no_grad(), on_trial(model, training=True):
                disturbed = model(**moved, **{PREFIX_KEY: noisy})
            if low or differs(*replayed):
                from_own = differs(*run_from(own), SAME_GRADIENT_LOW if low else SAME_GRADIENT)
            while differs(*replayed) and len(noise) < DRAWS:
                noise.append(measure_noise(draw=len(noise)))
            pairs = _unlike_rows(states)
            seen = any(differs(*run_from(copy_row(states, *pair))) for pair in pairs)
            if pairs and not seen:  # rows that differ where no label looks, such as in their last token
                seen = bool(differs(*run_from(_turned(states))))
    if difference := same_results(replayed[0], disturbed, BLIND_TO_PADDING, together):
        raise CannotCache(
            f"What stands above the cut looks at padding: {difference} when the padding's states change. Experts with "
            "a capacity and balancing losses over all tokens do so; rows stored without padding cannot replay them."
        )
    if difference := from_own or differs(*replayed):
        raise CannotCache(
            f"Training from the stored states is not plain training: {difference}. What stands above the cut looks at "
            "more of the prefix than its states. Train without the cache."
        )
    if pairs and not seen:
        raise CannotCache(
            "That training from stored states is plain training cannot be proved here: a row was given the states of "
            "another, and neither the loss nor a gradient tells. Its rounding hides more than the states do, or "
            "nothing that trains looks at them. Train without the cache."
        )


def _exact(model: nn.Module, prefix: Prefix) -> tuple[Prefix, str]:
    """The prefix in the highest precision that its weights allow, and which it is: that of the coarsest weights."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    mixed = len(dtypes) > 1  # such weights may need the autocast
    return prefix if mixed else replace(prefix, precision=None), grain_of(model.parameters())


def _unlike_rows(states: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    """Pairs of rows of a batch, both ways, whose states differ by more than rounding; [] where all rows are one."""
    count = len(next(iter(states.values())))
    pairs = [(one, other) for one in range(count) for other in range(count) if one != other]
    return [
        (one, other)
        for one, other in pairs
        if not all(_close(tensor[one], tensor[other], INDEPENDENT_LOW) for tensor in states.values())
    ]


def _turned(states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every row's states from the last token to the first; with another sign where they have no tokens."""
    return {name: tensor.flip(1) if tensor.dim() > 2 else -tensor for name, tensor in states.items()}


def _rounded_otherwise(
    own: dict[str, torch.Tensor], states: dict[str, torch.Tensor], draw: int
) -> dict[str, torch.Tensor]:
    """The batch's own states, as far off as those of its rows alone are, each number by a random sign: another draw of
    what an unlike batch shape does to them.
    """
    moved = {}
    for name, tensor in own.items():
        generator = torch.Generator(tensor.device).manual_seed(draw)
        signs = torch.randint(0, 2, tensor.shape, generator=generator, device=tensor.device) * 2 - 1
        moved[name] = (tensor.float() + signs * (states[name].float() - tensor.float())).to(tensor.dtype)
    return moved


def _run(model: nn.Module, batch: Mapping[str, Any], *, training: bool = True) -> tuple[Any, dict[str, torch.Tensor]]:
    """A result, and the loss and the gradients of what trains, {} where there is no loss; kept off the model."""
    with torch.enable_grad(), on_trial(model, training=training):
        result = model(**batch)
        loss = getattr(result, "loss", None)
        if loss is None or not loss.requires_grad:
            return result, {}
        return result, step_tensors(loss, model.named_parameters())


def _close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return row_gap(one, other).within((tolerance, tolerance))
