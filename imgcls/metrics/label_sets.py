"""Coverage and size of label sets, over all rows and per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgcls.metrics.columns import Ints, encode_classes
from imgcls.metrics.intervals import Interval, nonnegative_mean_interval, wilson_interval

SET_COLUMN = "label_set"


@dataclass(frozen=True, eq=False)
class SetCounts:
    """Counts of rows with a label set; C classes.

    Attributes
    ----------
    classes : tuple of str
        Class names.
    labeled, covered, size_sum : ndarray of int64, shape (C,)
        By label: rows, rows whose set includes the label, and the sum of the sizes of the sets.
    sizes : ndarray of int64, shape (C + 1,)
        Rows, labeled or not, by the size of the set.
    """

    classes: tuple[str, ...]
    labeled: Ints
    covered: Ints
    size_sum: Ints
    sizes: Ints

    @classmethod
    def empty(cls, classes: Sequence[str]) -> SetCounts:
        """Counts of no rows."""
        zero, sizes = np.zeros(len(classes), np.int64), np.zeros(len(classes) + 1, np.int64)
        return cls(tuple(classes), zero, zero.copy(), zero.copy(), sizes)

    @classmethod
    def from_column(cls, column: pa.ChunkedArray, label: Ints, classes: Sequence[str]) -> SetCounts:
        """Count rows.

        Parameters
        ----------
        column : pyarrow.ChunkedArray
            N lists of class names; null for rows of a bundle without label sets, as a history of
            several bundles may have, which are not counted.
        label : ndarray of int64, shape (N,)
            Class indices, negative without a label that is a class.
        classes : sequence of str
            The C class names.

        Returns
        -------
        SetCounts

        Raises
        ------
        ValueError
            If a list is larger than the number of classes.

        Examples
        --------
        >>> sets = pa.chunked_array([[["cat"], ["dog", "cat"]]])
        >>> counts = SetCounts.from_column(sets, np.array([1, 1]), ["cat", "dog"])
        >>> counts.covered.tolist(), counts.labeled.tolist(), counts.sizes.tolist()
        ([0, 1], [0, 2], [0, 1, 1])
        """
        label = label[column.is_valid().to_numpy()]
        column = column.drop_null()
        size = pc.list_value_length(column).to_numpy().astype(np.int64)
        count = len(classes)
        if len(size) and size.max() > count:
            raise ValueError(f"column {SET_COLUMN!r} has {size.max()} labels of {count} classes")
        member = encode_classes(pc.list_flatten(column), classes)
        row = np.repeat(np.arange(len(size)), size)
        is_covered = np.bincount(row[member == label[row]], minlength=len(size)) > 0
        known = label >= 0
        return cls(
            tuple(classes),
            np.bincount(label[known], minlength=count).astype(np.int64),
            np.bincount(label[known & is_covered], minlength=count).astype(np.int64),
            np.bincount(label[known], size[known], count).astype(np.int64),
            np.bincount(size, minlength=count + 1).astype(np.int64),
        )

    def __add__(self, other: SetCounts) -> SetCounts:
        """Counts of the rows of both. Raises ValueError if the classes differ."""
        if self.classes != other.classes:
            raise ValueError("cannot merge counts over different classes")
        return SetCounts(
            self.classes,
            self.labeled + other.labeled,
            self.covered + other.covered,
            self.size_sum + other.size_sum,
            self.sizes + other.sizes,
        )


def estimate_mean_size(counts: SetCounts) -> tuple[float, Interval] | None:
    """Mean number of labels of a set and its 95% interval; None without rows.

    Parameters
    ----------
    counts : SetCounts

    Returns
    -------
    tuple of (float, Interval) or None
    """
    rows = int(counts.sizes.sum())
    if not rows:
        return None
    size = np.arange(len(counts.sizes))
    total, squares = float(counts.sizes @ size), float(counts.sizes @ size**2)
    worst = len(counts.classes)
    return total / rows, nonnegative_mean_interval(total, squares, rows, worst)


def build_set_columns(counts: SetCounts) -> dict[str, pa.Array]:
    """Coverage of the label sets with its 95% Wilson interval, and their mean size, by class.

    Parameters
    ----------
    counts : SetCounts

    Returns
    -------
    dict of str to pyarrow.Array
        C values of set_coverage, set_coverage_lower, set_coverage_upper and mean_set_size; null for
        classes without labels.
    """
    rows: list[tuple[float | None, ...]] = []
    for total, covered, size in zip(counts.labeled, counts.covered, counts.size_sum, strict=True):
        if total:
            ends = wilson_interval(int(covered), int(total))
            rows.append((covered / total, *ends, size / total))
        else:
            rows.append((None, None, None, None))
    names = ("set_coverage", "set_coverage_lower", "set_coverage_upper", "mean_set_size")
    return {
        name: pa.array(values, pa.float64())
        for name, values in zip(names, zip(*rows, strict=True), strict=True)
    }
