"""Claims about `hf_freeze.inputs.tokenizer`, on tokenizers trained here and models built from configs."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from hf_freeze.errors import TokenizerMismatch
from hf_freeze.inputs.tokenizer import check_tokenizer, underlying_model
from tests.tokenizer_makers import ROWS, byte_level, chat_tokenizer, llama_config, metaspace, t5_config


def nameless() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def changed(tokenizer, **tokens):
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "config", "samples", "message"),
    [
        (chat_tokenizer, {"vocab_size": 100}, {}, r"ids go up to \d+; .* has 100 rows.* would index past it.*resize"),
        (lambda: changed(chat_tokenizer(), sep_token="[SEP]"), {}, {},
         r"names '\[SEP\]' as its sep_token, but .* not in its vocabulary"),
        (lambda: changed(chat_tokenizer(), eos_token=None), {"eos_token_id": None}, {},
         "no model eos, so generation could never stop"),
        (lambda: changed(chat_tokenizer(), eos_token=None), {"eos_token_id": 900}, {},
         r"eos ids \[900\] are past its 400 rows, so generation could never"),
        (lambda: byte_level([]), {"eos_token_id": 399}, {}, r"no pad token, and none of .*Set tokenizer.pad_token"),
        (metaspace, {}, {"samples": ["Отличный чайник"]},
         r"turns \d+ of \d+ tokens of 1 sample reviews into '<unk>'"),
        (nameless, {}, {}, "into no token at all"),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_an_error(tokenizer, config, samples, message):
    with pytest.raises(TokenizerMismatch, match=message):
        check_tokenizer(llama_config(**config), tokenizer(), **samples)


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


def test_the_model_inside_peft_is_found():
    from peft import LoraConfig, get_peft_model

    model = LlamaForCausalLM(llama_config())
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert underlying_model(torch.nn.DataParallel(wrapped)) is model
