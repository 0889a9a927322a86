"""Casts the frozen weights above the cut to autocast's dtype once, instead of at every step.

Autocast keeps a cast weight for the rest of a forward only where the weight trains; a frozen head is cast anew at each
step, which on a CPU takes as long as multiplying by it. The copies stand in for the length of a cached forward; the
arithmetic is the same, to the bit. They stay in memory, half as large as the weights, where autocast's own live from a
forward to its backward. Linear layers only: they are what autocast casts a weight for in a transformer.
"""

from __future__ import annotations

import torch
from torch import nn

from hf_freeze.tensors import is_sharded

__all__ = ["Casts"]


class Casts:
    """Cast copies of the frozen Linear weights among some modules; made at the first use, anew where one was changed.

    Example:
        >>> head = nn.Linear(2, 2).requires_grad_(False)
        >>> casts = Casts([head])
        >>> casts.enter(torch.bfloat16); head.weight.dtype
        torch.bfloat16
        >>> casts.leave(); head.weight.dtype
        torch.float32
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.linears = [module for module in modules if type(module) is nn.Linear]
        self._copies: dict[nn.Module, tuple[tuple[int, int, torch.device], torch.Tensor]] = {}

    def enter(self, dtype: torch.dtype) -> None:
        """Lets the copies stand in, until `leave`. Mutates the modules' attributes, never their parameters."""
        for linear in self.linears:
            weight = linear._parameters.get("weight")  # none under an old parametrization
            if weight is None or weight.requires_grad or weight.dtype != torch.float32 or is_sharded(weight):
                if self._copies.pop(linear, None) is not None:
                    linear.__dict__.pop("weight", None)
                continue
            state = (id(weight), weight._version, weight.device)
            known = self._copies.get(linear)
            if known is None or known[0] != state:
                known = self._copies[linear] = (state, weight.detach().to(dtype))
            linear.__dict__["weight"] = known[1]  # found before the parameter, which stays where it is

    def leave(self) -> None:
        """Lets the parameters be seen again."""
        for linear in self._copies:
            linear.__dict__.pop("weight", None)
