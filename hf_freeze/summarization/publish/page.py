"""The run report: one HTML page that opens without a network, drawn from the files in a run's output folder.

`save_run` keeps what no other file there holds (the plan as a table, the forecast, what was measured, the hardware) as
run.json; `write_run_report` reads that, all_results.json, freeze_plan.json, trainer_state.json and predictions.jsonl,
and may be called again at any time. What is not there is left out and named. Nothing is computed here but what is said;
how it is laid out stands in templates/run.html, how its curves are drawn in `pictures`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_freeze.errors import FreezeError
from hf_freeze.files import write_json
from hf_freeze.machine import Hardware, library_versions
from hf_freeze.pages import data_uri, write_page
from hf_freeze.plots import NOT_DRAWN, can_draw, plain_style, svg_of
from hf_freeze.summarization.publish.pictures import Interval, draw_bars, draw_intervals, draw_lines, read_curve
from hf_freeze.summarization.publish.results import METRICS
from hf_freeze.summarization.training import loss_table
from hf_freeze.tables import Table, count_text

if TYPE_CHECKING:
    from hf_freeze.forecast import Forecast
    from hf_freeze.freezing import FreezeReport
    from hf_freeze.prefix import BreakEven

__all__ = ["REPORT_FILE", "RUN_FILE", "save_run", "write_run_report"]

RUN_FILE = "run.json"
VERSION = 1
REPORT_FILE = "report.html"
FILES = ("all_results.json", "freeze_plan.json", "trainer_state.json", "predictions.jsonl", RUN_FILE)
SYSTEMS = {"baseline_test_": "first sentence", "zero_shot_test_": "before", "test_": "after"}  # prefixes of the scores
TEXTS = ("review", "reference", "before", "after")  # columns of the predictions, in this order; any others follow
MOST_ROWS = 2000  # of the table of predictions: a browser searches so many without a pause
SAMPLES = 5


def save_run(
    folder: str | os.PathLike[str],
    *,
    base: str,
    report: FreezeReport,
    costs: Forecast | None = None,
    prediction: BreakEven | None = None,
    measured: Mapping[str, float | None] | None = None,
    hardware: Hardware | None = None,
    data: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Writes run.json, the part of a run that Trainer's own files do not hold. Changes nothing else.

    Args:
        folder: The output folder of the run.
        base: What the run started from: a hub id, or a folder, of which the last part is kept.
        report: What `freeze` returned; of the last stage, where there are several.
        costs: What `forecast` said before the run.
        prediction: What the prefix cache was predicted to save, where that was measured.
        measured: What to set beside it: `batch_seconds` (forward and backward of all batches), `build_seconds` and
            `cache_bytes` of the cache, `peak_bytes` of memory. None and what is missing is not shown.
        hardware: What it ran on.
        data: Split -> where its rows are from and how many they are, in words.
        notes: What a reader should know.

    Returns:
        The file.
    """
    path = Path(folder) / RUN_FILE
    values = {
        "version": VERSION,
        "base": Path(base).name if Path(base).expanduser().exists() else base,
        "plan": report.table.to_dict(),
        "frozen_blocks": report.resolved.blocks,
        "forecast": costs and costs.to_dict() | {"table": costs.table.to_dict()},
        "prediction": prediction and asdict(prediction),
        "measured": {name: value for name, value in (measured or {}).items() if value is not None},
        "hardware": hardware and hardware.to_dict(),
        "versions": library_versions(),
        "data": dict(data or {}),
        "notes": list(notes),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, values)
    return path


def write_run_report(folder: str | os.PathLike[str]) -> Path:
    """Draws report.html from the files of a run, whole or not at all; the same files give the same page.

    Args:
        folder: The output folder of summarize_reviews.py, or any with an all_results.json of its keys. Of a long
            predictions.jsonl the page holds the first 2,000 rows, and says so.

    Without matplotlib it has no curves and says so; their numbers stand in its tables.

    Returns:
        The page: open it with any browser. `#q=strap` behind its address searches the predictions at once.

    Raises:
        FreezeError: No all_results.json in the folder, or a file there that is damaged.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "all_results.json").write_text('{"test_rougeL": 21.5, "zero_shot_test_rougeL": 12.0}')
        >>> page = write_run_report(folder).read_text()
        >>> "12.0" in page and "21.5" in page, "://" in page
        (True, False)
    """
    place = Path(folder)
    if not (place / "all_results.json").is_file():
        raise FreezeError(
            f"write_run_report was asked for {place}; it holds no all_results.json, so no run has ended there. Give "
            "the --output_dir of a run of summarize_reviews.py."
        )
    files = {name: _read(place / name) for name in FILES}
    results, run = files["all_results.json"], files[RUN_FILE] or {}
    if run and run.get("version") != VERSION:
        raise FreezeError(
            f"{place / RUN_FILE} is of version {run.get('version')}, not {VERSION}: another hf_freeze wrote it. Remove "
            "it to draw the rest."
        )
    log = (files["trainer_state.json"] or {}).get("log_history", [])
    rows = files["predictions.jsonl"] or []
    plan = files["freeze_plan.json"]
    missing = [name for name, content in files.items() if content is None]
    with plain_style() if can_draw() else nullcontext() as pyplot:
        loss, rouge, drift = _loss(log, pyplot), _rouge(results, log, pyplot), _drift(log, run, pyplot)
    write_page(
        place / REPORT_FILE,
        "run.html",
        title=f"{run['base']}, partly frozen: a run" if run.get("base") else "A partly frozen run",
        tiles=_tiles(results),
        plan={"table": run.get("plan"), "asked": plan and json.dumps(plan)},
        forecast=_forecast(run, results),
        loss=loss,
        rouge=rouge,
        drift=drift,
        samples=_samples(rows),
        predictions=_predictions(rows),
        notes=run.get("notes") or [],
        facts=_facts(run, results),
        missing=f"Not in the folder: {', '.join(missing)}." if missing else "",
        not_drawn="" if can_draw() else f"The curves are missing: {NOT_DRAWN}.",
    )
    return place / REPORT_FILE


def _read(path: Path) -> Any:
    """A JSON file, or a list of the objects of a JSONL file; None where there is none."""
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [dict(json.loads(line)) for line in text.split("\n") if line.strip()]
        return dict(json.loads(text))
    except (ValueError, TypeError, OSError) as error:
        raise FreezeError(
            f"The run report was to be drawn from {path}; it cannot be read: {error}. Remove it to draw the rest."
        ) from error


# ------------------------------------------------------------------------------------------------------------ sections


def _tiles(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The four figures that a reader wants first, each after its name."""
    tiles = []
    if "test_rougeL" in results:
        before = f"{results['zero_shot_test_rougeL']:.1f} → " if "zero_shot_test_rougeL" in results else ""
        tiles.append(("ROUGE-L, before → after", f"{before}{results['test_rougeL']:.1f}"))
    if "trainable_parameters" in results and "total_parameters" in results:
        trained, total = results["trainable_parameters"], results["total_parameters"]
        tiles.append((f"parameters trained, of {count_text(total)}", f"{count_text(trained)}, {trained / total:.1%}"))
    if "train_seconds" in results:
        cache = results.get("cache_seconds") or 0.0
        with_cache = f", {_seconds(cache)} for deciding on the cache and building it" if cache else ""
        tiles.append((f"of training{with_cache}", _seconds(results["train_seconds"])))
    if results.get("frozen_unchanged"):
        count = f"{results['frozen_tensors']:,} " if "frozen_tensors" in results else ""
        tiles.append((f"{count}frozen tensors, to the bit", "unchanged"))
    return tiles


def _forecast(run: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """What was said before the run beside what was measured."""
    costs, prediction, measured = run.get("forecast"), run.get("prediction"), run.get("measured") or {}
    rows: list[tuple[str, ...]] = []
    cached = bool(results.get("prefix_cached"))
    mode = costs["modes"]["cached" if cached else "frozen"] if costs else {}

    def compare(name: str, said: float | None, was: float | None, words: Callable[[float], str]) -> None:
        ratio = f"{was / said:.2f}" if said and was else ""
        if said or was:
            rows.append((name, words(said) if said else "", words(was) if was else "", ratio))

    compare("trained parameters", mode.get("trainable_parameters"), results.get("trainable_parameters"), count_text)
    seconds: dict[str, float] = {}
    if prediction:
        seconds = {kind: prediction["steps"] * prediction[f"{kind}_step_seconds"] for kind in ("plain", "cached")}
    in_batches = seconds.get("cached" if cached else "plain")
    compare("forward and backward of all batches", in_batches, measured.get("batch_seconds"), _seconds)
    if prediction and cached:
        compare("building the cache", prediction["build_seconds"], measured.get("build_seconds"), _seconds)
        compare("the cache on disk", prediction["cache_bytes"], measured.get("cache_bytes"), _bytes)
    peak = measured.get("peak_bytes")
    if mode or peak:  # not of the same thing: no ratio
        sizes = [_bytes(count) if count else "" for count in (mode.get("memory_bytes"), peak)]
        rows.append(("memory: forecast of a step, peak of the process", *sizes, ""))
    if prediction:  # of the whole training
        seconds["cached"] += prediction["build_seconds"] + prediction["steps"] * prediction["reading_seconds"]
    columns = ("what", "forecast", "measured", "measured / forecast")
    return {
        "compared": _table(columns, rows),
        "with_peak": bool(peak),
        "predicted": {kind: _seconds(value) for kind, value in seconds.items()},
        "whole": costs and costs["table"],
    }


def _loss(log: Sequence[Mapping[str, Any]], pyplot: Any) -> dict[str, Any] | None:
    curves = {"training": read_curve(log, "loss"), "validation": read_curve(log, "eval_loss")}
    if not any(curves.values()):
        return None
    return {
        "charts": _charts(pyplot, {"Loss per token": partial(draw_lines, curves=curves, y_label="loss per token")}),
        "table": loss_table([dict(entry) for entry in log]).to_dict(),  # without a row where nothing was evaluated
    }


def _rouge(results: Mapping[str, Any], log: Sequence[Mapping[str, Any]], pyplot: Any) -> dict[str, Any] | None:
    groups: dict[str, dict[str, Interval]] = {}
    for metric, name in METRICS.items():
        for prefix, system in SYSTEMS.items():
            if (key := f"{prefix}{metric}") in results:
                ends = results.get(f"{key}_low"), results.get(f"{key}_high")
                groups.setdefault(name, {})[system] = (results[key], *ends)
    if not groups:
        return None
    shown = [system for system in SYSTEMS.values() if any(system in group for group in groups.values())]
    cells = [(system, *(_interval_text(group.get(system)) for group in groups.values())) for system in shown]
    split = results.get("scored_split", "test")
    count = f" on {results['test_rows']:,} {split} rows" if "test_rows" in results else ""
    low = "; bootstrap intervals in brackets" if "test_rouge1_low" in results else ""
    curves = {name: read_curve(log, f"eval_{metric}") for metric, name in METRICS.items()}
    title = "ROUGE on the validation rows"
    drawn = {
        "ROUGE": partial(draw_intervals, groups=groups, x_label="F1 x 100"),
        title: partial(draw_lines, curves=curves, y_label="validation F1 x 100"),
    }
    line = f"F1 x 100{count}, stemmed{low}. ROUGE does not tell whether a summary is true."
    return {
        "charts": _charts(pyplot, drawn),
        "table": _table(("summaries", *groups), cells, (line,)),
    }


def _drift(log: Sequence[Mapping[str, Any]], run: Mapping[str, Any], pyplot: Any) -> dict[str, Any] | None:
    """How far each trained block is from its pretrained weights: `FreezeMonitor` has it in the log."""
    last = next((entry for entry in reversed(log) if any(key.startswith("drift/") for key in entry)), None)
    if last is None:
        return None
    drift = {key.removeprefix("drift/"): float(value) for key, value in last.items() if key.startswith("drift/")}
    stacks: dict[str, dict[int, float]] = {}
    for label, value in drift.items():
        stack, _, number = label.rpartition(".")
        if number.isdigit():
            stacks.setdefault(stack, {})[int(number)] = value
    drawn = {}
    rows = []
    for stack, bars in stacks.items():
        below = "frozen: 0" if (run.get("frozen_blocks") or {}).get(stack) else "not trained: 0"
        if lowest := min(bars):
            rows.append((f"{stack}.0 to {stack}.{lowest - 1}", below))
        labels = {"x_label": f"{stack} block", "y_label": "||w - w0|| / ||w0||", "below": below}
        drawn[f"Drift of the {stack} blocks"] = partial(draw_bars, bars=bars, **labels)
        curves = {f"block {number}": read_curve(log, f"drift/{stack}.{number}") for number in sorted(bars)[-4:]}
        if max(map(len, curves.values())) > 1:
            title = f"Drift of the top {stack} blocks"
            drawn[title] = partial(draw_lines, curves=curves, y_label=labels["y_label"])
    rows += [(label, f"{value:.4g}") for label, value in drift.items()]
    return {"charts": _charts(pyplot, drawn), "table": _table(("part", "drift"), rows)}


def _samples(rows: Sequence[Mapping[str, Any]]) -> list[list[tuple[str, str]]]:
    chosen = [rows[place * len(rows) // SAMPLES] for place in range(SAMPLES)] if len(rows) > SAMPLES else rows
    return [[(name, str(row[name] or "")) for name in TEXTS if name in row] for row in chosen]


def _predictions(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The table that can be searched and sorted."""
    if not rows:
        return None
    shown = rows[:MOST_ROWS]
    names = dict.fromkeys(name for row in shown for name in row)
    if "reference" in names:
        names.pop("summary", None)  # the same text
    first = [name for name in (*TEXTS, "rougeL") if name in names]
    columns = ["#", *first, *(name for name in names if name not in first)]
    left = f"The first {MOST_ROWS:,} of {len(rows):,}; all are in predictions.jsonl."
    return {
        "columns": columns,
        "rows": [[_cell({"#": number, **row}.get(name)) for name in columns] for number, row in enumerate(shown, 1)],
        "count": f"{len(shown):,}",
        "left": left if len(rows) > len(shown) else "",
    }


def _facts(run: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    facts = [(f"data: {split}", text) for split, text in (run.get("data") or {}).items()]
    if run.get("hardware"):
        facts.append(("hardware", str(Hardware.from_dict(run["hardware"]))))
    facts += [(name, str(results[name])) for name in ("precision", "world_size") if name in results]
    facts += [(name, version) for name, version in (run.get("versions") or {}).items()]
    return _table(("fact", "value"), facts)


# --------------------------------------------------------------------------------------------------------------- pieces


def _charts(pyplot: Any, drawn: Mapping[str, Callable[[Any], Any]]) -> list[tuple[str, str]]:
    """Each picture as its title and its address in the page; none without pyplot."""
    figures = {title: draw(pyplot) for title, draw in drawn.items()} if pyplot else {}
    return [(title, data_uri(svg_of(figure), "svg+xml")) for title, figure in figures.items() if figure is not None]


def _table(columns: Sequence[str], rows: Sequence[tuple[str, ...]], lines: Sequence[str] = ()) -> dict[str, Any]:
    return Table("", tuple(columns), tuple(rows), tuple(lines)).to_dict()


def _interval_text(interval: Interval | None) -> str:
    if interval is None:
        return ""
    value, low, high = interval
    return f"{value:.1f}" + (f" [{low:.1f}, {high:.1f}]" if low is not None and high is not None else "")


def _cell(value: Any) -> str:
    """A cell's text: numbers short, nothing for what is missing."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _seconds(seconds: float) -> str:
    """Seconds that can be read.

    >>> _seconds(8.34), _seconds(130.0), _seconds(7384.0)
    ('8.3 s', '2 min 10 s', '2 h 3 min')
    """
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _bytes(count: float) -> str:
    return count_text(count, "B")
