"""Summaries of many reviews from one model: batched, in order, and with the model left as it was found.

Decoder-only batches are padded on the left by hand, so the tokenizer's padding side does not matter. Decoding is
greedy unless the caller asks otherwise, whatever the checkpoint's generation config says. Nothing here scores.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from hf_freeze.errors import FreezeError, ModelError, ReviewsError, nearest
from hf_freeze.given import check_model
from hf_freeze.inputs.tokenizer import underlying_model
from hf_freeze.processes import agreed, pulse, rank_and_world, tell_all
from hf_freeze.summarization.prompts import SummaryPrompt, read_prompt
from hf_freeze.tensors import is_sharded

__all__ = ["generate_summaries"]

# What is kept of a checkpoint's generation config: the ids that say how its texts begin, end and what they never
# contain (languages among them). Its lengths, sampling, beams and penalties are settings of someone else's task:
# BART-CNN's min_length of 56 would pad a one-sentence summary with inventions.
KEPT_SETTINGS = (
    "bos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
)

# Arguments of `generate` that this function gives itself.
OWN_ARGUMENTS = (
    "inputs",
    "input_ids",
    "attention_mask",
    "position_ids",
    "decoder_input_ids",
    "generation_config",
    "max_length",
    "eos_token_id",
    "pad_token_id",
    "num_return_sequences",
    "return_dict_in_generate",
    "streamer",
)

PRECISIONS = ("bf16",)

# Rotary frequencies lose whole positions in 8 bits of mantissa; transformers computes them in fp32 in bf16 models too.
KEPT_IN_FP32 = ("inv_freq",)

# Left padding may move logits by rounding, or by being read (by 0.05 of their spread and more). Rounding alone moves
# those of a 30-block model by 2e-6 in fp32 and by up to 0.08 in bf16: a half-precision model is judged less finely.
SAME_LOGITS = 0.01
SAME_LOGITS_IN_HALF = 0.15

Row = tuple[int, list[int]]  # the review's place in the input, its prompt's ids


def generate_summaries(
    model: Any,
    tokenizer: Any,
    reviews: Sequence[str],
    *,
    prompt: SummaryPrompt | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    num_beams: int = 1,
    precision: str | None = None,
    progress: bool = True,
    split: bool = True,
    **generate_kwargs: Any,
) -> list[str]:
    """Summarises reviews, in their order.

    Decoding is greedy (or a plain beam search) even where the model's generation config samples or sets lengths; of
    that config only the token ids are kept (languages, forced, suppressed and start tokens). Anything else goes in
    `generate_kwargs`, e.g. `no_repeat_ngram_size=3`. A blank review gets an empty summary without a run of the model:
    there is nothing to summarise, and a model would invent a product.

    Not mutated: weights, the train or eval mode of each module, config and generation config, the tokenizer.

    Args:
        model: a transformers model that can generate, also inside DDP, torch.compile or PEFT.
        tokenizer: its tokenizer.
        reviews: the texts.
        prompt: what the model was trained with; `read_prompt(tokenizer, model.config)` by default.
        batch_size: reviews at once. Batches are of similar length and the longest comes first, so that a lack of
            memory shows at once.
        max_new_tokens: the longest summary, its end included.
        num_beams: 1 is greedy.
        precision: "bf16" generates with a bf16 copy of the model, for 2 bytes a parameter (autocast would cast every
            weight again at every token); the given model keeps its bits. None takes the model as it is.
        progress: a bar with the time left, in the first process only.
        split: with several processes, each takes its share and all get all summaries: every process has to make the
            call. False: the calling process does everything alone.
        **generate_kwargs: for `model.generate`.

    Returns:
        One summary for each review, in every process.

    Raises:
        ReviewsError: a review that is not a text.
        ModelError: a model that cannot generate, or a bf16 copy of one that is not whole in this process.
        FreezeError: an unknown precision, an argument that is set here, or more new tokens than the model has room for.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_freeze.inputs.tokenizer import doctest_tokenizer
    >>> sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes))
    >>> summaries = generate_summaries(model, doctest_tokenizer(), ["Good mug.", " "], max_new_tokens=4)
    >>> len(summaries), summaries[1]
    (2, '')
    """
    check_model("generate_summaries", model)
    _check_request(reviews, precision, generate_kwargs)
    inner = _generating_model(model)
    if prompt is None:
        prompt = read_prompt(tokenizer, inner.config, max_summary_tokens=max_new_tokens)
    if prompt.is_encoder_decoder != bool(inner.config.is_encoder_decoder):
        raise FreezeError(
            f"The prompt is {prompt.kind!r}, and {type(inner).__name__} is "
            f"{'an encoder-decoder' if inner.config.is_encoder_decoder else 'decoder-only'}. Make it with "
            f"read_prompt(tokenizer, model.config)."
        )

    _check_room(prompt, max_new_tokens)

    # A sharded model runs all reviews in all processes: each forward gathers weights from every one of them.
    rank, world_size = rank_and_world() if split and not _is_sharded(inner) else (0, 1)
    order = sorted((place for place, text in enumerate(reviews) if text.strip()), key=lambda at: -len(reviews[at]))
    rows = [
        (place, prompt.encode(reviews[place])["input_ids"]) for place in order[rank::world_size]
    ]  # shares of a sorted list cost alike
    rows.sort(key=lambda row: -len(row[1]))

    done: list[tuple[int, str]] = []
    with agreed("generate its share of the summaries") if world_size > 1 else nullcontext():
        if rows:
            settings, model_kwargs = _settings(inner, prompt, tokenizer, max_new_tokens, num_beams, generate_kwargs)
            with _ready_to_generate(inner, settings):
                equal_lengths = not _may_pad(inner, rows, settings)
            runner = _in_bf16(inner) if precision == "bf16" else inner
            label = "summaries" if world_size == 1 else f"summaries (1 of {world_size} processes)"
            bar = tqdm(total=len(rows), desc=label, unit="review", disable=not (progress and rank == 0))
            with _ready_to_generate(runner, settings), bar:
                for batch in _batches(rows, batch_size, equal_lengths=equal_lengths):
                    if world_size > 1:  # else all ranks may be in one forward together, and none can wait for a word
                        pulse()
                    ids = _generate(runner, [ids for _, ids in batch], settings, model_kwargs)
                    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
                    done += [(place, prompt.clean(text)) for (place, _), text in zip(batch, texts, strict=True)]
                    bar.update(len(batch))
        shares = tell_all(done) if world_size > 1 else [done]

    summaries = [""] * len(reviews)
    for place, summary in (pair for share in shares for pair in share):
        summaries[place] = summary
    return summaries


# ---------------------------------------------------------------------------------------------------------------------
# What was asked for


def _check_request(reviews: Sequence[str], precision: str | None, generate_kwargs: dict[str, Any]) -> None:
    if isinstance(reviews, str):
        raise ReviewsError("reviews is one text; a list of texts is expected. Use [review].")
    for place, review in enumerate(reviews):
        if not isinstance(review, str):
            raise ReviewsError(
                f"Review {place} is {type(review).__name__} ({review!r:.60}); a text is expected. Read the column as "
                f"str, and give '' where there is none."
            )
    if precision is not None and precision not in PRECISIONS:
        raise FreezeError(
            f"precision={precision!r}; known are None (the model as it is) and {nearest(precision, PRECISIONS)}."
        )
    for name in OWN_ARGUMENTS:
        if name in generate_kwargs:
            raise FreezeError(
                f"{name}= was given, but generate_summaries sets it itself. Use max_new_tokens for the length, "
                f"model.generation_config for token ids, and prompt for what the model reads."
            )


def _generating_model(model: Any) -> Any:
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ModelError(
            "The model has a prompt-learning adapter, whose virtual tokens are added outside of the model that "
            "generates. Use model.generate, or an adapter inside the layers (LoRA)."
        )
    inner = underlying_model(model)
    if not (hasattr(inner, "generate") and hasattr(inner, "can_generate") and inner.can_generate()):
        raise ModelError(
            f"{type(inner).__name__} cannot generate text: it has no language-modelling head. Load the checkpoint with "
            f"AutoModelForCausalLM or AutoModelForSeq2SeqLM."
        )
    return inner


def _check_room(prompt: SummaryPrompt, max_new_tokens: int) -> None:
    """By the prompt's limits and not by these reviews, so that all processes agree."""
    if prompt.is_encoder_decoder or prompt.max_tokens is None:
        return
    room = prompt.max_tokens - prompt.max_source_tokens
    if max_new_tokens > room:
        raise FreezeError(
            f"max_new_tokens={max_new_tokens} after a prompt of up to {prompt.max_source_tokens} tokens is more than "
            f"the {prompt.max_tokens} that the model takes. Use max_new_tokens <= {room}, or "
            f"read_prompt(..., max_summary_tokens={max_new_tokens}), which cuts long reviews more."
        )


def _settings(
    model: Any,
    prompt: SummaryPrompt,
    tokenizer: Any,
    max_new_tokens: int,
    num_beams: int,
    generate_kwargs: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """The generation config to run with, and what is left of the caller's arguments for the model's forward."""
    from transformers import GenerationConfig

    own = model.generation_config
    kept = {name: getattr(own, name, None) for name in KEPT_SETTINGS}
    if kept["decoder_start_token_id"] is None:
        kept["decoder_start_token_id"] = getattr(model.config, "decoder_start_token_id", None)
    ends = own.eos_token_id if isinstance(own.eos_token_id, (list, tuple)) else [own.eos_token_id]
    stops = sorted({*prompt.stop_ids, *(end for end in ends if end is not None and end >= 0)})
    pad = tokenizer.special_tokens_map.get("pad_token")
    kept["pad_token_id"] = stops[0] if pad is None else tokenizer.convert_tokens_to_ids(pad)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        **kept,
        eos_token_id=stops,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        use_cache=True,
    )
    return settings, settings.update(**generate_kwargs)  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------------------------------------------------------------
# One batch


def _batches(rows: Sequence[Row], batch_size: int, *, equal_lengths: bool) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        if batch and (len(batch) == batch_size or (equal_lengths and len(row[1]) != len(batch[0][1]))):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _may_pad(model: Any, rows: Sequence[Row], settings: Any) -> bool:
    """Whether padding on the left changes nothing: asked of the model itself, with the longest prompt that a
    batch of these would pad.

    It does change the answers of models that number positions from the padding on (TrOCR's and Whisper's decoders) or
    read it as text (RWKV): their batches hold prompts of one length only.
    """
    from transformers import GenerationConfig

    if model.config.is_encoder_decoder or len(rows[0][1]) == len(rows[-1][1]):
        return True
    probe = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=1, num_beams=1, return_dict_in_generate=True, output_logits=True
    )
    width = len(rows[0][1])
    shorter = next(row for _, row in rows if len(row) < width)
    ids = torch.tensor([shorter], device=model.device)
    gap = width - len(shorter)
    filler = torch.full((1, gap), settings.pad_token_id, device=model.device)
    padded = torch.cat([filler, ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :gap] = 0
    with _own_forward(model):
        plain, shifted = (
            model.generate(**_inputs(model, tokens, seen), generation_config=probe).logits[0].float()
            for tokens, seen in ((ids, torch.ones_like(ids)), (padded, mask))
        )
    allowed = SAME_LOGITS if model.dtype == torch.float32 else SAME_LOGITS_IN_HALF
    return bool((plain - shifted).norm() <= allowed * (plain - plain.mean()).norm())


@contextmanager
def _own_forward(model: Any) -> Iterator[None]:
    """The class's forward, without the autocast that accelerate wraps around it on the instance: it rounds to bf16."""
    wrapped = model.__dict__.pop("forward", None) if "_original_forward" in model.__dict__ else None
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped


def _inputs(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
    return {"input_ids": ids, "attention_mask": mask} if takes_mask else {"input_ids": ids}


def _generate(model: Any, prompts: list[list[int]], settings: Any, model_kwargs: dict[str, Any]) -> list[list[int]]:
    width = max(map(len, prompts))
    left = not model.config.is_encoder_decoder
    ids = torch.full((len(prompts), width), settings.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[row, place] = torch.tensor(prompt)
        mask[row, place] = 1
    # `generate` counts positions from the mask, so those of left-padded rows begin with their first token.
    inputs = _inputs(model, ids.to(model.device), mask.to(model.device))
    output = model.generate(**inputs, generation_config=settings, **model_kwargs)
    answers = output[:, width if left else 1 :].tolist()
    # Up to the first stop id: an end token need not be special to the tokenizer.
    return [list(itertools.takewhile(lambda id_: id_ not in settings.eos_token_id, answer)) for answer in answers]


# ---------------------------------------------------------------------------------------------------------------------
# The model, as it has to be and as it was


@contextmanager
def _ready_to_generate(model: Any, settings: Any) -> Iterator[None]:
    """Eval mode and our settings; afterwards each module's own mode and the model's own settings.

    The settings replace `model.generation_config` because `generate` fills what an argument leaves open from there:
    a checkpoint's max_length would come back, with a warning about both.
    """
    modes = [(module, module.training) for module in model.modules()]
    own, head = model.generation_config, model.get_output_embeddings()
    handle = head.register_forward_pre_hook(_contiguous) if isinstance(head, nn.Linear) else None
    try:
        model.eval()
        model.generation_config = settings
        # no_grad and not inference_mode: a table that the model builds on first use must serve in training too.
        with torch.no_grad():
            yield
    finally:
        model.generation_config = own
        if handle is not None:
            handle.remove()
        for module, mode in modes:
            module.training = mode  # module.train() would switch the children too


def _contiguous(head: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """The last hidden state of each row is a slice; torch multiplies a slice with a copy of the head's weight for each
    row, which for 64 rows of SmolLM2 takes 3.6 GB.
    """
    return (inputs[0].contiguous(),)


def _in_bf16(model: Any) -> Any:
    """A copy in bf16, made tensor by tensor, so that no second fp32 model stands in memory for a moment."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    if not any(tensor.dtype in (torch.float32, torch.float64, torch.float16) for _, tensor in tensors):
        return model
    if _is_sharded(model) or any(tensor.is_meta for _, tensor in tensors):
        raise ModelError(
            f"precision='bf16' copies the model, and some weights of this {type(model).__name__} are not in this "
            f"process (sharded, or released by a prefix cache: restore_prefix). Use precision=None."
        )
    fp32 = [*KEPT_IN_FP32, *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    stays = re.compile("|".join(map(re.escape, fp32)))
    memo: dict[int, Any] = {}
    for name, tensor in tensors:
        if id(tensor) in memo:  # a tie: the copy keeps it
            continue
        dtype = torch.bfloat16 if tensor.is_floating_point() and not stays.search(name) else tensor.dtype
        copied = tensor.detach().to(dtype, copy=True)
        memo[id(tensor)] = nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied
    from accelerate.utils import extract_model_from_parallel

    # What accelerate's mixed precision wrapped around forward would cast every weight again.
    return extract_model_from_parallel(copy.deepcopy(model, memo), keep_fp32_wrapper=False)


def _is_sharded(model: nn.Module) -> bool:
    """Whether other processes hold parts of the weights, FSDP1's flat ones among them."""
    return any(is_sharded(weight) or hasattr(weight, "_is_flat_param") for weight in model.parameters())
