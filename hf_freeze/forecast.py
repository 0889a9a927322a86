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

from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_freeze.anatomy import Anatomy, BlocksGiven, Part, read_anatomy
from hf_freeze.errors import FreezeError, PlanError
from hf_freeze.flow import Attention, Flow, Place, first_name, read_flow
from hf_freeze.given import check_model
from hf_freeze.plan import FreezePlan, ResolvedPlan, given_plan
from hf_freeze.tables import Table, count_text

__all__ = ["Forecast", "ModeForecast", "forecast"]

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MASTER_BYTES = 4  # trainable weights, their gradients and both moments stay in fp32 under autocast
FLOP_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
LEAST_GAIN = 1.05  # below 5 % fewer FLOPs, writing and reading the states eats what the cache saves


@dataclass(frozen=True)
class ModeForecast:
    """What one way to train costs. A step is one batch; a run is all epochs.

    Attributes:
        trainable_parameters: Parameters that the optimizer moves.
        weight_bytes: Weights in memory: 4 bytes a trainable parameter, those of `frozen_dtype` a frozen one.
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
        dtype: Of activations.
        frozen_dtype: Of frozen weights and the cache.
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
    frozen_dtype: str
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
        sizes = ("batch_size", "source_tokens", "target_tokens", "epochs", "rows")
        plain = ("model_class", *sizes, "dtype", "frozen_dtype", "lora_rank")
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
    frozen_dtype: str | torch.dtype | None = None,
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
        dtype: Of activations, frozen weights and the cache: "bfloat16", "float16" or "float32".
        frozen_dtype: Of frozen weights and the cache where it is another one, as under autocast, which leaves weights
            and what crosses the cut in fp32; None is `dtype`.
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
    check_model("forecast", model)
    plan = given_plan("forecast", plan)
    numbers: dict[str, Any] = {
        "batch_size": batch_size, "source_tokens": source_tokens, "target_tokens": target_tokens,
        "epochs": epochs, "rows": rows, "lora_rank": lora_rank,
    }  # fmt: skip
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise FreezeError(f"forecast was asked for {name}={value!r}; it is a whole number. Use {name} >= 1.")
    dtype_name = _name_dtype("dtype", dtype)
    frozen_name = dtype_name if frozen_dtype is None else _name_dtype("frozen_dtype", frozen_dtype)
    anatomy = read_anatomy(model, blocks=blocks)
    resolved = plan.resolve(anatomy)
    flow = read_flow(anatomy, source_tokens, target_tokens)
    given = Forecast(
        anatomy.model_class,
        plan,
        {},
        dtype=dtype_name,
        frozen_dtype=frozen_name,
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


def _name_dtype(argument: str, dtype: str | torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    name = SHORT_DTYPES.get(name, name)
    if name not in DTYPES:
        raise FreezeError(
            f"forecast was asked for {argument}={dtype!r}; it knows {', '.join(map(repr, DTYPES))}. Use one of these."
        )
    return name


# -------------------------------------------------------------------------------------------------------- the modes


def _modes(asked: Forecast, flow: Flow, resolved: ResolvedPlan) -> dict[str, ModeForecast]:
    """The four ways to train, the share of full fine-tuning filled in."""
    anatomy = flow.anatomy
    moving = {n for n in resolved.trained if n in resolved.untied or anatomy.parameters[n].requires_grad}
    planned = moving | {n for n in anatomy.parts if n not in resolved.untied and first_name(anatomy, n) in moving}
    everything = {n for n in anatomy.parts if anatomy.parameters[first_name(anatomy, n)].is_floating_point()}
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


def _mode(
    asked: Forecast,
    flow: Flow,
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
    trained = sum(anatomy.parameters[first_name(anatomy, name)].numel() for name in untied)
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
        weight_bytes=MASTER_BYTES * trained + DTYPES[asked.frozen_dtype] * frozen,
        gradient_bytes=MASTER_BYTES * trained,
        optimizer_bytes=2 * MASTER_BYTES * trained,
        activation_bytes=asked.batch_size * round(cost.saved_bytes),
        logit_bytes=asked.batch_size * cost.logit_bytes,
        supervised_logit_bytes=asked.batch_size * cost.logit_bytes * labelled // seen,
        step_flops=asked.batch_size * row_flops,
        head_flops=asked.batch_size * cost.head,
        supervised_head_flops=asked.batch_size * cost.head * labelled // seen,
        build_flops=asked.rows * cost.cut_forward,
        cache_bytes=asked.rows * states * DTYPES[asked.frozen_dtype],
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


def _walk(flow: Flow, way: _Pass) -> _Cost:
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


def _visit(place: Place, grad: bool, source_grad: bool, way: _Pass) -> tuple[_Cost, bool]:
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
    place: Place, attention: Attention, needs: list[bool], kept: set[int], way: _Pass, cost: _Cost
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


# --------------------------------------------------------------------------------------------------------- the table


def _table(made: Forecast) -> Table:
    rows = [_row(name, made.modes[name]) for name in made.modes]
    if beside := made.whole_encoder:
        rows += [_row(f"{name} *", beside.modes[name]) for name in ("frozen", "cached")]
    tokens = f"{made.source_tokens} + {made.target_tokens}"
    apart = "" if made.frozen_dtype == made.dtype else f" (frozen weights and cache {made.frozen_dtype})"
    lines = [
        f"A step: {made.batch_size} rows of {tokens} tokens, {made.dtype}{apart}; a run: {made.epochs} "
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
