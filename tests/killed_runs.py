"""Kills a staged, cached run with -9 at random moments, resumes each, and says whether it ended as the undisturbed one.

python tests/killed_runs.py FOLDER KILLS [SEED]

Runs are forks of this process, which has imported everything, so that a moment is one of the run and not of an import.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.staged_run import run


def start(folder: Path, **given: Any) -> int:
    """A run in a process of its own that leaves its weights in the folder; its number."""
    if child := os.fork():
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.set_num_threads(1)
        model = run(folder, **given).trainer.model
        save_file({name: p.detach() for name, p in model.named_parameters()}, folder / "weights.tmp")
        os.replace(folder / "weights.tmp", folder / "weights.safetensors")
        status = 0
    finally:
        os._exit(status)


def finish(child: int) -> None:
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit("a run failed")


def read(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "weights.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def place(folder: Path) -> str:
    """How far a killed run had come, by what lies there."""
    if not (folder / "stages.json").exists():
        return "before it began"
    done = len(json.loads((folder / "stages.json").read_text())["done"])
    checkpoints = sorted(path.name for path in folder.glob(f"stage-{done + 1}/checkpoint-*"))
    return f"in stage {done + 1} with {', '.join(checkpoints) or 'no checkpoint'}"


def main() -> None:
    base, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    base.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    finish(start(base / "undisturbed"))
    seconds = time.perf_counter() - started
    wanted = read(base / "undisturbed")
    moments = random.Random(seed)
    told = []
    number = 0
    while len(told) < kills:
        folder = base / f"run-{(number := number + 1)}"
        folder.mkdir()
        child = start(folder)
        time.sleep(moments.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            continue  # it was done before
        where = place(folder)
        finish(start(folder, resume=True))
        got = read(folder)
        same = got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)
        told.append({"where": where, "same": same})
        print(json.dumps(told[-1]), flush=True)
    (base / "told.json").write_text(json.dumps({"seconds": seconds, "runs": told}))


if __name__ == "__main__":
    main()
