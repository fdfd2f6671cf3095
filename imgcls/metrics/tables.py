"""Metric tables of a run: summary, classes, confusion matrix, calibration.

Every function takes one `PredictionCounts` and returns a pyarrow table with a fixed schema. An
undefined number is an absent row or a null, never NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from imgcls.metrics.calibration import bin_edges
from imgcls.metrics.columns import Bools, Floats, Ints
from imgcls.metrics.confusion import ClassCounts
from imgcls.metrics.counts import CORRECT, MAX_RANK, WRONG, PredictionCounts
from imgcls.metrics.discrimination import ScoreCounts
from imgcls.metrics.formatting import format_interval, format_value
from imgcls.metrics.intervals import Interval, bootstrap_intervals, union_interval
from imgcls.metrics.label_sets import SetCounts
from imgcls.metrics.registry import (
    METRICS,
    STATUS_PREFIX,
    Estimate,
    FromBins,
    FromConfusion,
    FromStatistics,
    Statistics,
)
from imgcls.metrics.selective import SelectiveCounts

_SUMMARY_SCHEMA = pa.schema(
    [
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("lower", pa.float64()),
        ("upper", pa.float64()),
        ("description", pa.string()),
    ]
)


@dataclass(frozen=True)
class Metric:
    """A number of a run.

    Attributes
    ----------
    name : str
        Name in output files.
    value : float
        Fraction, number of rows, nats or score (see `registry.find_unit`).
    description : str
        Short definition.
    interval : tuple of float or None
        95% interval.

    Examples
    --------
    >>> str(Metric("accuracy", 0.97224, "labeled rows predicted correctly", (0.9612, 0.9812)))
    'accuracy 97.22% (96.12 to 98.12)'
    """

    name: str
    value: float
    description: str
    interval: Interval | None = None

    def __str__(self) -> str:
        interval = format_interval(self.name, self.interval)
        return f"{self.name} {format_value(self.name, self.value)}" + (
            interval and f" ({interval})"
        )


def compute_metrics(
    counts: PredictionCounts,
    *,
    top_k: int,
    selective: SelectiveCounts | None = None,
    scores: ScoreCounts | None = None,
    sets: SetCounts | None = None,
    resamples: int = 200,
) -> list[Metric]:
    """Compute every metric of the registry that the counts define.

    Parameters
    ----------
    counts : PredictionCounts
        Counts of a run. A metric without any row is left out: an unlabeled run has no accuracy.
    top_k : int
        Adds top_{k}_accuracy if above 1.
    selective : SelectiveCounts, optional
        Adds area_under_risk_coverage.
    scores : ScoreCounts, optional
        Adds brier_score, auroc_macro and average_precision_macro.
    sets : SetCounts, optional
        Adds set_coverage, mean_set_size and single_label_sets.
    resamples : int, default 200
        Bootstrap resamples; 0 leaves out the intervals that need a bootstrap.

    Returns
    -------
    list of Metric
        In the order of the registry. Rates are fractions in [0, 1], log_loss is in nats. Intervals
        are 95% ones: Wilson's for shares of rows, `nonnegative_mean_interval` for log_loss, for the
        others bootstrap intervals united with those of `limits`.

    Raises
    ------
    ValueError
        If `top_k` is not in 1..20, the ranks that counts keep.

    Examples
    --------
    >>> [metric.name for metric in compute_metrics(PredictionCounts.empty(["cat"]), top_k=1)]
    ['rows', 'ok', 'labelled']
    """
    if not 1 <= top_k <= MAX_RANK:
        raise ValueError(f"top_k is {top_k}; counts keep the rank of a label from 1 to {MAX_RANK}")
    estimates = _estimate_metrics(Statistics(counts, top_k, selective, scores, sets), resamples)
    found = []
    for spec in METRICS:
        estimate = estimates.get(spec.name)
        if estimate is not None:
            description = spec.description.format(k=top_k) + estimate.note
            name = spec.name.format(k=top_k)
            found.append(Metric(name, estimate.value, description, estimate.interval))
        if spec.name == "ok":
            found += _compute_status_metrics(counts)
    return found


def _estimate_metrics(statistics: Statistics, resamples: int) -> dict[str, Estimate]:
    """Estimates by name in the registry; undefined metrics are left out."""
    counts, found = statistics.counts, {}
    if counts.labeled:
        found = _estimate_from_confusion(counts, resamples)
        found |= _estimate_from_bins(counts, resamples)
    for spec in METRICS:
        if isinstance(spec.source, FromStatistics):
            estimate = spec.source.compute(statistics)
            if estimate is not None:
                found[spec.name] = estimate
    return found


def _compute_status_metrics(counts: PredictionCounts) -> Iterator[Metric]:
    for name, rows in sorted(counts.status.items()):
        if name != "ok":
            yield Metric(STATUS_PREFIX + name, rows, f"rows with status {name}")


def _estimate_from_confusion(counts: PredictionCounts, resamples: int) -> dict[str, Estimate]:
    """Metrics of the confusion matrix, with one bootstrap for all."""
    sources = {s.name: s.source for s in METRICS if isinstance(s.source, FromConfusion)}

    def compute(cells: Ints) -> dict[str, float]:
        classes = ClassCounts.from_counts(counts, cells)
        if not classes.rows:
            return {}
        values = {name: source.compute(classes) for name, source in sources.items()}
        return {name: value for name, value in values.items() if value is not None}

    classes = ClassCounts.from_counts(counts)
    drawn = bootstrap_intervals([counts.confusion_count], compute, resamples=resamples)
    found = {}
    for name, value in compute(counts.confusion_count).items():
        source = sources[name]
        interval = None
        if name in drawn:
            edge = source.compute_limits(classes, value) if source.compute_limits else None
            interval = union_interval(drawn[name], edge, low=source.low, high=1.0)
        found[name] = Estimate(value, interval)
    return found


def _estimate_from_bins(counts: PredictionCounts, resamples: int) -> dict[str, Estimate]:
    """Metrics of the confidence bins, with one bootstrap for all.

    A resampled row has the mean confidence of its bin and outcome.
    """
    sources = {s.name: s.source for s in METRICS if isinstance(s.source, FromBins)}
    labeled = [CORRECT, WRONG]
    mean = counts.bin_confidence / np.maximum(counts.bin_counts, 1)

    def compute(cells: Ints) -> dict[str, float]:
        count = cells[labeled].sum(axis=0)
        if not count.sum():
            return {}
        confidence = (mean * cells)[labeled].sum(axis=0)
        return {name: s.compute(count, confidence, cells[CORRECT]) for name, s in sources.items()}

    count = counts.bin_counts[labeled].sum(axis=0)
    confidence = counts.bin_confidence[labeled].sum(axis=0)
    drawn = bootstrap_intervals([counts.bin_counts], compute, resamples=resamples)
    found = {}
    for name, value in compute(counts.bin_counts).items():
        interval = None
        if name in drawn:
            edge = sources[name].compute_limits(count, confidence, counts.bin_counts[CORRECT])
            interval = union_interval(drawn[name], edge, low=0.0, high=1.0)
        found[name] = Estimate(value, interval)
    return found


def compute_summary(counts: PredictionCounts, *, top_k: int) -> pa.Table:
    """Metrics of a run as a table.

    Parameters
    ----------
    counts : PredictionCounts
        Counts of a run.
    top_k : int
        As for `compute_metrics`.

    Returns
    -------
    pyarrow.Table
        As `build_summary_table` returns it.

    Raises
    ------
    ValueError
        If `top_k` is not in 1..20.

    Examples
    --------
    >>> compute_summary(PredictionCounts.empty(["cat"]), top_k=1)["value"].to_pylist()
    [0.0, 0.0, 0.0]
    """
    return build_summary_table(compute_metrics(counts, top_k=top_k))


def build_summary_table(metrics: Sequence[Metric]) -> pa.Table:
    """Table of metrics, as in `summary.parquet`.

    Parameters
    ----------
    metrics : sequence of Metric
        Metrics, in order.

    Returns
    -------
    pyarrow.Table
        One row per metric: metric, description (string), value, lower, upper (float64; the ends of
        the 95% interval, null without one).

    Examples
    --------
    >>> build_summary_table([Metric("rows", 3, "rows of the manifest")])["lower"].to_pylist()
    [None]
    """
    rows = [
        {
            "metric": metric.name,
            "value": float(metric.value),
            "lower": metric.interval and metric.interval[0],
            "upper": metric.interval and metric.interval[1],
            "description": metric.description,
        }
        for metric in metrics
    ]
    return pa.Table.from_pylist(rows, schema=_SUMMARY_SCHEMA)


def build_per_class(counts: PredictionCounts) -> pa.Table:
    """Table of the classes of the bundle, in its order, including classes without rows.

    Parameters
    ----------
    counts : PredictionCounts
        Counts of a run.

    Returns
    -------
    pyarrow.Table
        Columns label (string); support, predicted, true_positive (int64); precision, recall, f1,
        share, mean_confidence (float64). `predicted`, `share` (of ok rows) and `mean_confidence`
        describe all ok rows; the others describe labeled rows and are null in a run without labels.
        A rate whose denominator is 0 is null.

    Examples
    --------
    >>> build_per_class(PredictionCounts.empty(["cat", "dog"]))["predicted"].to_pylist()
    [0, 0]
    """
    classes = ClassCounts.from_counts(counts)
    support, correct = classes.support, classes.correct
    has_labels = counts.labeled > 0
    return pa.table(
        {
            "label": pa.array(counts.classes, pa.string()),
            "support": _int_column(support, has_labels),
            "predicted": _int_column(counts.predicted_counts, True),
            "true_positive": _int_column(correct, has_labels),
            "precision": _ratio_column(correct, classes.predicted),
            "recall": _ratio_column(correct, support),
            "f1": _ratio_column(2 * correct, support + classes.predicted),
            "share": _ratio_column(
                counts.predicted_counts, np.full_like(counts.predicted_counts, counts.ok)
            ),
            "mean_confidence": _ratio_column(counts.predicted_confidence, counts.predicted_counts),
        }
    )


def build_confusion(counts: PredictionCounts) -> pa.Table:
    """Table of the non-zero cells of the confusion matrix of the labeled rows.

    Parameters
    ----------
    counts : PredictionCounts
        Counts of a run.

    Returns
    -------
    pyarrow.Table
        Columns label, predicted_label (string), count (int64), in order of decreasing count, then
        of the names. The diagonal (correct predictions) is included.

    Examples
    --------
    >>> build_confusion(PredictionCounts.empty(["cat", "dog"])).num_rows
    0
    """
    names = pa.array(counts.classes, pa.string())
    cells = pa.table(
        {
            "label": names.take(pa.array(counts.confusion_label)),
            "predicted_label": names.take(pa.array(counts.confusion_predicted)),
            "count": pa.array(counts.confusion_count, pa.int64()),
        }
    )
    return cells.sort_by(
        [("count", "descending"), ("label", "ascending"), ("predicted_label", "ascending")]
    )


def build_calibration(counts: PredictionCounts) -> pa.Table:
    """Table of the confidence bins [bin_lower, bin_upper), the last one closed.

    Parameters
    ----------
    counts : PredictionCounts
        Counts of a run.

    Returns
    -------
    pyarrow.Table
        Columns bin_lower, bin_upper (float64), count (int64), mean_confidence, accuracy (float64,
        null in an empty bin). Describes the labeled rows if there are any; otherwise all ok rows,
        with accuracy null: their confidence histogram.

    Examples
    --------
    >>> build_calibration(PredictionCounts.empty(["cat"], num_bins=2))["bin_upper"].to_pylist()
    [0.5, 1.0]
    """
    has_labels = counts.labeled > 0
    shown = [CORRECT, WRONG] if has_labels else slice(None)
    count = counts.bin_counts[shown].sum(axis=0)
    edges = bin_edges(counts.num_bins)
    denominator = count if has_labels else count * 0
    return pa.table(
        {
            "bin_lower": edges[:-1],
            "bin_upper": edges[1:],
            "count": _int_column(count, True),
            "mean_confidence": _ratio_column(counts.bin_confidence[shown].sum(axis=0), count),
            "accuracy": _ratio_column(counts.bin_counts[CORRECT], denominator),
        }
    )


def _int_column(values: Ints, is_known: bool) -> pa.Array:
    return pa.array(values, pa.int64()) if is_known else pa.nulls(len(values), pa.int64())


def _ratio_column(numerator: Ints | Floats, denominator: Ints) -> pa.Array:
    undefined: Bools = denominator == 0
    return pa.array(numerator / np.maximum(denominator, 1), pa.float64(), mask=undefined)
