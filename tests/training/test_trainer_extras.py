"""What Trainer can do besides training works on frozen models, and does the same from the prefix cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_freeze import PrefixCache, verify_frozen
from hf_freeze.summarization import SummaryTrainer, SummaryTrainingArguments
from tests.prefix.cases import collator_for, frozen_model, review_rows

LOSS = {"rel": 1e-5}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Training arguments write their choices into the environment, from where every later trainer would take them."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    yield
    torch._dynamo.reset()


class Recorded:
    """Keeps the loss and the number of rows of every batch that was trained."""

    def __init__(self, **given: Any) -> None:
        self.losses: list[float] = []
        self.rows: list[int] = []
        self.rows_now = 0
        super().__init__(**given)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.rows_now = len(inputs["input_ids"])
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        self.losses.append(loss.item())
        self.rows.append(self.rows_now)
        return loss


class StockTrainer(Recorded, Trainer):
    pass


class OurTrainer(Recorded, SummaryTrainer):
    pass


@dataclass
class Run:
    model: nn.Module
    trainer: Any
    cache: PrefixCache | None
    tried_out: int
    before: dict[str, torch.Tensor]


def make(
    kind: str, folder: Path, *, with_cache: bool, trainer: type[Recorded] = StockTrainer, release: bool = False,
    validation: Any = None, **given: Any,
) -> Run:  # fmt: skip
    """A frozen model with dropout above the cut and its trainer, not yet trained."""
    ours = issubclass(trainer, SummaryTrainer)
    rows = review_rows(kind)
    model = frozen_model(kind)
    collator: Any = collator_for(kind, model)
    cache = None
    if with_cache:
        precision = "bf16" if given.get("bf16") else "fp32"
        cache = PrefixCache.build(
            model, rows, collator, cache_dir=folder / "cache", precision=precision, progress=False
        )
        if validation is not None:
            cache.add(validation)
        if release:
            cache.release_prefix()
        collator = cache.collator
    arguments: dict[str, Any] = {
        "output_dir": str(folder / f"run-{with_cache}"),
        "use_cpu": True,
        "report_to": "none",
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 0.1,
        "optim": "sgd",
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": 7,
    } | ({"cpu_threads": 1, "precision": "auto" if given.get("bf16") else "fp32"} if ours else {})
    made: Any = trainer(
        model=model,
        args=(SummaryTrainingArguments if ours else TrainingArguments)(**arguments | given),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=validation,
        data_collator=collator,
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return Run(model, made, cache, cache.batches_unused if cache else 0, before)


def both(kind: str, folder: Path, **given: Any) -> tuple[Run, Run]:
    """The same training uncached and from the cache. A trainer seeds when it is made, so each one trains at once."""
    runs = []
    for with_cache in (False, True):
        runs.append(make(kind, folder, with_cache=with_cache, **given))
        runs[-1].trainer.train()
    return runs[0], runs[1]


def assert_held(run: Run) -> None:
    """The frozen part kept its bits, the rest trained, and no training batch missed the cache."""
    verify_frozen(run.model)
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, run.before[name])}
    trainable = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert moved <= trainable
    assert len(moved) > len(trainable) / 2
    if run.cache is not None:
        assert run.cache.batches_used >= len(run.trainer.losses)
        assert run.cache.batches_unused == run.tried_out


EXTRAS: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 3},
    "fused AdamW": {"optim": "adamw_torch_fused", "learning_rate": 1e-3},
    "Adafactor": {"optim": "adafactor", "learning_rate": 1e-3},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "clipping": {"max_grad_norm": 0.01, "optim": "adamw_torch_fused", "label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("trainer", [StockTrainer, OurTrainer])
@pytest.mark.parametrize("kind", ["llama", "bart"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_does_the_same_from_the_cache(extra: str, kind: str, trainer: type[Recorded], tmp_path: Path) -> None:
    plain, cached = both(kind, tmp_path, trainer=trainer, **EXTRAS[extra])
    assert len(plain.trainer.losses) == 3 * EXTRAS[extra].get("gradient_accumulation_steps", 1)
    assert cached.trainer.losses == pytest.approx(plain.trainer.losses, **LOSS)
    assert_held(plain)
    assert_held(cached)


@pytest.mark.parametrize("trainer", [StockTrainer, OurTrainer])
def test_label_smoothing_changes_the_loss_with_and_without_the_cache(trainer: type[Recorded], tmp_path: Path) -> None:
    plain, cached = both("llama", tmp_path, trainer=trainer, max_steps=1, label_smoothing_factor=0.2)
    sharp = make("llama", tmp_path, with_cache=False, trainer=trainer, max_steps=1)
    sharp.trainer.train()
    for run in (plain, cached):
        assert run.trainer.losses[0] != pytest.approx(sharp.trainer.losses[0], rel=1e-4)


@pytest.mark.parametrize("trainer", [StockTrainer, OurTrainer])
@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_bf16_does_the_same_from_the_cache(kind: str, trainer: type[Recorded], tmp_path: Path) -> None:
    plain, cached = both(kind, tmp_path, trainer=trainer, bf16=True)
    assert cached.trainer.losses[0] == pytest.approx(plain.trainer.losses[0], **LOSS)
    assert cached.trainer.losses == pytest.approx(plain.trainer.losses, rel=2e-4)  # gradients round to 8 bits
    assert_held(plain)
    assert_held(cached)


@pytest.mark.parametrize("release", [False, True], ids=["", "released"])
@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_the_best_model_is_loaded_and_the_states_are_used_after_it(kind: str, release: bool, tmp_path: Path) -> None:
    validation = Dataset.from_list(review_rows(kind, 6, seed=5))
    evaluated = []
    for with_cache in (False, True):
        run = make(
            kind, tmp_path, with_cache=with_cache, validation=validation, release=release and with_cache,
            eval_strategy="steps", save_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True,
            greater_is_better=True, metric_for_best_model="eval_loss",  # else the best one would be the last
            max_steps=6,
        )  # fmt: skip
        run.trainer.train()
        evaluated.append([entry["eval_loss"] for entry in run.trainer.state.log_history if "eval_loss" in entry])
        best = max(evaluated[-1])
        step = run.trainer.state.best_global_step
        assert step == 2 * (evaluated[-1].index(best) + 1) < 6
        saved, last = (load_file(Path(run.trainer.args.output_dir) / f"checkpoint-{at}" / "model.safetensors")
                       for at in (step, 6))  # fmt: skip
        now = run.model.state_dict()
        assert all(torch.equal(now[name], tensor) for name, tensor in saved.items())
        assert not all(torch.equal(now[name], tensor) for name, tensor in last.items())
        assert_held(run)
        used = run.cache.batches_used if run.cache else 0
        assert run.trainer.evaluate()["eval_loss"] == pytest.approx(best, **LOSS)
        run.model.train()(**run.trainer.data_collator(review_rows(kind)[:2])).loss.backward()
        if run.cache:
            assert run.cache.batches_used == used + 2  # six validation rows are one batch
            assert run.cache.batches_unused == run.tried_out
        verify_frozen(run.model)
    assert evaluated[1] == pytest.approx(evaluated[0], **LOSS)


@pytest.mark.parametrize(
    ("kind", "trainer"),
    [
        ("llama", StockTrainer),
        pytest.param("llama", OurTrainer, marks=pytest.mark.slow),
        pytest.param("bart", OurTrainer, marks=pytest.mark.slow),
    ],
)
def test_the_batch_size_that_fits_is_found_in_the_middle_of_a_forward(
    kind: str, trainer: type[Recorded], tmp_path: Path
) -> None:
    runs = []
    for with_cache in (False, True):
        run = make(
            kind, tmp_path, with_cache=with_cache, trainer=trainer, auto_find_batch_size=True,
            per_device_train_batch_size=3, max_steps=-1, num_train_epochs=1,
        )  # fmt: skip
        run.model.get_output_embeddings().register_forward_pre_hook(out_of_memory_above_two_rows(run))
        run.trainer.train()
        assert set(run.trainer.rows) == {2}
        assert sum(run.trainer.rows) == len(review_rows(kind))
        assert run.trainer.state.global_step == len(run.trainer.rows)
        assert_held(run)
        runs.append(run.trainer.losses)
    assert runs[1] == pytest.approx(runs[0], **LOSS)


def out_of_memory_above_two_rows(run: Run) -> Callable[..., None]:
    """A hook on the head, which stands above the prefix: the placeholders are in when it raises."""

    def hook(*_: Any) -> None:
        if run.trainer.rows_now > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    return hook


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [StockTrainer, OurTrainer])
@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_a_compiled_model_does_the_same_from_the_cache(kind: str, trainer: type[Recorded], tmp_path: Path) -> None:
    eager = make(kind, tmp_path, with_cache=False, trainer=trainer)
    eager.trainer.train()
    for run in both(kind, tmp_path, torch_compile=True, torch_compile_backend="eager", trainer=trainer):
        assert hasattr(run.trainer.model_wrapped, "_orig_mod")
        assert run.trainer.losses == pytest.approx(eager.trainer.losses, **LOSS)
        assert_held(run)
