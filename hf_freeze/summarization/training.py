"""Trainer, with the three things that it gets wrong for summaries: the loss, the order of rows, and NaN.

The loss is the sum over labelled tokens divided by their number over all accumulated batches and ranks; most
encoder-decoder classes of transformers return a plain mean there and train with another gradient. Rows are batched by
length through a sampler seeded by seed and epoch, so that every rank and a resumed run see the same batches. A loss
that is not finite stops the run before the optimizer sees it.
"""

# No `from __future__ import annotations`: HfArgumentParser reads the types of SummaryTrainingArguments.

import inspect
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

from hf_freeze.errors import FreezeError
from hf_freeze.files import write_whole
from hf_freeze.inputs import IGNORED_LABEL
from hf_freeze.machine import cpu_cores, find_accelerators
from hf_freeze.processes import agreed, from_first, rank_and_world
from hf_freeze.tables import Table
from hf_freeze.tensors import unwrap
from hf_freeze.training.checkpoints import DeltaCheckpoints
from hf_freeze.training.monitor import training_diverged
from hf_freeze.training.precision import Precision, choose_precision
from hf_freeze.training.supervised import can_keep_supervised_logits, rounded_positions
from hf_freeze.training.top_block import reduce_top_block

__all__ = ["LengthSampler", "SummaryTrainer", "SummaryTrainingArguments", "TokenLoss", "loss_table"]

POOL_BATCHES = 16  # batches whose rows are sorted together: long enough to save padding, short enough to stay random


@dataclass(frozen=True)
class TokenLoss:
    """Cross entropy summed over labelled tokens, divided by the number of items: for Trainer's `compute_loss_func`.

    Args:
        shifts: Whether the logits at one place predict the label at the next (decoder-only models).
        label_smoothing: As in TrainingArguments, which apply it only to their own loss.
        aux_coefficient: Weight of a mixture-of-experts model's router loss, where it returns one.

    Example:
        >>> from types import SimpleNamespace
        >>> output = SimpleNamespace(logits=torch.zeros(1, 3, 4), aux_loss=None)
        >>> loss = TokenLoss(shifts=True)(output, torch.tensor([[-100, 1, 2]]), num_items_in_batch=torch.tensor(2))
        >>> round(loss.item(), 4)  # log 4
        1.3863
    """

    shifts: bool
    label_smoothing: float = 0.0
    aux_coefficient: float = 0.0

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        logits = outputs.logits
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL) if self.shifts else labels
        kept = targets != IGNORED_LABEL
        count = kept.sum()
        if logits.dim() == 2:  # the model was asked for these places only
            kept = rounded_positions(labels)
        else:
            logits = logits[kept]
        chosen = logits.float()  # after the choice: a cast of all would double the largest tensor of a step
        total = nn.functional.cross_entropy(
            chosen, targets[kept], reduction="sum", label_smoothing=self.label_smoothing, ignore_index=IGNORED_LABEL
        )
        items = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = total / items
        aux = getattr(outputs, "aux_loss", None)
        if aux is not None and self.aux_coefficient:
            loss = loss + self.aux_coefficient * aux * (count / items)
        return loss


class LengthSampler(torch.utils.data.Sampler[int]):
    """Row numbers in random order, rows of similar length side by side; the same for the same seed and epoch.

    Rows are shuffled, then sorted by length within pools of several batches, then the batches are shuffled.

    Example:
        >>> sampler = LengthSampler([5, 1, 4, 2, 3, 6], batch_size=2, seed=0)
        >>> sorted(sampler) == list(range(6)), list(sampler) == list(sampler)
        (True, True)
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called at the start of each epoch by accelerate's data loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # The global generator's state differs between ranks and after a resume; (seed, epoch) does not.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = self.batch_size * POOL_BATCHES
        batches = []
        for start in range(0, len(shuffled), pool):
            rows = sorted(shuffled[start : start + pool], key=lambda row: -self.lengths[row])
            batches += [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
        short = [batch for batch in batches if len(batch) < self.batch_size]  # at the end, or it would shift the rest
        full = [batch for batch in batches if len(batch) == self.batch_size]
        for place in torch.randperm(len(full), generator=generator).tolist():
            yield from full[place]
        for batch in short:
            yield from batch


@dataclass
class SummaryTrainingArguments(Seq2SeqTrainingArguments):
    """Seq2SeqTrainingArguments with the defaults that suit a partly frozen model, and `--precision`.

    Runs on the CPU where there is no accelerator; without `use_cpu`, several processes there would each train alone
    and write into one folder.

    Raises:
        FreezeError: The launcher started several processes and they did not form one group.
    """

    precision: str = field(
        default="auto",
        metadata={"help": "auto (bf16 where the device runs it faster, else fp32), fp32 or bf16."},
    )
    supervised_logits: bool = field(
        default=True, metadata={"help": "Run the head only where there is a label; false is for comparisons."}
    )
    save_only_trained: bool = field(
        default=False, metadata={"help": "Checkpoints hold the trained tensors only; the final model is whole."}
    )
    cpu_threads: int | None = field(
        default=None,
        metadata={
            "help": "Threads of each process on a CPU; none shares all cores. accelerate launch alone gives one."
        },
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "Higher than for full fine-tuning: less can break."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "The learning rate's course."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or a fraction of all steps."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to measure the validation loss."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to write a checkpoint."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of training loss."})
    report_to: str = field(default="none", metadata={"help": "tensorboard, wandb, ...; none sends nothing anywhere."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Keep no logits in evaluation."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "A static freeze leaves no parameter unused; looking costs time at each step."}
    )
    dataloader_pin_memory: bool = field(
        default_factory=lambda: bool(find_accelerators()), metadata={"help": "Only an accelerator gains by it."}
    )

    def __post_init__(self) -> None:
        self.use_cpu = self.use_cpu or not find_accelerators()
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if self.use_cpu:
            # accelerate's launcher sets OMP_NUM_THREADS=1 where nobody asked, which leaves the other cores idle.
            neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(self.cpu_threads or max(1, cpu_cores() // neighbours))
        if self.fp16 or (self.bf16 and self.precision == "fp32"):
            raise FreezeError(
                f"--precision {self.precision} was asked for with {'--fp16' if self.fp16 else '--bf16'}; it is "
                "--precision that decides here. Use --precision auto, bf16 or fp32 alone."
            )
        if self.bf16:
            self.precision = "bf16"
        self.chosen_precision = self._agree_on_precision(world_size)
        self.bf16 = self.chosen_precision.name == "bf16"
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if self.bf16 else "no"  # the launcher's own wins otherwise
        super().__post_init__()  # type: ignore[no-untyped-call]
        _check_world_size(world_size, self.world_size)

    def _agree_on_precision(self, world_size: int) -> Precision:
        """The first process chooses: a probe may come out differently in each."""
        if world_size == 1:
            return choose_precision(self.precision, "cpu" if self.use_cpu else None)
        from accelerate import PartialState

        PartialState(cpu=self.use_cpu)  # forms the group
        with agreed("choose a precision"):
            chosen: Any = None
            if rank_and_world()[0] == 0:
                chosen = choose_precision(self.precision, "cpu" if self.use_cpu else None)
            precision: Precision = from_first(chosen)
        return precision


def _check_world_size(launched: int, formed: int) -> None:
    if launched != formed:
        raise FreezeError(
            f"The launcher started {launched} processes, this one is in a group of {formed}: each would train "
            "alone and write into one folder. Use `accelerate launch --config_file accelerate_config.yaml` or "
            "torchrun; `distributed_type: MULTI_CPU` and `accelerate launch --cpu` form no group."
        )


def loss_table(log_history: Sequence[dict[str, Any]]) -> Table:
    """Training and validation loss per epoch, from Trainer's log: the mean over the steps of that epoch.

    After a resume between two entries of the log, Trainer no longer knows the losses before the checkpoint; its first
    entry then counts for them too.

    >>> log = [{"loss": 3.0, "step": 10}, {"loss": 1.0, "step": 15}, {"eval_loss": 2.2, "epoch": 1.0, "step": 15}]
    >>> print(loss_table(log).to_dict()["rows"])
    [{'epoch': '1', 'training loss': '2.333', 'validation loss': '2.200'}]
    """
    rows = []
    total, steps, last = 0.0, 0, 0
    for entry in log_history:
        if "loss" in entry:  # the mean of the steps since the entry before
            total += float(entry["loss"]) * (entry["step"] - last)
            steps += entry["step"] - last
            last = entry["step"]
        if "eval_loss" in entry:
            training = f"{total / steps:.3f}" if steps else ""
            rows.append((f"{entry['epoch']:.3g}", training, f"{entry['eval_loss']:.3f}"))
            total, steps = 0.0, 0
    return Table("Loss per token", ("epoch", "training loss", "validation loss"), tuple(rows))


class _LogEachEpoch(TrainerCallback):
    """Logs the training loss at the end of an epoch too, so that it stands beside that epoch's validation loss."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if args.logging_strategy != "no":
            control.should_log = True
        return control


class SummaryTrainer(DeltaCheckpoints, Seq2SeqTrainer):
    """A Seq2SeqTrainer with `TokenLoss`, `LengthSampler` and a stop at the first loss that is not finite.

    Where the model can (`supervised_logits_reason` says), logits are computed at the supervised positions only.
    Activation checkpointing recomputes the trained blocks only, where `freeze` has frozen the model. Checkpoints hold
    the trained tensors only where `save_only_trained` says so. A push takes `model_card`, the text
    of a README.md, in the place of Trainer's draft, where that was set.

    Takes the arguments of Seq2SeqTrainer. The collator must supply `decoder_input_ids` to encoder-decoder models, since
    labels are taken out of the batch before the forward (`SummaryCollator` does).
    """

    def __init__(self, model: nn.Module, **arguments: Any) -> None:
        config: Any = getattr(model, "config", None)
        args = arguments["args"]
        arguments.setdefault(
            "compute_loss_func",
            TokenLoss(
                shifts=not getattr(config, "is_encoder_decoder", False),
                label_smoothing=args.label_smoothing_factor,
                aux_coefficient=float(getattr(config.get_text_config(), "router_aux_loss_coef", 0.0) or 0.0),
            ),
        )
        super().__init__(model=model, **arguments)
        self.add_callback(_LogEachEpoch())
        self.supervised_logits, self.supervised_logits_reason = False, "--supervised_logits false"
        if getattr(args, "supervised_logits", True):
            self.supervised_logits, self.supervised_logits_reason = can_keep_supervised_logits(model)
        if self.supervised_logits and (names := reduce_top_block(unwrap(model))):
            self.supervised_logits_reason += f"; of the top block too: {', '.join(names)}"
        # Keys and values of past tokens are kept for generation only; models keep them in training too unless told.
        self.extra_inputs: dict[str, Any] = {}
        self.model_card: str | None = None
        self.batch_seconds = 0.0  # of forward and backward, over all training batches of this process
        if "use_cache" in inspect.signature(unwrap(model).forward).parameters:
            self.extra_inputs["use_cache"] = False

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        inputs = {**inputs, **self.extra_inputs}
        if self.supervised_logits and "labels" in inputs:
            inputs = {**inputs, "logits_to_keep": rounded_positions(inputs["labels"])}
        return super().compute_loss(model, inputs, *rest, **named)

    def create_model_card(self, *rest: Any, **named: Any) -> None:
        """What `push_to_hub` calls between saving, when PEFT edits the README.md that lies there, and uploading."""
        if self.model_card is None:
            super().create_model_card(*rest, **named)
        elif self.is_world_process_zero():
            write_whole(Path(str(self.args.output_dir)) / "README.md", self.model_card)

    def create_optimizer(self, *rest: Any, **named: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(*rest, **named)
        # A head alone leaves the group without weight decay empty, which DeepSpeed ZeRO-3 does not survive.
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        all_warm_up = self.args.get_warmup_steps(num_training_steps) >= num_training_steps
        if all_warm_up and not any(scheduler.get_last_lr()):  # a constant rate knows no warm-up
            warnings.warn(
                f"A run of {num_training_steps} step(s) is all warm-up (--warmup_steps {self.args.warmup_steps}): its "
                "learning rate starts at 0 and never reaches --learning_rate. Use --warmup_steps 0, or more steps.",
                stacklevel=2,
            )
        return scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(ids) for ids in rows["input_ids"]]  # type: ignore[index]
        # The rows of one optimizer step are one batch here: the same steps on more processes, or accumulated.
        a_step = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthSampler(lengths, a_step, self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        started = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        finite = torch.isfinite(loss).to(torch.int32)
        if self.args.world_size > 1:  # every rank stops, or the others would step on and save over a good checkpoint
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        healthy = bool(finite)  # waits for the device
        self.batch_seconds += time.perf_counter() - started
        if not healthy:
            raise training_diverged(f"loss is {loss.item()}", self.state.global_step + 1, self.args.output_dir)
        return loss
