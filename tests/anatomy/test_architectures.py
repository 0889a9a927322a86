"""The sweep: every architecture of the two Auto classes is held, declined with a reason, or not built by transformers.

The claims themselves are in sweep.py, the models in zoo.py. One model at a time is in memory.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AlbertConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    CLIPVisionConfig,
    Dinov2Config,
    ViTConfig,
    ViTForImageClassification,
)

from hf_freeze import FreezePlan, freeze, read_anatomy, verify_frozen
from hf_freeze.errors import AnatomyError, FreezeError, PlanError
from tests.depth.sweep import check_freeze, training_batch
from tests.zoo import BLOCKS, NOT_BUILT, architectures, build, name_of, shrink

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

# What is refused rather than frozen wrongly: the error, a piece of its text, and why.
DECLINED: dict[str, tuple[type[FreezeError], str, str]] = {
    "blt": (AnatomyError, "several lists could be its decoder", "bytes, patches and bytes again: six lists of blocks"),
    "hrm_text": (
        AnatomyError,
        "several lists could be its decoder",
        "two lists of blocks that call each other in turn",
    ),
    "reformer": (PlanError, "backward pass of its own", "reversible blocks train only above a trainable input"),
}

EVERY = [row for row in architectures() if row[0] not in NOT_BUILT]
HELD = [row for row in EVERY if row[0] not in DECLINED]


@pytest.mark.parametrize("architecture", HELD, ids=name_of)
def test_the_lower_half_stays_and_the_upper_half_trains(architecture: tuple[str, type]) -> None:
    check_freeze(build(*architecture))


@pytest.mark.parametrize("name", DECLINED)
def test_what_cannot_be_frozen_right_is_declined_with_the_reason(name: str) -> None:
    error, text, _ = DECLINED[name]
    model = build(name)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error, match=text):
        freeze(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == before


@pytest.mark.parametrize("name", NOT_BUILT)
def test_what_is_listed_as_not_built_is_still_not_built_and_run_by_transformers(name: str) -> None:
    def build_and_run() -> None:
        model = build(name)
        model(**training_batch(model))

    error, _ = NOT_BUILT[name]
    with pytest.raises(error):
        build_and_run()


def test_at_least_97_percent_of_the_architectures_that_build_are_held() -> None:
    types = {name for name, _ in EVERY}
    assert {*NOT_BUILT, *DECLINED} <= {name for name, _ in architectures()}
    assert len(types) >= 205
    assert len({name for name, _ in HELD}) / len(types) >= 0.97


def test_the_way_out_that_the_error_names_trains_reversible_blocks() -> None:
    model = build("reformer")
    freeze(model, FreezePlan(embeddings=False, frozen_mode="train"))
    model.train()(**training_batch(model)).loss.backward()
    for block in read_anatomy(model).decoder_blocks[BLOCKS // 2 :]:
        assert any(p.grad is not None and p.grad.any() for p in block.modules[0].parameters())


# ------------------------------------------------------------------------------------ other heads, and none at all


def states_loss(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 35).reshape(2, 16)
    states: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return (states * torch.randn(states.shape, generator=torch.Generator().manual_seed(0))).mean()


def class_loss(model: nn.Module) -> torch.Tensor:
    labels = torch.tensor([0, 1])
    if "pixel_values" in model.main_input_name:
        side = model.config.image_size
        pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        loss: torch.Tensor = model(pixel_values=pixels, labels=labels).loss
    else:
        ids = torch.arange(3, 35).reshape(2, 16)
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    return loss


@pytest.mark.parametrize(
    "model_type", ["bert", "roberta", "distilbert", "electra", "deberta-v2", "modernbert", "gpt2", "llama"]
)
def test_models_without_a_head_are_frozen_alike(model_type: str) -> None:
    torch.manual_seed(0)
    check_freeze(AutoModel.from_config(shrink(CONFIG_MAPPING[model_type])), states_loss)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "llama"])
def test_classifiers_are_frozen_alike_and_their_head_trains(model_type: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(shrink(CONFIG_MAPPING[model_type], pad_token_id=0))
    anatomy = read_anatomy(model)
    assert anatomy.stacks[0].name == ("decoder" if model_type == "llama" else "encoder")
    assert {name.split(".")[0] for name in anatomy.head} <= {"classifier", "pre_classifier", "score"}
    assert anatomy.head
    check_freeze(model, class_loss)


def test_an_image_classifier_is_frozen_alike() -> None:
    torch.manual_seed(0)
    model = ViTForImageClassification(shrink(ViTConfig, image_size=32, patch_size=8))
    anatomy = read_anatomy(model)
    assert [(stack.name, stack.path, len(stack)) for stack in anatomy.stacks] == [("encoder", "vit.layers", BLOCKS)]
    assert set(anatomy.head) == {"classifier.weight", "classifier.bias"}
    check_freeze(model, class_loss)


@pytest.mark.parametrize("config_class", [CLIPVisionConfig, Dinov2Config])
def test_image_encoders_have_all_of_their_embeddings_below_the_blocks(config_class: type) -> None:
    model = AutoModel.from_config(shrink(config_class, image_size=32, patch_size=8))
    before = {name for name, _ in model.named_parameters() if name.startswith(("embeddings", "pre_layrnorm"))}
    assert set(read_anatomy(model).embeddings) == before


def test_albert_whose_blocks_are_one_shared_block_is_frozen_whole_or_not_at_all() -> None:
    model = AutoModel.from_config(shrink(AlbertConfig))
    assert len(read_anatomy(model).encoder_blocks) == 1
    report = freeze(model, FreezePlan())  # half of one block is none
    assert report.resolved.blocks == {"encoder": 0}
    assert report.lowest_trainable == ("encoder", 0)
    with pytest.raises(PlanError, match="asks for 2 encoder blocks; AlbertModel has 1"):
        freeze(model, FreezePlan(encoder_blocks=2))
    assert freeze(model, FreezePlan(encoder_blocks=1)).lowest_trainable == ("final", 0)
    assert verify_frozen(model).tensors == len(list(model.parameters())) - 2  # all but the pooler
