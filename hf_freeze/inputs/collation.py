"""Encoded reviews as batches: padded on the right, with the decoder's inputs where a model needs them.

`SummaryCollator` asks a model once by which rule it makes decoder inputs from labels, keeps that rule, and goes to
data-loader workers without the model. A rule that is not known is refused, not guessed; nothing here tokenizes or cuts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_freeze.errors import ModelError, ReviewsError, TokenizerMismatch
from hf_freeze.inputs import IGNORED_LABEL
from hf_freeze.inputs.tokenizer import role_id, underlying_model

__all__ = ["SummaryCollator"]


class SummaryCollator:
    """Pads encoded rows to one batch: on the right, labels with -100, `decoder_input_ids` where a model needs them.

    An encoder-decoder model makes `decoder_input_ids` from labels only where it also computes the loss. A loss that is
    computed outside (a token sum over the items of all accumulated batches) leaves labels out of the call, so the
    batch brings them. The model's own function is asked once, here, which of the two known rules it follows; only that
    rule and two ids are kept, so that the collator pickles to data-loader workers without the model.

    Args:
        tokenizer: for its pad id.
        model: an encoder-decoder model, for `decoder_input_ids`. A decoder-only model, or None, adds nothing.
        label_pad: what padded labels hold; losses skip -100.
        pad_to_multiple_of: widths are rounded up to it (8 suits tensor cores); None leaves them.

    Raises:
        TokenizerMismatch: the tokenizer has no pad token.
        ModelError: an encoder-decoder model whose way of shifting labels is not known.

    >>> from hf_freeze.inputs.tokenizer import doctest_tokenizer
    >>> collator = SummaryCollator(doctest_tokenizer())
    >>> rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    >>> batch = collator(rows)
    >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist()
    ([[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]], [[-100, 6, 7], [8, -100, -100]])
    """

    def __init__(
        self,
        tokenizer: Any,
        model: Any = None,
        label_pad: int = IGNORED_LABEL,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        pad_id = role_id(tokenizer, "pad")
        if pad_id is None:
            raise TokenizerMismatch(
                "The tokenizer has no pad token, so a batch cannot be padded. check_tokenizer(model, tokenizer) "
                "chooses one."
            )
        self.pad_token_id = pad_id
        self.label_pad = label_pad
        self.pad_to_multiple_of = pad_to_multiple_of
        inner = None if model is None else underlying_model(model)
        self.shift = _read_shift(inner) if inner is not None and inner.config.is_encoder_decoder else None

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Pads `input_ids`, `attention_mask` and `labels` (in all rows or in none); other keys are left out."""
        rows = [feature["input_ids"] for feature in features]
        masks = [feature.get("attention_mask", [1] * len(feature["input_ids"])) for feature in features]
        batch = {"input_ids": self._pad(rows, self.pad_token_id), "attention_mask": self._pad(masks, 0)}
        labelled = sum("labels" in feature for feature in features)
        if labelled not in (0, len(features)):
            raise ReviewsError(
                f"{labelled} of the {len(features)} rows of a batch have labels. Give all rows a summary, or none."
            )
        if labelled:
            batch["labels"] = self._pad([feature["labels"] for feature in features], self.label_pad)
            if self.shift is not None:
                labels = batch["labels"].masked_fill(batch["labels"] == self.label_pad, IGNORED_LABEL)
                batch["decoder_input_ids"] = self.shift.apply(labels)
        return batch

    def _pad(self, rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
        width = max(map(len, rows))
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        return torch.tensor([list(row) + [filler] * (width - len(row)) for row in rows], dtype=torch.long)


@dataclass(frozen=True)
class _Shift:
    """How decoder inputs come from labels: moved right by one, behind a start id.

    `start_id` None: each row starts with its own last id that is not padding (mBART's language code).
    """

    pad_id: int
    start_id: int | None

    def apply(self, labels: torch.Tensor) -> torch.Tensor:
        filled = labels.masked_fill(labels == IGNORED_LABEL, self.pad_id)
        if self.start_id is None:
            last = (filled.ne(self.pad_id).sum(dim=1, keepdim=True) - 1).clamp_min(0)
            start = filled.gather(1, last)
        else:
            start = torch.full_like(filled[:, :1], self.start_id)
        return torch.cat([start, filled[:, :-1]], dim=1)


def _read_shift(model: Any) -> _Shift:
    """Asks the model's own function about three rows, and finds the rule that gives the same."""
    probe = torch.tensor([[11, 12, 13, 14], [13, 11, IGNORED_LABEL, IGNORED_LABEL], [12, 14, 11, IGNORED_LABEL]])
    try:
        answer = _own_shift(model)(probe)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot make decoder_input_ids from labels: {type(error).__name__}: {error}. Set "
            f"pad_token_id and decoder_start_token_id in model.config."
        ) from error
    pad_id, start_id = int(answer[1, -1]), int(answer[0, 0])
    for rule in (_Shift(pad_id, start_id), _Shift(pad_id, None)):
        if torch.equal(rule.apply(probe), answer):
            return rule
    raise ModelError(
        f"{type(model).__name__} turns labels into decoder_input_ids by a rule of its own ({probe.tolist()} became "
        f"{answer.tolist()}). Known are: a start token, or the row's last token, before the labels. Use "
        f"transformers.DataCollatorForSeq2Seq with this model."
    )


def _own_shift(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    for name in ("prepare_decoder_input_ids_from_labels", "_shift_right"):
        if hasattr(model, name):
            return getattr(model, name)  # type: ignore[no-any-return]
    for owner in type(model).__mro__:  # M2M100, NLLB-MoE and Blenderbot keep it as a function of their module
        shift = getattr(sys.modules[owner.__module__], "shift_tokens_right", None)
        if shift is not None:
            ids = (model.config.pad_token_id, model.config.decoder_start_token_id)
            return lambda labels: shift(labels, *ids)
    raise AttributeError("its module has no function for it")
