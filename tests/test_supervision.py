"""Logits at the supervised positions are those of the whole head, and a class that cannot do so is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_freeze.supervision import can_keep_supervised_logits, supervised_positions
from tests.tiny import tiny_model
from tests.zoo import build


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_masked_logits_and_gradients_equal_those_of_the_whole_head(kind: str) -> None:
    model = tiny_model(kind)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 900, (3, 9), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.6, -100)
    places = supervised_positions(labels)
    targets = labels[:, 1:][labels[:, 1:] != -100]

    def gradients(logits: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        nn.functional.cross_entropy(logits, targets).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole = model(input_ids=ids).logits[places]
    masked = model(input_ids=ids, logits_to_keep=places).logits
    torch.testing.assert_close(masked, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(masked), gradients(whole), rtol=1e-5, atol=1e-7)


def test_an_encoder_decoder_is_left_alone_with_the_reason() -> None:
    assert can_keep_supervised_logits(tiny_model("bart")) == (
        False,
        "an encoder-decoder has logits for the summary's tokens only",
    )


def test_a_class_that_reads_the_mask_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    original = type(model).forward

    def forward(self: nn.Module, *args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        output.logits = output.logits[:, -1:] if isinstance(logits_to_keep, torch.Tensor) else output.logits
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    able, why = can_keep_supervised_logits(model)
    assert not able
    assert "other logits" in why


def test_asking_changes_no_mode_and_leaves_no_gradient() -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    assert can_keep_supervised_logits(model)[0]
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
