"""Tensor functions of the augmentations, which the operations import when they are applied."""
