"""Chooses the precision of training and generation for the device at hand, with the reason.

On a CPU the choice is measured, in milliseconds: with avx512_bf16 or AMX a bf16 product is several times faster,
without them it is slower than fp32.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from hf_freeze.errors import FreezeError
from hf_freeze.machine import find_device

__all__ = ["Precision", "choose_precision"]

CHOICES = ("auto", "fp32", "bf16")
WORTH = 1.3  # a smaller gain is eaten by casting the weights at every step


@dataclass(frozen=True)
class Precision:
    """A precision, "fp32" or "bf16", and why it was chosen."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def choose_precision(asked: str = "auto", device: torch.device | str | None = None) -> Precision:
    """The precision to train in, and the reason.

    Args:
        asked: "fp32" or "bf16" are taken as they are; "auto" chooses.
        device: Where training runs; None is the accelerator if there is one, else the CPU.

    Raises:
        FreezeError: An unknown precision.

    Example:
        >>> print(choose_precision("fp32"))
        fp32: asked for
    """
    if asked not in CHOICES:
        raise FreezeError(f"precision={asked!r} was asked for; it is one of {', '.join(map(repr, CHOICES))}.")
    if asked != "auto":
        return Precision(asked, "asked for")
    device = find_device() if device is None else torch.device(device)
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", f"{torch.cuda.get_device_name(device)} computes in bf16")
        return Precision("fp32", f"{torch.cuda.get_device_name(device)} has no bf16")
    if device.type != "cpu":
        return Precision("fp32", f"not known to be faster in bf16 on {device.type}")
    gain = _product_seconds(torch.float32) / _product_seconds(torch.bfloat16)
    if gain >= WORTH:
        return Precision("bf16", f"this CPU multiplies matrices {gain:.2g}x as fast in bf16 as in fp32")
    return Precision("fp32", f"this CPU multiplies matrices only {gain:.2g}x as fast in bf16 as in fp32")


def _product_seconds(dtype: torch.dtype, size: int = 512, times: int = 7) -> float:
    """The shortest of several matrix products: the least disturbed by whatever else the machine does."""
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    left @ right  # the first one sets up the kernel
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return min(seconds)
