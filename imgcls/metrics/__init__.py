"""Metrics as mergeable counts: count any part of a table of predictions, merge, then read `tables`.

Needs numpy and pyarrow alone, so that counting may run wherever the predictions are.
"""

from imgcls.metrics import tables
from imgcls.metrics.calibration import ece_from_bins, expected_calibration_error
from imgcls.metrics.counts import PredictionCounts

__all__ = ["PredictionCounts", "ece_from_bins", "expected_calibration_error", "tables"]
