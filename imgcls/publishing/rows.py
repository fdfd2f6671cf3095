"""The rows of a committed run as they are published: its parts, with the columns about the run.

They are read row group by row group, so memory does not grow with the table. The files must be
those that `_SUCCESS` names, from the first row group to the moment of the transaction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.data.storage import filesystem
from imgcls.errors import OutputError, RequestError, RunFailed, StorageMissing
from imgcls.publishing.table_types import convert_table
from imgcls.runs import layout
from imgcls.runs.committed import CommittedRun, open_run
from imgcls.runs.schema import PROVENANCE_COLUMNS

RUN_ID_COLUMN = "run_id"
_BATCH_BYTES = 4_000_000
COMMITTED_COLUMN = PROVENANCE_COLUMNS[-1]
PUBLISHED_COLUMNS = (RUN_ID_COLUMN, *PROVENANCE_COLUMNS)
"""Columns that are added to the rows: they select the rows of one run."""


def select_run(run_id: str) -> str:
    """The SQL predicate of the rows of a run in a table."""
    return f"{RUN_ID_COLUMN} = '{run_id}'"


def add_published_columns(schema: pa.Schema, place: str) -> pa.Schema:
    """The columns of a run with those that are added.

    Raises RequestError where the run has a column of such a name.
    """
    added = {name.casefold(): name for name in PUBLISHED_COLUMNS}
    for name in schema.names:
        if name.casefold() in added:
            raise RequestError(
                f"{place}: column {name!r} is a column that publishing adds "
                f"({', '.join(PUBLISHED_COLUMNS)}). Rename it in the manifest"
            )
    return pa.schema([*schema, *(pa.field(name, pa.string()) for name in PUBLISHED_COLUMNS)])


@dataclass(frozen=True, eq=False)
class RunRows:
    """The rows of a committed run.

    schema: of the rows, before they are converted for a table
    """

    run: CommittedRun
    schema: pa.Schema

    @classmethod
    def open(cls, url: str) -> RunRows:
        """Open a run; raises OutputError for one that is not committed, or a compacted history."""
        run = open_run(url)
        if run.merged_runs:
            raise OutputError(
                f"{run.url}: is a compacted history, whose rows are of many runs. Publish the "
                "runs that it was made of"
            )
        return cls.of_run(run)

    @classmethod
    def of_run(cls, run: CommittedRun) -> RunRows:
        """The rows of an opened run."""
        return cls(run, add_published_columns(run.schema, run.url))

    @property
    def run_id(self) -> str:
        """The identity of the run: a hash of its manifest, bundle and settings."""
        return str(self.run.success_record["run_id"])

    @property
    def commit_id(self) -> int:
        """Number of the run's commit, below 2**62: another one after its errors were retried."""
        body = json.dumps(self.run.success_record, sort_keys=True).encode()
        return int.from_bytes(hashlib.blake2b(body, digest_size=8).digest()) >> 2

    @property
    def committed(self) -> str:
        """Time of the commit, ISO 8601."""
        return str(self.run.success_record["committed"])

    def find_group_rows(self) -> int:
        """Number of rows of the run's first row group, at least 1."""
        with filesystem.open_read(self.run.files[0]) as stream:
            metadata = pq.ParquetFile(stream, pre_buffer=False).metadata
        return max(1, metadata.row_group(0).num_rows) if metadata.num_row_groups else 1

    def iter_tables(self, file: str, schema: pa.Schema) -> Iterator[pa.Table]:
        """The rows of a part in the types of a table, one row group at a time."""
        self._check_size(file)
        values = (self.run_id, self.run.url, self.run.bundle_sha256, self.committed)
        with filesystem.open_read(file) as stream:
            parquet = pq.ParquetFile(stream, pre_buffer=False)
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group)
                for name, value in zip(PUBLISHED_COLUMNS, values, strict=True):
                    column = pa.repeat(pa.scalar(value, pa.string()), table.num_rows)
                    table = table.append_column(name, column)
                yield convert_table(table, schema, file)

    def iter_batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """All rows in order, in batches of a few MB, of which a library may queue several.

        Raises RunFailed at the end if the run was changed meanwhile.
        """
        for file in self.run.files:
            for table in self.iter_tables(file, schema):
                row_bytes = table.nbytes // max(1, table.num_rows)
                yield from table.to_batches(max_chunksize=_BATCH_BYTES // max(1, row_bytes) + 1)
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Raise RunFailed when the run is not committed any more, or was committed again."""
        mark = filesystem.join(self.run.url, layout.SUCCESS_FILE)
        try:
            is_same = json.loads(filesystem.read(mark)) == self.run.success_record
        except (StorageMissing, ValueError):
            is_same = False
        if not is_same:
            raise RunFailed(
                f"{self.run.url}: was changed while it was being published; nothing was "
                "published. Rerun the command when `imgcls predict` has committed the run again"
            )

    def _check_size(self, file: str) -> None:
        committed = self.run.success_record["files"][file.rpartition("/")[2]]
        if filesystem.size(file) != committed:
            raise OutputError(
                f"{file}: is not the file that was committed ({filesystem.size(file):,} bytes, "
                f"committed with {committed:,}); restore it"
            )
