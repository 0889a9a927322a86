"""The benchmark as a user runs it: in processes of its own, on toys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from hf_freeze.exactness import exchange_rows
from hf_freeze.prefix.cache import PrefixCollator
from hf_freeze.prefix.spot import SpotCheck
from tests.recipes.scripts import load_script

RECIPE = Path(__file__).parents[2] / "recipes" / "benchmark_freezing.py"
MODES = ["full", "frozen", "lora", "frozen+checkpointing", "cached", "cached+supervised", "limit"]
SMALL = ["--toy", "--device=cpu", "--threads=1", "--batch_size=2", "--source_tokens=16", "--labelled_tokens=4",
         "--steps=2", "--repetitions=1", "--target_tokens=8"]  # fmt: skip


def run(*options: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(RECIPE), *options]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)


def results(folder: Path, *options: str) -> tuple[dict, str]:
    output = folder / "benchmark.json"
    done = run(*SMALL, f"--cache_dir={folder}", f"--output={output}", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in folder.iterdir()] == ["benchmark.json"]  # the caches are gone
    return json.loads(output.read_text()), done.stdout


@pytest.mark.slow
def test_every_mode_is_measured_and_those_that_train_the_same_part_have_the_same_losses(tmp_path: Path) -> None:
    found, screen = results(tmp_path, "--repetitions=2", "--depths=2,4", "--build_rows=64", "--freeze_decoder_blocks=3")
    modes = found["modes"]
    assert list(modes) == MODES
    assert found["losses"].startswith("Same losses as frozen over 4 steps"), found["losses"]
    for name, mode in modes.items():
        ratios = [mode["full_over_it"], mode["frozen_over_it"], mode["it_over_limit"], mode["peak_full_over_it"]]
        assert all(ratio > 0 for ratio in ratios), name
        assert mode["seconds"] > 0
        assert mode["peak_bytes"] > mode["import_bytes"] * 0.5 > 0
        assert len(found["runs"][name]) == 2
        assert [len(single["seconds"]) for single in found["runs"][name]] == [2, 2]
    assert modes["full"]["losses"] == pytest.approx(modes["frozen"]["losses"], rel=1e-3)  # the same start and rows
    assert len({modes[name]["trained_parameters"] for name in MODES if name not in ("full", "lora")}) == 1
    assert modes["full"]["trained_parameters"] > 2 * modes["frozen"]["trained_parameters"]
    assert modes["full"]["forecast"] == 1.0 < modes["frozen"]["forecast"] < modes["cached"]["forecast"]
    assert [table["title"].split(",")[0] for table in found["tables"]] == [
        "A training step of smollm2",
        "Building the cache",
        "Cached steps with the same blocks above the cut",
    ]
    assert [row["frozen blocks"] for row in found["tables"][2]["rows"]] == ["2", "4"]
    assert {"device", "threads", "date", "torch", "transformers", "arguments"} <= set(found)
    assert all(name in screen for name in MODES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("bart-base", ()),
        ("gpt2", ("--from_disk", "--release_prefix")),
        ("llama-8b", ("--precision=bf16", "--release_prefix")),
    ],
)
def test_every_family_trains_the_same_from_the_cache(model: str, options: tuple[str, ...], tmp_path: Path) -> None:
    chosen = ["frozen", "cached", "cached+supervised", "limit"]
    given = ("--build_rows=0", f"--modes={','.join(chosen)}", f"--model={model}", *options)
    found, screen = results(tmp_path, *given)
    assert list(found["modes"]) == chosen
    assert found["losses"].startswith("Same losses"), found["losses"]
    assert found["modes"]["cached"]["full_over_it"] is None  # full was not run
    assert ("cached+supervised: as cached" in screen) == (model == "bart-base")


def noise(states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.randn_like(tensor.float()).to(tensor.dtype) * tensor.std() for name, tensor in states.items()}


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (None, "Same losses as frozen"),
        (noise, "DIFFERENT gradients of cached in the first step"),
        (exchange_rows, "DIFFERENT gradients of cached in the first step"),
    ],
)
def test_other_states_are_seen_in_bf16(
    plant: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    recipe = load_script(RECIPE)
    own = PrefixCollator.states
    if plant is not None:
        monkeypatch.setattr(PrefixCollator, "states", lambda *given: plant(own(*given)))
        monkeypatch.setattr(SpotCheck, "before_batch", lambda *_: None)  # it would see that first
    runs = {}
    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer of another test may have left one in fp32
    try:
        for mode in ("frozen", "cached"):
            given = [*SMALL, "--precision=bf16", f"--cache_dir={tmp_path}", f"--worker={mode}"]
            monkeypatch.setattr(sys, "argv", [str(RECIPE), *given])
            runs[mode] = recipe.summarise([recipe.work(recipe.parse_arguments())])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    gap = max(abs(a / b - 1) for a, b in zip(runs["cached"]["losses"], runs["frozen"]["losses"], strict=True))
    assert gap < recipe.SAME_LOSS["bf16"]  # the losses alone pass all three
    assert recipe.compare_steps(runs, "bf16").startswith(told)


def test_a_comparison_that_sees_no_planted_error_is_no_proof() -> None:
    recipe = load_script(RECIPE)
    step = recipe.sketch({"loss": torch.tensor(1.0), "weight": torch.ones(9)})
    frozen = {"losses": [1.0], "trained_parameters": 9, "first_step": step, "noise": []}
    told = recipe.compare_steps({"frozen": frozen, "cached": frozen | {"planted": step}}, "bf16")
    assert told.startswith("DIFFERENT states are not seen")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--device=cuda",), "device 'cuda' was asked for; found: cpu"),
        (("--modes=full,frosen",), "--modes frosen was asked for; use 'frozen'"),
        (("--labelled_tokens=16",), "nothing predicts the first of them. Use 15 or fewer."),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_first_run(options: tuple[str, ...], told: str) -> None:
    done = run(*SMALL, *options)
    assert done.returncode == 1
    assert told in done.stderr
    assert "run/s" not in done.stderr
