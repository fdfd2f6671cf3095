"""The same images from every kind of source: files, archives, tables, servers and stores."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from tests import s3
from tests.conftest import COLORS, draw, write_manifest
from tests.data.archives import write_tar, write_zip
from tests.e2e.outputs import assert_exactly_once
from tests.processes import run_here
from tests.web_server import Reply, serving

COUNT = 12


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    """Image files by name, JPEGs and PNGs."""
    found = {}
    for i in range(COUNT):
        stream = io.BytesIO()
        draw(list(COLORS)[i % len(COLORS)], (90, 70), seed=i).save(stream, ["JPEG", "PNG"][i % 2])
        found[f"{i}.{['jpg', 'png'][i % 2]}"] = stream.getvalue()
    return found


def _list_members(path: Path, **options: Any) -> list[str]:
    """The paths of a manifest's rows, as another manifest may name them."""
    manifest = open_manifest(ManifestConfig(path=str(path), **options))
    rows = pa.Table.from_batches(manifest.batches())
    paths: list[str] = rows[manifest.path_column].to_pylist()
    return paths


def _write_tables(folder: Path, images: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Parquet tables with the images in their rows, and the paths of these images."""
    names, values = list(images), list(images.values())
    pairs = zip(names, values, strict=True)
    structs = [{"bytes": value, "path": name} for name, value in pairs]
    columns = {
        "binary": (pa.array(values, pa.binary()), None),
        "base64": (pa.array([base64.b64encode(value).decode() for value in values]), "image"),
        "struct": (pa.array(structs), None),
    }
    for kind, (column, chosen) in columns.items():
        file = folder / f"{kind}.parquet"
        pq.write_table(pa.table({"image": column}), file, row_group_size=5, data_page_size=2000)
        yield kind, _list_members(file, image_column=chosen)


@pytest.fixture
def sources(
    images: dict[str, bytes], tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, list[str]]]:
    """Paths of the images in the same order, by kind of source."""
    with serving() as server, s3.bucket(endpoint, monkeypatch) as bucket:
        for name, data in images.items():
            (tmp_path / name).write_bytes(data)
            bucket.put_object(Bucket=s3.BUCKET, Key=name, Body=data)
        write_tar(tmp_path / "images.tar", images)
        write_zip(tmp_path / "images.zip", images)
        bucket.upload_file(str(tmp_path / "images.tar"), s3.BUCKET, "images.tar")
        server.replies = {f"/{name}": [Reply(body=data)] for name, data in images.items()}
        yield {
            "file": list(images),
            "tar": [f"tar://images.tar#{name}" for name in images],
            "zip": [f"zip://images.zip#{name}" for name in images],
            "https": [f"{server.url}/{name}" for name in images],
            "s3": [s3.url(name) for name in images],
            "tar on s3": [f"tar://{s3.url('images.tar')}#{name}" for name in images],
            **dict(_write_tables(tmp_path, images)),
        }


def test_images_of_every_source_get_the_same_scores(
    sources: dict[str, list[str]], joined: None, color_bundle: Path, tmp_path: Path
) -> None:
    rows = [(path, kind) for kind, paths in sources.items() for path in paths]
    manifest = write_manifest(tmp_path / "m.csv", rows, ("path", "source"))
    done = run_here(
        *("predict", "--manifest", manifest, "--model", color_bundle, "--output", tmp_path / "out"),
        # a batch has the images of one source: the last bits depend on the other images of a batch
        *("--scores", "--scores-type", "float32", "--scale.batch-size", COUNT),
    )
    assert done.returncode == 0, done.stderr
    found = assert_exactly_once(tmp_path / "out", len(rows))
    assert found["status"].to_pylist() == ["ok"] * len(rows)
    expected = found.slice(0, COUNT).select(["scores", "predicted_label", "width", "height"])
    for number, kind in enumerate(sources):
        part = found.slice(number * COUNT, COUNT)
        assert set(part["source"].to_pylist()) == {kind}
        assert part.select(expected.schema.names).equals(expected), kind
