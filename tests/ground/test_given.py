"""Whatever a public function is given instead of what it takes ends in a sentence of ours, and changes nothing."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import hf_freeze
from hf_freeze import FreezeError, FreezePlan, PrefixCache, SweepReport, freeze, thaw
from hf_freeze.errors import PlanError

WEIGHT = torch.zeros(1, requires_grad=True)
WRONG: dict[str, Any] = {
    "a str": "tiny", "None": None, "a number": 3, "an optimizer": torch.optim.SGD([WEIGHT], lr=1.0),
    "a class": GPT2LMHeadModel,
}  # fmt: skip


def model() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16, n_positions=8))


ROWS = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
# What each public function needs at least, by name; every one of these is then given wrongly, one at a time.
CALLS: dict[str, dict[str, Any]] = {
    "adapt_upper": {"model": model}, "advise": {"model": model, "train_dataset": ROWS},
    "all_logits": {"model": model}, "compute_rouge": {"predictions": ["a"], "references": ["a"]},
    "draw_sweep": {"report": SweepReport((), 3, "eval_loss", "eval_loss"), "path": "x"},
    "forecast": {"model": model, "plan": FreezePlan},
    "freeze": {"model": model, "plan": FreezePlan, "optimizer": None},
    "generate_summaries": {"model": model, "tokenizer": None, "reviews": ["a"]},
    "gradual": {"model": model, "start": 1, "step": 1, "stages": 1}, "guard_checkpoints": {"trainer": None},
    "load_delta": {"folder": "nowhere", "base_model": model}, "load_stages": {"path": "nowhere"},
    "merge_delta": {"folder": "nowhere", "output": "nowhere", "base_model": model}, "read_anatomy": {"model": model},
    "resume_from": {"trainer": None, "asked": "nowhere"}, "save_delta": {"model": model, "folder": "x"},
    "save_stages": {"stages": [], "path": "x"},
    "summarize_file": {"model": model, "tokenizer": None, "source": "nowhere", "output": "x"},
    "supervised_logits_only": {"model": model},
    "sweep_depths": {"make_model": model, "make_trainer": model, "depths": [1], "output_dir": "x"},
    "thaw": {"model": model}, "train_in_stages": {"make_trainer": model, "plans": [FreezePlan()]},
    "verify_frozen": {"model": model, "report": None},
}  # fmt: skip
# Where one of WRONG is right: a str is a path, a number's value is checked where numbers are, None is a default.
PATHS = ("path", "folder", "output", "output_dir", "asked", "plans", "source")
NUMBERS = ("start", "step", "stages")
OPTIONAL = ("plan", "optimizer", "base_model", "report")
LATER = ("tokenizer", "train_dataset", "reviews")  # told apart by what they hold; other tests give them wrongly


def wrong_calls() -> list[Any]:
    rows = []
    for name, given in CALLS.items():
        for argument in given:
            for kind in WRONG:
                fine = (
                    (kind == "a str" and argument in PATHS)
                    or (kind == "a number" and argument in NUMBERS and name == "gradual")
                    or (kind == "None" and argument in OPTIONAL and name != "draw_sweep")
                    or (kind == "an optimizer" and argument == "optimizer")
                    or (kind == "a class" and argument in ("make_model", "make_trainer"))  # it can be called
                    or argument in LATER or (argument == "source" and kind != "None")
                )  # fmt: skip
                if not fine:
                    rows.append(pytest.param(name, argument, kind, id=f"{name}-{argument}-{kind}"))
    return rows


def test_the_table_names_every_public_function() -> None:
    public = {name for name in hf_freeze.__all__ if inspect.isfunction(getattr(hf_freeze, name))}
    assert public == set(CALLS)


@pytest.mark.parametrize(("name", "argument", "kind"), wrong_calls())
def test_a_wrong_argument_ends_in_a_sentence_of_ours(
    name: str, argument: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {
        key: value() if value in (model, FreezePlan) and not key.startswith("make_") else value
        for key, value in CALLS[name].items()
        if value is not None or key == argument
    }
    missing = [key for key, value in CALLS[name].items() if value is None and key not in (*OPTIONAL, argument)]
    given |= dict.fromkeys(missing)
    with pytest.raises(FreezeError) as caught:
        getattr(hf_freeze, name)(**(given | {argument: WRONG[kind]}))
    assert re.match(rf"({name}|compute_rouge|PrefixCache|Stages|summarize)\b.{{20,}}\.$", str(caught.value), re.DOTALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("build", [PrefixCache.build, PrefixCache.open, PrefixCache.prepare])
def test_a_cache_of_no_model_ends_in_a_sentence(build: Any, kind: str, tmp_path: Path) -> None:
    with pytest.raises(FreezeError, match=r"PrefixCache.build was given .* as model; it takes a model"):
        build(WRONG[kind], ROWS, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("tiny", r"freeze was given the str 'tiny' as model; .*AutoModelForCausalLM.from_pretrained\('tiny'\)"),
        (GPT2LMHeadModel, r"the class GPT2LMHeadModel as model; .*GPT2LMHeadModel\(config\)"),
        (Path("tiny"), r"from_pretrained\('tiny'\)"),
        (type("Trainer", (), {"model": nn.Linear(1, 1)})(), r"a Trainer as model; .*its attribute model, a Linear"),
    ],
)
def test_the_way_to_a_model_is_told(given: Any, says: str) -> None:
    with pytest.raises(FreezeError, match=says):
        freeze(given)


def test_a_number_for_a_plan_is_turned_into_one() -> None:
    with pytest.raises(PlanError, match=r"the str '26' as plan; it takes .* Use FreezePlan\(decoder_blocks=26\)"):
        freeze(model(), "26")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"the int 0 as plan"):  # not taken for None
        freeze(model(), 0)  # type: ignore[arg-type]


def test_an_unknown_field_of_a_plan_is_named_with_the_nearest_and_the_dataclass_stays_one() -> None:
    with pytest.raises(PlanError, match=r"asks for blocks=3; it has no such field. The nearest: '(de|en)coder_blocks'"):
        FreezePlan(blocks=3)  # type: ignore[call-arg]
    plan = FreezePlan(decoder_blocks=3)
    with pytest.raises(PlanError, match="The nearest: 'tied_head'"):
        dataclasses.replace(plan, tie_head="untie")  # type: ignore[call-arg]
    assert dataclasses.replace(plan, tied_head="untie").tied_head == "untie"
    assert pickle.loads(pickle.dumps(plan)) == plan  # of this very process: launchers hand plans to theirs
    assert list(inspect.signature(FreezePlan).parameters) == [field.name for field in dataclasses.fields(FreezePlan)]
    assert FreezePlan(False, 1, 2) == FreezePlan(embeddings=False, encoder_blocks=1, decoder_blocks=2)


def test_a_shallower_plan_says_first_that_the_earlier_freeze_stays_and_how_to_lift_it() -> None:
    frozen = model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freeze(frozen, FreezePlan(decoder_blocks=2))
        freeze(frozen, FreezePlan(decoder_blocks=2))
    with pytest.warns(UserWarning, match=r"An earlier freeze\(\) stays: 12 tensors .* call thaw\(model\) before"):
        report = freeze(frozen, FreezePlan(decoder_blocks=1))
    assert report.table.lines[0].startswith("Warning: An earlier freeze() stays: 12 tensors")
    thaw(frozen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any("earlier" in line for line in freeze(frozen, FreezePlan(decoder_blocks=1)).table.lines)
