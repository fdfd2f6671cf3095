"""Incremental runs: the rows of a manifest that are new, changed, or failed in earlier runs.

The manifest is compared with earlier runs in tables on disk, so memory does not grow with either.
Rows keep the manifest's order and types, and the run over them is a run like any other. Images that
are known to be broken are not tried again, and images that a full listing lacks are recorded as
deleted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from imgcls import log
from imgcls.data.formats import has_image_suffix
from imgcls.data.manifests.listing_record import find_listed_folder
from imgcls.data.manifests.manifest import Manifest, resolve_paths
from imgcls.data.storage import filesystem
from imgcls.errors import ManifestError, OutputError, StorageMissing
from imgcls.formatting import format_count, format_counts
from imgcls.inference.config import SinceConfig
from imgcls.inference.known_images import (
    DELETED,
    FAILED_BEFORE,
    KNOWN_BAD,
    ROWS_WITHOUT_PATH,
    TRANSIENT_STATUSES,
    KnownImages,
    find_path_column,
    get_since_table_url,
    is_version_type,
    rank_runs,
    read_planned_rows,
    read_since_table,
    take_rows,
)
from imgcls.inference.nights import PastRuns, find_past_runs
from imgcls.models.bundle import TaskName
from imgcls.runs import layout
from imgcls.runs.committed import CommittedRun, iter_tables

DEFAULT_VERSION_COLUMNS = ("etag", "size", "mtime", "version")
"""Columns whose change means another image, if both manifest and earlier runs have them."""


@dataclasses.dataclass(frozen=True, eq=False)
class SinceRequest:
    """A manifest, and the earlier runs that it is compared with.

    version_columns: columns whose change means another image
    is_explicit:     whether the user set them; a row that lacks one then counts as changed
    """

    manifest: Manifest
    past_runs: PastRuns
    version_columns: tuple[str, ...]
    is_explicit: bool
    bundle_sha256: str
    relabel: bool
    retry_failed: bool

    @classmethod
    def resolve(
        cls,
        manifest: Manifest,
        config: SinceConfig,
        *,
        output: str,
        bundle_sha256: str,
        relabel: bool,
        retry_failed: bool,
        exclude: str | None,
        has_predictions: bool = True,
        task: TaskName = "single_label",
    ) -> SinceRequest:
        """Find the earlier runs and the columns to compare.

        output:       of the new run; there may be no earlier run only if it is within config.path
        relabel:      also select rows that another bundle has labeled
        retry_failed: also select broken images that have not changed
        exclude:      folder of a run that does not count as an earlier one
        has_predictions: false to compare with runs of embeddings alone; others do not count
        task:         of the bundle
        Raises OutputError when there is no earlier run, RequestError when an earlier run has
        predictions of another task, ManifestError when a version column is missing.
        """
        past_runs = find_past_runs(config.path, exclude=exclude).select(
            has_predictions=has_predictions
        )
        if has_predictions:
            past_runs.check_task(f"since {config.path}", task)
        runs = past_runs.committed
        if not runs:
            since = filesystem.absolute(config.path)
            if not filesystem.absolute(output).startswith(since.rstrip("/") + "/"):
                raise OutputError(
                    f"since {config.path}: holds no committed run. Pass the output of `imgcls "
                    "predict`, a folder of such outputs, or, for a first run, the parent folder of "
                    "--output"
                )
            log.emit("since", f"no committed run in {config.path} yet: all rows are new")
        others = sum(run.bundle_sha256 != bundle_sha256 for run in runs)
        if others and not relabel:
            log.emit(
                "note",
                f"{others:,} of {format_count(len(runs), 'earlier run')} used another bundle; "
                "their rows are kept. Set --relabel to label them again",
            )
        return cls(
            manifest,
            past_runs,
            tuple(_find_version_columns(manifest, config, runs)),
            bool(config.version),
            bundle_sha256,
            relabel,
            retry_failed,
        )

    def compute_digest(self) -> str:
        """A fingerprint of the manifest and of the earlier runs."""
        digest = hashlib.blake2b(digest_size=16)
        parts = [self.manifest.fingerprint(), *self.version_columns]
        parts += [self.bundle_sha256 if self.relabel else "", "retry" * self.retry_failed]
        runs = self.past_runs.committed
        for text in (
            *parts,
            *(run.success_record["run_id"] + run.success_record["committed"] for run in runs),
        ):
            digest.update(f"{len(text)}:{text}".encode())
        return digest.hexdigest()


class ManifestComparison:
    """A manifest compared with earlier runs: the rows to label, and why.

    manifest: the rows to label, in the order of the listed manifest
    counts:   rows by reason: new, changed, failed before, of another bundle
    rows:     number of rows to label
    deleted:  number of images of earlier runs that a full listing lacks
    rows_without_path: number of rows of the listed manifest that have none
    """

    def __init__(self, request: SinceRequest) -> None:
        self._request = request
        self._source = find_listed_folder(request.manifest)
        self._folder = tempfile.TemporaryDirectory(prefix="imgcls-since-")
        try:
            self._known = KnownImages(
                self._folder.name, request.version_columns, nulls=request.is_explicit
            )
            self._load_known_images()
            self._classify_rows()
        except BaseException:
            self._folder.cleanup()
            raise
        self.counts = self._known.read_counts("SELECT why, count(*) FROM todo GROUP BY why")
        self._unchanged = self.counts.pop("", 0)
        codes = self._known.read_counts(
            "SELECT status, count(*) FROM todo WHERE why = 'known bad' GROUP BY status"
        )
        self.known_bad = {self._known.statuses[code]: count for code, count in codes.items()}
        self.counts.pop("known bad", None)
        self.rows = sum(self.counts.values())
        self._deleted = pa.concat_tables(
            [_build_path_table(pa.chunked_array([[]], pa.string()), "/"), *self._find_deleted()]
        )
        self.deleted = self._deleted.num_rows
        counts = self._known.read_counts("SELECT place IS NULL, count(*) FROM listed GROUP BY 1")
        self.rows_without_path = counts.get(True, 0)
        self.manifest = dataclasses.replace(
            request.manifest,
            _read_batches=self._read_new_rows,
            _compute_fingerprint=request.compute_digest,
        )

    @property
    def past_runs(self) -> PastRuns:
        """The earlier runs."""
        return self._request.past_runs

    def __enter__(self) -> ManifestComparison:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the tables; nothing can be read from the comparison afterwards."""
        self._known.db.close()
        self._folder.cleanup()

    def log_summary(self) -> None:
        """Log the number of rows by reason."""
        reasons = format_counts(dict(sorted(self.counts.items())), "nothing new")
        line = f"{reasons}; {format_count(self._unchanged, 'row')} unchanged"
        if self.known_bad:
            bad = format_counts(dict(sorted(self.known_bad.items())))
            line += f"; broken and unchanged, not tried again: {bad} (--retry-failed)"
        if self.deleted:
            line += f"; {self.deleted:,} deleted"
        log.emit("since", line, **self.describe())

    def describe(self) -> dict[str, Any]:
        """Entries of `_run.json`: rows by reason, known bad images by status, deleted images."""
        return {
            "rows": self.counts,
            KNOWN_BAD: self.known_bad,
            DELETED: self.deleted,
        }

    def write_tables(self, output: str) -> None:
        """Write the tables of `_since/` into an output folder."""
        folder = filesystem.join(output, layout.SINCE_FOLDER)
        filesystem.remove(folder)
        rows = self._known.iter_column(
            f"SELECT row FROM ({_NEW_ROWS_SQL}) WHERE before ORDER BY row"
        )
        self._write_rows(output, pa.schema([("row", pa.int64())]), FAILED_BEFORE, rows)
        manifest, path = self._request.manifest, self._request.manifest.path_column
        if self.known_bad:
            bad = "FROM todo WHERE why = 'known bad' ORDER BY nth"
            codes = self._known.iter_column(f"SELECT status {bad}")
            paths = (
                pa.table({"path": resolve_paths(table[path], manifest.root)})
                for table in take_rows(
                    _iter_manifest_tables(manifest), self._known.iter_column(f"SELECT nth {bad}")
                )
            )
            statuses = pa.array(self._known.statuses, pa.string())
            named = (pa.table({"status": statuses.take(pa.array(each))}) for each in codes)
            status = pa.concat_tables(named)
            table = pa.concat_tables(paths).append_column("status", status["status"])
            layout.write_table(get_since_table_url(output, KNOWN_BAD), table)
        if self.deleted:
            layout.write_table(get_since_table_url(output, DELETED), self._deleted)

    def _write_rows(
        self, output: str, schema: pa.Schema, name: str, rows: Iterator[np.ndarray]
    ) -> None:
        tables = [pa.table([pa.array(each)], schema=schema) for each in rows if len(each)]
        if tables:
            layout.write_table(get_since_table_url(output, name), pa.concat_tables(tables))

    def _find_deleted(self) -> Iterator[pa.Table]:
        """The paths of images that a listing lacks, read from the runs that labeled them.

        A file that a listing would not take for an image does not count as deleted.
        """
        past_runs = self._request.past_runs
        below = len(self._source or "")
        for source in sorted(
            self._known.read_counts("SELECT source, count(*) FROM deleted GROUP BY 1")
        ):
            positions = self._known.iter_column(
                f"SELECT nth FROM deleted WHERE source = {source} ORDER BY nth"
            )
            if source < len(past_runs.committed):
                run = past_runs.committed[source]
                path, root, rows = run.path_column, run.root, iter_tables(run, [run.path_column])
            else:
                started = past_runs.unfinished[source - len(past_runs.committed)]
                (path, root), rows = find_path_column(started), read_planned_rows(started)
            for table in take_rows(rows, positions):
                found = _build_path_table(table[path], root)
                listable = [
                    has_image_suffix(each) and "/." not in each[below:]
                    for each in found["path"].to_pylist()
                ]
                yield found.filter(pa.array(listable, pa.bool_()))

    def _read_new_rows(self) -> Iterator[pa.RecordBatch]:
        positions = self._known.iter_column(f"SELECT nth FROM ({_NEW_ROWS_SQL}) ORDER BY nth")
        for table in take_rows(_iter_manifest_tables(self._request.manifest), positions):
            yield from table.combine_chunks().to_batches()

    def _load_known_images(self) -> None:
        request, known, past_runs = self._request, self._known, self._request.past_runs
        self._ranks = ranks = rank_runs(past_runs.committed, past_runs.unfinished)
        for source, run in enumerate(past_runs.committed):
            wanted = request.bundle_sha256 if request.relabel else None
            known.add_run(run, source, ranks, wanted, self._source)
            known.add_deleted(run, ranks)
        for source, started in enumerate(past_runs.unfinished, len(past_runs.committed)):
            if self._source is not None and started.has_rows:
                known.add_planned(started, source, ranks[started.url], self._source)
            if started.is_refused and not request.retry_failed and started.has_table:
                known.add_refused(started, ranks[started.url])
        known.add_manifest(request.manifest)

    def _classify_rows(self) -> None:
        request, db, count = self._request, self._known.db, len(self._request.version_columns)
        self._find_newest_rows()
        known_end, reported_end = map(self._find_end_without_path, self._count_without_path())
        transient = ", ".join(
            str(code)
            for code, name in enumerate(self._known.statuses)
            if name in TRANSIENT_STATUSES
        )
        retried = f"n.status IN ({transient})" if transient else "false"
        if request.retry_failed:
            retried = "true"
        without_path = "failed before" if request.retry_failed else "known bad"
        missing = self._known.get_code(StorageMissing.status)
        why = (
            f"CASE WHEN a.place IS NULL AND a.nth < {known_end} THEN '{without_path}' "
            "WHEN n.place IS NULL OR g.night > n.night THEN 'new' "
            f"WHEN {_build_differs_sql('n', count, request.is_explicit)} THEN 'changed' "
            f"WHEN n.status <> 0 AND ({retried} OR NOT ({_build_comparable_sql('n', count)})) "
            "THEN 'failed before' WHEN n.status <> 0 THEN 'known bad' "
            "WHEN NOT n.current THEN 'of another bundle' ELSE '' END"
        )
        refused = (
            f"EXISTS (SELECT 1 FROM refused r WHERE r.place = a.place AND "
            f"({_build_comparable_sql('r', count)}) AND NOT "
            f"({_build_differs_sql('r', count, request.is_explicit)}))"
            if any(self._known.read_counts("SELECT '', count(*) FROM refused").values())
            else "false"
        )
        refused += f" OR (a.place IS NULL AND a.nth < {reported_end})"
        db.execute(
            f"CREATE TABLE todo AS SELECT a.nth, {why} AS why, "
            f"CASE WHEN a.place IS NULL THEN {missing} ELSE n.status END AS status, "
            f"(why = 'failed before' OR (why IN ('new', 'changed') AND ({refused}))) AS before "
            "FROM listed a LEFT JOIN newest n ON a.place = n.place "
            "LEFT JOIN last_gone g ON a.place = g.place"
        )
        self._decide_by_last_rows()
        self._find_deleted_rows()

    def _decide_by_last_rows(self) -> None:
        """Of several listed rows of one image, treat all as the last one that has a version.

        Each would else count as changed on the night after another one was labeled.
        """
        db, count = self._known.db, len(self._request.version_columns)
        has_version = " OR ".join(f"v{at} <> 0" for at in range(count)) or "true"
        db.execute(
            "CREATE TABLE repeated AS SELECT nth, coalesce("
            f"max(CASE WHEN {has_version} THEN nth END) OVER images, max(nth) OVER images) AS last "
            "FROM listed WHERE place IN (SELECT a.place FROM listed a JOIN todo t ON a.nth = t.nth "
            "WHERE t.why = 'changed') WINDOW images AS (PARTITION BY place)"
        )
        db.execute(
            "UPDATE todo SET why = l.why, status = l.status, before = l.before "
            "FROM repeated r JOIN todo l ON l.nth = r.last "
            "WHERE todo.nth = r.nth AND r.nth <> r.last"
        )

    def _find_newest_rows(self) -> None:
        """Find the newest known row of each image, and the last night that lacked it."""
        db, count = self._known.db, len(self._request.version_columns)
        # of several rows of one image in one night, a failed one decides
        kept = [*(f"v{at}" for at in range(count)), "status", "current", "below", "source", "nth"]
        newest = ", ".join(f"arg_max({name}, rank) AS {name}" for name in kept)
        db.execute(
            f"CREATE TABLE newest AS SELECT place, {newest}, max(night) AS night FROM (SELECT *, "
            "(night * 2 + (status <> 0)::INT)::HUGEINT * (1::HUGEINT << 60) + "
            "(source::HUGEINT << 40) + nth AS rank FROM known WHERE place IS NOT NULL) "
            "GROUP BY place"
        )
        db.execute(
            "CREATE TABLE last_gone AS SELECT place, max(night) AS night FROM gone GROUP BY 1"
        )

    def _count_without_path(self) -> tuple[int, int]:
        """Rows without a path that the newest committed run's manifest had, and reported ones.

        Only their number is compared. A run that does not store it has all of them.
        """
        past, ranks, known, newest = self._request.past_runs, self._ranks, 0, 0
        query = "SELECT night, count(*) FROM {} WHERE place IS NULL GROUP BY night"
        labeled, refused = (
            self._known.read_counts(query.format(name)) for name in ("known", "refused")
        )
        for run in past.committed[-1:]:
            newest = ranks[run.url]
            known = run.run_record.get(ROWS_WITHOUT_PATH, labeled.get(newest, 0))
        reported = [
            run.run_record.get(ROWS_WITHOUT_PATH, refused.get(ranks[run.url], 0))
            for run in past.unfinished
            if run.is_refused and ranks[run.url] > newest and not self._request.retry_failed
        ]
        return known, max([known, *reported])

    def _find_end_without_path(self, count: int) -> int:
        """The end of the manifest rows that have the first `count` rows without a path."""
        found = self._known.db.execute(
            "SELECT coalesce(max(nth) + 1, 0) FROM "
            f"(SELECT nth FROM listed WHERE place IS NULL ORDER BY nth LIMIT {count})"
        ).fetchone()
        assert found is not None
        return int(found[0])

    def _find_deleted_rows(self) -> None:
        """Find the known images below the listed folder that the manifest lacks."""
        self._known.db.execute(
            "CREATE TABLE deleted AS SELECT source, nth FROM ("
            "SELECT place, night, source, nth FROM newest WHERE below UNION ALL "
            "SELECT place, max(night), arg_max(source, night), arg_max(nth, night) FROM planned "
            "WHERE place NOT IN (SELECT place FROM newest) GROUP BY place) n "
            "WHERE NOT EXISTS (SELECT 1 FROM listed a WHERE a.place = n.place) "
            "AND NOT EXISTS (SELECT 1 FROM last_gone g WHERE g.place = n.place "
            "AND g.night > n.night)"
        )


_NEW_ROWS_SQL = (
    "SELECT nth, before, row_number() OVER (ORDER BY nth) - 1 AS row FROM todo "
    "WHERE why NOT IN ('', 'known bad')"
)


def _build_differs_sql(known: str, count: int, explicit: bool) -> str:
    """SQL: whether a version column differs between a manifest row and a known row."""
    there = "" if explicit else "a.v{0} <> 0 AND {1}.v{0} <> 0 AND "
    terms = [f"({there}a.v{{0}} <> {{1}}.v{{0}})".format(at, known) for at in range(count)]
    return " OR ".join(terms) or "false"


def _build_comparable_sql(known: str, count: int) -> str:
    """SQL: whether a manifest row and a known row both have a version column."""
    terms = [f"(a.v{at} <> 0 AND {known}.v{at} <> 0)" for at in range(count)]
    return " OR ".join(terms) or "false"


def read_failed_before(output: str) -> np.ndarray:
    """(N,) int64, ascending: rows of a run whose image had failed before in the same version."""
    if f"{FAILED_BEFORE}.parquet" not in filesystem.list_names(
        filesystem.join(output, layout.SINCE_FOLDER)
    ):
        return np.zeros(0, np.int64)
    return np.asarray(read_since_table(output, FAILED_BEFORE)["row"].to_numpy())


def _iter_manifest_tables(manifest: Manifest) -> Iterator[pa.Table]:
    return (pa.Table.from_batches([batch]) for batch in manifest.batches())


def _build_path_table(column: pa.ChunkedArray, root: str) -> pa.Table:
    return pa.table({"path": resolve_paths(column, root).cast(pa.string())})


def _find_version_columns(
    manifest: Manifest, config: SinceConfig, runs: Collection[CommittedRun]
) -> list[str]:
    have = manifest.schema.names
    for name in config.version:
        if name not in have:
            raise ManifestError(
                f"since.version: manifest {manifest.source} has no column {name!r} (found: "
                f"{', '.join(have)})"
            )
        if not is_version_type(kind := manifest.schema.field(name).type):
            raise ManifestError(
                f"since.version: manifest {manifest.source}: column {name!r} is {kind}, which "
                "cannot be compared; versions are text, numbers, times or bytes. Pass another "
                "column"
            )
    if config.version:
        return list(config.version)
    default = []
    for name in DEFAULT_VERSION_COLUMNS:
        if name not in have:
            continue
        if is_version_type(kind := manifest.schema.field(name).type):
            default.append(name)
        else:
            log.emit("note", f"column {name!r} is {kind}, which is not compared as a version")
    known = {name for run in runs for name in run.schema.names}
    if runs and not known & set(default):
        log.emit(
            "note",
            "changed images cannot be found: neither the manifest nor the earlier runs have a "
            f"column {', '.join(DEFAULT_VERSION_COLUMNS)}. Only new and failed rows are labeled",
        )
    return default
