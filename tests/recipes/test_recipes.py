"""The recipes as a user runs them: in processes of their own, on small random models."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from huggingface_hub import ModelCard

from hf_freeze.prefix.store import MANIFEST, Store, StreamSpec
from hf_freeze.summarization import shipped_reviews
from tests.recipes.scripts import load_script
from tests.tiny import tiny_folder

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "summarize_reviews.py")
SMALL = [
    "--max_train_rows=48", "--max_test_rows=4", "--num_train_epochs=4", "--learning_rate=1e-2", "--logging_steps=1",
    "--max_summary_tokens=16", "--tied_head=untie", "--per_device_eval_batch_size=32", "--precision=fp32",
    "--cpu_threads=1",
]  # fmt: skip


def run(*command: str, processes: int | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable]
    if processes:
        config = str(ROOT / "accelerate_config.yaml")
        launcher += ["-m", "accelerate.commands.launch", "--config_file", config, f"--num_processes={processes}"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run([*launcher, *command], capture_output=True, text=True, env=env, timeout=600, check=False)


def results(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text())


@pytest.fixture
def recipe() -> Any:
    """The recipe as a module."""
    return load_script(RECIPE)


def test_a_cache_that_cannot_pay_is_not_tried(recipe: Any, tmp_path: Path) -> None:
    asked = recipe.ModelArguments(prefix_cache_dir=str(tmp_path))
    model = SimpleNamespace(config=SimpleNamespace(_name_or_path="mine"))
    report = SimpleNamespace(cuts=(("decoder", 2),))
    said: list[str] = []

    def tried(rows: int, epochs: float) -> bool:
        args = recipe.RunArguments(output_dir=str(tmp_path / "out"), num_train_epochs=epochs, precision="fp32")
        encoded = {"train": SimpleNamespace(dataset=range(rows))}
        try:
            return recipe.build_cache(asked, args, model, report, None, encoded, said.append) != (None, None, 0.0)
        except AttributeError as error:  # it goes on to the trainer, and there is none here
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
def test_validation_rows_that_are_scored_are_never_called_test_rows(
    grouped: dict[str, str], tmp_path: Path, recipe: Any
) -> None:
    rows = "".join(f"p{n},Review {n} is long.,Summary {n}.\n" for n in range(12))
    (tmp_path / "train.csv").write_text(f"product,review,summary\n{rows}")
    (tmp_path / "test.csv").write_text("product,review,summary\nq,Another review.,Another.\n")
    found = {}
    for test_file in (None, str(tmp_path / "test.csv")):
        given = recipe.DataArguments(train_file=str(tmp_path / "train.csv"), test_file=test_file, **grouped)
        splits, scored = recipe.load_reviews(given, seed=1)
        rows_used = {name: reviews.dataset for name, reviews in splits.items()}
        found[test_file is not None] = recipe.describe_data(given, rows_used, scored).scored
    assert found == {False: "validation", True: "test"}


@pytest.mark.parametrize("kind", ["bart", "llama", "gpt2"])
def test_a_model_goes_through_the_whole_recipe(kind: str, tmp_path: Path) -> None:
    model = tiny_folder(kind, tmp_path)
    output = tmp_path / "out"
    cached = ["--cache_prefix=on", "--prefix_cache_dir", str(tmp_path / "prefix"), "--release_prefix=true"]
    done = run(RECIPE, "--model_name_or_path", str(model), "--output_dir", str(output), *SMALL, *cached)
    assert done.returncode == 0, done.stderr[-3000:]

    found = results(output)
    assert found["prefix_cached"] is True
    assert found["batch_seconds"] > 0
    assert ", 0 training batches did not" in done.stdout
    for metric in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        for prefix in ("test_", "zero_shot_", "baseline_"):
            assert 0.0 <= found[f"{prefix}{metric}"] <= 100.0
    assert found["frozen_unchanged"] is True
    assert found["train_seconds"] > 0
    losses = [
        row["loss"] for row in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in row
    ]
    assert sum(losses[-3:]) / 3 < losses[0] - 0.2
    assert (output / "freeze_plan.json").exists()
    predictions = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [row["review"] for row in predictions] == shipped_reviews()["test"].dataset["review"][:4]
    assert {"reference", "before", "after"} <= set(predictions[0])
    card = ModelCard.load(output / "README.md")
    assert "What was frozen" in card.text
    assert round(found["test_rouge1"], 2) == card.data.eval_results[0].metric_value
    page = (output / "report.html").read_text()
    assert "Not in the folder" not in page
    assert "Forecast and measured" in page
    assert "://" not in page.partition("<main>")[0], "the page asks for nothing"

    screen = done.stdout
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

    if kind == "bart":
        summaries = tmp_path / "summaries.jsonl"
        reviews = tmp_path / "reviews.csv"
        reviews.write_text('id,review\n7,"Good mug, weak handle."\n8,Broke in a day.\n')
        again = run(
            "-m", "hf_freeze.cli", "summarize", str(output), str(reviews), "-o", str(summaries), "--precision=fp32"
        )
        assert again.returncode == 0, again.stderr[-3000:]
        assert [json.loads(line)["id"] for line in summaries.read_text().splitlines()] == ["7", "8"]


@pytest.mark.parametrize("kind", ["bart", "gpt2"])
def test_the_cache_changes_no_loss_and_a_plan_without_a_prefix_is_told(kind: str, tmp_path: Path) -> None:
    model = tiny_folder(kind, tmp_path)
    losses = {}
    for choice in ("off", "on"):
        output = tmp_path / choice
        given = [f"--cache_prefix={choice}", "--prefix_cache_dir", str(tmp_path / "prefix")]
        given += ["--freeze_encoder_blocks=all"] if kind == "bart" else []
        done = run(RECIPE, "--model_name_or_path", str(model), "--output_dir", str(output), *SMALL, *given)
        assert done.returncode == 0, done.stderr[-3000:]
        log = json.loads((output / "trainer_state.json").read_text())["log_history"]
        losses[choice] = [row.get("loss", row.get("eval_loss")) for row in log if "loss" in row or "eval_loss" in row]
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-4)

    given = ["--freeze_embeddings=false", "--tied_head=train", "--output_dir", str(tmp_path / "none")]
    done = run(RECIPE, "--model_name_or_path", str(model), *given, *[o for o in SMALL if "tied" not in o])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "note: no prefix cache: Nothing of this" in done.stdout


def test_stages_go_through_the_recipe_and_are_not_trained_twice(tmp_path: Path) -> None:
    model = tiny_folder("llama", tmp_path)
    output = tmp_path / "out"
    given = ["--model_name_or_path", str(model), "--output_dir", str(output), *[o for o in SMALL if "tied" not in o]]
    given += ["--stages=1,1,2", "--num_train_epochs=1", "--prefix_cache_dir", str(tmp_path / "prefix")]
    done = run(RECIPE, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Stage 2 of 2: 2 blocks" in done.stdout
    assert "all there already" in done.stdout, "the first stage's pass took the second one's states"
    assert json.loads((output / "freeze_plan.json").read_text())["decoder_blocks"] == 2
    assert results(output)["frozen_unchanged"] is True
    rouge = results(output)["test_rougeL"]
    again = run(RECIPE, *given, "--resume_from_checkpoint=last")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "2 of 2 stages are done already" in again.stdout
    assert results(output)["test_rougeL"] == rouge


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_adapters_on_the_upper_blocks_are_saved_as_such_and_summarise_a_file(kind: str, tmp_path: Path) -> None:
    model = tiny_folder("llama", tmp_path)
    output = tmp_path / "out"
    given = ["--model_name_or_path", str(model), "--output_dir", str(output), *[o for o in SMALL if "tied" not in o]]
    given += [f"--upper={kind}", "--cache_prefix=on", "--prefix_cache_dir", str(tmp_path / "prefix")]
    done = run(RECIPE, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ", 0 training batches did not" in done.stdout
    saved = json.loads((output / "adapter_config.json").read_text())
    assert (saved["layers_to_transform"], saved["use_dora"]) == ([2, 3], kind == "dora")
    assert not (output / "model.safetensors").exists()
    reviews = tmp_path / "reviews.csv"
    reviews.write_text('id,review\n7,"Good mug, weak handle."\n')
    again = run(
        "-m", "hf_freeze.cli", "summarize", str(output), str(reviews), "-o", str(tmp_path / "s.csv"), "--precision=fp32"
    )
    assert again.returncode == 0, again.stderr[-3000:]


def launched(*command: str, processes: int) -> subprocess.Popen[str]:
    """A run in the background."""
    launcher = [sys.executable]
    if processes > 1:
        config = str(ROOT / "accelerate_config.yaml")
        launcher += ["-m", "accelerate.commands.launch", "--config_file", config, f"--num_processes={processes}"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([*launcher, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)


def wait_for_checkpoint(process: subprocess.Popen[str], output: Path) -> None:
    deadline = time.monotonic() + 300
    while not list(output.glob("checkpoint-*/hf_freeze_checkpoint.json")):
        assert process.poll() is None, "it ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(tmp_path: Path) -> None:
    model = tiny_folder("llama", tmp_path)
    given = ["--model_name_or_path", str(model), *SMALL, "--save_only_trained=true", "--cache_prefix=on"]
    given += ["--prefix_cache_dir", str(tmp_path / "prefix")]
    whole, output = tmp_path / "whole", tmp_path / "killed"
    done = run(RECIPE, *given, "--output_dir", str(whole))
    assert done.returncode == 0, done.stderr[-3000:]
    process = launched(RECIPE, *given, "--output_dir", str(output), processes=1)
    wait_for_checkpoint(process, output)
    process.kill()
    process.wait()
    assert not (output / "all_results.json").exists()
    done = run(RECIPE, *given, "--output_dir", str(output), "--resume_from_checkpoint=last")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Going on from" in done.stdout
    told = [json.loads((folder / "run.json").read_text()) for folder in (whole, output)]
    assert ["batch_seconds" in each["measured"] for each in told] == [True, False], "some batches ran before"
    assert told[1]["notes"][-1] == "Seconds of training are those since it was resumed."
    states = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (whole, output)]
    losses = [[row["loss"] for row in state if "loss" in row] for state in states]
    assert losses[0] == losses[1]
    assert (whole / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    other = run(
        RECIPE, *given, "--output_dir", str(output), "--resume_from_checkpoint=last", "--freeze_decoder_blocks=1"
    )
    assert other.returncode != 0
    assert "its plan differs (decoder_blocks was None, is 1)" in other.stderr


def test_when_one_process_is_killed_the_others_stop_within_a_minute(tmp_path: Path) -> None:
    model = tiny_folder("llama", tmp_path)
    output = tmp_path / "out"
    given = ["--model_name_or_path", str(model), *SMALL, "--num_train_epochs=500", "--cache_prefix=off"]
    process = launched(RECIPE, *given, "--output_dir", str(output), processes=2)
    wait_for_checkpoint(process, output)
    family = psutil.Process(process.pid).children(recursive=True)
    ranks = {child.environ().get("RANK"): child for child in family if "summarize_reviews" in " ".join(child.cmdline())}
    ranks["1"].kill()
    assert process.wait(timeout=60) != 0
    assert not psutil.wait_procs(family, timeout=10)[1]


def on_two_ranks(fault: str, faulty: int, folder: Path, *given: str) -> list[tuple[int, str, str]]:
    """The recipe on two ranks that no launcher watches; what each returned and printed."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "FAULT": fault,
                        "FAULTY_RANK": str(faulty), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                        "PYTHONPATH": str(ROOT)}  # fmt: skip
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
    model = tiny_folder("llama", tmp_path)
    done = run(
        RECIPE, "--model_name_or_path", str(model), "--output_dir", str(tmp_path / "out"), *SMALL, "--max_train_rows=3"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 training rows are fewer than one batch" in done.stdout


def test_two_processes_form_one_world_and_gather_in_order(tmp_path: Path) -> None:
    model = tiny_folder("llama", tmp_path)
    output = tmp_path / "out"
    cached = ["--cache_prefix=on", "--prefix_cache_dir", str(tmp_path / "prefix")]
    done = run(RECIPE, "--model_name_or_path", str(model), "--output_dir", str(output), *SMALL, *cached, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(output)["world_size"] == 2
    assert results(output)["prefix_cached"] is True
    predictions = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [row["review"] for row in predictions] == shipped_reviews()["test"].dataset["review"][:4]
    assert done.stdout.count("Loss per token") == 1


def test_bad_input_reaches_the_shell_as_one_line_and_an_exit_code(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "all_results.json").write_text("{}")
    done = run(RECIPE, "--precision=fp32", "--output_dir", str(tmp_path / "used"))
    assert done.returncode == 1
    assert re.search(r"error: --output_dir .* holds another run", done.stderr)
    assert "Traceback" not in done.stderr
    assert (tmp_path / "used" / "all_results.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["bart", "llama", "gpt2"])
def test_the_configs_name_arguments_that_exist(name: str) -> None:
    code = (
        "import sys; sys.path.insert(0, 'recipes'); import summarize_reviews as r; "
        f"sys.argv = ['r', 'recipes/configs/{name}.yaml']; m, d, t = r.parse_arguments(); print(m.plan())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "FreezePlan(" in done.stdout


@pytest.mark.parametrize(
    "name", ["accelerate_config.yaml", *(f"recipes/configs/{n}.yaml" for n in ("fsdp2", "zero2", "zero3"))]
)
def test_accelerate_reads_the_launch_configs(name: str) -> None:
    config = load_config_from_file(str(ROOT / name))
    assert config.num_processes == 2
    assert config.mixed_precision == "bf16"


def test_the_sizes_of_deltas_are_measured(tmp_path: Path) -> None:
    model = tiny_folder("llama", tmp_path)
    command = [str(ROOT / "recipes" / "benchmark_deltas.py"), "--model_name_or_path", str(model)]
    done = run(*command, "--freeze_decoder_blocks=3", "--repetitions=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "delta" in done.stdout
    assert "100.0%" in done.stdout
    assert "repetitions 0 was asked for" in run(*command, "--repetitions=0").stderr
