"""Reads a model as the forecast walks it: blocks, the calls in each, their matrices, attention, MLP and experts.

Everything is told by shapes and by running the lowest block of each kind on a few tokens, to hear in which order it
calls its layers; a model on the meta device will do. What a pass costs is `forecast`'s business.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_freeze.anatomy import Anatomy, Block, Part, Stack
from hf_freeze.trial import on_trial, seed_all

__all__ = ["Attention", "Flow", "Place", "first_name", "read_flow"]

ACTIVE_EXPERTS = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts", "top_k",
)  # fmt: skip
OWN_TOKENS, SOURCE_TOKENS = 5, 11  # unlike each other and most numbers of heads, so that a shape tells which it holds


class Matrix(NamedTuple):
    """A weight that is multiplied with the tokens.

    `weights`, `into` and `out` are what a token meets: of experts the active share. `adapter` is in + out features
    where LoRA adapts it, else 0.
    """

    name: str
    weights: int
    into: float
    out: float
    adapter: int
    logits: bool = False


@dataclass(frozen=True)
class Call:
    """One layer of a place, in the order in which it is called.

    `after` is the number of calls that its input can depend on; `source` says that it reads the encoder's output;
    calls with equal `reads` read one tensor; `norm` is the width that a norm works on, `written_out` that it does so
    in Python.
    """

    names: tuple[str, ...]
    owner: str
    matrices: tuple[Matrix, ...]
    after: int
    source: bool
    reads: int
    norm: int
    written_out: bool


class Attention(NamedTuple):
    """Calls of one attention, the summed widths of its two products, and its heads where it keeps their scores."""

    calls: tuple[int, ...]
    width: int
    keeping_heads: int


class Mlp(NamedTuple):
    """The call that ends a block's MLP, its input width, and how many tensors of it are kept beside in- and output."""

    down: int
    width: float
    kept: int


@dataclass(frozen=True)
class Place:
    """A block, or what lies before or behind the blocks, as the calls that it makes."""

    part: Part
    tokens: int
    source_tokens: int
    calls: tuple[Call, ...]
    attentions: tuple[Attention, ...] = ()
    mlp: Mlp | None = None


@dataclass(frozen=True)
class Flow:
    """A model as the data goes through it: encoder before decoder, lowest block first, the head last.

    `labelled` is the number of positions that the head learns from and of those that it sees.
    """

    anatomy: Anatomy
    places: tuple[Place, ...]
    tokens: dict[str, int]
    width: dict[str, int]
    labelled: tuple[int, int]
    notes: tuple[str, ...]


def first_name(anatomy: Anatomy, name: str) -> str:
    """The name under which a tied parameter is counted; any other's own."""
    return anatomy.tie_of[name].names[0] if name in anatomy.tie_of else name


def read_flow(anatomy: Anatomy, source_tokens: int, target_tokens: int) -> Flow:
    """Reads off what is called, in which order, and how wide it is."""
    notes: list[str] = []
    names = [stack.name for stack in anatomy.stacks]
    if len(names) == 2:
        tokens = {"encoder": source_tokens, "decoder": target_tokens}
        labelled = (target_tokens, target_tokens)
    elif names == ["decoder"]:
        tokens = {"decoder": source_tokens + target_tokens}
        labelled = (target_tokens, source_tokens + target_tokens)
    else:
        tokens = {"encoder": source_tokens}
        labelled = (source_tokens, source_tokens)
        notes.append("Encoder-only: target tokens are not counted, and the head is counted at every source token.")
    if anatomy.names_of("tower"):
        notes.append("The tower's own forward and backward pass is not counted: its tokens are not text.")
    owners: dict[Part, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, part in anatomy.parts.items():
        owners[part][name.rpartition(".")[0]].append(name)
    modules = dict(anatomy.model.named_modules(remove_duplicate=False))
    places: list[Place] = []
    width: dict[str, int] = {}
    for stack in anatomy.stacks:
        config = _config_of(stack, anatomy)
        width[stack.name] = _stream_width(stack, config)
        tables = any(isinstance(m, nn.Embedding) for piece in stack.blocks[0].modules for m in piece.modules())
        reader = _Reader(anatomy, modules, _read_experts(config), config, width[stack.name], tables, notes)
        in_blocks = {block.index: list(owners[Part("block", stack.name, block.index)]) for block in stack.blocks}
        heard = _listen(stack, in_blocks, modules, width["encoder"] if len(width) == 2 else 0, notes)
        before, after = Part("embeddings", stack.name), Part("final", stack.name)
        size = tokens[stack.name]
        places.append(Place(before, size, 0, tuple(_read_calls(reader, before, owners[before], {}))))
        for block in stack.blocks:
            part = Part("block", stack.name, block.index)
            calls = _read_calls(reader, part, owners[part], heard[block.index])
            places.append(_read_block(reader, block, part, size, source_tokens, calls))
        places.append(Place(after, size, 0, tuple(_read_calls(reader, after, owners[after], {}))))
    if reader.experts.totals and not any(note.startswith("Experts:") for note in notes):
        notes.append("Experts: the config names some, the blocks show none; every weight is counted.")
    for part in (Part("other"), Part("head")):
        calls = _read_calls(reader, part, owners[part], {})
        if part.kind == "head":
            calls = _with_logits(calls)
        places.append(Place(part, tokens[names[-1]], 0, tuple(calls)))
    return Flow(anatomy, tuple(places), tokens, width, labelled, tuple(dict.fromkeys(notes)))


def _with_logits(calls: list[Call]) -> list[Call]:
    """The head's layers, the last matrix marked as the one that makes the logits."""
    for position in reversed(range(len(calls))):
        if calls[position].matrices:
            *before, last = calls[position].matrices
            marked = replace(calls[position], matrices=(*before, last._replace(logits=True)))
            return [*calls[:position], marked, *calls[position + 1 :]]
    return calls


def _config_of(stack: Stack, anatomy: Anatomy) -> Any:
    """The stack's own config (a text model's inside a larger one, an encoder's of its own), else the model's."""
    config = getattr(stack.root, "config", None) or getattr(anatomy.model, "config", None)
    text = getattr(config, "get_text_config", None)
    # Of a config that encoder and decoder share, the text config of one half would be a copy with renamed fields.
    return text() if callable(text) and len(anatomy.stacks) == 1 else config


def _number(config: Any, *names: str) -> int:
    """The first of these fields that is a positive whole number; 0 where none is."""
    values = (getattr(config, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), 0)


def _stream_width(stack: Stack, config: Any) -> int:
    """The width of the stream between blocks: the config's, else the commonest size in the first block's shapes."""
    if width := _number(config, "hidden_size", "d_model"):
        return width
    sizes = Counter(size for piece in stack.blocks[0].modules for p in piece.parameters() for size in p.shape)
    return sizes.most_common(1)[0][0]


class _Experts(NamedTuple):
    """Numbers of experts that the config names, and how many of them a token meets (0: it does not say)."""

    totals: frozenset[int]
    active: int


def _read_experts(config: Any) -> _Experts:
    """Told by the fields of a config and of the configs in it (DBRX has one for its MLP)."""
    configs = [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))] if config else []
    totals = {
        value for one in configs for name, value in vars(one).items()
        if "experts" in name and "shared" not in name and name not in ACTIVE_EXPERTS
        and isinstance(value, int) and value > 1
    }  # fmt: skip
    active = (_number(one, *ACTIVE_EXPERTS) for one in configs)
    return _Experts(frozenset(totals), next((number for number in active if number), 0))


class _Reader(NamedTuple):
    """What reading a place needs to know of the model around it."""

    anatomy: Anatomy
    modules: dict[str, nn.Module]
    experts: _Experts
    config: Any
    width: int
    position_bias: bool
    notes: list[str]


def _read_calls(reader: _Reader, part: Part, owners: dict[str, list[str]], heard: dict[str, _Heard]) -> list[Call]:
    """The layers of a place in the order of their calls; those not heard follow, in the order of registration."""
    from transformers.pytorch_utils import Conv1D  # here, so that `import hf_freeze` is quick

    calls: list[Call] = []
    for position, owner in enumerate([*heard, *(owner for owner in owners if owner not in heard)]):
        module = reader.modules[owner]
        note = heard.get(owner, _Heard(position, False, -position - 1, 0))
        shapes = {n: tuple(reader.anatomy.parameters[first_name(reader.anatomy, n)].shape) for n in owners[owner]}
        tables = isinstance(module, nn.Embedding | nn.EmbeddingBag) or (
            part.kind == "embeddings" and not isinstance(module, nn.Linear | Conv1D)
        )
        matrices = [] if tables else _read_matrices(reader, part, owner, module, shapes)
        leaf = next(module.children(), None) is None
        is_norm = leaf and not matrices and all(len(shape) < 2 for shape in shapes.values())
        calls.append(
            Call(
                names=tuple(owners[owner]),
                owner=owner,
                matrices=tuple(matrices),
                after=note.after,
                source=note.source,
                reads=note.reads,
                norm=(note.width or max(map(math.prod, shapes.values()))) if is_norm else 0,
                written_out=not isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm),
            )
        )
    return calls


def _read_matrices(
    reader: _Reader, part: Part, owner: str, module: nn.Module, shapes: dict[str, tuple[int, ...]]
) -> list[Matrix]:
    """The weights of one layer that are multiplied with the tokens; of experts the share that a token meets."""
    from transformers.pytorch_utils import Conv1D

    stacked = {
        name: shape for name, shape in shapes.items()
        if len(shape) == 3 and shape[0] in reader.experts.totals and not isinstance(module, nn.Conv1d)
    }  # fmt: skip
    total = next(iter(stacked.values()))[0] if stacked else _listed_experts(reader, part, owner)
    share = _active_share(reader, total) if total else Fraction(1)
    found: list[Matrix] = []
    for name, (
        _,
        *ends,
    ) in stacked.items():  # the first maps from the stream, the next ones to it; their biases stand beside them
        inner = math.prod(ends) // reader.width if reader.width in ends else ends[0]
        into, out = (inner, reader.width) if found else (reader.width, inner)
        times = int(share * total)
        found.append(Matrix(name, times * into * out, times * into, times * out, 0))
    if stacked:
        return found
    adaptable = part.kind == "block" and isinstance(module, nn.Linear | Conv1D) and not _is_adapter(owner, reader)
    for name, shape in shapes.items():
        if len(shape) < 2:
            continue
        into = shape[0] if isinstance(module, Conv1D) else shape[1]
        out = math.prod(shape) // into
        weights = math.prod(shape) * share
        found.append(Matrix(name, int(weights), float(into * share), float(out * share), (into + out) * adaptable))
    return found


def _listed_experts(reader: _Reader, part: Part, owner: str) -> int:
    """Of a layer inside a block's list of like modules, as many as the config names experts: how many; else 0."""
    if part.kind != "block" or not reader.experts.totals:
        return 0
    pieces = reader.anatomy.stack(part.stack).blocks[part.index].names
    for name in _ancestors(owner):
        around = reader.modules[name]
        if not _inside(name, pieces) or not isinstance(around, nn.ModuleList | nn.ModuleDict):
            continue
        if len(around) in reader.experts.totals and len({type(child) for child in around.children()}) == 1:
            return len(around)
    return 0


def _active_share(reader: _Reader, total: int) -> Fraction:
    active = reader.experts.active
    if 0 < active <= total:
        reader.notes.append(f"Experts: a token meets {active} of {total}; the FLOPs count these, memory counts all.")
        return Fraction(active, total)
    reader.notes.append(f"Experts: the config does not say how many of {total} a token meets; all are counted.")
    return Fraction(1)


def _ancestors(name: str) -> Iterable[str]:
    """The names of the modules around a module, innermost first."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _is_adapter(owner: str, reader: _Reader) -> bool:
    """Whether a layer belongs to an adapter that PEFT has put beside a `base_layer`."""
    around = (name for name in _ancestors(owner) if hasattr(reader.modules[name], "base_layer"))
    return any(owner != f"{name}.base_layer" for name in around)


def _read_block(reader: _Reader, block: Block, part: Part, tokens: int, source_tokens: int, calls: list[Call]) -> Place:
    """A block with its attentions, told by the class name of a module that holds layers, and its MLP."""
    named = [
        f"{name}.{inner}".rstrip(".")
        for name, piece in zip(block.names, block.modules, strict=True)
        for inner, module in piece.named_modules()
        if "attention" in type(module).__name__.lower()
    ]
    config = reader.config
    if getattr(config, "is_heterogeneous", False):  # Gemma 4: the heads of each layer have a width of their own
        config = config.per_layer_config[block.index]
    heads = _number(config, "num_attention_heads", "num_heads", "n_head", "n_heads")
    width = _number(config, "head_dim", "d_kv") or (reader.width // heads if heads else 0)
    of_scores = _number(config, "qk_head_dim") or width
    of_values = _number(config, "v_head_dim") or width
    eager = getattr(reader.config, "_attn_implementation", None) == "eager"
    attentions: list[Attention] = []
    inside: set[int] = set()
    for name in named:
        if any(other != name and _inside(other, [name]) for other in named):
            continue  # BertAttention around BertSelfAttention
        indices = tuple(i for i, call in enumerate(calls) if _inside(call.owner, [name]))
        if any(calls[i].matrices for i in indices):
            inside.update(indices)
            # A learnt position bias (T5) makes a mask in each block, as large as the scores in a padded batch.
            keeps = eager or (reader.position_bias and not any(calls[i].source for i in indices))
            attentions.append(Attention(indices, heads * (of_scores + of_values), heads * keeps))
    if attentions and not heads:
        reader.notes.append("No number of heads in a config: FLOPs and memory of attention scores are left out.")
        attentions = []
    elif not attentions:
        reader.notes.append(
            "Blocks without attention: their layers are counted; what a state-space scan computes and keeps is not."
        )
    mlp = _read_mlp(block, calls, inside)
    return Place(part, tokens, source_tokens, tuple(calls), tuple(attentions), mlp)


def _inside(name: str, around: Iterable[str]) -> bool:
    """Whether a module is one of those named or lies below one."""
    return any(name == other or name.startswith(f"{other}.") for other in around)


def _read_mlp(block: Block, calls: list[Call], in_attention: set[int]) -> Mlp | None:
    """The MLP of a block: of the layers outside attention those side by side whose last one reads the widest tensor."""
    groups: dict[str, list[tuple[int, Matrix]]] = defaultdict(list)
    for index, call in enumerate(calls):
        if index not in in_attention:
            around = call.owner if len(call.matrices) > 1 else call.owner.rpartition(".")[0]
            groups[around] += [(index, matrix) for matrix in call.matrices]
    found = max(groups.values(), key=lambda group: (len(group) > 1, group[-1][1].into if group else 0), default=[])
    if not found:
        return None
    *before, (down, last) = found
    gated = sum(matrix.out for _, matrix in before) == 2 * last.into  # act(gate) * up keeps both its factors
    return Mlp(down, last.into, int(gated) + _kept_by_activation(block.modules))


def _kept_by_activation(pieces: Iterable[nn.Module]) -> int:
    """Tensors that a block's activation keeps for the backward pass beside its input: 0 for GELU and SiLU, whose own
    kernel recomputes, 3 for GELUs written out in Python, -1 for ReLU, which keeps its output in place of its input.
    """
    counts: list[int] = []
    for module in (m for piece in pieces for m in piece.modules()):
        tensors = [*module.parameters(), *module.buffers()]
        if tensors or next(module.children(), None) is not None or isinstance(module, nn.Dropout | nn.Identity):
            continue
        kept: list[torch.Tensor] = []
        given = torch.ones(8, requires_grad=True, device="cpu")
        with suppress(Exception), torch.enable_grad():  # a leaf that takes anything but a tensor is no activation
            with torch.autograd.graph.saved_tensors_hooks(_keeper(kept), lambda tensor: tensor):
                made = module(given)
            if isinstance(made, torch.Tensor) and made.shape == given.shape and made is not given:
                counts.append(len({t.data_ptr() for t in kept if t.numel() == 8} - {made.data_ptr()}) - 1)
    return max(counts, default=0)


def _keeper(kept: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)  # held, so that no two have one address
        return tensor

    return keep


# ----------------------------------------------------------------------------------------- in which order layers run


class _Heard(NamedTuple):
    """How a layer was called, see `Call`; `width` is the size of what it reads, a token."""

    after: int
    source: bool
    reads: int
    width: int


class _Listener:
    """Hears in which order a block calls its layers, and which of them read one and the same tensor."""

    def __init__(self) -> None:
        self.heard: dict[str, _Heard] = {}
        self.seen: dict[int, tuple[int, torch.Tensor]] = {}  # the tensors are held, so that no two have one id

    def hear(self, key: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook; only a layer's first call counts."""
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        value = next((tensor for tensor in given if tensor.is_floating_point()), None)
        if value is None or key in self.heard:
            return
        after, _ = self.seen.setdefault(id(value), (len(self.heard), value))
        source = SOURCE_TOKENS in value.shape[:-1] and OWN_TOKENS not in value.shape[:-1]
        width = value.numel() // (SOURCE_TOKENS if source else OWN_TOKENS)
        self.heard[key] = _Heard(0 if source else after, source, id(value), width)


class _Enough(Exception):
    """Raised by a hook when a block of every kind has run."""


def _listen(
    stack: Stack, owners: dict[int, list[str]], modules: dict[str, nn.Module], encoder_width: int, notes: list[str]
) -> dict[int, dict[str, _Heard]]:
    """Runs the stack on a few tokens up to its last new kind of block, to hear how each kind calls its layers.

    Args:
        stack: The stack.
        owners: Names of the layers that hold weights, by block. Blocks with equal ones are of one kind.
        modules: Modules by name.
        encoder_width: Width of the encoder's output, for a stack that reads it; else 0.
        notes: Told the reason where the stack cannot be run; then nothing is heard.

    Returns:
        What was heard of each layer, in the order of their calls, by block.
    """
    relative = {i: {_relative(name, stack.blocks[i].names): name for name in names} for i, names in owners.items()}
    kinds: dict[frozenset[str], int] = {}
    for index, layers in relative.items():
        kinds.setdefault(frozenset(layers), index)
    listeners = {index: _Listener() for index in kinds.values()}

    def stop(*_: Any) -> None:
        raise _Enough

    handles = [
        modules[name].register_forward_pre_hook(partial(listener.hear, key), with_kwargs=True)
        for index, listener in listeners.items()
        for key, name in relative[index].items()
    ]
    handles.append(stack.blocks[max(listeners)].modules[-1].register_forward_hook(stop))
    try:
        failure = _run(stack.root, encoder_width)
    finally:
        for handle in handles:
            handle.remove()
    if failure:
        notes.append(
            f"{stack.name}: its blocks could not be run on a few tokens ({failure}); their layers are taken in the "
            "order of registration, and all of them as reading the stack's own tokens."
        )
        return {index: {} for index in relative}
    return {
        index: {layers[key]: note for key, note in listeners[kinds[frozenset(layers)]].heard.items()}
        for index, layers in relative.items()
    }


def _relative(name: str, pieces: tuple[str, ...]) -> str:
    """A layer's name within its block; XLM's blocks have several pieces, hence the piece's place."""
    place = next(i for i, piece in enumerate(pieces) if _inside(name, [piece]))
    return f"{place}{name[len(pieces[place]) :]}"


def _run(root: nn.Module, encoder_width: int) -> str:
    """Calls a stack on a few token ids without a graph; the reason where no block of every kind was reached."""
    first = next(root.parameters())
    parameters = inspect.signature(root.forward).parameters
    given: dict[str, Any] = {
        name: None for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    }
    given["input_ids"] = torch.zeros((1, OWN_TOKENS), dtype=torch.long, device=first.device)
    if "use_cache" in parameters:
        given["use_cache"] = False
    if first.is_meta and "attention_mask" in parameters:
        # A finished mask is taken as it is; to make one, values would be looked at, which meta tensors lack.
        shape = (1, 1, OWN_TOKENS, OWN_TOKENS)
        given["attention_mask"] = torch.ones(shape, dtype=torch.bool, device=first.device)
    if encoder_width:
        given["encoder_hidden_states"] = torch.zeros(
            (1, SOURCE_TOKENS, encoder_width), dtype=first.dtype, device=first.device
        )
    try:
        with torch.no_grad(), on_trial(root, training=None), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for seed in range(8):  # LayerDrop of a model in train mode may skip a block; then another seed
                seed_all(root, seed)
                root(**given)
    except _Enough:
        return ""
    except Exception as error:  # a foreign forward may raise anything; its reason goes into the notes
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    return "its forward ended before"
