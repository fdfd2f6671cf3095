"""The interval is Wilson's, and holds the true share as often as it says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from imgcls.metrics.intervals import (
    bootstrap_intervals,
    clipped,
    mean_interval,
    wilson_interval,
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


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).exponential(size=500)
    low, high = mean_interval(values.sum(), (values**2).sum(), 500)
    spread = 1.96 * values.std() / math.sqrt(500)
    assert (low, high) == pytest.approx((values.mean() - spread, values.mean() + spread), abs=1e-4)
    assert clipped((-0.1, 1.2), 0.0, 1.0) == (0.0, 1.0)
    assert clipped(None, 0.0, 1.0) is None
