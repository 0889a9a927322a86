"""The sweep over reviews: ROUGE of every depth, from a shell, resumed and drawn again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_freeze import SweepReport
from tests.tiny import tiny_folder

RECIPE = Path(__file__).parents[2] / "recipes" / "sweep_depth.py"


def run_recipe(folder: Path, *given: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RECIPE), "--output_dir", str(folder / "sweep"), *given]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_the_recipe_sweeps_scores_draws_and_goes_on(kind, tmp_path):
    grid = ["--model_name_or_path", str(tiny_folder(kind, tmp_path)), "--train_rows", "16", "--num_train_epochs", "1"]
    grid += ["--max_validation_rows", "4", "--max_test_rows", "4", "--max_summary_tokens", "8", "--precision", "fp32"]
    grid += ["--learning_rates", "1e-3", "--prefix_cache_dir", str(tmp_path / "cache"), "--references", "lora"]
    first = run_recipe(tmp_path, *grid, "--depths", "2")
    assert first.returncode == 0, first.stderr
    lines = (tmp_path / "sweep" / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["depth"] for line in lines] == ["pretrained", "lora", 2]
    second = run_recipe(tmp_path, *grid, "--depths", "2,3")
    assert second.returncode == 0, second.stderr
    assert "3 runs are done already" in second.stdout
    report = SweepReport.load(tmp_path / "sweep")
    assert report.results[:3] == SweepReport.load(tmp_path / "sweep").results[:3]
    assert [row.depth for row in report.rows()] == ["pretrained", "lora", 2, 3]
    assert all({"eval_loss", "rouge1", "rougeL", "rougeL_low"} <= row.metrics.keys() for row in report.rows())
    assert [result.cached for result in report.results] == [False, False, True, True]
    for name in ("table.md", "pareto.png", "pareto.svg"):
        (tmp_path / "sweep" / name).unlink()
    again = run_recipe(tmp_path, "--draw_only", "true", "--quality", "eval_loss")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "sweep" / "pareto.png").stat().st_size > 10_000
    assert "| 3 of " in (tmp_path / "sweep" / "table.md").read_text()


def test_what_the_recipe_cannot_do_is_told_in_a_line(tmp_path):
    for given, message in (
        (("--depths", "0,x"), "'0,x' was given; use numbers"),
        (("--draw_only", "true"), "holds no sweep.json"),
    ):
        done = run_recipe(tmp_path, *given)
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith("error: ")
        assert message in done.stderr
