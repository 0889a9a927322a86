"""Checks whether training from the cache is exact and fast on your device, and writes what it finds.

    python scripts/check_device.py
        on the accelerator if there is one, else on the CPU; at most 8 minutes
    python scripts/check_device.py --device cpu --size tiny --steps versions,exactness
        some steps, on toys: to see that it runs

Needs torch, transformers 5.23 or newer and what the cache itself imports; no data set, no network, and hf_freeze need
not be installed. Each step has a share of the minutes and is stopped when they are over, the others go on; the JSON and
the Markdown file are written anew after each. Ends with an error where anything is not exact, or could not be told.

Exact means: the loss and the gradient of every tensor are those of plain training, to within rounding or three times
the noise that plain training has of itself, in another padding and split into two batches. Each comparison is also made
with the states of two rows exchanged, and is worth nothing where it does not see that.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("torch", "transformers", "safetensors", "numpy", "xxhash", "filelock", "tqdm")
LOWEST = (5, 23)  # transformers: the first whose logits_to_keep takes a mask


def missing_package(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except ImportError:
        return True


if lacking := [name for name in NEEDED if missing_package(name)]:
    sys.exit(f"error: this check imports {', '.join(lacking)}, which is not here. Use: pip install {' '.join(lacking)}")
sys.path.insert(0, str(ROOT))  # the package beside this file, installed or not

import torch  # noqa: E402
import transformers  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < LOWEST:
    sys.exit(
        f"error: transformers {transformers.__version__} is here; this needs 5.23. pip install 'transformers>=5.23'"
    )

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BartConfig, LlamaConfig  # noqa: E402

from hf_freeze import FreezeError, FreezePlan, PrefixCache, freeze, supervised_logits_only, verify_frozen  # noqa: E402
from hf_freeze.exactness import ROUNDING, compare, exchange_rows, relative_gaps, step_tensors  # noqa: E402
from hf_freeze.files import write_whole  # noqa: E402
from hf_freeze.machine import (  # noqa: E402
    device_name,
    find_device,
    library_versions,
    peak_bytes,
    read_hardware,
    reset_peak,
)
from hf_freeze.prefix.rows import PREFIX_KEY  # noqa: E402
from hf_freeze.tables import Table, count_text  # noqa: E402


@dataclass(frozen=True)
class Size:
    """What is measured: the ceilings' tensors, the model of the exactness and the one that is timed."""

    copied_bytes: int
    product: int  # rows and columns of the matrices
    small: tuple[int, int, int]  # width, blocks, vocabulary of the exact models
    lengths: tuple[int, ...]  # tokens of their rows
    width: int
    inner: int
    blocks: int
    heads: int
    groups: int
    words: int
    frozen: int
    rows: int
    tokens: int
    labelled: int
    batches: int  # timed in a round
    rounds: int


RAGGED = (37, 200, 64, 129, 18, 96, 150, 77)
SIZES = {
    "tiny": Size(1 << 20, 64, (32, 4, 64), (5, 13, 9, 8), 32, 64, 4, 4, 2, 128, 3, 2, 16, 4, 1, 1),
    "small": Size(1 << 27, 512, (64, 6, 512), RAGGED, 256, 1024, 16, 4, 2, 4096, 12, 4, 64, 8, 3, 3),
    "llama-1b": Size(1 << 30, 8192, (512, 8, 4096), RAGGED, 2048, 8192, 16, 32, 8, 128256, 12, 8, 512, 32, 5, 5),
}
WARM_UP = 2
PRECISIONS = {  # how the model is called, what its weights are, what rounding does
    "fp32": (None, torch.float32, ROUNDING["fp32"]),
    "bf16 autocast": ("bf16", torch.float32, ROUNDING["bf16"]),
    "fp16 autocast": ("fp16", torch.float32, ROUNDING["fp16"]),
    "bf16 weights": (None, torch.bfloat16, ROUNDING["bf16"]),
}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOSS_SCALE = 1024.0  # of fp16, as a GradScaler gives: else small gradients are rounded to zero
MODES = ("full", "frozen", "cached", "cached + supervised", "limit")


class OutOfTime(BaseException):
    """A step has used up its share; no `except Exception` of a library may swallow it."""


@dataclass
class Check:
    """One run: where, how large, until when, and what came out so far."""

    device: torch.device
    size: Size
    folder: Path
    plant_error: bool
    deadline: float = 0.0

    def in_time(self) -> None:
        """Stops a step between two pieces of work; where the system has an alarm, in the middle of one too."""
        if time.perf_counter() > self.deadline:
            raise OutOfTime

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def seconds(self, work: Callable[[], Any], times: int = 5) -> float:
        """Median time of a piece of work, the device's included; the first call sets up kernels."""
        work()
        taken = []
        for _ in range(times):
            self.in_time()
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    @property
    def feeds_from_pinned_memory(self) -> bool:
        """Whether the host's memory can be pinned for this device."""
        return self.device.type not in ("cpu", "mps")

    def tidy(self) -> None:
        """Gives back what the last model has left."""
        gc.collect()
        if self.device.type != "cpu":
            torch.get_device_module(self.device).empty_cache()


def main(given: list[str] | None = None) -> int:
    args = parse_arguments(given)
    transformers.logging.set_verbosity_error()
    try:
        device = find_device(args.device)
    except FreezeError as error:
        sys.exit(f"error: {error}")
    chosen = args.size or ("small" if device.type == "cpu" else "llama-1b")
    gc.freeze()  # what the imports made stays: then looking for the rest is quick
    started = time.perf_counter()
    facts: dict[str, Any] = {
        "device": device_name(device),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "size": chosen,
        "shape": asdict(SIZES[chosen]),
        "planted_error": args.plant_error,
        "steps": {},
    }
    slug = re.sub(r"[^a-z0-9]+", "-", f"{facts['device']} {'' if chosen == 'llama-1b' else chosen}".lower()).strip("-")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.cache_dir, prefix="check-device-") as folder:
        check = Check(device, SIZES[chosen], Path(folder), args.plant_error)
        for place, name in enumerate(args.steps):
            shares = [STEPS[later][1] for later in args.steps[place:]]
            limit = (60 * args.minutes - (time.perf_counter() - started)) * shares[0] / sum(shares)
            facts["steps"][name] = run_step(name, check, limit)
            print(f"{facts['steps'][name]['status']}: {name}, {facts['steps'][name]['seconds']:.0f} s", flush=True)
            write_results(output, slug, facts)
    print("\n" + markdown(facts))
    print(f"\nWritten: {output / slug}.json and .md")
    faults = find_faults(facts)
    if faults:
        print("\n".join(f"error: {fault}" for fault in faults), file=sys.stderr)
    return int(bool(faults))


def parse_arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", help="cpu, cuda, ...; by default the accelerator if there is one, else cpu")
    add("--minutes", type=float, default=8, help="for all steps together")
    add("--size", choices=SIZES, help="by default llama-1b, on a CPU small")
    add("--steps", default=",".join(STEPS), help="comma-separated")
    add("--output", default="out/devices", help="folder of the JSON and the Markdown file")
    add("--cache_dir", help="where caches lie while this runs; by default the system's temporary folder")
    add("--plant_error", action="store_true", help="exchange the states of two rows, to see that it is reported")
    args = parser.parse_args(given)
    args.steps = args.steps.split(",")
    if unknown := [step for step in args.steps if step not in STEPS]:
        parser.error(f"--steps {unknown[0]} was asked for; these are: {', '.join(STEPS)}.")
    return args


def run_step(name: str, check: Check, limit: float) -> dict[str, Any]:
    """What a step found, also where its time ran out or it failed, and how it ended."""
    started = time.perf_counter()
    check.deadline = started + limit
    found: dict[str, Any] = {}
    try:
        if limit <= 0:
            raise OutOfTime
        with alarm(limit):
            STEPS[name][0](check, found)
        status = "done"
    except OutOfTime:
        status = f"stopped after its {max(0.0, limit):.0f} s" if limit > 0 else "skipped, no time was left"
    except torch.OutOfMemoryError as error:
        status = f"failed, out of memory: {str(error).splitlines()[0]}"
    except Exception as error:  # a step that fails must not take the others with it
        status = f"failed, {type(error).__name__}: {error}"
    check.tidy()
    return {"status": status, "seconds": time.perf_counter() - started, "limit": limit, **found}


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the middle of whatever runs, where the system has such an alarm."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# -------------------------------------------------------------------------------------------- versions and ceilings


def read_versions(check: Check, found: dict[str, Any]) -> None:
    hardware = read_hardware(check.device)
    found["versions"] = library_versions() | {"torch": torch.__version__}  # torch's own says which build it is
    driver = None
    if check.device.type == "cuda":
        found["versions"]["cuda"] = torch.version.cuda or f"HIP {torch.version.hip}"
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(check.device)))
        driver = re.search(r"(\d+\.[\d.]+)", (nvidia_driver() or ""))
    found["driver"] = driver[1] if driver else None
    found["hardware"] = str(hardware)
    found["memory_bytes"] = hardware.memory_bytes
    found["settings"] = {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "threads": torch.get_num_threads(),
    }
    measure_ceilings(check, found)


def nvidia_driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text() if path.exists() else None


def measure_ceilings(check: Check, found: dict[str, Any]) -> None:
    """What the device can do at best: GB/s counted as read and written, TFLOP/s of one square product."""
    ceilings = found["ceilings"] = {}
    device, count = check.device, check.size.copied_bytes
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ceilings["copy on the device, GB/s"] = 2 * count / check.seconds(lambda: target.copy_(source)) / 1e9
    if device.type != "cpu":
        pageable = torch.zeros(count // 4, dtype=torch.uint8)
        there = target[: count // 4]
        ceilings["host to device, pageable, GB/s"] = count / 4 / check.seconds(lambda: there.copy_(pageable)) / 1e9
        if check.feeds_from_pinned_memory:
            pinned = pageable.pin_memory()
            moved = check.seconds(lambda: there.copy_(pinned, non_blocking=True))
            ceilings["host to device, pinned, GB/s"] = count / 4 / moved / 1e9
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left = torch.randn(check.size.product, check.size.product, device=device).to(dtype)
        result = torch.empty_like(left)
        taken = check.seconds(lambda left=left, result=result: torch.mm(left, left, out=result))
        ceilings[f"product in {name}, TFLOP/s"] = 2 * check.size.product**3 / taken / 1e12


# ------------------------------------------------------------------------------------------------------------- models


def make_llama(check: Check, sizes: dict[str, int], dtype: torch.dtype) -> Any:
    """A decoder with random weights, the same ones at each call, made where it runs."""
    turns = {"rope_type": "default", "rope_theta": 5e5}
    config = LlamaConfig(**sizes, rope_parameters=turns, tie_word_embeddings=True, max_position_embeddings=2048)
    torch.manual_seed(0)
    with torch.device(check.device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def small_model(check: Check, family: str, dtype: torch.dtype) -> tuple[Any, FreezePlan]:
    """A model whose exactness is asked for, and what of it is frozen."""
    width, blocks, words = check.size.small
    heads = max(4, width // 64)
    if family == "llama":
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": blocks, "vocab_size": words}
        model = make_llama(check, sizes | {"num_attention_heads": heads, "num_key_value_heads": heads // 2}, dtype)
        return model, FreezePlan(decoder_blocks=blocks - 2)
    sizes = {"d_model": width, "encoder_ffn_dim": 2 * width, "decoder_ffn_dim": 2 * width, "vocab_size": words}
    depth = {"encoder_layers": blocks, "decoder_layers": blocks}
    depth |= {"encoder_attention_heads": heads, "decoder_attention_heads": heads}
    config = BartConfig(**sizes, **depth, dropout=0.0, max_position_embeddings=1024, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(check.device):
        model = AutoModelForSeq2SeqLM.from_config(config, dtype=dtype)
    return model, FreezePlan(encoder_blocks="all", decoder_blocks=blocks - 2)


def ragged_rows(check: Check, family: str) -> list[dict[str, torch.Tensor]]:
    """Rows of unlike lengths, their last few tokens labelled; for two stacks a summary of its own."""
    random, words, rows = torch.Generator().manual_seed(0), check.size.small[2], []
    for place, length in enumerate(check.size.lengths):
        ids = torch.randint(4, words, (length,), generator=random)
        if family == "llama":
            labels = ids.clone()
            labels[: -max(2, length // 3)] = -100
        else:
            labels = torch.randint(4, words, (3 + 2 * place,), generator=random)
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def pad(rows: list[dict[str, torch.Tensor]], more: int = 0) -> dict[str, torch.Tensor]:
    """A batch, padded on the right to its longest row and `more`."""

    def stack(name: str, filler: int) -> torch.Tensor:
        width = max(len(row[name]) for row in rows) + more
        return torch.stack([functional.pad(row[name], (0, width - len(row[name])), value=filler) for row in rows])

    rows = [row | {"attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
    return {"input_ids": stack("input_ids", 0), "attention_mask": stack("attention_mask", 0),
            "labels": stack("labels", -100)}  # fmt: skip


def move(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch's tensors on the device; stored states are brought there by the model's hooks."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


# ---------------------------------------------------------------------------------------------------- hooks, exactness


def try_hooks(check: Check, found: dict[str, Any]) -> None:
    """Freeze, a step from the cache, release and restore, and the proof that nothing moved."""
    model, plan = small_model(check, "llama", torch.float32)
    report = freeze(model, plan)
    rows = ragged_rows(check, "llama")
    cache = PrefixCache.build(model, rows, pad, cache_dir=check.folder, progress=False)
    called = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: called.append(1))
    model.train()
    told = cache.release_prefix()
    batch = move(cache.collator(rows), check.device)
    before = device_bytes(check)
    with torch.no_grad():
        model(**batch)  # the first forward from the cache computes one of its rows anew, then releases the prefix
    called.clear()
    freed = before - device_bytes(check)
    assert_that(not before or freed > told / 2, f"{told} bytes were to leave the device, {freed} did.")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_that(not called, "A block below the cut was called in a step from the cache.")
    assert_that(cache.batches_used == 3, f"{cache.batches_used} of 3 forwards ran from the cache.")
    with torch.no_grad():
        model(**move(pad(rows), check.device))
    assert_that(bool(called), "A plain forward did not call the blocks below the cut.")
    verify_frozen(model, report)
    cache.close()
    handle.remove()
    gone = f", {count_text(freed, 'B')} fewer on the device meanwhile" if before else ""
    count = len(report.frozen_names)
    found["hooks"] = f"prefix of {count_text(told, 'B')} released and restored{gone}; {count} frozen tensors the same"


def device_bytes(check: Check) -> int:
    """Bytes that live on an accelerator; 0 on a CPU and where the device does not tell."""
    check.wait()
    module = None if check.device.type == "cpu" else torch.get_device_module(check.device)
    return int(module.memory_allocated(check.device)) if hasattr(module, "memory_allocated") else 0


def assert_that(holds: bool, otherwise: str) -> None:
    if not holds:
        raise FreezeError(otherwise)


def prove_exactness(check: Check, found: dict[str, Any]) -> None:
    """Every family in every precision; what was compared so far stays where the time runs out."""
    found["exactness"] = {}
    for family in ("llama", "bart"):
        for name in PRECISIONS:
            check.in_time()
            try:
                for path, told in compare_paths(check, family, name).items():
                    found["exactness"][f"{family}, {name}, {path}"] = told
            except Exception as error:  # what one precision cannot do on a device says nothing of the others
                found["exactness"][f"{family}, {name}"] = {"error": f"{type(error).__name__}: {error}"}
            check.tidy()


def compare_paths(check: Check, family: str, name: str) -> dict[str, dict[str, Any]]:
    """Cached steps, and those with supervised logits too, against plain ones of the same weights and rows."""
    precision, dtype, rounding = PRECISIONS[name]
    model, plan = small_model(check, family, dtype)
    freeze(model, plan)
    model.train()
    rows = ragged_rows(check, family)
    scale = LOSS_SCALE if precision == "fp16" else 1.0

    def step(*batches: tuple[dict[str, Any], float]) -> dict[str, torch.Tensor]:
        """Loss and gradients of batches, each with its part of the whole."""
        parts = []
        for batch, share in batches:
            enabled = precision is not None
            with torch.autocast(check.device.type, AUTOCAST.get(precision or ""), enabled=enabled):
                loss = model(**move(batch, check.device)).loss
            parts.append(step_tensors(loss * share * scale, model.named_parameters()))
        return {key: sum(part[key].float() for part in parts) / scale for key in parts[0]}

    def share_of(some: list[dict[str, torch.Tensor]]) -> float:
        labels = [int((row["labels"] != -100).sum()) for row in some]
        return sum(labels) / sum(int((row["labels"] != -100).sum()) for row in rows)

    halves = [rows[::2], rows[1::2]]
    plain = step((pad(rows), 1.0))
    noise = [
        relative_gaps(plain, step((pad(rows, more=9), 1.0))),
        relative_gaps(plain, step(*((pad(half), share_of(half)) for half in halves))),
    ]
    cache = PrefixCache.build(model, rows, pad, cache_dir=check.folder, precision=precision, progress=False)
    batch = cache.collator(rows)
    assert_that(PREFIX_KEY in batch, "A batch did not find its states in the store.")
    planted = batch | {PREFIX_KEY: exchange_rows(batch[PREFIX_KEY])}
    told = {}

    def tell(path: str) -> None:
        gaps = relative_gaps(plain, step((batch, 1.0)))
        seen = compare(relative_gaps(plain, step((planted, 1.0))), noise, rounding)
        agreement = seen if check.plant_error else compare(gaps, noise, rounding)
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in plain.values())
        told[path] = {
            "same": agreement.same and finite,
            "worst": agreement.worst,
            "gap": agreement.gaps[agreement.worst],
            "bar": agreement.bars[agreement.worst],
            "noise": max(one[agreement.worst] for one in noise),
            "loss_gap": agreement.gaps["loss"],
            "largest_noise": max(max(one.values()) for one in noise),
            "largest_gap": max(agreement.gaps.values()),
            "planted_error_seen": not seen.same,
            "planted_error_gap": max(seen.gaps.values()),
            "tensors": len(plain),
        }

    tell("cached")
    if family == "llama":
        outcome = supervised_logits_only(model)
        assert_that(outcome.active, f"No supervised logits: {outcome.reason}")
        tell("cached + supervised")
    cache.close()
    return told


# --------------------------------------------------------------------------------------------------------------- speed


def timed_model(check: Check) -> Any:
    """The model that is timed: on an accelerator its weights are bf16, what trains is made fp32 later."""
    size = check.size
    sizes = {"hidden_size": size.width, "intermediate_size": size.inner, "num_hidden_layers": size.blocks}
    sizes |= {"num_attention_heads": size.heads, "num_key_value_heads": size.groups, "vocab_size": size.words}
    return make_llama(check, sizes, torch.float32 if check.device.type == "cpu" else torch.bfloat16)


def speed_precision(check: Check) -> str | None:
    """Autocast on an accelerator; a CPU may be slower for it."""
    return None if check.device.type == "cpu" else "bf16"


def autocast(check: Check) -> torch.autocast:
    return torch.autocast(check.device.type, torch.bfloat16, enabled=speed_precision(check) is not None)


def even_rows(check: Check, count: int) -> list[dict[str, torch.Tensor]]:
    """Random rows of one length, their last tokens labelled."""
    random, size = torch.Generator().manual_seed(1), check.size
    ids = torch.randint(4, size.words, (count, size.tokens), generator=random)
    labels = ids.clone()
    labels[:, : -size.labelled] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def load(check: Check, rows: list[Any], collator: Callable[[list[Any]], Any]) -> DataLoader:
    """Batches as a Trainer's loader makes them: from pinned memory where the device is fed from it."""
    return DataLoader(rows, check.size.rows, collate_fn=collator, pin_memory=check.feeds_from_pinned_memory)


def time_steps(check: Check, found: dict[str, Any]) -> None:
    """Full, frozen, cached, with supervised logits, and the blocks above the cut alone: in turn, so that a device that
    slows down does so for all.
    """
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    peaks: dict[str, list[int]] = {mode: [] for mode in MODES}
    found["speed"] = {}
    for _ in range(check.size.rounds):
        for mode in MODES:
            if "error" in found["speed"].get(mode, {}):
                continue
            try:
                taken, peak, trained = time_mode(check, mode)
            except torch.OutOfMemoryError:
                found["speed"][mode] = {"error": "out of memory"}
            except FreezeError as error:
                found["speed"][mode] = {"error": str(error)}
            else:
                seconds[mode] += taken
                peaks[mode].append(peak)
                found["speed"][mode] = {
                    "seconds": statistics.median(seconds[mode]),
                    "least_seconds": min(seconds[mode]),
                    "steps": len(seconds[mode]),
                    "peak_bytes": statistics.median(peaks[mode]),
                    "trained_parameters": trained,
                }
            check.tidy()
    counts = {
        told["trained_parameters"] for mode, told in found["speed"].items() if mode != "full" and "seconds" in told
    }
    assert_that(len(counts) <= 1, f"The modes train unlike numbers of parameters: {sorted(counts)}.")


def time_mode(check: Check, mode: str) -> tuple[list[float], int, int]:
    """Seconds of some steps of one mode, after a warm-up, the greatest memory meanwhile, and what trains."""
    model = timed_model(check)
    rows = even_rows(check, check.size.rows * (WARM_UP + check.size.batches))
    cache = None
    if mode == "limit":
        parameters, batches, loss_of = take_limit(check, model, rows)
    else:
        collator = pad
        if mode != "full":
            freeze(model, FreezePlan(decoder_blocks=check.size.frozen))
        if mode.startswith("cached"):
            given = {"cache_dir": check.folder, "precision": speed_precision(check), "progress": False}
            cache = PrefixCache.build(model, rows, pad, **given)
            cache.release_prefix()
            collator = cache.collator
        if mode == "cached + supervised":
            outcome = supervised_logits_only(model)
            assert_that(outcome.active, str(outcome))
        parameters, batches = list(model.parameters()), load(check, rows, collator)

        def loss_of(batch: dict[str, Any]) -> torch.Tensor:
            return model(**batch).loss

        model.train()
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=check.device.type in ("cpu", "cuda"))
    taken, batches = [], iter(batches)
    for step in range(WARM_UP + check.size.batches):
        check.in_time()
        if step == WARM_UP:
            reset_peak(check.device)
        check.wait()
        started = time.perf_counter()
        batch = move(next(batches), check.device)
        with autocast(check):
            loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        check.wait()
        taken.append(time.perf_counter() - started)
    assert_that(bool(torch.isfinite(loss)), f"The loss of the mode {mode!r} is {loss.item()}.")
    peak = peak_bytes(check.device)
    if cache is not None:
        assert_that(cache.batches_used == len(taken), f"{cache.batches_used} of {len(taken)} steps used the cache.")
        cache.close()
    return taken[WARM_UP:], peak, sum(parameter.numel() for parameter in trained)


class CutReached(Exception):
    """Carries what the first block above the cut is called with."""


def run_prefix(check: Check, model: Any, batch: dict[str, Any]) -> tuple[Any, ...]:
    """What the first block above the cut is called with: the model is run up to it, without a graph."""

    def stop(_: Any, by_place: tuple[Any, ...], by_name: dict[str, Any]) -> None:
        raise CutReached(by_place, by_name)

    handle = model.model.layers[check.size.frozen].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), autocast(check):
            model(**move(batch, check.device), use_cache=False)
    except CutReached as reached:
        return reached.args
    finally:
        handle.remove()
    raise FreezeError("The model did not call its first block above the cut.")


def take_limit(check: Check, model: Any, rows: list[Any]) -> tuple[list[Any], list[Any], Callable[[Any], torch.Tensor]]:
    """The blocks above the cut, the final norm and the head at labelled places, fed from the device."""
    upper, norm, head = model.model.layers[check.size.frozen :], model.model.norm, model.lm_head
    model.requires_grad_(False)
    batches = []
    for batch in load(check, rows, pad):
        given = run_prefix(check, model, batch)
        targets = functional.pad(batch["labels"][:, 1:], (0, 1), value=-100).flatten()
        places = (targets != -100).nonzero().flatten()
        batches.append({"given": given, "places": places, "targets": targets[places]})

    def loss_of(batch: dict[str, Any]) -> torch.Tensor:
        (states, *others), named = batch["given"]
        for block in upper:
            states = block(states, *others, **named)
        logits = head(norm(states).flatten(0, 1)[batch["places"]])
        return functional.cross_entropy(logits.float(), batch["targets"])

    del model.model.layers[: check.size.frozen]
    above = torch.nn.ModuleList([*upper, norm]).train().requires_grad_()
    return list(above.parameters()), batches, loss_of


# ------------------------------------------------------------------------------------------------------- states, build


def time_states(check: Check, found: dict[str, Any]) -> None:
    """A batch's states brought to the device: from memory, from the store's pages in memory, and from the disk."""
    model = timed_model(check)
    freeze(model, FreezePlan(decoder_blocks=check.size.frozen))
    rows = even_rows(check, check.size.rows * 4)
    given = {"cache_dir": check.folder / "states", "precision": speed_precision(check), "progress": False}
    cache = PrefixCache.build(model, rows, pad, **given)
    batches = [rows[start : start + check.size.rows] for start in range(0, len(rows), check.size.rows)]
    there = [cache.collator(batch)[PREFIX_KEY] for batch in batches]
    size = sum(tensor.numel() * tensor.element_size() for tensor in there[0].values())
    found["states"] = {"bytes_of_a_batch": size}

    def bring(states: dict[str, torch.Tensor]) -> None:
        for tensor in states.values():
            tensor.to(check.device, copy=True)

    def timed(prepare: Callable[[], Any], each: Callable[[int], Any]) -> dict[str, float]:
        prepare()
        taken = []
        for place in range(len(batches)):
            check.in_time()
            check.wait()
            started = time.perf_counter()
            each(place)
            check.wait()
            taken.append(time.perf_counter() - started)
        return {"seconds": statistics.median(taken), "GB/s": size / statistics.median(taken) / 1e9}

    def drop_pages() -> None:
        for path in given["cache_dir"].rglob("*.safetensors"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    bring(there[0])
    found["states"]["from memory"] = timed(lambda: None, lambda place: bring(there[place]))
    if check.feeds_from_pinned_memory:
        pinned = [{name: tensor.pin_memory() for name, tensor in states.items()} for states in there]
        found["states"]["from pinned memory"] = timed(lambda: None, lambda place: bring(pinned[place]))

    def from_store(place: int) -> None:
        bring(cache.collator(batches[place])[PREFIX_KEY])

    found["states"]["from the store, pages in memory"] = timed(lambda: from_store(0), from_store)
    if hasattr(os, "posix_fadvise"):
        found["states"]["from the disk"] = timed(drop_pages, from_store)
    cache.close()


def time_build(check: Check, found: dict[str, Any]) -> None:
    """Seconds that the build takes for more rows, beside those of the bare prefix for as many."""
    model = timed_model(check)
    freeze(model, FreezePlan(decoder_blocks=check.size.frozen))
    few = max(1, (2048 if check.device.type == "cpu" else 32768) // check.size.tokens)  # as the build takes at once
    rows = even_rows(check, 6 * few)
    given = {"cache_dir": check.folder / "build", "precision": speed_precision(check), "progress": False}
    cache = PrefixCache.build(model, rows[:few], pad, **given)
    check.in_time()
    # The proof of a few rows comes before every pass, so that two passes of unlike length tell what the rows take.
    short, long = cache.add(rows[few : 2 * few]).seconds, cache.add(rows[2 * few :]).seconds
    cache.close()
    model.eval()
    loader = list(DataLoader(rows[2 * few :], few, collate_fn=pad))

    def run_bare() -> None:
        for batch in loader:
            run_prefix(check, model, batch)

    bare = check.seconds(run_bare, times=3)
    passed = (long - short) * 4 / 3  # four batches against one: three batches more
    found["build"] = {"rows": 4 * few, "pass_seconds": passed, "bare_seconds": bare, "pass_over_bare": passed / bare}


# What runs, in order, and each one's share of the minutes.
STEPS: dict[str, tuple[Callable[[Check, dict[str, Any]], None], float]] = {
    "versions": (read_versions, 0.5),
    "hooks": (try_hooks, 0.5),
    "exactness": (prove_exactness, 2.5),
    "speed": (time_steps, 3.0),
    "states": (time_states, 0.75),
    "build": (time_build, 0.75),
}


# ------------------------------------------------------------------------------------------------------------- results


def find_faults(facts: dict[str, Any]) -> list[str]:
    """What makes the check fail, in sentences."""
    faults = []
    for name, step in facts["steps"].items():
        if step["status"].startswith("failed") or (name in ("hooks", "exactness") and step["status"] != "done"):
            faults.append(f"The step {name!r} was not finished ({step['status']}).")
        for mode, told in step.get("speed", {}).items():
            if "error" in told and told["error"] != "out of memory":
                faults.append(f"Steps of the mode {mode!r} were not timed: {told['error']}")
        for case, told in step.get("exactness", {}).items():
            if "error" in told:
                faults.append(f"{case}: {told['error']}")
                continue
            if not told["planted_error_seen"]:
                faults.append(
                    f"{case}: the states of two rows were exchanged and it was not seen; that proves nothing."
                )
            if not told["same"]:
                faults.append(
                    f"{case}: not as plain training: {told['worst']} differs by {told['gap']:.1e} of its size, "
                    f"{told['bar']:.0e} allowed."
                )
    return faults


def markdown(facts: dict[str, Any]) -> str:
    """The tables of the steps that ran, and what became of the others."""
    steps, parts = facts["steps"], [f"# {facts['device']}"]
    versions = steps.get("versions", {})
    told = ", ".join(f"{name} {version}" for name, version in versions.get("versions", {}).items())
    driver = f"driver {versions['driver']}; " if versions.get("driver") else ""
    parts.append(f"{facts['date']}; size {facts['size']}; {driver}{versions.get('hardware', '')}\n\n{told}".strip())
    if facts["planted_error"]:
        parts.append("**With a planted error: the states of two rows are exchanged.**")
    faults = find_faults(facts)
    parts.append("\n".join(f"- **{fault}**" for fault in faults) or verdict(steps))
    tables = []
    if ceilings := versions.get("ceilings"):
        tables.append(Table("Ceilings", ("what", "measured"), tuple((k, f"{v:.3g}") for k, v in ceilings.items())))
    if exact := steps.get("exactness", {}).get("exactness"):
        rows = tuple(
            (
                case, "same" if told["same"] else "DIFFERENT", f"{told['gap']:.1e}", f"{told['noise']:.1e}",
                f"{told['bar']:.0e}", f"{told['loss_gap']:.1e}", told["worst"],
                f"{told['planted_error_gap']:.1e}{'' if told['planted_error_seen'] else ' NOT SEEN'}",
            )
            for case, told in exact.items()
            if "error" not in told
        )  # fmt: skip
        columns = ("case", "verdict", "gap", "noise", "bar", "loss", "worst tensor", "planted error")
        lines = ("Gradients tensor by tensor, relative to plain training; noise: plain in other batch shapes.",)
        tables.append(Table("Exactness", columns, rows, lines))
    if speed := steps.get("speed", {}).get("speed"):
        tables.append(speed_table(speed, facts["shape"]))
    if states := dict(steps.get("states", {}).get("states", {})):
        title = f"A batch's states, {count_text(states.pop('bytes_of_a_batch'), 'B')}, on their way to the device"
        rows = tuple((name, f"{1e3 * told['seconds']:.3g} ms", f"{told['GB/s']:.3g}") for name, told in states.items())
        tables.append(Table(title, ("from", "a batch", "GB/s"), rows))
    if build := steps.get("build", {}).get("build"):
        cells = (f"{build['rows']}", f"{build['pass_seconds']:.3g} s", f"{build['bare_seconds']:.3g} s")
        columns = ("rows", "build", "bare forward of the prefix", "build / bare")
        tables.append(Table("Building the cache", columns, ((*cells, f"{build['pass_over_bare']:.2f}"),)))
    ends = tuple((name, step["status"], f"{step['seconds']:.0f} s") for name, step in steps.items())
    tables.append(Table("Steps", ("step", "ended", "took"), ends))
    return "\n\n".join([*parts, *(table.to_markdown() for table in tables)]) + "\n"


def verdict(steps: dict[str, Any]) -> str:
    count = len(steps.get("exactness", {}).get("exactness", {}))
    return f"Exact in all {count} cases, and each saw the planted error." if count else "Exactness was not asked for."


def speed_table(speed: dict[str, Any], shape: dict[str, Any]) -> Table:
    """Seconds a step and memory by mode, and what the modes are to one another."""
    rows = []
    seconds = {mode: told.get("seconds") for mode, told in speed.items()}
    for mode, told in speed.items():
        if "error" in told:
            rows.append((mode, told["error"], "-", "-", "-", "-"))
            continue
        ratios = (
            f"{seconds[other] / told['seconds']:.2f}" if seconds.get(other) else "-" for other in ("full", "frozen")
        )
        over = f"{told['seconds'] / seconds['limit']:.2f}" if seconds.get("limit") else "-"
        peak = count_text(told["peak_bytes"], "B") if told["peak_bytes"] else "-"
        rows.append((mode, f"{told['seconds']:.3g} s", *ratios, over, peak))
    lines = (
        f"{shape['frozen']} of {shape['blocks']} blocks frozen, width {shape['width']}, {shape['rows']} x "
        f"{shape['tokens']} tokens, {shape['labelled']} of a row labelled; medians of up to {shape['rounds']} rounds "
        f"of {shape['batches']} steps, in turn, the prefix released in cached ones. On an accelerator: bf16 autocast, "
        "frozen weights bf16, trained ones fp32.",
    )
    columns = ("mode", "step", "full / it", "frozen / it", "it / limit", "peak")
    return Table("A training step", columns, tuple(rows), lines)


def write_results(output: Path, slug: str, facts: dict[str, Any]) -> None:
    """Both files, each whole or as it was."""
    for ending, text in (("json", json.dumps(facts, indent=2) + "\n"), ("md", markdown(facts))):
        write_whole(output / f"{slug}.{ending}", text)


if __name__ == "__main__":
    sys.exit(main())
