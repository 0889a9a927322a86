"""What `freeze` did: the record that stays on the model, and the report that a reader gets, with its table."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from hf_freeze.anatomy import Anatomy
from hf_freeze.anatomy.value import part_rows, tie_lines
from hf_freeze.cuts import Cut
from hf_freeze.errors import FreezeError
from hf_freeze.marks import RECORD
from hf_freeze.plan import FreezePlan, ResolvedPlan
from hf_freeze.tables import Table, count_text
from hf_freeze.tensors import named_tensors

__all__ = ["FreezeRecord", "FreezeReport", "earlier_freeze", "freeze_record", "freeze_table"]


@dataclass
class FreezeRecord:
    """What `freeze` did to a model, kept on the model, so that `thaw` can undo it and `verify_frozen` prove it.

    Attributes:
        plan: The latest plan applied.
        turned_off: Names of the parameters whose requires_grad `freeze` turned off.
        held: Names of the modules that it holds in eval.
        dropouts: Former values of the dropout attributes that it set to 0, by module and attribute name.
        digests: Digest of each frozen tensor and of each persistent buffer of a frozen module.
        without_bits: Names of those that held no bits when `freeze` ran: on the meta device, and offloaded nowhere.
    """

    plan: FreezePlan
    turned_off: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set)
    dropouts: dict[tuple[str, str], float] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    without_bits: tuple[str, ...] = ()


class FreezeReport:
    """What `freeze` did: names, counts, where the backward pass ends, what can be cached. Prints as a table.

    Attributes:
        plan: The plan that was applied.
        resolved: The plan made concrete.
        frozen_names: Every frozen parameter, whoever froze it; a tied tensor under its first name.
        trainable_names: Every other parameter.
        frozen_before: Those of `frozen_names` that were frozen already, by the user, by PEFT or by an earlier plan.
        held: Names of the modules held in eval.
        dropouts: Former values of the dropout attributes of a stack that were set to 0, by (module, attribute).
        digests: Digest of each frozen tensor and persistent buffer of a frozen module, by name.
        without_bits: Names of those that held no bits to take a digest of; `verify_frozen` proves nothing then.
        total_parameters, trainable_parameters, frozen_parameters: Counts of numbers, a tied tensor once.
        table: What is printed.
        tensors: The model's tensors by name, held weakly; they do not pickle.
    """

    def __init__(
        self, anatomy: Anatomy, resolved: ResolvedPlan, record: FreezeRecord, frozen_before: tuple[str, ...]
    ) -> None:
        self.plan = record.plan
        self.resolved = resolved
        self.frozen_before = frozen_before
        self.held = tuple(sorted(record.held))
        self.dropouts = dict(record.dropouts)
        self.digests = dict(record.digests)
        self.without_bits = record.without_bits
        sizes = {name: p.numel() for name, p in anatomy.parameters.items()}
        self.frozen_names = tuple(name for name, p in anatomy.parameters.items() if not p.requires_grad)
        self.trainable_names = tuple(name for name, p in anatomy.parameters.items() if p.requires_grad)
        self.total_parameters = sum(sizes.values())
        self.trainable_parameters = sum(sizes[name] for name in self.trainable_names)
        self.frozen_parameters = self.total_parameters - self.trainable_parameters
        self.table = freeze_table(anatomy, set(self.frozen_names), self.lowest_trainable, self._lines(anatomy))
        if earlier := tuple(name for name in frozen_before if name in record.turned_off):  # the first of the lines
            self.table = replace(self.table, lines=(f"Warning: {earlier_freeze(earlier)}", *self.table.lines))
        # Tensors are matched by identity first: PEFT renames them when it wraps the model. Weak, or a report would
        # keep the model in memory.
        self.tensors = weakref.WeakValueDictionary(named_tensors(anatomy.model))

    @property
    def lowest_trainable(self) -> tuple[str, int]:
        """Where the backward pass ends, e.g. ("decoder", 26)."""
        return self.resolved.lowest_trainable

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """What can be cached, lowest first; () with `why_no_cut` where nothing can."""
        return self.resolved.cuts

    @property
    def why_no_cut(self) -> str:
        """Why nothing can be cached; "" where something can."""
        return self.resolved.why_no_cut

    def _lines(self, anatomy: Anatomy) -> list[str]:
        lines = list(self.resolved.reasons)
        if self.frozen_before:
            lines.append(
                f"{len(self.frozen_before)} tensors were frozen before and stay so, e.g. {self.frozen_before[0]}."
            )
        if self.plan.frozen_mode == "eval" and self.held:
            lines.append("Frozen modules are held in eval whatever model.train() says.")
        if self.dropouts:
            which = ", ".join(f"{module}.{name} = {value:g}" for (module, name), value in self.dropouts.items())
            lines.append(
                f"Dropout that a stack applies to its frozen part itself is off (set to 0, thaw restores): {which}."
            )
        if self.cuts:
            spans = {cut.stack: "block 0" if cut.blocks == 1 else f"blocks 0-{cut.blocks - 1}" for cut in self.cuts}
            embedded = {stack.name for stack in anatomy.stacks if stack.inputs or stack.input_parameters}
            cached = (f"{stack} {'embeddings and ' * (stack in embedded)}{span}" for stack, span in spans.items())
            lines.append(f"Can be cached: {', '.join(cached)}.")
        else:
            lines.append(f"Nothing can be cached: {self.why_no_cut}")
        return lines + [f"Warning: {warning}" for warning in self.resolved.warnings]

    def __str__(self) -> str:
        return str(self.table)

    def to_markdown(self) -> str:
        """The table in Markdown."""
        return self.table.to_markdown()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {
            "plan": self.plan.to_dict(),
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": self.total_parameters,
            "trainable_names": list(self.trainable_names),
            "frozen_names": list(self.frozen_names),
            "frozen_before": list(self.frozen_before),
            "lowest_trainable": list(self.lowest_trainable),
            "cuts": [list(cut) for cut in self.cuts],
            "why_no_cut": self.why_no_cut,
            "table": self.table.to_dict(),
        }

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "tensors"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, tensors=weakref.WeakValueDictionary())


def earlier_freeze(names: tuple[str, ...]) -> str:
    return (
        f"An earlier freeze() stays: {len(names)} tensors that this plan trains are frozen by it, e.g. {names[0]}. "
        "freeze() only ever freezes; to lift the earlier one, call thaw(model) before freeze(model, plan)."
    )


def freeze_record(model: nn.Module) -> tuple[nn.Module, FreezeRecord] | None:
    """The record of `freeze` and the module that it stands on: the model, or the one that PEFT wrapped since."""
    records = [(module, module.__dict__[RECORD]) for module in model.modules() if RECORD in module.__dict__]
    if len(records) > 1:
        names = ", ".join(type(module).__name__ for module, _ in records)
        raise FreezeError(
            f"One frozen model was asked for; this {type(model).__name__} holds {len(records)}: {names}. "
            "Pass one of them."
        )
    return records[0] if records else None


def freeze_table(anatomy: Anatomy, frozen: set[str], lowest: tuple[str, int], lines: Sequence[str]) -> Table:
    """The parts of a model, which are frozen by their first names, and where the backward pass ends; then the lines."""
    states = {name: "frozen" if name in frozen else "trained" for name in anatomy.parameters}
    rows: list[tuple[str, ...]] = []
    crossed = False
    for label, where, size, state in part_rows(anatomy, states):
        if not crossed and not state.startswith("frozen"):
            rows.append(("--- the backward pass ends here ---", "", "", ""))
            crossed = True
        rows.append((label, where, count_text(size), state))
    total = sum(p.numel() for p in anatomy.parameters.values())
    trained = sum(p.numel() for name, p in anatomy.parameters.items() if name not in frozen)
    end = lowest[0] if lowest[0] not in ("encoder", "decoder") else f"{lowest[0]} block {lowest[1]}"
    summary = (
        f"{count_text(trained)} of {count_text(total)} parameters train ({100 * trained / max(total, 1):.1f} %); "
        f"the backward pass ends at: {end}."
    )
    return Table(
        f"{anatomy.model_class}: frozen and trained",
        ("part", "where", "parameters", "state"),
        tuple(rows),
        (summary, *tie_lines(anatomy), *lines, *anatomy.notes),
    )
