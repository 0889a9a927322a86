"""Files that cannot be read say where, and what to do, whoever reads them."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_freeze.errors import ReviewsError
from hf_freeze.summarization.data.reviews import read_reviews
from hf_freeze.summarization.data.rows import RowFiles
from tests.summarization.review_files import PAIRS, own_cache, pairs_of, write, write_pairs, write_rows  # noqa: F401


def test_a_missing_file_names_the_nearest_in_its_folder(tmp_path: Path) -> None:
    write_pairs(tmp_path / "reviews_train.csv", PAIRS)
    write(tmp_path / "notes.txt", "")
    for read in (read_reviews, RowFiles):
        with pytest.raises(ReviewsError, match=r"No file or folder .*trian\.csv: .* holds 'reviews_train\.csv'"):
            read(tmp_path / "reviews_trian.csv")
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
        ("r.jsonl", "\n\n", r"r\.jsonl is empty \(blank lines only\)"),
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
        ("r.csv", 'review,summary\nok,ok\na,"b" c\n', r"begins at line 3 is broken.*text follows a closing quote"),
        ("r.csv", "i\0d\0,\0t\0\n\0", r"line 1 holds a NUL"),
        ("r.jsonl", "[" * 5000, r"line 1 is not JSON"),
        ("r.jsonl", '{"review": "a"}\n\u00a0\n', r"line 2 is not JSON"),
        ("r.jsonl", '{"review": "a", "n": ' + "9" * 5000 + "}", r"line 1 is not JSON \(Exceeds the limit"),
        ("r.jsonl", '{"review": "a", "n": [{"a": 1, "a": 2}]}', r"line 1 names 'a' more than once"),
        ("r.parquet", "PAR1 not at all", r"r\.parquet is not a Parquet file, or its metadata is damaged \("),
    ],
)
def test_a_file_that_cannot_be_read_says_where_and_what_to_do(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = write(tmp_path / name, content)
    for read in (lambda: read_reviews(path, need_summaries=False), lambda: list(RowFiles(path))):
        with pytest.raises(ReviewsError, match=message):
            read()


def test_a_file_without_a_row_that_can_be_used_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ReviewsError, match=r"r\.csv has no rows"):
        read_reviews(write(tmp_path / "r.csv", "review,summary\n\n"))
    with pytest.raises(ReviewsError, match=r"(?s)No usable row; needed is a review and a summary.*\(row 1\)"):
        read_reviews(write(tmp_path / "r.csv", "review,summary\n,a\nb,\n"))


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


def test_a_cache_that_cannot_be_written_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", write(tmp_path / "full", "no folder"))
    with pytest.raises(ReviewsError, match=r"r\.csv could not be read as CSV: .*kept in .*full, which must have"):
        read_reviews(write_pairs(tmp_path / "r.csv", PAIRS))


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
