"""Roll-up of a run's chunks into its final files, which are counted on the way; retries of rows.

A roll-up reads a part's chunks in order and writes the same bytes on every machine. A first pass
never writes a part that exists.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from imgcls.cluster.autoscaler import WaitTimeout
from imgcls.data.manifests.schemas import conform_table, widen_types
from imgcls.data.storage import filesystem, storage_settings
from imgcls.errors import OK, RunFailed
from imgcls.execution.completed import CompletedChunks, read_chunk_table
from imgcls.execution.messages import ChunkTask
from imgcls.execution.placement import ROLLUP_TASK_CPUS
from imgcls.execution.plan import Plan, read_shard_chunk
from imgcls.execution.runner import Driver
from imgcls.formatting import format_count
from imgcls.runs import layout
from imgcls.runs.table_counts import RunCounts, TableCounter, merge_counts

_ROW_GROUP_ROWS = 65_536
_ROW_GROUP_BYTES = 64_000_000
MAX_DRIVER_ROWS = 50_000
"""Runs with at most this many rows are rolled up by the driver: Ray would take longer to start."""


class PartRollup:
    """Rolls parts up and counts them on the cluster during labeling; sums the counts."""

    def __init__(self, driver: Driver, plan: Plan, counter: TableCounter) -> None:
        self._driver = driver
        self._plan = plan
        self._counter = counter
        self._is_local = plan.rows <= MAX_DRIVER_ROWS
        self._rolling: dict[ray.ObjectRef[Any], int] = {}
        self._counting: set[ray.ObjectRef[Any]] = set()
        self._total = counter.empty()
        if self._is_local:
            return
        self._shared_counter: Any = ray.put(counter)
        remote = ray.remote(num_cpus=ROLLUP_TASK_CPUS, max_retries=3)
        self._roll_up = remote(storage_settings.bind_settings(roll_up))
        self._count = remote(storage_settings.bind_settings(count_part))

    def count(self, part: int) -> None:
        """Count a part that is written."""
        output = self._driver.output
        if self._is_local:
            self._add(count_part(output, part, self._counter))
            return
        task = self._count.remote(output, part, self._shared_counter)
        self._counting.add(task)

    def roll_up(self, completed: CompletedChunks, part: int) -> None:
        """Start to roll a part up; marks the parts that have been finished meanwhile."""
        self._driver.lease.check()
        arguments = (self._driver.output, self._plan, part)
        if self._is_local:
            self._add(roll_up(*arguments, self._counter))
            completed.mark_rolled_up(part)
            return
        self._rolling[self._roll_up.remote(*arguments, self._shared_counter)] = part
        self._collect(completed, wait=False)

    def finish(self, completed: CompletedChunks | None) -> RunCounts:
        """Wait for the parts in progress; returns the counts of all parts."""
        self._collect(completed, wait=True)
        return self._total

    def _add(self, counts: RunCounts) -> None:
        self._total = merge_counts(self._total, counts)

    def _collect(self, completed: CompletedChunks | None, *, wait: bool) -> None:
        timeout = WaitTimeout(self._driver.scale.resource_timeout_s)
        last = time.monotonic()
        while self._rolling or self._counting:
            pending = [*self._rolling, *self._counting]
            ready, _ = ray.wait(pending, timeout=0.2 if wait else 0)
            self._driver.interruption.check()
            if not ready and not wait:
                return
            if ready:
                last = time.monotonic()
            timeout.check(
                time.monotonic() - last, f"the roll-up of {format_count(len(pending), 'part')}"
            )
            for task in ready:
                self._add(ray.get(task))
                part = self._rolling.pop(task, None)
                self._counting.discard(task)
                if part is not None and completed is not None:
                    completed.mark_rolled_up(part)


def roll_up(output: str, plan: Plan, part: int, counter: TableCounter) -> RunCounts:
    """Join a part's manifest rows and predictions into its final file; returns its counts.

    Raises RunFailed when the output belongs to another run meanwhile.
    """
    target = layout.part_url(output, part)
    counts = counter.empty()
    with filesystem.open_write(target) as stream:
        for table in write_row_groups(stream, _join_part(output, plan, part), plan):
            counts = merge_counts(counts, counter.count(table))
        _check_run_owner(output, plan)
    return counts


def write_empty_part(output: str, plan: Plan, table: pa.Table) -> None:
    """Write the only file of a run without rows, so that readers find its columns."""
    with filesystem.open_write(layout.part_url(output, 0)) as stream:
        pq.write_table(table.replace_schema_metadata({"imgcls.run": plan.run_id}), stream)


def count_part(output: str, part: int, counter: TableCounter) -> RunCounts:
    """Count a part that was rolled up before; reads only the columns that are needed."""
    counts = counter.empty()
    with filesystem.open_read(layout.part_url(output, part)) as stream:
        file = pq.ParquetFile(stream)
        columns = counter.select_columns(file.schema_arrow)
        for batch in file.iter_batches(batch_size=_ROW_GROUP_ROWS, columns=columns):
            counts = merge_counts(counts, counter.count(pa.Table.from_batches([batch])))
    return counts


def list_failed_rows(
    output: str, plan: Plan, columns: Sequence[str], statuses: Collection[str] | None = None
) -> list[ChunkTask]:
    """The rows of rolled-up parts whose status is not ok, as one task per chunk.

    columns:  the manifest's path and label columns, which the tasks carry
    statuses: only rows with one of these
    """
    tasks: list[ChunkTask] = []
    for part in range(plan.num_parts):
        failed = pa.concat_tables(
            batch.filter(_is_not_ok(batch) if statuses is None else _has_status(batch, statuses))
            for batch in _read_columns(output, part, ["row", "status", *columns])
        )
        chunks = failed.column("row").to_numpy() // plan.chunk_rows
        for chunk in np.unique(chunks):
            rows = failed.filter(pa.array(chunks == chunk))
            offsets = rows.column("row").to_numpy() - plan.rows_of(int(chunk)).start
            tasks.append(ChunkTask(int(chunk), tuple(offsets.tolist()), rows.select(columns)))
    return tasks


def remove_retries(output: str, plan: Plan) -> None:
    """Remove the rows of an earlier retry that was interrupted."""
    for part in range(plan.num_parts):
        filesystem.remove(layout.part_staging_folder(output, part))


def merge_retries(output: str, plan: Plan, part: int, tasks: Sequence[ChunkTask]) -> None:
    """Replace the retried rows of a part: the file is replaced whole, no row is ever missing."""
    retried = pa.concat_tables(
        pq.read_table(filesystem.open_read(layout.retry_url(output, part, task.chunk, plan.run_id)))
        for task in tasks
    ).combine_chunks()
    rows = retried.column("row").to_numpy()
    target = layout.part_url(output, part)
    with filesystem.open_write(target) as stream:
        for _ in write_row_groups(stream, _replace_rows(target, retried, rows), plan):
            pass
        _check_run_owner(output, plan)
    filesystem.remove(layout.part_staging_folder(output, part))


def read_failed_rows(output: str, plan: Plan, path_column: str) -> Iterator[pa.Table]:
    """Row, path, status and error of every row that failed, batch by batch."""
    columns = ["row", path_column, "status", "error"]
    for part in range(plan.num_parts):
        for batch in _read_columns(output, part, columns):
            yield batch.filter(_is_not_ok(batch)).select(columns)


def _is_not_ok(table: pa.Table) -> pa.ChunkedArray:
    return pc.not_equal(table.column("status").cast(pa.string()), OK)


def _has_status(table: pa.Table, statuses: Collection[str]) -> pa.ChunkedArray:
    return pc.is_in(table.column("status").cast(pa.string()), value_set=pa.array(sorted(statuses)))


def _read_columns(output: str, part: int, columns: list[str]) -> Iterator[pa.Table]:
    with filesystem.open_read(layout.part_url(output, part)) as stream:
        for batch in pq.ParquetFile(stream).iter_batches(_ROW_GROUP_ROWS, columns=columns):
            yield pa.Table.from_batches([batch])


def _join_part(output: str, plan: Plan, part: int) -> Iterator[pa.Table]:
    with filesystem.open_read(layout.shard_url(output, part)) as stream:
        shard = pq.ParquetFile(stream)
        for index, chunk in enumerate(plan.chunks_of(part)):
            rows = read_shard_chunk(shard, plan, index)
            rows = conform_table(rows, widen_types(rows.schema), layout.shard_url(output, part))
            predicted = read_chunk_table(layout.chunk_url(output, part, chunk, plan.run_id))
            for name in predicted.schema.names:
                rows = rows.append_column(predicted.schema.field(name), predicted.column(name))
            yield rows


def _replace_rows(
    target: str, retried: pa.Table, rows: npt.NDArray[np.int64]
) -> Iterator[pa.Table]:
    with filesystem.open_read(target) as stream:
        for batch in pq.ParquetFile(stream).iter_batches(batch_size=_ROW_GROUP_ROWS):
            table = pa.Table.from_batches([batch])
            table = conform_table(table, widen_types(table.schema), target)
            present = table.column("row").to_numpy()
            position = np.searchsorted(present, rows)
            inside = (position < len(present)) & (
                present[np.minimum(position, len(present) - 1)] == rows
            )
            order = np.arange(len(present))
            order[position[inside]] = len(present) + np.flatnonzero(inside)
            for name in retried.schema.names:
                column = _merge_dictionaries(table.column(name), retried.column(name))
                index = table.schema.get_field_index(name)
                table = table.set_column(index, table.schema.field(name), column.take(order))
            yield table


def _merge_dictionaries(old: pa.ChunkedArray, new: pa.ChunkedArray) -> pa.ChunkedArray:
    joined = pa.chunked_array([*old.chunks, *new.chunks], type=old.type)
    return joined.unify_dictionaries().combine_chunks()


def write_row_groups(stream: object, tables: Iterator[pa.Table], plan: Plan) -> Iterator[pa.Table]:
    """Write tables as row groups of a useful size; yields the table of each group."""
    writer: pq.ParquetWriter | None = None
    pending: list[pa.Table] = []
    rows = size = 0

    def flush() -> pa.Table:
        nonlocal writer
        group = pa.concat_tables(pending).unify_dictionaries().combine_chunks()
        if writer is None:
            schema = group.schema.with_metadata({"imgcls.run": plan.run_id})
            encoded = _list_dictionary_columns(schema)
            writer = closing.enter_context(
                pq.ParquetWriter(stream, schema, compression="zstd", use_dictionary=encoded)
            )
        writer.write_table(group.cast(writer.schema))
        pending.clear()
        return group

    with contextlib.ExitStack() as closing:
        for table in tables:
            pending.append(table)
            rows, size = rows + table.num_rows, size + table.nbytes
            if rows >= _ROW_GROUP_ROWS or size >= _ROW_GROUP_BYTES:
                yield flush()
                rows = size = 0
        if pending:
            yield flush()


def _list_dictionary_columns(schema: pa.Schema) -> list[str]:
    """Paths of the columns to encode by dictionaries: all but those whose numbers never repeat.

    Parquet would collect the numbers of scores and embeddings in a dictionary before it gives it
    up in each row group, and they would take up to three times as long to read.
    """
    empty = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), empty)
    paths = pq.ParquetFile(empty.getvalue()).schema
    names = [paths.column(index).path for index in range(len(paths))]
    return [name for name in names if name.split(".")[0] not in ("scores", "embedding")]


def _check_run_owner(output: str, plan: Plan) -> None:
    """Raise RunFailed when the output was started over: its files belong to the new run."""
    run = layout.load_run(output)
    if run is None or run["plan"]["run_id"] != plan.run_id:
        raise RunFailed(f"output {output}: belongs to another run now; nothing was published")
