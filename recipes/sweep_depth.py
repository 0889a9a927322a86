"""Which depth to freeze: trains at several depths from one pass of the prefix cache, and compares ROUGE, time, memory.

    python recipes/sweep_depth.py
        the shipped reviews, the embedded SmolLM2-135M, depths 0, 10, 20, 26 of 30 and full fine-tuning, one seed:
        about 12 minutes on 2 CPU cores
    python recipes/sweep_depth.py --train_file train.jsonl --validation_file valid.jsonl --test_file test.jsonl \\
        --text_column review --summary_column title --prompt_template $'Review: {review}\\nTitle:' \\
        --depths 0,15,22,26,28 --train_rows 128,512 --seeds 1,2,3 --learning_rates 1e-4,3e-4,1e-3 --output_dir out/sweep
        a grid like the README's; interrupted, the same command goes on
    python recipes/sweep_depth.py --output_dir out/sweep --draw_only
        table and plot again, from the lines of finished runs

It is `hf-freeze sweep` for those who start recipes; `--help` lists its arguments. From Python: `sweep_depths` for any
Trainer, `hf_freeze.summarization.sweeping.sweep_reviews` for reviews.
"""

import sys

from hf_freeze.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
