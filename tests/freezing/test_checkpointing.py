"""Activation checkpointing saves memory above the cut and costs nothing below it, however it is switched on."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from hf_freeze import FreezePlan, freeze, read_anatomy, thaw
from hf_freeze.anatomy import Stack
from hf_freeze.freezing import checkpointing
from tests.depth.sweep import training_batch
from tests.zoo import VOCAB, build

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

WHOLE_ENCODER = FreezePlan(encoder_blocks="all", decoder_blocks=2)
CASES: dict[str, tuple[str, FreezePlan]] = {
    "llama": ("llama", FreezePlan(decoder_blocks=3)),
    "gpt2": ("gpt2", FreezePlan(decoder_blocks=3)),
    "bart, whole encoder": ("bart", WHOLE_ENCODER),
    "bart, half and half": ("bart", FreezePlan()),
    "bart, encoder trains": ("bart", FreezePlan(encoder_blocks=0)),
    "t5, whole encoder": ("t5", WHOLE_ENCODER),
    "t5, half and half": ("t5", FreezePlan()),
    "llama, untied head frozen": ("llama", FreezePlan(decoder_blocks=2, freeze=("lm_head", r"model\.norm"))),
    "gpt2, head untied": ("gpt2", FreezePlan(decoder_blocks=3, tied_head="untie")),
    "gpt2, embeddings train": ("gpt2", FreezePlan(embeddings=False, tied_head="train")),
    "gpt2, a frozen block above": ("gpt2", FreezePlan(decoder_blocks=1, freeze=(r"h\.3",))),
    "gpt2, dropout stays on": ("gpt2", FreezePlan(decoder_blocks=3, frozen_mode="train")),
}
PREFIX = [name for name in CASES if name not in ("bart, encoder trains", "gpt2, embeddings train")]

SWITCHES: dict[str, Callable[[Any], None]] = {
    "new name": lambda model: model.activation_checkpointing_enable(),
    "old name": lambda model: model.gradient_checkpointing_enable(),
    "reentrant": lambda model: model.activation_checkpointing_enable({"use_reentrant": True}),
    "old name, reentrant": lambda model: model.gradient_checkpointing_enable({"use_reentrant": True}),
    "every second block": lambda model: model.activation_checkpointing_enable(every_n_layers=2),
}


def model_of(name: str) -> PreTrainedModel:
    given = {"dropout": 0.1} if name == "bart" else {}  # where it is on, frozen blocks must not use it
    return build(name, use_cache=False, **given).train()


def loss_and_gradients(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    """Seeded, so that dropout above the cut falls alike."""
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(**training_batch(model)).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(model: nn.Module, reference: nn.Module) -> None:
    loss, gradients = loss_and_gradients(model)
    plain_loss, plain_gradients = loss_and_gradients(reference)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert gradients.keys() == plain_gradients.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7)


def runs_of_blocks(model: nn.Module, stack: Stack) -> list[int]:
    """How often each block's work is done in one step: twice where it is checkpointed.

    Counted inside the block: its own hooks stand outside of what is recomputed.
    """
    runs: list[dict[str, int]] = [{} for _ in stack.blocks]

    def counter(index: int, name: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            runs[index][name] = runs[index].get(name, 0) + 1

        return count

    handles = [
        child.register_forward_pre_hook(counter(block.index, name))
        for block in stack.blocks
        for name, child in block.modules[0].named_modules()
        if name
    ]
    loss_and_gradients(model)
    for handle in handles:
        handle.remove()
    return [max(counts.values()) for counts in runs]


def saved_bytes(model: nn.Module, stack: Stack | None = None, depth: int = 0) -> tuple[int, int]:
    """Bytes saved for the backward pass, parameters apart, and those of them saved inside the lowest `depth` blocks."""
    kept: dict[int, torch.Tensor] = {}
    inside = 0
    open_blocks = 0
    weights = {p.data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal inside
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor
            inside += tensor.nbytes if open_blocks else 0
        return tensor

    def enter(*_: Any) -> None:
        nonlocal open_blocks
        open_blocks += 1

    def leave(*_: Any) -> None:
        nonlocal open_blocks
        open_blocks -= 1

    blocks = [block.modules[0] for block in stack.blocks[:depth]] if stack else []
    handles = [block.register_forward_pre_hook(enter) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**training_batch(model)).loss
    for handle in handles:
        handle.remove()
    del loss
    return sum(tensor.nbytes for tensor in kept.values()), inside


def assert_no_graph_below(model: nn.Module, cuts: Any) -> None:
    """Nothing that enters a block of the prefix, or the first one above, requires a gradient."""
    anatomy = read_anatomy(model)
    seen = []

    def refuse(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        assert states
        assert not any(t.requires_grad for t in states), "a graph below the cut"
        seen.append(module)

    handles = []
    for stack, depth in cuts:
        for block in anatomy.stack(stack).blocks[: depth + 1]:
            handles.append(block.modules[0].register_forward_pre_hook(refuse, with_kwargs=True))
    torch.manual_seed(7)
    model(**training_batch(model)).loss.backward()
    for handle in handles:
        handle.remove()
    assert len(set(seen)) == len(handles) > 0


def ours(model: nn.Module) -> int:
    """How many hooks and functions of ours a model carries."""
    functions: list[Any] = [m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()]
    functions += [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    rooms = [getattr(getattr(function, "func", function), "__module__", "") for function in functions]
    return rooms.count(checkpointing.__name__)


# ------------------------------------------------------------------------------------------------------ the same step


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_without_checkpointing(case: str, switch: str) -> None:
    name, plan = CASES[case]
    before, after, reference = (model_of(name) for _ in range(3))
    SWITCHES[switch](before)
    for model in (before, after, reference):
        freeze(model, plan)
    SWITCHES[switch](after)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # "None of the inputs have requires_grad=True", for one
        for model in (before, before, after, after):
            assert model.is_activation_checkpointing
            assert_same_training(model, reference)


@pytest.mark.parametrize("name", ["gemma3n_text", "mixtral", "opt", "bloom", "zamba2", "pegasus", "longt5", "mpt"])
def test_other_architectures_train_the_same_too(name: str) -> None:
    plan = FreezePlan(encoder_blocks="all") if build(name).config.is_encoder_decoder else FreezePlan()
    model, reference = build(name, use_cache=False).train(), build(name, use_cache=False).train()
    report = freeze(model, plan)
    freeze(reference, plan)
    SWITCHES["reentrant"](model)
    assert_same_training(model, reference)
    assert_no_graph_below(model, report.cuts)


# ------------------------------------------------------------------------------------------------------- the prefix


@pytest.mark.parametrize("switch", ["new name", "reentrant"])
@pytest.mark.parametrize("case", PREFIX)
def test_trained_blocks_are_checkpointed_and_the_prefix_runs_once_without_a_graph(case: str, switch: str) -> None:
    name, plan = CASES[case]
    model = model_of(name)
    report = freeze(model, plan)
    SWITCHES[switch](model)
    cuts = report.cuts or (("decoder", 3),)  # with dropout on, nothing is cached
    assert_no_graph_below(model, cuts)
    anatomy = read_anatomy(model)
    for stack_name, depth in cuts:
        stack = anatomy.stack(stack_name)
        assert runs_of_blocks(model, stack) == [1] * depth + [2] * (len(stack) - depth)
        assert saved_bytes(model, stack, depth)[1] == 0


@pytest.mark.parametrize(("name", "share"), [("llama", 0.75), ("gpt2", 0.75), ("bart", 0.75), ("t5", 0.75)])
def test_freezing_and_checkpointing_save_less_than_either(name: str, share: float) -> None:
    plan = FreezePlan(encoder_blocks="all" if name in ("bart", "t5") else None, decoder_blocks=3)
    models = [model_of(name) for _ in range(3)]
    for model in models[1:]:
        freeze(model, plan)
    for model in (models[0], models[2]):
        SWITCHES["new name"](model)
    full_checkpointed, frozen, frozen_checkpointed = (saved_bytes(model)[0] for model in models)
    assert frozen_checkpointed < frozen
    assert frozen_checkpointed < share * full_checkpointed


def test_stock_transformers_still_needs_this() -> None:
    model = model_of("llama")
    freeze(model, FreezePlan(decoder_blocks=3))
    thaw(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.3" in name or "lm_head" in name or name == "model.norm.weight")
    SWITCHES["new name"](model)
    with pytest.raises(AssertionError, match="a graph below the cut"):
        assert_no_graph_below(model, [("decoder", 3)])


def test_an_input_gradient_hook_of_anybody_is_undone() -> None:
    model = model_of("gpt2")
    freeze(model, FreezePlan(decoder_blocks=2))
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    assert_no_graph_below(model, [("decoder", 2)])


def test_a_gradient_that_the_user_asks_of_inputs_embeds_still_arrives() -> None:
    model = model_of("gpt2")
    freeze(model, FreezePlan(decoder_blocks=2))
    SWITCHES["new name"](model)
    batch = training_batch(model)
    states = model.get_input_embeddings()(batch.pop("input_ids")).requires_grad_(True)
    model(inputs_embeds=states, **batch).loss.backward()
    assert states.grad is not None
    assert states.grad.any()


def test_switching_checkpointing_off_again_leaves_the_prefix_without_a_graph() -> None:
    model = model_of("llama")
    report = freeze(model, FreezePlan(decoder_blocks=3))
    SWITCHES["new name"](model)
    loss_and_gradients(model)
    model.activation_checkpointing_disable()
    assert_no_graph_below(model, report.cuts)
    assert runs_of_blocks(model, read_anatomy(model).stacks[0]) == [1, 1, 1, 1]


def test_dropout_that_stays_on_in_the_prefix_falls_the_same_with_checkpointing() -> None:
    plan = FreezePlan(encoder_blocks="all", decoder_blocks=2, frozen_mode="train")
    models = [model_of("bart") for _ in range(2)]
    for model in models:
        freeze(model, plan)
    SWITCHES["reentrant"](models[0])
    assert_same_training(*models)
    assert runs_of_blocks(models[0], read_anatomy(models[0]).stack("decoder")) == [1, 1, 2, 2]


# ---------------------------------------------------------------------------------- frozen blocks that carry a gradient


@pytest.mark.parametrize("switch", ["new name", "reentrant"])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_frozen_decoder_blocks_above_a_training_encoder_are_checkpointed_in_eval(name: str, switch: str) -> None:
    model = model_of(name)
    freeze(model, FreezePlan(encoder_blocks=2, decoder_blocks=2))
    SWITCHES[switch](model)
    anatomy = read_anatomy(model)
    assert runs_of_blocks(model, anatomy.stack("encoder")) == [1, 1, 2, 2]
    assert runs_of_blocks(model, anatomy.stack("decoder")) == [2, 2, 2, 2]
    assert not any(m.training for block in anatomy.stack("decoder").blocks[:2] for m in block.modules[0].modules())
    loss_and_gradients(model.eval())
    assert runs_of_blocks(model, anatomy.stack("decoder")) == [1, 1, 1, 1]


def test_blocks_that_train_nothing_above_trained_ones_are_checkpointed() -> None:
    model = model_of("gpt2")
    freeze(model, CASES["gpt2, a frozen block above"][1])
    SWITCHES["new name"](model)
    assert runs_of_blocks(model, read_anatomy(model).stacks[0]) == [1, 2, 2, 2]


# ------------------------------------------------------------------------------------------------------------ adapters


def lora(model: nn.Module, blocks: list[int] | None) -> Any:
    torch.manual_seed(0)
    modules = ["q_proj", "v_proj"]
    config = LoraConfig(r=2, target_modules=modules, layers_to_transform=blocks, init_lora_weights=False)
    return get_peft_model(model, config)


@pytest.mark.parametrize("switch", ["new name", "reentrant"])
def test_adapters_on_the_upper_blocks_leave_a_prefix(switch: str) -> None:
    plan = FreezePlan(decoder_blocks=2)
    models = [lora(model_of("llama"), [2, 3]) for _ in range(2)]
    reports = [freeze(model, plan) for model in models]
    SWITCHES[switch](models[0])
    assert_same_training(*models)
    assert_no_graph_below(models[0], reports[0].cuts)


def test_adapters_in_every_block_are_left_as_they_are() -> None:
    model = lora(model_of("llama"), None)
    SWITCHES["new name"](model)
    report = freeze(model, FreezePlan(decoder_blocks=2, train=(".*lora.*",)))
    loss_and_gradients(model)
    assert report.cuts == ()
    assert ours(model) == 0


@pytest.mark.parametrize("switch", ["new name", "reentrant"])
def test_adapters_that_come_after_freeze_train_in_the_prefix_too(switch: str) -> None:
    models = [model_of("llama") for _ in range(2)]
    for model in models:
        freeze(model, FreezePlan(decoder_blocks=2))
    adapted = [lora(model, None) for model in models]
    SWITCHES[switch](adapted[0])
    assert_same_training(*adapted)


# ------------------------------------------------------------------------------------------------------------- Trainer


@pytest.mark.parametrize("flag", ["activation_checkpointing", "gradient_checkpointing"])
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}], ids=["default", "reentrant"])
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_trainers_own_flag_trains_the_same(name: str, flag: str, kwargs: Any, tmp_path: Path) -> None:
    def trained(**given: Any) -> tuple[list[float], dict[str, torch.Tensor], nn.Module]:
        model = build(name)
        freeze(model, WHOLE_ENCODER if name == "bart" else FreezePlan(decoder_blocks=3))
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=True, learning_rate=1e-2, **given,
        )  # fmt: skip
        rows = [{key: value[0].tolist() for key, value in training_batch(model).items()} for _ in range(8)]
        trainer = Trainer(model=model, args=args, train_dataset=Dataset.from_list(rows))
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return losses, {n: p.detach() for n, p in model.named_parameters()}, model

    plain_losses, plain_weights, _ = trained()
    losses, weights, model = trained(**{flag: True, f"{flag}_kwargs": kwargs})
    assert model.is_activation_checkpointing
    assert losses == pytest.approx(plain_losses, rel=1e-5)
    for key, weight in plain_weights.items():
        torch.testing.assert_close(weights[key], weight, rtol=1e-4, atol=1e-6)
    assert_no_graph_below(model, [("decoder", 2)])


# ---------------------------------------------------------------------------------------------- undone, copied, pickled


def test_thaw_leaves_checkpointing_as_the_user_switched_it_on() -> None:
    model, reference = model_of("gpt2"), model_of("gpt2")
    SWITCHES["reentrant"](model)
    given = [m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()]
    freeze(model, FreezePlan(decoder_blocks=3))
    loss_and_gradients(model)
    assert ours(model) > 0
    thaw(model)
    assert ours(model) == 0
    assert [m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()] == given
    assert runs_of_blocks(model, read_anatomy(model).stacks[0]) == [2, 2, 2, 2]
    assert_same_training(model, reference)


def test_freezing_again_at_another_depth_moves_the_cut() -> None:
    model = model_of("llama")
    for _ in range(2):
        freeze(model, FreezePlan(decoder_blocks=3))
    once = ours(model)
    SWITCHES["new name"](model)
    loss_and_gradients(model)
    thaw(model)
    report = freeze(model, FreezePlan(decoder_blocks=1))
    assert ours(model) == once
    assert runs_of_blocks(model, read_anatomy(model).stacks[0]) == [1, 2, 2, 2]
    assert_no_graph_below(model, report.cuts)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_copy_and_a_pickle_of_the_model_do_the_same(name: str) -> None:
    model = model_of(name)
    report = freeze(model, FreezePlan(encoder_blocks="all" if name == "bart" else None, decoder_blocks=2))
    SWITCHES["reentrant"](model)
    loss_and_gradients(model)
    twin = copy.deepcopy(model)
    model.disable_input_require_grads()  # a function inside a function of transformers' own, which pickle refuses
    for other in (twin, pickle.loads(pickle.dumps(model))):
        assert ours(other) == ours(model)
        assert_no_graph_below(other, report.cuts)
        assert_same_training(other, model)
        block = read_anatomy(other).stack("decoder").blocks[3].modules[0]
        assert block.training
        assert not read_anatomy(model).stack("decoder").blocks[0].modules[0].training
    thaw(twin)
    assert ours(twin) == 0
    assert ours(model) > 0


def test_a_model_that_nobody_checkpoints_keeps_its_attributes() -> None:
    model = model_of("llama")
    before = {name: sorted(m.__dict__) for name, m in model.named_modules()}
    freeze(model, FreezePlan())
    loss_and_gradients(model)
    thaw(model)
    assert {name: sorted(m.__dict__) for name, m in model.named_modules()} == before
    assert ours(model) == 0


# ---------------------------------------------------------------------------------------------------------- older style


class OlderConfig(PretrainedConfig):
    model_type = "older_style"
    vocab_size = VOCAB


class OlderBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + self.mix(self.norm(states)).tanh()


class OlderModel(PreTrainedModel):
    """As models on the hub do it still: the stack's own forward checkpoints every block."""

    config_class = OlderConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: OlderConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(VOCAB, 8)
        self.layers = nn.ModuleList(OlderBlock() for _ in range(4))
        self.head = nn.Linear(8, VOCAB)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, labels: Any = None, attention_mask: Any = None) -> CausalLMOutput:
        states = self.embed(input_ids)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                states = self._gradient_checkpointing_func(layer.__call__, states)
            else:
                states = layer(states)
        logits = self.head(states)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("switch", ["new name", "reentrant"])
def test_a_stack_that_checkpoints_its_blocks_itself_is_corrected_too(switch: str) -> None:
    torch.manual_seed(0)
    model = OlderModel(OlderConfig()).train()
    reference = copy.deepcopy(model)
    report = freeze(model, FreezePlan(decoder_blocks=2))
    freeze(reference, FreezePlan(decoder_blocks=2))
    SWITCHES[switch](model)
    assert_same_training(model, reference)
    assert_no_graph_below(model, report.cuts)
    assert runs_of_blocks(model, read_anatomy(model).stacks[0]) == [1, 1, 2, 2]


def test_a_checkpoint_function_of_the_users_own_is_kept() -> None:
    calls = []

    def own(run: Callable[..., Any], *args: Any) -> Any:
        calls.append(run)
        return checkpoint(run, *args, use_reentrant=False)

    model = model_of("gpt2")
    freeze(model, FreezePlan(decoder_blocks=3))
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=own)
    loss_and_gradients(model)
    assert len(calls) == 1
