"""`hf-freeze summarize`: `summarize_file` on a model that is loaded by its name, in one process or several."""

from __future__ import annotations

import argparse
import contextlib
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from hf_freeze.cli import Say, Told
from hf_freeze.errors import FreezeError

__all__ = ["HELP", "add_arguments", "run"]

HELP = """\
Summarises a CSV, TSV, JSONL or Parquet file of any size, or a folder of them, in bounded memory. Every row keeps its
columns and its place. Killed, the same command goes on where it stopped and ends with the same file.

  hf-freeze summarize out/bart reviews.csv -o summaries.csv
  hf-freeze summarize out/delta reviews.parquet -o summaries.jsonl --text_column body
  hf-freeze summarize out/bart reviews.csv -o products.csv --group_by product_id
  accelerate launch --config_file accelerate_config.yaml -m hf_freeze.cli summarize out/bart in.csv -o out.csv

A broken row stops the run before anything is summarised, and its line is named. Cells of the input are written back as
they were and never executed. A summary that begins like a formula (= + - @) gets an apostrophe before it in a .csv or
.tsv, so that no spreadsheet runs it; .jsonl has it as it is.
"""

WAITING = timedelta(days=7)  # of other processes for the first one, which may read a large file meanwhile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("model", help="output folder of summarize_reviews.py, any model folder, a delta, or a hub id")
    parser.add_argument("reviews", help="the file or folder to summarise")
    parser.add_argument("-o", "--output", required=True, help="the .csv, .tsv or .jsonl file to write; a new one")
    parser.add_argument("--text_column", help="the column with the reviews; guessed from its name by default")
    parser.add_argument("--group_by", help="one summary for all reviews with the same value here, e.g. product_id")
    parser.add_argument("--summary_column", default="summary", help="the column that is added (default: summary)")
    parser.add_argument("--base_model", help="where the base of a delta lies now")
    parser.add_argument("--batch_size", type=int, default=16, help="reviews at once (default: 16)")
    parser.add_argument(
        "--max_new_tokens", type=int, help="longest summary; what the model was trained with by default"
    )
    parser.add_argument("--num_beams", type=int, help="1 is greedy; what the model was scored with by default")
    parser.add_argument(
        "--window_rows", type=int, help="rows that a kill can cost; memory grows with it (default: 512)"
    )
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where a probe finds it faster"
    )
    parser.add_argument("--cpu_threads", type=int, help="threads of each process on a CPU; all cores by default")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace, say: Say) -> Told:
    """Loads the model, summarises, and tells how it went.

    Raises:
        FreezeError: The model, input, output or an option is not as needed.
    """
    _check_numbers(args)
    import torch

    from hf_freeze.loading import load_generator, source_of
    from hf_freeze.processes import leave_group
    from hf_freeze.summarization.streaming import WINDOW_ROWS, check_places, summarize_file
    from hf_freeze.training.precision import choose_precision

    places = {name: getattr(args, name) for name in ("text_column", "group_by", "summary_column")}
    source = source_of(args.model)
    check_places(args.reviews, args.output, **places)  # before anything slow
    device = _join(args.cpu_threads)
    asked = _asked_precision(args)
    precision = choose_precision(asked, device)
    say(f"Precision {precision}" if asked == args.precision else f"Precision {asked}: as before the stop")
    dtype = torch.bfloat16 if precision.name == "bf16" else torch.float32
    model, tokenizer, in_dtype = load_generator(source, args.base_model, dtype)
    model.to(device)
    prompt, num_beams = _prompt(tokenizer, model.config, source)
    try:
        report = summarize_file(
            model,
            tokenizer,
            args.reviews,
            args.output,
            prompt=prompt,
            **places,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            num_beams=args.num_beams or num_beams,
            precision="bf16" if dtype == torch.bfloat16 and not in_dtype else None,
            window_rows=args.window_rows or WINDOW_ROWS,
            progress=not args.quiet,
            say=say,
        )
    except torch.OutOfMemoryError as error:
        raise FreezeError(
            f"The device has too little memory for {args.batch_size} reviews at once. Start the same with a smaller "
            f"--batch_size: it goes on where it stopped."
        ) from error
    with contextlib.suppress(RuntimeError):  # another process is gone, and has said why
        leave_group()
    return Told(str(report), report.to_dict())


def _prompt(tokenizer: Any, config: Any, source: str) -> tuple[Any, int]:
    """What the model was trained and scored with, where it lies with the model."""
    from hf_freeze.summarization.publish.results import PROMPT_FILE, load_prompt

    try:
        return load_prompt(tokenizer, config, source)
    except FreezeError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise FreezeError(
            f"{source} has a {PROMPT_FILE} that is damaged: {error}. Remove it, or write it again."
        ) from error


def _asked_precision(args: argparse.Namespace) -> str:
    """What was asked; for "auto" that of the run which this one goes on from: a probe may choose the other one now."""
    from hf_freeze.summarization.resumable import facts_before

    before = {"float32": "fp32", "bfloat16": "bf16", "bf16": "bf16"}
    noted = facts_before(Path(args.output).expanduser()).get("precision") if args.precision == "auto" else None
    return before.get(str(noted), str(args.precision))


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("batch_size", "max_new_tokens", "num_beams", "window_rows", "cpu_threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise FreezeError(f"--{name} {value} was asked for; it is 1 or more.")


def _join(cpu_threads: int | None) -> Any:
    """The device of this process, which then is in one group with all that the launcher started."""
    import torch

    from hf_freeze.machine import cpu_cores, find_device

    device = find_device()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        device = PartialState(cpu=device.type == "cpu", timeout=WAITING).device
    if device.type == "cpu":
        # accelerate's launcher sets OMP_NUM_THREADS=1 where nobody asked, which leaves the other cores idle.
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(cpu_threads or max(1, cpu_cores() // neighbours))
    return device
