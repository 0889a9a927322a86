"""What the results have in common: to JSON and back, six digits, and the words for layers and parts.

Nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Self

import torch

from hf_freeze.anatomy import Anatomy, Part
from hf_freeze.errors import FreezeError
from hf_freeze.tables import Table

__all__ = ["Numbers", "Rows", "label_of", "layer_name", "part_of", "parts_of", "six_digits"]

Rows = tuple[tuple[float, ...], ...]


class Numbers:
    """Base of a frozen dataclass that goes to JSON and back: what a picture is drawn from. Prints as its table."""

    def table(self) -> Table | None:
        """The figures as a table; None where only a picture shows them."""
        return None

    def __str__(self) -> str:
        table = self.table()
        return repr(self) if table is None else str(table)

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON-ready values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The numbers from such values, as they are or read from JSON.

        Raises:
            FreezeError: They are those of something else.
        """
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        given = list(values) if isinstance(values, Mapping) else [f"a {type(values).__name__}"]
        if set(given) != set(names):
            raise FreezeError(
                f"{cls.__name__} was to be made from {', '.join(map(str, given))}; it has the keys {', '.join(names)}. "
                "Use the class whose to_dict wrote them."
            )
        return cls(**{name: _tuples(values[name]) for name in names})


def _tuples(value: Any) -> Any:
    """What JSON made of nested tuples, as these again."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def six_digits(values: Any) -> Any:
    """Nested tuples of numbers with six digits: what a picture and a test can tell apart.

    >>> six_digits(torch.tensor([[1 / 3, 2.0]], dtype=torch.float64))
    ((0.333333, 2.0),)
    """
    values = values.tolist() if isinstance(values, torch.Tensor) else values
    return tuple(map(six_digits, values)) if isinstance(values, list) else float(f"{values:.6g}")


def layer_name(stack: str, layer: int) -> str:
    """What a row is called where layers are counted.

    >>> layer_name("decoder", 0), layer_name("decoder", 1)
    ('decoder embeddings', 'decoder block 0')
    """
    return f"{stack} block {layer - 1}" if layer else f"{stack} embeddings"


def label_of(part: Part) -> str:
    """A part's label, as in FreezeMonitor's log.

    >>> label_of(Part("block", "encoder", 3)), label_of(Part("head"))
    ('encoder.3', 'head')
    """
    return f"{part.stack}.{part.index}" if part.kind == "block" else part.kind


def part_of(anatomy: Anatomy, name: str) -> Part:
    """Where a weight counts: its block, or all embeddings together, all final norms, the head."""
    part = anatomy.parts[name]
    return part if part.kind == "block" else Part(part.kind)


def parts_of(anatomy: Anatomy) -> list[Part]:
    """The parts that hold weights, bottom up."""
    order = {"tower": 0, "embeddings": 1, "block": 2, "final": 3, "other": 4, "head": 5}
    stacks = ["", *(str(stack.name) for stack in anatomy.stacks)]
    parts = {part_of(anatomy, name) for name in anatomy.parts}
    return sorted(parts, key=lambda part: (order[part.kind], stacks.index(part.stack), part.index))
