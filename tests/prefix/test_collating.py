"""Collators and rows that no cache can be built from are declined by a sentence; too little memory halves a batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening, DataCollatorWithPadding

from hf_freeze import PrefixCache
from hf_freeze.errors import CannotCache
from hf_freeze.prefix import build as build_room
from hf_freeze.prefix.rows import _restart, read_rows
from tests.prefix.cases import collator_for, frozen_model, padding_tokenizer, review_rows

ROWS = review_rows("llama", 8)


def build(tmp_path: Path, rows: Any = ROWS, collator: Any = None, **given: Any) -> PrefixCache:
    return PrefixCache.build(frozen_model("llama"), rows, collator, cache_dir=tmp_path, progress=False, **given)


def padded(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return dict(collator_for("llama", None)(features))  # type: ignore[arg-type]


def joined(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Documents in one row without a mask, as in a packed dataset: positions tell where the next one begins."""

    def flat(key: str) -> torch.Tensor:
        return torch.tensor([[value for row in features for value in row[key]]])

    positions = [place for row in features for place in range(len(row["input_ids"]))]
    return {"input_ids": flat("input_ids"), "labels": flat("labels"), "position_ids": torch.tensor([positions])}


def in_pairs(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return padded([row for row in features for _ in range(2)])


# ----------------------------------------------------------------------------------------------------------- collators


def test_a_collator_that_makes_two_rows_of_each_is_declined(tmp_path: Path) -> None:
    with pytest.raises(CannotCache, match=r"a collator that makes 2 rows of 1 \(row 0\), such as pairs"):
        build(tmp_path, collator=in_pairs)


def test_a_collator_that_makes_two_rows_of_some_is_declined(tmp_path: Path) -> None:
    def some(features: list[dict[str, Any]]) -> Any:
        return padded(features) if len(features) == 1 else in_pairs(features)

    with pytest.raises(CannotCache, match=r"a collator that makes 16 rows of 8 \(row 0 first\)"):
        build(tmp_path, collator=some)


@pytest.mark.parametrize("collator", [joined, DataCollatorWithFlattening(return_flash_attn_kwargs=True)])
def test_packing_is_declined_by_its_name(collator: Any, tmp_path: Path) -> None:
    with pytest.raises(CannotCache, match=r"asked for packing \(packing=True, padding_free=True, flattening\)"):
        build(tmp_path, collator=collator)


def test_rows_that_were_packed_before_are_declined_by_its_name(tmp_path: Path) -> None:
    packed = [{"input_ids": joined(ROWS[n : n + 2])["input_ids"][0].tolist(),
               "position_ids": joined(ROWS[n : n + 2])["position_ids"][0].tolist()} for n in (0, 2, 4)]  # fmt: skip

    def one_by_one(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([row[name] for row in features]) for name in features[0]}

    with pytest.raises(CannotCache, match=r"asked for packing .*: position_ids begin again within row 0"):
        build(tmp_path, packed, one_by_one)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_padding_are_no_packing(side: str, tmp_path: Path) -> None:
    """Left: 0 0 0 1 2; right: 0 1 2 0 0, or 1 as transformers fills it; whichever, with a mask or without."""
    tokenizer = padding_tokenizer("llama")
    tokenizer.padding_side = side

    def collator(features: list[dict[str, Any]]) -> Any:
        batch = tokenizer.pad({"input_ids": [row["input_ids"] for row in features]}, return_tensors="pt", padding=True)
        mask = batch["attention_mask"]
        return {**batch, "position_ids": (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)}

    build(tmp_path, [{"input_ids": row["input_ids"]} for row in ROWS], collator).close()
    one = {"input_ids": torch.tensor([[5, 6, 7, 0, 0]]), "position_ids": torch.tensor([[0, 1, 2, 0, 0]])}
    for place in (one, {**one, "position_ids": torch.tensor([[0, 0, 0, 1, 2]])}):
        rows = read_rows(place, with_target=False)
        assert _restart(place, rows) is None
    again = {**one, "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    assert _restart(again, read_rows(again, with_target=False)) == 0


def test_a_collator_that_fails_is_told_with_its_row_and_error(tmp_path: Path) -> None:
    def collator(features: list[dict[str, Any]]) -> Any:
        if features[0] is ROWS[5]:
            raise KeyError("label")
        return padded(features)

    with pytest.raises(CannotCache, match=r"a collator that fails on row 5: KeyError: 'label'\. Give the") as told:
        build(tmp_path, collator=collator)
    assert isinstance(told.value.__cause__, KeyError)


def test_a_row_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    class Broken(list[Any]):
        def __getitem__(self, key: Any) -> Any:
            if key == 3:
                raise OSError("cannot identify image file")
            return super().__getitem__(key)

    with pytest.raises(CannotCache, match=r"Row 3 of the dataset .* cannot be read: OSError: cannot identify image"):
        build(tmp_path, Broken(ROWS), padded)


TEXTS = [{"review": f"Mug {n}.", "summary": "Good."} for n in range(4)]


@pytest.mark.parametrize(
    ("rows", "collator", "message"),
    [
        (TEXTS, None, r"not tokenized: row 0 holds text or nothing in 'review', 'summary'.* Tokenize the rows first"),
        (Dataset.from_list(TEXTS), None, r"not tokenized: row 0 holds text or nothing in 'review', 'summary'"),
        ([{"input_ids": None, "review": "Mug."}] * 3, None, r"text or nothing in 'input_ids', 'review'"),
        (TEXTS, DataCollatorWithPadding(padding_tokenizer("llama")), r"a collator that fails on row 0: .*Give the"),
        (ROWS, None, r"the default one pads nothing: column 'input_ids' holds 6 to 17 values a row.*Padding"),
        ([{"input_ids": [1, 2], "score": n or None} for n in range(3)][::-1], None,
         r"the default one makes no tensor of column 'score' \(NoneType and int\)\. Fill its gaps"),
        ([{"input_ids": [1, 2, 3], "label": "good"}] * 3, None, r"makes no tensor of column 'label' \(str\)"),
        ([{"input_ids": [[1, 2], [3]]}] * 3, None, r"the default one cannot collate these rows"),
    ],
)  # fmt: skip
def test_rows_without_a_collator_that_fits_name_the_column(
    rows: Any, collator: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CannotCache, match=message):
        build(tmp_path, rows, collator)


# -------------------------------------------------------------------------------------------------------------- memory


def memory_for(rows: int, error: Exception) -> tuple[Callable[..., Any], list[int]]:
    """The pass of a device that holds so many rows at once, and how many it was given."""
    original, given = build_room.capture, []

    def capture(model: Any, prefix: Any, batch: Any) -> Any:
        given.append(len(batch["input_ids"]))
        if given[-1] > rows:
            raise error
        return original(model, prefix, batch)

    return capture, given


SHORT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
]


@pytest.mark.parametrize(
    "error", [SHORT[0], *(pytest.param(error, marks=pytest.mark.slow) for error in SHORT[1:])],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_where_memory_is_short_the_pass_goes_on_with_smaller_batches(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row for row in review_rows("llama", 40) if len(row["input_ids"]) == 11] + ROWS
    plain = build(tmp_path / "plain", rows, padded, token_budget=100)
    capture, given = memory_for(2, error)
    monkeypatch.setattr(build_room, "capture", capture)
    cache = build(tmp_path / "short", rows, padded, token_budget=100)
    refused = [count for count in given if count > 2]
    assert refused, "or nothing was short"
    assert len(refused) <= 3, "the budget stays halved"
    assert cache.report.rows == plain.report.rows == len(rows)
    for digest in plain.store._place:
        for name, states in plain.store.read(digest).items():
            torch.testing.assert_close(cache.store.read(digest)[name], states, rtol=1e-5, atol=1e-6)


def test_memory_too_small_for_one_row_is_told_with_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capture, given = memory_for(0, SHORT[0])
    monkeypatch.setattr(build_room, "capture", capture)
    message = r"too small for the prefix of row \d alone, \d+ tokens: OutOfMemoryError: CUDA out of memory"
    with pytest.raises(CannotCache, match=message) as told:
        build(tmp_path, collator=padded)
    assert given[-1] == 1
    assert isinstance(told.value.__cause__, torch.OutOfMemoryError)


def test_another_error_of_the_model_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capture, given = memory_for(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    monkeypatch.setattr(build_room, "capture", capture)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        build(tmp_path, collator=padded)
    assert len(given) == 1


# -------------------------------------------------------------------------------------------------------------- misses


def test_a_short_epoch_of_misses_warns_at_its_end(tmp_path: Path) -> None:
    cache = build(tmp_path, collator=padded)
    model = cache.model.train()
    for start in range(0, 6, 2):
        model(**padded(ROWS[start : start + 2]))
    with pytest.warns(UserWarning, match="The first 4 training batches hold rows that are not in the prefix cache"):
        model(**padded(ROWS[6:]))
    model(**padded(ROWS[:2]))  # it is said once
    cache.close()


def test_a_training_that_ends_before_its_first_epoch_warns_when_the_cache_is_closed(tmp_path: Path) -> None:
    cache = build(tmp_path, collator=padded)
    cache.model.train()(**padded(ROWS[:2]))
    with pytest.warns(UserWarning, match="The first training batch holds rows that are not in the prefix cache"):
        cache.close()


def test_one_batch_from_the_cache_is_enough_not_to_warn(tmp_path: Path) -> None:
    cache = build(tmp_path, collator=padded)
    model = cache.model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(12):
            rows = ROWS[2 * (number % 4) :][:2]
            model(**(cache.collator(rows) if number == 3 else padded(rows)))
        with torch.no_grad():
            model.eval()(**padded(ROWS))
        cache.close()
    assert (cache.batches_used, cache.batches_unused) == (1, 11)
