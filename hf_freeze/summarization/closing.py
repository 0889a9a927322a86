"""The end of a training on reviews: summaries scored beside what costs nothing, and a folder that tells of the run.

What was trained and proved is given; nothing here runs the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_freeze.machine import peak_bytes, read_hardware
from hf_freeze.summarization.data.groups import group_baselines
from hf_freeze.summarization.publish.card import write_card
from hf_freeze.summarization.publish.page import save_run, write_run_report
from hf_freeze.summarization.publish.results import sample_text, save_prompt, score_table, write_jsonl
from hf_freeze.summarization.rouge import RougeScores, compute_rouge, first_sentence
from hf_freeze.summarization.training import SummaryTrainer, loss_table

if TYPE_CHECKING:
    from hf_freeze.forecast import Forecast
    from hf_freeze.freezing import FreezeReport, FrozenProof
    from hf_freeze.plan import FreezePlan
    from hf_freeze.summarization.arguments import DataArguments, ModelArguments
    from hf_freeze.summarization.runs import CacheChoice, ModelInputs, ReviewData, Say

__all__ = ["RunScores", "Training", "save_everything", "score_run"]


@dataclass(frozen=True)
class RunScores:
    """ROUGE of the test rows; prints as a table and some summaries.

    Attributes:
        systems: By name; the last one is the trained model, before it the untrained one, before that first sentences.
        samples: Each test row with its reference, its summaries before and after, and the ROUGE-L of the last.
        split: That the test rows are from.
    """

    systems: dict[str, RougeScores]
    samples: list[dict[str, Any]]
    split: str

    def __str__(self) -> str:
        return f"{score_table(self.systems, self.split)}\n\n{sample_text(self.samples)}"

    def to_dict(self) -> dict[str, float]:
        """The scores under the keys of all_results.json."""
        *_, baseline, zero_shot, trained = self.systems.values()
        prefixes = {"test_": trained, "zero_shot_test_": zero_shot, "baseline_test_": baseline}
        prefixes |= {"zero_shot_": zero_shot, "baseline_": baseline}
        return {name: value for prefix, rouge in prefixes.items() for name, value in rouge.to_dict(prefix).items()}


def score_run(data: ReviewData, before: Sequence[str], after: Sequence[str]) -> RunScores:
    """Scores the summaries of the model before and after training, and those of trivial ways to summarise.

    Args:
        data: Whose test rows were summarised.
        before, after: Summaries of all of them, in their order.
    """
    rows, references = data.rows["test"], data.references
    made = {f"{name} (baseline)": texts for name, texts in (group_baselines(rows) if data.grouped else {}).items()}
    made |= {
        "first sentence (baseline)": [first_sentence(review) for review in rows["review"]],
        "before (zero-shot)": list(before),
        "after": list(after),
    }
    systems = {name: compute_rouge(summaries, references) for name, summaries in made.items()}
    samples = [
        {**row, "reference": row["summary"], "before": old, "after": new, "rougeL": round(float(score), 1)}
        for row, old, new, score in zip(rows, before, after, systems["after"].per_example["rougeL"], strict=True)
    ]
    return RunScores(systems, samples, data.scored)


@dataclass(frozen=True)
class Training:
    """What was trained, what that took, and the proof that the rest stayed as it was.

    Attributes:
        plan: What was frozen, last.
        report: Of freezing it.
        proof: That the frozen tensors are unchanged.
        parameters: How many were trained.
        seconds: Of training, without the cache.
        choice: Whether a prefix cache was taken, with the seconds that this took.
        cached: Whether batches ran from one.
        costs: What was forecast for just this; None where several plans or adapters were trained.
        resumed: Whether it went on from a checkpoint, so that its seconds are not those of the whole run.
        whole: Whether `batch_seconds` of the trainer are those of all batches.
    """

    plan: FreezePlan
    report: FreezeReport
    proof: FrozenProof
    parameters: int
    seconds: float
    choice: CacheChoice
    cached: bool
    costs: Forecast | None = None
    resumed: bool = False
    whole: bool = True


def save_everything(
    trainer: SummaryTrainer,
    training: Training,
    scores: RunScores,
    model_args: ModelArguments,
    data_args: DataArguments,
    data: ReviewData,
    inputs: ModelInputs,
    say: Say,
) -> None:
    """Writes the model, its plan, prompt and scores, the predictions, a card and a page into the run's folder.

    Every process calls it: Trainer writes on the first one only, and shards where the model is sharded. Where
    `push_to_hub` is asked for, all of it is pushed.
    """
    args: Any = trainer.args
    folder, chief = Path(args.output_dir), args.process_index == 0
    trainer.save_model()
    if trainer.state.log_history:  # else all stages were done before
        trainer.save_state()
    trainer.save_metrics("all", _metrics(trainer, training, scores, data), combined=False)
    if chief:
        training.plan.save_pretrained(folder)
        save_prompt(inputs.prompt, data_args.prompt_template, folder, num_beams=args.generation_num_beams or 1)
        write_jsonl(folder / "predictions.jsonl", scores.samples)
        _write_pages(trainer, training, scores, model_args, data_args, data, inputs)
    if args.push_to_hub:  # again, with the card and the report: save_model has pushed before there were any
        trainer.push_to_hub(commit_message="Card, scores and report")
    say(
        f"\nModel, scores and predictions: {folder}\n"
        f"All of the run on one page: {folder / 'report.html'}\n"
        f"Summarise a new file with it:\n"
        f"  hf-freeze summarize {folder} reviews.csv -o summaries.csv"
        + (f" --group_by {data_args.group_by}" if data_args.group_by else "")
    )


def _metrics(trainer: SummaryTrainer, training: Training, scores: RunScores, data: ReviewData) -> dict[str, Any]:
    """What all_results.json holds."""
    args: Any = trainer.args
    return {
        **scores.to_dict(),
        "frozen_unchanged": True,  # there is a proof
        "frozen_tensors": training.proof.tensors,
        "train_seconds": training.seconds,
        "batch_seconds": trainer.batch_seconds,
        "prefix_cached": training.cached,
        "cache_seconds": training.choice.seconds,
        "train_rows": len(data.rows["train"]),
        "test_rows": len(data.rows["test"]),
        "scored_split": data.scored,
        "trainable_parameters": training.parameters,
        "total_parameters": training.report.total_parameters,
        "precision": args.chosen_precision.name,
        "world_size": args.world_size,
    }


def _write_pages(
    trainer: SummaryTrainer,
    training: Training,
    scores: RunScores,
    model_args: ModelArguments,
    data_args: DataArguments,
    data: ReviewData,
    inputs: ModelInputs,
) -> None:
    """The model card and the report of the run."""
    args: Any = trainer.args
    hardware, choice = read_hardware(args.device, args.world_size), training.choice
    since = " since it was resumed" if training.resumed else ""  # Trainer's clock starts anew
    card = write_card(
        args.output_dir,
        base=model_args.model_name_or_path,
        report=training.report,
        scores=scores.systems,
        losses=loss_table(trainer.state.log_history),
        samples=scores.samples,
        facts={
            "trained parameters": f"{training.parameters:,} ({model_args.upper})",
            f"seconds of training{since}": training.seconds,
            "seconds of deciding on the prefix cache and building it": choice.seconds,
            "epochs, learning rate": f"{args.num_train_epochs:g}, {args.learning_rate:g}",
            "reviews a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "precision": args.chosen_precision.name,
            "processes": args.world_size,
        },
        data=data_args.facts(data.rows, data.scored),
        log_history=trainer.state.log_history,
        hardware=hardware,
    )
    trainer.model_card = card.read_text(encoding="utf-8")  # what a push takes in the place of Trainer's draft
    save_run(
        args.output_dir,
        base=model_args.model_name_or_path,
        report=training.report,
        costs=training.costs,
        prediction=choice.prediction,
        measured={
            "batch_seconds": trainer.batch_seconds if training.whole else None,
            "build_seconds": choice.build.seconds if choice.build else None,
            "cache_bytes": choice.build.stored_bytes if choice.build else None,
            "peak_bytes": peak_bytes(args.device),
        },
        hardware=hardware,
        data=data.accounts(),
        notes=(*inputs.notes, *([f"Seconds of training are those{since}."] if since else [])),
    )
    write_run_report(args.output_dir)
