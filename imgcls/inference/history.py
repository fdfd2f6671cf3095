"""Compaction of many runs into one table: the newest row of each image, with its run and bundle.

The newest rows are found in tables on disk, then the runs are streamed, so memory does not grow
with the rows. The result is a committed run like any other, for `--since`, for evaluation and for
readers of Parquet.
"""

from __future__ import annotations

import datetime
import json
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls import log
from imgcls.config import Section
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest, resolve_paths
from imgcls.data.manifests.schemas import conform_table, unify_schemas
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import StorageConfig, with_config_storage
from imgcls.errors import OutputError, RequestError
from imgcls.execution.plan import MAX_PART_BYTES
from imgcls.formatting import format_count
from imgcls.inference.known_images import KnownImages, rank_runs, take_rows
from imgcls.inference.nights import find_origins, find_past_runs
from imgcls.runs import layout
from imgcls.runs.committed import CommittedRun, iter_tables
from imgcls.runs.lease import Lease
from imgcls.runs.provenance import build_provenance

_ROW_GROUP_ROWS = 65_536
_PROVENANCE_TYPES = {"run": pa.string(), "bundle_sha256": pa.string(), "labelled_at": pa.string()}


class CompactConfig(Section):
    """Merge many predict runs into one table with the newest row of each image."""

    positional: ClassVar[tuple[str, ...]] = ("source",)

    source: str
    """Folder of runs, such as labels/ of labels/date=.../."""
    output: str
    """Folder to write."""
    manifest: ManifestConfig | None = None
    """Keep only images that this manifest lists."""
    keep_deleted: bool = False
    """Keep the rows of images that a later run found deleted."""
    overwrite: bool = False
    """Replace an existing table."""
    storage: StorageConfig = StorageConfig()


@with_config_storage
def compact(config: CompactConfig) -> str:
    """Write the newest row of every image; returns the output folder.

    The columns are those of all runs, null where a run has none, with an absolute path, and `run`,
    `bundle_sha256` and `labelled_at` (of the commit, ISO 8601); manifest columns of these names are
    replaced. The order of the runs decides which row is the newest, see `nights`. Images that a
    later run found deleted are left out.
    Raises RequestError when there is no run, runs have different tasks, or columns of one name have
    types without a common one.
    """
    output = filesystem.absolute(config.output)
    found = find_past_runs(config.source, exclude=output)
    runs = found.committed
    if not runs:
        raise RequestError(
            f"{config.source}: holds no committed run, nothing to merge. Pass a folder "
            "of outputs of `imgcls predict`"
        )
    if len({run.has_predictions for run in runs}) > 1:
        raise RequestError(
            f"{config.source}: holds runs of `imgcls predict` and of `imgcls embed`; keep them in "
            "folders of their own"
        )
    replace(found, unfinished=()).check_task(config.source)
    schema = _unify_run_schemas(runs)
    lease = Lease.acquire(output)
    try:
        _remove_old_table(output, config)
        _write_run_record(output, runs, config)
        with tempfile.TemporaryDirectory(prefix="imgcls-history-") as folder:
            known = KnownImages(folder)
            deleted = _find_newest(known, runs, config)
            status: Counter[str] = Counter()
            rows, parts = _write_parts(output, schema, _read_newest(known, runs), lease, status)
            known.db.close()
        lease.check()
        _write_success(output, runs, rows, parts, status)
    finally:
        lease.release()
    left_out = (
        f", {format_count(deleted, 'deleted image')} left out (--keep-deleted)" if deleted else ""
    )
    images, count = format_count(rows, "image"), format_count(len(runs), "run")
    log.show(f"history    {images} of {count}{left_out}: {output}")
    return output


def _remove_old_table(output: str, config: CompactConfig) -> None:
    """Remove an unfinished table, or one to be replaced; never a predict run."""
    stored = layout.load_run(output)
    if stored is not None and "merged" not in stored["identity"]:
        raise OutputError(
            f"output {output}: holds a predict run, not a compacted table. Pass another --output"
        )
    if layout.is_committed(output) and not config.overwrite:
        raise OutputError(f"output {output}: holds a table already. Set --overwrite to replace it")
    if stored is None and filesystem.list_names(filesystem.join(output, layout.PREDICTIONS_FOLDER)):
        raise OutputError(f"output {output}: holds other predictions. Pass another --output")
    for name in (layout.SUCCESS_FILE, layout.PREDICTIONS_FOLDER, layout.RUN_FILE):
        filesystem.remove(filesystem.join(output, name))


def _find_newest(known: KnownImages, runs: Sequence[CommittedRun], config: CompactConfig) -> int:
    """Find the newest rows; returns the number of deleted images that are left out."""
    nights = rank_runs(runs)
    for source, run in enumerate(runs):
        known.add_run(run, source, nights)
        if not config.keep_deleted:
            known.add_deleted(run, nights)
    only = ""
    if config.manifest is not None:
        known.add_manifest(open_manifest(config.manifest))
        only = "AND place IN (SELECT place FROM listed)"
    # of several rows of one night, the last one, as `--since` has it; a null path is no image
    rank = "(night::HUGEINT << 60) + (source::HUGEINT << 40) + nth"
    known.db.execute(
        "CREATE TABLE newest AS SELECT place, arg_max(source, rank) AS source, "
        f"arg_max(nth, rank) AS nth, max(night) AS night FROM (SELECT *, {rank} AS rank FROM known "
        f"WHERE place IS NOT NULL {only}) GROUP BY place"
    )
    gone = known.db.execute(
        "DELETE FROM newest n USING (SELECT place, max(night) AS night FROM gone GROUP BY place) g "
        "WHERE g.place = n.place AND g.night > n.night"
    ).fetchone()
    return int(gone[0]) if gone else 0


def _read_newest(known: KnownImages, runs: Sequence[CommittedRun]) -> Iterator[pa.Table]:
    """The newest rows, run by run, with the columns about their run."""
    for source, run in enumerate(runs):
        positions = known.iter_column(
            f"SELECT nth FROM newest WHERE source = {source} ORDER BY nth"
        )
        for table in take_rows(iter_tables(run, run.schema.names), positions):
            yield _add_origin(table, run)


def _add_origin(table: pa.Table, run: CommittedRun) -> pa.Table:
    at = table.schema.get_field_index(run.path_column)
    whole = resolve_paths(table[run.path_column], run.root).cast(pa.string())
    table = table.set_column(at, run.path_column, whole)
    if run.merged_runs:  # its rows have these columns already
        return table
    table = table.drop_columns(_find_colliding_columns(run))
    values = (run.url, run.bundle_sha256, run.success_record["committed"])
    for name, value in zip(_PROVENANCE_TYPES, values, strict=True):
        table = table.append_column(name, pa.array([value] * table.num_rows, pa.string()))
    return table


def _find_colliding_columns(run: CommittedRun) -> list[str]:
    """Columns of a predict run with the name of an added column; readers ignore case."""
    return [
        name
        for name in run.schema.names
        if name.lower() in _PROVENANCE_TYPES and not run.merged_runs
    ]


def _unify_run_schemas(runs: Sequence[CommittedRun]) -> pa.Schema:
    paths = {run.path_column for run in runs}
    if len(paths) > 1:
        raise RequestError(
            f"{runs[0].url} and others have different path columns ({', '.join(sorted(paths))})"
            ". Merge runs over manifests with one path column"
        )
    schemas = []
    for run in reversed(runs):  # the newest run sets the order of the columns
        schema = run.schema.set(
            run.schema.get_field_index(run.path_column), pa.field(run.path_column, pa.string())
        )
        for name in _find_colliding_columns(run):
            schema = schema.remove(schema.get_field_index(name))
        schemas.append((run.url, schema))
    common = unify_schemas(schemas, "run", optional=True)
    fields = [field for field in common if field.name not in _PROVENANCE_TYPES]
    return pa.schema([*fields, *(pa.field(name, kind) for name, kind in _PROVENANCE_TYPES.items())])


def _write_parts(
    output: str,
    schema: pa.Schema,
    tables: Iterator[pa.Table],
    lease: Lease,
    status: Counter[str],
) -> tuple[int, int]:
    """Write parts of about 128 MB, count rows by status; returns the numbers of rows and parts."""
    rows = part = size = 0
    pending: list[pa.Table] = []

    def flush() -> None:
        nonlocal part, size
        lease.check()
        with filesystem.open_write(layout.part_url(output, part)) as stream:
            whole = pa.concat_tables(pending) if pending else schema.empty_table()
            pq.write_table(
                whole.unify_dictionaries(),
                stream,
                compression="zstd",
                row_group_size=_ROW_GROUP_ROWS,
            )
        pending.clear()
        part, size = part + 1, 0

    for table in tables:
        rows += table.num_rows
        pending.append(conform_table(table, schema, f"run {table['run'][0].as_py()}"))
        for pair in pending[-1]["status"].value_counts().to_pylist():
            status[pair["values"]] += pair["counts"]
        size += pending[-1].nbytes
        if size >= MAX_PART_BYTES:
            flush()
    if pending or part == 0:
        flush()
    return rows, part


def _write_run_record(output: str, runs: Sequence[CommittedRun], config: CompactConfig) -> None:
    last = runs[-1]
    run = layout.load_run(last.url)
    assert run is not None
    run["identity"]["manifest"] |= {"root": "/"}
    orders = {url: order for each in runs for url, order in find_origins(each).items()}
    run["identity"]["merged"] = list(orders)
    run["origins"] = orders
    run["same_classes"] = all(
        each.has_same_classes and each.classes == last.classes for each in runs
    )
    run["classes"] = _list_classes(runs)
    run["sequence"] = max(order[0] for order in orders.values())
    for name in ("since", "refused"):
        run.pop(name, None)
    # reports show the settings of the newest rows
    own = {"compact": config.model_dump(mode="json", exclude={"storage"})}
    run["provenance"] = build_provenance(last.provenance["config"] | own)
    body = (json.dumps(run, indent=2) + "\n").encode()
    filesystem.write(filesystem.join(output, layout.RUN_FILE), body)


def _list_classes(runs: Sequence[CommittedRun]) -> list[str]:
    """Classes of all runs: the newest run's in its order, then those that only older ones have."""
    found: dict[str, str] = {}
    for run in reversed(runs):
        for name in run.classes:
            found.setdefault(unicodedata.normalize("NFC", name), name)
    return list(found.values())


def _write_success(
    output: str, runs: Sequence[CommittedRun], rows: int, parts: int, status: Counter[str]
) -> None:
    last = runs[-1]
    body = last.success_record | {
        "rows": rows,
        "status": dict(sorted(status.items())),
        "files": layout.measure_parts(output, parts),
        "merged": len(runs),
        "labelled_until": last.success_record.get(
            "labelled_until", last.success_record["committed"]
        ),
        "committed": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    layout.remove_unfinished_files(output)
    if not filesystem.create(
        filesystem.join(output, layout.SUCCESS_FILE), (json.dumps(body, indent=2) + "\n").encode()
    ):
        raise OutputError(f"output {output}: was written by another process; its table is intact")
