"""Rows of files of any size, and the lines that are written from them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_freeze.errors import ReviewsError
from hf_freeze.summarization.data.lines import RowLines, spreadsheet_safe
from hf_freeze.summarization.data.rows import GivenRows, Row, RowFiles, row_text


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def values(path: Path) -> list[dict[str, Any]]:
    return [dict(row.values) for row in RowFiles(path)]


def copied(path: Path, ending: str) -> str:
    """The file as it is written back with the summary "S" in each row."""
    files = RowFiles(path)
    lines = RowLines(Path(f"out{ending}"), list(files.columns), "summary", files.separator, files.header)
    return lines.header + "".join(lines.line(row, "S") for row in files)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "id,text\n007,NA\n8,\n"),
        ("a.csv", "\ufeffid,text\r\n007,NA\r\n\r\n8,\r\n"),
        ("a.csv", "id;text\n007;NA\n8;\n"),
        ("a.tsv", "id\ttext\n007\tNA\n8\t\n"),
        ("a.jsonl", '{"id": "007", "text": "NA"}\n\n{"id": "8", "text": ""}\n'),
    ],
)
def test_each_format_gives_its_cells_as_they_are_written(name: str, content: str, tmp_path: Path) -> None:
    assert values(written(tmp_path, name, content)) == [{"id": "007", "text": "NA"}, {"id": "8", "text": ""}]


def test_parquet_rows_come_in_order_and_keep_their_types(tmp_path: Path) -> None:
    rows = [{"id": number, "text": f"review {number}", "tags": ["a"]} for number in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=700)
    assert values(tmp_path / "a.parquet") == rows


def test_a_quote_that_is_never_closed_does_not_swallow_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_freeze.summarization.data.rows.LONGEST_CELL", 1000)
    path = written(tmp_path, "a.csv", 'id,text\n1,"open\n' + "2,b\n" * 10_000)
    with pytest.raises(ReviewsError, match=r"begins at line 2 is broken \(field larger"):
        values(path)
    path = written(tmp_path, "a.jsonl", '{"text": "' + "a" * 2000 + '"}\n')
    with pytest.raises(ReviewsError, match=r"line 1 is longer than 1,000 characters.*JSON array is not JSON lines"):
        values(path)


def test_the_limit_of_cells_of_everybody_else_stays_as_it_was(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    assert len(values(written(tmp_path, "a.csv", "text\n" + "a" * 200_000 + "\n"))[0]["text"]) == 200_000
    assert csv.field_size_limit() == before


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReviewsError, match="is not a Parquet file"):
        RowFiles(written(tmp_path, "a.parquet", "id,text\n1,a\n"))
    path = tmp_path / "b.parquet"
    pq.write_table(pa.table({"text": [f"{n} {'x' * 50}" for n in range(20_000)]}), path, compression="none")
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396
    with pytest.raises(ReviewsError, match="is damaged after row 0"):
        values(written(tmp_path, "b.parquet", bytes(content)))


def test_a_header_longer_than_the_limit_of_csv_is_read(tmp_path: Path) -> None:
    name = "t" * 200_000
    assert values(written(tmp_path, "a.csv", f"id;{name}\n1;a\n")) == [{"id": "1", name: "a"}]


@pytest.mark.parametrize("damaged", range(25))
def test_damaged_metadata_of_parquet_is_a_sentence(damaged: int, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b", "c"]}), path)
    content = bytearray(path.read_bytes())
    begin = len(content) - 8 - int.from_bytes(content[-8:-4], "little")  # of the metadata
    content[begin + 5 * damaged : begin + 5 * damaged + 5] = b"\xff" * 5
    path.write_bytes(content)
    with pytest.raises(
        ReviewsError, match=r"a\.parquet.* (metadata is damaged|is damaged|no such column|more than once)"
    ):
        RowFiles(path).columns and values(path)


def test_a_parquet_row_that_is_not_utf8_is_named_and_those_before_it_are_given(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"b", b"caf\xe9", b"d"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    rows = iter(RowFiles(tmp_path / "a.parquet"))
    assert [next(rows).values["text"] for _ in range(2)] == ["a", "b"]
    with pytest.raises(ReviewsError, match=r"a\.parquet, row 3 is not UTF-8: byte 0xe9"):
        next(rows)


def test_a_parquet_value_that_python_has_no_type_for_is_named(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "on": pa.array([10**15], pa.timestamp("s"))})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ReviewsError, match=r"a\.parquet is damaged after row 0"):
        values(tmp_path / "a.parquet")


def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ReviewsError, match="its schema names 'text' more than once"):
        RowFiles(tmp_path / "a.parquet")


def test_position_ends_at_the_size_of_all_files(tmp_path: Path) -> None:
    for name in ("1.jsonl", "2.jsonl"):
        written(tmp_path, name, '{"text": "a"}\n' * 10)
    files = RowFiles(tmp_path)
    for _ in files:
        assert 0 < files.position <= files.total_bytes
    assert files.position == files.total_bytes


def test_given_rows_must_be_mappings() -> None:
    with pytest.raises(ReviewsError, match="an iterable of mappings is expected"):
        GivenRows({"review": "a"})
    with pytest.raises(ReviewsError, match="The given rows are none"):
        GivenRows([])
    with pytest.raises(ReviewsError, match=r"Row 2 is str \('b'\); a mapping is expected"):
        list(GivenRows(iter([{"review": "a"}, "b"])))  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", None: ["b"]}, r"Row 2 has the column None; names of columns are texts"),
        ({"text": "a\ud83d"}, r"Row 2 holds half a character \('\\ud83d'\) in column 'text'"),
        ({"te\ud83dxt": "a"}, r"Row 2 holds half a character"),
    ],
)
def test_a_given_row_that_no_file_could_hold_is_named(row: dict[Any, Any], message: str) -> None:
    with pytest.raises(ReviewsError, match=message):
        list(GivenRows([{"text": "a"}, row]))


def test_a_number_that_is_none_is_null_in_json_lines() -> None:
    row = Row({"text": "a", "stars": float("nan"), "all": [1.5, float("inf"), {"x": float("-inf")}]}, "row 1")
    line = RowLines(Path("out.jsonl"), list(row.values), "summary").line(row, "Fine.")
    assert json.loads(line, parse_constant=pytest.fail) == {
        "text": "a", "stars": None, "all": [1.5, None, {"x": None}], "summary": "Fine.",
    }  # fmt: skip


def test_a_carriage_return_between_two_json_words_ends_no_line(tmp_path: Path) -> None:
    row = next(iter(RowFiles(written(tmp_path, "a.jsonl", '{"text":\r"a"}\n'))))
    assert "\r" not in RowLines(Path("out.jsonl"), ["text"], "summary").line(row, "Fine.")


def test_a_cell_that_is_no_text_is_an_error_and_a_missing_one_is_blank() -> None:
    assert row_text(Row({"id": 1}, "row 1"), "text") == ""
    with pytest.raises(ReviewsError, match=r"row 1 holds a number in column 'text', and a text is expected: 7"):
        row_text(Row({"text": 7}, "row 1"), "text")


# ---------------------------------------------------------------------------------------------------------------------
# Writing

FORMULAS = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "  =1", "＝1"]


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_summary_that_begins_like_a_formula_is_text_in_a_table_and_itself_in_json(formula: str) -> None:
    assert spreadsheet_safe(formula) == f"'{formula}"
    for ending in (".csv", ".tsv"):
        line = RowLines(Path(f"out{ending}"), ["id"], "summary").line(Row({"id": "7"}, ""), formula)
        cells = next(csv.reader(io.StringIO(line, newline=""), delimiter="\t" if ending == ".tsv" else ","))
        assert cells == ["7", f"'{formula}"]
    line = RowLines(Path("out.jsonl"), ["id"], "summary").line(Row({"id": "7"}, ""), "=1")
    assert line == '{"id": "7", "summary": "=1"}\n'


@pytest.mark.parametrize("text", ["Good mug.", "5 stars", "a = b", "'quoted'", ""])
def test_other_summaries_are_written_as_they_are(text: str) -> None:
    assert spreadsheet_safe(text) == text


def test_formulas_of_the_input_are_kept_as_they_were(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "id,review\n=cmd|' /C calc'!A0,@SUM(A1)\n")
    assert copied(path, ".csv") == "id,review,summary\n=cmd|' /C calc'!A0,@SUM(A1),S\n"


CELLS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=12)


@settings(max_examples=50)
@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=4), sign=st.sampled_from(",;\t"))
def test_whatever_cells_hold_comes_back_the_same(
    rows: list[tuple[str, str]], sign: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cells", numbered=True)
    with (folder / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=sign).writerows([("id", "text"), *rows])
    (folder / "b.csv").write_bytes(copied(folder / "a.csv", ".csv").encode())
    assert [row["summary"] for row in values(folder / "b.csv")] == ["S"] * len(rows)
    assert [(row["id"], row["text"]) for row in values(folder / "b.csv")] == rows
    (folder / "b.jsonl").write_bytes(copied(folder / "a.csv", ".jsonl").encode())
    assert [(row["id"], row["text"]) for row in values(folder / "b.jsonl")] == rows


def test_a_json_object_is_written_back_by_its_own_characters(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"price": 1.10, "text":"caf\\u00e9" }\n{}\n')
    assert copied(path, ".jsonl") == '{"price": 1.10, "text":"caf\\u00e9", "summary": "S"}\n{"summary": "S"}\n'


def test_parquet_values_become_cells(tmp_path: Path) -> None:
    row = {"id": 7, "price": 1.5, "new": True, "tags": ["a"], "none": None}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert copied(tmp_path / "a.parquet", ".csv").splitlines()[1] == '7,1.5,true,"[""a""]",,S'


def test_the_output_ending_and_its_column_are_checked() -> None:
    with pytest.raises(ReviewsError, match=r"ends in '\.xlsx'; written are \.csv, \.tsv and \.jsonl"):
        RowLines(Path("out.xlsx"), ["id"], "summary")
    with pytest.raises(ReviewsError, match=r"column 'summary', which the input has already.*'new_summary'"):
        RowLines(Path("out.csv"), ["id", "summary"], "summary")


def test_a_row_with_a_new_column_is_never_written_without_it() -> None:
    lines = RowLines(Path("out.csv"), ["id", "text"], "summary")
    with pytest.raises(ReviewsError, match=r"row 3 has the column 'txt', which the rows before it had not.*'text'"):
        lines.line(Row({"id": "7", "txt": "a"}, "row 3"), "S")
    with pytest.raises(ReviewsError, match=r"row 4 has the column 'summary'"):
        RowLines(Path("out.jsonl"), ["id"], "summary").line(Row({"summary": "old"}, "row 4"), "S")
