"""Readable confusion matrix: a table for few classes, an image for many.

Few classes are in the order of the bundle. Of many, those that are confused are placed next to each
other, so that confusion shows as blocks along the diagonal.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imgcls.data.encode_image import build_data_uri
from imgcls.metrics.columns import Bools, Floats, Ints
from imgcls.metrics.counts import PredictionCounts
from imgcls.metrics.formatting import format_percent

MAX_TABLE_CLASSES = 30
MAX_PLOT_CLASSES = 1_000
_OTHER_CLASSES = "other classes"


@dataclass(frozen=True, eq=False)
class ConfusionMatrix:
    """Confusion matrix of some classes.

    counts: (n, n) int64, rows by label, columns by prediction
    row_totals, column_totals: (n,) int64, rows with each label and prediction, those with an
        omitted class included
    total: number of rows of all classes
    omitted_classes: number of classes that are not shown, the least confused ones
    """

    classes: list[str]
    counts: Ints
    row_totals: Ints
    column_totals: Ints
    total: int
    omitted_classes: int

    @property
    def shares(self) -> Floats:
        """(n, n) share of each label's rows."""
        shares: Floats = self.counts / np.maximum(self.row_totals, 1)[:, None]
        return shares


def build_matrix(counts: PredictionCounts, max_classes: int) -> ConfusionMatrix:
    """Build the matrix of the classes with the most frequent mistakes, at most `max_classes`.

    Up to `MAX_TABLE_CLASSES` classes in all are in the order of the bundle.
    """
    size = len(counts.classes)
    label, predicted = counts.confusion_label, counts.confusion_predicted
    number = counts.confusion_count
    support, frequency = (np.bincount(codes, number, size) for codes in (label, predicted))
    occurring = np.flatnonzero(support + frequency)
    chosen = np.sort(_select_most_confused(counts, occurring, max_classes))
    row = np.full(size, -1)
    row[chosen] = np.arange(len(chosen))
    inside = (row[label] >= 0) & (row[predicted] >= 0)
    dense = np.zeros((len(chosen), len(chosen)), np.int64)
    np.add.at(dense, (row[label[inside]], row[predicted[inside]]), number[inside])
    if len(occurring) > MAX_TABLE_CLASSES:
        order = order_by_confusion(dense)
        chosen, dense = chosen[order], dense[np.ix_(order, order)]
    return ConfusionMatrix(
        [counts.classes[code] for code in chosen],
        dense,
        support[chosen].astype(np.int64),
        frequency[chosen].astype(np.int64),
        int(number.sum()),
        len(occurring) - len(chosen),
    )


def build_matrix_table(matrix: ConfusionMatrix) -> dict[str, Any]:
    """Cells of a small matrix, with the totals, for the macro `matrix_table`.

    Omitted classes share a row and a column, so that the totals are sums.
    """
    counts, names = matrix.counts, list(matrix.classes)
    rows, columns = matrix.row_totals, matrix.column_totals
    if matrix.omitted_classes:
        right, below = rows - counts.sum(1), columns - counts.sum(0)
        corner = matrix.total - counts.sum() - right.sum() - below.sum()
        counts = np.block([[counts, right[:, None]], [below, corner]])
        rows, columns = (np.append(each, matrix.total - each.sum()) for each in (rows, columns))
        names.append(_OTHER_CLASSES)
    shown = len(matrix.classes)
    return {
        "classes": matrix.classes,
        "omitted_classes": matrix.omitted_classes,
        "columns": names,
        "rows": [
            {
                "name": name,
                "total": int(rows[row]),
                "cells": [
                    _build_cell(int(number), int(rows[row]), name, names[column])
                    | {"is_correct": row == column}
                    | ({"strength": 0} if shown in (row, column) else {})
                    for column, number in enumerate(counts[row])
                ],
            }
            for row, name in enumerate(names)
        ],
        "column_totals": columns.tolist(),
        "total": matrix.total,
    }


def _build_cell(count: int, total: int, label: str, predicted: str) -> dict[str, Any]:
    share = count / max(total, 1)
    # a few percent of mistakes already matter; text is readable on a color of at most 0.55
    visible = share if label == predicted else 2.5 * share
    percent = format_percent(share, 1)
    return {
        "count": count,
        "percent": percent,
        "strength": f"{0.55 * min(1.0, visible) ** 0.5:.2f}",
        "title": f"{count:,} of {total:,} images labeled {label} ({percent}): predicted "
        f"{predicted}",
    }


def find_confused_pairs(counts: PredictionCounts, max_pairs: int) -> list[dict[str, Any]]:
    """Most frequent mistakes: label, predicted, count, share of the label's rows."""
    support = np.bincount(counts.confusion_label, counts.confusion_count, len(counts.classes))
    wrong = np.flatnonzero(counts.confusion_label != counts.confusion_predicted)
    order = wrong[np.argsort(-counts.confusion_count[wrong], kind="stable")[:max_pairs]]
    return [
        {
            "label": counts.classes[counts.confusion_label[i]],
            "predicted": counts.classes[counts.confusion_predicted[i]],
            "count": int(counts.confusion_count[i]),
            "share": float(counts.confusion_count[i] / support[counts.confusion_label[i]]),
        }
        for i in order
    ]


def render_matrix(matrix: ConfusionMatrix) -> str:
    """Render the matrix as a PNG data URI, a pixel per cell: diagonal blue, mistakes red."""
    strength = np.sqrt(matrix.shares)
    diagonal = np.eye(len(matrix.classes), dtype=bool)
    # off the diagonal a few percent already matter
    return render_cells(np.where(diagonal, strength, np.minimum(1.0, 2.5 * strength)), diagonal)


def render_cells(visible: Floats, is_good: Bools) -> str:
    """Render a square matrix as a PNG data URI, a pixel per cell.

    visible: (n, n) opacity of each cell
    is_good: (n, n) cells in blue; the others are red
    """
    color = np.where(is_good[..., None], (37, 99, 235), (220, 38, 38))
    alpha = (255 * visible).round()[..., None]
    pixels = np.concatenate([color, alpha], axis=2).astype(np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    scale = max(1, 800 // len(visible))
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    sink = io.BytesIO()
    image.save(sink, "PNG", optimize=True)
    return build_data_uri(sink.getvalue(), "image/png")


def _select_most_confused(counts: PredictionCounts, occurring: Ints, max_classes: int) -> Ints:
    """Both classes of the most frequent mistakes, then the others, up to `max_classes`."""
    if len(occurring) <= max_classes:
        return occurring
    wrong = np.flatnonzero(counts.confusion_label != counts.confusion_predicted)
    order = wrong[np.argsort(-counts.confusion_count[wrong], kind="stable")]
    pairs = np.stack([counts.confusion_label[order], counts.confusion_predicted[order]], axis=1)
    named = np.concatenate([pairs.ravel(), occurring])
    _, first = np.unique(named, return_index=True)
    return named[np.sort(first)[:max_classes]]


def order_by_confusion(dense: Ints) -> NDArray[np.int64]:
    """Order in which confused classes are adjacent; dense: (n, n) counts of pairs.

    By the Fiedler vector of the graph of mistakes: the second eigenvector of its Laplacian orders
    nodes so that connected ones are close. Source: Atkins, Boman, Hendrickson, "A Spectral
    Algorithm for Seriation", SIAM J. Comput. 28 (1998).
    """
    size = len(dense)
    mistakes = (dense + dense.T).astype(np.float64)
    np.fill_diagonal(mistakes, 0)
    if size < 3 or not mistakes.any():
        return np.arange(size)
    scale = np.sqrt(np.maximum(dense.sum(1), 1))
    weights = mistakes / np.outer(scale, scale)
    weights += 1e-6 * weights.max()  # connects classes without mistakes
    laplacian = np.diag(weights.sum(1)) - weights
    _, vectors = np.linalg.eigh(laplacian)
    fiedler = vectors[:, 1]
    sign = np.sign(fiedler[np.argmax(np.abs(fiedler))])
    return np.argsort(sign * fiedler, kind="stable")
