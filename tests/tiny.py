"""Small random models with a tokenizer trained on the shipped reviews, as folders for `from_pretrained`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from hf_freeze.summarization import shipped_reviews

VOCAB = 1000


@cache
def _backend() -> str:
    texts = [text for row in shipped_reviews()["train"].dataset for text in (row["review"], row["summary"])]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE; encoder-decoders wrap their input in start and end tokens, GPT-2's has no pad token."""
    backend = Tokenizer.from_str(_backend())
    if kind in ("bart", "t5"):
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>" if kind == "bart" else "$A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token=None if kind == "gpt2" else "<pad>"
    )
    if kind == "gpt2":
        tokenizer.add_special_tokens({"bos_token": "</s>"})
    return tokenizer


def tiny_model(kind: str, **given: Any) -> torch.nn.Module:
    """Four blocks a stack, width 32, no dropout unless given."""
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
        config: Any = LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, **sizes, **ids, **given)
    elif kind == "gpt2":
        values = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        config = GPT2Config(**{"vocab_size": VOCAB, **values, "attn_pdrop": 0.0, **ids, "pad_token_id": None, **given})
    elif kind == "bart":
        sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 512}
        depth = {"encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
        rest = {"decoder_start_token_id": 2, "forced_eos_token_id": 2, "dropout": 0.0}
        config = BartConfig(**{"vocab_size": VOCAB, **sizes, **depth, **rest, **ids, **given})
    elif kind == "t5":
        sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 4, "num_decoder_layers": 4}
        config = T5Config(vocab_size=VOCAB, dropout_rate=0.0, decoder_start_token_id=0, **sizes, **ids, **given)
    else:
        raise ValueError(kind)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config)


def tiny_folder(kind: str, folder: Path) -> Path:
    """Model and tokenizer written to folder/kind."""
    path = folder / kind
    tiny_model(kind).save_pretrained(path)
    tiny_tokenizer(kind).save_pretrained(path)
    return path
