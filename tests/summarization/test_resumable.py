"""The same bytes however often a run is killed, and never those of another run."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hf_freeze.errors import FreezeError, ResumeError
from hf_freeze.summarization.resumable import ResumableFile, check_free, facts_before
from tests.summarization.streams import ROWS, Stopped, left, stopping_after, stream, table


def killed_at(step: int, run: Callable[[], object]) -> bool:
    """Runs in a process that kills itself, without any clean-up, before its n-th step to disk; whether it did."""

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal step
            step -= 1
            if step < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return wrapped

    child = os.fork()
    if child == 0:
        try:
            for name in ("mkdir", "fsync", "replace", "unlink", "rmdir"):
                setattr(os, name, dying(getattr(os, name)))
            run()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status)
    return status != 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of itself")
@pytest.mark.parametrize("group_by", [None, "product"])
def test_a_run_killed_at_any_step_ends_with_the_bytes_of_an_undisturbed_one(
    group_by: str | None, tmp_path: Path
) -> None:
    source = table(tmp_path / "in.csv", ROWS)
    options: dict[str, Any] = {"group_by": group_by, "window_rows": 4, "facts": {"model": "a"}}
    stream(source, tmp_path / "whole.csv", **options)
    whole = (tmp_path / "whole.csv").read_bytes()
    step, killed = 0, True
    while killed:
        folder = tmp_path / str(step)
        folder.mkdir()
        output = folder / "out.csv"
        killed = killed_at(step, lambda to=output: stream(source, to, **options))
        if output.exists():  # killed when it was whole already
            assert output.read_bytes() == whole
        else:
            assert killed
            stream(source, output, **options)
            assert output.read_bytes() == whole
            assert left(folder) == ["out.csv"]
        step += 1
    assert step > 15


def test_a_run_killed_again_and_again_goes_on(tmp_path: Path) -> None:
    stream(ROWS, tmp_path / "whole.csv")
    for _ in range(3):
        with pytest.raises(Stopped):
            stream(ROWS, tmp_path / "out.csv", stopping_after(1))
    said: list[str] = []
    report = stream(ROWS, tmp_path / "out.csv", say=said.append)
    assert report.rows_before == 9
    assert "went on after row 9" in str(report)
    assert any("goes on after row 9" in line for line in said)
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_shard_that_a_kill_has_torn_is_written_again(tmp_path: Path) -> None:
    stream(ROWS, tmp_path / "whole.csv")
    with pytest.raises(Stopped):
        stream(ROWS, tmp_path / "out.csv", stopping_after(2))
    (tmp_path / "out.csv.partial" / "00000002.shard.0f.tmp").write_text('6,p0,"half a ro')
    stream(ROWS, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert left(tmp_path) == ["out.csv", "whole.csv"]


def half(folder: Path, rows: Sequence[dict[str, str]] = ROWS, **options: Any) -> Path:
    """An output of which two windows are there."""
    with pytest.raises(Stopped):
        stream(rows, folder / "out.csv", stopping_after(2), facts={"model": "a"}, **options)
    return folder / "out.csv"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"facts": {"model": "b"}}, r"its model was 'a', and 'b' was asked for"),
        (ROWS, {"facts": {"model": "a"}, "window_rows": 4}, r"its window_rows was 3, and 4 was asked for"),
        (ROWS, {"facts": {"model": "a"}, "text_column": "id"}, r"its text_column was 'review', and 'id'"),
        (ROWS[1:], {"facts": {"model": "a"}}, r"begun with another input: its first 6 rows"),
        (ROWS[:4], {"facts": {"model": "a"}}, r"begun with another input: its first 6 rows"),
        ([{**ROWS[0], "id": "x"}, *ROWS[1:]], {"facts": {"model": "a"}}, "begun with another input"),
    ],
)
def test_another_run_does_not_go_on_from_this_one(
    rows: list[dict[str, str]], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    output = half(tmp_path)
    folder = tmp_path / "out.csv.partial"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ResumeError, match=message):
        stream(rows, output, **options)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert stream(ROWS, output, facts={"model": "a"}).rows_before == 6, "the right one still does"


def test_rows_that_were_added_behind_are_summarised_too(tmp_path: Path) -> None:
    output = half(tmp_path)
    more = [*ROWS, {"id": "11", "product": "p1", "review": "more"}]
    stream(more, output, facts={"model": "a"})
    stream(more, tmp_path / "whole.csv")
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_what_may_change_is_noted(tmp_path: Path) -> None:
    output = half(tmp_path, circumstances={"batch_size": 16})
    report = stream(ROWS, output, facts={"model": "a"}, circumstances={"batch_size": 8})
    assert "note: batch_size was 16, and is 8 from here on: summaries may differ" in str(report)


def changed(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shards, run: changed(shards[0], lambda old: old[:-2] + b"xx"), "does not hold what was written"),
        (lambda shards, run: changed(shards[1], lambda old: old[:-1]), "does not hold what was written"),
        (lambda shards, run: changed(shards[1], lambda old: b""), "does not hold what was written"),
        (lambda shards, run: shards[0].unlink(), "does not hold what was written"),
        (lambda shards, run: run.unlink(), r"is there without its run\.json"),
        (lambda shards, run: run.write_text("{"), "cannot be read"),
        (lambda shards, run: run.write_text("{}"), "cannot be read"),
        (lambda shards, run: changed(run, lambda old: old.replace(b'"version": 2', b'"version": 9')), "version 9"),
    ],
)
def test_a_damaged_half_is_refused_with_what_to_remove(damage: Any, message: str, tmp_path: Path) -> None:
    output = half(tmp_path)
    folder = tmp_path / "out.csv.partial"
    damage(sorted(folder.glob("*.shard")), folder / "run.json")
    with pytest.raises(ResumeError, match=message) as refusal:
        stream(ROWS, output, facts={"model": "a"})
    assert "emove" in str(refusal.value)


def test_a_last_shard_that_is_gone_is_made_again(tmp_path: Path) -> None:
    output = half(tmp_path)
    (tmp_path / "out.csv.partial" / "00000001.shard").unlink()
    assert stream(ROWS, output, facts={"model": "a"}).rows_before == 3
    stream(ROWS, tmp_path / "whole.csv")
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_file_in_the_place_of_the_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.csv.partial").write_text("of an earlier version")
    with pytest.raises(ResumeError, match=r"out\.csv\.partial is a file.*Remove it"):
        stream(ROWS, tmp_path / "out.csv")


def test_two_runs_never_write_one_output(tmp_path: Path) -> None:
    with (
        ResumableFile(tmp_path / "out.csv"),
        pytest.raises(FreezeError, match=r"Another process is writing .*out\.csv\.partial"),
    ):
        stream(ROWS, tmp_path / "out.csv")


def test_a_full_disk_is_told_and_the_run_goes_on_when_it_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream(ROWS, tmp_path / "whole.csv")
    fsync, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FreezeError, match=r"could not be written: No space left on device\. What was noted stays"):
        stream(ROWS, tmp_path / "out.csv")
    monkeypatch.setattr(os, "fsync", fsync)
    assert stream(ROWS, tmp_path / "out.csv").rows_before == 6
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_nobody_else_may_begin_before_the_file_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, refused = os.replace, []

    def look(source: Path, target: Path) -> None:
        if target == tmp_path / "out.csv":
            with pytest.raises(FreezeError, match="Another process is writing") as caught, ResumableFile(target):
                pass
            refused.append(caught.value)
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    with ResumableFile(tmp_path / "out.csv") as file:
        file.begin({}, {})
        file.append("row\n", [], {})
        file.finish()
    assert len(refused) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_a_file_that_was_finished_while_it_was_waited_for_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, checks = tmp_path / "out.csv", []

    def check(path: Path) -> None:
        if not checks:  # it is free at the first look; before the second one another run has finished it
            checks.append(path)
            return
        output.write_text("theirs")
        check_free(path)

    monkeypatch.setattr("hf_freeze.summarization.resumable.check_free", check)
    with pytest.raises(FreezeError, match="it exists already"), ResumableFile(output):
        pass
    assert output.read_text() == "theirs"
    assert not (tmp_path / "out.csv.partial").exists()


def test_the_facts_of_an_unfinished_run_can_be_asked_for(tmp_path: Path) -> None:
    output = half(tmp_path)
    assert facts_before(output)["model"] == "a"
    (tmp_path / "out.csv.partial" / "run.json").write_text("[]")
    assert facts_before(output) == {}
