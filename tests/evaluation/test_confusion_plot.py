"""Confusion matrices: order of the classes and the most frequent mistakes."""

from __future__ import annotations

import dataclasses

import numpy as np

from imgcls.evaluation import confusion_plot
from imgcls.metrics import PredictionCounts


def test_confused_classes_are_adjacent() -> None:
    """Two groups, interleaved by name, that are confused within but never between."""
    rng = np.random.default_rng(0)
    names = [f"{i:02d}" for i in range(12)]
    label = rng.integers(0, 12, 4000)
    predicted = (label + 2 * rng.integers(0, 6, 4000)) % 12  # parity stays
    counts = PredictionCounts.empty(names)
    cells, number = np.unique(label * 12 + predicted, return_counts=True)
    counts = dataclasses.replace(
        counts, confusion_label=cells // 12, confusion_predicted=cells % 12, confusion_count=number
    )
    order = [int(name) % 2 for name in confusion_plot.build_matrix(counts, 24).classes]
    assert order in ([0] * 6 + [1] * 6, [1] * 6 + [0] * 6)
    worst = confusion_plot.build_matrix(counts, 5)
    assert len(worst.classes) == 5
    assert worst.omitted_classes == 7


def test_the_most_frequent_mistakes_come_first() -> None:
    counts = dataclasses.replace(
        PredictionCounts.empty(["a", "b"]),
        confusion_label=np.array([0, 0, 1]),
        confusion_predicted=np.array([0, 1, 0]),
        confusion_count=np.array([6, 2, 5]),
    )
    assert confusion_plot.find_worst_pairs(counts, 9) == [
        {"label": "b", "predicted": "a", "count": 5, "share": 1.0},
        {"label": "a", "predicted": "b", "count": 2, "share": 0.25},
    ]
