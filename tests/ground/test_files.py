"""A file is written whole or not at all, by however many at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hf_freeze import FreezePlan
from hf_freeze.depth.report import rewrite_runs
from hf_freeze.files import write_json, write_whole


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
