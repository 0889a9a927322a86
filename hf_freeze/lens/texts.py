"""Texts as batches that a model takes, and which of their tokens count.

Padding is on the right and masked. Nothing here runs a model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from hf_freeze.anatomy import Anatomy
from hf_freeze.errors import FreezeError
from hf_freeze.inputs import IGNORED_LABEL
from hf_freeze.lens.states import core_of, takes

__all__ = ["check_ids", "ids_read_by", "real_tokens", "text_batches", "token_texts"]


def text_batches(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    targets: Sequence[str] | None = None,
    *,
    batch_size: int = 8,
    max_tokens: int = 128,
) -> list[dict[str, torch.Tensor]]:
    """Texts as batches for a model, padded on the right, with labels: the text itself, or its target.

    A masked language model needs other labels than these; an instruction model its prompt in the text.

    Args:
        model: An encoder-decoder gets `decoder_input_ids`. One that takes no mask gets texts one by one, so that no
            padding can leak into a state.
        tokenizer: Its tokenizer. Needs no pad token for a decoder-only model; padding is masked.
        texts: One or more. A lone string is one text.
        targets: For an encoder-decoder, one a text; None is the text itself.
        batch_size: Texts at once, or one less: there are never as many as tokens, so that a state's layout shows.
        max_tokens: Longer texts lose their end; the limits of the tokenizer and of the model hold too.

    Returns:
        `input_ids`, `attention_mask`, `labels` [texts, tokens] (-100 at padding), and what an encoder-decoder needs.

    Raises:
        FreezeError: No texts, one that is empty or no string, targets that do not fit, ids beyond the vocabulary.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_freeze.inputs.tokenizer import doctest_tokenizer
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=300))
        >>> (batch,) = text_batches(model, doctest_tokenizer(), ["Good mug.", "ok"])
        >>> batch["attention_mask"].sum(dim=1).tolist(), batch["labels"][1, -1].item()
        ([8, 2], -100)
    """
    core = core_of(model)
    two_stacks = bool(getattr(getattr(core, "config", None), "is_encoder_decoder", False))
    if targets is not None and not two_stacks:
        raise FreezeError(
            f"targets= were given for {type(core).__name__}; they are what an encoder-decoder's decoder reads. For a "
            "decoder-only model, put them into the texts."
        )
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value < 1:
            raise FreezeError(f"Texts were to be read with {name}={value}; it is a whole number, 1 or more.")
    sources = _token_ids(core, tokenizer, texts, "text", max_tokens)
    goals = sources
    if two_stacks:
        goals = _token_ids(core, tokenizer, texts if targets is None else targets, "text_target", max_tokens)
    if len(goals) != len(sources):
        raise FreezeError(f"{len(goals)} targets were given for {len(sources)} texts; give one for each.")
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in zip(sources, goals, strict=True)]
    if two_stacks:
        from hf_freeze.inputs.collation import SummaryCollator

        collate: Any = SummaryCollator(tokenizer, model)
    else:
        collate = functools.partial(_pad, tokenizer.pad_token_id or 0)
    if not takes(core, "attention_mask"):
        batch_size = 1
    batches = []
    while rows:
        chosen = rows[:batch_size]
        while len(chosen) > 1 and len(chosen) in (max(len(row[key]) for row in chosen) for key in chosen[0]):
            chosen.pop()
        rows = rows[len(chosen) :]
        batches.append(collate(chosen))
    check_ids(model, batches)
    return batches


def check_ids(model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
    """Refuses ids that a model has no embedding for.

    Raises:
        FreezeError: The tokenizer knows more ids than the model.
    """
    core = core_of(model)
    embedding = getattr(core, "get_input_embeddings", lambda: None)()
    size = getattr(embedding, "num_embeddings", None)
    highest = max(
        int(batch[key].max()) for batch in batches for key in ("input_ids", "decoder_input_ids") if key in batch
    )
    if size is not None and highest >= size:
        raise FreezeError(
            f"A text has the token id {highest}; {type(core).__name__} knows {size:,} ids. Give the tokenizer of the "
            "same checkpoint."
        )


def real_tokens(anatomy: Anatomy, stack: str, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mask [texts, tokens] of what is no padding in a stack."""
    if len(anatomy.stacks) == 2 and stack == "decoder":
        return batch["labels"] != IGNORED_LABEL
    return batch["attention_mask"].bool()


def ids_read_by(anatomy: Anatomy, stack: str, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The ids that a stack reads of the batch's first text."""
    decoder = len(anatomy.stacks) == 2 and stack == "decoder"
    ids = batch["decoder_input_ids" if decoder else "input_ids"][0]
    return ids[real_tokens(anatomy, stack, batch)[0]]


def token_texts(tokenizer: Any, ids: torch.Tensor) -> tuple[str, ...]:
    """Each token as text."""
    return tuple(str(tokenizer.decode([int(number)])) for number in ids)


def _token_ids(core: Any, tokenizer: Any, texts: Sequence[str], kind: str, max_tokens: int) -> list[list[int]]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise FreezeError("No texts were given; give one or more, such as a few of the reviews that you train on.")
    limit = _length_limit(core, tokenizer, kind, max_tokens)
    every = []
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise FreezeError(f"Text {number} is a {type(text).__name__}; give strings.")
        if not tokenizer(**{kind: text}, add_special_tokens=False, verbose=False)["input_ids"]:
            raise FreezeError(f"Text {number} ({text[:20]!r}) has no token, so there is no state of it. Leave it out.")
        every.append(list(tokenizer(**{kind: text}, truncation=True, max_length=limit)["input_ids"]))
    return every


def _length_limit(core: Any, tokenizer: Any, kind: str, max_tokens: int) -> int:
    from hf_freeze.inputs.tokenizer import longest_input, longest_target

    added = tokenizer.num_special_tokens_to_add()
    if max_tokens <= added:
        raise FreezeError(
            f"Texts were to be read with max_tokens={max_tokens}; the tokenizer adds {added} special tokens to each, "
            f"so nothing of a text would be left. Use {added + 1} or more."
        )
    config = getattr(core, "config", None)
    if not hasattr(config, "get_text_config"):  # a module from elsewhere
        return min(max_tokens, int(tokenizer.model_max_length))
    longest = longest_input(tokenizer, config) if kind == "text" else longest_target(config)
    return min(max_tokens, longest or max_tokens)


def _pad(filler: int, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    mask = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
    padded = pad_sequence(ids, batch_first=True, padding_value=filler)
    return {
        "input_ids": padded,
        "attention_mask": mask,
        "labels": padded.masked_fill(mask == 0, IGNORED_LABEL),
    }
