"""Tiny models whose random answers depend on the review, and the slow, obvious way to summarise with them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
    TrOCRConfig,
    TrOCRForCausalLM,
)

from hf_freeze.inputs.tokenizer import SAMPLE_REVIEWS
from hf_freeze.summarization.prompts import read_prompt
from tests.tokenizer_makers import ROWS, bart_sizes, chat_tokenizer, llama_config, metaspace, t5_config

REVIEWS = ["bad", SAMPLE_REVIEWS[0], "Runs small, so order one size up.", SAMPLE_REVIEWS[2], "good mug, weak handle"]


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=ROWS, n_embd=16, n_head=2, n_layer=2, n_positions=512, bos_token_id=None, eos_token_id=2
    )
    return spread(GPT2LMHeadModel(config))


def llama(**given: Any) -> LlamaForCausalLM:
    return spread(LlamaForCausalLM(llama_config(num_hidden_layers=2, **given)))


def bart(**given: Any) -> BartForConditionalGeneration:
    return spread(BartForConditionalGeneration(BartConfig(**bart_sizes(forced_eos_token_id=None, **given))))


def t5() -> T5ForConditionalGeneration:
    return spread(T5ForConditionalGeneration(t5_config()))


def trocr() -> TrOCRForCausalLM:
    """A decoder with absolute positions that takes no position_ids: left padding moves them."""
    sizes = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = TrOCRConfig(vocab_size=ROWS, max_position_embeddings=512, **sizes, **ids)
    return spread(TrOCRForCausalLM(config))


def spread(model: Any) -> Any:
    """Weights large enough that positions and neighbours decide what a random model says next."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    return model


MODELS = {"gpt2": gpt2, "llama": llama, "bart": bart, "t5": t5}


def tokenizer_for(model: Any) -> Any:
    return metaspace("<s> ", " </s>") if model.config.is_encoder_decoder else chat_tokenizer()


def one_by_one(model: Any, tokenizer: Any, reviews: list[str], new_tokens: int) -> list[str]:
    """The slow, obvious path: each review alone, unpadded, the whole sequence again for every token."""
    model.eval()
    prompt = read_prompt(tokenizer, model.config)
    summaries = []
    for review in reviews:
        source = torch.tensor([prompt.encode(review)["input_ids"]])
        answer: list[int] = []
        for _ in range(new_tokens):
            if model.config.is_encoder_decoder:
                start = [model.config.decoder_start_token_id, *answer]
                logits = model(input_ids=source, decoder_input_ids=torch.tensor([start])).logits
            else:
                logits = model(input_ids=torch.cat([source, torch.tensor([answer], dtype=torch.long)], 1)).logits
            answer.append(int(logits[0, -1].argmax()))
            if answer[-1] in prompt.stop_ids:
                break
        summaries.append(prompt.clean(tokenizer.decode(answer, skip_special_tokens=True)))
    return summaries
