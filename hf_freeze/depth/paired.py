"""Compares two models on the same rows: the difference of each row, and how sure its mean is, by the bootstrap.

Rows differ far more from one another than models do. An interval of each model's own holds that spread, and calls more
models equal the fewer rows there are; the differences do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["PairedDifference", "compare_rows"]

DRAWS = 1000  # of the bootstrap
MOST_AT_ONCE = 1_000_000  # numbers that are drawn: 8 MB
TAIL = 0.05  # beyond each end of the interval


class PairedDifference(NamedTuple):
    """By how much one model's rows exceed another's.

    Attributes:
        mean: Over the rows.
        error: The standard error of `mean`.
        low: 95 % of the bootstrap's means lie above it.
        high: 95 % of them lie below it.
        on_every_row: Whether the one exceeds the other on every single row.
    """

    mean: float
    error: float
    low: float
    high: float
    on_every_row: bool


def compare_rows(
    one: Sequence[float], other: Sequence[float], weights: Sequence[float] | None = None
) -> PairedDifference:
    """The difference `one` - `other` over rows that both were measured on.

    Args:
        one: Of each row, in the same order as `other`; with weights its sum, such as a loss summed over labels.
        other: As `one`.
        weights: What the sums are divided by, such as the numbers of labels; None is 1 each.

    "Bootstrap Methods: Another Look at the Jackknife" (Efron, 1979); whole rows are drawn, by the same seed each time.

    >>> compare_rows([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    PairedDifference(mean=1.0, error=0.0, low=1.0, high=1.0, on_every_row=True)
    """
    difference = np.subtract(one, other)
    parts = np.ones(len(difference)) if weights is None else np.asarray(weights)
    generator = np.random.default_rng(0)
    drawn: list[float] = []
    while left := DRAWS - len(drawn):  # some at a time: the memory does not grow with the rows
        rows = generator.integers(0, len(parts), (min(left, max(1, MOST_AT_ONCE // len(parts))), len(parts)))
        drawn += (difference[rows].sum(axis=1) / parts[rows].sum(axis=1)).tolist()
    low, high = np.quantile(drawn, [TAIL, 1 - TAIL])
    mean = float(difference.sum() / parts.sum())
    return PairedDifference(mean, float(np.std(drawn)), float(low), float(high), bool((difference > 0).all()))
