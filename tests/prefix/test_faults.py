"""What cannot be cached exactly is refused with the reason, before the build or at the batch where it shows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_freeze import FreezePlan, PrefixCache, freeze, thaw, verify_frozen
from hf_freeze.errors import CannotCache, FreezeError, FrozenWeightsChanged
from tests.tiny import tiny_tokenizer
from tests.zoo import VOCAB, build, shrink

LENGTHS = (9, 16, 12, 7, 16, 11)
DEEP = FreezePlan(decoder_blocks=3)


def token_rows(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


class Padding:
    """A user's collator: pads on a side, with a mask and positions or without."""

    def __init__(self, side: str = "right", *, mask: bool = True, positions: bool = False) -> None:
        self.side, self.mask, self.positions = side, mask, positions

    def _pad(self, rows: list[torch.Tensor], fill: int) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill, padding_side=self.side)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [torch.as_tensor(row["input_ids"]) for row in features]
        labels = [torch.as_tensor(row["labels"]) for row in features]
        batch = {"input_ids": self._pad(ids, 0), "labels": self._pad(labels, -100)}
        if self.mask:
            batch["attention_mask"] = self._pad([torch.ones_like(row) for row in ids], 0)
        if self.positions:
            batch["position_ids"] = self._pad([torch.arange(len(row)) for row in ids], 0)
        return batch


def model_of(kind: str = "llama", plan: FreezePlan | None = DEEP, **given: Any) -> PreTrainedModel:
    """Four blocks; frozen where there is a plan."""
    model = build(kind, **given)
    if plan is not None:
        freeze(model, plan)
    return model.train()


@pytest.fixture
def make(tmp_path) -> Callable[..., PrefixCache]:
    """Builds into one folder."""

    def build_cache(model: nn.Module, rows: Any = None, collator: Any = None, **given: Any) -> PrefixCache:
        collator = collator or Padding()
        return PrefixCache.build(
            model, token_rows() if rows is None else rows, collator, cache_dir=tmp_path, progress=False, **given
        )

    return build_cache


def loss_of(model: nn.Module, batch: dict[str, Any]) -> float:
    torch.manual_seed(7)  # dropout above the cut falls alike
    loss: torch.Tensor = model(**batch).loss
    return loss.item()


def assert_replays(cache: PrefixCache, rows: Any, collator: Any = None) -> None:
    """A batch of these rows runs from the cache, with the plain loss."""
    collator, used = collator or Padding(), cache.batches_used
    plain = loss_of(cache.model, collator(rows))
    assert loss_of(cache.model, cache.collator(rows)) == pytest.approx(plain, rel=1e-5)
    assert cache.batches_used == used + 1


def assert_left_alone(model: nn.Module) -> None:
    """No hook, no attribute, no placeholder: as before `build`."""
    assert not any("replay" in name for module in model.modules() for name in module.__dict__)
    assert not any(type(module).__name__ == "Placeholder" for module in model.modules())
    assert not any("prefix" in getattr(hook, "__module__", "") for module in model.modules()
                   for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))  # fmt: skip


def assert_refused(cache: PrefixCache, match: str, model: nn.Module | None = None) -> None:
    """A cached batch is refused, the modules stand where they stood, and a batch without states still runs."""
    model = model or cache.model
    batch = cache.collator(token_rows()[:3])
    assert "prefix_states" in batch
    places = dict(model.named_modules())
    used = cache.batches_used
    with pytest.raises(CannotCache, match=match):
        model(**batch)
    assert cache.batches_used == used
    assert dict(model.named_modules()) == places
    assert torch.isfinite(model(**Padding()(token_rows()[:3])).loss)


# ----------------------------------------------------------------------------------------------- plans without a prefix


PLANS: dict[str, tuple[str, FreezePlan | None, str]] = {
    "no block": ("llama", FreezePlan(decoder_blocks=0), r"Nothing of this LlamaForCausalLM can be cached: .*block 0"),
    "the lowest block trains": (
        "llama", FreezePlan(decoder_blocks=3, train=(r"model\.layers\.0",)), r"can be cached: .*Freeze the embeddings",
    ),
    "the embeddings train": ("llama", FreezePlan(embeddings=False), r"can be cached: the embeddings train \(.*embed"),
    "tied embeddings train": (
        "gpt2", FreezePlan(embeddings=False, tied_head="train"), r"can be cached: the embeddings train \(.*wte",
    ),
    "frozen blocks keep their dropout": (
        "gpt2", FreezePlan(frozen_mode="train"), r"frozen_mode='train', which keeps dropout on.*Use frozen_mode='eval'",
    ),
    "never frozen": ("llama", None, r"LlamaForCausalLM that was not frozen\. Call freeze\(model, plan\) first"),
    "an encoder that trains": (
        "bart", FreezePlan(encoder_blocks=0, decoder_blocks=3), r"Nothing of this BartForConditionalGeneration",
    ),
}  # fmt: skip


def _thawed_again() -> PreTrainedModel:
    model = model_of()
    thaw(model)
    return model


def _frozen_by_hand() -> PreTrainedModel:
    model: Any = model_of(plan=None)
    model.model.layers[0].requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    return model  # type: ignore[no-any-return]


def _on_meta() -> PreTrainedModel:
    with torch.device("meta"):
        model = build("llama")
    freeze(model, DEEP)
    return model


def _in_parts() -> PreTrainedModel:
    model: Any = model_of()
    next(model.parameters()).placements = ()  # as a DTensor has them
    return model  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    **{what: ((lambda kind=kind, plan=plan: model_of(kind, plan)), reason)
       for what, (kind, plan, reason) in PLANS.items()},
    "thawed": (_thawed_again, "was not frozen"),
    "frozen by hand only": (_frozen_by_hand, "was not frozen"),
    "on the meta device": (_on_meta, r"on the meta device; it has no weights to compute with\. Load them first"),
    "a dropout of the stack stays on": (lambda: model_of("prophetnet", FreezePlan(), dropout=0.3),
        r"other states in training than in evaluation .*Set that dropout in model\.conf"),
    "cut into parts for several ranks": (_in_parts, r"cut into parts for several ranks \(tensor parallel\)"),
}  # fmt: skip


@pytest.mark.parametrize("what", MODELS)
def test_a_model_without_a_prefix_is_refused_and_left_alone(make, what):
    make_model, reason = MODELS[what]
    model = make_model()
    with pytest.raises(CannotCache, match=reason):
        make(model)
    assert_left_alone(model)


def test_a_dropout_of_the_stack_that_is_switched_off_is_cached(make):
    model = model_of("prophetnet", FreezePlan(), dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    assert_replays(make(model), token_rows()[:3])


def test_a_precision_that_does_not_exist_is_refused(make):
    with pytest.raises(FreezeError, match=r"precision='int8'; it is one of None, 'fp32', 'bf16', 'fp16'"):
        make(model_of(), precision="int8")


def test_a_second_cache_on_one_model_is_refused_until_the_first_is_closed(make):
    model = model_of()
    first = make(model)
    with pytest.raises(FreezeError, match=r"already\. Call its close\(\) first, or add\(dataset\)"):
        make(model)
    first.close()
    assert_left_alone(model)
    assert make(model).report.computed_rows == 0


# -------------------------------------------------------------------------------------------------- datasets, collators


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(token_rows())


class Unsized:
    def __getitem__(self, row: int) -> Any:
        return token_rows()[row]


class Augmented:
    def __len__(self) -> int:
        return 6

    def __getitem__(self, row: int) -> Any:
        return token_rows((10,), seed=int(torch.randint(1000, ())))[0]


ITERATED = r"can only be iterated has rows that cannot be looked up again\. Use one with"
DATA: dict[str, tuple[Any, Any, str]] = {
    "a torch stream": (Stream(), None, ITERATED),
    "no length": (Unsized(), None, ITERATED),
    "a generator": ((row for row in token_rows()), None, ITERATED),
    "a stream of datasets": (
        datasets.IterableDataset.from_generator(lambda: iter(token_rows())), None, ITERATED,
    ),
    "no rows": ([], None, r"a dataset without rows\. Give it the training rows"),
    "rows that answer twice differently": (Augmented(), None, "two different answers for row"),
    "padding without a mask": (
        None, Padding(mask=False), r"collated among others: its padding cannot be told.*return an attention_mask",
    ),
    **{f"a collator that returns a {type(answer).__name__}": (
        None, lambda features, answer=answer: answer,
        r"a collator that returns a \w+; it must return the model's keyword arguments",
    ) for answer in ([1, 2], torch.ones(2), ("a", "b"))},
    "a loss that looks at left padding": (
        None, Padding("left", positions=True),
        r"above the cut looks at padding: loss differs by .* when the padding's states",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DATA)
def test_rows_and_collators_that_cannot_be_cached_are_refused(make, what):
    rows, collator, reason = DATA[what]
    model = model_of()
    with pytest.raises(CannotCache, match=reason):
        make(model, rows, collator)
    assert_left_alone(model)


def test_random_masking_is_refused(make):
    config = shrink(CONFIG_MAPPING["bert"])
    torch.manual_seed(0)
    model = BertForMaskedLM(config)
    freeze(model, DEEP)
    tokenizer = tiny_tokenizer("bart")
    tokenizer.add_special_tokens({"mask_token": "<s>"})
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.3)
    rows = [{"input_ids": row["input_ids"].tolist()} for row in token_rows()]
    with pytest.raises(CannotCache, match=r"two different answers for row \d+ \(random masking, augmentation"):
        make(model, rows, collator)
    assert_left_alone(model)


def test_a_fixed_masking_is_cached(make):
    torch.manual_seed(0)
    model = BertForMaskedLM(shrink(CONFIG_MAPPING["bert"]))
    freeze(model, DEEP)
    assert_replays(make(model.train()), token_rows()[:3])


def test_a_collator_that_answers_twice_differently_for_one_row_never_gives_a_wrong_state(make):
    rows = token_rows((8,) * 64)
    victim = 37  # no row of the sample
    calls = 0

    def flip_once(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        nonlocal calls
        batch = Padding()(features)
        for place, row in enumerate(features):
            if row is rows[victim]:
                calls += 1
                if calls == 2:  # the states are computed then
                    batch["input_ids"][place] = 5
        return batch

    model = model_of()
    try:
        cache = make(model, rows, flip_once)
    except CannotCache:
        return
    assert_replays(cache, [rows[victim]])


def test_a_collator_without_a_mask_is_cached_where_nothing_is_padded(make):
    model = model_of()
    rows = token_rows((8,) * 4)
    assert_replays(make(model, rows, Padding(mask=False)), rows, Padding(mask=False))


def test_rows_that_are_padded_without_a_mask_outside_of_the_sample_never_give_a_wrong_state(make):
    lengths = [8] * 64
    lengths[37] = 5
    rows = token_rows(tuple(lengths))
    model = model_of()
    try:
        cache = make(model, rows, Padding(mask=False))
    except CannotCache:
        return
    for drawn in ([rows[37]], [rows[36], rows[37]], rows[:3]):
        plain = loss_of(model, Padding(mask=False)(drawn))
        assert loss_of(model, cache.collator(drawn)) == pytest.approx(plain, rel=1e-5)


def test_an_absolute_position_model_with_left_padding_is_refused_without_position_ids(make):
    model = model_of("gpt2")
    with pytest.raises(
        CannotCache, match=r"other states among longer rows than alone.*needs padding on the right, or p"
    ):
        make(model, collator=Padding("left"))
    assert_left_alone(model)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_with_position_ids_padding_on_either_side_is_cached(make, kind, side):
    model = model_of(kind)
    rows = token_rows()
    for row in rows:
        row["labels"][0] = -100  # under left padding, the padding before it would predict it
    assert_replays(make(model, rows, Padding(side, positions=True)), rows[:3], Padding(side, positions=True))


@pytest.mark.parametrize("lengths", [(9,), (9, 9), (2, 9), (9, 8)], ids=str)
def test_a_dataset_of_a_row_or_two_is_cached(make, lengths):
    rows = token_rows(lengths)
    cache = make(model_of(), rows)
    assert_replays(cache, rows)
    assert cache.report.computed_rows == len(rows)


def test_other_rows_are_computed_anew_and_those_known_are_not(make):
    rows = token_rows()
    model = model_of()
    make(model, rows[:4]).close()
    cases: list[tuple[str, list[Any], int]] = [
        ("reordered", rows[3::-1], 0),
        ("removed", rows[1:3], 0),
        ("twice", rows[:4] + rows[:2], 0),
        ("added", [rows[5], *rows], 2),
        ("one token changed", [{"input_ids": rows[0]["input_ids"] ^ 1, "labels": rows[0]["labels"]}], 1),
        ("labels changed", [{"input_ids": rows[0]["input_ids"], "labels": rows[1]["input_ids"][:9]}], 0),
    ]
    for what, given, computed in cases:
        cache = make(model, given)
        assert (what, cache.report.computed_rows, cache.report.rows) == (what, computed, len(given))
        cache.close()


def test_another_tokenizers_rows_are_not_found_and_run_the_whole_model(make):
    model = model_of()
    cache = make(model)
    other = token_rows(seed=1)
    batch = cache.collator(other[:3])
    assert "prefix_states" not in batch
    with pytest.warns(UserWarning, match="The first 2 training batches hold rows that are not in the prefix cache"):
        assert loss_of(model, batch) == loss_of(model, Padding()(other[:3]))
    assert (cache.batches_used, cache.batches_unused) == (0, 2)
    assert "prefix_states" not in cache.collator([token_rows()[0], other[0]]), "one row that is missing is enough"
    cache.close()
    assert make(model, other).report.computed_rows == len(other)


def test_added_rows_are_found(make):
    cache = make(model_of())
    other = token_rows(seed=1)
    assert cache.add(other).computed_rows == len(other)
    assert cache.add(other).computed_rows == 0
    assert_replays(cache, [token_rows()[0], other[0]])


# ---------------------------------------------------------------------------------------------- what changes afterwards


def _in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1


def _through_data(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data = torch.zeros(48, 32)


def _loaded(model: Any) -> None:
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()})


def _trained(model: Any) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()
    weight.grad = None


def _another_block(model: Any) -> None:
    other = copy.deepcopy(model.model.layers[1])
    nn.init.zeros_(other.mlp.up_proj.weight)
    model.model.layers[1] = other


def _noise(model: Any) -> None:
    model.get_input_embeddings().neftune_noise_alpha = 5.0


CHANGED = r"tensors below its cut changed since it was built, e\.g\. .*Call PrefixCache\.build again"
CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a weight changed in place": (_in_place, CHANGED),
    "an optimizer that got a frozen weight": (_trained, CHANGED),
    "another checkpoint loaded": (_loaded, CHANGED),
    "a weight replaced through .data": (_through_data, CHANGED),
    "a resized vocabulary": (lambda model: model.resize_token_embeddings(VOCAB + 8), CHANGED),
    "weights in another dtype": (lambda model: model.to(torch.bfloat16), CHANGED),
    "a thawed block": (
        lambda model: model.model.layers[1].requires_grad_(True),
        r"layers\.1\..* below its cut is trainable now.*Freeze it again, or build a cache",
    ),
    "a thawed model": (thaw, "below its cut is trainable now"),
    "another attention": (
        lambda model: model.set_attn_implementation("eager"),
        r"built with the attention 'sdpa'; the model now uses 'eager'\. Set it bef",
    ),
    "another block": (_another_block, r"layers\.1"),
    "NEFTune": (_noise, r"NEFTune, which adds noise to the embeddings at every step.*Leave neftune_noise_alpha out"),
}


@pytest.mark.parametrize("batches", [0, 2])
@pytest.mark.parametrize("what", CHANGES)
def test_what_changed_since_the_build_or_the_last_batch_is_refused(make, what, batches):
    change, match = CHANGES[what]
    model = model_of()
    cache = make(model)
    for _ in range(batches):
        model(**cache.collator(token_rows()[:3]))
    change(model)
    assert_refused(cache, match)


def test_a_weight_written_to_past_torch_is_seen_at_the_next_comparison_and_by_verify_frozen(make):
    model = build("llama")
    report = freeze(model, DEEP)
    cache = make(model)
    model(**cache.collator(token_rows()[:3]))
    model.model.layers[1].mlp.up_proj.weight.data.mul_(2)  # torch counts no version of it
    for _ in range(31):
        model(**cache.collator(token_rows()[:3]))
    with pytest.raises(CannotCache, match=r"row \d of cached batch 33 are not what .* old from cached batch 2 on"):
        model(**cache.collator(token_rows()[:3]))
    with pytest.raises(FrozenWeightsChanged, match=r"layers\.1\.mlp\.up_proj"):
        verify_frozen(model, report)


def test_the_same_weights_loaded_again_are_no_change(make):
    model = model_of()
    cache = make(model)
    plain = loss_of(model, cache.collator(token_rows()[:3]))
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert loss_of(model, cache.collator(token_rows()[:3])) == plain
    assert cache.batches_used == 2


def test_a_change_that_was_refused_goes_on_when_it_is_undone(make):
    model = model_of()
    cache = make(model)
    before = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    _in_place(model)
    assert_refused(cache, CHANGED)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.copy_(before)
    assert_replays(cache, token_rows()[:3])


def test_changed_weights_are_computed_anew(make):
    model = model_of()
    first = make(model)
    _in_place(model)
    with pytest.raises(CannotCache, match=CHANGED):
        first.add(token_rows(seed=1))
    first.close()
    freeze(model, DEEP)
    cache = make(model)
    assert cache.report.computed_rows == len(LENGTHS)
    assert cache.store.folder != first.store.folder
    assert_replays(cache, token_rows()[:3])


@pytest.mark.parametrize("batches", [0, 2])
def test_a_changed_buffer_of_the_prefix_is_refused(make, batches):
    model = model_of("deepseek_v3", first_k_dense_replace=0)
    cache = make(model)
    for _ in range(batches):
        model(**cache.collator(token_rows()[:3]))
    with torch.no_grad():
        model.model.layers[1].mlp.gate.e_score_correction_bias[0] += 1
    assert_refused(cache, CHANGED)


def test_weights_above_the_cut_may_change(make):
    model = model_of()
    cache = make(model)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight.mul_(2)
        model.lm_head.weight.mul_(2)
    assert_replays(cache, token_rows()[:3])
    cache.close()
    assert make(model).report.computed_rows == 0


@pytest.mark.parametrize("batches", [0, 2])
@pytest.mark.parametrize("trainable", [True, False])
def test_adapters_put_into_the_prefix_after_the_build_are_refused(make, batches, trainable):
    model = model_of()
    cache = make(model)
    for _ in range(batches):
        model(**cache.collator(token_rows()[:3]))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], inference_mode=not trainable))
    assert_refused(cache, "below its cut is trainable now" if trainable else CHANGED, wrapped)


def test_adapters_above_the_cut_are_cached(make):
    model = model_of()
    cache = make(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[3])).train()
    rows = token_rows()[:3]
    assert loss_of(wrapped, cache.collator(rows)) == pytest.approx(loss_of(wrapped, Padding()(rows)), rel=1e-5)
    assert cache.batches_used == 1


def test_noise_that_trainer_adds_is_refused(make, tmp_path):
    model = model_of()
    cache = make(model)
    arguments = TrainingArguments(
        tmp_path / "out", neftune_noise_alpha=5.0, max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True
    )
    trainer = Trainer(model, arguments, data_collator=cache.collator, train_dataset=token_rows())
    with pytest.raises(CannotCache, match="NEFTune"):
        trainer.train()


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize(
    ("built", "trained", "fix"),
    [("bf16", None, "fp32"), (None, "bf16", "bf16"), ("fp32", "bf16", "bf16"), ("bf16", "fp16", "fp16")],
)
def test_a_model_in_another_precision_than_the_cache_is_refused(make, built, trained, fix):
    model = model_of()
    cache = make(model, precision=built)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trained or "")
    match = (
        rf"built in precision=.*Build the cache with precision='{fix}'|built in precision='{built}'.*precision='{fix}'"
    )
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        assert_refused_precision(cache, match)


def assert_refused_precision(cache: PrefixCache, match: str) -> None:
    places = dict(cache.model.named_modules())
    with pytest.raises(CannotCache, match=match):
        cache.model(**cache.collator(token_rows()[:3]))
    assert dict(cache.model.named_modules()) == places
    assert torch.isfinite(cache.model(**Padding()(token_rows()[:3])).loss)


def test_the_precision_of_the_cache_is_trained_in(make):
    model = model_of()
    cache = make(model, precision="bf16")
    rows = token_rows()[:3]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cached, plain = loss_of(model, cache.collator(rows)), loss_of(model, Padding()(rows))
    assert cached == pytest.approx(plain, rel=2e-3)
    assert cache.batches_used == 1


def test_caches_of_two_precisions_stand_side_by_side(make):
    model = model_of()
    folders = []
    for precision in (None, "bf16", None, "bf16"):
        cache = make(model, precision=precision)
        folders.append(cache.store.folder)
        assert cache.report.computed_rows == (len(LENGTHS) if len(folders) < 3 else 0)
        cache.close()
    assert folders[:2] == folders[2:]
    assert folders[0] != folders[1]


def test_after_every_refusal_the_frozen_weights_are_as_they_were(make):
    model = build("llama")
    report = freeze(model, DEEP)
    with pytest.raises(CannotCache):
        make(model, collator=Padding(mask=False))
    cache = make(model)
    cache.model.set_attn_implementation("eager")
    assert_refused(cache, "eager")
    verify_frozen(model, report)
