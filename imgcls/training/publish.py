"""The outputs of a finished training: the bundle, or the curve of an LR range test."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd

from imgcls import log
from imgcls.data.storage import filesystem
from imgcls.errors import BundleError, OutputError, StorageError, StorageUnavailable
from imgcls.models.bundle import (
    BUNDLE_FILE,
    FORMAT_VERSIONS,
    BundleSpec,
    read_description,
    save_bundle,
)
from imgcls.models.tasks import TASKS
from imgcls.runs.layout import VALIDATION_PREDICTIONS_FILE
from imgcls.runs.provenance import build_provenance
from imgcls.training.checkpoints import Checkpoints, Weights
from imgcls.training.data.batches import DecodeFailure
from imgcls.training.epoch_metrics import EpochMetrics, TrainLoopResult
from imgcls.training.model_card import build_model_card
from imgcls.training.optim.lr_finder import find_steepest_lr
from imgcls.training.result import TrainResult
from imgcls.training.setup import TrainSetup
from imgcls.training.validation_predictions import build_validation_predictions, render_parquet

HISTORY_FILE = "history.parquet"
VALIDATION_FILE = "validation.parquet"
TRAIN_METRICS = ("train_accuracy", "train_loss", "epoch")
"""Fields of the best epoch that `bundle.json` holds, with the task's metrics of the validation."""


def publish_bundle(
    setup: TrainSetup,
    outcome: TrainLoopResult,
    best: EpochMetrics,
    weights: Weights,
    *,
    workers: str,
    failed: tuple[int, int],
    predictions: bytes | None,
    failures: Sequence[DecodeFailure],
    seconds: float,
    plots: Sequence[str] = (),
) -> list[str]:
    """Write the bundle of the best epoch: history, curves, weights, model card, `bundle.json` last.

    The `bundle.json` of an existing bundle is removed before its first file changes.

    weights: of the best epoch
    workers: who trained, in words
    failed:  numbers of training and of validation images that could not be used
    predictions: of the validation images with these weights, as `PredictionRecorder.gather` returns
        them; None if they were not kept
    failures: images that are not among the predictions
    seconds: duration of the training
    plots:   names of pictures that the output has already
    Returns the names of the files that the bundle format itself does not have.
    """
    url, examples = setup.config.output, setup.examples
    spec = _build_spec(setup, outcome, workers, best, failed)
    table = pd.DataFrame([asdict(epoch) for epoch in outcome.history])
    if examples.targets.task == "single_label":
        table = table.drop(columns="val_mean_average_precision")
    files = _render_files(table, best)
    files[VALIDATION_FILE] = render_parquet(examples.build_manifest(held=True))
    if predictions is not None:
        found = build_validation_predictions(examples, predictions, failures)
        if found is not None:
            files[VALIDATION_PREDICTIONS_FILE] = render_parquet(found, spec.provenance["created"])
    for name in (BUNDLE_FILE, VALIDATION_PREDICTIONS_FILE):
        filesystem.remove(filesystem.join(url, name))
    for name, data in files.items():
        filesystem.write(filesystem.join(url, name), data)
    train, val = (examples.count_per_class(held=held) for held in (False, True))
    card = build_model_card(
        spec,
        table,
        best.epoch,
        parameters=sum(each.numel() for each in weights.values()),
        workers=workers,
        seconds=seconds,
        class_rows=dict(zip(examples.classes, zip(train, val, strict=True), strict=True)),
        plots=["plots/curves.png", *plots],
    )
    save_bundle(url, spec, weights, card=card)
    return [*files, *plots]


def find_finished(setup: TrainSetup) -> TrainResult | None:
    """The result of the same training if its bundle exists already.

    Raises OutputError when the bundle is of another training.
    """
    config = setup.config
    url = config.output
    if config.find_lr or config.overwrite:
        return None
    if not filesystem.exists(filesystem.join(url, BUNDLE_FILE)):
        return None
    refused = OutputError(
        f"output {url} already holds a bundle. Pass --overwrite, or another --output."
    )
    try:
        provenance = read_description(url).spec.provenance
        if provenance.get("run") != setup.identity:
            raise refused
        table = pd.read_parquet(filesystem.open_read(filesystem.join(url, HISTORY_FILE)))
    except StorageUnavailable:
        raise
    except (BundleError, StorageError) as error:
        raise refused from error
    history = [EpochMetrics(**row) for row in table.to_dict("records")]
    best = history[0]
    for epoch in history[1:]:
        best = epoch if epoch.is_better_than(best, config.best_by) else best
    filesystem.remove(Checkpoints(url).folder)
    log.show(f"{url} already holds the bundle of this training; pass --overwrite to train again")
    failed = provenance["data"]["train_failed"] + provenance["data"]["val_failed"]
    return TrainResult(url, history, best, failed)


def _build_spec(
    setup: TrainSetup,
    outcome: TrainLoopResult,
    workers: str,
    best: EpochMetrics,
    failed: tuple[int, int],
) -> BundleSpec:
    """Everything in `bundle.json`."""
    config, examples = setup.config, setup.examples
    task = TASKS[examples.targets.task]
    names = (*(f"val_{each}" for each in task.metrics), *TRAIN_METRICS)
    metrics = {name: float(getattr(best, name)) for name in names}
    return BundleSpec(
        format_version=FORMAT_VERSIONS[task.name],
        task=task.name,
        threshold=task.default_threshold,
        architecture=setup.architecture,
        classes=examples.classes,
        preprocess=setup.preprocess,
        provenance=build_provenance(
            {key: value for key, value in config.dump_settings().items() if key != "storage"}
        )
        | {
            "seed": config.seed,
            "run": setup.identity,
            "strategy": setup.strategy,
            "precision": outcome.precision,
            "workers": workers,
            "data": {
                "manifests": {key: asdict(source) for key, source in examples.sources.items()},
                "train_rows": examples.count(held=False),
                "val_rows": examples.count(held=True),
                "train_failed": failed[0],
                "val_failed": failed[1],
            },
        }
        | {key: value for key, value in setup.identity.items() if key == "registered_model"}
        | ({} if examples.teacher is None else {"teacher": asdict(examples.teacher)}),
        # JSON has no NaN: the mAP if no class has both positives and negatives
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
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
