"""What a manifest has that earlier runs have not: new rows, changed ones, and those that failed.

The manifest is held against what is known in tables on disk, so memory does not grow with either.
Rows come through in the manifest's order and with its types; the run over them is one like any
other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgcls import output as layout
from imgcls.config import Names, Section
from imgcls.data import storage
from imgcls.data.manifest import Manifest, resolved
from imgcls.errors import ManifestError, OutputError, StorageMissing
from imgcls.log import tell
from imgcls.runs import Run, open_run, stream

USUAL_VERSIONS = ("etag", "size", "mtime", "version")
"""Columns that tell whether a file is still the same, where manifest and earlier runs have them."""

_MEMORY = "1GB"


class SinceConfig(Section):
    """Earlier runs, whose good rows need not be labelled again."""

    shorthand: ClassVar[str | None] = "path"

    path: str
    """A run, a folder of runs such as labels/ above labels/date=.../, or a compacted history."""
    version: Names = []
    """Manifest columns whose change means another image; etag, size, mtime, version if none."""


def only_new(
    manifest: Manifest, config: SinceConfig, *, output: str, bundle_sha256: str, relabel: bool
) -> Manifest:
    """The manifest without the rows that earlier runs have labelled well and that have not changed.

    output:  a run there is not an earlier one
    relabel: take rows that another bundle has labelled as well
    Raises OutputError when there is no earlier run, ManifestError when a version column is missing.
    """
    runs = earlier_runs(config.path, but=output)
    if not runs:
        raise OutputError(
            f"since {config.path}: holds no committed run; give the output of `imgcls predict`, a "
            "folder of such, or leave --since out the first time"
        )
    version = _version_columns(manifest, config, runs[-1])
    digest = hashlib.blake2b(digest_size=16)
    told = [manifest.fingerprint(), *version, bundle_sha256 if relabel else ""]
    for text in (*told, *(run.success["run_id"] + run.success["committed"] for run in runs)):
        digest.update(f"{len(text)}:{text}".encode())
    others = sum(run.bundle_sha256 != bundle_sha256 for run in runs)
    if others and not relabel:
        tell(
            "note",
            f"{others:,} of {len(runs):,} earlier runs are of another bundle; their rows "
            "stay as they are, say --relabel to label them again",
        )
    return dataclasses.replace(
        manifest,
        _batches=lambda: _new_rows(manifest, runs, version, bundle_sha256 if relabel else None),
        _digest=digest.hexdigest,
    )


def earlier_runs(url: str, but: str | None = None) -> list[Run]:
    """The committed runs in a folder or below it, in the order of their commits."""
    url = storage.absolute(url)
    if storage.exists(storage.join(url, layout.SUCCESS)):
        found = [url]
    else:
        found = []
        with contextlib.suppress(StorageMissing):
            names = {name.rpartition("/")[::2] for name in storage.walk(url)}
            # other tools write files of that name too
            committed = {folder for folder, name in names if name == layout.SUCCESS}
            runs_here = {folder for folder, name in names if name == layout.RUN}
            found = [storage.join(url, folder) for folder in committed & runs_here]
    runs = [open_run(each) for each in found if each != but]
    return sorted(runs, key=lambda run: (_labelled_until(run), run.url))


def _labelled_until(run: Run) -> str:
    """When the newest rows of a run were committed: those of a compacted history before itself."""
    success = run.success
    return str(success.get("labelled_until", success["committed"]))


class Keys:
    """Tables on disk of which rows are known, and which of them is the newest of its image."""

    def __init__(self, folder: str) -> None:
        import duckdb  # a tenth of a second, only where it is asked for

        self.db = duckdb.connect(str(Path(folder) / "keys.duckdb"))
        self.db.execute(f"SET memory_limit = '{_MEMORY}'")
        self.db.execute(f"SET temp_directory = '{folder}/spilled'")
        self.db.execute("SET preserve_insertion_order = false")
        self.db.execute(
            "CREATE TABLE known (place UHUGEINT, version UHUGEINT, good BOOLEAN, current BOOLEAN, "
            "night BIGINT, nth BIGINT)"
        )
        self.db.execute("CREATE TABLE asked (place UHUGEINT, version UHUGEINT, nth BIGINT)")

    def know(self, run: Run, night: int, version: Sequence[str], bundle_sha256: str | None) -> None:
        """Enter a run's rows; later nights have higher numbers."""
        have = [name for name in version if name in run.schema.names]
        own = "bundle_sha256" if "bundle_sha256" in run.schema.names else None
        names = [run.path_column, "status", *have, *([own] if own else [])]

        def rows() -> Iterator[pa.RecordBatch]:
            start = 0
            for table in stream(run, list(dict.fromkeys(names))):
                size = table.num_rows
                made_by = (
                    pc.equal(table[own].cast(pa.string()), bundle_sha256 or "")
                    if own
                    else pa.array(np.full(size, run.bundle_sha256 == bundle_sha256))
                )
                current = made_by if bundle_sha256 is not None else pa.array(np.ones(size, bool))
                columns = {
                    "place": resolved(table[run.path_column], run.root),
                    "version": _version_of(table, have) if 0 < len(have) == len(version) else None,
                    "good": pc.equal(table["status"].cast(pa.string()), layout.OK),
                    "current": current,
                    "nth": pa.array(np.arange(start, start + size)),
                }
                start += size
                yield from _batches(columns, _KNOWN)

        self._insert(
            "INSERT INTO known SELECT md5_number(place), md5_number(version), good, current, "
            f"{night}, nth FROM incoming",
            rows(),
            _KNOWN,
        )

    def ask(self, manifest: Manifest, version: Sequence[str]) -> None:
        """Enter a manifest's rows."""

        def rows() -> Iterator[pa.RecordBatch]:
            start = 0
            for batch in manifest.batches():
                table = pa.Table.from_batches([batch])
                columns = {
                    "place": resolved(table[manifest.path_column], manifest.root),
                    "version": _version_of(table, version) if version else None,
                    "nth": pa.array(np.arange(start, start + table.num_rows)),
                }
                start += table.num_rows
                yield from _batches(columns, _ASKED)

        self._insert(
            "INSERT INTO asked SELECT md5_number(place), md5_number(version), nth FROM incoming",
            rows(),
            _ASKED,
        )

    def numbers(self, query: str) -> Iterator[np.ndarray]:
        """The first column of a query, an int64 array at a time."""
        found: Any = self.db.sql(query)
        for batch in found.to_arrow_reader(1 << 20):
            yield batch.column(0).to_numpy(zero_copy_only=False)

    def _insert(self, statement: str, rows: Iterator[pa.RecordBatch], schema: pa.Schema) -> None:
        self.db.register("incoming", pa.RecordBatchReader.from_batches(schema, rows))
        self.db.execute(statement)
        self.db.unregister("incoming")


_ASKED = pa.schema(
    [("place", pa.large_string()), ("version", pa.large_string()), ("nth", pa.int64())]
)
_KNOWN = pa.schema(
    [
        *(pa.field(name, pa.large_string()) for name in ("place", "version")),
        *(pa.field(name, pa.bool_()) for name in ("good", "current")),
        pa.field("nth", pa.int64()),
    ]
)


def chosen(tables: Iterator[pa.Table], places: Iterator[np.ndarray]) -> Iterator[pa.Table]:
    """Of a stream of tables, the rows at these places, which rise."""
    waiting = np.zeros(0, np.int64)
    start = 0
    for table in tables:
        end = start + table.num_rows
        while (not len(waiting) or waiting[-1] < end) and (more := next(places, None)) is not None:
            waiting = np.concatenate([waiting, more])
        here = int(np.searchsorted(waiting, end))
        if here:
            yield table.take(waiting[:here] - start)
        waiting, start = waiting[here:], end


def _new_rows(
    manifest: Manifest, runs: Sequence[Run], version: Sequence[str], bundle_sha256: str | None
) -> Iterator[pa.RecordBatch]:
    with tempfile.TemporaryDirectory(prefix="imgcls-since-") as folder:
        keys = Keys(folder)
        for night, run in enumerate(runs, 1):
            keys.know(run, night, version, bundle_sha256)
        keys.ask(manifest, version)
        # of rows of one image and night, one that failed is the one to look at
        keys.db.execute(
            "CREATE TABLE newest AS SELECT place, max_by(coalesce(version, 0), rank) AS version, "
            "max_by(good, rank) AS good, max_by(current, rank) AS current FROM "
            "(SELECT *, night * 2 + (NOT good)::INT AS rank FROM known WHERE place IS NOT NULL) "
            "GROUP BY place"
        )
        keys.db.execute(
            "CREATE TABLE todo AS SELECT nth, CASE WHEN n.place IS NULL THEN 'new' "
            "WHEN NOT n.good THEN 'failed before' "
            "WHEN coalesce(a.version, 0) <> n.version THEN 'changed' "
            "WHEN NOT n.current THEN 'of another bundle' ELSE '' END AS why "
            "FROM asked a LEFT JOIN newest n ON a.place = n.place"
        )
        counted = dict(keys.db.execute("SELECT why, count(*) FROM todo GROUP BY why").fetchall())
        known = counted.pop("", 0)
        told = ", ".join(f"{rows:,} {why}" for why, rows in sorted(counted.items()))
        tell("since", f"{told or 'nothing new'}; {known:,} rows stay as they are")
        places = keys.numbers("SELECT nth FROM todo WHERE why <> '' ORDER BY nth")
        tables = (pa.Table.from_batches([batch]) for batch in manifest.batches())
        for table in chosen(tables, places):
            yield from table.combine_chunks().to_batches()


def _version_columns(manifest: Manifest, config: SinceConfig, last: Run) -> list[str]:
    have, had = manifest.schema.names, last.schema.names
    for name in config.version:
        if name not in have:
            raise ManifestError(
                f"since.version: manifest {manifest.source} has no column {name!r} (found: "
                f"{', '.join(have)})"
            )
    if config.version:
        return list(config.version)
    usual = [name for name in USUAL_VERSIONS if name in have and name in had]
    if not usual:
        print(
            "note: no column tells whether an image has changed (none of "
            f"{', '.join(USUAL_VERSIONS)} in the manifest and {last.url}); only new and failed "
            "rows are labelled"
        )
    return usual


def _version_of(table: pa.Table, names: Sequence[str]) -> pa.Array:
    """(N,) the version columns as one text; never null."""
    parts = [pc.fill_null(table[name].cast(pa.large_string()), "\0") for name in names]
    return pc.binary_join_element_wise(*parts, pa.scalar("\x1f", pa.large_string()))


def _batches(columns: dict[str, Any], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    rows = len(columns["nth"])
    table = pa.table(
        [
            pa.nulls(rows, field.type) if columns[field.name] is None else columns[field.name]
            for field in schema
        ],
        names=schema.names,
    )
    yield from table.cast(schema).to_batches()
