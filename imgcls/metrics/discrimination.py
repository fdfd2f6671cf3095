"""Ranking metrics of scores per class: AUROC and average precision; and the Brier score.

Needs the score of every class, as float16 (N, C). Counts, per class, the scores of its own rows
(positive) and of all others (negative) in bins of a scale that follows the bits of float16: exact
up to float16 for at most 64 classes, in 961 bins (1 to 6% wide, the finest near 0) for more. The
largest possible effect of binning is computed from the same counts and returned with the values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from imgcls.metrics.columns import Bools, Floats, Ints
from imgcls.metrics.intervals import (
    Z_95,
    Interval,
    auroc_limits,
    mover_interval,
    nonnegative_mean_interval,
    union_interval,
    wilson_limits,
)
from imgcls.metrics.score_bins import (
    ONE,
    ScoreBins,
    coarsen,
    compute_bin_shift,
    count_bins,
    is_exact,
    view_bits,
)

MAX_EXACT_CLASSES = 64
"""Up to this number of classes every float16 value has its own bin."""
MAX_BRIER = 2.0
"""Brier score of a row whose whole score is on a wrong class."""
_BLOCK_SCORES = 4_000_000
_RESAMPLES = 50
_MAX_RESAMPLED = 1_000_000  # cells; with more, spreads are computed from wider bins


@dataclass(frozen=True, eq=False)
class ScoreCounts:
    """Counts of N labeled rows with the scores of all classes; C classes, B bins.

    Attributes
    ----------
    classes : tuple of str
        Class names.
    positive, negative : ndarray of int64, shape (C, B)
        Scores of each class on its own rows, and on all other rows, by bin.
    rows : int
        Labeled rows N.
    brier_sum, brier_square_sum : float
        Sums over rows of b and b^2, where b is a row's sum over classes of (score - truth)^2.
    """

    classes: tuple[str, ...]
    positive: Ints
    negative: Ints
    rows: int
    brier_sum: float
    brier_square_sum: float

    @classmethod
    def empty(cls, classes: Sequence[str]) -> ScoreCounts:
        """Counts of no rows."""
        shape = (len(classes), count_bins(compute_bin_shift(len(classes), MAX_EXACT_CLASSES)))
        zero = np.zeros(shape, np.int64)
        return cls(tuple(classes), zero, zero.copy(), 0, 0.0, 0.0)

    @classmethod
    def from_scores(
        cls, scores: NDArray[np.float16], label: Ints, classes: Sequence[str]
    ) -> ScoreCounts:
        """Count labeled rows.

        Parameters
        ----------
        scores : ndarray of float16, shape (N, C)
            Softmax scores in [0, 1].
        label : ndarray of int64, shape (N,)
            Class indices.
        classes : sequence of str
            The C class names.

        Returns
        -------
        ScoreCounts

        Raises
        ------
        ValueError
            If the shapes do not match, or a score is negative or NaN.
        """
        names = tuple(classes)
        if scores.shape != (len(label), len(names)) or scores.dtype != np.float16:
            raise ValueError(
                f"scores are {scores.dtype} {scores.shape}, expected float16"
                f" {(len(label), len(names))}"
            )
        bits, shift = view_bits(scores), compute_bin_shift(len(names), MAX_EXACT_CLASSES)
        counts = cls.empty(names)
        size = counts.positive.shape[1]
        offsets = np.arange(len(names), dtype=np.int64) * size
        everyone, brier = np.zeros(counts.positive.size, np.int64), np.empty(len(label))
        block = max(1, _BLOCK_SCORES // len(names))
        for start in range(0, len(label), block):
            part = slice(start, start + block)
            index = np.minimum(bits[part], ONE) >> shift
            everyone += np.bincount((index + offsets).ravel(), minlength=len(everyone))
            brier[part] = (scores[part].astype(np.float64) ** 2).sum(1)
        rows = np.arange(len(label))
        truth = np.minimum(bits[rows, label], ONE) >> shift
        positive = np.bincount(truth + offsets[label], minlength=len(everyone))
        brier += 1 - 2 * scores[rows, label].astype(np.float64)
        return cls(
            names,
            positive.reshape(counts.positive.shape),
            (everyone - positive).reshape(counts.positive.shape),
            len(label),
            float(brier.sum()),
            float((brier**2).sum()),
        )

    def __add__(self, other: ScoreCounts) -> ScoreCounts:
        """Counts of the rows of both. Raises ValueError if the classes differ."""
        if self.classes != other.classes:
            raise ValueError("cannot merge counts over different classes")
        return ScoreCounts(
            self.classes,
            self.positive + other.positive,
            self.negative + other.negative,
            self.rows + other.rows,
            self.brier_sum + other.brier_sum,
            self.brier_square_sum + other.brier_square_sum,
        )


@dataclass(frozen=True, eq=False)
class Discrimination:
    """One-against-rest metrics per class; NaN for a class without rows or without other rows.

    Attributes
    ----------
    auroc, average_precision : ndarray of float64, shape (C,)
        Values in [0, 1].
    auroc_bound, average_precision_bound : ndarray of float64, shape (C,)
        Largest possible change of the value by binning; 0 where bins are exact.
    """

    auroc: Floats
    auroc_bound: Floats
    average_precision: Floats
    average_precision_bound: Floats


class MacroEstimate(NamedTuple):
    """Mean of a ranking metric over classes.

    value: mean over the classes that have it
    interval: its 95% interval
    bound: largest possible change of the value by binning
    """

    value: float
    interval: Interval | None
    bound: float


def brier_score(counts: ScoreCounts) -> float | None:
    """Brier score: mean squared distance of the scores from the one-hot label.

    Parameters
    ----------
    counts : ScoreCounts
        Counts of a run.

    Returns
    -------
    float or None
        Value in [0, 2]; None without rows.

    Notes
    -----
    Original multiclass definition: Brier, Monthly Weather Review 78 (1950).

    Examples
    --------
    >>> scores = np.array([[0.5, 0.5], [1.0, 0.0]], np.float16)
    >>> brier_score(ScoreCounts.from_scores(scores, np.array([0, 0]), ["cat", "dog"]))
    0.25
    """
    return counts.brier_sum / counts.rows if counts.rows else None


def estimate_brier(counts: ScoreCounts) -> tuple[float, Interval] | None:
    """Brier score with its 95% interval.

    Parameters
    ----------
    counts : ScoreCounts
        Counts of a run.

    Returns
    -------
    value : float
        `brier_score` of the counts.
    interval : tuple of float
        Lower and upper end within [0, 2]. None is returned without rows.

    Examples
    --------
    >>> scores = np.array([[0.5, 0.5], [1.0, 0.0]], np.float16)
    >>> value, (low, high) = estimate_brier(
    ...     ScoreCounts.from_scores(scores, np.array([0, 0]), ["cat", "dog"])
    ... )
    >>> 0 < low < value < high < 2
    True
    """
    score = brier_score(counts)
    if score is None:
        return None
    low, high = nonnegative_mean_interval(
        counts.brier_sum, counts.brier_square_sum, counts.rows, MAX_BRIER
    )
    return score, (low, min(high, MAX_BRIER))


def compute_discrimination(counts: ScoreBins) -> Discrimination:
    """AUROC and average precision of every class against the rest.

    Parameters
    ----------
    counts : ScoreBins
        Counts of a run, such as `ScoreCounts`.

    Returns
    -------
    Discrimination
        Values and bounds per class. Rows of one bin count as ties.

    Notes
    -----
    AUROC is the probability that a row of the class scores higher than another row (ties count
    half), as scikit-learn's `roc_auc_score` (Fawcett 2006). Average precision is the mean, over the
    rows of the class, of the precision at their score, as `average_precision_score`.

    Examples
    --------
    >>> scores = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]], np.float16)
    >>> counts = ScoreCounts.from_scores(scores, np.array([0, 1, 1]), ["cat", "dog"])
    >>> compute_discrimination(counts).auroc.tolist()
    [1.0, 1.0]
    """
    return _compare_rows(_rank(counts.positive), _rank(counts.negative), exact=is_exact(counts))


def _rank(counts: Ints) -> Floats:
    """(C, B) counts with the highest scores first."""
    return counts[:, ::-1].astype(np.float64)


def _compare_rows(own: Floats, rest: Floats, *, exact: bool) -> Discrimination:
    """See `compute_discrimination`.

    own, rest: (C, B) positives and negatives, the highest scores first
    exact: the rows of a bin are true ties, so that all bounds are 0
    """
    positives, negatives = own.sum(1), rest.sum(1)
    defined = (positives > 0) & (negatives > 0)
    nan = np.full(len(positives), np.nan)
    pairs = np.where(defined, positives * negatives, 1)
    above = rest.cumsum(1) - rest  # other rows in a higher bin
    lost = (own * (above + rest / 2)).sum(1)
    auroc = np.where(defined, 1 - lost / pairs, nan)
    tied = np.zeros_like(pairs) if exact else (own * rest).sum(1) / 2 / pairs
    precision, bound = _compute_average_precision(own, rest, positives, exact=exact)
    auroc_bound, precision, bound = (
        np.where(defined, values, nan) for values in (tied, precision, bound)
    )
    return Discrimination(auroc, auroc_bound, precision, bound)


def estimate_macro_means(
    counts: ScoreBins,
    *,
    design_effect: float = 1.0,
    negative_effect: float = math.inf,
    resamples: int = _RESAMPLES,
) -> dict[str, MacroEstimate]:
    """Means over classes of AUROC and average precision, with 95% intervals.

    Parameters
    ----------
    counts : ScoreBins
        Counts of a run, such as `ScoreCounts`.
    design_effect : float, default 1.0
        Factor of the variance by positives; above 1 if a row can be one of several classes.
    negative_effect : float, default inf
        The same factor for the negatives. The default takes them for the same rows in all classes.
    resamples : int, default 50
        Bootstrap resamples; 0 leaves out the intervals.

    Returns
    -------
    dict of str to MacroEstimate
        Keys "auroc" and "average_precision"; empty if no class has rows and other rows.

    Notes
    -----
    Bootstrap intervals, united with those that follow from `auroc_limits` and, for average
    precision, from the Wilson limits of a share of the positives (Boyd, Eng, Page, "Area under the
    Precision-Recall Curve: Point Estimates and Confidence Intervals", ECML 2013).

    Examples
    --------
    >>> scores = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]], np.float16)
    >>> counts = ScoreCounts.from_scores(scores, np.array([0, 1, 1]), ["cat", "dog"])
    >>> estimate_macro_means(counts)["auroc"].value
    1.0
    """
    ranks = compute_discrimination(counts)
    known = np.isfinite(ranks.auroc)
    if not known.any():
        return {}
    positives, negatives = counts.positive.sum(1)[known], counts.negative.sum(1)[known]
    auroc, precision = ranks.auroc[known], ranks.average_precision[known]
    parts = {
        "auroc": (auroc, ranks.auroc_bound, auroc_limits(auroc, positives, negatives)),
        "average_precision": (
            precision,
            ranks.average_precision_bound,
            wilson_limits(precision * positives, positives),
        ),
    }
    spreads = _bootstrap_spreads(counts, known, (design_effect, negative_effect), resamples)
    found = {}
    for name, (values, bounds, limits) in parts.items():
        interval = None
        if name in spreads:
            interval = _unite_limits(values, limits, spreads[name], design_effect)
        found[name] = MacroEstimate(float(values.mean()), interval, float(bounds[known].mean()))
    return found


def _unite_limits(
    values: Floats, limits: tuple[Floats, Floats], spread: float, design_effect: float
) -> Interval | None:
    """Interval of a mean over classes: its bootstrap interval and the limits of the classes."""
    value, factor = float(values.mean()), math.sqrt(design_effect)
    below, above = (
        factor * width / len(values) for width in (values - limits[0], limits[1] - values)
    )
    edge = mover_interval(value, below, above)
    return union_interval((value - spread, value + spread), edge, low=0.0, high=1.0)


def _bootstrap_spreads(
    counts: ScoreBins, known: Bools, effects: tuple[float, float], resamples: int
) -> dict[str, float]:
    """Half the width of the 95% bootstrap intervals of the macro means over the `known` classes.

    A row is a positive of its own class and a negative of every other. Positives are resampled
    separately: they differ from class to class, so the variances of the classes add up. Negatives
    are nearly the same rows for all classes, so their standard deviations add up, or less if their
    factor in `effects` (for positives, for negatives) is finite. The two parts are treated as
    dependent.
    """
    rng = np.random.default_rng(0)
    names = ("auroc", "average_precision")
    drawn: dict[tuple[str, bool], list[Any]] = {}
    positive, negative = counts.positive, counts.negative
    if positive.size > _MAX_RESAMPLED and is_exact(counts):
        positive, negative = coarsen(positive), coarsen(negative)
    own_rows, other_rows = _rank(positive), _rank(negative)
    for _ in range(resamples):
        for own in (True, False):
            cells = _rank(rng.poisson(positive if own else negative))
            pair = (cells, other_rows) if own else (own_rows, cells)
            found = _compare_rows(*pair, exact=True)  # without the bounds, which are not used
            for name in names:
                drawn.setdefault((name, own), []).append(getattr(found, name)[known])
    spreads = {}
    for name in names if resamples else ():
        # NaN for a class that was not drawn
        own_part, rest_part = (np.nanvar(drawn[name, own], axis=0) for own in (True, False))
        together = np.sqrt(rest_part).mean()
        if rest_part.any():
            together = min(together, np.sqrt(effects[1] * rest_part.sum()) / known.sum())
        own_spread = np.sqrt(effects[0] * own_part.sum()) / known.sum()
        spreads[name] = Z_95 * float(own_spread + together)
    return spreads


def _compute_average_precision(
    own: Floats, rest: Floats, positives: Floats, *, exact: bool
) -> tuple[Floats, Floats]:
    """(C,) average precision with bins as ties, and the largest change by another order.

    own, rest: (C, B) positives and negatives, the highest scores first
    """
    hits, misses = own.cumsum(1), rest.cumsum(1)
    share = own / np.maximum(positives, 1)[:, None]
    tied = (share * hits / np.maximum(hits + misses, 1)).sum(1)
    if exact:
        return tied, np.zeros_like(tied)
    # best: positives of the bin before its negatives; worst: after them
    best = (share * hits / np.maximum(hits + misses - rest, 1)).sum(1)
    worst = (share * (hits - own + 1) / np.maximum(hits - own + 1 + misses, 1)).sum(1)
    return tied, np.maximum(best - tied, tied - np.minimum(worst, tied))


def build_discrimination_table(counts: ScoreCounts) -> pa.Table:
    """Ranking metrics per class as a table.

    Parameters
    ----------
    counts : ScoreCounts
        Counts of a run.

    Returns
    -------
    pyarrow.Table
        Columns label (string), auroc, auroc_bound, average_precision, average_precision_bound
        (float64, null where undefined).

    Examples
    --------
    >>> build_discrimination_table(ScoreCounts.empty(["cat", "dog"]))["label"].to_pylist()
    ['cat', 'dog']
    """
    found = compute_discrimination(counts)
    columns = {
        "auroc": found.auroc,
        "auroc_bound": found.auroc_bound,
        "average_precision": found.average_precision,
        "average_precision_bound": found.average_precision_bound,
    }
    arrays = {n: pa.array(v, pa.float64(), mask=np.isnan(v)) for n, v in columns.items()}
    return pa.table({"label": pa.array(counts.classes, pa.string()), **arrays})
