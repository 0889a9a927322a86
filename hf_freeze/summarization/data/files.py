"""The files that reviews lie in: their formats, folders of them, headers, lines, and where one is not as it should be.

What is asked here of a file or a line is asked by who reads all of it into memory (`reviews`) and by who reads a row
at a time (`row_files`).
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_freeze.errors import ReviewsError, nearest

__all__ = [
    "FORMATS",
    "LONGEST_CELL",
    "digest_file",
    "find_separator",
    "list_files",
    "long_cells",
    "name_columns",
    "parse_object",
    "quote_start",
    "read_parquet_size",
    "tell_missing",
    "word_kind",
    "worded_reading",
]

FORMATS = {
    ".csv": "CSV",
    ".tsv": "TSV",
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".json": "JSON lines",
    ".parquet": "Parquet",
}
CHUNK_BYTES = 1 << 20
LONGEST_CELL = 16_000_000  # characters, of a cell or a line: a quote that is never closed would swallow the whole file


@contextmanager
def worded_reading(path: Path) -> Iterator[None]:
    """Turns what the system says while a file is read into an error of ours.

    Raises:
        ReviewsError: The file is gone, may not be read, or its disk fails.
    """
    try:
        yield
    except OSError as error:
        raise ReviewsError(
            f"{path} could not be read: {error.strerror or error}. It must stay where it is and be readable until the "
            f"run ends."
        ) from error


@contextmanager
def long_cells() -> Iterator[None]:
    """Lets `csv` read cells of up to `LONGEST_CELL` characters; its own limit, of 128 KiB, is the whole process's."""
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def list_files(path: Path) -> tuple[list[Path], tuple[str, ...]]:
    """The files to read, all of one format, and what was ignored in a folder.

    Raises:
        ReviewsError: No file or folder, an ending that is not known, a folder without files, or with several formats.
    """
    with worded_reading(path):
        return _list_files(path)


def _list_files(path: Path) -> tuple[list[Path], tuple[str, ...]]:
    endings = ", ".join(FORMATS)
    if not path.exists():
        raise ReviewsError(f"No file or folder {path}: {tell_missing(path)}. Check the path.")
    if not (path.is_file() or path.is_dir()):  # a pipe would be waited for, and can be read once only
        raise ReviewsError(f"{path} is neither a file nor a folder. Write the reviews to a file first.")
    if path.is_file():
        if path.suffix.lower() not in FORMATS:
            raise ReviewsError(
                f"{path} ends in {path.suffix!r}, which read_reviews does not know. It reads {endings}: "
                f"save the reviews as one of them."
            )
        return [path], ()
    visible = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    files = [file for file in visible if file.suffix.lower() in FORMATS]
    if strange := next((file for file in files if not file.is_file()), None):
        raise ReviewsError(
            f"{path} holds {strange.name}, which is no file that can be read. Take it out, or name one file of {path}."
        )
    if not files:
        found = ", ".join(entry.name for entry in visible[:5]) or "no files"
        raise ReviewsError(
            f"{path} is a folder without a file that read_reviews knows; it holds {found}. "
            f"Put files there that end in one of {endings}."
        )
    by_format: dict[str, list[str]] = {}
    for file in files:
        by_format.setdefault(FORMATS[file.suffix.lower()], []).append(file.name)
    if len(by_format) > 1:
        found = "; ".join(f"{kind}: {', '.join(names[:3])}" for kind, names in by_format.items())
        raise ReviewsError(f"{path} mixes formats ({found}). Keep one format in it, or name one file.")
    ignored = [file.name for file in visible if file not in files]
    return files, (f"ignored in the folder: {', '.join(ignored)}",) if ignored else ()


def tell_missing(path: Path) -> str:
    """Words where a missing path was looked for and what is near it."""
    if path.is_symlink():
        return f"it is a link to {path.readlink()}, which is not there"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    names = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    if not names:
        return f"the folder {path.parent} is empty"
    return f"{path.parent} holds {nearest(path.name, names)}"


def digest_file(path: Path, utf8: bool) -> str:
    """Digest of the file's bytes; on the way, checks that they are UTF-8, where they should be.

    Raises:
        ReviewsError: They are not (it names the byte, its offset and its line), or cannot be read.
    """
    digest, decoder = hashlib.blake2b(digest_size=16), codecs.getincrementaldecoder("utf-8")()
    offset = line = 0  # offset: bytes before this chunk; line: line breaks before it
    with worded_reading(path), path.open("rb") as file:
        while True:
            chunk = file.read(CHUNK_BYTES)
            digest.update(chunk)
            if utf8:
                pending = len(decoder.getstate()[0])  # bytes of a character cut by the end of the last chunk
                try:
                    decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    at = offset - pending + error.start
                    line += chunk.count(b"\n", 0, max(error.start - pending, 0)) + 1
                    raise ReviewsError(
                        f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {at} "
                        f"(line {line}). Save it as UTF-8."
                    ) from error
            if not chunk:
                return digest.hexdigest()
            offset, line = offset + len(chunk), line + chunk.count(b"\n")


def read_parquet_size(path: Path) -> tuple[list[str], int]:
    """The columns of a Parquet file, and how many rows it has.

    Raises:
        ReviewsError: It is no Parquet file, is damaged, cannot be read, or has two columns of one name.
    """
    import pyarrow.parquet as pq

    with worded_reading(path):
        path.open("rb").close()  # what the system refuses; below, OSError is also what arrow calls a damage
    try:
        with pq.ParquetFile(path) as file:
            names, rows = list(file.schema_arrow.names), int(file.metadata.num_rows)
    except Exception as error:  # of damaged metadata arrow raises ArrowInvalid, OSError, UnicodeDecodeError and others
        raise ReviewsError(
            f"{path} is not a Parquet file, or its metadata is damaged ({str(error).strip()}). Write it again, or "
            f"correct its ending."
        ) from error
    _refuse_repeated(names, f"{path}: its schema")
    return names, rows


def find_separator(path: Path, header: str) -> str:
    """The separator that cuts a table's header line into most fields: the ending is often wrong about it."""
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    with long_cells():
        # Spreadsheets write semicolons where the comma is the decimal point. max keeps the first of equals.
        return max((usual, "\t", ",", ";"), key=lambda sign: len(next(csv.reader([header], delimiter=sign), [])))


def name_columns(path: Path, row: list[str]) -> list[str]:
    """The names of a table's columns by its header; one without a name gets its number.

    Raises:
        ReviewsError: A name stands there twice.
    """
    names = [name.strip() or f"column {number}" for number, name in enumerate(row, 1)]
    _refuse_repeated(names, f"{path}: the header")
    return names


def _refuse_repeated(names: Iterable[str], where: str) -> None:
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ReviewsError(f"{where} names {', '.join(map(repr, repeated))} more than once. Rename one of them.")


def parse_object(line: str, place: str, like: str) -> dict[str, Any]:
    """The object that a line of JSON holds.

    Args:
        line: Of a file.
        place: Where it stands, for errors.
        like: What it might hold, for errors.

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
            f"{place} holds half a character ({error.object[error.start]!r}): {quote_start(line)} Take that escape out."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ReviewsError(
            f"{place} is not JSON ({error}): {quote_start(line)} Each line must be one whole JSON object."
        ) from error
    if not isinstance(values, dict):
        raise ReviewsError(
            f"{place} is {word_kind(values)}, not an object: {quote_start(line)} "
            f"Each line must be one JSON object, like {like}."
        )
    return values


def word_kind(value: object) -> str:
    """What JSON calls a value, for errors.

    >>> word_kind([1]), word_kind(None)
    ('an array', 'null')
    """
    kinds = {dict: "an object", list: "an array", bool: "a truth value", str: "a string", type(None): "null"}
    return kinds.get(type(value), "a number")


def quote_start(line: str) -> str:
    """The beginning of a line, quoted and with a full stop, for errors.

    >>> quote_start("  id,review ")
    "'id,review'."
    """
    line = line.strip()
    return repr(line if len(line) <= 60 else line[:57] + "...") + "."
