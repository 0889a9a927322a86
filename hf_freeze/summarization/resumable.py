"""A file that is written over a long time and gone on with after a kill, to the bytes of an undisturbed run.

What is appended lies in OUTPUT.partial and is on disk before OUTPUT.partial.json says so; what was written and not
noted, a torn row included, is cut off when the next run goes on. That run must be the same one: its facts, the input
that was consumed and the bytes that were written are compared first. It knows nothing of rows, columns or models.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

from hf_freeze.errors import FreezeError, ResumeError
from hf_freeze.files import write_json

__all__ = ["ResumableFile", "check_free", "facts_before"]

VERSION = 1
CHUNK_BYTES = 1 << 20


def check_free(output: Path) -> None:
    """Makes sure that no file has the name of the output.

    Raises:
        FreezeError: One has.
    """
    if output.exists():
        raise FreezeError(f"{output} was to be written; it exists already. Choose another name, or remove it yourself.")


def facts_before(output: Path) -> dict[str, Any]:
    """The facts of the unfinished run whose output this is; {} where there is none, or none that can be read.

    >>> facts_before(Path("no", "such.csv"))
    {}
    """
    try:
        return dict(json.loads(_side(output).read_text(encoding="utf-8"))["facts"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # `begin` words what is wrong


def _side(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial.json")


class ResumableFile:
    """An output that appears under its name when it is whole, and until then goes on where it stopped.

    A context manager: it takes the unfinished file for this process, and lets it go again. In this order: `begin`,
    `skip`, `append` as often as needed, `finish`.

    Args:
        output: The file to make. Its folder is made where it is missing.

    Attributes:
        notes: What differs from the run before and may.

    Raises:
        FreezeError: It exists, cannot be written, or another process is writing it.

    >>> import tempfile
    >>> output = Path(tempfile.mkdtemp(), "out.txt")
    >>> with ResumableFile(output) as file:  # a run that stops
    ...     file.begin({"model": "a"}, {})
    ...     file.append("first\\n", [b"row 1"], {"rows": 1})
    {}
    >>> with ResumableFile(output) as file:  # the next one
    ...     file.begin({"model": "a"}, {})
    ...     file.skip(iter([b"row 1"]), 1)
    ...     file.append("second\\n", [b"row 2"], {"rows": 2})
    ...     file.finish()
    {'rows': 1}
    >>> output.read_text(), [path.name for path in output.parent.iterdir()]
    ('first\\nsecond\\n', ['out.txt'])
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(f"{output.name}.partial")
        self.side = _side(output)
        self.notes: list[str] = []
        self._run: dict[str, Any] = {}
        self._bytes = 0
        self._begun = False  # something of this output is worth keeping
        self._written = hashlib.blake2b(digest_size=16)
        self._consumed = hashlib.blake2b(digest_size=16)
        self._consumed_before = ""
        self._file: IO[bytes]

    def __enter__(self) -> Self:
        check_free(self.output)
        with self._worded():
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)  # nothing is left to write when a full disk has closed it
        if not _lock(self._file) or not self._is_ours():
            self._file.close()
            raise FreezeError(f"Another process is writing {self.path}. Wait for it, or choose another output.")
        try:
            check_free(self.output)  # again: another run may have finished it before the file was opened
        except FreezeError:
            if not self.path.stat().st_size:  # what was opened is new then, and nobody else's
                with contextlib.suppress(PermissionError):  # Windows removes no open file
                    self.path.unlink()
            self._file.close()
            raise
        for torn in self.side.parent.glob(f"{glob.escape(self.side.name)}.*.tmp"):  # of a run that was killed
            torn.unlink(missing_ok=True)
        self._begun = self.side.exists() or self.path.stat().st_size > 0
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if sys.platform == "win32":  # which renames and removes no open file
            self._file.close()
        if kind is not None and not self._begun:
            self.path.unlink(missing_ok=True)
            self.side.unlink(missing_ok=True)
        self._file.close()  # and with it the lock

    def _is_ours(self) -> bool:
        """Whether the file that was opened still has this name: another run may have finished it before the lock."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def begin(self, facts: Mapping[str, Any], circumstances: Mapping[str, Any]) -> dict[str, Any]:
        """Finds out where to go on, and notes what this run is.

        Args:
            facts: JSON values by name that must be those of the run before.
            circumstances: JSON values by name whose change goes into `notes`.

        Returns:
            The state that was noted last; {} for a new run.

        Raises:
            ResumeError: What lies there is of another run, or is not what it wrote.
        """
        self._run = json.loads(json.dumps({"version": VERSION, "facts": facts, "circumstances": circumstances}))
        size = self.path.stat().st_size
        if not self.side.exists():
            if size:
                raise ResumeError(
                    f"{self.path} is there without {self.side.name}, so that nobody can tell of which run it is. "
                    f"Remove it, or choose another output."
                )
            self._note({})
            return {}
        state, written = self._read_side()
        self._check_written(written, size)
        return state

    def _read_side(self) -> tuple[dict[str, Any], str]:
        """The state that was noted, and the digest of what was written."""
        try:
            values = json.loads(self.side.read_text(encoding="utf-8"))
            version, then, made_with = values["version"], dict(values["facts"]), dict(values["circumstances"])
            self._bytes, self._consumed_before = int(values["bytes"]), str(values["consumed"])
            written, state = str(values["written"]), dict(values["state"])
        except (ValueError, KeyError, TypeError) as error:
            raise ResumeError(f"{self.side} cannot be read ({error!r}). {self._anew}") from error
        if version != VERSION:
            raise ResumeError(f"{self.side} is of version {version}; this one reads version {VERSION}. {self._anew}")
        facts, circumstances = self._run["facts"], self._run["circumstances"]
        for name in {**facts, **then}:
            if facts.get(name) != then.get(name):
                raise ResumeError(
                    f"{self.path} was begun by another run: its {name} was {then.get(name)!r}, and "
                    f"{facts.get(name)!r} was asked for. Give what it was begun with, or start anew. {self._anew}"
                )
        for name in {**circumstances, **made_with}:
            if circumstances.get(name) != made_with.get(name):
                self.notes.append(f"{name} was {made_with.get(name)}, and is {circumstances.get(name)} from here on")
        return state, written

    def _check_written(self, written: str, size: int) -> None:
        """Compares what was written with what was noted, and cuts off the rest."""
        if size >= self._bytes:
            with self.path.open("rb") as file:
                left = self._bytes
                while left and (chunk := file.read(min(left, CHUNK_BYTES))):
                    self._written.update(chunk)
                    left -= len(chunk)
        if self._written.hexdigest() != written:
            raise ResumeError(
                f"{self.path} does not hold what was written there: somebody changed it, or its disk lost it. "
                f"{self._anew}"
            )
        with self._worded():
            self._file.truncate(self._bytes)

    def skip(self, marks: Iterator[bytes], count: int) -> None:
        """Consumes the marks of the input that the run before has dealt with.

        Args:
            marks: What identifies each item of the input, from its beginning.
            count: How many the run before has consumed.

        Raises:
            ResumeError: They are not those of that run.
        """
        found = 0
        for mark in itertools.islice(marks, count):
            self._consumed.update(mark)
            found += 1
        if count and (found < count or self._consumed.hexdigest() != self._consumed_before):
            raise ResumeError(
                f"{self.path} was begun with another input: its first {count:,} rows are not those that were dealt "
                f"with. Give that input, or start anew. {self._anew}"
            )

    def append(self, content: str, marks: Iterable[bytes], state: Mapping[str, Any]) -> None:
        """Writes on; when it returns, content and state are on disk.

        Args:
            content: What to append, as UTF-8.
            marks: Of the input that it was made from.
            state: JSON values for the next run.

        Raises:
            FreezeError: The disk is full or gone; what was noted before stays.
        """
        encoded = content.encode()
        with self._worded():
            left = memoryview(encoded)
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        self._begun = True
        self._bytes += len(encoded)
        self._written.update(encoded)
        for mark in marks:
            self._consumed.update(mark)
        self._note(state)

    def _note(self, state: Mapping[str, Any]) -> None:
        digests = {"written": self._written.hexdigest(), "consumed": self._consumed.hexdigest()}
        with self._worded():
            write_json(self.side, {**self._run, "bytes": self._bytes, **digests, "state": state})

    def finish(self) -> None:
        """Gives the file its name. Killed at any moment, it is whole under one of its two names."""
        if sys.platform == "win32":
            self._file.close()
        with self._worded():
            os.replace(self.path, self.output)
            self.side.unlink()
        self._file.close()  # and with it the lock: nobody else may begin before the name is there

    @property
    def _anew(self) -> str:
        return f"To start anew, remove {self.path.name} and {self.side.name}."

    @contextlib.contextmanager
    def _worded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FreezeError(
                f"{self.path} could not be written: {error.strerror or error}. What was noted stays: mend that, start "
                f"the same again, and it goes on."
            ) from error


def _lock(file: IO[bytes]) -> bool:
    """Takes the file for this process until it ends; False where another one has it. Without locks here: True."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network disks have no locks
        return True
    return True
