"""The steps of `predict --since`: finish the unfinished run, then label what is new.

The same command may run any number of times a night, after a kill, and for an older date. An
unfinished run is resumed with the rows of its own plan, even if the manifest has changed. The other
rows of the manifest go into a further folder next to it (`date=2026-11-27.2`), and a manifest that
was labeled before is recognized. The caller executes the runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls import log
from imgcls.data.manifests.label_columns import read_label_columns
from imgcls.data.manifests.listing_record import read_listing_time
from imgcls.data.manifests.manifest import Manifest
from imgcls.data.manifests.options import read_csv_options
from imgcls.data.storage import filesystem
from imgcls.errors import TooManyErrors
from imgcls.execution.plan import RunIdentity, parse_plan
from imgcls.formatting import format_count
from imgcls.inference.config import SinceConfig
from imgcls.inference.incremental import ManifestComparison, SinceRequest
from imgcls.inference.known_images import ROWS_WITHOUT_PATH, read_planned_rows
from imgcls.inference.nights import OutputSeries, PlannedRun, compute_next_sequence
from imgcls.models.bundle import TaskName
from imgcls.runs import layout
from imgcls.runs.schema import list_prediction_columns

ResultT = TypeVar("ResultT")


@dataclasses.dataclass(frozen=True, eq=False)
class PredictJob:
    """A run to start or to resume.

    comparison:        source of the manifest's rows when the run is planned
    build_run_entries: called when the run is planned; returns further entries of `_run.json`
    start_over:        remove the run in the output, unless it is committed
    """

    output: str
    manifest: Manifest
    comparison: ManifestComparison | None = None
    build_run_entries: Callable[[], Mapping[str, Any]] = dict
    start_over: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class NightlyRequest:
    """The request of one `predict --since`.

    settings: those that change results; see `RunIdentity`
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
    task: TaskName = "single_label"

    def find_differences(self, stored: Mapping[str, Any]) -> list[str]:
        """The differences between a stored run and this request, except for the rows."""
        identity = stored["identity"]
        own = RunIdentity(identity["manifest"], {"sha256": self.bundle_sha256}, self.settings)
        return own.find_differences(identity)

    def has_same_manifest(self, stored: Mapping[str, Any]) -> bool:
        """Whether a run was planned from this manifest, with the same columns and `relabel`.

        The columns include those of the versions, which decide which rows have changed.
        """
        since, planned = stored.get("since", {}), stored["identity"]["manifest"]
        listed = since.get("listed", planned["fingerprint"])
        is_read_alike = (
            all(
                planned[name] == getattr(self.manifest, name)
                for name in ("path_column", "label_column", "root")
            )
            and read_label_columns(planned) == self.manifest.label_columns
            and tuple(planned.get("drop_columns", ())) == self.manifest.dropped
            and read_csv_options(stored, self.manifest.format) == self.manifest.csv_options
        )
        is_read_alike = is_read_alike and _read_version_columns(stored) == self.since.version
        is_same = is_read_alike and bool(listed == self.manifest.fingerprint())
        return is_same and bool(since.get("relabel", False)) >= self.relabel

    def is_old_manifest(self, stored: Mapping[str, Any]) -> bool:
        """Whether the very listing of an older run is given again, instead of one that equals it.

        Of one that equals it, images may have been deleted in a later run, and be back.
        """
        is_listed_now = not self.manifest.files
        listed_at = stored.get("since", {}).get("listed_at")
        return not is_listed_now and listed_at == read_listing_time(self.manifest)

    def compare(self, output: str, exclude: str | None = None) -> ManifestComparison:
        """Compare the manifest with all earlier runs except `exclude`, for a run in `output`."""
        return ManifestComparison(
            SinceRequest.resolve(
                self.manifest,
                self.since,
                output=output,
                bundle_sha256=self.bundle_sha256,
                relabel=self.relabel,
                retry_failed=self.retry_failed,
                exclude=exclude,
                has_predictions=self.settings.get("has_predictions", True),
                task=self.task,
            )
        )


def _read_version_columns(stored: Mapping[str, Any]) -> list[str]:
    """The version columns that a run was planned with; empty for the default ones."""
    since = stored.get("since", {})
    if "version" not in since:  # of an earlier version, which stored its configuration alone
        since = stored.get("provenance", {}).get("config", {}).get("since") or {}
    return list(since.get("version", ()))


def label_new(
    request: NightlyRequest,
    label: Callable[[PredictJob], ResultT],
    committed: Callable[[str, int], ResultT],
) -> ResultT:
    """Label what a manifest has that earlier runs lack; returns the newest run's result.

    label:     executes a job and commits it
    committed: called with folder and number of rows of a run that was committed before; makes the
               result
    Raises OutputError when the output holds another run and contains no {date}.
    """
    series = request.series
    stored = [] if request.overwrite else series.load_runs()
    if not stored:
        return _label_new_rows(request, series.resolve_folder(1), label)
    folder, run_record = stored[-1]
    if layout.is_committed(folder):
        if request.retry_errors:
            return label(
                PredictJob(folder, load_planned_manifest(folder, run_record, request.manifest))
            )
        same = _find_committed(request, stored)
        if same is not None:
            return committed(*same)
        return _label_in_next_folder(request, folder, run_record, None, label, committed)
    if not PlannedRun(folder, run_record).has_rows:
        # a start-over that was interrupted: there is no plan to resume
        return _label_new_rows(request, folder, label, start_over=True)
    result = _resume_run(request, folder, run_record, label)
    if result is not None and (request.retry_errors or request.has_same_manifest(run_record)):
        return result
    return _label_in_next_folder(request, folder, run_record, result, label, committed)


def _find_committed(
    request: NightlyRequest, stored: Sequence[tuple[str, Mapping[str, Any]]]
) -> tuple[str, int] | None:
    """Folder and rows of a committed run that was planned from the same request, if any."""
    if request.retry_failed:
        return None
    newest = stored[-1][0]
    for folder, run_record in stored:
        same = request.has_same_manifest(run_record) and not request.find_differences(run_record)
        same = same and (folder == newest or request.is_old_manifest(run_record))
        if same and layout.is_committed(folder):
            rows = parse_plan(run_record).rows
            log.emit(
                "committed",
                f"{folder}: committed before, {format_count(rows, 'row')}; nothing to do",
            )
            return folder, rows
    return None


def _resume_run(
    request: NightlyRequest,
    folder: str,
    run_record: Mapping[str, Any],
    label: Callable[[PredictJob], ResultT],
) -> ResultT | None:
    """Finish an unfinished run with its own rows; None when it is left unfinished."""
    job = PredictJob(folder, load_planned_manifest(folder, run_record, request.manifest))
    if request.retry_errors:
        return label(job)
    if request.series.has_date and (differences := request.find_differences(run_record)):
        lines = "; ".join(differences)
        log.emit(
            "note", f"{folder} is left unfinished: it was started with other settings: {lines}"
        )
        return None
    try:
        return label(job)
    except TooManyErrors as error:
        if request.has_same_manifest(run_record) or not request.series.has_date:
            raise
        log.emit("note", f"{error}. It is left unfinished: the manifest has changed")
        return None


def _label_in_next_folder(
    request: NightlyRequest,
    folder: str,
    run_record: Mapping[str, Any],
    result: ResultT | None,
    label: Callable[[PredictJob], ResultT],
    committed: Callable[[str, int], ResultT],
) -> ResultT:
    """Label what is new since the newest run of the date, in a further folder.

    folder, run_record: of that run
    result:             its result, if it was labeled just now
    """
    with request.compare(folder) as comparison:
        comparison.log_summary()
        if not comparison.rows and not comparison.deleted:
            if result is None and layout.is_committed(folder):
                result = committed(folder, parse_plan(run_record).rows)
            elif result is None and comparison.past_runs.committed:
                newest = comparison.past_runs.committed[-1]  # `folder` is left unfinished
                result = committed(newest.url, newest.rows)
            if result is not None:
                log.emit("committed", f"{folder}: nothing new; no further run")
                return result
        return label(_build_job(request, request.series.find_next_folder(folder), comparison))


def _label_new_rows(
    request: NightlyRequest,
    output: str,
    label: Callable[[PredictJob], ResultT],
    *,
    start_over: bool = False,
) -> ResultT:
    with request.compare(output, exclude=output) as comparison:
        comparison.log_summary()
        return label(
            dataclasses.replace(_build_job(request, output, comparison), start_over=start_over)
        )


def _build_job(request: NightlyRequest, output: str, comparison: ManifestComparison) -> PredictJob:
    def notes() -> Mapping[str, Any]:
        return {
            "sequence": compute_next_sequence(output, comparison.past_runs),
            ROWS_WITHOUT_PATH: comparison.rows_without_path,
            "since": {
                "listed": request.manifest.fingerprint(),
                "listed_at": read_listing_time(request.manifest),
                "version": list(request.since.version),
                "relabel": request.relabel,
                "retry_failed": request.retry_failed,
                **comparison.describe(),
            },
        }

    return PredictJob(output, comparison.manifest, comparison, notes)


def load_planned_manifest(
    output: str, run_record: Mapping[str, Any], manifest: Manifest
) -> Manifest:
    """The rows of a run as planned: from its shards, or from its table once it is committed.

    manifest: has the columns, if the run has no rows
    """
    run = PlannedRun(output, dict(run_record))
    identity, schema, files = run_record["identity"]["manifest"], manifest.schema, run.files
    names: list[str] | None = None
    if files:
        with filesystem.open_read(files[0]) as stream:
            stored = pq.ParquetFile(stream, pre_buffer=False).schema_arrow.remove_metadata()
        added = list_prediction_columns(stored)
        names = [name for name in stored.names if name not in added]
        schema = pa.schema([stored.field(name) for name in names])

    def batches() -> Iterator[pa.RecordBatch]:
        for table in read_planned_rows(run, names):
            yield from table.to_batches()

    return dataclasses.replace(
        manifest,
        schema=schema,
        path_column=identity["path_column"],
        label_column=identity["label_column"],
        label_columns=read_label_columns(identity),
        root=identity["root"],
        version=identity.get("version"),
        dropped=tuple(identity.get("drop_columns", ())),
        csv_options=read_csv_options(run_record, manifest.format),
        _read_batches=batches,
        _compute_fingerprint=lambda: str(identity["fingerprint"]),
    )
