"""Puts a delta on its base again: finds it, builds the base that it names, compares, and only then copies.

Any other base than the one that was trained from is refused before anything in it is changed.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from hf_freeze.delta.file import FILES, MANIFEST_FILE, Manifest, read_delta, settings_apart
from hf_freeze.embedded import EMBEDDED_NAME, embedded_model
from hf_freeze.errors import DeltaMismatch, FreezeError, ModelError, first_few, first_line
from hf_freeze.files import whole
from hf_freeze.freezing import freeze_record, untie
from hf_freeze.given import check_model, check_path
from hf_freeze.tensors import (
    bits_of,
    bring_back_released,
    class_name,
    kind_of_digest,
    named_tensors,
    offloaded_tensors,
    shard_again,
    tensor_by_name,
    tensor_digest,
    tensor_kind,
    unwrap,
)

__all__ = ["build_base", "load_delta", "merge_delta"]

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_delta(
    folder: str | os.PathLike[str],
    base_model: nn.Module | None = None,
    *,
    trust_remote_code: bool = False,
    **from_pretrained: Any,
) -> Any:
    """Puts a delta on its base, which then computes what the saved model computed, to the bit. Mutates base_model.

    Every tensor of the base is compared first with what the delta says of it, the frozen ones by digest. A head that
    was untied is untied here too. Nothing is frozen by it: call `freeze` with the folder's plan to train on. Under
    FSDP2 every process must call, under DDP each loads for itself.

    Args:
        folder: What `save_delta` wrote, now or in an earlier version, or a hub id that it was pushed to.
        base_model: The model to load into, bare or wrapped; None builds it from the id and revision that the delta
            names. Must be given for a PeftModel and for a class that transformers does not have.
        trust_remote_code: Run the code that the base brings. False, because it may do anything.
        **from_pretrained: For building the base: `attn_implementation`, `device_map`, `token` and so on.

    Returns:
        base_model, or the model that was built.

    Raises:
        DeltaMismatch: The delta is missing or damaged, or the base is another one; nothing was changed.
        ModelError: The base cannot be built.
    """
    check_path("load_delta", "folder", folder)
    if base_model is not None:
        check_model("load_delta", base_model)
        if unused := [name for name in from_pretrained if name != "token"]:
            raise FreezeError(
                f"load_delta was given base_model and {unused[0]}=, which is for building one. Leave one of them out."
            )
    place = _find(folder, from_pretrained.get("token"))
    manifest, saved = read_delta(place)
    model = base_model
    if model is None:
        model = _build(manifest, None, {"trust_remote_code": trust_remote_code} | from_pretrained)
    root = unwrap(model)
    shard_again(root)
    bring_back_released(root)
    if to_untie := _check(place, manifest, root):
        untie(root, to_untie)
    tensors = dict(named_tensors(root, every_name=True))
    with torch.no_grad():
        for name, value in saved.items():
            _copy(tensors[name], value)
    return model


def build_base(folder: str | os.PathLike[str], source: str) -> Any:
    """The base of a delta, from where it lies now; whether it is the right one, `load_delta` says.

    Args:
        folder: The delta's.
        source: A folder or a hub id, of weights in any form that transformers reads.

    Raises:
        DeltaMismatch: The delta is damaged.
        ModelError: The base cannot be built.
    """
    return _build(read_delta(Path(folder))[0], source, {"trust_remote_code": False, "use_safetensors": None})


def merge_delta(
    folder: str | os.PathLike[str], output: str | os.PathLike[str], base_model: nn.Module | None = None
) -> Path:
    """Writes base and delta together as a full model, for `from_pretrained`; whole or not at all.

    Args:
        folder: As in `load_delta`.
        output: A folder that is empty or does not exist yet.
        base_model: As in `load_delta`; the delta is loaded into it.

    Returns:
        The output folder. It holds no tokenizer: that is the base's.

    Raises:
        ModelError: The output folder holds something, or the model is none of transformers' own.
        FreezeError: It could not be written; nothing is left.
    """
    check_path("merge_delta", "folder", folder)
    check_path("merge_delta", "output", output)
    if base_model is not None:
        check_model("merge_delta", base_model)
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"merge_delta was to write into {target}, which holds something. Give a new folder.")
    from transformers import PreTrainedModel

    if base_model is not None and not isinstance(unwrap(base_model), PreTrainedModel):
        raise ModelError(
            f"merge_delta was given a {type(unwrap(base_model)).__name__}, which cannot write itself as a full model. "
            "Use load_delta; a PeftModel then has merge_and_unload()."
        )
    model = unwrap(load_delta(folder, base_model))
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        with whole(target.absolute()) as staging:
            model.save_pretrained(staging)  # type: ignore[operator]
    except (OSError, SafetensorError) as error:
        raise FreezeError(f"merge_delta could not write {target}: {error}. Nothing of it is left there.") from error
    return target


# ------------------------------------------------------------------------------------------------------------ the base


def _find(folder: str | os.PathLike[str], token: str | bool | None) -> Path:
    """The folder, or the copy of what a hub id of that name holds."""
    place = Path(folder)
    try:
        if place.is_dir():
            return place
    except OSError as error:
        raise DeltaMismatch(f"A delta was asked from {place}; it cannot be read: {first_line(error)}.") from error
    if os.path.lexists(place):
        raise DeltaMismatch(f"A delta was asked from {str(folder)!r}, which is no folder. Give that of save_delta.")
    if not HUB_ID.fullmatch(os.fspath(folder)):
        raise DeltaMismatch(
            f"A delta was asked from {str(folder)!r}; there is no such folder, and no hub id is like it."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(os.fspath(folder), allow_patterns=[*FILES, MANIFEST_FILE], token=token))
    except Exception as error:  # the hub's client raises many kinds: no such id, no network, no permission
        raise DeltaMismatch(
            f"A delta was asked from {str(folder)!r}; there is no such folder, and the hub gave none: "
            f"{first_line(error)}"
        ) from error


def _build(manifest: Manifest, moved_to: str | None, given: dict[str, Any]) -> Any:
    """The base that a delta names, or what is said to be it, in the dtype of its frozen tensors."""
    base, revision = (moved_to, None) if moved_to else (manifest.base, manifest.revision)
    if not base:
        raise ModelError("The delta names no base: the model was not loaded from anywhere. Give base_model=.")
    if not moved_to and ".." in re.split(r"[/\\]", base):
        raise ModelError(f"The delta names the base {base!r}, a path that climbs out of its folder. Give base_model=.")
    options: dict[str, Any] = {"use_safetensors": True}
    options |= {"revision": revision} if revision else {}
    options |= {"dtype": manifest.dtype} if manifest.dtype else {}
    options |= given
    source = str(embedded_model()) if base == EMBEDDED_NAME else base
    try:
        return _model_class(manifest.architecture, source, options).from_pretrained(source, **options)
    except ModelError:
        raise
    except Exception as error:  # a foreign loader may raise anything
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"The delta's base {base!r}{at} could not be loaded as a {manifest.architecture}: {first_line(error)}. "
            "Give base_model=."
        ) from error


def _model_class(name: str, source: str, options: dict[str, Any]) -> Any:
    """The class of that name in transformers; failing that, the one that the base brings, where that is trusted."""
    import transformers

    kind = getattr(transformers, name, None)
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    if options["trust_remote_code"]:
        given = {key: value for key, value in options.items() if key in ("revision", "token", "trust_remote_code")}
        config = transformers.AutoConfig.from_pretrained(source, **given)
        for auto, path in (getattr(config, "auto_map", None) or {}).items():
            if auto.startswith("AutoModel") and str(path).rpartition(".")[2] == name:
                return getattr(transformers, auto)
    if name.startswith("Peft"):
        raise ModelError(
            f"The delta is of a {name}. Give base_model=, adapted as it was; to share adapters, use the model's own "
            "save_pretrained instead of save_delta."
        )
    raise ModelError(
        f"The delta is of a {name}, which transformers {transformers.__version__} does not have. Give base_model=, or "
        "trust_remote_code=True where its base brings the code and you trust it."
    )


# ------------------------------------------------------------------------------------------------------- is it the one?

Tensors = dict[str, torch.Tensor]  # of a model, under each of their names


def _check(folder: Path, manifest: Manifest, root: nn.Module) -> tuple[str, ...]:
    """The names that are to be untied before the delta is copied; warns where the model computes otherwise.

    Raises:
        DeltaMismatch: It has other tensors, other bits, is of another type or tied otherwise.
    """
    this, tensors = f"this {class_name(root)}", dict(named_tensors(root, every_name=True))
    try:
        _check_names(manifest, root, tensors, this)
        _check_kinds(manifest, root, tensors, this)
        apart = _check_config(manifest, root, this)
        to_untie = _check_ties(manifest, root, tensors, this)
        _check_bits(manifest, root, tensors)
    except DeltaMismatch as error:
        raise DeltaMismatch(f"The delta in {folder} {error}") from None
    if apart:
        warnings.warn(
            f"The delta in {folder} was trained with other settings than {this} has, which may make it compute "
            f"otherwise: {first_few(apart)}. Give base_model= with those of the training.",
            stacklevel=3,
        )
    return to_untie


def _check_names(manifest: Manifest, root: nn.Module, tensors: Tensors, this: str) -> None:
    """Every tensor that the delta names is in the model, and it names every tensor of the model."""
    readable = offloaded_tensors(root)  # enough for a frozen tensor, which is compared only
    away = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if meta := [name for name in away if id(tensors[name]) not in readable or name not in manifest.frozen]:
        raise DeltaMismatch(
            f"was to be loaded into a {class_name(root)} whose {meta[0]} is on the meta device and holds no bits. Load "
            "the base's weights first."
        )
    named = [*manifest.saved, *manifest.frozen]
    strangers = [name for name in named if name not in tensors]
    known = {id(tensors[name]) for name in named if name in tensors}
    unnamed = [name for name, tensor in tensors.items() if id(tensor) not in known]
    faults = []
    if strangers:
        faults.append(f"{len(strangers)} of its {len(named)} tensors are not in the model, e.g. {first_few(strangers)}")
    if unnamed:
        faults.append(f"{len(unnamed)} tensors of the model are not in it, e.g. {first_few(unnamed)}")
    if faults:
        raise DeltaMismatch(
            f"is of a {manifest.architecture}; {this} is built otherwise: {'; '.join(faults)}. Give "
            f"{manifest.base_words}, with the adapters that it had."
        )


def _check_kinds(manifest: Manifest, root: nn.Module, tensors: Tensors, this: str) -> None:
    """Every tensor has the shape and dtype that the delta says."""
    wrong, fix = [], f"Give {manifest.base_words}, in the same dtype"
    for name, digest in (manifest.saved | manifest.frozen).items():
        then, now = kind_of_digest(digest), tensor_kind(tensors[name])
        if then == now:
            continue
        wrong.append(f"{name} ({then}, here {now})")
        only_rows = re.sub(r"\[\d+", "[", then) == re.sub(r"\[\d+", "[", now)  # "float32 [9, 4]" and "float32 [8, 4]"
        if only_rows and isinstance(root.get_submodule(name.rpartition(".")[0]), nn.Embedding):
            rows = re.findall(r"\d+", then.partition("[")[2])[0]
            fix = f"The vocabulary was resized: call resize_token_embeddings({rows}) on the base before"
    if wrong:
        raise DeltaMismatch(
            f"does not fit {this}: {len(wrong)} tensors have another shape or dtype, e.g. {first_few(wrong)}. {fix}."
        )


def _check_config(manifest: Manifest, root: nn.Module, this: str) -> list[str]:
    """The model is of the type that was trained; what makes it compute otherwise from the same tensors, in words."""
    config: Any = getattr(root, "config", None)
    try:
        then: Any = manifest.config
        type_then, type_now = then["model_type"], type(config).model_type  # an instance keeps that of its file
        if type_then == type_now:
            then = json.loads(type(config).from_dict(then).to_json_string())
        apart = settings_apart(then, json.loads(config.to_json_string()))
    except Exception:  # there is none, or none that is sound: the tensors fit all the same
        return []
    if type_then != type_now:
        raise DeltaMismatch(
            f"was trained on a model of type {reprlib.repr(type_then)}; {this} is of type {type_now!r}. Give "
            f"{manifest.base_words}."
        )
    return apart


def _check_ties(manifest: Manifest, root: nn.Module, tensors: Tensors, this: str) -> tuple[str, ...]:
    """The names to untie first; refuses where the delta then still has two values for one tensor of the model, and
    where a saved value would move a tensor that `freeze` froze in this model.
    """
    shared: dict[int, list[str]] = {}
    for name in (*manifest.saved, *manifest.frozen):
        shared.setdefault(id(tensors[name]), []).append(name)
    tied = [names for names in shared.values() if len(names) > 1]
    to_untie = tuple(name for names in tied for name in names if name in manifest.untied)
    for names in tied:
        if len([name for name in names if name not in to_untie]) > 1:
            raise DeltaMismatch(
                f"holds {' and '.join(names)} apart; in {this} they are one tensor. Give a base in which they are not "
                "tied."
            )
    if any(hasattr(tensors[name], "full_tensor") for name in to_untie):
        raise DeltaMismatch(
            f"has {to_untie[0]} untied; this model is sharded already, with the head tied. Load it before fully_shard."
        )
    owner, record = freeze_record(root) or (root, None)
    inner = dict(named_tensors(owner))
    held = {id(tensor_by_name(inner, name)) for name in (record.digests if record else ())}
    if clash := [name for name in manifest.saved if name not in to_untie and id(tensors[name]) in held]:
        raise DeltaMismatch(
            f"holds {len(clash)} tensors that freeze() has frozen in this model, e.g. {first_few(clash)}. Call "
            "thaw(model) first, or freeze it by the delta's own plan."
        )
    return to_untie


def _check_bits(manifest: Manifest, root: nn.Module, tensors: Tensors) -> None:
    """The frozen tensors hold the bits that they held when the delta was trained."""
    offloaded = offloaded_tensors(root)
    wrong = []
    for name, digest in manifest.frozen.items():
        bits = bits_of(tensors[name], offloaded)
        if bits is None or tensor_digest(bits) != digest:
            wrong.append(name)
    if wrong:
        raise DeltaMismatch(
            f"was trained on another base: {len(wrong)} of {len(manifest.frozen)} frozen tensors differ, e.g. "
            f"{first_few(wrong)}. Give {manifest.base_words} as it was before training."
        )


def _copy(target: torch.Tensor, value: torch.Tensor) -> None:
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)  # type: ignore[attr-defined]
    target.copy_(value)
