"""docs/trainers.md, run: each block under someone else's trainer gives the same losses with the cache as without."""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from transformers import BertConfig, BertModel, T5Config, ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from trl import SFTConfig, SFTTrainer

from hf_freeze import FreezePlan, PrefixCache, adapt_upper, freeze, supervised_logits_only, verify_frozen
from hf_freeze.errors import CannotCache
from hf_freeze.summarization import shipped_reviews
from tests.prefix.cases import padding_tokenizer
from tests.tiny import VOCAB, tiny_model, tiny_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)$.*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
STEPS = 12  # two epochs of 24 rows in batches of 4
LOSS = {"rel": 1e-5}
MARK = "  # cache"


# ------------------------------------------------------------------------------- small models under the page's names


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


def save_text_model(folder: str, kind: str, **dropout: float) -> None:
    tiny_model(kind, **dropout).save_pretrained(folder)  # type: ignore[operator]
    tiny_tokenizer(kind).save_pretrained(folder)


def save_llama(folder: str) -> None:
    save_text_model(folder, "llama", attention_dropout=0.1)


def save_bart(folder: str) -> None:
    save_text_model(folder, "bart", dropout=0.1, attention_dropout=0.1)


def save_t5(folder: str) -> None:
    save_text_model(folder, "t5")
    config = T5Config.from_pretrained(folder)
    config.dropout_rate = 0.1
    config.save_pretrained(folder)


def save_bert(folder: str) -> None:
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=VOCAB, **SIZES)).save_pretrained(folder)  # without a head, as on the hub
    tiny_tokenizer("llama").save_pretrained(folder)


def save_vit(folder: str) -> None:
    torch.manual_seed(0)
    given = {"image_size": 16, "patch_size": 4, "hidden_dropout_prob": 0.1, "num_labels": 3}
    ViTForImageClassification(ViTConfig(**SIZES, **given)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)


MODELS: dict[str, Callable[[str], None]] = {
    "HuggingFaceTB/SmolLM2-135M": save_llama,
    "facebook/bart-base": save_bart,
    "google-t5/t5-small": save_t5,
    "google-bert/bert-base-uncased": save_bert,
    "google/vit-base-patch16-224": save_vit,
}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the data that the page names; `from_pretrained` prefers folders in it to the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_FREEZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    rows = shipped_reviews()["train"].dataset.select(range(24))
    with open("reviews.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "summary", "stars"])
        for place, row in enumerate(rows):
            writer.writerow([row["review"][: 40 + 3 * place], row["summary"][:30], place % 5 + 1])
    noise = np.random.default_rng(0)
    for place in range(24):
        folder = Path("photos", ("cups", "shoes")[place % 2])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{place}.png")
    return tmp_path


# ------------------------------------------------------------------------------------------------------- the page


def run_block(code: str) -> tuple[list[float], dict[str, Any], str]:
    """Runs a block as a script of its own; its losses step by step, its names, and what it printed."""
    names: dict[str, Any] = {}
    screen = io.StringIO()
    torch.manual_seed(0)
    with contextlib.redirect_stdout(screen):
        exec(compile(code, "docs/trainers.md", "exec"), names)
    if "trainer" in names:
        names["losses"] = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    return names["losses"], names, screen.getvalue()


def without_cache(code: str) -> str:
    """The block without the lines that the page says to leave out."""
    return "".join(line for line in code.splitlines(keepends=True) if not line.rstrip().endswith(MARK))


def dropout_is_on(model: nn.Module, batch: dict[str, Any]) -> bool:
    """Whether the same batch gives another loss at another draw, in training mode."""
    model.train()
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        losses.append(model(**batch).loss.item())
    return losses[0] != losses[1]


def features(names: dict[str, Any]) -> list[dict[str, Any]]:
    """Two rows as the trainer's collator gets them."""
    rows = names["trainer"].train_dataset if "trainer" in names else names["rows"]
    unused = {"prompt", "completion", "review", "summary", "stars"}
    return [{key: value for key, value in rows[row].items() if key not in unused} for row in (0, 1)]


CASES = [(title, name) for title, code in SECTIONS.items() for name in MODELS if f'"{name}"' in code]
T5_CASE = ("Seq2SeqTrainer", "google-t5/t5-small")  # which the page names in words


@pytest.mark.parametrize(("title", "name"), [*CASES, T5_CASE], ids=[title for title, _ in CASES] + ["T5"])
def test_the_block_trains_the_same_with_and_without_the_cache(title: str, name: str, workplace: Path) -> None:
    MODELS[name](name)
    code = SECTIONS[title].replace('"facebook/bart-base"', f'"{name}"')
    plain, plain_names, plain_screen = run_block(without_cache(code))
    assert "cache" not in plain_names
    cached, names, screen = run_block(code)
    assert len(cached) == len(plain) == STEPS
    assert cached == pytest.approx(plain, **LOSS)
    cache: PrefixCache = names["cache"]
    assert (cache.batches_used, cache.batches_unused) == (STEPS, 0)
    assert "unchanged" in plain_screen
    assert "unchanged" in screen
    before = {key: value.clone() for key, value in names["model"].state_dict().items()}
    assert dropout_is_on(names["model"], cache.collator.collator(features(names)))
    cache.close()
    assert before.keys() == names["model"].state_dict().keys()


def test_the_page_has_a_block_for_each_trainer_and_each_fits_on_a_screen() -> None:
    assert [title for title, _ in CASES] == list(SECTIONS) == re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert len(SECTIONS) == 7
    for code in SECTIONS.values():
        assert len(code.splitlines()) <= 40
        assert code.count(MARK) == 2


# ---------------------------------------------------------------------------------------------- beside the page


def review_pairs(count: int = 12) -> Dataset:
    rows = shipped_reviews()["train"].dataset.select(range(count))
    return Dataset.from_list(
        [{"prompt": r["review"][: 30 + 5 * i], "completion": f" {r['summary'][:20]}"} for i, r in enumerate(rows)]
    )


def sft_losses(model: nn.Module, folder: Path, *, with_cache: bool, kind: str = "llama", **given: Any) -> list[float]:
    """The losses of a few steps of SFTTrainer; every batch from the cache where there is one."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 10,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments | given),
        train_dataset=review_pairs(),
        processing_class=padding_tokenizer(kind),
    )
    cache = None
    if with_cache:
        cache = PrefixCache.build(
            model, trainer.train_dataset, trainer.data_collator, cache_dir=folder / "cache", progress=False
        )
        trainer.data_collator = cache.collator
    trainer.train()
    verify_frozen(model)
    if cache is not None:
        assert cache.batches_used >= 10
        assert cache.batches_unused == 0
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def frozen_llama(**given: Any) -> nn.Module:
    model = tiny_model("llama", attention_dropout=0.1, **given)
    freeze(model, FreezePlan(decoder_blocks=-2))
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "given", [{"label_smoothing_factor": 0.1}, {"loss_type": "dft"}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_what_sft_trainer_can_do_besides_is_the_same_from_the_cache(given: dict[str, Any], tmp_path: Path) -> None:
    plain = sft_losses(frozen_llama(), tmp_path / "plain", with_cache=False, **given)
    cached = sft_losses(frozen_llama(), tmp_path / "cached", with_cache=True, **given)
    assert len(plain) == 10
    assert cached == pytest.approx(plain, **LOSS)


def test_sft_trainer_trains_adapters_above_the_cut_from_the_cache(tmp_path: Path) -> None:
    losses = []
    for with_cache in (False, True):
        model = frozen_llama()
        torch.manual_seed(3)
        adapted = adapt_upper(model, dropout=0.1)
        losses.append(sft_losses(adapted, tmp_path / str(with_cache), with_cache=with_cache))
    assert losses[1] == pytest.approx(losses[0], **LOSS)
    assert losses[0][0] != losses[0][-1]


def test_supervised_logits_leave_the_fused_head_of_sft_trainer_alone(tmp_path: Path) -> None:
    plain = sft_losses(frozen_llama(), tmp_path / "plain", with_cache=False)
    reduced = frozen_llama()
    assert supervised_logits_only(reduced).active
    assert sft_losses(reduced, tmp_path / "reduced", with_cache=True) == pytest.approx(plain, **LOSS)


@pytest.mark.parametrize(
    "given", [{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 64}], ids=str
)
def test_rows_that_sft_trainer_packs_into_one_are_declined(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CannotCache, match=r"asked for packing \(packing=True, padding_free=True, flattening\)"):
        sft_losses(frozen_llama(), tmp_path, with_cache=True, **given)


@pytest.mark.parametrize("order", ["freeze first", "adapters first"])
def test_adapters_by_hand_above_the_cut_are_cached_and_in_every_block_they_are_not(order: str, tmp_path: Path) -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8, 9 + row], "attention_mask": [1] * 5, "labels": [5, 6, 7, 8, 9]} for row in range(4)
    ]
    for where, able in (([2, 3], True), (None, False)):
        model: nn.Module = tiny_model("llama")
        plan = FreezePlan(decoder_blocks=2)
        if order == "freeze first":
            freeze(model, plan)
        model = get_peft_model(
            model, LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=where, init_lora_weights=False)
        )
        if order == "adapters first":
            freeze(model, plan)
        if order == "freeze first" and not able:
            with pytest.raises(CannotCache, match="Nothing of this LlamaForCausalLM can be cached"):
                PrefixCache.build(model, rows, cache_dir=tmp_path, progress=False)
            continue
        cache = PrefixCache.build(model, rows, cache_dir=tmp_path, progress=False)
        assert cache.cuts == (("decoder", 2),)
        verify_frozen(model)
