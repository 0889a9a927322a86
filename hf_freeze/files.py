"""Files and folders: written whole or not at all, digests of JSON values, the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["cache_folder", "json_digest", "write_json"]


def cache_folder() -> Path:
    """Where hf_freeze keeps what it can make again: $HF_FREEZE_CACHE, else hf_freeze under the user's cache folder."""
    given = os.environ.get("HF_FREEZE_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hf_freeze"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a file under a temporary name, flushes it, and renames it: it is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(values, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def json_digest(values: Any) -> str:
    """Digest of JSON values."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()
