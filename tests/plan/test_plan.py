from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_freeze import FreezePlan, read_anatomy
from hf_freeze.anatomy import Anatomy
from hf_freeze.cuts import Cut
from hf_freeze.errors import PlanError
from hf_freeze.plan import ResolvedPlan
from tests.zoo import build


def deep(depth: int, model_type: str = "llama", **given: Any) -> Anatomy:
    """A model of that depth on the meta device: nothing here needs weights."""
    with torch.device("meta"):
        return read_anatomy(build(model_type, num_hidden_layers=depth, **given))


def anatomy_of(model_type: str) -> Any:
    return pytest.fixture(scope="module", name=model_type)(lambda: read_anatomy(build(model_type)))


llama, gpt2, bart, t5 = map(anatomy_of, ("llama", "gpt2", "bart", "t5"))


def said(resolved: ResolvedPlan) -> str:
    return " ".join(resolved.reasons)


# ---------------------------------------------------------------------------------------------------- block counts


@pytest.mark.parametrize(
    ("asked", "frozen"),
    [
        (0, 0), (3, 3), (12, 12), (-1, 11), (-12, 0), ("all", 12), (None, 6),
        (1, 1), (1.0, 12), (0.0, 0), (0.5, 6), (0.31, 3), (0.32, 3), (1 / 12, 1), (11 / 12, 11), (0.99, 11),
        ("3", 3), ("-4", 8), ("0.5", 6), ("1.0", 12),
    ],
)  # fmt: skip
def test_counts_negatives_fractions_and_all(asked: Any, frozen: int) -> None:
    anatomy = deep(12)
    resolved = FreezePlan(decoder_blocks=asked).resolve(anatomy)
    assert resolved.blocks == {"decoder": frozen}
    blocks = {anatomy.parts[name].index for name in resolved.frozen if anatomy.parts[name].kind == "block"}
    assert blocks == set(range(frozen))


@pytest.mark.parametrize("count", [3, -4, 0.5, 1.0, 1, "all"])
def test_a_count_may_be_text_as_a_command_line_gives_it(count: Any) -> None:
    plan = FreezePlan(decoder_blocks=str(count))
    assert plan == FreezePlan(decoder_blocks=count)
    assert type(plan.decoder_blocks) is type(count)


@given(depth=st.integers(1, 200), data=st.data())
def test_a_fraction_of_whole_blocks_is_these_blocks_whatever_the_last_bit(depth: int, data: st.DataObject) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(1, 1)
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(1, 1)) for _ in range(depth))
            self.score = nn.Linear(1, 1)

    count = data.draw(st.integers(0, depth))
    assert FreezePlan(decoder_blocks=count / depth).resolve(read_anatomy(Deep())).blocks == {"decoder": count}


def test_a_derived_count_says_what_it_is(llama: Anatomy) -> None:
    assert "decoder_blocks was not given: the lower half, 2 of 4 blocks." in FreezePlan().resolve(llama).reasons
    assert "decoder_blocks=-1 is 3 of 4 blocks." in FreezePlan(decoder_blocks=-1).resolve(llama).reasons
    assert FreezePlan(decoder_blocks=2).resolve(llama).reasons == ()


def test_one_stack_takes_either_name_and_not_both_with_unlike_counts(llama: Anatomy) -> None:
    assert FreezePlan(encoder_blocks=3).resolve(llama) == FreezePlan(decoder_blocks=3).resolve(llama)
    assert FreezePlan(encoder_blocks=2, decoder_blocks=0.5).resolve(llama).blocks == {"decoder": 2}
    with pytest.raises(PlanError, match=r"encoder_blocks=1 and decoder_blocks=2; LlamaForCausalLM has one stack of 4"):
        FreezePlan(encoder_blocks=1, decoder_blocks=2).resolve(llama)


def test_two_stacks_are_counted_apart(t5: Anatomy) -> None:
    assert FreezePlan(encoder_blocks="all", decoder_blocks=1).resolve(t5).blocks == {"encoder": 4, "decoder": 1}


def test_a_count_beyond_the_depth_is_an_error_that_says_the_depth(t5: Anatomy) -> None:
    with pytest.raises(
        PlanError,
        match=r"^FreezePlan asks for 14 encoder blocks; T5ForConditionalGeneration has 4\. "
        r"Use encoder_blocks <= 4, or 'all'\.$",
    ):
        FreezePlan(encoder_blocks=14).resolve(t5)
    with pytest.raises(PlanError, match=r"asks for -5 decoder blocks; .* has 4\. Use decoder_blocks >= -4"):
        FreezePlan(decoder_blocks=-5).resolve(t5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decoder_blocks": 1.5}, r"decoder_blocks=1\.5; a fraction lies between 0\.0 and 1\.0"),
        ({"decoder_blocks": -0.5}, r"decoder_blocks=-0\.5; a fraction lies between"),
        ({"decoder_blocks": float("nan")}, r"decoder_blocks=nan; a fraction lies between"),
        ({"encoder_blocks": True}, r'encoder_blocks=True; it is an int, a fraction between 0\.0 and 1\.0, or "all"'),
        ({"encoder_blocks": "half"}, r"encoder_blocks='half'; it is an int"),
        ({"encoder_blocks": "1.5"}, r"encoder_blocks=1\.5; a fraction lies between"),
        ({"embeddings": "yes"}, r"embeddings='yes'; it is True or False"),
        ({"tied_head": "clone"}, r"tied_head='clone'; it is one of 'freeze', 'train', 'untie'"),
        ({"frozen_mode": True}, r"frozen_mode=True; it is one of 'eval', 'train'"),
        ({"freeze": "norm"}, r"freeze='norm'; it is a sequence of regular expressions\. Use freeze=\('norm',\)"),
        ({"train": None}, r"train=None; it is a sequence of regular expressions"),
        ({"train": [3]}, r"train=\[3\]; every pattern is a string"),
        ({"freeze": ["(norm"]}, r"freeze=\('\(norm',\); that is no regular expression"),
        ({"freeze": ["(?i)NORM"]}, r"that is no regular expression: global flags not at the start"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_when_the_plan_is_made(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        FreezePlan(**values)


# ------------------------------------------------------------------------------------------------------ tied heads


def test_a_tied_head_freezes_with_the_embeddings_by_default_and_the_reason_is_said(gpt2: Anatomy) -> None:
    resolved = FreezePlan().resolve(gpt2)
    assert "transformer.wte.weight" in resolved.frozen
    assert "lm_head.weight is the same tensor as transformer.wte.weight: both are frozen" in said(resolved)
    assert resolved.lowest_trainable == ("decoder", 2)


def test_a_tied_head_that_trains_leaves_no_prefix(gpt2: Anatomy) -> None:
    resolved = FreezePlan(tied_head="train").resolve(gpt2)
    assert "transformer.wte.weight" in resolved.trained
    assert "transformer.wpe.weight" in resolved.frozen
    assert "both train (tied_head='train')" in said(resolved)
    assert resolved.cuts == ()
    assert "the embeddings train (transformer.wte.weight)" in resolved.why_no_cut
    assert resolved.lowest_trainable == ("embeddings", 0)


def test_an_untied_head_trains_alone_and_the_prefix_stays(gpt2: Anatomy) -> None:
    resolved = FreezePlan(tied_head="untie").resolve(gpt2)
    assert resolved.untied == ("lm_head.weight",)
    assert "transformer.wte.weight" in resolved.frozen
    assert "lm_head.weight" in resolved.trained
    assert resolved.cuts == (Cut("decoder", 2),)
    assert "lm_head.weight is untied from transformer.wte.weight" in said(resolved)


def test_choices_for_a_tied_head_mean_nothing_without_a_tie(llama: Anatomy) -> None:
    plans = [FreezePlan(tied_head=choice).resolve(llama) for choice in ("freeze", "train", "untie")]
    assert plans[0] == plans[1] == plans[2]


def test_trained_embeddings_train_their_tied_head_too(gpt2: Anatomy) -> None:
    for choice in ("freeze", "train", "untie"):
        resolved = FreezePlan(embeddings=False, tied_head=choice).resolve(gpt2)
        assert "transformer.wte.weight" in resolved.trained
        assert resolved.untied == ()
        assert resolved.lowest_trainable == ("embeddings", 0)


def test_freezing_one_name_of_a_tie_and_training_the_other_is_an_error(gpt2: Anatomy) -> None:
    with pytest.raises(
        PlanError, match=r"freezes 'transformer\.wte\.weight' and trains 'lm_head\.weight'.* one tensor"
    ):
        FreezePlan(train=("lm_head",)).resolve(gpt2)
    with pytest.raises(PlanError, match=r"freezes 'lm_head\.weight' and trains 'transformer\.wte\.weight'"):
        FreezePlan(embeddings=False, freeze=("lm_head",)).resolve(gpt2)
    both = FreezePlan(train=("lm_head", r"transformer\.wte")).resolve(gpt2)
    assert "transformer.wte.weight" in both.trained


def test_untying_a_head_and_freezing_it_by_a_pattern_is_an_error(gpt2: Anatomy) -> None:
    with pytest.raises(PlanError, match=r"unties 'lm_head\.weight' to train it and freezes it by a pattern"):
        FreezePlan(tied_head="untie", freeze=("lm_head",)).resolve(gpt2)


def test_blocks_that_share_a_tensor_with_a_frozen_block_keep_that_tensor_frozen() -> None:
    anatomy = read_anatomy(build("zamba"))
    tied = next(tie for tie in anatomy.ties if "shared_transf" in tie.names[0])
    assert {part.index for part in tied.parts} == {1, 3}
    resolved = FreezePlan(decoder_blocks=2).resolve(anatomy)
    assert tied.names[0] in resolved.frozen
    assert "a tensor with a frozen place stays frozen" in said(resolved)


def test_barts_four_names_of_one_embedding_are_frozen_once(bart: Anatomy) -> None:
    resolved = FreezePlan().resolve(bart)
    assert [name for name in resolved.frozen if "embed_tokens" in name or "shared" in name] == ["model.shared.weight"]
    assert FreezePlan(tied_head="untie").resolve(bart).untied == ("lm_head.weight",)


# -------------------------------------------------------------------------------------------------------- patterns


def test_a_pattern_for_block_1_never_means_block_10() -> None:
    anatomy = deep(12)
    plain = FreezePlan(embeddings=False, decoder_blocks=0, freeze=(r"layers\.1",)).resolve(anatomy)
    assert {anatomy.parts[name].index for name in plain.frozen} == {1}
    both = FreezePlan(embeddings=False, decoder_blocks=0, freeze=(r"layers\.1\d?",)).resolve(anatomy)
    assert {anatomy.parts[name].index for name in both.frozen} == {1, 10, 11}


def test_a_pattern_covers_whole_pieces_of_a_name(llama: Anatomy) -> None:
    norms = FreezePlan(decoder_blocks=0, freeze=("norm",)).resolve(llama)
    assert [name for name in norms.frozen if "norm" in name] == ["model.norm.weight"]
    every = FreezePlan(decoder_blocks=0, freeze=(".*norm",)).resolve(llama)
    assert len([name for name in every.frozen if "norm" in name]) == 9


def test_a_pattern_with_alternatives_covers_each_of_them_whole(llama: Anatomy) -> None:
    resolved = FreezePlan(embeddings=False, decoder_blocks=0, freeze=("norm|lm_head",)).resolve(llama)
    assert resolved.frozen == ("model.norm.weight", "lm_head.weight")


def test_train_wins_over_freeze(llama: Anatomy) -> None:
    resolved = FreezePlan(freeze=(r"layers\.3",), train=(r"layers\.3\.mlp", r"layers\.0\.mlp")).resolve(llama)
    assert "model.layers.3.mlp.up_proj.weight" in resolved.trained
    assert "model.layers.3.self_attn.q_proj.weight" in resolved.frozen
    assert "model.layers.0.mlp.up_proj.weight" in resolved.trained


@pytest.mark.parametrize("field", ["freeze", "train"])
def test_a_pattern_that_matches_nothing_is_an_error_with_near_misses(llama: Anatomy, field: str) -> None:
    with pytest.raises(PlanError, match=rf"{field}=\('self_atn',\); it matches none of the 39 .*nearest: 'self_attn'"):
        FreezePlan(**{field: ("self_atn",)}).resolve(llama)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- plans that make no sense


def test_a_plan_that_freezes_nothing_is_an_error(llama: Anatomy) -> None:
    with pytest.raises(PlanError, match=r"freezes nothing of LlamaForCausalLM: FreezePlan\(.*Ask for at least one"):
        FreezePlan(embeddings=False, decoder_blocks=0).resolve(llama)


def test_a_plan_that_trains_nothing_is_an_error(llama: Anatomy) -> None:
    with pytest.raises(PlanError, match=r"trains nothing of LlamaForCausalLM: every tensor is frozen"):
        FreezePlan(freeze=(".*",)).resolve(llama)


def lora(**given: Any) -> Anatomy:
    return read_anatomy(get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], r=2, **given)))


def test_on_a_peft_model_only_the_adapters_above_the_frozen_blocks_train() -> None:
    anatomy = lora()
    resolved = FreezePlan(decoder_blocks=3).resolve(anatomy)
    able = [name for name in resolved.trained if anatomy.parameters[name].requires_grad]
    assert {anatomy.parts[name].index for name in able} == {3}
    assert all("lora_" in name for name in able)
    assert resolved.lowest_trainable == ("decoder", 3)
    assert resolved.cuts == (Cut("decoder", 3),)


def test_what_peft_froze_counts_where_the_backward_pass_ends_and_what_is_cached() -> None:
    resolved = FreezePlan(decoder_blocks=1).resolve(lora(layers_to_transform=[2, 3]))
    assert resolved.lowest_trainable == ("decoder", 2)
    assert resolved.cuts == (Cut("decoder", 2),)


def test_a_plan_that_leaves_a_peft_model_nothing_to_train_is_an_error() -> None:
    with pytest.raises(
        PlanError, match=r"trains nothing of LlamaForCausalLM: the 2 tensors it leaves are frozen already"
    ):
        FreezePlan(decoder_blocks="all").resolve(lora())


# ------------------------------------------------------------------------------- what can be cached, and where it ends


def test_a_decoders_lower_blocks_can_be_cached(llama: Anatomy) -> None:
    resolved = FreezePlan(decoder_blocks=3).resolve(llama)
    assert resolved.cuts == (Cut("decoder", 3),)
    assert resolved.why_no_cut == ""
    assert resolved.lowest_trainable == ("decoder", 3)


def test_an_encoders_lower_blocks_can_be_cached() -> None:
    from transformers import BertConfig, BertModel

    from tests.zoo import shrink

    anatomy = read_anatomy(BertModel(shrink(BertConfig)))
    assert FreezePlan(encoder_blocks=1).resolve(anatomy).cuts == (Cut("encoder", 1),)


def test_half_and_half_of_an_encoder_decoder_caches_the_encoders_half_alone(bart: Anatomy) -> None:
    resolved = FreezePlan().resolve(bart)
    assert resolved.cuts == (Cut("encoder", 2),)
    assert resolved.lowest_trainable == ("encoder", 2)
    assert any("Encoder blocks train below a partly frozen decoder" in warning for warning in resolved.warnings)


@pytest.mark.parametrize("model_type", ["bart", "t5", "pegasus"])
def test_a_whole_encoder_and_half_a_decoder_are_both_cached(model_type: str) -> None:
    anatomy = read_anatomy(build(model_type))
    resolved = FreezePlan(encoder_blocks="all").resolve(anatomy)
    assert resolved.cuts == (Cut("encoder", 4), Cut("decoder", 2))
    assert resolved.lowest_trainable == ("decoder", 2)
    assert resolved.warnings == ()
    final = [name for name in anatomy.final_norms if anatomy.parts[name].stack == "encoder"]
    assert set(final) <= set(resolved.frozen)


def test_an_encoder_whose_final_norm_trains_is_not_whole(t5: Anatomy) -> None:
    resolved = FreezePlan(encoder_blocks="all", train=(r"encoder\.final_layer_norm",)).resolve(t5)
    assert resolved.cuts == (Cut("encoder", 4),)
    assert resolved.lowest_trainable == ("final", 0)


def test_a_decoder_whose_embeddings_train_is_not_cached_although_the_encoder_is(bart: Anatomy) -> None:
    plan = FreezePlan(encoder_blocks="all", train=(r"decoder\.embed_positions",))
    resolved = plan.resolve(bart)
    assert resolved.cuts == (Cut("encoder", 4),)
    assert resolved.why_no_cut == ""


def test_nothing_is_cached_where_the_embeddings_train_and_the_loss_of_the_saving_is_warned_of(llama: Anatomy) -> None:
    resolved = FreezePlan(embeddings=False).resolve(llama)
    assert resolved.cuts == ()
    assert "the embeddings train (model.embed_tokens.weight)" in resolved.why_no_cut
    assert resolved.lowest_trainable == ("embeddings", 0)
    assert "most of the saving in time and memory is gone" in resolved.warnings[0]


def test_nothing_is_cached_where_dropout_stays_on_in_frozen_blocks(llama: Anatomy) -> None:
    resolved = FreezePlan(frozen_mode="train").resolve(llama)
    assert resolved.cuts == ()
    assert "frozen_mode='train' keeps dropout on" in resolved.why_no_cut


def test_a_trained_norm_inside_a_frozen_block_ends_the_prefix_below_it_and_is_warned_of(llama: Anatomy) -> None:
    lowest = FreezePlan(decoder_blocks=3, train=(".*norm",)).resolve(llama)
    assert (lowest.cuts, lowest.why_no_cut) == ((), "the lowest block is not frozen whole.")
    assert lowest.lowest_trainable == ("decoder", 0)
    second = FreezePlan(decoder_blocks=3, train=(r"layers\.1\.input_layernorm",)).resolve(llama)
    assert second.cuts == (Cut("decoder", 1),)
    assert second.lowest_trainable == ("decoder", 1)
    assert any("Part of decoder block 1 trains though 3 blocks" in warning for warning in second.warnings)


def test_the_backward_pass_ends_at_the_final_norm_or_the_head_where_all_blocks_are_frozen(llama: Anatomy) -> None:
    assert FreezePlan(decoder_blocks="all").resolve(llama).lowest_trainable == ("final", 0)
    head = FreezePlan(decoder_blocks="all", freeze=(r"model\.norm",)).resolve(llama)
    assert head.lowest_trainable == ("head", 0)
    assert head.trained == ("lm_head.weight",)


def test_a_tower_that_trains_takes_the_backward_pass_to_the_bottom() -> None:
    anatomy = read_anatomy(build("git"))
    assert FreezePlan().resolve(anatomy).lowest_trainable == ("decoder", 2)
    moving = FreezePlan(train=(".*visual_projection",)).resolve(anatomy)
    assert moving.lowest_trainable == ("embeddings", 0)
    assert moving.cuts == ()


def test_every_name_is_frozen_or_trained_once(bart: Anatomy) -> None:
    for plan in (FreezePlan(), FreezePlan(tied_head="train"), FreezePlan(encoder_blocks="all", train=(".*norm",))):
        resolved = plan.resolve(bart)
        assert sorted(resolved.frozen + resolved.trained) == sorted(bart.parameters)


def test_resolving_changes_no_model() -> None:
    model = build("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    FreezePlan(tied_head="untie").resolve(read_anatomy(model))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# -------------------------------------------------------------------------------------------------- saved and read

COUNTS = st.none() | st.just("all") | st.integers(-50, 50) | st.floats(0, 1)
PATTERNS = st.lists(st.sampled_from(["norm", r"layers\.1", ".*bias", "ä"]), max_size=3)
PLANS = st.builds(
    FreezePlan,
    embeddings=st.booleans(),
    encoder_blocks=COUNTS,
    decoder_blocks=COUNTS,
    tied_head=st.sampled_from(["freeze", "train", "untie"]),
    freeze=PATTERNS,
    train=PATTERNS,
    frozen_mode=st.sampled_from(["eval", "train"]),
)


@given(PLANS)
def test_a_plan_survives_json_and_keeps_the_kind_of_its_counts(plan: FreezePlan) -> None:
    again = FreezePlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert type(again.decoder_blocks) is type(plan.decoder_blocks)
    assert hash(again) == hash(plan)
    assert FreezePlan.from_dict({"train": plan.train}) == FreezePlan(train=plan.train)  # the rest keeps its defaults


def test_a_plan_survives_a_file(tmp_path: Path) -> None:
    plan = FreezePlan(decoder_blocks=1.0, freeze=("norm",))
    plan.save_pretrained(tmp_path / "new" / "folder")
    assert FreezePlan.from_pretrained(tmp_path / "new" / "folder") == plan
    assert os.listdir(tmp_path / "new" / "folder") == ["freeze_plan.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"embeddings": tru', r"freeze_plan\.json was read as a freeze plan; it is not JSON"),
        ("[1, 2]", r"it holds a list, not an object"),
        ('{"decoder_blocks": "most"}', r"decoder_blocks='most'; it is an int"),
        ('{"decoder_block": 3}', r"the field 'decoder_block'; it has no such field\. The nearest: 'decoder_bl"),
        (None, r"there is no freeze_plan\.json in it\. Write one with"),
    ],
)
def test_a_broken_or_missing_file_is_an_error(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "freeze_plan.json").write_text(text)
    with pytest.raises(PlanError, match=message):
        FreezePlan.from_pretrained(tmp_path)


def test_a_crash_while_writing_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FreezePlan(decoder_blocks=3).save_pretrained(tmp_path)
    write = Path.write_bytes

    def crash(path: Path, content: bytes) -> int:
        write(path, content[:20])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", crash)
    with pytest.raises(OSError, match="no space left"):
        FreezePlan(decoder_blocks=1).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert FreezePlan.from_pretrained(tmp_path) == FreezePlan(decoder_blocks=3)


def test_a_saved_plan_may_be_read_by_whoever_may_read_the_folder(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    FreezePlan().save_pretrained(tmp_path)
    assert (tmp_path / "freeze_plan.json").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_untie_freezes_the_embeddings_even_where_the_head_is_registered_first() -> None:
    model = build("gpt2", n_layer=2)
    model._modules["transformer"] = model._modules.pop("transformer")
    resolved = FreezePlan(decoder_blocks=1, tied_head="untie").resolve(read_anatomy(model))
    assert "transformer.wte.weight" in resolved.frozen
    assert resolved.untied == ("lm_head.weight",)
    assert resolved.lowest_trainable == ("decoder", 1)
    assert resolved.cuts == (("decoder", 1),)
