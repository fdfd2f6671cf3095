"""Training: labeled manifests in, a bundle out, data-parallel over Ray Train workers."""
