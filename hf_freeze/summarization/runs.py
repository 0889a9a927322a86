"""A training on reviews from its arguments to its summaries: the pieces that the recipes put in order.

Each function does one step and says what it found; what is frozen, trained and proved stands in the recipe. How a run
is scored and saved is `closing`'s business.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from hf_freeze.errors import FreezeError, RankLost
from hf_freeze.forecast import Forecast, forecast
from hf_freeze.inputs import IGNORED_LABEL
from hf_freeze.inputs.collation import SummaryCollator
from hf_freeze.loading import load_base, load_tokenizer, source_of
from hf_freeze.plan import FreezePlan
from hf_freeze.prefix import PrefixCache
from hf_freeze.processes import agreed, from_first
from hf_freeze.summarization.arguments import DataArguments, ModelArguments, RunArguments
from hf_freeze.summarization.data.reviews import Reviews
from hf_freeze.summarization.generation import generate_summaries
from hf_freeze.summarization.prompts import SummaryPrompt, encode_reviews, read_prompt
from hf_freeze.summarization.publish.results import new_output_folder
from hf_freeze.summarization.training import SummaryTrainer, SummaryTrainingArguments
from hf_freeze.training.monitor import FreezeMonitor

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_freeze.freezing import FreezeReport
    from hf_freeze.prefix import BreakEven, BuildReport

__all__ = [
    "CacheChoice",
    "ModelInputs",
    "ReviewData",
    "choose_cache",
    "encode_splits",
    "forecast_run",
    "load_data",
    "load_model",
    "make_monitor",
    "make_trainer",
    "run_folder",
    "summarizer",
]

LEAST_BATCHES = 16  # proving that a cache is exact, and timing it, takes about as long as so many
DRIFT_BYTES = 2e9  # a copy of what trains may be as large before drift is measured without being asked for

Say = Callable[[object], object]


@contextmanager
def run_folder(args: RunArguments) -> Iterator[Say]:
    """Takes the output folder of a run, the same on all processes, and sets the seed.

    A folder that nobody named goes again where nothing was written into it: a mistyped column leaves none.

    Args:
        args: Their `output_dir` becomes the folder.

    Yields:
        `print` on the first process, silence on the others.

    Raises:
        FreezeError: The folder holds another run, or cannot be made.
    """
    folder, chief = args.output_dir, args.process_index == 0
    unnamed = not folder
    with agreed("take its output folder"):  # the first process takes it, and all learn which, or why not
        if chief:
            folder = str(new_output_folder(folder, resuming=bool(args.resume_from_checkpoint)))
    args.output_dir = from_first(folder)
    set_seed(args.seed)
    try:
        yield print if chief else lambda *_: None
    finally:
        if unnamed and chief:
            with suppress(OSError):
                Path(args.output_dir).rmdir()


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class ReviewData:
    """The reviews of a run.

    Attributes:
        splits: As they were read, each with its account.
        rows: Those that are used, of train, validation and test.
        scored: The split that the test rows are from.
        grouped: Whether a row holds several reviews, of which any summary may be met.
    """

    splits: Mapping[str, Reviews]
    rows: dict[str, Dataset]
    scored: str
    grouped: bool

    @property
    def references(self) -> list[Any]:
        """What the test rows' summaries are scored against; of several references the best one counts."""
        return list(self.rows["test"]["references" if self.grouped else "summary"])

    def accounts(self) -> dict[str, str]:
        """Where the rows of each split are from and how many they are, in words."""
        return {
            name: f"{Path(split.source).name}: {split.rows_read:,} rows read, {len(self.rows[name]):,} used"
            for name, split in self.splits.items()
            if name in (self.scored, "train", "validation")
        }


def load_data(data_args: DataArguments, args: RunArguments, say: Say) -> ReviewData:
    """Reads the reviews on all processes, the first one before the others.

    Raises:
        FreezeError: They cannot be read; the same on every process.
    """
    with agreed("read the reviews"), args.main_process_first(desc="reading reviews"):
        splits, scored = data_args.read(args.seed)
    rows = {}
    for name, split in splits.items():
        say(f"{name}: {split}")
        most = getattr(data_args, f"max_{name}_rows")
        rows[name] = split.dataset.select(range(min(most, len(split)))) if most else split.dataset
    if len(rows["train"]) < args.train_batch_size * args.world_size:
        say(f"Warning: {len(rows['train'])} training rows are fewer than one batch of {args.train_batch_size}.")
    return ReviewData(splits, rows, scored, grouped=bool(data_args.group_by))


@dataclass(frozen=True)
class ModelInputs:
    """Reviews as a model is given them.

    Attributes:
        notes: What was cut, and what else a reader should know.
    """

    prompt: SummaryPrompt
    train: Dataset
    validation: Dataset
    collator: SummaryCollator
    notes: tuple[str, ...]


def encode_splits(rows: Mapping[str, Dataset], model: Any, tokenizer: Any, **prompting: Any) -> ModelInputs:
    """Training and validation rows in ids, and their collator.

    Args:
        rows: By split, with the columns review and summary.
        model: Whose inputs they are; it is not changed.
        tokenizer: The model's.
        **prompting: As in `read_prompt`.

    Raises:
        FreezeError: A prompt that cannot be, or texts that are none.
    """
    prompt = read_prompt(tokenizer, model.config, **prompting)
    train, validation = (encode_reviews(rows[name], prompt) for name in ("train", "validation"))
    # Few widths instead of hundreds: each new shape costs a CPU a kernel of its own, in time and memory.
    multiple = 32 if prompt.max_tokens is None or prompt.max_tokens % 32 == 0 else None
    collator = SummaryCollator(tokenizer, model, pad_to_multiple_of=multiple)
    return ModelInputs(prompt, train.dataset, validation.dataset, collator, (*prompt.notes, *train.notes))


# --------------------------------------------------------------------------------------------------- model and trainer


def load_model(model_args: ModelArguments, args: RunArguments) -> tuple[Any, Any]:
    """The model in fp32 and its tokenizer, on all processes, the first one before the others.

    Raises:
        ModelError: It cannot be loaded; the same on every process.
    """
    options: dict[str, Any] = {"revision": model_args.model_revision, "trust_remote_code": model_args.trust_remote_code}
    with agreed("load the model"), args.main_process_first(desc="loading the model"):
        source = source_of(model_args.model_name_or_path)
        return load_base(source, torch.float32, **options), load_tokenizer(source, None, **options)


def forecast_run(model: Any, plan: FreezePlan, inputs: ModelInputs, args: SummaryTrainingArguments) -> Forecast:
    """What training by a plan will cost: a step is one batch of one device, with the mean tokens of the inputs.

    A model in fp32, as `load_model` gives it; autocast casts its weights, and what crosses the cut is not cast.
    """
    rows = inputs.train
    total = sum(map(len, rows["input_ids"])) / len(rows)
    labelled = sum(sum(label != IGNORED_LABEL for label in labels) for labels in rows["labels"]) / len(rows)
    source = total if inputs.prompt.is_encoder_decoder else total - labelled
    return forecast(
        model,
        plan,
        batch_size=args.train_batch_size,
        source_tokens=round(source),
        target_tokens=round(labelled),
        epochs=math.ceil(args.num_train_epochs),
        dtype="bfloat16" if args.bf16 else "float32",
        frozen_dtype="float32",
        rows=len(rows),
    )


def make_trainer(
    model: Any, tokenizer: Any, inputs: ModelInputs, args: SummaryTrainingArguments, monitor: FreezeMonitor
) -> SummaryTrainer:
    """A `SummaryTrainer` for the inputs that is watched by a monitor; its progress bar stands before other messages."""
    trainer = SummaryTrainer(
        model=model,
        args=args,
        train_dataset=inputs.train,
        eval_dataset=inputs.validation,
        data_collator=inputs.collator,
        processing_class=tokenizer,
    )
    monitor.put_first(trainer)
    if not args.report_to:  # no reporter needs its figures: behind the progress bar, whose lines stay short
        callbacks = trainer.callback_handler.callbacks
        callbacks.append(callbacks.pop(0))
    return trainer


def make_monitor(model: Any, args: SummaryTrainingArguments, say: Say) -> FreezeMonitor:
    """A monitor that tells drift where that was asked for, or costs little: it needs a copy of what trains."""
    trained = sum(4 * parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return FreezeMonitor(figures=bool(args.report_to) or trained < DRIFT_BYTES, say=say)


def summarizer(
    model: Any, tokenizer: Any, data: ReviewData, inputs: ModelInputs, args: RunArguments
) -> Callable[[], list[str]]:
    """A function that summarises the test reviews with the model as it is then; moves the model to its device."""
    return partial(
        generate_summaries,
        model.to(args.device),
        tokenizer,
        list(data.rows["test"]["review"]),
        prompt=inputs.prompt,
        precision="bf16" if args.bf16 else None,
        batch_size=args.per_device_eval_batch_size,
        max_new_tokens=inputs.prompt.max_summary_tokens,
        num_beams=args.generation_num_beams or 1,
        progress=not args.disable_tqdm,
    )


# --------------------------------------------------------------------------------------------------------------- cache


@dataclass
class CacheChoice:
    """Whether a run trains from a prefix cache.

    Attributes:
        cache: The trainer's cache; None where there is none.
        build: What its build did.
        prediction: What it was predicted to save, where that was measured.
        seconds: Of deciding and building.
    """

    cache: PrefixCache | None = None
    build: BuildReport | None = None
    prediction: BreakEven | None = None
    seconds: float = 0.0

    def close(self, trainer: SummaryTrainer, say: Say, *, whole: bool = True) -> None:
        """Says what the cache saved, compares its states once more, and takes it off the model.

        Args:
            whole: Whether all batches of the run were trained here; else what they took cannot be compared.

        Raises:
            FreezeError: The states are not what the model gives; the weights are saved before.
        """
        if self.prediction is not None and whole:
            say(self.prediction.measured(trainer.batch_seconds, self.build.seconds if self.build else None))
        if self.cache is None:
            return
        used, unused = self.cache.batches_used, self.cache.batches_unused
        say(f"{used} batches ran from the cache, {unused} training batches did not.")
        try:
            with agreed("close the prefix cache"):
                self.cache.close()
        except FreezeError:
            trainer.save_model()
            say(f"The weights as they are now: {trainer.args.output_dir}")
            raise


def choose_cache(
    model_args: ModelArguments, trainer: SummaryTrainer, report: FreezeReport, inputs: ModelInputs, say: Say
) -> CacheChoice:
    """The cache of the frozen prefix, given to the trainer where it was asked for or pays.

    What cannot be cached exactly, and a full disk, end the run only where --cache_prefix is on; else all processes
    train without.

    Raises:
        FreezeError: A cache was asked for and cannot be.
    """
    started, choice = time.perf_counter(), CacheChoice()
    asked: Any = model_args.cache_prefix
    if asked == "off" or (asked == "auto" and not _may_pay(model_args, trainer, report, inputs, say)):
        return choice
    say("\nTrying on some rows whether the frozen part can be computed once, to the same bits, and whether that pays:")
    with _declined(say, "no prefix cache", raises=asked == "on"):
        _predict_and_build(choice, model_args, trainer, inputs, say)
    if choice.cache is not None:
        _give_to_trainer(choice.cache, model_args, trainer, inputs, say)
    choice.seconds = time.perf_counter() - started
    return choice


def _may_pay(
    model_args: ModelArguments, trainer: SummaryTrainer, report: FreezeReport, inputs: ModelInputs, say: Say
) -> bool:
    """Whether enough batches might run from a cache to be worth finding out; decided by one process for all.

    Another run may begin to write a cache between two looks.
    """
    there = from_first(PrefixCache.is_there(trainer.model, report.cuts, model_args.prefix_cache_dir))
    an_epoch, all_epochs = _batches(trainer.args, len(inputs.train))
    gaining = max(0, all_epochs if there else all_epochs - an_epoch)  # the first pass writes what is not there
    if gaining < LEAST_BATCHES:
        say(
            f"note: no prefix cache: {gaining} batches might gain by it, and finding out takes as long as some "
            f"{LEAST_BATCHES}"
        )
    return gaining >= LEAST_BATCHES


def _batches(args: Any, rows: int) -> tuple[int, int]:
    """Batches of an epoch and of the run, on one process."""
    an_epoch = math.ceil(rows / (args.train_batch_size * args.world_size))
    if args.max_steps > 0:
        return an_epoch, args.max_steps * args.gradient_accumulation_steps
    return an_epoch, math.ceil(args.num_train_epochs * an_epoch)


def _predict_and_build(
    choice: CacheChoice, model_args: ModelArguments, trainer: SummaryTrainer, inputs: ModelInputs, say: Say
) -> None:
    """Notes in `choice` what a cache would save, and the cache where that pays or was asked for."""
    started, args = time.perf_counter(), trainer.args
    model: Any = trainer.model
    prepared = PrefixCache.prepare(
        model,
        inputs.train,
        trainer.data_collator,
        cache_dir=model_args.prefix_cache_dir,
        precision="bf16" if args.bf16 else "fp32",
        progress=not args.disable_tqdm,
    )
    choice.prediction = prepared.predict(
        steps=_batches(args, len(inputs.train))[1],
        batch_size=args.train_batch_size,
        step=lambda batch: trainer.compute_loss(model, batch).backward(),
    )
    say(f"{choice.prediction} Finding that out took {time.perf_counter() - started:.1f} s.")
    if model_args.cache_prefix == "on" or choice.prediction.pays:
        choice.cache = prepared.build()
        choice.build = choice.cache.report


def _give_to_trainer(
    cache: PrefixCache, model_args: ModelArguments, trainer: SummaryTrainer, inputs: ModelInputs, say: Say
) -> None:
    """Gives the trainer the cache; with the validation rows where they are evaluated more than once."""
    say(cache.report)
    if trainer.args.eval_strategy != "no" and trainer.args.num_train_epochs > 1:
        with _declined(say, "the validation rows run the whole model"):
            say(f"Validation rows: {cache.add(inputs.validation)}")
    if model_args.release_prefix:
        say(f"{cache.release_prefix() / 1e6:,.0f} MB of frozen weights are away while training runs from the cache")
    trainer.data_collator = cache.collator


@contextmanager
def _declined(say: Say, what: str, *, raises: bool = False) -> Iterator[None]:
    """Turns a refusal into a note on all processes, unless it must be raised or a process is gone."""
    try:
        yield
    except FreezeError as reason:
        if raises or isinstance(reason, RankLost):
            raise
        say(f"note: {what}: {reason}")
