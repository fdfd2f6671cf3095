"""Parts of the reports: names of data sets."""

from __future__ import annotations

import pytest

from imgcls.evaluation.report_parts import name_data


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("demo/digits-test.csv", "digits-test"),
        ("s3://bucket/photos/manifest.parquet", "photos"),
        ("/data/flowers/images/", "flowers"),
        ("cameras/2026-01/*.jpg", "2026-01"),
        ("delta:s3://lake/labels", "lake"),
        ("manifest.csv", "manifest"),
        ("v1.2-final", "v1.2-final"),
    ],
)
def test_a_data_set_is_named_by_its_path(path: str, name: str) -> None:
    assert name_data(path) == name
