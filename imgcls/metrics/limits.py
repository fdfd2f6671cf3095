"""Intervals of metrics that follow from Wilson limits: of a confusion matrix, of confidence bins.

They hold where a bootstrap has no width, because no row of some kind is wrong (or right). Each
share is moved to its own limits, and what that does to the metric is added up as in
`intervals.around`.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from imgcls.metrics.agreement import cohens_kappa
from imgcls.metrics.columns import Floats, Ints
from imgcls.metrics.intervals import mover_interval, wilson_interval, wilson_limits

Interval = tuple[float, float]


def confusion_intervals(
    support: Ints, predicted: Ints, hits: Ints, values: dict[str, float]
) -> dict[str, Interval]:
    """Intervals of the metrics of a confusion matrix, by name.

    support, predicted, hits: (C,) rows by label, by prediction, and right ones
    values: the metrics, as `tables` names them
    Recall and precision of a class have Wilson limits. Those of F1 are the Wilson limits of
    J = hits / (support + predicted - hits), with F1 = 2 J / (1 + J): Lam, Gopal, Qian, "Confidence
    Intervals for the F1 Score" (arXiv 2309.14621, 2023), the Wilson indirect method. Kappa moves
    with accuracy at the agreement by chance that was seen, as in Cohen (1960).
    """
    rows = int(support.sum())
    present, labelled = support + predicted > 0, support > 0
    share = support / rows
    recall, precision = wilson_limits(hits, support), wilson_limits(hits, predicted)
    union = wilson_limits(hits, support + predicted - hits)
    f1 = (2 * union[0] / (1 + union[0]), 2 * union[1] / (1 + union[1]))
    found = {
        "recall": hits / np.maximum(support, 1),
        "precision": hits / np.maximum(predicted, 1),
        "f1": 2 * hits / np.maximum(support + predicted, 1),
    }
    macro, balanced = present / present.sum(), labelled / labelled.sum()
    parts = {
        "balanced_accuracy": ("recall", recall, balanced),
        "precision_macro": ("precision", precision, macro),
        "recall_macro": ("recall", recall, macro),
        "f1_macro": ("f1", f1, macro),
        "precision_weighted": ("precision", precision, share),
        "f1_weighted": ("f1", f1, share),
    }
    made = {
        name: mover_interval(
            values[name], weight * (found[of] - limits[0]), weight * (limits[1] - found[of])
        )
        for name, (of, limits, weight) in parts.items()
    }
    accuracy = wilson_interval(int(hits.sum()), rows)
    made["f1_micro"] = accuracy
    made["matthews_correlation"] = _matthews_interval(
        support, predicted, hits, recall, values["matthews_correlation"]
    )
    if "cohens_kappa" in values:
        ends = [cohens_kappa(support, predicted, end * rows) for end in accuracy]
        made["cohens_kappa"] = (ends[0] or 0.0, ends[1] or 0.0)
    return made


def _matthews_interval(
    support: Ints, predicted: Ints, hits: Ints, recall: tuple[Floats, Floats], value: float
) -> Interval:
    """Each class's recall at its limits; rows that leave it go where predictions are.

    The whole range where it is undefined: with one class of labels, or of predictions.
    """
    rows = support.sum()
    if max(support.max(), predicted.max()) == rows:
        return -1.0, 1.0
    others = rows - predicted
    product, square = (support * predicted).sum(), (predicted.astype(float) ** 2).sum()
    moved = []
    for limit in recall:
        x = np.where(support > 0, hits - limit * support, 0.0)  # rows that are predicted elsewhere
        share = x / others
        products = product - support * x + (product - support * predicted) * share
        squares = (predicted - x) ** 2 + (square - predicted**2) * (1 + share) ** 2
        covariance = (hits.sum() - x) * rows - products
        spread = (rows**2 - squares) * (rows**2 - (support**2).sum())
        moved.append(covariance / np.sqrt(np.maximum(spread, 1e-9)))
    return mover_interval(
        value, np.maximum(value - moved[0], 0.0), np.maximum(moved[1] - value, 0.0)
    )


def calibration_intervals(
    count: Ints, confidence_sum: Floats, correct: Ints, by_chance: float, least_share: float = 0.01
) -> tuple[Interval, Interval]:
    """Intervals of the expected and the maximum calibration error.

    count, confidence_sum, correct: (B,) rows of each bin, their confidences added up, right ones
    by_chance: the expected error of a calibrated model on as many rows, by which the measured one
        is too high: it is taken from the lower end
    least_share: bins with a smaller share of all rows do not count for the maximum
    The accuracy of each bin goes to its Wilson limits. For the maximum they hold for all bins at
    once (Bonferroni).
    """
    used = count > 0
    count, correct = count[used], correct[used]
    mean = confidence_sum[used] / count
    share, gap = count / count.sum(), np.abs(mean - correct / count)
    least, most = _compute_gap_limits(mean, *wilson_limits(correct, count))
    low, high = mover_interval(
        float((share * gap).sum()), share * (gap - least), share * (most - gap)
    )
    counted = share >= least_share
    counted = counted if counted.any() else share > 0
    z = NormalDist().inv_cdf(1 - 0.025 / int(counted.sum()))
    least, most = _compute_gap_limits(
        mean[counted], *wilson_limits(correct[counted], count[counted], z)
    )
    return (low - by_chance, high), (float(least.max()), float(most.max()))


def _compute_gap_limits(mean: Floats, lower: Floats, upper: Floats) -> tuple[Floats, Floats]:
    """The least and the largest distance from each mean of an accuracy within its limits."""
    least = np.maximum(np.maximum(lower - mean, mean - upper), 0.0)
    return least, np.maximum(np.abs(mean - lower), np.abs(upper - mean))
