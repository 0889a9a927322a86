"""The shipped reviews keep their promises: see the card beside them."""

from __future__ import annotations

import importlib.resources
import re
from collections import Counter

import pytest

from hf_freeze.summarization import shipped_reviews


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    return {name: list(reviews.dataset) for name, reviews in shipped_reviews().items()}


@pytest.fixture(scope="module")
def rows(splits: dict[str, list[dict]]) -> list[dict]:
    return [row for split in splits.values() for row in split]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def sequences(text: str, length: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[at : at + length]) for at in range(len(found) - length + 1)}


def test_there_are_at_least_360_reviews_in_12_categories(rows: list[dict]) -> None:
    assert len(rows) >= 360
    assert len({row["category"] for row in rows}) >= 12
    assert all(count >= 20 for count in Counter(row["category"] for row in rows).values())


def test_every_rating_occurs_and_lengths_are_spread(rows: list[dict]) -> None:
    assert {row["rating"] for row in rows} == {1, 2, 3, 4, 5}
    lengths = sorted(len(row["review"].split()) for row in rows)
    assert lengths[0] >= 20
    assert lengths[-1] <= 180
    assert lengths[len(lengths) // 4] < 50
    assert lengths[-len(lengths) // 4] > 90


def test_summaries_are_one_sentence_of_12_to_32_words(rows: list[dict]) -> None:
    for row in rows:
        assert 12 <= len(row["summary"].split()) <= 32, row["summary"]
        assert row["summary"].endswith(".")
        assert "\n" not in row["summary"]


def test_no_review_repeats(rows: list[dict]) -> None:
    assert len({" ".join(words(row["review"])) for row in rows}) == len(rows)


def test_no_product_is_in_two_splits(splits: dict[str, list[dict]]) -> None:
    owners = [{row["product_id"] for row in split} for split in splits.values()]
    assert sum(map(len, owners)) == len(set().union(*owners))


def test_no_six_word_sequence_is_in_more_than_three_rows(rows: list[dict]) -> None:
    counts: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        counts.update(sequences(row["review"], 6) | sequences(row["summary"], 6))
    assert counts.most_common(1)[0][1] <= 3, counts.most_common(3)


def test_summaries_are_not_copied_sentences(rows: list[dict]) -> None:
    for row in rows:
        assert not sequences(row["review"], 7) & sequences(row["summary"], 7), row["summary"]


def test_the_card_counts_what_there_is(splits: dict[str, list[dict]]) -> None:
    folder = importlib.resources.files("hf_freeze.summarization.data") / "shipped_reviews"
    card = (folder / "README.md").read_text(encoding="utf-8")
    for name, split in splits.items():
        products = len({row["product_id"] for row in split})
        assert f"| {name} | {len(split)} | {products} |" in card
