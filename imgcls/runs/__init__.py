"""Output folders of runs: layout, schema, ownership, committed results."""
