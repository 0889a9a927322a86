"""Opening a cache looks at everything once: each weight, each byte on disk, each row of the dataset."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_freeze import FreezePlan, PrefixCache, freeze, thaw
from hf_freeze.errors import FreezeError
from hf_freeze.prefix import describe_caches, files, key, states
from tests.prefix.cases import collator_for, frozen_model, review_rows

SAMPLED = 16 + 8 + 3  # rows that the checks of the collator and the proofs read again


class Counted(list[Any]):
    """Rows that count how often each is read."""

    def __init__(self, rows: list[Any]) -> None:
        super().__init__(rows)
        self.reads: Counter[int] = Counter()

    def __getitem__(self, row: Any) -> Any:
        self.reads[row] += 1
        return super().__getitem__(row)


@pytest.fixture
def digests(monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[int], Counter[str]]:
    """How often each tensor and each file is digested."""
    tensors: Counter[int] = Counter()
    paths: Counter[str] = Counter()
    digest, checksum = states.tensor_digest, files.TensorFile.checksum

    def count_tensor(tensor: torch.Tensor) -> str:
        tensors[id(tensor)] += 1
        return digest(tensor)

    def count_file(file: Any, path: Path, descriptor: int) -> str:
        paths[path.name] += 1
        return checksum(file, path, descriptor)

    monkeypatch.setattr(states, "tensor_digest", count_tensor)
    monkeypatch.setattr(key, "tensor_digest", count_tensor)
    monkeypatch.setattr(files.TensorFile, "checksum", count_file)
    return tensors, paths


def test_a_cache_is_opened_with_one_look_at_each_weight_byte_and_row(
    tmp_path: Path, digests: tuple[Counter[int], Counter[str]]
) -> None:
    model, rows = frozen_model("t5"), Counted(review_rows("t5", 100))
    given: dict[str, Any] = {"cache_dir": tmp_path, "progress": False}
    PrefixCache.build(model, rows, collator_for("t5", model), **given).close()
    tensors, paths = digests
    for counts in (tensors, paths, rows.reads):
        counts.clear()
    cache = PrefixCache.open(model, rows, collator_for("t5", model), **given)
    assert {tensors[id(tensor)] for tensor in cache.prefix.tensors().values()} == {1}
    assert paths == {path.name: 1 for path in cache.store.folder.glob("rows-*")}
    assert len(rows.reads) == len(rows)
    assert sum(count > 1 for count in rows.reads.values()) <= SAMPLED


def test_rows_are_read_once_for_cuts_with_the_decoder_and_without(tmp_path: Path) -> None:
    model, rows = frozen_model("t5"), Counted(review_rows("t5", 100))
    shallower = FreezePlan(encoder_blocks=2, decoder_blocks=0)
    prepared = PrefixCache.prepare(
        model, rows, collator_for("t5", model), cache_dir=tmp_path, also=[shallower], progress=False
    )
    assert sum(count > 1 for count in rows.reads.values()) <= SAMPLED
    prepared.build().close()
    thaw(model)
    freeze(model, shallower)
    with pytest.raises(FreezeError, match=r"opened at the cuts .*'encoder', 1.*prepared for .*Ask for one"):
        prepared.open([("encoder", 1)])
    opened = prepared.open([("encoder", 2)])
    assert opened.cuts == (("encoder", 2),)
    assert model(**opened.collator(review_rows("t5", 3))).loss.isfinite()
    assert opened.batches_used == 1


def test_the_report_stays_the_builds_when_rows_are_added(tmp_path: Path) -> None:
    model, rows = frozen_model("llama"), review_rows("llama")
    cache = PrefixCache.build(model, rows, collator_for("llama", model), cache_dir=tmp_path, progress=False)
    added = cache.add(review_rows("llama", 6, seed=5))
    assert (added.rows, added.computed_rows) == (6, 6)
    assert (cache.report.rows, cache.report.computed_rows) == (len(rows), len(rows))


def test_the_caches_of_a_folder_are_described_without_being_opened(tmp_path: Path) -> None:
    model, rows = frozen_model("llama"), review_rows("llama")
    PrefixCache.build(model, rows, collator_for("llama", model), cache_dir=tmp_path, progress=False).close()
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text("no JSON")
    whole, damaged = sorted(describe_caches(tmp_path), key=lambda cache: "damage" in cache)
    assert (whole["folder"], whole["rows"], whole["cuts"]) == (str(folder), len(rows), "decoder 3")
    assert whole["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert (damaged["rows"], damaged["model"]) == (None, "damaged")
    assert "cannot be read" in damaged["damage"]
