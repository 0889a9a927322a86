"""Applies a plan to a model, holds frozen modules in eval, and proves that frozen weights did not move.

`freeze` only ever freezes: what was frozen before stays so. `thaw` undoes what `freeze` did, no more. State lives on
the model (`FreezeRecord`) and on the held modules, as plain values that survive deepcopy and pickle. Which names to
freeze is the plan's business; this module sets `requires_grad` and checks bits.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hf_freeze.anatomy import Anatomy, BlocksGiven, Stack, read_anatomy, unwrap
from hf_freeze.checkpointing import ASKED_MODE, correct_checkpointing, restore_checkpointing
from hf_freeze.errors import FreezeError, FrozenWeightsChanged, PlanError
from hf_freeze.given import check_kind, check_model
from hf_freeze.plan import Cut, FreezePlan, ResolvedPlan, given_plan
from hf_freeze.prepared import is_being_trained, take_off_autocast
from hf_freeze.report import freeze_table

__all__ = [
    "FreezeRecord",
    "FreezeReport",
    "FrozenProof",
    "bits_of",
    "freeze",
    "freeze_record",
    "kind_of_digest",
    "named_tensors",
    "offloaded_tensors",
    "tensor_by_name",
    "tensor_digest",
    "tensor_kind",
    "thaw",
    "untie",
    "verify_frozen",
    "whole_tensor",
]

_RECORD = "_hf_freeze_record"
RELEASED = "_hf_freeze_released"  # on modules whose weights are away for a while: an object with restore()
UNTIED = "_hf_freeze_untied"  # on a head's module: its parameters that `untie` has given tensors of their own


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


@dataclass(frozen=True)
class FrozenProof:
    """What `verify_frozen` found: every frozen tensor holds the bits that it held when it was frozen."""

    tensors: int
    tensor_bytes: int

    def __str__(self) -> str:
        return f"{self.tensors} frozen tensors, {self.tensor_bytes:,} bytes: unchanged"


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
        if earlier := tuple(name for name in frozen_before if name in record.turned_off):  # before all counts
            self.table = replace(self.table, lines=(f"Warning: {_earlier_freeze(earlier)}", *self.table.lines))
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
            what = ", ".join(
                f"{stack} {'embeddings and ' * (stack in embedded)}{span}" for stack, span in spans.items()
            )
            lines.append(f"Can be cached: {what}.")
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


def freeze(
    model: nn.Module,
    plan: FreezePlan | None = None,
    *,
    blocks: BlocksGiven | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> FreezeReport:
    """Freezes the lower part of a model as the plan says. Mutates the model; applying a plan twice changes nothing.

    Turns `requires_grad` off and drops `.grad` (a leftover gradient would still move the weight at the next step),
    holds frozen modules in eval whatever `model.train()` says, and takes a digest of every frozen tensor. Activation
    checkpointing, switched on before or after, then leaves the frozen prefix without a graph. The autocast that
    accelerate leaves on a model when a training is over is taken off: the next trainer puts its own on.

    Args:
        model: Any PreTrainedModel, PeftModel or nn.Module with a list of blocks; before it is wrapped by DDP or FSDP.
        plan: What to freeze; None is `FreezePlan()`: embeddings and the lower half of each stack.
        blocks: Handed to `read_anatomy` where structure does not tell.
        optimizer: Where one exists already: the frozen parameters' state is dropped from it, since momentum and
            weight decay can move a weight without a gradient.

    Returns:
        The report; `print(report)` shows the table.

    Raises:
        AnatomyError: The model's blocks cannot be told.
        PlanError: The plan does not fit the model or the optimizer; nothing was changed.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=8, n_head=2, vocab_size=16))
        >>> report = freeze(model, FreezePlan(decoder_blocks=3))
        >>> report.lowest_trainable, model.train().transformer.h[0].training
        (('decoder', 3), False)
        >>> print(verify_frozen(model, report))
        38 frozen tensors, 43,744 bytes: unchanged
    """
    check_model("freeze", model)
    plan = given_plan("freeze", plan)
    if optimizer is not None:
        kind = torch.optim.Optimizer
        check_kind("freeze", "optimizer", optimizer, kind, "an optimizer of torch", "torch.optim.AdamW(...)")
    _refuse_ddp(model, "freeze")
    _end_training(model)
    anatomy = read_anatomy(model, blocks=blocks)
    resolved = plan.resolve(anatomy)
    if resolved.untied and optimizer is not None:
        raise PlanError(
            f"FreezePlan unties {resolved.untied[0]!r}; its clone is a new tensor, which the optimizer given does not "
            "hold. Call freeze() before the optimizer is made."
        )
    core = anatomy.model
    found = freeze_record(core)
    if found is not None and found[0] is not core:
        raise FreezeError(
            f"freeze was asked for a {type(core).__name__}; the {type(found[0]).__name__} inside it was frozen before "
            "it was wrapped, under other names. Call thaw(model) first, or freeze once, before or after wrapping."
        )
    record = found[1] if found else FreezeRecord(plan)
    record.plan = plan
    if resolved.untied:
        untie(core, resolved.untied)
        anatomy = read_anatomy(model, blocks=blocks)
    ours = set(record.turned_off)
    frozen_before = tuple(
        name for name, p in anatomy.parameters.items() if not p.requires_grad
        and (name not in ours or name not in resolved.frozen)
    )  # fmt: skip
    for name in resolved.frozen:
        parameter = anatomy.parameters[name]
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            record.turned_off.add(name)
        parameter.grad = None
        if optimizer is not None:
            optimizer.state.pop(parameter, None)
    if stays := tuple(name for name in frozen_before if name in ours):
        warnings.warn(_earlier_freeze(stays), stacklevel=2)
    setattr(core, _RECORD, record)
    if plan.frozen_mode == "eval":
        record.held.update(_hold_modules(anatomy, resolved))
        record.dropouts = _silence_dropouts(anatomy) | record.dropouts
    else:
        _release_modules(core, record)
    # A prefix that keeps its dropout cannot be cached, but needs no gradient either.
    has_prefix = bool(resolved.cuts) or (
        plan.frozen_mode == "train" and _frozen_from_the_bottom(anatomy.stacks[0], anatomy)
    )
    correct_checkpointing(anatomy, has_prefix=has_prefix)
    record.digests, record.without_bits = _digests(core, known=record.digests)
    return FreezeReport(anatomy, resolved, record, frozen_before)


def _earlier_freeze(names: tuple[str, ...]) -> str:
    return (
        f"An earlier freeze() stays: {len(names)} tensors that this plan trains are frozen by it, e.g. {names[0]}. "
        "freeze() only ever freezes; to lift the earlier one, call thaw(model) before freeze(model, plan)."
    )


def _refuse_ddp(model: nn.Module, what: str) -> None:
    """DDP registers the trainable parameters once: later changes drift apart between ranks, or the backward stops."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise FreezeError(
            f"{what} was asked for a model that DistributedDataParallel has wrapped already; its ranks would silently "
            f"drift apart. Call {what}(model.module) and wrap the result again."
        )


def _end_training(model: nn.Module) -> None:
    """Between two trainings: without it, one in fp32 after one in bf16 would still run in bf16, and the other way."""
    core = unwrap(model)
    if not is_being_trained(core):
        take_off_autocast(core)


def thaw(model: nn.Module) -> tuple[str, ...]:
    """Undoes what `freeze` did to a model, no more: the user's own freeze stays. Mutates the model.

    A head that was untied stays untied: tying it again would throw away what it learnt. Where PEFT has wrapped the
    model since, its base stays frozen: PEFT froze it too. On a model that `freeze` never touched it does no more than
    take off the autocast that accelerate leaves when a training is over.

    Returns:
        Names of the parameters that train again.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16))
        >>> _ = freeze(model)
        >>> len(thaw(model)), all(parameter.requires_grad for parameter in model.parameters())
        (14, True)
    """
    check_model("thaw", model)
    _refuse_ddp(model, "thaw")
    _end_training(model)
    core = unwrap(model)
    found = freeze_record(core)
    if found is None:
        return ()
    owner, record = found
    parameters = dict(owner.named_parameters()) if owner is core else {}
    names = tuple(name for name in parameters if name in record.turned_off)
    for name in names:
        parameters[name].requires_grad_(True)
    _release_modules(owner, record)
    restore_checkpointing(owner)
    delattr(owner, _RECORD)
    return names


def verify_frozen(model: nn.Module, report: FreezeReport | None = None) -> FrozenProof:
    """Proves that every frozen tensor holds the bits that it held when `freeze` took its digest.

    Persistent buffers of frozen modules count (batch-norm statistics, router biases). Tensors are matched by identity
    first, then by name. Sharded tensors (FSDP2) are gathered one by one, so every rank must call this; what accelerate
    has offloaded to the CPU or to disk is read from there.

    Args:
        model: The model that was frozen, bare or wrapped (DDP, PEFT, torch.compile).
        report: What `freeze` returned; None takes the record that it left on the model.

    Returns:
        The number of tensors and bytes compared: all that `freeze` named.

    Raises:
        FrozenWeightsChanged: A tensor moved, disappeared or became trainable; each one is named.
        FreezeError: The model was never frozen, or some of it held no bits when it was.
    """
    check_model("verify_frozen", model)
    if report is not None:
        check_kind("verify_frozen", "report", report, FreezeReport, "what freeze() returned", "report=freeze(...)")
    core = unwrap(model)
    for module in core.modules():
        if RELEASED in module.__dict__:
            module.__dict__[RELEASED].restore()
    if report is not None:
        digests, without_bits, tensors = report.digests, report.without_bits, report.tensors
    else:
        found = freeze_record(core)
        if found is None:
            raise FreezeError(
                f"verify_frozen was asked for a {type(core).__name__} that was never frozen. Call freeze(model, plan) "
                "first, or pass its report."
            )
        core, record = found  # the names are those of the module that was frozen, whatever wraps it now
        digests, without_bits, tensors = record.digests, record.without_bits, weakref.WeakValueDictionary()
    now = dict(named_tensors(core))
    identities = {id(tensor) for tensor in now.values()}
    offloaded = offloaded_tensors(core)
    changes: dict[str, list[str]] = {}
    tensor_bytes = 0
    for name, digest in digests.items():
        tensor = tensors.get(name)
        if tensor is None or id(tensor) not in identities:
            tensor = tensor_by_name(now, name)
        for change in _changes(tensor, digest, offloaded):
            now_is = f" ({kind_of_digest(digest)}, now {tensor_kind(tensor)})" if tensor is not None else ""
            changes.setdefault(change, []).append(name + (now_is if change == _RESHAPED else ""))
        if tensor is not None:
            tensor_bytes += tensor.numel() * tensor.element_size()
    if changes:
        told = "; ".join(f"{len(names)} {change}: {_shown(names)}" for change, names in changes.items())
        fixes = [fix for change, fix in _FIXES.items() if change in changes]
        raise FrozenWeightsChanged(
            f"{len(digests)} tensors should hold the bits that they held when freeze() ran, and be frozen; "
            f"{told}. {' '.join(dict.fromkeys(fixes))}"
        )
    if without_bits or not digests:
        raise FreezeError(
            f"verify_frozen was asked for a {type(core).__name__} of whose {len(digests) + len(without_bits)} frozen "
            f"tensors {len(without_bits)} were on the meta device when freeze() ran and held no bits to compare: "
            f"{_shown(without_bits)}. The others hold theirs, which proves nothing of these. Call freeze() again once "
            "all weights are loaded."
        )
    return FrozenProof(len(digests), tensor_bytes)


_GONE = "gone (replaced or renamed)"
_EMPTY = "without bits (on the meta device, and offloaded nowhere that can be read)"
_RESHAPED = "of another dtype or shape"
_MOVED = "moved"
_TRAINS = "trainable again"
_FIXES = {
    _GONE: "What replaces a module comes before freeze(); or thaw() and freeze() again.",
    _RESHAPED: "Resize the vocabulary and change the dtype before freeze(); or thaw() and freeze() again.",
    _EMPTY: "Load the weights.",
    _MOVED: "Look for an optimizer that got what moved, for edits in place, and for batch norms outside eval mode.",
    _TRAINS: "Look for what set requires_grad; call freeze() again, or thaw() where they are to train.",
}


def _changes(tensor: torch.Tensor | None, digest: str, offloaded: Mapping[int, Offloaded]) -> list[str]:
    """What is not as `freeze` left it; a tensor can train again and have moved, or train again and not have moved."""
    if tensor is None:
        return [_GONE]
    trains = [_TRAINS] if tensor.requires_grad else []
    if tensor_kind(tensor) != kind_of_digest(digest):
        return [_RESHAPED, *trains]
    bits = bits_of(tensor, offloaded)
    if bits is None:
        return [_EMPTY, *trains]
    return [_MOVED, *trains] if tensor_digest(bits) != digest else trains


def _shown(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:20]) + (f", ... and {len(names) - 20} more" if len(names) > 20 else "")


# ------------------------------------------------------------------------------------------------------ held modules


def _hold_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stands in for `train` on a frozen module: it and all below it stay in eval. Notes what was asked for."""
    module.__dict__[ASKED_MODE] = mode
    return type(module).train(module, False)


def _hold_modules(anatomy: Anatomy, resolved: ResolvedPlan) -> tuple[str, ...]:
    """Holds in eval the frozen blocks, what runs before a frozen first block down to its dropout, and every other
    outermost module all of whose parameters the plan freezes; returns their names.

    What PEFT or the user froze inside a block that trains is not held: its dropout is theirs. `train` is replaced by
    a partial of a module-level function, which deepcopy and pickle keep; in everything below a held module too, for
    the sake of loops over `modules()`, but for what a module that trains holds as well.
    """
    modules = dict(anatomy.model.named_modules())
    planned = {anatomy.parameters[name] for name in resolved.frozen}
    held = {
        name for stack in anatomy.stacks for block in stack.blocks for name in block.names if _frozen(modules[name])
    }
    for stack in anatomy.stacks:
        if _frozen_from_the_bottom(stack, anatomy):
            held.update(stack.inputs)
    around = {stack.path for stack in anatomy.stacks} | {name for stack in anatomy.stacks for name in stack.holders}
    covered = _below(held, modules)
    for name, module in modules.items():
        if name in covered or any(other == name or other.startswith(f"{name}.") or not name for other in held | around):
            continue
        own = set(module.parameters())
        if own and own <= planned:
            held.add(name)
            covered |= _below({name}, modules)
    outermost = {modules[name] for name in held}
    elsewhere = _reached_past(anatomy.model, outermost)
    for top in outermost:
        for module in top.modules():
            if module not in elsewhere:
                module.__dict__["train"] = functools.partial(_hold_in_eval, module)
                module.__dict__[ASKED_MODE] = anatomy.model.training and module is top
                module.training = False
    return tuple(name for name in modules if name in held)


def _reached_past(root: nn.Module, bounds: set[nn.Module]) -> set[nn.Module]:
    """The modules that can be reached from the root without passing one of the bounds."""
    reached: set[nn.Module] = set()
    waiting = [root]
    while waiting:
        module = waiting.pop()
        if module not in reached and module not in bounds:
            reached.add(module)
            waiting += module.children()
    return reached


def _release_modules(owner: nn.Module, record: FreezeRecord) -> None:
    """Undoes `_hold_modules` and `_silence_dropouts`: the modules follow the model's mode again."""
    modules = dict(owner.named_modules())
    held = [modules[name] for name in record.held if name in modules]
    for top in held:
        for module in top.modules():
            if isinstance(hold := module.__dict__.get("train"), functools.partial) and hold.func is _hold_in_eval:
                del module.__dict__["train"]
                module.__dict__.pop(ASKED_MODE, None)
    for top in held:
        top.train(owner.training)
    for (name, attribute), value in record.dropouts.items():
        if name in modules:
            setattr(modules[name], attribute, value)
    record.held, record.dropouts = set(), {}


def _below(names: set[str], modules: dict[str, nn.Module]) -> set[str]:
    """The names of the modules and of everything below them."""
    return {f"{name}.{child}" if child else name for name in names for child, _ in modules[name].named_modules()}


def _frozen(module: nn.Module) -> bool:
    return all(not parameter.requires_grad for parameter in module.parameters())


def _frozen_from_the_bottom(stack: Stack, anatomy: Anatomy) -> bool:
    """Whether a stack's embeddings and its first block are frozen."""
    model = anatomy.model
    return all(_frozen(model.get_submodule(name)) for name in (*stack.inputs, *stack.blocks[0].names)) and not any(
        model.get_parameter(name).requires_grad for name in stack.input_parameters
    )


def _silence_dropouts(anatomy: Anatomy) -> dict[tuple[str, str], float]:
    """Sets to 0 the dropout that a stack's own forward applies to its frozen part; returns the former values.

    BART keeps the dropout after its embeddings and LayerDrop as numbers on the stack, which also runs the trained
    blocks; so the stack itself cannot be held in eval, where others (RWKV) rescale weights and start caches. LayerDrop
    is one number a stack: where any block is frozen it is off for all.
    """
    modules = dict(anatomy.model.named_modules())
    former: dict[tuple[str, str], float] = {}
    for stack in anatomy.stacks:
        some = any(_frozen(piece) for block in stack.blocks for piece in block.modules)
        bottom = _frozen_from_the_bottom(stack, anatomy)
        for holder in stack.holders:
            for name, value in list(modules[holder].__dict__.items()):
                wanted = some if "layerdrop" in name.lower().replace("_", "") else bottom and "drop" in name.lower()
                if wanted and isinstance(value, float) and value > 0:
                    former[holder, name] = value
                    setattr(modules[holder], name, 0.0)
    return former


# ------------------------------------------------------------------------------------------------------------- untie


def untie(model: nn.Module, names: tuple[str, ...]) -> None:
    """Gives the head tensors of their own, and takes them off transformers' lists of what to tie again.

    The config is told so too where its flag is about the head alone. BART's and T5's flag also ties the encoder's and
    decoder's embeddings, which a checkpoint then holds once: it stays, and transformers leaves apart on loading what
    the checkpoint holds twice with different values.
    """
    for name in names:
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        parameter: nn.Parameter = getattr(owner, leaf)
        setattr(owner, leaf, nn.Parameter(parameter.detach().clone(), requires_grad=True))
        owner.__dict__.setdefault(UNTIED, set()).add(leaf)
    others_tied = False
    for prefix, module in model.named_modules():
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            tied = getattr(module, attribute, None)
            if isinstance(tied, dict):
                kept = {key: source for key, source in tied.items() if f"{prefix}.{key}".strip(".") not in names}
                if len(kept) < len(tied):
                    setattr(module, attribute, kept)
                others_tied |= attribute == "all_tied_weights_keys" and bool(kept)
    if not others_tied:
        for module in model.modules():
            for config in (getattr(module, "config", None), _text_config(getattr(module, "config", None))):
                if config is not None and getattr(config, "tie_word_embeddings", False):
                    config.tie_word_embeddings = False


def _text_config(config: Any) -> Any:
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else None


# ----------------------------------------------------------------------------------------------------------- digests


def freeze_record(model: nn.Module) -> tuple[nn.Module, FreezeRecord] | None:
    """The record of `freeze` and the module that it stands on: the model, or the one that PEFT wrapped since."""
    found = [(module, module.__dict__[_RECORD]) for module in model.modules() if _RECORD in module.__dict__]
    if len(found) > 1:
        names = ", ".join(type(module).__name__ for module, _ in found)
        raise FreezeError(
            f"One frozen model was asked for; this {type(model).__name__} holds {len(found)}: {names}. "
            "Pass one of them."
        )
    return found[0] if found else None


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers, each under its first name."""
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer


def tensor_by_name(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """The tensor of that name; failing that, the one whose name PEFT has wrapped around it."""
    if name in tensors:
        return tensors[name]
    leaf = name.rpartition(".")
    endings = (f".{name}", f".{leaf[0]}.base_layer.{leaf[2]}")
    found = [tensor for other, tensor in tensors.items() if f".{other}".endswith(endings)]
    return found[0] if len(found) == 1 else None


Offloaded = tuple[Mapping[str, torch.Tensor], str]


def offloaded_tensors(model: nn.Module) -> dict[int, Offloaded]:
    """Where accelerate's hooks keep what is on the meta device between two forwards: a mapping and a name in it, by
    the identity of the tensor. Nothing is read, and nothing brought in: a hook that runs makes new parameters.
    """
    places: dict[int, Offloaded] = {}
    for module in model.modules():
        waiting: list[Any] = [module.__dict__.get("_hf_hook")]
        while waiting:
            hook = waiting.pop()
            waiting += getattr(hook, "hooks", ())  # several in a row
            weights = getattr(hook, "weights_map", None)
            if getattr(hook, "offload", False) and weights is not None:
                below = hook.place_submodules
                for name, tensor in (*module.named_parameters(recurse=below), *module.named_buffers(recurse=below)):
                    places[id(tensor)] = weights, name
    return places


def bits_of(tensor: torch.Tensor, offloaded: Mapping[int, Offloaded]) -> torch.Tensor | None:
    """A tensor, from where it was offloaded to if it was; None where it holds no bits."""
    if tensor.device.type != "meta":
        return tensor
    weights, name = offloaded.get(id(tensor), ({}, ""))
    try:
        return weights[name].to(tensor.dtype)  # as the hook does when it brings it in
    except (KeyError, OSError, ValueError):  # the folder that it was offloaded to is gone, or is another one
        return None


def _digests(model: nn.Module, known: dict[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Digest of every frozen parameter and of the persistent buffers of modules without a trainable parameter, and the
    names of those that hold no bits.

    A tensor that an earlier call froze keeps its first digest, or freezing again would hide that it moved; one that
    has another dtype or shape since was replaced in the open, by `resize_token_embeddings` or `.to(dtype)`.
    """
    digests: dict[str, str] = {}
    without_bits = []
    offloaded = offloaded_tensors(model)
    modules = dict(model.named_modules())
    for name, tensor in named_tensors(model):
        if isinstance(tensor, nn.Parameter):
            frozen = not tensor.requires_grad
        else:  # a module without parameters, such as a plain batch norm, goes with the one around it
            path = name.rpartition(".")[0]
            while path and next(modules[path].parameters(), None) is None:
                path = path.rpartition(".")[0]
            frozen = _frozen(modules[path])
        if not frozen:
            continue
        first, bits = known.get(name), bits_of(tensor, offloaded)
        if bits is None:
            without_bits.append(name)
        else:
            digests[name] = first if first and kind_of_digest(first) == tensor_kind(tensor) else tensor_digest(bits)
    return digests, tuple(without_bits)


def tensor_kind(tensor: torch.Tensor) -> str:
    """A tensor's dtype and shape, e.g. "float32 [8, 8]"."""
    shape = getattr(tensor, "ds_shape", tensor.shape)  # DeepSpeed ZeRO-3 shows the shape of what it left here: 0
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(shape)}"


def kind_of_digest(digest: str) -> str:
    """The dtype and shape in what `tensor_digest` returned."""
    return digest.rpartition(" ")[0]


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which each process holds a part; every process must ask."""
    if getattr(tensor, "ds_id", None) is not None:  # DeepSpeed ZeRO-3
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # FSDP2 or tensor parallelism


def tensor_digest(tensor: torch.Tensor) -> str:
    """A tensor's dtype and shape, and a 128-bit digest of its bytes; several GB a second and core.

    Finds accidents, not forgers: XXH3 is no cryptographic hash.
    """
    import xxhash

    tensor = whole_tensor(tensor)
    state = xxhash.xxh3_128()
    flat = tensor.contiguous().reshape(-1)
    step = max(1, (64 << 20) // max(1, flat.element_size()))  # 64 MiB at a time off an accelerator
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step].cpu()
        state.update(piece.view(torch.uint8).numpy().data)
    return f"{tensor_kind(tensor)} {state.hexdigest()}"
