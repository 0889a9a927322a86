"""Replays a frozen prefix from stored states: for the length of one forward, placeholders stand where its modules are.

A batch that carries states gets them from the placeholders, and no module of the prefix is called; a batch without
runs the whole model. State lives on the model as plain values and the hooks are functions of this module, so a deepcopy
or a pickle of the model replays as well. The model's `forward` is never assigned. What to store is `search`'s business.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_freeze.errors import CannotCache
from hf_freeze.marks import ON_TRIAL, REPLAY
from hf_freeze.prefix.casts import Casts
from hf_freeze.prefix.rows import PREFIX_KEY
from hf_freeze.prefix.states import AUTOCAST, Leaf, Prefix, Replaced, map_tree
from hf_freeze.tensors import is_sharded

__all__ = ["Replay", "replaying"]

MISSES = 10  # training batches without states before a warning
FULL_CHECK_EVERY = 64  # forwards between two looks at every module of the prefix; its known tensors are seen each time


class Placeholder(nn.Module):
    """Stands for a module of the prefix: has its attributes, returns its stored output, never calls it."""

    def __init__(self, part: Replaced, replay: Replay) -> None:
        super().__init__()
        # In a tuple, or the real module's parameters would be this one's too.
        self.__dict__["stands_for"] = (part, replay)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["stands_for"][0].module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the real module would return in this batch."""
        part, replay = self.__dict__["stands_for"]
        return replay.answer(part, args, kwargs)


class Replay:
    """Puts placeholders in and takes them out again; stands on the model as a plain attribute.

    Attributes:
        used, unused: Forwards with states, and training forwards without.
        rows_are_found: Whether a batch with states has come, be it one that was refused.
        epoch_rows: Rows that this process sees of the dataset of the build; None where it is not known.
    """

    def __init__(self, prefix: Prefix, tables: Mapping[str, torch.Tensor], digests: dict[str, str]) -> None:
        self.prefix = prefix
        self.tables = dict(tables)
        self.digests = digests
        self.used = 0
        self.unused = 0
        self.epoch_rows: int | None = None
        self.rows_are_found = False
        self._missed_rows = 0
        self._warned = False
        self.released: Any = None  # a `release.Released` once release_prefix was called
        self.spot: Any = None  # a `spot.SpotCheck` where a store's states are replayed
        self._placeholders = [(part, Placeholder(part, self)) for part in prefix.replaced]
        self.outermost: nn.Module | None = None
        self._owner: nn.Module | None = None
        self._states: dict[str, torch.Tensor] = {}
        self._sizes: dict[str, int] = {}
        self._calls: dict[str, int] = {}
        self._seen: tuple[Any, ...] = ()
        self._casts = Casts([])
        self._entries: list[nn.Module] = []
        self._handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_entries": [], "_handles": []}  # a copy of the model is not this cache's to let go

    # ------------------------------------------------------------------------------------------------ one forward

    @property
    def active(self) -> bool:
        """Whether a forward with states is going on."""
        return self._owner is not None

    def check(
        self, module: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any], states: Mapping[str, torch.Tensor]
    ) -> None:
        """Refuses a batch whose states are not what the prefix computes now, as far as that is looked at each time."""
        self.check_attention(_attention(getattr(module, "config", None)))
        self.check_weights()
        on_trial = self.outermost is not None and ON_TRIAL in self.outermost.__dict__
        away = self.released is not None and self.released.away
        if self.spot is not None and not on_trial:
            self.spot.before_batch(module, args, inputs, states, self.tables, self.used, away)

    def enter(self, owner: nn.Module, states: Mapping[str, torch.Tensor]) -> None:
        """Puts the placeholders in for one forward of `owner`."""
        if self.released is not None:
            self.released.release()
        self._owner = owner
        self._states = dict(states)
        self._calls = {}
        leaves = self.prefix.leaves("stream")
        first = next(iter(states.values()))
        self._sizes = {"rows": first.shape[0]}
        self._sizes |= {leaf.side: states[name].shape[1] for name, leaf in leaves.items() if leaf.side}
        self._sizes |= {f"rows*{side}": first.shape[0] * size for side, size in self._sizes.items() if side != "rows"}
        for part, placeholder in self._placeholders:
            for parent, key in part.slots:
                parent._modules[key] = placeholder

    def miss(self, rows: int) -> None:
        """Counts a training forward without states; warns where the first ones, or all of an epoch's, are such.

        Args:
            rows: Of the batch.
        """
        self.unused += 1
        self._missed_rows += rows
        an_epoch = self.epoch_rows is not None and self._missed_rows >= self.epoch_rows
        if self.unused >= MISSES or (an_epoch and self.unused > 1):  # one forward may be a look at the plain loss
            self.warn_of_misses()

    def warn_of_misses(self) -> None:
        """Warns, once, where every training forward so far ran the whole model."""
        if self.rows_are_found or not self.unused or self._warned:
            return
        self._warned = True
        batches = "training batch holds" if self.unused == 1 else f"{self.unused} training batches hold"
        warnings.warn(
            f"The first {batches} rows that are not in the prefix cache, and run the whole model. Give the trainer "
            "cache.collator, and the cache the rows and collator that it trains on.",
            stacklevel=1,
        )

    def leave(self) -> None:
        """Puts the real modules back."""
        for part, _ in self._placeholders:
            for parent, key in part.slots:
                parent._modules[key] = part.module
        self._casts.leave()
        self._owner = None
        self._states = {}

    def answer(self, part: Replaced, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a replaced module returns at this call."""
        call = self._calls.get(part.name, 0)
        self._calls[part.name] = call + 1
        if call >= len(part.outputs):
            raise CannotCache(
                f"A batch was trained from the prefix cache; it calls {part.name} {call + 1} times, those of "
                f"the build {len(part.outputs)} times. Train without the cache."
            )
        output = part.outputs[call]
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
        device = first.device if first is not None else next(iter(self._states.values())).device

        def fill(leaf: Any) -> Any:
            return self._tensor(leaf, first, device) if isinstance(leaf, Leaf) else leaf

        return map_tree(fill, output)

    def _tensor(self, leaf: Leaf, first: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        if leaf.kind == "stream":
            self._check_precision(device)
            if torch.is_autocast_enabled(device.type) and not torch.compiler.is_compiling():
                self._casts.enter(torch.get_autocast_dtype(device.type))
            # A copy: what stands above the cut may write into it (an in-place ReLU), and the batch may come again.
            return leaf.from_rows(self._states[leaf.name].to(device, non_blocking=True, copy=True))
        if leaf.kind == "input" and first is not None:
            return first
        shape = tuple(dim if isinstance(dim, int) else self._sizes[dim] for dim in leaf.dims)
        if leaf.kind == "table":
            table = self.tables[leaf.name]
            if table.device != device:
                table = self.tables[leaf.name] = table.to(device)
            if any(have < want for have, want in zip(table.shape, shape, strict=True)):
                raise CannotCache(
                    f"A batch of lengths {self._sizes} was trained from the prefix cache; it was built for at most "
                    f"{list(table.shape)} in {leaf.name}. Build it with the widest batch's collator."
                )
            return table[tuple(slice(size) for size in shape)]
        return torch.zeros((), dtype=leaf.dtype, device=device).expand(shape)  # nothing reads it: one number does

    # ------------------------------------------------------------------------------------------------------- checks

    def _check_precision(self, device: torch.device) -> None:
        wanted = AUTOCAST.get(self.prefix.precision or "")
        now = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        if now != wanted:
            fix = next((name for name, dtype in AUTOCAST.items() if dtype == now), "fp32")
            raise CannotCache(
                f"A batch was trained from a prefix cache built in precision={self.prefix.precision!r}; this forward "
                f"runs {f'under autocast to {now}' if now else 'without autocast'}. Build the cache with "
                f"precision={fix!r}, or train in the precision of the cache."
            )

    def check_attention(self, attention: str) -> None:
        """Refuses a model that was switched to another attention implementation since."""
        if attention != self.prefix.attention:
            raise CannotCache(
                f"A batch was trained from a prefix cache built with the attention {self.prefix.attention!r}; the "
                f"model now uses {attention!r}. Set it before PrefixCache.build."
            )

    def check_weights(self) -> None:
        """Refuses a prefix that is not the one whose states are stored: changed, replaced, or trainable again.

        Every tensor's version counter is looked at each time; where one moved, the digests decide.
        """
        for part in self.prefix.replaced:
            if any(parent._modules.get(key) is not part.module for parent, key in part.slots):
                raise CannotCache(
                    f"A batch was trained from the prefix cache; {part.name} below its cut is another module now. Call "
                    "PrefixCache.build again."
                )
            if hasattr(part.module, "neftune_noise_alpha"):
                self._seen = ()  # so that all is looked at below, where NEFTune is refused
        now = self._fingerprint()
        if now == self._seen and self.used % FULL_CHECK_EVERY:
            return
        for part in self.prefix.replaced:
            if any(hasattr(module, "neftune_noise_alpha") for module in part.module.modules()):
                raise CannotCache(
                    "The prefix cache was asked for with NEFTune, which adds noise to the embeddings at every step; "
                    "their output is then no constant. Leave neftune_noise_alpha out, or train without the cache."
                )
            for name, parameter in part.module.named_parameters():
                if parameter.requires_grad:
                    raise CannotCache(
                        f"A batch was trained from the prefix cache; {part.name}.{name} below its cut is trainable "
                        "now, so its states change at every step. Freeze it again, or build a cache for the new plan."
                    )
        if now != self._seen:
            # FSDP shards what `build` has seen whole, and a look at its state would gather and scatter it again.
            unseen = (self.released is not None and self.released.away) or any(map(is_sharded, self._watched()))
            digests = self.digests if unseen or not self.digests else self.prefix.digest()  # a trial's has none
            changed = [name for name in self.digests if digests.get(name) != self.digests[name]]
            if changed:
                raise CannotCache(
                    f"A batch was trained from the prefix cache; {len(changed)} tensors below its cut changed since it "
                    f"was built, e.g. {changed[0]}. Call PrefixCache.build again."
                )
            self._seen = self._fingerprint()

    def same_weights(self) -> bool:
        """Whether the prefix holds the tensors of the last batch. False where torch has counted a change since."""
        return self._fingerprint() == self._seen or self.prefix.digest() == self.digests

    def _fingerprint(self) -> tuple[Any, ...]:
        """What moves when a tensor of the prefix is written to, replaced or thawed."""
        return tuple((id(t), t._version, _address(t), t.requires_grad, t.shape, t.dtype) for t in self._watched())

    def _watched(self) -> list[torch.Tensor]:
        inside = [t for part in self.prefix.replaced for t in (*part.module.parameters(), *part.module.buffers())]
        around = [buffer for module in self.prefix.around for buffer in module.buffers(recurse=False)]
        return [*inside, *(tensor for _, tensor in self.prefix.beside), *around]

    # -------------------------------------------------------------------------------------------------------- hooks

    def attach(self, entries: list[nn.Module]) -> None:
        """Hooks the modules that a batch may reach first.

        PEFT calls the inner model's forward without its hooks, so the outermost module, the model inside and its
        stacks are all entries; the first that sees the states takes them.
        """
        self.outermost = entries[0]
        below = set(self.prefix.modules())
        self._casts = Casts([module for module in entries[0].modules() if module not in below])
        self._entries = list(dict.fromkeys(entries))
        for module in self._entries:
            module.__dict__[REPLAY] = self
            # Before the hooks of others: a spot check runs the model, and with it those hooks, and what they have noted
            # about this call would be gone.
            self._handles += [
                module.register_forward_pre_hook(_take_states, with_kwargs=True, prepend=True),
                module.register_forward_hook(_put_back, always_call=True),
                module.register_state_dict_pre_hook(_put_back),  # type: ignore[no-untyped-call]
            ]
            if callable(getattr(module, "generate", None)) and "generate" not in module.__dict__:
                module.__dict__["generate"] = functools.partial(_generate, module)

    def detach(self) -> bool:
        """Undoes `attach`, after a forward that the keyboard has interrupted too; says whether it was attached."""
        self.leave()
        attached, self._handles = self._handles, []
        for handle in attached:
            handle.remove()
        for module in self._entries:
            module.__dict__.pop(REPLAY, None)
            own = module.__dict__.get("generate")
            if isinstance(own, functools.partial) and own.func is _generate:
                del module.__dict__["generate"]
        return bool(attached)


@contextmanager
def replaying(model: nn.Module, prefix: Prefix, tables: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """A model that takes states for the length of a `with`: a trial of a replay, with no store behind it."""
    replay = Replay(prefix, tables, {})
    replay.attach([model])
    try:
        yield
    finally:
        replay.detach()


def _address(tensor: torch.Tensor) -> int:
    """Where a tensor's numbers lie: `p.data = other` changes nothing else. 0 for what other processes hold too."""
    return 0 if is_sharded(tensor) else tensor.data_ptr()


def _take_states(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a forward: takes the states out of the call and puts the placeholders in."""
    replay: Replay = module.__dict__[REPLAY]
    if replay.active and (module is replay.outermost or module is replay._owner):
        replay.leave()  # an interrupt from the keyboard has ended the last forward without its hooks
    if PREFIX_KEY not in kwargs:
        if not replay.active and module.training and module is replay.outermost and ON_TRIAL not in module.__dict__:
            tensors = (value for value in (*kwargs.values(), *args) if isinstance(value, torch.Tensor) and value.dim())
            replay.miss(next(tensors, torch.zeros(1)).shape[0])
        return None
    kwargs = dict(kwargs)
    states = kwargs.pop(PREFIX_KEY)
    replay.rows_are_found |= bool(states)
    if module.__dict__.get("_is_replica"):  # DataParallel's threads would take each other's places
        return args, kwargs
    config = getattr(module, "config", None)
    wants_every_state = any(
        kwargs.get(name) or getattr(config, name, False) for name in ("output_hidden_states", "output_attentions")
    )
    if states and not replay.active and not wants_every_state and kwargs.get("past_key_values") is None:
        replay.check(module, args, kwargs, states)
        replay.enter(module, states)
        replay.used += 1
        kwargs["use_cache"] = False  # a key-value cache would miss the prefix's blocks
        if not _takes(module, "use_cache"):
            del kwargs["use_cache"]
    return args, kwargs


def _put_back(module: nn.Module, *_: Any) -> None:
    """After a forward and after one that failed; before a state dict, where an interrupt left placeholders."""
    replay: Replay | None = module.__dict__.get(REPLAY)
    if replay is not None and replay._owner is module:
        replay.leave()


def _generate(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in for `generate`, which refuses keys that it does not know."""
    kwargs.pop(PREFIX_KEY, None)
    return type(module).generate(module, *args, **kwargs)


def _attention(config: Any) -> str:
    return str(getattr(config, "_attn_implementation", "") or "")


def _takes(module: nn.Module, name: str) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
