"""Which process this is, and how a group of them ends, also where one is gone."""

from __future__ import annotations

import socket

import pytest
import torch.distributed as dist

from hf_freeze.processes import barrier, leave_group, rank_and_world


def test_alone_there_is_nobody_to_wait_for_and_nothing_to_leave() -> None:
    assert rank_and_world() == (0, 1)
    barrier()
    leave_group()
    assert not dist.is_initialized()


def test_a_group_is_left_also_where_the_others_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    assert rank_and_world() == (0, 1)

    def gone() -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, "barrier", gone)
    with pytest.raises(RuntimeError, match="closed by peer"):
        leave_group()
    assert not dist.is_initialized()
