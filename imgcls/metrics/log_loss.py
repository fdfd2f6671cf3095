"""Log loss of predictions: the mean of -log of the label's score, in nats."""

from __future__ import annotations

import numpy as np

from imgcls.metrics.counts import CORRECT, SCORE_FLOOR, WRONG, PredictionCounts
from imgcls.metrics.intervals import Interval, nonnegative_mean_interval


def log_loss(counts: PredictionCounts) -> tuple[float, Interval] | None:
    """Mean log loss of the labeled rows with a label score, and its 95% interval, in nats.

    Parameters
    ----------
    counts : PredictionCounts
        Counts of a table of predictions.

    Returns
    -------
    value : float
        At least 0. Label scores below 1e-12 count as 1e-12.
    interval : tuple of float
        `intervals.nonnegative_mean_interval`; the worst row that may exist but was not seen is a
        mistake with the mean confidence. None is returned for no such row.

    Examples
    --------
    >>> import pyarrow as pa
    >>> table = pa.table(
    ...     {
    ...         "label": ["cat", "dog"],
    ...         "predicted_label": ["cat", "dog"],
    ...         "confidence": [0.5, 0.5],
    ...         "accepted": [True, True],
    ...         "status": ["ok", "ok"],
    ...         "label_score": [0.5, 0.5],
    ...         "label_rank": [1, 1],
    ...     }
    ... )
    >>> counts = PredictionCounts.from_table(table, label_column="label", classes=["cat", "dog"])
    >>> value, (low, high) = log_loss(counts)
    >>> round(value, 4)
    0.6931
    """
    if not counts.log_loss_rows:
        return None
    rows, total = counts.log_loss_rows, counts.log_loss_sum
    interval = nonnegative_mean_interval(
        total, counts.log_loss_square_sum, rows, _estimate_mistake_loss(counts)
    )
    return total / rows, interval


def _estimate_mistake_loss(counts: PredictionCounts) -> float:
    """Log loss, in nats, of a mistake with the mean confidence.

    The other classes share the rest of the scores equally.
    """
    labeled = [CORRECT, WRONG]
    mean = counts.bin_confidence[labeled].sum() / counts.bin_counts[labeled].sum()
    rest = (1 - mean) / max(1, len(counts.classes) - 1)
    return float(-np.log(np.clip(rest, SCORE_FLOOR, 1.0)))
