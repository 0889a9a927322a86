"""Whether a tokenizer and a model belong together, and the few facts that others read of a tokenizer too.

`check_tokenizer` finds the pitfall "input does not match the pretrained model" before training: ids past the embedding
table, no end token, text that comes out as unknown tokens. It gives a tokenizer the pad token that it lacks, and says
so. It resizes no embeddings, loads nothing and words no prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_freeze.errors import TokenizerMismatch
from hf_freeze.tensors import unwrap

__all__ = ["TokenizerFit", "check_tokenizer", "underlying_model"]

SAMPLE_REVIEWS = (
    "The kettle boils fast and looks good on the counter, but the lid broke after two weeks.",
    "Runs small, so order one size up. Soft fabric, washed it ten times and the colour held.",
    "Sound is clear for the price. Battery lasts 6 hours, not 10 as promised; returned it.",
)

MOST_UNKNOWN = 0.2  # of the tokens; a fitting tokenizer has next to none on plain English
FEW_ROWS_USED = 0.5  # checkpoints pad their tables to round numbers, never to twice the vocabulary
LARGEST_SANE_LENGTH = 10**9  # tokenizers write 1e30 where they know no limit

# Tokens that checkpoints (Llama 3, GPT-NeoX) reserve and never train on, in the order of preference. No text has them.
RESERVED_PADS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<PAD>")

# Names under which configs keep the longest input.
LENGTH_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_encoder_position_embeddings")
TARGET_LENGTH_NAMES = ("max_decoder_position_embeddings", "max_position_embeddings", "n_positions")

# Model types that number positions from the padding id + 1 on, so that as many rows of their table are never used.
ROBERTAS = ("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl")
POSITIONS_START_AFTER_PADDING = (*ROBERTAS, "camembert", "data2vec-text", "xmod")


def underlying_model(model: Any) -> Any:
    """The transformer inside its wrappers: DDP, torch.compile, PEFT.

    PEFT's adapters live in the layers of the model that is returned, so nothing of them is lost.

    >>> inner = torch.nn.Linear(2, 2)
    >>> underlying_model(torch.nn.DataParallel(inner)) is inner
    True
    """
    model = unwrap(model)
    return model.get_base_model() if hasattr(model, "peft_config") else model


@dataclass(frozen=True)
class TokenizerFit:
    """What `check_tokenizer` found: the limits to keep to, and what a person should know.

    Attributes:
        max_tokens: the longest input in tokens; None where nothing limits it.
        pad_token_id: the id that pads batches.
        pad_token: the same as text.
        vocabulary_size: ids that the tokenizer may produce, counted up to the highest.
        embedding_rows: rows of the model's input embedding; None where the config does not say.
        notes: differences that are allowed, and every change that was made, each with its reason.
    """

    max_tokens: int | None
    pad_token_id: int
    pad_token: str
    vocabulary_size: int
    embedding_rows: int | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = "an unknown number of" if self.embedding_rows is None else f"{self.embedding_rows:,}"
        length = "no length limit" if self.max_tokens is None else f"at most {self.max_tokens:,} tokens"
        head = (
            f"tokenizer fits the model: {self.vocabulary_size:,} ids in {rows} embedding rows, "
            f"padding with {self.pad_token!r} ({self.pad_token_id}), {length}"
        )
        return "\n".join([head, *(f"  note: {note}" for note in self.notes)])


def check_tokenizer(model_or_config: Any, tokenizer: Any, *, samples: Sequence[str] = SAMPLE_REVIEWS) -> TokenizerFit:
    """Checks that a tokenizer and a model belong together, and gives the tokenizer a pad token where it has none.

    Mutates: a missing pad token is set on `tokenizer`; a missing pad id is set in the model's `config` and
    `generation_config` where a model is given. Both are named in the notes. A config alone is never changed.

    Args:
        model_or_config: a transformers model (wrapped or not), or its config alone.
        tokenizer: a transformers tokenizer.
        samples: texts whose encoding is looked at; give some of your own reviews. Three English ones by default.

    Returns:
        The limits and the notes, as a value that prints itself.

    Raises:
        TokenizerMismatch: ids that index past the embedding table, a special token that is not in the vocabulary,
            no end token anywhere (generation could never stop), or samples that come out as unknown tokens.

    >>> from transformers import LlamaConfig
    >>> tokenizer = doctest_tokenizer()
    >>> config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    >>> print(check_tokenizer(config, tokenizer))
    tokenizer fits the model: 300 ids in 300 embedding rows, padding with '<pad>' (0), at most 2,048 tokens
    """
    model = underlying_model(model_or_config) if isinstance(model_or_config, torch.nn.Module) else None
    config = model_or_config if model is None else model.config
    notes: list[str] = []

    rows = _embedding_rows(model, config)
    size = _check_vocabulary(tokenizer, config, rows, notes)
    _check_special_tokens(tokenizer)
    _check_ends(tokenizer, model, config, size if rows is None else rows, notes)
    _check_samples(tokenizer, samples)
    pad_id = _settle_padding(tokenizer, model, config, notes)
    return TokenizerFit(
        max_tokens=longest_input(tokenizer, config),
        pad_token_id=pad_id,
        pad_token=str(tokenizer.pad_token),
        vocabulary_size=size,
        embedding_rows=rows,
        notes=tuple(notes),
    )


def _embedding_rows(model: Any, config: Any) -> int | None:
    if model is not None:
        table = model.get_input_embeddings()
        rows = getattr(getattr(table, "weight", None), "shape", (0,))[0]
        if rows:  # ZeRO-3 shows sharded parameters as empty
            return int(rows)
    text = config.get_text_config()
    rows = getattr(config, "src_vocab_size", None) or getattr(text, "vocab_size", None)
    return int(rows) if rows else None


def _check_vocabulary(tokenizer: Any, config: Any, rows: int | None, notes: list[str]) -> int:
    vocabulary = tokenizer.get_vocab()
    size = max(vocabulary.values(), default=-1) + 1
    if rows is None:
        notes.append("the config names no vocabulary size, so the tokenizer's could not be compared with it")
        return size
    if size > rows:
        beyond = sorted((id_, token) for token, id_ in vocabulary.items() if id_ >= rows)
        shown = ", ".join(f"{token!r} ({id_})" for id_, token in beyond[:3])
        raise TokenizerMismatch(
            f"The tokenizer's ids go up to {size - 1}; the embedding of this {config.model_type} model has {rows} "
            f"rows, so {shown}{', ...' if len(beyond) > 3 else ''} would index past it. Load the tokenizer of the "
            f"same checkpoint, or call model.resize_token_embeddings({size}) before freezing."
        )
    if size < FEW_ROWS_USED * rows:
        notes.append(
            f"the tokenizer knows {size:,} ids, the model has {rows:,} embedding rows: a tokenizer of another model?"
        )
    return size


def _check_special_tokens(tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    for name, token in tokenizer.special_tokens_map.items():
        if token not in vocabulary:
            raise TokenizerMismatch(
                f"The tokenizer names {token!r} as its {name}, but {token!r} is not in its vocabulary. Name one that "
                f"is, or add it with tokenizer.add_special_tokens and resize the model's embeddings."
            )


def _declared_ids(model: Any, config: Any, name: str) -> set[int]:
    """Every id that the model's own configs give a role; -1 and None mean "none" there."""
    sources = [config, config.get_text_config(), getattr(model, "generation_config", None)]
    ids: set[int | None] = set()
    for source in sources:
        value = getattr(source, name, None)
        ids.update(value if isinstance(value, (list, tuple)) else [value])
    return {int(id_) for id_ in ids if id_ is not None and id_ >= 0}


def _check_ends(tokenizer: Any, model: Any, config: Any, rows: int, notes: list[str]) -> None:
    model_eos = _declared_ids(model, config, "eos_token_id")
    if role_id(tokenizer, "eos") is None and not any(id_ < rows for id_ in model_eos):
        found = f"the model's eos ids {sorted(model_eos)} are past its {rows} rows" if model_eos else "no model eos"
        raise TokenizerMismatch(
            f"No end token: the tokenizer has no eos_token and there is {found}, so generation could never stop. "
            f"Set tokenizer.eos_token to a token of its vocabulary."
        )
    for role, effect in (("eos", "generation stops at either"), ("bos", "inputs begin as the tokenizer says")):
        own, declared = role_id(tokenizer, role), _declared_ids(model, config, f"{role}_token_id")
        if own is not None and declared and own not in declared:
            notes.append(
                f"{role}: the tokenizer says {own} ({tokenizer.special_tokens_map[f'{role}_token']!r}), the model's "
                f"config {sorted(declared)}; {effect}"
            )


def _check_samples(tokenizer: Any, samples: Sequence[str]) -> None:
    unknown = role_id(tokenizer, "unk")
    ids = [id_ for sample in samples for id_ in text_ids(tokenizer, sample)]
    if samples and not ids:
        raise TokenizerMismatch(
            f"The tokenizer turns {samples[0]!r} into no token at all. Load the tokenizer of the same checkpoint."
        )
    unknowns = sum(id_ == unknown for id_ in ids)
    if unknowns > MOST_UNKNOWN * len(ids):
        raise TokenizerMismatch(
            f"The tokenizer turns {unknowns} of {len(ids)} tokens of {len(samples)} sample reviews into "
            f"{tokenizer.unk_token!r}; at most {MOST_UNKNOWN:.0%} are expected. Is it made for another language or "
            f"data type? Load the tokenizer of the same checkpoint, or give reviews in its language as samples=."
        )


def _settle_padding(tokenizer: Any, model: Any, config: Any, notes: list[str]) -> int:
    pad_id = role_id(tokenizer, "pad")
    if pad_id is None:
        token, reason = _choose_padding(tokenizer, config)
        tokenizer.pad_token = token
        pad_id = int(tokenizer.convert_tokens_to_ids(token))
        notes.append(f"the tokenizer had no pad token: set to {token!r} ({pad_id}), {reason}")
    declared = _declared_ids(model, config, "pad_token_id")
    if declared and pad_id not in declared:
        notes.append(f"pad: the tokenizer says {pad_id}, the model's config {sorted(declared)}; padding is masked")
    if model is not None and not declared:
        model.config.get_text_config().pad_token_id = pad_id
        model.config.pad_token_id = pad_id
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.pad_token_id = pad_id
        notes.append(f"the model had no pad id: set to {pad_id} in its config and generation_config")
    return pad_id


def _choose_padding(tokenizer: Any, config: Any) -> tuple[str, str]:
    """The token to pad with, and why it is safe."""
    vocabulary = tokenizer.get_vocab()
    eos = tokenizer.special_tokens_map.get("eos_token")
    for token in RESERVED_PADS:
        if token in vocabulary and token != eos:
            return token, "a token that is reserved for padding"
    unk = tokenizer.special_tokens_map.get("unk_token")
    if unk is not None and unk != eos:
        return unk, "its unknown token: padding is masked in the attention and the labels"
    if eos is not None:
        return eos, (
            "its end token. Safe: padding is masked in the attention and the labels by position, never by id, so the "
            "end of each summary is still learnt"
        )
    for end in sorted(_declared_ids(None, config, "eos_token_id")):
        if end in vocabulary.values():
            return str(tokenizer.convert_ids_to_tokens(end)), "the model's end token: padding is masked by position"
    raise TokenizerMismatch(
        f"The tokenizer has no pad token, and none of {', '.join(RESERVED_PADS)}, unk_token or eos_token to pad with. "
        f"Set tokenizer.pad_token to a token of its vocabulary."
    )


# ---------------------------------------------------------------------------------------------------------------------
# What prompts and batches need of a tokenizer too, and the tokenizer of the doctests


def role_id(tokenizer: Any, role: str) -> int | None:
    """The id of a role ("eos", "pad", ...), without the log line that transformers writes where there is none."""
    token = tokenizer.special_tokens_map.get(f"{role}_token")
    return None if token is None else tokenizer.convert_tokens_to_ids(token)


def text_ids(tokenizer: Any, text: str, *, target: bool = False, special: bool = False) -> list[int]:
    """The ids of a text, unpadded and uncut. `target` tokenizes as the decoder's language (mBART, Marian)."""
    arguments = {"text_target" if target else "text": text}
    # verbose=False: a long review is cut afterwards, so the warning about its length would be false.
    return list(tokenizer(**arguments, add_special_tokens=special, verbose=False)["input_ids"])


def longest_input(tokenizer: Any, config: Any) -> int | None:
    """The longest input in tokens that tokenizer and model both take; None where nothing limits it."""
    return _smallest_limit([tokenizer.model_max_length, *_position_limits(config, LENGTH_NAMES)])


def longest_target(config: Any) -> int | None:
    """The longest text in tokens that a decoder behind an encoder writes; None where nothing limits it."""
    return _smallest_limit(_position_limits(config, TARGET_LENGTH_NAMES))


def _position_limits(config: Any, names: Sequence[str]) -> list[Any]:
    text = config.get_text_config()
    if getattr(text, "relative_attention_num_buckets", None) is not None:  # T5's n_positions limits nothing
        return []
    limits = [value for name in names for source in (config, text) if (value := getattr(source, name, None))]
    if config.model_type in POSITIONS_START_AFTER_PADDING:
        limits.append(text.max_position_embeddings - (text.pad_token_id or 0) - 1)
    return limits


def _smallest_limit(limits: Sequence[Any]) -> int | None:
    return min((int(limit) for limit in limits if 0 < limit < LARGEST_SANE_LENGTH), default=None)


def doctest_tokenizer() -> Any:
    """A byte-level tokenizer trained on the sample reviews: what the doctests run on, without a download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SAMPLE_REVIEWS, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
