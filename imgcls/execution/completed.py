"""What is done: chunks and parts found by listing files, and the roll-up of chunks into parts.

A chunk or part exists under its final name only when it is whole, so a listing is the truth and a
resume joins no rows. Rolling up reads a part's chunks in order and writes the same bytes whoever
does it; a part that exists is never written again by a first pass.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgcls.data import filesystem
from imgcls.data.manifest import normalize_labels
from imgcls.data.schemas import conform_table, widen_dictionaries
from imgcls.errors import RunFailed, StorageMissing
from imgcls.execution.messages import ChunkTask
from imgcls.execution.plan import Plan
from imgcls.metrics import PredictionCounts
from imgcls.runs import layout
from imgcls.runs.schema import OK

_GROUP_ROWS = 65_536
_GROUP_BYTES = 64_000_000


@dataclass
class CompletedChunks:
    """Which chunks and parts of a run are durable."""

    output: str
    plan: Plan
    parts: set[int]
    chunks: dict[int, set[int]]  # staged, by part, of parts that are not rolled up yet

    @classmethod
    def load(cls, output: str, plan: Plan) -> CompletedChunks:
        """List what is there."""
        valid = {layout.part_name(part): part for part in range(plan.num_parts)}
        present = filesystem.list_names(filesystem.join(output, layout.PREDICTIONS_FOLDER))
        parts = {valid[name] for name in present if name in valid}
        chunks: dict[int, set[int]] = {}
        with contextlib.suppress(StorageMissing):
            for path in filesystem.walk(filesystem.join(output, layout.STAGING_FOLDER)):
                name = path.rpartition("/")[2]
                if name.startswith("chunk-") and name.endswith(f".{plan.run_id}.parquet"):
                    chunk = int(name[len("chunk-") :].partition(".")[0])
                    if plan.part_of(chunk) not in parts:
                        chunks.setdefault(plan.part_of(chunk), set()).add(chunk)
        return cls(output, plan, parts, chunks)

    @property
    def rows_done(self) -> int:
        rolled = sum(
            len(self.plan.rows_of(chunk))
            for part in self.parts
            for chunk in self.plan.chunks_of(part)
        )
        staged = itertools.chain.from_iterable(self.chunks.values())
        return rolled + sum(len(self.plan.rows_of(chunk)) for chunk in staged)

    def list_remaining(self) -> list[ChunkTask]:
        """The chunks still to be done, in order."""
        return [
            ChunkTask(chunk)
            for part in range(self.plan.num_parts)
            if part not in self.parts
            for chunk in self.plan.chunks_of(part)
            if chunk not in self.chunks.get(part, ())
        ]

    def add(self, chunk: int) -> int | None:
        """Note a chunk; the part that it completes, if any."""
        part = self.plan.part_of(chunk)
        self.chunks.setdefault(part, set()).add(chunk)
        return part if self._is_complete(part) else None

    def list_complete_parts(self) -> list[int]:
        """Parts whose chunks are all staged, but which are not rolled up."""
        return [
            p for p in range(self.plan.num_parts) if p not in self.parts and self._is_complete(p)
        ]

    def mark_rolled_up(self, part: int) -> None:
        """Note a part that is durable, and drop its chunks."""
        self.parts.add(part)
        self.chunks.pop(part, None)
        filesystem.remove(layout.part_staging_folder(self.output, part))

    def _is_complete(self, part: int) -> bool:
        return len(self.chunks.get(part, ())) == len(self.plan.chunks_of(part))


def roll_up(
    output: str, plan: Plan, part: int, label_column: str | None, classes: Sequence[str]
) -> PredictionCounts:
    """Join a part's manifest rows and predictions into its final file; count it on the way.

    Raises RunFailed when the output belongs to another run by now.
    """
    target = layout.part_url(output, part)
    counts = PredictionCounts.empty(tuple(classes))
    with filesystem.open_write(target) as stream:
        for table in _write_row_groups(stream, _join_part(output, plan, part), plan):
            counts += count_table(table, label_column, classes)
        _check_run_owner(output, plan)
    return counts


def write_empty_part(output: str, plan: Plan, table: pa.Table) -> None:
    """The only file of a run without rows, so that readers find its columns."""
    with filesystem.open_write(layout.part_url(output, 0)) as stream:
        pq.write_table(table.replace_schema_metadata({"imgcls.run": plan.run_id}), stream)


def count_part(
    output: str, part: int, label_column: str | None, classes: Sequence[str]
) -> PredictionCounts:
    """Count a part that was rolled up before, reading only the columns that counting needs."""
    wanted = {"predicted_label", "confidence", "accepted", "status", "label_score", "label_rank"}
    counts = PredictionCounts.empty(tuple(classes))
    with filesystem.open_read(layout.part_url(output, part)) as stream:
        file = pq.ParquetFile(stream)
        columns = [n for n in file.schema_arrow.names if n in wanted or n == label_column]
        for batch in file.iter_batches(batch_size=_GROUP_ROWS, columns=columns):
            counts += count_table(pa.Table.from_batches([batch]), label_column, classes)
    return counts


def count_table(
    table: pa.Table, label_column: str | None, classes: Sequence[str]
) -> PredictionCounts:
    """Counts of a table of predictions, its labels read as class names."""
    if label_column is not None:
        index = table.schema.get_field_index(label_column)
        text = normalize_labels(table.column(label_column))
        table = table.set_column(index, label_column, text)
    return PredictionCounts.from_table(table, label_column=label_column, classes=classes)


def list_failed_rows(
    output: str, plan: Plan, columns: Sequence[str], statuses: Collection[str] | None = None
) -> list[ChunkTask]:
    """The rows of rolled-up parts whose status is not ok, as work, chunk by chunk.

    columns:  the manifest's path and label columns, which the work takes along
    statuses: take only rows of these
    """
    work: list[ChunkTask] = []
    for part in range(plan.num_parts):
        failed = pa.concat_tables(
            batch.filter(_is_not_ok(batch) if statuses is None else _has_status(batch, statuses))
            for batch in _read_columns(output, part, ["row", "status", *columns])
        )
        chunks = failed.column("row").to_numpy() // plan.chunk_rows
        for chunk in np.unique(chunks):
            rows = failed.filter(pa.array(chunks == chunk))
            offsets = rows.column("row").to_numpy() - plan.rows_of(int(chunk)).start
            work.append(ChunkTask(int(chunk), tuple(offsets.tolist()), rows.select(columns)))
    return work


def remove_retries(output: str, plan: Plan) -> None:
    """Remove retried rows that an earlier, broken-off retry left behind."""
    for part in range(plan.num_parts):
        filesystem.remove(layout.part_staging_folder(output, part))


def merge_retries(output: str, plan: Plan, part: int, work: Sequence[ChunkTask]) -> None:
    """Replace the retried rows of a part: the file is exchanged whole, never a row missing."""
    retried = pa.concat_tables(
        pq.read_table(filesystem.open_read(layout.retry_url(output, part, item.chunk, plan.run_id)))
        for item in work
    ).combine_chunks()
    rows = retried.column("row").to_numpy()
    target = layout.part_url(output, part)
    with filesystem.open_write(target) as stream:
        for _ in _write_row_groups(stream, _replace_rows(target, retried, rows), plan):
            pass
        _check_run_owner(output, plan)
    filesystem.remove(layout.part_staging_folder(output, part))


def read_failed_rows(output: str, plan: Plan, path_column: str) -> Iterator[pa.Table]:
    """Row, path, status and error of every row that failed, streamed."""
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
        for batch in pq.ParquetFile(stream).iter_batches(_GROUP_ROWS, columns=columns):
            yield pa.Table.from_batches([batch])


def _join_part(output: str, plan: Plan, part: int) -> Iterator[pa.Table]:
    with filesystem.open_read(layout.shard_url(output, part)) as stream:
        shard = pq.ParquetFile(stream)
        for group, chunk in enumerate(plan.chunks_of(part)):
            rows = shard.read_row_group(group)
            rows = conform_table(
                rows, widen_dictionaries(rows.schema), layout.shard_url(output, part)
            )
            with filesystem.open_read(layout.chunk_url(output, part, chunk, plan.run_id)) as file:
                predicted = pq.read_table(file)
            for name in predicted.schema.names:
                rows = rows.append_column(predicted.schema.field(name), predicted.column(name))
            yield rows


def _replace_rows(
    target: str, retried: pa.Table, rows: npt.NDArray[np.int64]
) -> Iterator[pa.Table]:
    with filesystem.open_read(target) as stream:
        for batch in pq.ParquetFile(stream).iter_batches(batch_size=_GROUP_ROWS):
            table = pa.Table.from_batches([batch])
            table = conform_table(table, widen_dictionaries(table.schema), target)
            here = table.column("row").to_numpy()
            position = np.searchsorted(here, rows)
            inside = (position < len(here)) & (here[np.minimum(position, len(here) - 1)] == rows)
            order = np.arange(len(here))
            order[position[inside]] = len(here) + np.flatnonzero(inside)
            for name in retried.schema.names:
                column = _merge_dictionaries(table.column(name), retried.column(name))
                index = table.schema.get_field_index(name)
                table = table.set_column(index, table.schema.field(name), column.take(order))
            yield table


def _merge_dictionaries(old: pa.ChunkedArray, new: pa.ChunkedArray) -> pa.ChunkedArray:
    joined = pa.chunked_array([*old.chunks, *new.chunks], type=old.type)
    return joined.unify_dictionaries().combine_chunks()


def _write_row_groups(stream: object, tables: Iterator[pa.Table], plan: Plan) -> Iterator[pa.Table]:
    """Write tables as row groups of a useful size; yields what each group holds."""
    writer: pq.ParquetWriter | None = None
    gathered: list[pa.Table] = []
    rows = size = 0

    def flush() -> pa.Table:
        nonlocal writer
        group = pa.concat_tables(gathered).unify_dictionaries().combine_chunks()
        if writer is None:
            schema = group.schema.with_metadata({"imgcls.run": plan.run_id})
            writer = closing.enter_context(pq.ParquetWriter(stream, schema, compression="zstd"))
        writer.write_table(group.cast(writer.schema))
        gathered.clear()
        return group

    with contextlib.ExitStack() as closing:
        for table in tables:
            gathered.append(table)
            rows, size = rows + table.num_rows, size + table.nbytes
            if rows >= _GROUP_ROWS or size >= _GROUP_BYTES:
                yield flush()
                rows = size = 0
        if gathered:
            yield flush()


def _check_run_owner(output: str, plan: Plan) -> None:
    """A zombie of a run that was started over must not publish over its successor's files."""
    run = layout.load_run(output)
    if run is None or run["plan"]["run_id"] != plan.run_id:
        raise RunFailed(f"output {output}: belongs to another run by now; nothing was published")
