"""Wilson intervals and bootstrap intervals: coverage, limits and possible values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from imgcls.metrics.intervals import (
    Z_95,
    auroc_limits,
    bootstrap_intervals,
    mover_interval,
    nonnegative_mean_interval,
    union_interval,
    wilson_interval,
    wilson_limits,
)


@pytest.mark.parametrize(
    ("correct", "rows", "expected"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_published_intervals_come_out(
    correct: int, rows: int, expected: tuple[float, float]
) -> None:
    assert wilson_interval(correct, rows) == pytest.approx(expected, abs=5e-5)


def test_it_stays_within_what_can_be() -> None:
    low, high = wilson_interval(100, 100)
    assert 0.96 < low < high == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 5)[0] == 0.0


def test_it_holds_the_true_share_in_95_of_100_cases() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for correct in rng.binomial(200, 0.9, 2000):
        low, high = wilson_interval(correct, 200)
        held += low <= 0.9 <= high
    assert 0.93 < held / 2000 < 0.97


def test_the_bootstrap_finds_the_interval_that_is_known() -> None:
    counts = np.array([700, 300])

    def share(cells: np.ndarray) -> dict[str, float]:
        return {"share": cells[0] / cells.sum()}

    low, high = bootstrap_intervals([counts], share, resamples=2000)["share"]
    assert (low, high) == pytest.approx(wilson_interval(700, 1000), abs=0.003)
    again = bootstrap_intervals([counts], share, resamples=2000)["share"]
    assert again == (low, high)
    assert bootstrap_intervals([counts], share, resamples=0) == {}


def test_many_shares_have_the_limits_of_each() -> None:
    correct, rows = np.array([81, 15, 0, 1, 20, 0]), np.array([263, 148, 20, 29, 20, 0])
    lower, upper = wilson_limits(correct, rows)
    for place, (right, of) in enumerate(zip(correct, rows, strict=True)):
        assert (lower[place], upper[place]) == pytest.approx(wilson_interval(right, of))


def test_one_share_keeps_its_limits_and_several_add_up_their_squares() -> None:
    assert mover_interval(0.9, np.array([0.2]), np.array([0.05])) == pytest.approx((0.7, 0.95))
    low, high = mover_interval(0.9, np.array([0.03, 0.04]), np.array([0.0, 0.0]))
    assert (low, high) == pytest.approx((0.85, 0.9))


def test_the_interval_of_a_mean_is_that_of_its_log() -> None:
    values = np.random.default_rng(0).exponential(size=500)
    low, high = nonnegative_mean_interval(values.sum(), (values**2).sum(), 500, 1.0)
    factor = math.exp(Z_95 * values.std() / math.sqrt(500) / values.mean())
    assert (low, high) == pytest.approx((values.mean() / factor, values.mean() * factor))


def test_equal_values_are_no_certainty_of_the_mean() -> None:
    # as z^2 more rows would have it, none of which was seen: 5 nats each, or 0
    more = Z_95**2
    low, high = nonnegative_mean_interval(20 * 0.05, 20 * 0.05**2, 20, 5.0)
    assert (low, high) == pytest.approx((1 / (20 + more), (1 + 5 * more) / (20 + more)))
    low, high = nonnegative_mean_interval(0.0, 0.0, 1, 2.0)
    assert (low, high) == pytest.approx((0.0, 2 * more / (1 + more)))


def test_the_limits_of_an_auroc_solve_newcombes_equation() -> None:
    auroc, positives, negatives = np.array([0.8, 1.0, 0.5]), np.array([30, 10, 5]), np.array(
        [50, 10, 95]
    )  # fmt: skip
    for ends in auroc_limits(auroc, positives, negatives):
        for true, seen, m, n in zip(ends, auroc, positives, negatives, strict=True):
            if true == seen:
                continue  # the upper limit of 1 is 1
            star = (m + n) / 2 - 1
            more = 1 + star * (1 - true) / (2 - true) + star * true / (1 + true)
            spread = Z_95 * math.sqrt(true * (1 - true) * more / (m * n))
            assert abs(true - seen) == pytest.approx(spread, abs=1e-9)
    lower, upper = auroc_limits(auroc, positives, negatives)
    assert (lower < auroc).all()
    assert (0 < lower[1] < 0.9, upper[1]) == (True, 1.0)


def test_joined_intervals_hold_all_and_stay_within_what_can_be() -> None:
    assert union_interval((0.2, 0.4), (0.3, 0.6), low=0.0, high=1.0) == (0.2, 0.6)
    assert union_interval((-0.1, 1.2), (0.3, 0.6), low=0.0, high=1.0) == (0.0, 1.0)
    assert union_interval(None, (0.3, 0.6), low=0.0, high=1.0) is None
