"""How strongly a loss pulls at each block, in proportion to its weights. Nothing here trains.

The model is left as it was: weights, gradients, what requires one, modes, random state.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from hf_freeze.anatomy import BlocksGiven, Part, read_anatomy
from hf_freeze.errors import FreezeError
from hf_freeze.lens.results import Numbers, label_of, part_of, parts_of, six_digits
from hf_freeze.lens.states import call, core_of
from hf_freeze.tables import Table
from hf_freeze.tensors import unwrap
from hf_freeze.trial import on_trial

__all__ = ["BlockGradients", "block_gradients"]


@dataclass(frozen=True)
class BlockGradients(Numbers):
    """How strongly a loss pulls at each part.

    Attributes:
        parts: Labels from the bottom up, as in `WeightDrift`.
        norms: Norm of the part's gradient, the mean over batches.
        weight_norms: Norm of the part's weights.
        loss: Mean over batches.
        batches: How many there were.
    """

    parts: tuple[str, ...]
    norms: tuple[float, ...]
    weight_norms: tuple[float, ...]
    loss: float
    batches: int

    @property
    def relative(self) -> tuple[float, ...]:
        """Norm of the gradient over norm of the weights; 0.0 where both are 0."""
        pairs = zip(self.norms, self.weight_norms, strict=True)
        return tuple(norm / weight if weight else norm and math.inf for norm, weight in pairs)

    def table(self) -> Table:
        """One row a part."""
        figures = zip(self.parts, self.norms, self.relative, strict=True)
        rows = tuple((part, f"{norm:.3g}", f"{relative:.3g}") for part, norm, relative in figures)
        lines = (f"Loss {self.loss:.4g} over {self.batches} batch{'es' * (self.batches > 1)}, without dropout.",)
        return Table("Gradients", ("part", "norm", "norm / weights' norm"), rows, lines)


def block_gradients(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    blocks: BlocksGiven | None = None,
    progress: bool = True,
) -> BlockGradients:
    """Measures the gradient of the model's loss at each block, frozen or not, and its size relative to the weights.

    The relative norm ||g|| / ||w|| is that of Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution
    Shifts" (2023), whose Auto-RGN scales learning rates by it: where it is large, the data asks for change. They take
    it tensor by tensor, here it is that of all tensors of a part together. Norms are taken batch by batch, in eval
    mode, and averaged. No gradient is left on the model; those that were there stay.

    Args:
        model: A model with a loss. Needs memory for one gradient of every floating-point parameter.
        batches: What the model takes, with `labels`: a DataLoader, or what `text_batches` returns.
        blocks: Handed to `read_anatomy` where structure does not tell.
        progress: A bar with the time left.

    Returns:
        The norms of each part; a tied tensor counts where its first name is.

    Raises:
        FreezeError: No batch, no labels, a loss or a gradient that is not finite, a block that no gradient reaches.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16))
        >>> ids = torch.tensor([[1, 2, 3, 4]])
        >>> gradients = block_gradients(model, [{"input_ids": ids, "labels": ids}], progress=False)
        >>> gradients.parts, all(norm > 0 for norm in gradients.norms)
        (('embeddings', 'decoder.0', 'decoder.1', 'final'), True)
    """
    anatomy = read_anatomy(model, blocks=blocks)
    weights = {name: weight for name, weight in anatomy.parameters.items() if weight.is_floating_point()}
    tensors = list(weights.values())
    part_of_each = [part_of(anatomy, name) for name in weights]
    every_part = parts_of(anatomy)
    sums: dict[Part, float] = defaultdict(float)
    losses = []
    with _all_require_gradients(tensors), on_trial(unwrap(model), training=False), torch.enable_grad():
        for batch in tqdm(batches, desc="gradients", unit="batch", disable=not progress):
            loss = _loss(model, batch)
            gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
            losses.append(loss.item())
            for part, norm in _norms(part_of_each, gradients).items():
                if not math.isfinite(norm):
                    raise FreezeError(
                        f"The gradient of {part} was asked for; it is not finite, though the loss is {losses[-1]:.4g}. "
                        "fp16 may overflow: load the model in fp32 or bf16."
                    )
                sums[part] += norm
            if missing := [part for part in every_part if part.kind == "block" and part not in sums]:
                raise FreezeError(
                    f"The gradient of {missing[0]} was asked for; the loss of {anatomy.model_class} does not depend on "
                    "it. Give the model as it is trained, and batches that reach all of its blocks."
                )
            del gradients, loss  # before the next batch makes its own
    if not losses:
        raise FreezeError("The gradients over no batch were asked for; give one or more, such as text_batches(...).")
    sizes = _norms(part_of_each, [weight.detach() for weight in tensors])
    shown = [part for part in every_part if part in sizes]
    norms = six_digits([sums[part] / len(losses) for part in shown])
    weight_norms = six_digits([sizes[part] for part in shown])
    return BlockGradients(tuple(map(label_of, shown)), norms, weight_norms, sum(losses) / len(losses), len(losses))


@contextmanager
def _all_require_gradients(weights: list[nn.Parameter]) -> Iterator[None]:
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, was in zip(weights, before, strict=True):
            weight.requires_grad_(was)


def _norms(parts: list[Part], tensors: Iterable[torch.Tensor | None]) -> dict[Part, float]:
    """The norm of all tensors of a part together; None is a gradient that there is not."""
    squares: dict[Part, float] = defaultdict(float)
    for part, tensor in zip(parts, tensors, strict=True):
        if tensor is not None:
            squares[part] += float(torch.linalg.vector_norm(tensor, dtype=torch.float32)) ** 2
    return {part: math.sqrt(square) for part, square in squares.items()}


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    if "labels" not in batch:
        raise FreezeError(
            f"The gradient of a loss was asked for; a batch has {', '.join(batch)} and no labels. Give batches as in "
            "training, such as text_batches(...)."
        )
    loss = getattr(call(model, batch), "loss", None)
    if loss is None:
        raise FreezeError(
            f"The gradient of a loss was asked for; {type(core_of(model)).__name__} computes none from labels. Load it "
            "with a head, for example by AutoModelForCausalLM."
        )
    if not torch.isfinite(loss):
        raise FreezeError(
            f"The gradient of a loss was asked for; a batch's loss is {loss.item()}. A batch needs one label that is "
            "not -100, and a model in fp16 may overflow: load it in fp32 or bf16."
        )
    return loss  # type: ignore[no-any-return]
