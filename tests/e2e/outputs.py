"""Read the output of a predict run, and compare it with its manifest."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath


def table(output: Path) -> pa.Table:
    """All predictions, sorted by row."""
    return parquet(output / "predictions").sort_by("row")


def parquet(path: Path) -> pa.Table:
    """A file, or a folder of them, on a disk or a store."""
    there = UPath(path)
    return pq.read_table(there.path, filesystem=there.fs)


def success(output: Path) -> dict[str, object]:
    body: dict[str, object] = json.loads((output / "_SUCCESS").read_text())
    return body


def committed(output: Path) -> bool:
    return (output / "_SUCCESS").exists()


def statuses(output: Path) -> dict[str, str]:
    """Status by the path that the manifest gave."""
    rows = table(output)
    return dict(zip(rows["path"].to_pylist(), rows["status"].to_pylist(), strict=True))


def assert_exactly_once(output: Path, rows: int) -> pa.Table:
    """Every manifest row is in the committed table once, and no other files are left over."""
    found = table(output)
    assert found["row"].to_pylist() == list(range(rows))
    assert success(output)["rows"] == rows
    assert not (output / "_staging").exists()
    assert not list(output.rglob("*.tmp"))
    return found
