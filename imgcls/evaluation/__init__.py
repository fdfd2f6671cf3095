"""Evaluation of predictions: metrics, calibration, thresholds, comparison, reports."""
