"""Decides whether a frozen prefix can be cached, and with what: cuts, rows, streams, proofs. Computes nothing else.

What comes out, a `Prepared`, is what a build, a prediction and an extension of a cache start from. Every refusal of a
cache that can be told before the first byte is here or in what this module calls.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn

from hf_freeze.anatomy import Anatomy, BlocksGiven, read_anatomy
from hf_freeze.cuts import Cut, find_cuts
from hf_freeze.errors import CannotCache, FreezeError
from hf_freeze.freezing import freeze_record
from hf_freeze.given import check_callable, check_kind, check_model
from hf_freeze.marks import REPLAY
from hf_freeze.plan import FreezePlan
from hf_freeze.prefix.folder import caches_folder
from hf_freeze.prefix.proof import check_states, check_training
from hf_freeze.prefix.rows import Collator, Rows, progress_bar, read_dataset
from hf_freeze.prefix.search import find_prefix
from hf_freeze.prefix.states import AUTOCAST, Prefix, device_of, move
from hf_freeze.processes import rank_and_world
from hf_freeze.tensors import unwrap
from hf_freeze.trial import autocast_left, is_being_trained, take_off_autocast

__all__ = ["Prepared", "refuse_moving_positions", "wider_sample"]

CHECKED_ROWS, CHECKED_TOKENS = 8, 1024  # of the proof that a row's states are its own: seconds on a CPU
MOVING_ROPES = ("dynamic", "longrope")  # transformers' names of positions that follow the batch
PRECISIONS = (None, "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Prepared:
    """What a cache is built from.

    Attributes:
        model: The unwrapped model.
        prefixes: The model's own cut first, then those of shallower plans.
        known: The dataset's rows as a cut with the decoder's side sees them (True) and as one without does (False).
        sample: Three rows of unlike length.
        folder: Where caches live.
        token_budget, max_cache_bytes, progress: As of `PrefixCache.build`; bars are the first process's.
    """

    model: Any
    anatomy: Anatomy
    collator: Collator
    prefixes: tuple[Prefix, ...]
    known: Mapping[bool, Rows]
    sample: list[int]
    folder: Path
    token_budget: int | None
    max_cache_bytes: int | None
    progress: bool

    def rows_of(self, prefix: Prefix) -> Rows:
        """The rows as this prefix knows them."""
        return self.known[prefix.with_target]

    @classmethod
    def decide(
        cls,
        model: nn.Module,
        dataset: Any,
        data_collator: Collator | None = None,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        precision: str | None = None,
        also: Sequence[FreezePlan] = (),
        token_budget: int | None = None,
        max_cache_bytes: int | None = None,
        blocks: BlocksGiven | None = None,
        progress: bool = True,
    ) -> Self:
        """Everything that must be known and hold before a row is computed. Arguments as of `PrefixCache.build`."""
        check_model("PrefixCache.build", model)
        _check_precision_name(precision)
        collator = data_collator
        if collator is None:
            from transformers import default_data_collator

            collator = default_data_collator
        check_callable(
            "PrefixCache.build", "data_collator", collator, "the model's keyword arguments for a list of rows"
        )
        for plan in also:
            check_kind("PrefixCache.build", "also", plan, FreezePlan, "a sequence of FreezePlans", "also=[plan]")
        core: Any = unwrap(model)
        _refuse_wrapped(core)
        if REPLAY in core.__dict__:
            raise FreezeError(
                f"A prefix cache was asked for a {type(core).__name__} that trains from another one already. Call its "
                "close() first, or add(dataset) for more rows."
            )
        _settle_autocast(core, precision)
        anatomy = read_anatomy(core, blocks=blocks)
        cuts = _cuts_of(core, anatomy)
        wanted_cuts = list(dict.fromkeys([cuts, *(_cuts_of_plan(plan, anatomy, cuts) for plan in also)]))
        progress = progress and rank_and_world()[0] == 0
        with_targets = dict.fromkeys(_two_sided(wanted) for wanted in wanted_cuts)
        known = read_dataset(dataset, collator, core, with_targets=with_targets, progress=progress)
        rows = known[_two_sided(cuts)]
        refuse_moving_positions(core, rows)
        sample = _sample(rows)
        prefixes = []
        with progress_bar(None, "proving the prefix", " checks", progress, total=3 * len(wanted_cuts)) as bar:
            for wanted in wanted_cuts:
                batch = move(collator([rows.features[row] for row in sample]), device_of(core))
                prefix = find_prefix(core, anatomy, wanted, batch, None if precision == "fp32" else precision)
                bar.update()
                check_states(core, prefix, rows, wider_sample(rows), collator)
                bar.update()
                check_training(core, prefix, rows, sample, collator)
                bar.update()
                prefixes.append(prefix)
        return cls(
            core,
            anatomy,
            collator,
            tuple(prefixes),
            known,
            sample,
            caches_folder(cache_dir),
            token_budget,
            max_cache_bytes,
            progress,
        )


# ----------------------------------------------------------------------------------------------------------- refusals


def _check_precision_name(precision: str | None) -> None:
    if precision not in PRECISIONS:
        raise FreezeError(
            f"PrefixCache.build was asked for precision={precision!r}; it is one of "
            f"{', '.join(map(repr, PRECISIONS))}: the autocast of training."
        )


def _settle_autocast(core: nn.Module, precision: str | None) -> None:
    """Takes off the autocast of an earlier training where this one's is another: the next trainer puts its own on."""
    wanted = AUTOCAST.get(precision or "")
    if (wanted is None or autocast_left(core) != wanted) and not is_being_trained(core):
        take_off_autocast(core)


def _refuse_wrapped(core: nn.Module) -> None:
    if any("FSDP" in type(module).__name__ for module in core.modules()):
        raise CannotCache(
            f"PrefixCache.build was asked for a {type(core).__name__} that FSDP has sharded already; its blocks cannot "
            "be stopped half way. Build the cache first, then call fully_shard."
        )
    if any(hasattr(parameter, "placements") for parameter in core.parameters()):
        raise CannotCache(
            f"PrefixCache.build was asked for a {type(core).__name__} whose tensors are cut into parts for several "
            "ranks (tensor parallel): each would compute a part of other rows. Build from a whole model, or train "
            "without the cache."
        )
    if any(parameter.device.type == "meta" for parameter in core.parameters()):
        raise CannotCache(
            f"PrefixCache.build was asked for a {type(core).__name__} on the meta device; it has no weights to compute "
            "with. Load them first."
        )


def refuse_moving_positions(core: Any, rows: Rows) -> None:
    """Rotary frequencies that follow the longest row of a batch give a row other states among longer ones."""
    config: Any = getattr(core, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    ropes = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    ropes = [ropes, *ropes.values()] if isinstance(ropes, dict) else []
    moving = [rope for rope in ropes if isinstance(rope, dict) and rope.get("rope_type") in MOVING_ROPES]
    longest = max(max(lengths.values(), default=0) for lengths in rows.lengths)
    for rope in moving:
        limit = int(rope.get("original_max_position_embeddings") or text.max_position_embeddings)
        if longest > limit:
            raise CannotCache(
                f"The prefix cache was asked for rows of up to {longest} tokens; the rotary positions of this "
                f"{type(core).__name__} ({rope['rope_type']}) change for whole batches that hold more than {limit}, so "
                f"that a row's states depend on its neighbours. Cut rows to {limit} tokens, or train without the cache."
            )


def _cuts_of(core: nn.Module, anatomy: Anatomy) -> tuple[Cut, ...]:
    record = freeze_record(core)
    if record is None:
        raise CannotCache(
            f"PrefixCache.build was asked for a {type(core).__name__} that was not frozen. Call freeze(model, plan) "
            "first."
        )
    if record[1].plan.frozen_mode == "train":
        raise CannotCache(
            "The prefix cache was asked for with frozen_mode='train', which keeps dropout on in the frozen blocks, so "
            "that their states change at every step. Use frozen_mode='eval'."
        )
    trainable = {n for n, p in anatomy.model.named_parameters(remove_duplicate=False) if p.requires_grad}
    cuts, why = find_cuts(anatomy, trainable)
    if not cuts:
        raise CannotCache(
            f"Nothing of this {anatomy.model_class} can be cached: {why} Freeze the embeddings and at least block 0."
        )
    return cuts


def _two_sided(cuts: Sequence[tuple[str, int]]) -> bool:
    """Whether a part of the decoder above an encoder is cached, so that the decoder's input counts."""
    return len({stack for stack, _ in cuts}) == 2


def _cuts_of_plan(plan: FreezePlan, anatomy: Anatomy, cuts: tuple[Cut, ...]) -> tuple[Cut, ...]:
    """The cuts of a shallower plan, all within those of the model as it is frozen now."""
    record = freeze_record(anatomy.model)
    ours = record[1].turned_off if record else set()
    tensors = dict(anatomy.model.named_parameters(remove_duplicate=False))
    trained = {
        id(tensors[name]) for name in plan.resolve(anatomy).trained if tensors[name].requires_grad or name in ours
    }
    shallower, _ = find_cuts(anatomy, {name for name, tensor in tensors.items() if id(tensor) in trained})
    depth = dict(cuts)
    if not shallower or any(blocks > depth.get(stack, 0) for stack, blocks in shallower):
        raise CannotCache(
            f"PrefixCache.build was asked to take {plan} in the same pass; its cut {list(map(tuple, shallower))} is "
            f"not within {list(map(tuple, cuts))}, what is frozen now. Freeze the deepest plan first."
        )
    return shallower


# ------------------------------------------------------------------------------------------------------------- finding


def _sample(rows: Rows) -> list[int]:
    """Three rows for the search, short ones, of unlike length where there are: cheap to run, and one is padded."""
    ordered = sorted(range(len(rows)), key=rows.tokens)
    shortest = ordered[0]
    longer = next((row for row in ordered if rows.tokens(row) > rows.tokens(shortest) + 1), ordered[-1])
    between = ordered[min(len(ordered) - 1, len(ordered) // 4)]
    return [shortest, longer, between]


def wider_sample(rows: Rows) -> list[int]:
    """Rows for the proof: of all lengths as far as a few thousand tokens go, else of the shorter ones."""
    ordered = sorted(rows.unique(), key=rows.tokens)
    while len(ordered) > CHECKED_ROWS and rows.tokens(ordered[-1]) * CHECKED_ROWS > CHECKED_TOKENS:
        ordered = ordered[: max(CHECKED_ROWS, len(ordered) * 3 // 4)]
    step = (len(ordered) - 1) / max(1, CHECKED_ROWS - 1)
    return list(dict.fromkeys(ordered[round(place * step)] for place in range(min(CHECKED_ROWS, len(ordered)))))
