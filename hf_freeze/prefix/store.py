"""The states of many rows on disk: safetensors shards and a manifest, found by the rows' digests.

A shard describes and checks itself, and appears by a rename, so that a build killed at any moment leaves whole shards
and no half ones, several processes write into one store without asking each other, and the next build goes on from
there. Rows are stored without padding and read through memory maps. A model's name is kept for people and decides
nothing here.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import sys
import uuid
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_freeze.errors import CacheDamaged, FreezeError

__all__ = ["Store", "StreamSpec", "clear_caches", "evict_caches", "remove_leftovers"]

FORMAT = 1
MANIFEST = "manifest.json"
SHARDS = "rows-*.safetensors"
TABLES = "tables.safetensors"
SHARD_BYTES = 64 << 20  # what a kill can cost: a few seconds of building
_DIGESTS, _LENGTHS = "row_digests", "row_lengths"


@dataclass(frozen=True)
class StreamSpec:
    """One tensor that crosses the cut.

    Attributes:
        name: Unique in the store.
        side: Whose tokens its length follows: "source", "target", or "" for one entry a row.
        dtype: As torch names it, e.g. "bfloat16".
        shape: Shape of one token's entry.
    """

    name: str
    side: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's entry."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return math.prod(self.shape) * dtype.itemsize


class Store:
    """The rows of one cache: `missing` and `read` look them up, `add` and `flush` write them. Pickles without data.

    Args:
        folder: Where it lives; made by `create`, read by `open`.
    """

    def __init__(self, folder: Path, key: dict[str, Any], specs: Sequence[StreamSpec]) -> None:
        self.folder = folder
        self.key = key
        self.specs = tuple(specs)
        self._shards: list[str] = []
        self._starts: list[np.ndarray[Any, Any]] = []  # per shard [rows, streams]: where each row begins
        self._lengths: list[np.ndarray[Any, Any]] = []
        self._place: dict[bytes, tuple[int, int]] = {}
        self._maps: dict[int, dict[str, torch.Tensor]] = {}
        self._waiting: list[tuple[bytes, dict[str, torch.Tensor]]] = []
        self._waiting_bytes = 0
        self._release: Any = None

    # -------------------------------------------------------------------------------------------------- make and open

    @classmethod
    def create(cls, folder: Path, key: dict[str, Any], specs: Sequence[StreamSpec], model: str = "") -> Store:
        """A store with a new manifest. Whole shards that lie in its folder stay: others may be training from them.

        Args:
            model: What people call the model; it decides nothing.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TABLES).unlink(missing_ok=True)
            manifest = {"format": FORMAT, "key": key, "streams": [asdict(spec) for spec in specs], "model": model}
            manifest["checksum"] = _manifest_checksum(manifest)
            _write_whole(folder / MANIFEST, json.dumps(manifest, indent=2).encode())
        except OSError as error:
            raise _disk_error(error, folder) from error
        return cls.open(folder, key, mend=[])

    @classmethod
    def open(cls, folder: Path, key: dict[str, Any] | None = None, *, mend: list[str] | None = None) -> Store:
        """Opens a store and checks every byte of it.

        Args:
            key: What it must have been built for; None takes what the manifest says.
            mend: Where given, damaged shards are removed, their rows count as missing, and the reasons are added here.

        Raises:
            CacheDamaged: There is none, it is of another version or for another key, or a shard is not what was
                written; the message says which.
        """
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            specs = [StreamSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in manifest["streams"]]
            version, stored_key = manifest["format"], manifest["key"]
        except FileNotFoundError:
            raise CacheDamaged(f"{folder} was opened as a prefix cache; it has no {MANIFEST}. Build it.") from None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CacheDamaged(f"{folder / MANIFEST} cannot be read ({error!r}). Build the cache again.") from error
        if version != FORMAT:
            raise CacheDamaged(
                f"{folder} is a prefix cache of format {version}; this version reads format {FORMAT}. Build it again."
            )
        if key is not None and stored_key != key:
            differing = [name for name in {*key, *stored_key} if key.get(name) != stored_key.get(name)]
            told = "; ".join(f"{n} was {stored_key.get(n)!r}, is {key.get(n)!r}" for n in sorted(differing))
            raise CacheDamaged(f"{folder} was built for something else: {told}. Build the cache again.")
        if manifest.get("checksum") != _manifest_checksum(manifest):
            raise CacheDamaged(f"{folder / MANIFEST} does not hold what was written. Build the cache again.")
        store = cls(folder, stored_key, specs)
        store._hold()
        for path in sorted(folder.glob(SHARDS)):
            try:
                store._adopt(path)
            except CacheDamaged as damage:
                if mend is None:
                    raise
                mend.append(str(damage))
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            os.utime(folder / MANIFEST)  # when it was last used, for eviction
        return store

    def _hold(self) -> None:
        """Keeps the store from being evicted while this object lives."""
        descriptor = _lease(self.folder, shared=True)
        if descriptor is not None:
            self._release = weakref.finalize(self, os.close, descriptor)

    def close(self) -> None:
        """Lets the store be evicted again; it can still be read."""
        if self._release is not None:
            self._release()

    def refresh(self) -> None:
        """Takes in the shards that other processes have finished since."""
        known = set(self._shards)
        for path in sorted(self.folder.glob(SHARDS)):
            if path.name not in known:
                self._adopt(path)

    def _adopt(self, path: Path) -> None:
        """Reads a shard's index after checking all of its bytes."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CacheDamaged(f"{path} is damaged or cut short ({error}). Build the cache again.") from error
        if metadata.get("checksum") != _checksum(tensors):
            raise CacheDamaged(f"{path} does not hold the bytes that were written. Build the cache again.")
        if metadata.get("key") != _digest_of(self.key):
            raise CacheDamaged(f"{path} was built for something else. Build the cache again.")
        for spec in self.specs:
            found = tensors.get(spec.name)
            if found is None or str(found.dtype) != f"torch.{spec.dtype}" or tuple(found.shape[1:]) != spec.shape:
                raise CacheDamaged(f"{path} holds other streams than the manifest names. Build the cache again.")
        lengths = tensors[_LENGTHS].numpy().copy()
        self._register(path.name, tensors[_DIGESTS].numpy(), lengths)

    def _register(self, name: str, digests: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> None:
        shard = len(self._shards)
        self._shards.append(name)
        self._lengths.append(lengths)
        self._starts.append(np.cumsum(lengths, axis=0) - lengths)
        for row in range(len(digests)):
            self._place.setdefault(digests[row].tobytes(), (shard, row))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_release": None, "_maps": {}, "_waiting": [], "_waiting_bytes": 0}

    # ----------------------------------------------------------------------------------------------------------- rows

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._place

    @property
    def stored_bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum((self.folder / name).stat().st_size for name in self._shards)

    def length(self, digest: bytes, stream: str) -> int:
        """Number of tokens that a row has in a stream.

        Raises:
            KeyError: The row is not in the store.
        """
        shard, row = self._place[digest]
        return int(self._lengths[shard][row, [spec.name for spec in self.specs].index(stream)])

    def read(self, digest: bytes) -> dict[str, torch.Tensor]:
        """A row's tensors [tokens, ...] by stream, as views of a memory map: they must not be written to.

        Raises:
            KeyError: The row is not in the store.
        """
        shard, row = self._place[digest]
        if shard not in self._maps:
            path = self.folder / self._shards[shard]
            try:
                with safe_open(path, framework="pt") as file:
                    self._maps[shard] = {spec.name: file.get_tensor(spec.name) for spec in self.specs}
            except (SafetensorError, OSError, ValueError, RuntimeError) as error:
                raise CacheDamaged(
                    f"{path} was whole when it was opened and is not now ({error}). Build the cache again."
                ) from error
        starts, lengths = self._starts[shard][row], self._lengths[shard][row]
        return {
            spec.name: self._maps[shard][spec.name][int(starts[i]) : int(starts[i] + lengths[i])]
            for i, spec in enumerate(self.specs)
        }

    def add(self, digest: bytes, tensors: dict[str, torch.Tensor]) -> None:
        """Takes a row's tensors [tokens, ...]; writes a shard when enough have come together."""
        self._waiting.append((digest, tensors))
        self._waiting_bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        if self._waiting_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what waits as one shard, whole or not at all.

        Raises:
            FreezeError: The disk is full or the folder cannot be written; the shards written so far stay.
        """
        if not self._waiting:
            return
        digests = np.frombuffer(b"".join(digest for digest, _ in self._waiting), dtype=np.uint8).reshape(-1, 16)
        lengths = np.array([[len(row[spec.name]) for spec in self.specs] for _, row in self._waiting], dtype=np.int64)
        # Contiguous, since safetensors writes nothing else: an image model may keep its channels last.
        tensors = {
            spec.name: torch.cat([row[spec.name] for _, row in self._waiting]).contiguous() for spec in self.specs
        }
        tensors |= {_DIGESTS: torch.from_numpy(digests.copy()), _LENGTHS: torch.from_numpy(lengths)}
        name = SHARDS.replace("*", uuid.uuid4().hex)
        temporary = self.folder / f"{name}.tmp"
        try:
            save_file(tensors, temporary, metadata={"checksum": _checksum(tensors), "key": _digest_of(self.key)})
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / name)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise _disk_error(error, self.folder) from error
        self._register(name, digests, lengths)
        self._waiting, self._waiting_bytes = [], 0

    # --------------------------------------------------------------------------------------------------------- tables

    def save_tables(self, tables: Mapping[str, torch.Tensor]) -> None:
        """Writes what is the same for every row, such as T5's position bias at the greatest length."""
        if tables:
            _save_tensors(self.folder / TABLES, dict(tables))

    def load_tables(self) -> dict[str, torch.Tensor]:
        """What `save_tables` wrote; {} where nothing was.

        Raises:
            CacheDamaged: The file is not what was written.
        """
        path = self.folder / TABLES
        if not path.exists():
            return {}
        try:
            with safe_open(path, framework="pt") as file:
                checksum = (file.metadata() or {}).get("checksum")
                tables = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CacheDamaged(f"{path} is damaged or cut short ({error}). Build the cache again.") from error
        if checksum != _checksum(tables):
            raise CacheDamaged(f"{path} does not hold the bytes that were written. Build the cache again.")
        return tables


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, temporary, metadata={"checksum": _checksum(tensors)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise _disk_error(error, path.parent) from error


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of names, shapes, dtypes and bytes; finds accidents, at several GB a second."""
    state = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _manifest_checksum(manifest: Mapping[str, Any]) -> str:
    return _digest_of([manifest["key"], manifest["streams"]])


def _digest_of(value: Any) -> str:
    """Digest of JSON-ready values."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _disk_error(error: Exception, folder: Path) -> FreezeError:
    free = "unknown"
    with contextlib.suppress(OSError):
        free = f"{shutil.disk_usage(folder if folder.exists() else folder.parent).free / 1e9:.2f} GB"
    return FreezeError(
        f"The prefix cache could not be written to {folder}: {error}. Free there: {free}. What was written whole stays "
        "and the next build goes on from it; free space, or give another cache_dir."
    )


# -------------------------------------------------------------------------------------------------------- many caches


def _caches(cache_dir: Path) -> list[Path]:
    """The stores in a folder, least recently used first; nothing that is not one."""
    if not cache_dir.is_dir():
        return []
    found = [path.parent for path in cache_dir.glob(f"*/{MANIFEST}") if re.fullmatch("[0-9a-f]{24}", path.parent.name)]
    return sorted(found, key=lambda folder: (folder / MANIFEST).stat().st_mtime)


def _lease(folder: Path, *, shared: bool) -> int | None:
    """A lock on a store's manifest, held until its descriptor is closed; None where others hold it, or without locks.

    Whoever trains from a store shares one, so that no other process's eviction takes the rows away from under it.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(folder / MANIFEST, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def clear_caches(cache_dir: str | os.PathLike[str]) -> int:
    """Removes every prefix cache in a folder that nobody trains from, and nothing else; returns the bytes freed."""
    freed = 0
    for folder in _caches(Path(cache_dir)):
        size = _folder_bytes(folder)
        freed += size if _remove(folder) else 0
    return freed


def remove_leftovers(folder: Path) -> None:
    """Removes what killed runs have left in a store, where nobody trains from it."""
    if (folder / MANIFEST).exists() and (descriptor := _lease(folder, shared=False)) is not None:
        for leftover in (*folder.glob("*.tmp"), *folder.glob("*.weights")):
            leftover.unlink(missing_ok=True)
        os.close(descriptor)


def _remove(folder: Path) -> bool:
    """Removes a store, unless somebody trains from it."""
    descriptor = _lease(folder, shared=False)
    if descriptor is None and sys.platform != "win32":
        return False
    shutil.rmtree(folder)
    if descriptor is not None:
        os.close(descriptor)
    return True


def evict_caches(cache_dir: Path, limit_bytes: int, keep: Iterable[Path], needed_bytes: int = 0) -> list[Path]:
    """Removes the least recently used caches until the rest and `needed_bytes` fit in the limit; returns them."""
    kept = {path.resolve() for path in keep}
    sizes = {folder: _folder_bytes(folder) for folder in _caches(cache_dir)}
    total = sum(sizes.values()) + needed_bytes
    gone = []
    for folder, size in sizes.items():
        if total <= limit_bytes:
            break
        if folder.resolve() not in kept and _remove(folder):
            gone.append(folder)
            total -= size
    return gone
