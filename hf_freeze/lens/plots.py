"""Draws what `lens` has measured: one function for each result, PNG and SVG, readable in black and white.

A result is all that is needed: one that was read from JSON draws the same picture, without a model. Layers are counted
as in `lens`, and "in" is what enters block 0.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_freeze.plots import GREYS, plain_style, save_figure

if TYPE_CHECKING:
    from hf_freeze.lens import (
        ActivationMap,
        AttentionMap,
        BlockGradients,
        LayerSimilarity,
        LogitLens,
        WeightDrift,
    )

__all__ = [
    "draw_activations",
    "draw_attention",
    "draw_drift",
    "draw_gradients",
    "draw_logit_lens",
    "draw_similarity",
]

Target = str | os.PathLike[str]

MOST_TICKS = 16  # layers that get a number; more would touch
LEAST_CHANGE = 1e-3  # of CKA, at the top of the axis: less is no change to draw large
HATCH = "//"  # bars that are no block


def draw_similarity(similarity: LayerSimilarity, path: Target) -> tuple[Path, Path]:
    """Draws CKA of layers as a heat map for each stack, and how far the same layer of two models differs as a line.

    Args:
        similarity: What `layer_similarity` returned.
        path: Where, with or without an ending.

    Returns:
        The paths of the PNG and the SVG.

    Example:
        >>> import tempfile
        >>> from hf_freeze.lens import LayerSimilarity
        >>> similarity = LayerSimilarity({"decoder": ((1.0, 0.4), (0.4, 1.0))}, {"decoder": 900}, compared=False)
        >>> [file.name for file in draw_similarity(similarity, f"{tempfile.mkdtemp()}/similarity")]
        ['similarity.png', 'similarity.svg']
    """
    square = [stack for stack, rows in similarity.cka.items() if similarity.compared and len(rows) == len(rows[0])]
    with _drawing() as pyplot:
        panels = len(similarity.cka) + bool(square)
        figure, axes = pyplot.subplots(1, panels, figsize=(4.6 * panels, 4.2), squeeze=False)
        for axis, (stack, rows) in zip(axes[0], similarity.cka.items(), strict=False):
            image = axis.imshow(rows, cmap=GREYS, vmin=0.0, vmax=1.0, origin="lower")
            axis.grid(False)
            _number_layers(axis.xaxis, len(rows[0]))
            _number_layers(axis.yaxis, len(rows))
            axis.set_title(f"{stack}, {similarity.tokens[stack]:,} tokens")
            axis.set_ylabel("layer")
            axis.set_xlabel("layer of the other model" if similarity.compared else "layer")
            figure.colorbar(image, ax=axis, label="CKA (black: alike)", shrink=0.8)
        if square:
            axis = axes[0][-1]
            for stack in square:
                apart = [1.0 - row[layer] for layer, row in enumerate(similarity.cka[stack])]
                axis.plot(range(len(apart)), apart, label=stack, markersize=4)
            _number_layers(axis.xaxis, max(len(similarity.cka[stack]) for stack in square))
            axis.set_ylim(0.0, max(1.05 * axis.get_ylim()[1], LEAST_CHANGE))
            axis.set_title("the same layer in both models")
            axis.set_xlabel("layer")
            axis.set_ylabel("1 − CKA (0: unchanged)")
            if len(square) > 1:
                axis.legend()
        return save_figure(figure, path)


def draw_drift(drift: WeightDrift, path: Target) -> tuple[Path, Path]:
    """Draws how far each part is from its pretrained weights, as bars; parts that are no block are hatched.

    Args:
        drift: What `weight_drift` returned.
        path: Where, with or without an ending.

    Returns:
        The paths of the PNG and the SVG.

    Example:
        >>> import tempfile
        >>> from hf_freeze.lens import WeightDrift
        >>> drift = WeightDrift(("embeddings", "decoder.0", "decoder.1"), (0.0, 0.01, 0.03))
        >>> draw_drift(drift, f"{tempfile.mkdtemp()}/drift")[0].name
        'drift.png'
    """
    with _drawing() as pyplot:
        figure, axis = pyplot.subplots(figsize=(max(6.4, 0.22 * len(drift.parts)), 4.0))
        _bars(axis, drift.parts, drift.drift)
        axis.set_ylabel("‖w − w₀‖ / ‖w₀‖")
        axis.set_title("Drift from the pretrained weights")
        return save_figure(figure, path)


def draw_gradients(gradients: BlockGradients, path: Target) -> tuple[Path, Path]:
    """Draws the gradient's norm of each part, and the same relative to the part's weights.

    Args:
        gradients: What `block_gradients` returned.
        path: Where, with or without an ending.

    Returns:
        The paths of the PNG and the SVG.

    Example:
        >>> import tempfile
        >>> from hf_freeze.lens import BlockGradients
        >>> gradients = BlockGradients(("decoder.0", "head"), (0.3, 0.2), (3.0, 4.0), loss=2.1, batches=4)
        >>> draw_gradients(gradients, f"{tempfile.mkdtemp()}/gradients")[0].name
        'gradients.png'
    """
    batches = "1 batch" if gradients.batches == 1 else f"{gradients.batches} batches"
    with _drawing() as pyplot:
        figure, axes = pyplot.subplots(2, 1, figsize=(max(6.4, 0.22 * len(gradients.parts)), 6.0), sharex=True)
        _bars(axes[0], gradients.parts, gradients.norms)
        _bars(axes[1], gradients.parts, gradients.relative)
        axes[0].set_ylabel("‖g‖")
        axes[1].set_ylabel("‖g‖ / ‖w‖")
        axes[0].set_title(f"Gradient of the loss ({gradients.loss:.3g}), mean over {batches}")
        axes[1].set_title("The same, relative to the part's weights")
        return save_figure(figure, path)


def draw_logit_lens(lens: LogitLens, path: Target) -> tuple[Path, Path]:
    """Draws how early the model's choice is made, and each layer's choice at the example's tokens.

    Args:
        lens: What `logit_lens` returned.
        path: Where, with or without an ending.

    Returns:
        The paths of the PNG and the SVG.

    Example:
        >>> import tempfile
        >>> from hf_freeze.lens import LogitLens
        >>> lens = LogitLens("decoder", (0.1, 1.0), (0.1, 1.0), (0.2, 0.6), 50, ("Good",), ((" a",), (" mug",)),
        ...     ((0.1,), (0.6,)))
        >>> draw_logit_lens(lens, f"{tempfile.mkdtemp()}/lens")[0].name
        'lens.png'
    """
    layers, words = len(lens.agreement), len(lens.example)
    with _drawing() as pyplot:
        size = (max(6.4, 0.9 * words), 3.2 + 0.24 * layers)
        figure, (above, below) = pyplot.subplots(2, 1, figsize=size, height_ratios=(3.0, 0.24 * layers + 0.6))
        for label, values in (
            ("this layer's first choice is the model's", lens.agreement),
            ("and so is that of every layer above", lens.settled),
            ("mean probability of the model's choice", lens.probability),
        ):
            above.plot(range(layers), values, label=label, markersize=4)
        _number_layers(above.xaxis, layers)
        above.set_ylim(0.0, 1.02)
        above.set_xlabel("layer")
        above.set_ylabel(f"mean over {lens.tokens:,} tokens")
        above.legend()
        image = below.imshow(lens.chances, cmap=GREYS, vmin=0.0, vmax=1.0, origin="lower", aspect="auto")
        below.grid(False)
        _number_layers(below.yaxis, layers, every=1)
        below.set_xticks(range(words), [_shown(token) for token in lens.example], rotation=45, ha="right")
        for layer, (choices, chances) in enumerate(zip(lens.choices, lens.chances, strict=True)):
            for place, (choice, chance) in enumerate(zip(choices, chances, strict=True)):
                colour = "white" if chance > 0.55 else "black"
                weight = "bold" if choice == lens.choices[-1][place] else "normal"
                text = _shown(choice, most=10)
                below.text(place, layer, text, ha="center", va="center", color=colour, fontsize=7, fontweight=weight)
        below.set_ylabel("layer")
        below.set_xlabel("token that is read; in the cells what each layer would say next, bold: the model's choice")
        figure.colorbar(image, ax=below, label="probability", shrink=0.6)
        return save_figure(figure, path)


def draw_attention(attention: AttentionMap, path: Target) -> tuple[Path, Path]:
    """Draws a heat map for each head of a block: rows look at columns.

    Args:
        attention: What `attention_map` returned.
        path: Where, with or without an ending.

    Returns:
        The paths of the PNG and the SVG.

    Example:
        >>> import tempfile
        >>> from hf_freeze.lens import AttentionMap
        >>> one = ((1.0, 0.0), (0.7, 0.3))
        >>> attention = AttentionMap("decoder", 3, "self", ("Good", " mug"), ("Good", " mug"), (one, one))
        >>> draw_attention(attention, f"{tempfile.mkdtemp()}/attention")[0].name
        'attention.png'
    """
    heads = len(attention.weights)
    columns = min(heads, 3 if heads <= 9 else 4 if heads <= 16 else 8)
    lines = math.ceil(heads / columns)
    cell = 0.11 if columns < 8 else 0.08  # inches a token
    keys = [_shown(token, most=10) for token in attention.keys]
    queries = [_shown(token, most=10) for token in attention.queries]
    with _drawing() as pyplot:
        from matplotlib.colors import PowerNorm

        size = (columns * max(1.6, cell * len(keys)) + 1.8, lines * max(1.6, cell * len(queries) + 0.3) + 1.2)
        figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, sharex=True, sharey=True)
        for head, axis in enumerate(axes.flat):
            axis.grid(False)
            if head >= heads:
                axis.set_visible(False)
                continue
            scale = PowerNorm(0.5, vmin=0.0, vmax=1.0)  # else a head at rest hides all that the others look at
            image = axis.imshow(attention.weights[head], cmap=GREYS, norm=scale, aspect="auto")
            axis.set_title(f"head {head}", fontsize=9)
            axis.set_xticks(range(len(keys)), keys, rotation=90, fontsize=60 * cell)
            axis.set_yticks(range(len(queries)), queries, fontsize=60 * cell)
            lowest = head + columns >= heads  # of its column, in a last row cut short too
            axis.tick_params(labelbottom=lowest)
        figure.colorbar(
            image, ax=axes, label="weight, on a square-root scale", ticks=(0.0, 0.05, 0.2, 0.5, 1.0), aspect=40
        )
        figure.suptitle(f"{attention.stack} block {attention.block}, {attention.kind}-attention: rows look at columns")
        return save_figure(figure, path)


def draw_activations(activations: ActivationMap, path: Target) -> tuple[Path, Path]:
    """Draws the size of each token's state at each layer as a heat map for each stack.

    The scale is logarithmic where the sizes differ by a factor of ten or more.

    Args:
        activations: What `activation_map` returned.
        path: Where, with or without an ending.

    Returns:
        The paths of the PNG and the SVG.

    Example:
        >>> import tempfile
        >>> from hf_freeze.lens import ActivationMap
        >>> activations = ActivationMap({"decoder": ("Good", " mug")}, {"decoder": ((0.1, 0.1), (900.0, 1.2))})
        >>> draw_activations(activations, f"{tempfile.mkdtemp()}/activations")[0].name
        'activations.png'
    """
    stacks = list(activations.rms)
    width = max(6.4, 0.17 * max(map(len, activations.tokens.values())))
    heights = [1.2 + 0.14 * len(activations.rms[stack]) for stack in stacks]
    with _drawing() as pyplot:
        from matplotlib.colors import LogNorm, Normalize

        size = (width, sum(heights) + 0.8 * len(stacks))
        figure, axes = pyplot.subplots(len(stacks), 1, figsize=size, squeeze=False, height_ratios=heights)
        for axis, stack in zip(axes[:, 0], stacks, strict=True):
            rows = activations.rms[stack]
            seen = [value for row in rows for value in row if value > 0]
            low, high = (min(seen), max(seen)) if seen else (1.0, 1.0)
            logarithmic = high >= 10 * low
            scale = LogNorm(low, high, clip=True) if logarithmic else Normalize(0.0, high)
            image = axis.imshow(rows, cmap=GREYS, norm=scale, origin="lower", aspect="auto")
            axis.grid(False)
            _number_layers(axis.yaxis, len(rows))
            tokens = [_shown(token, most=10) for token in activations.tokens[stack]]
            axis.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7)
            axis.set_ylabel("layer")
            axis.set_title(f"{stack}: size of the states")
            figure.colorbar(image, ax=axis, label=f"root mean square{', logarithmic' * logarithmic}")
        return save_figure(figure, path)


# ------------------------------------------------------------------------------------------------------------- details


@contextmanager
def _drawing() -> Iterator[Any]:
    """The plain style; a token in a script that the font lacks is drawn as a box, without a warning for each."""
    with plain_style() as pyplot, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        yield pyplot


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
