"""Training of a new head on the embeddings of a committed run; no image is read.

The result is a complete bundle: the network of the run with the new head. The head is that of
strategy probe with one view per image. Ray is not needed, and nothing is saved on the way: it takes
a minute for a million images.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from imgcls import log
from imgcls.cluster.interrupts import Interruption
from imgcls.data.storage import filesystem
from imgcls.errors import OutputError, RequestError, RunFailed, TooManyErrors
from imgcls.formatting import format_lines
from imgcls.models import zoo
from imgcls.models.bundle import Bundle, load_bundle_weights
from imgcls.models.linear_head import load_linear_head
from imgcls.runs import layout
from imgcls.runs.committed import CommittedRun, load_source_bundle, open_run
from imgcls.runs.embeddings import gather_embeddings
from imgcls.runs.lease import Lease
from imgcls.training import network as networks
from imgcls.training.checkpoints import Checkpoints
from imgcls.training.config import ModelConfig, TrainConfig
from imgcls.training.data.batches import DecodeFailure
from imgcls.training.data.examples import Examples, read_examples
from imgcls.training.data.teacher import check_teacher_settings
from imgcls.training.epoch_metrics import EpochMetrics, TrainLoopResult
from imgcls.training.loggers import base
from imgcls.training.optim import linear_probe
from imgcls.training.optim.linear_probe import LinearHead, ProbeFeatures
from imgcls.training.publish import find_finished, publish_bundle
from imgcls.training.registration import register_bundle
from imgcls.training.result import TrainResult
from imgcls.training.setup import TrainSetup, check_enough_left, check_task, compute_weights
from imgcls.training.validation_predictions import PredictionRecorder


def train_head(config: TrainConfig) -> TrainResult:
    """Fit a head to the embeddings of the run `data.embeddings` and write the bundle.

    Raises RequestError when the run has no embeddings or its network no linear head, OutputError
    when the output holds something else, and TooManyErrors when more images than
    `data.max_error_rate` allows have no embedding. Raises RunFailed for embeddings that are NaN or
    too large.
    """
    run, source = _open_source(config)
    setup = _resolve_setup(config, run, source)
    layout.check_output_writable(config.output)
    layout.check_no_run(config.output)
    finished = find_finished(setup)
    if finished is not None:
        register_bundle(config.track, config.output)
        return finished
    lease = Lease.acquire(config.output)
    try:
        _remove_unfinished(config)
        with Interruption().handle_signals() as interruption:
            result, logger_state = _fit_and_publish(setup, run, lease, interruption)
    finally:
        lease.release()
    register_bundle(config.track, config.output, logger_state)
    return result


def _remove_unfinished(config: TrainConfig) -> None:
    """Remove an unfinished training with `overwrite`; raise OutputError without."""
    checkpoints = Checkpoints(config.output)
    if checkpoints.list_states() and not config.overwrite:
        raise OutputError(
            f"output {config.output} holds another, unfinished training. Rerun its command to "
            "resume it, pass --overwrite to start over, or pass another --output."
        )
    filesystem.remove(checkpoints.folder)


def _open_source(config: TrainConfig) -> tuple[CommittedRun, Bundle]:
    """The run and the bundle that made it; raises RequestError for a request that cannot work."""
    data = config.data
    assert data.embeddings is not None
    if config.strategy not in (None, "probe"):
        raise RequestError(
            f"strategy {config.strategy}: needs images; data.embeddings fits a head alone. Remove "
            "one of the two settings"
        )
    if config.teacher is not None:
        check_teacher_settings(config)
    if config.find_lr:
        raise RequestError("find_lr: needs images; remove it, or data.embeddings")
    if config.model != ModelConfig():
        raise RequestError("model: is that of data.embeddings; remove the settings of model")
    run = open_run(data.embeddings)
    run.check_embeddings()
    source = load_source_bundle(run, data.embeddings_model, "data.embeddings-model")
    load_linear_head(source)  # raises if a head cannot be fitted to the embeddings
    return run, source


def _resolve_setup(config: TrainConfig, run: CommittedRun, source: Bundle) -> TrainSetup:
    config = config.model_copy(  # they have no effect, and are as in earlier versions
        update={"epochs": config.num_epochs, "batch_size": config.images_per_step}
    )
    examples = read_examples(config.data, config.task)
    check_task(config, examples, "probe")
    architecture = source.spec.architecture
    network = zoo.build_network(architecture, len(examples.classes))
    zoo.apply_weights(network, load_bundle_weights(source), replace_head=True)
    # sets auxiliary heads to 0, which are random where the classes are others
    coefficients = networks.compute_head_coefficients(network, source.spec.preprocess)
    base.check_loggers(config.track, config.output)
    embeddings = {name: run.success_record[name] for name in ("run_id", "committed")}
    return TrainSetup(
        config=config,
        strategy="probe",
        examples=examples,
        architecture=architecture,
        preprocess=source.spec.preprocess,
        network=network,
        class_weights=compute_weights(config.loss, examples),
        head_coefficients=coefficients,
        identity={
            "settings": config.identity(),
            "data": {
                **{key: each.fingerprint for key, each in examples.sources.items()},
                "data.embeddings": embeddings,
            },
            "initial_weights": source.sha256,
        },
    )


@dataclass(frozen=True)
class _Features:
    """Embeddings of the rows of a manifest, by split; `failures` are the rows without one."""

    train: ProbeFeatures
    val: ProbeFeatures
    recorder: PredictionRecorder
    failures: tuple[DecodeFailure, ...]


def _read_features(setup: TrainSetup, run: CommittedRun, interruption: Interruption) -> _Features:
    config, examples, began = setup.config, setup.examples, time.monotonic()
    vectors, index, reasons = gather_embeddings(run, examples.rows.column("url"))
    lacking = examples.rows.take(pa.array(list(reasons), pa.int64())).to_pylist()
    failures = tuple(
        DecodeFailure(
            row["url"],
            row["label"],
            row["held"],
            error=reason,
            row=row["row"],
            status=_find_status(reason),
        )
        for row, reason in zip(lacking, reasons.values(), strict=True)
    )
    interruption.check()
    _check_failures(config, examples, run, failures)
    log.show(
        f"data: {examples.count(held=False):,} training images of {len(examples.classes)} classes "
        f"from {config.data.train.path}, {examples.count(held=True):,} validation images\n"
        f"model: {setup.architecture.name} of {run.url}, "
        f"{vectors.shape[1]:,} numbers per image, read in {time.monotonic() - began:.1f} s"
    )
    recorder = PredictionRecorder(
        examples.targets.task, examples.classes, examples.count(held=True)
    )
    codes, held, rows = (examples.rows.column(name).to_numpy() for name in ("label", "held", "row"))
    recorder.add_rows(rows[(index >= 0) & held])
    train, val = (
        ProbeFeatures(torch.from_numpy(vectors[index[used]]), examples.targets.encode(codes[used]))
        for used in ((index >= 0) & ~held, (index >= 0) & held)
    )
    return _Features(train, val, recorder, failures)


def _fit_and_publish(
    setup: TrainSetup, run: CommittedRun, lease: Lease, interruption: Interruption
) -> tuple[TrainResult, Mapping[str, Any]]:
    """The result, and the state of the metric loggers."""
    config, began = setup.config, time.monotonic()
    features = _read_features(setup, run, interruption)
    recorder, failures = features.recorder, features.failures
    head, epoch = _fit_head(setup, features.train, features.val, recorder)
    interruption.check()
    linear_probe.install_head(setup.network, head)
    precision = "+".join(run.success_record["precision"])
    failed = (
        sum(not failure.held for failure in failures),
        sum(failure.held for failure in failures),
    )
    with base.open_loggers(config.track, config.output, None) as loggers:
        loggers.start(config.model_dump(mode="json"), 0)
        loggers.log_epoch(0, epoch.get_numbers())
        lease.check()
        files = publish_bundle(
            setup,
            TrainLoopResult((epoch,), precision),
            epoch,
            setup.network.state_dict(),
            workers="none, from embeddings",
            failed=failed,
            predictions=recorder.gather(0, 1, torch.device("cpu"), _keep),
            failures=failures,
            seconds=time.monotonic() - began,
        )
        loggers.finish({f"best_{k}": v for k, v in epoch.get_numbers().items()}, files)
    log.show(
        f"{epoch.format_line(1)}\n"
        f"head fitted, l2 {head.l2:g}, val {epoch.format_quality()} -> {config.output}"
    )
    return TrainResult(config.output, [epoch], epoch, sum(failed)), loggers.state


def _find_status(reason: str) -> str:
    """Status of an image without an embedding; `reason` is its status or a sentence."""
    if " " not in reason:
        return reason
    return "not_finite" if reason.startswith("has no embedding") else "missing"


def _check_failures(
    config: TrainConfig,
    examples: Examples,
    run: CommittedRun,
    failures: tuple[DecodeFailure, ...],
) -> None:
    """Log the images that are left out; raise TooManyErrors when they are too many."""
    listed = format_lines((f"{each.url}: {each.error}" for each in failures), 3)
    rows, allowed = examples.rows.num_rows, config.data.max_error_rate
    if len(failures) > allowed * rows:
        raise TooManyErrors(
            f"{len(failures):,} of {rows:,} images have no embedding in {run.url}, more than "
            f"data.max_error_rate {allowed:g} allows:{listed}\nLabel them with `imgcls predict "
            "--embeddings float16`, or raise data.max_error_rate."
        )
    if failures:
        log.emit("note", f"left out:{listed}")
    check_enough_left(examples, failures, 1)


def _fit_head(
    setup: TrainSetup, train: ProbeFeatures, val: ProbeFeatures, recorder: PredictionRecorder
) -> tuple[LinearHead, EpochMetrics]:
    started, classes = time.perf_counter(), len(setup.examples.classes)
    overflowed = sum(linear_probe.count_non_finite(split, _keep) for split in (train, val))
    if overflowed:
        raise RunFailed(
            f"the embeddings of {overflowed:,} images are NaN or too large; label them with "
            "`imgcls predict --precision fp32`, or with another model"
        )
    weights = None if setup.class_weights is None else torch.tensor(setup.class_weights)
    head = linear_probe.fit_head(
        train, val, classes, l2=setup.config.probe.l2, weights=weights, reduce=_keep
    )
    train_metrics, val_metrics = (
        linear_probe.evaluate_head(head, split, classes, _keep, each)
        for split, each in ((train, None), (val, recorder))
    )
    seconds = time.perf_counter() - started
    return head, linear_probe.describe_probe(
        train_metrics,
        val_metrics,
        views=1,
        failed=(0, 0),
        feature_seconds=seconds,
        seconds=seconds,
    )


def _keep(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over one worker."""
    return tensor
