"""Whether two ways to compute a training step agree: the loss and every gradient, beside the noise of plain training.

A loss alone proves little: in bf16, noise in the place of a prefix's states moves it by less than rounding does. Each
gradient has a bar of its own here, from what another batch shape of the same plain training does to it. Whoever
compares also plants an error and sees that it is reported; a comparison that cannot fail proves nothing. This module
runs no model and knows none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = [
    "PASSING",
    "ROUNDING",
    "Agreement",
    "RowGap",
    "compare",
    "copy_row",
    "exchange_rows",
    "grain_of",
    "relative_gaps",
    "row_gap",
    "sketch",
    "step_tensors",
]

# What of a config says nothing about what a model computes: how it was saved, what its results are called.
PASSING = frozenset({"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache",
                     "id2label", "label2id", "problem_type"})  # fmt: skip
# What rounding may do where no noise was measured, relative to a tensor's norm; an error of the states does 0.1 to 1.
ROUNDING = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
NOISE = 3.0  # times the noise that was measured once: another draw of it is rarely larger
SMALL = 1e-3  # of the largest gradient: below, a norm is mostly rounding (a key's bias has the gradient zero)
NUMBERS = 512  # of a sketch: it keeps norms and distances to within a tenth


@dataclass(frozen=True)
class Agreement:
    """How two computations of one training step compare.

    Attributes:
        gaps: By name, the distance of the two tensors relative to the plain one's norm; the loss is among them.
        bars: What each gap may be.

    Example:
        >>> Agreement({"loss": 1e-7, "head": 0.2}, {"loss": 1e-4, "head": 0.05}).same
        False
    """

    gaps: dict[str, float]
    bars: dict[str, float]

    @property
    def same(self) -> bool:
        """Whether no gap is over its bar; a gap that is no number is."""
        return all(gap <= self.bars[name] for name, gap in self.gaps.items())

    @property
    def worst(self) -> str:
        """The tensor that uses most of its bar."""

        def used(name: str) -> float:
            share = self.gaps[name] / self.bars[name]
            return share if share == share else float("inf")

        return max(self.gaps, key=used)

    def __str__(self) -> str:
        return f"{self.worst} differs by {self.gaps[self.worst]:.1e} of its size (bar {self.bars[self.worst]:.0e})"


@dataclass(frozen=True)
class RowGap:
    """How far the states of two rows are apart, relative: as a whole, and in the middle one of their tokens.

    A few tokens are larger than all others by far, and would hide the rest in the whole.
    """

    whole: float
    middle: float

    def within(self, bars: tuple[float, float]) -> bool:
        """Whether both are below their bars; NaN is not."""
        return self.whole <= bars[0] and self.middle <= bars[1]


def row_gap(one: torch.Tensor, other: torch.Tensor) -> RowGap:
    """How far a tensor [tokens, ...] is from another, relative to the other's norm; infinitely far in another shape.

    >>> row_gap(torch.tensor([[3.0], [4.0], [1.0]]), torch.tensor([[3.0], [4.0], [0.0]])).whole
    0.2
    """
    if one.shape != other.shape:
        return RowGap(float("inf"), float("inf"))
    one, other = one.detach().double(), other.detach().double()
    difference = one - other
    whole = float(difference.norm() / other.norm().clamp(min=1e-30))
    if one.dim() < 2 or not one.numel():
        return RowGap(whole, whole)
    by_token = difference.flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1).clamp(min=1e-30)
    return RowGap(whole, float(by_token.median()))


def grain_of(tensors: Iterable[torch.Tensor]) -> str:
    """Which of ROUNDING a computation with these tensors has: that of the coarsest one.

    >>> grain_of([torch.zeros(1), torch.zeros(1, dtype=torch.float16)])
    'fp16'
    """
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
    return {torch.float32: "fp32", torch.float64: "fp32", torch.float16: "fp16"}.get(coarsest, "bf16")


def step_tensors(loss: torch.Tensor, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, torch.Tensor]:
    """The loss and the gradients of what trains, by name; those on the parameters stay as they are.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> step_tensors((3 * weight).sum(), [("weight", weight)])
    {'loss': tensor(6.), 'weight': tensor([3., 3.])}
    """
    trained = {name: parameter for name, parameter in named if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    whole = {name: torch.zeros(()) if g is None else g for name, g in zip(trained, gradients, strict=True)}
    return {"loss": loss.detach(), **whole}


def relative_gaps(plain: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """How far each tensor is from the plain one, relative to the plain one's norm.

    Args:
        plain: By name, "loss" and gradients, whole or as sketches.
        other: The same names.

    Example:
        >>> plain = {"loss": torch.tensor(2.0), "head": torch.tensor([3.0, 4.0])}
        >>> relative_gaps(plain, {"loss": torch.tensor(2.0), "head": torch.tensor([3.0, 4.5])})
        {'loss': 0.0, 'head': 0.1}
    """
    if plain.keys() != other.keys():
        raise ValueError(f"Only one of two steps has the tensors {sorted(plain.keys() ^ other.keys())[:3]}.")
    sizes = {name: _norm(_tensor(tensor)) for name, tensor in plain.items()}
    largest = max((size for name, size in sizes.items() if name != "loss"), default=0.0)
    gaps = {}
    for name, size in sizes.items():
        ours, theirs = _tensor(plain[name]), _tensor(other[name])
        gap = _norm(ours.float() - theirs.to(ours.device).float())
        scale = size if name == "loss" else max(size, SMALL * largest)
        gaps[name] = gap / scale if scale else (0.0 if gap == 0 else float("inf"))
    return gaps


def compare(gaps: Mapping[str, float], noise: Iterable[Mapping[str, float]], rounding: float) -> Agreement:
    """Sets a bar for each gap: what rounding may do, or three times the noise where that is more.

    Args:
        noise: Gaps between plain steps in unlike batch shapes; a tensor's largest counts.
        rounding: One of ROUNDING.
    """
    measured = list(noise)
    bars = {}
    for name in gaps:
        least = rounding / 5 if name == "loss" else rounding  # a mean over all tokens: it is rounded least
        bars[name] = max([least, *(NOISE * of_noise[name] for of_noise in measured)])
    return Agreement(dict(gaps), bars)


def exchange_rows(states: Mapping[str, torch.Tensor], one: int = 0, other: int = 1) -> dict[str, torch.Tensor]:
    """Copies of a batch's states [rows, ...], those of two rows exchanged: the error to plant.

    >>> exchange_rows({"block": torch.tensor([[1.0], [2.0], [3.0]])})["block"].tolist()
    [[2.0], [1.0], [3.0]]
    """
    planted = {name: tensor.clone() for name, tensor in states.items()}
    for name, tensor in states.items():
        planted[name][[one, other]] = tensor[[other, one]]
    return planted


def copy_row(states: Mapping[str, torch.Tensor], source: int, target: int) -> dict[str, torch.Tensor]:
    """Copies of a batch's states [rows, ...], with one row's in the place of another's: an error to plant.

    A mean over rows tells it where it cannot tell an exchange: two rows of one label and one length.

    >>> copy_row({"block": torch.tensor([[1.0], [2.0], [3.0]])}, 0, 2)["block"].tolist()
    [[1.0], [2.0], [1.0]]
    """
    planted = {name: tensor.clone() for name, tensor in states.items()}
    for name, tensor in states.items():
        planted[name][target] = tensor[source]
    return planted


def sketch(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    """A few numbers of each tensor, JSON-ready, which keep norms and distances: for steps of unlike processes.

    Each entry gets a random sign, the same ones at each call on a kind of device, and goes to one of 512 sums
    (Charikar et al. 2002, "Finding Frequent Items in Data Streams").

    >>> tensor = torch.randn(4, 1000)
    >>> 0.8 < torch.tensor(sketch({"w": tensor})["w"]).norm() / tensor.norm() < 1.25
    tensor(True)
    """
    small: dict[str, list[float]] = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().float().flatten()
        generator = torch.Generator(flat.device).manual_seed(0)
        sums = flat.new_zeros(NUMBERS)
        for piece in torch.split(flat, NUMBERS << 15):  # 64 MB at a time
            signs = torch.randint(0, 2, piece.shape, generator=generator, device=flat.device, dtype=torch.int8)
            signed = nn.functional.pad(piece * (2 * signs - 1), (0, -len(piece) % NUMBERS))
            sums += signed.view(-1, NUMBERS).sum(0)
        small[name] = sums.tolist() if len(flat) > 1 else flat.tolist()
    return small


def _tensor(value: Any) -> torch.Tensor:
    return value.detach() if isinstance(value, torch.Tensor) else torch.tensor(value)


def _norm(tensor: torch.Tensor) -> float:
    return float(tensor.float().norm())
