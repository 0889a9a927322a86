"""Sweeps over depths: every depth from the same weights, once, in one folder that can go on."""

from __future__ import annotations

import copy
import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_freeze import FreezeError, FreezePlan, read_anatomy
from hf_freeze.depth import SweepReport, sweep_depths
from hf_freeze.depth.row_losses import row_losses
from hf_freeze.depth.run_parts import choose_rows
from hf_freeze.errors import PlanError, ResumeError, TrainingDiverged
from hf_freeze.plan import plan_at_depth
from tests.prefix.test_faults import Padding, token_rows
from tests.tiny import tiny_model
from tests.zoo import build

BLOCKS = 3


def make_rows(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 16, (count, 6), generator=random)
    return [{"input_ids": row, "labels": row} for row in ids]


def small_gpt2(blocks: int = BLOCKS) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_layer": blocks, "n_embd": 8, "n_head": 2, "vocab_size": 16, "n_positions": 8}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))


@pytest.fixture
def start() -> GPT2LMHeadModel:
    return small_gpt2()


class Sweeping:
    """Calls sweep_depths on 16 rows in batches of 4, one epoch; `trained` has a name for each run that was trained."""

    def __init__(self, start: GPT2LMHeadModel, folder: Path) -> None:
        self.start, self.folder = start, folder
        self.rows, self.held_out = make_rows(16), make_rows(4, seed=1)
        self.told: list[str] = []
        self.trained: list[str] = []

    def make_trainer(self, model, train=None, evaluated=False, **given) -> Trainer:
        trained = self.trained

        class Counting(Trainer):
            def train(self, *arguments, **named):
                trained.append(type(self.model).__name__)
                return super().train(*arguments, **named)

        values = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2} | given
        args = TrainingArguments(str(self.folder / "args"), use_cpu=True, report_to="none", disable_tqdm=True, **values)
        evaluated = self.held_out if evaluated is False else evaluated
        return Counting(model=model, args=args, train_dataset=train or self.rows, eval_dataset=evaluated)

    def call(self, depths=(1, 2), folder=None, make_trainer=None, **given) -> SweepReport:
        options = {"seeds": [1], "references": (), "progress": False, "cache_dir": self.folder / "cache"}
        options |= {"make_model": lambda: copy.deepcopy(self.start), "say": self.told.append} | given
        folder, make_trainer = folder or self.folder / "sweep", make_trainer or self.make_trainer
        return sweep_depths(make_trainer=make_trainer, depths=depths, output_dir=folder, **options)


@pytest.fixture
def sweep(start, tmp_path):
    return Sweeping(start, tmp_path)


GRID = {"depths": (0, 1, 2, 3), "seeds": [1, 2], "train_rows": [8, 16], "facts": {"test data": "a"}}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep that is made once; `report` is what it returned."""
    made = Sweeping(small_gpt2(), tmp_path_factory.mktemp("swept"))
    made.report = made.call(**GRID)
    return made


@pytest.fixture
def resumed(sweep, swept):
    """A copy of that sweep, to go on with."""
    shutil.copytree(swept.folder / "sweep", sweep.folder / "sweep")
    shutil.copytree(swept.folder / "cache", sweep.folder / "cache")
    return sweep


def losses(report: SweepReport) -> dict:
    return {result.run: result.metrics["eval_loss"] for result in report.results}


def test_runs_from_the_one_cache_end_as_plain_runs_do(sweep, swept):
    plain = sweep.call(**GRID, use_cache=False)
    assert {r.run.depth for r in swept.report.results if r.cached} == {1, 2, 3}  # below depth 0 are embeddings only
    assert not any(result.cached for result in plain.results)
    assert losses(swept.report).keys() == losses(plain).keys()
    for run, loss in losses(swept.report).items():
        # AdamW turns the rounding of small gradients into whole steps, on some processors more than on others.
        assert loss == pytest.approx(losses(plain)[run], rel=1e-4), run


def test_one_pass_computes_the_rows_of_every_depth(swept):
    (told,) = [text for text in swept.told if text.startswith("Prefix cache:")]
    assert "20 rows (20 computed)" in told
    assert SweepReport.load(swept.folder / "sweep").build_seconds > 0


def test_a_depth_is_what_freeze_makes_of_it_and_trains_the_rest(swept):
    block = sum(p.numel() for p in swept.start.transformer.h[0].parameters())
    final = sum(p.numel() for p in swept.start.transformer.ln_f.parameters())
    trained = {r.run.depth: r.trained_parameters for r in swept.report.results}
    assert trained == {"pretrained": 0} | {depth: (BLOCKS - depth) * block + final for depth in range(4)}


def test_the_same_call_again_trains_nothing_and_a_larger_one_only_what_is_new(sweep):
    first = sweep.call(depths=(1, 2), seeds=[1])
    assert len(sweep.trained) == 2
    assert losses(sweep.call(depths=(1, 2), seeds=[1])) == losses(first)
    assert len(sweep.trained) == 2
    grown = sweep.call(depths=(1, 2, 3), seeds=[1, 2])
    assert len(sweep.trained) == 2 + 4  # depth 3 with two seeds, depths 1 and 2 with the second
    assert losses(first).items() <= losses(grown).items()


def test_a_sweep_that_was_killed_while_it_wrote_makes_that_run_again(resumed, swept):
    path = resumed.folder / "sweep" / "runs.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-40])
    assert losses(resumed.call(**GRID)) == losses(swept.report)
    assert len(resumed.trained) == 1
    assert len(path.read_text().splitlines()) == len(whole.splitlines()) == 1 + 4 * 2 * 2


def test_a_damaged_line_in_the_middle_is_named(resumed):
    path = resumed.folder / "sweep" / "runs.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-9], *lines[2:], ""]))
    with pytest.raises(ResumeError, match="line 2 is damaged"):
        resumed.call(**GRID)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"train": make_rows(16, seed=7)}, "training data"),
        ({"evaluated": make_rows(4, seed=7)}, "validation data"),
        ({"num_train_epochs": 2}, "epochs"),
        ({"per_device_train_batch_size": 2}, "rows a step"),
        ({"weight_decay": 0.1}, "schedule"),
    ],
)
def test_a_folder_of_another_sweep_is_refused(resumed, given, named):
    with pytest.raises(ResumeError, match=f"another {named}"):
        resumed.call(**GRID, make_trainer=lambda model: resumed.make_trainer(model, **given))
    assert not resumed.trained


def test_another_model_and_other_facts_of_the_caller_are_refused(resumed, start):
    with pytest.raises(ResumeError, match="another test data"):
        resumed.call(**GRID | {"facts": {"test data": "b"}})
    with torch.no_grad():
        start.transformer.ln_f.bias.add_(1)
    with pytest.raises(ResumeError, match="another model"):
        resumed.call(**GRID)


def test_the_learning_rate_is_chosen_by_validation_at_each_depth_and_kept_for_the_other_seeds(sweep):
    report = sweep.call(depths=(1, 3), learning_rates=[1e-7, 1e-2], seeds=[1, 2, 3])
    found = losses(report)
    for depth in (1, 3):
        tried = {run.learning_rate: loss for run, loss in found.items() if run.depth == depth and run.seed == 1}
        assert set(tried) == {1e-7, 1e-2}
        best = min(tried, key=tried.get)
        assert {run.learning_rate for run in found if run.depth == depth and run.seed > 1} == {best}
        assert next(row for row in report.rows() if row.depth == depth).learning_rate == best
        assert next(row for row in report.rows() if row.depth == depth).seeds == 3


def test_each_depth_may_have_rates_of_its_own(sweep):
    report = sweep.call(depths=(1, 2), learning_rates={1: [1e-3], 2: [1e-4, 1e-5]})
    rates = {d: {r.learning_rate for r in losses(report) if r.depth == d} for d in (1, 2)}
    assert rates == {1: {1e-3}, 2: {1e-4, 1e-5}}


def test_only_a_best_rate_so_far_is_scored(sweep):
    scored = []

    def score(trainer):
        scored.append(trainer.args.learning_rate)
        return {"rougeL": 10.0, "rougeL_low": 8.0, "rougeL_high": 12.0}

    report = sweep.call(depths=(1,), learning_rates=[1e-2, 1e-7], score=score, quality="rougeL")
    assert scored == [0.0, 0.01]  # the pretrained model, and the better rate
    row = report.rows()[-1]
    assert (row.quality, row.low, row.high) == (10.0, 8.0, 12.0)


def test_the_rows_of_a_seed_lie_within_its_larger_choice():
    small, large, other = choose_rows(100, 10, 1), choose_rows(100, 30, 1), choose_rows(100, 10, 2)
    assert set(small) < set(large)
    assert set(small) != set(other)
    assert len(set(large)) == 30


def test_halving_trains_the_best_pairs_in_full_and_no_others(sweep):
    rates = [1e-7, 1e-2]
    report = sweep.call(depths=(1, 3), learning_rates=rates, halving=2, seeds=[1, 2])
    shares = [result.run.share for result in report.results if result.run.depth != "pretrained"]
    assert shares == [0.5] * 4 + [1.0] * 4  # four pairs on half of the epochs, the best two in full with both seeds
    short = {r.run: r.metrics["eval_loss"] for r in report.results if r.run.share == 0.5}
    best = sorted(short, key=short.get)[:2]
    full = {(r.run.depth, r.run.learning_rate) for r in report.results if r.run.share == 1.0 and r.run.seed == 1}
    assert full - {("pretrained", 0.0)} == {(run.depth, run.learning_rate) for run in best}
    assert [r.steps for r in report.results if r.run.share == 0.5] == [2] * 4
    assert all(row.depth == "pretrained" or row.seeds == 2 for row in report.rows())


def test_full_fine_tuning_trains_every_weight_and_lora_none_of_the_models_own(sweep, start):
    own = dict(start.named_parameters())

    def score(trainer):
        named = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
            for name, parameter in trainer.model.named_parameters()
        }
        moved = [name for name in own if not torch.equal(named[name], own[name])]
        adapters = [name for name in named if "lora_B" in name and named[name].any()]
        return {"moved": float(len(moved)), "adapters": float(len(adapters))}

    report = sweep.call(depths=(2,), references=("full", "lora"), score=score)
    found = {result.run.depth: result for result in report.results}
    assert found["full"].metrics["moved"] == len(own)
    assert found["full"].metrics["adapters"] == 0
    assert found["full"].trained_parameters == sum(p.numel() for p in start.parameters())
    assert found["lora"].metrics["moved"] == 0
    assert found["lora"].metrics["adapters"] == 4 * BLOCKS  # attention's two matrices and the feed-forward part's two


def test_depth_counts_an_encoder_below_its_decoder():
    anatomy = read_anatomy(tiny_model("bart"))
    assert plan_at_depth(anatomy, 3) == FreezePlan(encoder_blocks=3, decoder_blocks=0)
    assert plan_at_depth(anatomy, 6) == FreezePlan(encoder_blocks=4, decoder_blocks=2)
    llama = read_anatomy(tiny_model("llama"))
    assert plan_at_depth(llama, 3, FreezePlan(encoder_blocks=2)) == FreezePlan(decoder_blocks=3), "either name will do"
    with pytest.raises(
        PlanError, match=r"depth of 9 was asked for; BartForConditionalGeneration has 8 blocks\. Use 0 to 8"
    ):
        plan_at_depth(anatomy, 9)


def test_a_model_with_one_block_can_be_swept(sweep):
    one = small_gpt2(blocks=1)
    report = sweep.call(depths=(0, 1), make_model=lambda: copy.deepcopy(one))
    assert [row.depth for row in report.rows()] == ["pretrained", 0, 1]


def test_a_run_that_diverges_is_left_out_and_the_sweep_goes_on(sweep):
    class Diverging(Trainer):
        def train(self, *given, **named):
            if self.args.learning_rate > 1:
                raise TrainingDiverged("the loss is nan")
            return super().train(*given, **named)

    def make_trainer(model):
        sound = sweep.make_trainer(model)
        return Diverging(model=model, args=sound.args, train_dataset=sweep.rows, eval_dataset=sweep.rows[:4])

    report = sweep.call(depths=(1, 2), learning_rates={1: [1e-2, 9.0], 2: [9.0]}, make_trainer=make_trainer)
    assert [(row.depth, row.learning_rate) for row in report.rows()] == [("pretrained", 0.0), (1, 1e-2)]
    assert "2 runs diverged and are left out" in str(report)
    assert sum("diverged: the loss is nan" in text for text in sweep.told) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"depths": ()}, "no depth was asked for; give some"),
        ({"depths": (1, 4)}, "depth of 4 was asked for; GPT2LMHeadModel has 3 blocks"),
        ({"train_rows": [8, 17]}, "train_rows=17 was asked for; the trainer has 16"),
        ({"references": ("lorra",)}, "'lorra' was asked for; there are 'full', 'lora'"),
        ({"seeds": ()}, "one or more, each once"),
        ({"seeds": (1, 1)}, "one or more, each once"),
        ({"halving": 1}, "by 2 or more"),
        ({"learning_rates": [0.0]}, "numbers above 0"),
        ({"learning_rates": {1: [1e-3], 2: []}}, "numbers above 0"),
        ({"tune_by": "eval_los"}, "tune_by='eval_los' was asked for; .* The nearest: 'eval_loss'"),
        ({"quality": "rougeL"}, "quality='rougeL' was asked for; evaluation and score give eval_loss"),
    ],
)  # fmt: skip
def test_what_cannot_be_swept_is_refused_before_a_step(sweep, given, message):
    with pytest.raises(FreezeError, match=message):
        sweep.call(**given)
    assert not sweep.trained


def test_a_trainer_without_validation_is_refused(sweep):
    with pytest.raises(FreezeError, match="no eval_dataset"):
        sweep.call(make_trainer=lambda model: sweep.make_trainer(model, evaluated=None))


def test_a_model_that_is_shared_between_runs_is_refused(sweep, start):
    told = pytest.warns(UserWarning, match=r"An earlier freeze\(\) stays")
    with told, pytest.raises(FreezeError, match="other weights than at its first call"):
        sweep.call(make_model=lambda: start)


def test_a_model_that_cannot_be_cached_is_swept_without(sweep):
    report = sweep.call(depths=(1,), plan=FreezePlan(frozen_mode="train"))
    assert not any(result.cached for result in report.results)


def test_the_caller_keeps_arguments_and_rows(sweep):
    made = []

    def make_trainer(model):
        made.append(sweep.make_trainer(model))
        made[-1].own = made[-1].args
        return made[-1]

    sweep.call(depths=(1,), make_trainer=make_trainer, train_rows=[8])
    assert all(trainer.own.learning_rate == 1e-2 and trainer.own.seed == 42 for trainer in made)
    assert len(sweep.rows) == 16


def test_every_line_is_plain_json_and_the_folder_holds_nothing_else_of_weight(swept):
    folder = swept.folder / "sweep"
    for line in (folder / "runs.jsonl").read_text().splitlines():
        named = {"depth", "rows", "learning_rate", "seed", "metrics", "step_seconds", "device"}
        assert named <= json.loads(line).keys()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 20_000


def test_every_row_of_the_validation_is_kept_and_gives_the_mean_of_the_evaluation(swept):
    for result in swept.report.results:
        by_row = result.row_scores["eval_loss"]
        assert len(by_row) == len(set(by_row)) == 4
        assert statistics.fmean(by_row) == pytest.approx(result.metrics["eval_loss"], rel=1e-4)
    assert "test rows, paired" in str(swept.report)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart", "bert"])  # for gpt2's class, Trainer counts the first label
def test_the_losses_of_rows_are_computed_in_batches_where_the_logits_tell_them(kind, same, tmp_path):
    rows, collator = token_rows((9, 16, 12, 7, 16, 11, 5, 8, 13, 16, 6, 10)), Padding()
    if kind == "bert":
        rows = [{**row, "labels": torch.tensor(place % 2)} for place, row in enumerate(make_rows(12))]
        collator = default_data_collator
    model = build(kind, AutoModelForSequenceClassification if kind == "bert" else None)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=4)
    trainer = Trainer(model=model, args=args, eval_dataset=rows, data_collator=collator)
    sizes: list[int] = []

    def note(_: object, __: object, given: dict, output: object) -> None:
        sizes.append(len(given["input_ids"]))
        if not same:
            output["loss"] = 2 * output["loss"]

    with model.register_forward_hook(note, with_kwargs=True):
        by_row = row_losses(trainer)
        assert sizes == [1] * 4 + [4] + ([4, 4] if same else [1] * 8)
        alone = [trainer.prediction_step(model, collator([row]), True)[0].item() for row in rows]
    assert by_row == pytest.approx(alone, rel=1e-4)


def test_a_model_without_a_loss_has_none_of_rows(tmp_path):
    rows = [{"input_ids": row["input_ids"]} for row in make_rows(3)]
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(model=build("gpt2"), args=args, eval_dataset=rows, data_collator=default_data_collator)
    assert row_losses(trainer) == []


def test_a_score_of_each_row_is_kept_apart_from_the_metrics(sweep):
    report = sweep.call(
        depths=(1,), references=(), score=lambda _: {"taste": 2.0, "taste_rows": [1.0, 3.0]}, quality="taste"
    )
    assert all(result.row_scores == {"taste": [1.0, 3.0]} for result in report.results)
    assert all("taste_rows" not in result.metrics for result in report.results)
