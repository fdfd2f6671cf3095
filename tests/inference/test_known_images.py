"""Tables of known images: what DuckDB reads, it reads with the settings of the job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from imgcls.data.storage.storage_settings import StorageConfig, current_settings, use_settings
from imgcls.inference.known_images import KnownImages
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
