"""A folder of caches: what a store in it consists of, its manifest, and which stores lie there, to be told or removed.

A manifest says what a store was computed with and which streams it holds. What is removed of a store is what it
consists of, and nothing that somebody else has put there; a store that is in use stays.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xxhash

from hf_freeze.errors import CacheDamaged, FreezeError
from hf_freeze.files import cache_folder, json_digest
from hf_freeze.prefix.files import DTYPES, TensorFile, is_regular, is_shape, open_regular, read_json
from hf_freeze.prefix.leases import LOCK, alone_with
from hf_freeze.prefix.states import StreamSpec

__all__ = ["DIGESTS", "FORMAT", "LENGTHS", "MANIFEST", "SHARDS", "TABLES", "caches_folder", "checksum_of",
           "clear_caches", "describe_caches", "evict_caches", "known_caches", "manifest_checksum", "read_manifest",
           "remove_leftovers", "shard_paths", "short"]  # fmt: skip

FORMAT = 1
MANIFEST = "manifest.json"
SHARDS = "rows-*.safetensors"
TABLES = "tables.safetensors"
DIGESTS, LENGTHS = "row_digests", "row_lengths"  # a shard's index, beside its streams
_SHARD = re.compile(r"rows-[0-9a-f]{32}\.safetensors")


def caches_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """Where caches lie: the folder that was given, or the one that is taken where none was."""
    return Path(cache_dir) if cache_dir is not None else cache_folder() / "prefix"


def shard_paths(folder: Path) -> list[Path]:
    """What bears a shard's name in a store, whatever it is."""
    return sorted(path for path in folder.glob(SHARDS) if _SHARD.fullmatch(path.name))


# ------------------------------------------------------------------------------------------------------------ manifest


def read_manifest(folder: Path) -> tuple[dict[str, Any], tuple[StreamSpec, ...], str]:
    """A store's key, its streams, and what people call its model.

    Raises:
        CacheDamaged: It is not there, of another version, or not what was written.
        FreezeError: It cannot be read.
    """
    path = folder / MANIFEST
    values = read_json(path)
    version, key, streams = values.get("format"), values.get("key"), values.get("streams")
    if type(version) is int and version != FORMAT:
        raise CacheDamaged(
            f"{folder} is a prefix cache of format {short(version)}; this version reads format {FORMAT}."
        )
    if type(version) is not int or not isinstance(key, dict) or not isinstance(streams, list):
        raise CacheDamaged(f"{path} cannot be read (it is no manifest of a prefix cache).")
    try:
        specs = tuple(map(_read_spec, streams))
    except (ValueError, TypeError) as error:
        raise CacheDamaged(f"{path} cannot be read ({error}).") from error
    if not specs or len({spec.name for spec in specs}) < len(specs):
        raise CacheDamaged(f"{path} cannot be read (it names no streams, or one of them twice).")
    if values.get("checksum") != manifest_checksum(values):
        raise CacheDamaged(f"{path} does not hold what was written.")
    model = values.get("model")
    return key, specs, model if isinstance(model, str) else ""


_DTYPE_NAMES = {str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}


def _read_spec(value: Any) -> StreamSpec:
    if not isinstance(value, dict) or value.keys() != {"name", "side", "dtype", "shape"}:
        raise ValueError("a stream is not described as one")
    name, side, dtype, shape = value["name"], value["side"], value["dtype"], value["shape"]
    if not isinstance(name, str) or name in ("", DIGESTS, LENGTHS) or side not in ("source", "target", ""):
        raise ValueError(f"a stream has the name {short(name)} and the side {short(side)}")
    if not isinstance(dtype, str) or dtype not in _DTYPE_NAMES or not is_shape(shape):
        raise ValueError(f"the stream {name[:80]} has the dtype {short(dtype)} and the shape {short(shape)}")
    return StreamSpec(name, side, dtype, tuple(shape))


def _stored_rows(folder: Path) -> int:
    """Rows of a store, by the headers of its shards: no state is read, and nothing is proved.

    Raises:
        CacheDamaged: A header is damaged.
        FreezeError: A shard cannot be read.
    """
    rows = 0
    for path in shard_paths(folder):
        with open_regular(path) as descriptor:
            index = TensorFile.read(path, descriptor).places.get(DIGESTS)
        if index is None or not index.shape:
            raise CacheDamaged(f"{path} has no index of rows.")
        rows += index.shape[0]
    return rows


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """Of what decides in a manifest."""
    return checksum_of([manifest["key"], manifest["streams"]])


def checksum_of(values: Any) -> str:
    """Digest of JSON values, as manifests and shards hold it."""
    return json_digest(values, xxhash.xxh3_128)


def short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}..."


# -------------------------------------------------------------------------------------------------------- many caches


def describe_caches(cache_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """What caches lie in a folder, the one that was used last first, as JSON-ready values.

    Manifests and the headers of shards tell: no state is read, and nothing is marked as used.

    Returns:
        For each cache "folder", "bytes", "rows", "last_used" (UTC), "model", "precision", "cuts" and its "key"; where
        it is damaged, "rows" is None and "damage" says how.

    Example:
        >>> describe_caches("nowhere")
        []
    """
    caches = []
    for manifest in sorted(Path(cache_dir).glob(f"*/{MANIFEST}")):
        with contextlib.suppress(FileNotFoundError):  # removed by another process meanwhile
            caches.append(_describe(manifest))
    return sorted(caches, key=lambda cache: cache["last_used"], reverse=True)


def _describe(manifest: Path) -> dict[str, Any]:
    folder = manifest.parent
    used = datetime.fromtimestamp(manifest.lstat().st_mtime, UTC).isoformat(timespec="seconds")
    described: dict[str, Any] = {"folder": str(folder), "bytes": _bytes_of(folder), "rows": None, "last_used": used}
    try:
        key, _, model = read_manifest(folder)
        # A store knows its model by the digest of the frozen weights; the name is of the one that built it.
        described |= {"model": model or f"weights {str(key['weights'])[:8]}", "precision": key["precision"], "key": key}
        described["cuts"] = ", ".join(f"{stack} {blocks}" for stack, blocks in key["cuts"])
        described["rows"] = _stored_rows(folder)
    except (FreezeError, KeyError, TypeError, ValueError) as error:
        described = {"model": "damaged", "cuts": "", "damage": str(error), **described}
    return described


def known_caches(cache_dir: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The key and the model's name of each cache in a folder; what is damaged or of another version is none."""
    for path in cache_dir.glob(f"*/{MANIFEST}"):
        with contextlib.suppress(FreezeError):
            key, _, model = read_manifest(path.parent)
            yield key, model


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


def _bytes_of(folder: Path) -> int:
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
    if not is_regular(folder / MANIFEST) or (alone := alone_with(folder)) is None:
        return
    with alone:
        for leftover in (*folder.glob("*.tmp"), *folder.glob("*.weights")):
            if is_regular(leftover):
                with contextlib.suppress(OSError):
                    leftover.unlink()


def _remove(folder: Path, *, asked: bool = False) -> int:
    """Removes a store, unless somebody uses it; returns the bytes freed. What is not of the store stays."""
    if (alone := alone_with(folder, asked=asked)) is None:
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
    sizes = {folder: _bytes_of(folder) for folder in _caches(cache_dir)}
    total = sum(sizes.values()) + needed_bytes
    gone = []
    for folder in sizes:
        if total <= limit_bytes:
            break
        if folder.resolve() not in kept and (freed := _remove(folder)):
            gone.append(folder)
            total -= freed
    return gone
