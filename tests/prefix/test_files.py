"""What lies in a store is taken for what it is: only whole files of this cache are used, and none hangs or kills."""

from __future__ import annotations

import errno
import json
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_freeze.errors import CacheDamaged, FreezeError
from hf_freeze.prefix import files as files_room
from hf_freeze.prefix import store as store_room
from hf_freeze.prefix.files import write_tensors
from hf_freeze.prefix.folder import MANIFEST, SHARDS, TABLES, checksum_of
from hf_freeze.prefix.leases import LOCK
from hf_freeze.prefix.store import Store
from tests.prefix.test_store import (
    BIAS,
    KEY,
    SMALL,
    assert_holds,
    filled,
    name_of_row,
    only_shard,
    ragged_rows,
    rewritten,
)

ROWS = ragged_rows(SMALL, 4)
KEY_DIGEST = checksum_of(KEY)


def with_tables(folder: Path) -> Store:
    """A store of one shard, with a table."""
    store = filled(folder, SMALL, ROWS)
    store.save_tables({"bias": torch.arange(48.0).reshape(3, 4, 4)})
    return store


# -------------------------------------------------------------------------------------------- between open and training


def _another_stores(path: Path) -> None:
    """A whole shard of the same key, rows and size with other states, as a build of another machine might leave one."""
    others = {digest: {"x": tensors["x"].view(torch.int32).bitwise_not().view(torch.float32)}
              for digest, tensors in ROWS.items()}  # fmt: skip
    filled(path.parent.parent / "other", SMALL, others)
    os.replace(only_shard(path.parent.parent / "other"), path)


def _written_into(path: Path) -> None:
    """The same file, size and time."""
    before = path.stat()
    with open(path, "rb+") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def _emptied(path: Path) -> None:
    os.truncate(path, 0)


def _zeroed(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, size - 16)
    os.truncate(path, size)


def _piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _shifted(path: Path) -> None:
    """The same tensors behind a longer header."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    path.write_bytes((length + 8).to_bytes(8, "little") + whole[8 : 8 + length] + b" " * 8 + whole[8 + length :])


TOUCHES: dict[str, tuple[Callable[[Path], None], str]] = {
    "replaced by another store's": (_another_stores, "was replaced or written to after it was opened and checked"),
    "written into": (_written_into, "was replaced or written to after it was opened and checked"),
    "zeroed at its end": (_zeroed, "was replaced or written to after it was opened and checked"),
    "shifted": (_shifted, "was replaced or written to after it was opened and checked"),
    "cut short": (_cut_short, "is damaged or cut short"),
    "emptied": (_emptied, r"is damaged or cut short: byte \d+ is missing"),
    "gone": (Path.unlink, "is gone"),
    "a pipe": (_piped, "is a pipe where a file should be"),
}


@pytest.mark.parametrize("reader", ["itself", "a worker's copy"])
@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("what", TOUCHES)
def test_a_shard_that_is_touched_after_it_was_opened_gives_no_row(tmp_path, what, read_before, reader):
    harm, reason = TOUCHES[what]
    filled(tmp_path / "a", SMALL, ROWS)
    store = Store.open(tmp_path / "a", KEY)
    if read_before:
        assert_holds(store, ROWS)
    if reader == "a worker's copy":
        store = pickle.loads(pickle.dumps(store))  # as a DataLoader hands it to its workers
    harm(only_shard(tmp_path / "a"))
    for _ in range(2):
        with pytest.raises(CacheDamaged, match=rf"rows-\w+\.safetensors {reason}.*Build the cache again"):
            store.read(list(ROWS)[-1])


class Reading:
    """What a loader's worker does with a store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __call__(self, digests: list[bytes]) -> list[torch.Tensor]:
        return [self.store.read(digest)["x"] for digest in digests]


def test_a_loaders_worker_gives_no_row_of_a_shard_that_was_replaced(tmp_path):
    filled(tmp_path / "a", SMALL, ROWS)
    store = Store.open(tmp_path / "a", KEY)
    loader = torch.utils.data.DataLoader(
        list(ROWS), batch_size=1, num_workers=1, collate_fn=Reading(store), multiprocessing_context="fork"
    )
    assert all(torch.equal(got, tensors["x"]) for (got,), tensors in zip(loader, ROWS.values(), strict=True))
    _another_stores(only_shard(tmp_path / "a"))
    with pytest.raises(CacheDamaged, match="was replaced or written to after it was opened"):
        next(iter(loader))


def test_two_shards_that_change_places_after_they_were_opened_give_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr(store_room, "SHARD_BYTES", 1)
    rows = {name_of_row(row): {"x": torch.full((3, 1), float(row))} for row in range(2)}
    filled(tmp_path / "a", SMALL, rows)
    store = Store.open(tmp_path / "a", KEY)
    one, other = (tmp_path / "a").glob(SHARDS)
    one.rename(tmp_path / "between")
    other.rename(one)
    (tmp_path / "between").rename(other)
    with pytest.raises(CacheDamaged, match="was replaced or written to after it was opened"):
        store.read(name_of_row(0))


def test_a_store_that_was_copied_or_touched_with_the_same_bytes_is_read_on(tmp_path):
    filled(tmp_path / "a", SMALL, ROWS)
    store = Store.open(tmp_path / "a", KEY)
    path = only_shard(tmp_path / "a")
    path.with_suffix(".copy").write_bytes(path.read_bytes())
    path.with_suffix(".copy").rename(path)
    assert_holds(store, ROWS)
    os.utime(path, (1, 1))
    assert_holds(store, ROWS)


def test_a_shard_that_is_written_to_while_it_is_checked_is_refused(tmp_path, monkeypatch):
    filled(tmp_path / "a", SMALL, ROWS)
    path = only_shard(tmp_path / "a")
    real = files_room.TensorFile.checksum

    def checksum(file: Any, *rest: Any) -> str:
        answer = real(file, *rest)
        _written_into(path)
        return answer

    monkeypatch.setattr(files_room.TensorFile, "checksum", checksum)
    with pytest.raises(CacheDamaged, match="was written to while it was read"):
        Store.open(tmp_path / "a", KEY)


# --------------------------------------------------------------------------------------------- whole, and yet not right


def _index(**changes: Any) -> dict[str, torch.Tensor]:
    """A shard of two rows, of 1 and 2 tokens, with other tensors in it; None takes one out."""
    digests = torch.arange(32, dtype=torch.uint8).reshape(2, 16)
    whole = {"x": torch.zeros(3, 1), "row_digests": digests, "row_lengths": torch.tensor([[1], [2]])}
    return {name: tensor for name, tensor in (whole | changes).items() if tensor is not None}


OTHER_LENGTHS = "has rows of other lengths than its streams"
INDICES: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "lengths that sum to less": (_index(row_lengths=torch.tensor([[1], [1]])), OTHER_LENGTHS),
    "lengths that sum to more": (_index(row_lengths=torch.tensor([[2], [2]])), OTHER_LENGTHS),
    "a negative length": (_index(row_lengths=torch.tensor([[-1], [4]])), OTHER_LENGTHS),
    "lengths beyond any number": (
        _index(row_lengths=torch.tensor([[2**62], [3 - 2**62]])), OTHER_LENGTHS,
    ),
    "lengths of another dtype": (_index(row_lengths=torch.tensor([[1.0], [2.0]])), "row_lengths is of another kind"),
    "lengths of more streams": (_index(row_lengths=torch.ones(2, 2, dtype=torch.int64)), "row_lengths is of another"),
    "lengths of fewer rows": (_index(row_lengths=torch.tensor([[3]])), "row_lengths is of another kind"),
    "digests of another width": (
        _index(row_digests=torch.zeros(2, 8, dtype=torch.uint8)), "row_digests is of another kind",
    ),
    "digests of another dtype": (_index(row_digests=torch.zeros(2, 16)), "row_digests is of another kind"),
    "digests that are one number": (_index(row_digests=torch.tensor(3)), "or no rows"),
    "no digests": (_index(row_digests=None), "or no rows"),
    "no lengths": (_index(row_lengths=None), "holds other streams than the manifest names"),
    "no rows": (
        _index(x=torch.zeros(0, 1), row_digests=torch.zeros(0, 16, dtype=torch.uint8),
               row_lengths=torch.zeros(0, 1, dtype=torch.int64)), "or no rows",
    ),
    "no states": (_index(x=None), "holds other streams than the manifest names"),
    "one stream more": (_index(y=torch.zeros(3)), "holds other streams than the manifest names"),
    "states of another dtype": (_index(x=torch.zeros(3, 1).half()), "holds other streams than the manifest names"),
    "states of another shape": (_index(x=torch.zeros(3, 2)), "holds other streams than the manifest names"),
    "states that are one number": (_index(x=torch.tensor(1.0)), "holds other streams than the manifest names"),
}  # fmt: skip


@pytest.mark.parametrize("what", INDICES)
def test_a_whole_shard_whose_index_does_not_fit_is_refused_and_mended(tmp_path, what):
    tensors, reason = INDICES[what]
    filled(tmp_path / "a", SMALL, ROWS)
    victim = tmp_path / "a" / SHARDS.replace("*", "f" * 32)
    write_tensors(victim, tensors, {"key": KEY_DIGEST})
    with pytest.raises(CacheDamaged, match=f"{victim.name} .*{reason}"):
        Store.open(tmp_path / "a", KEY)
    reasons: list[str] = []
    assert_holds(Store.open(tmp_path / "a", KEY, mend=reasons), ROWS)
    assert len(reasons) == 1
    assert not victim.exists()


def test_two_shards_with_other_states_for_one_row_are_both_given_up(tmp_path):
    filled(tmp_path / "a", SMALL, {name_of_row(0): {"x": torch.ones(3, 1)}, name_of_row(1): {"x": torch.ones(1, 1)}})
    filled(tmp_path / "b", SMALL, {name_of_row(0): {"x": torch.full((3, 1), 1.01)}})
    filled(tmp_path / "c", SMALL, {name_of_row(2): {"x": torch.ones(1, 1)}})
    for other in "bc":
        path = only_shard(tmp_path / other)
        path.rename(tmp_path / "a" / path.name)
    with pytest.raises(CacheDamaged, match="hold other states for the same row"):
        Store.open(tmp_path / "a", KEY)
    reasons: list[str] = []
    store = Store.open(tmp_path / "a", KEY, mend=reasons)
    assert [name_of_row(row) in store for row in range(3)] == [False, False, True]
    assert "hold other states for the same row" in reasons[0]


def test_a_row_that_two_machines_computed_may_differ_by_rounding(tmp_path):
    filled(tmp_path / "a", SMALL, {name_of_row(0): {"x": torch.ones(3, 1)}})
    filled(tmp_path / "b", SMALL, {name_of_row(0): {"x": torch.full((3, 1), 1.0001)}})
    path = only_shard(tmp_path / "b")
    path.rename(tmp_path / "a" / path.name)
    assert len(Store.open(tmp_path / "a", KEY)) == 1


# ------------------------------------------------------------------------------------------ something else in its place


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_text("mine")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        os.chdir(path.parent)  # a name of at most 108 bytes
        bound.bind(path.name)


def _link(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    elsewhere.write_bytes(WHOLE[path.name])
    path.symlink_to(elsewhere)


def _device(path: Path) -> None:
    os.mknod(path, 0o020666, os.makedev(1, 5))  # /dev/zero: without an end


STANDINGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a folder": (_folder, "is a folder where a file should be"),
    "a pipe": (os.mkfifo, "is a pipe where a file should be"),
    "a socket": (_socket, "is a socket where a file should be"),
    "a link to the file": (_link, "is a symbolic link where a file should be"),
    "a link to nowhere": (lambda path: path.symlink_to("nowhere"), "is a symbolic link where a file should be"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "is a symbolic link where a file should be"),
    "a device": (_device, "is a device where a file should be"),
}
WHOLE: dict[str, bytes] = {}


@pytest.mark.parametrize("place", [MANIFEST, LOCK, TABLES, "a shard"])
@pytest.mark.parametrize("what", STANDINGS)
def test_what_is_no_file_is_neither_opened_nor_removed(tmp_path, monkeypatch, place, what):
    put, reason = STANDINGS[what]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a"
    with_tables(folder)
    path = only_shard(folder) if place == "a shard" else folder / place
    WHOLE[path.name] = path.read_bytes()
    path.unlink()
    try:
        put(path)
    except PermissionError:
        pytest.skip("devices are the administrator's to make")
    before = os.lstat(path)
    reason = "is no file" if place == LOCK else reason
    with pytest.raises(CacheDamaged, match=f"{path.name} {reason}.*Build the cache again"):
        Store.open(folder, KEY).load_tables([BIAS], {})
    assert os.path.samestat(os.lstat(path), before)
    reasons: list[str] = []
    try:
        store = Store.open(folder, KEY, mend=reasons)
    except CacheDamaged:
        store = Store.create(folder, KEY, SMALL, mend=reasons)
    store.save_tables({"bias": torch.ones(3, 4, 4)})
    assert len(store) == (0 if place == "a shard" else len(ROWS))
    assert len(Store.open(folder, KEY)) == len(store)
    (aside,) = folder.glob("*.aside-*")
    assert os.path.samestat(os.lstat(aside), before)
    if place != TABLES:
        assert aside.name in reasons[-1]


def test_a_link_to_the_folder_of_caches_is_followed(tmp_path):
    filled(tmp_path / "a", SMALL, ROWS)
    (tmp_path / "link").symlink_to("a")
    assert_holds(Store.open(tmp_path / "link", KEY), ROWS)


# ------------------------------------------------------------------------------------------------------- the manifest


def _nested(values: dict[str, Any]) -> None:
    inner: list[Any] = []
    for _ in range(600):
        inner = [inner]
    values["key"] = {"weights": inner}


def _stream(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values["streams"][0].update(changes)


NO_MANIFEST, NO_STREAM = r"it is no manifest of a prefix cache", r"manifest\.json cannot be read \(.*stream"
VALUES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    **{f"key {value!r}": (lambda values, value=value: values.update(key=value), NO_MANIFEST)
       for value in (None, 3, "abc", [1], True)},
    **{f"format {value!r}": (lambda values, value=value: values.update(format=value), NO_MANIFEST)
       for value in (None, "1", 1.0, True, [1])},
    "format beyond any number": (lambda values: values.update(format=10**300), r"format 1000+\.\.\.; this version"),
    **{f"streams {value!r}": (lambda values, value=value: values.update(streams=value), reason) for value, reason in (
        (None, NO_MANIFEST), (3, NO_MANIFEST), ({}, NO_MANIFEST), ([], "names no streams"), ([3], NO_STREAM),
        ([{}], NO_STREAM), ([{"name": "x"}], NO_STREAM))},
    "a stream twice": (lambda values: values["streams"].append(values["streams"][0]), "or one of them twice"),
    **{f"{name} {value!r}": (_stream(**{name: value}), NO_STREAM) for name, value in (
        ("name", None), ("name", ""), ("name", ["x"]), ("name", "row_digests"), ("side", None), ("side", "left"),
        ("side", []), ("dtype", "load"), ("dtype", "nn"), ("dtype", "float128"), ("dtype", None), ("dtype", []),
        ("shape", None), ("shape", 3), ("shape", [-1]), ("shape", [1.0]), ("shape", [True]), ("shape", ["8"]),
        ("shape", [10**30]), ("shape", {"0": 1}), ("shape", [1] * 99), ("other", 1))},
    "streams of another prefix": (_stream(shape=[2]), r"names other streams than cross the cut of this prefix"),
    "a key of another kind": (_nested, "was built for something else: cuts was None, is"),
}  # fmt: skip


@pytest.mark.parametrize("what", VALUES)
def test_a_manifest_with_another_value_is_refused_with_the_reason(tmp_path, what):
    change, reason = VALUES[what]
    filled(tmp_path / "a", SMALL, ROWS)
    rewritten(tmp_path / "a", change)
    with pytest.raises(CacheDamaged, match=reason):
        Store.open(tmp_path / "a", KEY, SMALL)


TEXTS = {
    "nested too deep": ("[" * 100_000, "it is nested too deep"),
    "a number of too many digits": ('{"format": ' + "9" * 5000 + "}", "cannot be read"),
    "NaN": ('{"format": NaN}', "NaN is no JSON"),
    "a key twice": ('{"format": 1, "format": 1}', "a key stands twice in it"),
    "too much": (" " * (files_room.JSON_BYTES + 1), "more than any that was written"),
}


@pytest.mark.parametrize("what", TEXTS)
def test_a_manifest_that_json_readers_stumble_over_is_refused(tmp_path, what):
    text, reason = TEXTS[what]
    filled(tmp_path / "a", SMALL, ROWS)
    (tmp_path / "a" / MANIFEST).write_text(text)
    with pytest.raises(CacheDamaged, match=reason):
        Store.open(tmp_path / "a", KEY)


def test_a_manifest_without_its_checksum_is_refused(tmp_path):
    filled(tmp_path / "a", SMALL, ROWS)
    values = json.loads((tmp_path / "a" / MANIFEST).read_text())
    del values["checksum"]
    (tmp_path / "a" / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(CacheDamaged, match="does not hold what was written"):
        Store.open(tmp_path / "a", KEY)


# ------------------------------------------------------------------------------------------------------------- headers


def _header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def write(whole: bytes) -> bytes:
        stop = 8 + int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8:stop])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + whole[stop:]

    return write


HEADERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a huge length": (lambda whole: b"\xff" * 8 + whole[8:], "a header of 18,446,744,073,709,551,615 bytes in a file"),
    "no length": (lambda whole: whole[:5], "byte 5 is missing"),
    "nested too deep": (lambda whole: (90_000).to_bytes(8, "little") + b"[" * 90_000, "it is nested too deep"),
    "a list": (lambda whole: (2).to_bytes(8, "little") + b"[]", "it holds a list"),
    "tensors that overlap": (
        _header(lambda header: header["x"].update(data_offsets=header["row_digests"]["data_offsets"], shape=[16, 1])),
        "overlap or leave gaps",
    ),
    "offsets beyond the file": (_header(lambda header: header["x"].update(data_offsets=[0, 1 << 40])), "another size"),
    "negative offsets": (_header(lambda header: header["x"].update(data_offsets=[-4, 4])), "has no shape and place"),
    "an unknown dtype": (_header(lambda header: header["x"].update(dtype="load")), "has the dtype 'load'"),
    "a dtype that is none": (_header(lambda header: header["x"].update(dtype=["F32"])), "has the dtype"),
    "another dtype of that size": (_header(lambda header: header["x"].update(dtype="I32")), "does not hold the bytes"),
    "no offsets": (_header(lambda header: header["x"].pop("data_offsets")), "'x' is no tensor"),
    "a tensor that is a number": (_header(lambda header: header.update(x=3)), "'x' is no tensor"),
    "metadata that are numbers": (_header(lambda header: header["__metadata__"].update(key=3)), "metadata are no text"),
    "metadata that are a list": (_header(lambda header: header.update(__metadata__=[])), "metadata are no text"),
    "no metadata": (_header(lambda header: header.pop("__metadata__")), "does not hold the bytes"),
    "another key": (_header(lambda header: header["__metadata__"].update(key="a")), "was built for something else"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_shard_with_another_header_is_refused(tmp_path, what):
    change, reason = HEADERS[what]
    filled(tmp_path / "a", SMALL, ROWS)
    path = only_shard(tmp_path / "a")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CacheDamaged, match=f"{path.name} .*{reason}"):
        Store.open(tmp_path / "a", KEY)


# --------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("tables", "metadata", "reason"),
    [
        ({"bias": torch.ones(3, 4, 4)}, {"key": "another"}, r"was built for something else"),
        ({"bias": torch.ones(3, 4, 4)}, {}, r"was built by an earlier version"),
        ({}, {"key": KEY_DIGEST}, "holds other tables than this prefix needs"),
        ({"other": torch.ones(3, 4, 4)}, {"key": KEY_DIGEST}, "holds other tables than this prefix needs"),
        ({"bias": torch.ones(3, 4, 4), "b": torch.ones(1)}, {"key": KEY_DIGEST}, "holds other tables than this prefix"),
        ({"bias": torch.ones(2, 4, 4)}, {"key": KEY_DIGEST}, r"holds bias as \[2, 4, 4\]; rows of .* need \[3, 'sour"),
        ({"bias": torch.ones(3, 4, 5)}, {"key": KEY_DIGEST}, r"holds bias as \[3, 4, 5\]"),
        ({"bias": torch.ones(3, 4)}, {"key": KEY_DIGEST}, r"holds bias as \[3, 4\]"),
        ({"bias": torch.ones(3, 4, 4).half()}, {"key": KEY_DIGEST}, r"holds bias as "),
        ({"bias": torch.ones(3, 3, 3)}, {"key": KEY_DIGEST}, r"rows of \{'source': 4\} tokens need"),
        (None, {}, "tables.safetensors is gone"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path, tables, metadata, reason):
    store = with_tables(tmp_path / "a")
    (tmp_path / "a" / TABLES).unlink()
    if tables is not None:
        write_tensors(tmp_path / "a" / TABLES, tables, metadata)
    with pytest.raises(CacheDamaged, match=f"{reason}.*Build the cache again"):
        store.load_tables([BIAS], {"source": 4})


# ------------------------------------------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize("name", [MANIFEST, "rows-"])
def test_what_cannot_be_read_is_not_called_damaged_and_stays(tmp_path, monkeypatch, name):
    filled(tmp_path / "a", SMALL, ROWS)
    real = os.open

    def open_file(path: Any, *rest: Any, **named: Any) -> int:
        if Path(path).name.startswith(name):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "open", open_file)
    for mend in (None, []):
        with pytest.raises(FreezeError, match=r"cannot be read: Permission denied\. Nothing was changed") as refused:
            Store.open(tmp_path / "a", KEY, mend=mend)
        assert not isinstance(refused.value, CacheDamaged), "or a build would replace it"
    monkeypatch.undo()
    assert_holds(Store.open(tmp_path / "a", KEY), ROWS)


def test_a_disk_that_fails_while_it_is_read_is_not_called_damaged(tmp_path, monkeypatch):
    filled(tmp_path / "a", SMALL, ROWS)

    def read_into(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files_room, "_read_into", read_into)
    with pytest.raises(FreezeError, match=r"cannot be read: Input/output error"):
        Store.open(tmp_path / "a", KEY, mend=[])
    monkeypatch.undo()
    assert_holds(Store.open(tmp_path / "a", KEY), ROWS)


def test_a_damaged_shard_that_cannot_be_removed_is_said(tmp_path, monkeypatch):
    filled(tmp_path / "a", SMALL, ROWS)
    _cut_short(only_shard(tmp_path / "a"))

    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(FreezeError, match=r"is damaged .* It cannot be removed: Operation not permitted\. Remove it"):
        Store.open(tmp_path / "a", KEY, mend=[])
