"""Gradual unfreezing: a list of plans, trained one after the other, top down, each from the best weights so far.

Every stage gets a trainer of its own: an optimizer, a schedule and a DDP wrapper that know what trains now. Unfreezing
under a living trainer leaves new tensors out of all three, without a word. What is done stands in the `ledger`, the
best weights of each stage lie beside it, so that a run that was killed goes on. How one stage trains is Trainer's
business.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from hf_freeze.anatomy import Anatomy, read_anatomy
from hf_freeze.delta import load_delta, save_delta
from hf_freeze.errors import FreezeError, RankLost, ResumeError, StageError
from hf_freeze.files import json_digest
from hf_freeze.freezing import FreezeReport, freeze, thaw, verify_frozen
from hf_freeze.given import check_callable
from hf_freeze.locks import leave_folder, take_folder
from hf_freeze.plan import FreezePlan
from hf_freeze.processes import agreed, barrier, tell_all
from hf_freeze.tables import Table
from hf_freeze.tensors import named_tensors, tensor_digest, unwrap
from hf_freeze.training.checkpoints import (
    guard_checkpoints,
    last_whole_checkpoint,
    remove_checkpoints,
    resume_from,
    run_facts,
)
from hf_freeze.training.ledger import Ledger, StageResult
from hf_freeze.training.monitor import FreezeMonitor
from hf_freeze.training.schedule import Stage, check_ends, check_growth, check_stages, load_stages
from hf_freeze.trial import take_off_autocast

__all__ = ["StagesReport", "train_in_stages"]

LEDGER = "stages.json"
BEST = "best"  # in each stage's folder: the delta of the best weights so far


@dataclass(frozen=True)
class StagesReport:
    """What became of every stage. Prints as a table.

    Attributes:
        metric: By which stages are compared.
        trainer: The last stage's, whose model holds the best weights.
        done_before: How many stages another process had done.
    """

    stages: tuple[StageResult, ...]
    metric: str
    trainer: Any
    done_before: int = 0

    def __str__(self) -> str:
        return str(self.table())

    def table(self) -> Table:
        """One row a stage."""

        def metric_text(value: float | None) -> str:
            return "-" if value is None else f"{value:.4g}"

        rows = tuple(
            (str(s.number), str(s.trained_blocks), str(s.steps), f"{s.seconds:.1f} s", metric_text(s.start_metric),
             metric_text(s.best_metric), s.ended)
            for s in self.stages
        )  # fmt: skip
        columns = ("stage", "trained blocks", "steps", "time", f"{self.metric} before", "best", "ended")
        return Table("Stages", columns, rows)


def train_in_stages(
    make_trainer: Callable[..., Any],
    plans: Sequence[FreezePlan | Stage] | str | os.PathLike[str],
    *,
    output_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    say: Callable[[str], None] = print,
    **settings: Any,
) -> StagesReport:
    """Trains a list of plans one after the other, each with a trainer of its own and from the best weights so far.

    A stage ends after its epochs or steps, or when validation stalls. Where there is evaluation, a stage ends with
    the best weights that were evaluated in it or before, so that no later stage makes the model worse; else with its
    last ones. The pretrained weights themselves are evaluated with `eval_on_start` only. Under DDP every stage is
    wrapped anew. A fixed seed gives the same run. When this returns, the model is frozen as in the last stage; nothing
    is thawed that no stage asked for. The checkpoints of a stage are removed once it is done.

    Args:
        make_trainer: Returns a new Trainer, at each call; with the `Stage` where it takes an argument. All may share
            one model, or each may load it anew: the weights of the stage before are put in.
        plans: Top down: each trains what the one before trains, and more. Or the YAML file of `save_stages`.
        output_dir: Where `stages.json`, the best weights and checkpoints of each stage lie; None is the output_dir of
            the trainer's arguments.
        cache_dir: Train from a `PrefixCache` there; its one pass builds the states of every stage. None: no cache.
        resume: Go on with what lies in output_dir; finished stages are not trained again. Starts anew where nothing
            lies there.
        say: Takes the messages of the first process.
        settings: Fields of `Stage` for those of `plans` that are bare FreezePlans: epochs=1, patience=2, ...

    Returns:
        The report; its trainer holds the model.

    Raises:
        StageError: Stages that train less than the one before or never end, patience without evaluation, another run
            in output_dir, a trainer given twice. Before anything is trained, where that can be known.
        ResumeError: What lies there belongs to another model, plan or data.

    Example:
        >>> import contextlib, tempfile
        >>> from hf_freeze import gradual
        >>> from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
        >>> config = GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=16, n_positions=8)
        >>> model = GPT2LMHeadModel(config)
        >>> rows = [{"input_ids": torch.tensor([n, 5, 6, 7]), "labels": torch.tensor([n, 5, 6, 7])} for n in range(4)]
        >>> args = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none", disable_tqdm=True,
        ...     logging_strategy="no", save_strategy="no")
        >>> def make_trainer():
        ...     return Trainer(model=model, args=args, train_dataset=rows)
        >>> with contextlib.redirect_stdout(None):  # Trainer's log
        ...     report = train_in_stages(make_trainer, gradual(model, 1, 1, 2, steps=2))
        >>> [stage.trained_blocks for stage in report.stages]
        [1, 2]
    """
    check_callable("train_in_stages", "make_trainer", make_trainer, "a new Trainer")
    if isinstance(plans, str | os.PathLike):
        plans = load_stages(plans)
    check_stages("train_in_stages", "plans", plans)
    stages = [plan if isinstance(plan, Stage) else Stage(plan, **settings) for plan in plans]
    if not stages:
        raise StageError("train_in_stages was given no plan; give one or more, such as gradual(model, 4, 4, 3).")
    first = trainer = _make(make_trainer, stages[0])
    is_first_process = first.args.process_index == 0
    run = _Run(first, stages, Path(output_dir or first.args.output_dir), say if is_first_process else lambda text: None)
    with agreed("begin the stages"):
        run.begin(first, resume)
    done = len(run.ledger.done)
    if done:
        run.say(f"{done} of {len(stages)} stages are done already in {run.folder}.")
    for number in range(done + 1, len(stages) + 1):
        made = first if number == 1 else _make(make_trainer, stages[number - 1])
        if number > 1 and made is trainer:
            raise StageError(
                f"make_trainer gave the trainer of the stage before again, for stage {number}; its optimizer and its "
                "DDP wrapper know only what trained there. Return a new Trainer at each call; all may share a model."
            )
        trainer = made
        run.train(number, trainer, cache_dir)
    if done == len(stages):
        with agreed("load the weights of the last stage"):
            thaw(trainer.model)
            freeze(trainer.model, stages[-1].plan)
            load_delta(run.best_folder(done), trainer.model)
    if is_first_process:
        leave_folder(run.folder)
    report = StagesReport(tuple(run.ledger.done), run.metric, trainer, done)
    run.say(str(report))
    return report


def _make(make_trainer: Callable[..., Any], stage: Stage) -> Any:
    """A new trainer for the stage; the callable may do without its argument."""
    try:
        inspect.signature(make_trainer).bind(stage)
    except TypeError:
        return make_trainer()
    return make_trainer(stage)


# ------------------------------------------------------------------------------------------------------------- the run


class _Run:
    """A list of stages under way; the best weights of each stage lie in its folder."""

    def __init__(self, trainer: Any, stages: list[Stage], folder: Path, say: Callable[[str], None]) -> None:
        self.stages, self.folder, self.say = stages, folder, say
        self.goes_on = False  # the first stage that is not done may have checkpoints of a run that was killed
        self.several = isinstance(trainer.eval_dataset, dict)  # validation sets
        name, greater = trainer.args.metric_for_best_model or "loss", trainer.args.greater_is_better
        self.metric = name if name.startswith("eval_") else f"eval_{name}"
        self.greater = not name.endswith("loss") if greater is None else bool(greater)

    def begin(self, trainer: Any, resume: bool) -> None:
        """Checks all that can be known before anything is trained; reads what is done."""
        args, folder = trainer.args, self.folder
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise StageError(
                "train_in_stages was asked for under FSDP or DeepSpeed, which shard a model once and for all. Use DDP, "
                "or run the stages one by one: save_delta after each, load_delta before the next."
            )
        if self.several and not any(self.metric.startswith(f"eval_{name}_") for name in trainer.eval_dataset):
            raise StageError(
                f"Stages end by {self.metric}; there are several validation sets. Name a metric of one of them in "
                f"metric_for_best_model, such as eval_{next(iter(trainer.eval_dataset))}_loss."
            )
        check_ends(self.stages, args, trainer.eval_dataset)
        check_growth(self.stages, read_anatomy(trainer.model))
        facts = run_facts(trainer)
        if args.process_index == 0:
            take_folder(folder)
        start = json_digest(sorted((n, tensor_digest(tensor)) for n, tensor in named_tensors(unwrap(trainer.model))))
        run = {name: facts[name] for name in ("training data", "rows a step")}
        self.ledger = ledger = Ledger(folder / LEDGER, self.stages, self.metric, run, start)
        if ledger.path.exists() and not resume:
            raise StageError(
                f"train_in_stages was to write into {folder}, which holds another run ({LEDGER}). Go on with "
                "resume=True, or give another output_dir."
            )
        if ledger.path.exists():
            ledger.read()
            self.goes_on = True
        barrier()  # until every process has looked
        if not ledger.done and start != ledger.start and not last_whole_checkpoint(folder / "stage-1"):
            raise ResumeError(  # a later stage compares what was frozen before it; the first one has only this
                f"{ledger.path} was begun with other weights than this model's, and its first stage has no checkpoint "
                "yet. Load the model again: a run that was interrupted leaves it half trained."
            )
        if args.should_save and not self.goes_on:
            folder.mkdir(parents=True, exist_ok=True)
            ledger.write()

    def best_folder(self, number: int) -> Path:
        """Where a stage's best weights lie."""
        return self.folder / f"stage-{number}" / BEST

    def train(self, number: int, trainer: Any, cache_dir: str | os.PathLike[str] | None) -> None:
        """Trains one stage, from the best weights of the one before; the model then holds this one's."""
        stage, model, best_folder = self.stages[number - 1], trainer.model, self.best_folder(number)
        before = self.ledger.done[-1].best_metric if self.ledger.done else None
        with agreed(f"begin stage {number}"):
            report, later = self._enter(number, trainer)
            checkpoint = self._last_checkpoint(number, trainer)
            state = TrainerState()
            if checkpoint:
                state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        parts = read_anatomy(model).parts
        blocks = len({parts[name] for name in report.trainable_names if parts[name].kind == "block"})
        counts = f"{blocks} block{'s' * (blocks != 1)}, {report.trainable_parameters:,} parameters"
        self.say(f"Stage {number} of {len(self.stages)}: {counts} train.")
        if checkpoint:
            self.say(f"Going on from {checkpoint}.")
        elif before is not None:
            save_delta(model, best_folder, extra={"metric": before, "step": 0})
        cache = _build_cache(trainer, later, cache_dir, self.say) if cache_dir is not None else None
        end = _StageEnd(self, stage, before, best_folder)
        started = time.perf_counter()
        try:
            if not end.stalled(state.log_history):  # else it was killed after its end, before that was noted
                _train(trainer, stage, end, checkpoint)
                state = trainer.state
        except BaseException:  # the others may be in the middle of a step: nothing is told to them here
            if cache is not None:
                cache.close()
            raise
        seconds = time.perf_counter() - started
        with agreed(f"end stage {number}"):
            best = end.standing(state.log_history).best
            if best is None:
                save_delta(model, best_folder, extra={"metric": None, "step": state.global_step})
            else:
                load_delta(best_folder, model)
            if cache is not None:  # after the weights are saved: it raises where the last states were old
                trainer.data_collator = cache.collator.collator
                cache.close()
            verify_frozen(model, report)
            why = end.why(state.log_history)
            self.ledger.done.append(
                StageResult(number, blocks, state.global_step, seconds, before, best, why, cache is not None)
            )
            barrier()  # until every process has read the weights
            if trainer.args.should_save:
                self.ledger.write()
                guard = guard_checkpoints(trainer)
                of_this_run = guard.run_id or guard.resumed or ""  # the latter where nothing was left to train
                remove_checkpoints(best_folder.parent, of_this_run, 0, [])  # nothing goes on from them any more
        if number < len(self.stages):
            _let_go(trainer)

    def _enter(self, number: int, trainer: Any) -> tuple[FreezeReport, list[FreezePlan]]:
        """Freezes by the stage's plan and puts in the best weights so far; later plans whose states a pass can take."""
        stage, model = self.stages[number - 1], trainer.model
        _set_arguments(trainer, stage, self.folder / f"stage-{number}")
        thaw(model)
        anatomy = read_anatomy(model)
        later = [other.plan for other in self.stages[number:] if other.plan.resolve(anatomy).cuts]
        report = freeze(model, stage.plan)
        for monitor in [c for c in trainer.callback_handler.callbacks if isinstance(c, FreezeMonitor)]:
            monitor.put_first(trainer)
            monitor.remember(model)  # before the weights of the stage before: drift is from the pretrained ones
        guard_checkpoints(trainer)
        if number > 1:
            load_delta(self.best_folder(number - 1), model)
        return report, later

    def _last_checkpoint(self, number: int, trainer: Any) -> str | None:
        """Where a run that was killed in this stage goes on; None where it begins."""
        checkpoint = resume_from(trainer, True) if self.goes_on else None
        self.goes_on = False
        if len(set(checkpoints := tell_all(checkpoint))) > 1:
            raise ResumeError(
                f"The ranks found unlike checkpoints of stage {number}: {', '.join(map(str, checkpoints))}. Let "
                "output_dir be one folder that all ranks see."
            )
        return checkpoint


class _Standing(NamedTuple):
    """Where a stage stands by its log: the best metric, evaluations since the last one that gained enough, and whether
    the newest one is the best.
    """

    best: float | None
    waited: int
    newest_is_best: bool


class _StageEnd(TrainerCallback):
    """Keeps the best weights of a stage, and stops it where validation stalls.

    All of it follows from the log, which Trainer keeps in its checkpoints: a resumed stage ends where it would have.
    `EarlyStoppingCallback` counts in itself, which a resume forgets, and by an absolute gain over the newest best;
    `load_best_model_at_end` knows only weights that a checkpoint of this trainer holds, not those that the stage began
    with, nor its last ones.
    """

    def __init__(self, run: _Run, stage: Stage, before: float | None, folder: Path) -> None:
        self.run, self.stage, self.before, self.folder = run, stage, before, folder

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: Any = None, **_: Any
    ) -> None:
        if self.run.metric not in (metrics or {}):
            if self.run.several:
                return  # Trainer evaluates each validation set by itself
            known = [name for name in metrics or {} if name.startswith("eval_")]
            raise StageError(
                f"A stage ends by {self.run.metric}; the evaluation gave {', '.join(known)}. Name one of them in "
                "metric_for_best_model."
            )
        standing = self.standing(state.log_history)
        if standing.newest_is_best:
            save_delta(model, self.folder, extra={"metric": standing.best, "step": state.global_step})
        if self.stalled(state.log_history):
            control.should_training_stop = True

    def standing(self, history: Sequence[dict[str, Any]]) -> _Standing:
        """Where the stage stands; the weights that it began with count among the best."""
        best = mark = self.before
        waited, newest_is_best = 0, False
        for value in (float(entry[self.run.metric]) for entry in history if self.run.metric in entry):
            newest_is_best = self._is_better(value, best, 0.0)
            best = value if newest_is_best else best
            gained = self._is_better(value, mark, self.stage.min_gain)
            mark, waited = (value, 0) if gained else (mark, waited + 1)
        return _Standing(best, waited, newest_is_best)

    def stalled(self, history: Sequence[dict[str, Any]]) -> bool:
        """Whether validation has not gained for so many evaluations as the stage has patience."""
        return self.stage.patience is not None and self.standing(history).waited >= self.stage.patience

    def why(self, history: Sequence[dict[str, Any]]) -> str:
        """Why the stage ended, in a few words."""
        if self.stalled(history):
            return f"stalled: no gain in {self.stage.patience} evaluations"
        if self.stage.steps is not None:
            return f"{self.stage.steps} steps"
        return "its epochs" if self.stage.epochs is None else f"{self.stage.epochs:g} epochs"

    def _is_better(self, value: float, than: float | None, gain: float) -> bool:
        if than is None:
            return math.isfinite(value)
        difference = value - than if self.run.greater else than - value
        return difference > gain * abs(than)


# ----------------------------------------------------------------------------------------------------------- one stage


def _set_arguments(trainer: Any, stage: Stage, folder: Path) -> None:
    """The stage's own length, rate and folder; the caller's arguments may serve other trainers and stay."""
    trainer.args = args = copy.copy(trainer.args)
    args.output_dir = str(folder)
    args.load_best_model_at_end = False  # a stage keeps the best weights itself, whatever is saved when
    if stage.epochs is not None:
        args.num_train_epochs, args.max_steps = stage.epochs, -1
    if stage.steps is not None:
        args.max_steps = stage.steps
    if stage.learning_rate is not None:
        args.learning_rate = stage.learning_rate


def _groups_by_block(groups: list[dict[str, Any]], anatomy: Anatomy, decay: float) -> list[dict[str, Any]]:
    """An optimizer's groups split by block, each with the rate of its depth below the top."""
    blocks = [(str(stack.name), index) for stack in anatomy.stacks for index in range(len(stack))]
    depths = {block: depth for depth, block in enumerate(reversed(blocks))}
    depth_of: dict[nn.Parameter, int] = {}  # of final norms and heads it is 0
    for name, parameter in anatomy.parameters.items():
        part = anatomy.parts[name]
        if part.kind == "block":
            depth_of[parameter] = depths[part.stack, part.index]
        elif part.kind in ("embeddings", "tower"):
            depth_of[parameter] = len(blocks)
    split = []
    for group in groups:
        by_depth: dict[int, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            by_depth[depth_of.get(parameter, 0)].append(parameter)
        split += [{**group, "params": by_depth[depth], "lr": group["lr"] * decay**depth} for depth in sorted(by_depth)]
    return split


def _train(trainer: Any, stage: Stage, end: _StageEnd, checkpoint: str | None) -> None:
    if stage.block_decay != 1.0:
        optimizer = trainer.create_optimizer()
        groups = _groups_by_block(optimizer.param_groups, read_anatomy(trainer.model), stage.block_decay)
        optimizer.param_groups[:] = groups
    trainer.add_callback(end)
    set_seed(trainer.args.seed)  # reading and checking rows for a cache may draw numbers
    trainer.train(resume_from_checkpoint=checkpoint)
    evaluated = [entry["step"] for entry in trainer.state.log_history if end.run.metric in entry]
    if trainer.args.eval_strategy != "no" and evaluated[-1:] != [trainer.state.global_step]:
        trainer.evaluate()  # else the steps since the last evaluation would be thrown away unseen
    trainer.remove_callback(end)  # the caller may evaluate something else with the last trainer


def _build_cache(
    trainer: Any, later: list[FreezePlan], cache_dir: str | os.PathLike[str], say: Callable[[str], None]
) -> Any:
    """The cache of this stage's prefix, given to the trainer; the states of later cuts are taken in its pass."""
    from hf_freeze.prefix import PrefixCache

    precision = "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "fp32"
    rows = trainer.get_train_dataloader().dataset  # without the columns that Trainer drops
    if trainer.args.eval_strategy != "no" and not isinstance(trainer.eval_dataset, dict | NoneType):
        rows = torch.utils.data.ConcatDataset([rows, trainer.get_eval_dataloader().dataset])
    try:
        cache = PrefixCache.build(
            trainer.model,
            rows,
            trainer.data_collator,
            cache_dir=cache_dir,
            precision=precision,
            also=later,
            progress=not trainer.args.disable_tqdm,
        )
    except RankLost:
        raise
    except FreezeError as reason:  # it cannot be exact, or the disk is full: training goes on without, on all ranks
        say(f"note: no prefix cache in this stage: {reason}")
        return None
    say(str(cache.report))
    trainer.data_collator = cache.collator
    return cache


def _let_go(trainer: Any) -> None:
    """Takes DDP's and autocast's wrappers off the model, so that the next stage's trainer wraps the bare one."""
    take_off_autocast(unwrap(trainer.model))
    trainer.model_wrapped = trainer.model
    trainer.optimizer = trainer.lr_scheduler = None  # AdamW's state is as large as what trained, twice
    trainer.accelerator.free_memory()
