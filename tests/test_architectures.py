"""The sweep: every architecture of the two Auto classes is held, declined with a reason, or not built by transformers.

The claims themselves are in sweep.py, the models in zoo.py. One model at a time is in memory.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertConfig,
    RobertaConfig,
    ViTConfig,
    ViTForImageClassification,
)

from hf_freeze import FreezePlan, freeze, read_anatomy, verify_frozen
from hf_freeze.errors import AnatomyError, FreezeError, PlanError
from tests.sweep import check_freeze, training_batch
from tests.zoo import BLOCKS, NOT_BUILT, VOCAB, architectures, build, name_of, shrink

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

# What is refused rather than frozen wrongly: the error, a piece of its text, and why.
DECLINED: dict[str, tuple[type[FreezeError], str, str]] = {
    "blt": (AnatomyError, "several lists could be its decoder", "bytes, patches and bytes again: six lists of blocks"),
    "hrm_text": (AnatomyError, "several lists could be its decoder", "two lists of blocks that call each other in turn"),
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
    with pytest.raises(error, match=text):
        freeze(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", NOT_BUILT)
def test_what_is_listed_as_not_built_is_still_not_built_by_transformers(name: str) -> None:
    error, _ = NOT_BUILT[name]
    with pytest.raises(error):
        build(name)


def test_at_least_97_percent_of_the_architectures_that_build_are_held() -> None:
    types = {name for name, _ in EVERY}
    assert {*NOT_BUILT, *DECLINED} <= {name for name, _ in architectures()}
    assert len(types) >= 205
    assert len({name for name, _ in HELD}) / len(types) >= 0.97


def test_the_way_out_that_the_error_names_trains_reversible_blocks() -> None:
    model = build("reformer")
    freeze(model, FreezePlan(embeddings=False, frozen_mode="train"))
    model.train()(**training_batch(model)).loss.backward()
    for block in read_anatomy(model).blocks_of("decoder")[BLOCKS // 2 :]:
        assert any(p.grad is not None and p.grad.any() for p in block.modules[0].parameters())
