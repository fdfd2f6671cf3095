"""Iceberg tables as manifests: the rows of one snapshot, in one order, without deleted rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
from pyiceberg.typedef import Record
from pyiceberg.utils.config import Config

from imgcls.data.manifests.manifest import Manifest, ManifestConfig, open_manifest
from imgcls.errors import ManifestError, RequestError

NAME = "iceberg:lake.ml.photos"
SCHEMA = pa.schema([("path", pa.string()), ("size", pa.int64())])


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__URI", f"sqlite:///{tmp_path}/catalog.db")
    monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__WAREHOUSE", f"file://{tmp_path}/warehouse")
    # pyiceberg reads the environment once, when it is imported
    monkeypatch.setattr("pyiceberg.catalog._ENV_CONFIG", Config())
    catalog = load_catalog("lake")
    catalog.create_namespace("ml")
    return catalog


def opened(path: str = NAME) -> Manifest:
    return open_manifest(ManifestConfig(path=path))


def paths(manifest: Manifest) -> list[str]:
    return [path for batch in manifest.batches() for path in batch.column("path").to_pylist()]


def append(table: Any, names: list[str]) -> None:
    rows = {"path": names, "size": list(range(len(names)))}
    table.append(pa.table(rows, schema=SCHEMA))


def add_deletes(table: Any, content: DataFileContent, rows: pa.Table) -> None:
    """Commit a delete file, which pyiceberg reads and does not write."""
    path = f"{table.location().removeprefix('file://')}/data/{content.name}.parquet"
    pq.write_table(rows, path)
    transaction = table.transaction()
    producer = transaction.update_snapshot().fast_append()
    original = producer.new_manifest_writer

    def open_writer(spec: Any) -> Any:
        writer = original(spec)
        writer.content = lambda: 1  # a manifest of deletes
        return writer

    producer.new_manifest_writer = open_writer
    producer.append_data_file(
        DataFile.from_args(
            content=content,
            file_path=f"file://{path}",
            file_format=FileFormat.PARQUET,
            partition=Record(),
            record_count=rows.num_rows,
            file_size_in_bytes=Path(path).stat().st_size,
            spec_id=0,
            equality_ids=[1] if content is DataFileContent.EQUALITY_DELETES else None,
        )
    )
    producer.commit()
    transaction.commit_transaction()


def test_the_rows_of_the_pinned_snapshot_are_read_in_the_order_of_its_files(
    catalog: Catalog,
) -> None:
    table = catalog.create_table("ml.photos", SCHEMA)
    for number in range(3):
        append(table, [f"{number}-{i}.jpg" for i in range(2)])
    files = sorted(task.file.file_path for task in table.scan().plan_files())
    wanted = [
        path
        for file in files
        for path in pq.read_table(file.removeprefix("file://"))["path"].to_pylist()
    ]
    manifest, snapshot = opened(), table.current_snapshot()
    assert snapshot is not None
    append(table, ["late.jpg"])
    for _ in range(2):
        assert paths(manifest) == wanted
    assert sorted(paths(opened())) == sorted([*wanted, "late.jpg"])
    pinned = opened(f"{NAME}@{snapshot.snapshot_id}")
    assert paths(pinned) == wanted
    assert pinned.version == manifest.version == str(snapshot.snapshot_id)
    assert pinned.fingerprint() == manifest.fingerprint() != opened().fingerprint()
    assert manifest.resolve("a.jpg") == f"{table.location().removeprefix('file://')}/a.jpg"


def test_deleted_rows_are_left_out(catalog: Catalog) -> None:
    table = catalog.create_table("ml.photos", SCHEMA)
    append(table, [f"{i}.jpg" for i in range(6)])
    [task] = table.scan().plan_files()
    ids = [{b"PARQUET:field_id": str(2147483546 - i).encode()} for i in range(2)]
    schema = pa.schema(
        [
            pa.field("file_path", pa.string(), metadata=ids[0]),
            pa.field("pos", pa.int64(), metadata=ids[1]),
        ]
    )
    rows = pa.table({"file_path": [task.file.file_path] * 2, "pos": [1, 4]}, schema=schema)
    add_deletes(table, DataFileContent.POSITION_DELETES, rows)
    assert paths(opened()) == ["0.jpg", "2.jpg", "3.jpg", "5.jpg"]


def test_equality_deletes_are_refused_by_name(catalog: Catalog) -> None:
    table = catalog.create_table("ml.photos", SCHEMA)
    append(table, ["0.jpg"])
    field = pa.field("path", pa.string(), metadata={b"PARQUET:field_id": b"1"})
    rows = pa.table({"path": ["0.jpg"]}, schema=pa.schema([field]))
    add_deletes(table, DataFileContent.EQUALITY_DELETES, rows)
    with pytest.raises(ManifestError, match="has equality deletes, which pyiceberg cannot read"):
        paths(opened())


def test_columns_that_were_added_later_are_null_before(catalog: Catalog) -> None:
    table = catalog.create_table("ml.photos", SCHEMA)
    append(table, ["0.jpg"])
    with table.update_schema() as update:
        update.union_by_name(pa.schema([("label", pa.string())]))
    assert opened().label_column is None  # the snapshot is older than the column
    table.append(pa.table({"path": ["1.jpg"], "size": [1], "label": ["cat"]}))
    manifest = opened()
    assert manifest.label_column == "label"
    found = pa.Table.from_batches(manifest.batches(), manifest.schema)
    assert found.select(["path", "label"]).sort_by("path").to_pylist() == [
        {"path": "0.jpg", "label": None},
        {"path": "1.jpg", "label": "cat"},
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("iceberg:lake.ml.nothing", "the catalog has no such table"),
        ("iceberg:lake.ml.empty", "the table has no rows yet"),
        ("iceberg:lake.ml.empty@7", "has no snapshot 7; it may have expired"),
        ("iceberg:lake.empty", r"pass iceberg:CATALOG\.NAMESPACE\.TABLE"),
        ("iceberg:nowhere.ml.photos", "PYICEBERG_CATALOG__NOWHERE__URI"),
    ],
)
def test_a_table_that_cannot_be_found_is_refused(catalog: Catalog, path: str, message: str) -> None:
    catalog.create_table("ml.empty", SCHEMA)
    with pytest.raises(RequestError, match=message):
        opened(path)
