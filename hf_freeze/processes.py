"""Which process of a launch this is, leaving the group of them, and waiting for the others.

torch is asked, not accelerate's PartialState: making one fixes the device for a whole session of its user.
"""

from __future__ import annotations

import gc

import torch.distributed as dist

__all__ = ["barrier", "leave_group", "rank_and_world"]


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are; (0, 1) where no group was formed.

    >>> rank_and_world()
    (0, 1)
    """
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Waits for all processes of the group; returns at once where there is one."""
    if rank_and_world()[1] > 1:
        dist.barrier()


def leave_group() -> None:
    """Ends the group of processes; what holds it goes first, or its threads may outlive the interpreter and abort."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        try:
            dist.barrier()
        finally:  # another process may be gone
            dist.destroy_process_group()
