"""Finds the stacks and their blocks, by Hugging Face's accessors and repeated module lists; never by a name.

Where several module lists could be the blocks, an error lists them and `blocks=` decides. Nothing here changes the
model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from hf_freeze.anatomy.inputs import image_parameter, run_on_sample, with_inputs
from hf_freeze.anatomy.place import find_ties, place_parameters
from hf_freeze.anatomy.structure import ancestors, block_lists, call_accessor, children_of, core_model
from hf_freeze.anatomy.value import Anatomy, Block, BlocksGiven, Stack, StackName
from hf_freeze.errors import AnatomyError, nearest
from hf_freeze.given import check_model
from hf_freeze.tensors import unwrap

__all__ = ["read_anatomy"]


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
    core = core_model(model)
    name_of = {module: name for name, module in model.named_modules()}
    found = _find_stacks(core, name_of) if blocks is None else _given_stacks(model, core, name_of, blocks)
    notes: list[str] = []
    stacks = tuple(with_inputs(stack, model, name_of, notes) for stack in found)
    parts = place_parameters(model, core, stacks)
    return Anatomy(
        model_class=type(core).__name__,
        stacks=stacks,
        parts=parts,
        ties=find_ties(model, parts),
        notes=tuple(notes),
        model=model,
    )


def _find_stacks(core: nn.Module, name_of: dict[nn.Module, str]) -> tuple[Stack, ...]:
    config = getattr(core, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        encoder, decoder = call_accessor(core, "get_encoder"), call_accessor(core, "get_decoder")
        if encoder is not None and decoder is not None and encoder is not decoder and core not in (encoder, decoder):
            return (
                _stack_in("encoder", encoder, encoder, core, name_of),
                _stack_in("decoder", decoder, decoder, core, name_of),
            )
    embedding = call_accessor(core, "get_input_embeddings")
    home: nn.Module = core
    if embedding in name_of:
        for ancestor in ancestors(embedding, name_of):
            if block_lists(ancestor):
                home = ancestor
                break
    stack = _stack_in("decoder", home, core, core, name_of)
    return (Stack(_stack_name(core, stack), stack.path, stack.blocks, stack.root),)


def _stack_in(
    name: StackName, home: nn.Module, scope: nn.Module, core: nn.Module, name_of: dict[nn.Module, str]
) -> Stack:
    """The stack whose blocks stand in `home`, checked against every list of blocks in `scope`."""
    candidates = block_lists(home)
    everything = block_lists(scope)
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
        for index, pieces in enumerate(zip(*map(children_of, candidates), strict=True))
    )
    return Stack(name, name_of[candidates[0]], blocks, _runner(candidates[0], core, name_of))


def _describe(candidate: nn.Module, name_of: dict[nn.Module, str]) -> str:
    kinds = list(dict.fromkeys(type(child).__name__ for child in candidate.children()))
    return f"{name_of[candidate]!r} ({len(children_of(candidate))} x {'/'.join(kinds)})"


def _are_parallel(candidates: list[nn.Module], name_of: dict[nn.Module, str]) -> bool:
    """Whether the lists hold pieces of the same blocks: side by side in one module, equally long, of other classes."""
    parents = {name_of[candidate].rpartition(".")[0] for candidate in candidates}
    lengths = {len(children_of(candidate)) for candidate in candidates}
    classes = [{type(child) for child in candidate.children()} for candidate in candidates]
    unlike = all(not a & b for i, a in enumerate(classes) for b in classes[i + 1 :])
    return len(parents) == 1 and len(lengths) == 1 and unlike


def _with_norm_lists(candidates: list[nn.Module], name_of: dict[nn.Module, str]) -> list[nn.Module]:
    """The parallel lists and those beside them that hold the same blocks' norms, in the order of registration."""
    parent = next(ancestors(candidates[0], name_of))
    length = len(children_of(candidates[0]))
    return [m for m in parent.children() if isinstance(m, nn.ModuleList) and len(m) == length]


def _called_lists(home: nn.Module, candidates: list[nn.Module]) -> list[nn.Module]:
    """The candidates whose blocks are called when `home` runs on a sample; none where it cannot be run."""
    called: list[nn.Module] = []

    def record(module: nn.Module, *_: Any) -> None:
        called.extend(c for c in candidates if module in c.children())

    handles = [child.register_forward_pre_hook(record) for c in candidates for child in c.children()]
    failure = run_on_sample(home, handles)
    return [] if failure else list(dict.fromkeys(called))


def _runner(block_list: nn.Module, core: nn.Module, name_of: dict[nn.Module, str]) -> nn.Module:
    """The module whose forward takes the input (token ids, or what the model names) and runs the blocks.

    The nearest one around the list that can; the whole model where none says so.
    """
    inputs = {"input_ids", getattr(core, "main_input_name", "input_ids")}
    for ancestor in ancestors(block_list, name_of):
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
    generates = bool(call_accessor(core, "can_generate"))
    if generates or any(causal) or getattr(getattr(core, "config", None), "is_decoder", False):
        return "decoder"
    parameters = inspect.signature(core.forward).parameters
    return "encoder" if causal or "attention_mask" in parameters or image_parameter(core) else "decoder"


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
            pieces = children_of(value)
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
