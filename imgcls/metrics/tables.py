"""Turn counts into the metric tables of a run: summary, classes, confusion, calibration.

Every function takes one `PredictionCounts` and returns a pyarrow table whose schema never depends
on the data. What is undefined is an absent row or a null, never a NaN; the definitions are those of
scikit-learn, named where they leave a choice.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from imgcls.metrics.calibration import bin_edges, ece_from_bins
from imgcls.metrics.columns import Bools, Floats, Ints
from imgcls.metrics.counts import CORRECT, MAX_RANK, WRONG, PredictionCounts

_SUMMARY = pa.schema(
    [("metric", pa.string()), ("value", pa.float64()), ("description", pa.string())]
)
# How a summary prints: these are numbers of rows, log loss is in nats, the rest are fractions.
_ROW_COUNTS = frozenset({"rows", "ok", "labelled", "unlabelled", "unknown_label"})
_NATS = frozenset({"log_loss"})

Metric = tuple[str, float, str]


def summary(counts: PredictionCounts, *, top_k: int) -> pa.Table:
    """One row per metric: metric (string), value (float64), description (string).

    top_k: adds top_{k}_accuracy when above 1
    Rates are fractions in [0, 1]; log_loss is in nats. A metric without any row to judge is left
    out, so an unlabelled run has no accuracy rather than a NaN. precision_macro, recall_macro and
    f1_macro average over the classes that occur among labelled rows as label or as prediction,
    balanced_accuracy over those that occur as label, f1_weighted by label frequency: as
    scikit-learn does with labels=(those classes) and zero_division=0.
    Raises ValueError when top_k is not in 1..20, the depth that counts keep.
    """
    if not 1 <= top_k <= MAX_RANK:
        raise ValueError(f"top_k is {top_k}; counts know the rank of a label from 1 to {MAX_RANK}")
    metrics = [*_row_metrics(counts), *_label_metrics(counts, top_k), *_confidence_metrics(counts)]
    names, values, descriptions = zip(*metrics, strict=True)
    return pa.table([names, [float(value) for value in values], descriptions], schema=_SUMMARY)


def per_class(counts: PredictionCounts) -> pa.Table:
    """One row per class of the bundle, in its order, absent classes included.

    label (string); support, predicted, true_positive (int64); precision, recall, f1, share,
    mean_confidence (float64). `predicted`, `share` (of ok rows) and `mean_confidence` speak of
    every ok row; support, true_positive, precision, recall and f1 of labelled rows alone, and are
    null in a run without any. A rate whose denominator is 0 is null.
    """
    support, predicted, hits = _label_counts(counts)
    judged = counts.labelled > 0
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


def confusion(counts: PredictionCounts) -> pa.Table:
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


def calibration(counts: PredictionCounts) -> pa.Table:
    """One row per confidence bin: [bin_lower, bin_upper), the last one closed.

    bin_lower, bin_upper (float64), count (int64), mean_confidence, accuracy (float64, null in an
    empty bin). Speaks of the labelled rows when there are any, so that mean_confidence and accuracy
    judge the same rows; otherwise of every ok row, with accuracy null: their confidence histogram.
    """
    judged = counts.labelled > 0
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
        (row["metric"], _format_value(row["metric"], row["value"]), row["description"])
        for row in table.to_pylist()
    ]
    name_width = max((len(name) for name, _, _ in rows), default=0)
    value_width = max((len(value) for _, value, _ in rows), default=0)
    return "\n".join(
        f"{name:<{name_width}}  {value:>{value_width}}  {description}".rstrip()
        for name, value, description in rows
    )


def _row_metrics(counts: PredictionCounts) -> Iterator[Metric]:
    yield "rows", counts.rows, "rows of the manifest"
    yield "ok", counts.ok, "rows with a prediction"
    for name, rows in sorted(counts.status.items()):
        yield f"status_{name}", rows, f"rows with status {name}"
    if counts.rows:
        yield "error_rate", counts.error_rows / counts.rows, "share of rows without a prediction"
    yield "labelled", counts.labelled, "ok rows whose label is one of the classes"
    if counts.unlabelled:
        yield "unlabelled", counts.unlabelled, "ok rows without a label"
    if counts.unknown_label:
        yield "unknown_label", counts.unknown_label, "ok rows whose label is not one of the classes"


def _label_metrics(counts: PredictionCounts, top_k: int) -> Iterator[Metric]:
    if not counts.labelled:
        return
    support, predicted, hits = _label_counts(counts)
    present = support + predicted > 0
    recall = hits / np.maximum(support, 1)
    precision = hits / np.maximum(predicted, 1)
    f1 = 2 * hits / np.maximum(support + predicted, 1)
    yield "accuracy", counts.correct / counts.labelled, "labelled rows predicted right"
    ranked = counts.rank_counts.sum()
    if top_k > 1 and ranked:
        within = counts.rank_counts[:top_k].sum() / ranked
        yield f"top_{top_k}_accuracy", within, f"label among the {top_k} best scores"
    yield "balanced_accuracy", recall[support > 0].mean(), "mean recall of classes with labels"
    yield "precision_macro", precision[present].mean(), "mean precision of occurring classes"
    yield "recall_macro", recall[present].mean(), "mean recall of occurring classes"
    yield "f1_macro", f1[present].mean(), "mean F1 of occurring classes"
    yield "f1_weighted", (f1 * support).sum() / support.sum(), "mean F1 weighted by class frequency"
    if counts.log_loss_rows:
        log_loss = counts.log_loss_sum / counts.log_loss_rows
        yield "log_loss", log_loss, "mean -log of the label's score, in nats"
    judged = [CORRECT, WRONG]
    error = ece_from_bins(
        count=counts.bin_counts[judged].sum(axis=0),
        confidence_sum=counts.bin_confidence[judged].sum(axis=0),
        correct=counts.bin_counts[CORRECT],
    )
    yield "expected_calibration_error", error, "mean gap between confidence and accuracy"


def _confidence_metrics(counts: PredictionCounts) -> Iterator[Metric]:
    if counts.ok:
        mean = counts.bin_confidence.sum() / counts.ok
        yield "mean_confidence", mean, "mean confidence of all predictions"
        yield "coverage", counts.accepted / counts.ok, "predictions accepted by the threshold"
    if counts.accepted_labelled:
        accuracy = counts.accepted_correct / counts.accepted_labelled
        yield "accepted_accuracy", accuracy, "accepted labelled rows predicted right"


def _label_counts(counts: PredictionCounts) -> tuple[Ints, Ints, Ints]:
    """Support, predictions and true positives per class, each (C,), over labelled rows."""
    hit = counts.confusion_label == counts.confusion_predicted
    support, predicted, hits = (np.zeros(len(counts.classes), dtype=np.int64) for _ in range(3))
    # Not bincount, whose weights are floats: integers stay exact beyond 2**53.
    np.add.at(support, counts.confusion_label, counts.confusion_count)
    np.add.at(predicted, counts.confusion_predicted, counts.confusion_count)
    hits[counts.confusion_label[hit]] = counts.confusion_count[hit]
    return support, predicted, hits


def _int_column(values: Ints, known: bool) -> pa.Array:
    return pa.array(values, pa.int64()) if known else pa.nulls(len(values), pa.int64())


def _ratio_column(numerator: Ints | Floats, denominator: Ints) -> pa.Array:
    undefined: Bools = denominator == 0
    return pa.array(numerator / np.maximum(denominator, 1), pa.float64(), mask=undefined)


def _format_value(metric: str, value: float) -> str:
    if metric in _ROW_COUNTS or metric.startswith("status_"):
        return f"{value:,.0f}"
    if metric in _NATS:
        return f"{value:.4f}"
    return f"{100 * value:.2f} %"
