"""Forecasts what a plan costs before a step is run: parameters, bytes, FLOPs, disk, and whether a cache pays.

Four ways to train are set side by side: full, frozen (the plan), cached (the plan, its prefix computed once) and LoRA.
Everything is counted from shapes, so a model on the meta device will do; seconds are not forecast, they are measured.
Only the lowest block of each kind is run, on a few tokens, to see in which order it calls its layers.

The counts:
    FLOPs: 2 a weight and token forward, 2 for the gradient of the input, 2 for that of the weight, each only where
        autograd computes it; attention scores 2 s_q s_k h (d_qk + d_v) forward, half of that again for each operand's
        gradient and each product. Masked scores count (eager attention computes them). Norms, biases, activations and
        embedding look-ups don't: they are elementwise.
    Saved activations: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022,
        section 4.1, taken apart into layers: what follows a layer keeps its output, a trained layer keeps its input.
        For their GPT block that gives their 34 bytes a token and width, less the 2 of the dropout masks; scores are
        not kept (sdpa and flash attention), except by eager attention. Beyond the paper: gated MLPs, RMSNorms and
        GELUs written out in Python, which keep more, and fp32 norms.
    Memory: AdamW in mixed precision, 16 bytes a trainable parameter (fp32 weight, gradient, two moments). Not counted:
        the bf16 copies that autocast makes of trained weights (2 bytes each), dropout masks, buffers, fragmentation.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_freeze.anatomy import Anatomy, Block, BlocksGiven, Part, Stack, read_anatomy
from hf_freeze.errors import FreezeError, PlanError
from hf_freeze.plan import FreezePlan, ResolvedPlan
from hf_freeze.report import Table, count_text

__all__ = ["Forecast", "ModeForecast", "forecast"]

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MASTER_BYTES = 4  # trainable weights, their gradients and both moments stay in fp32 under autocast
FLOP_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
LEAST_GAIN = 1.05  # below 5 % fewer FLOPs, writing and reading the states eats what the cache saves
ACTIVE_EXPERTS = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts", "top_k",
)  # fmt: skip
OWN_TOKENS, SOURCE_TOKENS = 5, 11  # unlike each other and most numbers of heads, so that a shape tells which it holds


@dataclass(frozen=True)
class ModeForecast:
    """What one way to train costs. A step is one batch; a run is all epochs.

    Attributes:
        trainable_parameters: Parameters that the optimizer moves.
        weight_bytes: Weights in memory: 4 bytes a trainable parameter, those of `dtype` a frozen one.
        gradient_bytes: 4 bytes a trainable parameter.
        optimizer_bytes: AdamW's two moments: 8 bytes a trainable parameter.
        activation_bytes: What the forward pass keeps for the backward pass, logits included.
        logit_bytes: The logits' share: V x tokens in fp32.
        supervised_logit_bytes: The same with logits only at the target positions.
        step_flops: Forward and backward pass of one batch.
        head_flops: The head's share of `step_flops`.
        supervised_head_flops: The same with logits only at the target positions.
        build_flops: Computing the prefix of all rows once; 0 without a cache.
        cache_bytes: The cache on disk; 0 without one.
        run_flops: All epochs over all rows, and the build.
        share_of_full: `step_flops` over those of full fine-tuning.
    """

    trainable_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    logit_bytes: int
    supervised_logit_bytes: int
    step_flops: int
    head_flops: int
    supervised_head_flops: int
    build_flops: int
    cache_bytes: int
    run_flops: int
    share_of_full: float

    @property
    def memory_bytes(self) -> int:
        """Weights, gradients, optimizer state and saved activations; without what an allocator adds."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes

    @property
    def supervised_step_flops(self) -> int:
        """A step with logits only at the target positions."""
        return self.step_flops - self.head_flops + self.supervised_head_flops


@dataclass(frozen=True)
class Forecast:
    """What full, frozen, cached and LoRA training of one model cost. Prints as a table.

    Attributes:
        model_class: Name of the model's class.
        plan: The plan that was forecast.
        modes: "full", "frozen", "cached" and "lora".
        batch_size: Rows a step.
        source_tokens: Tokens of a row that are read.
        target_tokens: Tokens of a row that are learnt; of an encoder-only model none.
        epochs: Passes over the rows.
        rows: Rows of the training set.
        dtype: Of frozen weights, activations and the cache.
        lora_rank: Rank of the adapters.
        notes: What was assumed, left out or could not be told.
        why_no_cut: Why there is nothing to cache; "" where there is.
        whole_encoder: For a plan that trains part of the encoder: the same with the whole encoder and half of the
            decoder frozen, which ends the backward pass in the decoder and lets both be cached. Else None.
    """

    model_class: str
    plan: FreezePlan
    modes: dict[str, ModeForecast]
    batch_size: int
    source_tokens: int
    target_tokens: int
    epochs: int
    rows: int
    dtype: str
    lora_rank: int
    notes: tuple[str, ...] = ()
    why_no_cut: str = ""
    whole_encoder: Forecast | None = field(default=None, repr=False)

    @property
    def cache_pays(self) -> bool:
        """Whether the cached run, build included, takes clearly fewer FLOPs than the frozen one; see `why`."""
        return not self.why_no_cut and self._gain >= LEAST_GAIN

    @property
    def why(self) -> str:
        """The reason for `cache_pays`, in FLOPs; a machine's disk and memory may say otherwise."""
        if self.why_no_cut:
            return f"Nothing to cut: {self.why_no_cut}"
        if self.epochs == 1:
            return "One epoch: building the cache takes the one forward pass through the prefix that it would save."
        gain = f"{self._gain:.2f}x fewer FLOPs over {self.epochs} epochs, build included"
        if self._gain < LEAST_GAIN:
            return f"Little is frozen: {gain}; writing and reading the states will eat that."
        return f"{gain[0].upper()}{gain[1:]}."

    @property
    def _gain(self) -> float:
        return self.modes["frozen"].run_flops / max(1, self.modes["cached"].run_flops)

    @cached_property
    def table(self) -> Table:
        """The modes side by side."""
        return _table(self)

    def __str__(self) -> str:
        return str(self.table)

    def to_markdown(self) -> str:
        """The table in Markdown."""
        return self.table.to_markdown()

    def to_dict(self) -> dict[str, Any]:
        """The forecast as JSON-ready values."""
        plain = ("model_class", "batch_size", "source_tokens", "target_tokens", "epochs", "rows", "dtype", "lora_rank")
        return {
            **{name: getattr(self, name) for name in plain},
            "plan": self.plan.to_dict(),
            "modes": {name: asdict(mode) | {"memory_bytes": mode.memory_bytes} for name, mode in self.modes.items()},
            "cache_pays": self.cache_pays,
            "why": self.why,
            "notes": list(self.notes),
            "whole_encoder": self.whole_encoder.to_dict() if self.whole_encoder else None,
        }


def forecast(
    model: nn.Module,
    plan: FreezePlan | None = None,
    *,
    batch_size: int = 8,
    source_tokens: int = 512,
    target_tokens: int = 64,
    epochs: int = 3,
    dtype: str | torch.dtype = "bfloat16",
    rows: int = 1000,
    lora_rank: int = 16,
    blocks: BlocksGiven | None = None,
) -> Forecast:
    """Says what a plan will cost, beside full fine-tuning and LoRA, before a step is run. Changes nothing.

    Args:
        model: As for `freeze`; on the meta device too. Its `requires_grad` counts as what the user froze before.
        plan: What to freeze; None is `FreezePlan()`.
        batch_size: Rows a step.
        source_tokens: Tokens read a row: the encoder's, or the prompt's of a decoder-only model.
        target_tokens: Tokens learnt a row: the decoder's; a decoder-only model sees source + target.
        epochs: Passes over the rows; 3, what fine-tuning on some thousand rows usually takes.
        dtype: Of frozen weights, activations and the cache: "bfloat16", "float16" or "float32".
        rows: Rows of the training set; 1000 makes the figures of a run easy to scale.
        lora_rank: Rank of LoRA adapters on every linear layer of every block, as PEFT puts them; 16, a usual choice.
        blocks: Handed to `read_anatomy` where structure does not tell.

    Returns:
        The forecast; `print(it)` shows the table.

    Raises:
        FreezeError: A number below 1, or an unknown dtype.
        PlanError: The plan does not fit the model.
        AnatomyError: The model's blocks cannot be told.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> with torch.device("meta"):
        ...     model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4))
        >>> costs = forecast(model, FreezePlan(decoder_blocks=3), epochs=3)
        >>> {name: round(mode.share_of_full, 2) for name, mode in costs.modes.items()}
        {'full': 1.0, 'frozen': 0.57, 'cached': 0.35, 'lora': 0.66}
        >>> costs.cache_pays, costs.why
        (True, '1.34x fewer FLOPs over 3 epochs, build included.')
    """
    plan = plan or FreezePlan()
    if not isinstance(plan, FreezePlan):
        raise PlanError(f"forecast was given a {type(plan).__name__} as plan; it takes a FreezePlan.")
    numbers: dict[str, Any] = {
        "batch_size": batch_size, "source_tokens": source_tokens, "target_tokens": target_tokens,
        "epochs": epochs, "rows": rows, "lora_rank": lora_rank,
    }  # fmt: skip
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise FreezeError(f"forecast was asked for {name}={value!r}; it is a whole number. Use {name} >= 1.")
    dtype_name = str(dtype).removeprefix("torch.")
    dtype_name = SHORT_DTYPES.get(dtype_name, dtype_name)
    if dtype_name not in DTYPES:
        raise FreezeError(
            f"forecast was asked for dtype={dtype!r}; it knows {', '.join(map(repr, DTYPES))}. Use one of these."
        )
    anatomy = read_anatomy(model, blocks=blocks)
    resolved = plan.resolve(anatomy)
    flow = _read_flow(anatomy, source_tokens, target_tokens)
    given = Forecast(
        anatomy.model_class,
        plan,
        {},
        dtype=dtype_name,
        notes=flow.notes,
        why_no_cut=resolved.why_no_cut,
        **numbers,
    )
    result = replace(given, modes=_modes(given, flow, resolved))
    if len(anatomy.stacks) == 1 or resolved.blocks["encoder"] == len(anatomy.stack("encoder")):
        return result
    beside = FreezePlan(encoder_blocks="all", decoder_blocks=0.5, tied_head=plan.tied_head)
    with suppress(PlanError):  # it may leave nothing to train where the user froze much before; then it is no advice
        other = beside.resolve(anatomy)
        if len(other.cuts) == 2:
            whole = replace(given, plan=beside, why_no_cut="", modes=_modes(given, flow, other))
            result = replace(result, whole_encoder=whole)
    return result


# -------------------------------------------------------------------------------------------------------- the modes


def _modes(asked: Forecast, flow: _Flow, resolved: ResolvedPlan) -> dict[str, ModeForecast]:
    """The four ways to train, the share of full fine-tuning filled in."""
    anatomy = flow.anatomy
    moving = {n for n in resolved.trained if n in resolved.untied or anatomy.parameters[n].requires_grad}
    planned = moving | {n for n in anatomy.parts if n not in resolved.untied and _first_name(anatomy, n) in moving}
    everything = {n for n in anatomy.parts if anatomy.parameters[_first_name(anatomy, n)].is_floating_point()}
    cut = frozenset(part for part in set(anatomy.parts.values()) if _is_cut(part, anatomy, resolved))
    states = sum(flow.tokens[c.stack] * flow.width[c.stack] for c in resolved.cuts)
    modes = {
        "full": _mode(asked, flow, everything),
        "frozen": _mode(asked, flow, planned, untied=resolved.untied),
        "cached": _mode(asked, flow, planned, untied=resolved.untied, cut=cut, states=states),
        "lora": _mode(asked, flow, set(), rank=asked.lora_rank),
    }
    full = max(1, modes["full"].step_flops)
    return {name: replace(mode, share_of_full=mode.step_flops / full) for name, mode in modes.items()}


def _first_name(anatomy: Anatomy, name: str) -> str:
    return anatomy.tie_of[name].names[0] if name in anatomy.tie_of else name


def _mode(
    asked: Forecast,
    flow: _Flow,
    trains: set[str],
    *,
    untied: tuple[str, ...] = (),
    cut: frozenset[Part] = frozenset(),
    states: int = 0,
    rank: int = 0,
) -> ModeForecast:
    """One way to train: `trains` names what moves, `cut` the places that are not run, `rank` that of the adapters."""
    anatomy = flow.anatomy
    width = DTYPES[asked.dtype]
    trained = sum(anatomy.parameters[_first_name(anatomy, name)].numel() for name in untied)
    trained += sum(rank * matrix.adapter for place in flow.places for call in place.calls for matrix in call.matrices)
    frozen = 0
    for name, parameter in anatomy.parameters.items():
        names = set(anatomy.tie_of[name].names if name in anatomy.tie_of else (name,)) - set(untied)
        if names & trains:
            trained += parameter.numel()
        elif not all(anatomy.parts[n] in cut for n in names):
            frozen += parameter.numel()
    cost = _walk(flow, _Pass(trains, cut, rank, width))
    row_flops = cost.forward + cost.backward
    labelled, seen = flow.labelled
    return ModeForecast(
        trainable_parameters=trained,
        weight_bytes=MASTER_BYTES * trained + width * frozen,
        gradient_bytes=MASTER_BYTES * trained,
        optimizer_bytes=2 * MASTER_BYTES * trained,
        activation_bytes=asked.batch_size * round(cost.saved_bytes),
        logit_bytes=asked.batch_size * cost.logit_bytes,
        supervised_logit_bytes=asked.batch_size * cost.logit_bytes * labelled // seen,
        step_flops=asked.batch_size * row_flops,
        head_flops=asked.batch_size * cost.head,
        supervised_head_flops=asked.batch_size * cost.head * labelled // seen,
        build_flops=asked.rows * cost.cut_forward,
        cache_bytes=asked.rows * states * width,
        run_flops=asked.rows * (asked.epochs * row_flops + cost.cut_forward),
        share_of_full=1.0,
    )


def _is_cut(part: Part, anatomy: Anatomy, resolved: ResolvedPlan) -> bool:
    """Whether a place lies in the cached prefix: its output is read back, so its weights may be released."""
    depth = {cut.stack: cut.blocks for cut in resolved.cuts}
    if part.kind in ("embeddings", "tower"):
        # What several stacks share is needed as long as one of them still runs its embeddings.
        return part.stack in depth if part.stack else set(depth) == {stack.name for stack in anatomy.stacks}
    if part.kind == "block":
        return part.index < depth.get(part.stack, 0)
    # The encoder's final norm belongs to its output; a decoder's is never below a trained tensor alone.
    whole_encoder = len(anatomy.stacks) == 2 and depth.get("encoder") == len(anatomy.stack("encoder"))
    norms = {name for name in anatomy.parameters if anatomy.parts[name] == part}
    return whole_encoder and part == Part("final", "encoder") and norms <= set(resolved.frozen)


# ------------------------------------------------------------------------------------------------- one way through


class _Pass(NamedTuple):
    """What moves, what is not run, the rank of the adapters (0: none), and the bytes of an activation."""

    trains: set[str]
    cut: frozenset[Part]
    rank: int
    width: int


@dataclass
class _Cost:
    """Of one row. `head` is the head's share; `cut_forward` is what a cache computes once."""

    forward: int = 0
    backward: int = 0
    head: int = 0
    cut_forward: int = 0
    saved_bytes: float = 0
    logit_bytes: int = 0

    def add(self, other: _Cost) -> None:
        """Adds what a place costs."""
        self.forward += other.forward
        self.backward += other.backward
        self.saved_bytes += other.saved_bytes
        self.logit_bytes += other.logit_bytes


def _walk(flow: _Flow, way: _Pass) -> _Cost:
    """Goes through the model as the data does, and notes where autograd will have to come back."""
    total = _Cost()
    nothing = _Pass(set(), frozenset(), 0, way.width)
    reached: dict[str, bool] = {}  # whether each stack's output needs a gradient
    grad = False
    for stack in flow.anatomy.stacks:
        grad = any(
            name in way.trains for name, part in flow.anatomy.parts.items()
            if part.kind in ("embeddings", "tower") and part.stack in ("", stack.name)
        )  # fmt: skip
        if grad:
            total.saved_bytes += way.width * flow.tokens[stack.name] * flow.width[stack.name]
        for place in flow.places:
            if place.part.stack != stack.name:
                continue
            if place.part in way.cut:
                total.cut_forward += _visit(place, False, False, nothing)[0].forward
            else:
                cost, grad = _visit(place, grad, reached.get("encoder", False), way)
                total.add(cost)
        reached[stack.name] = grad
    for place in flow.places:
        if not place.part.stack:
            cost, grad = _visit(place, grad, False, way)
            total.add(cost)
            if place.part.kind == "head":
                total.head += cost.forward + cost.backward
    return total


def _visit(place: _Place, grad: bool, source_grad: bool, way: _Pass) -> tuple[_Cost, bool]:
    """The cost of one place, and whether its output needs a gradient, given whether its inputs do."""
    cost = _Cost()
    needs: list[bool] = []  # of each call: whether its output needs a gradient
    kept: set[int] = set()  # tensors that a trained layer keeps already: q, k and v read one
    for call in place.calls:
        tokens = place.source_tokens if call.source else place.tokens
        trains = not way.trains.isdisjoint(call.names)
        adapted = way.rank > 0 and any(matrix.adapter for matrix in call.matrices)
        input_grad = (source_grad if call.source else grad) or any(needs[: call.after])
        needs.append(input_grad or trains or adapted)
        for matrix in call.matrices:
            weight_grad = matrix.name in way.trains  # not `trains`: the bias of a frozen tied head may train alone
            cost.forward += 2 * tokens * matrix.weights
            cost.backward += 2 * tokens * matrix.weights * (input_grad + weight_grad)
            if adapted:
                into, out = round(way.rank * matrix.into), round(way.rank * matrix.out)
                cost.forward += 2 * tokens * (into + out)
                # Both gradients of the second factor, whose input always needs one; of the first as elsewhere.
                cost.backward += 2 * tokens * (2 * out + into + into * input_grad)
                cost.saved_bytes += way.width * tokens * way.rank
            if matrix.logits:  # the loss keeps them in fp32, whether they come in bf16 or not
                cost.logit_bytes += MASTER_BYTES * tokens * round(matrix.out)
                cost.saved_bytes += cost.logit_bytes
            elif needs[-1]:
                cost.saved_bytes += way.width * tokens * matrix.out
            if (weight_grad or adapted) and call.reads not in kept:
                cost.saved_bytes += way.width * tokens * matrix.into
        if adapted or any(matrix.name in way.trains for matrix in call.matrices):
            kept.add(call.reads)
        if call.norm and needs[-1]:
            # It keeps its input in fp32: that is the layer's output before it, or a tensor without a gradient.
            cost.saved_bytes += tokens * call.norm * (MASTER_BYTES - way.width * input_grad)
            # Written out in Python and trained, it keeps the normed input besides.
            cost.saved_bytes += tokens * call.norm * MASTER_BYTES * (trains and call.written_out)
    for attention in place.attentions:
        _visit_attention(place, attention, needs, kept, way, cost)
    if place.mlp and needs[place.mlp.down]:
        down = place.calls[place.mlp.down]
        extra = place.mlp.kept if down.reads in kept else max(0, place.mlp.kept)
        cost.saved_bytes += way.width * place.tokens * place.mlp.width * extra
    return cost, grad or any(needs)


def _visit_attention(
    place: _Place, attention: _Attention, needs: list[bool], kept: set[int], way: _Pass, cost: _Cost
) -> None:
    """The scores: forward q k^T and p v, backward one product for each operand that needs a gradient, and for p."""
    *before, last = attention.calls
    crosses = [i for i in attention.calls if place.calls[i].source]
    keys = place.source_tokens if crosses else place.tokens
    products = 2 * place.tokens * keys * attention.width
    cost.forward += products
    keyed = any(needs[i] for i in (crosses or before or [last]))
    asked = any(needs[i] for i in before if i not in crosses) if crosses else keyed
    cost.backward += products * ((keyed or asked) + asked + 2 * keyed) // 2
    if keyed or asked:
        if attention.keeping_heads:
            cost.saved_bytes += attention.keeping_heads * place.tokens * keys * MASTER_BYTES
        elif place.calls[last].reads not in kept:  # a trained output projection has kept it
            cost.saved_bytes += way.width * place.tokens * attention.width // 2


# ---------------------------------------------------------------------------------------- the model as a flow of calls


class _Matrix(NamedTuple):
    """A weight that is multiplied with the tokens.

    `weights`, `into` and `out` are what a token meets: of experts the active share. `adapter` is in + out features
    where LoRA adapts it, else 0.
    """

    name: str
    weights: int
    into: float
    out: float
    adapter: int
    logits: bool = False


@dataclass(frozen=True)
class _Call:
    """One layer of a place, in the order in which it is called.

    `after` is the number of calls that its input can depend on; `source` says that it reads the encoder's output;
    calls with equal `reads` read one tensor; `norm` is the width that a norm works on, `written_out` that it does so
    in Python.
    """

    names: tuple[str, ...]
    owner: str
    matrices: tuple[_Matrix, ...]
    after: int
    source: bool
    reads: int
    norm: int
    written_out: bool


class _Attention(NamedTuple):
    """Calls of one attention, the summed widths of its two products, and its heads where it keeps their scores."""

    calls: tuple[int, ...]
    width: int
    keeping_heads: int


class _Mlp(NamedTuple):
    """The call that ends a block's MLP, its input width, and how many tensors of it are kept beside in- and output."""

    down: int
    width: float
    kept: int


@dataclass(frozen=True)
class _Place:
    """A block, or what lies before or behind the blocks, as the calls that it makes."""

    part: Part
    tokens: int
    source_tokens: int
    calls: tuple[_Call, ...]
    attentions: tuple[_Attention, ...] = ()
    mlp: _Mlp | None = None


@dataclass(frozen=True)
class _Flow:
    """A model as the data goes through it: encoder before decoder, lowest block first, the head last.

    `labelled` is the number of positions that the head learns from and of those that it sees.
    """

    anatomy: Anatomy
    places: tuple[_Place, ...]
    tokens: dict[str, int]
    width: dict[str, int]
    labelled: tuple[int, int]
    notes: tuple[str, ...]


def _read_flow(anatomy: Anatomy, source_tokens: int, target_tokens: int) -> _Flow:
    """Reads off what is called, in which order, and how wide it is."""
    notes: list[str] = []
    names = [stack.name for stack in anatomy.stacks]
    if len(names) == 2:
        tokens = {"encoder": source_tokens, "decoder": target_tokens}
        labelled = (target_tokens, target_tokens)
    elif names == ["decoder"]:
        tokens = {"decoder": source_tokens + target_tokens}
        labelled = (target_tokens, source_tokens + target_tokens)
    else:
        tokens = {"encoder": source_tokens}
        labelled = (source_tokens, source_tokens)
        notes.append("Encoder-only: target tokens are not counted, and the head is counted at every source token.")
    if anatomy.names_of("tower"):
        notes.append("The tower's own forward and backward pass is not counted: its tokens are not text.")
    owners: dict[Part, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, part in anatomy.parts.items():
        owners[part][name.rpartition(".")[0]].append(name)
    modules = dict(anatomy.model.named_modules(remove_duplicate=False))
    places: list[_Place] = []
    width: dict[str, int] = {}
    for stack in anatomy.stacks:
        config = _config_of(stack, anatomy)
        width[stack.name] = _stream_width(stack, config)
        tables = any(isinstance(m, nn.Embedding) for piece in stack.blocks[0].modules for m in piece.modules())
        reader = _Reader(anatomy, modules, _read_experts(config), config, width[stack.name], tables, notes)
        in_blocks = {block.index: list(owners[Part("block", stack.name, block.index)]) for block in stack.blocks}
        heard = _listen(stack, in_blocks, modules, width["encoder"] if len(width) == 2 else 0, notes)
        before, after = Part("embeddings", stack.name), Part("final", stack.name)
        size = tokens[stack.name]
        places.append(_Place(before, size, 0, tuple(_read_calls(reader, before, owners[before], {}))))
        for block in stack.blocks:
            part = Part("block", stack.name, block.index)
            calls = _read_calls(reader, part, owners[part], heard[block.index])
            places.append(_read_block(reader, block, part, size, source_tokens, calls))
        places.append(_Place(after, size, 0, tuple(_read_calls(reader, after, owners[after], {}))))
    if reader.experts.totals and not any(note.startswith("Experts:") for note in notes):
        notes.append("Experts: the config names some, the blocks show none; every weight is counted.")
    for part in (Part("other"), Part("head")):
        calls = _read_calls(reader, part, owners[part], {})
        if part.kind == "head":
            calls = _with_logits(calls)
        places.append(_Place(part, tokens[names[-1]], 0, tuple(calls)))
    return _Flow(anatomy, tuple(places), tokens, width, labelled, tuple(dict.fromkeys(notes)))


def _with_logits(calls: list[_Call]) -> list[_Call]:
    """The head's layers, the last matrix marked as the one that makes the logits."""
    for position in reversed(range(len(calls))):
        if calls[position].matrices:
            *before, last = calls[position].matrices
            marked = replace(calls[position], matrices=(*before, last._replace(logits=True)))
            return [*calls[:position], marked, *calls[position + 1 :]]
    return calls


def _config_of(stack: Stack, anatomy: Anatomy) -> Any:
    """The stack's own config (a text model's inside a larger one, an encoder's of its own), else the model's."""
    config = getattr(stack.root, "config", None) or getattr(anatomy.model, "config", None)
    text = getattr(config, "get_text_config", None)
    # Of a config that encoder and decoder share, the text config of one half would be a copy with renamed fields.
    return text() if callable(text) and len(anatomy.stacks) == 1 else config


def _number(config: Any, *names: str) -> int:
    """The first of these fields that is a positive whole number; 0 where none is."""
    values = (getattr(config, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), 0)


def _stream_width(stack: Stack, config: Any) -> int:
    """The width of the stream between blocks: the config's, else the commonest size in the first block's shapes."""
    if width := _number(config, "hidden_size", "d_model"):
        return width
    sizes = Counter(size for piece in stack.blocks[0].modules for p in piece.parameters() for size in p.shape)
    return sizes.most_common(1)[0][0]


class _Experts(NamedTuple):
    """Numbers of experts that the config names, and how many of them a token meets (0: it does not say)."""

    totals: frozenset[int]
    active: int


def _read_experts(config: Any) -> _Experts:
    """Told by the fields of a config and of the configs in it (DBRX has one for its MLP)."""
    configs = [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))] if config else []
    totals = {
        value for one in configs for name, value in vars(one).items()
        if "experts" in name and "shared" not in name and name not in ACTIVE_EXPERTS
        and isinstance(value, int) and value > 1
    }  # fmt: skip
    active = (_number(one, *ACTIVE_EXPERTS) for one in configs)
    return _Experts(frozenset(totals), next((number for number in active if number), 0))


class _Reader(NamedTuple):
    """What reading a place needs to know of the model around it."""

    anatomy: Anatomy
    modules: dict[str, nn.Module]
    experts: _Experts
    config: Any
    width: int
    position_bias: bool
    notes: list[str]


def _read_calls(reader: _Reader, part: Part, owners: dict[str, list[str]], heard: dict[str, _Heard]) -> list[_Call]:
    """The layers of a place in the order of their calls; those not heard follow, in the order of registration."""
    from transformers.pytorch_utils import Conv1D  # here, so that `import hf_freeze` is quick

    calls: list[_Call] = []
    for position, owner in enumerate([*heard, *(owner for owner in owners if owner not in heard)]):
        module = reader.modules[owner]
        note = heard.get(owner, _Heard(position, False, -position - 1, 0))
        shapes = {n: tuple(reader.anatomy.parameters[_first_name(reader.anatomy, n)].shape) for n in owners[owner]}
        tables = isinstance(module, nn.Embedding | nn.EmbeddingBag) or (
            part.kind == "embeddings" and not isinstance(module, nn.Linear | Conv1D)
        )
        matrices = [] if tables else _read_matrices(reader, part, owner, module, shapes)
        leaf = next(module.children(), None) is None
        is_norm = leaf and not matrices and all(len(shape) < 2 for shape in shapes.values())
        calls.append(
            _Call(
                names=tuple(owners[owner]),
                owner=owner,
                matrices=tuple(matrices),
                after=note.after,
                source=note.source,
                reads=note.reads,
                norm=(note.width or max(map(math.prod, shapes.values()))) if is_norm else 0,
                written_out=not isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm),
            )
        )
    return calls


def _read_matrices(
    reader: _Reader, part: Part, owner: str, module: nn.Module, shapes: dict[str, tuple[int, ...]]
) -> list[_Matrix]:
    """The weights of one layer that are multiplied with the tokens; of experts the share that a token meets."""
    from transformers.pytorch_utils import Conv1D

    stacked = {
        name: shape for name, shape in shapes.items()
        if len(shape) == 3 and shape[0] in reader.experts.totals and not isinstance(module, nn.Conv1d)
    }  # fmt: skip
    total = next(iter(stacked.values()))[0] if stacked else _listed_experts(reader, part, owner)
    share = _active_share(reader, total) if total else Fraction(1)
    found: list[_Matrix] = []
    for name, (
        _,
        *ends,
    ) in stacked.items():  # the first maps from the stream, the next ones to it; their biases stand beside them
        inner = math.prod(ends) // reader.width if reader.width in ends else ends[0]
        into, out = (inner, reader.width) if found else (reader.width, inner)
        times = int(share * total)
        found.append(_Matrix(name, times * into * out, times * into, times * out, 0))
    if stacked:
        return found
    adaptable = part.kind == "block" and isinstance(module, nn.Linear | Conv1D) and not _is_adapter(owner, reader)
    for name, shape in shapes.items():
        if len(shape) < 2:
            continue
        into = shape[0] if isinstance(module, Conv1D) else shape[1]
        out = math.prod(shape) // into
        weights = math.prod(shape) * share
        found.append(_Matrix(name, int(weights), float(into * share), float(out * share), (into + out) * adaptable))
    return found


def _listed_experts(reader: _Reader, part: Part, owner: str) -> int:
    """Of a layer inside a block's list of like modules, as many as the config names experts: how many; else 0."""
    if part.kind != "block" or not reader.experts.totals:
        return 0
    pieces = reader.anatomy.stack(part.stack).blocks[part.index].names
    for name in _ancestors(owner):
        around = reader.modules[name]
        if not _inside(name, pieces) or not isinstance(around, nn.ModuleList | nn.ModuleDict):
            continue
        if len(around) in reader.experts.totals and len({type(child) for child in around.children()}) == 1:
            return len(around)
    return 0


def _active_share(reader: _Reader, total: int) -> Fraction:
    active = reader.experts.active
    if 0 < active <= total:
        reader.notes.append(f"Experts: a token meets {active} of {total}; the FLOPs count these, memory counts all.")
        return Fraction(active, total)
    reader.notes.append(f"Experts: the config does not say how many of {total} a token meets; all are counted.")
    return Fraction(1)


def _ancestors(name: str) -> Iterable[str]:
    """The names of the modules around a module, innermost first."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _is_adapter(owner: str, reader: _Reader) -> bool:
    """Whether a layer belongs to an adapter that PEFT has put beside a `base_layer`."""
    around = (name for name in _ancestors(owner) if hasattr(reader.modules[name], "base_layer"))
    return any(owner != f"{name}.base_layer" for name in around)


def _read_block(
    reader: _Reader, block: Block, part: Part, tokens: int, source_tokens: int, calls: list[_Call]
) -> _Place:
    """A block with its attentions, told by the class name of a module that holds layers, and its MLP."""
    named = [
        f"{name}.{inner}".rstrip(".")
        for name, piece in zip(block.names, block.modules, strict=True)
        for inner, module in piece.named_modules()
        if "attention" in type(module).__name__.lower()
    ]
    config = reader.config
    if getattr(config, "is_heterogeneous", False):  # Gemma 4: the heads of each layer have a width of their own
        config = config.per_layer_config[block.index]
    heads = _number(config, "num_attention_heads", "num_heads", "n_head", "n_heads")
    width = _number(config, "head_dim", "d_kv") or (reader.width // heads if heads else 0)
    of_scores = _number(config, "qk_head_dim") or width
    of_values = _number(config, "v_head_dim") or width
    eager = getattr(reader.config, "_attn_implementation", None) == "eager"
    attentions: list[_Attention] = []
    inside: set[int] = set()
    for name in named:
        if any(other != name and _inside(other, [name]) for other in named):
            continue  # BertAttention around BertSelfAttention
        indices = tuple(i for i, call in enumerate(calls) if _inside(call.owner, [name]))
        if any(calls[i].matrices for i in indices):
            inside.update(indices)
            # A learnt position bias (T5) makes a mask in each block, as large as the scores in a padded batch.
            keeps = eager or (reader.position_bias and not any(calls[i].source for i in indices))
            attentions.append(_Attention(indices, heads * (of_scores + of_values), heads * keeps))
    if attentions and not heads:
        reader.notes.append("No number of heads in a config: FLOPs and memory of attention scores are left out.")
        attentions = []
    elif not attentions:
        reader.notes.append(
            "Blocks without attention: their layers are counted; what a state-space scan computes and keeps is not."
        )
    mlp = _read_mlp(block, calls, inside)
    return _Place(part, tokens, source_tokens, tuple(calls), tuple(attentions), mlp)


def _inside(name: str, around: Iterable[str]) -> bool:
    """Whether a module is one of those named or lies below one."""
    return any(name == other or name.startswith(f"{other}.") for other in around)


def _read_mlp(block: Block, calls: list[_Call], in_attention: set[int]) -> _Mlp | None:
    """The MLP of a block: of the layers outside attention those side by side whose last one reads the widest tensor."""
    groups: dict[str, list[tuple[int, _Matrix]]] = defaultdict(list)
    for index, call in enumerate(calls):
        if index not in in_attention:
            around = call.owner if len(call.matrices) > 1 else call.owner.rpartition(".")[0]
            groups[around] += [(index, matrix) for matrix in call.matrices]
    found = max(groups.values(), key=lambda group: (len(group) > 1, group[-1][1].into if group else 0), default=[])
    if not found:
        return None
    *before, (down, last) = found
    gated = sum(matrix.out for _, matrix in before) == 2 * last.into  # act(gate) * up keeps both its factors
    return _Mlp(down, last.into, int(gated) + _kept_by_activation(block.modules))


def _kept_by_activation(pieces: Iterable[nn.Module]) -> int:
    """Tensors that a block's activation keeps for the backward pass beside its input: 0 for GELU and SiLU, whose own
    kernel recomputes, 3 for GELUs written out in Python, -1 for ReLU, which keeps its output in place of its input.
    """
    counts: list[int] = []
    for module in (m for piece in pieces for m in piece.modules()):
        tensors = [*module.parameters(), *module.buffers()]
        if tensors or next(module.children(), None) is not None or isinstance(module, nn.Dropout | nn.Identity):
            continue
        kept: list[torch.Tensor] = []
        given = torch.ones(8, requires_grad=True, device="cpu")
        with suppress(Exception), torch.enable_grad():  # a leaf that takes anything but a tensor is no activation
            with torch.autograd.graph.saved_tensors_hooks(_keeper(kept), lambda tensor: tensor):
                made = module(given)
            if isinstance(made, torch.Tensor) and made.shape == given.shape and made is not given:
                counts.append(len({t.data_ptr() for t in kept if t.numel() == 8} - {made.data_ptr()}) - 1)
    return max(counts, default=0)


def _keeper(kept: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)  # held, so that no two have one address
        return tensor

    return keep


# ----------------------------------------------------------------------------------------- in which order layers run


class _Heard(NamedTuple):
    """How a layer was called, see `_Call`; `width` is the size of what it reads, a token."""

    after: int
    source: bool
    reads: int
    width: int


class _Listener:
    """Hears in which order a block calls its layers, and which of them read one and the same tensor."""

    def __init__(self) -> None:
        self.heard: dict[str, _Heard] = {}
        self.seen: dict[int, tuple[int, torch.Tensor]] = {}  # the tensors are held, so that no two have one id

    def hear(self, key: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook; only a layer's first call counts."""
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        value = next((tensor for tensor in given if tensor.is_floating_point()), None)
        if value is None or key in self.heard:
            return
        after, _ = self.seen.setdefault(id(value), (len(self.heard), value))
        source = SOURCE_TOKENS in value.shape[:-1] and OWN_TOKENS not in value.shape[:-1]
        width = value.numel() // (SOURCE_TOKENS if source else OWN_TOKENS)
        self.heard[key] = _Heard(0 if source else after, source, id(value), width)


class _Enough(Exception):
    """Raised by a hook when a block of every kind has run."""


def _listen(
    stack: Stack, owners: dict[int, list[str]], modules: dict[str, nn.Module], encoder_width: int, notes: list[str]
) -> dict[int, dict[str, _Heard]]:
    """Runs the stack on a few tokens up to its last new kind of block, to hear how each kind calls its layers.

    Args:
        stack: The stack.
        owners: Names of the layers that hold weights, by block. Blocks with equal ones are of one kind.
        modules: Modules by name.
        encoder_width: Width of the encoder's output, for a stack that reads it; else 0.
        notes: Told the reason where the stack cannot be run; then nothing is heard.

    Returns:
        What was heard of each layer, in the order of their calls, by block.
    """
    relative = {i: {_relative(name, stack.blocks[i].names): name for name in names} for i, names in owners.items()}
    kinds: dict[frozenset[str], int] = {}
    for index, layers in relative.items():
        kinds.setdefault(frozenset(layers), index)
    listeners = {index: _Listener() for index in kinds.values()}

    def stop(*_: Any) -> None:
        raise _Enough

    handles = [
        modules[name].register_forward_pre_hook(partial(listener.hear, key), with_kwargs=True)
        for index, listener in listeners.items()
        for key, name in relative[index].items()
    ]
    handles.append(stack.blocks[max(listeners)].modules[-1].register_forward_hook(stop))
    try:
        failure = _run(stack.root, encoder_width)
    finally:
        for handle in handles:
            handle.remove()
    if failure:
        notes.append(
            f"{stack.name}: its blocks could not be run on a few tokens ({failure}); their layers are taken in the "
            "order of registration, and all of them as reading the stack's own tokens."
        )
        return {index: {} for index in relative}
    return {
        index: {layers[key]: note for key, note in listeners[kinds[frozenset(layers)]].heard.items()}
        for index, layers in relative.items()
    }


def _relative(name: str, pieces: tuple[str, ...]) -> str:
    """A layer's name within its block; XLM's blocks have several pieces, hence the piece's place."""
    place = next(i for i, piece in enumerate(pieces) if _inside(name, [piece]))
    return f"{place}{name[len(pieces[place]) :]}"


def _run(root: nn.Module, encoder_width: int) -> str:
    """Calls a stack on a few token ids without a graph; the reason where no block of every kind was reached."""
    if any(isinstance(module, _BatchNorm) for module in root.modules()):
        return "running it would move the statistics of its batch norms"
    first = next(root.parameters())
    parameters = inspect.signature(root.forward).parameters
    given: dict[str, Any] = {
        name: None for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    }
    given["input_ids"] = torch.zeros((1, OWN_TOKENS), dtype=torch.long, device=first.device)
    if "use_cache" in parameters:
        given["use_cache"] = False
    if first.is_meta and "attention_mask" in parameters:
        # A finished mask is taken as it is; to make one, values would be looked at, which meta tensors lack.
        shape = (1, 1, OWN_TOKENS, OWN_TOKENS)
        given["attention_mask"] = torch.ones(shape, dtype=torch.bool, device=first.device)
    if encoder_width:
        given["encoder_hidden_states"] = torch.zeros(
            (1, SOURCE_TOKENS, encoder_width), dtype=first.dtype, device=first.device
        )
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for seed in range(8):  # LayerDrop of a model in train mode may skip a block; then another seed
                torch.manual_seed(seed)
                root(**given)
    except _Enough:
        return ""
    except Exception as error:  # a foreign forward may raise anything; its reason goes into the notes
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    return "its forward ended before"


# --------------------------------------------------------------------------------------------------------- the table


def _table(made: Forecast) -> Table:
    rows = [_row(name, made.modes[name]) for name in made.modes]
    if beside := made.whole_encoder:
        rows += [_row(f"{name} *", beside.modes[name]) for name in ("frozen", "cached")]
    tokens = f"{made.source_tokens} + {made.target_tokens}"
    lines = [
        f"A step: {made.batch_size} rows of {tokens} tokens, {made.dtype}; a run: {made.epochs} "
        f"epoch{'s' * (made.epochs != 1)} of {made.rows:,} rows. LoRA: rank {made.lora_rank}.",
        f"Cache {'pays' if made.cache_pays else 'does not pay'}: {made.why}",
    ]
    cached = made.modes["cached"]
    if cached.supervised_head_flops < cached.head_flops:
        saved = cached.logit_bytes - cached.supervised_logit_bytes
        lines.append(
            f"Logits only at the target positions: a cached step falls to {_flops_text(cached.supervised_step_flops)}, "
            f"its memory by {count_text(saved, 'B')}."
        )
    if made.whole_encoder:
        plan = made.whole_encoder.plan
        lines.append(
            f"* With encoder_blocks={plan.encoder_blocks!r}, decoder_blocks={plan.decoder_blocks!r}: the backward pass "
            "ends in the decoder, and both stacks can be cached. As planned it runs through the whole decoder."
        )
    columns = ("mode", "trains", "weights", "grads", "AdamW", "saved", "memory", "a step", "share", "a run", "disk")
    return Table(f"{made.model_class}: forecast", columns, tuple(rows), (*lines, *made.notes))


def _row(name: str, mode: ModeForecast) -> tuple[str, ...]:
    sizes = (mode.weight_bytes, mode.gradient_bytes, mode.optimizer_bytes, mode.activation_bytes, mode.memory_bytes)
    return (
        name,
        count_text(mode.trainable_parameters),
        *(count_text(size, "B") for size in sizes),
        _flops_text(mode.step_flops),
        f"{100 * mode.share_of_full:.0f} %",
        _flops_text(mode.run_flops),
        count_text(mode.cache_bytes, "B"),
    )


def _flops_text(flops: float) -> str:
    """Three digits and a unit.

    >>> _flops_text(1_942_500_000_000_000), _flops_text(728_421_000_000), _flops_text(52)
    ('1.94 PFLOP', '728 GFLOP', '0.00 MFLOP')
    """
    factor, prefix = next(((f, p) for f, p in FLOP_UNITS if flops >= f), FLOP_UNITS[-1])
    scaled = flops / factor
    return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {prefix}FLOP"
