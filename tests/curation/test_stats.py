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


def test_stats_of_images_with_several_classes(tmp_path: Path) -> None:
    labels = ["cat;dog", "cat", "cat;dog;rare", ";", None, "cat"]
    rows: list[Row] = [(f"{i}.jpg", jpeg(picture(i)), each) for i, each in enumerate(labels)]
    images = images_of(tmp_path, rows, delimiter=";")
    found = stats.summarize_images(images, min_positives=2)
    assert found["classes"] == {"cat": 4, "dog": 2, "rare": 1}
    assert found["labelled"] == 5
    sets = found["multilabel"]
    assert sets["classes"]["dog"] == {"positives": 2, "negatives": 3, "unknown": 1}
    assert sets["labels_per_image"] == {
        "mean": 7 / 5, "distribution": {"0": 1, "1": 2, "2": 1, "3": 1},
    }  # fmt: skip
    assert sets["unlabeled"] == 1
    assert sets["pairs"][0] == {"classes": ["cat", "dog"], "images": 2, "jaccard": 0.5}
    assert sets["issues"] == [
        {"name": "dog", "issue": "always-together", "detail": "every image with it also has 'cat'"},
        {"name": "rare", "issue": "few-positives", "detail": "1 image, fewer than 2"},
    ]
    page = stats.render_stats_page(images, found, sheet_images=2, max_sheets=9, seed=0)
    assert "1.40 classes per image. 1 image without labels." in page
    assert "every image with it also has &#39;cat&#39;" in page
    assert page.count("<h2>(no label)</h2>") == 1


def test_one_label_per_image_has_no_entry_for_several(tmp_path: Path) -> None:
    images = images_of(tmp_path, [("a.jpg", jpeg(picture(0)), "x"), ("b.jpg", b"", "y")])
    assert list(stats.summarize_images(images)) == [
        "rows", "status", "labelled", "classes", "imbalance", "formats", "width", "height",
        "bytes", "total_bytes",
    ]  # fmt: skip
