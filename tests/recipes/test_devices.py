"""The device that is there is used, not the one that the build of torch is for: pip's own build for Linux is for CUDA.

Where there is no driver, torch names that accelerator all the same, and whatever is moved to it fails. The tests plant
such a build; in an environment that has it already (scripts/check_versions.py default) they change nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_freeze import FreezeError, FreezePlan, freeze, save_delta
from hf_freeze.cli import COMMANDS, main
from hf_freeze.machine import find_accelerators, find_device, missing_accelerator, read_hardware
from hf_freeze.summarization import SummaryTrainingArguments
from hf_freeze.training.precision import choose_precision
from tests.recipes.scripts import load_script
from tests.tiny import tiny_folder, tiny_model

ROOT = Path(__file__).parents[2]
RECIPES = {path.stem: path for path in (ROOT / "recipes").glob("*.py")}
NAMED = torch.device("cuda")
PLANT = 'import torch\ntorch._C._accelerator_getAccelerator = lambda: torch.device("cuda")\n'
TOLD = f"torch {torch.__version__} is built for CUDA, no device is there"
ROWS = "review,product\n" + "".join(f"Mug {n} keeps coffee warm and its handle is good.,p{n % 2}\n" for n in range(4))


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of torch for an accelerator that is not there."""
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: NAMED)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("hf_freeze.training.precision._product_seconds", lambda dtype: 1.0)  # the probe takes its time


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, a delta of it, and reviews."""
    path = tmp_path_factory.mktemp("devices")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama", path), dtype=torch.float32)
    freeze(model, FreezePlan(decoder_blocks=3))
    save_delta(model, path / "delta")
    (path / "in.csv").write_text(ROWS)
    return path


# ---------------------------------------------------------------------------------------------------- one function asks


def test_what_torch_is_built_for_is_not_taken_for_what_is_there(planted: None) -> None:
    assert torch.accelerator.current_accelerator() == NAMED, "the plant is as the real build"
    assert find_accelerators() == []
    assert find_device() == find_device("") == find_device("cpu") == torch.device("cpu")
    assert missing_accelerator() == TOLD
    assert read_hardware().memory_bytes == read_hardware("cpu").memory_bytes
    assert "this CPU" in choose_precision().reason
    with pytest.raises(FreezeError, match=re.escape(f"'cuda' was asked for; found: cpu ({TOLD}). Use 'cpu'.")):
        find_device("cuda")


def test_an_accelerator_that_is_there_is_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"is_available": True, "current_accelerator": torch.device("xpu"), "device_count": 2}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.accelerator, name, lambda answer=answer: answer)
    assert find_accelerators() == [torch.device("xpu:0"), torch.device("xpu:1")]
    assert find_device() == torch.device("xpu")
    assert find_device("xpu:1") == torch.device("xpu:1")
    assert missing_accelerator() == ""
    assert SummaryTrainingArguments.__dataclass_fields__["dataloader_pin_memory"].default_factory() is True  # type: ignore[misc]
    for asked in ("xpu:2", "cuda", "gpu"):
        with pytest.raises(FreezeError, match=rf"'{asked}' was asked for; found: xpu, cpu, xpu:0, xpu:1\. Use 'xpu'\."):
            find_device(asked)


def test_a_torch_that_raises_where_none_is_there_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises() -> None:
        raise RuntimeError("Cannot access accelerator device when none is available.")  # torch 2.6

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", raises)
    assert find_device() == torch.device("cpu")
    assert missing_accelerator() == ""


ASKS = re.compile(
    r"\b(accelerator|cuda|xpu|mps|hpu|npu|mtia)\.(is_available|is_built|device_count|current_(accelerator|device\w*))\b"
    r"|from torch import .*\b(accelerator|cuda|xpu|mps)\b|is_torch_\w+_available"
)


def test_no_other_file_asks_torch_which_accelerators_are_there() -> None:
    for asking in ("torch.accelerator.is_available()", "from torch import nn, cuda", "torch.backends.mps.is_built()"):
        assert ASKS.search(asking)
    assert not ASKS.search("dist.is_available() or torch.cuda.get_device_name(device)")
    files = [path for name in ("hf_freeze", "recipes", "scripts", "notebooks") for path in (ROOT / name).rglob("*.*y*")]
    sources = {path for path in files if path.suffix in (".py", ".ipynb")}
    assert {path.name for path in sources} >= {"machine.py", "precision.py", "1_quickstart.ipynb", "check_versions.py"}
    asking_files = {path.relative_to(ROOT).as_posix() for path in sources if ASKS.search(path.read_text())}
    assert asking_files == {"hf_freeze/machine.py"}, "they ask hf_freeze.machine.find_device or find_accelerators"


# ------------------------------------------------------------------------------- what used to die, each in this process


def test_doctor_tells_what_torch_is_built_for_and_goes_on(planted: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if TOLD in line]
    assert line.split()[:2] == ["machine", "accelerator"]


def test_summarize_runs_on_what_is_there(planted: None, folder: Path, tmp_path: Path) -> None:
    words = ["summarize", folder / "llama", folder / "in.csv", "-o", tmp_path / "out.csv", "--max_new_tokens", 2]
    assert main([*map(str, words), "--precision", "auto", "--cpu_threads", "1", "--quiet"]) == 0
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 5


def test_training_leaves_an_accelerator_alone_that_is_not_there(planted: None, tmp_path: Path) -> None:
    args = SummaryTrainingArguments(output_dir=str(tmp_path), precision="auto", cpu_threads=1)
    assert (args.use_cpu, args.dataloader_pin_memory, args.device) == (True, False, torch.device("cpu"))
    digits = load_script(RECIPES["classify_images"]).RunArguments(output_dir=str(tmp_path))
    assert (digits.use_cpu, digits.device) == (True, torch.device("cpu"))


def test_recipes_that_move_a_model_themselves_move_it_to_what_is_there(
    planted: None, monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspecting = load_script(RECIPES["inspect_layers"])
    assert {each.device for each in inspecting.on_device(tiny_model("llama")).parameters()} == {torch.device("cpu")}

    def recipe(name: str, *words: str) -> ModuleType:
        monkeypatch.setattr(sys, "argv", [str(RECIPES[name]), *words])
        return load_script(RECIPES[name])

    assert recipe("benchmark_freezing", "--toy").parse_arguments().device == torch.device("cpu")
    with pytest.raises(FreezeError, match="device 'cuda' was asked for; found: cpu"):
        recipe("benchmark_freezing", "--toy", "--device", "cuda").parse_arguments()

    def advised(model: torch.nn.Module, *_: Any, **given: Any) -> str:
        return f"advice on {next(model.parameters()).device} in {given['precision']}"

    advising = recipe("advise_plan", "--model_name_or_path", str(folder / "llama"), "--precision", "fp32")
    monkeypatch.setattr(advising, "advise", advised)
    advising.main()
    assert "advice on cpu in fp32" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- all of it, as a user does

TINY_RUN = (
    "--max_summary_tokens=8 --precision=auto --cpu_threads=1 --num_train_epochs=1 --learning_rate{s}=1e-3 "
    "--max_validation_rows=4 --max_test_rows=2 --prefix_cache_dir={t}/cache --output_dir={t}/{name}"
)
SWEEP = f"--model_name_or_path={{f}}/llama --depths=2 --train_rows=8 {TINY_RUN.format(s='s', t='{t}', name='{name}')}"
LINES = {  # what is run, by the name of the command or the recipe; {f} holds the models, {t} is written to
    "doctor": ["doctor"],
    "inspect": ["inspect {f}/llama"],
    "merge": ["merge {f}/delta -o {t}/merged"],
    "summarize": ["summarize {f}/llama {f}/in.csv -o {t}/out.csv --max_new_tokens 2"],
    "sweep": [f"sweep {SWEEP.replace('{name}', 'sweep')}"],
    "cache": ["cache list --cache_dir {t}/cache", "cache clear --cache_dir {t}/cache"],
    "advise_plan": ["--model_name_or_path={f}/llama --steps=2 --train_rows=40 --output_dir={t}/advice"],
    "benchmark_deltas": ["--model_name_or_path={f}/llama --freeze_decoder_blocks=3 --repetitions=1"],
    "benchmark_freezing": [
        "--toy --threads=1 --batch_size=2 --source_tokens=16 --labelled_tokens=4 --steps=2 --repetitions=1 "
        "--modes=frozen,cached --build_rows=0 --cache_dir={t} --output={t}/benchmark.json"
    ],
    "classify_images": [
        f"--model={model} --max_train_rows=40 --num_train_epochs=1 --prefix_cache_dir={{t}}/c --output_dir={{t}}/digits"
        for model in ("vgg16", "vit")
    ],
    "inspect_layers": ["--model_name_or_path={f}/llama --max_texts=3 --max_tokens=24 --output_dir={t}/layers"],
    "summarize_reviews": [
        "--model_name_or_path={f}/llama --max_train_rows=16 --cache_prefix=on "
        + TINY_RUN.format(s="", t="{t}", name="tuned")
    ],
    "summarize_in_stages": [
        "--model_name_or_path={f}/llama --max_train_rows=16 --stages=1,1,2 "
        + TINY_RUN.format(s="", t="{t}", name="staged")
    ],
    "sweep_depth": [SWEEP.replace("{name}", "again")],
}  # fmt: skip


def test_every_command_and_every_recipe_is_in_the_list_of_what_is_run() -> None:
    assert LINES.keys() == COMMANDS.keys() | RECIPES.keys()


@pytest.fixture(scope="module")
def as_typed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a line under such a build and returns what it printed."""
    site, written = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("written")
    (site / "sitecustomize.py").write_text(PLANT)
    paths = [str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_FREEZE_CACHE": str(written / "cache")}
    environment = os.environ | offline | {"PYTHONPATH": os.pathsep.join(paths)}

    def run(start: list[str], line: str = "") -> str:
        command = [sys.executable, *start, *line.format(f=folder, t=written).split()]
        given: dict[str, Any] = {"capture_output": True, "text": True, "env": environment, "cwd": written}
        done = subprocess.run(command, timeout=600, check=False, **given)
        assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    assert run(["-c", "import torch; print(torch.accelerator.current_accelerator())"]).strip() == "cuda"
    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_every_command_and_every_recipe_runs_where_the_accelerator_of_the_build_is_not(
    name: str, as_typed: Callable[..., str]
) -> None:
    for line in LINES[name]:
        start = ["-m", "hf_freeze.cli"] if name in COMMANDS else [str(RECIPES[name])]
        assert as_typed(start, line).strip()
