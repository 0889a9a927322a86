"""Training from the prefix cache is plain training: the same losses and weights, and no module of the prefix runs."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Seq2SeqTrainer

from hf_freeze import FreezePlan, PrefixCache, freeze, supervised_logits_only, thaw, verify_frozen
from hf_freeze.errors import CacheDamaged, CannotCache
from hf_freeze.prefix.rows import PREFIX_KEY
from tests.prefix.cases import (
    TWO_STACKS,
    LeftPadding,
    collator_for,
    default_plan,
    frozen_model,
    review_rows,
    trainer_losses,
)
from tests.tiny import tiny_model

KINDS = ["llama", "gpt2", "bart", "t5"]


def built(model: nn.Module, rows: Any, collator: Any, folder: Path, **given: Any) -> PrefixCache:
    return PrefixCache.build(model, rows, collator, cache_dir=folder / "cache", progress=False, **given)


def cached(kind: str, folder: Path, **given: Any) -> tuple[Any, list[Any], PrefixCache]:
    """A model, its rows and its cache."""
    model, rows = frozen_model(kind), review_rows(kind)
    return model, rows, built(model, rows, collator_for(kind, model), folder, **given)


def assert_same_training(plain: list[float], cached: list[float], one: nn.Module, other: nn.Module) -> None:
    assert len(plain) == len(cached) >= 4
    torch.testing.assert_close(torch.tensor(cached), torch.tensor(plain), rtol=1e-5, atol=0)
    for (name, ours), (_, theirs) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


def train_both(
    kind: str,
    folder: Path,
    *,
    plan: FreezePlan | None = None,
    pair: tuple[Any, Any] | None = None,
    collators: Any = None,
    release: bool = False,
    **given: Any,
) -> PrefixCache:
    """Trains a model plainly and its twin from a cache, every batch of it: the same losses and weights.

    Args:
        pair: The two; else they are frozen by the plan.
        collators: For a model, its collator.
        given: To `trainer_losses`.
    """
    plain, cached = pair or (frozen_model(kind, plan=plan), frozen_model(kind, plan=plan))
    collators, rows = collators or partial(collator_for, kind), review_rows(kind)
    cache = built(cached, rows, collators(cached), folder)
    assert not release or cache.release_prefix() > 0
    wanted, _ = trainer_losses(plain, rows, collators(plain), folder, **given)
    got, trainer = trainer_losses(cached, rows, cache.collator, folder, **given)
    if release:
        victim = next(p for p in cache.prefix.replaced[-1].module.parameters() if not p.requires_grad)
        assert victim.isnan().all(), "away"
        assert victim.untyped_storage().nbytes() <= 8
        trainer.save_model(str(folder / "saved"))
    assert_same_training(wanted, got, plain, cached)
    assert (cache.batches_used, cache.batches_unused) == (len(got), 0)
    return cache


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "given", [{}, {"gradient_accumulation_steps": 4, "max_steps": 6}, {"dataloader_num_workers": 2}], ids=str
)
def test_a_stock_trainer_sees_the_same_losses_and_weights(kind: str, given: dict[str, Any], tmp_path: Path) -> None:
    cache = train_both(kind, tmp_path, **given)
    cache.close()
    verify_frozen(cache.model)


@pytest.mark.parametrize("kind", KINDS)
def test_no_leaf_module_of_the_prefix_is_called_on_a_cached_batch(kind: str, tmp_path: Path) -> None:
    model, rows, cache = cached(kind, tmp_path)
    model.train()
    called: list[str] = []
    for part in cache.prefix.replaced:
        for name, module in part.module.named_modules():
            module.register_forward_hook(lambda *_, name=f"{part.name}.{name}": called.append(name))
    model(**cache.collator(rows[:3])).loss.backward()
    called.clear()  # the first batch's stored states, and those after a hook was added, are compared with fresh ones
    model(**cache.collator(rows[:3])).loss.backward()
    assert called == []
    model(**cache.collator(review_rows(kind, seed=9)[:3]))  # unknown rows run the whole model
    assert called


@pytest.mark.parametrize(("kind", "positions"), [("llama", False), ("llama", True), ("gpt2", True)])
def test_padding_on_the_left_trains_the_same(kind: str, positions: bool, tmp_path: Path) -> None:
    train_both(kind, tmp_path, collators=lambda model: LeftPadding(positions))


@pytest.mark.parametrize("kind", TWO_STACKS)
def test_a_partly_frozen_encoder_is_cached_alone(kind: str, tmp_path: Path) -> None:
    cache = train_both(kind, tmp_path, plan=FreezePlan(encoder_blocks=2, decoder_blocks=2), max_steps=6)
    assert cache.cuts == (("encoder", 2),)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_head_and_the_final_norm_may_train(kind: str, tmp_path: Path) -> None:
    encoder = {"encoder_blocks": "all"} if kind in TWO_STACKS else {}
    plan = FreezePlan.from_dict(FreezePlan(tied_head="untie").to_dict() | encoder | {"decoder_blocks": "all"})
    train_both(kind, tmp_path, plan=plan, max_steps=4)


def test_bf16_training_is_the_same_and_a_plain_call_afterwards_runs_the_whole_model(tmp_path: Path) -> None:
    rows = review_rows("llama")
    plain, cached = frozen_model("llama"), frozen_model("llama")
    cache = built(cached, rows, collator_for("llama", cached), tmp_path, precision="bf16")
    wanted, _ = trainer_losses(plain, rows, collator_for("llama", plain), tmp_path, bf16=True, max_steps=8)
    got, _ = trainer_losses(cached, rows, cache.collator, tmp_path, bf16=True, max_steps=8)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=2e-3, atol=0)
    assert cache.batches_used == 8
    batch = collator_for("llama", cached)(rows[:2])
    torch.testing.assert_close(cached.eval()(**batch).loss, plain.eval()(**batch).loss, rtol=2e-2, atol=0)


def test_another_precision_than_the_caches_is_refused(tmp_path: Path) -> None:
    model, rows, cache = cached("llama", tmp_path)
    with pytest.raises(CannotCache, match="under autocast to torch"), torch.autocast("cpu", torch.bfloat16):
        model(**cache.collator(rows[:2]))
    assert model(**cache.collator(rows[:2])).loss.isfinite()


@pytest.mark.parametrize("kind", TWO_STACKS)
def test_evaluation_with_generate_and_the_best_model_at_the_end_work(kind: str, tmp_path: Path) -> None:
    rows, validation = review_rows(kind), review_rows(kind, 6, seed=5)
    results = []
    for with_cache in (False, True):
        model = frozen_model(kind)
        collator: Any = collator_for(kind, model)
        if with_cache:
            cache = built(model, rows, collator, tmp_path)
            cache.add(validation)
            collator = cache.collator
        losses, trainer = trainer_losses(
            model,
            rows,
            collator,
            tmp_path / str(with_cache),
            trainer=Seq2SeqTrainer,
            eval_dataset=validation,
            predict_with_generate=True,
            generation_max_length=8,
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=3,
            save_steps=3,
            max_steps=6,
            load_best_model_at_end=True,
        )
        evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        predicted = trainer.predict(validation)
        results.append((losses, evaluated, predicted.predictions.tolist()))
    torch.testing.assert_close(torch.tensor(results[0][0]), torch.tensor(results[1][0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(results[0][1]), torch.tensor(results[1][1]), rtol=1e-5, atol=0)
    assert results[0][2] == results[1][2]
    assert cache.batches_used > 6  # the validation batches too


def test_a_bare_loop_and_generate_take_a_cached_batch(tmp_path: Path) -> None:
    model, rows, cache = cached("llama", tmp_path)
    batch = cache.collator(rows[:2])
    assert PREFIX_KEY in batch
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model(**batch).loss
    before.backward()
    optimizer.step()
    assert model(**batch).loss < before
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    generated = model.eval().generate(**inputs, max_new_tokens=2, do_sample=False)
    whole = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=2,
                           do_sample=False)  # fmt: skip
    assert torch.equal(generated, whole)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_copy_of_the_model_replays_by_itself(kind: str, duplicate: Any, tmp_path: Path) -> None:
    model, rows, cache = cached(kind, tmp_path)
    twin = duplicate(model).eval()
    model.eval()
    called: list[nn.Module] = []
    for part in cache.prefix.replaced:
        part.module.register_forward_hook(lambda module, *_: called.append(module))
    batch = cache.collator(rows[:3])
    assert torch.equal(twin(**batch).loss, model(**batch).loss)
    called.clear()  # the first batch's stored states are compared with fresh ones
    assert torch.equal(twin(**batch).loss, model(**batch).loss)
    assert called == []
    with torch.no_grad():
        next(p for p in twin.parameters() if p.requires_grad).mul_(1.5)
    assert not torch.equal(twin(**cache.collator(rows[:3])).logits, model(**cache.collator(rows[:3])).logits)


@pytest.mark.parametrize("order", ["before", "after"])
def test_adapters_on_the_upper_blocks_train_the_same(order: str, tmp_path: Path) -> None:
    def adapted() -> nn.Module:
        model = frozen_model("llama", dropout=False) if order == "before" else tiny_model("llama")
        torch.manual_seed(3)
        peft = get_peft_model(
            model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[3], lora_dropout=0.1)
        )
        if order == "after":
            freeze(peft, default_plan("llama"))
        return peft

    train_both("llama", tmp_path, pair=(adapted(), adapted()), max_steps=8)


@pytest.mark.parametrize("kind", ["llama", "t5", "bart"])
def test_checkpointed_blocks_above_the_cut_give_the_same_losses(kind: str, tmp_path: Path) -> None:
    rows, plain, cached = review_rows(kind), frozen_model(kind), frozen_model(kind)
    cache = built(cached, rows, collator_for(kind, cached), tmp_path)
    wanted, _ = trainer_losses(plain, rows, collator_for(kind, plain), tmp_path, max_steps=6)
    got, _ = trainer_losses(cached, rows, cache.collator, tmp_path, max_steps=6, activation_checkpointing=True)
    assert_same_training(wanted, got, plain, cached)
    assert cache.batches_used == 6


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_supervised_logits_and_the_cache_together_train_the_same(kind: str, tmp_path: Path) -> None:
    pair = frozen_model(kind), frozen_model(kind)
    assert supervised_logits_only(pair[1]).active
    train_both(kind, tmp_path, pair=pair, gradient_accumulation_steps=2, max_steps=6)


def test_a_compiled_model_trains_from_the_cache(tmp_path: Path) -> None:
    rows = review_rows("llama")
    plain, cached = frozen_model("llama", dropout=False), frozen_model("llama", dropout=False)
    cache = built(cached, rows, collator_for("llama", cached), tmp_path)
    compiled = torch.compile(cached, backend="eager")
    for start in (0, 3, 6):
        batch = rows[start : start + 3]
        torch.testing.assert_close(
            compiled(**cache.collator(batch)).loss, plain(**collator_for("llama", plain)(batch)).loss, rtol=1e-5, atol=0
        )
    assert cache.batches_used == 3


def test_asking_for_all_hidden_states_runs_the_whole_model(tmp_path: Path) -> None:
    model, rows, cache = cached("llama", tmp_path)
    model.eval()
    whole = model(**collator_for("llama", model)(rows[:2]), output_hidden_states=True)
    asked = model(**cache.collator(rows[:2]), output_hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.hidden_states, asked.hidden_states, strict=True))


def test_a_forward_that_fails_leaves_the_model_whole(tmp_path: Path) -> None:
    model, rows, cache = cached("llama", tmp_path)
    model.eval()
    batch = cache.collator(rows[:2])
    handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    handle.remove()
    plain = collator_for("llama", model)(rows[:2])
    assert torch.equal(model(**plain).logits, frozen_model("llama").eval()(**plain).logits)


@pytest.mark.parametrize("then", ["a state dict", "a plain batch", "a cached batch"])
def test_an_interrupt_from_the_keyboard_leaves_the_model_whole(then: str, tmp_path: Path) -> None:
    model, rows, cache = cached("llama", tmp_path)
    model.eval()
    names = set(model.state_dict())

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**cache.collator(rows[:2]))
    handle.remove()
    plain = collator_for("llama", model)(rows[4:6])
    if then == "a state dict":
        assert set(model.state_dict()) == names
    batch = cache.collator(rows[4:6]) if then == "a cached batch" else plain
    torch.testing.assert_close(model(**batch).loss, frozen_model("llama").eval()(**plain).loss, rtol=1e-6, atol=0)
    assert set(model.state_dict()) == names


def test_no_key_value_cache_is_filled_from_a_cached_batch(tmp_path: Path) -> None:
    rows = review_rows("llama")
    model = frozen_model("llama").eval()
    assert model.config.use_cache
    cache = built(model, rows, collator_for("llama", model), tmp_path)
    assert model(**cache.collator(rows[:2])).past_key_values is None
    assert model(**collator_for("llama", model)(rows[:2])).past_key_values is not None


def test_open_takes_a_cache_that_is_there_and_says_what_is_not(tmp_path: Path) -> None:
    rows = review_rows("llama")
    model = frozen_model("llama").eval()
    given: dict[str, Any] = {"cache_dir": tmp_path / "cache", "progress": False}
    with pytest.raises(CacheDamaged, match=r"No prefix cache in .* was built for this model as it is\. Use"):
        PrefixCache.open(model, rows, collator_for("llama", model), **given)
    built(model, rows, collator_for("llama", model), tmp_path).close()
    with pytest.raises(CacheDamaged, match="The nearest one there differs in: precision"):
        PrefixCache.open(model, rows, collator_for("llama", model), precision="bf16", **given)
    with pytest.raises(CacheDamaged, match=r"lacks 2 of 26 rows, e\.g\. row 24"):
        PrefixCache.open(model, rows + review_rows("llama", 2, seed=4), collator_for("llama", model), **given)
    cache = PrefixCache.open(model, rows, collator_for("llama", model), **given)
    assert (cache.report.computed_rows, len(cache.store)) == (0, len(rows))
    plain = collator_for("llama", model)(rows[:3])
    torch.testing.assert_close(model(**cache.collator(rows[:3])).loss, model(**plain).loss, rtol=1e-5, atol=0)


def test_training_that_finds_no_row_in_the_cache_warns(tmp_path: Path) -> None:
    model, _, cache = cached("llama", tmp_path)
    model.train()
    strange = review_rows("llama", seed=8)[:2]
    for _ in range(9):
        model(**cache.collator(strange))
    with pytest.warns(UserWarning, match="The first 10 training batches hold rows that are not in the prefix cache"):
        model(**cache.collator(strange))
    assert (cache.batches_used, cache.batches_unused) == (0, 10)


def test_positions_that_follow_the_longest_row_of_a_batch_are_declined(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    rows = review_rows("llama")
    for limit, fits in ((64, True), (12, False)):
        model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=limit)
        freeze(model, default_plan("llama"))
        if fits:
            built(model, rows, collator_for("llama", model), tmp_path).close()
        else:
            with pytest.raises(
                CannotCache, match=r"rotary positions .* change for whole batches that hold more than 12"
            ):
                built(model, rows, collator_for("llama", model), tmp_path)


def test_another_scaling_of_a_frozen_adapter_is_another_cache(tmp_path: Path) -> None:
    rows = review_rows("llama")
    folders = []
    for alpha in (4, 8):
        torch.manual_seed(0)
        model = get_peft_model(
            tiny_model("llama"),
            LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], init_lora_weights=False),
        )
        freeze(model, default_plan("llama"))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.3" in name and "lora" in name)
        cache = built(model, rows, collator_for("llama", model), tmp_path)
        assert cache.report.computed_rows == len(rows)
        folders.append(cache.store.folder)
    assert folders[0] != folders[1]


def test_one_pass_serves_shallower_plans(tmp_path: Path) -> None:
    rows = review_rows("t5")
    shallower = [FreezePlan(encoder_blocks="all", decoder_blocks=1), FreezePlan(encoder_blocks=2, decoder_blocks=0)]
    model = frozen_model("t5")
    built(model, rows, collator_for("t5", model), tmp_path, also=shallower).close()
    for plan in shallower:
        thaw(model)
        freeze(model, plan)
        plain = frozen_model("t5", plan=plan)
        cache = built(model, rows, collator_for("t5", model), tmp_path)
        assert cache.report.computed_rows == 0
        wanted = plain.eval()(**collator_for("t5", plain)(rows[:3])).loss
        torch.testing.assert_close(model.eval()(**cache.collator(rows[:3])).loss, wanted, rtol=1e-6, atol=0)
        cache.close()
    with pytest.raises(CannotCache, match="Freeze the deepest plan first"):
        built(model, rows, collator_for("t5", model), tmp_path, also=[default_plan("t5")])


# ------------------------------------------------------------------------------------------------------------- release


@pytest.mark.parametrize("kind", KINDS)
def test_a_released_prefix_trains_the_same_and_comes_back_the_same_bits(kind: str, tmp_path: Path) -> None:
    pair = frozen_model(kind), frozen_model(kind)
    before = {name: tensor.clone() for name, tensor in pair[1].state_dict().items()}
    train_both(kind, tmp_path, pair=pair, max_steps=6, release=True)
    frozen = {name for name, p in pair[1].named_parameters() if not p.requires_grad}
    after = pair[1].state_dict()
    assert [name for name in frozen & after.keys() if not torch.equal(after[name], before[name])] == []
    verify_frozen(pair[1])


def test_whoever_needs_the_released_prefix_gets_it(tmp_path: Path) -> None:
    rows = review_rows("llama")
    model = frozen_model("llama").eval()
    plain = collator_for("llama", model)(rows[:2])
    wanted = model(**plain).logits
    cache = built(model, rows, collator_for("llama", model), tmp_path)
    cache.release_prefix()

    def away() -> bool:
        return bool(model.model.layers[0].mlp.up_proj.weight.isnan().any())

    for need in (
        lambda: model(**plain),
        lambda: model.generate(input_ids=plain["input_ids"], max_new_tokens=1),
        lambda: model.state_dict(),
        lambda: model.load_state_dict(model.state_dict()),
        lambda: verify_frozen(model),
        lambda: cache.restore_prefix(),
        lambda: cache.close(),
    ):
        if cache._released is not None:
            model(**cache.collator(rows[:2]))
            assert away()
        need()
        assert not away()
        assert torch.equal(model(**plain).logits, wanted)


@pytest.mark.parametrize("kind", ["llama", "bart", "t5"])
def test_rows_as_short_as_the_sample_has_rows_are_cached(kind: str, tmp_path: Path) -> None:
    """Titles of three tokens: the number of rows and of target tokens are told apart all the same."""
    model = frozen_model(kind, dropout=False)
    two_stacks = kind in TWO_STACKS
    rows = [
        {"input_ids": [5 + n, 6, 7, 8][: 4 if two_stacks else 3], "labels": [9, 10 + n, 2],
         "attention_mask": [1] * (4 if two_stacks else 3)}
        for n in range(6)
    ]  # fmt: skip
    collator = collator_for(kind, model)
    cache = PrefixCache.build(model, rows, collator, cache_dir=tmp_path, progress=False)
    model.train()
    plain = model(**collator(rows[:4])).loss
    torch.testing.assert_close(model(**cache.collator(rows[:4])).loss, plain, rtol=1e-5, atol=0)
    assert cache.batches_used == 1
