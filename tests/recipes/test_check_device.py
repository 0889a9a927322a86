"""The check of a device as a user runs it, on toys: it passes where all is exact, and fails by a planted error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.recipes.scripts import load_script

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_device.py"
TINY = ["--device=cpu", "--size=tiny"]
# Finds every package but those that a bare machine lacks, and runs the script.
BARE = """
import runpy, sys
from importlib.machinery import PathFinder
absent = {"accelerate", "datasets", "evaluate", "peft", "rouge_score", "rich", "pandas", "pyarrow", "trl", "matplotlib"}
class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else super().find_spec(name, path, target)
sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def script() -> ModuleType:
    return load_script(SCRIPT)


def results(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_it_passes_on_a_bare_machine_and_writes_every_step(script: ModuleType, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        BARE,
        str(SCRIPT),
        *TINY,
        f"--output={tmp_path / 'out'}",
        f"--cache_dir={tmp_path}",
    ]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # the caches are gone
    facts = results(tmp_path / "out")
    assert {name: step["status"] for name, step in facts["steps"].items()} == dict.fromkeys(script.STEPS, "done")
    cases = facts["steps"]["exactness"]["exactness"]
    assert len(cases) == 12
    assert all(case["same"] and case["planted_error_seen"] for case in cases.values())
    assert list(facts["steps"]["speed"]["speed"]) == list(script.MODES)
    assert all(mode["seconds"] > 0 for mode in facts["steps"]["speed"]["speed"].values())
    assert facts["steps"]["build"]["build"]["bare_seconds"] > 0
    name = script.re.sub(r"[^a-z0-9]+", "-", f"{facts['device']} tiny".lower())
    table = (tmp_path / "out" / f"{name}.md").read_text()
    assert "Exact in all 12 cases, and each saw the planted error." in table
    assert table in done.stdout


@pytest.mark.parametrize("precision", ["fp32", "bf16 weights"])
def test_with_the_states_of_two_rows_exchanged_it_fails(
    precision: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(script, "PRECISIONS", {precision: script.PRECISIONS[precision]})
    options = [*TINY, "--steps=exactness", "--plant_error", f"--output={tmp_path}", f"--cache_dir={tmp_path}"]
    assert script.main(options) == 1
    told = capsys.readouterr().err
    for case in (
        f"llama, {precision}, cached",
        f"llama, {precision}, cached + supervised",
        f"bart, {precision}, cached",
    ):
        assert f"error: {case}: not as plain training: " in told
    assert "With a planted error" in next(tmp_path.glob("*.md")).read_text()


def test_a_check_that_does_not_see_a_planted_error_is_worth_nothing(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(script, "PRECISIONS", {"bf16 autocast": script.PRECISIONS["bf16 autocast"]})
    monkeypatch.setattr(script, "exchange_rows", dict)
    options = [*TINY, "--steps=exactness", f"--output={tmp_path}", f"--cache_dir={tmp_path}"]
    assert script.main(options) == 1
    assert "the states of two rows were exchanged and it was not seen; that proves nothing." in capsys.readouterr().err


def test_a_step_that_runs_over_is_stopped_and_the_others_go_on(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written = []

    def sleep(check: Any, found: dict[str, Any]) -> None:
        found["before"] = 1
        try:
            time.sleep(60)
        except Exception:  # no library's own may keep it going
            time.sleep(60)

    def fail(check: Any, found: dict[str, Any]) -> None:
        written.append(list(results(tmp_path)["steps"]))
        raise torch.OutOfMemoryError("planted")

    steps = {
        "hooks": (sleep, 1.0),
        "speed": (fail, 1000.0),
        "build": (lambda check, found: found.update(rows=1), 1000.0),
    }
    monkeypatch.setattr(script, "STEPS", steps)
    options = [*TINY, "--steps=hooks,speed,build", f"--output={tmp_path}", f"--cache_dir={tmp_path}"]
    started = time.perf_counter()
    assert script.main(options) == 1  # what the hooks do was not told
    assert time.perf_counter() - started < 30
    steps = results(tmp_path)["steps"]
    assert steps["hooks"]["status"].startswith("stopped after its")
    assert steps["hooks"]["before"] == 1
    assert written == [["hooks"]]
    assert steps["speed"]["status"] == "failed, out of memory: planted"
    assert (steps["build"]["status"], steps["build"]["rows"]) == ("done", 1)


def test_a_step_without_time_is_skipped(script: ModuleType, tmp_path: Path) -> None:
    options = [*TINY, "--minutes=0", "--steps=build", f"--output={tmp_path}", f"--cache_dir={tmp_path}"]
    assert script.main(options) == 0
    assert results(tmp_path)["steps"]["build"]["status"] == "skipped, no time was left"


def test_a_device_that_is_not_there_is_refused(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"error: device 'npu' was asked for; found: .*\. Use '"):
        script.main(["--device=npu"])


def test_a_missing_package_is_named() -> None:
    done = subprocess.run([sys.executable, "-I", "-S", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: this check imports torch, ")
    assert "Use: pip install torch " in done.stderr
