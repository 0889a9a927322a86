"""What a run leaves behind: the table of scores, samples to read, predictions as JSONL, and its prompt.

Only words and writes; scores come from `rouge`. The model card is `card`'s, the page for a browser `page`'s.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_freeze.errors import FreezeError
from hf_freeze.files import write_whole
from hf_freeze.summarization.prompts import SummaryPrompt, read_prompt
from hf_freeze.summarization.rouge import RougeScores
from hf_freeze.tables import Table

__all__ = [
    "METRICS",
    "load_prompt",
    "new_output_folder",
    "sample_text",
    "save_prompt",
    "score_table",
    "write_jsonl",
]

PROMPT_FILE = "summary_prompt.json"
RUN_FILES = (
    "all_results.json",
    "freeze_plan.json",
    "trainer_state.json",
    "config.json",
    "predictions.jsonl",
    "stages.json",
)
METRICS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}


def new_output_folder(asked: str, *, resuming: bool = False) -> Path:
    """Makes the folder of a run: the one asked for where no other run lies in it, else the next free out/summaries-N.

    Two runs that are started together get two numbers, since the folder is there when its name is returned.

    Raises:
        FreezeError: The folder holds another run, which would be overwritten, or cannot be written.
    """
    folder = Path(asked or "out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1) if not asked else ():
            with contextlib.suppress(FileExistsError):
                (folder / f"summaries-{number}").mkdir()
                return folder / f"summaries-{number}"
    except OSError as error:
        raise FreezeError(
            f"--output_dir {asked or 'out/summaries-N'} was asked for; no folder can be made there: "
            f"{error.strerror or error} ({error.filename}). Choose another one."
        ) from error
    found = [name for name in RUN_FILES if (folder / name).exists()] + [p.name for p in folder.glob("checkpoint-*")]
    if found and not resuming:
        raise FreezeError(
            f"--output_dir {asked} was asked for; it holds another run ({', '.join(found[:3])}). Choose another "
            "folder, go on with --resume_from_checkpoint, or remove it yourself."
        )
    if not os.access(folder, os.W_OK):
        raise FreezeError(f"--output_dir {asked} was asked for; nothing can be written there. Choose another one.")
    return folder


def score_table(scores: Mapping[str, RougeScores], split: str = "test") -> Table:
    """ROUGE of several systems side by side, each with its bootstrap interval.

    Args:
        scores: By the name of what was scored.
        split: Whose rows were scored.
    """
    rows = []
    for name, score in scores.items():
        low, high = score.low or {}, score.high or {}
        cells = []
        for metric in METRICS:
            interval = f" [{low[metric]:.1f}, {high[metric]:.1f}]" if low else ""
            cells.append(f"{getattr(score, metric):.1f}{interval}")
        rows.append((name, *cells))
    first = next(iter(scores.values()))
    line = f"F1 x 100 on {first.count} {split} rows, {first.confidence:.0%} bootstrap intervals in brackets, stemmed."
    return Table("ROUGE", ("summaries", *METRICS.values()), tuple(rows), (line,))


def sample_text(rows: Sequence[Mapping[str, Any]], count: int = 5, width: int = 116) -> str:
    """A few reviews with reference, before and after, evenly spread over the rows."""
    chosen = [rows[place * len(rows) // count] for place in range(count)] if len(rows) > count else list(rows)
    parts = []
    for row in chosen:
        review = textwrap.shorten(str(row["review"]), 400, placeholder=" ...")
        pairs = {"review": review, **{key: str(row.get(key) or "") for key in ("reference", "before", "after")}}
        lines = [
            textwrap.fill(text, width, initial_indent=f"{key:>9}: ", subsequent_indent=" " * 11) or f"{key:>9}:"
            for key, text in pairs.items()
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def write_jsonl(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object a line, the file whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(path), "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))


def save_prompt(
    prompt: SummaryPrompt, template: str | None, folder: str | os.PathLike[str], *, num_beams: int = 1
) -> None:
    """Keeps what a model was trained and scored with, so that it is given reviews in the same way later."""
    values = {
        "template": template,
        "max_source_tokens": prompt.max_source_tokens,
        "max_summary_tokens": prompt.max_summary_tokens,
        "num_beams": num_beams,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_whole(Path(folder) / PROMPT_FILE, json.dumps(values, indent=2) + "\n")


def load_prompt(tokenizer: Any, config: Any, folder: str | os.PathLike[str]) -> tuple[SummaryPrompt, int]:
    """The prompt and the number of beams that `save_prompt` kept in the folder; the defaults where there are none."""
    path = Path(folder) / PROMPT_FILE
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    num_beams = int(values.pop("num_beams", 1))
    return read_prompt(tokenizer, config, **values), num_beams
