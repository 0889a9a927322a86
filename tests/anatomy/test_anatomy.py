from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    FSMTConfig,
    FSMTForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LukeConfig,
    LukeModel,
    OPTConfig,
    OPTForCausalLM,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_freeze import FreezePlan, freeze, read_anatomy
from hf_freeze.anatomy import Anatomy, Part
from hf_freeze.errors import AnatomyError
from tests.zoo import BLOCKS, build, shrink


def outside_blocks(anatomy: Anatomy) -> dict[str, list[str]]:
    """Names by part, blocks left out."""
    parts: dict[str, list[str]] = {}
    for name, part in anatomy.parts.items():
        if part.kind != "block":
            parts.setdefault(str(part), []).append(name)
    return parts


def stacks(anatomy: Anatomy) -> list[tuple[str, str, int]]:
    return [(stack.name, stack.path, len(stack)) for stack in anatomy.stacks]


# ------------------------------------------------------------------------------------------- what is found, exactly


def test_llama_which_has_no_encoder() -> None:
    anatomy = read_anatomy(build("llama"))
    assert stacks(anatomy) == [("decoder", "model.layers", BLOCKS)]
    assert outside_blocks(anatomy) == {
        "decoder embeddings": ["model.embed_tokens.weight"],
        "decoder final": ["model.norm.weight"],
        "head": ["lm_head.weight"],
    }
    assert anatomy.parts["model.layers.2.mlp.up_proj.weight"] == Part("block", "decoder", 2)
    assert anatomy.decoder_blocks[3].names == ("model.layers.3",)
    assert (anatomy.ties, anatomy.encoder_blocks, anatomy.notes) == ((), (), ())
    with pytest.raises(AnatomyError, match=r"The stack 'encoder' was asked for; LlamaForCausalLM has 'decoder'"):
        anatomy.stack("encoder")


def test_gpt2_with_its_tie_and_its_table() -> None:
    anatomy = read_anatomy(build("gpt2"))
    assert stacks(anatomy) == [("decoder", "transformer.h", BLOCKS)]
    assert outside_blocks(anatomy) == {
        "decoder embeddings": ["transformer.wte.weight", "transformer.wpe.weight"],
        "decoder final": ["transformer.ln_f.weight", "transformer.ln_f.bias"],
        "head": ["lm_head.weight"],
    }
    assert anatomy.stacks[0].inputs == ("transformer.drop", "transformer.wpe", "transformer.wte")
    (tie,) = anatomy.ties
    assert tie.names == ("transformer.wte.weight", "lm_head.weight")
    assert tie.parts == (Part("embeddings", "decoder"), Part("head"))
    assert tie.joins_head
    assert "lm_head.weight" not in anatomy.parameters
    assert "GPT2LMHeadModel: anatomy" in str(anatomy)
    assert "decoder blocks 0-3" in str(anatomy)


def test_bart_whose_embedding_norm_is_registered_after_the_blocks() -> None:
    anatomy = read_anatomy(build("bart"))
    assert stacks(anatomy) == [
        ("encoder", "model.encoder.layers", BLOCKS),
        ("decoder", "model.decoder.layers", BLOCKS),
    ]
    own = ["embed_tokens.weight", "embed_positions.weight", "layernorm_embedding.weight", "layernorm_embedding.bias"]
    assert outside_blocks(anatomy) == {
        "embeddings": ["model.shared.weight"],
        "encoder embeddings": [f"model.encoder.{name}" for name in own],
        "decoder embeddings": [f"model.decoder.{name}" for name in own],
        "head": ["lm_head.weight"],
    }
    (tie,) = anatomy.ties
    assert set(tie.names) == {
        "model.shared.weight",
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
        "lm_head.weight",
    }


def test_t5_whose_position_bias_belongs_to_its_first_block() -> None:
    anatomy = read_anatomy(build("t5"))
    assert stacks(anatomy) == [("encoder", "encoder.block", BLOCKS), ("decoder", "decoder.block", BLOCKS)]
    assert outside_blocks(anatomy) == {
        "embeddings": ["shared.weight"],
        "encoder embeddings": ["encoder.embed_tokens.weight"],
        "decoder embeddings": ["decoder.embed_tokens.weight"],
        "encoder final": ["encoder.final_layer_norm.weight"],
        "decoder final": ["decoder.final_layer_norm.weight"],
        "head": ["lm_head.weight"],
    }
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert anatomy.parts[bias] == Part("block", "encoder", 0)


def test_bert_is_one_encoder_with_segment_embeddings() -> None:
    anatomy = read_anatomy(BertModel(shrink(BertConfig)))
    assert stacks(anatomy) == [("encoder", "encoder.layer", BLOCKS)]
    pieces = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    assert outside_blocks(anatomy) == {
        "encoder embeddings": [f"embeddings.{piece}.weight" for piece in pieces]
        + ["embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias"],
        "encoder final": ["pooler.dense.weight", "pooler.dense.bias"],
    }


def test_opt_whose_projections_are_registered_side_by_side() -> None:
    anatomy = read_anatomy(OPTForCausalLM(shrink(OPTConfig, word_embed_proj_dim=16, do_layer_norm_before=False)))
    assert anatomy.parts["model.decoder.project_in.weight"] == Part("embeddings", "decoder")
    assert anatomy.parts["model.decoder.project_out.weight"] == Part("final", "decoder")
    assert anatomy.parts["model.decoder.embed_positions.weight"] == Part("embeddings", "decoder")


def test_parameters_of_the_stack_itself_count_as_embeddings_where_they_act_before_the_blocks() -> None:
    anatomy = read_anatomy(build("zaya"))
    own = ("model.input_hidden_states_scale", "model.input_hidden_states_bias")
    assert anatomy.stacks[0].input_parameters == own
    assert set(anatomy.embeddings) == {"model.embed_tokens.weight", *own}


def test_a_projection_by_the_token_embeddings_is_the_head_although_the_accessor_names_another() -> None:
    config = shrink(FSMTConfig, tie_word_embeddings=True, src_vocab_size=64, tgt_vocab_size=64)
    assert read_anatomy(FSMTForConditionalGeneration(config)).head == ("model.decoder.output_projection.weight",)


def test_a_decoder_that_is_a_model_with_its_own_head() -> None:
    anatomy = read_anatomy(build("encoder-decoder"))
    assert stacks(anatomy) == [
        ("encoder", "encoder.encoder.layer", BLOCKS),
        ("decoder", "decoder.bert.encoder.layer", BLOCKS),
    ]
    assert {name.split(".")[1] for name in anatomy.head} == {"cls"}
    assert anatomy.names_of("other", "tower") == ()


@pytest.mark.parametrize(
    ("model_type", "some"),
    [
        ("jamba", {"mamba.in_proj.weight", "self_attn.q_proj.weight", "feed_forward.experts.gate_up_proj"}),
        ("bamba", {"mamba.in_proj.weight", "self_attn.q_proj.weight"}),
        ("mixtral", {"mlp.gate.weight", "mlp.experts.gate_up_proj"}),
        ("mamba", {"mixer.A_log", "mixer.in_proj.weight"}),
    ],
)
def test_hybrid_expert_and_state_space_decoders(model_type: str, some: set[str]) -> None:
    anatomy = read_anatomy(build(model_type))
    assert [(stack.name, len(stack)) for stack in anatomy.stacks] == [("decoder", BLOCKS)]
    in_blocks = {
        name.partition(f"{anatomy.stacks[0].path}.")[2].partition(".")[2] for name in anatomy.names_of("block")
    }
    assert some <= in_blocks


def test_blocks_whose_pieces_lie_in_parallel_lists() -> None:
    anatomy = read_anatomy(build("xlm"))
    assert [len(block.names) for block in anatomy.decoder_blocks] == [4] * BLOCKS
    assert anatomy.decoder_blocks[1].names[0] == "transformer.attentions.1"
    assert anatomy.parts["transformer.layer_norm2.3.weight"] == Part("block", "decoder", 3)


# ------------------------------------------------------------------------------------------------- beside the text


def test_the_text_part_of_a_vision_language_model_has_the_vision_tower_beside_it() -> None:
    anatomy = read_anatomy(LlavaForConditionalGeneration(shrink(LlavaConfig)))
    assert stacks(anatomy) == [("decoder", "model.language_model.layers", BLOCKS)]
    towers = {name.split(".")[1] for name in anatomy.names_of("tower")}
    assert towers == {"vision_tower", "multi_modal_projector"}
    assert set(anatomy.names_of("tower")) < set(anatomy.embeddings)
    assert anatomy.head == ("lm_head.weight",)


def test_the_projector_is_found_in_a_vision_language_model_without_a_head() -> None:
    anatomy = read_anatomy(LlavaModel(shrink(LlavaConfig)))
    assert {name.split(".")[0] for name in anatomy.names_of("tower")} == {"vision_tower", "multi_modal_projector"}


def test_a_tower_inside_the_text_stack_is_found_with_its_projector() -> None:
    anatomy = read_anatomy(build("git"))
    assert {name.split(".")[1] for name in anatomy.names_of("tower")} == {"image_encoder", "visual_projection"}
    assert anatomy.final_norms == ()


def test_embeddings_that_text_alone_does_not_reach_are_embeddings_with_their_norm() -> None:
    anatomy = read_anatomy(LukeModel(shrink(LukeConfig, entity_vocab_size=64, entity_emb_size=16)))
    assert {name.split(".")[0] for name in anatomy.embeddings} == {"embeddings", "entity_embeddings"}
    assert {name.split(".")[0] for name in anatomy.final_norms} == {"pooler"}


# ---------------------------------------------------------------------------------------------------------- images


SMALL_VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}


def test_a_vision_transformer_is_one_encoder_read_by_running_it_on_an_image() -> None:
    anatomy = read_anatomy(ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **SMALL_VISION)))
    ((name, path, count),) = stacks(anatomy)
    assert (name, path.split(".")[0], count) == ("encoder", "vit", 3)
    embeddings = set(anatomy.embeddings)
    assert {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"} < embeddings
    assert "vit.embeddings.patch_embeddings.projection.weight" in embeddings
    assert anatomy.final_norms == ("vit.layernorm.weight", "vit.layernorm.bias")
    assert anatomy.head == ("classifier.weight", "classifier.bias")
    assert anatomy.notes == ()


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("size", [16, (16, 32)])
def test_the_image_has_the_channels_and_the_size_of_the_config_and_dtype_and_device_of_the_model(
    channels: int, size: object
) -> None:
    config = ViTConfig(image_size=size, patch_size=8, num_channels=channels, **SMALL_VISION)
    model = ViTForImageClassification(config)
    assert read_anatomy(model).notes == ()
    assert read_anatomy(model.to(torch.bfloat16)).notes == ()
    assert read_anatomy(model.to("meta")).notes == ()


def test_a_vision_encoder_below_a_text_decoder_is_run_on_an_image() -> None:
    encoder = ViTModel(ViTConfig(image_size=16, patch_size=8, **SMALL_VISION))
    decoder = BertLMHeadModel(shrink(BertConfig, is_decoder=True, add_cross_attention=True))
    anatomy = read_anatomy(VisionEncoderDecoderModel(encoder=encoder, decoder=decoder))
    assert [(name, count) for name, _, count in stacks(anatomy)] == [("encoder", 3), ("decoder", BLOCKS)]
    assert "encoder.embeddings.cls_token" in anatomy.embeddings
    assert anatomy.notes == ()


class Convolutions(nn.Module):
    """No Hugging Face model: its first layer is a convolution, so its input is an image, whatever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3)
        self.features = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3))
        self.norm = nn.BatchNorm2d(4)
        self.score = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.score(self.norm(self.features(self.stem(x))).mean((2, 3)))
        return out


def test_a_convolutional_network_is_read_by_running_it_where_its_blocks_are_named() -> None:
    model = Convolutions()
    with pytest.raises(AnatomyError, match=r"no list of composed modules with parameters\. Pass blocks="):
        read_anatomy(model)
    anatomy = read_anatomy(model, blocks=model.features)
    assert stacks(anatomy) == [("encoder", "features", 4)]
    assert outside_blocks(anatomy) == {
        "encoder embeddings": ["stem.weight", "stem.bias"],
        "encoder final": ["norm.weight", "norm.bias"],
        "head": ["score.weight", "score.bias"],
    }
    assert anatomy.notes == ()


def test_where_an_image_cannot_be_run_the_anatomy_says_so() -> None:
    model = Convolutions()
    model.stem.forward = None  # type: ignore[assignment, method-assign]
    (note,) = read_anatomy(model, blocks=model.features).notes
    assert "could not be run on an image (TypeError" in note


# --------------------------------------------------------------------------------------------------------- wrapped


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, torch.compile])
def test_names_through_a_wrapper_are_those_of_the_model(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = build("gpt2")
    wrapped = read_anatomy(wrap(model))
    assert wrapped == read_anatomy(model)
    assert wrapped.model is model


def test_lora_weights_lie_in_the_blocks_that_they_adapt() -> None:
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], r=2))
    anatomy = read_anatomy(model)
    assert anatomy.model_class == "LlamaForCausalLM"
    assert stacks(anatomy) == [("decoder", "base_model.model.model.layers", BLOCKS)]
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"
    assert anatomy.parts[name] == Part("block", "decoder", 1)
    assert anatomy.head == ("base_model.model.lm_head.weight",)


def test_lora_on_every_linear_layer_of_a_tied_model() -> None:
    plain = read_anatomy(build("gpt2"))
    anatomy = read_anatomy(get_peft_model(build("gpt2"), LoraConfig(target_modules="all-linear", fan_in_fan_out=True)))
    assert len(anatomy.decoder_blocks) == len(plain.decoder_blocks)
    assert anatomy.ties[0].joins_head


def test_a_soft_prompt_is_part_of_the_embeddings() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    anatomy = read_anatomy(get_peft_model(build("llama"), config))
    assert any("prompt_encoder" in name for name in anatomy.embeddings)


# ------------------------------------------------------------------------------------------------ any torch module


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = states + self.mix(self.norm(states))
        return out


class Plain(nn.Module):
    """No Hugging Face model: its input is called x."""

    def __init__(self, lists: int = 1) -> None:
        super().__init__()
        self.project = nn.Linear(3, 4)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        if lists == 2:
            self.others = nn.ModuleList(Block() for _ in range(2))
        self.score = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = self.project(x)
        for layer in self.layers:
            states = layer(states)
        out: torch.Tensor = self.score(states)
        return out


def test_a_plain_module_with_one_list_of_blocks_needs_no_blocks_and_says_how_it_was_read() -> None:
    anatomy = read_anatomy(Plain())
    assert stacks(anatomy) == [("decoder", "layers", 3)]
    assert anatomy.embeddings == ("project.weight", "project.bias")
    assert anatomy.head == ("score.weight", "score.bias")
    assert anatomy.final_norms == ()
    (note,) = anatomy.notes
    assert "told by the order of registration" in note


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.ModuleList(nn.Linear(2, 2) for _ in range(3))])
def test_a_model_without_blocks_is_an_error_and_plain_layers_are_none(model: nn.Module) -> None:
    with pytest.raises(
        AnatomyError, match=rf"^The blocks of {type(model).__name__} were .* no list of composed .*\. Pass blocks="
    ):
        read_anatomy(model)


def test_two_lists_of_blocks_are_an_error_that_lists_them() -> None:
    with pytest.raises(AnatomyError, match=r"'layers' \(3 x Block\); 'others' \(2 x Block\)\. Pass blocks='layers'"):
        read_anatomy(Plain(lists=2))


def test_blocks_settles_which_list_by_name_module_or_sequence() -> None:
    model = Plain(lists=2)
    by_name = read_anatomy(model, blocks="others")
    assert stacks(by_name) == [("decoder", "others", 2)]
    assert read_anatomy(model, blocks=model.others) == by_name
    assert read_anatomy(model, blocks=list(model.others)) == by_name
    assert read_anatomy(model, blocks=nn.ModuleList(model.others)) == by_name
    assert freeze(model, FreezePlan(decoder_blocks=1), blocks="others").resolved.blocks == {"decoder": 1}
    assert not model.others[0].mix.weight.requires_grad
    assert model.others[1].mix.weight.requires_grad


def test_blocks_as_a_dict_names_two_stacks() -> None:
    model = Plain(lists=2)
    anatomy = read_anatomy(model, blocks={"decoder": "others", "encoder": model.layers})
    assert stacks(anatomy) == [("encoder", "layers", 3), ("decoder", "others", 2)]


def test_blocks_given_for_a_model_that_needs_none_gives_the_same_anatomy() -> None:
    model = build("llama")
    assert read_anatomy(model, blocks="model.layers") == read_anatomy(model)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("layer", r"blocks='layer' was asked for; Plain has no module of that name\. The nearest: 'layers'"),
        ([], r"blocks= was given without a single block"),
        ([Block()], r"blocks= holds a Block that is not a module of Plain"),
        ({"middle": "layers"}, r"names the stack 'middle'; a stack is 'encoder' or 'decoder'"),
        ({}, r"blocks= was given without a single block"),
        (3, r"blocks=3 was given; it takes a name, a module, a sequence of modules or a dict"),
        (["layers.0"], r"blocks= holds a str that is not a module of Plain"),
    ],
)
def test_bad_blocks_are_errors(blocks: object, message: str) -> None:
    with pytest.raises(AnatomyError, match=message):
        read_anatomy(Plain(), blocks=blocks)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- changes nothing


def snapshot(model: nn.Module) -> object:
    return (
        {name: (t.dtype, t.clone()) for name, t in model.state_dict().items()},
        [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()],
        [(name, m.training, sorted(m.__dict__), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
        model.config.to_dict(),
    )


def same(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.mark.parametrize("model_type", ["gpt2", "bart", "t5", "deepseek_v3", "rwkv", "jamba", "git"])
def test_reading_changes_nothing(model_type: str) -> None:
    model = build(model_type)
    model.train()
    next(model.parameters()).requires_grad_(False)
    list(model.children())[-1].eval()
    before = copy.deepcopy(snapshot(model))
    state = torch.get_rng_state()
    read_anatomy(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(snapshot(model), before)


def test_a_meta_device_model_of_70_billion_parameters_is_read() -> None:
    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    anatomy = read_anatomy(model)
    assert len(anatomy.decoder_blocks) == 80
    assert anatomy.notes == ()


def test_a_half_precision_model_is_read_by_running_it_too() -> None:
    assert read_anatomy(build("llama").to(torch.bfloat16)).notes == ()
