"""Gradients are compared tensor by tensor beside measured noise, and the proof of a cache sees what a loss does not."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, default_data_collator

from hf_freeze import FreezePlan, freeze
from hf_freeze.errors import CannotCache
from hf_freeze.exactness import Agreement, compare, exchange_rows, relative_gaps, sketch
from hf_freeze.prefix import PrefixCache, PreparedCache, proof
from tests.prefix.cases import collator_for, frozen_model, review_rows
from tests.zoo import VOCAB, build

LOSS_BAR = 2e-2  # relative, what such proofs allow the loss in bf16 where they look at nothing else


def step(**tensors: Any) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in tensors.items()}


def test_a_small_tensor_is_not_hidden_by_a_large_one() -> None:
    plain = step(loss=1.0, large=[1000.0, 1000.0], small=[1.0, 1.0])
    agreement = compare(relative_gaps(plain, plain | step(small=[1.0, 1.1])), [], 1e-2)
    assert not agreement.same
    assert agreement.worst == "small"
    assert str(agreement) == "small differs by 7.1e-02 of its size (bar 1e-02)"


def test_a_gradient_that_is_rounding_alone_counts_by_the_largest() -> None:
    plain = step(loss=1.0, weight=[1.0], key_bias=[1e-8])
    assert compare(relative_gaps(plain, plain | step(key_bias=[-2e-8])), [], 1e-3).same


def test_a_bar_is_three_times_the_noise_where_that_is_more_than_rounding() -> None:
    gaps = {"loss": 0.0, "weight": 0.2}
    assert compare(gaps, [{"loss": 0.0, "weight": 0.05}, {"loss": 0.0, "weight": 0.1}], 1e-2).bars["weight"] == 0.1 * 3
    assert not compare(gaps, [{"loss": 0.0, "weight": 0.01}], 1e-2).same


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_the_same(value: float) -> None:
    plain = step(loss=1.0, weight=[1.0])
    assert not compare(relative_gaps(plain, plain | step(weight=[value])), [], 1e-2).same
    assert not compare(relative_gaps(plain | step(weight=[value]), plain), [], 1e-2).same
    assert Agreement({"loss": 0.0, "weight": float("nan")}, {"loss": 1.0, "weight": 1.0}).worst == "weight"


def test_steps_of_unlike_tensors_are_not_compared() -> None:
    with pytest.raises(ValueError, match="Only one of two steps has the tensors \\['other'\\]"):
        relative_gaps(step(loss=1.0), step(loss=1.0, other=[1.0]))


def test_sketches_keep_distances() -> None:
    generator = torch.Generator().manual_seed(1)
    plain = {"loss": torch.tensor(2.0), "weight": torch.randn(300, 70, generator=generator)}
    other = plain | {"weight": plain["weight"] + 0.01 * torch.randn(300, 70, generator=generator)}
    whole, small = relative_gaps(plain, other)["weight"], relative_gaps(sketch(plain), sketch(other))["weight"]
    assert 0.8 < small / whole < 1.25


# ---------------------------------------------------------------------------------------- the proof of a prefix cache


def noise(states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.randn(tensor.shape).to(tensor.dtype) * tensor.float().std() for name, tensor in states.items()}


@functools.cache
def prepared(kind: str, dtype: torch.dtype) -> PreparedCache:
    """What the proof is given; it changes nothing of it, and nothing is written."""
    model = frozen_model(kind).to(dtype)
    collator = collator_for(kind, model)
    return PrefixCache.prepare(model, review_rows(kind), collator, cache_dir="unused", progress=False)


def prove(of: PreparedCache) -> None:
    proof.check_training(of.model, of.prefixes[0], of.rows_of(of.prefixes[0]), of.sample, of.collator)


@pytest.mark.parametrize("kind", ["llama", "bart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plant", [noise, exchange_rows])
def test_the_proof_sees_other_states_whatever_the_loss_says(
    plant: Any, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = prepared(kind, dtype)
    own = proof._run
    losses: list[float] = []

    def run(model: Any, batch: dict[str, Any]) -> Any:
        planted = {proof.PREFIX_KEY: plant(batch[proof.PREFIX_KEY])} if proof.PREFIX_KEY in batch else {}
        outcome = own(model, batch | planted)
        losses.append(float(outcome[1]["loss"]))
        return outcome

    monkeypatch.setattr(proof, "_run", run)
    monkeypatch.setattr(proof, "BLIND_TO_PADDING", 1.0)  # what is planted stands at padded places too
    with pytest.raises(CannotCache, match=r"is not plain training: \S+ differs by "):
        prove(of)
    assert abs(losses[1] / losses[0] - 1) < LOSS_BAR


def test_states_that_are_not_those_of_the_batch_are_no_ground_for_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    of = prepared("llama", torch.bfloat16)
    own = proof.states_alone
    monkeypatch.setattr(proof, "states_alone", lambda *given: {k: 1.1 * v for k, v in own(*given).items()})
    with pytest.raises(CannotCache, match="other states among longer rows than alone"):
        prove(of)


def test_the_proof_sees_one_wrong_gradient_of_a_small_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    of = prepared("llama", torch.float32)
    own = proof._run

    def run(model: Any, batch: Any, **named: Any) -> Any:
        result, tensors = own(model, batch, **named)
        if proof.PREFIX_KEY in batch:
            smallest = min((name for name in tensors if name != "loss"), key=lambda name: float(tensors[name].norm()))
            tensors[smallest] = 1.01 * tensors[smallest]
        return result, tensors

    monkeypatch.setattr(proof, "_run", run)
    with pytest.raises(CannotCache, match=r"is not plain training: model\.layers\.3\.\S+ differs by 1\.0e-02"):
        prove(of)


def test_a_proof_that_does_not_see_another_rows_states_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    of = prepared("llama", torch.bfloat16)
    monkeypatch.setattr(proof, "copy_row", lambda states, *_: states)
    monkeypatch.setattr(proof, "_turned", lambda states: states)
    with pytest.raises(CannotCache, match="a row was given the states of another, and neither the loss nor a gradient"):
        prove(of)


def test_rows_of_one_label_and_one_length_are_cached(tmp_path: Path) -> None:
    """Exchanged, they would be the same batch in another order."""
    model = build("bert", AutoModelForSequenceClassification, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    freeze(model, FreezePlan(encoder_blocks=3))
    ids = torch.randint(3, VOCAB, (12, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": torch.tensor(1)} for row in ids]
    assert PrefixCache.prepare(model, rows, default_data_collator, cache_dir=tmp_path, progress=False)


def test_equal_rows_have_nothing_to_exchange(tmp_path: Path) -> None:
    model = frozen_model("llama")
    rows = review_rows("llama", 1) * 3
    assert PrefixCache.prepare(model, rows, collator_for("llama", model), cache_dir=tmp_path, progress=False)


def test_a_gradient_over_the_bar_is_compared_beside_what_rounding_does_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    of = prepared("llama", torch.float32)
    compared: list[Agreement] = []
    own = proof.compare
    monkeypatch.setattr(proof, "SAME_GRADIENT", 1e-12)  # below any rounding
    monkeypatch.setattr(proof, "compare", lambda *given: compared.append(own(*given)) or compared[-1])
    prove(of)
    assert not compared[0].same
    assert 1e-12 < compared[-1].bars[compared[0].worst] < 1e-4
