"""The top block only where there is a label: most of it runs at those few positions, keys and values at every one.

Above the top block nothing mixes tokens, so that whatever in it works on each token by itself (the feed-forward part,
the projections of queries and of the attention's output) may skip the tokens that predict no label. Which modules
those are is tried on a few tokens, not assumed. This module acts only on calls that keep supervised logits by a mask;
who asks for those is `supervised`'s business.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from hf_freeze.anatomy import read_anatomy
from hf_freeze.errors import FreezeError
from hf_freeze.inputs import IGNORED_LABEL
from hf_freeze.marks import TOP_BLOCK_HANDLES, TOP_BLOCK_POSITIONS
from hf_freeze.trial import on_trial, random_numbers, seed_all

__all__ = ["reduce_top_block", "whole_top_block"]

SAME = 1e-4  # relative: a product of few rows is rounded otherwise than one of many


def reduce_top_block(core: nn.Module) -> tuple[str, ...]:
    """Lets the token-wise modules of the top block run only at the positions that `logits_to_keep` masks, in training.

    Args:
        core: The model whose call gets `logits_to_keep` [batch, tokens] as a mask; it gets hooks. Its weights, modes
            and random state stay.

    Returns:
        Names of the modules that run at few positions; () where none can, or where that would change the loss, a
        gradient or the random numbers of a dropout.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        ...     num_attention_heads=2, num_key_value_heads=2, vocab_size=16))
        >>> reduce_top_block(model)
        ('model.layers.1.self_attn.q_proj', 'model.layers.1.self_attn.o_proj', 'model.layers.1.mlp')
    """
    if TOP_BLOCK_HANDLES in core.__dict__:
        return tuple(core.__dict__[TOP_BLOCK_HANDLES][0])
    try:
        block = read_anatomy(core).stacks[-1].blocks[-1]
    except FreezeError:
        return ()
    top = block.modules[0]
    if len(block.modules) != 1 or not any(parameter.requires_grad for parameter in top.parameters()):
        return ()
    reduced: dict[str, nn.Module] = {}
    with suppress(Exception), on_trial(core, training=True):  # a foreign forward may raise anything: it stays whole
        reduced = _try_out(core, top)
    if not reduced:
        return ()
    names = tuple(f"{block.names[0]}.{name}" for name in reduced)
    positions: list[torch.Tensor] = []
    handles = [handle for module in reduced.values() for handle in _hook(module, positions)]
    core.__dict__[TOP_BLOCK_POSITIONS] = positions
    handles.append(core.register_forward_pre_hook(_set_positions, with_kwargs=True))
    handles.append(core.register_forward_hook(_clear_positions, always_call=True))
    core.__dict__[TOP_BLOCK_HANDLES] = (names, handles, top)
    return names


def whole_top_block(core: nn.Module) -> None:
    """Undoes `reduce_top_block`."""
    if TOP_BLOCK_HANDLES not in core.__dict__:
        return
    for handle in core.__dict__.pop(TOP_BLOCK_HANDLES)[1]:
        handle.remove()
    for module in core.modules():
        module.__dict__.pop(TOP_BLOCK_POSITIONS, None)


# ---------------------------------------------------------------------------------------------------------- the hooks


def _hook(module: nn.Module, positions: list[torch.Tensor]) -> list[Any]:
    module.__dict__[TOP_BLOCK_POSITIONS] = positions
    return [module.register_forward_pre_hook(_gather), module.register_forward_hook(_scatter)]


def _set_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a call of the model: where its labels are predicted. A call that asks for more than the logits runs whole:
    states, attentions, router logits and the loss that balances experts are of all tokens.
    """
    positions: list[torch.Tensor] = module.__dict__[TOP_BLOCK_POSITIONS]
    positions.clear()
    mask = kwargs.get("logits_to_keep")
    if not (module.training and isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.dim() == 2):
        return
    # A block that is run again in the backward pass would then find no positions.
    checkpointed = getattr(module.__dict__[TOP_BLOCK_HANDLES][2], "gradient_checkpointing", False)
    replicated = module.__dict__.get("_is_replica")  # DataParallel's threads would share the positions
    if _asks_for_more(module, args, kwargs) or checkpointed or replicated or torch.compiler.is_compiling():
        return
    positions += [mask.flatten().nonzero().squeeze(1), torch.tensor(mask.shape)]


def _asks_for_more(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call, or the config at that moment, asks for an output beside the logits: transformers calls each such
    switch output_*, whatever the model. What the call says of one counts before the config.
    """
    given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
    said = {name: value for name, value in given.items() if name.startswith("output_") and value is not None}
    config: Any = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    switched = {
        name.lstrip("_") for source in (config, text) if source is not None for name in vars(source)
        if name.lstrip("_").startswith("output_") and getattr(source, name.lstrip("_"), None) is True
    }  # fmt: skip
    return any(said.values()) or not switched <= said.keys()


def _clear_positions(module: nn.Module, *_: Any) -> None:
    module.__dict__[TOP_BLOCK_POSITIONS].clear()


def _gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Before a token-wise module: its input at the positions only."""
    positions = module.__dict__[TOP_BLOCK_POSITIONS]
    if not positions:
        return None
    states = args[0]
    return (states.flatten(0, 1).index_select(0, positions[0]), *args[1:])


def _scatter(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
    """After it: zeros elsewhere."""
    positions = module.__dict__[TOP_BLOCK_POSITIONS]
    if not positions:
        return None
    rows, tokens = positions[1].tolist()
    whole = output.new_zeros((rows * tokens, *output.shape[1:]))
    return whole.index_copy(0, positions[0], output).view(rows, tokens, *output.shape[1:])


# ---------------------------------------------------------------------------------------------------------- the trial


class _TopReached(Exception):
    """Carries what the top block is called with."""


def _try_out(core: Any, top: nn.Module) -> dict[str, nn.Module]:
    """The largest modules of the top block that may run at few positions, by name in the block."""
    device = next(core.parameters()).device
    vocabulary = core.config.get_text_config().vocab_size
    ids = ((torch.arange(18, device=device) * 5 + 3) % vocabulary).reshape(3, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]], device=device).bool()

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _TopReached(args, kwargs)

    handle = top.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            core(input_ids=ids)
        return {}
    except _TopReached as reached:
        args, kwargs = reached.args
    finally:
        handle.remove()
    kwargs = {key: value for key, value in kwargs.items() if "cache" not in key and key != "past_key_values"}
    block = top
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in top.parameters()):
        block = copy.deepcopy(top).float()  # rounding to 16 bits would hide a module that mixes tokens a little
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.float() if t.is_floating_point() else t, (args, kwargs))

    def run_block() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        seed_all(top)
        output = block(*args, **kwargs)
        states = output[0] if isinstance(output, tuple) else output
        kept = states[mask]
        towards = torch.linspace(-1, 1, kept.numel(), device=device).reshape(kept.shape)
        return _gradients(block, (kept.float() * towards).sum(), kept), random_numbers(core)

    positions = [mask.flatten().nonzero().squeeze(1), torch.tensor(mask.shape)]
    plain, random_after = run_block()
    accepted: dict[str, nn.Module] = {}

    def holds(candidates: dict[str, nn.Module], run: Callable[[], Any], wanted: list[torch.Tensor]) -> bool:
        called: set[nn.Module] = set()
        handles = [handle for module in candidates.values() for handle in _hook(module, positions)]
        handles += [m.register_forward_hook(lambda m, *_: called.add(m)) for m in candidates.values()]
        try:
            got, random_now = run()
        except Exception:  # it takes no fewer tokens, such as attention itself
            return False
        finally:
            for handle in handles:
                handle.remove()
            for module in candidates.values():
                del module.__dict__[TOP_BLOCK_POSITIONS]
        every_called = called == set(candidates.values())  # else its weight is used past its call, and nothing is saved
        return every_called and all(map(torch.equal, random_now, random_after)) and _same(got, wanted)

    def try_children(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            if any(parameter.dim() > 1 for parameter in child.parameters()):
                if holds({path + name: child}, run_block, plain):
                    accepted[path + name] = child
                else:
                    try_children(child, f"{path}{name}.")

    try_children(block, "")
    if not accepted or not holds(accepted, run_block, plain):
        return {}
    accepted = {name: top.get_submodule(name) for name in accepted}

    labels = torch.full_like(ids, IGNORED_LABEL)
    labels[:, 1:][mask[:, :-1]] = ids[:, 1:][mask[:, :-1]]
    kept = torch.zeros_like(mask)
    kept[:, :-1] = labels[:, 1:] != IGNORED_LABEL
    positions[0] = kept.flatten().nonzero().squeeze(1)

    def run_model() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        seed_all(core)
        # By the model's own loss: experts may be balanced in it over all tokens, whoever asks for that.
        targets = labels[:, 1:][kept[:, :-1]]
        loss = core(input_ids=ids, labels=labels, logits_to_keep=kept, shift_labels=targets).loss
        return _gradients(core, loss, loss.reshape(1)), random_numbers(core)

    wanted, random_after = run_model()
    return accepted if holds(accepted, run_model, wanted) else {}


def _gradients(module: nn.Module, loss: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    """A value and the gradients of what trains; those on the parameters stay as they are."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    return [value.detach(), *(torch.zeros(()) if gradient is None else gradient for gradient in gradients)]


def _same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    """Whether all agree within the rounding of their precision, measured by the largest."""
    scale = max(float(t.float().norm()) for t in theirs[1:])
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one.shape != other.shape or not torch.isfinite(other).all():
            return False
        grain = SAME if one.dtype == torch.float32 else 16 * torch.finfo(one.dtype).eps
        size = float(other.float().norm()) if number == 0 else max(float(other.float().norm()), 1e-2 * scale)
        if not float((one.float() - other.float()).norm()) <= grain * size:
            return False
    return True
