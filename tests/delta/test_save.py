"""A delta holds what was trained and nothing else, and a save that fails or is killed leaves the one that was there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_freeze import FreezePlan, freeze
from hf_freeze.delta import is_delta, load_delta, save_delta
from hf_freeze.delta.file import FILES, MANIFEST_FILE, WEIGHTS_FILE
from hf_freeze.errors import DeltaMismatch, FreezeError
from hf_freeze.locks import alone_in
from tests.delta.cases import (
    Killed,
    Plain,
    as_format_1,
    base_folder,
    load_base,
    logits,
    manifest_of,
    names_in,
    train,
    trained,
)
from tests.tiny import tiny_model

# -------------------------------------------------------------------------------------------------------- what to save


def test_a_delta_holds_what_was_trained_and_nothing_else(bases: Path, tmp_path: Path) -> None:
    plan = FreezePlan(decoder_blocks=3, tied_head="train")
    model, folder = trained("llama", bases, plan), tmp_path / "delta"
    report = save_delta(model, folder, extra={"metric": 1.5, "step": 7}, revision="abc")
    assert names_in(folder) == set(FILES)
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        names = set(file.keys())
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}  # a tied tensor once
    values = manifest_of(folder)
    assert set(values["saved"]) == names
    assert set(values["frozen"]) == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert (values["architecture"], values["revision"]) == ("LlamaForCausalLM", "abc")
    assert values["base"] == str(base_folder("llama", bases))
    assert values["extra"] == {"metric": 1.5, "step": 7}
    assert FreezePlan.from_pretrained(folder) == FreezePlan.from_dict(values["plan"]) == plan
    assert json.loads((folder / "config.json").read_text()) == values["config"] == json.loads(
        model.config.to_json_string()
    )  # fmt: skip
    assert report.tensors == len(names)
    assert report.tensor_bytes == sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert report.model_bytes == sum(p.numel() * 4 for p in model.parameters())
    assert str(report).startswith(f"{len(names)} trained tensors, {report.tensor_bytes:,} bytes (")


def test_the_file_alone_is_the_delta(llama: Any, delta: Path) -> None:
    for name in {*FILES} - {WEIGHTS_FILE}:
        (delta / name).unlink()
    assert torch.equal(logits(load_delta(delta)), logits(llama))


def test_four_of_thirty_blocks_trained_take_at_most_15_percent_of_the_full_model(tmp_path: Path) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=30,
                    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True))  # fmt: skip
    freeze(model, FreezePlan(decoder_blocks=26))
    save_delta(model, tmp_path / "delta", base="user/base")
    model.save_pretrained(tmp_path / "full")
    sizes = [sum(p.stat().st_size for p in (tmp_path / name).iterdir()) for name in ("delta", "full")]
    assert sizes[0] <= 0.15 * sizes[1]


def test_a_model_that_was_never_frozen_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FreezeError, match=r"LlamaForCausalLM that was never frozen.*Call freeze\(model, plan\)"):
        save_delta(tiny_model("llama"), tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_a_frozen_tensor_that_trains_now_or_was_replaced_is_refused(bases: Path, tmp_path: Path) -> None:
    model = trained("llama", bases)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(FreezeError, match=r"1 of 28 are not.*layers\.1\.mlp\.up_proj\.weight \(trainable again\)"):
        save_delta(model, tmp_path / "delta")
    model.model.layers[1].mlp.up_proj = nn.Identity()
    with pytest.raises(FreezeError, match=r"layers\.1\.mlp\.up_proj\.weight \(gone"):
        save_delta(model, tmp_path / "delta")
    model = trained("llama", bases)
    model.resize_token_embeddings(1008)
    model.get_input_embeddings().weight.requires_grad_(False)
    with pytest.raises(FreezeError, match=r"embed_tokens\.weight \(float32 \[1000, 32\], now float32 \[1008, 32\]\)"):
        save_delta(model, tmp_path / "delta")


def test_what_holds_no_bits_is_refused(bases: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_model("llama").config)
    freeze(model)
    with pytest.raises(FreezeError, match="meta device when freeze"):
        save_delta(model, tmp_path / "delta")
    model = trained("llama", bases)
    model.model.layers[3].to("meta")
    with pytest.raises(FreezeError, match=r"save model\.layers\.3\..*, which is on the meta device"):
        save_delta(model, tmp_path / "delta")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"revison": "abc"}, r"given revison=; it has no such option\. The nearest: 'revision'"),
        ({"repo_id": "user/delta"}, r"given repo_id=, which is for uploads\. Add push_to_hub=True"),
        ({"extra": nn.Module()}, "extra that is no JSON value"),
        ({"extra": "x" * 100_000_000}, "could not write .*header too large"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    options: dict[str, Any], message: str, llama: Any, tmp_path: Path
) -> None:
    with pytest.raises(FreezeError, match=message):
        save_delta(llama, tmp_path / "delta", **options)
    assert not (tmp_path / "delta").exists()


# -------------------------------------------------------------------------------------------------------------- faults


def disk_that_is_full(tensors: Any, path: Path, **_: Any) -> None:
    Path(path).write_bytes(b"some bytes")
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_older_delta_whole(
    llama: Any, delta: Path, bases: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    newer = trained("llama", bases, FreezePlan(decoder_blocks=2))
    with monkeypatch.context() as patch:
        patch.setattr("hf_freeze.delta.file.save_file", disk_that_is_full)
        with pytest.raises(FreezeError, match=r"No space left on device\. The delta that was there is whole"):
            save_delta(newer, delta)
        with pytest.raises(FreezeError, match=r"could not write .*: .*No space left on device\.$"):
            save_delta(newer, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert names_in(delta) == set(FILES)
    assert torch.equal(logits(load_delta(delta)), logits(llama))
    assert FreezePlan.from_pretrained(delta) == FreezePlan(decoder_blocks=3)
    (tmp_path / "file").touch()
    with pytest.raises(FreezeError, match=r"could not write .*file"):
        save_delta(newer, tmp_path / "file")


@pytest.mark.parametrize("earlier", [lambda folder: folder, as_format_1], ids=["", "over format 1"])
@pytest.mark.parametrize("moves", range(len(FILES) + 1))
def test_killed_between_any_two_moves_a_delta_is_whole(
    moves: int, earlier: Callable[[Path], Path], llama: Any, delta: Path, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier(delta)
    model, moved = trained("llama", bases, FreezePlan(decoder_blocks=2)), []
    replace = os.replace

    def move(source: Any, target: Any) -> None:
        if len(moved) == moves:
            raise Killed
        moved.append(Path(target).name)
        replace(source, target)

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", move)
        patch.setattr(Path, "unlink", kill)
        to_the_end = moves == len(FILES) and earlier is not as_format_1  # else at the latest before delta.json goes
        with nullcontext() if to_the_end else pytest.raises(Killed):
            save_delta(model, delta)
    wanted = logits(model) if moves else logits(llama)
    assert moved[:1] == [WEIGHTS_FILE][:moves]
    assert is_delta(delta)
    assert torch.equal(logits(load_delta(delta)), wanted)
    with monkeypatch.context() as patch:  # the next save fails, and nothing is lost
        patch.setattr("hf_freeze.delta.file.save_file", disk_that_is_full)
        with pytest.raises(FreezeError, match="No space left"):
            save_delta(model, delta)
    assert torch.equal(logits(load_delta(delta)), wanted)
    save_delta(model, delta)
    assert names_in(delta) == set(FILES)
    assert torch.equal(logits(load_delta(delta)), logits(model))


def test_what_killed_saves_have_left_does_no_harm_and_goes(llama: Any, delta: Path) -> None:
    (delta / f"{WEIGHTS_FILE}.0123456789ab.tmp").write_bytes(b"half")
    staging = delta / ".delta-1-0123.tmp"  # of format 1: weights, and half of a delta.json
    staging.mkdir()
    (staging / WEIGHTS_FILE).write_bytes(b"half")
    (staging / MANIFEST_FILE).write_text("{")
    assert torch.equal(logits(load_delta(delta)), logits(llama))
    save_delta(llama, delta)
    assert names_in(delta) == set(FILES)


def test_a_delta_of_format_1_whose_save_was_killed_between_two_moves_is_read(llama: Any, delta: Path) -> None:
    as_format_1(delta)
    (delta / ".delta-1-0123.tmp").mkdir()
    os.replace(delta / MANIFEST_FILE, delta / ".delta-1-0123.tmp" / MANIFEST_FILE)
    assert torch.equal(logits(load_delta(delta)), logits(llama))


def saves_again_and_again(model: nn.Module, folder: Path, times: int) -> int:
    """A process that does; its number."""
    if child := os.fork():
        return child
    status = 1
    try:
        for _ in range(times):
            save_delta(model, folder)
        status = 0
    finally:
        os._exit(status)


def test_of_saves_at_once_into_one_folder_one_is_there_whole_at_every_moment(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Plain()
    models = []
    for seed in (1, 2, 3):
        model = Plain()
        model.load_state_dict(base.state_dict())
        freeze(model, FreezePlan(embeddings=False, decoder_blocks=2))
        train(model, seed)
        models.append(model)
    folder = tmp_path / "delta"
    save_delta(models[0], folder)
    children = [saves_again_and_again(model, folder, 12) for model in models]
    wanted = [model.blocks[2][0].weight for model in models]
    loads = 0
    while children:
        load_delta(folder, base)
        assert [torch.equal(base.blocks[2][0].weight, weight) for weight in wanted].count(True) == 1
        loads += 1
        for child in list(children):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                children.remove(child)
                assert status == 0
    assert loads > 1
    assert names_in(folder) == {*FILES} - {"config.json"}
    save_delta(models[1], folder)
    assert torch.equal(load_delta(folder, base).blocks[2][0].weight, wanted[1])


def test_a_save_waits_for_another_one_but_not_for_ever(
    llama: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("hf_freeze.delta.save.PATIENCE_SECONDS", 0.05)
    (tmp_path / "delta").mkdir()
    with alone_in(tmp_path / "delta"), pytest.raises(FreezeError, match=r"another process has been writing its delta"):
        save_delta(llama, tmp_path / "delta")
    assert list((tmp_path / "delta").iterdir()) == []
    save_delta(llama, tmp_path / "delta")


# ---------------------------------------------------------------------------------------- in a folder with other files


def test_the_folder_of_the_base_is_refused(llama: Any, bases: Path) -> None:
    with pytest.raises(FreezeError, match=r"the folder of the base, whose config\.json it would replace"):
        save_delta(llama, base_folder("llama", bases))


def test_a_config_that_it_has_not_written_stays(bases: Path, tmp_path: Path) -> None:
    model, folder = trained("llama", bases), tmp_path / "delta"
    folder.mkdir()
    for text in ('{"theirs": 1}', "no JSON", "[1]", tiny_model("llama", rope_theta=9.0).config.to_json_string()):
        (folder / "config.json").write_text(text)
        with pytest.raises(FreezeError, match=r"write config\.json into .*, which holds another one and no delta"):
            save_delta(model, folder)
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("config.json", text)]
    model.save_pretrained(folder)  # the whole model lies there too
    theirs = (folder / "config.json").read_bytes()
    model.config.architectures = None  # what no load looks at may differ
    model.config.use_cache = not model.config.use_cache
    model.config.id2label = {0: "bad", 1: "good"}
    model.config.pad_token_id = 3
    save_delta(model, folder)
    assert (folder / "config.json").read_bytes() == theirs
    assert torch.equal(logits(load_delta(folder)), logits(model))
    model.config.initializer_range = 0.5
    save_delta(model, folder)  # now it belongs to the delta
    assert json.loads((folder / "config.json").read_text())["initializer_range"] == 0.5


def test_in_a_trainers_checkpoint_the_other_files_stay(llama: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    assert not is_delta(folder)
    (folder / "optimizer.pt").write_bytes(b"theirs")
    save_delta(llama, folder)
    assert (folder / "optimizer.pt").read_bytes() == b"theirs"
    assert names_in(folder) == {*FILES, "optimizer.pt"}
    assert is_delta(folder)


# ----------------------------------------------------------------------------------------------------------------- hub


class FakeApi:
    """Stands in for huggingface_hub.HfApi: repositories are folders."""

    root: Path
    seen: list[dict[str, Any]]

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, **given: Any) -> SimpleNamespace:
        self.seen.append({"repo_id": repo_id, "token": self.token, **given})
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"user/{repo_id}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> None:
        self.seen.append({"commit_message": commit_message})
        (self.root / repo_id).mkdir(parents=True)
        for name in allow_patterns:
            shutil.copy(Path(folder_path) / name, self.root / repo_id / name)


def test_a_pushed_delta_is_loaded_by_its_id(bases: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(repo_id: str, *, allow_patterns: list[str], token: Any) -> str:
        assert set(allow_patterns) == {*FILES, MANIFEST_FILE}  # the last of format 1
        if not (FakeApi.root / repo_id).is_dir():
            raise RuntimeError(f"404: no {repo_id}")
        return str(FakeApi.root / repo_id)

    FakeApi.root, FakeApi.seen = tmp_path / "hub", []
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model, folder = trained("gpt2", bases), tmp_path / "my-delta"
    folder.mkdir()
    (folder / "secret.txt").touch()
    save_delta(model, folder, push_to_hub=True, repo_id="me/x", private=True, token="t", commit_message="first")
    assert FakeApi.seen == [
        {"repo_id": "me/x", "token": "t", "private": True, "exist_ok": True},
        {"commit_message": "first"},
    ]
    assert names_in(tmp_path / "hub/me/x") == set(FILES)
    assert torch.equal(logits(load_delta("me/x")), logits(model))
    assert torch.equal(logits(load_delta("me/x", load_base("gpt2", bases), token="t")), logits(model))
    save_delta(model, folder, push_to_hub=True)
    assert is_delta(tmp_path / "hub/user/my-delta")
    with pytest.raises(DeltaMismatch, match=r"from 'me/none'; there is no such folder, and the hub gave none: 404: no"):
        load_delta("me/none")
