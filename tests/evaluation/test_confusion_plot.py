"""Confusion matrices: order of the classes and the most frequent mistakes."""

from __future__ import annotations

import dataclasses

import numpy as np

from imgcls.evaluation import confusion_plot
from imgcls.metrics import PredictionCounts


def test_confused_classes_are_adjacent() -> None:
    """Two groups, interleaved by name, that are confused within but never between."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 32, 40_000)
    predicted = (label + 2 * rng.integers(0, 16, 40_000)) % 32  # parity stays
    counts = count_pairs(32, label, predicted)
    order = [int(name) % 2 for name in confusion_plot.build_matrix(counts, 1000).classes]
    assert order in ([0] * 16 + [1] * 16, [1] * 16 + [0] * 16)
    worst = confusion_plot.build_matrix(counts, 5)
    assert len(worst.classes) == 5
    assert worst.omitted_classes == 27


def test_up_to_30_classes_are_in_the_order_of_the_bundle() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 30, 4000)
    counts = count_pairs(30, label, (label + 2 * rng.integers(0, 15, 4000)) % 30)
    limit = confusion_plot.MAX_TABLE_CLASSES
    assert confusion_plot.build_matrix(counts, limit).classes == list(counts.classes)


def test_the_totals_of_a_part_of_the_matrix_are_those_of_all_classes() -> None:
    rng = np.random.default_rng(1)
    label, predicted = rng.integers(0, 40, (2, 5000))
    matrix = confusion_plot.build_matrix(count_pairs(40, label, predicted), 30)
    table = confusion_plot.build_matrix_table(matrix)
    for row in table["rows"]:
        assert sum(cell["count"] for cell in row["cells"]) == row["total"]
    columns = zip(*(row["cells"] for row in table["rows"]), strict=True)
    assert [sum(cell["count"] for cell in cells) for cells in columns] == table["column_totals"]
    assert sum(table["column_totals"]) == table["total"] == 5000
    assert table["rows"][-1]["name"] == table["columns"][-1] == "other classes"
    first = table["rows"][0]
    number = int((label == int(first["name"])).sum())
    assert first["total"] == number
    cell = first["cells"][1]
    percent = f"{cell['count'] / number:.1%}"
    assert cell["percent"] == percent
    assert cell["title"] == (
        f"{cell['count']} of {number} images labeled {first['name']} ({percent}): predicted "
        f"{table['columns'][1]}"
    )


def count_pairs(size: int, label: np.ndarray, predicted: np.ndarray) -> PredictionCounts:
    """Counts of rows with these labels and predictions."""
    cells, number = np.unique(label * size + predicted, return_counts=True)
    return dataclasses.replace(
        PredictionCounts.empty([f"{i:02d}" for i in range(size)]),
        confusion_label=cells // size,
        confusion_predicted=cells % size,
        confusion_count=number,
    )


def test_the_most_frequent_mistakes_come_first() -> None:
    counts = dataclasses.replace(
        PredictionCounts.empty(["a", "b"]),
        confusion_label=np.array([0, 0, 1]),
        confusion_predicted=np.array([0, 1, 0]),
        confusion_count=np.array([6, 2, 5]),
    )
    assert confusion_plot.find_confused_pairs(counts, 9) == [
        {"label": "b", "predicted": "a", "count": 5, "share": 1.0},
        {"label": "a", "predicted": "b", "count": 2, "share": 0.25},
    ]
