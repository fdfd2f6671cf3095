"""What a training does before its workers start: say what was decided, decode, show samples."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from torch import nn

from imgcls.data import filesystem
from imgcls.data.preprocess import Preprocess
from imgcls.errors import TooManyErrors
from imgcls.models.bundle import Architecture
from imgcls.training.augment.augment import Augment
from imgcls.training.augment.preview import choose_sample_rows, draw_preview
from imgcls.training.config import TrainConfig
from imgcls.training.data.batches import DecodeFailure, DecodeSettings, decode_block, view_pixels
from imgcls.training.data.cached import CachedImages, decode_images
from imgcls.training.data.examples import Examples
from imgcls.training.data.streaming import StreamedImages
from imgcls.training.optim.strategy import Strategy
from imgcls.training.sampler import steps_per_epoch
from imgcls.training.scaling import WorkerPlan

SAMPLES_PLOT = "plots/augmented.png"
SAMPLE_COUNT = 8
"""Images in the picture of augmented samples."""


@dataclass(frozen=True)
class TrainSetup:
    """What was settled before anything started.

    strategy:      as it is meant
    class_weights: of the loss, or None
    head_shares:   as `network.head_shares` gives them; empty without a probe
    identity:      what makes two runs the same run
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


def log_setup(
    task: TrainSetup, workers: WorkerPlan, views: DecodeSettings, *, cached: bool
) -> None:
    config, examples = task.config, task.examples
    rows, held = examples.count(held=False), examples.count(held=True)
    origin = "held out of it" if config.data.val is None else f"from {config.data.val.path}"
    steps = steps_per_epoch(rows, config.batch_size, workers.count)
    parameters = sum(p.numel() for p in task.network.parameters())
    weights = f"weights {config.model.weights}" if config.model.weights else "random weights"
    pre = task.preprocess
    where = "kept in memory" if cached else "more than memory holds: decoded in every epoch"
    print(
        f"data: {rows:,} training images of {len(examples.classes)} classes from "
        f"{config.data.train.path}, {held:,} to validate {origin}\n"
        f"      {views.compute_decoded_bytes(examples.rows) / 1e6:,.0f} MB decoded, {where}\n"
        f"model: {config.model.name}, {parameters:,} parameters, {weights}, "
        f"{pre.crop}x{pre.crop} input ({pre.mode})\n"
        f"strategy: {task.strategy}; augment {config.augment.preset}: "
        f"{config.augment.build_recipe()}\n"
        f"workers: {workers}, {steps:,} steps of {rows // steps} to {-(-rows // steps)} images "
        "per epoch",
        flush=True,
    )
    absent = [
        name
        for name, count in zip(examples.classes, examples.count_per_class(held=True), strict=True)
        if not count
    ]
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        print(
            f"no validation image of {', '.join(map(repr, absent[:5]))}{more}: left out of the "
            "balanced accuracy",
            flush=True,
        )


def decode_dataset(task: TrainSetup, views: DecodeSettings, cpus: float) -> CachedImages:
    """Decode all images and see whether what is left can be trained on."""
    start = time.perf_counter()
    decoded = decode_images(task.examples.rows, views, cpus=cpus)
    rows, failures = task.examples.rows.num_rows, decoded.failures
    print(
        f"decoded: {rows - len(failures):,} images, {len(failures):,} failed, "
        f"{time.perf_counter() - start:.1f} s",
        flush=True,
    )
    allowed = task.config.data.max_error_rate
    listed = "".join(f"\n  {failure.url}: {failure.error}" for failure in failures[:3])
    if len(failures) > allowed * rows:
        raise build_too_many_errors(len(failures), rows, allowed, listed)
    if failures:
        print(f"left out:{listed}" + ("\n  ..." if len(failures) > 3 else ""), flush=True)
    _check_enough_decoded(task.examples, failures, task.config.scale.max_workers)
    return decoded


def build_too_many_errors(
    failed: int, rows: int, allowed: float, listed: str = ""
) -> TooManyErrors:
    return TooManyErrors(
        f"{failed:,} of {rows:,} images cannot be decoded, more than data.max_error_rate "
        f"{allowed:g} allows:{listed}\nmend or remove them, or raise data.max_error_rate"
    )


def _check_enough_decoded(
    examples: Examples, failures: tuple[DecodeFailure, ...], workers: int
) -> None:
    lost = Counter((failure.held, failure.label) for failure in failures)
    train = examples.count_per_class(held=False)
    for code, name in enumerate(examples.classes):
        if train[code] <= lost[False, code]:
            raise TooManyErrors(
                f"class {name!r}: none of its training images can be decoded; mend them or remove "
                "the class"
            )
    left = {
        held: examples.count(held=held) - sum(n for (h, _), n in lost.items() if h == held)
        for held in (False, True)
    }
    if not left[True]:
        raise TooManyErrors("none of the validation images can be decoded; mend them")
    if left[False] < workers:
        raise TooManyErrors(
            f"only {left[False]} training images can be decoded, fewer than scale.num_workers "
            f"{workers}; mend the others"
        )


def draw_samples(task: TrainSetup, images: CachedImages | StreamedImages) -> None:
    """The picture of what augmentation makes of some training images."""
    augment = Augment(
        task.config.augment, size=task.preprocess.crop, num_classes=len(task.examples.classes)
    )
    if isinstance(images, CachedImages):
        shown = images.load_split(held=False)
        rows = choose_sample_rows(shown.labels, SAMPLE_COUNT)
        pixels, labels = shown.gather_pixels(rows), shown.labels[rows]
    else:
        train = task.examples.rows.filter(pc.invert(task.examples.rows.column("held")))
        rows = choose_sample_rows(train.column("label").to_numpy(), SAMPLE_COUNT)
        table = decode_block(train.take(pa.array(rows)), images.settings).combine_chunks()
        (batch,) = table.to_batches()
        good = batch.column("error").is_null().to_numpy(zero_copy_only=False)
        pixels = view_pixels(batch, images.settings.train)[good]
        labels = batch.column("label").to_numpy()[good]
    if len(labels):
        picture = draw_preview(
            pixels, labels, task.examples.classes, augment, seed=task.config.seed
        )
        filesystem.write(filesystem.join(task.config.output, SAMPLES_PLOT), picture)
