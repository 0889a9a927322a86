"""From a review to the ids that a model reads, and the check that tokenizer and model belong together.

`check_tokenizer` finds the pitfall "input does not match the pretrained model" before training. `read_prompt` decides
once how a review is wrapped (chat template, plain text, or an encoder's input); `SummaryPrompt.encode` then turns one
pair into unpadded ids, where only the summary and its end token are labelled and only the review's end is ever cut.
Nothing here reads files, trains or generates.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hf_freeze.anatomy import unwrap
from hf_freeze.errors import FreezeError, ModelError, ReviewsError, TokenizerMismatch

if TYPE_CHECKING:
    import datasets

__all__ = [
    "EncodedReviews",
    "SummaryCollator",
    "SummaryPrompt",
    "TokenizerFit",
    "check_tokenizer",
    "encode_reviews",
    "read_prompt",
    "underlying_model",
]

IGNORED_LABEL = -100  # what torch's cross entropy and every transformers loss skip
PLAIN_TEMPLATE = "Review: {review}\nSummary:"
REQUEST = "Summarize this customer review in one sentence.\n\n{review}"
SAMPLE_REVIEWS = (
    "The kettle boils fast and looks good on the counter, but the lid broke after two weeks.",
    "Runs small, so order one size up. Soft fabric, washed it ten times and the colour held.",
    "Sound is clear for the price. Battery lasts 6 hours, not 10 as promised; returned it.",
)

MOST_UNKNOWN = 0.2  # of the tokens; a fitting tokenizer has next to none on plain English
FEW_ROWS_USED = 0.5  # checkpoints pad their tables to round numbers, never to twice the vocabulary
LARGEST_SANE_LENGTH = 10**9  # tokenizers write 1e30 where they know no limit
SHORTEST_CONTROL_TOKEN = 3  # shorter special tokens ("!", "\n") are ordinary text too

# Tokens that checkpoints reserve and never train on, in the order of preference. No text contains them.
RESERVED_PADS = (
    "<|finetune_right_pad_id|>",  # Llama 3
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|padding|>",  # GPT-NeoX
    "<PAD>",
)

# Names under which configs keep the longest input.
LENGTH_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_encoder_position_embeddings")
TARGET_LENGTH_NAMES = ("max_decoder_position_embeddings", "max_position_embeddings", "n_positions")

# Model types that number positions from the padding id + 1 on, so that as many rows of their table are never used.
POSITIONS_START_AFTER_PADDING = frozenset(
    {
        "camembert",
        "data2vec-text",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)

# Task prefixes that a model type was pretrained with, where its config does not name one. Only T5 and Flan-T5 (both
# "t5") were; mT5, UMT5, LongT5 and Switch saw no supervised tasks, so a prefix would be noise to them.
TASK_PREFIXES = {"t5": "summarize: "}

# Keywords of chat templates that would make the same prompt differ from day to day, or answer with a train of thought.
TEMPLATE_ARGUMENTS: dict[str, Any] = {
    "date_string": "26 Jul 2024",  # Llama 3 would write today's date; this one is its template's own default
    "enable_thinking": False,  # Qwen 3 and others: a summary needs no reasoning before it
}

REVIEW_MARK = "REVIEWGOESHERE"
SUMMARY_MARK = "SUMMARYGOESHERE"


def underlying_model(model: Any) -> Any:
    """The transformer inside its wrappers: DDP, torch.compile, PEFT.

    PEFT's adapters live in the layers of the model that is returned, so nothing of them is lost.

    >>> inner = torch.nn.Linear(2, 2)
    >>> underlying_model(torch.nn.DataParallel(inner)) is inner
    True
    """
    model = unwrap(model)
    return model.get_base_model() if hasattr(model, "peft_config") else model


# ---------------------------------------------------------------------------------------------------------------------
# Does the tokenizer fit the model?


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
    >>> from hf_freeze.summarization.prompts import check_tokenizer
    >>> tokenizer = _doctest_tokenizer()
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
        max_tokens=_longest_input(tokenizer, config),
        pad_token_id=pad_id,
        pad_token=str(tokenizer.pad_token),
        vocabulary_size=size,
        embedding_rows=rows,
        notes=tuple(notes),
    )


def _doctest_tokenizer() -> Any:
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


def _id_of(tokenizer: Any, role: str) -> int | None:
    """The id of a role ("eos", "pad", ...), without the log line that transformers writes where there is none."""
    token = tokenizer.special_tokens_map.get(f"{role}_token")
    return None if token is None else tokenizer.convert_tokens_to_ids(token)


def _declared_ids(model: Any, config: Any, name: str) -> set[int]:
    """Every id that the model's own configs give a role; -1 and None mean "none" there."""
    sources = [config, config.get_text_config(), getattr(model, "generation_config", None)]
    ids: set[int | None] = set()
    for source in sources:
        value = getattr(source, name, None)
        ids.update(value if isinstance(value, (list, tuple)) else [value])
    return {int(id_) for id_ in ids if id_ is not None and id_ >= 0}


def _check_ends(tokenizer: Any, model: Any, config: Any, rows: int, notes: list[str]) -> None:
    own_eos = _id_of(tokenizer, "eos")
    model_eos = _declared_ids(model, config, "eos_token_id")
    if own_eos is None and not {id_ for id_ in model_eos if id_ < rows}:
        found = f"the model's eos ids {sorted(model_eos)} are past its {rows} rows" if model_eos else "no model eos"
        raise TokenizerMismatch(
            f"No end token: the tokenizer has no eos_token and there is {found}, so generation could never stop. "
            f"Set tokenizer.eos_token to a token of its vocabulary."
        )
    for role in ("eos", "bos"):
        own, declared = _id_of(tokenizer, role), _declared_ids(model, config, f"{role}_token_id")
        if own is not None and declared and own not in declared:
            notes.append(
                f"{role}: the tokenizer says {own} ({tokenizer.special_tokens_map[f'{role}_token']!r}), the model's "
                f"config {sorted(declared)}; "
                + ("generation stops at either" if role == "eos" else "inputs begin as the tokenizer says")
            )


def _check_samples(tokenizer: Any, samples: Sequence[str]) -> None:
    unknown = _id_of(tokenizer, "unk")
    ids = [id_ for sample in samples for id_ in _ids(tokenizer, sample)]
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
    pad_id = _id_of(tokenizer, "pad")
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


def _longest_input(tokenizer: Any, config: Any, names: Sequence[str] = LENGTH_NAMES) -> int | None:
    limits = [tokenizer.model_max_length] if names is LENGTH_NAMES else []
    text = config.get_text_config()
    if getattr(text, "relative_attention_num_buckets", None) is None:  # T5's n_positions limits nothing
        limits += [value for name in names for source in (config, text) if (value := getattr(source, name, None))]
        if config.model_type in POSITIONS_START_AFTER_PADDING:
            limits += [text.max_position_embeddings - (text.pad_token_id or 0) - 1]
    sane = [int(limit) for limit in limits if 0 < limit < LARGEST_SANE_LENGTH]
    return min(sane, default=None)


# ---------------------------------------------------------------------------------------------------------------------
# The prompt


class _Specials(NamedTuple):
    """The ids that a tokenizer puts before and after a text on its own."""

    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class SummaryPrompt:
    """How one model is given a review, and how its summary ends. Made by `read_prompt`; picklable.

    Attributes:
        kind: "chat", "plain" (both decoder-only) or "encoder-decoder".
        head, tail: the text before and after the review.
        joint: the text between prompt and summary, learnt with the summary (usually one space, or nothing).
        end_ids: the ids that end a summary; the last of them is where generation stops.
        stop_ids: all ids where generation stops.
        max_tokens: the longest sequence that the model takes; None without a limit.
        max_source_tokens: the longest prompt, its head, tail and special tokens included.
        max_summary_tokens: the longest summary, its end included.
        notes: every choice that was made, with its reason.
    """

    kind: str
    tokenizer: Any
    head: str
    tail: str
    joint: str
    end_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    source_specials: _Specials
    target_specials: _Specials
    control_tokens: tuple[str, ...]
    max_tokens: int | None
    max_source_tokens: int
    max_summary_tokens: int
    notes: tuple[str, ...] = ()

    @property
    def is_encoder_decoder(self) -> bool:
        return self.kind == "encoder-decoder"

    def encode(self, review: str, summary: str | None = None) -> dict[str, list[int]]:
        """One review (and its summary) as unpadded ids.

        A review that is too long loses its end; the prompt around it never loses anything. A summary is cut to
        `max_summary_tokens` and keeps its end token. Text that would read as a special token ("</s>") is taken out
        of both: a customer's text is data, not control.

        Args:
            review: the customer's text.
            summary: its summary; None leaves the labels out, as generation needs it.

        Returns:
            `input_ids`, `attention_mask` and, with a summary, `labels`. Decoder-only: the labels are as long as the
            input and -100 on the prompt. Encoder-decoder: they are the summary's ids.

        Raises:
            ReviewsError: the review or the summary is not a text.
        """
        return self._encode(review, summary)[0]

    def clean(self, text: str) -> str:
        """The summary in a generated text: its first line that is not empty.

        A summary is one sentence; what follows a line break is a model that goes on talking. One exception: a first
        line that ends with a colon announces the summary ("Here is a summary:"), so the line after it is taken.

        >>> SummaryPrompt.clean(None, "\\n  Good mug, weak handle. \\nReview: Bad")
        'Good mug, weak handle.'
        >>> SummaryPrompt.clean(None, "Here is a summary:\\n\\nGood mug.")
        'Good mug.'
        """
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if len(lines) > 1 and lines[0].endswith(":"):
            return lines[1]
        return lines[0] if lines else ""

    def _encode(self, review: str, summary: str | None) -> tuple[dict[str, list[int]], bool, bool]:
        """The row, whether the review was cut, whether the summary was cut."""
        review = self._as_data(review, "review")
        source_ids, text = self._source(review)
        review_cut = len(source_ids) > self.max_source_tokens
        if review_cut:
            source_ids, text = self._source(self._longest_beginning(review))
        if summary is None:
            return {"input_ids": source_ids, "attention_mask": [1] * len(source_ids)}, review_cut, False

        summary = self._as_data(summary, "summary")
        if self.is_encoder_decoder:
            body = _ids(self.tokenizer, summary, target=True)
        else:
            body = _continuation(self.tokenizer, text, self.joint + summary)
        before, after = self.target_specials
        room = self.max_summary_tokens - len(before) - len(after) - len(self.end_ids)
        labels = [*before, *body[:room], *after, *self.end_ids]
        input_ids = list(source_ids)
        if not self.is_encoder_decoder:
            input_ids += labels
            labels = [IGNORED_LABEL] * len(source_ids) + labels
        row = {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels}
        return row, review_cut, len(body) > room

    def _source(self, review: str) -> tuple[list[int], str]:
        text = self.head + review + self.tail
        before, after = self.source_specials
        return [*before, *_ids(self.tokenizer, text), *after], text

    def _longest_beginning(self, review: str) -> str:
        """The longest beginning of a review whose prompt fits, found by halving: token borders are nowhere needed."""

        def fits(length: int) -> bool:
            return len(self._source(review[:length].rstrip())[0]) <= self.max_source_tokens

        too_long = self.max_source_tokens  # characters: doubled first, so that 100 kB are never tokenized whole again
        while too_long < len(review) and fits(too_long):
            too_long *= 2
        low, high = 0, min(too_long, len(review))
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return review[:low].rstrip()

    def _as_data(self, text: str, what: str) -> str:
        if not isinstance(text, str):
            raise ReviewsError(
                f"A {what} must be a text; found {type(text).__name__} ({text!r:.60}). Read the column as str, and "
                f"drop rows without a {what}."
            )
        for token in self.control_tokens:
            if token in text:
                text = text.replace(token, " ")
        return text.strip()


def read_prompt(
    tokenizer: Any,
    config: Any,
    *,
    template: str | None = None,
    max_source_tokens: int = 512,
    max_summary_tokens: int = 64,
    source_prefix: str | None = None,
) -> SummaryPrompt:
    """Decides how reviews are given to a model: by its chat template, as plain text, or as an encoder's input.

    Args:
        tokenizer: the model's tokenizer.
        config: the model's config (or the model, whose config is then read).
        template: your own text around the review, with {review} in it exactly once; it wins over a chat template.
        max_source_tokens: the longest prompt. 512 holds 99 % of shop reviews. Less where the model takes less.
        max_summary_tokens: the longest summary with its end token. One sentence takes 15 to 40.
        source_prefix: encoder-decoder only: the text before the review. By default what the config names, or
            T5's "summarize: ".

    Raises:
        FreezeError: a template without exactly one {review}, or a source_prefix that has no place.
        TokenizerMismatch: no end token, or a model too short for prompt and summary.

    >>> from transformers import LlamaConfig
    >>> prompt = read_prompt(_doctest_tokenizer(), LlamaConfig(vocab_size=300))
    >>> prompt.kind, prompt.head, prompt.tail
    ('plain', 'Review: ', '\\nSummary:')
    >>> row = prompt.encode("The lid broke.", "Lid broke.")
    >>> prompt.tokenizer.decode([id for id in row["labels"] if id != -100])
    ' Lid broke.</s>'
    """
    config = getattr(config, "config", config)
    notes: list[str] = []
    encoder_decoder = bool(config.is_encoder_decoder)
    _check_wording(template, source_prefix, encoder_decoder)
    if max_source_tokens < 1 or max_summary_tokens < 1:
        raise FreezeError(
            f"max_source_tokens={max_source_tokens} and max_summary_tokens={max_summary_tokens} must be at least 1; "
            f"512 and 64 are the defaults."
        )

    kind, joint, end = "plain", " ", tokenizer.special_tokens_map.get("eos_token")
    if encoder_decoder:
        kind, joint = "encoder-decoder", ""
        prefix = _task_prefix(config) if source_prefix is None else source_prefix
        head, _, tail = (template or prefix + "{review}").partition("{review}")
    else:
        head, _, tail = (template or PLAIN_TEMPLATE).partition("{review}")
        if template is not None and tail[-1:].isspace():
            joint = ""
        if template is None and tokenizer.chat_template:
            try:
                head, tail, joint, end = _read_chat(tokenizer, notes)
                kind = "chat"
            except Exception as error:  # a template is foreign code that may raise anything
                notes.append(f"the chat template is not used, the plain prompt is: {type(error).__name__}: {error}")
    if end is None:
        raise TokenizerMismatch(
            "The tokenizer has no eos_token, so a summary would have no end to learn. Set tokenizer.eos_token to a "
            "token of its vocabulary."
        )

    eos = _id_of(tokenizer, "eos")
    source, target = _specials_around(tokenizer), _Specials((), ())
    end_ids = tuple(_continuation(tokenizer, "x", end))
    stop_ids = {end_ids[-1]} if eos is None else {end_ids[-1], eos}
    if encoder_decoder:
        target = _specials_around(tokenizer, target=True)
        if eos in target.after:
            end_ids = ()
    else:
        before = () if kind == "chat" or _starts_with(tokenizer, head, source.before) else source.before
        source = _Specials(before, ())  # an eos of its own here would end the text before the summary

    limit = _longest_input(tokenizer, config)
    reserved = 0 if encoder_decoder else max_summary_tokens
    if encoder_decoder:
        target_limit = _longest_input(tokenizer, config, TARGET_LENGTH_NAMES)
        if target_limit is not None and max_summary_tokens > target_limit:
            raise TokenizerMismatch(
                f"max_summary_tokens={max_summary_tokens}, but the decoder takes {target_limit} tokens. Use "
                f"max_summary_tokens <= {target_limit}."
            )
    budget = max_source_tokens if limit is None else min(max_source_tokens, limit - reserved)
    frame = len(source.before) + len(_ids(tokenizer, head + tail)) + len(source.after)
    ending = len(target.before) + len(target.after) + len(end_ids)
    if budget <= frame or max_summary_tokens <= ending:
        raise TokenizerMismatch(
            f"No room: the text around a review takes {frame} tokens and the end of a summary {ending}; "
            f"max_source_tokens={max_source_tokens}, max_summary_tokens={max_summary_tokens} and the model's "
            f"{'unlimited' if limit is None else limit} tokens leave {max(budget, 0)} for the prompt. Raise the "
            f"first two, shorten the template, or use a model that takes longer inputs."
        )
    if budget < max_source_tokens:
        notes.append(
            f"prompts are at most {budget} tokens: the model takes {limit}, {reserved} of them for the summary"
        )

    return SummaryPrompt(
        kind=kind,
        tokenizer=tokenizer,
        head=head,
        tail=tail,
        joint=joint,
        end_ids=end_ids,
        stop_ids=tuple(sorted(stop_ids)),
        source_specials=source,
        target_specials=target,
        control_tokens=_control_tokens(tokenizer, head + tail),
        max_tokens=limit,
        max_source_tokens=budget,
        max_summary_tokens=max_summary_tokens,
        notes=tuple(notes),
    )


def _check_wording(template: str | None, source_prefix: str | None, encoder_decoder: bool) -> None:
    if template is not None and template.count("{review}") != 1:
        raise FreezeError(
            f"template={template!r} holds {{review}} {template.count('{review}')} times; it must hold it exactly "
            f"once, as in {PLAIN_TEMPLATE!r}."
        )
    if source_prefix is not None and not encoder_decoder:
        raise FreezeError(
            f"source_prefix={source_prefix!r} is for encoder-decoder models, and this model is decoder-only. Use "
            f"template={source_prefix + '{review}'!r} and what should follow the review."
        )
    if source_prefix is not None and template is not None:
        raise FreezeError("source_prefix and template both say what stands before the review. Give one of them.")


def _task_prefix(config: Any) -> str:
    tasks = getattr(config, "task_specific_params", None) or {}
    named = tasks.get("summarization", {}).get("prefix")
    for prefix in (named, getattr(config, "prefix", None)):
        if isinstance(prefix, str):
            return prefix
    return TASK_PREFIXES.get(config.model_type, "")


def _read_chat(tokenizer: Any, notes: list[str]) -> tuple[str, str, str, str | None]:
    """Head, tail, joint and end of a chat template, from rendering it around marks."""
    source = tokenizer.get_chat_template()
    arguments = {name: value for name, value in TEMPLATE_ARGUMENTS.items() if name in source}
    request = {"role": "user", "content": REQUEST.format(review=REVIEW_MARK)}
    answer = {"role": "assistant", "content": SUMMARY_MARK}
    prompt = tokenizer.apply_chat_template([request], tokenize=False, add_generation_prompt=True, **arguments)
    if prompt.count(REVIEW_MARK) != 1:
        raise FreezeError(f"it shows the user's message {prompt.count(REVIEW_MARK)} times instead of once")
    head, _, tail = prompt.partition(REVIEW_MARK)

    whole = tokenizer.apply_chat_template([request, answer], tokenize=False, **arguments)
    between, mark, after = whole.partition(SUMMARY_MARK)
    if not mark:
        raise FreezeError("it does not show an assistant's message")
    joint = ""
    if between.startswith(prompt):
        joint = between[len(prompt) :]
        if joint.strip():  # control text that the model need not write itself: part of the prompt
            tail, joint = tail + joint, ""
    else:
        notes.append("the chat template writes an answered turn unlike its generation prompt; the latter is used")

    ends = [(after.find(token), token) for token in tokenizer.get_added_vocab() if token.strip() and token in after]
    if not ends:
        notes.append("the chat template puts no special token after an answer, so summaries end with the eos token")
        return head, tail, joint, tokenizer.special_tokens_map.get("eos_token")
    position, token = min(ends)
    return head, tail, joint, after[: position + len(token)]


def _control_tokens(tokenizer: Any, wording: str) -> tuple[str, ...]:
    """Texts that the tokenizer reads as control: special tokens, and added ones that the prompt itself uses."""
    added = tokenizer.added_tokens_decoder.values()
    found = {token.content for token in added if token.special or token.content in wording}
    found.update(tokenizer.all_special_tokens)
    # Longest first, so that no token is left over from the middle of another.
    return tuple(sorted((t for t in found if len(t.strip()) >= SHORTEST_CONTROL_TOKEN), key=lambda t: (-len(t), t)))


# ---------------------------------------------------------------------------------------------------------------------
# Ids


def _ids(tokenizer: Any, text: str, *, target: bool = False, special: bool = False) -> list[int]:
    """The ids of a text, unpadded and uncut. `target` tokenizes as the decoder's language (mBART, Marian)."""
    arguments = {"text_target" if target else "text": text}
    # verbose=False: a long review is cut afterwards, so the warning about its length would be false.
    return list(tokenizer(**arguments, add_special_tokens=special, verbose=False)["input_ids"])


def _continuation(tokenizer: Any, text: str, more: str) -> list[int]:
    """The ids that `more` adds to `text`.

    Tokenizing `more` alone is wrong for tokenizers that mark a text's beginning (sentencepiece would write a second
    space), so both are tokenized together. Where they would merge at the border, the prompt keeps its own ids, as it
    has to in generation, and `more` is tokenized alone.
    """
    prompt, whole = _ids(tokenizer, text), _ids(tokenizer, text + more)
    return whole[len(prompt) :] if whole[: len(prompt)] == prompt else _ids(tokenizer, more)


def _starts_with(tokenizer: Any, text: str, ids: Sequence[int]) -> bool:
    """Whether a text already spells out the ids, e.g. a template with its own <s>."""
    return _ids(tokenizer, text)[: len(ids)] == list(ids)


def _specials_around(tokenizer: Any, *, target: bool = False) -> _Specials:
    plain = _ids(tokenizer, "review", target=target)
    whole = _ids(tokenizer, "review", target=target, special=True)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return _Specials(tuple(whole[:start]), tuple(whole[start + len(plain) :]))
    raise TokenizerMismatch(
        f"The tokenizer turns 'review' into {plain}, and with special tokens into {whole}, which does not contain it: "
        f"where a summary begins and ends cannot be told. Use a tokenizer that puts special tokens around a text."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Data sets and batches


class EncodedReviews(NamedTuple):
    """A data set in ids, and what was cut on the way."""

    dataset: datasets.Dataset
    notes: tuple[str, ...]


def encode_reviews(
    dataset: datasets.Dataset,
    prompt: SummaryPrompt,
    *,
    review_column: str = "review",
    summary_column: str = "summary",
) -> EncodedReviews:
    """Encodes every row; only `input_ids`, `attention_mask` and `labels` stay.

    The result is made afresh each time: `datasets` would find an earlier one by hashing the tokenizer, whose state
    changes when it is used. Its fingerprint is that of the rows and the prompt's wording, so it is the same in every
    process and run.

    Args:
        dataset: rows with a review and, for labels, a summary. Its columns decide whether there are labels.
        prompt: from `read_prompt`.
        review_column, summary_column: where the texts are.

    Returns:
        The encoded data set (the given one is untouched), and a note for each kind of cut.

    Raises:
        ReviewsError: no such review column, or a text that is not a text.

    >>> import datasets
    >>> from transformers import LlamaConfig
    >>> prompt = read_prompt(_doctest_tokenizer(), LlamaConfig(vocab_size=300), max_source_tokens=40)
    >>> rows = datasets.Dataset.from_dict({"review": ["good " * 100, "bad"], "summary": ["Good.", "Bad."]})
    >>> encoded, notes = encode_reviews(rows, prompt)
    >>> encoded.column_names, notes
    (['input_ids', 'attention_mask', 'labels'], ('1 of 2 reviews were cut to 40 tokens with their prompt',))
    """
    import datasets

    if review_column not in dataset.column_names:
        raise ReviewsError(
            f"Reviews were asked for in column {review_column!r}; the data set has {dataset.column_names}. Name the "
            f"column that holds them."
        )
    labelled = summary_column in dataset.column_names

    def encode(row: Mapping[str, Any]) -> dict[str, Any]:
        encoded, review_cut, summary_cut = prompt._encode(row[review_column], row[summary_column] if labelled else None)
        return {**encoded, "review_cut": review_cut, "summary_cut": summary_cut}

    columns = {"input_ids": "int32", "attention_mask": "int8"} | ({"labels": "int32"} if labelled else {})
    flags = {"review_cut": datasets.Value("bool"), "summary_cut": datasets.Value("bool")}
    lists = {name: datasets.List(datasets.Value(dtype)) for name, dtype in columns.items()}
    wording = [prompt.kind, prompt.head, prompt.tail, prompt.joint, prompt.end_ids, prompt.source_specials]
    limits = [prompt.target_specials, prompt.max_source_tokens, prompt.max_summary_tokens]
    identity = [dataset._fingerprint, review_column, summary_column, *wording, *limits, prompt.tokenizer.get_vocab()]
    encoded = dataset.map(
        encode,
        remove_columns=dataset.column_names,
        features=datasets.Features({**lists, **flags}),
        load_from_cache_file=False,
        new_fingerprint=datasets.fingerprint.Hasher.hash(identity),
        desc="tokenizing",
    )
    notes = []
    if cut := sum(encoded["review_cut"]):
        notes.append(f"{cut} of {len(encoded)} reviews were cut to {prompt.max_source_tokens} tokens with their prompt")
    if cut := sum(encoded["summary_cut"]):
        notes.append(f"{cut} of {len(encoded)} summaries were cut to {prompt.max_summary_tokens} tokens")
    return EncodedReviews(encoded.remove_columns(list(flags)), tuple(notes))


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

    >>> collator = SummaryCollator(_doctest_tokenizer())
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
        pad_id = _id_of(tokenizer, "pad")
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
        rows = [list(feature["input_ids"]) for feature in features]
        masks = [
            list(feature.get("attention_mask", [1] * len(row))) for feature, row in zip(features, rows, strict=True)
        ]
        batch = {"input_ids": self._pad(rows, self.pad_token_id), "attention_mask": self._pad(masks, 0)}
        labelled = sum("labels" in feature for feature in features)
        if labelled not in (0, len(features)):
            raise ReviewsError(
                f"{labelled} of the {len(features)} rows of a batch have labels. Give all rows a summary, or none."
            )
        if labelled:
            batch["labels"] = self._pad([list(feature["labels"]) for feature in features], self.label_pad)
            if self.shift is not None:
                labels = batch["labels"].masked_fill(batch["labels"] == self.label_pad, IGNORED_LABEL)
                batch["decoder_input_ids"] = self.shift.apply(labels)
        return batch

    def _pad(self, rows: Sequence[list[int]], filler: int) -> torch.Tensor:
        width = max(map(len, rows))
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        return torch.tensor([row + [filler] * (width - len(row)) for row in rows], dtype=torch.long)


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
