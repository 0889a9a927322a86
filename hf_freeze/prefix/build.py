"""Computes the prefix's states of a dataset in one pass: sorted by length, batched under a token budget.

Runs the user's own collator and the model up to its last needed output, nothing above. Whether the states are right is
`proof`'s business, where to keep them the store's.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_freeze.errors import CannotCache
from hf_freeze.prefix.replay import Leaf, Prefix, autocast, map_tree
from hf_freeze.prefix.rows import SOURCE, TARGET, BatchRows, read_rows
from hf_freeze.prefix.store import Store
from hf_freeze.trial import on_trial

__all__ = ["Collator", "Rows", "build_rows", "capture", "collate", "move", "pad_states", "read_dataset", "split_rows"]

Collator = Callable[[list[Any]], Mapping[str, Any]]
SAMPLE = 16  # rows that are collated twice; fewer can miss a random mask
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
        features = self.dataset[row]
        if self.unused:
            features = {name: value for name, value in features.items() if name not in self.unused}
        return features


def read_dataset(dataset: Any, collator: Collator, model: nn.Module, *, with_target: bool, progress: bool) -> Rows:
    """Collates every row by itself, for its digest and length, and checks the collator on a sample.

    Raises:
        CannotCache: The dataset has no length or no rows, or the collator gives two answers for one row or another
            one for a row among others.
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
        rows = read_rows(collate(collator, [features[row]]), with_target=with_target)
        digests.append(rows.digests[0])
        lengths.append({side: stop - start for side, ((start, stop),) in rows.spans.items()})
        dense.append(rows.dense_tokens)
    found = Rows(features, tuple(digests), tuple(lengths), tuple(dense))
    _check_collator(found, collator, with_target)
    return found


def collate(collator: Collator, features: list[Any]) -> Mapping[str, Any]:
    """A batch of the user's collator, as a mapping.

    Raises:
        CannotCache: It returns something else.
    """
    batch = collator(features)
    if not isinstance(batch, Mapping) and not hasattr(batch, "keys"):
        raise CannotCache(
            f"The prefix cache was asked for a collator that returns a {type(batch).__name__}; it must return the "
            "model's keyword arguments as a mapping."
        )
    return batch


def _check_collator(rows: Rows, collator: Collator, with_target: bool) -> None:
    """Refuses a collator whose answer for a row is not always the same."""
    step = max(1, len(rows) // SAMPLE)
    sample = list(range(0, len(rows), step))[:SAMPLE]
    for row in sample:
        again = read_rows(collate(collator, [rows.features[row]]), with_target=with_target)
        if again.digests[0] != rows.digests[row]:
            raise CannotCache(
                f"The prefix cache was asked for a collator or dataset that gave two different answers for row {row} "
                "(random masking, augmentation or truncation); its states would change at every epoch. Fix the "
                "randomness before the cache, or train without it."
            )
    together = read_rows(collate(collator, [rows.features[row] for row in sample]), with_target=with_target)
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


def build_rows(
    model: nn.Module,
    prefixes: Sequence[tuple[Prefix, Store, Rows]],
    collator: Collator,
    *,
    token_budget: int | None,
    share: tuple[int, int],
    progress: bool,
) -> int:
    """Computes what each store lacks in one pass and adds it; returns the tokens computed here.

    Args:
        prefixes: All of one model and dataset, with the rows as each knows them; the first one is the deepest, the
            others are taken on the way.
        share: (this process, processes): each computes every so manieth batch.
    """
    rows = prefixes[0][2]
    missing = [r for r in _unique(rows) if any(known.digests[r] not in store for _, store, known in prefixes)]
    if not missing:
        return 0
    device = next(model.parameters()).device
    budget = token_budget or (TOKENS_CPU if device.type == "cpu" else TOKENS_ACCELERATOR)
    batches = list(_batches(rows, missing, budget))[share[0] :: share[1]]
    merged = _merge([prefix for prefix, _, _ in prefixes])
    with_target = TARGET in merged.sides
    total = sum(rows.tokens(row) for batch in batches for row in batch)
    bar = progress_bar(None, "computing the frozen prefix", "token", progress, total=total)
    stored = 0
    with on_trial(model, training=False), autocast(merged.precision, device):
        for batch_rows in batches:
            batch = collate(collator, [rows.features[row] for row in batch_rows])
            found = read_rows(batch, with_target=with_target)
            for place, row in enumerate(batch_rows):
                if found.digests[place] != rows.digests[row]:
                    raise CannotCache(
                        "The prefix cache was asked for a collator or dataset that gave two different answers for row "
                        f"{row} (random masking, augmentation or truncation), or pads it without an attention_mask."
                    )
            states = capture(model, merged, move(batch, device))
            for prefix, store, known in prefixes:
                leaves = prefix.leaves("stream")
                on_cpu = {name: states[name].cpu() for name in leaves}
                for row, pieces in zip(batch_rows, split_rows(on_cpu, leaves, found), strict=True):
                    if known.digests[row] not in store:
                        store.add(known.digests[row], pieces)
                        stored += sum(t.numel() * t.element_size() for t in pieces.values())
            bar.set_postfix_str(f"{stored / 1e6:,.0f} MB", refresh=False)
            bar.update(sum(rows.tokens(row) for row in batch_rows))
    for _, store, _ in prefixes:
        store.flush()
    bar.close()
    return total


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
