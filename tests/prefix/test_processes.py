"""Two gloo processes build one cache together and train from it as they do plainly, under DDP and under FSDP2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.prefix.cases import collator_for, frozen_model, review_rows


def run(mode: str, kind: str, folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
               "--rdzv_endpoint", "localhost:0", "-m",
               "tests.recipes.two_processes", mode, kind, str(folder)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_two_ranks_of_a_stock_trainer_see_the_same_losses(kind: str, tmp_path: Path) -> None:
    ranks = run("ddp", kind, tmp_path)
    for rank in ranks:
        assert (rank["world"], rank["wrapper"]) == (2, "DistributedDataParallel")
        assert rank["got"] == pytest.approx(rank["wanted"], rel=1e-5)
        assert rank["used"] == len(rank["got"]) == 6
    assert ranks[0]["trained"] == ranks[1]["trained"]  # the replicas stay one
    assert all(rank["tokens"] > 0 for rank in ranks)  # each computed its share
    assert ranks[0]["shards"] == 2


def alone(kind: str) -> list[list[float]]:
    """The losses that two processes see, in one: each half of the batch its own, their mean is stepped on."""
    model, rows = frozen_model(kind, dropout=False), review_rows(kind)
    collator = collator_for(kind, model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses: list[list[float]] = [[], []]
    model.train()
    for step in range(4):
        halves = [model(**collator(rows[4 * step + 2 * rank : 4 * step + 2 * rank + 2])).loss for rank in range(2)]
        optimizer.zero_grad()
        (sum(halves) / 2).backward()
        optimizer.step()
        for rank, loss in enumerate(halves):
            losses[rank].append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_fsdp2_trains_as_one_process_and_gathers_no_block_of_the_prefix(kind: str, tmp_path: Path) -> None:
    for number, rank in enumerate(run("fsdp", kind, tmp_path)):
        assert rank["wanted"] == pytest.approx(alone(kind)[number], rel=1e-5)
        assert (rank["world"], rank["wrapper"][:4]) == (2, "FSDP")
        assert rank["got"] == pytest.approx(rank["wanted"], rel=1e-5)
        assert rank["gathered_plain"] > 0
        assert rank["gathered_cached"] == 0
