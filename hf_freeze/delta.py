"""Saves and loads only what was trained: every tensor but those that `freeze` froze, and how to find their base.

A delta lies in a folder of its own or in a Trainer checkpoint, as four files: delta.safetensors; delta.json with the
digest of each saved and each frozen tensor; freeze_plan.json; config.json. A save that is cut short at any moment
leaves the delta that was there. Loading refuses damage, and any base but the one that was trained on, before it
changes anything; it reads safetensors and JSON, never a pickle.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import reprlib
import shutil
import stat
import uuid
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hf_freeze.embedded import EMBEDDED_NAME, embedded_model
from hf_freeze.errors import DeltaMismatch, FreezeError, ModelError, nearest
from hf_freeze.files import cache_folder
from hf_freeze.freezing import FreezeRecord, freeze_record, untie
from hf_freeze.given import check_model, check_path
from hf_freeze.locks import alone_in
from hf_freeze.marks import RELEASED, UNTIED
from hf_freeze.plan import PLAN_FILE, FreezePlan
from hf_freeze.processes import agreed, rank_and_world
from hf_freeze.tensors import (
    bits_of,
    kind_of_digest,
    named_tensors,
    offloaded_tensors,
    tensor_by_name,
    tensor_digest,
    tensor_kind,
    unwrap,
    whole_tensor,
)

__all__ = ["DeltaReport", "is_delta", "load_delta", "merge_delta", "save_delta"]

FORMAT = 1
WEIGHTS_FILE = "delta.safetensors"
DELTA_FILE = "delta.json"
FILES = (WEIGHTS_FILE, PLAN_FILE, "config.json", DELTA_FILE)  # in the order in which they are moved into place
STAGING = ".delta*.tmp"  # where each save writes before it moves its files into place
PATIENCE_SECONDS = 60.0  # for another save to move its files into place, which takes a moment
READS = 20  # of a delta that other saves replace while it is read
HUB_OPTIONS = ("repo_id", "private", "token", "commit_message")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
DIGEST = re.compile(r"\w+ \[(\d+(, \d+)*)?\] [0-9a-f]{32}")  # of `tensor_digest`
PASSING = (  # in a config: how a model was saved, and what the tensors tell or no forward looks at
    "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
    "tie_word_embeddings", "use_cache", "vocab_size", "quantization_config", "id2label", "label2id", "problem_type",
)  # fmt: skip
SHOWN = 3  # names that a message gives as examples


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


@dataclass(frozen=True)
class _Manifest:
    """What delta.json holds. A digest is `tensor_digest`'s, which tells dtype and shape too."""

    architecture: str
    base: str | None
    revision: str | None
    untied: list[str]
    saved: dict[str, str]
    frozen: dict[str, str]
    extra: Any
    format: int = FORMAT


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
        folder: Where to write. Made where it is missing.
        base: Hub id or folder of the model that was frozen; None is what its config says it was loaded from. A
            folder is noted with its full path.
        revision: The base's commit; None is what its config says.
        extra: Any JSON value to keep with it, such as a metric.
        push_to_hub: Upload the four files once they are written.
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
        >>> from hf_freeze import FreezePlan, freeze
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
        _shard_again(root)
        record, frozen, saved = _split(root)
    config: Any = getattr(root, "config", None)
    target = Path(folder)
    first = rank_and_world()[0] == 0
    tensors, failure = _on_first(saved, first)
    with agreed(f"save the delta in {target}"):
        if failure is not None:
            raise failure
        if first:
            manifest = _Manifest(
                architecture=_architecture(root),
                base=_base_id(base, config, target),
                revision=revision or getattr(config, "_commit_hash", None),
                untied=[name for name in _untied_names(root) if name in saved or name in frozen],
                saved={name: tensor_digest(tensor) for name, tensor in tensors.items()},
                frozen=frozen,
                extra=extra,
            )
            _write(target, tensors, manifest, record, config)
            if push_to_hub:
                _push(target, hub)
    size = sum(_bytes(tensor) for tensor in saved.values())
    return DeltaReport(target, len(saved), size, sum(_bytes(tensor) for tensor in _first_names(root).values()))


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
        folder: What `save_delta` wrote, or a hub id that it was pushed to.
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
    if base_model is not None and (unused := [name for name in from_pretrained if name != "token"]):
        raise FreezeError(
            f"load_delta was given base_model and {unused[0]}=, which is for building one. Leave one of them out."
        )
    place = _find(folder, from_pretrained.get("token"))
    manifest, saved = _read(place)
    model = _build(manifest, trust_remote_code, from_pretrained) if base_model is None else base_model
    root = unwrap(model)
    _shard_again(root)
    for module in root.modules():
        if RELEASED in module.__dict__:
            module.__dict__[RELEASED].restore()
    _check_names(place, manifest, root)
    _check_kinds(place, manifest, root)
    _check_config(place, manifest, root)
    to_untie = _check_ties(place, manifest, root)
    _check_bits(place, manifest, root)
    if to_untie:
        untie(root, to_untie)
    tensors = _every_name(root)
    with torch.no_grad():
        for name, value in saved.items():
            _copy(tensors[name], value)
    return model


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
    staging = target.absolute().with_name(f".{target.absolute().name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        staging.mkdir(parents=True)
        model.save_pretrained(staging)  # type: ignore[operator]
        if target.exists():
            target.rmdir()
        os.replace(staging, target)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise FreezeError(f"merge_delta could not write {target}: {error}. Nothing of it is left there.") from error
        raise
    return target


def is_delta(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder on this machine holds a delta; it may still be damaged."""
    try:
        return _manifest_path(Path(folder)).is_file()
    except OSError:  # it may not be read
        return False


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
    named = _first_names(root)
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
            f"them, e.g. {_some(moved)}. Call freeze(model, plan) again with the plan that holds now (after thaw, "
            "where less is frozen), before training."
        )
    saved = {name: tensor for name, tensor in named.items() if name not in frozen}
    if away := [name for name, tensor in saved.items() if tensor.device.type == "meta"]:
        raise FreezeError(
            f"save_delta was to save {away[0]}, which is on the meta device and holds no bits. Load the weights first."
        )
    return record, frozen, saved


def _first_names(root: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers, each once."""
    once: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in named_tensors(root):  # it names a buffer that two modules share twice
        once.setdefault(id(tensor), (name, tensor))
    return dict(once.values())


def _every_name(root: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers, under each of their names."""
    tensors: dict[str, torch.Tensor] = dict(root.named_parameters(remove_duplicate=False))
    for prefix, module in root.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                tensors[f"{prefix}.{name}" if prefix else name] = buffer
    return tensors


def _untied_names(root: nn.Module) -> list[str]:
    return [
        f"{prefix}.{leaf}" if prefix else leaf
        for prefix, module in root.named_modules()
        for leaf in sorted(module.__dict__.get(UNTIED, ()))
    ]


def _architecture(root: nn.Module) -> str:
    """The name of a model's class, without the one that FSDP2 puts in front."""
    return next(kind.__name__ for kind in type(root).__mro__ if not hasattr(kind, "set_reshard_after_forward"))


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


def _shard_again(root: nn.Module) -> None:
    """After a forward without a backward, FSDP2 still has gathered tensors in the place of its shards."""
    for module in root.modules():
        if hasattr(module, "set_reshard_after_forward"):
            module.reshard()  # type: ignore[operator]


def _on_first(saved: dict[str, torch.Tensor], first: bool) -> tuple[dict[str, torch.Tensor], Exception | None]:
    """All tensors whole and on the CPU in the first process, and what went wrong there.

    Every process takes part in gathering each shard, also when the first one has no memory left for more.
    """
    tensors: dict[str, torch.Tensor] = {}
    failure: Exception | None = None
    for name, tensor in saved.items():
        whole = whole_tensor(tensor)
        if first and failure is None:
            try:
                tensors[name] = whole.cpu().contiguous()
            except (MemoryError, RuntimeError) as error:
                failure = error
    return tensors, failure


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# ------------------------------------------------------------------------------------------------------------- on disk


def _write(
    target: Path, tensors: dict[str, torch.Tensor], manifest: _Manifest, record: FreezeRecord, config: Any
) -> None:
    """Writes all files into a folder of its own inside the target, then moves them into place, the weights first.

    Killed before the first move, the older delta is whole; killed after it, the moves can be finished, and until
    then a reader takes delta.json from where it was written. Saves at the same time move one after the other.
    """
    new = not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        texts = {DELTA_FILE: json.dumps(asdict(manifest), indent=1) + "\n"}
        if hasattr(config, "to_json_string") and not _has_config(target, text := config.to_json_string()):
            texts["config.json"] = text
        staging = target / STAGING.replace("*", f"-{os.getpid()}-{uuid.uuid4().hex[:12]}")
        with contextlib.ExitStack() as stack:
            with alone_in(target, PATIENCE_SECONDS):
                staging.mkdir()
                stack.enter_context(alone_in(staging))  # or another save would take it for a leftover
            try:
                _stage(staging, tensors, record.plan, texts)
                stack.enter_context(alone_in(target, PATIENCE_SECONDS))
                _clear_leftovers(target)
            except BaseException:
                _discard(staging)
                raise
            _move(staging)
    except BlockingIOError as error:
        raise FreezeError(
            f"save_delta could not write {target}: another process has been moving its delta there for "
            f"{PATIENCE_SECONDS:.0f} s. Wait for that one or end it, or give another folder."
        ) from error
    except (OSError, SafetensorError) as error:
        if new:
            with contextlib.suppress(OSError):
                target.rmdir()
        kept = f"The delta that was there is whole. Free space, or give another folder than {target}."
        raise FreezeError(f"save_delta could not write {target}: {error}. {'' if new else kept}".strip()) from error


def _has_config(target: Path, text: str) -> bool:
    """Whether the config of the model lies there already, beside its weights for instance.

    Raises:
        FreezeError: There is another one, which `save_delta` has not written.
    """
    path = target / "config.json"
    if (
        not os.path.lexists(path)
        or _half_moved(target)
        or all((target / n).is_file() for n in (DELTA_FILE, WEIGHTS_FILE))
    ):
        return False
    try:
        there, wanted = _settings(json.loads(_regular(path).read_text(encoding="utf-8"))), _settings(json.loads(text))
        if all(there.get(name) == wanted.get(name) for name in {*there, *wanted}):  # what `load_delta` looks at
            return True
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, DeltaMismatch):
        pass
    raise FreezeError(
        f"save_delta was to write config.json into {target}, which holds another one and no delta that it could belong "
        "to. Give a folder of its own."
    )


def _stage(staging: Path, tensors: dict[str, torch.Tensor], plan: FreezePlan, texts: dict[str, str]) -> None:
    save_file(tensors, staging / WEIGHTS_FILE, metadata={"format": "pt"})
    plan.save_pretrained(staging)
    for name, text in texts.items():
        (staging / name).write_text(text, encoding="utf-8")
    for path in staging.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _clear_leftovers(target: Path) -> None:
    """Finishes what a killed save has moved in part, and removes what others have left before that."""
    for staging in target.glob(STAGING):
        with contextlib.suppress(BlockingIOError, FileNotFoundError, NotADirectoryError), alone_in(staging) as alone:
            if _is_half_moved(staging):
                _move(staging)
            elif alone:
                _discard(staging)


def _discard(staging: Path) -> None:
    (staging / DELTA_FILE).unlink(missing_ok=True)  # first: without the weights beside it, it would count as half moved
    shutil.rmtree(staging, ignore_errors=True)


def _move(staging: Path) -> None:
    for name in FILES:
        if (staging / name).exists():
            os.replace(staging / name, staging.parent / name)
    staging.rmdir()


def _is_half_moved(staging: Path) -> bool:
    """Whether a save was killed after its weights were moved into place and before its delta.json was."""
    return (staging / DELTA_FILE).exists() and not (staging / WEIGHTS_FILE).exists()


def _half_moved(folder: Path) -> Path | None:
    """Where a save that is half moved has its other files."""
    return next((staging for staging in folder.glob(STAGING) if _is_half_moved(staging)), None)


def _manifest_path(folder: Path) -> Path:
    return (_half_moved(folder) or folder) / DELTA_FILE


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


def _find(folder: str | os.PathLike[str], token: str | bool | None) -> Path:
    """The folder, or the copy of what a hub id of that name holds."""
    place = Path(folder)
    try:
        if place.is_dir():
            return place
    except OSError as error:
        raise DeltaMismatch(f"A delta was asked from {str(folder)!r}; it cannot be read: {_line(error)}.") from error
    if os.path.lexists(place):
        raise DeltaMismatch(f"A delta was asked from {str(folder)!r}, which is no folder. Give that of save_delta.")
    if not HUB_ID.fullmatch(os.fspath(folder)):
        raise DeltaMismatch(
            f"A delta was asked from {str(folder)!r}; there is no such folder, and no hub id is like it."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(os.fspath(folder), allow_patterns=list(FILES), token=token))
    except Exception as error:  # the hub's client raises many kinds: no such id, no network, no permission
        raise DeltaMismatch(
            f"A delta was asked from {str(folder)!r}; there is no such folder, and the hub gave none: {_line(error)}"
        ) from error


def _read(place: Path) -> tuple[_Manifest, dict[str, torch.Tensor]]:
    """What a delta says of itself and its tensors, each of which holds the bits that were saved.

    A save at the same time may replace one file before the other was read: then both are read again.
    """
    for _ in range(READS):
        before = _stamps(place)
        try:
            return _read_once(place)
        except DeltaMismatch:
            if _stamps(place) == before:
                raise
    raise DeltaMismatch(f"The delta in {place} was replaced {READS} times while it was read. Load it after training.")


def _stamps(place: Path) -> list[tuple[str, int, int]]:
    """What changes where another save moves its files into place."""
    stamps = []
    with contextlib.suppress(OSError):
        for path in (_manifest_path(place), place / WEIGHTS_FILE):
            found = path.stat()
            stamps.append((str(path), found.st_ino, found.st_mtime_ns))
    return stamps


def _regular(path: Path) -> Path:
    """The path of a file. A pipe in its place would be waited for, a device read without end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise DeltaMismatch(f"{path} was to be loaded; it is {kind}, not a file. Save the delta again.")
    return path


def _read_once(place: Path) -> tuple[_Manifest, dict[str, torch.Tensor]]:
    try:
        path = _manifest_path(place)
    except OSError as error:
        raise DeltaMismatch(f"A delta was asked from {place}; it cannot be read: {_line(error)}.") from error
    manifest = _read_manifest(path)
    path = place / WEIGHTS_FILE
    try:
        with safe_open(_regular(path), framework="pt") as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise DeltaMismatch(f"{path} was to be loaded; it is missing. Save the delta again.") from None
    except PermissionError as error:
        raise DeltaMismatch(f"{path} was to be loaded; it cannot be read: {_line(error)}.") from error
    except DeltaMismatch:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        raise DeltaMismatch(f"{path} is damaged or cut short: {_line(error)}. Save the delta again.") from error
    lacking = [name for name in manifest.saved if name not in saved]
    besides = [name for name in saved if name not in manifest.saved]
    if lacking or besides:
        told = [f"lacks {len(lacking)} tensors that {DELTA_FILE} names, e.g. {_some(lacking)}"] if lacking else []
        told += [f"holds {len(besides)} that it does not name, e.g. {_some(besides)}"] if besides else []
        raise DeltaMismatch(f"{path} {' and '.join(told)}. They are not of one save: save the delta again.")
    damaged = []
    for name, digest in manifest.saved.items():
        found = tensor_digest(saved[name])
        if found != digest:
            kinds = kind_of_digest(digest), kind_of_digest(found)
            damaged.append(name if kinds[0] == kinds[1] else f"{name} ({kinds[0]}, here {kinds[1]})")
    if damaged:
        raise DeltaMismatch(
            f"{path}: {len(damaged)} of {len(saved)} tensors are not what was saved: {_some(damaged, 20)}. It is "
            "damaged, or of another save. Save the delta again."
        )
    return manifest, saved


def _read_manifest(path: Path) -> _Manifest:
    try:
        values = json.loads(_regular(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DeltaMismatch(
            f"A delta was asked from {path.parent}; it has no {path.name}: {_holds(path.parent)}. Give a folder of "
            "save_delta."
        ) from None
    except DeltaMismatch:
        raise
    except PermissionError as error:
        raise DeltaMismatch(f"{path} cannot be read: {_line(error)}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DeltaMismatch(f"{path} cannot be read as JSON: {_line(error)}. Save the delta again.") from error
    version = values.get("format") if isinstance(values, dict) else None
    if version != FORMAT:
        raise DeltaMismatch(
            f"{path} is a delta of format {reprlib.repr(version)}; this version reads format {FORMAT}. Load it with "
            "the version that wrote it."
        )
    kinds: dict[str, Any] = {"architecture": str, "base": str | None, "revision": str | None}
    kinds |= {"untied": list, "saved": dict, "frozen": dict, "extra": object, "format": int}
    wrong = [name for name, kind in kinds.items() if name not in values or not isinstance(values[name], kind)]
    wrong += [f"{reprlib.repr(name)} (an unknown field)" for name in values if name not in kinds]
    if not wrong:
        digests = (*values["saved"].values(), *values["frozen"].values())
        wrong += [f"{reprlib.repr(text)} (no digest)" for text in digests if not _is_digest(text)]
        wrong += [f"{reprlib.repr(text)} (no name)" for text in values["untied"] if not isinstance(text, str)]
    if not wrong:
        names = [*values["untied"], *values["saved"], *values["frozen"]]
        wrong += [f"{name!r} (a path)" for name in names if ".." in name or name.startswith(("/", "\\"))]
        wrong += [f"{name!r} (both saved and frozen)" for name in values["saved"] if name in values["frozen"]]
        wrong += [f"{n!r} (untied, not saved)" for n in values["untied"] if n not in values["saved"] | values["frozen"]]
    if wrong:
        raise DeltaMismatch(f"{path} is not as save_delta writes it: {_some(wrong)}. Save the delta again.")
    return _Manifest(**values)


def _is_digest(text: Any) -> bool:
    return isinstance(text, str) and DIGEST.fullmatch(text) is not None


def _holds(folder: Path) -> str:
    try:
        there = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        return f"it cannot be read ({_line(error)})"
    return f"it holds {_some(there)}" if there else "it is empty"


# ------------------------------------------------------------------------------------------------------------ the base


def _build(manifest: _Manifest, trust_remote_code: bool, given: dict[str, Any]) -> Any:
    """The base that a delta names, in the dtype of its frozen tensors."""
    base = manifest.base
    if not base:
        raise ModelError("The delta names no base: the model was not loaded from anywhere. Give base_model=.")
    if ".." in re.split(r"[/\\]", base):
        raise ModelError(f"The delta names the base {base!r}, a path that climbs out of its folder. Give base_model=.")
    options: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": trust_remote_code}
    options |= {"revision": manifest.revision} if manifest.revision else {}
    dtypes = [getattr(torch, digest.split(" ")[0], None) for digest in manifest.frozen.values()]
    floating = [dtype for dtype in dtypes if isinstance(dtype, torch.dtype) and dtype.is_floating_point]
    options |= {"dtype": floating[0]} if floating else {}
    source = embedded_model() if base == EMBEDDED_NAME else base
    try:
        kind = _model_class(manifest.architecture, source, options | given)
        return kind.from_pretrained(source, **options | given)
    except ModelError:
        raise
    except Exception as error:  # a foreign loader may raise anything
        at = f" at revision {manifest.revision}" if manifest.revision else ""
        raise ModelError(
            f"The delta's base {base!r}{at} could not be loaded as a {manifest.architecture}: {_line(error)}. Give "
            "base_model=."
        ) from error


def _model_class(name: str, source: str | os.PathLike[str], options: dict[str, Any]) -> Any:
    """The class of that name in transformers; failing that, the one that the base brings, where that is trusted."""
    import transformers

    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
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


def _check_names(place: Path, manifest: _Manifest, root: nn.Module) -> None:
    """Every tensor that the delta names is in the model, and it names every tensor of the model."""
    tensors = _every_name(root)
    readable = offloaded_tensors(root)  # enough for a frozen tensor, which is compared only
    away = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if meta := [name for name in away if id(tensors[name]) not in readable or name not in manifest.frozen]:
        raise DeltaMismatch(
            f"The delta in {place} was to be loaded into a {_architecture(root)} whose {meta[0]} is on the meta "
            "device and holds no bits. Load the base's weights first."
        )
    named = [*manifest.saved, *manifest.frozen]
    strangers = [name for name in named if name not in tensors]
    known = {id(tensors[name]) for name in named if name in tensors}
    unnamed = [name for name, tensor in tensors.items() if id(tensor) not in known]
    if not strangers and not unnamed:
        return
    told = []
    if strangers:
        told.append(f"{len(strangers)} of its {len(named)} tensors are not in the model, e.g. {_some(strangers)}")
    if unnamed:
        told.append(f"{len(unnamed)} tensors of the model are not in it, e.g. {_some(unnamed)}")
    raise DeltaMismatch(
        f"The delta in {place} is of a {manifest.architecture}; this {_architecture(root)} is built otherwise: "
        f"{'; '.join(told)}. Give {_words(manifest)}, with the adapters that it had."
    )


def _check_kinds(place: Path, manifest: _Manifest, root: nn.Module) -> None:
    """Every tensor has the shape and dtype that the delta says."""
    tensors = _every_name(root)
    wrong, fix = [], f"Give {_words(manifest)}, in the same dtype"
    for name, digest in (manifest.saved | manifest.frozen).items():
        told, found = kind_of_digest(digest), tensor_kind(tensors[name])
        if told != found:
            wrong.append(f"{name} ({told}, here {found})")
            if isinstance(root.get_submodule(name.rpartition(".")[0]), nn.Embedding) and _rows_apart(told, found):
                rows = re.findall(r"\d+", told.partition("[")[2])[0]
                fix = f"The vocabulary was resized: call resize_token_embeddings({rows}) on the base before"
    if wrong:
        raise DeltaMismatch(
            f"The delta in {place} does not fit this {_architecture(root)}: {len(wrong)} tensors have another shape or "
            f"dtype, e.g. {_some(wrong)}. {fix}."
        )


def _rows_apart(told: str, found: str) -> bool:
    """Whether two kinds differ in the first size only: "float32 [9, 4]" and "float32 [8, 4]"."""
    return re.sub(r"\[\d+", "[", told) == re.sub(r"\[\d+", "[", found)


def _check_config(place: Path, manifest: _Manifest, root: nn.Module) -> None:
    """The model is of the kind that was trained; warns where it computes otherwise from the same tensors."""
    now: Any = getattr(root, "config", None)
    try:
        told = json.loads(_regular(place / "config.json").read_text(encoding="utf-8"))
        kind, kind_now = told["model_type"], type(now).model_type  # an instance keeps that of the file it was read from
        if kind == kind_now:
            told = json.loads(type(now).from_dict(told).to_json_string())
        wanted, present = _settings(told), _settings(json.loads(now.to_json_string()))
    except Exception:  # there is none, or none that is sound: the tensors fit all the same
        return
    if kind != kind_now:
        raise DeltaMismatch(
            f"The delta in {place} was trained on a model of type {reprlib.repr(kind)}; this {_architecture(root)} is "
            f"of type {kind_now!r}. Give {_words(manifest)}."
        )
    if apart := [name for name in {**wanted, **present} if wanted.get(name) != present.get(name)]:
        shown = [f"{name} was {wanted.get(name)!r}, is {present.get(name)!r}" for name in apart]
        warnings.warn(
            f"The delta in {place} was trained with other settings than this {_architecture(root)} has, which may make "
            f"it compute otherwise: {_some(shown)}. Give base_model= with those of the training.",
            stacklevel=3,
        )


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config tells how a model computes in eval mode, by dotted names."""
    settings: dict[str, Any] = {}
    for name, value in config.items():
        if name in PASSING or name.endswith(("_token_id", "_token_ids")) or "drop" in name:
            continue
        inner = _settings(value) if isinstance(value, dict) else {"": value}
        settings |= {f"{name}.{key}".strip("."): setting for key, setting in inner.items()}
    return settings


def _check_ties(place: Path, manifest: _Manifest, root: nn.Module) -> tuple[str, ...]:
    """The names to untie first; refuses where the delta then still has two values for one tensor of the model, and
    where a saved value would move a tensor that `freeze` froze in this model.
    """
    tensors = _every_name(root)
    shared: dict[int, list[str]] = {}
    for name in (*manifest.saved, *manifest.frozen):
        shared.setdefault(id(tensors[name]), []).append(name)
    tied = [names for names in shared.values() if len(names) > 1]
    to_untie = tuple(name for names in tied for name in names if name in manifest.untied)
    for names in tied:
        if len([name for name in names if name not in to_untie]) > 1:
            raise DeltaMismatch(
                f"The delta in {place} holds {' and '.join(names)} apart; in this {_architecture(root)} they are one "
                "tensor. Give a base in which they are not tied."
            )
    if to_untie and any(hasattr(tensors[name], "full_tensor") for name in to_untie):
        raise DeltaMismatch(
            f"The delta in {place} has {to_untie[0]} untied; this model is sharded already, with the head tied. Load "
            "it before fully_shard."
        )
    record = freeze_record(root)
    if record is not None:
        inner = dict(named_tensors(record[0]))
        held = {id(tensor_by_name(inner, name)) for name in record[1].digests}
        clash = [name for name in manifest.saved if name not in to_untie and id(tensors[name]) in held]
        if clash:
            raise DeltaMismatch(
                f"The delta in {place} holds {len(clash)} tensors that freeze() has frozen in this model, e.g. "
                f"{_some(clash)}. Call thaw(model) first, or freeze it by the delta's own plan."
            )
    return to_untie


def _check_bits(place: Path, manifest: _Manifest, root: nn.Module) -> None:
    """The frozen tensors hold the bits that they held when the delta was trained."""
    tensors, offloaded = _every_name(root), offloaded_tensors(root)
    wrong = []
    for name, digest in manifest.frozen.items():
        bits = bits_of(tensors[name], offloaded)
        if bits is None or tensor_digest(bits) != digest:
            wrong.append(name)
    if wrong:
        raise DeltaMismatch(
            f"The delta in {place} was trained on another base: {len(wrong)} of {len(manifest.frozen)} frozen tensors "
            f"differ, e.g. {_some(wrong)}. Give {_words(manifest)} as it was before training."
        )


def _words(manifest: _Manifest) -> str:
    """The base, as far as the delta knows it."""
    base = f"the base {manifest.base!r}" if manifest.base else "the model that was frozen"
    return f"{base} at revision {manifest.revision}" if manifest.revision else base


def _copy(target: torch.Tensor, value: torch.Tensor) -> None:
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)  # type: ignore[attr-defined]
    target.copy_(value)


def _some(names: list[str], count: int = SHOWN) -> str:
    return ", ".join(names[:count]) + (f", ... and {len(names) - count} more" if len(names) > count else "")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
