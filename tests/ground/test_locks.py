"""A folder belongs to one run, for as long as its process lives."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from hf_freeze.errors import FreezeError
from hf_freeze.locks import leave_folder, take_folder


def test_a_run_that_was_interrupted_leaves_its_folder_to_the_next_of_its_process_and_to_no_other(
    tmp_path: Path,
) -> None:
    take_folder(tmp_path)
    take_folder(tmp_path / ".." / tmp_path.name)
    child = os.fork()
    if not child:
        try:
            take_folder(tmp_path)
        except FreezeError:
            os._exit(3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    leave_folder(tmp_path)
    leave_folder(tmp_path)


def test_a_copy_of_the_folder_and_a_worker_that_outlives_the_run_change_nothing_about_who_has_it(
    tmp_path: Path,
) -> None:
    folder, runs = tmp_path / "run", tmp_path / "ends"
    parent = os.fork()
    if not parent:
        take_folder(folder)
        shutil.copytree(folder, tmp_path / "backup")  # which opens and closes the file of the lock
        worker = os.fork()
        if not worker:
            time.sleep(30)
            os._exit(0)
        runs.with_suffix(".tmp").write_text(str(worker))
        os.replace(runs.with_suffix(".tmp"), runs)
        time.sleep(30)
        os._exit(0)
    while not runs.exists():
        time.sleep(0.01)
    try:
        with pytest.raises(FreezeError, match=rf"process {parent} on .* is writing there"):
            take_folder(folder)
    finally:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
    try:
        take_folder(folder)
        leave_folder(folder)
    finally:
        os.kill(int(runs.read_text()), signal.SIGKILL)


def test_a_folder_that_cannot_be_made_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(FreezeError, match=rf"into {folder}; no folder can be made there: .*output_dir\."):
            take_folder(folder)
