"""Run by torchrun on two gloo processes: trains from the cache and plainly, and writes the losses as JSON.

torchrun --nproc_per_node 2 tests/recipes/two_processes.py ddp|fsdp KIND FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from hf_freeze import PrefixCache, read_anatomy
from hf_freeze.processes import leave_group
from tests.prefix.cases import collator_for, frozen_model, review_rows, trainer_losses


def by_trainer(kind: str, folder: Path) -> dict[str, Any]:
    """A stock Trainer under DDP, plainly and from a cache that both ranks built together."""
    rows = review_rows(kind)
    given = {"max_steps": 6, "ddp_find_unused_parameters": False, "per_device_train_batch_size": 2}
    plain = frozen_model(kind, dropout=False)
    wanted, trainer = trainer_losses(plain, rows, collator_for(kind, plain), folder / "plain", **given)
    cached = frozen_model(kind, dropout=False)
    cache = PrefixCache.build(
        cached, rows, collator_for(kind, cached), cache_dir=folder / "cache", token_budget=64, progress=False
    )
    got, _ = trainer_losses(cached, rows, cache.collator, folder / "cached", **given)
    return {
        "wanted": wanted,
        "got": got,
        "wrapper": type(trainer.model_wrapped).__name__,
        "used": cache.batches_used,
        "tokens": cache.report.tokens,
        "shards": len(list((folder / "cache").glob("*/rows-*"))),
        "trained": float(sum(p.double().sum() for p in cached.parameters() if p.requires_grad)),
    }


def by_fsdp(kind: str, folder: Path) -> dict[str, Any]:
    """FSDP2 over blocks, frozen and trained apart; counts how often a frozen block is gathered."""
    rows = review_rows(kind)
    results: dict[str, Any] = {}
    for cached in (False, True):
        model = frozen_model(kind, dropout=False)
        collator: Any = collator_for(kind, model)
        if cached:
            cache = PrefixCache.build(model, rows, collator, cache_dir=folder / "cache", progress=False)
            collator = cache.collator
        mesh = init_device_mesh("cpu", (2,))
        blocks = [block.modules[0] for stack in read_anatomy(model).stacks for block in stack.blocks]
        frozen = [block for block in blocks if not any(p.requires_grad for p in block.parameters())]
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        gathered: list[nn.Module] = []
        for block in frozen:
            assert isinstance(block, FSDPModule)
            block.register_forward_pre_hook(lambda module, *_, seen=gathered: seen.append(module))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        model.train()
        for step in range(4):
            start = 4 * step + 2 * dist.get_rank()
            loss = model(**collator(rows[start : start + 2])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        results["got" if cached else "wanted"] = losses
        results["gathered_cached" if cached else "gathered_plain"] = len(gathered)
    return results | {"wrapper": type(model).__name__}


def main() -> None:
    mode, kind, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = {"ddp": by_trainer, "fsdp": by_fsdp}[mode](kind, folder) | {"world": dist.get_world_size()}
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
    leave_group()


if __name__ == "__main__":
    main()
