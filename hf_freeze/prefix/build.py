"""Computes the prefix's states of a dataset in one pass: sorted by length, batched under a token budget.

Runs the user's own collator and the model up to its last needed output, nothing above. Whether the states are right is
`proof`'s business, where to keep them the store's.
"""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_freeze.errors import CannotCache
from hf_freeze.prefix.replay import Leaf, Prefix, autocast, map_tree
from hf_freeze.prefix.rows import SOURCE, TARGET, BatchRows, read_rows
from hf_freeze.prefix.store import Store
from hf_freeze.processes import pulse
from hf_freeze.trial import on_trial

__all__ = [
    "Collator",
    "Rows",
    "build_rows",
    "capture",
    "collate",
    "declining_without_memory",
    "missing_batches",
    "move",
    "pad_states",
    "read_dataset",
    "split_rows",
]

Collator = Callable[[list[Any]], Mapping[str, Any]]
SAMPLE = 16  # rows that are collated twice; fewer can miss a random mask
PACKED = ("cu_seq", "max_length_q", "seq_idx")  # how the names begin that say where joined documents end
NO_MEMORY = ("out of memory", "not enough memory", "t allocate memory", "failed to allocate")  # in a RuntimeError
TOKENS_CPU, TOKENS_ACCELERATOR = 2048, 32768  # of one batch: the CPU's caches gain nothing by more


@dataclass(frozen=True)
class Rows:
    """What is known of every row of a dataset: its place, digest and length in tokens, or its work without any."""

    features: Any
    digests: tuple[bytes, ...]
    lengths: tuple[dict[str, int], ...]
    dense_tokens: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.digests)

    def tokens(self, row: int) -> int:
        """Tokens of a row on all sides, an image's pixels as many as they are worth."""
        return max(1, sum(self.lengths[row].values()) + self.dense_tokens[row])

    def longest(self) -> dict[str, int]:
        """Tokens of the longest row, by side."""
        return {side: max(lengths.get(side, 0) for lengths in self.lengths) for side in self.lengths[0]}

    def width(self, row: int) -> int:
        """Tokens of a row on its longest side: what a batch of it is padded to."""
        return max(1, *self.lengths[row].values(), self.dense_tokens[row])


class _Features:
    """Rows of a dataset as a stock Trainer gives them to the collator: without columns that the model does not take."""

    def __init__(self, dataset: Any, model: nn.Module) -> None:
        self.dataset = dataset
        core: Any = model
        core = core.get_base_model() if hasattr(core, "get_base_model") else core
        names = inspect.signature(core.forward).parameters
        columns = getattr(dataset, "column_names", None)
        self.unused: set[str] = set()
        if isinstance(columns, list) and {"input_ids", "pixel_values", "inputs_embeds"} & set(columns):
            self.unused = {c for c in columns if c not in names and c not in ("label", "label_ids", "labels")}

    def __getitem__(self, row: int) -> Any:
        try:
            features = self.dataset[row]
        except Exception as error:
            if _is_out_of_memory(error):
                raise
            raise CannotCache(
                f"Row {row} of the dataset that the prefix cache was asked for cannot be read: {_told(error)}. "
                "Training reads it too: mend the row, or leave it out."
            ) from error
        if self.unused:
            features = {name: value for name, value in features.items() if name not in self.unused}
        return features


def read_dataset(dataset: Any, collator: Collator, model: nn.Module, *, with_target: bool, progress: bool) -> Rows:
    """Collates every row by itself, for its digest and length, and checks the collator on a sample.

    Raises:
        CannotCache: The dataset has no length or no rows; or the collator cannot collate them, joins rows or makes
            several of one, or gives two answers for one row or another one for a row among others.
    """
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
        raise CannotCache(
            f"The prefix cache was asked for a {type(dataset).__name__}; a dataset that can only be iterated has rows "
            "that cannot be looked up again. Use one with __len__ and __getitem__, such as datasets.Dataset."
        )
    if not len(dataset):
        raise CannotCache("The prefix cache was asked for a dataset without rows. Give it the training rows.")
    features = _Features(dataset, model)
    digests: list[bytes] = []
    lengths: list[dict[str, int]] = []
    dense: list[int] = []
    for row in progress_bar(range(len(dataset)), "reading rows", "row", progress):
        pulse()
        _, rows = _collate_rows(collator, features, [row], with_target)
        digests.append(rows.digests[0])
        lengths.append({side: stop - start for side, ((start, stop),) in rows.spans.items()})
        dense.append(rows.dense_tokens)
    found = Rows(features, tuple(digests), tuple(lengths), tuple(dense))
    _check_collator(found, collator, with_target)
    return found


def collate(collator: Collator, features: list[Any], rows: Sequence[int] = ()) -> Mapping[str, Any]:
    """A batch of the user's collator, as a mapping.

    Args:
        rows: Where the features stand in the dataset, for the message.

    Raises:
        CannotCache: The collator fails, or returns something else.
    """
    try:
        batch = collator(features)
    except Exception as error:
        if _is_out_of_memory(error):
            raise
        which = f"row {rows[0]}" if len(rows) == 1 else f"{len(features)} rows together"
        raise CannotCache(
            f"The prefix cache was asked for a collator that fails on {which}: {_told(error)}. "
            f"{_why_default_fails(collator, features)}"
        ) from error
    if not isinstance(batch, Mapping) and not hasattr(batch, "keys"):
        raise CannotCache(
            f"The prefix cache was asked for a collator that returns a {type(batch).__name__}; it must return the "
            "model's keyword arguments as a mapping."
        )
    return batch


def _why_default_fails(collator: Collator, features: list[Any]) -> str:
    """What to do about rows that cannot be collated; names the column where transformers' default one failed."""
    from transformers import default_data_collator

    if collator is not default_data_collator:
        return "Give the collator that training uses, and the rows as training gives them to it."
    rows = [feature if isinstance(feature, Mapping) else vars(feature) for feature in features]
    for name, value in rows[0].items():
        values = [row.get(name) for row in rows]
        kinds = sorted({type(value).__name__ for value in values})
        if len(kinds) > 1 or (isinstance(value, str) and name in ("label", "label_ids")):
            return (
                f"No data_collator was given, and the default one makes no tensor of column {name!r} ("
                f"{' and '.join(kinds)}). Fill its gaps and make it numbers, or give the data_collator of training."
            )
        sizes = sorted({len(each) for each in values if isinstance(each, Sized) and not isinstance(each, str)})
        if len(sizes) > 1:
            return (
                f"No data_collator was given, and the default one pads nothing: column {name!r} holds {sizes[0]} to "
                f"{sizes[-1]} values a row. Give a data_collator that pads, such as DataCollatorWithPadding(tokenizer)."
            )
    return "No data_collator was given, and the default one cannot collate these rows. Give that of training."


def _collate_rows(
    collator: Collator, features: _Features, rows: Sequence[int], with_target: bool
) -> tuple[Mapping[str, Any], BatchRows]:
    """Some rows of a dataset as a batch, and what is known of each: the batch has one row for each of them."""
    given = [features[row] for row in rows]
    batch = collate(collator, given, rows)
    if named := [key for key in batch if key.startswith(PACKED)]:
        raise _packing(f"it returns {', '.join(named)}")
    try:
        found = read_rows(batch, with_target=with_target)
    except CannotCache as error:
        columns = given[0].items() if isinstance(given[0], Mapping) else ()
        if empty := [name for name, value in columns if value is None or isinstance(value, str)]:
            raise CannotCache(
                f"The prefix cache was asked for rows that are not tokenized: row {rows[0]} holds text or nothing in "
                f"{', '.join(map(repr, empty))}, and the collator makes no input of it. Tokenize the rows first, or "
                "give the data_collator of training."
            ) from error
        raise
    if len(found) != len(rows):
        if len(found) == 1:
            raise _packing(f"the collator joins {len(rows)} rows to one")
        raise CannotCache(
            f"The prefix cache was asked for a collator that makes {len(found)} rows of {len(rows)} (row {rows[0]}"
            f"{' first' if len(rows) > 1 else ''}), such as pairs, choices or windows; a stored row is found by the "
            "one row that it was made of. Make the rows before the collator, so that it returns one for each, or train "
            "without the cache."
        )
    if (place := _restart(batch, found)) is not None:
        raise _packing(f"position_ids begin again within row {rows[place]}")
    return batch, found


def _packing(how: str) -> CannotCache:
    return CannotCache(
        f"The prefix cache was asked for packing (packing=True, padding_free=True, flattening): {how}. Documents that "
        "share a row are others at each shuffle, and their borders are no part of a stored row. Turn packing off: what "
        "trains from the cache wastes little on padding; or train without the cache."
    )


def _restart(batch: Mapping[str, Any], rows: BatchRows) -> int | None:
    """The first row in which positions begin again, without a mask: then transformers sees borders there."""
    positions = batch.get("position_ids")
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2 or batch.get("attention_mask") is not None:
        return None
    if positions.shape[0] != len(rows) or "input_ids" not in batch:
        return None
    falls = positions[:, 1:] < positions[:, :-1]
    rises_later = (positions[:, 1:] > positions[:, :-1]).flip(1).cumsum(1).flip(1) > 0
    found = (falls & rises_later).any(1).nonzero()
    return int(found[0]) if len(found) else None


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _check_collator(rows: Rows, collator: Collator, with_target: bool) -> None:
    """Refuses a collator whose answer for a row is not always the same."""
    step = max(1, len(rows) // SAMPLE)
    sample = list(range(0, len(rows), step))[:SAMPLE]
    for row in sample:
        _, again = _collate_rows(collator, rows.features, [row], with_target)
        if again.digests[0] != rows.digests[row]:
            raise CannotCache(
                f"The prefix cache was asked for a collator or dataset that gave two different answers for row {row} "
                "(random masking, augmentation or truncation); its states would change at every epoch. Fix the "
                "randomness before the cache, or train without it."
            )
    _, together = _collate_rows(collator, rows.features, sample, with_target)
    for place, row in enumerate(sample):
        if together.digests[place] != rows.digests[row]:
            raise CannotCache(
                f"Row {row} looks different to the prefix cache when it is collated among others: its padding cannot "
                "be told from its tokens, or another input follows the batch. Let the collator return an "
                "attention_mask (and a decoder_attention_mask, or labels, for a decoder)."
            )


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
                if not _is_out_of_memory(error):
                    raise
                if len(batch_rows) == 1:
                    raise CannotCache(
                        f"The memory is too small for the prefix of row {batch_rows[0]} alone, {width} tokens: "
                        f"{_told(error)}. Shorten the longest rows, or train without the cache."
                    ) from error
                computed = None
            if computed is None:  # outside of the handler, whose traceback holds the tensors
                _empty_cache(device)
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
                        store.add(known.digests[row], pieces)
                        stored += sum(t.numel() * t.element_size() for t in pieces.values())
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
    batch, found = _collate_rows(collator, rows.features, batch_rows, TARGET in merged.sides)
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


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)


def _empty_cache(device: torch.device) -> None:
    gc.collect()
    if device.type != "cpu" and hasattr(module := torch.get_device_module(device), "empty_cache"):
        module.empty_cache()


@contextmanager
def declining_without_memory(what: str) -> Iterator[None]:
    """Turns an error for want of memory into one that lets training go on without the cache.

    Args:
        what: What was done, as in "The memory is too small to ...".

    Raises:
        CannotCache: In its place.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise CannotCache(
            f"The memory is too small to {what}: {_told(error)}. Free memory, shorten the longest rows, or train "
            "without the cache."
        ) from error


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


def progress_bar(items: Any, what: str, unit: str, progress: bool, total: int | None = None) -> Any:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    quiet = not progress or (items is not None and len(items) < 2000)
    return tqdm(
        items,
        desc=what,
        unit=unit,
        total=total,
        disable=quiet,
        unit_scale=True,
        file=sys.stderr,
        mininterval=0.5,
        delay=0.5,
    )
