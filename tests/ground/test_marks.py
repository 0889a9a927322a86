"""Each attribute that stands on models has one owner, and marks.py names it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import hf_freeze.marks

PACKAGE = Path(hf_freeze.marks.__file__).parent
OWNERS = dict(
    re.findall(r'^([A-Z_]+) = "_hf_freeze_\w+"  # ([\w.]+):', Path(hf_freeze.marks.__file__).read_text(), re.M)
)
WRITERS = {"setattr": 1, "delattr": 1, "pop": 0, "setdefault": 0}  # and which argument is the name


def written(tree: ast.AST) -> Iterator[str]:
    """The names of the marks that a file writes or removes."""
    for node in ast.walk(tree):
        name: ast.AST | None = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            name = node.slice
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if called in WRITERS and len(node.args) > WRITERS[called]:
                name = node.args[WRITERS[called]]
        if isinstance(name, ast.Name) and name.id in OWNERS:
            yield name.id


def test_each_mark_is_written_by_the_room_that_is_named_beside_it() -> None:
    writers: dict[str, set[str]] = {name: set() for name in OWNERS}
    for path in PACKAGE.rglob("*.py"):
        room = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for name in written(ast.parse(path.read_text(encoding="utf-8"))):
            writers[name].add(room)
    assert writers == {name: {owner} for name, owner in OWNERS.items()}
    assert {*OWNERS, "is_mark"} == set(hf_freeze.marks.__all__)


def test_no_room_spells_a_mark_itself() -> None:
    spelled = {
        (path.name, string)
        for path in PACKAGE.rglob("*.py")
        for string in re.findall(r'"(_hf_freeze_\w*)"', path.read_text(encoding="utf-8"))
        if path.name != "marks.py"
    }
    assert spelled == {("processes.py", "_hf_freeze_told")}, "on an error, not on a model"
