"""The labelling job: a manifest in, a committed Parquet table of predictions out."""
