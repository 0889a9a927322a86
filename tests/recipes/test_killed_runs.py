"""Killed with -9 at any moment, work done again ends in the bits of work that nobody disturbed: a staged, cached run,
the build of a cache, deltas saved one over the other, the summaries of a file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import hf_freeze.training.checkpoints
import hf_freeze.training.ledger
import hf_freeze.training.stages
from hf_freeze import gradual, train_in_stages
from tests.training.staged_run import STEPS, make_trainer, pretrained, run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "kills",
    [
        {"training": 1, "build": 1, "delta": 1, "summarize": 1},
        pytest.param({"training": 15, "build": 15, "delta": 15, "summarize": 15}, marks=pytest.mark.slow),
    ],
)
def test_what_is_killed_at_random_and_done_again_ends_as_the_undisturbed(kills: dict[str, int], tmp_path: Path) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    asked = ",".join(f"{name}={count}" for name, count in kills.items())
    command = [sys.executable, "tests/recipes/killed_runs.py", str(tmp_path), asked]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1800, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "told.json").read_text())
    assert Counter(each["work"] for each in told) == kills
    assert [each for each in told if not each["same"] or each["broken"]] == []


class Killed(BaseException):
    """Stands for a kill at a chosen place: nothing in between catches it."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(tmp_path_factory.mktemp("undisturbed")).trainer.model.state_dict()


@pytest.mark.parametrize("call", [2, *(pytest.param(call, marks=pytest.mark.slow) for call in (1, 4))])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("trainer", "_save_optimizer_and_scheduler"),  # the weights of a checkpoint are written, no more
        ("trainer", "_save_rng_state"),
        ("guard", "on_save"),  # all is written, nothing is marked
        ("trainer", "evaluate"),
        (hf_freeze.training.checkpoints, "remove_checkpoints"),
        (hf_freeze.training.checkpoints.os, "replace"),  # the manifest is written under its temporary name
        (hf_freeze.training.stages, "save_delta"),  # the best weights are about to be written
        (hf_freeze.training.ledger, "write_json"),  # a stage is done and not noted
    ],
)
def test_a_run_killed_at_a_chosen_place_ends_so_too(
    owner: Any, name: str, call: int, undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1, 100))

    def kills(function: Any) -> Any:
        def stand_in(*args: Any, **named: Any) -> Any:
            if next(calls) == call:
                raise Killed
            return function(*args, **named)

        return stand_in

    def make() -> Any:
        trainer = make_trainer(tmp_path)
        if owner == "trainer":
            monkeypatch.setattr(trainer, name, kills(getattr(trainer, name)))
        return trainer

    if owner == "guard":
        guard = hf_freeze.training.checkpoints.CheckpointGuard
        monkeypatch.setattr(guard, name, kills(getattr(guard, name)))
    elif owner != "trainer":
        monkeypatch.setattr(owner, name, kills(getattr(owner, name)))
    stages = gradual(pretrained(), start=1, step=1, stages=3, steps=STEPS, block_decay=0.5)
    with pytest.raises(Killed):
        train_in_stages(make, stages, cache_dir=tmp_path / "cache", say=lambda text: None)
    monkeypatch.undo()
    got = run(tmp_path, resume=True).trainer.model.state_dict()
    assert [name for name, weight in undisturbed.items() if not weight.equal(got[name])] == []
