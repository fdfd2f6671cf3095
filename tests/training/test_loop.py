from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from imgcls.training.deal import deal
from imgcls.training.loop import training_loss
from imgcls.training.optim import OptimConfig, lr_factor, optimizer
from imgcls.training.progress import Epoch

INCEPTION = namedtuple("INCEPTION", ("logits", "aux_logits"))
GOOGLENET = namedtuple("GOOGLENET", ("logits", "aux_logits2", "aux_logits1"))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_mean_of_the_workers_gradients_is_that_of_the_whole_batch(workers: int) -> None:
    torch.manual_seed(0)
    network = nn.Linear(6, 4)
    images, labels = torch.randn(37, 6), torch.randint(0, 4, (37,))
    gradients = []
    for rank in range(workers):
        # as one step: 37 rows do not divide by 2 or 3
        (hand,) = deal(37, 37, rank=rank, workers=workers, epoch=1, seed=0)
        rows = torch.from_numpy(hand.rows)
        loss, _ = training_loss(network(images[rows]), labels[rows], 0.1)
        network.zero_grad()
        (loss * (workers / hand.batch)).backward()
        gradients.append(network.weight.grad.clone())
    network.zero_grad()
    F.cross_entropy(network(images), labels, label_smoothing=0.1).backward()
    torch.testing.assert_close(torch.stack(gradients).mean(0), network.weight.grad)


def test_auxiliary_heads_weigh_as_in_the_papers() -> None:
    torch.manual_seed(0)
    logits, first, second = torch.randn(3, 5, 4)
    labels = torch.randint(0, 4, (5,))
    main, one, two = (F.cross_entropy(x, labels, reduction="sum") for x in (logits, first, second))
    loss, found = training_loss(INCEPTION(logits, first), labels, 0.0)
    torch.testing.assert_close(loss, main + 0.4 * one)
    assert found is logits or torch.equal(found, logits)
    loss, _ = training_loss(GOOGLENET(logits, second, first), labels, 0.0)
    torch.testing.assert_close(loss, main + 0.3 * one + 0.3 * two)
    loss, _ = training_loss(GOOGLENET(logits, None, None), labels, 0.0)
    torch.testing.assert_close(loss, main)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    factors = [lr_factor(step, warmup=10, steps=100) for step in range(101)]
    assert factors[:10] == sorted(factors[:10])
    assert factors[10] == 1.0 == max(factors)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[0] > 0
    assert factors[100] == pytest.approx(0)


def test_biases_and_normalisation_are_left_free_of_decay() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    decayed, free = optimizer(network, OptimConfig(weight_decay=0.5)).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.5, 0.0)
    assert [p.dim() for p in decayed["params"]] == [4]
    assert [p.dim() for p in free["params"]] == [1, 1, 1]


def epoch(number: int = 1, accuracy: float = 0.5, loss: float = 1.0) -> Epoch:
    return Epoch(number, 0.4, 0.9, loss, accuracy, 1e-3, 1234.4, 4.13, 100, 10)


def test_accuracy_decides_which_epoch_is_best_and_loss_decides_ties() -> None:
    assert epoch().better_than(None)
    assert epoch(accuracy=0.6, loss=9.0).better_than(epoch())
    assert epoch(loss=0.9).better_than(epoch())
    assert not epoch(2).better_than(epoch(1)), "the first of equals stays"


def test_an_epoch_is_told_in_one_line() -> None:
    assert epoch(1, 0.94, 0.2111).line(10) == (
        "epoch  1/10  train loss 0.400 acc  90.0 %  val loss 0.211 acc  94.0 %"
        "  1,234 images/s  4.1 s"
    )
