"""Advice before a run: known answers are found, the model is left as it was, and mistakes are told."""

from __future__ import annotations

import copy
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_freeze import FreezeError, FreezePlan, PrefixCache, forecast, freeze, read_anatomy, supervised_logits_only, thaw
from hf_freeze.cli import exit_code
from hf_freeze.depth import Advice, advise
from hf_freeze.depth.choice import Comparison, depth_of, longer_run_rate, plan_warnings
from hf_freeze.depth.probe import Probe, Trial
from hf_freeze.errors import CannotCache, PlanError
from tests.prefix.cases import collator_for, padding_tokenizer
from tests.recipes.scripts import load_script
from tests.tiny import tiny_folder, tiny_model
from tests.tokenizer_makers import metaspace

RECIPE = Path(__file__).parents[2] / "recipes" / "advise_plan.py"
VOCAB, END = 24, 1
Rows = list[dict[str, Any]]


def echo_rows(count: int, seed: int, shift: int = 0) -> Rows:
    """Two tokens, a mark, and the two tokens again, each `shift` further on: what is to be learnt."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for pair in torch.randint(2, VOCAB, (count, 2), generator=generator).tolist():
        said = [2 + (token - 2 + shift) % (VOCAB - 2) for token in pair]
        rows.append({"input_ids": [*pair, END, *said], "attention_mask": [1] * 5, "labels": [-100] * 3 + said})
    return rows


def small_llama(blocks: int = 4, **given: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": END}
    values = {"vocab_size": VOCAB, "num_hidden_layers": blocks, "max_position_embeddings": 16}
    return LlamaForCausalLM(LlamaConfig(**(values | sizes | ids | given)))


@pytest.fixture(scope="module")
def taught() -> LlamaForCausalLM:
    """A model that has learnt to echo."""
    model = small_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(200):
        rows = echo_rows(64, seed=100 + step)
        batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def ask(model: Any, rows: Any = None, **given: Any) -> Advice:
    options = {"depths": [3, 2], "steps": 3, "batch_size": 4, "learning_rates": [1e-3], "progress": False} | given
    return advise(model, echo_rows(40, seed=1) if rows is None else rows, **options)


def probe_of(advice: Advice, depth: int) -> Any:
    return next(probe for probe in advice.probes if probe.depth == depth)


# ------------------------------------------------------------------------------------------------------ known answers


def test_where_the_top_suffices_most_blocks_are_frozen(taught):
    rows = echo_rows(400, seed=1, shift=7)
    advice = ask(copy.deepcopy(taught), rows, depths=[3, 2, 1, 0], steps=40, batch_size=8, learning_rates=[3e-3, 1e-2])
    assert advice.depth >= 2
    assert advice.plan == FreezePlan(decoder_blocks=advice.depth)
    assert advice.validation_loss > 2 * probe_of(advice, advice.depth).validation_loss


def test_where_a_low_block_must_change_it_is_left_to_train_and_deeper_plans_are_clearly_worse(taught):
    model = copy.deepcopy(taught)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.model.layers[1].parameters():
            if weight.dim() == 2:  # what block 0 tells is drowned in what block 1 adds
                weight.normal_(std=0.6, generator=generator)
    rows = echo_rows(400, seed=1)
    given = {"depths": [3, 2, 1, 0], "steps": 40, "batch_size": 8, "learning_rates": [3e-3, 1e-2]}
    advice = ask(model, rows, plan=FreezePlan(decoder_blocks=3), **given)
    assert advice.depth <= 1
    assert "clearly worse" in probe_of(advice, 3).verdict
    assert any("FreezePlan(decoder_blocks=3) freezes too many blocks" in text for text in advice.warnings)


def test_a_few_rows_without_a_rule_are_learnt_by_heart_and_that_is_told():
    random_labels = [
        row | {"labels": [-100] * 3 + other["input_ids"][:2]}
        for row, other in zip(echo_rows(40, 1), echo_rows(40, 2), strict=True)
    ]
    advice = ask(small_llama(), random_labels, steps=60, learning_rates=[1e-2], epochs=20)
    assert any("The losses part at" in text for text in advice.warnings)
    assert any("by heart" in probe.verdict for probe in advice.probes)


@pytest.fixture(scope="module")
def cached_and_plain(taught) -> tuple[Advice, Advice]:
    """The same advice with the prefix cache, and where it is declined."""
    cached = ask(copy.deepcopy(taught), depths=[3, 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrefixCache, "prepare", refuse)
        return cached, ask(copy.deepcopy(taught), depths=[3, 1])


def test_probes_from_the_cache_end_as_probes_without_it(cached_and_plain):
    cached, plain = cached_and_plain
    assert any("without the prefix cache" in text and "not today" in text for text in plain.reasons)
    assert not any("without the prefix cache" in text for text in cached.reasons)
    for one, other in zip(cached.probes, plain.probes, strict=True):
        assert one.validation_loss == pytest.approx(other.validation_loss, rel=1e-4)  # AdamW makes much of rounding
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-4)
        assert one.memory_bytes < other.memory_bytes, "the forecast is of the mode that the run will have"
        assert one.share_of_full < other.share_of_full


def test_a_depth_that_fits_only_with_the_cache_is_not_advised_without(taught, cached_and_plain, monkeypatch):
    costs, plain = ({probe.depth: probe for probe in advice.probes} for advice in cached_and_plain)
    limit = (max(plain[3].memory_bytes, costs[1].memory_bytes) + plain[1].memory_bytes) // 2
    assert costs[1].memory_bytes < limit < plain[1].memory_bytes, "shallow fits from the cache only"
    monkeypatch.setattr(PrefixCache, "prepare", refuse)
    advice = ask(copy.deepcopy(taught), depths=[3, 1], memory_bytes=limit)
    assert advice.depth == 3
    assert probe_of(advice, 1).verdict == "needs more memory than there is"


def test_an_image_counts_by_its_patches():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=2, **sizes))
    torch.manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 16, 16), "labels": row % 2} for row in range(24)]
    advice = advise(model, rows, depths=[3, 1], steps=2, batch_size=4, progress=False)
    for probe in advice.probes:
        named = {"batch_size": 4, "target_tokens": 1, "rows": 16, "dtype": "float32"}
        expected = forecast(model, probe.plan, source_tokens=16 + 1, **named).modes["cached"]  # patches and [CLS]
        assert (probe.memory_bytes, probe.share_of_full) == (expected.memory_bytes, expected.share_of_full)


def refuse(*given: Any, **named: Any) -> None:
    raise CannotCache("not today")


def test_states_come_from_one_pass_and_no_prefix_runs_in_training(taught, tmp_path, monkeypatch):
    builds = []
    build = PrefixCache.prepare.__func__
    monkeypatch.setattr(PrefixCache, "prepare", classmethod(lambda *a, **k: builds.append(1) or build(*a, **k)))
    model, runs = copy.deepcopy(taught), []
    search = Probe.search

    def counted(self, *given):
        handle = model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
        try:
            return search(self, *given)
        finally:
            handle.remove()

    monkeypatch.setattr(Probe, "search", counted)
    ask(model, cache_dir=tmp_path)
    assert len(builds) == 1
    assert not runs
    freeze(model, FreezePlan(decoder_blocks=2))
    cache = PrefixCache.build(model, echo_rows(40, seed=1), cache_dir=tmp_path, progress=False)
    assert cache.report.computed_rows < 40  # a run takes over what the probe computed
    cache.close()


@pytest.mark.parametrize("kind", ["bart", "gpt2"])
def test_an_encoder_lies_below_its_decoder(kind):
    model = tiny_model(kind)
    rows = [
        {"input_ids": [n, 5 + n, 6, 2], "labels": [n, 7, 8, 9, 2][-5:], "attention_mask": [1] * 4} for n in range(3, 40)
    ]
    if kind == "gpt2":
        rows = [row | {"labels": row["input_ids"]} for row in rows]
    advice = ask(model, rows, data_collator=collator_for(kind, model), depths=None)
    assert [probe.depth for probe in advice.probes] == ([7, 6, 4] if kind == "bart" else [3, 2, 0])
    if kind == "bart":
        assert probe_of(advice, 6).plan == FreezePlan(encoder_blocks=4, decoder_blocks=2)
    assert not any("without the prefix cache" in text for text in advice.reasons)


def test_a_classifier_is_advised_too():
    config = BertConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, vocab_size=32)
    rows = [{"input_ids": [n % 30, 5, 6], "attention_mask": [1] * 3, "labels": n % 2} for n in range(40)]
    advice = ask(BertForSequenceClassification(config), rows, depths=None)
    assert [probe.depth for probe in advice.probes] == [2, 1, 0]
    assert 0 < advice.validation_loss < 5


# ----------------------------------------------------------------------------------------------------- left as it was


def snapshot(model: torch.nn.Module) -> dict[str, Any]:
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = {
        name: (tensor.requires_grad, None if tensor.grad is None else tensor.grad.clone())
        for name, tensor in model.named_parameters()
    }
    modules = {
        name: (module.training, sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }
    return {"values": values, "states": states, "modules": modules}


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert now["modules"] == before["modules"]
    for name, tensor in before["values"].items():
        assert torch.equal(now["values"][name], tensor), name
    for name, (required, gradient) in before["states"].items():
        assert now["states"][name][0] == required, name
        assert gradient is None or torch.equal(now["states"][name][1], gradient), name
        assert (gradient is None) == (now["states"][name][1] is None), name


def prepared_model() -> LlamaForCausalLM:
    """With a gradient, a block frozen by hand, mixed modes, and its logits at supervised positions only."""
    model = small_llama()
    model.model.layers[2].mlp.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    model.train().model.layers[1].eval()
    supervised_logits_only(model)
    return model


@pytest.mark.parametrize("fault", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_and_the_random_states_are_as_they_were_also_after_a_fault(fault, monkeypatch):
    model = prepared_model()
    ask(model, steps=1, depths=[3])  # whatever a first forward leaves behind is there before as well
    before = snapshot(model)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    if fault is not None:
        calls = []
        losses = Probe.losses

        def break_down(self, *given):
            calls.append(1)
            if len(calls) == 4:  # in the middle of the second trial's evaluation, with trained weights
                raise fault("stop")
            return losses(self, *given)

        monkeypatch.setattr(Probe, "losses", break_down)
        with pytest.raises(fault, match="stop"):
            ask(model)
    else:
        ask(model)
    drawn = torch.rand(1).item(), random.random(), np.random.rand()
    assert_same(snapshot(model), before)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    assert drawn == (torch.rand(1).item(), random.random(), np.random.rand())


def test_the_same_call_gives_the_same_advice():
    one, other = ask(small_llama()).to_dict(), ask(small_llama()).to_dict()
    for probe in (*one["probes"], *other["probes"]):
        del probe["step_seconds"]
    assert one["probes"] == other["probes"]


# ------------------------------------------------------------------------------------------------------- what is told


def trial(depth: int, losses: list[float], *, rate: float = 1e-3, train: float = 1.0) -> Trial:
    return Trial(depth, rate, tuple(losses), train, 0.1)


def compare(*trials: Trial, before: tuple[float, float] = (4.0, 4.0)) -> Comparison:
    by_depth: dict[int, list[Trial]] = {}
    for one in trials:
        by_depth.setdefault(one.depth, []).append(one)
    return Comparison(by_depth, [1] * len(trials[0].held_out), before)


def test_the_deepest_depth_within_noise_of_the_best_is_chosen():
    noisy = [2.0, 1.0] * 8
    comparison = compare(trial(3, [1.0, 2.02] * 8), trial(2, noisy), trial(1, [value - 0.5 for value in noisy]))
    assert comparison.choose().depth == 1  # 0.5 a row, in every row: no noise hides that
    comparison = compare(trial(3, [1.0, 2.02] * 8), trial(2, noisy))
    assert comparison.choose().depth == 3  # 0.01 behind in the mean, and rows differ by 1
    behind, noise = comparison.behind(comparison.trials[3][0], comparison.best)
    assert behind == pytest.approx(0.01)
    assert noise == pytest.approx(1.01 / math.sqrt(16), rel=0.1)


def test_noise_weighs_rows_by_their_labels():
    comparison = Comparison({2: [trial(2, [2.0, 9.0])], 1: [trial(1, [1.0, 9.0])]}, [1, 9], (4.0, 4.0))
    assert comparison.behind(comparison.trials[2][0], comparison.trials[1][0])[0] == pytest.approx(0.1)
    assert comparison.loss(comparison.trials[1][0]) == pytest.approx(1.0)


def test_the_lowest_rate_within_noise_is_taken_and_lowered_for_a_longer_run():
    steady = [2.0] * 8
    comparison = compare(
        trial(2, [3.0] * 8, rate=1e-4),
        trial(2, [2.005] * 8, rate=3e-4),
        trial(2, steady),
        trial(2, [math.inf] * 8, rate=1),
    )
    assert comparison.choose_rate(2) == 3e-4
    assert longer_run_rate(1e-3, 16, 16) == 1e-3
    assert longer_run_rate(1e-3, 16, 8) == 1e-3
    assert longer_run_rate(1e-3, 10, 1000) == pytest.approx(1e-3 * 100**-0.32)


def test_a_plan_that_freezes_too_little_for_few_rows_is_told(taught):
    comparison = compare(trial(3, [2.0] * 8, train=1.9), trial(0, [3.0] * 8, train=0.5))
    found = plan_warnings(FreezePlan(decoder_blocks=0), read_anatomy(taught), comparison)
    assert len([text for text in found if "freezes too few blocks" in text]) == 1
    assert not plan_warnings(FreezePlan(decoder_blocks=3), read_anatomy(taught), comparison)


def test_a_plan_that_freezes_what_is_particular_to_the_task_is_told(taught):
    advice = ask(copy.deepcopy(taught), plan=FreezePlan(decoder_blocks=4))
    assert [probe.depth for probe in advice.probes] == [4, 3, 2]
    assert any("freezes the top block too" in text for text in advice.warnings)
    headless = FreezePlan(decoder_blocks=3, freeze=("lm_head",))
    advice = ask(copy.deepcopy(taught), plan=headless)
    assert any("freezes the head (lm_head.weight)" in text for text in advice.warnings)


def test_a_plan_with_a_gap_is_told_and_not_probed():
    anatomy = read_anatomy(tiny_model("bart"))
    half = FreezePlan(encoder_blocks=2, decoder_blocks=2)
    assert depth_of(half, anatomy) is None
    assert depth_of(FreezePlan(encoder_blocks=4, decoder_blocks=1), anatomy) == 5
    found = plan_warnings(half, anatomy, compare(trial(4, [1.0] * 8)))
    assert any("FreezePlan(encoder_blocks=4, decoder_blocks=0) freezes as many" in text for text in found)


def test_a_head_is_not_untied_for_a_probe():
    model = small_llama(tie_word_embeddings=True)
    advice = ask(model, plan=FreezePlan(decoder_blocks=3, tied_head="untie"))
    assert any("tied_head='untie' was probed as 'freeze'" in text for text in advice.reasons)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_training_that_does_not_help_is_told():
    advice = ask(small_llama(), learning_rates=[1e-9])
    assert any("No training of the probe helped" in text for text in advice.warnings)


def test_the_table_prints_and_the_values_go_to_json(taught):
    advice = ask(copy.deepcopy(taught), depths=None, learning_rates=None)
    text = str(advice)
    assert "which depth to freeze" in text
    assert f"Recommended: FreezePlan(decoder_blocks={advice.depth})" in text
    assert "Auto-RGN" in text
    assert "labels train" in text
    assert "Forecast" in text
    assert "compare whole runs with sweep_depths" in text.replace("\n", " ")
    assert advice.to_markdown().startswith("**LlamaForCausalLM")
    values = json.loads(json.dumps(advice.to_dict()))
    assert FreezePlan.from_dict(values["plan"]) == advice.plan
    assert values["gradients"]["parts"][0] == "embeddings"
    assert advice.seconds > 0
    shares = [probe.gradient_share for probe in advice.probes]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    deepest, *others = advice.probes
    assert len(deepest.rates) in (2, 3, 4)
    assert all(len(probe.rates) == 2 for probe in others)
    assert others[0].rates[1][0] == others[0].rates[0][0] / 2


def test_gradients_that_cannot_be_measured_cost_one_reason_and_no_advice(taught, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise FreezeError("a gradient is not finite")

    monkeypatch.setattr("hf_freeze.lens.block_gradients", refuse)
    advice = ask(copy.deepcopy(taught), depths=[3, 2])
    assert advice.gradients is None
    assert any("was not measured: a gradient is not finite" in text for text in advice.reasons)


def test_a_depth_that_does_not_fit_in_memory_is_not_probed(taught):
    needed = {probe.depth: probe.memory_bytes for probe in ask(copy.deepcopy(taught), depths=[3, 0]).probes}
    advice = ask(copy.deepcopy(taught), depths=[3, 0], memory_bytes=needed[3])
    assert probe_of(advice, 0).verdict == "needs more memory than there is"
    assert probe_of(advice, 0).learning_rate is None
    assert advice.depth == 3
    assert advice.gradients is None
    with pytest.raises(FreezeError, match=r"3 frozen blocks need about .* other depths more"):
        ask(copy.deepcopy(taught), depths=[3, 0], memory_bytes=1000)


def test_a_rate_that_diverges_is_passed_over_and_all_of_them_are_refused(taught, monkeypatch):
    loss = Probe._loss

    def overflow(self, batch):
        value = loss(self, batch)
        return value * math.nan if self.core.lm_head.weight.abs().max() > 100 else value

    monkeypatch.setattr(Probe, "_loss", overflow)
    advice = ask(copy.deepcopy(taught), learning_rates=[1e6, 1e-3])
    assert all(probe.learning_rate == 1e-3 for probe in advice.probes)
    assert math.isinf(advice.probes[0].rates[0][1])
    with pytest.raises(FreezeError, match="the loss was not finite after any of them"):
        ask(copy.deepcopy(taught), learning_rates=[1e6])


# ------------------------------------------------------------------------------------------- rows that do not fit


def test_rows_that_look_cut_or_have_no_label_are_told():
    rows = echo_rows(40, seed=1)
    for row in rows[:8]:
        row["labels"] = [-100] * 5
    for row in rows[20:]:
        for name in row:
            row[name] = row[name][2:]
    advice = ask(small_llama(), rows, data_collator=pad_to_five)
    assert any("rows are exactly 5 tokens long, the longest: they look cut" in text for text in advice.warnings)
    assert any("rows have no label" in text for text in advice.warnings)


def pad_to_five(features: Rows, label_filler: int = -100) -> dict[str, torch.Tensor]:
    fillers = {"input_ids": 0, "attention_mask": 0, "labels": label_filler}
    width = max(len(row["input_ids"]) for row in features)
    return {
        name: torch.tensor([row[name] + [fillers[name]] * (width - len(row[name])) for row in features])
        for name in fillers
    }


def test_labels_of_a_decoder_are_not_measured_by_the_mask_of_its_encoder():
    rows = [{"input_ids": [5] * (2 + n % 3), "attention_mask": [1] * (2 + n % 3), "labels": [6] * 4} for n in range(40)]
    advice = ask(tiny_model("bart"), rows, data_collator=pad_to_five, depths=[3, 2])
    assert not any("Padded places" in text for text in advice.warnings)


def test_labels_of_padding_are_told():
    rows = echo_rows(40, seed=1)
    for row in rows[20:]:
        for name in row:
            row[name] = row[name][1:]
    advice = ask(small_llama(), rows, data_collator=lambda features: pad_to_five(features, label_filler=0))
    assert any("Padded places have labels" in text for text in advice.warnings)


def test_rows_without_start_and_end_tokens_and_a_tokenizer_of_another_vocabulary_are_told():
    rows = [
        {name: [max(3, token) if token > 0 else token for token in row[name]] for name in row}
        for row in echo_rows(40, 1)
    ]
    advice = ask(small_llama(), rows, tokenizer=metaspace())
    told = " ".join(advice.warnings)
    assert "The tokenizer's ids go up to" in told
    assert "No end token (1, 2) is among the labels" in told
    assert "rows do not start with '<s>' (1)" in told
    model = tiny_model("gpt2")
    rows = [{"input_ids": [n, 5, 6, 2], "attention_mask": [1] * 4, "labels": [-100, 5, 6, 2]} for n in range(3, 40)]
    assert not any("token" in text for text in ask(model, rows, tokenizer=padding_tokenizer("gpt2")).warnings)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": []}, "a train_dataset of 0 rows; it needs 12 at least"),
        ({"rows": echo_rows(11, 1)}, "a train_dataset of 11 rows; it needs 12 at least"),
        ({"validation_dataset": echo_rows(7, 2)}, "a validation_dataset of 7 rows; it needs 8 at least"),
        ({"rows": iter(echo_rows(40, 1))}, "as train_dataset; it draws rows by their number"),
        ({"rows": [row | {"labels": [-100] * 5} for row in echo_rows(40, 1)]}, "every label of the 12 training rows"),
        ({"rows": [row | {"input_ids": [99] * 5} for row in echo_rows(40, 1)]}, "the id 99 in input_ids"),
        ({"rows": [row | {"labels": [-1] * 5} for row in echo_rows(40, 1)]}, "the id -1 in labels"),
        ({"depths": []}, "no depth; give some of 0 to 4"),
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"validation_rows": 4}, "validation_rows=4; it is a whole number, 8 or more"),
        ({"epochs": 0}, "epochs=0"),
        ({"precision": "fp8"}, "precision='fp8'"),
        ({"learning_rates": []}, "learning_rates="),
        ({"data_collator": lambda features: [features]}, "a collator that returns a list"),
    ],
)
def test_what_cannot_be_asked_is_refused(given, message):
    with pytest.raises(FreezeError, match=message):
        ask(small_llama(), **given)


def test_a_depth_beyond_the_model_is_refused():
    with pytest.raises(PlanError, match=r"has 4 blocks\. Use 0 to 4"):
        ask(small_llama(), depths=[3, 5])


def test_a_model_that_cannot_be_probed_is_refused():
    with pytest.raises(FreezeError, match="with 1 block; there is no depth to choose"):
        ask(small_llama(blocks=1))
    model = small_llama()
    freeze(model, FreezePlan(decoder_blocks=2))
    with pytest.raises(FreezeError, match=r"Call thaw\(model\) first"):
        ask(model)
    thaw(model)
    ask(model, steps=1, depths=[3])
    with torch.device("meta"):
        abroad = small_llama()
    with pytest.raises(FreezeError, match="on the meta device"):
        ask(abroad)
    with pytest.raises(FreezeError, match="it returns no loss"):
        ask(LlamaModel(small_llama().config), [{"input_ids": row["input_ids"]} for row in echo_rows(40, 1)])
    long_rows = [{name: value * 4 for name, value in row.items()} for row in echo_rows(40, 1)]
    with pytest.raises(FreezeError, match="a row of 20 tokens; LlamaForCausalLM has 16 positions"):
        ask(small_llama(), long_rows)


def test_a_loss_that_is_not_finite_is_refused_before_anything_is_trained():
    model = small_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(FreezeError, match=r"whose loss is nan .* before any training"):
        ask(model)


def test_a_group_of_processes_is_refused(monkeypatch):
    for name, answer in (("is_available", True), ("is_initialized", True), ("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda answer=answer: answer)
    with pytest.raises(FreezeError, match="in a group of 2 processes"):
        ask(small_llama())


# ------------------------------------------------------------------------------------------------------- the recipe


@pytest.fixture
def run_recipe(monkeypatch, capsys):
    """The recipe with the arguments of a shell: its exit code, what it printed and what it complained of."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*given: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *map(str, given)])
        code = exit_code(load_script(RECIPE).main)
        return code, *capsys.readouterr()

    return run


def test_the_recipe_prints_the_advice_and_writes_the_plan(tmp_path, run_recipe):
    given = ["--steps", 2, "--train_rows", 40, "--precision", "fp32", "--output_dir", tmp_path / "out"]
    code, out, err = run_recipe("--model_name_or_path", tiny_folder("llama", tmp_path), *given)
    assert code == 0, err
    assert "Recommended: FreezePlan(decoder_blocks=" in out
    plan = FreezePlan.from_pretrained(tmp_path / "out")
    assert plan.to_dict() == json.loads((tmp_path / "out" / "advice.json").read_text())["plan"]


def test_what_the_recipe_cannot_do_is_told_in_a_line(run_recipe):
    code, _, err = run_recipe("--depths", "0,x")
    assert code == 1
    assert err.strip().splitlines()[-1].startswith("error: '0,x' was given; use numbers")
