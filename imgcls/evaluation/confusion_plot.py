"""A confusion matrix that stays readable: a table for few classes, a picture for many.

Classes that are taken for each other are put side by side, so that confusion shows as blocks along
the diagonal.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imgcls.metrics.columns import Floats, Ints
from imgcls.metrics.counts import PredictionCounts

MAX_TABLE_CLASSES = 24
MAX_PLOT_CLASSES = 1_000


@dataclass(frozen=True, eq=False)
class ConfusionMatrix:
    """Some classes of a confusion matrix, in an order that puts the confused side by side.

    counts: (n, n) int64, rows by label, columns by prediction
    left_out: classes that are not shown, those that are confused least
    """

    classes: list[str]
    counts: Ints
    omitted_classes: int

    @property
    def shares(self) -> Floats:
        """(n, n) of the labelled rows of each class, among the predictions shown."""
        shares: Floats = self.counts / np.maximum(self.counts.sum(1, keepdims=True), 1)
        return shares


def build_matrix(counts: PredictionCounts, most: int) -> ConfusionMatrix:
    """At most so many classes, those of the most frequent mistakes, clustered."""
    size = len(counts.classes)
    label, predicted = counts.confusion_label, counts.confusion_predicted
    number = counts.confusion_count
    seen = np.bincount(label, number, size) + np.bincount(predicted, number, size)
    occurring = np.flatnonzero(seen)
    chosen = np.sort(_select_most_confused(counts, occurring, most))
    place = np.full(size, -1)
    place[chosen] = np.arange(len(chosen))
    inside = (place[label] >= 0) & (place[predicted] >= 0)
    dense = np.zeros((len(chosen), len(chosen)), np.int64)
    np.add.at(dense, (place[label[inside]], place[predicted[inside]]), number[inside])
    order = _order_by_confusion(dense)
    names = [counts.classes[chosen[i]] for i in order]
    return ConfusionMatrix(names, dense[np.ix_(order, order)], len(occurring) - len(chosen))


def find_worst_pairs(counts: PredictionCounts, most: int) -> list[dict[str, Any]]:
    """The most frequent mistakes: label, predicted, count, share of the label's rows."""
    support = np.bincount(counts.confusion_label, counts.confusion_count, len(counts.classes))
    wrong = np.flatnonzero(counts.confusion_label != counts.confusion_predicted)
    order = wrong[np.argsort(-counts.confusion_count[wrong], kind="stable")[:most]]
    return [
        {
            "label": counts.classes[counts.confusion_label[i]],
            "predicted": counts.classes[counts.confusion_predicted[i]],
            "count": int(counts.confusion_count[i]),
            "share": float(counts.confusion_count[i] / support[counts.confusion_label[i]]),
        }
        for i in order
    ]


def render_matrix(found: ConfusionMatrix) -> str:
    """The matrix as a PNG data URI, a pixel per cell: blue on the diagonal, red beside it."""
    strength = np.sqrt(found.shares)
    diagonal = np.eye(len(found.classes), dtype=bool)
    # past the diagonal a few per cent already matter
    visible = np.where(diagonal, strength, np.minimum(1.0, 2.5 * strength))
    colour = np.where(diagonal[..., None], (37, 99, 235), (220, 38, 38))
    alpha = (255 * visible).round()[..., None]
    pixels = np.concatenate([colour, alpha], axis=2).astype(np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    scale = max(1, 800 // len(found.classes))
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    sink = io.BytesIO()
    image.save(sink, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(sink.getvalue()).decode()


def _select_most_confused(counts: PredictionCounts, occurring: Ints, most: int) -> Ints:
    """Both classes of the most frequent mistakes, then the most frequent ones, up to `most`."""
    if len(occurring) <= most:
        return occurring
    wrong = np.flatnonzero(counts.confusion_label != counts.confusion_predicted)
    order = wrong[np.argsort(-counts.confusion_count[wrong], kind="stable")]
    pairs = np.stack([counts.confusion_label[order], counts.confusion_predicted[order]], axis=1)
    named = np.concatenate([pairs.ravel(), occurring])
    _, first = np.unique(named, return_index=True)
    return named[np.sort(first)[:most]]


def _order_by_confusion(dense: Ints) -> NDArray[np.int64]:
    """An order in which classes that are confused stand together.

    By the Fiedler vector of the graph of mistakes: the second eigenvector of its Laplacian orders
    nodes so that connected ones are near. Source: Atkins, Boman, Hendrickson, "A Spectral
    Algorithm for Seriation", SIAM J. Comput. 28 (1998).
    """
    size = len(dense)
    mistakes = (dense + dense.T).astype(np.float64)
    np.fill_diagonal(mistakes, 0)
    if size < 3 or not mistakes.any():
        return np.arange(size)
    scale = np.sqrt(np.maximum(dense.sum(1), 1))
    weights = mistakes / np.outer(scale, scale)
    weights += 1e-6 * weights.max()  # one piece, whatever is confused with nothing
    laplacian = np.diag(weights.sum(1)) - weights
    _, vectors = np.linalg.eigh(laplacian)
    fiedler = vectors[:, 1]
    sign = np.sign(fiedler[np.argmax(np.abs(fiedler))])
    return np.argsort(sign * fiedler, kind="stable")
