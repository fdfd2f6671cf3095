"""Ray Train around the workers: starts them, waits, and turns what went wrong into one error.

Owns Ray Train's settings. Lost workers are replaced and go on from the last saved state, which is
ours (see `checkpoints`); while none is to be had it is said; every failure that remains is a
RunFailed.
"""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from concurrent.futures import Future, wait
from typing import Any

import pyarrow.fs
import ray
import ray.train
from ray.train.torch import TorchTrainer

from imgcls.cluster import ray_internals, session
from imgcls.cluster.autoscaler import WaitTimeout
from imgcls.cluster.interrupts import Interruption, run_in_thread
from imgcls.cluster.session import build_malloc_env
from imgcls.data import filesystem, object_store, storage_settings
from imgcls.errors import Interrupted, RunFailed
from imgcls.training.checkpoints import CHECKPOINT_FOLDER
from imgcls.training.scaling import WorkerPlan
from imgcls.training.trainer import TrainLoopResult, TrainLoopSpec
from imgcls.training.worker import PEER_LOSS_MARKERS, train_loop_per_worker

# `ray.train` exports the names of Train V2 where it runs, but those of V1 where it is type-checked
_ray_train: Any = ray.train

MAX_START_FAILURES = 5
"""Times that workers may fail to start, beside those that Ray waits a minute for their CPUs."""
SAVE_TIMEOUT_S = 60
"""Time for an interrupted run to save; what is left then ends with this process."""
STOP_TIMEOUT_S = 10
LIVENESS_INTERVAL_S = 2.0
"""So often the driver looks whether a worker is there."""
POLL_INTERVAL_S = 0.5
"""Ray's default of 2 would hold back epochs that are shorter: it takes one report per poll."""


def fit_torch_trainer(
    work: TrainLoopSpec, workers: WorkerPlan, board: Any, interruption: Interruption
) -> TrainLoopResult:
    """Train until the workers end, replacing those that are lost.

    Raises Interrupted after a signal, when the workers have saved; RunFailed, also when no worker
    is to be had for `scale.resource_timeout_s`.
    """
    # a new name each time: Ray's own record of a killed run may be cut short, and is not needed
    scale = work.config.scale
    folder = filesystem.join(work.config.output, CHECKPOINT_FOLDER, "ray")
    path, file_system = resolve_ray_storage(folder)
    resources = {"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {})
    elastic = workers.min_count < workers.max_count
    loop: Any = storage_settings.bind_settings(train_loop_per_worker)
    trainer = TorchTrainer(
        loop,
        train_loop_config={"work": work, "board": board},
        scaling_config=_ray_train.ScalingConfig(
            num_workers=(workers.min_count, workers.max_count) if elastic else workers.count,
            use_gpu=workers.gpus > 0,
            resources_per_worker=resources,
        ),
        run_config=_ray_train.RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=path,
            storage_filesystem=file_system,
            failure_config=_ray_train.FailureConfig(
                max_failures=scale.max_failures,
                controller_failure_limit=MAX_START_FAILURES
                + math.ceil(scale.resource_timeout_s / 60),
            ),
            logging_config=_ray_train.LoggingConfig(log_level="ERROR"),
            worker_runtime_env=build_malloc_env(),
        ),
    )
    try:
        with session.set_env_defaults({"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_INTERVAL_S)}):
            team = _WorkerLiveness(board, str(workers), scale.resource_timeout_s)
            outcome = _wait_for_result(run_in_thread(trainer.fit), board, team, interruption)
    finally:
        filesystem.remove(folder)
    return outcome


class _WorkerLiveness:
    """The workers as the driver sees them: whether any is there, and for how long none was."""

    def __init__(self, board: Any, wanted: str, wait_seconds: float) -> None:
        self._board = board
        self._wanted = f"training workers, {wanted}"
        self._patience = WaitTimeout(wait_seconds)
        self._seen = self._looked = time.monotonic()

    def check(self) -> None:
        """Say when none is there; raises RunFailed when that takes too long. To be called often."""
        now = time.monotonic()
        if now - self._looked < LIVENESS_INTERVAL_S:
            return
        self._looked = now
        if any(
            ray_internals.is_actor_alive(worker) for worker in ray.get(self._board.workers.remote())
        ):
            self._seen = now
        self._patience.check(now - self._seen, self._wanted)


def _wait_for_result(
    run: Future[Any], board: Any, team: _WorkerLiveness, interruption: Interruption
) -> TrainLoopResult:
    try:
        while not wait([run], timeout=0.2).done:
            interruption.check()
            team.check()
        result = run.result()
    except Interrupted as interrupted:  # a RunFailed too, so it must be caught before
        raise _stop_workers(run, board, interrupted) from None
    except RunFailed as failure:
        # Ray Train goes on trying, and has no way to be told: a worker that comes ends at once
        board.fail.remote(str(failure))
        raise
    except ray.train.WorkerGroupError as error:
        raise RunFailed(format_worker_failure(error)) from error
    except ray.train.ControllerError as error:
        if isinstance(error.controller_failure, ray_internals.WorkerGroupStartupTimeoutError):
            raise RunFailed(
                "the training workers were not to be had, time and again; another job may hold the "
                "cluster's CPUs or GPUs (see `ray status`)"
            ) from error
        raise RunFailed(f"Ray Train failed: {error.controller_failure}") from error
    outcome: TrainLoopResult = result.return_value
    if outcome.kind == "failed":
        raise RunFailed(append_remedy(outcome.problem or ""))
    return outcome


def _stop_workers(run: Future[Any], board: Any, interrupted: Interrupted) -> Interrupted:
    """Have the workers save and end; they are killed if they do not, as Ray Train has no way."""
    board.stop.remote()
    wait([run], timeout=SAVE_TIMEOUT_S)
    if run.done() and run.exception() is None:
        outcome: TrainLoopResult | None = run.result().return_value
        if outcome is None or outcome.kind is None:
            return Interrupted(
                f"{interrupted}; all is saved, and the same command goes on from here"
            )
        return Interrupted(f"{interrupted}; the training had failed: {outcome.problem}")
    with contextlib.suppress(ray.exceptions.RayError):
        for worker in ray.get(board.workers.remote(), timeout=STOP_TIMEOUT_S):
            ray.kill(worker)
    wait([run], timeout=STOP_TIMEOUT_S)
    return Interrupted(f"{interrupted}; the same command goes on from the last saved state")


def format_worker_failure(error: ray.train.WorkerGroupError) -> str:
    """The failure in one line: the one of the workers that did not fail because another had."""
    failures = []
    for rank, failure in sorted(error.worker_failures.items()):
        lines = str(failure).strip().splitlines() or [type(failure).__name__]
        lost_touch = any(sign in lines[-1].lower() for sign in PEER_LOSS_MARKERS)
        failures.append((lost_touch, f"training worker {rank} failed: {lines[-1].strip()[:300]}"))
    return append_remedy(min(failures)[1])


def append_remedy(line: str) -> str:
    if "out of memory" not in line.lower():
        return line
    return f"{line}; give a smaller batch_size, or a larger scale.accumulate"


def resolve_ray_storage(folder: str) -> tuple[str, pyarrow.fs.FileSystem | None]:
    """Where Ray keeps its notes; through fsspec, as all other files of this package."""
    if filesystem.is_local(folder):
        return folder, None
    file_system, path = object_store.resolve_store(folder)
    return path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(file_system))
