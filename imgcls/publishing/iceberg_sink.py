"""Iceberg tables as a target: one Iceberg commit per run, through pyiceberg.

The files are written first, one per part, row group by row group. The commit then adds them, if the
table is still the one that was read; else it is read and checked again. The snapshot has the run id
and the commit of the run in its summary. A run that was committed again, after `--retry-errors`,
replaces its rows: the same commit removes those with its run id.
"""

from __future__ import annotations

import contextlib
import itertools
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

from imgcls.data.manifests.iceberg_table import check_pyiceberg, open_catalog, open_iceberg_table
from imgcls.data.manifests.table_errors import translate_table_error
from imgcls.errors import ImgclsError, RequestError, StorageError, StorageMissing, request_error
from imgcls.publishing.rows import COMMITTED_COLUMN, RUN_ID_COLUMN, RunRows, select_run
from imgcls.publishing.sink import Publication, Sink, TransactionConflict, retry_conflicts
from imgcls.publishing.table_types import build_table_schema, fit_schema

if TYPE_CHECKING:
    from pyiceberg.manifest import DataFile
    from pyiceberg.table import Table

_RUN_ID, _COMMIT_ID, _COMMITTED = "imgcls.run-id", "imgcls.commit-id", "imgcls.committed"
_RETRIES = "commit.retry.num-retries"


class IcebergSink(Sink):
    """An Iceberg table of a catalog of pyiceberg; it is created if there is none."""

    prefix = "iceberg"
    syntax = "iceberg:CATALOG.NAMESPACE.TABLE"

    def check(self, schema: pa.Schema, place: str) -> None:
        check_pyiceberg("publish")
        stored = build_table_schema(schema, place, has_times=True)
        try:
            table = self._open()
            if table is None:
                self._check_namespace()
        except StorageError as error:
            raise request_error(RequestError, str(error), error) from error
        if table is not None:
            self._fit(table, stored, place)

    def find(self, rows: RunRows) -> Publication | None:
        check_pyiceberg("publish")
        with _translate_errors(self.target):
            table = self._open()
            return None if table is None else _find(table, rows)[0]

    def publish(self, rows: RunRows) -> Publication:
        check_pyiceberg("publish")
        stored = build_table_schema(rows.schema, rows.run.url, has_times=True)
        files = _FilesOfRun(rows)
        with _translate_errors(self.target), files:
            return retry_conflicts(self.target, lambda: self._publish_once(rows, stored, files))

    def _publish_once(self, rows: RunRows, stored: pa.Schema, files: _FilesOfRun) -> Publication:
        table = self._open() or self._create(stored)
        found, has_other_rows = _find(table, rows)
        if found is not None:
            return found
        self._fit(table, stored, rows.run.url)
        table = _add_columns(table, stored)
        added = files.write(table)
        rows.check_unchanged()
        with files.committing():
            snapshot = _commit_files(table, rows, added, replace=has_other_rows)
        return Publication("replaced" if has_other_rows else "published", snapshot)

    def _open(self) -> Table | None:
        try:
            return open_iceberg_table(self.name)
        except StorageMissing:
            return None

    def _create(self, schema: pa.Schema) -> Table:
        self._check_namespace()
        catalog, identifier = open_catalog(self.name)
        return catalog.create_table_if_not_exists(identifier, schema)

    def _check_namespace(self) -> None:
        catalog, identifier = open_catalog(self.name)
        namespace = ".".join(identifier[:-1])
        if not catalog.namespace_exists(identifier[:-1]):
            raise RequestError(
                f"{self.target}: the catalog has no namespace {namespace!r}. Run pyiceberg "
                f"--catalog {self.name.partition('.')[0]} create namespace {namespace}"
            )

    def _fit(self, table: Table, stored: pa.Schema, place: str) -> None:
        if not table.spec().is_unpartitioned():
            raise RequestError(
                f"{self.target}: is partitioned by "
                f"{', '.join(field.name for field in table.spec().fields)}, and pyiceberg writes "
                "partitioned tables from memory only. Pass an unpartitioned table"
            )
        fit_schema(table.schema().as_arrow(), stored, place, self.target)


class _FilesOfRun:
    """The data files that a publisher writes, once per schema of the table.

    On exit they are removed, unless a snapshot has them, or may have them.
    """

    def __init__(self, rows: RunRows) -> None:
        self._rows = rows
        self._table: Table | None = None
        self._files: list[DataFile] = []
        self._may_be_committed = False

    def __enter__(self) -> _FilesOfRun:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._may_be_committed:
            self._remove()

    def write(self, table: Table) -> list[DataFile]:
        """Write the parts of the run with the schema of a table, unless that was done before."""
        if self._table is None or self._table.schema() != table.schema():
            self._remove()
            self._table = table
            for file in self._rows.run.files:
                written = _write_part(table, self._rows, file)
                self._files += [] if written is None else [written]
        return self._files

    @contextlib.contextmanager
    def committing(self) -> Iterator[None]:
        """The block commits the files; a conflict proves that it did not."""
        self._may_be_committed = True
        try:
            yield
        except TransactionConflict:
            self._may_be_committed = False
            raise

    def _remove(self) -> None:
        for file in self._files:
            assert self._table is not None
            with contextlib.suppress(OSError):
                self._table.io.delete(file.file_path)
        self._files = []


def _write_part(table: Table, rows: RunRows, file: str) -> DataFile | None:
    """Write a part as one data file; None for a part without rows."""
    from pyiceberg.io.fileformat import FileFormatFactory
    from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
    from pyiceberg.typedef import Record

    part = file.rpartition("/")[2].partition(".")[0]
    path = table.location_provider().new_data_location(
        f"{rows.run_id}-{part}-{uuid.uuid4()}.parquet"
    )
    output = table.io.new_output(path)
    model = FileFormatFactory.get(FileFormat.PARQUET)
    writer = model.create_writer(output, table.schema(), table.properties)
    tables = rows.iter_tables(file, table.schema().as_arrow())
    first = next(tables, None)
    if first is None:
        return None
    with writer:
        for each in itertools.chain((first,), tables):
            writer.write(each)
    return DataFile.from_args(
        content=DataFileContent.DATA,
        file_path=path,
        file_format=FileFormat.PARQUET,
        partition=Record(),
        file_size_in_bytes=len(output),
        sort_order_id=None,
        spec_id=table.metadata.default_spec_id,
        equality_ids=None,
        key_metadata=None,
        **writer.result().to_serialized_dict(),
    )


def _commit_files(table: Table, rows: RunRows, added: list[DataFile], *, replace: bool) -> str:
    """Add files to the table as it was read; returns the snapshot.

    Raises TransactionConflict when another writer has changed the table since.
    """
    from pyiceberg.exceptions import CommitFailedException

    # pyiceberg would repeat the append after a conflict without looking whether the run is there
    properties = {**table.properties, _RETRIES: "0"}
    table.metadata = table.metadata.model_copy(update={"properties": properties})
    summary = {
        _RUN_ID: rows.run_id,
        _COMMIT_ID: str(rows.commit_id),
        _COMMITTED: rows.committed,
        "imgcls.run": rows.run.url,
    }
    try:
        with table.transaction() as transaction:
            if replace:
                transaction.delete(select_run(rows.run_id))
            with transaction.update_snapshot(summary).fast_append() as snapshot:
                for file in added:
                    snapshot.append_data_file(file)
    except CommitFailedException as error:
        raise TransactionConflict from error
    return str(snapshot.snapshot_id)


def _add_columns(table: Table, stored: pa.Schema) -> Table:
    """Add the columns that a table lacks, before files are written with their ids."""
    from pyiceberg.exceptions import CommitFailedException

    names = table.schema().column_names
    added = pa.schema([field for field in stored if field.name not in names])
    if added.names:
        try:
            with table.update_schema() as update:
                update.union_by_name(added)
        except CommitFailedException as error:
            raise TransactionConflict from error
    return table


def _find(table: Table, rows: RunRows) -> tuple[Publication | None, bool]:
    """The publication of a run, and whether the table has rows of another commit of the run.

    The snapshots decide. Where they have expired, the rows do.
    """
    from pyiceberg.table.snapshots import ancestors_of

    current = table.current_snapshot()
    for snapshot in ancestors_of(current, table.metadata):
        summary = snapshot.summary
        if summary is not None and summary.additional_properties.get(_RUN_ID) == rows.run_id:
            is_same = summary.additional_properties[_COMMIT_ID] == str(rows.commit_id)
            unchanged = Publication("unchanged", str(snapshot.snapshot_id))
            return (unchanged, False) if is_same else (None, True)
    if current is None or RUN_ID_COLUMN not in table.schema().column_names:
        return None, False
    found = table.scan(select_run(rows.run_id), selected_fields=(COMMITTED_COLUMN,))
    committed = {
        time
        for batch in found.to_arrow_batch_reader()
        for time in batch.column(0).unique().to_pylist()
    }
    if committed == {rows.committed}:
        return Publication("unchanged", str(current.snapshot_id)), False
    return None, bool(committed)


@contextlib.contextmanager
def _translate_errors(target: str) -> Iterator[None]:
    try:
        yield
    except ImgclsError:
        raise
    except Exception as error:
        raise translate_table_error(target, error) from error
