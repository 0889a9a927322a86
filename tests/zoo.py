"""Small random models of every architecture that transformers' Auto classes build from a config.

A config is shrunk by the names of its sizes, never by the name of its architecture; the few that need values of
their own stand in OVERRIDES, and those that transformers does not build and run alone in NOT_BUILT, with the reason.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
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
    # embeddings a layer
    "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip

DROP = object()  # an override: leave the default
EVEN_WHERE_NONE = ("head_dim", "num_key_value_heads")  # derived from a checkpoint's own config, never here

HYBRID = ["linear_attention", "full_attention"] * (BLOCKS // 2)

OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "blt": {"encoder_hash_byte_group_vocab": VOCAB},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8, "swa_q_lora_rank": 8,
                        "swa_kv_lora_rank": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4},
    "dory": {"n_input_layers": 2, "n_output_layers": 1},  # the one between is called twice
    "encoder-decoder": {"pad_token_id": 0, "decoder": {"is_decoder": True, "add_cross_attention": True}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], BLOCKS // 2]]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (BLOCKS // 2)},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "mllama": {"text_config": {"cross_attention_layers": []}},
    "nemo_speechlm": {"audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 32}}},
                      "word_timestamp_config": {"blank_token_id": VOCAB - 1}},
    "prophetnet": {"num_hidden_layers": DROP},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
                       "indexer_compress_ratio": 4},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"] * 2,
                 "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "attention_head_size": 8},
    "roc_bert": {"shape_vocab_size": VOCAB, "pronunciation_vocab_size": VOCAB, "shape_embed_dim": 16,
                 "pronunciation_embed_dim": 16},
    "vibevoice_asr": {"acoustic_tokenizer_encoder_config": {"num_filters": 2, "depths": [1] * 7},
                      "semantic_tokenizer_encoder_config": {"num_filters": 2, "depths": [1] * 7}},
    "xlnet": {"max_position_embeddings": DROP},
    "xlstm": {"hidden_size": 128, "use_cache": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
OVERRIDES["dots3_note"] = {
    "text_config": OVERRIDES["dots3_note_text"],
    "vision_config": {"pyramid_num_routed": [-1, -1, 4, 4], "adapter_in_dim": 32, "adapter_out_dim": 32},
    "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
}
OVERRIDES["qwen4_exp"] = {"text_config": OVERRIDES["qwen4_exp_text"]}


# What transformers itself does not build from a config alone, or not run on tokens alone: the exception, and why.
NOT_BUILT: dict[str, tuple[type[Exception], str]] = {
    "gemma3n": (ImportError, "its vision tower needs the packages timm and pillow"),
    "gemma4_assistant": (
        StrictDataclassClassValidationError,
        "a draft model that reads another model's states; its default config is invalid",
    ),
    "gemma4_unified_assistant": (ValueError, "a draft model that reads another model's states"),
    "musicgen": (AttributeError, "the Auto class hands the composite config to a class that takes its decoder's"),
    "musicgen_melody": (
        AttributeError,
        "the Auto class hands the composite config to a class that takes its decoder's",
    ),
}


def architectures() -> list[tuple[str, type]]:
    """Every (model type, Auto class) that the two Auto classes know; BART and ten others are in both."""
    rows: list[tuple[str, type]] = [(name, AutoModelForCausalLM) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    rows += [(name, AutoModelForSeq2SeqLM) for name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES]
    return sorted(rows, key=lambda row: (row[0], row[1].__name__))


def name_of(architecture: tuple[str, type]) -> str:
    """The model type, and which Auto class where both know the type."""
    name, auto_class = architecture
    both = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return f"{name}-{'causal' if auto_class is AutoModelForCausalLM else 'seq2seq'}" if both else name


def shrink(config_class: type, **given: Any) -> Any:
    """A small config of the class: every size that the default config has and SMALL knows.

    A dict given for a sub-config is laid over the shrunk sub-config.
    """
    default = config_class()
    values = {name: value for name, value in SMALL.items() if _has(default, name)}
    values |= {name: SMALL[name] for name in EVEN_WHERE_NONE if name in config_class.__dataclass_fields__}
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent attention knows no grouped queries
    for name in getattr(config_class, "sub_configs", {}):
        sub = getattr(default, name, None)
        if hasattr(sub, "to_dict"):
            values[name] = shrink(type(sub), **given.pop(name, {})).to_dict()
    return config_class(**{name: value for name, value in (values | given).items() if value is not DROP})


def _has(config: Any, name: str) -> bool:
    """Whether a config has a value under this name, and takes one."""
    attribute = getattr(type(config), name, None)
    if isinstance(attribute, property) and attribute.fset is None:
        return False
    try:
        return getattr(config, name, None) is not None
    except RuntimeError:  # it differs from layer to layer
        return True


def build(model_type: str, auto_class: type | None = None, **given: Any) -> PreTrainedModel:
    """A small random model of the type, in fp32, seeded; an encoder-decoder where the type is in both Auto classes."""
    auto_class = auto_class or dict(architectures())[model_type]
    config = shrink(CONFIG_MAPPING[model_type], **(OVERRIDES.get(model_type, {}) | given))
    config.decoder_start_token_id = SMALL["decoder_start_token_id"]
    torch.manual_seed(0)
    return auto_class.from_config(config).float()  # type: ignore[attr-defined]
