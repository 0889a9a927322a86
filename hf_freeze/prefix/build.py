"""Computes the prefix's states of a dataset in one pass: sorted by length, batched under a token budget.

Runs the user's own collator and the model up to its last needed output, nothing above. Whether the states are right is
`proof`'s business, where to keep them the store's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_freeze.errors import CannotCache, worded
from hf_freeze.prefix.dataset import Collator, Rows, collate_rows, progress_bar
from hf_freeze.prefix.memory import empty_cache, is_out_of_memory
from hf_freeze.prefix.replay import Leaf, Prefix, autocast, map_tree
from hf_freeze.prefix.rows import SOURCE, TARGET, BatchRows
from hf_freeze.prefix.store import Store
from hf_freeze.processes import pulse
from hf_freeze.trial import on_trial

__all__ = ["build_rows", "capture", "missing_batches", "move", "pad_states", "split_rows"]

TOKENS_CPU, TOKENS_ACCELERATOR = 2048, 32768  # of one batch: the CPU's caches gain nothing by more


# ---------------------------------------------------------------------------------------------------------- one batch


class _Captured(Exception):
    """Raised when the last needed output is there: nothing above it is computed."""


def capture(model: nn.Module, prefix: Prefix, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The prefix's streams [rows, tokens, ...] and tables of one batch, on the model's device. Without a graph."""
    wanted = {**prefix.leaves("stream"), **prefix.leaves("table")}
    found: dict[str, torch.Tensor] = {}
    calls: dict[str, int] = {}
    handles = []
    for part in prefix.replaced:
        if not any(leaf.split(":")[0] == part.name for leaf in wanted):
            continue

        def take(module: nn.Module, args: Any, output: Any, name: str = part.name) -> None:
            number = calls.get(name, 0)
            calls[name] = number + 1
            for path, tensor in enumerate(_tensors(output)):
                if (leaf := f"{name}:{number}:{path}") in wanted:
                    last = len(found) + 1 == len(wanted)
                    found[leaf] = tensor.detach() if last else tensor.detach().clone()  # it may be written to above
            if len(found) == len(wanted):
                raise _Captured

        handles.append(part.module.register_forward_hook(take))
    try:
        with torch.no_grad():
            model(**batch)
    except _Captured:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if missing := set(wanted) - set(found):
        raise CannotCache(f"A batch did not reach {min(missing).split(':')[0]} of the frozen prefix, others did.")
    return {name: leaf.to_rows(found[name]) if leaf.kind == "stream" else found[name] for name, leaf in wanted.items()}


def _tensors(output: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tree(lambda value: found.append(value) if isinstance(value, torch.Tensor) else None, output)
    return found


def move(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch as keyword arguments on a device."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def split_rows(
    states: Mapping[str, torch.Tensor], leaves: Mapping[str, Leaf], rows: BatchRows
) -> Iterator[dict[str, torch.Tensor]]:
    """Each row's states without padding, [tokens, ...] by stream."""
    for row in range(len(rows)):
        yield {
            name: states[name][row, slice(*rows.spans[leaf.side][row])] if leaf.side else states[name][row : row + 1]
            for name, leaf in leaves.items()
        }


def pad_states(
    pieces: Sequence[Mapping[str, torch.Tensor]], sides: Mapping[str, str], rows: BatchRows, *, noise: bool = False
) -> dict[str, torch.Tensor] | None:
    """Rows' states as a batch's: [rows, width, ...], where the batch has its tokens, zeros (or noise) elsewhere.

    None where a row's states are not as long as the row, or the rows' are of unlike shapes.
    """
    batch: dict[str, torch.Tensor] = {}
    for name, side in sides.items():
        sample = pieces[0][name]
        if any(piece[name].shape[1:] != sample.shape[1:] for piece in pieces):
            return None
        if not side:
            batch[name] = torch.cat([piece[name] for piece in pieces])
            continue
        padded = sample.new_zeros((len(rows), rows.widths[side], *sample.shape[1:]))
        if noise:
            generator = torch.Generator(padded.device).manual_seed(0)  # the global one belongs to the training
            padded.normal_(std=float(sample.float().std().nan_to_num(1.0)), generator=generator)
        for row, (start, stop) in enumerate(rows.spans[side]):
            if len(pieces[row][name]) != stop - start:
                return None
            padded[row, start:stop] = pieces[row][name]
        batch[name] = padded
    return batch


# --------------------------------------------------------------------------------------------------------------- pass


def missing_batches(
    prefixes: Sequence[tuple[Store, Rows]], device: torch.device, token_budget: int | None
) -> list[list[int]]:
    """The rows that a store lacks, in batches: what one process decides for all.

    Args:
        prefixes: All of one dataset, the deepest first.
        token_budget: As of `PrefixCache.build`.
    """
    rows = prefixes[0][1]
    missing = [row for row in _unique(rows) if any(known.digests[row] not in store for store, known in prefixes)]
    budget = token_budget or (TOKENS_CPU if device.type == "cpu" else TOKENS_ACCELERATOR)
    return list(_batches(rows, missing, budget))


def build_rows(
    model: nn.Module,
    prefixes: Sequence[tuple[Prefix, Store, Rows]],
    collator: Collator,
    batches: Sequence[Sequence[int]],
    *,
    progress: bool,
) -> int:
    """Computes batches of rows in one pass and adds them to the stores; returns the tokens computed.

    Where the memory is too small for a batch, it and all that follow are halved.

    Args:
        prefixes: All of one model and dataset, with the rows as each knows them; the first one is the deepest, the
            others are taken on the way.
        batches: This process's share of `missing_batches`.

    Raises:
        CannotCache: A row's content changed since it was read, or the memory is too small for a single row.
    """
    if not batches:
        return 0
    rows = prefixes[0][2]
    device = next(model.parameters()).device
    merged = _merge([prefix for prefix, _, _ in prefixes])
    total = sum(rows.tokens(row) for batch in batches for row in batch)
    bar = progress_bar(None, "computing the frozen prefix", "token", progress, total=total)
    stored = 0
    waiting = [list(batch) for batch in reversed(batches)]
    with on_trial(model, training=False), autocast(merged.precision, device):
        while waiting:
            pulse()
            batch_rows = waiting.pop()
            width = rows.width(batch_rows[0])
            try:
                computed = _compute(model, merged, prefixes, collator, batch_rows, device)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch_rows) == 1:
                    raise CannotCache(
                        f"The memory is too small for the prefix of row {batch_rows[0]} alone, {width} tokens: "
                        f"{worded(error)}. Shorten the longest rows, or train without the cache."
                    ) from error
                computed = None
            if computed is None:  # outside of the handler, whose traceback holds the tensors
                empty_cache(device)
                budget = len(batch_rows) * width // 2
                if progress:
                    print(
                        f"The memory is too small for {len(batch_rows)} rows of up to {width} tokens at once: going on "
                        f"with {budget} tokens.",
                        file=sys.stderr,
                    )
                left = [row for batch in (batch_rows, *reversed(waiting)) for row in batch]
                waiting = list(_batches(rows, left, budget))[::-1]
                continue
            for (_, store, known), pieces_of_rows in zip(prefixes, computed, strict=True):
                for row, pieces in zip(batch_rows, pieces_of_rows, strict=True):
                    if known.digests[row] not in store:
                        store.add(known.digests[row], pieces, flush=False)
                        stored += sum(t.numel() * t.element_size() for t in pieces.values())
                store.flush_when_full()
            bar.set_postfix_str(f"{stored / 1e6:,.0f} MB", refresh=False)
            bar.update(sum(rows.tokens(row) for row in batch_rows))
    for _, store, _ in prefixes:
        store.flush()
    bar.close()
    return total


def _compute(
    model: nn.Module,
    merged: Prefix,
    prefixes: Sequence[tuple[Prefix, Store, Rows]],
    collator: Collator,
    batch_rows: Sequence[int],
    device: torch.device,
) -> list[list[dict[str, torch.Tensor]]]:
    """For each prefix the states of each row of one batch, on the CPU."""
    rows = prefixes[0][2]
    batch, found = collate_rows(collator, rows.features, batch_rows, TARGET in merged.sides)
    for place, row in enumerate(batch_rows):
        if found.digests[place] != rows.digests[row]:
            raise CannotCache(
                "The prefix cache was asked for a collator or dataset that gave two different answers for row "
                f"{row} (random masking, augmentation or truncation), or pads it without an attention_mask."
            )
    states = capture(model, merged, move(batch, device))
    computed = []
    for prefix, _, _ in prefixes:
        leaves = prefix.leaves("stream")
        computed.append(list(split_rows({name: states[name].cpu() for name in leaves}, leaves, found)))
    return computed


def _merge(prefixes: Sequence[Prefix]) -> Prefix:
    """One prefix that captures what all of them need."""
    deepest = prefixes[0]
    if len(prefixes) == 1:
        return deepest
    parts: dict[str, Any] = {}
    for prefix in prefixes:
        for part in prefix.replaced:
            mine = parts.get(part.name)
            if mine is None:
                parts[part.name] = part
                continue
            outputs = tuple(_either(a, b) for a, b in zip(mine.outputs, part.outputs, strict=True))
            parts[part.name] = type(part)(part.name, part.module, part.slots, outputs)
    sides = tuple(side for side in (SOURCE, TARGET) if any(side in prefix.sides for prefix in prefixes))
    return replace(deepest, replaced=tuple(parts.values()), sides=sides)


def _either(one: Any, other: Any) -> Any:
    """The same tree; a leaf that either needs is needed."""
    mine: list[Any] = []
    map_tree(mine.append, other)
    theirs = iter(mine)

    def choose(leaf: Any) -> Any:
        second = next(theirs)
        return second if isinstance(second, Leaf) and second.kind in ("stream", "table") else leaf

    return map_tree(choose, one)


def _unique(rows: Rows) -> list[int]:
    seen: dict[bytes, int] = {}
    for row, digest in enumerate(rows.digests):
        seen.setdefault(digest, row)
    return list(seen.values())


def _batches(rows: Rows, missing: list[int], budget: int) -> Iterator[list[int]]:
    """Longest first, so that a batch that does not fit in memory fails at once; padding counts."""
    batch: list[int] = []
    for row in sorted(missing, key=lambda row: (-rows.width(row), row)):
        if batch and (len(batch) + 1) * rows.width(batch[0]) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
