"""The key of a cache: everything that a prefix's states depend on but the rows, as digests of plain values.

Weights and buffers by their bytes, modules by class, code, hooks and attributes, the config, the device's kind and the
settings of its arithmetic. What a key cannot see, such as code that a module's code calls, is `spot`'s business: stored
states are compared with fresh ones. Nothing here runs a model.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_freeze.exactness import PASSING
from hf_freeze.files import json_digest
from hf_freeze.marks import is_mark
from hf_freeze.prefix.folder import known_caches
from hf_freeze.prefix.states import Prefix, device_of
from hf_freeze.tensors import tensor_digest

__all__ = ["cache_key", "describe", "folder_of", "nearest_key", "own_hooks"]

# Of a config; what a call may ask for does not change the states either. The keys of stores on disks rest on this list.
UNKEYED = PASSING | {"output_hidden_states", "output_attentions", "return_dict", "_attn_implementation_autoset",
                     "task_specific_params"}  # fmt: skip
# What a module keeps for itself: torch's own fields, modes, notes of loading, what is looked at apart (forward, hooks).
INTERNAL = frozenset(nn.Module().__dict__) | {"training", "gradient_checkpointing", "train", "forward", "config",
                                              "_original_forward", "_is_hf_initialized", "name_or_path",
                                              "_hf_hook", "_old_forward"}  # fmt: skip
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
REQUIRES_GRAD_ONLY = "make_inputs_require_grads"  # what transformers puts on embeddings when checkpointing is on
DEPTH = 5  # of objects within objects; deeper, a class's name stands for the object


def cache_key(model: Any, prefix: Prefix, digests: Mapping[str, str]) -> dict[str, Any]:
    """What a store was computed with, as JSON-ready values.

    Args:
        model: The unwrapped model.
        digests: Of the prefix's tensors.
    """
    import transformers

    streams = [[leaf.name, leaf.kind, list(leaf.dims), str(leaf.dtype)] for kind in ("stream", "table")
               for leaf in prefix.leaves(kind).values()]  # fmt: skip
    inside = prefix.modules()
    settings = [_module(module, private=True) for module in inside]
    settings += [_module(module, private=False) for module in prefix.around]
    classes = {type(module) for module in (*inside, *prefix.around)}
    code = sorted(json.dumps(_class(kind), sort_keys=True) for kind in classes)
    return {
        "weights": _digest(sorted(digests.items())),
        "settings": _digest(settings),
        "code": _digest(code),
        "config": _digest(_config(getattr(model, "config", None))),
        "cuts": [list(cut) for cut in prefix.cuts],
        "precision": prefix.precision,
        "attention": prefix.attention,
        "streams": streams,
        "arithmetic": _arithmetic(device_of(model)),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def folder_of(folder: Path, key: dict[str, Any]) -> Path:
    """Where the store of a key lies in a folder of caches."""
    return folder / _digest(key)[:24]


def nearest_key(folder: Path, key: dict[str, Any]) -> str:
    """What the cache there that is most alike was built for instead."""
    differences = [[name for name in key if key[name] != other.get(name)] for other, _ in known_caches(folder)]
    if not differences:
        return ""
    return f"The nearest one there differs in: {', '.join(sorted(differences, key=len)[0])}. "


def own_hooks(module: nn.Module) -> list[Any]:
    """The forward hooks of a module that may change what it returns: not this package's, nor those of checkpointing."""
    hooks = [hook for name in HOOKS for hook in module.__dict__[name].values()]
    return [hook for hook in hooks if not _changes_nothing(hook)]


def _changes_nothing(hook: Any) -> bool:
    name = str(getattr(hook, "__qualname__", ""))
    return str(getattr(hook, "__module__", "")).startswith("hf_freeze.") or name.endswith(REQUIRES_GRAD_ONLY)


def describe(value: Any, depth: int = DEPTH) -> Any:
    """A value as JSON-ready data that is the same in every process, and another where the value works otherwise.

    Example:
        >>> describe((1, torch.float16)), describe(lambda x: x) == describe(lambda x: x + 1)
        ([1, 'torch.float16'], False)
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, enum.Enum | torch.dtype | bytes | complex | range | slice):
        return str(value)
    if isinstance(value, torch.device):
        return value.type  # its number is another one on each rank
    if isinstance(value, torch.Tensor):
        return "meta" if value.device.type == "meta" else tensor_digest(value)
    if isinstance(value, nn.Module | type):  # a module is looked at by itself
        return _name(value if isinstance(value, type) else type(value))
    if depth == 0:
        return _name(type(value))
    if isinstance(value, Mapping):
        return ["mapping", *sorted(([str(key), describe(item, depth - 1)] for key, item in value.items()), key=str)]
    if isinstance(value, list | tuple):
        return [describe(item, depth - 1) for item in value]
    if isinstance(value, set | frozenset):
        return ["set", *sorted((describe(item, depth - 1) for item in value), key=str)]
    if isinstance(value, functools.partial):
        return ["partial", *(describe(item, depth - 1) for item in (value.func, value.args, value.keywords))]
    if isinstance(value, types.MethodType):
        return ["method", _name(type(value.__self__)), describe(value.__func__, depth - 1)]
    if isinstance(value, types.FunctionType):
        return _function(value, depth)
    if hasattr(value, "__name__"):  # a builtin
        return _name(value)
    if callable(getattr(value, "to_dict", None)):
        return [_name(type(value)), _config(value)]
    return [_name(type(value)), describe(dict(getattr(value, "__dict__", {})), depth - 1)]


def _module(module: nn.Module, *, private: bool) -> list[Any]:
    """What a module is beside its parameters.

    Args:
        private: Whether attributes that begin with "_" count: PEFT keeps its active adapter in one. Not those of a
            whole model, which notes much about its life.
    """
    attributes = {
        name: describe(value)
        for name, value in module.__dict__.items()
        if name not in INTERNAL and not is_mark(name) and _counts(name, value, private)
    }
    own = module.__dict__
    # What accelerate has put its autocast or its hooks around, where it has.
    forward = own.get("_original_forward", own.get("_old_forward", own.get("forward")))
    config = _config(own.get("config"))
    return [_name(type(module)), attributes, describe(forward), [describe(hook) for hook in own_hooks(module)], config]


def _counts(name: str, value: Any, private: bool) -> bool:
    if private:
        return True
    return not name.startswith("_") and (isinstance(value, bool | int | float | torch.Tensor) or callable(value))


def _config(config: Any) -> Any:
    """A config's values that decide what a model computes, its parts' too."""
    values = config.to_dict() if callable(getattr(config, "to_dict", None)) else config
    attention = getattr(config, "_attn_implementation", None)

    def decisive(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): decisive(item) for key, item in value.items() if key not in UNKEYED}
        return [decisive(item) for item in value] if isinstance(value, list | tuple) else describe(value)

    return [decisive(values), str(attention or "")]


def _class(kind: type) -> list[Any]:
    """The code of a class and of those it comes from; torch's own goes by torch's version."""
    code = []
    for base in kind.__mro__:
        if base.__module__.split(".")[0] in ("torch", "builtins"):
            forward = base.__dict__.get("forward")  # but for the one method that people replace
            code.append([_name(base), describe(forward)])
            continue
        methods = {name: item for name, item in vars(base).items() if isinstance(item, types.FunctionType)}
        code.append([_name(base), {name: describe(method) for name, method in sorted(methods.items())}])
    return code


def _function(function: types.FunctionType, depth: int) -> list[Any]:
    cells = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty cell
            cells.append(describe(cell.cell_contents, depth - 1))
    defaults = describe([function.__defaults__, function.__kwdefaults__], depth - 1)
    return [_name(function), _code(function.__code__), cells, defaults]


def _code(code: types.CodeType) -> str:
    """Digest of a function's instructions, whatever lines they stand on."""
    constants = [_code(item) if isinstance(item, types.CodeType) else describe(item) for item in code.co_consts]
    return _digest([code.co_code.hex(), constants, code.co_names, code.co_varnames])


def _arithmetic(device: torch.device) -> list[Any]:
    """The kind of device and the switches that decide how it rounds."""
    backends: Any = torch.backends
    settings: list[Any] = [device.type, _setting(torch.get_float32_matmul_precision)]
    settings.append(str(getattr(backends, "fp32_precision", "")))
    if device.type == "cuda":
        settings.append(str(getattr(backends.cuda.matmul, "fp32_precision", "")))
        settings += [_setting(lambda: backends.cudnn.allow_tf32), backends.cuda.flash_sdp_enabled(),
                     backends.cuda.mem_efficient_sdp_enabled(), backends.cuda.math_sdp_enabled()]  # fmt: skip
    return settings


def _setting(read: Callable[[], Any]) -> Any:
    """A switch by torch's old name, which raises where a user has set it by the new one."""
    try:
        return read()
    except RuntimeError:
        return "by fp32_precision"


def _name(thing: Any) -> str:
    module = getattr(thing, "__module__", None)
    name = str(getattr(thing, "__qualname__", getattr(thing, "__name__", type(thing).__name__)))
    return f"{module}.{name}" if module else name


def _digest(value: Any) -> str:
    return json_digest(value, hashlib.sha256)[:32]
