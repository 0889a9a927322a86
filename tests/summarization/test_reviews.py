from __future__ import annotations

import csv
import os
import socket
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_freeze.errors import ReviewsError
from hf_freeze.summarization.data.reviews import overlap, read_reviews, read_splits
from tests.summarization.review_files import PAIRS, own_cache, pairs_of, write, write_pairs, write_rows  # noqa: F401

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


def test_numbers_of_files_and_batches_find_one_type_and_categories_are_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_freeze.summarization.data.arrow.BATCH", 1)
    path = write_rows(tmp_path / "r.jsonl", [{"review": "a", "n": 1}, {"review": "b", "n": 2.5}])
    assert read_reviews(path, need_summaries=False).dataset["n"][:] == [1, 2.5]
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, number in (("1", 1), ("2", 2.5)):
        table = pa.table({"review": pa.array([name]).dictionary_encode(), "n": [number]})
        pq.write_table(table, folder / f"{name}.parquet")
    assert read_reviews(folder, need_summaries=False).dataset[:] == {
        "review": ["1", "2"], "row": [1, 2], "n": [1.0, 2.5],
    }  # fmt: skip


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
