"""Fine-tunes a pretrained transformer on reviews with its lower part frozen, and scores its summaries with ROUGE.

    accelerate launch recipes/summarize_reviews.py
        the shipped reviews, the embedded SmolLM2-135M: about 3 minutes on 2 CPU cores
    accelerate launch --config_file accelerate_config.yaml recipes/summarize_reviews.py \\
        --model_name_or_path facebook/bart-large-cnn --train_file reviews.csv \\
        --freeze_encoder_blocks all --freeze_decoder_blocks 0.5 --output_dir out/bart
        several GPUs, your own file
    accelerate launch recipes/summarize_reviews.py recipes/configs/llama.yaml
        everything from one YAML or JSON file
    accelerate launch recipes/summarize_reviews.py --output_dir out/run --resume_from_checkpoint last
        goes on from the last whole checkpoint in out/run; starts there where there is none

It reads the model's anatomy, freezes, says what that saves, trains with Trainer, proves that the frozen weights did not
move, and writes model, scores, predictions, a model card and report.html, a page about the run, into --output_dir.
The steps stand here in their order; each is a function of hf_freeze.summarization. To unfreeze gradually, take
summarize_in_stages.py.
"""

import sys

from hf_freeze import FreezeError, adapt_upper, freeze, guard_checkpoints, resume_from, verify_frozen
from hf_freeze.cli import exit_code
from hf_freeze.processes import leave_group, lost_ranks_named
from hf_freeze.summarization import check_tokenizer, loss_table
from hf_freeze.summarization.arguments import parse_arguments
from hf_freeze.summarization.closing import Training, save_everything, score_run
from hf_freeze.summarization.runs import (
    choose_cache,
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
    if model_args.stages is not None:
        raise FreezeError(
            f"--stages {model_args.stages} was asked for; stages have a recipe of their own. Start "
            "recipes/summarize_in_stages.py with the same arguments."
        )
    with run_folder(args) as say:
        # Data first: a wrong column should not wait for a model to load.
        data = load_data(data_args, args, say)

        # Model and plan: what is frozen, and what that saves.
        model, tokenizer = load_model(model_args, args)
        say(check_tokenizer(model, tokenizer, samples=data.rows["train"]["review"][:32]))
        plan = model_args.plan()
        report = freeze(model, plan)
        inputs = encode_splits(data.rows, model, tokenizer, **data_args.prompting())
        costs = forecast_run(model, plan, inputs, args)
        batches = args.gradient_accumulation_steps * args.world_size
        say(f"\n{report}\n\nBelow, a step is one batch of one device; the optimizer waits for {batches}:\n{costs}")
        say(f"Precision {args.chosen_precision}")
        for note in inputs.notes:
            say(f"note: {note}")
        if model_args.upper != "full":
            model = adapt_upper(model, kind=model_args.upper, r=model_args.lora_r, alpha=2 * model_args.lora_r)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

        # Trainer, and the cache of what is frozen.
        trainer = make_trainer(model, tokenizer, inputs, args, make_monitor(model, args, say))
        guard_checkpoints(trainer)
        checkpoint = None
        if args.resume_from_checkpoint:  # refused before anything is generated
            checkpoint = resume_from(trainer, args.resume_from_checkpoint)
            say(f"Going on from {checkpoint}." if checkpoint else "No whole checkpoint yet: from the beginning.")
        summarize = summarizer(model, tokenizer, data, inputs, args)
        say(f"\nSummaries of the {data.scored} rows before training:")
        before = summarize()
        say(f"note: supervised logits only: {trainer.supervised_logits} ({trainer.supervised_logits_reason})")
        choice = choose_cache(model_args, trainer, report, inputs, say)

        # Train.
        say(f"\nTraining {trained:,} of {report.total_parameters:,} parameters:")
        seconds = trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]
        choice.close(trainer, say, whole=checkpoint is None)
        say(f"\n{loss_table(trainer.state.log_history)}")

        # Prove that what is frozen did not move.
        proof = verify_frozen(model, report)
        say(f"\n{proof}")

        # Score.
        say(f"\nSummaries of the {data.scored} rows after training:")
        scores = score_run(data, before, summarize())
        say(f"\n{scores}")

        # Save.
        training = Training(
            plan, report, proof, trained, seconds, choice, cached=choice.cache is not None,
            costs=costs if model_args.upper == "full" else None,
            resumed=checkpoint is not None, whole=checkpoint is None,
        )  # fmt: skip
        save_everything(trainer, training, scores, model_args, data_args, data, inputs, say)


def launch() -> None:
    """Runs `main` as one process of a launch: names ranks that are lost, and leaves their group at the end."""
    with lost_ranks_named():
        main()
        leave_group()


if __name__ == "__main__":
    sys.exit(exit_code(launch))
