"""Gradual unfreezing: a list of plans, trained one after the other, top down, each from the best weights so far.

Every stage gets a trainer of its own: an optimizer, a schedule and a DDP wrapper that know what trains now. Unfreezing
under a living trainer leaves new tensors out of all three, without a word. What is done and the best weights of each
stage lie in the output folder, so that a run that was killed goes on. How one stage trains is Trainer's business.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, cast

import torch
import yaml
from torch import nn
from transformers import TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from hf_freeze.anatomy import Anatomy, read_anatomy
from hf_freeze.delta import load_delta, save_delta
from hf_freeze.errors import FreezeError, RankLost, ResumeError, StageError, nearest
from hf_freeze.files import json_digest, write_json
from hf_freeze.freezing import FreezeReport, freeze, thaw, verify_frozen
from hf_freeze.given import check_callable, check_kind, check_model, check_path
from hf_freeze.locks import leave_folder, take_folder
from hf_freeze.plan import FreezePlan, plan_at_depth
from hf_freeze.prepared import take_off_autocast
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
from hf_freeze.training.monitor import FreezeMonitor

__all__ = ["Stage", "StagesReport", "gradual", "load_stages", "save_stages", "train_in_stages"]

LEDGER = "stages.json"
BEST = "best"  # in each stage's folder: the delta of the best weights so far


@dataclass(frozen=True)
class Stage:
    """One stage: what is frozen in it, how long it lasts, how fast what trains learns.

    Args:
        plan: What is frozen. A later stage trains all that an earlier one trains.
        epochs: Passes over the training rows; None is what the trainer's arguments say.
        steps: Optimizer steps instead.
        learning_rate: Of the top block, final norm and head; None is what the trainer's arguments say.
        block_decay: Rate of each block over that of the block above it. 1.0 is one rate for all; 1 / 2.6 is that of
            "Universal Language Model Fine-tuning for Text Classification" (2018), discriminative fine-tuning.
        patience: End the stage after so many evaluations in a row without a new best; None trains it to its end.
        min_gain: What a new best must gain over the last one, relative to it. 0.0, so that any gain counts.

    Raises:
        StageError: A value of the wrong kind or out of bounds; epochs and steps at once.

    Example:
        >>> Stage(FreezePlan(decoder_blocks=-4), epochs=1).to_dict()
        {'plan': {'decoder_blocks': -4}, 'epochs': 1}
    """

    plan: FreezePlan
    epochs: float | None = None
    steps: int | None = None
    learning_rate: float | None = None
    block_decay: float = 1.0
    patience: int | None = None
    min_gain: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.plan, FreezePlan):
            raise StageError(f"A stage was given a {type(self.plan).__name__} as plan; it takes a FreezePlan.")
        for name in ("epochs", "learning_rate", "block_decay", "min_gain"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise StageError(
                    f"A stage was given {name}={value!r}; it is a number. In YAML, write 1.0e-4 or 0.0001 for 1e-4."
                )
        if self.epochs is not None and self.steps is not None:
            raise StageError(f"A stage was given epochs={self.epochs} and steps={self.steps}; give one of them.")
        for name, most in (("epochs", math.inf), ("learning_rate", math.inf), ("block_decay", 1.0)):
            value = getattr(self, name)
            if (value is not None and not 0.0 < value <= most) or value == math.inf:
                bound = "finite number above 0" if most == math.inf else "number above 0, at most 1"
                raise StageError(f"A stage was given {name}={value}; it is a {bound}. A stage must end.")
        for name in ("steps", "patience"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise StageError(f"A stage was given {name}={value}; it is a whole number, 1 or more.")
        if not 0.0 <= self.min_gain < 1.0:
            raise StageError(f"A stage was given min_gain={self.min_gain}; it is a fraction, 0 or more and below 1.")

    def to_dict(self) -> dict[str, Any]:
        """The stage as JSON-ready values, without those that are the default."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "plan"}
        defaults = {f.name: f.default for f in fields(self) if f.name != "plan"}
        plan, usual = self.plan.to_dict(), FreezePlan().to_dict()
        return {"plan": {key: value for key, value in plan.items() if value != usual[key]}} | {
            key: value for key, value in values.items() if value != defaults[key]
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Stage:
        """A stage from such values.

        Raises:
            StageError: A key that no stage has.
        """
        known = [f.name for f in fields(cls)]
        if not isinstance(values, dict) or "plan" not in values:
            raise StageError(f"A stage was given as {values!r}; it is a mapping with the key 'plan'.")
        if unknown := [key for key in values if key not in known]:
            raise StageError(f"A stage was given {unknown[0]!r}; the nearest: {nearest(unknown[0], known)}.")
        plan = values["plan"] or {}
        if not isinstance(plan, dict):
            raise StageError(f"A stage was given {plan!r} as plan; it is a mapping such as {{decoder_blocks: -4}}.")
        return cls(**{**values, "plan": FreezePlan.from_dict(plan)})


@dataclass(frozen=True)
class StageResult:
    """What became of one stage.

    Attributes:
        trained_blocks: Blocks with trainable tensors.
        steps: Optimizer steps that it took.
        seconds: Of training and evaluation, without the cache, in the process that ended it.
        start_metric, best_metric: Of the weights that it began and ended with; None without evaluation.
        ended: Why it ended.
        cached: Whether its frozen prefix came from the cache.
    """

    number: int
    trained_blocks: int
    steps: int
    seconds: float
    start_metric: float | None
    best_metric: float | None
    ended: str
    cached: bool


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

        def told(value: float | None) -> str:
            return "-" if value is None else f"{value:.4g}"

        rows = tuple(
            (str(s.number), str(s.trained_blocks), str(s.steps), f"{s.seconds:.1f} s", told(s.start_metric),
             told(s.best_metric), s.ended)
            for s in self.stages
        )  # fmt: skip
        columns = ("stage", "trained blocks", "steps", "time", f"{self.metric} before", "best", "ended")
        return Table("Stages", columns, rows)


def gradual(
    model: nn.Module, start: int, step: int, stages: int, *, plan: FreezePlan | None = None, **each: Any
) -> list[Stage]:
    """Stages that train the top `start` blocks, then `step` more in each stage.

    In an encoder-decoder the decoder's blocks are unfrozen first, then the encoder's. Changes no model.

    Args:
        model: Whose blocks are counted.
        start: Blocks that the first stage trains, from the top.
        step: Blocks that each stage trains more than the one before.
        stages: How many stages.
        plan: What holds in all of them beside the blocks; None is `FreezePlan()`: the embeddings stay frozen.
        each: Fields of `Stage` for all of them, such as epochs=1.

    Returns:
        The stages, for `train_in_stages` or `save_stages`.

    Raises:
        StageError: The last stage would train more blocks than there are.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=8, n_head=2, vocab_size=16))
        >>> [stage.plan.decoder_blocks for stage in gradual(model, start=1, step=2, stages=3, epochs=1)]
        [5, 3, 1]
    """
    check_model("gradual", model)
    anatomy = read_anatomy(model)
    total = sum(len(stack) for stack in anatomy.stacks)
    for name, value, least in (("start", start, 1), ("step", step, 0), ("stages", stages, 1)):
        if not isinstance(value, int) or value < least:
            raise StageError(f"gradual was given {name}={value!r}; it is a whole number, {least} or more.")
    most = start + step * (stages - 1)
    if most > total:
        fits = (total - start) // step + 1 if step and start <= total else 0
        fix = f"Use stages <= {fits}." if fits else f"Use start <= {total}."
        raise StageError(
            f"gradual was asked for {start} blocks and {step} more in each of {stages} stages, {most} in the last; "
            f"{anatomy.model_class} has {total}. {fix}"
        )
    plans = [plan_at_depth(anatomy, total - start - step * number, plan) for number in range(stages)]
    return [Stage(plan, **each) for plan in plans]


def save_stages(stages: Sequence[Stage], path: str | os.PathLike[str]) -> None:
    """Writes stages as YAML, to be edited by hand."""
    _check_stages("save_stages", "stages", stages)
    check_path("save_stages", "path", path)
    text = yaml.safe_dump({"stages": [stage.to_dict() for stage in stages]}, sort_keys=False)
    Path(path).write_text(text, encoding="utf-8")


def _check_stages(what: str, argument: str, plans: object) -> None:
    """Refuses what is no sequence of plans or stages."""
    fix = f"{argument}=[FreezePlan(decoder_blocks=-4), FreezePlan(decoder_blocks=-8)], or gradual(model, 4, 4, 2)"
    check_kind(what, argument, plans, (list, tuple), "a list of plans or stages", fix, StageError)
    for plan in cast("Sequence[object]", plans):
        check_kind(what, argument, plan, (FreezePlan, Stage), "plans or stages", fix, StageError)


def load_stages(path: str | os.PathLike[str]) -> list[Stage]:
    """Reads stages from YAML.

    Raises:
        StageError: No such file, no YAML, or a key that no stage has.
    """
    check_path("load_stages", "path", path)
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise StageError(f"Stages were to be read from {path}; it cannot be read: {reason}.") from error
    if not isinstance(values, dict) or not isinstance(values.get("stages"), list) or not values["stages"]:
        raise StageError(f"Stages were to be read from {path}; it holds no list named 'stages', or an empty one.")
    return [Stage.from_dict(value) for value in values["stages"]]


def train_in_stages(
    make_trainer: Callable[..., Any],
    plans: Sequence[FreezePlan | Stage] | str | os.PathLike[str],
    *,
    output_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    say: Callable[[str], None] = print,
    **each: Any,
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
        each: Fields of `Stage` for those of `plans` that are bare FreezePlans: epochs=1, patience=2, ...

    Returns:
        The report; its trainer holds the model.

    Raises:
        StageError: Stages that train less than the one before or never end, patience without evaluation, another run
            in output_dir, a trainer given twice. Before anything is trained, where that can be known.
        ResumeError: What lies there belongs to another model, plan or data.

    Example:
        >>> import contextlib, tempfile
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
    _check_stages("train_in_stages", "plans", plans)
    stages = [plan if isinstance(plan, Stage) else Stage(plan, **each) for plan in plans]
    if not stages:
        raise StageError("train_in_stages was given no plan; give one or more, such as gradual(model, 4, 4, 3).")
    first = _make(make_trainer, stages[0])
    with agreed("begin the stages"):
        run = _Run.begin(first, stages, Path(output_dir or first.args.output_dir), resume)
    tell = say if first.args.process_index == 0 else _silent
    done = len(run.results)
    if done:
        tell(f"{done} of {len(stages)} stages are done already in {run.folder}.")
    trainer = first
    for number in range(done + 1, len(stages) + 1):
        made = first if number == 1 else _make(make_trainer, stages[number - 1])
        if number > 1 and made is trainer:
            raise StageError(
                f"make_trainer gave the trainer of the stage before again, for stage {number}; its optimizer and its "
                "DDP wrapper know only what trained there. Return a new Trainer at each call; all may share a model."
            )
        trainer = made
        run.train(number, trainer, cache_dir, tell)
    if done == len(stages):
        with agreed("load the weights of the last stage"):
            thaw(trainer.model)
            freeze(trainer.model, stages[-1].plan)
            load_delta(run.best_folder(done), trainer.model)
    if first.args.process_index == 0:
        leave_folder(run.folder)
    report = StagesReport(tuple(run.results), run.metric, trainer, done)
    tell(str(report))
    return report


def _silent(text: str) -> None:
    """Takes the place of `say` where another process speaks."""


def _make(make_trainer: Callable[..., Any], stage: Stage) -> Any:
    """A new trainer for the stage; the callable may do without its argument."""
    try:
        inspect.signature(make_trainer).bind(stage)
        takes_stage = True
    except TypeError:
        takes_stage = False
    return make_trainer(stage) if takes_stage else make_trainer()


# ------------------------------------------------------------------------------------------------------------- the run


class _Run:
    """A list of stages under way: what is done lies in stages.json, the best weights of each stage in its folder."""

    def __init__(self, stages: list[Stage], folder: Path, args: Any) -> None:
        self.stages = stages
        self.folder = folder
        self.results: list[StageResult] = []
        self.under_way = False  # the first stage that is not done may have checkpoints of a run that was killed
        name = args.metric_for_best_model or "loss"
        self.metric = name if name.startswith("eval_") else f"eval_{name}"
        greater = args.greater_is_better
        self.greater = not name.endswith("loss") if greater is None else bool(greater)
        self.several = False  # validation sets
        self.facts: dict[str, Any] = {}
        self.start = ""  # digest of the weights that the first stage begins with

    @classmethod
    def begin(cls, trainer: Any, stages: list[Stage], folder: Path, resume: bool) -> _Run:
        """Checks all that can be known before anything is trained; reads what is done."""
        args = trainer.args
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise StageError(
                "train_in_stages was asked for under FSDP or DeepSpeed, which shard a model once and for all. Use DDP, "
                "or run the stages one by one: save_delta after each, load_delta before the next."
            )
        run = cls(stages, folder, args)
        run.several = isinstance(trainer.eval_dataset, dict)
        if run.several and not any(run.metric.startswith(f"eval_{name}_") for name in trainer.eval_dataset):
            raise StageError(
                f"Stages end by {run.metric}; there are several validation sets. Name a metric of one of them in "
                f"metric_for_best_model, such as eval_{next(iter(trainer.eval_dataset))}_loss."
            )
        _check_ends(stages, args, trainer.eval_dataset)
        _check_growth(stages, read_anatomy(trainer.model))
        facts = run_facts(trainer)
        run.facts = {name: facts[name] for name in ("training data", "rows a step")}
        if args.process_index == 0:
            take_folder(folder)
        ledger = folder / LEDGER
        if ledger.exists() and not resume:
            raise StageError(
                f"train_in_stages was to write into {folder}, which holds another run ({LEDGER}). Go on with "
                "resume=True, or give another output_dir."
            )
        if ledger.exists():
            run.results = run._read(ledger)
            run.under_way = True
        barrier()  # until every process has looked
        start = _digest_of(trainer.model)
        if run.under_way and not run.results and start != run.start and not last_whole_checkpoint(folder / "stage-1"):
            raise ResumeError(  # a later stage compares what was frozen before it; the first one has only this
                f"{ledger} was begun with other weights than this model's, and its first stage has no checkpoint yet. "
                "Load the model again: a run that was interrupted leaves it half trained."
            )
        if not run.under_way:
            run.start = start
        if args.should_save and not run.under_way:
            folder.mkdir(parents=True, exist_ok=True)
            run._write()
        return run

    def best_folder(self, number: int) -> Path:
        """Where a stage's best weights lie."""
        return self.folder / f"stage-{number}" / BEST

    def train(
        self, number: int, trainer: Any, cache_dir: str | os.PathLike[str] | None, say: Callable[[str], None]
    ) -> None:
        """Trains one stage, from the best weights of the one before; the model then holds this one's."""
        stage, model, best_folder = self.stages[number - 1], trainer.model, self.best_folder(number)
        with agreed(f"begin stage {number}"):
            report, later = self._enter(number, trainer)
            checkpoint = resume_from(trainer, True) if self.under_way else None
            if len(set(found := tell_all(checkpoint))) > 1:
                raise ResumeError(
                    f"The ranks found unlike checkpoints of stage {number}: {', '.join(map(str, found))}. Let "
                    "output_dir be one folder that all ranks see."
                )
            state = TrainerState()
            if checkpoint:
                state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        before = self.results[-1].best_metric if self.results else None
        blocks = _trained_blocks(read_anatomy(model), set(report.trainable_names))
        what = f"{blocks} block{'s' * (blocks != 1)}, {report.trainable_parameters:,} parameters"
        say(f"Stage {number} of {len(self.stages)}: {what} train.")
        if checkpoint:
            say(f"Going on from {checkpoint}.")
        elif before is not None:
            save_delta(model, best_folder, extra={"metric": before, "step": 0})
        self.under_way = False
        cache = _build_cache(trainer, later, cache_dir, say) if cache_dir is not None else None
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
        best = end.best(state.log_history)
        with agreed(f"end stage {number}"):
            if best is None:
                save_delta(model, best_folder, extra={"metric": None, "step": state.global_step})
            else:
                load_delta(best_folder, model)
            if cache is not None:  # after the weights are saved: it raises where the last states were old
                trainer.data_collator = cache.collator.collator
                cache.close()
            verify_frozen(model, report)
            why = end.why(state.log_history)
            self.results.append(
                StageResult(number, blocks, state.global_step, seconds, before, best, why, cache is not None)
            )
            barrier()  # until every process has read the weights
            if trainer.args.should_save:
                self._write()
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
        later = _cut_by_cut(self.stages[number - 1 :], read_anatomy(model))
        report = freeze(model, stage.plan)
        for monitor in [c for c in trainer.callback_handler.callbacks if isinstance(c, FreezeMonitor)]:
            monitor.put_first(trainer)
            monitor.remember(model)  # before the weights of the stage before: drift is from the pretrained ones
        guard_checkpoints(trainer)
        if number > 1:
            load_delta(self.best_folder(number - 1), model)
        return report, later

    def _write(self) -> None:
        values = {"version": 1, "stages": [stage.to_dict() for stage in self.stages], "run": self.facts}
        values |= {"metric": self.metric, "start": self.start, "done": [asdict(r) for r in self.results]}
        write_json(self.folder / LEDGER, values)

    def _read(self, ledger: Path) -> list[StageResult]:
        """The stages that are done, where they are those of this run."""
        try:
            values = json.loads(ledger.read_text(encoding="utf-8"))
            stages, done = values["stages"], [StageResult(**result) for result in values["done"]]
            facts, metric, self.start = values["run"], values["metric"], str(values["start"])
        except (ValueError, KeyError, TypeError) as error:
            raise ResumeError(
                f"{ledger} was to be read; it is damaged: {error}. Start anew in another output_dir."
            ) from error
        asked = [stage.to_dict() for stage in self.stages]
        here: dict[str, Any] = {"metric": self.metric, **self.facts}
        here |= {f"stage {n}": each for n, each in enumerate(asked, start=1)}
        there: dict[str, Any] = {"metric": metric, **facts}
        there |= {f"stage {n}": each for n, each in enumerate(stages, start=1)}
        for name in here | there:
            if here.get(name) != there.get(name):
                raise ResumeError(
                    f"{ledger} belongs to another run: its {name} is {there.get(name)}, and {here.get(name)} was "
                    "asked for. Give those of the run, or another output_dir."
                )
        return done


class _StageEnd(TrainerCallback):
    """Keeps the best weights of a stage, and stops it where validation stalls.

    All of it follows from the log, which Trainer keeps in its checkpoints: a resumed stage ends where it would have.
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
        best, _waited, newest = self._read(state.log_history)
        if newest:
            save_delta(model, self.folder, extra={"metric": best, "step": state.global_step})
        if self.stalled(state.log_history):
            control.should_training_stop = True

    def best(self, history: Sequence[dict[str, Any]]) -> float | None:
        """The best metric so far, that of the weights it began with included; None without evaluation."""
        return self._read(history)[0]

    def stalled(self, history: Sequence[dict[str, Any]]) -> bool:
        """Whether validation has not gained for so many evaluations as the stage has patience."""
        return self.stage.patience is not None and self._read(history)[1] >= self.stage.patience

    def last_step(self, history: Sequence[dict[str, Any]]) -> int | None:
        """The step of the newest evaluation."""
        return next((int(entry["step"]) for entry in reversed(history) if self.run.metric in entry), None)

    def why(self, history: Sequence[dict[str, Any]]) -> str:
        """Why the stage ended, in a few words."""
        if self.stalled(history):
            return f"stalled: no gain in {self.stage.patience} evaluations"
        if self.stage.steps is not None:
            return f"{self.stage.steps} steps"
        return "its epochs" if self.stage.epochs is None else f"{self.stage.epochs:g} epochs"

    def _read(self, history: Sequence[dict[str, Any]]) -> tuple[float | None, int, bool]:
        """The best metric, evaluations since the last one that gained enough, and whether the newest is the best."""
        best = mark = self.before
        waited, newest = 0, False
        for value in (float(entry[self.run.metric]) for entry in history if self.run.metric in entry):
            newest = self._is_better(value, best, 0.0)
            best = value if newest else best
            gained = self._is_better(value, mark, self.stage.min_gain)
            mark, waited = (value, 0) if gained else (mark, waited + 1)
        return best, waited, newest

    def _is_better(self, value: float, than: float | None, gain: float) -> bool:
        if than is None:
            return math.isfinite(value)
        difference = value - than if self.run.greater else than - value
        return difference > gain * abs(than)


# ----------------------------------------------------------------------------------------------------------- one stage


def _check_ends(stages: list[Stage], args: Any, eval_dataset: Any) -> None:
    for number, stage in enumerate(stages, start=1):
        if stage.patience is not None and (str(args.eval_strategy.value) == "no" or eval_dataset is None):
            raise StageError(
                f"Stage {number} has patience={stage.patience}; the trainer's arguments evaluate nothing. Give them "
                "eval_strategy='epoch' or 'steps' and the trainer an eval_dataset, or leave patience out."
            )
        endless = args.max_steps <= 0 and not 0 < args.num_train_epochs < math.inf
        if endless and stage.steps is None and stage.epochs is None:
            raise StageError(
                f"Stage {number} never ends: it has neither epochs nor steps, and the trainer's arguments say "
                f"num_train_epochs={args.num_train_epochs}. Give it epochs or steps."
            )


def _check_growth(stages: list[Stage], anatomy: Anatomy) -> None:
    """Every plan fits the model, and trains what the one before trains."""
    before: set[str] = set()
    for number, stage in enumerate(stages, start=1):
        resolved = stage.plan.resolve(anatomy)
        if stage.plan.tied_head != stages[0].plan.tied_head:
            raise StageError(
                f"Stage {number} has tied_head={stage.plan.tied_head!r}, stage 1 {stages[0].plan.tied_head!r}; a head "
                "cannot change that in the middle of a run. Give all stages the same."
            )
        trained = set(resolved.trained) | set(resolved.untied)
        if lost := sorted(before - trained):
            raise StageError(
                f"Stage {number} trains less than stage {number - 1}: {len(lost)} tensors would be frozen again, e.g. "
                f"{lost[0]}. Order the stages top down, or train it apart."
            )
        before = trained


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
    depths = {place: depth for depth, place in enumerate(reversed(blocks))}
    below = len(blocks)

    def depth(parameter: nn.Parameter) -> int:
        part = parts.get(id(parameter))
        if part is None or part.kind not in ("block", "embeddings", "tower"):
            return 0
        return depths[(part.stack, part.index)] if part.kind == "block" else below

    parts = {id(anatomy.parameters[name]): part for name, part in anatomy.parts.items() if name in anatomy.parameters}
    split = []
    for group in groups:
        for each in sorted({depth(p) for p in group["params"]}):
            members = [p for p in group["params"] if depth(p) == each]
            split.append({**group, "params": members, "lr": group["lr"] * decay**each})
    return split


def _train(trainer: Any, stage: Stage, end: _StageEnd, checkpoint: str | None) -> None:
    if stage.block_decay != 1.0:
        optimizer = trainer.create_optimizer()
        groups = _groups_by_block(optimizer.param_groups, read_anatomy(trainer.model), stage.block_decay)
        optimizer.param_groups[:] = groups
    trainer.add_callback(end)
    set_seed(trainer.args.seed)  # reading and checking rows for a cache may draw numbers
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.args.eval_strategy != "no" and end.last_step(trainer.state.log_history) != trainer.state.global_step:
        trainer.evaluate()  # else the steps since the last evaluation would be thrown away unseen
    trainer.remove_callback(end)  # the caller may evaluate something else with the last trainer


def _trained_blocks(anatomy: Anatomy, trained: set[str]) -> int:
    return len({(p.stack, p.index) for name, p in anatomy.parts.items() if p.kind == "block" and name in trained})


def _digest_of(model: nn.Module) -> str:
    return json_digest(sorted((name, tensor_digest(tensor)) for name, tensor in named_tensors(unwrap(model))))


def _cut_by_cut(stages: list[Stage], anatomy: Anatomy) -> list[FreezePlan]:
    """The plans of later stages that a pass for the first one can take states for: each with another cut."""
    cuts = {stages[0].plan.resolve(anatomy).cuts, ()}
    plans = []
    for plan in (stage.plan for stage in stages[1:]):
        if (found := plan.resolve(anatomy).cuts) not in cuts:
            cuts.add(found)
            plans.append(plan)
    return plans


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
