"""The files that reviews lie in: their formats, folders of them, and what the system says of them."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_freeze.errors import ReviewsError, nearest

__all__ = ["FORMATS", "TABLES", "list_files", "not_utf8", "tell_missing", "worded_reading"]

FORMATS = {
    ".csv": "CSV",
    ".tsv": "TSV",
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".json": "JSON lines",
    ".parquet": "Parquet",
}
TABLES = {"CSV": ",", "TSV": "\t"}  # with the separator that each is written with
CHUNK_BYTES = 1 << 20


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
        names = ", ".join(entry.name for entry in visible[:5]) or "no files"
        raise ReviewsError(
            f"{path} is a folder without a file that read_reviews knows; it holds {names}. "
            f"Put files there that end in one of {endings}."
        )
    by_format: dict[str, list[str]] = {}
    for file in files:
        by_format.setdefault(FORMATS[file.suffix.lower()], []).append(file.name)
    if len(by_format) > 1:
        kinds = "; ".join(f"{kind}: {', '.join(names[:3])}" for kind, names in by_format.items())
        raise ReviewsError(f"{path} mixes formats ({kinds}). Keep one format in it, or name one file.")
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


def not_utf8(path: Path) -> ReviewsError:
    """The error for a file whose bytes are not UTF-8: it names the first such byte, its offset and its line."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, line, chunk = 0, 1, b"x"  # offset: bytes before this chunk; line: of its beginning
    with worded_reading(path), path.open("rb") as file:
        while chunk:
            chunk = file.read(CHUNK_BYTES)
            pending = len(decoder.getstate()[0])  # bytes of a character cut by the end of the last chunk
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                line += chunk.count(b"\n", 0, max(error.start - pending, 0))
                return ReviewsError(
                    f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
                    f"{offset - pending + error.start} (line {line}). Save it as UTF-8."
                )
            offset, line = offset + len(chunk), line + chunk.count(b"\n")
    return ReviewsError(f"{path} is not UTF-8, or was changed while it was read. Save it as UTF-8.")
