"""Every parameter's part: embeddings, block, final norm, head, tower or other; and the ties, by identity."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from hf_freeze.anatomy.structure import block_lists, call_accessor
from hf_freeze.anatomy.value import Part, Stack, Tie

__all__ = ["find_ties", "place_parameters", "towers_of"]


def place_parameters(model: nn.Module, core: nn.Module, stacks: tuple[Stack, ...]) -> dict[str, Part]:
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
    head = call_accessor(core, "get_output_embeddings")
    head_modules = set(head.modules()) if isinstance(head, nn.Module) else set()
    base = getattr(core, "base_model", None)
    base_modules = set(base.modules()) if isinstance(base, nn.Module) else set()
    decoder = (
        call_accessor(core, "get_decoder") if len(stacks) == 2 else None
    )  # it may be a model with a head of its own
    above_decoder = set(decoder.modules()) if isinstance(decoder, nn.Module) else set()
    embedding = call_accessor(core, "get_input_embeddings")
    token_modules = set(embedding.modules()) if isinstance(embedding, nn.Module) else set()
    core_modules = set(core.modules())
    towers = towers_of(core, set(block_of) | set(input_of))
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


def towers_of(core: nn.Module, known: set[nn.Module]) -> set[nn.Module]:
    """The modules of every tower: the largest modules that hold a list of blocks and nothing known of a stack."""
    towers: set[nn.Module] = set()

    def walk(module: nn.Module) -> None:
        below = set(module.modules())
        if module in known or not block_lists(module):
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
        if towers_of(stack.root, known):
            for child in stack.root.children():
                below = set(child.modules())
                if not below & known and any(p.dim() > 1 for p in child.parameters()):
                    found |= below
    return found


def find_ties(model: nn.Module, parts: dict[str, Part]) -> tuple[Tie, ...]:
    """Tensors with several names, by identity: `named_parameters` hides the second name."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return tuple(Tie(tuple(n), tuple(parts[name] for name in n)) for n in names.values() if len(n) > 1)
