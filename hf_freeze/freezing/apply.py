"""Applies a plan: `freeze` turns gradients off, `thaw` undoes just that, `untie` gives a head tensors of its own.

Selection is the plan's, the proof is `proof`'s. What was frozen before `freeze` stays so after `thaw`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from hf_freeze.anatomy import BlocksGiven, read_anatomy
from hf_freeze.errors import FreezeError, PlanError
from hf_freeze.freezing.checkpointing import correct_checkpointing, restore_checkpointing
from hf_freeze.freezing.holding import hold_modules, is_frozen_from_the_bottom, release_modules, silence_dropouts
from hf_freeze.freezing.proof import take_digests
from hf_freeze.freezing.report import FreezeRecord, FreezeReport, earlier_freeze, freeze_record
from hf_freeze.given import check_kind, check_model
from hf_freeze.marks import RECORD, UNTIED
from hf_freeze.plan import FreezePlan, given_plan
from hf_freeze.tensors import unwrap
from hf_freeze.trial import is_being_trained, take_off_autocast

__all__ = ["freeze", "thaw", "untie"]


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
        >>> from hf_freeze import verify_frozen
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
    _take_off_autocast_left(model)
    anatomy = read_anatomy(model, blocks=blocks)
    resolved = plan.resolve(anatomy)
    if resolved.untied and optimizer is not None:
        raise PlanError(
            f"FreezePlan unties {resolved.untied[0]!r}; its clone is a new tensor, which the optimizer given does not "
            "hold. Call freeze() before the optimizer is made."
        )
    core = anatomy.model
    owner, record = freeze_record(core) or (core, FreezeRecord(plan))
    if owner is not core:
        raise FreezeError(
            f"freeze was asked for a {type(core).__name__}; the {type(owner).__name__} inside it was frozen before it "
            "was wrapped, under other names. Call thaw(model) first, or freeze once, before or after wrapping."
        )
    record.plan = plan
    if resolved.untied:
        untie(core, resolved.untied)
        anatomy = read_anatomy(model, blocks=blocks)
    earlier = set(record.turned_off)  # by an earlier freeze(): where this plan freezes it too, it counts as this one's
    frozen_before = tuple(
        name for name, p in anatomy.parameters.items() if not p.requires_grad
        and (name not in earlier or name not in resolved.frozen)
    )  # fmt: skip
    for name in resolved.frozen:
        parameter = anatomy.parameters[name]
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            record.turned_off.add(name)
        parameter.grad = None
        if optimizer is not None:
            optimizer.state.pop(parameter, None)
    setattr(core, RECORD, record)
    if plan.frozen_mode == "eval":
        record.held.update(hold_modules(anatomy, resolved))
        record.dropouts = silence_dropouts(anatomy) | record.dropouts
    else:
        release_modules(core, record)
    # A prefix that keeps its dropout cannot be cached, but needs no gradient either.
    has_prefix = bool(resolved.cuts) or (
        plan.frozen_mode == "train" and is_frozen_from_the_bottom(anatomy.stacks[0], anatomy)
    )
    correct_checkpointing(anatomy, has_prefix=has_prefix)
    record.digests, record.without_bits = take_digests(core, known=record.digests)
    if stays := tuple(name for name in frozen_before if name in earlier):  # last: a warning may be made an error
        warnings.warn(earlier_freeze(stays), stacklevel=2)
    return FreezeReport(anatomy, resolved, record, frozen_before)


def _refuse_ddp(model: nn.Module, what: str) -> None:
    """DDP registers the trainable parameters once: later changes drift apart between ranks, or the backward stops."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise FreezeError(
            f"{what} was asked for a model that DistributedDataParallel has wrapped already; its ranks would silently "
            f"drift apart. Call {what}(model.module) and wrap the result again."
        )


def _take_off_autocast_left(model: nn.Module) -> None:
    """Without it, a training in fp32 after one in bf16 would still run in bf16, and the other way round."""
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
    _take_off_autocast_left(model)
    core = unwrap(model)
    found = freeze_record(core)
    if found is None:
        return ()
    owner, record = found
    parameters = dict(owner.named_parameters()) if owner is core else {}
    names = tuple(name for name in parameters if name in record.turned_off)
    for name in names:
        parameters[name].requires_grad_(True)
    release_modules(owner, record)
    restore_checkpointing(owner)
    delattr(owner, RECORD)
    return names


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
    return config.get_text_config() if callable(getattr(config, "get_text_config", None)) else None
