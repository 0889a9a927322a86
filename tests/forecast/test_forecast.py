"""The forecast against sums done by hand, torch's own FLOP counter, and the tensors that autograd really keeps."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_freeze.errors import FreezeError, PlanError
from hf_freeze.forecast import Forecast, forecast
from hf_freeze.freezing import freeze
from hf_freeze.plan import FreezePlan
from tests.zoo import build

D, FF, HEADS, KV_HEADS, BLOCKS, VOCAB = 64, 160, 4, 2, 4, 96
ROWS, SOURCE, TARGET = 2, 48, 16


def llama(**given: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": D, "intermediate_size": FF, "num_hidden_layers": BLOCKS, "vocab_size": VOCAB}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "attn_implementation": "eager", **given}))


def gpt2(**given: Any) -> GPT2LMHeadModel:
    sizes = {"n_embd": D, "n_layer": BLOCKS, "n_head": HEADS, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "attn_implementation": "eager", **given}))


def bart(**given: Any) -> BartForConditionalGeneration:
    sizes = {"d_model": D, "encoder_ffn_dim": FF, "decoder_ffn_dim": FF, "vocab_size": VOCAB}
    depth = {"encoder_layers": BLOCKS, "decoder_layers": BLOCKS}
    heads = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS}
    return BartForConditionalGeneration(
        BartConfig(**{**sizes, **depth, **heads, "attn_implementation": "eager", **given})
    )


def t5(**given: Any) -> T5ForConditionalGeneration:
    sizes = {"d_model": D, "d_ff": FF, "d_kv": 8, "num_heads": HEADS, "num_layers": BLOCKS, "vocab_size": VOCAB}
    start = {"decoder_start_token_id": 0, "pad_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**{**sizes, **start, "attn_implementation": "eager", **given}))


def bert(**given: Any) -> BertForMaskedLM:
    sizes = {"hidden_size": D, "intermediate_size": FF, "num_hidden_layers": BLOCKS, "vocab_size": VOCAB}
    heads = {"num_attention_heads": HEADS, "attn_implementation": "eager"}
    return BertForMaskedLM(BertConfig(**{**sizes, **heads, **given}))


def mixtral(**given: Any) -> MixtralForCausalLM:
    sizes = {"hidden_size": D, "intermediate_size": FF, "num_hidden_layers": BLOCKS, "vocab_size": VOCAB}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "attn_implementation": "eager"}
    config = MixtralConfig(**{**sizes, **heads, "num_local_experts": 8, "num_experts_per_tok": 2, **given})
    config._experts_implementation = "eager"  # torch counts no grouped matrix product
    return MixtralForCausalLM(config)


def small_forecast(model: nn.Module, plan: FreezePlan | None = None, **given: Any) -> Forecast:
    sizes = {"batch_size": ROWS, "source_tokens": SOURCE, "target_tokens": TARGET, "dtype": "float32"}
    return forecast(model, plan, **{**sizes, **given})


def batch_of(model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def ids(tokens: int) -> torch.Tensor:
        return torch.randint(3, VOCAB, (ROWS, tokens), generator=generator)

    if model.config.is_encoder_decoder:
        return {"input_ids": ids(SOURCE), "labels": ids(TARGET)}
    tokens = ids(SOURCE if isinstance(model, BertForMaskedLM) else SOURCE + TARGET)
    return {"input_ids": tokens, "labels": tokens}


def measure(model: nn.Module) -> tuple[int, int]:
    """FLOPs that torch counts in a real step, and bytes of the tensors that autograd keeps, in eval mode."""
    model.eval()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**batch_of(model)).loss
        loss.backward()
    model.zero_grad()
    return counter.get_total_flops(), sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


# ------------------------------------------------------------------------------------------------------------ by hand


def test_a_tiny_llama_costs_what_the_sums_by_hand_say() -> None:
    made = small_forecast(llama(), FreezePlan(decoder_blocks=3), epochs=3, rows=10, lora_rank=4)

    tokens = SOURCE + TARGET
    kv = D // HEADS * KV_HEADS
    matrices = 2 * D * D + 2 * D * kv + 3 * D * FF  # q, o; k, v; gate, up, down
    block = matrices + 2 * D  # two norms
    table = VOCAB * D
    everything = 2 * table + BLOCKS * block + D
    scores = 2 * 2 * tokens**2 * D  # q k^T and p v, forward

    full, frozen, cached, lora = (made.modes[name] for name in ("full", "frozen", "cached", "lora"))
    assert full.trainable_parameters == everything
    assert frozen.trainable_parameters == cached.trainable_parameters == block + D + table
    assert lora.trainable_parameters == BLOCKS * 4 * (2 * (D + D) + 2 * (D + kv) + 3 * (D + FF))

    head = 6 * table * tokens
    assert full.step_flops == ROWS * (BLOCKS * (6 * matrices * tokens + 3 * scores) + head)
    one_block = 6 * matrices * tokens + 3 * scores  # its first norm trains, so q, k and v need their input's gradient
    forward_only = 3 * (2 * matrices * tokens + scores)
    assert frozen.step_flops == ROWS * (forward_only + one_block + head)
    assert cached.step_flops == ROWS * (one_block + head)
    assert (full.head_flops, cached.head_flops) == (ROWS * head, ROWS * head)
    assert cached.supervised_step_flops == ROWS * one_block + ROWS * head * TARGET // tokens
    assert cached.build_flops == 10 * forward_only
    assert cached.run_flops == 10 * (3 * (one_block + head) + forward_only)
    assert frozen.run_flops == 10 * 3 * (forward_only + one_block + head)

    assert full.weight_bytes + full.gradient_bytes + full.optimizer_bytes == 16 * everything
    assert frozen.weight_bytes == 4 * everything  # fp32 both
    assert cached.weight_bytes == 4 * (block + D + table)  # embeddings and prefix released, the head is its own
    assert frozen.optimizer_bytes == 8 * frozen.trainable_parameters
    assert frozen.gradient_bytes == 4 * frozen.trainable_parameters
    assert cached.cache_bytes == 10 * tokens * D * 4
    assert full.logit_bytes == 4 * VOCAB * ROWS * tokens
    assert cached.supervised_logit_bytes == 4 * VOCAB * ROWS * TARGET


def test_lora_adds_two_thin_layers_beside_each_linear_layer() -> None:
    made = small_forecast(llama(num_hidden_layers=1), FreezePlan(decoder_blocks=0), lora_rank=4).modes["lora"]
    tokens, kv = SOURCE + TARGET, D // HEADS * KV_HEADS
    base = 4 * (2 * D * D + 2 * D * kv + 3 * D * FF) - 2 * (D * D + 2 * D * kv)  # q, k, v of block 0: no input gradient
    thin = 6 * 4 * (2 * (D + D) + 2 * (D + kv) + 3 * (D + FF)) - 2 * 4 * 3 * D
    head = 4 * VOCAB * D  # frozen: forward and input gradient
    assert made.step_flops == ROWS * (tokens * (base + thin + head) + 3 * 4 * tokens**2 * D)


@pytest.mark.parametrize("depth", [2, 6, 7])
def test_blocks_follow_the_cost_model_6p_6p_minus_4fp_and_6p_of_the_rest(depth: int) -> None:
    # Next to no scores and no head: two tokens and a vocabulary of 4 beside a width of 512.
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 4}
    with torch.device("meta"):
        model = llama(**sizes)
    made = forecast(model, FreezePlan(decoder_blocks=depth), batch_size=1, source_tokens=1, target_tokens=1, rows=1)
    p = 2 * sum(parameter.numel() for parameter in model.model.layers.parameters())  # of two tokens
    f = depth / 8
    assert made.modes["full"].step_flops == pytest.approx(6 * p, rel=0.005)
    assert made.modes["frozen"].step_flops == pytest.approx(6 * p - 4 * f * p, rel=0.005)
    assert made.modes["cached"].step_flops == pytest.approx(6 * p * (1 - f), rel=0.005)
    assert made.modes["cached"].build_flops == pytest.approx(2 * f * p, rel=0.005)


def test_a_gpt_block_keeps_the_34_bytes_of_korthikanti_less_the_dropout_masks() -> None:
    # Their GPT: fp16, MLP of 4 widths, GELU with a kernel of its own; scores not kept. Norms in fp32 are ours: 2 x 2;
    # and so is what these keep a token, two numbers in fp32, and their weights.
    def model(blocks: int) -> GPT2LMHeadModel:
        with torch.device("meta"):
            return gpt2(n_layer=blocks, activation_function="gelu", attn_implementation="sdpa")

    bytes_of = [
        small_forecast(model(n), FreezePlan(decoder_blocks=1), dtype="float16").modes["full"].activation_bytes
        for n in (2, 3)
    ]
    expected = (34 - 2 + 2 * 2) * D * ROWS * (SOURCE + TARGET)
    assert expected <= bytes_of[1] - bytes_of[0] < 1.02 * expected


def test_a_tie_is_counted_once_and_a_tied_embedding_is_not_released() -> None:
    model = gpt2()
    made = small_forecast(model, FreezePlan(decoder_blocks=3))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert made.modes["full"].trainable_parameters == total
    positions = model.transformer.wpe.weight.numel()
    prefix = sum(parameter.numel() for parameter in model.transformer.h[:3].parameters())
    released = made.modes["frozen"].weight_bytes - made.modes["cached"].weight_bytes
    assert released == 4 * (prefix + positions)  # wte stays: it is the head
    assert made.modes["frozen"].head_flops == ROWS * (SOURCE + TARGET) * 4 * VOCAB * D  # no weight gradient


def test_an_untied_head_is_a_tensor_of_its_own_and_lets_the_embedding_go() -> None:
    tied, untied = (small_forecast(gpt2(), FreezePlan(tied_head=how)).modes for how in ("freeze", "untie"))
    table = VOCAB * D
    assert untied["frozen"].trainable_parameters == tied["frozen"].trainable_parameters + table
    assert untied["frozen"].weight_bytes == tied["frozen"].weight_bytes + 4 * table
    assert untied["cached"].weight_bytes == tied["cached"].weight_bytes  # one head, and no embedding
    assert untied["frozen"].head_flops == tied["frozen"].head_flops * 6 // 4


def test_bfloat16_halves_frozen_weights_and_the_cache_but_not_what_trains() -> None:
    single, half = (small_forecast(llama(), dtype=name).modes for name in ("float32", torch.bfloat16))
    assert half["full"].weight_bytes == single["full"].weight_bytes
    frozen = half["full"].trainable_parameters - half["frozen"].trainable_parameters
    assert single["frozen"].weight_bytes - half["frozen"].weight_bytes == 2 * frozen
    assert single["cached"].cache_bytes == 2 * half["cached"].cache_bytes
    assert half["full"].logit_bytes == single["full"].logit_bytes


# ------------------------------------------------------------------------------------------- against torch's own count

GRADIENT_REACHES_LOW = [
    ("llama, half", llama, FreezePlan()),
    ("llama, embeddings train", llama, FreezePlan(embeddings=False)),
    ("llama, norms of frozen blocks train", llama, FreezePlan(decoder_blocks=3, train=(".*norm",))),
    ("llama, only the MLP of block 1 and up", llama, FreezePlan(decoder_blocks=2, train=(r"layers\.1\.mlp",))),
    ("gpt2, half", gpt2, FreezePlan()),
    ("gpt2, head and embedding train", gpt2, FreezePlan(decoder_blocks=3, tied_head="train")),
    ("bart, half and half", bart, FreezePlan()),
    ("bart, whole encoder", bart, FreezePlan(encoder_blocks="all", decoder_blocks=2)),
    ("bart, decoder frozen above a training encoder", bart, FreezePlan(encoder_blocks=1, decoder_blocks=3)),
    ("t5, half and half", t5, FreezePlan()),
    ("t5 gated, whole encoder", lambda: t5(feed_forward_proj="gated-gelu"), FreezePlan(encoder_blocks="all")),
    ("bert, half", bert, FreezePlan()),
    ("mixtral, half", mixtral, FreezePlan()),
]


def test_frozen_weights_and_the_cache_may_be_of_another_dtype_than_activations() -> None:
    """Autocast leaves both in fp32: then only what is computed above the cut takes less."""
    dtypes = [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "frozen_dtype": "float32"}, {"dtype": "float32"}]
    half, mixed, single = (small_forecast(llama(), FreezePlan(decoder_blocks=1), **given).modes for given in dtypes)
    assert mixed["cached"].cache_bytes == single["cached"].cache_bytes == 2 * half["cached"].cache_bytes
    assert mixed["frozen"].weight_bytes == single["frozen"].weight_bytes > half["frozen"].weight_bytes
    assert mixed["frozen"].activation_bytes == half["frozen"].activation_bytes < single["frozen"].activation_bytes


@pytest.mark.parametrize(
    ("make", "plan"), [case[1:] for case in GRADIENT_REACHES_LOW], ids=[case[0] for case in GRADIENT_REACHES_LOW]
)
def test_flops_and_saved_activations_are_what_a_real_step_takes(make: Any, plan: FreezePlan) -> None:
    torch.manual_seed(0)
    model = make()
    made = small_forecast(model, plan).modes
    full_flops, full_bytes = measure(model)
    freeze(model, plan)
    frozen_flops, frozen_bytes = measure(model)
    assert made["full"].step_flops == pytest.approx(full_flops, rel=0.002)
    assert made["frozen"].step_flops == pytest.approx(frozen_flops, rel=0.002)
    within = 0.06 if make is mixtral else 0.02  # a loop over experts keeps indices besides
    assert made["full"].activation_bytes == pytest.approx(full_bytes, rel=within)
    assert made["frozen"].activation_bytes == pytest.approx(frozen_bytes, rel=within)


@pytest.mark.parametrize("make", [llama, gpt2, bart])
def test_sdpa_keeps_no_scores_and_the_forecast_knows(make: Any) -> None:
    torch.manual_seed(0)
    model = make(attn_implementation="sdpa")
    made = small_forecast(model).modes
    assert made["full"].activation_bytes == pytest.approx(measure(model)[1], rel=0.1)
    assert made["full"].activation_bytes < measure(make())[1]


@pytest.mark.parametrize("make", [llama, gpt2, bart, t5])
def test_lora_costs_what_peft_costs(make: Any) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    made = small_forecast(make(), lora_rank=8).modes["lora"]
    adapted = get_peft_model(make(), LoraConfig(r=8, target_modules="all-linear"))
    flops, kept = measure(adapted)
    assert made.trainable_parameters == adapted.get_nb_trainable_parameters()[0]
    assert made.step_flops == pytest.approx(flops, rel=0.002)
    assert made.activation_bytes == pytest.approx(kept, rel=0.1)


def test_the_build_is_the_prefix_forward_pass_that_torch_counts() -> None:
    model = llama().eval()
    made = small_forecast(model, FreezePlan(decoder_blocks=3), rows=ROWS).modes["cached"]

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    handle = model.model.layers[3].register_forward_pre_hook(stop)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), pytest.raises(Stop):
        model(**batch_of(model))
    handle.remove()
    assert made.build_flops == counter.get_total_flops()


# -------------------------------------------------------------------------------------------------- which plan saves


def test_trainable_embeddings_leave_hardly_any_saving() -> None:
    deep = {"decoder_blocks": 3}
    closed, open_ = (small_forecast(llama(), FreezePlan(embeddings=e, **deep)) for e in (True, False))
    full = open_.modes["full"]
    assert closed.modes["frozen"].activation_bytes < 0.4 * full.activation_bytes
    assert open_.modes["frozen"].activation_bytes > 0.75 * full.activation_bytes
    assert closed.modes["frozen"].share_of_full < 0.6 < open_.modes["frozen"].share_of_full
    assert open_.modes["cached"] == open_.modes["frozen"]


def test_half_and_half_is_shown_beside_the_whole_encoder_and_costs_far_more() -> None:
    with torch.device("meta"):
        model = BartForConditionalGeneration(BartConfig(encoder_layers=6, decoder_layers=6, d_model=768))
    made = forecast(model, FreezePlan(), source_tokens=128, target_tokens=16)
    assert made.whole_encoder is not None
    half, whole = made.modes["cached"], made.whole_encoder.modes["cached"]
    assert half.share_of_full > 3 * whole.share_of_full
    assert made.whole_encoder.plan == FreezePlan(encoder_blocks="all", decoder_blocks=0.5)
    asked = forecast(model, made.whole_encoder.plan, source_tokens=128, target_tokens=16)
    assert asked.modes == made.whole_encoder.modes
    assert asked.whole_encoder is None
    # The encoder's output and the decoder's states at its cut.
    assert asked.modes["cached"].cache_bytes == 1000 * (128 + 16) * 768 * 2
    assert half.cache_bytes == 1000 * 128 * 768 * 2
    assert "frozen *" in str(made)
    assert "cached *" not in str(asked)


def test_the_whole_encoder_is_no_advice_where_the_tied_embedding_trains() -> None:
    assert small_forecast(bart(), FreezePlan(tied_head="train")).whole_encoder is None


def test_a_shared_embedding_is_released_only_where_every_stack_is_cut_and_no_head_is_tied_to_it() -> None:
    model = t5()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    encoder, decoder = model.encoder.block, model.decoder.block

    def released(plan: FreezePlan) -> int:
        modes = small_forecast(model, plan).modes
        return (modes["frozen"].weight_bytes - modes["cached"].weight_bytes) // 4

    def size(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    half = FreezePlan(encoder_blocks=2, decoder_blocks=2)
    assert released(half) == size(encoder[:2])
    whole = FreezePlan(encoder_blocks="all", decoder_blocks=2)
    norm = D
    assert released(whole) == size(encoder) + norm + size(decoder[:2]) + VOCAB * D
    tied = small_forecast(t5(), whole).modes
    assert (tied["frozen"].weight_bytes - tied["cached"].weight_bytes) // 4 == released(whole) - VOCAB * D


def test_cached_is_frozen_where_nothing_can_be_cut() -> None:
    made = small_forecast(llama(), FreezePlan(frozen_mode="train"))
    assert made.modes["cached"] == made.modes["frozen"]
    assert not made.cache_pays
    assert made.why.startswith("Nothing to cut: frozen_mode='train'")


def test_a_cache_does_not_pay_for_one_epoch_and_pays_for_three() -> None:
    once, thrice = (small_forecast(llama(), FreezePlan(decoder_blocks=3), epochs=n) for n in (1, 3))
    assert once.modes["cached"].run_flops == once.modes["frozen"].run_flops
    assert not once.cache_pays
    assert once.why.startswith("One epoch: ")
    assert thrice.cache_pays
    assert "fewer FLOPs over 3 epochs" in thrice.why


def test_a_cache_does_not_pay_where_little_is_frozen() -> None:
    made = small_forecast(llama(num_hidden_layers=40), FreezePlan(decoder_blocks=1))
    assert not made.cache_pays
    assert made.why.startswith("Little is frozen: 1.0")


def test_what_the_user_froze_before_stays_frozen_in_the_plan_and_trains_in_full() -> None:
    model = llama()
    before = small_forecast(model).modes
    model.lm_head.weight.requires_grad_(False)
    after = small_forecast(model).modes
    assert after["frozen"].trainable_parameters == before["frozen"].trainable_parameters - VOCAB * D
    assert after["frozen"].head_flops == before["frozen"].head_flops * 4 // 6
    assert after["full"] == before["full"]


def test_a_peft_model_trains_its_upper_adapters_and_gets_no_adapters_on_adapters() -> None:
    from peft import LoraConfig, get_peft_model

    plain = small_forecast(llama(), lora_rank=8).modes["lora"]
    model = get_peft_model(llama(), LoraConfig(r=8, target_modules="all-linear"))
    made = small_forecast(model, lora_rank=8).modes
    assert made["frozen"].trainable_parameters == plain.trainable_parameters // 2
    assert made["lora"].trainable_parameters == plain.trainable_parameters


# ------------------------------------------------------------------------------------------------- what it is run on


def test_a_llama_of_70b_on_the_meta_device_is_forecast_without_a_weight() -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    made = forecast(model, FreezePlan(decoder_blocks=64))
    assert made.modes["full"].trainable_parameters == 70_553_706_496
    assert made.modes["full"].optimizer_bytes == 8 * 70_553_706_496
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any("could not be run" in note for note in made.notes)
    assert made.cache_pays


@pytest.mark.parametrize("make", [llama, t5])
def test_the_meta_device_changes_no_figure(make: Any) -> None:
    with torch.device("meta"):
        empty = make()
    assert small_forecast(empty) == small_forecast(make())


def test_nothing_in_the_model_is_changed() -> None:
    model = bart(dropout=0.1).train()
    model.model.encoder.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    generator = torch.random.get_rng_state()
    small_forecast(model)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layerdrop_does_not_hide_a_block() -> None:
    dropped = small_forecast(bart(encoder_layerdrop=0.5, decoder_layerdrop=0.5).train())
    assert dropped == small_forecast(bart())


def test_only_the_experts_that_a_token_meets_count_in_flops_and_all_in_memory() -> None:
    two, all_ = (small_forecast(mixtral(num_experts_per_tok=n)) for n in (2, 8))
    experts = 8 * 3 * D * FF
    tokens = ROWS * (SOURCE + TARGET)
    more = all_.modes["full"].step_flops - two.modes["full"].step_flops
    assert more == BLOCKS * 6 * tokens * experts * (8 - 2) // 8
    assert two.modes["full"].trainable_parameters == all_.modes["full"].trainable_parameters
    assert "Experts: the FLOPs count those that a token meets, memory counts all." in two.notes


def test_as_many_blocks_as_experts_are_no_experts() -> None:
    made = small_forecast(mixtral(num_local_experts=BLOCKS))
    blocks = {n: p.numel() for n, p in mixtral(num_local_experts=BLOCKS).named_parameters() if "layers" in n}
    met = sum(size // 2 if "experts" in name else size for name, size in blocks.items() if "norm" not in name)
    tokens = SOURCE + TARGET
    scores = BLOCKS * 3 * 4 * tokens**2 * D
    assert made.modes["full"].step_flops == ROWS * (6 * tokens * (met + VOCAB * D) + scores)


def test_experts_that_ask_for_values_cannot_be_run_without_them_and_count_whole_and_it_is_said() -> None:
    sizes = {"d_model": D, "d_ff": FF, "d_kv": 16, "num_heads": HEADS, "num_layers": 2, "num_sparse_encoder_layers": 2}
    switch = SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**sizes, num_decoder_layers=2, num_experts=8, vocab_size=VOCAB)
    )
    made = small_forecast(switch)
    assert any("could not be run on the meta device (" in note and "all experts too" in note for note in made.notes)
    matrices = {n: p.numel() for n, p in switch.named_parameters() if "block" in n and p.dim() > 1 and "bias" not in n}
    decoder = sum(size for name, size in matrices.items() if name.startswith("decoder"))
    tokens = SOURCE * (sum(matrices.values()) - decoder) + TARGET * (decoder + VOCAB * D)
    assert made.modes["full"].step_flops == ROWS * 6 * tokens
    assert made.modes["cached"].step_flops < made.modes["frozen"].step_flops < made.modes["full"].step_flops
    assert made.modes["frozen"].activation_bytes < made.modes["full"].activation_bytes
    assert made.modes["cached"].cache_bytes == 1000 * SOURCE * D * 4


def test_an_encoder_only_model_reads_the_source_alone() -> None:
    made = small_forecast(bert())
    tokens = SOURCE
    matrices = 4 * D * D + 2 * D * FF
    head = D * D + VOCAB * D
    expected = BLOCKS * (6 * matrices * tokens + 12 * tokens**2 * D) + 6 * head * tokens
    assert made.modes["full"].step_flops == ROWS * expected
    assert any(note.startswith("Encoder-only") for note in made.notes)
    assert small_forecast(bert(), target_tokens=99).modes == made.modes


def test_blocks_without_attention_say_that_their_scan_is_not_counted() -> None:
    model = MambaForCausalLM(MambaConfig(hidden_size=D, num_hidden_layers=2, vocab_size=VOCAB, state_size=8))
    made = small_forecast(model)
    assert any("state-space scan" in note for note in made.notes)
    assert made.modes["cached"].step_flops < made.modes["frozen"].step_flops < made.modes["full"].step_flops


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma3n_text"])  # upper blocks that read lower ones' keys
def test_blocks_may_differ_and_may_need_one_another(model_type: str) -> None:
    made = small_forecast(build(model_type))
    assert made.modes["cached"].step_flops < made.modes["frozen"].step_flops < made.modes["full"].step_flops
    assert not any("could not be run" in note for note in made.notes)


def test_a_loop_over_tokens_is_given_up_before_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_freeze.costs.MOST_CALLS", 100)
    made = small_forecast(llama())
    assert any("more than 100 calls of torch, as a loop over tokens makes" in note for note in made.notes)


def test_an_image_model_is_run_on_as_many_tokens_as_are_asked_for() -> None:
    sizes = {"hidden_size": D, "intermediate_size": FF, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS}
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **sizes))
    made = {tokens: small_forecast(model, FreezePlan(encoder_blocks=3), source_tokens=tokens) for tokens in (5, 20)}
    block = 2 * (4 * D * D + 2 * D * FF)
    patches = 2 * 4 * D * 3 * 8 * 8  # of the image itself, whatever is asked for
    for tokens, one in made.items():
        built = patches + 3 * (tokens * block + 4 * tokens**2 * D)
        assert one.modes["cached"].build_flops == 1000 * built
        assert one.modes["cached"].cache_bytes == 1000 * tokens * D * 4
        assert one.modes["frozen"].step_flops == ROWS * built + one.modes["cached"].step_flops


def test_what_accelerate_put_on_a_model_is_not_run() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Refuses(ModelHook):  # type: ignore[misc]  # accelerate has no types
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("brings weights in")

    model = llama()
    expected = small_forecast(model)
    add_hook_to_module(model.model.layers[3].mlp, Refuses())
    assert small_forecast(model) == expected


class Feature(nn.Module):
    """A block of a model without a config: attention by name, and a norm with statistics."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.attention = SomeAttention()
        self.norm = norm(24)
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        mixed = states + self.attention(states)
        normed = self.norm(mixed.flatten(0, 1)).view_as(mixed)
        return mixed + self.down(torch.relu(self.up(normed)))


class SomeAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(24, 24)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.mix(states)


class Plain(nn.Module):
    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 24)
        self.blocks = nn.ModuleList(Feature(norm) for _ in range(4))
        self.head = nn.Linear(24, 10)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states = self.embed(input_ids)
        for block in self.blocks:
            states = block(states)
        return self.head(states)


def test_a_model_without_a_config_is_run_too() -> None:
    made = small_forecast(Plain(), FreezePlan(decoder_blocks=2), blocks="blocks", rows=10)
    tokens = SOURCE + TARGET
    assert made.modes["cached"].cache_bytes == 10 * tokens * 24 * 4
    assert made.modes["full"].step_flops == ROWS * tokens * 6 * (4 * (24 * 24 + 2 * 24 * 48) + 24 * 10)
    assert made.notes == ()


def test_batch_statistics_are_not_moved_by_looking() -> None:
    model = Plain(nn.BatchNorm1d).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = small_forecast(model, FreezePlan(decoder_blocks=2), blocks="blocks")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("could not be run" in note for note in made.notes)


def test_a_model_that_cannot_be_run_is_counted_by_its_shapes_and_it_is_said() -> None:
    class Stubborn(Plain):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("not today")

    made, other = (small_forecast(m, FreezePlan(decoder_blocks=2), blocks="blocks") for m in (Stubborn(), Plain()))
    assert any("could not be run on the meta device (RuntimeError: not today)" in note for note in made.notes)
    assert any("attention scores are left out" in note for note in made.notes)

    runs: list[torch.device] = []

    class Moody(Plain):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            runs.append(input_ids.device)
            if runs.count(torch.device("meta")) > 1:
                raise RuntimeError("not twice")
            return super().forward(input_ids)

    assert small_forecast(Moody(), FreezePlan(decoder_blocks=2), blocks="blocks").modes == made.modes, "all by shapes"
    for name in ("full", "frozen", "cached"):
        assert made.modes[name].step_flops == other.modes[name].step_flops
        assert made.modes[name].logit_bytes == other.modes[name].logit_bytes
        assert made.modes[name].cache_bytes == other.modes[name].cache_bytes


# ------------------------------------------------------------------------------------------------- values and errors


def test_defaults_are_the_plan_of_freeze_and_may_be_left_out() -> None:
    model = llama()
    assert forecast(model) == forecast(model, FreezePlan())
    assert forecast(model, None, batch_size=8, source_tokens=512, target_tokens=64, epochs=3) == forecast(model)
    assert forecast(model, dtype="bf16") == forecast(model, dtype=torch.bfloat16) == forecast(model)


def test_a_step_grows_with_the_batch_and_a_run_with_rows_and_epochs() -> None:
    model = llama()
    one, two = (small_forecast(model, batch_size=n).modes["frozen"] for n in (1, 2))
    assert (two.step_flops, two.activation_bytes) == (2 * one.step_flops, 2 * one.activation_bytes)
    assert two.run_flops == one.run_flops
    short, long = (small_forecast(model, rows=100, epochs=n).modes["frozen"] for n in (1, 5))
    assert long.run_flops == 5 * short.run_flops


def test_the_table_holds_every_mode_and_renders_three_ways() -> None:
    made = small_forecast(llama(), FreezePlan(decoder_blocks=3))
    assert [row[0] for row in made.table.rows] == ["full", "frozen", "cached", "lora"]
    text = str(made)
    assert "LlamaForCausalLM: forecast" in text
    assert f"Cache pays: {made.why}" in text
    assert "Logits only at the target positions" in text
    assert max(map(len, text.splitlines())) <= 118
    assert made.to_markdown().count("\n| ") == 5
    values = json.loads(json.dumps(made.to_dict()))
    assert values["modes"]["cached"]["step_flops"] == made.modes["cached"].step_flops
    assert FreezePlan.from_dict(values["plan"]) == made.plan
    assert values["cache_pays"] is True


def test_memory_is_the_sum_of_its_four_parts() -> None:
    for mode in small_forecast(bart()).modes.values():
        parts = mode.weight_bytes + mode.gradient_bytes + mode.optimizer_bytes + mode.activation_bytes
        assert mode.memory_bytes == parts


def test_the_table_of_a_70b_model_has_one_line_a_mode() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64))
    made = forecast(model)
    rows = [line.split()[0] for line in str(made).splitlines() if line.rstrip().endswith("B") and " % " in line]
    assert rows == list(made.modes)


@pytest.mark.parametrize("name", ["batch_size", "source_tokens", "target_tokens", "epochs", "rows", "lora_rank"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_a_number_below_one_is_refused(name: str, value: Any) -> None:
    with pytest.raises(FreezeError, match=f"forecast was asked for {name}={value!r}; it is a whole number"):
        forecast(llama(), **{name: value})


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(FreezeError, match="dtype='int8'; it knows 'float32', 'bfloat16', 'float16'"):
        forecast(llama(), dtype="int8")
    with pytest.raises(FreezeError, match="frozen_dtype='int4'; it knows 'float32'"):
        forecast(llama(), frozen_dtype="int4")


def test_a_plan_of_another_kind_is_refused() -> None:
    with pytest.raises(PlanError, match="forecast was given a dict as plan; it takes a FreezePlan"):
        forecast(llama(), {"decoder_blocks": 3})  # type: ignore[arg-type]


def test_a_plan_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PlanError, match="asks for 9 decoder blocks; LlamaForCausalLM has 4"):
        forecast(llama(), FreezePlan(decoder_blocks=9))
