"""`imgcls train`: train a network on labeled images and write a bundle.

`train` checks the request, takes the lease of the output folder, decodes the images, runs the
workers and publishes the bundle. An unfinished run of the same request is resumed, a finished one
is returned as it is, and any other content of the output folder is refused.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from imgcls import log
from imgcls.cluster import session
from imgcls.cluster.interrupts import Interruption, run_in_thread, wait_interruptibly
from imgcls.cluster.ray_data import DataExecution
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import use_settings
from imgcls.errors import (
    OutputError,
    RunFailed,
    StorageMissing,
    TooManyErrors,
)
from imgcls.runs import layout
from imgcls.runs.lease import Lease
from imgcls.runs.provenance import list_differences
from imgcls.training.checkpoints import Checkpoints, Weights
from imgcls.training.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    TrainScaleConfig,
)
from imgcls.training.data.cached import CachedImages
from imgcls.training.data.streaming import StreamedImages
from imgcls.training.driver_channel import open_driver_channel
from imgcls.training.epoch_metrics import EpochMetrics, TrainLoopResult, format_selection_note
from imgcls.training.head_training import train_head
from imgcls.training.loggers import base
from imgcls.training.publish import find_finished, publish_bundle, write_lr_curve
from imgcls.training.ray_trainer import fit_torch_trainer
from imgcls.training.registration import register_bundle
from imgcls.training.result import TrainResult
from imgcls.training.scaling import WorkerPlan, compute_decode_cpus, wait_for_worker_plan
from imgcls.training.setup import (
    SAMPLES_PLOT,
    TrainSetup,
    build_too_many_errors,
    check_same_examples,
    decode_dataset,
    draw_samples,
    log_setup,
    plan_decoding,
    resolve_setup,
)
from imgcls.training.starting_model import ModelRecord
from imgcls.training.trainer import TrainLoopSpec

__all__ = [
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "TrainResult",
    "TrainScaleConfig",
    "train",
]

LOGGER_STATE_FILE = "trackers.json"


@dataclass(frozen=True)
class TrialContext:
    """What a search (`imgcls tune`) passes to each of its trials.

    images:           decoded images to use if they were decoded as the trial needs them; or None
    on_epoch:         called with the metrics of each epoch, in a thread of its own
    interruption:     stops the trial
    registered_model: version of the registered model in the folder `model.name`; or None
    """

    images: CachedImages | None
    on_epoch: Callable[[EpochMetrics], None]
    interruption: Interruption
    registered_model: ModelRecord | None = None


def train(config: TrainConfig, *, trial: TrialContext | None = None) -> TrainResult:
    """Train a network on labeled images and write its bundle.

    `imgcls.train` documents the behavior and the errors. Here a teacher is a run; `train_student`
    labels the images first if it is a bundle.

    trial: set by `imgcls tune` for the trials of a search
    """
    with use_settings(config.storage):
        return _train(config, trial)


def _train(config: TrainConfig, trial: TrialContext | None) -> TrainResult:
    config = config.model_copy(update={"output": filesystem.absolute(config.output)})
    if config.data.embeddings is not None:
        return train_head(config)
    setup = resolve_setup(config, None if trial is None else trial.registered_model)
    layout.check_output_writable(setup.config.output)
    layout.check_no_run(setup.config.output)
    finished = find_finished(setup)
    if finished is not None:
        if trial is None:
            register_bundle(setup.config.track, setup.config.output)
        return finished
    lease = Lease.acquire(setup.config.output)
    try:
        checkpoints = _claim_output(setup)
        session.connect()
        interruption = Interruption() if trial is None else trial.interruption
        with interruption.handle_signals(), session.unwrap_ray_errors():
            run = _Run(setup, checkpoints, lease, interruption, trial)
            result = run.run()
    finally:
        lease.release()
    if trial is None and not setup.config.find_lr:
        register_bundle(setup.config.track, setup.config.output, run.logger_state)
    return result


def _claim_output(setup: TrainSetup) -> Checkpoints:
    """The states of the unfinished run of the same training, or those of a new run.

    Raises OutputError when another training is unfinished and may not be replaced.
    """
    checkpoints = Checkpoints(setup.config.output)
    if setup.config.find_lr:
        return checkpoints
    stored = checkpoints.read_identity()
    if stored is not None and stored != setup.identity:
        # a run without a saved state may be replaced, as the errors about bad images advise
        if checkpoints.list_states() and not setup.config.overwrite:
            lines = "\n".join(f"  {line}" for line in list_differences(stored, setup.identity))
            raise OutputError(
                f"output {setup.config.output} holds another, unfinished training:\n{lines}\n"
                "Rerun its command to resume it, pass --overwrite to start over, or pass another "
                "--output."
            )
        stored = None
    if stored is None:
        checkpoints.start_run(setup.identity)
    return checkpoints


class _Run:
    """One training on the driver: decode the images, run the workers, publish the best epoch."""

    def __init__(
        self,
        setup: TrainSetup,
        checkpoints: Checkpoints,
        lease: Lease,
        interruption: Interruption,
        trial: TrialContext | None,
    ) -> None:
        self.setup, self.config = setup, setup.config
        self.checkpoints, self.lease = checkpoints, lease
        self.interruption, self.trial = interruption, trial
        self.began = time.monotonic()
        self.logger_state: Mapping[str, Any] | None = None

    def run(self) -> TrainResult:
        workers = wait_for_worker_plan(self.config.scale, self.interruption)
        images = self._load_images(workers)
        draw_samples(self.setup, images)
        spec = self._build_spec(images)
        if self.config.find_lr:
            return self._find_lr(spec, workers)
        return self._train(spec, workers)

    def _load_images(self, workers: WorkerPlan) -> CachedImages | StreamedImages:
        """Decode the images into the object store if they fit, else set up decoding per epoch."""
        nodes, rows = session.list_nodes(), self.setup.examples.rows
        decoding, cached = plan_decoding(self.setup)
        log_setup(self.setup, workers, decoding, cached=cached)
        given = None if self.trial is None else self.trial.images
        if given is not None and given.settings == decoding:
            check_same_examples(self.setup.examples, given)
            return given
        if not cached:
            return StreamedImages(ray.put(rows), decoding, compute_decode_cpus(nodes, workers))
        cpus = sum(node.cpus for node in nodes)
        execution = DataExecution()
        decoded = run_in_thread(lambda: decode_dataset(self.setup, decoding, cpus, execution))
        return wait_interruptibly(decoded, self.interruption, execution.stop)

    def _build_spec(self, images: CachedImages | StreamedImages) -> TrainLoopSpec:
        setup = self.setup
        return TrainLoopSpec(
            config=self.config,
            strategy=setup.strategy,
            architecture=setup.architecture,
            targets=ray.put(setup.examples.targets),
            classes=setup.examples.classes,
            initial_weights=ray.put(setup.network.state_dict()),
            preprocess=setup.preprocess,
            images=images,
            class_weights=setup.class_weights,
            head_coefficients=setup.head_coefficients,
        )

    def _find_lr(self, spec: TrainLoopSpec, workers: WorkerPlan) -> TrainResult:
        """Run the LR range test, write its curve and print the suggested learning rate."""
        with open_driver_channel(self.config.num_epochs, lambda epoch: None) as channel:
            outcome = fit_torch_trainer(spec, workers, channel, self.interruption)
        if self.checkpoints.read_identity() is None:
            filesystem.remove(self.checkpoints.folder)  # else it belongs to an unfinished training
        if outcome.failure_kind == "failures":
            self._raise_failure(outcome)
        url, curve = self.config.output, outcome.lr_curve
        if outcome.failure_kind is not None or len(curve) < 2:
            raise RunFailed(f"the LR range test failed: {outcome.problem or 'no step was made'}")
        suggestion = write_lr_curve(url, curve)
        log.show(
            f"LR range test: {len(curve)} steps up to {curve[-1][0]:.2g}; the loss falls fastest "
            f"at {suggestion:.2g}: try --optim.lr {suggestion:.1e}\n"
            f"plot: {filesystem.join(url, 'plots/lr_range.png')}",
        )
        return TrainResult(url, [], None, 0, curve)

    def _train(self, spec: TrainLoopSpec, workers: WorkerPlan) -> TrainResult:
        with _open_loggers(self.setup, self.checkpoints) as loggers:

            def log_epoch(epoch: EpochMetrics) -> None:
                loggers.log_epoch(epoch.epoch, epoch.get_numbers())
                _save_logger_state(self.checkpoints, loggers)
                if self.trial is not None:
                    self.trial.on_epoch(epoch)

            with open_driver_channel(self.config.num_epochs, log_epoch) as channel:
                outcome = fit_torch_trainer(spec, workers, channel, self.interruption)
            self._raise_failure(outcome)
            self.lease.check()
            failed = _count_failed(spec.images, outcome)
            best, weights, predictions = self._load_best()
            files = publish_bundle(
                self.setup,
                outcome,
                best,
                weights,
                workers=str(workers),
                failed=failed,
                predictions=predictions,
                failures=spec.images.failures if isinstance(spec.images, CachedImages) else (),
                seconds=time.monotonic() - self.began,
                plots=[SAMPLES_PLOT],
            )
            self._log_best(outcome, best)
            for epoch in outcome.history:  # the thread of the channel may not have come this far
                loggers.log_epoch(epoch.epoch, epoch.get_numbers())
            loggers.finish({f"best_{k}": v for k, v in best.get_numbers().items()}, files)
            self.logger_state = loggers.state
        filesystem.remove(self.checkpoints.folder)
        return TrainResult(self.config.output, list(outcome.history), best, sum(failed))

    def _load_best(self) -> tuple[EpochMetrics, Weights, bytes | None]:
        """The best epoch, its weights, and its predictions of the validation images if kept."""
        latest = self.checkpoints.load_latest()
        best = None if latest is None else latest[0].progress.best_epoch
        if latest is None or best is None:
            raise RunFailed(
                f"{self.checkpoints.folder}: the saved states are gone; rerun the same command"
            )
        weights = self.checkpoints.load_best_weights(latest[0])
        return best, weights, self.checkpoints.load_best_predictions(latest[0])

    def _raise_failure(self, outcome: TrainLoopResult) -> None:
        """Raise the error for which the workers stopped early, if any."""
        if outcome.failure_kind == "diverged":
            precision = ""
            if outcome.precision != "fp32":
                precision = f", or pass --precision fp32 (it was {outcome.precision})"
            saved = self.checkpoints.list_states()
            kept = ""
            if saved and saved[0].best is not None:
                kept = (
                    " The best weights so far are in "
                    f"{filesystem.join(self.checkpoints.folder, saved[0].best)}"
                )
            raise RunFailed(
                f"the training diverged: {outcome.problem}. Lower optim.lr "
                f"({self.config.optim.lr:g}) or raise optim.warmup{precision}.{kept}"
            )
        if outcome.failure_kind == "failures":
            if outcome.problem is not None:
                raise TooManyErrors(f"{outcome.problem} (some are listed above). Fix them.")
            failed, rows = outcome.failed_images
            raise build_too_many_errors(
                failed, rows, self.config.data.max_error_rate, " (some are listed above)"
            )

    def _log_best(self, outcome: TrainLoopResult, best: EpochMetrics) -> None:
        assert self.config.optim.lr is not None
        note = format_selection_note(outcome.history, best, lr=self.config.optim.lr)
        if note is not None:
            log.emit("note", note)
        log.show(
            f"best: {best.name}, val {best.format_quality()} -> {self.config.output}",
        )


@contextlib.contextmanager
def _open_loggers(setup: TrainSetup, checkpoints: Checkpoints) -> Iterator[base.MetricLoggers]:
    """The metric loggers of a run, which continue where an interrupted run stopped."""
    url = filesystem.join(checkpoints.folder, LOGGER_STATE_FILE)
    try:
        state = json.loads(filesystem.read(url))
    except (StorageMissing, ValueError):
        state = None
    latest = checkpoints.load_latest()
    history = latest[0].progress.history if latest else ()
    first = history[-1].epoch + 1 if history else 0
    with base.open_loggers(setup.config.track, setup.config.output, state) as loggers:
        loggers.start(setup.config.model_dump(mode="json"), first)
        _save_logger_state(checkpoints, loggers)
        yield loggers


def _save_logger_state(checkpoints: Checkpoints, loggers: base.MetricLoggers) -> None:
    body = json.dumps(loggers.state).encode()
    filesystem.write(filesystem.join(checkpoints.folder, LOGGER_STATE_FILE), body)


def _count_failed(
    images: CachedImages | StreamedImages, outcome: TrainLoopResult
) -> tuple[int, int]:
    """Numbers of training and of validation images that could not be decoded."""
    if isinstance(images, CachedImages):
        held = sum(failure.held for failure in images.failures)
        return len(images.failures) - held, held
    last = outcome.history[-1]
    return last.train_failed, last.val_failed
