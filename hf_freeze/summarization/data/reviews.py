"""Reads reviews and their summaries through `datasets`, and says aloud what it read and what it left out.

It owns: finding the format, the columns and the rows that cannot be used, with their numbers. It refuses to
guess where a guess could lose a row: a broken line is an error with its line number, an unusable row is a
named and counted skip. It does not truncate, tokenize or word prompts.

Rows are read as they are streamed (`rows`), because the parsers of `datasets` know neither line numbers nor byte
offsets, and repair some broken files silently. What was read goes into an Arrow file in the cache of `datasets`.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_freeze.errors import ReviewsError, nearest
from hf_freeze.summarization.data.files import FORMATS, tell_missing, worded_reading
from hf_freeze.summarization.data.rows import Row, RowFiles, row_text

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "Reviews",
    "check_column",
    "choose_columns",
    "overlap",
    "read_reviews",
    "read_splits",
    "set_aside",
    "shipped_reviews",
    "with_notes",
]

# In order: the first that the source has is taken. Case, spaces and punctuation don't count ("Review Text").
TEXT_NAMES = ("review", "review_text", "text", "body", "content", "document", "article", "comment")
SUMMARY_NAMES = ("summary", "title", "review_title", "headline", "highlights", "abstract", "target")

LONG_REVIEW_CHARACTERS = 20_000  # some 5,000 tokens: more than the models of this package read
MOST_VALIDATION_ROWS = 1_000  # more would cost time at each evaluation and hardly narrow the estimate
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # owner/name; a bare "csv" names a builder of `datasets`


@dataclass(frozen=True, eq=False)
class Reviews:
    """Rows that can be trained or scored on, with the account of how they were read.

    `print(reviews)` is that account.
    """

    dataset: Dataset
    """Columns `review`, `summary` (if there is one), `row` (1-based, in the source), then all the others."""
    source: str
    rows_read: int
    text_column: str
    summary_column: str | None
    column_reason: str
    skipped: Mapping[str, list[int]] = field(default_factory=dict)
    """Reason -> numbers of the rows that were left out for it."""
    notes: tuple[str, ...] = ()
    """What is correct, but worth knowing."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __str__(self) -> str:
        lines = [f"{self.source}: {_count(self.rows_read, 'row')} read, {len(self):,} usable"]
        lines.append(f"  {self.column_reason}")
        for why, rows in self.skipped.items():
            lines.append(f"  {_count(len(rows), 'row')} skipped: {why} {_row_list(rows)}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def read_reviews(
    source: str | Path,
    *,
    text_column: str | None = None,
    summary_column: str | None = None,
    split: str | None = None,
    need_summaries: bool = True,
) -> Reviews:
    """Reads reviews from a file, a folder of files or a dataset of the hub.

    Args:
        source: a .csv, .tsv, .jsonl, .json, .ndjson (one object a line) or .parquet file, a folder of such
            files in one format (read in sorted order), or, where no such path exists, a hub id `owner/name`.
        text_column: the column that holds the review. None guesses it from well-known names, and says so.
        summary_column: the column that holds the summary; None guesses it too.
        split: the split of a hub dataset; None is "train". A local source has no splits.
        need_summaries: False for reviews that are to be summarised: summaries may be missing.

    Returns:
        The usable rows. Rows without a review or (where needed) a summary and exact repeats of an earlier row
        are left out, counted and named in `skipped`. All CSV and TSV columns stay text, as they are written:
        "NA", "007".

    Raises:
        ReviewsError: a missing or empty file, an unknown ending, mixed formats, no such column, bytes that
            are not UTF-8, a broken line, a column that is not text, or no usable row.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "shoes.csv")
    ...     _ = path.write_text("title,text\\nRuns small,Nice but I need a size up.\\nNo idea,\\n")
    ...     reviews = read_reviews(path)
    >>> reviews.dataset[0]
    {'review': 'Nice but I need a size up.', 'summary': 'Runs small', 'row': 1}
    >>> print(str(reviews).partition(": ")[2])
    2 rows read, 1 usable
      review from column 'text' (guessed from its name), summary from column 'title' (guessed from its name)
      1 row skipped: empty review (row 2)
    """
    path = Path(source).expanduser()
    if not path.exists():
        raw = _load_from_hub(str(source), path, split)
        columns = list(raw.column_names)
        choice = choose_columns(str(source), columns, text_column, summary_column, need_summaries)
        return _account(raw, str(source), choice, need_summaries, notes=(), rows=())

    if split is not None:
        raise ReviewsError(
            f"read_reviews was asked for split={split!r} of {path}, a local source, which has no splits. "
            f"Give each split's own file or folder, and no split."
        )
    files = RowFiles(path)
    if files.kind != "JSON lines":  # whose columns are known now, so that a wrong one costs no reading
        choose_columns(str(path), list(files.columns), text_column, summary_column, need_summaries)
    raw = _load_files(files)
    choice = choose_columns(str(path), raw.column_names, text_column, summary_column, need_summaries)
    if not len(raw):
        raise ReviewsError(f"{path} has no rows. Give a file with at least one review.")
    return _account(raw, str(path), choice, need_summaries, files.notes, files)


def shipped_reviews() -> dict[str, Reviews]:
    """Reads the reviews that come with the package: the splits train, validation and test, apart by product.

    Returns:
        Reviews whose datasets also carry `product_id`, `category` and `rating`.
    """
    folder = importlib.resources.files(__package__) / "shipped_reviews"
    splits = {}
    for name in ("train", "validation", "test"):
        with importlib.resources.as_file(folder / f"{name}.jsonl") as path:
            found = read_reviews(path, text_column="review", summary_column="summary")
        splits[name] = replace(found, column_reason="shipped with the package")  # nobody asked for these columns
    return splits


def read_splits(
    train: str | Path | None,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    *,
    text_column: str | None = None,
    summary_column: str | None = None,
    seed: int = 42,
) -> dict[str, Reviews]:
    """Reads up to three splits; sets validation rows aside where none are given.

    Args:
        train: a source as in `read_reviews`. A hub id is read at the split of that name.
        validation: None sets a tenth of train aside (at least 1 row, at most 1,000), drawn with `seed`.
        test: None scores on the validation rows, and says so.
        text_column: as in `read_reviews`, for all three.
        summary_column: as in `read_reviews`, for all three.
        seed: of the draw; 42 is also the default of TrainingArguments.

    Returns:
        The splits that there are, in the order train, validation, test. Reviews that stand in two splits are
        kept, and counted in the notes of the later one: whoever trains decides.

    Raises:
        ReviewsError: no source at all, fewer than 2 rows to train on, or whatever `read_reviews` raises.
    """
    sources = {"train": train, "validation": validation, "test": test}
    if all(source is None for source in sources.values()):
        raise ReviewsError("read_splits was given no source. Give train, validation or test.")
    splits = {}
    for name, source in sources.items():
        if source is not None:
            split = None if Path(source).expanduser().exists() else name
            splits[name] = read_reviews(source, text_column=text_column, summary_column=summary_column, split=split)
    if "train" in splits:
        if len(splits["train"]) < 2:
            raise ReviewsError(
                f"{train} has {_count(len(splits['train']), 'usable row')}; to train, at least 2 are needed. "
                f"What was read:\n{splits['train']}"
            )
        if validation is None:
            splits["train"], splits["validation"] = _draw_validation(splits["train"], seed)
    _note_overlaps(splits)
    if "test" not in splits and "validation" in splits:
        note = "no test source was given: these are the validation rows, and their score is not independent"
        splits["test"] = with_notes(splits["validation"], note)
    return {name: splits[name] for name in sources if name in splits}


def overlap(a: Reviews, b: Reviews) -> int:
    """Counts the rows of `b` whose review is also in `a`; case and white space don't count.

    Args:
        a: the reviews that may have been seen, as in train.
        b: the reviews whose rows are counted.
    """
    seen = {_fold(review) for review in _texts(a)}
    return sum(_fold(review) in seen for review in _texts(b))


# ------------------------------------------------------------------------------------------ finding the files


def _load_from_hub(source: str, path: Path, split: str | None) -> Dataset:
    if not HUB_ID.fullmatch(source) or path.suffix.lower() in FORMATS:
        raise ReviewsError(f"No file or folder {path}: {tell_missing(path)}. Check the path.")
    from datasets import load_dataset

    try:
        return load_dataset(source, split=split or "train")
    except Exception as error:  # the hub's client has whole families of errors: offline, gated, no such split
        raise ReviewsError(
            f"No file or folder {path} ({tell_missing(path)}), and the hub dataset {source!r} could not be "
            f"loaded at split {split or 'train'!r} ({error}). Check the path, the id and the network."
        ) from error


# ---------------------------------------------------------------------------------------------------- loading


def _load_files(files: RowFiles) -> Dataset:
    """The rows of all files, from a file of Arrow's that is mapped into memory; made unless these bytes have one."""
    from datasets import Dataset, config

    from hf_freeze.summarization.data.arrow import write_arrow

    digest = hashlib.blake2b(f"{files.kind}{files.separator}{list(files.columns)}".encode(), digest_size=16)
    for path in files.files:
        with worded_reading(path), path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    place = Path(config.HF_DATASETS_CACHE) / "hf_freeze" / f"{digest.hexdigest()}.arrow"
    try:
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            write_arrow(files, place)
        return Dataset.from_file(str(place))
    except OSError as error:
        raise ReviewsError(
            f"{files.path} could not be read as {files.kind}: {error}. What was read is kept in "
            f"{config.HF_DATASETS_CACHE}, which must have space."
        ) from error


# ------------------------------------------------------------------------------------------- choosing columns


def check_column(argument: str, name: str | None, source: str, columns: Sequence[str]) -> None:
    """Refuses a column that was asked for and is not there."""
    if name is not None and name not in columns:
        raise ReviewsError(
            f"{argument}={name!r} was asked for, but {source} has no such column. It has "
            f"{', '.join(map(repr, columns)) or 'none'}; nearest: {nearest(name, columns)}."
        )


def choose_columns(
    source: str, columns: list[str], text: str | None, summary: str | None, need_summaries: bool
) -> tuple[str, str | None, str]:
    """The source's names of the text and the summary column, and why these."""
    check_column("text_column", text, source, columns)
    check_column("summary_column", summary, source, columns)
    if text is not None and text == summary:
        raise ReviewsError(
            f"text_column and summary_column are both {text!r}. {source} has "
            f"{', '.join(map(repr, columns))}: name two of them."
        )
    text_given, summary_given = text is not None, summary is not None
    if text is None:
        text = _guess(columns, TEXT_NAMES, taken=summary)
    if text is None:
        raise ReviewsError(_no_guess("review", source, columns, TEXT_NAMES, "text_column"))
    if summary is None:
        summary = _guess(columns, SUMMARY_NAMES, taken=text)
    if summary is None and need_summaries:
        raise ReviewsError(_no_guess("summary", source, columns, SUMMARY_NAMES, "summary_column"))
    why = {True: "as asked", False: "guessed from its name"}
    reason = f"review from column {text!r} ({why[text_given]})"
    if summary is None:
        return text, None, reason + ", no column of summaries"
    return text, summary, reason + f", summary from column {summary!r} ({why[summary_given]})"


def _guess(columns: list[str], known: Sequence[str], taken: str | None) -> str | None:
    def fold(name: str) -> str:
        return re.sub(r"[\W_]+", "", name.casefold())

    by_folded = {fold(name): name for name in reversed(columns) if name != taken}
    return next((by_folded[fold(name)] for name in known if fold(name) in by_folded), None)


def _no_guess(what: str, source: str, columns: list[str], known: Sequence[str], argument: str) -> str:
    return (
        f"{source} has no column that is known to hold the {what} ({', '.join(known)}). It has "
        f"{', '.join(map(repr, columns))}: name one of them with {argument} (in a shell: --{argument})."
    )


# ------------------------------------------------------------------------------------------ rows, used or not


def _account(
    raw: Dataset,
    source: str,
    choice: tuple[str, str | None, str],
    need_summaries: bool,
    notes: tuple[str, ...],
    rows: Iterable[Row],
) -> Reviews:
    """Names the columns, numbers the rows, and leaves out those that can't be used."""
    text, summary, reason = choice
    for name in (text, summary) if summary else (text,):
        kind = str(getattr(raw.features[name], "dtype", raw.features[name]))
        # null is a column without any value: its rows are skipped by name
        if kind not in ("string", "large_string", "string_view", "null"):
            for row in rows:
                row_text(row, name)  # names the first that holds something else
            raise ReviewsError(
                f"Column {name!r} of {source} does not hold text: its type is {kind}. Name another column, or write "
                f"its values as strings."
            )
    dataset, renamed = _named(raw, text, summary)
    keep, skipped, curious = _sort_out(dataset, need_summaries)
    notes += tuple(f"column {old!r} is kept as {new!r}" for old, new in renamed.items())
    notes += tuple(f"kept: {_count(len(rows), what)} {_row_list(rows)}" for what, rows in curious.items() if rows)
    if len(keep) < len(dataset):
        dataset = dataset.select(keep)
    reviews = Reviews(dataset, source, raw.num_rows, text, summary, reason, skipped, notes)
    if not keep:
        raise ReviewsError(
            f"No usable row; needed is {'a review and a summary' if need_summaries else 'a review'} in one. "
            f"What was read:\n{reviews}"
        )
    return reviews


def _named(raw: Dataset, text: str, summary: str | None) -> tuple[Dataset, dict[str, str]]:
    """The dataset with our three columns first, and the names that had to make way for them."""
    import numpy as np

    ours = {text: "review"} | ({summary: "summary"} if summary else {})
    moved = {}
    for name in ("review", "summary", "row"):
        if name in raw.column_names and name not in ours:
            new = f"source_{name}"
            while new in raw.column_names:
                new = f"source_{new}"
            moved[name] = new
    dataset = raw.rename_columns(moved)  # in two steps, because one name may be given up and taken
    dataset = dataset.rename_columns({old: new for old, new in ours.items() if old != new})
    dataset = dataset.add_column("row", np.arange(1, len(dataset) + 1))
    first = [*ours.values(), "row"]
    return dataset.select_columns(first + [name for name in dataset.column_names if name not in first]), moved


def _sort_out(dataset: Dataset, need_summaries: bool) -> tuple[list[int], dict[str, list[int]], dict[str, list[int]]]:
    """Indices of the usable rows, rows skipped by reason, and rows worth a note."""
    has_summary = "summary" in dataset.column_names
    skipped: dict[str, list[int]] = {"empty review": [], "missing summary": [], "duplicate row": []}
    one_word, very_long = "review of one word", f"review of over {LONG_REVIEW_CHARACTERS:,} characters"
    curious: dict[str, list[int]] = {one_word: [], very_long: []}
    keep, seen = [], set()
    for index, row in enumerate(_rows(dataset, ["review", *(["summary"] if has_summary else [])])):
        review, summary = row["review"] or "", row.get("summary") or ""
        key = hashlib.blake2b(f"{len(review)} {review}{summary}".encode(), digest_size=16).digest()
        if not review.strip():
            skipped["empty review"].append(index + 1)
        elif need_summaries and not summary.strip():
            skipped["missing summary"].append(index + 1)
        elif need_summaries and key in seen:  # a row to summarise keeps its place, even twice
            skipped["duplicate row"].append(index + 1)
        else:
            keep.append(index)
            seen.add(key)
            if len(review.split()) == 1:
                curious[one_word].append(index + 1)
            if len(review) > LONG_REVIEW_CHARACTERS:
                curious[very_long].append(index + 1)
    return keep, {why: rows for why, rows in skipped.items() if rows}, curious


def _rows(dataset: Dataset, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a few columns, a thousand at a time: a row at a time is 50 times slower."""
    for batch in dataset.select_columns(columns).iter(batch_size=1000):
        for values in zip(*(batch[name] for name in columns), strict=True):
            yield dict(zip(columns, values, strict=True))


def _texts(reviews: Reviews) -> Iterator[str]:
    return (row["review"] for row in _rows(reviews.dataset, ["review"]))


def _fold(review: str) -> bytes:
    return hashlib.blake2b(" ".join(review.casefold().split()).encode(), digest_size=16).digest()


# ----------------------------------------------------------------------------------------------------- splits


def _draw_validation(train: Reviews, seed: int) -> tuple[Reviews, Reviews]:
    import numpy as np

    count = min(max(len(train) // 10, 1), MOST_VALIDATION_ROWS)
    drawn = np.random.default_rng(seed).permutation(len(train))[:count]
    note = f"{_count(count, 'row')} of {len(train):,} set aside for validation (seed {seed})"
    return set_aside(train, set(drawn.tolist()), note)


def set_aside(train: Reviews, drawn: Container[int], note: str) -> tuple[Reviews, Reviews]:
    """The rows that stay and those at the places drawn, both in the order of the source."""
    stay, aside = ([at for at in range(len(train)) if (at in drawn) == is_drawn] for is_drawn in (False, True))
    rest = replace(with_notes(train, note), dataset=train.dataset.select(stay))
    return rest, replace(train, dataset=train.dataset.select(aside), rows_read=len(aside), skipped={}, notes=(note,))


def _note_overlaps(splits: dict[str, Reviews]) -> None:
    names = list(splits)
    for place, later in enumerate(names):
        for earlier in names[:place]:
            shared = overlap(splits[earlier], splits[later])
            if shared:
                note = f"{shared:,} of its {_count(len(splits[later]), 'review')} also in {earlier}"
                splits[later] = with_notes(splits[later], note)


def with_notes(reviews: Reviews, *notes: str) -> Reviews:
    """The same with more notes."""
    return replace(reviews, notes=reviews.notes + notes)


def _count(number: int, noun: str) -> str:
    """A number and its noun, whose first word takes the plural: "2 reviews of one word"."""
    head, _, tail = noun.partition(" of ")
    return f"{number:,} {head}{'' if number == 1 else 's'}" + (f" of {tail}" if tail else "")


def _row_list(rows: Sequence[int], shown: int = 5) -> str:
    listed = ", ".join(str(row) for row in rows[:shown]) + (", ..." if len(rows) > shown else "")
    return f"({'row' if len(rows) == 1 else 'rows'} {listed})"
