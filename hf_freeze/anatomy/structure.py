"""What structure tells of a model: its lists of blocks, what Hugging Face's accessors return, who holds a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["ancestors", "block_lists", "call_accessor", "children_of", "core_model", "is_block"]


def core_model(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a PeftModel; any other model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    if callable(get_base_model) and hasattr(model, "peft_config"):
        core = get_base_model()
        if isinstance(core, nn.Module):
            return core
    return model


def block_lists(root: nn.Module) -> list[nn.Module]:
    """The outermost module lists below `root` whose elements are blocks: composed modules that hold parameters."""
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) and all(map(is_block, module)):
            found.append(module)
            return
        for child in module.children():
            walk(child)

    walk(root)
    return list(dict.fromkeys(found))


def is_block(module: nn.Module) -> bool:
    """A block has parts of its own and at least one matrix; a lone norm, a Linear or an Embedding is no block.

    PEFT wraps a Linear in a module with children, hence `base_layer`.
    """
    if next(module.children(), None) is None or hasattr(module, "base_layer"):
        return False
    return any(parameter.dim() > 1 for parameter in module.parameters())


def call_accessor(model: nn.Module, accessor: str) -> Any:
    """What an accessor of Hugging Face's returns, or None where the class has or supports none."""
    method = getattr(model, accessor, None)
    if method is None:
        return None
    try:
        return method()
    except (NotImplementedError, AttributeError, TypeError):
        return None


def ancestors(module: nn.Module, name_of: dict[nn.Module, str]) -> Iterator[nn.Module]:
    """The modules that contain `module`, innermost first, the model itself last."""
    module_of = {name: candidate for candidate, name in name_of.items()}
    path = name_of[module]
    while path:
        path = path.rpartition(".")[0]
        yield module_of[path]


def children_of(module: nn.Module) -> list[nn.Module]:
    return list(module.children())
