"""Recipes, commands and the application take from the library what it offers, and nothing that is its own."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
APPLICATION = sorted(path for room in ("cli", "summarization") for path in (ROOT / "hf_freeze" / room).rglob("*.py"))
DOORS = ("anatomy", "freezing", "prefix", "depth")  # entered by the names of their __init__ alone


def taken(path: Path) -> Iterator[tuple[str, str]]:
    """Module and name of each import from hf_freeze."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "hf_freeze":
            yield from ((str(node.module), alias.name) for alias in node.names)
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "hf_freeze" for alias in node.names), "from hf_freeze import ..."


@pytest.mark.parametrize("path", RECIPES + APPLICATION, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_public_names_of_the_library_are_taken(path: Path) -> None:
    for module, name in taken(path):
        room = module.split(".")[1:]
        assert not (len(room) > 1 and room[0] in DOORS), f"{module} is entered past its door"
        assert not any(piece.startswith("_") for piece in (*room, name)), f"{module}.{name}"
        if path in RECIPES:
            offered = getattr(importlib.import_module(module), "__all__", None)
            assert offered is None or name in offered, f"{module} does not offer {name}"


def test_a_recipe_reads_on_two_screens() -> None:
    recipe = ROOT / "recipes" / "summarize_reviews.py"
    text = recipe.read_text(encoding="utf-8")
    main = next(node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert len(text.splitlines()) <= 200
    assert main.end_lineno is not None
    assert main.end_lineno - main.lineno < 80
