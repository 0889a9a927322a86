"""The proof that frozen tensors are unchanged: digests taken by `freeze`, compared bit by bit afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hf_freeze.errors import FreezeError, FrozenWeightsChanged, first_few
from hf_freeze.freezing.holding import is_frozen
from hf_freeze.freezing.report import FreezeReport, freeze_record
from hf_freeze.given import check_kind, check_model
from hf_freeze.tensors import (
    Offloaded,
    bits_of,
    bring_back_released,
    kind_of_digest,
    named_tensors,
    offloaded_tensors,
    tensor_by_name,
    tensor_digest,
    tensor_kind,
    unwrap,
)

__all__ = ["FrozenProof", "take_digests", "verify_frozen"]

SHOWN = 20  # names of tensors in a message


@dataclass(frozen=True)
class FrozenProof:
    """What `verify_frozen` found: every frozen tensor holds the bits that it held when it was frozen."""

    tensors: int
    tensor_bytes: int

    def __str__(self) -> str:
        return f"{self.tensors} frozen tensors, {self.tensor_bytes:,} bytes: unchanged"


def verify_frozen(model: nn.Module, report: FreezeReport | None = None) -> FrozenProof:
    """Proves that every frozen tensor holds the bits that it held when `freeze` took its digest.

    Persistent buffers of frozen modules count (batch-norm statistics, router biases). Tensors are matched by identity
    first, then by name. Sharded tensors (FSDP2) are gathered one by one, so every rank must call this; what accelerate
    has offloaded to the CPU or to disk is read from there.

    Args:
        model: The model that was frozen, bare or wrapped (DDP, PEFT, torch.compile).
        report: What `freeze` returned; None takes the record that it left on the model.

    Returns:
        The number of tensors and bytes compared: all that `freeze` named.

    Raises:
        FrozenWeightsChanged: A tensor moved, disappeared or became trainable; each one is named.
        FreezeError: The model was never frozen, or some of it held no bits when it was.
    """
    check_model("verify_frozen", model)
    if report is not None:
        check_kind("verify_frozen", "report", report, FreezeReport, "what freeze() returned", "report=freeze(...)")
    core = unwrap(model)
    bring_back_released(core)
    if report is not None:
        digests, without_bits, tensors = report.digests, report.without_bits, report.tensors
    else:
        found = freeze_record(core)
        if found is None:
            raise FreezeError(
                f"verify_frozen was asked for a {type(core).__name__} that was never frozen. Call freeze(model, plan) "
                "first, or pass its report."
            )
        core, record = found  # the names are those of the module that was frozen, whatever wraps it now
        digests, without_bits, tensors = record.digests, record.without_bits, weakref.WeakValueDictionary()
    now = dict(named_tensors(core))
    identities = {id(tensor) for tensor in now.values()}
    offloaded = offloaded_tensors(core)
    changes: dict[str, list[str]] = {}
    tensor_bytes = 0
    for name, digest in digests.items():
        tensor = tensors.get(name)
        if tensor is None or id(tensor) not in identities:
            tensor = tensor_by_name(now, name)
        for change in _changes(tensor, digest, offloaded):
            now_is = f" ({kind_of_digest(digest)}, now {tensor_kind(tensor)})" if tensor is not None else ""
            changes.setdefault(change, []).append(name + (now_is if change == _RESHAPED else ""))
        if tensor is not None:
            tensor_bytes += tensor.numel() * tensor.element_size()
    if changes:
        shown = "; ".join(f"{len(names)} {change}: {first_few(names, SHOWN)}" for change, names in changes.items())
        fixes = [fix for change, fix in _FIXES.items() if change in changes]
        raise FrozenWeightsChanged(
            f"{len(digests)} tensors should hold the bits that they held when freeze() ran, and be frozen; "
            f"{shown}. {' '.join(fixes)}"
        )
    if without_bits or not digests:
        raise FreezeError(
            f"verify_frozen was asked for a {type(core).__name__} of whose {len(digests) + len(without_bits)} frozen "
            f"tensors {len(without_bits)} were on the meta device when freeze() ran and held no bits to compare: "
            f"{first_few(without_bits, SHOWN)}. The others hold theirs, which proves nothing of these. Call freeze() "
            "again once all weights are loaded."
        )
    return FrozenProof(len(digests), tensor_bytes)


_GONE = "gone (replaced or renamed)"
_EMPTY = "without bits (on the meta device, and offloaded nowhere that can be read)"
_RESHAPED = "of another dtype or shape"
_MOVED = "moved"
_TRAINS = "trainable again"
_FIXES = {
    _GONE: "What replaces a module comes before freeze(); or thaw() and freeze() again.",
    _RESHAPED: "Resize the vocabulary and change the dtype before freeze(); or thaw() and freeze() again.",
    _EMPTY: "Load the weights.",
    _MOVED: "Look for an optimizer that got what moved, for edits in place, and for batch norms outside eval mode.",
    _TRAINS: "Look for what set requires_grad; call freeze() again, or thaw() where they are to train.",
}


def _changes(tensor: torch.Tensor | None, digest: str, offloaded: Mapping[int, Offloaded]) -> list[str]:
    """In what a tensor is not as `freeze` left it; it may have moved and train again, which are two changes."""
    if tensor is None:
        return [_GONE]
    trains = [_TRAINS] if tensor.requires_grad else []
    if tensor_kind(tensor) != kind_of_digest(digest):
        return [_RESHAPED, *trains]
    bits = bits_of(tensor, offloaded)
    if bits is None:
        return [_EMPTY, *trains]
    return [_MOVED, *trains] if tensor_digest(bits) != digest else trains


def take_digests(model: nn.Module, known: dict[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Digest of every frozen parameter and of the persistent buffers of modules without a trainable parameter, and the
    names of those that hold no bits.

    A tensor that an earlier call froze keeps its first digest, or freezing again would hide that it moved; one that
    has another dtype or shape since was replaced in the open, by `resize_token_embeddings` or `.to(dtype)`.
    """
    digests: dict[str, str] = {}
    without_bits = []
    offloaded = offloaded_tensors(model)
    modules = dict(model.named_modules())
    for name, tensor in named_tensors(model):
        if isinstance(tensor, nn.Parameter):
            frozen = not tensor.requires_grad
        else:  # a module without parameters, such as a plain batch norm, goes with the one around it
            path = name.rpartition(".")[0]
            while path and next(modules[path].parameters(), None) is None:
                path = path.rpartition(".")[0]
            frozen = is_frozen(modules[path])
        if not frozen:
            continue
        first, bits = known.get(name), bits_of(tensor, offloaded)
        if bits is None:
            without_bits.append(name)
        else:
            digests[name] = first if first and kind_of_digest(first) == tensor_kind(tensor) else tensor_digest(bits)
    return digests, tuple(without_bits)
