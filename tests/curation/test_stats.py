"""Statistics of a data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from imgcls.curation import stats
from tests.curation.pictures import Row, images_of, jpeg, picture


def test_stats_of_large_files_and_many_classes(tmp_path: Path) -> None:
    rows: list[Row] = [(f"{i}.jpg", jpeg(picture(i)), f"c{i % 3}") for i in range(9)]
    images = images_of(tmp_path, rows)
    place = images.features.schema.get_field_index("bytes")
    sizes = pa.array([20_000_001] + [None] + [10] * 7, pa.int64())
    images = replace(images, features=images.features.set_column(place, "bytes", sizes))
    found = stats.summarize_images(images)
    assert found["total_bytes"] == 20_000_071
    shown = stats.render_stats_page(images, found, sheet_images=2, max_sheets=2, seed=0)
    assert shown.count("<li>") == 4
    assert "1 more classes are not shown" in shown
