"""Batch prediction: a manifest in, a committed Parquet table of predictions out."""
