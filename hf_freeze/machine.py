"""Which device is there, what a figure was measured on (cores, versions, power), and the greatest memory of some work.

No other file asks torch for accelerators: what it names first is what its build is for, there or not.
Energy is power times seconds. The power is the limit that the machine tells; a CPU that tells none, as in most virtual
machines, is given an assumed power by its cores, and the estimate says so. A GPU's is never guessed from its name.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
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
POWERCAP = Path("/sys/class/powercap")  # the Linux kernel's interface to RAPL
WATTS_A_CORE = 12.0  # Green Algorithms (Lannelongue et al. 2021) for a CPU that is not in its list
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "peft", "safetensors", "tokenizers")


@dataclass(frozen=True)
class Hardware:
    """The devices of a run.

    Attributes:
        device: The model name of the accelerator, or of the CPU where there is none.
        devices: How many of them worked.
        cores: CPU cores that the run might use.
        memory_bytes: Memory of one accelerator, or of the machine; None where it is not told.
        watts: Power of all of them together, as a limit or as assumed; None where neither is known.
        watts_source: Who told it, or what is assumed; "" where it is not known.
        watts_assumed: Whether it is assumed, and so no limit.

    Example:
        >>> hardware = Hardware("GPU", devices=2, cores=16, memory_bytes=80_000_000_000, watts=1400.0,
        ...     watts_source="power limit that the driver reports")
        >>> print(hardware)
        2 x GPU (80.0 GB each), 16 CPU cores
        >>> hardware.energy_text(180.0)
        'at most 70 Wh: 1,400 W (power limit that the driver reports) x 180 s. The devices are taken to run at their \
limit; the rest of the machine is not counted.'
    """

    device: str
    devices: int
    cores: int
    memory_bytes: int | None = None
    watts: float | None = None
    watts_source: str = ""
    watts_assumed: bool = False

    def __str__(self) -> str:
        many = self.devices > 1
        size = f" ({count_text(self.memory_bytes, 'B')}{' each' if many else ''})" if self.memory_bytes else ""
        count = f"{self.devices} x " if many else ""
        return f"{count}{self.device}{size}, {self.cores} CPU core{'s' * (self.cores > 1)}"

    def energy_wh(self, seconds: float) -> float | None:
        """Watt-hours of the devices at that power for so long; None where the power is not known.

        >>> Hardware("CPU", 1, 2, watts=50.0).energy_wh(720.0), Hardware("CPU", 1, 2).energy_wh(720.0)
        (10.0, None)
        """
        return None if self.watts is None else self.watts * seconds / 3600

    def energy_text(self, seconds: float) -> str:
        """The estimate in words, with what it assumes; "" where the power is not known."""
        energy = self.energy_wh(seconds)
        if energy is None:
            return ""
        sum_text = (
            f"{energy:,.{0 if energy >= 10 else 2}f} Wh: {self.watts:,.0f} W ({self.watts_source}) x {seconds:,.0f} s."
        )
        if self.watts_assumed:
            return f"about {sum_text} Not measured; the rest of the machine is not counted."
        return (
            f"at most {sum_text} The devices are taken to run at their limit; the rest of the machine is not counted."
        )

    def to_dict(self) -> dict[str, Any]:
        """The values, JSON-ready."""
        return asdict(self)


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
    there = find_accelerators()
    names = [*{device.type: None for device in there}, "cpu", *map(str, there)]
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

    Returns:
        The hardware. Its power is the limit that nvidia-smi reports for a GPU, else None; for a CPU the long-term limit
        of every package, from RAPL, or 12 W a core where there is none, as inside most virtual machines.

    Example:
        >>> hardware = read_hardware("cpu")
        >>> hardware.devices, hardware.cores >= 1
        (1, True)
    """
    device = torch.device(device) if device else find_device()
    cores = cpu_cores()
    if device.type == "cuda":
        told = torch.cuda.get_device_properties(device)
        watts = _gpu_watts(str(getattr(told, "uuid", "")))
        return Hardware(
            device=device_name(device),
            devices=processes,
            cores=cores,
            memory_bytes=told.total_memory,
            watts=None if watts is None else watts * processes,
            watts_source="" if watts is None else "power limit that the driver reports",
        )
    if device.type != "cpu":
        return Hardware(device=device.type, devices=processes, cores=cores)
    watts = _cpu_watts(POWERCAP)
    limit = "long-term power limit of the CPU packages, from RAPL"
    assumed = f"assumed: {WATTS_A_CORE:.0f} W a core, since this machine tells no limit"
    return Hardware(
        device=device_name(device),
        devices=1,
        cores=cores,
        memory_bytes=_machine_bytes(),
        watts=cores * WATTS_A_CORE if watts is None else watts,
        watts_source=assumed if watts is None else limit,
        watts_assumed=watts is None,
    )


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
    found = {"python": platform.python_version(), "hf_freeze": __version__}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


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


def _gpu_watts(uuid: str) -> float | None:
    """The power limit of one NVIDIA GPU; None where nvidia-smi is missing or does not know (MIG slices)."""
    which = [f"--id=GPU-{uuid.removeprefix('GPU-')}"] if uuid else []
    command = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits", *which]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return float(told.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _cpu_watts(powercap: Path) -> float | None:
    """The long-term limits of all CPU packages, added up; None where the kernel tells none."""
    total = 0.0
    for zone in sorted(powercap.glob("intel-rapl:*")):  # AMD's zones carry the name too; those with a second colon
        try:  # are parts of a package
            if (zone / "name").read_text().startswith("package"):
                total += int((zone / "constraint_0_power_limit_uw").read_text()) / 1e6
        except (OSError, ValueError):
            return None
    return total or None


def _machine_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
