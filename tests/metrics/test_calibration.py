from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgcls.metrics.calibration import (
    bin_edges,
    bin_index,
    ece_by_chance,
    ece_from_bins,
    expected_calibration_error,
    mce_from_bins,
)


def test_a_confidence_of_one_falls_in_the_last_bin_and_zero_in_the_first():
    assert bin_index(np.array([0.0, 1.0], np.float32), 15).tolist() == [0, 14]


@pytest.mark.parametrize("num_bins", [1, 2, 7, 15, 100])
def test_a_confidence_on_an_edge_belongs_to_the_bin_it_opens(num_bins):
    edges = bin_edges(num_bins)
    assert bin_index(edges[:-1], num_bins).tolist() == list(range(num_bins))


@given(st.lists(st.floats(0, 1), min_size=1), st.integers(1, 40))
def test_bins_are_those_of_numpy_histogram(confidence, num_bins):
    counted = np.bincount(bin_index(np.array(confidence), num_bins), minlength=num_bins)
    assert counted.tolist() == np.histogram(confidence, bin_edges(num_bins))[0].tolist()


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.1, 12.0])
def test_a_confidence_that_is_no_probability_is_refused(bad):
    with pytest.raises(ValueError, match="softmax scores, not logits"):
        bin_index(np.array([0.5, bad]), 15)


def test_a_rounding_error_above_one_is_tolerated():
    assert bin_index(np.array([1 + 1e-6, -1e-9]), 15).tolist() == [14, 0]


def test_bins_must_exist():
    with pytest.raises(ValueError, match="at least 1 bin"):
        bin_edges(0)


def test_a_worked_example_gives_the_hand_computed_error():
    confidence = np.array([0.95, 0.85, 0.65, 0.55])
    correct = np.array([True, False, True, False])
    # Two bins, all in the upper one: mean confidence 0.75, accuracy 0.5.
    assert expected_calibration_error(confidence, correct, num_bins=2) == pytest.approx(0.25)
    # Ten bins, one prediction each.
    assert expected_calibration_error(confidence, correct, num_bins=10) == pytest.approx(
        (0.05 + 0.85 + 0.35 + 0.55) / 4
    )


def test_a_calibrated_model_has_almost_no_error_and_a_boastful_one_has_its_boast():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 200_000)
    calibrated = rng.random(200_000) < confidence
    boastful = rng.random(200_000) < confidence - 0.2
    assert expected_calibration_error(confidence, calibrated) < 0.01
    assert expected_calibration_error(confidence, boastful) == pytest.approx(0.2, abs=0.01)


def test_the_error_is_the_weighted_mean_gap_of_the_paper():
    rng = np.random.default_rng(1)
    confidence, correct = rng.random(5000), rng.random(5000) < 0.6
    gaps = []
    for lower, upper in zip(bin_edges(15)[:-1], bin_edges(15)[1:], strict=True):
        inside = (confidence >= lower) & (confidence < upper)
        gap = abs(confidence[inside].mean() - correct[inside].mean())
        gaps.append(inside.mean() * gap)
    assert expected_calibration_error(confidence, correct) == pytest.approx(sum(gaps))


def test_the_error_of_nothing_is_refused_rather_than_nan():
    with pytest.raises(ValueError, match="undefined"):
        expected_calibration_error(np.array([]), np.array([], bool))
    with pytest.raises(ValueError, match="undefined"):
        ece_from_bins(np.zeros(15), np.zeros(15), np.zeros(15))


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\) and correct \(3,\)"):
        expected_calibration_error(np.array([0.5, 0.5]), np.array([True, False, True]))


@pytest.mark.parametrize("rows", [300, 3000])
def test_the_error_by_chance_is_what_a_calibrated_model_shows(rows: int) -> None:
    rng = np.random.default_rng(0)
    confidence = rng.beta(3, 1, rows)
    bins = bin_index(confidence, 15)
    by_chance = ece_by_chance(
        np.bincount(bins, minlength=15), np.bincount(bins, weights=confidence, minlength=15)
    )
    shown = [
        expected_calibration_error(confidence, rng.random(rows) < confidence) for _ in range(300)
    ]
    assert by_chance == pytest.approx(np.mean(shown), rel=0.06)


def test_the_largest_error_passes_over_bins_of_a_few_rows() -> None:
    count, correct = np.array([1, 600, 399]), np.array([1, 300, 390])
    confidence = np.array([0.1, 330.0, 380.0])
    assert mce_from_bins(count, confidence, correct) == pytest.approx(0.05)
    assert mce_from_bins(count, confidence, correct, min_share=0.0) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="undefined"):
        mce_from_bins(np.zeros(3), np.zeros(3), np.zeros(3))
