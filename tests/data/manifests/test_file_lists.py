from __future__ import annotations

import pytest

from imgcls.data.manifests.file_lists import expand_braces
from imgcls.errors import ManifestError


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("x/{000..002}.tar", ["x/000.tar", "x/001.tar", "x/002.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{08..10}", ["08", "09", "10"]),
        ("{2..1}", ["2", "1"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("s3://b/{train,val}.tar", ["s3://b/train.tar", "s3://b/val.tar"]),
        ("{date}.tar", ["{date}.tar"]),
        ("{}.tar", ["{}.tar"]),
        ("plain.tar", ["plain.tar"]),
        ("{5..5}.tar", ["5.tar"]),
    ],
)
def test_braces_are_expanded(path: str, expected: list[str]) -> None:
    assert expand_braces(path) == expected


@pytest.mark.parametrize("path", ["{0..1000000}", "{0..1000}{0..1000}"])
def test_more_than_a_million_files_are_refused(path: str) -> None:
    with pytest.raises(ManifestError, match="correct the range"):
        expand_braces(path)
