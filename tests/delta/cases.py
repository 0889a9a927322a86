"""Tiny bases, what stands for training, and the manifest of a delta: read, changed, kept apart as in format 1."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hf_freeze import FreezePlan, freeze
from hf_freeze.delta import load_delta
from hf_freeze.delta.file import MANIFEST_FILE, MANIFEST_KEY, WEIGHTS_FILE
from hf_freeze.errors import DeltaMismatch
from tests.tiny import tiny_model


class Killed(BaseException):
    """In the place of a kill -9: nothing in hf_freeze catches it."""


class Plain(nn.Module):
    """Three blocks with batch norms, whose statistics are persistent buffers, and a buffer that two modules share."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(3))
        shared = torch.zeros(2)
        for block in self.blocks[1:]:
            block.register_buffer("shared", shared)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def base_folder(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny base as a folder; its head is tied."""
    path = folder / f"{kind}-base-{str(dtype).removeprefix('torch.')}"
    if not path.exists():
        tiny_model(kind, tie_word_embeddings=True).to(dtype).save_pretrained(path)
    return path


def load_base(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return type(tiny_model(kind)).from_pretrained(base_folder(kind, folder, dtype), dtype=dtype)


def train(model: nn.Module, seed: int = 1) -> None:
    """Moves every trainable tensor, in place of training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def trained(kind: str, folder: Path, plan: FreezePlan | None = None, dtype: torch.dtype = torch.float32) -> Any:
    model = load_base(kind, folder, dtype)
    freeze(model, plan or FreezePlan(encoder_blocks=3 if kind in ("bart", "t5") else None, decoder_blocks=3))
    train(model)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 27).reshape(2, 12)
    given = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=ids, **given).logits
    return out


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def refuses(folder: Path, base: nn.Module, match: str) -> None:
    """Loading raises, and has not changed a bit of the base."""
    before, names = copies(base), [name for name, _ in base.named_parameters()]
    with pytest.raises(DeltaMismatch, match=match):
        load_delta(folder, base)
    assert [name for name, _ in base.named_parameters()] == names  # nothing was untied
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


# ----------------------------------------------------------------------------------------------------------- manifests


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def manifest_of(folder: Path) -> Any:
    if (folder / MANIFEST_FILE).exists():
        return json.loads((folder / MANIFEST_FILE).read_text())
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        return json.loads(file.metadata()[MANIFEST_KEY])


def put_text(folder: Path, text: str | None) -> None:
    """Puts a text in the manifest's place; None takes the manifest out of the header."""
    path = folder / WEIGHTS_FILE
    if text is not None and (folder / MANIFEST_FILE).exists():
        (folder / MANIFEST_FILE).write_text(text)
    else:
        save_file(load_file(path), path, metadata={"format": "pt"} | ({} if text is None else {MANIFEST_KEY: text}))


def put_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Puts other tensors in the file, under the manifest that is there."""
    metadata = {} if (folder / MANIFEST_FILE).exists() else {MANIFEST_KEY: json.dumps(manifest_of(folder))}
    save_file(tensors, folder / WEIGHTS_FILE, metadata=metadata)


def edit(folder: Path, change: Callable[[Any], Any]) -> None:
    values = manifest_of(folder)
    change(values)
    put_text(folder, json.dumps(values))


def as_format_1(folder: Path) -> Path:
    """Makes of a delta what versions before the one-file format wrote."""
    values = {name: value for name, value in manifest_of(folder).items() if name not in ("plan", "config")}
    put_text(folder, None)
    (folder / MANIFEST_FILE).write_text(json.dumps(values | {"format": 1}, indent=1) + "\n")
    return folder
