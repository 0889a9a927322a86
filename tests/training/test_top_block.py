"""The top block at few places trains as the whole one: the same loss, gradients and random numbers, or it is left."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from hf_freeze import FreezePlan, freeze
from hf_freeze.training.supervised import all_logits, supervised_logits_only, supervised_positions
from hf_freeze.training.top_block import reduce_top_block, whole_top_block
from tests.tiny import tiny_model
from tests.zoo import build


def batch_of(model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (4, 11), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.7, -100)
    mask = supervised_positions(labels)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "logits_to_keep": mask,
        "targets": labels[:, 1:][mask[:, :-1]],
    }


def step(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)
    inputs = {key: value for key, value in batch.items() if key != "targets"}
    loss = nn.functional.cross_entropy(model(**inputs).logits, batch["targets"])
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


TOKENWISE = {
    "llama": {"mlp", "self_attn.q_proj", "self_attn.o_proj"},
    "qwen2": {"mlp", "self_attn.q_proj", "self_attn.o_proj"},
    "gemma2": {"mlp", "self_attn.q_proj", "self_attn.o_proj"},
    "mixtral": {"self_attn.q_proj", "self_attn.o_proj"},  # its experts take [rows, tokens, width]
    "opt": {"self_attn.q_proj", "self_attn.out_proj"},
}


@pytest.mark.parametrize("kind", TOKENWISE)
@pytest.mark.parametrize("frozen", [False, True])
def test_loss_and_gradients_are_those_of_the_whole_block(kind: str, frozen: bool) -> None:
    model = build(kind).train()
    if frozen:
        freeze(model, FreezePlan(decoder_blocks=3))
    batch = batch_of(model)
    loss, gradients = step(model, batch)
    names = reduce_top_block(model)
    assert {name.partition(".3.")[2] for name in names} == TOKENWISE[kind]
    reduced_loss, reduced_gradients = step(model, batch)
    torch.testing.assert_close(reduced_loss, loss, rtol=1e-6, atol=0)
    assert len(gradients) == len(reduced_gradients)
    for ours, theirs in zip(reduced_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_modules_get_only_the_places_that_predict_a_label() -> None:
    model = tiny_model("llama").train()
    names = reduce_top_block(model)
    seen: dict[str, tuple[int, ...]] = {}
    batch = batch_of(model)
    for name in (*names, "model.layers.3.self_attn.k_proj", "model.layers.2.mlp"):
        module = model.get_submodule(name)
        original = module.forward
        module.forward = lambda x, name=name, original=original: seen.update({name: tuple(x.shape)}) or original(x)  # type: ignore[method-assign]
    step(model, batch)
    labelled = int(batch["logits_to_keep"].sum())
    assert 0 < labelled < 20
    assert all(seen[name] == (labelled, 32) for name in names)
    assert seen["model.layers.3.self_attn.k_proj"] == seen["model.layers.2.mlp"] == (4, 11, 32)


def test_evaluation_generation_and_calls_without_a_mask_are_whole() -> None:
    model = tiny_model("llama").train()
    batch = batch_of(model)
    plain = {"input_ids": batch["input_ids"]}
    wanted = model(**plain).logits
    assert reduce_top_block(model)
    step(model, batch)
    assert torch.equal(model(**plain).logits, wanted)
    assert torch.equal(model.model(**plain).last_hidden_state, tiny_model("llama").model(**plain).last_hidden_state)
    states = model(**plain, logits_to_keep=batch["logits_to_keep"], output_hidden_states=True).hidden_states[-1]
    assert torch.equal(states, tiny_model("llama")(**plain, output_hidden_states=True).hidden_states[-1])
    model.eval()
    kept = model(**plain, logits_to_keep=batch["logits_to_keep"]).logits
    torch.testing.assert_close(kept, wanted[batch["logits_to_keep"]])


def test_a_checkpointed_block_is_whole() -> None:
    model = build("llama").train()
    freeze(model, FreezePlan(decoder_blocks=3))
    batch = batch_of(model)
    loss, gradients = step(model, batch)
    assert reduce_top_block(model)
    model.activation_checkpointing_enable()
    reduced_loss, reduced_gradients = step(model, batch)
    assert torch.equal(reduced_loss, loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, reduced_gradients, strict=True))


@pytest.mark.parametrize("asked_by", ["config", "argument"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "olmoe"])
def test_a_loss_that_balances_experts_sees_every_token_when_it_is_asked_for_afterwards(
    kind: str, asked_by: str
) -> None:
    model = build(kind, router_aux_loss_coef=1.0).train()
    freeze(model, FreezePlan(decoder_blocks=3))
    batch = batch_of(model)
    batch["labels"] = batch["input_ids"].masked_fill(torch.rand(4, 11) < 0.7, -100)
    del batch["logits_to_keep"], batch["targets"]
    assert "of the top block too" in supervised_logits_only(model).reason
    model.config.output_router_logits = asked_by == "config"
    given = {} if asked_by == "config" else {"output_router_logits": True}

    def train() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        output = model(**batch, **given)
        assert output.aux_loss > 0
        output.loss.backward()
        return output.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, gradients = train()
    assert all_logits(model)
    plain_loss, plain = train()
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == plain.keys()
    assert any("gate" in name or "router" in name for name in plain)
    for name, gradient in gradients.items():
        assert (gradient - plain[name]).norm() <= 1e-5 * plain[name].norm() + 1e-8, name


def test_a_switch_in_the_text_config_of_a_larger_model_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").train()
    batch, text = batch_of(model), copy.copy(model.config)
    monkeypatch.setattr(type(model.config), "get_text_config", lambda *_, **__: text)
    assert reduce_top_block(model)
    rows: list[int] = []
    model.model.layers[3].mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
    for text.output_router_logits in (False, True):
        step(model, batch)
    model(batch["input_ids"], logits_to_keep=batch["logits_to_keep"], output_router_logits=False)
    assert rows[1] == batch["input_ids"].numel() > rows[0] == rows[2]


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_block_whose_dropout_would_draw_other_numbers_keeps_those_modules_whole(kind: str) -> None:
    dropouts = {"gpt2": {"resid_pdrop": 0.1, "attn_pdrop": 0.1}, "opt": {"dropout": 0.1}}[kind]
    model = build(kind, **dropouts).train()
    batch = batch_of(model)
    loss, gradients = step(model, batch)
    reduce_top_block(model)
    reduced_loss, reduced_gradients = step(model, batch)
    torch.testing.assert_close(reduced_loss, loss, rtol=1e-6, atol=0)
    for ours, theirs in zip(reduced_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


class Mixing(nn.Module):
    """A feed-forward part that looks a little at the token before."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.mlp(states + 0.02 * states.roll(1, dims=-2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_does_not_hide_a_module_that_mixes_tokens_a_little(dtype: torch.dtype) -> None:
    model: Any = build("llama").to(dtype).train()
    assert {name.partition(".3.")[2] for name in reduce_top_block(copy.deepcopy(model))} == TOKENWISE["llama"]
    model.model.layers[3].mlp = Mixing(model.model.layers[3].mlp)
    names = {name.partition(".3.")[2] for name in reduce_top_block(model)}
    assert names == {"mlp.mlp"}  # what it wraps takes each token by itself; what stands before it is needed at more


def test_what_cannot_be_reduced_is_left_alone() -> None:
    assert reduce_top_block(nn.Linear(2, 2)) == ()
    assert reduce_top_block(build("bart")) == ()
    frozen = tiny_model("llama")
    frozen.requires_grad_(False)
    assert reduce_top_block(frozen) == ()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_reduced_by_itself_and_it_can_be_undone(duplicate: Any) -> None:
    model = tiny_model("llama").train()
    batch = batch_of(model)
    loss, _ = step(model, batch)
    names = reduce_top_block(model)
    assert reduce_top_block(model) == names  # once
    twin = duplicate(model)
    torch.testing.assert_close(step(twin, batch)[0], loss, rtol=1e-6, atol=0)
    whole_top_block(model)
    assert torch.equal(step(model, batch)[0], loss)
    torch.testing.assert_close(step(twin, batch)[0], loss, rtol=1e-6, atol=0)
