"""Compares stored states with what the model computes now: what no key can see, this sees.

A key holds what can be read off a model; code that its code calls, a closure, a library's switch cannot. So a few
rows are computed anew whenever a cache is attached, and one row of a batch at the first cached batch, then once an
epoch or every few hundred batches, at once where a cheap look at the modules finds something changed, and at the end.
A difference beyond rounding raises `CannotCache` with the row and its size. Changes neither model nor store.
"""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hf_freeze.errors import CannotCache, FreezeError, worded
from hf_freeze.exactness import RowGap, row_gap
from hf_freeze.marks import is_mark
from hf_freeze.prefix.key import HOOKS, INTERNAL, own_hooks
from hf_freeze.prefix.rows import TARGET, Collator, Rows, collate, extent, read_rows
from hf_freeze.prefix.states import Prefix, capture, device_of, running, states_alone, states_of
from hf_freeze.prefix.store import Store
from hf_freeze.tensors import is_sharded

__all__ = ["SpotCheck", "check_stored_rows"]

# Batches between two checks at least and at most: computing a row costs a fifth of a cached batch of eight.
SELDOM, OFTEN = 256, 32
# Bars, relative: of a row's norm and of the middle token's. Rounding does 1e-6 in fp32 and 5e-3 in 16 bits; where the
# model itself rounds coarser (alone against among others), that many times its own; never so much that the states of
# another row, which are about 1.4 away, would pass.
BARS, BARS_LOW, MOST = (2e-4, 2e-4), (5e-2, 2e-2), 0.3
TIMES_OWN = 8.0


def check_stored_rows(
    model: nn.Module,
    prefix: Prefix,
    store: Store,
    tables: Mapping[str, torch.Tensor],
    rows: Rows,
    sample: list[int],
    collator: Collator,
) -> dict[str, tuple[float, float]]:
    """Compares the stored states of some rows with fresh ones, in the precision of the cache.

    Returns:
        For each stream the bars within which rounding stays, measured: each row alone against among the others.

    Raises:
        CannotCache: A row's stored states are not what the model computes; the message has the row and the size.
    """
    leaves = prefix.leaves("stream")
    bars: dict[str, tuple[float, float]] = {}
    with running(model, prefix.precision, training=False):
        together, among = states_of(model, prefix, collate(collator, [rows.features[row] for row in sample]))
        fresh = [states_alone(model, prefix, collator, rows.features[row]) for row in sample]
    for one, other in zip(fresh, among, strict=True):
        for name in leaves:
            own, least = row_gap(other[name], one[name]), _least(one[name], prefix.precision)
            known = bars.get(name, least)
            wide = (max(known[0], TIMES_OWN * own.whole), max(known[1], TIMES_OWN * own.middle))
            bars[name] = (min(wide[0], MOST), min(wide[1], MOST))
    for row, states in zip(sample, fresh, strict=True):
        stored = store.read(rows.digests[row])
        for name in leaves:
            gap = row_gap(stored[name].to(states[name].device), states[name])
            if not gap.within(bars[name]):
                raise CannotCache(
                    f"The prefix cache {store.folder} holds other states of row {row} than the model computes now: "
                    f"{_told(name, gap, bars[name])}. Something that decides about them and that the cache's key does "
                    "not see has changed since they were computed: code that the model's code calls, a closure, a "
                    f"library's setting. Undo it, remove {store.folder}, or give another cache_dir."
                )
    for name in prefix.leaves("table"):
        if _table_differs(tables.get(name), together[name]):
            raise CannotCache(
                f"The prefix cache {store.folder} holds another table {name} than the model computes now. Remove "
                f"{store.folder}, or give another cache_dir."
            )
    return bars


class SpotCheck:
    """Looks now and then, during a training from a cache, whether the batch's states are still what the model computes.

    Args:
        bars: What `check_stored_rows` returned.
        epoch_rows: Rows that this process trains in an epoch; with a batch's rows they say how many batches that is.
        device: Where the rows were compared.

    Attributes:
        held_at: The number of the cached batch at which the last check held; 0 before the first.
    """

    def __init__(
        self, prefix: Prefix, bars: Mapping[str, tuple[float, float]], epoch_rows: int, device: torch.device
    ) -> None:
        self.prefix = prefix
        self.device = device
        self.bars = dict(bars)
        self.epoch_rows = epoch_rows
        self.held_at = 0
        self.checks = 0
        self._modules: list[tuple[nn.Module, bool]] = []  # and whether all that it keeps is looked at
        self._look: list[Any] = []
        self._looked_in_vain = 0
        self._other_since = 0  # the batch from which on the modules look otherwise, though their states held
        self._due = False
        self._not_before = 0  # the batch before which a check that could not run is not tried again

    def before_batch(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        inputs: Mapping[str, Any],
        states: Mapping[str, torch.Tensor],
        tables: Mapping[str, torch.Tensor],
        used: int,
        away: bool,
    ) -> None:
        """Checks one row where it is time, all where the modules look otherwise than at the last check.

        Args:
            module: What is called with the batch.
            states: The batch's stored states [rows, width, ...] by stream.
            used: Cached batches before this one.
            away: Whether the prefix's weights are: its modules are looked at then, and nothing is computed.

        Raises:
            CannotCache: The row's states are old.
        """
        batch = used + 1
        since = batch - self.held_at
        if torch.compiler.is_compiling():
            return  # it traces code instead of running it
        look = self._look_at_modules()
        if away or self.is_sharded():  # a forward would bring it back, or wait for the other processes
            self._look_only(look, batch)
            return
        # A module that notes something at every batch would else be checked at every batch.
        looks_other = look != self._look and since >= min(2**self._looked_in_vain, SELDOM)
        rows = next(iter(states.values())).shape[0]
        often = min(max(self.epoch_rows // max(1, rows), OFTEN), SELDOM)
        if batch < self._not_before or (self.held_at and not self._due and not looks_other and since < often):
            return
        places = [random.Random(used).randrange(rows)]
        if self.held_at and looks_other:
            self._looked_in_vain += 1
            self._other_since = self._other_since or batch
            places = list(range(rows))
        chosen = {name: _rows_at(value, places, rows) for name, value in (*inputs.items(), *_by_name(module, args))}
        try:
            with running(module, self.prefix.precision, training=True):
                fresh = capture(module, self.prefix, chosen)
        except CannotCache:
            raise
        except Exception as error:  # a foreign forward may refuse one row alone
            warnings.warn(
                f"A row of cached batch {batch} could not be computed anew to check its stored states "
                f"({worded(error)}); they go on unchecked.",
                stacklevel=1,
            )
            self._not_before = batch + OFTEN
            return
        spans = _spans(chosen, self.prefix)
        for name, leaf in self.prefix.leaves("stream").items():
            for place, now in zip(places, fresh[name], strict=True):
                stored = states[name][place]
                if leaf.side:
                    real = stored.flatten(1).ne(0).any(dim=1)  # padding is all zeros
                    start, stop = spans[leaf.side][place - places[0]] if leaf.side in spans else extent(real)
                    stored, now = stored[start:stop], now[start:stop]
                gap = row_gap(stored.to(now.device), now)
                if not gap.within(self.bars.get(name, _least(now, self.prefix.precision))):
                    raise self._stale(f"row {place} of cached batch {batch}", name, gap)
        for name in self.prefix.leaves("table"):
            if _table_differs(tables.get(name), fresh[name]):
                raise self._stale(f"cached batch {batch}", name, None)
        self._note(batch, look)

    def at_the_end(self, model: nn.Module, store: Store, rows: Rows, collator: Collator, used: int) -> None:
        """Checks a row of the dataset after the last batch, where one was trained since the last check."""
        if device_of(model) != self.device or any(p.device.type == "meta" for p in self._parameters()):
            return  # other kernels round otherwise
        row = random.Random(used).randrange(len(rows))
        try:
            single = collate(collator, [rows.features[row]])
            with running(model, self.prefix.precision, training=False):  # it may be thawed by now
                _, (states,) = states_of(model, self.prefix, single)
        except CannotCache:
            raise
        except Exception as error:  # rows that lie no longer where they lay, a model that went elsewhere
            warnings.warn(
                f"Row {row} could not be computed anew to check the states of the last cached batches "
                f"({worded(error)}); they go unchecked.",
                stacklevel=1,
            )
            return
        (digest,) = read_rows(single, with_target=self.prefix.with_target).digests
        if digest not in store:
            return
        try:
            stored = store.read(digest)
        except FreezeError as error:  # every row was whole when it was trained from; what came later does no harm
            warnings.warn(
                f"The states of the last cached batches go unchecked: row {row} cannot be read again. {error}",
                stacklevel=1,
            )
            return
        for name, tensor in stored.items():
            gap = row_gap(tensor.to(states[name].device), states[name])
            if not gap.within(self.bars[name]):
                raise self._stale(f"row {row} of the dataset, after the last batch,", name, gap)
        self.held_at = used
        self._due = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_look": [], "_modules": []}  # a copy's modules are others

    def is_open(self, used: int) -> bool:
        """Whether batches were trained since the last check that held."""
        return used != self.held_at or self._due

    def is_sharded(self) -> bool:
        """Whether each process holds a part of the prefix. Not by its state dict, which would gather FSDP2's parts."""
        return any(map(is_sharded, self._parameters()))

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for part in self.prefix.replaced for parameter in part.module.parameters())

    def after_release(self) -> None:
        """The prefix was away and is back: the next batch is checked, whenever it comes."""
        self._due = True

    def _look_only(self, look: list[Any], batch: int) -> None:
        """Where nothing can be computed: notes since when the modules look otherwise, and says so where that is all."""
        if self._look and look != self._look and not self._other_since:
            self._other_since, self._due = batch, True
            if self.is_sharded():
                warnings.warn(
                    f"Modules below the cut look otherwise since cached batch {batch}, a hook, an adapter or an "
                    "attribute; while each process holds a part of them their stored states cannot be compared with "
                    "fresh ones. Undo the change, or close() the cache.",
                    stacklevel=1,
                )
        elif not self._look:
            self._look = look

    def _note(self, batch: int, look: list[Any]) -> None:
        self.held_at, self._look, self._due = batch, look, False
        self.checks += 1

    def _stale(self, where: str, name: str, gap: RowGap | None) -> CannotCache:
        size = _told(name, gap, self.bars[name]) if gap else f"the table {name} is another"
        cure = "undo the change, or close() the cache and call PrefixCache.build again"
        if self.held_at:
            first = min(self.held_at + 1, self._other_since or self.held_at + 1)
            cure = f"states may have been old from cached batch {first} on; {cure}; train from there anew"
        return CannotCache(
            f"The prefix cache's states of {where} are not what the model computes now: {size}. Something below the "
            f"cut changed since they were computed or compared; {cure}."
        )

    def _look_at_modules(self) -> list[Any]:
        """What a module keeps, by identity: cheap, and another where a hook, adapter, attribute or class changed."""
        if not self._modules:
            self._modules = [(module, True) for module in self.prefix.modules()]
            self._modules += [(module, False) for module in self.prefix.around]
        seen: list[Any] = []
        for module, inside_it in self._modules:
            own = module.__dict__
            seen += [type(module), type(module).forward, id(own.get("forward"))]
            seen += map(id, own["_modules"].values())
            if any(own[name] for name in HOOKS):
                seen.append(len(own_hooks(module)))
            kept = [value for name, value in own.items() if name not in INTERNAL and not is_mark(name)]
            seen += map(id, kept if inside_it else [value for value in kept if type(value) in (int, float)])
        return seen


def _least(tensor: torch.Tensor, precision: str | None) -> tuple[float, float]:
    low = precision in ("bf16", "fp16") or tensor.dtype not in (torch.float32, torch.float64)
    return BARS_LOW if low else BARS


def _told(name: str, gap: RowGap, bars: tuple[float, float]) -> str:
    return (
        f"those of {name.split(':')[0]} differ by {gap.whole:.1e} of their size, {gap.middle:.1e} in the middle token "
        f"(rounding: up to {bars[0]:.0e} and {bars[1]:.0e})"
    )


def _table_differs(stored: torch.Tensor | None, fresh: torch.Tensor) -> bool:
    if stored is None or any(have < want for have, want in zip(stored.shape, fresh.shape, strict=False)):
        return stored is None  # a batch wider than the table is refused where it is cut
    cut = stored[tuple(slice(size) for size in fresh.shape)].to(fresh.device)
    return not row_gap(cut.flatten(), fresh.flatten()).within(_least(fresh, None))


def _rows_at(value: Any, places: list[int], rows: int) -> Any:
    by_row = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == rows
    return value[places] if by_row else value


def _by_name(module: nn.Module, args: tuple[Any, ...]) -> list[tuple[str, Any]]:
    """Arguments that were given by their places."""
    return list(zip(inspect.signature(module.forward).parameters, args, strict=False)) if args else []


def _spans(rows: Mapping[str, Any], prefix: Prefix) -> dict[str, tuple[tuple[int, int], ...]]:
    """Where the rows' real tokens lie, for the sides of which a mask or labels tell."""
    tensors = {name: value.cpu() for name, value in rows.items() if isinstance(value, torch.Tensor)}
    spans = read_rows(tensors, with_target=TARGET in prefix.sides).spans
    if "decoder_attention_mask" not in rows and "labels" not in rows:
        spans.pop(TARGET, None)
    return spans
