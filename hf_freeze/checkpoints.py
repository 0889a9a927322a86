"""Trainer's checkpoints: which of them are whole, what a resume must match, and those that hold trained tensors only.

Trainer writes a checkpoint file by file and removes older ones before anything says that the new one is whole; killed
in between, a run has none. Here each checkpoint gets a manifest once all of it is on disk, older ones go after that,
and a resume takes marked ones only and refuses another plan, model, data or batch. What is in a checkpoint is Trainer's
business, but for `DeltaCheckpoints`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_freeze.anatomy import unwrap
from hf_freeze.delta import is_delta, load_delta, save_delta
from hf_freeze.errors import FreezeError, ResumeError
from hf_freeze.freezing import freeze_record

__all__ = ["CheckpointGuard", "DeltaCheckpoints", "guard_checkpoints", "last_whole_checkpoint", "resume_from"]

MANIFEST = "hf_freeze_checkpoint.json"
VERSION = 1
FIXES = {
    "plan": "Give the plan of the checkpoint (its freeze_plan.json), or start a new run.",
    "frozen part": "Start from the model that the run started from.",
    "trained tensors": "Give the plan, adapters and model of the checkpoint, or start a new run.",
    "training data": "Give the rows of the run, in their order, or start a new run.",
    "rows a step": "Keep batch size x accumulation x processes as it was; their parts may change.",
}


class CheckpointGuard(TrainerCallback):
    """Marks each checkpoint once all of it is on disk, and only then removes the ones beyond the limit.

    Put in place by `guard_checkpoints`.

    Args:
        trainer: Whose callback it is.
        limit: Checkpoints to keep, the newest and the best; None keeps all.
    """

    def __init__(self, trainer: Any, limit: int | None) -> None:
        self._trainer = weakref.ref(trainer)
        self.limit = limit
        self.facts: dict[str, Any] = {}  # what a resume must match

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.read_facts()

    def read_facts(self) -> dict[str, Any]:
        """What a resume must match, of the run as it is now: it may have been frozen since the guard was made."""
        self.facts = run_facts(self._trainer())
        return self.facts

    def on_save(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.world_size > 1:
            torch.distributed.barrier()  # each process writes its random state there
        if not args.should_save:
            return
        record = freeze_record(unwrap(model)) if model is not None else None
        if record is not None:
            record[1].plan.save_pretrained(folder)
        sizes = {}
        for path in _files(folder):
            _flush(path)
            sizes[str(path.relative_to(folder))] = path.stat().st_size
        values = {"version": VERSION, "step": state.global_step, "written": time.time_ns(), "files": sizes}
        write_json(folder / MANIFEST, values | {"run": self.facts})
        remove_older(folder, self.limit, state.best_model_checkpoint)


def remove_older(newest: Path, limit: int | None, best: str | None) -> None:
    """Removes the checkpoints beside the newest that are beyond the limit, and those that are not whole.

    By when they were written, not by step: after a resume from an earlier checkpoint the one just written is not the
    highest. The best one stays.
    """
    if limit is None or limit < 1:
        return
    kept = {newest.resolve(), *(path.resolve() for path in _whole_ones(newest.parent)[:limit])}
    if best:
        kept.add(Path(best).resolve())
    for path in newest.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and path.resolve() not in kept:
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


def data_digest(dataset: Any) -> str | None:
    """Digest of all rows in their order; None where they can only be iterated.

    >>> data_digest([{"input_ids": [1, 2]}]) == data_digest([{"input_ids": torch.tensor([1, 2])}])
    True
    """
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__getitem__"):
        return None
    digest = hashlib.blake2b(digest_size=16)
    for number in range(len(dataset)):
        digest.update(json.dumps(dataset[number], sort_keys=True, default=_plain).encode())
    return digest.hexdigest()


def last_whole_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint in an output folder that is whole; None where there is none."""
    return next(iter(_whole_ones(Path(folder))), None)


def _whole_ones(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, the one written last first."""
    whole = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if not _damage(path)]
    return sorted(whole, key=lambda path: -int(_manifest(path).get("written", 0)))


def _manifest(checkpoint: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    return values


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
    output = Path(trainer.args.output_dir)
    if asked is True or str(asked).lower() in ("last", "true"):
        found = last_whole_checkpoint(output)
        if found is None:
            return None
        checkpoint = found
    else:
        checkpoint = Path(asked)
        if damage := _damage(checkpoint):
            other = last_whole_checkpoint(checkpoint.parent)
            fix = f"The newest whole one is {other}." if other else "There is no whole one beside it: start anew."
            raise ResumeError(f"--resume_from_checkpoint {checkpoint} was asked for; {damage}. {fix}")
    then, now = _manifest(checkpoint)["run"], guard_checkpoints(trainer).read_facts()
    differing = [name for name in FIXES if then.get(name) != now[name]]
    if differing:
        name = differing[0]  # another plan freezes other tensors and trains others: one difference is told
        raise ResumeError(f"{checkpoint} belongs to another run: {_difference(name, then.get(name), now[name])}")
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


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a file under a temporary name, flushes it, and renames it: it is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(values, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _files(folder: Path) -> list[Path]:
    """All but the manifest, and what a kill left of an earlier one."""
    own = (MANIFEST, f"{MANIFEST}.tmp")
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in own]


def _damage(checkpoint: Path) -> str:
    """Why a checkpoint is not whole; "" where it is."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        values = _manifest(checkpoint)
        version, files = values["version"], dict(values["files"])
    except FileNotFoundError:
        return f"it is half written, or not written under hf_freeze: it has no {MANIFEST}"
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} is damaged"
    if version != VERSION:
        return f"its {MANIFEST} is of version {version}, not {VERSION}"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return f"its {name} is missing or cut short"
    return ""


def json_digest(values: Any) -> str:
    """Digest of JSON values."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _difference(name: str, then: Any, now: Any) -> str:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys = [key for key in now if then.get(key) != now[key]]
        shown = ", ".join(f"{key} was {then.get(key)!r}, is {now[key]!r}" for key in keys)
        return f"its {name} differs ({shown}). {FIXES[name]}"
    shown = f" ({then}, now {now})" if name == "rows a step" else ""
    return f"its {name} differ{'' if name.endswith('s') or 'rows' in name else 's'}{shown}. {FIXES[name]}"
