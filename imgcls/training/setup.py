"""Preparation of a training: resolve and check the request, decode the images, draw samples.

`resolve_setup` runs before Ray starts and raises for every request that cannot work. The other
functions run on the driver, before the training workers start.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import nn

from imgcls import log
from imgcls.cluster.ray_data import DataExecution
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.data.storage import filesystem
from imgcls.errors import ConfigError, RequestError, TooManyErrors
from imgcls.formatting import format_lines
from imgcls.models.bundle import Architecture
from imgcls.training import network as networks
from imgcls.training.augment.augment import Augment
from imgcls.training.augment.preview import choose_sample_rows, draw_preview
from imgcls.training.config import LossConfig, Strategy, TrainConfig
from imgcls.training.data.batches import DecodeFailure, DecodeSettings, decode_block, view_pixels
from imgcls.training.data.cached import CachedImages, decode_images, find_store_bytes
from imgcls.training.data.examples import Examples, read_examples
from imgcls.training.data.streaming import StreamedImages
from imgcls.training.data.targets import TargetTable
from imgcls.training.data.teacher import add_teacher_rows, describe_teacher
from imgcls.training.loggers import base
from imgcls.training.optim.lora import check_can_adapt
from imgcls.training.optim.loss import compute_class_weights
from imgcls.training.optim.strategy import (
    choose_default_lr,
    choose_schedule,
    describe_schedule,
    has_probe,
    resolve_strategy,
)
from imgcls.training.sampler import Int64Array, steps_per_epoch
from imgcls.training.scaling import WorkerPlan, fits_object_store
from imgcls.training.starting_model import ModelRecord, find_starting_model, use_model

SAMPLES_PLOT = "plots/augmented.png"
SAMPLE_COUNT = 8
"""Number of images in the picture of augmented samples."""


@dataclass(frozen=True)
class TrainSetup:
    """A request that was checked, and everything derived from it before Ray starts.

    strategy:          the strategy to use, also where the request leaves it open
    network:           on the CPU, with its initial weights
    class_weights:     per class, for the loss; None for equal weights
    head_coefficients: see `network.compute_head_coefficients`; empty without a probe
    identity:          settings, data and initial weights; equal for two runs of one training.
                       With `registered_model`, the version of a registered model to start from
    """

    config: TrainConfig
    strategy: Strategy
    examples: Examples
    architecture: Architecture
    preprocess: Preprocess
    network: nn.Module
    class_weights: list[float] | None
    head_coefficients: tuple[float, ...]
    identity: dict[str, Any]


def resolve_setup(config: TrainConfig, registered_model: ModelRecord | None = None) -> TrainSetup:
    """Check a request and derive everything that a training needs before Ray starts.

    registered_model: of a request whose `model.name` is the folder of a registered model already
    Raises a RequestError when the training cannot work as requested.
    """
    starting = find_starting_model(config)
    if starting is not None:
        registered_model, config = starting.record, use_model(config, starting.url)
    config = config.model_copy(update={"model": networks.resolve_model_snapshot(config.model)})
    examples = read_examples(config.data, config.task)
    strategy = resolve_strategy(config.strategy, pretrained=config.model.weights is not None)
    if config.teacher is not None:
        examples = add_teacher_rows(examples, config, strategy)
    check_task(config, examples, strategy)
    rows = examples.count(held=False)
    asked, config = config, choose_schedule(config, strategy, rows)
    chosen = describe_schedule(asked, config, strategy, rows)
    if chosen is not None:
        log.emit("note", chosen)
    if config.images_per_step > rows:
        log.emit(
            "note",
            f"batch_size reduced from {config.images_per_step} to the {rows} training images",
        )
        config = config.model_copy(update={"batch_size": rows})
    smallest = _min_rows_per_part(config, rows)
    class_weights = compute_weights(config.loss, examples)
    architecture, preprocess = networks.resolve_model(config.model)
    if config.optim.lr is None:
        optim = config.optim.model_copy(update={"lr": choose_default_lr(strategy, architecture)})
        config = config.model_copy(update={"optim": optim})
    network = networks.build_initial_network(
        architecture, config.model.weights, len(examples.classes), seed=config.seed
    )
    networks.set_regularization(network, config.model)
    if strategy == "lora":
        check_can_adapt(network)
    networks.check_can_train(network, preprocess, smallest)
    coefficients: tuple[float, ...] = ()
    if has_probe(strategy):
        coefficients = networks.compute_head_coefficients(network, preprocess)
    base.check_loggers(config.track, config.output)
    return TrainSetup(
        config=config,
        strategy=strategy,
        examples=examples,
        architecture=architecture,
        preprocess=preprocess,
        network=network,
        class_weights=class_weights,
        head_coefficients=coefficients,
        identity=_compute_identity(config, examples, network, registered_model),
    )


def check_task(config: TrainConfig, examples: Examples, strategy: Strategy) -> None:
    """Raise ConfigError for settings that the task does not have."""
    loss, task = config.loss, examples.targets.task
    if strategy == "probe":
        check_probe(config)
    if task == "single_label":
        if loss.negative_gamma is not None or loss.negative_margin:
            name = "negative_margin" if loss.negative_gamma is None else "negative_gamma"
            raise ConfigError(f"loss.{name}: is for multilabel; remove it")
        if config.best_by == "val_mean_average_precision":
            raise ConfigError("best_by val_mean_average_precision: is for multilabel; set another")
        return
    is_weighted = loss.class_weights != "none" or loss.focal_gamma or loss.negative_margin
    if (is_weighted or loss.negative_gamma) and config.best_by == "val_loss":
        log.emit(
            "note",
            "best_by val_loss: the validation loss has no weights and no gamma, unlike that of the "
            "training; pass --best-by val_mean_average_precision",
        )
    if config.data.sampling == "balanced":
        raise ConfigError(
            "data.sampling balanced: is for one label per image; weight the positives of rare "
            "classes with loss.class_weights balanced instead"
        )
    if config.best_by == "val_mean_average_precision" and strategy != "probe":
        _check_has_average_precision(examples)


def _check_has_average_precision(examples: Examples) -> None:
    """Raise ConfigError where the mean average precision of the validation is undefined."""
    positives = examples.count_per_class(held=True)
    negatives = examples.count_negatives(held=True)
    assert negatives is not None
    if not any(map(min, positives, negatives)):
        raise ConfigError(
            "best_by val_mean_average_precision: no class has validation images with and without "
            "it; pass --best-by val_loss, or more validation images (data.val, data.val_fraction)"
        )


def check_probe(config: TrainConfig) -> None:
    """Raise ConfigError for settings that a linear probe would ignore."""
    loss = config.loss
    ignored = {
        "loss.negative_gamma": loss.negative_gamma is not None,
        "loss.negative_margin": loss.negative_margin,
        "loss.focal_gamma": loss.focal_gamma,
        "loss.label_smoothing": loss.label_smoothing,
        "data.sampling balanced": config.data.sampling == "balanced",
    }
    names = [name for name, is_set in ignored.items() if is_set]
    if names:
        verb = "has" if len(names) == 1 else "have"
        other = "" if config.data.embeddings is not None else ", or pass another --strategy"
        raise ConfigError(
            f"{', '.join(names)}: {verb} no effect on a linear probe; remove the setting (rare "
            f"classes can be weighted by loss.class_weights){other}"
        )


def compute_weights(config: LossConfig, examples: Examples) -> list[float] | None:
    """Loss weight of each class; see `compute_class_weights`."""
    return compute_class_weights(
        config,
        examples.classes,
        examples.count_per_class(held=False),
        examples.count_negatives(held=False),
    )


def _min_rows_per_part(config: TrainConfig, rows: int) -> int:
    """The smallest number of images of a worker in one part of a step.

    Raises RequestError when a part would have none.
    """
    workers, parts = config.scale.max_workers, config.scale.accumulate
    name = f"scale.num_workers {workers}" + (
        f" times scale.accumulate {parts}" if parts > 1 else ""
    )
    if rows < workers * parts:
        raise RequestError(
            f"data.train: {rows} training images are fewer than {name}. Lower these settings or "
            "add images."
        )
    if config.images_per_step < workers * parts:
        raise RequestError(
            f"batch_size {config.images_per_step} is smaller than {name}. Set it to at least "
            f"{workers * parts}."
        )
    share = rows // steps_per_epoch(rows, config.images_per_step, workers) // workers
    return max(1, share // parts)


def _compute_identity(
    config: TrainConfig,
    examples: Examples,
    network: nn.Module,
    registered_model: ModelRecord | None,
) -> dict[str, Any]:
    """Settings, data and initial weights; the number of workers is not part of it."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return {
        "settings": config.identity(),
        "data": {key: source.fingerprint for key, source in examples.sources.items()},
        "initial_weights": digest.hexdigest(),
        **({} if registered_model is None else {"registered_model": dict(registered_model)}),
    }


def log_setup(
    setup: TrainSetup, workers: WorkerPlan, decoding: DecodeSettings, *, cached: bool
) -> None:
    """Log the data, the model, the strategy and the workers of a training."""
    config, examples = setup.config, setup.examples
    rows, held = examples.count(held=False), examples.count(held=True)
    added = 0 if examples.teacher is None else examples.teacher.added
    origin = "held out of it" if config.data.val is None else f"from {config.data.val.path}"
    steps = steps_per_epoch(rows, config.images_per_step, workers.count)
    parameters = sum(p.numel() for p in setup.network.parameters())
    weights = f"weights {config.model.weights}" if config.model.weights else "random weights"
    pre = setup.preprocess
    where = "kept in memory" if cached else "decoded in every epoch"
    log.show(
        f"data: {rows - added:,} training images of {len(examples.classes)} classes from "
        f"{config.data.train.path}, {held:,} validation images {origin}\n"
        f"      {decoding.compute_decoded_bytes(examples.rows) / 1e6:,.0f} MB decoded, {where}\n"
        f"{describe_teacher(examples)}"
        f"model: {config.model.name}, {parameters:,} parameters, {weights}, "
        f"{pre.crop}x{pre.crop} input ({pre.mode})\n"
        f"strategy: {setup.strategy}; augment {config.augment.preset}: "
        f"{config.augment.build_recipe()}\n"
        f"workers: {workers}, {steps:,} steps of {rows // steps} to {-(-rows // steps)} images "
        "per epoch",
    )
    absent = [
        name
        for name, count in zip(examples.classes, examples.count_per_class(held=True), strict=True)
        if not count
    ]
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        log.show(
            f"no validation image of {', '.join(map(repr, absent[:5]))}{more}: left out of the "
            "balanced accuracy",
        )


def plan_decoding(setup: TrainSetup) -> tuple[DecodeSettings, bool]:
    """How the images are decoded, and whether once for all epochs; Ray must be connected.

    Once if `data.cache` is set, or by default if the decoded images fit the object store.
    """
    config = setup.config
    cropped = config.augment.build_recipe().crop_scale is not None
    decoding = DecodeSettings.from_preprocess(
        setup.preprocess, cropped=cropped, max_bytes=config.data.max_bytes
    )
    if config.data.cache is not None:
        return decoding, config.data.cache
    needed = decoding.compute_decoded_bytes(setup.examples.rows)
    return decoding, fits_object_store(needed, find_store_bytes())


def decode_dataset(
    setup: TrainSetup, decoding: DecodeSettings, cpus: float, execution: DataExecution
) -> CachedImages:
    """Decode all images into the object store, in an execution that another thread may stop.

    Raises TooManyErrors when too many images cannot be decoded, or too few remain.
    """
    start = time.perf_counter()
    decoded = decode_images(setup.examples.rows, decoding, cpus=cpus, execution=execution)
    rows, failures = setup.examples.rows.num_rows, decoded.failures
    log.show(
        f"decoded: {rows - len(failures):,} images, {len(failures):,} failed, "
        f"{time.perf_counter() - start:.1f} s",
    )
    allowed = setup.config.data.max_error_rate
    listed = format_lines((f"{failure.url}: {failure.error}" for failure in failures), 3)
    if len(failures) > allowed * rows:
        raise build_too_many_errors(len(failures), rows, allowed, listed)
    if failures:
        log.emit("note", f"left out:{listed}")
    check_enough_left(setup.examples, failures, setup.config.scale.max_workers)
    return decoded


def check_same_examples(examples: Examples, images: CachedImages) -> None:
    """Raise RequestError unless the images were decoded for these examples."""
    if images.examples != examples.compute_fingerprint():
        raise RequestError(
            "data.train, data.val or teacher.path: has other images, labels or scores than when "
            "the search decoded its images. Leave these files as they are during a search, and "
            "search over no key that changes the rows or their split; rerun the search"
        )


def build_too_many_errors(
    failed: int, rows: int, allowed: float, listed: str = ""
) -> TooManyErrors:
    """The error of a training with more failed images than data.max_error_rate allows."""
    return TooManyErrors(
        f"{failed:,} of {rows:,} images cannot be decoded, more than data.max_error_rate "
        f"{allowed:g} allows:{listed}\nFix or remove them, or raise data.max_error_rate."
    )


def check_enough_left(examples: Examples, failures: Sequence[DecodeFailure], workers: int) -> None:
    """Raise TooManyErrors when a class, the validation or a worker has no image left."""
    lost = {
        held: np.array([each.label for each in failures if each.held == held], np.int64)
        for held in (False, True)
    }
    remaining = zip(
        examples.classes,
        examples.count_per_class(held=False),
        examples.count_labels(lost[False]),
        strict=True,
    )
    for name, count, failed in remaining:
        if count <= failed:
            raise TooManyErrors(
                f"class {name!r}: none of its training images can be used. Fix them or remove "
                "the class."
            )
    left = {held: examples.count(held=held) - len(codes) for held, codes in lost.items()}
    if not left[True]:
        raise TooManyErrors("none of the validation images can be used. Fix them.")
    if left[False] < workers:
        raise TooManyErrors(
            f"only {left[False]} training images can be used, fewer than scale.num_workers "
            f"{workers}. Fix the others or lower scale.num_workers."
        )


def draw_samples(setup: TrainSetup, images: CachedImages | StreamedImages) -> None:
    """Draw some training images before and after augmentation, in `plots/augmented.png`."""
    augment = Augment(
        setup.config.augment, size=setup.preprocess.crop, num_classes=len(setup.examples.classes)
    )
    targets = setup.examples.targets
    if isinstance(images, CachedImages):
        train = images.load_split(held=False)
        rows = choose_sample_rows(_find_sample_classes(targets, train.labels), SAMPLE_COUNT)
        pixels, labels = train.gather_pixels(rows), train.labels[rows]
    else:
        train = setup.examples.rows.filter(pc.invert(setup.examples.rows.column("held")))
        codes = train.column("label").to_numpy()
        rows = choose_sample_rows(_find_sample_classes(targets, codes), SAMPLE_COUNT)
        table = decode_block(train.take(pa.array(rows)), images.settings).combine_chunks()
        (batch,) = table.to_batches()
        good = batch.column("error").is_null().to_numpy(zero_copy_only=False)
        pixels = view_pixels(batch, images.settings.train)[good]
        labels = batch.column("label").to_numpy()[good]
    if len(labels):
        picture = draw_preview(
            pixels,
            targets.decide(labels),
            setup.examples.classes,
            augment,
            seed=setup.config.seed,
        )
        filesystem.write(filesystem.join(setup.config.output, SAMPLES_PLOT), picture)


def _find_sample_classes(targets: TargetTable, codes: Int64Array) -> Int64Array:
    """What the samples are to differ in: the class, or for multilabel the code of the labels."""
    if targets.task == "multilabel":
        return codes
    classes: Int64Array = targets.decide(codes).numpy()
    return classes
