"""Shows what each layer of a model has learnt: pictures, their numbers as JSON, and a page that says how to read them.

    python recipes/inspect_layers.py --max_texts 6 --max_tokens 64
        the embedded SmolLM2-135M on six of the shipped reviews: about half a minute on one CPU core
    python recipes/inspect_layers.py --model_name_or_path out/summaries-1 --compare_to smollm2
        a fine-tuned model beside the pretrained one: which layers it changed, by similarity and by drift; 16 reviews
    python recipes/inspect_layers.py --model_name_or_path facebook/bart-large-cnn \\
        --text_file reviews.csv --text_column review --output_dir out/bart-layers
        your own texts; encoder and decoder are both shown

In --output_dir, over what an earlier run left there: index.html, which opens without a network and can be sent as one
file, and for each picture a .png, a .svg and a .json. What a model has not (attention, a head) is declined on the page,
with the reason. From the JSON a picture is drawn again without the model:

    from hf_freeze.lens import WeightDrift
    from hf_freeze.lens.plots import draw
    draw(WeightDrift.from_dict(json.load(open("out/layers/drift.json"))), "drift")
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import HfArgumentParser

from hf_freeze import FreezeError, read_anatomy
from hf_freeze.cli import exit_code, worded_arguments
from hf_freeze.embedded import EMBEDDED_NAME
from hf_freeze.errors import TokenizerMismatch
from hf_freeze.files import write_json
from hf_freeze.lens import (
    activation_map,
    attention_map,
    block_gradients,
    layer_similarity,
    logit_lens,
    text_batches,
    weight_drift,
)
from hf_freeze.lens.plots import draw
from hf_freeze.loading import load_any, load_generator
from hf_freeze.machine import find_device
from hf_freeze.pages import data_uri, write_page
from hf_freeze.plots import plain_style
from hf_freeze.summarization import (
    SummaryCollator,
    check_tokenizer,
    encode_reviews,
    read_prompt,
    read_reviews,
    shipped_reviews,
)


@dataclass
class InspectArguments:
    """The model, what it reads, and where the pictures go."""

    model_name_or_path: str = field(
        default=EMBEDDED_NAME, metadata={"help": f"A hub id, a folder, or {EMBEDDED_NAME!r} for the embedded model."}
    )
    compare_to: str | None = field(
        default=None, metadata={"help": "Another model with the same tokenizer, such as the one this was trained from."}
    )
    text_file: str | None = field(
        default=None, metadata={"help": "CSV, TSV, JSONL or Parquet, or a folder of them; none: the shipped reviews."}
    )
    text_column: str | None = field(default=None, metadata={"help": "None guesses, and says so."})
    summary_column: str | None = field(
        default=None, metadata={"help": "None guesses. With summaries, gradients are those of summarising."}
    )
    max_texts: int = field(default=16, metadata={"help": "Only the first ones are read; more are steadier figures."})
    max_tokens: int = field(default=128, metadata={"help": "Longer texts lose their end."})
    batch_size: int = field(default=4, metadata={"help": "Texts at once."})
    attention_block: int | None = field(default=None, metadata={"help": "-1 is the top one; none: the middle one."})
    output_dir: str = field(default="out/layers", metadata={"help": "Where everything is written."})


LOOKS = (
    "Each row is a token that looks and dark cells are what it looks at: a dark first column is a head at rest, a dark "
    "diagonal one that looks at the token itself or its neighbour."
)
READINGS = {  # in the order of the page: a picture's name, its title, and how to read it
    "compared": (
        "Which layers were changed",
        "On the right, 0 means that a layer still says the same as that layer of the other model, but for rotation and "
        "scale; where the line rises, the two begin to differ.",
    ),
    "drift": (
        "How far the weights moved",
        "0 is a part whose weights are those of the other model, 0.01 one that moved by a hundredth of its length; "
        "hatched bars are no blocks. Adapters count as what they add.",
    ),
    "similarity": (
        "Which layers are alike",
        "A dark square is a run of layers that hold much the same; where it ends, something new is computed. Linear "
        "CKA: 1 is the same but for rotation and scale, 0 unrelated.",
    ),
    "logit_lens": (
        "Where the answer is decided",
        "Read the curves from left to right: the layer where they rise is where the model's final choice is made, and "
        "layers below it do not know it yet; in the table below, bold is that choice.",
    ),
    "gradients": (
        "Where the data pulls",
        "High bars are the parts that the loss of {task} asks to change most, in the lower panel in proportion to "
        "their weights. A hint where to train and no proof: recipes/sweep_depth.py measures what a depth costs.",
    ),
    "activations": (
        "How large the states are",
        "Each column is a token on its way up: a single dark column is where the model parks its attention, and a "
        "layer at which all columns darken is one that writes much.",
    ),
    "encoder_attention": ("What encoder block {encoder} looks at", LOOKS),
    "decoder_attention": ("What decoder block {decoder} looks at", LOOKS),
    "cross_attention": ("What decoder block {decoder} looks at in the encoder", LOOKS),
}


def main() -> None:
    with worded_arguments():
        (args,) = HfArgumentParser(InspectArguments, allow_abbrev=False).parse_args_into_dataclasses()
    if args.max_texts < 1:
        raise FreezeError(f"--max_texts {args.max_texts} was asked for; use 1 or more.")
    with plain_style():  # a missing matplotlib is told now, not after minutes
        pass
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)

    # The texts first: a wrong column should not wait for a model to load.
    if args.text_file:
        columns = {"text_column": args.text_column, "summary_column": args.summary_column}
        reviews = read_reviews(args.text_file, **columns, need_summaries=False)
    else:
        reviews = shipped_reviews()["test"]
    print(reviews)
    rows = reviews.dataset.select(range(min(args.max_texts, len(reviews))))
    texts = list(rows["review"])

    model, tokenizer, _ = load_generator(args.model_name_or_path, None, torch.float32)
    model = on_device(model)
    other = on_device(load_any(args.compare_to, None, torch.float32)) if args.compare_to else None
    print(check_tokenizer(model, tokenizer, samples=texts))
    anatomy = read_anatomy(model)
    print(f"\n{anatomy}\n")

    # What the model reads. Texts and settings that do not fit end the run here: below, a reason goes onto the page.
    summaries = list(rows["summary"]) if reviews.summary_column and all(rows["summary"]) else None
    targets = summaries if len(anatomy.stacks) == 2 else None  # what the decoder reads
    read = {"targets": targets, "batch_size": args.batch_size, "max_tokens": args.max_tokens}
    batches = text_batches(model, tokenizer, texts, **read)
    if summaries:
        batches = summary_batches(model, tokenizer, rows, args)
    blocks = {stack.name: chosen_block(stack, args.attention_block) for stack in anatomy.stacks}
    words = {"task": "writing the summary" if summaries else "writing the text itself", **blocks}

    looks = [model, tokenizer, texts]
    first = {"target": targets and targets[0]}
    measures = {
        "compared": partial(layer_similarity, *looks, other, **read) if other is not None else None,
        "drift": partial(weight_drift, model, other) if other is not None or isinstance(model, PeftModel) else None,
        "similarity": partial(layer_similarity, *looks, **read),
        "logit_lens": partial(logit_lens, *looks, **read),
        "gradients": partial(block_gradients, model, batches),
        "activations": partial(activation_map, model, tokenizer, texts[0], **first),
    }
    attention = partial(attention_map, model, tokenizer, texts[0], **first)
    for stack, block in blocks.items():
        measures[f"{stack}_attention"] = partial(attention, block, stack=stack)
    if len(blocks) == 2:
        measures["cross_attention"] = partial(attention, blocks["decoder"], stack="decoder", cross=True)

    pictures = []
    for name, (title, reading) in READINGS.items():
        if measures.get(name) is not None:
            values = {"name": name, "title": title.format(**words), "reading": reading.format(**words)}
            print(f"\n{values['title']}")
            pictures.append(values | take_picture(measures[name], folder / name))
    models = f"{args.model_name_or_path} beside {args.compare_to}" if args.compare_to else args.model_name_or_path
    title = f"What each layer of {models} has learnt"
    write_page(folder / "index.html", "layers.html", title=title, texts=f"{len(texts)} texts", pictures=pictures)
    print(f"\nOpen {folder / 'index.html'}")


def summary_batches(model: Any, tokenizer: Any, rows: Any, args: InspectArguments) -> list[dict[str, torch.Tensor]]:
    """The reviews with their summaries, as in training."""
    try:
        prompt = read_prompt(tokenizer, model.config, max_source_tokens=args.max_tokens)
    except TokenizerMismatch as error:
        raise FreezeError(f"--max_tokens {args.max_tokens} was asked for, as max_source_tokens. {error}") from error
    encoded = list(encode_reviews(rows, prompt).dataset)
    collator = SummaryCollator(tokenizer, model)
    return [collator(encoded[start : start + args.batch_size]) for start in range(0, len(encoded), args.batch_size)]


def chosen_block(stack: Any, asked: int | None) -> int:
    """The block whose attention is shown: the one asked for, else the middle one."""
    block = len(stack) // 2 if asked is None else asked
    if not -len(stack) <= block < len(stack):
        raise FreezeError(
            f"--attention_block {block} was asked for; the {stack.name} has the blocks 0 to {len(stack) - 1} "
            "(-1 is the top one)."
        )
    return block % len(stack)


def take_picture(measure: Callable[[], Any], path: Path) -> dict[str, str]:
    """Measures, writes numbers and picture, and gives what the page shows: the picture, or why there is none."""
    try:
        numbers = measure()
    except FreezeError as reason:  # a model without attention or head still has the other pictures
        print(f"declined: {reason}")
        return {"reason": str(reason)}
    write_json(path.with_name(f"{path.name}.json"), numbers.to_dict())
    png, _ = draw(numbers, path)
    if numbers.table():
        print(numbers)
    return {"source": data_uri(png.read_bytes(), "png")}


def on_device(model: Any) -> Any:
    """In fp32, a delta's weights too."""
    return model.float().to(find_device())


if __name__ == "__main__":
    sys.exit(exit_code(main))
