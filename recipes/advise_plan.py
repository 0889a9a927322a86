"""Which depth to freeze, before any long run: trains a few steps at several depths, and prints a plan with its reasons.

    python recipes/advise_plan.py
        the shipped reviews and the embedded SmolLM2-135M: some minutes on 2 CPU cores
    python recipes/advise_plan.py --model_name_or_path facebook/bart-base --train_file train.jsonl \\
        --validation_file valid.jsonl --text_column review --summary_column title --output_dir out/advice

Nothing is trained for good. In --output_dir, if it is given: freeze_plan.json, for FreezePlan.from_pretrained, and
advice.json.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import HfArgumentParser

from hf_freeze import advise
from hf_freeze.cli import exit_code
from hf_freeze.embedded import EMBEDDED_NAME
from hf_freeze.files import write_json
from hf_freeze.given import read_numbers, worded_arguments
from hf_freeze.loading import load_generator
from hf_freeze.machine import find_device
from hf_freeze.summarization.arguments import ReviewArguments, argument
from hf_freeze.summarization.runs import encode_splits
from hf_freeze.training.precision import choose_precision


@dataclass
class AdviceArguments(ReviewArguments):
    """The model, the reviews, and how long the probe may take."""

    model_name_or_path: str = argument(
        EMBEDDED_NAME, f"A hub id, a folder, a delta, or {EMBEDDED_NAME!r} for the embedded one."
    )
    depths: str = argument("", "Frozen blocks, comma-separated; empty chooses some.")
    learning_rates: str = argument("", "To try at each depth; empty chooses some.")
    steps: int = argument(16, "Of training at each depth and learning rate.")
    batch_size: int = argument(8, "Reviews a step.")
    epochs: float = argument(3.0, "Of the run that the advice is for.")
    precision: str = argument("auto", "auto, fp32 or bf16.")
    device: str = argument("", "Empty takes the accelerator if there is one.")
    train_rows: int | None = argument(None, "Rows of the run; None is all.")
    seed: int = argument(0, "Chooses the rows.")
    output_dir: str | None = argument(None, "Where plan and advice are written.")


def main() -> None:
    with worded_arguments():
        (asked,) = HfArgumentParser(AdviceArguments, allow_abbrev=False).parse_args_into_dataclasses()
    depths, rates = read_numbers(asked.depths, int), read_numbers(asked.learning_rates, float)
    device = find_device(asked.device)
    if asked.output_dir is not None:  # that nothing can be written there is told now, not after minutes
        Path(asked.output_dir).mkdir(parents=True, exist_ok=True)
    model, tokenizer, _ = load_generator(asked.model_name_or_path, None, torch.float32)
    model.float().to(device)  # a delta comes in the dtype that it was trained in

    splits, _ = asked.read()
    for name in ("train", "validation"):
        print(f"{name}: {splits[name]}")
    rows = {name: split.dataset for name, split in splits.items()}
    inputs = encode_splits(rows, model, tokenizer, **asked.prompting())
    for note in inputs.notes:
        print(f"note: {note}")
    train = inputs.train
    if asked.train_rows is not None:
        train = train.shuffle(seed=asked.seed).select(range(min(asked.train_rows, len(train))))

    precision = choose_precision(asked.precision, device)
    print(f"precision {precision}")
    advice = advise(
        model,
        train,
        inputs.collator,
        validation_dataset=inputs.validation,
        tokenizer=tokenizer,
        depths=depths or None,
        learning_rates=rates or None,
        steps=asked.steps,
        batch_size=asked.batch_size,
        epochs=asked.epochs,
        precision=precision.name,
        seed=asked.seed,
    )
    print(f"\n{advice}")
    if asked.output_dir is not None:
        advice.plan.save_pretrained(asked.output_dir)
        write_json(Path(asked.output_dir) / "advice.json", advice.to_dict())
        print(f"\nThe plan and the advice: {asked.output_dir}. To train by it:")
        load = f"freeze(model, FreezePlan.from_pretrained({asked.output_dir!r}))"
        print(f"  {load}, and learning_rate={advice.learning_rate:.2g}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
