"""Frozen weights above the cut are cast once: the same losses, the parameters stay, a changed weight is cast anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_freeze import PrefixCache
from hf_freeze.prefix.casts import Casts
from tests.prefix.cases import collator_for, frozen_model, review_rows


def cached(folder: Path, **given: Any) -> tuple[Any, PrefixCache, dict[str, Any]]:
    model = frozen_model("llama")
    head = model.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    rows = review_rows("llama")
    cache = PrefixCache.build(model, rows, collator_for("llama", model), cache_dir=folder, progress=False, **given)
    return model.train(), cache, cache.collator(rows[:4])


def losses(model: Any, batch: dict[str, Any]) -> list[float]:
    """Three steps under autocast."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = []
    for step in range(3):
        torch.manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_the_losses_are_the_same_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, batch = cached(tmp_path, precision="bf16")
    got = losses(model, batch)
    model, _, batch = cached(tmp_path, precision="bf16")
    monkeypatch.setattr(Casts, "enter", lambda *_: None)
    assert losses(model, batch) == got


def test_the_head_multiplies_by_a_copy_and_its_parameter_stays(tmp_path: Path) -> None:
    model, cache, batch = cached(tmp_path, precision="bf16")
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, _: seen.append(module.weight))
    losses(model, batch)
    assert [weight.dtype for weight in seen] == [torch.bfloat16] * 3
    assert seen[0] is seen[1]
    assert model.lm_head.weight is model.lm_head._parameters["weight"]
    trained = model.model.layers[3].mlp.up_proj
    assert trained.weight.requires_grad
    assert "weight" not in trained.__dict__
    model.lm_head.weight.data = model.lm_head.weight.data + 1
    with torch.no_grad():
        model.lm_head.weight.mul_(2)  # no cut depends on it: it may change
    losses(model, batch)
    torch.testing.assert_close(seen[-1], model.lm_head.weight.bfloat16())
    cache.close()


def test_without_autocast_nothing_is_cast(tmp_path: Path) -> None:
    model, _, batch = cached(tmp_path)
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, _: seen.append(module.weight))
    model(**batch)
    assert seen[0] is model.lm_head._parameters["weight"]


def test_a_forward_that_fails_leaves_the_parameters_in_sight(tmp_path: Path) -> None:
    model, _, batch = cached(tmp_path, precision="bf16")

    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    handle = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="planted"), torch.autocast("cpu", torch.bfloat16):
        model(**batch)
    handle.remove()
    assert "weight" not in model.lm_head.__dict__


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_closing_after_an_interrupt_in_a_forward_puts_all_back(precision: str | None, tmp_path: Path) -> None:
    model, cache, batch = cached(tmp_path, precision=precision)
    names = list(model.state_dict())

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model(**batch)
    handle.remove()
    cache.close()
    assert "weight" not in model.lm_head.__dict__
    assert list(model.state_dict()) == names
    assert len({type(layer) for layer in model.model.layers}) == 1


def test_linear_layers_without_a_plain_weight_are_left_alone() -> None:
    linear = nn.Linear(2, 2).requires_grad_(False)
    weight = linear._parameters.pop("weight")
    linear.__dict__["weight"] = weight  # as old parametrizations leave it
    casts = Casts([linear])
    casts.enter(torch.bfloat16)
    casts.leave()
    assert linear.weight is weight
