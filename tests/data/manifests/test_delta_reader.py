"""Delta tables as manifests: the rows of one version, in one order, without deleted rows."""

from __future__ import annotations

import json
import struct
from base64 import b85encode
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from pyroaring import BitMap

from imgcls.data.manifests.discovery import resolve_source
from imgcls.data.manifests.manifest import Manifest, ManifestConfig, open_manifest
from imgcls.errors import ManifestError

Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
B85 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"


def opened(path: Path | str, **options: str) -> Manifest:
    return open_manifest(ManifestConfig(path=str(path), **options))  # type: ignore[arg-type]


def paths(manifest: Manifest) -> list[str]:
    return [path for batch in manifest.batches() for path in batch.column("path").to_pylist()]


def append(table: Path, names: list[str]) -> None:
    write_deltalake(table, pa.table({"path": names}), mode="append")


def delete_by_vector(table: Path, rows: list[int]) -> None:
    """Commit a deletion vector for the only file of a table, as Spark does, into its log."""
    log = table / "_delta_log" / "00000000000000000000.json"
    actions = [json.loads(line) for line in log.read_text().splitlines()]
    added = next(action["add"] for action in actions if "add" in action)
    removed = {
        "path": added["path"], "dataChange": True, "deletionTimestamp": 1,
        "extendedFileMetadata": True, "partitionValues": {}, "size": added["size"],
    }  # fmt: skip
    bitmap = struct.pack("<iqi", 1681511377, 1, 0) + BitMap(rows).serialize()
    bitmap += b"\0" * (-len(bitmap) % 4)
    vector = {
        "storageType": "i",
        "pathOrInlineDv": b85encode(bitmap).decode().translate(str.maketrans(B85, Z85)),
        "sizeInBytes": len(bitmap),
        "cardinality": len(rows),
    }
    features = ["deletionVectors"]
    protocol = {
        "minReaderVersion": 3, "minWriterVersion": 7,
        "readerFeatures": features, "writerFeatures": features,
    }  # fmt: skip
    lines = [
        {"protocol": protocol},
        {"remove": removed},
        {"add": added | {"deletionVector": vector}},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (table / "_delta_log" / "00000000000000000001.json").write_text(text)


def test_the_rows_of_the_pinned_version_are_read_in_the_order_of_its_files(tmp_path: Path) -> None:
    table = tmp_path / "table"
    for number in range(3):
        append(table, [f"{number}-{i}.jpg" for i in range(2)])
    wanted = [
        path
        for file in sorted(DeltaTable(str(table)).file_uris())
        for path in pq.read_table(file)["path"].to_pylist()
    ]
    manifest = opened(table)
    append(table, ["late.jpg"])
    for _ in range(2):
        assert paths(manifest) == wanted
    assert sorted(paths(opened(table))) == sorted([*wanted, "late.jpg"])
    assert paths(opened(f"delta:{table}@2")) == wanted
    assert resolve_source(str(table)) == resolve_source(f"delta:{table}") == f"delta:{table}@3"


def test_the_version_is_part_of_the_identity(tmp_path: Path) -> None:
    table = tmp_path / "table"
    append(table, ["a.jpg"])
    first = opened(table)
    append(table, ["b.jpg"])
    assert (first.version, opened(table).version) == ("0", "1")
    assert first.fingerprint() == opened(f"delta:{table}@0").fingerprint()
    assert first.fingerprint() != opened(table).fingerprint()
    assert first.describe_identity()["version"] == "0"
    assert first.resolve("a.jpg") == f"{table}/a.jpg"
    assert opened(table, root="/images").resolve("a.jpg") == "/images/a.jpg"


def test_deleted_rows_are_left_out(tmp_path: Path) -> None:
    table = tmp_path / "table"
    append(table, [f"{i}.jpg" for i in range(6)])
    delete_by_vector(table, [1, 4])
    assert paths(opened(table)) == ["0.jpg", "2.jpg", "3.jpg", "5.jpg"]
    assert len(paths(opened(f"delta:{table}@0"))) == 6


def test_partitions_and_added_columns_are_columns(tmp_path: Path) -> None:
    table = tmp_path / "a table"
    first = pa.table({"path": ["a", "b", "c"], "k": ["a b", "ü%41=x", "c/d"], "n": [1, 2, 3]})
    write_deltalake(table, first, partition_by=["k", "n"], mode="append")
    second = pa.table({"path": ["d"], "k": pa.nulls(1, pa.string()), "n": [4], "new": [0.5]})
    write_deltalake(table, second, mode="append", schema_mode="merge")
    manifest = opened(table)
    found = pa.Table.from_batches(manifest.batches(), manifest.schema).sort_by("path")
    assert found.to_pylist() == [
        {"path": "a", "k": "a b", "n": 1, "new": None},
        {"path": "b", "k": "ü%41=x", "n": 2, "new": None},
        {"path": "c", "k": "c/d", "n": 3, "new": None},
        {"path": "d", "k": None, "n": 4, "new": 0.5},
    ]


def test_a_feature_that_is_not_supported_is_refused_by_name(tmp_path: Path) -> None:
    table = tmp_path / "table"
    configuration = {"delta.columnMapping.mode": "name", "delta.minReaderVersion": "2",
                     "delta.minWriterVersion": "5"}  # fmt: skip
    schema = pa.schema([("path", pa.string())])
    DeltaTable.create(table, schema, configuration=configuration)
    with pytest.raises(ManifestError, match="needs the feature columnMapping of Delta Lake"):
        opened(table)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("delta:{}/nothing", "is not a Delta table"),
        ("delta:{}/table@7", "has no version 7"),
        ("iceberg:local.table", "pass iceberg:CATALOG.NAMESPACE.TABLE"),
    ],
)
def test_a_table_that_cannot_be_found_is_refused(tmp_path: Path, path: str, message: str) -> None:
    append(tmp_path / "table", ["a.jpg"])
    with pytest.raises(Exception, match=message) as caught:
        opened(path.format(tmp_path))
    assert getattr(caught.value, "exit_code", None) == 2


def test_images_in_the_rows_are_left_out(tmp_path: Path) -> None:
    images = pa.array([{"bytes": b"one", "path": "1.jpg"}])
    write_deltalake(tmp_path / "t", pa.table({"path": ["a.jpg"], "image": images}))
    manifest = opened(tmp_path / "t")
    assert manifest.schema.names == ["path"]
    assert [batch.to_pylist() for batch in manifest.batches()] == [[{"path": "a.jpg"}]]
