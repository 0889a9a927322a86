"""How a script of a test that forms a group of processes ends."""

from __future__ import annotations

import gc

import torch.distributed as dist


def leave_group() -> None:
    """Ends the group; what holds it (DDP, FSDP2) goes first, or its threads may outlive the interpreter and abort."""
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
