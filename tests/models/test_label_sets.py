"""Conformal label sets: their nonconformity, thresholds, and who is in a set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from imgcls.models.bundle import BundleSpec
from imgcls.models.label_sets import (
    ALWAYS_INCLUDED,
    LabelSets,
    build_set_column,
    choose_set_threshold,
    compute_nonconformity,
    find_label_sets,
    rank_nonconformity,
)
from imgcls.models.single_label import SINGLE_LABEL

CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


def draw_scores(rows: int, classes: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, classes)) * 2
    scores = np.exp(logits)
    return (scores / scores.sum(1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_nonconformity_is_the_sum_of_the_scores_ranked_above(penalty: float) -> None:
    scores = draw_scores(50, 7)
    scores[3, :4] = scores[3, 0]  # ties
    codes = np.random.default_rng(1).integers(0, 7, 50)
    found = compute_nonconformity(scores, codes, penalty)
    for row, code, value in zip(scores, codes, found, strict=True):
        above = [s for i, s in enumerate(row) if s > row[code] or (s == row[code] and i < code)]
        beyond = max(0, len(above) + 1 - 5)
        assert value == pytest.approx(sum(above) + penalty * beyond, abs=1e-6)


def test_the_threshold_is_the_quantile_with_one_more_row() -> None:
    values = np.random.default_rng(0).permutation(99).astype(np.float32)
    assert choose_set_threshold(values, 0.9) == 89
    assert choose_set_threshold(values, 0.905) == 90
    assert choose_set_threshold(values, 0.99) == 98
    assert choose_set_threshold(values, 0.991) is None
    assert choose_set_threshold(np.zeros(0, np.float32), 0.5) is None


def test_a_set_has_the_best_label_and_all_within_the_threshold() -> None:
    scores = np.array([[0.1, 0.6, 0.3], [0.05, 0.05, 0.9]], np.float32)
    order, is_included = find_label_sets(scores, LabelSets(coverage=0.9, thresholds=[0.7]))
    assert order.tolist() == [[1, 2, 0], [2, 0, 1]]
    assert is_included.tolist() == [[True, True, False], [True, False, False]]
    column = build_set_column(order, is_included, ["a", "b", "c"])
    assert column.to_pylist() == [["b", "c"], ["c"]]
    _, never = find_label_sets(scores, LabelSets(coverage=0.9, thresholds=[-1.0]))
    assert never.sum(1).tolist() == [1, 1]


def test_a_class_has_its_own_threshold() -> None:
    scores = np.array([[0.1, 0.6, 0.3]], np.float32)
    sets = LabelSets(coverage=0.9, thresholds=[ALWAYS_INCLUDED, 0.0, 0.5])
    order, is_included = find_label_sets(scores, sets)
    assert build_set_column(order, is_included, ["a", "b", "c"]).to_pylist() == [["b", "a"]]


@pytest.mark.parametrize("options", [{}, {"rank_penalty": 0.05}])
def test_new_rows_are_covered_as_often_as_asked(options: dict[str, Any]) -> None:
    """Over 200 splits the mean is that of the theory: between c and c + 1 / (n + 1)."""
    shares = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        scores = draw_scores(600, 7, seed)
        # labels by other scores: the model is not calibrated
        blurred = scores**0.5 / (scores**0.5).sum(1, keepdims=True)
        codes = (rng.random((600, 1)) > blurred.cumsum(1)).sum(1).clip(0, 6)
        values = compute_nonconformity(scores[:300], codes[:300], **options)
        threshold = choose_set_threshold(values, 0.8)
        assert threshold is not None
        sets = LabelSets(coverage=0.8, thresholds=[threshold], **options)
        order, is_included = find_label_sets(scores[300:], sets)
        shares.append(is_included[order == codes[300:, None]].mean())
    assert np.mean(shares) == pytest.approx(0.8, abs=0.01)


def test_the_column_follows_the_top_k_which_stays_the_same() -> None:
    scores = draw_scores(20, 7)
    sets = LabelSets(coverage=0.9, thresholds=[0.6])
    asked: dict[str, Any] = {"classes": CLASSES, "thresholds": [0.0] * 7, "top_k": 3}
    plain = SINGLE_LABEL.build_columns(scores, **asked)
    found = SINGLE_LABEL.build_columns(scores, **asked, label_sets=sets)
    assert list(found) == [*plain, "label_set"]
    assert all(found[name].equals(plain[name]) for name in plain)
    order, values = rank_nonconformity(scores)
    expected = [
        [CLASSES[i] for i in row[:n]] for row, n in zip(order, (values <= 0.6).sum(1), strict=True)
    ]
    assert found["label_set"].to_pylist() == expected
    names = [
        field.name for field in SINGLE_LABEL.build_fields(has_labels=True, has_label_sets=True)
    ]
    assert names[4:6] == ["topk_scores", "label_set"]
    empty = SINGLE_LABEL.build_columns(scores[:0], **asked, label_sets=sets)
    assert empty["label_set"].to_pylist() == []


def test_a_bundle_with_thresholds_of_other_classes_is_refused() -> None:
    fields: dict[str, Any] = {
        "architecture": {"source": "imgcls", "name": "small_cnn"},
        "classes": CLASSES,
        "preprocess": {"resize": 8, "crop": 8},
    }
    for thresholds in ([0.5], [0.5] * 7):
        BundleSpec(**fields, label_sets=LabelSets(coverage=0.9, thresholds=thresholds))
    with pytest.raises(ValueError, match="one threshold for all classes, or one per class"):
        BundleSpec(**fields, label_sets=LabelSets(coverage=0.9, thresholds=[0.5] * 3))
