"""The prefix cache: the frozen part of a model computed once for a dataset, and training at the cost of the rest.

`PrefixCache.build` decides whether it can be exact, computes what is missing on disk, and hooks the model; its
`collator` gives batches their states. How states are found, computed, kept and replayed is the business of the
other modules of this room; this one puts them together.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_freeze.anatomy import BlocksGiven
from hf_freeze.cuts import Cut
from hf_freeze.errors import CacheDamaged, CannotCache, FreezeError
from hf_freeze.files import cache_folder
from hf_freeze.plan import FreezePlan
from hf_freeze.prefix.break_even import BreakEven, predict_saving
from hf_freeze.prefix.build import build_rows, capture, missing_batches, move, pad_states
from hf_freeze.prefix.dataset import Rows, read_dataset
from hf_freeze.prefix.key import cache_key, folder_of, nearest_key
from hf_freeze.prefix.leases import MANIFEST, clear_caches, evict_caches, remove_leftovers
from hf_freeze.prefix.memory import declining_without_memory
from hf_freeze.prefix.prepare import Prepared, prepare, refuse_moving_positions, two_sided, wider_sample
from hf_freeze.prefix.proof import check_states
from hf_freeze.prefix.release import Released
from hf_freeze.prefix.replay import Prefix, Replay, autocast
from hf_freeze.prefix.rows import PREFIX_KEY, TARGET, read_rows
from hf_freeze.prefix.spot import SpotCheck, check_stored_rows
from hf_freeze.prefix.store import Store, read_manifest, same_states
from hf_freeze.processes import agreed, from_first, pulse, rank_and_world, tell_all
from hf_freeze.tables import count_text
from hf_freeze.trial import on_trial

__all__ = ["BuildReport", "PrefixCache", "PrefixCollator", "PreparedCache"]


LOCK_SECONDS = 1.0  # of waiting for another build, before the other processes of this one are told that it goes on


@dataclass(frozen=True)
class BuildReport:
    """What `build` did.

    Attributes:
        rows: Rows of the dataset, all in the store now; `computed_rows` of them computed by this call.
        tokens: Tokens that this process computed; an image counts one for every 768 numbers, a patch of 16 x 16 x 3.
        stored_bytes: Bytes of the store on disk.
        seconds: Wall clock of the call; of `build` without what `prepare` takes.
        reasons: Why something that was there already was not used.
    """

    rows: int
    computed_rows: int
    tokens: int
    stored_bytes: int
    seconds: float
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        what = f"{self.computed_rows:,} computed" if self.computed_rows else "all there already"
        size = count_text(self.stored_bytes, "B")
        text = f"Prefix cache: {self.rows:,} rows ({what}), {self.seconds:.1f} s; all rows of its store: {size}"
        return "\n".join([text, *(f"rebuilt: {reason}" for reason in self.reasons)])


class PrefixCollator:
    """The user's collator, and the stored states of its rows where all of them are there. Pickles to workers."""

    def __init__(self, collator: Callable[[list[Any]], Any], store: Store, prefix: Prefix) -> None:
        self.collator = collator
        self.store = store
        self.sides = {name: leaf.side for name, leaf in prefix.leaves("stream").items()}
        self.with_target = TARGET in prefix.sides

    def __call__(self, features: list[Any]) -> Any:
        """A batch; with the key `prefix_states` where every row is in the store."""
        batch = self.collator(features)
        states = self.states(batch)
        if states is not None:
            batch[PREFIX_KEY] = states
        return batch

    def states(self, batch: Any) -> dict[str, torch.Tensor] | None:
        """The batch's states [rows, width, ...] by stream, or None where a row is not in the store."""
        try:
            rows = read_rows(batch, with_target=self.with_target)
        except (CannotCache, TypeError, AttributeError):
            return None  # a batch of another kind: it runs the whole model
        if any(digest not in self.store for digest in rows.digests):
            return None
        if any(side and side not in rows.spans for side in self.sides.values()):
            return None
        return pad_states([self.store.read(digest) for digest in rows.digests], self.sides, rows)


@dataclass(frozen=True)
class PreparedCache:
    """A cache that can be built, and has not been: `predict` what it saves, then `build` it or not."""

    prepared: Prepared
    chief: bool
    share: tuple[int, int]
    token_budget: int | None
    max_cache_bytes: int | None
    progress: bool

    def predict(self, *, steps: int, batch_size: int, step: Callable[[dict[str, Any]], Any] | None = None) -> BreakEven:
        """Times a few batches and the disk (32 MB are written and removed), and says what training takes either way.

        Args:
            steps: Forward and backward passes of the whole training, on this process.
            batch_size: Rows of each.
            step: Runs forward and backward of one batch; None is `model(**batch).loss.backward()`.
        """
        prefix = self.prepared.prefixes[0]
        with agreed("predict what a prefix cache saves"), declining_without_memory("run a batch of training on trial"):
            key = cache_key(self.prepared.model, prefix)  # a digest of the whole prefix
            try:
                stored = Store.open(folder_of(self.prepared.folder, key), key, prefix.streams())
            except CacheDamaged:
                stored = None
            predicted = predict_saving(
                self.prepared, stored, steps=steps, batch_size=batch_size, step=step, processes=self.share[1]
            )
            return from_first(predicted)  # timings differ, and all must decide alike

    def build(self) -> PrefixCache:
        """Computes what is missing and lets the model train from the cache. As `PrefixCache.build`."""
        started = time.perf_counter()
        prepared = self.prepared
        with _made_by_all("build the prefix cache") as made, declining_without_memory("build the prefix cache"):
            keys = [cache_key(prepared.model, prefix) for prefix in prepared.prefixes]
            known = [prepared.rows_of(prefix) for prefix in prepared.prefixes]
            _check_alike(known, keys)
            reasons: list[str] = []

            def ready() -> list[Store]:
                pairs = zip(prepared.prefixes, keys, strict=True)
                if self.chief:
                    return [_open_or_create(prepared, prefix, key, reasons) for prefix, key in pairs]
                return [Store.open(folder_of(prepared.folder, key), key, prefix.streams()) for prefix, key in pairs]

            stores, computed, tokens = _fill(
                prepared.model, prepared.prefixes, known, prepared.collator, ready, self.share, self._options
            )
            seconds = time.perf_counter() - started
            made.append(self._attach(stores[0], computed, tokens, seconds, tuple(from_first(reasons))))
        return made[0]

    def open(self) -> PrefixCache:
        """The cache as it is on disk. As `PrefixCache.open`."""
        prefix = self.prepared.prefixes[0]
        with _made_by_all("open the prefix cache") as made:
            key = cache_key(self.prepared.model, prefix)
            place = folder_of(self.prepared.folder, key)
            if not place.exists():
                raise CacheDamaged(
                    f"No prefix cache in {self.prepared.folder} was built for this model as it is. "
                    f"{nearest_key(self.prepared.folder, key)}Use PrefixCache.build."
                )
            store = Store.open(place, key, prefix.streams())
            rows = self.prepared.rows_of(prefix)
            if missing := [row for row, digest in enumerate(rows.digests) if digest not in store]:
                raise CacheDamaged(
                    f"The prefix cache {place} lacks {len(missing)} of {len(rows)} rows, e.g. row {missing[0]}: they "
                    "were added since, or tokenized otherwise. PrefixCache.build computes them."
                )
            made.append(self._attach(store, 0, 0, 0.0, ()))
        return made[0]

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "token_budget": self.token_budget,
            "folder": self.prepared.folder,
            "progress": self.progress,
            "max_cache_bytes": self.max_cache_bytes,
        }

    def _attach(
        self, store: Store, computed: int, tokens: int, seconds: float, reasons: tuple[str, ...]
    ) -> PrefixCache:
        prepared = self.prepared
        rows = prepared.rows_of(prepared.prefixes[0])
        report = BuildReport(len(rows), computed, tokens, store.stored_bytes, seconds, reasons)
        cache = PrefixCache._attach(prepared, store, report, self._options)
        cache._replay.epoch_rows = -(-len(rows) // self.share[1])
        return cache


@dataclass
class PrefixCache:
    """A frozen prefix's states on disk, and the model that is trained from them. Made by `build` or `open`.

    Attributes:
        report: What the last `build` or `add` did.
        cuts: What is cached.
        collator: Give it to Trainer, or to any DataLoader, instead of your own.
    """

    model: nn.Module = field(repr=False)
    prefix: Prefix = field(repr=False)
    store: Store = field(repr=False)
    collator: PrefixCollator = field(repr=False)
    report: BuildReport
    _replay: Replay = field(repr=False)
    _entries: list[nn.Module] = field(repr=False)
    _handles: list[Any] = field(repr=False)
    _options: dict[str, Any] = field(repr=False)
    _rows: Rows = field(repr=False)
    _released: Released | None = field(default=None, repr=False)

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """What is cached, as in the freeze report."""
        return tuple(Cut(*cut) for cut in self.prefix.cuts)

    @property
    def batches_used(self) -> int:
        """Forwards that ran from the cache."""
        return self._replay.used

    @property
    def batches_unused(self) -> int:
        """Training forwards that ran the whole model, because a row was not in the cache."""
        return self._replay.unused

    @classmethod
    def build(
        cls,
        model: nn.Module,
        dataset: Any,
        data_collator: Callable[[list[Any]], Any] | None = None,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        precision: str | None = None,
        also: Sequence[FreezePlan] = (),
        token_budget: int | None = None,
        max_cache_bytes: int | None = None,
        blocks: BlocksGiven | None = None,
        progress: bool = True,
    ) -> PrefixCache:
        """Computes the frozen prefix of every row once, or takes it from disk, and lets the model train from it.

        Call it after `freeze` and before the model is wrapped by Trainer, DDP or FSDP. The model gets forward hooks
        and keeps its weights and modes. Rows are found by content, so any order, subset or shuffle of the dataset
        works, and a second run, another learning rate or a dataset with some rows more computes only what is missing.
        Under a launcher every process calls it, and each computes its share.

        Args:
            model: What a training step calls; frozen by `freeze`, on the device where it trains.
            dataset: Rows with __len__ and __getitem__, as Trainer takes them.
            data_collator: The one that training uses; None is transformers' default_data_collator.
            cache_dir: Where the store lives, in a folder of its own for each prefix; None is
                `~/.cache/hf_freeze/prefix`, moved by HF_FREEZE_CACHE. On several machines it must be on a shared disk.
            precision: Of training: "bf16" or "fp16" for autocast (Trainer's `bf16=True`), "fp32" or None for none.
            also: Plans that freeze less of the same model: their states are taken in the same pass, for a later
                `build` under such a plan (gradual unfreezing, a sweep of depths).
            token_budget: Padded tokens of one batch of the pass; None is 2,048 on a CPU, 32,768 elsewhere. An image
                counts one for every 768 numbers: 196 at 224 x 224 x 3.
            max_cache_bytes: Older caches in `cache_dir` are removed, least recently used first, until all fit.
            blocks: As given to `freeze`.
            progress: Show bars with the time left, on the first process.

        Returns:
            The cache; `print(cache.report)` says what was computed.

        Raises:
            CannotCache: The prefix cannot be replayed exactly; the message says why.
            FreezeError: The disk is too small or cannot be written.

        Example:
            >>> import tempfile
            >>> from transformers import GPT2Config, GPT2LMHeadModel
            >>> from hf_freeze import FreezePlan, freeze
            >>> model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=8, n_head=2, vocab_size=16, n_positions=16))
            >>> _ = freeze(model, FreezePlan(decoder_blocks=3))
            >>> rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids),
            ...     "attention_mask": torch.ones(4).long()} for ids in ([1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 8, 9])]
            >>> cache = PrefixCache.build(model, rows, cache_dir=tempfile.mkdtemp(), progress=False)
            >>> batch = cache.collator(rows[:2])
            >>> batch["prefix_states"]["transformer.h.2:0:0"].shape, model(**batch).loss.requires_grad
            (torch.Size([2, 4, 8]), True)
        """
        return cls.prepare(
            model,
            dataset,
            data_collator,
            cache_dir=cache_dir,
            precision=precision,
            also=also,
            token_budget=token_budget,
            max_cache_bytes=max_cache_bytes,
            blocks=blocks,
            progress=progress,
        ).build()

    @classmethod
    def open(cls, model: nn.Module, dataset: Any, *rest: Any, **named: Any) -> PrefixCache:
        """A cache that is there already, for a run that must compute nothing. Arguments as of `build`.

        Raises:
            CacheDamaged: There is none for this model, precision and version, it is damaged, or it lacks rows of the
                dataset; the message says which.
        """
        return cls.prepare(model, dataset, *rest, **named).open()

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        dataset: Any,
        data_collator: Callable[[list[Any]], Any] | None = None,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        precision: str | None = None,
        also: Sequence[FreezePlan] = (),
        token_budget: int | None = None,
        max_cache_bytes: int | None = None,
        blocks: BlocksGiven | None = None,
        progress: bool = True,
    ) -> PreparedCache:
        """The first half of `build`: everything is decided and proved, nothing is written or hooked.

        Arguments and errors are those of `build`. `predict` of what it returns says whether building pays.
        """
        share = rank_and_world()
        chief = share[0] == 0
        progress = progress and chief
        with agreed("prepare a prefix cache"), declining_without_memory("prove the prefix on a few rows"):
            prepared = prepare(
                model,
                dataset,
                data_collator.collator if isinstance(data_collator, PrefixCollator) else data_collator,
                cache_dir=cache_dir,
                precision=precision,
                also=also,
                blocks=blocks,
                progress=progress,
            )
        return PreparedCache(prepared, chief, share, token_budget, max_cache_bytes, progress)

    @classmethod
    def _attach(cls, prepared: Prepared, store: Store, report: BuildReport, options: dict[str, Any]) -> PrefixCache:
        prefix, core = prepared.prefixes[0], prepared.model
        collator = PrefixCollator(prepared.collator, store, prefix)
        rows = prepared.rows_of(prefix)
        if PREFIX_KEY not in collator([rows.features[row] for row in prepared.sample]):
            raise CannotCache(
                f"The states of this {prepared.anatomy.model_class} were computed, but a batch does not find them "
                "again: its rows have other lengths than their tokens."
            )
        replay = Replay(prefix, store.load_tables(prefix.tables(), rows.longest()), prefix.digest())
        bars = check_stored_rows(core, prefix, store, replay.tables, rows, wider_sample(rows), prepared.collator)
        replay.spot = SpotCheck(prefix, bars, len(rows) // rank_and_world()[1], next(core.parameters()).device)
        inner = [core.get_base_model()] if hasattr(core, "get_base_model") else []
        entries = list(dict.fromkeys([core, *inner, *(stack.root for stack in prepared.anatomy.stacks)]))
        return cls(core, prefix, store, collator, report, replay, entries, replay.attach(entries), options, rows)

    def add(self, dataset: Any, data_collator: Callable[[list[Any]], Any] | None = None) -> BuildReport:
        """Adds the rows of another dataset, such as the validation rows, to the cache.

        Args:
            data_collator: Where it is not the one of `build`.

        Raises:
            CannotCache: As `build`; or the prefix's weights changed since.
        """
        started = time.perf_counter()
        collator = data_collator or self.collator.collator
        share = rank_and_world()
        chief = share[0] == 0
        progress = self._options["progress"] and chief
        with agreed("add rows to the prefix cache"), declining_without_memory("add rows to the prefix cache"):
            self._replay.check_weights()
            self.restore_prefix()
            two = two_sided(self.prefix.cuts)
            rows = read_dataset(dataset, collator, self.model, with_target=two, progress=progress)
            refuse_moving_positions(self.model, rows)
            check_states(self.model, self.prefix, rows, wider_sample(rows), collator)
            _check_alike([rows])
            reasons: list[str] = []

            def ready() -> list[Store]:
                self.store.refresh()
                if chief:
                    _save_tables(self.model, self.prefix, self.store, rows, collator, reasons)
                return [self.store]

            _, computed, tokens = _fill(self.model, [self.prefix], [rows], collator, ready, share, self._options)
            tables = self.store.load_tables(self.prefix.tables(), rows.longest())
            reasons = from_first(reasons)
            check_stored_rows(self.model, self.prefix, self.store, tables, rows, wider_sample(rows), collator)
        self._replay.tables = tables
        seconds = time.perf_counter() - started
        self.report = BuildReport(len(rows), computed, tokens, self.store.stored_bytes, seconds, tuple(reasons))
        return self.report

    def release_prefix(self) -> int:
        """Lets the prefix's weights leave the device at the next forward from the cache; returns the bytes that go.

        On an accelerator they go to the host's memory, on a CPU to a file beside the store. `state_dict`,
        `load_state_dict`, any forward that needs them and `verify_frozen` bring them back by themselves, the same
        bits. A tensor that is also used above the cut, such as an embedding tied to the head, stays.
        """
        if self._released is None:
            self._released = Released(self.model, self.prefix, self._replay, self.store.folder)
        return self._released.arm()

    def restore_prefix(self) -> None:
        """Brings released weights back, the same bits; does nothing where none were released."""
        if self._released is not None:
            self._released.restore()

    def close(self) -> None:
        """Takes the hooks off the model and brings its prefix back. The store stays on disk for the next run.

        Raises:
            CannotCache: The last batches were trained from states that the model does not compute any more.
        """
        if self._released is not None:
            self._released.close()
            self._released = None
        attached = bool(self._handles)
        self._replay.detach(self._entries, self._handles)
        self._handles = []
        try:
            # Not where an error is on its way out already: it is the one to be seen.
            spot = self._replay.spot
            open_end = attached and spot.is_open(self._replay.used) and not spot.is_sharded()
            if open_end and sys.exc_info()[0] is None and self._replay.same_weights():
                spot.at_the_end(self.model, self.store, self._rows, self.collator.collator, self._replay.used)
        finally:
            self.store.close()
        self._replay.warn_of_misses()

    @staticmethod
    def is_there(model: Any, cuts: Sequence[tuple[str, int]], cache_dir: str | os.PathLike[str] | None = None) -> bool:
        """Whether a cache of a model with this name and cuts lies in a folder, perhaps with the rows that are wanted.

        The manifests alone tell, in a moment: no weight is looked at, and nothing is proved.

        Args:
            model: For its name; it need not be frozen.
            cuts: As in the freeze report.
            cache_dir: As for `build`.
        """
        for path in (Path(cache_dir) if cache_dir is not None else cache_folder() / "prefix").glob(f"*/{MANIFEST}"):
            with suppress(FreezeError):  # of another version, or damaged: as good as none
                key, _, name = read_manifest(path.parent)
                if name == _name(model) and key.get("cuts") == [list(cut) for cut in cuts]:
                    return True
        return False

    @staticmethod
    def clear(cache_dir: str | os.PathLike[str]) -> int:
        """Removes every prefix cache in a folder that nobody uses, and nothing else; returns the bytes freed."""
        return clear_caches(cache_dir)


# --------------------------------------------------------------------------------------------------------------- store


def _fill(
    model: nn.Module,
    prefixes: Sequence[Prefix],
    known: Sequence[Rows],
    collator: Callable[[list[Any]], Any],
    ready: Callable[[], list[Store]],
    share: tuple[int, int],
    options: Mapping[str, Any],
) -> tuple[list[Store], int, int]:
    """Computes what the stores lack, each process its share of what the first one found missing.

    Args:
        known: The rows as each prefix knows them.
        ready: Makes the stores ready: in the first process before anything is decided, in the others afterwards.
        share: (this process, processes).
        options: As of `PreparedCache`.

    Returns:
        The stores with all rows, how many rows were computed in all processes, and the tokens computed in this one.
    """
    rank, world = share
    with (
        _one_builder(options["folder"], rank == 0, options["progress"]),
        agreed("compute the prefix"),  # the lock is kept until the last process has written
    ):
        stores = ready() if rank == 0 else []
        decided: tuple[list[list[list[int]]], int] | None = None
        if rank == 0:
            pairs = list(zip(stores, known, strict=True))
            _check_disk(options["folder"], pairs, options["max_cache_bytes"])
            device = next(model.parameters()).device
            batches = missing_batches(pairs, device, options["token_budget"])
            lacking = sum(digest not in stores[0] for digest in set(known[0].digests))
            decided = [batches[number::world] for number in range(world)], lacking
        shares, computed = from_first(decided) or ([], 0)
        stores = stores or ready()
        tokens = build_rows(
            model,
            list(zip(prefixes, stores, known, strict=True)),
            collator,
            shares[rank],
            progress=options["progress"],
        )
    for store in stores:
        store.refresh()
    return stores, computed, tokens


def _check_alike(known: Sequence[Rows], keys: Sequence[Mapping[str, Any]] = ()) -> None:
    """Refuses processes that would build for unlike models or from unlike rows."""
    rows = [(len(each), hashlib.sha256(b"".join(each.digests)).hexdigest()) for each in known]
    for rank, (other_rows, other_keys) in enumerate(told := tell_all((rows, list(keys)))):
        first_rows, first_keys = told[0]
        if differing := [name for one, other in zip(first_keys, other_keys, strict=True) for name in {**one, **other}
                         if one.get(name) != other.get(name)]:  # fmt: skip
            raise CannotCache(
                f"The model of rank {rank} is another one than that of rank 0: the {differing[0]} of the frozen prefix "
                "differ. Load the same weights with the same settings on every rank, or set one seed before they are "
                "drawn."
            )
        if other_rows != first_rows:
            raise CannotCache(
                f"Rank {rank} gave the prefix cache other rows ({other_rows[0][0]:,}) than rank 0 "
                f"({first_rows[0][0]:,}): each computes a share of all. Give every rank the whole dataset, in the same "
                "order and with the same collator."
            )


def _open_or_create(prepared: Prepared, prefix: Prefix, key: dict[str, Any], reasons: list[str]) -> Store:
    """The prefix's store, mended or made anew; adds why, where it was not as it should be. For one process only."""
    place = folder_of(prepared.folder, key)
    remove_leftovers(place)
    try:
        store = Store.open(place, key, prefix.streams(), mend=reasons)
    except CacheDamaged as damage:
        if place.exists():
            reasons.append(str(damage))
        store = Store.create(place, key, prefix.streams(), _name(prepared.model), mend=reasons)
    _save_tables(prepared.model, prefix, store, prepared.rows_of(prefix), prepared.collator, reasons)
    return store


def _name(core: Any) -> str:
    """What people call a model: where it was loaded from, else its class."""
    source = str(getattr(getattr(core, "config", None), "_name_or_path", "") or "")
    return source or type(core).__name__


def _save_tables(
    core: nn.Module,
    prefix: Prefix,
    store: Store,
    rows: Rows,
    collator: Callable[[list[Any]], Any],
    reasons: list[str],
) -> None:
    """What is the same for all rows, at the greatest width that a batch of these rows can have.

    What is stored for wider rows stays, where it agrees with what the model computes now.
    """
    if not (specs := prefix.tables()):
        return
    widest = [max(range(len(rows)), key=lambda row: rows.lengths[row].get(side, 0)) for side in prefix.sides]
    batch = move(collator([rows.features[row] for row in widest]), next(core.parameters()).device)
    with on_trial(core, training=False), autocast(prefix.precision, next(core.parameters()).device):
        found = capture(core, prefix, batch)
    tables = {spec.name: found[spec.name].cpu() for spec in specs}
    stored: dict[str, torch.Tensor] = {}
    try:
        stored = store.load_tables(specs, {})
    except CacheDamaged as damage:
        if len(store):  # else there were none yet
            reasons.append(str(damage))
    kept = {}
    for name, old in stored.items():
        new = tables[name]
        both = tuple(slice(min(sizes)) for sizes in zip(old.shape, new.shape, strict=True))
        if not same_states(old[both], new[both], low=prefix.precision not in (None, "fp32")):
            reasons.append(f"The stored {name} is not what the model computes.")
        elif all(have >= wanted for have, wanted in zip(old.shape, new.shape, strict=True)):
            kept[name] = old
        elif any(have > wanted for have, wanted in zip(old.shape, new.shape, strict=True)):
            raise CannotCache(
                f"The prefix cache holds {name} for lengths {list(old.shape)} and was asked for {list(new.shape)}, "
                "wider and narrower at once. Build it from all rows in one call."
            )
    if len(kept) < len(tables):
        store.save_tables(tables | kept)


def _check_disk(folder: Path, jobs: Sequence[tuple[Store, Rows]], limit: int | None) -> None:
    """Frees room under the limit, and refuses before the first byte what will not fit."""
    needed = 0
    for store, rows in jobs:
        for row in {digest: row for row, digest in enumerate(rows.digests) if digest not in store}.values():
            needed += sum(spec.token_bytes * rows.lengths[row].get(spec.side, 1) for spec in store.specs)
    if limit is not None:
        there = sum(store.stored_bytes for store, _ in jobs)
        if needed + there > limit:
            raise FreezeError(
                f"The prefix cache needs {needed / 1e9:.2f} GB; max_cache_bytes allows {limit / 1e9:.2f} GB. Raise it, "
                "or train without the cache."
            )
        evict_caches(folder, limit, [store.folder for store, _ in jobs], needed)
    free = shutil.disk_usage(folder).free
    if needed * 1.02 > free:
        raise FreezeError(
            f"The prefix cache needs {needed / 1e9:.2f} GB in {folder}; {free / 1e9:.2f} GB are free. Free space, give "
            "another cache_dir, or train without the cache."
        )


# ----------------------------------------------------------------------------------------------------------- processes


@contextmanager
def _made_by_all(what: str) -> Iterator[list[PrefixCache]]:
    """Takes the cache that is made inside; lets the model go again where another process could not make its own."""
    made: list[PrefixCache] = []
    try:
        with agreed(what):
            yield made
    except BaseException:
        for cache in made:
            cache.close()
        raise


@contextmanager
def _one_builder(folder: Path, chief: bool, progress: bool) -> Iterator[None]:
    """Lets one build at a time write into a cache folder: the second one waits, then finds the rows there."""
    if not chief:
        yield
        return
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "build.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if progress:
                print(f"Another process builds in {folder}: waiting for it.", file=sys.stderr)
            while not lock.is_locked:
                pulse()
                with suppress(Timeout):
                    lock.acquire(timeout=LOCK_SECONDS)
    except OSError as error:
        raise FreezeError(
            f"The prefix cache was to be kept in {folder}; it cannot be written: {error}. Give a cache_dir that can."
        ) from error
    try:
        yield
    finally:
        lock.release()
