"""The rows of files of any size, one at a time: the one reader of reviews, to train on and to stream.

Memory is that of one row, and a row is bounded. It repairs nothing: a broken row is an error that names its line.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from hf_freeze.errors import ReviewsError
from hf_freeze.summarization.data.files import FORMATS, TABLES, list_files, not_utf8, worded_reading

__all__ = ["GivenRows", "Row", "RowFiles", "row_text", "word_kind"]

LONGEST_CELL = 16_000_000  # characters, of a cell or a line: a quote that is never closed would swallow the whole file
PARQUET_BATCH = 1024  # rows decoded together

T = TypeVar("T")


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


def word_kind(value: object) -> str:
    """What JSON calls a value, for errors; of other values their type.

    >>> word_kind([1]), word_kind(None), word_kind(b"")
    ('an array', 'null', 'a value of type bytes')
    """
    kinds = {dict: "an object", list: "an array", bool: "a truth value", str: "a string", type(None): "null"}
    kinds |= {int: "a number", float: "a number"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


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
        self.total_bytes = 0
        self._done_bytes = 0
        self._open: IO[Any] | None = None
        self._share = 0.0  # bytes of the open Parquet file
        for file in self.files:
            with worded_reading(file):
                self.total_bytes += file.stat().st_size
                self._read_columns(file)

    def _read_columns(self, file: Path) -> None:
        if file.stat().st_size == 0:
            raise ReviewsError(f"{file} is empty (0 bytes). Give a file with at least one review.")
        separator: str = ""
        header: list[str] = []
        columns: list[str] | None
        try:
            if self.kind in TABLES:
                separator = _find_separator(file)
                header = next((cells for cells, _ in _cells(file, separator)), [])
                columns = [name.strip() or f"column {number}" for number, name in enumerate(header, 1)] or None
                _refuse_repeated(columns or [], f"{file}: the header")
            elif self.kind == "Parquet":
                columns = _parquet_columns(file)
            else:
                columns = next((list(row.values) for row in _json_rows(file)), None)
        except UnicodeDecodeError:
            raise not_utf8(file) from None
        if columns is None:
            raise ReviewsError(f"{file} is empty (blank lines only). Give a file with at least one review.")
        if file == self.files[0]:
            self.separator, self.header = separator, header
        elif self.kind != "JSON lines" and (columns, separator) != (list(self.columns), self.separator):
            raise ReviewsError(
                f"{file} has the columns {columns} separated by {separator!r}, but {self.files[0]} has "
                f"{list(self.columns)} separated by {self.separator!r}. Files of one folder must agree."
            )
        self.columns |= dict.fromkeys(columns)

    @property
    def position(self) -> int:
        """Bytes that the iteration under way has read."""
        if self._open is None:
            return self._done_bytes
        return self._done_bytes + int(self._share if self.kind == "Parquet" else self._open.tell())

    def __iter__(self) -> Iterator[Row]:
        rows_of = {"Parquet": self._parquet_rows, "JSON lines": self._json_rows}
        return self._read(rows_of.get(self.kind, self._table_rows))

    def parquet_batches(self) -> Iterator[Any]:
        """The rows of Parquet files as batches of Arrow, with their types."""
        return self._read(self._parquet_batches)

    def _read(self, contents_of: Callable[[Path, IO[bytes]], Iterator[T]]) -> Iterator[T]:
        """What each file holds, in turn; what goes wrong on the way is worded."""
        self._done_bytes = 0
        for path in self.files:
            with worded_reading(path), path.open("rb") as self._open:
                size = os.fstat(self._open.fileno()).st_size
                try:
                    yield from contents_of(path, self._open)
                except UnicodeDecodeError:
                    raise not_utf8(path) from None
                finally:
                    self._open = None
            self._done_bytes += size

    def _json_rows(self, path: Path, file: IO[bytes]) -> Iterator[Row]:
        for row in _json_rows(path, file):
            self.columns |= dict.fromkeys(row.values)
            yield row

    def _table_rows(self, path: Path, file: IO[bytes]) -> Iterator[Row]:
        names = list(self.columns)
        for cells, line in itertools.islice(_cells(path, self.separator, file), 1, None):
            if len(cells) != len(names):
                fix = f"Put quotes around a cell that holds {self.separator!r}."
                if len(cells) < len(names):
                    fix = f"Give it all {len(names)} cells, empty ones too: it has none for {names[len(cells)]!r}."
                raise ReviewsError(
                    f"{path}, line {line} has {len(cells)} cells, but the header has {len(names)}: "
                    f"{_quote_start(self.separator.join(cells))} {fix}"
                )
            yield Row(dict(zip(names, cells, strict=True)), f"{path}, line {line}")

    def _parquet_rows(self, path: Path, file: IO[bytes]) -> Iterator[Row]:
        number = 0
        try:
            for batch in self._parquet_batches(path, file):
                for values in _decoded(batch):
                    number += 1
                    yield Row(values, f"{path}, row {number}")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{error.object[error.start]:02x}"
            raise ReviewsError(f"{path}, row {number + 1} is not UTF-8: {byte}. Write it again as UTF-8.") from error
        except ReviewsError:
            raise
        except Exception as error:  # a value that no type of Python's holds
            raise ReviewsError(f"{path} is damaged after row {number} ({error}). Write it again.") from error

    def _parquet_batches(self, path: Path, file: IO[bytes]) -> Iterator[Any]:
        import pyarrow.parquet as pq

        size, number, total = path.stat().st_size, 0, 0
        try:
            with pq.ParquetFile(file) as parquet:
                total = parquet.metadata.num_rows
                for batch in parquet.iter_batches(batch_size=PARQUET_BATCH):
                    yield batch
                    number += len(batch)
                    self._share = size * number / max(1, total)
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
        _check_given(first[0], 1)
        self.columns = dict.fromkeys(first[0])

    def __iter__(self) -> Iterator[Row]:
        for number, values in enumerate(self._rows, 1):
            _check_given(values, number)
            yield Row(values, f"row {number}")


def _check_given(values: Any, number: int) -> None:
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
                f"Row {number} holds half a character ({error.object[error.start]!r}) in column {name!r}. Take it out."
            ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Lines and tables


def _lines(path: Path, file: IO[bytes] | None, newline: str) -> Iterator[str]:
    """The lines of a file, each of bounded length."""
    with io.TextIOWrapper(file or path.open("rb"), encoding="utf-8-sig", newline=newline) as text:
        number = 0
        while line := text.readline(LONGEST_CELL):
            number += 1
            if len(line) >= LONGEST_CELL and not line.endswith(("\n", "\r")):
                raise ReviewsError(
                    f"{path}, line {number} is longer than {LONGEST_CELL:,} characters: {_quote_start(line[:100])} "
                    f"Write one review a line (a JSON array is not JSON lines)."
                )
            if "\0" in line:  # UTF-16 without its mark is valid UTF-8 with a NUL beside each letter
                raise ReviewsError(f"{path}, line {number} holds a NUL: {_quote_start(line[:100])} Save it as UTF-8.")
            yield line


@contextmanager
def _long_cells() -> Iterator[None]:
    """Lets `csv` read cells of up to `LONGEST_CELL` characters; its own limit, of 128 KiB, is the whole process's."""
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _find_separator(path: Path) -> str:
    """The separator that cuts a table's header line into most fields: the ending is often wrong about it."""
    header = next(filter(str.strip, _lines(path, None, newline="")), "")
    usual = TABLES[FORMATS[path.suffix.lower()]]
    with _long_cells():
        # Spreadsheets write semicolons where the comma is the decimal point. max keeps the first of equals.
        return max((usual, "\t", ",", ";"), key=lambda sign: len(next(csv.reader([header], delimiter=sign), [])))


def _cells(path: Path, separator: str, file: IO[bytes] | None = None) -> Iterator[tuple[list[str], int]]:
    """The cells of each row of a table, header included, and the line on which it begins; blank lines are none."""
    reader = csv.reader(_lines(path, file, newline=""), delimiter=separator, strict=True)
    width = 0
    while True:
        line = reader.line_num + 1
        try:
            with _long_cells():  # for this row only: the limit is everybody's
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


def _quote_start(line: str) -> str:
    """The beginning of a line, quoted and with a full stop, for errors.

    >>> _quote_start("  id,review ")
    "'id,review'."
    """
    line = line.strip()
    return repr(line if len(line) <= 60 else line[:57] + "...") + "."


def _refuse_repeated(names: Iterable[str], where: str) -> None:
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ReviewsError(f"{where} names {', '.join(map(repr, repeated))} more than once. Rename one of them.")


# ---------------------------------------------------------------------------------------------------------------------
# JSON lines and Parquet


def _json_rows(path: Path, file: IO[bytes] | None = None) -> Iterator[Row]:
    for number, line in enumerate(_lines(path, file, newline="\n"), 1):
        text = line.strip(" \t\r\n")  # what JSON calls white space
        if text:
            place = f"{path}, line {number}"
            # a bare carriage return between two words would end a line for many readers
            yield Row(_parse_object(text, place), place, text.replace("\r", " "))


def _parse_object(line: str, place: str) -> dict[str, Any]:
    """The object that a line of JSON holds.

    Raises:
        ReviewsError: It is not JSON, no object, names a key twice, or holds half a character.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):  # `json` would keep the last one
            _refuse_repeated((name for name, _ in pairs), place)
        return values

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON: null is a value that is missing")

    try:
        values = json.loads(line, object_pairs_hook=once, parse_constant=refuse)
        if "\\u" in line:  # only an escape can smuggle in half a character, as a cut-off emoji does
            json.dumps(values, ensure_ascii=False).encode()
    except ReviewsError:
        raise
    except UnicodeEncodeError as error:
        raise ReviewsError(
            f"{place} holds half a character ({error.object[error.start]!r}): {_quote_start(line)} Take that escape "
            f"out."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ReviewsError(
            f"{place} is not JSON ({error}): {_quote_start(line)} Each line must be one whole JSON object."
        ) from error
    if not isinstance(values, dict):
        raise ReviewsError(
            f"{place} is {word_kind(values)}, not an object: {_quote_start(line)} "
            f'Each line must be one JSON object, like {{"review": "..."}}.'
        )
    return values


def _parquet_columns(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    path.open("rb").close()  # what the system refuses; below, OSError is also what arrow calls a damage
    try:
        names = list(pq.read_schema(path).names)
    except Exception as error:  # of damaged metadata arrow raises ArrowInvalid, OSError, UnicodeDecodeError and others
        raise ReviewsError(
            f"{path} is not a Parquet file, or its metadata is damaged ({str(error).strip()}). Write it again, or "
            f"correct its ending."
        ) from error
    _refuse_repeated(names, f"{path}: its schema")
    return names


def _decoded(batch: Any) -> Iterable[dict[str, Any]]:
    """The rows of an Arrow batch; one by one where one of them cannot be decoded, so that those before it are given."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        return (batch.slice(place, 1).to_pylist()[0] for place in range(len(batch)))
