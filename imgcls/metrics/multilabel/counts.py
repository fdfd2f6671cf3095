"""Mergeable counts of multi-label predictions at the thresholds of the classes.

Counting parts and merging them, in any order, equals counting the whole: integers exactly, float
sums up to rounding. Memory depends on the number of classes only. A cell is one class of one row;
an unknown cell counts nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any, ClassVar

import numpy as np

from imgcls.metrics.columns import Bools, Floats, Ints
from imgcls.metrics.mergeable_counts import MergeableCounts
from imgcls.metrics.multilabel.columns import MultiLabelRows
from imgcls.metrics.multilabel.matrices import (
    Targets,
    check_classes,
    check_matrix,
    check_targets,
    count_in_columns,
    count_in_rows,
    split_rows,
)

# Rows and columns of `cell_moments`: kinds of cells.
TP, FP, FN, TN = 0, 1, 2, 3
# Positions in `sample_sums`: metrics of a row.
F1, PRECISION, RECALL, JACCARD = 0, 1, 2, 3


@dataclass(frozen=True, eq=False)
class MultiLabelCounts(MergeableCounts):
    """Counts of multi-label predictions; C classes.

    An ok row (status "ok") has a prediction for every class. It is labeled if at least one of its
    cells is known, and otherwise unlabeled. It is counted in `unknown_label` if one of its labels
    is not a class, whatever its cells are. A labeled row is complete if all of its cells are known.

    Attributes
    ----------
    classes : tuple of str
        Class names.
    status : dict of str to int
        Rows by status, including "ok".
    labeled, unlabeled, unknown_label : int
        Ok rows with a known cell, without labels, and with a label that is not a class.
    accepted : int
        Ok rows whose `accepted` is true.
    ood, ood_rows : int
        Ok rows that are out of distribution, and ok rows of a bundle that detects it.
    true_positives, false_positives, false_negatives, true_negatives : ndarray of int64, shape (C,)
        Known cells by class.
    predicted_counts : ndarray of int64, shape (C,)
        Ok rows, labeled or not, that are predicted to have each class.
    predicted_square_sum : int
        Sum over ok rows of the squared number of predicted classes.
    complete, exact : int
        Complete rows, and those of them with every cell predicted correctly.
    label_sum, label_square_sum : int
        Sums over complete rows of the number of labels, and of its square.
    cell_moments : ndarray of int64, shape (4, 4)
        Sums over labeled rows of the products of a row's cells by kind (TP, FP, FN, TN). They give
        the variance of ratios of cells when rows are drawn, because cells of a row are dependent.
    sample_sums, sample_square_sums : ndarray of float64, shape (4,)
        Sums over labeled rows of the F1, precision, recall and Jaccard index of a row over its
        known cells, and of their squares.

    Notes
    -----
    A ratio of a row whose denominator is 0 counts as 0, as in scikit-learn with its default,
    `zero_division=0`: a row without labels and without predictions has a sample F1 of 0.
    """

    _float_fields: ClassVar[tuple[str, ...]] = ("sample_sums", "sample_square_sums")

    labeled: int
    unlabeled: int
    unknown_label: int
    accepted: int
    ood: int
    ood_rows: int
    true_positives: Ints
    false_positives: Ints
    false_negatives: Ints
    true_negatives: Ints
    predicted_counts: Ints
    predicted_square_sum: int
    complete: int
    exact: int
    label_sum: int
    label_square_sum: int
    cell_moments: Ints
    sample_sums: Floats
    sample_square_sums: Floats

    @classmethod
    def from_arrays(
        cls,
        targets: Targets | None,
        predicted: Bools,
        classes: Sequence[str],
        *,
        status: Mapping[str, int] | None = None,
        accepted: Bools | None = None,
        is_ood: Bools | None = None,
        unknown_label: int = 0,
    ) -> MultiLabelCounts:
        """Count N ok rows.

        Parameters
        ----------
        targets : ndarray of int8, shape (N, C), or None
            1: the class applies, 0: it does not, -1: unknown. None for an unlabeled run.
        predicted : ndarray of bool, shape (N, C)
            Whether a score reaches the threshold of its class.
        classes : sequence of str
            The C class names.
        status : mapping of str to int, optional
            All rows by status; "ok" must be N. All rows are ok by default.
        accepted, is_ood : ndarray of bool, optional
            Accepted rows, shape (N,), and out-of-distribution rows, of those where it is known.
        unknown_label : int, default 0
            Rows with a label that is not a class; their targets count as those of other rows.

        Returns
        -------
        MultiLabelCounts

        Raises
        ------
        ValueError
            If shapes, types, values or names are invalid, or `status` does not have N ok rows.

        Examples
        --------
        >>> targets, predicted = np.array([[1, 0], [1, -1]], np.int8), np.ones((2, 2), np.bool_)
        >>> counts = MultiLabelCounts.from_arrays(targets, predicted, ["cat", "dog"])
        >>> counts.true_positives.tolist(), counts.false_positives.tolist(), counts.complete
        ([2, 0], [0, 1], 1)
        """
        names = check_classes(classes)
        by_status = dict(sorted(({"ok": len(predicted)} if status is None else status).items()))
        _check_arrays(targets, predicted, accepted, by_status, len(names))
        return replace(
            _count_rows(targets, predicted, names),
            status=by_status,
            unknown_label=unknown_label,
            **_count_flags(accepted, is_ood),
        )

    @classmethod
    def from_rows(
        cls,
        rows: MultiLabelRows,
        targets: Targets | None,
        classes: Sequence[str],
        *,
        unknown_label: int = 0,
    ) -> MultiLabelCounts:
        """Count rows that `columns.read_multilabel_rows` returned.

        Parameters
        ----------
        rows : MultiLabelRows
            The N rows with a prediction.
        targets : ndarray of int8, shape (N, C), or None
            As for `from_arrays`.
        classes : sequence of str
            The C class names.
        unknown_label : int, default 0
            As for `from_arrays`.

        Returns
        -------
        MultiLabelCounts

        Raises
        ------
        ValueError
            As for `from_arrays`.
        """
        return cls.from_arrays(
            targets,
            rows.predicted,
            classes,
            status=rows.status,
            accepted=rows.accepted,
            is_ood=rows.is_ood,
            unknown_label=unknown_label,
        )

    @classmethod
    def empty(cls, classes: Sequence[str]) -> MultiLabelCounts:
        """Counts of no rows: the start of a merge.

        Parameters
        ----------
        classes : sequence of str
            The C class names.

        Returns
        -------
        MultiLabelCounts

        Raises
        ------
        ValueError
            If a name is repeated.

        Examples
        --------
        >>> MultiLabelCounts.empty(["cat", "dog"]).rows
        0
        """
        names = check_classes(classes)
        zero = np.zeros(len(names), dtype=np.int64)
        return cls(
            classes=names,
            status={},
            labeled=0,
            unlabeled=0,
            unknown_label=0,
            accepted=0,
            ood=0,
            ood_rows=0,
            true_positives=zero,
            false_positives=zero,
            false_negatives=zero,
            true_negatives=zero,
            predicted_counts=zero,
            predicted_square_sum=0,
            complete=0,
            exact=0,
            label_sum=0,
            label_square_sum=0,
            cell_moments=np.zeros((4, 4), dtype=np.int64),
            sample_sums=np.zeros(4),
            sample_square_sums=np.zeros(4),
        )

    @property
    def support(self) -> Ints:
        """(C,) known cells to which the class applies."""
        return self.true_positives + self.false_negatives

    @property
    def known(self) -> Ints:
        """(C,) known cells."""
        return self.support + self.false_positives + self.true_negatives

    @property
    def known_cells(self) -> int:
        """Known cells of all classes."""
        return int(self.known.sum())

    @property
    def wrong_cells(self) -> int:
        """Known cells whose prediction is wrong."""
        return int((self.false_positives + self.false_negatives).sum())

    @property
    def cells(self) -> Ints:
        """(4,) known cells by kind: TP, FP, FN, TN."""
        kinds = (self.true_positives, self.false_positives, self.false_negatives)
        return np.array([int(kind.sum()) for kind in (*kinds, self.true_negatives)], dtype=np.int64)

    def merge(self, other: MultiLabelCounts) -> MultiLabelCounts:
        """Counts of the rows of both; commutative, and associative up to float addition.

        Parameters
        ----------
        other : MultiLabelCounts
            Counts with the same classes.

        Returns
        -------
        MultiLabelCounts

        Raises
        ------
        ValueError
            If the classes differ.
        """
        self._check_same_classes(other)
        return MultiLabelCounts(**self._add_fields(other))

    def __add__(self, other: object) -> MultiLabelCounts:
        return self.merge(other) if isinstance(other, MultiLabelCounts) else NotImplemented


def _check_arrays(
    targets: Targets | None,
    predicted: Bools,
    accepted: Bools | None,
    status: Mapping[str, int],
    num_classes: int,
) -> None:
    if not num_classes:
        raise ValueError("no classes; pass the class names of the bundle")
    rows = len(predicted)
    check_matrix("predicted", predicted, (rows, num_classes), "bool")
    if targets is not None:
        check_matrix("targets", targets, (rows, num_classes), "int8")
    if accepted is not None and accepted.shape != (rows,):
        raise ValueError(f"accepted has shape {accepted.shape}, expected ({rows},): one per row")
    if status.get("ok", 0) != rows:
        raise ValueError(f"status has {status.get('ok', 0)} ok rows, predicted has {rows}")


def _count_flags(accepted: Bools | None, is_ood: Bools | None) -> dict[str, Any]:
    nothing = np.zeros(0, dtype=np.bool_)
    accepted = nothing if accepted is None else accepted
    is_ood = nothing if is_ood is None else is_ood
    return {
        "accepted": int(np.count_nonzero(accepted)),
        "ood": int(np.count_nonzero(is_ood)),
        "ood_rows": len(is_ood),
    }


def _count_rows(
    targets: Targets | None, predicted: Bools, classes: tuple[str, ...]
) -> MultiLabelCounts:
    """Counts of all rows, without what `from_arrays` adds."""
    parts = (
        _count_block(None if targets is None else targets[part], predicted[part], classes)
        for part in split_rows(len(predicted), len(classes))
    )
    counts = reduce(add, parts, MultiLabelCounts.empty(classes))
    return replace(counts, unlabeled=len(predicted) - counts.labeled)


def _count_block(
    targets: Targets | None, predicted: Bools, classes: tuple[str, ...]
) -> MultiLabelCounts:
    """Counts of a block of rows, without what `from_arrays` adds."""
    predicted_in_rows = count_in_rows(predicted)
    counts = replace(
        MultiLabelCounts.empty(classes),
        predicted_counts=count_in_columns(predicted),
        predicted_square_sum=int((predicted_in_rows**2).sum()),
    )
    if targets is None:
        return counts
    check_targets(targets)
    known = targets >= 0
    is_complete = bool(known.all())
    # with partial labels, a prediction counts in known cells only
    called = predicted if is_complete else predicted & known
    positive = targets > 0
    hit = positive & predicted
    by_class = [count_in_columns(part) for part in (hit, called, positive, known)]
    in_row = [
        count_in_rows(hit),
        predicted_in_rows if is_complete else count_in_rows(called),
        count_in_rows(positive),
        np.full(len(targets), len(classes)) if is_complete else count_in_rows(known),
    ]
    tp, fp, fn, tn = _to_kinds(*by_class)
    return replace(
        counts,
        true_positives=tp,
        false_positives=fp,
        false_negatives=fn,
        true_negatives=tn,
        **_sum_rows(*in_row, num_classes=len(classes)),
    )


def _to_kinds(hits: Ints, called: Ints, positives: Ints, known: Ints) -> tuple[Ints, ...]:
    """TP, FP, FN and TN from the margins of a 2x2 table."""
    return hits, called - hits, positives - hits, known - called - positives + hits


def _sum_rows(
    hits: Ints, called: Ints, positives: Ints, known: Ints, *, num_classes: int
) -> dict[str, Any]:
    """Fields that are sums over labeled or complete rows, from the cells of each row."""
    complete = known == num_classes
    exact = complete & (hits == called) & (hits == positives)
    kinds = np.stack(_to_kinds(hits, called, positives, known)).astype(np.float64)
    either = called + positives
    # a row without a known cell has 0 everywhere and adds nothing
    values = np.stack(
        [
            2 * hits / np.maximum(either, 1),
            hits / np.maximum(called, 1),
            hits / np.maximum(positives, 1),
            hits / np.maximum(either - hits, 1),
        ]
    )
    labels = positives[complete]
    return {
        "labeled": int(np.count_nonzero(known)),
        "complete": int(np.count_nonzero(complete)),
        "exact": int(np.count_nonzero(exact)),
        "label_sum": int(labels.sum()),
        "label_square_sum": int((labels**2).sum()),
        "cell_moments": np.rint(kinds @ kinds.T).astype(np.int64),
        "sample_sums": values.sum(axis=1),
        "sample_square_sums": (values**2).sum(axis=1),
    }
