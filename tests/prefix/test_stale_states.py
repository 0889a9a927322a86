"""Whatever changes below the cut, between two builds or while a training goes on: old states are never trained on."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from hf_freeze import FreezePlan, PrefixCache, freeze, supervised_logits_only, thaw
from hf_freeze.errors import FreezeError
from hf_freeze.exactness import exchange_rows
from hf_freeze.freezing import freeze_record
from tests.prefix.stale_changes import CHANGES, SEEN_AT_ONCE, make
from tests.prefix.test_faults import LENGTHS, Padding, token_rows
from tests.zoo import build

QUICK_BETWEEN = {"an activation function", "a private attribute", "a global of the module", "another adapter",
                 "rotary frequencies", "a class's forward", "rotary positions behind a wrapper"}  # fmt: skip
QUICK_WITHIN = {"a list in place", "a weight through data", "a hook", "a class's attribute"}
SPOT_BATCHES = 32  # between two looks at the states of a data set as small as this


def cases(quick: set[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow, id=name) for name in CHANGES]


def rows_for(kind: str) -> list[Any]:
    return token_rows((12,) * 6 if kind == "convolution" else LENGTHS)


def built(model: Any, folder: Any, kind: str = "") -> PrefixCache:
    return PrefixCache.build(model, rows_for(kind), Padding(), cache_dir=folder, progress=False)


def loss_of(model: Any, batch: Any) -> float:
    torch.manual_seed(0)
    result = model(**batch)
    loss: torch.Tensor = result["loss"]
    return loss.item()


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> Any:
    yield monkeypatch
    for handle in list(torch.nn.modules.module._global_forward_hooks):
        torch.nn.modules.module._global_forward_hooks.pop(handle)


@pytest.mark.parametrize("name", cases(QUICK_BETWEEN))
def test_a_change_between_two_builds_never_trains_on_the_states_before_it(name: str, tmp_path: Any, patch: Any) -> None:
    kind, change = CHANGES[name]
    model = make(kind)
    rows = rows_for(kind)[:3]
    first = built(model, tmp_path, kind)
    before = loss_of(model, first.collator(rows))
    assert before == pytest.approx(loss_of(model, Padding()(rows)), rel=1e-5)
    first.close()
    change(model, patch)
    if (record := freeze_record(model)) is not None:
        freeze(model, record[1].plan)  # what was put in anew is held like the rest
    plain = loss_of(model, Padding()(rows))
    try:
        second = built(model, tmp_path, kind)
    except FreezeError:
        return  # declined
    assert loss_of(model, second.collator(rows)) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("name", cases(QUICK_WITHIN))
def test_a_change_within_a_training_is_seen_at_the_next_spot_check_at_the_latest(
    name: str, tmp_path: Any, patch: Any
) -> None:
    kind, change = CHANGES[name]
    model = make(kind)
    cache = built(model, tmp_path, kind)
    batch = cache.collator(rows_for(kind)[:3])
    for _ in range(2):
        loss_of(model, batch)
    change(model, patch)
    now, cached, refusal = loss_of(model, Padding()(rows_for(kind)[:3])), -1.0, ""
    try:
        for _ in range(SPOT_BATCHES + 1):
            cached = loss_of(model, batch)
        cache.close()
    except FreezeError as error:
        refusal = str(error)
    if not refusal:
        assert cached == pytest.approx(now, rel=1e-5)  # it changed nothing that a result shows
    elif cache.batches_used > 2 and cached != pytest.approx(now, rel=1e-5):  # old states were trained on: since when
        assert name not in SEEN_AT_ONCE
        assert re.search("may have been old from cached batch [23] on", refusal)


def test_a_change_after_the_last_check_is_told_when_the_cache_is_closed(tmp_path: Any) -> None:
    model = make("toy")
    cache = built(model, tmp_path)
    for _ in range(3):
        loss_of(model, cache.collator(token_rows()[:3]))
    model.blocks[0].shifts[1] = 0.5
    loss_of(model, cache.collator(token_rows()[:3]))
    with pytest.raises(FreezeError, match=r"after the last batch, .*may have been old from cached batch 2 on"):
        cache.close()
    cache.close()  # the second time it is closed already
    assert not any("replay" in name for module in model.modules() for name in module.__dict__)


def test_what_changes_after_the_last_batch_in_the_open_is_no_reason_to_complain(tmp_path: Any) -> None:
    model = make("llama")
    cache = built(model, tmp_path)
    for _ in range(3):
        loss_of(model, cache.collator(token_rows()[:3]))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    cache.close()


def test_a_change_while_the_prefix_was_away_is_told_at_the_end(tmp_path: Any) -> None:
    model = make("toy")
    cache = built(model, tmp_path)
    cache.release_prefix()
    for _ in range(2):
        loss_of(model, cache.collator(token_rows()[:3]))
    model.blocks[0].shifts[1] = 0.5
    loss_of(model, cache.collator(token_rows()[:3]))
    with pytest.raises(FreezeError, match=r"after the last batch"):
        cache.close()


def test_a_model_that_is_thawed_before_the_cache_is_closed_is_no_reason_to_complain(tmp_path: Any) -> None:
    model = build("gpt2").train()  # whose dropout is on by default, and off below the cut while it is frozen
    freeze(model, FreezePlan(decoder_blocks=3))
    cache = built(model, tmp_path)
    for _ in range(3):
        loss_of(model, cache.collator(token_rows()[:3]))
    thaw(model)
    cache.close()


def test_hooks_of_checkpointing_change_no_key(tmp_path: Any) -> None:
    model = make("llama")
    built(model, tmp_path).close()
    model.enable_input_require_grads()
    cache = built(model, tmp_path)
    assert cache.report.computed_rows == 0
    loss_of(model, cache.collator(token_rows()[:3]))
    model.disable_input_require_grads()
    loss_of(model, cache.collator(token_rows()[:3]))
    assert cache._replay.spot.checks == 1
    cache.close()


def test_a_key_is_made_where_the_precision_was_set_by_torchs_new_names(tmp_path: Any) -> None:
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has the old names only")
    model = make("toy")
    before = torch.backends.fp32_precision
    try:
        first = built(model, tmp_path)
        first.close()
        torch.backends.fp32_precision = "tf32"
        assert built(model, tmp_path).store.folder != first.store.folder
    finally:
        torch.backends.fp32_precision = before


def test_a_check_that_could_not_run_is_not_taken_for_one_that_held(tmp_path: Any, monkeypatch: Any) -> None:
    model = make("toy")
    cache = built(model, tmp_path)
    batch = cache.collator(token_rows()[:3])

    def refuse(*_: Any) -> None:
        raise RuntimeError("one row alone is not taken")

    with monkeypatch.context() as patched:
        patched.setattr("hf_freeze.prefix.spot.capture", refuse)
        with pytest.warns(UserWarning, match=r"cached batch 1 could not be computed anew .*one row alone.*unchecked"):
            loss_of(model, batch)
    model.blocks[0].shifts[1] = 0.5
    with pytest.raises(FreezeError, match=r"after the last batch, are not what the model computes now"):
        cache.close()


def test_what_changes_while_the_prefix_is_away_is_told_with_the_batch_from_which_on(tmp_path: Any) -> None:
    model = make("toy")
    cache = built(model, tmp_path)
    cache.release_prefix()
    for _ in range(3):
        loss_of(model, cache.collator(token_rows()[:3]))
    model.blocks[0].factors = (0.5, 1.0)
    loss_of(model, cache.collator(token_rows()[:3]))
    loss_of(model, cache.collator(token_rows()[:3]))
    with pytest.raises(FreezeError, match=r"may have been old from cached batch [24] on"):
        cache.close()


def test_a_comparison_leaves_the_batch_that_it_precedes_as_it_is(tmp_path: Any) -> None:
    """Supervised logits note at a call's beginning where its labels are; the comparison calls the model in between."""
    model = make("llama")
    supervised_logits_only(model)
    rows = [{**row, "labels": torch.where(torch.arange(len(row["labels"])) < 5, -100, row["labels"])}
            for row in token_rows()]  # fmt: skip
    cache = PrefixCache.build(model, rows, Padding(), cache_dir=tmp_path, progress=False)
    seen: list[int] = []
    model.model.layers[3].mlp.register_forward_hook(lambda module, args, output: seen.append(args[0].dim()))
    for _ in range(2):
        loss_of(model, cache.collator(rows[:3]))
    assert cache._replay.spot.checks == 1
    assert seen == [2, 2]  # labelled places only, in the batch that was compared as in the next one
    cache.close()


def test_evaluations_in_between_are_no_change_of_the_modules(tmp_path: Any) -> None:
    model = make("llama")
    cache = built(model, tmp_path)
    for _ in range(4):
        loss_of(model.train(), cache.collator(token_rows()[:3]))
        loss_of(model.eval(), Padding()(token_rows()[:3]))
    assert cache._replay.spot.checks == 1
    cache.close()


def test_bars_are_never_so_wide_that_another_rows_states_would_pass(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("hf_freeze.prefix.spot.TIMES_OWN", 1e12)  # of a model that rounds as coarsely as that
    model = make("llama")
    cache = built(model, tmp_path)
    batch = cache.collator(token_rows()[:3])
    batch["prefix_states"] = exchange_rows(batch["prefix_states"])
    with pytest.raises(FreezeError, match="are not what the model computes now"):
        loss_of(model, batch)
