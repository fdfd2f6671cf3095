"""Losses are sums that can be shared out, and what weighs rows leaves their mean weight at 1."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from imgcls.config import load
from imgcls.errors import ConfigError
from imgcls.training.augment.mix import mix_targets
from imgcls.training.config import LossConfig
from imgcls.training.optim.loss import TrainingLoss, compute_class_weights

INCEPTION = namedtuple("INCEPTION", ("logits", "aux_logits"))
GOOGLENET = namedtuple("GOOGLENET", ("logits", "aux_logits2", "aux_logits1"))
WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.0])
SETTINGS = [
    ({}, None),
    ({"label_smoothing": 0.1}, None),
    ({}, WEIGHTS),
    ({"label_smoothing": 0.1}, WEIGHTS),
    ({"focal_gamma": 2.0}, None),
    ({"focal_gamma": 2.0, "label_smoothing": 0.1}, WEIGHTS),
]


def batch(rows: int = 37, *, soft: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (rows, 4) that take gradients, and targets."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, 4, generator=generator, requires_grad=True)
    if soft:
        return logits, torch.rand(rows, 4, generator=generator).softmax(1)
    return logits, torch.randint(0, 4, (rows,), generator=generator)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("settings", "weights"), SETTINGS)
def test_parts_of_a_batch_add_up_to_the_whole(
    settings: dict[str, Any], weights: torch.Tensor | None, soft: bool
) -> None:
    loss = TrainingLoss(LossConfig(**settings), weights)
    logits, targets = batch(soft=soft)
    whole, _ = loss(logits, targets)
    (expected,) = torch.autograd.grad(whole, logits)
    sizes = [20, 1, 16]
    pairs = zip(logits.split(sizes), targets.split(sizes), strict=True)
    parts = [loss(*pair)[0] for pair in pairs]
    torch.testing.assert_close(sum(parts), whole)
    (found,) = torch.autograd.grad(sum(parts), logits)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("soft", [False, True])
def test_without_settings_it_is_the_cross_entropy(soft: bool) -> None:
    logits, targets = batch(soft=soft)
    loss, returned = TrainingLoss(LossConfig(), None)(logits, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, reduction="sum"))
    assert torch.equal(returned, logits)


@pytest.mark.parametrize("soft", [False, True])
def test_smoothing_and_weights_are_those_of_torch(soft: bool) -> None:
    logits, targets = batch(soft=soft)
    loss, _ = TrainingLoss(LossConfig(label_smoothing=0.1), WEIGHTS)(logits, targets)
    expected = F.cross_entropy(
        logits, targets, weight=WEIGHTS, label_smoothing=0.1, reduction="sum"
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_focal_loss_that_hardly_focuses_is_the_cross_entropy(
    smoothing: float, weights: torch.Tensor | None, soft: bool
) -> None:
    logits, targets = batch(soft=soft)
    plain, _ = TrainingLoss(LossConfig(label_smoothing=smoothing), weights)(logits, targets)
    focal, _ = TrainingLoss(LossConfig(label_smoothing=smoothing, focal_gamma=1e-7), weights)(
        logits, targets
    )
    torch.testing.assert_close(focal, plain)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_the_focal_loss_is_that_of_the_paper(gamma: float) -> None:
    logits, targets = batch(soft=False)
    loss, _ = TrainingLoss(LossConfig(focal_gamma=gamma), None)(logits, targets)
    score = logits.softmax(1)[torch.arange(37), targets]  # p_t
    torch.testing.assert_close(loss, (-((1 - score) ** gamma) * score.log()).sum())


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_a_row_that_is_right_beyond_doubt_spoils_no_focal_gradient(gamma: float) -> None:
    logits = torch.tensor([[60.0, 0.0, 0.0], [1.0, 2.0, 3.0]], requires_grad=True)
    loss, _ = TrainingLoss(LossConfig(focal_gamma=gamma), None)(logits, torch.tensor([0, 1]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(gradient).all()
    assert gradient[0].abs().max() < 1e-6
    assert gradient[1].abs().max() > 0.1


def test_half_precision_logits_are_summed_in_full() -> None:
    logits, targets = batch(soft=False)
    loss, returned = TrainingLoss(LossConfig(), None)(logits.bfloat16(), targets)
    assert (loss.dtype, returned.dtype) == (torch.float32, torch.float32)


def test_auxiliary_heads_weigh_as_in_the_papers() -> None:
    loss = TrainingLoss(LossConfig(), None)
    generator = torch.Generator().manual_seed(0)
    logits, first, second = torch.randn(3, 5, 4, generator=generator)
    labels = torch.tensor([0, 1, 2, 3, 0])
    main, one, two = (F.cross_entropy(x, labels, reduction="sum") for x in (logits, first, second))
    total, returned = loss(INCEPTION(logits, first), labels)
    torch.testing.assert_close(total, main + 0.4 * one)
    assert torch.equal(returned, logits)
    total, _ = loss(GOOGLENET(logits, second, first), labels)
    torch.testing.assert_close(total, main + 0.3 * one + 0.3 * two)
    total, _ = loss(GOOGLENET(logits, None, None), labels)
    torch.testing.assert_close(total, main)


# ------------------------------------------------------------------ class weights

NAMES = ["cat", "dog", "emu"]


def weights_of(setting: Any, counts: list[int]) -> list[float] | None:
    return compute_class_weights(LossConfig(class_weights=setting), NAMES, counts)


def test_without_class_weights_there_are_none() -> None:
    assert weights_of("none", [1, 2, 3]) is None


@given(st.lists(st.integers(1, 10**6), min_size=3, max_size=3))
def test_balanced_classes_weigh_the_same_in_total_and_rows_1_on_average(counts: list[int]) -> None:
    weights = weights_of("balanced", counts)
    assert weights is not None
    totals = [weight * count for weight, count in zip(weights, counts, strict=True)]
    assert totals == pytest.approx([sum(counts) / 3] * 3)
    assert sum(totals) / sum(counts) == pytest.approx(1)


def test_a_class_without_rows_has_a_finite_balanced_weight() -> None:
    assert weights_of("balanced", [0, 3, 3]) == pytest.approx([2, 2 / 3, 2 / 3])


def test_given_weights_keep_their_proportion_and_weigh_rows_1_on_average() -> None:
    counts = [10, 30, 60]
    weights = weights_of({"cat": 4, "emu": 0.5}, counts)
    assert weights is not None
    assert [weight / weights[1] for weight in weights] == pytest.approx([4, 1, 0.5])
    assert sum(w * n for w, n in zip(weights, counts, strict=True)) / 100 == pytest.approx(1)


def test_a_class_may_weigh_nothing_but_not_all_of_them() -> None:
    weights = weights_of({"cat": 0}, [2, 1, 1])
    assert weights == pytest.approx([0, 2, 2])
    with pytest.raises(
        ConfigError, match=r"loss\.class_weights: all weights are 0\. Set at least one"
    ):
        weights_of({"cat": 0, "dog": 0, "emu": 0}, [1, 1, 1])


def test_a_weight_for_no_class_is_refused_with_the_classes() -> None:
    with pytest.raises(ConfigError, match="no class 'cow'; the classes are cat, dog, emu"):
        weights_of({"dog": 2, "cow": 3}, [1, 1, 1])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--class-weights", "none"], "none"),
        (["--class-weights", "balanced"], "balanced"),
        (["--class-weights", "{cat: 2, 7: 0.5}"], {"cat": 2.0, "7": 0.5}),
    ],
)
def test_class_weights_can_be_passed_on_the_command_line(argv: list[str], expected: Any) -> None:
    assert load(LossConfig, argv).class_weights == expected


@pytest.mark.parametrize("value", ["{cat: -1}", "heavy", "null"])
def test_class_weights_of_another_kind_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="class_weights"):
        load(LossConfig, ["--class-weights", value])


# ------------------------------------------------------------------ soft targets of a teacher


def taught_batch(weight: float, temperature: float) -> tuple[torch.Tensor, ...]:
    """Logits of a student and of a teacher, labels, and the targets of both."""
    logits, labels = batch(soft=False)
    teacher = torch.randn(len(logits), 4, generator=torch.Generator().manual_seed(1))
    hard = (1 - weight) * F.one_hot(labels, 4).float()
    soft = weight * (teacher / temperature).softmax(1)
    return logits, teacher, labels, torch.cat([hard, soft], dim=1)


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1}])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(("weight", "temperature"), [(0.7, 3.0), (1.0, 1.0), (0.0, 2.0)])
def test_the_loss_is_that_of_hinton_and_of_the_labels_by_weight(
    settings: dict[str, Any], weights: torch.Tensor | None, weight: float, temperature: float
) -> None:
    logits, teacher, labels, targets = taught_batch(weight, temperature)
    config = LossConfig(**settings)
    loss = TrainingLoss(config, weights, temperature=temperature)(logits, targets)[0]
    divergence = F.kl_div(
        (logits / temperature).log_softmax(1), (teacher / temperature).softmax(1), reduction="sum"
    )
    hard = F.cross_entropy(
        logits, labels, weight=weights, reduction="sum", label_smoothing=config.label_smoothing
    )
    expected = weight * temperature**2 * divergence + (1 - weight) * hard
    torch.testing.assert_close(loss, expected)
    assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


def test_rows_without_a_label_or_without_scores_have_one_loss_each() -> None:
    logits, teacher, labels, _ = taught_batch(0.5, 2.0)
    soft = (teacher / 2).softmax(1)
    none = torch.zeros_like(soft)
    loss = TrainingLoss(LossConfig(label_smoothing=0.2), None, temperature=2.0)
    alone = loss(logits, torch.cat([none, soft], dim=1))[0]
    divergence = F.kl_div((logits / 2).log_softmax(1), soft, reduction="sum")
    torch.testing.assert_close(alone, 4 * divergence)
    hard = torch.cat([F.one_hot(labels, 4).float(), none], dim=1)
    torch.testing.assert_close(loss(logits, hard)[0], loss(logits, labels)[0])


def test_mixed_images_have_the_mixed_losses_of_both_targets() -> None:
    logits, _, _, targets = taught_batch(0.5, 2.0)
    share = torch.linspace(0.5, 1, len(logits))
    mixed = mix_targets(targets, share, 4)
    loss = TrainingLoss(LossConfig(), None, temperature=2.0)
    (found,) = torch.autograd.grad(loss(logits, mixed)[0], logits)
    parts = [loss(logits[[i]], each[[i]])[0] * weight[i]
             for i in range(len(logits))
             for each, weight in ((targets, share), (targets.roll(1, 0), 1 - share))]  # fmt: skip
    (expected,) = torch.autograd.grad(sum(parts), logits)
    torch.testing.assert_close(found, expected)


def test_correct_is_the_label_and_without_one_the_teachers_class() -> None:
    loss = TrainingLoss(LossConfig(), None, temperature=2.0)
    logits = torch.tensor([[2.0, 1], [2, 1], [1, 2]])
    targets = torch.tensor([[0, 0.1, 0.9, 0], [0, 0, 0.8, 0.2], [0, 0, 0.4, 0.6]])
    assert int(loss.count_correct(logits, targets)) == 2
