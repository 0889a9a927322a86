"""What `advise` returns: a plan with its reasons, and what was found at each depth, as values that print themselves."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hf_freeze.plan import FreezePlan
from hf_freeze.tables import Table, count_text

if TYPE_CHECKING:
    from hf_freeze.lens import BlockGradients

__all__ = ["Advice", "DepthProbe"]


@dataclass(frozen=True)
class DepthProbe:
    """What is known of one depth: what it costs and, where it was probed, what it learnt.

    Attributes:
        depth: Frozen blocks, from the bottom; an encoder lies below its decoder.
        plan: That freezes them.
        trainable_parameters: What the optimizer moves.
        memory_bytes: Forecast of weights, gradients, AdamW's state and saved activations in training.
        share_of_full: Forecast FLOPs of a training step, from the cache where there is one, over those of full
            fine-tuning.
        gradient_share: The trained blocks' share of the gradients of all blocks, each relative to its weights, before
            training; None where gradients were not measured.
        learning_rate: The one with the lowest validation loss; None where the depth was not probed or always
            diverged, as all below.
        rates: Every learning rate tried, and the validation loss after it.
        train_loss, validation_loss: The mean over labels, after the probe's steps.
        behind: Validation loss over that of the best depth.
        noise: Standard error of `behind`, by the bootstrap over the held-out rows; 0 at the best depth itself.
        step_seconds: Median of the probe's training steps.
        verdict: In a few words.
    """

    depth: int
    plan: FreezePlan
    trainable_parameters: int
    memory_bytes: int
    share_of_full: float
    gradient_share: float | None = None
    learning_rate: float | None = None
    rates: tuple[tuple[float, float], ...] = ()
    train_loss: float | None = None
    validation_loss: float | None = None
    behind: float | None = None
    noise: float | None = None
    step_seconds: float | None = None
    verdict: str = "not probed"


@dataclass(frozen=True)
class Advice:
    """A plan with its reasons, and what the probe found. Prints as a table; `plan` goes into `freeze`.

    Attributes:
        model_class: Name of the model's class.
        plan: The recommended plan.
        depth: How many blocks it freezes.
        blocks: How many there are.
        learning_rate: For a run of `run_steps`: one that the probe saw at that depth, lowered for the longer run; the
            reasons say how.
        probes: Every depth that was considered, deepest first.
        train_loss, validation_loss: Of the model as it was given, on rows of the probe.
        gradients: Of each part, on one batch before training; None where there is no memory for them.
        reasons: Why this plan, and what the probe cannot know.
        warnings: What is very likely a mistake: in a plan, the rows or the tokenizer.
        steps, batch_size: Of the training at each depth and learning rate.
        run_steps: Of the run that the advice is for.
        seconds: What all of this took.
    """

    model_class: str
    plan: FreezePlan
    depth: int
    blocks: int
    learning_rate: float
    probes: tuple[DepthProbe, ...]
    train_loss: float
    validation_loss: float
    gradients: BlockGradients | None = field(repr=False)
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    steps: int
    batch_size: int
    run_steps: int
    seconds: float

    def __str__(self) -> str:
        return str(self.table())

    def to_markdown(self) -> str:
        """The table in Markdown."""
        return self.table().to_markdown()

    def to_dict(self) -> dict[str, Any]:
        """The advice as JSON-ready values."""
        values = {name: value for name, value in vars(self).items() if name not in ("plan", "probes", "gradients")}
        return {
            **{name: list(value) if isinstance(value, tuple) else value for name, value in values.items()},
            "plan": self.plan.to_dict(),
            "probes": [
                asdict(probe) | {"plan": probe.plan.to_dict(), "rates": [_pair(*pair) for pair in probe.rates]}
                for probe in self.probes
            ],
            "gradients": self.gradients.to_dict() if self.gradients else None,
        }

    def table(self) -> Table:
        """One row a depth; the recommendation, its reasons and the warnings below."""
        columns = ("frozen", "trains", "memory", "step / full", "rate", "train", "validation", "behind", "verdict")
        given = ("as given", "", "", "", "", f"{self.train_loss:.3f}", f"{self.validation_loss:.3f}", "", "")
        lines = (
            f"Recommended: {plan_text(self.plan)} with learning_rate={self.learning_rate:.2g}.",
            *(f"- {reason}" for reason in self.reasons),
            *(f"Warning: {warning}" for warning in self.warnings),
            f"Losses are after {self.steps} steps of {self.batch_size} rows. All of this took {self.seconds:.0f} s.",
        )
        rows = (given, *(_row(probe, self.blocks) for probe in self.probes))
        return Table(f"{self.model_class}: which depth to freeze", columns, rows, lines)


def _pair(rate: float, loss: float) -> list[float | None]:
    """A rate and its loss; null for one that diverged, since JSON has no infinity."""
    return [rate, loss if math.isfinite(loss) else None]


def _row(probe: DepthProbe, blocks: int) -> tuple[str, ...]:
    def told(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return (
        f"{probe.depth} of {blocks}",
        count_text(probe.trainable_parameters),
        count_text(probe.memory_bytes, "B"),
        f"{100 * probe.share_of_full:.0f} %",
        told(probe.learning_rate, ".2g"),
        told(probe.train_loss, ".3f"),
        told(probe.validation_loss, ".3f"),
        told(probe.behind, ".3f") + (f" ± {probe.noise:.3f}" if probe.noise else ""),
        probe.verdict,
    )


def plan_text(plan: FreezePlan) -> str:
    """The plan as one writes it.

    >>> plan_text(FreezePlan(encoder_blocks=6, decoder_blocks=3))
    'FreezePlan(encoder_blocks=6, decoder_blocks=3)'
    """
    usual = FreezePlan().to_dict()
    given = {name: value for name, value in plan.to_dict().items() if value != usual[name]}
    return f"FreezePlan({', '.join(f'{name}={value!r}' for name, value in given.items())})"
