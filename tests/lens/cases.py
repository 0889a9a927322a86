"""Models, texts and changes that the tests of the lens share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_freeze import read_anatomy
from tests.tiny import tiny_model

KINDS = ["gpt2", "llama", "bart", "t5"]
TEXTS = [
    "The kettle boils fast and looks good on the counter, but the lid broke after two weeks.",
    "Runs small, so order one size up.",
    "Sound is clear for the price. Battery lasts 6 hours, not 10 as promised; returned it.",
]


def moved(model: nn.Module, name: str, by: float = 0.3) -> nn.Module:
    """A copy with noise on the weights below a name."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in other.get_submodule(name).parameters():
            weight += by * torch.randn(weight.shape, generator=generator)
    return other


def top_stack(model: nn.Module) -> str:
    """The name of the list with the decoder's blocks."""
    return read_anatomy(model).stacks[-1].path


def lora_model(kind: str = "llama", **given: Any) -> Any:
    """A PeftModel whose adapters do something."""
    targets = ["q_proj", "v_proj"] if kind != "gpt2" else ["c_attn"]
    model = get_peft_model(tiny_model(kind), LoraConfig(r=2, target_modules=targets, **given))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return model
