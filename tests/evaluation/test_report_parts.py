"""Parts of the reports: names of data sets."""

from __future__ import annotations

import pytest

from imgcls.errors import ImgclsError
from imgcls.evaluation.report_parts import STATUS_MEANINGS, name_data


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


def test_every_status_of_a_row_has_a_meaning() -> None:
    def list_statuses(error: type[Exception]) -> set[str]:
        own = {error.__dict__["status"]} if "status" in error.__dict__ else set()
        return own.union(*(list_statuses(each) for each in error.__subclasses__()))

    assert list_statuses(ImgclsError) == STATUS_MEANINGS.keys()
