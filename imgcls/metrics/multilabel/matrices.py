"""Checks and fast sums of the (N, C) matrices of multi-label rows: targets, predictions, scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imgcls.metrics.columns import Bools, Ints

Targets = NDArray[np.int8]
"""(N, C): 1 if a class applies to a row, 0 if it does not, -1 if this is unknown."""

_BLOCK_CELLS = 1 << 19  # matrices of this number of bytes stay in the L2 cache
_GROUP = 255  # sums of this number of bools fit into uint8


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """Names as a tuple. Raises ValueError if one is repeated."""
    if repeated := [name for name, times in Counter(classes).items() if times > 1]:
        raise ValueError(f"class names must be unique; repeated: {', '.join(repeated[:5])}")
    return tuple(classes)


def check_matrix(name: str, matrix: NDArray[Any], shape: tuple[int, int], kind: str) -> None:
    """Raise ValueError unless a matrix has this shape and numpy type."""
    if matrix.shape != shape or matrix.dtype != np.dtype(kind):
        raise ValueError(
            f"{name} is {matrix.dtype} {matrix.shape}, expected {kind} {shape}: rows by classes"
        )


def check_targets(targets: Targets) -> None:
    """Raise ValueError unless every value is -1, 0 or 1."""
    if targets.size and not (targets.min() >= -1 and targets.max() <= 1):
        raise ValueError(
            f"targets range over [{targets.min()}, {targets.max()}]; expected 1 (the class"
            " applies), 0 (it does not) or -1 (unknown)"
        )


def split_rows(rows: int, classes: int, cells: int = _BLOCK_CELLS) -> Iterator[slice]:
    """Slices of rows whose matrices have about `cells` cells."""
    block = max(1, cells // max(classes, 1))
    for start in range(0, rows, block):
        yield slice(start, min(start + block, rows))


def pack_rows(matrix: Bools) -> NDArray[np.uint64]:
    """Bits of a (N, C) matrix in words, shape (N, ceil(C / 64)); unused bits are 0."""
    rows, width = matrix.shape
    words = -(-width // 64)
    padded = matrix
    if width % 64:
        padded = np.zeros((rows, words * 64), dtype=np.bool_)
        padded[:, :width] = matrix
    return np.packbits(padded.ravel()).view(np.uint64).reshape(rows, words)


def count_bits(packed: NDArray[np.uint64]) -> Ints:
    """Set bits of each row of packed words, shape (N,)."""
    counted = np.bitwise_count(packed)
    total = np.zeros(len(packed), dtype=np.int64)
    for word in range(packed.shape[1]):
        total += counted[:, word]
    return total


def count_in_rows(matrix: Bools) -> Ints:
    """True cells of each row, shape (N,)."""
    return count_bits(pack_rows(matrix))


def count_in_columns(matrix: Bools) -> Ints:
    """True cells of each column, shape (C,); three times faster than a sum of int64."""
    cells = np.ascontiguousarray(matrix).view(np.uint8)
    rows, width = cells.shape
    full = rows // _GROUP * _GROUP
    groups = np.add.reduce(cells[:full].reshape(-1, _GROUP, width), axis=1, dtype=np.uint8)
    rest = np.add.reduce(cells[full:], axis=0, dtype=np.uint8)
    total: Ints = groups.sum(axis=0, dtype=np.int64) + rest
    return total
