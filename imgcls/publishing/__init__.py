"""Publication of committed runs: Delta tables, Iceberg tables, data sets on Hugging Face."""
