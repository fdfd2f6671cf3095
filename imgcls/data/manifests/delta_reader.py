"""Delta Lake reader: streams the rows of one version of a table, file by file in the files' order.

deltalake reads the log and the deletion vectors, and the files are read as other Parquet files are.
A table that needs any other feature of the protocol is refused by its name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.data.manifests.delta_table import check_deltalake, open_delta_table
from imgcls.data.manifests.options import ReadOptions
from imgcls.data.manifests.parquet_reader import READ_BATCH_ROWS
from imgcls.data.manifests.schemas import conform_table
from imgcls.data.manifests.table_version import TableVersion, split_version
from imgcls.data.storage import filesystem
from imgcls.errors import ManifestError, one_line

if TYPE_CHECKING:
    from deltalake import DeltaTable

_PREFIX = "delta:"
_READ_FEATURES = {
    "columnMapping", "deletionVectors", "timestampNtz", "v2Checkpoint", "vacuumProtocolCheck",
}  # fmt: skip
"""Features of the protocol that are read correctly; columnMapping where no column is mapped."""


def pin_delta_table(name: str) -> TableVersion:
    """The version of `delta:URL_OR_PATH[@VERSION]` to read: by default the newest.

    Raises RequestError where deltalake is missing, and StorageError where there is no such table.
    """
    check_deltalake("manifest")
    url, version = split_version(name.removeprefix(_PREFIX))
    url = filesystem.absolute(url)
    table = open_delta_table(url, version)
    return TableVersion(
        name=f"{_PREFIX}{url}@{table.version()}",
        folder=url,
        version=str(table.version()),
        table_id=str(table.metadata().id),
    )


def read_delta_schema(name: str, options: ReadOptions) -> pa.Schema:
    """The columns of a version; raises ManifestError for a table that cannot be read."""
    return _check_schema(name, _open(name)[1])


def _open(name: str) -> tuple[str, DeltaTable]:
    """The folder of a table, and the table at its version."""
    url, version = split_version(name.removeprefix(_PREFIX))
    return url, open_delta_table(url, version)


def _check_schema(name: str, table: DeltaTable) -> pa.Schema:
    unknown = set(table.protocol().reader_features or ()) - _READ_FEATURES
    if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        unknown.add("columnMapping")
    if unknown:
        raise ManifestError(
            f"manifest {name}: the table needs the feature {min(unknown)} of Delta Lake, which is "
            "not supported. Export its rows to Parquet and pass the exported files"
        )
    return pa.schema(table.schema().to_arrow())


def read_delta_batches(name: str, options: ReadOptions) -> Iterator[pa.RecordBatch]:
    """Stream the rows of a version without the deleted ones, in the order of the files' paths."""
    url, table = _open(name)
    schema = options.images.convert_schema(_check_schema(name, table))
    kept = _read_deletion_vectors(table)
    actions = pa.table(table.get_add_actions(flatten=False)).to_pylist()
    for action in sorted(actions, key=lambda action: str(action["path"])):
        file = _resolve_file(url, action["path"])
        partition = action.get("partition") or {}
        for batch in _read_file(file, kept.get(file), options.images.contained):
            rows = _add_partition(batch, partition, schema)
            yield from conform_table(rows, schema, f"manifest {file}").to_batches()


def _read_file(
    file: str, kept: npt.NDArray[np.bool_] | None, left_out: Collection[str]
) -> Iterator[pa.Table]:
    """The rows of a file.

    kept:     whether each row is kept; rows after the last one are
    left_out: columns that are not read
    """
    first = 0
    try:
        with filesystem.open_read(file) as stream:
            parquet = pq.ParquetFile(stream, pre_buffer=False, coerce_int96_timestamp_unit="us")
            names = [each for each in parquet.schema_arrow.names if each not in left_out]
            for batch in parquet.iter_batches(READ_BATCH_ROWS, columns=names):
                batch.validate(full=True)  # Parquet readers do not check that text is UTF-8
                table = pa.Table.from_batches([batch])
                if kept is not None:
                    mask = np.ones(batch.num_rows, bool)
                    part = kept[first : first + batch.num_rows]
                    mask[: len(part)] = part
                    table = table.filter(pa.array(mask))
                first += batch.num_rows
                yield table
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"manifest {file}: {one_line(error)}; the file is damaged") from error


def _add_partition(table: pa.Table, partition: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """Add the columns of a partitioned table, which are in the log only."""
    for name, value in partition.items():
        if name not in table.schema.names:
            column = pa.repeat(pa.scalar(value, schema.field(name).type), table.num_rows)
            table = table.append_column(schema.field(name), column)
    return table


def _read_deletion_vectors(table: DeltaTable) -> dict[str, npt.NDArray[np.bool_]]:
    """For each file with deleted rows, whether each row is kept."""
    vectors = {}
    for batch in table.deletion_vectors():
        for row in pa.record_batch(batch).to_pylist():
            vectors[_resolve_file("", row["filepath"])] = np.array(row["selection_vector"], bool)
    return vectors


def _resolve_file(folder: str, path: str) -> str:
    """The file of a path in the log: percent-encoded, relative to the table or a URL."""
    path = unquote(path)
    return filesystem.absolute(path) if "://" in path or not folder else f"{folder}/{path}"
