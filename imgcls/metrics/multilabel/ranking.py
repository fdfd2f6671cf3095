"""Mergeable counts of the scores of multi-label rows: bins per class, and label rankings per row.

A ranking metric compares the scores of one row. Ranks are counted by comparing the score of each
label of a row with all scores of the row, so that the cost depends on the number of labels and no
row is sorted. Definitions, ties included, are those of scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from imgcls.metrics.columns import Bools, Floats, Ints
from imgcls.metrics.counts import SCORE_FLOOR
from imgcls.metrics.multilabel.matrices import (
    Targets,
    check_classes,
    check_matrix,
    check_targets,
    count_bits,
    count_in_rows,
    pack_rows,
    split_rows,
)
from imgcls.metrics.score_bins import ONE, compute_bin_shift, count_bins, view_bits

MAX_EXACT_CLASSES = 256
"""Up to this number of classes every float16 value has its own bin."""
COVERAGE, PRECISION, LOSS = 0, 1, 2
"""Positions in `ranking_sums`: coverage error, label ranking average precision and loss."""
LOG_LOSS, BRIER = 0, 1
"""Positions in `loss_square_sums` and `CELL_LOSSES`."""
CELL_LOSSES: tuple[Callable[[Floats], Floats], ...] = (
    lambda score: -np.log(np.clip(score, SCORE_FLOOR, 1.0)),
    lambda score: (1 - score) ** 2,
)
"""Losses of a cell by the score of its truth: of a cell without the label this is 1 - score."""

_BIN_CELLS = 4_000_000  # a block of rows, whose classes are binned one at a time
_ROW_CELLS = 1 << 17  # as 64-bit integers, they fit into the L2 cache
_RANKED_LABELS = 2048  # compared at once; their rows stay in the L2 cache

Bits = NDArray[np.uint16]


@dataclass(frozen=True, eq=False)
class RankingCounts:
    """Counts of labeled rows with the scores of all classes; C classes, B bins.

    Attributes
    ----------
    classes : tuple of str
        Class names.
    positive, negative : ndarray of int64, shape (C, B)
        Scores of the known cells of each class, with the label and without it, by float16 value
        (`score_bins`); in wider bins for more than `MAX_EXACT_CLASSES` classes.
    rows, positive_rows, complete : int
        Rows with a known cell, rows with a label, and rows with all cells known.
    positive_square_sum : int
        Sum over rows of the squared number of labels.
    ranking_sums, ranking_square_sums : ndarray of float64, shape (3,)
        Sums over complete rows of the coverage error, label ranking average precision and label
        ranking loss of a row, and of their squares.
    known_sum, known_square_sum : int
        Sums over rows of the number of known cells, and of its square.
    loss_sums, loss_square_sums, loss_known_sums : ndarray of float64, shape (2,)
        Sums over rows of the loss of all known cells of a row (log loss, Brier) by the scores as
        they are stored, of its square, and of it times the number of known cells.
    """

    classes: tuple[str, ...]
    positive: Ints
    negative: Ints
    rows: int
    positive_rows: int
    complete: int
    positive_square_sum: int
    ranking_sums: Floats
    ranking_square_sums: Floats
    known_sum: int
    known_square_sum: int
    loss_sums: Floats
    loss_square_sums: Floats
    loss_known_sums: Floats

    @classmethod
    def from_arrays(
        cls,
        targets: Targets,
        scores: NDArray[np.floating[Any]],
        classes: Sequence[str],
    ) -> RankingCounts:
        """Count N ok rows.

        Parameters
        ----------
        targets : ndarray of int8, shape (N, C)
            1: the class applies, 0: it does not, -1: unknown. A row of -1 is not counted.
        scores : ndarray of float16, shape (N, C)
            Scores in [0, 1]. Another float type is rounded to float16, except for the losses.
        classes : sequence of str
            The C class names.

        Returns
        -------
        RankingCounts

        Raises
        ------
        ValueError
            If a class name is repeated, shapes or types do not match, a target is not -1, 0 or 1,
            or a score is outside [0, 1].

        Examples
        --------
        >>> targets = np.array([[1, 0, 0]], np.int8)
        >>> scores = np.array([[0.5, 0.75, 0.25]], np.float16)
        >>> counts = RankingCounts.from_arrays(targets, scores, ["cat", "dog", "owl"])
        >>> counts.ranking_sums.tolist()
        [2.0, 0.5, 0.5]
        """
        if not classes:
            raise ValueError("no classes; pass the class names of the bundle")
        names = check_classes(classes)
        shape = (len(targets), len(names))
        check_matrix("targets", targets, shape, "int8")
        if not np.issubdtype(scores.dtype, np.floating):
            raise ValueError(f"scores are {scores.dtype}, expected float16")
        check_matrix("scores", scores, shape, str(scores.dtype))
        counts = cls.empty(names)
        positive, every = counts.positive, counts.negative
        sums = [_NO_ROWS]
        for part in split_rows(len(targets), len(names), _BIN_CELLS):
            check_targets(targets[part])
            # a float16 block is not copied
            block = np.ascontiguousarray(scores[part].astype(np.float16, copy=False))
            bits = view_bits(block)
            if bits.max(initial=0) > ONE:
                bits = np.minimum(bits, ONE)
            _count_scores(targets[part], bits, positive, every)
            sums.append(_sum_rows(targets[part], bits, scores[part]))
        merged = _RowSums(*(reduce(add, column) for column in zip(*sums, strict=True)))
        return cls(names, positive, every - positive, *merged)

    @classmethod
    def empty(cls, classes: Sequence[str]) -> RankingCounts:
        """Counts of no rows. Raises ValueError if a name is repeated."""
        names = check_classes(classes)
        bins = count_bins(compute_bin_shift(len(names), MAX_EXACT_CLASSES))
        zero = np.zeros((len(names), bins), dtype=np.int64)
        return cls(names, zero, zero.copy(), *_NO_ROWS)

    def __add__(self, other: object) -> RankingCounts:
        """Counts of the rows of both. Raises ValueError if the classes differ."""
        if not isinstance(other, RankingCounts):
            return NotImplemented
        if self.classes != other.classes:
            raise ValueError("cannot merge counts over different classes")
        names = [field.name for field in fields(self) if field.name != "classes"]
        merged = {name: getattr(self, name) + getattr(other, name) for name in names}
        return RankingCounts(classes=self.classes, **merged)


class _RowSums(NamedTuple):
    """Fields of `RankingCounts` that are sums over rows."""

    rows: int
    positive_rows: int
    complete: int
    positive_square_sum: int
    ranking_sums: Floats
    ranking_square_sums: Floats
    known_sum: int
    known_square_sum: int
    loss_sums: Floats
    loss_square_sums: Floats
    loss_known_sums: Floats


_NO_ROWS = _RowSums(0, 0, 0, 0, np.zeros(3), np.zeros(3), 0, 0, *(np.zeros(2) for _ in range(3)))


def _count_scores(targets: Targets, bits: Bits, positive: Ints, every: Ints) -> None:
    """Add the known cells to the bins of their classes: those with the label, and all.

    positive, every: (C, B), changed in place
    """
    classes, num_bins = positive.shape
    labels = np.flatnonzero(targets > 0)
    index = bits if num_bins > ONE else bits >> compute_bin_shift(classes, MAX_EXACT_CLASSES)
    np.add.at(positive.ravel(), labels % classes * num_bins + index.ravel()[labels], 1)
    if targets.min(initial=0) < 0:
        index = np.where(targets < 0, np.uint16(num_bins), index)  # one more bin, which is dropped
    # one class at a time: its bins fit into the cache, those of all classes do not
    for bins, values in zip(every, np.ascontiguousarray(index.T), strict=True):
        bins += np.bincount(values, minlength=num_bins + 1)[:num_bins]


def _sum_rows(targets: Targets, bits: Bits, scores: NDArray[np.floating[Any]]) -> _RowSums:
    """Sums over the rows of a block, in parts that fit into the cache."""
    parts = [
        _sum_part(targets[part], bits[part], scores[part])
        for part in split_rows(len(targets), targets.shape[1], _ROW_CELLS)
    ]
    return _RowSums(*(reduce(add, column) for column in zip(*parts, strict=True)))


def _sum_part(targets: Targets, bits: Bits, scores: NDArray[np.floating[Any]]) -> _RowSums:
    """Sums over a part of a block."""
    rows, classes = targets.shape
    positive, unknown = targets > 0, targets < 0
    labels, known = count_in_rows(positive), np.full(rows, classes)
    cells = bits
    if unknown.any():
        known -= count_in_rows(unknown)
        cells = np.where(unknown, np.uint16(ONE + 1), bits)
    if scores.dtype == np.float16:
        losses = _sum_losses(positive, cells)
    else:
        losses = _sum_exact_losses(positive, unknown, scores)
    if not (is_complete := known == classes).all():
        positive, bits = positive[is_complete], bits[is_complete]
    found = _rank_complete(positive, bits)
    return _RowSums(
        rows=int(np.count_nonzero(known)),
        positive_rows=int(np.count_nonzero(labels)),
        complete=len(positive),
        positive_square_sum=int((labels**2).sum()),
        ranking_sums=found.sum(axis=1),
        ranking_square_sums=(found**2).sum(axis=1),
        known_sum=int(known.sum()),
        known_square_sum=int((known**2).sum()),
        loss_sums=losses.sum(axis=1),
        loss_square_sums=(losses**2).sum(axis=1),
        loss_known_sums=losses @ known,
    )


def _build_loss_tables() -> tuple[Floats, Floats]:
    """Losses by the bits of a float16 score, (2, ONE + 2): without the label, the change by it.

    The last one is that of an unknown cell, 0. A score of 0 or 1 counts as the largest one, or
    smallest one, that is rounded to it: so it has a finite log loss.
    """
    score = np.arange(ONE + 1, dtype=np.uint16).view(np.float16).astype(np.float64)
    log_loss, brier = CELL_LOSSES
    pairs = (
        (log_loss(np.maximum(1 - score, _HALF_GAP)), log_loss(np.maximum(score, _HALF_TINY))),
        (brier(1 - score), brier(score)),
    )
    other, own = (np.stack([np.append(pair[side], 0.0) for pair in pairs]) for side in (0, 1))
    return other, own - other


_HALF_TINY, _HALF_GAP = 2.0**-25, 2.0**-12
_LOSS, _LOSS_CHANGE = _build_loss_tables()


def _sum_exact_losses(positive: Bools, unknown: Bools, scores: NDArray[np.floating[Any]]) -> Floats:
    """Losses of the cells of each row by scores that are not rounded, shape (2, N)."""
    truth = np.where(positive, scores, 1 - scores)
    losses = [np.where(unknown, 0, loss(truth)) for loss in CELL_LOSSES]
    return np.stack([loss.sum(axis=1, dtype=np.float64) for loss in losses])


def _sum_losses(positive: Bools, bits: Bits) -> Floats:
    """Losses of the cells of each row, shape (2, N)."""
    index = bits.astype(np.intp)
    cell = np.flatnonzero(positive)
    row, own = cell // positive.shape[1], index.ravel()[cell]
    found, ones = np.empty((2, len(bits))), np.ones(bits.shape[1])
    for position in (LOG_LOSS, BRIER):
        found[position] = _LOSS[position].take(index) @ ones  # faster than a sum of rows
        found[position] += np.bincount(row, _LOSS_CHANGE[position][own], len(bits))
    return found


def _rank_complete(positive: Bools, bits: Bits) -> Floats:
    """Coverage error, label ranking average precision and loss of each row, shape (3, N)."""
    rows, classes = positive.shape
    cell = np.flatnonzero(positive)
    row = cell // classes
    labels = np.bincount(row, minlength=rows)
    rank, label_rank = _count_ranks(positive, bits, row, cell)
    found = np.zeros((3, rows))
    found[PRECISION] = 1.0  # of a row without labels, or with all labels
    some = np.flatnonzero(labels)
    if len(some):
        first = np.searchsorted(row, some)  # cells are sorted by row
        found[COVERAGE, some] = np.maximum.reduceat(rank, first)
        mean = np.add.reduceat(label_rank / rank, first) / labels[some]
        found[PRECISION, some] = mean
        pairs = labels[some] * (classes - labels[some])
        lost = np.add.reduceat(rank - label_rank, first)
        found[LOSS, some] = np.where(pairs > 0, lost / np.maximum(pairs, 1), 0.0)
    return found


def _count_ranks(positive: Bools, bits: Bits, row: Ints, cell: Ints) -> tuple[Ints, Ints]:
    """Ranks of L labels, ties at the end: among all classes of the row, and among its labels.

    row, cell: (L,) row of each label, and position of its cell in the matrix
    """
    classes = positive.shape[1]
    packed = pack_rows(positive)
    score = bits.ravel()[cell]
    rank, label_rank = np.empty_like(cell), np.empty_like(cell)
    rows_of = np.empty((min(_RANKED_LABELS, len(cell)), classes), dtype=np.uint16)
    reached = np.zeros((len(rows_of), packed.shape[1] * 64), dtype=np.bool_)
    for start in range(0, len(cell), _RANKED_LABELS):
        part = slice(start, start + _RANKED_LABELS)
        size = len(row[part])
        values = bits.take(row[part], axis=0, out=rows_of[:size], mode="clip")
        np.greater_equal(values, score[part, None], out=reached[:size, :classes])
        above = pack_rows(reached[:size])
        rank[part] = count_bits(above)
        label_rank[part] = count_bits(above & packed[row[part]])
    return rank, label_rank
