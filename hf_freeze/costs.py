"""What a step of one row costs, counted by running a copy of the model on the meta device, forward and backward.

FLOPs are by torch's own formulas, bytes those of the tensors that autograd keeps. The copy holds no
values, and the model is left alone. What trains in which mode is `forecast`'s business; here it is a set of names.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from hf_freeze.anatomy import Anatomy, Part, config_width, core_model, image_parameter, sample_inputs
from hf_freeze.marks import is_mark
from hf_freeze.trial import on_trial, take_off_autocast

__all__ = ["Costs", "EmptyCopy"]

NORMS = (F.layer_norm, F.group_norm, F.rms_norm)  # what autocast computes in fp32
MOST_CALLS = 20_000  # a scan written as a loop over tokens takes more; a block of ordinary layers about 60
BESIDE = Part("other")


@dataclass
class Costs:
    """Of one row, by part of the model: FLOPs of both passes, bytes kept between them; and of the whole run the bytes
    of its logits in fp32 and the numbers that cross from block to block, by stack.
    """

    forward: Counter[Part] = field(default_factory=Counter)
    backward: Counter[Part] = field(default_factory=Counter)
    kept: Counter[Part] = field(default_factory=Counter)
    logit_bytes: int = 0
    states: dict[str, int] = field(default_factory=dict)


class EmptyCopy:
    """A copy of a model without values, whose passes are counted.

    Args:
        anatomy: Of the model.
        tokens: Of one row, by stack.
        dtype: Of its activations. Norms are computed in fp32, as autocast does.
    """

    def __init__(self, anatomy: Anatomy, tokens: dict[str, int], dtype: torch.dtype) -> None:
        self.anatomy, self.tokens, self.dtype = anatomy, tokens, dtype
        self.failure = ""
        self._runs_all = False
        self._counted: dict[Any, Costs] = {}
        self._known: dict[Any, tuple[int, int, int]] = {}  # what a block of a kind costs
        self._model = _copy_empty(anatomy.model, dtype)
        self._modules = dict(self._model.named_modules(remove_duplicate=False))
        self.adaptable = {name: module for name, module in self._modules.items() if self._is_adaptable(name, module)}

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the counts is not as a training would have it."""
        notes: list[str] = []
        if any(_runs_experts(module) for module in self._modules.values()):
            notes.append("Experts: the FLOPs count those that a token meets, memory counts all.")
        if any(not _attends(block) for stack in self.anatomy.stacks for block in stack.blocks):
            notes.append(
                "Blocks without attention: of a state-space scan, the matrix products are counted, and what it keeps "
                "without a fused kernel."
            )
        if self.failure:
            notes.append(
                f"The model could not be run on the meta device ({self.failure}): every matrix is counted once for "
                "each token, all experts too; attention scores are left out."
            )
        return tuple(notes)

    def count(self, trains: set[str], *, untied: tuple[str, ...] = (), rank: int = 0) -> Costs:
        """What a step costs while the tensors of these names train.

        Args:
            trains: Names of parameters, second names of ties included.
            untied: Those of them that have a tensor of their own although the model ties them.
            rank: Of adapters beside every linear layer of the blocks; 0 is without.
        """
        asked = frozenset(trains), untied, rank
        if asked not in self._counted:
            self._counted[asked] = self._count(trains, untied, rank)
        return self._counted[asked]

    def _count(self, trains: set[str], untied: tuple[str, ...], rank: int) -> Costs:
        with self._set_up(trains, untied):
            while not self.failure:
                try:
                    return self._run(rank)
                except Exception as error:  # a foreign forward may raise anything; its reason goes into the notes
                    if self._runs_all:
                        self._counted.clear()  # what was run before is not to be set beside what is not
                        self.failure = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
                    self._runs_all = True  # a block may need what one that was not run would have made
                finally:
                    self._model.zero_grad()
            return self._count_shapes(trains, rank)

    def _is_adaptable(self, name: str, module: nn.Module) -> bool:
        """Whether PEFT puts an adapter beside a layer: a linear one of a block that is none of an adapter itself."""
        from transformers.pytorch_utils import Conv1D  # here, so that `import hf_freeze` is quick

        part = self.anatomy.parts.get(f"{name}.weight")
        if part is None or part.kind != "block" or not isinstance(module, nn.Linear | Conv1D):
            return False
        around = name
        while around := around.rpartition(".")[0]:
            if hasattr(self._modules[around], "base_layer") and name != f"{around}.base_layer":
                return False
        return True

    @contextmanager
    def _set_up(self, trains: set[str], untied: tuple[str, ...]) -> Iterator[None]:
        """What trains requires a gradient, and what is untied is a tensor of its own."""
        tied = {name: self._model.get_parameter(name) for name in untied}
        for name, parameter in tied.items():
            self._put(name, nn.Parameter(torch.empty_like(parameter)))
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            if name in trains:
                parameter.requires_grad_(True)
        try:
            yield
        finally:
            for name, parameter in tied.items():
                self._put(name, parameter)

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        self._modules[owner]._parameters[leaf] = parameter

    def _run(self, rank: int) -> Costs:
        """One step on a row of zeros. Blocks whose costs are known are not run; they hand on what the last one made."""
        watch = _Watch(self._model, self.dtype)
        kinds, to_run = self._kinds(rank)
        made: list[Any] = [None]  # what the last block returned
        handles: list[Any] = []

        def note_states(stack: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                made[0] = output
                watch.costs.states[stack] = _first_floating(output).numel()

            return hook

        skipped = [self._modules[name] for name, part in self._places().items() if part in kinds.keys() - to_run]
        for module in skipped:
            module.forward = lambda *_, **__: made[0]
        for name, part in self._places().items():
            module = self._modules[name]
            if module not in skipped:
                handles += watch.follow(module, part)
                if part.kind == "block":
                    handles.append(module.register_forward_hook(note_states(part.stack)))
        if rank:
            handles += [_adapt(layer, rank, watch.own) for layer in self.adaptable.values()]
        core = core_model(self._model)
        if image_parameter(core):
            first = self.anatomy.stacks[0]
            stretch = _stretch_to(self.tokens[first.name])
            handles.append(self._modules[first.blocks[0].names[0]].register_forward_pre_hook(stretch, prepend=True))
        try:
            with warnings.catch_warnings(), on_trial(self._model, training=False), watch.flops, watch:
                warnings.simplefilter("ignore")
                with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(watch.keep, lambda kept: kept):
                    loss = self._loss(core(**self._inputs(core)), watch)
                watch.turn_back()
                if loss.requires_grad:
                    torch.autograd.backward(loss)
                watch.enter(BESIDE)
        finally:
            for handle in handles:
                handle.remove()
            for module in skipped:
                del module.forward
        costs = watch.costs
        for part in to_run & kinds.keys():
            self._known[kinds[part]] = costs.forward[part], costs.backward[part], costs.kept[part]
        for part in kinds.keys() - to_run:
            costs.forward[part], costs.backward[part], costs.kept[part] = self._known[kinds[part]]
        return costs

    def _inputs(self, core: nn.Module) -> dict[str, Any]:
        first, *rest = self.anatomy.stacks
        given = sample_inputs(core, self.tokens[first.name])
        if rest:
            ids = torch.zeros((1, self.tokens["decoder"]), dtype=torch.long, device="meta")
            given["decoder_input_ids"] = ids
        return given

    def _loss(self, output: Any, watch: _Watch) -> torch.Tensor:
        """Cross-entropy of the logits in fp32, as transformers' own losses take it; without logits any number."""
        has_head = bool(self.anatomy.head)
        logits = getattr(output, "logits", output if has_head and isinstance(output, torch.Tensor) else None)
        if not isinstance(logits, torch.Tensor) or logits.dim() < 2:
            return _first_floating(output).float().mean()
        watch.enter(Part("head"))
        watch.costs.logit_bytes = 4 * logits.numel()
        flat = logits.flatten(0, -2).float()
        return F.cross_entropy(flat, torch.zeros(len(flat), dtype=torch.long, device="meta"))

    def _places(self) -> dict[str, Part]:
        """The modules whose passes are told apart: blocks, and outside of them the layers that hold parameters."""
        blocks = {
            name: Part("block", stack.name, block.index)
            for stack in self.anatomy.stacks for block in stack.blocks for name in block.names
        }  # fmt: skip
        layers = {n.rpartition(".")[0]: part for n, part in self.anatomy.parts.items() if part.kind != "block"}
        return layers | blocks

    def _kinds(self, rank: int) -> tuple[dict[Part, Any], set[Part]]:
        """The kind of each block, of which all cost the same, and the blocks to run.

        A kind is a structure, what of it trains, and whether a gradient has to reach its input or the encoder's output.
        Run are the first block of an unknown kind, the lowest of a stack, which the others may need, and the lowest
        that trains.
        """
        kinds: dict[Part, Any] = {}
        to_run: set[Part] = set()
        source = False
        for stack in self.anatomy.stacks:
            reached = any(
                self._model.get_parameter(name).requires_grad for name, part in self.anatomy.parts.items()
                if part.kind in ("embeddings", "tower") and part.stack in ("", stack.name)
            )  # fmt: skip
            for block in stack.blocks:
                if self._runs_all or len(block.names) > 1:  # pieces in parallel lists are run as they come
                    continue
                part, module = Part("block", stack.name, block.index), self._modules[block.names[0]]
                weights = [(n, p.shape, p.requires_grad) for n, p in module.named_parameters(remove_duplicate=False)]
                classes = [(name, type(inner)) for name, inner in module.named_modules()]
                kind = stack.name, rank, reached, source, tuple(weights), tuple(classes)
                trains = bool(rank) or any(moves for _, _, moves in weights)
                if block.index == 0 or (trains and not reached) or kind not in {*self._known, *kinds.values()}:
                    to_run.add(part)
                kinds[part] = kind
                reached |= trains or source
            source = reached
        return kinds, to_run

    def _count_shapes(self, trains: set[str], rank: int) -> Costs:
        """Without running: a matrix takes 2 FLOPs a weight and token in each product, a layer keeps what it reads
        where it trains and what it writes where anything at or below it does.
        """
        costs = Costs()
        width = torch.empty((), dtype=self.dtype).element_size()
        for stack in self.anatomy.stacks:
            sizes = Counter(size for p in stack.blocks[0].modules[0].parameters() for size in p.shape)
            costs.states[stack.name] = self.tokens[stack.name] * (
                config_width(stack.root) or sizes.most_common(1)[0][0]
            )
        needs = False
        for name, part in sorted(self.anatomy.parts.items(), key=lambda item: item[1].kind in ("head", "other")):
            owner, weight = self._modules[name.rpartition(".")[0]], self._model.get_parameter(name)
            adapted = bool(rank) and name.removesuffix(".weight") in self.adaptable
            if weight.dim() > 1 and not isinstance(owner, nn.Embedding | nn.EmbeddingBag) and part.kind != "tower":
                tokens = self.tokens.get(part.stack, self.tokens[self.anatomy.stacks[-1].name])
                into = weight.shape[-1]
                out = weight.numel() // into
                product, thin = 2 * tokens * weight.numel(), 2 * tokens * rank * (into + out) * adapted
                costs.forward[part] += product + thin
                costs.backward[part] += product * (needs + (name in trains)) + 2 * thin
                if part.kind == "head":
                    costs.logit_bytes = 4 * tokens * out
                reads, writes = name in trains or adapted, needs or name in trains or adapted
                costs.kept[part] += width * tokens * (into * reads + out * writes + rank * adapted)
            needs |= name in trains or adapted
        return costs


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types there
    """Adds up what torch's own formulas say of each operation."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


class _Watch(TorchFunctionMode):
    """Counts what runs in it, for the part of the model that is at work."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.costs = Costs()
        self.own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self._dtype = dtype
        self._side = self.costs.forward
        self._part, self._around = BESIDE, [BESIDE]
        self._seen: dict[int, torch.Tensor] = {}  # the tensors are held, so that no two have one storage
        self._shared: dict[int, torch.Tensor] = {}  # what blocks are given beside their states, and keep once for all
        self.flops = _Flops()  # type: ignore[no-untyped-call]
        self._counted, self._calls = 0, 0
        self._keeps = True

    def enter(self, part: Part) -> None:
        """What was counted since the last call was the last part's; what follows is this one's."""
        total = self.flops.total
        self._side[self._part] += total - self._counted
        self._part, self._counted = part, total

    def turn_back(self) -> None:
        """From here on the backward pass is counted."""
        self.enter(BESIDE)
        self._side = self.costs.backward

    def follow(self, module: nn.Module, part: Part) -> list[Any]:
        """Hooks that enter a part when its module runs, and when the gradient of its output is there."""

        def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._around.append(self._part)
            self.enter(part)
            if part.kind == "block":
                given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
                self._shared.update((tensor.untyped_storage()._cdata, tensor) for tensor in given[1:])

        def end(_: nn.Module, args: Any, output: Any) -> None:
            states = _first_floating(output)
            if states.requires_grad:
                states.register_hook(lambda gradient: self.enter(part))  # type: ignore[no-untyped-call]
            self.enter(self._around.pop())

        return [module.register_forward_pre_hook(begin, with_kwargs=True), module.register_forward_hook(end)]

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """What autograd does with a tensor that it keeps; one storage counts once, weights and buffers not at all."""
        storage = tensor.untyped_storage()
        if self._keeps and storage._cdata not in self.own and storage._cdata not in self._seen:
            self._seen[storage._cdata] = tensor
            self.costs.kept[BESIDE if storage._cdata in self._shared else self._part] += storage.nbytes()
        return tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._calls += 1
        if self._calls > MOST_CALLS:
            raise RuntimeError(f"more than {MOST_CALLS:,} calls of torch, as a loop over tokens makes")
        if func in (torch.Tensor.__bool__, torch.Tensor.__contains__):
            return func is torch.Tensor.__bool__  # asked of values that are not there: all places are attended
        if func is F.scaled_dot_product_attention and self._keeps:
            self._keeps = False  # a kernel keeps no scores; what runs on the meta device is its reference
            attended = func(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)  # laid out as a kernel does
            self._keeps = True
            if attended.requires_grad:
                for tensor in (*args[:3], attended):
                    self.keep(tensor)
            return attended
        if func in NORMS and self._dtype != torch.float32:
            args, kwargs = tree_map(_in_fp32, (args, kwargs))
            return func(*args, **kwargs).to(self._dtype)
        result = func(*args, **kwargs)
        if func is torch.Tensor.__getitem__ and isinstance(args[0], nn.Parameter) and args[0].dim() == 3:
            self._seen[result.untyped_storage()._cdata] = result  # experts' weights, one copy a token: no activation
        return result


def _copy_empty(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy on the meta device, in evaluation, without hooks and without what we or accelerate put on a model."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in module.__dict__.items():
            if is_mark(name):
                memo[id(value)] = value
            elif name.endswith("_hooks"):
                memo.update((id(hook), hook) for hook in value.values())
        for tensor in (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()):
            if isinstance(tensor, torch.Tensor):
                kind = dtype if tensor.is_floating_point() else tensor.dtype
                empty = torch.empty(tensor.shape, dtype=kind, device="meta")
                is_weight = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_weight else empty
    empty_model = copy.deepcopy(model, memo)
    for module in empty_model.modules():
        for name, value in module.__dict__.items():
            if name.endswith("_hooks"):
                value.clear()
        if module.__dict__.pop("_hf_hook", None) is not None and "_old_forward" in module.__dict__:
            module.forward = module.__dict__.pop("_old_forward")
        if _runs_experts(module):
            config: Any = module.config
            config._experts_implementation = "batched_mm"  # the one that asks for no values
    take_off_autocast(empty_model)
    return empty_model


def _runs_experts(module: nn.Module) -> bool:
    """Whether a module runs experts by one of transformers' implementations."""
    stacked = any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    return stacked and bool(getattr(getattr(module, "config", None), "_experts_implementation", None))


def _attends(block: Any) -> bool:
    return any("attention" in type(m).__name__.lower() for piece in block.modules for m in piece.modules())


def _adapt(layer: nn.Module, rank: int, own: set[int]) -> Any:
    """Two thin matrices beside a linear layer, as PEFT puts them."""
    weight: Any = layer.weight
    into, out = weight.shape if type(layer).__name__ == "Conv1D" else weight.shape[::-1]
    thin = [weight.new_empty(shape).requires_grad_() for shape in ((into, rank), (rank, out))]
    own.update(matrix.untyped_storage()._cdata for matrix in thin)
    return layer.register_forward_hook(lambda _, args, output: output + args[0] @ thin[0] @ thin[1])


def _stretch_to(tokens: int) -> Callable[..., Any]:
    """A hook that hands a block as many tokens as are asked for, whatever the size of the image."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if args and args[0].dim() == 3:
            return (args[0][:, :1].expand(-1, tokens, -1), *args[1:])
        return args

    return hook


def _first_floating(output: Any) -> torch.Tensor:
    """The states in what a module returns."""
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())


def _in_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
