"""Images that are linked into several class folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from imgcls import config as configuration
from imgcls.curation.build import build_manifest
from imgcls.curation.config import ManifestBuildConfig
from imgcls.data.manifests.label_columns import LabelColumns
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.errors import ConfigError, OutputError
from tests.curation.pictures import jpeg, picture


def build_from(source: Path, output: Path, **settings: object) -> int:
    request = {"source": str(source), "output": str(output), "labels": True, **settings}
    return build_manifest(configuration.build(ManifestBuildConfig, request))


def write_image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(picture(seed)))
    return path


def link(target: Path, *names: Path, hard: bool = False) -> None:
    for name in names:
        name.parent.mkdir(parents=True, exist_ok=True)
        if hard:
            os.link(target, name)
        else:
            name.symlink_to(os.path.relpath(target, name.parent))


def read(output: Path) -> list[dict[str, Any]]:
    manifest = open_manifest(ManifestConfig(path=str(output)))
    return [row for batch in manifest.batches() for row in batch.to_pylist()]


def labels_of(output: Path, source: Path) -> dict[str, list[str]]:
    return {os.path.relpath(row["path"], source): row["label"] for row in read(output)}


@pytest.mark.parametrize("hard", [False, True])
def test_an_image_in_several_class_folders_becomes_one_row(tmp_path: Path, hard: bool) -> None:
    photos = tmp_path / "photos"
    outside = write_image(tmp_path / "store" / "1.jpg")
    link(outside, photos / "dog/1.jpg", photos / "cat/1.jpg", photos / "cat/copy.jpg", hard=hard)
    link(write_image(photos / "dog/2.jpg", 1), photos / "cat/2.jpg", hard=hard)
    write_image(photos / "cat/3.jpg", 2)
    assert build_from(photos, tmp_path / "out", merge_links=True) == 3
    # the file itself, else the first path; of hard links none is the file itself
    second = "cat/2.jpg" if hard else "dog/2.jpg"
    found = labels_of(tmp_path / "out", photos)
    assert found == {"cat/1.jpg": ["cat", "dog"], second: ["cat", "dog"], "cat/3.jpg": ["cat"]}
    assert list(found) == sorted(found)
    manifest = open_manifest(ManifestConfig(path=str(tmp_path / "out")))
    assert manifest.label_columns == LabelColumns("label")
    assert manifest.schema.names == ["path", "size", "mtime", "etag", "label"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.parquet"]


def test_equal_files_that_are_not_linked_stay_two_rows(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        write_image(tmp_path / "photos" / label / "1.jpg")
    assert build_from(tmp_path / "photos", tmp_path / "out", merge_links=True) == 2


def test_links_without_a_target_stay_rows(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_image(photos / "cat/1.jpg")
    for label in ("cat", "dog"):
        link(tmp_path / "gone.jpg", photos / label / "2.jpg")
    listed = build_from(photos, tmp_path / "listed")
    assert build_from(photos, tmp_path / "out", merge_links=True) == listed


@pytest.mark.parametrize("hard", [False, True])
def test_linked_files_are_noted_without_the_option(
    tmp_path: Path, hard: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    link(write_image(photos / "dog/1.jpg"), photos / "cat/1.jpg", hard=hard)
    link(write_image(photos / "dog/2.jpg", 1), photos / "dog/same.jpg", hard=hard)
    link(write_image(photos / ".all/3.jpg", 2), photos / "dog/3.jpg")
    assert build_from(photos, tmp_path / "out") == 5
    assert "1 file linked into several class folders" in capsys.readouterr().out
    assert all(isinstance(row["label"], str) for row in read(tmp_path / "out"))
    build_from(photos / "dog", tmp_path / "unlabeled", labels=False)
    (photos / "cat/1.jpg").unlink()
    build_from(photos, tmp_path / "plain")
    assert "linked into" not in capsys.readouterr().out


def test_links_are_merged_with_labels_on_a_local_disk_only(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_image(photos / "cat/1.jpg")
    with pytest.raises(ConfigError, match="merges the labels of class folders; pass --labels"):
        build_from(photos, tmp_path / "out", merge_links=True, labels=False)
    for key, value in (("label_delimiter", ";"), ("label_columns", ["cat"])):
        with pytest.raises(ConfigError, match=f"{key}: .*photos is a folder of images"):
            build_from(photos, tmp_path / "out", **{key: value})


def test_a_merged_manifest_is_not_written_next_to_a_listing(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_image(photos / "cat/1.jpg")
    build_from(photos, tmp_path / "out")
    with pytest.raises(OutputError, match="contains other files"):
        build_from(photos, tmp_path / "out", merge_links=True)
    build_from(photos, tmp_path / "merged", merge_links=True)
    with pytest.raises(OutputError, match="contains a manifest already; pass --overwrite"):
        build_from(photos, tmp_path / "merged", merge_links=True)
    write_image(photos / "cat/2.jpg", 1)
    assert build_from(photos, tmp_path / "merged", merge_links=True, overwrite=True) == 2
    written = pq.read_table(tmp_path / "merged" / "manifest.parquet")
    assert written["label"].to_pylist() == [["cat"], ["cat"]]
