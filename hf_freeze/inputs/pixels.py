"""Whether pixels are what a pretrained image model was trained on: the pitfall "input does not match the model".

A model that saw normalised pixels learns next to nothing from raw ones, and nothing fails. `check_pixels` compares a
batch with the range that its image processor's mean and standard deviation allow, and warns with figures. It changes
no pixel and loads nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_freeze.errors import FreezeError

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "PixelFit", "check_pixels"]

# Of RGB in 0..1 over ImageNet's training images: what torchvision's models and most of the hub's were trained with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

SLACK = 0.02  # of the range: what resizing and rounding may overshoot it by
BYTES = 255.0


@dataclass(frozen=True)
class PixelFit:
    """What `check_pixels` found: the batch's statistics beside those that its normalisation allows.

    Attributes:
        low, high: Least and greatest value of the batch.
        mean, std: Over the batch, for each channel.
        allowed_low, allowed_high: Where a black and a white pixel lie after normalisation, over all channels.
        problem: What is wrong, and what to do; "" where nothing is.
    """

    low: float
    high: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    allowed_low: float
    allowed_high: float
    problem: str = ""

    @property
    def fits(self) -> bool:
        """Whether nothing speaks against the pixels."""
        return not self.problem

    def __str__(self) -> str:
        found = (
            f"pixels from {self.low:.2f} to {self.high:.2f}, mean {_figures(self.mean)}, std {_figures(self.std)}; "
            f"normalised ones lie between {self.allowed_low:.2f} and {self.allowed_high:.2f}"
        )
        return f"{found}: {self.problem or 'they fit'}"


def check_pixels(
    pixel_values: torch.Tensor,
    processor: Any = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> PixelFit:
    """Checks that a batch of pixels is normalised as the model's were. Changes nothing; warns where it is not.

    A normalised pixel is (p - mean) / std with p in 0..1, so it lies in a known range, and a batch of several images
    has some pixels darker than the mean. Told by that: bytes (0..255), plain fractions (0..1), a step left out or
    taken twice, and a mean and std of 0.5 where others are expected. Give a batch of several images: a single one may
    be all bright.

    Args:
        pixel_values: [rows, channels, height, width], as the model gets them.
        processor: The model's image processor, for its image_mean, image_std, do_rescale and do_normalize.
        mean, std: Of each channel in 0..1, instead of a processor; by default ImageNet's.

    Returns:
        The figures and the problem, "" for none; a value that prints itself.

    Raises:
        FreezeError: Not four dimensions, no image, other channels than the mean has, a value that is not finite, or
            a std that is not above 0.

    Example:
        >>> fractions = torch.linspace(0, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
        >>> mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
        >>> check_pixels((fractions - mean) / std).fits
        True
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     print(check_pixels(fractions))  # doctest: +ELLIPSIS
        pixels from 0.00 to 1.00, ... normalised ones lie between -2.12 and 2.64: they are fractions (0..1); ...
    """
    if pixel_values.dim() != 4:
        raise FreezeError(
            f"check_pixels was given pixel_values of shape {list(pixel_values.shape)}; it takes a batch "
            "[rows, channels, height, width]. For one image use pixel_values[None]."
        )
    rescaled, normalised = getattr(processor, "do_rescale", True), getattr(processor, "do_normalize", True)
    wanted = tuple(mean if mean is not None else getattr(processor, "image_mean", None) or IMAGENET_MEAN)
    spread = tuple(std if std is not None else getattr(processor, "image_std", None) or IMAGENET_STD)
    channels = pixel_values.shape[1]
    if not normalised:
        wanted, spread = (0.0,) * channels, (1.0,) * channels
    if channels != len(wanted) or channels != len(spread):
        last = " Channels stand last here: use pixel_values.permute(0, 3, 1, 2)." * (
            pixel_values.shape[-1] == len(wanted)
        )
        raise FreezeError(
            f"check_pixels was given pixel_values of shape {list(pixel_values.shape)}; the second size is the "
            f"channels, and the mean {_figures(wanted)} has {len(wanted)} of them, the std {len(spread)}.{last} Give "
            "the processor of the model, or mean= and std= of its channels."
        )
    if min(spread) <= 0:
        raise FreezeError(f"check_pixels was given the std {_figures(spread)}; every one must be above 0.")
    if not pixel_values.numel():
        raise FreezeError("check_pixels was given a batch with no image in it. Give it the pixels of a few.")
    pixels = pixel_values.detach().double()
    if not pixels.isfinite().all():
        raise FreezeError("check_pixels was given pixels that are not finite numbers. Look for a division by zero.")
    means, stds = _column(wanted, pixels), _column(spread, pixels)
    white = 1.0 if rescaled or normalised else BYTES  # of a processor that does neither, the model takes bytes
    fit = PixelFit(
        low=float(pixels.min()),
        high=float(pixels.max()),
        mean=tuple(pixels.mean((0, 2, 3)).tolist()),
        std=tuple(pixels.std((0, 2, 3), correction=0).tolist()),
        allowed_low=float((-means / stds).min()),
        allowed_high=float(((white - means) / stds).max()),
    )
    problem = _problem(pixels, fit, means, stds, white)
    if not problem:
        return fit
    fit = replace(fit, problem=problem)
    warnings.warn(f"check_pixels: {fit}", stacklevel=2)
    return fit


def _problem(pixels: torch.Tensor, fit: PixelFit, means: torch.Tensor, stds: torch.Tensor, white: float) -> str:
    """What the statistics say against the batch; "" where nothing does."""
    width = fit.allowed_high - fit.allowed_low
    normalises = bool((means != 0).any() or (stds != 1).any())
    if fit.low >= 0 and fit.high > max(1.5, fit.allowed_high + SLACK * width):
        step = "divided by 255 and normalised" if normalises else "divided by 255"
        return (
            f"they are bytes (0..255); {step}, {_after(pixels / BYTES, means, stds)}. Let the image processor prepare "
            "them (do_rescale=True)."
        )
    if fit.high > fit.allowed_high + width and fit.low >= fit.allowed_low - SLACK * width:  # far up, but not down
        return (
            "they were normalised without being divided by 255 first. Rescale them to 0..1 before the mean is taken "
            "off (do_rescale=True)."
        )
    low, high = -means / stds, (white - means) / stds
    slack = SLACK * (high - low)
    if bool(((pixels < low - slack) | (pixels > high + slack)).any()):
        return (
            "some lie outside; they were normalised twice, or by another mean and std. Let one image processor prepare "
            "them, that of the pretrained model."
        )
    if white == BYTES and fit.low >= 0 and fit.high <= 1:
        return "they are fractions (0..1); the model takes bytes (0..255). Leave out the division by 255."
    if normalises and fit.low >= 0 and fit.high <= 1 and bool((means > 0).all()):
        return (
            f"they are fractions (0..1); normalised, {_after(pixels, means, stds)}. Let the image processor prepare "
            "them (do_normalize=True)."
        )
    if white == 1.0 and bool((pixels <= low + (high - low) / 100).all()):
        return (
            "all of them are next to black; they were divided by 255 twice. Leave one of the two out (give the image "
            "processor bytes, or do_rescale=False)."
        )
    halves = bool((means == 0.5).all() and (stds == 0.5).all())
    if normalises and not halves and abs(fit.low + 1) < 1e-3 and abs(fit.high - 1) < 1e-3:
        return (
            "they fill -1..1 exactly, as after a mean and std of 0.5; the model expects the mean "
            f"{_figures(means.flatten().tolist())} and the std {_figures(stds.flatten().tolist())}. Use its own image "
            "processor."
        )
    return ""


def _after(fractions: torch.Tensor, means: torch.Tensor, stds: torch.Tensor) -> str:
    """Words for the batch's mean and std once it is normalised."""
    normalised = (fractions - means) / stds
    mean, std = normalised.mean((0, 2, 3)), normalised.std((0, 2, 3), correction=0)
    return f"their mean would be {_figures(mean.tolist())} and their std {_figures(std.tolist())}"


def _column(values: Sequence[float], pixels: torch.Tensor) -> torch.Tensor:
    """One value a channel, to compute with [rows, channels, height, width]."""
    return torch.tensor(values, dtype=pixels.dtype, device=pixels.device).view(-1, 1, 1)


def _figures(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.2f}" for value in values) + ")"
