"""What goes into a model: whether a tokenizer and pixels are what it was pretrained on, and batches of text pairs."""
