"""hf-freeze: what the package does, as shell commands.

Each command is a module of this folder with three things: HELP (its description and examples), `add_arguments(parser)`
and `run(args, say)`, which returns what it found as `Told`; it may have `parents()`, parsers whose arguments it shares.
This module finds the command, words errors and sets exit codes: 0 fine, 1 a mistake that can be mended (one line on
stderr), 2 wrong usage, 130 interrupted; for recipes too. A command imports what is heavy inside `run`, so that help
comes at once.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from hf_freeze.errors import FreezeError, nearest
from hf_freeze.given import worded_arguments

__all__ = ["COMMANDS", "Told", "exit_code", "main", "worded_arguments"]

COMMANDS = {  # a new command is a module here and a line there
    "summarize": "summaries of a file of reviews of any size; goes on after a kill",
    "inspect": "the parts of a model, what a plan freezes, and what that will cost",
    "merge": "a delta and its base as one full model, checked",
    "sweep": "which depth to freeze: several are trained and compared",
    "cache": "list or clear the caches of frozen prefixes",
    "doctor": "versions, devices, bf16, disk space, and what is not installed",
}

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

Say = Callable[[str], object]


class Told(NamedTuple):
    """What a command found: as text, as JSON values for `--json`, and the exit code."""

    text: str
    values: dict[str, Any]
    code: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code.

    Args:
        argv: What stands after `hf-freeze`; None is that of the process.

    >>> main(["--version"])
    hf-freeze 0.1.0
    0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else ""
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name == "--version":
        print(f"hf-freeze {importlib.metadata.version('hf_freeze')}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS)
        known = f"nearest: {near[0]!r}" if near else f"commands: {', '.join(COMMANDS)}"
        problem = f"hf-freeze: {name!r} is no command; {known}." if name else ""
        print(problem or _overview(), file=sys.stderr)
        return 2
    return exit_code(lambda: _run(name, words[1:]))


def exit_code(program: Callable[[], int | None]) -> int:
    """Runs a program to its end and returns its exit code; an error that its user can mend is one line on stderr.

    Args:
        program: Returns its exit code, or None for 0. A recipe's `main`.

    >>> exit_code(lambda: None)
    0
    """
    try:
        return program() or 0
    except SystemExit as end:  # argparse has worded it
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not isinstance(error, FreezeError | OSError | MemoryError | _out_of_memory()):
            raise  # a fault of ours, or of who wrote the program: its place is what helps
        which = "" if _process() == "0" else f" in process {_process()}"
        print(f"error{which}: {_worded(error)}", file=sys.stderr)
        return 1


def _run(name: str, words: list[str]) -> int:
    command = importlib.import_module(f"hf_freeze.cli.{name}")
    parser = _Parser(
        prog=f"hf-freeze {name}",
        description=command.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=command.parents() if hasattr(command, "parents") else [],
    )
    command.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON; messages go to stderr")
    args = parser.parse_all(words)

    def say(message: str) -> None:
        if _process() == "0":
            print(message, flush=True)

    # What Trainer and others print on the way is a message too.
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        told: Told = command.run(args, say)
    if _process() == "0":
        print(json.dumps(told.values, ensure_ascii=False, indent=1) if args.json else told.text, flush=True)
    return told.code


def _process() -> str:
    """The number of this process among those that a launcher started; the first one tells what all have found."""
    return os.environ.get("RANK", "0")


class _Parser(argparse.ArgumentParser):
    """A parser that names the option nearest to one that does not exist."""

    def parse_all(self, words: list[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args(words)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
            near = f"; nearest: {nearest(unknown[0].partition('=')[0], known)}" if unknown[0].startswith("-") else ""
            self.error(f"{unknown[0]} is not known{near}")
        return args

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\nTry: {self.prog} --help\n")


def _overview() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: hf-freeze COMMAND ...",
            "",
            "Fine-tunes Hugging Face transformers with the lower part frozen.",
            "",
            *(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()),
            "",
            "  hf-freeze COMMAND --help shows options and examples; --json makes any command print JSON.",
            "  Exit codes: 0 fine, 1 something is to be mended, 2 wrong usage, 130 interrupted.",
        ]
    )


def _out_of_memory() -> type[Exception]:
    """What torch raises where a device is full, if the program has come to import torch."""
    return getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)


def _worded(error: Exception) -> str:
    if isinstance(error, MemoryError | _out_of_memory()):
        return "There is too little memory for this. Give fewer rows at once (a smaller batch size) or shorter texts."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__
