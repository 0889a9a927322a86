"""Tables as values: a `Table` renders itself in a terminal, as Markdown and as a dict.

This module owns how an anatomy and a freeze are shown. It collects and words; it computes nothing that other code uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_freeze.anatomy import Anatomy, Part

__all__ = ["Table", "anatomy_table", "count_text", "freeze_table"]

TERMINAL_WIDTH = 118  # wide enough for every table here, so that a pipe shows the same as a terminal


@dataclass(frozen=True)
class Table:
    """A titled table with lines below it.

    Example:
        >>> table = Table("Fruit", ("name", "weight"), (("apple", "120 g"),), ("One row.",))
        >>> table.to_dict()["rows"]
        [{'name': 'apple', 'weight': '120 g'}]
        >>> print(table.to_markdown())
        **Fruit**
        <BLANKLINE>
        | name | weight |
        |---|---|
        | apple | 120 g |
        <BLANKLINE>
        One row.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(self.title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
        for position, column in enumerate(self.columns):
            numeric = position > 0 and _is_numeric(row[position] for row in self.rows)
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        sink = StringIO()
        console = Console(file=sink, width=TERMINAL_WIDTH, color_system=None, force_jupyter=False)  # else it shows it
        console.print(table)
        for line in self.lines:
            console.print(Text(line))
        return "\n".join(line.rstrip() for line in sink.getvalue().splitlines())

    def to_markdown(self) -> str:
        """The table in GitHub's Markdown."""
        head = [f"| {' | '.join(self.columns)} |", "|" + "---|" * len(self.columns)]
        body = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in self.rows]
        below = [item for line in self.lines for item in ("", line)]
        return "\n".join([f"**{self.title}**", "", *head, *body, *below])

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON-ready values: title, rows as dicts, lines."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {"title": self.title, "rows": rows, "lines": list(self.lines)}


def _is_numeric(cells: Any) -> bool:
    return all(not cell or cell[0].isdigit() or cell[0] in "-+<~" for cell in cells)


def count_text(count: float, unit: str = "") -> str:
    """A count with three digits and a decimal prefix.

    >>> count_text(134_515_008), count_text(576), count_text(2_500_000_000, "B")
    ('134.5 M', '576', '2.5 GB')
    >>> count_text(999_999)
    '1.0 M'
    """
    for factor, prefix in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= 0.99995 * factor:  # what would be shown as 1000.0 of the prefix below
            return f"{count / factor:.1f} {prefix}{unit}"
    return f"{count:.0f}{' ' + unit if unit else ''}"


def anatomy_table(anatomy: Anatomy) -> Table:
    """The parts of a model in order, runs of blocks together."""
    rows = [(label, names, count_text(size)) for label, names, size, _ in _part_rows(anatomy, {})]
    return Table(
        f"{anatomy.model_class}: anatomy",
        ("part", "where", "parameters"),
        tuple(rows),
        _tie_lines(anatomy) + anatomy.notes,
    )


def freeze_table(anatomy: Anatomy, frozen: set[str], lowest: tuple[str, int], lines: Sequence[str]) -> Table:
    """The parts of a model with what is frozen, and where the backward pass ends.

    Args:
        anatomy: The model's parts.
        frozen: First names of the frozen parameters, whoever froze them.
        lowest: The lowest place with a trainable tensor.
        lines: What to say below the table.
    """
    states = {name: "frozen" if name in frozen else "trained" for name in anatomy.parameters}
    rows: list[tuple[str, ...]] = []
    crossed = False
    for label, where, size, state in _part_rows(anatomy, states):
        if not crossed and not state.startswith("frozen"):
            rows.append(("--- the backward pass ends here ---", "", "", ""))
            crossed = True
        rows.append((label, where, count_text(size), state))
    total = sum(p.numel() for p in anatomy.parameters.values())
    trained = sum(p.numel() for name, p in anatomy.parameters.items() if name not in frozen)
    place = lowest[0] if lowest[0] not in ("encoder", "decoder") else f"{lowest[0]} block {lowest[1]}"
    summary = (
        f"{count_text(trained)} of {count_text(total)} parameters train ({100 * trained / max(total, 1):.1f} %); "
        f"the backward pass ends at: {place}."
    )
    return Table(
        f"{anatomy.model_class}: frozen and trained",
        ("part", "where", "parameters", "state"),
        tuple(rows),
        (summary, *_tie_lines(anatomy), *lines, *anatomy.notes),
    )


def _tie_lines(anatomy: Anatomy) -> tuple[str, ...]:
    lines = [f"Tie: {' = '.join(tie.names)} (one tensor, counted once)." for tie in anatomy.ties[:4]]
    if len(anatomy.ties) > 4:
        lines.append(f"... and {len(anatomy.ties) - 4} more ties.")
    return tuple(lines)


def _part_rows(anatomy: Anatomy, states: dict[str, str]) -> list[tuple[str, str, int, str]]:
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
