"""`hf-freeze cache`: what prefix caches lie in a folder, told from their manifests, and how to be rid of them."""

from __future__ import annotations

import argparse
from pathlib import Path

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
    from hf_freeze.prefix import describe_caches
    from hf_freeze.tables import Table, count_text

    caches = describe_caches(folder)
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


def _cleared(folder: Path) -> Told:
    from hf_freeze.prefix import PrefixCache, describe_caches

    before = len(describe_caches(folder))
    freed = PrefixCache.clear(folder)
    kept = len(describe_caches(folder))
    text = f"{before - kept} caches removed from {folder}, {freed / 1e6:,.1f} MB freed"
    if kept:
        text += f"; {kept} stay: runs train from them, or they are no caches of this version"
    return Told(text, {"cache_dir": str(folder), "removed": before - kept, "kept": kept, "bytes_freed": freed})
