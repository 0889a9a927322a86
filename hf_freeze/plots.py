"""One plain style for every picture: lines and marks that can be told apart without colour, as PNG and as SVG.

What is drawn, and from which numbers, is the business of the rooms that call it; this one knows nothing of models.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from hf_freeze.errors import FreezeError
from hf_freeze.files import write_whole

__all__ = ["GREYS", "MARKS", "NOT_DRAWN", "can_draw", "plain_style", "save_figure", "svg_of"]

NOT_DRAWN = "matplotlib, which draws them, is not installed (pip install 'hf_freeze[plots]')"

# Told apart by dash, mark and lightness; the colours (Okabe and Ito's) are for those who see them.
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREYS = "Greys"  # for heat maps: light is little
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


def can_draw() -> bool:
    """Whether matplotlib is installed; a picture that is an extra to something else is left out where it is not."""
    return importlib.util.find_spec("matplotlib") is not None


@contextmanager
def plain_style() -> Iterator[Any]:
    """Draws what the block makes with `pyplot` in the plain style; yields pyplot. Nothing global stays changed.

    Works without a screen. Needs matplotlib: `pip install 'hf_freeze[plots]'`.

    Raises:
        FreezeError: matplotlib is not installed.

    Example:
        >>> with plain_style() as pyplot:
        ...     figure, axes = pyplot.subplots()
        ...     line = axes.plot([1, 2], [3, 4], label="loss")
        >>> figure.get_size_inches().tolist()
        [6.4, 4.0]
    """
    try:
        import matplotlib
        from cycler import cycler
        from matplotlib import pyplot
    except ImportError as error:
        raise FreezeError(
            "A picture was asked for; matplotlib, which draws it, is not installed. "
            "Use `pip install 'hf_freeze[plots]'`, or the function that returns the numbers."
        ) from error
    settings: Any = {
        "figure.figsize": (6.4, 4.0),
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.w_pad": 0.1,  # inches: labels keep off the edge
        "figure.constrained_layout.h_pad": 0.08,
        "figure.max_open_warning": 0,
        "savefig.dpi": 150,
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "0.9",
        "legend.frameon": False,
        "image.cmap": GREYS,
        "svg.hashsalt": "hf_freeze",  # the same picture gives the same file
        "axes.prop_cycle": cycler(color=_COLOURS, linestyle=_DASHES, marker=MARKS[: len(_COLOURS)]),
    }
    with matplotlib.rc_context(settings):
        yield pyplot


def save_figure(figure: Any, path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Writes a figure as PNG and SVG, each whole or not at all, and closes it; returns both paths.

    Args:
        figure: A matplotlib figure.
        path: Where, with either ending or none: `out/pareto` gives out/pareto.png and out/pareto.svg.

    Example:
        >>> import tempfile
        >>> with plain_style() as pyplot:
        ...     figure, axes = pyplot.subplots()
        ...     png, svg = save_figure(figure, f"{tempfile.mkdtemp()}/empty.png")
        >>> png.name, svg.name
        ('empty.png', 'empty.svg')
    """
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".png", ".svg") else path
    stem.parent.mkdir(parents=True, exist_ok=True)
    png, svg = (stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg"))
    content = BytesIO()
    figure.savefig(content, format="png")
    write_whole(png, content.getvalue())
    write_whole(svg, svg_of(figure))
    return png, svg


def svg_of(figure: Any) -> bytes:
    """A figure as an SVG file, the same bytes for the same figure; closes it."""
    from matplotlib import pyplot

    content = BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return content.getvalue()
