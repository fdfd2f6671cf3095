"""Labels of several classes in fetched shards."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls import config
from imgcls.curation.config import FetchConfig
from imgcls.curation.fetch import fetch
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from tests.curation.pictures import jpeg, picture

LABELS = [["b", "a"], [], None, ["c"]]


def write_source(folder: Path) -> Path:
    """A manifest with the same labels in each form; of class columns only one."""
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(jpeg(picture(number)))
    table = {
        "path": [f"{number}.jpg" for number in range(4)],
        "tags": LABELS,
        "text": ["b|a", "|", "", "c"],
        "cat": [1, 0, None, 1],
    }
    pq.write_table(pa.table(table), folder / "list.parquet")
    return folder / "list.parquet"


def fetch_labels(source: Path, output: Path, format: str, **labels: object) -> None:
    given = {f"manifest.{key}": value for key, value in labels.items()}
    paths = {"manifest.path": str(source), "output": str(output)}
    assert fetch(config.build(FetchConfig, {**paths, **given, "format": format})) == {"ok": 4}


def read_names(shards: str, **labels: Any) -> list[list[str] | None]:
    manifest = open_manifest(ManifestConfig(path=shards, **labels))
    columns = manifest.label_columns
    assert columns is not None
    return [row for batch in manifest.batches() for row in columns.read_names(batch).to_pylist()]


@pytest.mark.parametrize("format", ["parquet", "tar"])
def test_labels_of_several_classes_are_read_back(tmp_path: Path, format: str) -> None:
    source, shards = write_source(tmp_path), f"*.{format}"
    lists, columns = {"label_column": "tags"}, {"label_columns": ["cat"]}
    fetch_labels(source, tmp_path / "lists", format, **lists)
    assert read_names(f"{tmp_path}/lists/{shards}", **lists) == LABELS
    fetch_labels(source, tmp_path / "columns", format, **columns)
    expected = [["cat"], [], None, ["cat"]]
    assert read_names(f"{tmp_path}/columns/{shards}", **columns) == expected
    text = {"label_column": "text", "label_delimiter": "|"}
    fetch_labels(source, tmp_path / "text", format, **text)
    if format == "tar":  # its JSON has lists
        del text["label_delimiter"]
    assert read_names(f"{tmp_path}/text/{shards}", **text) == LABELS


def test_an_archive_has_lists_in_its_json_and_its_table_the_text(tmp_path: Path) -> None:
    text = {"label_column": "text", "label_delimiter": "|"}
    fetch_labels(write_source(tmp_path), tmp_path / "out", "tar", **text)
    with tarfile.open(tmp_path / "out" / "part-000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert {name.partition(".")[2] for name in members} == {"jpg", "json"}
    bodies = [json.loads(members[f"{number:09d}.json"]) for number in range(4)]
    assert [body["text"] for body in bodies] == LABELS
    table = pq.read_table(tmp_path / "out" / "part-000000.parquet")
    assert table["text"].to_pylist() == ["b|a", "|", "", "c"]
