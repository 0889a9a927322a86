"""Adapters stand above the cut only: the prefix needs no graph, can be cached, and what is saved is PEFT's own."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from hf_freeze import FreezePlan, PrefixCache, freeze, read_anatomy, verify_frozen
from hf_freeze.errors import FreezeError, PlanError
from hf_freeze.summarization import SummaryTrainer, SummaryTrainingArguments
from hf_freeze.training.adapters import adapt_upper
from tests.prefix.cases import collator_for, default_plan, frozen_model, review_rows, trainer_losses
from tests.tiny import tiny_model

PART = FreezePlan(encoder_blocks=2, decoder_blocks=2)
CASES = [  # the last has so many full names that PEFT shortens the list
    *((kind, default_plan(kind)) for kind in ("llama", "gpt2", "bart", "t5")),
    ("bart", PART),
    ("t5", PART),
    ("bart", FreezePlan(encoder_blocks="all", decoder_blocks=1)),
]
IDS = ["llama", "gpt2", "bart", "t5", "bart-part", "t5-part", "bart-many"]


def adapted(family: str, plan: FreezePlan | None = None, *, dropout: bool = True, **given: Any) -> PeftModel:
    model = frozen_model(family, dropout=dropout, plan=plan)
    torch.manual_seed(3)
    return adapt_upper(model, **{"r": 2, "alpha": 4, **given})


def adapters_of(model: nn.Module) -> set[str]:
    """Names of the modules with adapters, as the base model calls them."""
    found = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    return {name.removeprefix("base_model.model.") for name in found}


def saved_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


# ------------------------------------------------------------------------------------------------- where they stand


@pytest.mark.parametrize(("kind", "plan"), CASES, ids=IDS)
def test_every_matrix_above_the_cut_and_none_below_it_gets_an_adapter(kind: str, plan: FreezePlan) -> None:
    base = tiny_model(kind)
    anatomy = read_anatomy(base)
    frozen = plan.resolve(anatomy).blocks
    wanted = {
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and (part := anatomy.parts[f"{name}.weight"]).kind == "block"
        and part.index >= frozen[part.stack]
    }
    model = adapted(kind, plan)
    assert adapters_of(model) == wanted
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(wanted)
    assert all("lora_" in name for name in trained)


def test_indices_say_which_blocks_where_they_can_and_full_names_where_they_cannot(tmp_path: Path) -> None:
    for kind, plan, indices, pattern in (
        ("llama", default_plan("llama"), [3], ["layers"]),
        ("gpt2", FreezePlan(decoder_blocks=2), [2, 3], ["h"]),
        ("t5", PART, [2, 3], ["block"]),
    ):
        adapted(kind, plan).save_pretrained(str(tmp_path / kind))
        config = saved_config(tmp_path / kind)
        assert (config["layers_to_transform"], config["layers_pattern"]) == (indices, pattern)
        assert not any("." in name for name in config["target_modules"])
    adapted("bart").save_pretrained(str(tmp_path / "bart"))
    config = saved_config(tmp_path / "bart")
    assert config["layers_to_transform"] is None
    assert "model.decoder.layers.3.encoder_attn.q_proj" in config["target_modules"]


def test_a_matrix_that_the_plan_freezes_by_a_pattern_gets_no_adapter() -> None:
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    model = adapted("llama", FreezePlan(decoder_blocks=2, freeze=(r"layers\.3\.mlp",)))
    mlp = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    wanted = {f"model.layers.{block}.{name}" for block in (2, 3) for name in attention}
    assert adapters_of(model) == wanted | {f"model.layers.2.{name}" for name in mlp}
    assert model.peft_config["default"].layers_to_transform is None


def test_only_the_matrices_that_were_asked_for_get_an_adapter() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's, where the config says the wrong thing of Conv1D
        model = adapted("gpt2", FreezePlan(decoder_blocks=2), target_modules=("c_attn",))
    assert adapters_of(model) == {"transformer.h.2.attn.c_attn", "transformer.h.3.attn.c_attn"}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(("kind", "plan"), CASES[:5], ids=IDS[:5])
def test_nothing_below_the_cut_gets_a_graph_with_checkpointing_too(kind: str, plan: FreezePlan, order: str) -> None:
    base = frozen_model(kind, plan=plan)
    stack = read_anatomy(base).stacks[0 if plan is PART else -1]
    blocks = [block.modules[0] for block in stack.blocks]
    if order == "before":
        base.activation_checkpointing_enable()  # PEFT then asks the embeddings' output for a gradient
    model = adapt_upper(base, r=2).train()
    if order == "after":
        model.activation_checkpointing_enable()
    given, handed_on = [], []

    def note(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        given.append(any(tensor.requires_grad for tensor in tensors))
        handed_on.append((output if isinstance(output, torch.Tensor) else output[0]).requires_grad)

    for block in blocks:
        block.register_forward_hook(note, with_kwargs=True)
    model(**collator_for(kind, model)(review_rows(kind)[:3])).loss.backward()
    cut = freeze_cut(plan, stack.name)
    assert given[: len(blocks)] == [index > cut for index in range(len(blocks))]
    assert handed_on[: len(blocks)] == [index >= cut for index in range(len(blocks))]
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in trained.values())
    assert any(gradient.abs().max() > 0 for gradient in trained.values())


def freeze_cut(plan: FreezePlan, stack: str) -> int:
    cut = getattr(plan, f"{stack}_blocks")
    assert isinstance(cut, int)
    return cut


# -------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(("kind", "plan"), CASES[:5], ids=IDS[:5])
def test_training_from_the_prefix_cache_is_plain_training(
    kind: str, plan: FreezePlan, method: str, tmp_path: Path
) -> None:
    rows = review_rows(kind)
    plain, cached = (adapted(kind, plan, kind=method, dropout=0.1) for _ in range(2))
    before = {name: parameter.clone() for name, parameter in cached.named_parameters()}
    assert any("magnitude" in name for name in before) is (method == "dora")
    cache = PrefixCache.build(cached, rows, collator_for(kind, cached), cache_dir=tmp_path / "cache", progress=False)
    wanted, _ = trainer_losses(plain, rows, collator_for(kind, plain), tmp_path, max_steps=3)
    got, _ = trainer_losses(cached, rows, cache.collator, tmp_path, max_steps=3)
    assert len(got) == 3
    torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=1e-5, atol=0)
    assert (cache.batches_used, cache.batches_unused) == (3, 0)
    moved = {name for name, p in cached.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert moved <= {name for name, p in cached.named_parameters() if p.requires_grad}
    for (name, ours), (_, theirs) in zip(plain.named_parameters(), cached.named_parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6, msg=name)
    verify_frozen(cached)


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_a_summary_trainer_trains_adapters_from_the_cache(kind: str, tmp_path: Path) -> None:
    rows = review_rows(kind)
    plain, cached = adapted(kind), adapted(kind)
    cache = PrefixCache.build(cached, rows, collator_for(kind, cached), cache_dir=tmp_path / "cache", progress=False)
    losses = []
    for model, collator in ((plain, collator_for(kind, plain)), (cached, cache.collator)):
        args = SummaryTrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=3,
            precision="fp32", optim="sgd", learning_rate=0.1, cpu_threads=1, logging_steps=1, eval_strategy="no",
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = SummaryTrainer(model, args=args, train_dataset=Dataset.from_list(rows), data_collator=collator)
        tried_out = cache.batches_unused  # by the trainer, before training
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert (cache.batches_used, cache.batches_unused) == (6, tried_out)
    verify_frozen(cached)


def test_the_best_adapter_is_loaded_at_the_end_and_states_are_used_after_it(tmp_path: Path) -> None:
    rows, validation = review_rows("llama"), review_rows("llama", 6, seed=5)
    model = adapted("llama")
    cache = PrefixCache.build(model, rows, collator_for("llama", model), cache_dir=tmp_path / "cache", progress=False)
    cache.add(validation)
    _, trainer = trainer_losses(
        model, rows, cache.collator, tmp_path, eval_dataset=validation, max_steps=3, eval_strategy="steps",
        save_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    assert trainer.state.best_global_step < 3  # on random labels it gets no better
    saved = load_file(tmp_path / f"checkpoint-{trainer.state.best_global_step}" / "adapter_model.safetensors")
    now = get_peft_model_state_dict(model)
    assert saved
    assert all(torch.equal(now[name], tensor) for name, tensor in saved.items())
    used = cache.batches_used
    model.train()(**cache.collator(rows[:2])).loss.backward()
    assert (cache.batches_used, cache.batches_unused) == (used + 1, 0)
    verify_frozen(model)


# ---------------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(("kind", "plan"), CASES, ids=IDS)
def test_what_is_saved_is_an_ordinary_adapter_for_a_fresh_base(
    kind: str, plan: FreezePlan, method: str, tmp_path: Path
) -> None:
    rows = review_rows(kind)
    model = adapted(kind, plan, kind=method)
    trainer_losses(model, rows, collator_for(kind, model), tmp_path, max_steps=1)
    model.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(tiny_model(kind), str(tmp_path / "adapter")).eval()
    assert adapters_of(again) == adapters_of(model)
    batch = collator_for(kind, model)(rows[:3])
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
        assert not torch.equal(again(**batch).logits, tiny_model(kind).eval()(**batch).logits)


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_a_model_with_adapters_generates(kind: str) -> None:
    model = adapted(kind).eval()
    assert model.peft_config["default"].task_type == ("CAUSAL_LM" if kind == "llama" else "SEQ_2_SEQ_LM")
    ids = torch.tensor(review_rows(kind)[0]["input_ids"])[None]
    generated = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, tiny_model(kind).eval().generate(ids, max_new_tokens=3, do_sample=False))


def test_a_classifier_is_adapted_and_its_head_is_frozen() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    base = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))
    freeze(base, FreezePlan(encoder_blocks=2))
    model = adapt_upper(base)
    assert model.peft_config["default"].task_type is None
    assert adapters_of(model)
    assert all(name.startswith("bert.encoder.layer.2.") for name in adapters_of(model))
    assert not base.classifier.weight.requires_grad


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "given", "error", "message"),
    [
        (frozen_model, {"kind": "qlora"}, PlanError, r"kind='qlora'; it is one of 'lora', 'dora'\."),
        (frozen_model, {"target_modules": ("v_proj", "q_porj")}, PlanError,
         r"trains in LlamaForCausalLM is called 'q_porj'\. The nearest: 'q_proj'"),
        (frozen_model, {"target_modules": "all-linear"}, PlanError,
         r"it is a sequence of names\. Use \('all-linear',\)"),
        (lambda kind: frozen_model(kind, plan=FreezePlan(decoder_blocks="all")), {}, PlanError,
         r"no matrix of its blocks trains\. Call thaw\(model\) and freeze fewer"),
        (tiny_model, {}, FreezeError, r"a LlamaForCausalLM that was never frozen\. Call freeze\(model, plan\)"),
        (adapted, {}, FreezeError, "holds adapters already"),
        (lambda kind: adapted(kind).get_base_model(), {}, FreezeError, "holds adapters already"),
    ],
)  # fmt: skip
def test_what_gets_no_adapters_is_refused_and_gets_none(
    make: Any, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make("llama")
    before = adapters_of(model)
    with pytest.raises(error, match=message):
        adapt_upper(model, **given)
    assert adapters_of(model) == before


def test_a_model_that_trains_from_a_cache_is_an_error_until_it_is_closed(tmp_path: Path) -> None:
    rows = review_rows("llama")
    model = frozen_model("llama")
    cache = PrefixCache.build(model, rows, collator_for("llama", model), cache_dir=tmp_path, progress=False)
    with pytest.raises(FreezeError, match=r"trains from a prefix cache; .* close\(\), then adapt_upper"):
        adapt_upper(model)
    cache.close()
    assert adapters_of(adapt_upper(model))
