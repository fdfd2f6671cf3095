"""Tables on disk of the images that earlier runs know: path, version, status and night of each row.

`--since` and `history compact` query these tables (DuckDB), so that memory does not grow with the
rows. Also reads and writes `_since/` in a run's folder: the results of the comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgcls.data.manifests.image_columns import has_bytes
from imgcls.data.manifests.image_urls import normalize_urls, resolve_urls
from imgcls.data.manifests.manifest import Manifest
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import bind_iterator
from imgcls.errors import OK, StorageForbidden, StorageMissing, StorageThrottled, StorageUnavailable
from imgcls.inference.nights import PlannedRun, RunOrder, compute_run_order, find_origins
from imgcls.runs import layout
from imgcls.runs.committed import CommittedRun, is_scalar_type, iter_tables

TRANSIENT_STATUSES = frozenset(
    error.status
    for error in (StorageMissing, StorageForbidden, StorageThrottled, StorageUnavailable)
)
"""Statuses that do not depend on an image's bytes: the next run retries these rows."""

DELETED, KNOWN_BAD, FAILED_BEFORE = "deleted", "known_bad", "failed_before"
ROWS_WITHOUT_PATH = "rows_without_path"
"""Key of `_run.json`: their number in the listed manifest."""
"""Tables in `_since/`: images that the listing lacks, broken images that were not tried again, and
rows of the run whose image had failed before."""

_DUCKDB_MEMORY = "1GB"


class KnownImages:
    """Tables of known rows, on disk. `place` is a hash of the absolute path, `nth` a row number.

    version: columns whose change means another image
    nulls:   whether a null version is a value, instead of unknown
    """

    def __init__(self, folder: str, version: Sequence[str] = (), *, nulls: bool = False) -> None:
        import duckdb  # 0.1 s to import, only where it is needed

        self.version = list(version)
        self.statuses: list[str] = [OK]
        """By code: the index in the list."""
        self._nulls = nulls
        self.db = duckdb.connect(str(Path(folder) / "keys.duckdb"))
        self.db.execute(f"SET memory_limit = '{_DUCKDB_MEMORY}'")
        self.db.execute(f"SET temp_directory = '{folder}/spilled'")
        self.db.execute("SET preserve_insertion_order = false")
        versions = "".join(f"v{at} UBIGINT, " for at in range(len(version)))
        known = f"place UHUGEINT, {versions}status UTINYINT, current BOOLEAN, below BOOLEAN, "
        numbered = "night BIGINT, source BIGINT, nth BIGINT"
        for table, columns in (
            ("known", known + numbered),
            ("refused", known + numbered),
            ("listed", f"place UHUGEINT, {versions}nth BIGINT"),
            ("planned", f"place UHUGEINT, {numbered}"),
            ("gone", "place UHUGEINT, night BIGINT"),
        ):
            self.db.execute(f"CREATE TABLE {table} ({columns})")

    def add_run(
        self,
        run: CommittedRun,
        source: int,
        nights: Mapping[str, int],
        bundle_sha256: str | None = None,
        below: str | None = None,
    ) -> None:
        """Add the rows of a run.

        source: number of the run
        nights: rank of each night by URL, later ones higher
        below:  a folder; whether an image lies in it is stored
        """
        # in a predict run, a column of this name comes from the manifest
        own = ["run", "bundle_sha256"] if run.merged_runs else []
        have = [name for name in self.version if name in run.schema.names]
        names = list(dict.fromkeys([run.path_column, "status", *have, *own]))
        newest = nights[max(find_origins(run).items(), key=lambda each: each[1])[0]]

        def rows() -> Iterator[pa.RecordBatch]:
            start = 0
            for table in iter_tables(run, names):
                size = table.num_rows
                night = pa.array(np.full(size, newest))
                current = pa.array(np.full(size, run.bundle_sha256 == bundle_sha256))
                if own:
                    # lower than the run itself, whose rows may have been labeled again since
                    night = pc.subtract(_find_ranks(table["run"], nights, newest), 1)
                    current = pc.equal(table["bundle_sha256"].cast(pa.string()), bundle_sha256)
                place = resolve_urls(table[run.path_column], run.root)
                yield from _iter_record_batches(
                    {
                        "place": place,
                        **self._build_versions(table),
                        "status": self._encode_statuses(table["status"]),
                        "current": pa.array(np.ones(size, bool)) if not bundle_sha256 else current,
                        "below": _is_below(place, below),
                        "night": night,
                        "source": pa.array(np.full(size, source)),
                        "nth": pa.array(np.arange(start, start + size)),
                    },
                    self._build_input_schema(
                        "status", "current", "below", "night", "source", "nth"
                    ),
                )
                start += size

        self._insert("known", rows(), "status", "current", "below", "night", "source", "nth")

    def add_deleted(self, run: CommittedRun, nights: Mapping[str, int]) -> None:
        """Add the images that a run found deleted."""
        if not run.run_record.get("since", {}).get(DELETED) or run.merged_runs:
            return
        table = read_since_table(run.url, DELETED)
        night = pa.array(np.full(table.num_rows, nights[run.url]))
        columns = {"place": normalize_urls(table["path"]), "night": night}
        self._insert(
            "gone",
            _iter_record_batches(columns, _build_schema(["place"], "night")),
            "night",
            versions=0,
        )

    def add_planned(self, run: PlannedRun, source: int, night: int, below: str) -> None:
        """Add the images below a folder that an unfinished run will label."""
        path, root = find_path_column(run)

        def rows() -> Iterator[pa.RecordBatch]:
            start = 0
            for table in read_planned_rows(run):
                place = resolve_urls(table[path], root)
                nth = np.arange(start, start + table.num_rows)
                inside = _is_below(place, below)
                columns = {
                    "place": place.filter(inside),
                    "night": pa.array(np.full(table.num_rows, night)).filter(inside),
                    "source": pa.array(np.full(table.num_rows, source)).filter(inside),
                    "nth": pa.array(nth).filter(inside),
                }
                start += table.num_rows
                yield from _iter_record_batches(
                    columns, _build_schema(["place"], "night", "source", "nth")
                )

        self._insert("planned", rows(), "night", "source", "nth", versions=0)

    def add_refused(self, run: PlannedRun, night: int) -> None:
        """Add the broken images of a refused run, which have been reported by the refusal.

        A row without a path is one of them: no later try can succeed.
        """
        path, root = find_path_column(run)

        def rows() -> Iterator[pa.RecordBatch]:
            for part in range(run.plan.num_parts):
                with filesystem.open_read(layout.part_url(run.url, part)) as opened:
                    file = pq.ParquetFile(opened)
                    have = [n for n in self.version if n in file.schema_arrow.names]
                    names = list(dict.fromkeys([path, "status", *have]))
                    for batch in file.iter_batches(columns=names):
                        table = pa.Table.from_batches([batch])
                        status = table["status"].cast(pa.string())
                        fine = pc.is_in(status, value_set=pa.array([OK, *TRANSIENT_STATUSES]))
                        bad = table.filter(pc.or_(pc.invert(fine), pc.is_null(table[path])))
                        columns = {
                            "place": resolve_urls(bad[path], root),
                            **self._build_versions(bad),
                            "night": pa.array(np.full(bad.num_rows, night)),
                        }
                        yield from _iter_record_batches(columns, self._build_input_schema("night"))

        self._insert("refused", rows(), "night")

    def add_manifest(self, manifest: Manifest) -> None:
        """Add the rows of a manifest."""

        def rows() -> Iterator[pa.RecordBatch]:
            start = 0
            for batch in manifest.batches():
                table = pa.Table.from_batches([batch])
                columns = {
                    "place": resolve_urls(table[manifest.path_column], manifest.root),
                    **self._build_versions(table),
                    "nth": pa.array(np.arange(start, start + table.num_rows)),
                }
                start += table.num_rows
                yield from _iter_record_batches(columns, self._build_input_schema("nth"))

        self._insert("listed", rows(), "nth")

    def iter_column(self, query: str) -> Iterator[np.ndarray]:
        """The first column of a query, array by array."""
        found: Any = self.db.sql(query)
        for batch in found.to_arrow_reader(1 << 20):
            yield batch.column(0).to_numpy(zero_copy_only=False)

    def read_counts(self, query: str) -> dict[Any, int]:
        """The result of a query for keys and counts."""
        return dict(self.db.execute(query).fetchall())

    def _build_versions(self, table: pa.Table) -> dict[str, Any]:
        return {
            f"v{at}": normalize_version(table[name], nulls=self._nulls)
            if name in table.schema.names and is_version_type(table.schema.field(name).type)
            else pa.nulls(table.num_rows, pa.large_string())
            for at, name in enumerate(self.version)
        }

    def get_code(self, status: str) -> int:
        """The code of a status."""
        self._add_statuses([status])
        return self.statuses.index(status)

    def _add_statuses(self, names: Iterable[str]) -> None:
        self.statuses += sorted({*names} - {*self.statuses})

    def _encode_statuses(self, status: pa.ChunkedArray) -> pa.ChunkedArray:
        text = status.cast(pa.string())
        self._add_statuses(str(name) for name in pc.unique(text).to_pylist() if name)
        return pc.index_in(text, value_set=pa.array(self.statuses))

    def _build_input_schema(self, *numbers: str) -> pa.Schema:
        return _build_schema(["place", *(f"v{at}" for at in range(len(self.version)))], *numbers)

    def _insert(
        self, table: str, rows: Iterator[pa.RecordBatch], *names: str, versions: int | None = None
    ) -> None:
        count = len(self.version) if versions is None else versions
        schema = _build_schema(["place", *(f"v{at}" for at in range(count))], *names)
        digests = [f"coalesce(md5_number_lower(v{at}), 0) AS v{at}" for at in range(count)]
        columns = ", ".join(["md5_number(place) AS place", *digests, *names])
        failed: list[Exception] = []

        def watched() -> Iterator[pa.RecordBatch]:
            try:
                yield from rows
            except Exception as error:
                failed.append(error)
                raise

        incoming = bind_iterator(watched())  # DuckDB reads it in its own threads
        self.db.register("incoming", pa.RecordBatchReader.from_batches(schema, incoming))
        try:
            self.db.execute(f"INSERT INTO {table} BY NAME SELECT {columns} FROM incoming")
        except Exception:
            if failed:  # DuckDB replaces errors of its input by its own
                raise failed[0] from None
            raise
        finally:
            self.db.unregister("incoming")


_COLUMN_TYPES = {"current": pa.bool_(), "below": pa.bool_()}


def _build_schema(texts: Sequence[str], *numbers: str) -> pa.Schema:
    fields = [pa.field(name, pa.large_string()) for name in texts]
    return pa.schema([*fields, *((name, _COLUMN_TYPES.get(name, pa.int64())) for name in numbers)])


def _find_ranks(urls: pa.ChunkedArray, nights: Mapping[str, int], otherwise: int) -> pa.Array:
    """The rank of each row's night, `otherwise` for an unknown night."""
    names = pa.array(list(nights), pa.string())
    at = pc.index_in(urls.cast(pa.string()), value_set=names)
    return pc.fill_null(pa.array(list(nights.values()), pa.int64()).take(at), otherwise)


def _is_below(place: pa.ChunkedArray, below: str | None) -> Any:
    if below is None:
        return pa.array(np.zeros(len(place), bool))
    return pc.fill_null(pc.starts_with(place, pattern=below.rstrip("/") + "/"), False)


def rank_runs(
    runs: Sequence[CommittedRun], unfinished: Sequence[PlannedRun] = ()
) -> dict[str, int]:
    """An even rank for each night by its URL, those of merged runs included."""
    orders: dict[str, RunOrder] = {run.url: run.order for run in unfinished}
    for run in runs:
        for url, order in find_origins(run).items():
            orders[url] = max(order, orders.get(url, order))
        orders.setdefault(run.url, compute_run_order(run))
    rank = {order: 2 * number for number, order in enumerate(sorted(set(orders.values())), 1)}
    return {url: rank[order] for url, order in orders.items()}


def take_rows(tables: Iterator[pa.Table], positions: Iterator[np.ndarray]) -> Iterator[pa.Table]:
    """The rows of a stream of tables at some positions, which must ascend."""
    waiting = np.zeros(0, np.int64)
    start = 0
    for table in tables:
        end = start + table.num_rows
        while (not len(waiting) or waiting[-1] < end) and (
            more := next(positions, None)
        ) is not None:
            waiting = np.concatenate([waiting, more])
        here = int(np.searchsorted(waiting, end))
        if here:
            yield table.take(waiting[:here] - start)
        waiting, start = waiting[here:], end


def find_path_column(run: PlannedRun) -> tuple[str, str]:
    """The path column of a planned run, and the root of its relative paths."""
    manifest = run.run_record["identity"]["manifest"]
    return manifest["path_column"], manifest["root"]


def read_planned_rows(run: PlannedRun, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The manifest rows of a planned run, in order, with its prediction columns if it has any.

    columns: read only these
    """
    for file in run.files:
        with filesystem.open_read(file) as opened:
            for batch in pq.ParquetFile(opened).iter_batches(columns=columns):
                yield pa.Table.from_batches([batch])


def read_since_table(output: str, name: str) -> pa.Table:
    """Read a table of a run's `_since/`."""
    with filesystem.open_read(get_since_table_url(output, name)) as opened:
        return pq.read_table(opened)


def get_since_table_url(output: str, name: str) -> str:
    """The URL of a table in a run's `_since/`."""
    return filesystem.join(output, layout.SINCE_FOLDER, f"{name}.parquet")


def is_version_type(kind: pa.DataType) -> bool:
    """Whether a column of this type can be compared as a version: bytes can, lists cannot."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return is_scalar_type(kind) or has_bytes(kind)


def normalize_version(column: pa.ChunkedArray, *, nulls: bool = False) -> pa.ChunkedArray:
    """A version column as text; equal values of different types or units get equal text.

    column: of a type that `is_version_type` accepts
    nulls:  whether a null gets its own text
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        column = column.cast(kind)
    if isinstance(kind, pa.BaseExtensionType):  # such as a UUID
        kind = kind.storage_type
        column = column.cast(kind)
    if pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp("us", kind.tz), safe=False).cast(pa.int64())
    if pa.types.is_floating(kind):
        text = _format_floats(column)
    elif has_bytes(kind):
        text = _format_bytes(column)
    else:
        text = column.cast(pa.large_string())
    return pc.fill_null(text, "\0") if nulls else text


def _format_floats(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whole floats as integers: pandas turns a column of integers with a gap into floats."""
    values = column.cast(pa.float64())
    is_whole = pc.and_(pc.equal(pc.floor(values), values), pc.less(pc.abs(values), 2.0**63))
    whole = pc.if_else(is_whole, values, 0.0).cast(pa.int64()).cast(pa.large_string())
    return pc.if_else(is_whole, whole, column.cast(pa.large_string()))


def _format_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Bytes as text where they are UTF-8, else as hexadecimal digits."""
    try:
        return column.cast(pa.large_binary()).cast(pa.large_string())
    except pa.ArrowInvalid:
        return pa.chunked_array(
            [pa.array(map(_format_value, column.to_pylist()), pa.large_string())]
        )


def _format_value(value: bytes | None) -> str | None:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.hex()


def _iter_record_batches(columns: Mapping[str, Any], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    table = pa.table([columns[name] for name in schema.names], names=schema.names)
    yield from table.cast(schema).to_batches()
