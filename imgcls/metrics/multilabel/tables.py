"""Tables of a multi-label run: classes, precision-recall curves, co-occurrence, calibration.

An undefined number is a null, never NaN.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from imgcls.metrics.calibration import bin_edges
from imgcls.metrics.columns import Bools, Floats, Ints
from imgcls.metrics.discrimination import compute_discrimination
from imgcls.metrics.multilabel.cooccurrence import CooccurrenceCounts
from imgcls.metrics.multilabel.counts import MultiLabelCounts
from imgcls.metrics.multilabel.ranking import RankingCounts
from imgcls.metrics.multilabel.ratios import compute_class_rates
from imgcls.metrics.multilabel.scores import NUM_CALIBRATION_BINS, compute_calibration_bins
from imgcls.metrics.score_bins import bin_lower_edges


def build_multilabel_per_class(
    counts: MultiLabelCounts, ranking: RankingCounts | None = None
) -> pa.Table:
    """Table of the classes of the bundle, in its order, including classes without labels.

    Parameters
    ----------
    counts : MultiLabelCounts
        Counts of a run.
    ranking : RankingCounts, optional
        Adds average_precision, auroc and ece; they are null without it.

    Returns
    -------
    pyarrow.Table
        Columns label (string); support (rows with the label), predicted (of all ok rows),
        true_positives, false_positives, false_negatives, true_negatives (int64); precision, recall
        and f1, each with its 95% Wilson limits in `*_lower` and `*_upper`; average_precision,
        auroc, prevalence (share of known cells with the label) and ece (float64). A rate whose
        denominator is 0 is null. All but `predicted` are null for a class without known cells.

    Examples
    --------
    >>> build_multilabel_per_class(MultiLabelCounts.empty(["cat", "dog"]))["predicted"].to_pylist()
    [0, 0]
    """
    known = counts.known > 0
    called = counts.true_positives + counts.false_positives
    defined = {
        "precision": called > 0,
        "recall": counts.support > 0,
        "f1": counts.support + called > 0,
    }
    columns = {
        "label": pa.array(counts.classes, pa.string()),
        "support": pa.array(counts.support, pa.int64(), mask=~known),
        "predicted": pa.array(counts.predicted_counts, pa.int64()),
    }
    for name in ("true_positives", "false_positives", "false_negatives", "true_negatives"):
        columns[name] = pa.array(getattr(counts, name), pa.int64(), mask=~known)
    for name, rate in compute_class_rates(counts).items():
        columns[name] = _float_column(rate.value, defined[name])
        columns[f"{name}_lower"] = _float_column(rate.lower, defined[name])
        columns[f"{name}_upper"] = _float_column(rate.upper, defined[name])
    nothing = np.full(len(known), np.nan)
    found = None if ranking is None else compute_discrimination(ranking)
    columns["average_precision"] = _nan_column(
        nothing if found is None else found.average_precision
    )
    columns["auroc"] = _nan_column(nothing if found is None else found.auroc)
    columns["prevalence"] = _float_column(counts.support / np.maximum(counts.known, 1), known)
    ece = nothing if ranking is None else compute_calibration_bins(ranking).errors
    columns["ece"] = _nan_column(ece)
    return pa.table(columns)


def build_pr_curves(ranking: RankingCounts, max_points: int = 200) -> pa.Table:
    """Table of the precision-recall curve of each class with labels.

    Parameters
    ----------
    ranking : RankingCounts
        Counts of a run.
    max_points : int, default 200
        Maximum number of points of a curve, at even steps of recall. The first and the last point
        are always included.

    Returns
    -------
    pyarrow.Table
        Columns label (string), threshold, precision, recall (float64), by class and decreasing
        threshold: of the rows whose score is at least the threshold, and of the rows with the
        label. Only thresholds at which the recall increases.

    Raises
    ------
    ValueError
        If `max_points` is below 2.

    Examples
    --------
    >>> targets = np.array([[1], [0], [1]], np.int8)
    >>> scores = np.array([[0.75], [0.5], [0.25]], np.float16)
    >>> curve = build_pr_curves(RankingCounts.from_arrays(targets, scores, ["cat"]))
    >>> curve["threshold"].to_pylist(), curve["recall"].to_pylist()
    ([0.75, 0.25], [0.5, 1.0])
    """
    if max_points < 2:
        raise ValueError(f"max_points is {max_points}; pass at least 2")
    edges = bin_lower_edges(ranking.positive.shape[1])[::-1]
    classes, points = [], []
    for position in np.flatnonzero(ranking.positive.any(axis=1)):
        own, rest = ranking.positive[position, ::-1], ranking.negative[position, ::-1]
        vertex = np.flatnonzero(own)
        hits, misses = own.cumsum()[vertex], rest.cumsum()[vertex]
        if len(vertex) > max_points:
            steps = np.linspace(hits[0], hits[-1], max_points)
            kept = np.unique(np.searchsorted(hits, steps))
            vertex, hits, misses = vertex[kept], hits[kept], misses[kept]
        points.append(np.stack([edges[vertex], hits / (hits + misses), hits / hits[-1]]))
        classes += [position] * len(vertex)
    values = np.concatenate(points, axis=1) if points else np.zeros((3, 0))
    names = pa.array(ranking.classes, pa.string()).take(pa.array(classes, pa.int64()))
    return pa.table(
        {"label": names, "threshold": values[0], "precision": values[1], "recall": values[2]}
    )


def build_cooccurrence_table(cooc: CooccurrenceCounts) -> pa.Table:
    """Table of the pairs of classes that occur in one row, without pairs of a class with itself.

    Parameters
    ----------
    cooc : CooccurrenceCounts
        Counts of a run.

    Returns
    -------
    pyarrow.Table
        Columns label, other (string), together (int64; rows with both labels), share (float64; of
        the rows with `label`), predicted (int64; rows with `label` that are predicted to have
        `other`), predicted_share (float64), in order of the classes. Pairs that never occur are
        left out.

    Examples
    --------
    >>> targets = np.array([[1, 1], [1, 0]], np.int8)
    >>> cooc = CooccurrenceCounts.from_arrays(targets, targets > 0, ["cat", "dog"])
    >>> build_cooccurrence_table(cooc)["share"].to_pylist()
    [0.5, 1.0]
    """
    occurs = (cooc.together > 0) | (cooc.predicted > 0)
    np.fill_diagonal(occurs, False)
    first, second = np.nonzero(occurs)
    support = cooc.known[first, second]
    together, predicted = cooc.together[first, second], cooc.predicted[first, second]
    names = pa.array(cooc.classes, pa.string())
    return pa.table(
        {
            "label": names.take(pa.array(first, pa.int64())),
            "other": names.take(pa.array(second, pa.int64())),
            "together": pa.array(together, pa.int64()),
            "share": pa.array(together / support, pa.float64()),
            "predicted": pa.array(predicted, pa.int64()),
            "predicted_share": pa.array(predicted / support, pa.float64()),
        }
    )


def build_calibration_table(
    ranking: RankingCounts, num_bins: int = NUM_CALIBRATION_BINS
) -> pa.Table:
    """Table of the score bins [bin_lower, bin_upper) of each class, the last one closed.

    Parameters
    ----------
    ranking : RankingCounts
        Counts of a run.
    num_bins : int, default 15
        Number of equal-width bins.

    Returns
    -------
    pyarrow.Table
        Columns label (string), bin_lower, bin_upper (float64), count (int64; known cells),
        mean_score and positive_share (float64; null in an empty bin). A calibrated model has a
        share of positives close to its mean score.

    Examples
    --------
    >>> build_calibration_table(RankingCounts.empty(["cat"]), 2)["bin_upper"].to_pylist()
    [0.5, 1.0]
    """
    bins, edges = compute_calibration_bins(ranking, num_bins), bin_edges(num_bins)
    count, size = bins.count.ravel(), len(ranking.classes)
    filled = np.maximum(count, 1)
    return pa.table(
        {
            "label": pa.array(np.repeat(np.array(ranking.classes, object), num_bins), pa.string()),
            "bin_lower": np.tile(edges[:-1], size),
            "bin_upper": np.tile(edges[1:], size),
            "count": pa.array(count, pa.int64()),
            "mean_score": _float_column(bins.score_sum.ravel() / filled, count > 0),
            "positive_share": _float_column(bins.positive.ravel() / filled, count > 0),
        }
    )


def _float_column(values: Floats | Ints, defined: Bools) -> pa.Array:
    return pa.array(values, pa.float64(), mask=~defined)


def _nan_column(values: Floats) -> pa.Array:
    return _float_column(values, ~np.isnan(values))
