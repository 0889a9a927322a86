"""Logits only where there is a label: the head runs over a few summary tokens instead of every token of the review.

Works by the boolean mask that `logits_to_keep` takes. Whether a class honours it is tried, not assumed; one
that does not is left as it is, with the reason.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from hf_freeze.anatomy import unwrap

__all__ = ["can_keep_supervised_logits", "supervised_positions"]


def supervised_positions(labels: torch.Tensor) -> torch.Tensor:
    """Mask [batch, tokens] of the places whose logits predict a label: each label's left neighbour.

    >>> supervised_positions(torch.tensor([[-100, -100, 7, 8]])).tolist()
    [[False, True, True, False]]
    """
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != -100
    return mask


def can_keep_supervised_logits(model: nn.Module) -> tuple[bool, str]:
    """Whether a decoder-only model computes the same logits at masked places as everywhere, and why not if not.

    Runs the model twice on two rows of four tokens, without a graph. Changes nothing.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, eos_token_id=1))
        >>> can_keep_supervised_logits(model)
        (True, 'logits_to_keep takes a mask')
    """
    core: Any = unwrap(model)
    if getattr(getattr(core, "config", None), "is_encoder_decoder", False):
        return False, "an encoder-decoder has logits for the summary's tokens only"
    inner = core.get_base_model() if hasattr(core, "get_base_model") else core
    if "logits_to_keep" not in inspect.signature(inner.forward).parameters:
        return False, f"{type(inner).__name__}.forward takes no logits_to_keep"
    device = next(inner.parameters()).device
    ids = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], device=device) % inner.config.get_text_config().vocab_size
    mask = torch.tensor([[False, True, False, True], [True, False, False, False]], device=device)
    training = [module for module in core.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            every = core(input_ids=ids).logits[mask]
            kept = core(input_ids=ids, logits_to_keep=mask).logits
    except Exception as error:  # a foreign forward may raise anything: then it is left as it is
        return False, f"{type(inner).__name__} does not take a mask as logits_to_keep ({type(error).__name__}: {error})"
    finally:
        for module in training:
            module.training = True
    if kept.shape != every.shape or not torch.allclose(kept.float(), every.float(), rtol=1e-2, atol=1e-2):
        return False, f"{type(inner).__name__} gives other logits with a mask as logits_to_keep"
    return True, "logits_to_keep takes a mask"
