"""Who uses a store: trainers and builders share its lease, and only who has it alone may remove the store.

The lease is a lock on a file of its own, which is made once, never written or replaced, and goes with the store only:
a lock belongs to an inode, and whoever waits on one that is gone holds nothing. Removes of a store what a store
consists of, and nothing that somebody else has put there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

from hf_freeze.errors import CacheDamaged, FreezeError
from hf_freeze.prefix.files import is_regular

__all__ = [
    "LOCK",
    "MANIFEST",
    "SHARDS",
    "TABLES",
    "clear_caches",
    "evict_caches",
    "folder_bytes",
    "remove_leftovers",
    "shard_paths",
    "share_store",
]  # fmt: skip

MANIFEST = "manifest.json"
SHARDS = "rows-*.safetensors"
TABLES = "tables.safetensors"
LOCK = "lock"
PATIENCE_SECONDS = 30.0  # for who removes a store of some TB; who only looks holds the lock for a moment
_SHARD = re.compile(r"rows-[0-9a-f]{32}\.safetensors")


def shard_paths(folder: Path) -> list[Path]:
    """What bears a shard's name in a store, whatever it is."""
    return sorted(path for path in folder.glob(SHARDS) if _SHARD.fullmatch(path.name))


# ----------------------------------------------------------------------------------------------------------- lease


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
    import fcntl

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
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            # Who waited for one that removed the store holds the lock of a file that is gone.
            if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _alone(folder: Path, *, asked: bool = False) -> contextlib.ExitStack | None:
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


# -------------------------------------------------------------------------------------------------------- many caches


def _caches(cache_dir: Path) -> list[Path]:
    """The stores in a folder, least recently used first; nothing that is not one."""
    used: dict[Path, float] = {}
    with contextlib.suppress(OSError):
        for folder in cache_dir.iterdir():
            if re.fullmatch("[0-9a-f]{24}", folder.name) and is_regular(folder / MANIFEST):
                with contextlib.suppress(OSError):  # another process has removed it since
                    used[folder] = (folder / MANIFEST).stat().st_mtime
    return sorted(used, key=lambda folder: used[folder])


def _parts(folder: Path) -> list[Path]:
    """The files that a store consists of, in the order in which it is removed.

    A store that is half removed must be one still, to be removed the next time; its lock goes last.
    """
    leftovers = [path for pattern in ("*.tmp", "*.weights") for path in folder.glob(pattern)]
    named = [folder / TABLES, folder / MANIFEST, folder / LOCK]
    return [path for path in (*leftovers, *shard_paths(folder), *named) if is_regular(path)]


def folder_bytes(folder: Path) -> int:
    """Bytes of the files of a store."""
    total = 0
    for path in _parts(folder):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def clear_caches(cache_dir: str | os.PathLike[str]) -> int:
    """Removes every prefix cache in a folder that nobody uses, and nothing else; returns the bytes freed.

    On Windows, which has no leases, those in use go too, but for what the system keeps because it is open.
    """
    return sum(_remove(folder, asked=True) for folder in _caches(Path(cache_dir)))


def remove_leftovers(folder: Path) -> None:
    """Removes what killed runs have left in a store, where nobody uses it."""
    if not is_regular(folder / MANIFEST) or (alone := _alone(folder)) is None:
        return
    with alone:
        for leftover in (*folder.glob("*.tmp"), *folder.glob("*.weights")):
            if is_regular(leftover):
                with contextlib.suppress(OSError):
                    leftover.unlink()


def _remove(folder: Path, *, asked: bool = False) -> int:
    """Removes a store, unless somebody uses it; returns the bytes freed. What is not of the store stays."""
    if (alone := _alone(folder, asked=asked)) is None:
        return 0
    freed = 0
    with alone:
        for path in _parts(folder):
            with contextlib.suppress(OSError):
                size = path.stat().st_size
                path.unlink()
                freed += size
        with contextlib.suppress(OSError):
            folder.rmdir()
    return freed


def evict_caches(cache_dir: Path, limit_bytes: int, keep: Iterable[Path], needed_bytes: int = 0) -> list[Path]:
    """Removes the least recently used caches until the rest and `needed_bytes` fit in the limit; returns them."""
    kept = {path.resolve() for path in keep}
    sizes = {folder: folder_bytes(folder) for folder in _caches(cache_dir)}
    total = sum(sizes.values()) + needed_bytes
    gone = []
    for folder in sizes:
        if total <= limit_bytes:
            break
        if folder.resolve() not in kept and (freed := _remove(folder)):
            gone.append(folder)
            total -= freed
    return gone
