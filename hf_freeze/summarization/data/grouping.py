"""All reviews of one product as one text, and summaries of summaries where they are more than a model takes.

It owns how reviews are joined, packed and merged, and a store on disk that brings the rows of a group together wherever
they lie in a file. It runs no model: `summarize` and `fits` are the caller's. Groups to train on are `group_data`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sqlite3
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from hf_freeze.errors import FreezeError, ReviewsError
from hf_freeze.summarization.prompts import SummaryPrompt

__all__ = [
    "Fits",
    "GroupStore",
    "Summarize",
    "fits_prompt",
    "group_key",
    "join_reviews",
    "merge_summaries",
    "summarize_groups",
    "summarized",
]

Summarize = Callable[[Sequence[str]], Sequence[str]]
Fits = Callable[[str], bool]

STORE_MEMORY = 64 << 10  # KiB that the store keeps of its file in memory


def join_reviews(reviews: Iterable[str]) -> str:
    """Several reviews as the one text that a model is given: each on a line of its own, blank ones left out.

    Args:
        reviews: Reviews of one product, or summaries of some of them. Line breaks within one become spaces, since
            they would read as its end.

    >>> join_reviews(["Good mug.\\nKeeps warm.", " ", "Handle broke."])
    'Good mug. Keeps warm.\\nHandle broke.'
    """
    return "\n".join(" ".join(review.split()) for review in reviews if review.strip())


def fits_prompt(prompt: SummaryPrompt) -> Fits:
    """Says of a text whether the prompt takes it whole; a longer one would lose its end.

    >>> from transformers import LlamaConfig
    >>> from hf_freeze.summarization.prompts import read_prompt
    >>> from hf_freeze.inputs.tokenizer import doctest_tokenizer
    >>> fits = fits_prompt(read_prompt(doctest_tokenizer(), LlamaConfig(vocab_size=300), max_source_tokens=64))
    >>> fits("Good mug."), fits("Good mug. " * 100)
    (True, False)
    """
    uncut = dataclasses.replace(prompt, max_source_tokens=10**9)
    return lambda text: len(uncut.encode(text)["input_ids"]) <= prompt.max_source_tokens


def summarize_groups(groups: Sequence[Sequence[str]], summarize: Summarize, fits: Fits | None = None) -> list[str]:
    """One summary for all reviews of each group; where they do not fit, a summary of summaries.

    Reviews are packed in their order, as many as fit; each pack gets a summary, and the summaries of a group are packed
    and summarised again until one is left. All groups advance together, so that `summarize` gets long lists to batch.
    After Wu et al., "Recursively Summarizing Books with Human Feedback", 2021, section 2; unlike there, a summary is
    not shown the ones before it, and no level has prompts or training of its own.

    Args:
        groups: The reviews of each group. A group of blank reviews only gets "" without a run of the model.
        summarize: Summaries of texts, in their order.
        fits: Whether a text is short enough for the model (`fits_prompt`). None: everything is. A single review that
            is too long is given as it is; the prompt then cuts its end.

    Returns:
        One summary for each group.

    Raises:
        FreezeError: `summarize` returned another number of summaries than it was given texts.

    >>> def first_words(texts):
    ...     return [" ".join(line.split()[0] for line in text.splitlines()) for text in texts]
    >>> summarize_groups([["A one", "B two", "C three"], [" "]], first_words, lambda text: text.count("\\n") < 2)
    ['A C', '']
    """
    packs = [list(_packs([text for text in group if text.strip()], fits, at_least=1)) for group in groups]
    return merge_summaries(_summarize_packs(packs, summarize), summarize, fits)


def merge_summaries(groups: Sequence[Sequence[str]], summarize: Summarize, fits: Fits | None = None) -> list[str]:
    """One summary from the summaries of each group's parts, as in `summarize_groups`; one alone is taken as it is.

    >>> merge_summaries([["Good.", "Bad."], ["Fine."], []], lambda texts: [text.replace("\\n", "/") for text in texts])
    ['Good./Bad.', 'Fine.', '']
    """
    summaries = [[text for text in group if text.strip()] for group in groups]
    while any(len(group) > 1 for group in summaries):
        # At least two of them in a pack, whether they fit or not: otherwise their number might never fall.
        packs = [list(_packs(group, fits, at_least=2)) if len(group) > 1 else [] for group in summaries]
        merged = _summarize_packs(packs, summarize, lone_stays=True)
        summaries = [
            [text for text in new if text.strip()] if new else old for new, old in zip(merged, summaries, strict=True)
        ]
    return [group[0] if group else "" for group in summaries]


def _packs(texts: Iterable[str], fits: Fits | None, at_least: int) -> Iterator[list[str]]:
    """Neighbouring texts together, as many as fit."""
    pack: list[str] = []
    for text in texts:
        if len(pack) >= at_least and fits is not None and not fits(join_reviews([*pack, text])):
            yield pack
            pack = []
        pack.append(text)
    if pack:
        yield pack


def _summarize_packs(
    packs: Sequence[Sequence[Sequence[str]]], summarize: Summarize, *, lone_stays: bool = False
) -> list[list[str]]:
    """The summary of each pack, by group; a pack of one text may be its own."""
    texts = [join_reviews(pack) for group in packs for pack in group if not (lone_stays and len(pack) == 1)]
    summaries = iter(summarized(texts, summarize))
    return [[pack[0] if lone_stays and len(pack) == 1 else next(summaries) for pack in group] for group in packs]


def summarized(texts: Sequence[str], summarize: Summarize) -> Sequence[str]:
    """A summary for each text; nothing is run where there is none.

    Raises:
        FreezeError: `summarize` returned another number of summaries than it was given texts.
    """
    summaries = summarize(texts) if texts else []
    if len(summaries) != len(texts):
        raise FreezeError(
            f"summarize was given {len(texts)} texts and returned {len(summaries)} summaries. Return one each."
        )
    return summaries


def group_key(value: Any, column: str, place: str) -> str:
    """The name of a row's group, as text: without white space around it, accents in their composed form.

    Args:
        value: The cell.
        column: Its column, for errors.
        place: Its row, for errors.

    Raises:
        ReviewsError: No name: rows without one would become one product. Or a value that is no name.

    >>> group_key(" B07 ", "product", "row 1"), group_key(7, "product", "row 1")
    ('B07', '7')
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        raise ReviewsError(
            f"{place} holds {value!r:.60} in column {column!r}, and a name or number is expected. Group by another "
            f"column."
        )
    missing = value is None or (isinstance(value, float) and math.isnan(value))  # as pandas has it
    key = "" if missing else unicodedata.normalize("NFC", str(value).strip())
    if not key:
        raise ReviewsError(
            f"{place} has nothing in column {column!r}, by which rows are grouped; all such rows would become one "
            f"group. Give it a name, or take the row out."
        )
    return key


class GroupStore:
    """Texts by group on disk, read back group by group in the order of the groups' first texts.

    Memory stays bounded whatever is added: SQLite keeps 64 MiB of its file. The file is the store's own, removed by
    `close` and, after a kill, by the next store in its place.

    Args:
        path: Where the file lies; on a disk with room for all texts.

    Raises:
        FreezeError: It cannot be written.

    >>> import tempfile
    >>> with GroupStore(Path(tempfile.mkdtemp(), "groups")) as store:
    ...     for group, text in (("mug", "Good."), ("kettle", "Loud."), ("mug", "Broke.")):
    ...         store.add(group, text)
    ...     list(store), store.rows, store.groups
    ([('mug', 'Good.'), ('mug', 'Broke.'), ('kettle', 'Loud.')], 3, 2)
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = self.groups = 0
        self._group: tuple[str, int] | None = None  # the last one that was added to
        path.unlink(missing_ok=True)
        with self._told():
            self._db = sqlite3.connect(path, isolation_level=None)
            # Nothing needs to survive a crash: the next run makes the store anew.
            for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{STORE_MEMORY}"):
                self._db.execute(f"PRAGMA {setting}")
            self._db.execute("CREATE TABLE groups (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)")
            self._db.execute("CREATE TABLE texts (id INTEGER PRIMARY KEY, of INTEGER NOT NULL, text TEXT NOT NULL)")
            self._db.execute("BEGIN")

    def add(self, group: str, text: str) -> None:
        """Takes a text, blank ones too."""
        with self._told():
            if self._group is None or self._group[0] != group:
                new = self._db.execute("INSERT OR IGNORE INTO groups (name) VALUES (?)", (group,)).rowcount
                found = self._db.execute("SELECT id FROM groups WHERE name = ?", (group,)).fetchone()
                self._group = (group, found[0])
                self.groups += new
            self._db.execute("INSERT INTO texts (of, text) VALUES (?, ?)", (self._group[1], text))
        self.rows += 1

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """All (group, text), the texts of a group together and in the order in which they were added."""
        with self._told():
            # Sorted by the index alone, which holds numbers and no texts; CROSS JOIN keeps the groups outside.
            self._db.execute("CREATE INDEX IF NOT EXISTS by_group ON texts (of)")
            yield from self._db.execute(
                "SELECT name, text FROM groups CROSS JOIN texts ON texts.of = groups.id ORDER BY groups.id, texts.id"
            )

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise FreezeError(
                f"The rows of each group were to be brought together in {self.path}: {error}. It needs about as much "
                f"room on disk as the input: free it, or write the output to another disk."
            ) from error

    def close(self) -> None:
        """Closes and removes the file."""
        self._db.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
