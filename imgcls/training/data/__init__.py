"""Training data: labeled rows, decoding, batches."""
