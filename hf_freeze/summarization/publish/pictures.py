"""The pictures of a run: its losses, its ROUGE with intervals, how far the trained blocks moved.

Each function returns a matplotlib figure in the plain style of the `plain_style` block that it is called in, or None
where there is nothing to draw. Values that are not finite are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_freeze.plots import MARKS

__all__ = ["Interval", "Points", "draw_bars", "draw_intervals", "draw_lines", "read_curve"]

Points = Sequence[tuple[float, float]]
Interval = tuple[float, float | None, float | None]  # a value and the ends of its interval

SIZE = (5.0, 3.2)  # inches; small enough that the text can be read on a telephone
MOST_MARKS = 40  # of a line; more would hide it


def read_curve(log: Sequence[Mapping[str, Any]], key: str) -> Points:
    """What Trainer's log holds under a key, as (step, value).

    >>> read_curve([{"step": 1, "loss": 3.0}, {"step": 2, "eval_loss": 2.5}, {"loss": 9.0}], "loss")
    [(1, 3.0)]
    """
    return [(entry["step"], entry[key]) for entry in log if key in entry and "step" in entry]


def draw_lines(pyplot: Any, curves: Mapping[str, Points], *, y_label: str) -> Any | None:
    """Lines over steps, one a name, with a legend."""
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in curves.items()}
    if not any(finite.values()):
        return None
    figure, axes = pyplot.subplots(figsize=SIZE)
    for name, points in finite.items():
        if points:
            every = max(1, len(points) // MOST_MARKS)
            axes.plot(*zip(*points, strict=True), label=name, markersize=4, markevery=every)
    axes.set(xlabel="step", ylabel=y_label)
    axes.legend()
    return figure


def draw_intervals(pyplot: Any, groups: Mapping[str, Mapping[str, Interval]], *, x_label: str) -> Any | None:
    """Groups of named values one below the other, each a mark on its interval with the number beside it; from 0 on."""
    if not groups:
        return None
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    step = len(names) + 1
    figure, axes = pyplot.subplots(figsize=(SIZE[0], 0.9 + 0.17 * step * len(groups)))
    for number, name in enumerate(names):
        rows = [(at * step + number, group[name]) for at, group in enumerate(groups.values()) if name in group]
        values = [value for _, (value, _, _) in rows]
        ends = [(value if low is None else low, value if high is None else high) for _, (value, low, high) in rows]
        widths = [[value - low for value, (low, _) in zip(values, ends, strict=True)],
                  [high - value for value, (_, high) in zip(values, ends, strict=True)]]  # fmt: skip
        axes.errorbar(values, [y for y, _ in rows], xerr=widths, label=name, ls="none", marker=MARKS[number], ms=4)
        for (y, (value, _, _)), (_, high) in zip(rows, ends, strict=True):
            beside = {"textcoords": "offset points", "va": "center", "fontsize": 8}
            axes.annotate(f"{value:.1f}", (high, y), (6, 0), **beside)
    axes.set_yticks([at * step + (len(names) - 1) / 2 for at in range(len(groups))], list(groups))
    axes.set(xlabel=x_label, xlim=(0.0, max(1.0, 1.12 * axes.get_xlim()[1])))
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    figure.legend(loc="outside upper left", ncols=len(names))
    return figure


def draw_bars(pyplot: Any, bars: Mapping[int, float], *, x_label: str, y_label: str, below: str) -> Any | None:
    """Bars at whole numbers from 0 on; `below` says why the lowest have none."""
    finite = {number: value for number, value in sorted(bars.items()) if math.isfinite(value)}
    if not finite:
        return None
    figure, axes = pyplot.subplots(figsize=SIZE)
    axes.bar(list(finite), list(finite.values()), width=0.7, color="0.35")
    lowest, highest = min(finite), max(finite)
    if lowest > 0:
        axes.axvspan(-0.5, lowest - 0.5, color="0.92", linewidth=0)
        axes.text(lowest / 2 - 0.5, 0.5, below, ha="center", va="center", transform=axes.get_xaxis_transform())
    axes.set(xlabel=x_label, ylabel=y_label, xlim=(-0.5, highest + 0.5))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(False, axis="x")
    return figure
