"""What a lens says of a layer is what the formula says of it, and looking changes nothing."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BartConfig, BartModel, MambaConfig, MambaForCausalLM

from hf_freeze import FreezePlan, freeze
from hf_freeze.errors import FreezeError
from hf_freeze.lens import (
    ActivationMap,
    AttentionMap,
    BlockGradients,
    LayerSimilarity,
    LogitLens,
    WeightDrift,
    activation_map,
    attention_map,
    block_gradients,
    layer_similarity,
    logit_lens,
    text_batches,
    weight_drift,
)
from tests.lens.cases import KINDS, TEXTS, lora_model, moved, top_stack
from tests.tiny import VOCAB, tiny_model, tiny_tokenizer

ONE_BLOCK: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 1},
    "bart": {"encoder_layers": 1, "decoder_layers": 1},
}


# ---------------------------------------------------------------------------------------------------- logit lens


@pytest.mark.parametrize(
    ("kind", "norm"), [("gpt2", "transformer.ln_f"), ("llama", "model.norm"), ("bart", None), ("t5", None)]
)
def test_a_layer_says_what_norm_and_head_make_of_its_states_and_the_last_what_the_model_says(
    kind: str, norm: str | None
) -> None:
    model, tokenizer = tiny_model(kind).eval(), tiny_tokenizer(kind)
    lens = logit_lens(model, tokenizer, TEXTS[:1], progress=False)
    (batch,) = text_batches(model, tokenizer, TEXTS[:1])
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
        states = output.hidden_states[:4] if norm else ()
        layers = [model.lm_head(model.get_submodule(str(norm))(layer))[0] for layer in states] + [output.logits[0]]
    own = layers[-1].argmax(dim=-1)
    for layer, logits in enumerate(layers, start=5 - len(layers)):
        shares = logits.softmax(dim=-1)
        chances, first = shares.max(dim=-1)
        assert lens.choices[layer] == tuple(tokenizer.decode([number]) for number in first[-10:].tolist())
        assert lens.chances[layer] == pytest.approx(chances[-10:].tolist(), rel=1e-4)
        assert lens.probability[layer] == pytest.approx(shares.gather(1, own[:, None]).mean().item(), rel=1e-4)
        assert lens.agreement[layer] == pytest.approx((first == own).double().mean().item(), rel=1e-4)
    assert lens.chances[-2] != lens.chances[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_shares_rise_to_one_and_settled_is_never_above_agreement(kind: str) -> None:
    lens = logit_lens(tiny_model(kind), tiny_tokenizer(kind), TEXTS, progress=False)
    assert lens.agreement[-1] == lens.settled[-1] == 1.0
    assert list(lens.settled) == sorted(lens.settled)
    assert all(settled <= agree for settled, agree in zip(lens.settled, lens.agreement, strict=True))
    assert len(lens.choices) == len(lens.chances) == 5
    assert len(lens.example) == len(lens.choices[0]) == len(lens.chances[0]) <= 10
    assert "mean probability" in str(lens)


def test_a_choice_that_upper_blocks_do_not_touch_is_settled_below_them() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for block in model.model.layers[2:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    lens = logit_lens(model, tiny_tokenizer("llama"), TEXTS, progress=False)
    assert lens.settled[2:] == (1.0, 1.0, 1.0)
    assert lens.settled[1] < 1.0
    assert lens.choices[2] == lens.choices[4]


def test_the_example_is_the_end_of_the_first_text() -> None:
    tokenizer = tiny_tokenizer("llama")
    lens = logit_lens(tiny_model("llama"), tokenizer, TEXTS, example_tokens=3, progress=False)
    assert "".join(lens.example) == tokenizer.decode(tokenizer(TEXTS[0])["input_ids"][-3:])


def test_a_lens_needs_logits_that_follow_from_the_blocks() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("llama")
    with pytest.raises(FreezeError, match=r"LlamaModel was asked for; it needs a head .* the model gives none"):
        logit_lens(model.model, tokenizer, TEXTS, progress=False)
    with pytest.raises(FreezeError, match="example_tokens=0; use 1 or more"):
        logit_lens(model, tokenizer, TEXTS, example_tokens=0, progress=False)
    calls: list[int] = []

    def wander(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return output + len(calls)

    model.lm_head.register_forward_hook(wander)
    with pytest.raises(FreezeError, match=r"its logits do not follow from what its blocks\s+hand on"):
        logit_lens(model, tokenizer, TEXTS, progress=False)
    assert not any("forward" in module.__dict__ for module in model.modules())


# ------------------------------------------------------------------------------------- attention and activations


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_what_transformers_returns(kind: str) -> None:
    model, tokenizer = tiny_model(kind).eval(), tiny_tokenizer(kind)
    assert model.config._attn_implementation == "sdpa" or kind == "t5"
    two = kind in ("bart", "t5")
    target = TEXTS[1] if two else None
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    (batch,) = text_batches(model, tokenizer, [TEXTS[0]], target and [target], max_tokens=20)
    with torch.no_grad():
        output = reference(**batch, output_attentions=True)
    looks = [("decoder", False, "decoder_attentions" if two else "attentions")]
    looks += [("encoder", False, "encoder_attentions"), ("decoder", True, "cross_attentions")] if two else []
    for stack, cross, key in looks:
        for block in (0, -1):
            attention = attention_map(
                model, tokenizer, TEXTS[0], block, stack=stack, cross=cross, target=target, max_tokens=20
            )
            assert attention.block == block % 4
            assert attention.kind == ("cross" if cross else "self")
            expected = output[key][block][0]
            torch.testing.assert_close(torch.tensor(attention.weights), expected, rtol=1e-4, atol=1e-5)
            assert expected.shape[1:] == (len(attention.queries), len(attention.keys))


def test_cross_attention_is_told_from_self_attention_where_both_are_square() -> None:
    model, tokenizer = tiny_model("bart"), tiny_tokenizer("bart")
    own, cross = (attention_map(model, tokenizer, TEXTS[1], 1, cross=cross).weights for cross in (False, True))
    assert own[0][0][1] == 0.0  # the first token sees no later one
    assert cross[0][0][1] > 0.0


def test_a_block_or_stack_that_is_not_there_is_answered_with_those_that_are() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("llama")
    for block in (4, -5):
        with pytest.raises(FreezeError, match=rf"decoder block {block} .* has the blocks 0 to 3"):
            attention_map(model, tokenizer, TEXTS[0], block)
    with pytest.raises(FreezeError, match=r"stack 'encoder' was asked for; LlamaForCausalLM has 'decoder'"):
        attention_map(model, tokenizer, TEXTS[0], 0, stack="encoder")
    with pytest.raises(FreezeError, match="only the decoder of an encoder-decoder has it"):
        attention_map(model, tokenizer, TEXTS[0], 0, cross=True)
    with pytest.raises(FreezeError, match="Cross-attention in the encoder of BartForConditionalGeneration"):
        attention_map(tiny_model("bart"), tiny_tokenizer("bart"), TEXTS[0], 0, stack="encoder", cross=True)


def test_a_model_without_attention_is_declined() -> None:
    sizes = {"hidden_size": 8, "state_size": 4, "num_hidden_layers": 2, "intermediate_size": 16, "time_step_rank": 2}
    model = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    with pytest.raises(FreezeError, match=r"MambaForCausalLM gives\s+no weights there .* see activation_map"):
        attention_map(model, tiny_tokenizer("llama"), TEXTS[0], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_the_root_mean_square_of_the_states(kind: str) -> None:
    model, tokenizer = tiny_model(kind).eval(), tiny_tokenizer(kind)
    activations = activation_map(model, tokenizer, TEXTS[1])
    (batch,) = text_batches(model, tokenizer, [TEXTS[1]])
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    for stack, rows in activations.rms.items():
        states = output[f"{stack}_hidden_states" if len(activations.rms) == 2 else "hidden_states"]
        for layer in range(4):  # the last of transformers' is behind the final norm
            expected = states[layer][0].square().mean(-1).sqrt()
            torch.testing.assert_close(torch.tensor(rows[layer]), expected, rtol=1e-4, atol=1e-6)
        assert len(rows) == 5
        assert len(activations.tokens[stack]) == len(rows[0])


# ---------------------------------------------------------------------------------------- nothing is left behind


def everything_of(model: nn.Module) -> dict[str, Any]:
    """All that looking could change."""
    modules = list(model.modules())
    configs = [module.config for module in modules if hasattr(module, "config")]
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "required": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in modules],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules],
        "forwards": [module.__dict__.get("forward") for module in modules],
        "attention": [getattr(config, "_attn_implementation", None) for config in configs],
        "cache": [getattr(config, "use_cache", None) for config in configs],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1],
        "python": random.getstate(),
    }


def same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, torch.Tensor | np.ndarray):
        return bool((first == second).all())
    return bool(first == second)


def every_look(model: nn.Module, tokenizer: Any, other: nn.Module) -> dict[str, Callable[[], Any]]:
    return {
        "similarity": lambda: layer_similarity(model, tokenizer, TEXTS, progress=False),
        "compared": lambda: layer_similarity(model, tokenizer, TEXTS, other, progress=False),
        "drift": lambda: weight_drift(model, other),
        "gradients": lambda: block_gradients(model, text_batches(model, tokenizer, TEXTS), progress=False),
        "logit_lens": lambda: logit_lens(model, tokenizer, TEXTS, progress=False),
        "attention": lambda: attention_map(model, tokenizer, TEXTS[0], 0),
        "activations": lambda: activation_map(model, tokenizer, TEXTS[0]),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_looking_leaves_a_model_in_training_as_it_was(kind: str) -> None:
    given = {"resid_pdrop": 0.1} if kind == "gpt2" else {"dropout": 0.1} if kind == "bart" else {}
    model, tokenizer = tiny_model(kind, **given), tiny_tokenizer(kind)
    other = copy.deepcopy(model)
    freeze(model, FreezePlan())
    model.train()
    model(**text_batches(model, tokenizer, TEXTS)[0]).loss.backward()
    before = everything_of(model)
    for name, look in every_look(model, tokenizer, other).items():
        look()
        after = everything_of(model)
        for what in before:
            assert same(before[what], after[what]), f"{name} changed {what}"


def test_an_error_in_the_middle_leaves_the_model_as_it_was_too() -> None:
    model, tokenizer = tiny_model("llama").train(), tiny_tokenizer("llama")
    model.requires_grad_(False)
    handle = model.lm_head.register_forward_hook(lambda module, args, output: output * torch.nan)
    before = everything_of(model)
    for name, message in (("gradients", "loss is nan"), ("logit_lens", "its logits are not numbers")):
        with pytest.raises(FreezeError, match=message):
            every_look(model, tokenizer, model)[name]()
        after = everything_of(model)
        assert all(same(before[what], after[what]) for what in before), name
    handle.remove()


def test_an_error_between_two_layers_of_the_lens_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    model, tokenizer = tiny_model("llama").train(), tiny_tokenizer("llama")
    before = everything_of(model)
    monkeypatch.setattr(torch.Tensor, "logsumexp", fail)
    with pytest.raises(MemoryError, match="no room"):
        logit_lens(model, tokenizer, TEXTS, progress=False)
    after = everything_of(model)
    assert all(same(before[what], after[what]) for what in before)


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_numbers_go_to_json_and_back(kind: str) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer(kind)
    for look in every_look(model, tokenizer, moved(model, top_stack(model))).values():
        numbers = look()
        again = type(numbers).from_dict(json.loads(json.dumps(numbers.to_dict(), allow_nan=False)))
        assert again == numbers


@pytest.mark.parametrize("kind", [ActivationMap, AttentionMap, BlockGradients, LayerSimilarity, LogitLens, WeightDrift])
def test_json_of_something_else_is_refused(kind: Any) -> None:
    with pytest.raises(FreezeError, match=f"{kind.__name__} was to be made from colour; it has the keys"):
        kind.from_dict({"colour": 1})
    with pytest.raises(FreezeError, match="from a list"):
        kind.from_dict([1])


@pytest.mark.parametrize("kind", ONE_BLOCK)
def test_a_model_with_one_block_is_looked_at_like_any_other(kind: str) -> None:
    model, tokenizer = tiny_model(kind, **ONE_BLOCK[kind]), tiny_tokenizer(kind)
    results = {name: look() for name, look in every_look(model, tokenizer, moved(model, top_stack(model))).items()}
    assert len(results["similarity"].cka["decoder"]) == 2
    assert results["logit_lens"].settled[-1] == 1.0
    assert "decoder.0" in results["drift"].parts


def test_a_lora_model_is_looked_at_through_its_adapters() -> None:
    model, tokenizer = lora_model(), tiny_tokenizer("llama")
    base = tiny_model("llama")
    compared = layer_similarity(model, tokenizer, TEXTS, base, progress=False)
    same_layer = [row[layer] for layer, row in enumerate(compared.cka["decoder"])]
    assert same_layer[0] == 1.0
    assert max(same_layer[1:]) < 1.0
    merged = copy.deepcopy(model).merge_and_unload()
    lens, expected = (logit_lens(each, tokenizer, TEXTS, progress=False) for each in (model, merged))
    assert lens.probability == pytest.approx(expected.probability, rel=1e-3)
    gradients = block_gradients(model, text_batches(model, tokenizer, TEXTS), progress=False)
    assert gradients.parts[1:5] == ("decoder.0", "decoder.1", "decoder.2", "decoder.3")


def test_states_in_bf16_can_be_looked_at() -> None:
    model, tokenizer = tiny_model("llama").to(torch.bfloat16), tiny_tokenizer("llama")
    for look in every_look(model, tokenizer, tiny_model("llama")).values():
        look()


# --------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_masked_and_has_no_label(kind: str) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer(kind)
    (batch,) = text_batches(model, tokenizer, TEXTS)
    lengths = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["labels"] != -100).sum(1).tolist() == lengths
    assert ("decoder_input_ids" in batch) == (kind in ("bart", "t5"))


def test_no_batch_has_as_many_texts_as_tokens() -> None:
    tokenizer = tiny_tokenizer("llama")
    text = tokenizer.decode(tokenizer(TEXTS[0])["input_ids"][:3])
    batches = text_batches(tiny_model("llama"), tokenizer, [text] * 6, batch_size=3)
    assert [list(batch["input_ids"].shape) for batch in batches] == [[2, 3]] * 3


def test_texts_are_cut_to_what_the_model_can_read() -> None:
    (batch,) = text_batches(tiny_model("gpt2", n_positions=9), tiny_tokenizer("gpt2"), TEXTS, max_tokens=1000)
    assert batch["input_ids"].shape[1] == 9


def test_a_model_that_takes_no_mask_gets_texts_one_by_one() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(VOCAB, 8)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            states = self.words(input_ids)
            for block in self.blocks:
                states = states + block(states)
            return states @ self.words.weight.T

    model, tokenizer = Plain(), tiny_tokenizer("llama")
    assert [len(batch["input_ids"]) for batch in text_batches(model, tokenizer, TEXTS)] == [1, 1, 1]
    assert len(layer_similarity(model, tokenizer, TEXTS, progress=False).cka["decoder"]) == 4


@pytest.mark.parametrize(
    ("kind", "texts", "given", "message"),
    [
        ("llama", [], {}, "No texts were given"),
        ("llama", ["Good.", ""], {}, r"Text 1 \(''\) has no token"),
        ("bart", [""], {}, r"Text 0 \(''\) has no token"),
        ("llama", [7], {}, "Text 0 is a int; give strings"),
        ("llama", TEXTS, {"targets": TEXTS}, "targets= were given for LlamaForCausalLM"),
        ("bart", TEXTS, {"targets": TEXTS[:2]}, "2 targets were given for 3 texts"),
        ("llama", TEXTS, {"batch_size": 0}, "batch_size=0; it is a whole number, 1 or more"),
        ("llama", TEXTS, {"max_tokens": 0}, "max_tokens=0; it is a whole number, 1 or more"),
        ("bart", TEXTS, {"max_tokens": 2}, "adds 2 special tokens to each, so nothing .* Use 3 or more"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(kind: str, texts: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(FreezeError, match=message):
        text_batches(tiny_model(kind), tiny_tokenizer(kind), texts, **given)


def test_ids_that_the_model_does_not_know_are_refused() -> None:
    with pytest.raises(FreezeError, match=r"token id \d+; GPT2LMHeadModel knows 30 ids"):
        text_batches(tiny_model("gpt2", vocab_size=30), tiny_tokenizer("gpt2"), TEXTS)


def test_an_encoder_decoder_without_a_head_has_similarity_and_no_lens() -> None:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 2, "decoder_layers": 2}
    model = BartModel(BartConfig(vocab_size=VOCAB, **sizes, **ids))
    assert set(layer_similarity(model, tiny_tokenizer("bart"), TEXTS, progress=False).cka) == {"encoder", "decoder"}
    with pytest.raises(FreezeError, match="BartModel was asked for; it needs a head"):
        logit_lens(model, tiny_tokenizer("bart"), TEXTS, progress=False)


def test_a_model_that_wants_more_than_text_is_refused_in_its_own_words() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("llama")

    def want_an_image(module: nn.Module, args: Any) -> None:
        raise ValueError("pixel_values are missing.")

    model.model.norm.register_forward_pre_hook(want_an_image)
    with pytest.raises(FreezeError, match=r"LlamaForCausalLM .* refused: ValueError: pixel_values are missing\."):
        activation_map(model, tokenizer, TEXTS[0])


def test_a_model_that_adds_tokens_of_its_own_is_refused() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("llama")

    def one_more(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[:, :1], output], dim=1) if output.dim() == 3 else output

    model.model.layers[3].register_forward_hook(one_more)
    with pytest.raises(FreezeError, match=r"states of decoder block 3 .* has none there of 1\s+texts x"):
        activation_map(model, tokenizer, TEXTS[0])
