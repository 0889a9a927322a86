"""Measures what a delta takes beside a full checkpoint: bytes, seconds to save and to load.

    python recipes/benchmark_deltas.py
        the embedded SmolLM2-135M, 26 of 30 blocks frozen: a few seconds
    python recipes/benchmark_deltas.py --model_name_or_path facebook/bart-large-cnn --freeze_encoder_blocks all

Saving and loading are repeated in turn, and medians are shown. Both flush to the disk before the clock stops; files are
read from memory, as right after a save. Loading a delta includes loading its base and comparing the frozen digests.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import trange

from hf_freeze import FreezeError, FreezePlan, freeze, load_delta, save_delta
from hf_freeze.cli import exit_code
from hf_freeze.embedded import EMBEDDED_NAME
from hf_freeze.loading import load_base, source_of
from hf_freeze.tables import Table, count_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=EMBEDDED_NAME, help="by default the embedded SmolLM2-135M")
    parser.add_argument("--freeze_encoder_blocks", default=None, help="as in FreezePlan; by default half")
    parser.add_argument("--freeze_decoder_blocks", default="-4", help="by default all but 4")
    parser.add_argument("--repetitions", type=int, default=7, help="of saving and loading, in turn; by default 7")
    args = parser.parse_args()
    if args.repetitions < 1:
        raise FreezeError(f"--repetitions {args.repetitions} was asked for; use 1 or more.")
    source = source_of(args.model_name_or_path)
    model = load_base(source, torch.float32)
    plan = FreezePlan(encoder_blocks=args.freeze_encoder_blocks, decoder_blocks=args.freeze_decoder_blocks)
    report = freeze(model, plan)

    seconds = {"full": ([], []), "delta": ([], [])}
    with tempfile.TemporaryDirectory() as folder:
        full, delta = Path(folder) / "full", Path(folder) / "delta"
        for _ in trange(args.repetitions):
            seconds["full"][0].append(timed(lambda: (model.save_pretrained(full), flush(full))))
            seconds["delta"][0].append(timed(lambda: save_delta(model, delta, base=source)))
            seconds["full"][1].append(timed(lambda: type(model).from_pretrained(full, dtype=torch.float32)))
            seconds["delta"][1].append(timed(lambda: load_delta(delta)))
        sizes = {"full": size(full), "delta": size(delta)}
    rows = []
    for kind, times in seconds.items():
        save, load = (f"{statistics.median(each):.3g} s" for each in times)
        rows.append((kind, count_text(sizes[kind], "B"), f"{sizes[kind] / sizes['full']:.1%}", save, load))
    line = f"{report.trainable_parameters / report.total_parameters:.1%} of the parameters train; optimizer aside."
    print(Table("Checkpoints", ("kind", "size", "of full", "save", "load"), tuple(rows), (line,)))


def timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def flush(folder: Path) -> None:
    """What save_delta does too: the files are on the disk, not on their way there."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(exit_code(main))
