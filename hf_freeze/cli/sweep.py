"""`hf-freeze sweep`: `sweep_reviews` on a file of reviews, with its table and plot."""

# No `from __future__ import annotations`: HfArgumentParser reads the types of SweepArguments.

import argparse
import importlib.util
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from hf_freeze.cli import Say, Told
from hf_freeze.depth import SweepReport, draw_sweep
from hf_freeze.embedded import EMBEDDED_NAME
from hf_freeze.files import write_whole
from hf_freeze.given import read_numbers, worded_arguments
from hf_freeze.loading import load_base, load_tokenizer, source_of
from hf_freeze.summarization.arguments import ReviewArguments, argument
from hf_freeze.summarization.sweeping import sweep_reviews
from hf_freeze.summarization.training import SummaryTrainingArguments

__all__ = ["HELP", "SweepArguments", "add_arguments", "parents", "run"]

HELP = """\
Which depth to freeze: trains at several depths from one pass of the prefix cache, and compares ROUGE, time, memory.
Interrupted, the same command goes on. In --output_dir: runs.jsonl (a line for each run), sweep.json, table.md,
pareto.png, pareto.svg (the pictures need matplotlib).

  hf-freeze sweep                  (the shipped reviews, the embedded model: about 12 minutes on 2 CPU cores)
  hf-freeze sweep --train_file reviews.csv --depths 0,15,22,26 --learning_rates 1e-4,3e-4 --output_dir out/sweep
  hf-freeze sweep --output_dir out/sweep --draw_only     (table and plot again, from the lines of finished runs)

All other arguments of transformers' Seq2SeqTrainingArguments are taken too.
"""


@dataclass
class SweepArguments(ReviewArguments):
    """The grid, the model and the reviews."""

    model_name_or_path: str = argument(EMBEDDED_NAME, f"A hub id, a folder, or {EMBEDDED_NAME!r}: the embedded model.")
    depths: str = argument("0,10,20,26", "Frozen blocks, from the bottom, comma-separated.")
    learning_rates: str = argument("1e-4,3e-4", "To try at each depth with the first seed; the best is kept.")
    seeds: str = argument("1", "Each chooses other rows, in another order.")
    train_rows: str = argument("", "Numbers of training rows; empty is all.")
    references: str = argument("full", "Of full and lora; empty for none.")
    halving: int | None = argument(None, "For long grids: keep 1 in so many at each rung.")
    cache_prefix: bool = argument(True, "Compute the frozen prefixes once, for all depths.")
    prefix_cache_dir: str | None = argument(None, "None: ~/.cache/hf_freeze/prefix.")
    quality: str = argument("rougeL", "What table and plot compare: a ROUGE, or eval_loss.")
    draw_only: bool = argument(False, "Train nothing: table and plot of what is there.")
    test_file: str | None = argument(None, "None scores on the validation rows.")
    max_validation_rows: int = argument(256, "Validation rows; learning rates are chosen by.")
    max_test_rows: int = argument(300, "Test reviews that every run summarises.")


@dataclass
class SweptTraining(SummaryTrainingArguments):
    """Trainer's arguments, with the defaults of a sweep."""

    output_dir: str = argument("out/sweep", "A sweep goes on where it lies.")
    num_train_epochs: float = argument(3.0, "Of every run.")
    per_device_train_batch_size: int = argument(16, "Reviews at once on a device.")
    per_device_eval_batch_size: int = argument(64, "Reviews scored or summarised at once.")


SHOWN = ("output_dir", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size", "precision",
         "cpu_threads")  # fmt: skip  # of Trainer's arguments, in the help; the others are some hundred


def parents() -> list[argparse.ArgumentParser]:
    """A parser of the sweep's and Trainer's arguments, as transformers makes it from dataclasses."""
    own = {f.name for f in fields(SweepArguments)}
    parser = HfArgumentParser((SweepArguments, SweptTraining), add_help=False)  # type: ignore[arg-type]
    for action in parser._actions:
        if action.dest not in (*own, *SHOWN) or any(option.startswith("--no_") for option in action.option_strings):
            action.help = argparse.SUPPRESS
    return [parser]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: the arguments are those of `parents`."""


def run(args: argparse.Namespace, say: Say) -> Told:
    """Sweeps, or only draws, and tells the table.

    Raises:
        FreezeError: The grid, the model or the reviews are not as needed.
    """
    asked = SweepArguments(**{f.name: getattr(args, f.name) for f in fields(SweepArguments)})
    folder = Path(args.output_dir)
    if not asked.draw_only:
        with worded_arguments():
            training = SweptTraining(**{f.name: getattr(args, f.name) for f in fields(SweptTraining) if f.init})
        _sweep(asked, training, folder, say)
    report = SweepReport.load(folder, quality=asked.quality)
    written = [folder / "runs.jsonl", folder / "table.md"]
    write_whole(written[-1], report.table().to_markdown() + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        say("note: no pictures were drawn: matplotlib is not installed. pip install 'hf_freeze[plots]'")
    else:
        written += draw_sweep(report, folder / "pareto")
    text = f"{report}\n\nRuns, table and plot: {', '.join(map(str, written))}"
    values = {
        "output_dir": str(folder),
        "quality": report.quality,
        "table": report.table().to_dict(),
        "runs": [result.to_dict() for result in report.results],
        "files": [str(path) for path in written],
    }
    return Told(text, values)


def _sweep(asked: SweepArguments, args: SweptTraining, folder: Path, say: Say) -> None:
    depths, seeds, sizes = (read_numbers(text, int) for text in (asked.depths, asked.seeds, asked.train_rows))
    rates = read_numbers(asked.learning_rates, float)
    splits: dict[str, Any] = {}
    for name, reviews in asked.read()[0].items():  # a wrong column waits for no model
        say(f"{name}: {reviews}")
        splits[name] = reviews.dataset
    for name, most in (("validation", asked.max_validation_rows), ("test", asked.max_test_rows)):
        splits[name] = splits[name].select(range(min(most, len(splits[name]))))
    source = source_of(asked.model_name_or_path)
    sweep_reviews(
        partial(load_base, source, torch.float32),
        load_tokenizer(source, None),
        splits,
        args,
        depths,
        output_dir=folder,
        prompt_template=asked.prompt_template,
        max_source_tokens=asked.max_source_tokens,
        max_summary_tokens=asked.max_summary_tokens,
        quality=asked.quality,
        learning_rates=rates,
        seeds=seeds,
        train_rows=sizes or None,
        references=[name for name in asked.references.split(",") if name],
        halving=asked.halving,
        use_cache=asked.cache_prefix,
        cache_dir=asked.prefix_cache_dir,
        say=say,
        progress=not args.disable_tqdm,
    )
