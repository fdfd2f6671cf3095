"""Metrics of multi-label runs: equal to scikit-learn, with intervals that contain the truth."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from imgcls.metrics.formatting import format_summary, format_value, list_headlines
from imgcls.metrics.multilabel import (
    MULTILABEL_METRICS,
    MultiLabelCounts,
    RankingCounts,
    compute_multilabel_metrics,
    metrics,
    ranking,
    registry,
)
from imgcls.metrics.registry import Estimate, find_headline
from imgcls.metrics.tables import Metric, build_summary_table
from tests.metrics.multilabel.rows import ADVERSARIAL, Rows, make_rows

NO_INTERVAL = {"rows", "ok", "labelled", "unlabelled", "unknown_label"}


def compute(rows: Rows, **options) -> dict[str, Metric]:
    counts = MultiLabelCounts.from_arrays(rows.targets, rows.predicted, rows.classes)
    scores = RankingCounts.from_arrays(rows.targets, rows.scores, rows.classes)
    found = compute_multilabel_metrics(counts, ranking=scores, **options)
    return {metric.name: metric for metric in found}


@pytest.mark.parametrize("name", [name for name in ADVERSARIAL if name != "one class"])
def test_metrics_equal_scikit_learn(name: str) -> None:
    rows = ADVERSARIAL[name]
    y, p, s = rows.targets, rows.predicted, rows.scores.astype(np.float64)
    found = compute(rows, resamples=3)
    for average in ("micro", "macro", "samples"):
        options = {"average": average, "zero_division": 0}
        assert found[f"f1_{average}"].value == pytest.approx(sk.f1_score(y, p, **options))
        precision = sk.precision_score(y, p, **options)
        assert found[f"precision_{average}"].value == pytest.approx(precision)
        assert found[f"recall_{average}"].value == pytest.approx(sk.recall_score(y, p, **options))
    expected = {
        "jaccard_samples": sk.jaccard_score(y, p, average="samples", zero_division=0),
        "subset_accuracy": sk.accuracy_score(y, p),
        "hamming_loss": sk.hamming_loss(y, p),
        "coverage_error": sk.coverage_error(y, s),
        "label_ranking_average_precision": sk.label_ranking_average_precision_score(y, s),
        "label_ranking_loss": sk.label_ranking_loss(y, s),
        "labels_per_row": y.sum(axis=1).mean(),
        "predicted_labels_per_row": p.sum(axis=1).mean(),
    }
    varied = (y.max(axis=0) > 0) & (y.min(axis=0) < 1)
    if varied.any():
        y, s = y[:, varied], s[:, varied]
        precisions = [sk.average_precision_score(*pair) for pair in zip(y.T, s.T, strict=True)]
        expected["mean_average_precision"] = np.mean(precisions)
        areas = [sk.roc_auc_score(*pair) for pair in zip(y.T, s.T, strict=True)]
        expected["auroc_macro"] = np.mean(areas)
    for key, value in expected.items():
        assert found[key].value == pytest.approx(value, abs=1e-6), key
    assert ("auroc_macro" in found) == varied.any()


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_each_interval_contains_its_value_and_has_a_width(name: str) -> None:
    for metric in compute(ADVERSARIAL[name]).values():
        if metric.name in NO_INTERVAL:
            assert metric.interval is None
            continue
        assert metric.interval is not None, metric.name
        low, high = metric.interval
        assert low <= metric.value <= high, metric.name
        assert low < high, metric.name
        assert low >= 0
        assert all(np.isfinite(metric.interval))


def test_partial_labels_count_known_cells_only() -> None:
    rows = make_rows(2000, 5, seed=1, unknown=0.4)
    known = rows.targets >= 0
    found = compute(rows, resamples=0)
    y, p = rows.targets[known], rows.predicted[known]
    assert found["f1_micro"].value == pytest.approx(sk.f1_score(y, p))
    assert found["hamming_loss"].value == pytest.approx((y != p).mean())
    by_class = [
        sk.f1_score(y[k], p[k])
        for y, p, k in zip(rows.targets.T, rows.predicted.T, known.T, strict=True)
    ]
    assert found["f1_macro"].value == pytest.approx(np.mean(by_class))
    assert found["mean_average_precision"].interval is None
    assert found["f1_micro"].interval is not None


def test_rows_without_labels_and_failed_rows() -> None:
    rows = make_rows(40, 3)
    counts = MultiLabelCounts.from_arrays(
        None,
        rows.predicted,
        rows.classes,
        status={"missing": 10, "ok": 40},
        accepted=np.arange(40) < 30,
        is_ood=np.arange(20) < 5,
    )
    found = {metric.name: metric.value for metric in compute_multilabel_metrics(counts)}
    assert found == {
        "rows": 50,
        "ok": 40,
        "status_missing": 10,
        "error_rate": 0.2,
        "labelled": 0,
        "unlabelled": 40,
        "predicted_labels_per_row": rows.predicted.sum() / 40,
        "coverage": 0.75,
        "ood_rate": 0.25,
    }
    with pytest.raises(ValueError, match="different classes"):
        compute_multilabel_metrics(counts, ranking=RankingCounts.empty(["cat"]))


def test_summary_and_headlines() -> None:
    found = compute(make_rows(500, 4, seed=2))
    table = build_summary_table(list(found.values()))
    assert table["metric"].to_pylist() == list(found)
    headlines = list_headlines(list(found))
    assert headlines[0] == "mean_average_precision"
    assert {"f1_micro", "f1_macro", "subset_accuracy", "labels_per_row"} <= set(headlines)
    assert len({find_headline(name) for name in headlines}) == len(headlines)
    text = format_summary(table)
    assert "mean average precision (mAP)" in text
    assert "labeled" in text
    assert format_value("labels_per_row", 2.5) == format_value("coverage_error", 2.5) == "2.5000"
    assert format_value("hamming_loss", 0.025) == "2.50%"


def test_a_new_metric_is_a_function_and_a_registry_line(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = registry.MultiLabelSpec(
        "lowest_recall",
        "lowest recall of a class",
        lambda s: Estimate(float((s.counts.true_positives / s.counts.support).min())),
    )
    monkeypatch.setattr(metrics, "MULTILABEL_METRICS", (*MULTILABEL_METRICS, spec))
    rows = make_rows(300, 3)
    recall = sk.recall_score(rows.targets, rows.predicted, average=None)
    assert compute(rows, resamples=0)["lowest_recall"].value == pytest.approx(recall.min())


SIMULATED = (
    "mean_average_precision",
    "auroc_macro",
    "average_precision_micro",
    "f1_micro",
    "precision_micro",
    "recall_micro",
    "f1_macro",
    "f1_samples",
    "subset_accuracy",
    "hamming_loss",
    "coverage_error",
    "label_ranking_loss",
    "log_loss",
    "brier_score",
    "labels_per_row",
)


@pytest.mark.parametrize("dependence", [0.0, 1.0])
def test_intervals_contain_the_value_of_all_rows(
    dependence: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "MAX_EXACT_CLASSES", 0)  # fewer bins to resample
    population = make_rows(100_000, 6, seed=5, density=0.25, dependence=dependence)
    truth = {name: metric.value for name, metric in compute(population, resamples=0).items()}
    rng, draws = np.random.default_rng(6), 300
    covered = dict.fromkeys(SIMULATED, 0)
    for _ in range(draws):
        sample = rng.integers(0, len(population.targets), 300)
        found = compute(Rows(*(array[sample] for array in population)), resamples=10)
        for name in SIMULATED:
            interval = found[name].interval
            assert interval is not None
            covered[name] += interval[0] <= truth[name] <= interval[1]
    assert min(covered.values()) >= 0.9 * draws, covered
