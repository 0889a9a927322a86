"""Tokenizers trained on a few sentences, and the configs and sizes of models that go with them."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast, T5Config

from hf_freeze.inputs.tokenizer import SAMPLE_REVIEWS

REVIEW = "The kettle boils fast, but the lid broke after two weeks."
SUMMARY = "A fast kettle with a weak lid."
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
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
