"""`advise`: what it takes and refuses, and how rows, probe and choice come together."""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from hf_freeze.anatomy import Anatomy, BlocksGiven, read_anatomy
from hf_freeze.depth.advice import Advice, DepthProbe
from hf_freeze.depth.choice import (
    Comparison,
    block_share,
    data_reason,
    depth_of,
    gradient_reason,
    longer_run_rate,
    plan_warnings,
)
from hf_freeze.depth.probe import MOST_DOUBLINGS, RATES, Probe, Trial, as_it_was
from hf_freeze.depth.rows import LEAST_VALIDATION, Collator, ProbeRows, draw_rows, row_warnings
from hf_freeze.errors import FreezeError
from hf_freeze.forecast import Forecast, forecast
from hf_freeze.freezing import freeze_record
from hf_freeze.given import check_model
from hf_freeze.plan import FreezePlan, given_plan, plan_at_depth
from hf_freeze.prefix.states import autocast, move
from hf_freeze.processes import rank_and_world
from hf_freeze.tables import count_text
from hf_freeze.tensors import unwrap

__all__ = ["advise"]

PRECISIONS = (None, "fp32", "bf16")
HALVINGS = 3  # of the blocks that train: half, a quarter, an eighth
LEAST_DEPTHS = 3  # else depth 0, whose steps cost most, is probed too


def advise(
    model: nn.Module,
    train_dataset: Any,
    data_collator: Collator | None = None,
    *,
    validation_dataset: Any = None,
    tokenizer: Any = None,
    plan: FreezePlan | None = None,
    depths: Sequence[int] | None = None,
    learning_rates: Sequence[float] | None = None,
    steps: int = 16,
    batch_size: int = 8,
    validation_rows: int = 64,
    epochs: float = 3,
    precision: str | None = None,
    memory_bytes: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    blocks: BlocksGiven | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Advice:
    """Probes several depths for a few steps each, and recommends one with its reasons. Leaves the model as it was.

    Deepest first, since its steps cost least: what lies above each depth is trained with AdamW, a warm-up and a linear
    decay to 0, for the same steps on the same batches, and put back. Of the depths whose loss on the held-out rows is
    within one standard error of the best one's (or half a percent of it), the deepest is taken. The learning rate is
    the lowest within noise of the best one tried at that depth, times (steps of the probe / steps of the run) ** 0.32:
    a probe of few steps likes higher rates than a run does. What the probe cannot know is among the reasons.

    Args:
        model: With a loss, on the device where it trains; not frozen by `freeze`. What the user froze by hand or PEFT
            did stays so at every depth.
        train_dataset: Training rows with __len__ and __getitem__, as Trainer takes them.
        data_collator: The one of training; None is transformers' default_data_collator.
        validation_dataset: Held-out rows; None sets a tenth of `train_dataset` aside, 8 rows at least.
        tokenizer: Checked against the model and the rows, as a copy; None checks only what the rows themselves show.
        plan: One that you have in mind. It is probed too and judged in the warnings; what it says beside the number of
            blocks holds at every depth.
        depths: Frozen blocks of each plan to probe, an encoder's counted before its decoder's. None leaves a half, a
            quarter and an eighth of the blocks to train (of 30: 15, 22, 26), and 0 where these are fewer than three.
        learning_rates: To try at every depth. None tries 5e-4 and 1e-3 at the deepest one, and twice the last while it
            is the best; at each other the best of the one before and half of that.
        steps: Of training at each depth and rate; no more than the run has.
        batch_size: Rows a step, of the probe and of the run.
        validation_rows: At most so many held-out rows. 64 reviews tell depths apart whose losses differ by 1 or 2 %.
        epochs: Of the run that the advice is for.
        precision: Of training: "bf16" for autocast (Trainer's `bf16=True`), "fp32" or None for none.
        memory_bytes: A plan that needs more is not probed; None is what is free on the model's device, and what the
            model itself takes.
        cache_dir: Where the probe's states lie, for a `PrefixCache` of the run to find; None is a temporary folder.
        blocks: Handed to `read_anatomy` where structure does not tell.
        seed: Chooses the rows and their order.
        progress: Show a bar with the time left.

    Returns:
        The advice; `print(it)` shows the table, `freeze(model, it.plan)` applies it.

    Raises:
        FreezeError: No rows or too few, an iterable dataset, rows without labels or with ids past the embeddings, a
            model without a loss or with one block only, one that is frozen already, no memory for any depth, or rates
            that all diverge.
        PlanError: A depth beyond the model.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
        >>> rows = [{"input_ids": [n % 16, 5, 6, 7], "labels": [-100, 5, 6, 7]} for n in range(24)]
        >>> advice = advise(model, rows, depths=[2, 3], steps=2, batch_size=4, progress=False)
        >>> [probe.depth for probe in advice.probes], advice.depth in (2, 3), advice.plan.decoder_blocks == advice.depth
        ([3, 2], True, True)
    """
    started = time.perf_counter()
    _check_settings(steps, batch_size, validation_rows, epochs, precision, learning_rates)
    check_model("advise", model)
    if plan is not None:
        plan = given_plan("advise", plan)
    core = unwrap(model)
    _refuse_model(core)
    anatomy = read_anatomy(core, blocks=blocks)
    notes: list[str] = []
    plans = _plans(anatomy, depths, plan, notes)
    if data_collator is None:
        from transformers import default_data_collator

        data_collator = default_data_collator
    with as_it_was(core), tempfile.TemporaryDirectory(prefix="hf_freeze_advice_") as folder:
        rows = draw_rows(
            core,
            train_dataset,
            validation_dataset,
            data_collator,
            steps=steps,
            batch_size=batch_size,
            epochs=epochs,
            validation_rows=validation_rows,
            seed=seed,
        )
        odd = row_warnings(rows, data_collator, core, tokenizer)
        bar = tqdm(desc="advice", disable=not progress, bar_format="{l_bar}{bar}| {elapsed}<{remaining}")
        probe = Probe(core, anatomy, rows, data_collator, plans, batch_size, precision, blocks, bar, notes)
        with bar:
            places = probe.try_loss()
            costs = {depth: _forecast(probe, depth, places) for depth in plans}
            considered = {depth: _unprobed(plans[depth], depth, costs[depth]) for depth in plans}
            able, limit = _affordable(considered, memory_bytes, core)
            gradients = _gradients(probe) if _full_memory(costs) <= limit else None
            comparison = _search(probe, able, considered, learning_rates, Path(cache_dir or folder), progress)
            if not probe.cached:  # what was declined to the probe will be to the run
                considered = {depth: _unprobed(plans[depth], depth, costs[depth], cached=False) for depth in plans}
                able, _ = _affordable(considered, limit, core)
                comparison = replace(comparison, trials={depth: comparison.trials[depth] for depth in able})
    if gradients is not None:
        considered = {
            depth: replace(each, gradient_share=block_share(gradients, anatomy, plans[depth]))
            for depth, each in considered.items()
        }
    chosen = comparison.choose()
    run_steps = math.ceil(epochs * math.ceil(rows.total / batch_size))
    rate = comparison.choose_rate(chosen.depth)
    return Advice(
        model_class=anatomy.model_class,
        plan=plans[chosen.depth],
        depth=chosen.depth,
        blocks=_count_blocks(anatomy),
        learning_rate=longer_run_rate(rate, len(rows.batches), run_steps),
        probes=tuple(
            comparison.complete(each) if depth in able else replace(each, verdict="needs more memory than there is")
            for depth, each in considered.items()
        ),
        train_loss=comparison.before[0],
        validation_loss=comparison.before[1],
        gradients=gradients,
        reasons=(
            comparison.reason(),
            _rate_reason(rate, chosen.depth, comparison, len(rows.batches), run_steps),
            *([gradient_reason(gradients, considered[chosen.depth])] if gradients is not None else []),
            data_reason(anatomy, considered[chosen.depth], rows.total, rows.label_share),
            _memory_reason(considered[chosen.depth], limit),
            *_unknown(chosen.depth, able, comparison, rows, run_steps),
            *notes,
        ),
        warnings=(
            *comparison.warnings(),
            *([] if plan is None else plan_warnings(plan, anatomy, comparison)),
            *odd,
        ),
        steps=len(rows.batches),
        batch_size=batch_size,
        run_steps=run_steps,
        seconds=time.perf_counter() - started,
    )


# ----------------------------------------------------------------------------------------------------------- refusals


def _check_settings(
    steps: int,
    batch_size: int,
    validation_rows: int,
    epochs: float,
    precision: str | None,
    learning_rates: Sequence[float] | None,
) -> None:
    counts = {
        "steps": (steps, 1),
        "batch_size": (batch_size, 1),
        "validation_rows": (validation_rows, LEAST_VALIDATION),
    }
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise FreezeError(f"advise was asked for {name}={value!r}; it is a whole number, {least} or more.")
    if not 0 < epochs < math.inf:
        raise FreezeError(f"advise was asked for epochs={epochs!r}; it is a number above 0, such as 3.")
    if precision not in PRECISIONS:
        raise FreezeError(
            f"advise was asked for precision={precision!r}; it is one of {', '.join(map(repr, PRECISIONS))}."
        )
    if learning_rates is not None and (not learning_rates or not all(0 < rate < math.inf for rate in learning_rates)):
        raise FreezeError(
            f"advise was asked for learning_rates={learning_rates!r}; give one or more numbers above 0, such as "
            "[1e-4, 3e-4], or leave it out."
        )


def _refuse_model(core: Any) -> None:
    """What cannot be probed, or would not be the same afterwards."""
    name = type(core).__name__
    if (world := rank_and_world()[1]) > 1:
        raise FreezeError(
            f"advise was asked for in a group of {world} processes; it probes in one. Call it before "
            "the launch, and give its plan to the run."
        )
    if freeze_record(core) is not None:
        raise FreezeError(
            f"advise was asked for a {name} that freeze() has frozen; it freezes other depths itself, and thaws them. "
            "Call thaw(model) first, then freeze(model, advice.plan)."
        )
    if any(parameter.device.type == "meta" for parameter in core.parameters()):
        raise FreezeError(
            f"advise was asked for a {name} on the meta device; it has no weights to train. Load them first, or use "
            "forecast(model, plan), which needs none."
        )


# -------------------------------------------------------------------------------------------------------------- depths


def _count_blocks(anatomy: Anatomy) -> int:
    return sum(len(stack) for stack in anatomy.stacks)


def _plans(
    anatomy: Anatomy, depths: Sequence[int] | None, plan: FreezePlan | None, notes: list[str]
) -> dict[int, FreezePlan]:
    """The plan of every depth to probe, deepest first.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=30, n_embd=8, n_head=2, vocab_size=16))
    >>> list(_plans(read_anatomy(model), None, FreezePlan(decoder_blocks=-1), []))
    [29, 26, 22, 15]
    """
    total = _count_blocks(anatomy)
    if total < 2:
        raise FreezeError(
            f"advise was asked for {anatomy.model_class} with {total} block; there is no depth to choose. Use "
            "FreezePlan(decoder_blocks=0) to train the block, or 1 to train what stands above it."
        )
    if depths is not None and not depths:
        raise FreezeError(f"advise was asked for no depth; give some of 0 to {total}, or leave depths out.")
    base = plan
    if plan is not None and plan.tied_head == "untie":
        base = replace(plan, tied_head="freeze")
        notes.append("tied_head='untie' was probed as 'freeze': a head once cloned could not be put back.")
    if depths is None:
        depths = [total - max(1, math.floor(total / 2**times + 0.5)) for times in range(1, HALVINGS + 1)]
        depths = [*depths, 0] if len(set(depths)) < LEAST_DEPTHS else depths
    own = None if plan is None else depth_of(plan, anatomy)
    wanted = {*depths, *([] if own is None else [own])}
    return {depth: plan_at_depth(anatomy, depth, base) for depth in sorted(wanted, reverse=True)}


def _forecast(probe: Probe, depth: int, places: int) -> Forecast:
    """The cost of a run at a depth, with the longest row of the probe as every row, or of so many places an image."""
    core, rows = probe.core, probe.rows
    tokens = max(row.tokens or places for row in rows.every)
    labels = max(row.labels for row in rows.every)
    reads_labels = [stack.name for stack in probe.anatomy.stacks] == ["decoder"]  # they are among its tokens
    loaded = next(core.parameters()).dtype
    halves = (torch.bfloat16, torch.float16)
    return forecast(
        core,
        probe.plans[depth],
        batch_size=probe.batch_size,
        source_tokens=max(1, tokens - labels if reads_labels else tokens),
        target_tokens=max(1, labels),
        rows=rows.total,
        dtype="bfloat16" if probe.precision == "bf16" or loaded in halves else "float32",
        frozen_dtype="bfloat16" if loaded in halves else "float32",  # autocast leaves weights as they are
        blocks=probe.blocks,
    )


def _unprobed(plan: FreezePlan, depth: int, costs: Forecast, *, cached: bool = True) -> DepthProbe:
    mode = costs.modes["cached" if cached and not costs.why_no_cut else "frozen"]
    return DepthProbe(depth, plan, mode.trainable_parameters, mode.memory_bytes, mode.share_of_full)


def _full_memory(costs: Mapping[int, Forecast]) -> float:
    """Memory for a gradient of every parameter: full fine-tuning without an optimizer."""
    full = next(iter(costs.values())).modes["full"]
    return full.memory_bytes - full.optimizer_bytes


def _affordable(
    considered: Mapping[int, DepthProbe], memory_bytes: float | None, core: nn.Module
) -> tuple[list[int], float]:
    """The depths that fit in memory, and what there is."""
    limit = _memory_of(core) if memory_bytes is None else memory_bytes
    able = [depth for depth, probe in considered.items() if probe.memory_bytes <= limit]
    if not able:
        least = min(considered.values(), key=lambda probe: probe.memory_bytes)
        raise FreezeError(
            f"advise has {count_text(limit, 'B')} of memory; {least.depth} frozen blocks need about "
            f"{count_text(least.memory_bytes, 'B')}, other depths more. Give a smaller batch_size or shorter rows, "
            "depths that freeze more, or memory_bytes if there is more than it found."
        )
    return able, limit


def _memory_of(core: nn.Module) -> float:
    """What is free on the model's device, and what the model itself takes; infinite where that cannot be told."""
    device = next(core.parameters()).device
    own = sum(p.numel() * p.element_size() for p in core.parameters())
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0] + own)
    if device.type == "cpu" and sys.platform == "linux":
        with suppress(OSError, ValueError, StopIteration):
            lines = Path("/proc/meminfo").read_text().splitlines()
            return 1024.0 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) + own
    return math.inf


# ------------------------------------------------------------------------------------------------------------ the probe


def _gradients(probe: Probe) -> Any:
    from hf_freeze.lens import block_gradients

    batch = move(probe.rows.batches[0], probe.device)
    try:
        with autocast(probe.precision, probe.device):
            return block_gradients(probe.core, [batch], blocks=probe.blocks, progress=False)
    except FreezeError as error:  # it only feeds one of the reasons
        probe.notes.append(f"The gradient of each block was not measured: {error}")
        return None


def _search(
    probe: Probe,
    depths: list[int],
    considered: Mapping[int, DepthProbe],
    rates: Sequence[float] | None,
    folder: Path,
    progress: bool,
) -> Comparison:
    """The trainings at every depth, deepest first, each a step of its share of full fine-tuning on the bar."""
    trials: dict[int, list[Trial]] = {}
    before: tuple[float, float] | None = None
    labels, seen = [row.labels for row in probe.rows.held_out], probe.rows.seen
    with probe.ready(depths, folder, progress):
        most = len(rates) if rates is not None else len(RATES) + MOST_DOUBLINGS
        counts = {depth: len(rates) if rates is not None else 2 for depth in depths} | {depths[0]: most}
        shares = {depth: considered[depth].share_of_full * probe.trial_steps for depth in depths}
        probe.bar.reset(total=sum(counts[depth] * shares[depth] for depth in depths))
        best: Trial | None = None
        for depth in depths:
            probe.bar.set_description(f"advice: {depth} frozen")
            with probe.at(depth):
                if before is None:
                    held_out = sum(probe.losses(probe.rows.held_out)) / sum(labels)
                    before = sum(probe.losses(seen)) / sum(row.labels for row in seen), held_out
                trials[depth] = probe.search(depth, rates, best, considered[depth].share_of_full)
            unspent = counts[depth] - len(trials[depth])
            probe.bar.total -= unspent * shares[depth]
            comparison = Comparison(trials, labels, before)
            best = comparison.best_at(depth) or replace(trials[depth][-1], rate=min(t.rate for t in trials[depth]) / 4)
    return comparison


# ------------------------------------------------------------------------------------------------------------- reasons


def _rate_reason(rate: float, depth: int, comparison: Comparison, steps: int, run_steps: int) -> str:
    tried = ", ".join(f"{trial.rate:.2g}: {comparison.loss(trial):.3f}" for trial in comparison.trials[depth])
    return (
        f"Learning rate: held-out losses there were {tried}. {rate:.2g} is the lowest within noise of the best; times "
        f"({steps} / {run_steps}) ** 0.32 for a run of {run_steps} steps instead of {steps}."
    )


def _memory_reason(probe: DepthProbe, limit: float) -> str:
    available = "" if math.isinf(limit) else f" of {count_text(limit, 'B')}"
    return (
        f"Forecast for training it: {count_text(probe.memory_bytes, 'B')}{available}, and a step of "
        f"{100 * probe.share_of_full:.0f} % of the FLOPs of full fine-tuning."
    )


def _unknown(depth: int, able: list[int], comparison: Comparison, rows: ProbeRows, run_steps: int) -> list[str]:
    """What so short a probe cannot know."""
    steps, trained = len(rows.batches), len(rows.train)
    unknown = []
    if run_steps > steps:
        unknown.append(
            f"The probe saw {trained:,} of {rows.total:,} rows and {steps} of {run_steps:,} steps. Longer training on "
            "more rows favours shallower plans than so short a probe tells; where quality counts more than time, "
            "compare whole runs with sweep_depths."
        )
    shallowest = min(able)
    if depth == shallowest > 0 and len(able) > 1:
        unknown.append(
            f"{depth} is the shallowest depth probed, so fewer frozen blocks may be better still: "
            f"advise(depths={sorted({depth, depth // 2, 0}, reverse=True)}) probes them, at the cost of full steps."
        )
    return unknown
