"""Who writes into a folder: one run for as long as it trains, known to the others; one save for the moment it takes.

The system holds a lock and drops it with its process, however that ends; the file of a run's is never replaced or
removed, since a lock belongs to an inode. Without locks (Windows, some network disks) nobody is kept out.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_freeze.errors import FreezeError

__all__ = ["alone_in", "flock", "leave_folder", "take_folder"]

LOCK = "_hf_freeze_run.lock"  # a Trainer's upload leaves out what begins with an underscore
_taken: dict[Path, int] = {}  # the open file that has the lock


def take_folder(folder: Path) -> None:
    """Takes a folder for the runs of this process, until `leave_folder` or its end; made where it is missing.

    A second run of the same process gets it too: the first one is over, if only by an exception.

    Raises:
        FreezeError: Another process has it, or there is none and it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FreezeError(
            f"A run was to write into {folder}; no folder can be made there: {error.strerror or error} "
            f"({error.filename}). Give another output_dir."
        ) from error
    path = folder.resolve() / LOCK
    if sys.platform == "win32" or path in _taken:
        return
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
    except OSError:
        return
    try:
        locked = _lock(descriptor, deadline=0.0)
    except BlockingIOError as error:
        holder = _holder(os.pread(descriptor, 4096, 0))
        os.close(descriptor)
        raise FreezeError(
            f"A run was to write into {folder}; {holder} is writing there. Wait for that one, end it, or give another "
            "output_dir."
        ) from error
    if not locked:
        os.close(descriptor)
        return
    told = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(told).encode(), 0)
    _taken[path] = descriptor


def leave_folder(folder: Path) -> None:
    """Lets the next process have a folder."""
    descriptor = _taken.pop(folder.resolve() / LOCK, None)
    if descriptor is not None:
        import fcntl

        os.ftruncate(descriptor, 0)
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a fork that has just begun may still have it open
        os.close(descriptor)


def _leave_to_parent() -> None:
    """A data loader's worker, which may outlive its run, takes no part in the run's locks."""
    for descriptor in _taken.values():
        with suppress(OSError):
            os.close(descriptor)
    _taken.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_leave_to_parent)


def _holder(told: bytes) -> str:
    try:
        values = json.loads(told)
        return f"process {values['process']} on {values['host']} (since {values['since']})"
    except (ValueError, KeyError, TypeError):  # it has not said so yet
        return "another process"


@contextmanager
def alone_in(folder: Path, wait_seconds: float = 0.0) -> Iterator[bool]:
    """Keeps whoever else asks, threads of this process too, from a folder for the length of a `with`.

    Gives whether it does: False without locks here.

    Raises:
        BlockingIOError: Others have it, and still had it after the wait.
    """
    if sys.platform == "win32":
        yield False
        return
    deadline = time.monotonic() + wait_seconds
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _lock(descriptor, deadline)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, deadline: float) -> bool:
    """Whether it could be locked here at all."""
    while True:
        try:
            flock(descriptor)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.01)
        except OSError:
            return False


def flock(descriptor: int, *, shared: bool = False) -> None:
    """Locks an open file for its holder alone or, `shared`, with others who share it; never waits. Not on Windows.

    By flock: a lock of POSIX would go as soon as this process closes the file anywhere, as by a copy of it.

    Raises:
        BlockingIOError: Others hold it.
        OSError: It cannot be locked, as on some network disks.
    """
    import fcntl

    fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
