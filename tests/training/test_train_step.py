"""A step does not depend on how its rows are divided among workers, nor on what ran before it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F

from imgcls.data.decoding.preprocess import Preprocess
from imgcls.models import zoo
from imgcls.models.normalize import Normalizer
from imgcls.training.config import Strategy, TrainConfig
from imgcls.training.data.batches import Batch
from imgcls.training.data.targets import TargetTable
from imgcls.training.optim.optimizer import set_learning_rates
from imgcls.training.sampler import iter_step_shares
from imgcls.training.train_step import TrainStep, WorkerContext
from tests.training.team import Team

CLASSES, ROWS, SIDE = 4, 37, 8
TARGETS = TargetTable(CLASSES)
PREPROCESS = Preprocess(resize=SIDE, crop=SIDE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
PLAIN_SGD = {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "ema": None}
"""Settings with which a step subtracts the gradient."""


def config(**changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"data": {"train": "none.csv"}, "output": "none", "augment": "none"}
    optim = {"lr": 1e-3, **changes.pop("optim", {})}
    return TrainConfig.model_validate(settings | changes | {"optim": optim})


def without_norms() -> nn.Module:
    """A network without batch statistics, in which rows are independent."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, CLASSES)
    )


def small_cnn() -> nn.Module:
    """A network with batch norms and dropout."""
    torch.manual_seed(1)
    return zoo.build_network(
        zoo.resolve_architecture("small_cnn", {"width": 4, "dropout": 0.3}), CLASSES
    )


def build_train_step(
    network: nn.Module,
    settings: TrainConfig,
    context: WorkerContext = WorkerContext(0, 1, torch.device("cpu"), "fp32"),  # noqa: B008  it is frozen
    weights: list[float] | None = None,
) -> TrainStep:
    made = TrainStep(settings, "scratch", PREPROCESS, weights, TARGETS, network, context)
    made.set_trainable(1)
    return made


def rows() -> Batch:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (ROWS, 3, SIDE, SIDE), np.uint8)
    return Batch(pixels, rng.integers(0, CLASSES, ROWS))


def empty() -> Batch:
    return Batch(np.zeros((0, 3, SIDE, SIDE), np.uint8), np.zeros(0, np.int64))


def parameter_changes(made: TrainStep, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Minus the change of each parameter: its gradient under PLAIN_SGD."""
    after = made.network.named_parameters()
    return {name: (before[name] - p.detach()).cpu() for name, p in after}


# ------------------------------------------------------------------ the gradient of a step

LOSSES: list[tuple[dict[str, Any], list[float] | None]] = [
    ({}, None),
    ({"label_smoothing": 0.1}, [0.5, 1.0, 2.0, 3.0]),
    ({"focal_gamma": 2.0}, [0.5, 1.0, 2.0, 3.0]),
]


def one_step(
    rank: int,
    workers: int,
    settings: TrainConfig,
    weights: list[float] | None,
    device: str = "cpu",
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The gradient of all rows at once, and the totals of this worker's rows."""
    context = WorkerContext(rank, workers, torch.device(device), "fp32")
    made = build_train_step(without_norms(), settings, context, weights)
    before = {name: p.detach().clone() for name, p in made.network.named_parameters()}
    whole = rows()
    (share,) = iter_step_shares(np.arange(ROWS), ROWS, rank=rank, workers=workers)
    part = Batch(whole.pixels[share.rows], whole.labels[share.rows])
    totals = made.step(part, share.global_batch_size, 0)
    return parameter_changes(made, before), totals.tolist()


def settings_of(loss: dict[str, Any], accumulate: int) -> TrainConfig:
    return config(optim=PLAIN_SGD, loss=loss, scale={"accumulate": accumulate})


def whole_batch(
    loss: dict[str, Any], weights: list[float] | None
) -> tuple[dict[str, torch.Tensor], float, int]:
    """The mean over all rows by autograd alone: gradient, summed loss, correct predictions."""
    network, batch = without_norms(), rows()
    inputs = Normalizer(PREPROCESS, torch.device("cpu"))(batch.pixels)
    labels = torch.from_numpy(batch.labels)
    logits = network(inputs)
    weight = None if weights is None else torch.tensor(weights)
    if "focal_gamma" in loss:
        score = logits.softmax(1)[torch.arange(ROWS), labels]
        terms = -((1 - score) ** loss["focal_gamma"]) * score.log() * weight[labels]
        total = terms.sum()
    else:
        total = F.cross_entropy(logits, labels, weight=weight, reduction="sum", **loss)
    (total / ROWS).backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    return gradients, float(total.detach()), int((logits.argmax(1) == labels).sum())


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("loss", "weights"), LOSSES, ids=["plain", "weighted", "focal"])
def test_the_gradient_of_a_step_is_the_mean_over_the_whole_batch(
    team: Team, loss: dict[str, Any], weights: list[float] | None, accumulate: int
) -> None:
    expected, total, correct = whole_batch(loss, weights)
    settings = settings_of(loss, accumulate)
    found = [one_step(0, 1, settings, weights)]
    # 37 rows divide by neither 2, 3 nor the parts
    for results in (
        found,
        team.call(2, one_step, settings, weights),
        team.call(3, one_step, settings, weights),
    ):
        for gradients, _ in results:
            torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
        assert sum(totals[0] for _, totals in results) == pytest.approx(total, rel=1e-5)
        assert sum(totals[1] for _, totals in results) == correct


def test_more_parts_than_rows_are_no_parts_without_rows() -> None:
    made = build_train_step(without_norms(), settings_of({}, 50))
    whole = rows()
    totals = made.step(Batch(whole.pixels[:3], whole.labels[:3]), 3, 0)
    assert torch.isfinite(totals).all()


# ------------------------------------------------------------------ images that failed


def test_a_batch_whose_images_all_failed_changes_nothing() -> None:
    made = build_train_step(without_norms(), config(optim=PLAIN_SGD))
    before = {name: p.detach().clone() for name, p in made.network.named_parameters()}
    totals = made.step(empty(), 10, 0)
    assert totals.tolist() == [0, 0]
    assert all((change == 0).all() for change in parameter_changes(made, before).values())


def step_without_images_but_in_one(
    rank: int, workers: int, settings: TrainConfig
) -> dict[str, torch.Tensor]:
    context = WorkerContext(rank, workers, torch.device("cpu"), "fp32")
    made = build_train_step(without_norms(), settings, context)
    before = {name: p.detach().clone() for name, p in made.network.named_parameters()}
    made.step(rows() if rank == 1 else empty(), ROWS, 0)
    return parameter_changes(made, before)


def test_a_worker_whose_images_all_failed_does_not_block_the_others(team: Team) -> None:
    expected, _, _ = whole_batch({}, None)
    settings = settings_of({}, 3)
    for gradients in team.call(3, step_without_images_but_in_one, settings):
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


def sync_batch_norm_on_cpus(self: nn.SyncBatchNorm, inputs: torch.Tensor) -> torch.Tensor:
    """torch's SyncBatchNorm runs on GPUs only: the same arithmetic, and as many collectives."""
    assert self.weight is not None
    assert len(inputs) or inputs.dtype == torch.float32, "others send their statistics in float32"
    assert self.training, "other workers would wait for this one"
    dtype, inputs = inputs.dtype, inputs.float()
    over = (0, 2, 3)
    sums = torch.cat(
        [inputs.sum(over), inputs.square().sum(over), inputs.new_full((1,), inputs[:, 0].numel())]
    )
    mean, square, count = all_reduce(sums).tensor_split([len(self.weight), 2 * len(self.weight)])
    mean, square = (part / count for part in (mean, square))
    scale = self.weight / (square - mean.square() + self.eps).sqrt()
    shape = (1, -1, 1, 1)
    return ((inputs - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)).to(dtype)


def with_a_norm() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(20, CLASSES),
    )  # fmt: skip


def sync_step(
    rank: int, workers: int, settings: TrainConfig, counts: list[int], precision: str
) -> dict[str, torch.Tensor]:
    """The gradient of a step in which each worker has some of the rows."""
    nn.SyncBatchNorm.forward = sync_batch_norm_on_cpus  # type: ignore[method-assign]
    accepts_cpus: Any = nn.parallel.DistributedDataParallel
    accepts_cpus._passing_sync_batchnorm_handle = lambda *_: None
    context = WorkerContext(rank, workers, torch.device("cpu"), precision)
    return step_on_own_rows(settings, context, counts)


def step_on_own_rows(
    settings: TrainConfig, context: WorkerContext, counts: list[int]
) -> dict[str, torch.Tensor]:
    """The gradient of a step of which a worker has its own count of the rows."""
    made = build_train_step(with_a_norm(), settings, context)
    before = {name: p.detach().clone() for name, p in made.network.named_parameters()}
    whole, start = rows(), sum(counts[: context.rank])
    mine = slice(start, start + counts[context.rank])
    made.step(Batch(whole.pixels[mine], whole.labels[mine]), sum(counts), 0)
    return parameter_changes(made, before)


@pytest.mark.parametrize(
    ("counts", "precision"), [([0, ROWS], "fp32"), ([2, ROWS - 2], "fp32"), ([0, ROWS], "bf16")]
)
def test_synchronized_norms_work_with_workers_that_have_few_images_or_none(
    team: Team, counts: list[int], precision: str
) -> None:
    """Three parts: the first worker has none, or none in the last part."""
    accumulate = 3
    settings = config(optim=PLAIN_SGD, scale={"accumulate": accumulate, "sync_batchnorm": True})
    first, second = team.call(2, sync_step, settings, counts, precision)
    torch.testing.assert_close(first, second)
    # the parts of all workers, whose statistics are computed together, as batches of one worker
    parts = [
        np.concatenate(pair)
        for pair in zip(
            np.array_split(np.arange(counts[0]), accumulate),
            np.array_split(np.arange(counts[0], ROWS), accumulate),
            strict=True,
        )
    ]
    whole = rows()
    totals: dict[str, Any] = {}
    for part in parts:
        made = build_train_step(with_a_norm(), config(optim=PLAIN_SGD))
        before = {name: p.detach().clone() for name, p in made.network.named_parameters()}
        made.step(Batch(whole.pixels[part], whole.labels[part]), ROWS, 0)
        for name, gradient in parameter_changes(made, before).items():
            totals[name] = totals.get(name, 0) + gradient
    # bf16 has 8 bits
    rtol, atol = (1e-3, 1e-5) if precision == "fp32" else (0.05, 0.01)
    torch.testing.assert_close(second, totals, rtol=rtol, atol=atol)


# ------------------------------------------------------------------ resuming and repeating


def steps(made: TrainStep, first: int, last: int, *, seeded: bool = True) -> None:
    """Run steps as an epoch does, on batches that differ from step to step."""
    made.network.train()
    whole = rows()
    for step in range(first, last):
        chosen = np.random.default_rng(step).permutation(ROWS)[:16]
        set_learning_rates(made.optimizer, made.config.optim, step, 10)
        if seeded:
            made.seed_rng(1, step)
        made.step(Batch(whole.pixels[chosen], whole.labels[chosen]), 16, step)


def everything(made: TrainStep) -> dict[str, Any]:
    return copy.deepcopy(made.state_dict())


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


OPTIMIZERS = [
    {"name": "adamw", "ema": 0.9},
    {"name": "sgd", "lr": 0.1, "ema": 0.9},
    {"name": "adamw", "ema": None, "schedule": "one_cycle", "clip_norm": 0.5},
    {"name": "sgd", "lr": 0.1, "ema": None, "schedule": "one_cycle"},
]


def run_and_resume(settings: TrainConfig, context: WorkerContext) -> tuple[TrainStep, TrainStep]:
    """Six steps in a row, and the last three from the state that the first three left."""
    made = build_train_step(small_cnn(), settings, context)
    steps(made, 0, 3)
    stored = io.BytesIO()
    torch.save(made.state_dict(), stored)
    steps(made, 3, 6)
    stored.seek(0)
    resumed = build_train_step(
        zoo.build_network(zoo.resolve_architecture("small_cnn", {"width": 4}), CLASSES),
        settings,
        context,
    )
    for module in resumed.network.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.3 if isinstance(module, nn.Dropout) else 0.15
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    torch.manual_seed(99)
    steps(resumed, 3, 6)
    return made, resumed


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=["adamw+ema", "sgd+ema", "adamw", "sgd"])
def test_a_loaded_state_takes_the_next_steps_bit_for_bit(optim: dict[str, Any]) -> None:
    made, resumed = run_and_resume(config(optim=optim, augment="strong"), build_context())
    assert same(everything(resumed), everything(made))


@pytest.mark.parametrize("optim", OPTIMIZERS[:2], ids=["adamw", "sgd"])
def test_a_state_is_a_copy_that_later_steps_leave_alone(optim: dict[str, Any]) -> None:
    made = build_train_step(small_cnn(), config(optim=optim))
    steps(made, 0, 2)
    state = made.state_dict()
    kept = copy.deepcopy(state)
    steps(made, 2, 4)
    assert same(state, kept)
    assert not same(made.state_dict(), kept)


def test_what_is_random_in_a_step_depends_on_seed_epoch_step_and_worker() -> None:
    def drawn(seed: int, epoch: int, step: int, rank: int) -> list[float]:
        context = WorkerContext(rank, 2, torch.device("cpu"), "fp32")
        made = TrainStep(
            config(seed=seed),
            "scratch",
            PREPROCESS,
            None,
            TARGETS,
            without_norms(),
            context,
        )
        made.seed_rng(epoch, step)
        return torch.rand(4).tolist()

    base = (1, 2, 3, 0)
    assert drawn(*base) == drawn(*base)
    others = [(9, 2, 3, 0), (1, 9, 3, 0), (1, 2, 9, 0), (1, 2, 3, 1), (1, 3, 2, 0)]
    assert len({tuple(drawn(*each)) for each in (base, *others)}) == 6


def test_steps_depend_on_their_seed_and_on_no_randomness_before_them() -> None:
    settings = config(augment="strong")
    ends = []
    for before in (1, 2):
        made = build_train_step(small_cnn(), settings)
        torch.manual_seed(before)
        steps(made, 0, 2)
        ends.append(everything(made))
    assert same(ends[0], ends[1])
    # without the seed the random numbers depend on what ran before
    unseeded = []
    for before in (1, 2):
        made = build_train_step(small_cnn(), settings)
        torch.manual_seed(before)
        steps(made, 0, 2, seeded=False)
        unseeded.append(everything(made))
    assert not same(unseeded[0], unseeded[1])


# ------------------------------------------------------ trainable layers, moving average


def test_frozen_layers_do_not_change_and_get_no_gradient() -> None:
    settings = config(
        finetune={"unfreeze_every": 1, "backbone_lr_scale": 1.0},
        optim={"weight_decay": 0.5, "ema": None},
    )
    network = without_norms()
    made = TrainStep(settings, "finetune", PREPROCESS, None, TARGETS, network, build_context())
    seen: list[set[str]] = []
    for epoch in (1, 2):
        made.set_trainable(epoch)
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        made.step(rows(), ROWS, epoch)
        seen.append(
            {name for name, change in parameter_changes(made, before).items() if change.any()}
        )
    everything_ = {name for name, _ in network.named_parameters()}
    assert seen == [{"4.weight", "4.bias"}, everything_]


def statistics(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def changed(network: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {n for n, b in network.named_buffers() if not torch.equal(b, before[n])}


def two_norms() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
        nn.ReLU(), nn.Flatten(), nn.Linear(4 * (SIDE - 4) ** 2, CLASSES),
    )  # fmt: skip


@pytest.mark.parametrize("strategy", ["finetune", "probe_then_finetune", "scratch"])
def test_from_weights_batch_norms_keep_the_statistics_that_the_probe_was_fitted_with(
    strategy: Strategy,
) -> None:
    made = TrainStep(config(), strategy, PREPROCESS, None, TARGETS, two_norms(), build_context())
    before = statistics(made.network)
    made.set_trainable(1)
    with torch.no_grad():
        made.network.eval()
        wanted = made.network(made.normalize_inputs(rows().pixels))
    loss, _ = made.step(rows(), ROWS, 0)
    expected = F.cross_entropy(wanted, made.targets_to_device(rows().labels), reduction="sum")
    if strategy == "scratch":
        assert {n.rpartition(".")[0] for n in changed(made.network, before)} == {"1", "4"}
        assert loss.item() != pytest.approx(expected.item(), rel=1e-3)
    else:
        assert changed(made.network, before) == set()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_frozen_layers_keep_their_statistics_while_those_above_them_learn_theirs() -> None:
    settings = config(finetune={"unfreeze_every": 1, "batchnorm": "train"}, optim={"ema": None})
    made = TrainStep(settings, "finetune", PREPROCESS, None, TARGETS, two_norms(), build_context())
    seen = []
    for epoch in (1, 2, 3):
        made.set_trainable(epoch)
        before = statistics(made.network)
        made.step(rows(), ROWS, epoch)
        seen.append({name.rpartition(".")[0] for name in changed(made.network, before)})
    assert seen == [set(), {"4"}, {"1", "4"}]


def test_a_worker_without_an_image_changes_no_statistics_and_is_back_with_the_next() -> None:
    made = TrainStep(config(), "scratch", PREPROCESS, None, TARGETS, two_norms(), build_context())
    made.set_trainable(1)
    before = statistics(made.network)
    made.step(empty(), ROWS, 0)
    assert changed(made.network, before) == set()
    made.step(rows(), ROWS, 1)
    assert {n.rpartition(".")[0] for n in changed(made.network, before)} == {"1", "4"}


def build_context(precision: str = "fp32") -> WorkerContext:
    return WorkerContext(0, 1, torch.device("cpu"), precision)


def test_the_moving_average_is_validated_where_there_is_one() -> None:
    averaged = build_train_step(small_cnn(), config(optim={"ema": 0.9}))
    assert averaged.ema is not None
    assert averaged.eval_network is averaged.ema.network
    plain = build_train_step(small_cnn(), config(optim={"ema": None}))
    assert plain.eval_network is plain.network
    steps(averaged, 0, 3)
    averaged.eval_network.eval()
    logits = averaged.predict_logits(rows().pixels)
    expected = averaged.ema.network(averaged.normalize_inputs(rows().pixels))
    torch.testing.assert_close(logits, expected)
    averaged.network.eval()
    assert not torch.allclose(logits, averaged.network(averaged.normalize_inputs(rows().pixels)))


@pytest.mark.parametrize(
    ("strategy", "share"), [("probe_then_finetune", 0.99), ("finetune", 0.1), ("scratch", 0.1)]
)
def test_only_after_a_probe_the_moving_average_begins_at_the_start(
    strategy: Strategy, share: float
) -> None:
    context = WorkerContext(0, 1, torch.device("cpu"), "fp32")
    settings = config(optim={"ema": 0.99, "lr": 0.1})
    network = small_cnn()
    made = TrainStep(settings, strategy, PREPROCESS, None, TARGETS, network, context)
    made.set_trainable(1)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    made.step(rows(), ROWS, 0)
    for name, average in made.eval_network.named_parameters():
        expected = share * before[name] + (1 - share) * network.get_parameter(name)
        torch.testing.assert_close(average, expected.detach())


def test_long_gradients_are_cut_to_the_norm_that_was_asked_for() -> None:
    made = build_train_step(without_norms(), config(optim=PLAIN_SGD | {"clip_norm": 1e-3}))
    before = {name: p.detach().clone() for name, p in made.network.named_parameters()}
    made.step(rows(), ROWS, 0)
    length = torch.cat(
        [change.flatten() for change in parameter_changes(made, before).values()]
    ).norm()
    assert length.item() == pytest.approx(1e-3, rel=1e-3)


def test_half_precision_keeps_the_weights_in_full() -> None:
    settings = config(optim={"ema": None})
    made = TrainStep(
        settings,
        "scratch",
        PREPROCESS,
        None,
        TARGETS,
        small_cnn(),
        build_context("bf16"),
    )
    made.set_trainable(1)
    totals = made.step(rows(), ROWS, 0)
    assert torch.isfinite(totals).all()
    assert {p.dtype for p in made.network.parameters()} == {torch.float32}
    made.eval_network.eval()
    assert made.predict_logits(rows().pixels).dtype == torch.float32


@pytest.mark.parametrize(
    ("build", "falls"), [(without_norms, 0.5), (small_cnn, 0.5)], ids=["plain", "small_cnn"]
)
def test_steps_learn_what_can_be_learned(build: Callable[[], nn.Module], falls: float) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 32)
    pixels = np.broadcast_to(
        (60 * labels).astype(np.uint8)[:, None, None, None], (32, 3, SIDE, SIDE)
    ).copy()
    made = build_train_step(build(), config(optim={"lr": 0.01, "ema": None, "weight_decay": 0.0}))
    losses = []
    for step in range(30):
        made.seed_rng(1, step)
        losses.append(float(made.step(Batch(pixels, labels), 32, step)[0]) / 32)
    assert losses[-1] < falls * losses[0]


# ------------------------------------------------------------------ on GPUs

# TF32, which cuDNN uses in fp32 by default, has 10 bits
ON_GPUS = {"rtol": 0.02, "atol": 1e-3}


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("loss", "weights"), LOSSES, ids=["plain", "weighted", "focal"])
def test_a_gpu_has_the_gradient_of_a_cpu(
    loss: dict[str, Any], weights: list[float] | None, accumulate: int
) -> None:
    expected, total, correct = whole_batch(loss, weights)
    gradients, totals = one_step(0, 1, settings_of(loss, accumulate), weights, "cuda")
    torch.testing.assert_close(gradients, expected, **ON_GPUS)
    assert totals[0] == pytest.approx(total, rel=1e-2)
    assert abs(totals[1] - correct) <= 1


@pytest.mark.gpu
def test_two_workers_on_one_gpu_have_the_gradient_of_all_rows(team: Team) -> None:
    """Over gloo: NCCL refuses two workers on one GPU."""
    expected, total, _ = whole_batch({}, None)
    results = team.call(2, one_step, settings_of({}, 3), None, "cuda:0")
    for gradients, _ in results:
        torch.testing.assert_close(gradients, expected, **ON_GPUS)
    assert sum(totals[0] for _, totals in results) == pytest.approx(total, rel=1e-2)


def one_step_on_own_gpu(
    rank: int, workers: int, settings: TrainConfig
) -> tuple[dict[str, torch.Tensor], list[float]]:
    torch.cuda.set_device(rank)  # as Ray Train does
    return one_step(rank, workers, settings, None, f"cuda:{rank}")


@pytest.mark.gpu
def test_workers_on_gpus_of_their_own_have_the_gradient_of_all_rows(team: Team) -> None:
    count = min(3, torch.cuda.device_count())
    if count < 2:
        pytest.skip("needs two GPUs")
    expected, _, _ = whole_batch({}, None)
    results = team.call(count, one_step_on_own_gpu, settings_of({}, 3), backend="nccl")
    for gradients, _ in results:
        torch.testing.assert_close(gradients, expected, **ON_GPUS)


def sync_step_on_own_gpu(
    rank: int, workers: int, settings: TrainConfig, counts: list[int]
) -> dict[str, torch.Tensor]:
    torch.cuda.set_device(rank)
    context = WorkerContext(rank, workers, torch.device("cuda", rank), "fp32")
    return step_on_own_rows(settings, context, counts)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [[0, ROWS], [2, ROWS - 2]])
def test_synchronized_norms_of_torch_work_with_a_worker_without_images(
    team: Team, counts: list[int]
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    settings = config(optim=PLAIN_SGD, scale={"sync_batchnorm": True})
    found = team.call(2, sync_step_on_own_gpu, settings, counts, backend="nccl")
    alone = build_train_step(with_a_norm(), config(optim=PLAIN_SGD))
    before = {name: p.detach().clone() for name, p in alone.network.named_parameters()}
    alone.step(rows(), ROWS, 0)
    for gradients in found:
        torch.testing.assert_close(gradients, parameter_changes(alone, before), **ON_GPUS)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("optim", OPTIMIZERS, ids=["adamw+ema", "sgd+ema", "adamw", "sgd"])
def test_half_precision_on_a_gpu_is_resumed(
    precision: str, optim: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_half_precision_is_resumed(precision, optim, "cuda", monkeypatch)


def check_half_precision_is_resumed(
    precision: str, optim: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # as in a training worker
    context = WorkerContext(0, 1, torch.device(device), precision)
    made, resumed = run_and_resume(config(optim=optim, augment="strong"), context)
    before, after = everything(made), everything(resumed)
    assert after["scaler"] == before["scaler"]
    assert bool(before["scaler"]) == (precision == "fp16")
    assert all(p.dtype == torch.float32 for p in made.network.parameters())
    # some kernels of the backward pass add in any order
    torch.testing.assert_close(after["network"], before["network"], rtol=1e-2, atol=1e-3)
    first = dict(small_cnn().named_parameters())
    for name, parameter in made.network.named_parameters():
        assert not torch.equal(parameter.detach().cpu(), first[name])
