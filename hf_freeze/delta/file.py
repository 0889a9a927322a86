"""The file of a delta: the trained tensors as safetensors, and in its header the manifest, which says what they fit.

The manifest is one JSON value under the key `hf_freeze_delta`: the class of the model, its base and revision, the
digest of each saved and each frozen tensor, the plan and the config. Who holds the file holds the delta; what lies
beside it, freeze_plan.json and config.json, is there for FreezePlan and for transformers. Earlier versions kept the
manifest in delta.json (format 1): it is read as well. Reading believes nothing, and opens no pickle and no pipe.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_freeze.errors import DeltaMismatch, first_few, first_line
from hf_freeze.exactness import PASSING
from hf_freeze.plan import PLAN_FILE
from hf_freeze.tensors import kind_of_digest, tensor_digest

__all__ = ["CONFIG_FILE", "FILES", "MANIFEST_FILE", "STAGING", "WEIGHTS_FILE", "Manifest", "is_delta",
           "read_delta", "regular", "settings_apart", "write_weights"]  # fmt: skip

FORMAT = 2
WEIGHTS_FILE = "delta.safetensors"
CONFIG_FILE = "config.json"
FILES = (WEIGHTS_FILE, PLAN_FILE, CONFIG_FILE)
MANIFEST_KEY = "hf_freeze_delta"
MANIFEST_FILE = "delta.json"  # of format 1
STAGING = ".delta*.tmp"  # where a save of format 1 had its files before it moved them into place, the weights first
DIGEST = re.compile(r"\w+ \[(\d+(, \d+)*)?\] [0-9a-f]{32}")  # of `tensor_digest`
KINDS: dict[str, Any] = {
    "architecture": str, "base": str | None, "revision": str | None, "untied": list, "saved": dict, "frozen": dict,
    "extra": object, "plan": dict | None, "config": dict | None, "format": int,
}  # fmt: skip
# Of a config: what the tensors tell as well, or no forward looks at.
UNCOMPARED = PASSING | {"tie_word_embeddings", "vocab_size", "quantization_config"}


@dataclass(frozen=True)
class Manifest:
    """What a delta says of itself. A digest is `tensor_digest`'s, which tells dtype and shape too."""

    architecture: str
    base: str | None
    revision: str | None
    untied: list[str]
    saved: dict[str, str]
    frozen: dict[str, str]
    extra: Any
    plan: dict[str, Any] | None
    config: dict[str, Any] | None
    format: int = FORMAT

    @property
    def base_words(self) -> str:
        """The base, as far as the delta knows it."""
        base = f"the base {self.base!r}" if self.base else "the model that was frozen"
        return f"{base} at revision {self.revision}" if self.revision else base

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the frozen tensors: that in which the base was loaded."""
        dtypes = [getattr(torch, digest.partition(" ")[0], None) for digest in self.frozen.values()]
        return next((dtype for dtype in dtypes if isinstance(dtype, torch.dtype) and dtype.is_floating_point), None)


def is_delta(folder: str | Path) -> bool:
    """Whether a folder on this machine holds a delta; it may still be damaged."""
    try:
        return (Path(folder) / WEIGHTS_FILE).is_file()
    except OSError:  # it may not be read
        return False


def write_weights(path: Path, tensors: dict[str, torch.Tensor], manifest: Manifest) -> None:
    """Writes the file of a delta."""
    save_file(tensors, path, metadata={"format": "pt", MANIFEST_KEY: json.dumps(asdict(manifest))})


def read_delta(folder: Path) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """What a delta says of itself and its tensors, each of which holds the bits that were saved.

    Raises:
        DeltaMismatch: It is missing, damaged, or of a format that is not known here.
    """
    path = folder / WEIGHTS_FILE
    manifest, saved = _read(folder)
    lacking = [name for name in manifest.saved if name not in saved]
    besides = [name for name in saved if name not in manifest.saved]
    if lacking or besides:
        faults = [f"lacks {len(lacking)} tensors that its manifest names, e.g. {first_few(lacking)}"] if lacking else []
        faults += [f"holds {len(besides)} that it does not name, e.g. {first_few(besides)}"] if besides else []
        raise DeltaMismatch(f"{path} {' and '.join(faults)}. They are not of one save: save the delta again.")
    damaged = []
    for name, then in manifest.saved.items():
        now = tensor_digest(saved[name])
        if now != then:
            kind_then, kind_now = kind_of_digest(then), kind_of_digest(now)
            damaged.append(name if kind_then == kind_now else f"{name} ({kind_then}, here {kind_now})")
    if damaged:
        raise DeltaMismatch(
            f"{path}: {len(damaged)} of {len(saved)} tensors are not what was saved: {first_few(damaged, 20)}. It is "
            "damaged, or of another save. Save the delta again."
        )
    return manifest, saved


def _read(folder: Path) -> tuple[Manifest, dict[str, torch.Tensor]]:
    path = regular(folder / WEIGHTS_FILE)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(MANIFEST_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except PermissionError as error:
        raise DeltaMismatch(f"{path} was to be loaded; it cannot be read: {first_line(error)}.") from error
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        raise DeltaMismatch(f"{path} is damaged or cut short: {first_line(error)}. Save the delta again.") from error
    return (_manifest_of_format_1(folder) if text is None else _manifest(text, path, FORMAT)), tensors


def _manifest_of_format_1(folder: Path) -> Manifest:
    staged = [path for path in folder.glob(f"{STAGING}/{MANIFEST_FILE}") if not (path.parent / WEIGHTS_FILE).exists()]
    path = staged[0] if staged else folder / MANIFEST_FILE  # the former where a save was killed between two moves
    if not os.path.lexists(path):
        raise DeltaMismatch(
            f"{folder / WEIGHTS_FILE} holds no manifest, and no {MANIFEST_FILE} of an earlier version lies beside it. "
            "Save the delta again."
        )
    try:
        text = regular(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DeltaMismatch(f"{path} was to be loaded; it cannot be read: {first_line(error)}.") from error
    except UnicodeError as error:
        raise DeltaMismatch(f"{path} cannot be read as JSON: {first_line(error)}. Save the delta again.") from error
    config = None
    with suppress(OSError, ValueError, RecursionError):  # without a sound one the tensors fit all the same
        config = json.loads(regular(folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return _manifest(text, path, 1, {"plan": None, "config": config if isinstance(config, dict) else None})


def _manifest(text: str, path: Path, wanted: int, added: dict[str, Any] | None = None) -> Manifest:
    """The manifest of the wanted format in a text that may hold anything."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DeltaMismatch(
            f"The manifest in {path} cannot be read as JSON: {first_line(error)}. Save the delta again."
        ) from error
    version = values.get("format") if isinstance(values, dict) else None
    if version != wanted:
        raise DeltaMismatch(
            f"{path} is a delta of format {reprlib.repr(version)}; this version reads format {wanted} there. Load it "
            "with the version that wrote it."
        )
    values |= added or {}
    wrong = [name for name, kind in KINDS.items() if name not in values or not isinstance(values[name], kind)]
    wrong += [f"{reprlib.repr(name)} (an unknown field)" for name in values if name not in KINDS]
    if not wrong:
        untied, saved, frozen = values["untied"], values["saved"], values["frozen"]
        digests = (*saved.values(), *frozen.values())
        wrong += [f"{reprlib.repr(text)} (no digest)" for text in digests if not _is_digest(text)]
        wrong += [f"{reprlib.repr(name)} (no name)" for name in untied if not isinstance(name, str)]
    if not wrong:
        names = [*untied, *saved, *frozen]
        wrong += [f"{name!r} (a path)" for name in names if ".." in name or name.startswith(("/", "\\"))]
        wrong += [f"{name!r} (both saved and frozen)" for name in saved if name in frozen]
        wrong += [f"{name!r} (untied, not saved)" for name in untied if name not in saved | frozen]
    if wrong:
        raise DeltaMismatch(f"{path} is not as save_delta writes it: {first_few(wrong)}. Save the delta again.")
    return Manifest(**values)


def _is_digest(text: Any) -> bool:
    return isinstance(text, str) and DIGEST.fullmatch(text) is not None


def regular(path: Path) -> Path:
    """The path of a file. A pipe in its place would be waited for, a device read without end.

    Raises:
        DeltaMismatch: There is none, or something else is there.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise DeltaMismatch(
            f"A delta was asked from {path.parent}; its {path.name} is missing: {_holds(path.parent)}. Give a folder "
            "of save_delta."
        ) from None
    except OSError as error:
        raise DeltaMismatch(f"{path} was to be loaded; it cannot be read: {first_line(error)}.") from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise DeltaMismatch(f"{path} was to be loaded; it is {kind}, not a file. Save the delta again.")
    return path


def _holds(folder: Path) -> str:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        return f"the folder cannot be read ({first_line(error)})"
    return f"the folder holds {first_few(names)}" if names else "the folder is empty"


def settings_apart(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In what two configs differ that tells how a model computes in eval mode, each in words."""
    one, other = _settings(then), _settings(now)
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return [f"{name} was {one.get(name)!r}, is {other.get(name)!r}" for name in names]


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """By dotted names."""
    settings: dict[str, Any] = {}
    for name, value in config.items():
        if name in UNCOMPARED or name.endswith(("_token_id", "_token_ids")) or "drop" in name:
            continue
        inner = _settings(value) if isinstance(value, dict) else {"": value}
        settings |= {f"{name}.{key}".strip("."): setting for key, setting in inner.items()}
    return settings
