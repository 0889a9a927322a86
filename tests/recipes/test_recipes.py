"""The recipes as a user starts them, on small random models: in this process, or in processes of their own where the
launch is what is looked at.
"""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from huggingface_hub import ModelCard

from hf_freeze import FreezePlan, cli
from hf_freeze.cli import exit_code
from hf_freeze.prefix.folder import MANIFEST
from hf_freeze.prefix.states import StreamSpec
from hf_freeze.prefix.store import Store
from hf_freeze.summarization import shipped_reviews
from hf_freeze.summarization.arguments import DataArguments, ModelArguments, RunArguments, parse_arguments
from hf_freeze.summarization.runs import CacheChoice, choose_cache
from hf_freeze.training.precision import Precision
from tests.recipes.scripts import load_script
from tests.tiny import tiny_folder

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "summarize_reviews.py")
STAGES = str(ROOT / "recipes" / "summarize_in_stages.py")
SMALL = [
    "--max_train_rows=48", "--max_validation_rows=8", "--max_test_rows=4", "--num_train_epochs=4",
    "--learning_rate=1e-2", "--logging_steps=1",
    "--max_summary_tokens=16", "--tied_head=untie", "--per_device_eval_batch_size=32", "--precision=fp32",
    "--cpu_threads=1",
]  # fmt: skip
TIED = [option for option in SMALL if "tied" not in option]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Ran(NamedTuple):
    """How a program ended and what it printed."""

    code: int
    out: str
    err: str


def ran(recipe: str, *words: object) -> Ran:
    """A recipe in this process, with the arguments and the exit code of a shell."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [recipe, *map(str, words)])
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        code = exit_code(load_script(recipe).main)
    return Ran(code, out.getvalue(), err.getvalue())


def summarized(folder: Path, reviews: Path, output: Path) -> int:
    """`hf-freeze summarize` with what a recipe left in its folder."""
    return cli.main(["summarize", str(folder), str(reviews), "-o", str(output), "--precision=fp32", "--cpu_threads=1"])


def log_of(folder: Path) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return history


def losses_of(folder: Path) -> list[float]:
    return [row.get("loss", row.get("eval_loss")) for row in log_of(folder) if "loss" in row or "eval_loss" in row]


def results(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text())


class Run(NamedTuple):
    """A run of the recipe from the cache: its folder, its arguments, what it printed."""

    output: Path
    given: list[str]
    screen: str


@pytest.fixture(scope="module", params=["bart", "llama", "gpt2"])
def whole_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The whole recipe, once for each kind of model."""
    folder = tmp_path_factory.mktemp(request.param)
    model, output, prefix = tiny_folder(request.param, folder), folder / "out", folder / "prefix"
    given = ["--model_name_or_path", str(model), "--prefix_cache_dir", str(prefix), *SMALL]
    given += ["--freeze_encoder_blocks=all"] if request.param == "bart" else []
    done = ran(RECIPE, *given, "--output_dir", output, "--cache_prefix=on", "--release_prefix=true")
    assert done.code == 0, done.err[-3000:]
    return Run(output, given, done.out)


def test_a_cache_that_cannot_pay_is_not_tried(tmp_path: Path) -> None:
    asked = ModelArguments(prefix_cache_dir=str(tmp_path))
    model = SimpleNamespace(config=SimpleNamespace(_name_or_path="mine"))
    report: Any = SimpleNamespace(cuts=(("decoder", 2),))
    said: list[str] = []

    def tried(rows: int, epochs: float) -> bool:
        args = RunArguments(output_dir=str(tmp_path / "out"), num_train_epochs=epochs, precision="fp32")
        trainer: Any = SimpleNamespace(args=args, model=model)
        inputs: Any = SimpleNamespace(train=range(rows))
        try:
            return choose_cache(asked, trainer, report, inputs, said.append) != CacheChoice()
        except AttributeError as error:  # it goes on to the trainer's collator, and there is none here
            return "data_collator" in str(error)

    assert not tried(400, 1)
    assert "0 batches might gain by it" in said[-1]
    assert not tried(16, 2)
    assert "4 batches might gain by it" in said[-1]
    assert tried(64, 2)
    specs = (StreamSpec("hidden_states", "source", "float32", (8,)),)
    for name in ("other", "mine"):
        Store.create(tmp_path / name, {"cuts": [["decoder", 2]]}, specs, name).close()
        assert tried(400, 1) is (name == "mine")
        assert not tried(16, 2), "however much of it is there"
    (tmp_path / "mine" / MANIFEST).write_text("{")
    assert not tried(400, 1)


@pytest.mark.parametrize("grouped", [{}, {"group_by": "product"}])
def test_validation_rows_that_are_scored_are_never_called_test_rows(grouped: dict[str, str], tmp_path: Path) -> None:
    rows = "".join(f"p{n},Review {n} is long.,Summary {n}.\n" for n in range(12))
    (tmp_path / "train.csv").write_text(f"product,review,summary\n{rows}")
    (tmp_path / "test.csv").write_text("product,review,summary\nq,Another review.,Another.\n")
    scored_by_test_file = {}
    for test_file in (None, str(tmp_path / "test.csv")):
        asked = DataArguments(train_file=str(tmp_path / "train.csv"), test_file=test_file, **grouped)
        splits, scored = asked.read(seed=1)
        rows_used = {name: reviews.dataset for name, reviews in splits.items()}
        scored_by_test_file[test_file is not None] = asked.facts(rows_used, scored).scored
    assert scored_by_test_file == {False: "validation", True: "test"}


def test_a_model_goes_through_the_whole_recipe(whole_run: Run, tmp_path: Path) -> None:
    output, screen = whole_run.output, whole_run.screen
    values = results(output)
    assert values["prefix_cached"] is True
    assert values["batch_seconds"] > 0
    assert ", 0 training batches did not" in screen
    for metric in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        for prefix in ("test_", "zero_shot_", "baseline_"):
            assert 0.0 <= values[f"{prefix}{metric}"] <= 100.0
    assert values["frozen_unchanged"] is True
    assert values["train_seconds"] > 0
    losses = [row["loss"] for row in log_of(output) if "loss" in row]
    assert sum(losses[-3:]) / 3 < losses[0] - 0.2
    assert (output / "freeze_plan.json").exists()
    predictions = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [row["review"] for row in predictions] == shipped_reviews()["test"].dataset["review"][:4]
    assert {"reference", "before", "after"} <= set(predictions[0])
    card = ModelCard.load(output / "README.md")
    assert "What was frozen" in card.text
    assert round(values["test_rouge1"], 2) == card.data.eval_results[0].metric_value
    page = (output / "report.html").read_text()
    assert "Not in the folder" not in page
    assert "Forecast and measured" in page
    assert "://" not in page.partition("<main>")[0], "the page asks for nothing"
    order = [
        "frozen and trained",
        "Prefix cache, predicted:",
        "Training ",
        "With the prefix cache:",
        "Loss per token",
        "unchanged",
        "ROUGE-Lsum",
        "reference:",
        "hf-freeze summarize",
    ]
    places = [screen.index(text) for text in order]
    assert places == sorted(places)

    (tmp_path / "reviews.csv").write_text('id,review\n7,"Good mug, weak handle."\n8,Broke in a day.\n')
    summaries = tmp_path / "summaries.jsonl"
    assert summarized(output, tmp_path / "reviews.csv", summaries) == 0
    assert [json.loads(line)["id"] for line in summaries.read_text().splitlines()] == ["7", "8"]


def test_the_cache_changes_no_loss(whole_run: Run, tmp_path: Path) -> None:
    done = ran(RECIPE, *whole_run.given, "--cache_prefix=off", "--output_dir", tmp_path / "off")
    assert done.code == 0, done.err[-3000:]
    assert losses_of(whole_run.output) == pytest.approx(losses_of(tmp_path / "off"), rel=1e-4)


@pytest.mark.parametrize("kind", ["bart", "gpt2"])
def test_a_plan_without_a_prefix_is_told(kind: str, tmp_path: Path) -> None:
    given = ["--freeze_embeddings=false", "--tied_head=train", "--output_dir", tmp_path / "none"]
    given += ["--model_name_or_path", tiny_folder(kind, tmp_path), *TIED, "--max_test_rows=1", "--max_train_rows=24"]
    done = ran(RECIPE, *given)
    assert done.code == 0, done.err[-3000:]
    assert "note: no prefix cache: Nothing of this" in done.out


def test_stages_go_through_their_recipe_and_are_not_trained_twice(tmp_path: Path) -> None:
    output = tmp_path / "out"
    given = ["--model_name_or_path", tiny_folder("llama", tmp_path), "--output_dir", output, *TIED]
    given += ["--stages=1,1,2", "--num_train_epochs=1", "--prefix_cache_dir", tmp_path / "prefix"]
    other = ran(RECIPE, *given)
    assert other.code == 1
    assert "--stages 1,1,2 was asked for; stages have a recipe of their own. Start recipes/summarize_in" in other.err
    assert not output.exists()
    done = ran(STAGES, *given)
    assert done.code == 0, done.err[-3000:]
    assert "Stage 2 of 2: 2 blocks" in done.out
    assert "all there already" in done.out, "the first stage's pass took the second one's states"
    assert json.loads((output / "freeze_plan.json").read_text())["decoder_blocks"] == 2
    assert results(output)["frozen_unchanged"] is True
    assert results(output)["prefix_cached"] is True
    rouge = results(output)["test_rougeL"]
    again = ran(STAGES, *given, "--resume_from_checkpoint=last")
    assert again.code == 0, again.err[-3000:]
    assert "2 of 2 stages are done already" in again.out
    assert results(output)["test_rougeL"] == rouge


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_adapters_on_the_upper_blocks_are_saved_as_such_and_summarise_a_file(kind: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    given = ["--model_name_or_path", tiny_folder("llama", tmp_path), "--output_dir", output, *TIED]
    done = ran(RECIPE, *given, f"--upper={kind}", "--cache_prefix=on", "--prefix_cache_dir", tmp_path / "prefix")
    assert done.code == 0, done.err[-3000:]
    assert ", 0 training batches did not" in done.out
    saved = json.loads((output / "adapter_config.json").read_text())
    assert (saved["layers_to_transform"], saved["use_dora"]) == ([2, 3], kind == "dora")
    assert not (output / "model.safetensors").exists()
    (tmp_path / "reviews.csv").write_text('id,review\n7,"Good mug, weak handle."\n')
    assert summarized(output, tmp_path / "reviews.csv", tmp_path / "s.csv") == 0


def launched(*command: str, processes: int, **options: Any) -> subprocess.Popen[str]:
    """A recipe in processes of its own."""
    launcher = [sys.executable]
    if processes > 1:
        config = str(ROOT / "accelerate_config.yaml")
        launcher += ["-m", "accelerate.commands.launch", "--config_file", config, f"--num_processes={processes}"]
    return subprocess.Popen([*launcher, *command], text=True, env=os.environ | ENVIRONMENT, **options)


def wait_for_checkpoint(process: subprocess.Popen[str], output: Path) -> None:
    deadline = time.monotonic() + 300
    while not list(output.glob("checkpoint-*/hf_freeze_checkpoint.json")):
        assert process.poll() is None, "it ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.02)


UNHEARD: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(tmp_path: Path) -> None:
    given = ["--model_name_or_path", str(tiny_folder("llama", tmp_path)), *SMALL, "--save_only_trained=true"]
    given += ["--cache_prefix=on", "--prefix_cache_dir", str(tmp_path / "prefix")]
    whole, output = tmp_path / "whole", tmp_path / "killed"
    done = ran(RECIPE, *given, "--output_dir", whole)
    assert done.code == 0, done.err[-3000:]
    process = launched(RECIPE, *given, "--output_dir", str(output), processes=1, **UNHEARD)
    wait_for_checkpoint(process, output)
    process.kill()
    process.wait()
    assert not (output / "all_results.json").exists()
    done = ran(RECIPE, *given, "--output_dir", output, "--resume_from_checkpoint=last")
    assert done.code == 0, done.err[-3000:]
    assert "Going on from" in done.out
    told = [json.loads((folder / "run.json").read_text()) for folder in (whole, output)]
    assert ["batch_seconds" in each["measured"] for each in told] == [True, False], "some batches ran before"
    assert told[1]["notes"][-1] == "Seconds of training are those since it was resumed."
    losses = [[row["loss"] for row in log_of(folder) if "loss" in row] for folder in (whole, output)]
    assert losses[0] == losses[1]
    assert (whole / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    resuming = ["--output_dir", output, "--resume_from_checkpoint=last", "--freeze_decoder_blocks=1"]
    other = ran(RECIPE, *given, *resuming)
    assert other.code == 1
    assert "its plan differs (decoder_blocks was None, is 1)" in other.err


@pytest.mark.slow
def test_when_one_process_is_killed_the_others_stop_within_a_minute(tmp_path: Path) -> None:
    model = tiny_folder("llama", tmp_path)
    output = tmp_path / "out"
    given = ["--model_name_or_path", str(model), *SMALL, "--num_train_epochs=500", "--cache_prefix=off"]
    process = launched(RECIPE, *given, "--output_dir", str(output), processes=2, **UNHEARD)
    wait_for_checkpoint(process, output)
    family = psutil.Process(process.pid).children(recursive=True)
    ranks = {child.environ().get("RANK"): child for child in family if "summarize_reviews" in " ".join(child.cmdline())}
    ranks["1"].kill()
    assert process.wait(timeout=60) != 0
    assert not psutil.wait_procs(family, timeout=10)[1]


def on_two_ranks(fault: str, faulty: int, folder: Path, *given: str) -> list[tuple[int, str, str]]:
    """The recipe on two ranks that no launcher watches; what each returned and printed."""
    env = os.environ | ENVIRONMENT | {
        "FAULT": fault, "FAULTY_RANK": str(faulty), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.recipes.faulty_recipe",
               "--model_name_or_path", str(tiny_folder("llama", folder)),
               *SMALL, "--output_dir", str(folder / "out"), "--prefix_cache_dir", str(folder / "prefix")]  # fmt: skip
    ranks = [
        subprocess.Popen([*command, *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                         env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]  # fmt: skip
    try:
        printed = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, *texts) for rank, texts in zip(ranks, printed, strict=True)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("faulty", [0, 1])
def test_a_cache_that_one_rank_cannot_build_is_done_without_by_both(faulty: int, tmp_path: Path) -> None:
    ranks = on_two_ranks("full_disk", faulty, tmp_path)
    assert [code for code, _, _ in ranks] == [0, 0], ranks[1][2][-3000:]
    assert f"note: no prefix cache: Rank {faulty} of 2 could not compute the prefix: " in ranks[0][1]
    assert results(tmp_path / "out")["prefix_cached"] is False


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "message"), [
    ("full_disk", "error: Rank 1 of 2 could not compute the prefix: "),
    ("killed", "error: Rank 1 of 2 is gone, and rank 0 cannot go on without it: "),
])  # fmt: skip
def test_what_one_rank_of_the_recipe_fails_by_the_other_prints(fault: str, message: str, tmp_path: Path) -> None:
    ranks = on_two_ranks(fault, 1, tmp_path, "--cache_prefix=on")
    assert all(code != 0 for code, _, _ in ranks)
    assert message in ranks[0][2]
    assert "Traceback" not in ranks[0][2]


def test_fewer_rows_than_one_batch_train_with_a_warning(tmp_path: Path) -> None:
    given = ["--model_name_or_path", tiny_folder("llama", tmp_path), "--output_dir", tmp_path / "out", *SMALL]
    done = ran(RECIPE, *given, "--max_train_rows=3", "--max_test_rows=1")
    assert done.code == 0, done.err[-3000:]
    assert "3 training rows are fewer than one batch" in done.out


def test_two_processes_form_one_world_and_gather_in_order(tmp_path: Path) -> None:
    model = tiny_folder("llama", tmp_path)
    output = tmp_path / "out"
    given = ["--model_name_or_path", str(model), "--output_dir", str(output), *SMALL, "--num_train_epochs=1"]
    given += ["--cache_prefix=on", "--prefix_cache_dir", str(tmp_path / "prefix")]
    heard: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with launched(RECIPE, *given, processes=2, **heard) as process:
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    assert results(output)["world_size"] == 2
    assert results(output)["prefix_cached"] is True
    predictions = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [row["review"] for row in predictions] == shipped_reviews()["test"].dataset["review"][:4]
    assert out.count("Loss per token") == 1


def test_bad_input_reaches_the_shell_as_one_line_and_an_exit_code(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "all_results.json").write_text("{}")
    heard: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with launched(RECIPE, "--precision=fp32", "--output_dir", str(tmp_path / "used"), processes=1, **heard) as process:
        _, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert re.search(r"error: --output_dir .* holds another run", err)
    assert "Traceback" not in err
    assert (tmp_path / "used" / "all_results.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["bart", "llama", "gpt2"])
def test_the_configs_name_arguments_that_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr("hf_freeze.summarization.training.choose_precision", lambda *_: Precision("fp32", "not tried"))
    monkeypatch.setattr(sys, "argv", ["recipe", str(ROOT / "recipes" / "configs" / f"{name}.yaml")])
    model_args, *_ = parse_arguments()
    torch.set_num_threads(threads)
    assert isinstance(model_args.plan(), FreezePlan)


@pytest.mark.parametrize(
    "name", ["accelerate_config.yaml", *(f"recipes/configs/{n}.yaml" for n in ("fsdp2", "zero2", "zero3"))]
)
def test_accelerate_reads_the_launch_configs(name: str) -> None:
    config = load_config_from_file(str(ROOT / name))
    assert config.num_processes == 2
    assert config.mixed_precision == "bf16"


def test_the_sizes_of_deltas_are_measured(tmp_path: Path) -> None:
    recipe = str(ROOT / "recipes" / "benchmark_deltas.py")
    given = ["--model_name_or_path", tiny_folder("llama", tmp_path)]
    done = ran(recipe, *given, "--freeze_decoder_blocks=3", "--repetitions=1")
    assert done.code == 0, done.err[-3000:]
    assert "delta" in done.out
    assert "100.0%" in done.out
    assert "repetitions 0 was asked for" in ran(recipe, *given, "--repetitions=0").err
