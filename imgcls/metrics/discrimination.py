"""How well scores rank, class by class: AUROC, average precision and the Brier score.

Needs every class's score, as float16 (N, C). Keeps, per class, how many scores of its own rows and
of all others fall in each bin of a scale that follows the bits of float16: exact up to float16 for
few classes, in 961 bins (1 to 6 % wide, the finest near 0) for many. The error that binning can
make at most is computed from the same counts and told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from imgcls.metrics.columns import Floats, Ints

_ONE = 0x3C00  # the bits of 1.0 in float16; a softmax has nothing above, but for rounding
MAX_EXACT_CLASSES = 64
"""Up to so many classes every float16 has a bin of its own."""
_BLOCK_SCORES = 4_000_000
MAX_BRIER = 2.0
"""The Brier score of a row whose whole score is on a wrong class."""


@dataclass(frozen=True, eq=False)
class ScoreCounts:
    """What is kept of N labelled rows with all their scores; C classes, B bins.

    own, other: (C, B) int64, scores of a class on its own rows and on all others, by bin
    brier_sum:  sum over rows of b, a row's sum over classes of (score - truth)^2
    brier_square_sum: sum over rows of b^2
    """

    classes: tuple[str, ...]
    positive: Ints
    negative: Ints
    rows: int
    brier_sum: float
    brier_square_sum: float

    @classmethod
    def empty(cls, classes: Sequence[str]) -> ScoreCounts:
        shape = (len(classes), (_ONE >> _compute_bin_shift(len(classes))) + 1)
        zero = np.zeros(shape, np.int64)
        return cls(tuple(classes), zero, zero.copy(), 0, 0.0, 0.0)

    @classmethod
    def from_scores(
        cls, scores: NDArray[np.float16], label: Ints, classes: Sequence[str]
    ) -> ScoreCounts:
        """Count labelled rows.

        scores: (N, C) float16 in [0, 1], a softmax
        label:  (N,) class index
        Raises ValueError when the shapes do not fit, or a score is negative or no number.
        """
        names = tuple(classes)
        if scores.shape != (len(label), len(names)) or scores.dtype != np.float16:
            raise ValueError(
                f"scores are {scores.dtype} {scores.shape}, expected float16"
                f" {(len(label), len(names))}"
            )
        bits = scores.view(np.uint16)
        # the bits of positive float16 numbers rise with them; the sign's bit and NaN lie above 1
        if len(bits) and int(bits.max()) > _ONE + 2:
            raise ValueError("a score is outside [0, 1]; scores must be a softmax, not logits")
        counts = cls.empty(names)
        size = counts.positive.shape[1]
        offsets = np.arange(len(names), dtype=np.int64) * size
        everyone, brier = np.zeros(counts.positive.size, np.int64), np.empty(len(label))
        block = max(1, _BLOCK_SCORES // len(names))
        for start in range(0, len(label), block):
            part = slice(start, start + block)
            place = np.minimum(bits[part], _ONE) >> _compute_bin_shift(len(names))
            everyone += np.bincount((place + offsets).ravel(), minlength=len(everyone))
            brier[part] = (scores[part].astype(np.float64) ** 2).sum(1)
        rows = np.arange(len(label))
        truth = np.minimum(bits[rows, label], _ONE) >> _compute_bin_shift(len(names))
        own = np.bincount(truth + offsets[label], minlength=len(everyone))
        brier += 1 - 2 * scores[rows, label].astype(np.float64)
        return cls(
            names,
            own.reshape(counts.positive.shape),
            (everyone - own).reshape(counts.positive.shape),
            len(label),
            float(brier.sum()),
            float((brier**2).sum()),
        )

    def __add__(self, other: ScoreCounts) -> ScoreCounts:
        """The counts of the rows of both. Raises ValueError when the classes differ."""
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
    """One-against-rest figures of every class, NaN for a class without rows or without others.

    auroc, average_precision: (C,) float64
    auroc_bound, average_precision_bound: (C,) float64, the most that binning can have moved them
    """

    auroc: Floats
    auroc_bound: Floats
    average_precision: Floats
    average_precision_bound: Floats


def brier_score(counts: ScoreCounts) -> float | None:
    """Mean over rows of the squared distance of the scores from the truth; in [0, 2].

    None without rows. Source: Brier, Monthly Weather Review 78 (1950), the original definition.
    """
    return counts.brier_sum / counts.rows if counts.rows else None


def compute_discrimination(counts: ScoreCounts) -> Discrimination:
    """AUROC and average precision of every class against the rest.

    AUROC is the chance that a row of the class scores above another (ties count half), as
    scikit-learn's roc_auc_score has it (Fawcett 2006). Average precision is the mean, over the rows
    of the class, of the precision at their score, as average_precision_score has it. Rows of one
    bin count as ties; the bounds are what any order within the bins could change.
    """
    own, rest = (
        counts.positive[:, ::-1].astype(np.float64),
        counts.negative[:, ::-1].astype(np.float64),
    )
    positives, negatives = own.sum(1), rest.sum(1)
    defined = (positives > 0) & (negatives > 0)
    nan = np.full(len(positives), np.nan)
    pairs = np.where(defined, positives * negatives, 1)
    above = rest.cumsum(1) - rest  # others that score in a higher bin
    lost = (own * (above + rest / 2)).sum(1)
    auroc = np.where(defined, 1 - lost / pairs, nan)
    auroc_bound = np.where(defined, (own * rest).sum(1) / 2 / pairs, nan)
    if counts.positive.shape[1] > _ONE:
        auroc_bound = np.where(defined, 0.0, nan)  # a bin holds one float16: true ties
    precision, bound = _compute_average_precision(
        own, rest, positives, exact=counts.positive.shape[1] > _ONE
    )
    return Discrimination(
        auroc, auroc_bound, np.where(defined, precision, nan), np.where(defined, bound, nan)
    )


def _compute_average_precision(
    own: Floats, rest: Floats, positives: Floats, *, exact: bool
) -> tuple[Floats, Floats]:
    """(C,) average precision with bins as ties, and the most that another order would change it.

    own, rest: (C, B), the highest scores first
    """
    hits, misses = own.cumsum(1), rest.cumsum(1)
    share = own / np.maximum(positives, 1)[:, None]
    tied = (share * hits / np.maximum(hits + misses, 1)).sum(1)
    if exact:
        return tied, np.zeros_like(tied)
    # best: the bin's own rows before its others; worst: after them
    best = (share * hits / np.maximum(hits + misses - rest, 1)).sum(1)
    worst = (share * (hits - own + 1) / np.maximum(hits - own + 1 + misses, 1)).sum(1)
    return tied, np.maximum(best - tied, tied - np.minimum(worst, tied))


def build_discrimination_table(counts: ScoreCounts) -> pa.Table:
    """label (string), auroc, auroc_bound, average_precision, average_precision_bound (float64)."""
    found = compute_discrimination(counts)
    columns = {
        "auroc": found.auroc,
        "auroc_bound": found.auroc_bound,
        "average_precision": found.average_precision,
        "average_precision_bound": found.average_precision_bound,
    }
    arrays = {n: pa.array(v, pa.float64(), mask=np.isnan(v)) for n, v in columns.items()}
    return pa.table({"label": pa.array(counts.classes, pa.string()), **arrays})


def _compute_bin_shift(classes: int) -> int:
    return 0 if classes <= MAX_EXACT_CLASSES else 4
