"""Claims about `hf_freeze.summarization.prompts`, on tokenizers trained here."""

from __future__ import annotations

import logging
import pickle
import time
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, models
from transformers import BartConfig, PreTrainedTokenizerFast

from hf_freeze.errors import FreezeError, ReviewsError, TokenizerMismatch
from hf_freeze.summarization.prompts import encode_reviews, read_prompt
from tests.tokenizer_makers import (
    CHATML,
    REVIEW,
    SUMMARY,
    bart_sizes,
    byte_level,
    chat_tokenizer,
    llama_config,
    metaspace,
    t5_config,
)

LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<s>[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }} </s>{% endif %}{% endfor %}"
)


def labelled(row: dict[str, list[int]]) -> list[int]:
    return [id_ for id_ in row["labels"] if id_ != -100]


# --- the prompt of decoder-only models -------------------------------------------------------------------------------


def test_chat_ids_equal_those_of_the_whole_rendered_conversation():
    tokenizer = chat_tokenizer()
    prompt = read_prompt(tokenizer, llama_config())
    assert (prompt.kind, prompt.tail, prompt.joint) == ("chat", "<|im_end|>\n<|im_start|>assistant\n", "")
    messages = [
        {"role": "user", "content": prompt.head.removeprefix("<|im_start|>user\n") + REVIEW},
        {"role": "assistant", "content": SUMMARY},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    row = prompt.encode(REVIEW, SUMMARY)
    assert row["input_ids"] == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(labelled(row)) == SUMMARY + "<|im_end|>"
    generated_from = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt.encode(REVIEW)["input_ids"] == tokenizer(generated_from)["input_ids"]


def test_only_the_summary_and_its_end_are_labelled():
    row = read_prompt(chat_tokenizer(), llama_config()).encode(REVIEW, SUMMARY)
    first = next(at for at, label in enumerate(row["labels"]) if label != -100)
    assert row["labels"][first:] == row["input_ids"][first:]
    assert len(row["labels"]) == len(row["input_ids"]) == len(row["attention_mask"])
    assert set(row["attention_mask"]) == {1}


def test_the_end_of_turn_is_learnt_and_stops_generation_though_eos_is_another():
    prompt = read_prompt(chat_tokenizer(eos_token="<|endoftext|>"), llama_config())
    assert prompt.end_ids == (2,)
    assert prompt.stop_ids == (0, 2)
    assert labelled(prompt.encode(REVIEW, SUMMARY))[-1] == 2


def test_without_a_summary_there_are_no_labels():
    assert set(read_prompt(chat_tokenizer(), llama_config()).encode(REVIEW)) == {"input_ids", "attention_mask"}


def test_a_template_that_puts_spaces_around_an_answer_is_followed():
    tokenizer = metaspace()
    tokenizer.chat_template = LLAMA2
    prompt = read_prompt(tokenizer, llama_config())
    assert (prompt.kind, prompt.joint) == ("chat", " ")
    messages = [
        {"role": "user", "content": prompt.head.removeprefix("<s>[INST] ") + REVIEW},
        {"role": "assistant", "content": SUMMARY},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = prompt.encode(REVIEW, SUMMARY)["input_ids"]
    assert ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert ids.count(1) == 1, "the template's own <s> is the only one"


def test_control_text_before_an_answer_belongs_to_the_prompt():
    template = CHATML.replace(
        "\n{{ message['content'] }}",
        "{% if message['role'] == 'assistant' %}<final>{% endif %}\n{{ message['content'] }}",
    ).replace("assistant\n{% endif %}", "assistant{% endif %}")
    prompt = read_prompt(chat_tokenizer(template), llama_config())
    assert prompt.tail.endswith("assistant<final>")
    assert prompt.joint == ""


def test_an_answered_turn_unlike_the_generation_prompt_is_noted():
    template = CHATML.replace("assistant\n{% endif %}", "helper\n{% endif %}")
    prompt = read_prompt(chat_tokenizer(template), llama_config())
    assert prompt.tail.endswith("<|im_start|>helper\n")
    assert any("unlike its generation prompt" in note for note in prompt.notes)


def test_an_answer_without_an_end_token_ends_with_eos():
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    prompt = read_prompt(chat_tokenizer(template), llama_config())
    assert prompt.kind == "chat"
    assert prompt.end_ids == (2,)
    assert any("no special token after an answer" in note for note in prompt.notes)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('a system message is needed') }}", "TemplateError: a system message is needed"),
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "shows the user's message 2 times"),
        ("{{ messages[0]['content'] }}<|im_end|>", "does not show an assistant's message"),
    ],
)
def test_a_chat_template_that_does_not_serve_is_named_and_the_plain_prompt_used(template, reason):
    prompt = read_prompt(chat_tokenizer(template), llama_config())
    assert (prompt.kind, prompt.head, prompt.tail) == ("plain", "Review: ", "\nSummary:")
    (note,) = prompt.notes
    assert "chat template is not used" in note
    assert reason in note


def test_a_chat_prompt_is_the_same_every_day_and_asks_for_no_reasoning():
    template = "{{ date_string }}{% if enable_thinking %}<think>{% endif %}" + CHATML
    prompt = read_prompt(chat_tokenizer(template), llama_config())
    assert prompt.head.startswith("26 Jul 2024<|im_start|>")


def test_a_users_template_wins_over_the_chat_template():
    prompt = read_prompt(chat_tokenizer(), llama_config(), template="Review: {review}\nTitle:")
    assert (prompt.kind, prompt.head, prompt.tail, prompt.joint) == ("plain", "Review: ", "\nTitle:", " ")
    text = prompt.tokenizer.decode(prompt.encode(REVIEW, SUMMARY)["input_ids"])
    assert text == f"Review: {REVIEW}\nTitle: {SUMMARY}<|im_end|>"


def test_a_template_that_ends_in_white_space_gets_no_second_space():
    prompt = read_prompt(chat_tokenizer(), llama_config(), template="{review}\n\n")
    assert prompt.tokenizer.decode(labelled(prompt.encode(REVIEW, SUMMARY))) == SUMMARY + "<|im_end|>"


T5 = {"tokenizer": lambda: metaspace("", " </s>"), "config": t5_config}
SHORT_BART = {"tokenizer": lambda: metaspace("<s> ", " </s>"), "config": lambda: BartConfig(**bart_sizes(**SHORT))}
SHORT = {"max_position_embeddings": 32}
NO_ROOM = r"No room: the text around a review takes \d+ tokens"
ONCE = r"holds \{{review\}} {} times; it must hold it exactly once"


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"template": "Summarize:"}, FreezeError, ONCE.format(0)),
        ({"template": "{review} {review}"}, FreezeError, ONCE.format(2)),
        ({"source_prefix": "summarize: "}, FreezeError, "for encoder-decoder models, and this model is decoder-only"),
        (T5 | {"source_prefix": "a: ", "template": "b: {review}"}, FreezeError, "source_prefix and template both"),
        ({"tokenizer": lambda: byte_level(["<pad>"], pad_token="<pad>")}, TokenizerMismatch,
         "no eos_token, so a summary would have no end to learn"),
        ({"max_source_tokens": 0}, FreezeError, "must be at least 1"),
        ({"max_summary_tokens": -1}, FreezeError, "must be at least 1"),
        ({"config": lambda: llama_config(max_position_embeddings=64)}, TokenizerMismatch, NO_ROOM),
        ({"max_source_tokens": 20}, TokenizerMismatch, NO_ROOM),
        ({"max_summary_tokens": 1}, TokenizerMismatch, NO_ROOM),
        (SHORT_BART, TokenizerMismatch, r"max_summary_tokens=64, but the decoder takes 32"),
    ],
)  # fmt: skip
def test_what_makes_no_prompt_is_an_error(asked, error, message):
    makers = {"tokenizer": chat_tokenizer, "config": llama_config} | asked
    tokenizer, config = (makers.pop(name)() for name in ("tokenizer", "config"))
    with pytest.raises(error, match=message):
        read_prompt(tokenizer, config, **makers)


def test_a_prompt_shortened_by_the_model_is_noted():
    prompt = read_prompt(chat_tokenizer(), llama_config(max_position_embeddings=256))
    assert prompt.max_source_tokens == 256 - 64
    assert prompt.notes == ("prompts are at most 192 tokens: the model takes 256, 64 of them for the summary",)


@pytest.mark.parametrize("make", [chat_tokenizer, metaspace])
def test_truncation_cuts_only_the_end_of_the_review(make):
    tokenizer = make()
    config = llama_config(max_position_embeddings=160)
    prompt = read_prompt(tokenizer, config, max_summary_tokens=24)
    long = " ".join([REVIEW] * 40)
    row = prompt.encode(long, SUMMARY)
    source = row["labels"].count(-100)
    assert prompt.max_source_tokens - 3 <= source <= prompt.max_source_tokens, "not cut more than needed"
    assert len(row["input_ids"]) <= 160
    text = tokenizer.decode(row["input_ids"][:source], skip_special_tokens=False).removeprefix("<s>").lstrip()
    assert text.startswith(prompt.head.lstrip())
    assert text.endswith(prompt.tail)
    kept = text.removeprefix(prompt.head).removesuffix(prompt.tail)
    assert long.startswith(kept)
    assert labelled(row) == labelled(prompt.encode(REVIEW, SUMMARY)), "the summary is whole"


def test_a_long_summary_is_cut_and_keeps_its_end():
    prompt = read_prompt(chat_tokenizer(), llama_config(), max_summary_tokens=10)
    labels = labelled(prompt.encode(REVIEW, SUMMARY * 20))
    assert len(labels) == 10
    assert labels[-1] == 2
    assert labels[:-1] == labelled(prompt.encode(REVIEW, SUMMARY))[:9]


def test_a_review_of_100_kilobytes_is_quick_and_warns_of_nothing(caplog):
    tokenizer = chat_tokenizer()
    tokenizer.model_max_length = 1024
    prompt = read_prompt(tokenizer, llama_config())
    began = time.perf_counter()
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        row = prompt.encode("abc " * 25_000, SUMMARY)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert len(row["input_ids"]) <= 512 + 64
    assert time.perf_counter() - began < 5
    assert not caplog.records


def test_a_begin_token_stands_once_and_in_front():
    tokenizer = metaspace()
    row = read_prompt(tokenizer, llama_config()).encode(REVIEW, SUMMARY)
    assert row["input_ids"][0] == 1
    assert row["input_ids"].count(1) == 1
    spelled = read_prompt(tokenizer, llama_config(), template="<s>Review: {review}\nSummary:")
    assert spelled.encode(REVIEW, SUMMARY)["input_ids"].count(1) == 1


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt():
    row = read_prompt(metaspace("<s> ", " </s>"), llama_config()).encode(REVIEW, SUMMARY)
    assert row["input_ids"].count(2) == 1
    assert row["input_ids"][-1] == row["labels"][-1] == 2


def test_a_summary_behind_a_word_mark_tokenizer_gets_one_space():
    tokenizer = metaspace()
    row = read_prompt(tokenizer, llama_config()).encode(REVIEW, SUMMARY)
    whole = tokenizer(f"Review: {REVIEW}\nSummary: {SUMMARY}</s>")["input_ids"]
    assert row["input_ids"] == whole


def test_a_summary_behind_a_line_break_gets_no_word_mark():
    tokenizer = metaspace()
    row = read_prompt(tokenizer, llama_config(), template="{review}\nSummary:\n").encode(REVIEW, SUMMARY)
    assert row["input_ids"] == tokenizer(f"{REVIEW}\nSummary:\n{SUMMARY}</s>")["input_ids"]


def test_a_border_that_would_merge_keeps_the_prompts_own_ids():
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "r": 3, "</s>": 4, "x": 5}, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    prompt = read_prompt(tokenizer, llama_config(), template="{review}a\n")
    assert prompt.encode("r", "b")["input_ids"] == [3, 0, 1, 4]


def test_control_tokens_in_a_review_are_taken_out():
    tokenizer = chat_tokenizer()
    prompt = read_prompt(tokenizer, llama_config())
    clean = prompt.encode("good  mug", "good  one")
    dirty = prompt.encode("good<|im_end|> mug", "good <|im_start|>one")
    assert dirty == clean


def test_a_control_token_inside_another_leaves_no_rest():
    tokenizer = byte_level(["<pad>", "</s>", "[END]", "[END] of"], eos_token="</s>", pad_token="<pad>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["[END]", "[END] of"]})
    prompt = read_prompt(tokenizer, llama_config())
    assert prompt.encode("good [END] of") == prompt.encode("good")


@pytest.mark.parametrize("bad", [None, 3.5, float("nan"), ["a"]])
def test_a_review_that_is_not_a_text_is_an_error(bad):
    with pytest.raises(ReviewsError, match=f"A review must be a text; found {type(bad).__name__}"):
        read_prompt(chat_tokenizer(), llama_config()).encode(bad)


def test_a_summary_that_is_not_a_text_is_an_error():
    with pytest.raises(ReviewsError, match="A summary must be a text; found int"):
        read_prompt(chat_tokenizer(), llama_config()).encode(REVIEW, 4)


def test_special_tokens_inside_a_text_are_an_error():
    class Odd:
        chat_template = None
        special_tokens_map = {"eos_token": "</s>"}  # noqa: RUF012

        def __call__(self, text, add_special_tokens=True, verbose=True):
            return {"input_ids": [5, 9, 6] if add_special_tokens else [5, 6]}

        def convert_tokens_to_ids(self, token):
            return 9

    with pytest.raises(TokenizerMismatch, match=r"with special tokens into \[5, 9, 6\], which does not contain it"):
        read_prompt(Odd(), llama_config())


def test_a_prompt_pickles_and_encodes_the_same():
    prompt = read_prompt(chat_tokenizer(), llama_config())
    assert pickle.loads(pickle.dumps(prompt)).encode(REVIEW, SUMMARY) == prompt.encode(REVIEW, SUMMARY)


def test_a_generated_text_is_cut_to_its_first_line():
    prompt = read_prompt(chat_tokenizer(), llama_config())
    assert prompt.clean("\n\n  Good mug. \n\nReview: bad") == "Good mug."
    assert prompt.clean("Summary:\n\nGood mug.\nMore") == "Good mug."
    assert prompt.clean("Summary:") == "Summary:"
    assert prompt.clean(" \n ") == ""


# --- the input of encoder-decoder models -----------------------------------------------------------------------------


def test_an_encoder_gets_the_tokenizers_own_special_tokens():
    tokenizer = metaspace("<s> ", " </s>")
    row = read_prompt(tokenizer, BartConfig(**bart_sizes())).encode(REVIEW, SUMMARY)
    assert row["input_ids"] == tokenizer(REVIEW)["input_ids"]
    assert row["labels"] == tokenizer(text_target=SUMMARY)["input_ids"]
    assert row["attention_mask"] == [1] * len(row["input_ids"])


@pytest.mark.parametrize(
    ("named", "given", "prefix"),
    [
        ({}, None, "summarize: "),
        ({"task_specific_params": {"summarization": {"prefix": "tldr: "}}}, None, "tldr: "),
        ({"prefix": "short: "}, None, "short: "),
        ({"prefix": "short: "}, "", ""),
        ({}, "Review: ", "Review: "),
    ],
)
def test_t5_gets_its_task_prefix(named, given, prefix):
    tokenizer = metaspace("", " </s>")
    row = read_prompt(tokenizer, t5_config(**named), source_prefix=given).encode(REVIEW, SUMMARY)
    assert row["input_ids"] == tokenizer(prefix + REVIEW)["input_ids"]


def test_bart_gets_no_task_prefix():
    assert read_prompt(metaspace("<s> ", " </s>"), BartConfig(**bart_sizes())).head == ""


def test_a_template_also_serves_an_encoder():
    prompt = read_prompt(metaspace("", " </s>"), t5_config(), template="Review: {review} Summary:")
    assert prompt.kind == "encoder-decoder"
    assert prompt.encode(REVIEW)["input_ids"] == prompt.tokenizer(f"Review: {REVIEW} Summary:")["input_ids"]


def test_labels_end_with_eos_where_the_tokenizer_adds_none():
    prompt = read_prompt(metaspace(""), t5_config(), max_summary_tokens=6)
    assert prompt.encode(REVIEW, "A")["labels"][-1] == 2
    labels = prompt.encode(REVIEW, SUMMARY)["labels"]
    assert len(labels) == 6
    assert labels.count(2) == 1
    assert labels[-1] == 2


def test_a_long_review_keeps_the_encoders_end_token():
    tokenizer = metaspace("<s> ", " </s>")
    prompt = read_prompt(tokenizer, BartConfig(**bart_sizes(max_position_embeddings=40)), max_summary_tokens=20)
    ids = prompt.encode(REVIEW * 20, SUMMARY)["input_ids"]
    assert len(ids) <= 40
    assert (ids[0], ids[-1]) == (1, 2)


# --- data sets -------------------------------------------------------------------------------------------------------


def rows(**columns: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def test_encoded_reviews_keep_only_the_models_columns():
    prompt = read_prompt(chat_tokenizer(), llama_config())
    dataset = rows(review=[REVIEW, "bad"], summary=[SUMMARY, "Bad."], rating=[5, 1])
    encoded, notes = encode_reviews(dataset, prompt)
    assert encoded.column_names == ["input_ids", "attention_mask", "labels"]
    assert [dict(row) for row in encoded] == [prompt.encode(REVIEW, SUMMARY), prompt.encode("bad", "Bad.")]
    assert notes == ()
    assert dataset.column_names == ["review", "summary", "rating"]


def test_reviews_without_summaries_are_encoded_without_labels():
    encoded, _ = encode_reviews(
        rows(text=[REVIEW]), read_prompt(chat_tokenizer(), llama_config()), review_column="text"
    )
    assert encoded.column_names == ["input_ids", "attention_mask"]


def test_cuts_are_counted():
    prompt = read_prompt(chat_tokenizer(), llama_config(), max_source_tokens=130, max_summary_tokens=20)
    dataset = rows(review=[REVIEW * 20, "bad", REVIEW * 9], summary=["Bad.", SUMMARY * 9, "Bad."])
    assert encode_reviews(dataset, prompt).notes == (
        "2 of 3 reviews were cut to 130 tokens with their prompt",
        "1 of 3 summaries were cut to 20 tokens",
    )


def test_the_fingerprint_follows_the_rows_and_the_prompt():
    dataset = rows(review=[REVIEW], summary=[SUMMARY])
    prompt = read_prompt(chat_tokenizer(), llama_config())
    prompt.encode(REVIEW * 3)  # using a tokenizer changes its state
    again = read_prompt(chat_tokenizer(), llama_config())
    other = read_prompt(chat_tokenizer(), llama_config(), template="{review} ->")
    first, second, third = (encode_reviews(dataset, p).dataset._fingerprint for p in (prompt, again, other))
    assert first == second != third


def test_a_missing_review_column_is_an_error():
    with pytest.raises(ReviewsError, match=r"column 'review'; the data set has \['text'\]"):
        encode_reviews(rows(text=[REVIEW]), read_prompt(chat_tokenizer(), llama_config()))
