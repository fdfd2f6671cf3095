"""Manifests and data sets: build, split, describe, and check images and labels."""
