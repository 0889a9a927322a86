"""The prefix cache: the frozen part of a model computed once for a dataset, and training at the cost of the rest.

A cache's life: `prepare` decides whether it can be exact; `build` computes what is missing on disk, or `open` takes
what is there; then it is attached to the model, and its `collator` gives batches their states; `close` lets the model
go. How states are computed, kept and replayed is the business of the other modules of this room.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_freeze.anatomy import BlocksGiven
from hf_freeze.cuts import Cut
from hf_freeze.errors import CacheDamaged, CannotCache, FreezeError
from hf_freeze.plan import FreezePlan
from hf_freeze.prefix.build import check_alike, fill, model_name, open_or_create, save_tables
from hf_freeze.prefix.folder import caches_folder, clear_caches, known_caches
from hf_freeze.prefix.key import cache_key, folder_of, nearest_key
from hf_freeze.prefix.memory import declining_without_memory
from hf_freeze.prefix.prepare import Prepared, refuse_moving_positions, wider_sample
from hf_freeze.prefix.proof import check_states
from hf_freeze.prefix.release import Released
from hf_freeze.prefix.replay import Replay
from hf_freeze.prefix.rows import PREFIX_KEY, Collator, read_dataset, read_rows
from hf_freeze.prefix.saving import BreakEven, predict_saving
from hf_freeze.prefix.spot import SpotCheck, check_stored_rows
from hf_freeze.prefix.states import Prefix, device_of, pad_states
from hf_freeze.prefix.store import Store
from hf_freeze.processes import agreed, from_first, rank_and_world
from hf_freeze.tables import count_text

__all__ = ["BuildReport", "PrefixCache", "PrefixCollator", "PreparedCache"]


@dataclass(frozen=True)
class BuildReport:
    """What `build` or `add` did.

    Attributes:
        rows: Rows of the dataset, all in the store now; `computed_rows` of them computed by this call.
        tokens: Tokens that this process computed; an image counts one for every 768 numbers, a patch of 16 x 16 x 3.
        stored_bytes: Bytes of the store on disk.
        seconds: Wall clock of the call; of `PrefixCache.build` its second half, after `prepare`.
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

    def __init__(self, collator: Collator, store: Store, prefix: Prefix) -> None:
        self.collator = collator
        self.store = store
        self.sides = prefix.stream_sides()
        self.with_target = prefix.with_target

    def __call__(self, features: list[Any]) -> Any:
        """A batch; with the key `prefix_states` where every row is in the store."""
        batch: Any = self.collator(features)
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


class PreparedCache(Prepared):
    """A cache that can be built, and has not been: `predict` what it saves, then `build` it or not."""

    def predict(self, *, steps: int, batch_size: int, step: Callable[[dict[str, Any]], Any] | None = None) -> BreakEven:
        """Times a few batches and the disk (32 MB are written and removed), and says what training takes either way.

        Args:
            steps: Forward and backward passes of the whole training, on this process.
            batch_size: Rows of each.
            step: Runs forward and backward of one batch; None is `model(**batch).loss.backward()`.
        """
        prefix = self.prefixes[0]
        with agreed("predict what a prefix cache saves"), declining_without_memory("run a batch of training on trial"):
            key = cache_key(self.model, prefix, prefix.digest())
            try:
                stored = Store.open(folder_of(self.folder, key), key, prefix.streams())
            except CacheDamaged:
                stored = None
            processes = rank_and_world()[1]
            predicted = predict_saving(self, stored, steps=steps, batch_size=batch_size, step=step, processes=processes)
            return from_first(predicted)  # timings differ, and all must decide alike

    def build(self) -> PrefixCache:
        """Computes what is missing and lets the model train from the cache. As `PrefixCache.build`."""
        started = time.perf_counter()
        with _made_by_all("build the prefix cache") as made, declining_without_memory("build the prefix cache"):
            digests = [prefix.digest() for prefix in self.prefixes]
            keys = [cache_key(self.model, *digested) for digested in zip(self.prefixes, digests, strict=True)]
            rows = [self.rows_of(prefix) for prefix in self.prefixes]
            check_alike(rows, keys)
            reasons: list[str] = []

            def ready() -> list[Store]:
                pairs = zip(self.prefixes, keys, strict=True)
                if rank_and_world()[0] == 0:
                    return [open_or_create(self, prefix, key, reasons) for prefix, key in pairs]
                return [Store.open(folder_of(self.folder, key), key, prefix.streams()) for prefix, key in pairs]

            with_rows = list(zip(self.prefixes, rows, strict=True))
            stores, computed, tokens = fill(self, with_rows, self.collator, ready)
            seconds, size = time.perf_counter() - started, stores[0].stored_bytes
            report = BuildReport(len(rows[0]), computed, tokens, size, seconds, tuple(from_first(reasons)))
            made.append(PrefixCache(self, self.prefixes[0], stores[0], digests[0], report))
        return made[0]

    def open(self, cuts: Sequence[tuple[str, int]] | None = None) -> PrefixCache:
        """The cache as it is on disk. As `PrefixCache.open`.

        Args:
            cuts: Those of a shallower plan that was given as `also`, where the model is frozen so now.
        """
        prefix = self.prefixes[0] if cuts is None else self._prefix_of(cuts)
        with _made_by_all("open the prefix cache") as made:
            digests = prefix.digest()
            key = cache_key(self.model, prefix, digests)
            folder = folder_of(self.folder, key)
            if not folder.exists():
                raise CacheDamaged(
                    f"No prefix cache in {self.folder} was built for this model as it is. "
                    f"{nearest_key(self.folder, key)}Use PrefixCache.build."
                )
            store = Store.open(folder, key, prefix.streams())
            rows = self.rows_of(prefix)
            if missing := [row for row, digest in enumerate(rows.digests) if digest not in store]:
                raise CacheDamaged(
                    f"The prefix cache {folder} lacks {len(missing)} of {len(rows)} rows, e.g. row {missing[0]}: they "
                    "were added since, or tokenized otherwise. PrefixCache.build computes them."
                )
            report = BuildReport(len(rows), 0, 0, store.stored_bytes, 0.0)
            made.append(PrefixCache(self, prefix, store, digests, report))
        return made[0]

    def _prefix_of(self, cuts: Sequence[tuple[str, int]]) -> Prefix:
        by_cuts = {tuple(map(tuple, prefix.cuts)): prefix for prefix in self.prefixes}
        wanted = tuple(map(tuple, cuts))
        if wanted not in by_cuts:
            raise FreezeError(
                f"A prepared prefix cache was to be opened at the cuts {wanted}; it was prepared for "
                f"{', '.join(map(str, by_cuts))}. Ask for one of them, or give the plan as also= to prepare."
            )
        return by_cuts[wanted]


class PrefixCache:
    """A frozen prefix's states on disk, and the model that is trained from them. Made by `build` or `open`.

    Attributes:
        report: What `build` did; `add` returns its own.
        collator: Give it to Trainer, or to any DataLoader, instead of your own.
    """

    def __init__(
        self, prepared: Prepared, prefix: Prefix, store: Store, digests: dict[str, str], report: BuildReport
    ) -> None:
        """Attaches a filled store to the model. Use `build` or `open`."""
        self.prepared = prepared
        self.model: nn.Module = prepared.model
        self.prefix = prefix
        self.store = store
        self.report = report
        self.collator = PrefixCollator(prepared.collator, store, prefix)
        self._rows = prepared.rows_of(prefix)
        self._released: Released | None = None
        self._replay = Replay(prefix, store.load_tables(prefix.tables(), self._rows.longest()), digests)
        self._attach()

    def __repr__(self) -> str:
        return f"PrefixCache({self.report!r})"

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
        data_collator: Collator | None = None,
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
        cls, model: nn.Module, dataset: Any, data_collator: Collator | None = None, **named: Any
    ) -> PreparedCache:
        """The first half of `build`: everything is decided and proved, nothing is written or hooked.

        Arguments and errors are those of `build`. `predict` of what it returns says whether building pays.
        """
        collator = data_collator.collator if isinstance(data_collator, PrefixCollator) else data_collator
        with agreed("prepare a prefix cache"), declining_without_memory("prove the prefix on a few rows"):
            return PreparedCache.decide(model, dataset, collator, **named)

    def _attach(self) -> None:
        """Sees that a batch finds its states and that they are what the model computes, and hooks the model."""
        model: Any = self.model
        rows, collator = self._rows, self.prepared.collator
        if PREFIX_KEY not in self.collator([rows.features[row] for row in self.prepared.sample]):
            raise CannotCache(
                f"The states of this {self.prepared.anatomy.model_class} were computed, but a batch does not find them "
                "again: its rows have other lengths than their tokens."
            )
        replay, processes = self._replay, rank_and_world()[1]
        bars = check_stored_rows(model, self.prefix, self.store, replay.tables, rows, wider_sample(rows), collator)
        replay.spot = SpotCheck(self.prefix, bars, len(rows) // processes, device_of(model))
        replay.epoch_rows = -(-len(rows) // processes)
        inner = [model.get_base_model()] if hasattr(model, "get_base_model") else []
        replay.attach([model, *inner, *(stack.root for stack in self.prepared.anatomy.stacks)])

    def add(self, dataset: Any, data_collator: Collator | None = None) -> BuildReport:
        """Adds the rows of another dataset, such as the validation rows, to the cache; `report` stays the build's.

        Args:
            dataset: As in `build`.
            data_collator: Where it is not the one of `build`.

        Raises:
            CannotCache: As `build`; or the prefix's weights changed since.
        """
        started = time.perf_counter()
        collator = data_collator or self.collator.collator
        model, prefix, store = self.model, self.prefix, self.store
        with agreed("add rows to the prefix cache"), declining_without_memory("add rows to the prefix cache"):
            self._replay.check_weights()
            self.restore_prefix()
            known = read_dataset(
                dataset, collator, model, with_targets=[prefix.with_target], progress=self.prepared.progress
            )
            rows = known[prefix.with_target]
            refuse_moving_positions(model, rows)
            check_states(model, prefix, rows, wider_sample(rows), collator)
            check_alike([rows])
            reasons: list[str] = []

            def ready() -> list[Store]:
                store.refresh()
                if rank_and_world()[0] == 0:
                    save_tables(model, prefix, store, rows, collator, reasons)
                return [store]

            _, computed, tokens = fill(self.prepared, [(prefix, rows)], collator, ready)
            tables = store.load_tables(prefix.tables(), rows.longest())
            reasons = from_first(reasons)
            check_stored_rows(model, prefix, store, tables, rows, wider_sample(rows), collator)
        self._replay.tables = tables
        seconds = time.perf_counter() - started
        return BuildReport(len(rows), computed, tokens, store.stored_bytes, seconds, tuple(reasons))

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
        replay, spot = self._replay, self._replay.spot
        attached = replay.detach()
        try:
            # Not where an error is on its way out already: it is the one to be seen.
            unseen = attached and spot.is_open(replay.used) and not spot.is_sharded()
            if unseen and sys.exc_info()[0] is None and replay.same_weights():
                spot.at_the_end(self.model, self.store, self._rows, self.collator.collator, replay.used)
        finally:
            self.store.close()
        replay.warn_of_misses()

    @staticmethod
    def is_there(model: Any, cuts: Sequence[tuple[str, int]], cache_dir: str | os.PathLike[str] | None = None) -> bool:
        """Whether a cache of a model with this name and cuts lies in a folder, perhaps with the rows that are wanted.

        The manifests alone tell, in a moment: no weight is looked at, and nothing is proved.

        Args:
            model: For its name; it need not be frozen.
            cuts: As in the freeze report.
            cache_dir: As for `build`.
        """
        folder = caches_folder(cache_dir)
        wanted = (model_name(model), [list(cut) for cut in cuts])
        return any((name, key.get("cuts")) == wanted for key, name in known_caches(folder))

    @staticmethod
    def clear(cache_dir: str | os.PathLike[str]) -> int:
        """Removes every prefix cache in a folder that nobody uses, and nothing else; returns the bytes freed."""
        return clear_caches(cache_dir)


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
