"""The rows of a probe: which are trained on and which are held out, collated once, and looked at for what does not fit.

Every depth sees the same batches, so they are made here, before any of them. Nothing here runs the model.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_freeze.errors import FreezeError, TokenizerMismatch
from hf_freeze.inputs import IGNORED_LABEL

__all__ = ["ProbeRows", "Row", "draw_rows", "row_warnings"]

LEAST_VALIDATION = 8  # fewer rows say nothing of noise
HELD_OUT_SHARE = 10  # one row in so many is held out where no validation rows are given
SEEN_ROWS = 16  # of those trained on, for the training loss
MOST_LIKE_LONGEST = 0.05  # of the rows may be exactly as long as the longest before it looks like a cut
MOST_UNLIKE_START = 0.5  # of the rows may start otherwise than the tokenizer's own before it looks like a mistake

Collator = Callable[[list[Any]], Any]
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One row: as the dataset gives it, as a batch of its own, its tokens and the labels that a loss looks at.

    Of an input that has no tokens, such as an image, `tokens` is 0.
    """

    feature: Any = field(repr=False)
    batch: Batch = field(repr=False)
    tokens: int
    labels: int


@dataclass(frozen=True)
class ProbeRows:
    """What a probe trains on and is judged by.

    Attributes:
        train: Rows trained on, in the order of the first pass over them.
        held_out: Rows that the depths are compared on.
        batches: A collated batch for each step of training.
        total: Rows that the run would train on.
        unlabelled: Rows that were drawn and left out, since they have no label.
    """

    train: list[Row]
    held_out: list[Row]
    batches: list[Batch]
    total: int
    unlabelled: int

    @property
    def every(self) -> list[Row]:
        """All rows of the probe."""
        return self.train + self.held_out

    @property
    def seen(self) -> list[Row]:
        """Some of those trained on, for the training loss."""
        return self.train[:SEEN_ROWS]

    @property
    def label_share(self) -> float:
        """Mean number of labels of a row that is trained on."""
        return sum(row.labels for row in self.train) / len(self.train)


def draw_rows(
    core: Any,
    dataset: Any,
    validation: Any,
    collator: Collator,
    *,
    steps: int,
    batch_size: int,
    epochs: float,
    validation_rows: int,
    seed: int,
) -> ProbeRows:
    """Draws the probe's rows by the seed and collates them: held-out ones from `validation`, or a tenth of `dataset`.

    Where a run of so many epochs has fewer than `steps` steps, so has the probe.
    """
    least = batch_size + (LEAST_VALIDATION if validation is None else 0)
    parts = f"{batch_size} to train on" + (f" and {LEAST_VALIDATION} to hold out" if validation is None else "")
    _check_dataset("train_dataset", dataset, least, parts)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    if validation is None:
        count = min(validation_rows, max(LEAST_VALIDATION, len(dataset) // HELD_OUT_SHARE))
        held_out, order, validation = order[:count], order[count:], dataset
    else:
        _check_dataset("validation_dataset", validation, LEAST_VALIDATION, "to tell a difference from noise")
        held_out = torch.randperm(len(validation), generator=generator).tolist()[:validation_rows]
    steps = min(steps, math.ceil(epochs * math.ceil(len(order) / batch_size)))
    train = [_read_row(core, dataset, place, collator) for place in order[: steps * batch_size]]
    tested = [_read_row(core, validation, place, collator) for place in held_out]
    for which, rows in (("training", train), ("held-out", tested)):
        if not any(row.labels for row in rows):
            raise FreezeError(
                f"advise was asked for rows without a label to learn: every label of the {len(rows)} {which} rows that "
                f"it looked at is {IGNORED_LABEL}. Look at what cuts the rows, and at the collator's mask."
            )
    drawn = len(train) + len(tested)
    train, tested = [row for row in train if row.labels], [row for row in tested if row.labels]
    batches: list[Batch] = []
    places: list[int] = []
    for _ in range(steps):  # few rows come again, in another order, as in the epochs of a run
        while len(places) < batch_size:
            places += (
                torch.randperm(len(train), generator=generator).tolist() if batches or places else range(len(train))
            )
        batches.append(collator([train[place].feature for place in places[:batch_size]]))
        places = places[batch_size:]
    return ProbeRows(train, tested, batches, len(order), drawn - len(train) - len(tested))


def _check_dataset(name: str, dataset: Any, least: int, parts: str) -> None:
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
        raise FreezeError(
            f"advise was asked for a {type(dataset).__name__} as {name}; it draws rows by their number. Give one with "
            "__len__ and __getitem__, such as datasets.Dataset, or a list of the first thousand rows."
        )
    if len(dataset) < least:
        raise FreezeError(
            f"advise was asked for a {name} of {len(dataset)} rows; it needs {least} at least: {parts}. Give more rows"
            + (", a smaller batch_size, or validation_dataset." if name == "train_dataset" else ", or leave it out.")
        )


def _read_row(core: Any, dataset: Any, place: int, collator: Collator) -> Row:
    """A row as Trainer gives it to the collator, without columns that the model does not take; its tokens and labels.

    Refuses what the model would choke on.
    """
    feature = dataset[place]
    if isinstance(getattr(dataset, "column_names", None), list):
        names = _forward_names(core) | {"label", "label_ids", "labels"}
        feature = {name: value for name, value in feature.items() if name in names}
    batch = collator([feature])
    if not hasattr(batch, "keys"):
        raise FreezeError(
            f"advise was asked for a collator that returns a {type(batch).__name__}; it must return the model's "
            "keyword arguments as a mapping."
        )
    ids, mask, labels = (batch.get(name) for name in ("input_ids", "attention_mask", "labels"))
    if isinstance(ids, torch.Tensor) and not ids.is_floating_point():
        _check_ids(core, ids, "input_ids")
    by_token = isinstance(labels, torch.Tensor) and labels.dim() == 2 and not labels.is_floating_point()
    if by_token:
        _check_ids(core, labels[labels != IGNORED_LABEL], "labels")
    tokens = int(mask.sum()) if isinstance(mask, torch.Tensor) else ids.numel() if isinstance(ids, torch.Tensor) else 0
    limit = _position_limit(core)
    if limit and tokens > limit:
        raise FreezeError(
            f"advise was asked for a row of {tokens} tokens; {type(core).__name__} has {limit} positions. Cut rows to "
            f"{limit} tokens when they are tokenized."
        )
    if not isinstance(labels, torch.Tensor):
        return Row(feature, batch, tokens, 1)
    # A decoder-only model predicts each token from those before it, so that nothing predicts the first one.
    looked_at = labels[:, 1:] if by_token and _shifts_labels(core, ids, labels) else labels
    return Row(feature, batch, tokens, int((looked_at != IGNORED_LABEL).sum()) if by_token else 1)


def _shifts_labels(core: Any, ids: Any, labels: torch.Tensor) -> bool:
    causal = bool(getattr(core, "can_generate", lambda: False)())
    return causal and not _has_two_stacks(core) and isinstance(ids, torch.Tensor) and ids.shape == labels.shape


def _has_two_stacks(core: Any) -> bool:
    return bool(getattr(getattr(core, "config", None), "is_encoder_decoder", False))


def _forward_names(core: Any) -> set[str]:
    inner = core.get_base_model() if hasattr(core, "get_base_model") else core
    return set(inspect.signature(inner.forward).parameters)


def _check_ids(core: Any, ids: torch.Tensor, name: str) -> None:
    table = core.get_input_embeddings() if hasattr(core, "get_input_embeddings") else None
    rows = len(table.weight) if isinstance(table, nn.Embedding) else None
    if rows and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise FreezeError(
            f"advise was asked for rows with the id {wrong} in {name}; the embeddings of {type(core).__name__} have "
            f"{rows} rows. Use the tokenizer of the same checkpoint, pad with an id of its vocabulary (labels with "
            f"{IGNORED_LABEL}), or call model.resize_token_embeddings first."
        )


def _position_limit(core: Any) -> int | None:
    config: Any = getattr(core, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


# -------------------------------------------------------------------------------------------------------- what is odd


def row_warnings(rows: ProbeRows, collator: Collator, core: Any, tokenizer: Any) -> list[str]:
    """Preprocessing that very likely does not fit the model or the task."""
    warned = []
    every = rows.every
    lengths = [row.tokens for row in every]
    longest, cut = max(lengths), lengths.count(max(lengths))
    if MOST_LIKE_LONGEST * len(every) < cut < len(every) and cut > 1 and longest > min(lengths) + 1:
        warned.append(
            f"{cut} of {len(every)} rows are exactly {longest} tokens long, the longest: they look cut, and may have "
            "lost their end, where the labels of a decoder-only model stand. Raise the limit, or cut the text before."
        )
    if rows.unlabelled:
        drawn = len(every) + rows.unlabelled
        warned.append(f"{rows.unlabelled} of {drawn} rows have no label: they teach nothing. Look at what cuts them.")
    ordered = sorted(every, key=lambda row: row.tokens)
    batch = collator([ordered[0].feature, ordered[-1].feature])
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    # Of two stacks the mask is the encoder's and the labels are the decoder's, of the same shape only by chance.
    both = isinstance(labels, torch.Tensor) and isinstance(mask, torch.Tensor) and not _has_two_stacks(core)
    if both and labels.shape == mask.shape and bool((labels[mask == 0] != IGNORED_LABEL).any()):
        warned.append(
            f"Padded places have labels: the loss learns padding. Pad labels with {IGNORED_LABEL}, as "
            "DataCollatorForSeq2Seq and SummaryCollator do."
        )
    return warned + ([] if tokenizer is None else _tokenizer_warnings(rows, core, tokenizer))


def _tokenizer_warnings(rows: ProbeRows, core: Any, tokenizer: Any) -> list[str]:
    """A tokenizer that does not fit the model, or rows that were not made as the tokenizer makes them."""
    from hf_freeze.inputs.tokenizer import check_tokenizer, role_id

    warned = []
    config = getattr(core, "config", None)
    try:
        check_tokenizer(config, copy.deepcopy(tokenizer))  # it may set a pad token
    except TokenizerMismatch as mismatch:
        warned.append(str(mismatch))
    sources = (config, getattr(core, "generation_config", None))
    declared = [getattr(source, "eos_token_id", None) for source in sources]
    named = [role_id(tokenizer, "eos"), *(end for ids in declared for end in (ids if isinstance(ids, list) else [ids]))]
    ends = {int(end) for end in named if end is not None}
    looked_at = rows.seen
    labels = [row.batch["labels"].flatten().tolist() for row in looked_at if "labels" in row.batch]
    generates = hasattr(core, "can_generate") and core.can_generate()
    if generates and labels and not any(ends & set(row) for row in labels):
        warned.append(
            f"No end token ({', '.join(map(str, sorted(ends)))}) is among the labels of the first {len(labels)} rows: "
            "the model would never learn to stop. A collator that ignores labels of the pad id ignores the end too "
            "where one token serves as both."
        )
    start = _own_start(tokenizer)
    first = [_first_id(row.batch) for row in looked_at]
    unlike = sum(one != start for one in first)
    if start is not None and None not in first and unlike > MOST_UNLIKE_START * len(first):
        warned.append(
            f"{unlike} of {len(first)} rows do not start with {tokenizer.convert_ids_to_tokens(start)!r} ({start}), "
            "which this tokenizer puts before a text. Leave add_special_tokens on when the rows are made."
        )
    return warned


def _own_start(tokenizer: Any) -> int | None:
    """The special token that the tokenizer puts before any text, if it does."""
    ids = tokenizer("a")["input_ids"]
    return int(ids[0]) if ids and ids[0] in tokenizer.all_special_ids else None


def _first_id(batch: Batch) -> int | None:
    """The first token of a batch of one row that is not padding."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, torch.Tensor) or not ids.numel():
        return None
    return int(ids[0, int(mask[0].int().argmax()) if isinstance(mask, torch.Tensor) else 0])
