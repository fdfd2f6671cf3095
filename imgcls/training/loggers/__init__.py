"""Metric loggers: TensorBoard, MLflow, Weights & Biases."""
