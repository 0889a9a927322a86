"""The image recipe as a user runs it, and its parts: VGG16's layers, their count, their weights, the digits."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    Dinov2Config,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_freeze import FreezePlan, PrefixCache, freeze, read_anatomy, verify_frozen
from hf_freeze.errors import FreezeError
from hf_freeze.inputs.pixels import check_pixels
from tests.recipes.scripts import load_script

RECIPE = Path(__file__).parents[2] / "recipes" / "classify_images.py"
SMALL = ["--max_train_rows=40", "--num_train_epochs=2", "--per_device_train_batch_size=8", "--learning_rate=1e-3",
         "--logging_strategy=steps", "--logging_steps=1", "--disable_tqdm=true", "--use_cpu=true"]  # fmt: skip


RECIPE_MODULE: Any = load_script(RECIPE)


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    places = [f"--output_dir={folder / 'out'}", f"--prefix_cache_dir={folder / 'cache'}"]
    command = [sys.executable, str(RECIPE), *SMALL, *places, *options]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)


def results(folder: Path, *options: str) -> tuple[dict[str, Any], list[float], str]:
    """What a run wrote, its losses, and what it printed."""
    done = run(folder, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "out" / "all_results.json").read_text())
    history = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    return found, [entry["loss"] for entry in history if "loss" in entry], done.stdout


# ---------------------------------------------------------------------------------------------------- the whole recipe


@pytest.mark.slow
def test_vgg16_trains_the_same_with_and_without_the_cache(tmp_path: Path) -> None:
    found, cached, screen = results(tmp_path / "cached")
    plainly, plain, _ = results(tmp_path / "plain", "--cache_prefix=false")
    assert len(cached) == len(plain) == 10
    assert cached == pytest.approx(plain, rel=1e-3)  # AdamW turns the rounding of small gradients into whole steps
    assert cached[:2] == pytest.approx(plain[:2], rel=1e-5)
    assert found["cached"] is True
    assert plainly["cached"] is False
    assert found["frozen_unchanged"] is plainly["frozen_unchanged"] is True
    assert 0.0 <= found["accuracy"] <= 1.0
    order = [
        "random weights",
        "they fit",
        "as Keras counts: input",
        "block3_conv3 (features[14:16])",
        "the backward pass ends here",
        "Prefix cache, predicted:",
        "unchanged",
        "Accuracy on 360",
        "10 steps:",
    ]
    places = [screen.index(text) for text in order]
    assert places == sorted(places)
    assert "block3_pool" not in screen
    assert (tmp_path / "cached" / "out" / "model.safetensors").exists()


def test_a_pretrained_vision_transformer_is_found_by_its_folder_and_prepared_by_its_own_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    places = [f"--output_dir={tmp_path / 'out'}", f"--prefix_cache_dir={tmp_path / 'cache'}"]
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *SMALL, *places, f"--model={tmp_path / 'vit'}", "--frozen=3"])
    RECIPE_MODULE.main()
    found = json.loads((tmp_path / "out" / "all_results.json").read_text())
    screen = capsys.readouterr().out
    assert found["cached"] is found["frozen_unchanged"] is True
    assert "mean (-0.4" in screen, "black pixels lie at -1 under a mean and std of 0.5"
    assert "they fit" in screen
    assert "vit.layers[0:3]" in screen.replace("encoder.layer", "layers")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image_size=16"], r"--image_size 16 was asked for; VGG16 halves an image five times\. Use 32 or more"),
        (["--frozen=1"], r"--frozen 1 was asked for; use 2 to 19, the layers of VGG16"),
    ],
)
def test_a_users_mistake_is_told_before_anything_is_trained(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *SMALL, f"--output_dir={tmp_path}", *options])
    with pytest.raises(FreezeError, match=message):
        RECIPE_MODULE.main()


# -------------------------------------------------------------------------------------------------------------- VGG16


@pytest.fixture
def small_vgg(monkeypatch: pytest.MonkeyPatch) -> Any:
    """All layers of VGG16, a sixteenth as wide."""
    monkeypatch.setattr(RECIPE_MODULE, "VGG16", tuple(width // 16 for width in RECIPE_MODULE.VGG16))
    torch.manual_seed(0)
    return RECIPE_MODULE.VGG16Classifier(RECIPE_MODULE.build_vgg16(), 32)


def test_vgg16_has_the_layers_of_the_paper() -> None:
    with torch.device("meta"):
        features = RECIPE_MODULE.build_vgg16()
    assert len(features) == 31  # as in torchvision and timm
    assert sum(isinstance(layer, nn.Conv2d) for layer in features) == 13
    assert sum(p.numel() for p in features.parameters()) == 14_714_688
    assert features.state_dict()["28.weight"].shape == (512, 512, 3, 3)


def test_the_first_ten_layers_end_with_the_third_convolution_of_the_third_block() -> None:
    with torch.device("meta"):
        layers = RECIPE_MODULE.keras_layers(RECIPE_MODULE.build_vgg16())
    names = [text.split()[0] for text, _ in layers]
    assert len(names) == 19  # Keras' VGG16 without its top
    assert names[:4] == ["input", "block1_conv1", "block1_conv2", "block1_pool"]
    assert layers[9] == ("block3_conv3 (features[14:16])", 16)
    assert names[-1] == "block5_pool"


def test_the_frozen_layers_do_not_move_and_the_pool_above_them_is_cached(small_vgg: Any, tmp_path: Path) -> None:
    model = small_vgg
    report = freeze(model, FreezePlan(encoder_blocks=16), blocks=model.features)
    assert [n for n in report.frozen_names if n.endswith("weight")] == [
        f"features.{place}.weight" for place in (0, 2, 5, 7, 10, 12, 14)
    ]
    anatomy = read_anatomy(model, blocks=model.features)
    assert anatomy.stacks[0].name == "encoder"
    assert {name.split(".")[0] for name in anatomy.head} == {"head"}
    assert anatomy.notes == ()
    train, _ = RECIPE_MODULE.digits(lambda grey: RECIPE_MODULE.resize_and_normalise(grey, 32), 24)
    cache = PrefixCache.build(model, train, cache_dir=tmp_path, blocks=model.features, progress=False)
    assert cache.cuts == (("encoder", 17),)
    (leaf,) = cache.prefix.leaves("stream").values()
    assert leaf.dims == ("rows", 16, 4, 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for start in range(0, 24, 8):
        batch = cache.collator([train[row] for row in range(start, start + 8)])
        plain = {key: value for key, value in batch.items() if key != "prefix_states"}
        assert model(**batch).loss.item() == pytest.approx(model(**plain).loss.item(), rel=1e-5)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert cache.batches_used == 6
    verify_frozen(model, report)


def test_weights_are_read_by_name_and_the_old_head_is_left_out(small_vgg: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "vgg16.safetensors")
    save_file({**small_vgg.state_dict(), "classifier.6.weight": torch.zeros(2, 2)}, path)
    features, source = RECIPE_MODULE.vgg16_features(path, False)
    assert path in source
    assert all(torch.equal(features.state_dict()[n], t) for n, t in small_vgg.features.state_dict().items())
    assert not torch.equal(features[0].weight, RECIPE_MODULE.build_vgg16()[0].weight), "random ones are others"


def test_weights_of_something_else_are_refused(small_vgg: Any, tmp_path: Path) -> None:
    features = small_vgg.features
    with pytest.raises(FreezeError, match=r"there is no such file"):
        RECIPE_MODULE.load_features(features, str(tmp_path / "none"))
    path = str(tmp_path / "other.safetensors")
    save_file({"layers.0.weight": torch.zeros(2)}, path)
    with pytest.raises(FreezeError, match=r"has no features\.0\.weight but layers\.0\.weight, \.\.\. Give VGG16's"):
        RECIPE_MODULE.load_features(features, path)
    save_file({f"features.{name}": t[:1].contiguous() for name, t in features.state_dict().items()}, path)
    with pytest.raises(FreezeError, match=r"has the shape \[1, 3, 3, 3\] there and \[4, 3, 3, 3\] in VGG16"):
        RECIPE_MODULE.load_features(features, path)


def test_pretrained_weights_need_someone_who_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FreezeError, match=r"neither torchvision nor timm is installed .* or give --weights"):
        RECIPE_MODULE.vgg16_features(None, True)


@pytest.mark.parametrize("owner", ["torchvision", "timm"])
def test_pretrained_weights_come_from_torchvision_or_timm(owner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = nn.Sequential(nn.Conv2d(3, 4, 3))

    class Theirs:
        features = theirs

    stand_in: Any = ModuleType(owner)
    models: Any = ModuleType(f"{owner}.models")
    models.vgg16 = stand_in.create_model = lambda *_, **__: Theirs
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == owner or None)
    monkeypatch.setitem(sys.modules, owner, stand_in)
    monkeypatch.setitem(sys.modules, f"{owner}.models", models)
    features, source = RECIPE_MODULE.vgg16_features(None, True)
    assert features is theirs
    assert source.startswith(owner)


# -------------------------------------------------------------------------------------------------------------- images


def test_the_digits_are_split_once_and_for_all_and_prepared_the_same_at_each_call() -> None:
    train, test = RECIPE_MODULE.digits(lambda grey: RECIPE_MODULE.resize_and_normalise(grey, 32), None)
    assert (len(train), len(test)) == (1437, 360)
    again, _ = RECIPE_MODULE.digits(lambda grey: RECIPE_MODULE.resize_and_normalise(grey, 32), 5)
    for row in range(5):
        assert torch.equal(train[row]["pixel_values"], again[row]["pixel_values"])
        assert train[row]["labels"] == again[row]["labels"]
    assert train[0]["pixel_values"].shape == (3, 32, 32)
    assert check_pixels(torch.stack([train[row]["pixel_values"] for row in range(8)])).fits


def test_a_vision_transformer_takes_whole_patches_only() -> None:
    with pytest.raises(FreezeError, match=r"--image_size 30 was asked for; the small ViT cuts patches of 4"):
        RECIPE_MODULE.small_vit(30)
    anatomy = read_anatomy(RECIPE_MODULE.small_vit(32))
    assert len(anatomy.encoder_blocks) == 8
    assert anatomy.notes == ()


def tiny_classifier(kind: str) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    stages = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    configs: dict[str, Any] = {
        "vit": ViTConfig(image_size=64, patch_size=16, **sizes),
        "dinov2": Dinov2Config(image_size=64, patch_size=16, **sizes),
        "swin": SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 2], window_size=4),
        "convnext": ConvNextConfig(**stages),
        "resnet": ResNetConfig(embedding_size=8, **stages),
    }
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(configs[kind])


@pytest.mark.parametrize("kind", ["vit", "dinov2", "swin", "convnext", "resnet"])
def test_classifiers_of_the_hub_are_frozen_by_structure_and_train_the_same_from_the_cache(
    kind: str, tmp_path: Path
) -> None:
    model = tiny_classifier(kind)
    report = freeze(model, FreezePlan())
    assert report.cuts[0].stack == "encoder"
    assert read_anatomy(model).notes == ()
    pixels = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    rows = [{"pixel_values": image, "labels": row % 2} for row, image in enumerate(pixels)]
    cache = PrefixCache.build(model, rows, cache_dir=tmp_path, progress=False)
    batch = cache.collator(rows[2:6])
    plain = {key: value for key, value in batch.items() if key != "prefix_states"}
    losses = []
    for given in (batch, plain):
        torch.manual_seed(1)  # the same dropout above the cut
        losses.append(model.train()(**given).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (cache.batches_used, cache.batches_unused) == (1, 1)
    verify_frozen(model, report)
