"""`tune`: the same training with other settings, many times over; the best one's bundle is kept.

Every trial is a training as `train` makes it, with its own folder, checkpoints and lease, started
by Ray Tune. Images are decoded once for all. Killed, the same command goes on: Ray Tune remembers
the trials, each trial its epochs.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import queue
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

import pandas as pd
from ray import tune as ray_tune

from imgcls.cluster import autoscaler, session
from imgcls.cluster.interrupts import awaited, started
from imgcls.cluster.session import Interruption, Node
from imgcls.data import filesystem, object_store
from imgcls.data.manifest import ManifestConfig
from imgcls.errors import OutputError, RequestError, RunFailed, StorageMissing
from imgcls.models.bundle import DESCRIPTION
from imgcls.runs.lease import Lease
from imgcls.training import train as training
from imgcls.training.data.batches import Views
from imgcls.training.data.cached import Decoded, store_bytes
from imgcls.training.epoch_metrics import Epoch
from imgcls.training.job import Shared
from imgcls.training.plots import parallel_coordinates
from imgcls.training.ray_trainer import ray_storage
from imgcls.training.scaling import Workers, awaited_workers, fits_store, trials_that_fit
from imgcls.training.search_space import TuneConfig, check_space, settings_of
from imgcls.training.setup import Task, decode

TRIALS = "trials"
BEST = "best"
STATE = "_tune"
IDENTITY = "_tune.json"
RESULTS = "results.parquet"
STOP_SECONDS = 90
"""For a trial that is stopped early to end its workers."""


@dataclass(frozen=True)
class TuneResult:
    """What a search came to.

    bundle:  URL of the best trial's bundle
    best:    the values of the space that it was trained with
    results: one row per trial, the best first
    """

    bundle: str
    best: dict[str, Any]
    results: pd.DataFrame


def tune(config: TuneConfig) -> TuneResult:
    """Search the settings of a training; prints a line per trial and writes the best one's bundle.

    Raises a RequestError before anything starts, RunFailed when no trial ends with a bundle. The
    same command goes on with a search that was broken off.
    """
    object_store.use(config.storage)
    config = _with_whole_paths(config)
    check_space(config)
    task = training.settled(settings_of(config, {}, config.output))
    with session.Interruption().watched() as interruption:
        lease = Lease.acquire(config.output)
        try:
            _claim(config)
            session.connect()
            return _search(config, task, interruption)
        finally:
            autoscaler.give_back()
            lease.release()


def _with_whole_paths(config: TuneConfig) -> TuneConfig:
    """The same from any working directory: Ray Tune runs each trial in one of its own."""

    def whole(manifest: ManifestConfig | None) -> ManifestConfig | None:
        if manifest is None:
            return None
        root = None if manifest.root is None else filesystem.absolute(manifest.root)
        return manifest.model_copy(
            update={"path": filesystem.absolute(manifest.path), "root": root}
        )

    data = config.data.model_copy(
        update={"train": whole(config.data.train), "val": whole(config.data.val)}
    )
    weights = config.model.weights
    if weights is not None and filesystem.exists(weights):
        weights = filesystem.absolute(weights)
    return config.model_copy(
        update={
            "output": filesystem.absolute(config.output),
            "data": data,
            "model": config.model.model_copy(update={"weights": weights}),
        }
    )


def _claim(config: TuneConfig) -> None:
    """Make the folder this search's; raises OutputError when it is another's."""
    url = filesystem.join(config.output, IDENTITY)
    free = {"output", "overwrite", "scale", "track", "storage", "tune"}
    mine = config.model_dump_json(exclude=free) + config.tune.model_dump_json(
        exclude={"concurrent"}
    )
    if config.overwrite:
        for name in (BEST, TRIALS, STATE, RESULTS, IDENTITY):
            filesystem.remove(filesystem.join(config.output, name))
    try:
        there = filesystem.read(url).decode()
    except StorageMissing:
        filesystem.write(url, mine.encode())
        return
    if there != mine:
        raise OutputError(
            f"output {config.output}: holds a search with other settings; repeat its command to go "
            "on, say --overwrite to start anew, or give another --output"
        )


def _search(config: TuneConfig, task: Task, interruption: Interruption) -> TuneResult:
    workers = awaited_workers(config.scale, interruption)
    nodes = session.nodes()
    cropped = config.augment.recipe().crop_scale is not None
    views = Views.of(task.preprocess, cropped=cropped, max_bytes=config.data.max_bytes)
    cached = fits_store(views.bytes_of(task.examples.rows), store_bytes())
    cpus = sum(node.cpus for node in nodes)
    at_a_time = concurrent(config, workers, nodes, cached=cached)
    print(
        f"search: {config.tune.total} trials of {', '.join(config.tune.space)}; {at_a_time} at a "
        f"time, each {workers}, of {cpus:g} CPUs",
        flush=True,
    )
    images: Decoded | None = None
    if cached:
        images = awaited(started(lambda: decode(task, views, cpus)), interruption)
    with _quiet():
        tuner = _tuner(config, images, at_a_time)
        grid = awaited(started(tuner.fit), interruption)
    return _concluded(config, grid)


def concurrent(config: TuneConfig, workers: Workers, nodes: Sequence[Node], *, cached: bool) -> int:
    """Trials at a time whose workers the machines hold; none that would wait for another's CPUs.

    cached: images are decoded before; else each trial needs a CPU more, to decode
    Raises RequestError when more are asked for than fit.
    """
    fit = trials_that_fit(nodes, workers, cached=cached)
    wanted = config.tune.concurrent
    if wanted is not None and wanted > fit:
        each = workers.most * workers.cpus + (0 if cached else 1)
        raise RequestError(
            f"tune.concurrent {wanted}: each trial takes {each:g} CPUs of "
            f"{sum(node.cpus for node in nodes):g}, so at most {fit} fit; give fewer, or a smaller "
            "scale.cpus_per_worker"
        )
    return min(fit, wanted or fit, config.tune.total)


def _tuner(config: TuneConfig, images: Decoded | None, at_a_time: int) -> Any:
    search = config.tune
    mode = "min" if config.best_by == "val_loss" else "max"
    # its workers reserve the CPUs; Tune wants a trial to reserve something itself: one byte
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(Trial, config=config, images=images),
        ray_tune.PlacementGroupFactory([{"memory": 1}]),
    )
    state = filesystem.join(config.output, STATE)
    path, file_system = ray_storage(config.output)
    if filesystem.exists(filesystem.join(state, "tuner.pkl")):
        print("search: goes on where it was broken off", flush=True)
        return ray_tune.Tuner.restore(
            f"{path}/{STATE}", trainable, storage_filesystem=file_system, restart_errored=True
        )
    return ray_tune.Tuner(
        trainable,
        param_space={key: axis.domain() for key, axis in search.space.items()},
        tune_config=ray_tune.TuneConfig(
            metric=config.best_by,
            mode=mode,
            num_samples=search.trials,
            max_concurrent_trials=None if search.search == "random" else at_a_time,
            search_alg=_searcher(config, mode, at_a_time),
            scheduler=_scheduler(config),
        ),
        run_config=ray_tune.RunConfig(
            name=STATE,
            storage_path=path,
            storage_filesystem=file_system,
            verbose=0,
            checkpoint_config=ray_tune.CheckpointConfig(checkpoint_at_end=False),  # has its own
            callbacks=[_Lines(config)],
        ),
    )


def _searcher(config: TuneConfig, mode: str, at_a_time: int) -> Any:
    if config.tune.search == "random":
        # of which Tune ignores max_concurrent_trials
        return ray_tune.search.BasicVariantGenerator(
            random_state=config.tune.seed, max_concurrent=at_a_time
        )
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return OptunaSearch(metric=config.best_by, mode=mode, seed=config.tune.seed)
    except ImportError as error:
        raise RequestError(
            "tune.search optuna: is not installed; pip install 'imgcls[optuna]', or say "
            "--tune.search random"
        ) from error


def _scheduler(config: TuneConfig) -> Any:
    asha = config.tune.asha
    if config.tune.scheduler == "fifo" or config.epochs <= asha.grace:
        return ray_tune.schedulers.FIFOScheduler()
    return ray_tune.schedulers.ASHAScheduler(
        time_attr="epoch",
        # after the last epoch a trial writes its bundle, and ends by itself
        max_t=config.epochs + 1,
        grace_period=asha.grace,
        reduction_factor=asha.reduction,
    )


class Trial(ray_tune.Trainable):
    """One trial, in a process of Ray Tune's: a training that is heard of epoch by epoch."""

    def setup(self, values: Any, *, config: TuneConfig, images: Decoded | None) -> None:  # type: ignore[override]
        object_store.use(config.storage)
        folder = filesystem.join(config.output, TRIALS, self.trial_id)
        self._by = config.best_by
        self._begun = time.monotonic()
        self._epochs: queue.SimpleQueue[Epoch] = queue.SimpleQueue()
        self._told: dict[str, Any] = {}
        self._best: Epoch | None = None
        self._interruption = Interruption()
        shared = Shared(images, self._epochs.put, self._interruption)
        settings = settings_of(config, values, folder)
        self._run = started(lambda: training.train(settings, shared=shared))

    def step(self) -> dict[str, Any]:
        """Wait for the next epoch, or for the end."""
        while True:
            ended = self._run.done()
            try:
                return self._tell(self._epochs.get(timeout=0.2))
            except queue.Empty:
                if not ended:
                    continue
            result = self._run.result()
            if not self._told:  # it had ended before, and its epochs were not heard of
                for epoch in result.history:
                    self._tell(epoch)
            return {**self._told, "done": True}

    def _tell(self, epoch: Epoch) -> dict[str, Any]:
        best = epoch if epoch.better_than(self._best, self._by) else self._best
        assert best is not None
        self._best = best
        self._told = {
            "epoch": epoch.epoch,
            "val_loss": best.val_loss,
            "val_accuracy": best.val_accuracy,
            "best_epoch": best.epoch,
            "trial_seconds": time.monotonic() - self._begun,
        }
        return self._told

    def cleanup(self) -> None:
        """Have a training that was stopped early give its workers back."""
        self._interruption.ask("the search")
        wait([self._run], timeout=STOP_SECONDS)


class _Lines(ray_tune.Callback):
    """A line per trial that ends."""

    def __init__(self, config: TuneConfig) -> None:
        self._epochs = config.epochs
        self._by = config.best_by
        self._ended = 0
        self._trials = config.tune.total

    def get_state(self) -> dict[str, Any]:
        return {"ended": self._ended}

    def set_state(self, state: dict[str, Any]) -> None:
        self._ended = state["ended"]

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self._tell(trial, "ended")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self._tell(trial, "failed")

    def _tell(self, trial: Any, how: str) -> None:
        self._ended += 1
        last = trial.last_result or {}
        if how == "ended" and last.get("epoch", 0) < self._epochs:
            how = f"stopped after epoch {last.get('epoch', 0)}"
        value = last.get(self._by, math.nan)
        print(
            f"trial {self._ended}/{self._trials}  {_shown(trial.config)}  {self._by} {value:.4f}  "
            f"{how}",
            flush=True,
        )


def _shown(values: dict[str, Any]) -> str:
    return "  ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
    )


# ---------------------------------------------------------------------- after the trials


def _concluded(config: TuneConfig, grid: Any) -> TuneResult:
    """Write the table and the picture, and keep the best trial's bundle."""
    table = _table(config, grid)
    sink = io.BytesIO()
    table.to_parquet(sink, index=False)
    filesystem.write(filesystem.join(config.output, RESULTS), sink.getvalue())
    axes = {key: axis.kind.startswith("log") for key, axis in config.tune.space.items()}
    for name, data in parallel_coordinates(table, axes, config.best_by).items():
        filesystem.write(filesystem.join(config.output, "plots", name), data)
    finished = table[table["state"] == "finished"]
    if finished.empty:
        raise RunFailed(
            f"no trial of {len(table)} came to a bundle; the last error: "
            f"{table['error'].dropna().iloc[-1] if table['error'].notna().any() else 'none'}"
        )
    first = finished.iloc[0]
    best = filesystem.join(config.output, BEST)
    _promote(str(first["bundle"]), best)
    values = {key: first[key] for key in config.tune.space}
    print(
        f"best: {_shown(values)}  {config.best_by} {first[config.best_by]:.4f} -> {best}\n"
        f"all {len(table)} trials: {filesystem.join(config.output, RESULTS)}",
        flush=True,
    )
    return TuneResult(best, values, table)


def _table(config: TuneConfig, grid: Any) -> pd.DataFrame:
    rows = []
    for result in grid:
        metrics = result.metrics or {}
        bundle = filesystem.join(config.output, TRIALS, str(metrics.get("trial_id")))
        done = filesystem.exists(filesystem.join(bundle, DESCRIPTION))
        error = str(result.error).strip().splitlines()[-1] if result.error else None
        rows.append(
            {
                "trial": metrics.get("trial_id"),
                **{key: result.config.get(key) for key in config.tune.space},
                "epochs": metrics.get("epoch"),
                "best_epoch": metrics.get("best_epoch"),
                "val_loss": metrics.get("val_loss", math.nan),
                "val_accuracy": metrics.get("val_accuracy", math.nan),
                "seconds": metrics.get("trial_seconds", math.nan),
                "state": "finished" if done else "failed" if error else "stopped",
                "error": error,
                "bundle": bundle if done else None,
            }
        )
    ascending = config.best_by == "val_loss"
    return pd.DataFrame(rows).sort_values(config.best_by, ascending=ascending, ignore_index=True)


def _promote(bundle: str, best: str) -> None:
    """Copy a bundle, its description last: until then there is none."""
    files = [name for name in filesystem.walk(bundle) if not name.startswith("_")]
    filesystem.remove(best)
    for name in sorted(files, key=lambda name: name == DESCRIPTION):
        filesystem.write(
            filesystem.join(best, name), filesystem.read(filesystem.join(bundle, name))
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tune's own tables and warnings are left out; errors come back with the trials."""
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.ERROR)
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name in added:
            del os.environ[name]


_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}
