"""Activation checkpointing of a partly frozen model: what carries a gradient is recomputed, the prefix has none.

transformers lets the embeddings' output require a gradient wherever checkpointing is switched on, so that the backward
pass runs through the frozen prefix again; its reentrant variant leaves the first trained blocks without a gradient.
Hooks undo both at each forward, since Trainer switches checkpointing on inside `train()`, after `freeze`. Nothing is
switched on here, and no flag is changed. A stack that checkpoints its blocks in its own forward is treated alike. Left
alone are modules that call torch's checkpoint by themselves, and a forward that torch.compile traces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from hf_freeze.anatomy import Anatomy
from hf_freeze.freezing.holding import is_frozen
from hf_freeze.marks import ASKED_MODE

__all__ = ["correct_checkpointing", "restore_checkpointing"]

_FUNCTION = "_gradient_checkpointing_func"  # transformers' name for what runs a block under checkpointing


def correct_checkpointing(anatomy: Anatomy, *, has_prefix: bool) -> None:
    """Makes activation checkpointing right for a model that `freeze` has frozen. Mutates: it registers hooks.

    It makes no difference when checkpointing is switched on, how and by whom. From then on:

    - Checkpointing is never reentrant, whatever `use_reentrant` says.
    - The output of a frozen module before the first block requires a gradient only where its input does. For a gradient
      with respect to the input, give the model `inputs_embeds` that require one.
    - A frozen block is checkpointed exactly where a gradient flows through it, though it is held in eval.

    Call it after `requires_grad` was set and modules are held in eval; `has_prefix` says whether blocks at the bottom
    are frozen and nothing below them trains.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_freeze import FreezePlan, freeze
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=8, n_head=2, vocab_size=16)).train()
        >>> _ = freeze(model, FreezePlan(decoder_blocks=3))  # calls correct_checkpointing
        >>> model.activation_checkpointing_enable()
        >>> model.transformer.wte(torch.tensor([1])).requires_grad
        False
    """
    model = anatomy.model
    restore_checkpointing(model)
    pieces = {piece for stack in anatomy.stacks for block in stack.blocks for piece in block.modules}
    if not has_prefix and not any(ASKED_MODE in piece.__dict__ for piece in pieces):
        return
    for module in model.modules():
        # Asked of the module itself: a PeftModel answers for the model inside.
        if "gradient_checkpointing" in module.__dict__ or hasattr(type(module), "gradient_checkpointing"):
            module.register_forward_pre_hook(_before_checkpointing, with_kwargs=True)
    if has_prefix:
        for module in _input_modules(anatomy):
            module.register_forward_pre_hook(_come_last)
            module.register_forward_hook(_hand_on_no_gradient, with_kwargs=True)


def restore_checkpointing(model: nn.Module) -> None:
    """Undoes `correct_checkpointing`: checkpointing is again what the user switched on. Mutates the model."""
    for module in model.modules():
        for hooks, with_kwargs in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if any(hook is ours for ours in _HOOKS)]:
                del hooks[key]
                with_kwargs.pop(key, None)
        function: Any = module.__dict__.get(_FUNCTION)
        if _is_ours(function):
            setattr(module, _FUNCTION, function.keywords["given"])


def _input_modules(anatomy: Anatomy) -> Iterator[nn.Module]:
    """The modules before the first blocks, and all that transformers' and PEFT's input-gradient hooks may stand on."""
    modules = [anatomy.model.get_submodule(name) for stack in anatomy.stacks for name in stack.inputs]
    for module in anatomy.model.modules():
        with suppress(AttributeError, NotImplementedError, TypeError):  # no Hugging Face model, or without embeddings
            modules.append(module.get_input_embeddings())  # type: ignore[operator]
    return (module for module in dict.fromkeys(modules) if isinstance(module, nn.Module))


def _carries_gradient(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in tree_leaves((args, kwargs)))


# ---------------------------------------------------------------------------------------------------- before block 0


def _come_last(module: nn.Module, _: tuple[Any, ...]) -> None:
    """Moves our forward hook behind those registered since: one of them makes the output require a gradient."""
    if torch.compiler.is_compiling():
        return
    hooks = module._forward_hooks
    ours = next((key for key, hook in hooks.items() if hook is _hand_on_no_gradient), None)
    if ours is not None and ours != next(reversed(hooks)):
        hooks[ours] = hooks.pop(ours)


def _hand_on_no_gradient(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> torch.Tensor | None:
    """Detaches the output where no gradient can have a use: a frozen module, and nothing below it asks for one."""
    if not isinstance(output, torch.Tensor) or not output.requires_grad:
        return None
    return None if _carries_gradient(args, kwargs) or not is_frozen(module) else output.detach()


# ------------------------------------------------------------------------------------------------------------ blocks


def _before_checkpointing(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Puts our function in the place of the one that is to checkpoint this block, or the blocks of this stack."""
    if not module.gradient_checkpointing or torch.compiler.is_compiling():
        return
    given = module.__dict__.get(_FUNCTION)
    if given is None:
        return
    if not _is_ours(given):
        function = functools.partial(_checkpoint_if_it_trains, given=given, corrected=_without_reentrance(given))
        setattr(module, _FUNCTION, function)
    # transformers checkpoints a block in train mode only. One that is held in eval and carries a gradient, such as a
    # decoder's above an encoder that trains, is shown as training until our function is reached, and run in eval.
    if module.__dict__.get(ASKED_MODE) and torch.is_grad_enabled() and _carries_gradient(args, kwargs):
        from transformers.modeling_layers import GradientCheckpointingLayer

        module.training = isinstance(module, GradientCheckpointingLayer)  # which checkpoints itself


def _checkpoint_if_it_trains(
    run: Callable[..., Any], *args: Any, given: Any, corrected: Callable[..., Any], **kwargs: Any
) -> Any:
    """Stands in for transformers' checkpoint function: a block without a gradient is run plainly, others checkpointed.

    `run` is a partial of the block's forward, or in a stack that checkpoints its blocks itself the block's `__call__`;
    args and kwargs are what the block gets. `given` is the function that checkpointing was switched on with, which
    `restore_checkpointing` puts back, `corrected` the same without reentrance.
    """
    bound = run.keywords if isinstance(run, functools.partial) else {}
    block = run.args[0] if isinstance(run, functools.partial) and run.args else getattr(run, "__self__", None)
    if isinstance(block, nn.Module):
        if ASKED_MODE in block.__dict__:
            block.training = False
        if not _carries_gradient(args, bound | kwargs) and is_frozen(block):
            return run(*args, **kwargs)
    return corrected(run, *args, **kwargs)


def _is_ours(function: Any) -> bool:
    return isinstance(function, functools.partial) and function.func is _checkpoint_if_it_trains


def _without_reentrance(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with use_reentrant=False, where it is torch's checkpoint or was told about reentrance.

    >>> _without_reentrance(functools.partial(checkpoint, use_reentrant=True)).keywords
    {'use_reentrant': False}
    """
    bound = function.keywords if isinstance(function, functools.partial) else {}
    inner = function.func if isinstance(function, functools.partial) else function
    if "use_reentrant" in bound or inner is checkpoint:
        return functools.partial(function, use_reentrant=False)
    return function


_HOOKS: tuple[Callable[..., Any], ...] = (_before_checkpointing, _come_last, _hand_on_no_gradient)
