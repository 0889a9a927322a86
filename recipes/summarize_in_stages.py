"""Fine-tunes a pretrained transformer on reviews by unfreezing gradually: the top blocks first, then more below them.

    accelerate launch recipes/summarize_in_stages.py --stages 4,4,3 --output_dir out/stages
        the shipped reviews, the embedded SmolLM2-135M: the top 4 blocks, then 8, then 12, each for --num_train_epochs
    accelerate launch recipes/summarize_in_stages.py --stages stages.yaml --train_file reviews.csv --output_dir out/own
        stages of your own, as `hf_freeze.save_stages` writes them
    accelerate launch recipes/summarize_in_stages.py --stages 4,4,3 --output_dir out/run --resume_from_checkpoint last
        goes on from the last whole checkpoint; stages that are done are not trained again

Arguments and results are those of summarize_reviews.py, which reads first. Each stage starts from the best weights so
far; one pass of the prefix cache serves all of them, unless --cache_prefix off.
"""

import sys
import time

from hf_freeze import FreezeError, freeze, gradual, load_stages, train_in_stages, verify_frozen
from hf_freeze.cli import exit_code
from hf_freeze.files import cache_folder
from hf_freeze.processes import leave_group, lost_ranks_named
from hf_freeze.summarization import check_tokenizer, loss_table
from hf_freeze.summarization.arguments import ModelArguments, parse_arguments
from hf_freeze.summarization.closing import Training, save_everything, score_run
from hf_freeze.summarization.runs import (
    CacheChoice,
    encode_splits,
    forecast_run,
    load_data,
    load_model,
    make_monitor,
    make_trainer,
    run_folder,
    summarizer,
)


def main() -> None:
    # Parse.
    model_args, data_args, args = parse_arguments()
    check_arguments(model_args)
    if args.max_steps > 0:
        raise FreezeError(
            f"--max_steps {args.max_steps} was asked for; a stage trains for --num_train_epochs, or for the steps that "
            "a YAML file of stages names. Leave it out."
        )
    if args.resume_from_checkpoint and not args.resumes_last:
        raise FreezeError("--resume_from_checkpoint takes only last with --stages: what is done is known there.")
    with run_folder(args) as say:
        # Data, model, the stages and what the first of them freezes.
        data = load_data(data_args, args, say)
        model, tokenizer = load_model(model_args, args)
        say(check_tokenizer(model, tokenizer, samples=data.rows["train"]["review"][:32]))
        stages = read_stages(model_args, model, args.num_train_epochs)
        report = freeze(model, stages[0].plan)
        inputs = encode_splits(data.rows, model, tokenizer, **data_args.prompting())
        costs = forecast_run(model, stages[0].plan, inputs, args)
        say(f"\n{report}\n\nThat is stage 1 of {len(stages)}, and so is the forecast:\n{costs}")
        say(f"Precision {args.chosen_precision}")
        for note in inputs.notes:
            say(f"note: {note}")
        summarize = summarizer(model, tokenizer, data, inputs, args)
        say(f"\nSummaries of the {data.scored} rows before training:")
        before = summarize()

        # Train: each stage has a trainer of its own; one monitor for all, so that drift is from the beginning.
        monitor = make_monitor(model, args, say)
        started = time.perf_counter()
        result = train_in_stages(
            lambda: make_trainer(model, tokenizer, inputs, args, monitor),
            stages,
            output_dir=args.output_dir,
            cache_dir=None
            if model_args.cache_prefix == "off"
            else model_args.prefix_cache_dir or cache_folder() / "prefix",
            resume=bool(args.resume_from_checkpoint),
            say=say,
        )
        trained_here = sum(stage.seconds for stage in result.stages[result.done_before :])
        choice = CacheChoice(seconds=time.perf_counter() - started - trained_here)  # freezing and loading with it
        trainer = result.trainer
        trainer.args.output_dir = args.output_dir
        say(f"\n{loss_table(trainer.state.log_history)}")

        # Prove, score, save.
        report = freeze(model, stages[-1].plan)
        proof = verify_frozen(model, report)
        say(f"\n{proof}\n\nSummaries of the {data.scored} rows after training:")
        scores = score_run(data, before, summarize())
        say(f"\n{scores}")
        training = Training(
            stages[-1].plan, report, proof, report.trainable_parameters, sum(stage.seconds for stage in result.stages),
            choice, cached=any(stage.cached for stage in result.stages), whole=False,
        )  # fmt: skip
        save_everything(trainer, training, scores, model_args, data_args, data, inputs, say)


def check_arguments(model_args: ModelArguments) -> None:
    """Refuses to begin without stages, and with what stages decide themselves."""
    if model_args.stages is None:
        raise FreezeError("--stages was not given. Give start,step,stages such as 4,4,3, or a YAML file.")
    blocks = model_args.freeze_encoder_blocks or model_args.freeze_decoder_blocks
    if blocks or model_args.upper != "full" or model_args.release_prefix:
        raise FreezeError(
            f"--stages {model_args.stages} was asked for with --freeze_..._blocks, --upper or --release_prefix; stages "
            "say what is frozen when, train whole blocks and keep all weights. Leave the others out."
        )


def read_stages(model_args: ModelArguments, model, epochs: float) -> list:
    """The stages of the shorthand or of a file."""
    asked = model_args.stages
    if asked.endswith((".yaml", ".yml")):
        return load_stages(asked)
    try:
        start, step, number = (int(piece) for piece in asked.split(","))
    except ValueError:
        raise FreezeError(
            f"--stages {asked} was asked for; use start,step,stages such as 4,4,3, or a YAML file."
        ) from None
    return gradual(model, start, step, number, plan=model_args.plan(), epochs=epochs)


def launch() -> None:
    """Runs `main` as one process of a launch: names ranks that are lost, and leaves their group at the end."""
    with lost_ranks_named():
        main()
        leave_group()


if __name__ == "__main__":
    sys.exit(exit_code(launch))
