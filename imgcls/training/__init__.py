"""Fine-tuning: labelled manifests in, a bundle out; Ray Data decodes and Ray Train runs the loop."""
