"""Finds what crosses a cut: which modules a frozen prefix makes superfluous, and which outputs are needed above it.

Nothing is assumed about an architecture. One batch is run plainly and every output of the prefix's modules is kept;
then it is run again with placeholders that give back only the last block's states, and the results are compared. Where
they differ, more of the outputs are handed on, until the results are the same and no output is kept that is not
needed: T5's position bias, per-layer inputs, an embedding that comes back above. What cannot be made the same is
declined with the reason. Nothing here writes to disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hf_freeze.anatomy import Anatomy
from hf_freeze.cuts import Cut
from hf_freeze.errors import CannotCache
from hf_freeze.prefix.replay import replaying
from hf_freeze.prefix.rows import PREFIX_KEY, SOURCE, TARGET, BatchRows
from hf_freeze.prefix.states import Leaf, Prefix, Replaced, map_tree, running, tensors_in

__all__ = ["find_prefix", "same_results"]

Sizes = dict[str, tuple[int, int]]  # a name for a size -> that size in two batches


@dataclass
class Call:
    """One call of a replaced module: its number among the module's calls in this forward, first input and output."""

    name: str
    number: int
    first: torch.Tensor | None
    output: Any

    def outputs(self) -> dict[str, torch.Tensor]:
        """The tensors that it returned, by the names of their leaves."""
        return {f"{self.name}:{self.number}:{path}": tensor for path, tensor in enumerate(tensors_in(self.output))}


# ------------------------------------------------------------------------------------------------ what is superfluous


def superfluous_modules(anatomy: Anatomy, cuts: Iterable[Cut]) -> list[Replaced]:
    """The modules that need not run when the states above the cuts are known, with the places where they stand.

    Embeddings and other inputs that hold parameters, the blocks below the cut, and the final norm of an encoder that
    is frozen whole below a decoder.
    """
    modules = dict(anatomy.model.named_modules(remove_duplicate=False))
    parts: list[Replaced] = []
    for cut in cuts:
        stack = anatomy.stack(cut.stack)
        names = [name for name in stack.inputs if any(True for _ in modules[name].parameters())]
        blocks = [(name, modules[name]) for block in stack.blocks[: cut.blocks] for name in block.names]
        if len(anatomy.stacks) == 2 and cut.stack == "encoder" and cut.blocks == len(stack):
            owners = {
                name.rpartition(".")[0]
                for name, part in anatomy.parts.items()
                if part.kind == "final" and part.stack == "encoder"
            }
            frozen = [n for n in owners if n and not any(p.requires_grad for p in modules[n].parameters())]
            names += [name for name in modules if name in frozen]
        for name, module in [*((name, modules[name]) for name in names), *blocks]:
            slots = _slots(module, stack.root) or _slots(module, anatomy.model)
            if (name, module) in blocks:  # a block that is shared stands above the cut as well: only this place
                parent, _, key = name.rpartition(".")
                slots = ((modules[parent], key),)
            parts.append(Replaced(name, module, slots))
    return parts


def _slots(module: nn.Module, root: nn.Module) -> tuple[tuple[nn.Module, str], ...]:
    """Every place below `root` where the module is registered."""
    return tuple(
        (parent, key) for parent in root.modules() for key, child in parent._modules.items() if child is module
    )


# -------------------------------------------------------------------------------------------------------- two forwards


def record_calls(model: nn.Module, parts: Iterable[Replaced], batch: Mapping[str, Any], calls: list[Call]) -> Any:
    """Runs a batch plainly and returns the result; every call of the parts is added, with a copy of its output."""
    count: dict[str, int] = {}
    handles = []
    for part in parts:

        def record(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = part.name) -> None:
            first = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
            calls.append(Call(name, count.get(name, 0), first, map_tree(_copy, output)))
            count[name] = count.get(name, 0) + 1

        handles.append(part.module.register_forward_hook(record, with_kwargs=True))
    try:
        return model(**batch)
    finally:
        for handle in handles:
            handle.remove()


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _result_tensors(result: Any) -> dict[str, torch.Tensor]:
    """The tensors of a result by name; without key-value caches."""
    tensors: dict[str, torch.Tensor] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, torch.Tensor):
            tensors[path] = value.detach()
        elif isinstance(value, Mapping):
            for key, item in value.items():
                if key not in ("past_key_values", "encoder_last_hidden_state", "mems", "cache_params", "state"):
                    walk(item, f"{path}.{key}")
        elif isinstance(value, list | tuple):
            for place, item in enumerate(value):
                walk(item, f"{path}.{place}")

    walk(result, "")
    return tensors


def same_results(plain: Any, replayed: Any, tolerance: float, spans: BatchRows | None = None) -> str:
    """ "" where two results agree, else what differs and by how much.

    Args:
        tolerance: Relative to the plain tensor's norm.
        spans: Where given, only the loss is compared, or without one the real tokens of everything else.
    """
    ours, theirs = _result_tensors(replayed), _result_tensors(plain)
    if spans is not None and ".loss" in theirs:
        theirs = {".loss": theirs[".loss"]}
    if not theirs:
        return "the model returns no tensor"
    for name, wanted in theirs.items():
        if name not in ours:
            return f"{name.strip('.')} is missing"
        got = ours[name]
        if got.shape != wanted.shape:
            return f"{name.strip('.')} has the shape {list(got.shape)} instead of {list(wanted.shape)}"
        wanted, got = wanted.double(), got.double()
        if spans is not None:
            wanted, got = _real_only(wanted, spans), _real_only(got, spans)
        if not torch.isfinite(wanted).all() and torch.equal(torch.isfinite(wanted), torch.isfinite(got)):
            keep = torch.isfinite(wanted)
            wanted, got = wanted[keep], got[keep]
        gap = float((wanted - got).norm())
        if not gap <= tolerance * max(float(wanted.norm()), 1e-6):
            return f"{name.strip('.')} differs by {gap / max(float(wanted.norm()), 1e-30):.1e} of its size"
    return ""


def _real_only(tensor: torch.Tensor, rows: BatchRows) -> torch.Tensor:
    for side, spans in rows.spans.items():
        if tensor.dim() > 1 and tensor.shape[:2] == (len(rows), rows.widths[side]):
            return torch.cat([tensor[row, start:stop].reshape(-1) for row, (start, stop) in enumerate(spans)])
    return tensor


# --------------------------------------------------------------------------------------------------------- the search


def find_prefix(
    model: nn.Module,
    anatomy: Anatomy,
    cuts: tuple[Cut, ...],
    batch: Mapping[str, Any],
    precision: str | None,
) -> Prefix:
    """The prefix of these cuts: what is replaced, and what of it must be stored.

    Args:
        model: What a training step calls.
        batch: A few rows on the model's device; labels included, where training has them.
        precision: The autocast of training, "bf16", "fp16", or None.

    Raises:
        CannotCache: No choice of outputs gives the plain results; the message names what differs.
    """
    parts = superfluous_modules(anatomy, cuts)
    calls: list[Call] = []
    with torch.no_grad(), running(model, precision, training=True):
        plain = record_calls(model, parts, batch, calls)
    _refuse_train_mode(anatomy, parts)
    order = [(call.name, call.number) for call in calls]
    for attempt in (_shorten(batch, anatomy), _shorten(batch, anatomy, tokens=False)):
        short_calls: list[Call] = []
        # A foreign forward may raise anything on a cut batch; what counts is that its prefix ran.
        with suppress(Exception), torch.no_grad(), running(model, precision, training=True):
            record_calls(model, parts, attempt, short_calls)
        if [(call.name, call.number) for call in short_calls] == order:
            break
    else:
        raise CannotCache(
            f"{anatomy.model_class} was run on fewer rows and tokens, to tell which sizes follow the batch; it calls "
            "other modules of its prefix then."
        )
    sizes = _sizes(batch, attempt, anatomy)
    parts, calls, short_calls = _without_those_called_above(anatomy, cuts, parts, calls, short_calls)
    return _Search(model, anatomy, cuts, parts, calls, short_calls, sizes, batch, plain, precision).run()


def _refuse_train_mode(anatomy: Anatomy, parts: list[Replaced]) -> None:
    inside = [module for part in parts for module in part.module.modules()]
    if any(m.training and m.p > 0 for m in inside if isinstance(m, nn.modules.dropout._DropoutNd)):
        raise CannotCache(
            f"The prefix cache was asked for a {anatomy.model_class} whose frozen modules are in train mode: their "
            "dropout changes the states at every step. Use frozen_mode='eval'."
        )


def _without_those_called_above(
    anatomy: Anatomy, cuts: tuple[Cut, ...], parts: list[Replaced], calls: list[Call], short_calls: list[Call]
) -> tuple[list[Replaced], list[Call], list[Call]]:
    """Leaves alone the inputs that are also called above the cut, such as one norm that is used twice."""
    inputs = {name for stack in anatomy.stacks for name in stack.inputs}
    blocks = {name for cut in cuts for b in anatomy.stack(cut.stack).blocks[: cut.blocks] for name in b.names}
    last = max((place for place, call in enumerate(calls) if call.name in blocks), default=-1)
    stack_of = {name: stack.name for stack in anatomy.stacks for name in stack.inputs}
    late = {c.name for c in calls[last + 1 :] if c.name in inputs and stack_of[c.name] == cuts[-1].stack}
    called = {call.name for call in calls}
    kept = [part for part in parts if part.name not in late and part.name in called]
    names = {part.name for part in kept}
    return kept, [c for c in calls if c.name in names], [c for c in short_calls if c.name in names]


SIDE_KEYS = {SOURCE: ("input_ids", "inputs_embeds", "attention_mask"), TARGET: ("decoder_input_ids", "labels")}


def _widths(batch: Mapping[str, Any], anatomy: Anatomy) -> dict[str, int]:
    """ "rows" and the padded width of each side of a batch."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor) and value.dim() > 0}
    sizes = {"rows": next(iter(tensors.values())).shape[0]}
    for side in (SOURCE, TARGET)[: len(anatomy.stacks)]:
        ids = next((tensors[key] for key in SIDE_KEYS[side] if key in tensors and tensors[key].dim() > 1), None)
        if ids is not None:
            sizes[side] = ids.shape[1]
    return sizes


def _sizes(batch: Mapping[str, Any], shorter: Mapping[str, Any], anatomy: Anatomy) -> Sizes:
    """The sizes that differ between two batches, by name."""
    one, other = _widths(batch, anatomy), _widths(shorter, anatomy)
    return {name: (one[name], other[name]) for name in one if one[name] != other[name]}


def _shorten(batch: Mapping[str, Any], anatomy: Anatomy, *, tokens: bool = True) -> dict[str, Any]:
    """The batch with a row less and the last token of each row cut off; more tokens on a side that is as wide as there
    are rows, or as the other side, to tell them apart.
    """
    sizes = _widths(batch, anatomy)
    less: dict[str, int] = {}
    for side in (SOURCE, TARGET):
        taken = {1 if name == "rows" else less[name] for name in ("rows", *less) if sizes[name] == sizes.get(side)}
        if side in sizes:
            less[side] = next(count for count in (1, 2, 3) if count not in taken)
    shorter = dict(batch)
    for key, value in batch.items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape[0] != sizes["rows"]:
            continue
        value = value[: max(1, sizes["rows"] - 1)]
        side = TARGET if len(anatomy.stacks) == 2 and (key.startswith("decoder_") or key == "labels") else SOURCE
        if tokens and value.dim() > 1 and value.shape[1] == sizes.get(side) and value.shape[1] > less[side]:
            value = value[:, : -less[side]]
        shorter[key] = value.contiguous()
    return shorter


@dataclass
class _Search:
    """Tries which outputs of the prefix must be handed on. One batch, one precision, one set of cuts."""

    model: nn.Module
    anatomy: Anatomy
    cuts: tuple[Cut, ...]
    parts: list[Replaced]
    calls: list[Call]
    short_calls: list[Call]
    sizes: Sizes
    batch: Mapping[str, Any]
    plain: Any
    precision: str | None
    values: dict[str, torch.Tensor] = field(default_factory=dict)  # every leaf's recorded value
    short_values: dict[str, torch.Tensor] = field(default_factory=dict)  # the same of the shorter batch
    leaves: dict[str, Leaf] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for call, short in zip(self.calls, self.short_calls, strict=True):
            for (name, value), other in zip(call.outputs().items(), short.outputs().values(), strict=True):
                dims = tuple(self._dim(a, b) for a, b in zip(value.shape, other.shape, strict=True))
                passes = call.first is not None and value.shape == call.first.shape and value.dtype == call.first.dtype
                self.leaves[name] = Leaf("input" if passes else "zeros", name, dims, value.dtype)
                self.values[name], self.short_values[name] = value, other

    def _dim(self, size: int, shorter: int) -> int | str:
        if size == shorter:
            return size
        for name, pair in self.sizes.items():
            if (size, shorter) == pair:
                return name
        rows = self.sizes.get("rows", (1, 1))
        for side, pair in self.sizes.items():
            if side != "rows" and (size, shorter) == (rows[0] * pair[0], rows[1] * pair[1]):
                return f"rows*{side}"
        raise CannotCache(
            f"A module of the frozen prefix of {self.anatomy.model_class} returns a tensor whose size {size} follows "
            f"neither the rows nor the tokens of the batch ({ {name: pair[0] for name, pair in self.sizes.items()} })."
        )

    def run(self) -> Prefix:
        """The fewest leaves that give the plain results."""
        last = self._last_leaves()
        failure = self._differs(last)
        if not failure:
            return self._prefix(last)
        everything = {name for name in self.leaves if self._can_hand_on(name)}
        if worst := self._differs(everything):
            hidden = sorted(set(self.leaves) - everything)
            raise CannotCache(
                f"{self.anatomy.model_class} cannot be replayed from its frozen prefix: with the states of every block "
                f"handed on, {worst}"
                + (f"; {hidden[0].split(':')[0]} also returns a tensor that is not one entry a token" if hidden else "")
                + ". Its blocks hand on more than their outputs, such as shared keys and values. Train without a cache."
            )
        needed = set(everything)
        below = {n for n in everything - last if self._is_block(n)}
        if not self._differs(needed - below):  # all at once, as nearly always; else one by one
            needed -= below
        for name in [*sorted(needed & below), *sorted(needed - below)]:
            if not self._differs(needed - {name}):
                needed.discard(name)
        return self._prefix(needed)

    def _is_block(self, leaf: str) -> bool:
        name = leaf.split(":")[0]
        return any(name in block.names for stack in self.anatomy.stacks for block in stack.blocks)

    def _last_leaves(self) -> set[str]:
        """The first tensor of the last call of each stack's prefix: the states, in nearly every architecture."""
        chosen: set[str] = set()
        for cut in self.cuts:
            own = {part.name for part in superfluous_modules(self.anatomy, [cut])}
            inside = [call for call in self.calls if call.name in own]
            if not inside:
                raise CannotCache(f"A batch of {self.anatomy.model_class} calls no module of its frozen {cut.stack}.")
            outputs = inside[-1].outputs()
            if not outputs:
                raise CannotCache(
                    f"The last frozen block of {self.anatomy.model_class}, {inside[-1].name}, returns no tensor."
                )
            chosen.add(next(iter(outputs)))
        if bad := [name for name in chosen if not self._can_hand_on(name)]:
            raise CannotCache(
                f"The states that {bad[0].split(':')[0]} of {self.anatomy.model_class} returns are not one entry a "
                f"token of each row: {list(self.values[bad[0]].shape)}."
            )
        return chosen

    def _can_hand_on(self, name: str) -> bool:
        """Whether a leaf can be stored row by row, or once for all rows."""
        dims = self.leaves[name].dims
        named = [dim for dim in dims if isinstance(dim, str)]
        if "rows" in named:
            return len(named) <= 2 and len(set(named)) == len(named) and not any("*" in dim for dim in named)
        return self._is_table(name)

    def _is_table(self, name: str) -> bool:
        """Whether a leaf without rows depends on nothing but the lengths: the shorter batch has its top left part."""
        value = self.values[name]
        if any("rows" in str(dim) for dim in self.leaves[name].dims):
            return False
        short = self.short_values[name]
        return torch.equal(value[tuple(slice(size) for size in short.shape)], short)

    def _prefix(self, handed_on: set[str]) -> Prefix:
        replaced = []
        for part in self.parts:
            outputs = []
            for call in (c for c in self.calls if c.name == part.name):
                names = iter(call.outputs())

                def leaf(value: Any, names: Iterator[str] = names) -> Any:
                    if not isinstance(value, torch.Tensor):
                        return value if isinstance(value, bool | int | float | str) else None
                    described = self.leaves[next(names)]
                    if described.name not in handed_on:
                        return described
                    return replace(described, kind="table" if "rows" not in described.dims else "stream")

                outputs.append(map_tree(leaf, call.output))
            replaced.append(replace(part, outputs=tuple(outputs)))
        attention = str(getattr(getattr(self.anatomy.model, "config", None), "_attn_implementation", "") or "")
        sides = (SOURCE, TARGET)[: len({cut.stack for cut in self.cuts})]
        return Prefix(
            tuple(self.cuts), tuple(replaced), self.precision, attention, sides, self._beside(), self._around()
        )

    def _beside(self) -> tuple[tuple[str, torch.Tensor], ...]:
        """Tensors below the cuts that no replaced module holds."""
        model = self.anatomy.model
        beside: list[tuple[str, torch.Tensor]] = []
        for stack in (self.anatomy.stack(cut.stack) for cut in self.cuts):
            beside += [(name, model.get_parameter(name)) for name in stack.input_parameters]
            for name in stack.inputs:
                inside = model.get_submodule(name).named_parameters()
                beside += [(f"{name}.{leaf}", parameter) for leaf, parameter in inside]
        replaced = {id(parameter) for part in self.parts for parameter in part.module.parameters()}
        return tuple((name, tensor) for name, tensor in beside if id(tensor) not in replaced)

    def _around(self) -> tuple[nn.Module, ...]:
        """What runs with the replaced modules and holds no parameters: stacks, rotary tables, activations.

        Nothing above the cuts, whose modes and attributes may change, and not what PEFT puts around a whole model.
        """
        model: Any = self.anatomy.model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        depth = dict(self.cuts)
        apart = [part.module for part in self.parts]
        roots = {stack.root for stack in self.anatomy.stacks if stack.name in depth}
        for stack in self.anatomy.stacks:
            if stack.name in depth or roots & set(stack.root.modules()):
                blocks = stack.blocks[depth.get(stack.name, 0) :]
                apart += [piece for block in blocks for piece in block.modules]
            else:
                apart.append(stack.root)
        elsewhere = {module for top in apart for module in top.modules()}
        return tuple(
            module
            for module in inner.modules()
            if module not in elsewhere and not any(True for _ in module.parameters(recurse=False))
        )

    def _differs(self, handed_on: set[str]) -> str:
        """What differs from the plain results when only these leaves are handed on."""
        prefix = self._prefix(handed_on)
        tables = {name: self.values[name] for name in prefix.leaves("table")}
        states = {name: leaf.to_rows(self.values[name]) for name, leaf in prefix.leaves("stream").items()}
        if not states:
            return "no states are handed on"
        try:
            with (
                replaying(self.model, prefix, tables),
                torch.no_grad(),
                running(self.model, self.precision, training=True),
            ):
                result = self.model(**self.batch, **{PREFIX_KEY: states})
        except CannotCache:
            raise
        except Exception as error:  # a foreign forward may raise anything on what it did not expect
            return f"it fails with {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
        return same_results(self.plain, result, tolerance=1e-6)
