"""Metrics of the score bins of `RankingCounts`: average precision, calibration, losses."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from imgcls.metrics.calibration import bin_index, ece_by_chance
from imgcls.metrics.columns import Floats, Ints
from imgcls.metrics.discrimination import MacroEstimate, compute_discrimination
from imgcls.metrics.intervals import (
    Interval,
    mover_interval,
    nonnegative_mean_interval,
    wilson_interval,
)
from imgcls.metrics.limits import ece_limits
from imgcls.metrics.multilabel.ranking import (
    BRIER,
    CELL_LOSSES,
    COVERAGE,
    LOG_LOSS,
    RankingCounts,
)
from imgcls.metrics.score_bins import bin_values

NUM_CALIBRATION_BINS = 15


@dataclass(frozen=True, eq=False)
class _Pooled:
    """Score bins of all classes together, shape (1, B)."""

    positive: Ints
    negative: Ints


def estimate_micro_average_precision(
    counts: RankingCounts, *, design_effect: float = 1.0
) -> MacroEstimate | None:
    """Average precision of the cells of all classes in one ranking.

    Parameters
    ----------
    counts : RankingCounts
        Counts of a run.
    design_effect : float, default 1.0
        Number of labels that count as one, because the cells of a row are dependent.

    Returns
    -------
    MacroEstimate or None
        Value, Wilson's 95% interval for the number of labels divided by the design effect, or for
        the rows with a label if these are fewer, and the largest possible change by binning. None
        without cells of both kinds.

    Examples
    --------
    >>> targets = np.array([[1, 0], [0, 1]], np.int8)
    >>> scores = np.array([[0.75, 0.5], [0.25, 0.5]], np.float16)
    >>> counts = RankingCounts.from_arrays(targets, scores, ["cat", "dog"])
    >>> round(estimate_micro_average_precision(counts).value, 4)
    0.8333
    """
    pooled = _Pooled(*(part.sum(axis=0)[None] for part in (counts.positive, counts.negative)))
    found = compute_discrimination(pooled)
    value = float(found.average_precision[0])
    if np.isnan(value):
        return None
    labels = min(int(counts.positive.sum()) / design_effect, counts.positive_rows)
    low, high = wilson_interval(value * labels, labels)
    interval = min(low, value), max(high, value)
    return MacroEstimate(value, interval, float(found.average_precision_bound[0]))


def bound_design_effect(counts: RankingCounts) -> float:
    """Largest possible design effect: mean number of labels of the row of a label, at least 1."""
    return max(1.0, counts.positive_square_sum / max(int(counts.positive.sum()), 1))


def estimate_ranking_mean(counts: RankingCounts, position: int) -> tuple[float, Interval] | None:
    """Mean of a ranking metric over the complete rows, with its 95% interval.

    Parameters
    ----------
    counts : RankingCounts
        Counts of a run.
    position : int
        COVERAGE, PRECISION or LOSS of `ranking`.

    Returns
    -------
    tuple of (float, Interval) or None
        None without complete rows.
    """
    if not counts.complete:
        return None
    total, squares = counts.ranking_sums[position], counts.ranking_square_sums[position]
    worst = float(len(counts.classes)) if position == COVERAGE else 1.0
    low, high = nonnegative_mean_interval(float(total), float(squares), counts.complete, worst)
    return float(total / counts.complete), (low, min(high, worst))


def estimate_multilabel_brier(counts: RankingCounts) -> tuple[float, Interval] | None:
    """Brier score: mean squared distance of the score of a cell from its label, 0 or 1.

    Parameters
    ----------
    counts : RankingCounts
        Counts of a run.

    Returns
    -------
    tuple of (float, Interval) or None
        Mean over the known cells, in [0, 1]; None without any.

    Examples
    --------
    >>> counts = RankingCounts.from_arrays(
    ...     np.array([[1, 0]], np.int8), np.array([[0.5, 0.0]], np.float16), ["cat", "dog"]
    ... )
    >>> estimate_multilabel_brier(counts)[0]
    0.125
    """
    return _estimate_cell_mean(counts, BRIER)


def estimate_log_loss(counts: RankingCounts) -> tuple[float, Interval] | None:
    """Log loss: mean binary cross-entropy of the cells, in nats.

    Parameters
    ----------
    counts : RankingCounts
        Counts of a run.

    Returns
    -------
    tuple of (float, Interval) or None
        Mean over the known cells; None without any. A probability below `SCORE_FLOOR` counts as
        this; a float16 score of 0 or 1 as the limit of what is rounded to it.
    """
    return _estimate_cell_mean(counts, LOG_LOSS)


def _estimate_cell_mean(counts: RankingCounts, position: int) -> tuple[float, Interval] | None:
    """Mean of a loss over all known cells, and its interval for rows drawn at random."""
    rows, cells = counts.rows, counts.known_sum
    if not rows:
        return None
    loss = CELL_LOSSES[position]
    mean = float(counts.loss_sums[position] / cells)
    # residuals of the rows: their loss less that of as many mean cells
    squares = counts.loss_square_sums[position] - 2 * mean * counts.loss_known_sums[position]
    variance = max(float(squares) + mean**2 * counts.known_square_sum, 0.0) / cells**2
    square_total = (mean**2 + variance * rows) * rows
    # a row that was not seen: one of its cells has the worst loss
    worst = float(loss(np.zeros(1))[0])
    unseen = worst / len(counts.classes)
    low, high = nonnegative_mean_interval(mean * rows, square_total, rows, unseen)
    return mean, (low, min(high, worst))


@dataclass(frozen=True, eq=False)
class CalibrationBins:
    """Cells of each class in K equal-width bins of the score; all of shape (C, K).

    count: known cells
    score_sum: sum of their scores
    positive: cells with the label
    """

    count: Ints
    score_sum: Floats
    positive: Ints

    @property
    def errors(self) -> Floats:
        """(C,) expected calibration error of each class against the rest; NaN without cells."""
        total = self.count.sum(axis=1)
        gap = np.abs(self.score_sum - self.positive).sum(axis=1)
        return np.where(total > 0, gap / np.maximum(total, 1), np.nan)


def compute_calibration_bins(
    counts: RankingCounts, num_bins: int = NUM_CALIBRATION_BINS
) -> CalibrationBins:
    """Sum score bins to equal-width bins, as `calibration.bin_index` defines them.

    Parameters
    ----------
    counts : RankingCounts
        Counts of a run.
    num_bins : int, default 15
        Number of equal-width bins K.

    Returns
    -------
    CalibrationBins
        Exact if each score bin has one float16 value; otherwise its cells have its middle score.

    Examples
    --------
    >>> counts = RankingCounts.from_arrays(
    ...     np.array([[1], [0]], np.int8), np.array([[0.75], [0.75]], np.float16), ["cat"]
    ... )
    >>> compute_calibration_bins(counts, 2).count.tolist()
    [[0, 2]]
    >>> compute_calibration_bins(counts, 2).errors.tolist()
    [0.25]
    """
    scores = bin_values(counts.positive.shape[1])
    every = counts.positive + counts.negative
    cells = (every, every * scores, counts.positive)
    # scores increase, so each wide bin is a range of bins
    ends = np.searchsorted(bin_index(scores, num_bins), np.arange(num_bins + 1))
    parts = [
        np.stack([cell[:, a:b].sum(axis=1) for a, b in pairwise(ends)], axis=1) for cell in cells
    ]
    return CalibrationBins(*parts)


def estimate_calibration_error(
    counts: RankingCounts, *, design_effect: float = 1.0
) -> tuple[float, Interval] | None:
    """Expected calibration error of each class against the rest, averaged over classes.

    Parameters
    ----------
    counts : RankingCounts
        Counts of a run.
    design_effect : float, default 1.0
        Factor of the variance by which the cells of a row are dependent.

    Returns
    -------
    tuple of (float, Interval) or None
        Mean over the classes with a known cell. The lower end is reduced by the error that a
        calibrated model shows by chance. None without a known cell.

    Notes
    -----
    Nixon et al., "Measuring Calibration in Deep Learning" (2019): static calibration error.
    """
    bins = compute_calibration_bins(counts)
    known = np.flatnonzero(bins.count.sum(axis=1))
    if not len(known):
        return None
    errors = bins.errors[known]
    value = float(errors.mean())
    limits = [ece_limits(bins.count[c], bins.score_sum[c], bins.positive[c]) for c in known]
    chance = np.array([ece_by_chance(bins.count[c], bins.score_sum[c]) for c in known])
    low, high = np.array(limits).T
    weight = np.sqrt(design_effect) / len(known)
    below, above = mover_interval(value, weight * (errors - low - chance), weight * (high - errors))
    return value, (min(max(below - float(chance.mean()), 0.0), value), min(above, 1.0))
