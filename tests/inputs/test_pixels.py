"""Pixels that are not prepared as the pretrained model's were are told, with figures, and others pass in silence."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_freeze.errors import FreezeError
from hf_freeze.inputs.pixels import IMAGENET_MEAN, IMAGENET_STD, PixelFit, check_pixels

HALVES = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3, do_rescale=True, do_normalize=True)
IMAGENET = SimpleNamespace(image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD, do_rescale=True, do_normalize=True)
FRACTIONS = SimpleNamespace(image_mean=None, image_std=None, do_rescale=True, do_normalize=False)
BYTES = SimpleNamespace(image_mean=None, image_std=None, do_rescale=False, do_normalize=False)


def photos(seed: int = 0) -> torch.Tensor:
    """Fractions [8, 3, 16, 16], with black and white among them, as photographs have."""
    pixels = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    pixels[0, :, 0, 0], pixels[0, :, 0, 1] = 0.0, 1.0
    return pixels


def normalise(pixels: torch.Tensor, processor: Any = IMAGENET) -> torch.Tensor:
    mean, std = (torch.tensor(list(values)).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return (pixels - mean) / std


def fit_of(pixels: torch.Tensor, processor: Any = None, **given: Any) -> PixelFit:
    """The fit; a warning, and one only, goes with a problem."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = check_pixels(pixels, processor, **given)
    assert [str(one.message) for one in caught] == ([] if fit.fits else [f"check_pixels: {fit}"])
    assert all(one.filename == __file__ for one in caught), "the warning points at the caller"
    return fit


# ------------------------------------------------------------------------------------------------------ what is right


@pytest.mark.parametrize("processor", [None, IMAGENET, HALVES], ids=["none", "imagenet", "halves"])
def test_pixels_prepared_as_the_processor_says_fit(processor: Any) -> None:
    fit = fit_of(normalise(photos(), processor or IMAGENET), processor)
    assert fit.fits
    assert str(fit).endswith(": they fit")
    assert fit.low == pytest.approx(fit.allowed_low, rel=1e-5)
    assert fit.high == pytest.approx(fit.allowed_high, rel=1e-5)


def test_a_processor_that_takes_fractions_or_bytes_gets_them() -> None:
    assert fit_of(photos(), FRACTIONS).fits
    assert fit_of(photos() * 255, BYTES).fits


def test_the_figures_are_those_of_the_batch() -> None:
    pixels = normalise(photos())
    fit = fit_of(pixels)
    assert (fit.low, fit.high) == pytest.approx((float(pixels.min()), float(pixels.max())))
    assert fit.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-4, abs=1e-6)
    assert fit.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), rel=1e-4)


def test_resizing_may_overshoot_a_little() -> None:
    assert fit_of(normalise(photos() * 1.03 - 0.015)).fits


def test_drawings_on_black_and_on_white_fit() -> None:
    drawn = torch.zeros(8, 3, 16, 16)
    drawn[:, :, 6:9, 6:9] = 1.0
    assert fit_of(normalise(drawn)).fits
    assert fit_of(normalise(1 - drawn)).fits


def test_grey_images_with_their_own_mean_and_std_fit() -> None:
    assert fit_of((photos()[:, :1] - 0.13) / 0.31, mean=[0.13], std=[0.31]).fits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_too(dtype: torch.dtype) -> None:
    assert fit_of(normalise(photos()).to(dtype)).fits


def test_the_pixels_stay_as_they_are() -> None:
    pixels = normalise(photos()).requires_grad_()
    before = pixels.detach().clone()
    check_pixels(pixels)
    assert torch.equal(pixels, before)
    assert pixels.grad_fn is None


# ------------------------------------------------------------------------------------------------------ what is wrong


SLIPS = [
    pytest.param(photos() * 255, IMAGENET, r"they are bytes \(0\.\.255\); divided by 255 and normalised", id="bytes"),
    pytest.param((photos() * 255).byte(), IMAGENET, r"they are bytes .*do_rescale=True", id="integer bytes"),
    pytest.param(photos() * 255, FRACTIONS, r"they are bytes \(0\.\.255\); divided by 255, their mean", id="to divide"),
    pytest.param(photos(), IMAGENET, r"they are fractions \(0\.\.1\); normalised, .*do_normalize=True", id="fractions"),
    pytest.param(photos(), HALVES, r"they are fractions", id="fractions for halves"),
    pytest.param(photos(), BYTES, r"they are fractions \(0\.\.1\); the model takes bytes", id="fractions for bytes"),
    pytest.param(normalise(photos() * 255), IMAGENET, r"without being divided by 255 first", id="not divided"),
    pytest.param(normalise(normalise(photos())), IMAGENET, r"normalised twice, or by another mean", id="twice"),
    pytest.param(normalise(photos() / 255), IMAGENET, r"next to black; they were divided by 255 twice", id="black"),
    pytest.param(normalise(photos()), HALVES, r"normalised twice, or by another mean", id="imagenet for halves"),
    pytest.param(normalise(photos(), HALVES), IMAGENET, r"fill -1\.\.1 exactly.*0\.48, 0\.46", id="halves"),
]


@pytest.mark.parametrize(("pixels", "processor", "message"), SLIPS)
def test_each_slip_is_named_with_its_figures(pixels: torch.Tensor, processor: Any, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        fit = check_pixels(pixels, processor)
    assert not fit.fits
    assert f"pixels from {fit.low:.2f} to {fit.high:.2f}" in str(fit)


def test_what_the_figures_would_be_is_what_they_then_are() -> None:
    right = fit_of(normalise(photos()))
    wanted = "their mean would be (" + ", ".join(f"{value:.2f}" for value in right.mean) + ")"
    assert wanted in fit_of(photos()).problem
    assert wanted in fit_of(photos() * 255).problem


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.rand(3, 8, 8), r"shape \[3, 8, 8\]; it takes a batch .* use pixel_values\[None\]"),
        (torch.rand(2, 8, 8, 3), r"Channels stand last here: use pixel_values\.permute\(0, 3, 1, 2\)"),
        (torch.rand(2, 1, 8, 8), r"has 3 of them, the std 3\. Give the processor"),
        (torch.full((1, 3, 2, 2), float("nan")), r"not finite numbers\. Look for a division by zero"),
        (torch.zeros(0, 3, 8, 8), r"no image.*Give it the pixels of a few"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(pixels: torch.Tensor, message: str) -> None:
    with pytest.raises(FreezeError, match=message):
        check_pixels(pixels)


def test_a_std_of_zero_is_refused() -> None:
    with pytest.raises(FreezeError, match=r"std .*0\.00.* every one must be above 0"):
        check_pixels(photos(), std=[0.2, 0.0, 0.2])
