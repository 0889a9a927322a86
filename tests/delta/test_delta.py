"""A delta holds what was trained, gives the trained model back to the bit, and goes onto its own base or none."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import torch.distributed as dist
from accelerate import dispatch_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_freeze import FreezePlan, delta, freeze, thaw, verify_frozen
from hf_freeze.delta import DELTA_FILE, FILES, WEIGHTS_FILE, is_delta, load_delta, merge_delta, save_delta
from hf_freeze.embedded import EMBEDDED_NAME
from hf_freeze.errors import DeltaMismatch, FreezeError, ModelError
from hf_freeze.locks import alone_in
from hf_freeze.marks import RELEASED
from hf_freeze.processes import leave_group
from tests.tiny import tiny_model

KINDS = ["llama", "gpt2", "bart", "t5"]


def base_folder(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny base as a folder; its head is tied."""
    path = folder / f"{kind}-base"
    if not path.exists():
        tiny_model(kind, tie_word_embeddings=True).to(dtype).save_pretrained(path)
    return path


def load_base(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return type(tiny_model(kind)).from_pretrained(base_folder(kind, folder, dtype), dtype=dtype)


def train(model: nn.Module, seed: int = 1) -> None:
    """Moves every trainable tensor, in place of training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def trained(kind: str, folder: Path, plan: FreezePlan | None = None, dtype: torch.dtype = torch.float32) -> Any:
    model = load_base(kind, folder, dtype)
    freeze(model, plan or FreezePlan(encoder_blocks=3 if kind in ("bart", "t5") else None, decoder_blocks=3))
    train(model)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 27).reshape(2, 12)
    given = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=ids, **given).logits
    return out


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def refuses(folder: Path, base: nn.Module, match: str) -> None:
    """Loading raises, and has not changed a bit of the base."""
    before, names = copies(base), [name for name, _ in base.named_parameters()]
    with pytest.raises(DeltaMismatch, match=match):
        load_delta(folder, base)
    assert [name for name, _ in base.named_parameters()] == names  # nothing was untied
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / DELTA_FILE).read_text())
    change(values)
    (folder / DELTA_FILE).write_text(json.dumps(values))


# ---------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied_head", ["freeze", "train", "untie"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_delta_computes_the_same_bits(kind: str, tied_head: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained(kind, tmp_path, FreezePlan(decoder_blocks=3, tied_head=tied_head), dtype)
    save_delta(model, tmp_path / "delta")
    again = load_delta(tmp_path / "delta")
    assert type(again) is type(model)
    assert again.dtype == dtype
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(load_delta(tmp_path / "delta", load_base(kind, tmp_path, dtype))), logits(model))
    untied = again.get_output_embeddings().weight is not again.get_input_embeddings().weight
    assert untied is (tied_head == "untie")
    again.save_pretrained(tmp_path / "full")
    full = type(model).from_pretrained(tmp_path / "full", dtype=dtype)
    assert torch.equal(logits(full), logits(model))
    assert (full.get_output_embeddings().weight is not full.get_input_embeddings().weight) is untied


def test_a_loaded_model_can_be_frozen_trained_and_saved_again(tmp_path: Path) -> None:
    plan = FreezePlan(decoder_blocks=2, tied_head="untie")
    save_delta(trained("llama", tmp_path, plan), tmp_path / "first")
    model = load_delta(tmp_path / "first")
    freeze(model, FreezePlan.from_pretrained(tmp_path / "first"))
    train(model, seed=2)
    save_delta(model, tmp_path / "second")
    values = json.loads((tmp_path / "second" / DELTA_FILE).read_text())
    assert values["untied"] == ["lm_head.weight"]
    assert torch.equal(logits(load_delta(tmp_path / "second")), logits(model))


def test_an_untied_head_is_known_after_thaw_too(tmp_path: Path) -> None:
    model = trained("bart", tmp_path, FreezePlan(tied_head="untie"))
    thaw(model)
    freeze(model, FreezePlan(decoder_blocks=1))
    save_delta(model, tmp_path / "delta")
    assert torch.equal(logits(load_delta(tmp_path / "delta")), logits(model))


def test_a_model_in_training_takes_back_its_own_delta(tmp_path: Path) -> None:
    model = trained("gpt2", tmp_path, FreezePlan(tied_head="untie"))
    save_delta(model, tmp_path / "best")
    best = logits(model)
    train(model, seed=2)
    assert load_delta(tmp_path / "best", model) is model
    assert torch.equal(logits(model), best)
    verify_frozen(model)
    compiled = torch.compile(model)
    assert load_delta(tmp_path / "best", compiled) is compiled


def test_a_delta_holds_what_was_trained_and_nothing_else(tmp_path: Path) -> None:
    model = trained("llama", tmp_path, FreezePlan(decoder_blocks=3, tied_head="train"))
    report = save_delta(model, tmp_path / "delta", extra={"metric": 1.5, "step": 7}, revision="abc")
    assert sorted(path.name for path in (tmp_path / "delta").iterdir()) == sorted(FILES)
    with safe_open(tmp_path / "delta" / WEIGHTS_FILE, framework="pt") as file:
        names = set(file.keys())
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}  # a tied tensor once
    values = json.loads((tmp_path / "delta" / DELTA_FILE).read_text())
    assert set(values["saved"]) == names
    assert set(values["frozen"]) == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert (values["architecture"], values["revision"]) == ("LlamaForCausalLM", "abc")
    assert values["base"] == str(base_folder("llama", tmp_path))
    assert values["extra"] == {"metric": 1.5, "step": 7}
    assert FreezePlan.from_pretrained(tmp_path / "delta") == FreezePlan(decoder_blocks=3, tied_head="train")
    assert report.tensors == len(names)
    assert report.tensor_bytes == sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert report.model_bytes == sum(p.numel() * 4 for p in model.parameters())
    assert str(report).startswith(f"{len(names)} trained tensors, {report.tensor_bytes:,} bytes (")


def test_four_of_thirty_blocks_trained_take_at_most_15_percent_of_the_full_model(tmp_path: Path) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=30,
                    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True))  # fmt: skip
    freeze(model, FreezePlan(decoder_blocks=26))
    save_delta(model, tmp_path / "delta", base="user/base")
    model.save_pretrained(tmp_path / "full")
    sizes = [sum(p.stat().st_size for p in (tmp_path / name).iterdir()) for name in ("delta", "full")]
    assert sizes[0] <= 0.15 * sizes[1]


class Plain(nn.Module):
    """Three blocks with batch norms, whose statistics are persistent buffers, and a buffer that two modules share."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(3))
        shared = torch.zeros(2)
        for block in self.blocks[1:]:
            block.register_buffer("shared", shared)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_buffers_of_trained_modules_are_saved_and_those_of_frozen_ones_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, base = Plain(), Plain()
    base.load_state_dict(model.state_dict())
    freeze(model, FreezePlan(embeddings=False, decoder_blocks=1))
    model.train()(torch.randn(8, 4))  # moves the statistics
    model.blocks[1].shared.fill_(3.0)
    save_delta(model, tmp_path / "delta")
    saved = load_file(tmp_path / "delta" / WEIGHTS_FILE)
    assert {"blocks.2.1.running_mean", "blocks.1.shared"} < set(saved)
    assert not {"blocks.0.1.running_mean", "blocks.2.shared"} & set(saved)
    load_delta(tmp_path / "delta", base)
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ModelError, match=r"names no base: the model was not loaded from anywhere\. Give base_model="):
        load_delta(tmp_path / "delta")
    base.blocks[0][1].running_mean.fill_(9.0)
    refuses(tmp_path / "delta", base, r"1 of 7 frozen tensors differ, e\.g\. blocks\.0\.1\.running_mean")


@pytest.mark.parametrize("adapters", ["before freeze", "after freeze"])
def test_a_peft_model_goes_onto_a_peft_model(adapters: str, tmp_path: Path) -> None:
    def adapted(model: Any) -> Any:
        torch.manual_seed(3)
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"], layers_to_transform=[3]))

    if adapters == "before freeze":
        model = adapted(load_base("llama", tmp_path))
        freeze(model, FreezePlan(decoder_blocks=3))
    else:
        bare = load_base("llama", tmp_path)
        freeze(bare, FreezePlan(decoder_blocks=3))
        model = adapted(bare)
    train(model)
    save_delta(model, tmp_path / "delta")
    names = set(load_file(tmp_path / "delta" / WEIGHTS_FILE))
    assert {name for name, p in model.named_parameters() if p.requires_grad} <= names
    if adapters == "before freeze":
        assert all("lora" in name for name in names)
    again = load_delta(tmp_path / "delta", adapted(load_base("llama", tmp_path)))
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ModelError, match=r"a PeftModel.*Give base_model=, adapted as it was.*own save_pretrained"):
        load_delta(tmp_path / "delta")
    refuses(tmp_path / "delta", load_base("llama", tmp_path), "is built otherwise.*with the adapters that it had")
    with pytest.raises(ModelError, match="merge_and_unload"):
        merge_delta(tmp_path / "delta", tmp_path / "full", model)


def test_a_released_prefix_stays_away_when_saving_and_comes_back_when_loading(tmp_path: Path) -> None:
    model = trained("llama", tmp_path)
    away = model.model.layers[0]
    kept = {name: p.detach().clone() for name, p in away.named_parameters()}
    restored = []

    def restore() -> None:
        restored.append(True)
        for name, parameter in away.named_parameters():
            parameter.data = kept[name]

    for parameter in away.parameters():
        parameter.data = torch.full((1,), float("nan")).expand(parameter.shape)
    away.__dict__[RELEASED] = SimpleNamespace(restore=restore)
    away.register_state_dict_pre_hook(lambda *_: pytest.fail("state_dict() would bring the prefix back"))
    save_delta(model, tmp_path / "delta")
    assert not restored
    load_delta(tmp_path / "delta", model)
    assert restored
    assert torch.equal(logits(load_delta(tmp_path / "delta")), logits(model))


# -------------------------------------------------------------------------------------------------------- what to save


def test_a_model_that_was_never_frozen_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FreezeError, match=r"LlamaForCausalLM that was never frozen.*Call freeze\(model, plan\)"):
        save_delta(tiny_model("llama"), tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_a_frozen_tensor_that_trains_now_or_was_replaced_is_refused(tmp_path: Path) -> None:
    model = trained("llama", tmp_path)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(FreezeError, match=r"1 of 28 are not.*layers\.1\.mlp\.up_proj\.weight \(trainable again\)"):
        save_delta(model, tmp_path / "delta")
    model.model.layers[1].mlp.up_proj = nn.Identity()
    with pytest.raises(FreezeError, match=r"layers\.1\.mlp\.up_proj\.weight \(gone"):
        save_delta(model, tmp_path / "delta")
    model = trained("llama", tmp_path)
    model.resize_token_embeddings(1008)
    model.get_input_embeddings().weight.requires_grad_(False)
    with pytest.raises(FreezeError, match=r"embed_tokens\.weight \(float32 \[1000, 32\], now float32 \[1008, 32\]\)"):
        save_delta(model, tmp_path / "delta")


def test_what_holds_no_bits_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_model("llama").config)
    freeze(model)
    with pytest.raises(FreezeError, match="meta device when freeze"):
        save_delta(model, tmp_path / "delta")
    model = trained("llama", tmp_path)
    model.model.layers[3].to("meta")
    with pytest.raises(FreezeError, match=r"save model\.layers\.3\..*, which is on the meta device"):
        save_delta(model, tmp_path / "delta")
    save_delta(trained("llama", tmp_path), tmp_path / "delta")
    with torch.device("meta"):
        base = LlamaForCausalLM(tiny_model("llama", tie_word_embeddings=True).config)
    with pytest.raises(DeltaMismatch, match=r"on the meta device.*Load the base's weights first"):
        load_delta(tmp_path / "delta", base)


def test_a_base_whose_frozen_part_is_offloaded_is_compared_where_it_lies(tmp_path: Path) -> None:
    def half_away(folder: str) -> Any:
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        away = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2"]
        places = dict.fromkeys(away, "disk") | {"model.layers.3": "cpu", "model.norm": "cpu"}
        places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
        return dispatch_model(model, places, "cpu", offload_dir=str(tmp_path / folder), force_hooks=True)

    tiny_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    model = half_away("one")
    freeze(model, FreezePlan(decoder_blocks=3))
    train(model)
    assert save_delta(model, tmp_path / "delta").tensors == 11
    wanted = logits(model)
    assert torch.equal(logits(load_delta(tmp_path / "delta")), wanted)
    assert torch.equal(logits(load_delta(tmp_path / "delta", half_away("two"))), wanted)
    other = half_away("three")
    other.model.layers[0].mlp.up_proj._hf_hook.weights_map = {"weight": torch.zeros(64, 32)}
    with pytest.raises(DeltaMismatch, match=r"another base: 1 of 28 .* differ, e\.g\. model\.layers\.0\.mlp\.up_proj"):
        load_delta(tmp_path / "delta", other)


def test_options_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    model = trained("llama", tmp_path)
    with pytest.raises(FreezeError, match=r"given revison=; it has no such option\. The nearest: 'revision'"):
        save_delta(model, tmp_path / "delta", revison="abc")
    with pytest.raises(FreezeError, match=r"given repo_id=, which is for uploads\. Add push_to_hub=True"):
        save_delta(model, tmp_path / "delta", repo_id="user/delta")
    with pytest.raises(FreezeError, match="extra that is no JSON value"):
        save_delta(model, tmp_path / "delta", extra=model)
    with pytest.raises(FreezeError, match=r"the folder of the base, whose config\.json it would replace"):
        save_delta(model, base_folder("llama", tmp_path))
    save_delta(model, tmp_path / "delta")
    with pytest.raises(FreezeError, match=r"base_model and dtype=.*Leave one of them out"):
        load_delta(tmp_path / "delta", model, dtype=torch.float32)


def test_the_embedded_model_is_named_and_not_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_FREEZE_CACHE", str(tmp_path))
    shutil.copytree(base_folder("llama", tmp_path), tmp_path / EMBEDDED_NAME)
    model = LlamaForCausalLM.from_pretrained(tmp_path / EMBEDDED_NAME)
    freeze(model)
    train(model)
    save_delta(model, tmp_path / "delta")
    assert json.loads((tmp_path / "delta" / DELTA_FILE).read_text())["base"] == EMBEDDED_NAME
    assert torch.equal(logits(load_delta(tmp_path / "delta")), logits(model))


# ------------------------------------------------------------------------------------------------------ the wrong base


def test_another_base_is_refused_by_its_bits(tmp_path: Path) -> None:
    save_delta(trained("llama", tmp_path), tmp_path / "delta")
    base = load_base("llama", tmp_path)
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3  # fine-tuned since
    refuses(tmp_path / "delta", base, r"another base: 1 of 28 frozen tensors differ, e\.g\. model\.layers\.0\.mlp\.up")


@pytest.mark.parametrize("tied_head", ["freeze", "train"])
def test_a_resized_vocabulary_is_named(tied_head: Any, tmp_path: Path) -> None:
    model = load_base("llama", tmp_path)
    model.resize_token_embeddings(1008)
    freeze(model, FreezePlan(tied_head=tied_head))
    save_delta(model, tmp_path / "delta")
    match = r"embed_tokens\.weight \(float32 \[1008, 32\], here float32 \[1000, 32\]\).*resize_token_embeddings\(1008\)"
    refuses(tmp_path / "delta", load_base("llama", tmp_path), match)
    if tied_head == "train":  # then the new rows are in the delta
        base = load_base("llama", tmp_path)
        base.resize_token_embeddings(1008)
        assert torch.equal(logits(load_delta(tmp_path / "delta", base)), logits(model))


def test_a_class_of_another_type_with_the_same_tensors_is_refused(tmp_path: Path) -> None:
    save_delta(trained("llama", tmp_path), tmp_path / "delta")
    edit(tmp_path / "delta", lambda values: values.update(architecture="MistralForCausalLM"))
    with pytest.raises(
        DeltaMismatch, match=r"on a model of type 'llama'; this MistralForCausalLM is of type 'mistral'"
    ):
        load_delta(tmp_path / "delta")


def test_settings_that_make_the_same_tensors_compute_otherwise_are_told(tmp_path: Path) -> None:
    model = trained("llama", tmp_path)
    model.config.rms_norm_eps = 0.5
    model.config.use_cache, model.config.pad_token_id, model.config.attention_dropout = False, 7, 0.5
    save_delta(model, tmp_path / "delta")
    with pytest.warns(UserWarning, match=r"with other settings than .*: rms_norm_eps was 0\.5, is 1e-06\. Give"):
        load_delta(tmp_path / "delta")
    base = load_base("llama", tmp_path)
    base.config.rms_norm_eps = 0.5
    load_delta(tmp_path / "delta", base)


def test_another_dtype_or_architecture_or_depth_is_refused(tmp_path: Path) -> None:
    save_delta(trained("llama", tmp_path), tmp_path / "delta")
    refuses(tmp_path / "delta", load_base("llama", tmp_path).bfloat16(), r"\(float32 \[\d+, \d+\], here bfloat16 ")
    refuses(tmp_path / "delta", tiny_model("gpt2"), "is of a LlamaForCausalLM; this GPT2LMHeadModel is built otherwise")
    torch.manual_seed(0)
    config = tiny_model("llama", tie_word_embeddings=True).config
    config.num_hidden_layers = 5
    deeper = LlamaForCausalLM(config)
    refuses(tmp_path / "delta", deeper, r": 9 tensors of the model are not in it, e\.g\. model\.layers\.4\.")
    config.num_hidden_layers = 3
    refuses(
        tmp_path / "delta", LlamaForCausalLM(config), r": 9 of its 38 tensors are not in the model, e\.g\. model\.l"
    )


def test_a_delta_that_would_move_what_freeze_froze_here_is_refused(tmp_path: Path) -> None:
    save_delta(trained("llama", tmp_path, FreezePlan(decoder_blocks=1)), tmp_path / "delta")
    base = load_base("llama", tmp_path)
    freeze(base, FreezePlan(decoder_blocks=3))
    refuses(tmp_path / "delta", base, r"18 tensors that freeze\(\) has frozen in this model.*Call thaw\(model\) first")
    thaw(base)
    load_delta(tmp_path / "delta", base)


def test_two_values_for_one_tensor_of_the_base_are_refused(tmp_path: Path) -> None:
    save_delta(trained("llama", tmp_path, FreezePlan(tied_head="untie")), tmp_path / "delta")
    edit(tmp_path / "delta", lambda values: values["untied"].clear())
    match = r"lm_head\.weight and model\.embed_tokens\.weight apart; in this LlamaForCausalLM they are one tensor"
    refuses(tmp_path / "delta", load_base("llama", tmp_path), match)


# ------------------------------------------------------------------------------------------------------ damaged deltas


def instead(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # a long path is no address


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no delta.json": (lambda f: (f / DELTA_FILE).unlink(), r"it has no delta\.json: it holds config\.json, "),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), r"delta\.safetensors was to be loaded; it is missing"),
    "broken JSON": (lambda f: (f / DELTA_FILE).write_text('{"format": 1'), r"cannot be read as JSON"),
    "no text": (lambda f: (f / DELTA_FILE).write_bytes(b"\xff\xfe"), r"cannot be read as JSON"),
    "a list": (lambda f: (f / DELTA_FILE).write_text("[1]"), r"is a delta of format None; this version reads format 1"),
    "another version": (lambda f: edit(f, lambda v: v.update(format=2)), r"of format 2; this version reads format 1"),
    "a missing field": (lambda f: edit(f, lambda v: v.pop("base")), r"not as save_delta writes it: base\."),
    "an unknown field": (lambda f: edit(f, lambda v: v.update(path="x")), r"'path' \(an unknown field\)"),
    "a wrong kind": (lambda f: edit(f, lambda v: v.update(saved=[])), r"not as save_delta writes it: saved\."),
    "no digest": (lambda f: edit(f, lambda v: v["frozen"].update(x=1)), r"1 \(no digest\)"),
    "a list for a name": (lambda f: edit(f, lambda v: v["untied"].append([])), r"\[\] \(no name\)"),
    "no shape": (lambda f: edit(f, lambda v: v["frozen"].update(x="float32 [, 4] 0")), r"'float32 \[, 4\] 0' \(no dig"),
    "deep nesting": (lambda f: (f / DELTA_FILE).write_text("[" * 100_000), r"cannot be read as JSON"),
    "a pipe": (lambda f: instead(f / DELTA_FILE, os.mkfifo), r"delta\.json was to be loaded; it is a pipe, not a file"),
    "a pipe of weights": (lambda f: instead(f / WEIGHTS_FILE, os.mkfifo), r"delta\.safetensors .*; it is a pipe, not"),
    "a folder": (lambda f: instead(f / WEIGHTS_FILE, os.mkdir), r"it is a folder, not a file"),
    "a socket": (lambda f: instead(f / WEIGHTS_FILE, socket_at), r"it is a socket, not a file"),
    "a device": (lambda f: instead(f / DELTA_FILE, lambda p: p.symlink_to("/dev/zero")), r"it is a device, not a file"),
    "a link to nothing": (lambda f: instead(f / WEIGHTS_FILE, lambda p: p.symlink_to("x")), r"it is missing"),
    "a link to itself": (lambda f: instead(f / WEIGHTS_FILE, lambda p: p.symlink_to(p.name)), r"is damaged or cut"),
    "a path": (
        lambda f: edit(f, lambda v: v["saved"].update({"../x": f"float32 [1] {0:032}"})),
        r"'\.\./x' \(a path\)",
    ),
    "an absolute path": (lambda f: edit(f, lambda v: v["untied"].append("/etc/x")), r"'/etc/x' \(a path\)"),
    "twice": (lambda f: edit(f, lambda v: v["frozen"].update(v["saved"])), r"\(both saved and frozen\)"),
    "an untied stranger": (lambda f: edit(f, lambda v: v["untied"].append("x")), r"'x' \(untied, not saved\)"),
}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (lambda p: p / "none", r"there is no such folder, and no hub id is like it"),
        (lambda p: p / "file", r"which is no folder"),
        (lambda p: p / "pipe", r"which is no folder"),
        (lambda p: p / "empty", r"it has no delta\.json: it is empty"),
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


@pytest.mark.parametrize("call", ["stat", "iterdir", "read_text"])
def test_a_folder_that_may_not_be_read_is_refused(call: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "delta"
    save_delta(trained("llama", tmp_path), folder)
    base = load_base("llama", tmp_path)
    if call == "iterdir":
        (folder / DELTA_FILE).unlink()
    plain = getattr(Path, call)

    def forbidden(path: Path, *rest: Any, **named: Any) -> Any:
        if path == folder or folder in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, forbidden)
        with pytest.raises(DeltaMismatch, match=r"cannot be read.*Permission denied"):
            load_delta(folder, base)
        assert is_delta(folder) is (call == "read_text")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_delta_is_refused(damage: str, tmp_path: Path) -> None:
    save_delta(trained("llama", tmp_path), tmp_path / "delta")
    spoil, match = DAMAGE[damage]
    spoil(tmp_path / "delta")
    refuses(tmp_path / "delta", load_base("llama", tmp_path), match)


def test_tensors_that_are_not_those_of_delta_json_are_named(tmp_path: Path) -> None:
    folder, base = tmp_path / "delta", load_base("llama", tmp_path)
    save_delta(trained("llama", tmp_path), folder)
    saved = load_file(folder / WEIGHTS_FILE)
    norm = "model.layers.3.input_layernorm.weight"
    save_file({name: tensor for name, tensor in saved.items() if name != norm}, folder / WEIGHTS_FILE)
    refuses(folder, base, rf"lacks 1 tensors that delta\.json names, e\.g\. {norm}")
    save_file(saved | {"../x": torch.zeros(1)}, folder / WEIGHTS_FILE)
    refuses(folder, base, r"holds 1 that it does not name, e\.g\. \.\./x")
    save_file(saved | {norm: torch.zeros(33)}, folder / WEIGHTS_FILE)
    refuses(folder, base, rf"1 of 10 tensors are not what was saved: {norm} \(float32 \[32\], here float32 \[33\]\)")
    save_file(saved | {norm: saved[norm].bfloat16()}, folder / WEIGHTS_FILE)
    refuses(folder, base, rf"{norm} \(float32 \[32\], here bfloat16 \[32\]\)")
    save_file(saved | {norm: saved[norm] + 1}, folder / WEIGHTS_FILE)
    refuses(folder, base, rf"1 of 10 tensors are not what was saved: {norm}\.")
    save_file(saved, folder / WEIGHTS_FILE)
    load_delta(folder, base)


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
    folder, whole, model = small
    place = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[place] ^= data.draw(st.integers(1, 255))
    before = copies(model)
    (folder / WEIGHTS_FILE).write_bytes(flipped)
    header = 8 + int.from_bytes(whole[:8], "little")
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
    folder, whole, model = small
    (folder / WEIGHTS_FILE).write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    refuses(folder, model, "damaged or cut short")


# ----------------------------------------------------------------------------------------------------- building a base


@pytest.mark.parametrize("base", ["../elsewhere", "models/../../x", "..\\x"])
def test_a_base_that_climbs_out_is_refused(base: str, tmp_path: Path) -> None:
    save_delta(trained("llama", tmp_path), tmp_path / "delta", base=base)
    with pytest.raises(ModelError, match=r"a path that climbs out of its folder\. Give base_model="):
        load_delta(tmp_path / "delta")


def test_a_base_that_is_gone_is_named(tmp_path: Path) -> None:
    save_delta(trained("llama", tmp_path), tmp_path / "delta", revision="abc")
    shutil.rmtree(base_folder("llama", tmp_path))
    with pytest.raises(ModelError, match=r"llama-base' at revision abc could not be loaded as a LlamaForCausalLM: .*"):
        load_delta(tmp_path / "delta")


@pytest.mark.parametrize("name", ["pipeline", "LlamaConfig", "os", "NoSuchModel"])
def test_only_a_model_class_is_built(name: str, tmp_path: Path) -> None:
    save_delta(trained("llama", tmp_path), tmp_path / "delta")
    edit(tmp_path / "delta", lambda values: values.update(architecture=name))
    with pytest.raises(ModelError, match=rf"is of a {name}, which transformers .* does not have"):
        load_delta(tmp_path / "delta")


def test_a_base_with_pickled_weights_is_not_read(tmp_path: Path) -> None:
    save_delta(trained("llama", tmp_path), tmp_path / "delta")
    folder = base_folder("llama", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="could not be loaded"):
        load_delta(tmp_path / "delta")


def test_code_that_a_base_brings_runs_only_where_it_is_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = base_folder("llama", tmp_path)
    code = "from transformers import LlamaForCausalLM\n\n\nclass OwnModel(LlamaForCausalLM):\n    pass\n"
    (folder / "modeling_own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    freeze(model)
    train(model)
    save_delta(model, tmp_path / "delta")
    with pytest.raises(ModelError, match=r"is of a OwnModel, which.*trust_remote_code=True where its base brings"):
        load_delta(tmp_path / "delta")
    assert torch.equal(logits(load_delta(tmp_path / "delta", trust_remote_code=True)), logits(model))


# -------------------------------------------------------------------------------------------------------------- faults


class Killed(BaseException):
    """In the place of a kill -9: nothing in hf_freeze catches it."""


def test_a_full_disk_leaves_the_older_delta_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, folder = trained("llama", tmp_path), tmp_path / "delta"

    def full(tensors: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"some bytes")
        raise OSError(28, "No space left on device")

    save_delta(model, folder)
    older, files = logits(model), sorted(folder.iterdir())
    train(model, seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(delta, "save_file", full)
        with pytest.raises(FreezeError, match=r"No space left on device\. The delta that was there is whole"):
            save_delta(model, folder)
        with pytest.raises(FreezeError, match=r"could not write .*: .*No space left on device\.$"):
            save_delta(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert sorted(folder.iterdir()) == files
    assert torch.equal(logits(load_delta(folder)), older)
    (tmp_path / "file").touch()
    with pytest.raises(FreezeError, match=r"could not write .*file"):
        save_delta(model, tmp_path / "file")


@pytest.mark.parametrize("moves", range(len(FILES) + 1))
def test_killed_between_any_two_moves_a_delta_is_whole(
    moves: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, folder = trained("llama", tmp_path), tmp_path / "delta"
    save_delta(model, folder)
    older = logits(model)
    train(model, seed=2)
    newer = logits(model)
    done: list[Any] = []
    replace = os.replace

    def move(source: Any, target: Any) -> None:
        if Path(source).parent.match(delta.STAGING) and Path(target).parent == folder:
            if len(done) == moves:
                raise Killed
            done.append(target)
        replace(source, target)

    def kill(path: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", move)
        patch.setattr(Path, "rmdir", kill)
        with pytest.raises(Killed):
            save_delta(model, folder)
    assert len(done) == moves
    assert is_delta(folder)
    assert torch.equal(logits(load_delta(folder)), newer if moves else older)
    with monkeypatch.context() as patch:  # the next save fails, and what was half moved is not lost
        patch.setattr(delta, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(FreezeError, match="full"):
            save_delta(model, folder)
    assert torch.equal(logits(load_delta(folder)), newer if moves else older)
    save_delta(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert torch.equal(logits(load_delta(folder)), newer)


def test_killed_while_writing_the_older_delta_is_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, folder = trained("llama", tmp_path), tmp_path / "delta"
    save_delta(model, folder)
    staging = folder / ".delta-1-0123.tmp"
    staging.mkdir()  # what a kill leaves: weights, and half of a delta.json
    (staging / WEIGHTS_FILE).write_bytes(b"half")
    (staging / DELTA_FILE).write_text("{")
    assert torch.equal(logits(load_delta(folder)), logits(model))
    save_delta(model, folder)
    assert not staging.exists()


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
    assert {path.name for path in folder.iterdir()} == {*FILES} - {"config.json"}
    save_delta(models[1], folder)
    assert torch.equal(load_delta(folder, base).blocks[2][0].weight, wanted[1])


def test_a_save_waits_for_another_one_that_moves_its_files_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(delta, "PATIENCE_SECONDS", 0.05)
    model = trained("llama", tmp_path)
    (tmp_path / "delta").mkdir()
    with alone_in(tmp_path / "delta"), pytest.raises(FreezeError, match=r"another process has been moving its delta"):
        save_delta(model, tmp_path / "delta")
    assert list((tmp_path / "delta").iterdir()) == []
    save_delta(model, tmp_path / "delta")


def test_a_config_that_it_has_not_written_stays(tmp_path: Path) -> None:
    model, folder = trained("llama", tmp_path), tmp_path / "delta"
    folder.mkdir()
    for text in ('{"theirs": 1}', "no JSON", "[1]", tiny_model("llama", rope_theta=9.0).config.to_json_string()):
        (folder / "config.json").write_text(text)
        with pytest.raises(FreezeError, match=r"write config\.json into .*, which holds another one and no delta"):
            save_delta(model, folder)
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("config.json", text)]
    model.save_pretrained(folder)  # the whole model lies there too
    theirs = (folder / "config.json").read_bytes()
    model.config.architectures = None
    save_delta(model, folder)
    assert (folder / "config.json").read_bytes() == theirs
    assert torch.equal(logits(load_delta(folder)), logits(model))
    model.config.initializer_range = 0.5
    save_delta(model, folder)  # now it belongs to the delta
    assert json.loads((folder / "config.json").read_text())["initializer_range"] == 0.5


def test_in_a_trainers_checkpoint_the_other_files_stay(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    assert not is_delta(folder)
    (folder / "optimizer.pt").write_bytes(b"theirs")
    save_delta(trained("llama", tmp_path), folder)
    assert (folder / "optimizer.pt").read_bytes() == b"theirs"
    assert {path.name for path in folder.iterdir()} == {*FILES, "optimizer.pt"}
    assert is_delta(folder)


def test_a_config_beside_the_weights_that_differs_in_what_no_load_looks_at_stays(tmp_path: Path) -> None:
    model, folder = trained("llama", tmp_path), tmp_path / "out"
    model.save_pretrained(folder)
    theirs = (folder / "config.json").read_bytes()
    model.config.use_cache = not model.config.use_cache
    model.config.id2label = {0: "bad", 1: "good"}
    model.config.pad_token_id = 3
    save_delta(model, folder)
    assert (folder / "config.json").read_bytes() == theirs
    assert torch.equal(logits(load_delta(folder)), logits(model))


# ---------------------------------------------------------------------------------------------------------- hub, merge


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


def test_a_pushed_delta_is_loaded_by_its_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(repo_id: str, *, allow_patterns: list[str], token: Any) -> str:
        assert sorted(allow_patterns) == sorted(FILES)
        if not (FakeApi.root / repo_id).is_dir():
            raise RuntimeError(f"404: no {repo_id}")
        return str(FakeApi.root / repo_id)

    FakeApi.root, FakeApi.seen = tmp_path / "hub", []
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model, folder = trained("gpt2", tmp_path), tmp_path / "my-delta"
    folder.mkdir()
    (folder / "secret.txt").touch()
    save_delta(model, folder, push_to_hub=True, repo_id="me/x", private=True, token="t", commit_message="first")
    assert FakeApi.seen == [
        {"repo_id": "me/x", "token": "t", "private": True, "exist_ok": True},
        {"commit_message": "first"},
    ]
    assert sorted(path.name for path in (tmp_path / "hub/me/x").iterdir()) == sorted(FILES)
    assert torch.equal(logits(load_delta("me/x")), logits(model))
    assert torch.equal(logits(load_delta("me/x", load_base("gpt2", tmp_path), token="t")), logits(model))
    save_delta(model, folder, push_to_hub=True)
    assert is_delta(tmp_path / "hub/user/my-delta")
    with pytest.raises(DeltaMismatch, match=r"from 'me/none'; there is no such folder, and the hub gave none: 404: no"):
        load_delta("me/none")


@pytest.mark.parametrize("tied_head", ["freeze", "untie"])
def test_a_merged_delta_is_a_full_model(tied_head: Any, tmp_path: Path) -> None:
    model = trained("bart", tmp_path, FreezePlan(tied_head=tied_head))
    save_delta(model, tmp_path / "delta")
    (tmp_path / "full").mkdir()
    assert merge_delta(tmp_path / "delta", tmp_path / "full") == tmp_path / "full"
    full = type(model).from_pretrained(tmp_path / "full")
    assert torch.equal(logits(full), logits(model))
    with pytest.raises(ModelError, match="which holds something"):
        merge_delta(tmp_path / "delta", tmp_path / "full")
    merge_delta(tmp_path / "delta", tmp_path / "a" / "b", load_base("bart", tmp_path))
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "a" / "b")), logits(model))


def test_a_merge_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_delta(trained("llama", tmp_path), tmp_path / "delta")

    def full(self: Any, folder: Path, **_: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FreezeError, match=r"merge_delta could not write .*full: No space left.* Nothing of it is left"):
        merge_delta(tmp_path / "delta", tmp_path / "full")
    assert sorted(tmp_path.iterdir()) == before


def test_of_two_merges_into_one_folder_the_second_leaves_the_first_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = trained("llama", tmp_path)
    save_delta(model, tmp_path / "delta")
    save, errors = PreTrainedModel.save_pretrained, []

    def merge() -> None:
        try:
            merge_delta(tmp_path / "delta", tmp_path / "full")
        except FreezeError as error:
            errors.append(str(error))

    def overtaken(self: Any, folder: Path, **named: Any) -> None:
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
        save(self, folder, **named)
        other = threading.Thread(target=merge)  # of the same process, as of another container that has its number
        other.start()
        other.join()

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", overtaken)
    merge()
    assert len(errors) == 1
    assert "could not write" in errors[0]
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "full")), logits(model))
    assert not list(tmp_path.glob(".full*"))


# --------------------------------------------------------------------------------------------------- several processes


def _on_a_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    _save_and_load_on_both(folder)
    leave_group()


def _save_and_load_on_both(folder: Path) -> None:
    """DDP, then FSDP2: what both ranks save is what one process saves, and both can load it and go on."""
    model = trained("llama", folder)
    wanted = logits(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    save_delta(wrapped, folder / "ddp")
    assert torch.equal(logits(load_delta(folder / "ddp")), wanted)

    sharded = trained("llama", folder)
    for block in sharded.model.layers:
        fully_shard(block)
    fully_shard(sharded)
    logits(sharded)  # leaves the root's tensors gathered
    save_delta(sharded, folder / "fsdp")
    assert json.loads((folder / "fsdp" / DELTA_FILE).read_text())["architecture"] == "LlamaForCausalLM"
    assert torch.equal(logits(load_delta(folder / "fsdp")), wanted)
    with torch.no_grad():
        for parameter in sharded.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    logits(sharded)
    load_delta(folder / "fsdp", sharded)
    torch.testing.assert_close(logits(sharded), wanted, rtol=0, atol=0)

    untied = trained("llama", folder, FreezePlan(tied_head="untie"))
    save_delta(untied, folder / "untied")
    with pytest.raises(DeltaMismatch, match=r"is sharded already, with the head tied. Load it before fully_shard"):
        load_delta(folder / "untied", sharded)

    (folder / "file").touch()
    with pytest.raises(FreezeError, match=r"could not write .*file"):  # on both, though one of them wrote
        save_delta(wrapped, folder / "file")


def test_two_ranks_save_one_delta_of_ddp_and_of_fsdp2(tmp_path: Path) -> None:
    base_folder("llama", tmp_path)
    torch.multiprocessing.spawn(_on_a_rank, args=(tmp_path,), nprocs=2)
