"""All reviews of a product as rows to train and to score on, in both layouts, and their baselines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_freeze.errors import ReviewsError
from hf_freeze.summarization.data.groups import group_baselines, group_reviews, read_group_splits
from hf_freeze.summarization.data.reviews import read_reviews
from hf_freeze.summarization.rouge import compute_rouge

WIDE = (
    "id\trev1\trev2\trev3\tsumm1\tsumm2\n"
    'p1\tGood mug. Keeps warm.\tBroke.\tFine "mug".\tMixed.\tWeak handle.\n'
    "p2\tLoud.\t\t\tNoisy.\t\n"
)
LONG = [
    {"id": "p1", "review": "Good mug. Keeps warm.", "summary": "Mixed."},
    {"id": "p2", "review": "Loud.", "summary": "Noisy."},
    {"id": "p1", "review": "Broke.", "summary": "Weak handle."},
    {"id": "p1", "review": 'Fine "mug".', "summary": ""},
]


def wide(folder: Path, name: str = "wide.csv", content: str = WIDE) -> Path:
    path = folder / name
    path.write_text(content)
    return path


def long(folder: Path, rows: list[dict[str, Any]] = LONG, name: str = "long.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def many(folder: Path, count: int, name: str = "many.jsonl") -> Path:
    rows = [
        {"id": f"p{n % count}", "review": f"Review {n}.", "summary": f"Summary {n}."}
        for n in range(2 * count)
    ]  # fmt: skip
    return long(folder, rows, name)


WIDE_COLUMNS = {"text_column": "rev*", "summary_column": "summ*"}


def test_both_layouts_give_the_same_rows(tmp_path: Path) -> None:
    first, second = (
        read_group_splits(path, path, path, group_by="id", **columns)
        for path, columns in ((wide(tmp_path), WIDE_COLUMNS), (long(tmp_path), {}))
    )
    for name in ("train", "validation", "test"):
        for column in ("review", "summary", "id", "reviews", "references", "row"):
            assert first[name].dataset[column][:] == second[name].dataset[column][:], (name, column)
    train, test = first["train"].dataset, first["test"].dataset
    assert train["summary"][:] == ["Mixed.", "Weak handle.", "Noisy."]
    assert train["review"][0] == train["review"][1] == 'Good mug. Keeps warm.\nBroke.\nFine "mug".'
    assert test["references"][:] == [["Mixed.", "Weak handle."], ["Noisy."]]
    assert test["reviews"][1] == ["Loud."]
    assert "2 groups by 'id'" in str(first["train"])
    assert "3 reviews a row from 'rev*', 2 summaries from 'summ*'" in str(first["train"])
    assert "2 of its groups also in train" in str(first["test"])


def test_validation_is_set_aside_by_whole_groups(tmp_path: Path) -> None:
    splits = read_group_splits(many(tmp_path, 30), group_by="id")
    groups = {name: set(reviews.dataset["id"]) for name, reviews in splits.items()}
    assert len(groups["validation"]) == 3
    assert len(groups["train"]) == 27
    assert not groups["train"] & groups["validation"]
    assert len(splits["validation"].dataset) == 6, "a row for each summary"
    assert groups["test"] == groups["validation"]
    assert len(splits["test"].dataset) == 3, "a row for each group"
    assert "their score is not independent" in str(splits["test"])
    again = read_group_splits(many(tmp_path, 30), group_by="id")
    assert again["validation"].dataset["id"][:] == splits["validation"].dataset["id"][:]
    other = read_group_splits(many(tmp_path, 30), group_by="id", seed=7)
    assert set(other["validation"].dataset["id"]) != groups["validation"]


def test_the_given_reviews_are_untouched_and_groups_without_either_are_named(tmp_path: Path) -> None:
    rows = [*LONG, {"id": "p3", "review": "No summary.", "summary": ""}, {"id": "p4", "review": " ", "summary": "S"}]
    given = read_reviews(long(tmp_path, rows), need_summaries=False)
    before = given.dataset[:]
    grouped = group_reviews(given, "id", each_summary=False)
    assert given.dataset[:] == before
    assert grouped.dataset["id"][:] == ["p1", "p2"]
    assert grouped.skipped["group without a summary"] == [5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_by": "idd", **WIDE_COLUMNS}, r"group_by='idd' was asked for.*nearest: 'id'"),
        ({"group_by": "id", **WIDE_COLUMNS, "text_column": "reviews*"}, r"text_column='reviews\*'.*no column.*matches"),
        ({"group_by": "id", **WIDE_COLUMNS, "summary_column": "s*x"}, r"summary_column='s\*x'.*no column"),
        ({"group_by": "id", "text_column": "rev*", "summary_column": "summ1"}, r"either both have a \*"),
        ({"group_by": "id", "text_column": "rev*"}, r"either both have a \*"),
    ],
)
def test_a_wrong_column_of_a_wide_file_is_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ReviewsError, match=message):
        read_group_splits(wide(tmp_path), **options)


@pytest.mark.parametrize(
    ("group_by", "message"),
    [
        ("idd", r"group_by='idd' was asked for.*nearest: 'id'"),
        ("review", "which holds the texts"),
        ("summary", "which holds the texts"),
        ("row", "no such column"),
    ],
)
def test_a_wrong_group_column_is_named(group_by: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ReviewsError, match=message):
        read_group_splits(long(tmp_path), group_by=group_by)


def test_too_little_to_learn_from_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ReviewsError, match="without a train source"):
        read_group_splits(None, group_by="id")
    with pytest.raises(ReviewsError, match="has 1 group by 'id'; to set some aside"):
        read_group_splits(long(tmp_path, [LONG[0], LONG[2]]), group_by="id")
    with pytest.raises(ReviewsError, match=r"No group of .* has a review and a summary"):
        read_group_splits(long(tmp_path, [{**LONG[0], "summary": ""}, LONG[0] | {"review": ""}][:1]), group_by="id")
    with pytest.raises(ReviewsError, match="no column of summaries"):
        read_group_splits(long(tmp_path, [{"id": "p", "review": "a"}] * 2), group_by="id")
    with pytest.raises(ReviewsError, match="has no rows"):
        read_group_splits(wide(tmp_path, content=WIDE.splitlines()[0] + "\n"), group_by="id", **WIDE_COLUMNS)
    with pytest.raises(ReviewsError, match=r"line 2 has nothing in column 'id'"):
        read_group_splits(wide(tmp_path, content=WIDE.replace("p1", " ")), group_by="id", **WIDE_COLUMNS)


def test_baselines_take_first_sentences_and_one_review_of_each_group(tmp_path: Path) -> None:
    groups = read_group_splits(wide(tmp_path), wide(tmp_path), group_by="id", **WIDE_COLUMNS)["test"].dataset
    made = group_baselines(groups)
    assert made["first sentences"] == ['Good mug. Broke. Fine "mug".', "Loud."]
    assert made["random review"][0] in groups["reviews"][0]
    assert made == group_baselines(groups), "the draw has a seed"
    drawn = {group_baselines(groups, seed=seed)["random review"][0] for seed in range(40)}
    assert drawn == set(groups["reviews"][0])


def test_of_several_references_the_best_counts() -> None:
    references = [["A good mug.", "Loud kettle."], ["Noisy.", "It broke."]]
    both = compute_rouge(["A good mug.", "It broke."], references, intervals=False)
    assert both.rouge1 == pytest.approx(100)
    alone = compute_rouge(["A good mug.", "It broke."], [pair[0] for pair in references], intervals=False)
    assert alone.rouge1 == pytest.approx(50)
