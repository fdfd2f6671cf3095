"""The plan of a run: its manifest, streamed once into shards of fixed-size chunks; its identity.

Owns `_run.json` and the manifest shards. A chunk is one or more row groups of one shard, so a
worker reads only its own rows, whatever the size of the manifest, and a manifest that changes
during the run changes nothing. Memory is bounded. A resumed run is the same run, or is refused.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgcls import log
from imgcls.data.containers import archive_index
from imgcls.data.manifests.label_columns import describe_no_labels
from imgcls.data.manifests.manifest import Manifest, log_label_variants, normalize_labels
from imgcls.data.storage import filesystem
from imgcls.errors import ManifestError, OutputError
from imgcls.formatting import format_count
from imgcls.runs import layout

DEFAULT_CHUNK_ROWS = 256
"""Rows per chunk, and per row group of a shard, of all but small manifests."""
MAX_CHUNK_ROWS = 4096
"""Maximum number of rows per chunk of a large manifest. A chunk costs the driver 1 KB and several
requests; a worker that is killed loses up to one chunk."""
MIN_GROWN_CHUNKS = 8192
"""Minimum number of chunks with more than 256 rows: eight for each of a thousand workers."""
MIN_CHUNKS_PER_PART = 16
"""Minimum number of chunks with more than 256 rows in a whole part."""
CHUNKS_PER_WORKER = 32
"""Number of chunks per worker of a small manifest: at the end a worker waits for a part of one."""
MAX_SMALL_MANIFEST_ROWS = 16 * CHUNKS_PER_WORKER * DEFAULT_CHUNK_ROWS
"""Maximum number of rows of a small manifest, which are held in memory, for many workers."""
MAX_PART_BYTES = 128_000_000


@dataclass(frozen=True)
class Plan:
    """How a manifest is split: parts (final files) of chunks (units of work) of rows.

    rows, chunk_rows, part_rows count manifest rows; part_rows is a multiple of chunk_rows. Written
    to `_run.json` under these names.
    """

    run_id: str
    rows: int
    chunk_rows: int
    part_rows: int

    @property
    def num_chunks(self) -> int:
        """Number of chunks."""
        return -(-self.rows // self.chunk_rows)

    @property
    def num_parts(self) -> int:
        """Number of parts."""
        return -(-self.rows // self.part_rows)

    def part_of(self, chunk: int) -> int:
        """The part that a chunk belongs to."""
        return chunk * self.chunk_rows // self.part_rows

    def chunks_of(self, part: int) -> range:
        """The chunks of a part."""
        per_part = self.part_rows // self.chunk_rows
        return range(part * per_part, min(self.num_chunks, (part + 1) * per_part))

    def rows_of(self, chunk: int) -> range:
        """The manifest rows of a chunk."""
        start = chunk * self.chunk_rows
        return range(start, min(self.rows, start + self.chunk_rows))

    def rows_of_part(self, part: int) -> range:
        """The manifest rows of a part."""
        start = part * self.part_rows
        return range(start, min(self.rows, start + self.part_rows))


@dataclass(frozen=True)
class RunIdentity:
    """What makes two runs the same run; written to `_run.json` under these names."""

    manifest: dict[str, Any]
    bundle: dict[str, Any]
    settings: dict[str, Any]

    def compute_run_id(self) -> str:
        """A hash of the identity, which names the run."""
        body = json.dumps(asdict(self), sort_keys=True).encode()
        return hashlib.blake2b(body, digest_size=6).hexdigest()

    def find_differences(self, stored: Mapping[str, Any]) -> list[str]:
        """One line for each value that differs from the stored one."""
        lines = []
        for section, now in asdict(self).items():
            then = stored.get(section, {})
            for key in sorted({*now, *then}):
                if now.get(key) != then.get(key):
                    lines.append(f"{section}.{key}: {then.get(key)!r} then, {now.get(key)!r} now")
        return lines

    def check_same_run(self, output: str, stored: Mapping[str, Any]) -> None:
        """Raise OutputError, with the differences, when an output holds another run."""
        differences = self.find_differences(stored)
        if differences:
            lines = "\n".join(f"  {line}" for line in differences)
            version = stored.get("manifest", {}).get("version")
            pin = ""
            if version is not None and version != self.manifest.get("version"):
                pin = f". To resume it, append @{version} to the table that is the manifest"
            raise OutputError(
                f"output {output}: holds another run:\n{lines}\n"
                f"Pass another --output, or start over with --overwrite{pin}"
            )


def parse_plan(run: Mapping[str, Any]) -> Plan:
    """The plan in a `_run.json`."""
    return Plan(**run["plan"])


def make_plan(
    output: str,
    manifest: Manifest,
    identity: RunIdentity,
    *,
    chunk_rows: int | None,
    part_rows: int,
    row_bytes: int,
    limit: int | None,
    provenance: Mapping[str, Any],
    classes: list[str] | None,
    max_chunk_rows: int = MAX_CHUNK_ROWS,
    workers: int = 1,
    may_be_empty: bool = False,
    any_labels: bool = False,
    notes: Mapping[str, Any] | None = None,
) -> Plan:
    """Stream the manifest into shards below `output`, then write `_run.json`.

    chunk_rows, part_rows, row_bytes, max_chunk_rows, workers: see `choose_sizes`
    limit:      number of rows to take from the start of the manifest
    classes:    of the model, if the run has one
    any_labels: accept labels of which none is a class of the model
    notes:      more entries of `_run.json`
    Raises ManifestError when it has no row, or no label that is a class of the model.
    """
    with archive_index.use_index_folder(layout.index_folder(output)):
        head, rest = _read_first_rows(manifest, _get_small_manifest_rows(workers), limit)
    if head.num_rows == 0 and not may_be_empty:
        raise ManifestError(f"manifest {manifest.source}: has no rows")
    choose = functools.partial(
        choose_sizes,
        chunk_rows=chunk_rows,
        part_rows=part_rows,
        row_bytes=row_bytes,
        max_chunk_rows=max_chunk_rows,
        workers=workers,
    )
    labels = None if classes is None else _LabelChecker(manifest, classes)
    tables: Iterator[pa.Table] = itertools.chain((head,), rest)
    if labels is not None:
        tables = labels.iter_counted(tables)
    rows = _write_shards(output, manifest, tables, *choose(head.num_rows))
    if labels is not None:
        labels.check(refuse=not any_labels)
    # parts of the same size, now that the number of rows is known
    plan = Plan(identity.compute_run_id(), rows, *choose(rows))
    run = {
        "identity": asdict(identity),
        "plan": asdict(plan),
        "provenance": dict(provenance),
        "classes": classes or [],
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **(notes or {}),
    }
    layout.write_run(output, run)
    return plan


def restore_shards(output: str, manifest: Manifest, plan: Plan) -> None:
    """Write a run's manifest shards again if some are missing, as after a killed start-over."""
    present = filesystem.list_names(filesystem.parent(layout.shard_url(output, 0)))
    if {layout.part_name(part) for part in range(plan.num_parts)} <= set(present):
        return
    tables = _limit_rows(manifest, plan.rows)
    _write_shards(output, manifest, tables, plan.chunk_rows, plan.part_rows)


def _write_shards(
    output: str, manifest: Manifest, tables: Iterator[pa.Table], chunk_rows: int, part_rows: int
) -> int:
    """Write one shard per part; returns the number of rows."""
    with (
        archive_index.use_index_folder(layout.index_folder(output)),
        _ShardWriter(output, manifest.schema, chunk_rows, part_rows) as writer,
    ):
        for table in tables:
            writer.add(table)
    return writer.rows


def read_shard_chunk(shard: pq.ParquetFile, plan: Plan, index: int) -> pa.Table:
    """The manifest rows of a chunk, read from its shard.

    index: of the chunk in its part
    """
    group_rows = shard.metadata.row_group(0).num_rows  # fewer only where it is the shard's only one
    count = max(1, plan.chunk_rows // group_rows)
    groups = range(index * count, min((index + 1) * count, shard.num_row_groups))
    table: pa.Table = shard.read_row_groups(groups)
    return table


def choose_sizes(
    rows: int,
    *,
    chunk_rows: int | None,
    part_rows: int,
    row_bytes: int,
    max_chunk_rows: int = MAX_CHUNK_ROWS,
    workers: int = 1,
) -> tuple[int, int]:
    """Rows per chunk and per part of a manifest.

    A small manifest has chunks of less than 256 rows, to keep every worker busy to the end. From
    MIN_GROWN_CHUNKS chunks of 512 rows on they double with the manifest, because each chunk costs
    requests, and memory and time of the driver. The size of a part is the same for all manifests
    that are not small: it is needed before their rows are counted.

    chunk_rows:     rows per chunk, if it is set
    part_rows:      maximum number of rows of a final file
    row_bytes:      expected size of an output row in Parquet, in bytes
    max_chunk_rows: limit of the chunks' growth
    workers:        processes that share the chunks
    """
    largest = min(part_rows, max(1, MAX_PART_BYTES // row_bytes))
    if chunk_rows is None and rows >= _get_small_manifest_rows(workers):
        usual = min(largest, DEFAULT_CHUNK_ROWS)
        limit = _double(usual, min(MAX_CHUNK_ROWS, largest // MIN_CHUNKS_PER_PART))
        chunk = _double(usual, min(limit, max_chunk_rows, rows // MIN_GROWN_CHUNKS))
        return chunk, largest // limit * limit
    share = -(-rows // (CHUNKS_PER_WORKER * workers))
    chunk = min(largest, chunk_rows or max(32, -(-share // 32) * 32))  # whole batches of 32
    return chunk, largest // chunk * chunk


def _get_small_manifest_rows(workers: int) -> int:
    """The number of rows from which on a manifest is not small."""
    return min(MAX_SMALL_MANIFEST_ROWS, CHUNKS_PER_WORKER * workers * DEFAULT_CHUNK_ROWS)


def _double(rows: int, limit: int) -> int:
    """Double as often as the limit allows."""
    while 2 * rows <= limit:
        rows *= 2
    return rows


def _get_group_rows(chunk_rows: int) -> int:
    """Rows per row group of a shard: it is written before the size of its chunks is known."""
    return chunk_rows if chunk_rows % DEFAULT_CHUNK_ROWS else DEFAULT_CHUNK_ROWS


def _read_first_rows(
    manifest: Manifest, count: int, limit: int | None
) -> tuple[pa.Table, Iterator[pa.Table]]:
    """The first `count` rows as one table, and the others as an iterator."""
    batches = _limit_rows(manifest, limit)
    tables: list[pa.Table] = []
    rows = 0
    for table in batches:
        tables.append(table)
        rows += table.num_rows
        if rows >= count:
            break
    return pa.concat_tables(tables) if tables else manifest.schema.empty_table(), batches


def _limit_rows(manifest: Manifest, limit: int | None) -> Iterator[pa.Table]:
    left = limit
    for batch in manifest.batches():
        table = pa.Table.from_batches([batch])
        if left is None:
            yield table
            continue
        if left <= 0:
            return
        yield table.slice(0, left)
        left -= table.num_rows


class _ShardWriter:
    """Writes a stream of tables into shard files of whole chunks, of one or more row groups each.

    On an error the shard in progress leaves no file.
    """

    def __init__(self, output: str, schema: pa.Schema, chunk_rows: int, part_rows: int) -> None:
        self.rows = 0
        self._output = output
        self._schema = schema
        self._group_rows = _get_group_rows(chunk_rows)
        self._part_rows = part_rows
        self._buffer: list[pa.Table] = []
        self._buffered = 0
        self._shard = contextlib.ExitStack()
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._shard.__exit__(kind, error, trace)
            return
        if self._buffered:
            self._write(pa.concat_tables(self._buffer).combine_chunks())
        with filesystem.translate_os_errors(self._output):
            self._shard.close()

    def add(self, table: pa.Table) -> None:
        self._buffer.append(table)
        self._buffered += table.num_rows
        if self._buffered >= self._group_rows:
            whole = pa.concat_tables(self._buffer).combine_chunks()
            start = 0
            while whole.num_rows - start >= self._group_rows:
                self._write(whole.slice(start, self._group_rows))
                start += self._group_rows
            rest = whole.slice(start)
            self._buffer, self._buffered = ([rest] if rest.num_rows else []), rest.num_rows

    def _write(self, group: pa.Table) -> None:
        url = layout.shard_url(self._output, self.rows // self._part_rows)
        with filesystem.translate_os_errors(url):
            if self.rows % self._part_rows == 0:
                self._shard.close()
                stream = self._shard.enter_context(filesystem.open_write(url))
                self._writer = self._shard.enter_context(
                    pq.ParquetWriter(
                        stream, self._schema, compression="zstd", write_statistics=False
                    )
                )
            assert self._writer is not None
            self._writer.write_table(group, row_group_size=self._group_rows)
        self.rows += group.num_rows


class _LabelChecker:
    """Counts the labels of a manifest; refuses it when none of them is a class of the model."""

    def __init__(self, manifest: Manifest, classes: list[str]) -> None:
        self._manifest = manifest
        self._classes = {unicodedata.normalize("NFC", name) for name in classes}
        self._unknown: Counter[str] = Counter()
        self._known = 0

    def iter_counted(self, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """The tables, whose labels are counted."""
        for table in tables:
            for name, count in self._count_labels(table).items():
                if name in self._classes:
                    self._known += count
                elif count:
                    self._unknown[name] += count
            yield table

    def _count_labels(self, table: pa.Table) -> Mapping[str, int]:
        manifest = self._manifest
        if manifest.label_columns is not None:
            return manifest.label_columns.count_names(table, f"manifest {manifest.source}")
        if manifest.label_column is None:
            return {}
        counted = pc.value_counts(normalize_labels(table.column(manifest.label_column)))
        entries = counted.to_pylist()
        return {each["values"]: each["counts"] for each in entries if each["values"] is not None}

    def check(self, *, refuse: bool) -> None:
        if not self._unknown:
            return
        examples = ", ".join(repr(name) for name in list(self._unknown)[:3])
        if refuse and not self._known:
            classes = sorted(self._classes)
            shown = ", ".join(repr(name) for name in classes[:3])
            if self._manifest.format == "tree":
                raise ManifestError(
                    f"manifest {self._manifest.source}: none of its folders has the name of a "
                    f"class of the model (found {examples}; the model has {shown}, "
                    f"{format_count(len(classes), 'class', 'classes')}). Pass --manifest.format "
                    "images to label all images below it, or use the bundle trained on these "
                    "classes"
                )
            columns = self._manifest.find_label_columns()
            assert columns is not None
            raise ManifestError(
                f"manifest {self._manifest.source}: no label in {columns.describe()} is a class of "
                f"the model (found {examples}; the model has {shown}, "
                f"{format_count(len(classes), 'class', 'classes')}). Use the bundle trained on "
                "these classes, name other columns, or read no labels: "
                f"{describe_no_labels(columns)}"
            )
        log_label_variants(f"manifest {self._manifest.source}", self._unknown, self._classes)
        log.emit(
            "note",
            f"{format_count(self._unknown.total(), 'label')} not among the classes of the model "
            f"({examples}); these rows are labeled, and counted separately in the metrics",
        )
