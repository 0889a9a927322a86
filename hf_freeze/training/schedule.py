"""Stages as data: what each freezes and how long it lasts, made by `gradual` or by hand in YAML.

Nothing here trains, and no model is changed: `stages` does that.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import yaml
from torch import nn

from hf_freeze.anatomy import Anatomy, read_anatomy
from hf_freeze.errors import StageError, nearest
from hf_freeze.given import check_kind, check_model, check_path
from hf_freeze.plan import FreezePlan, plan_at_depth

__all__ = ["Stage", "check_ends", "check_growth", "check_stages", "gradual", "load_stages", "save_stages"]


@dataclass(frozen=True)
class Stage:
    """One stage: what is frozen in it, how long it lasts, how fast what trains learns.

    Args:
        plan: What is frozen. A later stage trains all that an earlier one trains.
        epochs: Passes over the training rows; None is what the trainer's arguments say.
        steps: Optimizer steps instead.
        learning_rate: Of the top block, final norm and head; None is what the trainer's arguments say.
        block_decay: Rate of each block over that of the block above it. 1.0 is one rate for all; 1 / 2.6 is that of
            "Universal Language Model Fine-tuning for Text Classification" (2018), discriminative fine-tuning.
        patience: End the stage after so many evaluations in a row without a new best; None trains it to its end.
        min_gain: What a new best must gain over the last one, relative to it. 0.0, so that any gain counts.

    Raises:
        StageError: A value of the wrong kind or out of bounds; epochs and steps at once.

    Example:
        >>> Stage(FreezePlan(decoder_blocks=-4), epochs=1).to_dict()
        {'plan': {'decoder_blocks': -4}, 'epochs': 1}
    """

    plan: FreezePlan
    epochs: float | None = None
    steps: int | None = None
    learning_rate: float | None = None
    block_decay: float = 1.0
    patience: int | None = None
    min_gain: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.plan, FreezePlan):
            raise StageError(f"A stage was given a {type(self.plan).__name__} as plan; it takes a FreezePlan.")
        for name in ("epochs", "learning_rate", "block_decay", "min_gain"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise StageError(
                    f"A stage was given {name}={value!r}; it is a number. In YAML, write 1.0e-4 or 0.0001 for 1e-4."
                )
        if self.epochs is not None and self.steps is not None:
            raise StageError(f"A stage was given epochs={self.epochs} and steps={self.steps}; give one of them.")
        for name, most in (("epochs", math.inf), ("learning_rate", math.inf), ("block_decay", 1.0)):
            value = getattr(self, name)
            if (value is not None and not 0.0 < value <= most) or value == math.inf:
                bound = "finite number above 0" if most == math.inf else "number above 0, at most 1"
                raise StageError(f"A stage was given {name}={value}; it is a {bound}. A stage must end.")
        for name in ("steps", "patience"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise StageError(f"A stage was given {name}={value}; it is a whole number, 1 or more.")
        if not 0.0 <= self.min_gain < 1.0:
            raise StageError(f"A stage was given min_gain={self.min_gain}; it is a fraction, 0 or more and below 1.")

    def to_dict(self) -> dict[str, Any]:
        """The stage as JSON-ready values, without those that are the default."""
        usual = FreezePlan().to_dict()
        plan = {key: value for key, value in self.plan.to_dict().items() if value != usual[key]}
        others = {f.name: getattr(self, f.name) for f in fields(self)[1:] if getattr(self, f.name) != f.default}
        return {"plan": plan, **others}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Stage:
        """A stage from such values.

        Raises:
            StageError: A key that no stage has.
        """
        known = [f.name for f in fields(cls)]
        if not isinstance(values, dict) or "plan" not in values:
            raise StageError(f"A stage was given as {values!r}; it is a mapping with the key 'plan'.")
        if unknown := [key for key in values if key not in known]:
            raise StageError(f"A stage was given {unknown[0]!r}; the nearest: {nearest(unknown[0], known)}.")
        plan = values["plan"] or {}
        if not isinstance(plan, dict):
            raise StageError(f"A stage was given {plan!r} as plan; it is a mapping such as {{decoder_blocks: -4}}.")
        return cls(**{**values, "plan": FreezePlan.from_dict(plan)})


def gradual(
    model: nn.Module, start: int, step: int, stages: int, *, plan: FreezePlan | None = None, **settings: Any
) -> list[Stage]:
    """Stages that train the top `start` blocks, then `step` more in each stage.

    In an encoder-decoder the decoder's blocks are unfrozen first, then the encoder's. Changes no model.

    Args:
        model: Whose blocks are counted.
        start: Blocks that the first stage trains, from the top.
        step: Blocks that each stage trains more than the one before.
        stages: How many stages.
        plan: What holds in all of them beside the blocks; None is `FreezePlan()`: the embeddings stay frozen.
        settings: Fields of `Stage` for all of them, such as epochs=1.

    Returns:
        The stages, for `train_in_stages` or `save_stages`.

    Raises:
        StageError: The last stage would train more blocks than there are.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=8, n_head=2, vocab_size=16))
        >>> [stage.plan.decoder_blocks for stage in gradual(model, start=1, step=2, stages=3, epochs=1)]
        [5, 3, 1]
    """
    check_model("gradual", model)
    anatomy = read_anatomy(model)
    total = sum(len(stack) for stack in anatomy.stacks)
    for name, value, least in (("start", start, 1), ("step", step, 0), ("stages", stages, 1)):
        if not isinstance(value, int) or value < least:
            raise StageError(f"gradual was given {name}={value!r}; it is a whole number, {least} or more.")
    most = start + step * (stages - 1)
    if most > total:
        fits = (total - start) // step + 1 if step and start <= total else 0
        fix = f"Use stages <= {fits}." if fits else f"Use start <= {total}."
        raise StageError(
            f"gradual was asked for {start} blocks and {step} more in each of {stages} stages, {most} in the last; "
            f"{anatomy.model_class} has {total}. {fix}"
        )
    depths = [total - start - step * number for number in range(stages)]
    return [Stage(plan_at_depth(anatomy, depth, plan), **settings) for depth in depths]


def save_stages(stages: Sequence[Stage], path: str | os.PathLike[str]) -> None:
    """Writes stages as YAML, to be edited by hand."""
    check_stages("save_stages", "stages", stages)
    check_path("save_stages", "path", path)
    text = yaml.safe_dump({"stages": [stage.to_dict() for stage in stages]}, sort_keys=False)
    Path(path).write_text(text, encoding="utf-8")


def load_stages(path: str | os.PathLike[str]) -> list[Stage]:
    """Reads stages from YAML.

    Raises:
        StageError: No such file, no YAML, or a key that no stage has.
    """
    check_path("load_stages", "path", path)
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise StageError(f"Stages were to be read from {path}; it cannot be read: {reason}.") from error
    if not isinstance(values, dict) or not isinstance(values.get("stages"), list) or not values["stages"]:
        raise StageError(f"Stages were to be read from {path}; it holds no list named 'stages', or an empty one.")
    return [Stage.from_dict(value) for value in values["stages"]]


def check_stages(function: str, argument: str, stages: object) -> None:
    """Refuses what is no sequence of plans or stages."""
    fix = f"{argument}=[FreezePlan(decoder_blocks=-4), FreezePlan(decoder_blocks=-8)], or gradual(model, 4, 4, 2)"
    check_kind(function, argument, stages, (list, tuple), "a list of plans or stages", fix, StageError)
    for stage in cast("Sequence[object]", stages):
        check_kind(function, argument, stage, (FreezePlan, Stage), "plans or stages", fix, StageError)


def check_growth(stages: Sequence[Stage], anatomy: Anatomy) -> None:
    """Every plan fits the model, and trains what the one before trains."""
    trained: set[str] = set()
    for number, stage in enumerate(stages, start=1):
        resolved = stage.plan.resolve(anatomy)
        if stage.plan.tied_head != stages[0].plan.tied_head:
            raise StageError(
                f"Stage {number} has tied_head={stage.plan.tied_head!r}, stage 1 {stages[0].plan.tied_head!r}; a head "
                "cannot change that in the middle of a run. Give all stages the same."
            )
        before, trained = trained, {*resolved.trained, *resolved.untied}
        if lost := sorted(before - trained):
            raise StageError(
                f"Stage {number} trains less than stage {number - 1}: {len(lost)} tensors would be frozen again, e.g. "
                f"{lost[0]}. Order the stages top down, or train it apart."
            )


def check_ends(stages: Sequence[Stage], args: Any, eval_dataset: Any) -> None:
    """Every stage ends: by itself, or by a trainer's arguments."""
    for number, stage in enumerate(stages, start=1):
        if stage.patience is not None and (str(args.eval_strategy.value) == "no" or eval_dataset is None):
            raise StageError(
                f"Stage {number} has patience={stage.patience}; the trainer's arguments evaluate nothing. Give them "
                "eval_strategy='epoch' or 'steps' and the trainer an eval_dataset, or leave patience out."
            )
        endless = args.max_steps <= 0 and not 0 < args.num_train_epochs < math.inf
        if endless and stage.steps is None and stage.epochs is None:
            raise StageError(
                f"Stage {number} never ends: it has neither epochs nor steps, and the trainer's arguments say "
                f"num_train_epochs={args.num_train_epochs}. Give it epochs or steps."
            )
