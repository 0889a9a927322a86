"""Classifies images with the lower layers frozen: VGG16's first ten, or the lower half of a vision transformer.

    python recipes/classify_images.py
        VGG16 below a head Flatten -> Dense 128 ReLU -> Dense 10, on scikit-learn's handwritten digits: a minute on a
        CPU core, 94 % right from random weights
    python recipes/classify_images.py --weights vgg16.safetensors
        from pretrained weights: a file with torchvision's names (features.0.weight ...), which timm's share; or
        --pretrained true, where torchvision or timm is installed to fetch them
    python recipes/classify_images.py --model vit
        a small vision transformer with random weights, its lower half frozen: 45 s on a CPU core, 55 % right
        (61 % at --learning_rate 2e-3): it shows how one is frozen, not how good one is
    python recipes/classify_images.py --model google/vit-base-patch16-224
        any image classifier of the hub whose blocks `freeze` finds; its own image processor prepares the digits
    python recipes/classify_images.py --cache_prefix false
        plain freezing, for its time beside the cached one

"The first ten layers" is counted as Keras counts `vgg16.layers[:10]`: the input is one, a convolution and its ReLU are
one, a pool is one. They end with the third convolution of the third block, that is features[0:16] in torchvision's and
timm's numbering: 7 of 13 convolutions. The pool after it, features[16], has no weights and is cached with them.

In --output_dir: the model, all_results.json, trainer_state.json.
"""

import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import ImageClassifierOutput

from hf_freeze import FreezeError, FreezePlan, PrefixCache, freeze, verify_frozen
from hf_freeze.cli import exit_code, worded_arguments
from hf_freeze.errors import ModelError
from hf_freeze.inputs.pixels import IMAGENET_MEAN, IMAGENET_STD, check_pixels
from hf_freeze.machine import find_accelerators

CLASSES, TEST_ROWS = 10, 360

# Very Deep Convolutional Networks for Large-Scale Image Recognition (Simonyan and Zisserman, 2014), table 1, column D:
# the width of each 3 x 3 convolution, 0 for a pool.
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


@dataclass
class ImageArguments:
    """The model, what of it is frozen, and the images."""

    model: str = field(default="vgg16", metadata={"help": "vgg16, vit (small, random), a hub id or a folder."})
    weights: str | None = field(default=None, metadata={"help": "VGG16: a safetensors file with features.0.weight ..."})
    pretrained: bool = field(default=False, metadata={"help": "VGG16: fetch weights through torchvision or timm."})
    frozen: int | None = field(
        default=None, metadata={"help": "VGG16: layers as Keras counts them, 10 by default. Others: blocks, or half."}
    )
    image_size: int = field(default=32, metadata={"help": "Height and width; a hub model's processor has its own."})
    cache_prefix: bool = field(default=True, metadata={"help": "Compute the frozen part once for each image."})
    prefix_cache_dir: str | None = field(default=None, metadata={"help": "None: ~/.cache/hf_freeze/prefix."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Only the first ones; None: all 1,437."})


@dataclass
class RunArguments(TrainingArguments):
    """Trainer's arguments, with the defaults of this recipe."""

    output_dir: str = field(default="out/digits", metadata={"help": "Model and results."})
    num_train_epochs: float = field(default=6.0, metadata={"help": "Passes over the training images."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Images at once on a device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images at once when scored."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Of AdamW, falling to 0."})
    logging_strategy: str = field(default="epoch", metadata={"help": "When a line with the loss is printed."})
    save_strategy: str = field(default="no", metadata={"help": "The trained model is written at the end."})
    report_to: str = field(default="none", metadata={"help": "Where else to log."})
    use_cpu: bool = field(default=not find_accelerators(), metadata={"help": "Leave accelerators alone."})


class VGG16Classifier(nn.Module):
    """Features -> Flatten -> Dense 128 ReLU -> Dense classes; returns the loss where labels are given."""

    def __init__(self, features: nn.Sequential, image_size: int) -> None:
        super().__init__()
        side = image_size // 2 ** VGG16.count(0)
        if side < 1:
            raise FreezeError(
                f"--image_size {image_size} was asked for; VGG16 halves an image five times. Use 32 or more."
            )
        self.features = features
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(VGG16[-2] * side * side, 128), nn.ReLU(), nn.Linear(128, CLASSES)
        )

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """[rows, 3, height, width] -> logits [rows, classes]"""
        logits = self.head(self.features(pixel_values))
        return ImageClassifierOutput(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)


class Digits(torch.utils.data.Dataset):
    """Handwritten digits [rows, 8, 8] as the model takes images. Prepared when asked for: the same at each call."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, prepare: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.images, self.labels, self.prepare = images, labels, prepare

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        grey = torch.from_numpy(self.images[row]).float() / 16  # a digit's pixels go from 0 to 16
        return {"pixel_values": self.prepare(grey), "labels": int(self.labels[row])}


def main() -> None:
    with worded_arguments():
        asked, args = HfArgumentParser((ImageArguments, RunArguments), allow_abbrev=False).parse_args_into_dataclasses()
    if asked.max_train_rows is not None and asked.max_train_rows < 1:
        raise FreezeError(f"--max_train_rows {asked.max_train_rows} was asked for; use 1 or more.")
    say = print if args.process_index == 0 else lambda *_: None

    # The model, and what its pixels must look like.
    torch.manual_seed(args.seed)
    processor: Any = None
    prepare = partial(resize_and_normalise, size=asked.image_size)
    if asked.model == "vgg16":
        features, source = vgg16_features(asked.weights, asked.pretrained)
        model: nn.Module = VGG16Classifier(features, asked.image_size)
    elif asked.model == "vit":
        model, source = small_vit(asked.image_size), "random weights: what is frozen has learnt nothing"
    else:
        try:
            processor, source = AutoImageProcessor.from_pretrained(asked.model), asked.model
            model = AutoModelForImageClassification.from_pretrained(
                asked.model, num_labels=CLASSES, ignore_mismatched_sizes=True
            )
        except Exception as error:  # a foreign loader may raise anything
            raise ModelError(
                f"--model {asked.model} was asked for; it cannot be loaded here: {error}. Use vgg16, vit, a hub id or "
                "a folder of an image classifier."
            ) from error
        prepare = partial(by_processor, processor=processor)
    say(f"{asked.model}: {source}.")
    train, test = digits(prepare, asked.max_train_rows)
    few = torch.stack([train[row]["pixel_values"] for row in range(min(32, len(train)))])
    say(check_pixels(few, processor))  # raw pixels train badly without a word

    # Freeze, and say what that is.
    blocks = model.features if asked.model == "vgg16" else None  # of others, freeze finds the blocks itself
    if asked.model == "vgg16":
        layers = keras_layers(model.features)
        frozen = 10 if asked.frozen is None else asked.frozen
        if not 2 <= frozen <= len(layers):  # the first one is the input
            raise FreezeError(f"--frozen {frozen} was asked for; use 2 to {len(layers)}, the layers of VGG16.")
        say(f"The first {frozen} layers, as Keras counts:", ", ".join(text for text, _ in layers[:frozen]))
        plan = FreezePlan(encoder_blocks=layers[frozen - 1][1])
    else:
        plan = FreezePlan(encoder_blocks=asked.frozen)
    report = freeze(model.to(args.device), plan, blocks=blocks)
    say(report)

    trainer = Trainer(model=model, args=args, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)
    results: dict[str, Any] = {"cached": asked.cache_prefix}
    if asked.cache_prefix:
        started = time.perf_counter()
        # No image is changed at random: augmentation would give other pixels at every epoch, and be declined.
        prepared = PrefixCache.prepare(
            model, train, trainer.data_collator, cache_dir=asked.prefix_cache_dir, blocks=blocks
        )
        steps = round(args.num_train_epochs * len(trainer.get_train_dataloader()))
        saving = prepared.predict(steps=steps, batch_size=args.train_batch_size)
        say(saving)
        cache = prepared.build()
        say(cache.report)
        trainer.data_collator = cache.collator
        results["cache_seconds"] = time.perf_counter() - started  # the proof and the prediction in it
        results["predicted_plain_step_seconds"] = saving.plain_step_seconds
        results["predicted_cached_step_seconds"] = saving.cached_step_seconds

    trained = trainer.train()
    results |= {"train_seconds": trained.metrics["train_runtime"], "train_loss": trained.training_loss}
    results["step_seconds"] = results["train_seconds"] / trained.global_step
    results["accuracy"] = trainer.evaluate()["eval_accuracy"]
    proof = verify_frozen(model, report)
    results["frozen_unchanged"] = True
    say(proof)
    say(f"Accuracy on {len(test)} images that were not trained on: {100 * results['accuracy']:.1f} %")
    say(
        f"{trained.global_step} steps: {results['train_seconds']:.1f} s, {results['step_seconds']:.3f} s a step"
        + (
            f" from the cache, {results['cache_seconds']:.1f} s to prove, predict and build it; plainly a forward and "
            f"backward pass alone took {saving.plain_step_seconds:.3f} s, from the cache "
            f"{saving.cached_step_seconds:.3f} s"
            if asked.cache_prefix
            else " without a cache"
        )
    )
    trainer.save_model()
    trainer.save_metrics("all", results)
    trainer.save_state()


# --------------------------------------------------------------------------------------------------------------- models


def vgg16_features(weights: str | None, pretrained: bool) -> tuple[nn.Sequential, str]:
    """VGG16's convolutions and pools, and where they are from."""
    if pretrained and not weights:
        if importlib.util.find_spec("torchvision"):
            from torchvision.models import vgg16

            return vgg16(weights="IMAGENET1K_V1").features, "torchvision's, trained on ImageNet"
        if importlib.util.find_spec("timm"):
            import timm

            return timm.create_model("vgg16.tv_in1k", pretrained=True).features, "timm's, trained on ImageNet"
        raise FreezeError(
            "--pretrained true was asked for; neither torchvision nor timm is installed to fetch the weights. Install "
            "one of them, or give --weights, a safetensors file."
        )
    features = build_vgg16()
    if weights:
        load_features(features, weights)
        return features, f"weights of {weights}"
    return features, "random weights: what is frozen has learnt nothing. Pretrained ones: --weights or --pretrained"


def build_vgg16() -> nn.Sequential:
    """The layers in the order, and so under the names, of torchvision's and timm's; started as torchvision's are."""
    layers: list[nn.Module] = []
    channels = 3
    for width in VGG16:
        if not width:
            layers.append(nn.MaxPool2d(2))
            continue
        convolution = nn.Conv2d(channels, width, 3, padding=1)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(convolution.bias)
        layers += [convolution, nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers)


def load_features(features: nn.Sequential, path: str) -> None:
    """Copies the tensors features.* of a safetensors file into the layers; the file's old head is left out."""
    if not Path(path).is_file():
        raise FreezeError(f"--weights {path} was given; there is no such file.")
    wanted = features.state_dict()
    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise FreezeError(f"--weights {path} was given; it is no safetensors file, or damaged ({error}).") from error
    with opened as file:
        names = set(file.keys())
        if missing := [name for name in wanted if f"features.{name}" not in names]:
            raise FreezeError(
                f"--weights {path} was given; it has no features.{missing[0]} but {', '.join(sorted(names)[:3])}, ... "
                "Give VGG16's weights under torchvision's names."
            )
        found = {name: file.get_tensor(f"features.{name}") for name in wanted}
    unlike = [name for name in wanted if found[name].shape != wanted[name].shape]
    if unlike:
        raise FreezeError(
            f"--weights {path} was given; features.{unlike[0]} has the shape {list(found[unlike[0]].shape)} there and "
            f"{list(wanted[unlike[0]].shape)} in VGG16. It is another network's."
        )
    features.load_state_dict(found)


def keras_layers(features: nn.Sequential) -> list[tuple[str, int]]:
    """VGG16's layers as Keras names and counts them, each with how many of our modules lie up to its end."""
    layers, block, number = [("input (no module)", 0)], 1, 0
    for place, module in enumerate(features):
        if isinstance(module, nn.Conv2d):
            number += 1
            layers.append((f"block{block}_conv{number} (features[{place}:{place + 2}])", place + 2))
        elif isinstance(module, nn.MaxPool2d):
            layers.append((f"block{block}_pool (features[{place}])", place + 1))
            block, number = block + 1, 0
    return layers


def small_vit(image_size: int) -> nn.Module:
    """A vision transformer of 8 blocks over patches of 4 x 4, with random weights."""
    if image_size % 4:
        raise FreezeError(f"--image_size {image_size} was asked for; the small ViT cuts patches of 4. Use 32.")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(image_size=image_size, patch_size=4, num_labels=CLASSES, **sizes))


# --------------------------------------------------------------------------------------------------------------- images


def digits(prepare: Callable[[torch.Tensor], torch.Tensor], max_train_rows: int | None) -> tuple[Digits, Digits]:
    """Scikit-learn's 1,797 digits: training and test images, drawn with a fixed seed."""
    images, labels = load_digits().images, load_digits().target
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = order[:TEST_ROWS], order[TEST_ROWS:][:max_train_rows]
    return Digits(images[train], labels[train], prepare), Digits(images[test], labels[test], prepare)


def resize_and_normalise(grey: torch.Tensor, size: int) -> torch.Tensor:
    """[8, 8] in 0..1 -> [3, size, size], normalised as ImageNet's images are for torchvision's and timm's VGG16."""
    colour = interpolate(grey[None, None], size=(size, size), mode="bilinear").expand(1, 3, size, size)[0]
    return (colour - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


def by_processor(grey: torch.Tensor, processor: Any) -> torch.Tensor:
    """[8, 8] in 0..1 -> what the pretrained model's own image processor makes of it."""
    image = Image.fromarray((grey * 255).round().byte().numpy()).convert("RGB")
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


def accuracy(scored: Any) -> dict[str, float]:
    """The part of the images whose largest logit is the label's."""
    return {"accuracy": float((scored.predictions.argmax(-1) == scored.label_ids).mean())}


if __name__ == "__main__":
    sys.exit(exit_code(main))
