"""How far weights moved is the relative distance block by block, whatever the pretrained weights come as."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_freeze.errors import FreezeError
from hf_freeze.lens import weight_drift
from tests.lens.cases import KINDS, lora_model, moved, top_stack
from tests.tiny import tiny_model


@pytest.mark.parametrize("kind", KINDS)
def test_drift_is_the_relative_distance_block_by_block(kind: str) -> None:
    model = tiny_model(kind)
    other = moved(model, f"{top_stack(model)}.2")
    measured = weight_drift(other, model)
    drift = dict(zip(measured.parts, measured.drift, strict=True))
    path = f"{top_stack(model)}.2"
    before, after = ([w.detach() for w in each.get_submodule(path).parameters()] for each in (model, other))
    moved_by = math.sqrt(sum(float((a - b).double().square().sum()) for a, b in zip(after, before, strict=True)))
    size = math.sqrt(sum(float(b.double().square().sum()) for b in before))
    assert drift.pop("decoder.2") == pytest.approx(moved_by / size, rel=1e-5)
    assert len([part for part in drift if "." in part]) == (7 if kind in ("bart", "t5") else 3)
    assert set(drift.values()) == {0.0}


def test_a_block_that_grew_by_half_has_drifted_by_half() -> None:
    model = tiny_model("gpt2")
    before = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.transformer.h[3].parameters():
            weight.mul_(1.5)
    drift = weight_drift(model, before)
    assert drift.parts == ("embeddings", "decoder.0", "decoder.1", "decoder.2", "decoder.3", "final")
    assert drift.drift == (0.0, 0.0, 0.0, 0.0, 0.5, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_drift_from_a_folder_a_file_a_state_dict_and_a_model_is_the_same(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    other = moved(model, f"{top_stack(model)}.1")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    expected = weight_drift(other, model)
    assert expected.left_out == ()
    sources = [tmp_path / "whole", str(tmp_path / "shards"), tmp_path / "whole" / "model.safetensors"]
    for source in (*sources, model.state_dict()):
        assert weight_drift(other, source) == expected


def test_a_checkpoint_without_the_head_serves_and_the_head_is_left_out(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.save_pretrained(tmp_path)
    drift = weight_drift(moved(model, "model.layers.0"), tmp_path)
    assert drift.left_out == ("lm_head.weight",)
    assert drift.drift[1] > 0
    assert "Left out: lm_head.weight." in str(drift)


@pytest.mark.parametrize("given", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_adapters_count_as_what_they_add(given: dict[str, Any]) -> None:
    model = lora_model(**given)
    if "modules_to_save" in given:
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2.0)
    base = tiny_model("llama")
    drift = weight_drift(model, base)
    assert weight_drift(model) == drift
    merged = copy.deepcopy(model).merge_and_unload()
    assert drift.parts == weight_drift(merged, base).parts
    assert drift.drift == pytest.approx(weight_drift(merged, base).drift, rel=1e-4)
    assert min(drift.drift[1:5]) > 0.01
    assert drift.drift[0] == 0.0
    if "modules_to_save" in given:
        assert drift.parts[-1] == "head"
        assert drift.drift[-1] == 1.0


def test_adapters_that_are_merged_for_now_count_once() -> None:
    model = lora_model()
    drift = weight_drift(model)
    model.merge_adapter()
    assert weight_drift(model).drift == pytest.approx(drift.drift, rel=1e-4)
    assert weight_drift(model, tiny_model("llama")).drift == pytest.approx(drift.drift, rel=1e-4)


def test_adapters_that_are_switched_off_count_for_nothing() -> None:
    model = lora_model()
    with model.disable_adapter():
        assert set(weight_drift(model, tiny_model("llama")).drift) == {0.0}


def test_drift_refuses_what_is_no_pretrained_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(FreezeError, match=r"no model\*.safetensors \(no such folder\).*hub id, load it"):
        weight_drift(model, "meta-llama/none")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FreezeError, match=r"no model\*.safetensors \(pytorch_model.bin\)"):
        weight_drift(model, tmp_path)
    with pytest.raises(FreezeError, match=r"drift of decoder block 2 .* the LlamaForCausalLM that was given has no"):
        weight_drift(model, shallow_llama())
    with pytest.raises(FreezeError, match=r"drift of 2 decoder blocks was asked for; .* has more: model.layers.2"):
        weight_drift(shallow_llama(), model)
    with pytest.raises(FreezeError, match=r"LlamaForCausalLM from itself was asked for"):
        weight_drift(model, model)
    adapted = lora_model()
    with pytest.raises(FreezeError, match=r"from itself .* leave pretrained out"):
        weight_drift(adapted, adapted.get_base_model())
    with pytest.raises(FreezeError, match=r"without pretrained weights; it has no\s+adapters"):
        weight_drift(model)
    broken = moved(model, "model.layers.1", by=torch.nan)
    with pytest.raises(FreezeError, match=r"drift of decoder block 1 .* not all finite"):
        weight_drift(broken, model)


def shallow_llama() -> Any:
    model = tiny_model("llama")
    model.model.layers = model.model.layers[:2]
    return model
