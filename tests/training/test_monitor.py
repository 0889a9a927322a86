"""The monitor's figures are those computed by hand, it speaks when the losses say so, and it stops what went wrong."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback, TrainerState
from transformers.integrations import integration_utils

from hf_freeze import FreezeError, FreezePlan, FrozenWeightsChanged, PrefixCache, freeze, thaw
from hf_freeze.errors import TrainingDiverged
from hf_freeze.training.monitor import FreezeMonitor
from tests.prefix.cases import collator_for, frozen_model, review_rows
from tests.ranks import run_on_two_ranks
from tests.tiny import tiny_model
from tests.training.watched import ALONE, ddp_trainer, logged, trainer_for, training_logs, watching


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def length(tensors: Any) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


class AtStep(TrainerCallback):
    """Does something to the model at the end of a step."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == self.step:
            self.act(given["model"])


class Reporter(TrainerCallback):
    """Stands in for one of report_to's: keeps what it is given to report."""

    def __init__(self) -> None:
        self.reported: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.reported.append(dict(given["logs"]))


# -------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01])
@pytest.mark.parametrize(("kind", "block"), [("llama", "model.layers.3."), ("bart", "model.decoder.layers.3.")])
def test_gradient_norms_are_those_before_clipping(kind: str, block: str, max_grad_norm: float, tmp_path: Path) -> None:
    rows = review_rows(kind, count=3)
    by_hand = frozen_model(kind, dropout=False).train()
    by_hand(**collator_for(kind, by_hand)(rows)).loss.backward()
    gradients = {name: p.grad for name, p in by_hand.named_parameters() if p.grad is not None}
    trainer = trainer_for(
        frozen_model(kind, dropout=False),
        tmp_path,
        FreezeMonitor(),
        kind=kind,
        rows=rows,
        max_steps=1,
        max_grad_norm=max_grad_norm,
    )
    trainer.train()
    (log,) = training_logs(trainer)
    assert log["grad_norm"] == pytest.approx(length(gradients.values()), rel=1e-4)
    of_block = [gradient for name, gradient in gradients.items() if name.startswith(block)]
    assert log["grad_norm/decoder.3"] == pytest.approx(length(of_block), rel=1e-4)
    parts = [value for key, value in log.items() if key.startswith("grad_norm/")]
    assert math.hypot(*parts) == pytest.approx(log["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(("kind", "block"), [("llama", "model.layers.3."), ("bart", "model.decoder.layers.3.")])
def test_drift_is_how_far_the_weights_are_from_the_pretrained_ones(kind: str, block: str, tmp_path: Path) -> None:
    model = frozen_model(kind)
    before = copies(model)
    trainer = trainer_for(model, tmp_path, FreezeMonitor(), kind=kind)
    trainer.train()
    now = copies(model)
    names = [name for name in now if name.startswith(block)]
    wanted = length(now[name] - before[name] for name in names) / length(before[name] for name in names)
    logs = training_logs(trainer)
    assert logs[-1]["drift/decoder.3"] == pytest.approx(wanted, rel=1e-4)
    assert 0 < logs[0]["drift/decoder.3"] < logs[-1]["drift/decoder.3"]


@pytest.mark.parametrize(
    ("kind", "plan", "blocks", "parts"),
    [
        ("llama", FreezePlan(decoder_blocks=2), 2, {"decoder.2", "decoder.3", "final", "head"}),
        ("llama", FreezePlan(decoder_blocks="all"), 0, {"final", "head"}),
        ("bart", FreezePlan(encoder_blocks=3, decoder_blocks=3), 2, {"encoder.3", "decoder.3"}),
        ("bart", FreezePlan(encoder_blocks="all", decoder_blocks=3, tied_head="untie"), 1, {"decoder.3", "head"}),
        ("bart", FreezePlan(embeddings=False, decoder_blocks=3, encoder_blocks="all"), 1, {"decoder.3", "embeddings"}),
    ],
)
def test_what_trains_has_its_lines_and_what_is_frozen_none(
    kind: str, plan: FreezePlan, blocks: int, parts: set[str], tmp_path: Path
) -> None:
    trainer = trainer_for(frozen_model(kind, plan=plan), tmp_path, FreezeMonitor(), kind=kind, max_steps=1)
    trainer.train()
    (log,) = training_logs(trainer)
    assert log["trained_blocks"] == blocks
    for figure in ("grad_norm", "drift"):
        assert {key.partition("/")[2] for key in log if key.startswith(f"{figure}/")} == parts


def test_a_part_that_was_all_zero_has_no_relative_drift(tmp_path: Path) -> None:
    model = frozen_model("llama")
    nn.init.zeros_(model.model.norm.weight)
    trainer = trainer_for(model, tmp_path, FreezeMonitor(), max_steps=1)
    trainer.train()
    assert "grad_norm/final" in training_logs(trainer)[0]
    assert "drift/final" not in training_logs(trainer)[0]


def test_adapters_are_measured_from_where_they_began(tmp_path: Path) -> None:
    model = tiny_model("llama")
    freeze(model, FreezePlan(decoder_blocks=3))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], layers_to_transform=[3]))
    trainer = trainer_for(adapted, tmp_path, FreezeMonitor(), max_steps=2)
    trainer.train()
    log = training_logs(trainer)[-1]
    assert log["trained_blocks"] == 1
    assert {key for key in log if "/" in key} == {"grad_norm/decoder.3", "drift/decoder.3"}


def test_pieces_held_by_another_library_get_no_line() -> None:
    model = frozen_model("llama")
    monitor = watching(model)
    model.lm_head.weight = nn.Parameter(torch.zeros(0))  # as ZeRO-3 leaves it; its gradients are nowhere to be seen
    monitor.on_pre_optimizer_step(ALONE, TrainerState(), None, model=model, optimizer=None)
    logs = logged(monitor, model, grad_norm=2.0)
    assert logs == {"loss": 1.0, "grad_norm": 2.0, "trained_blocks": 1, "drift/decoder.3": 0.0, "drift/final": 0.0}


def test_a_block_that_someone_unfreezes_in_the_middle_has_no_drift() -> None:
    model = frozen_model("llama")
    monitor = watching(model)
    model.model.layers[2].requires_grad_(True)
    logs = logged(monitor, model)
    assert logs["trained_blocks"] == 2
    assert "drift/decoder.3" in logs
    assert "drift/decoder.2" not in logs


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_watching_changes_no_loss_cached_or_not(kind: str, tmp_path: Path) -> None:
    given = {"kind": kind, "save_strategy": "steps", "save_steps": 2}
    alone = trainer_for(frozen_model(kind), tmp_path / "alone", **given)
    alone.train()
    for cached in (False, True):
        model = frozen_model(kind)
        trainer = trainer_for(model, tmp_path / f"watched{cached}", **given)
        if cached:
            cache = PrefixCache.build(
                model, review_rows(kind), trainer.data_collator, cache_dir=tmp_path / "cache", progress=False
            )
            trainer.data_collator = cache.collator
            cache.release_prefix()  # the check at each save brings it back
        FreezeMonitor.watch(trainer)
        trainer.train()
        losses, wanted = ([log["loss"] for log in training_logs(each)] for each in (trainer, alone))
        assert losses == pytest.approx(wanted, rel=1e-5)
    assert cache.batches_used == 4


def test_blocks_that_structure_does_not_tell_may_be_given() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
            self.others = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))

    model = Plain()
    freeze(model, FreezePlan(decoder_blocks=1), blocks="others")
    assert logged(watching(model, blocks="others"), model)["trained_blocks"] == 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"patience": 0}, r"patience=0; it is a number of evaluations, >= 1"),
        ({"min_gain": -0.1}, r"min_gain=-0\.1; it is a fraction of the loss"),
        ({"min_gain": 5}, r"min_gain=5; .* Use 0\.005 for half a percent"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(FreezeError, match=told):
        FreezeMonitor(**settings)


# ------------------------------------------------------------------------------------------------------------ reporters


@pytest.fixture
def reporter(monkeypatch: pytest.MonkeyPatch) -> Reporter:
    made = Reporter()
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "standin", made)
    return made


def test_a_monitor_that_watches_reaches_the_reporters_too(reporter: Reporter, tmp_path: Path) -> None:
    trainer = trainer_for(frozen_model("llama"), tmp_path, report_to="standin")
    FreezeMonitor.watch(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train()
    logs = training_logs(trainer)
    reported = [log for log in reporter.reported if "loss" in log]
    assert len(logs) == len(reported) == 4
    for log, told in zip(logs, reported, strict=True):
        assert log == told | {"step": log["step"]}
        assert log["drift/decoder.3"] > 0


def test_a_monitor_behind_the_reporters_says_so_once(reporter: Reporter, tmp_path: Path) -> None:
    trainer = trainer_for(frozen_model("llama"), tmp_path, FreezeMonitor(), report_to="standin")
    with pytest.warns(UserWarning, match=r"but not in standin: .* Use FreezeMonitor\.watch\(trainer\)"):
        trainer.train()
    assert "trained_blocks" not in reporter.reported[0]
    assert "trained_blocks" in training_logs(trainer)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train()


def test_a_trainer_has_one_monitor_and_the_last_one_put_first_is_it(tmp_path: Path) -> None:
    given = FreezeMonitor()
    trainer = trainer_for(frozen_model("llama"), tmp_path, given)
    callbacks = trainer.callback_handler.callbacks
    count = len(callbacks)
    assert given.put_first(trainer) is callbacks[0]
    other = FreezeMonitor.watch(trainer)
    assert callbacks[0] is other
    assert given not in callbacks
    assert len(callbacks) == count


# ----------------------------------------------------------------------------------------------- what stops a run


def test_a_frozen_weight_that_moved_stops_the_run_at_the_save(tmp_path: Path) -> None:
    def move(model: Any) -> None:
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1

    trainer = trainer_for(
        frozen_model("llama"), tmp_path, FreezeMonitor(), AtStep(2, move), save_strategy="steps", save_steps=1
    )
    with pytest.raises(FrozenWeightsChanged, match=r"1 moved: model\.layers\.0\.mlp\.up_proj\.weight"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_a_model_that_was_never_frozen_is_watched_and_saved(tmp_path: Path) -> None:
    model = tiny_model("llama")
    trainer = trainer_for(model, tmp_path, FreezeMonitor(), max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    (log,) = training_logs(trainer)
    assert (tmp_path / "checkpoint-1").is_dir()
    assert log["trained_blocks"] == 4
    assert {"drift/embeddings", "drift/decoder.0", "grad_norm/head"} <= log.keys()


def spoil_the_loss(model: nn.Module, step: int) -> None:
    """From that step on the loss is NaN."""
    seen = []

    def spoil(module: nn.Module, _: Any, output: Any) -> Any:
        seen.append(1)
        if len(seen) >= step:
            output["loss"] = output["loss"] * math.nan
        return output

    model.register_forward_hook(spoil)


def test_nan_stops_before_the_optimizer_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    model = frozen_model("llama")
    spoil_the_loss(model, step=3)
    trainer = trainer_for(model, tmp_path, FreezeMonitor(), save_strategy="steps", save_steps=1)
    with pytest.raises(TrainingDiverged, match=r"gradient norm is nan at step 3; .*checkpoint-2\. Use a smaller"):
        trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    assert not (tmp_path / "checkpoint-3").exists()


def test_without_the_monitor_nan_is_hidden_and_reaches_the_weights(tmp_path: Path) -> None:
    model = frozen_model("llama")
    spoil_the_loss(model, step=3)
    trainer = trainer_for(model, tmp_path)
    trainer.train()
    assert all(math.isfinite(log["loss"]) for log in training_logs(trainer))
    assert not all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_steps_that_a_gradient_scaler_skips_are_left_to_it() -> None:
    model = frozen_model("llama")
    monitor = watching(model)
    model.lm_head.weight.grad = torch.full_like(model.lm_head.weight, math.inf)
    scaled = SimpleNamespace(scaler=torch.amp.GradScaler("cpu"))
    monitor.on_pre_optimizer_step(ALONE, TrainerState(), None, model=model, optimizer=scaled)
    with pytest.raises(TrainingDiverged, match=r"gradient norm is inf at step 1; .* No checkpoint had been saved yet"):
        monitor.on_pre_optimizer_step(ALONE, TrainerState(), None, model=model, optimizer=SimpleNamespace(scaler=None))


# ----------------------------------------------------------------------------------------------- stages and resume


def test_one_monitor_over_two_trainers_measures_from_the_pretrained_weights(tmp_path: Path) -> None:
    model = frozen_model("llama")
    before = copies(model)
    monitor = FreezeMonitor()
    trainer_for(model, tmp_path, monitor).train()
    after_one_stage = copies(model)
    thaw(model)
    freeze(model, FreezePlan(decoder_blocks=2))
    second = trainer_for(model, tmp_path, monitor)
    second.train()
    now = copies(model)
    log = training_logs(second)[-1]
    assert log["trained_blocks"] == 2
    for block in (2, 3):
        names = [name for name in now if name.startswith(f"model.layers.{block}.")]
        wanted = length(now[name] - before[name] for name in names) / length(before[name] for name in names)
        assert log[f"drift/decoder.{block}"] == pytest.approx(wanted, rel=1e-4)
    assert any(not torch.equal(after_one_stage[name], before[name]) for name in names)


def test_a_resumed_run_logs_and_says_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    def run(resume: str | None) -> tuple[list[dict[str, Any]], list[str]]:
        said: list[str] = []
        trainer = trainer_for(
            frozen_model("llama"), tmp_path, FreezeMonitor(say=said.append, min_gain=0.9), max_steps=4,
            eval_rows=review_rows("llama", seed=1), eval_strategy="steps", eval_steps=1, save_strategy="steps",
            save_steps=1,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return training_logs(trainer), said

    whole, said = run(None)
    again, said_again = run(str(tmp_path / "checkpoint-2"))
    assert len(again) == 4
    for then, now in zip(whole, again, strict=True):
        assert now == pytest.approx(then, rel=1e-5)
    assert [message.partition(":")[0] for message in said] == ["underfitting"]  # at step 3
    assert said_again == said


# ---------------------------------------------------------------------------------------------------- two processes


def test_two_ranks_log_what_one_process_does_under_ddp_and_sharded_by_fsdp2(tmp_path: Path) -> None:
    alone = ddp_trainer(tmp_path, batch_size=4)
    alone.train()
    run_on_two_ranks("tests/training/watched.py", tmp_path)
    for rank in range(2):
        ddp, fsdp = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert ddp["wrapper"] == "DistributedDataParallel"
        for log, wanted in zip(ddp["logs"], training_logs(alone), strict=True):
            assert log == pytest.approx(wanted, rel=1e-4)
        assert {"drift/decoder.3", "grad_norm/decoder.3", "grad_norm/head"} <= fsdp["sharded"].keys()
        assert fsdp["sharded"] == pytest.approx(fsdp["whole"], rel=1e-4)
        assert "gradient norm is nan at step 1" in fsdp["error"]  # though NaN was planted on one rank only
