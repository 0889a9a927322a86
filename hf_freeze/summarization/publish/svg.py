"""Small charts as inline SVG, for a page that must open without a network and in the dark.

Colours are the page's: every mark carries a class (`line`, `mark`, `bar`) and the number of its series (`s0`, `s1`),
and CSS does the rest. Series differ by dash and by shape too. For pictures as files, `hf_freeze.plots` is the room.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Interval", "Line", "bar_chart", "interval_chart", "line_chart", "nice_ticks"]

WIDTH, HEIGHT = 460, 280  # of a chart's own units: narrow enough that its text is readable on a telephone
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 46, 44
SERIES = 4  # that can be told apart; a fifth looks like the first
DASHES = ("", "6 4", "2 3", "8 3 2 3")
CORNERS: tuple[tuple[tuple[float, float], ...], ...] = (
    (),  # a circle
    ((-3.2, -3.2), (3.2, -3.2), (3.2, 3.2), (-3.2, 3.2)),
    ((0.0, -4.2), (3.9, 3.2), (-3.9, 3.2)),
    ((0.0, -4.5), (4.5, 0.0), (0.0, 4.5), (-4.5, 0.0)),
)


@dataclass(frozen=True)
class Line:
    """A named series of (x, y) points, in the order of x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Interval:
    """A named value with the ends of its interval, which are None where there is none."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover a range: steps of 1, 2 or 5 times a power of ten, about `count` of them.

    >>> nice_ticks(0.0, 9.3)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    >>> nice_ticks(2.31, 3.87)
    [2.0, 2.5, 3.0, 3.5, 4.0]
    >>> nice_ticks(3.0, 3.0)
    [2.5, 3.0, 3.5]
    """
    if high <= low:
        low, high = low - 0.5, high + 0.5
        count = 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1.0, 2.0, 5.0, 10.0) if size * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def line_chart(title: str, lines: Sequence[Line], *, x_label: str, y_label: str) -> str:
    """Lines with a mark at each point that has room, a legend above them. Points that are not finite are left out.

    >>> chart = line_chart("Loss", [Line("training", [(1, 3.0), (2, 2.5)])], x_label="step", y_label="loss")
    >>> chart.startswith("<svg"), chart.count("<circle"), "http" in chart
    (True, 3, False)
    """
    kept = [
        Line(line.name, [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]) for line in lines
    ]
    points = [point for line in kept for point in line.points]
    if not points:
        return ""
    frame = _Frame.around([x for x, _ in points], [y for _, y in points])
    parts = [frame.draw(x_label, y_label), _legend([line.name for line in kept])]
    for number, line in enumerate(kept):
        places = [(frame.x(x), frame.y(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line s{number % SERIES}" points="{path}"{_dash(number)}/>')
        every = max(1, len(places) // 40)  # more marks than that would hide the line
        for (x, y), (at, value) in list(zip(places, line.points, strict=True))[::every]:
            parts.append(_mark(number, x, y, f"{line.name}, {x_label} {_number(at)}: {_number(value)}"))
    return _svg(title, HEIGHT, parts)


def interval_chart(title: str, groups: Sequence[tuple[str, Sequence[Interval]]], *, x_label: str) -> str:
    """Groups of values one below the other, each a mark on its interval, with the number beside it; from 0 on.

    >>> chart = interval_chart("ROUGE", [("ROUGE-1", [Interval("after", 30.0, 28.0, 32.0)])], x_label="F1")
    >>> chart.count("<title>"), ">30.0<" in chart
    (2, True)
    """
    rows = [interval for _, intervals in groups for interval in intervals]
    if not rows:
        return ""
    names = list(dict.fromkeys(interval.name for interval in rows))
    ticks = nice_ticks(0.0, max(1.0, *(max(row.value, row.high or 0.0) for row in rows)))
    left, step, gap = 106, 17, 12
    top = TOP - 22  # no label above the axis
    height = top + len(rows) * step + len(groups) * gap + BOTTOM
    foot = height - BOTTOM
    scale = (WIDTH - left - RIGHT - 34) / ticks[-1]
    parts = [_legend(names, dashed=False)]
    for tick in ticks:
        x = left + tick * scale
        parts += [_grid(x, top, x, foot), _text("tick", x, foot + 16, _number(tick), "middle")]
    parts.append(_text("axis", left + ticks[-1] * scale / 2, height - 8, x_label, "middle"))
    y: float = top
    for group, intervals in groups:
        y += gap
        parts.append(_text("name", left - 10, y + (len(intervals) - 1) * step / 2 + 4, group, "end"))
        for row in intervals:
            number, end = names.index(row.name), row.value
            tip = f"{group}, {row.name}: {row.value:.1f}"
            if row.low is not None and row.high is not None:
                end = row.high
                tip += f" [{row.low:.1f}, {row.high:.1f}]"
                parts.append(_stroke(number, left + row.low * scale, y, left + row.high * scale, y, dashed=False))
            parts.append(_mark(number, left + row.value * scale, y, tip))
            parts.append(_text("value", left + end * scale + 8, y + 4, f"{row.value:.1f}"))
            y += step
    return _svg(title, height, parts)


def bar_chart(
    title: str, bars: Sequence[tuple[int, float]], *, first: int, x_label: str, y_label: str, below: str = ""
) -> str:
    """Bars at whole numbers from `first` on; places without a bar are empty, and `below` says why the lowest are.

    >>> chart = bar_chart("Drift", [(2, 0.1), (3, 0.4)], first=0, x_label="block", y_label="drift", below="frozen")
    >>> chart.count("<rect"), ">frozen<" in chart
    (3, True)
    """
    bars = [(place, height) for place, height in bars if math.isfinite(height)]
    if not bars:
        return ""
    lowest, last = min(place for place, _ in bars), max(place for place, _ in bars)
    first = min(first, lowest)
    ticks = nice_ticks(0.0, max(height for _, height in bars) or 1.0, 4)
    frame = _Frame(first - 0.5, last + 0.5, 0.0, ticks[-1], (), ticks)
    slot = frame.x(1.0) - frame.x(0.0)
    parts = [frame.draw(x_label, y_label)]
    if first < lowest:
        start, end = frame.x(first - 0.5), frame.x(lowest - 0.5)
        parts.append(_box("band", start, TOP, end - start, HEIGHT - TOP - BOTTOM))
        parts.append(_text("note", (start + end) / 2, (TOP + HEIGHT - BOTTOM) / 2, below, "middle"))
    for place, height in bars:
        y = frame.y(height)
        tip = f"{x_label} {place}: {_number(height)}"
        parts.append(_box("bar", frame.x(place) - 0.35 * slot, y, 0.7 * slot, HEIGHT - BOTTOM - y, tip))
    every = max(1, math.ceil(26 / slot))  # as many numbers as have room
    for place in range(last, first - 1, -every):
        parts.append(_text("tick", frame.x(place), HEIGHT - BOTTOM + 16, str(place), "middle"))
    return _svg(title, HEIGHT, parts)


@dataclass(frozen=True)
class _Frame:
    """The axes of a chart: values to places."""

    left: float
    right: float
    bottom: float
    top: float
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]

    @classmethod
    def around(cls, xs: Sequence[float], ys: Sequence[float]) -> _Frame:
        """Axes that hold these points; the horizontal one ends where they do."""
        y_ticks = nice_ticks(min(ys), max(ys))
        left, right = min(xs), max(xs)
        if left == right:
            left, right = left - 0.5, right + 0.5
        x_ticks = [tick for tick in nice_ticks(left, right) if left <= tick <= right]
        return cls(left, right, y_ticks[0], y_ticks[-1], x_ticks, y_ticks)

    def x(self, value: float) -> float:
        return LEFT + (value - self.left) / (self.right - self.left) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.bottom) / (self.top - self.bottom) * (HEIGHT - TOP - BOTTOM)

    def draw(self, x_label: str, y_label: str) -> str:
        parts = []
        for tick in self.y_ticks:
            y = self.y(tick)
            parts += [_grid(LEFT, y, WIDTH - RIGHT, y), _text("tick", LEFT - 7, y + 4, _number(tick), "end")]
        parts += [_text("tick", self.x(tick), HEIGHT - BOTTOM + 16, _number(tick), "middle") for tick in self.x_ticks]
        parts.append(_text("axis", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "middle"))
        parts.append(_text("axis", LEFT, TOP - 10, y_label, "start"))
        return "".join(parts)


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    name = escape(title)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{name}">'
        f"<title>{name}</title>{''.join(parts)}</svg>"
    )


def _legend(names: Sequence[str], *, dashed: bool = True) -> str:
    parts, x = [], 4.0
    for number, name in enumerate(names):
        parts += [_stroke(number, x, 10, x + 26, 10, dashed=dashed), _mark(number, x + 13, 10)]
        parts.append(_text("name", x + 32, 14, name))
        x += 54 + 6.6 * len(name)
    return "".join(parts)


def _text(kind: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _grid(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _stroke(number: int, x1: float, y1: float, x2: float, y2: float, *, dashed: bool) -> str:
    return (
        f'<line class="line s{number % SERIES}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        f"{_dash(number) if dashed else ''}/>"
    )


def _box(kind: str, x: float, y: float, width: float, height: float, tip: str = "") -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">{_tip(tip)}</rect>'


def _mark(number: int, x: float, y: float, tip: str = "") -> str:
    """A circle, square, triangle or diamond, so that colour is not needed; hovering shows the numbers."""
    kind = f'class="mark s{number % SERIES}"'
    corners = CORNERS[number % SERIES]
    if not corners:
        return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="3.5">{_tip(tip)}</circle>'
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon {kind} points="{path}">{_tip(tip)}</polygon>'


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def _dash(number: int) -> str:
    dash = DASHES[number % SERIES]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _number(value: float) -> str:
    """Up to four digits, no trailing zeros.

    >>> _number(2.50), _number(1200.0), _number(0.00123)
    ('2.5', '1200', '0.00123')
    """
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
