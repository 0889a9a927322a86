"""The model card: README.md of a run's output folder, with metadata that the Hugging Face hub reads.

It gathers what templates/card.md words, and reads the folder for what kind of model lies there. What is not known (a
base that is no hub id, a language, a license) is left out, never guessed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_freeze.embedded import EMBEDDED_NAME
from hf_freeze.errors import FreezeError
from hf_freeze.files import write_whole
from hf_freeze.freezing import FreezeReport
from hf_freeze.machine import Hardware, library_versions
from hf_freeze.pages import TEMPLATES
from hf_freeze.plots import can_draw, plain_style, save_figure
from hf_freeze.summarization.publish.pictures import draw_lines, read_curve
from hf_freeze.summarization.publish.results import METRICS, sample_text, score_table
from hf_freeze.summarization.rouge import RougeScores
from hf_freeze.tables import Table

__all__ = ["CARD_FILE", "DataFacts", "base_facts", "write_card"]

CARD_FILE = "README.md"
EMBEDDED_BASE = ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")  # the id of its weights before quantisation
LEAST_POINTS = 2  # of a loss curve worth drawing


@dataclass(frozen=True)
class DataFacts:
    """What a model was trained and scored on.

    Attributes:
        name: In words, or the name of a file.
        rows: Split -> number of rows; train, validation and test.
        hub_id: Its id on the hub; None for data that is not there.
        language: A code such as "en"; None where it is not known.
        scored: The split that the scores are of.

    Example:
        >>> print(DataFacts("reviews.csv", {"train": 900, "test": 100}))
        reviews.csv: 900 train, 100 test
    """

    name: str
    rows: Mapping[str, int] = field(default_factory=dict)
    hub_id: str | None = None
    language: str | None = None
    scored: str = "test"

    def __str__(self) -> str:
        text = f"{self.name}: {', '.join(f'{count:,} {split}' for split, count in self.rows.items())}"
        if self.scored == "test":
            return text
        return f"{text}. The scores are of the {self.scored} rows, which the run was watched on: they may flatter it."


def write_card(
    folder: str | os.PathLike[str],
    *,
    base: str,
    report: FreezeReport,
    scores: Mapping[str, RougeScores],
    losses: Table,
    samples: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    data: DataFacts | None = None,
    log_history: Sequence[Mapping[str, Any]] = (),
    hardware: Hardware | None = None,
    license: str | None = None,
) -> Path:
    """Writes README.md, the model card: metadata, what was frozen, losses, ROUGE, samples, how to load it.

    With matplotlib and a `log_history` it writes loss.png and loss.svg beside it. Other files there stay.

    Args:
        folder: Where the model was saved: an adapter_config.json there makes it the card of a PEFT adapter.
        base: What was trained on: a hub id, a folder, or the embedded model's name. Only a hub id goes into the
            metadata; of a folder the card names the last part, since its path is nobody else's business.
        report: What `freeze` returned.
        scores: Name -> ROUGE, as in `score_table`. The last one is the model's, and goes into the metadata.
        losses: The table of losses.
        samples: Rows with review, reference, before and after.
        facts: Name -> value, listed as they are.
        data: What it was trained on; None leaves that out, with the scores in the metadata, which need its name.
        log_history: Trainer's log, for the loss curve.
        hardware: What it ran on; None leaves that out.
        license: Of the model; None takes the base's where the card in its folder tells, and else leaves it out.

    Returns:
        The card.

    Raises:
        FreezeError: No scores at all.
    """
    if not scores:
        raise FreezeError("write_card was given no scores; give at least those of the trained model.")
    from huggingface_hub import ModelCard

    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    adapter = (place / "adapter_config.json").exists()
    hub_id, known_license = base_facts(base)
    metadata = _metadata(place, hub_id, license or known_license, scores, data, adapter=adapter)
    text = sample_text(samples)
    shown_folder = place.name if place.is_absolute() else place.as_posix()
    kind = "Seq2SeqLM" if {"encoder", "decoder"} <= report.resolved.blocks.keys() else "CausalLM"
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATES / "card.md"),
        base_name=base if hub_id or base == EMBEDDED_NAME else Path(base).name,
        frozen=report.to_markdown(),
        plan=json.dumps(report.plan.to_dict()),
        losses=losses.to_markdown(),
        picture=_draw_losses(place, log_history),
        rouge=score_table(scores, data.scored if data else "test").to_markdown(),
        summaries=f"{list(scores.values())[-1].count:,}",
        samples=text,
        fence=_fence(text),
        data=data and str(data),
        adapter=adapter,
        auto=f"{'AutoPeftModel' if adapter else 'AutoModel'}For{kind}",
        folder=repr(shown_folder),
        shown_folder=shown_folder,
        facts=_facts(facts, hardware),
    )
    path = place / CARD_FILE
    write_whole(path, f"{str(card).rstrip()}\n")
    return path


def base_facts(base: str) -> tuple[str | None, str | None]:
    """The hub id and the license of a base model, each None where it is not known here. Asks no network.

    >>> base_facts("facebook/bart-large-cnn"), base_facts("smollm2")
    (('facebook/bart-large-cnn', None), ('HuggingFaceTB/SmolLM2-135M-Instruct', 'apache-2.0'))
    """
    from huggingface_hub import ModelCard

    if base == EMBEDDED_NAME:
        return EMBEDDED_BASE
    if Path(base).expanduser().is_dir():
        try:
            return None, ModelCard.load(Path(base).expanduser() / CARD_FILE).data.license
        except (OSError, ValueError, TypeError, yaml.YAMLError):  # no card there, or none that can be read
            return None, None
    return (base if re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+", base) else None), None


def _metadata(
    place: Path,
    hub_id: str | None,
    license: str | None,
    scores: Mapping[str, RougeScores],
    data: DataFacts | None,
    *,
    adapter: bool,
) -> Any:
    """What stands on top as YAML, a ModelCardData."""
    from huggingface_hub import EvalResult, ModelCardData

    results = None
    if data is not None:
        trained = list(scores.values())[-1]
        results = [
            EvalResult(
                task_type="summarization",
                task_name="Summarization",
                dataset_type=data.hub_id or "customer-reviews",
                dataset_name=data.name,
                dataset_split=data.scored,
                metric_type="rouge",
                metric_name=label,
                metric_value=round(getattr(trained, metric), 2),
            )
            for metric, label in METRICS.items()
        ]
    return ModelCardData(
        language=data.language if data else None,
        license=license,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="summarization",
        base_model=hub_id,
        datasets=[data.hub_id] if data and data.hub_id else None,
        tags=["hf_freeze", *(["lora"] if adapter else [])],
        metrics=["rouge"],
        model_name=place.absolute().name if results else None,
        eval_results=results,
    )


def _draw_losses(place: Path, log_history: Sequence[Mapping[str, Any]]) -> str | None:
    """The name of loss.png, where there is a curve and matplotlib to draw it."""
    curves = {"training": read_curve(log_history, "loss"), "validation": read_curve(log_history, "eval_loss")}
    if max(map(len, curves.values())) < LEAST_POINTS or not can_draw():
        return None
    with plain_style() as pyplot:
        figure = draw_lines(pyplot, curves, y_label="loss per token")
        return save_figure(figure, place / "loss")[0].name if figure else None


def _facts(facts: Mapping[str, Any], hardware: Hardware | None) -> list[tuple[str, str]]:
    shown = {name: f"{value:,.1f}" if isinstance(value, float) else str(value) for name, value in facts.items()}
    if hardware is not None:
        shown["hardware"] = str(hardware)
    shown["versions"] = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    return list(shown.items())


def _fence(text: str) -> str:
    """A fence that is longer than any run of backticks in a text, so that no review ends it."""
    return "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", text))])
