"""What `predict --since` does each time it is called: finish what was started, label what is new.

The same command may run any number of times a night, after a kill, and for an older date. An
unfinished run is resumed with the rows of its own plan, whatever the manifest lists by now. What
the manifest lists beyond that goes into a further folder next to it (`date=2026-11-27.2`), and a
manifest that was labeled already is recognized. How a run is executed is left to the caller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.data import filesystem
from imgcls.data.manifest import Manifest
from imgcls.errors import TooManyErrors
from imgcls.execution.plan import Identity, plan_of
from imgcls.inference.incremental import Comparison, SinceConfig, SinceRequest
from imgcls.inference.keys import planned_rows
from imgcls.inference.nights import PlannedRun, Series, next_sequence
from imgcls.log import tell
from imgcls.runs import layout

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A run to start or to resume.

    comparison: where the manifest's rows come from when the run is to be planned
    start_over: remove what the output holds, unless it is committed
    notes:      called when the run is planned; returns further entries of `_run.json`
    """

    output: str
    manifest: Manifest
    comparison: Comparison | None = None
    notes: Callable[[], Mapping[str, Any]] = dict
    start_over: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class NightRequest:
    """What one `predict --since` asks for.

    settings: those that change results; see `Identity`
    """

    series: Series
    since: SinceConfig
    listed: Manifest
    bundle_sha256: str
    settings: dict[str, Any]
    relabel: bool
    retry_failed: bool
    retry_errors: bool
    overwrite: bool

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """How a stored run differs from this request, its rows apart."""
        identity = stored["identity"]
        own = Identity(identity["manifest"], {"sha256": self.bundle_sha256}, self.settings)
        return own.differences(identity)

    def lists_the_same(self, stored: Mapping[str, Any]) -> bool:
        """Whether a run was planned from this very manifest, read alike, to the same end."""
        since, planned = stored.get("since", {}), stored["identity"]["manifest"]
        listed = since.get("listed", planned["fingerprint"])
        alike = all(
            planned[name] == getattr(self.listed, name)
            for name in ("path_column", "label_column", "root")
        )
        same = alike and bool(listed == self.listed.fingerprint())
        return same and bool(since.get("relabel", False)) >= self.relabel

    def compare(self, output: str, but: str | None = None) -> Comparison:
        """Compare the manifest with all runs but one, for a run in `output`."""
        return Comparison(
            SinceRequest.of(
                self.listed,
                self.since,
                output=output,
                bundle_sha256=self.bundle_sha256,
                relabel=self.relabel,
                retry_failed=self.retry_failed,
                but=but,
            )
        )


def label_new(
    request: NightRequest, label: Callable[[Job], T], committed: Callable[[str, int], T]
) -> T:
    """Label what a manifest has that earlier runs lack; returns the newest run's result.

    label:     executes a job and commits it
    committed: called with a run's folder and its number of rows; the result of a run that was
               committed before
    Raises OutputError when the output holds another run and names no date.
    """
    series = request.series
    stored = [] if request.overwrite else series.runs()
    if not stored:
        return _label_rest(request, series.place(1), label)
    place, described = stored[-1]
    if layout.is_committed(place):
        if request.retry_errors:
            return label(Job(place, planned_manifest(place, described, request.listed)))
        same = _committed_alike(request, stored)
        if same is not None:
            return committed(*same)
        return _label_further(request, place, described, None, label, committed)
    if not PlannedRun(place, described).has_rows:
        # a start-over that was broken off: there is no plan to resume
        return _label_rest(request, place, label, start_over=True)
    result = _resume(request, place, described, label)
    if result is not None and (request.retry_errors or request.lists_the_same(described)):
        return result
    return _label_further(request, place, described, result, label, committed)


def _committed_alike(
    request: NightRequest, stored: Sequence[tuple[str, Mapping[str, Any]]]
) -> tuple[str, int] | None:
    """Folder and rows of a committed run that was planned from this very request, if any."""
    if request.retry_failed:
        return None
    for place, described in stored:
        same = request.lists_the_same(described) and not request.differences(described)
        if same and layout.is_committed(place):
            rows = plan_of(described).rows
            tell("committed", f"{place}: committed before, {rows:,} rows; nothing to do")
            return place, rows
    return None


def _resume(
    request: NightRequest, place: str, described: Mapping[str, Any], label: Callable[[Job], T]
) -> T | None:
    """Finish an unfinished run with its own rows; None where it is left as it is."""
    job = Job(place, planned_manifest(place, described, request.listed))
    if request.retry_errors:
        return label(job)
    if request.series.dated and (differences := request.differences(described)):
        lines = "; ".join(differences)
        tell("note", f"{place} is left unfinished, it was started with other settings: {lines}")
        return None
    try:
        return label(job)
    except TooManyErrors as error:
        if request.lists_the_same(described) or not request.series.dated:
            raise
        tell("note", f"{error}. It is left as it is: the manifest lists other rows by now")
        return None


def _label_further(
    request: NightRequest,
    place: str,
    described: Mapping[str, Any],
    result: T | None,
    label: Callable[[Job], T],
    committed: Callable[[str, int], T],
) -> T:
    """Label what is new since the newest run of the date, in a further folder.

    place, described: of that run; result: its own, if it was labeled just now
    """
    with request.compare(place) as comparison:
        comparison.tell()
        if not comparison.rows and not comparison.deleted:
            if result is None and layout.is_committed(place):
                result = committed(place, plan_of(described).rows)
            elif result is None and comparison.nights.committed:
                newest = comparison.nights.committed[-1]  # `place` is left unfinished
                result = committed(newest.url, newest.rows)
            if result is not None:
                tell("committed", f"{place}: nothing new since; no further run")
                return result
        return label(_job(request, request.series.after(place), comparison))


def _label_rest(
    request: NightRequest, output: str, label: Callable[[Job], T], *, start_over: bool = False
) -> T:
    with request.compare(output, but=output) as comparison:
        comparison.tell()
        return label(dataclasses.replace(_job(request, output, comparison), start_over=start_over))


def _job(request: NightRequest, output: str, comparison: Comparison) -> Job:
    def notes() -> Mapping[str, Any]:
        return {
            "sequence": next_sequence(output, comparison.nights),
            "since": {
                "listed": request.listed.fingerprint(),
                "relabel": request.relabel,
                "retry_failed": request.retry_failed,
                **comparison.facts(),
            },
        }

    return Job(output, comparison.manifest, comparison, notes)


def planned_manifest(output: str, described: Mapping[str, Any], listed: Manifest) -> Manifest:
    """The rows of a run as it was planned: from its shards, or from its table once it is committed.

    listed: has the columns, where the run has no row
    """
    run = PlannedRun(output, dict(described))
    identity, schema, files = described["identity"]["manifest"], listed.schema, run.files
    names: list[str] | None = None
    if files:
        with filesystem.open_read(files[0]) as stream:
            stored = pq.ParquetFile(stream, pre_buffer=False).schema_arrow.remove_metadata()
        names = [name for name in stored.names if name not in layout.PREDICTION_COLUMNS]
        schema = pa.schema([stored.field(name) for name in names])

    def batches() -> Iterator[pa.RecordBatch]:
        for table in planned_rows(run, names):
            yield from table.to_batches()

    return dataclasses.replace(
        listed,
        schema=schema,
        path_column=identity["path_column"],
        label_column=identity["label_column"],
        root=identity["root"],
        _batches=batches,
        _digest=lambda: str(identity["fingerprint"]),
    )
