"""Claims about `hf_freeze.summarization.generation`, on models built from small configs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
)

from hf_freeze.errors import FreezeError, ModelError, ReviewsError
from hf_freeze.summarization import generation
from hf_freeze.summarization.generation import generate_summaries
from hf_freeze.summarization.prompts import read_prompt
from tests.summarization.generators import (
    MODELS,
    REVIEWS,
    bart,
    gpt2,
    llama,
    one_by_one,
    spread,
    tokenizer_for,
    trocr,
)
from tests.tokenizer_makers import ROWS, chat_tokenizer, llama_config, metaspace, t5_config


def summaries_of(model: Any, tokenizer: Any = None, reviews: list[str] = REVIEWS, **asked: Any) -> list[str]:
    asked = {"max_new_tokens": 4, "progress": False} | asked
    return generate_summaries(model, tokenizer or chat_tokenizer(), reviews, **asked)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Each call of `generate`: the model that ran, and what it was given; its arguments are those of the call."""
    calls: list[Any] = []
    real = GenerationMixin.generate

    def generate(self: Any, **arguments: Any) -> Any:
        calls.append(SimpleNamespace(model=self, config=arguments["generation_config"], **arguments))
        return real(self, **arguments)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    return calls


@pytest.fixture
def spoken(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What transformers logs, whose logger does not propagate."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


# --- the same answers as the obvious path ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_batched_summaries_equal_those_made_one_by_one(name):
    model = MODELS[name]()
    tokenizer = tokenizer_for(model)
    expected = one_by_one(model, tokenizer, REVIEWS, 8)
    assert len(set(expected)) > 2, "the answers must depend on the reviews"
    for batch_size in (1, 2, 16):
        assert summaries_of(model, tokenizer, batch_size=batch_size, max_new_tokens=8) == expected


def test_gpt2_would_answer_otherwise_without_its_positions():
    """What the claim above rests on: left padding without position ids does change GPT-2."""
    model = gpt2().eval()
    ids = torch.tensor([[5, 9, 17]])
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0] * 4 + [1] * 3])
    plain, moved = model(ids).logits[0, -1], model(padded, attention_mask=mask).logits[0, -1]
    assert not torch.allclose(plain, moved, atol=0.1)


def test_the_tokenizers_padding_side_does_not_matter_and_stays():
    model, tokenizer = gpt2(), chat_tokenizer()
    tokenizer.padding_side = "right"
    assert summaries_of(model, tokenizer) == one_by_one(model, tokenizer, REVIEWS, 4)
    assert tokenizer.padding_side == "right"


@pytest.mark.parametrize(("make", "edge"), [(llama, -1), (bart, 0)])
def test_decoder_only_pads_left_and_encoder_decoder_right(make, edge, runs):
    model = make()
    summaries_of(model, tokenizer_for(model))
    mask = runs[-1].attention_mask
    assert (mask == 0).any()
    assert mask[:, edge].all()


def test_the_longest_batch_comes_first(runs):
    summaries_of(llama(), batch_size=2)
    widths = [run.input_ids.shape[1] for run in runs if len(run.input_ids) == 2]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == 2


def test_a_model_that_padding_misleads_gets_prompts_of_one_length_at_a_time(runs):
    model, tokenizer = trocr(), chat_tokenizer()
    reviews = [*REVIEWS, "bad", "bat"]
    expected = one_by_one(model, tokenizer, reviews, 4)
    assert summaries_of(model, tokenizer, reviews) == expected
    batches = runs[2:]  # the first two ask whether padding matters
    assert all(run.attention_mask.all() for run in batches)
    assert any(len(run.input_ids) > 1 for run in batches)


def test_rounding_of_a_bf16_copy_does_not_forbid_padding(runs):
    """A deep bf16 model's logits move by several percent under padding; the fp32 model, which they do not, is asked."""
    model = llama()
    summaries_of(model, precision="bf16")
    assert [run.model is model for run in runs] == [True, True, False]


def test_a_model_that_trainer_wrapped_in_autocast_is_still_padded(runs):
    """Autocast rounds as a bf16 copy does; judged by it, every batch would hold one length and be slow."""
    from accelerate.utils import convert_outputs_to_fp32

    model = llama().eval()

    def rounded(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Rounds so coarsely that padding seems to be read."""
        output = type(self).forward(self, *args, **kwargs)
        output.logits = output.logits + torch.randn_like(output.logits)
        return output

    model.forward = convert_outputs_to_fp32(rounded.__get__(model))
    model._original_forward = type(model).forward  # accelerate's mark
    wrapped = model.forward
    summaries_of(model, reviews=["Good mug.", "A mug that broke at once."])
    assert len(runs[-1].input_ids) == 2
    assert model.forward is wrapped


def test_a_model_without_a_mask_gets_none(runs):
    class Unmasked(LlamaForCausalLM):
        def forward(self, input_ids=None, past_key_values=None, use_cache=None, **_):
            return super().forward(input_ids=input_ids)

    summaries_of(spread(Unmasked(llama_config(use_cache=False))), reviews=["bad"])
    assert not hasattr(runs[0], "attention_mask")


# --- what is summarised ----------------------------------------------------------------------------------------------


def test_blank_reviews_get_empty_summaries_without_running_the_model(runs):
    model = llama()
    assert summaries_of(model, reviews=[]) == []
    assert summaries_of(model, reviews=["", " \n\t"]) == ["", ""]
    assert not runs
    mixed = summaries_of(model, reviews=["", REVIEWS[1], "  "])
    assert mixed == ["", *summaries_of(model, reviews=REVIEWS[1:2]), ""]


def test_the_prompt_given_is_the_one_used(runs):
    model, tokenizer = llama(), chat_tokenizer()
    prompt = read_prompt(tokenizer, model.config, template="{review} ->")
    summaries_of(model, tokenizer, ["bad"], prompt=prompt)
    assert runs[0].input_ids.tolist() == [prompt.encode("bad")["input_ids"]]


def cannot_generate() -> BertModel:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=ROWS, **sizes))


def prompt_tuned() -> Any:
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


@pytest.mark.parametrize(
    ("make", "asked", "error", "message"),
    [
        (llama, {"reviews": ["good", None]}, ReviewsError, "Review 1 is NoneType"),
        (llama, {"reviews": "good"}, ReviewsError, r"one text; a list of texts is expected. Use \[review\]"),
        (llama, {"prompt": lambda: read_prompt(metaspace("", " </s>"), t5_config())}, FreezeError,
         "prompt is 'encoder-decoder', and LlamaForCausalLM is decoder-only"),
        (lambda: llama(max_position_embeddings=256), {"max_new_tokens": 100,
         "prompt": lambda: read_prompt(chat_tokenizer(), llama_config(max_position_embeddings=256))}, FreezeError,
         r"max_new_tokens=100 after a prompt of up to 192 tokens.*<= 64"),
        (llama, {"precision": "bf61"}, FreezeError,
         r"precision='bf61'; known are None \(the model as it is\) and 'bf16'"),
        (cannot_generate, {}, ModelError, r"BertModel cannot generate text.*AutoModelForCausalLM"),
        (lambda: nn.Linear(1, 1), {}, ModelError, "Linear cannot generate text"),
        (prompt_tuned, {}, ModelError, "prompt-learning adapter"),
        *((llama, {name: 1}, FreezeError, f"{name}= was given, but generate_summaries sets it itself")
          for name in generation.OWN_ARGUMENTS),
    ],
)  # fmt: skip
def test_what_cannot_be_summarised_is_an_error(make, asked, error, message):
    asked = {name: value() if callable(value) else value for name, value in asked.items()}
    with pytest.raises(error, match=message):
        generate_summaries(make(), chat_tokenizer(), asked.pop("reviews", ["bad"]), **asked)


# --- how it is decoded -----------------------------------------------------------------------------------------------

BART_CNN = {"min_length": 56, "max_length": 142, "early_stopping": True, "length_penalty": 2.0, "num_beams": 4}
OTHERS = {"max_new_tokens": 90, "min_new_tokens": 30, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 7}
OTHERS |= {"no_repeat_ngram_size": 3, "num_return_sequences": 2, "return_dict_in_generate": True}


def test_decoding_is_greedy_and_ours_whatever_the_checkpoint_says(spoken):
    """Settings like those of BART-CNN and of chat models; nothing of them may show, nor any warning."""
    tokenizer = metaspace("<s> ", " </s>")
    expected = summaries_of(bart(), tokenizer, max_new_tokens=6)
    model = bart()
    ids = {name: getattr(model.generation_config, name) for name in ("bos_token_id", "pad_token_id", "eos_token_id")}
    model.generation_config = GenerationConfig(**ids, decoder_start_token_id=2, **BART_CNN, **OTHERS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert summaries_of(model, tokenizer, max_new_tokens=6) == expected
    assert not spoken.records


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_decoder_that_samples_by_default_is_decoded_greedily_without_a_warning(make, spoken):
    model, tokenizer = make(), chat_tokenizer()
    expected = one_by_one(model, tokenizer, REVIEWS, 6)
    model.generation_config.update(do_sample=True, temperature=0.6, max_length=20, min_length=9, top_p=0.9)
    assert summaries_of(model, tokenizer, max_new_tokens=6) == expected
    assert not spoken.records


def test_forced_and_suppressed_tokens_are_kept():
    model, tokenizer = bart(), metaspace("<s> ", " </s>")
    word = tokenizer("kettle", add_special_tokens=False)["input_ids"][0]
    model.generation_config.forced_bos_token_id = word
    assert all(summary.startswith(tokenizer.decode([word]).strip()) for summary in summaries_of(model, tokenizer))


def test_a_callers_arguments_are_followed(runs):
    summaries_of(llama(), num_beams=3, max_new_tokens=5, no_repeat_ngram_size=2)
    used = runs[-1].config
    assert (used.num_beams, used.max_new_tokens, used.no_repeat_ngram_size) == (3, 5, 2)


def test_generation_stops_at_the_prompts_end_and_at_every_eos(runs):
    summaries_of(llama(eos_token_id=7), chat_tokenizer(eos_token="<|endoftext|>"), ["bad"])
    assert runs[0].config.eos_token_id == [0, 2, 7]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_nothing_after_a_stop_shows_also_where_it_is_no_special_token(batch_size):
    model, tokenizer = llama(), chat_tokenizer()
    plain = summaries_of(model, tokenizer, REVIEWS[:3])
    ids = read_prompt(tokenizer, model.config).encode(REVIEWS[0])["input_ids"]
    first = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [2, first]
    assert plain[0] != ""
    assert summaries_of(model, tokenizer, REVIEWS[:3], batch_size=batch_size)[0] == ""


def test_a_tokenizer_without_a_pad_token_is_served_and_left_without():
    model, tokenizer = llama(pad_token_id=None), chat_tokenizer()
    expected = summaries_of(model, tokenizer)
    tokenizer.pad_token = None
    assert summaries_of(model, tokenizer) == expected
    assert tokenizer.pad_token is None


# --- the model is left as it was -------------------------------------------------------------------------------------


def test_each_module_gets_its_own_mode_back():
    model = llama()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    seen = []
    model.model.layers[1].register_forward_hook(lambda module, *_: seen.append(module.training))
    summaries_of(model)
    assert [module.training for module in model.modules()] == modes
    assert set(modes) == {True, False}
    assert set(seen) == {False}


def test_mode_and_settings_come_back_after_an_error():
    model = llama().train()
    settings = model.generation_config

    def fail(**_: Any) -> None:
        raise RuntimeError("out of memory")

    model.generate = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        summaries_of(model, reviews=["bad"])
    assert model.generation_config is settings
    assert all(module.training for module in model.modules())


def test_the_configs_are_left_as_found_and_the_cache_is_used(runs):
    model = llama(use_cache=False)
    config, settings = model.config.to_dict(), model.generation_config
    before = settings.to_dict()
    widths = []
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    summaries_of(model, reviews=["bad"])
    assert model.config.to_dict() == config
    assert model.generation_config is settings
    assert settings.to_dict() == before
    assert runs[0].config.use_cache
    assert widths[1:] == [1] * (len(widths) - 1)


def test_checkpointed_training_does_not_slow_or_change_generation():
    model, tokenizer = llama(), chat_tokenizer()
    expected = one_by_one(model, tokenizer, REVIEWS, 4)
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    assert summaries_of(model, tokenizer) == expected
    assert model.is_activation_checkpointing
    assert model.training


def test_what_a_model_keeps_while_generating_serves_in_training():
    """Tables that are built on first use: made under inference_mode, a backward pass would refuse them."""
    model = llama().train()
    kept: dict[str, torch.Tensor] = {}

    def scale(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * kept.setdefault("table", torch.ones(()) * 1.0)

    model.model.embed_tokens.register_forward_hook(scale)
    summaries_of(model)
    assert kept
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad is not None


# --- bf16 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_bf16_run_leaves_the_model_bit_for_bit(name):
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert len(summaries_of(model, tokenizer_for(model), precision="bf16")) == len(REVIEWS)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def copy_of(model: Any, runs: list[Any]) -> Any:
    """What runs where bf16 is asked for."""
    summaries_of(model, reviews=["bad"], precision="bf16")
    return runs[-1].model


def test_a_bf16_run_is_in_bf16(runs):
    model = llama()
    assert {parameter.dtype for parameter in copy_of(model, runs).parameters()} == {torch.bfloat16}
    summaries_of(model, reviews=["bad"])
    assert runs[-1].model is model


def test_a_bf16_copy_keeps_ties_and_rotary_frequencies(runs):
    model = llama(tie_word_embeddings=True)
    copied = copy_of(model, runs)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert torch.equal(copied.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert copied.model.rotary_emb.inv_freq.dtype == torch.float32
    assert copied.model.rotary_emb.inv_freq is not model.model.rotary_emb.inv_freq
    reference = model.model.layers[0].mlp.up_proj.weight.to(torch.bfloat16)
    assert torch.equal(copied.model.layers[0].mlp.up_proj.weight, reference)


def test_parameters_that_the_class_keeps_in_fp32_stay_so():
    model = llama()
    model._keep_in_fp32_modules_strict = {"lm_head"}
    copied = generation._in_bf16(model)  # whose head takes no bf16 states: no run of it
    assert copied.lm_head.weight.dtype == torch.float32
    assert copied.model.norm.weight.dtype == torch.bfloat16


def test_a_bf16_model_is_not_copied(runs):
    model = llama().to(torch.bfloat16)
    assert copy_of(model, runs) is model


def test_a_bf16_copy_sheds_the_autocast_of_training(runs):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer of another test may have left one in fp32
    try:
        model = Accelerator(cpu=True, mixed_precision="bf16").prepare(llama())
        assert hasattr(model, "_original_forward")
        copied = copy_of(model, runs)
        assert not hasattr(copied, "_original_forward")
        assert copied.forward.__self__ is copied
        assert copied(torch.tensor([[5, 6]])).logits.dtype == torch.bfloat16
        assert hasattr(model, "_original_forward")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_weights_that_are_not_here_cannot_be_copied():
    model = llama()
    model.model.layers[0].mlp.to("meta")
    with pytest.raises(ModelError, match=r"some weights of this LlamaForCausalLM are not in this process.*precision="):
        summaries_of(model, reviews=["bad"], precision="bf16")


# --- wrappers --------------------------------------------------------------------------------------------------------


def test_a_data_parallel_model_is_unwrapped():
    model = llama()
    assert summaries_of(nn.DataParallel(model)) == summaries_of(model)


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_the_adapters_of_a_peft_model_speak(precision):
    from peft import LoraConfig, get_peft_model

    base = summaries_of(llama(), max_new_tokens=6, precision=precision)
    adapted = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    untrained = summaries_of(adapted, max_new_tokens=6, precision=precision)
    assert untrained == base, "an untrained adapter changes nothing"
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=2.0)
    assert summaries_of(adapted, max_new_tokens=6, precision=precision) != base


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_processes_together_give_what_one_gives(monkeypatch, world_size):
    model = llama()
    reviews = [*REVIEWS[:2], " ", *REVIEWS[2:]]
    expected = summaries_of(model, reviews=reviews)
    shares: dict[int, Any] = {}

    def run(rank: int, gather: Any) -> list[str]:
        monkeypatch.setattr(generation, "rank_and_world", lambda: (rank, world_size))
        monkeypatch.setattr(generation, "tell_all", gather)
        return summaries_of(model, reviews=reviews)

    for rank in range(world_size):

        def keep(own: Any, rank: int = rank) -> None:
            shares[rank] = own
            raise InterruptedError

        with pytest.raises(InterruptedError):
            run(rank, keep)
    sizes = [len(share) for share in shares.values()]
    assert sum(sizes) == len(REVIEWS)
    assert max(sizes) - min(sizes) <= 1
    assert all(run(rank, lambda own: list(shares.values())) == expected for rank in range(world_size))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_process_may_work_alone_and_a_sharded_model_runs_everything_in_every_process(monkeypatch, sharded):
    model = llama()
    expected = summaries_of(model)
    if sharded:
        model.lm_head.weight.ds_id = 0
    monkeypatch.setattr(generation, "rank_and_world", lambda: (1, 2))
    assert summaries_of(model, split=sharded) == expected


# --- progress --------------------------------------------------------------------------------------------------------


def test_the_progress_bar_counts_reviews_and_can_be_silent(capsys, monkeypatch):
    model = llama()
    summaries_of(model, progress=True)
    assert "5/5" in capsys.readouterr().err
    summaries_of(model)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(generation, "rank_and_world", lambda: (1, 2))
    summaries_of(model, progress=True)
    assert capsys.readouterr().err == "", "only the first process shows a bar"
