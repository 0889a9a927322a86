"""Summaries of customer reviews: reading, prompts, generation, ROUGE, and Trainer put right for them."""

from __future__ import annotations

from hf_freeze.inputs.collation import SummaryCollator
from hf_freeze.inputs.tokenizer import check_tokenizer
from hf_freeze.summarization.data.groups import group_baselines, group_reviews, read_group_splits
from hf_freeze.summarization.data.reviews import Reviews, overlap, read_reviews, read_splits, shipped_reviews
from hf_freeze.summarization.generation import generate_summaries
from hf_freeze.summarization.prompts import SummaryPrompt, encode_reviews, read_prompt
from hf_freeze.summarization.publish.card import DataFacts, write_card
from hf_freeze.summarization.publish.page import save_run, write_run_report
from hf_freeze.summarization.publish.results import (
    load_prompt,
    new_output_folder,
    sample_text,
    save_prompt,
    score_table,
    write_jsonl,
)
from hf_freeze.summarization.rouge import RougeScores, compute_rouge, first_sentence
from hf_freeze.summarization.training import (
    SummaryTrainer,
    SummaryTrainingArguments,
    TokenLoss,
    loss_table,
)

__all__ = [
    "DataFacts",
    "Reviews",
    "RougeScores",
    "SummaryCollator",
    "SummaryPrompt",
    "SummaryTrainer",
    "SummaryTrainingArguments",
    "TokenLoss",
    "check_tokenizer",
    "compute_rouge",
    "encode_reviews",
    "first_sentence",
    "generate_summaries",
    "group_baselines",
    "group_reviews",
    "load_prompt",
    "loss_table",
    "new_output_folder",
    "overlap",
    "read_group_splits",
    "read_prompt",
    "read_reviews",
    "read_splits",
    "sample_text",
    "save_prompt",
    "save_run",
    "score_table",
    "shipped_reviews",
    "write_card",
    "write_jsonl",
    "write_run_report",
]
