"""The logit lens: what each layer would predict if it were the last.

The model's own head is run on the states of each layer; no part of it is built again here.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from hf_freeze.anatomy import Anatomy, BlocksGiven, read_anatomy
from hf_freeze.errors import FreezeError
from hf_freeze.lens.results import Numbers, Rows, layer_name, six_digits
from hf_freeze.lens.states import Kept, call, looking, record, without_labels
from hf_freeze.lens.texts import ids_read_by, real_tokens, text_batches, token_texts
from hf_freeze.prefix.states import map_tree
from hf_freeze.tables import Table

__all__ = ["LogitLens", "logit_lens"]

SAME_LOGITS = 1e-2  # of the largest logit: the grain of bf16; blocks that are bypassed move logits by far more


@dataclass(frozen=True)
class LogitLens(Numbers):
    """What each layer would predict if it were the last.

    Attributes:
        stack: The stack that is looked at: the decoder, or the only one.
        agreement: By layer, the share of tokens at which its first choice is the model's.
        settled: By layer, the share at which its first choice and that of all layers above it are the model's.
        probability: By layer, the mean probability that it gives to the model's first choice.
        tokens: How many tokens that is over.
        example: The last tokens of the first text.
        choices: By layer, its first choice at each of them.
        chances: By layer, the probability that it gives to that choice.
    """

    stack: str
    agreement: tuple[float, ...]
    settled: tuple[float, ...]
    probability: tuple[float, ...]
    tokens: int
    example: tuple[str, ...] = field(repr=False)
    choices: tuple[tuple[str, ...], ...] = field(repr=False)
    chances: Rows = field(repr=False)

    def table(self) -> Table:
        """One row a layer."""
        shares = zip(self.agreement, self.settled, self.probability, strict=True)
        rows = tuple(
            (layer_name(self.stack, layer), *(f"{share:.1%}" for share in row)) for layer, row in enumerate(shares)
        )
        columns = ("layer", "predicted", "settled", "mean probability")
        return Table("Logit lens: the model's final choice", columns, rows, (f"Over {self.tokens:,} tokens.",))


def logit_lens(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    targets: Sequence[str] | None = None,
    batch_size: int = 4,
    max_tokens: int = 128,
    example_tokens: int = 10,
    blocks: BlocksGiven | None = None,
    progress: bool = True,
) -> LogitLens:
    """Reads each layer's states as if the model ended there: at which block is the final choice already made?

    nostalgebraist, "interpreting GPT: the logit lens" (2020). What stands between the last block and the logits is run
    by the model itself, on the states of each layer in turn: final norm, projection, scale, soft cap, head, whatever it
    has. Blocks hand on what they handed on before, so a layer costs one pass through the head. That the last layer's
    logits are the model's own is checked at every batch.

    Args:
        model: A model whose head gives logits at every token.
        tokenizer: Its tokenizer.
        texts: What is predicted; at every token, the first and special ones too.
        targets: What an encoder-decoder's decoder reads for each text; None is the text itself.
        batch_size: Texts at once: logits of that many texts over the whole vocabulary are in memory, twice.
        max_tokens: Longer texts lose their end.
        example_tokens: How many of the first text's last tokens are shown with each layer's choice. 10 fit a page.
        blocks: Handed to `read_anatomy` where structure does not tell.
        progress: A bar with the time left.

    Returns:
        The shares by layer; the last is 1.

    Raises:
        FreezeError: No texts, an empty one, a model without such a head, one whose states change their width or whose
            logits do not follow from what its blocks hand on.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_freeze.inputs.tokenizer import doctest_tokenizer
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=300))
        >>> lens = logit_lens(model, doctest_tokenizer(), ["Good mug, weak handle."], progress=False)
        >>> len(lens.settled), lens.settled[-1]
        (4, 1.0)
    """
    if example_tokens < 1:
        raise FreezeError(f"The logit lens was asked for with example_tokens={example_tokens}; use 1 or more.")
    anatomy = read_anatomy(model, blocks=blocks)
    stack = anatomy.stacks[-1]
    batches = text_batches(model, tokenizer, texts, targets, batch_size=batch_size, max_tokens=max_tokens)
    sums = torch.zeros(3, len(stack) + 1, dtype=torch.float64)
    tokens = 0
    example: tuple[Any, ...] = ()
    with looking(model):
        for batch in tqdm(batches, desc="logit lens", unit="batch", disable=not progress):
            real = real_tokens(anatomy, stack.name, batch)
            kept = record(model, anatomy, batch)
            own = _logits(kept.output, anatomy, real)
            if own.isnan().any():
                raise FreezeError(
                    f"The logit lens of {anatomy.model_class} was asked for; its logits are not numbers. fp16 "
                    "may overflow: load the model in fp32 or bf16."
                )
            final = own.argmax(dim=-1)
            choices = []
            with closing(logits_by_layer(model, anatomy, batch, kept, real)) as layers:
                for logits in layers:
                    choices.append(_choices(logits, final))
            _check_last(logits, own, anatomy)
            first, best, chance = map(torch.stack, zip(*choices, strict=True))
            agree = first == final
            settled = agree.flip(0).cumprod(dim=0).flip(0)
            sums += torch.stack([share.double().sum(dim=1).cpu() for share in (agree, settled, chance)])
            tokens += len(final)
            if not example:
                shown = int(real[0].sum())
                part = slice(max(0, shown - example_tokens), shown)
                read = token_texts(tokenizer, ids_read_by(anatomy, stack.name, batch)[part])
                chosen = tuple(token_texts(tokenizer, ids) for ids in first[:, part])
                example = (read, chosen, six_digits(best[:, part]))
    agreement, settled_share, probability = (six_digits(row / tokens) for row in sums)
    return LogitLens(str(stack.name), agreement, settled_share, probability, tokens, *example)


def logits_by_layer(
    model: nn.Module, anatomy: Anatomy, batch: Mapping[str, torch.Tensor], kept: Kept, real: torch.Tensor
) -> Generator[torch.Tensor, None, None]:
    """The logits [real tokens, vocabulary] that follow from the states of each layer, the embeddings first.

    While this runs no block computes: each hands on what it handed on before, the top one that layer's states. Who does
    not take them all closes it.
    """
    stack = anatomy.stacks[-1]
    layers = kept.layers(stack, real)
    top = kept.last[stack.name, len(stack) - 1]
    if layers[-1].shape != layers[0].shape:
        raise FreezeError(
            f"The logit lens of {anatomy.model_class} was asked for; its embeddings give states of shape "
            f"{list(layers[0].shape)}, its last block {list(layers[-1].shape)}. Its head reads the last width only."
        )
    output, states = kept.outputs[top]
    turned = states.shape != layers[-1].shape  # tokens before texts
    with looking(model):  # which puts every forward back
        for piece, (answer, _) in kept.outputs.items():
            piece.__dict__["forward"] = functools.partial(_answer, answer)
        for layer in layers:
            shown = layer.transpose(0, 1) if turned else layer
            answer = map_tree(functools.partial(_exchange, states, shown.clone()), output)
            top.__dict__["forward"] = functools.partial(_answer, answer)
            yield _logits(call(model, without_labels(batch)), anatomy, real)


def _logits(output: Any, anatomy: Anatomy, real: torch.Tensor) -> torch.Tensor:
    """An output's logits at the real tokens [real tokens, vocabulary], in fp32."""
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if logits is None or logits.dim() != 3 or logits.shape[:2] != real.shape:
        found = "none" if logits is None else f"logits of shape {list(logits.shape)}"
        raise FreezeError(
            f"The logit lens of {anatomy.model_class} was asked for; it needs a head with logits [texts, tokens, "
            f"vocabulary], and the model gives {found}. Load it with its language head, by AutoModelForCausalLM or "
            "AutoModelForSeq2SeqLM."
        )
    return logits[real.to(logits.device)].float()


def _choices(logits: torch.Tensor, final: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """At each token: the first choice, its probability, and that of the model's final choice."""
    highest, first = logits.max(dim=-1)
    total = logits.logsumexp(dim=-1)
    return first, (highest - total).exp(), (logits.gather(1, final[:, None])[:, 0] - total).exp()


def _check_last(last: torch.Tensor, own: torch.Tensor, anatomy: Anatomy) -> None:
    apart = last != own  # infinities that forbid a token are equal
    bound = SAME_LOGITS * own.nan_to_num(posinf=0.0, neginf=0.0).abs().max()
    if not ((last - own)[apart].abs() <= bound).all():  # worded so that a NaN is refused
        raise FreezeError(
            f"The logit lens of {anatomy.model_class} was asked for; its logits do not follow from what its blocks "
            "hand on, so it would show something else than the model does. Use layer_similarity."
        )


def _answer(answer: Any, *_: Any, **__: Any) -> Any:
    return answer


def _exchange(old: torch.Tensor, new: torch.Tensor, value: Any) -> Any:
    return new if value is old else value
