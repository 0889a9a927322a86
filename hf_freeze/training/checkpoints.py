"""Trainer's checkpoints: which of them are whole, what a resume must match, and those that hold trained tensors only.

Trainer writes a checkpoint file by file and removes older ones before anything says that the new one is whole; killed
in between, a run has none. Here each checkpoint gets a manifest once all of it is on disk, older ones of the same run
go after that, and a resume takes marked ones only and refuses another plan, model, data or batch. One run at a time
writes into a folder. What is in a checkpoint is Trainer's business, but for `DeltaCheckpoints`.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import time
import uuid
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from hf_freeze.delta import is_delta, load_delta, save_delta
from hf_freeze.errors import FreezeError, ResumeError
from hf_freeze.files import json_digest, write_json
from hf_freeze.freezing import freeze_record
from hf_freeze.given import check_path, check_trainer
from hf_freeze.locks import leave_folder, take_folder
from hf_freeze.processes import agreed, barrier
from hf_freeze.tensors import unwrap
from hf_freeze.training.data_digest import data_digest

__all__ = ["CheckpointGuard", "DeltaCheckpoints", "guard_checkpoints", "last_whole_checkpoint", "resume_from"]

MANIFEST = "hf_freeze_checkpoint.json"
VERSION = 1
NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
FIXES = {
    "plan": "Give the plan of the checkpoint (its freeze_plan.json), or start a new run.",
    "frozen part": "Start from the model that the run started from.",
    "trained tensors": "Give the plan, adapters and model of the checkpoint, or start a new run.",
    "training data": "Give the rows of the run, in their order, or start a new run.",
    "rows a step": "Keep batch size x accumulation x processes as it was; their parts may change.",
}


class CheckpointGuard(TrainerCallback):
    """Marks each checkpoint once all of it is on disk, and only then removes those of its run beyond the limit.

    Put in place by `guard_checkpoints`. While it trains no other guarded run may write into the output folder.

    Args:
        trainer: Whose callback it is.
        limit: Checkpoints to keep, the newest and the best; None keeps all.
    """

    def __init__(self, trainer: Any, limit: int | None) -> None:
        self._trainer = weakref.ref(trainer)
        self.limit = limit
        self.facts: dict[str, Any] = {}  # what a resume must match
        self.run_id = ""  # stands in the manifest of each checkpoint of this run, resumed or not
        self.resumed: str | None = None  # the id in the checkpoint that `resume_from` chose, wherever that lies

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with agreed("begin a guarded run"):
            if args.process_index == 0:
                take_folder(Path(args.output_dir))
            resumed = self.resumed if state.global_step else ""  # `train` may begin anew all the same
            if resumed is None:  # it goes on without `resume_from`
                resumed = read_manifest(_checkpoint(args, state)).get("run_id", "")
            self.run_id, self.resumed = resumed or uuid.uuid4().hex, None
            self.read_facts()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.process_index == 0:
            leave_folder(Path(args.output_dir))

    def read_facts(self) -> dict[str, Any]:
        """What a resume must match, of the run as it is now: it may have been frozen since the guard was made."""
        self.facts = run_facts(self._trainer())
        return self.facts

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Unmarks what Trainer is about to write over, as after a resume from an earlier checkpoint."""
        may_save = control.should_save or (control.should_evaluate and args.save_strategy == SaveStrategy.BEST)
        if may_save and args.should_save:
            (_checkpoint(args, state) / MANIFEST).unlink(missing_ok=True)

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        folder = _checkpoint(args, state)
        barrier()  # each process writes its random state there
        with agreed(f"mark {folder} as whole"):
            if args.should_save:
                self._mark(folder, state, model)

    def _mark(self, folder: Path, state: Any, model: nn.Module | None) -> None:
        record = freeze_record(unwrap(model)) if model is not None else None
        if record is not None:
            record[1].plan.save_pretrained(folder)
        sizes = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.startswith(MANIFEST):  # nor what a kill left of an earlier one
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                sizes[str(path.relative_to(folder))] = path.stat().st_size
        values = {"version": VERSION, "step": state.global_step, "written": time.time_ns(), "files": sizes}
        write_json(folder / MANIFEST, values | {"run_id": self.run_id, "run": self.facts})
        if self.limit is not None and self.limit >= 1:
            best = state.best_model_checkpoint
            remove_checkpoints(folder.parent, self.run_id, self.limit, [folder, *([Path(best)] if best else [])])


def remove_checkpoints(folder: Path, run_id: str, limit: int, kept: Sequence[Path]) -> None:
    """Removes a run's own checkpoints in a folder but the last `limit` whole ones and those that are to be kept.

    By when they were written, not by step: after a resume from an earlier checkpoint the one just written is not the
    highest. What carries no manifest of this run is another's: it stays.
    """
    own = [path for path in _checkpoints(folder) if read_manifest(path).get("run_id") == run_id]
    keep = {path.resolve() for path in (*_whole_ones(own)[:limit], *kept)}
    for path in own:
        if path.resolve() not in keep:
            shutil.rmtree(path, ignore_errors=True)


def guard_checkpoints(trainer: Any) -> CheckpointGuard:
    """Lets a trainer mark its checkpoints whole; call it before `train`. Mutates the trainer.

    Its `save_total_limit` moves to the guard, since Trainer removes older checkpoints before the new one is marked.

    Returns:
        The guard, which is among the trainer's callbacks; asking twice returns the first.

    Example:
        >>> from types import SimpleNamespace
        >>> from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
        >>> import tempfile
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
        >>> args = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none", save_total_limit=2)
        >>> guard = guard_checkpoints(Trainer(model=model, args=args))
        >>> guard.limit
        2
    """
    check_trainer("guard_checkpoints", trainer)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, CheckpointGuard):
            return callback
    guard = CheckpointGuard(trainer, trainer.args.save_total_limit)
    trainer.args = copy.copy(trainer.args)  # the caller's may serve another trainer
    trainer.args.save_total_limit = None
    trainer.add_callback(guard)
    return guard


def run_facts(trainer: Any) -> dict[str, Any]:
    """What two runs share where one may go on from a checkpoint of the other."""
    core = unwrap(trainer.model)
    record = freeze_record(core)
    trained = sorted((name, list(p.shape)) for name, p in core.named_parameters() if p.requires_grad)
    args = trainer.args
    return {
        "plan": record[1].plan.to_dict() if record else None,
        "frozen part": json_digest(sorted(record[1].digests.items())) if record else None,
        "trained tensors": json_digest(trained),
        "training data": data_digest(trainer.train_dataset),
        "rows a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "processes": args.world_size,
    }


def last_whole_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint in an output folder that is whole; None where there is none."""
    return next(iter(_whole_ones(_checkpoints(Path(folder)))), None)


def _checkpoint(args: Any, state: Any) -> Path:
    """Where Trainer saves at this step."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _checkpoints(folder: Path) -> list[Path]:
    """The folders that bear the name of a checkpoint of Trainer's; `checkpoint-my-best` is somebody else's."""
    try:
        return [p for p in folder.iterdir() if NAME.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
    except OSError:  # no such folder, or none to read
        return []


def _whole_ones(checkpoints: Sequence[Path]) -> list[Path]:
    """The last written one first."""
    return sorted((path for path in checkpoints if not _damage(path)), key=lambda path: -read_manifest(path)["written"])


def resume_from(trainer: Any, asked: str | os.PathLike[str] | Literal[True]) -> str | None:
    """The checkpoint that `trainer.train(resume_from_checkpoint=...)` may go on from.

    Call it after `freeze` and `guard_checkpoints`: the plan, the frozen weights, the names of what trains, the rows
    and the rows a step must be those of the checkpoint. The number of processes may be another one where
    batch size x accumulation x processes stays.

    Args:
        asked: A checkpoint's folder; or True or "last": the newest whole one in the trainer's output_dir.

    Returns:
        Its folder; None where "last" found none, so that a run which was stopped before its first checkpoint starts
        from the beginning.

    Raises:
        ResumeError: It is not whole, or the run is another one; the difference is named with its fix.
    """
    check_trainer("resume_from", trainer)
    if asked is not True:
        check_path("resume_from", "asked", asked)
    if asked is True or str(asked).lower() in ("last", "true"):
        newest = last_whole_checkpoint(trainer.args.output_dir)
        if newest is None:
            return None
        asked = newest
    checkpoint = Path(asked)
    if damage := _damage(checkpoint):
        other = last_whole_checkpoint(checkpoint.parent)
        fix = f"The newest whole one is {other}." if other else "There is no whole one beside it: start anew."
        raise ResumeError(f"--resume_from_checkpoint {checkpoint} was asked for; {damage}. {fix}")
    guard, manifest = guard_checkpoints(trainer), read_manifest(checkpoint)
    then, now = manifest["run"], guard.read_facts()
    differing = [name for name in FIXES if then.get(name) != now[name]]
    if differing:
        name = differing[0]  # another plan freezes other tensors and trains others: one difference is told
        raise ResumeError(f"{checkpoint} belongs to another run: {_difference(name, then.get(name), now[name])}")
    guard.resumed = manifest.get("run_id", "")
    return str(checkpoint)


class DeltaCheckpoints:
    """Mixed into a Trainer class: checkpoints hold the trained tensors only, where `args.save_only_trained` says so.

    Best-model loading and resume work from them; `save_model` called by hand writes the whole model. Optimizer,
    scheduler and random state are Trainer's as always. Not for FSDP and DeepSpeed, which write their own formats.

    Example:
        >>> from transformers import Trainer
        >>> class SmallCheckpoints(DeltaCheckpoints, Trainer):
        ...     pass
    """

    def train(self: Any, *rest: Any, **named: Any) -> Any:
        """As Trainer's; refuses before the first step what no checkpoint could hold."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded and getattr(self.args, "save_only_trained", False):
            raise FreezeError(
                "--save_only_trained was asked for under FSDP or DeepSpeed, which write checkpoints of their own. "
                "Leave it out there, and call save_delta after training."
            )
        return super().train(*rest, **named)  # type: ignore[misc]

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's; a checkpoint gets a delta instead of the model."""
        small = _internal_call and getattr(self.args, "save_only_trained", False)
        if not small or hasattr(unwrap(self.model), "peft_config"):  # PEFT saves its adapters only, as it is
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        if self.args.should_save and output_dir:  # Trainer writes over a checkpoint of the same step, and so does this
            (Path(output_dir) / "config.json").unlink(missing_ok=True)
        save_delta(self.model, output_dir or self.args.output_dir)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if is_delta(resume_from_checkpoint):
            load_delta(resume_from_checkpoint, self.model)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self: Any) -> None:
        if is_delta(self.state.best_model_checkpoint):
            load_delta(self.state.best_model_checkpoint, self.model)
        else:
            super()._load_best_model()  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------------------- files


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's manifest says; {} where there is none, or none that `CheckpointGuard` could have written."""
    path = checkpoint / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}  # a pipe would be waited for
    except (OSError, ValueError, RecursionError):
        return {}
    kinds = {"version": int, "written": int, "files": dict, "run": dict}
    if not isinstance(values, dict) or not isinstance(values.get("run_id", ""), str):  # earlier versions had none
        return {}
    if isinstance(version := values.get("version"), int) and version != VERSION:
        return {"version": version, "written": 0, "files": {}, "run": {}}  # what else it holds is not known here
    return values if all(isinstance(values.get(name), kind) for name, kind in kinds.items()) else {}


def _damage(checkpoint: Path) -> str:
    """Why a checkpoint is not whole; "" where it is."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    values = read_manifest(checkpoint)
    if not values and not os.path.lexists(checkpoint / MANIFEST):
        return f"it is half written, or not written under hf_freeze: it has no {MANIFEST}"
    if not values:
        return f"its {MANIFEST} is damaged"
    if values["version"] != VERSION:
        return f"its {MANIFEST} is of version {values['version']}, not {VERSION}"
    for name, size in values["files"].items():
        path = checkpoint / name
        try:
            whole = path.is_file() and path.stat().st_size == size
        except OSError as error:
            return f"its {name} cannot be read ({error.strerror})"
        if not whole:
            return f"its {name} is missing or cut short"
    return ""


def _difference(name: str, then: Any, now: Any) -> str:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys = [key for key in now if then.get(key) != now[key]]
        shown = ", ".join(f"{key} was {then.get(key)!r}, is {now[key]!r}" for key in keys)
        return f"its {name} differs ({shown}). {FIXES[name]}"
    shown = f" ({then}, now {now})" if name == "rows a step" else ""
    return f"its {name} differ{'' if name.endswith('s') or 'rows' in name else 's'}{shown}. {FIXES[name]}"
