"""Which device is there, what a figure was measured on (cores, memory, versions), and the greatest memory of some work.

No other file asks torch for accelerators: what it names first is what its build is for, there or not.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hf_freeze.errors import FreezeError
from hf_freeze.tables import count_text
from hf_freeze.version import __version__

__all__ = [
    "Hardware",
    "cpu_cores",
    "device_name",
    "find_accelerators",
    "find_device",
    "library_versions",
    "missing_accelerator",
    "peak_bytes",
    "read_hardware",
    "reset_peak",
    "status_bytes",
]

CLEAR_REFS = Path("/proc/self/clear_refs")
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "peft", "safetensors", "tokenizers")


@dataclass(frozen=True)
class Hardware:
    """The devices of a run.

    Attributes:
        device: The model name of the accelerator, or of the CPU where there is none.
        devices: How many of them worked.
        cores: CPU cores that the run might use.
        memory_bytes: Memory of one accelerator, or of the machine; None where it is not told.

    Example:
        >>> print(Hardware("GPU", devices=2, cores=16, memory_bytes=80_000_000_000))
        2 x GPU (80.0 GB each), 16 CPU cores
    """

    device: str
    devices: int
    cores: int
    memory_bytes: int | None = None

    def __str__(self) -> str:
        many = self.devices > 1
        size = f" ({count_text(self.memory_bytes, 'B')}{' each' if many else ''})" if self.memory_bytes else ""
        count = f"{self.devices} x " if many else ""
        return f"{count}{self.device}{size}, {self.cores} CPU core{'s' * (self.cores > 1)}"

    def to_dict(self) -> dict[str, Any]:
        """The values, JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Hardware:
        """What `to_dict` gave; what an earlier version wrote beside it, an assumed power, is left out."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


def find_accelerators() -> list[torch.device]:
    """The accelerators that this process may use, by their index; none where the build of torch alone is for some.

    >>> all(device.index == index for index, device in enumerate(find_accelerators()))
    True
    """
    if not torch.accelerator.is_available():  # the next line names what is not there, or raises in torch 2.6
        return []
    kind = torch.accelerator.current_accelerator()
    return [] if kind is None else [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]


def find_device(asked: str | None = None) -> torch.device:
    """The device to work on: the one that is asked for, else the accelerator that is there, else the CPU.

    Args:
        asked: Such as "cpu", "cuda" or "cuda:1"; None or "" leaves the choice.

    Returns:
        The device. An accelerator that was not asked for by its index has none: it is the current one of its kind.

    Raises:
        FreezeError: What is asked for is not there.

    Example:
        >>> print(find_device("cpu"))
        cpu
    """
    accelerators = find_accelerators()
    names = [*{device.type: None for device in accelerators}, "cpu", *map(str, accelerators)]
    if asked and asked not in names:
        missing = missing_accelerator()
        reason = f" ({missing})" if missing else ""
        raise FreezeError(f"device {asked!r} was asked for; found: {', '.join(names)}{reason}. Use {names[0]!r}.")
    return torch.device(asked or names[0])


def missing_accelerator() -> str:
    """A line on an accelerator that torch is built for and that is not there; "" where there is nothing to say."""
    if find_accelerators():
        return ""
    try:
        kind = torch.accelerator.current_accelerator()
    except RuntimeError:  # torch 2.6 may raise where none is there
        return ""
    return "" if kind is None else f"torch {torch.__version__} is built for {kind.type.upper()}, no device is there"


def read_hardware(device: torch.device | str | None = None, processes: int = 1) -> Hardware:
    """Looks at the machine that this process runs on. Changes nothing.

    Args:
        device: Where the model runs; None is the accelerator if there is one, else the CPU.
        processes: Of the run, each with an accelerator of its own; taken to be on machines like this one.

    Example:
        >>> hardware = read_hardware("cpu")
        >>> hardware.devices, hardware.cores >= 1
        (1, True)
    """
    device = torch.device(device) if device else find_device()
    if device.type == "cuda":
        memory_bytes = torch.cuda.get_device_properties(device).total_memory
        return Hardware(device_name(device), processes, cpu_cores(), memory_bytes)
    if device.type != "cpu":
        return Hardware(device.type, processes, cpu_cores())
    return Hardware(device_name(device), 1, cpu_cores(), _machine_bytes())


def cpu_cores() -> int:
    """CPU cores that this process may use.

    >>> cpu_cores() >= 1
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def library_versions() -> dict[str, str]:
    """Versions of Python, hf_freeze and the libraries that decide what a run computes; those that are installed.

    >>> list(library_versions())[:2]
    ['python', 'hf_freeze']
    """
    versions = {"python": platform.python_version(), "hf_freeze": __version__}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def reset_peak(device: torch.device) -> bool:
    """Starts counting anew: what was freed before is given back first, so that it does not count.

    Returns:
        Whether it could. On Linux the kernel's high-water mark is reset through /proc/self/clear_refs, which some
        containers do not let one write; elsewhere nothing is measured on a CPU.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if sys.platform != "linux":
        return False
    with suppress(AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """The greatest memory since `reset_peak` could, else since the process began, in bytes; 0 where unknown.

    On a CPU the imports' own share is in it.

    Example:
        >>> device = torch.device("cpu")
        >>> _ = reset_peak(device)
        >>> tensor = torch.ones(25_000_000)
        >>> peak_bytes(device) > 100_000_000 or sys.platform != "linux"
        True
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status_bytes("VmHWM")


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, such as VmRSS, in bytes; 0 where there is none."""
    lines = Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _machine_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
