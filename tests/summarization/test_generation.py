"""Claims about `hf_freeze.summarization.generation`, on models built from small configs."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
    TrOCRConfig,
    TrOCRForCausalLM,
)

from hf_freeze.errors import FreezeError, ModelError, ReviewsError
from hf_freeze.inputs.tokenizer import SAMPLE_REVIEWS
from hf_freeze.summarization import generation
from hf_freeze.summarization.generation import generate_summaries, share_of
from hf_freeze.summarization.prompts import read_prompt
from tests.tokenizer_makers import ROWS, bart_sizes, chat_tokenizer, llama_config, metaspace, t5_config

REVIEWS = ["bad", SAMPLE_REVIEWS[0], "Runs small, so order one size up.", SAMPLE_REVIEWS[2], "good mug, weak handle"]


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=ROWS, n_embd=16, n_head=2, n_layer=2, n_positions=512, bos_token_id=None, eos_token_id=2
    )
    return spread(GPT2LMHeadModel(config))


def llama(**given: Any) -> LlamaForCausalLM:
    return spread(LlamaForCausalLM(llama_config(num_hidden_layers=2, **given)))


def bart(**given: Any) -> BartForConditionalGeneration:
    return spread(BartForConditionalGeneration(BartConfig(**bart_sizes(forced_eos_token_id=None, **given))))


def t5() -> T5ForConditionalGeneration:
    return spread(T5ForConditionalGeneration(t5_config()))


def trocr() -> TrOCRForCausalLM:
    """A decoder with absolute positions that takes no position_ids: left padding moves them."""
    sizes = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = TrOCRConfig(vocab_size=ROWS, max_position_embeddings=512, **sizes, **ids)
    return spread(TrOCRForCausalLM(config))


def spread(model: Any) -> Any:
    """Weights large enough that positions and neighbours decide what a random model says next."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    return model


MODELS = {"gpt2": gpt2, "llama": llama, "bart": bart, "t5": t5}


def tokenizer_for(model: Any) -> Any:
    return metaspace("<s> ", " </s>") if model.config.is_encoder_decoder else chat_tokenizer()


def one_by_one(model: Any, tokenizer: Any, reviews: list[str], new_tokens: int) -> list[str]:
    """The slow, obvious path: each review alone, unpadded, the whole sequence again for every token."""
    model.eval()
    prompt = read_prompt(tokenizer, model.config)
    summaries = []
    for review in reviews:
        source = torch.tensor([prompt.encode(review)["input_ids"]])
        answer: list[int] = []
        for _ in range(new_tokens):
            if model.config.is_encoder_decoder:
                start = [model.config.decoder_start_token_id, *answer]
                logits = model(input_ids=source, decoder_input_ids=torch.tensor([start])).logits
            else:
                logits = model(input_ids=torch.cat([source, torch.tensor([answer], dtype=torch.long)], 1)).logits
            answer.append(int(logits[0, -1].argmax()))
            if answer[-1] in prompt.stop_ids:
                break
        summaries.append(prompt.clean(tokenizer.decode(answer, skip_special_tokens=True)))
    return summaries


class Recorder:
    """Stands in for `model.generate` and keeps what it was called with."""

    def __init__(self, model: Any) -> None:
        self.calls: list[dict[str, Any]] = []
        self.configs: list[Any] = []
        self.real, self.model = model.generate, model

    def __call__(self, **arguments: Any) -> Any:
        self.calls.append(arguments)
        self.configs.append(self.model.generation_config)
        return self.real(**arguments)


def recorded(model: Any) -> Recorder:
    recorder = Recorder(model)
    model.generate = recorder
    return recorder


# --- the same answers as the obvious path ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_batched_summaries_equal_those_made_one_by_one(name):
    model = MODELS[name]()
    tokenizer = tokenizer_for(model)
    expected = one_by_one(model, tokenizer, REVIEWS, 8)
    assert len(set(expected)) > 2, "the answers must depend on the reviews"
    for batch_size in (1, 2, 16):
        found = generate_summaries(model, tokenizer, REVIEWS, batch_size=batch_size, max_new_tokens=8, progress=False)
        assert found == expected


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
    found = generate_summaries(model, tokenizer, REVIEWS, max_new_tokens=4, progress=False)
    assert found == one_by_one(model, tokenizer, REVIEWS, 4)
    assert tokenizer.padding_side == "right"


def test_decoder_only_pads_left_and_encoder_decoder_right():
    for model, edge in ((llama(), -1), (bart(), 0)):
        calls = recorded(model).calls
        generate_summaries(model, tokenizer_for(model), REVIEWS, max_new_tokens=4, progress=False)
        mask = calls[-1]["attention_mask"]
        assert (mask == 0).any()
        assert mask[:, edge].all()


def test_the_longest_batch_comes_first():
    model = llama()
    calls = recorded(model).calls
    generate_summaries(model, chat_tokenizer(), REVIEWS, batch_size=2, max_new_tokens=2, progress=False)
    widths = [call["input_ids"].shape[1] for call in calls if len(call["input_ids"]) == 2]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == 2


def test_a_model_that_padding_misleads_gets_prompts_of_one_length_at_a_time():
    model, tokenizer = trocr(), chat_tokenizer()
    reviews = [*REVIEWS, "bad", "bat"]
    expected = one_by_one(model, tokenizer, reviews, 4)
    calls = recorded(model).calls
    assert generate_summaries(model, tokenizer, reviews, max_new_tokens=4, progress=False) == expected
    batches = calls[2:]  # the first two ask whether padding matters
    assert all(call["attention_mask"].all() for call in batches)
    assert any(len(call["input_ids"]) > 1 for call in batches)


def test_a_model_without_a_mask_gets_none():
    class Unmasked(LlamaForCausalLM):
        def forward(self, input_ids=None, past_key_values=None, use_cache=None, **_):
            return super().forward(input_ids=input_ids)

    model = spread(Unmasked(llama_config(use_cache=False)))
    calls = recorded(model).calls
    generate_summaries(model, chat_tokenizer(), ["bad"], max_new_tokens=2, progress=False)
    assert "attention_mask" not in calls[0]


# --- what is summarised ----------------------------------------------------------------------------------------------


def test_no_reviews_give_no_summaries():
    model = llama()
    calls = recorded(model).calls
    assert generate_summaries(model, chat_tokenizer(), []) == []
    assert not calls


def test_blank_reviews_get_empty_summaries_without_running_the_model():
    model = llama()
    calls = recorded(model).calls
    assert generate_summaries(model, chat_tokenizer(), ["", " \n\t"]) == ["", ""]
    assert not calls
    mixed = generate_summaries(model, chat_tokenizer(), ["", REVIEWS[1], "  "], max_new_tokens=4, progress=False)
    assert mixed[0] == mixed[2] == ""
    assert mixed[1] == generate_summaries(model, chat_tokenizer(), REVIEWS[1:2], max_new_tokens=4, progress=False)[0]


def test_a_review_that_is_not_a_text_is_an_error():
    with pytest.raises(ReviewsError, match="Review 1 is NoneType"):
        generate_summaries(llama(), chat_tokenizer(), ["good", None])
    with pytest.raises(ReviewsError, match=r"one text; a list of texts is expected. Use \[review\]"):
        generate_summaries(llama(), chat_tokenizer(), "good")


def test_the_prompt_given_is_the_one_used():
    model, tokenizer = llama(), chat_tokenizer()
    prompt = read_prompt(tokenizer, model.config, template="{review} ->")
    calls = recorded(model).calls
    generate_summaries(model, tokenizer, ["bad"], prompt=prompt, max_new_tokens=2, progress=False)
    assert calls[0]["input_ids"].tolist() == [prompt.encode("bad")["input_ids"]]


def test_a_prompt_of_the_other_kind_is_an_error():
    prompt = read_prompt(metaspace("", " </s>"), t5_config())
    with pytest.raises(FreezeError, match="prompt is 'encoder-decoder', and LlamaForCausalLM is decoder-only"):
        generate_summaries(llama(), metaspace(), ["bad"], prompt=prompt)


def test_a_model_that_cannot_generate_is_an_error():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ModelError, match=r"BertModel cannot generate text.*AutoModelForCausalLM"):
        generate_summaries(BertModel(BertConfig(vocab_size=ROWS, **sizes)), chat_tokenizer(), ["bad"])
    with pytest.raises(ModelError, match="Linear cannot generate text"):
        generate_summaries(nn.Linear(1, 1), chat_tokenizer(), ["bad"])


@pytest.mark.parametrize("name", generation.OWN_ARGUMENTS)
def test_arguments_that_are_set_here_are_refused(name):
    with pytest.raises(FreezeError, match=f"{name}= was given, but generate_summaries sets it itself"):
        generate_summaries(llama(), chat_tokenizer(), ["bad"], **{name: 1})


def test_more_new_tokens_than_room_is_an_error():
    model, tokenizer = llama(max_position_embeddings=256), chat_tokenizer()
    prompt = read_prompt(tokenizer, model.config)
    with pytest.raises(FreezeError, match=r"max_new_tokens=100 after a prompt of up to 192 tokens.*<= 64"):
        generate_summaries(model, tokenizer, ["bad"], prompt=prompt, max_new_tokens=100)


# --- how it is decoded -----------------------------------------------------------------------------------------------


def test_decoding_is_greedy_and_ours_whatever_the_checkpoint_says(caplog):
    """Settings like those of BART-CNN and of chat models; nothing of them may show, nor any warning."""
    tokenizer = metaspace("<s> ", " </s>")
    expected = generate_summaries(bart(), tokenizer, REVIEWS, max_new_tokens=6, progress=False)
    model = bart()
    model.generation_config = GenerationConfig(
        **{name: getattr(model.generation_config, name) for name in ("bos_token_id", "pad_token_id", "eos_token_id")},
        decoder_start_token_id=2,
        min_length=56,
        max_length=142,
        max_new_tokens=90,
        min_new_tokens=30,
        early_stopping=True,
        length_penalty=2.0,
        num_beams=4,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        top_k=7,
        no_repeat_ngram_size=3,
        num_return_sequences=2,
        return_dict_in_generate=True,
    )
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = generate_summaries(model, tokenizer, REVIEWS, max_new_tokens=6, progress=False)
    finally:
        logger.removeHandler(caplog.handler)
    assert found == expected
    assert not caplog.records


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_decoder_that_samples_by_default_is_decoded_greedily_without_a_warning(make, caplog):
    model, tokenizer = make(), chat_tokenizer()
    expected = one_by_one(model, tokenizer, REVIEWS, 6)
    model.generation_config.update(do_sample=True, temperature=0.6, max_length=20, min_length=9, top_p=0.9)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert generate_summaries(model, tokenizer, REVIEWS, max_new_tokens=6, progress=False) == expected
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_forced_and_suppressed_tokens_are_kept():
    model, tokenizer = bart(), metaspace("<s> ", " </s>")
    word = tokenizer("kettle", add_special_tokens=False)["input_ids"][0]
    model.generation_config.forced_bos_token_id = word
    said = generate_summaries(model, tokenizer, REVIEWS, max_new_tokens=4, progress=False)
    assert all(summary.startswith(tokenizer.decode([word]).strip()) for summary in said)


def test_a_callers_arguments_are_followed():
    model, tokenizer = llama(), chat_tokenizer()
    recorder = recorded(model)
    generate_summaries(model, tokenizer, REVIEWS, num_beams=3, max_new_tokens=5, no_repeat_ngram_size=2, progress=False)
    used = recorder.calls[-1]["generation_config"]
    assert (used.num_beams, used.max_new_tokens, used.no_repeat_ngram_size) == (3, 5, 2)


def test_generation_stops_at_the_prompts_end_and_at_every_eos():
    model, tokenizer = llama(eos_token_id=7), chat_tokenizer(eos_token="<|endoftext|>")
    recorder = recorded(model)
    generate_summaries(model, tokenizer, ["bad"], max_new_tokens=2, progress=False)
    assert recorder.calls[0]["generation_config"].eos_token_id == [0, 2, 7]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_nothing_after_a_stop_shows_also_where_it_is_no_special_token(batch_size):
    model, tokenizer = llama(), chat_tokenizer()
    plain = generate_summaries(model, tokenizer, REVIEWS[:3], max_new_tokens=6, progress=False)
    ids = read_prompt(tokenizer, model.config).encode(REVIEWS[0])["input_ids"]
    first = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [2, first]
    stopped = generate_summaries(model, tokenizer, REVIEWS[:3], max_new_tokens=6, batch_size=batch_size, progress=False)
    assert plain[0] != ""
    assert stopped[0] == ""


def test_a_tokenizer_without_a_pad_token_is_served_and_left_without():
    model, tokenizer = llama(pad_token_id=None), chat_tokenizer()
    expected = generate_summaries(model, tokenizer, REVIEWS, max_new_tokens=4, progress=False)
    tokenizer.pad_token = None
    assert generate_summaries(model, tokenizer, REVIEWS, max_new_tokens=4, progress=False) == expected
    assert tokenizer.pad_token is None


# --- the model is left as it was -------------------------------------------------------------------------------------


def test_each_module_gets_its_own_mode_back():
    model = llama()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    seen = []
    model.model.layers[1].register_forward_hook(lambda module, *_: seen.append(module.training))
    generate_summaries(model, chat_tokenizer(), REVIEWS[:2], max_new_tokens=2, progress=False)
    assert [module.training for module in model.modules()] == modes
    assert True in modes
    assert False in modes
    assert seen
    assert not any(seen)


def test_mode_and_settings_come_back_after_an_error():
    model = llama().train()
    settings = model.generation_config

    def fail(**_: Any) -> None:
        raise RuntimeError("out of memory")

    model.generate = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        generate_summaries(model, chat_tokenizer(), ["bad"], progress=False)
    assert model.generation_config is settings
    assert all(module.training for module in model.modules())


def test_the_configs_are_left_as_found_and_the_cache_is_used():
    model = llama(use_cache=False)
    config, settings = model.config.to_dict(), model.generation_config
    before = settings.to_dict()
    recorder = recorded(model)
    widths = []
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    generate_summaries(model, chat_tokenizer(), ["bad"], max_new_tokens=4, progress=False)
    assert model.config.to_dict() == config
    assert model.generation_config is settings
    assert settings.to_dict() == before
    assert recorder.calls[0]["generation_config"].use_cache
    assert widths[1:] == [1] * (len(widths) - 1)


def test_checkpointed_training_does_not_slow_or_change_generation():
    model, tokenizer = llama(), chat_tokenizer()
    expected = one_by_one(model, tokenizer, REVIEWS, 4)
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    assert generate_summaries(model, tokenizer, REVIEWS, max_new_tokens=4, progress=False) == expected
    assert model.is_activation_checkpointing
    assert model.training


def test_what_a_model_keeps_while_generating_serves_in_training():
    """Tables that are built on first use: made under inference_mode, a backward pass would refuse them."""
    model = llama().train()
    kept: dict[str, torch.Tensor] = {}

    def scale(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * kept.setdefault("table", torch.ones(()) * 1.0)

    model.model.embed_tokens.register_forward_hook(scale)
    generate_summaries(model, chat_tokenizer(), REVIEWS, max_new_tokens=4, progress=False)
    assert kept
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad is not None


# --- bf16 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_bf16_run_leaves_the_model_bit_for_bit(name):
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    summaries = generate_summaries(
        model, tokenizer_for(model), REVIEWS, precision="bf16", max_new_tokens=4, progress=False
    )
    assert len(summaries) == len(REVIEWS)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_bf16_run_is_in_bf16(monkeypatch):
    model = llama()
    seen = []
    real = generation._generate
    monkeypatch.setattr(generation, "_generate", lambda runner, *rest: (seen.append(runner), real(runner, *rest))[1])
    generate_summaries(model, chat_tokenizer(), ["bad"], precision="bf16", max_new_tokens=2, progress=False)
    generate_summaries(model, chat_tokenizer(), ["bad"], max_new_tokens=2, progress=False)
    assert {parameter.dtype for parameter in seen[0].parameters()} == {torch.bfloat16}
    assert seen[1] is model


def test_a_bf16_copy_keeps_ties_and_rotary_frequencies():
    model = llama(tie_word_embeddings=True)
    copied = generation._in_bf16(model)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert torch.equal(copied.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert copied.model.rotary_emb.inv_freq.dtype == torch.float32
    assert copied.model.rotary_emb.inv_freq is not model.model.rotary_emb.inv_freq
    reference = model.model.layers[0].mlp.up_proj.weight.to(torch.bfloat16)
    assert torch.equal(copied.model.layers[0].mlp.up_proj.weight, reference)


def test_parameters_that_the_class_keeps_in_fp32_stay_so():
    model = llama()
    model._keep_in_fp32_modules_strict = {"lm_head"}
    copied = generation._in_bf16(model)
    assert copied.lm_head.weight.dtype == torch.float32
    assert copied.model.norm.weight.dtype == torch.bfloat16


def test_a_bf16_model_is_not_copied():
    model = llama().to(torch.bfloat16)
    assert generation._in_bf16(model) is model


def test_a_bf16_copy_sheds_the_autocast_of_training():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer of another test may have left one in fp32
    try:
        model = Accelerator(cpu=True, mixed_precision="bf16").prepare(llama())
        assert hasattr(model, "_original_forward")
        copied = generation._in_bf16(model)
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
        generate_summaries(model, chat_tokenizer(), ["bad"], precision="bf16", progress=False)


def test_an_unknown_precision_is_an_error():
    with pytest.raises(FreezeError, match=r"precision='bf61'; known are None \(the model as it is\) and 'bf16'"):
        generate_summaries(llama(), chat_tokenizer(), ["bad"], precision="bf61")


# --- wrappers --------------------------------------------------------------------------------------------------------


def test_a_data_parallel_model_is_unwrapped():
    model, tokenizer = llama(), chat_tokenizer()
    expected = generate_summaries(model, tokenizer, REVIEWS, max_new_tokens=4, progress=False)
    assert generate_summaries(nn.DataParallel(model), tokenizer, REVIEWS, max_new_tokens=4, progress=False) == expected


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_the_adapters_of_a_peft_model_speak(precision):
    from peft import LoraConfig, get_peft_model

    tokenizer, asked = chat_tokenizer(), {"max_new_tokens": 6, "progress": False, "precision": precision}
    base = generate_summaries(llama(), tokenizer, REVIEWS, **asked)
    adapted = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert generate_summaries(adapted, tokenizer, REVIEWS, **asked) == base, "an untrained adapter changes nothing"
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=2.0)
    assert generate_summaries(adapted, tokenizer, REVIEWS, **asked) != base


def test_a_prompt_learning_adapter_is_an_error():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ModelError, match="prompt-learning adapter"):
        generate_summaries(model, chat_tokenizer(), ["bad"])


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shares_cover_everything_once_and_differ_by_one_at_most(world_size):
    shares = [share_of(range(5), rank, world_size) for rank in range(world_size)]
    assert sorted(item for share in shares for item in share) == list(range(5))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("world_size", [2, 7])
def test_processes_together_give_what_one_gives(monkeypatch, world_size):
    model, tokenizer = llama(), chat_tokenizer()
    reviews = [*REVIEWS[:2], " ", *REVIEWS[2:]]
    expected = generate_summaries(model, tokenizer, reviews, max_new_tokens=4, progress=False)
    shares: dict[int, Any] = {}

    def run(rank: int, gather: Any) -> list[str]:
        monkeypatch.setattr(generation, "rank_and_world", lambda: (rank, world_size))
        monkeypatch.setattr(generation, "tell_all", gather)
        return generate_summaries(model, tokenizer, reviews, max_new_tokens=4, progress=False)

    for rank in range(world_size):

        def keep(own: Any, rank: int = rank) -> None:
            shares[rank] = own
            raise InterruptedError

        with pytest.raises(InterruptedError):
            run(rank, keep)
    assert sum(map(len, shares.values())) == len(REVIEWS)

    def gather(own: Any) -> list[Any]:
        return [shares[rank] for rank in range(world_size)]

    assert all(run(rank, gather) == expected for rank in range(world_size))


def test_a_process_may_work_alone(monkeypatch):
    model, tokenizer = llama(), chat_tokenizer()
    expected = generate_summaries(model, tokenizer, REVIEWS, max_new_tokens=4, progress=False)
    monkeypatch.setattr(generation, "rank_and_world", lambda: (1, 2))
    alone = generate_summaries(model, tokenizer, REVIEWS, max_new_tokens=4, progress=False, split=False)
    assert alone == expected


def test_a_sharded_model_runs_everything_in_every_process(monkeypatch):
    model, tokenizer = llama(), chat_tokenizer()
    expected = generate_summaries(model, tokenizer, REVIEWS, max_new_tokens=4, progress=False)
    model.lm_head.weight.ds_id = 0
    monkeypatch.setattr(generation, "rank_and_world", lambda: (1, 2))
    assert generate_summaries(model, tokenizer, REVIEWS, max_new_tokens=4, progress=False) == expected


# --- progress --------------------------------------------------------------------------------------------------------


def test_the_progress_bar_counts_reviews_and_can_be_silent(capsys, monkeypatch):
    model, tokenizer = llama(), chat_tokenizer()
    generate_summaries(model, tokenizer, REVIEWS, max_new_tokens=2)
    assert "5/5" in capsys.readouterr().err
    generate_summaries(model, tokenizer, REVIEWS, max_new_tokens=2, progress=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(generation, "rank_and_world", lambda: (1, 2))
    generate_summaries(model, tokenizer, REVIEWS, max_new_tokens=2)
    assert capsys.readouterr().err == "", "only the first process shows a bar"


def test_rounding_of_a_bf16_copy_does_not_forbid_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deep bf16 model's logits move by several percent under padding; asked of the fp32 model they do not."""
    tokenizer = chat_tokenizer()
    model = LlamaForCausalLM(llama_config()).eval()
    asked: list[torch.dtype] = []
    original = generation._may_pad

    def spy(asked_model: Any, *rest: Any) -> bool:
        asked.append(asked_model.dtype)
        return original(asked_model, *rest)

    monkeypatch.setattr(generation, "_may_pad", spy)
    generate_summaries(
        model, tokenizer, ["Good mug.", "A mug that broke."], precision="bf16", progress=False, max_new_tokens=2
    )
    assert asked == [torch.float32]


def test_a_model_that_trainer_wrapped_in_autocast_is_still_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast rounds as a bf16 copy does; judged by it, every batch would hold one length and be slow."""
    from accelerate.utils import convert_outputs_to_fp32

    tokenizer = chat_tokenizer()
    model = LlamaForCausalLM(llama_config()).eval()

    def rounded(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Rounds so coarsely that padding seems to be read."""
        output = type(self).forward(self, *args, **kwargs)
        output.logits = output.logits + torch.randn_like(output.logits)
        return output

    model.forward = convert_outputs_to_fp32(rounded.__get__(model))
    model._original_forward = type(model).forward  # accelerate's mark
    wrapped = model.forward
    widths: list[int] = []
    original = generation._generate
    monkeypatch.setattr(
        generation, "_generate", lambda m, ids, *rest: widths.append(len(ids)) or original(m, ids, *rest)
    )
    generate_summaries(model, tokenizer, ["Good mug.", "A mug that broke at once."], progress=False, max_new_tokens=2)
    assert widths == [2]
    assert model.forward is wrapped
