"""A file that is written over a long time and gone on with after a kill, to the bytes of an undisturbed run.

Each piece is a shard, a file of its own in OUTPUT.partial/, written whole or not at all; at the end the shards are
joined, and the whole takes the output's name. The run that goes on must be the same one: its facts, the input that was
consumed and the bytes of the shards are compared first. It knows nothing of rows, columns or models.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from hf_freeze.errors import FreezeError, ResumeError
from hf_freeze.files import whole, write_json, write_whole
from hf_freeze.locks import alone_in

__all__ = ["ResumableFile", "check_free", "facts_before"]

VERSION = 2
RUN = "run.json"


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
        return dict(json.loads((_folder(output) / RUN).read_text(encoding="utf-8"))["facts"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # `begin` words what is wrong


def _folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


class ResumableFile:
    """An output that appears under its name when it is whole, and until then goes on where it stopped.

    A context manager: it takes the unfinished output for this process, and lets it go again. In this order: `begin`,
    `skip`, `append` as often as needed, `finish`.

    Args:
        output: The file to make. Its folder is made where it is missing.

    Attributes:
        folder: Where the shards lie; what else is put there goes with it.
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
        self.folder = _folder(output)
        self.notes: list[str] = []
        self._lock = contextlib.ExitStack()
        self._run: dict[str, Any] = {}
        self._noted = False
        self._shards_done = 0
        self._consumed = hashlib.blake2b(digest_size=16)
        self._consumed_before = ""

    def __enter__(self) -> Self:
        check_free(self.output)
        if self.folder.is_file():
            raise ResumeError(f"{self.folder} is a file, and no folder of an unfinished run. Remove it.")
        with self._worded():
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                before = self.folder.stat()
                self._lock.enter_context(alone_in(self.folder))
                ours = os.path.samestat(before, self.folder.stat())  # not one that another run has removed meanwhile
            except (BlockingIOError, FileNotFoundError):
                ours = False
        if not ours:
            self._lock.close()
            raise FreezeError(f"Another process is writing {self.folder}. Wait for it, or choose another output.")
        try:
            check_free(self.output)  # again: another run may have finished it before the lock was ours
        except FreezeError:
            self.__exit__()
            raise
        for torn in self.folder.glob("*.tmp"):  # of a run that was killed
            torn.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._shards():  # nothing is worth keeping
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def begin(self, facts: Mapping[str, Any], circumstances: Mapping[str, Any]) -> dict[str, Any]:
        """Finds out where to go on, and notes what this run is.

        Args:
            facts: JSON values by name that must be those of the run before.
            circumstances: JSON values by name whose change goes into `notes`.

        Returns:
            The state of the last shard; {} for a new run.

        Raises:
            ResumeError: What lies there is of another run, or is not what it wrote.
        """
        self._run = json.loads(json.dumps({"version": VERSION, "facts": facts, "circumstances": circumstances}))
        shards, state = self._shards(), {}
        if shards:
            self._compare(self._run)
        for number, path in enumerate(shards):
            head, content = self._read(path)
            if path != self._shard(number) or head.get("written") != _digest(content):
                raise ResumeError(
                    f"{path} does not hold what was written there: somebody changed the folder, or its disk lost it. "
                    f"{self._anew}"
                )
            self._consumed_before, state = head["consumed"], head["state"]
        self._shards_done = len(shards)
        return dict(state)

    def _compare(self, run: Mapping[str, Any]) -> None:
        """Refuses the shards of another run, and notes what may differ."""
        path = self.folder / RUN
        if not path.exists():
            raise ResumeError(
                f"{self.folder} is there without its {RUN}, so that nobody can tell of which run it is. Remove it, or "
                f"choose another output."
            )
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            version, facts, circumstances = before["version"], dict(before["facts"]), dict(before["circumstances"])
        except (ValueError, KeyError, TypeError) as error:
            raise ResumeError(f"{path} cannot be read ({error!r}). {self._anew}") from error
        if version != VERSION:
            raise ResumeError(f"{path} is of version {version}; this one reads version {VERSION}. {self._anew}")
        for name in {**run["facts"], **facts}:
            asked, noted = run["facts"].get(name), facts.get(name)
            if asked != noted:
                raise ResumeError(
                    f"{self.folder} was begun by another run: its {name} was {noted!r}, and {asked!r} was asked for. "
                    f"Give what it was begun with, or start anew. {self._anew}"
                )
        for name in {**run["circumstances"], **circumstances}:
            now, noted = run["circumstances"].get(name), circumstances.get(name)
            if now != noted:
                self.notes.append(f"{name} was {noted}, and is {now} from here on")

    def skip(self, marks: Iterator[bytes], count: int) -> None:
        """Consumes the marks of the input that the run before has dealt with.

        Args:
            marks: What identifies each item of the input, from its beginning.
            count: How many the run before has consumed.

        Raises:
            ResumeError: They are not those of that run.
        """
        consumed = 0
        for mark in itertools.islice(marks, count):
            self._consumed.update(mark)
            consumed += 1
        if count and (consumed < count or self._consumed.hexdigest() != self._consumed_before):
            raise ResumeError(
                f"{self.folder} was begun with another input: its first {count:,} rows are not those that were dealt "
                f"with. Give that input, or start anew. {self._anew}"
            )

    def append(self, content: str, marks: Iterable[bytes], state: Mapping[str, Any]) -> None:
        """Writes on; when it returns, content and state are on disk.

        Args:
            content: What to append, as UTF-8.
            marks: Of the input that it was made from.
            state: JSON values for the next run.

        Raises:
            FreezeError: The disk is full or gone; the shards before stay.
        """
        for mark in marks:
            self._consumed.update(mark)
        encoded = content.encode()
        head = {"written": _digest(encoded), "consumed": self._consumed.hexdigest(), "state": state}
        with self._worded():
            if not self._noted:
                write_json(self.folder / RUN, self._run)
                self._noted = True
            write_whole(self._shard(self._shards_done), json.dumps(head).encode() + b"\n" + encoded)
        self._shards_done += 1

    def finish(self) -> None:
        """Joins the shards under the output's name. Killed at any moment, it is whole under that name or not there."""
        with self._worded():
            with whole(self.folder / "joined") as joined, joined.open("wb") as file:
                for path in self._shards():
                    file.write(self._read(path)[1])
            os.replace(self.folder / "joined", self.output)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob("*.shard"))

    def _shard(self, number: int) -> Path:
        return self.folder / f"{number:08}.shard"

    def _read(self, path: Path) -> tuple[dict[str, Any], bytes]:
        """What a shard says of itself, {} where it is damaged, and its content."""
        head, _, content = path.read_bytes().partition(b"\n")
        try:
            return dict(json.loads(head)), content
        except (ValueError, TypeError):
            return {}, content

    @property
    def _anew(self) -> str:
        return f"To start anew, remove {self.folder.name}."

    @contextlib.contextmanager
    def _worded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FreezeError(
                f"{self.folder} could not be written: {error.strerror or error}. What was noted stays: mend that, "
                f"start the same again, and it goes on."
            ) from error


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
