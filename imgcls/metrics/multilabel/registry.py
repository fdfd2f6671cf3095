"""Registry of the metrics of a multi-label run: name, definition and estimate of each.

To add a metric, write its function in a module of `imgcls.metrics.multilabel` and add one line to
`MULTILABEL_METRICS`. Headline labels, and units other than fractions, are in
`imgcls.metrics.registry`, which has the names of both kinds of runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from imgcls.metrics.discrimination import MacroEstimate, estimate_macro_means
from imgcls.metrics.intervals import Interval, nonnegative_mean_interval, wilson_interval
from imgcls.metrics.multilabel import counts as fields
from imgcls.metrics.multilabel import ranking, ratios, scores
from imgcls.metrics.multilabel.counts import MultiLabelCounts
from imgcls.metrics.multilabel.ranking import RankingCounts
from imgcls.metrics.registry import Estimate

_Found = tuple[float, Interval] | None


@dataclass(frozen=True)
class MultiLabelStatistics:
    """Everything that a metric may be computed from.

    Attributes
    ----------
    counts : MultiLabelCounts
        Counts of all rows.
    ranking : RankingCounts or None
        Counts of the scores of all classes.
    resamples : int
        Bootstrap resamples; 0 leaves out the intervals that need a bootstrap.
    """

    counts: MultiLabelCounts
    ranking: RankingCounts | None = None
    resamples: int = 50

    @cached_property
    def macro_means(self) -> dict[str, MacroEstimate]:
        """Means of AUROC and average precision over classes, which share their bootstrap."""
        if self.ranking is None:
            return {}
        # how dependent the labels of a row are is measured where they are found or missed
        effect = min(
            ratios.compute_design_effect(self.counts, ratios.RECALL),
            scores.bound_design_effect(self.ranking),
        )
        return estimate_macro_means(
            self.ranking,
            design_effect=effect,
            negative_effect=ratios.compute_design_effect(self.counts, ratios.FALLOUT),
            resamples=self.resamples,
        )


@dataclass(frozen=True)
class MultiLabelSpec:
    """Definition of a metric; `estimate` returns None if it is undefined."""

    name: str
    description: str
    estimate: Callable[[MultiLabelStatistics], Estimate | None]


def _number(
    compute: Callable[[MultiLabelCounts], float | None],
) -> Callable[[MultiLabelStatistics], Estimate | None]:
    """A number without an interval."""

    def estimate(statistics: MultiLabelStatistics) -> Estimate | None:
        value = compute(statistics.counts)
        return None if value is None else Estimate(value)

    return estimate


def _share(
    compute: Callable[[MultiLabelCounts], tuple[int, int]],
) -> Callable[[MultiLabelStatistics], Estimate | None]:
    """A share of rows, part and whole, with Wilson's interval; undefined if the whole is 0."""

    def estimate(statistics: MultiLabelStatistics) -> Estimate | None:
        part, whole = compute(statistics.counts)
        return Estimate(part / whole, wilson_interval(part, whole)) if whole else None

    return estimate


def _of_cells(
    compute: Callable[[MultiLabelCounts], _Found],
) -> Callable[[MultiLabelStatistics], Estimate | None]:
    """A metric of the cells, with its own interval."""

    def estimate(statistics: MultiLabelStatistics) -> Estimate | None:
        found = compute(statistics.counts)
        return None if found is None else Estimate(*found)

    return estimate


def _of_scores(
    compute: Callable[[RankingCounts], _Found],
) -> Callable[[MultiLabelStatistics], Estimate | None]:
    """A metric of the scores, with its own interval."""

    def estimate(statistics: MultiLabelStatistics) -> Estimate | None:
        found = None if statistics.ranking is None else compute(statistics.ranking)
        return None if found is None else Estimate(*found)

    return estimate


def _micro_average_precision(statistics: MultiLabelStatistics) -> Estimate | None:
    if statistics.ranking is None:
        return None
    # its errors are both labels that are missed and other classes with high scores
    effect = max(
        ratios.compute_design_effect(statistics.counts, ratio)
        for ratio in (ratios.JACCARD, ratios.FALLOUT, ratios.HAMMING)
    )
    found = scores.estimate_micro_average_precision(statistics.ranking, design_effect=effect)
    return None if found is None else _note_bound(found)


def _calibration_error(statistics: MultiLabelStatistics) -> Estimate | None:
    if statistics.ranking is None:
        return None
    effect = ratios.compute_design_effect(statistics.counts, ratios.HAMMING)
    found = scores.estimate_calibration_error(statistics.ranking, design_effect=effect)
    return None if found is None else Estimate(*found)


def _macro_mean(name: str) -> Callable[[MultiLabelStatistics], Estimate | None]:
    def estimate(statistics: MultiLabelStatistics) -> Estimate | None:
        found = statistics.macro_means.get(name)
        return None if found is None else _note_bound(found)

    return estimate


def _note_bound(found: MacroEstimate) -> Estimate:
    note = f"; binning changes it by at most {found.bound:.1e}" if found.bound else ""
    return Estimate(found.value, found.interval, note)


def _sample_mean(position: int) -> Callable[[MultiLabelStatistics], Estimate | None]:
    """Mean of a metric of each labeled row, in [0, 1]."""

    def estimate(statistics: MultiLabelStatistics) -> Estimate | None:
        counts = statistics.counts
        if not counts.labeled:
            return None
        total = float(counts.sample_sums[position])
        squares = float(counts.sample_square_sums[position])
        low, high = nonnegative_mean_interval(total, squares, counts.labeled, 1.0)
        return Estimate(total / counts.labeled, (low, min(high, 1.0)))

    return estimate


def _mean_size(total: int, squares: int, rows: int, classes: int) -> _Found:
    """Mean number of classes of a row."""
    if not rows:
        return None
    mean = total / rows
    # a row with many more classes than those counted
    unseen = min(classes, mean + 3 * max(squares / rows - mean**2, 0.0) ** 0.5 + 1)
    low, high = nonnegative_mean_interval(total, squares, rows, unseen)
    return mean, (low, min(high, classes))


def _labels_per_row(counts: MultiLabelCounts) -> _Found:
    size = len(counts.classes)
    return _mean_size(counts.label_sum, counts.label_square_sum, counts.complete, size)


def _predicted_labels_per_row(counts: MultiLabelCounts) -> _Found:
    total, size = int(counts.predicted_counts.sum()), len(counts.classes)
    return _mean_size(total, counts.predicted_square_sum, counts.ok, size)


MULTILABEL_METRICS: tuple[MultiLabelSpec, ...] = (
    MultiLabelSpec("rows", "rows of the manifest", _number(lambda c: c.rows)),
    MultiLabelSpec("ok", "rows with a prediction", _number(lambda c: c.ok)),
    MultiLabelSpec(
        "error_rate",
        "share of rows without a prediction",
        _share(lambda c: (c.error_rows, c.rows)),
    ),
    MultiLabelSpec(
        "labelled", "ok rows with a known label of a class", _number(lambda c: c.labeled)
    ),
    MultiLabelSpec("unlabelled", "ok rows without labels", _number(lambda c: c.unlabeled or None)),
    MultiLabelSpec(
        "unknown_label",
        "ok rows with a label that is not a class",
        _number(lambda c: c.unknown_label or None),
    ),
    MultiLabelSpec(
        "mean_average_precision",
        "mean average precision of classes with and without labels",
        _macro_mean("average_precision"),
    ),
    MultiLabelSpec(
        "average_precision_micro",
        "average precision of all cells in one ranking",
        _micro_average_precision,
    ),
    MultiLabelSpec("auroc_macro", "mean over classes, each against the rest", _macro_mean("auroc")),
    MultiLabelSpec(
        "precision_micro",
        "predicted labels that are correct",
        _of_cells(lambda c: ratios.estimate_ratio(c, ratios.PRECISION)),
    ),
    MultiLabelSpec(
        "recall_micro",
        "labels that are predicted",
        _of_cells(lambda c: ratios.estimate_ratio(c, ratios.RECALL)),
    ),
    MultiLabelSpec("f1_micro", "F1 of all cells", _of_cells(ratios.estimate_micro_f1)),
    MultiLabelSpec(
        "precision_macro",
        "mean precision of all classes",
        _of_cells(lambda c: ratios.estimate_class_mean(c, "precision")),
    ),
    MultiLabelSpec(
        "recall_macro",
        "mean recall of all classes",
        _of_cells(lambda c: ratios.estimate_class_mean(c, "recall")),
    ),
    MultiLabelSpec(
        "f1_macro",
        "mean F1 of all classes",
        _of_cells(lambda c: ratios.estimate_class_mean(c, "f1")),
    ),
    MultiLabelSpec(
        "precision_samples", "mean precision of labeled rows", _sample_mean(fields.PRECISION)
    ),
    MultiLabelSpec("recall_samples", "mean recall of labeled rows", _sample_mean(fields.RECALL)),
    MultiLabelSpec("f1_samples", "mean F1 of labeled rows", _sample_mean(fields.F1)),
    MultiLabelSpec(
        "jaccard_samples", "mean Jaccard index of labeled rows", _sample_mean(fields.JACCARD)
    ),
    MultiLabelSpec(
        "subset_accuracy",
        "rows with every class predicted correctly",
        _share(lambda c: (c.exact, c.complete)),
    ),
    MultiLabelSpec(
        "hamming_loss",
        "share of wrong cells",
        _of_cells(lambda c: ratios.estimate_ratio(c, ratios.HAMMING)),
    ),
    MultiLabelSpec(
        "coverage_error",
        "best classes to take so that all labels are included",
        _of_scores(lambda r: scores.estimate_ranking_mean(r, ranking.COVERAGE)),
    ),
    MultiLabelSpec(
        "label_ranking_average_precision",
        "mean precision at the rank of each label of a row",
        _of_scores(lambda r: scores.estimate_ranking_mean(r, ranking.PRECISION)),
    ),
    MultiLabelSpec(
        "label_ranking_loss",
        "pairs of a label and another class in the wrong order",
        _of_scores(lambda r: scores.estimate_ranking_mean(r, ranking.LOSS)),
    ),
    MultiLabelSpec(
        "log_loss",
        "mean binary cross-entropy of a cell, in nats",
        _of_scores(scores.estimate_log_loss),
    ),
    MultiLabelSpec(
        "brier_score",
        "mean squared distance of score and label",
        _of_scores(scores.estimate_multilabel_brier),
    ),
    MultiLabelSpec(
        "expected_calibration_error_macro",
        "mean gap of score and share of labels, mean over classes",
        _calibration_error,
    ),
    MultiLabelSpec("labels_per_row", "mean number of labels", _of_cells(_labels_per_row)),
    MultiLabelSpec(
        "predicted_labels_per_row",
        "mean number of predicted labels",
        _of_cells(_predicted_labels_per_row),
    ),
    MultiLabelSpec("coverage", "share of ok rows accepted", _share(lambda c: (c.accepted, c.ok))),
    MultiLabelSpec(
        "ood_rate", "rows unlike the training data", _share(lambda c: (c.ood, c.ood_rows))
    ),
)
