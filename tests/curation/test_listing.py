"""Listing of folders and buckets: every image once, with its size, time and etag."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from imgcls.curation.config import ListingConfig
from imgcls.curation.listing import build_listing
from imgcls.curation.scan import hold_output
from imgcls.data.formats import EXPLANATIONS_FOLDER
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.data.storage import filesystem
from imgcls.errors import ManifestError, OutputError, RequestError, StorageError
from tests.s3 import BUCKET, url

NAMES = [
    "cat/1.jpg", "cat/2.PNG", "cat/deep/er/still/3.webp", "dog/a b.jpg", "dog/é#?.jpg",
    *(f"fox/{i:05d}.jpg" for i in range(2500)),
]  # fmt: skip
OTHERS = [
    "cat/notes.txt", ".hidden/4.jpg", "cat/.trash/5.jpg", "dog/.6.jpg",
    f"out/{EXPLANATIONS_FOLDER}/000000001-0123456789ab.jpg",
]  # fmt: skip


def list_images(config: ListingConfig) -> int:
    with hold_output(config.output) as held:
        return build_listing(config, held.lease)


def rows_of(output: str) -> list[dict[str, Any]]:
    found = open_manifest(ManifestConfig(path=output))
    return [row for batch in found.batches() for row in batch.to_pylist()]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for name in (*NAMES, *OTHERS):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
    return root


def test_every_image_of_a_folder_is_listed_once(tree: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "manifest")
    count = list_images(
        ListingConfig(source=str(tree), output=output, labels=True, list_concurrency=2)
    )
    rows = rows_of(output)
    assert count == len(rows) == len(NAMES)
    assert sorted(row["path"] for row in rows) == sorted(f"{tree}/{name}" for name in NAMES)
    for row in rows:
        name = os.path.relpath(row["path"], tree)
        assert row["label"] == name.partition("/")[0]
        assert row["size"] == len(name.encode())
        assert row["etag"] is None
    now = datetime.datetime.now(datetime.UTC)
    assert all(now - row["mtime"] < datetime.timedelta(hours=1) for row in rows)


@pytest.mark.parametrize("store", ["disk", "s3"])
def test_rows_are_in_the_order_of_the_folders(store: str, s3: Any, tmp_path: Path) -> None:
    # the first folder takes two pages, the last ones are listed long before its end
    names = [*(f"a/{i:04d}.jpg" for i in range(1100)), *(f"{c}/1.jpg" for c in "bcdefgh"), "z.jpg"]
    for name in names:
        if store == "s3":
            s3.put_object(Bucket=BUCKET, Key=f"ordered/{name}", Body=b"x")
        else:
            (tmp_path / "ordered" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "ordered" / name).write_bytes(b"x")
    source = url("ordered") if store == "s3" else str(tmp_path / "ordered")
    output = str(tmp_path / "manifest")
    assert list_images(ListingConfig(source=source, output=output, list_concurrency=8)) == 1108
    listed = [row["path"].removeprefix(f"{source}/") for row in rows_of(output)]
    assert listed == ["z.jpg", *names[:-1]]  # files first, then the folders below them


def test_every_image_of_a_bucket_is_listed_once(s3: Any, tmp_path: Path) -> None:
    names = [name for name in NAMES if not name.startswith("fox")]
    names += [f"fox/{i:05d}.jpg" for i in range(1001)]  # more than a page
    for name in (*names, *OTHERS, "top.jpg"):
        s3.put_object(Bucket=BUCKET, Key=f"photos/{name}", Body=name.encode())
    s3.put_object(Bucket=BUCKET, Key="photos/cat/", Body=b"")  # a folder, to some tools
    s3.put_object(Bucket=BUCKET, Key="photos-of-others/1.jpg", Body=b"x")
    output = url("manifests/tonight")
    list_images(ListingConfig(source=url("photos"), output=output))
    rows = {row["path"]: row for row in rows_of(output)}
    assert sorted(rows) == sorted(url(f"photos/{name}") for name in (*names, "top.jpg"))
    head = s3.head_object(Bucket=BUCKET, Key="photos/dog/a b.jpg")
    row = rows[url("photos/dog/a b.jpg")]
    assert row["etag"] == head["ETag"].strip('"')
    assert row["size"] == head["ContentLength"]
    assert (
        row["mtime"].replace(microsecond=0) == head["LastModified"]
    )  # a listing may have more digits
    with pytest.raises(RequestError, match=r"top.jpg: is next to the class folders"):
        list_images(ListingConfig(source=url("photos"), output=str(tmp_path / "m"), labels=True))


def test_files_that_a_listing_skips_are_counted_and_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "photos"
    for name in ("a/1.jpg", "a/notes.txt", "b/2.jpg", "b/2.xyz", "b/README", "@eaDir/3.jpg",
                 "lost+found/4.jpg", "old/bundle.json", "old/plots/c.png", "b/.5.txt"):  # fmt: skip
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    for listings in (1, 16):  # few folders are listed as they are, many are descended into
        output = str(tmp_path / f"manifest-{listings}")
        list_images(ListingConfig(source=str(source), output=output, list_concurrency=listings))
        assert sorted(row["path"] for row in rows_of(output)) == [
            f"{source}/a/1.jpg",
            f"{source}/b/2.jpg",
        ]
    output = capsys.readouterr().out
    for count in ("1 .txt", "1 .xyz", "1 (no suffix)", "1 .json"):
        assert output.count(count) == 2
    (source / "a" / "1.jpg").unlink()
    (source / "b" / "2.jpg").unlink()
    with pytest.raises(RequestError, match=r"no image below it; .* \(skipped 4 files: "):
        list_images(ListingConfig(source=str(source), output=str(tmp_path / "none")))


def test_an_interrupted_listing_is_resumed(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "manifest"
    config = ListingConfig(source=str(tree), output=str(output), list_concurrency=1)
    list_images(config)
    assert "skipped 1 file: 1 .txt" in capsys.readouterr().out
    whole = rows_of(str(output))
    parts = sorted(output.glob("part-*.parquet"))
    kept = parts[1].stat()
    (output / "_SUCCESS").unlink()
    parts[-1].unlink()
    capsys.readouterr()
    with pytest.raises(ManifestError, match=r"its listing is not complete; rerun `imgcls manifest"):
        rows_of(str(output))
    list_images(config)
    logged = capsys.readouterr().out
    assert f"resume  {len(parts) - 1} of {len(parts)} groups" in logged
    assert "skipped 1 file: 1 .txt" in logged  # in a group that is not listed again
    assert rows_of(str(output)) == whole
    assert parts[1].stat().st_mtime_ns == kept.st_mtime_ns
    (output / "_SUCCESS").unlink()
    parts[0].unlink()  # what lies above the groups, and is not one of them
    list_images(config)
    assert rows_of(str(output)) == whole


def test_an_existing_manifest_is_replaced_only_with_overwrite(tree: Path, tmp_path: Path) -> None:
    output = tmp_path / "manifest"
    config = ListingConfig(source=str(tree / "cat"), output=str(output))
    list_images(config)
    for changes in ({}, {"source": str(tree)}):
        with pytest.raises(OutputError, match="pass --overwrite, or another"):
            list_images(config.model_copy(update=changes))
    more = config.model_copy(update={"source": str(tree), "overwrite": True})
    assert list_images(more) == len(NAMES)
    assert pq.read_table(output).num_rows == len(NAMES)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        other = {"output": str(tmp_path / "full"), "overwrite": overwrite}
        with pytest.raises(OutputError, match=r"contains other files \(thesis.txt\)"):
            list_images(config.model_copy(update=other))
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_an_empty_or_missing_source_is_refused(tmp_path: Path, s3: Any) -> None:
    (tmp_path / "empty").mkdir()
    for source in (str(tmp_path / "empty"), url("nothing")):
        with pytest.raises(RequestError, match="no image below it"):
            list_images(ListingConfig(source=source, output=str(tmp_path / "out")))
    for source, message in ((str(tmp_path / "gone"), "no such file"), ("s3://no-bucket", "bucket")):
        with pytest.raises((RequestError, StorageError), match=message):
            list_images(ListingConfig(source=source, output=str(tmp_path / "new")))
    assert filesystem.list_names(str(tmp_path / "new")) == []
