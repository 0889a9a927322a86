"""Saves what was trained: every tensor but those that `freeze` froze, and how to find their base.

The file of the delta is written whole under a temporary name and then renamed: a save that is cut short at any moment
leaves the delta that was there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from hf_freeze.delta.file import (
    CONFIG_FILE,
    FILES,
    MANIFEST_FILE,
    STAGING,
    WEIGHTS_FILE,
    Manifest,
    is_delta,
    regular,
    settings_apart,
    write_weights,
)
from hf_freeze.embedded import EMBEDDED_NAME
from hf_freeze.errors import FreezeError, first_few, nearest
from hf_freeze.files import cache_folder, whole
from hf_freeze.freezing import FreezeRecord, freeze_record
from hf_freeze.given import check_model, check_path
from hf_freeze.locks import alone_in
from hf_freeze.marks import UNTIED
from hf_freeze.plan import PLAN_FILE
from hf_freeze.processes import agreed, rank_and_world
from hf_freeze.tensors import (
    class_name,
    kind_of_digest,
    named_tensors,
    shard_again,
    tensor_by_name,
    tensor_digest,
    tensor_kind,
    unwrap,
    whole_tensor,
)

__all__ = ["DeltaReport", "save_delta"]

LEFTOVERS = tuple(f"{name}.*.tmp" for name in FILES)  # of saves that were killed
PATIENCE_SECONDS = 600.0  # for another save to write its delta
HUB_OPTIONS = ("repo_id", "private", "token", "commit_message")


@dataclass(frozen=True)
class DeltaReport:
    """What `save_delta` wrote.

    Attributes:
        folder: Where the delta is.
        tensors: Number of tensors in it.
        tensor_bytes: Their bytes.
        model_bytes: Bytes of the whole model, each tied tensor once.
    """

    folder: Path
    tensors: int
    tensor_bytes: int
    model_bytes: int

    def __str__(self) -> str:
        share = self.tensor_bytes / max(1, self.model_bytes)
        return (
            f"{self.tensors} trained tensors, {self.tensor_bytes:,} bytes ({share:.1%} of the model's "
            f"{self.model_bytes:,}), in {self.folder}"
        )


def save_delta(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    extra: Any = None,
    push_to_hub: bool = False,
    **hub: Any,
) -> DeltaReport:
    """Writes what is not frozen of a frozen model, and what is needed to put it on its base again. Changes no model.

    That is every tensor but those that `freeze` took a digest of: trained parameters and the persistent buffers of
    modules that train; a tied tensor once. What was trained and frozen afterwards counts as frozen: save it before.
    A delta in the folder is replaced, as a whole or not at all, and of two saves at once the later one wins; other
    files there stay. A released prefix stays away.
    Under several processes every one of them must call; the first writes, and all return when it is on disk.

    Args:
        model: A model that `freeze` froze, bare or wrapped (DDP, FSDP2, PEFT, torch.compile).
        folder: Where to write delta.safetensors, and beside it freeze_plan.json and config.json. Made where it is
            missing.
        base: Hub id or folder of the model that was frozen; None is what its config says it was loaded from. A
            folder is noted with its full path.
        revision: The base's commit; None is what its config says.
        extra: Any JSON value to keep with it, such as a metric.
        push_to_hub: Upload the three files once they are written.
        **hub: `repo_id` (None is the folder's name), `private`, `token` and `commit_message` of the upload.

    Returns:
        The report; it prints as one line.

    Raises:
        FreezeError: The model was not frozen, or a frozen tensor is trainable or gone; an option that does not exist;
            a config.json in the folder that it did not write; or the disk is full: then an older delta there is still
            whole.

    Example:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_freeze import FreezePlan, freeze, load_delta
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=8, n_head=2, vocab_size=16, n_positions=8,
        ...     bos_token_id=1, eos_token_id=2))
        >>> base = GPT2LMHeadModel(model.config)
        >>> _ = base.load_state_dict(model.state_dict())
        >>> _ = freeze(model, FreezePlan(decoder_blocks=3))
        >>> with torch.no_grad():
        ...     _ = model.transformer.h[3].ln_1.weight.fill_(2.0)  # in place of training
        >>> folder = tempfile.mkdtemp()
        >>> report = save_delta(model, folder)
        >>> report.tensors, report.tensor_bytes, report.model_bytes
        (14, 3552, 14784)
        >>> load_delta(folder, base).transformer.h[3].ln_1.weight[0].item()
        2.0
    """
    check_model("save_delta", model)
    check_path("save_delta", "folder", folder)
    root = unwrap(model)
    with agreed("save the delta"):
        _check_options(push_to_hub, hub)
        try:
            json.dumps(extra)
        except (TypeError, ValueError) as error:
            raise FreezeError(f"save_delta was given an extra that is no JSON value: {error}.") from error
        shard_again(root)
        record, frozen, saved = _split(root)
    config: Any = getattr(root, "config", None)
    target = Path(folder)
    first = rank_and_world()[0] == 0
    tensors, failure = _on_first(saved, first)
    with agreed(f"save the delta in {target}"):
        if failure is not None:
            raise failure
        if first:
            manifest = Manifest(
                architecture=class_name(root),
                base=_base_id(base, config, target),
                revision=revision or getattr(config, "_commit_hash", None),
                untied=[name for name in _untied_names(root) if name in saved or name in frozen],
                saved={name: tensor_digest(tensor) for name, tensor in tensors.items()},
                frozen=frozen,
                extra=extra,
                plan=record.plan.to_dict(),
                config=json.loads(config.to_json_string()) if hasattr(config, "to_json_string") else None,
            )
            _write(target, tensors, manifest)
            if push_to_hub:
                _push(target, hub)
    size = sum(_bytes(tensor) for tensor in saved.values())
    return DeltaReport(target, len(saved), size, sum(_bytes(tensor) for tensor in _tensors(root).values()))


# ------------------------------------------------------------------------------------------------------- what to save


def _split(root: nn.Module) -> tuple[FreezeRecord, dict[str, str], dict[str, torch.Tensor]]:
    """The record of `freeze`, the digest of each frozen tensor, and every other tensor; by the names of the root.

    The tensors are walked, not `state_dict()`, which would bring a released prefix back.
    """
    found = freeze_record(root)
    if found is None:
        raise FreezeError(
            f"save_delta was asked for a {type(root).__name__} that was never frozen, so that all of it would be "
            "saved. Call freeze(model, plan) before training, or use save_pretrained."
        )
    owner, record = found
    if not record.digests:
        raise FreezeError(
            f"save_delta was asked for a {type(root).__name__} that was on the meta device when freeze() ran; it held "
            "no bits by which to tell its base. Call freeze() again once its weights are loaded."
        )
    named = _tensors(root)
    name_of = {id(tensor): name for name, tensor in named.items()}
    inner = named if owner is root else dict(named_tensors(owner))
    frozen: dict[str, str] = {}
    moved = []
    for name, digest in record.digests.items():
        tensor = tensor_by_name(inner, name)
        if tensor is None:
            moved.append(f"{name} (gone: replaced or renamed)")
        elif tensor.requires_grad:
            moved.append(f"{name} (trainable again)")
        elif tensor_kind(tensor) != kind_of_digest(digest):
            moved.append(f"{name} ({kind_of_digest(digest)}, now {tensor_kind(tensor)})")
        else:
            frozen[name_of[id(tensor)]] = digest
    if moved:
        raise FreezeError(
            f"save_delta leaves frozen tensors out; {len(moved)} of {len(record.digests)} are not as freeze() left "
            f"them, e.g. {first_few(moved)}. Call freeze(model, plan) again with the plan that holds now (after thaw, "
            "where less is frozen), before training."
        )
    saved = {name: tensor for name, tensor in named.items() if name not in frozen}
    if away := [name for name, tensor in saved.items() if tensor.device.type == "meta"]:
        raise FreezeError(
            f"save_delta was to save {away[0]}, which is on the meta device and holds no bits. Load the weights first."
        )
    return record, frozen, saved


def _tensors(root: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers, each once."""
    once: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in named_tensors(root):  # it names a buffer that two modules share twice
        once.setdefault(id(tensor), (name, tensor))
    return dict(once.values())


def _untied_names(root: nn.Module) -> list[str]:
    return [
        f"{prefix}.{leaf}" if prefix else leaf
        for prefix, module in root.named_modules()
        for leaf in sorted(module.__dict__.get(UNTIED, ()))
    ]


def _base_id(base: str | os.PathLike[str] | None, config: Any, target: Path) -> str | None:
    name = os.fspath(base) if base is not None else getattr(config, "_name_or_path", None)
    if not name or not Path(name).is_dir():
        return name or None
    path = Path(name).resolve()  # a relative path would mean something else elsewhere
    if path == target.resolve():
        raise FreezeError(
            f"save_delta was to write into {target}, the folder of the base, whose config.json it would replace. Give "
            "another folder."
        )
    return EMBEDDED_NAME if path == (cache_folder() / EMBEDDED_NAME).resolve() else str(path)


def _on_first(saved: dict[str, torch.Tensor], first: bool) -> tuple[dict[str, torch.Tensor], Exception | None]:
    """All tensors whole and on the CPU in the first process, and what went wrong there.

    Every process takes part in gathering each shard, also when the first one has no memory left for more.
    """
    tensors: dict[str, torch.Tensor] = {}
    failure: Exception | None = None
    for name, tensor in saved.items():
        gathered = whole_tensor(tensor)
        if first and failure is None:
            try:
                tensors[name] = gathered.cpu().contiguous()
            except (MemoryError, RuntimeError) as error:
                failure = error
    return tensors, failure


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# ------------------------------------------------------------------------------------------------------------- on disk


def _write(target: Path, tensors: dict[str, torch.Tensor], manifest: Manifest) -> None:
    """Writes all files under temporary names, then renames them, that of the delta first. One save at a time."""
    new = not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        with alone_in(target, PATIENCE_SECONDS) as alone:
            if alone:
                _remove(target, LEFTOVERS)
            with ExitStack() as files:  # the last one that is opened is renamed first
                if manifest.config is not None and not _has_config(target, manifest.config):
                    files.enter_context(whole(target / CONFIG_FILE)).write_text(_json(manifest.config), "utf-8")
                files.enter_context(whole(target / PLAN_FILE)).write_text(_json(manifest.plan), "utf-8")
                write_weights(files.enter_context(whole(target / WEIGHTS_FILE)), tensors, manifest)
            _remove(target, (MANIFEST_FILE, STAGING))  # of a delta of format 1, which is replaced
    except BlockingIOError as error:
        raise FreezeError(
            f"save_delta could not write {target}: another process has been writing its delta there for "
            f"{PATIENCE_SECONDS:.0f} s. Wait for that one or end it, or give another folder."
        ) from error
    except (OSError, SafetensorError) as error:
        if new:
            with suppress(OSError):
                target.rmdir()
        kept = f"The delta that was there is whole. Free space, or give another folder than {target}."
        raise FreezeError(f"save_delta could not write {target}: {error}. {'' if new else kept}".strip()) from error


def _json(values: Any) -> str:
    return json.dumps(values, indent=2) + "\n"


def _remove(target: Path, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        for path in target.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _has_config(target: Path, wanted: dict[str, Any]) -> bool:
    """Whether the config of the model lies there already, beside its weights for instance.

    Raises:
        FreezeError: There is another one, which `save_delta` has not written.
    """
    path = target / CONFIG_FILE
    if is_delta(target) or not os.path.lexists(path):
        return False
    with suppress(OSError, ValueError, RecursionError, AttributeError, TypeError):  # it is no config
        if not settings_apart(json.loads(regular(path).read_text(encoding="utf-8")), wanted):
            return True
    raise FreezeError(
        f"save_delta was to write config.json into {target}, which holds another one and no delta that it could belong "
        "to. Give a folder of its own."
    )


# ----------------------------------------------------------------------------------------------------------------- hub


def _check_options(push_to_hub: bool, hub: dict[str, Any]) -> None:
    for name in hub:
        if name not in HUB_OPTIONS:
            raise FreezeError(
                f"save_delta was given {name}=; it has no such option. The nearest: "
                f"{nearest(name, (*HUB_OPTIONS, 'base', 'revision', 'extra', 'push_to_hub'))}."
            )
    if hub and not push_to_hub:
        raise FreezeError(f"save_delta was given {next(iter(hub))}=, which is for uploads. Add push_to_hub=True.")


def _push(folder: Path, hub: dict[str, Any]) -> None:
    from huggingface_hub import HfApi

    api = HfApi(token=hub.get("token"))
    repository = api.create_repo(
        hub.get("repo_id") or folder.absolute().name, private=hub.get("private"), exist_ok=True
    ).repo_id
    message = hub.get("commit_message") or "Upload the trained tensors"
    api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(FILES), commit_message=message)
