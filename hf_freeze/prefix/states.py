"""States of a frozen prefix: which tensors cross its cut, how a run of the model gives them, rows of them as batches.

A `Prefix` says which modules a cut makes superfluous and which of their outputs are needed above it: its leaves. What
is needed is found by `search`, kept by the store, handed on by `replay`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from hf_freeze.errors import CannotCache
from hf_freeze.exactness import row_gap
from hf_freeze.prefix.files import Place
from hf_freeze.prefix.rows import TARGET, BatchRows, Collator, collate, read_rows
from hf_freeze.tensors import tensor_digest
from hf_freeze.trial import on_trial

__all__ = [
    "AUTOCAST", "Leaf", "Prefix", "Replaced", "StreamSpec", "TableSpec", "autocast", "bytes_of_row", "capture",
    "device_of", "map_tree", "move", "pad_states", "running", "same_states", "split_rows", "states_alone", "states_of",
    "tensors_in",
]  # fmt: skip

# Relative: two computations of a row differ by rounding; another row's states, or another model's, by more.
SAME_ROW, SAME_ROW_LOW = 2e-3, 0.05
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

Dim = int | str  # a size, or "rows", "source", "target", "rows*source", "rows*target"


# ----------------------------------------------------------------------------------------------------------- on disk


@dataclass(frozen=True)
class StreamSpec:
    """One tensor that crosses the cut, as a store keeps it.

    Attributes:
        name: Unique in the store.
        side: Whose tokens its length follows: "source", "target", or "" for one entry a row.
        dtype: As torch names it, e.g. "bfloat16".
        shape: Shape of one token's entry.
    """

    name: str
    side: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's entry."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return math.prod(self.shape) * dtype.itemsize


def bytes_of_row(streams: Iterable[StreamSpec], lengths: Mapping[str, int]) -> int:
    """Bytes of a row with so many tokens on each side."""
    return sum(spec.token_bytes * lengths.get(spec.side, 1) for spec in streams)


@dataclass(frozen=True)
class TableSpec:
    """A tensor that is the same for every row, such as T5's position bias, and wide enough for the widest batch.

    Attributes:
        dims: Its shape; a size that follows the tokens of a side bears the side's name.
    """

    name: str
    dtype: torch.dtype
    dims: tuple[int | str, ...]

    def fits(self, place: Place, tokens: Mapping[str, int]) -> bool:
        """Whether a stored tensor is such a one, wide enough for so many tokens of each side."""
        if place.dtype != self.dtype or len(place.shape) != len(self.dims):
            return False
        sizes: dict[str, int] = {}
        return all(
            size == dim if isinstance(dim, int) else size >= tokens.get(dim, 1) and size == sizes.setdefault(dim, size)
            for size, dim in zip(place.shape, self.dims, strict=True)
        )


# ---------------------------------------------------------------------------------------------------------- in a model


@dataclass(frozen=True)
class Leaf:
    """One tensor in what a replaced module returns.

    Attributes:
        kind: "stream" is read from the store; "table" is the same for all rows and cut to the batch's lengths;
            "input" hands on the module's own first input; "zeros" is needed by nothing but for its shape.
        name: Of the stream or table.
        dims: The tensor's shape, with the batch's sizes by name.
    """

    kind: Literal["stream", "table", "input", "zeros"]
    name: str
    dims: tuple[Dim, ...]
    dtype: torch.dtype

    @property
    def side(self) -> str:
        """The side whose length it follows, "" for none."""
        return next((dim for dim in ("source", "target") if dim in self.dims), "")

    def spec(self) -> StreamSpec:
        """How the store keeps it: rows and tokens first."""
        rest = tuple(dim for dim in self.dims if isinstance(dim, int))
        return StreamSpec(self.name, self.side, str(self.dtype).removeprefix("torch."), rest)

    def to_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """From the module's layout to [rows, tokens, ...]."""
        return tensor.movedim(self._axes, list(range(len(self._axes))))

    def from_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """From [rows, tokens, ...] to the module's layout."""
        return tensor.movedim(list(range(len(self._axes))), self._axes)

    @property
    def _axes(self) -> list[int]:
        return [self.dims.index(dim) for dim in ("rows", self.side) if dim]


@dataclass(frozen=True)
class Replaced:
    """A module of the prefix: where it stands, and what each of its calls in one forward returns, tensors as leaves."""

    name: str
    module: nn.Module = field(repr=False, compare=False)
    slots: tuple[tuple[nn.Module, str], ...] = field(repr=False, compare=False)
    outputs: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Prefix:
    """What of a model is replaced, for which cuts, and in which precision its states are computed.

    Attributes:
        beside: Frozen tensors that the states depend on and that stay in use, by name: a learnt scale before the first
            block, an embedding that is also called above the cut.
        around: Modules that decide about the states and are not replaced: the stacks themselves, rotary tables.
    """

    cuts: tuple[tuple[str, int], ...]
    replaced: tuple[Replaced, ...]
    precision: str | None
    attention: str
    sides: tuple[str, ...]
    beside: tuple[tuple[str, torch.Tensor], ...] = field(default=(), repr=False, compare=False)
    around: tuple[nn.Module, ...] = field(default=(), repr=False, compare=False)

    @property
    def with_target(self) -> bool:
        """Whether a part of the decoder above an encoder is cached, so that the decoder's input counts."""
        return TARGET in self.sides

    def leaves(self, kind: str) -> dict[str, Leaf]:
        """The leaves of a kind by name, in the order in which the model makes them."""
        leaves: dict[str, Leaf] = {}

        def look(leaf: Any) -> None:
            if isinstance(leaf, Leaf) and leaf.kind == kind:
                leaves[leaf.name] = leaf

        for part in self.replaced:
            map_tree(look, part.outputs)
        return leaves

    def streams(self) -> tuple[StreamSpec, ...]:
        """What a store of it holds of each row."""
        return tuple(leaf.spec() for leaf in self.leaves("stream").values())

    def stream_sides(self) -> dict[str, str]:
        """Whose tokens the length of each stream follows."""
        return {name: leaf.side for name, leaf in self.leaves("stream").items()}

    def tables(self) -> tuple[TableSpec, ...]:
        """What a store of it holds for all rows."""
        return tuple(TableSpec(leaf.name, leaf.dtype, leaf.dims) for leaf in self.leaves("table").values())

    def modules(self) -> list[nn.Module]:
        """The replaced modules and all below them."""
        return [module for part in self.replaced for module in part.module.modules()]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the states depend on: parameters and buffers of the replaced modules, beside and around them.

        Buffers that no checkpoint holds count too: rotary frequencies, position ids.
        """
        tensors: dict[str, torch.Tensor] = {}
        for part in self.replaced:
            own = part.module.state_dict(keep_vars=True) | dict(part.module.named_buffers())
            tensors |= {f"{part.name}.{name}": tensor for name, tensor in own.items()}
        tensors |= dict(self.beside)
        for place, module in enumerate(self.around):
            named = module.named_buffers(recurse=False)
            tensors |= {f"{type(module).__name__} {place}.{name}": buffer for name, buffer in named}
        once: dict[int, str] = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor):
                once.setdefault(id(tensor), name)
        return {name: tensors[name] for name in once.values()}

    def digest(self) -> dict[str, str]:
        """Digest of every tensor of the prefix."""
        return {name: tensor_digest(tensor) for name, tensor in self.tensors().items()}


def map_tree(function: Callable[[Any], Any], value: Any) -> Any:
    """The same structure of tuples, lists and mappings (transformers' outputs too) with the function applied inside."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tree(function, item) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tree(function, item) for item in value)
    if isinstance(value, Mapping):
        items = {key: map_tree(function, item) for key, item in value.items()}
        return dict(items) if type(value) is dict else type(value)(**items)
    return function(value)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors of an output, in its order."""
    tensors: list[torch.Tensor] = []
    map_tree(lambda leaf: tensors.append(leaf) if isinstance(leaf, torch.Tensor) else None, value)
    return tensors


# --------------------------------------------------------------------------------------------------------- of a batch


def autocast(precision: str | None, device: torch.device) -> torch.autocast:
    """The autocast context of a precision; off for None and "fp32"."""
    dtype = AUTOCAST.get(precision or "")
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@contextmanager
def running(model: nn.Module, precision: str | None, *, training: bool) -> Iterator[None]:
    """The model on trial in a mode, under the autocast of a precision."""
    with on_trial(model, training=training), autocast(precision, device_of(model)):
        yield


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return next(model.parameters()).device


def move(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch as keyword arguments on a device."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


class _Captured(Exception):
    """Raised when the last needed output is there: nothing above it is computed."""


def capture(model: nn.Module, prefix: Prefix, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The prefix's streams [rows, tokens, ...] and tables of one batch, on the model's device. Without a graph."""
    wanted = {**prefix.leaves("stream"), **prefix.leaves("table")}
    taken: dict[str, torch.Tensor] = {}
    calls: dict[str, int] = {}
    handles = []
    for part in prefix.replaced:
        if not any(leaf.split(":")[0] == part.name for leaf in wanted):
            continue

        def take(module: nn.Module, args: Any, output: Any, name: str = part.name) -> None:
            number = calls.get(name, 0)
            calls[name] = number + 1
            for path, tensor in enumerate(tensors_in(output)):
                if (leaf := f"{name}:{number}:{path}") in wanted:
                    last = len(taken) + 1 == len(wanted)
                    taken[leaf] = tensor.detach() if last else tensor.detach().clone()  # it may be written to above
            if len(taken) == len(wanted):
                raise _Captured

        handles.append(part.module.register_forward_hook(take))
    try:
        with torch.no_grad():
            model(**batch)
    except _Captured:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if missing := set(wanted) - set(taken):
        raise CannotCache(f"A batch did not reach {min(missing).split(':')[0]} of the frozen prefix, others did.")
    return {name: leaf.to_rows(taken[name]) if leaf.kind == "stream" else taken[name] for name, leaf in wanted.items()}


def states_of(
    model: nn.Module, prefix: Prefix, batch: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """What `capture` gives for a collated batch, and each row's states without padding."""
    taken = capture(model, prefix, move(batch, device_of(model)))
    rows = read_rows(batch, with_target=prefix.with_target)
    return taken, list(split_rows(taken, prefix.leaves("stream"), rows))


def states_alone(model: nn.Module, prefix: Prefix, collator: Collator, feature: Any) -> dict[str, torch.Tensor]:
    """The states of one row in a batch of its own."""
    return states_of(model, prefix, collate(collator, [feature]))[1][0]


def split_rows(
    states: Mapping[str, torch.Tensor], leaves: Mapping[str, Leaf], rows: BatchRows
) -> Iterator[dict[str, torch.Tensor]]:
    """Each row's states without padding, [tokens, ...] by stream."""
    for row in range(len(rows)):
        yield {
            name: states[name][row, slice(*rows.spans[leaf.side][row])] if leaf.side else states[name][row : row + 1]
            for name, leaf in leaves.items()
        }


def pad_states(
    pieces: Sequence[Mapping[str, torch.Tensor]], sides: Mapping[str, str], rows: BatchRows, *, noise: bool = False
) -> dict[str, torch.Tensor] | None:
    """Rows' states as a batch's: [rows, width, ...], where the batch has its tokens, zeros (or noise) elsewhere.

    None where a row's states are not as long as the row, or the rows' are of unlike shapes.
    """
    batch: dict[str, torch.Tensor] = {}
    for name, side in sides.items():
        sample = pieces[0][name]
        if any(piece[name].shape[1:] != sample.shape[1:] for piece in pieces):
            return None
        if not side:
            batch[name] = torch.cat([piece[name] for piece in pieces])
            continue
        padded = sample.new_zeros((len(rows), rows.widths[side], *sample.shape[1:]))
        if noise:
            generator = torch.Generator(padded.device).manual_seed(0)  # the global one belongs to the training
            padded.normal_(std=float(sample.float().std().nan_to_num(1.0)), generator=generator)
        for row, (start, stop) in enumerate(rows.spans[side]):
            if len(pieces[row][name]) != stop - start:
                return None
            padded[row, start:stop] = pieces[row][name]
        batch[name] = padded
    return batch


def same_states(one: torch.Tensor, other: torch.Tensor, *, low: bool) -> bool:
    """Whether two tensors are the same but for rounding, in 16 bits where `low`; exactly, where they hold no floats."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other) or not one.dtype.is_floating_point:
        return torch.equal(one, other)
    return row_gap(one, other).whole <= (SAME_ROW_LOW if low or one.itemsize < 4 else SAME_ROW)
