"""Claims about `hf_freeze.inputs.collation`, on tokenizers trained here and models built from configs."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    FSMTConfig,
    FSMTForConditionalGeneration,
    LEDConfig,
    LEDForConditionalGeneration,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    T5ForConditionalGeneration,
)

from hf_freeze.errors import ModelError, ReviewsError, TokenizerMismatch
from hf_freeze.inputs.collation import SummaryCollator
from hf_freeze.summarization.prompts import read_prompt
from tests.tokenizer_makers import (
    REVIEW,
    ROWS,
    SUMMARY,
    bart_sizes,
    byte_level,
    chat_tokenizer,
    llama_config,
    metaspace,
    t5_config,
)

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


def encoder_decoder_stand_in(**methods: Any) -> torch.nn.Module:
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace(is_encoder_decoder=True)
    for name, method in methods.items():
        setattr(model, name, method)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: T5ForConditionalGeneration(t5_config(decoder_start_token_id=None)),
         r"T5ForConditionalGeneration cannot make decoder_input_ids.*decoder_start_tok"),
        (lambda: encoder_decoder_stand_in(prepare_decoder_input_ids_from_labels=lambda labels: labels.flip(1)),
         "by a rule of its own"),
        (encoder_decoder_stand_in, "its module has no function for it"),
    ],
)  # fmt: skip
def test_an_encoder_decoder_whose_way_of_shifting_labels_is_not_known_is_an_error(make, message):
    with pytest.raises(ModelError, match=message):
        SummaryCollator(metaspace("", " </s>"), make())


def test_a_collator_without_a_pad_token_is_an_error():
    with pytest.raises(TokenizerMismatch, match=r"no pad token.*check_tokenizer"):
        SummaryCollator(byte_level(["</s>"], eos_token="</s>"))
