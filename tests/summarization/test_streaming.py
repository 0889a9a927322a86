"""Summaries of a file: in order, in bounded memory, and the same bytes however often the run is killed."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from hf_freeze.errors import FreezeError, ResumeError, ReviewsError
from hf_freeze.summarization import streaming
from hf_freeze.summarization.data.rows import RowFiles
from hf_freeze.summarization.streaming import check_places, summarize_file
from hf_freeze.summarization.windows import Entry, cut_windows
from tests.summarization.streams import ROWS, Stopped, left, stopping_after, stream, table
from tests.tokenizer_makers import byte_level, llama_config

# ---------------------------------------------------------------------------------------------------------------------
# Rows


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl"])
def test_every_row_keeps_its_columns_and_its_place(ending: str, tmp_path: Path) -> None:
    output = tmp_path / f"out{ending}"
    report = stream(table(tmp_path / "in.csv"), output)
    assert [dict(row.values) for row in RowFiles(output)] == [
        {**row, "summary": row["review"].upper().strip()} for row in ROWS
    ]
    assert (report.rows, report.lines, report.blank, report.text_column) == (11, 11, 3, "review")
    assert left(tmp_path) == sorted(["in.csv", output.name])


def test_texts_are_handed_out_a_window_at_a_time_without_blank_ones(tmp_path: Path) -> None:
    calls: list[list[str]] = []
    stream(ROWS, tmp_path / "out.csv", lambda texts: calls.append(list(texts)) or list(texts))
    assert calls == [["text 1", "text 2"], ["text 3", "text 5"], ["text 6", "text 7"], ["text 9", "text 10"]]


def test_a_window_of_books_ends_before_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("hf_freeze.summarization.windows.WINDOW_CHARACTERS", 100)
    sizes: list[int] = []
    rows = [{"review": "x" * size} for size in (60, 60, 10, 300, 10)]
    stream(rows, tmp_path / "out.csv", lambda texts: sizes.append(len(texts)) or list(texts), window_rows=512)
    assert sizes == [2, 2, 1]


def test_eight_times_the_rows_take_no_more_memory(tmp_path: Path) -> None:
    def rows(count: int) -> Iterator[dict[str, str]]:
        return ({"id": str(number), "review": f"review {number} " + "x" * 200} for number in range(count))

    peaks = []
    for count in (1_000, 8_000):
        tracemalloc.start()
        assert stream(rows(count), tmp_path / f"{count}.jsonl", window_rows=256).rows == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000, "200 bytes a row would be 1.4 MB more"


def test_a_broken_last_row_stops_the_run_before_anything_is_summarised(tmp_path: Path) -> None:
    path = table(tmp_path / "in.csv")
    path.write_text(path.read_text() + "11,p1\n")
    with pytest.raises(ReviewsError, match=r"in\.csv, line 13 has 2 cells"):
        stream(path, tmp_path / "out.csv", stopping_after(0))
    assert left(tmp_path) == ["in.csv"]


def test_a_column_that_json_lines_bring_later_is_in_the_table_from_its_header_on(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"review": "a"}\n' * 5 + '{"review": "b", "id": 7}\n')
    stream(path, tmp_path / "out.csv")
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert (lines[0], lines[1], lines[6]) == ("review,id,summary", "a,,A", "b,7,B")
    path.write_text('{"review": "a"}\n{"review": "b", "summary": "old"}\n')
    with pytest.raises(ReviewsError, match="'summary', which the input has already"):
        stream(path, tmp_path / "other.jsonl", stopping_after(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": "reviw"}, r"text_column='reviw' was asked for.*nearest: 'review'"),
        ({"group_by": "produkt"}, r"group_by='produkt' was asked for.*nearest: 'product'"),
        ({"summary_column": "id"}, r"column 'id', which the input has already"),
        ({"window_rows": 0}, r"window_rows=0 was asked for; it is a whole number, 1 or more"),
    ],
)
def test_a_wrong_option_is_named_with_the_nearest_valid_one(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = table(tmp_path / "in.csv")
    with pytest.raises(FreezeError, match=message):
        stream(path, tmp_path / "out.csv", stopping_after(0), **options)
    if "window_rows" not in options:
        with pytest.raises(FreezeError, match=message):
            check_places(path, tmp_path / "out.csv", **options)
    assert left(tmp_path) == ["in.csv"]


def test_a_column_that_no_json_line_has_is_named_after_the_check(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"review": "a"}\n{"review": "b", "body": "c"}\n')
    with pytest.raises(ReviewsError, match=r"text_column='bod' was asked for.*nearest: 'body'"):
        stream(path, tmp_path / "out.csv", stopping_after(0), text_column="bod")
    stream(path, tmp_path / "out.csv", text_column="body")
    assert (tmp_path / "out.csv").read_text().splitlines()[2] == "b,c,C"


def test_a_cell_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"review": "a"}\n{"review": 7}\n')
    with pytest.raises(ReviewsError, match=r"line 2 holds a number in column 'review'"):
        stream(path, tmp_path / "out.csv", stopping_after(0))


def test_the_input_is_never_written_over(tmp_path: Path) -> None:
    path = table(tmp_path / "in.csv")
    before = path.read_bytes()
    (tmp_path / "link.csv").symlink_to(path)
    for output in (path, tmp_path / "link.csv", tmp_path / "sub" / ".." / "in.csv"):
        (tmp_path / "sub").mkdir(exist_ok=True)
        with pytest.raises(FreezeError, match="which is the input"):
            stream(path, output)
        with pytest.raises(FreezeError, match="which is the input"):
            check_places(path, output)
    with pytest.raises(FreezeError, match="which lies in the input"):
        stream(tmp_path, tmp_path / "out.csv")
    assert path.read_bytes() == before


def test_a_file_that_is_there_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "out.csv").write_text("mine")
    with pytest.raises(FreezeError, match="exists already"):
        stream(table(tmp_path / "in.csv"), tmp_path / "out.csv")
    with pytest.raises(FreezeError, match="exists already"):
        check_places(tmp_path / "in.csv", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "mine"


@pytest.mark.parametrize(("content", "message"), [("", "is empty"), ("id,review\n", "has no rows")])
def test_a_file_without_rows_is_an_error_and_leaves_nothing(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(content)
    with pytest.raises(ReviewsError, match=message):
        stream(tmp_path / "in.csv", tmp_path / "out.csv")
    assert left(tmp_path) == ["in.csv"]


def test_another_number_of_summaries_than_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FreezeError, match="given 2 texts and returned 1 summaries"):
        stream(table(tmp_path / "in.csv"), tmp_path / "out.csv", lambda texts: ["one"])


def test_a_folder_that_is_missing_is_made(tmp_path: Path) -> None:
    stream(ROWS, tmp_path / "a" / "b" / "out.csv")
    assert left(tmp_path / "a" / "b") == ["out.csv"]


# ---------------------------------------------------------------------------------------------------------------------
# Groups


def test_each_group_gets_one_line_in_the_order_of_first_rows(tmp_path: Path) -> None:
    report = stream(table(tmp_path / "in.csv"), tmp_path / "out.csv", group_by="product", window_rows=100)
    assert (tmp_path / "out.csv").read_text().splitlines() == [
        "product,review_count,summary",
        "p0,3,TEXT 3/TEXT 6/TEXT 9",
        "p1,3,TEXT 1/TEXT 7/TEXT 10",
        "p2,2,TEXT 2/TEXT 5",
    ]
    assert (report.rows, report.lines, report.blank) == (11, 3, 0)
    assert left(tmp_path) == ["in.csv", "out.csv"], "the store is gone"


def test_a_group_of_blank_reviews_keeps_its_line(tmp_path: Path) -> None:
    rows = [{"product": "p", "review": " "}, {"product": "q", "review": "a"}, {"product": "p", "review": ""}]
    report = stream(rows, tmp_path / "out.csv", group_by="product")
    assert (tmp_path / "out.csv").read_text() == "product,review_count,summary\np,0,\nq,1,A\n"
    assert report.blank == 1


@pytest.mark.parametrize("window_rows", [1, 2, 3, 4, 7, 100])
def test_a_group_larger_than_a_window_loses_no_review(window_rows: int, tmp_path: Path) -> None:
    rows = [{"product": "ab"[n in (0, 4, 5)], "review": f"r{n}"} for n in range(12)]
    stream(rows, tmp_path / "out.csv", lambda texts: [t.replace("\n", " ") for t in texts], group_by="product",
           window_rows=window_rows)  # fmt: skip
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[1:] == ["b,3,r0 r4 r5", "a,9," + " ".join(f"r{n}" for n in range(12) if n not in (0, 4, 5))]


def test_windows_of_groups_begin_at_the_same_places_wherever_a_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_freeze.summarization.windows.WINDOW_CHARACTERS", 100)
    sizes = [("a", 10), ("b", 150), ("b", 10), ("b", 60), ("b", 60), ("c", 10), ("c", 99), ("d", 1), ("e", 1), ("f", 1)]
    entries = [Entry(group, "x" * size) for group, size in sizes]
    windows = list(cut_windows(entries, 3))
    assert [entry for window, _ in windows for entry in window] == entries
    begin = 0
    for number, (window, _) in enumerate(windows):
        assert list(cut_windows(entries[begin:], 3)) == windows[number:]
        begin += len(window)


def test_a_row_without_a_group_is_named_before_anything_is_summarised(tmp_path: Path) -> None:
    path = table(tmp_path / "in.csv", [*ROWS, {"id": "11", "product": " ", "review": "a"}])
    with pytest.raises(ReviewsError, match=r"in\.csv, line 13 has nothing in column 'product'"):
        stream(path, tmp_path / "out.csv", stopping_after(0), group_by="product")
    assert left(tmp_path) == ["in.csv"]


def test_a_group_column_of_the_name_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReviewsError, match="the output has a column of that name"):
        stream([{"review_count": "1", "review": "a"}], tmp_path / "out.csv", group_by="review_count")


# ---------------------------------------------------------------------------------------------------------------------
# With a model


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    tokenizer = byte_level(["</s>", "<pad>"], eos_token="</s>", pad_token="<pad>")
    return LlamaForCausalLM(llama_config(eos_token_id=0, pad_token_id=1)), tokenizer


def test_a_file_gets_the_summaries_of_generate_summaries_and_goes_on_after_a_stop(
    tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 3, "progress": False, "window_rows": 4, "batch_size": 2}
    source = table(tmp_path / "in.csv")
    report = summarize_file(*tiny, source, tmp_path / "whole.jsonl", **options)
    assert report.to_dict()["output"] == str(tmp_path / "whole.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in ROWS[0]} for row in rows] == ROWS
    assert [bool(row["review"].strip()) for row in rows] == [bool(row["summary"]) for row in rows]

    made = streaming.generate_summaries
    calls = 0

    def stopping(*args: Any, **given: Any) -> list[str]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Stopped
        return made(*args, **given)

    monkeypatch.setattr(streaming, "generate_summaries", stopping)
    with pytest.raises(Stopped):
        summarize_file(*tiny, source, tmp_path / "out.jsonl", **options)
    assert summarize_file(*tiny, source, tmp_path / "out.jsonl", **options).rows_before == 4
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_another_model_does_not_go_on_from_this_one(
    tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny
    options: dict[str, Any] = {"progress": False, "window_rows": 4}
    made = streaming.generate_summaries
    stopping = iter([False, True])
    monkeypatch.setattr(
        streaming, "generate_summaries", lambda *a, **g: [t[:2] for t in a[2]] if not next(stopping) else made(None)
    )
    with pytest.raises(TypeError):
        summarize_file(model, tokenizer, ROWS, tmp_path / "out.csv", **options)
    other = LlamaForCausalLM(llama_config(eos_token_id=0, pad_token_id=1))
    with pytest.raises(ResumeError, match="its model was"):
        summarize_file(other, tokenizer, ROWS, tmp_path / "out.csv", **options)
    with pytest.raises(ResumeError, match="its num_beams was 1, and 2"):
        summarize_file(model, tokenizer, ROWS, tmp_path / "out.csv", num_beams=2, **options)


def test_groups_that_a_model_cannot_take_whole_are_summarised_in_parts(
    tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_freeze.summarization.prompts import read_prompt

    model, tokenizer = tiny
    prompt = read_prompt(tokenizer, model.config, max_source_tokens=80, max_summary_tokens=4)
    lengths: list[int] = []

    def short(model: Any, tokenizer: Any, texts: Sequence[str], **given: Any) -> list[str]:
        lengths.extend(len(text.splitlines()) for text in texts)
        return [text.split()[0] for text in texts]

    monkeypatch.setattr(streaming, "generate_summaries", short)
    rows = [{"product": "p", "review": f"w{n} " + "zq " * 12} for n in range(6)]
    report = summarize_file(
        model, tokenizer, rows, tmp_path / "out.csv", prompt=prompt, group_by="product", progress=False
    )
    assert (report.rows, report.lines) == (6, 1)
    assert len(lengths) > 2
    assert lengths[-1] > 1, "the last one is a summary of summaries"
    assert (tmp_path / "out.csv").read_text().splitlines()[1] == "p,6,w0"
