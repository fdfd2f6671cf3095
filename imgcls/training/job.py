"""A training under way: decode, run the workers, publish the best weights."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import ray

from imgcls.cluster import autoscaler, session
from imgcls.cluster.interrupts import Interruption, run_in_thread, wait_interruptibly
from imgcls.data import filesystem
from imgcls.errors import RunFailed, StorageMissing
from imgcls.models.bundle import BundleSpec
from imgcls.runs.lease import Lease
from imgcls.runs.provenance import build_provenance
from imgcls.training.checkpoints import Checkpoints
from imgcls.training.config import TrainConfig
from imgcls.training.data.batches import DecodeSettings
from imgcls.training.data.cached import CachedImages, find_store_bytes
from imgcls.training.data.streaming import StreamedImages
from imgcls.training.epoch_metrics import EpochMetrics, format_probe_note, open_driver_channel
from imgcls.training.loggers import base
from imgcls.training.optim.lr_finder import find_steepest_lr
from imgcls.training.plots import draw_lr_range, smooth_curve
from imgcls.training.publish import publish_bundle
from imgcls.training.ray_trainer import fit_torch_trainer
from imgcls.training.scaling import (
    WorkerPlan,
    compute_decode_cpus,
    fits_object_store,
    wait_for_worker_plan,
)
from imgcls.training.setup import (
    SAMPLES_PLOT,
    TrainSetup,
    build_too_many_errors,
    decode_dataset,
    draw_samples,
    log_setup,
)
from imgcls.training.trainer import TrainLoopResult, TrainLoopSpec

LOGGER_STATE_FILE = "trackers.json"


@dataclass(frozen=True)
class TrainResult:
    """What a training came to.

    bundle:   URL of the bundle folder, which holds the weights of the epoch `best`
    history:  every epoch, in order; epoch 0 is the linear probe
    best:     None after an LR range test, which makes no bundle
    failed:   images that could not be decoded and were left out
    lr_curve: of an LR range test: (learning rate, loss in nats) pairs
    """

    bundle: str
    history: list[EpochMetrics]
    best: EpochMetrics | None
    failed: int
    lr_curve: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class TrialContext:
    """What the trials of a search have in common.

    images: decoded once, for those that see them alike; None where each decodes its own
    told:   called with each epoch of a trial, in a thread of its own
    interruption: by which the trial is stopped
    """

    images: CachedImages | None
    on_epoch: Callable[[EpochMetrics], None]
    interruption: Interruption


def run_training(
    task: TrainSetup,
    checkpoints: Checkpoints,
    lease: Lease,
    interruption: Interruption,
    shared: TrialContext | None = None,
) -> TrainResult:
    """Decode, train and publish; see `train` for what it raises."""
    begun = time.monotonic()
    try:
        workers = wait_for_worker_plan(task.config.scale, interruption)
        return _decode_train_publish(task, workers, checkpoints, lease, interruption, shared, begun)
    finally:
        autoscaler.cancel_request()


def _decode_train_publish(
    task: TrainSetup,
    workers: WorkerPlan,
    checkpoints: Checkpoints,
    lease: Lease,
    interruption: Interruption,
    shared: TrialContext | None,
    begun: float,
) -> TrainResult:
    config, nodes = task.config, session.list_nodes()
    cropped = config.augment.build_recipe().crop_scale is not None
    views = DecodeSettings.from_preprocess(
        task.preprocess, cropped=cropped, max_bytes=config.data.max_bytes
    )
    rows = task.examples.rows
    fits = fits_object_store(views.compute_decoded_bytes(rows), find_store_bytes())
    cached = fits if config.data.cache is None else config.data.cache
    log_setup(task, workers, views, cached=cached)
    images: CachedImages | StreamedImages
    if shared is not None and shared.images is not None and shared.images.views == views:
        images = shared.images
    elif cached:
        cpus = sum(node.cpus for node in nodes)
        images = wait_interruptibly(
            run_in_thread(lambda: decode_dataset(task, views, cpus)), interruption
        )
    else:
        images = StreamedImages(ray.put(rows), views, compute_decode_cpus(nodes, workers))
    draw_samples(task, images)
    work = TrainLoopSpec(
        config=config,
        strategy=task.strategy,
        architecture=task.architecture,
        num_classes=len(task.examples.classes),
        initial_weights=ray.put(task.network.state_dict()),
        preprocess=task.preprocess,
        images=images,
        class_weights=task.class_weights,
        head_coefficients=task.head_coefficients,
    )
    if config.find_lr:
        with open_driver_channel(config.epochs, lambda epoch: None) as board:
            outcome = fit_torch_trainer(work, workers, board, interruption)
        if checkpoints.read_identity() is None:
            filesystem.remove(checkpoints.folder)  # else it belongs to an unfinished training
        return _write_lr_curve(config, outcome)
    with _open_loggers(task, checkpoints) as tracking:

        def told(epoch: EpochMetrics) -> None:
            tracking.log_epoch(epoch.epoch, _numeric_metrics(epoch))
            _save_logger_state(checkpoints, tracking)
            if shared is not None:
                shared.on_epoch(epoch)

        with open_driver_channel(config.epochs, told) as board:
            outcome = fit_torch_trainer(work, workers, board, interruption)
        _raise_failure(task, outcome, checkpoints)
        lease.check()
        failed = _count_failed(images, outcome)
        best, files = _publish_best(task, outcome, checkpoints, workers, failed, begun)
        tracking.finish({f"best_{k}": v for k, v in _numeric_metrics(best).items()}, files)
    filesystem.remove(checkpoints.folder)
    return TrainResult(config.output, list(outcome.history), best, sum(failed))


# ---------------------------------------------------------------------- while they work


@contextlib.contextmanager
def _open_loggers(task: TrainSetup, checkpoints: Checkpoints) -> Iterator[base.MetricLoggers]:
    url = filesystem.join(checkpoints.folder, LOGGER_STATE_FILE)
    try:
        state = json.loads(filesystem.read(url))
    except (StorageMissing, ValueError):
        state = None
    latest = checkpoints.load_latest()
    history = latest[0].standing.history if latest else ()
    first = history[-1].epoch + 1 if history else 0
    with base.open_loggers(task.config.track, task.config.output, state) as tracking:
        tracking.start(task.config.model_dump(mode="json"), first)
        _save_logger_state(checkpoints, tracking)
        yield tracking


def _save_logger_state(checkpoints: Checkpoints, tracking: base.MetricLoggers) -> None:
    body = json.dumps(tracking.state).encode()
    filesystem.write(filesystem.join(checkpoints.folder, LOGGER_STATE_FILE), body)


def _numeric_metrics(epoch: EpochMetrics) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in asdict(epoch).items()
        if isinstance(value, (int, float)) and name != "epoch"
    }


# ---------------------------------------------------------------------- after them


def _raise_failure(task: TrainSetup, outcome: TrainLoopResult, checkpoints: Checkpoints) -> None:
    """Raise what the workers ended for."""
    config = task.config
    if outcome.kind == "diverged":
        coarse = f", or say --precision fp32 (it was {outcome.precision})"
        saved = checkpoints.list_states()
        kept = ""
        if saved and saved[0].best is not None:
            kept = (
                "; the best weights until then are in "
                f"{filesystem.join(checkpoints.folder, saved[0].best)}"
            )
        raise RunFailed(
            f"the training diverged: {outcome.problem}; lower optim.lr ({config.optim.lr:g}) or "
            f"raise optim.warmup{coarse if outcome.precision != 'fp32' else ''}{kept}"
        )
    if outcome.kind == "failures":
        failed, rows = outcome.failed
        raise build_too_many_errors(
            failed, rows, config.data.max_error_rate, " (some are named above)"
        )


def _count_failed(
    images: CachedImages | StreamedImages, outcome: TrainLoopResult
) -> tuple[int, int]:
    """Images left out of training and of validation."""
    if isinstance(images, CachedImages):
        held = sum(failure.held for failure in images.failures)
        return len(images.failures) - held, held
    last = outcome.history[-1]
    return last.train_failed, last.val_failed


def _publish_best(
    task: TrainSetup,
    outcome: TrainLoopResult,
    checkpoints: Checkpoints,
    workers: WorkerPlan,
    failed: tuple[int, int],
    begun: float,
) -> tuple[EpochMetrics, list[str]]:
    """Write the bundle; returns its best epoch and the files beside it."""
    latest = checkpoints.load_latest()
    best = None if latest is None else latest[0].standing.best_epoch
    if latest is None or best is None:
        raise RunFailed(f"{checkpoints.folder}: the saved states are gone; run it again")
    config, examples = task.config, task.examples
    spec = BundleSpec(
        architecture=task.architecture,
        classes=examples.classes,
        preprocess=task.preprocess,
        provenance=build_provenance(config.model_dump(mode="json", exclude={"storage"}))
        | {
            "seed": config.seed,
            "run": task.identity,
            "strategy": task.strategy,
            "precision": outcome.precision,
            "workers": str(workers),
            "data": {
                "manifests": {key: asdict(source) for key, source in examples.sources.items()},
                "train_rows": examples.count(held=False),
                "val_rows": examples.count(held=True),
                "train_failed": failed[0],
                "val_failed": failed[1],
            },
        },
        metrics=_bundle_metrics(best),
    )
    files = publish_bundle(
        config.output,
        spec,
        checkpoints.load_best_weights(latest[0]),
        outcome.history,
        best,
        workers=str(workers),
        seconds=time.monotonic() - begun,
        class_rows={
            name: (train, val)
            for name, train, val in zip(
                examples.classes,
                examples.count_per_class(held=False),
                examples.count_per_class(held=True),
                strict=True,
            )
        },
        validation=examples.build_manifest(held=True),
        samples=SAMPLES_PLOT,
    )
    assert config.optim.lr is not None
    note = format_probe_note(outcome.history, best, lr=config.optim.lr)
    if note is not None:
        print(f"note: {note}", flush=True)
    print(
        f"best: {best.name}, val acc {100 * best.val_accuracy:.1f} % -> {config.output}",
        flush=True,
    )
    return best, files


def _bundle_metrics(best: EpochMetrics) -> dict[str, float]:
    names = (
        "val_accuracy",
        "val_balanced_accuracy",
        "val_loss",
        "train_accuracy",
        "train_loss",
        "epoch",
    )
    return {name: float(getattr(best, name)) for name in names}


def _write_lr_curve(config: TrainConfig, outcome: TrainLoopResult) -> TrainResult:
    """Draw the LR range test and say what to take from it."""
    if outcome.kind is not None or len(outcome.lr_curve) < 2:
        raise RunFailed(f"the LR range test came to nothing: {outcome.problem or 'no step'}")
    lrs, losses = zip(*outcome.lr_curve, strict=True)
    suggestion = find_steepest_lr(lrs, smooth_curve(np.asarray(losses)))
    files = {f"plots/{n}": data for n, data in draw_lr_range(lrs, losses, suggestion).items()}
    sink = io.BytesIO()
    pd.DataFrame({"lr": lrs, "loss": losses}).to_parquet(sink, index=False)
    files["lr_range.parquet"] = sink.getvalue()
    for name, data in files.items():
        filesystem.write(filesystem.join(config.output, name), data)
    print(
        f"LR range test: {len(lrs)} steps up to {lrs[-1]:.2g}; the loss falls fastest at "
        f"{suggestion:.2g}: try --optim.lr {suggestion:.1e}\n"
        f"drawn in {filesystem.join(config.output, 'plots/lr_range.png')}",
        flush=True,
    )
    return TrainResult(config.output, [], None, 0, outcome.lr_curve)
