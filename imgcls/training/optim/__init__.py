"""Optimizer, parameter groups, fine-tuning strategy, loss, learning-rate finder, linear probe."""
