"""Rows on disk come back the same bits, or with a reason why not: kills, damage, a full disk, two builds at once."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_freeze import FreezePlan, PrefixCache, freeze
from hf_freeze.errors import CacheDamaged, FreezeError
from hf_freeze.prefix import files as files_room
from hf_freeze.prefix import store as store_room
from hf_freeze.prefix.folder import MANIFEST, SHARDS, TABLES, clear_caches, evict_caches, manifest_checksum
from hf_freeze.prefix.leases import LOCK
from hf_freeze.prefix.states import StreamSpec, TableSpec
from hf_freeze.prefix.store import Store
from tests.zoo import VOCAB, build

KEY = {"weights": "abc", "cuts": [["decoder", 3]]}
STREAMS = [
    StreamSpec("states", "source", "bfloat16", (8,)),
    StreamSpec("wide", "source", "float32", (2, 3)),
    StreamSpec("places", "source", "int64", ()),
    StreamSpec("target", "target", "float16", (4,)),
    StreamSpec("row", "", "float32", (5,)),  # one entry a row
]
SMALL = [StreamSpec("x", "source", "float32", (1,))]
BIAS = TableSpec("bias", torch.float32, (3, "source", "source"))
ROOT = Path(__file__).parents[2]


def name_of_row(row: int) -> bytes:
    return row.to_bytes(16, "big")


def ragged_rows(specs: list[StreamSpec], count: int = 7) -> dict[bytes, dict[str, torch.Tensor]]:
    """Random bits, so that NaN of every kind is among them; a target may be empty."""
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for row in range(count):
        lengths = {"source": 1 + row * 3 % 5, "target": row % 4, "": 1}
        rows[name_of_row(row)] = {
            spec.name: torch.randint(-128, 128, (lengths[spec.side], spec.token_bytes), generator=generator)
            .to(torch.int8).view(getattr(torch, spec.dtype)).reshape(lengths[spec.side], *spec.shape)
            for spec in specs
        }  # fmt: skip
    return rows


def filled(folder: Path, specs: list[StreamSpec] = STREAMS, rows: Any = None) -> Store:
    """A store with those rows in one shard."""
    store = Store.create(folder, KEY, specs)
    for digest, tensors in (rows or ragged_rows(specs)).items():
        store.add(digest, tensors)
    store.flush()
    return store


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_holds(store: Store, rows: dict[bytes, dict[str, torch.Tensor]]) -> None:
    for digest, tensors in rows.items():
        assert digest in store
        found = store.read(digest)
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            assert bits(found[name]) == bits(tensor)


def only_shard(folder: Path) -> Path:
    (path,) = folder.glob(SHARDS)
    return path


# ------------------------------------------------------------------------------------------------------- read and write


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int64", "bool"])
def test_a_row_is_read_back_the_same_bits(tmp_path, dtype):
    specs = [StreamSpec("states", "source", dtype, (6,))]
    rows = ragged_rows(specs)
    if dtype == "bool":
        rows = {digest: {"states": t["states"].view(torch.uint8) > 127} for digest, t in rows.items()}
    assert_holds(filled(tmp_path / "a", specs, rows), rows)
    assert_holds(Store.open(tmp_path / "a", KEY), rows)


def test_several_streams_of_unlike_lengths_are_read_back(tmp_path):
    rows = ragged_rows(STREAMS)
    filled(tmp_path / "a", rows=rows)
    store = Store.open(tmp_path / "a", KEY)
    assert_holds(store, rows)
    assert len(store) == len(rows)
    assert store.specs == tuple(STREAMS)


def test_rows_are_found_in_whichever_shard_they_stand(tmp_path, monkeypatch):
    monkeypatch.setattr(store_room, "SHARD_BYTES", 300)
    rows = ragged_rows(STREAMS, 20)
    store = filled(tmp_path / "a", rows=rows)
    assert len(list((tmp_path / "a").glob(SHARDS))) > 3
    assert_holds(store, rows)
    assert_holds(Store.open(tmp_path / "a"), rows)


def test_a_view_of_a_padded_batch_is_stored_as_it_looks(tmp_path):
    batch = torch.arange(24.0).reshape(2, 4, 3)
    rows = {name_of_row(row): {"x": batch[row, 1:3, 1:2]} for row in range(2)}
    assert_holds(filled(tmp_path / "a", SMALL, rows), rows)


def test_what_another_process_finished_is_taken_in_by_refresh(tmp_path):
    rows = ragged_rows(SMALL)
    reader = Store.create(tmp_path / "a", KEY, SMALL)
    writer = Store.open(tmp_path / "a", KEY)
    for digest, tensors in rows.items():
        writer.add(digest, tensors)
    writer.flush()
    assert len(reader) == 0
    reader.refresh()
    reader.refresh()
    assert_holds(reader, rows)
    assert reader.stored_bytes == writer.stored_bytes > 0


def test_a_row_that_two_processes_wrote_is_read_once(tmp_path):
    rows = ragged_rows(SMALL)
    filled(tmp_path / "a", SMALL, rows)
    again = Store.open(tmp_path / "a")
    for digest, tensors in rows.items():
        again.add(digest, tensors)
    again.flush()
    store = Store.open(tmp_path / "a")
    assert len(store) == len(rows)
    assert_holds(store, rows)


@pytest.mark.parametrize(("precision", "may_differ"), [("bf16", True), ("fp16", True), ("fp32", False), (None, False)])
def test_a_row_that_two_processes_wrote_may_differ_by_its_precisions_rounding(tmp_path, precision, may_differ):
    key, specs = {**KEY, "precision": precision}, [StreamSpec("states", "source", "float32", (4,))]
    Store.create(tmp_path / "a", key, specs).close()
    stores = [Store.open(tmp_path / "a"), Store.open(tmp_path / "a")]
    for store, size in zip(stores, (1.0, 1.01), strict=True):
        store.add(b"a" * 16, {"states": size * torch.ones(3, 4)})
        store.flush()
    if may_differ:
        assert len(Store.open(tmp_path / "a")) == 1
    else:
        with pytest.raises(CacheDamaged, match="hold other states for the same row"):
            Store.open(tmp_path / "a")


def test_tables_are_read_back_the_same_bits(tmp_path):
    store = Store.create(tmp_path / "a", KEY, SMALL)
    assert store.load_tables([], {}) == {}
    bias = torch.randn(3, 4, 4)
    store.save_tables({"bias": bias.transpose(1, 2)})
    assert torch.equal(store.load_tables([BIAS], {})["bias"], bias.transpose(1, 2))


def _read_elsewhere(pickled: bytes, answers: Any) -> None:
    """In another process: bits of the rows, and by how much its memory grew meanwhile."""
    resident = Path("/proc/self/statm")
    store: Store = pickle.loads(pickled)
    before = int(resident.read_text().split()[1]) if resident.exists() else 0
    found = {digest: bits(store.read(digest)["states"]) for digest in list(store._place)[:3]}
    after = int(resident.read_text().split()[1]) if resident.exists() else 0
    answers.put((found, (after - before) * os.sysconf("SC_PAGE_SIZE")))


def elsewhere(store: Store) -> tuple[dict[bytes, bytes], int]:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_read_elsewhere, args=(pickle.dumps(store), answers))
    process.start()
    answer: tuple[dict[bytes, bytes], int] = answers.get(timeout=120)
    process.join()
    return answer


def test_a_pickled_store_reads_in_another_process(tmp_path):
    rows = ragged_rows(STREAMS)
    store = filled(tmp_path / "a", rows=rows)
    assert_holds(store, rows)  # its maps are open: they must not travel
    assert len(pickle.dumps(store)) < 10_000
    found, _ = elsewhere(store)
    assert found == {digest: bits(rows[digest]["states"]) for digest in list(rows)[:3]}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts pages of /proc")
def test_reading_a_few_rows_of_a_big_shard_takes_little_memory(tmp_path):
    specs = [StreamSpec("states", "source", "float32", (1 << 18,))]  # 1 MiB a token
    rows = {name_of_row(row): {"states": torch.full((1, 1 << 18), float(row))} for row in range(128)}
    store = filled(tmp_path / "a", specs, rows)
    found, grown = elsewhere(store)
    assert found == {name_of_row(row): bits(rows[name_of_row(row)]["states"]) for row in range(3)}
    assert len(list((tmp_path / "a").glob(SHARDS))) == 2
    assert grown < 16 << 20, "of a shard of 64 MiB"


# --------------------------------------------------------------------------------------------------------------- damage


def regions(shard: bytes) -> dict[str, list[int]]:
    """Where a safetensors file has its length, its header, its index of rows, and the rows' tensors."""
    start = 8 + int.from_bytes(shard[:8], "little")
    header = json.loads(shard[8:start])
    index = [header[name]["data_offsets"] for name in ("row_digests", "row_lengths")]
    places = [start + place for first, last in index for place in range(first, last)]
    data = [place for place in range(start, len(shard)) if place not in places]
    return {"length": list(range(8)), "header": list(range(8, start)), "index": places, "data": data}


@pytest.mark.parametrize("region", ["length", "header", "index", "data"])
def test_a_flipped_bit_anywhere_in_a_shard_is_found(tmp_path, region):
    filled(tmp_path / "a", SMALL, ragged_rows(SMALL, 2))
    path = only_shard(tmp_path / "a")
    whole = path.read_bytes()
    unseen = []
    for place in regions(whole)[region]:
        for bit in range(8):
            broken = bytearray(whole)
            broken[place] ^= 1 << bit
            path.write_bytes(broken)
            if path.name not in refusal(tmp_path / "a"):
                unseen.append((place, bit))
    assert not unseen


def rewritten(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a manifest as one that had been written so."""
    values = json.loads((folder / MANIFEST).read_text())
    change(values)
    values["checksum"] = manifest_checksum(values)
    (folder / MANIFEST).write_text(json.dumps(values))


def refusal(folder: Path) -> str:
    """Why a store is not opened, "" where it is."""
    try:
        Store.open(folder, KEY)
    except CacheDamaged as damage:
        return str(damage)
    return ""


def test_a_shard_cut_short_anywhere_is_found(tmp_path):
    filled(tmp_path / "a", SMALL, ragged_rows(SMALL, 2))
    path = only_shard(tmp_path / "a")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CacheDamaged, match=r"is damaged or cut short|does not hold the bytes"):
            Store.open(tmp_path / "a", KEY)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CacheDamaged, match="is damaged or cut short"):
        Store.open(tmp_path / "a", KEY)


@pytest.mark.parametrize("damage", ["cut short", "bit flipped"])
def test_tables_that_are_damaged_are_refused(tmp_path, damage):
    store = filled(tmp_path / "a", SMALL)
    store.save_tables({"bias": torch.randn(3, 4, 4)})
    path = tmp_path / "a" / TABLES
    damaged(path, damage)
    with pytest.raises(CacheDamaged, match=r"tables\.safetensors (is damaged|does not hold)"):
        store.load_tables([BIAS], {})


def damaged(path: Path, how: str) -> None:
    """Damages a file, at its end."""
    content = bytearray(path.read_bytes())
    if how == "cut short":
        del content[-2:]
    else:
        content[-1] ^= 4
    path.write_bytes(content)


def test_mending_gives_up_the_damaged_shard_and_keeps_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(store_room, "SHARD_BYTES", 1)
    rows = ragged_rows(SMALL, 4)
    filled(tmp_path / "a", SMALL, rows)
    victim = next((tmp_path / "a").glob(SHARDS))
    damaged(victim, "bit flipped")
    reasons: list[str] = []
    store = Store.open(tmp_path / "a", KEY, mend=reasons)
    assert len(store) == 3
    assert not victim.exists()
    (reason,) = reasons
    assert victim.name in reason
    assert_holds(store, {digest: tensors for digest, tensors in rows.items() if digest in store})


@pytest.mark.parametrize("harm", ["gone", "cut short"])
def test_a_shard_that_is_damaged_after_it_was_opened_is_a_clear_error(tmp_path, harm):
    filled(tmp_path / "a", SMALL)
    store = Store.open(tmp_path / "a", KEY)
    if harm == "gone":
        only_shard(tmp_path / "a").unlink()
    else:
        damaged(only_shard(tmp_path / "a"), harm)
    with pytest.raises(CacheDamaged, match=r"rows-\w+\.safetensors"):
        store.read(name_of_row(0))


MANIFESTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: path.unlink(), r"has no manifest\.json\. Build it"),
    "of another format": (
        lambda path: path.write_text(path.read_text().replace('"format": 1', '"format": 7')),
        r"of format 7; this version reads format 1",
    ),
    "not JSON": (
        lambda path: path.write_text(path.read_text()[:-3]),
        r"manifest\.json cannot be read \(Unterminated string",
    ),
    "empty": (lambda path: path.write_text(""), r"cannot be read \(Expecting value"),
    "not text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), r"cannot be read \(it is no text\)"),
    "a list": (lambda path: path.write_text("[]"), r"cannot be read \(it holds a list where an object should be\)"),
    "of something else": (
        lambda path: path.write_text('{"name": "a web page"}'),
        r"cannot be read \(it is no manifest of a prefix cache\)",
    ),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_store_whose_manifest_is_damaged_is_refused_with_the_reason(tmp_path, what):
    harm, reason = MANIFESTS[what]
    filled(tmp_path / "a", SMALL)
    harm(tmp_path / "a" / MANIFEST)
    with pytest.raises(CacheDamaged, match=reason):
        Store.open(tmp_path / "a", KEY)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CacheDamaged, match=r"has no manifest\.json"):
        Store.open(tmp_path / "nowhere", KEY)


def test_a_store_of_another_key_is_refused_and_each_difference_is_named(tmp_path):
    filled(tmp_path / "a", SMALL)
    with pytest.raises(
        CacheDamaged, match=r"built for something else: torch was None, is '9'; weights was 'abc', is 'd'"
    ):
        Store.open(tmp_path / "a", KEY | {"weights": "d", "torch": "9"})


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(tmp_path):
    filled(tmp_path / "a", SMALL, ragged_rows(SMALL, 2))
    path = tmp_path / "a" / MANIFEST
    whole = path.read_bytes()
    unseen = []
    for place in range(len(whole)):
        for bit in range(8):
            broken = bytearray(whole)
            broken[place] ^= 1 << bit
            path.write_bytes(broken)
            try:
                store = Store.open(tmp_path / "a", KEY)
            except CacheDamaged:
                continue
            if store.specs != tuple(SMALL):
                unseen.append((place, bit))
    assert not unseen


# ------------------------------------------------------------------------------------------------------- a full disk


def test_nothing_half_written_is_left_when_the_disk_is_full(tmp_path, monkeypatch):
    rows = ragged_rows(SMALL, 4)
    store = Store.create(tmp_path / "a", KEY, SMALL)
    digests = list(rows)
    store.add(digests[0], rows[digests[0]])
    store.flush()
    store.add(digests[1], rows[digests[1]])
    monkeypatch.setattr(files_room, "save_file", no_space_after(0))
    with pytest.raises(FreezeError, match=r"could not be written to .*No space left.*What was written whole stays"):
        store.flush()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [LOCK, MANIFEST, only_shard(tmp_path / "a").name]
    assert_holds(Store.open(tmp_path / "a", KEY), {digests[0]: rows[digests[0]]})


def no_space_after(shards: int) -> Callable[..., None]:
    """`save_file` on a disk that takes so many files more; a last one is half written."""
    real = files_room.save_file
    written = 0

    def save_file(tensors: Any, path: Any, metadata: Any = None) -> None:
        nonlocal written
        real(tensors, path, metadata=metadata)
        written += 1
        if written > shards:
            damaged(Path(path), "cut short")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    return save_file


_TRUNCATED = """
import resource, sys
from pathlib import Path
import torch
from hf_freeze.errors import FreezeError
from tests.prefix.test_store import KEY, SMALL, Store, name_of_row
store = Store.create(Path(sys.argv[1]), KEY, SMALL)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # a file can grow no further, as on a full disk
store.add(name_of_row(0), {"x": torch.zeros(4000, 1)})
try:
    store.flush()
except FreezeError as error:
    print("refused:", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
def test_a_file_that_the_system_does_not_let_grow_is_a_clear_error(tmp_path):
    done = run_python(_TRUNCATED, tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert "refused: The prefix cache could not be written to" in done.stdout
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [LOCK, MANIFEST]


def run_python(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    process = start_python(code, *arguments)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_python(code: str, *arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


# --------------------------------------------------------------------------------------------------------- many caches


def aged(folder: Path, seconds: float) -> Path:
    """Last used so long ago."""
    then = time.time() - seconds
    os.utime(folder / MANIFEST, (then, then))
    return folder


def names(count: int) -> list[str]:
    """Folder names as a cache gives them."""
    return [f"{number:024x}" for number in range(count)]


def test_the_least_recently_used_caches_go_and_those_in_use_stay(tmp_path):
    folders = [tmp_path / name for name in names(4)]
    for age, folder in enumerate(folders):
        filled(folder)
        aged(folder, 1000 - age)
    size = sum(path.stat().st_size for path in folders[0].iterdir())
    gone = evict_caches(tmp_path, limit_bytes=int(size * 2.5), keep=[folders[0]], needed_bytes=size // 4)
    assert gone == [folders[1], folders[2]]
    assert folders[0].exists(), "the one in use"
    assert folders[3].exists(), "the newest"
    assert evict_caches(tmp_path, limit_bytes=size * 3, keep=[]) == []


def test_opening_a_store_makes_it_the_newest(tmp_path):
    folders = [tmp_path / name for name in names(2)]
    for folder in folders:
        filled(folder)
        aged(folder, 1000)
    Store.open(folders[0])
    assert evict_caches(tmp_path, limit_bytes=0, keep=[folders[0]]) == [folders[1]]


def test_clear_removes_caches_and_nothing_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "all.json").write_text("{}")
    folders = [tmp_path / name for name in names(2)]
    sizes = [filled(folder).stored_bytes for folder in folders]
    assert PrefixCache.clear(tmp_path) > sum(sizes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "results"]
    assert PrefixCache.clear(tmp_path) == 0
    assert PrefixCache.clear(tmp_path / "nowhere") == 0


@pytest.mark.parametrize("content", ['{"name": "a web page", "start_url": "/"}', '{"streams": 3}', "[1]", "no JSON"])
def test_a_folder_with_another_programs_manifest_is_left_alone(tmp_path, content):
    page = tmp_path / "page"
    page.mkdir()
    (page / MANIFEST).write_text(content)
    (page / "index.html").write_text("mine")
    clear_caches(tmp_path)
    evict_caches(tmp_path, limit_bytes=0, keep=[])
    assert (page / "index.html").read_text() == "mine"


# ------------------------------------------------------------------------------------------------------- whole builds


def pairs_of_tokens(lengths: tuple[int, ...] = (9, 16, 12, 7, 16, 11, 5, 13), seed: int = 0) -> list[dict[str, Any]]:
    """Rows of unlike lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def pad_right(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The user's collator."""

    def pad(rows: list[torch.Tensor], fill: int) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)

    ids = [row["input_ids"] for row in features]
    mask = pad([torch.ones_like(row) for row in ids], 0)
    return {"input_ids": pad(ids, 0), "attention_mask": mask, "labels": pad([r["labels"] for r in features], -100)}


def slow_pad_right(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    time.sleep(0.02)
    return pad_right(features)


def frozen_model(seed: int = 0) -> nn.Module:
    """LLaMA, three of four blocks frozen."""
    model = build("llama")
    torch.manual_seed(seed)
    model.init_weights()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    freeze(model, FreezePlan(decoder_blocks=3))
    return model


def cached(model: nn.Module, folder: Path, rows: Any = None, collator: Any = pad_right, **given: Any) -> PrefixCache:
    budget = 1 if store_room.SHARD_BYTES == 1 else 40  # one row a batch where a shard is to hold one, else several
    given = {"token_budget": budget, "progress": False} | given
    return PrefixCache.build(model, rows or pairs_of_tokens(), collator, cache_dir=folder, **given)


def losses(model: nn.Module, collator: Any = pad_right, steps: int = 5) -> list[float]:
    """Of a few steps of AdamW on batches drawn at random."""
    rows = pairs_of_tokens()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(3)
    found = []
    model.train()
    for _ in range(steps):
        drawn = torch.randperm(len(rows), generator=generator)[:3].tolist()
        loss = model(**collator([rows[row] for row in drawn])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def assert_trains_right(cache: PrefixCache) -> None:
    """The losses are those without a cache, and every step ran from it."""
    assert losses(cache.model, cache.collator) == pytest.approx(losses(frozen_model()), rel=1e-5)
    assert cache.batches_used == 5


@pytest.fixture
def row_a_shard(monkeypatch):
    monkeypatch.setattr(store_room, "SHARD_BYTES", 1)


_KILLED = """
import os, signal, sys
from pathlib import Path
from hf_freeze.prefix import files, store as store_room
from tests.prefix.test_store import cached, damaged, frozen_model
folder, moment = Path(sys.argv[1]), sys.argv[2]
store_room.SHARD_BYTES = 1
real, written = files.save_file, 0

def save_file(tensors, path, metadata=None):
    global written
    written += 1
    if written < 4 or moment != "between two shards":
        real(tensors, path, metadata=metadata)
    if written == 4:
        if moment == "half a shard":
            damaged(Path(path), "cut short")
        os.kill(os.getpid(), signal.SIGKILL)

files.save_file = save_file
cached(frozen_model(), folder)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kill -9")
@pytest.mark.parametrize("moment", ["between two shards", "half a shard", "before the rename"])
def test_a_killed_build_leaves_whole_shards_only_and_the_next_goes_on(tmp_path, row_a_shard, moment):
    done = run_python(_KILLED, tmp_path, moment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (folder,) = (path.parent for path in tmp_path.glob(f"*/{MANIFEST}"))
    left = {path.name for path in folder.glob(SHARDS)}
    survived = len(Store.open(folder))
    assert survived == len(left) == 3
    cache = cached(frozen_model(), tmp_path)
    assert cache.report.computed_rows == len(pairs_of_tokens()) - survived
    assert cache.report.reasons == (), "nothing was damaged"
    assert left < {path.name for path in folder.glob(SHARDS)}
    assert not list(folder.glob("*.tmp"))
    fresh = cached(frozen_model(), tmp_path / "fresh")
    for digest in fresh.store._place:
        for name, tensor in fresh.store.read(digest).items():
            torch.testing.assert_close(cache.store.read(digest)[name], tensor, rtol=1e-5, atol=1e-6)
    assert_trains_right(cache)


def test_a_store_that_goes_after_the_last_batch_does_no_harm_to_the_training(tmp_path):
    cache = cached(frozen_model(), tmp_path)
    assert_trains_right(cache)
    shutil.rmtree(cache.store.folder)
    with pytest.warns(
        UserWarning, match=r"go unchecked: row \d cannot be read again\. .*rows-\w+\.safetensors is gone"
    ):
        cache.close()


def test_a_second_build_computes_nothing(tmp_path):
    assert cached(frozen_model(), tmp_path).report.computed_rows == len(pairs_of_tokens())
    cache = cached(frozen_model(), tmp_path)
    assert (cache.report.computed_rows, cache.report.tokens) == (0, 0)
    assert_trains_right(cache)


HARMS: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "a shard cut short": (lambda f: damaged(next(f.glob(SHARDS)), "cut short"), 1, r"rows-\w+\.safetensors is damaged"),
    "a shard gone": (lambda f: next(f.glob(SHARDS)).unlink(), 1, ""),
    "a manifest missing": (lambda f: (f / MANIFEST).unlink(), 0, MANIFESTS["missing"][1]),
    "a manifest of another key": (
        lambda f: rewritten(f, lambda values: values["key"].update(torch="1.0")), 0,
        r"built for something else: torch was '1\.0', is "),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_a_build_mends_a_damaged_cache_and_says_why(tmp_path, row_a_shard, harm):
    first = cached(frozen_model(), tmp_path)
    damage, computed, reason = HARMS[harm]
    damage(first.store.folder)
    cache = cached(frozen_model(), tmp_path)
    assert cache.store.folder == first.store.folder
    assert cache.report.computed_rows == computed
    assert len(cache.report.reasons) == bool(reason)
    if reason:
        assert re.search(reason, cache.report.reasons[0])
        assert "rebuilt: " in str(cache.report)
    assert_trains_right(cache)


def test_whole_shards_of_something_else_are_not_taken_for_ones_own(tmp_path, row_a_shard):
    first = cached(frozen_model(), tmp_path)
    other = cached(frozen_model(1), tmp_path)
    for path in other.store.folder.glob(SHARDS):
        shutil.copy(path, first.store.folder)
    cache = cached(frozen_model(), tmp_path)
    assert cache.report.computed_rows == 0
    assert len(cache.report.reasons) == 8
    assert "was built for something else" in cache.report.reasons[0]
    assert_trains_right(cache)


def test_a_build_mends_a_manifest_with_a_flipped_bit_in_a_streams_name(tmp_path):
    first = cached(frozen_model(), tmp_path)
    path = first.store.folder / MANIFEST
    before, streams, after = path.read_text().rpartition('"streams"')
    path.write_text(before + streams + after.replace('"model.layers', '"modem.layers'))
    cache = cached(frozen_model(), tmp_path)
    assert cache.report.reasons
    assert_trains_right(cache)


def frozen_t5(seed: int = 0) -> nn.Module:
    """The whole encoder and two blocks of the decoder frozen; the position bias is large enough to matter."""
    model = build("t5")
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    freeze(model, FreezePlan(encoder_blocks="all", decoder_blocks=2))
    return model


T5_ROWS = pairs_of_tokens((9, 6, 7))


def step(model: nn.Module, collator: Any, rows: Any) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of a batch."""
    torch.manual_seed(7)  # dropout above the cut
    loss = model.train()(**collator(rows)).loss
    return loss.item(), list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def assert_steps_alike(cache: PrefixCache, plain: nn.Module, rows: Any) -> None:
    used = cache.batches_used
    loss, gradients = step(cache.model, cache.collator, rows)
    wanted, plain_gradients = step(plain, pad_right, rows)
    assert cache.batches_used == used + 1
    assert loss == pytest.approx(wanted, rel=1e-5)
    for one, other in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def _another_caches(path: Path) -> None:
    other = cached(frozen_t5(1), path.parent.parent / "other", T5_ROWS)
    shutil.copy(other.store.folder / TABLES, path)


def _without_key(path: Path) -> None:
    store = Store.open(path.parent)
    tables = {name: tensor.clone() for name, tensor in load_file(path).items()}
    store.close()
    files_room.write_tensors(path, tables, {})


def _narrower(path: Path) -> None:
    """Whole, of this cache, and too narrow for its rows."""
    store = Store.open(path.parent)
    store.save_tables({name: tensor[:, :, :5, :5] for name, tensor in load_file(path).items()})
    store.close()


def _wrong(path: Path) -> None:
    """Whole and of this cache, with other numbers: only the model can tell."""
    store = Store.open(path.parent)
    store.save_tables({name: tensor.flip(1) for name, tensor in load_file(path).items()})
    store.close()


TABLE_HARMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "of another cache": (_another_caches, r"tables\.safetensors was built for something else"),
    "of an earlier version": (_without_key, r"tables\.safetensors was built by an earlier version"),
    "that are gone": (Path.unlink, r"tables\.safetensors is gone"),
    "that are damaged": (lambda path: damaged(path, "bit flipped"), r"tables\.safetensors does not hold the bytes"),
    "that are too narrow": (_narrower, r"rows of \{'source': 9, 'target': 9\} tokens need"),
    "with other numbers": (_wrong, "is not what the model computes"),
}


def harms(*quick: str) -> list[Any]:
    return [pytest.param(what, marks=() if what in quick else pytest.mark.slow, id=what) for what in TABLE_HARMS]


@pytest.mark.parametrize("what", harms("of another cache"))
def test_tables_that_do_not_fit_are_refused_by_open_and_computed_again_by_build(tmp_path, what):
    harm, reason = TABLE_HARMS[what]
    first = cached(frozen_t5(), tmp_path, T5_ROWS)
    first.close()
    harm(first.store.folder / TABLES)
    if what != "with other numbers":
        with pytest.raises(CacheDamaged, match=reason):
            PrefixCache.open(frozen_t5(), T5_ROWS, pad_right, cache_dir=tmp_path, progress=False)
    cache = cached(frozen_t5(), tmp_path, T5_ROWS)
    if what != "that are too narrow":  # then they are widened, as for new rows
        assert re.search(reason, cache.report.reasons[0])
    assert cache.report.computed_rows == 0, "the rows are whole"
    assert_steps_alike(cache, frozen_t5(), T5_ROWS)
    cache.close()
    opened = PrefixCache.open(frozen_t5(), T5_ROWS, pad_right, cache_dir=tmp_path, progress=False)
    assert_steps_alike(opened, frozen_t5(), T5_ROWS)


@pytest.mark.parametrize("what", harms("with other numbers"))
def test_tables_that_do_not_fit_are_mended_by_add(tmp_path, what):
    cache = cached(frozen_t5(), tmp_path, T5_ROWS)
    TABLE_HARMS[what][0](cache.store.folder / TABLES)
    wider = pairs_of_tokens((14, 12), seed=1)
    reasons = cache.add(wider).reasons
    assert what == "that are too narrow" or re.search(TABLE_HARMS[what][1], reasons[0])
    for rows in (wider, T5_ROWS, [wider[0], T5_ROWS[0]]):
        assert_steps_alike(cache, frozen_t5(), rows)


def test_a_cache_goes_on_from_its_own_tables_while_another_widens_them(tmp_path):
    mine, other = cached(frozen_t5(), tmp_path, T5_ROWS), cached(frozen_t5(), tmp_path, T5_ROWS)
    wider = pairs_of_tokens((14, 12), seed=1)
    other.add(wider)
    assert_steps_alike(mine, frozen_t5(), T5_ROWS)
    assert "prefix_states" not in mine.collator(wider), "it does not know them"
    mine.add(wider)
    assert_steps_alike(mine, frozen_t5(), wider)


# ------------------------------------------------------------------------------------------------------------ bad disks


def test_a_full_disk_stops_a_build_and_the_next_goes_on(tmp_path, monkeypatch, row_a_shard):
    model = frozen_model()
    monkeypatch.setattr(files_room, "save_file", no_space_after(3))
    with pytest.raises(FreezeError, match=r"No space left.*the next build goes on from it; free space"):
        cached(model, tmp_path)
    monkeypatch.undo()
    cache = cached(model, tmp_path)  # the model was left as it was
    assert cache.report.computed_rows == len(pairs_of_tokens()) - 3
    assert cache.report.reasons == ()
    assert_trains_right(cache)


def test_a_disk_that_is_too_small_is_refused_before_the_first_row(tmp_path, monkeypatch):
    model = frozen_model()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 9, 9))
    with pytest.raises(
        FreezeError, match=r"needs 0\.00 GB in .*; 0\.00 GB are free. Free space, give another cache_dir"
    ):
        cached(model, tmp_path)
    assert not list(tmp_path.glob(f"*/{SHARDS}"))
    assert not list(tmp_path.glob("*/*.tmp"))
    monkeypatch.undo()
    assert_trains_right(cached(model, tmp_path))


def test_a_file_where_the_cache_folder_should_be_is_refused_and_kept(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(
        FreezeError, match=r"was to be kept in .*taken; it cannot be written: .*Give a cache_dir that can"
    ):
        cached(frozen_model(), tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_file_where_the_store_should_be_is_refused_and_kept(tmp_path):
    place = cached(frozen_model(), tmp_path).store.folder
    shutil.rmtree(place)
    place.write_text("mine")
    with pytest.raises(FreezeError, match="could not be written to"):
        cached(frozen_model(), tmp_path)
    assert place.read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(FreezeError, match="it cannot be written: "):
        cached(frozen_model(), tmp_path / "locked")


# ---------------------------------------------------------------------------------------------------- several at a time


_BUILDER = """
import json, sys, time
from pathlib import Path
from tests.prefix.test_store import cached, frozen_model, losses, slow_pad_right
folder, me, other = Path(sys.argv[1]), *sys.argv[2:]
model = frozen_model()
(folder / me).touch()
while not (folder / other).exists():
    time.sleep(0.001)
cache = cached(model, folder / "cache", collator=slow_pad_right)
told = {"computed": cache.report.computed_rows, "rows": len(cache.store), "reasons": cache.report.reasons}
print(json.dumps(told | {"losses": losses(model, cache.collator), "used": cache.batches_used}))
"""


def test_two_builds_of_one_cache_at_once_end_well_and_share_the_work(tmp_path):
    both = [start_python(_BUILDER, tmp_path, *names) for names in (("one", "two"), ("two", "one"))]
    told = []
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        told.append(json.loads(out))
    everything = len(pairs_of_tokens())
    assert sorted(answer["computed"] for answer in told) == [0, everything]
    plain = pytest.approx(losses(frozen_model()), rel=1e-5)
    for answer in told:
        assert answer | {"computed": 0} == {
            "computed": 0, "rows": everything, "reasons": [], "losses": plain, "used": 5
        }  # fmt: skip
    store = Store.open(*(tmp_path / "cache").glob("*/"))
    assert sum(len(shard.starts) for shard in store._shards) == everything, "no row twice"


def test_a_build_under_a_limit_keeps_the_newest_caches(tmp_path):
    kept = []
    for seed in range(3):
        cache = cached(frozen_model(seed), tmp_path)
        kept.append(cache.store.folder)
        aged(cache.store.folder, 1000 - seed)
        cache.close()
    size = sum(path.stat().st_size for path in kept[0].iterdir())
    cache = cached(frozen_model(3), tmp_path, max_cache_bytes=int(size * 2.5))
    assert [folder.exists() for folder in kept] == [False, False, True]
    assert cache.store.folder.exists()
    again = cached(frozen_model(2), tmp_path, max_cache_bytes=int(size * 2.5))
    assert again.report.computed_rows == 0


def test_a_cache_larger_than_the_limit_is_refused_before_the_first_row(tmp_path):
    with pytest.raises(FreezeError, match=r"needs 0\.00 GB; max_cache_bytes allows 0\.00 GB\. Raise it"):
        cached(frozen_model(), tmp_path, max_cache_bytes=100)
    assert not list(tmp_path.glob(f"*/{SHARDS}"))


def test_a_cache_that_grows_beyond_the_limit_is_refused(tmp_path):
    rows = pairs_of_tokens()
    model = frozen_model()
    cache = cached(model, tmp_path, rows[:4])
    limit = sum(path.stat().st_size for path in cache.store.folder.iterdir())
    cache.close()
    with pytest.raises(FreezeError, match="max_cache_bytes allows"):
        cached(model, tmp_path, rows, max_cache_bytes=limit)


def test_a_cache_that_another_model_trains_from_is_not_evicted(tmp_path, row_a_shard):
    live = cached(frozen_model(), tmp_path)
    cached(frozen_model(1), tmp_path, max_cache_bytes=live.report.stored_bytes + 5000)
    assert live.store.folder.exists()
    assert_trains_right(live)
