"""The model card says what is known and no more, in words that the hub's own parser takes, and it stays when pushed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_freeze import FreezeError, FreezePlan, FreezeReport, freeze
from hf_freeze.machine import Hardware
from hf_freeze.summarization import (
    DataFacts,
    RougeScores,
    SummaryTrainer,
    SummaryTrainingArguments,
    read_prompt,
    save_prompt,
    write_card,
)
from hf_freeze.summarization.publish.card import CARD_FILE
from hf_freeze.tables import Table
from tests.tiny import tiny_folder, tiny_model

ROOT = Path(__file__).parents[2]
LOSSES = Table("Loss per token", ("epoch", "training loss", "validation loss"), (("1", "2.500", "2.200"),))
LOG = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.2}]
SAMPLES = [{"review": "Good mug.", "reference": "A good mug.", "before": "mug", "after": "A mug."}]


def rouge(value: float) -> RougeScores:
    per_example = {name: np.array([value]) for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")}
    return RougeScores(value, value / 2, value - 1, value - 0.5, 1, per_example)


def frozen_report(kind: str = "llama") -> FreezeReport:
    return freeze(tiny_model(kind), FreezePlan(decoder_blocks=3))


def write(folder: Path, **given: Any) -> ModelCard:
    """A card with what a caller must give, and more; as the hub's parser reads it."""
    given = {"base": "some/model", "samples": SAMPLES, "facts": {"precision": "fp32"}, **given}
    report = given.pop("report", None) or frozen_report()
    scores = {"before": rouge(10.0), "after": rouge(30.0)}
    path = write_card(folder, report=report, scores=scores, losses=LOSSES, **given)
    return ModelCard.load(path)


# ------------------------------------------------------------------------------------------------------------ metadata


def test_the_hubs_own_parser_reads_back_what_is_known(tmp_path: Path) -> None:
    data = DataFacts("Shop reviews", {"train": 900, "test": 1000}, hub_id="shop/reviews", language="de")
    card = write(tmp_path / "mugs", data=data, license="mit")
    assert card.data.to_dict().keys() == {
        "base_model", "datasets", "language", "library_name", "license", "metrics", "model-index", "pipeline_tag",
        "tags",
    }  # fmt: skip
    assert (card.data.language, card.data.license, card.data.base_model) == ("de", "mit", "some/model")
    assert (card.data.datasets, card.data.tags) == (["shop/reviews"], ["hf_freeze"])
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "summarization")
    assert card.data.model_name == "mugs"
    found = [(r.metric_type, r.metric_name, r.metric_value, r.dataset_split) for r in card.data.eval_results]
    assert found == [
        ("rouge", "ROUGE-1", 30.0, "test"),
        ("rouge", "ROUGE-2", 15.0, "test"),
        ("rouge", "ROUGE-L", 29.0, "test"),
        ("rouge", "ROUGE-Lsum", 29.5, "test"),
    ]
    assert {(r.dataset_type, r.dataset_name, r.task_type) for r in card.data.eval_results} == {
        ("shop/reviews", "Shop reviews", "summarization")
    }
    assert "Shop reviews: 900 train, 1,000 test" in card.text


def test_what_is_not_known_is_left_out_and_a_folder_is_not_named_in_full(tmp_path: Path) -> None:
    base = tmp_path / "home" / "my-model"
    base.mkdir(parents=True)
    card = write(tmp_path / "out", base=str(base))
    unknown = {"base_model", "datasets", "language", "license", "model-index", "eval_results"}
    assert not unknown & card.data.to_dict().keys()
    assert "# Review summaries from my-model, partly frozen" in card.text
    assert str(tmp_path) not in card.content
    assert "hardware" not in card.text


def test_the_embedded_model_brings_its_id_and_license(tmp_path: Path) -> None:
    card = write(tmp_path, base="smollm2")
    assert (card.data.base_model, card.data.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")


def test_a_license_is_taken_from_the_card_of_the_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write(base, license="cc-by-4.0")
    assert write(tmp_path / "out", base=str(base)).data.license == "cc-by-4.0"
    assert write(tmp_path / "out", base=str(base), license="mit").data.license == "mit"
    (base / CARD_FILE).write_text("---\n[broken\n---\n")
    assert "license" not in write(tmp_path / "out", base=str(base)).data.to_dict()


def test_no_review_ends_its_fence_or_the_metadata(tmp_path: Path) -> None:
    nasty = "---\nlicense: mit\n---\n``` ```` # Heading | a | b | {{ 7 * 7 }}"
    card = write(tmp_path, samples=[{**SAMPLES[0], "review": nasty}])
    assert card.data.license is None
    fenced = re.search(r"^(`{5,})text\n(.*?)\n\1$", card.text, re.DOTALL | re.MULTILINE)
    assert fenced
    assert "# Heading" in fenced[2]
    assert "{{ 7 * 7 }}" in fenced[2], "no part of the template"
    assert "reference: A good mug." in fenced[2]
    assert not re.search(r"^#+ Heading", card.text, re.MULTILINE)


def test_a_card_without_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FreezeError, match=r"given no scores; give at least those of the trained model"):
        write_card(tmp_path, base="a/b", report=frozen_report(), scores={}, losses=LOSSES, samples=[], facts={})


# ------------------------------------------------------------------------------------------------------------ contents


def test_the_card_holds_plan_table_losses_scores_samples_and_facts(tmp_path: Path) -> None:
    hardware = Hardware("A CPU", 1, 2)
    facts = {"seconds of training": 1234.56, "precision": "fp32"}
    text = write(tmp_path, hardware=hardware, facts=facts).text
    assert "| decoder blocks 0-2 | model.layers[0:3] |" in text
    assert '"decoder_blocks": 3' in text
    assert "| 1 | 2.500 | 2.200 |" in text
    assert "| after | 30.0 | 15.0 | 29.0 | 29.5 |" in text
    assert "after: A mug." in text
    assert "- seconds of training: 1,234.6\n- precision: fp32\n- hardware: A CPU, 2 CPU cores\n" in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text


def test_the_loss_curve_is_drawn_where_matplotlib_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert "](loss.png)" in write(tmp_path / "drawn", log_history=LOG).text
    assert (tmp_path / "drawn" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "loss.png" not in write(tmp_path / "short", log_history=LOG[:1]).text
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "loss.png" not in write(tmp_path / "bare", log_history=LOG).text
    assert sorted(p.name for p in (tmp_path / "bare").iterdir()) == [CARD_FILE]


@pytest.mark.parametrize("kind", ["llama", "bart", "adapter"])
def test_the_code_in_the_card_runs(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    model_kind = "llama" if kind == "adapter" else kind
    folder = tiny_folder(model_kind, Path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    if kind == "adapter":
        base, folder = folder, Path("adapter")
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
        adapted.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    save_prompt(read_prompt(tokenizer, config, max_summary_tokens=4), None, folder)
    card = write(folder, base=str(folder), report=frozen_report(model_kind))
    assert card.data.library_name == ("peft" if kind == "adapter" else "transformers")
    code = re.search(r"```python\n(.*?)\n```", card.text, re.DOTALL)
    assert code
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        exec(compile(code[1], CARD_FILE, "exec"), {})
    assert re.fullmatch(r"\[['\"].*['\"]\]\n", screen.getvalue())


# ------------------------------------------------------------------------------------------------------------------ hub


class FakeApi:
    """Stands in for huggingface_hub.HfApi in Trainer: a repository is a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.messages: list[str] = []

    def __call__(self) -> FakeApi:
        return self

    def create_repo(self, repo_id: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str, **_: Any) -> Future[None]:
        self.messages.append(commit_message)
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        done: Future[None] = Future()
        done.set_result(None)
        return done


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_a_push_takes_the_card_that_was_written(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    api = FakeApi(tmp_path / "hub")
    monkeypatch.setattr("transformers.trainer.hf_api", api)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model: Any = tiny_model("llama")
    if kind == "adapter":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    args = SummaryTrainingArguments(
        str(tmp_path / "out"), use_cpu=True, eval_strategy="no", precision="fp32", hub_model_id="me/mugs"
    )
    trainer = SummaryTrainer(model=model, args=args)
    trainer.save_model()
    ours = write(tmp_path / "out").content
    trainer.push_to_hub()
    pushed = tmp_path / "hub" / "me" / "mugs" / CARD_FILE
    assert pushed.read_text() != ours, "Trainer's draft goes over a card by default: what model_card is for"

    trainer.model_card = write(tmp_path / "out").content
    trainer.push_to_hub()
    assert pushed.read_text() == ours
    assert (tmp_path / "out" / CARD_FILE).read_text() == ours
    assert ModelCard.load(pushed).data.base_model == "some/model"


PUSHING = """
import runpy, sys
from pathlib import Path
import transformers.trainer
sys.path.insert(0, {root!r})
from tests.summarization.test_card import FakeApi
api = FakeApi(Path({hub!r}))
transformers.trainer.hf_api = api
sys.argv = ["summarize_reviews.py", *{arguments!r}]
try:
    runpy.run_path({recipe!r}, run_name="__main__")
finally:  # it leaves by sys.exit
    print("pushed:", api.messages)
"""


@pytest.mark.slow
@pytest.mark.parametrize("upper", ["full", "lora"])
def test_the_recipe_pushes_its_card_and_report(upper: str, tmp_path: Path) -> None:
    model = tiny_folder("llama", tmp_path)
    output = tmp_path / "out"
    arguments = ["--model_name_or_path", str(model), "--output_dir", str(output), "--max_train_rows=16"]
    arguments += ["--max_test_rows=4", "--num_train_epochs=2", "--logging_steps=1", "--max_summary_tokens=8"]
    arguments += ["--precision=fp32", "--cpu_threads=1", "--cache_prefix=off", f"--upper={upper}"]
    arguments += ["--push_to_hub=true", "--hub_model_id=me/mugs"]
    recipe = str(ROOT / "recipes" / "summarize_reviews.py")
    code = PUSHING.format(root=str(ROOT), hub=str(tmp_path / "hub"), arguments=arguments, recipe=recipe)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'Card, scores and report']" in done.stdout
    pushed = tmp_path / "hub" / "me" / "mugs"
    assert (pushed / CARD_FILE).read_text() == (output / CARD_FILE).read_text()
    card = ModelCard.load(pushed / CARD_FILE)
    assert card.data.library_name == ("peft" if upper == "lora" else "transformers")
    assert len(card.data.eval_results) == 4
    results = json.loads((output / "all_results.json").read_text())
    assert card.data.eval_results[0].metric_value == pytest.approx(results["test_rouge1"], abs=0.005)
    assert "decoder blocks 2-3" in (pushed / "report.html").read_text()
    assert str(tmp_path) not in card.content
