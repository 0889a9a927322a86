"""The run report: one HTML page that opens without a network, drawn from the files in a run's output folder.

`save_run` keeps what no other file there holds (the plan as a table, the forecast, what was measured, the hardware) as
run.json; `write_run_report` reads that, all_results.json, freeze_plan.json, trainer_state.json and predictions.jsonl,
and may be called again at any time. What is not there is left out and named. Nothing is computed here but layout; what
the page looks like is `page`'s business, its charts are `svg`'s.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_freeze.errors import FreezeError
from hf_freeze.files import write_json, write_whole
from hf_freeze.machine import Hardware, library_versions
from hf_freeze.summarization.publish.html import html_page, html_table
from hf_freeze.summarization.publish.results import METRICS
from hf_freeze.summarization.publish.svg import Interval, Line, bar_chart, interval_chart, line_chart
from hf_freeze.summarization.training import loss_table
from hf_freeze.tables import count_text

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
    found = {name: _read(place / name) for name in FILES}
    results, run = found["all_results.json"], found[RUN_FILE] or {}
    if run and run.get("version") != VERSION:
        raise FreezeError(
            f"{place / RUN_FILE} is of version {run.get('version')}, not {VERSION}: another hf_freeze wrote it. Remove "
            "it to draw the rest."
        )
    log = (found["trainer_state.json"] or {}).get("log_history", [])
    rows = found["predictions.jsonl"] or []
    sections = [
        ("Plan", _plan(run, found["freeze_plan.json"])),
        ("Forecast and measured", _forecast(run, results)),
        ("Loss", _loss(log)),
        ("ROUGE", _rouge(results, log)),
        ("Drift", _drift(log, run)),
        ("Samples", _samples(rows)),
        ("Predictions", _predictions(rows)),
        ("Run", _run(run, results, [name for name, value in found.items() if value is None])),
    ]
    title = f"{run['base']}, partly frozen: a run" if run.get("base") else "A partly frozen run"
    write_whole(place / REPORT_FILE, html_page(title, _tiles(results), sections))
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


def _tiles(results: Mapping[str, Any]) -> str:
    """The four figures that a reader wants first."""
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
    cells = [f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in tiles]
    return f"<div class='tiles'>{''.join(cells)}</div>"


def _plan(run: Mapping[str, Any], plan: Mapping[str, Any] | None) -> str:
    asked = f"<p class='small'>Plan: <code>{escape(json.dumps(plan))}</code></p>" if plan is not None else ""
    return (_kept_table(run["plan"]) if run.get("plan") else "") + asked


def _forecast(run: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    costs, prediction, measured = run.get("forecast"), run.get("prediction"), run.get("measured") or {}
    rows: list[tuple[str, ...]] = []
    cached = bool(results.get("prefix_cached"))
    mode = costs["modes"]["cached" if cached else "frozen"] if costs else {}

    def compare(name: str, said: float | None, was: float | None, words: Any) -> None:
        ratio = f"{was / said:.2f}" if said and was else ""
        if said or was:
            rows.append((name, words(said) if said else "", words(was) if was else "", ratio))

    compare("trained parameters", mode.get("trainable_parameters"), results.get("trainable_parameters"), count_text)
    if prediction:
        said = prediction["steps"] * prediction["cached_step_seconds" if cached else "plain_step_seconds"]
        compare("forward and backward of all batches", said, measured.get("batch_seconds"), _seconds)
        if cached:
            compare("building the cache", prediction["build_seconds"], measured.get("build_seconds"), _seconds)
            compare("the cache on disk", prediction["cache_bytes"], measured.get("cache_bytes"), _bytes)
    elif measured.get("batch_seconds"):
        compare("forward and backward of all batches", None, measured["batch_seconds"], _seconds)
    peak = measured.get("peak_bytes")
    if mode or peak:  # not of the same thing: no ratio
        sizes = [_bytes(count) if count else "" for count in (mode.get("memory_bytes"), peak)]
        rows.append(("memory: forecast of a step, peak of the process", *sizes, ""))
    parts = [html_table(("what", "forecast", "measured", "measured / forecast"), rows)] if rows else []
    if peak:
        parts.append(
            "<p class='small'>The peak of the process holds what the forecast leaves out: imports, generation, buffers "
            "and what the allocator keeps.</p>"
        )
    if prediction:
        plain, cached_run = (prediction["steps"] * prediction[f"{kind}_step_seconds"] for kind in ("plain", "cached"))
        cached_run += prediction["build_seconds"] + prediction["steps"] * prediction["reading_seconds"]
        parts.append(
            f"<p>Predicted for the whole training: {_seconds(plain)} without a prefix cache, {_seconds(cached_run)} "
            "with it.</p>"
        )
    if costs:
        parts.append(f"<details><summary>The whole forecast</summary>{_kept_table(costs['table'])}</details>")
    return "".join(parts)


def _loss(log: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        Line(name, [(entry["step"], entry[key]) for entry in log if key in entry and "step" in entry])
        for name, key in (("training", "loss"), ("validation", "eval_loss"))
    ]
    lines = [line for line in lines if line.points]
    chart = line_chart("Loss per token", lines, x_label="step", y_label="loss per token")
    table = _kept_table(loss_table([dict(entry) for entry in log]).to_dict())  # empty where nothing was evaluated
    return f"<div class='charts'>{chart}<div>{table}</div></div>" if chart else ""


def _rouge(results: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> str:
    groups, rows = [], []
    for metric, name in METRICS.items():
        intervals = []
        for prefix, system in SYSTEMS.items():
            key = f"{prefix}{metric}"
            if key in results:
                intervals.append(Interval(system, results[key], results.get(f"{key}_low"), results.get(f"{key}_high")))
        if intervals:
            groups.append((name, intervals))
    for system in SYSTEMS.values():
        found = {name: next((i for i in intervals if i.name == system), None) for name, intervals in groups}
        if any(found.values()):
            rows.append((system, *(_interval_text(interval) for interval in found.values())))
    if not groups:
        return ""
    parts = [interval_chart("ROUGE", groups, x_label="F1 x 100")]
    curves = [
        Line(name, [(e["step"], e[f"eval_{metric}"]) for e in log if f"eval_{metric}" in e and "step" in e])
        for metric, name in METRICS.items()
    ]
    curves = [curve for curve in curves if curve.points]
    parts.append(line_chart("ROUGE on the validation rows", curves, x_label="step", y_label="validation F1 x 100"))
    split = results.get("scored_split", "test")
    count = f" on {results['test_rows']:,} {split} rows" if "test_rows" in results else ""
    table = html_table(("summaries", *(name for name, _ in groups)), rows)
    low = "; bootstrap intervals in brackets" if "test_rouge1_low" in results else ""
    words = f"<p class='small'>F1 x 100{count}, stemmed{low}. ROUGE does not tell whether a summary is true.</p>"
    return f"<div class='charts'>{''.join(parts)}</div>{table}{words}"


def _drift(log: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> str:
    """How far each trained block is from its pretrained weights: `FreezeMonitor` has it in the log."""
    entries = [entry for entry in log if any(key.startswith("drift/") for key in entry)]
    if not entries:
        return ""
    last = {key.removeprefix("drift/"): float(value) for key, value in entries[-1].items() if key.startswith("drift/")}
    stacks: dict[str, list[tuple[int, float]]] = {}
    others = []
    for label, value in last.items():
        stack, _, number = label.rpartition(".")
        if number.isdigit():
            stacks.setdefault(stack, []).append((int(number), value))
        else:
            others.append((label, f"{value:.4g}"))
    parts = []
    for stack, bars in stacks.items():
        parts.append(
            bar_chart(
                f"Drift of the {stack} blocks",
                sorted(bars),
                first=0,
                x_label=f"{stack} block",
                y_label="||w - w0|| / ||w0||",
                below="frozen: 0" if (run.get("frozen_blocks") or {}).get(stack) else "not trained: 0",
            )
        )
        top = [f"{stack}.{number}" for number, _ in sorted(bars)[-4:]]
        curves = [
            Line(
                f"block {label.rpartition('.')[2]}",
                [(e["step"], e[f"drift/{label}"]) for e in entries if "step" in e and f"drift/{label}" in e],
            )
            for label in top
        ]
        if len(entries) > 1:
            label = f"top {stack} blocks: ||w - w0|| / ||w0||"
            parts.append(line_chart(f"Drift of the top {stack} blocks", curves, x_label="step", y_label=label))
    words = (
        "<p class='small'>How far the trained tensors of a block are from the values that they had before training, by "
        "norm, at the last step logged; of adapters, from their first values. What is frozen has not moved.</p>"
    )
    table = html_table(("drift of what is no block", ""), others) if others else ""
    return f"<div class='charts'>{''.join(parts)}</div>{table}{words}"


def _samples(rows: Sequence[Mapping[str, Any]]) -> str:
    chosen = [rows[place * len(rows) // SAMPLES] for place in range(SAMPLES)] if len(rows) > SAMPLES else rows
    cards = []
    for row in chosen:
        pairs = [(name, str(row[name] or "")) for name in TEXTS if name in row]
        empty = "<span class='small'>(empty)</span>"
        lines = [f"<dt>{name}</dt><dd dir='auto'>{escape(text) or empty}</dd>" for name, text in pairs]
        cards.append(f"<dl class='sample'>{''.join(lines)}</dl>")
    return "".join(cards)


def _predictions(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    shown = rows[:MOST_ROWS]
    names = dict.fromkeys(name for row in shown for name in row)
    if "reference" in names:
        names.pop("summary", None)  # the same text
    first = [name for name in (*TEXTS, "rougeL") if name in names]
    columns = ["#", *first, *(name for name in names if name not in first)]
    head = "".join(f"<th scope='col'><button type='button'>{escape(name)}</button></th>" for name in columns)
    body = []
    for number, row in enumerate(shown, 1):
        values = {"#": number, **row}
        cells = [
            f"<td data-label='{escape(name)}' dir='auto'>{escape(_cell(values.get(name)))}</td>" for name in columns
        ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    left = f"<p class='small'>The first {MOST_ROWS:,} of {len(rows):,}; all are in predictions.jsonl.</p>"
    return (
        "<p class='search'><label>Search <input id='search' type='search' autocomplete='off' "
        "placeholder='words that a row must hold'></label> "
        f"<span id='count' role='status'>{len(shown):,} of {len(shown):,}</span></p>"
        f"<div class='wide'><table id='rows'><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
        f"</table></div>{left if len(rows) > len(shown) else ''}"
    )


def _run(run: Mapping[str, Any], results: Mapping[str, Any], missing: Sequence[str]) -> str:
    facts = [(f"data: {split}", text) for split, text in (run.get("data") or {}).items()]
    if run.get("hardware"):
        facts.append(("hardware", str(Hardware.from_dict(run["hardware"]))))
    facts += [(name, str(results[name])) for name in ("precision", "world_size") if name in results]
    facts += [(name, version) for name, version in (run.get("versions") or {}).items()]
    notes = "".join(f"<p>{escape(note)}</p>" for note in run.get("notes") or ())
    lost = f"<p class='small'>Not in the folder: {escape(', '.join(missing))}.</p>" if missing else ""
    return notes + (html_table(("fact", "value"), facts) if facts else "") + lost


# --------------------------------------------------------------------------------------------------------------- pieces


def _kept_table(table: Mapping[str, Any]) -> str:
    """A table as `Table.to_dict` gave it; nothing where it has no row."""
    if not table["rows"]:
        return ""
    columns = list(table["rows"][0])
    rows = [[row[name] for name in columns] for row in table["rows"]]
    lines = "".join(f"<p class='small'>{escape(line)}</p>" for line in table["lines"])
    return html_table(columns, rows) + lines


def _interval_text(interval: Interval | None) -> str:
    if interval is None:
        return ""
    low, high = interval.low, interval.high
    return f"{interval.value:.1f}" + (f" [{low:.1f}, {high:.1f}]" if low is not None and high is not None else "")


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
