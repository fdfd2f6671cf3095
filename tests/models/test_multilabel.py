"""Multilabel classification: scores, decisions, columns and losses from logits."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from imgcls.data.decoding.preprocess import Preprocess
from imgcls.models.acceptance import NEVER_ACCEPT
from imgcls.models.bundle import Architecture, BundleSpec, VectorScaling
from imgcls.models.multilabel import MULTILABEL
from imgcls.models.ood import OodScores
from imgcls.models.task import ScoreScaling
from imgcls.runs.schema import build_prediction_schema

CLASSES = ["a", "b", "c"]
NAN = math.nan


def spec(**changes: object) -> BundleSpec:
    fields = {"architecture": Architecture(name="small_cnn"), "classes": CLASSES}
    task = {"task": "multilabel", "format_version": 2}
    return BundleSpec.model_validate({**fields, **task, "preprocess": Preprocess(), **changes})


def draw(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and targets of which every fifth is unknown."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, len(CLASSES), generator=generator)
    targets = torch.randint(0, 2, logits.shape, generator=generator).float()
    targets[torch.rand(logits.shape, generator=generator) < 0.2] = NAN
    return logits, targets


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, "is not that of multilabel"),
        ({"task": "single_label"}, "is not that of single_label"),
        (
            {"label_sets": {"coverage": 0.9, "thresholds": [0.5], "rank_penalty": 0.0}},
            "one label per image",
        ),
    ],
)
def test_a_description_that_contradicts_its_task_is_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        spec(**changes)


def test_scores_are_sigmoids_of_the_scaled_logits() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.0]])
    expected = 1 / (1 + np.exp(-logits.numpy() / 2))
    found = MULTILABEL.compute_scores(logits, ScoreScaling(2.0))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(MULTILABEL.activate(logits, ScoreScaling(2.0)), found)
    scaling = ScoreScaling(2.0, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.0, -1.0]))
    scaled = logits.numpy() / 2 * [1, 2, 3] + [0.5, 0, -1]
    found = MULTILABEL.compute_scores(logits, scaling)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-scaled)), rtol=1e-6)


def test_a_row_with_a_logit_that_is_not_finite_has_no_score() -> None:
    logits = torch.tensor([[0.0, math.inf, 0.0], [0.0, NAN, 0.0], [1.0, 2.0, 3.0]])
    found = MULTILABEL.compute_scores(logits, ScoreScaling())
    assert found.isnan().all(1).tolist() == [True, True, False]


@pytest.mark.parametrize("scaled", [False, True])
def test_added_scaling_applies_to_the_scores_as_they_were(scaled: bool) -> None:
    logits, _ = draw(50)
    old = VectorScaling(scale=[2.0, 0.5, 1.0], bias=[0.1, -0.2, 0.0]) if scaled else None
    before = spec(temperature=1.7, vector_scaling=old)
    scale, bias = np.array([0.5, 1.5, 2.0], np.float32), np.array([-1.0, 0.0, 1.0], np.float32)
    after = MULTILABEL.add_scaling(before, scale, bias)
    scores = MULTILABEL.compute_scores(logits, ScoreScaling.from_spec(before)).double()
    expected = (scores.logit() * torch.from_numpy(scale) + torch.from_numpy(bias)).sigmoid()
    found = MULTILABEL.compute_scores(logits, ScoreScaling.from_spec(after))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    once = MULTILABEL.add_scaling(before, np.array([0.5], np.float32), None)
    found = MULTILABEL.compute_scores(logits, ScoreScaling.from_spec(once))
    np.testing.assert_allclose(found, (scores.logit() * 0.5).sigmoid(), atol=1e-5)


def test_every_class_is_decided_by_its_own_threshold() -> None:
    scores = np.array([[0.9, 0.5, 0.2], [0.1, 0.2, 0.3], [1.0, 1.0, 1.0]], np.float32)
    found = MULTILABEL.decide(scores, [0.5, 0.5, NEVER_ACCEPT], 2)
    assert found.is_predicted is not None
    assert found.is_predicted.tolist() == [[True, True, False], [False] * 3, [True, True, False]]
    assert found.accepted.tolist() == [True, False, True]
    assert found.classes.tolist() == [[0, 1], [2, 1], [0, 1]]


def test_columns_have_the_predicted_labels_best_first_and_every_score() -> None:
    scores = np.array([[0.6, 0.9, 0.6], [0.1, 0.2, 0.3]], np.float32)
    columns = MULTILABEL.build_columns(scores, CLASSES, [0.5] * 3, top_k=2, scores_type="float16")
    assert columns["predicted_labels"].to_pylist() == [["b", "a", "c"], []]
    assert columns["accepted"].to_pylist() == [True, False]
    assert columns["topk_labels"].to_pylist() == [["b", "a"], ["c", "b"]]
    assert columns["scores"].type == pa.list_(pa.float16(), 3)
    np.testing.assert_allclose(columns["scores"].to_pylist(), scores, atol=5e-4)
    schema = build_prediction_schema(labeled=True, scores=3, scores_type="float16", task=MULTILABEL)
    assert set(columns) < set(schema.names)
    assert {schema.field(name).type == column.type for name, column in columns.items()} == {True}
    assert "predicted_label" not in schema.names


def test_no_row_unlike_the_training_data_is_accepted() -> None:
    scores = np.full((2, 3), 0.9, np.float32)
    ood = OodScores(np.array([0.1, 0.9], np.float32), np.array([False, True]))
    columns = MULTILABEL.build_columns(scores, CLASSES, [0.5] * 3, top_k=1, ood=ood)
    assert columns["accepted"].to_pylist() == [True, False]
    assert columns["is_ood"].to_pylist() == [False, True]


def test_no_row_gives_columns_without_rows() -> None:
    columns = MULTILABEL.build_columns(np.empty((0, 3), np.float32), CLASSES, [0.5] * 3, top_k=2)
    assert {len(column) for column in columns.values()} == {0}


# ------------------------------------------------------------------ loss


def test_the_loss_is_the_binary_cross_entropy_of_the_known_classes() -> None:
    logits, targets = draw(40)
    known = ~targets.isnan()
    expected = F.binary_cross_entropy_with_logits(logits[known], targets[known], reduction="sum")
    assert MULTILABEL.compute_loss(logits, targets).item() == pytest.approx(expected.item())
    rows = MULTILABEL.compute_row_losses(logits, targets)
    assert rows.sum().item() == pytest.approx(expected.item())
    weights = torch.tensor([2.0, 0.5, 1.0])
    terms = F.binary_cross_entropy_with_logits(
        logits, targets.nan_to_num(), pos_weight=weights, reduction="none"
    )
    found = MULTILABEL.compute_loss(logits, targets, weights=weights)
    assert found.item() == pytest.approx(terms[known].sum().item())


def test_an_unknown_class_has_no_gradient() -> None:
    logits, targets = draw(40)
    for options in ({}, {"focal_gamma": 2.0}, {"negative_gamma": 4.0, "negative_margin": 0.05}):
        leaf = logits.clone().requires_grad_()
        MULTILABEL.compute_loss(leaf, targets, **options).backward()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert (leaf.grad[targets.isnan()] == 0).all()
        assert (leaf.grad[~targets.isnan()] != 0).float().mean() > 0.5


@pytest.mark.parametrize(("own", "rest", "margin"), [(0.0, 4.0, 0.05), (1.0, 4.0, 0.2), (2, 2, 0)])
def test_the_asymmetric_loss_is_that_of_its_paper(own: float, rest: float, margin: float) -> None:
    logits, targets = draw(40)
    scores, known = logits.double().sigmoid(), ~targets.isnan()
    shifted = (scores - margin).clamp_min(0)
    positive = (1 - scores) ** own * scores.log()
    negative = shifted**rest * (1 - shifted).log()
    expected = -(targets * positive + (1 - targets) * negative)[known].sum()
    found = MULTILABEL.compute_loss(
        logits, targets, focal_gamma=own, negative_gamma=rest, negative_margin=margin
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_losses_of_saturated_logits_and_their_gradients_are_finite() -> None:
    logits = torch.tensor([[200.0, -200.0, 0.0], [-200.0, 200.0, 0.0]], requires_grad=True)
    targets = torch.tensor([[0.0, 1.0, NAN], [0.0, 1.0, 1.0]])
    for options in ({}, {"focal_gamma": 0.5}, {"negative_gamma": 4.0, "negative_margin": 0.05}):
        logits.grad = None
        loss = MULTILABEL.compute_loss(logits, targets, **options)
        loss.backward()
        assert loss.isfinite()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


def test_smoothing_moves_every_known_target_towards_one_half() -> None:
    logits, targets = draw(40)
    known = ~targets.isnan()
    smooth = targets * 0.8 + 0.1
    expected = F.binary_cross_entropy_with_logits(logits[known], smooth[known], reduction="sum")
    found = MULTILABEL.compute_loss(logits, targets, label_smoothing=0.2)
    assert found.item() == pytest.approx(expected.item())


def test_correct_decisions_are_counted_as_a_share_of_the_known_classes_of_each_row() -> None:
    logits = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, 1.0]])
    targets = torch.tensor([[1.0, 1.0, NAN], [1.0, 0.0, 0.0]])
    found = MULTILABEL.count_correct(logits, targets)
    assert found.item() == pytest.approx(1 / 2 + 1 / 3)
