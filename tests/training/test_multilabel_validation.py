"""Validation metrics of multilabel are those of scikit-learn, on any number of workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from imgcls.training.validation import EvalMetrics, MultiLabelAccumulator, shard_batches
from tests.training.team import Team

CPU = torch.device("cpu")
ROWS, CLASSES = 400, 5


def validation() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets with unknown cells; class 3 has no positive, class 4 no negative."""
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(ROWS, CLASSES, generator=generator) < 0.3).float()
    logits = 2 * targets - 1 + 1.5 * torch.randn(ROWS, CLASSES, generator=generator)
    targets[:, 3], targets[:, 4] = 0, 1
    targets[torch.rand(ROWS, CLASSES, generator=generator) < 0.1] = torch.nan
    return logits, targets


def evaluate(rank: int, workers: int) -> EvalMetrics:
    logits, targets = validation()
    accumulator = MultiLabelAccumulator(CLASSES, CPU)
    for rows in shard_batches(ROWS, 64, rank=rank, workers=workers):
        accumulator.update(logits[rows], targets[rows])
    return accumulator.compute()


def test_the_metrics_are_those_of_scikit_learn(alone: None) -> None:
    from sklearn.metrics import average_precision_score, recall_score

    logits, targets = validation()
    found, known = evaluate(0, 1), ~targets.isnan()
    assert found.rows == ROWS
    correct = ((logits >= 0) == (targets == 1))[known]
    assert found.accuracy == pytest.approx(correct.float().mean().item())
    precisions, recalls = [], []
    for code in range(CLASSES):
        own = known[:, code]
        truth, score = targets[own, code].numpy(), logits[own, code].numpy()
        sides = [side for side in (0, 1) if (truth == side).any()]
        recalls.append(np.mean([recall_score(truth, score >= 0, pos_label=side) for side in sides]))
        if len(sides) == 2:
            precisions.append(average_precision_score(truth, score))
    assert len(precisions) == 3
    assert found.mean_average_precision == pytest.approx(np.mean(precisions), abs=1e-3)
    assert found.balanced_accuracy == pytest.approx(np.mean(recalls))


def test_several_workers_get_the_metrics_of_one(alone: None, team: Team) -> None:
    expected = evaluate(0, 1)
    for workers in (2, 3):
        results = team.call(workers, evaluate)
        assert results == [results[0]] * workers
        assert results[0].loss == pytest.approx(expected.loss)
        assert results[0].mean_average_precision == expected.mean_average_precision
        assert results[0].accuracy == expected.accuracy


def test_a_network_that_diverged_has_a_loss_that_is_no_number(alone: None) -> None:
    accumulator = MultiLabelAccumulator(2, CPU)
    accumulator.update(torch.tensor([[torch.nan, torch.inf]]), torch.ones(1, 2))
    assert np.isnan(accumulator.compute().loss)
