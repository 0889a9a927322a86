"""Computes the prefix's states of a dataset in one pass, each process its share, and writes them into the stores.

Rows are batched by length under a token budget, longest first. They run through the user's own collator, and through
the model up to its last needed output, nothing above. Whether a prefix may be cached is `prepare`'s business, whether
its states are right that of `proof` and `spot`.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_freeze.errors import CacheDamaged, CannotCache, FreezeError, worded
from hf_freeze.prefix.folder import evict_caches, remove_leftovers
from hf_freeze.prefix.key import folder_of
from hf_freeze.prefix.memory import empty_cache, is_out_of_memory
from hf_freeze.prefix.prepare import Prepared
from hf_freeze.prefix.rows import SOURCE, TARGET, Collator, Rows, collate_rows, progress_bar
from hf_freeze.prefix.states import (
    Leaf,
    Prefix,
    bytes_of_row,
    capture,
    device_of,
    map_tree,
    move,
    running,
    same_states,
    split_rows,
)
from hf_freeze.prefix.store import Store
from hf_freeze.processes import agreed, from_first, pulse, rank_and_world, tell_all

__all__ = ["check_alike", "fill", "model_name", "open_or_create", "save_tables"]

TOKENS_CPU, TOKENS_ACCELERATOR = 2048, 32768  # of one batch: the CPU's caches gain nothing by more
LOCK_SECONDS = 1.0  # of waiting for another build, before the other processes of this one are told that it goes on


class Job(NamedTuple):
    """What one prefix of a pass is computed for: a store, and the rows as this prefix knows them."""

    prefix: Prefix
    store: Store
    rows: Rows


def fill(
    prepared: Prepared,
    prefixes: Sequence[tuple[Prefix, Rows]],
    collator: Collator,
    ready: Callable[[], list[Store]],
) -> tuple[list[Store], int, int]:
    """Computes what the stores lack, each process its share of what the first one found missing.

    Args:
        prefixes: All of one dataset, the deepest first, with the rows as each knows them.
        ready: Makes their stores ready: in the first process before anything is decided, in the others afterwards.

    Returns:
        The stores with all rows, how many rows were computed in all processes, and the tokens computed in this one.
    """
    rank, world = rank_and_world()
    with (
        _one_builder(prepared.folder, rank == 0, prepared.progress),
        agreed("compute the prefix"),  # the lock is kept until the last process has written
    ):
        stores = ready() if rank == 0 else []
        decided: tuple[list[list[list[int]]], int] | None = None
        if rank == 0:
            jobs = _jobs(prefixes, stores)
            _check_disk(prepared.folder, jobs, prepared.max_cache_bytes)
            batches = _missing_batches(jobs, device_of(prepared.model), prepared.token_budget)
            lacking = sum(digest not in stores[0] for digest in set(jobs[0].rows.digests))
            decided = [batches[number::world] for number in range(world)], lacking
        shares, computed = from_first(decided) or ([], 0)
        stores = stores or ready()
        jobs = _jobs(prefixes, stores)
        tokens = build_rows(prepared.model, jobs, collator, shares[rank], progress=prepared.progress)
    for store in stores:
        store.refresh()
    return stores, computed, tokens


def _jobs(prefixes: Sequence[tuple[Prefix, Rows]], stores: Sequence[Store]) -> list[Job]:
    return [Job(prefix, store, rows) for (prefix, rows), store in zip(prefixes, stores, strict=True)]


# -------------------------------------------------------------------------------------------------------------- stores


def check_alike(known: Sequence[Rows], keys: Sequence[Mapping[str, Any]] = ()) -> None:
    """Refuses processes that would build for unlike models or from unlike rows."""
    counts = [(len(rows), hashlib.sha256(b"".join(rows.digests)).hexdigest()) for rows in known]
    of_ranks = tell_all((counts, list(keys)))
    first_rows, first_keys = of_ranks[0]
    for rank, (other_rows, other_keys) in enumerate(of_ranks):
        if differing := [name for one, other in zip(first_keys, other_keys, strict=True) for name in {**one, **other}
                         if one.get(name) != other.get(name)]:  # fmt: skip
            raise CannotCache(
                f"The model of rank {rank} is another one than that of rank 0: the {differing[0]} of the frozen prefix "
                "differ. Load the same weights with the same settings on every rank, or set one seed before they are "
                "drawn."
            )
        if other_rows != first_rows:
            raise CannotCache(
                f"Rank {rank} gave the prefix cache other rows ({other_rows[0][0]:,}) than rank 0 "
                f"({first_rows[0][0]:,}): each computes a share of all. Give every rank the whole dataset, in the same "
                "order and with the same collator."
            )


def open_or_create(prepared: Prepared, prefix: Prefix, key: dict[str, Any], reasons: list[str]) -> Store:
    """The prefix's store, mended or made anew; adds why, where it was not as it should be. For one process only."""
    folder = folder_of(prepared.folder, key)
    remove_leftovers(folder)
    try:
        store = Store.open(folder, key, prefix.streams(), mend=reasons)
    except CacheDamaged as damage:
        if folder.exists():
            reasons.append(str(damage))
        store = Store.create(folder, key, prefix.streams(), model_name(prepared.model), mend=reasons)
    save_tables(prepared.model, prefix, store, prepared.rows_of(prefix), prepared.collator, reasons)
    return store


def model_name(core: Any) -> str:
    """What people call a model: where it was loaded from, else its class."""
    source = str(getattr(getattr(core, "config", None), "_name_or_path", "") or "")
    return source or type(core).__name__


def save_tables(
    core: nn.Module, prefix: Prefix, store: Store, rows: Rows, collator: Collator, reasons: list[str]
) -> None:
    """What is the same for all rows, at the greatest width that a batch of these rows can have.

    What is stored for wider rows stays, where it agrees with what the model computes now.
    """
    if not (specs := prefix.tables()):
        return
    widest = [max(range(len(rows)), key=lambda row: rows.lengths[row].get(side, 0)) for side in prefix.sides]
    batch = move(collator([rows.features[row] for row in widest]), device_of(core))
    with running(core, prefix.precision, training=False):
        taken = capture(core, prefix, batch)
    tables = {spec.name: taken[spec.name].cpu() for spec in specs}
    stored: dict[str, torch.Tensor] = {}
    try:
        stored = store.load_tables(specs, {})
    except CacheDamaged as damage:
        if len(store):  # else there were none yet
            reasons.append(str(damage))
    kept = {}
    for name, old in stored.items():
        new = tables[name]
        both = tuple(slice(min(sizes)) for sizes in zip(old.shape, new.shape, strict=True))
        if not same_states(old[both], new[both], low=prefix.precision not in (None, "fp32")):
            reasons.append(f"The stored {name} is not what the model computes.")
        elif all(have >= wanted for have, wanted in zip(old.shape, new.shape, strict=True)):
            kept[name] = old
        elif any(have > wanted for have, wanted in zip(old.shape, new.shape, strict=True)):
            raise CannotCache(
                f"The prefix cache holds {name} for lengths {list(old.shape)} and was asked for {list(new.shape)}, "
                "wider and narrower at once. Build it from all rows in one call."
            )
    if len(kept) < len(tables):
        store.save_tables(tables | kept)


def _check_disk(folder: Path, jobs: Sequence[Job], limit: int | None) -> None:
    """Frees room under the limit, and refuses before the first byte what will not fit."""
    needed = sum(
        bytes_of_row(store.specs, rows.lengths[row])
        for _, store, rows in jobs
        for row in rows.unique()
        if rows.digests[row] not in store
    )
    if limit is not None:
        if needed + sum(store.stored_bytes for _, store, _ in jobs) > limit:
            raise FreezeError(
                f"The prefix cache needs {needed / 1e9:.2f} GB; max_cache_bytes allows {limit / 1e9:.2f} GB. Raise it, "
                "or train without the cache."
            )
        evict_caches(folder, limit, [store.folder for _, store, _ in jobs], needed)
    free = shutil.disk_usage(folder).free
    if needed * 1.02 > free:
        raise FreezeError(
            f"The prefix cache needs {needed / 1e9:.2f} GB in {folder}; {free / 1e9:.2f} GB are free. Free space, give "
            "another cache_dir, or train without the cache."
        )


@contextmanager
def _one_builder(folder: Path, chief: bool, progress: bool) -> Iterator[None]:
    """Lets one build at a time write into a cache folder: the second one waits, then finds the rows there."""
    if not chief:
        yield
        return
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "build.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if progress:
                print(f"Another process builds in {folder}: waiting for it.", file=sys.stderr)
            while not lock.is_locked:
                pulse()
                with suppress(Timeout):
                    lock.acquire(timeout=LOCK_SECONDS)
    except OSError as error:
        raise FreezeError(
            f"The prefix cache was to be kept in {folder}; it cannot be written: {error}. Give a cache_dir that can."
        ) from error
    try:
        yield
    finally:
        lock.release()


# --------------------------------------------------------------------------------------------------------------- pass


def _missing_batches(jobs: Sequence[Job], device: torch.device, token_budget: int | None) -> list[list[int]]:
    """The rows that a store lacks, in batches: what one process decides for all."""
    rows = jobs[0].rows
    missing = [row for row in rows.unique() if any(known.digests[row] not in store for _, store, known in jobs)]
    budget = token_budget or (TOKENS_CPU if device.type == "cpu" else TOKENS_ACCELERATOR)
    return list(_batches(rows, missing, budget))


def build_rows(
    model: nn.Module, jobs: Sequence[Job], collator: Collator, batches: Sequence[Sequence[int]], *, progress: bool
) -> int:
    """Computes batches of rows in one pass and adds them to the stores; returns the tokens computed.

    Where the memory is too small for a batch, it and all that follow are halved.

    Args:
        jobs: The first one is the deepest, the others are taken on the way.
        batches: This process's share of `_missing_batches`.

    Raises:
        CannotCache: A row's content changed since it was read, or the memory is too small for a single row.
    """
    if not batches:
        return 0
    rows = jobs[0].rows
    device = device_of(model)
    merged = _merge([job.prefix for job in jobs])
    total = sum(rows.tokens(row) for batch in batches for row in batch)
    bar = progress_bar(None, "computing the frozen prefix", "token", progress, total=total)
    stored = 0
    waiting = [list(batch) for batch in reversed(batches)]
    with running(model, merged.precision, training=False):
        while waiting:
            pulse()
            batch_rows = waiting.pop()
            width = rows.width(batch_rows[0])
            try:
                computed = _compute(model, merged, jobs, collator, batch_rows)
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
            for (_, store, known), pieces_of_rows in zip(jobs, computed, strict=True):
                for row, pieces in zip(batch_rows, pieces_of_rows, strict=True):
                    if known.digests[row] not in store:
                        store.add(known.digests[row], pieces, flush=False)
                        stored += sum(t.numel() * t.element_size() for t in pieces.values())
                store.flush_when_full()
            bar.set_postfix_str(f"{stored / 1e6:,.0f} MB", refresh=False)
            bar.update(sum(rows.tokens(row) for row in batch_rows))
    for job in jobs:
        job.store.flush()
    bar.close()
    return total


def _compute(
    model: nn.Module, merged: Prefix, jobs: Sequence[Job], collator: Collator, batch_rows: Sequence[int]
) -> list[list[dict[str, torch.Tensor]]]:
    """For each job the states of each row of one batch, on the CPU."""
    rows = jobs[0].rows
    batch, read = collate_rows(collator, rows.features, batch_rows, merged.with_target)
    for place, row in enumerate(batch_rows):
        if read.digests[place] != rows.digests[row]:
            raise CannotCache(
                "The prefix cache was asked for a collator or dataset that gave two different answers for row "
                f"{row} (random masking, augmentation or truncation), or pads it without an attention_mask."
            )
    states = capture(model, merged, move(batch, device_of(model)))
    computed = []
    for prefix, _, _ in jobs:
        leaves = prefix.leaves("stream")
        computed.append(list(split_rows({name: states[name].cpu() for name in leaves}, leaves, read)))
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
            parts[part.name] = replace(part, outputs=outputs)
    sides = tuple(side for side in (SOURCE, TARGET) if any(side in prefix.sides for prefix in prefixes))
    return replace(deepest, replaced=tuple(parts.values()), sides=sides)


def _either(one: Any, other: Any) -> Any:
    """The same tree; a leaf that either needs is needed."""
    others: list[Any] = []
    map_tree(others.append, other)
    theirs = iter(others)

    def choose(leaf: Any) -> Any:
        second = next(theirs)
        return second if isinstance(second, Leaf) and second.kind in ("stream", "table") else leaf

    return map_tree(choose, one)


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
