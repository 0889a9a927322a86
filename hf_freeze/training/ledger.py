"""The ledger of a staged run, stages.json in its folder: what the run is, and what became of each stage that is done.

A run that goes on reads it and refuses another run's. It is written whole after every stage; how one trains is not
known here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_freeze.errors import ResumeError
from hf_freeze.files import write_json
from hf_freeze.training.schedule import Stage

__all__ = ["Ledger", "StageResult"]


@dataclass(frozen=True)
class StageResult:
    """What became of one stage.

    Attributes:
        trained_blocks: Blocks with trainable tensors.
        steps: Optimizer steps that it took.
        seconds: Of training and evaluation, without the cache, in the process that ended it.
        start_metric, best_metric: Of the weights that it began and ended with; None without evaluation.
        ended: Why it ended.
        cached: Whether its frozen prefix came from the cache.
    """

    number: int
    trained_blocks: int
    steps: int
    seconds: float
    start_metric: float | None
    best_metric: float | None
    ended: str
    cached: bool


@dataclass
class Ledger:
    """What a staged run is and what of it is done.

    Attributes:
        path: Where it lies.
        stages: All of them, done or not.
        metric: By which stages are compared.
        facts: Of the data and the batch, which must stay.
        start: Digest of the weights that the first stage begins with.
        done: The stages that are done.
    """

    path: Path
    stages: Sequence[Stage]
    metric: str
    facts: dict[str, Any]
    start: str
    done: list[StageResult] = field(default_factory=list)

    def write(self) -> None:
        """Writes it whole."""
        stages, done = [stage.to_dict() for stage in self.stages], [asdict(result) for result in self.done]
        values = {"version": 1, "stages": stages, "run": self.facts, "metric": self.metric, "start": self.start}
        write_json(self.path, values | {"done": done})

    def read(self) -> None:
        """Takes from the file what is done and what the run started with.

        Raises:
            ResumeError: The file is damaged, or another run's.
        """
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            written = _shown(values["metric"], values["run"], values["stages"])
            self.done, self.start = [StageResult(**result) for result in values["done"]], str(values["start"])
        except (ValueError, KeyError, TypeError) as error:
            raise ResumeError(
                f"{self.path} was to be read; it is damaged: {error}. Start anew in another output_dir."
            ) from error
        asked = _shown(self.metric, self.facts, [stage.to_dict() for stage in self.stages])
        for name in asked | written:
            if asked.get(name) != written.get(name):
                raise ResumeError(
                    f"{self.path} belongs to another run: its {name} is {written.get(name)}, and {asked.get(name)} was "
                    "asked for. Give those of the run, or another output_dir."
                )


def _shown(metric: str, facts: dict[str, Any], stages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What two runs must share, by the name that an error gives it."""
    return {"metric": metric, **facts, **{f"stage {number}": stage for number, stage in enumerate(stages, start=1)}}
