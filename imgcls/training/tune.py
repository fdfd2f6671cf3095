"""Hyperparameter search with Ray Tune: many trainings, of which the best bundle is kept.

Each trial is a normal training with its own folder, checkpoints and lease. Images are decoded once
for all trials. After a kill, the same command resumes: Ray Tune stores the state of the search,
each trial its checkpoints.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
import queue
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from ray import tune as ray_tune

from imgcls import log
from imgcls.cluster import session
from imgcls.cluster.interrupts import Interruption, run_in_thread, wait_interruptibly
from imgcls.cluster.ray_data import DataExecution
from imgcls.cluster.session import Node
from imgcls.data.environment import set_env_defaults
from imgcls.data.storage import filesystem, storage_settings
from imgcls.data.storage.storage_settings import with_config_storage
from imgcls.errors import ConfigError, RequestError, RunFailed
from imgcls.models.bundle import BUNDLE_FILE, TaskName
from imgcls.runs.lease import Lease
from imgcls.training import train as training
from imgcls.training.config import TrainConfig
from imgcls.training.data.cached import CachedImages
from imgcls.training.data.teacher import check_teacher_keys
from imgcls.training.epoch_metrics import EpochMetrics
from imgcls.training.ray_trainer import resolve_ray_storage
from imgcls.training.registration import register_bundle
from imgcls.training.scaling import (
    WorkerPlan,
    count_fitting_trials,
    wait_for_worker_plan,
)
from imgcls.training.search_space import (
    BEST_FOLDER,
    RESULTS_FILE,
    STATE_FOLDER,
    TRIALS_FOLDER,
    TuneConfig,
    build_trial_config,
    check_space,
    claim_search,
    resolve_search_paths,
)
from imgcls.training.setup import (
    TrainSetup,
    check_probe,
    decode_dataset,
    plan_decoding,
    resolve_setup,
)
from imgcls.training.starting_model import (
    ModelRecord,
    check_space_models,
    find_starting_model,
    use_model,
)

_MAP = "val_mean_average_precision"
STOP_TIMEOUT_S = 90
"""Timeout for a trial that is stopped early to end its workers."""


@dataclass(frozen=True)
class TuneResult:
    """The result of a hyperparameter search.

    bundle:  URL of the best trial's bundle
    best:    the best trial's value of each searched key
    results: one row per trial, the best first
    """

    bundle: str
    best: dict[str, Any]
    results: pd.DataFrame


@with_config_storage
def tune(config: TuneConfig) -> TuneResult:
    """Run a hyperparameter search and write the bundle of the best trial.

    Logs one line per trial. Called again with the same configuration, resumes an interrupted
    search.

    Parameters
    ----------
    config
        The training, the search space and the output folder.

    Returns
    -------
    TuneResult
        The best bundle, its settings, and a table of all trials.

    Raises
    ------
    RequestError
        The request is wrong; nothing was started.
    OutputError
        The output folder has another search.
    RunFailed
        No trial ended with a bundle.
    """
    config = resolve_search_paths(config)
    check_space(config)
    check_space_models(config)
    starting = find_starting_model(config)
    stored = config if starting is None else use_model(config, starting.pinned_uri)
    record = None if starting is None else starting.record
    if starting is not None:
        config = use_model(config, starting.url)
    task = resolve_setup(build_trial_config(config, {}, config.output), record)
    check_teacher_axes(config, task.examples.targets.task)
    check_probe_axes(config)
    with Interruption().handle_signals() as interruption:
        lease = Lease.acquire(config.output)
        try:
            inputs = {key: task.identity[key] for key in ("data", "initial_weights")}
            claim_search(stored, inputs, record)
            session.connect()
            result = _run_search(config, task, interruption)
        finally:
            lease.release()
    register_bundle(config.track, result.bundle)
    return result


def check_teacher_axes(config: TuneConfig, task: TaskName) -> None:
    """Raise ConfigError for searched values with which a key of the teacher has no effect."""
    if config.teacher is None:
        return
    keys = [k for k in config.tune.space if k == "strategy" or k.startswith("teacher.")]
    for values, trial in _iter_extreme_trials(config, keys):
        assert trial.teacher is not None
        try:
            check_teacher_keys(trial.teacher, task, trial.strategy or "scratch")
        except ConfigError as error:
            raise ConfigError(f"tune.space: {_format_values(values)}: {error}") from error


def check_probe_axes(config: TuneConfig) -> None:
    """Raise ConfigError for searched values that a trial with a linear probe would ignore."""
    names = ("data.sampling", "loss.focal_gamma", "loss.label_smoothing", "strategy")
    keys = [key for key in names if key in config.tune.space]
    for values, trial in _iter_extreme_trials(config, keys):
        if trial.strategy != "probe":
            continue
        try:
            check_probe(trial)
        except ConfigError as error:
            raise ConfigError(f"tune.space: {_format_values(values)}: {error}") from error


def _iter_extreme_trials(
    config: TuneConfig, keys: Sequence[str]
) -> Iterator[tuple[dict[str, Any], TrainConfig]]:
    """All combinations of the extreme values of some axes, each with the training of its trial."""
    space = config.tune.space
    for drawn in itertools.product(*(space[key].list_extremes() for key in keys)):
        values = dict(zip(keys, drawn, strict=True))
        yield values, build_trial_config(config, values, config.output)


def _run_search(config: TuneConfig, task: TrainSetup, interruption: Interruption) -> TuneResult:
    workers = wait_for_worker_plan(config.scale, interruption)
    nodes = session.list_nodes()
    settings, cached = plan_decoding(task)
    cpus = sum(node.cpus for node in nodes)
    concurrent = resolve_concurrency(config, workers, nodes, cached=cached)
    log.show(
        f"search: {config.tune.total_trials} trials of {', '.join(config.tune.space)}; "
        f"{concurrent} at a time, each {workers}, of {cpus:g} CPUs",
    )
    images: CachedImages | None = None
    if cached:
        execution = DataExecution()
        decoding = run_in_thread(lambda: decode_dataset(task, settings, cpus, execution))
        decoded = wait_interruptibly(decoding, interruption, execution.stop)
        images = replace(decoded, examples=task.examples.compute_fingerprint())
    with _silence_tune():
        tuner = _build_tuner(config, images, concurrent, task.identity.get("registered_model"))
        grid = wait_interruptibly(run_in_thread(tuner.fit), interruption)
    return _write_results(config, grid)


def resolve_concurrency(
    config: TuneConfig, workers: WorkerPlan, nodes: Sequence[Node], *, cached: bool
) -> int:
    """Number of concurrent trials whose workers fit on the cluster.

    cached: whether images are decoded before; otherwise each trial needs one more CPU to decode
    Raises RequestError if tune.max_concurrent is larger than that.
    """
    fit = count_fitting_trials(nodes, workers, cached=cached)
    wanted = config.tune.max_concurrent
    if wanted is not None and wanted > fit:
        each = workers.max_count * workers.cpus + (0 if cached else 1)
        raise RequestError(
            f"tune.max_concurrent {wanted}: each trial takes {each:g} CPUs of "
            f"{sum(node.cpus for node in nodes):g}, so at most {fit} fit; lower it, or lower "
            "scale.cpus_per_worker"
        )
    return min(fit, wanted or fit, config.tune.total_trials)


def _build_tuner(
    config: TuneConfig,
    images: CachedImages | None,
    concurrent: int,
    registered_model: ModelRecord | None,
) -> Any:
    search = config.tune
    mode = "min" if config.best_by == "val_loss" else "max"
    # The workers of a trial reserve the CPUs. Tune requires the trial itself to reserve something:
    # one byte of memory.
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(
            Trial, config=config, images=images, registered_model=registered_model
        ),
        ray_tune.PlacementGroupFactory([{"memory": 1}]),
    )
    state = filesystem.join(config.output, STATE_FOLDER)
    path, file_system = resolve_ray_storage(config.output)
    if filesystem.exists(filesystem.join(state, "tuner.pkl")):
        log.show("search: resuming")
        return ray_tune.Tuner.restore(
            f"{path}/{STATE_FOLDER}",
            trainable,
            storage_filesystem=file_system,
            restart_errored=True,
        )
    return ray_tune.Tuner(
        trainable,
        param_space={key: axis.build_domain() for key, axis in search.space.items()},
        tune_config=ray_tune.TuneConfig(
            metric=config.best_by,
            mode=mode,
            num_samples=search.trials,
            max_concurrent_trials=None if search.search == "random" else concurrent,
            search_alg=_build_search_algorithm(config, mode, concurrent),
            scheduler=_build_scheduler(config),
        ),
        run_config=ray_tune.RunConfig(
            name=STATE_FOLDER,
            storage_path=path,
            storage_filesystem=file_system,
            verbose=0,
            checkpoint_config=ray_tune.CheckpointConfig(
                checkpoint_at_end=False
            ),  # trials have their own
            callbacks=[_TrialPrinter(config)],
        ),
    )


def _build_search_algorithm(config: TuneConfig, mode: str, concurrent: int) -> Any:
    if config.tune.search == "random":
        # Tune ignores max_concurrent_trials with this algorithm
        return ray_tune.search.BasicVariantGenerator(
            random_state=config.tune.seed, max_concurrent=concurrent
        )
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return OptunaSearch(metric=config.best_by, mode=mode, seed=config.tune.seed)
    except ImportError as error:
        raise RequestError(
            "tune.search optuna: the package is not installed. Run pip install "
            "'imgcls[optuna]', or pass --tune.search random."
        ) from error


def _build_scheduler(config: TuneConfig) -> Any:
    asha = config.tune.asha
    if config.tune.scheduler == "fifo" or config.num_epochs <= asha.grace_period:
        return ray_tune.schedulers.FIFOScheduler()
    return ray_tune.schedulers.ASHAScheduler(
        time_attr="epoch",
        # more than the last epoch: after it, the trial writes its bundle and ends by itself
        max_t=config.num_epochs + 1,
        grace_period=asha.grace_period,
        reduction_factor=asha.reduction_factor,
    )


class Trial(ray_tune.Trainable):
    """One trial in an actor of Ray Tune: a training that reports each epoch."""

    def setup(  # type: ignore[override]
        self,
        values: Any,
        *,
        config: TuneConfig,
        images: CachedImages | None,
        registered_model: ModelRecord | None,
    ) -> None:
        storage_settings.set_process_settings(config.storage)
        folder = filesystem.join(config.output, TRIALS_FOLDER, self.trial_id)
        self._metric = config.best_by
        self._started_at = time.monotonic()
        self._epochs: queue.SimpleQueue[EpochMetrics] = queue.SimpleQueue()
        self._metrics: dict[str, Any] = {}
        self._best: EpochMetrics | None = None
        self._interruption = Interruption()
        self._output = contextlib.ExitStack()  # Ray writes it to the log file of this actor
        self._output.enter_context(log.command_handler())
        trial = training.TrialContext(
            images, self._epochs.put, self._interruption, registered_model
        )
        settings = build_trial_config(config, values, folder)
        self._future = run_in_thread(lambda: training.train(settings, trial=trial))

    def step(self) -> dict[str, Any]:
        """Wait for the next epoch or for the end of the training."""
        while True:
            ended = self._future.done()
            try:
                return self._record_epoch(self._epochs.get(timeout=0.2))
            except queue.Empty:
                if not ended:
                    continue
            result = self._future.result()
            if not self._metrics:  # resumed after its end: no epoch was reported
                for epoch in result.history:
                    self._record_epoch(epoch)
            return {**self._metrics, "done": True}

    def _record_epoch(self, epoch: EpochMetrics) -> dict[str, Any]:
        best = epoch if epoch.is_better_than(self._best, self._metric) else self._best
        assert best is not None
        self._best = best
        self._metrics = {
            "epoch": epoch.epoch,
            "val_loss": best.val_loss,
            "val_accuracy": best.val_accuracy,
            "best_epoch": best.epoch,
            "trial_seconds": time.monotonic() - self._started_at,
        }
        if best.val_mean_average_precision is not None:
            self._metrics[_MAP] = best.val_mean_average_precision
        return self._metrics

    def cleanup(self) -> None:
        """Stop a training that is not finished, so that it frees its workers."""
        self._interruption.request_stop("the search")
        wait([self._future], timeout=STOP_TIMEOUT_S)
        self._output.close()


class _TrialPrinter(ray_tune.Callback):
    """Log one line per trial that ends."""

    def __init__(self, config: TuneConfig) -> None:
        self._epochs = config.num_epochs
        self._metric = config.best_by
        self._num_ended = 0
        self._num_trials = config.tune.total_trials

    def get_state(self) -> dict[str, Any]:
        return {"ended": self._num_ended}

    def set_state(self, state: dict[str, Any]) -> None:
        self._num_ended = state["ended"]

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self._log_trial(trial, "ended")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self._log_trial(trial, "failed")

    def _log_trial(self, trial: Any, how: str) -> None:
        self._num_ended += 1
        last = trial.last_result or {}
        if how == "ended" and last.get("epoch", 0) < self._epochs:
            how = f"stopped after epoch {last.get('epoch', 0)}"
        value = last.get(self._metric, math.nan)
        log.show(
            f"trial {self._num_ended}/{self._num_trials}  {_format_values(trial.config)}  "
            f"{self._metric} {value:.4f}  {how}",
        )


def _format_values(values: dict[str, Any]) -> str:
    return "  ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
    )


# ---------------------------------------------------------------------- after the trials


def _write_results(config: TuneConfig, grid: Any) -> TuneResult:
    """Write the table and the plot, and copy the best trial's bundle."""
    from imgcls.training.plots import draw_parallel_coordinates  # imports matplotlib

    table = _build_table(config, grid)
    sink = io.BytesIO()
    table.to_parquet(sink, index=False)
    filesystem.write(filesystem.join(config.output, RESULTS_FILE), sink.getvalue())
    axes = {key: axis.kind.startswith("log") for key, axis in config.tune.space.items()}
    for name, data in draw_parallel_coordinates(table, axes, config.best_by).items():
        filesystem.write(filesystem.join(config.output, "plots", name), data)
    finished = table[table["state"] == "finished"]
    if finished.empty:
        raise RunFailed(
            f"none of {len(table)} trials ended with a bundle; the last error: "
            f"{table['error'].dropna().iloc[-1] if table['error'].notna().any() else 'none'}"
        )
    first = finished.iloc[0]
    best = filesystem.join(config.output, BEST_FOLDER)
    _copy_best(str(first["bundle"]), best)
    values = {key: first[key] for key in config.tune.space}
    log.show(
        f"best: {_format_values(values)}  {config.best_by} {first[config.best_by]:.4f} -> {best}\n"
        f"all {len(table)} trials: {filesystem.join(config.output, RESULTS_FILE)}",
    )
    return TuneResult(best, values, table)


def _build_table(config: TuneConfig, grid: Any) -> pd.DataFrame:
    rows = []
    for result in grid:
        metrics = result.metrics or {}
        bundle = filesystem.join(config.output, TRIALS_FOLDER, str(metrics.get("trial_id")))
        done = filesystem.exists(filesystem.join(bundle, BUNDLE_FILE))
        error = str(result.error).strip().splitlines()[-1] if result.error else None
        rows.append(
            {
                "trial": metrics.get("trial_id"),
                **{key: result.config.get(key) for key in config.tune.space},
                "epochs": metrics.get("epoch"),
                "best_epoch": metrics.get("best_epoch"),
                "val_loss": metrics.get("val_loss", math.nan),
                "val_accuracy": metrics.get("val_accuracy", math.nan),
                _MAP: metrics.get(_MAP, math.nan),
                "seconds": metrics.get("trial_seconds", math.nan),
                "state": "finished" if done else "failed" if error else "stopped",
                "error": error,
                "bundle": bundle if done else None,
            }
        )
    table = pd.DataFrame(rows)
    if table[_MAP].isna().all() and config.best_by != _MAP:  # one label per image
        table = table.drop(columns=_MAP)
    ascending = config.best_by == "val_loss"
    return table.sort_values(config.best_by, ascending=ascending, ignore_index=True)


def _copy_best(bundle: str, best: str) -> None:
    """Copy a bundle, bundle.json last: a bundle without it is incomplete."""
    files = [name for name in filesystem.walk(bundle) if not name.startswith("_")]
    filesystem.remove(best)
    for name in sorted(files, key=lambda name: name == BUNDLE_FILE):
        filesystem.write(
            filesystem.join(best, name), filesystem.read(filesystem.join(bundle, name))
        )


@contextlib.contextmanager
def _silence_tune() -> Iterator[None]:
    """Hide the tables and warnings of Ray Tune; errors are part of its results."""
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with set_env_defaults(_ENVIRONMENT):
            yield
    finally:
        logger.setLevel(level)


_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}
