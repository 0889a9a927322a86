"""Every command and recipe with what a user may get wrong: one sentence, an exit code, no traceback, nothing written.

The programs run in this process, with their arguments; a traceback would be an exception here.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from hf_freeze import FreezeError, cli
from hf_freeze.cli import exit_code, worded_arguments
from tests.recipes.scripts import load_script
from tests.tiny import tiny_folder

RECIPES = Path(__file__).parents[2] / "recipes"
MODEL_FAULTS: dict[str, Callable[[Path], object]] = {
    "config-damaged": lambda folder: (folder / "config.json").write_text('{"model_type": "lla'),
    "config-empty": lambda folder: (folder / "config.json").write_text(""),
    "config-list": lambda folder: (folder / "config.json").write_text("[]"),
    "config-strange": lambda folder: (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}'),
    "config-unknown": lambda folder: (folder / "config.json").write_text('{"model_type": "no-such"}'),
    "config-binary": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"),
    "weights-cut": lambda folder: _cut(folder / "model.safetensors"),
    "weights-empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "weights-noise": lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 5000),
    "weights-gone": lambda folder: (folder / "model.safetensors").unlink(),
    "weights-of-others": lambda folder: _edit(folder / "config.json", '"hidden_size": 32', '"hidden_size": 64'),
    "generation-damaged": lambda folder: (folder / "generation_config.json").write_text("{"),
    "tokenizer-gone": lambda folder: [path.unlink() for path in folder.glob("token*")],
    "tokenizer-cut": lambda folder: _cut(folder / "tokenizer.json"),
    "tokenizer-empty": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "tokenizer-noise": lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\x00"),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the arguments name, under short names."""
    folder = tmp_path_factory.mktemp("given")
    tiny_folder("llama", folder)
    for name, damage in MODEL_FAULTS.items():
        shutil.copytree(folder / "llama", folder / name)
        damage(folder / name)
    rows = "".join(f"Review {n} of a mug.,Mug {n}\n" for n in range(20))
    (folder / "in.csv").write_text(f"review,summary\n{rows}")
    (folder / "bad.csv").write_text("review,summary\na,b,c\n")
    (folder / "bad.parquet").write_bytes(b"PAR1" + b"\0" * 50 + b"PAR1")
    (folder / "file").write_text("x")
    (folder / "empty").mkdir()
    (folder / "used").mkdir()
    (folder / "used" / "all_results.json").write_text("{}")
    for name, text in {
        "list.yaml": "- 1\n", "broken.yaml": "a: [1\n", "broken.json": "{", "stages.yaml": "stages: 3\n",
        "unknown.yaml": "precision: fp32\nno_such_option: 1\n",
        "typed.yaml": "precision: fp32\nnum_train_epochs: many\n",
    }.items():  # fmt: skip
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def told(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, list[str]], tuple[int, str]]:
    """Runs a program and returns its exit code and what it said on stderr."""
    monkeypatch.setenv("HF_FREEZE_CACHE", str(tmp_path / "caches"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(program: str, words: list[str]) -> tuple[int, str]:
        filled = [word.format(g=given, t=tmp_path) for word in words]
        trains = program in ("sweep", "summarize_reviews.py", "summarize_in_stages.py", "advise_plan.py")
        if trains and filled[0].startswith("--") and "--precision" not in filled:
            filled += ["--precision", "fp32"]  # no probe of what is faster
        if program.endswith(".py"):
            recipe: Any = load_script(RECIPES / program)
            monkeypatch.setattr(sys, "argv", [program, *filled])
            code = exit_code(recipe.main)
        else:
            code = cli.main([program, *filled])
        return code, capsys.readouterr().err

    return run


def check(code: int, said: str, message: str, expected: int = 1) -> None:
    lines = [line for line in said.strip().split("\n") if line and "Loading weights" not in line]
    assert code == expected, said
    assert re.search(message, said), said
    assert "Traceback" not in said
    if expected == 1:
        assert lines[-1].startswith("error: "), said


QUIET = ["--summary_column", "short", "--precision", "fp32", "--cpu_threads", "1", "--quiet"]
SUMMARIZE = ["{g}/in.csv", "-o", "{t}/o.csv", *QUIET]
WRONG: list[tuple[str, list[str], str]] = [
    # what is to be read
    ("summarize", ["{g}/llama", "{g}/no.csv", *SUMMARIZE[1:]], "No file or folder"),
    ("summarize", ["{g}/llama", "{g}/empty", *SUMMARIZE[1:]], "it holds no files"),
    ("summarize", ["{g}/llama", "{g}/bad.parquet", *SUMMARIZE[1:]], "is not a Parquet file, or its metadata"),
    ("summarize", ["{g}/llama", "/dev/null", *SUMMARIZE[1:]], "neither a file nor a folder"),
    ("summarize", ["{g}/file", *SUMMARIZE], "there is no such folder"),
    ("summarize", ["{g}/llama", "{g}/in.csv", "-o", "{g}/file/o.csv", "--summary_column", "s"],
        r"file/o\.csv.partial could not be written: "),
    ("sweep", ["--train_file", "{g}/no.csv"], "No file or folder"),
    ("sweep", ["--train_file", "{g}/bad.csv"], "line 2 has 3 cells"),
    ("sweep", ["--train_file", "{g}/in.csv", "--text_column", "reviw"], "nearest: 'review'"),
    ("sweep", ["--train_file", "{g}/in.csv", "--model_name_or_path", "{g}/none"], "there is no such folder"),
    ("sweep", ["--train_file", "{g}/in.csv", "--depths", "a"], "use numbers with commas"),
    ("sweep", ["--eval_strategy", "nonsense"], "These arguments cannot be taken: .*nonsense"),
    ("sweep", ["--draw_only", "--output_dir", "{g}/empty"], "no sweep|runs|sweep"),
    ("inspect", ["{g}/file"], "there is no such folder"),
    ("inspect", ["{g}/llama", "--dtype", "float7"], "float7"),
    ("inspect", ["{g}/llama", "--freeze_decoder_blocks", "many"], "'many'"),
    ("inspect", ["{g}/llama", "--epochs", "0"], "epochs"),
    ("merge", ["{g}/llama", "-o", "{t}/merged"], "delta"),
    ("merge", ["{g}/llama", "-o", "{g}/used"], "holds something"),
    ("summarize_reviews.py", ["--train_file", "{g}/no.csv"], "No file or folder"),
    ("summarize_reviews.py", ["--train_file", "{g}/in.csv", "--text_column", "txt"], "txt"),
    ("summarize_reviews.py", ["--train_file", "{g}/bad.csv"], "line 2 has 3 cells"),
    ("summarize_reviews.py", ["--dataset_name", "no/such-data"], "--dataset_name no/such-data was asked for"),
    ("summarize_reviews.py", ["--model_name_or_path", "no/such-model"], "no/such-model was given as model"),
    ("summarize_reviews.py", ["--output_dir", "{g}/used"], "another run"),
    ("summarize_reviews.py", ["--output_dir", "{g}/file"], "no folder can be made there"),
    ("summarize_reviews.py", ["--cache_prefix", "maybe"], "auto, on or off"),
    ("summarize_reviews.py", ["--test_file", "{g}/in.csv"], "without --train_file"),
    ("summarize_reviews.py", ["--upper", "qlora"], "full, lora or dora"),
    ("summarize_reviews.py", ["--stages", "4,4,3"], "summarize_in_stages.py with the same arguments"),
    ("summarize_in_stages.py", ["--model_name_or_path", "{g}/llama"], "--stages was not given"),
    ("summarize_in_stages.py", ["--model_name_or_path", "{g}/llama", "--stages", "4;4"], "use start,step,stages"),
    ("summarize_in_stages.py", ["--stages", "4,4,3", "--freeze_decoder_blocks", "2"], "Leave the others out"),
    ("summarize_in_stages.py", ["--stages", "4,4,3", "--resume_from_checkpoint", "a/b"], "takes only last with"),
    ("summarize_in_stages.py", ["--stages", "4,4,3", "--max_steps", "2"], "a stage trains for --num_train_epochs"),
    ("summarize_in_stages.py", ["--model_name_or_path", "{g}/llama", "--stages", "{g}/no.yaml"], "no.yaml"),
    ("summarize_in_stages.py", ["--model_name_or_path", "{g}/llama", "--stages", "{g}/broken.yaml"], "broken.yaml"),
    ("summarize_in_stages.py", ["--model_name_or_path", "{g}/llama", "--stages", "{g}/stages.yaml"], "stages.yaml"),
    ("summarize_reviews.py", ["--resume_from_checkpoint", "last"], "without --output_dir"),
    ("summarize_reviews.py", ["--model_name_or_path", "{g}/llama", "--freeze_decoder_blocks", "many"], "'many'"),
    ("summarize_reviews.py", ["--model_name_or_path", "{g}/llama", "--freeze_decoder_blocks", "99"], "has 4"),
    ("summarize_reviews.py", ["--model_name_or_path", "{g}/llama", "--prompt_template", "no mark"], "review"),
    ("summarize_reviews.py", ["--eval_strategy", "nonsense"], "These arguments cannot be taken: .*nonsense"),
    ("summarize_reviews.py", ["--no_such_option", "1"], "These arguments cannot be taken: .*no_such_option"),
    ("summarize_reviews.py", ["{g}/no.yaml"], "no.yaml: No such file"),
    ("summarize_reviews.py", ["{g}/list.yaml"], "These arguments cannot be taken"),
    ("summarize_reviews.py", ["{g}/broken.yaml"], "These arguments cannot be taken"),
    ("summarize_reviews.py", ["{g}/unknown.yaml"], "These arguments cannot be taken: .*no_such_option"),
    ("summarize_reviews.py", ["{g}/typed.yaml"], "num_train_epochs 'many' was asked for; it is a number"),
    ("summarize_reviews.py", ["{g}/broken.json"], "These arguments cannot be taken"),
    ("advise_plan.py", ["--model_name_or_path", "{g}/none"], "there is no such folder"),
    ("advise_plan.py", ["--model_name_or_path", "{g}/llama", "--train_file", "{g}/no.csv"], "No file or folder"),
    ("advise_plan.py", ["--model_name_or_path", "{g}/llama", "--depths", "a"], "use numbers with commas"),
    ("advise_plan.py", ["--model_name_or_path", "{g}/llama", "--precision", "fp8"], "fp8"),
    ("advise_plan.py", ["--model_name_or_path", "{g}/llama", "--device", "nowhere"], "nowhere"),
    ("advise_plan.py", ["--model_name_or_path", "{g}/llama", "--steps", "0"], "steps"),
    ("advise_plan.py", ["--model_name_or_path", "{g}/llama", "--output_dir", "{g}/file"], "file"),
    ("inspect_layers.py", ["--text_file", "{g}/no.csv"], "No file or folder"),
    ("inspect_layers.py", ["--model_name_or_path", "{g}/none"], "there is no such folder"),
    ("inspect_layers.py", ["--output_dir", "{g}/file/x"], "file"),
    ("inspect_layers.py", ["--max_texts", "0"], "use 1 or more"),
    ("inspect_layers.py", ["--model_name_or_path", "{g}/llama", "--compare_to", "{g}/none"], "there is no such folder"),
    ("inspect_layers.py", ["--no_such_option", "1"], "These arguments cannot be taken: .*no_such_option"),
    ("benchmark_deltas.py", ["--model_name_or_path", "{g}/none"], "there is no such folder"),
    ("benchmark_deltas.py", ["--model_name_or_path", "{g}/llama", "--freeze_decoder_blocks", "many"], "'many'"),
    ("benchmark_deltas.py", ["--repetitions", "0"], "use 1 or more"),
    ("benchmark_freezing.py", ["--toy", "--depths", "a"], "use numbers with commas"),
    ("benchmark_freezing.py", ["--toy", "--freeze_decoder_blocks", "many"], "'many'"),
    ("benchmark_freezing.py", ["--toy", "--modes", "fast"], "--modes fast"),
    ("benchmark_freezing.py", ["--toy", "--device", "nowhere"], "nowhere"),
    ("benchmark_freezing.py", ["--toy", "--cache_dir", "{g}/file"], "file"),
    ("classify_images.py", ["--model", "no/such-model"], "--model no/such-model was asked for; it cannot be loaded"),
    ("classify_images.py", ["--model", "{g}/llama"], "cannot be loaded here"),
    ("classify_images.py", ["--image_size", "8"], "Use 32 or more"),
    ("classify_images.py", ["--weights", "{g}/no.pt"], "no.pt"),
    ("classify_images.py", ["--weights", "{g}/file"], "file"),
    ("classify_images.py", ["--frozen", "99"], "use 2 to"),
    ("classify_images.py", ["--max_train_rows", "0"], "max_train_rows"),
]  # fmt: skip


@pytest.mark.parametrize(("program", "words", "message"), WRONG, ids=[f"{p}-{' '.join(w)}" for p, w, _ in WRONG])
def test_a_mistake_is_a_sentence(
    program: str, words: list[str], message: str, told: Callable[[str, list[str]], tuple[int, str]]
) -> None:
    check(*told(program, words), message)
    assert not list(Path.cwd().glob("out/summaries-*")), "a run that ended before it began leaves no folder"


LOADERS = {
    "summarize": ["{fault}", *SUMMARIZE],
    "inspect": ["{fault}"],
    "sweep": ["--model_name_or_path", "{fault}", "--train_file", "{g}/in.csv", "--precision", "fp32"],
    "summarize_reviews.py": ["--model_name_or_path", "{fault}", "--precision", "fp32"],
    "benchmark_deltas.py": ["--model_name_or_path", "{fault}", "--repetitions", "1"],
    "inspect_layers.py": ["--model_name_or_path", "{fault}"],
    "advise_plan.py": ["--model_name_or_path", "{fault}"],
}
WITHOUT_GENERATION = ("inspect",)
WITHOUT_TOKENIZER = ("inspect", "benchmark_deltas.py")  # they read none


@pytest.mark.parametrize(
    "program", [name if name == "summarize" else pytest.param(name, marks=pytest.mark.slow) for name in LOADERS]
)
@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_a_damaged_model_folder_is_a_sentence(
    fault: str, program: str, told: Callable[[str, list[str]], tuple[int, str]]
) -> None:
    if fault.startswith("tokenizer") and program in WITHOUT_TOKENIZER:
        pytest.skip("no tokenizer is read")
    if fault == "weights-gone" and program == "inspect":
        pytest.skip("it reads the config alone then, and says so")
    if fault == "generation-damaged" and program in WITHOUT_GENERATION:
        pytest.skip("no such settings are read")
    words = [word.replace("{fault}", f"{{g}}/{fault}") for word in LOADERS[program]]
    check(*told(program, words), rf"{fault} was (given as model|asked for)")


def test_what_stops_a_program_is_told_by_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def stop(error: BaseException) -> Callable[[], None]:
        def program() -> None:
            raise error

        return program

    for error, code, message in (
        (FreezeError("It was not so."), 1, "error: It was not so.\n"),
        (OSError(28, "No space left on device", "out/a"), 1, "error: out/a: No space left on device\n"),
        (torch.OutOfMemoryError("CUDA"), 1, "error: There is too little memory for this. Give fewer rows at once"),
        (MemoryError(), 1, "error: There is too little memory for this."),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(2), 2, ""),
        (SystemExit("why"), 1, "why\n"),
    ):
        assert exit_code(stop(error)) == code
        assert capsys.readouterr().err.startswith(message)
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        exit_code(stop(ZeroDivisionError()))


def test_arguments_that_cannot_be_taken_are_one_line() -> None:
    with pytest.raises(FreezeError, match=r"^These arguments cannot be taken: a b\. --help lists"), worded_arguments():
        raise ValueError("a\n  b.")
    with pytest.raises(FreezeError, match=r"^Ours stays"), worded_arguments():
        raise FreezeError("Ours stays.")
