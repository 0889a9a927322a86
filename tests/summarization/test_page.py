"""The run report is drawn from files alone, loads nothing, runs nothing that a review brings, and can be searched."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hf_freeze import FreezeError, FreezePlan, forecast, freeze
from hf_freeze.machine import Hardware
from hf_freeze.plots import plain_style
from hf_freeze.prefix import BreakEven
from hf_freeze.summarization import save_run, write_run_report
from hf_freeze.summarization.publish.page import FILES, MOST_ROWS, REPORT_FILE, RUN_FILE
from hf_freeze.summarization.publish.pictures import draw_bars, draw_intervals, draw_lines
from tests.tiny import tiny_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
]  # fmt: skip
VOID = {"meta", "input", "br", "img"}
ATTACK = (
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\"> & </td></table> {{ 7 }}"
)

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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves in its output folder."""
    folder = tmp_path_factory.mktemp("finished")
    model = tiny_model("llama")
    plan = FreezePlan(decoder_blocks=3)
    report = freeze(model, plan)
    save_run(
        folder,
        base="some/model",
        report=report,
        costs=forecast(model, plan, batch_size=4, source_tokens=32, target_tokens=8, dtype="float32"),
        prediction=BreakEven(0.5, 0.2, steps=100, build_seconds=7.0, cache_bytes=3_000_000, reading_seconds=0.01),
        measured={"batch_seconds": 25.0, "build_seconds": 14.0, "cache_bytes": 3_000_000, "peak_bytes": None},
        hardware=Hardware("A CPU", 1, 2),
        data={"train": "reviews.csv: 10 rows read, 9 used"},
        notes=("3 reviews were cut",),
    )
    plan.save_pretrained(folder)
    (folder / "all_results.json").write_text(json.dumps(RESULTS))
    write_log(folder, LOG)
    write_rows(folder, ROWS)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def write_log(folder: Path, log: list[dict[str, Any]]) -> None:
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


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

    def charts(self) -> dict[str, str]:
        """The pictures by their titles, as SVG; matplotlib writes each label into a comment."""
        images = [attributes for tag, attributes in self.elements if tag == "img"]
        return {str(a["alt"]): base64.b64decode(str(a["src"]).partition(",")[2]).decode() for a in images}


def page_of(folder: Path) -> Page:
    return Page(write_run_report(folder).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------- what it holds


def test_every_section_is_drawn_from_the_files(run: Path) -> None:
    page = page_of(run)
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
        "Good mug, weak handle.",
        "reviews.csv: 10 rows read, 9 used",
        "3 reviews were cut",
        "A CPU, 2 CPU cores",
    ):
        assert shown in words, shown
    assert "Not in the folder" not in words
    cells = page.cells()
    at = cells.index("decoder.0 to decoder.2")
    assert cells[at : at + 6] == ["decoder.0 to decoder.2", "frozen: 0", "decoder.3", "0.02", "final", "0.002"]


def test_what_was_forecast_stands_beside_what_was_measured(run: Path) -> None:
    values = json.loads((run / RUN_FILE).read_text())
    values["measured"]["peak_bytes"] = 2_500_000
    (run / RUN_FILE).write_text(json.dumps(values))
    page = page_of(run)
    cells = page.cells()
    at = cells.index("forward and backward of all batches")
    assert cells[at : at + 4] == ["forward and backward of all batches", "20.0 s", "25.0 s", "1.25"]  # 100 x 0.2
    at = cells.index("building the cache")
    assert cells[at : at + 4] == ["building the cache", "7.0 s", "14.0 s", "2.00"]
    at = cells.index("trained parameters")
    assert cells[at + 1 : at + 4] == ["41.3 k", "41.3 k", "1.00"]
    at = cells.index("memory: forecast of a step, peak of the process")
    assert cells[at + 2 : at + 4] == ["2.5 MB", "full"], "of two things no ratio: the next table begins"
    words = page.words()
    assert "The peak of the process holds what the forecast leaves out" in words
    assert "50.0 s without a prefix cache, 28.0 s with it" in words  # 100 x 0.5; 7 + 100 x 0.21


def test_the_same_files_give_the_same_page(run: Path) -> None:
    first = write_run_report(run).read_bytes()
    assert write_run_report(str(run)).read_bytes() == first
    assert sorted(path.name for path in run.iterdir()) == sorted([*FILES, REPORT_FILE])


@pytest.mark.parametrize("name", [name for name in FILES if name != "all_results.json"])
def test_a_missing_file_is_named_and_the_rest_drawn(name: str, run: Path) -> None:
    (run / name).unlink()
    words = page_of(run).words()
    assert f"Not in the folder: {name}." in words
    assert "20.0 [19.0, 22.0]" in words


def test_a_folder_without_a_run_and_a_damaged_file_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FreezeError, match=r"it holds no all_results\.json, so no run has ended there"):
        write_run_report(tmp_path)
    for name, text in (("predictions.jsonl", '{"review": "a"}\n[1'), ("trainer_state.json", "[1, 2]")):
        kept = (run / name).read_text()
        (run / name).write_text(text)
        with pytest.raises(FreezeError, match=rf"drawn from .*{name}; it cannot be read: .* Remove it"):
            write_run_report(run)
        (run / name).write_text(kept)
    (run / RUN_FILE).write_text(json.dumps({"version": 99}))
    with pytest.raises(FreezeError, match=r"run\.json is of version 99, not 1"):
        write_run_report(run)


def test_of_many_predictions_the_first_are_shown_and_the_rest_told(run: Path) -> None:
    write_rows(run, [{"review": f"review {number}", "after": "x"} for number in range(MOST_ROWS + 1)])
    page = page_of(run)
    texts = set(page.cells())
    assert f"review {MOST_ROWS - 1}" in texts
    assert f"review {MOST_ROWS}" not in texts
    assert "The first 2,000 of 2,001; all are in predictions.jsonl." in page.words()


def test_the_pictures_of_a_run_are_in_its_page(run: Path) -> None:
    charts = page_of(run).charts()
    assert list(charts) == ["Loss per token", "ROUGE", "Drift of the decoder blocks", "Drift of the top decoder blocks"]
    labels = {title: re.findall(r"<!-- (.*?) -->", chart) for title, chart in charts.items()}
    assert {"training", "validation", "loss per token"} <= set(labels["Loss per token"])
    assert {"first sentence", "before", "after", "ROUGE-Lsum", "20.2"} <= set(labels["ROUGE"])
    assert {"frozen: 0", "decoder block"} <= set(labels["Drift of the decoder blocks"])
    assert {"block 3", "step"} <= set(labels["Drift of the top decoder blocks"])


def test_rouge_of_evaluations_becomes_a_curve(run: Path) -> None:
    write_log(run, [*LOG, {"step": 2, "eval_rougeL": 10.0}, {"step": 4, "eval_rougeL": 12.0}])
    assert "<!-- ROUGE-L -->" in page_of(run).charts()["ROUGE on the validation rows"]


def test_without_matplotlib_the_page_has_the_numbers_and_says_what_is_missing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    page = page_of(run)
    assert page.charts() == {}
    assert page.words().count("matplotlib, which draws them, is not installed (pip install 'hf_freeze[plots]')") == 3
    assert {"3.500", "20.0 [19.0, 22.0]", "0.02"} <= set(page.cells())


# ------------------------------------------------------------------------------------------------------------- safety


def test_the_page_is_well_formed_and_asks_for_nothing(run: Path) -> None:
    text = write_run_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"link", "iframe", "object", "embed", "base", "form", "image", "use", "svg"}
    asking = {"src", "srcset", "href", "action", "background", "poster", "data", "xlink:href"}
    asked = [value for _, attributes in page.elements for name, value in attributes.items() if name in asking]
    assert len(page.charts()) == 4
    assert all(str(value).startswith(("#", "data:image/svg+xml;base64,")) for value in asked)
    for chart in page.charts().values():
        assert all(address.startswith("#") for address in re.findall(r'(?:href="|url\()([^")]+)', chart))
        assert "<script" not in chart
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    style = next(text for tag, text in page.text if tag == "style")
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "img-src data:;" in policy


def test_a_review_that_holds_a_script_stays_text(run: Path) -> None:
    page = page_of(run)
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert f"Strap broke. {ATTACK}" in page.cells()
    assert f"Strap broke. {ATTACK}" in [text for tag, text in page.text if tag == "dd"]
    columns = {"</script><script>1</script>": "x", '"onclick="alert(1)': "y", "' onclick='z": "z"}
    write_rows(run, [columns])
    page = page_of(run)
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def chromium(address: str, profile: Path) -> tuple[str, str]:
    """The page as the browser has it once its scripts ran, and what the browser's console says."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "--allow-file-access-from-files", "--dump-dom"]
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_in_a_browser_the_search_finds_rows_and_nothing_of_a_review_runs(run: Path, tmp_path: Path) -> None:
    page = write_run_report(run)
    text, console = chromium(f"file://{page}#q=STRAP%20broke", tmp_path / "profile")
    assert console == ""
    shown = Page(text)
    assert ("span", "1 of 3") in shown.text
    assert [tag for tag, attributes in shown.elements if "hidden" in attributes] == ["tr", "tr"]
    assert next(text for tag, text in shown.text if tag == "title") == "some/model, partly frozen: a run"


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_in_a_browser_a_click_sorts_by_number_and_a_policy_stops_what_is_put_in_later(
    run: Path, tmp_path: Path
) -> None:
    page = write_run_report(run)
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
def test_in_a_browser_nothing_is_wider_than_the_screen(width: int, run: Path, tmp_path: Path) -> None:
    long = {**ROWS[0], "product": "x" * 300, "review": "word " * 300}
    write_rows(run, [long, *ROWS])
    page = write_run_report(run)
    outer = tmp_path / "outer.html"
    frame = f'<iframe src="{page}" style="width: {width}px; height: 900px; border: 0"></iframe><pre></pre>'
    outer.write_text(f"""{frame}<script>
    onload = () => {{
      const root = document.querySelector("iframe").contentDocument.documentElement;
      const charts = [...root.querySelectorAll("img.chart")].map(chart => chart.getBoundingClientRect().width);
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
def test_in_a_browser_a_screenshot_shows_text_and_charts(run: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    page = write_run_report(run)
    picture = tmp_path / "page.png"
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,3000"]
    subprocess.run(
        [*command, f"--screenshot={picture}", f"file://{page}"], capture_output=True, timeout=120, check=True
    )
    colours = image.open(picture).convert("RGB").getcolors(maxcolors=1 << 24)
    assert colours is not None
    assert {(0x1A, 0x1C, 0x1E), (0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)} <= {colour for _, colour in colours}


# ------------------------------------------------------------------------------------------------------------ pictures


def test_points_lie_where_they_should_and_those_that_are_not_finite_are_left_out() -> None:
    with plain_style() as pyplot:
        figure = draw_lines(pyplot, {"a": [(0, 0.0), (1, 1.0)], "b": [(1, float("nan"))]}, y_label="loss")
        assert draw_lines(pyplot, {"b": [(1, float("inf"))]}, y_label="y") is None
    (line,) = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_bars_are_as_high_as_they_should_be() -> None:
    labels = {"x_label": "block", "y_label": "drift", "below": "frozen: 0"}
    with plain_style() as pyplot:
        axes = draw_bars(pyplot, {3: 1.0, 2: 0.5, 4: float("nan")}, **labels).axes[0]
        assert draw_bars(pyplot, {}, **labels) is None
        assert not draw_bars(pyplot, {0: 1.0}, **labels).axes[0].texts, "nothing lies below block 0"
    assert [(bar.get_center()[0], bar.get_height()) for bar in axes.containers[0]] == [(2.0, 0.5), (3.0, 1.0)]
    assert [text.get_text() for text in axes.texts] == ["frozen: 0"]
    assert axes.get_xlim() == (-0.5, 3.5)


def test_intervals_reach_from_low_to_high() -> None:
    groups = {"R1": {"before": (2.0, None, None), "after": (5.0, 1.0, 10.0)}}
    with plain_style() as pyplot:
        axes = draw_intervals(pyplot, groups, x_label="F1").axes[0]
        assert draw_intervals(pyplot, {}, x_label="F1") is None
    before, after = ([bars.get_segments()[0][:, 0].tolist() for bars in c[2]] for c in axes.containers)
    assert (before, after) == ([[2.0, 2.0]], [[1.0, 10.0]])
    assert [text.get_text() for text in axes.texts] == ["2.0", "5.0"]
