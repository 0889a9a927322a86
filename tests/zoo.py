"""Small random models of every architecture that transformers' Auto classes build from a config.

A config is shrunk by the names of its sizes, never by the name of its architecture; the few that need values of
their own stand in OVERRIDES. An architecture that still does not build is reported by `build` as its exception.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

BLOCKS = 4
VOCAB = 64

SMALL: dict[str, Any] = {
    # depth
    **dict.fromkeys(
        ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
         "num_encoder_layers", "num_decoder_layers", "num_decoder_blocks"], BLOCKS),
    # vocabulary
    **dict.fromkeys(["vocab_size", "decoder_vocab_size", "unpadded_vocab_size", "encoder_vocab_size"], VOCAB),
    # width
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim",
                     "dim_model_base"], 32),
    **dict.fromkeys(
        ["intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "dff", "dim_ff", "ffn_hidden_size",
         "moe_intermediate_size", "ffn_dim", "intermediate_size_mlp", "shared_intermediate_size", "n_inner",
         "shared_expert_intermediate_size", "expert_ffn_hidden_size", "shared_experts_intermediate_size",
         "dense_intermediate_size", "prefix_dense_intermediate_size"], 48),
    # heads
    **dict.fromkeys(
        ["num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
         "decoder_attention_heads", "linear_num_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "n_group", "topk_group", "num_expert_group"], 2),
    **dict.fromkeys(
        ["head_dim", "d_kv", "dim_head", "kv_channels", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim",
         "linear_head_dim", "index_head_dim", "global_head_dim"], 8),
    "qk_head_dim": 16, "rotary_dim": 4,
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "gated_norm_rank", "o_lora_rank"], 8),
    **dict.fromkeys(["index_topk", "index_n_heads"], 4),
    # experts
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k"], 2),
    # lengths
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length",
                     "max_target_positions", "max_source_positions"], 64),
    "sliding_window": 16, "window_size": 16, "local_attention": 16, "attention_chunk_size": 16,
    # state-space
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8, "state_size": 8,
    "mamba_dt_rank": 4, "time_step_rank": 4, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8,
    "chunk_size": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {}


def architectures() -> list[tuple[str, type]]:
    """Every (model type, Auto class) of the two Auto classes, each type once."""
    rows: dict[str, type] = dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM)
    for name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        rows[name] = AutoModelForSeq2SeqLM  # where a type has both, the encoder-decoder is the richer one
    return sorted(rows.items())


def shrink(config_class: type, **given: Any) -> Any:
    """A small config of the class: every size that the default config has and SMALL knows."""
    default = config_class()
    values = {name: value for name, value in SMALL.items() if getattr(default, name, None) is not None}
    for name in getattr(config_class, "sub_configs", {}):
        sub = getattr(default, name, None)
        if hasattr(sub, "to_dict"):
            values[name] = shrink(type(sub)).to_dict()
    return config_class(**(values | given))


def build(model_type: str, auto_class: type | None = None, **given: Any) -> PreTrainedModel:
    """A small random model of the type, in fp32, seeded."""
    auto_class = auto_class or dict(architectures())[model_type]
    config = shrink(CONFIG_MAPPING[model_type], **(OVERRIDES.get(model_type, {}) | given))
    torch.manual_seed(0)
    return auto_class.from_config(config).float()  # type: ignore[attr-defined]
