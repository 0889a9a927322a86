"""What a sweep over depths found: its runs, as lines of JSON, and the tables and pictures that are made of them.

Nothing here trains or loads a model: a sweep can be read, compared and drawn anew wherever its folder lies.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_freeze.depth.paired import PairedDifference, compare_rows
from hf_freeze.errors import FreezeError, ResumeError, nearest
from hf_freeze.files import write_whole
from hf_freeze.given import check_kind, check_path
from hf_freeze.tables import Table, count_text

__all__ = ["DepthRow", "SweepReport", "SweepResult", "SweepRun", "draw_sweep"]

RUNS_FILE = "runs.jsonl"
FACTS_FILE = "sweep.json"
PRETRAINED, FULL, LORA = "pretrained", "full", "lora"
TOLERATED, TOLERATED_LOSS = 0.05, 0.01  # of a score, of a loss: so much less may be called as good


@dataclass(frozen=True)
class SweepRun:
    """One training of a sweep.

    Attributes:
        depth: Frozen blocks, counted from the bottom; or "full" (nothing is frozen), "lora" (adapters on every linear
            layer), "pretrained" (no training at all).
        rows: Training rows.
        learning_rate: 0.0 where nothing is trained.
        seed: Of the choice of rows, of their order, of dropout.
        share: Of the epochs that are trained; below 1.0 in a rung of successive halving.
    """

    depth: int | str
    rows: int
    learning_rate: float
    seed: int
    share: float = 1.0


@dataclass(frozen=True)
class SweepResult:
    """What one run gave and cost.

    Attributes:
        run: Which one.
        metrics: Of Trainer's evaluation and of the caller's score, after the last epoch; {} where the loss diverged.
        row_scores: Of the metrics that have one, each test row's own, in one order for all runs; {} in lines of the
            first edition, which kept none.
        trained_parameters: How many.
        steps: Optimizer steps.
        train_seconds: Of all steps, batches included, without evaluation.
        step_seconds: Median time of a step, from the end of the last one.
        cache_seconds: To find and check the run's rows in the prefix cache; the one pass for all is not in it.
        score_seconds: Of evaluation and score.
        peak_bytes: Greatest memory while training: the device's, or resident memory on a CPU; 0 where unknown.
        delta_bytes: Of the trained tensors: what has to be stored beside the base.
        cached: Whether the frozen prefix came from the cache.
        device: What the times were measured on.
    """

    run: SweepRun
    metrics: dict[str, float]
    trained_parameters: int
    steps: int
    train_seconds: float
    step_seconds: float
    cache_seconds: float
    score_seconds: float
    peak_bytes: int
    delta_bytes: int
    cached: bool
    device: str
    row_scores: dict[str, list[float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The result as one flat JSON object."""
        values = asdict(self)
        run: dict[str, Any] = values.pop("run")
        return run | values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SweepResult:
        """A result from such an object."""
        names = [f.name for f in fields(SweepRun)]
        rest = {f.name: values[f.name] for f in fields(cls) if f.name not in ("run", "row_scores")}
        rest["row_scores"] = dict(values.get("row_scores", {}))
        return cls(run=SweepRun(**{name: values[name] for name in names}), **rest)


@dataclass(frozen=True)
class DepthRow:
    """The runs of one depth on one number of rows, over their seeds, at the learning rate that was best.

    Attributes:
        quality: Mean over the seeds; `low` and `high` are the means of the score's own intervals, or two standard
            errors of the seeds' mean where it has none, or the quality itself where there is but one seed.
        spread: Standard deviation over the seeds; 0.0 for one.
        row_scores: The quality of each test row, mean over the seeds; () where the runs kept none.
    """

    depth: int | str
    rows: int
    learning_rate: float
    seeds: int
    quality: float
    low: float
    high: float
    spread: float
    metrics: dict[str, float]
    step_seconds: float
    train_seconds: float
    peak_bytes: float
    delta_bytes: int
    trained_parameters: int
    row_scores: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class SweepReport:
    """Every finished run of a sweep; prints as a table.

    Attributes:
        results: In the order in which they were made.
        blocks: Of the model.
        quality: The metric that the table compares.
        tuned_by: The metric by which learning rates were chosen.
        facts: Model, data and arguments of the sweep.
        build_seconds: Of the one pass that served every depth; 0.0 where it was there already or was not wanted.
    """

    results: tuple[SweepResult, ...]
    blocks: int
    quality: str
    tuned_by: str
    facts: dict[str, Any] = field(default_factory=dict)
    build_seconds: float = 0.0

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, quality: str | None = None) -> SweepReport:
        """Reads a sweep's folder, finished or not.

        Args:
            folder: The `output_dir` of `sweep_depths`.
            quality: Another metric to compare; None is that of the sweep.

        Raises:
            FreezeError: There is no sweep, or no run has such a metric.
        """
        check_path("SweepReport.load", "folder", folder)
        path = Path(folder) / FACTS_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            known = (int(values["blocks"]), str(values["quality"]), str(values["tuned_by"]), dict(values["facts"]))
        except FileNotFoundError:
            raise FreezeError(f"A sweep was to be read from {folder}; it holds no {FACTS_FILE}.") from None
        except (ValueError, KeyError, TypeError) as error:
            raise FreezeError(
                f"{path} was to be read; it is damaged: {error}. Start anew in another folder."
            ) from error
        results = tuple(read_runs(Path(folder) / RUNS_FILE))
        blocks, usual, tuned_by, facts = known
        quality = quality or usual
        if results:
            check_metric(quality, results[0].metrics, "quality")
        return cls(results, blocks, quality, tuned_by, facts, float(values.get("build_seconds", 0.0)))

    def rows(self, rows: int | None = None) -> list[DepthRow]:
        """One row a depth and number of rows: references first, then by depth. Only runs over all epochs count.

        Args:
            rows: Of this number of training rows only.
        """
        groups: dict[tuple[int | str, int], list[SweepResult]] = {}
        for result in self.results:
            if result.run.share == 1.0 and result.metrics and rows in (None, result.run.rows):
                groups.setdefault((result.run.depth, result.run.rows), []).append(result)
        order = [PRETRAINED, FULL, LORA]

        def place(key: tuple[int | str, int]) -> tuple[int, int]:
            return (key[1], order.index(key[0]) if isinstance(key[0], str) else len(order) + key[0])

        return [_row(groups[key], self.quality, self.tuned_by) for key in sorted(groups, key=place)]

    def deepest_within_noise(self, rows: int | None = None) -> DepthRow | None:
        """The row with most blocks frozen that the test rows show to be as good as every shallower one.

        As good: behind it by 5 % of its quality at most (of a loss by 1 %) at the upper end of the paired interval, and
        not behind on every row. What the rows cannot show counts against a depth, so that few of them name a
        shallower one. Runs without scores of each row are compared by the best depth's own interval, as `table` says:
        of those, few test rows name a deeper one.

        Args:
            rows: On this number of training rows; None is the most there are.

        Returns:
            The row; None where no depth was trained.
        """
        depths = self._depths(rows)
        if not _are_paired(depths):
            return _deepest_unpaired(depths, sign_of(self.quality))
        able = [row for place, row in enumerate(depths) if all(self._is_as_good(row, s) for s in depths[:place])]
        return able[-1]

    def behind(self, row: DepthRow, other: DepthRow) -> PairedDifference:
        """How far a row's quality lies behind another's, over the same test rows; both must have `row_scores`."""
        sign = sign_of(self.quality)
        return compare_rows([-sign * score for score in row.row_scores], [-sign * score for score in other.row_scores])

    def _is_as_good(self, row: DepthRow, other: DepthRow) -> bool:
        behind = self.behind(row, other)
        return behind.high <= self._tolerated * abs(other.quality) and not behind.on_every_row

    @property
    def _tolerated(self) -> float:
        return TOLERATED_LOSS if less_is_better(self.quality) else TOLERATED

    def _depths(self, rows: int | None) -> list[DepthRow]:
        """The rows of trained depths, shallowest first."""
        rows = max((r.run.rows for r in self.results), default=0) if rows is None else rows
        return [row for row in self.rows(rows) if isinstance(row.depth, int)]

    def _deepest_line(self) -> list[str]:
        """The deepest freeze within noise, and what that rests on."""
        deepest = self.deepest_within_noise()
        if deepest is None:
            return []
        line = f"Deepest freeze within noise, on {deepest.rows} rows: {_depth_text(deepest.depth, self.blocks)}. "
        depths = self._depths(None)
        if not _are_paired(depths):
            return [
                f"{line}By the best depth's own interval, since these runs kept no score of each test row: the fewer "
                "there were, the deeper it names. Runs made anew keep them."
            ]
        line += (
            f"{len(deepest.row_scores)} test rows, paired, show it to be at most {self._tolerated:.0%} behind every "
            "shallower one"
        )
        if (place := depths.index(deepest)) + 1 == len(depths):
            return [f"{line}."]
        deeper = depths[place + 1]
        behind = max((self.behind(deeper, row) for row in depths[: place + 1]), key=lambda b: b.high)
        return [
            f"{line}; {deeper.depth} frozen are {behind.mean:.3g} [{behind.low:.3g}, {behind.high:.3g}] behind. More "
            "test rows may tell more."
        ]

    def __str__(self) -> str:
        return str(self.table())

    def table(self) -> Table:
        """Quality and cost of every depth, on every number of rows."""
        measured = self.rows()
        others = [n for n in ("eval_loss", "rouge1", "rougeL") if any(n in r.metrics for r in measured)]
        others = [name for name in others if name != self.quality]
        rows = tuple(
            (
                _depth_text(row.depth, self.blocks),
                "-" if row.depth == PRETRAINED else str(row.rows),
                f"{row.learning_rate:g}" if row.learning_rate else "-",
                f"{row.quality:.4g}" + (f" [{row.low:.4g}, {row.high:.4g}]" if row.low < row.high else ""),
                f"{row.spread:.2g}" if row.seeds > 1 else "-",
                *(f"{row.metrics[name]:.4g}" if name in row.metrics else "-" for name in others),
                f"{row.step_seconds:.3g} s" if row.step_seconds else "-",
                f"{row.train_seconds:.3g} s" if row.train_seconds else "-",
                count_text(row.peak_bytes, "B") if row.peak_bytes else "-",
                count_text(row.delta_bytes, "B") if row.delta_bytes else "-",
            )
            for row in measured
        )
        lines = [
            f"{self.quality}: mean over seeds and its interval; spread: standard deviation over seeds. The learning "
            f"rate of each row was chosen by {self.tuned_by} with one seed. training: with checking and opening the "
            "cache, which takes as long for a short run; peak: of the process, in training; delta: its size on disk.",
        ]
        lines += self._deepest_line()
        if diverged := sum(not result.metrics for result in self.results):
            lines.append(f"{diverged} runs diverged and are left out.")
        columns = ("frozen", "rows", "rate", self.quality, "spread", *others, "step", "training", "peak", "delta")
        return Table("Depth sweep", columns, rows, tuple(lines))


def _row(results: Sequence[SweepResult], quality: str, tuned_by: str) -> DepthRow:
    by_rate: dict[float, list[SweepResult]] = {}
    for result in results:
        by_rate.setdefault(result.run.learning_rate, []).append(result)

    def worth(rate: float) -> tuple[int, float]:
        values = [result.metrics.get(tuned_by, math.nan) for result in by_rate[rate]]
        return len(values), sign_of(tuned_by) * statistics.fmean(values)

    rate = max(by_rate, key=worth)
    chosen = by_rate[rate]

    def mean(name: str) -> float:
        return statistics.fmean(result.metrics[name] for result in chosen)

    names = [name for name in chosen[0].metrics if all(name in result.metrics for result in chosen)]
    values = [result.metrics[quality] for result in chosen]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    ends = (f"{quality}_low", f"{quality}_high")
    half = 2 * spread / math.sqrt(len(values))
    low, high = map(mean, ends) if set(ends) <= set(names) else (mean(quality) - half, mean(quality) + half)
    return DepthRow(
        depth=chosen[0].run.depth,
        rows=chosen[0].run.rows,
        learning_rate=rate,
        seeds=len(chosen),
        quality=mean(quality),
        low=low,
        high=high,
        spread=spread,
        metrics={name: mean(name) for name in names},
        step_seconds=statistics.median(result.step_seconds for result in chosen),
        train_seconds=statistics.fmean(result.train_seconds + result.cache_seconds for result in chosen),
        peak_bytes=statistics.median(result.peak_bytes for result in chosen),
        delta_bytes=chosen[0].delta_bytes,
        trained_parameters=chosen[0].trained_parameters,
        row_scores=_mean_scores([result.row_scores.get(quality, []) for result in chosen]),
    )


def _mean_scores(scores: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Each test row's mean over the seeds; () where a seed has none, or another number of them."""
    if len({len(of_seed) for of_seed in scores}) > 1:
        return ()
    return tuple(statistics.fmean(of_row) for of_row in zip(*scores, strict=True))


def _are_paired(depths: Sequence[DepthRow]) -> bool:
    """Whether all depths were scored row by row; a sweep's test rows are the same in all its runs."""
    return {len(row.row_scores) > 0 for row in depths} == {True} and len({len(row.row_scores) for row in depths}) == 1


def _deepest_unpaired(depths: Sequence[DepthRow], sign: float) -> DepthRow | None:
    """The deepest whose quality lies within the interval of the best one."""
    if not depths:
        return None
    best = max(depths, key=lambda row: sign * row.quality)
    bound = best.high if sign < 0 else best.low
    return max((row for row in depths if sign * row.quality >= sign * bound), key=lambda row: int(row.depth))


def _depth_text(depth: int | str, blocks: int) -> str:
    """
    >>> _depth_text(22, 30), _depth_text("lora", 30)
    ('22 of 30', 'none, LoRA')
    """
    words = {PRETRAINED: "before training", FULL: "none", LORA: "none, LoRA"}
    return words[depth] if isinstance(depth, str) else f"{depth} of {blocks}"


def run_text(run: SweepRun, blocks: int) -> str:
    text = f"frozen {_depth_text(run.depth, blocks)}"
    if run.depth == PRETRAINED:
        return _depth_text(run.depth, blocks)
    share = f", {run.share:.3g} of the epochs" if run.share < 1.0 else ""
    return f"{text}, {run.rows} rows, rate {run.learning_rate:g}, seed {run.seed}{share}"


def draw_sweep(report: SweepReport, path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Draws quality against training time and against memory, one line for each number of rows.

    What no other row beats in both, the Pareto front, is drawn filled; references stand apart, labelled.

    Args:
        report: Of `sweep_depths`, or read again by `SweepReport.load`.
        path: Without an ending; a PNG and an SVG are written.

    Returns:
        Their paths.
    """
    check_kind("draw_sweep", "report", report, SweepReport, "a SweepReport", "SweepReport.load(folder)")
    check_path("draw_sweep", "path", path)
    from hf_freeze.plots import MARKS, plain_style, save_figure

    with plain_style() as pyplot:
        from matplotlib.ticker import FuncFormatter, LogLocator

        figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.4), sharey=True)
        rows = [row for row in report.rows() if row.depth != PRETRAINED]
        sizes = sorted({row.rows for row in rows})
        for axes, cost, scale, unit in (
            (panels[0], "train_seconds", 1.0, "training time, opening the cache included, s"),
            (panels[1], "peak_bytes", 1e-9, "peak memory, GB"),
        ):
            for place, size in enumerate(sizes):
                points = [(scale * getattr(row, cost), row) for row in rows if row.rows == size]
                points = [point for point in points if point[0]]  # a peak may be unknown
                grey = f"{0.55 - 0.55 * (place + 1) / len(sizes):.2f}"
                _draw_points(axes, points, sign_of(report.quality), MARKS[place % len(MARKS)], grey)
                axes.plot([], [], "-", color=grey, marker=MARKS[place % len(MARKS)], label=f"{size} rows")
            axes.set_xlabel(unit)
        panels[0].set_xscale("log")
        panels[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[0].xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:,.3g}"))
        panels[0].xaxis.set_minor_formatter("")
        panels[0].set_ylabel(report.quality.replace("rouge", "ROUGE-"))
        panels[0].legend(loc="best")
        title = f"Quality and cost by frozen blocks (of {report.blocks}); filled: on the Pareto front"
        figure.suptitle(title, fontsize=11)
        return save_figure(figure, path)


def _draw_points(axes: Any, points: Sequence[tuple[float, DepthRow]], sign: float, mark: str, grey: str) -> None:
    """Rows at their costs, with their intervals, and a line through those that are depths."""
    depths = [(cost, row.quality) for cost, row in points if isinstance(row.depth, int)]
    axes.plot([cost for cost, _ in depths], [quality for _, quality in depths], "-", color=grey, marker="", lw=1)
    for cost, row in points:
        beaten = any(less < cost and sign * other.quality > sign * row.quality for less, other in points)
        bars = [[max(0.0, row.quality - row.low)], [max(0.0, row.high - row.quality)]]
        look = {"marker": mark, "markersize": 6} if isinstance(row.depth, int) else {"marker": "*", "markersize": 9}
        axes.errorbar(
            [cost], [row.quality], yerr=bars, color=grey, markerfacecolor="white" if beaten else grey, linestyle="",
            elinewidth=0.6, capsize=2, **look,
        )  # fmt: skip
        text = "LoRA" if row.depth == LORA else str(row.depth)
        axes.annotate(text, (cost, row.quality), textcoords="offset points", xytext=(5, 4), fontsize=8)


def less_is_better(metric: str) -> bool:
    return "loss" in metric


def sign_of(metric: str) -> float:
    """1.0 where more is better."""
    return -1.0 if less_is_better(metric) else 1.0


def check_metric(asked: str, metrics: Mapping[str, float], argument: str) -> None:
    if asked not in metrics:
        raise FreezeError(
            f"{argument}={asked!r} was asked for; evaluation and score give {', '.join(metrics)}. "
            f"The nearest: {nearest(asked, metrics)}."
        )


# --------------------------------------------------------------------------------------------------------------- files


def read_runs(path: Path) -> Iterator[SweepResult]:
    """The finished runs; a last line that a kill left half written is not one."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            yield SweepResult.from_dict(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # no newline after it
                return
            raise ResumeError(
                f"{path} was to be read; its line {number} is damaged: {error}. Remove that line: its run is then made "
                "again."
            ) from error


def append_run(path: Path, result: SweepResult) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result.to_dict()) + "\n")
        file.flush()
        os.fsync(file.fileno())


def rewrite_runs(path: Path, results: Iterable[SweepResult]) -> None:
    write_whole(path, "".join(json.dumps(result.to_dict()) + "\n" for result in results))
