"""The recipe with a fault on one of its ranks, launched as the recipe is: FAULT=full_disk|killed on FAULTY_RANK."""

from __future__ import annotations

import errno
import os
import runpy
import signal
from pathlib import Path
from typing import Any

import hf_freeze.prefix.build
import hf_freeze.prefix.files
import hf_freeze.prefix.saving


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def killed(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    hf_freeze.prefix.saving.BreakEven.pays = True  # type: ignore[assignment,method-assign]
    if os.environ["RANK"] == os.environ["FAULTY_RANK"]:
        if os.environ["FAULT"] == "full_disk":
            hf_freeze.prefix.files.save_file = full_disk
        else:
            hf_freeze.prefix.build.capture = killed  # type: ignore[assignment]
    runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "summarize_reviews.py"), run_name="__main__")
