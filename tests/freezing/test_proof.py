"""Every change of a frozen tensor is named, wherever the tensor lies; where nothing can be proved, that is said."""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_freeze import FreezePlan, freeze, thaw, verify_frozen
from hf_freeze.errors import FreezeError, FrozenWeightsChanged
from hf_freeze.tensors import tensor_digest
from tests.depth.sweep import training_batch
from tests.freezing.models import Tower, names_frozen, train
from tests.zoo import build


def test_training_leaves_the_proof_whole() -> None:
    model = build("bart").train()
    report = freeze(model)
    train(model, 3)
    proof = verify_frozen(model, report)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert proof.tensors >= len(frozen)
    assert proof.tensor_bytes >= sum(p.numel() * p.element_size() for p in frozen)
    assert str(proof) == f"{proof.tensors} frozen tensors, {proof.tensor_bytes:,} bytes: unchanged"


def flip_one_bit(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight.data.view(torch.int32)[0, 0] ^= 1


def move_a_router_bias(model: Any) -> None:
    next(b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")).add_(0.5)


def replace_a_module(model: Any) -> None:
    model.model.layers[0].mlp = nn.Identity()


def move_everything(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


@pytest.mark.parametrize(
    ("model_type", "blocks", "change", "message"),
    [
        ("llama", 2, flip_one_bit, r"; 1 moved: model\.layers\.1\.mlp\.down_proj\.weight\. Look for"),
        ("deepseek_v3", "all", move_a_router_bias, r"; 1 moved: \S*e_score_correction_bias\. Look for"),
        ("llama", 2, replace_a_module, r"; 3 gone \(replaced or renamed\): .*layers\.0\.mlp\.gate_proj\.weight"),
        ("gpt2", 3, move_everything, r"38 tensors should hold .*; 38 moved: .* and 18 more\. Look for an"),
        ("gpt2", 2, lambda model: model.to("meta"), r"; 26 without bits \(on the meta device.*\): transformer\.wte"),
    ],
)
def test_a_change_is_named(model_type: str, blocks: Any, change: Any, message: str) -> None:
    model = build(model_type)
    report = freeze(model, FreezePlan(decoder_blocks=blocks))
    change(model)
    for known in (report, None):
        with pytest.raises(FrozenWeightsChanged, match=message):
            verify_frozen(model, known)


def test_a_batch_norm_statistic_of_a_frozen_module_counts() -> None:
    for buffer in ("norm.running_mean", "plain.running_var", "norm.num_batches_tracked"):
        model = Tower()
        freeze(model)
        model.get_buffer(f"layers.0.{buffer}").add_(1)
        with pytest.raises(FrozenWeightsChanged, match=rf"layers\.0\.{buffer}"):
            verify_frozen(model)
        other = Tower()
        freeze(other)
        other.get_buffer(f"layers.3.{buffer}").add_(1)
        verify_frozen(other)


def test_an_embedding_replaced_by_a_resize_is_named_and_can_be_frozen_again() -> None:
    model = build("llama")
    report = freeze(model)
    model.resize_token_embeddings(80)
    name = r"model\.embed_tokens\.weight \(float32 \[64, 32\], now float32 \[80, 32\]"
    with pytest.raises(FrozenWeightsChanged, match=name):
        verify_frozen(model, report)
    with pytest.raises(FrozenWeightsChanged, match=r"model\.embed_tokens\.weight"):
        verify_frozen(model)
    again = freeze(model)
    assert not model.model.embed_tokens.weight.requires_grad
    assert verify_frozen(model, again).tensors == len(report.digests)


def test_a_tensor_made_trainable_again_is_told_apart_from_one_that_moved() -> None:
    model = build("llama")
    report = freeze(model)
    norm = model.model.layers[0].input_layernorm.weight
    norm.requires_grad_(True)
    again = r"; 1 trainable again: model\.layers\.0\.input_layernorm\.weight\. Look for what set"
    with pytest.raises(FrozenWeightsChanged, match=again):
        verify_frozen(model, report)
    with torch.no_grad():
        norm.add_(1)
        model.model.layers[0].mlp.up_proj.weight.add_(1)
    moved = r"2 moved: model\.layers\.0\.mlp\.up_proj\.weight, model\.layers\.0\.input_layernorm\.weight"
    with pytest.raises(FrozenWeightsChanged, match=rf"; {moved}; 1 trainable again: model\.layers\.0\.input_layernorm"):
        verify_frozen(model, report)


def test_a_change_of_dtype_is_named_and_freezing_again_takes_it() -> None:
    model = build("gpt2")
    freeze(model)
    model.to(torch.bfloat16)
    with pytest.raises(FrozenWeightsChanged, match=r"wte\.weight \(float32 \[64, 32\], now bfloat16 \[64, 32\]\)"):
        verify_frozen(model)
    freeze(model)
    verify_frozen(model)


def test_freezing_again_does_not_hide_that_a_tensor_moved() -> None:
    model = build("gpt2")
    freeze(model)
    model.transformer.wpe.weight.data.add_(1)
    freeze(model)
    with pytest.raises(FrozenWeightsChanged, match=r"transformer\.wpe\.weight"):
        verify_frozen(model)
    thaw(model)
    freeze(model)
    verify_frozen(model)


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("gloo")
def test_a_model_frozen_before_ddp_is_proved_and_thawed_through_it() -> None:
    model = build("gpt2")
    report = freeze(model)
    wrapped = nn.parallel.DistributedDataParallel(model).train()
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2, weight_decay=0.1)
    wrapped(**training_batch(model)).loss.backward()
    optimizer.step()
    assert verify_frozen(wrapped, report) == verify_frozen(wrapped)
    assert not model.transformer.h[0].training
    for change in (thaw, freeze):
        with pytest.raises(FreezeError, match=r"DistributedDataParallel has wrapped already.*\(model\.module\)"):
            change(wrapped)
    thaw(wrapped.module)
    assert names_frozen(model) == set()


def test_a_model_frozen_on_the_meta_device_has_nothing_to_prove_until_it_is_loaded() -> None:
    with torch.device("meta"):
        model = build("gpt2")
    report = freeze(model)
    assert report.lowest_trainable == ("decoder", 2)
    message = r"of whose 26 frozen tensors 26 were on the meta device .*wte\.weight.* Call freeze\(\) again"
    with pytest.raises(FreezeError, match=message):
        verify_frozen(model, report)
    model.load_state_dict(build("gpt2").state_dict(), assign=True)
    model.tie_weights()
    with pytest.raises(FreezeError, match=message):  # nobody knows what they held then
        verify_frozen(model)
    freeze(model)
    assert verify_frozen(model).tensors == len(names_frozen(model)) == 26


def test_tensors_without_bits_are_counted_and_named_and_no_proof_is_given_of_the_others() -> None:
    model = build("gpt2")
    model.transformer.h[1].to("meta")
    report = freeze(model)
    assert len(report.without_bits) == 12
    for known in (report, None):
        with pytest.raises(FreezeError, match=r"26 frozen tensors 12 were on the meta .*h\.1\.ln_1\.weight, .*prove"):
            verify_frozen(model, known)
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight.add_(1)
    with pytest.raises(FrozenWeightsChanged, match=r"1 moved: transformer\.h\.0\.ln_1\.weight"):
        verify_frozen(model, report)


def offload(model: nn.Module, how: str, folder: Path) -> Any:
    """The model as accelerate leaves it: the embeddings and the first two blocks, or all, away between forwards."""
    if how == "cpu_offload":
        return cpu_offload(model)
    if how == "disk_offload":
        return disk_offload(model, str(folder / "offloaded"))
    bottom, rest = ["model.embed_tokens", "model.layers.0", "model.layers.1"], ["model.layers.2", "model.layers.3"]
    places = dict.fromkeys(bottom, how) | dict.fromkeys([*rest, "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder / "offloaded"), force_hooks=True)


@pytest.mark.parametrize("when", ["before freeze", "after freeze"])
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "disk"])
def test_what_accelerate_has_offloaded_is_compared_where_it_lies(how: str, when: str, tmp_path: Path) -> None:
    model = build("llama", tie_word_embeddings=False)
    if when == "before freeze":
        offload(model, how, tmp_path)
        report = freeze(model)
    else:
        report = freeze(model)
        offload(model, how, tmp_path)
    assert report.without_bits == ()
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    for _ in range(2):
        assert verify_frozen(model, report) == verify_frozen(model)
        assert verify_frozen(model).tensors == len(names_frozen(model)) == len(report.frozen_names) > 0
        assert verify_frozen(model).tensor_bytes == 4 * report.frozen_parameters
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]))  # makes new parameters of what it brings in
    hook = model.model.layers[0].mlp.up_proj._hf_hook
    hook.weights_map = weights = {"weight": hook.weights_map["weight"].clone()}
    weights["weight"][0, 0] += 1
    with pytest.raises(FrozenWeightsChanged, match=r"; 1 moved: model\.layers\.0\.mlp\.up_proj\.weight\. Look"):
        verify_frozen(model, report)
    del weights["weight"]
    with pytest.raises(FrozenWeightsChanged, match=r"; 1 without bits .*: model\.layers\.0\.mlp\.up_proj\.weight\. L"):
        verify_frozen(model, report)


def test_a_model_that_was_never_frozen_is_an_error() -> None:
    with pytest.raises(FreezeError, match=r"a GPT2LMHeadModel that was never frozen\. Call freeze\(model, plan\)"):
        verify_frozen(build("gpt2"))


def test_partitioned_tensors_are_gathered_to_be_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's interface is played here: ZeRO-3 keeps a parameter elsewhere, and shows an empty one."""
    model = build("gpt2")
    report = freeze(model)
    elsewhere = {}
    for parameter in model.parameters():
        elsewhere[parameter] = parameter.data
        parameter.ds_id, parameter.ds_shape = len(elsewhere), parameter.shape
        parameter.data = parameter.data.new_empty(0)

    @contextlib.contextmanager
    def gathered(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
        for parameter in parameters:
            parameter.data = elsewhere[parameter]
        yield
        for parameter in parameters:
            parameter.data = parameter.data.new_empty(0)

    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    zero = types.ModuleType("deepspeed.zero")
    zero.GatheredParameters = gathered
    monkeypatch.setitem(sys.modules, "deepspeed.zero", zero)
    verify_frozen(model, report)
    elsewhere[model.transformer.wte.weight][0, 0] += 1
    with pytest.raises(FrozenWeightsChanged, match=r"transformer\.wte\.weight"):
        verify_frozen(model, report)


def test_a_report_survives_pickle_and_proves_by_name() -> None:
    model = build("gpt2")
    report = pickle.loads(pickle.dumps(freeze(model)))  # as a launcher hands it to its processes
    verify_frozen(model, report)
    model.transformer.wpe.weight.data.add_(1)
    with pytest.raises(FrozenWeightsChanged, match=r"transformer\.wpe\.weight"):
        verify_frozen(model, report)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]


@given(data=st.data(), dtype=st.sampled_from(DTYPES), shape=st.lists(st.integers(1, 5), max_size=3))
def test_any_flipped_bit_changes_the_digest(data: st.DataObject, dtype: torch.dtype, shape: list[int]) -> None:
    size = torch.empty((), dtype=dtype).element_size()
    count = torch.Size(shape).numel() * size
    raw = bytearray(data.draw(st.binary(min_size=count, max_size=count)))
    before = tensor_digest(torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape))
    assert before == tensor_digest(torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape))
    bit = data.draw(st.integers(0, 8 * count - 1))
    raw[bit // 8] ^= 1 << (bit % 8)
    assert tensor_digest(torch.frombuffer(raw, dtype=dtype).reshape(shape)) != before


def test_the_digest_is_of_the_values_not_of_their_layout() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    assert tensor_digest(tensor.t().contiguous().t()) == tensor_digest(tensor)
    assert tensor_digest(tensor.reshape(4, 3)) != tensor_digest(tensor)
    assert tensor_digest(tensor.view(torch.int32)) != tensor_digest(tensor)
    assert tensor_digest(torch.empty(0, 3)) != tensor_digest(torch.empty(3, 0))


class Pair(nn.Module):
    """A policy beside its reference, as preference training has them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.reference = copy.deepcopy(model)
        self.policy = model


def test_a_tensor_is_found_by_identity_where_names_are_not_unique() -> None:
    model = build("gpt2")
    report = freeze(model)
    pair = Pair(model)
    assert verify_frozen(pair, report).tensors == len(report.digests)
    pair.reference.transformer.wpe.weight.data.add_(1)
    verify_frozen(pair, report)
    model.transformer.wpe.weight.data.add_(1)
    with pytest.raises(FrozenWeightsChanged, match=r"; 1 moved: transformer\.wpe\.weight"):
        verify_frozen(pair, report)


def test_two_frozen_models_in_one_are_an_error_and_one_is_proved_under_any_wrapper() -> None:
    model = build("gpt2")
    freeze(model)
    pair = Pair(model)
    with pytest.raises(FreezeError, match=r"this Pair holds 2: GPT2LMHeadModel, GPT2LMHeadModel\. Pass one of them"):
        verify_frozen(pair)
    thaw(pair.reference)
    assert verify_frozen(pair) == verify_frozen(model)
