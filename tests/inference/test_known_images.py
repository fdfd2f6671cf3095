"""Tables of known images: what DuckDB reads, it reads with the settings of the job."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from imgcls.data.storage.storage_settings import StorageConfig, current_settings, use_settings
from imgcls.inference.known_images import KnownImages, is_version_type, normalize_version
from tests.execution.runs import manifest_of


def test_storage_settings_apply_in_the_threads_of_duckdb(tmp_path: Path) -> None:
    seen = set()
    rows = pa.table({"path": [f"{number}.jpg" for number in range(20_000)]})

    def batches() -> Iterator[pa.RecordBatch]:
        for _ in range(100):
            seen.add(current_settings().endpoint_url)
            yield from rows.to_batches()

    manifest = replace(manifest_of(tmp_path, rows.slice(0, 1)), _read_batches=batches)
    known = KnownImages(str(tmp_path))
    with use_settings(StorageConfig(endpoint_url="http://store")):
        known.add_manifest(manifest)
    assert known.read_counts("SELECT 'rows', count(*) FROM listed") == {"rows": 2_000_000}
    assert seen == {"http://store"}


@pytest.mark.parametrize(
    ("column", "same"),
    [
        (pa.array([1764556800123, 3, None]), pa.array([1764556800123.0, 3.0, None])),
        (pa.array([0, -7, 2**53]), pa.array([-0.0, -7.0, 2.0**53])),
        (pa.array([1.5, 1e300]), pa.array([1.5, 1e300]).dictionary_encode()),
        (
            pa.array([1764556800123], pa.timestamp("ms")),
            pa.array([1764556800123000], pa.timestamp("us")).dictionary_encode(),
        ),
        (pa.array(["a", None, "\u00e9"]), pa.array([b"a", None, "\u00e9".encode()])),
        (pa.array([b"\xff\xfe", b"a"]), pa.array([b"\xff\xfe", b"a"], pa.large_binary())),
    ],
)
def test_equal_versions_of_different_types_have_one_text(column: pa.Array, same: pa.Array) -> None:
    text = normalize_version(pa.chunked_array([column])).to_pylist()
    assert normalize_version(pa.chunked_array([same])).to_pylist() == text
    assert len(set(text)) == len(text)
    assert [value is None for value in text] == [value is None for value in column.to_pylist()]


def test_bytes_and_uuids_are_versions_and_lists_are_not() -> None:
    uuids = [uuid.UUID(int=number).bytes for number in (0xFF << 120, 7)]
    column = pa.ExtensionArray.from_storage(pa.uuid(), pa.array(uuids, pa.binary(16)))
    assert is_version_type(column.type)
    assert len(set(normalize_version(pa.chunked_array([column])).to_pylist())) == 2
    assert is_version_type(pa.dictionary(pa.int8(), pa.binary()))
    for kind in (pa.list_(pa.int64()), pa.struct([("a", pa.int64())])):
        assert not is_version_type(kind)
