from __future__ import annotations

import contextlib
import copy
import io
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_freeze import FreezePlan, freeze, read_anatomy, thaw, verify_frozen
from hf_freeze.errors import FreezeError, FrozenWeightsChanged, PlanError
from hf_freeze.tensors import tensor_digest
from tests.depth.sweep import language_loss, training_batch
from tests.zoo import build

FAMILIES = ["gpt2", "llama", "bart", "t5"]


def names_frozen(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def train(model: nn.Module, steps: int = 2, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        language_loss(model).backward()
        optimizer.step()


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


# ---------------------------------------------------------------------------------------- frozen, and motionless too


def test_gradients_and_momentum_from_before_do_not_move_a_frozen_tensor() -> None:
    model = build("gpt2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    train(model, 2, optimizer)
    language_loss(model).backward()  # gradients are left over, momentum is there
    before = copies(model)
    report = freeze(model, FreezePlan(decoder_blocks=3), optimizer=optimizer)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(p.grad is None and p not in optimizer.state for p in frozen)
    assert all(p in optimizer.state for p in model.parameters() if p.requires_grad)
    optimizer.step()
    train(model, 2, optimizer)
    now = copies(model)
    assert all(torch.equal(now[name], before[name]) for name in report.frozen_names)
    assert all(not torch.equal(now[name], before[name]) for name in report.trainable_names)


def test_without_the_optimizer_a_leftover_gradient_alone_is_still_dropped() -> None:
    model = build("llama")
    language_loss(model).backward()
    freeze(model)
    assert all((p.grad is None) is (not p.requires_grad) for p in model.parameters())


def test_an_optimizer_that_cannot_hold_the_clone_is_refused_before_anything_changes() -> None:
    model = build("gpt2")
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(PlanError, match=r"unties 'lm_head\.weight'; its clone is a new tensor.*before the optimizer"):
        freeze(model, FreezePlan(tied_head="untie"), optimizer=optimizer)
    assert names_frozen(model) == set()
    assert model.lm_head.weight is model.transformer.wte.weight


def test_parameters_are_told_apart_by_identity_not_by_value() -> None:
    model = build("gpt2")
    assert torch.equal(model.transformer.h[0].ln_1.bias, model.transformer.h[3].ln_1.bias)  # both zero
    freeze(model, FreezePlan(decoder_blocks=1))
    assert not model.transformer.h[0].ln_1.bias.requires_grad
    assert model.transformer.h[3].ln_1.bias.requires_grad


def test_a_fraction_is_a_depth_not_a_share_of_parameters() -> None:
    for model_type, blocks in (("gpt2", {"decoder": 1}), ("bart", {"encoder": 1, "decoder": 1})):
        plan = FreezePlan(**{f"{stack}_blocks": 0.31 for stack in blocks})
        assert freeze(build(model_type), plan).resolved.blocks == blocks


def test_barts_decoder_is_frozen_although_its_encoder_holds_the_first_module_list() -> None:
    model = build("bart")
    report = freeze(model, FreezePlan(embeddings=False, encoder_blocks=0, decoder_blocks=1))
    assert {".".join(name.split(".")[:4]) for name in report.frozen_names} == {"model.decoder.layers.0"}


def test_freezing_again_changes_nothing() -> None:
    model = build("bart")
    plan = FreezePlan(encoder_blocks="all", tied_head="untie")
    first = freeze(model, plan)
    state, flags = copies(model), names_frozen(model)
    modes = [module.training for module in model.modules()]
    second = freeze(model, plan)
    assert names_frozen(model) == flags
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert (second.digests, second.held, second.dropouts) == (first.digests, first.held, first.dropouts)
    assert second.frozen_before == ()


def test_a_second_plan_only_freezes_more() -> None:
    model = build("llama")
    freeze(model, FreezePlan(decoder_blocks=3))
    before = names_frozen(model)
    report = freeze(model, FreezePlan(decoder_blocks=1))
    assert names_frozen(model) == before
    assert "model.layers.2.mlp.up_proj.weight" in report.frozen_before
    assert report.lowest_trainable == ("decoder", 3)


def test_a_plan_that_does_not_fit_changes_nothing() -> None:
    model = build("gpt2").train()
    with pytest.raises(PlanError, match="has 4"):
        freeze(model, FreezePlan(decoder_blocks=9))
    assert names_frozen(model) == set()
    assert all(module.training for module in model.modules())
    with pytest.raises(PlanError, match=r"freeze was given a dict as plan; it takes a FreezePlan"):
        freeze(model, {"decoder_blocks": 1})  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- an earlier freeze


def test_what_the_user_froze_stays_frozen_through_freeze_and_thaw() -> None:
    model = build("llama")
    mine = "model.layers.3.mlp.up_proj.weight"
    model.get_parameter(mine).requires_grad_(False)
    report = freeze(model)
    assert report.frozen_before == (mine,)
    assert "1 tensors were frozen before and stay so" in str(report)
    thaw(model)
    assert names_frozen(model) == {mine}


def test_what_peft_froze_stays_frozen_and_its_adapters_above_the_prefix_train() -> None:
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], r=2))
    before = names_frozen(model)
    report = freeze(model)
    assert before < names_frozen(model)
    assert {name.split(".")[4] for name in report.trainable_names} == {"2", "3"}
    thaw(model)
    assert names_frozen(model) == before


def test_dropout_in_what_peft_froze_stays_on_in_blocks_that_train() -> None:
    model = get_peft_model(build("gpt2"), LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True))
    freeze(model)
    model.train()
    blocks = read_anatomy(model).decoder_blocks
    assert not any(module.training for module in blocks[1].modules[0].modules())
    assert all(module.training for module in blocks[2].modules[0].modules())


def test_wrapping_a_frozen_model_with_peft_keeps_the_proof_and_thaw_leaves_pefts_freeze() -> None:
    model = build("llama")
    report = freeze(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], r=2))
    assert verify_frozen(wrapped, report) == verify_frozen(wrapped)
    before = names_frozen(wrapped)
    assert thaw(wrapped) == ()
    assert names_frozen(wrapped) == before


# --------------------------------------------------------------------------------------------------------------- modes


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_train_leaves_frozen_blocks_in_eval_and_the_others_in_train_mode(model_type: str) -> None:
    model = build(model_type)
    report = freeze(model)
    model.train()
    for stack in read_anatomy(model).stacks:
        for block in stack.blocks:
            frozen = block.index < report.resolved.blocks[stack.name]
            assert {module.training for module in block.modules[0].modules()} == {not frozen}
    model.eval()
    assert not any(modes(model))


def test_eval_is_held_through_every_way_to_call_train() -> None:
    model = build("gpt2")
    freeze(model)
    model.train()
    expected = modes(model)
    assert expected.count(False) > 10
    assert model.transformer.h[0].train() is model.transformer.h[0]
    for call in (
        model.transformer.train,
        model.transformer.h.train,
        model.transformer.h[0].mlp.train,
        model.transformer.h[0].mlp.dropout.train,
        lambda: [module.train() for module in model.modules()],
        lambda: model.apply(lambda module: module.train(True)),
    ):
        call()
        assert modes(model) == expected


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)  # a whole model needs pickle; this file was written by the line itself
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_is_frozen_alike_and_independent(through: Any) -> None:
    model = build("bart")
    freeze(model)
    model.train()
    other = through(model)
    other.train()
    assert modes(other) == modes(model)
    assert names_frozen(other) == names_frozen(model)
    assert verify_frozen(other) == verify_frozen(model)
    thaw(other)
    other.train()
    assert all(modes(other))
    model.train()
    assert not all(modes(model))
    verify_frozen(model)


class Noisy(nn.Module):
    """A block with a batch norm, with a plain one that has no parameters, and with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.plain = nn.BatchNorm1d(4, affine=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = states + self.drop(self.plain(self.norm(self.mix(states))))
        return out


class Tower(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)
        self.layers = nn.ModuleList(Noisy() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = self.project(x)
        for layer in self.layers:
            states = layer(states)
        return states


def test_batch_norm_statistics_of_frozen_blocks_stand_still_and_the_others_move() -> None:
    torch.manual_seed(0)
    model = Tower()
    report = freeze(model)
    model.train()
    before = copies(model)
    model(torch.randn(8, 4)).sum().backward()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[1] for name in moved} == {"2", "3"}
    assert {"layers.2.norm.running_mean", "layers.3.plain.running_var"} <= moved
    verify_frozen(model, report)


def test_a_module_that_a_trained_block_shares_with_a_frozen_one_trains() -> None:
    model = Tower()
    for layer in model.layers:
        layer.drop = model.layers[0].drop
    freeze(model)
    model.train()
    assert model.layers[0].drop.training
    assert not model.layers[0].norm.training


def test_dropout_of_a_frozen_prefix_is_off_so_that_its_output_is_a_constant() -> None:
    for model_type in FAMILIES:
        model = build(model_type)
        freeze(model, FreezePlan(encoder_blocks="all") if model_type in ("bart", "t5") else None)
        model.train()
        anatomy = read_anatomy(model)
        for stack in anatomy.stacks[-1:]:
            seen: list[torch.Tensor] = []
            hook = lambda _, args, kwargs: seen.append((*args, *kwargs.values())[0].detach().clone())  # noqa: E731, B023
            handle = stack.blocks[2].modules[0].register_forward_pre_hook(hook, with_kwargs=True)
            for _ in range(2):
                language_loss(model)
            handle.remove()
            assert torch.equal(*seen), model_type


def test_barts_own_dropout_and_layer_drop_are_off_and_thaw_restores_them() -> None:
    model = build("bart", dropout=0.3, encoder_layerdrop=0.5, decoder_layerdrop=0.25)
    report = freeze(model, FreezePlan(decoder_blocks=1))
    assert report.dropouts == {
        ("model.encoder", "dropout"): 0.3,
        ("model.encoder", "layerdrop"): 0.5,
        ("model.decoder", "dropout"): 0.3,
        ("model.decoder", "layerdrop"): 0.25,
    }
    encoder, decoder = model.model.encoder, model.model.decoder
    assert (encoder.dropout, encoder.layerdrop, decoder.layerdrop) == (0, 0, 0)
    freeze(model, FreezePlan(decoder_blocks=2))
    thaw(model)
    assert (encoder.dropout, encoder.layerdrop, decoder.layerdrop) == (0.3, 0.5, 0.25)


def test_layer_drop_of_a_stack_without_a_frozen_block_stays_on() -> None:
    model = build("bart", encoder_layerdrop=0.5, decoder_layerdrop=0.25)
    freeze(model, FreezePlan(encoder_blocks=0, decoder_blocks=1))
    assert (model.model.encoder.layerdrop, model.model.decoder.layerdrop) == (0.5, 0)


def test_frozen_mode_train_leaves_dropout_on_and_releases_what_an_earlier_plan_held() -> None:
    model = build("bart", dropout=0.3)
    plain = build("bart", dropout=0.3).train()
    freeze(model)
    report = freeze(model, FreezePlan(frozen_mode="train"))
    model.train()
    assert modes(model) == modes(plain)
    assert (report.held, report.dropouts, model.model.encoder.dropout) == ((), {}, 0.3)
    verify_frozen(model)


# ---------------------------------------------------------------------------------------------------------------- thaw


@pytest.mark.parametrize("model_type", [*FAMILIES, "deepseek_v3", "zamba"])
@pytest.mark.parametrize("training", [True, False])
def test_thaw_is_the_exact_inverse(model_type: str, training: bool) -> None:
    def attributes(model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
        hidden = ("_parameters", "_buffers", "_modules")
        return [(n, {k: v for k, v in m.__dict__.items() if k not in hidden}) for n, m in model.named_modules()]

    model = build(model_type).train(training)
    before = [(name, dict(values)) for name, values in attributes(model)]
    flags, state = names_frozen(model), copies(model)
    report = freeze(model)
    assert set(thaw(model)) == set(report.frozen_names)
    assert attributes(model) == before
    assert names_frozen(model) == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_thaw_does_nothing_on_a_model_that_was_never_frozen() -> None:
    model = build("llama")
    model.model.norm.weight.requires_grad_(False)
    assert thaw(model) == ()
    assert names_frozen(model) == {"model.norm.weight"}


def test_a_thawed_model_trains_every_tensor() -> None:
    model = build("gpt2")
    freeze(model)
    thaw(model)
    before = copies(model)
    train(model.train(), 1)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---------------------------------------------------------------------------------------------------------- tied heads


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 19).reshape(2, 8)
    given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=ids, **given).logits
    return out


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_untied_head_stays_untied_through_save_and_load_with_the_same_logits(
    model_type: str, tmp_path: Path
) -> None:
    model = build(model_type, tie_word_embeddings=True)
    before = logits(model)
    freeze(model, FreezePlan(tied_head="untie"))
    head, tokens = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is not tokens
    assert head.requires_grad
    assert not tokens.requires_grad
    assert torch.equal(logits(model), before)
    train(model.train(), 2)
    assert not torch.equal(head, tokens)
    after = logits(model)
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    # the flag of BART and T5 ties their encoder's and decoder's embeddings too, which stay one tensor
    assert again.config.tie_word_embeddings is (model_type in ("bart", "t5"))
    assert again.get_output_embeddings().weight is not again.get_input_embeddings().weight
    assert torch.equal(logits(again), after)
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_tying_weights_again_does_not_tie_an_untied_head(model_type: str) -> None:
    model = build(model_type, tie_word_embeddings=True)
    freeze(model, FreezePlan(tied_head="untie"))
    model.tie_weights()
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    verify_frozen(model)


def test_a_head_that_is_not_untied_stays_tied_through_save_and_load(tmp_path: Path) -> None:
    model = build("gpt2")
    freeze(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight


# -------------------------------------------------------------------------------------------------------- verification


def test_training_leaves_the_proof_whole() -> None:
    model = build("bart").train()
    report = freeze(model)
    train(model, 3)
    proof = verify_frozen(model, report)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert proof.tensors >= len(frozen)
    assert proof.tensor_bytes >= sum(p.numel() * p.element_size() for p in frozen)
    assert str(proof) == f"{proof.tensors} frozen tensors, {proof.tensor_bytes:,} bytes: unchanged"


def flip_one_bit(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight.data.view(torch.int32)[0, 0] ^= 1


def move_a_router_bias(model: Any) -> None:
    next(b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")).add_(0.5)


def replace_a_module(model: Any) -> None:
    model.model.layers[0].mlp = nn.Identity()


def move_everything(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


@pytest.mark.parametrize(
    ("model_type", "blocks", "change", "message"),
    [
        ("llama", 2, flip_one_bit, r"; 1 moved: model\.layers\.1\.mlp\.down_proj\.weight\. Look for"),
        ("deepseek_v3", "all", move_a_router_bias, r"; 1 moved: \S*e_score_correction_bias\. Look for"),
        ("llama", 2, replace_a_module, r"; 3 gone \(replaced or renamed\): .*layers\.0\.mlp\.gate_proj\.weight"),
        ("gpt2", 3, move_everything, r"38 tensors should hold .*; 38 moved: .* and 18 more\. Look for an"),
        ("gpt2", 2, lambda model: model.to("meta"), r"; 26 without bits \(on the meta device.*\): transformer\.wte"),
    ],
)
def test_a_change_is_named(model_type: str, blocks: Any, change: Any, message: str) -> None:
    model = build(model_type)
    report = freeze(model, FreezePlan(decoder_blocks=blocks))
    change(model)
    for known in (report, None):
        with pytest.raises(FrozenWeightsChanged, match=message):
            verify_frozen(model, known)


def test_a_batch_norm_statistic_of_a_frozen_module_counts() -> None:
    for buffer in ("norm.running_mean", "plain.running_var", "norm.num_batches_tracked"):
        model = Tower()
        freeze(model)
        model.get_buffer(f"layers.0.{buffer}").add_(1)
        with pytest.raises(FrozenWeightsChanged, match=rf"layers\.0\.{buffer}"):
            verify_frozen(model)
        other = Tower()
        freeze(other)
        other.get_buffer(f"layers.3.{buffer}").add_(1)
        verify_frozen(other)


def test_an_embedding_replaced_by_a_resize_is_named_and_can_be_frozen_again() -> None:
    model = build("llama")
    report = freeze(model)
    model.resize_token_embeddings(80)
    name = r"model\.embed_tokens\.weight \(float32 \[64, 32\], now float32 \[80, 32\]"
    with pytest.raises(FrozenWeightsChanged, match=name):
        verify_frozen(model, report)
    with pytest.raises(FrozenWeightsChanged, match=r"model\.embed_tokens\.weight"):
        verify_frozen(model)
    again = freeze(model)
    assert not model.model.embed_tokens.weight.requires_grad
    assert verify_frozen(model, again).tensors == len(report.digests)


def test_a_tensor_made_trainable_again_is_told_apart_from_one_that_moved() -> None:
    model = build("llama")
    report = freeze(model)
    norm = model.model.layers[0].input_layernorm.weight
    norm.requires_grad_(True)
    again = r"; 1 trainable again: model\.layers\.0\.input_layernorm\.weight\. Look for what set"
    with pytest.raises(FrozenWeightsChanged, match=again):
        verify_frozen(model, report)
    with torch.no_grad():
        norm.add_(1)
        model.model.layers[0].mlp.up_proj.weight.add_(1)
    moved = r"2 moved: model\.layers\.0\.mlp\.up_proj\.weight, model\.layers\.0\.input_layernorm\.weight"
    with pytest.raises(FrozenWeightsChanged, match=rf"; {moved}; 1 trainable again: model\.layers\.0\.input_layernorm"):
        verify_frozen(model, report)


def test_a_change_of_dtype_is_named_and_freezing_again_takes_it() -> None:
    model = build("gpt2")
    freeze(model)
    model.to(torch.bfloat16)
    with pytest.raises(FrozenWeightsChanged, match=r"wte\.weight \(float32 \[64, 32\], now bfloat16 \[64, 32\]\)"):
        verify_frozen(model)
    freeze(model)
    verify_frozen(model)


def test_freezing_again_does_not_hide_that_a_tensor_moved() -> None:
    model = build("gpt2")
    freeze(model)
    model.transformer.wpe.weight.data.add_(1)
    freeze(model)
    with pytest.raises(FrozenWeightsChanged, match=r"transformer\.wpe\.weight"):
        verify_frozen(model)
    thaw(model)
    freeze(model)
    verify_frozen(model)


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("gloo")
def test_a_model_frozen_before_ddp_is_proved_and_thawed_through_it() -> None:
    model = build("gpt2")
    report = freeze(model)
    wrapped = nn.parallel.DistributedDataParallel(model).train()
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2, weight_decay=0.1)
    wrapped(**training_batch(model)).loss.backward()
    optimizer.step()
    assert verify_frozen(wrapped, report) == verify_frozen(wrapped)
    assert not model.transformer.h[0].training
    for change in (thaw, freeze):
        with pytest.raises(FreezeError, match=r"DistributedDataParallel has wrapped already.*\(model\.module\)"):
            change(wrapped)
    thaw(wrapped.module)
    assert names_frozen(model) == set()


def test_a_model_frozen_on_the_meta_device_has_nothing_to_prove_until_it_is_loaded() -> None:
    with torch.device("meta"):
        model = build("gpt2")
    report = freeze(model)
    assert report.lowest_trainable == ("decoder", 2)
    message = r"of whose 26 frozen tensors 26 were on the meta device .*wte\.weight.* Call freeze\(\) again"
    with pytest.raises(FreezeError, match=message):
        verify_frozen(model, report)
    model.load_state_dict(build("gpt2").state_dict(), assign=True)
    model.tie_weights()
    with pytest.raises(FreezeError, match=message):  # nobody knows what they held then
        verify_frozen(model)
    freeze(model)
    assert verify_frozen(model).tensors == len(names_frozen(model)) == 26


def test_tensors_without_bits_are_counted_and_named_and_no_proof_is_given_of_the_others() -> None:
    model = build("gpt2")
    model.transformer.h[1].to("meta")
    report = freeze(model)
    assert len(report.without_bits) == 12
    for known in (report, None):
        with pytest.raises(FreezeError, match=r"26 frozen tensors 12 were on the meta .*h\.1\.ln_1\.weight, .*prove"):
            verify_frozen(model, known)
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight.add_(1)
    with pytest.raises(FrozenWeightsChanged, match=r"1 moved: transformer\.h\.0\.ln_1\.weight"):
        verify_frozen(model, report)


def offload(model: nn.Module, how: str, folder: Path) -> Any:
    """The model as accelerate leaves it: the embeddings and the first two blocks, or all, away between forwards."""
    if how == "cpu_offload":
        return cpu_offload(model)
    if how == "disk_offload":
        return disk_offload(model, str(folder / "offloaded"))
    bottom, rest = ["model.embed_tokens", "model.layers.0", "model.layers.1"], ["model.layers.2", "model.layers.3"]
    places = dict.fromkeys(bottom, how) | dict.fromkeys([*rest, "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder / "offloaded"), force_hooks=True)


@pytest.mark.parametrize("when", ["before freeze", "after freeze"])
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "disk"])
def test_what_accelerate_has_offloaded_is_compared_where_it_lies(how: str, when: str, tmp_path: Path) -> None:
    model = build("llama", tie_word_embeddings=False)
    if when == "before freeze":
        offload(model, how, tmp_path)
        report = freeze(model)
    else:
        report = freeze(model)
        offload(model, how, tmp_path)
    assert report.without_bits == ()
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    for _ in range(2):
        assert verify_frozen(model, report) == verify_frozen(model)
        assert verify_frozen(model).tensors == len(names_frozen(model)) == len(report.frozen_names) > 0
        assert verify_frozen(model).tensor_bytes == 4 * report.frozen_parameters
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]))  # makes new parameters of what it brings in
    hook = model.model.layers[0].mlp.up_proj._hf_hook
    hook.weights_map = weights = {"weight": hook.weights_map["weight"].clone()}
    weights["weight"][0, 0] += 1
    with pytest.raises(FrozenWeightsChanged, match=r"; 1 moved: model\.layers\.0\.mlp\.up_proj\.weight\. Look"):
        verify_frozen(model, report)
    del weights["weight"]
    with pytest.raises(FrozenWeightsChanged, match=r"; 1 without bits .*: model\.layers\.0\.mlp\.up_proj\.weight\. L"):
        verify_frozen(model, report)


def test_a_model_that_was_never_frozen_is_an_error() -> None:
    with pytest.raises(FreezeError, match=r"a GPT2LMHeadModel that was never frozen\. Call freeze\(model, plan\)"):
        verify_frozen(build("gpt2"))


def test_partitioned_tensors_are_gathered_to_be_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's interface is played here: ZeRO-3 keeps a parameter elsewhere, and shows an empty one."""
    model = build("gpt2")
    report = freeze(model)
    elsewhere = {}
    for parameter in model.parameters():
        elsewhere[parameter] = parameter.data
        parameter.ds_id, parameter.ds_shape = len(elsewhere), parameter.shape
        parameter.data = parameter.data.new_empty(0)

    @contextlib.contextmanager
    def gathered(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
        for parameter in parameters:
            parameter.data = elsewhere[parameter]
        yield
        for parameter in parameters:
            parameter.data = parameter.data.new_empty(0)

    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    zero = types.ModuleType("deepspeed.zero")
    zero.GatheredParameters = gathered
    monkeypatch.setitem(sys.modules, "deepspeed.zero", zero)
    verify_frozen(model, report)
    elsewhere[model.transformer.wte.weight][0, 0] += 1
    with pytest.raises(FrozenWeightsChanged, match=r"transformer\.wte\.weight"):
        verify_frozen(model, report)


def test_a_report_survives_pickle_and_proves_by_name() -> None:
    model = build("gpt2")
    report = pickle.loads(pickle.dumps(freeze(model)))
    verify_frozen(model, report)
    model.transformer.wpe.weight.data.add_(1)
    with pytest.raises(FrozenWeightsChanged, match=r"transformer\.wpe\.weight"):
        verify_frozen(model, report)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]


@given(data=st.data(), dtype=st.sampled_from(DTYPES), shape=st.lists(st.integers(1, 5), max_size=3))
def test_any_flipped_bit_changes_the_digest(data: st.DataObject, dtype: torch.dtype, shape: list[int]) -> None:
    size = torch.empty((), dtype=dtype).element_size()
    count = torch.Size(shape).numel() * size
    raw = bytearray(data.draw(st.binary(min_size=count, max_size=count)))
    before = tensor_digest(torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape))
    assert before == tensor_digest(torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape))
    bit = data.draw(st.integers(0, 8 * count - 1))
    raw[bit // 8] ^= 1 << (bit % 8)
    assert tensor_digest(torch.frombuffer(raw, dtype=dtype).reshape(shape)) != before


def test_the_digest_is_of_the_values_not_of_their_layout() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    assert tensor_digest(tensor.t().contiguous().t()) == tensor_digest(tensor)
    assert tensor_digest(tensor.reshape(4, 3)) != tensor_digest(tensor)
    assert tensor_digest(tensor.view(torch.int32)) != tensor_digest(tensor)
    assert tensor_digest(torch.empty(0, 3)) != tensor_digest(torch.empty(3, 0))


class Pair(nn.Module):
    """A policy beside its reference, as preference training has them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.reference = copy.deepcopy(model)
        self.policy = model


def test_a_tensor_is_found_by_identity_where_names_are_not_unique() -> None:
    model = build("gpt2")
    report = freeze(model)
    pair = Pair(model)
    assert verify_frozen(pair, report).tensors == len(report.digests)
    pair.reference.transformer.wpe.weight.data.add_(1)
    verify_frozen(pair, report)
    model.transformer.wpe.weight.data.add_(1)
    with pytest.raises(FrozenWeightsChanged, match=r"; 1 moved: transformer\.wpe\.weight"):
        verify_frozen(pair, report)


def test_two_frozen_models_in_one_are_an_error_and_one_is_proved_under_any_wrapper() -> None:
    model = build("gpt2")
    freeze(model)
    pair = Pair(model)
    with pytest.raises(FreezeError, match=r"this Pair holds 2: GPT2LMHeadModel, GPT2LMHeadModel\. Pass one of them"):
        verify_frozen(pair)
    thaw(pair.reference)
    assert verify_frozen(pair) == verify_frozen(model)


# ------------------------------------------------------------------------------------------------ the slow, obvious way


@pytest.mark.parametrize("model_type", [*FAMILIES, "mixtral", "mamba", "jamba"])
@pytest.mark.parametrize(
    "plan", [FreezePlan(), FreezePlan(encoder_blocks="all", decoder_blocks=3)], ids=["half", "deep"]
)
def test_loss_and_gradients_are_those_of_the_full_model(model_type: str, plan: FreezePlan) -> None:
    if model_type not in ("bart", "t5"):
        plan = FreezePlan(decoder_blocks=plan.decoder_blocks)
    full, frozen = build(model_type).eval(), build(model_type).eval()  # without dropout; gradients flow all the same
    freeze(frozen, plan)
    losses = [language_loss(model) for model in (full, frozen)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)  # T5's position bias: attention of another kernel if frozen
    expected = {name: parameter.grad for name, parameter in full.named_parameters()}
    trained = {name: parameter.grad for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert len(trained) > 5
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


def test_freezing_again_after_peft_wrapped_the_frozen_model_is_refused() -> None:
    model = build("llama")
    freeze(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(FreezeError, match="inside it was frozen before it was wrapped"):
        freeze(wrapped)


def test_a_tied_head_that_was_frozen_before_is_not_said_to_train() -> None:
    model = build("gpt2")
    freeze(model, FreezePlan(decoder_blocks=2))
    again = freeze(model, FreezePlan(decoder_blocks=2, tied_head="train"))
    assert "but were frozen before and stay so: thaw(model) first" in " ".join(str(again).split())
    thaw(model)
    assert "both train (tied_head='train')." in str(freeze(model, FreezePlan(decoder_blocks=2, tied_head="train")))


def test_what_can_be_cached_names_embeddings_only_where_there_are_some() -> None:
    model = nn.Sequential(nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(4))), nn.Flatten())
    report = freeze(model, FreezePlan(encoder_blocks=2), blocks=model[0])
    assert "Can be cached: encoder blocks 0-1." in str(report)
    assert "Can be cached: decoder embeddings and block 0." in str(freeze(build("gpt2"), FreezePlan(decoder_blocks=1)))
