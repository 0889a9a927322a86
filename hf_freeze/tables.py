"""Tables as values: a `Table` renders itself in a terminal, as Markdown and as a dict. Counts in words.

It knows nothing of models: who has something to show makes a table of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import StringIO
from typing import Any

__all__ = ["TERMINAL_WIDTH", "Table", "count_text"]


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
