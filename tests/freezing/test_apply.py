"""What is frozen stays motionless, thaw is the exact inverse, an untied head stays untied."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_freeze import FreezePlan, freeze, read_anatomy, thaw, verify_frozen
from hf_freeze.errors import FreezeError, FrozenWeightsChanged, PlanError
from tests.depth.sweep import language_loss
from tests.freezing.models import FAMILIES, copies, names_frozen, train
from tests.zoo import build

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


def test_a_freeze_whose_warning_is_an_error_is_whole_all_the_same() -> None:
    model = build("llama")
    freeze(model, FreezePlan(embeddings=False, decoder_blocks=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"An earlier freeze\(\) stays"):
            freeze(model, FreezePlan(decoder_blocks=2))
    model.train()
    assert not model.get_input_embeddings().training
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    with pytest.raises(FrozenWeightsChanged, match="embed_tokens"):
        verify_frozen(model)
    thaw(model)
    assert names_frozen(model) == set()


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
