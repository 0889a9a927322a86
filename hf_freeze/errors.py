"""The errors that hf_freeze raises, and how it words them.

Every message says what was asked, what was found, the nearest valid choices and the fix. All of them are
ValueErrors, so that a caller may catch them without knowing this module. Nothing here looks at a model.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "AnatomyError",
    "CacheDamaged",
    "CannotCache",
    "DeltaMismatch",
    "FreezeError",
    "FrozenWeightsChanged",
    "ModelError",
    "PlanError",
    "RankLost",
    "ResumeError",
    "ReviewsError",
    "StageError",
    "TokenizerMismatch",
    "TrainingDiverged",
    "first_few",
    "first_line",
    "nearest",
    "worded",
]


class FreezeError(ValueError):
    """Base of every error that hf_freeze raises on purpose."""


class AnatomyError(FreezeError):
    """The structure of a model could not be told: no blocks, or several candidates."""


class PlanError(FreezeError):
    """A plan asks for what the model does not have, or contradicts itself."""


class CannotCache(FreezeError):
    """The frozen prefix of a model cannot be computed once and replayed exactly; the message says why."""


class CacheDamaged(FreezeError):
    """A prefix cache on disk is missing, damaged, or was built for something else."""


class DeltaMismatch(FreezeError):
    """A delta is missing or damaged, or belongs to another model than the one it was to be loaded into."""


class FrozenWeightsChanged(FreezeError):
    """A tensor that should be frozen does not hold the bits it held when it was frozen."""


class ModelError(FreezeError):
    """A model, checkpoint or output folder is not what was asked for."""


class RankLost(FreezeError):
    """Another process of the launch is gone, so that this one cannot go on; the message names it where it can."""


class ResumeError(FreezeError):
    """A run cannot go on from a checkpoint: it is not whole, or belongs to another plan, model or data."""


class ReviewsError(FreezeError):
    """Reviews cannot be read as asked: a missing file or column, a broken row, too few rows."""


class StageError(FreezeError):
    """Stages cannot be trained as asked: they shrink, never end, or the trainer does not fit them."""


class TrainingDiverged(FreezeError):
    """The loss is not a finite number any more; the message names the step and the last good checkpoint."""


class TokenizerMismatch(FreezeError):
    """A tokenizer does not fit the model: the pitfall "input does not match the pretrained model"."""


def nearest(asked: str, choices: Iterable[str], count: int = 3) -> str:
    """Words the valid choices closest to what was asked, or the first few where nothing is close.

    >>> nearest("sumary", ["text", "summary", "rating"])
    "'summary'"
    >>> nearest("zzz", ["text", "summary", "rating", "id"])
    "'text', 'summary', 'rating' and 1 more"
    """
    choices = list(choices)
    close = difflib.get_close_matches(asked, choices, n=count, cutoff=0.6)
    if close:
        return ", ".join(repr(choice) for choice in close)
    shown = ", ".join(repr(choice) for choice in choices[:count])
    return shown + (f" and {len(choices) - count} more" if len(choices) > count else "")


def first_few(names: Sequence[str], count: int = 3) -> str:
    """The first of several names, and how many more there are.

    >>> first_few(["a", "b", "c"]), first_few(["a", "b", "c"], 2)
    ('a, b, c', 'a, b, ... and 1 more')
    """
    return ", ".join(names[:count]) + (f", ... and {len(names) - count} more" if len(names) > count else "")


def worded(error: BaseException) -> str:
    """An error of somebody else's within a sentence of ours.

    >>> worded(KeyError("text")), worded(MemoryError())
    ("KeyError: 'text'", 'MemoryError')
    """
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def first_line(error: BaseException) -> str:
    """What somebody else's error says first, to stand within a sentence of ours.

    >>> first_line(OSError("no such file.\\nTraceback ...")), first_line(KeyError())
    ('no such file', 'KeyError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
