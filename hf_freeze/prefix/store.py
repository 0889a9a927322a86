"""The states of many rows on disk: safetensors shards and a manifest, found by the rows' digests.

A shard describes and checks itself, and appears by a rename, so that a build killed at any moment leaves whole shards
and no half ones, several processes write into one store without asking each other, and the next build goes on from
there. Rows are stored without padding. What is read is what was checked: a shard that was touched since is checked
again, to the bit, before a row of it is given. A model's name is kept for people and decides nothing here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from hf_freeze.errors import CacheDamaged, FreezeError
from hf_freeze.files import write_whole
from hf_freeze.prefix.files import (
    Identity,
    Place,
    TensorFile,
    identity_of,
    is_regular,
    open_regular,
    read_tensor,
    set_aside,
    tensors_checksum,
    write_tensors,
)
from hf_freeze.prefix.folder import (
    DIGESTS,
    FORMAT,
    LENGTHS,
    MANIFEST,
    SHARDS,
    TABLES,
    checksum_of,
    manifest_checksum,
    read_manifest,
    shard_paths,
    short,
)
from hf_freeze.prefix.leases import LOCK, PATIENCE_SECONDS, share_store
from hf_freeze.prefix.states import StreamSpec, TableSpec, same_states
from hf_freeze.processes import pulse

__all__ = ["Store"]

SHARD_BYTES = 64 << 20  # what a kill can cost: a few seconds of building


@dataclass
class _Shard:
    """A shard as it was checked: which file, with which bytes, and where its rows lie in it."""

    name: str
    identity: Identity
    checksum: str
    places: dict[str, Place]
    starts: np.ndarray[Any, Any]  # [rows, streams]: where each row begins
    lengths: np.ndarray[Any, Any]


class Store:
    """The rows of one cache: `in` and `read` look them up, `add` and `flush` write them. Pickles without data.

    Args:
        folder: Where it lives; made by `create`, read by `open`.
    """

    def __init__(self, folder: Path, key: dict[str, Any], specs: Sequence[StreamSpec]) -> None:
        self.folder = folder
        self.key = key
        self.specs = tuple(specs)
        self._shards: list[_Shard] = []
        self._place: dict[bytes, tuple[int, int]] = {}
        self._doubles: list[tuple[tuple[int, int], tuple[int, int]]] = []  # places of a row that stands in two shards
        self._waiting: dict[bytes, dict[str, torch.Tensor]] = {}
        self._waiting_bytes = 0
        self._let_lease_go: Any = None

    # -------------------------------------------------------------------------------------------------- make and open

    @classmethod
    def create(
        cls,
        folder: Path,
        key: dict[str, Any],
        specs: Sequence[StreamSpec],
        model: str = "",
        *,
        mend: list[str] | None = None,
    ) -> Store:
        """A store with a new manifest. Whole shards that lie in its folder stay: others may be training from them.

        Args:
            model: What people call the model; it decides nothing.
            mend: Takes the reasons why something that lies there is not used.
        """
        reasons = [] if mend is None else mend
        manifest = {"format": FORMAT, "key": key, "streams": [asdict(spec) for spec in specs], "model": model}
        manifest["checksum"] = manifest_checksum(manifest)
        try:
            lease = _lease_of_new(folder, reasons)
            try:
                _move_aside(folder / MANIFEST, reasons)
                write_whole(folder / MANIFEST, json.dumps(manifest, indent=2))
                return cls.open(folder, key, specs, mend=reasons)
            finally:
                if lease is not None:
                    os.close(lease)
        except OSError as error:
            raise _disk_error(error, folder) from error

    @classmethod
    def open(
        cls,
        folder: Path,
        key: dict[str, Any] | None = None,
        specs: Sequence[StreamSpec] | None = None,
        *,
        mend: list[str] | None = None,
    ) -> Store:
        """Opens a store and checks every byte of it.

        Args:
            key: What it must have been built for, and with which streams; None takes what the manifest says.
            mend: Where given, damaged shards are removed, their rows count as missing, and the reasons are added here.

        Raises:
            CacheDamaged: There is none, it is of another version or for another key, or a shard is not what was
                written; the message says which.
            FreezeError: A file cannot be read, or another process is about to remove the store.
        """
        if not os.path.lexists(folder / MANIFEST):
            raise CacheDamaged(f"{folder} was opened as a prefix cache; it has no {MANIFEST}. Build it.")
        with _advising_to_rebuild():
            if mend is not None:
                _move_aside(folder / LOCK, mend)
            store = cls(folder, {}, ())
            store._hold(share_store(folder))  # first, or what is read now may be removed before it is held
            try:
                store.key, store.specs, _ = read_manifest(folder)
                store._check_request(key, specs)
                store._adopt_all(mend)
            except BaseException:
                store.close()
                raise
        with contextlib.suppress(OSError):
            os.utime(folder / MANIFEST)  # when it was last used, for eviction
        return store

    def _check_request(self, key: dict[str, Any] | None, specs: Sequence[StreamSpec] | None) -> None:
        """Refuses a store that was built for something else."""
        if key is not None and self.key != key:
            differences = "; ".join(
                f"{name} was {short(self.key.get(name))}, is {short(key.get(name))}"
                for name in sorted({*key, *self.key})
                if self.key.get(name) != key.get(name)
            )
            raise CacheDamaged(f"{self.folder} was built for something else: {differences}.")
        if specs is not None and self.specs != tuple(specs):
            raise CacheDamaged(f"{self.folder / MANIFEST} names other streams than cross the cut of this prefix.")

    def _hold(self, lease: int | None) -> None:
        """Keeps the store from being removed while this object lives."""
        if lease is not None:
            self._let_lease_go = weakref.finalize(self, os.close, lease)

    def close(self) -> None:
        """Lets the store be evicted again; it can still be read."""
        if self._let_lease_go is not None:
            self._let_lease_go()

    def refresh(self) -> None:
        """Takes in the shards that other processes have finished since."""
        with _advising_to_rebuild():
            self._adopt_all(None)

    def _adopt_all(self, mend: list[str] | None) -> None:
        known = {shard.name for shard in self._shards}
        for path in shard_paths(self.folder):
            if path.name in known:
                continue
            _pulse()
            try:
                self._adopt(path)
            except CacheDamaged as error:
                if not os.path.lexists(path):
                    continue  # another process has mended it
                if mend is None:
                    raise
                self._drop_shard(path, str(error), mend)
        pairs = self._contradictions()
        for one, other in pairs:
            damage = CacheDamaged(
                f"{self.folder / one} and {other} hold other states for the same row: one of them is not what it says."
            )
            if mend is None:
                raise damage
            for name in (one, other):  # nothing tells which one
                self._drop_shard(self.folder / name, str(damage), mend)
        if pairs:
            self._shards, self._place, self._doubles = [], {}, []
            self._adopt_all(mend)

    def _drop_shard(self, path: Path, reason: str, reasons: list[str]) -> None:
        """Removes a damaged shard, or moves away what is none and stands in its place."""
        try:
            if is_regular(path):
                path.unlink()
                reasons.append(reason)
            else:
                _move_aside(path, reasons)
        except OSError as error:
            raise FreezeError(
                f"The prefix cache was to be built again: {reason} It cannot be removed: {error.strerror or error}. "
                "Remove it, or give another cache_dir."
            ) from error

    def _adopt(self, path: Path) -> None:
        """Reads a shard's index after checking all of its bytes."""
        with open_regular(path) as descriptor:
            identity = identity_of(descriptor)
            file = TensorFile.read(path, descriptor)
            checksum = file.checksum(path, descriptor)
            if file.metadata.get("checksum") != checksum:
                raise CacheDamaged(f"{path} does not hold the bytes that were written.")
            if file.metadata.get("key") != checksum_of(self.key):
                raise CacheDamaged(f"{path} was built for something else.")
            self._check_index(path, file)
            digests = read_tensor(path, descriptor, file.places[DIGESTS]).numpy()
            lengths = read_tensor(path, descriptor, file.places[LENGTHS]).numpy()
            if identity_of(descriptor) != identity:
                raise CacheDamaged(f"{path} was written to while it was read.")
        for column, spec in enumerate(self.specs):
            tokens = file.places[spec.name].shape[0]
            mine = lengths[:, column]
            if (mine < 0).any() or (mine > tokens).any() or int(mine.sum()) != tokens:
                raise CacheDamaged(f"{path} has rows of other lengths than its streams.")
        self._register(path.name, identity, checksum, file.places, digests, lengths)

    def _check_index(self, path: Path, file: TensorFile) -> None:
        """Refuses other streams than the manifest's, and an index that doesn't fit them."""
        rows = next(iter(file.places[DIGESTS].shape), 0) if DIGESTS in file.places else 0
        wanted = {DIGESTS: (torch.uint8, (rows, 16)), LENGTHS: (torch.int64, (rows, len(self.specs)))}
        names = {*wanted, *(spec.name for spec in self.specs)}
        if not rows or file.places.keys() != names:
            raise CacheDamaged(f"{path} holds other streams than the manifest names, or no rows.")
        for name, (dtype, shape) in wanted.items():
            if file.places[name].dtype != dtype or file.places[name].shape != shape:
                raise CacheDamaged(f"{path} has an index of rows that cannot be read: {name} is of another kind.")
        for spec in self.specs:
            place = file.places[spec.name]
            if place.dtype != getattr(torch, spec.dtype) or not place.shape or place.shape[1:] != spec.shape:
                raise CacheDamaged(f"{path} holds other streams than the manifest names.")

    def _register(
        self,
        name: str,
        identity: Identity,
        checksum: str,
        places: dict[str, Place],
        digests: np.ndarray[Any, Any],
        lengths: np.ndarray[Any, Any],
    ) -> None:
        starts = np.cumsum(lengths, axis=0) - lengths
        self._shards.append(_Shard(name, identity, checksum, places, starts, lengths))
        for row, digest in enumerate(digests):
            place = (len(self._shards) - 1, row)
            first = self._place.setdefault(digest.tobytes(), place)
            if first != place:
                self._doubles.append((first, place))

    def _contradictions(self) -> list[tuple[str, str]]:
        """The names of two shards, for each row that both hold with unlike states: the one read first, then the other.

        Two processes may have built a row at once; what they made is the same but for rounding.
        """
        pairs = []
        low = self.key.get("precision") not in (None, "fp32")  # the rest rounds to 16 bits
        for (one, first), (other, second) in self._doubles:
            states = self._read(self._shards[one], first), self._read(self._shards[other], second)
            if not all(same_states(states[0][spec.name], states[1][spec.name], low=low) for spec in self.specs):
                pairs.append((self._shards[one].name, self._shards[other].name))
        if not pairs:
            self._doubles = []
        return pairs

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_let_lease_go": None, "_waiting": {}, "_waiting_bytes": 0}

    # ----------------------------------------------------------------------------------------------------------- rows

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._place

    @property
    def stored_bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(shard.identity.size for shard in self._shards)

    def read(self, digest: bytes) -> dict[str, torch.Tensor]:
        """A row's tensors [tokens, ...] by stream, in memory of their own.

        Raises:
            KeyError: The row is not in the store.
            CacheDamaged: Its shard does not hold what it held when it was opened.
        """
        shard, row = self._place[digest]
        with _advising_to_rebuild():
            return self._read(self._shards[shard], row)

    def _read(self, shard: _Shard, row: int) -> dict[str, torch.Tensor]:
        path = self.folder / shard.name
        parts = {
            spec.name: shard.places[spec.name].rows(int(shard.starts[row, i]), int(shard.lengths[row, i]))
            for i, spec in enumerate(self.specs)
        }
        with open_regular(path) as descriptor:
            for _ in range(3):
                tensors = {name: read_tensor(path, descriptor, place) for name, place in parts.items()}
                if identity_of(descriptor) == shard.identity:  # looked at afterwards: it was so all the time
                    return tensors
                self._check_again(shard, path, descriptor)
        raise CacheDamaged(f"{path} is written to all the time.")

    def _check_again(self, shard: _Shard, path: Path, descriptor: int) -> None:
        """Refuses a shard that was touched since and does not hold the same bytes any more."""
        identity = identity_of(descriptor)
        file = TensorFile.read(path, descriptor)
        # The same tensors behind another header lie elsewhere than they will be read.
        if file.places != shard.places or file.checksum(path, descriptor) != shard.checksum:
            raise CacheDamaged(f"{path} was replaced or written to after it was opened and checked.")
        shard.identity = identity

    def add(self, digest: bytes, tensors: dict[str, torch.Tensor], *, flush: bool = True) -> None:
        """Takes a row's tensors [tokens, ...]; writes a shard when enough have come together, where it may `flush`."""
        if digest not in self._waiting:
            self._waiting[digest] = tensors
            self._waiting_bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        if flush:
            self.flush_when_full()

    def flush_when_full(self) -> None:
        """Writes a shard when enough rows have come together.

        A build asks for it between batches: killed, it goes on with the batches, and the bits, of an undisturbed one.
        """
        if self._waiting_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what waits as one shard, whole or not at all.

        Raises:
            FreezeError: The disk is full or the folder cannot be written; the shards written so far stay.
        """
        if not self._waiting:
            return
        rows = list(self._waiting.values())
        digests = np.frombuffer(b"".join(self._waiting), dtype=np.uint8).reshape(-1, 16)
        lengths = np.array([[len(row[spec.name]) for spec in self.specs] for row in rows], dtype=np.int64)
        tensors = {spec.name: torch.cat([row[spec.name] for row in rows]) for spec in self.specs}
        tensors |= {DIGESTS: torch.from_numpy(digests.copy()), LENGTHS: torch.from_numpy(lengths)}
        name = SHARDS.replace("*", uuid.uuid4().hex)
        file, identity = self._write(self.folder / name, tensors)
        self._register(name, identity, file.metadata["checksum"], file.places, digests, lengths)
        self._waiting, self._waiting_bytes = {}, 0

    def _write(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[TensorFile, Identity]:
        try:
            return write_tensors(path, tensors, {"key": checksum_of(self.key)})
        except (OSError, SafetensorError, CacheDamaged) as error:
            raise _disk_error(error, self.folder) from error

    # --------------------------------------------------------------------------------------------------------- tables

    def save_tables(self, tables: Mapping[str, torch.Tensor]) -> None:
        """Writes what is the same for every row, such as T5's position bias at the greatest length."""
        path = self.folder / TABLES
        try:
            _move_aside(path, [])
        except OSError as error:
            raise _disk_error(error, self.folder) from error
        self._write(path, tables)

    def load_tables(self, specs: Sequence[TableSpec], tokens: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """What `save_tables` wrote.

        Args:
            specs: What the prefix needs; nothing is read where it needs none.
            tokens: The longest row that they must do for, by side.

        Raises:
            CacheDamaged: It is not there, not what was written, or of another cache; or too narrow.
        """
        if not specs:
            return {}
        path = self.folder / TABLES
        with _advising_to_rebuild():
            with open_regular(path) as descriptor:
                file = TensorFile.read(path, descriptor)
                tables = {name: read_tensor(path, descriptor, place) for name, place in file.places.items()}
            if file.metadata.get("checksum") != tensors_checksum(tables):
                raise CacheDamaged(f"{path} does not hold the bytes that were written.")
            if file.metadata.get("key") != checksum_of(self.key):
                purpose = (
                    "for something else" if "key" in file.metadata else "by an earlier version, for what isn't said"
                )
                raise CacheDamaged(f"{path} was built {purpose}.")
            if tables.keys() != {spec.name for spec in specs}:
                raise CacheDamaged(f"{path} holds other tables than this prefix needs.")
            for spec in specs:
                if not spec.fits(file.places[spec.name], tokens):
                    raise CacheDamaged(
                        f"{path} holds {spec.name} as {list(tables[spec.name].shape)}; rows of {dict(tokens)} tokens "
                        f"need {list(spec.dims)}."
                    )
        return tables


# -------------------------------------------------------------------------------------------------------------- helpers


def _lease_of_new(folder: Path, reasons: list[str]) -> int | None:
    """Makes a store's folder and takes the lease before there is anything that could be removed.

    Raises:
        FreezeError: The folder was removed again and again.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        _move_aside(folder / LOCK, reasons)
        try:
            return share_store(folder)
        except CacheDamaged as damage:  # removed between the two
            if time.monotonic() > deadline:
                raise FreezeError(
                    f"The prefix cache {folder} was to be made; for {PATIENCE_SECONDS:.0f} s its lock was gone as soon "
                    f"as it was made: {damage} See what removes it, or give another cache_dir."
                ) from damage
            time.sleep(0.02)


def _pulse() -> None:
    """`pulse`, and what another rank failed by is no damage of this store, which a caller would mend and go on from."""
    try:
        pulse()
    except CacheDamaged as damage:
        raise FreezeError(str(damage)) from damage


def _move_aside(path: Path, reasons: list[str]) -> None:
    """Moves aside what stands in the place of a file and is none: nothing says that it is ours to remove."""
    if os.path.lexists(path) and not is_regular(path):
        with contextlib.suppress(FileNotFoundError):
            reasons.append(f"{path} was no file of the cache: it is {set_aside(path).name} now.")


@contextlib.contextmanager
def _advising_to_rebuild() -> Iterator[None]:
    """Adds to the words about a damage what to do about it."""
    try:
        yield
    except CacheDamaged as damage:
        raise CacheDamaged(f"{damage} Build the cache again.") from damage


def _disk_error(error: Exception, folder: Path) -> FreezeError:
    free = "unknown"
    with contextlib.suppress(OSError):
        free = f"{shutil.disk_usage(folder if folder.exists() else folder.parent).free / 1e9:.2f} GB"
    return FreezeError(
        f"The prefix cache could not be written to {folder}: {error}. Free there: {free}. What was written whole stays "
        "and the next build goes on from it; free space, or give another cache_dir."
    )
