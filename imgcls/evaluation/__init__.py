"""Judging predictions that were made: metrics, calibration, thresholds, comparison, the report."""
