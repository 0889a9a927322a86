"""Bases and one delta, made once for all tests here; who changes a delta takes the copy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from hf_freeze.delta import save_delta
from tests.delta.cases import trained


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `base_folder` writes; nothing in it is changed."""
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="session")
def _llama(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model, folder = trained("llama", bases), tmp_path_factory.mktemp("llama")
    save_delta(model, folder)
    return model, folder


@pytest.fixture
def llama(_llama: tuple[Any, Path]) -> Any:
    """A LLaMA whose lower three blocks of four are frozen, trained; it is not changed."""
    return _llama[0]


@pytest.fixture
def delta(_llama: tuple[Any, Path], tmp_path: Path) -> Path:
    """Its delta, to be changed."""
    return shutil.copytree(_llama[1], tmp_path / "delta")
