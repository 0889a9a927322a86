"""An anatomy as a value: stacks, blocks, parts and ties of a model, and the table that shows them.

It finds nothing itself: `find` and `place` fill it in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from torch import nn

from hf_freeze.errors import AnatomyError
from hf_freeze.tables import Table, count_text

__all__ = [
    "Anatomy",
    "Block",
    "BlocksGiven",
    "Part",
    "Stack",
    "StackName",
    "Tie",
    "anatomy_table",
    "part_rows",
    "tie_lines",
]


StackName = Literal["encoder", "decoder"]
BlocksGiven = str | nn.Module | Sequence[nn.Module] | Mapping[str, "str | nn.Module | Sequence[nn.Module]"]


@dataclass(frozen=True, order=True)
class Part:
    """Where a parameter lives: `kind` is "tower", "embeddings", "block", "final", "head" or "other".

    `stack` names the stack for embeddings, blocks and final norms, `index` the block, both empty elsewhere. A tower is
    what feeds the text stack from beside it, such as a vision encoder and its projector.
    """

    kind: str
    stack: str = ""
    index: int = -1

    def __str__(self) -> str:
        return f"{self.stack} block {self.index}" if self.kind == "block" else f"{self.stack} {self.kind}".strip()


@dataclass(frozen=True)
class Block:
    """One block of a stack. XLM keeps a block's pieces in parallel lists, hence several modules for one block."""

    index: int
    names: tuple[str, ...]
    modules: tuple[nn.Module, ...] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Stack:
    """An ordered run of blocks, with the modules that hold them and those that run before them.

    Attributes:
        name: "encoder" or "decoder"; a model with one stack has one of them.
        path: The name of the module list that holds the blocks.
        blocks: The blocks, lowest first.
        root: The module whose forward runs the blocks.
        holders: Names of the modules from `root` down to the list: their own dropout acts on the prefix too.
        inputs: Names of the modules that run before block 0 (token, position, segment embeddings, their norm,
            projections and dropout), the outermost ones only.
        input_parameters: Names of the holders' own parameters that are used before block 0, such as a learnt scale.
    """

    name: StackName
    path: str
    blocks: tuple[Block, ...]
    root: nn.Module = field(repr=False, compare=False)
    holders: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    input_parameters: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.blocks)


@dataclass(frozen=True)
class Tie:
    """One tensor under several names; the first is the name under which `named_parameters` shows it."""

    names: tuple[str, ...]
    parts: tuple[Part, ...]

    @property
    def joins_head(self) -> bool:
        """Whether the head shares its weight with something below it."""
        kinds = {part.kind for part in self.parts}
        return "head" in kinds and len(kinds) > 1


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model and every parameter's place in them. Made by `read_anatomy`; it changes no model.

    Attributes:
        model_class: Name of the unwrapped model's class.
        stacks: Encoder first. One or two.
        parts: Part of every parameter *name*, second names of ties included.
        ties: Every tensor that has several names.
        notes: How what is not obvious was told.
        model: The unwrapped model that the names refer to.
    """

    model_class: str
    stacks: tuple[Stack, ...]
    parts: dict[str, Part] = field(repr=False)
    ties: tuple[Tie, ...]
    notes: tuple[str, ...]
    model: nn.Module = field(repr=False, compare=False)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter under its first name, in the model's order; a tied tensor once."""
        return dict(self.model.named_parameters())

    @cached_property
    def tie_of(self) -> dict[str, Tie]:
        """The tie of each tied name."""
        return {name: tie for tie in self.ties for name in tie.names}

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Parameter names of all input embeddings and of the towers that feed the stack beside them."""
        return self.names_of("tower", "embeddings")

    @property
    def head(self) -> tuple[str, ...]:
        """Parameter names of the head, the tied name included."""
        return self.names_of("head")

    @property
    def final_norms(self) -> tuple[str, ...]:
        """Parameter names of what runs after the last block inside a stack."""
        return self.names_of("final")

    @property
    def encoder_blocks(self) -> tuple[Block, ...]:
        """The encoder's blocks, lowest first; () without an encoder."""
        return next((stack.blocks for stack in self.stacks if stack.name == "encoder"), ())

    @property
    def decoder_blocks(self) -> tuple[Block, ...]:
        """The decoder's blocks, lowest first; () without a decoder."""
        return next((stack.blocks for stack in self.stacks if stack.name == "decoder"), ())

    def stack(self, name: str) -> Stack:
        """The stack of that name.

        Raises:
            AnatomyError: There is no such stack.
        """
        for stack in self.stacks:
            if stack.name == name:
                return stack
        have = ", ".join(repr(stack.name) for stack in self.stacks)
        raise AnatomyError(f"The stack {name!r} was asked for; {self.model_class} has {have}. Use one of these.")

    def names_of(self, *kinds: str) -> tuple[str, ...]:
        """Names of the parameters in parts of these kinds, second names of ties included."""
        return tuple(name for name, part in self.parts.items() if part.kind in kinds)

    def __str__(self) -> str:
        return str(anatomy_table(self))


def anatomy_table(anatomy: Anatomy) -> Table:
    """The parts of a model in order, runs of blocks together."""
    rows = [(label, names, count_text(size)) for label, names, size, _ in part_rows(anatomy, {})]
    return Table(
        f"{anatomy.model_class}: anatomy",
        ("part", "where", "parameters"),
        tuple(rows),
        tie_lines(anatomy) + anatomy.notes,
    )


def tie_lines(anatomy: Anatomy) -> tuple[str, ...]:
    lines = [f"Tie: {' = '.join(tie.names)} (one tensor, counted once)." for tie in anatomy.ties[:4]]
    if len(anatomy.ties) > 4:
        lines.append(f"... and {len(anatomy.ties) - 4} more ties.")
    return tuple(lines)


def part_rows(anatomy: Anatomy, states: dict[str, str]) -> list[tuple[str, str, int, str]]:
    """(label, where, parameters, state) from the bottom up; neighbouring blocks of one state are one row."""
    groups: dict[Part, list[str]] = {}
    for name, part in anatomy.parts.items():
        groups.setdefault(part, []).append(name)
    order: dict[str, int] = {stack.name: position for position, stack in enumerate(anatomy.stacks)}
    kinds = {"tower": 0, "embeddings": 1, "block": 2, "final": 3, "other": 4, "head": 5}

    def key(part: Part) -> tuple[int, int, int]:
        outside = part.stack not in order
        level = (-1 if kinds[part.kind] < 2 else len(order)) if outside else order[part.stack]
        return (level, kinds[part.kind], part.index)

    rows: list[tuple[str, str, int, str]] = []
    run: tuple[Part, int, int, str] | None = None  # first block of the run, last index, parameters, state

    def close() -> None:
        if run is not None:
            first, last, size, state = run
            count = last - first.index + 1
            span = f"{first.stack} block {first.index}" if count == 1 else f"{first.stack} blocks {first.index}-{last}"
            path = anatomy.stack(first.stack).path
            rows.append(
                (span, f"{path}[{first.index}]" if count == 1 else f"{path}[{first.index}:{last + 1}]", size, state)
            )

    for part in sorted(groups, key=key):
        own = [name for name in groups[part] if name in anatomy.parameters]
        size = sum(anatomy.parameters[name].numel() for name in own)
        seen = {states.get(name, "") for name in own}
        if not own:  # every name here is the second one of a tie
            first = anatomy.tie_of[groups[part][0]].names[0]
            seen = {f"{states.get(first, '')} (tied)".strip()}
        state = seen.pop() if len(seen) == 1 else "mixed"
        if part.kind == "block":
            if run is not None and run[0].stack == part.stack and run[3] == state:
                run = (run[0], part.index, run[2] + size, state)
            else:
                close()
                run = (part, part.index, size, state)
            continue
        close()
        run = None
        rows.append((_label(part, anatomy), _common_prefix(groups[part]), size, state))
    close()
    return rows


def _label(part: Part, anatomy: Anatomy) -> str:
    names = {"tower": "tower", "embeddings": "embeddings", "final": "final norm", "head": "head", "other": "other"}
    prefix = f"{part.stack} " if part.stack and len(anatomy.stacks) > 1 else ""
    return prefix + names[part.kind]


def _common_prefix(names: list[str]) -> str:
    """One name without its last piece, or the path that several share."""
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    if len(owners) <= 2:
        return ", ".join(owners)
    return f"{owners[0]}, ... ({len(owners)} modules)"
