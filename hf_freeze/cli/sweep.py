"""`hf-freeze sweep`: `sweep_reviews` on a file of reviews, with its table and plot."""

# No `from __future__ import annotations`: HfArgumentParser reads the types of SweepArguments.

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_freeze.cli import Say, Told, worded_arguments
from hf_freeze.embedded import EMBEDDED_NAME
from hf_freeze.errors import FreezeError
from hf_freeze.files import write_whole
from hf_freeze.given import read_numbers

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


def _run_arguments() -> Any:
    """Trainer's arguments with the defaults of a sweep; made here, since transformers takes seconds to import."""
    from hf_freeze.summarization.training import SummaryTrainingArguments

    @dataclass
    class RunArguments(SummaryTrainingArguments):
        """Trainer's arguments, with the defaults of a sweep."""

        output_dir: str = field(default="out/sweep", metadata={"help": "A sweep goes on where it lies."})
        num_train_epochs: float = field(default=3.0, metadata={"help": "Of every run."})
        per_device_train_batch_size: int = field(default=16, metadata={"help": "Reviews at once on a device."})
        per_device_eval_batch_size: int = field(default=64, metadata={"help": "Reviews scored or summarised at once."})

    return RunArguments


SHOWN = ("output_dir", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size", "precision",
         "cpu_threads")  # fmt: skip  # of Trainer's arguments, in the help; the others are some hundred


def parents() -> list[argparse.ArgumentParser]:
    """A parser of the sweep's and Trainer's arguments, as transformers makes it from dataclasses."""
    from transformers import HfArgumentParser

    own = {each.name for each in fields(SweepArguments)}
    parser = HfArgumentParser((SweepArguments, _run_arguments()), add_help=False)  # type: ignore[arg-type]
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
    from hf_freeze.depth import SweepReport

    asked = SweepArguments(**{each.name: getattr(args, each.name) for each in fields(SweepArguments)})
    folder = Path(args.output_dir)
    if not asked.draw_only:
        kind = _run_arguments()
        with worded_arguments():
            training = kind(**{each.name: getattr(args, each.name) for each in fields(kind) if each.init})
        _sweep(asked, training, folder, say)
    report = SweepReport.load(folder, quality=asked.quality)
    written = [folder / "runs.jsonl", folder / "table.md"]
    write_whole(written[-1], report.table().to_markdown() + "\n")
    written += _drawn(report, folder, say)
    text = f"{report}\n\nRuns, table and plot: {', '.join(map(str, written))}"
    values = {
        "output_dir": str(folder),
        "quality": report.quality,
        "table": report.table().to_dict(),
        "runs": [result.to_dict() for result in report.results],
        "files": [str(path) for path in written],
    }
    return Told(text, values)


def _sweep(asked: SweepArguments, args: Any, folder: Path, say: Say) -> None:
    from hf_freeze.summarization.sweeping import sweep_reviews

    depths, seeds, sizes = (read_numbers(text, int) for text in (asked.depths, asked.seeds, asked.train_rows))
    rates = read_numbers(asked.learning_rates, float)
    splits = {}
    for name, reviews in _reviews(asked).items():  # a wrong column waits for no model
        say(f"{name}: {reviews}")
        splits[name] = reviews.dataset
    for name, most in (("validation", asked.max_validation_rows), ("test", asked.max_test_rows)):
        splits[name] = splits[name].select(range(min(most, len(splits[name]))))
    make_model, tokenizer = _model(asked.model_name_or_path)
    sweep_reviews(
        make_model,
        tokenizer,
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


def _reviews(asked: SweepArguments) -> dict[str, Any]:
    """The user's files, or the shipped reviews."""
    from hf_freeze.summarization.data.reviews import read_splits, shipped_reviews

    sources = (asked.train_file, asked.validation_file, asked.test_file)
    if not any(sources):
        return dict(shipped_reviews())
    if not sources[0]:
        raise FreezeError("--validation_file or --test_file was given without --train_file. Give --train_file too.")
    return dict(read_splits(*sources, text_column=asked.text_column, summary_column=asked.summary_column))


def _model(name: str) -> tuple[Callable[[], Any], Any]:
    """A function that loads the model anew at each call, and the tokenizer."""
    import torch

    from hf_freeze.loading import load_base, load_tokenizer, source_of

    source = source_of(name)
    return lambda: load_base(source, torch.float32), load_tokenizer(source, None)


def _drawn(report: Any, folder: Path, say: Say) -> list[Path]:
    """The pictures, or none with the reason."""
    import importlib.util

    from hf_freeze.depth import draw_sweep

    if importlib.util.find_spec("matplotlib") is None:
        say("note: no pictures were drawn: matplotlib is not installed. pip install 'hf_freeze[plots]'")
        return []
    return list(draw_sweep(report, folder / "pareto"))
