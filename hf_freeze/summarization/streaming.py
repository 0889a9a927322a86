"""Summaries of files of any size, in bounded memory: window by window, resumed after a kill to the same bytes.

Rows are taken in windows, and what a window gives is a shard of the output (`resumable`). Of several processes the
first reads and writes, and each generates its share of each window. Nothing here loads a model.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_freeze.errors import FreezeError, ReviewsError
from hf_freeze.files import json_digest
from hf_freeze.given import check_kind, check_model, check_path
from hf_freeze.processes import agreed, from_first, rank_and_world
from hf_freeze.summarization.data.grouping import (
    Fits,
    GroupStore,
    Summarize,
    fits_prompt,
    group_key,
    merge_summaries,
    summarize_groups,
    summarized,
)
from hf_freeze.summarization.data.lines import RowLines
from hf_freeze.summarization.data.reviews import check_column, choose_columns
from hf_freeze.summarization.data.rows import GivenRows, Row, RowFiles, row_text
from hf_freeze.summarization.generation import generate_summaries
from hf_freeze.summarization.prompts import SummaryPrompt, read_prompt
from hf_freeze.summarization.resumable import ResumableFile, check_free
from hf_freeze.summarization.windows import WINDOW_ROWS, Entry, cut_windows
from hf_freeze.tensors import named_tensors, tensor_digest, unwrap

__all__ = ["WINDOW_ROWS", "FileReport", "check_places", "stream_summaries", "summarize_file"]

COUNT_COLUMN = "review_count"  # of a group, in the output
BAR_ROWS = 4096  # between two moves of the bar while a file is only read


@dataclass(frozen=True)
class FileReport:
    """What became of a file. Prints as a few lines.

    Attributes:
        output: The finished file.
        rows: Rows that were read, by this run and those before it.
        lines: Lines that were written: a row each, or a group each.
        blank: Lines of them without a summary, since there was no review to summarise.
        text_column: Where the reviews were.
        rows_before: Rows that earlier runs had done.
        seconds: Of this run.
        notes: What is correct, but worth knowing.
    """

    output: Path
    rows: int
    lines: int
    blank: int
    text_column: str
    rows_before: int
    seconds: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        by_row = self.lines == self.rows
        what = f"{self.lines - self.blank:,} summaries" if by_row else f"{self.lines:,} groups from {self.rows:,} rows"
        speed = (self.rows - self.rows_before) / max(self.seconds, 1e-9)
        lines = [f"{what} in {self.output}: {speed:,.1f} rows a second"]
        if self.rows_before:
            lines.append(f"  went on after row {self.rows_before:,}")
        if self.blank:
            lines.append(f"  {self.blank:,} {'more ' * by_row}without a summary: there was no review")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {**asdict(self), "output": str(self.output)}


def summarize_file(
    model: Any,
    tokenizer: Any,
    source: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    output: str | os.PathLike[str],
    *,
    prompt: SummaryPrompt | None = None,
    text_column: str | None = None,
    group_by: str | None = None,
    summary_column: str = "summary",
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    num_beams: int = 1,
    precision: str | None = None,
    window_rows: int = WINDOW_ROWS,
    total_rows: int | None = None,
    progress: bool = True,
    say: Callable[[str], object] | None = None,
    **generate_kwargs: Any,
) -> FileReport:
    """Summarises a file of any size in bounded memory; called again after a kill, it ends with the same bytes.

    Called again with another model, prompt, input, column or option it refuses to go on; `batch_size` and the number of
    processes may change (less memory, other machines), which can move a summary by rounding and is noted. Under several
    processes every one of them must call. Changes neither model nor tokenizer.

    Args:
        model, tokenizer, batch_size, num_beams, precision, **generate_kwargs: As in `generate_summaries`.
        source, output, text_column, group_by, summary_column, window_rows, total_rows, progress, say: As in
            `stream_summaries`.
        prompt: What the model was trained with (`load_prompt`); `read_prompt(tokenizer, model.config)` by default.
        max_new_tokens: The longest summary; the prompt's `max_summary_tokens` by default.

    Returns:
        The report, in every process.

    Raises:
        FreezeError: As `stream_summaries` and `generate_summaries` raise.

    >>> import tempfile
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_freeze.inputs.tokenizer import doctest_tokenizer
    >>> sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes))
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "reviews.csv").write_text("id,review\\n7,Good mug.\\n8,\\n")
    >>> report = summarize_file(model, doctest_tokenizer(), folder / "reviews.csv", folder / "summaries.csv",
    ...     max_new_tokens=4, progress=False)
    >>> report.rows, report.blank, (folder / "summaries.csv").read_text().splitlines()[::2]
    (2, 1, ['id,review,summary', '8,,'])
    """
    check_model("summarize_file", model)
    check_path("summarize_file", "output", output)
    kinds = (str, os.PathLike, Iterable)
    check_kind("summarize_file", "source", source, kinds, "a file's path or rows", "source='reviews.csv'")
    core = unwrap(model)
    if prompt is None:
        prompt = read_prompt(tokenizer, core.config, max_summary_tokens=max_new_tokens or 64)
    decoding: dict[str, Any] = {
        "max_new_tokens": max_new_tokens or prompt.max_summary_tokens,
        "num_beams": num_beams,
        "precision": precision,
    }

    def summarize(texts: Sequence[str]) -> list[str]:
        return generate_summaries(
            model, tokenizer, texts, prompt=prompt, batch_size=batch_size, progress=False, **decoding, **generate_kwargs
        )

    facts: dict[str, Any] = {}
    if rank_and_world()[0] == 0:
        facts = {
            "model": json_digest(sorted((name, tensor_digest(tensor)) for name, tensor in named_tensors(core))),
            "prompt": json_digest(prompt.identity),
            "tokenizer": json_digest(sorted(tokenizer.get_vocab().items())),
            **decoding,
            "precision": precision or str(core.dtype).removeprefix("torch."),
            "options of generate": {name: str(value) for name, value in sorted(generate_kwargs.items())},
        }
    return stream_summaries(
        summarize,
        source,
        output,
        text_column=text_column,
        group_by=group_by,
        summary_column=summary_column,
        fits=fits_prompt(prompt),
        window_rows=window_rows,
        total_rows=total_rows,
        facts=facts,
        circumstances={"batch_size": batch_size, "device": core.device.type, "torch": torch.__version__},
        progress=progress,
        say=say,
    )


def stream_summaries(
    summarize: Summarize,
    source: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    output: str | os.PathLike[str],
    *,
    text_column: str | None = None,
    group_by: str | None = None,
    summary_column: str = "summary",
    fits: Fits | None = None,
    window_rows: int = WINDOW_ROWS,
    total_rows: int | None = None,
    facts: Mapping[str, Any] | None = None,
    circumstances: Mapping[str, Any] | None = None,
    progress: bool = True,
    say: Callable[[str], object] | None = None,
) -> FileReport:
    """What `summarize_file` does, with any function from texts to summaries.

    Files are read through once before anything is summarised, so that a broken row in the last line stops a run at its
    beginning. With `group_by` that pass copies the texts to a store on disk beside the output, as large as they are
    (`GroupStore`), since the rows of a group may lie anywhere; a group larger than a window is summarised in parts. At
    the end, while the shards of the output are joined, they take twice its room.

    Args:
        summarize: From texts that are not blank to their summaries, in order; always the same for the same texts.
        source: A file or folder as in `RowFiles`, or rows as mappings; an iterable is read once and must give the same
            rows again when a run is resumed.
        output: A .csv, .tsv or .jsonl file that does not exist. Each row keeps all its columns and its place, and gets
            the summary. With `group_by`: the group, `review_count` (of those not blank) and the summary, groups in the
            order of their first rows.
        text_column: The column with the review; guessed from its name by default.
        group_by: The column that tells the group. White space around its values does not count.
        summary_column: The column that is added.
        fits: For groups: whether the model takes a text whole (`fits_prompt`); None: always.
        window_rows: Rows that are summarised together, and at most lost by a kill; a window also ends at 4 million
            characters. Memory grows with it.
        total_rows: Rows of an iterable, for the time left; files are counted.
        facts: JSON values by name that a run must share with the one it goes on from.
        circumstances: The same for what may change and is then noted.
        progress: Bars with the time left.
        say: Takes messages on the way, such as the column that was guessed; None tells nobody.

    Returns:
        The report, in every process.

    Raises:
        ReviewsError: Rows or columns are not as asked, with the line; what was summarised before stays.
        ResumeError: What lies there is of another run; the difference is named.
        FreezeError: The output exists, is the input or cannot be written; another process writes it.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> rows = ({"product": f"p{n % 2}", "review": f"{n} stars"} for n in range(4))
    >>> _ = stream_summaries(lambda texts: [text.replace("\\n", "; ") for text in texts], rows, folder / "out.csv",
    ...     group_by="product", progress=False)
    >>> print((folder / "out.csv").read_text().strip())
    product,review_count,summary
    p0,2,0 stars; 2 stars
    p1,2,1 stars; 3 stars
    """
    rank, world = rank_and_world()
    if rank > 0:
        return _follow(summarize)
    lead = _Lead(summarize)
    try:
        if isinstance(window_rows, bool) or not isinstance(window_rows, int) or window_rows < 1:
            raise FreezeError(f"window_rows={window_rows!r} was asked for; it is a whole number, 1 or more.")
        if total_rows is None and isinstance(source, Sized) and not isinstance(source, str):
            total_rows = len(source)
        say = say or (lambda message: None)
        job = _Job(lead, fits, text_column, group_by, summary_column, window_rows, total_rows, progress, say)
        circumstances = {"processes": world, **(circumstances or {})}
        report = _run(job, source, Path(output).expanduser(), facts or {}, circumstances)
    except Exception as error:
        lead.end(error)
        raise
    lead.end(report)
    return report


def check_places(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    text_column: str | None = None,
    group_by: str | None = None,
    summary_column: str = "summary",
) -> None:
    """Looks at files and columns without reading rows, so that a mistake need not wait for a model to load.

    The arguments are those of `stream_summaries`.

    Raises:
        FreezeError: What `stream_summaries` would raise before its first row.
    """
    path = Path(output).expanduser()
    rows = _open_source(source, path)
    _text_column(rows, text_column, group_by)
    _lines_of(rows, path, group_by, summary_column)
    check_free(path)


class _Job(NamedTuple):
    """What was asked, but for places."""

    summarize: Summarize
    fits: Fits | None
    text_column: str | None
    group_by: str | None
    summary_column: str
    window_rows: int
    total_rows: int | None
    progress: bool
    say: Callable[[str], object]


@dataclass(frozen=True)
class _Done:
    """How far a run is. Of a group that the last window held a part of: the summaries of its parts, and its reviews."""

    rows: int = 0
    lines: int = 0
    blank: int = 0
    parts: Sequence[str] = ()
    reviews: int = 0


def _run(
    job: _Job, source: Any, output: Path, facts: Mapping[str, Any], circumstances: Mapping[str, Any]
) -> FileReport:
    started = time.perf_counter()
    rows = _open_source(source, output)
    text_column = _text_column(rows, job.text_column, job.group_by)
    how = "guessed from its name" if job.text_column is None else "as asked"
    job.say(f"{rows.name}: reviews in column {text_column!r} ({how})")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(ResumableFile(output))
        if job.group_by is None:
            total = _count(rows, text_column, job.progress) if isinstance(rows, RowFiles) else job.total_rows
            entries = (Entry("", row_text(row, text_column), row) for row in rows)
        else:
            store = stack.enter_context(GroupStore(file.folder / "groups.tmp"))
            _fill(store, rows, text_column, job.group_by, job.progress)
            total, entries = store.rows, (Entry(group, text) for group, text in store)
            job.say(f"{store.rows:,} rows of {store.groups:,} groups by {job.group_by!r}")
        choose_columns(rows.name, list(rows.columns), text_column, None, False)  # JSON lines may name more by now
        lines = _lines_of(rows, output, job.group_by, job.summary_column)
        asked = {"text_column": text_column, "window_rows": job.window_rows, "group_by": job.group_by}
        asked |= {"summary_column": job.summary_column, "header": lines.header}
        done = before = _Done(**file.begin({**facts, **asked}, circumstances))
        if before.rows:
            job.say(f"{file.folder} goes on after row {before.rows:,}")
        file.skip((entry.mark for entry in entries), before.rows)
        with _bar("summaries", "row", total, job.progress, initial=before.rows) as bar:
            for window, closed in cut_windows(entries, job.window_rows):
                content = "" if done.rows else lines.header
                if job.group_by is None:
                    written, done = _summarize_rows(job, window, lines, done)
                else:
                    written, done = _summarize_groups(job, window, closed, lines, done)
                file.append(content + written, (entry.mark for entry in window), asdict(done))
                bar.update(len(window))
        if not done.rows:
            raise ReviewsError(f"{rows.name} has no rows. Give at least one review.")
        file.finish()
    notes = tuple(f"{note}: summaries may differ from one whole run's by rounding" for note in file.notes)
    seconds = time.perf_counter() - started
    return FileReport(output, done.rows, done.lines, done.blank, text_column, before.rows, seconds, notes)


# ---------------------------------------------------------------------------------------------------------------------
# The input


def _open_source(source: Any, output: Path) -> RowFiles | GivenRows:
    if not isinstance(source, str | os.PathLike):
        return GivenRows(source)
    path = Path(source).expanduser()
    same = output.exists() and path.exists() and output.samefile(path)
    if same or output.parent.resolve() == path.resolve():
        raise FreezeError(
            f"The summaries were to be written to {output}, which {'is the input' if same else 'lies in the input'}. "
            f"Choose another place."
        )
    return RowFiles(path)


def _text_column(rows: RowFiles | GivenRows, asked: str | None, group_by: str | None) -> str:
    """The column of the reviews. Of JSON lines only the first is known here: one may lack the column that is asked."""
    columns = list(rows.columns)
    check_column("group_by", group_by, rows.name, columns)
    if group_by == COUNT_COLUMN:
        raise ReviewsError(
            f"group_by={COUNT_COLUMN!r} was asked for; the output has a column of that name for the number of reviews. "
            f"Rename the input's."
        )
    if asked is not None and isinstance(rows, RowFiles) and rows.kind == "JSON lines":
        return asked
    return choose_columns(rows.name, columns, asked, None, False)[0]


def _lines_of(rows: RowFiles | GivenRows, output: Path, group_by: str | None, summary_column: str) -> RowLines:
    columns, header = (list(rows.columns), rows.header) if group_by is None else ([group_by, COUNT_COLUMN], None)
    return RowLines(output, columns, summary_column, rows.separator, header)


def _count(rows: RowFiles, text_column: str, progress: bool) -> int:
    """Reads all rows, so that a broken one is known before anything is summarised; how many there are."""
    return sum(row_text(row, text_column) is not None for row in _under_bar(rows, "checking", progress))


def _fill(store: GroupStore, rows: RowFiles | GivenRows, text_column: str, group_by: str, progress: bool) -> None:
    for row in _under_bar(rows, "grouping", progress):
        store.add(group_key(row.values.get(group_by), group_by, row.place), row_text(row, text_column))


def _under_bar(rows: RowFiles | GivenRows, label: str, progress: bool) -> Iterator[Row]:
    """The rows, under a bar of bytes for a file."""
    if not isinstance(rows, RowFiles):
        yield from rows
        return
    with _bar(label, "B", rows.total_bytes, progress) as bar:
        for number, row in enumerate(rows, 1):
            yield row
            if number % BAR_ROWS == 0:
                bar.update(rows.position - bar.n)
        bar.update(rows.position - bar.n)


def _bar(label: str, unit: str, total: int | None, progress: bool, initial: int = 0) -> Any:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    return tqdm(desc=label, unit=unit, total=total, initial=initial, unit_scale=unit == "B", disable=not progress)


# ---------------------------------------------------------------------------------------------------------------------
# One window


def _summarize_rows(job: _Job, window: list[Entry], lines: RowLines, done: _Done) -> tuple[str, _Done]:
    """The lines of a window of rows, and how far the run is then."""
    texts = [entry.text for entry in window if entry.text.strip()]
    summaries = iter(summarized(texts, job.summarize))
    written = [
        lines.line(entry.row, next(summaries) if entry.text.strip() else "")
        for entry in window
        if entry.row is not None
    ]
    rows = len(window)
    return "".join(written), _Done(done.rows + rows, done.lines + rows, done.blank + rows - len(texts))


def _summarize_groups(job: _Job, window: list[Entry], closed: bool, lines: RowLines, done: _Done) -> tuple[str, _Done]:
    """The same for groups; the first may go on from the window before, the last into the next."""
    names, groups = [], []
    for name, entries in itertools.groupby(window, lambda entry: entry.group):
        names.append(name)
        groups.append([entry.text for entry in entries if entry.text.strip()])
    summaries = summarize_groups(groups, job.summarize, job.fits)
    counts = [len(group) for group in groups]
    counts[0] += done.reviews
    parts = [*done.parts, *([summaries[0]] if summaries[0] else [])]
    rows = done.rows + len(window)
    if not closed:  # one group and no end of it
        return "", _Done(rows, done.lines, done.blank, parts, counts[0])
    summaries[0] = merge_summaries([parts], job.summarize, job.fits)[0]
    written = [
        lines.line(Row({str(job.group_by): name, COUNT_COLUMN: count}, f"group {name!r}"), summary)
        for name, count, summary in zip(names, counts, summaries, strict=True)
    ]
    return "".join(written), _Done(rows, done.lines + len(written), done.blank + counts.count(0))


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


class _Lead:
    """`summarize` for the first process: hands the texts to the others, which call it at the same time."""

    def __init__(self, summarize: Summarize) -> None:
        self.summarize = summarize
        self.together = True  # False: the others have raised what this one raised

    def __call__(self, texts: Sequence[str]) -> Sequence[str]:
        from_first(list(texts))
        try:
            with agreed("summarise the reviews"):
                return self.summarize(texts)
        except Exception:
            self.together = False
            raise

    def end(self, outcome: FileReport | Exception) -> None:
        """Lets the others return or raise the same."""
        if self.together:
            ours = isinstance(outcome, FreezeError | FileReport)
            from_first(outcome if ours else FreezeError(f"{type(outcome).__name__}: {outcome}"))


def _follow(summarize: Summarize) -> FileReport:
    """The other processes: summarise what the first one hands out, until it tells how it ended."""
    while True:
        message: Any = from_first(None)
        if isinstance(message, list):
            with agreed("summarise the reviews"):
                summarize(message)
        elif isinstance(message, FileReport):
            return message
        else:
            raise message
