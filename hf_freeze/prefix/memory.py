"""Where the memory is too small: how that is told from other errors, and turned into one that training survives."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hf_freeze.errors import CannotCache, worded

__all__ = ["declining_without_memory", "empty_cache", "is_out_of_memory"]

NO_MEMORY = ("out of memory", "not enough memory", "t allocate memory", "failed to allocate")  # in a RuntimeError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the host or a device has no memory left.

    >>> is_out_of_memory(RuntimeError("CUDA out of memory.")), is_out_of_memory(RuntimeError("mat1 and mat2"))
    (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)


def empty_cache(device: torch.device) -> None:
    """Gives back what nothing holds any more."""
    gc.collect()
    if device.type != "cpu" and hasattr(module := torch.get_device_module(device), "empty_cache"):
        module.empty_cache()


@contextmanager
def declining_without_memory(what: str) -> Iterator[None]:
    """Turns an error for want of memory into one that lets training go on without the cache.

    Args:
        what: What was done, as in "The memory is too small to ...".

    Raises:
        CannotCache: In its place.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise CannotCache(
            f"The memory is too small to {what}: {worded(error)}. Free memory, shorten the longest rows, or train "
            "without the cache."
        ) from error
