"""The loss is right under accumulation and several ranks, the order of rows is reproducible, NaN stops the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_freeze import FreezeError, FreezePlan, freeze
from hf_freeze.errors import TrainingDiverged
from hf_freeze.processes import leave_group
from hf_freeze.summarization import SummaryCollator, SummaryTrainer, SummaryTrainingArguments, TokenLoss, loss_table
from hf_freeze.summarization.training import LengthSampler, _check_world_size
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]


def ragged_rows(kind: str, count: int = 8) -> Dataset:
    """Rows with very different numbers of labels, so that a mean of means is not the mean."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(count):
        ids = torch.randint(3, 900, (6 + 3 * number,), generator=generator).tolist()
        labelled = 1 + 2 * number
        labels = ids[:labelled] if kind in ("bart", "t5") else [-100] * (len(ids) - labelled) + ids[-labelled:]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return Dataset.from_list(rows)


def train(kind: str, folder: str, *, batch: int, accumulation: int, steps: int = 2, **given: Any) -> dict[str, Any]:
    """Two steps on the same eight rows a step, however they are cut up: the losses and the trained weights."""
    model = tiny_model(kind)
    report = freeze(model, FreezePlan(decoder_blocks=2))
    args = SummaryTrainingArguments(
        output_dir=folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=steps,
        precision="fp32", cpu_threads=1, optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", warmup_steps=0,
        max_grad_norm=0.0,
        logging_steps=1, eval_strategy="no", save_strategy="no", disable_tqdm=True, **given,
    )  # fmt: skip
    tokenizer = tiny_tokenizer(kind)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = "<pad>"
    trainer = SummaryTrainer(
        model=model, args=args, train_dataset=ragged_rows(kind), data_collator=SummaryCollator(tokenizer, model)
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if name in report.trainable_names}
    return {"losses": losses, "weights": weights, "world_size": args.world_size}


@pytest.mark.parametrize("kind", ["bart", "t5", "llama", "gpt2"])
def test_four_accumulated_batches_train_as_one(kind: str, tmp_path: Path) -> None:
    one = train(kind, str(tmp_path), batch=8, accumulation=1)
    four = train(kind, str(tmp_path), batch=2, accumulation=4)
    assert four["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(four["weights"][name], weight, rtol=1e-4, atol=1e-6)


RANKED = ("bart", "t5", "llama")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks trained, of each kind of model, in one launch."""
    folder = tmp_path_factory.mktemp("two_ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, __file__, str(folder)], capture_output=True, text=True, env=env, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    trained: dict[str, Any] = json.loads((folder / "two.json").read_text())
    return trained


@pytest.mark.parametrize("kind", RANKED)
def test_two_ranks_with_accumulation_train_as_one_batch(kind: str, two_ranks: dict[str, Any], tmp_path: Path) -> None:
    one, two = train(kind, str(tmp_path), batch=8, accumulation=1), two_ranks[kind]
    assert two["world_size"] == 2
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(torch.tensor(two["weights"][name]), weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["bart", "t5", "llama", "gpt2"])
def test_the_token_loss_of_one_batch_is_the_models_own(kind: str) -> None:
    model = tiny_model(kind).eval()
    tokenizer = tiny_tokenizer(kind)
    tokenizer.pad_token = "<pad>"
    batch = SummaryCollator(tokenizer, model)(list(ragged_rows(kind)))
    own = model(**{key: value for key, value in batch.items() if key != "decoder_input_ids"}).loss
    labels = batch.pop("labels")
    ours = TokenLoss(shifts=not model.config.is_encoder_decoder)(model(**batch), labels)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)


def test_a_head_alone_leaves_no_empty_group_to_the_optimizer(tmp_path: Path) -> None:
    model = tiny_model("llama")
    freeze(model, FreezePlan(decoder_blocks="all", freeze=(r"model\.norm",)))
    rows = ragged_rows("llama")
    args = SummaryTrainingArguments(str(tmp_path), precision="fp32", cpu_threads=1, eval_strategy="no")
    trainer = SummaryTrainer(
        model=model, args=args, train_dataset=rows, data_collator=SummaryCollator(tiny_tokenizer("llama"), model)
    )
    groups = trainer.create_optimizer().param_groups
    assert [len(group["params"]) for group in groups] == [1]
    assert groups[0]["params"][0] is model.lm_head.weight


def test_label_smoothing_is_that_of_trainer() -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[1, 2, -100, 3, 4], [0, -100, -100, 6, 5]])
    theirs = LabelSmoother(epsilon=0.1)({"logits": logits}, labels)
    ours = TokenLoss(shifts=False, label_smoothing=0.1)(SimpleNamespace(logits=logits), labels)
    torch.testing.assert_close(ours, theirs)


def test_a_router_loss_is_added_by_its_share() -> None:
    logits, labels = torch.zeros(1, 4, 3), torch.tensor([[-100, 1, 2, -100]])
    plain = TokenLoss(shifts=False)(SimpleNamespace(logits=logits), labels, 4)
    routed = TokenLoss(shifts=False, aux_coefficient=0.5)(
        SimpleNamespace(logits=logits, aux_loss=torch.tensor(2.0)), labels, 4
    )
    assert routed.item() == pytest.approx(plain.item() + 0.5 * 2.0 * 2 / 4)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 2**40))
def test_the_sampler_yields_every_row_once_and_only_by_seed_and_epoch(
    lengths: list[int], batch: int, seed: int
) -> None:
    sampler = LengthSampler(lengths, batch, seed)
    torch.manual_seed(1)
    first = list(sampler)
    torch.manual_seed(2)
    assert list(sampler) == first
    assert sorted(first) == list(range(len(lengths)))
    assert len(sampler) == len(first)


def test_the_sampler_changes_with_the_epoch_and_saves_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 400, (512,), generator=generator).tolist()
    sampler = LengthSampler(lengths, 8, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first

    def padded(order: list[int]) -> int:
        return sum(8 * max(lengths[row] for row in order[at : at + 8]) for at in range(0, len(order), 8))

    assert padded(first) < 0.75 * padded(list(range(512)))


def test_trainer_tells_the_sampler_its_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(LengthSampler, "set_epoch", lambda self, epoch: seen.append(epoch))
    train("llama", str(tmp_path), batch=4, accumulation=1, steps=4)
    assert {0, 1} <= set(seen)


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_sees_it(tmp_path: Path) -> None:
    model = tiny_model("llama")
    freeze(model)
    args = SummaryTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=6, precision="fp32", cpu_threads=1,
        eval_strategy="no", save_strategy="steps", save_steps=1, disable_tqdm=True,
    )  # fmt: skip

    class Spoiled(TokenLoss):
        def __call__(self, *arguments: Any, **named: Any) -> torch.Tensor:
            loss = super().__call__(*arguments, **named)
            return loss * float("nan") if (tmp_path / "checkpoint-2").exists() else loss

    trainer = SummaryTrainer(
        model=model, args=args, train_dataset=ragged_rows("llama"), compute_loss_func=Spoiled(shifts=True),
        data_collator=SummaryCollator(tiny_tokenizer("llama"), model),
    )  # fmt: skip
    with pytest.raises(TrainingDiverged, match=r"nan at step 3.*checkpoint-2"):
        trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()


def test_processes_that_form_no_group_are_refused() -> None:
    _check_world_size(2, 2)
    with pytest.raises(FreezeError, match="started 2 processes, this one is in a group of 1"):
        _check_world_size(2, 1)


@pytest.mark.parametrize("given", [{"bf16": True, "precision": "fp32"}, {"fp16": True}])
def test_precisions_that_contradict_each_other_are_refused(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FreezeError, match="it is --precision that decides here"):
        SummaryTrainingArguments(output_dir=str(tmp_path), **given)


def test_bf16_is_taken_as_asked(tmp_path: Path) -> None:
    assert SummaryTrainingArguments(output_dir=str(tmp_path), bf16=True).chosen_precision.reason == "asked for"


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_activation_checkpointing_trains_the_same_on_a_partly_frozen_model(kind: str, tmp_path: Path) -> None:
    plain = train(kind, str(tmp_path), batch=8, accumulation=1)
    checkpointed = train(kind, str(tmp_path), batch=8, accumulation=1, activation_checkpointing=True)
    assert checkpointed["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    for name, weight in plain["weights"].items():
        torch.testing.assert_close(checkpointed["weights"][name], weight, rtol=1e-5, atol=1e-7)


def test_the_loss_table_gives_each_epoch_a_row() -> None:
    log = [{"loss": 2.0, "epoch": 1.0, "step": 9}, {"eval_loss": 1.5, "epoch": 1.0}, {"eval_loss": 1.4, "epoch": 2.0}]
    rows = loss_table(log).rows
    assert rows == (("1", "2.000", "1.500"), ("2", "", "1.400"))


def test_each_epoch_has_a_training_loss_however_few_its_steps(tmp_path: Path) -> None:
    losses = {}
    for logging_steps in (10, 1):
        trainer = epochs_trainer(tmp_path, logging_steps=logging_steps, num_train_epochs=2.0)
        trainer.train()
        losses[logging_steps] = loss_table(trainer.state.log_history).rows
    assert losses[10] == losses[1]
    assert all(training for _, training, _ in losses[10])


def test_a_run_that_is_all_warm_up_says_that_it_learns_nothing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"A run of 1 step\(s\) is all warm-up"):
        epochs_trainer(tmp_path, max_steps=1, warmup_steps=0.05).train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="A run of")
        epochs_trainer(tmp_path, max_steps=1, warmup_steps=0).train()
        epochs_trainer(tmp_path, max_steps=1, warmup_steps=10, lr_scheduler_type="constant").train()


def epochs_trainer(folder: Path, **given: Any) -> SummaryTrainer:
    """Four steps an epoch, each epoch evaluated."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("llama")
    freeze(model, FreezePlan(decoder_blocks=2))
    args = SummaryTrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, precision="fp32", cpu_threads=1, save_strategy="no",
        disable_tqdm=True, **given,
    )  # fmt: skip
    rows = ragged_rows("llama")
    collator = SummaryCollator(tokenizer, model)
    return SummaryTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, data_collator=collator)


if __name__ == "__main__":
    trained = {kind: train(kind, sys.argv[1], batch=2, accumulation=2) for kind in RANKED}
    if int(os.environ["RANK"]) == 0:
        for result in trained.values():
            result["weights"] = {name: weight.tolist() for name, weight in result["weights"].items()}
        (Path(sys.argv[1]) / "two.json").write_text(json.dumps(trained))
    leave_group()
