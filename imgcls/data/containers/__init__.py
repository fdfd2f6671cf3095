"""Files that hold many images: archives, and Parquet with a column of images."""
