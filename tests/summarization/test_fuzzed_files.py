"""Damaged review files of every format: each ends in rows that add up or in a sentence, whoever reads it.

A file is read for training (`read_reviews`) and streamed (`stream_summaries`, with a stand-in that echoes). Both refuse
it with an error of ours, or both give rows; then rows in = rows out + rows named, counted by a third, simple reader of
this file, and both give the same texts. Whatever else happens is a fault: another error, a hang, a row that is lost, a
text that two readers read differently.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import io
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_freeze.errors import FreezeError
from hf_freeze.summarization import read_reviews
from hf_freeze.summarization.streaming import stream_summaries

FILES = int(os.environ.get("HF_FREEZE_FUZZED_FILES", "400"))
FEW = 40  # in the quick test
SECONDS = 20  # a file of a few kilobytes that takes longer hangs

ENDINGS = ("csv", "tsv", "jsonl", "json", "parquet")
PIECES = (
    "Warm, soft", 'a 5" screen', "Zwei Zeilen,\nein Satz", "tab\there", "", " ", "NA", "007", "null", "nan", "=1+1",
    "'quoted'", '"', "a;b", "back\\slash", "x" * 300, "2024-01-31", "\u2028line", "carriage\rreturn", "{}", "[1]", "-0",
    "é👟",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# ---------------------------------------------------------------------------------------------------------------------
# Whole files


def seed_rows(draw: random.Random) -> list[dict[str, str]]:
    count = draw.choice((1, 2, 5, 12, 40))
    names = ("id", "review", "title")
    return [{name: f"{draw.choice(PIECES)}{draw.choice(PIECES)}" for name in names} for _ in range(count)]


def written(rows: list[dict[str, str]], ending: str, draw: random.Random) -> bytes:
    if ending in ("csv", "tsv"):
        sink = io.StringIO()
        separator = "\t" if ending == "tsv" else draw.choice(",,;")
        quoting = draw.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
        end = draw.choice(("\n", "\r\n"))
        for cells in ([*rows[0]], *([*row.values()] for row in rows)):
            line = io.StringIO()
            # with both characters as its line end the writer quotes cells that hold either
            csv.writer(line, delimiter=separator, quoting=quoting, lineterminator="\r\n").writerow(cells)
            sink.write(line.getvalue()[:-2] + end)
        return sink.getvalue().encode()
    if ending == "parquet":
        sink = pa.BufferOutputStream()
        codec = draw.choice(("snappy", "none", "zstd"))
        pq.write_table(pa.Table.from_pylist(rows), sink, compression=codec, row_group_size=draw.choice((3, 1000)))
        return sink.getvalue().to_pybytes()
    escape = draw.random() < 0.5
    return "".join(json.dumps(row, ensure_ascii=escape) + "\n" for row in rows).encode()


# ---------------------------------------------------------------------------------------------------------------------
# Damages. Each takes the bytes of a file and gives others.

Damage = Callable[[bytes, random.Random], bytes]


def _spot(content: bytes, draw: random.Random) -> int:
    return draw.randrange(len(content) + 1)


def _insert(*pieces: bytes) -> Damage:
    def damage(content: bytes, draw: random.Random) -> bytes:
        at = _spot(content, draw)
        return content[:at] + draw.choice(pieces) + content[at:]

    return damage


def _flip(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 3, 20))):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def _flip_in_last(part: int) -> Damage:
    """In the end of a file, where Parquet keeps its metadata."""

    def damage(content: bytes, draw: random.Random) -> bytes:
        changed = bytearray(content)
        for _ in range(draw.choice((1, 2, 8))):
            changed[-draw.randrange(1, min(part, len(changed)) + 1)] = draw.randrange(256)
        return bytes(changed)

    return damage


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: _spot(content, draw)]


def _drop(content: bytes, draw: random.Random) -> bytes:
    at = _spot(content, draw)
    return content[:at] + content[at + draw.choice((1, 1, 4, 50)) :]


def _repeat(content: bytes, draw: random.Random) -> bytes:
    at = _spot(content, draw)
    piece = content[at : at + draw.choice((1, 10, 200))]
    return content[:at] + piece + content[at:]


def _as(encoding: str) -> Damage:
    return lambda content, _: content.decode(errors="replace").encode(encoding, errors="replace")


def _line(change: Callable[[bytes, random.Random], bytes], first: bool = False) -> Damage:
    """Changes one line; the header only, where `first`."""

    def damage(content: bytes, draw: random.Random) -> bytes:
        lines = content.split(b"\n")
        at = 0 if first else draw.randrange(len(lines))
        lines[at] = change(lines[at], draw)
        return b"\n".join(lines)

    return damage


ANY: dict[str, Damage] = {
    "nothing": lambda content, _: content,
    "bytes changed": _flip,
    "cut": _cut,
    "bytes dropped": _drop,
    "bytes repeated": _repeat,
    "noise": _insert(b"\xff\xfe\x00\x80", b"\xed\xa0\xbd", b"\xc3", b"\x1a\x1c\x85"),
    "empty": lambda *_: b"",
}
TEXT: dict[str, Damage] = {
    "NUL": _insert(b"\0"),
    "newline": _insert(b"\n", b"\r\n", b"\r", b"\n\n", b"\n \n", "\n\u00a0\n".encode(), b"\n\t\n"),
    "quote": _insert(b'"', b'""', b"'", b"\\", b'\\"'),
    "control character": _insert(b"\x0b", b"\x0c", b"\x1c", b"\x1f", b"\x7f"),
    "UTF-16": _as("utf-16"),
    "UTF-16 without a mark": _as("utf-16-le"),
    "Latin-1": _as("latin-1"),
    "byte order mark": lambda content, draw: b"\xef\xbb\xbf" * draw.choice((1, 2)) + content,
    "mark within": _insert(b"\xef\xbb\xbf"),
    "old Mac newlines": lambda content, _: content.replace(b"\n", b"\r"),
    "no last newline": lambda content, _: content.rstrip(b"\r\n"),
    "a line twice": _line(lambda line, _: line + b"\n" + line),
    "a line emptied": _line(lambda *_: b""),
    "two lines joined": _line(lambda line, _: line.rstrip(b"\r"), first=False),
}
TABLE: dict[str, Damage] = {
    "separator": _insert(b",", b";", b"\t"),
    "cells dropped": _line(lambda line, draw: line[: draw.randrange(len(line) + 1)]),
    "cells added": _line(lambda line, _: line.rstrip(b"\r") + b",x;y\tz"),
    "header alone": lambda content, _: content.split(b"\n")[0],
    "column twice": _line(lambda line, _: line.replace(b"title", b"review"), first=True),
    "column without name": _line(lambda line, _: line.replace(b"title", b""), first=True),
    "huge header": _line(lambda line, _: line.replace(b"title", b"t" * 140_000), first=True),
    "huge cell": _line(lambda line, _: b'"' + b"t" * 140_000 + b'"' + line),
    "quote never closed": _line(lambda line, _: line[:-1] + b',"open'),
}
DATES = (b'"2024-01-31"', b'"2024-01-31T12:00:00Z"')
VALUES = (
    b"1e999", b"-" + b"9" * 400, b"9" * 5000, b"18446744073709551616", b"NaN", b"Infinity", b"-Infinity", b"1.10",
    b"01", b"true", b"null", b"[]", b"{}", b"[" * 900 + b"]" * 900, b"[" * 100_000, b'{"a":' * 300 + b"1" + b"}" * 300,
    b"[1, null]", b'{"a": 1, "a": 2}', b'"\\ud83d"', b'"\\u0000"', b'"\\x"', b"'x'", *DATES,
)  # fmt: skip


def _a_value(name: bytes) -> Damage:
    """One row's value of a key becomes another."""

    def change(line: bytes, draw: random.Random) -> bytes:
        return re.sub(rb'"%s": "(\\.|[^"\\])*"' % name, lambda _: b'"%s": ' % name + draw.choice(VALUES), line)

    return _line(change)


JSON: dict[str, Damage] = {
    "value": _a_value(b"title"),
    "review of another kind": _a_value(b"review"),
    "all of a column": lambda content, draw: _all_values(content, draw),
    "key twice": _line(lambda line, _: line.replace(b'"title"', b'"review"')),
    "key thrice": _line(lambda line, _: line.replace(b'"title"', b'"id"')),
    "key renamed": _line(lambda line, _: line.replace(b'"review"', b'"text"')),
    "key left out": _line(lambda line, _: re.sub(rb'"review": "(\\.|[^"\\])*", ', b"", line)),
    "array": lambda content, _: b"[" + content.rstrip(b"\n").replace(b"\n", b",\n") + b"]",
    "no object": _line(lambda line, draw: draw.choice(VALUES)),
    "two a line": _line(lambda line, _: line + line),
    "key that is empty": _line(lambda line, _: line.replace(b'"title"', b'""')),
    "pretty": _line(lambda line, _: line.replace(b", ", b",\n ")),
    "spaces": _line(lambda line, draw: draw.choice((b"  ", b"\t", b"\xc2\xa0", b"\x0b")) + line),
}


def _all_values(content: bytes, draw: random.Random) -> bytes:
    """A column of dates, numbers, lists: what a reader may take for something else than text."""
    value = draw.choice(VALUES)
    name = draw.choice((b"title", b"review", b"id"))
    return re.sub(rb'"%s": "(\\.|[^"\\])*"' % name, lambda _: b'"%s": ' % name + value, content)


def _parquet_of(make: Callable[[pa.Table], pa.Table]) -> Damage:
    def damage(content: bytes, _: random.Random) -> bytes:
        sink = pa.BufferOutputStream()
        pq.write_table(make(pq.read_table(pa.BufferReader(content))), sink)
        return sink.getvalue().to_pybytes()

    return damage


def _typed(kind: pa.DataType) -> Damage:
    def make(table: pa.Table) -> pa.Table:
        at = table.column_names.index("review")
        column = table.column(at)
        typed = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
        return table.set_column(at, "review", typed)

    return _parquet_of(make)


def _broken_strings(table: pa.Table) -> pa.Table:
    bad = pa.array([b"caf\xe9"] * len(table), pa.binary()).view(pa.string())
    return table.set_column(1, "review", bad)


PARQUET: dict[str, Damage] = {
    "metadata changed": _flip_in_last(400),
    "footer changed": _flip_in_last(12),
    "metadata changed widely": _flip_in_last(2000),
    "footer only": lambda content, _: content[-300:],
    "column twice": _parquet_of(lambda table: table.rename_columns(["id", "review", "review"])),
    "column without name": _parquet_of(lambda table: table.rename_columns(["id", "review", ""])),
    "binary": _typed(pa.binary()),
    "large strings": _typed(pa.large_string()),
    "string views": _typed(pa.string_view()),
    "categories": _typed(pa.dictionary(pa.int32(), pa.string())),
    "no rows": _parquet_of(lambda table: table.slice(0, 0)),
    "not UTF-8": _parquet_of(_broken_strings),
    "nulls": _parquet_of(lambda table: table.set_column(1, "review", pa.nulls(len(table), pa.string()))),
    "numbers": _parquet_of(lambda table: table.set_column(1, "review", pa.array(range(len(table))))),
    "another format": lambda *_: b"id,review\n1,a\n",
}
DAMAGES = {
    "csv": ANY | TEXT | TABLE,
    "tsv": ANY | TEXT | TABLE,
    "jsonl": ANY | TEXT | JSON,
    "json": ANY | TEXT | JSON,
    "parquet": ANY | PARQUET,
}


# ---------------------------------------------------------------------------------------------------------------------
# Counting rows without either reader


def rows_in(path: Path) -> int | None:
    """The rows of a file, or None where only a reader could tell."""
    content = path.read_bytes()
    if path.suffix == ".parquet":
        try:
            return int(pq.read_table(pa.BufferReader(content)).num_rows)
        except Exception:
            return None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    if path.suffix in (".jsonl", ".json"):
        return sum(bool(line.strip()) for line in text.split("\n"))
    return count_records(text) - 1


def count_records(text: str) -> int:
    """Records of a table that are not blank: a quote counts at the beginning of a cell only."""
    count, state, record = 0, "cell begins", ""
    sign = max(",\t;", key=text.replace("\r", "\n").lstrip("\n").partition("\n")[0].count)
    for character in text + "\n":
        if state == "quoted":
            state = "closed" if character == '"' else state
        elif character == '"' and state in ("cell begins", "closed"):  # it opens, or is the second of two
            state, record = "quoted", record + character
        elif character in "\r\n":
            count += bool(record.strip())
            state, record = "cell begins", ""
        else:
            state, record = "cell begins" if character == sign else "cell", record + character
    return count


# ---------------------------------------------------------------------------------------------------------------------
# The two readers


class Hang(BaseException):
    """No Exception: whoever words whatever a foreign reader raises must not word this."""


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang(f"{SECONDS} s are over")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def train_rows(path: Path, _: Path) -> dict[int, str]:
    reviews = read_reviews(path, text_column="review", need_summaries=False)
    named = [number for numbers in reviews.skipped.values() for number in numbers]
    texts = dict(zip(reviews.dataset["row"], reviews.dataset["review"], strict=True)) | dict.fromkeys(named, "")
    assert len(reviews) + len(named) == reviews.rows_read == len(texts), "a row is lost or counted twice"
    return texts


def stream_rows(path: Path, output: Path) -> dict[int, str]:
    def echo(texts: Any) -> list[str]:
        return list(texts)

    report = stream_summaries(
        echo, path, output, text_column="review", summary_column="echo", window_rows=7, progress=False
    )
    lines = output.read_text(encoding="utf-8").split("\n")[:-1]
    assert len(lines) == report.rows, "a row is lost"
    return {number: json.loads(line)["echo"] for number, line in enumerate(lines, 1)}


def outcome(read: Callable[[Path, Path], dict[int, str]], path: Path, output: Path) -> dict[int, str] | str:
    """The texts by row, or the sentence; any other error is a fault."""
    with _alarm():
        try:
            return read(path, output)
        except FreezeError as error:
            return str(error)


# What a training reader refuses and a streaming one need not: a data set's numbers have 64 bits, a
# summary is a text, and a file without a single review trains nothing.
ONLY_FOR_TRAINING = re.compile(
    r"could not be read as JSON lines: |^No usable row|in column 'title', and a text is expected"
)


def fault(path: Path, folder: Path) -> str | None:
    """What is wrong with how a file is read; None where nothing is."""
    told: dict[str, dict[int, str] | str] = {}
    for name, read in (("training", train_rows), ("streaming", stream_rows)):
        try:
            told[name] = outcome(read, path, folder / f"{path.stem}.out.jsonl")
        except (Exception, Hang) as error:
            return f"{name}: {type(error).__name__}: {str(error)[:200]}"
    trained, streamed = told["training"], told["streaming"]
    expected = rows_in(path)
    for name, texts in told.items():
        if isinstance(texts, dict) and expected is not None and len(texts) != expected:
            return f"{name}: {len(texts)} rows of {expected}"
        if isinstance(texts, str) and path.name not in texts:
            return f"{name}: no file named: {texts[:200]}"
    if isinstance(trained, str) and isinstance(streamed, dict):
        blank = not any(text.strip() for text in streamed.values())
        if not ONLY_FOR_TRAINING.search(trained) or (trained.startswith("No usable row") and not blank):
            return f"only training refuses: {trained[:300]}"
    elif isinstance(trained, dict) and isinstance(streamed, str):
        return f"only streaming refuses: {streamed[:300]}"
    elif isinstance(trained, dict) and isinstance(streamed, dict):
        blanked = {number: text if text.strip() else "" for number, text in streamed.items()}
        if trained != blanked:
            return f"two texts of one row: {set(trained.items()) ^ set(blanked.items())}"
    return None


def fuzz(folder: Path, numbers: range) -> tuple[dict[str, str], collections.Counter[str]]:
    """Faults by file, and how many files ended how."""
    faults, ends = {}, collections.Counter[str]()
    for number in numbers:
        draw = random.Random(number)
        ending = ENDINGS[number % len(ENDINGS)]
        names = list(DAMAGES[ending])
        name = names[number // len(ENDINGS) % len(names)]
        path = folder / f"{number}.{ending}"
        path.write_bytes(DAMAGES[ending][name](written(seed_rows(draw), ending, draw), draw))
        wrong = fault(path, folder)
        ends["fault" if wrong else "ok"] += 1
        if wrong:
            faults[f"{path.name} ({name})"] = wrong
    return faults, ends


def test_damaged_files_end_in_rows_that_add_up_or_in_a_sentence(tmp_path: Path) -> None:
    faults, ends = fuzz(tmp_path, range(FEW))
    assert not faults, "\n".join(f"{name}: {wrong}" for name, wrong in faults.items())
    assert ends["ok"] == FEW


@pytest.mark.slow
def test_many_damaged_files_end_in_rows_that_add_up_or_in_a_sentence(tmp_path: Path) -> None:
    started = time.perf_counter()
    faults, ends = fuzz(tmp_path, range(FILES))
    print(f"{FILES} files, {dict(ends)}, {time.perf_counter() - started:.0f} s")
    assert not faults, "\n".join(f"{name}: {wrong}" for name, wrong in faults.items())
