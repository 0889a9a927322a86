"""A file is written whole or not at all, by however many at once."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from hf_freeze import FreezePlan
from hf_freeze.depth.report import rewrite_runs
from hf_freeze.files import whole, write_json, write_whole


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_json(path, {}),
        lambda path: rewrite_runs(path, []),
        lambda path: write_whole(path, "text"),
        lambda path: FreezePlan().save_pretrained(path),
    ],
    ids=["write_json", "rewrite_runs", "write_whole", "save_pretrained"],
)
def test_two_that_write_one_file_do_not_take_each_others_half(
    write: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    replace = os.replace

    def overtaken(*paths: Any) -> None:
        monkeypatch.setattr(os, "replace", replace)
        write(tmp_path / "place")
        replace(*paths)

    monkeypatch.setattr(os, "replace", overtaken)
    write(tmp_path / "place")
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("held", [None, "", "theirs"])
def test_a_folder_takes_the_place_of_an_empty_one_and_of_no_other(held: str | None, tmp_path: Path) -> None:
    path = tmp_path / "place"
    if held is not None:
        path.mkdir()
    if held:
        (path / held).touch()
    with pytest.raises(OSError, match="not empty") if held else nullcontext(), whole(path) as temporary:
        temporary.mkdir()
        (temporary / "ours").touch()
    assert [entry.name for entry in path.iterdir()] == [held or "ours"]
    assert list(tmp_path.iterdir()) == [path]
