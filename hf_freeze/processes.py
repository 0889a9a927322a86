"""Which process of a launch this is, and how all of them come to one end before any goes on.

A rank that fails alone leaves the others waiting for it; one that catches its failure trains on while they wait. So
what can fail stands in `agreed`: it ends well on every rank, or with the same error on every rank, which names the rank
and the reason. Whoever has nothing to do waits for those who say `pulse` meanwhile. The ranks talk over a gloo group of
their own, so that neither a device nor the time limit of the training's group matters. Collectives of others (a
training step) do not belong into `agreed`: a rank that waits in one hears nothing.

torch is asked, not accelerate's PartialState: making one fixes the device for a whole session of its user.
"""

from __future__ import annotations

import gc
import os
import re
import socket
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

import hf_freeze.errors as errors
from hf_freeze.errors import FreezeError, RankLost, worded

__all__ = ["agreed", "barrier", "from_first", "leave_group", "lost_ranks_named", "pulse", "rank_and_world", "tell_all"]

T = TypeVar("T")
Error = TypeVar("Error", bound=Exception)

PULSE_SECONDS = 15.0  # of work between two words to the others: how late a rank learns that another one failed
# Of one wait, as long as Trainer's own: for what says no pulse, such as a write of many GB. A rank that is gone closes
# its connections and is noticed at once; one whose machine lost the network closes none.
PATIENCE = timedelta(minutes=30)
TOLD = "_hf_freeze_told"  # on an error that all ranks raise
GONE = ("closed by peer", "reset by peer", "broken pipe", "remote process exited", "communicator was aborted")
LATE = ("timed out", "timeout")


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are; (0, 1) where no group was formed.

    >>> rank_and_world()
    (0, 1)
    """
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@contextmanager
def agreed(what: str) -> Iterator[None]:
    """Ends on all ranks alike: nobody leaves before all are through, and where one fails, all raise its error.

    Where all fail alike, and where there is one process, the error stays as it is. May be nested; what is caught inside
    must be caught by all ranks or none.

    Args:
        what: What is done, as in "Rank 1 of 2 could not ...".

    Raises:
        FreezeError: Of the class that the failing rank raised; FreezeError itself for an error that is not ours.
        RankLost: A rank is gone.

    Example:
        >>> with agreed("divide"):
        ...     result = 6 / 2
        >>> result
        3.0
    """
    if rank_and_world()[1] == 1:
        yield
        return
    global _blocks
    _blocks += not _inside
    _inside.append(what)
    try:
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if _was_told(error):
                raise
            failure = error
        _meet("end", failure=failure)
    finally:
        _inside.pop()


def tell_all(value: T) -> list[T]:
    """The value of every rank, on every rank. All must call it.

    >>> tell_all("fp32")
    ['fp32']
    """
    return [value] if rank_and_world()[1] == 1 else [word.value for word in _meet("values", value)]


def from_first(value: T) -> T:
    """The first rank's value, on every rank: one decides where timings, disks or chance differ. All must call it."""
    return tell_all(value if rank_and_world()[0] == 0 else None)[0]  # type: ignore[return-value]


def pulse() -> None:
    """For long work in `agreed`: tells the others now and then that it goes on, and raises what one of them failed by.

    Outside of `agreed` it does nothing.
    """
    if _inside and time.monotonic() - _last_word > PULSE_SECONDS:
        _meet("busy")


def barrier() -> None:
    """Waits for all processes of the group; returns at once where there is one."""
    if rank_and_world()[1] > 1:
        _meet("barrier")


@contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Turns torch's "Connection closed by peer", in whatever collective, into a sentence that names the rank.

    Raises:
        RankLost: In place of such an error.
    """
    try:
        yield
    except RuntimeError as error:
        if any(sign in str(error).lower() for sign in GONE):
            raise _lost(error) from error
        raise


def leave_group() -> None:
    """Ends the group of processes; what holds it goes first, or its threads may outlive the interpreter and abort."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        try:
            dist.barrier()
        finally:  # another process may be gone
            dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------- what ranks say


@dataclass(frozen=True)
class _Word:
    """What a rank tells the others when they meet: where it stands, what failed there, a value; and who it is.

    `kind` is "busy" where it does not wait for the others, who then meet it again.
    """

    kind: str
    task: str
    failure: tuple[str, str] | None = None  # class and text
    value: Any = None
    host: str = field(default_factory=socket.gethostname)
    process: int = field(default_factory=os.getpid)


_inside: list[str] = []  # what the `agreed` blocks around are about
_blocks = 0  # how many outermost ones there were so far
_members: list[tuple[str, int]] = []  # host and process of each rank, as it was last heard of
_me = 0  # the rank of this process then
_last_word = 0.0
_groups: list[weakref.ref[Any]] = []  # the default group and the one beside it


def _meet(kind: str, value: Any = None, failure: Exception | None = None) -> list[_Word]:
    """What every rank says here. Whatever they came for, all have come, and all learn of a failure of any."""
    failed_by = None if failure is None else (_class_of(failure), _text_of(failure))
    mine = _Word(kind, _inside[-1] if _inside else "", failed_by, value)
    while True:
        words = _gather(mine)
        if any(word.failure for word in words):
            error = _common_error(words, failure)
            raise error from (error.__cause__ if error is failure else failure)
        if kind == "busy":
            return words
        if all(word.kind != "busy" for word in words):
            break
    if len({(word.kind, word.task) for word in words}) > 1:
        places = ", ".join(f"rank {rank} is at '{word.task}' ({word.kind})" for rank, word in enumerate(words))
        raise _as_told(
            FreezeError(f"The ranks came to different places: {places}. Every rank must make the same calls, in order.")
        )
    return words


def _common_error(words: Sequence[_Word], own: Exception | None) -> Exception:
    """What all ranks raise, each for itself: the failure of the first that failed, or its own where all are alike."""
    if own is not None and len({word.failure for word in words}) == 1:
        return _as_told(own)
    rank, word = next((rank, word) for rank, word in enumerate(words) if word.failure)
    assert word.failure is not None
    name, text = word.failure
    kind = getattr(errors, name, FreezeError)
    return _as_told(kind(f"Rank {rank} of {len(words)} could not {word.task or 'go on'}: {text}"))


def _as_told(error: Error) -> Error:
    setattr(error, TOLD, _blocks)
    return error


def _was_told(error: BaseException | None) -> bool:
    """Whether all ranks have raised this error, or the one that it was raised from, in the block that they are in."""
    while error is not None:
        if getattr(error, TOLD, None) == _blocks:
            return True
        error = error.__cause__
    return False


def _class_of(error: Exception) -> str:
    """The nearest class of `hf_freeze.errors` that an error is one of."""
    known = (kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
    return next(known, FreezeError.__name__)


def _text_of(error: Exception) -> str:
    return str(error) if isinstance(error, FreezeError) else worded(error)


# ------------------------------------------------------------------------------------------------------- how they talk


def _gather(word: _Word) -> list[_Word]:
    global _last_word, _me
    _me, world = rank_and_world()
    words: list[Any] = [None] * world
    try:
        dist.all_gather_object(words, word, group=_group())
    except RuntimeError as error:
        raise _lost(error) from error
    _members[:] = [(heard.host, heard.process) for heard in words]
    _last_word = time.monotonic()
    return words


def _group() -> Any:
    """A gloo group of all ranks beside the default one, made when they first meet."""
    default, beside = (ref() for ref in _groups) if _groups else (None, None)
    if beside is None or default is not dist.group.WORLD:
        if not dist.is_gloo_available():
            return dist.group.WORLD
        if dist.get_backend() == "gloo":  # the next line notices a rank that is gone, as making a group does not
            dist.all_gather_object([None] * dist.get_world_size(), None)
        beside = dist.new_group(backend="gloo", timeout=PATIENCE)
        _groups[:] = [weakref.ref(dist.group.WORLD), weakref.ref(beside)]
    return beside


def _lost(error: RuntimeError) -> RankLost:
    """Names the rank that is gone, where that can be told: the other one of two, or one of this machine's."""
    me, world = rank_and_world()
    if world == 1:  # the group is gone too: as they were last heard of
        me, world = _me, max(2, len(_members))
    gone = _dead_ranks(me) or ([1 - me] if world == 2 else [])
    who = " and ".join(f"rank {rank} of {world}" for rank in gone) or f"another rank of {world}"
    who = who[0].upper() + who[1:]
    reason = re.sub(r"^\[\S*\] ", "", str(error).partition("\n")[0]).partition(". ")[0] or type(error).__name__
    if any(sign in reason.lower() for sign in LATE) and not any(sign in reason.lower() for sign in GONE):
        text = (
            f"{who} did not come to where rank {me} waited for it: {reason}. Its machine may have lost the network, or "
            "it hangs: what it printed last says where it is. End what is left of it, and start all of them again."
        )
    else:
        text = (
            f"{who} is gone, and rank {me} cannot go on without it: {reason}. It was killed, for instance because the "
            "memory was full, or it ended by an error of its own, which it printed. Start all of them again."
        )
    return _as_told(RankLost(text))


def _dead_ranks(me: int) -> list[int]:
    """Ranks of this machine whose process has ended; waits a moment, since connections close before a process does."""
    machine = socket.gethostname()
    mates = {rank: process for rank, (host, process) in enumerate(_members) if host == machine and rank != me}
    with suppress(ImportError):  # of psutil
        for _ in range(20 if mates else 0):
            if gone := [rank for rank, process in mates.items() if _has_ended(process)]:
                return gone
            time.sleep(0.1)
    return []


def _has_ended(process: int) -> bool:
    import psutil  # type: ignore[import-untyped]  # accelerate brings it

    try:
        return bool(psutil.Process(process).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
