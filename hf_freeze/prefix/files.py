"""Files of a cache, read as what they are and not as what they should be; written by `hf_freeze.files`.

Only regular files are opened, and every number in one is checked before it is used. Nothing is memory-mapped: a map of
a file that another process cuts short ends this process (SIGBUS), and shows the bytes that it writes. What `pread` does
not get is an error like any other. What to do about a damage is the caller's business.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import sys
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors.torch import save_file

from hf_freeze.errors import CacheDamaged, FreezeError
from hf_freeze.files import whole

__all__ = ["DTYPES", "Identity", "Place", "TensorFile", "identity_of", "is_regular", "is_shape", "open_regular",
           "read_json", "read_tensor", "set_aside", "tensors_checksum", "write_tensors"]  # fmt: skip

JSON_BYTES = 16 << 20  # of a manifest or a header; ours have some KB
PIECE_BYTES = 4 << 20  # read at a time for a checksum
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""By their names in a safetensors file."""
if hasattr(torch, "float8_e8m0fnu"):  # from torch 2.7 on
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu


class Identity(NamedTuple):
    """What tells a file from another one, and from itself before it was written to."""

    device: int
    inode: int
    size: int
    written_ns: int
    changed_ns: int


# ------------------------------------------------------------------------------------------------------- any file


_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def is_regular(path: Path) -> bool:
    """Whether a file lies there itself: no folder, pipe or device, and no link to a file elsewhere."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """A descriptor of a regular file, for the length of a `with`. Opening never waits, as it would for a pipe.

    A link is none of ours and may lead anywhere at any time, so it isn't followed; the folder may be one.

    Raises:
        CacheDamaged: There is no such file, or something else stands there.
        FreezeError: The system does not let it be opened; nothing says then that it is damaged.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_NOCTTY"):
        flags |= getattr(os, name, 0)
    try:
        mode = os.lstat(path).st_mode
        if not stat.S_ISREG(mode):
            raise CacheDamaged(f"{path} is {_KINDS.get(stat.S_IFMT(mode), 'something else')} where a file should be.")
        descriptor = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError):
        raise CacheDamaged(f"{path} is gone.") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CacheDamaged(f"{path} is a symbolic link where a file should be.") from None
        raise _unreadable(path, error) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CacheDamaged(f"{path} is no file.")
        yield descriptor
    finally:
        os.close(descriptor)


def _unreadable(path: Path, error: OSError) -> FreezeError:
    return FreezeError(
        f"The prefix cache was asked for; its {path} cannot be read: {error.strerror or error}. Nothing was changed. "
        "Let it be read, or give another cache_dir."
    )


def identity_of(descriptor: int) -> Identity:
    """Which file it is, and as of when."""
    status = os.fstat(descriptor)
    return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


_SEEKING = threading.Lock()


def _read_into(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Reads until the buffer is full or the file ends; returns the bytes read. Moves no other reader's place."""
    done = 0
    while done < len(buffer):
        if sys.platform == "win32":  # without pread, and without forks, which would share the place
            with _SEEKING:
                os.lseek(descriptor, offset + done, os.SEEK_SET)
                piece = os.read(descriptor, len(buffer) - done)
            buffer[done : done + len(piece)] = piece
            count = len(piece)
        else:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            break
        done += count
    return done


def _read_bytes(path: Path, descriptor: int, start: int, stop: int) -> bytearray:
    """The bytes [start, stop) of a file.

    Raises:
        CacheDamaged: It is shorter.
        FreezeError: The disk does not give them.
    """
    content = bytearray(stop - start)
    _fill(path, descriptor, memoryview(content), start)
    return content


def _fill(path: Path, descriptor: int, buffer: memoryview, offset: int) -> None:
    try:
        done = _read_into(descriptor, buffer, offset)
    except OSError as error:
        raise _unreadable(path, error) from error
    if done < len(buffer):
        raise CacheDamaged(f"{path} is damaged or cut short: byte {offset + done:,} is missing.")


def set_aside(path: Path) -> Path:
    """Renames what stands in a file's place, whatever it is; returns where it is now."""
    place = path.with_name(f"{path.name}.aside-{uuid.uuid4().hex[:8]}")
    os.rename(path, place)
    return place


# ----------------------------------------------------------------------------------------------------------- JSON


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        CacheDamaged: There is none, or something else.
        FreezeError: It cannot be read.
    """
    with open_regular(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > JSON_BYTES:
            raise CacheDamaged(f"{path} cannot be read: it has {size:,} bytes, more than any that was written.")
        content = _read_bytes(path, descriptor, 0, size)
    try:
        return _parse_json(content)
    except ValueError as error:
        raise CacheDamaged(f"{path} cannot be read ({error}).") from error


def _parse_json(content: bytes | bytearray) -> dict[str, Any]:
    """One object of plain JSON: without a key twice, and without NaN.

    Raises:
        ValueError: It is none.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("a key stands twice in it")
        return values

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise ValueError("it is no text") from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__} where an object should be")
    return value


# -------------------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class Place:
    """A tensor in a file: what it is, and the byte where it begins."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, count: int) -> Place:
        """A part of it along its first axis."""
        step = math.prod(self.shape[1:]) * self.dtype.itemsize
        return Place(self.dtype, (count, *self.shape[1:]), self.start + first * step)


@dataclass(frozen=True)
class TensorFile:
    """The header of a safetensors file: everything in it is in its place, and fills the file."""

    metadata: dict[str, str]
    places: dict[str, Place]

    @classmethod
    def read(cls, path: Path, descriptor: int) -> TensorFile:
        """Reads the header and checks it against the size of the file.

        Raises:
            CacheDamaged: It is not a safetensors file, or not a whole one.
        """
        size = os.fstat(descriptor).st_size
        try:
            length = int.from_bytes(_read_bytes(path, descriptor, 0, 8), "little")
            if length > min(size - 8, JSON_BYTES):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = _parse_json(_read_bytes(path, descriptor, 8, 8 + length))
            metadata = header.pop("__metadata__", {})
            if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
                raise ValueError("its metadata are no text")
            return cls(metadata, _read_places(header, 8 + length, size))
        except ValueError as error:
            if isinstance(error, FreezeError):
                raise
            raise CacheDamaged(f"{path} is damaged or cut short ({error}).") from error

    def checksum(self, path: Path, descriptor: int) -> str:
        """Digest of names, shapes, dtypes and all bytes as they are in the file now. As `tensors_checksum`."""
        buffer = memoryview(bytearray(PIECE_BYTES))

        def pieces(place: Place) -> Iterator[memoryview]:
            for offset in range(0, place.size, PIECE_BYTES):
                piece = buffer[: min(PIECE_BYTES, place.size - offset)]
                _fill(path, descriptor, piece, place.start + offset)
                yield piece

        return _checksum((name, place.dtype, place.shape, pieces(place)) for name, place in self.places.items())


def _read_places(header: dict[str, Any], start: int, stop: int) -> dict[str, Place]:
    """Where the tensors of a header lie, which fill the bytes from `start` to `stop`."""
    places: dict[str, Place] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name!r} is no tensor")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{name!r} has the dtype {str(dtype)[:40]!r}")
        if not is_shape(shape) or not is_shape(offsets) or len(offsets) != 2:
            raise ValueError(f"{name!r} has no shape and place")
        place = Place(DTYPES[dtype], tuple(shape), start + offsets[0])
        if place.size != offsets[1] - offsets[0]:
            raise ValueError(f"{name!r} has another size than its shape")
        places[name] = place
        spans.append((place.start, place.start + place.size))
    for first, last in sorted(spans):
        if first != start:
            raise ValueError("its tensors overlap or leave gaps")
        start = last
    if start != stop:
        raise ValueError(f"its tensors end at byte {start:,} of {stop:,}")
    return places


def is_shape(value: Any) -> bool:
    """Whether something out of JSON is a list of sizes."""
    return (
        isinstance(value, list) and len(value) <= 8 and all(type(size) is int and 0 <= size < 1 << 48 for size in value)
    )


def read_tensor(path: Path, descriptor: int, place: Place) -> torch.Tensor:
    """A tensor of a file, in memory of its own.

    Raises:
        CacheDamaged: The file ends before.
        FreezeError: The disk does not give it.
    """
    tensor = torch.empty(place.shape, dtype=place.dtype)
    if place.size:
        _fill(path, descriptor, memoryview(_as_bytes(tensor)), place.start)
    return tensor


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> tuple[TensorFile, Identity]:
    """Writes a safetensors file whole, with its checksum in the metadata; returns which file that is."""
    # Contiguous, since safetensors writes nothing else: an image model may keep its channels last.
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with ExitStack() as opened:
        with whole(path) as temporary:
            save_file(tensors, temporary, metadata={"checksum": tensors_checksum(tensors), **metadata})
            with open_regular(temporary) as descriptor:
                written = TensorFile.read(temporary, descriptor)
            if sys.platform != "win32":  # where an open file cannot be renamed
                descriptor = opened.enter_context(open_regular(temporary))
        if sys.platform == "win32":
            descriptor = opened.enter_context(open_regular(path))
        return written, identity_of(descriptor)


def tensors_checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of names, shapes, dtypes and bytes; finds accidents, at several GB a second."""
    return _checksum(
        (name, tensor.dtype, tensor.shape, [_as_bytes(tensor.contiguous()).data] if tensor.numel() else [])
        for name, tensor in tensors.items()
    )


def _checksum(tensors: Iterable[tuple[str, torch.dtype, Sequence[int], Iterable[memoryview]]]) -> str:
    state = xxhash.xxh3_128()
    for name, dtype, shape, pieces in sorted(tensors, key=lambda tensor: tensor[0]):
        state.update(f"{name} {dtype} {list(shape)}".encode())
        for piece in pieces:
            state.update(piece)
    return state.hexdigest()


def _as_bytes(tensor: torch.Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()
