"""Manifests built from tables: every value as the table has it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls import config as configuration
from imgcls.curation import build, listing
from imgcls.curation.build import CONTENT_COLUMNS, _check_columns, build_manifest
from imgcls.curation.config import ManifestBuildConfig
from imgcls.data import image_files
from imgcls.data.manifests.label_columns import LabelColumns
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.errors import ConfigError, ManifestError, OutputError, OutputLocked, RunFailed
from imgcls.runs.lease import Lease
from tests.conftest import write_manifest
from tests.curation.pictures import jpeg, picture


def test_a_table_is_read_as_a_manifest_is(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_bytes('file,kind\na.jpg,"fou\u00e9 \\"x\\"\r\ny"\n'.encode("latin-1"))
    settings = {"source": str(table), "output": str(tmp_path / "out"), "path_column": "file"}
    with pytest.raises(ManifestError, match=r"set --encoding$"):
        build_manifest(ManifestBuildConfig(**settings))
    with pytest.raises(ManifestError, match=r"pass --escape"):
        build_manifest(ManifestBuildConfig(**settings, encoding="latin-1"))
    assert build_manifest(ManifestBuildConfig(**settings, encoding="latin-1", escape="\\")) == 1
    assert pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist() == [
        {"path": f"{tmp_path}/a.jpg", "kind": 'fou\u00e9 "x"\r\ny'}
    ]


def test_images_in_a_table_become_their_urls(tmp_path: Path) -> None:
    table = tmp_path / "images.parquet"
    pq.write_table(pa.table({"photo": [b"1", b"2"], "kind": ["a", "b"]}), table)
    settings = {"source": str(table), "output": str(tmp_path / "out"), "label_column": "kind"}
    assert build_manifest(ManifestBuildConfig(**settings, image_column="photo")) == 2
    written = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pydict()
    assert written["label"] == ["a", "b"]
    assert [path.rpartition("/")[0] for path in written["path"]] == [
        f"parquet://{table}#photo/0", f"parquet://{table}#photo/1",
    ]  # fmt: skip
    assert list(image_files.read_ahead(written["path"])) == [b"1", b"2"]


def test_an_added_column_does_not_hide_a_column_of_another_case(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.jpg"], "Width": [3]}), tmp_path / "m.parquet")
    manifest = open_manifest(ManifestConfig(path=str(tmp_path / "m.parquet")))
    with pytest.raises(ManifestError, match="has a column 'Width', which --contents writes"):
        _check_columns(manifest, ["width", "height"])


def build_from(**settings: object) -> int:
    return build_manifest(configuration.build(ManifestBuildConfig, settings))


def test_a_column_of_the_user_is_not_replaced(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    write_manifest(table, [("a.jpg", "sold")], ("path", "status"))
    with pytest.raises(ManifestError, match="has a column 'status', which --contents writes"):
        build_from(source=str(table), output=str(tmp_path / "out"), contents=True)
    with pytest.raises(ManifestError, match="has a column 'status', which --contents writes"):
        build_from(
            source=str(table), label_column="status", output=str(tmp_path / "out"), contents=True
        )


def test_labels_require_a_folder(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "a.jpg").write_bytes(jpeg(picture(0)))
    with pytest.raises(ConfigError, match="is not a folder with one folder per class"):
        build_from(source=f"{tmp_path}/*/*.jpg", labels=True, output=str(tmp_path / "out"))


def test_overwrite_does_not_remove_the_source(tmp_path: Path) -> None:
    source = tmp_path / "manifest.parquet"
    pq.write_table(pa.table({"path": ["a.jpg"]}), source)
    with pytest.raises(OutputError, match=r"would remove .*manifest\.parquet"):
        build_from(source=str(tmp_path), output=str(tmp_path), contents=True, overwrite=True)
    assert source.exists()


def test_a_driver_that_lost_its_lease_completes_no_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(_: Lease) -> None:
        raise RunFailed("the lease on the output was lost")

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(jpeg(picture(0)))
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Lease, "check", check)
        with pytest.raises(RunFailed, match="lease"):
            build_from(source=str(tmp_path / "photos"), output=str(output))
    assert not (output / "_SUCCESS").exists()
    assert build_from(source=str(tmp_path / "photos"), output=str(output)) == 1
    assert (output / "_SUCCESS").exists()


def test_a_driver_that_lost_its_lease_writes_no_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(_: Lease) -> None:
        raise RunFailed("the lease on the output was lost")

    class Scanned:
        def read_tables(self) -> Iterator[tuple[pa.Table, pa.Table]]:
            features = {name: ["ok"] for name in CONTENT_COLUMNS}
            yield pa.table({"path": ["a.jpg"]}), pa.table(features)

    @contextlib.contextmanager
    def scan(*_: object, **__: object) -> Iterator[list[Scanned]]:
        yield [Scanned()]

    monkeypatch.setattr(build, "scan_manifests", scan)
    monkeypatch.setattr(Lease, "check", check)
    write_manifest(tmp_path / "t.csv", [("a.jpg",)], ("path",))
    with pytest.raises(RunFailed, match="lease"):
        build_from(source=str(tmp_path / "t.csv"), output=str(tmp_path / "out"), contents=True)
    assert not (tmp_path / "out" / "manifest.parquet").exists()


@pytest.mark.parametrize("contents", [False, True])
def test_a_build_whose_output_another_one_holds_does_not_list_the_source(
    contents: bool, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(jpeg(picture(0)))
    output = tmp_path / "out"
    lease = Lease.acquire(str(output))
    try:
        with pytest.raises(OutputLocked, match=r"out is locked by"):
            build_from(source=str(tmp_path / "photos"), output=str(output), contents=contents)
        assert [path.name for path in output.iterdir()] == ["_lease"]
    finally:
        lease.release()
    assert build_from(source=str(tmp_path / "photos"), output=str(tmp_path / "out")) == 1
    assert not (output / "_lease").exists()


def test_a_table_is_not_written_to_an_output_that_another_build_holds(tmp_path: Path) -> None:
    write_manifest(tmp_path / "t.csv", [("a.jpg",)], ("path",))
    lease = Lease.acquire(str(tmp_path / "out"))
    try:
        with pytest.raises(OutputLocked, match=r"out is locked by"):
            build_from(source=str(tmp_path / "t.csv"), output=str(tmp_path / "out"))
    finally:
        lease.release()
    assert not (tmp_path / "out" / "manifest.parquet").exists()


def test_a_wrong_table_leaves_no_output_folder(tmp_path: Path) -> None:
    write_manifest(tmp_path / "t.csv", [("a.jpg", 3)], ("path", "width"))
    with pytest.raises(ManifestError, match="has a column 'width'"):
        build_from(source=str(tmp_path / "t.csv"), output=str(tmp_path / "out"), contents=True)
    assert not (tmp_path / "out").exists()


def read_built(folder: Path) -> dict[str, list[object]]:
    columns: dict[str, list[object]] = pq.read_table(folder / "manifest.parquet").to_pydict()
    del columns["path"]
    return columns


def test_labels_of_several_classes_become_a_column_of_lists(tmp_path: Path) -> None:
    lists = pa.array([["dog", " cat "], [], None], pa.large_list(pa.string()))
    table = pa.table({"path": ["a", "b", "c"], "tags": lists, "n": [1, 2, 3]})
    pq.write_table(table, tmp_path / "lists.parquet")
    rows = [("a", "dog| cat", "1"), ("b", "|", "2"), ("c", " ", "3")]
    write_manifest(tmp_path / "text.csv", rows, ("path", "tags", "n"))
    rows = [("a", "1", "1", "1"), ("b", "0", "0", "2"), ("c", "", "", "3")]
    write_manifest(tmp_path / "columns.csv", rows, ("path", "dog", "cat", "n"))
    for name, labels in (
        ("lists.parquet", {"label_column": "tags"}),
        ("text.csv", {"label_column": "tags", "label_delimiter": "|"}),
        ("columns.csv", {"label_columns": "dog,cat"}),
    ):
        output = tmp_path / name.partition(".")[0]
        assert build_from(source=str(tmp_path / name), output=str(output), **labels) == 3
        built = read_built(output)
        assert built["label"] == [["dog", "cat"], [], None]
        assert [str(n) for n in built["n"]] == ["1", "2", "3"]
        assert set(built) == {"label", "n"}
        again = open_manifest(ManifestConfig(path=str(output)))
        assert again.label_columns == LabelColumns("label")


def test_class_columns_with_unknown_values_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("a", "1", ""), ("b", "0", "1"), ("c", "", "")]
    write_manifest(tmp_path / "m.csv", rows, ("path", "dog", "cat"))
    settings = {"source": str(tmp_path / "m.csv"), "output": str(tmp_path / "out")}
    assert build_from(**settings, label_columns="dog,cat") == 3
    assert read_built(tmp_path / "out") == {"dog": ["1", "0", None], "cat": [None, "1", None]}
    text = "1 row with unknown classes, so the class columns stay; read the manifest with "
    assert text + "--manifest.label-columns dog,cat" in capsys.readouterr().out


def test_a_class_without_an_image_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_manifest(tmp_path / "m.csv", [("a", "1", "0")], ("path", "dog", "cat"))
    settings = {"source": str(tmp_path / "m.csv"), "output": str(tmp_path / "out")}
    build_from(**settings, label_columns="dog,cat")
    assert "no image has 'cat'; lists of labels do not contain" in capsys.readouterr().out


def test_another_column_with_the_name_of_the_lists_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.csv", [("a", "1", "x")], ("path", "dog", "label"))
    settings = {"source": str(tmp_path / "m.csv"), "output": str(tmp_path / "out")}
    with pytest.raises(ManifestError, match="has another column 'label'; rename it"):
        build_from(**settings, label_columns="dog")


def test_lists_become_text_in_a_csv(tmp_path: Path) -> None:
    names = [["big dog", 'the "cat"'], [], None, ["\u00e9, x"]]
    table = pa.table({"path": ["a", "b", "c", "d"], "labels": names, "n": [1, 2, None, 4]})
    pq.write_table(table, tmp_path / "m.parquet")
    output = tmp_path / "out"
    settings = {"source": str(tmp_path / "m.parquet"), "output": str(output)}
    assert build_from(**settings, output_format="csv", csv_separator="|") == 4
    assert [path.name for path in output.iterdir()] == ["manifest.csv"]
    manifest = open_manifest(ManifestConfig(path=str(output), label_delimiter="|"))
    assert manifest.label_columns == LabelColumns("label", "|")
    [batch] = manifest.batches()
    assert manifest.label_columns.read_names(batch).to_pylist() == names
    assert batch.column("n").to_pylist() == ["1", "2", None, "4"]
    with pytest.raises(OutputError, match="contains a manifest already; pass --overwrite"):
        build_from(**settings, output_format="csv")
    build_from(**{**settings, "output": str(tmp_path / "other")})
    with pytest.raises(OutputError, match=r"contains other files \(manifest\.parquet\)"):
        build_from(**{**settings, "output": str(tmp_path / "other")}, output_format="csv")


def test_a_folder_is_listed_into_a_csv(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        (tmp_path / "photos" / label / "1.jpg").write_bytes(jpeg(picture(0)))
    settings = {"source": str(tmp_path / "photos"), "output": str(tmp_path / "out")}
    assert build_from(**settings, labels=True, output_format="csv") == 2
    manifest = open_manifest(ManifestConfig(path=str(tmp_path / "out")))
    [batch] = manifest.batches()
    assert batch.column("label").to_pylist() == ["cat", "dog"]
    assert manifest.schema.names == ["path", "size", "mtime", "etag", "label"]


def test_a_listing_that_another_source_left_is_not_used(tmp_path: Path) -> None:
    for folder in ("one/x;y", "two/z"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.jpg").write_bytes(jpeg(picture(0)))
    settings: dict[str, Any] = {"output": str(tmp_path / "out"), "output_format": "csv"}
    settings |= {"labels": True, "merge_links": True}
    with pytest.raises(ManifestError, match="contains the separator"):
        build_from(source=str(tmp_path / "one"), **settings)
    assert build_from(source=str(tmp_path / "two"), **settings) == 1
    [batch] = open_manifest(ManifestConfig(path=str(tmp_path / "out"))).batches()
    assert batch.column("path").to_pylist() == [str(tmp_path / "two" / "z" / "1.jpg")]


def test_the_listing_of_the_same_source_is_found_again(tmp_path: Path) -> None:
    stored = tmp_path / "_listing.json"
    assert not listing.has_other_listing(str(tmp_path), "s3://bucket/photos/", True)
    stored.write_text('{"source": "s3://bucket/photos", "labels": true, "groups": [["a"]]}')
    for source, labels, other in (
        ("s3://bucket/photos/", True, False),
        ("s3://bucket/photos", True, False),
        ("s3://bucket/photos", False, True),
        ("s3://bucket/others", True, True),
    ):
        assert listing.has_other_listing(str(tmp_path), source, labels) == other
    stored.write_text('{"source": "s3:')
    assert listing.has_other_listing(str(tmp_path), "s3://bucket/photos", True)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [["a;b"]]}, "the class name 'a;b' contains the separator ';'; pass another"),
        ({"boxes": [[1]]}, "column 'boxes' is list<.*>, which CSV cannot have"),
        ({"mark": [b"\xff"]}, "column 'mark' is binary, which CSV cannot have"),
    ],
)
def test_what_a_csv_cannot_have_is_refused(
    tmp_path: Path, columns: dict[str, list[object]], message: str
) -> None:
    pq.write_table(pa.table({"path": ["a"], **columns}), tmp_path / "m.parquet")
    settings = {"source": str(tmp_path / "m.parquet"), "output": str(tmp_path / "out")}
    with pytest.raises(ManifestError, match=message):
        build_from(**settings, output_format="csv")
    assert not (tmp_path / "out" / "manifest.csv").exists()


def test_bytes_of_text_are_text_in_a_csv(tmp_path: Path) -> None:
    table = {"path": ["a", "b"], "mark": pa.array([b"a1", None]), "two": pa.array([b"xy"] * 2)}
    table["two"] = table["two"].cast(pa.binary(2))
    pq.write_table(pa.table(table), tmp_path / "m.parquet")
    build_from(
        source=str(tmp_path / "m.parquet"), output=str(tmp_path / "out"), output_format="csv"
    )
    lines = (tmp_path / "out" / "manifest.csv").read_text().splitlines()
    assert [line.split(",")[1:] for line in lines] == [
        ['"mark"', '"two"'], ['"a1"', '"xy"'], ["", '"xy"']
    ]  # fmt: skip
