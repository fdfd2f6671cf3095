"""Tables of multi-label runs, compared with direct computation."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import (
    average_precision_score,
    precision_recall_curve,
    precision_recall_fscore_support,
)

from imgcls.metrics.intervals import wilson_interval
from imgcls.metrics.multilabel import (
    CooccurrenceCounts,
    MultiLabelCounts,
    RankingCounts,
    build_calibration_table,
    build_cooccurrence_table,
    build_multilabel_per_class,
    build_pr_curves,
    cooccurrence,
)
from tests.metrics.multilabel.rows import ADVERSARIAL, Rows, make_rows


def count(rows: Rows) -> tuple[MultiLabelCounts, RankingCounts]:
    return (
        MultiLabelCounts.from_arrays(rows.targets, rows.predicted, rows.classes),
        RankingCounts.from_arrays(rows.targets, rows.scores, rows.classes),
    )


def test_classes() -> None:
    rows = make_rows(400, 5, seed=3)
    counts, ranking = count(rows)
    table = build_multilabel_per_class(counts, ranking)
    assert table.column_names == [
        *("label", "support", "predicted"),
        *("true_positives", "false_positives", "false_negatives", "true_negatives"),
        *("precision", "precision_lower", "precision_upper"),
        *("recall", "recall_lower", "recall_upper", "f1", "f1_lower", "f1_upper"),
        *("average_precision", "auroc", "prevalence", "ece"),
    ]
    expected = precision_recall_fscore_support(rows.targets, rows.predicted)
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        np.testing.assert_allclose(table[name].to_numpy(), values)
    for row in table.to_pylist():
        low, high = wilson_interval(row["true_positives"], row["support"])
        assert (row["recall_lower"], row["recall_upper"]) == pytest.approx((low, high))
        assert row["f1_lower"] < row["f1"] < row["f1_upper"]
        assert row["prevalence"] == row["support"] / 400
    exact = rows.scores.astype(float)
    np.testing.assert_allclose(
        table["average_precision"].to_numpy(),
        average_precision_score(rows.targets, exact, average=None),
    )


def test_undefined_numbers_of_a_class_are_null() -> None:
    rows = ADVERSARIAL["absent classes"]
    rows.predicted[:, 2] = False
    row = build_multilabel_per_class(*count(rows)).to_pylist()[2]
    assert (row["support"], row["predicted"]) == (0, 0)
    for name in ("precision", "recall_lower", "f1_upper", "average_precision", "auroc"):
        assert row[name] is None
    unlabeled = MultiLabelCounts.from_arrays(None, rows.predicted, rows.classes)
    row = build_multilabel_per_class(unlabeled).to_pylist()[0]
    assert row["predicted"] == rows.predicted[:, 0].sum()
    assert {row[n] for n in row if n not in ("label", "predicted")} == {None}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_curves_have_the_points_of_scikit_learn(name: str) -> None:
    rows = ADVERSARIAL[name]
    table = build_pr_curves(count(rows)[1], max_points=10_000).to_pandas()
    for position, label in enumerate(rows.classes):
        curve = table[table.label == label]
        truth = rows.targets[:, position]
        assert len(curve) == len(np.unique(rows.scores[truth > 0, position]))
        if not truth.any():
            continue
        precision, recall, threshold = precision_recall_curve(
            truth, rows.scores[:, position].astype(float)
        )
        at = np.searchsorted(threshold, curve.threshold)
        np.testing.assert_allclose(threshold[at], curve.threshold)
        np.testing.assert_allclose(precision[at], curve.precision)
        np.testing.assert_allclose(recall[at], curve.recall)


def test_long_curves_keep_both_ends() -> None:
    rows = make_rows(3000, 2, seed=4)
    ranking = count(rows)[1]
    whole = build_pr_curves(ranking, max_points=10_000).to_pandas()
    short = build_pr_curves(ranking, max_points=20).to_pandas()
    for label in rows.classes:
        all_points, points = whole[whole.label == label], short[short.label == label]
        assert 15 <= len(points) <= 20 < len(all_points)
        assert points.iloc[0].tolist() == all_points.iloc[0].tolist()
        assert points.iloc[-1].tolist() == all_points.iloc[-1].tolist()
        assert points.threshold.is_monotonic_decreasing
        assert points.recall.diff().max() < 0.08
    with pytest.raises(ValueError, match="at least 2"):
        build_pr_curves(ranking, max_points=1)


def test_pairs_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(300, 6, seed=5, unknown=0.1)
    monkeypatch.setattr(cooccurrence, "_BLOCK_CELLS", 100)
    counts = CooccurrenceCounts.from_arrays(rows.targets, rows.predicted, rows.classes)
    positive = (rows.targets > 0).astype(int)
    assert counts.together.tolist() == (positive.T @ positive).tolist()
    known = rows.targets >= 0
    assert counts.predicted.tolist() == (positive.T @ (rows.predicted & known)).tolist()
    assert counts.known.tolist() == (positive.T @ known).tolist()
    halves = [
        CooccurrenceCounts.from_arrays(rows.targets[part], rows.predicted[part], rows.classes)
        for part in (slice(100, None), slice(100))
    ]
    merged = sum(halves, CooccurrenceCounts.empty(rows.classes))
    assert merged.together.tolist() == counts.together.tolist()
    assert merged.predicted.tolist() == counts.predicted.tolist()

    table = build_cooccurrence_table(counts).to_pylist()
    assert len(table) == 30
    for row in table:
        i, j = rows.classes.index(row["label"]), rows.classes.index(row["other"])
        assert i != j
        assert row["together"] == counts.together[i, j]
        assert row["share"] == pytest.approx(counts.together[i, j] / counts.known[i, j])
        assert row["predicted"] == counts.predicted[i, j]
        assert row["predicted_share"] == pytest.approx(counts.predicted[i, j] / counts.known[i, j])


def test_pairs_are_not_counted_for_too_many_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cooccurrence, "MAX_COOCCURRENCE_CLASSES", 5)
    rows = make_rows(20, 6)
    counts = CooccurrenceCounts.from_arrays(rows.targets, rows.predicted, rows.classes)
    counts = counts + CooccurrenceCounts.empty(rows.classes)
    assert counts.together.shape == (0, 0)
    assert build_cooccurrence_table(counts).num_rows == 0
    with pytest.raises(ValueError, match="different classes"):
        counts + CooccurrenceCounts.empty(["cat"])


def test_calibration_bins() -> None:
    rows = make_rows(500, 3, seed=6)
    ranking = count(rows)[1]
    table = build_calibration_table(ranking).to_pandas()
    assert len(table) == 45
    for position, label in enumerate(rows.classes):
        scores, truth = rows.scores[:, position].astype(float), rows.targets[:, position]
        for row in table[table.label == label].itertuples():
            inside = (scores >= row.bin_lower) & (scores < row.bin_upper)
            assert row[4] == inside.sum()
            if inside.any():
                assert row.mean_score == pytest.approx(scores[inside].mean())
                assert row.positive_share == pytest.approx(truth[inside].mean())
            else:
                assert np.isnan(row.mean_score)
