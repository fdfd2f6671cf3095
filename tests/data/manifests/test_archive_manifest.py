"""Rows of WebDataset shards and zip archives, in order, and errors that name the place."""

from __future__ import annotations

import gzip
import itertools
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from imgcls.data import image_files
from imgcls.data.manifests.label_columns import LabelColumns
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.errors import ManifestError, StorageError
from tests.data.archives import add_members, rows_of, write_tar, write_zip
from tests.s3 import BUCKET, url


def refused(path: object, **options: Any) -> str:
    with pytest.raises(ManifestError) as caught:
        rows_of(path, **options)
    return str(caught.value)


def sample(key: str, label: str) -> dict[str, bytes]:
    return {f"{key}.jpg": key.encode(), f"{key}.cls": label.encode()}


def test_the_samples_of_shards_are_rows_in_order(tmp_path: Path) -> None:
    for number in range(12):
        write_tar(tmp_path / f"{number:02d}.tar", sample(f"{number}a", "0") | sample("b", "1"))
    expected = [
        {"path": f"tar://{tmp_path}/{number:02d}.tar#{key}.jpg", "key": key, "label": label}
        for number in range(12)
        for key, label in ((f"{number}a", "0"), ("b", "1"))
    ]
    for path in (tmp_path, f"{tmp_path}/*.tar", f"{tmp_path}/{{00..11}}.tar"):
        manifest = open_manifest(ManifestConfig(path=str(path)))
        assert (manifest.format, manifest.label_column) == ("webdataset", "label")
        assert rows_of(path) == expected
    assert rows_of(tmp_path / "03.tar") == expected[6:8]
    assert image_files.read_image(expected[6]["path"]) == b"3a"


def test_the_texts_of_samples_are_columns(tmp_path: Path) -> None:
    members = {
        "d.x/1.jpg": b"",
        "d.x/1.CLS": b" cat\n",
        "d.x/1.txt": "\ufeffa cät".encode(),
        "d.x/1.json": b'{"id": 007.50, "kind": "x", "ok": true, "none": null, "object": {}}',
        "2.png": b"",
        "2.json": b'{"id": 12345678901234567890, "ok": false}',
    }
    members["d.x/1.json"] = members["d.x/1.json"].replace(b"007", b"7")
    archive = write_tar(tmp_path / "x.tar", members)
    one, two = rows_of(archive)
    assert one == {
        "path": f"tar://{archive}#d.x/1.jpg",
        "key": "d.x/1",
        "label": "cat",
        "text": "a cät",
        "json": members["d.x/1.json"].decode(),
    }
    assert (two["key"], two["label"], two["text"]) == ("2", None, None)
    for name, values in (
        ("id", ["7.50", "12345678901234567890"]),
        ("kind", ["x", None]),
        ("ok", ["true", "false"]),
        ("text", ["a cät", None]),
    ):
        assert [row[name] for row in rows_of(archive, label_column=name)] == values
        found = open_manifest(ManifestConfig(path=archive, label_column=name))
        assert found.label_column == name
    assert "no column 'none'" in refused(archive, label_column="none")
    assert "JSON fields: id, kind, none, ok" in refused(archive, label_column="nothing")
    assert "has 'object' as an object, or as a list of" in refused(archive, label_column="object")


def test_a_list_in_json_has_several_labels(tmp_path: Path) -> None:
    texts = ['{"tags": ["b", "a"], "n": [{}], "i": [1]}', '{"tags": []}', '{"tags": null}', "{}"]
    members = {f"{i}.json": text.encode() for i, text in enumerate(texts)}
    members |= {f"{i}.jpg": b"" for i in range(4)}
    archive = write_tar(tmp_path / "x.tar", members)
    found = open_manifest(ManifestConfig(path=archive, label_column="tags"))
    assert (found.label_column, found.label_columns) == (None, LabelColumns("tags"))
    assert found.schema.field("tags").type == pa.list_(pa.string())
    rows = rows_of(archive, label_column="tags")
    assert [row["tags"] for row in rows] == [["b", "a"], [], None, None]
    assert "JSON fields: i, tags)" in refused(archive, label_column="nothing")
    assert [row["i"] for row in rows_of(archive, label_column="i")] == [["1"], None, None, None]
    assert "list of other than texts" in refused(archive, label_column="n")


def test_a_label_that_is_not_a_number_is_missing(tmp_path: Path) -> None:
    members = {"1.jpg": b"", "1.json": b'{"label": NaN}', "2.jpg": b"", "2.json": b'{"label": 3}'}
    archive = write_tar(tmp_path / "x.tar", members)
    assert [row["label"] for row in rows_of(archive, label_column="label")] == [None, "3"]


def test_text_in_json_may_have_several_labels(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", {"1.jpg": b"", "1.json": b'{"tags": "a;b"}'})
    labels = {"label_column": "tags", "label_delimiter": ";"}
    assert rows_of(archive, **labels)[0]["tags"] == "a;b"
    found = open_manifest(ManifestConfig(path=archive, **labels))
    assert found.label_columns == LabelColumns("tags", ";")


def test_lists_and_texts_in_one_field_of_json_are_refused(tmp_path: Path) -> None:
    for one, other in (('["a"]', '"a"'), ('"a"', '["a"]')):
        first = {"1.jpg": b"", "1.json": f'{{"tags": {one}}}'.encode()}
        second = {"2.jpg": b"", "2.json": f'{{"tags": {other}}}'.encode()}
        write_tar(tmp_path / "0.tar", first)
        write_tar(tmp_path / "1.tar", second)
        message = r"1\.tar: 'tags' is a list in some samples and one text in others"
        with pytest.raises(ManifestError, match=message):
            rows_of(f"{tmp_path}/*.tar", label_column="tags")


def test_fields_of_json_are_class_columns(tmp_path: Path) -> None:
    texts = ['{"a": 1, "b": 0}', '{"a": null, "b": 1.0}', '{"a": true, "b": false}']
    members = {f"{i}.json": text.encode() for i, text in enumerate(texts)}
    members |= {f"{i}.jpg": b"" for i in range(3)}
    archive = write_tar(tmp_path / "x.tar", members)
    found = open_manifest(ManifestConfig(path=archive, label_columns=["a", "b"]))
    assert found.label_columns == LabelColumns(per_class=("a", "b"))
    [batch] = found.batches()
    assert found.label_columns.encode(batch, ["a", "b"]).targets.tolist() == [
        [1, 0], [-1, 1], [1, 0],
    ]  # fmt: skip
    message = refused(archive, label_columns=["a", "c"])
    assert "no column 'c' (found: path, key, json, a; JSON fields: a, b)" in message
    write_tar(tmp_path / "y.tar", {"1.jpg": b""})
    with pytest.raises(ManifestError, match=r"has the column 'a', and .*y\.tar has not"):
        rows_of(f"{tmp_path}/*.tar", label_columns=["a", "b"])


def test_members_of_a_sample_may_be_apart(tmp_path: Path) -> None:
    names = ["a.jpg", "b.cls", "b.jpg", "a.cls"]
    for order in itertools.permutations(names):
        archive = write_tar(tmp_path / "x.tar", {name: name[:1].encode() for name in order})
        keys = list(dict.fromkeys(name[0] for name in order))
        assert [(row["key"], row["label"]) for row in rows_of(archive)] == [(k, k) for k in keys]


def test_each_image_of_a_sample_is_a_row_but_masks_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [
        "1.jpg", "1.mask.png", "1.wav", "2.jpg", "2.png", "3.2020.01.jpg", "4.JPEG", "5.txt",
        "README", ".hidden.jpg", "__MACOSX/1.jpg", "._1.jpg", "6.json",
    ]  # fmt: skip
    archive = write_tar(tmp_path / "x.tar", dict.fromkeys(names, b"x"))
    found = [row["path"].partition("#")[2] for row in rows_of(archive)]
    assert found == ["1.jpg", "2.jpg", "2.png", "3.2020.01.jpg", "4.JPEG"]
    assert list(rows_of(archive)[0]) == ["path", "key"]
    assert (
        "skipped 5 files: 1 (no suffix), 1 .wav, 1 .mask.png, 1 .txt, 1 .json"
        in capsys.readouterr().out
    )


def test_a_labeled_sample_without_an_image_is_a_row(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", sample("1", "cat") | {"2.cls": b"dog"})
    rows = rows_of(archive)
    assert [(row["key"], row["label"]) for row in rows] == [("1", "cat"), ("2", "dog")]
    one, two = image_files.read_ahead([row["path"] for row in rows])
    assert one == b"1"
    assert isinstance(two, StorageError)
    assert two.status == "missing"


def test_shards_of_other_columns_are_refused(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "1.tar", {"a.jpg": b""})
    two = write_tar(tmp_path / "2.tar", sample("b", "1"))
    assert refused(tmp_path) == (
        f"manifest {two}: has the column 'label', and {one} has not; pass archives with the same "
        "columns"
    )
    os.rename(one, tmp_path / "3.tar")
    assert f"manifest {two}: has the column 'label'" in refused(tmp_path)


def test_shards_without_samples_are_no_rows(tmp_path: Path) -> None:
    for name in ("1.tar", "3.tar"):
        write_tar(tmp_path / name, {})
    assert "contains no image" in refused(tmp_path)
    write_tar(tmp_path / "2.tar", sample("b", "1"))
    assert [row["key"] for row in rows_of(tmp_path)] == ["b"]


def test_a_cut_shard_keeps_its_rows_and_has_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = write_tar(tmp_path / "x.tar", {"a.jpg": b"one", "b.jpg": b"x" * 2000, "c.jpg": b"c"})
    os.truncate(archive, 2500)
    rows = rows_of(archive)
    assert [row["key"] for row in rows] == ["a", "b"]
    one, two = image_files.read_ahead([row["path"] for row in rows])
    assert one == b"one"
    assert isinstance(two, Exception)
    assert two.status == "truncated"
    assert "its last member 'b.jpg' is not complete" in capsys.readouterr().out


def test_shards_that_cannot_be_listed_are_refused_by_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "1.tar", sample("a", "0"))
    bad = tmp_path / "2.tar"
    whole = Path(write_tar(bad, sample("b", "0"))).read_bytes()
    for content, message in (
        (whole[:1124], "has a damaged or cut header at byte 1,024"),
        (b"", "is empty"),
        (b"<html>" * 100, "is not a tar archive"),
        (whole + whole, "has data after its end"),
    ):
        bad.write_bytes(content)
        error = refused(tmp_path)
        assert f"{bad}: {message}" in error
    missing = f"{tmp_path}/{{1..3}}.tar"
    bad.write_bytes(whole)
    assert f"no such file: {tmp_path}/3.tar" in refused(missing)


def test_a_compressed_tar_is_refused_with_the_command(tmp_path: Path) -> None:
    whole = Path(write_tar(tmp_path / "x.tar", sample("a", "0"))).read_bytes()
    for name in ("x.tar.gz", "x.tgz"):
        (tmp_path / name).write_bytes(gzip.compress(whole))
        assert f"`gunzip -k {name}`" in refused(tmp_path / name)


def test_texts_that_cannot_be_read_are_refused_by_name(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", {"a.jpg": b"", "a.cls": b"\xff"})
    assert refused(archive) == (
        f"manifest {archive}: member 'a.cls' is not UTF-8 text; write it as UTF-8"
    )
    archive = write_tar(tmp_path / "x.tar", {"a.jpg": b"", "a.json": b"{"})
    assert "member 'a.json' is not JSON" in refused(archive, label_column="x")
    archive = write_tar(tmp_path / "x.tar", {"a.jpg": b"", "a.json": b"3"})
    assert "member 'a.json' is not a JSON object" in refused(archive, label_column="x")


def test_the_column_of_paths_has_a_name_of_its_own(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", sample("a", "0"))
    assert list(rows_of(archive, path_column="url")[0]) == ["url", "key", "label"]
    assert "'key' is also the name of another column" in refused(archive, path_column="key")


def test_the_fingerprint_changes_with_a_shard(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return open_manifest(ManifestConfig(path=str(tmp_path))).fingerprint()

    write_tar(tmp_path / "1.tar", sample("a", "0"))
    first = fingerprint()
    assert fingerprint() == first
    other = write_tar(tmp_path / "2.tar", sample("a", "0"))
    second = fingerprint()
    assert second != first
    os.utime(other, ns=(1, 1))
    assert fingerprint() not in (first, second)


def test_class_folders_of_a_zip_are_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def labels(*names: str, **options: Any) -> list[Any]:
        archive = write_zip(tmp_path / "x.zip", dict.fromkeys(names, b"x"))
        rows = rows_of(archive, **options)
        assert [row["path"] for row in rows] == [
            f"zip://{archive}#{name}" for name in names if name.endswith("jpg")
        ]
        return [row.get(options.get("label_column", "label"), "unlabeled") for row in rows]

    assert labels("cats/1.jpg", "dogs/1.jpg", "dogs/deep/2.jpg") == ["cats", "dogs", "dogs"]
    assert labels("pets/cats/1.jpg", "pets/dogs/1.jpg") == ["cats", "dogs"]
    assert labels("cats/1.jpg", "dogs/1.jpg", label_column="kind") == ["cats", "dogs"]
    assert labels("1.jpg", "2.jpg", "notes.txt") == ["unlabeled"] * 2
    assert "skipped 1 file: 1 .txt" in capsys.readouterr().out
    assert labels("cats/1.jpg", "cats/2.jpg") == ["unlabeled"] * 2
    assert "all images are in the folder 'cats'" in capsys.readouterr().out
    archive = write_zip(tmp_path / "x.zip", dict.fromkeys(["1.jpg", "cats/2.jpg"], b""))
    assert "'1.jpg' is next to the class folders" in refused(archive)


def test_hidden_members_of_a_zip_are_skipped(tmp_path: Path) -> None:
    names = ["a/1.jpg", "b/._1.jpg", "__MACOSX/a/1.jpg", "b/2.jpg", ".x/1.jpg"]
    archive = write_zip(tmp_path / "x.zip", dict.fromkeys(names, b""))
    assert [row["path"].partition("#")[2] for row in rows_of(archive)] == ["a/1.jpg", "b/2.jpg"]


def test_a_folder_of_archives_is_detected(tmp_path: Path) -> None:
    write_tar(tmp_path / "1.tar", sample("a", "0"))
    write_zip(tmp_path / "1.zip", {"1.jpg": b""})
    assert "contains webdataset and zip archives; pass --manifest.format" in refused(tmp_path)
    assert len(rows_of(tmp_path, format="webdataset")) == 1
    assert rows_of(tmp_path, format="zip") == [{"path": f"zip://{tmp_path}/1.zip#1.jpg"}]
    (tmp_path / "1.jpg").write_bytes(b"")
    assert rows_of(tmp_path) == [{"path": "1.jpg"}]
    (tmp_path / "none").mkdir()
    assert "contains no zip archive" in refused(tmp_path / "none", format="zip")


def test_members_in_a_csv_start_at_its_folder(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    archive = write_tar(tmp_path / "shards/1.tar", {"a.jpg": b"one"})
    (tmp_path / "m.csv").write_text(f"path\ntar://shards/1.tar#a.jpg\ntar://{archive}#a.jpg\n")
    manifest = open_manifest(ManifestConfig(path=str(tmp_path / "m.csv")))
    paths = [row["path"] for row in rows_of(tmp_path / "m.csv")]
    assert list(image_files.read_ahead(map(manifest.resolve, paths))) == [b"one"] * 2


def test_shards_in_a_store_are_listed(s3: Any, tmp_path: Path) -> None:
    for number in range(3):
        members = sample("a", "0") | sample("b", "1")
        with open(write_tar(tmp_path / "x.tar", members), "rb") as file:
            s3.upload_fileobj(file, BUCKET, f"wds/{number}.tar")
    expected = [
        (f"tar://{url('wds')}/{number}.tar#{key}.jpg", label)
        for number in range(3)
        for key, label in (("a", "0"), ("b", "1"))
    ]
    for path in (url("wds"), url("wds/*.tar"), url("wds/{0..2}.tar")):
        assert [(row["path"], row["label"]) for row in rows_of(path)] == expected
    assert list(image_files.read_ahead(path for path, _ in expected)) == [b"a", b"b"] * 3
    assert f"no such file: {url('wds/3.tar')}" in refused(url("wds/{2..3}.tar"))


def test_shards_of_webdataset_are_read(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(f"{tmp_path}/%03d.tar", maxcount=4, verbose=0) as writer:
        for number in range(10):
            writer.write(
                {
                    "__key__": f"sample{number}",
                    "jpg": bytes([number]) * 1000,
                    "cls": number % 3,
                    "json": {"number": number},
                }
            )
    rows = rows_of(tmp_path)
    assert [row["label"] for row in rows] == [str(number % 3) for number in range(10)]
    assert [row["json"] for row in rows] == [f'{{"number": {number}}}' for number in range(10)]
    theirs = webdataset.WebDataset(f"{tmp_path}/{{000..002}}.tar", shardshuffle=False)
    for row, each in zip(rows, theirs, strict=True):
        assert row["key"] == each["__key__"]
        assert image_files.read_image(row["path"]) == each["jpg"]


def test_an_appended_member_replaces_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = write_tar(tmp_path / "x.tar", sample("a", "0"))
    with tarfile.open(archive, "a") as tar:
        add_members(tar, {"a.cls": b"1"})
    assert [row["label"] for row in rows_of(archive)] == ["1"]
    assert "1 member replaced by a later one of the same name" in capsys.readouterr().out
