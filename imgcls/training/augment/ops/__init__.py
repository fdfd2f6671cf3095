"""The augmentations, one module each: an `Operation` with its configuration keys."""
