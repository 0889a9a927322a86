"""The commands as a user types them: what they print, write and return, and one line for every mistake."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hf_freeze import FreezePlan, PrefixCache, freeze, save_delta
from hf_freeze.cli import COMMANDS, doctor, main
from hf_freeze.summarization import generate_summaries, load_prompt
from tests.delta.cases import edit
from tests.tiny import tiny_folder, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
ROWS = [{"id": str(n), "product": f"p{n % 3}", "review": f"Mug {n} is good." if n % 4 else ""} for n in range(10)]
SMALL = ["--max_new_tokens", "4", "--precision", "fp32", "--cpu_threads", "1", "--quiet"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_FREEZE_CACHE", str(tmp_path / "caches"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of each kind that a user may have, and a file of reviews."""
    path = tmp_path_factory.mktemp("models")
    for kind in ("llama", "bart"):
        tiny_folder(kind, path)
    model = AutoModelForCausalLM.from_pretrained(path / "llama", dtype=torch.float32)
    freeze(model, FreezePlan(decoder_blocks=3))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    save_delta(model, path / "delta")
    with (path / "in.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(ROWS)
    return path


class Ran:
    """What a command line gave."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *words: object) -> None:
        capsys.readouterr()
        self.code = main([str(word) for word in words])
        self.out, self.err = capsys.readouterr()

    @property
    def values(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def ran(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    return lambda *words: Ran(capsys, *words)


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


# ---------------------------------------------------------------------------------------------------------------------
# Any command


def test_help_names_every_command_and_each_command_has_examples(ran: Callable[..., Ran]) -> None:
    overview = ran("--help")
    assert overview.code == 0
    for name in COMMANDS:
        assert f"  {name} " in overview.out
        told = ran(name, "--help")
        assert told.code == 0
        assert f"  hf-freeze {name}" in told.out, "an example"
        assert "--json" in told.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sumarize", "x"], "'sumarize' is no command; nearest: 'summarize'"),
        ([], "usage: hf-freeze COMMAND"),
        (["summarize", "m", "r.csv", "-o", "o.csv", "--text_colum", "x"], "--text_colum is not known; nearest: "),
        (["summarize", "m"], "the following arguments are required: reviews, -o/--output"),
        (["summarize", "m", "r.csv", "-o", "o.csv", "--batch_size", "x"], "invalid int value: 'x'"),
        (["cache", "drop"], "invalid choice: 'drop'"),
        (["cache"], "the following arguments are required: list|clear"),
        (["doctor", "now"], "now is not known"),
    ],
)  # fmt: skip
def test_wrong_usage_ends_with_code_2_and_the_nearest(words: list[str], message: str, ran: Callable[..., Ran]) -> None:
    done = ran(*words)
    assert done.code == 2
    assert message in done.err
    assert done.out == ""


def test_the_exit_code_reaches_the_shell_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    command = [sys.executable, "-m", "hf_freeze.cli"]
    words = ["inspect", str(tmp_path / "x")]
    done = subprocess.run([*command, *words], capture_output=True, text=True, env=environment(), cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1, "no traceback"


def test_an_interrupt_ends_with_code_130(ran: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupted)
    done = ran("doctor")
    assert (done.code, done.err) == (130, "interrupted\n")


def test_what_the_system_refuses_is_one_line(ran: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/a/file")

    monkeypatch.setattr(doctor, "run", refused)
    done = ran("doctor")
    assert (done.code, done.err) == (1, "error: /a/file: Permission denied\n")


def test_json_stands_alone_on_stdout_whatever_is_printed_on_the_way(
    ran: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = doctor.run

    def noisy(args: Any, say: Any) -> Any:
        print("loading")
        say("a message")
        return run(args, say)

    monkeypatch.setattr(doctor, "run", noisy)
    done = ran("doctor", "--json")
    assert done.values["ok"] is True
    assert "loading\na message\n" in done.err


# ---------------------------------------------------------------------------------------------------------------------
# summarize


def test_summarize_writes_what_the_model_generates_beside_every_column(
    folder: Path, tmp_path: Path, ran: Callable[..., Ran]
) -> None:
    done = ran("summarize", folder / "bart", folder / "in.csv", "-o", tmp_path / "out.csv", *SMALL)
    assert done.code == 0, done.err
    assert "7 summaries in" in done.out
    assert "3 more without a summary" in done.out
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{name: row[name] for name in ROWS[0]} for row in rows] == ROWS
    assert not any(row["summary"] for row in rows if not row["review"])


def test_summarize_takes_a_delta_by_its_base_and_tells_json(
    folder: Path, tmp_path: Path, ran: Callable[..., Ran]
) -> None:
    done = ran("summarize", folder / "delta", folder / "in.csv", "-o", tmp_path / "out.jsonl", "--json", *SMALL)
    assert done.code == 0, done.err
    assert (done.values["rows"], done.values["blank"], done.values["text_column"]) == (10, 3, "review")
    summaries = [json.loads(line)["summary"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    assert ran("merge", folder / "delta", "-o", tmp_path / "merged").code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    prompt, _ = load_prompt(tokenizer, model.config, tmp_path / "merged")
    wanted = generate_summaries(
        model, tokenizer, [row["review"] for row in ROWS], prompt=prompt, max_new_tokens=4, progress=False
    )
    assert summaries == wanted


def test_summarize_takes_adapters_by_their_base(folder: Path, tmp_path: Path, ran: Callable[..., Ran]) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapters")
    tiny_tokenizer("llama").save_pretrained(tmp_path / "adapters")
    done = ran("summarize", tmp_path / "adapters", folder / "in.csv", "-o", tmp_path / "out.jsonl", *SMALL)
    assert done.code == 0, done.err
    summaries = [json.loads(line)["summary"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    reviews = [row["review"] for row in ROWS]
    prompt, _ = load_prompt(tiny_tokenizer("llama"), base.config, tmp_path / "adapters")
    options: dict[str, Any] = {"prompt": prompt, "max_new_tokens": 4, "progress": False}
    assert summaries == generate_summaries(model, tiny_tokenizer("llama"), reviews, **options)

    alone = ran("inspect", tmp_path / "adapters")
    assert alone.code == 1
    assert f"it holds adapters only. Give the base that they are for: {folder / 'llama'}." in alone.err

    config = tmp_path / "adapters" / "adapter_config.json"
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "adapter_config.json").write_text("{")
    damaged = ran("inspect", tmp_path / "damaged")
    assert damaged.code == 1
    assert f"{tmp_path / 'damaged'} was given as model; it cannot be loaded here: Expecting" in damaged.err

    config.write_text(config.read_text().replace(str(folder / "llama"), str(tmp_path / "gone" / "base")))
    lost = ran("summarize", tmp_path / "adapters", folder / "in.csv", "-o", tmp_path / "other.jsonl", *SMALL)
    assert lost.code == 1
    assert f"{tmp_path / 'gone' / 'base'} was given as model; it cannot be loaded" in lost.err


def test_summarize_groups_by_a_column(folder: Path, tmp_path: Path, ran: Callable[..., Ran]) -> None:
    words = ["summarize", folder / "llama", folder / "in.csv", "-o", tmp_path / "out.csv", "--group_by", "product"]
    done = ran(*words, *SMALL)
    assert done.code == 0, done.err
    assert "3 groups from 10 rows" in done.out
    with (tmp_path / "out.csv").open(newline="") as file:
        assert [(row["product"], row["review_count"]) for row in csv.DictReader(file)] == [
            ("p0", "3"), ("p1", "2"), ("p2", "2"),
        ]  # fmt: skip


def test_summarize_goes_on_in_the_precision_in_which_it_began(
    folder: Path, tmp_path: Path, ran: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_freeze.cli import summarize

    args = summarize.argparse.Namespace(output=str(tmp_path / "out.csv"), precision="auto")
    assert summarize._asked_precision(args) == "auto"
    for noted, asked in (("float32", "fp32"), ("bfloat16", "bf16"), ("bf16", "bf16")):
        (tmp_path / "out.csv.partial").mkdir(exist_ok=True)
        (tmp_path / "out.csv.partial" / "run.json").write_text(json.dumps({"facts": {"precision": noted}}))
        assert summarize._asked_precision(args) == asked
        assert summarize._asked_precision(summarize.argparse.Namespace(**{**vars(args), "precision": "fp32"})) == "fp32"


BROKEN = "id,review\n1,a\n2,b,c\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{f}/llama", "{f}/missing.csv", "-o", "{t}/o.csv"], "No file or folder"),
        (["{f}/llama", "{f}/in.csv", "-o", "{f}/in.csv"], "which is the input"),
        (["{f}/llama", "{f}/in.csv", "-o", "{t}/o.xlsx"], "written are .csv, .tsv and .jsonl"),
        (["{f}/llama", "{f}/in.csv", "-o", "{t}/o.csv", "--text_column", "reviw"], "nearest: 'review'"),
        (["{f}/llama", "{f}/in.csv", "-o", "{t}/o.csv", "--group_by", "produkt"], "nearest: 'product'"),
        (["{f}/llama", "{f}/in.csv", "-o", "{t}/o.csv", "--summary_column", "id"], "which the input has already"),
        (["{f}/llama", "{f}/in.csv", "-o", "{t}/o.csv", "--batch_size", "0"], "--batch_size 0 was asked for"),
        (["{f}/llama", "{f}/in.csv", "-o", "{t}/o.csv", "--base_model", "x"], "is no delta"),
        (["{f}/llama", "{t}/broken.csv", "-o", "{t}/o.csv"], "broken.csv, line 3 has 3 cells"),
        (["{f}/llama", "{t}/empty.csv", "-o", "{t}/o.csv"], "is empty (0 bytes)"),
        (["{t}/no-model", "{f}/in.csv", "-o", "{t}/o.csv"], "there is no config.json in it, but notes.txt"),
        (["{t}/nowhere", "{f}/in.csv", "-o", "{t}/o.csv"], "there is no such folder"),
        (["no/such-model", "{f}/in.csv", "-o", "{t}/o.csv"], "no/such-model was given as model; it cannot be loaded"),
        (["{t}/damaged", "{f}/in.csv", "-o", "{t}/o.csv"], "damaged was given as model; it cannot be loaded"),
        (["{t}/no-tokenizer", "{f}/in.csv", "-o", "{t}/o.csv"], "its tokenizer cannot be read"),
        (["{t}/bad-prompt", "{f}/in.csv", "-o", "{t}/o.csv"], "summary_prompt.json that is damaged"),
        (["{t}/orphan", "{f}/in.csv", "-o", "{t}/o.csv"], "--base_model of hf-freeze says where"),
    ],
)
def test_a_mistake_in_summarize_is_one_line_and_writes_nothing(
    words: list[str], message: str, folder: Path, tmp_path: Path, ran: Callable[..., Ran]
) -> None:
    (tmp_path / "broken.csv").write_text(BROKEN)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "no-model").mkdir()
    (tmp_path / "no-model" / "notes.txt").write_text("x")
    for name in ("damaged", "no-tokenizer", "bad-prompt"):
        shutil.copytree(folder / "llama", tmp_path / name)
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "bad-prompt" / "summary_prompt.json").write_text("{")
    for path in (tmp_path / "no-tokenizer").glob("token*"):
        path.unlink()
    shutil.copytree(folder / "delta", tmp_path / "orphan")
    edit(tmp_path / "orphan", lambda values: values.update(base=str(tmp_path / "gone")))
    before = sorted(tmp_path.rglob("*"))
    reviews = (folder / "in.csv").read_bytes()
    done = ran("summarize", *[word.format(f=folder, t=tmp_path) for word in words], *SMALL)
    assert done.code == 1
    lines = [line for line in done.err.strip().split("\n") if "Loading weights" not in line]
    assert len(lines) == 1, done.err
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before
    assert (folder / "in.csv").read_bytes() == reviews


def test_too_little_memory_says_how_to_go_on(
    folder: Path, tmp_path: Path, ran: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("hf_freeze.summarization.streaming.generate_summaries", full)
    done = ran("summarize", folder / "llama", folder / "in.csv", "-o", tmp_path / "out.csv", *SMALL)
    assert done.code == 1
    assert "Start the same with a smaller --batch_size" in done.err


@pytest.mark.slow  # three processes start; test_streaming kills one at every step
def test_a_summarize_that_is_killed_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "hf_freeze.cli", "summarize", str(folder / "llama"), str(folder / "in.csv")]
    options = [*SMALL, "--window_rows", "1"]
    whole, output = tmp_path / "whole.csv", tmp_path / "out.csv"
    subprocess.run([*words, "-o", str(whole), *options], check=True, env=environment(), cwd=ROOT, capture_output=True)
    process = subprocess.Popen(
        [*words, "-o", str(output), *options],
        env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    second = tmp_path / "out.csv.partial" / "00000001.shard"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if second.exists():
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not output.exists():  # else it was faster than the signal
        assert main(["summarize", str(folder / "llama"), str(folder / "in.csv"), "-o", str(output), *options]) == 0
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["out.csv", "whole.csv"]


@pytest.mark.slow
def test_two_processes_write_the_rows_of_one(folder: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_config.yaml")]
    launch += ["--num_processes=2", "-m", "hf_freeze.cli"]
    words = ["summarize", str(folder / "llama"), str(folder / "in.csv")]
    done = subprocess.run(
        [*launch, *words, "-o", str(tmp_path / "two.csv"), *SMALL, "--batch_size", "1"],
        env=environment(), cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("7 summaries in") == 1
    assert main([*words, "-o", str(tmp_path / "one.csv"), *SMALL, "--batch_size", "1"]) == 0
    assert (tmp_path / "two.csv").read_text() == (tmp_path / "one.csv").read_text()
    broken = [*launch, *words[:2], str(tmp_path / "broken.csv"), "-o", str(tmp_path / "three.csv"), *SMALL]
    (tmp_path / "broken.csv").write_text(BROKEN)
    done = subprocess.run(broken, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    assert "line 3 has 3 cells" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# inspect


def test_inspect_shows_anatomy_plan_and_forecast(folder: Path, ran: Callable[..., Ran]) -> None:
    done = ran("inspect", folder / "bart", "--freeze_encoder_blocks", "all", "--freeze_decoder_blocks", "0.5")
    assert done.code == 0, done.err
    for text in ("anatomy", "frozen and trained", "forecast", "read with its weights", "the plan of your options"):
        assert text in done.out
    assert re.search(r"encoder blocks 0-3 .* frozen", done.out)


def test_inspect_reads_a_config_alone_and_gives_the_same_numbers(
    folder: Path, tmp_path: Path, ran: Callable[..., Ran]
) -> None:
    tiny_model("bart").config.save_pretrained(tmp_path / "config")
    alone = ran("inspect", tmp_path / "config", "--json")
    whole = ran("inspect", folder / "bart", "--json")
    asked = ran("inspect", folder / "bart", "--config_only", "--json")
    assert "on the meta device, since no weights" in alone.values["read"]
    assert "on the meta device, as asked" in asked.values["read"]
    for part in ("anatomy", "forecast"):
        assert alone.values[part] == whole.values[part] == asked.values[part]


def test_inspect_of_a_70b_config_needs_no_memory_for_it(tmp_path: Path, ran: Callable[..., Ran]) -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    LlamaConfig(vocab_size=128256, num_key_value_heads=8, **sizes).save_pretrained(tmp_path / "big")
    done = ran("inspect", tmp_path / "big", "--freeze_decoder_blocks", "-8")
    assert done.code == 0, done.err
    assert re.search(r"decoder blocks 0-71 .* frozen", done.out)
    assert "70.6 G" in done.out or "70.6 B" in done.out


def test_inspect_of_a_delta_takes_the_plan_that_lies_with_it(folder: Path, ran: Callable[..., Ran]) -> None:
    done = ran("inspect", folder / "delta")
    assert done.code == 0, done.err
    assert "the plan of its freeze_plan.json" in done.out
    assert re.search(r"decoder blocks 0-2 .* frozen", done.out)
    other = ran("inspect", folder / "delta", "--freeze_decoder_blocks", "1")
    assert "freeze_plan.json with your options" in other.out
    assert re.search(r"decoder blocks 1-3 .* trained", other.out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{f}/llama", "--freeze_decoder_blocks", "9"], "9 decoder blocks"),
        (["{f}/llama", "--freeze_decoder_blocks", "some"], "some"),
        (["{f}/llama", "--dtype", "float7"], "float7"),
        (["{f}/llama", "--rows", "0"], "rows=0"),
        (["{t}/none"], "there is no config.json in it, but nothing"),
        (["{t}/in.csv"], "there is no such folder"),
        (["{t}/bad"], "cannot be loaded"),
    ],
)
def test_a_mistake_in_inspect_is_one_line(
    words: list[str], message: str, folder: Path, tmp_path: Path, ran: Callable[..., Ran]
) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text('{"model_type": "no_such_type"}')
    shutil.copyfile(folder / "in.csv", tmp_path / "in.csv")
    done = ran("inspect", *[word.format(f=folder, t=tmp_path) for word in words])
    assert done.code == 1
    lines = [line for line in done.err.strip().split("\n") if "Loading weights" not in line]
    assert len(lines) == 1, done.err
    assert message in lines[0]


# ---------------------------------------------------------------------------------------------------------------------
# merge


def test_merge_writes_a_plain_folder_with_the_names_and_config_of_the_base(
    folder: Path, tmp_path: Path, ran: Callable[..., Ran]
) -> None:
    done = ran("merge", folder / "delta", "-o", tmp_path / "merged", "--json")
    assert done.code == 0, done.err
    assert done.values["beside"] == ["tokenizer"]
    base, merged = (load_file(path / "model.safetensors") for path in (folder / "llama", tmp_path / "merged"))
    assert {name: tensor.shape for name, tensor in base.items()} == {n: t.shape for n, t in merged.items()}
    moved = {name for name in base if not torch.equal(base[name], merged[name])}
    assert moved
    assert all(re.search(r"layers\.3\.|^model\.norm|^lm_head", name) for name in moved)
    configs = [json.loads((path / "config.json").read_text()) for path in (folder / "llama", tmp_path / "merged")]
    assert configs[0] == configs[1]
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tmp_path / "merged")


def test_merge_finds_a_base_that_was_moved(folder: Path, tmp_path: Path, ran: Callable[..., Ran]) -> None:
    shutil.copytree(folder / "llama", tmp_path / "moved")
    delta = shutil.copytree(folder / "delta", tmp_path / "delta")
    edit(delta, lambda values: values.update(base="/gone/base"))
    lost = ran("merge", delta, "-o", tmp_path / "merged")
    assert lost.code == 1
    assert "The option --base_model of hf-freeze says where the base lies now" in lost.err
    assert not (tmp_path / "merged").exists()
    found = ran("merge", delta, "-o", tmp_path / "merged", "--base_model", tmp_path / "moved")
    assert found.code == 0, found.err


def test_merge_refuses_another_base_a_taken_folder_and_what_is_no_delta(
    folder: Path, tmp_path: Path, ran: Callable[..., Ran]
) -> None:
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    wrong = ran("merge", folder / "delta", "-o", tmp_path / "merged", "--base_model", tmp_path / "other")
    assert wrong.code == 1
    assert "model.layers.0.mlp.up_proj.weight" in wrong.err
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("x")
    taken = ran("merge", folder / "delta", "-o", tmp_path / "taken")
    assert "which holds something" in taken.err
    none = ran("merge", folder / "llama", "-o", tmp_path / "merged")
    assert none.code == 1
    assert "delta" in none.err
    given = ran("merge", folder / "llama", "-o", tmp_path / "merged", "--base_model", folder / "bart")
    assert "is no folder of save_delta" in given.err
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_is_not_what_it_should_be_is_removed(
    folder: Path, tmp_path: Path, ran: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_freeze import delta

    made = delta.merge_delta

    def wrong(source: str, output: Path, model: Any) -> Path:
        made(source, output, model)
        config = json.loads((output / "config.json").read_text())
        (output / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
        return output

    monkeypatch.setattr(delta, "merge_delta", wrong)
    done = ran("merge", folder / "delta", "-o", tmp_path / "merged")
    assert done.code == 1
    assert "config rms_norm_eps: 0.5 instead of" in done.err
    assert not (tmp_path / "merged").exists()

    def torn(source: str, output: Path, model: Any) -> Path:
        made(source, output, model)
        (output / "model.safetensors").unlink()
        return output

    monkeypatch.setattr(delta, "merge_delta", torn)
    assert ran("merge", folder / "delta", "-o", tmp_path / "merged").code == 1
    assert not (tmp_path / "merged").exists()


# ---------------------------------------------------------------------------------------------------------------------
# cache, doctor, sweep


def built(place: Path) -> None:
    model = tiny_model("llama")
    freeze(model, FreezePlan(decoder_blocks=2))
    ids = tiny_tokenizer("llama")(
        ["The mug is good and keeps warm.", "The handle broke after a day."], max_length=6, truncation=True
    )["input_ids"]
    rows = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in ids]
    PrefixCache.build(model, rows, cache_dir=place, progress=False).close()


def test_caches_are_listed_with_rows_and_size_and_cleared(tmp_path: Path, ran: Callable[..., Ran]) -> None:
    place = tmp_path / "caches" / "prefix"
    assert "No prefix caches in" in ran("cache", "list").out
    built(place)
    (place / "damaged").mkdir()
    (place / "damaged" / "manifest.json").write_text("{")
    listed = ran("cache", "list")
    assert "2 caches" in listed.out
    assert "manifest.json cannot be read" in " ".join(listed.out.split())
    values = ran("cache", "list", "--json").values
    assert {each["model"] == "damaged" for each in values["caches"]} == {True, False}
    whole = next(each for each in values["caches"] if each["model"] != "damaged")
    assert whole["rows"] == 2
    assert whole["model"] == "LlamaForCausalLM"
    assert "LlamaForCausalLM" in listed.out
    assert values["bytes"] == sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    manifest = Path(whole["folder"]) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "model": ""}))
    assert f"weights {whole['key']['weights'][:8]}" in ran("cache", "list").out, "of an older version"
    cleared = ran("cache", "clear", "--cache_dir", place, "--json").values
    assert cleared["removed"] + cleared["kept"] == 2
    assert cleared["removed"] >= 1
    assert cleared["bytes_freed"] > 0


def test_a_cache_whose_manifest_is_a_pipe_is_listed_as_damaged(tmp_path: Path, ran: Callable[..., Ran]) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "manifest.json")
    (cache,) = ran("cache", "list", "--cache_dir", tmp_path, "--json").values["caches"]
    assert "is a pipe where a file should be" in cache["damage"]


def test_a_cache_folder_that_is_missing_is_told(tmp_path: Path, ran: Callable[..., Ran]) -> None:
    done = ran("cache", "list", "--cache_dir", tmp_path / "none")
    assert done.code == 1
    assert "there is no such folder" in done.err


def test_doctor_names_what_is_missing_and_too_old(ran: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    fine = ran("doctor", "--json")
    assert fine.code == 0
    assert fine.values["ok"] is True
    assert {"torch", "transformers", "hf_freeze"} <= {each["name"] for each in fine.values["needed"]}
    assert fine.values["disks"]["here"]["free_bytes"] > 0
    versions = {"torch": "1.0", "peft": None, "matplotlib": None}
    found = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions[name] if name in versions else found(name))
    ill = ran("doctor")
    assert ill.code == 1
    assert "To be mended: torch, peft. Install with" in ill.out
    assert "not installed: pictures of sweeps" in ill.out
    versions["hf_freeze"] = None
    bare = ran("doctor")
    assert bare.code == 1
    assert "To be mended: hf_freeze. Install with" in bare.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--depths", "0,x"], "'0,x' was given; use numbers"),
        (["--draw_only"], "holds no sweep.json"),
        (["--test_file", "{f}/in.csv"], "without --train_file"),
        (["--train_file", "{f}/in.csv"], "no column that is known to hold the summary"),
        (["--model_name_or_path", "{f}/nowhere"], "there is no such folder"),
        (["--eval_strategy", "sometimes"], "sometimes"),
    ],
)
def test_a_mistake_in_sweep_is_one_line(
    words: list[str], message: str, folder: Path, tmp_path: Path, ran: Callable[..., Ran]
) -> None:
    given = [word.format(f=folder) for word in words]
    done = ran("sweep", "--output_dir", tmp_path / "sweep", "--precision", "fp32", "--cpu_threads", "1", *given)
    assert done.code in (1, 2)
    assert message in done.err
    assert "Traceback" not in done.err
