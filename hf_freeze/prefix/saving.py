"""Whether a prefix cache pays: a few batches and the disk are timed, and the whole training is predicted from them.

One epoch, a shallow prefix, or a fast device behind a slow disk do not pay. The prediction is of forward, backward and
reading; what takes the same time either way (the optimizer, evaluation) is left out of both sides.
"""

from __future__ import annotations

import os
import statistics
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from hf_freeze.errors import FreezeError
from hf_freeze.prefix.prepare import Prepared
from hf_freeze.prefix.replay import replaying
from hf_freeze.prefix.rows import PREFIX_KEY, read_rows
from hf_freeze.prefix.states import bytes_of_row, capture, device_of, move, pad_states, running, split_rows
from hf_freeze.prefix.store import Store

__all__ = ["BreakEven", "predict_saving"]

BATCHES = 2  # each is timed both ways in turn; their medians are taken
DISK_BYTES = 32 << 20


@dataclass(frozen=True)
class BreakEven:
    """What a training takes plainly and from the cache, predicted from a few batches.

    Attributes:
        plain_step_seconds, cached_step_seconds: Forward and backward of a batch.
        reading_seconds: To read the states of a batch.
        steps: Of the whole training.
        build_seconds: To compute and write what the cache lacks; 0 where it is all there.
        cache_bytes: On disk when built.
    """

    plain_step_seconds: float
    cached_step_seconds: float
    steps: int
    build_seconds: float
    cache_bytes: int
    reading_seconds: float = 0.0

    @property
    def plain_seconds(self) -> float:
        """The whole training without the cache."""
        return self.steps * self.plain_step_seconds

    @property
    def cached_seconds(self) -> float:
        """The whole training with the cache, building it included."""
        return self.build_seconds + self.steps * (self.cached_step_seconds + self.reading_seconds)

    @property
    def pays(self) -> bool:
        """Whether building saves time."""
        return self.cached_seconds < self.plain_seconds

    def __str__(self) -> str:
        verdict = "it pays" if self.pays else "it does not pay"
        return (
            f"Prefix cache, predicted: {self.plain_seconds:,.1f} s without, {self.cached_seconds:,.1f} s with "
            f"({self.build_seconds:,.1f} s to build, {self.cached_step_seconds:.3f} instead of "
            f"{self.plain_step_seconds:.3f} s a batch), {self.cache_bytes / 1e6:,.0f} MB on disk: {verdict}."
        )

    def measured(self, seconds: float, build_seconds: float | None) -> str:
        """A line that sets the measured seconds of all batches beside the predicted ones.

        Args:
            seconds: Forward and backward of the whole training.
            build_seconds: What the build took; None where it was not built.
        """
        if build_seconds is None:
            return f"Without a prefix cache: {seconds:,.1f} s of batches, {self.plain_seconds:,.1f} s predicted."
        return (
            f"With the prefix cache: {build_seconds + seconds:,.1f} s, "
            f"{self.build_seconds + self.steps * self.cached_step_seconds:,.1f} s predicted (building"
            f" {build_seconds:,.1f} s, {self.build_seconds:,.1f} s predicted; batches {seconds:,.1f} s, "
            f"{self.steps * self.cached_step_seconds:,.1f} s predicted)."
        )


def predict_saving(
    prepared: Prepared,
    store: Store | None,
    *,
    steps: int,
    batch_size: int,
    step: Callable[[dict[str, Any]], Any] | None,
    processes: int,
) -> BreakEven:
    """Times plain batches, batches from states in memory, the pass of the prefix, and the disk. Changes no weight.

    Args:
        store: What is there already; None for nothing.
        processes: Among which the pass is shared.
    """
    model, prefix = prepared.model, prepared.prefixes[0]
    rows = prepared.rows_of(prefix)
    device = device_of(model)
    leaves = prefix.leaves("stream")
    run = step or (lambda batch: model(**batch).loss.backward())
    spread = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    plain, cached, passes, collate = [], [], [], []
    with running(model, prefix.precision, training=True):
        for place in range(BATCHES + 1):  # the first one warms up
            chosen = [spread[(place * batch_size + row) % len(spread)] for row in range(batch_size)]
            batch = prepared.collator([rows.features[row] for row in chosen])
            read = read_rows(batch, with_target=prefix.with_target)
            moved = move(batch, device)
            started = _now(device)
            taken = capture(model, prefix, moved)
            passes.append((_now(device) - started) / sum(rows.tokens(row) for row in chosen))
            pieces = list(split_rows({name: taken[name].cpu() for name in leaves}, leaves, read))
            started = _now(device)
            states = pad_states(pieces, prefix.stream_sides(), read)
            collate.append(_now(device) - started)
            tables = {name: taken[name] for name in prefix.leaves("table")}
            plain.append(_timed(run, dict(moved), model, device))
            with replaying(model, prefix, tables):
                cached.append(_timed(run, moved | {PREFIX_KEY: states}, model, device))
    write_speed, read_speed = _disk_speed(prepared)
    row_bytes = [bytes_of_row(prefix.streams(), lengths) for lengths in rows.lengths]
    missing = [row for row in rows.unique() if store is None or rows.digests[row] not in store]
    build = sum(rows.tokens(row) for row in missing) * statistics.median(passes[1:]) / processes
    build += sum(row_bytes[row] for row in missing) / write_speed
    reading = statistics.median(collate[1:]) + batch_size * statistics.fmean(row_bytes) / read_speed
    return BreakEven(
        plain_step_seconds=statistics.median(plain[1:]),
        cached_step_seconds=statistics.median(cached[1:]),
        reading_seconds=reading,
        steps=steps,
        build_seconds=build,
        cache_bytes=sum(row_bytes[row] for row in missing) + (store.stored_bytes if store else 0),
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _timed(run: Callable[[dict[str, Any]], Any], batch: dict[str, Any], model: Any, device: torch.device) -> float:
    """Seconds of a forward and backward pass, whose gradients are dropped again."""
    before = {parameter: parameter.grad for parameter in model.parameters() if parameter.requires_grad}
    started = _now(device)
    run(batch)
    seconds = _now(device) - started
    for parameter, gradient in before.items():
        parameter.grad = gradient
    return seconds


def _disk_speed(prepared: Prepared) -> tuple[float, float]:
    """Bytes a second, written to the disk and read back (most likely from memory, as in training)."""
    path = prepared.folder / f"{uuid.uuid4().hex}.tmp"
    content = os.urandom(1 << 20) * (DISK_BYTES >> 20)
    try:
        prepared.folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        written = time.perf_counter()
        path.read_bytes()
        return DISK_BYTES / (written - started), DISK_BYTES / (time.perf_counter() - written)
    except OSError as error:
        raise FreezeError(
            f"The prefix cache was to be kept in {prepared.folder}; it cannot be written: {error}. Give another "
            "cache_dir."
        ) from error
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
