"""Stores are damaged at random, before, after and while they are open: training is right, or a sentence says why not.

python tests/prefix/test_store_damages.py DAMAGES [SEED]

A damage is drawn by its number: what, where in the store, and when. After it the store is opened and built, and a batch
of every row is trained from each. Loss and gradients must be those without a cache, or the error one of ours.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache as once
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from hf_freeze import PrefixCache
from hf_freeze.errors import FreezeError
from hf_freeze.prefix import store as store_room
from hf_freeze.prefix.cache import PreparedCache
from hf_freeze.prefix.folder import MANIFEST, SHARDS, TABLES, manifest_checksum
from hf_freeze.prefix.leases import LOCK
from tests.prefix.test_store import frozen_model, frozen_t5, pad_right, pairs_of_tokens

if sys.platform == "win32":
    pytest.skip("pipes, sockets and alarms", allow_module_level=True)

ROWS = pairs_of_tokens()
BATCHES = (ROWS[:4], ROWS[4:])
MODELS: dict[str, Callable[[int], nn.Module]] = {"llama": frozen_model, "t5": frozen_t5}
MOMENTS = ("before it is opened", "before a row is read", "while it is trained from")
SECONDS = 20  # then it hangs
SAME = 1e-5


# -------------------------------------------------------------------------------------------------------------- a store


@dataclass
class Subject:
    """A model that is frozen and proved, where its cache lives, and what training without a cache gives."""

    prepared: PreparedCache
    folder: Path
    whole: Path
    others: list[Path]
    plain: list[tuple[float, list[torch.Tensor]]]

    @property
    def store(self) -> Path:
        """The store as it is now."""
        return self.folder / next(path.name for path in self.whole.iterdir() if path.is_dir())

    def restore(self) -> None:
        """Puts the whole store back."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.whole, self.folder)


_ROOTS: list[tempfile.TemporaryDirectory[str]] = []  # until the process ends


@once
def _built(kind: str, seed: int) -> tuple[PreparedCache, Path]:
    """A cache in a folder of its own, a few rows a shard, and its folder."""
    names = random.Random(f"{kind} {seed}")

    def uuid4() -> uuid.UUID:
        """Names of shards, so that a number is the same damage each time."""
        return uuid.UUID(int=names.getrandbits(128))

    _ROOTS.append(tempfile.TemporaryDirectory(prefix="damages-", ignore_cleanup_errors=True))
    folder = Path(_ROOTS[-1].name) / "caches"
    prepared = PrefixCache.prepare(
        MODELS[kind](seed), ROWS, pad_right, cache_dir=folder, token_budget=40, progress=False
    )
    with mock.patch.object(store_room, "SHARD_BYTES", 4000), mock.patch.object(uuid, "uuid4", uuid4):
        prepared.build().close()
    return prepared, folder


@once
def _whole(kind: str) -> Path:
    """A copy of a cache that is never damaged."""
    _, folder = _built(kind, 0)
    return Path(shutil.copytree(folder, folder.with_name("whole")))


@once
def subject(kind: str) -> Subject:
    prepared, folder = _built(kind, 0)
    whole = _whole(kind)
    others = [next(path for path in place.iterdir() if path.is_dir())
              for place in (_built(kind, 1)[1], _whole("llama" if kind == "t5" else "t5"))]  # fmt: skip
    plain = [_step(prepared.model, pad_right(rows)) for rows in BATCHES]
    return Subject(prepared, folder, whole, others, plain)


def _step(model: nn.Module, batch: Any) -> tuple[float, list[torch.Tensor]]:
    torch.manual_seed(7)  # dropout above the cut
    loss = model.train()(**batch).loss
    return loss.item(), list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def _train(on: Subject, cache: PrefixCache, collator: Any) -> str:
    """Trains a batch of every row; "" where loss and gradients are right."""
    for (wanted, gradients), rows in zip(on.plain, BATCHES, strict=True):
        used = cache.batches_used
        loss, got = _step(cache.model, collator(rows))
        largest = max(float(gradient.norm()) for gradient in gradients)
        gap = max(float((a - b).norm()) for a, b in zip(gradients, got, strict=True)) / largest
        if abs(loss - wanted) > SAME * abs(wanted) or not gap <= SAME:
            return f"WRONG: loss {loss:.6f} for {wanted:.6f}, gradients {gap:.1e} off"
        if cache.batches_used != used + 1:
            return "WRONG: a cache that was opened does not know its rows"
    return ""


# --------------------------------------------------------------------------------------------------- damages to a file


def _flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 40))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _flip_in_place(path: Path, draw: random.Random) -> None:
    """Through another handle, and the old time is put back."""
    before = path.stat()
    with open(path, "rb+") as file:
        place = draw.randrange(before.st_size)
        file.seek(place)
        value = file.read(1)[0]
        file.seek(place)
        file.write(bytes([value ^ 1 << draw.randrange(8)]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _cut(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def _append(path: Path, draw: random.Random) -> None:
    with open(path, "ab") as file:
        file.write(draw.choice((b"\0", b"\0" * 4096, b" ", b"{}", draw.randbytes(100), path.read_bytes())))


def _zero(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    stop = min(len(content), start + draw.choice((1, 16, 512, 4096)))
    content[start:stop] = bytes(stop - start)
    path.write_bytes(content)


def _repeat(path: Path, draw: random.Random) -> None:
    """A block of the file stands where another one should."""
    content = bytearray(path.read_bytes())
    size = min(draw.choice((4, 64, 512)), len(content) // 2)
    source, target = (draw.randrange(len(content) - size + 1) for _ in range(2))
    content[target : target + size] = content[source : source + size]
    path.write_bytes(content)


def _fill(path: Path, draw: random.Random) -> None:
    size = path.stat().st_size
    path.write_bytes(
        draw.choice((b"", b"\n", b"{}", b"[]", b"null", draw.randbytes(size), b"\xff" * 64, b"[" * 90_000))
    )


def _remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def _stand_in(path: Path, draw: random.Random) -> None:
    """Something that is no file."""
    kept = path.with_name("kept")
    path.rename(kept)
    what = draw.choice(
        ("folder", "full folder", "pipe", "link", "link elsewhere", "dangling", "loop", "socket", "device")
    )
    if what in ("folder", "full folder"):
        path.mkdir()
        if what == "full folder":
            kept.rename(path / "kept")
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "socket":
        before = Path.cwd()
        os.chdir(path.parent)  # a name of at most 108 bytes
        try:
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(path.name)
        finally:
            os.chdir(before)
    elif what == "device":
        try:
            os.mknod(path, 0o020666, os.makedev(1, draw.choice((3, 5, 8))))  # null, zero, random
        except PermissionError:
            os.mkfifo(path)
    else:
        path.symlink_to({"link": "kept", "link elsewhere": "/dev/zero", "dangling": "none", "loop": path.name}[what])


def _exchange(path: Path, draw: random.Random) -> None:
    """Two files change places."""
    other = draw.choice([each for each in sorted(path.parent.iterdir()) if each != path])
    between = path.with_name("between")
    path.rename(between)
    other.rename(path)
    between.rename(other)


def _another_row(path: Path, draw: random.Random) -> None:
    """A shard of this cache stands twice, the second time in this file's place."""
    shards = sorted(path.parent.glob(SHARDS))
    _replace(path, draw.choice(shards))


def _replace(path: Path, other: Path) -> None:
    content, times = other.read_bytes(), path.stat()
    temporary = path.with_name("between")
    temporary.write_bytes(content)
    os.utime(temporary, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(temporary, path)


def _header(path: Path, draw: random.Random) -> None:
    """The header of a safetensors file says something else."""
    whole = path.read_bytes()
    stop = 8 + int.from_bytes(whole[:8], "little")
    if not whole[:8].strip(b"\0") or stop > len(whole):
        return _flip(path, draw)
    if draw.random() < 0.2:
        length = draw.choice((0, 1, stop, len(whole), 1 << 30, 1 << 62, (1 << 64) - 1))
        path.write_bytes(length.to_bytes(8, "little") + whole[8:])
        return None
    header = json.loads(whole[8:stop])
    text = _mutated(header, draw).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[stop:])
    return None


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**70, 1.5, float("nan"), float("inf"), "", "x", "load", "nn", "F16", "I32", "float16",
    [], [0], [-1, 4], [0, 8], [1] * 40, [[[[]]]], {}, {"a": 1},
)  # fmt: skip


def _mutated(value: Any, draw: random.Random) -> str:
    """JSON in which one value is another one, is gone, stands twice, or is nested deep."""
    places = list(_places(value))
    holder, key = draw.choice(places)
    how = draw.choice(("value", "value", "value", "gone", "twice", "deep", "number"))
    if how == "gone":
        del holder[key]
    elif how == "value":
        holder[key] = draw.choice(VALUES)
    elif how == "number" and isinstance(holder[key], int):
        holder[key] += draw.choice((-1, 1, 4, 1000))
    elif how == "deep":
        holder[key] = "DEEP"
    text = json.dumps(value)
    if how == "twice" and isinstance(holder, dict):
        text = text.replace(f'"{key}":', f'"{key}": {json.dumps(draw.choice(VALUES))}, "{key}":', 1)
    return text.replace('"DEEP"', "[" * 50_000 + "]" * 50_000)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield value, key
            yield from _places(inner)


def _manifest(path: Path, draw: random.Random) -> None:
    values = json.loads(path.read_text())
    text = _mutated(values, draw)
    if draw.random() < 0.5:  # as one that had been written so
        try:
            values["checksum"] = manifest_checksum(values)
            text = json.dumps(values)
        except (KeyError, TypeError):
            pass
    path.write_text(text)


IN_A_FILE = (
    _flip, _flip, _flip_in_place, _flip_in_place, _cut, _append, _zero, _repeat, _fill, _remove, _stand_in, _stand_in,
    _exchange, _another_row,
)  # fmt: skip


# --------------------------------------------------------------------------------------------------- damages to a store


def _of_another_cache(on: Subject, draw: random.Random) -> None:
    """A file of another cache stands in the place of ours, or beside."""
    other = draw.choice(on.others)
    theirs = draw.choice([path for path in sorted(other.iterdir()) if path.stat().st_size])
    same = [path for path in on.store.iterdir() if path.name[:4] == theirs.name[:4]]
    if not same or draw.random() < 0.2:
        shutil.copy2(theirs, on.store / theirs.name)
    else:
        _replace(draw.choice(sorted(same)), theirs)


def _all_of_another_cache(on: Subject, draw: random.Random) -> None:
    shutil.rmtree(on.store)
    shutil.copytree(draw.choice(on.others), on.store)


def _without_folder(on: Subject, draw: random.Random) -> None:
    shutil.rmtree(on.store)
    if draw.random() < 0.3:
        on.store.mkdir()


def _file_for_folder(on: Subject, draw: random.Random) -> None:
    shutil.rmtree(on.store)
    draw.choice((on.store.touch, lambda: on.store.symlink_to("nowhere"), lambda: os.mkfifo(on.store)))()


def _moved_folder(on: Subject, draw: random.Random) -> None:
    on.store.rename(on.folder / "moved")
    on.store.symlink_to("moved")


def _emptied_folder(on: Subject, draw: random.Random) -> None:
    for path in sorted(on.store.iterdir()):
        if draw.random() < 0.5:
            path.unlink()


def _all_shards_turn(on: Subject, draw: random.Random) -> None:
    shards = sorted(on.store.glob(SHARDS))
    contents = [path.read_bytes() for path in shards]
    for path, content in zip(shards, [*contents[1:], contents[0]], strict=True):
        path.write_bytes(content)


def _touched(on: Subject, draw: random.Random) -> None:
    """No damage: the same bytes in other files."""
    for path in on.store.iterdir():
        copy = path.with_name("between")
        shutil.copy(path, copy)
        os.replace(copy, path)


def _cleared(on: Subject, draw: random.Random) -> None:
    """No damage while somebody trains."""
    PrefixCache.clear(on.folder)


IN_A_STORE = (
    _of_another_cache, _of_another_cache, _of_another_cache, _all_of_another_cache, _without_folder, _file_for_folder,
    _moved_folder, _emptied_folder, _all_shards_turn, _touched, _cleared,
)  # fmt: skip


@contextmanager
def _system_refuses(on: Subject, draw: random.Random) -> Iterator[None]:
    """Opening or reading one file is refused, as for another user's, on a bad disk, or where too many are open."""
    number = draw.choice((errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENOMEM, errno.ESTALE))
    name = draw.choice(sorted(path.name for path in on.store.iterdir()))
    reads = draw.random() < 0.3
    real_open, real_read = os.open, os.preadv

    def open_file(path: Any, *rest: Any, **named: Any) -> int:
        if not reads and Path(os.fspath(path)).name == name:
            raise OSError(number, os.strerror(number), os.fspath(path))
        return real_open(path, *rest, **named)

    def read(*given: Any) -> int:
        if reads and draw.random() < 0.2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real_read(*given)

    with mock.patch.object(os, "open", open_file), mock.patch.object(os, "preadv", read):
        yield


# -------------------------------------------------------------------------------------------------------------- attack


@dataclass(frozen=True)
class Told:
    """What came of a damage."""

    number: int
    damage: str
    moment: str
    outcomes: tuple[str, ...]

    @property
    def failed(self) -> bool:
        """Whether any of it was neither right nor a sentence of ours."""
        return any(outcome.split(":")[0].isupper() for outcome in self.outcomes)


class _Hangs(BaseException):
    """Raised by the alarm."""


def attack(number: int, seed: int = 0) -> Told:
    """Does the damage of that number to a whole store, and tells what `open`, `build` and training made of it."""
    draw = random.Random(f"{seed} {number}")
    on = subject(draw.choice(tuple(MODELS)))
    on.restore()
    moment = draw.choice(MOMENTS)
    kind = draw.choice(("file",) * 6 + ("manifest", "header", "store", "store", "system"))
    harm, name = _draw_harm(on, draw, kind)
    outcomes: list[str] = []
    during = _system_refuses(on, draw) if kind == "system" else _nothing()
    if moment == MOMENTS[0]:
        harm()
        with during:
            outcomes.append(_outcome(on, on.prepared.open))
            outcomes.append(_outcome(on, on.prepared.build))
    else:
        opened = on.prepared.open()
        collator = draw.choice((opened.collator, pickle.loads(pickle.dumps(opened.collator))))  # itself, or a worker's
        try:
            if moment == MOMENTS[2]:
                assert not _train(on, opened, collator)
            time.sleep(0.005)  # a step of the system's clock
            harm()
            with during:
                outcomes.append(_outcome(on, lambda: opened, collator))
        finally:
            opened.close()
        with during if kind != "system" else _nothing():
            outcomes.append(_outcome(on, on.prepared.build))
    if outcomes[-1] == "right":  # what was mended is whole
        outcomes.append("right" if (last := _outcome(on, on.prepared.open)) == "right" else f"NOT MENDED: {last}")
    return Told(number, name, moment, tuple(outcomes))


def _nothing() -> Any:
    return mock.patch.object(os, "getpid", os.getpid)


def _draw_harm(on: Subject, draw: random.Random, kind: str) -> tuple[Callable[[], Any], str]:
    if kind == "system":
        return lambda: None, "the system refuses a file"
    if kind == "store":
        change = draw.choice(IN_A_STORE)
        return lambda: change(on, draw), change.__name__
    if kind == "manifest":
        return lambda: _manifest(on.store / MANIFEST, draw), "_manifest"
    shards = sorted(path.name for path in on.store.glob(SHARDS))
    tables = [TABLES] if (on.store / TABLES).exists() else []
    if kind == "header":
        name = draw.choice(shards + tables * 2)
        return lambda: _header(on.store / name, draw), f"_header of {name[:6]}"
    name = draw.choice(shards + [MANIFEST] * 2 + tables * 3 + [LOCK])
    damage = draw.choice(IN_A_FILE if name != LOCK else (_append, _fill, _remove, _stand_in))
    return lambda: damage(on.store / name, draw), f"{damage.__name__} of {name[:6]}"


def _outcome(on: Subject, get: Callable[[], PrefixCache], collator: Any = None) -> str:
    """ "right", "refused: ..." by an error of ours, or in capitals what it must not be."""

    def hang(*_: Any) -> None:
        raise _Hangs

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a lock that cannot be had, a row that cannot be read again in the end
            cache = get()
            try:
                return _train(on, cache, collator or cache.collator) or "right"
            finally:
                cache.close()
    except FreezeError as error:
        return f"refused: {error}" if len(str(error)) > 40 and str(error).endswith(".") else f"NO SENTENCE: {error}"
    except _Hangs:
        return f"HANGS: longer than {SECONDS} s"
    except BaseException as error:
        return f"FOREIGN: {error!r}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def table(told: list[Told]) -> str:
    """Counts by what was asked and what came of it."""
    counts = Counter((each.moment, outcome.split(":")[0]) for each in told for outcome in each.outcomes)
    lines = [f"{moment:26} {outcome:12} {count:6,}" for (moment, outcome), count in sorted(counts.items())]
    failed = [f"{each.number}: {each.damage}, {each.moment}: {each.outcomes}" for each in told if each.failed]
    return "\n".join([f"{len(told):,} damages, {len(failed)} failed", *lines, *failed])


def test_the_judge_sees_what_is_a_little_off() -> None:
    on = subject("llama")
    on.restore()
    loss, gradients = on.plain[1]
    for plain in ((loss * (1 + 1e-4), gradients), (loss, [gradient * (1 + 1e-4) for gradient in gradients])):
        wrong = replace(on, plain=[on.plain[0], plain])
        assert _outcome(wrong, on.prepared.open).startswith("WRONG: loss")
    assert _outcome(on, on.prepared.open) == "right"


@pytest.mark.parametrize("numbers", [range(16), pytest.param(range(16, 1000), marks=pytest.mark.slow)], ids=str)
def test_no_damage_of_a_store_trains_wrongly_hangs_or_ends_in_another_error(numbers: range) -> None:
    told = [attack(number) for number in numbers]
    assert not any(each.failed for each in told), table(told)


if __name__ == "__main__":
    print(table([attack(number, int((sys.argv[2:] or ["0"])[0])) for number in range(int(sys.argv[1]))]))
