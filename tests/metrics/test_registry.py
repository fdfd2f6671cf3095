"""The registry of metrics: unique names, and a new metric in one line."""

from __future__ import annotations

import pytest

from imgcls.metrics import PredictionCounts, registry, tables
from imgcls.metrics.multilabel import MULTILABEL_METRICS

CLASSES = [f"class {i}" for i in range(9)]


def test_a_new_metric_is_a_function_and_a_registry_line(make_predictions, monkeypatch):
    table = make_predictions(1500, CLASSES, seed=5)
    counts = PredictionCounts.from_table(table, label_column="label", classes=CLASSES)
    frame = table.to_pandas()
    spec = registry.MetricSpec(
        "worst_recall",
        "lowest recall of a class with labels",
        registry.FromConfusion(lambda c: float(c.recall[c.is_labeled].min())),
    )
    monkeypatch.setattr(tables, "METRICS", (*registry.METRICS, spec))
    found = {metric.name: metric for metric in tables.compute_metrics(counts, top_k=1)}
    correct = (frame.label == frame.predicted_label).groupby(frame.label).mean()
    assert found["worst_recall"].value == pytest.approx(correct.min())
    low, high = found["worst_recall"].interval
    assert 0 <= low <= correct.min() <= high <= 1
    assert "worst_recall" in tables.build_summary_table(list(found.values()))["metric"].to_pylist()


def test_names_of_metrics_and_headlines_are_unique_and_match():
    names = [spec.name for spec in registry.METRICS]
    others = [spec.name for spec in MULTILABEL_METRICS]
    assert len(names) == len(set(names))
    assert len(others) == len(set(others))
    assert set(registry.HEADLINES) <= {*names, *others}
    assert set(registry.MULTILABEL_UNITS) <= set(others) - set(names)
