from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.data import image_files
from imgcls.data.manifests.label_columns import LabelColumns
from imgcls.data.manifests.manifest import Manifest, ManifestConfig, open_manifest
from imgcls.data.manifests.options import KeyNames
from imgcls.errors import ManifestError, StorageMissing

IMAGES = [b"first", b"", b"third image"]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def as_structs(
    images: Sequence[bytes | None], paths: Sequence[str | None] | None = None
) -> pa.Array:
    names = paths or [f"{row}.jpg" for row in range(len(images))]
    return pa.array(
        [{"bytes": each, "path": name} for each, name in zip(images, names, strict=True)], STRUCT
    )


def open_(path: Path | str, **keys: Any) -> Manifest:
    return open_manifest(ManifestConfig(path=str(path), **keys))


def read_rows(manifest: Manifest) -> pa.Table:
    return pa.Table.from_batches(manifest.batches(), manifest.schema)


def read_images(manifest: Manifest) -> list[Any]:
    paths = read_rows(manifest).column(manifest.path_column).to_pylist()
    return list(image_files.read_ahead([manifest.resolve(path) for path in paths]))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
def test_the_only_column_of_bytes_is_that_of_the_images(
    tmp_path: Path, kind: pa.DataType, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.parquet", {"id": [1, 2, 3], "photo": pa.array(IMAGES, kind)})
    manifest = open_(path)
    assert manifest.path_column == "photo"
    assert manifest.schema == pa.schema([("id", pa.int64()), ("photo", pa.string())])
    rows = read_rows(manifest)
    assert rows["id"].to_pylist() == [1, 2, 3]
    first, second, _ = rows["photo"].to_pylist()
    start, version = first.split("#")[0], first.rsplit("/", 1)[1]
    assert start == f"parquet://{path}"
    assert second == f"parquet://{path}#photo/1/{version}"
    assert read_images(manifest) == IMAGES
    assert "the images are those in column 'photo'" in capsys.readouterr().out


def test_a_struct_of_hugging_face_is_preferred_to_other_bytes(tmp_path: Path) -> None:
    columns = {"md5": [b"1", b"2", b"3"], "image": as_structs(IMAGES), "label": [1, 0, 1]}
    manifest = open_(write(tmp_path / "a.parquet", columns))
    assert manifest.path_column == "image"
    rows = read_rows(manifest)
    assert rows.schema.names == ["md5", "image", "image_path", "label"]
    assert rows["image_path"].to_pylist() == ["0.jpg", "1.jpg", "2.jpg"]
    assert rows["md5"].to_pylist() == [b"1", b"2", b"3"]
    assert read_images(manifest) == IMAGES


def test_the_path_of_a_struct_is_not_kept_where_its_name_is_taken(tmp_path: Path) -> None:
    columns = {"image": as_structs(IMAGES), "Image_Path": ["a", "b", "c"]}
    manifest = open_(write(tmp_path / "a.parquet", columns))
    assert manifest.schema.names == ["image", "Image_Path"]
    assert read_images(manifest) == IMAGES


def test_two_columns_of_images_are_refused_with_the_key(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"left": as_structs(IMAGES), "right": as_structs(IMAGES)})
    with pytest.raises(ManifestError, match="'left' and 'right' may contain the images; name one "):
        open_(path)
    with pytest.raises(ManifestError, match=r"--data\.train\.image-column"):
        open_manifest(ManifestConfig(path=str(path)), keys=KeyNames("data.train"))
    manifest = open_(path, image_column="right")
    assert manifest.schema.names == ["right", "right_path"]
    assert read_images(manifest) == IMAGES


def test_a_column_of_paths_is_used_before_bytes_which_are_not_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {
        "path": ["a.jpg", "b.jpg", "c.jpg"],
        "image": as_structs(IMAGES),
        "crops": pa.array([[], [], []], pa.list_(STRUCT)),
        "md5": IMAGES,
    }
    path = write(tmp_path / "a.parquet", columns)
    manifest = open_(path)
    assert manifest.path_column == "path"
    assert read_rows(manifest).to_pydict() == {"path": ["a.jpg", "b.jpg", "c.jpg"], "md5": IMAGES}
    shown = " ".join(capsys.readouterr().out.split())
    assert "'image' of images is left out" in shown
    assert "--manifest.image-column image" in shown
    assert "'crops' of images is left out" in shown
    assert read_images(open_(path, image_column="image")) == IMAGES
    assert read_images(open_(path, image_column="md5")) == IMAGES


def test_a_column_of_paths_that_the_user_named_must_be_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": as_structs(IMAGES)})
    with pytest.raises(ManifestError, match="no column 'file'"):
        open_(path, path_column="file")
    assert read_images(open_(path, path_column="image")) == IMAGES


def test_bytes_in_the_column_of_paths_are_refused_with_both_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"path": IMAGES})
    with pytest.raises(ManifestError, match=r"is binary, not text.*--manifest\.image-column"):
        open_(path)
    assert read_images(open_(path, image_column="path")) == IMAGES


@pytest.mark.parametrize(
    ("column", "error"),
    [
        (pa.array([1, 2]), "column 'image' is int64, which is not one image per row"),
        (pa.array([[b"1"], [b"2"]]), "column 'image' is list<"),
        (pa.array([b"12", b"34"], pa.binary(2)), r"column 'image' is fixed_size_binary"),
    ],
    ids=["int", "list", "fixed"],
)
def test_a_column_without_images_is_refused(tmp_path: Path, column: pa.Array, error: str) -> None:
    path = write(tmp_path / "a.parquet", {"image": column})
    with pytest.raises(ManifestError, match=error):
        open_(path, image_column="image")
    with pytest.raises(ManifestError, match="no column 'other'"):
        open_(path, image_column="other")


def test_an_encoding_that_can_multiply_bytes_is_refused(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.parquet",
        {"image": IMAGES},
        use_dictionary=False,
        column_encoding={"image": "DELTA_BYTE_ARRAY"},
    )
    with pytest.raises(ManifestError, match=r"'image' is encoded as DELTA_BYTE_ARRAY.*as PLAIN"):
        list(open_(path).batches())


@pytest.mark.parametrize(
    "options", [{}, {"row_group_size": 1}, {"write_statistics": False}], ids=str
)
def test_rows_without_bytes_have_the_path_of_their_struct(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "b.jpg").write_bytes(b"a file")
    images = as_structs([b"first", None, None], ["a.jpg", "files/b.jpg", None])
    columns = {"image": pa.concat_arrays([images, pa.nulls(1, STRUCT)])}
    manifest = open_(write(tmp_path / "a.parquet", columns, **options))
    rows = read_rows(manifest)
    assert rows["image"].to_pylist()[1:] == ["files/b.jpg", None, None]
    assert rows["image_path"].to_pylist() == ["a.jpg", "files/b.jpg", None, None]
    first, second, third, fourth = read_images(manifest)
    assert (first, second) == (b"first", b"a file")
    assert isinstance(third, StorageMissing)
    assert isinstance(fourth, StorageMissing)


def test_paths_of_tables_in_several_folders_start_at_their_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(name.encode())
        columns = {"image": as_structs([None, b"in " + name.encode()], ["1.jpg", None])}
        write(tmp_path / name / "t.parquet", columns)
    assert read_images(open_(tmp_path / "*" / "t.parquet")) == [b"a", b"in a", b"b", b"in b"]


def test_a_table_that_was_written_again_has_no_image_of_another_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": IMAGES})
    urls = read_rows(open_(path))["image"].to_pylist()
    write(path, {"image": [*IMAGES[1:], b"another"]})
    for outcome in image_files.read_ahead(urls):
        assert isinstance(outcome, StorageMissing)
        assert "was written again after its rows were read" in str(outcome)


def test_a_fingerprint_changes_with_any_column_but_does_not_read_the_images(
    tmp_path: Path,
) -> None:
    columns = {"image": [os.urandom(100_000) for _ in range(3)], "label": [0, 1, 2]}
    options = {"compression": "none", "use_dictionary": False}
    path = write(tmp_path / "a.parquet", columns, **options)
    first = open_(path).fingerprint()
    data = path.read_bytes()
    assert open_(path).fingerprint() == first
    write(path, {**columns, "label": [0, 2, 1]}, **options)
    assert open_(path).fingerprint() != first
    # the images alone are not part of it, as long as their sizes stay
    at = data.index(columns["image"][0])
    path.write_bytes(data[:at] + bytes(100_000) + data[at + 100_000 :])
    assert open_(path).fingerprint() == first
    write(path, {**columns, "image": [b"shorter", *columns["image"][1:]]}, **options)
    assert open_(path).fingerprint() != first


def test_a_folder_with_a_suffix_and_a_number_sign_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a.parquet#b"
    folder.mkdir()
    with pytest.raises(ManifestError, match="a folder with # in its name"):
        list(open_(write(folder / "a.parquet", {"image": IMAGES})).batches())
    folder = tmp_path / "c#d"
    folder.mkdir()
    assert read_images(open_(write(folder / "a.parquet", {"image": IMAGES}))) == IMAGES


def test_a_csv_with_a_column_of_images_is_refused_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("photo\naGVsbG8=\n")
    with pytest.raises(ManifestError, match=r"image-column is for Parquet files.*data: URLs"):
        open_(tmp_path / "a.csv", image_column="photo")


HUGGING_FACE = {
    "info": {
        "features": {
            "image": {"_type": "Image"},
            "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
            "kind": {"names": ["x", "y"], "_type": "ClassLabel"},
        }
    }
}


def write_hugging_face(path: Path, columns: dict[str, Any]) -> Path:
    """A table with the metadata that `datasets` writes."""
    table = pa.table(columns)
    metadata = {"huggingface": json.dumps(HUGGING_FACE)}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def test_numbers_of_classes_become_names_with_and_without_images(tmp_path: Path) -> None:
    labels = {"label": [1, 0, -1, None], "kind": ["a", "b", "c", "d"], "other": [1, 0, -1, None]}
    expected = {**labels, "label": ["dog", "cat", None, None]}
    paths = write_hugging_face(tmp_path / "paths.parquet", {"path": ["a", "b", "c", "d"], **labels})
    assert read_rows(open_(paths)).drop_columns("path").to_pydict() == expected
    assert open_(paths).schema.field("label").type == pa.string()
    images = write_hugging_face(
        tmp_path / "a.parquet", {"image": as_structs([*IMAGES, b""]), **labels}
    )
    manifest = open_(images)
    assert read_rows(manifest).select(["label", "kind", "other"]).to_pydict() == expected
    assert read_images(manifest) == [*IMAGES, b""]


def test_a_number_without_a_class_is_refused(tmp_path: Path) -> None:
    path = write_hugging_face(tmp_path / "a.parquet", {"path": ["a", "b"], "label": [1, 2]})
    with pytest.raises(ManifestError, match=r"'label' contains 2, and .* names of 2 classes"):
        list(open_(path).batches())


def test_a_data_set_of_hugging_face_is_read_as_written(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {
        "image": [{"bytes": each, "path": f"{at}.jpg"} for at, each in enumerate(IMAGES)],
        "label": [1, 0, -1],
    }
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    manifest = open_(path)
    table = read_rows(manifest)
    assert table["label"].to_pylist() == ["dog", "cat", None]
    assert table["image_path"].to_pylist() == ["0.jpg", "1.jpg", "2.jpg"]
    assert read_images(manifest) == IMAGES


CLASS_LABEL = {"names": ["cat", "dog"], "_type": "ClassLabel"}


@pytest.mark.parametrize(
    "feature",
    [[CLASS_LABEL], *({"_type": t, "feature": CLASS_LABEL} for t in ("Sequence", "List"))],
    ids=["list", "Sequence", "List"],
)
@pytest.mark.parametrize("type", [pa.list_(pa.int64()), pa.large_list(pa.int8())], ids=str)
def test_lists_of_numbers_of_classes_become_lists_of_names(
    tmp_path: Path, feature: object, type: pa.DataType
) -> None:
    labels = pa.array([[1, 0], [], None, [-1, 1], [-1]], type)
    table = pa.table({"path": list("abcde"), "labels": labels, "others": labels})
    features = {"labels": feature, "others": feature}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path = tmp_path / "a.parquet"
    pq.write_table(table.replace_schema_metadata(metadata), path)
    manifest = open_(path)
    assert manifest.label_columns == LabelColumns("labels")
    names = [["dog", "cat"], [], None, [None, "dog"], None]
    assert read_rows(manifest)["labels"].to_pylist() == names
    assert read_rows(manifest)["others"].to_pylist() == labels.to_pylist(), "no label column"
    found = manifest.label_columns.read_names(read_rows(manifest)).to_pylist()
    assert found == [["dog", "cat"], [], None, ["dog"], None]
    wrong = table.set_column(1, "labels", pa.array([[], [], [], [], [0, 2]], type))
    pq.write_table(wrong.replace_schema_metadata(metadata), path)
    with pytest.raises(ManifestError, match=r"'labels' contains 2, and .* names of 2 classes"):
        read_rows(open_(path))


def test_a_multi_label_data_set_of_hugging_face_is_read_as_written(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features(
        {"path": datasets.Value("string"), "labels": datasets.Sequence(names)}
    )
    rows = {"path": ["a", "b"], "labels": [[1, 0], []]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    manifest = open_(tmp_path / "a.parquet")
    assert read_rows(manifest)["labels"].to_pylist() == [["dog", "cat"], []]
    assert manifest.label_columns == LabelColumns("labels")


def test_base64_text_and_pixels_of_spark_are_explained(tmp_path: Path) -> None:
    text, pixels = tmp_path / "text.parquet", tmp_path / "pixels.parquet"
    pq.write_table(pa.table({"image": ["aGVsbG8="]}), text)
    with pytest.raises(ManifestError) as caught:
        open_(text)
    assert str(caught.value) == (
        f"manifest {text}: no column 'path' (found: image); name it with --manifest.path-column, "
        "or a column of images as base64 text with --manifest.image-column"
    )
    # the schema of spark.read.format("image")
    decoded = {
        "origin": "file:/a.jpg", "height": 1, "width": 1, "nChannels": 3, "mode": 16, "data": b"rgb"
    }  # fmt: skip
    pq.write_table(pa.table({"image": [decoded]}), pixels)
    with pytest.raises(ManifestError, match="'image' contains pixels, as Spark's image source"):
        open_(pixels)
    with pytest.raises(ManifestError, match=r"'image' is struct<.*not one image per row"):
        open_(pixels, image_column="image")


def test_files_that_spark_read_are_those_of_its_column_of_bytes(tmp_path: Path) -> None:
    # the schema of spark.read.format("binaryFile"), whose paths have Hadoop's form of a file URL
    paths = [f"file:{tmp_path}/{at}.jpg" for at in range(len(IMAGES))]
    columns = {
        "path": paths,
        "modificationTime": pa.array([0, 1, 2], pa.timestamp("us", "UTC")),
        "length": [5, 0, 11],
        "content": IMAGES,
    }
    manifest = open_(write(tmp_path / "part-00000.snappy.parquet", columns))
    assert manifest.path_column == "content"
    assert read_rows(manifest)["path"].to_pylist() == paths
    assert read_images(manifest) == IMAGES


def test_paths_of_spark_are_read(tmp_path: Path) -> None:
    files = [tmp_path / f"{at}.jpg" for at in range(len(IMAGES))]
    for file, image in zip(files, IMAGES, strict=True):
        file.write_bytes(image)
    manifest = open_(write(tmp_path / "a.parquet", {"path": [f"file:{file}" for file in files]}))
    assert read_images(manifest) == IMAGES
