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
from imgcls.execution.plan import RunIdentity, parse_plan
from imgcls.inference.incremental import ManifestComparison, SinceConfig, SinceRequest
from imgcls.inference.known_images import read_planned_rows
from imgcls.inference.nights import OutputSeries, PlannedRun, compute_next_sequence
from imgcls.log import tell
from imgcls.runs import layout
from imgcls.runs.schema import PREDICTION_COLUMNS

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class PredictJob:
    """A run to start or to resume.

    comparison: where the manifest's rows come from when the run is to be planned
    start_over: remove what the output holds, unless it is committed
    notes:      called when the run is planned; returns further entries of `_run.json`
    """

    output: str
    manifest: Manifest
    comparison: ManifestComparison | None = None
    build_run_entries: Callable[[], Mapping[str, Any]] = dict
    start_over: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class NightlyRequest:
    """What one `predict --since` asks for.

    settings: those that change results; see `Identity`
    """

    series: OutputSeries
    since: SinceConfig
    manifest: Manifest
    bundle_sha256: str
    settings: dict[str, Any]
    relabel: bool
    retry_failed: bool
    retry_errors: bool
    overwrite: bool

    def find_differences(self, stored: Mapping[str, Any]) -> list[str]:
        """How a stored run differs from this request, its rows apart."""
        identity = stored["identity"]
        own = RunIdentity(identity["manifest"], {"sha256": self.bundle_sha256}, self.settings)
        return own.find_differences(identity)

    def has_same_manifest(self, stored: Mapping[str, Any]) -> bool:
        """Whether a run was planned from this very manifest, read alike, to the same end."""
        since, planned = stored.get("since", {}), stored["identity"]["manifest"]
        listed = since.get("listed", planned["fingerprint"])
        alike = all(
            planned[name] == getattr(self.manifest, name)
            for name in ("path_column", "label_column", "root")
        )
        same = alike and bool(listed == self.manifest.fingerprint())
        return same and bool(since.get("relabel", False)) >= self.relabel

    def compare(self, output: str, but: str | None = None) -> ManifestComparison:
        """Compare the manifest with all runs but one, for a run in `output`."""
        return ManifestComparison(
            SinceRequest.resolve(
                self.manifest,
                self.since,
                output=output,
                bundle_sha256=self.bundle_sha256,
                relabel=self.relabel,
                retry_failed=self.retry_failed,
                but=but,
            )
        )


def label_new(
    request: NightlyRequest, label: Callable[[PredictJob], T], committed: Callable[[str, int], T]
) -> T:
    """Label what a manifest has that earlier runs lack; returns the newest run's result.

    label:     executes a job and commits it
    committed: called with a run's folder and its number of rows; the result of a run that was
               committed before
    Raises OutputError when the output holds another run and names no date.
    """
    series = request.series
    stored = [] if request.overwrite else series.load_runs()
    if not stored:
        return _label_new_rows(request, series.resolve_folder(1), label)
    place, described = stored[-1]
    if layout.is_committed(place):
        if request.retry_errors:
            return label(
                PredictJob(place, load_planned_manifest(place, described, request.manifest))
            )
        same = _find_committed(request, stored)
        if same is not None:
            return committed(*same)
        return _label_in_next_folder(request, place, described, None, label, committed)
    if not PlannedRun(place, described).has_rows:
        # a start-over that was broken off: there is no plan to resume
        return _label_new_rows(request, place, label, start_over=True)
    result = _resume_run(request, place, described, label)
    if result is not None and (request.retry_errors or request.has_same_manifest(described)):
        return result
    return _label_in_next_folder(request, place, described, result, label, committed)


def _find_committed(
    request: NightlyRequest, stored: Sequence[tuple[str, Mapping[str, Any]]]
) -> tuple[str, int] | None:
    """Folder and rows of a committed run that was planned from this very request, if any."""
    if request.retry_failed:
        return None
    for place, described in stored:
        same = request.has_same_manifest(described) and not request.find_differences(described)
        if same and layout.is_committed(place):
            rows = parse_plan(described).rows
            tell("committed", f"{place}: committed before, {rows:,} rows; nothing to do")
            return place, rows
    return None


def _resume_run(
    request: NightlyRequest,
    place: str,
    described: Mapping[str, Any],
    label: Callable[[PredictJob], T],
) -> T | None:
    """Finish an unfinished run with its own rows; None where it is left as it is."""
    job = PredictJob(place, load_planned_manifest(place, described, request.manifest))
    if request.retry_errors:
        return label(job)
    if request.series.has_date and (differences := request.find_differences(described)):
        lines = "; ".join(differences)
        tell("note", f"{place} is left unfinished, it was started with other settings: {lines}")
        return None
    try:
        return label(job)
    except TooManyErrors as error:
        if request.has_same_manifest(described) or not request.series.has_date:
            raise
        tell("note", f"{error}. It is left as it is: the manifest lists other rows by now")
        return None


def _label_in_next_folder(
    request: NightlyRequest,
    place: str,
    described: Mapping[str, Any],
    result: T | None,
    label: Callable[[PredictJob], T],
    committed: Callable[[str, int], T],
) -> T:
    """Label what is new since the newest run of the date, in a further folder.

    place, described: of that run; result: its own, if it was labeled just now
    """
    with request.compare(place) as comparison:
        comparison.log_summary()
        if not comparison.rows and not comparison.deleted:
            if result is None and layout.is_committed(place):
                result = committed(place, parse_plan(described).rows)
            elif result is None and comparison.past_runs.committed:
                newest = comparison.past_runs.committed[-1]  # `place` is left unfinished
                result = committed(newest.url, newest.rows)
            if result is not None:
                tell("committed", f"{place}: nothing new since; no further run")
                return result
        return label(_build_job(request, request.series.find_next_folder(place), comparison))


def _label_new_rows(
    request: NightlyRequest,
    output: str,
    label: Callable[[PredictJob], T],
    *,
    start_over: bool = False,
) -> T:
    with request.compare(output, but=output) as comparison:
        comparison.log_summary()
        return label(
            dataclasses.replace(_build_job(request, output, comparison), start_over=start_over)
        )


def _build_job(request: NightlyRequest, output: str, comparison: ManifestComparison) -> PredictJob:
    def notes() -> Mapping[str, Any]:
        return {
            "sequence": compute_next_sequence(output, comparison.past_runs),
            "since": {
                "listed": request.manifest.fingerprint(),
                "relabel": request.relabel,
                "retry_failed": request.retry_failed,
                **comparison.describe(),
            },
        }

    return PredictJob(output, comparison.manifest, comparison, notes)


def load_planned_manifest(output: str, described: Mapping[str, Any], listed: Manifest) -> Manifest:
    """The rows of a run as it was planned: from its shards, or from its table once it is committed.

    listed: has the columns, where the run has no row
    """
    run = PlannedRun(output, dict(described))
    identity, schema, files = described["identity"]["manifest"], listed.schema, run.files
    names: list[str] | None = None
    if files:
        with filesystem.open_read(files[0]) as stream:
            stored = pq.ParquetFile(stream, pre_buffer=False).schema_arrow.remove_metadata()
        names = [name for name in stored.names if name not in PREDICTION_COLUMNS]
        schema = pa.schema([stored.field(name) for name in names])

    def batches() -> Iterator[pa.RecordBatch]:
        for table in read_planned_rows(run, names):
            yield from table.to_batches()

    return dataclasses.replace(
        listed,
        schema=schema,
        path_column=identity["path_column"],
        label_column=identity["label_column"],
        root=identity["root"],
        _read_batches=batches,
        _compute_fingerprint=lambda: str(identity["fingerprint"]),
    )
