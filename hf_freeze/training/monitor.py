"""Watches a partly frozen model train: its depth, gradients and drift, over- and underfitting, frozen bits, NaN.

`FreezeMonitor` is a callback of Trainer. It adds figures to Trainer's log, says aloud what the losses show, proves at
each save that no frozen weight moved, and stops a run before a gradient that is not finite reaches a weight. It changes
no weight and no plan: freezing more or less, as it advises, is the caller's to do.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_freeze.anatomy import BlocksGiven, Part, read_anatomy
from hf_freeze.errors import FreezeError, TrainingDiverged
from hf_freeze.freezing import freeze_record, verify_frozen
from hf_freeze.tensors import unwrap
from hf_freeze.training.checkpoints import last_whole_checkpoint

__all__ = ["FreezeMonitor", "Remark", "training_diverged"]


@dataclass(frozen=True)
class Remark:
    """What the monitor said: `kind` is "overfitting" or "underfitting", `epoch` when, `message` what and why."""

    kind: str
    epoch: float | None
    message: str

    def __str__(self) -> str:
        return self.message


class FreezeMonitor(TrainerCallback):
    """A callback of Trainer that logs how the trained part moves, advises, and stops a run that went wrong.

    Each log of a training loss gets `trained_blocks` (how many blocks train), and for each trained block, and for the
    head, the final norms and the embeddings where these train:

    - `grad_norm/decoder.3`: the norm of its gradient at the last step, before clipping, as Trainer's own `grad_norm`.
    - `drift/decoder.3`: how far it is from its pretrained weights, ||w - w0|| / ||w0||; none where w0 is all zero.
      Frozen parts get no line: theirs is 0.

    After each evaluation it compares `eval_loss` with the mean of the training losses logged since the one before
    (with several validation sets there is no `eval_loss`, and it says nothing):

    - overfitting: for `patience` evaluations on end validation rose while training fell. Said again after as many more.
    - underfitting: for `patience` evaluations on end both changed by less than `min_gain`. Said once. A learning rate
      that has come down to nothing looks the same.

    At each save every process checks the frozen weights' digests. At each step, a gradient norm that is not finite ends
    the run before the optimizer sees it; where a gradient scaler skips such steps (fp16), it is left to do so.

    One monitor may watch several trainers of one model, stage after stage. Mutates Trainer's log, nothing else.

    Args:
        patience: Evaluations on end before it speaks. 2, because one may be chance.
        min_gain: The relative change of a loss that counts. 0.005: half a percent is less than two seeds differ by.
        figures: Log norms and drift of each block. False keeps the advice, the proof at each save and the stop, and
            spares the copy of the pretrained weights: for runs that nobody draws curves of.
        say: Gets each message, on the first process only.
        blocks: Handed to `read_anatomy` where structure does not tell.

    Attributes:
        advice: All that was said, oldest first; on every process.

    Raises:
        FreezeError: patience below 1, or min_gain not within [0, 1).

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
        >>> import tempfile
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16))
        >>> trainer = Trainer(model=model, args=TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none"))
        >>> monitor = FreezeMonitor.watch(trainer, patience=3)
        >>> trainer.callback_handler.callbacks[0] is monitor, monitor.advice
        (True, [])
    """

    def __init__(
        self,
        *,
        patience: int = 2,
        min_gain: float = 0.005,
        figures: bool = True,
        say: Callable[[str], object] = print,
        blocks: BlocksGiven | None = None,
    ) -> None:
        if patience < 1:
            raise FreezeError(f"FreezeMonitor was asked for patience={patience}; it is a number of evaluations, >= 1.")
        if not 0 <= min_gain < 1:
            raise FreezeError(
                f"FreezeMonitor was asked for min_gain={min_gain}; it is a fraction of the loss, at least 0 and below "
                "1. Use 0.005 for half a percent."
            )
        self.patience = patience
        self.min_gain = min_gain
        self.figures = figures
        self.say = say
        self.blocks = blocks
        self.advice: list[Remark] = []
        self._parts: dict[str, Part] = {}
        self._pretrained: dict[str, tuple[torch.Tensor, float]] = {}  # the weight, whole and on the CPU; its norm
        self._gradients: dict[str, float] = {}  # norms after clipping, of the last step
        self._total = 0.0  # the norm of all of them
        self._is_first = False
        self._warned = False

    @classmethod
    def watch(cls, trainer: Any, **settings: Any) -> Self:
        """A new monitor, put first among a trainer's callbacks. Takes FreezeMonitor's arguments. Mutates the trainer.

        Trainer puts callbacks that it is given behind the reporters that `report_to` names, which then send their
        copy of the log before the monitor's figures are in it.
        """
        return cls(**settings).put_first(trainer)

    def put_first(self, trainer: Any) -> Self:
        """Makes this the trainer's monitor, before its reporters; one that it had already goes. Returns itself."""
        others = [other for other in trainer.callback_handler.callbacks if not isinstance(other, FreezeMonitor)]
        trainer.callback_handler.callbacks[:] = [self, *others]
        self._meet(trainer.model)
        self._is_first = True
        return self

    def remember(self, model: nn.Module) -> None:
        """Keeps copies of the trainable tensors that it has none of yet, on the CPU, to measure drift from.

        Trainer's callbacks do it by themselves: for a model that `freeze` has frozen when the trainer is made, so
        before a resume loads other weights; for any other when training begins. Tensors that FSDP2 has sharded are
        gathered, so every process must call this.
        """
        for name, parameter in _trainable(model).items():
            if self.figures and name not in self._pretrained:
                weight = parameter.detach()
                if hasattr(weight, "full_tensor"):
                    weight = weight.full_tensor()
                kept = weight.to("cpu", copy=True)
                self._pretrained[name] = kept, float(torch.linalg.vector_norm(kept, dtype=torch.float32))

    # ---------------------------------------------------------------------------------------------- Trainer's events

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self._is_first = False  # it came by callbacks=, so behind the reporters
        self._meet(given["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        model = given["model"]
        if not _trainable(model).keys() <= self._parts.keys():  # added after the trainer was made, or wrapped since
            self._parts = read_anatomy(model, blocks=self.blocks).parts
        self.remember(model)
        if self.figures and args.report_to and not self._is_first and not self._warned:
            self._warned = True
            warnings.warn(
                f"FreezeMonitor's figures will be in Trainer's log, but not in {', '.join(args.report_to)}: reporters "
                "run before a callback given by callbacks=. Use FreezeMonitor.watch(trainer) instead.",
                stacklevel=1,
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        gradients = {name: p.grad for name, p in _trainable(given["model"]).items() if p.grad is not None}
        local = [_local(gradient) for gradient in gradients.values()]
        norms = torch._foreach_norm(local, 2, torch.float32) if local else ()  # DeepSpeed keeps them elsewhere
        squares = _squares(dict(zip(gradients, norms, strict=True)), gradients, args)
        self._gradients = {label: math.sqrt(square) for label, square in self._by_part(squares).items()}
        self._total = math.sqrt(sum(squares.values()))
        if not math.isfinite(self._total) and getattr(given["optimizer"], "scaler", None) is None:
            raise training_diverged(f"gradient norm is {self._total}", state.global_step + 1, args.output_dir)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        model, logs = given["model"], given["logs"]
        if "loss" not in logs or not self.figures:
            return
        trained = {part for name in _trainable(model) if (part := self._parts[name]).kind == "block"}
        figures: dict[str, float] = {"trained_blocks": len(trained)}
        before_clipping = logs.get("grad_norm", self._total) / self._total if self._total else 1.0
        figures |= {f"grad_norm/{label}": norm * before_clipping for label, norm in self._gradients.items()}
        figures |= {f"drift/{label}": drift for label, drift in self._drift(model, args).items()}
        logs.update(figures)
        state.log_history[-1].update(figures)  # Trainer has put a copy of logs there already

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        kind, shown = _read_fit(state.log_history, self.min_gain)
        count = len(shown) - 1
        training = " -> ".join(f"{evaluation.training:.4g}" for evaluation in shown)
        validation = " -> ".join(f"{evaluation.validation:.4g}" for evaluation in shown)
        if kind == "overfitting" and count % self.patience == 0:
            message = (
                f"overfitting: validation loss has risen for {count} evaluation{'s' * (count > 1)} ({validation}) "
                f"while training loss fell ({training}): freeze more, or stop"
            )
        elif kind == "underfitting" and count == self.patience:
            message = (
                f"underfitting: training loss ({training}) and validation loss ({validation}) both stall at "
                f"{shown[-1].training:.4g} / {shown[-1].validation:.4g}: {self._way_out(given['model'])}"
            )
        else:
            return
        self.advice.append(Remark(kind, state.epoch, message))
        if state.is_world_process_zero:
            self.say(message)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if freeze_record(unwrap(given["model"])) is not None:
            verify_frozen(given["model"])

    # ------------------------------------------------------------------------------------------------------ its parts

    def _meet(self, model: nn.Module) -> None:
        """Reads the model before Trainer wraps it, and remembers what is certain to be pretrained."""
        self._parts = read_anatomy(model, blocks=self.blocks).parts
        if freeze_record(unwrap(model)) is not None:
            self.remember(model)

    def _by_part(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums of the values of a part's tensors, by the part's label."""
        sums: dict[str, float] = defaultdict(float)
        for name, value in values.items():
            part = self._parts[name]
            sums[f"{part.stack}.{part.index}" if part.kind == "block" else part.kind] += value
        return sums

    def _drift(self, model: nn.Module, args: Any) -> dict[str, float]:
        """||w - w0|| / ||w0|| of each part. A tensor of another shape is left out: ZeRO-3 and FSDP1 hold pieces."""
        tensors, norms = {}, {}
        for name, parameter in _trainable(model).items():
            pretrained = self._pretrained[name][0] if name in self._pretrained else None
            if pretrained is not None and pretrained.shape == parameter.shape:
                tensors[name] = parameter.detach()
                start = _local(_placed_as(parameter, pretrained)).to(parameter.device, torch.float32)
                norms[name] = torch.linalg.vector_norm(_local(tensors[name]).float() - start)
        moved = self._by_part(_squares(norms, tensors, args))
        sizes = self._by_part({name: self._pretrained[name][1] ** 2 for name in tensors})
        return {label: math.sqrt(square / sizes[label]) for label, square in moved.items() if sizes[label]}

    def _way_out(self, model: nn.Module) -> str:
        blocks = {part for part in self._parts.values() if part.kind == "block"}
        frozen = blocks - {self._parts[name] for name in _trainable(model)}
        if not frozen:
            return f"all {len(blocks)} blocks train already; use a higher learning rate or a larger model"
        order = [str(stack.name) for stack in read_anatomy(model, blocks=self.blocks).stacks]  # the upper one is last
        highest = max(frozen, key=lambda part: (order.index(part.stack), part.index))
        return f"unfreeze the next block ({highest})"


def training_diverged(what: str, step: int, output_dir: str | None) -> TrainingDiverged:
    """The error for a run whose numbers are not finite any more; names the last good checkpoint where there is one.

    >>> training_diverged("loss is nan", 3, None)
    TrainingDiverged('The loss is nan at step 3; training stops before the optimizer sees it. No checkpoint had been \
saved yet. Use a smaller learning rate, max_grad_norm 1.0, or fp32.')
    """
    checkpoint = None
    if output_dir and Path(output_dir).is_dir():  # one that is marked whole, where any is marked
        checkpoint = last_whole_checkpoint(output_dir) or get_last_checkpoint(output_dir)  # type: ignore[no-untyped-call]
    kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint had been saved yet."
    return TrainingDiverged(
        f"The {what} at step {step}; training stops before the optimizer sees it. {kept} Use a smaller learning rate, "
        "max_grad_norm 1.0, or fp32."
    )


# ------------------------------------------------------------------------------------------------------------- tensors


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's share of a tensor that FSDP2 has sharded; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _placed_as(parameter: Any, whole: torch.Tensor) -> torch.Tensor:
    """A whole tensor sharded as the parameter is. Every process has all of it, so none is sent."""
    if not hasattr(parameter, "placements"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _squares(norms: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], args: Any) -> dict[str, float]:
    """Squared norms of whole tensors from those of each process's share. Waits for the device once.

    With several processes the squares are summed over all of them, whoever holds the same counting for one: NaN on
    one process is then NaN on all, and all stop at the same step.
    """
    if not norms:
        return {}
    squares = torch.stack([norm.to(args.device) for norm in norms.values()]).square()
    if args.world_size > 1:
        squares *= torch.tensor([_shards(tensors[name]) / args.world_size for name in norms], device=args.device)
        torch.distributed.all_reduce(squares)
    return dict(zip(norms, squares.tolist(), strict=True))


def _shards(tensor: Any) -> int:
    """Into how many different pieces a tensor is cut."""
    if not hasattr(tensor, "placements"):
        return 1
    sides = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sides if not placement.is_replicate())


# -------------------------------------------------------------------------------------------------------------- losses


class _Evaluation(NamedTuple):
    """An evaluation that training came before: its line in the log, and the losses, the training losses' mean."""

    line: int
    training: float
    validation: float


def _evaluations(history: Sequence[Mapping[str, Any]]) -> list[_Evaluation]:
    evaluations, losses = [], []
    for line, entry in enumerate(history):
        if "loss" in entry:
            losses.append(float(entry["loss"]))
        elif "eval_loss" in entry and losses:
            evaluations.append(_Evaluation(line, sum(losses) / len(losses), float(entry["eval_loss"])))
            losses = []
    return evaluations


def _read_fit(history: Sequence[Mapping[str, Any]], min_gain: float) -> tuple[str, list[_Evaluation]]:
    """What the newest entry of a log shows: "overfitting", "underfitting" or "", and the evaluations that show it.

    The first of these is the one that the others are compared with. All of it follows from the log, which Trainer keeps
    in its checkpoints: a resumed run says neither less nor twice.

    >>> log = [{"loss": 3.0}, {"eval_loss": 3.1}, {"loss": 2.5}, {"eval_loss": 3.2}, {"loss": 2.0}, {"eval_loss": 3.3}]
    >>> kind, shown = _read_fit(log, min_gain=0.005)
    >>> kind, [evaluation.validation for evaluation in shown]
    ('overfitting', [3.1, 3.2, 3.3])
    """
    evaluations = _evaluations(history)
    verdicts = [_verdict(before, now, min_gain) for before, now in pairwise(evaluations)]
    if not verdicts or evaluations[-1].line != len(history) - 1:  # nothing was trained since the evaluation before
        return "", []
    count = len(list(takewhile(lambda verdict: verdict == verdicts[-1], reversed(verdicts))))
    return verdicts[-1], evaluations[-count - 1 :]


def _verdict(before: _Evaluation, now: _Evaluation, min_gain: float) -> str:
    pairs = ((before.training, now.training), (before.validation, now.validation))
    if all(abs(after - earlier) < min_gain * abs(earlier) for earlier, after in pairs):
        return "underfitting"
    return "overfitting" if now.validation > before.validation and now.training < before.training else ""
