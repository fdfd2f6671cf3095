"""The outputs of a finished training: the bundle, or the curve of an LR range test."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from imgcls.data.storage import filesystem
from imgcls.errors import RunFailed
from imgcls.models.bundle import BUNDLE_FILE, BundleSpec, save_bundle
from imgcls.models.task import SINGLE_LABEL
from imgcls.runs.provenance import build_provenance
from imgcls.training.checkpoints import Checkpoints
from imgcls.training.epoch_metrics import EpochMetrics, TrainLoopResult
from imgcls.training.model_card import build_model_card
from imgcls.training.optim.lr_finder import find_steepest_lr
from imgcls.training.scaling import WorkerPlan
from imgcls.training.setup import SAMPLES_PLOT, TrainSetup

HISTORY_FILE = "history.parquet"
VALIDATION_FILE = "validation.parquet"
METRICS = (
    *(f"val_{name}" for name in SINGLE_LABEL.metrics),
    "train_accuracy",
    "train_loss",
    "epoch",
)
"""Fields of the best epoch that `bundle.json` holds."""


def publish_bundle(
    setup: TrainSetup,
    outcome: TrainLoopResult,
    checkpoints: Checkpoints,
    workers: WorkerPlan,
    *,
    failed: tuple[int, int],
    seconds: float,
) -> tuple[EpochMetrics, list[str]]:
    """Write the bundle of the best epoch: history, curves, weights, model card, `bundle.json` last.

    The `bundle.json` of an existing bundle is removed before its first file changes.

    failed:  numbers of training and of validation images that could not be decoded
    seconds: duration of the training
    Returns the best epoch, and the names of the files that the bundle format itself does not have.
    """
    latest = checkpoints.load_latest()
    best = None if latest is None else latest[0].progress.best_epoch
    if latest is None or best is None:
        raise RunFailed(f"{checkpoints.folder}: the saved states are gone; rerun the same command")
    url, examples = setup.config.output, setup.examples
    spec = _build_spec(setup, outcome, workers, best, failed)
    weights = checkpoints.load_best_weights(latest[0])
    table = pd.DataFrame([asdict(epoch) for epoch in outcome.history])
    files = _render_files(table, best)
    held_out = io.BytesIO()
    pq.write_table(examples.build_manifest(held=True), held_out)
    files[VALIDATION_FILE] = held_out.getvalue()
    filesystem.remove(filesystem.join(url, BUNDLE_FILE))
    for name, data in files.items():
        filesystem.write(filesystem.join(url, name), data)
    train, val = (examples.count_per_class(held=held) for held in (False, True))
    card = build_model_card(
        spec,
        table,
        best.epoch,
        parameters=sum(each.numel() for each in weights.values()),
        workers=str(workers),
        seconds=seconds,
        class_rows=dict(zip(examples.classes, zip(train, val, strict=True), strict=True)),
        plots=["plots/curves.png", SAMPLES_PLOT],
    )
    save_bundle(url, spec, weights, card=card)
    return best, [*files, SAMPLES_PLOT]


def _build_spec(
    setup: TrainSetup,
    outcome: TrainLoopResult,
    workers: WorkerPlan,
    best: EpochMetrics,
    failed: tuple[int, int],
) -> BundleSpec:
    """Everything in `bundle.json`."""
    config, examples = setup.config, setup.examples
    return BundleSpec(
        architecture=setup.architecture,
        classes=examples.classes,
        preprocess=setup.preprocess,
        provenance=build_provenance(config.model_dump(mode="json", exclude={"storage"}))
        | {
            "seed": config.seed,
            "run": setup.identity,
            "strategy": setup.strategy,
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
        metrics={name: float(getattr(best, name)) for name in METRICS},
    )


def _render_files(history: pd.DataFrame, best: EpochMetrics) -> dict[str, bytes]:
    """The history as a table and as curves, by file name."""
    from imgcls.training.plots import draw_curves  # imports matplotlib

    sink = io.BytesIO()
    history.to_parquet(sink, index=False)
    curves = draw_curves(history, best.epoch)
    return {HISTORY_FILE: sink.getvalue()} | {f"plots/{n}": data for n, data in curves.items()}


def write_lr_curve(url: str, curve: Sequence[tuple[float, float]]) -> float:
    """Write the curve of an LR range test as a table and a plot.

    curve: (learning rate, loss) of each step, at least two
    Returns the learning rate at which the loss falls fastest.
    """
    from imgcls.training import plots  # imports matplotlib

    lrs, losses = zip(*curve, strict=True)
    suggestion = find_steepest_lr(lrs, plots.smooth_curve(np.asarray(losses)))
    drawn = plots.draw_lr_range(lrs, losses, suggestion)
    files = {f"plots/{name}": data for name, data in drawn.items()}
    sink = io.BytesIO()
    pd.DataFrame({"lr": lrs, "loss": losses}).to_parquet(sink, index=False)
    files["lr_range.parquet"] = sink.getvalue()
    for name, data in files.items():
        filesystem.write(filesystem.join(url, name), data)
    return suggestion
