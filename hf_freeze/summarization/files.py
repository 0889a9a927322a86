"""The files that reviews lie in: their formats, folders of them, headers, lines, and where one is not as it should be.

What is asked here of a file or a line is asked by who reads all of it into memory (`reviews`) and by who reads a row
at a time (`row_files`).
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
from pathlib import Path
from typing import Any

from hf_freeze.errors import ReviewsError, nearest

__all__ = [
    "FORMATS",
    "digest_file",
    "find_separator",
    "list_files",
    "name_columns",
    "parse_object",
    "quote_start",
    "read_parquet_size",
    "tell_missing",
    "word_kind",
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


def list_files(path: Path) -> tuple[list[Path], tuple[str, ...]]:
    """The files to read, all of one format, and what was ignored in a folder.

    Raises:
        ReviewsError: An ending that is not known, a folder without files, or with several formats.
    """
    endings = ", ".join(FORMATS)
    if path.is_file():
        if path.suffix.lower() not in FORMATS:
            raise ReviewsError(
                f"{path} ends in {path.suffix!r}, which read_reviews does not know. It reads {endings}: "
                f"save the reviews as one of them."
            )
        return [path], ()
    visible = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    files = [file for file in visible if file.suffix.lower() in FORMATS]
    if not files:
        found = ", ".join(file.name for file in visible[:5]) or "no files"
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
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    names = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    if not names:
        return f"the folder {path.parent} is empty"
    return f"{path.parent} holds {nearest(path.name, names)}"


def digest_file(path: Path, utf8: bool) -> str:
    """Digest of the file's bytes; on the way, checks that they are UTF-8, where they should be.

    Raises:
        ReviewsError: They are not; it names the byte, its offset and its line.
    """
    digest, decoder = hashlib.blake2b(digest_size=16), codecs.getincrementaldecoder("utf-8")()
    offset = line = 0  # offset: bytes before this chunk; line: line breaks before it
    with path.open("rb") as file:
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
        ReviewsError: It is no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            return list(file.schema_arrow.names), int(file.metadata.num_rows)
    except pa.ArrowInvalid as error:
        raise ReviewsError(f"{path} is not a Parquet file ({error}). Write it again, or correct its ending.") from error


def find_separator(path: Path) -> str:
    """The separator that cuts the header line into most fields: the ending is often wrong about it."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next((line for line in file if line.strip()), "")
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    # Spreadsheets write semicolons where the comma is the decimal point. max keeps the first of equals.
    return max((usual, "\t", ",", ";"), key=lambda sign: len(next(csv.reader([header], delimiter=sign), [])))


def name_columns(path: Path, row: list[str]) -> list[str]:
    """The names of a table's columns by its header; one without a name gets its number.

    Raises:
        ReviewsError: A name stands there twice.
    """
    names = [name.strip() or f"column {number}" for number, name in enumerate(row, 1)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ReviewsError(
            f"{path}: the header names {', '.join(map(repr, repeated))} more than once. Rename one of them."
        )
    return names


def parse_object(line: str, place: str, like: str) -> dict[str, Any]:
    """The object that a line of JSON holds.

    Args:
        line: Of a file.
        place: Where it stands, for errors.
        like: What it might hold, for errors.

    Raises:
        ReviewsError: It is not JSON, no object, or holds half a character.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ReviewsError(
            f"{place} is not JSON ({error}): {quote_start(line)} Each line must be one whole JSON object."
        ) from error
    if not isinstance(values, dict):
        raise ReviewsError(
            f"{place} is {word_kind(values)}, not an object: {quote_start(line)} "
            f"Each line must be one JSON object, like {like}."
        )
    if "\\u" in line:  # only an escape can smuggle in half a character, as a cut-off emoji does
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ReviewsError(
                f"{place} holds half a character ({error.object[error.start]!r}): {quote_start(line)} Take that escape "
                f"out."
            ) from error
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
