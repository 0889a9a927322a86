"""Forecasts what a plan costs before a step is run: parameters, bytes, FLOPs, disk, and whether a cache pays.

Four ways to train are set side by side: full, frozen (the plan), cached (the plan, its prefix computed once) and LoRA.
FLOPs and saved activations are those of a step that `costs` runs on the meta device, so a model there will do; seconds
are not forecast, they are measured.

    FLOPs: of matrix products, as torch counts them, each gradient only where autograd computes it. Masked scores count
        (eager attention computes them); what is elementwise does not.
    Saved activations: what autograd keeps, norms computed in fp32. Scores are not kept, except by eager attention.
    Memory: AdamW in mixed precision, 16 bytes a trainable parameter (fp32 weight, gradient, two moments). Not counted:
        the bf16 copies that autocast makes of trained weights (2 bytes each), dropout masks, buffers, fragmentation.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from hf_freeze.anatomy import Anatomy, BlocksGiven, Part, read_anatomy
from hf_freeze.costs import Costs, EmptyCopy
from hf_freeze.cuts import Cut
from hf_freeze.errors import FreezeError, PlanError
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
    names = [stack.name for stack in anatomy.stacks]
    tokens = {"encoder": source_tokens, "decoder": target_tokens + (source_tokens if len(names) == 1 else 0)}
    empty = EmptyCopy(anatomy, tokens, getattr(torch, dtype_name))
    given = Forecast(
        anatomy.model_class,
        plan,
        {},
        dtype=dtype_name,
        frozen_dtype=frozen_name,
        why_no_cut=resolved.why_no_cut,
        **numbers,
    )
    result = replace(given, modes=_modes(given, empty, resolved))
    if len(names) == 2 and resolved.blocks["encoder"] < len(anatomy.stack("encoder")):
        beside = FreezePlan(encoder_blocks="all", decoder_blocks=0.5, tied_head=plan.tied_head)
        with suppress(PlanError):  # it may leave nothing to train where the user froze much before; then: no advice
            other = beside.resolve(anatomy)
            if len(other.cuts) == 2:
                whole = replace(given, plan=beside, why_no_cut="", modes=_modes(given, empty, other))
                result = replace(result, whole_encoder=whole)
    notes = list(empty.notes)
    if names == ["encoder"]:
        notes.insert(0, "Encoder-only: target tokens are not counted.")
    if anatomy.names_of("tower"):
        notes.append("The tower's own forward and backward pass is not counted: its tokens are not text.")
    return replace(result, notes=tuple(notes))


def _name_dtype(argument: str, dtype: str | torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    name = SHORT_DTYPES.get(name, name)
    if name not in DTYPES:
        raise FreezeError(
            f"forecast was asked for {argument}={dtype!r}; it knows {', '.join(map(repr, DTYPES))}. Use one of these."
        )
    return name


# -------------------------------------------------------------------------------------------------------- the modes


def _modes(asked: Forecast, empty: EmptyCopy, resolved: ResolvedPlan) -> dict[str, ModeForecast]:
    """The four ways to train, the share of full fine-tuning filled in."""
    anatomy = empty.anatomy
    first_of = {name: anatomy.tie_of[name].names[0] if name in anatomy.tie_of else name for name in anatomy.parts}
    moving = {n for n in resolved.trained if n in resolved.untied or anatomy.parameters[n].requires_grad}
    planned = moving | {name for name, first in first_of.items() if name not in resolved.untied and first in moving}
    everything = {name for name, first in first_of.items() if anatomy.parameters[first].is_floating_point()}
    cut = frozenset(part for part in set(anatomy.parts.values()) if _is_cut(part, anatomy, resolved))
    for _ in range(2):  # again by shapes, all of them, where one could not be run; else they are known
        frozen = empty.count(planned, untied=resolved.untied)  # first: its blocks keep what others share
        full, lora = empty.count(everything), empty.count(set(), rank=asked.lora_rank)
    adapters = asked.lora_rank * sum(sum(layer.weight.shape) for layer in empty.adaptable.values())
    modes = {
        "full": _mode(asked, anatomy, full, everything),
        "frozen": _mode(asked, anatomy, frozen, planned, untied=resolved.untied),
        "cached": _mode(asked, anatomy, frozen, planned, untied=resolved.untied, cut=cut, cuts=resolved.cuts),
        "lora": _mode(asked, anatomy, lora, set(), adapters=adapters),
    }
    most = max(1, modes["full"].step_flops)
    return {name: replace(mode, share_of_full=mode.step_flops / most) for name, mode in modes.items()}


def _mode(
    asked: Forecast,
    anatomy: Anatomy,
    costs: Costs,
    trains: set[str],
    *,
    untied: tuple[str, ...] = (),
    cut: frozenset[Part] = frozenset(),
    cuts: tuple[Cut, ...] = (),
    adapters: int = 0,
) -> ModeForecast:
    """One way to train: `trains` names what moves, `cut` the parts that are not run again."""
    trained = adapters + sum(anatomy.parameters[anatomy.tie_of[name].names[0]].numel() for name in untied)
    frozen = 0
    for name, parameter in anatomy.parameters.items():
        names = set(anatomy.tie_of[name].names if name in anatomy.tie_of else (name,)) - set(untied)
        if names & trains:
            trained += parameter.numel()
        elif not all(anatomy.parts[n] in cut for n in names):
            frozen += parameter.numel()
    head = Part("head")
    head_flops = costs.forward[head] + costs.backward[head]
    prefix_flops = sum(costs.forward[part] for part in cut)  # nothing there moves, so it has no backward pass
    row_flops = costs.forward.total() + costs.backward.total() - prefix_flops
    decoder_only = [stack.name for stack in anatomy.stacks] == ["decoder"]
    labelled, seen = asked.target_tokens, asked.target_tokens + asked.source_tokens
    if not decoder_only:
        labelled = seen
    return ModeForecast(
        trainable_parameters=trained,
        weight_bytes=MASTER_BYTES * trained + DTYPES[asked.frozen_dtype] * frozen,
        gradient_bytes=MASTER_BYTES * trained,
        optimizer_bytes=2 * MASTER_BYTES * trained,
        activation_bytes=asked.batch_size * costs.kept.total(),
        logit_bytes=asked.batch_size * costs.logit_bytes,
        supervised_logit_bytes=asked.batch_size * costs.logit_bytes * labelled // seen,
        step_flops=asked.batch_size * row_flops,
        head_flops=asked.batch_size * head_flops,
        supervised_head_flops=asked.batch_size * head_flops * labelled // seen,
        build_flops=asked.rows * prefix_flops,
        cache_bytes=asked.rows * sum(costs.states[stack] for stack, _ in cuts) * DTYPES[asked.frozen_dtype],
        run_flops=asked.rows * (asked.epochs * row_flops + prefix_flops),
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
