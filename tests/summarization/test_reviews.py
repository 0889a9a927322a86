from __future__ import annotations

import csv
import errno
import itertools
import json
import os
import socket
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_freeze.errors import ReviewsError
from hf_freeze.summarization.data.reviews import Reviews, overlap, read_reviews, read_splits

PAIRS = [("Warm but itchy.", "Warm, itchy"), ("Broke in a week.", "Broke"), ("Fits, and looks good.", "Good fit")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the tests out of the user's cache, and reads fresh."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_pairs(path: Path, pairs: list[tuple[Any, Any]], names: tuple[str, str] = ("review", "summary")) -> Path:
    """The same rows in the format of the ending."""
    rows = [dict(zip(names, pair, strict=True)) for pair in pairs]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([names, *pairs])
    else:
        write_rows(path, rows)
    return path


def pairs_of(reviews: Reviews) -> list[tuple[str, str]]:
    return [(row["review"], row["summary"]) for row in reviews.dataset]


# --------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "ndjson", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    pairs = [*PAIRS, ('He said "no",\nthen\tleft.', "é, ü and 鞋"), ("NA", "None"), ("12345", "007"), ("true", "1.50")]
    reviews = read_reviews(write_pairs(tmp_path / f"reviews.{ending}", pairs))
    assert pairs_of(reviews) == pairs
    assert reviews.dataset["row"][:] == list(range(1, len(pairs) + 1))
    assert (reviews.rows_read, len(reviews), reviews.skipped) == (len(pairs), len(pairs), {})


@pytest.mark.parametrize("separator", ["\t", ";", ","])
def test_the_header_line_tells_the_separator_of_a_csv(tmp_path: Path, separator: str) -> None:
    path = write(tmp_path / "r.csv", f"id{separator}review{separator}summary\n1{separator}Warm{separator}Good\n")
    assert read_reviews(path).dataset[0] == {"review": "Warm", "summary": "Good", "row": 1, "id": "1"}


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path, ending: str) -> None:
    path = write_pairs(tmp_path / f"r.{ending}", PAIRS)
    write(path, b"\xef\xbb\xbf" + path.read_bytes())
    assert pairs_of(read_reviews(path)) == PAIRS


def test_other_columns_stay_as_they_are(tmp_path: Path) -> None:
    rows = [{"review": r, "rating": 4, "tags": ["a", "b"], "summary": s, "price": 2.5} for r, s in PAIRS]
    reviews = read_reviews(write_rows(tmp_path / "r.jsonl", rows))
    assert reviews.dataset.column_names == ["review", "summary", "row", "rating", "tags", "price"]
    assert [{k: row[k] for k in rows[0]} for row in reviews.dataset] == rows


def test_all_csv_columns_stay_text_as_they_are_written(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", "review,summary,zip,stars,\nWarm,Good,00501,4.50,x\nNull,n/a,,NaN,\n")
    dataset = read_reviews(path).dataset
    assert dataset[0] == {
        "review": "Warm", "summary": "Good", "row": 1, "zip": "00501", "stars": "4.50", "column 5": "x",
    }  # fmt: skip
    assert dataset[1] == {"review": "Null", "summary": "n/a", "row": 2, "zip": "", "stars": "NaN", "column 5": ""}


def test_a_late_value_of_another_type_does_not_stop_a_csv(tmp_path: Path) -> None:
    # `datasets` parses 10,000 rows at a time, and would take the types of the first ones
    rows = [f"review {n},summary {n},{n}\n" for n in range(10_001)]
    reviews = read_reviews(write(tmp_path / "r.csv", "review,summary,stars\n" + "".join(rows) + "last,one,none\n"))
    assert len(reviews) == 10_002
    assert reviews.dataset[-1]["stars"] == "none"


def test_rows_without_a_key_of_other_rows_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", '{"review": "Warm"}\n\n{"review": "Cold", "summary": "Bad"}\n')
    reviews = read_reviews(path)
    assert pairs_of(reviews) == [("Cold", "Bad")]
    assert reviews.skipped == {"missing summary": [1]}


@pytest.mark.parametrize("name", ["a[1].csv", "b*.jsonl", "c, d?.parquet", "100%.tsv", "sub.dir/__e f.csv"])
def test_a_name_with_pattern_signs_means_that_one_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub.dir").mkdir()
    assert pairs_of(read_reviews(write_pairs(tmp_path / name, PAIRS))) == PAIRS


def test_a_folder_is_read_in_sorted_order_and_names_what_it_ignores(tmp_path: Path) -> None:
    write_pairs(tmp_path / "b.jsonl", PAIRS[2:])
    write_pairs(tmp_path / "a.jsonl", PAIRS[:2])
    write(tmp_path / "README.md", "about")
    write(tmp_path / ".hidden.csv", "x")
    reviews = read_reviews(tmp_path)
    assert pairs_of(reviews) == PAIRS
    assert reviews.dataset["row"][:] == [1, 2, 3]
    assert reviews.notes == ("ignored in the folder: README.md",)


def test_another_path_with_the_same_rows_and_a_relative_one_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(tmp_path / "r.csv", PAIRS)
    monkeypatch.chdir(tmp_path)
    assert pairs_of(read_reviews("r.csv")) == pairs_of(read_reviews(Path("./r.csv"))) == PAIRS


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_changed_file_is_read_again_even_at_the_same_size_and_time(tmp_path: Path, ending: str) -> None:
    path = write_pairs(tmp_path / f"r.{ending}", [("Good shoes.", "Good")])
    assert pairs_of(read_reviews(path)) == [("Good shoes.", "Good")]
    before = path.stat()
    write_pairs(path, [("Evil shoes.", "Evil")])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert pairs_of(read_reviews(path)) == [("Evil shoes.", "Evil")]


def test_reading_shows_no_bars_and_leaves_the_switch_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    datasets.enable_progress_bars()
    read_reviews(write_pairs(tmp_path / "r.csv", PAIRS))
    assert capfd.readouterr() == ("", "")
    assert not datasets.utils.are_progress_bars_disabled()


def test_reading_files_asks_nothing_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*where: object, **_: object) -> None:
        asked.append(where)  # `datasets` swallows the error
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for ending in ("csv", "jsonl", "parquet"):
        read_reviews(write_pairs(tmp_path / f"r.{ending}", PAIRS))
    assert asked == []


CELLS = st.text(st.sampled_from("ab ,;\t\"\n\r'\\é"), max_size=6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=5), st.sampled_from([".csv", ".tsv"]))
def test_any_cell_survives_a_table(tmp_path: Path, cells: list[tuple[str, str, str]], ending: str) -> None:
    path = tmp_path / f"r{ending}"
    rows = [("Warm" + review, "Good" + summary, other) for review, summary, other in cells]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if ending == ".tsv" else ",", quoting=csv.QUOTE_ALL)
        writer.writerows([("review", "summary", "other"), *rows])
    reviews = read_reviews(path)
    assert reviews.rows_read == len(rows)
    unique = list({row[:2]: row for row in reversed(rows)}.values())
    expected = [row for n, row in enumerate(rows) if row in unique and row[:2] not in [r[:2] for r in rows[:n]]]
    assert [(r["review"], r["summary"], r["other"]) for r in reviews.dataset] == expected


# --------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    ("columns", "text", "summary"),
    [
        (["id", "Review Text", "Title"], "Review Text", "Title"),
        (["reviewText", "summary", "overall"], "reviewText", "summary"),
        (["title", "text", "SUMMARY"], "text", "SUMMARY"),
        (["article", "highlights"], "article", "highlights"),
        (["comment", "review", "headline"], "review", "headline"),
        (["document", "target"], "document", "target"),
    ],
)
def test_columns_are_guessed_from_known_names_in_order(
    tmp_path: Path, columns: list[str], text: str, summary: str
) -> None:
    path = write(tmp_path / "r.csv", f"{','.join(columns)}\n{','.join(f'a {name}' for name in columns)}\n")
    reviews = read_reviews(path)
    assert (reviews.text_column, reviews.summary_column) == (text, summary)
    assert pairs_of(reviews) == [(f"a {text}", f"a {summary}")]
    assert reviews.column_reason == (
        f"review from column {text!r} (guessed from its name), summary from column {summary!r} (guessed from its name)"
    )


def test_given_columns_win_and_are_not_guessed_for_the_other(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [{"review": "r", "text": "t", "title": "h", "note": "n"}])
    assert pairs_of(read_reviews(path, text_column="note")) == [("n", "h")]
    assert pairs_of(read_reviews(path, summary_column="review")) == [("t", "r")]
    reason = read_reviews(path, text_column="note").column_reason
    assert reason == "review from column 'note' (as asked), summary from column 'title' (guessed from its name)"


def test_a_column_whose_name_we_need_is_kept_under_another_and_said(tmp_path: Path) -> None:
    row = {"review": "5 stars", "summary": "long text", "row": 9, "source_row": 8, "head": "h"}
    reviews = read_reviews(write_rows(tmp_path / "r.jsonl", [row]), text_column="summary", summary_column="head")
    assert reviews.dataset[0] == {
        "review": "long text", "summary": "h", "row": 1,
        "source_review": "5 stars", "source_source_row": 9, "source_row": 8,
    }  # fmt: skip
    assert reviews.notes[:2] == (
        "column 'review' is kept as 'source_review'",
        "column 'row' is kept as 'source_source_row'",
    )


def test_columns_that_bear_each_others_names_are_exchanged(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "r.csv", [("short", "the long text")])
    reviews = read_reviews(path, text_column="summary", summary_column="review")
    assert pairs_of(reviews) == [("the long text", "short")]


def test_summaries_may_be_missing_where_they_are_not_needed(tmp_path: Path) -> None:
    bare = read_reviews(write(tmp_path / "a.csv", "text\nWarm coat\n"), need_summaries=False)
    assert bare.dataset[:] == {"review": ["Warm coat"], "row": [1]}
    assert bare.summary_column is None
    assert bare.column_reason.endswith("no column of summaries")
    some = read_reviews(write_pairs(tmp_path / "b.csv", [("Warm", ""), ("Cold", "Bad")]), need_summaries=False)
    assert pairs_of(some) == [("Warm", ""), ("Cold", "Bad")]


def test_a_wrong_column_lists_what_there_is_and_the_nearest(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [{"review_body": "a", "headline": "b"}])
    with pytest.raises(
        ReviewsError,
        match=r"text_column='review_bdy' .* It has 'review_body', 'headline'; nearest: 'review_body'\.",
    ):
        read_reviews(path, text_column="review_bdy")
    with pytest.raises(ReviewsError, match=r"summary_column='head' was asked for"):
        read_reviews(path, text_column="review_body", summary_column="head")


def test_columns_that_cannot_be_guessed_are_an_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [{"colour": "red", "text": "a"}, {"text": "b"}])
    with pytest.raises(ReviewsError, match=r"known to hold the summary .* 'colour', 'text': .* --summary_column"):
        read_reviews(path)
    with pytest.raises(ReviewsError, match=r"known to hold the review .* 'colour', 'text': .* --text_column"):
        read_reviews(path, summary_column="text")


def test_one_column_for_both_is_an_error(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "r.csv", PAIRS)
    with pytest.raises(ReviewsError, match="are both 'review'"):
        read_reviews(path, text_column="review", summary_column="review")


def test_a_column_that_is_not_text_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [{"review": "a", "title": "b"}, {"review": 5, "title": "c"}])
    with pytest.raises(
        ReviewsError, match=r"r\.jsonl, line 2 holds a number in column 'review', and a text is expected: 5"
    ):
        read_reviews(path)
    table = write_pairs(tmp_path / "r.parquet", [("Warm", 5)])
    with pytest.raises(
        ReviewsError, match=r"r\.parquet, row 1 holds a number in column 'summary', and a text is expected"
    ):
        read_reviews(table)


def test_a_column_of_the_hub_that_is_not_text_is_an_error_with_its_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    numbers = datasets.Dataset.from_dict({"text": ["Warm"], "title": [5]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: numbers)
    with pytest.raises(ReviewsError, match=r"Column 'title' .* not hold text: its type is int64"):
        read_reviews("someone/reviews")


def test_dates_in_the_place_of_text_are_not_reworded(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "r.jsonl", [{"review": "2020-01-01", "summary": "a day", "on": "2020-01-01T00:00:00Z"}]
    )
    row = {"review": "2020-01-01", "summary": "a day", "row": 1, "on": "2020-01-01T00:00:00Z"}
    assert read_reviews(path).dataset[0] == row


# ----------------------------------------------------------------------------------------- skipped and noted


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_rows_that_cannot_be_used_are_skipped_by_name_and_number(tmp_path: Path, ending: str) -> None:
    nothing = "" if ending == "csv" else None
    pairs = [*PAIRS, (nothing, "Lost"), PAIRS[0], ("  \n", "Lost"), ("Warm", nothing), ("Warm", " "), ("Warm", "Ok")]
    reviews = read_reviews(write_pairs(tmp_path / f"r.{ending}", pairs))
    assert reviews.skipped == {"empty review": [4, 6], "missing summary": [7, 8], "duplicate row": [5]}
    assert pairs_of(reviews) == [*PAIRS, ("Warm", "Ok")]
    assert reviews.dataset["row"][:] == [1, 2, 3, 9]
    assert reviews.rows_read == 9


def test_the_same_review_with_another_summary_is_no_duplicate(tmp_path: Path) -> None:
    pairs = [("ab", "c"), ("a", "bc"), ("ab", "d")]  # the first two read alike when joined
    reviews = read_reviews(write_pairs(tmp_path / "r.csv", pairs))
    assert pairs_of(reviews) == pairs


def test_one_word_and_very_long_reviews_are_kept_and_noted(tmp_path: Path) -> None:
    long = "warm socks " * 18_000  # 198,000 characters: beyond Python's own limit for a CSV field
    pairs = [("Good", "a"), (long, "b"), ("Two words", "c"), ("Bad", "d")]
    reviews = read_reviews(write_pairs(tmp_path / "r.csv", pairs))
    assert pairs_of(reviews) == pairs
    assert reviews.notes == (
        "kept: 2 reviews of one word (rows 1, 4)",
        "kept: 1 review of over 20,000 characters (row 2)",
    )
    assert csv.field_size_limit() < 198_000


def test_the_account_says_source_rows_columns_skips_and_notes(tmp_path: Path) -> None:
    pairs = [("Fine socks", f"s{n}") for n in range(8)] + [("", "x")] * 7 + [("Fine socks", "s0"), ("Ok", "y")]
    path = write_pairs(tmp_path / "r.csv", pairs, names=("text", "title"))
    assert str(read_reviews(path)) == (
        f"{path}: 17 rows read, 9 usable\n"
        "  review from column 'text' (guessed from its name), summary from column 'title' (guessed from its name)\n"
        "  7 rows skipped: empty review (rows 9, 10, 11, 12, 13, ...)\n"
        "  1 row skipped: duplicate row (row 16)\n"
        "  note: kept: 1 review of one word (row 17)"
    )


# --------------------------------------------------------------------------------------------------- bad files


def test_a_missing_file_names_the_nearest_in_its_folder(tmp_path: Path) -> None:
    write_pairs(tmp_path / "reviews_train.csv", PAIRS)
    write(tmp_path / "notes.txt", "")
    with pytest.raises(ReviewsError, match=r"No file or folder .*reviews_trian\.csv: .* holds 'reviews_train\.csv'"):
        read_reviews(tmp_path / "reviews_trian.csv")
    with pytest.raises(ReviewsError, match=r"there is no folder .*nowhere"):
        read_reviews(tmp_path / "nowhere" / "r.csv")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ReviewsError, match=r"the folder .*bare is empty"):
        read_reviews(tmp_path / "bare" / "r.csv")


@pytest.mark.parametrize("source", ["csv", "reviews", "some/reviews.csv", "a/b/c"])
def test_what_cannot_be_a_hub_id_is_not_asked_of_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ReviewsError, match=f"No file or folder {source}: .*Check the path"):
        read_reviews(source)


def test_a_hub_id_that_cannot_be_reached_says_that_no_such_path_exists_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ReviewsError,
        match=r"No file or folder someone/reviews .* hub dataset 'someone/reviews' could not be loaded at "
        r"split 'train' \(.*(?i:offline).*\)\. Check",
    ):
        read_reviews("someone/reviews")


def test_a_hub_dataset_is_read_at_the_split_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(source: str, split: str) -> datasets.Dataset:
        asked.append((source, split))
        return datasets.Dataset.from_dict({"text": ["Warm"], "title": [f"in {split}"], "stars": [5]})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    reviews = read_reviews("someone/reviews", split="dev")
    assert reviews.dataset[0] == {"review": "Warm", "summary": "in dev", "row": 1, "stars": 5}
    read_reviews("someone/reviews")
    assert asked == [("someone/reviews", "dev"), ("someone/reviews", "train")]


def test_a_split_of_a_local_source_is_an_error(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "r.csv", PAIRS)
    with pytest.raises(ReviewsError, match=r"split='test' of .* local source, which has no splits"):
        read_reviews(path, split="test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.csv", "", r"r\.csv is empty \(0 bytes\)"),
        ("r.parquet", "", r"r\.parquet is empty \(0 bytes\)"),
        ("r.csv", "\n \n", r"r\.csv is empty \(blank lines only\)"),
        ("r.csv", "review,summary\n\n", r"r\.csv has no rows"),
        ("r.jsonl", "\n\n", r"r\.jsonl is empty \(blank lines only\)"),
        ("r.csv", "review,summary\n,a\nb,\n", r"(?s)No usable row; needed is a review and a summary.*\(row 1\)"),
        ("r.xlsx", "PK", r"ends in '\.xlsx', .* It reads \.csv, \.tsv, \.jsonl, \.ndjson, \.json, \.parquet"),
        ("r.csv", "review,summary\nok,ok\na,b,c\n", r"line 3 has 3 cells, but the header has 2: 'a,b,c'"),
        ("r.csv", 'review,summary\n"a\nb",ok\na,b,"c\nd"\n', r"line 4 has 3 cells"),
        ("r.csv", 'review,summary\nok,ok\n"a,b\nc,d\n', r"row that begins at line 3 is broken .* never closed"),
        ("r.csv", "review,summary\nok,ok\na\n", r"line 3 has 1 cells, .* empty ones too: it has none for 'summary'"),
        ("r.csv", "review,summary\na\0,b\n", r"line 2 holds a NUL: .*Save it as UTF-8"),
        ("r.csv", "review,summary,review\na,b,c\n", r"header names 'review' more than once"),
        ("r.jsonl", '{"review": "a"}\n\n{"review": \n', r"line 3 is not JSON \(.*\): '\{\"review\":'\. Each line"),
        ("r.jsonl", '{"review": "a"} {"review": "b"}\n', r"line 1 is not JSON"),
        ("r.json", '[{"review": "a"}]', r"line 1 is an array, not an object: .* one JSON object"),
        ("r.jsonl", '"a review"\n', r"line 1 is a string, not an object"),
        ("r.jsonl", "true\n", r"line 1 is a truth value, not an object"),
        ("r.jsonl", '{"review": "a \\ud83d", "summary": "b"}\n', r"line 1 holds half a character \('\\ud83d'\)"),
        ("r.jsonl", '{"review": "a", "review": "b", "summary": "c"}\n', r"line 1 names 'review' more than once"),
        ("r.jsonl", '{"review": "a", "n": {"x": 1, "x": 2}}\n', r"line 1 names 'x' more than once"),
        ("r.jsonl", '{"review": "a", "n": NaN}\n', r"line 1 is not JSON \(NaN is no JSON"),
        ("r.parquet", "PAR1 not at all", r"r\.parquet is not a Parquet file, or its metadata is damaged \("),
    ],
)
def test_a_file_that_cannot_be_read_says_where_and_what_to_do(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(ReviewsError, match=message):
        read_reviews(write(tmp_path / name, content))


@pytest.mark.parametrize("before", [0, 20, (1 << 20) - 9, 1 << 20, 3_000_000])
def test_bytes_that_are_not_utf8_are_named_by_offset_and_line(tmp_path: Path, before: int) -> None:
    head = b"review,summary\n" + b"a,b\n" * (before // 4) + b"a,caf"
    path = write(tmp_path / "r.csv", head + b"\xe9\nc,d\n")
    line = head.count(b"\n") + 1
    with pytest.raises(ReviewsError, match=rf"not UTF-8: byte 0xe9 at offset {len(head)} \(line {line}\)"):
        read_reviews(path)


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_a_character_cut_by_the_end_of_a_chunk_or_of_the_file_is_told_apart(tmp_path: Path, shift: int) -> None:
    head = b"review,summary\nWarm," + b"x" * ((1 << 20) - 20 - shift)
    assert len(head) == (1 << 20) - shift
    whole = read_reviews(write(tmp_path / "r.csv", head + "👟 shoes\n".encode()))
    assert whole.dataset[0]["summary"].endswith("x👟 shoes")
    with pytest.raises(ReviewsError, match=rf"byte 0xf0 at offset {len(head)} \(line 2\)"):
        read_reviews(write(tmp_path / "cut.csv", head + "👟".encode()[:3]))
    with pytest.raises(ReviewsError, match=rf"byte 0xf0 at offset {len(head)} \(line 2\)"):
        read_reviews(write(tmp_path / "broken.csv", head + "👟".encode()[:3] + b"\n,\n"))


def test_utf16_is_named_at_its_first_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", "review,summary\na,b\n".encode("utf-16"))
    with pytest.raises(ReviewsError, match=r"byte 0xff at offset 0 \(line 1\)\. Save it as UTF-8"):
        read_reviews(path)


def test_a_folder_that_cannot_be_read_as_one_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReviewsError, match=r"empty is a folder without a file .* it holds no files\. .*\.csv, \.tsv"):
        read_reviews(tmp_path / "empty")
    write(tmp_path / "other" / "a.txt", "x")
    with pytest.raises(ReviewsError, match=r"it holds a\.txt"):
        read_reviews(tmp_path / "other")
    write(tmp_path / "mixed" / "a.csv", "review,summary\na,b\n")
    write(tmp_path / "mixed" / "b.jsonl", '{"review": "a"}\n')
    with pytest.raises(ReviewsError, match=r"mixes formats \(CSV: a\.csv; JSON lines: b\.jsonl\)"):
        read_reviews(tmp_path / "mixed")
    write(tmp_path / "unlike" / "a.csv", "review,summary\na,b\n")
    write(tmp_path / "unlike" / "b.csv", "review,title\na,b\n")
    with pytest.raises(ReviewsError, match=r"b\.csv has the columns \['review', 'title'\] .* must agree"):
        read_reviews(tmp_path / "unlike")


def test_a_column_of_two_types_names_both_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(datasets, "Json", raising=False)  # of which versions before 4.7 have none
    write_rows(tmp_path / "1.jsonl", [{"review": "a", "n": None}, {"review": "b", "n": 1}])
    write_rows(tmp_path / "2.jsonl", [{"review": "c", "n": "d"}])
    message = r"column 'n' holds a number \(.*1\.jsonl, line 2\) and a string \(.*2\.jsonl, line 1\)\. All rows must"
    with pytest.raises(ReviewsError, match=message):
        read_reviews(tmp_path, need_summaries=False)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1)
    | st.integers(-9999, 9999).map(lambda number: number / 8)  # of a longer one `datasets` may round the last digit
    | st.text("ab1-é👟\n", max_size=8) | st.sampled_from(["2020-01-01", "NA", "007"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=5,
)  # fmt: skip


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="columns of several kinds need datasets 4.7")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    others=st.lists(st.dictionaries(st.sampled_from("xy"), JSON_VALUES), min_size=1, max_size=4),
    batch=st.integers(1, 3),
)
def test_any_value_of_json_comes_back_as_it_is(
    others: list[dict[str, Any]], batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_freeze.summarization.data.arrow.BATCH", batch)
    path = write_rows(tmp_path / "r.jsonl", [{"review": f"2020-01-0{n}", **row} for n, row in enumerate(others)])
    path.write_bytes(path.read_bytes() + b"\n" * batch)  # another file for another batch
    rows = read_reviews(path, need_summaries=False).dataset
    assert rows["review"][:] == [f"2020-01-0{n}" for n in range(len(others))]
    for name in rows.column_names[2:]:
        assert rows[name][:] == [row.get(name) for row in others]


def test_a_number_that_no_data_set_holds_is_a_sentence(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [{"review": "a", "n": 2**70}])
    with pytest.raises(ReviewsError, match=r"r\.jsonl could not be read as JSON lines: .*too large"):
        read_reviews(path, need_summaries=False)


def test_a_pipe_a_device_and_a_link_that_leads_nowhere_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "link.csv").symlink_to(tmp_path / "gone.csv")
    within = write(tmp_path / "within" / "a.csv", "review\na\n").parent
    for name, message in (
        ("pipe.csv", "neither a file nor a folder"),
        ("link.csv", r"a link to .*gone\.csv, which is not"),
    ):
        with pytest.raises(ReviewsError, match=message):
            read_reviews(tmp_path / name, need_summaries=False)
        (tmp_path / name).rename(within / name)
        with pytest.raises(ReviewsError, match=rf"within holds {name}, which is no file"):
            read_reviews(within, need_summaries=False)
        (within / name).unlink()
    with pytest.raises(ReviewsError, match="neither a file nor a folder"):
        read_reviews("/dev/null")


def test_what_a_folder_holds_beside_its_files_is_named(tmp_path: Path) -> None:
    for name in ("a.csv", "notes.txt", "old/b.csv"):
        write(tmp_path / name, "review\na\n")
    assert read_reviews(tmp_path, need_summaries=False).notes[0] == "ignored in the folder: notes.txt, old"


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_file_that_goes_away_or_may_not_be_read_is_a_sentence(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pairs(tmp_path / f"r.{ending}", PAIRS)
    opened, calls, refused = Path.open, itertools.count(), -1

    def open_or_refuse(self: Path, *args: Any, **options: Any) -> Any:
        if self == path and next(calls) == refused:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", open_or_refuse)
    assert len(read_reviews(path)) == len(PAIRS)
    times = next(calls)
    assert times > 1
    for refused in range(times):  # the first time that it is opened, the second time, and so on
        calls = itertools.count()
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / str(refused))
        with pytest.raises(ReviewsError, match=rf"r\.{ending} could not be read: Permission denied\. It must stay"):
            read_reviews(path)


# ------------------------------------------------------------------------------------------------------ splits


def many(path: Path, count: int, start: int = 0) -> Path:
    return write_pairs(path, [(f"Review number {n}", f"Number {n}") for n in range(start, start + count)])


def test_given_splits_are_read_as_they_are(tmp_path: Path) -> None:
    paths = [many(tmp_path / f"{n}.csv", 4, start=10 * n) for n in range(3)]
    splits = read_splits(*paths)
    assert list(splits) == ["train", "validation", "test"]
    assert [len(reviews) for reviews in splits.values()] == [4, 4, 4]
    assert all(reviews.notes == () for reviews in splits.values())


@pytest.mark.parametrize(("rows", "aside"), [(2, 1), (19, 1), (25, 2), (10_500, 1_000)])
def test_a_tenth_of_train_is_set_aside_where_no_validation_is_given(tmp_path: Path, rows: int, aside: int) -> None:
    splits = read_splits(many(tmp_path / "t.csv", rows), None, many(tmp_path / "e.csv", 2, start=20_000), seed=7)
    train, validation = splits["train"], splits["validation"]
    assert len(validation) == validation.rows_read == aside
    numbers = train.dataset["row"][:], validation.dataset["row"][:]
    assert sorted(numbers[0] + numbers[1]) == list(range(1, rows + 1))
    assert all(part == sorted(part) for part in numbers)
    note = f"{aside:,} row{'' if aside == 1 else 's'} of {rows:,} set aside for validation (seed 7)"
    assert train.notes == validation.notes == (note,)


def test_what_is_set_aside_repeats_with_the_seed_and_differs_with_another(tmp_path: Path) -> None:
    path = many(tmp_path / "t.csv", 50)
    drawn = [read_splits(path, seed=seed)["validation"].dataset["row"][:] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_without_a_test_source_the_validation_rows_stand_in_and_it_is_said(tmp_path: Path) -> None:
    splits = read_splits(many(tmp_path / "t.csv", 4), many(tmp_path / "v.csv", 2, start=10))
    assert pairs_of(splits["test"]) == pairs_of(splits["validation"])
    assert "no test source was given: these are the validation rows" in splits["test"].notes[-1]
    assert splits["validation"].notes == ()


def test_a_test_source_alone_is_enough(tmp_path: Path) -> None:
    assert list(read_splits(None, None, many(tmp_path / "e.csv", 3))) == ["test"]


def test_reviews_in_two_splits_are_counted_and_said(tmp_path: Path) -> None:
    train = write_pairs(tmp_path / "t.csv", [("Warm  socks", "a"), ("Cold feet", "b"), ("Fine hat", "c")])
    validation = write_pairs(tmp_path / "v.csv", [("warm\nSOCKS ", "other"), ("Blue hat", "d")])
    test = write_pairs(tmp_path / "e.csv", [("Cold feet", "b"), ("Fine hat", "x"), ("Blue hat", "d")])
    splits = read_splits(train, validation, test)
    assert overlap(splits["train"], splits["validation"]) == 1
    assert overlap(splits["train"], splits["test"]) == 2
    assert overlap(splits["test"], splits["test"]) == 3
    assert splits["validation"].notes == ("1 of its 2 reviews also in train",)
    assert splits["test"].notes == ("2 of its 3 reviews also in train", "1 of its 3 reviews also in validation")
    assert [len(reviews) for reviews in splits.values()] == [3, 2, 3]


def test_overlap_counts_rows_of_the_second(tmp_path: Path) -> None:
    a = read_reviews(write_pairs(tmp_path / "a.csv", [("Warm", "x"), ("Cold", "y")]))
    b = read_reviews(write_pairs(tmp_path / "b.csv", [("Warm", "1"), ("Warm", "2"), ("Mild", "3")]))
    assert (overlap(a, b), overlap(b, a)) == (2, 1)


def test_a_hub_id_is_read_at_the_split_of_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hub(_: str, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": [f"{split} {n}" for n in "ab"], "title": ["x", "y"]})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    splits = read_splits("some/set", "some/set", "some/set")
    assert {name: reviews.dataset["review"][0] for name, reviews in splits.items()} == {
        "train": "train a",
        "validation": "validation a",
        "test": "test a",
    }


def test_too_few_rows_to_train_on_are_an_error(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "t.csv", [("Warm", "a"), ("", "b")])
    with pytest.raises(ReviewsError, match=r"(?s)has 1 usable row; to train, at least 2 .* skipped: empty review"):
        read_splits(path)


def test_no_source_at_all_is_an_error() -> None:
    with pytest.raises(ReviewsError, match=r"given no source\. Give train, validation or test"):
        read_splits(None)


def test_a_row_to_summarise_keeps_its_place_even_twice(tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv"
    path.write_text("review\nGood mug.\nGood mug.\n")
    assert len(read_reviews(path, need_summaries=False)) == 2
