"""Files: written whole or not at all, digests of JSON values, and the cache folder. The one way to write a file here.

Who writes into a folder at a time is for `locks`, what a cache makes of a damaged file for `prefix.files`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["cache_folder", "json_digest", "whole", "write_json", "write_whole"]


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside a file's to write under: it becomes the file where the block ends well, and is removed where not.

    A file is flushed to disk before it is renamed, so that a machine that loses its power keeps it or its predecessor.
    A folder may be made under the name too: it takes the place of an empty one, and of no other. A process that is
    killed meanwhile leaves `NAME.<number>.tmp` behind.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "a.txt")
    >>> with whole(path) as temporary:
    ...     _ = temporary.write_text("all of it")
    >>> path.read_text(), len(list(path.parent.iterdir()))
    ('all of it', 1)
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        if temporary.is_dir():
            with suppress(OSError):  # it is not there, or not empty
                path.rmdir()
        else:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # what went wrong first is what counts
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all; text as UTF-8."""
    with whole(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes JSON values whole or not at all."""
    write_whole(path, json.dumps(values, indent=1))


def _blake2b(content: bytes) -> Any:
    return hashlib.blake2b(content, digest_size=16)


def json_digest(values: Any, hasher: Callable[[bytes], Any] = _blake2b) -> str:
    """Digest of JSON values.

    Args:
        hasher: For what lies on disks with another kind of digest already.
    """
    digest: str = hasher(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return digest


def cache_folder() -> Path:
    """Where hf_freeze keeps what it can make again: $HF_FREEZE_CACHE, else hf_freeze under the user's cache folder."""
    given = os.environ.get("HF_FREEZE_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hf_freeze"
