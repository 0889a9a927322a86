"""Weights that have left memory come back from their file, the same bits, or the error says what became of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_freeze.errors import CacheDamaged
from hf_freeze.prefix.cache import PrefixCache
from tests.prefix.test_store import cached, damaged, frozen_model, pairs_of_tokens


@pytest.fixture
def released(tmp_path) -> tuple[PrefixCache, Path]:
    """A cache whose model's prefix is away, and the file that keeps it."""
    cache = cached(frozen_model(), tmp_path)
    cache.release_prefix()
    away(cache)
    (path,) = cache.store.folder.glob("*.weights")
    return cache, path


def away(cache: PrefixCache) -> None:
    cache.model(**cache.collator(pairs_of_tokens()[:2]))
    assert torch.isnan(weight(cache)).all()


def weight(cache: PrefixCache) -> torch.Tensor:
    tensor: Any = cache.model.get_submodule("model.layers.0.mlp.up_proj").weight
    return tensor.detach()


def _piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


HARMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "gone": (Path.unlink, "is gone"),
    "a pipe": (_piped, "is a pipe where a file should be"),
    "a link": (_linked, "is a symbolic link where a file should be"),
    "cut short": (lambda path: damaged(path, "cut short"), "is damaged or cut short"),
    "emptied": (lambda path: os.truncate(path, 0), "is damaged or cut short"),
    "changed": (lambda path: damaged(path, "bit flipped"), "came back changed, e"),
}


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=() if what in ("a pipe", "changed") else pytest.mark.slow) for what in HARMS]
)
def test_weights_whose_file_was_harmed_do_not_come_back_otherwise(released, what):
    cache, path = released
    harm, reason = HARMS[what]
    harm(path)
    with pytest.raises(CacheDamaged, match=rf"The released prefix .*{reason}.*Load the model again"):
        cache.restore_prefix()
    assert torch.isnan(weight(cache)).all(), "never a plausible number"


def test_weights_do_not_leave_again_on_the_word_of_a_file_that_is_gone(released):
    cache, path = released
    cache.restore_prefix()
    whole = weight(cache).clone()
    path.unlink()
    away(cache)
    cache.close()
    assert torch.equal(weight(cache), whole)
    assert not list(cache.store.folder.glob("*.weights"))
