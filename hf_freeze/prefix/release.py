"""Lets the prefix's weights leave the device while training runs from the cache, and brings them back, the same bits.

A released parameter keeps shape and dtype but has one number of memory, NaN: whoever reads it by a way not foreseen
here gets NaN, never a plausible number. Everything foreseen brings the weights back first: a call of any module of the
prefix, `state_dict`, `load_state_dict`, `verify_frozen`.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from hf_freeze.errors import CacheDamaged, FreezeError
from hf_freeze.marks import RELEASED
from hf_freeze.prefix.files import Identity, TensorFile, identity_of, open_regular, read_tensor
from hf_freeze.prefix.replay import Replay
from hf_freeze.prefix.states import Prefix
from hf_freeze.tensors import tensor_digest

__all__ = ["Released"]


class Released:
    """The parameters of a prefix that nothing above the cut uses; armed, released at a cached forward, restored.

    Args:
        folder: Where a file keeps them when the model is on a CPU.
    """

    def __init__(self, model: nn.Module, prefix: Prefix, replay: Replay, folder: Path) -> None:
        self.model = model
        self.replay = replay
        self.away = False
        self.kept: dict[str, torch.Tensor] = {}
        self.file: Path | None = None
        self.identity: Identity | None = None  # of the file as it was written
        self.folder = folder
        self.modules = prefix.modules()
        inside = set(self.modules)
        outside = {
            id(p) for module in model.modules() if module not in inside for p in module.parameters(recurse=False)
        }
        self.parameters = {
            name: tensor
            for name, tensor in prefix.tensors().items()
            if isinstance(tensor, nn.Parameter) and id(tensor) not in outside and not hasattr(tensor, "full_tensor")
        }
        self.handles: list[Any] = []
        for module in {m for m in self.modules if any(True for _ in m.parameters(recurse=False))}:
            module.__dict__[RELEASED] = self
            self.handles.append(module.register_forward_pre_hook(_bring_back))
            self.handles.append(module.register_state_dict_pre_hook(_bring_back))  # type: ignore[no-untyped-call]
            self.handles.append(module.register_load_state_dict_pre_hook(_bring_back))  # type: ignore[no-untyped-call]

    def arm(self) -> int:
        """From the next cached forward on they are released; returns their bytes."""
        self.replay.released = self
        return sum(p.numel() * p.element_size() for p in self.parameters.values())

    def release(self) -> None:
        """Takes them away now."""
        if self.away or not self.parameters:
            return
        device = next(iter(self.parameters.values())).device
        tensors = {name: p.detach() for name, p in self.parameters.items()}
        if device.type != "cpu":
            self.kept = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        elif not self._is_kept():
            self.file = self._write(tensors)
        for parameter in self.parameters.values():
            nothing = torch.full((1,), float("nan"), dtype=parameter.dtype, device=parameter.device)
            parameter.data = nothing.expand(parameter.shape)
        self._leave_the_checkpoint()
        self.away = True

    def _leave_the_checkpoint(self) -> None:
        """Copies what stays out of a memory-mapped checkpoint file, whose pages would else stay with it."""
        mapped = _mapped_files()
        for tensor in [*self.model.parameters(), *self.model.buffers()] if mapped else []:
            if any(start <= tensor.data_ptr() < stop for start, stop in mapped):
                tensor.data = tensor.detach().clone()

    def _write(self, tensors: dict[str, torch.Tensor]) -> Path:
        path = self.folder / f"prefix-{os.getpid()}-{id(self):x}.weights"
        try:
            path.unlink(missing_ok=True)  # of an earlier release: what stands there now may lead elsewhere
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
            with open_regular(path) as descriptor:
                TensorFile.read(path, descriptor)  # what cannot be read back must not leave
                self.identity = identity_of(descriptor)
        except Exception as error:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise FreezeError(
                f"release_prefix was asked for; the prefix's weights could not be written to {path}: {error}. They "
                "stay in memory; free space there, or leave release_prefix out."
            ) from error
        return path

    def _is_kept(self) -> bool:
        """Whether the file of an earlier release is there, untouched: what leaves memory must be somewhere."""
        with contextlib.suppress(FreezeError):
            if self.file is not None:
                with open_regular(self.file) as descriptor:
                    return identity_of(descriptor) == self.identity
        return False

    def restore(self) -> None:
        """Brings them back, and checks that they are the same bits.

        Raises:
            CacheDamaged: The file was changed meanwhile.
        """
        if not self.away:
            return
        digests = self.replay.digests
        try:
            if self.file is not None:
                with open_regular(self.file) as descriptor:
                    places = TensorFile.read(self.file, descriptor).places
                    tensors = {name: read_tensor(self.file, descriptor, places[name]) for name in self.parameters}
            else:
                tensors = self.kept
        except Exception as error:
            raise CacheDamaged(
                f"The released prefix could not be read back from {self.file}: {error}. Load the model again."
            ) from error
        changed = [n for n, tensor in tensors.items() if n in digests and tensor_digest(tensor) != digests[n]]
        if changed:
            raise CacheDamaged(
                f"The released prefix came back changed, e.g. {changed[0]}: {self.file} was damaged meanwhile. Load "
                "the model again."
            )
        for name, parameter in self.parameters.items():
            parameter.data = tensors[name].to(parameter.device)
        self.kept = {}
        self.away = False
        if self.replay.spot is not None:
            self.replay.spot.after_release()

    def close(self) -> None:
        """Brings them back and removes every trace."""
        self.restore()
        self.replay.released = None
        for handle in self.handles:
            handle.remove()
        for module in self.modules:
            module.__dict__.pop(RELEASED, None)
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.unlink(missing_ok=True)
            self.file = None


def _mapped_files() -> list[tuple[int, int]]:
    """Address ranges of this process where files of weights are mapped; () where the system does not tell."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, _, _, _, _, *name = line.split(maxsplit=5)
            if name and name[0].endswith((".safetensors", ".bin", ".weights")):
                start, stop = span.split("-")
                found.append((int(start, 16), int(stop, 16)))
    return found


def _bring_back(module: nn.Module, *_: Any) -> None:
    """Before a module of the prefix is called, saved or loaded."""
    module.__dict__[RELEASED].restore()
