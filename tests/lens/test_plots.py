"""A picture is drawn from its numbers alone, whatever the model's shape and the words in it."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_freeze.errors import FreezeError
from hf_freeze.lens import (
    ActivationMap,
    AttentionMap,
    BlockGradients,
    LayerSimilarity,
    LogitLens,
    WeightDrift,
)
from hf_freeze.lens.plots import draw

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


CASES: dict[str, Any] = {
    "one block": similarity(decoder=2, compared=False),
    "two stacks": similarity(encoder=5, decoder=5),
    "eighty blocks": similarity(decoder=81),
    "other depth": LayerSimilarity({"decoder": shares(5, 3)}, {"decoder": 40}, True),
    "unchanged": LayerSimilarity({"decoder": ((1.0, 0.2), (0.2, 1.0))}, {"decoder": 40}, True),
    "unlike": LayerSimilarity({"decoder": ((-0.1, 0.2), (0.2, -0.2))}, {"decoder": 4}, True),
    "drift": WeightDrift(parts(3, 4), shares(10)),
    "no drift": WeightDrift(parts(0, 2), (0.0,) * 5),
    "one part": WeightDrift(("decoder.0",), (0.1,)),
    "gradients": BlockGradients(parts(0, 30), shares(33), shares(33), 2.0, 3),
    "no weights": BlockGradients(("decoder.0", "head"), (0.2, 0.1), (1.0, 0.0), 2.0, 1),
    "lens": lens(5, STRANGE),
    "lens, one token": lens(2, ("a",)),
    "attention": AttentionMap("decoder", 3, "cross", STRANGE[:3], STRANGE, shares(4, 3, 8)),
    "many heads": AttentionMap("decoder", 0, "self", STRANGE, STRANGE, shares(13, 8, 8)),
    "one token": AttentionMap("decoder", 0, "self", ("a",), ("a",), (((1.0,),),)),
    "activations": ActivationMap({"decoder": STRANGE}, {"decoder": shares(3, 8)}),
    "two sizes": ActivationMap(
        {"encoder": ("a",), "decoder": STRANGE}, {"encoder": ((0.0,), (1.0,)), "decoder": shares(3, 8)}
    ),
    "no size": ActivationMap({"decoder": ("a",)}, {"decoder": ((0.0,), (0.0,))}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_picture_is_drawn_as_png_and_svg_without_a_warning(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png, svg = draw(CASES[name], tmp_path / "picture")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert svg.read_text().rstrip().endswith("</svg>")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["picture.png", "picture.svg"]


@pytest.mark.parametrize("name", CASES)
def test_numbers_that_were_json_are_the_same(name: str) -> None:
    numbers = CASES[name]
    assert type(numbers).from_dict(json.loads(json.dumps(numbers.to_dict()))) == numbers


def test_the_same_numbers_draw_the_same_picture(tmp_path: Path) -> None:
    first, second = (draw(CASES["activations"], tmp_path / name) for name in ("first", "second"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_gradient_without_weights_is_infinite_and_still_drawn(tmp_path: Path) -> None:
    numbers = CASES["no weights"]
    assert numbers.relative == (0.2, math.inf)
    assert draw(numbers, tmp_path / "picture")[1].read_text().count("<!-- ∞ -->") == 1


def test_an_unchanged_part_is_marked_as_zero(tmp_path: Path) -> None:
    svg = draw(WeightDrift(("decoder.0", "decoder.1"), (0.0, 0.2)), tmp_path / "picture")[1].read_text()
    assert svg.count("<!-- 0 -->") == 1


def test_what_was_not_measured_here_is_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(FreezeError, match=r"A picture of a dict was asked for; .* first use from_dict"):
        draw({"parts": ["decoder.0"], "drift": [0.1]}, tmp_path / "picture")  # type: ignore[arg-type]
