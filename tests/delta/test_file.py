"""What is no delta, is damaged or is not of one save is refused, in the format of today and in that of before."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_freeze import FreezePlan, freeze
from hf_freeze.delta import is_delta, load_delta, save_delta
from hf_freeze.delta.file import MANIFEST_FILE, WEIGHTS_FILE
from hf_freeze.errors import DeltaMismatch
from tests.delta.cases import Plain, as_format_1, copies, edit, load_base, put_tensors, put_text, refuses

DIGEST = f"float32 [1] {0:032}"


def instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # a long path is no address


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {  # of both formats
    "no weights": (
        lambda f: (f / WEIGHTS_FILE).unlink(),
        r"its delta\.safetensors is missing: .* holds config\.json, ",
    ),
    "broken JSON": (lambda f: put_text(f, '{"format": 1'), r"cannot be read as JSON"),
    "a list": (lambda f: put_text(f, "[1]"), r"is a delta of format None; this version reads format [12] there"),
    "another version": (
        lambda f: edit(f, lambda v: v.update(format=3)),
        r"of format 3; this version reads format [12]",
    ),
    "a missing field": (lambda f: edit(f, lambda v: v.pop("base")), r"not as save_delta writes it: base\."),
    "an unknown field": (lambda f: edit(f, lambda v: v.update(path="x")), r"'path' \(an unknown field\)"),
    "a wrong kind": (lambda f: edit(f, lambda v: v.update(saved=[])), r"not as save_delta writes it: saved\."),
    "no digest": (lambda f: edit(f, lambda v: v["frozen"].update(x=1)), r"1 \(no digest\)"),
    "a list for a name": (lambda f: edit(f, lambda v: v["untied"].append([])), r"\[\] \(no name\)"),
    "no shape": (lambda f: edit(f, lambda v: v["frozen"].update(x="float32 [, 4] 0")), r"'float32 \[, 4\] 0' \(no dig"),
    "deep nesting": (lambda f: put_text(f, "[" * 100_000), r"cannot be read as JSON"),
    "a pipe": (instead(WEIGHTS_FILE, os.mkfifo), r"delta\.safetensors was to be loaded; it is a pipe, not a file"),
    "a folder": (instead(WEIGHTS_FILE, os.mkdir), r"it is a folder, not a file"),
    "a socket": (instead(WEIGHTS_FILE, socket_at), r"it is a socket, not a file"),
    "a device": (instead(WEIGHTS_FILE, lambda p: p.symlink_to("/dev/zero")), r"it is a device, not a file"),
    "a link to nothing": (instead(WEIGHTS_FILE, lambda p: p.symlink_to("x")), r"is missing"),
    "a link to itself": (instead(WEIGHTS_FILE, lambda p: p.symlink_to(p.name)), r"cannot be read: .*symbolic links"),
    "a path": (lambda f: edit(f, lambda v: v["saved"].update({"../x": DIGEST})), r"'\.\./x' \(a path\)"),
    "an absolute path": (lambda f: edit(f, lambda v: v["untied"].append("/etc/x")), r"'/etc/x' \(a path\)"),
    "twice": (lambda f: edit(f, lambda v: v["frozen"].update(v["saved"])), r"\(both saved and frozen\)"),
    "an untied stranger": (lambda f: edit(f, lambda v: v["untied"].append("x")), r"'x' \(untied, not saved\)"),
}
DAMAGE_1: dict[str, tuple[Callable[[Path], Any], str]] = {  # of delta.json
    "no delta.json": (lambda f: (f / MANIFEST_FILE).unlink(), r"holds no manifest, and no delta\.json of an earlier"),
    "no text": (lambda f: (f / MANIFEST_FILE).write_bytes(b"\xff\xfe"), r"cannot be read as JSON"),
    "a pipe for delta.json": (instead(MANIFEST_FILE, os.mkfifo), r"delta\.json .*; it is a pipe, not a file"),
    "a device for delta.json": (instead(MANIFEST_FILE, lambda p: p.symlink_to("/dev/zero")), r"it is a device, not"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_delta_is_refused(damage: str, delta: Path, bases: Path) -> None:
    spoil, match = DAMAGE[damage]
    spoil(delta)
    refuses(delta, load_base("llama", bases), match)


@pytest.mark.parametrize("damage", DAMAGE | DAMAGE_1)
def test_a_damaged_delta_of_format_1_is_refused(damage: str, delta: Path, bases: Path) -> None:
    spoil, match = (DAMAGE | DAMAGE_1)[damage]
    spoil(as_format_1(delta))
    refuses(delta, load_base("llama", bases), match)


def test_a_config_of_format_1_that_cannot_be_read_is_done_without(delta: Path, bases: Path) -> None:
    for text in ("{", "[1]", "[" * 100_000):
        (as_format_1(delta) if text == "{" else delta).joinpath("config.json").write_text(text)
        load_delta(delta, load_base("llama", bases))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (lambda p: p / "none", r"there is no such folder, and no hub id is like it"),
        (lambda p: p / "file", r"which is no folder"),
        (lambda p: p / "pipe", r"which is no folder"),
        (lambda p: p / "empty", r"its delta\.safetensors is missing: the folder is empty"),
        (lambda p: "a/b/c", r"no hub id is like it"),
        (lambda p: f"{p}/\0", r"no hub id is like it"),
    ],
)
def test_what_is_no_folder_of_a_delta_is_refused(place: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DeltaMismatch, match=message):
        load_delta(place(tmp_path), Plain())


@pytest.mark.parametrize("call", ["stat", "iterdir", "read_text", "safe_open"])
def test_a_folder_that_may_not_be_read_is_refused(
    call: str, delta: Path, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base("llama", bases)
    if call == "iterdir":
        (delta / WEIGHTS_FILE).unlink()
    if call == "read_text":
        as_format_1(delta)
    plain = getattr(Path, call, None)

    def forbidden(path: Path, *rest: Any, **named: Any) -> Any:
        if path == delta or delta in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *rest, **named)

    with monkeypatch.context() as patch:
        if call == "safe_open":
            patch.setattr("hf_freeze.delta.file.safe_open", forbidden)
        else:
            patch.setattr(Path, call, forbidden)
        with pytest.raises(DeltaMismatch, match=r"cannot be read.*Permission denied"):
            load_delta(delta, base)
        assert is_delta(delta) is (call in ("read_text", "safe_open"))


def test_tensors_that_are_not_those_of_the_manifest_are_named(delta: Path, bases: Path) -> None:
    base, saved = load_base("llama", bases), load_file(delta / WEIGHTS_FILE)
    norm = "model.layers.3.input_layernorm.weight"
    for tensors, match in (
        ({name: tensor for name, tensor in saved.items() if name != norm},
         rf"lacks 1 tensors that its manifest names, e\.g\. {norm}"),
        (saved | {"../x": torch.zeros(1)}, r"holds 1 that it does not name, e\.g\. \.\./x"),
        (saved | {norm: torch.zeros(33)},
         rf"1 of 10 tensors are not what was saved: {norm} \(float32 \[32\], here float32 \[33\]\)"),
        (saved | {norm: saved[norm].bfloat16()}, rf"{norm} \(float32 \[32\], here bfloat16 \[32\]\)"),
        (saved | {norm: saved[norm] + 1}, rf"1 of 10 tensors are not what was saved: {norm}\."),
    ):  # fmt: skip
        put_tensors(delta, tensors)
        refuses(delta, base, match)
    put_tensors(delta, saved)
    load_delta(delta, base)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, Plain]:
    """A delta of a few hundred bytes, its weights file, and the model."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    model = Plain()
    freeze(model, FreezePlan(embeddings=False, decoder_blocks=2))
    save_delta(model, folder)
    return folder, (folder / WEIGHTS_FILE).read_bytes(), model


@given(st.data())
@settings(max_examples=300)
def test_no_flipped_byte_changes_a_number(small: tuple[Path, bytes, Plain], data: st.DataObject) -> None:
    folder, content, model = small
    place = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[place] ^= data.draw(st.integers(1, 255))
    before = copies(model)
    (folder / WEIGHTS_FILE).write_bytes(flipped)
    header = 8 + int.from_bytes(content[:8], "little")
    try:
        load_delta(folder, model)
    except DeltaMismatch:
        pass
    else:
        assert 8 <= place < header  # text that says nothing of the tensors
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@given(st.data())
@settings(max_examples=100)
def test_a_file_cut_at_any_length_is_refused(small: tuple[Path, bytes, Plain], data: st.DataObject) -> None:
    folder, content, model = small
    (folder / WEIGHTS_FILE).write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    refuses(folder, model, "damaged or cut short")
