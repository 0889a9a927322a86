"""The run report is drawn from files alone, loads nothing, runs nothing that a review brings, and can be searched."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_freeze import FreezeError, FreezePlan, forecast, freeze
from hf_freeze.machine import Hardware
from hf_freeze.prefix.break_even import BreakEven
from hf_freeze.summarization import save_run, write_run_report
from hf_freeze.summarization.publish.page import FILES, MOST_ROWS, REPORT_FILE, RUN_FILE
from hf_freeze.summarization.publish.svg import Interval, Line, bar_chart, interval_chart, line_chart, nice_ticks
from tests.tiny import tiny_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
]  # fmt: skip
VOID = {"meta", "input", "br"}
ATTACK = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\"> & </td></table>"

RESULTS: dict[str, Any] = {
    "frozen_tensors": 28, "frozen_unchanged": True, "train_seconds": 120.0, "cache_seconds": 60.0, "precision": "fp32",
    "trainable_parameters": 41_344, "total_parameters": 101_248, "prefix_cached": True, "test_rows": 3,
}  # fmt: skip
for prefix, start in (("baseline_test_", 10.0), ("zero_shot_test_", 5.0), ("test_", 20.0)):
    for number, metric in enumerate(("rouge1", "rouge2", "rougeL", "rougeLsum")):
        value = start + number / 10
        RESULTS |= {f"{prefix}{metric}": value, f"{prefix}{metric}_low": value - 1, f"{prefix}{metric}_high": value + 2}
LOG = [
    {"step": 2, "epoch": 0.5, "loss": 4.0, "drift/decoder.3": 0.01, "drift/final": 0.001},
    {"step": 4, "epoch": 1.0, "loss": 3.0, "drift/decoder.3": 0.02, "drift/final": 0.002},
    {"step": 4, "epoch": 1.0, "eval_loss": 3.5},
]
ROWS = [
    {"review": "Good mug, weak handle.", "summary": "A mug.", "reference": "A mug.", "before": "Mug", "after": "A mug",
     "rougeL": 9.5, "rating": 4},
    {"review": f"Strap broke. {ATTACK}", "reference": "A bag.", "before": "", "after": "Bag", "rougeL": 10.0},
    {"review": "Ein Becher \ud83d, schön.", "reference": "", "before": None, "after": "x", "rougeL": float("nan")},
]  # fmt: skip


def run_folder(folder: Path, *, rows: list[dict[str, Any]] = ROWS, log: list[dict[str, Any]] = LOG) -> Path:
    """What a run leaves in its output folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model("llama")
    plan = FreezePlan(decoder_blocks=3)
    report = freeze(model, plan)
    costs = forecast(model, plan, batch_size=4, source_tokens=32, target_tokens=8, dtype="float32")
    prediction = BreakEven(0.5, 0.2, steps=100, build_seconds=7.0, cache_bytes=3_000_000, reading_seconds=0.01)
    save_run(
        folder,
        base="some/model",
        report=report,
        costs=costs,
        prediction=prediction,
        measured={"batch_seconds": 25.0, "build_seconds": 14.0, "cache_bytes": 3_000_000, "peak_bytes": None},
        hardware=Hardware("A CPU", 1, 2),
        data={"train": "reviews.csv: 10 rows read, 9 used"},
        notes=("3 reviews were cut",),
    )
    plan.save_pretrained(folder)
    (folder / "all_results.json").write_text(json.dumps(RESULTS))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Page(HTMLParser):
    """A page taken apart: its elements with their attributes, its text by element, and what is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.append((self.open[-1], data))

    def cells(self) -> list[str]:
        """The texts of the cells of all tables that hold any."""
        return [text for tag, text in self.text if tag == "td"]

    def words(self) -> str:
        return "\n".join(text for tag, text in self.text if tag not in ("style", "script"))


def page_of(folder: Path) -> Page:
    return Page(write_run_report(folder).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------- what it holds


def test_every_section_is_drawn_from_the_files(tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path))
    words = page.words()
    assert [text for tag, text in page.text if tag == "h2"] == [
        "Plan", "Forecast and measured", "Loss", "ROUGE", "Drift", "Samples", "Predictions", "Run",
    ]  # fmt: skip
    for shown in (
        "some/model, partly frozen: a run",
        "5.2 → 20.2",  # ROUGE-L
        "41.3 k, 40.8%",
        "decoder blocks 0-2",
        '"decoder_blocks": 3',
        "20.0 [19.0, 22.0]",
        "frozen: 0",
        "Good mug, weak handle.",
        "reviews.csv: 10 rows read, 9 used",
        "3 reviews were cut",
        "A CPU, 2 CPU cores",
    ):
        assert shown in words, shown
    assert "Not in the folder" not in words


def test_what_was_forecast_stands_beside_what_was_measured(tmp_path: Path) -> None:
    cells = page_of(run_folder(tmp_path)).cells()
    at = cells.index("forward and backward of all batches")
    assert cells[at : at + 4] == ["forward and backward of all batches", "20.0 s", "25.0 s", "1.25"]  # 100 x 0.2
    at = cells.index("building the cache")
    assert cells[at : at + 4] == ["building the cache", "7.0 s", "14.0 s", "2.00"]
    at = cells.index("trained parameters")
    assert cells[at + 1 : at + 4] == ["41.3 k", "41.3 k", "1.00"]
    words = page_of(tmp_path).words()
    assert "50.0 s without a prefix cache, 28.0 s with it" in words  # 100 x 0.5; 7 + 100 x 0.21


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    run_folder(tmp_path)
    first = write_run_report(tmp_path).read_bytes()
    assert write_run_report(str(tmp_path)).read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FILES, REPORT_FILE])


@pytest.mark.parametrize("name", [name for name in FILES if name != "all_results.json"])
def test_a_missing_file_is_named_and_the_rest_drawn(name: str, tmp_path: Path) -> None:
    (run_folder(tmp_path) / name).unlink()
    words = page_of(tmp_path).words()
    assert f"Not in the folder: {name}." in words
    assert "20.0 [19.0, 22.0]" in words


def test_a_folder_without_a_run_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FreezeError, match=r"it holds no all_results\.json, so no run has ended there"):
        write_run_report(tmp_path)
    run_folder(tmp_path)
    for name, text in (("predictions.jsonl", '{"review": "a"}\n[1'), ("trainer_state.json", "[1, 2]")):
        kept = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text)
        with pytest.raises(FreezeError, match=rf"drawn from .*{name}; it cannot be read: .* Remove it"):
            write_run_report(tmp_path)
        (tmp_path / name).write_text(kept)
    (tmp_path / RUN_FILE).write_text(json.dumps({"version": 99}))
    with pytest.raises(FreezeError, match=r"run\.json is of version 99, not 1"):
        write_run_report(tmp_path)


def test_of_many_predictions_the_first_are_shown_and_the_rest_told(tmp_path: Path) -> None:
    rows = [{"review": f"review {number}", "after": "x"} for number in range(MOST_ROWS + 1)]
    page = page_of(run_folder(tmp_path, rows=rows))
    texts = set(page.cells())
    assert f"review {MOST_ROWS - 1}" in texts
    assert f"review {MOST_ROWS}" not in texts
    assert "The first 2,000 of 2,001; all are in predictions.jsonl." in page.words()


def test_rouge_of_evaluations_becomes_a_curve(tmp_path: Path) -> None:
    curve = "ROUGE on the validation rows"
    assert curve not in page_of(run_folder(tmp_path)).words()
    log = [*LOG, {"step": 2, "eval_rougeL": 10.0}, {"step": 4, "eval_rougeL": 12.0}]
    assert curve in page_of(run_folder(tmp_path, log=log)).words()


# ------------------------------------------------------------------------------------------------------------- safety


def test_the_page_is_well_formed_and_asks_for_nothing(tmp_path: Path) -> None:
    text = write_run_report(run_folder(tmp_path)).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"link", "img", "iframe", "object", "embed", "base", "form", "image", "use"}
    asking = {"src", "srcset", "href", "action", "background", "poster", "data", "xlink:href"}
    asked = [value for _, attributes in page.elements for name, value in attributes.items() if name in asking]
    assert asked
    assert all(str(value).startswith("#") for value in asked)
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    style = next(text for tag, text in page.text if tag == "style")
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")


def test_a_review_that_holds_a_script_stays_text(tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path))
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert f"Strap broke. {ATTACK}" in page.cells()
    assert f"Strap broke. {ATTACK}" in [text for tag, text in page.text if tag == "dd"]
    columns = {"</script><script>1</script>": "x", '"onclick="alert(1)': "y", "' onclick='z": "z"}
    page = page_of(run_folder(tmp_path, rows=[columns]))
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def chromium(address: str, profile: Path) -> tuple[str, str]:
    """The page as the browser has it once its scripts ran, and what the browser's console says."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "--allow-file-access-from-files", "--dump-dom"]
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_in_a_browser_the_search_finds_rows_and_nothing_of_a_review_runs(tmp_path: Path) -> None:
    page = write_run_report(run_folder(tmp_path / "run"))
    text, console = chromium(f"file://{page}#q=STRAP%20broke", tmp_path / "profile")
    assert console == ""
    shown = Page(text)
    assert ("span", "1 of 3") in shown.text
    assert [tag for tag, attributes in shown.elements if "hidden" in attributes] == ["tr", "tr"]
    assert next(text for tag, text in shown.text if tag == "title") == "some/model, partly frozen: a run"


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_in_a_browser_a_click_sorts_by_number_and_a_policy_stops_what_is_put_in_later(tmp_path: Path) -> None:
    page = write_run_report(run_folder(tmp_path / "run"))
    outer = tmp_path / "outer.html"
    outer.write_text(f"""<iframe src="{page}"></iframe><pre></pre><script>
    onload = () => {{
      const inner = document.querySelector("iframe").contentDocument, told = [];
      const order = () => [...inner.querySelectorAll("#rows tbody tr")].map(row => row.cells[0].textContent).join("");
      const head = [...inner.querySelectorAll("#rows th button")].find(button => button.textContent === "rougeL");
      for (let click = 0; click < 2; click++) {{ head.click(); told.push(order()); }}
      const script = inner.createElement("script");
      script.textContent = "document.title = 'owned'";
      inner.body.append(script);
      told.push(inner.title);
      document.querySelector("pre").textContent = told.join("|");
    }};
    </script>""")
    text, console = chromium(f"file://{outer}", tmp_path / "profile")
    first, second, title = next(text for tag, text in Page(text).text if tag == "pre").split("|")
    assert first.index("1") < first.index("2")  # 9.5 before 10, as numbers
    assert second.index("2") < second.index("1")
    assert title == "some/model, partly frozen: a run"
    assert "Content Security Policy" in console
    assert "Uncaught" not in console


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
@pytest.mark.parametrize("width", [1200, 420])
def test_in_a_browser_nothing_is_wider_than_the_screen(width: int, tmp_path: Path) -> None:
    long = {**ROWS[0], "product": "x" * 300, "review": "word " * 300}
    page = write_run_report(run_folder(tmp_path / "run", rows=[long, *ROWS]))
    outer = tmp_path / "outer.html"
    frame = f'<iframe src="{page}" style="width: {width}px; height: 900px; border: 0"></iframe><pre></pre>'
    outer.write_text(f"""{frame}<script>
    onload = () => {{
      const root = document.querySelector("iframe").contentDocument.documentElement;
      const charts = [...root.querySelectorAll("svg.chart")].map(chart => chart.getBoundingClientRect().width);
      const told = [root.scrollWidth, Math.min(...charts), Math.max(...charts)];
      document.querySelector("pre").textContent = told.join("|");
    }};
    </script>""")
    text, _ = chromium(f"file://{outer}", tmp_path / "profile")
    found = next(text for tag, text in Page(text).text if tag == "pre").split("|")
    wide, smallest, largest = (float(value) for value in found)
    assert wide <= width
    assert smallest >= 300
    assert largest <= width


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_in_a_browser_a_screenshot_shows_text_and_charts(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    page = write_run_report(run_folder(tmp_path / "run"))
    picture = tmp_path / "page.png"
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,3000"]
    subprocess.run(
        [*command, f"--screenshot={picture}", f"file://{page}"], capture_output=True, timeout=120, check=True
    )
    colours = image.open(picture).convert("RGB").getcolors(maxcolors=1 << 24)
    assert colours is not None
    assert {(0x1A, 0x1C, 0x1E), (0xC2, 0x50, 0x0A), (0x0B, 0x6C, 0xAE)} <= {colour for _, colour in colours}


# -------------------------------------------------------------------------------------------------------------- charts


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(1, 8))
def test_ticks_are_round_few_and_cover_the_range(low: float, span: float, count: int) -> None:
    high = low + span
    ticks = nice_ticks(low, high, count)
    assert ticks[0] <= low + 1e-6 * span + 1e-9
    assert ticks[-1] >= high - 1e-6 * span - 1e-9
    assert 2 <= len(ticks) <= count + 3


def test_points_lie_where_they_should() -> None:
    chart = line_chart("Loss", [Line("a", [(0.0, 0.0), (1.0, 1.0)]), Line("b", [(1.0, float("nan"))])],
                       x_label="step", y_label="loss")  # fmt: skip
    points = next(a for tag, a in Page(chart).elements if tag == "polyline")["points"]
    assert points == "52.0,236.0 446.0,46.0"  # the corners of the frame: 460 x 280 less the margins
    assert chart.count("<polyline") == 2
    assert line_chart("Loss", [Line("b", [(1.0, float("inf"))])], x_label="x", y_label="y") == ""


def test_bars_are_as_high_as_they_should_be() -> None:
    chart = bar_chart("Drift", [(2, 0.5), (3, 1.0)], first=0, x_label="block", y_label="drift", below="frozen: 0")
    boxes = [a for tag, a in Page(chart).elements if tag == "rect"]
    assert [box["class"] for box in boxes] == ["band", "bar", "bar"]
    assert [box["height"] for box in boxes] == ["190.0", "95.0", "190.0"]
    assert float(boxes[0]["width"] or 0) == pytest.approx(394 / 2)
    assert bar_chart("Drift", [], first=0, x_label="block", y_label="drift") == ""


def test_intervals_reach_from_low_to_high() -> None:
    chart = interval_chart("ROUGE", [("R1", [Interval("after", 5.0, 0.0, 10.0)])], x_label="F1")
    line = [a for tag, a in Page(chart).elements if tag == "line" and a["class"] == "line s0"][-1]
    mark = [a for tag, a in Page(chart).elements if tag == "circle"][-1]
    assert line["x1"] == "106.0"
    assert float(mark["cx"] or 0) == (float(line["x1"] or 0) + float(line["x2"] or 0)) / 2
    assert interval_chart("ROUGE", [], x_label="F1") == ""
