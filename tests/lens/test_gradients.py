"""The pull at each block is the gradient of a backward pass, frozen or not; what has none is named."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_freeze import FreezePlan, freeze
from hf_freeze.errors import FreezeError
from hf_freeze.lens import BlockGradients, block_gradients, text_batches
from hf_freeze.prefix.rows import PREFIX_KEY
from tests.lens.cases import KINDS, TEXTS, top_stack
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_a_backward_pass_averaged_over_batches(kind: str) -> None:
    model, tokenizer = tiny_model(kind).eval(), tiny_tokenizer(kind)
    batches = text_batches(model, tokenizer, TEXTS, batch_size=1)
    gradients = block_gradients(model, batches, progress=False)
    path = f"{top_stack(model)}.2"
    norms, losses = [], []
    for batch in batches:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        grads = [weight.grad for weight in model.get_submodule(path).parameters()]
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in grads if g is not None)))
    place = gradients.parts.index("decoder.2")
    size = math.sqrt(sum(float(w.detach().double().square().sum()) for w in model.get_submodule(path).parameters()))
    assert gradients.batches == 3
    assert gradients.loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert gradients.norms[place] == pytest.approx(sum(norms) / 3, rel=1e-4)
    assert gradients.weight_norms[place] == pytest.approx(size, rel=1e-5)
    assert gradients.relative[place] == pytest.approx(sum(norms) / 3 / size, rel=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_frozen_blocks_have_the_gradient_that_they_would_have(kind: str) -> None:
    model = tiny_model(kind)
    batches = text_batches(model, tiny_tokenizer(kind), TEXTS)
    plain = block_gradients(model, batches, progress=False)
    freeze(model, FreezePlan())
    frozen = block_gradients(model, batches, progress=False)
    assert frozen.parts == plain.parts
    assert frozen.norms == pytest.approx(plain.norms, rel=1e-4)


def test_gradients_of_a_cached_batch_run_the_whole_model() -> None:
    model = tiny_model("llama")
    (batch,) = text_batches(model, tiny_tokenizer("llama"), TEXTS)
    plain = block_gradients(model, [batch], progress=False)
    assert block_gradients(model, [batch | {PREFIX_KEY: "states"}], progress=False) == plain


def test_dropout_plays_no_part_in_gradients() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5).train()
    batches = text_batches(model, tiny_tokenizer("gpt2"), TEXTS)
    assert block_gradients(model, batches, progress=False) == block_gradients(model, batches, progress=False)


def test_a_part_without_weights_that_matter_is_relative_to_nothing() -> None:
    gradients = BlockGradients(("decoder.0", "decoder.1", "head"), (0.5, 0.0, 1.0), (2.0, 0.0, 0.0), 1.0, 1)
    assert gradients.relative == (0.25, 0.0, math.inf)


def test_gradients_refuse_batches_without_a_loss() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("llama")
    (batch,) = text_batches(model, tokenizer, TEXTS)
    with pytest.raises(FreezeError, match="over no batch were asked for"):
        block_gradients(model, [], progress=False)
    with pytest.raises(FreezeError, match=r"a batch has input_ids, attention_mask and no labels"):
        block_gradients(model, [{k: v for k, v in batch.items() if k != "labels"}], progress=False)
    with pytest.raises(FreezeError, match=r"LlamaModel computes none from labels"):
        block_gradients(model.model, [batch], progress=False)
    nothing = batch | {"labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(FreezeError, match=r"a batch's loss is nan. A batch needs one label"):
        block_gradients(model, [nothing], progress=False)
    assert all(weight.requires_grad for weight in model.parameters())


class Burst(torch.autograd.Function):
    """Passes states on, and infinities back."""

    @staticmethod
    def forward(context: Any, states: torch.Tensor) -> torch.Tensor:
        return states.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.inf


@pytest.mark.parametrize(
    ("block", "change", "message"),
    [
        (1, torch.Tensor.detach, r"gradient of decoder block 0 .* does not depend on\s+it"),
        (0, Burst.apply, r"it is not finite, though the loss is"),
    ],
)
def test_a_gradient_that_is_missing_or_not_finite_is_named(block: int, change: Any, message: str) -> None:
    model = tiny_model("llama")
    batches = text_batches(model, tiny_tokenizer("llama"), TEXTS)
    model.model.layers[block].register_forward_hook(lambda module, args, output: change(output))
    with pytest.raises(FreezeError, match=message):
        block_gradients(model, batches, progress=False)


def test_a_text_of_one_token_has_no_next_one_to_predict() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("llama")
    with pytest.raises(FreezeError, match=r"loss is nan. A batch needs one label"):
        block_gradients(model, text_batches(model, tokenizer, ["a"]), progress=False)
