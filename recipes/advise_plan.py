"""Which depth to freeze, before any long run: trains a few steps at several depths, and prints a plan with its reasons.

    python recipes/advise_plan.py
        the shipped reviews and the embedded SmolLM2-135M: some minutes on 2 CPU cores
    python recipes/advise_plan.py --model_name_or_path facebook/bart-base --train_file train.jsonl \\
        --validation_file valid.jsonl --text_column review --summary_column title --output_dir out/advice

Nothing is trained for good. In --output_dir, if it is given: freeze_plan.json, for FreezePlan.from_pretrained, and
advice.json.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from hf_freeze import advise
from hf_freeze.cli import exit_code, worded_arguments
from hf_freeze.embedded import EMBEDDED_NAME
from hf_freeze.files import write_json
from hf_freeze.given import read_numbers
from hf_freeze.loading import load_generator
from hf_freeze.machine import find_device
from hf_freeze.summarization import SummaryCollator, read_splits, shipped_reviews
from hf_freeze.summarization.prompts import encode_reviews, read_prompt
from hf_freeze.training.precision import choose_precision


@dataclass
class AdviceArguments:
    """The model, the reviews, and how long the probe may take."""

    model_name_or_path: str = field(
        default=EMBEDDED_NAME,
        metadata={"help": f"A hub id, a folder, a delta, or {EMBEDDED_NAME!r} for the embedded one."},
    )
    depths: str = field(default="", metadata={"help": "Frozen blocks, comma-separated; empty chooses some."})
    learning_rates: str = field(default="", metadata={"help": "To try at each depth; empty chooses some."})
    steps: int = field(default=16, metadata={"help": "Of training at each depth and learning rate."})
    batch_size: int = field(default=8, metadata={"help": "Reviews a step."})
    epochs: float = field(default=3.0, metadata={"help": "Of the run that the advice is for."})
    precision: str = field(default="auto", metadata={"help": "auto, fp32 or bf16."})
    device: str = field(default="", metadata={"help": "Empty takes the accelerator if there is one."})
    train_rows: int | None = field(default=None, metadata={"help": "Rows of the run; None is all."})
    train_file: str | None = field(default=None, metadata={"help": "None takes the shipped reviews."})
    validation_file: str | None = field(default=None, metadata={"help": "None sets a tenth of train aside."})
    text_column: str | None = field(default=None, metadata={"help": "None guesses, and says so."})
    summary_column: str | None = field(default=None, metadata={"help": "None guesses, and says so."})
    prompt_template: str | None = field(default=None, metadata={"help": "Text around {review}."})
    max_source_tokens: int = field(default=512, metadata={"help": "Longer reviews lose their end."})
    max_summary_tokens: int = field(default=64, metadata={"help": "Longest summary, its end token included."})
    seed: int = field(default=0, metadata={"help": "Chooses the rows."})
    output_dir: str | None = field(default=None, metadata={"help": "Where plan and advice are written."})


def main() -> None:
    with worded_arguments():
        (asked,) = HfArgumentParser(AdviceArguments, allow_abbrev=False).parse_args_into_dataclasses()
    depths, rates = read_numbers(asked.depths, int), read_numbers(asked.learning_rates, float)
    device = find_device(asked.device)
    if asked.output_dir is not None:  # that nothing can be written there is told now, not after minutes
        Path(asked.output_dir).mkdir(parents=True, exist_ok=True)
    model, tokenizer, _ = load_generator(asked.model_name_or_path, None, torch.float32)
    model.float().to(device)  # a delta comes in the dtype that it was trained in

    sources = (asked.train_file, asked.validation_file, None)
    columns = {"text_column": asked.text_column, "summary_column": asked.summary_column}
    splits = read_splits(*sources, **columns) if any(sources) else shipped_reviews()
    for name in ("train", "validation"):
        print(f"{name}: {splits[name]}")
    prompt = read_prompt(
        tokenizer,
        model.config,
        template=asked.prompt_template,
        max_source_tokens=asked.max_source_tokens,
        max_summary_tokens=asked.max_summary_tokens,
    )
    encoded = {name: encode_reviews(splits[name].dataset, prompt) for name in ("train", "validation")}
    for note in (*prompt.notes, *encoded["train"].notes):
        print(f"note: {note}")
    train, validation = (encoded[name].dataset for name in ("train", "validation"))
    if asked.train_rows is not None:
        train = train.shuffle(seed=asked.seed).select(range(min(asked.train_rows, len(train))))

    precision = choose_precision(asked.precision, device)
    print(f"precision {precision}")
    advice = advise(
        model,
        train,
        SummaryCollator(tokenizer, model, pad_to_multiple_of=32 if prompt.max_tokens is None else None),
        validation_dataset=validation,
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
