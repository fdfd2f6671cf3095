"""Registry of all metrics of a run: name, definition, unit and headline label of each.

To add a metric, write its function in a module of `imgcls.metrics` and add one line to `METRICS`.
It then appears in `summary.parquet`, `summary.json` and the report; metrics that need only
`PredictionCounts` also in the slices. Headline numbers, which are also logged, have a second line
in `HEADLINES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from imgcls.metrics import agreement, calibration, confusion, discrimination, limits
from imgcls.metrics.columns import Floats, Ints
from imgcls.metrics.confusion import ClassCounts, ClassRate, ClassWeighting
from imgcls.metrics.counts import CORRECT, WRONG, PredictionCounts
from imgcls.metrics.discrimination import MacroEstimate, ScoreCounts
from imgcls.metrics.intervals import Interval, wilson_interval
from imgcls.metrics.label_sets import SetCounts, estimate_mean_size
from imgcls.metrics.log_loss import log_loss
from imgcls.metrics.selective import SelectiveCounts, estimate_aurc

Unit = Literal["fraction", "rows", "nats", "score"]
"""How a value is shown: 97.22%, 1,234 rows, 0.1234 nats, or 0.1234 of another scale."""


STATUS_PREFIX = "status_"
"""Prefix of the metrics that count the rows of each status other than ok."""


class Estimate(NamedTuple):
    """Value of a metric, its 95% interval if it has one, and a note for its description."""

    value: float
    interval: Interval | None = None
    note: str = ""


@dataclass(frozen=True)
class Statistics:
    """Everything that a metric may be computed from.

    Attributes
    ----------
    counts : PredictionCounts
        Counts of all rows.
    top_k : int
        Labels predicted per row.
    selective : SelectiveCounts or None
        Counts by confidence threshold.
    scores : ScoreCounts or None
        Counts of the scores of all classes.
    sets : SetCounts or None
        Counts of the label sets.
    """

    counts: PredictionCounts
    top_k: int = 1
    selective: SelectiveCounts | None = None
    scores: ScoreCounts | None = None
    sets: SetCounts | None = None

    @cached_property
    def macro_means(self) -> dict[str, MacroEstimate]:
        """Ranking metrics, which share their bootstrap."""
        return {} if self.scores is None else discrimination.estimate_macro_means(self.scores)


@dataclass(frozen=True)
class FromStatistics:
    """Metric with its own interval, if any; `compute` returns None if it is undefined."""

    compute: Callable[[Statistics], Estimate | None]


@dataclass(frozen=True)
class FromConfusion:
    """Metric of the confusion matrix of the labeled rows, with a bootstrap interval.

    compute: None if the metric is undefined
    compute_limits: interval that also has a width if every row is correct; united with the
        bootstrap interval
    low: smallest possible value; the largest is 1
    """

    compute: Callable[[ClassCounts], float | None]
    compute_limits: Callable[[ClassCounts, float], Interval] | None = None
    low: float = 0.0


@dataclass(frozen=True)
class FromBins:
    """Metric in [0, 1] of the confidence bins of the labeled rows, with a bootstrap interval.

    compute: called with count, confidence_sum and correct, each (B,)
    compute_limits: as in `FromConfusion`
    """

    compute: Callable[[Ints, Floats, Ints], float]
    compute_limits: Callable[[Ints, Floats, Ints], Interval]


@dataclass(frozen=True)
class MetricSpec:
    """Definition of a metric.

    name: in output files; `{k}` is replaced by the number of predicted labels
    """

    name: str
    description: str
    source: FromStatistics | FromConfusion | FromBins
    unit: Unit = "fraction"


def _number(compute: Callable[[PredictionCounts], float | None]) -> FromStatistics:
    """A number without an interval."""

    def estimate(statistics: Statistics) -> Estimate | None:
        value = compute(statistics.counts)
        return None if value is None else Estimate(value)

    return FromStatistics(estimate)


def _share(compute: Callable[[Statistics], tuple[int, int]]) -> FromStatistics:
    """A share of rows, part and whole, with Wilson's interval; undefined if the whole is 0."""

    def estimate(statistics: Statistics) -> Estimate | None:
        part, whole = compute(statistics)
        return Estimate(part / whole, wilson_interval(part, whole)) if whole else None

    return FromStatistics(estimate)


def _count_top_k(statistics: Statistics) -> tuple[int, int]:
    ranks, k = statistics.counts.rank_counts, statistics.top_k
    return int(ranks[:k].sum()), int(ranks.sum()) if k > 1 else 0


def _log_loss(statistics: Statistics) -> Estimate | None:
    found = log_loss(statistics.counts)
    return None if found is None else Estimate(*found)


def _class_mean(rate: ClassRate, weighting: ClassWeighting) -> FromConfusion:
    return FromConfusion(
        confusion.class_mean(rate, weighting), limits.class_mean_limits(rate, weighting)
    )


def _matthews(counts: ClassCounts) -> float:
    return agreement.matthews_correlation(counts.support, counts.predicted, counts.correct.sum())


def _kappa(counts: ClassCounts) -> float | None:
    return agreement.cohens_kappa(counts.support, counts.predicted, counts.correct.sum())


def _ece_by_chance(counts: PredictionCounts) -> float | None:
    if not counts.labeled:
        return None
    labeled = [CORRECT, WRONG]
    count = counts.bin_counts[labeled].sum(axis=0)
    return calibration.ece_by_chance(count, counts.bin_confidence[labeled].sum(axis=0))


def _mean_confidence(counts: PredictionCounts) -> float | None:
    return float(counts.bin_confidence.sum() / counts.ok) if counts.ok else None


def _aurc(statistics: Statistics) -> Estimate | None:
    found = None if statistics.selective is None else estimate_aurc(statistics.selective)
    return None if found is None else Estimate(*found)


def _brier(statistics: Statistics) -> Estimate | None:
    if statistics.scores is None:
        return None
    found = discrimination.estimate_brier(statistics.scores)
    return None if found is None else Estimate(*found)


def _count_covered(statistics: Statistics) -> tuple[int, int]:
    sets = statistics.sets
    return (0, 0) if sets is None else (int(sets.covered.sum()), int(sets.labeled.sum()))


def _count_single(statistics: Statistics) -> tuple[int, int]:
    sizes = None if statistics.sets is None else statistics.sets.sizes
    return (0, 0) if sizes is None else (int(sizes[1:2].sum()), int(sizes.sum()))


def _mean_set_size(statistics: Statistics) -> Estimate | None:
    found = None if statistics.sets is None else estimate_mean_size(statistics.sets)
    return None if found is None else Estimate(*found)


def _macro_mean(name: str) -> FromStatistics:
    def estimate(statistics: Statistics) -> Estimate | None:
        found = statistics.macro_means.get(name)
        if found is None:
            return None
        note = f"; binning changes it by at most {found.bound:.1e}" if found.bound else ""
        return Estimate(found.value, found.interval, note)

    return FromStatistics(estimate)


METRICS: tuple[MetricSpec, ...] = (
    MetricSpec("rows", "rows of the manifest", _number(lambda c: c.rows), "rows"),
    MetricSpec("ok", "rows with a prediction", _number(lambda c: c.ok), "rows"),
    MetricSpec(
        "error_rate",
        "share of rows without a prediction",
        _share(lambda s: (s.counts.error_rows, s.counts.rows)),
    ),
    MetricSpec("labelled", "ok rows labeled with a class", _number(lambda c: c.labeled), "rows"),
    MetricSpec(
        "unlabelled", "ok rows without a label", _number(lambda c: c.unlabeled or None), "rows"
    ),
    MetricSpec(
        "unknown_label",
        "ok rows whose label is not a class",
        _number(lambda c: c.unknown_label or None),
        "rows",
    ),
    MetricSpec(
        "accuracy",
        "labeled rows predicted correctly",
        _share(lambda s: (s.counts.correct, s.counts.labeled)),
    ),
    MetricSpec(
        "top_{k}_accuracy",
        "label among the {k} best scores",
        _share(_count_top_k),
    ),
    MetricSpec(
        "balanced_accuracy",
        "mean recall of classes with labels",
        _class_mean("recall", "labeled"),
    ),
    MetricSpec(
        "precision_macro",
        "mean precision of occurring classes",
        _class_mean("precision", "occurring"),
    ),
    MetricSpec(
        "recall_macro",
        "mean recall of occurring classes",
        _class_mean("recall", "occurring"),
    ),
    MetricSpec(
        "f1_macro",
        "mean F1 of occurring classes",
        _class_mean("f1", "occurring"),
    ),
    MetricSpec(
        "f1_micro",
        "equals accuracy: each row has one label",
        _share(lambda s: (s.counts.correct, s.counts.labeled)),
    ),
    MetricSpec(
        "precision_weighted",
        "mean precision by class frequency",
        _class_mean("precision", "support"),
    ),
    MetricSpec(
        "f1_weighted",
        "mean F1 by class frequency",
        _class_mean("f1", "support"),
    ),
    MetricSpec(
        "matthews_correlation",
        "correlation of label and prediction",
        FromConfusion(_matthews, limits.matthews_limits, low=-1.0),
        "score",
    ),
    MetricSpec(
        "cohens_kappa",
        "agreement beyond chance, at most 1",
        FromConfusion(_kappa, limits.kappa_limits, low=-1.0),
        "score",
    ),
    MetricSpec(
        "log_loss",
        "mean -log of the label's score, in nats",
        FromStatistics(_log_loss),
        "nats",
    ),
    MetricSpec(
        "expected_calibration_error",
        "mean gap of confidence and accuracy",
        FromBins(calibration.ece_from_bins, limits.ece_limits),
    ),
    MetricSpec(
        "maximum_calibration_error",
        "largest gap of a bin of 1% or more",
        FromBins(calibration.mce_from_bins, limits.mce_limits),
    ),
    MetricSpec(
        "ece_by_chance",
        "ECE of a calibrated model on these rows",
        _number(_ece_by_chance),
    ),
    MetricSpec(
        "mean_confidence",
        "mean confidence of all predictions",
        _number(_mean_confidence),
    ),
    MetricSpec(
        "coverage",
        "predictions accepted by the threshold",
        _share(lambda s: (s.counts.accepted, s.counts.ok)),
    ),
    MetricSpec(
        "accepted_accuracy",
        "accepted labeled rows predicted correctly",
        _share(lambda s: (s.counts.accepted_correct, s.counts.accepted_labeled)),
    ),
    MetricSpec(
        "area_under_risk_coverage", "mean error rate over all coverages", FromStatistics(_aurc)
    ),
    MetricSpec(
        "ood_rate",
        "rows unlike the training data",
        _share(lambda s: (s.counts.ood, s.counts.ood_rows)),
    ),
    MetricSpec("set_coverage", "label sets that include the label", _share(_count_covered)),
    MetricSpec(
        "mean_set_size",
        "mean number of labels",
        FromStatistics(_mean_set_size),
        "score",
    ),
    MetricSpec("single_label_sets", "label sets with one label", _share(_count_single)),
    MetricSpec(
        "brier_score", "mean squared distance from the label", FromStatistics(_brier), "score"
    ),
    MetricSpec(
        "auroc_macro",
        "mean over classes, each against the rest",
        _macro_mean("auroc"),
    ),
    MetricSpec(
        "average_precision_macro",
        "mean over classes, each against the rest",
        _macro_mean("average_precision"),
    ),
)

HEADLINES = {
    "mean_average_precision": "mean average precision (mAP)",
    "accuracy": "accuracy",
    "top_{k}_accuracy": "top-{k} accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1_micro": "micro F1",
    "f1_macro": "macro F1",
    "subset_accuracy": "all labels correct",
    "hamming_loss": "Hamming loss",
    "log_loss": "log loss (nats)",
    "auroc_macro": "macro AUROC",
    "expected_calibration_error": "calibration error (ECE)",
    "expected_calibration_error_macro": "calibration error (ECE)",
    "labels_per_row": "labels per row",
    "predicted_labels_per_row": "predicted labels per row",
    "mean_confidence": "mean confidence",
    "coverage": "accepted",
    "ood_rate": "out of distribution",
    "set_coverage": "label in its label set",
    "mean_set_size": "labels per label set",
    "error_rate": "without a prediction",
}
"""Metrics that are logged and shown first in the report, in this order, and their labels.

Includes those of multi-label runs (`imgcls.metrics.multilabel.registry`).
"""

MULTILABEL_UNITS: dict[str, Unit] = {
    "coverage_error": "score",
    "labels_per_row": "score",
    "predicted_labels_per_row": "score",
}
"""Units of the metrics that only multi-label runs have; the others are fractions."""

_UNITS: dict[str, Unit] = {spec.name: spec.unit for spec in METRICS} | MULTILABEL_UNITS


def find_unit(name: str) -> Unit:
    """Unit of a metric; a fraction if the name is not in the registry.

    Parameters
    ----------
    name : str
        Name of a metric in output files.

    Returns
    -------
    {"fraction", "rows", "nats", "score"}

    Examples
    --------
    >>> find_unit("log_loss"), find_unit("status_missing"), find_unit("top_5_accuracy")
    ('nats', 'rows', 'fraction')
    """
    return "rows" if name.startswith(STATUS_PREFIX) else _UNITS.get(name, "fraction")


def find_headline(name: str) -> str | None:
    """Label of a headline number; None for other metrics.

    Parameters
    ----------
    name : str
        Name of a metric in output files.

    Returns
    -------
    str or None

    Examples
    --------
    >>> find_headline("top_5_accuracy"), find_headline("f1_weighted")
    ('top-5 accuracy', None)
    """
    pattern = get_pattern(name)
    label = HEADLINES.get(pattern)
    if label is None or pattern == name:
        return label
    return label.format(k=name.split("_")[1])


def get_pattern(name: str) -> str:
    """Name of a metric in the registry: `top_{k}_accuracy` for every k.

    Parameters
    ----------
    name : str
        Name of a metric in output files.

    Returns
    -------
    str

    Examples
    --------
    >>> get_pattern("top_5_accuracy"), get_pattern("accuracy")
    ('top_{k}_accuracy', 'accuracy')
    """
    return re.sub(r"^top_\d+_", "top_{k}_", name)
