"""What a figure was measured on, and the greatest memory that a stretch of work takes."""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["device_name", "peak_bytes", "reset_peak", "status_bytes"]


def device_name(device: torch.device) -> str:
    """The name of an accelerator or of the CPU.

    >>> bool(device_name(torch.device("cpu")))
    True
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    named = (line.partition(": ")[2] for line in cpuinfo if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def reset_peak(device: torch.device) -> None:
    """Starts counting anew: what was freed before is given back first, so that it does not count.

    On Linux the kernel's high-water mark is reset through /proc/self/clear_refs; elsewhere nothing is measured on a
    CPU.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(AttributeError):  # glibc alone has it
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The greatest memory since `reset_peak`, in bytes; the imports' own share is in it on a CPU. 0 where unknown.

    Example:
        >>> device = torch.device("cpu")
        >>> reset_peak(device)
        >>> tensor = torch.ones(25_000_000)
        >>> peak_bytes(device) > 100_000_000 or sys.platform != "linux"
        True
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status_bytes("VmHWM")


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, such as VmRSS, in bytes; 0 where there is none."""
    lines = Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
