"""Single changes to what decides about a frozen prefix's states, each with the model that it is made to."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_freeze import FreezePlan, freeze
from tests.zoo import VOCAB, build

WIDTH, DEPTH = 16, 4
SHIFT = 0.0  # a global that code of a block reads


def with_power(power: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A closure: its code is one, what it does follows a cell."""
    return lambda states: states.sign() * states.abs().pow(power)


def shifted(states: torch.Tensor) -> torch.Tensor:
    return states + SHIFT


def scaled(states: torch.Tensor, by: float = 1.0) -> torch.Tensor:
    return states * by


class Settings:
    """A plain object that a module keeps."""

    def __init__(self, gain: float) -> None:
        self.gain = gain


class ToyBlock(nn.Module):
    """Reads values of every kind that a module may keep beside its tensors."""

    gain = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.act: Any = torch.tanh
        self.power = with_power(1.0)
        self.scale = functools.partial(scaled, by=1.0)
        self.factors = (1.0, 1.0)
        self.shifts = [0.0, 0.0]
        self.table = {"gain": 1.0, "deep": {"gain": 1.0}}
        self._private = 1.0
        self.constant = torch.ones(WIDTH)
        self.array = np.ones(WIDTH, dtype=np.float32)
        self.settings = Settings(1.0)
        self.register_buffer("mask", torch.ones(WIDTH), persistent=False)
        self.register_buffer("kept", torch.ones(WIDTH))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        inner = self.scale(self.power(self.act(self.linear(self.norm(states)))))
        inner = inner * self.factors[0] + self.shifts[1]
        inner = inner * self.table["gain"] * self.table["deep"]["gain"] * self._private * self.gain
        inner = inner * self.constant * torch.from_numpy(self.array) * self.settings.gain * self.mask * self.kept
        return states + shifted(inner)


class ToyConvolution(nn.Module):
    """A block whose padding, dilation and groups decide; only rows of one length can be cached."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, WIDTH)
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)
        self.pool = nn.AvgPool1d(3, stride=1, padding=1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        inner = self.pool(self.convolution(self.norm(states.transpose(1, 2))))
        return states + inner.transpose(1, 2)[:, : states.shape[1]]


class ToyModel(nn.Module):
    """A bare module with a list of blocks, without a config."""

    def __init__(self, block: type[nn.Module] = ToyBlock) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([block() for _ in range(DEPTH)])
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        states = self.embedding(input_ids)
        for block in self.blocks:
            states = block(states)
        logits = self.head(states)
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)}


class Wrapped(nn.Module):
    """A module without a config around a model that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("llama")

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def adapted(*names: str) -> nn.Module:
    """Frozen blocks with adapters of their own, frozen too; "b" does something."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 1], init_lora_weights=False)
    model = get_peft_model(build("llama"), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.3" in parameter_name or "lm_head" in parameter_name)
    return model


def make(kind: str) -> nn.Module:
    """The model of a change, frozen below its last block; the same weights at each call."""
    torch.manual_seed(0)
    if kind == "toy":
        model: nn.Module = ToyModel()
    elif kind == "convolution":
        model = ToyModel(ToyConvolution)
    elif kind == "wrapped":
        model = Wrapped()
    elif kind == "peft":
        model = adapted("a", "b")
    else:
        model = build(kind)
    two_stacks = kind in ("t5", "bart")
    freeze(model, FreezePlan(encoder_blocks="all" if two_stacks else None, decoder_blocks=3))
    return model.train()


# ---------------------------------------------------------------------------------------------------------- changes


def at(path: str, name: str, value: Any) -> Callable[[Any, Any], None]:
    """Sets an attribute of a module."""

    def change(model: Any, patch: Any) -> None:
        owner = model.get_submodule(path) if path else model
        owner._modules.pop(name, None)
        setattr(owner, name, value)

    return change


def on(path: str, act: Callable[[Any], Any]) -> Callable[[Any, Any], None]:
    """Does something to a module."""

    def change(model: Any, patch: Any) -> None:
        act(model.get_submodule(path) if path else model)

    return change


def by(act: Callable[[Any, Any], Any]) -> Callable[[Any, Any], None]:
    def change(model: Any, patch: Any) -> None:
        act(model, patch)

    return change


def in_data(path: str, factor: float) -> Callable[[Any, Any], None]:
    return on("", lambda model: model.get_parameter(path).data.mul_(factor))


def _new_data(model: Any, patch: Any) -> None:
    parameter = model.get_parameter("blocks.0.linear.weight")
    parameter.data = parameter.data * 1.5


def _in_place(model: Any, patch: Any) -> None:
    with torch.no_grad():
        model.get_parameter("blocks.0.linear.weight").mul_(1.5)


def _instance_forward(model: Any, patch: Any) -> None:
    block = model.blocks[1]
    block.forward = types.MethodType(lambda self, states: states * 2, block)


def _class_forward(model: Any, patch: Any) -> None:
    before = ToyBlock.forward
    patch.setattr(ToyBlock, "forward", lambda self, states: before(self, states) * 1.2)


def _doubled(module: nn.Module, args: Any, output: Any) -> Any:
    return output * 2


def _doubled_first(module: nn.Module, args: Any) -> Any:
    return (args[0] * 2, *args[1:])


def _llama_mlp(model: Any, patch: Any) -> None:
    kind = type(model.model.layers[0].mlp)
    before = kind.forward
    patch.setattr(kind, "forward", lambda self, states: before(self, states) * 3)


def _linear_class(model: Any, patch: Any) -> None:
    before = nn.Linear.forward
    patch.setattr(nn.Linear, "forward", lambda self, states: before(self, states) * 1.1)


def _attention_registry(model: Any, patch: Any) -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def other(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        return before(module, query, key, value * 2, *args, **kwargs)

    patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", other)


def _global_hook(model: Any, patch: Any) -> None:
    def twice(module: Any, args: Any, output: Any) -> Any:
        return output * 1.5 if type(module) is nn.LayerNorm else None

    handle = nn.modules.module.register_module_forward_hook(twice)
    patch.setattr(model, "undo", handle.remove, raising=False)


def _other_rope(model: Any, patch: Any) -> None:
    config = model.inner.config
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 10.0}
    rotary = type(model.inner.model.rotary_emb)(config)
    model.inner.model.rotary_emb = rotary


def _wrapped_act(model: Any, patch: Any) -> None:
    model.inner.config.hidden_act = "relu"
    for layer in model.inner.model.layers:
        layer.mlp.act_fn = nn.ReLU()


def _swapped(model: Any, patch: Any) -> None:
    blocks = model.blocks
    blocks[0], blocks[1] = blocks[1], blocks[0]


def _parametrized(model: Any, patch: Any) -> None:
    class Twice(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2

    nn.utils.parametrize.register_parametrization(model.blocks[0].linear, "weight", Twice())


class Loud(nn.LayerNorm):
    """The same tensors, another result."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = super().forward(states) * 1.5
        return result


def _other_class(model: Any, patch: Any) -> None:
    model.blocks[0].norm.__class__ = Loud


Change = tuple[str, Callable[[Any, Any], None]]

# name: (model, change). The first part can be told from the model; the second from its results only.
CHANGES: dict[str, Change] = {
    "an activation function": ("toy", at("blocks.0", "act", torch.exp)),
    "an activation of Python": ("toy", at("blocks.0", "act", functional.silu)),
    "an activation module": ("llama", at("model.layers.1.mlp", "act_fn", nn.Tanh())),
    "an activation module by a function": ("bart", at("model.encoder.layers.1", "activation_fn", torch.tanh)),
    "a closure": ("toy", on("blocks.1", lambda b: setattr(b, "power", with_power(2.0)))),
    "a closure's cell": ("toy", on("blocks.1", lambda b: setattr(b.power.__closure__[0], "cell_contents", 2.0))),
    "a partial": ("toy", on("blocks.1", lambda b: setattr(b, "scale", functools.partial(scaled, by=2.0)))),
    "a function's default": ("toy", by(lambda m, p: p.setattr(scaled, "__kwdefaults__", None) or
                                       p.setattr(scaled, "__defaults__", (3.0,)) or
                                       setattr(m.blocks[0], "scale", scaled))),
    "a tuple": ("toy", at("blocks.0", "factors", (0.5, 1.0))),
    "a list in place": ("toy", on("blocks.2", lambda b: b.shifts.__setitem__(1, 0.5))),
    "a dictionary in place": ("toy", on("blocks.2", lambda b: b.table.__setitem__("gain", 2.0))),
    "a dictionary within": ("toy", on("blocks.2", lambda b: b.table["deep"].__setitem__("gain", 2.0))),
    "a private attribute": ("toy", at("blocks.0", "_private", 0.5)),
    "a plain tensor in place": ("toy", on("blocks.0", lambda b: b.constant.mul_(1.5))),
    "a plain tensor": ("toy", on("blocks.0", lambda b: setattr(b, "constant", b.constant * 1.5))),
    "an array in place": ("toy", on("blocks.0", lambda b: b.array.__imul__(1.5))),
    "an object's field": ("toy", on("blocks.0", lambda b: setattr(b.settings, "gain", 0.5))),
    "a buffer that no checkpoint holds": ("toy", on("blocks.0", lambda b: b.mask.mul_(1.5))),
    "a buffer put in anew": ("toy", on("blocks.0", lambda b: setattr(b, "mask", b.mask * 1.5))),
    "a buffer that checkpoints hold": ("toy", on("blocks.0", lambda b: b.kept.mul_(1.5))),
    "a buffer through data": ("toy", on("blocks.0", lambda b: b.mask.data.mul_(1.5))),
    "an epsilon": ("toy", at("blocks.0.norm", "eps", 0.5)),
    "a norm's shape": ("toy", at("blocks.0.norm", "normalized_shape", (WIDTH,))),
    "an instance's forward": ("toy", _instance_forward),
    "a class's forward": ("toy", _class_forward),
    "a class's attribute": ("toy", by(lambda m, p: p.setattr(ToyBlock, "gain", 1.5))),
    "a module's class": ("toy", _other_class),
    "a forward of torch": ("toy", _linear_class),
    "a hook": ("toy", on("blocks.1", lambda b: b.register_forward_hook(_doubled))),
    "a hook within a block": ("toy", on("blocks.1.linear", lambda b: b.register_forward_hook(_doubled))),
    "a hook on what goes in": ("toy", on("blocks.1", lambda b: b.register_forward_pre_hook(_doubled_first))),
    "a hook on the embeddings": ("toy", on("embedding", lambda b: b.register_forward_hook(_doubled))),
    "a hook on all modules": ("toy", _global_hook),
    "a global of the module": ("toy", by(lambda m, p: p.setattr("tests.prefix.stale_changes.SHIFT", 0.5))),
    "a function of the module": (
        "toy", by(lambda m, p: p.setattr("tests.prefix.stale_changes.shifted", lambda s: s * 2))
    ),
    "a weight in place": ("toy", _in_place),
    "a weight through data": ("toy", in_data("blocks.0.linear.weight", 1.5)),
    "a weight's data": ("toy", _new_data),
    "a bias through data": ("toy", by(lambda m, p: m.get_parameter("blocks.1.linear.bias").data.add_(1.0))),
    "an embedding through data": ("toy", in_data("embedding.weight", 1.5)),
    "blocks in another order": ("toy", _swapped),
    "a parametrization": ("toy", _parametrized),
    "a padding": ("convolution", on("blocks.0.convolution", lambda c: setattr(c, "padding", (1,)) or
                                    setattr(c, "padding_mode", "circular") or
                                    setattr(c, "_reversed_padding_repeated_twice", [1, 1]))),
    "a dilation and padding": ("convolution", on("blocks.0.convolution", lambda c: setattr(c, "dilation", (2,)) or
                                                 setattr(c, "padding", (2,)))),
    "a kernel of a pool": ("convolution", on("blocks.1.pool", lambda c: setattr(c, "kernel_size", (1,)) or
                                             setattr(c, "padding", (0,)))),
    "groups of a norm": ("convolution", at("blocks.0.norm", "num_groups", 4)),
    "rotary frequencies": ("llama", on("model.rotary_emb", lambda r: r.inv_freq.mul_(1.5))),
    "rotary frequencies anew": ("llama", on("model.rotary_emb", lambda r: setattr(r, "inv_freq", r.inv_freq * 2))),
    "a rotary scaling": ("llama", at("model.rotary_emb", "attention_scaling", 1.3)),
    "an attention's scaling": ("llama", at("model.layers.0.self_attn", "scaling", 2.0)),
    "an attention that looks ahead": ("llama", at("model.layers.0.self_attn", "is_causal", False)),
    "a norm's epsilon of transformers": ("llama", at("model.layers.0.input_layernorm", "variance_epsilon", 0.5)),
    "another attention": ("llama", by(lambda m, p: m.set_attn_implementation("eager"))),
    "an attention function": ("llama", _attention_registry),
    "a class's forward of transformers": ("llama", _llama_mlp),
    "a sliding window": ("mistral", on("", lambda m: setattr(m.config, "sliding_window", 3))),
    "another adapter": ("peft", by(lambda m, p: m.base_model.set_adapter("b", inference_mode=True))),
    "adapters off": ("peft", by(lambda m, p: m.base_model.disable_adapter_layers())),
    "adapters merged": ("peft", by(lambda m, p: m.merge_adapter())),
    "an adapter's scaling": ("peft", by(lambda m, p: [module.scaling.update(a=3.0) for module in m.modules()
                                                      if isinstance(getattr(module, "scaling", None), dict)])),
    "both adapters": ("peft", by(lambda m, p: m.base_model.set_adapter(["a", "b"], inference_mode=True))),
    "rotary positions behind a wrapper": ("wrapped", _other_rope),
    "an activation behind a wrapper": ("wrapped", _wrapped_act),
    "an embedding's scale": ("bart", on("model.encoder.embed_tokens", lambda e: setattr(e, "embed_scale", 3.0))),
    "positions' offset": ("bart", at("model.encoder.embed_positions", "offset", 5)),
    "buckets of positions": ("t5", by(lambda m, p: setattr(
        m.encoder.block[0].layer[0].SelfAttention, "relative_attention_max_distance", 4))),
    "a class of T5": ("t5", by(lambda m, p: p.setattr(
        type(m.encoder.block[0].layer[1]), "forward", lambda self, states, *a, **k: states * 1.5))),
    "attention weights of GPT-2": ("gpt2", by(lambda m, p: setattr(m.transformer.h[1].attn, "scaling", 2.0))),
    "an activation of GPT-2": ("gpt2", at("transformer.h.1.mlp", "act", nn.Tanh())),
    "token types of BERT": ("bert", on("", lambda m: next(b for n, b in m.named_buffers()
                                                          if "token_type" in n).fill_(1))),
    "position ids of BERT": ("bert", on("", lambda m: next(b for n, b in m.named_buffers()
                                                           if "position" in n).copy_(
                                            next(b for n, b in m.named_buffers() if "position" in n).flip(1)))),
}  # fmt: skip

# What a look at the modules sees before the next batch, without running anything.
SEEN_AT_ONCE = (
    "an activation function", "an activation module", "a closure", "a partial", "a tuple", "a private attribute",
    "a plain tensor", "a buffer that no checkpoint holds", "a buffer put in anew", "a buffer that checkpoints hold",
    "an epsilon", "an instance's forward", "a class's forward", "a module's class", "a forward of torch", "a hook",
    "a hook within a block", "a hook on what goes in", "a hook on the embeddings", "a weight in place",
    "a weight's data", "blocks in another order", "rotary frequencies", "rotary frequencies anew",
    "a rotary scaling", "an attention's scaling", "another attention", "a class's forward of transformers",
    "another adapter", "adapters off", "an embedding's scale", "positions' offset",
)  # fmt: skip
