"""What goes into a model: whether a tokenizer and pixels are what it was pretrained on, and batches of text pairs."""

IGNORED_LABEL = -100  # what torch's cross entropy and every loss of transformers skip
