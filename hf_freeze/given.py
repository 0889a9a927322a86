"""Checks of what a public function was given: a wrong kind of argument ends in a sentence, before anything is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from hf_freeze.errors import FreezeError

__all__ = [
    "check_callable",
    "check_kind",
    "check_model",
    "check_path",
    "check_trainer",
    "read_numbers",
    "worded_arguments",
]

Number = TypeVar("Number", int, float)


def check_model(what: str, model: object) -> None:
    """Refuses what is no model, and says how to get one.

    >>> check_model("freeze", "gpt2")
    Traceback (most recent call last):
    hf_freeze.errors.FreezeError: freeze was given the str 'gpt2' as model; it takes a model, an nn.Module. \
Load it first: AutoModelForCausalLM.from_pretrained('gpt2').
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, str | os.PathLike):
        fix = f"Load it first: AutoModelForCausalLM.from_pretrained({str(model)!r})."
    elif isinstance(model, type) and issubclass(model, nn.Module):
        fix = f"Make one of the class first, for example {model.__name__}(config) or by from_pretrained."
    elif isinstance(getattr(model, "model", None), nn.Module):
        fix = f"Use the one that it holds: its attribute model, a {type(model.model).__name__}."  # type: ignore[attr-defined]
    else:
        fix = "Load one first, for example by AutoModelForCausalLM.from_pretrained."
    raise FreezeError(f"{what} was given {_words(model)} as model; it takes a model, an nn.Module. {fix}")


def check_trainer(what: str, trainer: object) -> None:
    """Refuses what is no Trainer: it is told by what it holds, since there are many kinds."""
    if isinstance(trainer, type) or not all(hasattr(trainer, name) for name in ("args", "model", "callback_handler")):
        raise FreezeError(
            f"{what} was given {_words(trainer)} as trainer; it takes a Trainer of transformers, such as "
            "Trainer(model=model, args=args, train_dataset=rows)."
        )


def check_callable(what: str, argument: str, value: object, returns: str) -> None:
    """Refuses what cannot be called, such as the thing itself instead of a function that makes it."""
    if not callable(value) or isinstance(value, nn.Module):
        raise FreezeError(
            f"{what} was given {_words(value)} as {argument}; it takes a function that returns {returns}. "
            f"Use {argument}=lambda ...: ..., or a function's name."
        )


def check_path(what: str, argument: str, value: object) -> None:
    """Refuses what is no path."""
    check_kind(what, argument, value, (str, os.PathLike), "a path", "a str or a pathlib.Path")


def check_kind(
    what: str,
    argument: str,
    value: object,
    kinds: type | tuple[type, ...],
    takes: str,
    fix: str,
    error: Callable[[str], Exception] = FreezeError,
) -> None:
    """Refuses a value that is an instance of none of the kinds: `takes` says in words what they are, `fix` what to use.

    `what` is the function that was called, `error` the class to raise.
    """
    if not isinstance(value, kinds):
        raise error(f"{what} was given {_words(value)} as {argument}; it takes {takes}. Use {fix}.")


def read_numbers(text: str, kind: type[Number]) -> list[Number]:
    """Numbers with commas between them, as they are given on a command line; "" is none.

    >>> read_numbers("0,15,22", int), read_numbers("", float)
    ([0, 15, 22], [])
    """
    try:
        return [kind(piece) for piece in text.split(",") if piece.strip()]
    except ValueError:
        raise FreezeError(f"{text!r} was given; use numbers with commas between them, such as 0,15,22.") from None


@contextmanager
def worded_arguments() -> Iterator[None]:
    """Turns what transformers says of a program's arguments, or of the YAML or JSON file with them, into one sentence.

    Raises:
        FreezeError: An argument that is not known, a value that cannot be, a file that is damaged.
    """
    try:
        yield
    except (FreezeError, OSError):
        raise
    except Exception as error:  # ValueError, TypeError, KeyError, yaml.YAMLError, ImportError
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise FreezeError(f"These arguments cannot be taken: {reason}. --help lists what there is.") from error


def _words(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str | int | float | os.PathLike):
        return f"the {type(value).__name__} {value!r}"
    return f"a {type(value).__name__}"
