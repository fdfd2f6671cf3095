"""Turn counts into the metric tables of a run: summary, classes, confusion, calibration.

Every function takes one `PredictionCounts` and returns a pyarrow table whose schema never depends
on the data. What is undefined is an absent row or a null, never a NaN; the definitions are those of
scikit-learn, named where they leave a choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from imgcls.metrics import limits
from imgcls.metrics.agreement import cohens_kappa, matthews_correlation
from imgcls.metrics.calibration import bin_edges, ece_by_chance, ece_from_bins, mce_from_bins
from imgcls.metrics.columns import Bools, Floats, Ints
from imgcls.metrics.counts import CORRECT, MAX_RANK, SCORE_FLOOR, WRONG, PredictionCounts
from imgcls.metrics.intervals import (
    bootstrap_intervals,
    nonnegative_mean_interval,
    union_interval,
    wilson_interval,
)

_SUMMARY_SCHEMA = pa.schema(
    [
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("lower", pa.float64()),
        ("upper", pa.float64()),
        ("description", pa.string()),
    ]
)
# How a summary prints: these are numbers of rows, log loss is in nats, the rest are fractions.
_ROW_COUNTS = frozenset({"rows", "ok", "labelled", "unlabelled", "unknown_label"})
_NATS = frozenset({"log_loss"})
# In [-1, 1] or [0, 2]: neither a share nor a number of rows.
_PLAIN = frozenset({"matthews_correlation", "cohens_kappa", "brier_score"})

Interval = tuple[float, float]


@dataclass(frozen=True)
class Metric:
    """A number of a run. interval: where the true one lies, at 95 %."""

    name: str
    value: float
    description: str
    interval: Interval | None = None


def compute_metrics(counts: PredictionCounts, *, top_k: int, resamples: int = 200) -> list[Metric]:
    """Every number that follows from the counts.

    top_k:     adds top_{k}_accuracy when above 1
    resamples: of the bootstrap, for the intervals that need one; 0 leaves those out
    Rates are fractions in [0, 1]; log_loss is in nats. A metric without any row to judge is left
    out, so an unlabelled run has no accuracy rather than a NaN. precision_macro, recall_macro and
    f1_macro average over the classes that occur among labelled rows as label or as prediction,
    balanced_accuracy over those that occur as label, the weighted ones by label frequency: as
    scikit-learn does with labels=(those classes) and zero_division=0. Intervals are 95 % ones:
    Wilson's for shares of rows, `nonnegative_mean_interval` for log_loss, else that of Poisson
    bootstrap resamples joined with the one of `limits`, which has a width also where all is right.
    Raises ValueError when top_k is not in 1..20, the depth that counts keep.
    """
    if not 1 <= top_k <= MAX_RANK:
        raise ValueError(f"top_k is {top_k}; counts know the rank of a label from 1 to {MAX_RANK}")
    return [
        *_compute_row_metrics(counts),
        *_compute_label_metrics(counts, top_k, resamples),
        *_compute_confidence_metrics(counts),
    ]


def compute_summary(counts: PredictionCounts, *, top_k: int) -> pa.Table:
    """`metrics` as a table, as `as_table` makes it."""
    return build_summary_table(compute_metrics(counts, top_k=top_k))


def build_summary_table(found: Sequence[Metric]) -> pa.Table:
    """One row per metric: metric, description (string), value, lower, upper (float64).

    lower and upper are the ends of the 95 % interval, null where there is none.
    """
    rows = [
        {
            "metric": metric.name,
            "value": float(metric.value),
            "lower": metric.interval and metric.interval[0],
            "upper": metric.interval and metric.interval[1],
            "description": metric.description,
        }
        for metric in found
    ]
    return pa.Table.from_pylist(rows, schema=_SUMMARY_SCHEMA)


def build_per_class(counts: PredictionCounts) -> pa.Table:
    """One row per class of the bundle, in its order, absent classes included.

    label (string); support, predicted, true_positive (int64); precision, recall, f1, share,
    mean_confidence (float64). `predicted`, `share` (of ok rows) and `mean_confidence` speak of
    every ok row; support, true_positive, precision, recall and f1 of labelled rows alone, and are
    null in a run without any. A rate whose denominator is 0 is null.
    """
    support, predicted, hits = count_labels(counts)
    judged = counts.labeled > 0
    return pa.table(
        {
            "label": pa.array(counts.classes, pa.string()),
            "support": _int_column(support, judged),
            "predicted": _int_column(counts.predicted_counts, True),
            "true_positive": _int_column(hits, judged),
            "precision": _ratio_column(hits, predicted),
            "recall": _ratio_column(hits, support),
            "f1": _ratio_column(2 * hits, support + predicted),
            "share": _ratio_column(
                counts.predicted_counts, np.full_like(counts.predicted_counts, counts.ok)
            ),
            "mean_confidence": _ratio_column(counts.predicted_confidence, counts.predicted_counts),
        }
    )


def build_confusion(counts: PredictionCounts) -> pa.Table:
    """The non-zero cells of the confusion matrix over labelled rows, right predictions included.

    label, predicted_label (string), count (int64), sorted by count descending, then by names.
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
    """One row per confidence bin: [bin_lower, bin_upper), the last one closed.

    bin_lower, bin_upper (float64), count (int64), mean_confidence, accuracy (float64, null in an
    empty bin). Speaks of the labelled rows when there are any, so that mean_confidence and accuracy
    judge the same rows; otherwise of every ok row, with accuracy null: their confidence histogram.
    """
    judged = counts.labeled > 0
    shown = [CORRECT, WRONG] if judged else slice(None)
    count = counts.bin_counts[shown].sum(axis=0)
    edges = bin_edges(counts.num_bins)
    return pa.table(
        {
            "bin_lower": edges[:-1],
            "bin_upper": edges[1:],
            "count": _int_column(count, True),
            "mean_confidence": _ratio_column(counts.bin_confidence[shown].sum(axis=0), count),
            "accuracy": _ratio_column(counts.bin_counts[CORRECT], count if judged else count * 0),
        }
    )


def format_summary(table: pa.Table) -> str:
    """A summary as fixed-width text: fractions as 97.22 %, row counts as 1,234, losses as 0.1234.

    table: as from `summary`. Returns lines without a trailing newline.
    """
    rows = [
        (
            row["metric"],
            format_value(row["metric"], row["value"]),
            _format_row_interval(row),
            row["description"],
        )
        for row in table.to_pylist()
    ]
    names, values, intervals = (
        max((len(row[column]) for row in rows), default=0) for column in range(3)
    )
    return "\n".join(
        f"{name:<{names}}  {value:>{values}}  {interval:<{intervals}}  {description}".rstrip()
        for name, value, interval, description in rows
    )


def _compute_row_metrics(counts: PredictionCounts) -> Iterator[Metric]:
    yield Metric("rows", counts.rows, "rows of the manifest")
    yield Metric("ok", counts.ok, "rows with a prediction")
    for name, rows in sorted(counts.status.items()):
        if name != "ok":
            yield Metric(f"status_{name}", rows, f"rows with status {name}")
    if counts.rows:
        yield _make_share(
            "error_rate", counts.error_rows, counts.rows, "share of rows without a prediction"
        )
    yield Metric("labelled", counts.labeled, "ok rows whose label is one of the classes")
    if counts.unlabeled:
        yield Metric("unlabelled", counts.unlabeled, "ok rows without a label")
    if counts.unknown_label:
        what = "ok rows with a label that is no class"
        yield Metric("unknown_label", counts.unknown_label, what)


def _compute_label_metrics(
    counts: PredictionCounts, top_k: int, resamples: int
) -> Iterator[Metric]:
    if not counts.labeled:
        return
    yield _make_share("accuracy", counts.correct, counts.labeled, "labelled rows predicted right")
    ranked = int(counts.rank_counts.sum())
    if top_k > 1 and ranked:
        within = int(counts.rank_counts[:top_k].sum())
        yield _make_share(
            f"top_{top_k}_accuracy", within, ranked, f"label among the {top_k} best scores"
        )
    found = _compute_confusion_metrics(counts, counts.confusion_count)
    drawn = bootstrap_intervals(
        [counts.confusion_count],
        lambda cells: _compute_confusion_metrics(counts, cells),
        resamples=resamples,
    )
    edges = limits.confusion_intervals(*count_labels(counts), found)
    for name, description in _OF_CONFUSION.items():
        if name in found:
            # f1_micro is a share of rows, like accuracy
            inner = drawn.get(name) if name != "f1_micro" else edges[name]
            interval = union_interval(
                inner, edges[name], low=-1.0 if name in _PLAIN else 0.0, high=1.0
            )
            yield Metric(name, found[name], description, interval)
    if counts.log_loss_rows:
        rows, total = counts.log_loss_rows, counts.log_loss_sum
        interval = nonnegative_mean_interval(
            total, counts.log_loss_square_sum, rows, _estimate_mistake_loss(counts)
        )
        what = "mean -log of the label's score, in nats"
        yield Metric("log_loss", total / rows, what, interval)
    found = _compute_bin_metrics(counts, counts.bin_counts)
    drawn = bootstrap_intervals(
        [counts.bin_counts], lambda cells: _compute_bin_metrics(counts, cells), resamples=resamples
    )
    judged = [CORRECT, WRONG]
    count = counts.bin_counts[judged].sum(axis=0)
    confidence = counts.bin_confidence[judged].sum(axis=0)
    chance = ece_by_chance(count=count, confidence_sum=confidence)
    both = limits.calibration_intervals(count, confidence, counts.bin_counts[CORRECT], chance)
    for (name, description), edge in zip(_OF_BINS.items(), both, strict=True):
        interval = union_interval(drawn.get(name), edge, low=0.0, high=1.0)
        yield Metric(name, found[name], description, interval)
    yield Metric("ece_by_chance", chance, "of a calibrated model on as many rows")


def _estimate_mistake_loss(counts: PredictionCounts) -> float:
    """Log loss, in nats, of a wrong row of the mean confidence, the rest shared by other classes.

    What log loss may have missed where no row is wrong.
    """
    judged = [CORRECT, WRONG]
    mean = counts.bin_confidence[judged].sum() / counts.bin_counts[judged].sum()
    rest = (1 - mean) / max(1, len(counts.classes) - 1)
    return float(-np.log(np.clip(rest, SCORE_FLOOR, 1.0)))


_OF_CONFUSION = {
    "balanced_accuracy": "mean recall of classes with labels",
    "precision_macro": "mean precision of occurring classes",
    "recall_macro": "mean recall of occurring classes",
    "f1_macro": "mean F1 of occurring classes",
    "f1_micro": "equals accuracy: each row has one label",
    "precision_weighted": "mean precision by class frequency",
    "f1_weighted": "mean F1 by class frequency",
    "matthews_correlation": "label with prediction, from -1 to 1",
    "cohens_kappa": "agreement beyond chance, at most 1",
}


def _compute_confusion_metrics(counts: PredictionCounts, cells: Ints) -> dict[str, float]:
    """What follows from the confusion matrix; cells: (K,) how often each of its cells occurs."""
    support, predicted, hits = count_labels(counts, cells)
    if not support.sum():
        return {}
    present = support + predicted > 0
    recall = hits / np.maximum(support, 1)
    precision = hits / np.maximum(predicted, 1)
    f1 = 2 * hits / np.maximum(support + predicted, 1)
    share = support / support.sum()
    found = {
        "balanced_accuracy": recall[support > 0].mean(),
        "precision_macro": precision[present].mean(),
        "recall_macro": recall[present].mean(),
        "f1_macro": f1[present].mean(),
        "f1_micro": hits.sum() / support.sum(),
        "precision_weighted": (precision * share).sum(),
        "f1_weighted": (f1 * share).sum(),
        "matthews_correlation": matthews_correlation(support, predicted, hits.sum()),
    }
    kappa = cohens_kappa(support, predicted, hits.sum())
    return found if kappa is None else found | {"cohens_kappa": kappa}


_OF_BINS = {
    "expected_calibration_error": "mean gap between confidence and accuracy",
    "maximum_calibration_error": "largest gap of a bin of 1 % or more",
}


def _compute_bin_metrics(counts: PredictionCounts, cells: Ints) -> dict[str, float]:
    """Calibration errors; cells: (3, B) rows by outcome and bin, each at its mean confidence."""
    mean = counts.bin_confidence / np.maximum(counts.bin_counts, 1)
    judged = cells[[CORRECT, WRONG]]
    if not judged.sum():
        return {}
    bins = {
        "count": judged.sum(axis=0),
        "confidence_sum": (mean * cells)[[CORRECT, WRONG]].sum(axis=0),
        "correct": cells[CORRECT],
    }
    return {
        "expected_calibration_error": ece_from_bins(**bins),
        "maximum_calibration_error": mce_from_bins(**bins),
    }


def _compute_confidence_metrics(counts: PredictionCounts) -> Iterator[Metric]:
    if counts.ok:
        mean = counts.bin_confidence.sum() / counts.ok
        yield Metric("mean_confidence", mean, "mean confidence of all predictions")
        what = "predictions accepted by the threshold"
        yield _make_share("coverage", counts.accepted, counts.ok, what)
    if counts.accepted_labeled:
        what = "accepted labelled rows predicted right"
        yield _make_share(
            "accepted_accuracy", counts.accepted_correct, counts.accepted_labeled, what
        )


def _make_share(name: str, part: int, whole: int, description: str) -> Metric:
    return Metric(name, part / whole, description, wilson_interval(part, whole))


def count_labels(counts: PredictionCounts, cells: Ints | None = None) -> tuple[Ints, Ints, Ints]:
    """Support, predictions and true positives per class, each (C,), over labelled rows.

    cells: (K,) how often each cell of the confusion matrix occurs; as counted when not given
    Exact up to 2**53 rows.
    """
    cells, size = counts.confusion_count if cells is None else cells, len(counts.classes)
    label, predicted = counts.confusion_label, counts.confusion_predicted
    hit = label == predicted
    return (
        np.bincount(label, cells, size).astype(np.int64),
        np.bincount(predicted, cells, size).astype(np.int64),
        np.bincount(label[hit], cells[hit], size).astype(np.int64),
    )


def _int_column(values: Ints, known: bool) -> pa.Array:
    return pa.array(values, pa.int64()) if known else pa.nulls(len(values), pa.int64())


def _ratio_column(numerator: Ints | Floats, denominator: Ints) -> pa.Array:
    undefined: Bools = denominator == 0
    return pa.array(numerator / np.maximum(denominator, 1), pa.float64(), mask=undefined)


def format_value(metric: str, value: float) -> str:
    """A metric's value as people read it: 97.22 %, 1,234 rows, 0.1234 nats."""
    if metric in _ROW_COUNTS or metric.startswith("status_"):
        return f"{value:,.0f}"
    if metric in _NATS or metric in _PLAIN:
        return f"{value:.4f}"
    return f"{100 * value:.2f} %"


def format_interval(metric: str, interval: Interval | None) -> str:
    """`97.0 to 97.4`, in the metric's own unit; empty for none."""
    if interval is None:
        return ""
    low, high = (format_value(metric, end).removesuffix(" %") for end in interval)
    return f"{low} to {high}"


def _format_row_interval(row: Mapping[str, Any]) -> str:
    known = row["lower"] is not None
    text = format_interval(row["metric"], (row["lower"], row["upper"]) if known else None)
    return text and f"({text})"
