"""The fitted head maximizes the penalized likelihood, on any number of workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from imgcls.data.decoding.preprocess import Preprocess
from imgcls.errors import BundleError
from imgcls.models import zoo
from imgcls.training.config import ModelConfig, TrainConfig
from imgcls.training.data.batches import Batch
from imgcls.training.data.targets import TargetTable
from imgcls.training.network import compute_head_coefficients, resolve_model
from imgcls.training.optim import linear_probe
from imgcls.training.optim.linear_probe import LinearHead, ProbeFeatures
from imgcls.training.train_step import TrainStep, WorkerContext
from tests.training.team import Team

CLASSES, WIDTH, TRAIN, VAL = 3, 5, 101, 37
SIDE = 8
TARGETS = TargetTable(CLASSES)


def split(rows: int, seed: int) -> ProbeFeatures:
    """Classes that overlap, on features of very different means and widths."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, rows)
    centres = np.random.default_rng(0).normal(size=(CLASSES, WIDTH))
    inputs = (centres[labels] + rng.normal(size=(rows, WIDTH))) * [1, 10, 0.1, 3, 1] + [
        0,
        5,
        1,
        0,
        9,
    ]
    return ProbeFeatures(torch.tensor(inputs, dtype=torch.float32), torch.from_numpy(labels))


def share(features: ProbeFeatures, rank: int, workers: int) -> ProbeFeatures:
    return ProbeFeatures(features.inputs[rank::workers], features.targets[rank::workers])


def fitted(rank: int, workers: int, l2: float | None, weights: list[float] | None) -> LinearHead:
    weight = None if weights is None else torch.tensor(weights)
    train, val = share(split(TRAIN, 1), rank, workers), share(split(VAL, 2), rank, workers)
    return linear_probe.fit_head(train, val, CLASSES, l2=l2, weights=weight)


# ------------------------------------------------------------------ the fit


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 4.0]], ids=["equal", "weighted"])
@pytest.mark.parametrize("l2", [1.0, 0.03, 0.001])
def test_the_head_is_that_of_scikit_learn(
    alone: None, l2: float, weights: list[float] | None
) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train, val = split(TRAIN, 1), split(VAL, 2)
    scaler = StandardScaler().fit(train.inputs.double())
    # ours is the mean loss + l2/2 |w|^2, theirs C times the summed loss + 1/2 |w|^2
    theirs = LogisticRegression(
        C=1 / (l2 * TRAIN),
        class_weight=None if weights is None else dict(enumerate(weights)),
        tol=1e-10,
        max_iter=10_000,
    ).fit(scaler.transform(train.inputs.double()), train.targets)
    head = fitted(0, 1, l2, weights)
    assert head.l2 == l2
    np.testing.assert_allclose(head.weight.numpy() * scaler.scale_, theirs.coef_, atol=5e-3)
    expected = theirs.predict_proba(scaler.transform(val.inputs.double()))
    found = (val.inputs @ head.weight.T + head.bias).softmax(1)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    loss = -np.log(expected[np.arange(VAL), val.targets]).mean()
    assert head.val_loss == pytest.approx(loss, abs=1e-3)


def split_labels(rows: int, seed: int) -> ProbeFeatures:
    """Features of `split`, and any number of labels per row, of which some are unknown."""
    whole, rng = split(rows, seed), np.random.default_rng(seed)
    targets = np.eye(CLASSES)[whole.targets] + (rng.random((rows, CLASSES)) < 0.3)
    targets = np.minimum(targets, 1).astype(np.float32)
    targets[rng.random(targets.shape) < 0.1] = np.nan
    return ProbeFeatures(whole.inputs, torch.from_numpy(targets))


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 4.0]], ids=["equal", "weighted"])
def test_the_head_of_several_labels_is_one_class_against_the_rest(
    alone: None, weights: list[float] | None
) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train, val = split_labels(TRAIN, 1), split_labels(VAL, 2)
    scaler = StandardScaler().fit(train.inputs.double())
    inputs = scaler.transform(train.inputs.double())
    weight = None if weights is None else torch.tensor(weights)
    head = linear_probe.fit_head(train, val, CLASSES, l2=0.03, weights=weight)
    found = (val.inputs @ head.weight.T + head.bias).sigmoid()
    for code in range(CLASSES):
        known = ~train.targets[:, code].isnan().numpy()
        theirs = LogisticRegression(
            C=1 / (0.03 * TRAIN),
            class_weight=None if weights is None else {0: 1.0, 1: weights[code]},
            tol=1e-10,
            max_iter=10_000,
        ).fit(inputs[known], train.targets[known, code])
        expected = theirs.predict_proba(scaler.transform(val.inputs.double()))[:, 1]
        np.testing.assert_allclose(found[:, code], expected, atol=2e-3)


def test_with_a_teacher_the_head_is_fitted_to_its_scores(alone: None) -> None:
    train, val = split(TRAIN, 1), split(VAL, 2)
    fixed = {"num_classes": CLASSES, "l2": 0.03, "weights": None}
    plain = linear_probe.fit_head(train, val, **fixed)
    shares = F.one_hot(train.targets, CLASSES).float()
    same = linear_probe.fit_head(dataclasses.replace(train, blended=shares), val, **fixed)
    torch.testing.assert_close(same.weight, plain.weight, atol=1e-4, rtol=1e-3)
    scores = (train.inputs @ plain.weight.T + plain.bias).softmax(1)
    soft = linear_probe.fit_head(dataclasses.replace(train, blended=scores), val, **fixed)
    found = (train.inputs @ soft.weight.T + soft.bias).softmax(1)
    assert (found - scores).abs().mean() < 0.1
    assert not torch.allclose(soft.weight, plain.weight, atol=1e-2)


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_come_to_the_head_of_one(alone: None, team: Team, workers: int) -> None:
    one = fitted(0, 1, None, [0.5, 1.0, 4.0])
    heads = team.call(workers, fitted, None, [0.5, 1.0, 4.0])
    for head in heads:
        # among themselves bit for bit, or they would train different networks
        assert torch.equal(head.weight, heads[0].weight)
        assert torch.equal(head.bias, heads[0].bias)
        assert dataclasses.replace(head, weight=None, bias=None) == dataclasses.replace(
            heads[0], weight=None, bias=None
        )
        assert head.l2 == one.l2
        assert head.val_loss == pytest.approx(one.val_loss, abs=1e-3)
        torch.testing.assert_close(head.weight, one.weight, rtol=0.02, atol=5e-3)


def fitted_by_the_first(rank: int, workers: int) -> LinearHead:
    def mine(features: ProbeFeatures) -> ProbeFeatures:
        return features if rank == 0 else share(features, len(features.targets), 1)

    return linear_probe.fit_head(
        mine(split(TRAIN, 1)), mine(split(VAL, 2)), CLASSES, l2=0.03, weights=None
    )


def test_a_worker_without_a_row_takes_part(alone: None, team: Team) -> None:
    one = fitted(0, 1, 0.03, None)
    for head in team.call(2, fitted_by_the_first):
        torch.testing.assert_close(head.weight, one.weight, rtol=1e-3, atol=1e-4)


def test_the_penalty_is_the_strongest_that_is_no_worse_than_the_best_within_its_error(
    alone: None,
) -> None:
    chosen = fitted(0, 1, None, None)
    heads = [fitted(0, 1, l2, None) for l2 in linear_probe.L2_CHOICES]
    best = min(heads, key=lambda head: head.val_loss)
    within = [head for head in heads if head.val_loss <= best.val_loss + best.val_loss_error]
    assert chosen.l2 == max(head.l2 for head in within)
    assert chosen.l2 > best.l2, "the rule matters here"
    assert len(within) < len(heads), "and so does its limit"


def test_the_error_of_the_validation_loss_is_its_standard_error(alone: None, team: Team) -> None:
    head, val = fitted(0, 1, 0.03, None), split(VAL, 2)
    losses = F.cross_entropy(val.inputs @ head.weight.T + head.bias, val.targets, reduction="none")
    expected = losses.std(correction=0).item() / VAL**0.5
    assert head.val_loss_error == pytest.approx(expected, rel=1e-4)
    for shared in team.call(3, fitted, 0.03, None):
        assert shared.val_loss_error == pytest.approx(expected, rel=1e-3)


def test_a_feature_that_is_the_same_everywhere_does_no_harm(alone: None) -> None:
    train, val = split(TRAIN, 1), split(VAL, 2)
    for each in (train, val):
        each.inputs[:, 2] = 7.0
    head = linear_probe.fit_head(train, val, CLASSES, l2=0.03, weights=None)
    assert torch.isfinite(head.weight).all()
    assert head.val_loss < np.log(CLASSES)


def test_a_head_is_evaluated_by_the_loss_that_it_was_chosen_by(alone: None) -> None:
    head, val = fitted(0, 1, 0.03, None), split(VAL, 2)
    metrics = linear_probe.evaluate_head(head, val, CLASSES)
    assert metrics.loss == pytest.approx(head.val_loss, rel=1e-5)
    assert metrics.rows == VAL
    predicted = (val.inputs @ head.weight.T + head.bias).argmax(1)
    assert metrics.accuracy == pytest.approx((predicted == val.targets).float().mean().item())


# ------------------------------------------------------------------ features and the network


def with_conv_head() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 3), nn.ReLU(), nn.Conv2d(WIDTH, CLASSES, 1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )  # fmt: skip


def small_cnn() -> nn.Module:
    return zoo.build_network(
        zoo.resolve_architecture("small_cnn", {"width": 4, "dropout": 0.5}), CLASSES
    )


def build_train_step(network: nn.Module) -> TrainStep:
    request = {"data": {"train": "none.csv"}, "output": "none", "optim": {"lr": 1e-3}}
    config = TrainConfig.model_validate(request)
    context = WorkerContext(0, 1, torch.device("cpu"), "fp32")
    spec = Preprocess(resize=SIDE, crop=SIDE)
    return TrainStep(config, "probe", spec, None, TARGETS, network, context)


def batches(side: int = SIDE) -> list[Batch]:
    """Seven images in three batches, one of which is empty."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (7, 3, side, side), np.uint8)
    labels = rng.integers(0, CLASSES, 7)
    return [Batch(pixels[a:b], labels[a:b]) for a, b in ((0, 4), (4, 4), (4, 7))]


def test_features_too_large_to_be_fitted_are_counted_over_all_workers(
    alone: None, team: Team
) -> None:
    assert linear_probe.count_non_finite(split(TRAIN, 1)) == 0
    assert team.call(2, counted) == [5, 5]


def counted(rank: int, workers: int) -> int:
    features = share(split(TRAIN, 1), rank, workers)
    for row, value in enumerate((float("nan"), float("inf"), -1e30)[rank:]):
        features.inputs[row, rank] = value
    return linear_probe.count_non_finite(features)


@pytest.mark.parametrize("build", [with_conv_head, small_cnn])
def test_a_head_on_the_features_gives_the_logits_of_the_network(build: Any) -> None:
    made = build_train_step(build())
    found = linear_probe.extract_features(made, iter(batches()), 1)
    assert tuple(found.inputs.shape) == (7, zoo.get_embedding_width(made.network))
    assert found.targets.tolist() == np.concatenate([b.labels for b in batches()]).tolist()
    _, head = zoo.find_head(made.network)
    made.eval_network.eval()
    expected = torch.cat([made.predict_logits(b.pixels) for b in batches() if len(b.labels)])
    mine = F.linear(found.inputs, head.weight.flatten(1), head.bias)
    torch.testing.assert_close(mine, expected)
    assert not head._forward_pre_hooks, "nothing is left behind"


def test_the_second_view_is_mirrored_and_later_ones_differ() -> None:
    made = build_train_step(small_cnn())
    four = linear_probe.extract_features(made, iter(batches()), 4)
    plain = linear_probe.extract_features(made, iter(batches()), 1)
    flipped = [dataclasses.replace(b, pixels=b.pixels[..., ::-1].copy()) for b in batches()]
    mirrored = linear_probe.extract_features(made, iter(flipped), 1)
    first = four.inputs[:16].reshape(4, 4, -1)  # views of the first batch of four images
    torch.testing.assert_close(first[0], plain.inputs[:4])
    torch.testing.assert_close(first[1], mirrored.inputs[:4])
    assert not torch.allclose(first[2], first[3])
    assert not torch.allclose(first[2], first[0])
    assert len(four.targets) == 28


def test_features_see_the_middle_of_larger_images() -> None:
    made = build_train_step(small_cnn())
    larger = batches(side=SIDE + 4)
    middle = [dataclasses.replace(b, pixels=b.pixels[..., 2:-2, 2:-2].copy()) for b in larger]
    torch.testing.assert_close(
        linear_probe.extract_features(made, iter(larger), 1).inputs,
        linear_probe.extract_features(made, iter(middle), 1).inputs,
    )


def test_a_worker_without_an_image_has_no_features() -> None:
    made = build_train_step(small_cnn())

    def nothing() -> Iterator[Batch]:
        yield batches()[1]

    found = linear_probe.extract_features(made, nothing(), 2)
    assert tuple(found.inputs.shape) == (0, zoo.get_embedding_width(made.network))
    assert len(found.targets) == 0


@pytest.mark.parametrize("build", [with_conv_head, small_cnn])
def test_an_installed_head_is_the_networks_own(build: Any) -> None:
    made = build_train_step(build())
    found = linear_probe.extract_features(made, iter(batches()), 1)
    width = zoo.get_embedding_width(made.network)
    head = LinearHead(torch.randn(CLASSES, width), torch.randn(CLASSES), 1.0, 0.0, 0.0)
    linear_probe.install_head(made.network, head)
    made.network.eval()
    logits = torch.cat(
        [made.network(made.normalize_inputs(b.pixels)) for b in batches() if len(b.labels)]
    )
    torch.testing.assert_close(logits, found.inputs @ head.weight.T + head.bias)


def test_a_head_without_a_bias_is_installed_too() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES, bias=False))
    linear_probe.install_head(
        network, LinearHead(torch.ones(CLASSES, 4), torch.ones(CLASSES), 1.0, 0.0, 0.0)
    )
    assert (network[1].weight == 1).all()


FAMILIES = [
    "deit_tiny_distilled_patch16_224", "levit_128s", "pit_ti_distilled_224", "efficientformer_l1",
    "efficientformerv2_s0", "repvit_m0_9", "swiftformer_xs", "crossvit_tiny_240",
    "efficientvim_m1_dist", "volo_d1_224",
]  # fmt: skip
QUICK = ("deit_tiny_distilled_patch16_224", "crossvit_tiny_240")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FAMILIES],
)
def test_a_head_fitted_to_several_is_what_the_network_computes(name: str) -> None:
    pytest.importorskip("timm")
    architecture, preprocess = resolve_model(ModelConfig(name=f"timm:{name}"))
    network = zoo.build_network(architecture, CLASSES)
    shares = compute_head_coefficients(network, preprocess)
    request = {"data": {"train": "none.csv"}, "output": "none", "optim": {"lr": 1e-3}}
    config = TrainConfig.model_validate(request)
    context = WorkerContext(0, 1, torch.device("cpu"), "fp32")
    made = TrainStep(config, "probe", preprocess, None, TARGETS, network, context)
    given = batches(preprocess.crop)
    found = linear_probe.extract_features(made, iter(given), 1)
    width = sum(zoo.get_input_width(layer) for layer in zoo.find_heads(network).values())
    assert tuple(found.inputs.shape) == (7, width)
    torch.manual_seed(0)
    head = LinearHead(torch.randn(CLASSES, width), torch.randn(CLASSES), 1.0, 0.0, 0.0)
    for each in (made.network, made.eval_network):
        linear_probe.install_head(each, head, shares)
    made.eval_network.eval()
    logits = torch.cat([made.predict_logits(b.pixels) for b in given if len(b.labels)])
    wanted = found.inputs @ head.weight.T + head.bias
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


class WeightedHeads(nn.Module):
    """A network with a weighted sum of heads whose inputs are almost the same for all images."""

    SHARES = (0.1, 0.2, 0.3, 0.4)
    class_heads = ("heads.0", "heads.1", "heads.2", "heads.3")

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(8, CLASSES) for _ in self.SHARES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = 1 + 1e-4 * images.flatten(1)[:, :8]
        outputs = [head(features) for head in self.heads]
        return torch.stack([c * o for c, o in zip(self.SHARES, outputs, strict=True)]).sum(0)


def test_coefficients_are_exact_for_heads_whose_inputs_hardly_vary() -> None:
    network = WeightedHeads()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    shares = compute_head_coefficients(network, Preprocess(resize=SIDE, crop=SIDE))
    assert shares == pytest.approx(WeightedHeads.SHARES, rel=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Squared(nn.Module):
    """A network whose logits are not a sum of the outputs of its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * SIDE * SIDE, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(images.flatten(1)) ** 2
        return logits


def test_a_network_that_a_linear_probe_cannot_describe_is_refused_by_name() -> None:
    preprocess = Preprocess(resize=SIDE, crop=SIDE)
    with pytest.raises(
        BundleError, match=r"cannot be fitted to Squared, whose .*strategy finetune"
    ):
        compute_head_coefficients(Squared(), preprocess)
    network = with_conv_head()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert compute_head_coefficients(network, preprocess) == pytest.approx((1.0,))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
