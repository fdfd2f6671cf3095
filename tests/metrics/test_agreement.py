"""Matthews, kappa and McNemar against scikit-learn, SciPy and counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score, matthews_corrcoef

from imgcls.metrics.agreement import (
    cohens_kappa,
    krippendorffs_alpha,
    matthews_correlation,
    mcnemar_test,
)


@given(
    pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=80),
)
def test_single_numbers_of_a_confusion_matrix_are_scikit_learns(
    pairs: list[tuple[int, int]],
) -> None:
    label, predicted = np.array(pairs).T
    support, margin = np.bincount(label, minlength=5), np.bincount(predicted, minlength=5)
    correct = int((label == predicted).sum())
    got = matthews_correlation(support, margin, correct)
    assert got == pytest.approx(matthews_corrcoef(label, predicted), abs=1e-9)
    kappa = cohens_kappa(support, margin, correct)
    if kappa is None:
        assert len({*label, *predicted}) == 1
    else:
        assert kappa == pytest.approx(cohen_kappa_score(label, predicted), abs=1e-9)


@pytest.mark.parametrize("times", [1, 10**3, 10**6])
def test_single_numbers_do_not_depend_on_the_number_of_rows(times: int) -> None:
    label = np.repeat([0, 0, 1, 1, 2, 2], [480, 120, 250, 50, 90, 10])
    predicted = np.repeat([0, 1, 1, 2, 2, 0], [480, 120, 250, 50, 90, 10])
    support, margin = np.bincount(label) * times, np.bincount(predicted) * times
    correct = int((label == predicted).sum()) * times
    assert matthews_correlation(support, margin, correct) == pytest.approx(
        matthews_corrcoef(label, predicted)
    )
    assert cohens_kappa(support, margin, correct) == pytest.approx(
        cohen_kappa_score(label, predicted)
    )


@given(only_a=st.integers(0, 300), only_b=st.integers(0, 300), both=st.integers(1, 1000))
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int, both: int) -> None:
    found = mcnemar_test(only_a + only_b + both, only_a, only_b)
    expected = 1.0
    if only_a + only_b:
        expected = binomtest(only_a, only_a + only_b, 0.5).pvalue
    assert found.p_value == pytest.approx(expected, abs=1e-9)
    assert found.lower <= found.difference <= found.upper
    assert found.difference == pytest.approx((only_b - only_a) / found.rows)


def test_large_counts_meet_the_exact_test() -> None:
    found = mcnemar_test(10**6, 5_000, 5_300)
    assert found.p_value == pytest.approx(binomtest(5_000, 10_300, 0.5).pvalue, rel=0.01)


def test_the_interval_holds_the_true_difference_about_95_times_of_100() -> None:
    rng = np.random.default_rng(0)
    shares = [0.05, 0.08, 0.87]  # only a, only b, neither or both
    draws = rng.multinomial(400, shares, size=2000)
    held = [
        found.lower <= 0.03 <= found.upper
        for found in (mcnemar_test(400, int(a), int(b)) for a, b, _ in draws)
    ]
    assert 0.93 <= np.mean(held) <= 0.97


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="no row"):
        mcnemar_test(0, 0, 0)


# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C: 4 observers, 12 units
OBSERVED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
]


def test_krippendorffs_alpha_is_that_of_the_published_example() -> None:
    values = np.array(OBSERVED)
    units = np.broadcast_to(np.arange(12), values.shape)
    known = values > 0
    nominal = krippendorffs_alpha(units[known], values[known])
    assert nominal == pytest.approx(0.743, abs=5e-4)
    scale = np.arange(6)
    squares = (scale[:, None] - scale[None, :]).astype(float) ** 2
    interval = krippendorffs_alpha(units[known], values[known], squares.__getitem__)
    assert interval == pytest.approx(0.849, abs=5e-4)


def test_krippendorffs_alpha_is_undefined_without_two_decisions_that_differ() -> None:
    assert krippendorffs_alpha(np.array([0, 1]), np.array([0, 1])) is None
    assert krippendorffs_alpha(np.array([0, 0]), np.array([3, 3])) is None
