"""Reads reviews and their summaries through `datasets`, and says aloud what it read and what it left out.

It owns: finding the format, the columns and the rows that cannot be used, with their numbers. It refuses to
guess where a guess could lose a row: a broken line is an error with its line number, an unusable row is a
named and counted skip. It does not truncate, tokenize or word prompts.

Rows are read as they are streamed (`row_files`), because the parsers of `datasets` know neither line numbers nor
byte offsets, and repair some broken files silently. Tables come from there; JSON lines and Parquet, whose columns
have types, are parsed by `datasets`, and what it made of the texts is compared.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.resources
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_freeze.errors import ReviewsError, nearest
from hf_freeze.files import whole
from hf_freeze.summarization.data.files import FORMATS, digest_file, tell_missing, word_kind
from hf_freeze.summarization.data.rows import RowFiles

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Reviews", "choose_columns", "overlap", "read_reviews", "read_splits", "shipped_reviews"]

# In order: the first that the source has is taken. Case, spaces and punctuation don't count ("Review Text").
TEXT_NAMES = ("review", "review_text", "text", "body", "content", "document", "article", "comment")
SUMMARY_NAMES = ("summary", "title", "review_title", "headline", "highlights", "abstract", "target")

LONG_REVIEW_CHARACTERS = 20_000  # some 5,000 tokens: more than the models of this package read
MOST_VALIDATION_ROWS = 1_000  # more would cost time at each evaluation and hardly narrow the estimate
TABLE_BATCH = 1_000  # rows of a table that are kept together
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
        return _account(raw, str(source), choice, need_summaries, notes=(), not_text={})

    if split is not None:
        raise ReviewsError(
            f"read_reviews was asked for split={split!r} of {path}, a local source, which has no splits. "
            f"Give each split's own file or folder, and no split."
        )
    files = RowFiles(path)
    kinds = _read_through(files) if files.kind == "JSON lines" else {}
    # before loading, so that a wrong column costs no parsing
    choice = choose_columns(str(path), list(files.columns), text_column, summary_column, need_summaries)
    raw = _load_files(files, kinds)
    if not len(raw):
        raise _no_rows(path)
    not_text = {
        name: f"{place} holds {kind} there"
        for name, places in kinds.items()
        for kind, place in reversed(places.items())  # the first place wins
        if kind not in ("a string", "null")
    }
    reviews = _account(raw, str(path), choice, need_summaries, files.notes, not_text)
    if files.kind == "JSON lines":
        _compare(raw, files, [name for name in choice[:2] if name])
    return reviews


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
            splits["train"], splits["validation"] = _set_aside(splits["train"], seed)
    _note_overlaps(splits)
    if "test" not in splits and "validation" in splits:
        note = "no test source was given: these are the validation rows, and their score is not independent"
        splits["test"] = _with_notes(splits["validation"], note)
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


def _read_through(files: RowFiles) -> dict[str, dict[str, str]]:
    """Reads all JSON lines, so that a broken one is named; kinds of values by column, each with its first place."""
    kinds: dict[str, dict[str, str]] = {}
    for row in files:
        for name, value in row.values.items():
            kinds.setdefault(name, {}).setdefault(word_kind(value), row.place)
    return kinds


def _no_rows(path: str | Path) -> ReviewsError:
    return ReviewsError(f"{path} has no rows. Give a file with at least one review.")


def _load_files(files: RowFiles, kinds: Mapping[str, Mapping[str, str]]) -> Dataset:
    from datasets import Dataset, config

    # `datasets` keys its cache by path and time of change; the digest adds the content.
    digests = "".join(digest_file(file, utf8=files.kind != "Parquet") for file in files.files)
    digest = hashlib.blake2b(f"{digests}{files.kind}{files.separator}".encode(), digest_size=16).hexdigest()
    # not load_dataset, which asks a server to count even a local file's use
    try:
        with _quiet():
            if files.kind in ("CSV", "TSV"):
                return _load_table(files, Path(config.HF_DATASETS_CACHE) / "hf_freeze" / f"{digest}.arrow")
            names = [glob.escape(str(file.resolve())) for file in files.files]  # it takes "[1]" and "*" for patterns
            read = Dataset.from_json if files.kind == "JSON lines" else Dataset.from_parquet
            raw = read(names, config_name=digest)
            raw.data.validate(full=True)  # Parquet may hold strings that are not UTF-8
            return raw
    except Exception as error:  # a foreign reader may raise anything
        if isinstance(error, ReviewsError):
            raise
        for _ in files:  # which names the row, where the file is at fault
            pass
        mixed = (
            f"column {name!r} holds {' and '.join(f'{kind} ({places[kind]})' for kind in places if kind != 'null')}"
            for name, places in kinds.items()
            if len(places.keys() - {"null"}) > 1
        )
        reason = error.__cause__ or error
        advice = "All rows must have the same columns, each once and of one type."
        if isinstance(reason, OSError):
            advice = f"`datasets` keeps what it has read in {config.HF_DATASETS_CACHE}, which must have space."
        raise ReviewsError(
            f"{files.path} could not be read as {files.kind}: {next(mixed, str(reason).strip())}. {advice}"
        ) from error


def _load_table(files: RowFiles, place: Path) -> Dataset:
    """The rows of tables by our own reader, from a file that is mapped into memory.

    All columns are text, exactly as written: a type that is inferred would turn "NA" into nothing and "007" into 7.
    """
    import pyarrow as pa
    from datasets import Dataset

    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        schema = pa.schema([(name, pa.string()) for name in files.columns])
        rows = iter(files)
        with whole(place) as name, pa.OSFile(str(name), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
            while batch := [list(row.values.values()) for row in itertools.islice(rows, TABLE_BATCH)]:
                columns = [pa.array(cells, pa.string()) for cells in zip(*batch, strict=True)]
                stream.write_batch(pa.record_batch(columns, schema))
    return Dataset.from_file(str(place))


def _compare(raw: Dataset, files: RowFiles, columns: list[str]) -> None:
    """Makes sure that `datasets` has read every text as it is written."""
    pairs = itertools.zip_longest(_rows(raw, columns), files)
    for loaded, row in pairs:
        texts = {name: row.values.get(name) for name in columns} if row else None
        if loaded != texts:
            raise ReviewsError(
                f"{row.place if row else files.path} was read as {loaded!r:.100}, and {texts!r:.100} is what it "
                f"holds. Write the reviews as CSV or Parquet."
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars of `datasets`, since a local file is read before one could be looked at, and without its log."""
    from datasets import config, disable_progress_bars, enable_progress_bars
    from datasets.utils import are_progress_bars_disabled, logging

    # where the environment has decided, the switches only warn
    switch = config.HF_DATASETS_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    if switch:
        disable_progress_bars()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # an error is worded here
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if switch:
            enable_progress_bars()


# ------------------------------------------------------------------------------------------- choosing columns


def choose_columns(
    source: str, columns: list[str], text: str | None, summary: str | None, need_summaries: bool
) -> tuple[str, str | None, str]:
    """The source's names of the text and the summary column, and why these."""
    for argument, name in (("text_column", text), ("summary_column", summary)):
        if name is not None and name not in columns:
            raise ReviewsError(
                f"{argument}={name!r} was asked for, but {source} has no such column. It has "
                f"{', '.join(map(repr, columns))}; nearest: {nearest(name, columns)}."
            )
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
    not_text: Mapping[str, str],
) -> Reviews:
    """Names the columns, numbers the rows, and leaves out those that can't be used."""
    text, summary, reason = choice
    for name in (text, summary) if summary else (text,):
        kind = str(getattr(raw.features[name], "dtype", raw.features[name]))
        # null is a column without any value: its rows are skipped by name
        if name in not_text or kind not in ("string", "large_string", "string_view", "null"):
            raise ReviewsError(
                f"Column {name!r} of {source} does not hold text: {not_text.get(name, f'its type is {kind}')}. "
                f"Name another column, or write its values as strings."
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
    with _quiet():
        # in two steps, because one name may be given up and taken
        dataset = raw.rename_columns(moved)
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


def _set_aside(train: Reviews, seed: int) -> tuple[Reviews, Reviews]:
    import numpy as np

    count = min(max(len(train) // 10, 1), MOST_VALIDATION_ROWS)
    order = np.random.default_rng(seed).permutation(len(train))
    note = f"{_count(count, 'row')} of {len(train):,} set aside for validation (seed {seed})"
    # sorted: both parts keep the order of the source
    rest = replace(_with_notes(train, note), dataset=train.dataset.select(np.sort(order[count:])))
    drawn = train.dataset.select(np.sort(order[:count]))
    aside = replace(train, dataset=drawn, rows_read=count, skipped={}, notes=(note,))
    return rest, aside


def _note_overlaps(splits: dict[str, Reviews]) -> None:
    names = list(splits)
    for place, later in enumerate(names):
        for earlier in names[:place]:
            shared = overlap(splits[earlier], splits[later])
            if shared:
                note = f"{shared:,} of its {_count(len(splits[later]), 'review')} also in {earlier}"
                splits[later] = _with_notes(splits[later], note)


def _with_notes(reviews: Reviews, *notes: str) -> Reviews:
    return replace(reviews, notes=reviews.notes + notes)


def _count(number: int, noun: str) -> str:
    """A number and its noun, whose first word takes the plural: "2 reviews of one word"."""
    head, _, tail = noun.partition(" of ")
    return f"{number:,} {head}{'' if number == 1 else 's'}" + (f" of {tail}" if tail else "")


def _row_list(rows: Sequence[int], shown: int = 5) -> str:
    listed = ", ".join(str(row) for row in rows[:shown]) + (", ..." if len(rows) > shown else "")
    return f"({'row' if len(rows) == 1 else 'rows'} {listed})"
