"""The rows of files of any size, one at a time, and the lines of the file that is written from them.

Memory is that of one row, and a row is bounded. It repairs nothing: a broken row is an error that names its line. What
was read is written back as it was: cells of a table as they are, a JSON object by its own characters.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from hf_freeze.errors import ReviewsError, nearest
from hf_freeze.summarization.data.files import (
    FORMATS,
    LONGEST_CELL,
    digest_file,
    find_separator,
    list_files,
    long_cells,
    name_columns,
    parse_object,
    quote_start,
    read_parquet_size,
    word_kind,
    worded_reading,
)

__all__ = ["GivenRows", "Row", "RowFiles", "RowLines", "row_text", "spreadsheet_safe"]

PARQUET_BATCH = 1024  # rows decoded together
TABLES = {"CSV": ",", "TSV": "\t"}  # with the separator that each is written with

# What makes a spreadsheet take a cell for a formula, by OWASP's list ("CSV Injection"), with the full-width signs that
# East Asian versions take for the same.
FORMULA_STARTS = tuple("=+-@\t\r\n＝＋－＠")


class Row(NamedTuple):
    """One row as it was read.

    Attributes:
        values: Cell by column name.
        place: Where it stands, for errors: "reviews.csv, line 12".
        text: The JSON object's own characters, where the source is JSON lines; else "".
    """

    values: Mapping[str, Any]
    place: str
    text: str = ""


class RowFiles:
    """The rows of a file, or of a folder of files in one format; each iteration reads them anew.

    Args:
        path: a .csv, .tsv, .jsonl, .ndjson, .json (one object a line) or .parquet file, or a folder of such files,
            read in sorted order.

    Attributes:
        columns: Column names. Of JSON lines those of the rows that were read so far, the first one at least.
        header: For a table, the names as they stand in the file.
        separator: Of a table; "" for other formats.
        total_bytes: Size of all files.
        notes: What a folder holds beside them.

    Raises:
        ReviewsError: no such file, an unknown ending, mixed formats, files that disagree about columns, no columns.
            While rows are read: a broken one, with its line.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "shoes.csv")
    >>> _ = path.write_text('id,text\\n7,"Nice, but small."\\n')
    >>> [dict(row.values) for row in RowFiles(path)]
    [{'id': '7', 'text': 'Nice, but small.'}]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.name = str(self.path)
        self.files, self.notes = list_files(self.path)
        self.kind = FORMATS[self.files[0].suffix.lower()]
        self.separator = ""
        self.header: list[str] = []
        self.columns: dict[str, None] = {}
        self._done_bytes = 0
        self._open: IO[Any] | None = None
        self._share = 0.0  # of the open Parquet file
        self.total_bytes = 0
        for file in self.files:
            with worded_reading(file):
                self.total_bytes += file.stat().st_size
                self._read_columns(file)

    def _read_columns(self, file: Path) -> None:
        if file.stat().st_size == 0:
            raise ReviewsError(f"{file} is empty (0 bytes). Give a file with at least one review.")
        separator, header, columns, empty = "", [], [], False
        try:
            if self.kind in TABLES:
                separator = find_separator(file, next(filter(str.strip, _lines(file, None, newline="")), ""))
                header = next((cells for cells, _ in _cells(file, separator)), [])
                columns, empty = name_columns(file, header), not header
            elif self.kind == "Parquet":
                columns = read_parquet_size(file)[0]
            else:
                row = next(_json_rows(file), None)
                columns, empty = list(row.values) if row else [], row is None
        except UnicodeDecodeError:
            _raise_not_utf8(file)
        if empty:
            raise ReviewsError(f"{file} is empty (blank lines only). Give a file with at least one review.")
        first = file == self.files[0]
        if not first and self.kind != "JSON lines" and (columns, separator) != (list(self.columns), self.separator):
            raise ReviewsError(
                f"{file} has the columns {columns} separated by {separator!r}, but {self.files[0]} has "
                f"{list(self.columns)} separated by {self.separator!r}. Files of one folder must agree."
            )
        self.columns |= dict.fromkeys(columns)
        if first:
            self.separator, self.header = separator, header

    @property
    def position(self) -> int:
        """Bytes that the iteration under way has read."""
        if self._open is None:
            return self._done_bytes
        return self._done_bytes + int(self._share if self.kind == "Parquet" else self._open.tell())

    def __iter__(self) -> Iterator[Row]:
        self._done_bytes = 0
        for path in self.files:
            with worded_reading(path), path.open("rb") as self._open:
                size = os.fstat(self._open.fileno()).st_size
                try:
                    yield from self._rows(path, self._open)
                except UnicodeDecodeError:
                    _raise_not_utf8(path)
                finally:
                    self._open = None
            self._done_bytes += size

    def _rows(self, path: Path, file: IO[bytes]) -> Iterator[Row]:
        if self.kind == "Parquet":
            yield from self._parquet_rows(path, file)
        elif self.kind == "JSON lines":
            for row in _json_rows(path, file):
                self.columns |= dict.fromkeys(row.values)
                yield row
        else:
            names = list(self.columns)
            table = _cells(path, self.separator, file)
            next(table, None)  # the header
            for cells, line in table:
                if len(cells) != len(names):
                    raise _wrong_width(path, line, cells, names, self.separator)
                yield Row(dict(zip(names, cells, strict=True)), f"{path}, line {line}")

    def _parquet_rows(self, path: Path, file: IO[bytes]) -> Iterator[Row]:
        import pyarrow.parquet as pq

        size, number, total = path.stat().st_size, 0, 0
        try:
            with pq.ParquetFile(file) as parquet:
                total = parquet.metadata.num_rows
                for batch in parquet.iter_batches(batch_size=PARQUET_BATCH):
                    for values in _decoded(batch):
                        number += 1
                        self._share = size * number / max(1, total)
                        yield Row(values, f"{path}, row {number}")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{error.object[error.start]:02x}"
            raise ReviewsError(f"{path}, row {number + 1} is not UTF-8: {byte}. Write it again as UTF-8.") from error
        except Exception as error:  # of damaged pages arrow raises ArrowInvalid, OSError, MemoryError and others
            raise ReviewsError(f"{path} is damaged after row {number} ({error}). Write it again.") from error
        if number != total:
            raise ReviewsError(f"{path} is damaged: it names {total} rows and holds {number}. Write it again.")


class GivenRows:
    """Rows that are given as an iterable, in the form in which `RowFiles` gives those of files. They are read once.

    Args:
        rows: Mappings from column to cell. The first one tells the columns.

    Attributes:
        columns: Column names.

    Raises:
        ReviewsError: No iterable, no rows, or a row that is no mapping of names that are texts, or holds half a
            character.

    >>> [row.place for row in GivenRows({"review": text} for text in ("Good.", "Bad."))]
    ['row 1', 'row 2']
    """

    name, separator, header = "The given rows", "", None

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
            raise ReviewsError(f"Rows were given as {type(rows).__name__}; an iterable of mappings is expected.")
        iterator = iter(rows)
        first = list(itertools.islice(iterator, 1))
        if not first:
            raise ReviewsError("The given rows are none. Give at least one review.")
        self._rows = itertools.chain(first, iterator)
        self._check(first[0], 1)
        self.columns = dict.fromkeys(first[0])

    def __iter__(self) -> Iterator[Row]:
        for number, values in enumerate(self._rows, 1):
            self._check(values, number)
            yield Row(values, f"row {number}")

    @staticmethod
    def _check(values: Any, number: int) -> None:
        if not isinstance(values, Mapping):
            raise ReviewsError(
                f"Row {number} is {type(values).__name__} ({values!r:.60}); a mapping is expected, such as "
                f"{{'review': '...'}}."
            )
        for name, value in values.items():
            if not isinstance(name, str):  # csv.DictReader files the cells of too long a row under None
                raise ReviewsError(f"Row {number} has the column {name!r}; names of columns are texts. Rename it.")
            try:
                f"{name}{value if isinstance(value, str) else ''}".encode()
            except UnicodeEncodeError as error:
                raise ReviewsError(
                    f"Row {number} holds half a character ({error.object[error.start]!r}) in column {name!r}. Take it "
                    f"out."
                ) from error


def row_text(row: Row, column: str) -> str:
    """The text that a row holds in a column; "" where it holds none.

    Raises:
        ReviewsError: something else than a text.

    >>> row_text(Row({"text": None}, "x.jsonl, line 1"), "text")
    ''
    """
    value = row.values.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ReviewsError(
            f"{row.place} holds {word_kind(value)} in column {column!r}, and a text is expected: {value!r:.60}. Name "
            f"another column, or write its values as strings."
        )
    return value


def _raise_not_utf8(path: Path) -> None:
    digest_file(path, utf8=True)  # names the byte, its offset and its line
    raise ReviewsError(f"{path} is not UTF-8, or was changed while it was read. Save it as UTF-8.")


# ---------------------------------------------------------------------------------------------------------------------
# Reading one file


def _lines(path: Path, file: IO[bytes] | None, newline: str) -> Iterator[str]:
    """The lines of a file, each of bounded length."""
    with io.TextIOWrapper(file or path.open("rb"), encoding="utf-8-sig", newline=newline) as text:
        number = 0
        while line := text.readline(LONGEST_CELL):
            number += 1
            if len(line) >= LONGEST_CELL and not line.endswith(("\n", "\r")):
                raise ReviewsError(
                    f"{path}, line {number} is longer than {LONGEST_CELL:,} characters: {quote_start(line[:100])} "
                    f"Write one review a line (a JSON array is not JSON lines)."
                )
            if "\0" in line:  # UTF-16 without its mark is valid UTF-8 with a NUL beside each letter
                raise ReviewsError(f"{path}, line {number} holds a NUL: {quote_start(line[:100])} Save it as UTF-8.")
            yield line


def _cells(path: Path, separator: str, file: IO[bytes] | None = None) -> Iterator[tuple[list[str], int]]:
    """The cells of each row of a table, header included, and the line on which it begins; blank lines are none."""
    reader = csv.reader(_lines(path, file, newline=""), delimiter=separator, strict=True)
    width = 0
    while True:
        line = reader.line_num + 1
        try:
            with long_cells():  # for this row only: the limit is everybody's
                cells = next(reader, None)
        except csv.Error as error:
            raise ReviewsError(
                f"{path}: the row that begins at line {line} is broken ({error}): a quote is never closed, or text "
                f"follows a closing quote. Close it, or double a quote that belongs to the text."
            ) from error
        if cells is None:
            return
        blank = not cells or (len(cells) == 1 and width != 1 and not cells[0].strip())
        if not blank:
            width = width or len(cells)
            yield cells, line


def _wrong_width(path: Path, line: int, cells: Sequence[str], names: Sequence[str], separator: str) -> ReviewsError:
    fix = f"Put quotes around a cell that holds {separator!r}."
    if len(cells) < len(names):
        fix = f"Give it all {len(names)} cells, empty ones too: it has none for {names[len(cells)]!r}."
    start = quote_start(separator.join(cells))
    return ReviewsError(f"{path}, line {line} has {len(cells)} cells, but the header has {len(names)}: {start} {fix}")


def _decoded(batch: Any) -> Iterable[dict[str, Any]]:
    """The rows of an Arrow batch; one by one where one of them cannot be decoded, so that those before it are given."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        return (batch.slice(place, 1).to_pylist()[0] for place in range(len(batch)))


def _json_rows(path: Path, file: IO[bytes] | None = None) -> Iterator[Row]:
    for number, line in enumerate(_lines(path, file, newline="\n"), 1):
        text = line.strip(" \t\r\n")  # what JSON calls white space
        if not text:
            continue
        place = f"{path}, line {number}"
        values = parse_object(text, place, '{"review": "..."}')
        # a bare carriage return between two words would end a line for many readers
        yield Row(values, place, text.replace("\r", " "))


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def spreadsheet_safe(text: str) -> str:
    """A text that no spreadsheet takes for a formula: with an apostrophe before it where it begins like one.

    Spreadsheets show what follows the apostrophe as text and run nothing (OWASP, "CSV Injection").

    >>> spreadsheet_safe("=HYPERLINK(A1)"), spreadsheet_safe("Good mug.")
    ("'=HYPERLINK(A1)", 'Good mug.')
    """
    return f"'{text}" if text.startswith(FORMULA_STARTS) or text.lstrip().startswith(FORMULA_STARTS) else text


class RowLines:
    """How rows and their summaries become lines: those of a .csv, .tsv or .jsonl file.

    Cells are written as they were read. In a table a summary that begins like a formula gets an apostrophe
    (`spreadsheet_safe`); JSON lines hold it as it is, since no spreadsheet reads them.

    Args:
        path: its ending decides.
        columns: the input's columns.
        summary_column: name of the added column.
        separator: of a .csv; "" is a comma.
        header: what the header calls the columns; None is their names.

    Raises:
        ReviewsError: another ending, or a summary column that the input has.

    >>> lines = RowLines(Path("out.csv"), ["id"], "summary")
    >>> lines.header + lines.line(Row({"id": "7"}, ""), "-5 stars.")
    "id,summary\\n7,'-5 stars.\\n"
    >>> RowLines(Path("out.csv"), ["id"], "summary").line(Row({"id": "a,b"}, ""), "Fine.")
    '"a,b",Fine.\\n'
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str],
        summary_column: str,
        separator: str = "",
        header: Sequence[str] | None = None,
    ) -> None:
        self.kind = FORMATS.get(path.suffix.lower(), "")
        if self.kind not in (*TABLES, "JSON lines"):
            raise ReviewsError(
                f"The summaries were to be written to {path}, which ends in {path.suffix!r}; written are .csv, .tsv "
                f"and .jsonl. Choose one of these endings."
            )
        if summary_column in columns:
            raise ReviewsError(
                f"The summaries were to be written to column {summary_column!r}, which the input has already: "
                f"{', '.join(map(repr, columns))}. Name another one (--summary_column), e.g. 'new_{summary_column}'."
            )
        self.columns = list(columns)
        self.summary_column = summary_column
        self.separator = separator if separator and self.kind == "CSV" else TABLES.get(self.kind, "")
        self.header = self._table_line([*(header or columns), summary_column]) if self.kind in TABLES else ""

    def line(self, row: Row, summary: str) -> str:
        """One line, its end included.

        Raises:
            ReviewsError: a row with a column that the header does not have.
        """
        if self.kind in TABLES:
            if row.values.keys() - set(self.columns):
                self._refuse(row)
            cells = [_cell(row.values.get(name)) for name in self.columns]
            return self._table_line([*cells, spreadsheet_safe(summary)])
        added = json.dumps({self.summary_column: summary}, ensure_ascii=False)
        if self.summary_column in row.values:
            self._refuse(row)
        if not row.values:
            return added + "\n"
        # JSON's own characters where there are any: 1.10 stays 1.10.
        text = row.text or json.dumps(_without_nan(dict(row.values)), ensure_ascii=False, default=str)
        return f"{text[:-1].rstrip()}, {added[1:]}\n"

    def _refuse(self, row: Row) -> None:
        wrong = next(name for name in row.values if name == self.summary_column or name not in self.columns)
        raise ReviewsError(
            f"{row.place} has the column {wrong!r}, which the rows before it had not; nearest of theirs: "
            f"{nearest(wrong, self.columns)}. Give all rows the same columns, or name another --summary_column."
        )

    def _table_line(self, cells: Sequence[str]) -> str:
        sink = io.StringIO()
        # With both characters as its line end the writer quotes cells that hold either, as every reader needs it.
        csv.writer(sink, delimiter=self.separator, lineterminator="\r\n").writerow(cells)
        return sink.getvalue()[:-2] + "\n"


def _without_nan(value: Any) -> Any:
    """A value as JSON has it: null for numbers that are none, which nobody else could read (Parquet and pandas)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    return [_without_nan(one) for one in value] if isinstance(value, list) else value


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool | int | float | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
