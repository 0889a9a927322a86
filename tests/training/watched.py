"""Trainers that a monitor watches, as functions and as a script for torchrun.

torchrun --nproc_per_node 2 tests/training/watched.py FOLDER
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from hf_freeze.errors import TrainingDiverged
from hf_freeze.processes import leave_group
from hf_freeze.training.monitor import FreezeMonitor
from tests.prefix.cases import collator_for, frozen_model, review_rows

ALONE = SimpleNamespace(world_size=1, device=torch.device("cpu"), output_dir=None, report_to=[])


def trainer_for(
    model: nn.Module, folder: Any, *callbacks: TrainerCallback, kind: str = "llama", **given: Any
) -> Trainer:
    """A stock Trainer over 24 reviews, three a step."""
    rows, evaluated = given.pop("rows", review_rows(kind)), given.pop("eval_rows", None)
    arguments: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 3,
        "max_steps": 4, "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "seed": 7,
    }  # fmt: skip
    args = TrainingArguments(**(arguments | given))
    collator = collator_for(kind, model)
    return Trainer(
        model=model, args=args, train_dataset=rows, eval_dataset=evaluated, data_collator=collator,
        callbacks=list(callbacks),
    )  # fmt: skip


def training_logs(trainer: Trainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def watching(model: nn.Module, **settings: Any) -> FreezeMonitor:
    """A monitor as it is when a trainer for the model was made, to be called by hand."""
    monitor = FreezeMonitor(**settings)
    monitor.on_init_end(ALONE, None, None, model=model)
    return monitor


def logged(monitor: FreezeMonitor, model: nn.Module, **logs: Any) -> dict[str, Any]:
    """What a log of a loss becomes."""
    monitor.on_log(ALONE, TrainerState(log_history=[{}]), None, model=model, logs=(values := {"loss": 1.0, **logs}))
    return values


def ddp_trainer(folder: Path, batch_size: int) -> Trainer:
    return trainer_for(
        frozen_model("llama", dropout=False), folder, FreezeMonitor(), per_device_train_batch_size=batch_size,
        ddp_find_unused_parameters=False,
    )  # fmt: skip


def by_trainer(folder: Path) -> dict[str, Any]:
    trainer = ddp_trainer(folder, batch_size=2)
    trainer.train()
    return {"wrapper": type(trainer.model_wrapped).__name__, "logs": training_logs(trainer)}


def by_fsdp() -> dict[str, Any]:
    """One step of a whole model and of a sharded one, both watched; then one of the shards gets NaN."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    figures: dict[str, Any] = {}
    for name, world_size in (("whole", 1), ("sharded", 2)):
        model: Any = frozen_model("llama", dropout=False)
        args = SimpleNamespace(**(vars(ALONE) | {"world_size": world_size}))
        monitor = watching(model)
        if world_size > 1:
            for block in model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh, ignored_params={model.model.norm.weight})  # whole on both
        monitor.on_train_begin(args, TrainerState(), None, model=model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(**collator_for("llama", model)(review_rows("llama", count=3))).loss.backward()
        monitor.on_pre_optimizer_step(args, TrainerState(), None, model=model, optimizer=optimizer)
        optimizer.step()
        logs: dict[str, Any] = {"loss": 1.0}
        monitor.on_log(args, TrainerState(log_history=[{}]), None, model=model, logs=logs)
        figures[name] = logs
    if torch.distributed.get_rank() == 0:
        model.lm_head.weight.grad.to_local().fill_(math.nan)
    try:
        monitor.on_pre_optimizer_step(args, TrainerState(), None, model=model, optimizer=optimizer)
    except TrainingDiverged as error:
        figures["error"] = str(error)
    return figures


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    outcome = [by_trainer(folder), by_fsdp()]
    (folder / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(outcome))
    leave_group()
