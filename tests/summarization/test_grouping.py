"""Reviews of one product: joined, packed, summarised in parts, and brought together on disk."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_freeze.errors import FreezeError, ReviewsError
from hf_freeze.summarization.data.grouping import (
    GroupStore,
    fits_prompt,
    group_key,
    join_reviews,
    merge_summaries,
    summarize_groups,
)
from hf_freeze.summarization.prompts import read_prompt
from tests.tokenizer_makers import byte_level, llama_config


class Recorder:
    """Summarises by the first word of each review, and keeps what it was given."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> list[str]:
        self.calls.append(list(texts))
        return [" ".join(line.split()[0] for line in text.splitlines()) for text in texts]


def three_lines(text: str) -> bool:
    return text.count("\n") < 3


def test_a_group_that_fits_is_summarised_at_once_with_all_its_reviews() -> None:
    summarize = Recorder()
    assert summarize_groups([["a 1", "b 2"], ["c 3"]], summarize, three_lines) == ["a b", "c"]
    assert summarize.calls == [["a 1\nb 2", "c 3"]]


def test_a_group_that_does_not_fit_becomes_a_summary_of_summaries() -> None:
    summarize = Recorder()
    summaries = summarize_groups([[f"w{n} x" for n in range(8)], ["c 3"]], summarize, three_lines)
    assert summarize.calls[0] == ["w0 x\nw1 x\nw2 x", "w3 x\nw4 x\nw5 x", "w6 x\nw7 x", "c 3"]
    assert summarize.calls[1:] == [["w0 w1 w2\nw3 w4 w5\nw6 w7"]]
    assert summaries == ["w0 w3 w6", "c"]


@given(sizes=st.lists(st.integers(0, 40), max_size=4), most=st.integers(1, 5))
def test_every_review_is_given_once_and_every_group_ends_with_one_summary(sizes: list[int], most: int) -> None:
    groups = [[f"g{at}r{n}" for n in range(size)] for at, size in enumerate(sizes)]
    summarize = Recorder()
    summaries = summarize_groups(groups, summarize, lambda text: text.count("\n") < most)
    given_first = [line for text in (summarize.calls or [[]])[0] for line in text.splitlines()]
    assert given_first == [review for group in groups for review in group]
    assert [bool(summary) for summary in summaries] == [size > 0 for size in sizes]


def test_a_model_that_takes_nothing_whole_still_comes_to_an_end() -> None:
    summarize = Recorder()
    assert summarize_groups([["a", "b", "c", "d", "e"]], summarize, lambda text: False) == ["a e"]
    assert [len(call) for call in summarize.calls] == [5, 2, 1, 1]


def test_blank_reviews_and_blank_summaries_of_parts_are_left_out() -> None:
    summarize = Recorder()
    assert summarize_groups([["", " \n "], ["a", " "]], summarize) == ["", "a"]
    assert summarize.calls == [["a"]]
    assert merge_summaries([["", "one"], [" "]], summarize) == ["one", ""]
    assert summarize.calls == [["a"]], "one alone is taken as it is"


def test_summaries_that_a_model_leaves_blank_are_not_summarised_again() -> None:
    calls: list[list[str]] = []

    def summarize(texts: Sequence[str]) -> list[str]:
        calls.append(list(texts))
        return ["" if "blank" in text else f"{text}!" for text in texts]

    def fits(text: str) -> bool:
        return text.count("\n") < 2

    assert merge_summaries([["blank", "a", "b", "c"], ["blank", "blank"]], summarize, fits) == ["b\nc!", ""]
    assert calls == [["blank\na", "b\nc", "blank\nblank"]]


def test_a_line_break_within_a_review_does_not_read_as_its_end() -> None:
    assert join_reviews(["a\r\nb\u2028c", " d "]) == "a b c\nd"


def test_another_number_of_summaries_than_texts_is_refused() -> None:
    with pytest.raises(FreezeError, match="given 2 texts and returned 1 summaries"):
        summarize_groups([["a"], ["b"]], lambda texts: ["one"])


def test_fits_prompt_counts_the_whole_prompt() -> None:
    prompt = read_prompt(byte_level([], eos_token="</s>"), llama_config(), max_source_tokens=60)
    fits = fits_prompt(prompt)
    sizes = [size for size in range(1, 200) if fits("z" * size)]
    assert sizes == list(range(1, len(sizes) + 1))
    longest, longer = ("z" * (len(sizes) + more) for more in (0, 1))
    assert prompt.clean(longest) == longest
    whole = prompt.encode(longest)["input_ids"]
    assert len(whole) == 60
    assert len(prompt.encode(longer)["input_ids"]) == 60, "and that one is cut"


@pytest.mark.parametrize("value", [None, "", " ", float("nan")])
def test_a_row_without_a_group_is_an_error(value: object) -> None:
    with pytest.raises(ReviewsError, match=r"x\.csv, line 4 has nothing in column 'product'.*one group"):
        group_key(value, "product", "x.csv, line 4")


@pytest.mark.parametrize("value", [True, ["a"], {"id": 1}])
def test_a_group_that_is_no_name_is_an_error(value: object) -> None:
    with pytest.raises(ReviewsError, match="a name or number is expected"):
        group_key(value, "product", "row 1")


def test_names_that_look_the_same_are_one_group() -> None:
    assert group_key("caf\u00e9", "p", "") == group_key(" cafe\u0301 ", "p", "")
    assert group_key("Mug", "p", "") != group_key("mug", "p", "")


GROUPED = st.lists(st.tuples(st.sampled_from(["a", "b", "ä", "A", "0"]), st.text(max_size=3)), max_size=30)


@given(rows=GROUPED)
def test_the_store_gives_groups_in_order_of_their_first_rows(
    rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = [(group, text.encode("utf-8", "ignore").decode()) for group, text in rows]
    with GroupStore(tmp_path_factory.mktemp("store", numbered=True) / "groups") as store:
        for group, text in rows:
            store.add(group, text)
        order = dict.fromkeys(group for group, _ in rows)
        assert list(store) == [row for group in order for row in rows if row[0] == group]
        assert (store.rows, store.groups) == (len(rows), len(order))


def test_the_store_goes_with_its_file_and_takes_the_place_of_a_dead_one(tmp_path: Path) -> None:
    path = tmp_path / "groups"
    path.write_bytes(b"what a kill left")
    with GroupStore(path) as store:
        store.add("a", "text")
        assert list(store) == [("a", "text")]
    assert not path.exists()


def test_the_store_never_sorts_texts(tmp_path: Path) -> None:
    with GroupStore(tmp_path / "groups") as store:
        for number in range(100):
            store.add(f"g{number % 7}", "text")
        list(store)
        plan = store._db.execute(
            "EXPLAIN QUERY PLAN SELECT name, text FROM groups CROSS JOIN texts ON texts.of = groups.id "
            "ORDER BY groups.id, texts.id"
        ).fetchall()
    assert not any("TEMP B-TREE" in str(row) for row in plan), "a sort would hold a second copy of all texts"


def test_a_store_that_cannot_be_written_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(sqlite3, "connect", full)
    with pytest.raises(FreezeError, match=r"disk is full\. It needs about as much room on disk as the input"):
        GroupStore(tmp_path / "groups")
