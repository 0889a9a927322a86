"""What a run leaves for a reader: results, samples, a model card, a page."""
