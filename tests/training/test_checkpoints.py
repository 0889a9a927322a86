"""Checkpoints are marked when whole, older ones go after that, and a resume takes only what fits the run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_freeze import FreezePlan, freeze
from hf_freeze.errors import FreezeError, ResumeError
from hf_freeze.freezing import freeze_record, verify_frozen
from hf_freeze.locks import LOCK
from hf_freeze.training.checkpoints import (
    MANIFEST,
    guard_checkpoints,
    last_whole_checkpoint,
    read_manifest,
    remove_checkpoints,
    resume_from,
)
from tests.prefix.cases import review_rows
from tests.training.staged_run import Rows, another_run, make_trainer, pretrained

PLAN = FreezePlan(decoder_blocks=2)


def trainer_in(folder: Path, plan: FreezePlan = PLAN, model: nn.Module | None = None, **given: Any) -> Any:
    trainer = make_trainer(folder, model, **({"max_steps": 8} | given))
    freeze(trainer.model, plan)
    guard_checkpoints(trainer)
    return trainer


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}


def assert_goes_on_to_the_end_of(whole: Any, folder: Path, checkpoint: str, **given: Any) -> None:
    """A new run takes the checkpoint for the last whole one and ends with the losses and weights of the whole run."""
    again = trainer_in(folder, **given)
    assert resume_from(again, "last") == str(folder / checkpoint)
    again.train(resume_from_checkpoint=str(folder / checkpoint))
    assert losses(again) == losses(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(again).values(), weights(whole).values(), strict=True))
    verify_frozen(again.model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that was never stopped; its checkpoints of steps 2, 4, 6 and 8 are all kept."""
    trainer = trainer_in(tmp_path_factory.mktemp("whole"), save_total_limit=None)
    trainer.train()
    return trainer


@pytest.mark.parametrize("only_trained", [False, True])
def test_a_resumed_run_has_the_losses_and_weights_of_one_never_stopped(
    whole: Any, only_trained: bool, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    first = trainer_in(tmp_path, save_only_trained=only_trained)

    def stop(*_: Any, **__: Any) -> None:
        if first.state.global_step == 5:
            raise Stop

    first.callback_handler.callbacks[-1].on_step_end = stop
    with pytest.raises(Stop):
        first.train()
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists() is not only_trained
    assert_goes_on_to_the_end_of(whole, tmp_path, "checkpoint-4", save_only_trained=only_trained)


def test_the_best_model_is_loaded_from_checkpoints_of_trained_tensors(tmp_path: Path) -> None:
    trainer = trainer_in(
        tmp_path, save_only_trained=True, load_best_model_at_end=True, metric_for_best_model="score",
        greater_is_better=True, prediction_loss_only=False,
    )  # fmt: skip
    scores = iter([0.1, 0.9, 0.3, 0.2])
    trainer.compute_metrics = lambda _: {"score": next(scores)}
    seen: dict[int, dict[str, torch.Tensor]] = {}
    on_save = trainer.callback_handler.callbacks[-1].on_save

    def remember(*args: Any, **named: Any) -> None:
        seen[trainer.state.global_step] = weights(trainer)
        on_save(*args, **named)

    trainer.callback_handler.callbacks[-1].on_save = remember
    trainer.train()
    assert trainer.state.best_global_step == 4
    best = seen[4]
    assert any(not torch.equal(best[name], last) for name, last in seen[8].items()), "the best is not the last"
    assert all(torch.equal(best[name], now) for name, now in weights(trainer).items())


def test_small_checkpoints_of_a_sharded_model_are_refused_before_training(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, save_only_trained=True)
    trainer.is_fsdp_enabled = True
    with pytest.raises(FreezeError, match=r"under FSDP or DeepSpeed.*call save_delta after training"):
        trainer.train()


def test_a_model_saved_by_hand_is_whole(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "run", save_only_trained=True)
    trainer.save_model(str(tmp_path / "model"))
    again = type(trainer.model).from_pretrained(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer).values(), again.parameters(), strict=True))


def test_a_checkpoint_of_trained_tensors_is_much_smaller(whole: Any, tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, FreezePlan(decoder_blocks=3), save_only_trained=True, max_steps=2)
    trainer.train()
    small = (tmp_path / "checkpoint-2" / "delta.safetensors").stat().st_size
    full = (Path(whole.args.output_dir) / "checkpoint-2" / "model.safetensors").stat().st_size
    parameters = dict(trainer.model.named_parameters())
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    assert small / full == pytest.approx(trained / sum(p.numel() for p in parameters.values()), abs=0.05)


def test_older_checkpoints_go_only_after_the_new_one_is_marked(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, save_total_limit=1)
    guard = trainer.callback_handler.callbacks[-1]
    on_save, whole_before = guard.on_save, []

    def watch(*args: Any, **named: Any) -> None:
        whole_before.append(last_whole_checkpoint(tmp_path))
        on_save(*args, **named)

    guard.on_save = watch
    trainer.train()
    assert [path and path.name for path in whole_before] == [None, "checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert names_in(tmp_path) == {"checkpoint-8"}


@pytest.mark.parametrize("only_trained", [False, True])
def test_a_disk_that_fills_up_while_saving_leaves_the_older_checkpoint_whole(
    whole: Any, only_trained: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_in(tmp_path, save_total_limit=1, save_only_trained=only_trained)
    save = torch.save

    def full(values: Any, path: Any, *rest: Any, **named: Any) -> None:
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"cut short")
            raise OSError(28, "No space left on device")
        save(values, path, *rest, **named)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    monkeypatch.undo()
    assert_goes_on_to_the_end_of(whole, tmp_path, "checkpoint-2", save_only_trained=only_trained)


def test_what_was_written_last_is_kept_whatever_its_step(whole: Any, tmp_path: Path) -> None:
    """After a resume from an earlier checkpoint the abandoned ones have higher steps."""
    folder = broken(whole, tmp_path)
    trainer = trainer_in(tmp_path, save_total_limit=1)
    shutil.copytree(Path(whole.args.output_dir) / "checkpoint-4", folder / "checkpoint-4")
    trainer.args.max_steps = 6
    trainer.train(resume_from_checkpoint=resume_from(trainer, folder / "checkpoint-4"))
    assert names_in(folder) == {"checkpoint-6"}
    assert last_whole_checkpoint(folder) == folder / "checkpoint-6"


def test_what_the_run_did_not_write_stays_whatever_its_name(whole: Any, tmp_path: Path) -> None:
    earlier = Path(whole.args.output_dir)
    for name in ("checkpoint-8", "checkpoint-my-best"):  # of another guarded run, and a copy of one
        shutil.copytree(earlier / "checkpoint-8", tmp_path / name)
    for name in ("checkpoint-100", "checkpoint-3", "checkpoint-"):  # a stock run's, a half written one, anything
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"theirs")
    (tmp_path / "checkpoint-5").symlink_to(earlier / "checkpoint-2")
    there = names_in(tmp_path)
    trainer = trainer_in(tmp_path, save_total_limit=1, max_steps=6)
    trainer.train()
    assert names_in(tmp_path) == there | {"checkpoint-6"}
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    assert (earlier / "checkpoint-2" / MANIFEST).exists()
    again = trainer_in(tmp_path, save_total_limit=1, max_steps=8, save_steps=1)  # the same run, gone on with
    again.train(resume_from_checkpoint=resume_from(again, "last"))
    assert names_in(tmp_path) == there
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-8", "written over, as Trainer does"


def test_a_run_that_goes_on_from_elsewhere_leaves_the_checkpoints_of_the_run_that_was_there(
    whole: Any, tmp_path: Path
) -> None:
    trainer_in(tmp_path, save_total_limit=None, max_steps=4).train()
    there = {path.name: read_manifest(path)["run_id"] for path in tmp_path.glob("checkpoint-*")}
    assert set(there) == {"checkpoint-2", "checkpoint-4"}
    trainer = trainer_in(tmp_path, save_total_limit=1)
    trainer.train(resume_from_checkpoint=resume_from(trainer, Path(whole.args.output_dir) / "checkpoint-4"))
    ids = {path.name: read_manifest(path)["run_id"] for path in tmp_path.glob("checkpoint-*")}
    own = read_manifest(Path(whole.args.output_dir) / "checkpoint-4")["run_id"]
    assert ids == there | {"checkpoint-8": own}


def test_a_checkpoint_that_is_being_written_over_is_not_whole(whole: Any, tmp_path: Path) -> None:
    shutil.copytree(Path(whole.args.output_dir), tmp_path / "run")
    trainer = trainer_in(tmp_path / "run", save_total_limit=None)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt  # the weights are new, the optimizer's state is of the run before

    trainer._save_optimizer_and_scheduler = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=resume_from(trainer, tmp_path / "run" / "checkpoint-4"))
    assert trainer.state.global_step == 6
    with pytest.raises(ResumeError, match=r"checkpoint-6 was asked for; it is half written"):
        resume_from(trainer, tmp_path / "run" / "checkpoint-6")


# ----------------------------------------------------------------------------------------------- one run in a folder


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    child = another_run(tmp_path)
    try:
        trainer = trainer_in(tmp_path, max_steps=2)
        told = rf"{tmp_path}; process {child} on {socket.gethostname()} \(since \d.*\) is writing there\. Wait for"
        with pytest.raises(FreezeError, match=told):
            trainer.train()
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    trainer = trainer_in(tmp_path, max_steps=2)  # a lock of a dead process is no lock
    trainer.train()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    child = another_run(tmp_path)  # the run is over
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_manifest_half_written_by_a_kill_does_no_harm(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, max_steps=2)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / f"{MANIFEST}.0123456789ab.tmp").write_text("{")
    trainer.train()
    assert not any("tmp" in name for name in read_manifest(tmp_path / "checkpoint-2")["files"])
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_a_guard_made_before_freeze_knows_the_plan_of_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    guard_checkpoints(trainer)
    freeze(trainer.model, PLAN)
    trainer.train()
    assert resume_from(trainer_in(tmp_path), "last") == str(tmp_path / "checkpoint-2")


def broken(whole: Any, folder: Path) -> Path:
    """The run's folder with checkpoints 6 and 8, to be damaged."""
    for step in (6, 8):
        shutil.copytree(Path(whole.args.output_dir) / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / MANIFEST).unlink(), "half written"),
        (lambda path: (path / MANIFEST).write_text("{"), "is damaged"),
        (lambda path: (path / MANIFEST).write_text('{"version": 9, "files": {}}'), "of version 9"),
        (lambda path: (path / "optimizer.pt").unlink(), "optimizer.pt is missing or cut short"),
        (lambda path: (path / "model.safetensors").write_bytes(b"x"), "model.safetensors is missing or cut short"),
        (lambda path: shutil.rmtree(path), "no such folder"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_and_the_last_whole_one_named(
    whole: Any, damage: Any, message: str, tmp_path: Path
) -> None:
    folder = broken(whole, tmp_path)
    damage(folder / "checkpoint-8")
    trainer = trainer_in(tmp_path)
    with pytest.raises(ResumeError, match=f"{message}.*The newest whole one is .*checkpoint-6"):
        resume_from(trainer, folder / "checkpoint-8")
    assert resume_from(trainer, True) == str(folder / "checkpoint-6")


WRONG: list[Any] = [None, True, "x", 1.5, [], ["x"], {"x": {}}, {"../x": "y"}]


@pytest.mark.parametrize("field", ["version", "step", "written", "files", "run_id", "run", None])
def test_a_manifest_of_other_types_is_damage_and_no_traceback(whole: Any, field: str | None, tmp_path: Path) -> None:
    folder = broken(whole, tmp_path)
    path = folder / "checkpoint-8" / MANIFEST
    values = json.loads(path.read_text())
    trainer = trainer_in(tmp_path)
    for wrong in WRONG:
        path.write_text(json.dumps(wrong if field is None else values | {field: wrong}))
        for asked in (folder / "checkpoint-8", True):
            with contextlib.suppress(ResumeError):
                assert resume_from(trainer, asked) in (str(folder / "checkpoint-8"), str(folder / "checkpoint-6"))
        remove_checkpoints(folder, "another run", 0, [])
    path.write_text("[" * 100_000)
    with pytest.raises(ResumeError, match="is damaged"):
        resume_from(trainer, folder / "checkpoint-8")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ResumeError, match="is damaged"):
        resume_from(trainer, folder / "checkpoint-8")


def test_without_any_whole_checkpoint_the_last_one_is_none(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    assert resume_from(trainer, "last") is None
    with pytest.raises(ResumeError, match="no whole one beside it"):
        resume_from(trainer, tmp_path / "checkpoint-2")


def other_weights() -> nn.Module:
    model = pretrained()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    return model


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"plan": FreezePlan(decoder_blocks=1)}, r"its plan differs \(decoder_blocks was 2, is 1\)\. Give the plan"),
        ({"per_device_train_batch_size": 2}, r"its rows a step differ \(4, now 2\)"),
        ({"gradient_accumulation_steps": 2}, r"its rows a step differ \(4, now 8\)"),
        ({"model": other_weights}, r"its frozen part differs\. Start from the model"),
        ({"rows": lambda: Rows(reversed(review_rows("llama")))}, "its training data differs"),
    ],
)
def test_another_plan_batch_model_or_dataset_is_refused(
    whole: Any, given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given = {name: value() if callable(value) else value for name, value in given.items()}
    rows = given.pop("rows", None)
    trainer = trainer_in(tmp_path, **given)
    trainer.train_dataset = rows or trainer.train_dataset
    with pytest.raises(ResumeError, match=message):
        resume_from(trainer, broken(whole, tmp_path) / "checkpoint-8")


def test_the_same_rows_a_step_in_other_parts_are_resumed(whole: Any, tmp_path: Path) -> None:
    folder = broken(whole, tmp_path)
    trainer = trainer_in(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.train(resume_from_checkpoint=resume_from(trainer, folder / "checkpoint-6"))
    assert losses(trainer)[:6] == losses(whole)[:6]
    assert len(losses(trainer)) == 8


def test_the_plan_lies_in_the_checkpoint(whole: Any) -> None:
    folder = Path(whole.args.output_dir) / "checkpoint-2"
    assert FreezePlan.from_pretrained(folder) == PLAN == freeze_record(whole.model)[1].plan
    assert json.loads((folder / MANIFEST).read_text())["run"]["processes"] == 1


def test_the_callers_arguments_are_left_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    given = trainer.args
    guard = guard_checkpoints(trainer)
    assert given.save_total_limit == 1 == guard.limit
    assert trainer.args.save_total_limit is None
    assert guard_checkpoints(trainer) is guard
