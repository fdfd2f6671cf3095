"""Delta Lake tables as a target: one Delta transaction per run, through deltalake.

The transaction has a `txn` action with the run as application and its commit as version. deltalake
refuses a transaction if another one with the same application came first, so of two publishers one
adds the rows. A run that was committed again, after `--retry-errors`, replaces its rows: the
transaction removes those with its run id and adds the new ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from imgcls.data.manifests.delta_table import build_delta_options, check_deltalake, open_delta_table
from imgcls.data.manifests.table_errors import translate_table_error
from imgcls.data.storage import filesystem
from imgcls.errors import ImgclsError, RequestError, StorageError, StorageMissing, request_error
from imgcls.publishing.rows import COMMITTED_COLUMN, RUN_ID_COLUMN, RunRows, select_run
from imgcls.publishing.sink import Publication, Sink, TransactionConflict, retry_conflicts
from imgcls.publishing.table_types import build_table_schema, fit_schema

if TYPE_CHECKING:
    from deltalake import DeltaTable


class DeltaSink(Sink):
    """A Delta table on a disk or an object store; it is created if there is none."""

    prefix = "delta"
    syntax = "delta:URL_OR_PATH"

    def __init__(self, name: str) -> None:
        super().__init__(filesystem.absolute(name))

    def check(self, schema: pa.Schema, place: str) -> None:
        check_deltalake("publish")
        stored = build_table_schema(schema, place, has_times=False)
        try:
            filesystem.check_writable(self.name)
            table = self._open()
        except StorageError as error:
            raise request_error(RequestError, f"{self.target}: {error}", error) from error
        if table is not None:
            fit_schema(_read_schema(table), stored, place, self.target)

    def find(self, rows: RunRows) -> Publication | None:
        check_deltalake("publish")
        table = self._open()
        return None if table is None else _find(table, rows)[0]

    def publish(self, rows: RunRows) -> Publication:
        check_deltalake("publish")
        stored = build_table_schema(rows.schema, rows.run.url, has_times=False)
        return retry_conflicts(self.target, lambda: self._publish_once(rows, stored))

    def _publish_once(self, rows: RunRows, stored: pa.Schema) -> Publication:
        table = self._open() or self._create(stored)
        found, has_other_rows = _find(table, rows)
        if found is not None:
            return found
        schema = fit_schema(_read_schema(table), stored, rows.run.url, self.target)
        self._write(table, rows, schema, replace=has_other_rows)
        return Publication("replaced" if has_other_rows else "published", str(table.version()))

    def _open(self) -> DeltaTable | None:
        try:
            return open_delta_table(self.name)
        except StorageMissing:
            return None

    def _create(self, schema: pa.Schema) -> DeltaTable:
        """Create the table without rows.

        If it were created with its rows, two publishers could both do so, one after the other.
        """
        from deltalake import DeltaTable

        try:
            return DeltaTable.create(
                self.name,
                schema,
                mode="ignore",
                storage_options=build_delta_options(self.name),
            )
        except Exception as error:
            if self._open() is not None:
                raise TransactionConflict from error
            raise translate_table_error(self.target, error) from error

    def _write(self, table: DeltaTable, rows: RunRows, schema: pa.Schema, *, replace: bool) -> None:
        from deltalake import CommitProperties, Transaction, WriterProperties, write_deltalake
        from deltalake.exceptions import CommitFailedError

        failed: list[ImgclsError] = []
        reader = pa.RecordBatchReader.from_batches(schema, _keep_error(rows, schema, failed))
        mode: dict[str, Any] = {"mode": "append"}
        if replace:
            mode = {"mode": "overwrite", "predicate": select_run(rows.run_id)}
        try:
            write_deltalake(
                table,
                reader,
                schema_mode="merge",
                # a row group is in memory until it is full: 1,048,576 rows by default
                writer_properties=WriterProperties(
                    compression="ZSTD", max_row_group_size=rows.find_group_rows()
                ),
                commit_properties=CommitProperties(
                    custom_metadata={
                        "imgcls.run": rows.run.url,
                        "imgcls.run_id": rows.run_id,
                        "imgcls.committed": rows.committed,
                    },
                    app_transactions=[Transaction(_get_application(rows), rows.commit_id)],
                ),
                **mode,
            )
        except CommitFailedError as error:
            raise TransactionConflict from error
        except Exception as error:
            if failed:
                raise failed[0] from error
            raise translate_table_error(self.target, error) from error


def _get_application(rows: RunRows) -> str:
    return f"imgcls:{rows.run_id}"


def _read_schema(table: DeltaTable) -> pa.Schema:
    return pa.schema(table.schema().to_arrow())


def _find(table: DeltaTable, rows: RunRows) -> tuple[Publication | None, bool]:
    """The publication of a run, and whether the table has rows of another commit of the run.

    The transaction decides, or the rows where it was removed from the log
    (delta.setTransactionRetentionDuration).
    """
    unchanged = Publication("unchanged", str(table.version()))
    commit = table.transaction_version(_get_application(rows))
    if commit is not None:
        return (unchanged, False) if commit == rows.commit_id else (None, True)
    if RUN_ID_COLUMN not in _read_schema(table).names:
        return None, False
    found = table.scan(columns=[COMMITTED_COLUMN], predicate=select_run(rows.run_id))
    committed = {time for batch in found for time in pa.array(batch.column(0)).unique().to_pylist()}
    return (unchanged, False) if committed == {rows.committed} else (None, bool(committed))


def _keep_error(rows: RunRows, schema: pa.Schema, failed: list[ImgclsError]) -> Any:
    """The batches of a run; an error while they are read is kept, since deltalake replaces it."""
    try:
        yield from rows.iter_batches(schema)
    except ImgclsError as error:
        failed.append(error)
        raise
