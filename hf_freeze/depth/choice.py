"""Which depth and learning rate a probe's losses speak for, and what they warn of. Runs nothing.

The depth: the deepest whose loss on held-out rows is within one standard error of the best one's, the rule of
"Classification and Regression Trees" (1984), here with the error of the paired difference, by the bootstrap over rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_freeze.anatomy import Anatomy
from hf_freeze.depth.advice import DepthProbe, plan_text
from hf_freeze.depth.paired import compare_rows
from hf_freeze.depth.probe import Trial
from hf_freeze.errors import FreezeError
from hf_freeze.plan import FreezePlan, plan_at_depth
from hf_freeze.tables import count_text

if TYPE_CHECKING:
    from hf_freeze.lens import BlockGradients

__all__ = ["Comparison", "block_share", "longer_run_rate", "plan_warnings"]

MIN_GAIN = 0.005  # of the loss: half a percent is less than two seeds differ by
CLEARLY = 2  # so many times what counts as noise is clearly worse
HORIZON = 0.32  # the best rate falls with this power of the number of steps
PARTED = 0.5  # held-out rows gain less than this share of what rows trained on gain: the losses part


@dataclass(frozen=True)
class Comparison:
    """The trials of all probed depths, compared on the same held-out rows.

    Attributes:
        trials: By depth, every training there.
        labels: Of each held-out row.
        before: Training and validation loss of the model as it was given.
    """

    trials: Mapping[int, Sequence[Trial]]
    labels: Sequence[int]
    before: tuple[float, float]

    def loss(self, trial: Trial) -> float:
        """Mean over the held-out labels."""
        return sum(trial.held_out) / sum(self.labels)

    def best_at(self, depth: int) -> Trial | None:
        """The training at a depth with the lowest held-out loss; None where all diverged."""
        sound = [trial for trial in self.trials[depth] if math.isfinite(self.loss(trial))]
        return min(sound, key=self.loss, default=None)

    @property
    def best(self) -> Trial:
        """The best training of all.

        Raises:
            FreezeError: Every one diverged.
        """
        sound = [trial for depth in self.trials if (trial := self.best_at(depth)) is not None]
        if not sound:
            rates = sorted({trial.rate for trials in self.trials.values() for trial in trials})
            raise FreezeError(
                f"advise trained at depths {', '.join(map(str, self.trials))} with the learning rates "
                f"{', '.join(f'{rate:.2g}' for rate in rates)}; the loss was not finite after any of them. Give lower "
                "learning_rates, such as [1e-5], or look for broken rows; a model in fp16 overflows: use bf16 or fp32."
            )
        return min(sound, key=self.loss)

    def behind(self, trial: Trial, other: Trial) -> tuple[float, float]:
        """How much higher the loss of `trial` is, and the standard error of that over the held-out rows."""
        difference = compare_rows(trial.held_out, other.held_out, self.labels)
        return difference.mean, difference.error

    def within_noise(self, trial: Trial, other: Trial, times: float = 1.0) -> bool:
        """Whether `trial` is no further behind than its standard error, or half a percent."""
        behind, noise = self.behind(trial, other)
        return behind <= times * max(noise, MIN_GAIN * self.loss(other))

    def choose(self) -> Trial:
        """The best training at the deepest depth that is within noise of the best one of all."""
        best = self.best
        able = [trial for depth in self.trials if (trial := self.best_at(depth)) and self.within_noise(trial, best)]
        return max(able, key=lambda trial: trial.depth)

    def choose_rate(self, depth: int) -> float:
        """The lowest learning rate within noise of the best one there: a longer run wants a lower one still."""
        best = self.best_at(depth)
        assert best is not None  # `choose` gave this depth
        sound = [trial for trial in self.trials[depth] if math.isfinite(self.loss(trial))]
        return min(trial.rate for trial in sound if self.within_noise(trial, best))

    def parts(self, trial: Trial) -> bool:
        """Whether rows trained on gained at least twice what held-out rows did: they are learnt by heart."""
        gains = self.before[0] - trial.train_loss, self.before[1] - self.loss(trial)
        return gains[0] > MIN_GAIN * self.before[0] and gains[1] < PARTED * gains[0]

    def complete(self, probe: DepthProbe) -> DepthProbe:
        """The probe of a depth with what was found there."""
        if probe.depth not in self.trials:
            return probe
        rates = tuple((trial.rate, self.loss(trial)) for trial in self.trials[probe.depth])
        best = self.best_at(probe.depth)
        if best is None:
            return replace(probe, rates=rates, verdict="diverged at every rate")
        behind, noise = self.behind(best, self.best)
        return replace(
            probe,
            learning_rate=best.rate,
            rates=rates,
            train_loss=best.train_loss,
            validation_loss=self.loss(best),
            behind=behind,
            noise=noise,
            step_seconds=best.step_seconds,
            verdict=self.verdict(best),
        )

    def verdict(self, trial: Trial) -> str:
        """What is to be said of a depth, in a few words."""
        if trial.depth == self.choose().depth:
            text = "recommended"
        elif trial is self.best:
            text = "best, by less than noise"
        elif self.within_noise(trial, self.best):
            text = "within noise, costs more"
        else:
            text = "behind" if self.within_noise(trial, self.best, CLEARLY) else "clearly worse"
        return f"{text}; learns rows by heart" if self.parts(trial) else text

    def reason(self) -> str:
        """Why the chosen depth."""
        chosen, best = self.choose(), self.best
        deeper = [trial for depth in self.trials if depth > chosen.depth and (trial := self.best_at(depth))]
        text = f"{chosen.depth} frozen blocks reach a held-out loss of {self.loss(chosen):.3f}"
        if chosen.depth == best.depth:
            text += ", the lowest"
        else:
            behind, noise = self.behind(chosen, best)
            text += f", {behind:.3f} ± {noise:.3f} behind the best ({best.depth} frozen): within noise"
        if deeper:
            nearest = min(deeper, key=lambda trial: trial.depth)
            behind, noise = self.behind(nearest, best)
            text += f"; {nearest.depth} frozen are {behind:.3f} ± {noise:.3f} behind the best"
        return f"{text}."

    def warnings(self) -> list[str]:
        """What the losses warn of, whatever the plan."""
        chosen = self.choose()
        warned = []
        if self.loss(chosen) > (1 - MIN_GAIN) * self.before[1]:
            warned.append(
                f"No training of the probe helped held-out rows: {self.before[1]:.3f} before, {self.loss(chosen):.3f} "
                "after. Look at the labels, try lower learning_rates or more steps; else there is nothing to learn."
            )
        if self.parts(chosen):
            warned.append(
                f"The losses part at {chosen.depth} frozen blocks already: rows trained on fell from "
                f"{self.before[0]:.3f} to {chosen.train_loss:.3f}, held-out ones from {self.before[1]:.3f} to "
                f"{self.loss(chosen):.3f}. Give more rows, train fewer epochs, or freeze more."
            )
        return warned


def longer_run_rate(rate: float, steps: int, run_steps: int) -> float:
    """A learning rate for a run of more steps: "Scaling Optimal LR Across Token Horizons" (2024), of pretraining.

    >>> round(longer_run_rate(1e-3, 16, 160), 6)
    0.000479
    """
    return float(rate * (steps / max(steps, run_steps)) ** HORIZON)


def block_share(gradients: BlockGradients, anatomy: Anatomy, plan: FreezePlan) -> float:
    """The share of the blocks that a plan trains in the relative gradients of all blocks."""
    frozen = plan.resolve(anatomy).blocks
    blocks = [(part.rpartition("."), value) for part, value in zip(gradients.parts, gradients.relative, strict=True)]
    values = [(stack, int(index), value) for (stack, _, index), value in blocks if stack in frozen and index.isdigit()]
    trained = sum(value for stack, index, value in values if index >= frozen[stack])
    return float(trained / (sum(value for _, _, value in values) or 1.0))


# -------------------------------------------------------------------------------------------------- a plan of one's own


def depth_of(plan: FreezePlan, anatomy: Anatomy) -> int | None:
    """The depth of a plan, counted from the bottom; None where it leaves a gap below frozen blocks."""
    blocks = plan.resolve(anatomy).blocks
    depth = sum(blocks.values())
    return depth if plan_at_depth(anatomy, depth, plan).resolve(anatomy).blocks == blocks else None


def plan_warnings(plan: FreezePlan, anatomy: Anatomy, comparison: Comparison) -> list[str]:
    """What is very likely a mistake in a plan that the user had in mind."""
    name, resolved = plan_text(plan), plan.resolve(anatomy)
    warned = [f"{name}: {warning}" for warning in resolved.warnings]
    top = anatomy.stacks[-1]
    if resolved.blocks[top.name] == len(top):
        warned.append(
            f"{name} freezes the top block too, which holds what is most particular to a task; only norm and head are "
            f"left. Freeze {len(top) - 1} of {len(top)} {top.name} blocks at most, unless the head alone is to learn."
        )
    own_head = [part for part in anatomy.head if part not in anatomy.tie_of]
    if own_head and not set(own_head) & set(resolved.trained):
        warned.append(
            f"{name} freezes the head ({own_head[0]}), which is no pretrained part of most tasks. Leave it out of "
            "freeze=."
        )
    depth, chosen, best = depth_of(plan, anatomy), comparison.choose(), comparison.best
    if depth is None:
        warned.append(
            f"{name} trains encoder blocks below frozen decoder blocks: those still carry the gradient down and cannot "
            f"be cached. {plan_text(plan_at_depth(anatomy, sum(resolved.blocks.values()), plan))} freezes as many."
        )
        return warned
    trial = comparison.best_at(depth) if depth in comparison.trials else None
    if trial is None or depth == chosen.depth:
        return warned
    behind, noise = comparison.behind(trial, best)
    if depth > chosen.depth and not comparison.within_noise(trial, best, CLEARLY):
        warned.append(
            f"{name} freezes too many blocks: its held-out loss is {behind:.3f} ± {noise:.3f} behind that of "
            f"{best.depth} frozen blocks."
        )
    elif depth < chosen.depth and (comparison.parts(trial) or not comparison.within_noise(trial, best)):
        warned.append(
            f"{name} freezes too few blocks for so few rows: those trained on fell to {trial.train_loss:.3f}, held-out "
            f"ones to {comparison.loss(trial):.3f}; with {chosen.depth} frozen to {comparison.loss(chosen):.3f}."
        )
    return warned


def data_reason(anatomy: Anatomy, probe: DepthProbe, rows: int, labels: float) -> str:
    """Rows of data against trained parameters."""
    total = max(1, round(rows * labels))
    return (
        f"{rows:,} rows with about {total:,} labels train {count_text(probe.trainable_parameters)} parameters, "
        f"{probe.trainable_parameters / total:,.0f} a label, against "
        f"{sum(p.numel() for p in anatomy.parameters.values()) / total:,.0f} of the whole model."
    )


def gradient_reason(gradients: Any, probe: DepthProbe) -> str:
    """Where the data pulls, before training."""
    ranked = sorted(zip(gradients.relative, gradients.parts, strict=True), reverse=True)
    strongest = ", ".join(f"{part} ({value:.2g})" for value, part in ranked[:3])
    share = 100 * (probe.gradient_share or 0.0)
    return (
        f"Before training, the blocks above those {probe.depth} hold {share:.0f} % of the gradient relative to "
        f"weights (Auto-RGN) of all blocks; the data pulls most at {strongest}."
    )
