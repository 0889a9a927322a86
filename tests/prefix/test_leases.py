"""A store that somebody trains from or builds is never removed, and who removes one leaves everything else."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from hf_freeze.errors import CacheDamaged, FreezeError
from hf_freeze.prefix import folder as folder_room
from hf_freeze.prefix import leases
from hf_freeze.prefix import store as store_module
from hf_freeze.prefix.folder import MANIFEST, clear_caches, evict_caches, remove_leftovers
from hf_freeze.prefix.leases import LOCK
from hf_freeze.prefix.store import Store
from tests.prefix.test_store import KEY, SMALL, assert_holds, filled, names, only_shard, ragged_rows

if sys.platform == "win32":
    pytest.skip("the system keeps open files", allow_module_level=True)
import fcntl

ROWS = ragged_rows(SMALL, 4)
NAME = names(1)[0]


def test_the_lease_outlives_a_new_manifest(tmp_path):
    trained_from = filled(tmp_path / NAME, SMALL, ROWS)
    Store.create(tmp_path / NAME, KEY, SMALL).close()  # what a build does that finds the manifest damaged
    assert clear_caches(tmp_path) == 0
    assert_holds(trained_from, ROWS)
    trained_from.close()
    assert clear_caches(tmp_path) > 0


def test_the_lease_is_taken_though_another_process_looks_for_leftovers(tmp_path):
    filled(tmp_path / NAME, SMALL, ROWS).close()
    alone = leases.alone_with(tmp_path / NAME)
    assert alone is not None
    thread = threading.Timer(0.3, alone.close)
    thread.start()
    store = Store.open(tmp_path / NAME, KEY)
    thread.join()
    assert clear_caches(tmp_path) == 0
    assert_holds(store, ROWS)


def test_a_store_that_is_being_removed_is_waited_for_and_not_used(tmp_path):
    filled(tmp_path / NAME, SMALL, ROWS).close()
    alone = leases.alone_with(tmp_path / NAME)
    assert alone is not None

    def remove() -> None:
        time.sleep(0.2)
        for path in folder_room._parts(tmp_path / NAME):
            path.unlink()
        (tmp_path / NAME).rmdir()
        alone.close()

    thread = threading.Thread(target=remove)
    thread.start()
    with pytest.raises(CacheDamaged, match=r"is gone\. Build the cache again"):
        Store.open(tmp_path / NAME, KEY)
    thread.join()
    assert not (tmp_path / NAME).exists(), "a lock that is taken makes no folder"


def test_a_store_that_another_process_keeps_for_itself_is_refused_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "PATIENCE_SECONDS", 0.1)
    filled(tmp_path / NAME, SMALL, ROWS).close()
    alone = leases.alone_with(tmp_path / NAME)
    assert alone is not None
    with (
        alone,
        pytest.raises(FreezeError, match=r"another process has kept it for itself for 0 s, to remove it\. Wait"),
    ):
        Store.open(tmp_path / NAME, KEY)
    assert_holds(Store.open(tmp_path / NAME, KEY), ROWS)


def test_a_lock_that_was_removed_while_it_was_waited_for_holds_nothing(tmp_path, monkeypatch):
    filled(tmp_path / NAME, SMALL, ROWS).close()
    path = tmp_path / NAME / LOCK
    real = fcntl.flock
    calls = []

    def flock(descriptor: int, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:  # an evictor, and a build after it
            path.unlink()
            path.touch()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    store = Store.open(tmp_path / NAME, KEY)
    assert len(calls) == 2
    assert clear_caches(tmp_path) == 0
    assert_holds(store, ROWS)


def test_a_store_of_an_older_version_has_no_lock_and_is_leased_like_any(tmp_path):
    filled(tmp_path / NAME, SMALL, ROWS).close()
    (tmp_path / NAME / LOCK).unlink()
    store = Store.open(tmp_path / NAME, KEY)
    assert clear_caches(tmp_path) == 0
    assert_holds(store, ROWS)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_lease_that_cannot_be_had_is_said(tmp_path, monkeypatch, number):
    filled(tmp_path / NAME, SMALL, ROWS).close()

    def flock(descriptor: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=r"is used without a lease on it \(.*\): nothing keeps another process from"):
        store = Store.open(tmp_path / NAME, KEY)
    assert_holds(store, ROWS)
    assert clear_caches(tmp_path) == 0, "who cannot know removes nothing"


def let_locks_be_read_only(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real = os.open

    def open_file(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if Path(path).name == LOCK and flags & os.O_RDWR:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", open_file)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])  # another user's; mounted read-only
def test_a_lock_that_can_only_be_read_is_shared(tmp_path, monkeypatch, number):
    filled(tmp_path / NAME, SMALL, ROWS).close()
    let_locks_be_read_only(monkeypatch, number)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = Store.open(tmp_path / NAME, KEY)
    monkeypatch.undo()
    assert clear_caches(tmp_path) == 0
    assert_holds(store, ROWS)


def test_a_folder_in_which_no_lock_can_be_made_is_said_and_not_waited_for(tmp_path, monkeypatch):
    let_locks_be_read_only(monkeypatch, errno.EACCES)
    monkeypatch.setattr(store_module, "write_whole", refuse_to_write)
    started = time.monotonic()
    with (
        pytest.warns(UserWarning, match=r"is used without a lease on it \(Permission denied\)"),
        pytest.raises(FreezeError, match=r"could not be written to .*Permission denied.*give another cache_dir"),
    ):
        Store.create(tmp_path / NAME, KEY, SMALL)
    assert time.monotonic() - started < leases.PATIENCE_SECONDS / 2


def refuse_to_write(path: Path, data: bytes) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_a_store_whose_lock_goes_as_soon_as_it_is_made_is_given_up(tmp_path, monkeypatch):
    def gone(folder: Path) -> int:
        raise CacheDamaged(f"{folder} is gone.")

    monkeypatch.setattr(store_module, "share_store", gone)
    monkeypatch.setattr(store_module, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(FreezeError, match=r"lock was gone as soon as it was made: .* is gone\. See what removes it"):
        Store.create(tmp_path / NAME, KEY, SMALL)


def test_where_the_system_has_no_locks_nothing_is_removed_unasked(tmp_path, monkeypatch):
    filled(tmp_path / NAME, SMALL, ROWS).close()
    (tmp_path / NAME / "half.tmp").write_text("perhaps another process writes it")
    monkeypatch.setattr(sys, "platform", "win32")
    assert evict_caches(tmp_path, 0, keep=()) == []
    remove_leftovers(tmp_path / NAME)
    assert (tmp_path / NAME / "half.tmp").exists()
    assert_holds(Store.open(tmp_path / NAME, KEY), ROWS)
    assert clear_caches(tmp_path) > 0
    assert not (tmp_path / NAME).exists()


def test_caches_are_cleared_all_the_time_while_others_are_built(tmp_path):
    done = threading.Event()
    failures: list[BaseException] = []

    def clear() -> None:
        try:
            while not done.is_set():
                clear_caches(tmp_path)
                remove_leftovers(tmp_path / NAME)
                time.sleep(0.001)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=clear) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            store = filled(tmp_path / NAME, SMALL, ROWS)
            assert_holds(store, ROWS)
            assert_holds(Store.open(tmp_path / NAME, KEY), ROWS)
            store.close()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures
    clear_caches(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_somebody_put_into_a_store_stays_when_it_is_cleared(tmp_path):
    filled(tmp_path / NAME, SMALL, ROWS).close()
    (tmp_path / NAME / "notes.txt").write_text("mine")
    (tmp_path / NAME / "rows-mine.safetensors").write_text("mine")
    (tmp_path / NAME / "rows").mkdir()
    (tmp_path / NAME / "rows" / "notes.txt").write_text("mine")
    (tmp_path / "elsewhere.tmp").write_text("mine")
    (tmp_path / NAME / "link.tmp").symlink_to("../elsewhere.tmp")
    assert clear_caches(tmp_path) > 0
    left = sorted(path.name for path in (tmp_path / NAME).iterdir())
    assert left == ["link.tmp", "notes.txt", "rows", "rows-mine.safetensors"]
    assert (tmp_path / "elsewhere.tmp").read_text() == "mine"
    assert clear_caches(tmp_path) == 0


def test_a_store_that_is_half_removed_is_removed_the_next_time(tmp_path, monkeypatch):
    filled(tmp_path / NAME, SMALL, ROWS).close()
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == MANIFEST:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    assert clear_caches(tmp_path) > 0
    monkeypatch.undo()
    assert len(Store.open(tmp_path / NAME, KEY)) == 0
    assert clear_caches(tmp_path) > 0
    assert not (tmp_path / NAME).exists()


def test_leftovers_go_and_what_is_no_file_stays(tmp_path):
    store = filled(tmp_path / NAME, SMALL, ROWS)
    folder = tmp_path / NAME
    (folder / "half.tmp").write_text("half")
    (folder / "folder.tmp").mkdir()
    os.mkfifo(folder / "pipe.weights")
    remove_leftovers(folder)
    assert (folder / "half.tmp").exists(), "somebody uses the store"
    store.close()
    remove_leftovers(folder)
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["folder.tmp", LOCK, MANIFEST, "pipe.weights", only_shard(folder).name]


def test_stores_that_vanish_while_they_are_listed_are_passed_over(tmp_path, monkeypatch):
    for name in names(3):
        filled(tmp_path / name, SMALL, ROWS).close()
    real = folder_room.is_regular

    def is_regular(path: Path) -> bool:
        answer = real(path)
        if path == tmp_path / names(3)[1] / MANIFEST:
            path.unlink(missing_ok=True)
        return answer

    monkeypatch.setattr(folder_room, "is_regular", is_regular)
    assert len(folder_room._caches(tmp_path)) == 2
