"""A picture is drawn from its numbers alone, whatever the model's shape and the words in it."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_freeze.lens import (
    ActivationMap,
    AttentionMap,
    BlockGradients,
    LayerSimilarity,
    LogitLens,
    WeightDrift,
)
from hf_freeze.lens.plots import (
    draw_activations,
    draw_attention,
    draw_drift,
    draw_gradients,
    draw_logit_lens,
    draw_similarity,
)

STRANGE = ("$x^2", " good", "\n", "价格", "<b>", "", "incomprehensibility", "&")


def shares(*shape: int) -> Any:
    values = torch.rand(*shape, generator=torch.Generator().manual_seed(0)).double()
    values = values / values.sum(-1, keepdim=True) if len(shape) == 3 else values

    def nested(value: Any) -> Any:
        return tuple(map(nested, value)) if isinstance(value, list) else value

    return nested(values.tolist())


def parts(encoder: int, decoder: int) -> tuple[str, ...]:
    blocks = [f"encoder.{index}" for index in range(encoder)] + [f"decoder.{index}" for index in range(decoder)]
    return ("embeddings", *blocks, "final", "head")


def similarity(compared: bool = True, **layers: int) -> LayerSimilarity:
    return LayerSimilarity({name: shares(n, n) for name, n in layers.items()}, dict.fromkeys(layers, 900), compared)


def lens(layers: int, tokens: tuple[str, ...]) -> LogitLens:
    curves = [shares(layers) for _ in range(3)]
    return LogitLens("decoder", *curves, 1234, tokens, (tokens,) * layers, shares(layers, len(tokens)))


CASES: dict[str, tuple[Callable[..., tuple[Path, Path]], Any]] = {
    "one block": (draw_similarity, similarity(decoder=2, compared=False)),
    "two stacks": (draw_similarity, similarity(encoder=5, decoder=5)),
    "eighty blocks": (draw_similarity, similarity(decoder=81)),
    "other depth": (draw_similarity, LayerSimilarity({"decoder": shares(5, 3)}, {"decoder": 40}, True)),
    "unchanged": (draw_similarity, LayerSimilarity({"decoder": ((1.0, 0.2), (0.2, 1.0))}, {"decoder": 40}, True)),
    "unlike": (draw_similarity, LayerSimilarity({"decoder": ((-0.1, 0.2), (0.2, -0.2))}, {"decoder": 4}, True)),
    "drift": (draw_drift, WeightDrift(parts(3, 4), shares(10))),
    "no drift": (draw_drift, WeightDrift(parts(0, 2), (0.0,) * 5)),
    "one part": (draw_drift, WeightDrift(("decoder.0",), (0.1,))),
    "gradients": (draw_gradients, BlockGradients(parts(0, 80), shares(83), shares(83), 2.0, 3)),
    "no weights": (draw_gradients, BlockGradients(("decoder.0", "head"), (0.2, 0.1), (1.0, 0.0), 2.0, 1)),
    "lens": (draw_logit_lens, lens(5, STRANGE)),
    "lens, one token": (draw_logit_lens, lens(2, ("a",))),
    "attention": (draw_attention, AttentionMap("decoder", 3, "cross", STRANGE[:3], STRANGE, shares(4, 3, 8))),
    "many heads": (draw_attention, AttentionMap("decoder", 0, "self", STRANGE, STRANGE, shares(13, 8, 8))),
    "one token": (draw_attention, AttentionMap("decoder", 0, "self", ("a",), ("a",), (((1.0,),),))),
    "activations": (draw_activations, ActivationMap({"decoder": STRANGE}, {"decoder": shares(3, 8)})),
    "two sizes": (
        draw_activations,
        ActivationMap({"encoder": ("a",), "decoder": STRANGE}, {"encoder": ((0.0,), (1.0,)), "decoder": shares(3, 8)}),
    ),
    "no size": (draw_activations, ActivationMap({"decoder": ("a",)}, {"decoder": ((0.0,), (0.0,))})),
}


@pytest.mark.parametrize("name", CASES)
def test_a_picture_is_drawn_as_png_and_svg_without_a_warning(name: str, tmp_path: Path) -> None:
    draw, numbers = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png, svg = draw(numbers, tmp_path / "picture")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert svg.read_text().rstrip().endswith("</svg>")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["picture.png", "picture.svg"]


@pytest.mark.parametrize("name", ["two stacks", "drift", "gradients", "lens", "attention", "activations"])
def test_numbers_that_were_json_draw_the_same_picture(name: str, tmp_path: Path) -> None:
    draw, numbers = CASES[name]
    again = type(numbers).from_dict(json.loads(json.dumps(numbers.to_dict())))
    first, second = draw(numbers, tmp_path / "first"), draw(again, tmp_path / "second")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_gradient_without_weights_is_infinite_and_still_drawn(tmp_path: Path) -> None:
    _, numbers = CASES["no weights"]
    assert numbers.relative == (0.2, math.inf)
    assert draw_gradients(numbers, tmp_path / "picture")[1].read_text().count("<!-- ∞ -->") == 1


def test_an_unchanged_part_is_marked_as_zero(tmp_path: Path) -> None:
    svg = draw_drift(WeightDrift(("decoder.0", "decoder.1"), (0.0, 0.2)), tmp_path / "picture")[1].read_text()
    assert svg.count("<!-- 0 -->") == 1
