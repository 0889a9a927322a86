"""What is made of a sweep's lines: rows, the deepest freeze within noise, table and picture."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import replace

import numpy as np
import pytest

from hf_freeze import FreezeError
from hf_freeze.depth import SweepReport, draw_sweep, paired
from hf_freeze.depth.report import SweepResult, SweepRun


def result(depth, quality, *, rows=512, rate=1e-4, seed=1, half=1.0, loss=3.0, share=1.0, seconds=10.0, **given):
    metrics = {"eval_loss": loss, "rougeL": quality, "rougeL_low": quality - half, "rougeL_high": quality + half}
    values = {"trained_parameters": 10, "steps": 3, "train_seconds": seconds, "step_seconds": seconds / 3}
    values |= {"cache_seconds": 1.0, "score_seconds": 1.0, "peak_bytes": 2_000_000_000, "delta_bytes": 40}
    values |= {"metrics": metrics, "cached": True, "device": "a CPU"} | given
    return SweepResult(run=SweepRun(depth, rows, rate, seed, share), **values)


def report(*results, quality="rougeL", tuned_by="eval_loss"):
    return SweepReport(results, 30, quality, tuned_by)


def test_a_row_is_the_mean_over_seeds_at_the_rate_that_all_of_them_have():
    found = report(
        result(22, 10.0, rate=1e-4, seed=1, loss=3.0),
        result(22, 99.0, rate=9e-4, seed=1, loss=3.5),
        result(22, 12.0, rate=1e-4, seed=2),
        result(22, 14.0, rate=1e-4, seed=3),
    ).rows()
    assert len(found) == 1
    row = found[0]
    assert (row.quality, row.low, row.high, row.seeds, row.learning_rate) == (12.0, 11.0, 13.0, 3, 1e-4)
    assert row.spread == pytest.approx(2.0)
    assert row.train_seconds == 11.0  # with the look-up in the cache


def test_with_one_seed_the_rate_with_the_best_validation_counts_not_the_best_score():
    found = report(result(22, 10.0, rate=1e-4, loss=3.0), result(22, 99.0, rate=9e-4, loss=3.5)).rows()
    assert found[0].learning_rate == 1e-4


def test_without_an_interval_of_its_own_two_standard_errors_of_the_seeds_stand_in():
    results = [result(22, 0.0, seed=seed, loss=loss) for seed, loss in enumerate((3.0, 3.1, 3.2))]
    row = report(*results, quality="eval_loss").rows()[0]
    assert row.quality == pytest.approx(3.1)
    assert row.high - row.low == pytest.approx(2 * 2 * 0.1 / 3**0.5)


def test_the_deepest_freeze_within_the_interval_of_the_best_is_named():
    found = report(result(0, 14.0), result(15, 15.0), result(22, 14.2), result(26, 13.9), result("full", 20.0))
    assert found.deepest_within_noise().depth == 22  # the best of 15 begins at 14.0; references do not count
    assert "Deepest freeze within noise, on 512 rows: 22 of 30. By the best depth's own interval, since" in str(found)


def simulated(truth: dict[int, float], test_rows: int, seed: int, quality: str = "rougeL", size: float = 1.0):
    """Scores of test rows: each row's own level, which all depths share, and noise of each depth."""
    generator = np.random.default_rng([seed, test_rows])
    levels = generator.normal(0, 10 * size, test_rows)
    results = []
    for depth, mean in truth.items():
        scores = mean + levels + generator.normal(0, 7 * size, test_rows)
        half = 2 * float(scores.std()) / test_rows**0.5
        given = result(depth, float(scores.mean()), half=half, row_scores={quality: scores.tolist()})
        given.metrics["eval_loss"] = float(scores.mean())
        results.append(given)
    return report(*results, quality=quality)


SLOPES = {
    "steep": {0: 28.0, 8: 27.0, 15: 25.0, 22: 20.0, 26: 16.0},
    "slow": {0: 28.0, 8: 27.9, 15: 27.5, 22: 26.5, 26: 25.0},
    "flat": dict.fromkeys((0, 8, 15, 22, 26), 28.0),
}


SOME = [("steep", "rougeL", (16, 128, 512), 24, 100), ("slow", "rougeL", (16, 128, 512), 24, 100)]
ALL = [(slope, quality, (8, 16, 32, 64, 128, 256, 512, 1024, 2048), 100, 1000) for slope in SLOPES
       for quality in ("rougeL", "eval_loss")]  # fmt: skip


@pytest.mark.parametrize(
    ("slope", "quality", "counts", "seeds", "draws"),
    SOME + [pytest.param(*each, marks=pytest.mark.slow) for each in ALL],
)
def test_fewer_test_rows_do_not_name_a_deeper_freeze(slope, quality, counts, seeds, draws, monkeypatch):
    monkeypatch.setattr(paired, "DRAWS", draws)
    size = 1.0 if quality == "rougeL" else 0.2
    truth = SLOPES[slope] if quality == "rougeL" else {d: 28 + size * (28 - q) for d, q in SLOPES[slope].items()}
    named = {
        count: [simulated(truth, count, seed, quality, size).deepest_within_noise().depth for seed in range(seeds)]
        for count in counts
    }
    for fewer, more in itertools.combinations(named.values(), 2):
        error = statistics.pstdev([*fewer, *more]) * (2 / seeds) ** 0.5
        assert statistics.fmean(fewer) <= statistics.fmean(more) + 2.5 * error, named
    if slope == "flat":
        assert statistics.fmean(named[counts[-1]]) > 20  # what many rows show to be as good is named


def test_without_pairs_fewer_test_rows_name_a_deeper_freeze_and_the_report_says_so():
    found = [simulated(SLOPES["slow"], n, 0) for n in (16, 1024)]
    lines = [report(*(replace(r, row_scores={}) for r in each.results)) for each in found]
    few, many = (each.deepest_within_noise().depth for each in lines)
    assert few > many
    assert "the fewer there were, the deeper it names" in str(lines[0])


@pytest.mark.parametrize("test_rows", [2, 8, 100])
def test_a_depth_that_is_worse_on_every_row_is_never_within_noise(test_rows):
    levels = np.random.default_rng(0).normal(20, 10, test_rows)
    results = [result(d, float(levels.mean()) - d / 100, row_scores={"rougeL": (levels - d / 100).tolist()})
               for d in (0, 8, 15)]  # fmt: skip
    assert report(*results).deepest_within_noise().depth == 0
    losses = [result(d, 0.0, row_scores={"eval_loss": (levels + d / 100).tolist()}) for d in (0, 8, 15)]
    assert report(*losses, quality="eval_loss").deepest_within_noise().depth == 0


def test_a_depth_that_is_better_is_taken_and_the_next_ones_distance_is_told():
    levels = np.random.default_rng(0).normal(20, 10, 100)
    scores = {0: levels - 3, 8: levels, 15: levels - 5}
    found = report(*(result(d, float(s.mean()), row_scores={"rougeL": s.tolist()}) for d, s in scores.items()))
    text = " ".join(str(found).split())
    assert "8 of 30. 100 test rows, paired, show it to be at most 5% behind every shallower one; 15 frozen" in text
    assert "15 frozen are 5 [5, 5] behind" in text


def test_the_score_of_a_row_is_the_mean_over_seeds_and_missing_where_a_seed_has_none():
    both = [result(8, 1.0, seed=seed, row_scores={"rougeL": [seed, 2.0 * seed]}) for seed in (1, 3)]
    assert report(*both).rows()[0].row_scores == (2.0, 4.0)
    assert report(both[0], replace(both[1], row_scores={})).rows()[0].row_scores == ()


def test_lines_of_the_first_edition_are_read_and_new_ones_keep_every_row():
    given = result(8, 1.0, row_scores={"rougeL": [1.0, 2.0]})
    values = json.loads(json.dumps(given.to_dict()))
    assert SweepResult.from_dict(values) == given
    del values["row_scores"]
    assert SweepResult.from_dict(values) == replace(given, row_scores={})


def test_of_a_loss_less_is_better():
    found = report(
        result(0, 0.0, loss=3.0), result(0, 0.0, loss=3.2, seed=2), result(15, 0.0, loss=3.25),
        result(22, 0.0, loss=3.4),
        quality="eval_loss",
    )  # fmt: skip
    assert found.deepest_within_noise().depth == 15  # 3.1 + 2 * 0.141 / sqrt(2) = 3.3


def test_depths_are_compared_on_the_most_rows_unless_told():
    found = report(result(0, 15.0), result(22, 10.0), result(0, 8.0, rows=128), result(22, 9.0, rows=128))
    assert found.deepest_within_noise().depth == 0
    assert found.deepest_within_noise(128).depth == 22


def test_rungs_and_diverged_runs_are_no_rows():
    found = report(result(22, 10.0, share=0.5), result(26, 10.0, metrics={}), result(28, 9.0))
    assert [row.depth for row in found.rows()] == [28]
    assert report().deepest_within_noise() is None
    assert "1 runs diverged" in str(found)


def test_the_table_has_a_line_for_each_depth_and_number_of_rows():
    found = report(
        result("pretrained", 2.0, rows=0, rate=0.0, step_seconds=0.0, train_seconds=0.0, cache_seconds=0.0),
        result(22, 10.0), result("full", 11.0), result(22, 9.0, rows=128), result("lora", 11.5),
    )  # fmt: skip
    rows = found.table().to_dict()["rows"]
    assert [(row["frozen"], row["rows"]) for row in rows] == [
        ("before training", "-"), ("22 of 30", "128"), ("none", "512"), ("none, LoRA", "512"), ("22 of 30", "512"),
    ]  # fmt: skip
    assert rows[1]["rougeL"] == "9 [8, 10]"
    assert rows[0]["step"] == "-"


def test_a_report_is_read_again_from_its_lines_and_drawn_without_a_model(tmp_path):
    results = [
        result("pretrained", 2.0, rows=0, rate=0.0),
        *(result(d, 10.0 + d / 10 - s, rows=rows, seed=s, seconds=40.0 - d) for d in (0, 15, 28) for s in (1, 2)
          for rows in (128, 512)),
        result("full", 12.0, seconds=60.0),
    ]  # fmt: skip
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r.to_dict()) + "\n" for r in results))
    facts = {"blocks": 30, "quality": "rougeL", "tuned_by": "eval_loss", "facts": {"model": "x"}, "build_seconds": 4.0}
    (tmp_path / "sweep.json").write_text(json.dumps(facts))
    found = SweepReport.load(tmp_path)
    assert found.results == tuple(results)
    assert found.build_seconds == 4.0
    png, svg = draw_sweep(found, tmp_path / "pareto")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "peak memory, GB" in svg.read_text() or "<svg" in svg.read_text()
    assert SweepReport.load(tmp_path, quality="eval_loss").quality == "eval_loss"
    with pytest.raises(FreezeError, match=r"quality='rougel' was asked for; .* The nearest: 'rougeL'"):
        SweepReport.load(tmp_path, quality="rougel")


def test_a_folder_without_a_sweep_and_a_damaged_one_are_named(tmp_path):
    with pytest.raises(FreezeError, match=r"holds no sweep\.json"):
        SweepReport.load(tmp_path)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(FreezeError, match="it is damaged"):
        SweepReport.load(tmp_path)
