"""What a training needs beside a frozen model: logits at labels only, checkpoints, stages, a monitor, adapters."""
