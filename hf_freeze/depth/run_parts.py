"""What one run of a sweep is made of: its rows, its arguments, LoRA where that is the reference, and its clock."""

from __future__ import annotations

import copy
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from hf_freeze.files import json_digest
from hf_freeze.tensors import named_tensors, tensor_digest

if TYPE_CHECKING:
    from hf_freeze.depth.report import SweepRun

__all__ = ["StepClock", "choose_rows", "loader_rows", "select_rows", "set_arguments", "weights_digest", "with_lora"]

LORA_R = 16


class StepClock(TrainerCallback):
    """Times each step from the end of the one before, and moves the sweep's bar."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        self.bar.update(1)

    def median(self) -> float:
        """Seconds of a step; the first one sets kernels up and is left out where there are others."""
        return statistics.median(self.seconds[1:] or self.seconds) if self.seconds else 0.0


def choose_rows(total: int, rows: int, seed: int) -> list[int]:
    """The places of a seed's rows: the first of its own shuffle, so that fewer rows lie within more."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:rows].tolist())


def select_rows(dataset: Any, places: list[int]) -> Any:
    return dataset.select(places) if hasattr(dataset, "select") else torch.utils.data.Subset(dataset, places)


def loader_rows(trainer: Any) -> tuple[Any, Any]:
    """Training and validation rows as Trainer's loaders take them, and the collator of both."""
    rows = [trainer.get_train_dataloader().dataset, trainer.get_eval_dataloader().dataset]
    return torch.utils.data.ConcatDataset(rows), trainer.data_collator


def with_lora(model: nn.Module) -> Any:
    from peft import LoraConfig, get_peft_model

    task: str | None = (
        "SEQ_2_SEQ_LM" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else "CAUSAL_LM"
    )
    if not hasattr(model, "prepare_inputs_for_generation"):
        task = None  # a classifier, or any other module
    return get_peft_model(
        model, LoraConfig(r=LORA_R, lora_alpha=2 * LORA_R, target_modules="all-linear", task_type=task)
    )


def weights_digest(model: nn.Module) -> str:
    return json_digest(sorted((name, tensor_digest(tensor)) for name, tensor in named_tensors(model)))


def set_arguments(trainer: Any, run: SweepRun, folder: str, epochs: float, max_steps: int) -> None:
    """The run's own rate, seed and length; the caller's arguments serve the other runs and stay.

    Args:
        trainer: Gets a copy of its arguments.
        folder: For what Trainer writes.
        epochs: Of a whole run.
        max_steps: Where it ends by steps; -1 where it ends by epochs.
    """
    trainer.args = args = copy.copy(trainer.args)
    args.output_dir = folder
    args.seed = args.data_seed = run.seed
    args.learning_rate = run.learning_rate
    args.num_train_epochs, args.max_steps = epochs, max_steps
    args.eval_strategy = args.save_strategy = "no"
    args.load_best_model_at_end = False
    for callback in (PrinterCallback, ProgressCallback):  # one bar for the sweep instead of one for each run
        trainer.remove_callback(callback)
