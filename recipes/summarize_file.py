"""Summarises a file of reviews with a model that summarize_reviews.py has trained.

    python recipes/summarize_file.py out/summaries-1 reviews.csv -o summaries.jsonl

Reads CSV, TSV, JSONL, Parquet or a folder of them; writes one JSON object a row with the review's other columns and its
`summary`, in the order of the input; rows with an empty review are skipped and named.
"""

import argparse
import sys
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from hf_freeze import FreezeError, generate_summaries
from hf_freeze.precision import choose_precision
from hf_freeze.summarization import load_prompt, read_reviews, write_jsonl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the output folder of summarize_reviews.py, or any model folder")
    parser.add_argument("reviews", help="the file or folder to summarise")
    parser.add_argument("-o", "--output", required=True, help="the JSONL file to write")
    parser.add_argument("--text_column", help="the column that holds the reviews; guessed if not given")
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args()
    if Path(args.output).exists():
        raise FreezeError(f"-o {args.output} exists already. Choose another name, or remove it yourself.")

    reviews = read_reviews(args.reviews, text_column=args.text_column, need_summaries=False)
    print(reviews)
    model, tokenizer = load_model(args.model)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model.to(device)
    prompt, num_beams = load_prompt(tokenizer, model.config, args.model)

    summaries = generate_summaries(
        model,
        tokenizer,
        list(reviews.dataset["review"]),
        prompt=prompt,
        batch_size=args.batch_size,
        max_new_tokens=prompt.max_summary_tokens,
        num_beams=num_beams,
        precision="bf16" if choose_precision("auto", device).name == "bf16" else None,
    )
    rows = [{**row, "summary": summary} for row, summary in zip(reviews.dataset, summaries, strict=True)]
    write_jsonl(args.output, rows)
    print(f"{len(rows)} summaries: {args.output}")


def load_model(folder: str):
    """The model and tokenizer of a folder: a whole model, or an adapter on the base that it names."""
    adapted = (Path(folder) / "adapter_config.json").exists()
    if not adapted and not (Path(folder) / "config.json").exists():
        raise FreezeError(f"{folder} was given as model; there is no config.json in it. Give a model's folder.")
    base, revision = folder, None
    if adapted:
        adapter = PeftConfig.from_pretrained(folder)
        base, revision = adapter.base_model_name_or_path, adapter.revision
    config = AutoConfig.from_pretrained(base, revision=revision)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto_class.from_pretrained(base, revision=revision, dtype=torch.float32)
    if adapted:
        model = PeftModel.from_pretrained(model, folder)
    try:
        return model, AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise FreezeError(
            f"{folder} was given as model; its tokenizer cannot be read. Save the base's tokenizer there too "
            "(merge_delta writes the model only)."
        ) from error


if __name__ == "__main__":
    try:
        main()
    except FreezeError as error:
        sys.exit(f"error: {error}")
