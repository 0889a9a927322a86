"""Rows of a batch, known by their content: where each row's real tokens lie, and a digest of them.

A row is what the prefix sees of it: ids, mask, positions, token types, without padding, so that the same review is
found again in any batch, order or shuffle. An input without tokens, such as an image's pixels, counts whole. Labels
count only where the decoder's input is made from them. Nothing here looks at a model or at a store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from hf_freeze.errors import CannotCache

__all__ = ["PREFIX_KEY", "SOURCE", "TARGET", "BatchRows", "read_rows"]

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
            spans[side] = tuple(_extent(row) for row in mask.ne(0))
        elif isinstance(labels, torch.Tensor) and labels.shape == (count, width):
            spans[side] = tuple((0, _extent(row)[1]) for row in labels.ne(-100))
        else:
            spans[side] = ((0, width),) * count
    return spans, widths


def _extent(real: torch.Tensor) -> Span:
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
