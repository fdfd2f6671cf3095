"""Heat maps of pairs of classes: labels of one image, and labels against predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from imgcls.evaluation import confusion_plot
from imgcls.metrics.columns import Bools, Floats, Ints
from imgcls.metrics.formatting import format_percent
from imgcls.metrics.multilabel import CooccurrenceCounts

MAX_PAIRS = 30


@dataclass(frozen=True, eq=False)
class PairMatrix:
    """Counts of pairs of n classes, ordered so that classes that occur together are adjacent.

    together:  (n, n) rows with both labels, on the diagonal those of each label
    predicted: (n, n) rows with a label (first axis) that are predicted to have a class
    known:     (n, n) rows with a label for which it is known whether they have a class
    omitted_classes: number of classes that are not shown, the least frequent ones
    """

    classes: list[str]
    together: Ints
    predicted: Ints
    known: Ints
    omitted_classes: int

    @property
    def support(self) -> Ints:
        """(n,) rows with each label."""
        return np.diagonal(self.together)

    def compute_shares(self, counts: Ints) -> Floats:
        """(n, n) share of the rows of each label for which the class is known."""
        shares: Floats = counts / np.maximum(self.known, 1)
        return shares


def build_pair_matrix(pairs: CooccurrenceCounts, max_classes: int) -> PairMatrix:
    """The matrix of the most frequent classes, at most `max_classes`."""
    support = np.diagonal(pairs.together)
    occurring = np.flatnonzero(support)
    chosen = occurring[np.argsort(-support[occurring], kind="stable")[:max_classes]]
    chosen = np.sort(chosen)
    order = chosen[confusion_plot.order_by_confusion(pairs.together[np.ix_(chosen, chosen)])]
    inside = np.ix_(order, order)
    return PairMatrix(
        [pairs.classes[code] for code in order],
        pairs.together[inside],
        pairs.predicted[inside],
        pairs.known[inside],
        len(occurring) - len(chosen),
    )


def build_cells(matrix: PairMatrix) -> dict[str, Any]:
    """Rows of the two tables of a small matrix: labels together, and labels with predictions.

    A cell is blue for labels that occur together and for correct predictions, and red for classes
    that are predicted with a label more often than they occur with it.
    """
    together = matrix.compute_shares(matrix.together)
    predicted = matrix.compute_shares(matrix.predicted)
    diagonal = np.eye(len(matrix.classes), dtype=bool)
    excess = np.maximum(predicted - together, 0)
    others = np.where(diagonal, 0, together)  # with itself, each label occurs in all of its rows
    return {
        "together": _build_rows(matrix, others, others, ~diagonal),
        "predicted": _build_rows(
            matrix, predicted, np.where(diagonal, predicted, excess), diagonal
        ),
    }


def _build_rows(
    matrix: PairMatrix, shares: Floats, strength: Floats, is_good: Bools
) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "cells": [
                {
                    "text": _format_share(shares[row, column]),
                    "is_correct": bool(is_good[row, column]),
                    # text is readable on a color of at most 0.55
                    "strength": f"{0.55 * float(strength[row, column]) ** 0.5:.2f}",
                }
                for column in range(len(matrix.classes))
            ],
        }
        for row, name in enumerate(matrix.classes)
    ]


def _format_share(share: float) -> str:
    return format_percent(share, 0) if share >= 0.005 else ""


def render_pictures(matrix: PairMatrix) -> dict[str, str]:
    """The two heat maps of a large matrix as PNG data URIs, a pixel per cell."""
    together = matrix.compute_shares(matrix.together)
    predicted = matrix.compute_shares(matrix.predicted)
    diagonal = np.eye(len(together), dtype=bool)
    excess = np.minimum(1.0, 2.5 * np.sqrt(np.maximum(predicted - together, 0)))
    shown = np.where(diagonal, 0.0, np.sqrt(together))
    return {
        "together": confusion_plot.render_cells(shown, np.ones_like(diagonal)),
        "predicted": confusion_plot.render_cells(
            np.where(diagonal, np.sqrt(predicted), excess), diagonal
        ),
    }


def find_cooccurrence_errors(cooccurrence: pa.Table) -> list[dict[str, Any]]:
    """Pairs that are predicted more often than labeled, by the number of rows.

    cooccurrence: table of `build_cooccurrence_table`
    """
    excess = cooccurrence["predicted"].to_numpy() - cooccurrence["together"].to_numpy()
    order = np.argsort(-excess, kind="stable")[:MAX_PAIRS]
    worst: list[dict[str, Any]] = cooccurrence.take(order[excess[order] > 0]).to_pylist()
    return worst
