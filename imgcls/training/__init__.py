"""Fine-tuning: labelled manifests in, a bundle out; Ray Data decodes, Ray Train runs the loop."""
