"""From a review to the ids that a model reads.

`read_prompt` decides once how a review is wrapped (chat template, plain text, or an encoder's input);
`SummaryPrompt.encode` then turns one pair into unpadded ids, where only the summary and its end token are labelled and
only the review's end is ever cut; `encode_reviews` does so for a data set. Nothing here reads files, makes batches,
trains or generates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_freeze.errors import FreezeError, ReviewsError, TokenizerMismatch
from hf_freeze.inputs import IGNORED_LABEL
from hf_freeze.inputs.tokenizer import longest_input, longest_target, role_id, text_ids

if TYPE_CHECKING:
    import datasets

__all__ = ["EncodedReviews", "SummaryPrompt", "encode_reviews", "read_prompt"]

PLAIN_TEMPLATE = "Review: {review}\nSummary:"
REQUEST = "Summarize this customer review in one sentence.\n\n{review}"
SHORTEST_CONTROL_TOKEN = 3  # shorter special tokens ("!", "\n") are ordinary text too

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

    @property
    def identity(self) -> list[Any]:
        """All but the tokenizer that decides about ids, as JSON values."""
        wording = [self.kind, self.head, self.tail, self.joint, self.end_ids, self.stop_ids, self.control_tokens]
        return [*wording, self.source_specials, self.target_specials, self.max_source_tokens, self.max_summary_tokens]

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
            body = text_ids(self.tokenizer, summary, target=True)
        else:
            body = _continuation(self.tokenizer, text, self.joint + summary)
        before, after = self.target_specials
        room = self.max_summary_tokens - len(before) - len(after) - len(self.end_ids)
        labels = [*before, *body[:room], *after, *self.end_ids]
        input_ids = source_ids
        if not self.is_encoder_decoder:
            input_ids = source_ids + labels
            labels = [IGNORED_LABEL] * len(source_ids) + labels
        row = {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels}
        return row, review_cut, len(body) > room

    def _source(self, review: str) -> tuple[list[int], str]:
        text = self.head + review + self.tail
        before, after = self.source_specials
        return [*before, *text_ids(self.tokenizer, text), *after], text

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
    >>> from hf_freeze.inputs.tokenizer import doctest_tokenizer
    >>> prompt = read_prompt(doctest_tokenizer(), LlamaConfig(vocab_size=300))
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
        if tail[-1:].isspace():
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

    eos = role_id(tokenizer, "eos")
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

    limit = longest_input(tokenizer, config)
    reserved = 0 if encoder_decoder else max_summary_tokens
    target_limit = longest_target(config) if encoder_decoder else None
    if target_limit is not None and max_summary_tokens > target_limit:
        raise TokenizerMismatch(
            f"max_summary_tokens={max_summary_tokens}, but the decoder takes {target_limit} tokens. Use "
            f"max_summary_tokens <= {target_limit}."
        )
    budget = max_source_tokens if limit is None else min(max_source_tokens, limit - reserved)
    frame = len(source.before) + len(text_ids(tokenizer, head + tail)) + len(source.after)
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


def _continuation(tokenizer: Any, text: str, more: str) -> list[int]:
    """The ids that `more` adds to `text`.

    Tokenizing `more` alone is wrong for tokenizers that mark a text's beginning (sentencepiece would write a second
    space), so both are tokenized together. Where they would merge at the border, the prompt keeps its own ids, as it
    has to in generation, and `more` is tokenized alone.
    """
    prompt, whole = text_ids(tokenizer, text), text_ids(tokenizer, text + more)
    return whole[len(prompt) :] if whole[: len(prompt)] == prompt else text_ids(tokenizer, more)


def _starts_with(tokenizer: Any, text: str, ids: Sequence[int]) -> bool:
    """Whether a text already spells out the ids, e.g. a template with its own <s>."""
    return text_ids(tokenizer, text)[: len(ids)] == list(ids)


def _specials_around(tokenizer: Any, *, target: bool = False) -> _Specials:
    plain = text_ids(tokenizer, "review", target=target)
    whole = text_ids(tokenizer, "review", target=target, special=True)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return _Specials(tuple(whole[:start]), tuple(whole[start + len(plain) :]))
    raise TokenizerMismatch(
        f"The tokenizer turns 'review' into {plain}, and with special tokens into {whole}, which does not contain it: "
        f"where a summary begins and ends cannot be told. Use a tokenizer that puts special tokens around a text."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


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
    >>> from hf_freeze.inputs.tokenizer import doctest_tokenizer
    >>> prompt = read_prompt(doctest_tokenizer(), LlamaConfig(vocab_size=300), max_source_tokens=40)
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
    identity = [dataset._fingerprint, review_column, summary_column, prompt.identity, prompt.tokenizer.get_vocab()]
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
