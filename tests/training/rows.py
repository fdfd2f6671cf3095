"""Ten drawn images as training sees them: some held out, two that cannot be decoded."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from tests.conftest import COLORS, draw


def draw_rows(folder: Path) -> pa.Table:
    """Ten rows, every third held out; row 4 is no image and row 5 has no path."""
    urls: list[str | None] = []
    for i in range(10):
        file = folder / f"{i}.png"
        draw(list(COLORS)[i % 3], seed=i).save(file)
        urls.append(str(file))
    (folder / "4.png").write_bytes(b"<html>")
    urls[5] = None
    return pa.table(
        {
            "row": pa.array(range(10), pa.int64()),
            "url": pa.array(urls, pa.string()),
            "label": pa.array([i % 3 for i in range(10)], pa.int64()),
            "held": [i % 3 == 0 for i in range(10)],
        }
    )
