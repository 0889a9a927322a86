"""Stages: top down, from the best weights so far, the same after a stop and under two processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_freeze.training.ledger
from hf_freeze import FreezePlan, freeze, thaw, verify_frozen
from hf_freeze.delta import load_delta
from hf_freeze.errors import DeltaMismatch, FreezeError, PlanError, ResumeError, StageError
from hf_freeze.files import write_json
from hf_freeze.locks import LOCK
from hf_freeze.summarization import SummaryTrainer
from hf_freeze.training.monitor import FreezeMonitor
from hf_freeze.training.schedule import Stage, gradual
from hf_freeze.training.stages import StagesReport, train_in_stages
from tests.prefix.cases import collator_for, review_rows
from tests.ranks import run_on_two_ranks
from tests.tiny import tiny_model
from tests.training.staged_run import LINEAR, ROWS_A_STEP, Rows, another_run, make_trainer, one_plan, pretrained, run

Weights = dict[str, torch.Tensor]


def train(folder: Path, plans: Any, *, model: Any = None, say: Any = lambda text: None, **given: Any) -> StagesReport:
    """Stages in a folder; what is no argument of `train_in_stages` nor field of a stage goes to the trainer's."""
    ours = {"steps", "epochs", "cache_dir", "resume", "output_dir"}
    of_trainer = {name: value for name, value in given.items() if name not in ours}
    of_stages = {name: value for name, value in given.items() if name in ours}
    return train_in_stages(lambda: make_trainer(folder, model, **of_trainer), plans, say=say, **of_stages)


def weights(report: Any) -> Weights:
    return {name: p.detach().clone() for name, p in report.trainer.model.named_parameters()}


def assert_same(one: Weights, other: Weights) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_close(one: Weights, other: Weights) -> None:
    """Sums in another order, no more."""
    for name, weight in other.items():
        torch.testing.assert_close(one[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def evaluated(report: StagesReport, metric: str = "eval_loss") -> list[float]:
    return [entry[metric] for entry in report.trainer.state.log_history if metric in entry]


class Whole(NamedTuple):
    folder: Path
    weights: Weights
    said: list[str]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder, said = tmp_path_factory.mktemp("undisturbed"), list[str]()
    return Whole(folder, weights(run(folder, say=said.append)), said)


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> StagesReport:
    """From the cache and without dropout, whose random numbers follow the shape of a batch."""
    return run(tmp_path_factory.mktemp("linear"), shared=tiny_model("llama"), **LINEAR)


TWO_PLANS = [FreezePlan(), FreezePlan(decoder_blocks=1)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of TWO_PLANS, two steps each, that is done."""
    folder = tmp_path_factory.mktemp("done")
    train(folder, TWO_PLANS, steps=2)
    return folder


# ------------------------------------------------------------------------------------------------------------ training


def test_a_shared_model_ends_with_the_bits_of_one_loaded_anew_and_resume_where_nothing_lies_starts_anew(
    undisturbed: Whole, tmp_path: Path
) -> None:
    assert_same(weights(run(tmp_path, shared=pretrained(), resume=True)), undisturbed.weights)


def test_the_cache_changes_nothing(linear: StagesReport, tmp_path: Path) -> None:
    plain = run(tmp_path, cached=False, shared=tiny_model("llama"), **LINEAR)
    assert [stage.cached for stage in (*plain.stages, *linear.stages)] == [False] * 3 + [True] * 3
    assert_close(weights(linear), weights(plain))


def test_one_pass_builds_the_states_of_every_stage(undisturbed: Whole) -> None:
    reports = [text for text in undisturbed.said if text.startswith("Prefix cache")]
    assert ["all there already" in text for text in reports] == [False, True, True]


def test_every_stage_runs_in_the_precision_asked_for_and_the_forward_is_put_back(tmp_path: Path) -> None:
    """accelerate wraps the forward of a shared model once, and takes off too much when it is asked to unwrap it."""
    model = pretrained()
    seen: list[tuple[bool, bool]] = []
    handle = model.model.layers[3].register_forward_pre_hook(
        lambda *_: seen.append((model.training, torch.is_autocast_enabled("cpu")))
    )
    said: list[str] = []
    stages = gradual(model, 1, 1, 2, steps=2)
    report = train(tmp_path, stages, model=model, precision="bf16", cache_dir=tmp_path / "cache", say=said.append)
    handle.remove()
    assert sum(autocast for training, autocast in seen if training) >= 4
    assert not any("no prefix cache" in text for text in said)
    ids = torch.tensor([[5, 6, 7]])
    assert report.trainer.model is model
    assert model(ids, return_dict=False)[0].shape == model(ids).logits.shape, "transformers' own decorators are on"


def test_each_stage_trains_what_it_asks_for_and_no_more(tmp_path: Path) -> None:
    seen: list[tuple[set[str], set[str], int]] = []

    class Look(TrainerCallback):  # type: ignore[misc]
        def on_step_end(
            self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
        ) -> None:
            held = {p for group in optimizer.param_groups for p in group["params"]}
            trained = {name for name, p in model.named_parameters() if p.requires_grad}
            seen.append((trained, {n for n, p in model.named_parameters() if p in held}, len(optimizer.state)))

    model = pretrained()
    model.model.layers[3].mlp.up_proj.weight.requires_grad_(False)  # the user's own freeze
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = train(tmp_path, gradual(model, 1, 1, 2, steps=2), model=model, callbacks=[Look()])
    for step, (trained, held, states) in enumerate(seen):
        assert trained == held, "the optimizer holds what trains"
        assert states == len(trained), "and has moved all of it"
        blocks = {int(name.split(".")[2]) for name in trained if "layers" in name}
        assert blocks == ({3} if step < 2 else {2, 3})
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert "model.layers.3.mlp.up_proj.weight" not in moved
    assert {name.split(".")[2] for name in moved if "layers" in name} == {"2", "3"}
    assert not any("embed" in name for name in moved)
    verify_frozen(report.trainer.model)
    assert [stage.steps for stage in report.stages] == [2, 2]


def test_a_stage_ends_with_the_best_weights_that_were_evaluated(tmp_path: Path) -> None:
    """The rate grows absurdly in the second stage: what it began with is then its best."""
    stages = [
        Stage(FreezePlan(decoder_blocks=3), steps=4),
        Stage(FreezePlan(decoder_blocks=2), steps=4, learning_rate=5.0),
    ]
    report = train(tmp_path, stages)
    first, second = report.stages
    assert second.start_metric == first.best_metric == second.best_metric
    assert report.trainer.evaluate()["eval_loss"] == pytest.approx(first.best_metric, rel=1e-6)
    assert min(evaluated(report)[:-1]) > second.best_metric


def test_a_stage_without_evaluation_ends_with_its_last_weights(tmp_path: Path) -> None:
    given = {"eval_strategy": "no", "save_strategy": "no"}
    stages = gradual(pretrained(), 1, 1, 2, steps=3)
    report = train(tmp_path / "stages", stages, **given)
    assert [stage.best_metric for stage in report.stages] == [None, None]
    by_hand = pretrained()
    for plan in (stage.plan for stage in stages):
        trainer = make_trainer(tmp_path / "hand", by_hand, **given, max_steps=3)
        thaw(by_hand)
        freeze(by_hand, plan)
        trainer.train()
    assert_same(weights(report), {name: p.detach() for name, p in by_hand.named_parameters()})


STALLING = Stage(FreezePlan(decoder_blocks=3), steps=40, patience=2, min_gain=0.5)


def test_a_stage_stops_where_validation_stalls_and_if_it_was_killed_before_that_was_noted_it_is_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [STALLING, Stage(FreezePlan(decoder_blocks=2), steps=2)]

    def kill(path: Path, values: dict[str, Any]) -> None:
        if values["done"]:
            raise KeyboardInterrupt
        write_json(path, values)

    monkeypatch.setattr(hf_freeze.training.ledger, "write_json", kill)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", [STALLING])
    monkeypatch.undo()
    whole = train(tmp_path / "whole", stages)
    assert whole.stages[0].steps == 6, "the first evaluation sets the mark, two more gain less than half of it"
    assert [stage.ended for stage in whole.stages] == ["stalled: no gain in 2 evaluations", "2 steps"]
    assert "stalled" in str(whole)

    monkeypatch.setattr(SummaryTrainer, "train", lambda *_, **__: pytest.fail("it had stalled"))
    again = train(tmp_path / "killed", [STALLING], resume=True)
    assert (again.stages[0].steps, again.stages[0].best_metric) == (6, whole.stages[0].best_metric)
    model = pretrained()
    freeze(model, STALLING.plan)
    load_delta(tmp_path / "whole" / "stage-1" / "best", model)
    assert_same(weights(again), dict(model.named_parameters()))
    assert not list((tmp_path / "killed").glob("stage-1/checkpoint-*")), "done: nothing goes on from them"


def scored(trainer: Any, metric: str, values: list[float]) -> Any:
    """The trainer with that metric at its evaluations, one after the other."""
    evaluate, left = trainer.evaluation_loop, iter(values)

    def evaluation_loop(*args: Any, **named: Any) -> Any:
        output = evaluate(*args, **named)
        output.metrics[metric] = next(left)
        return output

    trainer.evaluation_loop = evaluation_loop
    return trainer


@pytest.mark.parametrize(
    ("metric", "values", "best", "given"),
    [
        ("eval_score", [1.0, 3.0, 2.0], 3.0, {"metric_for_best_model": "score", "greater_is_better": True}),
        ("eval_loss", [float("inf"), float("nan"), 2.0], 2.0, {}),
    ],
    ids=["the greater is the better", "what is not finite is no best"],
)
def test_the_best_metric_is_kept(
    metric: str, values: list[float], best: float, given: dict[str, Any], tmp_path: Path
) -> None:
    report = train_in_stages(
        lambda: scored(make_trainer(tmp_path, **given), metric, values), [FreezePlan(decoder_blocks=3)], steps=6
    )
    assert report.stages[0].best_metric == best


def test_a_metric_that_no_evaluation_gives_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="ends by eval_bleu; the evaluation gave eval_loss"):
        train(tmp_path, [FreezePlan()], steps=2, metric_for_best_model="bleu")


def test_rates_fall_from_the_top_block_down(tmp_path: Path) -> None:
    rates: list[dict[str, float]] = []

    class Look(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
        ) -> None:
            by_tensor = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
            rates.append({name: by_tensor[p] for name, p in model.named_parameters() if p in by_tensor})

    plan = FreezePlan(embeddings=False, decoder_blocks=1, tied_head="untie")
    stage = Stage(plan, steps=1, learning_rate=0.1, block_decay=0.5)
    train(tmp_path, [stage], lr_scheduler_type="constant", callbacks=[Look()])
    for name, rate in rates[0].items():
        depth = 3 - int(name.split(".")[2]) if "layers" in name else 4 if "embed" in name else 0
        assert rate == pytest.approx(0.1 * 0.5**depth), name


def test_stock_trainer_and_two_stacks_train_in_stages(tmp_path: Path) -> None:
    model = tiny_model("bart")
    rows = review_rows("bart", 8)
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, eval_strategy="epoch", save_strategy="epoch"
    )

    def make(stage: Stage) -> Trainer:
        assert isinstance(stage, Stage)
        collator = collator_for("bart", model)
        return Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:4], data_collator=collator)

    stages = gradual(model, start=2, step=3, stages=3, epochs=1)
    assert [(s.plan.encoder_blocks, s.plan.decoder_blocks) for s in stages] == [(4, 2), (3, 0), (0, 0)]
    said: list[str] = []
    report = train_in_stages(make, stages, cache_dir=tmp_path / "cache", say=said.append)
    assert [stage.trained_blocks for stage in report.stages] == [2, 5, 8]
    assert sum(text.startswith("Prefix cache") for text in said) == 2
    assert any(text.startswith("note: no prefix cache in this stage") for text in said)
    assert args.output_dir == str(tmp_path), "the caller's arguments stay"


def test_drift_is_measured_from_the_pretrained_weights_in_every_stage(tmp_path: Path) -> None:
    monitor = FreezeMonitor(say=lambda text: None)
    report = train(tmp_path, gradual(pretrained(), 1, 1, 2, steps=2), callbacks=[monitor])
    log = [entry for entry in report.trainer.state.log_history if "drift/decoder.3" in entry]
    start = dict(pretrained().named_parameters())
    block = {n: p for n, p in report.trainer.model.named_parameters() if n.startswith("model.layers.3.")}
    assert log[0]["drift/decoder.3"] > log[0]["drift/decoder.2"] > 0
    assert all(not torch.equal(p, start[n]) for n, p in block.items())


def test_the_steps_after_the_last_evaluation_count(tmp_path: Path) -> None:
    stages = gradual(pretrained(), 1, 1, 2, steps=3)
    report = train(tmp_path, stages)
    assert [entry["step"] for entry in report.trainer.state.log_history if "eval_loss" in entry] == [2, 3]
    first, second = train(tmp_path / "rare", stages, eval_steps=50, save_steps=50).stages
    assert second.best_metric < first.best_metric, "a stage is not thrown away unseen"


def test_several_validation_sets_are_told_apart(tmp_path: Path) -> None:
    def make(**given: Any) -> Any:
        trainer = make_trainer(tmp_path, **given)
        trainer.eval_dataset = {"a": trainer.eval_dataset, "b": Rows(review_rows("llama")[8:12])}
        return trainer

    report = train_in_stages(lambda: make(metric_for_best_model="a_loss"), [FreezePlan()], steps=4)
    assert report.stages[0].best_metric == min(evaluated(report, "eval_a_loss"))
    with pytest.raises(StageError, match="such as eval_a_loss"):
        train_in_stages(make, [FreezePlan()], steps=4, output_dir=tmp_path / "2")


# -------------------------------------------------------------------------------------------------------------- resume


def test_a_run_that_is_done_is_not_trained_again(undisturbed: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SummaryTrainer, "train", lambda *_, **__: pytest.fail("it was done"))
    ledger = (undisturbed.folder / "stages.json").read_text()
    report = run(undisturbed.folder, resume=True)
    assert_same(weights(report), undisturbed.weights)
    assert (undisturbed.folder / "stages.json").read_text() == ledger
    verify_frozen(report.trainer.model)


FAILURES = [(stage, step) for stage in (1, 2, 3) for step in (0, 1, 3)]
QUICK = [(1, 3), (2, 0), (3, 3)]  # before a stage's first checkpoint, and after it
SLOW = [pytest.param(*failure, marks=pytest.mark.slow) for failure in FAILURES if failure not in QUICK]


@pytest.mark.parametrize(("stage", "step"), [*QUICK, *SLOW])
def test_a_run_that_failed_goes_on_to_the_same_weights(
    stage: int, step: int, undisturbed: Whole, tmp_path: Path
) -> None:
    class Fail(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if args.output_dir.endswith(f"stage-{stage}") and state.global_step == step:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callbacks=[Fail()])
    assert_same(weights(run(tmp_path, resume=True)), undisturbed.weights)


def test_another_run_in_the_folder_is_not_overwritten(done: Path) -> None:
    with pytest.raises(StageError, match=r"holds another run.*resume=True"):
        train(done, TWO_PLANS, steps=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 3}, "its stage 1 is"),
        ({"rows": 20}, "its training data is"),
        ({"per_device_train_batch_size": 2}, f"its rows a step is {ROWS_A_STEP}, and 2"),
        ({"metric_for_best_model": "runtime"}, "its metric is eval_loss"),
    ],
)
def test_another_run_is_not_gone_on_with(change: dict[str, Any], message: str, done: Path) -> None:
    given = {name: value for name, value in change.items() if name not in ("steps", "rows")}

    def make() -> Any:
        trainer = make_trainer(done, **given)
        trainer.train_dataset = Rows(trainer.train_dataset[: change.get("rows")])
        return trainer

    with pytest.raises(ResumeError, match=message):
        train_in_stages(make, TWO_PLANS, steps=change.get("steps", 2), resume=True)


def test_another_base_model_is_refused_at_a_resume(done: Path) -> None:
    other = pretrained()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(DeltaMismatch):
        train(done, TWO_PLANS, model=other, steps=2, resume=True)


def test_a_model_that_an_interrupted_first_stage_left_half_trained_is_refused(tmp_path: Path) -> None:
    class Fail(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    model = pretrained()
    stages, cache = gradual(model, 1, 1, 2, steps=2), tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stages, model=model, cache_dir=cache, callbacks=[Fail()])
    with pytest.raises(ResumeError, match="Load the model again"):
        train(tmp_path, stages, model=model, resume=True)
    model.load_state_dict(pretrained().state_dict())
    report = train(tmp_path, stages, model=model, cache_dir=cache, resume=True)
    assert len(report.stages) == 2, "the cache of the interrupted stage was closed"


@pytest.mark.parametrize("text", ["{", "[]", '{"metric": "eval_loss", "run": {}, "stages": [], "done": [{}]}'])
def test_a_damaged_ledger_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text(text)
    with pytest.raises(ResumeError, match="it is damaged"):
        train(tmp_path, [FreezePlan()], steps=1, resume=True)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("stages", "given", "message"),
    [
        ([], {}, "was given no plan"),
        ([FreezePlan(decoder_blocks=2), FreezePlan(decoder_blocks=3)], {}, "Stage 2 trains less than stage 1"),
        ([FreezePlan(), FreezePlan(decoder_blocks=1, tied_head="untie")], {}, "cannot change that"),
        ([Stage(FreezePlan(), patience=1)], {"eval_strategy": "no", "save_strategy": "no"}, "evaluate nothing"),
        ([FreezePlan()], {"num_train_epochs": float("inf")}, "Stage 1 never ends"),
    ],
)
def test_stages_that_cannot_be_are_refused_before_anything_trains(
    stages: list[Any], given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = pretrained()
    with pytest.raises(StageError, match=message):
        train(tmp_path, stages, model=model, **given)
    assert all(p.requires_grad for p in model.parameters())
    assert not (tmp_path / "stages.json").exists()


def test_a_plan_that_does_not_fit_the_model_is_refused_before_anything_trains(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="has 4"):
        train(tmp_path, [FreezePlan(), FreezePlan(decoder_blocks=9)], steps=1)
    assert not (tmp_path / "stages.json").exists()


def test_a_trainer_given_twice_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with pytest.raises(StageError, match="gave the trainer of the stage before again"):
        train_in_stages(lambda: trainer, gradual(pretrained(), 1, 1, 2, steps=1))


# ------------------------------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each of two processes says of each way to train, all in one launch; "alone" is a run to be moved there."""
    folder = tmp_path_factory.mktemp("ranks")
    alone = one_plan(folder / "alone", tiny_model("llama"), save_total_limit=None)
    shutil.copytree(folder / "alone" / "checkpoint-2", folder / "moved" / "checkpoint-2")
    ways = ["plain", "cached", "naive", "moved"]
    run_on_two_ranks("tests/training/staged_run.py", folder, *ways)
    losses = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
    ranks = {way: [json.loads((folder / way / f"rank{rank}.json").read_text()) for rank in range(2)] for way in ways}
    return {"alone": [{"losses": losses}], **ranks}


@pytest.mark.parametrize("way", ["plain", "cached"])
def test_two_ranks_end_with_the_weights_of_one_process(way: str, two_ranks: Any, linear: StagesReport) -> None:
    one, other = two_ranks[way]
    assert one["world"] == other["world"] == 2
    assert one["wrapper"] == "DistributedDataParallel"
    assert one["weights"] == other["weights"], "to the bit"
    theirs = {name: torch.tensor(values).float() for name, values in one["weights"].items()}
    assert_close(theirs, {name: weight.flatten() for name, weight in weights(linear).items()})
    losses = [entry["loss"] for entry in linear.trainer.state.log_history if "loss" in entry]
    assert one["losses"] == pytest.approx(losses, rel=1e-5)


def test_a_run_moved_to_two_processes_goes_on_as_in_one(two_ranks: Any) -> None:
    one, other = two_ranks["moved"]
    assert one["world"] == other["world"] == 2
    assert one["losses"] == pytest.approx(two_ranks["alone"][0]["losses"], rel=1e-5)
    assert one["weights"] == other["weights"]


def test_thawing_under_a_living_trainer_lets_the_ranks_drift_apart(two_ranks: Any) -> None:
    """The naive way, so that the test above can fail."""
    one, other = two_ranks["naive"]
    apart = {name for name, values in one["weights"].items() if values != other["weights"][name]}
    assert any(name.startswith("model.layers.2.") for name in apart), "the block thawed late is not in the reducer"


def test_stages_that_another_process_trains_are_refused(tmp_path: Path) -> None:
    child = another_run(tmp_path)
    try:
        with pytest.raises(FreezeError, match=rf"write into {tmp_path}; process {child} on .* is writing there"):
            run(tmp_path, resume=True)
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
