"""A small staged run, as a function and as a script for torchrun and for the tests that kill it.

torchrun --nproc_per_node 2 tests/training/staged_run.py FOLDER [plain] [cached] [naive] [moved]
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from hf_freeze.freezing import freeze, thaw
from hf_freeze.locks import take_folder
from hf_freeze.plan import FreezePlan
from hf_freeze.processes import leave_group
from hf_freeze.summarization import SummaryTrainer, SummaryTrainingArguments
from hf_freeze.training.checkpoints import guard_checkpoints, resume_from
from hf_freeze.training.schedule import gradual
from hf_freeze.training.stages import StagesReport, train_in_stages
from tests.prefix.cases import collator_for, review_rows
from tests.tiny import tiny_model

ROWS_A_STEP = 4
STEPS = 4
LINEAR = {"optim": "sgd", "learning_rate": 0.3}  # AdamW makes much of the last bit of a gradient near zero


def pretrained() -> nn.Module:
    """The same weights at each call; dropout above the cut, so that the random state counts."""
    return tiny_model("llama", attention_dropout=0.1)


def arguments(folder: Path, **given: Any) -> SummaryTrainingArguments:
    """Four rows a step whatever the number of processes; evaluated and saved every second step."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    values: dict[str, Any] = {
        "per_device_train_batch_size": ROWS_A_STEP // world, "per_device_eval_batch_size": 8, "logging_steps": 1,
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1,
        "learning_rate": 1e-2, "warmup_steps": 0, "precision": "fp32", "disable_tqdm": True, "report_to": "none",
        "cpu_threads": 1, "seed": 3,
    }  # fmt: skip
    return SummaryTrainingArguments(str(folder), **(values | given))


def make_trainer(folder: Path, model: nn.Module | None = None, **given: Any) -> SummaryTrainer:
    """A trainer over 24 rows, on a model that is loaded anew unless one is given."""
    rows = review_rows("llama")
    model = pretrained() if model is None else model
    callbacks = given.pop("callbacks", None)
    return SummaryTrainer(
        model=model, args=arguments(folder, **given), train_dataset=Rows(rows), eval_dataset=Rows(rows[:8]),
        data_collator=collator_for("llama", model), callbacks=callbacks,
    )  # fmt: skip


class Rows(list[Any]):
    """Rows by number, and a column of all of them by name, as a Dataset gives them."""

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def run(
    folder: Path,
    *,
    cached: bool = True,
    resume: bool = False,
    shared: nn.Module | None = None,
    say: Any = lambda text: None,
    **given: Any,
) -> StagesReport:
    """One, two, then three blocks, a few steps each."""
    return train_in_stages(
        lambda: make_trainer(folder, shared, **given),
        gradual(pretrained(), start=1, step=1, stages=3, steps=STEPS, block_decay=0.5),
        cache_dir=folder / "cache" if cached else None,
        resume=resume,
        say=say,
    )


def another_run(folder: Path) -> int:
    """A process that has the folder, as a run in it does."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        take_folder(folder)
        os.write(writer, b"taken")
        time.sleep(600)
        os._exit(0)
    assert os.read(reader, 5) == b"taken"
    return child


def naive(folder: Path, model: nn.Module) -> SummaryTrainer:
    """What others do: the blocks of the next stage are thawed under a living trainer, and given to its optimizer."""

    class ThawAtStep(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
        ) -> None:
            if state.global_step == STEPS:
                before = {p for p in model.parameters() if p.requires_grad}
                thaw(model)
                freeze(model, FreezePlan(decoder_blocks=2))
                new = [p for p in model.parameters() if p.requires_grad and p not in before]
                optimizer.param_groups[0]["params"] += new

    given = {"max_steps": 2 * STEPS, "save_strategy": "no", "eval_strategy": "no"}
    trainer = make_trainer(folder, model, callbacks=[ThawAtStep()], **given)
    freeze(trainer.model, FreezePlan(decoder_blocks=3))
    trainer.train()
    return trainer


def one_plan(folder: Path, model: nn.Module, **given: Any) -> SummaryTrainer:
    """No stages: four steps, guarded, from the last whole checkpoint where there is one."""
    trainer = make_trainer(folder, model, max_steps=4, **LINEAR, **given)
    freeze(model, FreezePlan(decoder_blocks=2))
    guard_checkpoints(trainer)
    trainer.train(resume_from_checkpoint=resume_from(trainer, "last"))
    return trainer


def work(folder: Path, mode: str) -> None:
    """Trains in that way on a rank, and writes what became of it."""
    model = tiny_model("llama")
    if mode == "naive":
        trainer = naive(folder, model)
    elif mode == "moved":
        trainer = one_plan(folder, model)
    else:
        trainer = run(folder, cached=mode == "cached", shared=model, **LINEAR).trainer
    outcome = {
        "weights": {name: p.detach().double().flatten().tolist() for name, p in trainer.model.named_parameters()},
        "world": trainer.args.world_size,
        "wrapper": type(trainer.model_wrapped).__name__,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    (folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for way in sys.argv[2:]:
        work(Path(sys.argv[1], way), way)
    leave_group()
