"""Many nights as one table: for each image its newest row, and which run and bundle it is of.

Which rows those are is found in tables on disk; then the nights are streamed past, so memory does
not grow with the rows. What comes out is a committed run like any other, for `--since`, for
evaluation and for whatever reads Parquet.
"""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Iterator, Sequence
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls import output as layout
from imgcls.config import Section
from imgcls.data import storage, stores
from imgcls.data.manifest import ManifestConfig, open_manifest, resolved
from imgcls.data.stores import StorageConfig
from imgcls.errors import OutputError, RequestError
from imgcls.labeling.plan import PART_BYTES
from imgcls.labeling.since import Keys, chosen, earlier_runs
from imgcls.lease import Lease
from imgcls.provenance import provenance
from imgcls.runs import Run, stream

_GROUP_ROWS = 65_536
_ADDED = {"run": pa.string(), "bundle_sha256": pa.string(), "labelled_at": pa.string()}


class CompactConfig(Section):
    """Merge many labelling runs into one table with the newest row of each image."""

    positional: ClassVar[tuple[str, ...]] = ("source",)

    source: str
    """A folder of runs, such as labels/ above labels/date=.../."""
    output: str
    """The folder to write."""
    manifest: ManifestConfig | None = None
    """Keep only the images that it lists: those that were deleted are dropped."""
    overwrite: bool = False
    """Replace the table that is there."""
    storage: StorageConfig = StorageConfig()


def compact(config: CompactConfig) -> str:
    """Write the newest row of every image; returns the output folder.

    The columns are those of all runs together, null where a run had none, with the path made
    whole, and `run`, `bundle_sha256` and `labelled_at` (of the commit, ISO 8601) added.
    Raises RequestError when there is no run, or columns of one name do not fit together.
    """
    stores.use(config.storage)
    output = storage.absolute(config.output)
    runs = earlier_runs(config.source, but=output)
    if not runs:
        raise RequestError(f"{config.source}: holds no committed run; nothing to merge")
    schema = _common_schema(runs)
    lease = Lease.acquire(output)
    try:
        _clear(output, config)
        _describe(output, runs, config)
        with tempfile.TemporaryDirectory(prefix="imgcls-history-") as folder:
            keys = Keys(folder)
            rows = _write(output, schema, _newest(keys, runs, config.manifest), lease)
        lease.check()
        _mark(output, runs, rows)
    finally:
        lease.release()
    print(f"history    {rows:,} images of {len(runs):,} runs: {output}", flush=True)
    return output


def _clear(output: str, config: CompactConfig) -> None:
    """Remove a table that was broken off, or is to be replaced; never a labelling run."""
    stored = layout.load_run(output)
    if stored is not None and "merged" not in stored["identity"]:
        raise OutputError(
            f"output {output}: holds a labelling run, which only labelling could make again; give "
            "another --output"
        )
    if storage.exists(storage.join(output, layout.SUCCESS)) and not config.overwrite:
        raise OutputError(f"output {output}: holds a table already; say --overwrite to replace it")
    if stored is None and storage.names(storage.join(output, layout.PREDICTIONS)):
        raise OutputError(f"output {output}: holds other predictions; give another --output")
    for name in (layout.SUCCESS, layout.PREDICTIONS, layout.RUN):
        storage.remove(storage.join(output, name))


def _newest(keys: Keys, runs: Sequence[Run], listed: ManifestConfig | None) -> Iterator[pa.Table]:
    """The newest rows, night by night, with their run."""
    for night, run in enumerate(runs, 1):
        keys.know(run, night, [], None)
    only = ""
    if listed is not None:
        keys.ask(open_manifest(listed), [])
        only = "AND place IN (SELECT place FROM asked)"
    # of one night the first row of an image; a null path is no image
    keys.db.execute(
        "CREATE TABLE newest AS SELECT max((night << 40) - nth) AS best FROM known "
        f"WHERE place IS NOT NULL {only} GROUP BY place"
    )
    for night, run in enumerate(runs, 1):
        top = night << 40
        places = keys.numbers(
            f"SELECT {top} - best AS nth FROM newest WHERE best <= {top} AND "
            f"best > {(night - 1) << 40} ORDER BY nth"
        )
        for table in chosen(stream(run, run.schema.names), places):
            yield _with_origin(table, run)


def _with_origin(table: pa.Table, run: Run) -> pa.Table:
    at = table.schema.get_field_index(run.path_column)
    whole = resolved(table[run.path_column], run.root).cast(pa.string())
    table = table.set_column(at, run.path_column, whole)
    values = (run.url, run.bundle_sha256, run.success["committed"])
    for name, value in zip(_ADDED, values, strict=True):
        if name not in table.schema.names:  # it may be of a compacted history already
            table = table.append_column(name, pa.array([value] * table.num_rows, pa.string()))
    return table


def _common_schema(runs: Sequence[Run]) -> pa.Schema:
    paths = {run.path_column for run in runs}
    if len(paths) > 1:
        raise RequestError(
            f"{runs[0].url} and others name the path column differently ({', '.join(sorted(paths))}"
            "); merge runs of one kind of manifest"
        )
    fields: dict[str, pa.Field] = {}
    for run in reversed(runs):
        for field in run.schema:
            known = fields.setdefault(field.name, field.with_nullable(True))
            if known.type != field.type and field.name != run.path_column:
                raise RequestError(
                    f"{run.url}: column {field.name!r} is {field.type}, and {known.type} in later "
                    "runs; merge runs of one kind of manifest and bundle"
                )
    fields[runs[-1].path_column] = pa.field(runs[-1].path_column, pa.string())
    added = [pa.field(name, kind) for name, kind in _ADDED.items() if name not in fields]
    return pa.schema([*fields.values(), *added])


def _write(output: str, schema: pa.Schema, tables: Iterator[pa.Table], lease: Lease) -> int:
    """Write parts of about 128 MB; returns the rows."""
    rows = part = size = 0
    pending: list[pa.Table] = []

    def flush() -> None:
        nonlocal part, size
        lease.check()
        with storage.open_write(layout.part_url(output, part)) as stream:
            whole = pa.concat_tables(pending) if pending else schema.empty_table()
            pq.write_table(
                whole.unify_dictionaries(), stream, compression="zstd", row_group_size=_GROUP_ROWS
            )
        pending.clear()
        part, size = part + 1, 0

    for table in tables:
        rows += table.num_rows
        pending.append(_cast(table, schema))
        size += pending[-1].nbytes
        if size >= PART_BYTES:
            flush()
    if pending or part == 0:
        flush()
    return rows


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    return pa.table(
        [
            table[field.name].cast(field.type)
            if field.name in table.schema.names
            else pa.nulls(table.num_rows, field.type)
            for field in schema
        ],
        schema=schema,
    )


def _describe(output: str, runs: Sequence[Run], config: CompactConfig) -> None:
    last = runs[-1]
    run = layout.load_run(last.url)
    assert run is not None
    run["identity"]["manifest"] |= {"root": "/"}
    run["identity"]["merged"] = [each.url for each in runs]
    # what made the newest rows is what a report asks for
    own = {"compact": config.model_dump(mode="json", exclude={"storage"})}
    run["provenance"] = provenance(last.provenance["config"] | own)
    body = (json.dumps(run, indent=2) + "\n").encode()
    storage.write(storage.join(output, layout.RUN), body)


def _mark(output: str, runs: Sequence[Run], rows: int) -> None:
    last = runs[-1]
    folder = storage.join(output, layout.PREDICTIONS)
    files = {name: storage.size(storage.join(folder, name)) for name in storage.names(folder)}
    body = last.success | {
        "rows": rows,
        "status": {},
        "files": files,
        "merged": len(runs),
        "labelled_until": last.success["committed"],
        "committed": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if not storage.create(
        storage.join(output, layout.SUCCESS), (json.dumps(body, indent=2) + "\n").encode()
    ):
        raise OutputError(f"output {output}: was written by another; nothing was harmed")
