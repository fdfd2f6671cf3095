"""The sources that the benchmark compares: the same images in files, archives and tables."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks import sources


def test_every_source_has_the_same_different_images(tmp_path: Path) -> None:
    images = list(sources.draw_images(250, 48))
    assert len(set(images)) == 250
    manifest = pq.read_table(sources.write_files(tmp_path / "files", 250, 48))
    assert [Path(path).read_bytes() for path in manifest["path"].to_pylist()] == images
    archives = sorted(sources.write_archives(tmp_path / "archives", 250).iterdir())
    members = []
    for path in archives:
        with tarfile.open(path) as archive:
            members += [archive.extractfile(member).read() for member in archive]  # type: ignore[union-attr]
    assert (len(archives), members) == (84, images)
    tables = sources.write_tables(tmp_path / "tables", 250, 48, 100, 40)
    files = [pq.ParquetFile(path) for path in sorted(tables.iterdir())]
    assert [[f.metadata.row_group(i).num_rows for i in range(f.num_row_groups)] for f in files] == [
        [40, 40, 20], [40, 40, 20], [40, 10],
    ]  # fmt: skip
    rows = [row["image"]["bytes"] for file in files for row in file.read().to_pylist()]
    assert rows == images
