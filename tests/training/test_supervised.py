"""Logits at the supervised positions are those of the whole head, and a class that cannot do so is left alone."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import AdaLoraConfig, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING

from hf_freeze import FreezePlan, freeze
from hf_freeze.training.supervised import (
    all_logits,
    can_keep_supervised_logits,
    supervised_logits_only,
    supervised_positions,
)
from hf_freeze.training.top_block import reduce_top_block
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


@pytest.fixture
def reduced() -> Any:
    """A model in train mode with logits at supervised positions only."""
    model = build("llama").train()
    assert supervised_logits_only(model).active
    return model


# --------------------------------------------------------------------------------------------- supervised_logits_only

# Among them: a bias in the head (gptj), logit softcapping (gemma2), router logits (mixtral).
MODELS = ["llama", "gpt2", "qwen2", "opt", "bloom", "gptj", "gemma2", "mixtral"]


def ragged(rows: int = 3, tokens: int = 9, share: float = 0.4) -> dict[str, torch.Tensor]:
    """Labels at random places, another number in each row; the last row has none."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (rows, tokens), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) >= share, -100)
    labels[-1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def predicted(labels: torch.Tensor) -> int:
    return int((labels[:, 1:] != -100).sum())


def loss_and_gradients(model: nn.Module, **batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)  # the same dropout each time
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_training(model: nn.Module, **batch: Any) -> None:
    """Loss and gradients are equal before and after the call, and the call took effect."""
    plain, expected = loss_and_gradients(model, **batch)
    assert supervised_logits_only(model).active
    reduced, gradients = loss_and_gradients(model, **batch)
    assert model(**batch).logits is None
    torch.testing.assert_close(reduced, plain, rtol=1e-6, atol=0)
    assert gradients.keys() == expected.keys()
    assert_same_gradients(gradients.values(), expected.values())


def assert_same_gradients(gradients: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> None:
    for gradient, plain in zip(gradients, expected, strict=True):
        assert (gradient - plain).norm() <= 1e-6 * plain.norm() + 1e-9


class HeadRows:
    """Counts the rows that the head gets."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: list[int] = []
        model.get_output_embeddings().register_forward_pre_hook(self.count)

    def count(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.rows.append(args[0].shape[:-1].numel())


@pytest.mark.parametrize("items", [None, torch.tensor(11), 11], ids=["mean", "items", "int"])
@pytest.mark.parametrize("model_type", MODELS)
def test_loss_and_gradients_are_those_of_all_logits(model_type: str, items: Any) -> None:
    batch: dict[str, Any] = ragged()
    if items is not None:
        batch["num_items_in_batch"] = items
    assert_same_training(build(model_type).train(), **batch)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_frozen_model_trains_alike(model_type: str) -> None:
    model = build(model_type).train()
    freeze(model, FreezePlan(decoder_blocks=3))  # GPT-2's head is its frozen embedding, held in eval
    assert_same_training(model, **ragged())


def test_under_autocast_as_accelerate_wraps_it_logits_are_none_and_the_loss_is_the_same() -> None:
    model = build("llama").train()
    assert supervised_logits_only(model).active
    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer of another test may have left one in fp32
    try:
        prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
        output = prepared(**ragged())
        assert output.logits is None
        all_logits(prepared)
        torch.testing.assert_close(output.loss, prepared(**ragged()).loss, rtol=1e-3, atol=0)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_the_router_loss_of_experts_is_kept() -> None:
    model = build("mixtral", output_router_logits=True, router_aux_loss_coef=0.5).train()
    assert_same_training(model, **ragged())
    assert model(**ragged()).aux_loss > 0


def test_the_head_gets_only_the_rows_that_predict_a_label(reduced: Any) -> None:
    head, batch = HeadRows(reduced), ragged()
    reduced(**batch)
    reduced(batch["input_ids"], batch["attention_mask"], None, None, None, batch["labels"])  # without their names
    assert head.rows == [predicted(batch["labels"])] * 2
    assert 0 < predicted(batch["labels"]) < batch["labels"].numel() / 2


def test_logits_are_none_in_training_and_all_there_in_evaluation(reduced: Any) -> None:
    batch = ragged()
    output = reduced(**batch, output_hidden_states=True)
    assert output.logits is None
    assert "logits" not in output
    assert len(output.hidden_states) == 5
    with pytest.raises(KeyError):
        output["logits"]
    output = reduced.eval()(**batch)
    assert output.logits.shape == (3, 9, 64)
    plain = build("llama").eval()
    assert torch.equal(output.loss, plain(**batch).loss)
    given = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(reduced.generate(batch["input_ids"], **given), plain.generate(batch["input_ids"], **given))


def test_a_tuple_has_none_in_the_place_of_the_logits() -> None:
    model = build("mixtral", output_router_logits=True).train()
    every = model(**ragged(), return_dict=False)
    assert supervised_logits_only(model).active
    output = model(**ragged(), return_dict=False)
    assert isinstance(output, tuple)
    assert len(output) == len(every)
    assert [place for place, value in enumerate(output) if value is None] == [2]  # after the loss and the router's
    assert every[2].shape == (3, 9, 64)
    torch.testing.assert_close(output[:2], every[:2])
    assert model.eval()(**ragged(), return_dict=False)[2].shape == (3, 9, 64)


def test_a_batch_without_any_label_takes_the_plain_path(reduced: Any) -> None:
    batch = ragged()
    for labels in (torch.full_like(batch["labels"], -100), batch["labels"][:, :1].expand(3, 1)):
        output = reduced(input_ids=batch["input_ids"][:, : labels.shape[1]], labels=labels, num_items_in_batch=5)
        assert output.loss == 0
        assert output.logits.shape == (*labels.shape, 64)


def test_what_the_caller_chose_is_left_to_the_caller(reduced: Any) -> None:
    batch = ragged()
    shifted = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    assert reduced(**batch, shift_labels=shifted).logits.shape == (3, 9, 64)
    assert reduced(**batch, logits_to_keep=0).logits.shape == (3, 9, 64)
    batch.pop("labels")
    assert reduced(**batch).logits.shape == (3, 9, 64)
    assert reduced(**batch, logits_to_keep=2).logits.shape == (3, 2, 64)


def test_all_logits_undoes_it_and_asking_twice_installs_once() -> None:
    model = build("gpt2").train()
    hooks = [model._forward_hooks, model._forward_pre_hooks, model.lm_head._forward_pre_hooks]
    outcome = supervised_logits_only(model)
    assert supervised_logits_only(nn.DataParallel(model)) is outcome
    assert [len(each) for each in hooks] == [1, 1, 1]
    assert all_logits(model)
    assert [len(each) for each in hooks] == [0, 0, 0]
    assert not any(name.startswith("_hf_freeze") for module in model.modules() for name in module.__dict__)
    assert model(**ragged()).logits.shape == (3, 9, 64)
    assert not all_logits(model)
    assert supervised_logits_only(model) == outcome


def test_the_outcome_is_one_printable_line() -> None:
    yes = supervised_logits_only(build("llama"))
    assert str(yes) == (
        "logits at supervised positions only: the loss of LlamaForCausalLM is the same; of the top block too: "
        "model.layers.3.self_attn.q_proj, model.layers.3.self_attn.o_proj, model.layers.3.mlp"
    )
    no = supervised_logits_only(build("bart"))
    assert str(no) == "logits at every position: an encoder-decoder has logits for the summary's tokens only"


# ------------------------------------------------------------------------------------------------------- left alone


def assert_left_alone(model: nn.Module, reason: str) -> None:
    outcome = supervised_logits_only(model)
    assert not outcome.active
    assert reason in outcome.reason
    assert "\n" not in str(outcome)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("t5", "an encoder-decoder"),
        ("bart-causal", "BartForCausalLM computes no loss from shift_labels"),
        ("xlnet", "XLNetLMHeadModel computes no loss from shift_labels"),
        ("whisper", "WhisperForCausalLM.forward takes no logits_to_keep"),
        ("git", "GitForCausalLM computes no loss from shift_labels"),  # on text alone
        (lambda: nn.Sequential(nn.Linear(2, 2)), "Sequential.forward takes no logits_to_keep"),
        (  # it lengthens the rows
            lambda: get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
            "does not take a mask as logits_to_keep",
        ),
    ],
)
def test_what_cannot_be_reduced_is_left_alone_with_the_reason(model_type: Any, reason: str) -> None:
    if callable(model_type):
        assert_left_alone(model_type(), reason)
    else:
        kind, _, causal = model_type.partition("-")
        assert_left_alone(build(kind, AutoModelForCausalLM if causal else None), reason)


def ignores_shift_labels(self: Any, logits: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def adds_a_term_over_all(self: Any, logits: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    loss = LOSS_MAPPING["ForCausalLM"](logits, labels, **kwargs)
    return loss + 1e-3 * logits.logsumexp(-1).square().mean()


def sums_wrongly(self: Any, logits: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    loss = LOSS_MAPPING["ForCausalLM"](logits, labels, **kwargs)
    return loss * logits.shape[0] if "num_items_in_batch" in kwargs else loss


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (ignores_shift_labels, "LlamaForCausalLM computes no loss from shift_labels ("),
        (adds_a_term_over_all, "LlamaForCausalLM's loss is "),
        (sums_wrongly, "with num_items_in_batch"),
    ],
)
def test_a_class_whose_loss_differs_is_left_alone_with_the_reason(loss: Any, reason: str) -> None:
    model = build("llama")
    model.loss_function = functools.partial(loss, model)
    assert_left_alone(model, reason)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_trial_tells_rounding_from_another_loss(dtype: torch.dtype) -> None:
    model = build("llama", initializer_range=0.3).to(dtype)
    model.loss_function = functools.partial(another_place, model)
    assert_left_alone(model, "LlamaForCausalLM's loss is ")
    del model._loss_function
    assert supervised_logits_only(model).active


def another_place(self: Any, logits: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    if "shift_labels" in kwargs:
        kwargs["shift_labels"] = kwargs["shift_labels"].roll(1)
    return LOSS_MAPPING["ForCausalLM"](logits, labels, **kwargs)


@pytest.mark.parametrize("ask", [can_keep_supervised_logits, reduce_top_block, supervised_logits_only])
def test_the_trial_leaves_modes_random_state_and_gradients_as_they_were(ask: Any) -> None:
    model = build("llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert ask(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_the_trial_leaves_a_model_that_rebuilds_itself_for_short_rows_as_it_was() -> None:
    model = build("big_bird", AutoModelForCausalLM)
    assert model.bert.attention_type == "block_sparse"
    modules = dict(model.named_modules())
    assert supervised_logits_only(model).active
    assert model.bert.attention_type == "block_sparse"
    assert dict(model.named_modules()) == modules
    assert all(module.training == model.training for module in model.modules())


# ------------------------------------------------------------------------------------------------ copies and wrappers


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]  # what this test has just pickled itself


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle])
def test_a_copy_is_supervised_alike_and_independent(through: Any, reduced: Any) -> None:
    other = through(reduced)
    assert supervised_logits_only(other) == supervised_logits_only(reduced)
    assert other(**ragged()).logits is None
    assert all_logits(other)
    assert other(**ragged()).logits.shape == (3, 9, 64)
    assert reduced(**ragged()).logits is None
    assert not other._forward_hooks
    assert not other.lm_head._forward_pre_hooks


def test_a_head_copied_alone_does_not_carry_its_model(reduced: Any) -> None:
    head = copy.deepcopy(reduced.lm_head)
    assert len(pickle.dumps(head)) < 2 * head.weight.numel() * 4
    with torch.no_grad():
        head(torch.zeros(1, 32))


def test_the_forward_of_the_model_is_its_own(reduced: Any) -> None:
    assert "forward" not in reduced.__dict__
    assert reduced.state_dict().keys() == build("llama").state_dict().keys()


def test_an_error_in_a_call_leaves_the_next_call_right(reduced: Any) -> None:
    with pytest.raises(IndexError):
        reduced(input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 9, dtype=torch.long))
    assert reduced(**ragged()).logits is None
    with warnings.catch_warnings(record=True) as seen:  # the head's hook would be silent inside of a call
        warnings.simplefilter("always")
        reduced.lm_head(torch.zeros(1, 32))
    assert len(seen) == 1


@pytest.mark.parametrize("wrap", [nn.DataParallel, functools.partial(torch.compile, backend="eager")])
def test_wrapped_models_are_reached_through_their_wrapper(wrap: Any) -> None:
    model = build("llama", num_hidden_layers=1).train()  # to compile takes its time
    plain, expected = loss_and_gradients(model, **ragged())
    wrapped = wrap(model)
    assert supervised_logits_only(wrapped).active
    head = HeadRows(model)
    loss, gradients = loss_and_gradients(wrapped, **ragged())
    assert wrapped(**ragged()).logits is None
    assert set(head.rows) == {predicted(ragged()["labels"])}
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    assert_same_gradients(gradients.values(), expected.values())
    assert wrapped.eval()(**ragged()).logits.shape == (3, 9, 64)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["attention", "head"])
def test_a_peft_model_trains_alike(targets: list[str]) -> None:
    model = get_peft_model(build("llama"), LoraConfig(target_modules=targets, task_type="CAUSAL_LM")).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    head = HeadRows(model)
    assert_same_training(model, **ragged())
    assert head.rows[-1] == predicted(ragged()["labels"])
    assert model.eval()(**ragged()).logits.shape == (3, 9, 64)


# PEFT 0.21's LoRA calls the wrapped model with its hooks, prompt tuning lengthens the labels before that call.
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
        LoraConfig(target_modules=["q_proj"]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=["lora", "no task", "prompt"],
)
def test_a_model_wrapped_by_peft_afterwards_trains_alike(config: Any, reduced: Any) -> None:
    wrapped = get_peft_model(reduced, config).train()
    loss, gradients = loss_and_gradients(wrapped, **ragged())
    assert wrapped(**ragged()).logits is None
    assert all_logits(wrapped)
    plain, expected = loss_and_gradients(wrapped, **ragged())
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-7)


def test_an_adapter_that_calls_past_the_hooks_says_so_and_the_peft_model_can_be_given(reduced: Any) -> None:
    config = AdaLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", total_step=10, modules_to_save=["lm_head"])
    wrapped = get_peft_model(reduced, config).train()
    with pytest.warns(UserWarning, match=r"Call supervised_logits_only on the model that the training loop calls"):
        assert wrapped(**ragged()).logits.shape == (3, 9, 64)
    with torch.no_grad():
        wrapped(**ragged())  # no warning: nobody trains
    assert supervised_logits_only(wrapped).active
    assert wrapped(**ragged()).logits is None
    assert all_logits(wrapped)
    assert wrapped(**ragged()).logits.shape == (3, 9, 64)


def test_a_peft_model_taken_apart_again_says_so() -> None:
    wrapped = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    supervised_logits_only(wrapped)
    merged = wrapped.merge_and_unload().train()
    with pytest.warns(UserWarning, match="outside of that model's own call"):
        merged(**ragged())
    assert all_logits(merged)
    merged(**ragged())


# ----------------------------------------------------------------------------------------------------------- Trainer


def rows_of_unlike_lengths() -> list[dict[str, list[int]]]:
    every = torch.randint(3, 60, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
    counts = (3, 1, 6, 2, 4, 1, 5, 2)
    return [{"input_ids": ids, "labels": [-100] * (12 - n) + ids[-n:]} for ids, n in zip(every, counts, strict=True)]


def train(model: nn.Module, folder: Path, *, accumulate: int) -> tuple[list[float], float, dict[str, torch.Tensor]]:
    """Training losses, validation loss and weights after an epoch of a stock Trainer."""
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=accumulate,
        num_train_epochs=1, logging_steps=1, report_to="none", save_strategy="no", learning_rate=1e-2,
        disable_tqdm=True, dataloader_pin_memory=False, optim="sgd",
    )  # fmt: skip
    rows = rows_of_unlike_lengths()
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.evaluate()["eval_loss"], {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_stock_trainer_trains_alike(model_type: str, accumulate: int, tmp_path: Path) -> None:
    model = build(model_type)
    assert supervised_logits_only(model).active
    head = HeadRows(model)
    losses, validation, weights = train(model, tmp_path, accumulate=accumulate)
    assert min(head.rows) < 12
    expected = train(build(model_type), tmp_path, accumulate=accumulate)
    assert len(losses) == 4 // accumulate
    assert losses == pytest.approx(expected[0], rel=1e-5)
    assert validation == pytest.approx(expected[1], rel=1e-5)
    torch.testing.assert_close(weights, expected[2], rtol=1e-4, atol=1e-6)


class OneTooFar(LlamaForCausalLM):
    """Takes a mask, and gives the logits of the next token's position."""

    def forward(self, *args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        if isinstance(logits_to_keep, torch.Tensor):
            logits_to_keep = logits_to_keep.roll(1, dims=1)
        return super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)


class LastOnly(LlamaForCausalLM):
    """Takes a mask for a wish to have the last token's logits."""

    def forward(self, *args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        last = 1 if isinstance(logits_to_keep, torch.Tensor) else 0
        return super().forward(*args, logits_to_keep=last, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [OneTooFar, LastOnly])
def test_small_logits_of_other_positions_are_told_from_those_of_the_mask(kind: Any, dtype: torch.dtype) -> None:
    model = kind(build("llama").config).to(dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-2)
    told = (False, f"{kind.__name__} gives other logits with a mask as logits_to_keep")
    assert can_keep_supervised_logits(model) == told
    assert supervised_logits_only(model).reason == told[1]
