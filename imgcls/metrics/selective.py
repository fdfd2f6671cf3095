"""What a confidence threshold costs and buys: accuracy of the accepted against their share.

Keeps judged predictions by predicted class and by a fixed grid of thresholds, fine near 1 where
confident models put most of their predictions. At every threshold of the grid all counts are exact;
thresholds between them are never offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from imgcls.metrics.columns import Bools, Floats, Ints, OkRows
from imgcls.metrics.intervals import wilson_interval

# Judged right, judged wrong, without a label that could judge them.
RIGHT, WRONG, UNLABELED = 0, 1, 2

THRESHOLD_GRID: Floats = np.unique(
    np.float32(np.concatenate([np.arange(100) / 100, 1 - np.logspace(-2, -6, 161)]))
).astype(np.float64)
"""(T,) rising thresholds from 0: every hundredth, then 40 a decade up to 1 - 1e-6.

They are float32 numbers, as confidences are, so that `confidence >= threshold` says the same in
either precision.
"""


@dataclass(frozen=True)
class Threshold:
    """A threshold and what is known of the predictions that it accepts.

    threshold: accept a confidence of at least this; None where no threshold reaches the target
    precision: share of accepted judged predictions that are right, with its 95 % Wilson interval
    coverage:  share of predictions that are accepted, judged or not
    support:   judged predictions that are accepted
    """

    label: str | None
    threshold: float | None
    precision: float | None
    lower: float | None
    upper: float | None
    coverage: float
    support: int


@dataclass(frozen=True, eq=False)
class SelectiveCounts:
    """Ok rows by outcome, predicted class and place on the grid; C classes, T thresholds.

    counts: (3, C, T) int64; [.., t] holds confidences in [GRID[t], GRID[t + 1])
    """

    classes: tuple[str, ...]
    counts: Ints

    @classmethod
    def empty(cls, classes: Sequence[str]) -> SelectiveCounts:
        return cls(tuple(classes), np.zeros((3, len(classes), len(THRESHOLD_GRID)), np.int64))

    @classmethod
    def from_rows(cls, rows: OkRows, classes: Sequence[str]) -> SelectiveCounts:
        """Count the ok rows of a table, as `columns.read_ok_rows` reads them."""
        outcome = np.where(
            rows.label < 0, UNLABELED, np.where(rows.label == rows.predicted, RIGHT, WRONG)
        )
        place = np.maximum(np.searchsorted(THRESHOLD_GRID, rows.confidence, side="right") - 1, 0)
        shape = (3, len(classes), len(THRESHOLD_GRID))
        cell = np.ravel_multi_index((outcome, rows.predicted, place), shape)
        counts = np.bincount(cell, minlength=int(np.prod(shape))).reshape(shape)
        return cls(tuple(classes), counts.astype(np.int64, copy=False))

    def __add__(self, other: SelectiveCounts) -> SelectiveCounts:
        """The counts of the rows of both. Raises ValueError when the classes differ."""
        if self.classes != other.classes:
            raise ValueError("cannot merge counts over different classes")
        return SelectiveCounts(self.classes, self.counts + other.counts)

    def count_accepted(self, label: str | None = None) -> Ints:
        """(3, T) rows by outcome with a confidence of at least each threshold of the grid.

        label: of the predictions of this class alone
        """
        rows = self.counts.sum(1) if label is None else self.counts[:, self.classes.index(label)]
        summed: Ints = rows[:, ::-1].cumsum(1)[:, ::-1]
        return summed


def build_coverage_curve(counts: SelectiveCounts) -> pa.Table:
    """Accuracy of the accepted at every threshold of the grid that accepts anything.

    threshold, coverage (of all ok rows), accuracy, lower, upper (float64; null where no accepted
    row is judged), accepted, judged (int64). The least threshold accepts all: selective accuracy
    there is accuracy. Rows that accept the same predictions as the one before are left out.
    """
    accepted = counts.count_accepted()
    total = int(accepted[:, 0].sum())
    rows: list[dict[str, Any]] = []
    for place, threshold in enumerate(THRESHOLD_GRID):
        right, wrong, unjudged = (int(n) for n in accepted[:, place])
        judged, taken = right + wrong, right + wrong + unjudged
        if taken == 0 or (rows and rows[-1]["accepted"] == taken):
            continue
        low, high = wilson_interval(right, judged)
        rows.append(
            {
                "threshold": float(threshold),
                "coverage": taken / total,
                "accuracy": right / judged if judged else None,
                "lower": low if judged else None,
                "upper": high if judged else None,
                "accepted": taken,
                "judged": judged,
            }
        )
    return pa.Table.from_pylist(rows, schema=_CURVE_SCHEMA)


def area_under_risk_coverage(cells: Ints) -> float | None:
    """Mean error rate over all coverages, confident predictions first; less is better.

    cells: (3, T) rows by outcome and place on the grid
    Equal confidences, here those of one cell of the grid, are accepted in random order: within a
    cell the risk is taken at its mean. None without a judged row.
    Source: Geifman, El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017.
    """
    cells = cells[:2, ::-1]
    rows, wrong = cells.sum(0), cells[WRONG]
    if not rows.sum():
        return None
    after, wrong_after = rows.cumsum(), wrong.cumsum()
    mean_risk = (wrong_after - wrong / 2) / np.maximum(after - rows / 2, 0.5)
    return float((mean_risk * rows).sum() / rows.sum())


def choose_threshold(
    counts: SelectiveCounts, target: float, label: str | None = None, *, least_rows: int = 30
) -> Threshold:
    """The lowest threshold whose accepted predictions are right at least at the target rate.

    target:     precision to reach, in (0, 1]; the measured one, whose interval is given beside
    label:      choose for predictions of this class alone
    least_rows: judged rows that must stand behind a threshold, lest three lucky ones decide
    Returns a Threshold whose `threshold` is None when none reaches the target.
    """
    accepted = counts.count_accepted(label)
    right, judged = accepted[RIGHT], accepted[RIGHT] + accepted[WRONG]
    reaches: Bools = (right >= target * judged - 1e-9) & (judged >= least_rows)
    if not reaches.any():
        return Threshold(label, None, None, None, None, 0.0, 0)
    return _describe_threshold(accepted, int(np.argmax(reaches)), label)


def _describe_threshold(accepted: Ints, place: int, label: str | None) -> Threshold:
    right, judged = int(accepted[RIGHT, place]), int(accepted[:2, place].sum())
    low, high = wilson_interval(right, judged)
    total = int(accepted[:, 0].sum())
    return Threshold(
        label=label,
        threshold=float(THRESHOLD_GRID[place]),
        precision=right / judged if judged else None,
        lower=low if judged else None,
        upper=high if judged else None,
        coverage=int(accepted[:, place].sum()) / total if total else 0.0,
        support=judged,
    )


_CURVE_SCHEMA = pa.schema(
    [
        *(pa.field(n, pa.float64()) for n in ("threshold", "coverage", "accuracy")),
        *(pa.field(n, pa.float64()) for n in ("lower", "upper")),
        *(pa.field(n, pa.int64()) for n in ("accepted", "judged")),
    ]
)
