"""The depth sweep for reviews: `sweep_depths` with a model, a prompt, `SummaryTrainer` and ROUGE put in."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hf_freeze.depth import SweepReport, sweep_depths
from hf_freeze.summarization.generation import generate_summaries
from hf_freeze.summarization.rouge import compute_rouge
from hf_freeze.summarization.runs import encode_splits
from hf_freeze.summarization.training import SummaryTrainer, SummaryTrainingArguments
from hf_freeze.training.data_digest import data_digest

__all__ = ["sweep_reviews"]


def sweep_reviews(
    make_model: Callable[[], Any],
    tokenizer: Any,
    splits: Mapping[str, Any],
    args: SummaryTrainingArguments,
    depths: Sequence[int],
    *,
    output_dir: str | os.PathLike[str],
    prompt_template: str | None = None,
    max_source_tokens: int = 512,
    max_summary_tokens: int = 64,
    quality: str = "rougeL",
    **options: Any,
) -> SweepReport:
    """Sweeps the depth of the freeze on reviews, each run scored by the ROUGE of its summaries.

    Args:
        make_model: As in `sweep_depths`.
        tokenizer: The model's.
        splits: Datasets named train, validation and test, with the columns review and summary.
        args: Epochs, batch and precision of every run.
        depths: Frozen blocks of each run.
        output_dir: Where the runs lie; a sweep goes on there.
        prompt_template, max_source_tokens, max_summary_tokens: As in `read_prompt`.
        quality: What the report compares: a metric of `compute_rouge` on the test rows, or "eval_loss". Learning rates
            are chosen by the validation loss, so that the test rows choose nothing.
        **options: The others of `sweep_depths`.

    Returns:
        The report.
    """
    model = make_model()
    limits = {"max_source_tokens": max_source_tokens, "max_summary_tokens": max_summary_tokens}
    inputs = encode_splits(splits, model, tokenizer, template=prompt_template, **limits)
    del model
    reviews, references = list(splits["test"]["review"]), list(splits["test"]["summary"])

    def make_trainer(model: Any) -> SummaryTrainer:
        return SummaryTrainer(
            model=model,
            args=args,
            train_dataset=inputs.train,
            eval_dataset=inputs.validation,
            data_collator=inputs.collator,
            processing_class=tokenizer,
        )

    def score(trainer: SummaryTrainer) -> dict[str, Any]:
        summaries = generate_summaries(
            trainer.model,
            tokenizer,
            reviews,
            prompt=inputs.prompt,
            precision="bf16" if args.bf16 else None,
            batch_size=args.per_device_eval_batch_size,
            max_new_tokens=max_summary_tokens,
            progress=False,
        )
        rouge = compute_rouge(summaries, references)
        return rouge.to_dict() | {f"{name}_rows": values.tolist() for name, values in rouge.per_example.items()}

    facts = {"test data": data_digest(splits["test"]), "max_summary_tokens": max_summary_tokens}
    return sweep_depths(
        make_model, make_trainer, depths, output_dir=output_dir, score=score, quality=quality, facts=facts, **options
    )
