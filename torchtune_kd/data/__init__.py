"""Datasets, batches, and the microbatches of an optimizer step."""
