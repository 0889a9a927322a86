"""What a run leaves behind in words: tables, samples, predictions, and a folder that no other run is written over."""

from __future__ import annotations

import json
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from hf_freeze import FreezeError
from hf_freeze.files import write_whole
from hf_freeze.summarization import RougeScores, load_prompt, read_prompt, save_prompt
from hf_freeze.summarization.publish.results import (
    METRICS,
    PROMPT_FILE,
    RUN_FILES,
    new_output_folder,
    sample_text,
    score_table,
    write_jsonl,
)
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("name", [*RUN_FILES, "checkpoint-4"])
def test_a_folder_with_another_run_is_refused_and_taken_to_go_on(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert new_output_folder(str(folder)) == folder, "a folder that is not there is free"
    assert folder.is_dir()
    (folder / "notes.txt").write_text("mine")
    assert new_output_folder(str(folder)) == folder, "a folder without a run is free"
    (folder / name).write_text("")
    with pytest.raises(FreezeError, match=rf"it holds another run \({name}\)\. Choose another folder, go on with"):
        new_output_folder(str(folder))
    assert new_output_folder(str(folder), resuming=True) == folder


def test_without_a_name_the_next_free_folder_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert new_output_folder("") == Path("out/summaries-1")
    (tmp_path / "out" / "summaries-2").write_text("a file has the name too")
    assert new_output_folder("") == Path("out/summaries-3")


def test_runs_that_start_at_once_get_a_folder_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    together = threading.Barrier(16)

    def start(_: int) -> list[Path]:
        together.wait()
        return [new_output_folder("") for _ in range(5)]

    with ThreadPoolExecutor(16) as pool:
        folders = [folder for some in pool.map(start, range(16)) for folder in some]
    assert sorted(folders, key=str) == sorted((Path(f"out/summaries-{n}") for n in range(1, 81)), key=str)
    assert all(folder.is_dir() for folder in folders)


def test_a_folder_that_cannot_be_made_or_written_is_told_before_the_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for asked in ("file", "file/within"):
        with pytest.raises(FreezeError, match=rf"--output_dir {asked} was asked for; no folder can be made there: "):
            new_output_folder(asked)
    (tmp_path / "out").write_text("")
    with pytest.raises(FreezeError, match=r"--output_dir out/summaries-N was asked for; .*File exists \(out\)"):
        new_output_folder("")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(FreezeError, match="nothing can be written there"):
        new_output_folder("mine")


def test_the_table_of_scores_shows_intervals_where_there_are_any() -> None:
    values = {name: np.array([10.0, 20.0]) for name in METRICS}
    ends = dict.fromkeys(METRICS, 12.25), dict.fromkeys(METRICS, 18.75)
    plain = RougeScores(15.0, 15.0, 15.0, 15.0, 2, values)
    table = score_table({"before": RougeScores(15.0, 15.0, 15.0, 15.0, 2, values, *ends), "after": plain})
    assert table.columns == ("summaries", "ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum")
    assert table.rows == (("before", *["15.0 [12.2, 18.8]"] * 4), ("after", *["15.0"] * 4))
    assert table.lines == ("F1 x 100 on 2 test rows, 95% bootstrap intervals in brackets, stemmed.",)


def test_the_table_says_whose_rows_were_scored() -> None:
    scores = {"after": RougeScores(15.0, 15.0, 15.0, 15.0, 2, {name: np.array([10.0, 20.0]) for name in METRICS})}
    assert score_table(scores, "validation").lines[0].startswith("F1 x 100 on 2 validation rows, ")


def test_samples_are_spread_evenly_and_an_empty_summary_keeps_its_line() -> None:
    rows = [{"review": f"review {n}", "reference": "", "before": None, "after": f"after {n}"} for n in range(10)]
    text = sample_text(rows, count=2)
    assert text.split("\n\n") == [
        "   review: review 0\nreference:\n   before:\n    after: after 0",
        "   review: review 5\nreference:\n   before:\n    after: after 5",
    ]
    assert sample_text(rows[:1]).count("review 0") == 1
    assert sample_text([]) == ""


def test_long_reviews_are_cut_in_samples_and_lines_are_folded() -> None:
    text = sample_text([{"review": "word " * 200, "after": "x"}], width=60)
    assert "..." in text
    assert max(map(len, text.splitlines())) <= 60
    assert text.count("word") < 100


def test_predictions_keep_order_umlauts_and_line_ends_within_a_text(tmp_path: Path) -> None:
    rows = [{"review": "Schöner\nBecher\u2028", "score": 1.5}, {"review": None, "path": Path("a/b")}]
    path = tmp_path / "new" / "predictions.jsonl"
    write_jsonl(path, rows)
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [rows[0], {"review": None, "path": "a/b"}]
    assert lines[-1] == ""
    assert "ö" in lines[0]


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_a_prompt_comes_back_as_it_was_kept(kind: str, tmp_path: Path) -> None:
    tokenizer, config = tiny_tokenizer(kind), tiny_model(kind).config
    template = None if kind == "bart" else "Review: {review}\nTitle:"
    prompt = read_prompt(tokenizer, config, template=template, max_source_tokens=40, max_summary_tokens=8)
    save_prompt(prompt, template, tmp_path, num_beams=3)
    found, beams = load_prompt(tokenizer, config, tmp_path)
    assert beams == 3
    assert (found.max_source_tokens, found.max_summary_tokens) == (40, 8)
    assert json.loads((tmp_path / PROMPT_FILE).read_text())["template"] == template


def test_without_a_kept_prompt_the_defaults_are_taken(tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    prompt, beams = load_prompt(tiny_tokenizer("llama"), AutoConfig.from_pretrained(tmp_path), tmp_path)
    assert beams == 1
    assert prompt.max_summary_tokens > 0


def test_a_file_is_whole_or_absent_and_others_may_read_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_whole(tmp_path / "a.txt", "one")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644

    def full(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OSError, match="disk full"):
            write_whole(tmp_path / "a.txt", "two")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "one"}
