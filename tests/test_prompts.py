"""Claims about `hf_freeze.summarization.prompts`, on tokenizers trained here and models built from small configs."""

from __future__ import annotations

import copy
import logging
import pickle
import re
import time
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    FSMTConfig,
    FSMTForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LEDConfig,
    LEDForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_freeze.errors import FreezeError, ModelError, ReviewsError, TokenizerMismatch
from hf_freeze.summarization.prompts import (
    SAMPLE_REVIEWS,
    SummaryCollator,
    check_tokenizer,
    encode_reviews,
    read_prompt,
    underlying_model,
)

REVIEW = "The kettle boils fast, but the lid broke after two weeks."
SUMMARY = "A fast kettle with a weak lid."
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<s>[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }} </s>{% endif %}{% endfor %}"
)
ROWS = 400


def byte_level(special: list[str], **named: str) -> Any:
    """A tokenizer like GPT-2's and SmolLM2's: byte-level, no special tokens around a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*SAMPLE_REVIEWS, REVIEW, SUMMARY], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def chat_tokenizer(template: str | None = CHATML, **named: str) -> Any:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level(special, **({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | named))
    tokenizer.chat_template = template
    return tokenizer


def metaspace(before: str = "<s> ", after: str = "", **named: str) -> Any:
    """A tokenizer like LLaMA's or T5's: a space is a mark before a word, also before the first."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], show_progress=False)
    backend.train_from_iterator([*SAMPLE_REVIEWS, REVIEW, SUMMARY, "summarize: Review: [INST]\nSummary:"] * 2, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{before}$A{after}", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | named
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def llama_config(**given: Any) -> LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaConfig(**(sizes | ids | {"vocab_size": ROWS} | given))


def t5_config(**given: Any) -> T5Config:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return T5Config(**(sizes | ids | {"vocab_size": ROWS} | given))


def bart_sizes(**given: Any) -> dict[str, Any]:
    return {
        "vocab_size": ROWS,
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    } | given


def labelled(row: dict[str, list[int]]) -> list[int]:
    return [id_ for id_ in row["labels"] if id_ != -100]


# --- check_tokenizer -------------------------------------------------------------------------------------------------


def test_ids_past_the_embedding_table_are_an_error():
    tokenizer = chat_tokenizer()
    with pytest.raises(TokenizerMismatch, match=r"ids go up to \d+; .* has 100 rows.* would index past it.*resize"):
        check_tokenizer(llama_config(vocab_size=100), tokenizer)


def test_the_rows_are_those_of_the_model_not_of_its_config():
    model = LlamaForCausalLM(llama_config(vocab_size=100))
    model.resize_token_embeddings(ROWS)
    model.config.vocab_size = 100
    assert check_tokenizer(model, chat_tokenizer()).embedding_rows == ROWS


def test_a_model_in_a_wrapper_is_checked_like_the_model():
    model = torch.nn.DataParallel(LlamaForCausalLM(llama_config()))
    assert check_tokenizer(model, chat_tokenizer()).embedding_rows == ROWS


def test_a_tokenizer_far_smaller_than_the_model_is_noted():
    fit = check_tokenizer(llama_config(vocab_size=5000), chat_tokenizer())
    assert any("a tokenizer of another model?" in note for note in fit.notes)
    assert not check_tokenizer(llama_config(), chat_tokenizer()).notes


def test_a_config_without_a_vocabulary_size_is_noted():
    class Bare(PreTrainedConfig):
        model_type = "bare"

    fit = check_tokenizer(Bare(eos_token_id=2), chat_tokenizer())
    assert fit.embedding_rows is None
    assert "names no vocabulary size" in fit.notes[0]
    assert "an unknown number of embedding rows" in str(fit)


def test_a_special_token_outside_the_vocabulary_is_an_error():
    tokenizer = chat_tokenizer()
    tokenizer.sep_token = "[SEP]"
    with pytest.raises(TokenizerMismatch, match=r"names '\[SEP\]' as its sep_token, but .* not in its vocabulary"):
        check_tokenizer(llama_config(), tokenizer)


def test_a_model_that_could_never_stop_is_an_error():
    tokenizer = chat_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(TokenizerMismatch, match="no model eos, so generation could never stop"):
        check_tokenizer(llama_config(eos_token_id=None), tokenizer)
    with pytest.raises(TokenizerMismatch, match=r"eos ids \[900\] are past its 400 rows, so generation could never"):
        check_tokenizer(llama_config(eos_token_id=900), tokenizer)


def test_end_and_begin_ids_that_differ_are_named():
    tokenizer = metaspace()
    fit = check_tokenizer(llama_config(eos_token_id=[7, 8], bos_token_id=9), tokenizer)
    assert "eos: the tokenizer says 2 ('</s>'), the model's config [7, 8]; generation stops at either" in fit.notes
    assert "bos: the tokenizer says 1 ('<s>'), the model's config [9]; inputs begin as the tokenizer says" in fit.notes


def test_an_end_id_in_the_generation_config_counts_as_the_models():
    model = LlamaForCausalLM(llama_config(eos_token_id=7))
    model.generation_config.eos_token_id = [7, 2]
    assert not any(note.startswith("eos") for note in check_tokenizer(model, metaspace()).notes)


@pytest.mark.parametrize(
    ("special", "named", "chosen", "reason"),
    [
        (["<|finetune_right_pad_id|>", "<pad>", "</s>"], {}, "<|finetune_right_pad_id|>", "reserved for padding"),
        (["</s>", "[PAD]"], {}, "[PAD]", "reserved for padding"),
        (["</s>", "<unk>"], {"unk_token": "<unk>"}, "<unk>", "its unknown token"),
        (["</s>"], {"unk_token": "</s>"}, "</s>", "its end token. Safe: padding is masked .* by position"),
    ],
)
def test_a_missing_pad_token_is_chosen_with_a_reason(special, named, chosen, reason):
    tokenizer = byte_level(special, eos_token="</s>", **named)
    fit = check_tokenizer(llama_config(pad_token_id=None), tokenizer)
    assert tokenizer.pad_token == fit.pad_token == chosen
    assert fit.pad_token_id == tokenizer.convert_tokens_to_ids(chosen)
    (note,) = (note for note in fit.notes if "had no pad token" in note)
    assert re.search(reason, note)


def test_without_any_token_of_its_own_the_models_end_token_pads():
    tokenizer = byte_level(["</s>"])
    assert check_tokenizer(llama_config(eos_token_id=0, pad_token_id=None), tokenizer).pad_token == "</s>"


def test_a_tokenizer_with_nothing_to_pad_with_is_an_error():
    with pytest.raises(TokenizerMismatch, match=r"no pad token, and none of .*Set tokenizer.pad_token"):
        check_tokenizer(llama_config(eos_token_id=399), byte_level([]))


def test_a_missing_pad_id_is_set_in_the_model_and_said():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=ROWS, n_embd=8, n_head=2, n_layer=1, eos_token_id=2))
    tokenizer = byte_level(["<a>", "<b>", "</s>"], eos_token="</s>")
    fit = check_tokenizer(model, tokenizer)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id == 2
    assert any("the model had no pad id: set to 2" in note for note in fit.notes)
    again = check_tokenizer(model, tokenizer)
    assert again.notes == ()


def test_a_config_alone_is_never_changed():
    config = llama_config(pad_token_id=None)
    before = copy.deepcopy(config.to_dict())
    check_tokenizer(config, chat_tokenizer())
    assert config.to_dict() == before


def test_pad_ids_that_differ_are_noted_and_left():
    model = LlamaForCausalLM(llama_config(pad_token_id=5))
    fit = check_tokenizer(model, chat_tokenizer())
    assert any(note.startswith("pad: the tokenizer says 0, the model's config [5]") for note in fit.notes)
    assert model.config.pad_token_id == 5


def test_the_longest_input_is_the_smallest_limit():
    tokenizer = chat_tokenizer()
    assert check_tokenizer(llama_config(max_position_embeddings=96), tokenizer).max_tokens == 96
    tokenizer.model_max_length = 80
    assert check_tokenizer(llama_config(max_position_embeddings=96), tokenizer).max_tokens == 80
    assert check_tokenizer(GPT2Config(vocab_size=ROWS, n_positions=64), tokenizer).max_tokens == 64


def test_relative_positions_have_no_limit():
    fit = check_tokenizer(t5_config(n_positions=512), metaspace("", " </s>"))
    assert fit.max_tokens is None
    assert "no length limit" in str(fit)


def test_positions_that_start_after_the_padding_id_are_not_counted():
    config = RobertaConfig(vocab_size=ROWS, max_position_embeddings=514, pad_token_id=1, eos_token_id=2)
    assert check_tokenizer(config, metaspace()).max_tokens == 512


def test_reviews_that_come_out_as_unknown_tokens_are_an_error():
    tokenizer = metaspace()
    with pytest.raises(TokenizerMismatch, match=r"turns \d+ of \d+ tokens of 1 sample reviews into '<unk>'"):
        check_tokenizer(llama_config(), tokenizer, samples=["Отличный чайник"])


def test_reviews_that_come_out_as_nothing_are_an_error():
    backend = Tokenizer(models.BPE())
    backend.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(TokenizerMismatch, match="into no token at all"):
        check_tokenizer(llama_config(), tokenizer)


def test_a_fit_prints_its_limits_and_its_notes():
    tokenizer = byte_level(["<a>", "</s>"], eos_token="</s>")
    fit = check_tokenizer(llama_config(eos_token_id=1), tokenizer)
    assert str(fit).splitlines() == [
        f"tokenizer fits the model: {len(tokenizer)} ids in 400 embedding rows, padding with '</s>' (1), "
        "at most 2,048 tokens",
        "  note: the tokenizer had no pad token: set to '</s>' (1), its end token. Safe: padding is masked in the "
        "attention and the labels by position, never by id, so the end of each summary is still learnt",
        "  note: pad: the tokenizer says 1, the model's config [0]; padding is masked",
    ]


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


@pytest.mark.parametrize(("template", "times"), [("Summarize:", 0), ("{review} {review}", 2)])
def test_a_template_without_exactly_one_review_is_an_error(template, times):
    with pytest.raises(FreezeError, match=rf"holds \{{review\}} {times} times; it must hold it exactly once"):
        read_prompt(chat_tokenizer(), llama_config(), template=template)


def test_a_source_prefix_for_a_decoder_is_an_error():
    with pytest.raises(FreezeError, match="is for encoder-decoder models, and this model is decoder-only"):
        read_prompt(chat_tokenizer(), llama_config(), source_prefix="summarize: ")


def test_a_source_prefix_beside_a_template_is_an_error():
    with pytest.raises(FreezeError, match="source_prefix and template both"):
        read_prompt(metaspace("", " </s>"), t5_config(), source_prefix="a: ", template="b: {review}")


def test_a_tokenizer_without_an_end_is_an_error():
    tokenizer = byte_level(["<pad>"], pad_token="<pad>")
    with pytest.raises(TokenizerMismatch, match="no eos_token, so a summary would have no end to learn"):
        read_prompt(tokenizer, llama_config())


@pytest.mark.parametrize("limits", [{"max_source_tokens": 0}, {"max_summary_tokens": -1}])
def test_limits_below_one_are_an_error(limits):
    with pytest.raises(FreezeError, match="must be at least 1"):
        read_prompt(chat_tokenizer(), llama_config(), **limits)


@pytest.mark.parametrize(
    ("positions", "limits"), [(64, {}), (512, {"max_source_tokens": 20}), (512, {"max_summary_tokens": 1})]
)
def test_no_room_for_prompt_and_summary_is_an_error(positions, limits):
    with pytest.raises(TokenizerMismatch, match=r"No room: the text around a review takes \d+ tokens"):
        read_prompt(chat_tokenizer(), llama_config(max_position_embeddings=positions), **limits)


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


def test_a_summary_longer_than_the_decoder_is_an_error():
    with pytest.raises(TokenizerMismatch, match=r"max_summary_tokens=64, but the decoder takes 32"):
        read_prompt(metaspace("<s> ", " </s>"), BartConfig(**bart_sizes(max_position_embeddings=32)))


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


# --- batches ---------------------------------------------------------------------------------------------------------

PAIRS = [(REVIEW, SUMMARY), ("bad", "Bad."), ("Runs small, so order one size up.", "Order a size up.")]
ENCODER_DECODERS = {
    "bart": lambda: BartForConditionalGeneration(BartConfig(**bart_sizes())),
    "t5": lambda: T5ForConditionalGeneration(t5_config()),
    "pegasus": lambda: PegasusForConditionalGeneration(PegasusConfig(**bart_sizes(decoder_start_token_id=0))),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**bart_sizes())),
    "m2m_100": lambda: M2M100ForConditionalGeneration(M2M100Config(**bart_sizes())),
    "led": lambda: LEDForConditionalGeneration(
        LEDConfig(**bart_sizes(), attention_window=8, max_encoder_position_embeddings=128)
    ),
    "marian": lambda: MarianMTModel(MarianConfig(**bart_sizes(decoder_vocab_size=ROWS, decoder_start_token_id=0))),
}


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_decoder_inputs_give_the_models_own_loss(name):
    torch.manual_seed(0)
    model = ENCODER_DECODERS[name]().eval()
    tokenizer = metaspace("<s> ", " </s>")
    prompt = read_prompt(tokenizer, model.config)
    collator = pickle.loads(pickle.dumps(SummaryCollator(tokenizer, model)))
    batch = collator([prompt.encode(*pair) for pair in PAIRS])
    given = batch.pop("decoder_input_ids")
    seen = []
    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    with torch.no_grad():
        own = model(**batch)
        ours = model(**batch, decoder_input_ids=given)
    assert torch.equal(seen[0], given)
    assert torch.equal(own.loss, ours.loss)
    assert torch.equal(own.logits, ours.logits)


def test_a_collator_does_not_carry_the_model():
    collator = SummaryCollator(metaspace("<s> ", " </s>"), ENCODER_DECODERS["bart"]())
    assert len(pickle.dumps(collator)) < 1000


def test_labels_keep_their_mask_where_the_models_own_function_overwrites_it():
    sizes = bart_sizes(langs=["en", "de"], src_vocab_size=ROWS, tgt_vocab_size=ROWS)
    del sizes["vocab_size"]
    model = FSMTForConditionalGeneration(FSMTConfig(**sizes))
    tokenizer = metaspace("", " </s>")
    prompt = read_prompt(tokenizer, model.config)
    batch = SummaryCollator(tokenizer, model)([prompt.encode(*pair) for pair in PAIRS])
    assert (batch["labels"] == -100).any()
    expected = model.prepare_decoder_input_ids_from_labels(batch["labels"].clone())
    assert torch.equal(batch["decoder_input_ids"], expected)


def test_decoder_only_batches_are_padded_on_the_right():
    tokenizer = chat_tokenizer()
    tokenizer.padding_side = "left"
    prompt = read_prompt(tokenizer, llama_config())
    features = [prompt.encode(*pair) for pair in PAIRS]
    batch = SummaryCollator(tokenizer, LlamaForCausalLM(llama_config()))(features)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    width = max(len(feature["input_ids"]) for feature in features)
    for at, feature in enumerate(features):
        length = len(feature["input_ids"])
        gap = width - length
        assert batch["input_ids"][at].tolist() == feature["input_ids"] + [0] * gap
        assert batch["attention_mask"][at].tolist() == [1] * length + [0] * gap
        assert batch["labels"][at].tolist() == feature["labels"] + [-100] * gap


def test_rows_without_labels_are_collated_without_labels():
    prompt = read_prompt(metaspace("", " </s>"), t5_config())
    batch = SummaryCollator(prompt.tokenizer, ENCODER_DECODERS["t5"]())([prompt.encode(REVIEW), prompt.encode("bad")])
    assert set(batch) == {"input_ids", "attention_mask"}


def test_widths_are_rounded_up_to_the_multiple():
    prompt = read_prompt(metaspace("", " </s>"), t5_config())
    collator = SummaryCollator(prompt.tokenizer, ENCODER_DECODERS["t5"](), pad_to_multiple_of=8)
    batch = collator([prompt.encode(*pair) for pair in PAIRS])
    assert {tensor.shape[1] % 8 for tensor in batch.values()} == {0}


def test_another_label_pad_does_not_reach_the_decoder():
    tokenizer = metaspace("", " </s>")
    prompt = read_prompt(tokenizer, t5_config())
    features = [prompt.encode(*pair) for pair in PAIRS]
    usual = SummaryCollator(tokenizer, ENCODER_DECODERS["t5"]())(features)
    other = SummaryCollator(tokenizer, ENCODER_DECODERS["t5"](), label_pad=-1)(features)
    assert (other["labels"] == -1).any()
    assert torch.equal(usual["decoder_input_ids"], other["decoder_input_ids"])


def test_a_batch_with_some_labels_is_an_error():
    prompt = read_prompt(chat_tokenizer(), llama_config())
    with pytest.raises(ReviewsError, match="1 of the 2 rows of a batch have labels"):
        SummaryCollator(prompt.tokenizer)([prompt.encode(REVIEW, SUMMARY), prompt.encode(REVIEW)])


def test_a_collator_without_a_pad_token_is_an_error():
    with pytest.raises(TokenizerMismatch, match=r"no pad token.*check_tokenizer"):
        SummaryCollator(byte_level(["</s>"], eos_token="</s>"))


def test_an_encoder_decoder_without_a_start_token_is_an_error():
    model = T5ForConditionalGeneration(t5_config(decoder_start_token_id=None))
    with pytest.raises(
        ModelError, match=r"T5ForConditionalGeneration cannot make decoder_input_ids.*decoder_start_tok"
    ):
        SummaryCollator(metaspace("", " </s>"), model)


def encoder_decoder_stand_in(**methods: Any) -> torch.nn.Module:
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace(is_encoder_decoder=True)
    for name, method in methods.items():
        setattr(model, name, method)
    return model


def test_an_unknown_way_of_shifting_labels_is_an_error():
    model = encoder_decoder_stand_in(prepare_decoder_input_ids_from_labels=lambda labels: labels.flip(1))
    with pytest.raises(ModelError, match="by a rule of its own"):
        SummaryCollator(metaspace("", " </s>"), model)


def test_a_model_without_a_way_of_shifting_labels_is_an_error():
    with pytest.raises(ModelError, match="its module has no function for it"):
        SummaryCollator(metaspace("", " </s>"), encoder_decoder_stand_in())


def test_the_model_inside_peft_is_found():
    from peft import LoraConfig, get_peft_model

    model = LlamaForCausalLM(llama_config())
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert underlying_model(torch.nn.DataParallel(wrapped)) is model
