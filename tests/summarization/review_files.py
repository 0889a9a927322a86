"""Files of reviews, in each format, and what was read of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_freeze.summarization.data.reviews import Reviews

PAIRS = [("Warm but itchy.", "Warm, itchy"), ("Broke in a week.", "Broke"), ("Fits, and looks good.", "Good fit")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the tests out of the user's cache, and reads fresh."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_pairs(path: Path, pairs: list[tuple[Any, Any]], names: tuple[str, str] = ("review", "summary")) -> Path:
    """The same rows in the format of the ending."""
    rows = [dict(zip(names, pair, strict=True)) for pair in pairs]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([names, *pairs])
    else:
        write_rows(path, rows)
    return path


def pairs_of(reviews: Reviews) -> list[tuple[str, str]]:
    return [(row["review"], row["summary"]) for row in reviews.dataset]
