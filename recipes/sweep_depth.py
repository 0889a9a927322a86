"""Which depth to freeze: trains at several depths from one pass of the prefix cache, and compares ROUGE, time, memory.

    python recipes/sweep_depth.py
        the shipped reviews, the embedded SmolLM2-135M, depths 0, 10, 20, 26 of 30 and full fine-tuning, one seed:
        about 12 minutes on 2 CPU cores
    python recipes/sweep_depth.py --train_file train.jsonl --validation_file valid.jsonl --test_file test.jsonl \\
        --text_column review --summary_column title --prompt_template $'Review: {review}\\nTitle:' \\
        --depths 0,15,22,26,28 --train_rows 128,512 --seeds 1,2,3 --learning_rates 1e-4,3e-4,1e-3 --output_dir out/sweep
        the grid of the README; interrupted, the same command goes on
    python recipes/sweep_depth.py --output_dir out/sweep --draw_only true
        table and plot again, from the lines of finished runs

In --output_dir: runs.jsonl (a line for each run), sweep.json, table.md, pareto.png, pareto.svg.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, HfArgumentParser

from hf_freeze import FreezeError, SweepReport, draw_sweep
from hf_freeze.embedded import EMBEDDED_NAME, embedded_model
from hf_freeze.summarization import SummaryTrainingArguments, read_splits, shipped_reviews
from hf_freeze.summarization.sweeping import sweep_reviews


@dataclass
class SweepArguments:
    """The grid, the model and the reviews."""

    model_name_or_path: str = field(
        default=EMBEDDED_NAME, metadata={"help": f"A hub id, a folder, or {EMBEDDED_NAME!r} for the embedded model."}
    )
    depths: str = field(default="0,10,20,26", metadata={"help": "Frozen blocks, from the bottom, comma-separated."})
    learning_rates: str = field(
        default="1e-4,3e-4", metadata={"help": "To try at each depth with the first seed; the best is kept."}
    )
    seeds: str = field(default="1", metadata={"help": "Each chooses other rows, in another order."})
    train_rows: str = field(default="", metadata={"help": "Numbers of training rows; empty is all."})
    references: str = field(default="full", metadata={"help": "Of full and lora; empty for none."})
    halving: int | None = field(default=None, metadata={"help": "For long grids: keep 1 in so many at each rung."})
    cache_prefix: bool = field(default=True, metadata={"help": "Compute the frozen prefixes once, for all depths."})
    prefix_cache_dir: str | None = field(default=None, metadata={"help": "None: ~/.cache/hf_freeze/prefix."})
    quality: str = field(default="rougeL", metadata={"help": "What table and plot compare: a ROUGE, or eval_loss."})
    draw_only: bool = field(default=False, metadata={"help": "Train nothing: table and plot of what is there."})
    train_file: str | None = field(default=None, metadata={"help": "None takes the shipped reviews."})
    validation_file: str | None = field(default=None, metadata={"help": "None sets a tenth of train aside."})
    test_file: str | None = field(default=None, metadata={"help": "None scores on the validation rows."})
    text_column: str | None = field(default=None, metadata={"help": "None guesses, and says so."})
    summary_column: str | None = field(default=None, metadata={"help": "None guesses, and says so."})
    prompt_template: str | None = field(default=None, metadata={"help": "Text around {review}."})
    max_source_tokens: int = field(default=512, metadata={"help": "Longer reviews lose their end."})
    max_summary_tokens: int = field(default=64, metadata={"help": "Longest summary, its end token included."})
    max_validation_rows: int = field(default=256, metadata={"help": "Validation rows; learning rates are chosen by."})
    max_test_rows: int = field(default=300, metadata={"help": "Test reviews that every run summarises."})


@dataclass
class RunArguments(SummaryTrainingArguments):
    """Trainer's arguments, with the defaults of this recipe."""

    output_dir: str = field(default="out/sweep", metadata={"help": "A sweep goes on where it lies."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Of every run."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Reviews at once on a device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Reviews scored or summarised at once."})


def main() -> None:
    asked, args = HfArgumentParser((SweepArguments, RunArguments)).parse_args_into_dataclasses()
    folder = Path(args.output_dir)
    if not asked.draw_only:
        splits = {name: reviews.dataset for name, reviews in load_reviews(asked).items()}
        for name in ("validation", "test"):
            most = getattr(asked, f"max_{name}_rows")
            splits[name] = splits[name].select(range(min(most, len(splits[name]))))
        make_model, tokenizer = load(asked.model_name_or_path)
        sweep_reviews(
            make_model,
            tokenizer,
            splits,
            args,
            numbers(asked.depths, int),
            output_dir=folder,
            prompt_template=asked.prompt_template,
            max_source_tokens=asked.max_source_tokens,
            max_summary_tokens=asked.max_summary_tokens,
            quality=asked.quality,
            learning_rates=numbers(asked.learning_rates, float),
            seeds=numbers(asked.seeds, int),
            train_rows=numbers(asked.train_rows, int) or None,
            references=[name for name in asked.references.split(",") if name],
            halving=asked.halving,
            use_cache=asked.cache_prefix,
            cache_dir=asked.prefix_cache_dir,
            progress=not args.disable_tqdm,
        )
    report = SweepReport.load(folder, quality=asked.quality)
    print(f"\n{report}\n")
    (folder / "table.md").write_text(report.table().to_markdown() + "\n", encoding="utf-8")
    png, svg = draw_sweep(report, folder / "pareto")
    print(f"Runs, table and plot: {folder / 'runs.jsonl'}, {folder / 'table.md'}, {png}, {svg}")


def numbers(text: str, kind: type) -> list:
    """ "0,15,22" as numbers."""
    try:
        return [kind(piece) for piece in text.split(",") if piece.strip()]
    except ValueError:
        raise FreezeError(f"{text!r} was given; use numbers with commas between them, such as 0,15,22.") from None


def load_reviews(asked: SweepArguments) -> dict:
    """The user's files, or the shipped reviews."""
    sources = (asked.train_file, asked.validation_file, asked.test_file)
    if not any(sources):
        return shipped_reviews()
    return read_splits(*sources, text_column=asked.text_column, summary_column=asked.summary_column)


def load(name: str):
    """A function that loads the model anew at each call, and the tokenizer."""
    source = str(embedded_model()) if name == EMBEDDED_NAME else name
    auto_class = (
        AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(source).is_encoder_decoder else AutoModelForCausalLM
    )
    return lambda: auto_class.from_pretrained(source, dtype=torch.float32), AutoTokenizer.from_pretrained(source)


if __name__ == "__main__":
    try:
        main()
    except FreezeError as error:
        sys.exit(f"error: {error}")
