"""Drift against SciPy, and what it means at its ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import distance
from scipy.stats import entropy

from imgcls.metrics import PredictionCounts
from imgcls.metrics.drift import (
    compute_drift,
    jensen_shannon_divergence,
    maximum_mean_discrepancy,
    population_stability_index,
)
from imgcls.metrics.multilabel import MultiLabelCounts
from tests.evaluation.runs import drawn

cells = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=2, max_size=40)


@given(cells)
def test_both_are_scipys(pairs: list[tuple[int, int]]) -> None:
    now, then = (np.array(each) for each in zip(*pairs, strict=True))
    p, q = now + 0.5, then + 0.5
    expected = entropy(p, q) + entropy(q, p)
    assert population_stability_index(now, then) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if now.any() and then.any():
        expected = distance.jensenshannon(now, then, base=2) ** 2
        assert jensen_shannon_divergence(now, then) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_equal_shares_have_not_moved_and_disjoint_ones_have_nothing_in_common() -> None:
    some = np.array([10, 20, 70])
    assert population_stability_index(some, some) == 0
    assert jensen_shannon_divergence(some, 3 * some) == pytest.approx(0)
    assert jensen_shannon_divergence(np.array([5, 0]), np.array([0, 9])) == pytest.approx(1)


def counts(seed: int, **changes: object) -> PredictionCounts:
    table = drawn(4000, seed, **changes)  # type: ignore[arg-type]
    classes = changes.get("classes", ("ant", "bee", "cat", "dog", "eel"))
    return PredictionCounts.from_table(table, label_column=None, classes=classes)  # type: ignore[arg-type]


def test_another_draw_of_the_same_has_hardly_moved_and_a_duller_model_has() -> None:
    same = compute_drift(counts(1), counts(2)).to_pylist()
    assert [row["of"] for row in same] == ["predicted_label", "confidence"]
    assert all(row["psi"] < 0.02 and row["jensen_shannon"] < 0.01 for row in same)
    dull = compute_drift(counts(1, sharpness=0.0), counts(2, sharpness=4.0)).to_pylist()
    assert dull[1]["psi"] > 0.25
    assert (dull[1]["rows"], dull[1]["reference_rows"]) == (4000, 4000)


def test_classes_meet_by_name() -> None:
    other = counts(1, classes=("ant", "bee", "cat", "dog", "fox"))
    found = compute_drift(counts(1), other).to_pylist()[0]
    assert found["jensen_shannon"] > 0.15  # a fifth on either side has nothing to meet


def count_labels(
    seed: int, rates: Sequence[float], classes: Sequence[str] = ("ant", "bee", "cat")
) -> MultiLabelCounts:
    rng = np.random.default_rng(seed)
    predicted = rng.random((4_000, len(rates))) < np.array(rates)
    return MultiLabelCounts.from_arrays(None, predicted, classes)


def test_the_drift_of_several_labels_is_that_of_their_occurrences() -> None:
    rates = (0.5, 0.2, 0.02)
    (same,) = compute_drift(count_labels(1, rates), count_labels(2, rates)).to_pylist()
    assert (same["of"], same["rows"], same["reference_rows"]) == ("predicted_labels", 4_000, 4_000)
    assert same["psi"] < 0.01
    # a rare label becomes frequent; or every label does, which leaves their shares as they are
    for moved in ((0.5, 0.2, 0.4), (0.05, 0.02, 0.002)):
        (found,) = compute_drift(count_labels(1, moved), count_labels(2, rates)).to_pylist()
        assert found["psi"] > 0.25, moved
        assert found["jensen_shannon"] > 0.02


def test_the_labels_of_two_bundles_meet_by_name() -> None:
    first = count_labels(1, (0.5, 0.2), ("ant", "bee"))
    (same,) = compute_drift(first, count_labels(2, (0.2, 0.5), ("bee", "ant"))).to_pylist()
    assert same["psi"] < 0.01
    (other,) = compute_drift(first, count_labels(2, (0.5, 0.2), ("ant", "fox"))).to_pylist()
    assert other["psi"] > 0.25
    empty = MultiLabelCounts.empty(("ant", "bee"))
    assert compute_drift(empty, first).num_rows == 0
    # rows without any label are compared too
    (none,) = compute_drift(count_labels(1, (0.0, 0.0), ("ant", "bee")), first).to_pylist()
    assert none["psi"] > 0.25


def test_nothing_is_not_compared() -> None:
    empty = PredictionCounts.empty(("ant",))
    assert compute_drift(empty, counts(1)).num_rows == 0


def test_the_discrepancy_of_embeddings_is_that_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 3)).astype(np.float32), rng.normal(size=(7, 3)).astype(np.float32)
    every = np.concatenate([x, y]).astype(np.float64)
    pairs = [((a - b) ** 2).sum() for i, a in enumerate(every) for b in every[:i]]
    width = np.median(pairs)

    def mean(one: np.ndarray, other: np.ndarray, same: bool) -> float:
        values = [
            np.exp(-((a - b) ** 2).sum() / width)
            for i, a in enumerate(one.astype(np.float64))
            for j, b in enumerate(other.astype(np.float64))
            if not same or i != j
        ]
        return float(np.mean(values))

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    found, p_value = maximum_mean_discrepancy(x, y)
    assert found == pytest.approx(expected, abs=1e-9)
    assert 0 < p_value <= 1
    assert (
        maximum_mean_discrepancy(np.ones((5, 3), np.float32), np.ones((5, 3), np.float32))[1] == 1
    )


def test_the_p_value_is_uniform_without_drift_and_small_with_it() -> None:
    found = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        first, second = (rng.normal(size=(60, 8)).astype(np.float32) for _ in range(2))
        found.append(maximum_mean_discrepancy(first, second, permutations=99)[1])
        assert maximum_mean_discrepancy(first, second + 0.7, permutations=99)[1] == 0.01
    assert np.mean(found) == pytest.approx(0.5, abs=0.12)
    assert np.mean(np.array(found) <= 0.1) < 0.25
