"""Reads the rows of a dataset through the user's collator: what each is known by, and whether it can be found again.

A collator that joins rows, makes several of one, fails, or answers differently at another time is declined here, before
anything is computed. What a row is known by is `rows`' business.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_freeze.errors import CannotCache, worded
from hf_freeze.prefix.memory import is_out_of_memory
from hf_freeze.prefix.rows import BatchRows, read_rows
from hf_freeze.processes import pulse

__all__ = ["Collator", "Rows", "collate", "collate_rows", "progress_bar", "read_dataset"]

Collator = Callable[[list[Any]], Mapping[str, Any]]
SAMPLE = 16  # rows that are collated twice; fewer can miss a random mask
PACKED = ("cu_seq", "max_length_q", "seq_idx")  # how the names begin that say where joined documents end


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
            if is_out_of_memory(error):
                raise
            raise CannotCache(
                f"Row {row} of the dataset that the prefix cache was asked for cannot be read: {worded(error)}. "
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
        _, rows = collate_rows(collator, features, [row], with_target)
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
        if is_out_of_memory(error):
            raise
        which = f"row {rows[0]}" if len(rows) == 1 else f"{len(features)} rows together"
        raise CannotCache(
            f"The prefix cache was asked for a collator that fails on {which}: {worded(error)}. "
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


def collate_rows(
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


def _check_collator(rows: Rows, collator: Collator, with_target: bool) -> None:
    """Refuses a collator whose answer for a row is not always the same."""
    step = max(1, len(rows) // SAMPLE)
    sample = list(range(0, len(rows), step))[:SAMPLE]
    for row in sample:
        _, again = collate_rows(collator, rows.features, [row], with_target)
        if again.digests[0] != rows.digests[row]:
            raise CannotCache(
                f"The prefix cache was asked for a collator or dataset that gave two different answers for row {row} "
                "(random masking, augmentation or truncation); its states would change at every epoch. Fix the "
                "randomness before the cache, or train without it."
            )
    _, together = collate_rows(collator, rows.features, sample, with_target)
    for place, row in enumerate(sample):
        if together.digests[place] != rows.digests[row]:
            raise CannotCache(
                f"Row {row} looks different to the prefix cache when it is collated among others: its padding cannot "
                "be told from its tokens, or another input follows the batch. Let the collator return an "
                "attention_mask (and a decoder_attention_mask, or labels, for a decoder)."
            )


def progress_bar(items: Any, what: str, unit: str, progress: bool, total: int | None = None) -> Any:
    """A bar on stderr, over items or moved by hand; silent for what is quick, or where `progress` is off."""
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
