"""Ray Train around the loop: starts the workers, waits, and turns what went wrong into one error.

Owns the run's temporary storage and Ray Train's settings. Promises that nothing but the bundle is
left in the output folder, and that every failure is a RunFailed or a ResourcesError.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow.fs
import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from imgcls.cluster import Interruption
from imgcls.data import storage
from imgcls.errors import Interrupted, ResourcesError, RunFailed
from imgcls.training.loop import Work, run_worker
from imgcls.training.progress import Epoch, printed_board
from imgcls.training.waiting import awaited, started
from imgcls.training.workers import Workers

# `ray.train` exports the names of Train V2 where it runs, but those of V1 where it is type-checked
_train: Any = ray.train

FOLDER = "_train"
START_ATTEMPTS = 5
"""Times that Ray waits a minute for the workers' CPUs before the run is given up."""
STOP_SECONDS = 10
"""Time for an interrupted run to wind up; what is left then ends with this process."""
POLL_SECONDS = 0.5
"""Ray's default of 2 would hold back epochs that are shorter: it takes one report per poll."""


@dataclass(frozen=True)
class Trained:
    """Every epoch, the precision it ran at, and the best weights while the storage is there."""

    history: list[Epoch]
    precision: str
    checkpoint: ray.train.Checkpoint


@contextlib.contextmanager
def trained(
    work: Work, workers: Workers, output: str, interruption: Interruption
) -> Iterator[Trained]:
    """Train; within the context the best checkpoint can be read, after it the storage is gone.

    output: the bundle folder, which must be reachable from every machine
    """
    folder = storage.join(output, FOLDER)
    # what a killed run left behind would be taken for this run's own past
    storage.remove(folder)
    try:
        with printed_board() as board:
            result = _fit(work, workers, folder, board, interruption)
        outcome: dict[str, Any] = result.return_value
        if outcome["diverged"]:
            coarse = ", or say --precision fp32" if outcome["precision"] == "bf16" else ""
            raise RunFailed(
                f"the training diverged: {outcome['diverged']}; lower optim.lr "
                f"({work.optim.lr:g}) or raise optim.warmup{coarse}"
            )
        history = [Epoch(**epoch) for epoch in outcome["history"]]
        yield Trained(history, outcome["precision"], result.checkpoint)
    finally:
        storage.remove(folder)


def _fit(work: Work, workers: Workers, folder: str, board: Any, interruption: Interruption) -> Any:
    path, file_system = _storage(folder)
    resources = {"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {})
    loop: Any = run_worker
    trainer = TorchTrainer(
        loop,
        train_loop_config={"work": work, "board": board},
        scaling_config=_train.ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpus > 0,
            resources_per_worker=resources,
        ),
        run_config=_train.RunConfig(
            name="run",
            storage_path=path,
            storage_filesystem=file_system,
            # only the best so far is ever reported, so the last one is the best one
            checkpoint_config=_train.CheckpointConfig(num_to_keep=1),
            failure_config=_train.FailureConfig(controller_failure_limit=START_ATTEMPTS - 1),
            logging_config=_train.LoggingConfig(log_level="ERROR"),
        ),
    )
    with _environment("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_SECONDS)):
        fit = started(trainer.fit)
        try:
            return awaited(fit, interruption)
        except Interrupted:
            _stop(board, fit)
            raise
        except ray.train.WorkerGroupError as error:
            raise RunFailed(_told(error)) from error
        except ray.train.ControllerError as error:
            if isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
                raise ResourcesError(
                    f"{workers} were not to be had in {START_ATTEMPTS} minutes; another job may "
                    "hold the cluster's CPUs or GPUs (see `ray status`)"
                ) from error
            raise RunFailed(f"Ray Train failed: {error.controller_failure}") from error


def _stop(board: Any, fit: Future[Any]) -> None:
    """End the workers, which ends the run; they would train on for as long as this process lives.

    Ray Train has no way to be told so from another thread.
    """
    for worker in ray.get(board.workers.remote(), timeout=STOP_SECONDS):
        ray.kill(worker)
    wait([fit], timeout=STOP_SECONDS)


def _told(error: ray.train.WorkerGroupError) -> str:
    """The failure in one line: the one of the workers that did not fail because another had."""
    told = []
    for rank, failure in sorted(error.worker_failures.items()):
        lines = str(failure).strip().splitlines() or [type(failure).__name__]
        lost_touch = any(sign in lines[-1] for sign in ("gloo", "NCCL", "Connection"))
        told.append((lost_touch, f"training worker {rank} failed: {lines[-1].strip()[:300]}"))
    line = min(told)[1]
    remedy = "; give a smaller batch_size" if "out of memory" in line.lower() else ""
    return line + remedy


def _storage(folder: str) -> tuple[str, pyarrow.fs.FileSystem | None]:
    """Where Ray Train keeps checkpoints; through fsspec, as all other files of this package."""
    if storage.is_local(folder):
        return folder, None
    file_system, path = fsspec.core.url_to_fs(folder)
    return path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(file_system))


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set a variable, unless the user has, for as long as Ray Train reads it."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
