"""The precision is the one asked for, or the faster one with its reason."""

from __future__ import annotations

import pytest

from hf_freeze.errors import FreezeError
from hf_freeze.training import precision
from hf_freeze.training.precision import choose_precision


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_what_is_asked_is_taken(name: str) -> None:
    assert choose_precision(name, "cpu").name == name


@pytest.mark.parametrize(("bf16_seconds", "chosen"), [(0.25, "bf16"), (0.9, "fp32"), (50.0, "fp32")])
def test_a_cpu_gets_the_precision_that_it_multiplies_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, bf16_seconds: float, chosen: str
) -> None:
    monkeypatch.setattr(precision, "_product_seconds", lambda dtype: 1.0 if "32" in str(dtype) else bf16_seconds)
    found = choose_precision("auto", "cpu")
    assert found.name == chosen
    assert f"{1 / bf16_seconds:.2g}x as fast" in found.reason


def test_the_real_probe_answers_with_a_reason() -> None:
    assert choose_precision("auto", "cpu").reason.startswith("this CPU multiplies")


def test_an_unknown_precision_is_an_error() -> None:
    with pytest.raises(FreezeError, match=r"precision='fp16' was asked for; it is one of .*fp32"):
        choose_precision("fp16")
