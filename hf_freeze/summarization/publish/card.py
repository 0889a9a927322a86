"""The model card: README.md of a run's output folder, with metadata that the Hugging Face hub reads.

It words what it is given and reads the folder for what kind of model lies there. What is not known (a base that is no
hub id, a language, a license) is left out, never guessed. `keep_card` lets the card stand when Trainer or
PEFT would write over it.
"""

from __future__ import annotations

import importlib.util
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
from hf_freeze.summarization.publish.results import METRICS, sample_text, score_table
from hf_freeze.summarization.rouge import RougeScores
from hf_freeze.tables import Table

__all__ = ["CARD_FILE", "DataFacts", "base_facts", "keep_card", "write_card"]

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
    place = Path(folder)
    adapter = (place / "adapter_config.json").exists()
    hub_id, known_license = base_facts(base)
    name = base if hub_id or base == EMBEDDED_NAME else Path(base).name
    metadata = _metadata(place, hub_id, license or known_license, scores, data, adapter=adapter)
    trained = list(scores.values())[-1]
    parts = [
        f"# Review summaries from {name}, partly frozen",
        "Fine-tuned with hf_freeze: the lower part of the base model holds the same bits as before.",
        "## What was frozen",
        report.to_markdown(),
        f"Plan: `{json.dumps(report.plan.to_dict())}`",
        "## Results",
        losses.to_markdown(),
    ]
    if picture := _loss_picture(place, log_history):
        parts.append(f"![Loss per token in training and validation]({picture.name})")
    parts += [
        score_table(scores, data.scored if data else "test").to_markdown(),
        f"ROUGE counts words that {trained.count:,} summaries share with their references; it does not tell whether a "
        "summary is true. Read some before you trust it.",
        "## Samples",
        _fenced(sample_text(samples)),
    ]
    if data is not None:
        parts += ["## Data", str(data)]
    parts += ["## Use", *_use(place, report, adapter=adapter), "## Facts", _fact_lines(facts, hardware)]
    path = place / CARD_FILE
    place.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"---\n{metadata}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n")
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


def keep_card(trainer: Any) -> None:
    """Lets the card in the trainer's output folder stand whenever it pushes. Mutates the trainer.

    `Trainer.push_to_hub` writes a draft of its own over README.md, and saving a PEFT model before that edits it. Call
    this after `write_card`; the card that lies there now is put back each time before anything is uploaded.

    Raises:
        FreezeError: There is no README.md yet.
    """
    path = Path(trainer.args.output_dir) / CARD_FILE
    if not trainer.is_world_process_zero():
        return
    if not path.is_file():
        raise FreezeError(f"keep_card was asked for {path}, which does not exist. Call write_card first.")
    text = path.read_text(encoding="utf-8")

    def create_model_card(*_: Any, **__: Any) -> None:
        write_whole(path, text)

    trainer.create_model_card = create_model_card


def _metadata(
    place: Path,
    hub_id: str | None,
    license: str | None,
    scores: Mapping[str, RougeScores],
    data: DataFacts | None,
    *,
    adapter: bool,
) -> str:
    """The YAML on top, made by the hub's own class."""
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
    made = ModelCardData(
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
    return made.to_yaml()


def _loss_picture(place: Path, log_history: Sequence[Mapping[str, Any]]) -> Path | None:
    """loss.png, where there is a curve and matplotlib to draw it."""
    curves = {
        name: [(entry["step"], entry[key]) for entry in log_history if key in entry and "step" in entry]
        for name, key in (("training", "loss"), ("validation", "eval_loss"))
    }
    if max(map(len, curves.values())) < LEAST_POINTS or importlib.util.find_spec("matplotlib") is None:
        return None
    from hf_freeze.plots import plain_style, save_figure

    with plain_style() as pyplot:
        figure, axes = pyplot.subplots(figsize=(6.4, 3.2))
        for name, points in curves.items():
            if points:
                axes.plot(*zip(*points, strict=True), label=name, markersize=4)
        axes.set(xlabel="step", ylabel="loss per token")
        axes.legend()
        return save_figure(figure, place / "loss")[0]


def _use(place: Path, report: FreezeReport, *, adapter: bool) -> list[str]:
    kind = "Seq2SeqLM" if {"encoder", "decoder"} <= report.resolved.blocks.keys() else "CausalLM"
    auto = f"{'AutoPeftModel' if adapter else 'AutoModel'}For{kind}"
    imports = f"from transformers import {auto}, AutoTokenizer"
    if adapter:
        imports = f"from peft import {auto}\nfrom transformers import AutoTokenizer"
    shown = place.name if place.is_absolute() else place.as_posix()
    code = f"""{imports}
from hf_freeze.summarization import generate_summaries, load_prompt

folder = {shown!r}  # where this model lies on your disk
model, tokenizer = {auto}.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
prompt, num_beams = load_prompt(tokenizer, model.config, folder)  # the text around a review in training
reviews = ["Good mug, weak handle: it came off in the second week."]
print(generate_summaries(model, tokenizer, reviews, prompt=prompt, num_beams=num_beams))"""
    return [
        f"```python\n{code}\n```",
        "A whole file, of any size:",
        f"    hf-freeze summarize {shown} reviews.csv -o summaries.csv",
    ]


def _fact_lines(facts: Mapping[str, Any], hardware: Hardware | None) -> str:
    shown = {name: f"{value:,.1f}" if isinstance(value, float) else str(value) for name, value in facts.items()}
    if hardware is not None:
        shown["hardware"] = str(hardware)
    shown["versions"] = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    return "\n".join(f"- {name}: {value}" for name, value in shown.items())


def _fenced(text: str) -> str:
    """Text in a fence that is longer than any run of backticks in it, so that no review ends it."""
    runs = [len(run) for run in re.findall(r"`+", text)]
    fence = "`" * max(3, max(runs, default=0) + 1)
    return f"{fence}text\n{text}\n{fence}"
