"""Ray Train: start the training workers, wait for them, and turn failures into one error.

Lost workers are replaced and resume from the last saved state (see `checkpoints`; Ray Train's own
checkpoints are not used). The driver reports while no worker is alive, and raises RunFailed when
that lasts too long.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
import uuid
from concurrent.futures import Future, wait
from dataclasses import asdict, replace
from typing import Any

import pyarrow.fs
import ray
import ray.train
import ray.train.torch
import torch
from ray.train.torch import TorchTrainer

from imgcls.cluster import ray_internals, session
from imgcls.cluster.autoscaler import WaitTimeout
from imgcls.cluster.interrupts import Interruption, run_in_thread
from imgcls.cluster.session import build_malloc_env
from imgcls.data.environment import set_env_defaults
from imgcls.data.storage import filesystem, object_store, storage_settings
from imgcls.errors import Interrupted, RunFailed
from imgcls.formatting import format_count
from imgcls.models import zoo
from imgcls.models.precision import choose_precision
from imgcls.runs.layout import CHECKPOINT_FOLDER
from imgcls.training import network as networks
from imgcls.training.config import TrainPrecision
from imgcls.training.epoch_metrics import TrainLoopResult
from imgcls.training.scaling import WorkerPlan
from imgcls.training.train_step import WorkerContext
from imgcls.training.trainer import Trainer, TrainLoopSpec

# `ray.train` exports the names of Train V2 where it runs, but those of V1 where it is type-checked
_ray_train: Any = ray.train

MAX_START_FAILURES = 5
"""Failed worker group starts, in addition to those that time out waiting for CPUs (60 s each)."""
SAVE_TIMEOUT_S = 60
"""Maximum time for the workers of an interrupted run to save before they are killed."""
STOP_TIMEOUT_S = 10
LIVENESS_INTERVAL_S = 2.0
"""Seconds between the driver's checks whether a worker is alive."""
POLL_INTERVAL_S = 0.5
"""Ray's default of 2 would delay epochs that are shorter: it takes one report per poll."""
PEER_LOSS_MARKERS = ("gloo", "nccl", "connection", "socket", "barrier")
"""Words in the failure of a worker that lost its peer; the peer's failure is the cause."""


# ---------------------------------------------------------------------- on the driver


def fit_torch_trainer(
    spec: TrainLoopSpec, workers: WorkerPlan, channel: Any, interruption: Interruption
) -> TrainLoopResult:
    """Run the training loop in a group of workers; lost workers are replaced.

    Raises Interrupted after a signal, once the workers have saved their state; RunFailed when
    workers fail, or when none is alive for `scale.resource_timeout_s`.
    """
    folder = filesystem.join(spec.config.output, CHECKPOINT_FOLDER, "ray")
    trainer = build_torch_trainer(spec, workers, channel, folder)
    try:
        with set_env_defaults({"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_INTERVAL_S)}):
            timeout_s = spec.config.scale.resource_timeout_s
            liveness = _WorkerLiveness(channel, str(workers), timeout_s)
            return _wait_for_result(run_in_thread(trainer.fit), channel, liveness, interruption)
    finally:
        filesystem.remove(folder)


def build_torch_trainer(
    spec: TrainLoopSpec, workers: WorkerPlan, channel: Any, folder: str
) -> TorchTrainer:
    """Ray Train's trainer of the group of workers; its own records are written to `folder`."""
    scale = spec.config.scale
    path, file_system = resolve_ray_storage(folder)
    resources = {"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {})
    is_elastic = workers.min_count < workers.max_count
    loop: Any = storage_settings.bind_settings(train_loop_per_worker)
    trainer = TorchTrainer(
        # bound, since Ray Train's controller reads `train_loop_config`, and would import the loop
        functools.partial(loop, spec, channel),
        scaling_config=_ray_train.ScalingConfig(
            num_workers=(workers.min_count, workers.max_count) if is_elastic else workers.count,
            use_gpu=workers.gpus > 0,
            resources_per_worker=resources,
        ),
        run_config=_ray_train.RunConfig(
            # a new name each time: Ray's record of a killed run can be truncated, and is not needed
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
    ray_internals.skip_dataset_actor(trainer)
    return trainer


class _WorkerLiveness:
    """Checks whether any training worker is alive, and measures for how long none was."""

    def __init__(self, channel: Any, group: str, timeout_s: float) -> None:
        self._channel = channel
        self._description = f"training workers, {group}"
        self._timeout = WaitTimeout(timeout_s)
        self._last_alive = self._last_check = time.monotonic()

    def check(self) -> None:
        """Report when no worker is alive; RunFailed after the timeout. May be called often."""
        now = time.monotonic()
        if now - self._last_check < LIVENESS_INTERVAL_S:
            return
        self._last_check = now
        workers = ray.get(self._channel.list_workers.remote())
        if any(ray_internals.is_actor_alive(worker) for worker in workers):
            self._last_alive = now
        self._timeout.check(now - self._last_alive, self._description)


def _wait_for_result(
    run: Future[Any], channel: Any, liveness: _WorkerLiveness, interruption: Interruption
) -> TrainLoopResult:
    try:
        while not wait([run], timeout=0.2).done:
            interruption.check()
            liveness.check()
        result = run.result()
    except Interrupted as interrupted:  # a RunFailed too, so it must be caught before
        raise _stop_workers(run, channel, interrupted) from None
    except RunFailed as failure:
        # Ray Train keeps retrying and cannot be stopped: workers that start later return at once
        channel.report_failure.remote(str(failure))
        raise
    except ray.train.WorkerGroupError as error:
        raise RunFailed(format_worker_failure(error)) from error
    except ray.train.ControllerError as error:
        if isinstance(error.controller_failure, ray_internals.WorkerGroupStartupTimeoutError):
            raise RunFailed(
                "the training workers could not be started in repeated attempts. Another job may "
                "use the cluster's CPUs or GPUs (see `ray status`)."
            ) from error
        raise RunFailed(f"Ray Train failed: {error.controller_failure}") from error
    outcome: TrainLoopResult = result.return_value
    if outcome.failure_kind == "failed":
        raise RunFailed(append_remedy(outcome.problem or ""))
    return outcome


def _stop_workers(run: Future[Any], channel: Any, interrupted: Interrupted) -> Interrupted:
    """Ask the workers to save and stop; kill them if they do not, since Ray Train cannot."""
    channel.request_stop.remote()
    wait([run], timeout=SAVE_TIMEOUT_S)
    if run.done() and run.exception() is None:
        outcome: TrainLoopResult | None = run.result().return_value
        if outcome is None or outcome.failure_kind is None:
            return Interrupted(f"{interrupted}; state saved, rerun the same command to resume")
        return Interrupted(f"{interrupted}; the training had failed: {outcome.problem}")
    with contextlib.suppress(ray.exceptions.RayError):
        for worker in ray.get(channel.list_workers.remote(), timeout=STOP_TIMEOUT_S):
            ray.kill(worker)
    wait([run], timeout=STOP_TIMEOUT_S)
    return Interrupted(f"{interrupted}; rerun the same command to resume from the last saved state")


def format_worker_failure(error: ray.train.WorkerGroupError) -> str:
    """The cause in one line: a failure that is not the loss of a peer, if there is one."""
    failures = []
    for rank, failure in sorted(error.worker_failures.items()):
        lines = str(failure).strip().splitlines() or [type(failure).__name__]
        lost_peer = any(marker in lines[-1].lower() for marker in PEER_LOSS_MARKERS)
        failures.append((lost_peer, f"training worker {rank} failed: {lines[-1].strip()[:300]}"))
    return append_remedy(min(failures)[1])


def append_remedy(line: str) -> str:
    """Add the advice for a failure that has one."""
    if "out of memory" not in line.lower():
        return line
    return f"{line}; set a smaller batch_size or a larger scale.accumulate"


def resolve_ray_storage(folder: str) -> tuple[str, pyarrow.fs.FileSystem | None]:
    """Path and file system for Ray's own records; through fsspec, as all files of this package."""
    if filesystem.is_local(folder):
        return folder, None
    store, path = object_store.resolve_store(folder)
    return path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(store.file_system))


# ---------------------------------------------------------------------- in a worker


def train_loop_per_worker(spec: TrainLoopSpec, channel: Any) -> TrainLoopResult:
    """The training function that Ray Train calls in every worker."""
    reason = ray.get(channel.get_failure.remote())
    if reason is not None:
        # Ray Train restarts workers after any failure; this one would only occur again
        return TrainLoopResult((), "", problem=reason, failure_kind="failed")
    channel.register_worker.remote(ray.get_runtime_context().current_actor)
    try:
        return _run_trainer(spec, channel)
    except Exception as error:
        if not is_peer_loss(error):
            lines = str(error).strip().splitlines() or [""]
            line = f"{type(error).__name__}: {lines[-1].strip()[:300]}"
            rank = _ray_train.get_context().get_world_rank()
            ray.get(channel.report_failure.remote(f"training worker {rank} failed: {line}"))
        raise


def is_peer_loss(error: BaseException) -> bool:
    """Whether a failure only means that another worker or a node was lost."""
    if isinstance(error, ray.exceptions.RayError):
        return True
    text = f"{type(error).__name__} {error}".lower()
    return any(marker in text for marker in PEER_LOSS_MARKERS)


def _run_trainer(spec: TrainLoopSpec, channel: Any) -> TrainLoopResult:
    context = _ray_train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    node_id = ray.get_runtime_context().get_node_id()
    node_cpus = next(node.cpus for node in session.list_nodes() if node.id == node_id)
    torch.set_num_threads(
        compute_num_threads(len(os.sched_getaffinity(0)), node_cpus, context.get_local_world_size())
    )
    _set_convolution_algorithms(deterministic=spec.config.scale.deterministic)
    precision, reason = _resolve_precision(spec.config.precision, device)
    spec = replace(spec, targets=ray.get(spec.targets))
    network = zoo.build_network(spec.architecture, spec.targets.num_classes)
    network.load_state_dict(ray.get(spec.initial_weights))
    networks.set_regularization(network, spec.config.model)
    trainer = Trainer(spec, WorkerContext(rank, world_size, device, precision), network, channel)
    if rank == 0:
        workers = format_count(world_size, "worker")
        channel.post.remote(f"training: {workers} on {device.type}, {precision} ({reason})")
    return trainer.run(lambda epoch: _ray_train.report(asdict(epoch)))


def _resolve_precision(requested: TrainPrecision, device: torch.device) -> tuple[str, str]:
    """The precision to train in, and the reason."""
    if requested == "fp16":
        return "fp16", "as requested"
    return choose_precision(requested, device)


def _set_convolution_algorithms(*, deterministic: bool) -> None:
    """Let cuDNN use only algorithms that repeat their results, or measure all and use the fastest.

    Measurements are off for the former, because they may choose another algorithm in each run.
    """
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


def compute_num_threads(cores: int, node_cpus: float, local_workers: int) -> int:
    """A worker's share of its node's cores; Ray's default of one thread would leave others idle.

    cores:         that the process may run on: those of the machine, also in a container
    node_cpus:     CPUs of the node in Ray, which reads the CPU limit of a container; more threads
                   than that are suspended in turn, each while the others wait for it
    local_workers: training workers on the node
    """
    return max(1, int(min(cores, node_cpus)) // local_workers)
