"""Fine-tunes a pretrained transformer on reviews with its lower part frozen, and scores its summaries with ROUGE.

    accelerate launch recipes/summarize_reviews.py
        the shipped reviews, the embedded SmolLM2-135M: about 3 minutes on 2 CPU cores
    accelerate launch --config_file accelerate_config.yaml recipes/summarize_reviews.py \\
        --model_name_or_path facebook/bart-large-cnn --train_file reviews.csv \\
        --freeze_encoder_blocks all --freeze_decoder_blocks 0.5 --output_dir out/bart
        several GPUs, your own file
    accelerate launch recipes/summarize_reviews.py recipes/configs/llama.yaml
        everything from one YAML or JSON file
    accelerate launch recipes/summarize_reviews.py --stages 4,4,3 --output_dir out/stages
        unfreezes gradually: the top 4 blocks, then 8, then 12, each for --num_train_epochs
    accelerate launch recipes/summarize_reviews.py --output_dir out/run --resume_from_checkpoint last
        goes on from the last whole checkpoint in out/run; starts there where there is none

It reads the model's anatomy, freezes, says what that saves, trains with Trainer, proves that the frozen weights did not
move, and writes model, scores, predictions, a model card and report.html, a page about the run, into --output_dir.
"""

import math
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_type_hints

import torch
from datasets import get_dataset_split_names
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    HfArgumentParser,
    set_seed,
)

from hf_freeze import (
    FreezeError,
    FreezeMonitor,
    FreezePlan,
    PrefixCache,
    adapt_upper,
    compute_rouge,
    forecast,
    freeze,
    generate_summaries,
    gradual,
    guard_checkpoints,
    load_stages,
    resume_from,
    train_in_stages,
    verify_frozen,
)
from hf_freeze.cli import exit_code, worded_arguments
from hf_freeze.embedded import EMBEDDED_NAME, embedded_model
from hf_freeze.errors import ModelError, RankLost, ReviewsError
from hf_freeze.files import cache_folder
from hf_freeze.machine import peak_bytes, read_hardware
from hf_freeze.processes import agreed, from_first, leave_group, lost_ranks_named
from hf_freeze.summarization import (
    DataFacts,
    SummaryCollator,
    SummaryTrainer,
    SummaryTrainingArguments,
    check_tokenizer,
    encode_reviews,
    first_sentence,
    group_baselines,
    loss_table,
    new_output_folder,
    read_group_splits,
    read_prompt,
    read_splits,
    sample_text,
    save_prompt,
    save_run,
    score_table,
    shipped_reviews,
    write_card,
    write_jsonl,
    write_run_report,
)

LEAST_BATCHES = 16  # proving that a cache is exact, and timing it, takes about as long as so many


@dataclass
class ModelArguments:
    """The model, and what of it is frozen."""

    model_name_or_path: str = field(
        default=EMBEDDED_NAME, metadata={"help": f"A hub id, a folder, or {EMBEDDED_NAME!r} for the embedded model."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a hub id."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    freeze_embeddings: bool = field(default=True, metadata={"help": "Freeze all input embeddings."})
    freeze_encoder_blocks: str | None = field(
        default=None, metadata={"help": "Lowest n blocks, -n for all but the top n, a fraction such as 0.5, or all."}
    )
    freeze_decoder_blocks: str | None = field(default=None, metadata={"help": "The same for the decoder."})
    tied_head: str = field(default="freeze", metadata={"help": "freeze, train or untie a head tied to the embeddings."})
    stages: str | None = field(
        default=None,
        metadata={"help": "Unfreeze gradually: start,step,stages in blocks from the top (4,4,3), or a YAML of stages."},
    )
    upper: str = field(
        default="full", metadata={"help": "full trains what is not frozen; lora or dora adapters on those blocks."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters; scaled by twice that."})
    cache_prefix: str = field(
        default="auto", metadata={"help": "auto computes the frozen part once where that pays; on always; off never."}
    )
    prefix_cache_dir: str | None = field(
        default=None, metadata={"help": "Where its states are kept; none: ~/.cache/hf_freeze/prefix."}
    )
    release_prefix: bool = field(
        default=False, metadata={"help": "Let the frozen weights leave the device while training runs from the cache."}
    )

    def plan(self) -> FreezePlan:
        blocks = self.freeze_encoder_blocks, self.freeze_decoder_blocks
        return FreezePlan(self.freeze_embeddings, *blocks, tied_head=self.tied_head)


@dataclass
class DataArguments:
    """The reviews, and how they are given to the model."""

    train_file: str | None = field(
        default=None, metadata={"help": "CSV, TSV, JSONL or Parquet, or a folder of them; none: the shipped reviews."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "None sets a tenth of train aside."})
    test_file: str | None = field(default=None, metadata={"help": "None scores on the validation rows."})
    dataset_name: str | None = field(default=None, metadata={"help": "A hub id, instead of files."})
    text_column: str | None = field(default=None, metadata={"help": "None guesses, and says so."})
    summary_column: str | None = field(default=None, metadata={"help": "None guesses, and says so."})
    group_by: str | None = field(
        default=None,
        metadata={
            "help": "One summary for all reviews with the same value in this column; a * in --text_column and "
            "--summary_column ('rev*') stands for several columns of one row."
        },
    )
    prompt_template: str | None = field(
        default=None, metadata={"help": "Text around {review}; none: the chat template, else a plain one."}
    )
    max_source_tokens: int = field(default=512, metadata={"help": "Longer reviews lose their end."})
    max_summary_tokens: int = field(default=64, metadata={"help": "Longest summary, its end token included."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Train on the first rows only."})
    max_validation_rows: int | None = field(default=None, metadata={"help": "Measure the loss on the first rows only."})
    max_test_rows: int | None = field(default=None, metadata={"help": "Score the first rows only."})


@dataclass
class RunArguments(SummaryTrainingArguments):
    """Trainer's arguments, with the defaults of this recipe."""

    output_dir: str = field(default="", metadata={"help": "Empty takes the next free out/summaries-N."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint, or last: the newest whole one in --output_dir, none is a start."}
    )
    num_train_epochs: float = field(
        default=2.0, metadata={"help": "Passes over the training reviews; more overfit a few hundred of them."}
    )
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Reviews at once on a device."})
    gradient_accumulation_steps: int = field(
        default=2, metadata={"help": "Batches a step: less memory, the same step, since the loss is a token sum."}
    )
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Reviews scored or summarised at once."})


def main() -> None:
    model_args, data_args, args = parse_arguments()
    folder, unnamed = args.output_dir, not args.output_dir
    with agreed("take its output folder"):  # the first process takes it, and all learn which, or why not
        if args.process_index == 0:
            folder = str(new_output_folder(folder, resuming=bool(args.resume_from_checkpoint)))
    args.output_dir = from_first(folder)
    try:
        run(model_args, data_args, args)
    finally:
        if unnamed and args.process_index == 0:
            with suppress(OSError):  # it stays where anything was written; a mistyped column leaves nothing
                Path(args.output_dir).rmdir()


def run(model_args, data_args, args) -> None:
    chief = args.process_index == 0
    say = print if chief else lambda *_: None
    set_seed(args.seed)

    # Read the data first: a wrong column should not wait for a model to load.
    with agreed("read the reviews"), args.main_process_first(desc="reading reviews"):
        splits, scored = load_reviews(data_args, args.seed)
    for name, reviews in splits.items():
        say(f"{name}: {reviews}")
    rows = {name: reviews.dataset for name, reviews in splits.items()}
    for name in rows:
        if limit := getattr(data_args, f"max_{name}_rows"):
            rows[name] = rows[name].select(range(min(limit, len(rows[name]))))
    if len(rows["train"]) < args.train_batch_size * args.world_size:
        say(f"Warning: {len(rows['train'])} training rows are fewer than one batch of {args.train_batch_size}.")

    # Read the model, write the plan, apply, forecast.
    with agreed("load the model"), args.main_process_first(desc="loading the model"):
        model, tokenizer = load_model(model_args)
    say(check_tokenizer(model, tokenizer, samples=rows["train"]["review"][:32]))
    stages = read_stages(model_args, model, args.num_train_epochs)
    plan = stages[0].plan if stages else model_args.plan()
    report = freeze(model, plan)
    prompt = read_prompt(
        tokenizer,
        model.config,
        template=data_args.prompt_template,
        max_source_tokens=data_args.max_source_tokens,
        max_summary_tokens=data_args.max_summary_tokens,
    )
    encoded = {name: encode_reviews(rows[name], prompt) for name in ("train", "validation")}
    say(f"\n{report}\n")
    if stages:
        say(f"That is stage 1 of {len(stages)}, and so is the forecast. The cache is built, unless --cache_prefix off.")
    batches = args.gradient_accumulation_steps * args.world_size
    say(f"Below, a step is one batch of {args.train_batch_size} rows on one device; the optimizer waits for {batches}:")
    costs = forecast(
        model,
        plan,
        batch_size=args.train_batch_size,
        **mean_lengths(encoded["train"].dataset, prompt),
        epochs=math.ceil(args.num_train_epochs),
        dtype="bfloat16" if args.bf16 else "float32",
        frozen_dtype="float32",  # as they are loaded; autocast casts them, and what crosses the cut is not cast
        rows=len(rows["train"]),
    )
    say(costs)
    say(f"Precision {args.chosen_precision}")
    for note in (*prompt.notes, *encoded["train"].notes):
        say(f"note: {note}")
    if model_args.upper != "full":
        model = adapt_upper(model, kind=model_args.upper, r=model_args.lora_r, alpha=2 * model_args.lora_r)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    # The trainer: few widths instead of hundreds: each new shape costs a CPU a kernel of its own, in time and memory.
    pad_multiple = 32 if prompt.max_tokens is None or prompt.max_tokens % 32 == 0 else None
    figures = bool(args.report_to) or 4 * trainable < 2e9  # drift needs a copy of what trains: not without being asked
    monitor = FreezeMonitor(figures=figures, say=say)  # one for all stages: drift is from the beginning

    def make_trainer() -> SummaryTrainer:
        trainer = SummaryTrainer(
            model=model,
            args=args,
            train_dataset=encoded["train"].dataset,
            eval_dataset=encoded["validation"].dataset,
            data_collator=SummaryCollator(tokenizer, model, pad_to_multiple_of=pad_multiple),
            processing_class=tokenizer,
        )
        monitor.put_first(trainer)
        if not args.report_to:  # no reporter needs its figures: behind the progress bar, whose lines stay short
            callbacks = trainer.callback_handler.callbacks
            callbacks.append(callbacks.pop(0))
        return trainer

    trainer = checkpoint = None
    if not stages:
        trainer = make_trainer()
        guard_checkpoints(trainer)
        if args.resume_from_checkpoint:  # refused before anything is generated
            checkpoint = resume_from(trainer, args.resume_from_checkpoint)
            say(f"Going on from {checkpoint}." if checkpoint else "No whole checkpoint yet: from the beginning.")

    # Summaries before any training: what the pretrained model can do already.
    precision = "bf16" if args.bf16 else None
    test_reviews = list(rows["test"]["review"])
    settings = {
        "prompt": prompt,
        "precision": precision,
        "batch_size": args.per_device_eval_batch_size,
        "max_new_tokens": data_args.max_summary_tokens,
        "num_beams": args.generation_num_beams or 1,
        "progress": not args.disable_tqdm,
    }
    model.to(args.device)
    say(f"\nSummaries of the {scored} rows before training:")
    before = generate_summaries(model, tokenizer, test_reviews, **settings)

    # Train.
    cache, saving, cache_seconds = None, None, 0.0
    if stages:
        started = time.perf_counter()
        where = model_args.prefix_cache_dir or cache_folder() / "prefix"
        result = train_in_stages(
            make_trainer,
            stages,
            output_dir=args.output_dir,
            cache_dir=None if model_args.cache_prefix == "off" else where,
            resume=bool(args.resume_from_checkpoint),
            say=say,
        )
        trainer, plan = result.trainer, stages[-1].plan
        report = freeze(model, plan)
        trainable = report.trainable_parameters
        train_seconds = sum(stage.seconds for stage in result.stages)
        here = sum(stage.seconds for stage in result.stages[result.done_before :])
        cache_seconds = time.perf_counter() - started - here  # freezing and the best weights with it
        trainer.args.output_dir = args.output_dir
    else:
        say(f"note: supervised logits only: {trainer.supervised_logits} ({trainer.supervised_logits_reason})")
        cache, saving, cache_seconds = build_cache(model_args, args, model, report, trainer, encoded, say)
        say(f"\nTraining {trainable:,} of {report.total_parameters:,} parameters:")
        train_seconds = trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]
        if saving is not None and not checkpoint:  # else the batches before are missing
            say(saving.measured(trainer.batch_seconds, cache.report.seconds if cache else None))
        if cache is not None:
            say(f"{cache.batches_used} batches ran from the cache, {cache.batches_unused} training batches did not.")
            try:
                with agreed("close the prefix cache"):  # which compares its states once more
                    cache.close()
            except FreezeError:
                trainer.save_model()
                say(f"The weights as they are now: {args.output_dir}")
                raise
    losses = loss_table(trainer.state.log_history)
    say(f"\n{losses}")

    # Prove it held.
    proof = verify_frozen(model, report)
    say(f"\n{proof}")

    # Score.
    say(f"\nSummaries of the {scored} rows after training:")
    after = generate_summaries(model, tokenizer, test_reviews, **settings)
    references = list(rows["test"]["references" if data_args.group_by else "summary"])  # of several the best counts
    trivial = group_baselines(rows["test"]) if data_args.group_by else {}
    scores = {
        "first sentence (baseline)": compute_rouge([first_sentence(review) for review in test_reviews], references),
        "before (zero-shot)": compute_rouge(before, references),
        "after": compute_rouge(after, references),
    }
    baseline, zero_shot, trained = scores.values()
    samples = [
        {**row, "reference": row["summary"], "before": old, "after": new, "rougeL": round(float(score), 1)}
        for row, old, new, score in zip(rows["test"], before, after, trained.per_example["rougeL"], strict=True)
    ]
    scores = {**{f"{name} (baseline)": compute_rouge(made, references) for name, made in trivial.items()}, **scores}
    say(f"\n{score_table(scores, scored)}\n\n{sample_text(samples)}")

    # Save. Trainer writes on the first process only, and shards where the model is sharded.
    trainer.save_model()
    if trainer.state.log_history:  # else all stages were done before
        trainer.save_state()
    metrics = {
        **trained.to_dict("test_"),
        **zero_shot.to_dict("zero_shot_test_"),
        **baseline.to_dict("baseline_test_"),
        **zero_shot.to_dict("zero_shot_"),
        **baseline.to_dict("baseline_"),
        "frozen_unchanged": True,  # verify_frozen raises otherwise
        "frozen_tensors": proof.tensors,
        "train_seconds": train_seconds,
        "batch_seconds": trainer.batch_seconds,
        "prefix_cached": any(stage.cached for stage in result.stages) if stages else cache is not None,
        "cache_seconds": cache_seconds,
        "train_rows": len(rows["train"]),
        "test_rows": len(test_reviews),
        "scored_split": scored,
        "trainable_parameters": trainable,
        "total_parameters": report.total_parameters,
        "precision": args.chosen_precision.name,
        "world_size": args.world_size,
    }
    trainer.save_metrics("all", metrics, combined=False)
    if chief:
        plan.save_pretrained(args.output_dir)
        save_prompt(prompt, data_args.prompt_template, args.output_dir, num_beams=settings["num_beams"])
        write_jsonl(Path(args.output_dir) / "predictions.jsonl", samples)
        since = " since it was resumed" if checkpoint else ""  # Trainer's clock starts anew
        data, hardware = describe_data(data_args, rows, scored), read_hardware(args.device, args.world_size)
        card = write_card(
            args.output_dir,
            base=model_args.model_name_or_path,
            report=report,
            scores=scores,
            losses=losses,
            samples=samples,
            facts={
                "trained parameters": f"{trainable:,} ({model_args.upper})",
                f"seconds of training{since}": train_seconds,
                "seconds of deciding on the prefix cache and building it": cache_seconds,
                "epochs, learning rate": f"{args.num_train_epochs:g}, {args.learning_rate:g}",
                "reviews a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
                "precision": args.chosen_precision.name,
                "processes": args.world_size,
            },
            data=data,
            log_history=trainer.state.log_history,
            hardware=hardware,
        )
        trainer.model_card = card.read_text(encoding="utf-8")  # what a push takes in the place of Trainer's draft
        built = cache.report if cache else None
        save_run(
            args.output_dir,
            base=model_args.model_name_or_path,
            report=report,
            costs=None if stages or model_args.upper != "full" else costs,  # else not of what was trained
            prediction=saving,
            measured={
                "batch_seconds": None if stages or checkpoint else trainer.batch_seconds,  # else not of all batches
                "build_seconds": built and built.seconds,
                "cache_bytes": built and built.stored_bytes,
                "peak_bytes": peak_bytes(args.device),
            },
            hardware=hardware,
            data={
                name: f"{Path(reviews.source).name}: {reviews.rows_read:,} rows read, {len(rows[name]):,} used"
                for name, reviews in splits.items()
                if name in (scored, "train", "validation")
            },
            notes=(
                *prompt.notes,
                *encoded["train"].notes,
                *([f"Seconds of training are those{since}."] if since else []),
            ),
        )
        write_run_report(args.output_dir)
    if args.push_to_hub:  # again, with the card and the report: save_model has pushed before there were any
        trainer.push_to_hub(commit_message="Card, scores and report")
    say(
        f"\nModel, scores and predictions: {args.output_dir}\n"
        f"All of the run on one page: {Path(args.output_dir) / 'report.html'}\n"
        f"Summarise a new file with it:\n"
        f"  hf-freeze summarize {args.output_dir} reviews.csv -o summaries.csv"
        + (f" --group_by {data_args.group_by}" if data_args.group_by else "")
    )


def parse_arguments() -> tuple[ModelArguments, DataArguments, RunArguments]:
    """From the command line, or from one YAML or JSON file."""
    parser = HfArgumentParser((ModelArguments, DataArguments, RunArguments), allow_abbrev=False)
    with worded_arguments():
        if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
            parsed = parser.parse_yaml_file(sys.argv[1])
        elif len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
            parsed = parser.parse_json_file(sys.argv[1])
        else:
            parsed = parser.parse_args_into_dataclasses()
    for values in parsed:  # those of a file are taken as they are; 1e-4 is a text in YAML
        for name, kind in get_type_hints(type(values)).items():
            if kind in (int, float, int | None, float | None) and isinstance(text := getattr(values, name), str):
                try:
                    setattr(values, name, float(text) if kind in (float, float | None) else int(text))
                except ValueError:
                    raise FreezeError(f"{name} {text!r} was asked for; it is a number.") from None
    switch = {True: "on", "true": "on", False: "off", "false": "off"}  # YAML takes on and off for true and false
    parsed[0].cache_prefix = switch.get(parsed[0].cache_prefix, parsed[0].cache_prefix)
    if parsed[0].cache_prefix not in ("auto", "on", "off"):
        raise FreezeError(f"--cache_prefix {parsed[0].cache_prefix} was asked for; it is auto, on or off.")
    if parsed[0].upper not in ("full", "lora", "dora"):
        raise FreezeError(f"--upper {parsed[0].upper} was asked for; it is full, lora or dora.")
    args = parsed[2]
    last = str(args.resume_from_checkpoint).lower() in ("last", "true")
    if parsed[0].stages is not None and args.resume_from_checkpoint and not last:
        raise FreezeError("--resume_from_checkpoint takes only last with --stages: what is done is known there.")
    if args.resume_from_checkpoint and not args.output_dir:
        if last:
            raise FreezeError(
                "--resume_from_checkpoint last was asked for without --output_dir. Give the run's folder."
            )
        args.output_dir = str(Path(args.resume_from_checkpoint).parent)
    return parsed


def read_stages(model_args: ModelArguments, model, epochs: float) -> list:
    """The stages of gradual unfreezing, of the shorthand or of a file; none where none are asked for."""
    asked = model_args.stages
    if asked is None:
        return []
    blocks = model_args.freeze_encoder_blocks or model_args.freeze_decoder_blocks
    if blocks or model_args.upper != "full" or model_args.release_prefix:
        raise FreezeError(
            f"--stages {asked} was asked for with --freeze_..._blocks, --upper or --release_prefix; stages say what is "
            "frozen when, train whole blocks and keep all weights. Leave the others out."
        )
    if asked.endswith((".yaml", ".yml")):
        return load_stages(asked)
    try:
        start, step, number = (int(piece) for piece in asked.split(","))
    except ValueError:
        raise FreezeError(
            f"--stages {asked} was asked for; use start,step,stages such as 4,4,3, or a YAML file."
        ) from None
    return gradual(model, start, step, number, plan=model_args.plan(), epochs=epochs)


def load_reviews(data_args: DataArguments, seed: int) -> tuple[dict, str]:
    """The user's files, a hub data set or the shipped reviews as splits, and which of them the test rows are from."""
    sources = [data_args.train_file, data_args.validation_file, data_args.test_file]
    if data_args.dataset_name:
        try:
            known = get_dataset_split_names(data_args.dataset_name)
        except Exception as error:  # the hub's client has whole families of errors: offline, gated, no such data
            raise ReviewsError(
                f"--dataset_name {data_args.dataset_name} was asked for; it cannot be loaded: {error}. Check the id "
                "and the network, or give files."
            ) from error
        splits = ("train", "validation", "test")
        sources = [
            s or (data_args.dataset_name if name in known else None) for s, name in zip(sources, splits, strict=True)
        ]
    if not any(sources) and not data_args.group_by:
        return shipped_reviews(), "test"
    if not sources[0]:
        raise FreezeError("Validation, test or --group_by was given without --train_file. Give --train_file too.")
    scored = "test" if sources[2] else "validation"
    columns = {"text_column": data_args.text_column, "summary_column": data_args.summary_column}
    if data_args.group_by:
        return read_group_splits(*sources, group_by=data_args.group_by, **columns, seed=seed), scored
    return read_splits(*sources, **columns, seed=seed), scored


def describe_data(data_args: DataArguments, rows: dict, scored: str) -> DataFacts:
    """What the model card says of the reviews; a language is known of the shipped ones only."""
    given = data_args.dataset_name or data_args.train_file
    return DataFacts(
        name=Path(given).name if given else "the reviews that hf_freeze ships",
        rows={name: len(dataset) for name, dataset in rows.items() if name in (scored, "train", "validation")},
        hub_id=data_args.dataset_name,
        language=None if given else "en",
        scored=scored,
    )


def load_model(model_args: ModelArguments):
    """The model in fp32 and its tokenizer; the config tells which kind of model it is."""
    name = model_args.model_name_or_path
    options = {"revision": model_args.model_revision, "trust_remote_code": model_args.trust_remote_code}
    source = str(embedded_model()) if name == EMBEDDED_NAME else name
    try:
        config = AutoConfig.from_pretrained(source, **options)
        auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto_class.from_pretrained(source, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # of a damaged folder the loaders raise OSError, ValueError, SafetensorError and others
        raise ModelError(
            f"--model_name_or_path {name} was asked for; it is no model that can be loaded here: "
            f"{' '.join(str(error).split()).rstrip('.') or type(error).__name__}. "
            f"Give a hub id, a folder with config.json, or {EMBEDDED_NAME!r}."
        ) from error
    return model, tokenizer


def build_cache(model_args: ModelArguments, args: RunArguments, model, report, trainer, encoded: dict, say):
    """The cache of the frozen prefix, given to the trainer where it pays; the prediction; seconds of all of it."""
    started = time.perf_counter()
    if model_args.cache_prefix == "off":
        return None, None, 0.0
    rows = encoded["train"].dataset
    precision = "bf16" if args.bf16 else "fp32"
    places = {"cache_dir": model_args.prefix_cache_dir, "precision": precision, "progress": not args.disable_tqdm}
    batches = math.ceil(len(rows) / (args.train_batch_size * args.world_size))
    steps = math.ceil(args.num_train_epochs * batches)
    if args.max_steps > 0:
        steps = args.max_steps * args.gradient_accumulation_steps
    if model_args.cache_prefix == "auto":
        # Decided by one: another run may begin to write one in between.
        found = from_first(PrefixCache.is_there(model, report.cuts, model_args.prefix_cache_dir))
        again = steps if found else steps - batches  # batches that might run from the cache and save time by it
        if again < LEAST_BATCHES:
            gain = f"{max(0, again)} batches might gain by it"
            say(f"note: no prefix cache: {gain}, and finding out takes as long as some {LEAST_BATCHES}")
            return None, None, 0.0
    saving = None
    say("\nTrying on some rows whether the frozen part can be computed once, to the same bits, and whether that pays:")
    try:
        prepared = PrefixCache.prepare(model, rows, trainer.data_collator, **places)
        saving = prepared.predict(
            steps=steps,
            batch_size=args.train_batch_size,
            step=lambda batch: trainer.compute_loss(model, batch).backward(),
        )
        say(f"{saving} Finding that out took {time.perf_counter() - started:.1f} s.")
        if model_args.cache_prefix != "on" and not saving.pays:
            return None, saving, time.perf_counter() - started
        cache = prepared.build()
    except RankLost:
        raise
    except FreezeError as reason:  # it cannot be exact, or the disk is full: training goes on without, on all ranks
        if model_args.cache_prefix == "on":
            raise
        say(f"note: no prefix cache: {reason}")
        return None, saving, time.perf_counter() - started
    build_report = cache.report
    say(build_report)
    if args.eval_strategy != "no" and args.num_train_epochs > 1:
        try:
            say(f"Validation rows: {cache.add(encoded['validation'].dataset)}")
            cache.report = build_report
        except RankLost:
            raise
        except FreezeError as reason:
            say(f"note: the validation rows run the whole model: {reason}")
    if model_args.release_prefix:
        say(f"{cache.release_prefix() / 1e6:,.0f} MB of frozen weights are away while training runs from the cache")
    trainer.data_collator = cache.collator
    return cache, saving, time.perf_counter() - started


def mean_lengths(dataset, prompt) -> dict[str, int]:
    """Mean tokens of a review with its prompt, and of a summary: what the forecast needs."""
    total = sum(map(len, dataset["input_ids"])) / len(dataset)
    labelled = sum(sum(label != -100 for label in labels) for labels in dataset["labels"]) / len(dataset)
    source = total if prompt.is_encoder_decoder else total - labelled
    return {"source_tokens": round(source), "target_tokens": round(labelled)}


def launch() -> None:
    """This process of the launch, from the first line to the last."""
    with lost_ranks_named():
        main()
        leave_group()


if __name__ == "__main__":
    sys.exit(exit_code(launch))
