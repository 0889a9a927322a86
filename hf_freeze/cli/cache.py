"""`hf-freeze cache`: what prefix caches lie in a folder, told from their manifests, and how to be rid of them."""

from __future__ import annotations

import argparse
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hf_freeze.cli import Say, Told
from hf_freeze.errors import FreezeError

__all__ = ["HELP", "add_arguments", "run"]

HELP = """\
Lists or clears caches of frozen prefixes. They can always be built again. A cache that a run trains from stays.

  hf-freeze cache list
  hf-freeze cache list --cache_dir out/prefix --json
  hf-freeze cache clear
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    what = "list: nothing is changed; clear: remove them"
    parser.add_argument("action", choices=("list", "clear"), metavar="list|clear", help=what)
    parser.add_argument("--cache_dir", help="the folder of the caches; ~/.cache/hf_freeze/prefix by default")


def run(args: argparse.Namespace, say: Say) -> Told:
    """Lists or clears the caches of a folder.

    Raises:
        FreezeError: There is no such folder.
    """
    from hf_freeze.files import cache_folder

    folder = cache_folder() / "prefix" if args.cache_dir is None else Path(args.cache_dir).expanduser()
    if args.cache_dir is not None and not folder.is_dir():
        raise FreezeError(f"--cache_dir {folder} was asked for; there is no such folder.")
    return _listed(folder) if args.action == "list" else _cleared(folder)


def _listed(folder: Path) -> Told:
    from hf_freeze.tables import Table, count_text

    caches: list[dict[str, Any]] = []
    for manifest in _manifests(folder):
        with suppress(FileNotFoundError):  # removed by another process meanwhile
            caches.append(_describe(manifest))
    caches.sort(key=lambda cache: cache["last_used"], reverse=True)
    rows = tuple(
        (
            Path(cache["folder"]).name,
            count_text(cache["bytes"], "B"),
            "?" if cache["rows"] is None else f"{cache['rows']:,}",
            Path(cache["model"]).name if Path(cache["model"]).is_absolute() else cache["model"],
            cache["cuts"],
            cache["last_used"].replace("T", " ")[:16],
        )
        for cache in caches
    )
    total = sum(cache["bytes"] for cache in caches)
    line = f"{len(caches)} cache{'s' * (len(caches) != 1)}, {count_text(total, 'B')}. Times are UTC."
    notes = (line, *(cache["damage"] for cache in caches if "damage" in cache))
    table = Table(f"Prefix caches in {folder}", ("folder", "size", "rows", "model", "cuts", "last used"), rows, notes)
    text = str(table) if caches else f"No prefix caches in {folder}."
    return Told(text, {"cache_dir": str(folder), "bytes": total, "caches": caches})


def _manifests(folder: Path) -> list[Path]:
    from hf_freeze.prefix import MANIFEST

    return sorted(folder.glob(f"*/{MANIFEST}"))


def _describe(manifest: Path) -> dict[str, Any]:
    """What a manifest and the headers of its shards say; no state is read, and nothing is marked as used."""
    from hf_freeze.prefix import folder_bytes, read_manifest, stored_rows

    place = manifest.parent
    used = datetime.fromtimestamp(manifest.lstat().st_mtime, UTC).isoformat(timespec="seconds")
    told: dict[str, Any] = {"folder": str(place), "bytes": folder_bytes(place), "rows": None, "last_used": used}
    try:
        key, _, model = read_manifest(place)
        # A store knows its model by the digest of the frozen weights; the name is of the one that built it.
        told |= {"model": model or f"weights {str(key['weights'])[:8]}", "precision": key["precision"], "key": key}
        told["cuts"] = ", ".join(f"{stack} {blocks}" for stack, blocks in key["cuts"])
        told["rows"] = stored_rows(place)
    except (FreezeError, KeyError, TypeError, ValueError) as error:
        told = {"model": "damaged", "cuts": "", "damage": str(error), **told}
    return told


def _cleared(folder: Path) -> Told:
    from hf_freeze.prefix import PrefixCache

    before = len(_manifests(folder))
    freed = PrefixCache.clear(folder)
    kept = len(_manifests(folder))
    text = f"{before - kept} caches removed from {folder}, {freed / 1e6:,.1f} MB freed"
    if kept:
        text += f"; {kept} stay: runs train from them, or they are no caches of this version"
    return Told(text, {"cache_dir": str(folder), "removed": before - kept, "kept": kept, "bytes_freed": freed})
