"""Overview of all outputs in a folder, and what each of them was made from."""
