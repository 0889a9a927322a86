"""Names, kinds, digests and bits of a model's tensors, wherever they lie: sharded, offloaded, or released.

Digests find accidents, not forgers. Nothing here changes what a model holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hf_freeze.marks import RELEASED

__all__ = [
    "Offloaded",
    "bits_of",
    "bring_back_released",
    "class_name",
    "is_sharded",
    "kind_of_digest",
    "named_tensors",
    "offloaded_tensors",
    "shard_again",
    "tensor_by_name",
    "tensor_digest",
    "tensor_kind",
    "unwrap",
    "whole_tensor",
]


def named_tensors(model: nn.Module, every_name: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers, each under its first name, or under every one that it has."""
    yield from model.named_parameters(remove_duplicate=not every_name)
    for prefix, module in model.named_modules(remove_duplicate=not every_name):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer


def tensor_by_name(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """The tensor of that name; failing that, the one whose name PEFT has wrapped around it."""
    if name in tensors:
        return tensors[name]
    leaf = name.rpartition(".")
    endings = (f".{name}", f".{leaf[0]}.base_layer.{leaf[2]}")
    wrapped = [tensor for other, tensor in tensors.items() if f".{other}".endswith(endings)]
    return wrapped[0] if len(wrapped) == 1 else None


Offloaded = tuple[Mapping[str, torch.Tensor], str]


def offloaded_tensors(model: nn.Module) -> dict[int, Offloaded]:
    """Where accelerate's hooks keep what is on the meta device between two forwards: a mapping and a name in it, by
    the identity of the tensor. Nothing is read, and nothing brought in: a hook that runs makes new parameters.
    """
    offloaded: dict[int, Offloaded] = {}
    for module in model.modules():
        waiting: list[Any] = [module.__dict__.get("_hf_hook")]
        while waiting:
            hook = waiting.pop()
            waiting += getattr(hook, "hooks", ())  # several in a row
            weights = getattr(hook, "weights_map", None)
            if getattr(hook, "offload", False) and weights is not None:
                below = hook.place_submodules
                for name, tensor in (*module.named_parameters(recurse=below), *module.named_buffers(recurse=below)):
                    offloaded[id(tensor)] = weights, name
    return offloaded


def bits_of(tensor: torch.Tensor, offloaded: Mapping[int, Offloaded]) -> torch.Tensor | None:
    """A tensor, from where it was offloaded to if it was; None where it holds no bits."""
    if tensor.device.type != "meta":
        return tensor
    weights, name = offloaded.get(id(tensor), ({}, ""))
    try:
        return weights[name].to(tensor.dtype)  # as the hook does when it brings it in
    except (KeyError, OSError, ValueError):  # the folder that it was offloaded to is gone, or is another one
        return None


def tensor_kind(tensor: torch.Tensor) -> str:
    """A tensor's dtype and shape, e.g. "float32 [8, 8]"."""
    shape = getattr(tensor, "ds_shape", tensor.shape)  # DeepSpeed ZeRO-3 shows the shape of what it left here: 0
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(shape)}"


def kind_of_digest(digest: str) -> str:
    """The dtype and shape in what `tensor_digest` returned."""
    return digest.rpartition(" ")[0]


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which each process holds a part; every process must ask."""
    if getattr(tensor, "ds_id", None) is not None:  # DeepSpeed ZeRO-3
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # FSDP2 or tensor parallelism


def tensor_digest(tensor: torch.Tensor) -> str:
    """A tensor's dtype and shape, and a 128-bit digest of its bytes; several GB a second and core.

    Finds accidents, not forgers: XXH3 is no cryptographic hash.
    """
    import xxhash

    tensor = whole_tensor(tensor)
    state = xxhash.xxh3_128()
    flat = tensor.contiguous().reshape(-1)
    step = max(1, (64 << 20) // max(1, flat.element_size()))  # 64 MiB at a time off an accelerator
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step].cpu()
        state.update(piece.view(torch.uint8).numpy().data)
    return f"{tensor_kind(tensor)} {state.hexdigest()}"


def is_sharded(weight: torch.Tensor) -> bool:
    """Whether each process holds a part of it: FSDP2, tensor parallelism, ZeRO-3."""
    return hasattr(weight, "full_tensor") or hasattr(weight, "ds_id")


def unwrap(model: nn.Module) -> nn.Module:
    """The model under DistributedDataParallel, DataParallel and torch.compile wrappers; a PeftModel stays one.

    >>> inner = nn.Linear(2, 2)
    >>> unwrap(nn.DataParallel(inner)) is inner
    True
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def class_name(model: nn.Module) -> str:
    """The name of a model's class, without the one that FSDP2 puts in front."""
    return next(kind.__name__ for kind in type(model).__mro__ if not hasattr(kind, "set_reshard_after_forward"))


def bring_back_released(model: nn.Module) -> None:
    """Brings back the weights that a prefix cache let leave the device, the same bits."""
    for module in model.modules():
        if RELEASED in module.__dict__:
            module.__dict__[RELEASED].restore()


def shard_again(model: nn.Module) -> None:
    """Puts FSDP2's shards back, where after a forward without a backward gathered tensors are in their place."""
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):
            module.reshard()  # type: ignore[operator]
