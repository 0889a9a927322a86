"""The sweep over reviews: ROUGE of every depth, from a shell, resumed and drawn again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hf_freeze import SweepReport
from hf_freeze.cli import exit_code
from tests.recipes.scripts import load_script
from tests.tiny import tiny_folder

RECIPE = Path(__file__).parents[2] / "recipes" / "sweep_depth.py"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The recipe with the arguments of a shell: its exit code, what it printed and what it complained of."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*given):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [str(RECIPE), "--output_dir", str(tmp_path / "sweep"), *map(str, given)])
        recipe = load_script(RECIPE)
        code = exit_code(lambda: recipe.main(["sweep", *sys.argv[1:]]))
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_the_recipe_sweeps_scores_draws_and_goes_on(kind, tmp_path, run):
    grid = ["--model_name_or_path", tiny_folder(kind, tmp_path), "--train_rows", "16", "--num_train_epochs", "1"]
    grid += ["--max_validation_rows", "4", "--max_test_rows", "4", "--max_summary_tokens", "8", "--precision", "fp32"]
    grid += ["--learning_rates", "1e-3", "--prefix_cache_dir", tmp_path / "cache", "--references", "lora"]
    grid += ["--cpu_threads", "1", "--disable_tqdm", "true"]
    code, out, err = run(*grid, "--depths", "2", "--json")
    assert code == 0, err
    assert "train: " in err, "where the rows are from, and what was guessed"
    told = json.loads(out)
    assert [made["depth"] for made in told["runs"]] == ["pretrained", "lora", 2]
    assert all(Path(path).stat().st_size for path in told["files"])
    lines = (tmp_path / "sweep" / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["depth"] for line in lines] == ["pretrained", "lora", 2]
    first = SweepReport.load(tmp_path / "sweep")
    code, out, err = run(*grid, "--depths", "2,3")
    assert code == 0, err
    assert "3 runs are done already" in out
    report = SweepReport.load(tmp_path / "sweep")
    assert report.results[:3] == first.results
    assert [row.depth for row in report.rows()] == ["pretrained", "lora", 2, 3]
    assert all({"eval_loss", "rouge1", "rougeL", "rougeL_low"} <= row.metrics.keys() for row in report.rows())
    assert [result.cached for result in report.results] == [False, False, True, True]
    for name in ("table.md", "pareto.png", "pareto.svg"):
        (tmp_path / "sweep" / name).unlink()
    code, out, err = run("--draw_only", "--quality", "eval_loss")
    assert code == 0, err
    assert (tmp_path / "sweep" / "pareto.png").stat().st_size > 10_000
    assert "| 3 of " in (tmp_path / "sweep" / "table.md").read_text()


def test_what_the_recipe_cannot_do_is_told_in_a_line(run):
    for given, message in (
        (("--depths", "0,x", "--precision", "fp32"), "'0,x' was given; use numbers"),
        (("--draw_only", "true"), "holds no sweep.json"),
    ):
        code, _, err = run(*given)
        assert code == 1
        assert err.strip().splitlines()[-1].startswith("error: ")
        assert message in err
