"""Cuts: how much of a model is a constant of its input while only some tensors train.

This is what a plan allows; whether it can be computed once and stored is tried by `prefix`.
"""

from __future__ import annotations

from typing import NamedTuple

from hf_freeze.anatomy import Anatomy, Stack

__all__ = ["Cut", "find_cuts"]


class Cut(NamedTuple):
    """A place in a stack: its lowest `blocks` blocks, and all that lies before them, can be computed once."""

    stack: str
    blocks: int


def find_cuts(anatomy: Anatomy, trainable: set[str]) -> tuple[tuple[Cut, ...], str]:
    """The cuts of a model while only these tensors train, lowest first; where there is none, () and the reason.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from hf_freeze.anatomy import read_anatomy
    >>> anatomy = read_anatomy(GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=16)))
    >>> find_cuts(anatomy, {"transformer.h.2.ln_1.weight"})
    ((Cut(stack='decoder', blocks=2),), '')
    """
    cuts: list[Cut] = []
    for stack in anatomy.stacks:
        moving = [
            n for n, part in anatomy.parts.items() if n in trainable
            and part.kind in ("embeddings", "tower") and part.stack in ("", stack.name)
        ]  # fmt: skip
        if moving:
            why = f"the embeddings train ({moving[0]}), so every block's input changes every step."
            return tuple(cuts), "" if cuts else why
        depth = _frozen_depth(anatomy, stack, trainable)
        if depth:
            cuts.append(Cut(stack.name, depth))
        whole = depth == len(stack) and not any(
            part.kind == "final" and part.stack == stack.name and n in trainable for n, part in anatomy.parts.items()
        )
        if not whole:
            break  # a decoder above a moving encoder sees another encoder output at every step
    return tuple(cuts), "" if cuts else "the lowest block is not frozen whole."


def _frozen_depth(anatomy: Anatomy, stack: Stack, trainable: set[str]) -> int:
    """How many of the lowest blocks hold no trainable tensor."""
    moving = {
        anatomy.parts[n].index for n in trainable
        if anatomy.parts[n].kind == "block" and anatomy.parts[n].stack == stack.name
    }  # fmt: skip
    return min(moving, default=len(stack))
