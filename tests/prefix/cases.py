"""Rows, collators and training runs that the tests of the prefix cache share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_freeze import FreezePlan, freeze
from hf_freeze.summarization import SummaryCollator
from tests.tiny import tiny_model, tiny_tokenizer

TWO_STACKS = ("bart", "t5")
DROPOUT: dict[str, dict[str, float]] = {  # on above the cut
    "llama": {"attention_dropout": 0.1},
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "bart": {"dropout": 0.1, "attention_dropout": 0.1},
    "t5": {},
}


def review_rows(kind: str, count: int = 24, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of 5 to 20 tokens; labels at the end, or for two stacks a summary of their own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int = 1) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    rows = []
    for _ in range(count):
        length, labelled = draw(5, 21)[0], draw(3, 5)[0]
        ids = draw(3, 900, length)
        labels = draw(3, 900, labelled) if kind in TWO_STACKS else [-100] * (length - labelled) + ids[-labelled:]
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return rows


def padding_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(kind)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def frozen_model(kind: str, *, dropout: bool = True, plan: FreezePlan | None = None) -> nn.Module:
    """Three of four blocks frozen, the whole encoder where there is one; the same weights at each call."""
    model = tiny_model(kind, **(DROPOUT[kind] if dropout else {}))
    freeze(model, plan or default_plan(kind))
    return model


def default_plan(kind: str) -> FreezePlan:
    return FreezePlan(encoder_blocks="all" if kind in TWO_STACKS else None, decoder_blocks=3)


def collator_for(kind: str, model: nn.Module) -> SummaryCollator:
    return SummaryCollator(padding_tokenizer(kind), model)


class LeftPadding:
    """Pads on the left: token ids with 0, labels with -100, and position ids where they are asked for."""

    def __init__(self, positions: bool = False) -> None:
        self.positions = positions

    def __call__(self, features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in features)

        def pad(key: str, filler: int) -> torch.Tensor:
            return torch.tensor([[filler] * (width - len(row[key])) + row[key] for row in features])

        mask = pad("attention_mask", 0)
        batch = {"input_ids": pad("input_ids", 0), "attention_mask": mask, "labels": pad("labels", -100)}
        if self.positions:
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return batch


def trainer_losses(
    model: nn.Module, rows: Any, collator: Any, folder: Any, *, trainer: type[Trainer] = Trainer, **given: Any
) -> tuple[list[float], Trainer]:
    """Trains with a stock Trainer; the loss of every training forward, and the trainer."""
    losses: list[float] = []

    def record(module: nn.Module, _: Any, output: Any) -> None:
        if module.training:
            losses.append(output["loss"].item())

    handle = model.register_forward_hook(record)
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "per_device_train_batch_size": 3,
        "max_steps": 20,
        "learning_rate": 0.1,
        "optim": "sgd",  # Adam turns the rounding of a gradient that is zero (a key's bias) into whole steps
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 7,
        "logging_strategy": "no",
    } | {key: value for key, value in given.items() if key not in ("eval_dataset",)}
    kind = Seq2SeqTrainingArguments if issubclass(trainer, Seq2SeqTrainer) else TrainingArguments
    made = trainer(
        model=model,
        args=kind(**arguments),
        train_dataset=rows,
        eval_dataset=given.get("eval_dataset"),
        data_collator=collator,
    )
    made.train()
    handle.remove()
    return losses, made
