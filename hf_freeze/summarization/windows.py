"""Windows: rows or groups that are summarised together, cut so that a run that goes on has the same ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from hf_freeze.summarization.data.rows import Row

__all__ = ["WINDOW_ROWS", "Entry", "cut_windows"]

WINDOW_ROWS = 512  # 32 batches of 16: sorted by length little of them is padding, and a kill costs a minute or so
WINDOW_CHARACTERS = 4_000_000  # of all texts of a window, for rows that are books


class Entry(NamedTuple):
    """A text on its way, with its group ("" without groups) or, without groups, its row."""

    group: str
    text: str
    row: Row | None = None

    @property
    def mark(self) -> bytes:
        """What must be the same when a run goes on."""
        if self.row is None:
            return json.dumps([self.group, self.text]).encode()
        return (self.row.text or json.dumps(dict(self.row.values), default=str)).encode()

    @property
    def characters(self) -> int:
        if self.row is None or self.row.text:
            return len(self.row.text if self.row else self.text)
        return sum(len(cell) for cell in self.row.values.values() if isinstance(cell, str))


def cut_windows(entries: Iterable[Entry], window_rows: int) -> Iterator[tuple[list[Entry], bool]]:
    """Windows that end where a group ends (each row is one), but for a group that is larger than a window.

    Where one ends depends on its own entries only, so that a run that goes on has the same ones.

    Returns:
        Each window, and whether its last group ends with it.
    """
    window: list[Entry] = []
    characters, border = 0, 0  # border: where the last group of the window begins
    for entry in entries:
        if window and (entry.row is not None or entry.group != window[-1].group):
            border = len(window)
        # Again for what is kept: alone it may be too much, and a run that begins with it would yield it here, too.
        while window and (len(window) >= window_rows or characters >= WINDOW_CHARACTERS):
            yield window[: border or len(window)], border > 0
            window = window[border:] if border else []
            characters, border = sum(kept.characters for kept in window), 0
        window.append(entry)
        characters += entry.characters
    if window:
        yield window, True
