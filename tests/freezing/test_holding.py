"""Frozen modules stay in eval, whatever is asked of them, and their dropout is off."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from hf_freeze import FreezePlan, freeze, read_anatomy, thaw, verify_frozen
from tests.depth.sweep import language_loss
from tests.freezing.models import FAMILIES, Tower, copies, modes, names_frozen
from tests.zoo import build


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
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]  # what this test has just pickled itself


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)  # a whole model needs pickle; this file was written by the line itself
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]  # a whole module, written by this test


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
