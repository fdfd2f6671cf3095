"""Serving: one model over HTTP, with the pixels and the numbers of the nightly table."""
