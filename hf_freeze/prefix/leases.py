"""Who uses a store: trainers and builders share its lease, and only who has it alone may remove the store.

The lease is a lock on a file of its own, which is made once, never written or replaced, and goes with the store only:
a lock belongs to an inode, and whoever waits on one that is gone holds nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
import warnings
from pathlib import Path

from hf_freeze.errors import CacheDamaged, FreezeError
from hf_freeze.locks import flock
from hf_freeze.prefix.files import is_regular

__all__ = ["LOCK", "PATIENCE_SECONDS", "alone_with", "share_store"]

LOCK = "lock"
PATIENCE_SECONDS = 30.0  # for who removes a store of some TB; who only looks holds the lock for a moment


def share_store(folder: Path) -> int | None:
    """A descriptor that keeps a store from being removed until it is closed; None where the system has no locks.

    Waits for a process that has the store for itself: most only look whether something is left over in it.

    Raises:
        CacheDamaged: The folder is gone, or something else stands in the lock's place.
        FreezeError: Another process has kept the store for itself all the time.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            descriptor = _lock(folder, shared=True)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise FreezeError(
                    f"The prefix cache {folder} was to be used; another process has kept it for itself for "
                    f"{PATIENCE_SECONDS:.0f} s, to remove it. Wait for that one, or give another cache_dir."
                ) from None
            time.sleep(0.02)
            continue
        except (FileNotFoundError, NotADirectoryError):
            raise CacheDamaged(f"{folder} is gone.") from None
        except OSError as error:
            warnings.warn(
                f"The prefix cache {folder} is used without a lease on it ({error.strerror or error}): nothing keeps "
                "another process from removing it meanwhile. Leave it alone while this one runs.",
                stacklevel=2,
            )
            return None
        return descriptor


def _lock(folder: Path, *, shared: bool) -> int | None:
    """A descriptor that holds a store's lock; None where the system has none.

    Raises:
        BlockingIOError: Others hold it.
        CacheDamaged: Something else stands in its place.
        OSError: There is no such folder, or it cannot be locked.
    """
    if sys.platform == "win32":
        return None
    path = folder / LOCK
    while True:
        if os.path.lexists(path) and not is_regular(path):
            raise CacheDamaged(f"{path} is no file.")
        flags = os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            try:
                descriptor = os.open(path, os.O_RDONLY | flags)  # another user's, who lets it be read, or mounted so
            except FileNotFoundError:  # the folder is there, and no lock can be made in it
                raise error from None
        try:
            flock(descriptor, shared=shared)
            # Who waited for one that removed the store holds the lock of a file that is gone.
            if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def alone_with(folder: Path, *, asked: bool = False) -> contextlib.ExitStack | None:
    """Keeps everybody else from a store for the length of a `with`; None where somebody uses it.

    Args:
        asked: Whether its user asked for it to go. Where the system has no locks, nobody can know that it is not used,
            and nothing is removed unasked.
    """
    if sys.platform == "win32" and not asked:
        return None
    try:
        descriptor = _lock(folder, shared=False)
    except (OSError, CacheDamaged):
        return None
    stack = contextlib.ExitStack()
    if descriptor is not None:
        stack.callback(os.close, descriptor)
    return stack
