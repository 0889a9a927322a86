"""One digest of all rows of a dataset, which tells a resume, or whoever compares runs, whether they are the same rows.

By content alone: equal values in other containers are the same rows. What has no content to compare is named.
"""

from __future__ import annotations

import hashlib
import json
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PurePath
from typing import Any

import torch

from hf_freeze.processes import pulse

__all__ = ["data_digest"]

WORDED = (bytes, date, time, timedelta, PurePath, Decimal, Fraction, Enum, uuid.UUID, complex)  # whose text tells all
UNSURE = "so a resume cannot make sure that the rows are those of the run."


def data_digest(dataset: Any) -> str | None:
    """Digest of all rows in their order; None where they can only be iterated, or where nothing tells two rows apart.

    That is so where a row comes otherwise at each reading, as with random augmentation, and where it holds something
    that is neither a plain value, a tensor nor an image; a warning then names it.

    >>> data_digest([{"input_ids": [1, 2]}]) == data_digest([{"input_ids": torch.tensor([1, 2])}])
    True
    """
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__getitem__"):
        return None
    digest = hashlib.blake2b(digest_size=16)
    problem = ""
    for number in range(len(dataset)):
        pulse()
        try:
            row = _bytes_of(dataset[number])
            if number == 0 and row != _bytes_of(dataset[number]):
                problem = (
                    "The first row of the data comes otherwise at each reading, as with random augmentation; "
                    f"{UNSURE} See to it that they are."
                )
        except _NoContent as error:
            problem = (
                f"Row {number} of the data holds {error}, by whose content it cannot be told from another; {UNSURE} "
                "Hand out plain values, tensors or images."
            )
        if problem:
            warnings.warn(problem, stacklevel=2)
            return None
        digest.update(row)
    return digest.hexdigest()


class _NoContent(Exception):
    """What a row holds has no content that a digest could be taken of; the text names it and its column."""


def _bytes_of(value: Any, column: str = "") -> bytes:
    try:
        return json.dumps(value, sort_keys=True, default=_plain).encode()
    except (_NoContent, TypeError, ValueError, RecursionError) as error:
        if isinstance(value, Mapping) and not column:
            for name, inner in value.items():
                _bytes_of(inner, f" in column {name!r}")
        raise _NoContent(f"{error}{column}") from error


def _plain(value: Any) -> Any:
    """What stands for a value that is none of JSON's own."""
    if callable(getattr(value, "tolist", None)):
        return value.tolist()  # tensors, arrays and numbers of theirs
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(item, sort_keys=True, default=_plain) for item in value)
    if isinstance(value, WORDED):
        return str(value)
    if callable(getattr(value, "tobytes", None)) and hasattr(value, "mode") and hasattr(value, "size"):  # of PIL
        palette = value.getpalette() if callable(getattr(value, "getpalette", None)) else None
        return [value.mode, value.size, palette, hashlib.blake2b(value.tobytes(), digest_size=16).hexdigest()]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    raise _NoContent(f"a {type(value).__module__}.{type(value).__qualname__}")
