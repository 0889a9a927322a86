"""A loaded delta gives the trained model back to the bit, and goes onto its own base or none."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from hf_freeze import FreezePlan, freeze, thaw, verify_frozen
from hf_freeze.delta import load_delta, merge_delta, save_delta
from hf_freeze.delta.file import WEIGHTS_FILE
from hf_freeze.embedded import EMBEDDED_NAME
from hf_freeze.errors import DeltaMismatch, FreezeError, ModelError
from hf_freeze.marks import RELEASED
from hf_freeze.processes import leave_group
from tests.delta.cases import (
    Plain,
    as_format_1,
    base_folder,
    edit,
    load_base,
    logits,
    manifest_of,
    names_in,
    refuses,
    train,
    trained,
)
from tests.tiny import tiny_model

# ---------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied_head", ["freeze", "train", "untie"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart", "t5"])
def test_a_loaded_delta_computes_the_same_bits(
    kind: str, tied_head: Any, dtype: torch.dtype, bases: Path, tmp_path: Path
) -> None:
    model = trained(kind, bases, FreezePlan(decoder_blocks=3, tied_head=tied_head), dtype)
    save_delta(model, tmp_path / "delta")
    again = load_delta(tmp_path / "delta")
    assert type(again) is type(model)
    assert again.dtype == dtype
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(load_delta(tmp_path / "delta", load_base(kind, bases, dtype))), logits(model))
    untied = again.get_output_embeddings().weight is not again.get_input_embeddings().weight
    assert untied is (tied_head == "untie")
    again.save_pretrained(tmp_path / "full")
    full = type(model).from_pretrained(tmp_path / "full", dtype=dtype)
    assert torch.equal(logits(full), logits(model))
    assert (full.get_output_embeddings().weight is not full.get_input_embeddings().weight) is untied
    assert torch.equal(logits(load_delta(as_format_1(tmp_path / "delta"))), logits(model))


def test_a_delta_that_an_earlier_version_wrote_is_loaded() -> None:
    folder = Path(__file__).parent / "format_1"  # written before the manifest was in the header
    model = load_delta(folder / "delta", LlamaForCausalLM.from_pretrained(folder / "base"))
    state, base, saved = model.state_dict(), load_file(folder / "base" / "model.safetensors"), load_file(
        folder / "delta" / WEIGHTS_FILE
    )  # fmt: skip
    assert len(saved) == 11
    assert {"model.embed_tokens.weight", "lm_head.weight"} < set(state)
    assert all(torch.equal(tensor, {**base, **saved}[name]) for name, tensor in state.items())
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert FreezePlan.from_pretrained(folder / "delta") == FreezePlan(decoder_blocks=1, tied_head="untie")


def test_a_loaded_model_can_be_frozen_trained_and_saved_again(bases: Path, tmp_path: Path) -> None:
    save_delta(trained("llama", bases, FreezePlan(decoder_blocks=2, tied_head="untie")), tmp_path / "first")
    model = load_delta(tmp_path / "first")
    freeze(model, FreezePlan.from_pretrained(tmp_path / "first"))
    train(model, seed=2)
    save_delta(model, tmp_path / "second")
    assert manifest_of(tmp_path / "second")["untied"] == ["lm_head.weight"]
    assert torch.equal(logits(load_delta(tmp_path / "second")), logits(model))


def test_an_untied_head_is_known_after_thaw_too(bases: Path, tmp_path: Path) -> None:
    model = trained("bart", bases, FreezePlan(tied_head="untie"))
    thaw(model)
    freeze(model, FreezePlan(decoder_blocks=1))
    save_delta(model, tmp_path / "delta")
    assert torch.equal(logits(load_delta(tmp_path / "delta")), logits(model))


def test_a_model_in_training_takes_back_its_own_delta(bases: Path, tmp_path: Path) -> None:
    model = trained("gpt2", bases, FreezePlan(tied_head="untie"))
    save_delta(model, tmp_path / "best")
    best = logits(model)
    train(model, seed=2)
    assert load_delta(tmp_path / "best", model) is model
    assert torch.equal(logits(model), best)
    verify_frozen(model)
    compiled = torch.compile(model)
    assert load_delta(tmp_path / "best", compiled) is compiled


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
def test_a_peft_model_goes_onto_a_peft_model(adapters: str, bases: Path, tmp_path: Path) -> None:
    def adapted(model: Any) -> Any:
        torch.manual_seed(3)
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"], layers_to_transform=[3]))

    model = load_base("llama", bases)
    if adapters == "before freeze":
        model = adapted(model)
        freeze(model, FreezePlan(decoder_blocks=3))
    else:
        freeze(model, FreezePlan(decoder_blocks=3))
        model = adapted(model)
    train(model)
    save_delta(model, tmp_path / "delta")
    names = set(load_file(tmp_path / "delta" / WEIGHTS_FILE))
    assert {name for name, p in model.named_parameters() if p.requires_grad} <= names
    if adapters == "before freeze":
        assert all("lora" in name for name in names)
    again = load_delta(tmp_path / "delta", adapted(load_base("llama", bases)))
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ModelError, match=r"a PeftModel.*Give base_model=, adapted as it was.*own save_pretrained"):
        load_delta(tmp_path / "delta")
    refuses(tmp_path / "delta", load_base("llama", bases), "is built otherwise.*with the adapters that it had")
    with pytest.raises(ModelError, match="merge_and_unload"):
        merge_delta(tmp_path / "delta", tmp_path / "full", model)


def test_a_released_prefix_stays_away_when_saving_and_comes_back_when_loading(bases: Path, tmp_path: Path) -> None:
    model = trained("llama", bases)
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


# ------------------------------------------------------------------------------------------------------ the wrong base


def other_bits(bases: Path) -> Any:
    base = load_base("llama", bases)
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3  # fine-tuned since
    return base


def of_depth(blocks: int) -> Any:
    torch.manual_seed(0)
    config = tiny_model("llama", tie_word_embeddings=True).config
    config.num_hidden_layers = blocks
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (other_bits, r"another base: 1 of 28 frozen tensors differ, e\.g\. model\.layers\.0\.mlp\.up"),
        (lambda bases: load_base("llama", bases).bfloat16(), r"\(float32 \[\d+, \d+\], here bfloat16 "),
        (lambda _: tiny_model("gpt2"), "is of a LlamaForCausalLM; this GPT2LMHeadModel is built otherwise"),
        (lambda _: of_depth(5), r": 9 tensors of the model are not in it, e\.g\. model\.layers\.4\."),
        (lambda _: of_depth(3), r": 9 of its 38 tensors are not in the model, e\.g\. model\.l"),
    ],
)
def test_another_base_is_refused(make: Any, match: str, delta: Path, bases: Path) -> None:
    refuses(delta, make(bases), match)


def test_a_base_on_the_meta_device_is_refused(delta: Path) -> None:
    with torch.device("meta"):
        base = LlamaForCausalLM(tiny_model("llama", tie_word_embeddings=True).config)
    with pytest.raises(DeltaMismatch, match=r"on the meta device.*Load the base's weights first"):
        load_delta(delta, base)


@pytest.mark.parametrize("tied_head", ["freeze", "train"])
def test_a_resized_vocabulary_is_named(tied_head: Any, bases: Path, tmp_path: Path) -> None:
    model = load_base("llama", bases)
    model.resize_token_embeddings(1008)
    freeze(model, FreezePlan(tied_head=tied_head))
    save_delta(model, tmp_path / "delta")
    match = r"embed_tokens\.weight \(float32 \[1008, 32\], here float32 \[1000, 32\]\).*resize_token_embeddings\(1008\)"
    refuses(tmp_path / "delta", load_base("llama", bases), match)
    if tied_head == "train":  # then the new rows are in the delta
        base = load_base("llama", bases)
        base.resize_token_embeddings(1008)
        assert torch.equal(logits(load_delta(tmp_path / "delta", base)), logits(model))


def test_a_class_of_another_type_with_the_same_tensors_is_refused(delta: Path) -> None:
    edit(delta, lambda values: values.update(architecture="MistralForCausalLM"))
    for folder in (delta, as_format_1(delta)):
        with pytest.raises(
            DeltaMismatch, match=r"on a model of type 'llama'; this MistralForCausalLM is of type 'mistral'"
        ):
            load_delta(folder)


def test_settings_that_make_the_same_tensors_compute_otherwise_are_told(bases: Path, tmp_path: Path) -> None:
    model = trained("llama", bases)
    model.config.rms_norm_eps = 0.5
    model.config.use_cache, model.config.pad_token_id, model.config.attention_dropout = False, 7, 0.5
    save_delta(model, tmp_path / "delta")
    for folder in (tmp_path / "delta", as_format_1(tmp_path / "delta")):
        with pytest.warns(UserWarning, match=r"with other settings than .*: rms_norm_eps was 0\.5, is 1e-06\. Give"):
            load_delta(folder)
    base = load_base("llama", bases)
    base.config.rms_norm_eps = 0.5
    load_delta(tmp_path / "delta", base)


def test_a_delta_that_would_move_what_freeze_froze_here_is_refused(bases: Path, tmp_path: Path) -> None:
    save_delta(trained("llama", bases, FreezePlan(decoder_blocks=1)), tmp_path / "delta")
    base = load_base("llama", bases)
    freeze(base, FreezePlan(decoder_blocks=3))
    refuses(tmp_path / "delta", base, r"18 tensors that freeze\(\) has frozen in this model.*Call thaw\(model\) first")
    thaw(base)
    load_delta(tmp_path / "delta", base)


def test_two_values_for_one_tensor_of_the_base_are_refused(bases: Path, tmp_path: Path) -> None:
    save_delta(trained("llama", bases, FreezePlan(tied_head="untie")), tmp_path / "delta")
    edit(tmp_path / "delta", lambda values: values["untied"].clear())
    match = r"lm_head\.weight and model\.embed_tokens\.weight apart; in this LlamaForCausalLM they are one tensor"
    refuses(tmp_path / "delta", load_base("llama", bases), match)


# ----------------------------------------------------------------------------------------------------- building a base


def test_a_base_is_built_or_given_not_both(delta: Path, llama: Any) -> None:
    with pytest.raises(FreezeError, match=r"base_model and dtype=.*Leave one of them out"):
        load_delta(delta, llama, dtype=torch.float32)


def test_the_embedded_model_is_named_and_not_its_folder(
    bases: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_FREEZE_CACHE", str(tmp_path))
    shutil.copytree(base_folder("llama", bases), tmp_path / EMBEDDED_NAME)
    model = LlamaForCausalLM.from_pretrained(tmp_path / EMBEDDED_NAME)
    freeze(model)
    train(model)
    save_delta(model, tmp_path / "delta")
    assert manifest_of(tmp_path / "delta")["base"] == EMBEDDED_NAME
    assert torch.equal(logits(load_delta(tmp_path / "delta")), logits(model))


@pytest.mark.parametrize("base", ["../elsewhere", "models/../../x", "..\\x"])
def test_a_base_that_climbs_out_is_refused(base: str, llama: Any, tmp_path: Path) -> None:
    save_delta(llama, tmp_path / "delta", base=base)
    with pytest.raises(ModelError, match=r"a path that climbs out of its folder\. Give base_model="):
        load_delta(tmp_path / "delta")


@pytest.mark.parametrize("name", ["pipeline", "LlamaConfig", "os", "NoSuchModel"])
def test_only_a_model_class_is_built(name: str, delta: Path) -> None:
    edit(delta, lambda values: values.update(architecture=name))
    with pytest.raises(ModelError, match=rf"is of a {name}, which transformers .* does not have"):
        load_delta(delta)


def test_a_base_that_is_gone_or_has_pickled_weights_is_not_read(tmp_path: Path) -> None:
    save_delta(trained("llama", tmp_path), tmp_path / "delta", revision="abc")
    folder = base_folder("llama", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="could not be loaded"):
        load_delta(tmp_path / "delta")
    shutil.rmtree(folder)
    told = rf"{folder.name}' at revision abc could not be loaded as a LlamaForCausalLM: .*"
    with pytest.raises(ModelError, match=told):
        load_delta(tmp_path / "delta")


def test_code_that_a_base_brings_runs_only_where_it_is_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = base_folder("llama", tmp_path)
    code = "from transformers import LlamaForCausalLM\n\n\nclass OwnModel(LlamaForCausalLM):\n    pass\n"
    (folder / "modeling_own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)  # the code is this test's own
    assert type(model).__name__ == "OwnModel"
    freeze(model)
    train(model)
    save_delta(model, tmp_path / "delta")
    with pytest.raises(ModelError, match=r"is of a OwnModel, which.*trust_remote_code=True where its base brings"):
        load_delta(tmp_path / "delta")
    assert torch.equal(logits(load_delta(tmp_path / "delta", trust_remote_code=True)), logits(model))


# --------------------------------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("tied_head", ["freeze", "untie"])
def test_a_merged_delta_is_a_full_model(tied_head: Any, bases: Path, tmp_path: Path) -> None:
    model = trained("bart", bases, FreezePlan(tied_head=tied_head))
    save_delta(model, tmp_path / "delta")
    (tmp_path / "full").mkdir()
    assert merge_delta(tmp_path / "delta", tmp_path / "full") == tmp_path / "full"
    full = type(model).from_pretrained(tmp_path / "full")
    assert torch.equal(logits(full), logits(model))
    with pytest.raises(ModelError, match="which holds something"):
        merge_delta(tmp_path / "delta", tmp_path / "full")
    merge_delta(tmp_path / "delta", tmp_path / "a" / "b", load_base("bart", bases))
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "a" / "b")), logits(model))


def test_a_merge_that_fails_leaves_nothing(delta: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(self: Any, folder: Path, **_: Any) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    before = names_in(tmp_path)
    with pytest.raises(FreezeError, match=r"merge_delta could not write .*full: No space left.* Nothing of it is left"):
        merge_delta(delta, tmp_path / "full")
    assert names_in(tmp_path) == before


def test_of_two_merges_into_one_folder_the_second_leaves_the_first_whole(
    llama: Any, delta: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save, errors = PreTrainedModel.save_pretrained, []

    def merge() -> None:
        try:
            merge_delta(delta, tmp_path / "full")
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
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "full")), logits(llama))
    assert names_in(tmp_path) == {"delta", "full"}


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
    assert manifest_of(folder / "fsdp")["architecture"] == "LlamaForCausalLM"
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
