"""Published tables as other programs read them, and runs as they are committed again."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from pyiceberg.catalog import load_catalog

from imgcls.publishing.config import PublishConfig
from imgcls.publishing.publish import publish
from imgcls.publishing.sink import Publication
from imgcls.runs import layout


def publish_to(run: Path, target: str) -> Publication:
    return publish(PublishConfig(run=str(run), to=target))


def read(target: str) -> pa.Table:
    """All rows of a table, by the row number, read by its own library."""
    kind, _, name = target.partition(":")
    if kind == "delta":
        table = DeltaTable(name).to_pyarrow_table()
    else:
        table = load_iceberg(target).scan().to_arrow()
    return table.sort_by([("run_id", "ascending"), ("row", "ascending")])


def load_iceberg(target: str):  # type: ignore[no-untyped-def]
    catalog, _, name = target.removeprefix("iceberg:").partition(".")
    return load_catalog(catalog).load_table(name)


def count_with_polars(target: str) -> tuple[int, int]:
    """Rows and distinct row numbers."""
    if target.startswith("delta:"):
        frame = polars.scan_delta(target.removeprefix("delta:"))
    else:
        frame = polars.scan_iceberg(load_iceberg(target))
    found = frame.select(polars.len(), polars.col("row").n_unique().alias("rows")).collect()
    return found["len"][0], found["rows"][0]


def count_with_duckdb(target: str) -> tuple[int, int]:
    """Rows and distinct row numbers, in the data files that the table names."""
    if target.startswith("delta:"):
        files = DeltaTable(target.removeprefix("delta:")).file_uris()
    else:
        files = [task.file.file_path for task in load_iceberg(target).scan().plan_files()]
    [found] = duckdb.sql(
        f"SELECT count(*), count(DISTINCT row) FROM read_parquet({files}, union_by_name=true)"
    ).fetchall()
    return found


def commit_again(run: Path, status: str) -> None:
    """Commit a run again with another status in each row, as `--retry-errors` does."""
    mark = run / layout.SUCCESS_FILE
    success = json.loads(mark.read_text())
    mark.unlink()
    for name in success["files"]:
        file = run / layout.PREDICTIONS_FOLDER / name
        table = pq.read_table(file)
        column = pa.array([status] * table.num_rows).dictionary_encode()
        at = table.schema.get_field_index("status")
        pq.write_table(table.set_column(at, "status", column), file)
        success["files"][name] = file.stat().st_size
    success["committed"] = "2026-01-02T00:00:00"
    mark.write_text(json.dumps(success))


def set_run_id(run: Path, run_id: str) -> Path:
    """Make a run another one."""
    for name in (layout.SUCCESS_FILE, layout.RUN_FILE):
        record = json.loads((run / name).read_text())
        (record if name == layout.SUCCESS_FILE else record["plan"])["run_id"] = run_id
        (run / name).write_text(json.dumps(record))
    return run
