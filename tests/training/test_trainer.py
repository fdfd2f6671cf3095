"""The training loop: early stopping, and whole runs of one worker in this process."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from imgcls.data.decoding.preprocess import Preprocess
from imgcls.models import zoo
from imgcls.training import trainer
from imgcls.training.config import EarlyStoppingConfig, Strategy, TrainConfig
from imgcls.training.data.batches import Batch, DecodeFailure
from imgcls.training.data.targets import (
    NO_LABEL,
    TargetTable,
    TeacherTargets,
    compute_log_scores,
)
from imgcls.training.epoch_metrics import EpochMetrics
from imgcls.training.sampler import Int64Array
from imgcls.training.train_step import WorkerContext
from imgcls.training.trainer import Trainer, TrainLoopSpec, is_stalled


def history(losses: list[float], accuracies: list[float] | None = None) -> tuple[EpochMetrics, ...]:
    pairs = zip(losses, accuracies or [0.5] * len(losses), strict=True)
    return tuple(
        EpochMetrics(number, 0.4, 0.9, loss, accuracy, 1e-3, 1.0, 1.0, 100, 10, 0.5)
        for number, (loss, accuracy) in enumerate(pairs, start=1)
    )


@pytest.mark.parametrize(
    ("losses", "stalled"),
    [
        ([], False),
        ([1.0], False),
        ([1.0, 1.1], False),
        ([1.0, 1.1, 1.2], True),
        ([1.0, 1.0, 1.0], True),
        ([1.0, 1.1, 0.9], False),
        ([1.0, 1.1, 0.9, 1.0, 0.95], True),
        ([3.0, 2.0, 1.0], False),
        ([1.0, math.nan, math.nan], True),
    ],
)
def test_it_is_over_when_as_many_epochs_as_the_patience_improved_nothing(
    losses: list[float], stalled: bool
) -> None:
    assert is_stalled(history(losses), EarlyStoppingConfig(patience=2), "val_loss") == stalled
    assert not is_stalled(history(losses), EarlyStoppingConfig(), "val_loss"), (
        "without a patience it never is"
    )


def test_improvements_that_are_too_small_do_not_count() -> None:
    falling = history([1.0, 0.99, 0.98, 0.97])
    assert not is_stalled(falling, EarlyStoppingConfig(patience=3), "val_loss")
    assert is_stalled(falling, EarlyStoppingConfig(patience=3, min_delta=0.1), "val_loss")
    # small ones add up
    assert not is_stalled(falling, EarlyStoppingConfig(patience=3, min_delta=0.025), "val_loss")


def test_an_accuracy_improves_upwards() -> None:
    rising = history([1.0, 2.0, 3.0], [0.1, 0.2, 0.3])
    assert not is_stalled(rising, EarlyStoppingConfig(patience=2), "val_accuracy")
    assert is_stalled(rising, EarlyStoppingConfig(patience=2), "val_loss")


# ---------------------------------------------------------------------- the loop without Ray

CLASSES, SIDE = 3, 8


class Dataset:
    """Rows whose brightness is their class."""

    def __init__(self, rows: int, seed: int, broken: frozenset[int] = frozenset()) -> None:
        self.broken = broken
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(0, CLASSES, rows)
        noise = rng.integers(0, 40, (rows, 3, SIDE, SIDE))
        self.pixels = (60 * self.labels[:, None, None, None] + noise).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def iter_batches(self, rows: Sequence[Int64Array]) -> Iterator[Batch]:
        for each in rows:
            good = np.array([row for row in each if row not in self.broken], np.int64)
            failures = tuple(
                DecodeFailure(f"{row}.png", int(self.labels[row]), False, "is empty", row, "empty")
                for row in map(int, each)
                if row in self.broken
            )
            yield Batch(self.pixels[good], self.labels[good], failures, good)


class Images:
    def load_split(self, *, held: bool) -> Dataset:
        return Dataset(20, seed=2) if held else Dataset(60, seed=1)


class Channel:
    """Keeps what is posted; a stop is never requested."""

    def __init__(self) -> None:
        self.posts: list[Any] = []
        self.post = SimpleNamespace(remote=self.posts.append)


class NoControl:
    """Workers that never agree to stop or save."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def step(self, finite: Any = True) -> None: ...

    def mark_saved(self) -> None: ...


@pytest.fixture
def build_trainer(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Trainer]:
    """Build a trainer of one worker in this process."""
    monkeypatch.setattr(trainer, "ControlSync", NoControl)
    monkeypatch.setattr(trainer.ray, "get", lambda reference: reference)

    def build(
        network: nn.Module,
        strategy: Strategy,
        device: str = "cpu",
        worker_precision: str = "fp32",
        targets: TargetTable = TargetTable(CLASSES),  # noqa: B008  it is frozen
        images: Any = None,
        **settings: Any,
    ) -> Trainer:
        config = TrainConfig.model_validate(
            {"data": {"train": "none.csv"}, "output": str(tmp_path), "optim": {"lr": 1e-3}}
            | {"augment": "none", "epochs": 2, "batch_size": 20, **settings}
        )
        spec = TrainLoopSpec(
            config=config,
            strategy=strategy,
            architecture=zoo.resolve_architecture("small_cnn", {"width": 4}),
            targets=targets,
            classes=["dark", "medium", "bright"],
            initial_weights=None,
            preprocess=Preprocess(resize=SIDE, crop=SIDE),
            images=images or Images(),
            class_weights=None,
            head_coefficients=(1.0,),
        )
        context = WorkerContext(0, 1, torch.device(device), worker_precision)
        return Trainer(spec, context, network, Channel())

    return build


def build_network() -> nn.Module:
    torch.manual_seed(1)
    return zoo.build_network(zoo.resolve_architecture("small_cnn", {"width": 4}), CLASSES)


def test_a_probe_then_finetune_run_has_the_probe_as_epoch_0(
    build_trainer: Callable[..., Trainer],
) -> None:
    made = build_trainer(build_network(), "probe_then_finetune")
    reported: list[EpochMetrics] = []
    result = made.run(reported.append)
    assert [(epoch.epoch, epoch.phase) for epoch in result.history] == [
        (0, "probe"), (1, "train"), (2, "train"),
    ]  # fmt: skip
    assert list(result.history) == reported
    assert {(epoch.train_rows, epoch.val_rows) for epoch in reported} == {(60, 20)}
    assert result.history[0].val_accuracy > 0.8
    assert [post for post in made.channel.posts if isinstance(post, EpochMetrics)] == reported


def test_a_short_training_from_random_weights_ends_with_running_statistics_of_its_images(
    build_trainer: Callable[..., Trainer],
) -> None:
    network = build_network()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.001
    history = (
        build_trainer(network, "scratch", epochs=20, optim={"lr": 1e-2}).run(lambda _: None).history
    )
    assert history[-1].train_accuracy > 0.95
    assert history[-1].val_accuracy > 0.95


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [("probe", {}), ("scratch", {"epochs": 3, "optim": {"lr": 1e-2, "ema": 0.5}})],
)
def test_the_predictions_of_the_best_epoch_are_kept_with_its_weights(
    build_trainer: Callable[..., Trainer], strategy: Strategy, settings: dict[str, Any]
) -> None:
    made = build_trainer(build_network(), strategy, **settings)
    made.run(lambda epoch: None)
    latest = made.checkpoints.load_latest()
    assert latest is not None
    best = latest[0].progress.best_epoch
    data = made.checkpoints.load_best_predictions(latest[0])
    assert best is not None
    assert data is not None
    table = pq.read_table(pa.BufferReader(data))
    assert table["row"].to_pylist() == list(range(20))
    val = Images().load_split(held=True)
    labels = np.array(made.spec.classes)[val.labels]
    right = np.mean(np.array(table["predicted_label"].to_pylist()) == labels)
    assert right == pytest.approx(best.val_accuracy, abs=1e-12)
    loss = -np.mean(np.log(table["label_score"].to_numpy()))
    assert loss == pytest.approx(best.val_loss, rel=1e-5)

    network = build_network()
    network.load_state_dict(made.checkpoints.load_best_weights(latest[0]))
    normalized = made.train_step.normalize_inputs(val.pixels)
    scores = network.eval()(normalized).softmax(1).max(1).values
    np.testing.assert_allclose(table["confidence"], scores.detach().numpy(), rtol=1e-4)


def test_a_probe_changes_the_head_alone(build_trainer: Callable[..., Trainer]) -> None:
    network = build_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    made = build_trainer(network, "probe")
    assert [epoch.phase for epoch in made.run(lambda epoch: None).history] == ["probe"]
    after = made.train_step.eval_network.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.4.weight", "head.4.bias"}


@dataclass(frozen=True)
class BrokenImages(Images):
    """Images of which some cannot be decoded, by their numbers in each split."""

    train: frozenset[int] = frozenset()
    val: frozenset[int] = frozenset()

    def load_split(self, *, held: bool) -> Dataset:
        return Dataset(20, 2, self.val) if held else Dataset(60, 1, self.train)


@pytest.mark.parametrize("strategy", ["probe", "scratch"])
def test_images_that_cannot_be_decoded_are_counted_and_too_many_end_the_training(
    build_trainer: Callable[..., Trainer], strategy: Strategy
) -> None:
    few = BrokenImages(frozenset({3}), frozenset({4, 5}))
    settings: dict[str, Any] = {"data": {"train": "none.csv", "max_error_rate": 0.1}}
    made = build_trainer(build_network(), strategy, images=few, **settings)
    first = made.run(lambda epoch: None).history[0]
    assert (first.train_rows, first.val_rows) == (59, 18)
    assert (first.train_failed, first.val_failed) == (1, 2)
    posts: Any = made.channel
    assert sum("left out: 3.png: is empty" in str(post) for post in posts.posts) == 1

    half = BrokenImages(frozenset(range(30)))
    for images, failed, problem in (
        (half, 30, None),
        (BrokenImages(val=frozenset(range(20))), 20, "none of the validation images can be used"),
        (BrokenImages(frozenset(range(60))), 60, "none of the training images can be used"),
    ):
        made.checkpoints.start_run({})
        made = build_trainer(build_network(), strategy, images=images, **settings)
        found = made.run(lambda epoch: None)
        assert (found.failure_kind, found.problem) == ("failures", problem)
        assert found.failed_images == (failed, 80)
        assert found.history == ()


def test_features_that_overflow_fail_the_training_with_advice(
    build_trainer: Callable[..., Trainer],
) -> None:
    network = build_network()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    # finite, as a weights file must be; the squares of the features are not
    nn.init.constant_(norms[-1].weight, 3e38)
    result = build_trainer(network, "probe").run(lambda epoch: None)
    assert result.failure_kind == "failed"
    assert result.problem is not None
    assert result.problem.startswith("the features of ")
    assert "views of images are NaN or too large in fp32, or other model.weights" in result.problem
    assert result.history == ()


def test_a_run_that_is_resumed_ends_with_the_weights_of_one_that_was_not(
    build_trainer: Callable[..., Trainer],
) -> None:
    whole = build_trainer(build_network(), "scratch", epochs=3)
    expected = whole.run(lambda epoch: None)
    checkpoints = whole.checkpoints
    checkpoints.start_run({})
    # epochs count in the schedule, so the first part has the same number and stops after one
    first = build_trainer(build_network(), "scratch", epochs=3)
    first._run_next_epoch()
    first.checkpoints.wait_until_saved()
    resumed = build_trainer(build_network(), "scratch", epochs=3)
    result = resumed.run(lambda epoch: None)
    assert resumed.channel.posts[0] == "resuming: epoch 2"
    for here, there in zip(result.history, expected.history, strict=True):
        assert (here.train_loss, here.val_loss) == (there.train_loss, there.val_loss)
    after, wanted = resumed.train_step.network.state_dict(), whole.train_step.network.state_dict()
    assert all(torch.equal(after[name], wanted[name]) for name in wanted)


def build_taught_targets(temperature: float = 2.0) -> TargetTable:
    """A table in which the labels of all rows of class 2 are known from a teacher alone.

    The rows of class 2 get the codes of a teacher's scores in `TaughtImages`.
    """
    rng = np.random.default_rng(3)
    scores = compute_log_scores(rng.dirichlet([0.3, 0.3, 6.0], 30))
    labels = np.full(30, NO_LABEL)
    labels[:5] = 2
    return TargetTable(CLASSES, teacher=TeacherTargets(scores, labels, temperature, 0.9))


class TaughtImages(Images):
    def load_split(self, *, held: bool) -> Dataset:
        made = super().load_split(held=held)
        if not held:
            (rows,) = np.nonzero(made.labels == 2)
            made.labels[rows] = CLASSES + np.arange(len(rows))
        return made


@pytest.mark.parametrize(
    ("strategy", "probes", "lr", "epochs"),
    [("scratch", 0, 1e-2, 12), ("probe_then_finetune", 1, 1e-4, 2)],
)
def test_a_student_learns_a_class_from_the_scores_of_a_teacher_and_resumes(
    build_trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
    strategy: Strategy,
    probes: int,
    lr: float,
    epochs: int,
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "Images", TaughtImages)
    settings = {
        "targets": build_taught_targets(),
        "epochs": epochs,
        "optim": {"lr": lr, "ema": 0.5},
        "augment": {"preset": "none", "mixup": 0.2},
        "data": {"train": "none.csv", "sampling": "balanced"},
    }
    whole = build_trainer(build_network(), strategy, **settings)
    expected = whole.run(lambda epoch: None)
    assert len(expected.history) == epochs + probes
    assert {epoch.train_rows for epoch in expected.history} == {60}
    # the head of a probe of random features is too large to be fine-tuned
    assert expected.history[0 if probes else -1].val_accuracy >= 0.9

    whole.checkpoints.start_run({})
    first = build_trainer(build_network(), strategy, **settings)
    for _ in range(1 + probes):
        first._run_next_epoch()
    first.checkpoints.wait_until_saved()
    resumed = build_trainer(build_network(), strategy, **settings)
    result = resumed.run(lambda epoch: None)
    for here, there in zip(result.history, expected.history, strict=True):
        assert (here.train_loss, here.val_loss) == (there.train_loss, there.val_loss)
    after, wanted = resumed.train_step.network.state_dict(), whole.train_step.network.state_dict()
    assert all(torch.equal(after[name], wanted[name]) for name in wanted)


def test_adapters_are_trained_resumed_and_merged_into_plain_weights(
    build_trainer: Callable[..., Trainer],
) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("timm")

    def build_transformer() -> nn.Module:
        torch.manual_seed(1)
        options = {"img_size": SIDE, "patch_size": SIDE // 2, "depth": 1, "embed_dim": 24}
        name = "timm:vit_tiny_patch16_224"
        return zoo.build_network(zoo.resolve_architecture(name, options), CLASSES)

    whole = build_trainer(build_transformer(), "lora", epochs=3)
    expected = whole.run(lambda epoch: None)
    assert [epoch.phase for epoch in expected.history] == ["probe", "train", "train", "train"]
    trained, before = whole.train_step.network.state_dict(), build_transformer().state_dict()
    kept = "blocks.0.mlp.fc1"
    assert torch.equal(trained[f"{kept}.base_layer.weight"], before[f"{kept}.weight"])
    assert trained[f"{kept}.lora_B.default.weight"].abs().max() > 0

    whole.checkpoints.start_run({})
    first = build_trainer(build_transformer(), "lora", epochs=3)
    for _ in range(2):
        first._run_next_epoch()
    first.checkpoints.wait_until_saved()
    resumed = build_trainer(build_transformer(), "lora", epochs=3)
    result = resumed.run(lambda epoch: None)
    for here, there in zip(result.history, expected.history, strict=True):
        assert (here.train_loss, here.val_loss) == (there.train_loss, there.val_loss)

    found = resumed.checkpoints.load_latest()
    assert found is not None
    plain = build_transformer()
    plain.load_state_dict(resumed.checkpoints.load_best_weights(found[0]))
    # the evaluated network has the adapters
    plain.load_state_dict(resumed.train_step.get_weights(resumed.train_step.state_dict()))
    assert not torch.equal(plain.state_dict()[f"{kept}.weight"], before[f"{kept}.weight"])
    inputs = resumed.train_step.normalize_inputs(Dataset(4, seed=3).pixels)
    with torch.inference_mode():
        theirs = resumed.train_step.eval_network.eval()(inputs)
        torch.testing.assert_close(plain.eval()(inputs), theirs, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("alone", ["nccl"], indirect=True)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_a_gpu_over_nccl_learns_and_is_resumed(
    build_trainer: Callable[..., Trainer], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # as in a training worker
    check_a_run_is_resumed(build_trainer, "cuda", precision)


def check_a_run_is_resumed(
    build_trainer: Callable[..., Trainer], device: str, precision: str
) -> None:
    settings: dict[str, Any] = {
        "epochs": 4, "device": device, "worker_precision": precision, "optim": {"lr": 1e-2},
    }  # fmt: skip
    whole = build_trainer(build_network(), "probe_then_finetune", **settings)
    expected = whole.run(lambda epoch: None)
    assert expected.failure_kind is None
    assert max(epoch.val_accuracy for epoch in expected.history) > 0.8
    whole.checkpoints.start_run({})
    first = build_trainer(build_network(), "probe_then_finetune", **settings)
    for _ in range(2):  # the probe and an epoch
        first._run_next_epoch()
    first.checkpoints.wait_until_saved()
    resumed = build_trainer(build_network(), "probe_then_finetune", **settings)
    result = resumed.run(lambda epoch: None)
    assert resumed.channel.posts[0] == "resuming: epoch 2"
    assert [epoch.epoch for epoch in result.history] == [0, 1, 2, 3, 4]
    # some kernels of the backward pass add in any order
    for here, there in zip(result.history, expected.history, strict=True):
        assert here.val_loss == pytest.approx(there.val_loss, rel=0.05, abs=0.01)
