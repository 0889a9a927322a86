"""A short training at several depths: the same steps on the same batches, from one pass of the prefix cache.

`Probe` freezes and thaws, trains what lies above a depth and puts it back, and says what each row's loss was. What
follows from the losses is `choice`'s business. The model is left as it was, bit for bit, whatever happens.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_freeze.anatomy import Anatomy, BlocksGiven
from hf_freeze.cuts import Cut
from hf_freeze.depth.rows import Collator, ProbeRows, Row
from hf_freeze.errors import CannotCache, FreezeError
from hf_freeze.freezing import freeze, thaw
from hf_freeze.plan import FreezePlan
from hf_freeze.prefix import PrefixCache, PreparedCache
from hf_freeze.prefix.rows import PREFIX_KEY
from hf_freeze.prefix.states import autocast, move
from hf_freeze.training.supervised import all_logits, supervised_logits_only
from hf_freeze.trial import on_trial, seed_all

__all__ = ["Probe", "Trial", "as_it_was"]

RATES = (5e-4, 1e-3)  # of the deepest plan, where a step costs least; each other depth tries two around its best
MOST_DOUBLINGS = 2  # of the highest of them, while it is the best
WARM_UP = 0.1  # of the steps, as runs do
CLIP = 1.0  # Trainer's max_grad_norm


@dataclass(frozen=True)
class Trial:
    """One training at one depth.

    Attributes:
        depth: Frozen blocks.
        rate: The learning rate's peak.
        held_out: Loss of each held-out row after the last step, summed over its labels; infinite where it diverged.
        train_loss: Mean over the labels of some rows trained on.
        step_seconds: Median of the steps; the first one sets kernels up and is left out where there are others.
    """

    depth: int
    rate: float
    held_out: tuple[float, ...]
    train_loss: float
    step_seconds: float


@dataclass
class Probe:
    """Trains what lies above a depth for a few steps, and puts it back. Use it within `as_it_was` and `ready`.

    Attributes:
        notes: What a reader of the result should know, such as why there was no cache.
    """

    core: Any
    anatomy: Anatomy
    rows: ProbeRows
    collator: Collator
    plans: Mapping[int, FreezePlan]
    batch_size: int
    precision: str | None
    blocks: BlocksGiven | None
    bar: Any
    notes: list[str] = field(default_factory=list)
    _prepared: PreparedCache | None = None
    _cache: PrefixCache | None = None

    @property
    def row_steps(self) -> float:
        """The cost of a row's loss in steps of training: a forward pass is a third of a step of `batch_size` rows."""
        return 1 / (3 * self.batch_size)

    @property
    def trial_steps(self) -> float:
        """The cost of a trial in steps."""
        return len(self.rows.batches) + self.row_steps * (len(self.rows.held_out) + len(self.rows.seen))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.core.parameters()).device  # type: ignore[no-any-return]

    def cuts(self, depth: int) -> tuple[Cut, ...]:
        """What of the model can be cached at a depth."""
        return self.plans[depth].resolve(self.anatomy).cuts

    @contextmanager
    def ready(self, depths: Sequence[int], folder: Path, progress: bool) -> Iterator[None]:
        """Computes the states of every depth in one pass, and lets the head run only where there is a label.

        A model whose prefix cannot be replayed exactly is probed without, and that is noted.
        """
        hooks = len(self.core._forward_pre_hooks)
        supervised_logits_only(self.core)
        ours = len(self.core._forward_pre_hooks) > hooks
        try:
            able = [depth for depth in depths if self.cuts(depth)]
            if able:
                self._compute_states(able, folder, progress)
            yield
        finally:
            if ours:
                all_logits(self.core)

    def _compute_states(self, depths: list[int], folder: Path, progress: bool) -> None:
        deepest, *others = depths
        features = [row.feature for row in self.rows.every]
        try:
            freeze(self.core, self.plans[deepest], blocks=self.blocks)
            prepared = PrefixCache.prepare(
                self.core,
                features,
                self.collator,
                cache_dir=folder,
                precision=self.precision,
                also=[self.plans[depth] for depth in others],
                blocks=self.blocks,
                progress=progress,
            )
            prepared.build().close()
            self._prepared = prepared
        except CannotCache as reason:
            self.notes.append(f"Probed without the prefix cache, so it took longer: {reason}")
        finally:
            thaw(self.core)

    @contextmanager
    def at(self, depth: int) -> Iterator[None]:
        """The model frozen at a depth and fed from the cache; afterwards thawed. `train` puts weights back itself."""
        try:
            freeze(self.core, self.plans[depth], blocks=self.blocks)
            self._cache = self._open(depth)
            yield
        finally:
            if self._cache is not None:
                self._cache.close()
                self._cache = None
            thaw(self.core)

    def _open(self, depth: int) -> PrefixCache | None:
        """The states of a depth; `ready` has proved that they can be replayed."""
        if self._prepared is None or not (cuts := self.cuts(depth)):
            return None
        return self._prepared.open(cuts)

    @staticmethod
    def _restore(weights: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
        with torch.no_grad():
            for parameter, before in weights:
                parameter.copy_(before)
                parameter.grad = None

    def search(self, depth: int, rates: Sequence[float] | None, before: Trial | None, unit: float) -> list[Trial]:
        """Trains at the depth that the model is at, at the rates given or at some around the best of the one before.

        The best rate falls as more blocks train, so that each depth tries that of the one before and half of it; the
        deepest, where a step costs least, doubles its highest rate while that is the best.
        """
        if rates is not None:
            return [self.train(depth, rate, unit) for rate in rates]
        if before is not None:
            return [self.train(depth, rate, unit) for rate in (before.rate, before.rate / 2)]
        tried = [self.train(depth, rate, unit) for rate in RATES]
        for _ in range(MOST_DOUBLINGS):
            if min(tried, key=lambda trial: sum(trial.held_out)) is not tried[-1]:
                break
            tried.append(self.train(depth, 2 * tried[-1].rate, unit))
        return tried

    def train(self, depth: int, rate: float, unit: float) -> Trial:
        """Trains with AdamW, a warm-up and a linear decay to 0; tells the losses, and puts the weights back.

        Args:
            unit: How far a step moves the bar.
        """
        trained = [parameter for parameter in self.core.parameters() if parameter.requires_grad]
        weights = [(parameter, parameter.detach().clone()) for parameter in trained]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        steps = len(self.rows.batches)
        warm_up = max(1, round(WARM_UP * steps))
        seconds = []
        try:
            self.core.train()
            seed_all(self.core)  # the same dropout at every rate
            for step, batch in enumerate(self.rows.batches):
                started = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = rate * min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
                loss = self._loss(batch)
                if not torch.isfinite(loss):
                    return Trial(depth, rate, (math.inf,) * len(self.rows.held_out), math.inf, 0.0)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(trained, CLIP)
                optimizer.step()
                optimizer.zero_grad()
                seconds.append(time.perf_counter() - started)
                self.bar.update(unit)
            held_out, seen = self.losses(self.rows.held_out, unit), self.losses(self.rows.seen, unit)
        finally:
            self._restore(weights)
        train_loss = sum(seen) / sum(row.labels for row in self.rows.seen)
        return Trial(depth, rate, tuple(held_out), train_loss, statistics.median(seconds[1:] or seconds))

    def losses(self, rows: Sequence[Row], unit: float = 0.0) -> list[float]:
        """Each row's loss, summed over its labels, without dropout; a row is a batch, so that any model tells it."""
        self.core.eval()
        self.core.training = True  # the model's own flag alone: the head then runs only where there is a label
        losses = []
        with torch.no_grad(), autocast(self.precision, self.device):  # one context: weights are cast once
            for row in rows:
                value = self._call(row.batch).item() * row.labels
                losses.append(value if math.isfinite(value) else math.inf)
                self.bar.update(unit * self.row_steps)
        return losses

    def _loss(self, batch: Mapping[str, Any]) -> torch.Tensor:
        with torch.enable_grad(), autocast(self.precision, self.device):
            return self._call(batch)

    def _call(self, batch: Mapping[str, Any]) -> torch.Tensor:
        states = self._cache.collator.states(batch) if self._cache is not None else None
        inputs = move(batch, self.device) | ({} if states is None else {PREFIX_KEY: states})
        loss: torch.Tensor = self.core(**inputs)["loss"]
        return loss

    @property
    def cached(self) -> bool:
        """Whether states come from the cache; False before `ready` and where it was declined."""
        return self._prepared is not None

    def try_loss(self) -> int:
        """Runs a row; refuses a model without a loss, and one whose loss is not finite before anything was trained.

        Returns:
            The places that its first block saw, such as an image's patches and [CLS]; 1 where they are not in a row.
        """
        name = type(self.core).__name__
        row = self.rows.train[0]
        self.core.eval()
        places = [1]

        def look(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            states = next(iter([*given, named.get("hidden_states")]), None)
            if isinstance(states, torch.Tensor) and states.dim() == 3:  # [rows, places, width]
                places.append(states.shape[1])

        handle = self.anatomy.stacks[0].blocks[0].modules[0].register_forward_pre_hook(look, with_kwargs=True)
        try:
            with torch.no_grad(), autocast(self.precision, self.device):
                output = self.core(**move(row.batch, self.device))
        finally:
            handle.remove()
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if not isinstance(loss, torch.Tensor):
            raise FreezeError(
                f"advise was asked for a {name}; it returns no loss for a batch with {', '.join(row.batch)}. Give rows "
                "with labels, and load the model with a head, for example by AutoModelForCausalLM."
            )
        if not torch.isfinite(loss):
            raise FreezeError(
                f"advise was asked for a {name} whose loss is {loss.item()} on the first row before any training. "
                "A model in fp16 may overflow: load it in fp32 or bf16; else look for broken weights."
            )
        return places[-1]


@contextmanager
def as_it_was(core: nn.Module) -> Iterator[None]:
    """Gradients, modes, buffers and random state are put back; weights and requires_grad by what changes them."""
    gradients = [(parameter, parameter.grad) for parameter in core.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        with on_trial(core, training=None):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
