"""Detection of the format of a path, folder or glob; nothing is skipped or mixed silently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.errors import ManifestError
from tests.s3 import BUCKET, url


def rows_of(path: object, **options: Any) -> list[dict[str, Any]]:
    manifest = open_manifest(ManifestConfig(path=str(path), **options))
    return [row for batch in manifest.batches() for row in batch.to_pylist()]


def paths_of(path: object, **options: Any) -> list[str]:
    return [row["path"] for row in rows_of(path, **options)]


def refused(path: object, **options: Any) -> str:
    with pytest.raises(ManifestError) as caught:
        rows_of(path, **options)
    return str(caught.value)


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., None]:
    """Writes files: Parquet and CSV with their own name as the path, anything else empty."""

    def write(*names: str) -> None:
        for name in names:
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith((".parquet", ".pq")):
                pq.write_table(pa.table({"path": [f"/{name}"]}), file)
            else:
                file.write_text(f"path\n/{name}\n" if name.endswith((".csv", ".tsv")) else "")

    return write


Put = Callable[..., None]


def test_skipped_files_are_counted_by_suffix(
    put: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put("a.jpg", "b.xyz", "c.XYZ", "notes.md", "README", ".hidden.xyz", ".trash/1.xyz")
    assert paths_of(tmp_path) == ["a.jpg"]
    output = capsys.readouterr().out
    assert output == (
        f"note: manifest {tmp_path}: skipped 4 files: 2 .xyz, 1 (no suffix), 1 .md; their "
        "names are not those of images\n"
    )
    assert paths_of(f"{tmp_path}/[abc]*", format="images") == [f"{tmp_path}/a.jpg"]
    assert "skipped 2 files: 2 .xyz" in capsys.readouterr().out
    (tmp_path / "a.jpg").unlink()
    assert "contains no image (skipped 4 files: 2 .xyz, 1 (no suffix), 1 .md)" in refused(tmp_path)


def test_the_files_of_systems_and_bundles_are_no_classes(put: Put, tmp_path: Path) -> None:
    put("cats/1.jpg", "dogs/1.jpg", "@eaDir/thumb.jpg", "dogs/@eaDir/2.jpg", "lost+found/3.jpg",
        "__MACOSX/cats/._1.jpg", ".ipynb_checkpoints/1.jpg", "System Volume Information/4.jpg",
        "bundle/bundle.json", "bundle/plots/curves.png", "runs/x/bundle.json",
        "runs/x/plots/a.png")  # fmt: skip
    (tmp_path / "lost+found").chmod(0)
    assert {row["label"] for row in rows_of(tmp_path)} == {"cats", "dogs"}
    put("dogs/plots/5.jpg")  # not of a bundle
    assert "dogs/plots/5.jpg" in paths_of(tmp_path)


def test_the_pictures_of_a_run_are_no_images_of_a_manifest_around_it(
    put: Put, tmp_path: Path
) -> None:
    put("a.jpg")
    config = ManifestConfig(path=str(tmp_path))
    before = open_manifest(config).fingerprint()
    put("out/_explanations/000000000-0123456789ab.jpg")
    assert paths_of(tmp_path) == ["a.jpg"]
    assert open_manifest(config).fingerprint() == before
    assert paths_of(f"{tmp_path}/**/*.jpg", format="images") == [f"{tmp_path}/a.jpg"]


def test_tables_next_to_archives_are_refused_with_each_fix(put: Put, tmp_path: Path) -> None:
    # the output of img2dataset
    put("00000.tar", "00000.parquet", "00000_stats.json", "00001.tar", "00001.parquet")
    assert refused(tmp_path) == (
        f"manifest {tmp_path}: contains a table ('00000.parquet') and an archive ('00000.tar'); "
        "pass --manifest.format parquet for the rows of the tables, or --manifest.format "
        "webdataset for the images in the archives"
    )


@pytest.mark.parametrize("name", ["results.csv", "manifest.parquet", "list.tsv", "list.csv.gz"])
@pytest.mark.parametrize("image", ["a.jpg", "cats/a.jpg"])
def test_a_table_among_images_is_refused_with_each_fix(
    put: Put, tmp_path: Path, name: str, image: str
) -> None:
    put(image, name)
    message = refused(tmp_path)
    assert f"contains a table ({name!r}) and images ({image!r})" in message
    kind = "parquet" if name.endswith(".parquet") else "csv"
    for way in (f"{tmp_path}/{name}", f"--manifest.format {kind}", "--manifest.format tree"):
        assert way in message
    if not name.endswith(".gz"):
        assert paths_of(tmp_path, format=kind) == [f"/{name}"]
        assert paths_of(tmp_path / name) == [f"/{name}"]
    assert paths_of(tmp_path, format="images") == [image]


def test_csv_and_parquet_in_one_folder_are_refused_without_a_format(
    put: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put("monday.csv", "tuesday.parquet")
    message = refused(tmp_path)
    assert "contains CSV files ('monday.csv') and Parquet files ('tuesday.parquet')" in message
    assert "--manifest.format csv or parquet" in message
    assert paths_of(tmp_path, format="csv") == ["/monday.csv"]
    assert "skipped 1 file: 1 .parquet; only csv files are read" in capsys.readouterr().out
    assert paths_of(tmp_path, format="parquet") == ["/tuesday.parquet"]


def test_hidden_and_temporary_tables_are_not_read(put: Put, tmp_path: Path) -> None:
    put("a.parquet", "_tmp.parquet", ".x.parquet", "_SUCCESS")
    (tmp_path / "._a.parquet").write_bytes(b"\x00\x05\x16\x07")  # macOS
    assert paths_of(tmp_path) == ["/a.parquet"]
    assert paths_of(f"{tmp_path}/*.parquet") == ["/a.parquet"]
    assert paths_of(f"{tmp_path}/_t*.parquet") == ["/_tmp.parquet"]
    (tmp_path / "a.parquet").unlink()
    assert "only files whose names begin with _ or . match" in refused(f"{tmp_path}/*.parquet")


def test_hive_partitions_are_columns(put: Put, tmp_path: Path) -> None:
    put("year=2024/month=01/b.parquet", "year=2023/month=12/a.parquet", "_SUCCESS",
        "year=__HIVE_DEFAULT_PARTITION__/month=a%2Fb/c.parquet")  # fmt: skip
    assert rows_of(tmp_path) == [
        {"path": "/year=2023/month=12/a.parquet", "year": "2023", "month": "12"},
        {"path": "/year=2024/month=01/b.parquet", "year": "2024", "month": "01"},
        {
            "path": "/year=__HIVE_DEFAULT_PARTITION__/month=a%2Fb/c.parquet",
            "year": None,
            "month": "a/b",
        },
    ]
    put("year=2025/d.parquet")
    assert "is in partitions ['year'], and" in refused(tmp_path)
    (tmp_path / "year=2025" / "d.parquet").unlink()
    put("year=2025/other/d.parquet")
    assert "'other' that is not a partition" in refused(tmp_path)


def test_relative_paths_of_partitions_start_at_the_passed_folder(tmp_path: Path) -> None:
    (tmp_path / "day=1").mkdir()
    pq.write_table(pa.table({"path": ["x/a.jpg"]}), tmp_path / "day=1" / "a.parquet")
    manifest = open_manifest(ManifestConfig(path=str(tmp_path)))
    assert paths_of(tmp_path) == ["x/a.jpg"]
    assert manifest.resolve("x/a.jpg") == f"{tmp_path}/x/a.jpg"


@pytest.mark.parametrize(
    "name",
    ["2026/01/x.jpg", "2026-01-31/x.jpg", "2026_01/x.jpg", "20260131/x.jpg", "202601/x.jpg",
     "date=2026-01-31/x.jpg", "2026-W03/x.jpg"],
)  # fmt: skip
def test_folders_named_like_dates_are_not_classes(put: Put, tmp_path: Path, name: str) -> None:
    put(name)
    message = refused(tmp_path)
    assert f"its folders look like dates or partitions, not classes ({name.split('/')[0]!r})" in (
        message
    )
    assert "--manifest.format images" in message
    assert rows_of(tmp_path, format="images") == [{"path": name}]
    assert rows_of(tmp_path, format="tree") == [{"path": name, "label": name.partition("/")[0]}]


def test_folders_of_numbers_are_classes(put: Put, tmp_path: Path) -> None:
    put("0/a.jpg", "1/a.jpg", "2000/a.jpg", "200112/a.jpg")
    assert [row["label"] for row in rows_of(tmp_path)] == ["0", "1", "2000", "200112"]


def test_tables_in_folders_below_are_named(
    put: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put("below/a.parquet")
    assert "it has some in subfolders ('below/a.parquet'): pass a glob" in refused(
        tmp_path, format="parquet"
    )
    put("top.parquet")
    assert paths_of(tmp_path) == ["/top.parquet"]
    assert (
        "the tables in its subfolders are not read ('below/a.parquet')" in capsys.readouterr().out
    )
    assert paths_of(f"{tmp_path}/**/*.parquet") == ["/below/a.parquet", "/top.parquet"]


def test_a_delta_table_is_not_read_as_its_files(put: Put, tmp_path: Path) -> None:
    put("a.parquet", "_delta_log/00000.json")
    expected = "is a Delta Lake table, whose files may contain deleted rows; leave out"
    assert expected in refused(tmp_path, format="parquet")


def test_a_glob_of_several_formats_is_refused_with_the_fix(put: Put, tmp_path: Path) -> None:
    put("a.jpg", "b.csv")
    assert "narrow the pattern to files of one kind" in refused(f"{tmp_path}/*")


def test_the_query_of_a_signed_url_is_no_part_of_its_name() -> None:
    from imgcls.data.manifests.manifest import get_table_folder
    from imgcls.data.manifests.readers import detect_table_format

    url = "https://host/lists/m.csv?X-Amz-Signature=a/b%2Fc"
    assert detect_table_format(url) == "csv"
    assert get_table_folder(url) == "https://host/lists"
    assert detect_table_format("s3://bucket/what?.csv") == "csv"


def test_a_bucket_is_read_as_a_folder_of_the_same_files(s3: Any, tmp_path: Path) -> None:
    body = tmp_path / "m.parquet"
    pq.write_table(pa.table({"path": ["./a.jpg"]}), body)

    def put(*names: str) -> None:
        for name in names:
            data = body.read_bytes() if name.endswith(".parquet") else b"path\n./a.jpg\n"
            s3.put_object(Bucket=BUCKET, Key=f"discovery/{name}", Body=data)

    put("hive/day=1/m.parquet", "hive/day=1/_tmp.parquet", "hive/day=2/m.parquet",
        "tree/cat/1.jpg", "tree/@eaDir/2.jpg", "tree/b/bundle.json", "tree/b/plots/3.png",
        "both/a.csv", "both/sub/a.jpg", "dated/2026/01/a.jpg", "lists/x/m.csv", "lists/y/m.csv",
        "gz/m.csv")  # fmt: skip
    assert rows_of(url("discovery/hive")) == [
        {"path": "./a.jpg", "day": "1"},
        {"path": "./a.jpg", "day": "2"},
    ]
    hive = open_manifest(ManifestConfig(path=url("discovery/hive/")))
    assert hive.resolve("./a.jpg") == url("discovery/hive/a.jpg")
    assert rows_of(url("discovery/tree")) == [{"path": "cat/1.jpg", "label": "cat"}]
    assert "contains a table ('a.csv') and images ('sub/a.jpg')" in refused(url("discovery/both"))
    assert "look like dates or partitions" in refused(url("discovery/dated"))
    assert paths_of(url("discovery/lists/*/m.csv")) == [
        url("discovery/lists/x/a.jpg"),
        url("discovery/lists/y/a.jpg"),
    ]
