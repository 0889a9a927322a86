"""One of two ranks fails, at every place before they meet: both end alike, none waits, and the message names the rank.

Many faults run in one pair of forked gloo processes, each followed by a build that succeeds on both ranks, which shows
that the pair is still in step and that no hook and no lock was left. `pytest -m slow` plants all of them, and kills
ranks.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock

import hf_freeze.delta.file
import hf_freeze.delta.save
import hf_freeze.prefix.build
import hf_freeze.prefix.cache
import hf_freeze.prefix.files
import hf_freeze.prefix.prepare
import hf_freeze.prefix.rows
import hf_freeze.summarization.generation
import hf_freeze.summarization.training
import hf_freeze.training.checkpoints
import hf_freeze.training.ledger
import hf_freeze.training.stages
from hf_freeze import PrefixCache, errors, generate_summaries, processes, save_delta
from hf_freeze.errors import CacheDamaged, CannotCache, FreezeError, FrozenWeightsChanged
from hf_freeze.prefix.store import Store
from hf_freeze.processes import leave_group
from hf_freeze.summarization.streaming import stream_summaries
from hf_freeze.summarization.training import SummaryTrainingArguments
from hf_freeze.training.checkpoints import CheckpointGuard
from tests.prefix.cases import collator_for, frozen_model, padding_tokenizer, review_rows
from tests.tiny import tiny_model
from tests.training.staged_run import make_trainer

cache_room, build_room, prepare_room = hf_freeze.prefix.cache, hf_freeze.prefix.build, hf_freeze.prefix.prepare
SECONDS = 60.0  # that a fault may take on either rank
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
FULL = OSError(errno.ENOSPC, "No space left on device")
SHORT = RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory")


@dataclass
class Case:
    """What both ranks work with; the same on both but for the fault."""

    rank: int
    folder: Path
    kind: str = "llama"

    def __post_init__(self) -> None:
        self.model: Any = frozen_model(self.kind, dropout=False)
        self.rows: Any = review_rows(self.kind, 12)
        self.collator: Any = collator_for(self.kind, self.model)
        self.limit: int | None = None
        self.extra: Any = None
        self.said: list[str] = []
        self.fault: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.summarize: Callable[[Any], list[str]] = lambda texts: [text[:3] for text in texts]

    @property
    def options(self) -> dict[str, Any]:
        folder = self.folder / "cache"
        return {"cache_dir": folder, "token_budget": 64, "progress": False, "max_cache_bytes": self.limit}


# ------------------------------------------------------------------------------------------------------ what is called


def build(case: Case) -> None:
    PrefixCache.build(case.model, case.rows, case.collator, **case.options).close()


def predict(case: Case) -> None:
    prepared = PrefixCache.prepare(case.model, case.rows, case.collator, **case.options)
    told = processes.tell_all(prepared.predict(steps=4, batch_size=2))
    assert told[0] == told[1], "both decide by the same figures"


def add(case: Case) -> None:
    cache = PrefixCache.build(case.model, case.rows[:6], case.collator, **case.options)
    try:
        with case.fault():
            cache.add(case.rows, case.collator)
    finally:
        cache.close()


def reopen(case: Case) -> None:
    build(case)
    with case.fault():
        PrefixCache.open(case.model, case.rows, case.collator, **case.options).close()


def delta(case: Case) -> None:
    save_delta(case.model, case.folder / "delta", extra=case.extra)


def mark(case: Case) -> None:
    (case.folder / "checkpoint-1").mkdir(parents=True, exist_ok=True)
    args = SimpleNamespace(output_dir=str(case.folder), should_save=case.rank == 0, world_size=2)
    state = SimpleNamespace(global_step=1, best_model_checkpoint=None)
    CheckpointGuard(case, None).on_save(args, state, None, model=case.model)


def stages(case: Case) -> None:
    """Two stages of one step from a cache, without it where it fails."""
    report = hf_freeze.training.stages.train_in_stages(
        lambda: make_trainer(case.folder / "stages", case.model, max_steps=1, eval_strategy="no", save_strategy="no"),
        hf_freeze.gradual(case.model, start=1, step=1, stages=2, steps=1),
        cache_dir=case.folder / "cache",
        say=case.said.append,
    )
    assert len(set(processes.tell_all(tuple(stage.cached for stage in report.stages)))) == 1, "all or none"
    weights = [p.sum().item() for p in case.model.parameters()]
    assert processes.tell_all(weights) == [weights, weights], "the replicas are one"


def generate(case: Case) -> None:
    texts = ["Good mug.", "Bad mug, it broke at once.", "Fine."]
    generate_summaries(tiny_model("llama"), padding_tokenizer("llama"), texts, max_new_tokens=2, progress=False)


def stream(case: Case) -> None:
    (case.folder / "in.jsonl").write_text("".join(json.dumps({"review": f"Mug {n}."}) + "\n" for n in range(6)))
    processes.barrier()
    stream_summaries(case.summarize, case.folder / "in.jsonl", case.folder / "out.jsonl", window_rows=2)


def precision(case: Case) -> None:
    SummaryTrainingArguments(str(case.folder / "args"), report_to="none")


# ---------------------------------------------------------------------------------------------------------- the faults


def raising(
    owner: Any, name: str, error: Exception, call: int = 1, *, once: bool = False
) -> Callable[[Case], AbstractContextManager[Any]]:
    """Lets the so manieth call of something raise, and all after it."""

    def plant(case: Case) -> AbstractContextManager[Any]:
        original, calls = getattr(owner, name), iter(range(1, 1_000_000))

        def stand_in(*args: Any, **named: Any) -> Any:
            number = next(calls)
            if number == call or (number > call and not once):
                raise error
            return original(*args, **named)

        return mock.patch.object(owner, name, stand_in)

    return plant


class Failing:
    """A collator that fails at a call, or from then on adds a token of its own."""

    def __init__(self, collator: Any, call: int, error: Exception | None = None) -> None:
        self.collator, self.call, self.error, self.calls = collator, call, error, 0

    def __call__(self, features: Any) -> Any:
        self.calls += 1
        batch = self.collator(features)
        if self.calls >= self.call and self.error is not None:
            raise self.error
        if self.calls >= self.call:
            batch["input_ids"][0, 0] += self.calls % 7
        return batch


def collating(call: int, error: Exception | None = None) -> Callable[[Case], Any]:
    @contextmanager
    def plant(case: Case) -> Iterator[None]:
        case.collator = Failing(case.collator, call, error)
        yield

    return plant


class Unreadable(list[Any]):
    def __getitem__(self, key: Any) -> Any:
        if key == 5:
            raise OSError("cannot identify image file")
        return super().__getitem__(key)


def setting(**given: Any) -> Callable[[Case], Any]:
    """Gives one rank another value of something; a function is called with the case."""

    @contextmanager
    def plant(case: Case) -> Iterator[None]:
        for name, value in given.items():
            setattr(case, name, value(case) if callable(value) else value)
        yield

    return plant


def other_weights(case: Case) -> Any:
    """A model that was drawn with another seed, as without one each rank draws its own."""
    torch.manual_seed(case.rank + 5)
    with torch.no_grad():
        for parameter in case.model.parameters():
            if not parameter.requires_grad:
                parameter.normal_(std=0.1)
    return case.model


@contextmanager
def thawed(case: Case) -> Iterator[None]:
    parameter = next(p for p in case.model.parameters() if not p.requires_grad)
    parameter.requires_grad = True
    yield
    parameter.requires_grad = False


@contextmanager
def changed(case: Case) -> Iterator[None]:
    parameter = next(p for p in case.model.parameters() if not p.requires_grad)
    with torch.no_grad():
        parameter += 1
    yield
    with torch.no_grad():
        parameter -= 1


@contextmanager
def in_the_pass(case: Case, error: Exception | None = None) -> Iterator[None]:
    """A collator that is fine while rows are read, and fails once states are computed."""
    original = build_room.build_rows

    def build_rows(model: Any, prefixes: Any, collator: Any, *rest: Any, **named: Any) -> int:
        return original(model, prefixes, Failing(collator, 1, error), *rest, **named)

    with mock.patch.object(build_room, "build_rows", build_rows):
        yield


@contextmanager
def little_memory(case: Case) -> Iterator[None]:
    """Memory for two rows at once."""
    original = build_room.capture

    def capture(model: Any, prefix: Any, batch: Any) -> Any:
        if len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return original(model, prefix, batch)

    with mock.patch.object(build_room, "capture", capture):
        yield


@contextmanager
def held_lock(case: Case) -> Iterator[None]:
    """Another build holds the lock for longer than a rank waits without a word."""
    folder = case.options["cache_dir"]
    folder.mkdir(parents=True)
    lock = FileLock(folder / "build.lock", thread_local=False)
    lock.acquire()
    timer = threading.Timer(1.5, lock.release)
    timer.start()
    yield
    timer.join()


@contextmanager
def late_failure(case: Case) -> Iterator[None]:
    """Fails at its first batch, while the other rank would be busy for minutes with its own."""
    with mock.patch.object(build_room, "capture", side_effect=CannotCache("no states.")):
        yield


def fails(error: Exception) -> Callable[[Any], Any]:
    def failing(texts: Any) -> Any:
        raise error

    return failing


@dataclass(frozen=True)
class Fault:
    """A failure of one rank.

    Attributes:
        match: What both ranks raise, after "Rank 1 of 2 could not "; None where both go on.
        ranks: On which rank the place exists.
    """

    name: str
    plant: Callable[[Case], AbstractContextManager[Any]]
    match: str | None
    call: Callable[[Case], None] = build
    ranks: tuple[int, ...] = (0, 1)
    kind: str = "llama"


FAULTS = [
    # before anything is proved
    Fault("a row that cannot be read", setting(rows=lambda case: Unreadable(case.rows)),
          r"prepare a prefix cache: Row 5 of the dataset .* cannot be read: OSError: cannot identify image file"),
    Fault("a collator that fails", collating(4, KeyError("text")),
          r"prepare a prefix cache: .* a collator that fails on row 3: KeyError: 'text'"),
    Fault("a collator that is random", collating(1), r"prepare a prefix cache: .* two different answers for row 0"),
    Fault("a dataset without rows", setting(rows=[]), r"prepare a prefix cache: .* a dataset without rows"),
    Fault("a prefix that is not found", raising(prepare_room, "find_prefix", CannotCache("it hands on more.")),
          r"prepare a prefix cache: it hands on more\."),
    Fault("no memory in the proof", raising(prepare_room, "check_states", MemoryError()),
          r"prepare a prefix cache: The memory is too small to prove the prefix on a few rows: MemoryError"),
    Fault("another's error in the proof", raising(prepare_room, "check_training", RuntimeError("mat1 and mat2")),
          r"prepare a prefix cache: RuntimeError: mat1 and mat2"),
    Fault("other weights", setting(model=other_weights),
          r"^The model of rank 1 is another one than that of rank 0: the weights"),
    Fault("other rows", setting(rows=lambda case: review_rows("llama", 9, seed=4)),
          r"^Rank 1 gave the prefix cache other rows \((9|12)\) than rank 0 \((9|12)\)"),
    # predict
    Fault("a disk that cannot be timed", raising(os, "fsync", FULL),
          r"predict what a prefix cache saves: .*No space left", predict),
    Fault("a step that fails", raising(torch.Tensor, "backward", SHORT),
          r"predict what a prefix cache saves: The memory is too small to run a batch of training on trial", predict),
    # the pass
    Fault("a folder that cannot be written", raising(Path, "mkdir", PermissionError(errno.EACCES, "Permission denied")),
          r"build the prefix cache: .*cannot be written: .*Permission denied", ranks=(0,)),
    Fault("a store that cannot be made", raising(Store, "create", FreezeError("it could not be written.")),
          r"compute the prefix: it could not be written", ranks=(0,)),
    Fault("a store that is not seen", raising(Store, "open", CacheDamaged("it has no manifest.json.")),
          r"compute the prefix: it has no manifest", ranks=(1,)),
    Fault("tables that cannot be written", raising(Store, "save_tables", FreezeError("it could not be written.")),
          r"compute the prefix: it could not be written", ranks=(0,), kind="t5"),
    Fault("a limit that is too low", setting(limit=1000), r"compute the prefix: .*max_cache_bytes allows 0\.00 GB",
          ranks=(0,)),
    Fault("a disk that is too small",
          lambda case: mock.patch.object(build_room.shutil, "disk_usage", return_value=SimpleNamespace(free=10)),
          r"compute the prefix: .*0\.00 GB are free", ranks=(0,)),
    Fault("a collator that fails in the pass", lambda case: in_the_pass(case, ValueError("no such file")),
          r"compute the prefix: .* a collator that fails on .*: ValueError: no such file"),
    Fault("a collator that changes in the pass", in_the_pass, r"compute the prefix: .* two different answers"),
    Fault("a batch that takes another way", raising(build_room, "capture", CannotCache("it did not reach block 2.")),
          r"compute the prefix: it did not reach block 2\."),
    Fault("no memory for a single row", raising(build_room, "capture", SHORT),
          r"compute the prefix: The memory is too small for the prefix of row \d+ alone"),
    Fault("memory for two rows", little_memory, None),
    Fault("a disk that fills", raising(hf_freeze.prefix.files, "save_file", FULL),
          r"compute the prefix: .*could not be written .*No space left"),
    Fault("a shard that is damaged", raising(Store, "refresh", CacheDamaged("it does not hold what was written.")),
          r"build the prefix cache: it does not hold what was written"),
    Fault("states that are not found again",
          raising(cache_room.PrefixCollator, "states", CannotCache("other lengths.")),
          r"build the prefix cache: other lengths\."),
    Fault("a model that cannot be hooked", raising(PrefixCache, "_attach", RuntimeError("no hooks")),
          r"build the prefix cache: RuntimeError: no hooks"),
    Fault("a lock that another process holds for a while", held_lock, None, ranks=(0,)),
    # a cache that is there
    Fault("a collator that fails in add", collating(1, KeyError("label")),
          r"add rows to the prefix cache: .*KeyError: 'label'", add),
    Fault("weights that moved before add", changed, r"add rows to the prefix cache: .*changed since it was built", add),
    Fault("a disk that fills in add", raising(hf_freeze.prefix.files, "save_file", FULL),
          r"compute the prefix: .*No space left", add),
    Fault("rows that an opened cache lacks", setting(rows=lambda case: review_rows("llama", 14)),
          r"open the prefix cache: .* lacks 2 of 14 rows", reopen),
    Fault("a damaged shard in an opened cache", raising(Store, "open", CacheDamaged("it does not hold the bytes.")),
          r"open the prefix cache: it does not hold the bytes", reopen),
    # what training writes
    Fault("a full disk under a delta", raising(hf_freeze.delta.file, "save_file", FULL),
          r"save the delta .*No space left", delta, ranks=(0,)),
    Fault("a frozen tensor that trains", thawed, r"save the delta: ", delta),
    Fault("an extra that is no JSON", setting(extra={1, 2}), r"save the delta: save_delta was given an extra", delta),
    Fault("no memory to gather a delta", raising(torch.Tensor, "cpu", MemoryError(), call=3, once=True),
          r"save the delta .*MemoryError", delta, ranks=(0,)),
    Fault("a full disk under a checkpoint's mark", raising(hf_freeze.training.checkpoints, "write_json", FULL),
          r"mark .*checkpoint-1 as whole: OSError: .*No space left", mark, ranks=(0,)),
    # stages
    Fault("a stage's cache that fails", raising(hf_freeze.prefix.files, "save_file", FULL), None, stages),
    Fault("a ledger that cannot be written", raising(hf_freeze.training.ledger, "write_json", FULL),
          r"begin the stages: OSError: .*No space left", stages, ranks=(0,)),
    Fault("best weights that cannot be read",
          raising(hf_freeze.training.stages, "load_delta", FreezeError("it is damaged.")),
          r"begin stage 2: it is damaged\.", stages),
    Fault("frozen weights that moved",
          raising(hf_freeze.training.stages, "verify_frozen", FrozenWeightsChanged("1 tensor moved.")),
          r"end stage 1: 1 tensor moved\.", stages),
    # summaries
    Fault("no memory to generate", raising(hf_freeze.summarization.generation, "_generate", SHORT),
          r"generate its share of the summaries: RuntimeError: .*allocate memory", generate),
    Fault("texts that cannot be summarised", setting(summarize=lambda case: fails(ValueError("no model"))),
          r"summarise the reviews: ValueError: no model", stream),
    Fault("a probe that fails",
          raising(hf_freeze.summarization.training, "choose_precision", RuntimeError("no kernel")),
          r"choose a precision: RuntimeError: no kernel", precision, ranks=(0,)),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the ranks

PLANTED = [(fault, rank) for fault in FAULTS for rank in fault.ranks]


def start(rank: int, folder: Path) -> None:
    """Joins the two ranks, as a launcher would have it."""
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that forked this one
    processes.PULSE_SECONDS = 0.5
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)


def outcome_of(fault: Fault, failing: int, case: Case) -> tuple[str, str]:
    """The class and text of what a rank raised, ("", "") for nothing."""

    def plant() -> AbstractContextManager[Any]:
        return fault.plant(case) if case.rank == failing else nullcontext()

    late = fault.call in (add, reopen)  # they call it themselves, once there is a cache
    case.fault = plant if late else nullcontext
    try:
        with nullcontext() if late else plant():
            fault.call(case)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def run_faults(rank: int, folder: Path, planted: list[int]) -> None:
    start(rank, folder)
    for number in planted:
        fault, failing = PLANTED[number]
        case = Case(rank, folder / str(number), fault.kind)
        case.folder.mkdir(exist_ok=True)
        started = time.monotonic()
        kind, text = outcome_of(fault, failing, case)
        told = {"kind": kind, "text": text, "seconds": time.monotonic() - started}
        case = Case(rank, folder / f"{number}-after")
        build(case)  # the ranks are still in step
        (folder / f"{number}-{rank}.json").write_text(json.dumps(told))
    leave_group()


def run_on_two(work: Callable[..., None], folder: Path, *given: Any) -> list[Any]:
    """Runs both ranks until neither has written anything for as long as a fault may take."""
    context = torch.multiprocessing.start_processes(
        work, args=(folder, *given), nprocs=2, join=False, start_method="fork"
    )
    newest, last = 0, time.monotonic()
    while any(process.is_alive() for process in context.processes):
        written = len(list(folder.glob("*.json")))
        if written > newest:
            newest, last = written, time.monotonic()
        if time.monotonic() - last > SECONDS:
            for process in context.processes:
                process.kill()
            break
        time.sleep(0.02)
    for process in context.processes:
        process.join()
    return [process.exitcode for process in context.processes]


def wrong(folder: Path, planted: list[int]) -> list[str]:
    """The faults after which a rank hung or the ranks ended unlike, late, or without the rank and the reason."""
    found = []
    for number in planted:
        fault, failing = PLANTED[number]
        paths = [folder / f"{number}-{rank}.json" for rank in range(2)]
        told = [json.loads(path.read_text()) if path.exists() else None for path in paths]
        text = "" if fault.match is None else f"Rank {failing} of 2 could not {fault.match}"
        if (fault.match or "").startswith("^"):
            text = str(fault.match)
        for one in told:
            ours = one and (not one["kind"] or issubclass(getattr(errors, one["kind"], int), FreezeError))
            if not ours or one["seconds"] > SECONDS or not re.match(text + "$" * (not text), one["text"], re.DOTALL):
                found.append(f"{fault.name}, on rank {failing}: {told}")
                break
    return found


QUICK = (
    "a collator that fails in the pass",
    "a limit that is too low",
    "a lock that another process holds for a while",
)


def test_a_failure_of_one_rank_ends_both_and_names_it(tmp_path: Path) -> None:
    planted = [PLANTED.index((fault, max(fault.ranks))) for fault in FAULTS if fault.name in QUICK]
    assert len(planted) == len(QUICK)
    codes = run_on_two(run_faults, tmp_path, planted)
    assert not (told := wrong(tmp_path, planted)), "\n".join(told)
    assert codes == [0, 0]


@pytest.mark.slow
def test_no_fault_of_one_rank_leaves_the_other_waiting(tmp_path: Path) -> None:
    planted = list(range(len(PLANTED)))
    assert len(FAULTS) >= 30
    codes = run_on_two(run_faults, tmp_path, planted)
    assert not (told := wrong(tmp_path, planted)), "\n".join(told)
    assert codes == [0, 0]


# ------------------------------------------------------------------------------------------------------------- deaths


def killing(owner: Any, name: str, call: int = 1) -> Callable[[Case], AbstractContextManager[Any]]:
    """Ends the process at the so manieth call of something, as the system does when the memory is full."""

    def plant(case: Case) -> AbstractContextManager[Any]:
        original, calls = getattr(owner, name), iter(range(1, 1_000_000))

        def stand_in(*args: Any, **named: Any) -> Any:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **named)

        return mock.patch.object(owner, name, stand_in)

    return plant


DEATHS = [
    Fault("before the ranks have met", killing(processes, "_gather"), ""),
    Fault("while rows are read", killing(hf_freeze.prefix.rows, "read_rows", 5), ""),
    Fault("in the proof", killing(prepare_room, "check_states"), ""),
    Fault("in the pass", killing(build_room, "capture"), ""),
    Fault("while a shard is written", killing(hf_freeze.prefix.files, "save_file"), ""),
    Fault("when the model is hooked", killing(PrefixCache, "_attach"), ""),
    Fault("under a delta", killing(hf_freeze.delta.save, "_split"), "", delta),
    Fault("between two stages", killing(hf_freeze.training.stages, "load_delta"), "", stages),
    Fault("while it generates", killing(hf_freeze.summarization.generation, "_generate"), "", generate),
]


def run_death(rank: int, folder: Path, number: int, failing: int) -> None:
    start(rank, folder)
    case = Case(rank, folder / "case")
    case.folder.mkdir(exist_ok=True)
    started = time.monotonic()
    kind, text = outcome_of(DEATHS[number], failing, case)
    told = {"kind": kind, "text": text, "seconds": time.monotonic() - started}
    (folder / f"{rank}.json").write_text(json.dumps(told))
    os._exit(3)  # as a script that ends with the error


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("number", range(len(DEATHS)), ids=[death.name for death in DEATHS])
def test_a_rank_that_is_killed_is_named_by_the_other(number: int, failing: int, tmp_path: Path) -> None:
    codes = run_on_two(run_death, tmp_path, number, failing)
    assert codes[failing] == -signal.SIGKILL
    told = json.loads((tmp_path / f"{1 - failing}.json").read_text())
    assert told["kind"] == "RankLost", told
    assert told["text"].startswith(f"Rank {failing} of 2 is gone, and rank {1 - failing} cannot go on without it: ")
    assert told["seconds"] < SECONDS
