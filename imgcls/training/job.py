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
from imgcls.cluster.interrupts import awaited, started
from imgcls.cluster.session import Interruption
from imgcls.data import filesystem
from imgcls.errors import RunFailed, StorageMissing
from imgcls.models.bundle import BundleSpec
from imgcls.provenance import provenance
from imgcls.runs.lease import Lease
from imgcls.training.checkpoints import Checkpoints
from imgcls.training.config import TrainConfig
from imgcls.training.data.batches import Views
from imgcls.training.data.cached import Decoded, store_bytes
from imgcls.training.data.streaming import Streamed
from imgcls.training.epoch_metrics import Epoch, followed_board, probe_note
from imgcls.training.loggers import base
from imgcls.training.optim.lr_finder import steepest
from imgcls.training.plots import lr_range, smoothed
from imgcls.training.publish import publish
from imgcls.training.ray_trainer import fit
from imgcls.training.scaling import Workers, awaited_workers, decoding_cpus, fits_store
from imgcls.training.setup import SAMPLES, Task, announce, decode, draw_samples, too_many
from imgcls.training.trainer import Outcome, Work

TRACKERS = "trackers.json"


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
    history: list[Epoch]
    best: Epoch | None
    failed: int
    lr_curve: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Shared:
    """What the trials of a search have in common.

    images: decoded once, for those that see them alike; None where each decodes its own
    told:   called with each epoch of a trial, in a thread of its own
    interruption: by which the trial is stopped
    """

    images: Decoded | None
    told: Callable[[Epoch], None]
    interruption: Interruption


def run(
    task: Task,
    checkpoints: Checkpoints,
    lease: Lease,
    interruption: Interruption,
    shared: Shared | None = None,
) -> TrainResult:
    """Decode, train and publish; see `train` for what it raises."""
    begun = time.monotonic()
    try:
        workers = awaited_workers(task.config.scale, interruption)
        return _run(task, workers, checkpoints, lease, interruption, shared, begun)
    finally:
        autoscaler.give_back()


def _run(
    task: Task,
    workers: Workers,
    checkpoints: Checkpoints,
    lease: Lease,
    interruption: Interruption,
    shared: Shared | None,
    begun: float,
) -> TrainResult:
    config, nodes = task.config, session.nodes()
    cropped = config.augment.recipe().crop_scale is not None
    views = Views.of(task.preprocess, cropped=cropped, max_bytes=config.data.max_bytes)
    rows = task.examples.rows
    fits = fits_store(views.bytes_of(rows), store_bytes())
    cached = fits if config.data.cache is None else config.data.cache
    announce(task, workers, views, cached=cached)
    images: Decoded | Streamed
    if shared is not None and shared.images is not None and shared.images.views == views:
        images = shared.images
    elif cached:
        cpus = sum(node.cpus for node in nodes)
        images = awaited(started(lambda: decode(task, views, cpus)), interruption)
    else:
        images = Streamed(ray.put(rows), views, decoding_cpus(nodes, workers))
    draw_samples(task, images)
    work = Work(
        config=config,
        strategy=task.strategy,
        architecture=task.architecture,
        classes=len(task.examples.classes),
        weights=ray.put(task.network.state_dict()),
        preprocess=task.preprocess,
        images=images,
        class_weights=task.class_weights,
        head_shares=task.head_shares,
    )
    if config.find_lr:
        with followed_board(config.epochs, lambda epoch: None) as board:
            outcome = fit(work, workers, board, interruption)
        if checkpoints.identity() is None:
            filesystem.remove(checkpoints.folder)  # else it belongs to an unfinished training
        return _suggest_lr(config, outcome)
    with _tracking(task, checkpoints) as tracking:

        def told(epoch: Epoch) -> None:
            tracking.epoch(epoch.epoch, _numbers(epoch))
            _keep_trackers(checkpoints, tracking)
            if shared is not None:
                shared.told(epoch)

        with followed_board(config.epochs, told) as board:
            outcome = fit(work, workers, board, interruption)
        _check(task, outcome, checkpoints)
        lease.check()
        failed = _failed(images, outcome)
        best, files = _publish(task, outcome, checkpoints, workers, failed, begun)
        tracking.finish({f"best_{k}": v for k, v in _numbers(best).items()}, files)
    filesystem.remove(checkpoints.folder)
    return TrainResult(config.output, list(outcome.history), best, sum(failed))


# ---------------------------------------------------------------------- while they work


@contextlib.contextmanager
def _tracking(task: Task, checkpoints: Checkpoints) -> Iterator[base.Tracking]:
    url = filesystem.join(checkpoints.folder, TRACKERS)
    try:
        state = json.loads(filesystem.read(url))
    except (StorageMissing, ValueError):
        state = None
    latest = checkpoints.latest()
    history = latest[0].standing.history if latest else ()
    first = history[-1].epoch + 1 if history else 0
    with base.tracking(task.config.track, task.config.output, state) as tracking:
        tracking.start(task.config.model_dump(mode="json"), first)
        _keep_trackers(checkpoints, tracking)
        yield tracking


def _keep_trackers(checkpoints: Checkpoints, tracking: base.Tracking) -> None:
    body = json.dumps(tracking.state).encode()
    filesystem.write(filesystem.join(checkpoints.folder, TRACKERS), body)


def _numbers(epoch: Epoch) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in asdict(epoch).items()
        if isinstance(value, (int, float)) and name != "epoch"
    }


# ---------------------------------------------------------------------- after them


def _check(task: Task, outcome: Outcome, checkpoints: Checkpoints) -> None:
    """Raise what the workers ended for."""
    config = task.config
    if outcome.kind == "diverged":
        coarse = f", or say --precision fp32 (it was {outcome.precision})"
        saved = checkpoints.saved()
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
        raise too_many(failed, rows, config.data.max_error_rate, " (some are named above)")


def _failed(images: Decoded | Streamed, outcome: Outcome) -> tuple[int, int]:
    """Images left out of training and of validation."""
    if isinstance(images, Decoded):
        held = sum(failure.held for failure in images.failures)
        return len(images.failures) - held, held
    last = outcome.history[-1]
    return last.train_failed, last.val_failed


def _publish(
    task: Task,
    outcome: Outcome,
    checkpoints: Checkpoints,
    workers: Workers,
    failed: tuple[int, int],
    begun: float,
) -> tuple[Epoch, list[str]]:
    """Write the bundle; returns its best epoch and the files beside it."""
    latest = checkpoints.latest()
    best = None if latest is None else latest[0].standing.best_epoch
    if latest is None or best is None:
        raise RunFailed(f"{checkpoints.folder}: the saved states are gone; run it again")
    config, examples = task.config, task.examples
    spec = BundleSpec(
        architecture=task.architecture,
        classes=examples.classes,
        preprocess=task.preprocess,
        provenance=provenance(config.model_dump(mode="json", exclude={"storage"}))
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
        metrics=_metrics(best),
    )
    files = publish(
        config.output,
        spec,
        checkpoints.best_weights(latest[0]),
        outcome.history,
        best,
        workers=str(workers),
        seconds=time.monotonic() - begun,
        class_rows={
            name: (train, val)
            for name, train, val in zip(
                examples.classes,
                examples.per_class(held=False),
                examples.per_class(held=True),
                strict=True,
            )
        },
        validation=examples.manifest(held=True),
        samples=SAMPLES,
    )
    assert config.optim.lr is not None
    note = probe_note(outcome.history, best, lr=config.optim.lr)
    if note is not None:
        print(f"note: {note}", flush=True)
    print(
        f"best: {best.name}, val acc {100 * best.val_accuracy:.1f} % -> {config.output}",
        flush=True,
    )
    return best, files


def _metrics(best: Epoch) -> dict[str, float]:
    names = (
        "val_accuracy",
        "val_balanced_accuracy",
        "val_loss",
        "train_accuracy",
        "train_loss",
        "epoch",
    )
    return {name: float(getattr(best, name)) for name in names}


def _suggest_lr(config: TrainConfig, outcome: Outcome) -> TrainResult:
    """Draw the LR range test and say what to take from it."""
    if outcome.kind is not None or len(outcome.lr_curve) < 2:
        raise RunFailed(f"the LR range test came to nothing: {outcome.problem or 'no step'}")
    lrs, losses = zip(*outcome.lr_curve, strict=True)
    suggestion = steepest(lrs, smoothed(np.asarray(losses)))
    files = {f"plots/{n}": data for n, data in lr_range(lrs, losses, suggestion).items()}
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
