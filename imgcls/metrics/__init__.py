"""Metrics as mergeable counts: count any part of a predictions table, merge, compute metrics.

Needs only numpy and pyarrow, so that counting can run wherever the predictions are. `registry`
lists all metrics; to add one, write its function and one line there.
"""

from imgcls.metrics import tables
from imgcls.metrics.calibration import ece_from_bins, expected_calibration_error
from imgcls.metrics.counts import PredictionCounts

__all__ = ["PredictionCounts", "ece_from_bins", "expected_calibration_error", "tables"]
