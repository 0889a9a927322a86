"""Draws what `lens` has measured, as PNG and SVG, readable in black and white.

A result is all that is needed: one that was read from JSON draws the same picture, without a model. Layers are counted
as in `lens`, and "in" is what enters block 0.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from functools import singledispatch
from pathlib import Path
from typing import Any

from hf_freeze.errors import FreezeError
from hf_freeze.lens import (
    ActivationMap,
    AttentionMap,
    BlockGradients,
    LayerSimilarity,
    LogitLens,
    WeightDrift,
)
from hf_freeze.plots import GREYS, plain_style, save_figure

__all__ = ["draw"]

MOST_TICKS = 16  # layers that get a number; more would touch
LEAST_CHANGE = 1e-3  # of CKA, at the top of the axis: less is no change to draw large
HATCH = "//"  # bars that are no block

Numbers = ActivationMap | AttentionMap | BlockGradients | LayerSimilarity | LogitLens | WeightDrift


def draw(numbers: Numbers, path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Draws what a function of `lens` returned.

    - similarity: CKA of layers as a heat map for each stack; of two models also how far the same layer differs, a line
    - drift: bars, hatched where a part is no block
    - gradients: the norm of each part's gradient, and the same relative to its weights
    - logit lens: how early the model's choice is made, and each layer's choice at the example's tokens
    - attention: a heat map for each head, rows look at columns, on a square-root scale
    - activations: the size of each token's state at each layer; logarithmic where sizes differ tenfold or more

    Args:
        numbers: The result, or one that its class read from JSON.
        path: Where, with or without an ending.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        FreezeError: Something else to draw, or no matplotlib.

    Example:
        >>> import tempfile
        >>> drift = WeightDrift(("embeddings", "decoder.0", "decoder.1"), (0.0, 0.01, 0.03))
        >>> [file.name for file in draw(drift, f"{tempfile.mkdtemp()}/drift")]
        ['drift.png', 'drift.svg']
    """
    with plain_style() as pyplot, warnings.catch_warnings():
        # A token in a script that the font lacks is drawn as a box, without a warning for each.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        return save_figure(_figure(numbers, pyplot), path)


@singledispatch
def _figure(numbers: Any, pyplot: Any) -> Any:
    raise FreezeError(
        f"A picture of a {type(numbers).__name__} was asked for; what the functions of hf_freeze.lens return can be "
        "drawn. From JSON, first use from_dict of the class of the result."
    )


@_figure.register
def _draw_similarity(similarity: LayerSimilarity, pyplot: Any) -> Any:
    square = [stack for stack, rows in similarity.cka.items() if similarity.compared and len(rows) == len(rows[0])]
    panels = len(similarity.cka) + bool(square)
    figure, axes = pyplot.subplots(1, panels, figsize=(4.6 * panels, 4.2), squeeze=False)
    for axis, (stack, rows) in zip(axes[0], similarity.cka.items(), strict=False):
        image = _heat_map(axis, rows, vmin=0.0, vmax=1.0, aspect="equal")
        _number_layers(axis.xaxis, len(rows[0]))
        _number_layers(axis.yaxis, len(rows))
        beside = "layer of the other model" if similarity.compared else "layer"
        axis.set(title=f"{stack}, {similarity.tokens[stack]:,} tokens", ylabel="layer", xlabel=beside)
        figure.colorbar(image, ax=axis, label="CKA (black: alike)", shrink=0.8)
    if square:
        axis = axes[0][-1]
        for stack in square:
            apart = [1.0 - row[layer] for layer, row in enumerate(similarity.cka[stack])]
            axis.plot(range(len(apart)), apart, label=stack, markersize=4)
        _number_layers(axis.xaxis, max(len(similarity.cka[stack]) for stack in square))
        axis.set_ylim(0.0, max(1.05 * axis.get_ylim()[1], LEAST_CHANGE))
        axis.set(title="the same layer in both models", xlabel="layer", ylabel="1 − CKA (0: unchanged)")
        if len(square) > 1:
            axis.legend()
    return figure


@_figure.register
def _draw_drift(drift: WeightDrift, pyplot: Any) -> Any:
    figure, axis = pyplot.subplots(figsize=(max(6.4, 0.22 * len(drift.parts)), 4.0))
    _bars(axis, drift.parts, drift.drift)
    axis.set(title="Drift from the pretrained weights", ylabel="‖w − w₀‖ / ‖w₀‖")
    return figure


@_figure.register
def _draw_gradients(gradients: BlockGradients, pyplot: Any) -> Any:
    batches = "1 batch" if gradients.batches == 1 else f"{gradients.batches} batches"
    figure, axes = pyplot.subplots(2, 1, figsize=(max(6.4, 0.22 * len(gradients.parts)), 6.0), sharex=True)
    _bars(axes[0], gradients.parts, gradients.norms)
    _bars(axes[1], gradients.parts, gradients.relative)
    axes[0].set(title=f"Gradient of the loss ({gradients.loss:.3g}), mean over {batches}", ylabel="‖g‖")
    axes[1].set(title="The same, relative to the part's weights", ylabel="‖g‖ / ‖w‖")
    return figure


@_figure.register
def _draw_logit_lens(lens: LogitLens, pyplot: Any) -> Any:
    layers, words = len(lens.agreement), len(lens.example)
    size = (max(6.4, 0.9 * words), 3.2 + 0.24 * layers)
    figure, (above, below) = pyplot.subplots(2, 1, figsize=size, height_ratios=(3.0, 0.24 * layers + 0.6))
    for label, values in (
        ("this layer's first choice is the model's", lens.agreement),
        ("and so is that of every layer above", lens.settled),
        ("mean probability of the model's choice", lens.probability),
    ):
        above.plot(range(layers), values, label=label, markersize=4)
    _number_layers(above.xaxis, layers)
    above.set(ylim=(0.0, 1.02), xlabel="layer", ylabel=f"mean over {lens.tokens:,} tokens")
    above.legend()
    image = _heat_map(below, lens.chances, vmin=0.0, vmax=1.0)
    _number_layers(below.yaxis, layers, every=1)
    below.set_xticks(range(words), [_shown(token) for token in lens.example], rotation=45, ha="right")
    for layer, (choices, chances) in enumerate(zip(lens.choices, lens.chances, strict=True)):
        for place, (choice, chance) in enumerate(zip(choices, chances, strict=True)):
            colour = "white" if chance > 0.55 else "black"
            weight = "bold" if choice == lens.choices[-1][place] else "normal"
            text = _shown(choice, most=10)
            below.text(place, layer, text, ha="center", va="center", color=colour, fontsize=7, fontweight=weight)
    read = "token that is read; in the cells what each layer would say next, bold: the model's choice"
    below.set(xlabel=read, ylabel="layer")
    figure.colorbar(image, ax=below, label="probability", shrink=0.6)
    return figure


@_figure.register
def _draw_attention(attention: AttentionMap, pyplot: Any) -> Any:
    from matplotlib.colors import PowerNorm

    heads = len(attention.weights)
    columns = min(heads, 3 if heads <= 9 else 4 if heads <= 16 else 8)
    lines = math.ceil(heads / columns)
    cell = 0.11 if columns < 8 else 0.08  # inches a token
    keys = [_shown(token, most=10) for token in attention.keys]
    queries = [_shown(token, most=10) for token in attention.queries]
    size = (columns * max(1.6, cell * len(keys)) + 1.8, lines * max(1.6, cell * len(queries) + 0.3) + 1.2)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, sharex=True, sharey=True)
    for head, axis in enumerate(axes.flat):
        if head >= heads:
            axis.set_visible(False)
            continue
        scale = PowerNorm(0.5, vmin=0.0, vmax=1.0)  # else a head at rest hides all that the others look at
        image = _heat_map(axis, attention.weights[head], norm=scale, origin="upper")
        axis.set_title(f"head {head}", fontsize=9)
        axis.set_xticks(range(len(keys)), keys, rotation=90, fontsize=60 * cell)
        axis.set_yticks(range(len(queries)), queries, fontsize=60 * cell)
        lowest = head + columns >= heads  # of its column, in a last row cut short too
        axis.tick_params(labelbottom=lowest)
    figure.colorbar(image, ax=axes, label="weight, on a square-root scale", ticks=(0.0, 0.05, 0.2, 0.5, 1.0), aspect=40)
    figure.suptitle(f"{attention.stack} block {attention.block}, {attention.kind}-attention: rows look at columns")
    return figure


@_figure.register
def _draw_activations(activations: ActivationMap, pyplot: Any) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    stacks = list(activations.rms)
    width = max(6.4, 0.17 * max(map(len, activations.tokens.values())))
    heights = [1.2 + 0.14 * len(activations.rms[stack]) for stack in stacks]
    size = (width, sum(heights) + 0.8 * len(stacks))
    figure, axes = pyplot.subplots(len(stacks), 1, figsize=size, squeeze=False, height_ratios=heights)
    for axis, stack in zip(axes[:, 0], stacks, strict=True):
        rows = activations.rms[stack]
        seen = [value for row in rows for value in row if value > 0]
        low, high = (min(seen), max(seen)) if seen else (1.0, 1.0)
        logarithmic = high >= 10 * low
        scale = LogNorm(low, high, clip=True) if logarithmic else Normalize(0.0, high)
        image = _heat_map(axis, rows, norm=scale)
        _number_layers(axis.yaxis, len(rows))
        tokens = [_shown(token, most=10) for token in activations.tokens[stack]]
        axis.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7)
        axis.set(title=f"{stack}: size of the states", ylabel="layer")
        figure.colorbar(image, ax=axis, label=f"root mean square{', logarithmic' * logarithmic}")
    return figure


# ------------------------------------------------------------------------------------------------------------- details


def _heat_map(axis: Any, rows: Any, *, origin: str = "lower", aspect: str = "auto", **scale: Any) -> Any:
    """Dark is much; row 0 is the lowest."""
    axis.grid(False)
    return axis.imshow(rows, cmap=GREYS, origin=origin, aspect=aspect, **scale)


def _number_layers(axis: Any, count: int, every: int | None = None) -> None:
    """Ticks at "in", 0, 1, ... ; the top block has always one."""
    step = every or math.ceil(count / MOST_TICKS)
    first = 1 if step == 1 else 1 + step  # "in" takes the room of block 0
    shown = [0, *range(first, count - 1, step), *([count - 1] if count > 1 else [])]
    if len(shown) > 2 and step > 1 and shown[-1] - shown[-2] < step:
        del shown[-2]
    axis.set_ticks(shown, ["in" if layer == 0 else str(layer - 1) for layer in shown])


def _bars(axis: Any, parts: Sequence[str], values: Sequence[float]) -> None:
    """One bar a part, blocks grey; each stack's shade differs. Where no bar is to be seen, its value is written."""
    stacks = list(dict.fromkeys(part.partition(".")[0] for part in parts if "." in part))
    for place, (part, value) in enumerate(zip(parts, values, strict=True)):
        stack, _, index = part.partition(".")
        face = ("0.35", "0.65")[stacks.index(stack) % 2] if index else "white"
        height = value if math.isfinite(value) else 0.0
        axis.bar(place, height, color=face, edgecolor="black", linewidth=0.6, hatch="" if index else HATCH)
        if not height:
            shown = "∞" if value else "0"
            axis.annotate(shown, (place, 0.0), (0, 1), textcoords="offset points", ha="center", fontsize=6)
    axis.set_axisbelow(True)
    axis.set_xticks(range(len(parts)), parts, rotation=90, fontsize=7)
    axis.grid(False, axis="x")
    axis.margins(x=0.01)
    if not any(value > 0.0 and math.isfinite(value) for value in values):
        axis.set_ylim(0.0, 1.0)


def _shown(token: str, most: int = 14) -> str:
    """A token as a label: what cannot be seen is made visible, and nothing in it is taken for mathematics.

    >>> _shown(" mug"), _shown("\\n"), _shown("$5"), _shown("incomprehensibly")
    ('mug', '⏎', '\\\\$5', 'incomprehensi…')
    """
    text = token.replace("\n", "⏎").replace("\t", "⇥").strip() or "␣"
    text = text if len(text) <= most else text[: most - 1] + "…"
    return text.replace("$", r"\$")
