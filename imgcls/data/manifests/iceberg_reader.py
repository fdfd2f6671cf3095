"""Iceberg reader: streams the rows of one snapshot of a table, file by file in the files' order.

pyiceberg reads the files, and leaves out rows that positional deletes or deletion vectors delete. A
table with equality deletes, which pyiceberg cannot read, is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

from imgcls.data.manifests.iceberg_table import check_pyiceberg, open_iceberg_table
from imgcls.data.manifests.options import ReadOptions
from imgcls.data.manifests.schemas import conform_table
from imgcls.data.manifests.table_errors import translate_table_error
from imgcls.data.manifests.table_version import TableVersion, split_version
from imgcls.data.storage import filesystem
from imgcls.errors import ManifestError, StorageError, StorageMissing

if TYPE_CHECKING:
    from pyiceberg.table import DataScan

_PREFIX = "iceberg:"


def pin_iceberg_table(name: str) -> TableVersion:
    """The snapshot of `iceberg:CATALOG.NAMESPACE.TABLE[@SNAPSHOT]` to read: by default the current.

    Raises RequestError where pyiceberg or the catalog's settings are missing, ManifestError for a
    table without a snapshot, and StorageError where there is no such table or snapshot.
    """
    check_pyiceberg("manifest")
    table_name, version = split_version(name.removeprefix(_PREFIX))
    table = open_iceberg_table(table_name)
    current = table.current_snapshot()
    if version is None and current is None:
        raise ManifestError(f"manifest {name}: the table has no rows yet")
    snapshot = current if version is None else table.snapshot_by_id(version)
    if snapshot is None:
        raise StorageMissing(f"{name}: has no snapshot {version}; it may have expired")
    return TableVersion(
        name=f"{_PREFIX}{table_name}@{snapshot.snapshot_id}",
        folder=filesystem.local_path(table.location()),
        version=str(snapshot.snapshot_id),
        table_id=str(table.metadata.table_uuid),
    )


def read_iceberg_schema(name: str, options: ReadOptions) -> pa.Schema:
    """The columns of a snapshot."""
    return _get_schema(_scan(name))


def read_iceberg_batches(name: str, options: ReadOptions) -> Iterator[pa.RecordBatch]:
    """Stream the rows of a snapshot without the deleted ones, in the order of the files' paths."""
    from pyiceberg.io.pyarrow import ArrowScan

    scan = _scan(name)
    schema = _get_schema(scan)
    try:
        tasks = sorted(scan.plan_files(), key=lambda task: task.file.file_path)
        for task in tasks:
            reader = ArrowScan(scan.table_metadata, scan.io, scan.projection(), scan.row_filter)
            for batch in reader.to_record_batches([task]):
                rows = pa.Table.from_batches([batch])
                yield from conform_table(rows, schema, f"manifest {name}").to_batches()
    except (ManifestError, StorageError):
        raise
    except Exception as error:
        if "equality deletes" in str(error):
            raise ManifestError(
                f"manifest {name}: has equality deletes, which pyiceberg cannot read. Compact the "
                "table with the engine that wrote them, or export its rows to Parquet"
            ) from error
        raise translate_table_error(name, error) from error


def _scan(name: str) -> DataScan:
    table_name, version = split_version(name.removeprefix(_PREFIX))
    return open_iceberg_table(table_name).scan(snapshot_id=version)


def _get_schema(scan: DataScan) -> pa.Schema:
    """The columns, without pyiceberg's metadata."""
    schema = scan.projection().as_arrow()
    return pa.schema([field.remove_metadata() for field in schema])
