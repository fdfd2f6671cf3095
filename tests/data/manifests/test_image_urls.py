"""One text for each image, whatever a manifest calls it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.data.manifests.image_urls import normalize_url, normalize_urls, read_urls, resolve_urls
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.data.storage import filesystem

SAME = {
    "/a.jpg": ["/a.jpg", "file:///a.jpg", "file:/a.jpg", "//a.jpg", "/./a.jpg", "/x/../a.jpg",
               "file:////a.jpg", "file:///x/../a.jpg"],
    "tar:///d/0.tar#./x//a": ["tar:///d/0.tar#./x//a", "tar://file:///d/0.tar#./x//a",
                              "tar://file:/d/0.tar#./x//a", "tar:///d/.//0.tar#./x//a"],
}  # fmt: skip
UNCHANGED = [
    "s3://b//x/../a.jpg", "https://h/x//a.jpg?q=/./", "file://a.jpg", "a/../b.jpg", "",
    "/.a/..b/c.", "zip://s3://b/./0.zip#a", "tar:///d/0.tar", "data:image/png;base64,//./",
]  # fmt: skip


def test_names_of_one_file_become_one_text() -> None:
    for name, others in SAME.items():
        assert [normalize_url(each) for each in others] == [name] * len(others)
    assert [normalize_url(each) for each in UNCHANGED] == UNCHANGED


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_a_column_becomes_what_its_values_become(kind: pa.DataType) -> None:
    names = [*UNCHANGED, *SAME["/a.jpg"], *SAME["tar:///d/0.tar#./x//a"]]
    column = pa.chunked_array([names[:3], [None], [], names[3:], ["a.jpg"]], kind)
    expected = [None if each is None else normalize_url(each) for each in column.to_pylist()]
    assert normalize_urls(column).to_pylist() == expected
    assert normalize_urls(column).type == pa.large_string()
    assert normalize_urls(pa.chunked_array([], kind)).to_pylist() == []


def test_the_text_of_an_image_names_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"this one")
    for name in ("file:///{}/x/../a.jpg", "file:/{}//a.jpg", "/{}/./a.jpg"):
        url = name.format(str(tmp_path).lstrip("/"))
        assert normalize_url(url) == f"{tmp_path}/a.jpg"
        assert filesystem.read(normalize_url(url)) == b"this one"


def test_paths_of_a_manifest_start_at_its_root(tmp_path: Path) -> None:
    paths = ["a.jpg", "./a.jpg", f"file://{tmp_path}/a.jpg", None, "s3://b/a.jpg"]
    expected = [f"{tmp_path}/a.jpg"] * 3 + [None, "s3://b/a.jpg"]
    assert resolve_urls(pa.chunked_array([paths]), str(tmp_path)).to_pylist() == expected
    pq.write_table(pa.table({"path": paths}), tmp_path / "m.parquet")
    manifest = open_manifest(ManifestConfig(path=str(tmp_path / "m.parquet")))
    (batch,) = manifest.batches()
    assert read_urls(manifest, batch).to_pylist() == expected
