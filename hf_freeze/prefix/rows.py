"""Rows of a dataset and of a batch: what each is known by, where its real tokens lie, and whether it is found again.

A row is known by what the prefix sees of it: ids, mask, positions, token types, without padding, so that the same
review is found in any batch, order or shuffle. An input without tokens, such as an image's pixels, counts whole. Labels
count only where the decoder's input is made from them. A collator that joins rows, makes several of one, fails, or
answers differently at another time is declined here, before anything is computed.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import nn

from hf_freeze.errors import CannotCache, worded
from hf_freeze.inputs import IGNORED_LABEL
from hf_freeze.prefix.memory import is_out_of_memory
from hf_freeze.processes import pulse

__all__ = ["PREFIX_KEY", "SOURCE", "TARGET", "BatchRows", "Collator", "Rows", "collate", "collate_rows", "extent",
           "progress_bar", "read_dataset", "read_rows"]  # fmt: skip

PREFIX_KEY = "prefix_states"  # the batch's key under which states travel from the collator to the model
SOURCE, TARGET = "source", "target"

# What a batch holds beside the model's input: it says how to compute a loss, not what the prefix computes.
BESIDE = frozenset({PREFIX_KEY, "labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "return_loss"})
NUMBERS_A_TOKEN = 768  # of an input without tokens, to size a batch by: a vision transformer's patch, 16 x 16 x 3
Span = tuple[int, int]


@dataclass(frozen=True)
class BatchRows:
    """The rows of one batch.

    Attributes:
        digests: 16 bytes a row.
        spans: For each side, "source" and "target", the (start, stop) of each row's real tokens.
        widths: Padded width of each side that the batch has.
        dense_tokens: Where the source has no tokens, as many as a row's numbers are worth; 0 where it has.
    """

    digests: tuple[bytes, ...]
    spans: dict[str, tuple[Span, ...]]
    widths: dict[str, int]
    dense_tokens: int = 0

    def __len__(self) -> int:
        return len(self.digests)


def read_rows(batch: Mapping[str, Any], *, with_target: bool) -> BatchRows:
    """Digest and spans of every row of a batch. The batch stays as it is.

    Real tokens run from the first to the last one of the mask; a decoder's without a mask, to its last label.

    Args:
        batch: What the user's collator returned, on the CPU.
        with_target: Whether the decoder's input matters, because a part of the decoder is cached.

    Raises:
        CannotCache: There is no tensor with a row axis, or an input whose content has no stable bytes.

    Example:
        >>> padded = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> alone = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 1]])}
        >>> rows = read_rows(padded, with_target=False)
        >>> rows.spans["source"], rows.digests == read_rows(alone, with_target=False).digests
        (((0, 2),), True)
        >>> image = read_rows({"pixel_values": torch.zeros(1, 3, 32, 32)}, with_target=False)
        >>> image.spans, image.dense_tokens
        ({}, 4)
    """
    inputs = {key: value for key, value in batch.items() if key not in BESIDE and value is not None}
    if not with_target:
        inputs = {key: value for key, value in inputs.items() if not key.startswith("decoder_")}
    elif "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs and "labels" in batch:
        inputs["labels"] = batch["labels"]  # the model makes the decoder's input from them
    tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor) and value.dim() > 0]
    if not tensors:
        raise CannotCache(
            f"The prefix cache was asked for a batch with the keys {sorted(batch)}; none of them holds a tensor with a "
            "row axis. The collator must return the model's inputs, padded, as tensors."
        )
    count = next((inputs[k] for k in ("input_ids", "attention_mask") if k in inputs), tensors[0]).shape[0]
    spans, widths = _spans(batch, with_target, count)
    states = [xxhash.xxh3_128() for _ in range(count)]
    for key in sorted(inputs):
        side = TARGET if key == "labels" or key.startswith("decoder_") else SOURCE
        _digest_input(key, inputs[key], states, spans.get(side), widths.get(side))
    numbers = 0 if SOURCE in spans else max(tensor.numel() for tensor in tensors) // count
    return BatchRows(tuple(state.digest() for state in states), spans, widths, -(-numbers // NUMBERS_A_TOKEN))


def _spans(
    batch: Mapping[str, Any], with_target: bool, count: int
) -> tuple[dict[str, tuple[Span, ...]], dict[str, int]]:
    spans: dict[str, tuple[Span, ...]] = {}
    widths: dict[str, int] = {}
    sides = {SOURCE: ("input_ids", "inputs_embeds", "attention_mask")}
    if with_target:
        sides[TARGET] = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
    for side, keys in sides.items():
        ids = next((batch[key] for key in keys if isinstance(batch.get(key), torch.Tensor)), None)
        if ids is None or ids.dim() < 2 or ids.shape[0] != count:
            continue
        width = widths[side] = ids.shape[1]
        mask = batch.get("attention_mask" if side == SOURCE else "decoder_attention_mask")
        labels = batch.get("labels") if side == TARGET else None
        if isinstance(mask, torch.Tensor) and mask.shape == (count, width):
            spans[side] = tuple(extent(row) for row in mask.ne(0))
        elif isinstance(labels, torch.Tensor) and labels.shape == (count, width):
            spans[side] = tuple((0, extent(row)[1]) for row in labels.ne(IGNORED_LABEL))
        else:
            spans[side] = ((0, width),) * count
    return spans, widths


def extent(real: torch.Tensor) -> Span:
    """From the first to after the last place that is real; everything where none is."""
    places = real.nonzero()
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, len(real))


def _digest_input(
    key: str, value: Any, states: list[xxhash.xxh3_128], spans: tuple[Span, ...] | None, width: int | None
) -> None:
    """Adds one input of the batch to each row's digest, without its padding."""
    if not isinstance(value, torch.Tensor):
        if not isinstance(value, str | int | float | bool):
            raise CannotCache(
                f"The prefix cache was asked for a batch whose {key!r} is a {type(value).__name__}; only tensors and "
                "plain values can be told from one another. Let the collator return tensors."
            )
        for state in states:
            state.update(f"{key}={value!r}".encode())
        return
    value = value.detach().cpu()
    if not value.dtype.is_floating_point:
        value = value.long()  # a bool, int32 or int64 mask is the same mask
    elif value.dtype != torch.float32:
        value = value.double()  # numpy knows no bfloat16
    by_row = value.dim() > 0 and value.shape[0] == len(states)
    trimmed = by_row and value.dim() > 1 and spans is not None and value.shape[1] == width
    for row, state in enumerate(states):
        piece = value[row] if by_row else value
        if trimmed and spans is not None:
            piece = piece[slice(*spans[row])]
        state.update(f"{key}{list(piece.shape)}".encode())
        state.update(piece.contiguous().numpy().tobytes())


# ----------------------------------------------------------------------------------------------------------- dataset

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

    def unique(self) -> list[int]:
        """One row for each content, the first."""
        first: dict[bytes, int] = {}
        for row, digest in enumerate(self.digests):
            first.setdefault(digest, row)
        return list(first.values())

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


def read_dataset(
    dataset: Any, collator: Collator, model: nn.Module, *, with_targets: Collection[bool], progress: bool
) -> dict[bool, Rows]:
    """Collates every row by itself, for its digest and length, and checks the collator on a sample.

    Args:
        with_targets: Whether the decoder's input counts; True and False where prefixes with and without it are cached
            at once.

    Returns:
        The rows as they are known with it and without, from one reading.

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
    known: dict[bool, list[BatchRows]] = {with_target: [] for with_target in with_targets}
    first, *others = known
    for row in progress_bar(range(len(dataset)), "reading rows", "row", progress):
        pulse()
        batch, alone = collate_rows(collator, features, [row], first)
        known[first].append(alone)
        for with_target in others:
            known[with_target].append(read_rows(batch, with_target=with_target))
    rows_of = {with_target: _rows(features, alone) for with_target, alone in known.items()}
    for with_target, rows in rows_of.items():
        _check_collator(rows, collator, with_target)
    return rows_of


def _rows(features: _Features, alone: Sequence[BatchRows]) -> Rows:
    return Rows(
        features,
        tuple(row.digests[0] for row in alone),
        tuple({side: stop - start for side, ((start, stop),) in row.spans.items()} for row in alone),
        tuple(row.dense_tokens for row in alone),
    )


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
        rows_read = read_rows(batch, with_target=with_target)
    except CannotCache as error:
        columns = given[0].items() if isinstance(given[0], Mapping) else ()
        if empty := [name for name, value in columns if value is None or isinstance(value, str)]:
            raise CannotCache(
                f"The prefix cache was asked for rows that are not tokenized: row {rows[0]} holds text or nothing in "
                f"{', '.join(map(repr, empty))}, and the collator makes no input of it. Tokenize the rows first, or "
                "give the data_collator of training."
            ) from error
        raise
    if len(rows_read) != len(rows):
        if len(rows_read) == 1:
            raise _packing(f"the collator joins {len(rows)} rows to one")
        raise CannotCache(
            f"The prefix cache was asked for a collator that makes {len(rows_read)} rows of {len(rows)} (row {rows[0]}"
            f"{' first' if len(rows) > 1 else ''}), such as pairs, choices or windows; a stored row is found by the "
            "one row that it was made of. Make the rows before the collator, so that it returns one for each, or train "
            "without the cache."
        )
    if (place := _restart(batch, rows_read)) is not None:
        raise _packing(f"position_ids begin again within row {rows[place]}")
    return batch, rows_read


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
    restarts = (falls & rises_later).any(1).nonzero()
    return int(restarts[0]) if len(restarts) else None


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
