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

from imgcls.cluster import autoscaler, session
from imgcls.cluster.autoscaler import Patience
from imgcls.cluster.session import Interruption, Node
from imgcls.errors import ImgclsError, Interrupted, ResourcesError, RunFailed, StorageError
from imgcls.execution.messages import Done, RunSpec, Work
from imgcls.execution.placement import Layout, ScaleConfig, first_bundles, machines_for, plan_layout
from imgcls.log import tell
from imgcls.runs.lease import Lease

SETTLE_SECONDS = 15.0
"""What comes and goes is left alone for so long: machines seldom do so alone."""
WORTH_SECONDS = 60.0
"""A new start must save so much: it costs a worker's start, and the chunks under way."""
_LOOK_SECONDS = 2.0


def fitted(scale: ScaleConfig, interruption: Interruption, chunk_bytes: int) -> Layout:
    """The layout for the machines that are there; waits for the first where more may come.

    Raises ResourcesError when it does not fit and will not, or did not in `scale.wait_seconds`.
    """
    return autoscaler.fitted(
        lambda nodes: plan_layout(nodes, scale, chunk_bytes),
        lambda most: first_bundles(most, scale, chunk_bytes),
        scale.wait_seconds,
        interruption,
    )


def missing(wanted: Sequence[Node], there: Sequence[Node]) -> list[dict[str, float]]:
    """Each machine that is wanted and not there, as what it has."""
    left = collections.Counter((node.cpus, node.gpus) for node in wanted)
    left.subtract((node.cpus, node.gpus) for node in there)
    return [
        {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        for (cpus, gpus), count in left.items()
        for _ in range(count)
    ]


@dataclass(frozen=True)
class Situation:
    """What decides whether a pass goes on.

    before, now:  the machines when the pass began, and now
    steady:       seconds since they last changed
    idle:         seconds since a worker was last seen to go on
    rows_left:    to be done
    rate:         rows per second in this pass; None before the first
    hang_seconds: after which a worker counts as hanging
    """

    before: Sequence[Node]
    now: Sequence[Node]
    steady: float
    idle: float
    rows_left: int
    rate: float | None
    hang_seconds: float


def reason_to_replan(it: Situation, layout: Layout, fit: Callable[[], Layout | None]) -> str | None:
    """Why the pass should be broken off and laid out anew, if it should.

    fit: the layout for the machines that are there now; None when nothing fits
    """
    ids = {node.id for node in it.now}
    lost = sum(1 for node in it.before if node.id not in ids)
    if it.steady < SETTLE_SECONDS:
        return None
    if lost and it.idle > SETTLE_SECONDS:
        return f"{lost} of {len(it.before)} machines are gone, and no worker goes on"
    if it.rate is not None and it.idle > it.hang_seconds + SETTLE_SECONDS:
        # not within a chunk: that would be seen to by the watch
        return f"no worker has gone on for {it.idle:.0f} s"
    came = len(it.now) - (len(it.before) - lost)
    if not came or it.rate is None:
        return None
    fits = fit()
    if fits is None or it.rows_left / it.rate * fits.saves(layout) < WORTH_SECONDS:
        return None
    before = layout.size if fits.worker_gpus else layout.workers
    return f"{came} machines have come: {fits.size} instead of {before}"


class Passes:
    """The passes over a run's work.

    wider: the layout for the machines that are there, with what the run has chosen for itself
    """

    def __init__(
        self,
        spec: RunSpec,
        scale: ScaleConfig,
        interruption: Interruption,
        wider: Callable[[Layout], Layout],
        chunk_bytes: int,
    ) -> None:
        self._spec = spec
        self._scale = scale
        self._interruption = interruption
        self._wider = wider
        self._chunk_bytes = chunk_bytes
        self._patience = Patience(scale.wait_seconds)
        self._most = None if session.is_private() else autoscaler.most_nodes()

    def receipts(self, layout: Layout, todo: Sequence[Work]) -> Iterator[Done | None]:
        """Each chunk once it is durable, and None at times when nothing has come.

        Raises RunFailed when no worker goes on for `scale.wait_seconds`.
        """
        left = {work.chunk: work for work in todo}
        try:
            while left:
                layout = self._sized(layout, self._rows_of(left))
                why = yield from self._one(layout, left)
                if not left:
                    return
                if why is None:
                    raise RunFailed(f"{len(left):,} chunks were handed out and have not come back")
                tell("layout", f"{why}: laid out anew")
                layout = self._wider((yield from self._anew()))
                for reason in layout.reasons:
                    tell("layout", reason)
        finally:
            autoscaler.give_back()

    def _ask(self, rows: int) -> None:
        """Ask for all machines that so many rows are worth, where it is known what may come.

        Once the workers are at work: one that is not there yet leaves its machine to be taken for
        what was asked for.
        """
        if self._most is None:
            return
        with contextlib.suppress(ResourcesError):  # what is there fits, though that would not
            wanted = machines_for(self._most, self._scale, self._chunk_bytes, rows)
            autoscaler.keep_asking(missing(wanted, session.nodes()))

    def _anew(self) -> Generator[None, None, Layout]:
        """The layout for the machines that are there after some were lost, or have come."""
        scale, chunk_bytes = self._scale, self._chunk_bytes
        try:
            return (
                yield from autoscaler.fitting(
                    lambda nodes: plan_layout(nodes, scale, chunk_bytes),
                    lambda most: first_bundles(most, scale, chunk_bytes),
                    scale.wait_seconds,
                    self._interruption,
                    under_way=True,
                )
            )
        except ResourcesError as error:  # of a run that is under way
            raise RunFailed(f"{error}; what is done is kept") from error

    def _rows_of(self, left: dict[int, Work]) -> int:
        return sum(self._rows(work) for work in left.values())

    def _one(
        self, layout: Layout, left: dict[int, Work]
    ) -> Generator[Done | None, None, str | None]:
        """One pass; returns why it was broken off, if it was."""
        # Ray Data takes half a second to import: only where there is work
        from imgcls.execution.pipeline import Pipeline
        from imgcls.execution.watchdog import Watch

        spec = replace(self._spec, session=secrets.token_hex(8))
        watch = Watch(spec.session, self._scale.hang_seconds)
        there = _Machines()
        pipeline = Pipeline(spec, layout, list(left.values()))
        why: str | None = None
        rows_left = self._rows_of(left)
        rows, first = 0, 0.0
        try:
            for receipt in session.in_background(pipeline.receipts(), self._interruption):
                for line in watch.look():
                    tell("watch", line)
                if receipt is not None and receipt.work.chunk in left:
                    watch.note_receipt()
                    first = first or time.monotonic()
                    rows += receipt.rows
                    rows_left -= receipt.rows
                    del left[receipt.work.chunk]
                    yield receipt
                else:
                    yield None
                if there.due():
                    if first:
                        self._ask(rows_left)
                    spent = time.monotonic() - first
                    it = there.situation(
                        hang_seconds=self._scale.hang_seconds,
                        idle=watch.idle_seconds,
                        rows_left=rows_left,
                        rate=rows / spent if first and spent > 1 else None,
                    )
                    why = why or reason_to_replan(
                        it, layout, functools.partial(self._fit, rows_left)
                    )
                    if why is not None:
                        pipeline.stop()
                    self._check_waiting(it, layout)
            if why is not None:
                watch.end_workers()
        finally:
            watch.close()
        return why

    def _rows(self, work: Work) -> int:
        if work.offsets is not None:
            return len(work.offsets)
        return len(self._spec.plan.rows_of(work.chunk))

    def _fit(self, rows: int) -> Layout | None:
        try:
            return self._sized(plan_layout(session.nodes(), self._scale, self._chunk_bytes), rows)
        except ResourcesError:
            return None

    def _sized(self, layout: Layout, rows: int) -> Layout:
        """For so many rows, unless the number of workers was asked for."""
        return layout if self._scale.workers is not None else layout.for_rows(rows)

    def _check_waiting(self, it: Situation, layout: Layout) -> None:
        self._patience.spend(
            it.idle,
            f"{layout.workers} workers of {layout.worker_cpus:g} CPU and {layout.worker_gpus:g} "
            "GPU each",
        )


class _Machines:
    """The machines of the cluster, looked at now and then."""

    def __init__(self) -> None:
        self._before = self._now = session.nodes()
        self._changed = self._looked = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to look again."""
        return time.monotonic() - self._looked > _LOOK_SECONDS

    def situation(
        self, *, idle: float, rows_left: int, rate: float | None, hang_seconds: float
    ) -> Situation:
        self._looked = time.monotonic()
        now = session.nodes()
        if {node.id for node in now} != {node.id for node in self._now}:
            self._changed = self._looked
        self._now = now
        steady = self._looked - self._changed
        return Situation(self._before, now, steady, idle, rows_left, rate, hang_seconds)


@contextlib.contextmanager
def resumable(output: str, lease: Lease) -> Iterator[None]:
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
        cause = session.cause_of(error)
        if isinstance(cause, ImgclsError):
            raise type(cause)(f"{_first_line(cause)}; {again}") from error
        name = type(cause).__name__
        raise RunFailed(f"a worker failed: {name}: {_first_line(cause)}; {again}") from error
    except StorageError as error:
        _check_lease(lease)
        raise type(error)(f"{error}; {again}") from error


def _check_lease(lease: Lease) -> None:
    with contextlib.suppress(StorageError):
        lease.check()


def _first_line(error: BaseException) -> str:
    """An error's own words, without the advice that Ray adds below them."""
    return (str(error).strip() or "no message").splitlines()[0]
