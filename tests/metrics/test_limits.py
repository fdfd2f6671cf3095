"""Intervals at the edges: all rows right, one row, one class; and how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from imgcls.metrics import PredictionCounts, tables
from imgcls.metrics.intervals import Z_95, wilson_interval
from imgcls.metrics.tables import Metric

CLASSES = ["ant", "bee", "cat"]
LOWEST = {"matthews_correlation": -1.0, "cohens_kappa": -1.0}


def measured(
    label: list[str], predicted: list[str], confidence: float | list[float]
) -> dict[str, Metric]:
    rows = len(label)
    sure = np.broadcast_to(np.float32(confidence), rows)
    right = np.array(label) == np.array(predicted)
    table = pa.table(
        {
            "label": label,
            "predicted_label": predicted,
            "confidence": sure,
            "accepted": [True] * rows,
            "label_score": np.where(right, sure, (1 - sure) / 2),
            "label_rank": pa.array([1] * rows, pa.int32()),
            "status": ["ok"] * rows,
        }
    )
    counts = PredictionCounts.from_table(table, label_column="label", classes=CLASSES)
    return {each.name: each for each in tables.compute_metrics(counts, top_k=1)}


def interval(found: dict[str, Metric], name: str) -> tuple[float, float]:
    ends = found[name].interval
    assert ends is not None, name
    return ends


def check_possible(found: dict[str, Metric]) -> None:
    for name, metric in found.items():
        if metric.interval is not None:
            low, high = metric.interval
            highest = np.inf if name == "log_loss" else 1.0
            assert LOWEST.get(name, 0.0) <= low <= metric.value <= high <= highest, name
            assert high > low, name


def test_twenty_right_rows_of_one_class_have_wilsons_interval() -> None:
    found = measured(["ant"] * 20, ["ant"] * 20, 0.95)
    check_possible(found)
    low, _ = wilson_interval(20, 20)  # 0.8389
    for name in ("balanced_accuracy", "recall_macro", "precision_macro", "precision_weighted"):
        assert interval(found, name) == pytest.approx((low, 1.0)), name
    for name in ("f1_macro", "f1_weighted"):  # F1 = 2 J / (1 + J) of as many rows
        assert interval(found, name) == pytest.approx((2 * low / (1 + low), 1.0)), name
    # of one class no correlation is defined
    assert interval(found, "matthews_correlation") == (-1.0, 1.0)
    assert "cohens_kappa" not in found
    # accuracy may be 0.8389 where confidence is 0.95
    assert interval(found, "expected_calibration_error") == pytest.approx((0, 0.95 - low), abs=1e-6)
    # 3.84 more rows of this confidence that are wrong
    more, loss = Z_95**2, -np.log(0.05 / 2)
    expected = (20 * -np.log(0.95) + more * loss) / (20 + more)
    assert interval(found, "log_loss")[1] == pytest.approx(expected, rel=1e-5)


def test_twenty_right_rows_of_two_classes_are_known_less_by_class() -> None:
    names = ["ant", "bee"] * 10
    found = measured(names, names, 0.95)
    check_possible(found)
    miss = 1 - wilson_interval(10, 10)[0]  # of ten rows of each class
    low = 1 - np.sqrt(2 * (miss / 2) ** 2)
    assert interval(found, "balanced_accuracy") == pytest.approx((low, 1.0))
    accuracy = wilson_interval(20, 20)[0]
    assert interval(found, "cohens_kappa") == pytest.approx(((accuracy - 0.5) / 0.5, 1.0))
    # by hand: recall of one class at its limit, [[7.22, 2.78], [0, 10]], counts for each class
    one = (10 - 10 * miss) * 10 / np.sqrt(100 * (10 - 10 * miss) * (10 + 10 * miss))
    expected = 1 - np.sqrt(2) * (1 - one)
    assert interval(found, "matthews_correlation") == pytest.approx((expected, 1.0))


def test_a_class_of_two_rows_is_not_hidden_by_one_of_a_thousand() -> None:
    label = ["ant"] * 1000 + ["bee"] * 2
    found = measured(label, ["ant"] * 999 + ["cat"] + ["bee"] * 2, 0.9)
    check_possible(found)
    low, high = interval(found, "balanced_accuracy")
    assert low == pytest.approx(0.9995 - (1 - wilson_interval(2, 2)[0]) / 2, abs=0.002)
    assert high == pytest.approx(1.0, abs=0.001)


@pytest.mark.parametrize("predicted", ["ant", "bee"])
def test_one_row_gives_wide_intervals(predicted: str) -> None:
    found = measured(["ant"], [predicted], 0.97)
    check_possible(found)
    low, high = wilson_interval(int(predicted == "ant"), 1)
    assert interval(found, "balanced_accuracy") == pytest.approx((low, high))
    assert interval(found, "log_loss")[0] > 0


def test_all_wrong_rows_have_possible_intervals() -> None:
    check_possible(measured(["ant", "bee"] * 10, ["bee", "ant"] * 10, 0.6))
