"""Models by what a user has of them: a full model, adapters, a delta, a hub id, or a config alone.

Runs no code that a model brings, unless it is told to. Weights come in the dtype that is asked for; where none is, in
their own. Whatever a foreign loader raises becomes an error that names what was asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from hf_freeze.delta import build_base, is_delta, load_delta
from hf_freeze.embedded import EMBEDDED_NAME, embedded_model
from hf_freeze.errors import FreezeError, ModelError, first_line

__all__ = [
    "load_any",
    "load_base",
    "load_config",
    "load_generator",
    "load_model",
    "load_tokenizer",
    "load_with_delta",
    "model_class",
    "model_from_config",
    "source_of",
]

ADAPTER_FILE = "adapter_config.json"


def source_of(name: str) -> str:
    """What transformers is to load for a name: the embedded model's folder, a folder, or a hub id.

    Raises:
        ModelError: a path where no folder is, or a folder that holds no model.
    """
    if name == EMBEDDED_NAME:
        return str(embedded_model())
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).exists() for file in ("config.json", ADAPTER_FILE)) and not is_delta(path):
            held = ", ".join(sorted(entry.name for entry in path.iterdir())[:3]) or "nothing"
            raise ModelError(
                f"{name} was given as model; there is no config.json in it, but {held}. Give a model's folder."
            )
        return str(path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{name} was given as model; there is no such folder. Give a model's folder or a hub id.")
    return name


def load_config(source: str) -> Any:
    """The config of a model.

    Raises:
        ModelError: it cannot be loaded, or holds adapters alone.
    """
    adapter, config = (Path(source) / name for name in (ADAPTER_FILE, "config.json"))
    with _worded(source):
        if adapter.exists() and not config.exists():
            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
            raise ModelError(
                f"{source} was given as model; it holds adapters only. Give the base that they are for: {base}."
            )
        return AutoConfig.from_pretrained(source)


def model_class(config: Any) -> Any:
    """The class that the config names, where transformers has it; else the one for generating."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type):
            return found
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_model(source: str) -> Any:
    """A full model in the dtype of its weights.

    Raises:
        ModelError: it cannot be loaded.
    """
    config = load_config(source)
    with _worded(source):
        return model_class(config).from_pretrained(source, dtype="auto")


def model_from_config(config: Any) -> Any:
    """A model without weights, on the meta device: in a moment, at any size.

    Raises:
        ModelError: its class makes none.
    """
    with _worded(str(config._name_or_path or config.model_type)), torch.device("meta"):
        kind = model_class(config)
        return kind(config) if issubclass(kind, PreTrainedModel) else kind.from_config(config)


def load_generator(name: str, base_model: str | None, dtype: torch.dtype) -> tuple[Any, Any, bool]:
    """A model that writes text, its tokenizer, and whether its weights are in `dtype`. Arguments as of `load_any`.

    Raises:
        FreezeError: it is no model, its base is gone, or there is no tokenizer.
    """
    model = load_any(name, base_model, dtype)
    source = source_of(name)
    base = str(model.config._name_or_path) if is_delta(source) else None
    return model, load_tokenizer(source, base), model.dtype == dtype


def load_any(name: str, base_model: str | None, dtype: torch.dtype) -> Any:
    """A model that writes text, by what one has of it.

    Args:
        name: a folder with a full model, PEFT adapters or a delta; a hub id; or the embedded model's name.
        base_model: where the base of a delta lies now; None is where the delta says.
        dtype: of the weights. A delta is loaded in the dtype that it was trained in, whatever is asked here.

    Raises:
        FreezeError: it is no model, or its base is gone.
    """
    source = source_of(name)
    if is_delta(source):
        return load_with_delta(source, base_model)
    if base_model is not None:
        raise FreezeError(f"--base_model was given, and {name} is no delta; only a delta needs it. Leave it out.")
    base, revision = source, None
    adapted = (Path(source) / ADAPTER_FILE).exists()
    with _worded(name):
        if adapted:
            from peft import PeftConfig, PeftModel

            adapter = PeftConfig.from_pretrained(source)
            base, revision = adapter.base_model_name_or_path, adapter.revision
    model = load_base(base, dtype, revision)
    if adapted:
        with _worded(name):
            model = PeftModel.from_pretrained(model, source)
    return model


def load_base(source: str, dtype: torch.dtype, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """A full model with a head that writes text.

    Args:
        source: a folder or a hub id.
        dtype: of the weights.
        revision: of a hub id.
        trust_remote_code: run code that comes with the model.

    Raises:
        ModelError: it cannot be loaded.
    """
    settings = Path(source) / "generation_config.json"
    with _worded(source):
        if settings.is_file():  # transformers takes a damaged one for none, and generates in another way
            json.loads(settings.read_text(encoding="utf-8"))
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(source, **options)
        auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return auto_class.from_pretrained(source, dtype=dtype, **options)


def load_with_delta(delta: str, base_model: str | None) -> Any:
    """A delta on its base.

    Args:
        delta: its folder.
        base_model: where the base lies now; None is where the delta says.

    Raises:
        FreezeError: the base is gone or another one, or the delta is damaged.
    """
    if base_model is not None:
        if not is_delta(delta):
            raise FreezeError(f"--base_model was given with {delta}, which is no folder of save_delta. Leave it out.")
        return load_delta(delta, build_base(delta, source_of(base_model)))
    try:
        with _worded(delta):
            return load_delta(delta)
    except ModelError as error:
        raise ModelError(f"{error} (The option --base_model of hf-freeze says where the base lies now.)") from error


def load_tokenizer(source: str, base: str | None, **options: Any) -> Any:
    """The tokenizer that lies with a model, or with its base; options are those of `from_pretrained`.

    Raises:
        ModelError: there is none that can be read.
    """
    places = [place for place in (source, base) if place is not None]
    failures = []
    for place in places:
        try:
            return AutoTokenizer.from_pretrained(place, **options)
        except Exception as error:  # tokenizers raises bare ones
            failures.append(error)
    raise ModelError(
        f"{source} was given as model; its tokenizer cannot be read: {first_line(failures[-1])}. Save the base's "
        f"tokenizer there too (merge_delta writes the model only)."
    ) from failures[-1]


@contextmanager
def _worded(name: str) -> Iterator[None]:
    try:
        yield
    except FreezeError:
        raise
    except Exception as error:  # a foreign loader may raise anything
        raise ModelError(
            f"{name} was given as model; it cannot be loaded here: {first_line(error)}. Give a folder with config.json "
            f"and weights, a hub id, or {EMBEDDED_NAME!r}."
        ) from error
