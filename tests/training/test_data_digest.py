"""Rows are told apart by their content alone, whatever holds it; where they have none, that is said."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchEncoding

from hf_freeze.training import data_digest as room
from hf_freeze.training.data_digest import data_digest


def test_rows_that_can_only_be_iterated_have_no_digest() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([1])

        def __len__(self) -> int:
            return 1

    assert data_digest(iter([1])) is None
    assert data_digest(Stream()) is None
    assert data_digest([{"a": [1]}]) != data_digest([{"a": [2]}])


def image(level: int, mode: str = "L", size: tuple[int, int] = (4, 3)) -> Any:
    return Image.new(mode, size, level)


@dataclass
class Pair:
    first: Any
    second: Any = None


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (BatchEncoding({"ids": torch.arange(5000)}), BatchEncoding({"ids": torch.arange(5000)}),
         BatchEncoding({"ids": torch.arange(5000).roll(1)})),
        ({"a": {"x", "y", "z"}}, {"a": {"z", "y", "x"}}, {"a": {"x", "y"}}),
        (Pair(b"1", date(2020, 1, 2)), Pair(b"1", date(2020, 1, 2)), Pair(b"1", date(2020, 1, 3))),
        ({"a": np.array([1, "x"], dtype=object)}, {"a": [1, "x"]}, {"a": [1, "y"]}),
        *(({"image": image(3), "label": 1}, {"image": image(3), "label": 1}, {"image": other, "label": 1})
          for other in (image(4), image(3, "P"), image(3, "RGB"), image(3, size=(3, 4)))),
        ({"images": [image(3)]}, {"images": [image(3)]}, {"images": [image(4)]}),
    ],
)  # fmt: skip
def test_rows_of_all_kinds_have_a_digest_of_their_content(one: Any, same: Any, other: Any) -> None:
    assert data_digest([one]) == data_digest([same]) != data_digest([other])
    assert data_digest([one]) is not None


def test_rows_without_content_have_no_digest_and_are_named() -> None:
    with pytest.warns(
        UserWarning, match=r"Row 1 of the data holds a builtins\.object in column 'audio', by whose content"
    ):
        assert data_digest([{"audio": [1]}, {"audio": [object()], "label": 1}]) is None
    with pytest.warns(UserWarning, match=r"Row 0 of the data holds .* not supported between .* in column 'a'"):
        assert data_digest([{"a": {1: 2, "b": 3}}]) is None

    class Augmented(list[Any]):
        def __getitem__(self, key: Any) -> Any:
            return {"pixels": torch.rand(4)}

    with pytest.warns(UserWarning, match=r"The first row of the data comes otherwise at each reading"):
        assert data_digest(Augmented([1, 2])) is None


def test_ranks_hear_of_each_other_while_the_rows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(room, "pulse", lambda: told.append(1))
    data_digest([{"input_ids": [number]} for number in range(5)])
    assert len(told) == 5
