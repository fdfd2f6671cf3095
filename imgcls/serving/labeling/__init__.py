"""Labeling page of `imgcls serve`: people label the images of a manifest in the browser."""
