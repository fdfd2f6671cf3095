"""Evaluation of predictions: metrics, calibration, thresholds, comparison, report."""
