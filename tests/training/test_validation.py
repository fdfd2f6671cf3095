"""Each validation row counts once, and the metrics do not depend on the number of workers."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from imgcls.training.validation import (
    EvalMetrics,
    SingleLabelAccumulator,
    all_reduce_sum,
    average_buffers,
    shard_batches,
)
from tests.training.team import Team

CPU = torch.device("cpu")
ROWS, CLASSES = 37, 6


def validation() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels; class 4 has no row, class 5 is predicted but has none either."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (ROWS,), generator=generator)
    return 2 * torch.randn(ROWS, CLASSES, generator=generator), labels


def evaluate(rank: int, workers: int, batch_size: int = 8) -> EvalMetrics:
    logits, labels = validation()
    accumulator = SingleLabelAccumulator(CLASSES, CPU)
    for rows in shard_batches(ROWS, batch_size, rank=rank, workers=workers):
        accumulator.update(logits[rows], labels[rows])
    return accumulator.compute()


@given(st.integers(0, 200), st.integers(1, 40), st.integers(1, 5))
def test_every_row_is_validated_once_in_equally_many_batches_of_the_size_asked_for(
    rows: int, batch_size: int, workers: int
) -> None:
    by_worker = [
        shard_batches(rows, batch_size, rank=rank, workers=workers) for rank in range(workers)
    ]
    assert len({len(batches) for batches in by_worker}) == 1
    everything = np.concatenate([batch for batches in by_worker for batch in batches])
    assert sorted(everything.tolist()) == list(range(rows))
    for step in zip(*by_worker, strict=True):
        assert sum(len(batch) for batch in step) <= batch_size + workers


def test_the_metrics_are_those_of_scikit_learn(alone: None) -> None:
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss

    logits, labels = validation()
    found = evaluate(0, 1)
    predicted, scores = logits.argmax(1), logits.double().softmax(1)
    assert set(predicted.tolist()) > set(labels.tolist()), "some classes are absent"
    assert found.rows == ROWS
    assert found.loss == pytest.approx(log_loss(labels, scores, labels=range(CLASSES)))
    assert found.accuracy == pytest.approx(accuracy_score(labels, predicted))
    # absent classes are left out of the mean recall, as there is nothing to recall
    recalls = [(predicted[labels == c] == c).float().mean().item() for c in range(4)]
    assert found.balanced_accuracy == pytest.approx(np.mean(recalls))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, predicted))


def test_several_workers_get_the_metrics_of_one(alone: None, team: Team) -> None:
    expected = evaluate(0, 1)
    for workers in (2, 3):
        results = team.call(workers, evaluate)
        assert results == [results[0]] * workers
        assert results[0].rows == expected.rows
        assert results[0].accuracy == expected.accuracy
        assert results[0].balanced_accuracy == expected.balanced_accuracy
        assert results[0].loss == pytest.approx(expected.loss, rel=1e-6)


def test_the_loss_is_the_mean_over_rows_and_not_over_batches(alone: None) -> None:
    logits, labels = validation()
    accumulator = SingleLabelAccumulator(CLASSES, CPU)
    accumulator.update(logits[:36], labels[:36])
    accumulator.update(logits[36:], labels[36:])
    assert accumulator.compute().loss == pytest.approx(
        float(F.cross_entropy(logits, labels)), rel=1e-5
    )


def averaged(rank: int, workers: int) -> tuple[dict[str, torch.Tensor], int]:
    """The state after averaging, and the number of all-reduces."""
    network = nn.Sequential(
        nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(3), nn.BatchNorm2d(1).double()
    )
    with torch.no_grad():
        network[0].weight.fill_(rank)
    network[1].running_mean.fill_(rank)
    network[1].running_var.fill_(10.0**rank)
    network[1].num_batches_tracked.fill_(5)
    network[2].register_buffer("grid", rank * torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    network[3].running_mean.fill_(rank + 0.1)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        average_buffers(network, workers)
    return network.state_dict(), all_reduce.call_count


def test_running_statistics_become_the_mean_of_the_workers(team: Team) -> None:
    for rank, (state, all_reduces) in enumerate(team.call(3, averaged)):
        torch.testing.assert_close(state["1.running_mean"], torch.full((2,), 1.0))
        torch.testing.assert_close(state["1.running_var"], torch.full((2,), 37.0))
        torch.testing.assert_close(state["2.grid"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        torch.testing.assert_close(
            state["3.running_mean"], torch.tensor([1.1], dtype=torch.float64), rtol=1e-12, atol=0
        )
        assert state["1.num_batches_tracked"] == 5
        assert torch.equal(state["0.weight"], torch.full_like(state["0.weight"], rank))
        assert all_reduces == 2, "one for each dtype"


def total(rank: int, workers: int) -> list[float]:
    return all_reduce_sum(torch.tensor([rank + 1.0, 0.5]))


def test_sums_are_over_all_workers_and_the_same_on_each(team: Team) -> None:
    assert team.call(3, total) == [[6.0, 1.5]] * 3
