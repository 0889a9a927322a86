"""All reviews of one product with its human summaries, as rows to train and to score on.

It owns the reading of both layouts (a row for each review; or a row for each product, with columns such as rev1 ...
rev8), the splits, which never part a product, and the baselines of several reviews. How reviews are joined is
`grouping`'s. All of it is held in memory, as training rows are.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hf_freeze.errors import ReviewsError, nearest
from hf_freeze.summarization.data.grouping import group_key, join_reviews
from hf_freeze.summarization.data.reviews import (
    MOST_VALIDATION_ROWS,
    Reviews,
    check_column,
    read_reviews,
    set_aside,
    with_notes,
)
from hf_freeze.summarization.data.rows import RowFiles, row_text

__all__ = ["group_baselines", "group_reviews", "read_group_splits"]

WILDCARD = "*"
OURS = ("review", "summary", "row")  # columns of `Reviews`


def read_group_splits(
    train: str | Path | None,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    *,
    group_by: str,
    text_column: str | None = None,
    summary_column: str | None = None,
    seed: int = 42,
) -> dict[str, Reviews]:
    """Reads train, validation and test with one row for all reviews of a product.

    Args:
        train: A source as in `read_reviews`; a file or folder where columns are given with a wildcard.
        validation: None sets a tenth of train's groups aside (at least 1, at most 1,000), drawn with `seed`.
        test: None scores on the groups of validation, and says so.
        group_by: The column that tells the product.
        text_column: As in `read_reviews`: a row holds one review, and its group is all rows with the same value in
            `group_by`. With a wildcard ("rev*") a row holds several, one in each matching column.
        summary_column: The same for the summaries; some rows of a group may have none.
        seed: Of the draw.

    Returns:
        As `group_reviews`: train and validation with a row for each human summary, test with a row for each group and
        all its summaries in `references`. Groups that stand in two splits are counted in the notes of the later one.

    Raises:
        ReviewsError: No train source, fewer than 2 groups where some are to be set aside, no column that matches, or
            whatever `read_reviews` and `group_reviews` raise.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "mugs.csv")
    >>> _ = path.write_text("id,rev1,rev2,summ1,summ2\\n7,Good.,Broke.,Mixed.,Weak handle.\\n8,Loud.,,Noisy.,\\n")
    >>> splits = read_group_splits(path, path, group_by="id", text_column="rev*", summary_column="summ*")
    >>> splits["train"].dataset["summary"][:], splits["test"].dataset["references"][:]
    (['Mixed.', 'Weak handle.', 'Noisy.'], [['Mixed.', 'Weak handle.'], ['Noisy.']])
    """
    if train is None:
        raise ReviewsError("Groups were to be read without a train source. Give one.")
    sources = {"train": train, "validation": validation, "test": test}
    splits = {}
    for name, source in sources.items():
        if source is not None:
            read = _read(source, name, group_by, text_column, summary_column)
            splits[name] = group_reviews(read, group_by, each_summary=name != "test")
    if validation is None:
        splits["train"], splits["validation"] = _set_aside(splits["train"], group_by, seed)
    if test is None:
        note = "no test source was given: these are the validation groups, and their score is not independent"
        splits["test"] = _first_of_each(splits["validation"], group_by, note)
    return {name: _note_shared(splits, name, group_by) for name in sources}


def group_reviews(reviews: Reviews, group_by: str, *, each_summary: bool) -> Reviews:
    """Reviews by product for training and scoring: one row for all reviews of a group.

    Args:
        reviews: From `read_reviews`; with summaries in some rows of each group at least, so read with
            `need_summaries=False` where not all rows have one.
        group_by: The column that tells the group.
        each_summary: True for training: a row for each different summary of a group. False for scoring: one row for a
            group, its summaries together in `references`.

    Returns:
        Rows in the order of each group's first, with the columns `review` (joined by `join_reviews`; where that is more
        than the model takes, the prompt cuts the last ones), `summary` (the first one of several), `row` (of the first
        review), the group's column, `reviews` and `references` (lists). Groups without a review or a summary are in
        `skipped`, by the number of their first row. The given ones are untouched.

    Raises:
        ReviewsError: No such column, no summaries at all, a row without a group, or no group with both.

    >>> import datasets
    >>> rows = {"review": ["Good.", "Loud.", "Broke."], "summary": ["Mixed.", "Noisy.", None], "row": [1, 2, 3]}
    >>> given = Reviews(datasets.Dataset.from_dict({**rows, "product": ["mug", "kettle", "mug"]}), "x", 3, "t", "s", "")
    >>> grouped = group_reviews(given, "product", each_summary=True)
    >>> grouped.dataset["review"][:], grouped.dataset["summary"][:]
    (['Good.\\nBroke.', 'Loud.'], ['Mixed.', 'Noisy.'])
    """
    from datasets import Dataset

    names = reviews.dataset.column_names
    if group_by in (reviews.text_column, reviews.summary_column):
        raise ReviewsError(f"group_by={group_by!r} was asked for, which holds the texts. Name the product's column.")
    check_column("group_by", group_by, reviews.source, [name for name in names if name not in OURS])
    if "summary" not in names:
        raise ReviewsError(
            f"{reviews.source} has no column of summaries, so groups have none to learn from. Name it with "
            f"summary_column=."
        )
    groups: dict[str, dict[str, Any]] = {}
    for row in reviews.dataset.select_columns(["review", "summary", "row", group_by]):
        key = group_key(row[group_by], group_by, f"{reviews.source}, row {row['row']}")
        group = groups.setdefault(key, {"row": row["row"], group_by: key, "reviews": [], "references": {}})
        if (row["review"] or "").strip():
            group["reviews"].append(row["review"])
        if (row["summary"] or "").strip():
            group["references"][row["summary"].strip()] = None  # a set that keeps the order
    skipped: dict[str, list[int]] = {"group without a review": [], "group without a summary": []}
    rows = []
    for group in groups.values():
        if not group["reviews"] or not group["references"]:
            skipped["group without a summary" if group["reviews"] else "group without a review"].append(group["row"])
            continue
        references = list(group["references"])
        for summary in references if each_summary else references[:1]:
            rows.append(
                {"review": join_reviews(group["reviews"]), "summary": summary, **group, "references": references}
            )
    if not rows:
        raise ReviewsError(
            f"No group of {reviews.source} by {group_by!r} has a review and a summary. Check the column."
        )
    notes = (*reviews.notes, f"{len(groups):,} groups by {group_by!r}")
    skipped = {**reviews.skipped, **{why: numbers for why, numbers in skipped.items() if numbers}}
    return replace(reviews, dataset=Dataset.from_list(rows), skipped=skipped, notes=notes)


def group_baselines(groups: Sequence[Mapping[str, Any]], *, seed: int = 0) -> dict[str, list[str]]:
    """Summaries that need no model, by name: what a model of several reviews has to beat.

    "first sentences" joins the first sentence of each review, the usual LEAD; "random review" is one whole review.

    Args:
        groups: Rows of `group_reviews`.
        seed: Of the draw of reviews.

    >>> group_baselines([{"reviews": ["Good mug. Keeps warm.", "Broke. Sad."]}])["first sentences"]
    ['Good mug. Broke.']
    """
    from hf_freeze.summarization.rouge import first_sentence

    draw = random.Random(seed)
    texts = [list(group["reviews"]) for group in groups]
    return {
        "first sentences": [" ".join(filter(None, map(first_sentence, reviews))) for reviews in texts],
        "random review": [draw.choice(reviews) for reviews in texts],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def _read(source: str | Path, split: str, group_by: str, text: str | None, summary: str | None) -> Reviews:
    wide = [name is not None and WILDCARD in name for name in (text, summary)]
    if text is not None and summary is not None and all(wide):
        return _read_wide(source, group_by, text, summary)
    if any(wide):
        raise ReviewsError(
            f"text_column={text!r} and summary_column={summary!r} were given; either both have a {WILDCARD}, for rows "
            f"that hold all of a product, or none has."
        )
    local = Path(source).expanduser().exists()
    options: dict[str, Any] = {"text_column": text, "summary_column": summary, "need_summaries": False}
    return read_reviews(source, split=None if local else split, **options)


def _read_wide(source: str | Path, group_by: str, text: str, summary: str) -> Reviews:
    """Rows that hold all of a product, taken apart into a row for each review, as `read_reviews` gives them."""
    from datasets import Dataset

    files = RowFiles(source)
    columns = list(files.columns)
    check_column("group_by", group_by, files.name, columns)
    matches = []
    for name, pattern in (("text_column", text), ("summary_column", summary)):
        matches.append([column for column in columns if fnmatchcase(column, pattern)])
        if not matches[-1]:
            raise ReviewsError(
                f"{name}={pattern!r} was asked for, and no column of {files.name} matches. It has "
                f"{', '.join(map(repr, columns))}; nearest: {nearest(pattern.replace(WILDCARD, ''), columns)}."
            )
    rows, number = [], 0
    for number, row in enumerate(files, 1):
        texts = ([row_text(row, column) for column in names] for names in matches)
        key = group_key(row.values.get(group_by), group_by, row.place)
        for review, summary_text in itertools.zip_longest(*texts, fillvalue=""):
            rows.append({"review": review, "summary": summary_text, "row": number, group_by: key})
    if not rows:
        raise ReviewsError(f"{files.name} has no rows. Give a file with at least one review.")
    reason = f"{len(matches[0])} reviews a row from {text!r}, {len(matches[1])} summaries from {summary!r} (as asked)"
    return Reviews(Dataset.from_list(rows), files.name, number, text, summary, reason)


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def _groups(reviews: Reviews, group_by: str) -> list[str]:
    """The group of each row."""
    return list(reviews.dataset[group_by])


def _set_aside(train: Reviews, group_by: str, seed: int) -> tuple[Reviews, Reviews]:
    """Whole groups, so that no summary of a product is trained on and its neighbour validated on."""
    of_rows = _groups(train, group_by)
    groups = list(dict.fromkeys(of_rows))
    if len(groups) < 2:
        raise ReviewsError(
            f"{train.source} has {len(groups)} group by {group_by!r}; to set some aside for validation, at least 2 are "
            f"needed. Give a validation source, or more groups."
        )
    count = min(max(len(groups) // 10, 1), MOST_VALIDATION_ROWS)
    drawn = set(random.Random(seed).sample(groups, count))
    note = f"{count:,} of {len(groups):,} groups set aside for validation (seed {seed})"
    return set_aside(train, {at for at, name in enumerate(of_rows) if name in drawn}, note)


def _first_of_each(reviews: Reviews, group_by: str, note: str) -> Reviews:
    first = {name: at for at, name in reversed(list(enumerate(_groups(reviews, group_by))))}
    return replace(with_notes(reviews, note), dataset=reviews.dataset.select(sorted(first.values())))


def _note_shared(splits: Mapping[str, Reviews], name: str, group_by: str) -> Reviews:
    seen = set(_groups(splits["train"], group_by)) if name != "train" else set()
    shared = len(seen & set(_groups(splits[name], group_by)))
    return with_notes(splits[name], f"{shared:,} of its groups also in train") if shared else splits[name]
