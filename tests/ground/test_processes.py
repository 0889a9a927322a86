"""Which process this is, how several come to one end, and how their group ends, also where one is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_freeze import processes
from hf_freeze.errors import CannotCache, RankLost, StageError
from hf_freeze.processes import agreed, from_first, leave_group, lost_ranks_named, pulse, rank_and_world, tell_all


def test_alone_there_is_nobody_to_wait_for_and_nothing_to_leave() -> None:
    assert rank_and_world() == (0, 1)
    with agreed("do it"):
        pulse()
        assert (from_first("mine"), tell_all("mine")) == ("mine", ["mine"])
    leave_group()
    assert not dist.is_initialized()


def test_alone_an_error_stays_as_it_is() -> None:
    with pytest.raises(KeyError, match=r"^'column'$"), agreed("do it"):
        raise KeyError("column")


def test_a_group_is_left_also_where_the_others_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    assert rank_and_world() == (0, 1)

    def gone() -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, "barrier", gone)
    gone_as_told = r"^Rank 1 of 2 is gone, .*closed by peer.* Start all of them again\."
    with pytest.raises(RankLost, match=gone_as_told), lost_ranks_named():
        leave_group()
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match=r"^other$"), lost_ranks_named():
        raise RuntimeError("other")


# ------------------------------------------------------------------------------------------------------- two processes


def refused_by_one(rank: int) -> None:
    with agreed("build it"):
        if rank == 1:
            raise CannotCache("it is random.")


def broken_before_the_others_ask(rank: int) -> None:
    with agreed("build it"):
        if rank == 0:
            raise KeyError("column")
        from_first(1)
        with agreed("write it"):
            pass


def failing_within(rank: int) -> None:
    with agreed("build it"), agreed("write it"):
        if rank == 1:
            raise StageError("no.") from OSError("full")


def refused_by_all(rank: int) -> None:
    with agreed("build it"):
        raise CannotCache("it is random.")


def at_unlike_places(rank: int) -> None:
    with agreed(("build it", "write it")[rank]):
        pass


def failing_while_the_other_works(rank: int) -> None:
    with agreed("build it"):
        if rank == 1:
            raise MemoryError
        for _ in range(1000):
            time.sleep(0.01)
            pulse()


def decided_by_one_that_takes_long(rank: int) -> int:
    with agreed("build it"):
        for _ in range(50 if rank == 0 else 0):
            time.sleep(0.01)
            pulse()
        return from_first(rank + 7)


def failing_again_by_an_older_error(rank: int) -> None:
    """An error that all had once is told again where one rank raises another one from it later."""
    try:
        refused_by_one(rank)
    except CannotCache as error:
        with agreed("go on"):
            if rank == 0:
                raise StageError("no cache.") from error


CASES: list[tuple[Callable[[int], Any], str]] = [
    (refused_by_one, "CannotCache: Rank 1 of 2 could not build it: it is random."),
    (broken_before_the_others_ask, "FreezeError: Rank 0 of 2 could not build it: KeyError: 'column'"),
    (failing_within, "StageError: Rank 1 of 2 could not write it: no."),
    (refused_by_all, "CannotCache: it is random."),
    (at_unlike_places, "FreezeError: The ranks came to different places: rank 0 is at 'build it' (end), rank 1 is at "
     "'write it' (end). Every rank must make the same calls, in order."),
    (failing_while_the_other_works, "FreezeError: Rank 1 of 2 could not build it: MemoryError"),
    (decided_by_one_that_takes_long, "7"),
    (failing_again_by_an_older_error, "StageError: Rank 0 of 2 could not go on: no cache."),
    (tell_all, "[0, 1]"),
]  # fmt: skip


def on_a_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    processes.PULSE_SECONDS = 0.1
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    told = []
    for case, _ in CASES:
        try:
            told.append(str(case(rank)))
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    (folder / f"rank{rank}.json").write_text(json.dumps(told))
    if rank == 1:
        with agreed("end"):
            os.kill(os.getpid(), signal.SIGKILL)
    try:
        with agreed("end"):
            pass
    except RankLost as error:
        (folder / "lost").write_text(str(error))


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_what_one_rank_fails_by_all_ranks_raise_and_a_killed_one_is_named(tmp_path: Path) -> None:
    started = time.monotonic()
    # Forked: they need not import everything again.
    context = torch.multiprocessing.start_processes(
        on_a_rank, args=(tmp_path,), nprocs=2, join=False, start_method="fork"
    )
    for process in context.processes:
        process.join(60)
    assert [process.exitcode for process in context.processes] == [0, -signal.SIGKILL]
    assert time.monotonic() - started < 60
    for rank in range(2):
        told = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert dict(zip((case.__name__ for case, _ in CASES), told, strict=True)) == {
            case.__name__: wanted for case, wanted in CASES
        }
    assert (tmp_path / "lost").read_text().startswith("Rank 1 of 2 is gone, and rank 0 cannot go on without it: ")


def on_a_rank_that_hears_nothing(rank: int, folder: Path) -> None:
    processes.PATIENCE = timedelta(seconds=1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    tell_all("there")
    if rank == 1:  # as one whose network is gone: it lives, and its connection stays open
        while not (folder / "lost").exists():
            time.sleep(0.05)
        os._exit(0)
    try:
        with agreed("end"):
            pass
    except Exception as error:
        (folder / "lost.tmp").write_text(f"{type(error).__name__}: {error}")
        (folder / "lost.tmp").rename(folder / "lost")
    os._exit(0)


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_a_rank_that_lives_and_says_nothing_is_given_up_in_minutes(tmp_path: Path) -> None:
    assert timedelta(minutes=10) <= processes.PATIENCE <= timedelta(minutes=30)
    context = torch.multiprocessing.start_processes(
        on_a_rank_that_hears_nothing, args=(tmp_path,), nprocs=2, join=False, start_method="fork"
    )
    for process in context.processes:
        process.join(60)
    told = (tmp_path / "lost").read_text()
    assert told.startswith("RankLost: Rank 1 of 2 did not come to where rank 0 waited for it: ")
    assert "Its machine may have lost the network, or it hangs" in told
