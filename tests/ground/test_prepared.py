"""A model trains again in one session as a new one would, in whatever precision it was trained before."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_freeze import FreezePlan, PrefixCache, forecast, freeze, supervised_logits_only, thaw
from hf_freeze.trial import autocast_left, take_off_autocast

GENERATOR = torch.Generator().manual_seed(0)
IDS = [torch.randint(3, 60, (8,), generator=GENERATOR) for _ in range(8)]
ROWS = [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones(8).long()} for ids in IDS]
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
