"""Kills work with -9 at random moments, does it again, and says whether it ended as the work that nobody disturbed.

python tests/recipes/killed_runs.py FOLDER training=1,build=1,delta=1,summarize=1 [SEED]

What is killed are forks of this process, which has imported everything, so that a moment is one of the work and not of
an import.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import hf_freeze.prefix.store
from hf_freeze import FreezePlan, PrefixCache, freeze
from hf_freeze.delta import is_delta, load_delta, save_delta
from hf_freeze.delta.file import FILES
from hf_freeze.summarization.streaming import summarize_file
from tests.delta.cases import names_in
from tests.prefix.cases import collator_for, frozen_model, padding_tokenizer, review_rows
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.staged_run import run


@dataclass(frozen=True)
class Work:
    """What can be killed and done again.

    Attributes:
        do: Does it, or goes on with what lies in the folder; returns what must come out the same, as tensors.
        place: How far killed work had come, by what lies there.
        broken: What is wrong with what a kill has left; "" where it is whole.
    """

    do: Callable[[Path], dict[str, torch.Tensor]]
    place: Callable[[Path], str]
    broken: Callable[[Path], str] = lambda folder: ""


# ------------------------------------------------------------------------------------------------------------ training


def train(folder: Path) -> dict[str, torch.Tensor]:
    resume = (folder / "begun").exists()
    (folder / "begun").touch()
    model = run(folder, resume=resume).trainer.model
    return {name: p.detach() for name, p in model.named_parameters()}


def place_of_training(folder: Path) -> str:
    if not (folder / "stages.json").exists():
        return "before it began"
    done = len(json.loads((folder / "stages.json").read_text())["done"])
    checkpoints = sorted(path.name for path in folder.glob(f"stage-{done + 1}/checkpoint-*"))
    return f"in stage {done + 1} with {', '.join(checkpoints) or 'no checkpoint'}"


# --------------------------------------------------------------------------------------------------------------- build


def build(folder: Path) -> dict[str, torch.Tensor]:
    """The states of all rows, and the losses of some steps from them."""
    hf_freeze.prefix.store.SHARD_BYTES = 20_000  # some ten shards
    rows = review_rows("llama", 160)
    model = frozen_model("llama", dropout=False)
    cache = PrefixCache.build(
        model, rows, collator_for("llama", model), cache_dir=folder / "cache", token_budget=64, progress=False
    )
    states = {}
    for digest in sorted(cache.store._place):
        states |= {f"{digest.hex()}.{name}": tensor for name, tensor in cache.store.read(digest).items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for start in range(0, 24, 4):
        loss = model.train()(**cache.collator(rows[start : start + 4])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert cache.batches_used == len(losses)
    return states | {"losses": torch.stack(losses)}


def place_of_build(folder: Path) -> str:
    return f"with {len(list(folder.glob('cache/*/rows-*')))} shards"


# --------------------------------------------------------------------------------------------------------------- delta

SAVES = 30


def model_of_deltas(number: int | None = None) -> LlamaForCausalLM:
    """The base, or what is saved as the delta of that number: some MB, so that a kill falls into a save."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    if number is not None:
        freeze(model, FreezePlan(decoder_blocks=2))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.01 * (number + 1)
    return model


def save_deltas(folder: Path) -> dict[str, torch.Tensor]:
    """One delta after the other into one folder, as a run that keeps its best weights does."""
    model = model_of_deltas(0)
    trained = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    save_delta(model, folder / "delta", extra=0)
    for number in range(1, SAVES):
        with torch.no_grad():
            for parameter, start in trained:
                parameter.copy_(start + number)
        save_delta(model, folder / "delta", extra=number)
    assert names_in(folder / "delta") == set(FILES)
    return dict(load_delta(folder / "delta", model_of_deltas()).state_dict())


def place_of_delta(folder: Path) -> str:
    if not is_delta(folder / "delta"):
        return "before the first was there"
    leftovers = [path.name for path in folder.glob("delta/*.tmp")]
    return f"with {leftovers[0]}" if leftovers else "between two"


def broken_delta(folder: Path) -> str:
    """A delta lies there from the first save on, and is that of one number."""
    if not is_delta(folder / "delta"):
        return ""
    model = load_delta(folder / "delta", model_of_deltas())
    first = model_of_deltas(0)
    pairs = zip(model.parameters(), first.parameters(), strict=True)
    steps = {round(float((one - other).detach().median())) for one, other in pairs} - {0}
    return "" if len(steps) <= 1 else f"a mixture of {sorted(steps)}"


# ----------------------------------------------------------------------------------------------------------- summarize


def summarize(folder: Path) -> dict[str, torch.Tensor]:
    source, output = folder / "reviews.csv", folder / "summaries.csv"
    if not source.exists():
        with source.with_suffix(".tmp").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "review"])
            writer.writerows([number, f"The kettle number {number * 7919 % 1000} boils"] for number in range(60))
        os.replace(source.with_suffix(".tmp"), source)
    if not output.exists():
        model, tokenizer = tiny_model("llama"), padding_tokenizer("llama")
        summarize_file(model, tokenizer, source, output, max_new_tokens=6, batch_size=3, window_rows=3, progress=False)
    return {"bytes": torch.frombuffer(bytearray(output.read_bytes()), dtype=torch.uint8)}


def place_of_summaries(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.name.startswith("summaries"))
    return f"with {', '.join(names) or 'nothing'}"


WORK = {
    "training": Work(train, place_of_training),
    "build": Work(build, place_of_build),
    "delta": Work(save_deltas, place_of_delta, broken_delta),
    "summarize": Work(summarize, place_of_summaries),
}


# --------------------------------------------------------------------------------------------------------------- kills


def start(work: Work, folder: Path) -> int:
    """The work in a process of its own that leaves what came out of it in the folder; its number."""
    if child := os.fork():
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.set_num_threads(1)
        results = {name: tensor.contiguous().clone() for name, tensor in work.do(folder).items()}
        save_file(results, folder / "result.tmp")
        os.replace(folder / "result.tmp", folder / "result")
        status = 0
    finally:
        if status:
            import traceback

            traceback.print_exc()
        os._exit(status)


def finish(child: int) -> None:
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit("a run failed")


def kill_again_and_again(name: str, base: Path, kills: int, moments: random.Random) -> list[dict[str, Any]]:
    work = WORK[name]
    (base / "undisturbed").mkdir(parents=True)
    started = time.perf_counter()
    finish(start(work, base / "undisturbed"))
    seconds = time.perf_counter() - started
    wanted = load_file(base / "undisturbed" / "result")
    told: list[dict[str, Any]] = []
    number = 0
    while len(told) < kills:
        folder = base / f"run-{(number := number + 1)}"
        folder.mkdir()
        child = start(work, folder)
        time.sleep(moments.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            continue  # it was done before
        where, broken = work.place(folder), work.broken(folder)
        finish(start(work, folder))
        got = load_file(folder / "result")
        same = got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)
        told.append({"work": name, "where": where, "same": same, "broken": broken})
        print(json.dumps(told[-1]), flush=True)
    return told


def main() -> None:
    base, asked = Path(sys.argv[1]), dict(pair.split("=") for pair in sys.argv[2].split(","))
    moments = random.Random(int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    tiny_tokenizer("llama")  # trained once for all forks
    told = []
    for name, kills in asked.items():
        told += kill_again_and_again(name, base / name, int(kills), moments)
    (base / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
