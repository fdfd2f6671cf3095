"""Targets of images with labels, with a teacher's scores, and with both."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from imgcls.training.data.targets import (
    NO_LABEL,
    TargetTable,
    TeacherTargets,
    compute_log_scores,
)

SCORES = np.array([[0.9, 0.09, 0.01], [0.2, 0.5, 0.3], [1.0, 0.0, 0.0]], np.float16)
TABLE = TargetTable(
    3,
    teacher=TeacherTargets(
        compute_log_scores(SCORES),
        np.array([2, NO_LABEL, NO_LABEL]),
        temperature=2.0,
        weight=0.6,
    ),
)
CODES = np.array([1, 3, 4, 5])
"""An image with a label, with both, and two with scores alone."""


def test_soft_targets_are_the_softmax_of_log_scores_over_the_temperature() -> None:
    labels, soft = TABLE.encode_for_training(CODES).split(3, dim=1)
    scores = torch.tensor(SCORES.astype(np.float32)).clip(min=3e-8)
    expected = (scores.log() / 2).softmax(1)
    torch.testing.assert_close(soft[1], 0.6 * expected[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(soft[2:], expected[1:], atol=1e-3, rtol=1e-3)
    assert soft[0].tolist() == [0, 0, 0]
    torch.testing.assert_close(
        labels, torch.tensor([[0.0, 1, 0], [0, 0, 0.4], [0, 0, 0], [0, 0, 0]])
    )


@pytest.mark.parametrize(("classes", "top"), [(10, 20.0), (1000, 20.0), (1000, 40.0)])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_soft_targets_are_those_of_the_logits_of_a_confident_teacher(
    classes: int, top: float, temperature: float
) -> None:
    logits = torch.from_numpy(np.random.default_rng(5).normal(size=(4, classes))).float()
    logits[:, 0] = top
    logs = compute_log_scores(logits.softmax(1).numpy())
    labels = np.full(4, NO_LABEL)
    table = TargetTable(classes, teacher=TeacherTargets(logs, labels, temperature, weight=1.0))
    soft = table.encode_for_training(classes + np.arange(4))[:, classes:]
    expected = (logits / temperature).softmax(1)
    torch.testing.assert_close(soft, expected, atol=3e-3, rtol=0.02)


def test_scores_that_float16_rounded_to_zero_count_as_half_its_smallest_number() -> None:
    logs = compute_log_scores(np.array([[1.0, 0.0, 6e-8]], np.float16))
    np.testing.assert_allclose(np.exp(logs.astype(np.float64)), [[1.0, 3e-8, 6e-8]], rtol=0.02)
    assert np.isnan(compute_log_scores(np.array([[np.nan, 0.5]], np.float32))[0, 0])
    assert np.isfinite(compute_log_scores(np.array([[1.0, 0.0]], np.float32))).all()


def test_the_weights_of_an_image_add_up_to_one() -> None:
    torch.testing.assert_close(TABLE.encode_for_training(CODES).sum(1), torch.ones(4))
    torch.testing.assert_close(TABLE.blend(CODES).sum(1), torch.ones(4), atol=1e-3, rtol=0)


def test_the_label_decides_and_else_the_teacher() -> None:
    assert TABLE.find_labels(CODES).tolist() == [1, 2, NO_LABEL, NO_LABEL]
    assert TABLE.decide(CODES).tolist() == [1, 2, 1, 0]
    plain = TargetTable(3)
    assert plain.decide(np.array([2, 0])).tolist() == [2, 0]
    assert plain.encode_for_training(np.array([2, 0])).tolist() == [2, 0]


def test_multilabel_blends_the_scores_with_the_known_labels() -> None:
    sets = np.array([[1, 0, -1]], np.int8)
    taught = TeacherTargets(SCORES, np.array([0, NO_LABEL, NO_LABEL]), temperature=1.0, weight=0.5)
    table = TargetTable(3, sets, taught)
    found = table.encode_for_training(np.array([0, 1, 2]))
    expected = torch.tensor([[1, 0, torch.nan], [0.95, 0.045, 0.01], [0.2, 0.5, 0.3]])
    torch.testing.assert_close(found, expected, equal_nan=True, atol=1e-3, rtol=0)
    decided = table.decide(np.array([1, 2]))
    torch.testing.assert_close(
        decided, torch.tensor([[1, 0, torch.nan], [0, 1, 0]]), equal_nan=True
    )


@pytest.mark.parametrize(("table", "shape"), [(TABLE, (2, 6)), (TargetTable(3), (2,))])
def test_blank_targets_have_the_shape_of_the_others(
    table: TargetTable, shape: tuple[int, ...]
) -> None:
    assert (
        table.build_blank(2).shape == shape == table.encode_for_training(CODES[:1].repeat(2)).shape
    )
