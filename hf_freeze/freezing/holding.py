"""Frozen modules held in eval, whatever `model.train()` says, and the dropout that a stack applies to them turned off.

What runs in a module that trains is left alone. `release_modules` undoes all of it.
"""

from __future__ import annotations

import functools
from itertools import accumulate

from torch import nn

from hf_freeze.anatomy import Anatomy, Stack
from hf_freeze.freezing.report import FreezeRecord
from hf_freeze.marks import ASKED_MODE
from hf_freeze.plan import ResolvedPlan

__all__ = ["hold_modules", "is_frozen", "is_frozen_from_the_bottom", "release_modules", "silence_dropouts"]


def _hold_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stands in for `train` on a frozen module: it and all below it stay in eval. Notes what was asked for."""
    module.__dict__[ASKED_MODE] = mode
    return type(module).train(module, False)


def hold_modules(anatomy: Anatomy, resolved: ResolvedPlan) -> tuple[str, ...]:
    """Holds frozen modules in eval and returns their names.

    Held are the frozen blocks, what runs before a frozen first block, its dropout too, and every other outermost
    module all of whose parameters the plan freezes. What PEFT or the user froze inside a block that trains is not held:
    its dropout is theirs.

    `train` is replaced by a partial of a module-level function, which deepcopy and pickle keep. A module inside a held
    one gets its own, since some loops call `train` on each of `modules()`; one that a trained module shares gets none.
    """
    modules = dict(anatomy.model.named_modules())
    planned = {anatomy.parameters[name] for name in resolved.frozen}
    held = {
        name for stack in anatomy.stacks for block in stack.blocks for name in block.names if is_frozen(modules[name])
    }
    for stack in anatomy.stacks:
        if is_frozen_from_the_bottom(stack, anatomy):
            held.update(stack.inputs)
    stacks = {name for stack in anatomy.stacks for name in (stack.path, *stack.holders)}
    # What holds a stack or a held module is no candidate: part of it may train.
    above = {""}.union(*(accumulate(name.split("."), "{}.{}".format) for name in held | stacks))
    covered = _below(held, modules)
    for name, module in modules.items():
        own = set(module.parameters()) if name not in above and name not in covered else set()
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


def release_modules(owner: nn.Module, record: FreezeRecord) -> None:
    """Undoes `hold_modules` and `silence_dropouts`: the modules follow the model's mode again."""
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


def is_frozen(module: nn.Module) -> bool:
    return all(not parameter.requires_grad for parameter in module.parameters())


def is_frozen_from_the_bottom(stack: Stack, anatomy: Anatomy) -> bool:
    """Whether a stack's embeddings and its first block are frozen."""
    model = anatomy.model
    return all(is_frozen(model.get_submodule(name)) for name in (*stack.inputs, *stack.blocks[0].names)) and not any(
        model.get_parameter(name).requires_grad for name in stack.input_parameters
    )


def silence_dropouts(anatomy: Anatomy) -> dict[tuple[str, str], float]:
    """Sets to 0 the dropout that a stack's own forward applies to its frozen part; returns the former values.

    BART keeps the dropout after its embeddings and LayerDrop as numbers on the stack, which also runs the trained
    blocks; so the stack itself cannot be held in eval, where others (RWKV) rescale weights and start caches. LayerDrop
    is one number a stack: where any block is frozen it is off for all.
    """
    modules = dict(anatomy.model.named_modules())
    former: dict[tuple[str, str], float] = {}
    for stack in anatomy.stacks:
        some = any(is_frozen(piece) for block in stack.blocks for piece in block.modules)
        bottom = is_frozen_from_the_bottom(stack, anatomy)
        for holder in stack.holders:
            for name, value in list(modules[holder].__dict__.items()):
                wanted = some if "layerdrop" in name.lower().replace("_", "") else bottom and "drop" in name.lower()
                if wanted and isinstance(value, float) and value > 0:
                    former[holder, name] = value
                    setattr(modules[holder], name, 0.0)
    return former
