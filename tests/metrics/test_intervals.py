"""The interval is Wilson's, and holds the true share as often as it says."""

from __future__ import annotations

import numpy as np
import pytest

from imgcls.metrics.intervals import wilson_interval


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
