"""How alike the states of layers are: linear CKA within a model, or between a pretrained and a fine-tuned one.

Padding is in no figure. Any number of tokens takes the memory of one group of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from hf_freeze.anatomy import BlocksGiven, read_anatomy
from hf_freeze.errors import FreezeError
from hf_freeze.lens.results import Numbers, Rows, layer_name, six_digits
from hf_freeze.lens.states import looking, record
from hf_freeze.lens.texts import check_ids, real_tokens, text_batches
from hf_freeze.tables import Table

__all__ = ["LayerSimilarity", "layer_similarity", "linear_cka"]

GROUP_TOKENS = 512  # CKA compares tokens within groups of this many: 2 MB a layer
LEAST_TOKENS = 4  # below it the unbiased estimate is 0 / 0


@dataclass(frozen=True)
class LayerSimilarity(Numbers):
    """How alike the states of layers are.

    Attributes:
        cka: For each stack a matrix: unbiased linear CKA of every layer (row) with every layer (column) of the same
            model, or of the other one.
        tokens: Tokens that were compared, by stack.
        compared: Whether the columns are another model's layers.
    """

    cka: dict[str, Rows] = field(repr=False)
    tokens: dict[str, int]
    compared: bool

    def table(self) -> Table:
        """One row a layer: how alike it is to the same layer of the other model, or to the layer below it."""
        rows = []
        for stack, matrix in self.cka.items():
            for layer, values in enumerate(matrix):
                beside = layer if self.compared else layer - 1
                rows.append((layer_name(stack, layer), f"{values[beside]:.3f}" if 0 <= beside < len(values) else "-"))
        what = "same layer of the other" if self.compared else "layer below"
        counts = ", ".join(f"{count:,} {stack} tokens" for stack, count in self.tokens.items())
        return Table("Similarity of layers", ("layer", f"CKA with the {what}"), tuple(rows), (f"Over {counts}.",))


def linear_cka(first: torch.Tensor, second: torch.Tensor) -> float:
    """Linear CKA of two sets of states over the same tokens, unbiased: 1 for the same, around 0 for unrelated ones.

    Centered kernel alignment with linear kernels, Kornblith et al., "Similarity of Neural Network Representations
    Revisited" (2019): HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of the Gram matrices K = X X' and L = Y Y'. Invariant to
    orthogonal maps, to one scale for all features and to a shift; not to other linear maps. The widths may differ.

    That paper's HSIC is biased: for unrelated states of n tokens and d features its CKA is about d / (n + d), so a few
    texts would make any two layers of a wide model look alike. Here it is HSIC_1 of Song et al., "Feature Selection via
    Dependence Maximization" (2012), which is unbiased for any n, as in Nguyen et al., "Do Wide and Deep Networks Learn
    the Same Things?" (2020). So unrelated states may come out a little below 0.

    Args:
        first: [tokens, features]. Two tensors of n x n numbers are made.
        second: [tokens, features], the same tokens.

    Raises:
        FreezeError: Not two matrices of finite numbers, unlike numbers of tokens, fewer than 4, or states that are all
            the same.

    Example:
        >>> states = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
        >>> rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
        >>> round(linear_cka(states, 3 * states @ rotation), 6)
        1.0
    """
    if first.dim() != 2 or second.dim() != 2 or len(first) != len(second):
        raise FreezeError(
            f"CKA of states of shapes {list(first.shape)} and {list(second.shape)} was asked for; it compares two "
            "matrices [tokens, features] over the same tokens."
        )
    if len(first) < LEAST_TOKENS:
        raise _too_few(f"{len(first)} tokens")
    if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise FreezeError("CKA was asked for of states that are not finite. Load the model in fp32 or bf16.")
    alignment = _Alignment(2, group_tokens=len(first))
    alignment.add([[first], [second]])
    return alignment.matrix("")[0][0]


def layer_similarity(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    other: nn.Module | None = None,
    *,
    targets: Sequence[str] | None = None,
    batch_size: int = 8,
    max_tokens: int = 128,
    keep_first: bool = False,
    blocks: BlocksGiven | None = None,
    progress: bool = True,
) -> LayerSimilarity:
    """Compares the states of a model's layers with each other, or with those of another model, by linear CKA.

    See `linear_cka` for the measure. HSIC is summed over groups of 512 tokens, as in Nguyen et al., "Do Wide and Deep
    Networks Learn the Same Things?" (2020), so that memory does not grow with the number of tokens; each group's
    estimate is unbiased, so their mean is. Groups are counted in the order of the texts: how many of these are run at
    once makes no difference.

    Args:
        model: Any model that `read_anatomy` reads, a PeftModel too.
        tokenizer: Its tokenizer; `other` gets the same ids.
        texts: What the states are of. A few hundred tokens give a first picture, some thousands a steady one.
        other: Such as the pretrained model, to see which layers fine-tuning has changed. Another width or depth is
            fine. None compares the model with itself.
        targets: What an encoder-decoder's decoder reads for each text; None is the text itself, as in denoising.
        batch_size: Texts at once.
        max_tokens: Longer texts lose their end. 128: depth is what is looked at, not length.
        keep_first: Keep the first token of each text. By default it is left out: decoders put a state there that is
            larger than the others by orders of magnitude (Sun et al., "Massive Activations in Large Language Models",
            2024), and CKA would see little else. In SmolLM2-135M it is 160 times as large, and blocks 19 and 27 have a
            CKA of 1.00 with it and 0.71 without.
        blocks: Handed to `read_anatomy`, for both models, where structure does not tell.
        progress: A bar with the time left.

    Returns:
        The matrices, one a stack.

    Raises:
        FreezeError: No texts, an empty one, too few tokens, models with unlike stacks, states that are not finite.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_freeze.inputs.tokenizer import doctest_tokenizer
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=300))
        >>> similarity = layer_similarity(model, doctest_tokenizer(), ["Good mug, weak handle."], progress=False)
        >>> len(similarity.cka["decoder"]), similarity.cka["decoder"][2][2]
        (4, 1.0)
    """
    models = [model] if other is None else [model, other]
    anatomies = [read_anatomy(each, blocks=blocks) for each in models]
    names = [tuple(str(stack.name) for stack in anatomy.stacks) for anatomy in anatomies]
    if names[0] != names[-1]:
        raise FreezeError(
            f"{anatomies[0].model_class} was to be compared with {anatomies[-1].model_class}; the first has the stacks "
            f"{', '.join(names[0])}, the other {', '.join(names[-1])}. Compare models of one kind."
        )
    batches = text_batches(model, tokenizer, texts, targets, batch_size=batch_size, max_tokens=max_tokens)
    check_ids(models[-1], batches)
    sums = {name: _Alignment(len(models)) for name in names[0]}
    with ExitStack() as contexts:
        for each in models:
            contexts.enter_context(looking(each))
        for batch in tqdm(batches, desc="similarity", unit="batch", disable=not progress):
            kept = [record(each, anatomy, batch) for each, anatomy in zip(models, anatomies, strict=True)]
            for name, alignment in sums.items():
                real = real_tokens(anatomies[0], name, batch)
                layers = [k.layers(a.stack(name), real) for k, a in zip(kept, anatomies, strict=True)]
                real[:, 0] &= keep_first
                alignment.add([[states[real.to(states.device)] for states in each] for each in layers])
    return LayerSimilarity(
        {name: alignment.matrix(name) for name, alignment in sums.items()},
        {name: alignment.tokens for name, alignment in sums.items()},
        other is not None,
    )


class _Alignment:
    """Sums HSIC over groups of tokens, for all pairs of layers of one stack."""

    def __init__(self, models: int, group_tokens: int | None = None) -> None:
        self.tokens = 0  # compared so far
        self._group_tokens = group_tokens or GROUP_TOKENS
        self._waiting: list[list[torch.Tensor]] = [[] for _ in range(models)]  # [layers] of each model
        self._cross: Any = 0.0
        self._own: list[Any] = [0.0] * models

    def add(self, layers: list[list[torch.Tensor]]) -> None:
        """The states of the next tokens: for each model its layers [tokens, width]."""
        if self._waiting[0]:
            pairs = zip(self._waiting, layers, strict=True)
            layers = [list(map(torch.cat, zip(waiting, new, strict=True))) for waiting, new in pairs]
        self._waiting = layers
        while len(self._waiting[0][0]) >= self._group_tokens:
            self._compare(self._group_tokens)

    def matrix(self, stack: str) -> Rows:
        """CKA of all that was added; up to 3 tokens at the end are too few for a group, and don't count."""
        left = len(self._waiting[0][0])
        if left >= LEAST_TOKENS:
            self._compare(left)
        if not self.tokens:
            raise _too_few(f"{left} {stack} tokens")
        if min(float(own.min()) for own in self._own) <= 0.0:
            what = f"a layer of the {stack}" if stack else "one of the two"
            raise FreezeError(
                f"CKA was asked for; {what} has the same state at every token, so it is like nothing. Give texts with "
                "more different words."
            )
        rows: Rows = six_digits(self._cross / (self._own[0][:, None] * self._own[-1]).sqrt())
        return rows

    def _compare(self, count: int) -> None:
        """Adds the group of the first `count` tokens that wait."""
        groups = [[states[:count] for states in layers] for layers in self._waiting]
        self._waiting = [[states[count:] for states in layers] for layers in self._waiting]
        grams = [torch.stack([_centred_gram(states) for states in layers]) for layers in groups]
        self._cross = self._cross + grams[0] @ grams[-1].T
        self._own = [own + gram.square().sum(dim=1) for own, gram in zip(self._own, grams, strict=True)]
        self.tokens += count


def _centred_gram(states: torch.Tensor) -> torch.Tensor:
    """The U-centred Gram matrix, flat, so that a product of two is n HSIC_1 of the pair.

    HSIC_1 is an inner product of such matrices: Székely and Rizzo, "Partial Distance Correlation with Methods for
    Dissimilarities" (2014). Hence CKA within [-1, 1], and 1 for the same states, whatever the number of groups.
    """
    states = states.to("cpu", torch.float64)
    largest, count = states.abs().max(), len(states)
    states = states - states.mean(dim=0)  # changes nothing but the rounding
    if states.abs().max() <= 1e-9 * largest:  # the same state everywhere, but for the rounding of the mean
        states = torch.zeros_like(states)
    gram = (states @ states.T).fill_diagonal_(0.0)
    rows = gram.sum(dim=1) / (count - 2)
    gram = gram - rows - rows[:, None] + gram.sum() / ((count - 1) * (count - 2))
    return gram.fill_diagonal_(0.0).flatten() / math.sqrt(count - 3)


def _too_few(found: str) -> FreezeError:
    return FreezeError(
        f"CKA over {found} was asked for; it needs {LEAST_TOKENS} tokens or more, beside the first of each text. Give "
        "more or longer texts."
    )
