from __future__ import annotations

import gc
import re
import socket
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from hf_freeze.errors import FreezeError
from hf_freeze.summarization import rouge
from hf_freeze.summarization.rouge import (
    METRICS,
    Rouge,
    RougeScores,
    compute_rouge,
    first_sentence,
    split_sentences,
)

# few words, so that random texts share some; stems, capitals and sentence ends among them
WORDS = st.sampled_from(
    ["shoes", "shoe", "running", "runs", "Small", "small.", "great!", "the", "The", "4.5", "e.g.", "Mr.", "...", "café",
     "wool\n"]
)  # fmt: skip
TEXTS = st.lists(WORDS, max_size=12).map(" ".join) | st.text(max_size=30)
NOT_LATIN = pytest.mark.filterwarnings("ignore:.*no Latin letter")


def directly(target: str, prediction: str, metric: str) -> float:
    """The slow, obvious path: one metric, one pair, nothing of ours but the cutting into sentences."""
    if metric == "rougeLsum":
        target, prediction = "\n".join(split_sentences(target)), "\n".join(split_sentences(prediction))
    scorer = RougeScorer([metric], use_stemmer=True)
    return float(100 * scorer.score(target=target, prediction=prediction)[metric].fmeasure)


@NOT_LATIN
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))
def test_scores_equal_rouge_score_called_directly(pairs: list[tuple[str, str]]) -> None:
    scores = compute_rouge([p for p, _ in pairs], [r for _, r in pairs], intervals=False)
    for metric in METRICS:
        expected = [directly(reference, prediction, metric) for prediction, reference in pairs]
        np.testing.assert_array_equal(scores.per_example[metric], expected)
        assert getattr(scores, metric) == pytest.approx(np.mean(expected))
    assert scores.count == len(pairs)


@NOT_LATIN
@settings(max_examples=40, deadline=None)
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_of_several_references_the_best_counts_for_each_metric(prediction: str, references: list[str]) -> None:
    scores = compute_rouge([prediction], [references], intervals=False)
    for metric in METRICS:
        assert getattr(scores, metric) == max(directly(r, prediction, metric) for r in references)


def test_target_and_prediction_are_not_swapped() -> None:
    # the union LCS goes through the target's sentences, so that here even F1 tells the sides apart
    target, prediction = "c c a", "a\na c"
    right = directly(target, prediction, "rougeLsum")
    swapped = directly(prediction, target, "rougeLsum")
    assert right == pytest.approx(66.67, abs=0.01)
    assert swapped == pytest.approx(33.33, abs=0.01)
    assert compute_rouge([prediction], [target], intervals=False).rougeLsum == right


def test_precision_is_of_the_prediction_and_recall_of_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = RougeScorer.score

    def record(self: RougeScorer, target: str, prediction: str) -> object:
        scores = original(self, target, prediction)
        seen.append((target, prediction, scores["rouge1"].precision, scores["rouge1"].recall))
        return scores

    monkeypatch.setattr(RougeScorer, "score", record)
    compute_rouge(["small shoes"], ["small red wool shoes"], intervals=False)
    assert seen == [("small red wool shoes", "small shoes", 1.0, 0.5)]


def test_words_are_stemmed() -> None:
    assert compute_rouge(["running shoe"], ["runs shoes"], intervals=False).rouge1 == 100


def test_rouge_lsum_goes_by_sentence_and_rouge_l_does_not() -> None:
    scores = compute_rouge(["Runs small. Lovely wool."], ["Lovely wool. Runs small."], intervals=False)
    assert scores.rougeLsum == 100
    assert scores.rougeL == 50


def test_an_empty_prediction_scores_zero() -> None:
    assert compute_rouge(["", "good shoes"], ["good shoes", "good shoes"]).rouge1 == 50


# ------------------------------------------------------------------------------------------------ the module


def test_the_metric_module_composes_with_evaluate() -> None:
    import evaluate

    class Exact(evaluate.Metric):  # type: ignore[misc]
        def _info(self) -> evaluate.MetricInfo:
            import datasets

            text = datasets.Value("string")
            return evaluate.MetricInfo(
                description="", citation="", features=datasets.Features({"predictions": text, "references": text})
            )

        def _compute(self, *, predictions: list[str], references: list[str]) -> dict[str, float]:
            return {"exact": float(np.mean([p == r for p, r in zip(predictions, references, strict=True)]))}

    both = evaluate.combine([Rouge(), Exact(keep_in_memory=True)])
    scores = both.compute(predictions=["good shoes"], references=["good cheap shoes"])
    assert scores == {"rouge1": 80.0, "rouge2": 0.0, "rougeL": 80.0, "rougeLsum": 80.0, "exact": 0.0}


def test_the_metric_module_adds_batches_and_gives_single_scores() -> None:
    metric = Rouge()
    metric.add_batch(predictions=["good shoes", "bad"], references=["good cheap shoes", "bad"])
    metric.add(prediction="none", reference="of these")
    assert metric.compute(use_aggregator=False)["rouge1"] == [80.0, 100.0, 0.0]


def test_the_metric_module_takes_a_cache_folder_and_empties_it(tmp_path: Path) -> None:
    metric = Rouge(cache_dir=str(tmp_path))
    metric.add_batch(predictions=["good shoes"], references=[["good cheap shoes", "good shoes"]])
    assert list(tmp_path.rglob("*.arrow"))
    assert metric.compute()["rouge2"] == 100
    assert not list(tmp_path.rglob("*.arrow"))


def test_no_network_and_no_file_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("compute_rouge opened a connection")

    (tmp_path / "temp").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    compute_rouge(["good shoes"], ["good cheap shoes"])
    gc.collect()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["home", "temp"]


# --------------------------------------------------------------------------------------------- the intervals


def some_scores(count: int = 40) -> RougeScores:
    words = ["the", "shoes", "run", "small", "but", "they", "are", "warm", "and", "light", "so", "we", "keep", "them"]
    draws = np.random.default_rng(3)
    texts = [" ".join(draws.choice(words, size=6)) for _ in range(2 * count)]
    return compute_rouge(texts[:count], texts[count:])


def test_intervals_agree_with_the_normal_approximation_of_the_mean() -> None:
    scores = some_scores()
    assert scores.low is not None
    assert scores.high is not None
    for metric in METRICS:
        values = scores.per_example[metric]
        half = 1.96 * values.std() / np.sqrt(len(values))
        assert scores.low[metric] == pytest.approx(values.mean() - half, abs=0.25 * half)
        assert scores.high[metric] == pytest.approx(values.mean() + half, abs=0.25 * half)


def test_a_higher_confidence_gives_a_wider_interval() -> None:
    widths = []
    for confidence in (0.5, 0.95):
        scores = compute_rouge(["a", "b", "a b", "c d"], ["a", "a", "a c", "c d e"], confidence=confidence)
        assert scores.low is not None
        assert scores.high is not None
        widths.append(scores.high["rouge1"] - scores.low["rouge1"])
    assert widths[0] < widths[1]


def test_intervals_repeat_with_the_seed_and_differ_with_another() -> None:
    texts = ["a", "b", "a b", "c d", "a d e f"], ["a", "a", "a c", "c d e", "f g a"]
    first, again = (compute_rouge(*texts, resamples=50, seed=1).to_dict() for _ in range(2))
    assert first == again
    assert first != compute_rouge(*texts, resamples=50, seed=2).to_dict()


def test_drawing_in_parts_gives_intervals_of_the_same_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = some_scores().to_dict()
    monkeypatch.setattr(rouge, "MOST_DRAWS_AT_ONCE", 130)  # 3 resamples at a time, and 1 in the end
    parts = some_scores().to_dict()
    assert parts == pytest.approx(whole, rel=0.05)


def test_one_example_has_an_interval_of_no_width() -> None:
    scores = compute_rouge(["good shoes"], ["good cheap shoes"])
    assert scores.low == scores.high == {metric: getattr(scores, metric) for metric in METRICS}


# --------------------------------------------------------------------------------------- the scores' own words


def test_to_dict_prefixes_every_number() -> None:
    scores = compute_rouge(["good shoes"], ["good cheap shoes"])
    values = scores.to_dict("test_")
    assert set(values) == {f"test_{m}{end}" for m in METRICS for end in ("", "_low", "_high")}
    assert values["test_rouge1"] == values["test_rouge1_low"] == 80.0
    assert all(type(value) is float for value in values.values())


def test_without_intervals_neither_dict_nor_table_mentions_them() -> None:
    scores = compute_rouge(["good shoes"], ["good cheap shoes"], intervals=False)
    assert set(scores.to_dict()) == set(METRICS)
    assert " to " not in str(scores)
    assert "interval" not in str(scores)


def test_the_table_prints_value_and_interval() -> None:
    assert str(compute_rouge(["good shoes"] * 2, ["good cheap shoes"] * 2)) == (
        "ROUGE F1 (%), 2 summaries, 95% bootstrap intervals\n"
        "  ROUGE-1    80.00   80.00 to 80.00\n"
        "  ROUGE-2     0.00    0.00 to  0.00\n"
        "  ROUGE-L    80.00   80.00 to 80.00\n"
        "  ROUGE-Lsum 80.00   80.00 to 80.00"
    )


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a", "b"], ["a"], r"given 2 predictions and 1 references\. Give one reference"),
        ([], [], r"empty lists\. Give at least one"),
        ("abc", ["a", "b", "c"], r"given predictions as one string\. Give a list"),
        (["a", "b", "c"], "abc", r"given references as one string\. Give a list"),
        (["a", None], ["a", "b"], r"found None \(NoneType\) at index 1\. Give strings"),
        (["a"], [[7]], r"found 7 \(int\) at index 0\. Give strings"),
        (["a", "b"], ["a", None], r"references\[1\] is None\. Give a string, or a list"),
        (["a"], [[]], r"references\[0\] is \[\]\. Give a string, or a list of at least one"),
    ],
)
def test_what_cannot_be_scored_is_an_error(predictions: list[str], references: list[str], message: str) -> None:
    with pytest.raises(FreezeError, match=message):
        compute_rouge(predictions, references)


@pytest.mark.parametrize("options", [{"confidence": 95}, {"confidence": 0.0}, {"resamples": 0}])
def test_a_confidence_or_number_of_resamples_out_of_range_is_an_error(options: dict[str, float]) -> None:
    with pytest.raises(FreezeError, match=r"Use a confidence between 0 and 1, .* at least 1 resample"):
        compute_rouge(["a"], ["a"], **options)  # type: ignore[arg-type]


def test_references_in_a_script_that_rouge_does_not_see_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="1 of 2 references have no Latin letter"):
        scores = compute_rouge(["хорошие туфли", "good"], ["хорошие туфли", "good"])
    assert scores.per_example["rouge1"].tolist() == [0, 100]


# ------------------------------------------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Love it. Would buy again.", ["Love it.", "Would buy again."]),
        ("love it. would buy again", ["love it.", "would buy again"]),
        ("Love it! Really? Yes.", ["Love it!", "Really?", "Yes."]),
        ("Mr. Kim and Dr. Lee agree. So do I. Good.", ["Mr. Kim and Dr. Lee agree.", "So do I.", "Good."]),
        ("Costs 4.5 dollars. Fine.", ["Costs 4.5 dollars.", "Fine."]),
        ("Buy a warm one, e.g. Wool or i.e. Fleece. Done.", ["Buy a warm one, e.g. Wool or i.e. Fleece.", "Done."]),
        ("Skirts, pants, etc. my only gripe", ["Skirts, pants, etc. my only gripe"]),
        ("Skirts, pants, etc. My only gripe", ["Skirts, pants, etc.", "My only gripe"]),
        ("Holds 8 oz. of tea. Nice.", ["Holds 8 oz. of tea.", "Nice."]),
        ("Bought at J. Crew in an M. It fits.", ["Bought at J. Crew in an M.", "It fits."]),
        ("Well... it works... Mostly.", ["Well... it works...", "Mostly."]),
        ("but..... there is no tag…. okay", ["but..... there is no tag…. okay"]),
        ('She said "wow!" Then left.', ['She said "wow!"', "Then left."]),
        ("(Really.) It is.", ["(Really.)", "It is."]),
        ("1. Fits well. 2. Looks good.", ["1. Fits well.", "2. Looks good."]),
        ("5/5! Great shoes.", ["5/5! Great shoes."]),
        ("What?! No way!!! Yes", ["What?!", "No way!!!", "Yes"]),
        ("Great shoes\n\nno heel\r\nwarm", ["Great shoes", "no heel", "warm"]),
        ("  ", []),
        ("", []),
    ],
)
def test_sentences_are_cut_where_a_reader_would(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences
    assert first_sentence(text) == (sentences[0] if sentences else "")


@given(TEXTS)
def test_cutting_into_sentences_loses_only_white_space(text: str) -> None:
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence == sentence.strip() and sentence for sentence in sentences)
    assert not any(re.search(r"[\r\n]", sentence) for sentence in sentences)


@pytest.mark.parametrize("piece", ["etc. ", "... ", "1. ", "a ", "."])
def test_a_100_kb_review_without_a_sentence_end_is_one_sentence_at_once(piece: str) -> None:
    review = piece * (100_000 // len(piece)) + "end"
    began = time.process_time()
    assert first_sentence(review) == review
    assert time.process_time() - began < 2  # it takes 0.05 s; a search that starts over takes 30 s
