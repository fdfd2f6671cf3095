"""Run the chunks of a job on the cluster; replan when nodes join or leave; report the progress.

A pass is one pipeline, placed for the nodes that are there. Ray restarts the workers of a lost node
wherever there is room; where there is none, their chunks would wait forever, and nodes that join
would stay idle. So a pass is stopped and replanned when no worker makes progress any more, or when
the new nodes are worth a restart.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import ray

from imgcls import log
from imgcls.cluster import autoscaler, interrupts, session
from imgcls.cluster.autoscaler import NodeRequest, WaitTimeout
from imgcls.cluster.interrupts import Interruption
from imgcls.cluster.session import Node
from imgcls.data.manifests.manifest import Manifest
from imgcls.errors import (
    CrashingImage,
    ImgclsError,
    Interrupted,
    ResourcesError,
    RunFailed,
    StorageError,
    first_line,
)
from imgcls.execution import replan
from imgcls.execution.completed import CompletedChunks
from imgcls.execution.config import ScaleConfig
from imgcls.execution.messages import ChunkResult, ChunkTask, RunSpec
from imgcls.execution.placement import (
    Placement,
    compute_first_bundles,
    plan_placement,
    select_nodes,
)
from imgcls.execution.plan import Plan, restore_shards
from imgcls.execution.progress import Progress
from imgcls.execution.replan import NodeMonitor, RunState
from imgcls.execution.worker import Job
from imgcls.formatting import format_count
from imgcls.runs import layout
from imgcls.runs.lease import Lease

PROGRESS_WRITE_S = 10.0
"""Time between two writes of the progress file."""
LEASE_CHECK_S = 5.0
"""Age of a check of the lease that is accepted for a chunk's result. A check for each would limit
the driver to as many chunks per second as a store answers listings one after another. Before a part
is published, the lease is checked again."""


@dataclass(frozen=True)
class Driver:
    """What the driver of a run has: its output, lease, signals and settings."""

    output: str
    lease: Lease
    interruption: Interruption
    scale: ScaleConfig
    progress_seconds: float
    image_bytes: int = 0
    """Size of a prepared image on its way from CPUs to GPUs."""


class Observer(Protocol):
    """Receives the results and the progress of a run, for example to export metrics."""

    def record_chunk(self, result: ChunkResult) -> None:
        """A chunk is written."""

    def set_progress(self, snapshot: Mapping[str, Any]) -> None:
        """The state of the run, as `Progress.snapshot` returns it."""


def wait_for_placement(
    job: Job, scale: ScaleConfig, interruption: Interruption, chunk_bytes: int = 0
) -> Placement:
    """Plan and log the placement for the nodes that are there; wait where more may join.

    Raises ResourcesError when it does not fit and will not, or not within
    `scale.resource_timeout_s`.
    """
    use_gpus = job.has_gpu_stage
    placement = autoscaler.wait_until_fit(
        lambda nodes: plan_placement(nodes, scale, chunk_bytes, use_gpus=use_gpus),
        lambda nodes: compute_first_bundles(nodes, scale, chunk_bytes, use_gpus=use_gpus),
        scale.resource_timeout_s,
        interruption,
    )
    _log_placement(placement)
    return placement


def load_completed(output: str, plan: Plan, manifest: Manifest) -> CompletedChunks:
    """List what an earlier driver has finished; restore the plan's manifest shards if needed."""
    completed = CompletedChunks.load(output, plan)
    if len(completed.parts) < plan.num_parts:
        restore_shards(output, manifest, plan)
    if completed.rows_done:
        log.emit("resume", f"{completed.rows_done:,} of {plan.rows:,} rows are done")
    return completed


class JobRun:
    """A job's chunks on the cluster: placed, watched, replanned and reported.

    adapt: makes the placement for new nodes one that keeps what the run has chosen for itself
    """

    def __init__(
        self,
        job: Job,
        spec: RunSpec,
        driver: Driver,
        *,
        adapt: Callable[[Placement], Placement] = lambda placement: placement,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._job = job
        self._spec = spec
        self._driver = driver
        self._observers = observers
        self._passes = ChunkRunner(job, spec, driver, adapt)
        self.stage_seconds: dict[str, float] = {}
        self.steady_rate: float | None = None
        self.details: dict[str, set[str]] = {}

    def run(
        self, placement: Placement, tasks: Sequence[ChunkTask], *, total: int, done: int = 0
    ) -> Iterator[ChunkResult]:
        """Process tasks; yields each result once its chunk is written, while the lease is held.

        total: rows of the run; done: of these, rows that were finished before
        Raises RunFailed when no worker makes progress for `scale.resource_timeout_s`, or another
        driver has taken over.
        """
        if not tasks:
            return
        driver = self._driver
        progress = Progress(total, done, driver.progress_seconds, self._job.name)
        written_at = time.monotonic()
        try:
            for result in self._passes.run(placement, tasks):
                if result is None:
                    progress.tick()
                else:
                    driver.lease.check(LEASE_CHECK_S)
                    self._record(result, progress)
                    yield result
                if time.monotonic() - written_at > PROGRESS_WRITE_S:
                    written_at = time.monotonic()
                    driver.lease.check()
                    self._publish(progress)
                    layout.write_progress(driver.output, progress.snapshot())
            self._publish(progress)  # else a gauge keeps the rows that were left before
        finally:
            progress.close()
            self.steady_rate = progress.steady_rate
            for stage, seconds in progress.timings.seconds().items():
                self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + seconds

    def _record(self, result: ChunkResult, progress: Progress) -> None:
        for name, value in result.details.items():
            self.details.setdefault(name, set()).add(value)
        progress.add(result)
        for observer in self._observers:
            observer.record_chunk(result)
        _log_chunk(result)

    def _publish(self, progress: Progress) -> None:
        for observer in self._observers:
            observer.set_progress(progress.snapshot())


def _log_chunk(result: ChunkResult) -> None:
    """Log a chunk: worker crashes for people, everything for a log system."""
    task = result.task
    if result.crashes:
        crashed = result.status.get(CrashingImage.status, 0)
        log.emit(
            "watch",
            f"chunk {task.chunk}: {format_count(result.crashes, 'worker')} crashed or were lost at "
            f"it; finished, {format_count(crashed, 'row')} {CrashingImage.status}",
        )
    if log.is_json():
        seconds = {name: round(value, 6) for name, value in result.timings.seconds().items()}
        log.emit(
            "chunk",
            f"chunk {task.chunk} is written",
            chunk=task.chunk,
            worker=result.worker,
            node=result.worker.partition("/")[0],
            rows=result.rows,
            status=result.status,
            deaths=result.crashes,
            seconds=seconds,
        )


class ChunkRunner:
    """Passes over the remaining tasks, one after another, until none is left."""

    def __init__(
        self, job: Job, spec: RunSpec, driver: Driver, adapt: Callable[[Placement], Placement]
    ) -> None:
        self._job = job
        self._spec = spec
        self._interruption = driver.interruption
        self._scale = driver.scale
        self._use_gpus = job.has_gpu_stage
        self._chunk_bytes = driver.image_bytes * spec.plan.chunk_rows
        self._adapt = adapt
        self._request = NodeRequest()
        self._timeout = WaitTimeout(driver.scale.resource_timeout_s)
        self._max_nodes = None if session.is_private_session() else autoscaler.find_max_nodes()

    def run(self, placement: Placement, tasks: Sequence[ChunkTask]) -> Iterator[ChunkResult | None]:
        """Yields each chunk's result once it is written, and None now and then without a result.

        Raises RunFailed when no worker makes progress for `scale.resource_timeout_s`.
        """
        remaining = {task.chunk: task for task in tasks}
        try:
            while remaining:
                placement = self._limit_workers(placement, self._count_rows(remaining))
                reason = yield from self._run_pass(placement, remaining)
                if not remaining:
                    return
                if reason is None:
                    raise RunFailed(
                        f"{format_count(len(remaining), 'chunk')} sent to workers and not returned"
                    )
                log.emit("layout", f"{reason}; replanning")
                placement = self._adapt((yield from self._replan()))
                _log_placement(placement)
        finally:
            self._request.cancel()

    def _run_pass(
        self, placement: Placement, remaining: dict[int, ChunkTask]
    ) -> Generator[ChunkResult | None, None, str | None]:
        """Run one pass, removing finished chunks from `remaining`; returns why it was stopped."""
        # Ray Data takes half a second to import: only where there is work
        from imgcls.execution.heartbeat import Watchdog
        from imgcls.execution.pipeline import Pipeline

        spec = replace(self._spec, session=secrets.token_hex(8))
        watchdog = Watchdog(spec.session, self._scale.worker_timeout_s)
        nodes = NodeMonitor()
        pipeline = Pipeline(self._job, spec, placement, list(remaining.values()))
        reason: str | None = None
        rows_left = self._count_rows(remaining)
        rows, first_at = 0, 0.0
        try:
            for result in interrupts.iterate_in_thread(
                pipeline.run(), self._interruption, pipeline.stop
            ):
                for message in watchdog.check():
                    log.emit("watch", message)
                if result is not None and result.task.chunk in remaining:
                    watchdog.record_progress()
                    first_at = first_at or time.monotonic()
                    rows += result.rows
                    rows_left -= result.rows
                    del remaining[result.task.chunk]
                    yield result
                else:
                    yield None
                if nodes.is_due():
                    elapsed = time.monotonic() - first_at
                    state = nodes.read_state(
                        idle_seconds=watchdog.idle_seconds,
                        rows_left=rows_left,
                        rows_per_second=rows / elapsed if first_at and elapsed > 1 else None,
                        worker_timeout_s=self._scale.worker_timeout_s,
                    )
                    if first_at:
                        self._request_nodes(rows_left)
                    reason = reason or self._find_replan_reason(state, placement)
                    if reason is not None:
                        pipeline.stop()
                    self._check_timeout(state, placement)
            if reason is not None:
                watchdog.kill_workers()
        finally:
            watchdog.close()
        return reason

    def _find_replan_reason(self, state: RunState, placement: Placement) -> str | None:
        plan_now = functools.partial(self._plan_for_current_nodes, state.rows_left)
        return replan.find_replan_reason(state, placement, plan_now)

    def _request_nodes(self, rows: int) -> None:
        """Request all nodes that the rows are worth, where it is known what may join.

        Only once workers are running: a worker that has not started yet leaves its node free, to be
        taken by the request.
        """
        if self._max_nodes is None:
            return
        with contextlib.suppress(ResourcesError):  # what is there fits, though that would not
            wanted = select_nodes(
                self._max_nodes, self._scale, self._chunk_bytes, rows, use_gpus=self._use_gpus
            )
            self._request.update(replan.find_missing_nodes(wanted, session.list_nodes()))

    def _replan(self) -> Generator[None, None, Placement]:
        """The placement for the nodes that are there after some have left or joined."""
        scale, chunk_bytes = self._scale, self._chunk_bytes
        try:
            return (
                yield from autoscaler.iter_until_fit(
                    self._plan,
                    lambda nodes: compute_first_bundles(
                        nodes, scale, chunk_bytes, use_gpus=self._use_gpus
                    ),
                    scale.resource_timeout_s,
                    self._interruption,
                    request=self._request,
                    under_way=True,
                )
            )
        except ResourcesError as error:  # of a run that is in progress
            raise RunFailed(f"{error}; finished chunks are kept") from error

    def _count_rows(self, tasks: dict[int, ChunkTask]) -> int:
        return sum(
            len(self._spec.plan.rows_of(task.chunk) if task.offsets is None else task.offsets)
            for task in tasks.values()
        )

    def _plan_for_current_nodes(self, rows: int) -> Placement | None:
        try:
            return self._limit_workers(self._plan(session.list_nodes()), rows)
        except ResourcesError:
            return None

    def _plan(self, nodes: Sequence[Node]) -> Placement:
        return plan_placement(nodes, self._scale, self._chunk_bytes, use_gpus=self._use_gpus)

    def _limit_workers(self, placement: Placement, rows: int) -> Placement:
        """As many workers as the rows need, unless the settings have their number."""
        return placement if self._scale.workers is not None else placement.limit_to_rows(rows)

    def _check_timeout(self, state: RunState, placement: Placement) -> None:
        self._timeout.check(
            state.idle_seconds,
            f"{format_count(placement.workers, 'worker')} of {placement.worker_cpus:g} CPU and "
            f"{placement.worker_gpus:g} GPU each",
        )


def _log_placement(placement: Placement) -> None:
    for reason in placement.reasons:
        log.emit("layout", reason)


@contextlib.contextmanager
def add_resume_hint(output: str, lease: Lease) -> Iterator[None]:
    """Unwrap Ray's errors, and add to an error or an interruption how to resume the run.

    When another driver has taken over, that is raised instead: it explains all other errors.
    """
    hint = f"finished chunks are kept in {output}; rerun the same command to resume"
    try:
        yield
    except Interrupted as error:
        raise Interrupted(f"{error}; {hint}") from None
    except ray.exceptions.RayError as error:  # may be an error of this package by class as well
        _check_lease(lease)
        cause = session.find_cause(error)
        if isinstance(cause, ImgclsError):
            raise type(cause)(f"{first_line(cause)}; {hint}") from error
        name = type(cause).__name__
        raise RunFailed(f"a worker failed: {name}: {first_line(cause)}; {hint}") from error
    except StorageError as error:
        _check_lease(lease)
        raise type(error)(f"{error}; {hint}") from error


def _check_lease(lease: Lease) -> None:
    with contextlib.suppress(StorageError):
        lease.check()
