"""Scores summaries with ROUGE, offline: an `evaluate.Metric` over `rouge_score`, and its bootstrap intervals.

It owns the cutting of text into sentences, which ROUGE-Lsum and the first-sentence baseline need; every count
is `rouge_score`'s. `evaluate.load("rouge")` would fetch a script from the hub; this module is the script.

Importing this file imports `evaluate`, which takes seconds: import it where it is used.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import evaluate
import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from hf_freeze.errors import FreezeError
from hf_freeze.given import check_kind

__all__ = ["Rouge", "RougeScores", "compute_rouge", "first_sentence", "split_sentences"]

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
MOST_DRAWS_AT_ONCE = 4_000_000  # 32 MB of indices: the bootstrap's memory does not grow with the test set

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

# A full stop after these goes on with the sentence, whatever follows.
TITLES = {"mr", "mrs", "ms", "dr", "prof", "vs", "e.g", "i.e", "eg", "ie", "approx", "cf"}
# After these it may end one: it does where a capital follows.
SHORT_FORMS = {"etc", "inc", "ltd", "co", "st", "jr", "sr", "no", "oz", "lb", "lbs", "ft", "in", "min", "max"}
SHORT_FORMS |= {"a.m", "p.m", "u.s", "u.k", "am", "pm", "dept", "est"}
SIZES_AND_I = set("ISML")  # the only single letters that end a sentence: "I took an M. It fits.", but "J. Crew"
SENTENCE_END = re.compile(r"(?<![.!?…])(?P<stop>[.!?…]+)[\"'”’)\]]*\s+")


@dataclass(frozen=True, eq=False)
class RougeScores:
    """ROUGE F1 in percent: the means over `count` summaries, and how sure they are.

    `print(scores)` is a small table.
    """

    rouge1: float
    rouge2: float
    rougeL: float
    rougeLsum: float
    count: int
    per_example: dict[str, Floats]
    """One F1 in percent per summary, in the order of the predictions."""
    low: dict[str, float] | None = None
    high: dict[str, float] | None = None
    """Ends of the bootstrap intervals, where they were asked for."""
    confidence: float = 0.95

    def to_dict(self, prefix: str = "") -> dict[str, float]:
        """Plain numbers by name: `{prefix}rouge1`, `{prefix}rouge1_low`, `{prefix}rouge1_high`, and so on.

        Args:
            prefix: put before each name as it is, say "test_".
        """
        values: dict[str, float] = {}
        for metric in METRICS:
            values[f"{prefix}{metric}"] = getattr(self, metric)
            if self.low is not None and self.high is not None:
                values[f"{prefix}{metric}_low"] = self.low[metric]
                values[f"{prefix}{metric}_high"] = self.high[metric]
        return values

    def __str__(self) -> str:
        lines = [f"ROUGE F1 (%), {self.count:,} {'summary' if self.count == 1 else 'summaries'}"]
        for metric in METRICS:
            name = metric.replace("rouge", "ROUGE-")
            line = f"  {name:<10}{getattr(self, metric):6.2f}"
            if self.low is not None and self.high is not None:
                line += f"   {self.low[metric]:5.2f} to {self.high[metric]:5.2f}"
            lines.append(line)
        if self.low is not None:
            lines[0] += f", {self.confidence:.0%} bootstrap intervals"
        return "\n".join(lines)


def compute_rouge(
    predictions: Sequence[str],
    references: Sequence[str] | Sequence[Sequence[str]],
    *,
    intervals: bool = True,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> RougeScores:
    """Scores each prediction against its reference, or against the best of several.

    Args:
        predictions: the summaries to score. An empty one is a summary, and scores 0.
        references: a string for each prediction, or a list of strings, of which the one with the best F1
            counts, for each metric on its own.
        intervals: adds percentile bootstrap intervals of the means.
        confidence: their coverage, between 0 and 1.
        resamples: draws of the bootstrap; 1000 settles a 95 % interval to about a tenth of its width.
        seed: of the draws.

    Returns:
        F1 in percent, words stemmed, ROUGE-Lsum sentence by sentence. `rouge_score` sees Latin letters without
        accents and digits only: references in another script score 0, and are warned of.

    Raises:
        FreezeError: nothing to score, unlike lengths, something that is not a string, or a confidence or
            number of resamples out of range.

    >>> print(compute_rouge(["The shoes run small."], ["Lovely shoes, but they run small."], intervals=False))
    ROUGE F1 (%), 1 summary
      ROUGE-1    60.00
      ROUGE-2    25.00
      ROUGE-L    60.00
      ROUGE-Lsum 60.00
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise FreezeError(
            f"compute_rouge was asked for confidence={confidence} and resamples={resamples}. "
            f"Use a confidence between 0 and 1, such as 0.95, and at least 1 resample, such as 1000."
        )
    listed = _check(predictions, references)
    unseen = sum(not any(re.search("[a-z0-9]", text.lower()) for text in targets) for targets in listed)
    if unseen:
        warnings.warn(
            f"{unseen} of {len(listed)} references have no Latin letter and no digit: ROUGE scores them 0.",
            stacklevel=2,
        )
    scores = Rouge().compute(predictions=list(predictions), references=listed, use_aggregator=False)
    per_example: dict[str, Floats] = {metric: np.asarray(scores[metric]) for metric in METRICS}
    means = {metric: float(values.mean()) for metric, values in per_example.items()}
    low = high = None
    if intervals:
        low, high = _bootstrap(per_example, confidence, resamples, seed)
    return RougeScores(
        **means, count=len(predictions), per_example=per_example, low=low, high=high, confidence=confidence
    )


class Rouge(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """ROUGE as a module of `evaluate`, for whoever composes metrics with it: F1 in percent, words stemmed.

    `compute(predictions=..., references=...)` gives the four means; with `use_aggregator=False` the four lists
    of single scores. Predictions stay in memory, and no file is left behind.

    Args:
        options: of `evaluate.Metric`. Several processes need its `num_process`, `process_id`, `experiment_id`
            and a shared `cache_dir`.

    >>> Rouge().compute(predictions=["good shoes"], references=["good cheap shoes"])["rouge1"]
    80.0
    """

    def __init__(self, **options: Any) -> None:
        if "cache_dir" not in options and options.get("num_process", 1) == 1:
            # evaluate makes its folder even where nothing is written to it; this one goes with the object
            self._folder = tempfile.TemporaryDirectory(prefix="hf_freeze_rouge_")
            options = {"keep_in_memory": True, "cache_dir": self._folder.name} | options
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum F1 in percent, by rouge_score.",
            citation="Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004",
            inputs_description="predictions: strings. references: strings, or lists of strings.",
            features=[
                datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
                datasets.Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(
        self,
        *,
        predictions: Sequence[str],
        references: Sequence[str] | Sequence[Sequence[str]],
        use_aggregator: bool = True,
    ) -> dict[str, float] | dict[str, list[float]]:
        scorer = RougeScorer(METRICS, use_stemmer=True)
        values: dict[str, list[float]] = {metric: [] for metric in METRICS}
        for prediction, reference in zip(predictions, references, strict=True):
            targets = [reference] if isinstance(reference, str) else reference
            # By name, because rouge_score takes the target first, and F1 would not show a swap.
            # Line breaks matter to rougeLsum only: to the other metrics they are white space.
            best = scorer.score_multi(targets=[_by_line(target) for target in targets], prediction=_by_line(prediction))
            for metric in METRICS:
                values[metric].append(100 * best[metric].fmeasure)
        if use_aggregator:
            return {metric: float(np.mean(scores)) for metric, scores in values.items()}
        return values


def split_sentences(text: str) -> list[str]:
    """Cuts text into sentences, at line breaks and at . ! ? followed by white space.

    A regex of our own, because nltk's punkt has to be downloaded. It is made for reviews, where a sentence often
    starts in lower case; it knows titles ("Mr."), short forms ("e.g.", "5 oz."), initials and decimals.

    Args:
        text: any string.

    Returns:
        The sentences, stripped, none of them empty. No character but white space between them is lost.

    >>> split_sentences("Dr. Lee gave it 4.5 stars... and so do I! would buy again")
    ['Dr. Lee gave it 4.5 stars... and so do I!', 'would buy again']
    """
    sentences = []
    for line in text.splitlines():
        start = looked = 0
        worded = False  # whether the sentence so far has a letter: "1. Fits well" and "5/5! Great" are not cut
        for match in SENTENCE_END.finditer(line):
            worded = worded or any(character.isalpha() for character in line[looked : match.start()])
            looked = match.end()
            if worded and _ends_sentence(line, match):
                sentences.append(line[start:looked].strip())
                start, worded = looked, False
        sentences.append(line[start:].strip())
    return [sentence for sentence in sentences if sentence]


def first_sentence(review: str) -> str:
    """The review's first sentence: the summary that any model has to beat.

    Args:
        review: any string; one without a word gives "".

    >>> first_sentence("Love it! Wear it every day.")
    'Love it!'
    """
    return next(iter(split_sentences(review)), "")


def _ends_sentence(line: str, match: re.Match[str]) -> bool:
    # a short look back: the words that matter are short, and a review may be one line of 100 kB
    before, after = line[max(match.start() - 20, 0) : match.start()], line[match.end() : match.end() + 1]
    if match["stop"] != "." and set(match["stop"]) <= {".", "…"}:
        return not after.islower()  # a pause
    if match["stop"] != ".":
        return True
    word = before[-1:].strip() and before.split()[-1].lstrip("\"'“‘([")
    if word.casefold() in TITLES:
        return False
    if word.casefold() in SHORT_FORMS:
        return after.isupper()
    return not (len(word) == 1 and word.isalpha() and word.isupper() and word not in SIZES_AND_I)


def _by_line(text: str) -> str:
    return "\n".join(split_sentences(text))


def _check(predictions: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]]) -> list[list[str]]:
    """The references as lists, after a look at all that would give a wrong score or an error without a place."""
    for name, texts in (("predictions", predictions), ("references", references)):
        if isinstance(texts, str):
            raise FreezeError(f"compute_rouge was given {name} as one string. Give a list of strings.")
        check_kind("compute_rouge", name, texts, Sequence, "a list of strings", "[text]")
    if len(predictions) != len(references):
        raise FreezeError(
            f"compute_rouge was given {len(predictions)} predictions and {len(references)} references. "
            f"Give one reference, or one list of references, for each prediction."
        )
    if not len(predictions):
        raise FreezeError("compute_rouge was given empty lists. Give at least one prediction and its reference.")
    listed = []
    for number, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        targets = [reference] if isinstance(reference, str) else reference
        if not isinstance(targets, (list, tuple)) or not targets:
            raise FreezeError(
                f"references[{number}] is {reference!r}. Give a string, or a list of at least one string."
            )
        for text in (prediction, *targets):
            if not isinstance(text, str):
                raise FreezeError(
                    f"compute_rouge found {text!r} ({type(text).__name__}) at index {number}. "
                    f"Give strings: decode token ids first."
                )
        listed.append(list(targets))
    return listed


def _bootstrap(
    per_example: dict[str, Floats], confidence: float, resamples: int, seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Percentile intervals of the means, after "Bootstrap Methods: Another Look at the Jackknife" (Efron, 1979).

    Whole examples are drawn, so that the four metrics see the same draws.
    """
    scores = np.stack([per_example[metric] for metric in METRICS], axis=1)
    count = len(scores)
    generator = np.random.default_rng(seed)
    means = []
    left = resamples
    while left:
        drawn = min(left, max(1, MOST_DRAWS_AT_ONCE // count))
        means.append(scores[generator.integers(0, count, size=(drawn, count))].mean(axis=1))
        left -= drawn
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    return dict(zip(METRICS, low.tolist(), strict=True)), dict(zip(METRICS, high.tolist(), strict=True))
