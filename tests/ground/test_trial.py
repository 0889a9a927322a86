"""Whoever runs a model on a sample leaves it and every random state as it was; a model trains again as a new one."""

from __future__ import annotations

import copy
import functools
import itertools
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_freeze import (
    CannotCache,
    FreezePlan,
    PrefixCache,
    advise,
    all_logits,
    forecast,
    freeze,
    read_anatomy,
    supervised_logits_only,
    thaw,
)
from hf_freeze.errors import PlanError
from hf_freeze.trial import autocast_left, on_trial, take_off_autocast
from tests.zoo import build

IDS = torch.arange(3, 15).repeat(8, 1) + torch.arange(8)[:, None]
ROWS = [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)} for ids in IDS]
# Among them: attention that is traded for another (big_bird), states on modules (dynamic positions, xlnet), experts,
# hashes at random (reformer), LayerDrop (bart, opt), two stacks, state spaces.
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0.1}, "llama": {}, "bart": {"dropout": 0.1, "encoder_layerdrop": 0.5}, "t5": {},
    "big_bird": {"attention_type": "block_sparse"}, "bigbird_pegasus": {}, "mixtral": {}, "qwen2_moe": {},
    "mamba": {}, "xlnet": {}, "reformer": {}, "led": {}, "opt": {"layerdrop": 0.5},
    "gemma2": {}, "llama4_text": {},
}  # fmt: skip


def model_of(kind: str) -> nn.Module:
    """In train mode but for one block, with a gradient here and there and a hook of the user's."""
    given = dict(KINDS[kind])
    if kind == "llama":  # its frequencies follow the longest row that it has seen
        given["rope_parameters"] = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
        given["max_position_embeddings"] = 4
    model = build(kind, **given).train()
    next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0].eval()
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    model.register_forward_hook(lambda *_: None)
    return model


def everything(model: nn.Module) -> dict[str, Any]:
    """All that can be seen of a model and of the process's random numbers, by name."""
    seen: dict[str, Any] = {
        "torch": torch.get_rng_state().tolist(), "numpy": str(np.random.get_state()), "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
    }  # fmt: skip
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        data = tensor.detach().reshape(-1).view(torch.uint8) if tensor.numel() else tensor
        seen[f"{name} tensor"] = (id(tensor), tensor._version, tensor.requires_grad, data.tolist())
        seen[f"{name} grad"] = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
    for name, module in model.named_modules(remove_duplicate=False):
        seen[f"{name} module"] = (id(module), type(module), module.training)
        for key, value in vars(module).items():
            plain = isinstance(value, str | int | float | bool | None)
            seen[f"{name} .{key}"] = value if plain else (id(value), list(value) if isinstance(value, dict) else ())
        if (config := getattr(module, "config", None)) is not None:
            seen[f"{name} config"] = (id(config), config.to_dict(), config._attn_implementation)
    return seen


def changes(before: dict[str, Any], model: nn.Module) -> list[str]:
    after = everything(model)
    return [name for name in before | after if before.get(name, "absent") != after.get(name, "absent")]


def cost(model: nn.Module) -> None:
    with suppress(PlanError):  # reversible blocks cannot be frozen
        forecast(model, FreezePlan(encoder_blocks=1, decoder_blocks=1))


def reduce_and_undo(model: nn.Module) -> None:
    if supervised_logits_only(model).active:
        assert all_logits(model)


def seed_everything() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


# Two of them are enough for every run; the others are as long as all else together.
@pytest.mark.parametrize("kind", [k if k in ("big_bird", "llama") else pytest.param(k, marks=pytest.mark.slow)
                                  for k in KINDS])  # fmt: skip
def test_a_look_leaves_everything_as_it_was(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    seed_everything()
    before = everything(model)
    for act in (read_anatomy, cost, reduce_and_undo):
        act(model)
        assert changes(before, model) == [], act
    with suppress(PlanError):
        freeze(model, FreezePlan(encoder_blocks="all", decoder_blocks=1))
        before = everything(model)
        with suppress(CannotCache):
            prepared = PrefixCache.prepare(model, ROWS, cache_dir=tmp_path, progress=False)
            assert changes(before, model) == [], "prepare"
            prepared.predict(steps=8, batch_size=2)
        assert changes(before, model) == [], "predict"


def test_advice_leaves_everything_as_it_was() -> None:
    model = model_of("gpt2")
    seed_everything()
    before = everything(model)
    advise(model, ROWS * 4, steps=2, batch_size=4, depths=[3], learning_rates=[1e-3], progress=False)
    after = everything(model)
    changed = [name for name in before | after if before.get(name, "absent") != after.get(name, "absent")]
    for name in changed:  # weights that were trained and put back: the same bits, in the same tensor
        assert name.endswith(" tensor")
        assert [before[name][i] for i in (0, 2, 3)] == [after[name][i] for i in (0, 2, 3)]


def test_weights_that_a_model_rescales_by_its_mode_are_its_own_again_when_it_trains() -> None:
    model = build("rwkv", rescale_every=2).train()
    given = {"input_ids": IDS[:1], "use_cache": False}
    logits, weights = model(**given).logits, {name: p.detach().clone() for name, p in model.named_parameters()}
    supervised_logits_only(model)
    with on_trial(model, training=False), torch.no_grad():
        model(**given)
    assert torch.equal(model(**given).logits, logits)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


# ------------------------------------------------------------------------------------------------- other generators


def devices(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """A CUDA of two devices that is in use, each with a state that a draw moves; to seed all of them is an error."""
    state = {"devices": [11, 22]}

    def refuse(*_: Any) -> None:
        raise AssertionError("every device was seeded")

    for name in ("manual_seed", "manual_seed_all", "seed", "seed_all"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(state["devices"]))
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: state.update(devices=list(states)))
    return state


class Drawing(nn.Module):
    """Draws on a device of the fixture's, as a model in two pieces would, though its weights are on the CPU."""

    def __init__(self, inner: nn.Module, state: dict[str, list[int]]) -> None:
        super().__init__()
        self.inner, self.state = inner, state

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.state["devices"][1] += 1
        return self.inner(*args, **kwargs)


def test_the_generators_of_every_device_are_put_back_and_none_but_the_models_is_seeded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("gpt2").train()
    device_generator = devices(monkeypatch)
    model.transformer.h[0].mlp = Drawing(model.transformer.h[0].mlp, device_generator)
    with on_trial(model, training=True), torch.no_grad():
        model(input_ids=IDS)
        assert device_generator["devices"] == [11, 23]
    assert device_generator["devices"] == [11, 22]
    for act in (read_anatomy, cost, reduce_and_undo):
        act(model)
        assert device_generator["devices"] == [11, 22]


def test_a_trial_that_fails_puts_everything_back() -> None:
    model = model_of("big_bird")
    seed_everything()
    before = everything(model)

    def fail() -> None:
        model(input_ids=IDS[:, :4])
        torch.set_grad_enabled(True)
        model.config.attention_type = "original_full"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), on_trial(model, training=False):
        fail()
    assert changes(before, model) == []


def test_whether_weights_moved_is_asked_once_and_not_for_each_module() -> None:
    asked: list[int] = []

    class Asked(nn.Parameter):
        @property
        def _version(self) -> int:
            asked.append(id(self))
            return 0

    model = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(20)])
    for layer in model:
        layer.weight = Asked(layer.weight.detach())
    with on_trial(model, training=False):  # which changes every module
        pass
    assert len(asked) == 2 * len(list(model.parameters()))
    assert all(module.training for module in model.modules())


# ------------------------------------------------------- trained again in one session, in whatever precision before


WAYS = list(itertools.product(("fp32", "bf16"), ("plain", "cached")))


def trainer_for(model: nn.Module, precision: str, folder: Path, **given: Any) -> Trainer:
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", max_steps=2, per_device_train_batch_size=4, logging_steps=1,
        bf16=precision == "bf16", disable_tqdm=True, save_strategy="no", learning_rate=1e-3,
    )  # fmt: skip
    return Trainer(model=model, args=args, train_dataset=ROWS, **given)


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def tiny() -> nn.Module:
    """Two blocks, width 16."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))


def train(model: nn.Module, precision: str, way: str, folder: Path, supervised: bool = False) -> list[float]:
    """As a cell of a notebook does it: freeze, build, a stock Trainer."""
    freeze(model, FreezePlan(decoder_blocks=1))
    if supervised:
        assert supervised_logits_only(model).active
    if way == "plain":
        return losses(trainer_for(model, precision, folder))
    cache = PrefixCache.build(model, ROWS, cache_dir=folder / precision, precision=precision, progress=False)
    try:
        return losses(trainer_for(model, precision, folder, data_collator=cache.collator))
    finally:
        assert cache.batches_used == 2
        cache.close()


def every_run_of(length: int) -> list[tuple[str, str]]:
    """A walk over WAYS in which every sequence of so many follows somewhere: a de Bruijn sequence, greedily."""
    seen: set[tuple[int, ...]] = set()
    walk = [len(WAYS) - 1] * (length - 1)
    while True:
        for way in range(len(WAYS)):
            if (run := (*walk[len(walk) - length + 1 :], way)) not in seen:
                seen.add(run)
                walk.append(way)
                break
        else:
            assert len(seen) == len(WAYS) ** length
            return [WAYS[way] for way in walk]


QUICK = [WAYS[0], WAYS[2], WAYS[1], WAYS[3], WAYS[0]]


@pytest.mark.parametrize(
    ("walk", "supervised"),
    [(QUICK, False), *(pytest.param(every_run_of(3), s, marks=pytest.mark.slow) for s in (False, True))],
    ids=["some", "every three", "every three, supervised"],
)
def test_trainings_in_any_order_of_precisions_give_the_losses_of_a_new_model(
    walk: list[tuple[str, str]], supervised: bool, tmp_path: Path
) -> None:
    start = tiny()
    expected = {way: train(copy.deepcopy(start), *way, tmp_path, supervised) for way in WAYS}
    assert expected["fp32", "plain"] == pytest.approx(expected["fp32", "cached"], rel=1e-6)
    assert expected["fp32", "plain"] != pytest.approx(expected["bf16", "plain"], rel=1e-6)  # they can be told apart
    weights = copy.deepcopy(start.state_dict())
    before: list[tuple[str, str]] = []
    for way in walk:
        start.load_state_dict(weights)
        assert train(start, *way, tmp_path, supervised) == expected[way], before[-2:]
        before.append(way)


@pytest.fixture
def own_state() -> Iterator[None]:
    """accelerate has one state a process, which says what precision the next model is prepared for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def prepared() -> nn.Module:
    """A model as a training in bf16 leaves it."""
    model: nn.Module = Accelerator(cpu=True, mixed_precision="bf16").prepare(tiny())
    assert autocast_left(model) == torch.bfloat16
    return model


@pytest.mark.usefixtures("own_state")
def test_what_is_taken_off_is_accelerates_alone() -> None:
    model = prepared()
    del model._is_accelerate_prepared
    Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)  # a second layer
    take_off_autocast(model)
    assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & set(vars(model))
    assert model.forward.__func__ is type(model).forward  # transformers' decorators stand on that one

    own = functools.partial(type(model).forward, model)
    model.forward = own  # type: ignore[method-assign]
    take_off_autocast(model)
    assert model.forward is own
    Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    assert autocast_left(model) == torch.bfloat16
    take_off_autocast(model)
    assert model.forward is own


@pytest.mark.usefixtures("own_state")
@pytest.mark.parametrize("look", [supervised_logits_only, forecast])
def test_a_look_at_a_trained_model_sees_through_the_autocast_and_leaves_it(look: Any) -> None:
    model = prepared()
    before = dict(vars(model))
    expected = str(look(tiny()))
    assert str(look(model)) == expected
    assert vars(model)["forward"] is before["forward"]
    assert vars(model)["_is_accelerate_prepared"] is True


@pytest.mark.usefixtures("own_state")
def test_a_model_that_peft_wraps_after_a_training_is_freed_of_it_too() -> None:
    model = get_peft_model(prepared(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert autocast_left(model) == torch.bfloat16
    freeze(model, FreezePlan(decoder_blocks=1))
    assert autocast_left(model) is None


@pytest.mark.usefixtures("own_state")
@pytest.mark.parametrize("end", [thaw, freeze])
def test_freeze_and_thaw_end_a_training(end: Any) -> None:
    model = prepared()
    end(model)
    assert autocast_left(model) is None


def test_a_training_that_goes_on_keeps_its_autocast(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Deeper(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            freeze(model, FreezePlan(decoder_blocks=state.global_step))
            seen.append(autocast_left(model))

    model = tiny()
    trainer_for(model, "bf16", tmp_path, callbacks=[Deeper()]).train()
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_an_interrupted_training_is_over(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    trainer = trainer_for(tiny(), "bf16", tmp_path, callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.is_in_train  # Trainer does not know it
    freeze(trainer.model, FreezePlan(decoder_blocks=1))
    assert autocast_left(trainer.model) is None


@pytest.mark.usefixtures("own_state")
def test_a_loop_of_ones_own_that_prepared_its_model_before_freeze_keeps_its_autocast() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(tiny())
    freeze(model, FreezePlan(decoder_blocks=1))
    assert autocast_left(model) == torch.bfloat16


def test_the_same_trainer_trains_on_in_its_precision(tmp_path: Path) -> None:
    model = tiny()
    trainer = trainer_for(model, "bf16", tmp_path)
    trainer.train()
    freeze(model, FreezePlan(decoder_blocks=1))
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert autocast_left(model) == torch.bfloat16
