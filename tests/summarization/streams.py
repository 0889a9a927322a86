"""Runs that summarise a table by a function, and stop where they are asked to."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_freeze.summarization.streaming import FileReport, stream_summaries

ROWS = [{"id": str(n), "product": f"p{n % 3}", "review": f"text {n}" if n % 4 else " "} for n in range(11)]


def upper(texts: Sequence[str]) -> list[str]:
    return [text.upper().replace("\n", "/") for text in texts]


def table(path: Path, rows: Sequence[dict[str, str]] = ROWS) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def stream(source: Any, output: Path, summarize: Any = upper, **options: Any) -> FileReport:
    return stream_summaries(summarize, source, output, **{"progress": False, "window_rows": 3, **options})


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Stopped(Exception):
    """A run that ends in the middle."""


def stopping_after(calls: int) -> Callable[[Sequence[str]], list[str]]:
    def summarize(texts: Sequence[str]) -> list[str]:
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise Stopped
        return upper(texts)

    return summarize
