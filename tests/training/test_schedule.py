"""Stages as data: made by gradual, edited as YAML, refused where they cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_freeze import FreezePlan
from hf_freeze.errors import StageError
from hf_freeze.training.schedule import Stage, gradual, load_stages, save_stages
from hf_freeze.training.stages import train_in_stages
from tests.training.staged_run import make_trainer, pretrained


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": "1"}, "it is a number"),
        ({"learning_rate": "1e-4"}, r"learning_rate='1e-4'; it is a number\. In YAML, write 1\.0e-4"),
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": float("inf")}, "A stage must end"),
        ({"epochs": float("nan")}, "epochs=nan"),
        ({"epochs": 1, "steps": 2}, "give one of them"),
        ({"steps": 0}, "steps=0"),
        ({"patience": 0}, "patience=0"),
        ({"min_gain": 1.0}, "min_gain=1.0"),
        ({"block_decay": 1.5}, "block_decay=1.5"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"plan": {"decoder_blocks": 1}}, "takes a FreezePlan"),
    ],
)
def test_a_stage_that_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(StageError, match=message):
        Stage(**{"plan": FreezePlan()} | given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((3, 1, 4), "has 4. Use stages <= 2"),
        ((5, 1, 1), "has 4. Use start <= 4"),
        ((0, 1, 1), "start=0"),
        ((1, -1, 2), "step=-1"),
        ((1, 1, 0), "stages=0"),
    ],
)
def test_gradual_refuses_what_the_model_has_not(given: tuple[int, int, int], message: str) -> None:
    with pytest.raises(StageError, match=message):
        gradual(pretrained(), *given)


def test_stages_are_edited_as_yaml(tmp_path: Path) -> None:
    stages = gradual(pretrained(), 1, 2, 2, epochs=1.5, patience=2, learning_rate=1e-3)
    save_stages(stages, tmp_path / "stages.yaml")
    assert load_stages(tmp_path / "stages.yaml") == stages
    (tmp_path / "stages.yaml").write_text("stages:\n- plan: {decoder_blocks: -2}\n  steps: 1\n")
    assert load_stages(tmp_path / "stages.yaml") == [Stage(FreezePlan(decoder_blocks=-2), steps=1)]
    report = train_in_stages(lambda: make_trainer(tmp_path / "run"), tmp_path / "stages.yaml")
    assert report.stages[0].trained_blocks == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [", "cannot be read"),
        ("plans: []", "no list named 'stages'"),
        ("stages: []", "or an empty one"),
        ("stages: [{plan: -4}]", "-4 as plan; it is a mapping"),
        ("stages: [{plan: {}, epoch: 1}]", "'epoch'; the nearest: 'epochs'"),
        ("stages: [{epochs: 1}]", "with the key 'plan'"),
        ("stages: ['a']", "with the key 'plan'"),
    ],
)
def test_yaml_that_holds_no_stages_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "stages.yaml").write_text(text)
    with pytest.raises(StageError, match=message):
        load_stages(tmp_path / "stages.yaml")
    with pytest.raises(StageError, match="cannot be read"):
        load_stages(tmp_path / "missing.yaml")
