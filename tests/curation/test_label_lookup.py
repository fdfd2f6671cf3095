"""An image of an export is that of the manifest, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.cli import main
from imgcls.data.annotations.cvat import write_cvat
from imgcls.data.annotations.tasks import LabelingTask, LabelingTasks
from imgcls.errors import RequestError
from tests.curation.label_imports import merge, read_labels, write_labels, write_manifest

CVAT = "<annotations>{}</annotations>"
IMAGE = '<image id="0" name="{}" task_id="{}"><tag label="{}" source="manual"/></image>'


def write_images(tmp_path: Path, *paths: str) -> str:
    pq.write_table(pa.table({"path": paths}), tmp_path / "images.parquet")
    return str(tmp_path / "images.parquet")


def write_tags(tmp_path: Path, *images: tuple[str, int, str]) -> Path:
    path = tmp_path / "annotations.xml"
    path.write_text(CVAT.format("".join(IMAGE.format(*each) for each in images)))
    return path


def test_a_file_name_labels_no_other_image_of_the_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = write_tags(tmp_path, ("0001.jpg", 1, "dog"))  # of /pool/0001.jpg
    onto = write_manifest(tmp_path, {"/train/0001.jpg": "cat", "/train/2.jpg": "dog"})
    output = tmp_path / "out" / "new.parquet"
    command = ["labels", "import", str(export), "--onto", str(onto), "--output", str(output)]
    assert main(command) == 2
    assert "is not an absolute path" in capsys.readouterr().err
    assert not output.parent.exists()
    merge(tmp_path, export, onto, images=write_images(tmp_path, "/pool/0001.jpg"))
    assert read_labels(tmp_path) == {
        "/train/0001.jpg": "cat", "/train/2.jpg": "dog", "/pool/0001.jpg": "dog",
    }  # fmt: skip
    merge(tmp_path, export, onto, images=str(onto), overwrite=True)
    assert read_labels(tmp_path)["/train/0001.jpg"] == "dog"


def test_file_names_are_looked_up_and_ambiguous_ones_are_refused(tmp_path: Path) -> None:
    onto = write_manifest(tmp_path, {"/x/1.jpg": None, "/y/1.jpg": "cat", "/y/2.jpg": "dog"})
    options = {"images": str(onto), "overwrite": True}
    merge(tmp_path, write_labels(tmp_path, [("2.jpg", "cat", "a", 1)]), onto, **options)
    assert read_labels(tmp_path)["/y/2.jpg"] == "cat"
    merge(tmp_path, write_labels(tmp_path, [("x/1.jpg", "dog", "a", 1)]), onto, **options)
    assert read_labels(tmp_path)["/x/1.jpg"] == "dog"
    with pytest.raises(RequestError, match=r"'1.jpg' may be any of 2 images"):
        merge(tmp_path, write_labels(tmp_path, [("1.jpg", "dog", "a", 1)]), onto, **options)
    with pytest.raises(RequestError, match=r"'3.jpg' is not in .*pass .* --images"):
        merge(tmp_path, write_labels(tmp_path, [("3.jpg", "dog", "a", 1)]), onto, **options)
    many = write_images(tmp_path, *(f"/{number}/1.jpg" for number in range(100)))
    with pytest.raises(RequestError, match="any of 4 or more images"):
        merge(
            tmp_path, write_labels(tmp_path, [("1.jpg", "dog", "a", 1)]), onto,
            images=many, overwrite=True,
        )  # fmt: skip


def test_names_that_end_alike_come_back_from_cvat_below_their_root(tmp_path: Path) -> None:
    paths = ["s3://bucket/a.jpg", "s3://bucket/x/a.jpg"]
    tasks = [LabelingTask(path, (name,), (0.5,)) for path, name in zip(paths, "cd", strict=True)]
    write_cvat(str(tmp_path), LabelingTasks(tasks, ("c", "d"), False, "bundle"))
    onto = write_manifest(tmp_path, {"/1.jpg": "c", "/2.jpg": "d"})
    images = write_images(tmp_path, *paths)
    with pytest.raises(RequestError, match=r"'a.jpg' may be any of 2 .*--image-root"):
        merge(tmp_path, tmp_path / "cvat.xml", onto, images=images)
    merge(tmp_path, tmp_path / "cvat.xml", onto, images=images, image_root="s3://bucket")
    found = read_labels(tmp_path)
    assert [found[path] for path in paths] == ["c", "d"]
    with pytest.raises(RequestError, match=r"2 images of it are neither in .*s3://other/a.jpg"):
        merge(
            tmp_path, tmp_path / "cvat.xml", onto, images=images, image_root="s3://other",
            overwrite=True,
        )  # fmt: skip


def test_one_name_in_two_tasks_of_cvat_may_be_two_images(tmp_path: Path) -> None:
    export = write_tags(tmp_path, ("1.jpg", 1, "cat"), ("1.jpg", 2, "cat"))
    onto = write_manifest(tmp_path, {"/p/1.jpg": "dog", "/b.jpg": "cat"})
    with pytest.raises(RequestError, match=r"'1.jpg' is in several tasks"):
        merge(tmp_path, export, onto, images=str(onto))
    merge(tmp_path, export, onto, image_root="/p")
    assert read_labels(tmp_path)["/p/1.jpg"] == "cat"


def test_an_absolute_path_in_neither_manifest_is_refused(tmp_path: Path) -> None:
    onto = write_manifest(tmp_path, {"/real/a.jpg": "cat", "/b.jpg": "dog"})
    images = write_images(tmp_path, "/real/a.jpg", "/real/c.jpg")
    rows = [("/link/a.jpg", "dog", "ann", 1), ("S3://bucket/a.jpg", "dog", "ann", 1)]
    export = write_labels(tmp_path, [*rows, ("/b.jpg", "cat", "ann", 1)])
    with pytest.raises(RequestError, match=r"2 images of it.*/link/a.jpg, S3://bucket/a.jpg\."):
        merge(tmp_path, export, onto, images=images)
    known = [("file:///real/./a.jpg", "dog", "ann", 1), ("/real//c.jpg", "dog", "ann", 1)]
    merge(tmp_path, write_labels(tmp_path, known), onto, images=images)
    assert read_labels(tmp_path) == {"/real/a.jpg": "dog", "/b.jpg": "dog", "/real/c.jpg": "dog"}


def test_added_images_that_no_manifest_has_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onto = write_manifest(tmp_path, {"/a.jpg": "cat", "/b.jpg": "dog"})
    rows = [(path, "cat", "ann", 1) for path in ("/a.jpg", "/c.jpg", "/d.jpg")]
    export, output = write_labels(tmp_path, rows), tmp_path / "out" / "new.parquet"
    command = ["labels", "import", str(export), "--onto", str(onto), "--output", str(output)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "note: 2 images not in" in shown
    assert "will be added: /c.jpg, /d.jpg" in shown


def test_local_files_of_label_studio_below_a_url_prefix_are_not_added_as_images(
    tmp_path: Path,
) -> None:
    onto = write_manifest(tmp_path, {"/photos/a.jpg": "cat", "/b.jpg": "dog"})
    result = {"type": "choices", "from_name": "label", "value": {"choices": ["dog"]}}
    tasks = [
        {"data": {"image": url}, "annotations": [{"result": [result]}]}
        for url in ("/ls/data/local-files/?d=photos/a.jpg", "http://h/data/local-files/?d=b.jpg")
    ]
    export = tmp_path / "export.json"
    export.write_text(json.dumps(tasks))
    merge(tmp_path, export, onto, image_root="/")
    assert read_labels(tmp_path) == {"/photos/a.jpg": "dog", "/b.jpg": "dog"}
