"""Small models and what the tests of freezing ask of them."""

from __future__ import annotations

import torch
from torch import nn

from tests.depth.sweep import language_loss

FAMILIES = ["gpt2", "llama", "bart", "t5"]


def names_frozen(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def train(model: nn.Module, steps: int = 2, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        language_loss(model).backward()
        optimizer.step()


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


class Noisy(nn.Module):
    """A block with a batch norm, with a plain one that has no parameters, and with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.plain = nn.BatchNorm1d(4, affine=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = states + self.drop(self.plain(self.norm(self.mix(states))))
        return out


class Tower(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)
        self.layers = nn.ModuleList(Noisy() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = self.project(x)
        for layer in self.layers:
            states = layer(states)
        return states
