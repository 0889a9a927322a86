"""One text as a map: where a block looks, and how large the states are at each layer."""

from __future__ import annotations

import functools
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_freeze.anatomy import BlocksGiven, read_anatomy
from hf_freeze.errors import FreezeError
from hf_freeze.lens.results import Numbers, Rows, six_digits
from hf_freeze.lens.states import call, core_of, looking, record, without_labels
from hf_freeze.lens.texts import ids_read_by, real_tokens, text_batches, token_texts
from hf_freeze.prefix.states import map_tree

__all__ = ["ActivationMap", "AttentionMap", "activation_map", "attention_map"]


@dataclass(frozen=True)
class AttentionMap(Numbers):
    """Where one block looks, in one text.

    Attributes:
        stack: "encoder" or "decoder".
        block: Which block of it.
        kind: "self", or "cross" for a decoder that looks at the encoder.
        queries: The tokens that look.
        keys: The tokens that are looked at.
        weights: [heads][queries][keys]; each row sums to 1.
    """

    stack: str
    block: int
    kind: str
    queries: tuple[str, ...] = field(repr=False)
    keys: tuple[str, ...] = field(repr=False)
    weights: tuple[Rows, ...] = field(repr=False)


@dataclass(frozen=True)
class ActivationMap(Numbers):
    """How large the states of one text are.

    Attributes:
        tokens: By stack, the text's tokens.
        rms: By stack, [layers][tokens]: root mean square of the state's features. Row 0 is what enters block 0.
    """

    tokens: dict[str, tuple[str, ...]]
    rms: dict[str, Rows] = field(repr=False)


def attention_map(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    block: int,
    *,
    stack: str | None = None,
    cross: bool = False,
    target: str | None = None,
    max_tokens: int = 32,
    blocks: BlocksGiven | None = None,
) -> AttentionMap:
    """Takes one block's attention weights on one text: who looks at whom, head by head.

    Kernels such as SDPA never make the weights, so the attention is computed eagerly meanwhile. The weights are told by
    what they are: what a module of the block returns with rows over the text that are not negative and sum to 1.

    Args:
        model: Any model; a block without attention is declined.
        tokenizer: Its tokenizer.
        text: What is read.
        block: Which block; -1 is the top one.
        stack: "encoder" or "decoder"; None is the decoder, or the only one.
        cross: What a decoder's block sees of the encoder, instead of itself.
        target: What an encoder-decoder's decoder reads; None is the text.
        max_tokens: Longer texts lose their end. 32, which can still be read in a picture.
        blocks: Handed to `read_anatomy` where structure does not tell.

    Returns:
        The weights of each head.

    Raises:
        FreezeError: An empty text, no such stack or block, or one that gives no weights; then those that do are named.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_freeze.inputs.tokenizer import doctest_tokenizer
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=300))
        >>> attention = attention_map(model, doctest_tokenizer(), "Good mug.", block=-1)
        >>> attention.block, len(attention.weights), attention.weights[0][0][:2]
        (2, 2, (1.0, 0.0))
    """
    anatomy = read_anatomy(model, blocks=blocks)
    where = anatomy.stack(stack) if stack else anatomy.stacks[-1]
    if not -len(where) <= block < len(where):
        raise FreezeError(
            f"The attention of {where.name} block {block} was asked for; {anatomy.model_class} has the blocks 0 to "
            f"{len(where) - 1} (-1 is the top one)."
        )
    if cross and not (len(anatomy.stacks) == 2 and where.name == "decoder"):
        raise FreezeError(
            f"Cross-attention in the {where.name} of {anatomy.model_class} was asked for; only the decoder of an "
            "encoder-decoder has it. Leave cross out."
        )
    index = block % len(where)
    (batch,) = text_batches(model, tokenizer, [text], target and [target], max_tokens=max_tokens)
    queries = ids_read_by(anatomy, where.name, batch)
    keys = batch["input_ids"][0] if cross else queries
    maps: dict[int, list[torch.Tensor]] = defaultdict(list)  # by block

    def keep(number: int, _: nn.Module, __: Any, output: Any) -> None:
        def look(value: Any) -> None:
            if _is_attention(value, queries, keys) and all(value is not known for known in maps[number]):
                maps[number].append(value)  # one is returned by several modules

        map_tree(look, output)

    with looking(model), ExitStack() as hooks:
        core = core_of(model)
        if hasattr(core, "set_attn_implementation"):
            core.set_attn_implementation("eager")  # until `looking` puts the configs back
        for each in where.blocks:
            for module in (module for piece in each.modules for module in piece.modules()):
                handle = module.register_forward_hook(functools.partial(keep, each.index))
                hooks.callback(handle.remove)
        call(model, without_labels(batch))
        if not maps[index]:  # some classes return none unasked; asked, others keep hooks of their own for it
            call(model, without_labels(batch) | {"output_attentions": True})
    if cross and len(queries) == len(keys):  # then self-attention has the same shape; a block looks at itself first
        maps = defaultdict(list, {number: seen[1:] for number, seen in maps.items()})
    if not maps[index]:
        others = [str(number) for number in sorted(maps) if maps[number]]
        fix = f"Blocks that do: {', '.join(others)}." if others else "None of its blocks does; see activation_map."
        raise FreezeError(
            f"The {'cross-' * cross}attention of {where.name} block {index} was asked for; {anatomy.model_class} gives "
            f"no weights there over {len(keys)} tokens, even with eager attention. {fix}"
        )
    return AttentionMap(
        str(where.name),
        index,
        "cross" if cross else "self",
        token_texts(tokenizer, queries),
        token_texts(tokenizer, keys),
        six_digits(maps[index][0].reshape(-1, len(queries), len(keys))),
    )


def activation_map(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    target: str | None = None,
    max_tokens: int = 48,
    blocks: BlocksGiven | None = None,
) -> ActivationMap:
    """Measures how large the states of one text are: the root mean square of each token's state at each layer.

    It shows where a decoder keeps its attention sink (Sun et al., "Massive Activations in Large Language Models",
    2024), how the residual stream grows, and a block that does little.

    Args:
        model: Any model that `read_anatomy` reads.
        tokenizer: Its tokenizer.
        text: What is read.
        target: What an encoder-decoder's decoder reads; None is the text.
        max_tokens: Longer texts lose their end. 48, which can still be read in a picture.
        blocks: Handed to `read_anatomy` where structure does not tell.

    Returns:
        The sizes, one matrix a stack.

    Raises:
        FreezeError: An empty text, or states that are not finite.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_freeze.inputs.tokenizer import doctest_tokenizer
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=300))
        >>> activations = activation_map(model, doctest_tokenizer(), "Good mug.")
        >>> len(activations.rms["decoder"]), activations.tokens["decoder"][0]
        (4, 'G')
    """
    anatomy = read_anatomy(model, blocks=blocks)
    (batch,) = text_batches(model, tokenizer, [text], target and [target], max_tokens=max_tokens)
    tokens, rms = {}, {}
    with looking(model):
        kept = record(model, anatomy, batch)
        for stack in anatomy.stacks:
            real = real_tokens(anatomy, stack.name, batch)
            layers = [states[real.to(states.device)].double() for states in kept.layers(stack, real)]
            tokens[str(stack.name)] = token_texts(tokenizer, ids_read_by(anatomy, stack.name, batch))
            rms[str(stack.name)] = six_digits(torch.stack([each.square().mean(dim=-1).sqrt().cpu() for each in layers]))
    return ActivationMap(tokens, rms)


def _is_attention(value: Any, queries: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether this is attention weights [..., queries, keys]; with a sink of its own, rows may sum to less than 1."""
    if not (isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() in (3, 4)):
        return False
    if value.shape[-2:] != (len(queries), len(keys)) or value.min() < 0:
        return False
    sums = value.sum(dim=-1)
    return bool(sums.min() > 0 and sums.max() < 1.01)
