"""What a program that trains on reviews is asked: dataclasses for HfArgumentParser, and how they are read and checked.

One argument is described once: the recipes, the sweep and the advice take their share of these classes.
"""

# No `from __future__ import annotations`: HfArgumentParser reads the types of the classes.

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from datasets import get_dataset_split_names
from transformers import HfArgumentParser

from hf_freeze.embedded import EMBEDDED_NAME
from hf_freeze.errors import FreezeError, ReviewsError
from hf_freeze.given import worded_arguments
from hf_freeze.plan import FreezePlan
from hf_freeze.summarization.data.groups import read_group_splits
from hf_freeze.summarization.data.reviews import Reviews, read_splits, shipped_reviews
from hf_freeze.summarization.publish.card import DataFacts
from hf_freeze.summarization.training import SummaryTrainingArguments

__all__ = ["DataArguments", "ModelArguments", "ReviewArguments", "RunArguments", "argument", "parse_arguments"]

SWITCH = {True: "on", "true": "on", False: "off", "false": "off"}  # YAML takes on and off for true and false


def argument(default: Any, help_line: str) -> Any:
    """A field of a dataclass of arguments, with its line of help."""
    return field(default=default, metadata={"help": help_line})


@dataclass
class ModelArguments:
    """The model, and what of it is frozen."""

    model_name_or_path: str = argument(EMBEDDED_NAME, f"A hub id, a folder, or {EMBEDDED_NAME!r}: the embedded model.")
    model_revision: str | None = argument(None, "Branch, tag or commit of a hub id.")
    trust_remote_code: bool = argument(False, "Run code that comes with the model.")
    freeze_embeddings: bool = argument(True, "Freeze all input embeddings.")
    freeze_encoder_blocks: str | None = argument(
        None, "Lowest n blocks, -n for all but the top n, a fraction such as 0.5, or all."
    )
    freeze_decoder_blocks: str | None = argument(None, "The same for the decoder.")
    tied_head: str = argument("freeze", "freeze, train or untie a head tied to the embeddings.")
    stages: str | None = argument(
        None, "For summarize_in_stages.py: start,step,stages in blocks from the top (4,4,3), or a YAML of stages."
    )
    upper: str = argument("full", "full trains what is not frozen; lora or dora adapters on those blocks.")
    lora_r: int = argument(16, "Rank of the adapters; scaled by twice that.")
    cache_prefix: str = argument("auto", "auto computes the frozen part once where that pays; on always; off never.")
    prefix_cache_dir: str | None = argument(None, "Where its states are kept; none: ~/.cache/hf_freeze/prefix.")
    release_prefix: bool = argument(
        False, "Let the frozen weights leave the device while training runs from the cache."
    )

    def plan(self) -> FreezePlan:
        """What is to be frozen.

        Raises:
            PlanError: A number of blocks that is none.
        """
        asked: dict[str, Any] = {
            "encoder_blocks": self.freeze_encoder_blocks,
            "decoder_blocks": self.freeze_decoder_blocks,
        }
        return FreezePlan(embeddings=self.freeze_embeddings, tied_head=self.tied_head, **asked)  # type: ignore[arg-type]

    def check(self) -> None:
        """Refuses what is none of the choices.

        Raises:
            FreezeError: Which one, and what there is.
        """
        if self.cache_prefix not in ("auto", "on", "off"):
            raise FreezeError(f"--cache_prefix {self.cache_prefix} was asked for; it is auto, on or off.")
        if self.upper not in ("full", "lora", "dora"):
            raise FreezeError(f"--upper {self.upper} was asked for; it is full, lora or dora.")


@dataclass
class ReviewArguments:
    """The reviews, and how they are given to the model: what every program that trains on them takes."""

    train_file: str | None = argument(
        None, "CSV, TSV, JSONL or Parquet, or a folder of them; none: the shipped reviews."
    )
    validation_file: str | None = argument(None, "None sets a tenth of train aside.")
    text_column: str | None = argument(None, "None guesses, and says so.")
    summary_column: str | None = argument(None, "None guesses, and says so.")
    prompt_template: str | None = argument(None, "Text around {review}; none: the chat template, else a plain one.")
    max_source_tokens: int = argument(512, "Longer reviews lose their end.")
    max_summary_tokens: int = argument(64, "Longest summary, its end token included.")

    def sources(self) -> list[str | None]:
        """What train, validation and test are read from."""
        return [self.train_file, self.validation_file, getattr(self, "test_file", None)]

    def read(self, seed: int = 42) -> tuple[dict[str, Reviews], str]:
        """The user's reviews, or the shipped ones, by split; and of which split the test rows are.

        Args:
            seed: Draws the validation rows where they are set aside.

        Raises:
            FreezeError: No train_file beside the other files, or one that cannot be read.
        """
        sources = self.sources()
        group_by = getattr(self, "group_by", None)
        if not any(sources) and not group_by:
            return dict(shipped_reviews()), "test"
        if not sources[0]:
            raise FreezeError("Validation, test or --group_by was given without --train_file. Give --train_file too.")
        options: Any = {"text_column": self.text_column, "summary_column": self.summary_column, "seed": seed}
        train, *others = sources
        if group_by:
            splits = read_group_splits(train, *others, group_by=group_by, **options)
        else:
            splits = read_splits(train, *others, **options)
        return dict(splits), "test" if sources[2] else "validation"

    def prompting(self) -> dict[str, Any]:
        """The arguments of `read_prompt`."""
        limits = {"max_source_tokens": self.max_source_tokens, "max_summary_tokens": self.max_summary_tokens}
        return {"template": self.prompt_template, **limits}


@dataclass
class DataArguments(ReviewArguments):
    """The reviews of a training: a hub data set or groups too, and how many rows of them are used."""

    test_file: str | None = argument(None, "None scores on the validation rows.")
    dataset_name: str | None = argument(None, "A hub id, instead of files.")
    group_by: str | None = argument(
        None,
        "One summary for all reviews with the same value in this column; a * in --text_column and --summary_column "
        "('rev*') stands for several columns of one row.",
    )
    max_train_rows: int | None = argument(None, "Train on the first rows only.")
    max_validation_rows: int | None = argument(None, "Measure the loss on the first rows only.")
    max_test_rows: int | None = argument(None, "Score the first rows only.")

    def sources(self) -> list[str | None]:
        """The files, and the hub data set for those that are not given and that it has.

        Raises:
            ReviewsError: The data set cannot be loaded.
        """
        files = super().sources()
        if not self.dataset_name:
            return files
        try:
            known = get_dataset_split_names(self.dataset_name)
        except Exception as error:  # the hub's client has whole families of errors: offline, gated, no such data
            raise ReviewsError(
                f"--dataset_name {self.dataset_name} was asked for; it cannot be loaded: {error}. Check the id and the "
                "network, or give files."
            ) from error
        splits = zip(("train", "validation", "test"), files, strict=True)
        return [file or (self.dataset_name if split in known else None) for split, file in splits]

    def facts(self, rows: dict[str, Any], scored: str) -> DataFacts:
        """What the model card says of the reviews; a language is known of the shipped ones only.

        Args:
            rows: Those that are used, by split.
            scored: The split that the scored rows are from.
        """
        given = self.dataset_name or self.train_file
        return DataFacts(
            name=Path(given).name if given else "the reviews that hf_freeze ships",
            rows={name: len(rows[name]) for name in rows if name in (scored, "train", "validation")},
            hub_id=self.dataset_name,
            language=None if given else "en",
            scored=scored,
        )


@dataclass
class RunArguments(SummaryTrainingArguments):
    """Trainer's arguments, with the defaults of the recipes for summaries."""

    output_dir: str = argument("", "Empty takes the next free out/summaries-N.")
    resume_from_checkpoint: str | None = argument(
        None, "A checkpoint, or last: the newest whole one in --output_dir, none is a start."
    )
    num_train_epochs: float = argument(2.0, "Passes over the training reviews; more overfit a few hundred of them.")
    per_device_train_batch_size: int = argument(4, "Reviews at once on a device.")
    gradient_accumulation_steps: int = argument(
        2, "Batches a step: less memory, the same step, since the loss is a token sum."
    )
    per_device_eval_batch_size: int = argument(16, "Reviews scored or summarised at once.")

    def settle_resuming(self) -> None:
        """Takes the output folder from the checkpoint that is named.

        Raises:
            FreezeError: The last one was asked for of no folder.
        """
        if not self.resume_from_checkpoint or self.output_dir:
            return
        if self.resumes_last:
            raise FreezeError(
                "--resume_from_checkpoint last was asked for without --output_dir. Give the run's folder."
            )
        self.output_dir = str(Path(self.resume_from_checkpoint).parent)

    @property
    def resumes_last(self) -> bool:
        """Whether the newest checkpoint is asked for, whichever that is."""
        return str(self.resume_from_checkpoint).lower() in ("last", "true")


def parse_arguments() -> tuple[ModelArguments, DataArguments, RunArguments]:
    """The arguments of a recipe for summaries, from its command line or from the one YAML or JSON file named there.

    Raises:
        FreezeError: One that is not known, or a value that cannot be.
    """
    parser = HfArgumentParser((ModelArguments, DataArguments, RunArguments), allow_abbrev=False)  # type: ignore[arg-type]
    with worded_arguments():
        if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
            parsed = parser.parse_yaml_file(sys.argv[1])
        elif len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
            parsed = parser.parse_json_file(sys.argv[1])
        else:
            parsed = parser.parse_args_into_dataclasses()
    for values in parsed:
        _read_numbers_of_file(values)
    model_args, data_args, args = parsed
    model_args.cache_prefix = SWITCH.get(model_args.cache_prefix, model_args.cache_prefix)
    model_args.check()
    args.settle_resuming()
    return model_args, data_args, args


def _read_numbers_of_file(values: Any) -> None:
    """Values of a file are taken as they are, and 1e-4 is a text in YAML."""
    for name, kind in get_type_hints(type(values)).items():
        if kind in (int, float, int | None, float | None) and isinstance(text := getattr(values, name), str):
            try:
                setattr(values, name, float(text) if kind in (float, float | None) else int(text))
            except ValueError:
                raise FreezeError(f"{name} {text!r} was asked for; it is a number.") from None
