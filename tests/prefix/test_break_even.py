"""The prediction of what a cache saves: it follows steps and what is stored already, and touches nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_freeze import PrefixCache
from hf_freeze.prefix import BreakEven
from tests.prefix.cases import collator_for, frozen_model, review_rows


def test_one_step_does_not_pay_and_many_do() -> None:
    timed = {"plain_step_seconds": 1.0, "cached_step_seconds": 0.4, "build_seconds": 30.0, "cache_bytes": 5_000_000}
    assert not BreakEven(**timed, steps=1).pays
    assert not BreakEven(**timed, steps=50).pays  # 50 either way: nothing is gained
    many = BreakEven(**timed, steps=51)
    assert many.pays
    assert (many.plain_seconds, many.cached_seconds) == (51, pytest.approx(30 + 51 * 0.4))
    assert "it pays" in str(many)
    assert "51.0 s without, 50.4 s with (30.0 s to build" in str(many)


def test_measured_seconds_stand_beside_the_predicted_ones() -> None:
    saving = BreakEven(1.0, 0.4, 100, 30.0, 0)
    assert saving.measured(44.0, 33.0) == (
        "With the prefix cache: 77.0 s, 70.0 s predicted (building 33.0 s, 30.0 s predicted; batches 44.0 s, 40.0 s "
        "predicted)."
    )
    assert saving.measured(105.0, None) == "Without a prefix cache: 105.0 s of batches, 100.0 s predicted."


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_prediction_counts_what_is_missing_and_changes_nothing(kind: str, tmp_path: Path) -> None:
    rows = review_rows(kind)
    model = frozen_model(kind).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    given = {"cache_dir": tmp_path, "progress": False}
    prepared = PrefixCache.prepare(model, rows, collator_for(kind, model), **given)
    empty = prepared.predict(steps=10, batch_size=4)
    assert empty.build_seconds > 0
    assert empty.steps == 10
    assert min(empty.plain_step_seconds, empty.cached_step_seconds) > 0
    cache = prepared.build()
    states = [tensor for digest in cache.store._place for tensor in cache.store.read(digest).values()]
    assert empty.cache_bytes == sum(tensor.numel() * tensor.element_size() for tensor in states)
    cache.close()
    full = PrefixCache.prepare(model, rows, collator_for(kind, model), **given).predict(steps=10, batch_size=4)
    assert full.build_seconds == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert not list(tmp_path.glob("*.tmp"))


def test_the_step_that_is_timed_may_be_the_trainers_own(tmp_path: Path) -> None:
    rows = review_rows("llama")
    model = frozen_model("llama")
    seen: list[bool] = []

    def step(batch: dict[str, torch.Tensor]) -> None:
        seen.append("prefix_states" in batch)
        model(**batch).loss.backward()

    prepared = PrefixCache.prepare(model, rows, collator_for("llama", model), cache_dir=tmp_path, progress=False)
    prepared.predict(steps=1, batch_size=2, step=step)
    assert seen == [False, True] * 3  # one to warm up, two timed
