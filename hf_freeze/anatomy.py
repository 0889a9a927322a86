"""Reads the anatomy of a transformer: embeddings, ordered blocks, final norms, head and ties.

Everything is told by structure: Hugging Face's own accessors, repeated module lists and object identity; never by the
name of an architecture. What lies before the first block is told by running the stack on two tokens (on an image,
where it takes one) and stopping at its first block; where that cannot be run, by the order of registration, and the
anatomy says so. Where several module lists could be the blocks, an error lists them and `blocks=` decides. Nothing
here changes the model.
"""

from __future__ import annotations

import inspect
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from hf_freeze.errors import AnatomyError, nearest
from hf_freeze.given import check_model
from hf_freeze.trial import on_trial

__all__ = ["Anatomy", "Block", "Part", "Stack", "Tie", "read_anatomy", "unwrap"]

StackName = Literal["encoder", "decoder"]
BlocksGiven = str | nn.Module | Sequence[nn.Module] | Mapping[str, "str | nn.Module | Sequence[nn.Module]"]


@dataclass(frozen=True, order=True)
class Part:
    """Where a parameter lives: `kind` is "tower", "embeddings", "block", "final", "head" or "other".

    `stack` names the stack for embeddings, blocks and final norms, `index` the block, both empty elsewhere. A tower is
    what feeds the text stack from beside it, such as a vision encoder and its projector.
    """

    kind: str
    stack: str = ""
    index: int = -1

    def __str__(self) -> str:
        return f"{self.stack} block {self.index}" if self.kind == "block" else f"{self.stack} {self.kind}".strip()


@dataclass(frozen=True)
class Block:
    """One block of a stack. XLM keeps a block's pieces in parallel lists, hence several modules for one block."""

    index: int
    names: tuple[str, ...]
    modules: tuple[nn.Module, ...] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Stack:
    """An ordered run of blocks, with the modules that hold them and those that run before them.

    Attributes:
        name: "encoder" or "decoder"; a model with one stack has one of them.
        path: The name of the module list that holds the blocks.
        blocks: The blocks, lowest first.
        root: The module whose forward runs the blocks.
        holders: Names of the modules from `root` down to the list: their own dropout acts on the prefix too.
        inputs: Names of the modules that run before block 0 (token, position, segment embeddings, their norm,
            projections and dropout), the outermost ones only.
        input_parameters: Names of the holders' own parameters that are used before block 0, such as a learnt scale.
    """

    name: StackName
    path: str
    blocks: tuple[Block, ...]
    root: nn.Module = field(repr=False, compare=False)
    holders: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    input_parameters: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.blocks)


@dataclass(frozen=True)
class Tie:
    """One tensor under several names; the first is the name under which `named_parameters` shows it."""

    names: tuple[str, ...]
    parts: tuple[Part, ...]

    @property
    def joins_head(self) -> bool:
        """Whether the head shares its weight with something below it."""
        kinds = {part.kind for part in self.parts}
        return "head" in kinds and len(kinds) > 1


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model and every parameter's place in them. Made by `read_anatomy`; a value, never the model.

    Attributes:
        model_class: Name of the unwrapped model's class.
        stacks: Encoder first. One or two.
        parts: Part of every parameter *name*, second names of ties included.
        ties: Every tensor that has several names.
        notes: How what is not obvious was told.
        model: The unwrapped model that the names refer to.
    """

    model_class: str
    stacks: tuple[Stack, ...]
    parts: dict[str, Part] = field(repr=False)
    ties: tuple[Tie, ...]
    notes: tuple[str, ...]
    model: nn.Module = field(repr=False, compare=False)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter under its first name, in the model's order; a tied tensor once."""
        return dict(self.model.named_parameters())

    @cached_property
    def tie_of(self) -> dict[str, Tie]:
        """The tie of each tied name."""
        return {name: tie for tie in self.ties for name in tie.names}

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Parameter names of all input embeddings and of the towers that feed the stack beside them."""
        return self.names_of("tower", "embeddings")

    @property
    def head(self) -> tuple[str, ...]:
        """Parameter names of the head, the tied name included."""
        return self.names_of("head")

    @property
    def final_norms(self) -> tuple[str, ...]:
        """Parameter names of what runs after the last block inside a stack."""
        return self.names_of("final")

    @property
    def encoder_blocks(self) -> tuple[Block, ...]:
        """The encoder's blocks, lowest first; () without an encoder."""
        return next((stack.blocks for stack in self.stacks if stack.name == "encoder"), ())

    @property
    def decoder_blocks(self) -> tuple[Block, ...]:
        """The decoder's blocks, lowest first; () without a decoder."""
        return next((stack.blocks for stack in self.stacks if stack.name == "decoder"), ())

    def stack(self, name: str) -> Stack:
        """The stack of that name.

        Raises:
            AnatomyError: There is no such stack.
        """
        for stack in self.stacks:
            if stack.name == name:
                return stack
        have = ", ".join(repr(stack.name) for stack in self.stacks)
        raise AnatomyError(f"The stack {name!r} was asked for; {self.model_class} has {have}. Use one of these.")

    def names_of(self, *kinds: str) -> tuple[str, ...]:
        """Names of the parameters in parts of these kinds, second names of ties included."""
        return tuple(name for name, part in self.parts.items() if part.kind in kinds)

    def __str__(self) -> str:
        from hf_freeze.report import anatomy_table

        return str(anatomy_table(self))


def unwrap(model: nn.Module) -> nn.Module:
    """The model under DistributedDataParallel, DataParallel and torch.compile wrappers; a PeftModel stays one.

    >>> inner = nn.Linear(2, 2)
    >>> unwrap(nn.DataParallel(inner)) is inner
    True
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def read_anatomy(model: nn.Module, *, blocks: BlocksGiven | None = None) -> Anatomy:
    """Finds a model's embeddings, ordered blocks, final norms, head and ties, by structure. Changes nothing.

    The stack's embeddings are run on two tokens, or on an image, and stopped at the first block, to see what lies
    before it.

    Args:
        model: A PreTrainedModel, a PeftModel or DDP wrapper around one, or any nn.Module.
        blocks: Only where structure does not tell: the name of the module list, the list, a sequence of modules in
            order, or a dict {"encoder": ..., "decoder": ...} of these. A plain nn.Module with one list of blocks
            needs none.

    Returns:
        The anatomy. Names are those of the model without DDP's prefix.

    Raises:
        AnatomyError: No blocks, or several candidates; the message lists them.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=16))
        >>> anatomy = read_anatomy(model)
        >>> [(stack.name, stack.path, len(stack)) for stack in anatomy.stacks]
        [('decoder', 'transformer.h', 3)]
        >>> anatomy.ties[0].names
        ('transformer.wte.weight', 'lm_head.weight')
    """
    check_model("read_anatomy", model)
    model = unwrap(model)
    core = _core_model(model)
    name_of = {module: name for name, module in model.named_modules()}
    found = _find_stacks(core, name_of) if blocks is None else _given_stacks(model, core, name_of, blocks)
    notes: list[str] = []
    stacks = tuple(_with_inputs(stack, model, name_of, notes) for stack in found)
    parts = _place_parameters(model, core, stacks)
    return Anatomy(
        model_class=type(core).__name__,
        stacks=stacks,
        parts=parts,
        ties=_find_ties(model, parts),
        notes=tuple(notes),
        model=model,
    )


def _core_model(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a PeftModel; any other model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    if callable(get_base_model) and hasattr(model, "peft_config"):
        core = get_base_model()
        if isinstance(core, nn.Module):
            return core
    return model


# ---------------------------------------------------------------------------------------------------------- blocks


def _block_lists(root: nn.Module) -> list[nn.Module]:
    """The outermost module lists below `root` whose elements are blocks: composed modules that hold parameters."""
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) and all(map(_is_block, module)):
            found.append(module)
            return
        for child in module.children():
            walk(child)

    walk(root)
    return list(dict.fromkeys(found))


def _is_block(module: nn.Module) -> bool:
    """A block has parts of its own and at least one matrix; a lone norm, a Linear or an Embedding is no block.

    PEFT wraps a Linear in a module with children, hence `base_layer`.
    """
    if next(module.children(), None) is None or hasattr(module, "base_layer"):
        return False
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _find_stacks(core: nn.Module, name_of: dict[nn.Module, str]) -> tuple[Stack, ...]:
    config = getattr(core, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        encoder, decoder = _call(core, "get_encoder"), _call(core, "get_decoder")
        if encoder is not None and decoder is not None and encoder is not decoder and core not in (encoder, decoder):
            return (
                _stack_in("encoder", encoder, encoder, core, name_of),
                _stack_in("decoder", decoder, decoder, core, name_of),
            )
    embedding = _call(core, "get_input_embeddings")
    home: nn.Module = core
    if embedding in name_of:
        for ancestor in _ancestors(embedding, name_of):
            if _block_lists(ancestor):
                home = ancestor
                break
    stack = _stack_in("decoder", home, core, core, name_of)
    return (Stack(_stack_name(core, stack), stack.path, stack.blocks, stack.root),)


def _call(model: nn.Module, accessor: str) -> Any:
    """What an accessor of Hugging Face's returns, or None where the class has or supports none."""
    method = getattr(model, accessor, None)
    if method is None:
        return None
    try:
        return method()
    except (NotImplementedError, AttributeError, TypeError):
        return None


def _ancestors(module: nn.Module, name_of: dict[nn.Module, str]) -> Iterator[nn.Module]:
    """The modules that contain `module`, innermost first, the model itself last."""
    module_of = {name: candidate for candidate, name in name_of.items()}
    path = name_of[module]
    while path:
        path = path.rpartition(".")[0]
        yield module_of[path]


def _stack_in(
    name: StackName, home: nn.Module, scope: nn.Module, core: nn.Module, name_of: dict[nn.Module, str]
) -> Stack:
    """The stack whose blocks stand in `home`, checked against every list of blocks in `scope`."""
    candidates = _block_lists(home)
    everything = _block_lists(scope)
    if not candidates:
        raise AnatomyError(
            f"The blocks of {type(core).__name__} were asked for; its {name} has no list of composed modules with "
            "parameters. Pass blocks=, the modules in order, for example blocks=model.features."
        )
    if len(everything) > 1 and not _are_parallel(candidates, name_of):
        # A tower beside the text stack is not called when there is nothing but token ids; a second text stack is.
        called = _called_lists(scope, everything)
        if len(called or candidates) != 1:
            listed = "; ".join(_describe(candidate, name_of) for candidate in everything)
            raise AnatomyError(
                f"The blocks of {type(core).__name__} were asked for; several lists could be its {name}: {listed}. "
                f"Pass blocks={name_of[everything[0]]!r} or another of these, "
                'or {"encoder": ..., "decoder": ...} for two stacks.'
            )
        candidates = called or candidates
    if len(candidates) > 1:
        candidates = _with_norm_lists(candidates, name_of)
    blocks = tuple(
        Block(index, tuple(name_of[module] for module in pieces), pieces)
        for index, pieces in enumerate(zip(*map(_children, candidates), strict=True))
    )
    return Stack(name, name_of[candidates[0]], blocks, _runner(candidates[0], core, name_of))


def _children(module: nn.Module) -> list[nn.Module]:
    return list(module.children())


def _describe(candidate: nn.Module, name_of: dict[nn.Module, str]) -> str:
    kinds = list(dict.fromkeys(type(child).__name__ for child in candidate.children()))
    return f"{name_of[candidate]!r} ({len(_children(candidate))} x {'/'.join(kinds)})"


def _are_parallel(candidates: list[nn.Module], name_of: dict[nn.Module, str]) -> bool:
    """Whether the lists hold pieces of the same blocks: side by side in one module, equally long, of other classes."""
    parents = {name_of[candidate].rpartition(".")[0] for candidate in candidates}
    lengths = {len(_children(candidate)) for candidate in candidates}
    classes = [{type(child) for child in candidate.children()} for candidate in candidates]
    unlike = all(not a & b for i, a in enumerate(classes) for b in classes[i + 1 :])
    return len(parents) == 1 and len(lengths) == 1 and unlike


def _with_norm_lists(candidates: list[nn.Module], name_of: dict[nn.Module, str]) -> list[nn.Module]:
    """The parallel lists and those beside them that hold the same blocks' norms, in the order of registration."""
    parent = next(_ancestors(candidates[0], name_of))
    length = len(_children(candidates[0]))
    return [m for m in parent.children() if isinstance(m, nn.ModuleList) and len(m) == length]


def _called_lists(home: nn.Module, candidates: list[nn.Module]) -> list[nn.Module]:
    """The candidates whose blocks are called when `home` runs on a sample; none where it cannot be run."""
    called: list[nn.Module] = []

    def record(module: nn.Module, *_: Any) -> None:
        called.extend(c for c in candidates if module in c.children())

    handles = [child.register_forward_pre_hook(record) for c in candidates for child in c.children()]
    failure = _run_on_sample(home, handles)
    return [] if failure else list(dict.fromkeys(called))


def _runner(block_list: nn.Module, core: nn.Module, name_of: dict[nn.Module, str]) -> nn.Module:
    """The module whose forward takes the input (token ids, or what the model names) and runs the blocks.

    The nearest one around the list that can; the whole model where none says so.
    """
    inputs = {"input_ids", getattr(core, "main_input_name", "input_ids")}
    for ancestor in _ancestors(block_list, name_of):
        if inputs & set(inspect.signature(ancestor.forward).parameters):
            return ancestor
    return core


def _stack_name(core: nn.Module, stack: Stack) -> StackName:
    """A lone stack is a decoder where its attention is causal or its model generates, else an encoder."""
    causal = [
        module.is_causal
        for block in stack.blocks
        for piece in block.modules
        for module in piece.modules()
        if isinstance(getattr(module, "is_causal", None), bool)
    ]
    generates = bool(_call(core, "can_generate"))
    if generates or any(causal) or getattr(getattr(core, "config", None), "is_decoder", False):
        return "decoder"
    parameters = inspect.signature(core.forward).parameters
    return "encoder" if causal or "attention_mask" in parameters or _image_parameter(core) else "decoder"


def _given_stacks(
    model: nn.Module, core: nn.Module, name_of: dict[nn.Module, str], given: BlocksGiven
) -> tuple[Stack, ...]:
    """The stacks that the caller names."""
    if isinstance(given, Mapping):
        if unknown := [name for name in given if name not in ("encoder", "decoder")]:
            raise AnatomyError(f"blocks= names the stack {unknown[0]!r}; a stack is 'encoder' or 'decoder'.")
        named = [(name, given[name]) for name in ("encoder", "decoder") if name in given] or [("", ())]
    else:
        named = [("", given)]
    stacks = []
    for name, value in named:
        if isinstance(value, str):
            modules = dict(model.named_modules())
            if value not in modules:
                raise AnatomyError(
                    f"blocks={value!r} was asked for; {type(core).__name__} has no module of that name. "
                    f"The nearest: {nearest(value, [n for n in modules if n])}."
                )
            value = modules[value]
        if isinstance(value, nn.Module):
            pieces = _children(value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            pieces = list(value)
        else:
            raise AnatomyError(
                f"blocks={value!r} was given; it takes a name, a module, a sequence of modules or a dict "
                'like {"encoder": ..., "decoder": ...} of these.'
            )
        if not pieces:
            raise AnatomyError("blocks= was given without a single block. Pass the modules in order, lowest first.")
        if strangers := [piece for piece in pieces if piece not in name_of]:
            raise AnatomyError(
                f"blocks= holds a {type(strangers[0]).__name__} that is not a module of {type(core).__name__}. "
                "Pass modules of the model itself."
            )
        if isinstance(value, nn.Module) and value in name_of:
            path = name_of[value]
        else:
            path = _common_path(name_of[piece] for piece in pieces)
        blocks = tuple(Block(i, (name_of[piece],), (piece,)) for i, piece in enumerate(pieces))
        home = dict(model.named_modules())[path]
        stack = Stack("decoder", path, blocks, core if home is model else _runner(home, core, name_of))
        resolved: StackName = "encoder" if name == "encoder" else "decoder"
        stacks.append(Stack(resolved if name else _stack_name(core, stack), path, blocks, stack.root))
    return tuple(stacks)


def _common_path(names: Iterable[str]) -> str:
    """The dotted path that all the names start with."""
    split = [name.split(".")[:-1] for name in names]
    common = []
    for pieces in zip(*split, strict=False):
        if len(set(pieces)) > 1:
            break
        common.append(pieces[0])
    return ".".join(common)


# ------------------------------------------------------------------------------------------- what runs before block 0


class _FirstBlock(Exception):
    """Raised by the hook on a block, to stop the probe."""


def _with_inputs(stack: Stack, model: nn.Module, name_of: dict[nn.Module, str], notes: list[str]) -> Stack:
    """The stack with its holders and the modules that run before its first block."""
    in_blocks = {module for block in stack.blocks for piece in block.modules for module in piece.modules()}
    holders = [stack.root] if stack.root is not model or not stack.path else []
    modules = dict(model.named_modules())
    root_name = name_of[stack.root]
    path = stack.path
    while path != root_name and path:
        if modules[path] not in holders and not isinstance(modules[path], nn.ModuleList | nn.Sequential):
            holders.append(modules[path])
        path = path.rpartition(".")[0]
    if stack.root not in holders:
        holders.append(stack.root)
    outside = [m for m in stack.root.modules() if m not in in_blocks and m not in holders]
    bare = {f"{name_of[h]}.{leaf}".strip("."): p for h in holders for leaf, p in h.named_parameters(recurse=False)}
    called, used, failure = _probe(stack, outside)
    if failure:
        notes.append(
            f"{stack.name}: its embeddings could not be run on {_sample_words(stack.root)} ({failure}); "
            "what lies before the first block was told by the order of registration."
        )
        called, used = called | _registered_before(stack, outside), set(bare.values())
    towers = _towers(stack.root, in_blocks)
    called |= {
        _outermost(module, {*in_blocks, *holders}, name_of)
        for module in outside
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module not in towers and module not in called
    }
    for module in [m for m in called if _contains_block(m, in_blocks)]:
        called.discard(module)
    covered = {child for module in called for child in list(module.modules())[1:]}
    inputs = tuple(sorted(name_of[module] for module in called - covered if module in name_of))
    return replace(
        stack,
        holders=tuple(name_of[holder] for holder in holders),
        inputs=inputs,
        input_parameters=tuple(name for name, parameter in bare.items() if parameter in used),
    )


def _outermost(module: nn.Module, bounds: set[nn.Module], name_of: dict[nn.Module, str]) -> nn.Module:
    """The largest module around this one that holds none of the bounds: LUKE's entity embeddings with their norm."""
    for ancestor in _ancestors(module, name_of):
        if bounds & set(ancestor.modules()):
            break
        module = ancestor
    return module


def _contains_block(module: nn.Module, in_blocks: set[nn.Module]) -> bool:
    return any(child in in_blocks for child in module.modules())


class _ParametersUsed(TorchFunctionMode):
    """Records the parameters that torch functions get. Looking at one (`weight.dtype`) is no use of it."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[nn.Parameter] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "__get__":
            for value in (*args, *kwargs.values()):
                values = value if isinstance(value, list | tuple) else (value,)
                self.used.update(v for v in values if isinstance(v, nn.Parameter))
        return func(*args, **kwargs)


def _probe(stack: Stack, outside: list[nn.Module]) -> tuple[set[nn.Module], set[nn.Parameter], str]:
    """Runs the stack on two tokens, or on an image, up to its first block.

    Returns:
        The modules called and the parameters used until then, and why it cannot be run where it cannot.
    """
    called: set[nn.Module] = set()

    def stop(*_: Any) -> None:
        raise _FirstBlock

    def record(module: nn.Module, *_: Any) -> None:
        called.add(module)

    handles = [module.register_forward_pre_hook(record) for module in outside]
    handles += [
        piece.register_forward_pre_hook(stop, prepend=True) for block in stack.blocks for piece in block.modules
    ]
    with _ParametersUsed() as parameters:
        failure = _run_on_sample(stack.root, handles)
    if isinstance(failure, _FirstBlock):
        return called, parameters.used, ""
    if failure is None:
        return set(), set(), "its forward ended without calling a block"
    return called, set(), f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:120]}"


def _image_parameter(module: nn.Module) -> str:
    """Under which name a module's forward takes images; "" where it takes something else, or text with them.

    `pixel_values`; in a model from elsewhere the first name, where the first layer with parameters is a convolution.
    """
    parameters = inspect.signature(module.forward).parameters
    if "input_ids" in parameters:
        return ""
    if "pixel_values" in parameters:
        return "pixel_values"
    first = next((m for m in module.modules() if next(m.parameters(recurse=False), None) is not None), None)
    return next(iter(parameters), "") if isinstance(first, nn.Conv2d) else ""


def _sample_words(module: nn.Module) -> str:
    return "an image" if _image_parameter(module) else "two tokens"


def _image(module: nn.Module) -> torch.Tensor:
    """A black image [1, channels, height, width] of the size that the config says, or as the first convolution asks."""
    config = getattr(module, "config", None)
    first = next((m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d)), 3)
    channels, size = getattr(config, "num_channels", first), getattr(config, "image_size", 224)
    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    height_width = tuple(size) if isinstance(size, list | tuple) else (size, size)
    return weight.new_zeros((1, channels, *height_width))


def _run_on_sample(module: nn.Module, handles: list[RemovableHandle]) -> Exception | None:
    """Calls a module on two token ids, or on an image where it takes one, without a graph, then removes the hooks;
    returns what it raised.
    """
    parameters = inspect.signature(module.forward).parameters
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    given: dict[str, Any] = {
        name: None for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    }
    if image := _image_parameter(module):
        given |= {image: _image(module)}
    else:
        given |= {"input_ids": torch.zeros((1, 2), dtype=torch.long, device=device)}
    if "use_cache" in parameters:
        given["use_cache"] = False  # hybrid caches look for attention blocks that a small model may lack
    attempts = [given]
    if "encoder_hidden_states" in parameters and (width := _width(module)):
        attempts.append(given | {"encoder_hidden_states": torch.zeros((1, 2, width), device=device)})
    if device.type == "meta":  # a ready mask, where nobody can look at the values of one
        mask = torch.zeros((1, 1, 2, 2), device=device)
        attempts += [arguments | {"attention_mask": mask} for arguments in attempts]
    failure: Exception | None = None
    try:
        for arguments in attempts:
            try:
                with torch.no_grad(), on_trial(module, training=None), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    module(**arguments)
                return None
            except _FirstBlock as reached:
                return reached
            except Exception as error:  # a foreign forward may raise anything; its reason goes into the notes
                failure = failure or error
    finally:
        for handle in handles:
            handle.remove()
    return failure


def _width(module: nn.Module) -> int:
    config = getattr(module, "config", None)
    width = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
    return width if isinstance(width, int) else 0


def _registered_before(stack: Stack, outside: list[nn.Module]) -> set[nn.Module]:
    """Modules registered before the first block, and those called an embedding wherever they stand."""
    first = stack.blocks[0].modules[0]
    before: set[nn.Module] = set()
    names = {module: name for name, module in stack.root.named_modules()}
    reached = False
    for module in stack.root.modules():
        reached = reached or module is first
        if module in outside and (not reached or "emb" in names[module].rpartition(".")[2].lower()):
            before.add(module)
    return before


# ------------------------------------------------------------------------------------------------------ parameters


def _place_parameters(model: nn.Module, core: nn.Module, stacks: tuple[Stack, ...]) -> dict[str, Part]:
    """The part of every parameter name, second names of ties included."""
    block_of = {
        module: Part("block", stack.name, block.index)
        for stack in stacks
        for block in stack.blocks
        for piece in block.modules
        for module in piece.modules()
    }
    modules = dict(model.named_modules(remove_duplicate=False))  # PEFT's soft prompts hold the embeddings once more
    input_of = {
        module: Part("embeddings", stack.name)
        for stack in stacks
        for name in stack.inputs
        for module in modules[name].modules()
    }
    inside_of = {module: stack for stack in stacks for module in stack.root.modules()}
    head = _call(core, "get_output_embeddings")
    head_modules = set(head.modules()) if isinstance(head, nn.Module) else set()
    base = getattr(core, "base_model", None)
    base_modules = set(base.modules()) if isinstance(base, nn.Module) else set()
    decoder = _call(core, "get_decoder") if len(stacks) == 2 else None  # it may be a model with a head of its own
    above_decoder = set(decoder.modules()) if isinstance(decoder, nn.Module) else set()
    embedding = _call(core, "get_input_embeddings")
    token_modules = set(embedding.modules()) if isinstance(embedding, nn.Module) else set()
    core_modules = set(core.modules())
    towers = _towers(core, set(block_of) | set(input_of))
    if base_modules:  # else nothing tells a head from them
        towers |= _projectors(stacks, set(block_of) | set(input_of))
    token_weights = {m.weight for m in (*input_of, *token_modules) if isinstance(m, nn.Embedding)}
    bare = {name: Part("embeddings", stack.name) for stack in stacks for name in stack.input_parameters}

    def place(name: str) -> Part:
        if name in bare:
            return bare[name]
        module = modules[name.rpartition(".")[0]]
        if module in block_of:
            return block_of[module]
        if module in input_of:
            return input_of[module]
        if module in head_modules or (isinstance(module, nn.Linear) and module.weight in token_weights):
            return Part("head")  # a projection by the token embeddings is one, whatever the accessor says
        if module in token_modules:
            return Part("embeddings", stacks[-1].name if len(stacks) == 1 else "")
        if isinstance(module, nn.Embedding) and module not in towers:
            return Part("embeddings", inside_of[module].name if module in inside_of else "")
        if module not in core_modules:
            return Part("embeddings")  # a PEFT prompt encoder: it stands beside the model and feeds its input
        if module in towers:
            return Part("tower")
        if module in inside_of:  # without a base model nothing but a matrix tells a head from a norm
            is_head = not base_modules and any(p.dim() > 1 for p in module.parameters())
            return Part("head") if is_head else Part("final", inside_of[module].name)
        if module in above_decoder:
            return Part("head")
        if module not in base_modules:
            return Part("head" if base_modules else "other")
        return Part("other" if module is base else "tower")

    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {name: place(name) for name in names}


def _towers(core: nn.Module, known: set[nn.Module]) -> set[nn.Module]:
    """The modules of every tower: the largest modules that hold a list of blocks and nothing known of a stack."""
    towers: set[nn.Module] = set()

    def walk(module: nn.Module) -> None:
        below = set(module.modules())
        if module in known or not _block_lists(module):
            return
        if not below & known:
            towers.update(below)
            return
        for child in module.children():
            walk(child)

    walk(core)
    return towers


def _projectors(stacks: tuple[Stack, ...], known: set[nn.Module]) -> set[nn.Module]:
    """The modules that carry a tower's output into a stack whose root holds the tower: they run on no text.

    What runs after the last block there is told from them by its parameters: a norm has no matrix.
    """
    found: set[nn.Module] = set()
    for stack in stacks:
        if _towers(stack.root, known):
            for child in stack.root.children():
                below = set(child.modules())
                if not below & known and any(p.dim() > 1 for p in child.parameters()):
                    found |= below
    return found


def _find_ties(model: nn.Module, parts: dict[str, Part]) -> tuple[Tie, ...]:
    """Tensors with several names, by identity: `named_parameters` hides the second name."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return tuple(Tie(tuple(n), tuple(parts[name] for name in n)) for n in names.values() if len(n) > 1)
