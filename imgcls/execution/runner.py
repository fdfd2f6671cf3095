"""Work handed to the cluster until none is left, however the cluster changes meanwhile.

A pass is one pipeline, laid out for the machines that are there. Ray restarts the workers of a lost
machine wherever there is room; where there is none their chunks would wait for ever, and machines
that come would stand idle. So a pass is broken off, and the next one laid out anew, when nobody
goes on any more, or when what has come is worth a new start.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import ray

from imgcls.cluster import autoscaler, interrupts, session
from imgcls.cluster.autoscaler import WaitTimeout
from imgcls.cluster.interrupts import Interruption
from imgcls.cluster.session import Node
from imgcls.errors import (
    ImgclsError,
    Interrupted,
    ResourcesError,
    RunFailed,
    StorageError,
    first_line,
)
from imgcls.execution.messages import ChunkResult, ChunkTask, RunSpec
from imgcls.execution.placement import (
    Placement,
    ScaleConfig,
    compute_first_bundles,
    plan_placement,
    select_nodes,
)
from imgcls.log import tell
from imgcls.runs.lease import Lease

SETTLE_SECONDS = 15.0
"""What comes and goes is left alone for so long: machines seldom do so alone."""
MIN_SAVED_SECONDS = 60.0
"""A new start must save so much: it costs a worker's start, and the chunks under way."""
_POLL_SECONDS = 2.0


def wait_for_placement(
    scale: ScaleConfig, interruption: Interruption, chunk_bytes: int
) -> Placement:
    """The layout for the machines that are there; waits for the first where more may come.

    Raises ResourcesError when it does not fit and will not, or did not in
    `scale.resource_timeout_s`.
    """
    return autoscaler.wait_until_fit(
        lambda nodes: plan_placement(nodes, scale, chunk_bytes),
        lambda most: compute_first_bundles(most, scale, chunk_bytes),
        scale.resource_timeout_s,
        interruption,
    )


def find_missing_nodes(wanted: Sequence[Node], there: Sequence[Node]) -> list[dict[str, float]]:
    """Each machine that is wanted and not there, as what it has."""
    left = collections.Counter((node.cpus, node.gpus) for node in wanted)
    left.subtract((node.cpus, node.gpus) for node in there)
    return [
        {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        for (cpus, gpus), count in left.items()
        for _ in range(count)
    ]


@dataclass(frozen=True)
class RunState:
    """What decides whether a pass goes on.

    before, now:  the machines when the pass began, and now
    steady:       seconds since they last changed
    idle:         seconds since a worker was last seen to go on
    rows_left:    to be done
    rate:         rows per second in this pass; None before the first
    worker_timeout_s: after which a worker counts as hanging
    """

    nodes_before: Sequence[Node]
    nodes_now: Sequence[Node]
    stable_seconds: float
    idle_seconds: float
    rows_left: int
    rows_per_second: float | None
    worker_timeout_s: float


def find_replan_reason(
    it: RunState, layout: Placement, fit: Callable[[], Placement | None]
) -> str | None:
    """Why the pass should be broken off and laid out anew, if it should.

    fit: the layout for the machines that are there now; None when nothing fits
    """
    ids = {node.id for node in it.nodes_now}
    lost = sum(1 for node in it.nodes_before if node.id not in ids)
    if it.stable_seconds < SETTLE_SECONDS:
        return None
    if lost and it.idle_seconds > SETTLE_SECONDS:
        return f"{lost} of {len(it.nodes_before)} machines are gone, and no worker goes on"
    if it.rows_per_second is not None and it.idle_seconds > it.worker_timeout_s + SETTLE_SECONDS:
        # not within a chunk: that would be seen to by the watch
        return f"no worker has gone on for {it.idle_seconds:.0f} s"
    came = len(it.nodes_now) - (len(it.nodes_before) - lost)
    if not came or it.rows_per_second is None:
        return None
    fits = fit()
    if (
        fits is None
        or it.rows_left / it.rows_per_second * fits.compute_time_saved(layout) < MIN_SAVED_SECONDS
    ):
        return None
    before = layout.summary if fits.worker_gpus else layout.workers
    return f"{came} machines have come: {fits.summary} instead of {before}"


class ChunkRunner:
    """The passes over a run's work.

    wider: the layout for the machines that are there, with what the run has chosen for itself
    """

    def __init__(
        self,
        spec: RunSpec,
        scale: ScaleConfig,
        interruption: Interruption,
        wider: Callable[[Placement], Placement],
        chunk_bytes: int,
    ) -> None:
        self._spec = spec
        self._scale = scale
        self._interruption = interruption
        self._wider = wider
        self._chunk_bytes = chunk_bytes
        self._patience = WaitTimeout(scale.resource_timeout_s)
        self._most = None if session.is_private_session() else autoscaler.find_max_nodes()

    def run(self, layout: Placement, todo: Sequence[ChunkTask]) -> Iterator[ChunkResult | None]:
        """Each chunk once it is durable, and None at times when nothing has come.

        Raises RunFailed when no worker goes on for `scale.resource_timeout_s`.
        """
        left = {work.chunk: work for work in todo}
        try:
            while left:
                layout = self._limit_workers(layout, self._count_rows(left))
                why = yield from self._run_pass(layout, left)
                if not left:
                    return
                if why is None:
                    raise RunFailed(f"{len(left):,} chunks were handed out and have not come back")
                tell("layout", f"{why}: laid out anew")
                layout = self._wider((yield from self._replan()))
                for reason in layout.reasons:
                    tell("layout", reason)
        finally:
            autoscaler.cancel_request()

    def _request_nodes(self, rows: int) -> None:
        """Ask for all machines that so many rows are worth, where it is known what may come.

        Once the workers are at work: one that is not there yet leaves its machine to be taken for
        what was asked for.
        """
        if self._most is None:
            return
        with contextlib.suppress(ResourcesError):  # what is there fits, though that would not
            wanted = select_nodes(self._most, self._scale, self._chunk_bytes, rows)
            autoscaler.update_request(find_missing_nodes(wanted, session.list_nodes()))

    def _replan(self) -> Generator[None, None, Placement]:
        """The layout for the machines that are there after some were lost, or have come."""
        scale, chunk_bytes = self._scale, self._chunk_bytes
        try:
            return (
                yield from autoscaler.iter_until_fit(
                    lambda nodes: plan_placement(nodes, scale, chunk_bytes),
                    lambda most: compute_first_bundles(most, scale, chunk_bytes),
                    scale.resource_timeout_s,
                    self._interruption,
                    under_way=True,
                )
            )
        except ResourcesError as error:  # of a run that is under way
            raise RunFailed(f"{error}; what is done is kept") from error

    def _count_rows(self, left: dict[int, ChunkTask]) -> int:
        return sum(self._count_task_rows(work) for work in left.values())

    def _run_pass(
        self, layout: Placement, left: dict[int, ChunkTask]
    ) -> Generator[ChunkResult | None, None, str | None]:
        """One pass; returns why it was broken off, if it was."""
        # Ray Data takes half a second to import: only where there is work
        from imgcls.execution.pipeline import Pipeline
        from imgcls.execution.watchdog import Watchdog

        spec = replace(self._spec, session=secrets.token_hex(8))
        watch = Watchdog(spec.session, self._scale.worker_timeout_s)
        there = _NodeMonitor()
        pipeline = Pipeline(spec, layout, list(left.values()))
        why: str | None = None
        rows_left = self._count_rows(left)
        rows, first = 0, 0.0
        try:
            for receipt in interrupts.iterate_in_thread(pipeline.run(), self._interruption):
                for line in watch.check():
                    tell("watch", line)
                if receipt is not None and receipt.task.chunk in left:
                    watch.record_progress()
                    first = first or time.monotonic()
                    rows += receipt.rows
                    rows_left -= receipt.rows
                    del left[receipt.task.chunk]
                    yield receipt
                else:
                    yield None
                if there.is_due():
                    if first:
                        self._request_nodes(rows_left)
                    spent = time.monotonic() - first
                    it = there.read_state(
                        worker_timeout_s=self._scale.worker_timeout_s,
                        idle=watch.idle_seconds,
                        rows_left=rows_left,
                        rate=rows / spent if first and spent > 1 else None,
                    )
                    why = why or find_replan_reason(
                        it, layout, functools.partial(self._plan_for_current_nodes, rows_left)
                    )
                    if why is not None:
                        pipeline.stop()
                    self._check_timeout(it, layout)
            if why is not None:
                watch.kill_workers()
        finally:
            watch.close()
        return why

    def _count_task_rows(self, work: ChunkTask) -> int:
        if work.offsets is not None:
            return len(work.offsets)
        return len(self._spec.plan.rows_of(work.chunk))

    def _plan_for_current_nodes(self, rows: int) -> Placement | None:
        try:
            return self._limit_workers(
                plan_placement(session.list_nodes(), self._scale, self._chunk_bytes), rows
            )
        except ResourcesError:
            return None

    def _limit_workers(self, layout: Placement, rows: int) -> Placement:
        """For so many rows, unless the number of workers was asked for."""
        return layout if self._scale.workers is not None else layout.limit_to_rows(rows)

    def _check_timeout(self, it: RunState, layout: Placement) -> None:
        self._patience.check(
            it.idle_seconds,
            f"{layout.workers} workers of {layout.worker_cpus:g} CPU and {layout.worker_gpus:g} "
            "GPU each",
        )


class _NodeMonitor:
    """The machines of the cluster, looked at now and then."""

    def __init__(self) -> None:
        self._before = self._now = session.list_nodes()
        self._changed = self._looked = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time to look again."""
        return time.monotonic() - self._looked > _POLL_SECONDS

    def read_state(
        self, *, idle: float, rows_left: int, rate: float | None, worker_timeout_s: float
    ) -> RunState:
        self._looked = time.monotonic()
        now = session.list_nodes()
        if {node.id for node in now} != {node.id for node in self._now}:
            self._changed = self._looked
        self._now = now
        steady = self._looked - self._changed
        return RunState(self._before, now, steady, idle, rows_left, rate, worker_timeout_s)


@contextlib.contextmanager
def add_resume_hint(output: str, lease: Lease) -> Iterator[None]:
    """Turn what Ray wraps around an error, and an interruption, into what the user must know.

    What goes wrong when another driver has taken over is of no account: that is said instead.
    """
    again = f"what is done is kept in {output}; run the same command again to go on from there"
    try:
        yield
    except Interrupted as error:
        raise Interrupted(f"{error}; {again}") from None
    except ray.exceptions.RayError as error:  # which may be an error of ours by class as well
        _check_lease(lease)
        cause = session.find_cause(error)
        if isinstance(cause, ImgclsError):
            raise type(cause)(f"{first_line(cause)}; {again}") from error
        name = type(cause).__name__
        raise RunFailed(f"a worker failed: {name}: {first_line(cause)}; {again}") from error
    except StorageError as error:
        _check_lease(lease)
        raise type(error)(f"{error}; {again}") from error


def _check_lease(lease: Lease) -> None:
    with contextlib.suppress(StorageError):
        lease.check()
