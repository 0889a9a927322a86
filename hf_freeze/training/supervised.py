"""Logits only where there is a label: the head runs over a few summary tokens instead of every token of the review.

Works by the boolean mask that `logits_to_keep` takes and by `shift_labels`, put into the call by hooks; the model's
`forward` is never replaced. Whether a class honours them is tried, not assumed; one that does not is left as it is,
with the reason. The loss is the model's own: none is computed here.
"""

from __future__ import annotations

import inspect
import textwrap
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_freeze.exactness import ROUNDING, grain_of
from hf_freeze.given import check_model
from hf_freeze.inputs import IGNORED_LABEL
from hf_freeze.marks import SUPERVISED, SUPERVISED_HANDLES
from hf_freeze.tensors import unwrap
from hf_freeze.training.top_block import reduce_top_block, whole_top_block
from hf_freeze.trial import on_trial, seed_all

__all__ = [
    "SupervisedLogits",
    "all_logits",
    "can_keep_supervised_logits",
    "rounded_positions",
    "supervised_logits_only",
    "supervised_positions",
]


@dataclass(frozen=True)
class SupervisedLogits:
    """Whether a model now computes logits at the supervised positions only, and why or why not.

    >>> print(SupervisedLogits(False, "XLNetLMHeadModel ignores shift_labels"))
    logits at every position: XLNetLMHeadModel ignores shift_labels
    """

    active: bool
    reason: str

    def __str__(self) -> str:
        return f"logits at {'supervised positions only' if self.active else 'every position'}: {self.reason}"


def supervised_positions(labels: torch.Tensor) -> torch.Tensor:
    """Mask [batch, tokens] of the positions whose logits predict a label: each label's left neighbour.

    >>> supervised_positions(torch.tensor([[-100, -100, 7, 8]])).tolist()
    [[False, True, True, False]]
    """
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORED_LABEL
    return mask


def rounded_positions(labels: torch.Tensor, multiple: int = 32) -> torch.Tensor:
    """`supervised_positions` and a few more, so that their number is a multiple.

    A CPU keeps kernels and scratch memory for every shape that it has seen; positions without a label cost little and
    change no loss, where the loss looks at labels.

    >>> mask = rounded_positions(torch.tensor([[-100, -100, 7, 8, -100]]), multiple=4)
    >>> mask.tolist()
    [[True, True, True, True, False]]
    """
    mask = supervised_positions(labels)
    flat = mask.flatten()
    spare = (~flat).nonzero().squeeze(1)[: int(-flat.sum() % multiple)]
    flat[spare] = True
    return flat.view_as(mask)


def supervised_logits_only(model: nn.Module) -> SupervisedLogits:
    """Lets a decoder-only model compute logits in training only where they predict a label; the loss is the same.

    Acts on calls in training mode with `labels` [batch, tokens] and neither `logits_to_keep` nor `shift_labels`;
    evaluation, generation, a batch without any label and TRL's own fused head run as before. The output of a reduced
    call has `logits=None` (None in its place in a tuple), so that a metric or loss that needs all of them fails
    instead of reading others.

    Before anything changes, the class is tried on three short rows, in eval mode and without a graph: its loss must be
    equal with and without the reduction, also with `num_items_in_batch`. Asking twice installs once.

    The hooks stand on the module given, under DDP, DataParallel and torch.compile wrappers. Give a PeftModel, not the
    model inside: AdaLoRA, and other adapters in old releases of PEFT, call it past its hooks. A model that they wrap
    after this call, or that is taken out of its PeftModel, computes all logits and warns when it trains. Call this
    before the first step of a compiled model, and before FSDP1 or DeepSpeed wrap it.

    Args:
        model: The model that the training loop calls. Its hooks change; its weights, modes and random state do not.

    Returns:
        Whether it is active, and the reason; printable as one line.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, eos_token_id=1)).train()
        >>> print(supervised_logits_only(model))
        logits at supervised positions only: the loss of GPT2LMHeadModel is the same
        >>> ids = torch.tensor([[3, 4, 5, 6]])
        >>> output = model(input_ids=ids, labels=torch.tensor([[-100, -100, 5, 6]]))
        >>> output.loss.dim(), output.logits
        (0, None)
        >>> all_logits(model)
        True
    """
    check_model("supervised_logits_only", model)
    core = unwrap(model)
    if (installed := core.__dict__.get(SUPERVISED)) is not None:
        outcome: SupervisedLogits = installed
        return outcome
    able, why = can_keep_supervised_logits(core)
    objection = _loss_objection(core) if able else why
    if objection:
        return SupervisedLogits(False, objection)
    all_logits(core)  # one set of hooks: those of a model that PEFT has wrapped since would be idle, or never called
    core.__dict__[SUPERVISED_HANDLES] = (
        core.register_forward_pre_hook(_ask_for_supervised, with_kwargs=True),
        core.register_forward_hook(_drop_logits, always_call=True),
    )
    reason = f"the loss of {type(_inner(core)).__name__} is the same"
    if names := reduce_top_block(core):  # after the hook that brings the mask
        reason += f"; of the top block too: {', '.join(names)}"
    core.__dict__[SUPERVISED] = outcome = SupervisedLogits(True, reason)
    head = getattr(core, "get_output_embeddings", lambda: None)()
    if isinstance(head, nn.Module) and SUPERVISED_HANDLES not in head.__dict__:
        head.__dict__[SUPERVISED_HANDLES] = (head.register_forward_pre_hook(_notice_bypass),)
    return outcome


def all_logits(model: nn.Module) -> bool:
    """Undoes `supervised_logits_only` on the model and on all that it wraps; returns whether there was anything to do.

    >>> all_logits(nn.Linear(2, 2))
    False
    """
    check_model("all_logits", model)
    removed = 0
    for module in unwrap(model).modules():
        for handle in module.__dict__.pop(SUPERVISED_HANDLES, ()):
            handle.remove()
            removed += 1
        module.__dict__.pop(SUPERVISED, None)
        whole_top_block(module)
    return removed > 0


def can_keep_supervised_logits(model: nn.Module) -> tuple[bool, str]:
    """Whether a decoder-only model computes the same logits at masked positions as everywhere, and why not if not.

    Runs the model twice on two rows of four tokens, without a graph. Changes nothing.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, eos_token_id=1))
        >>> can_keep_supervised_logits(model)
        (True, 'logits_to_keep takes a mask')
    """
    check_model("can_keep_supervised_logits", model)
    core: Any = unwrap(model)
    if getattr(getattr(core, "config", None), "is_encoder_decoder", False):
        return False, "an encoder-decoder has logits for the summary's tokens only"
    inner = _inner(core)
    name = type(inner).__name__
    if "logits_to_keep" not in inspect.signature(inner.forward).parameters:
        return False, f"{name}.forward takes no logits_to_keep"
    try:
        ids = _token_ids(inner, 2, 4)
        mask = torch.tensor([[False, True, False, True], [True, False, False, False]], device=ids.device)
        with on_trial(core, training=False), torch.no_grad():
            every = _run(core, input_ids=ids).logits[mask]
            kept = _run(core, input_ids=ids, logits_to_keep=mask).logits
    except Exception as error:  # a foreign forward may raise anything: then it is left as it is
        return False, f"{name} does not take a mask as logits_to_keep ({_in_one_line(error)})"
    # Of the logits as a whole: rounding puts a small one off by as much as a large one.
    bar = ROUNDING[grain_of([every, *inner.parameters()])] * every.float().norm()
    if kept.shape != every.shape or not (kept.float() - every.float()).norm() <= bar:
        return False, f"{name} gives other logits with a mask as logits_to_keep"
    return True, "logits_to_keep takes a mask"


# -------------------------------------------------------------------------------------------------------- the trial


def _inner(core: Any) -> nn.Module:
    """The Hugging Face model, out of a PeftModel."""
    inner: nn.Module = core.get_base_model() if hasattr(core, "get_base_model") else core
    return inner


def _loss_objection(core: nn.Module) -> str:
    """Why the reduced loss is not the plain one; "" where the two are equal.

    The labels are what the model itself finds likeliest, so that a loss at other positions is another loss. Rows have
    unlike numbers of them, the last one none but at its first token, which nothing predicts.
    """
    inner = _inner(core)
    name = type(inner).__name__
    try:
        ids = _token_ids(inner, 3, 5)
        labelled = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 0, 0, 1], [1, 0, 0, 0, 0]], device=ids.device).bool()
        with on_trial(core, training=False), torch.no_grad():
            logits = _run(core, input_ids=ids).logits
            labels = torch.cat([ids[:, :1], logits[:, :-1].argmax(-1).to(ids.device)], dim=1)
            labels = labels.masked_fill(~labelled, IGNORED_LABEL)
            for given in ({}, {"num_items_in_batch": torch.tensor(7, device=ids.device)}):
                plain = _run(core, input_ids=ids, labels=labels, **given).loss.item()
                reduced = _run(core, input_ids=ids, labels=labels, **_reduction(labels), **given).loss.item()
                # A product of few rows is rounded otherwise than one of many: by the grain of its dtype, no more.
                grain = max(torch.finfo(t.dtype).eps for t in (logits, *inner.parameters()) if t.is_floating_point())
                bound = 8 * grain * max(logits.amax(-1).abs().max().item(), abs(plain))
                if not abs(plain - reduced) <= bound:  # worded so that a NaN is refused
                    with_items = " with num_items_in_batch" if given else ""
                    return f"{name}'s loss is {plain:.6g}, at supervised positions only {reduced:.6g}{with_items}"
    except Exception as error:  # a foreign forward may raise anything: then it is left as it is
        return f"{name} computes no loss from shift_labels ({_in_one_line(error)})"
    return ""


def _token_ids(inner: Any, rows: int, tokens: int) -> torch.Tensor:
    """Different token ids, none of the first few, which are special in most vocabularies."""
    vocabulary: int = inner.config.get_text_config().vocab_size
    device = next(inner.parameters()).device
    return ((torch.arange(rows * tokens, device=device) + 3) % vocabulary).reshape(rows, tokens)


def _run(core: nn.Module, **inputs: Any) -> Any:
    """One forward pass, seeded: a class may draw random numbers in eval mode too."""
    seed_all(core)
    return core(**inputs)


def _in_one_line(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")


# -------------------------------------------------------------------------------------------------------- the hooks


class _Calls(threading.local):
    """The calls that are under way in this thread, outermost first: the module's id and what becomes of its output.

    Not on the module: the head's hook must see them, and a head that knew its model would be copied with all of it.
    """

    def __init__(self) -> None:
        self.stack: list[tuple[int, str]] = []


_calls = _Calls()


def _reduction(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a call is given so that the head runs only where there is a label."""
    mask = supervised_positions(labels)
    return {"logits_to_keep": mask, "shift_labels": labels[:, 1:][mask[:, :-1]]}


def _ask_for_supervised(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook of the model: adds the mask and its labels to a call in training that has labels."""
    _calls.stack.append((id(module), "as it is"))
    if not module.training:
        return None
    in_order = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) if args else {}
    given = in_order | kwargs
    labels = given.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.dim() != 2:
        return None
    # An argument given without its name cannot be given by name too.
    if "logits_to_keep" in given or given.get("shift_labels") is not None or "return_dict" in in_order:
        return None
    if given.get("fused_lm_head"):  # TRL's head, which scores labelled positions itself and needs every state
        return None
    added: dict[str, Any] = _reduction(labels)
    if not added["shift_labels"].numel():
        return None
    _calls.stack[-1] = (id(module), "without logits")
    if given.get("return_dict") is False:  # made of the named output, whose logits can be told from the rest
        _calls.stack[-1] = (id(module), "without logits, as a tuple")
        added["return_dict"] = True
    return args, {**kwargs, **added}


def _drop_logits(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Hook of the model, called after an exception too: takes the reduced logits out of the output."""
    if not _calls.stack or _calls.stack[-1][0] != id(module):
        return None  # another hook failed before the call had begun
    _, fate = _calls.stack.pop()
    if fate == "as it is" or not isinstance(output, Mapping):
        return None
    if fate == "without logits, as a tuple":
        return tuple(None if name == "logits" else value for name, value in output.items())
    # Made anew: a ModelOutput forgets no key, and setting the attribute to None leaves the item.
    return type(output)(**{name: value for name, value in output.items() if name != "logits"})


def _notice_bypass(head: nn.Module, args: tuple[Any, ...]) -> None:
    """Pre-hook of the head: warns where it runs for training outside of the call that has the other hooks."""
    if torch.is_grad_enabled() and not _calls.stack:
        warnings.warn(
            "supervised_logits_only was called; the head runs outside of that model's own call, past its hooks, and "
            "computes logits at every position. Call supervised_logits_only on the model that the training loop calls "
            "(the PeftModel, or the merged model), or all_logits on it to have it so.",
            stacklevel=1,
        )
