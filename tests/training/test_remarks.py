"""The monitor speaks where the losses of training and validation show something, with the evidence, and not else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import TrainerControl, TrainerState

from hf_freeze import FreezePlan
from hf_freeze.training.monitor import FreezeMonitor
from tests.prefix.cases import frozen_model, review_rows
from tests.training.watched import ALONE, trainer_for, watching


def hear(
    losses: Sequence[tuple[float | None, float]], model: nn.Module | None = None, **settings: Any
) -> tuple[list[str], FreezeMonitor]:
    """What a monitor says over (training, validation) losses; None where nothing was trained in between."""
    said: list[str] = []
    model = model or frozen_model("llama")
    monitor = watching(model, say=said.append, **settings)
    state = TrainerState(epoch=0.0, is_world_process_zero=True)
    for number, (training, validation) in enumerate(losses):
        if training is not None:
            state.log_history += [{"loss": training - 0.1}, {"loss": training + 0.1}]  # their mean is what counts
        state.epoch = float(number + 1)
        state.log_history.append({"eval_loss": validation})
        monitor.on_evaluate(ALONE, state, TrainerControl(), model=model)
    return said, monitor


RISING = [(2.9, 3.113), (2.4, 3.12), (2.1, 3.186)]
FLAT = [(3.21, 3.3), (3.2, 3.3), (3.2, 3.29)]


def test_overfitting_is_said_with_the_evidence() -> None:
    said, monitor = hear(RISING)
    assert said == [
        "overfitting: validation loss has risen for 2 evaluations (3.113 -> 3.12 -> 3.186) while training loss fell "
        "(2.9 -> 2.4 -> 2.1): freeze more, or stop"
    ]
    assert [(advice.kind, advice.epoch, str(advice)) for advice in monitor.advice] == [("overfitting", 3.0, said[0])]


def test_underfitting_is_said_with_the_evidence_and_names_the_next_block() -> None:
    said, monitor = hear(FLAT)
    assert said == [
        "underfitting: training loss (3.21 -> 3.2 -> 3.2) and validation loss (3.3 -> 3.3 -> 3.29) both stall at "
        "3.2 / 3.29: unfreeze the next block (decoder block 2)"
    ]
    assert [advice.kind for advice in monitor.advice] == ["underfitting"]


@pytest.mark.parametrize(
    ("kind", "plan", "way_out"),
    [
        ("bart", FreezePlan(encoder_blocks="all", decoder_blocks=1), "unfreeze the next block (decoder block 0)"),
        ("bart", FreezePlan(encoder_blocks="all", decoder_blocks=0), "unfreeze the next block (encoder block 3)"),
        ("llama", FreezePlan(decoder_blocks=0), "all 4 blocks train already; use a higher learning rate or a larger"),
    ],
)
def test_the_way_out_of_underfitting_is_the_highest_frozen_block(kind: str, plan: FreezePlan, way_out: str) -> None:
    said, _ = hear(FLAT, frozen_model(kind, plan=plan))
    assert way_out in said[0]


def test_overfitting_is_said_again_only_when_it_got_worse_or_came_back() -> None:
    worse = [(2.0, 3.2), (1.9, 3.3)]
    said, _ = hear([*RISING, *worse])
    assert [message.partition(" (")[0][-13:] for message in said] == ["2 evaluations", "4 evaluations"]
    said, _ = hear([*RISING, (2.0, 2.9), (1.9, 3.0), (1.8, 3.1)])
    assert len(said) == 2
    assert "risen for 2 evaluations (2.9 -> 3 -> 3.1)" in said[1]


def test_underfitting_is_said_once_while_it_lasts() -> None:
    said, _ = hear([*FLAT, (3.2, 3.29), (3.2, 3.29), (3.2, 3.29)])
    assert len(said) == 1


@pytest.mark.parametrize(
    "losses",
    [
        [(2.9, 3.1), (2.4, 3.0), (2.1, 2.9)],  # learning
        [(2.9, 3.1), (2.4, 3.2), (2.1, 3.1)],  # one evaluation is chance
        [(2.9, 3.1), (3.0, 3.2), (3.1, 3.3)],  # both rise: the learning rate, not the data
        [(2.9, 3.1), (2.4, 3.1), (2.1, 3.1)],  # validation alone stalls
        [(2.9, 3.1), (2.4, 3.2), (None, 3.3)],  # nothing was trained in between: another dataset
        [(None, 3.0), (None, 3.1), (None, 3.2)],
        [(math.nan, math.nan)] * 3,
        [],
    ],
)
def test_nothing_is_said_where_the_losses_show_neither(losses: list[tuple[float | None, float]]) -> None:
    said, monitor = hear(losses)
    assert said == []
    assert monitor.advice == []


def test_an_evaluation_without_training_in_between_repeats_nothing() -> None:
    said, _ = hear([*RISING, (None, 3.186), (None, 3.186)])
    assert len(said) == 1


def test_patience_and_minimum_gain_are_as_asked() -> None:
    assert hear(RISING, patience=3)[0] == []
    assert "risen for 1 evaluation (" in hear(RISING[:2], patience=1)[0][0]
    assert hear(FLAT, min_gain=0.001)[0] == []
    assert hear(FLAT, min_gain=0)[0] == []


def test_only_the_first_process_says_it_and_all_keep_it(capsys: pytest.CaptureFixture[str]) -> None:
    model = frozen_model("llama")
    log = [entry for training, validation in RISING for entry in ({"loss": training}, {"eval_loss": validation})]
    for first in (False, True):
        monitor = watching(model)
        monitor.on_evaluate(ALONE, TrainerState(log_history=log, is_world_process_zero=first), None, model=model)
        assert len(monitor.advice) == 1
        assert ("overfitting: " in capsys.readouterr().out) is first


def test_a_run_that_learns_its_few_rows_by_heart_is_called_overfitting(tmp_path: Path) -> None:
    said: list[str] = []
    trainer = trainer_for(
        frozen_model("llama"), tmp_path, FreezeMonitor(say=said.append), rows=review_rows("llama", count=6),
        eval_rows=review_rows("llama", seed=1), num_train_epochs=12, max_steps=-1, learning_rate=1e-2,
        optim="adamw_torch", eval_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    assert said[0].startswith("overfitting: validation loss has risen for 2 evaluations (")


def test_a_run_that_cannot_learn_is_called_underfitting(tmp_path: Path) -> None:
    said: list[str] = []
    trainer = trainer_for(
        frozen_model("llama"), tmp_path, FreezeMonitor(say=said.append), eval_rows=review_rows("llama", seed=1),
        num_train_epochs=4, max_steps=-1, learning_rate=1e-6, eval_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    assert [message.partition(":")[0] for message in said] == ["underfitting"]
    assert said[0].endswith("unfreeze the next block (decoder block 2)")
