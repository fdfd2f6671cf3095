"""CVAT gets tags under the names of its images, and its exports are read."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from imgcls.data.annotations.cvat import read_cvat, write_cvat
from imgcls.data.annotations.tasks import LabelingTask, LabelingTasks
from imgcls.errors import RequestError


def build(*paths: str, **options: Any) -> LabelingTasks:
    tasks = [LabelingTask(path, ("cat",), (0.75,), 64, 48) for path in paths]
    return LabelingTasks(tasks, ("cat", "dog"), False, "bundle@123", **options)


def read_names(tmp_path: Path) -> list[tuple[str, str]]:
    images = ET.parse(tmp_path / "cvat.xml").getroot().iter("image")
    return [(each.attrib["id"], each.attrib["name"]) for each in images]


def test_a_tag_has_the_prediction_and_where_it_is_from(tmp_path: Path) -> None:
    write_cvat(str(tmp_path), build("/photos/a & b.jpg"))
    root = ET.parse(tmp_path / "cvat.xml").getroot()
    (image,) = root.iter("image")
    (tag,) = image
    assert image.attrib == {"id": "0", "name": "a & b.jpg", "width": "64", "height": "48"}
    assert tag.attrib == {"label": "cat", "source": "auto"}
    attributes = {each.attrib["name"]: each.text for each in tag}
    assert attributes == {"score": "0.75", "model_version": "bundle@123"}
    labels = json.loads((tmp_path / "cvat_labels.json").read_text())
    assert [(each["name"], each["type"]) for each in labels] == [("cat", "tag"), ("dog", "tag")]


def test_images_are_named_as_in_cvat_and_in_the_order_of_its_frames(tmp_path: Path) -> None:
    write_cvat(str(tmp_path), build("/photos/y/b.jpg", "/photos/x/c.jpg"))
    assert read_names(tmp_path) == [("0", "b.jpg"), ("1", "c.jpg")]
    write_cvat(str(tmp_path), build("/photos/y/b.jpg", "/photos/x/c.jpg", image_root="/photos"))
    assert read_names(tmp_path) == [("0", "x/c.jpg"), ("1", "y/b.jpg")]
    write_cvat(str(tmp_path), build("s3://bucket/y/b.jpg"))
    assert read_names(tmp_path) == [("0", "y/b.jpg")]


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"2 selected images are named 1\.jpg.*--image-root"):
        write_cvat(str(tmp_path), build("/x/1.jpg", "/y/1.jpg"))
    with pytest.raises(RequestError, match="cannot read the character"):
        write_cvat(str(tmp_path), build("/x/\x01.jpg"))
    assert not list(tmp_path.iterdir())


def test_the_annotator_is_the_assignee_of_the_task() -> None:
    project = (
        "<annotations><meta><project><tasks>"
        "<task><id>1</id><assignee><username>ann</username><email/></assignee></task>"
        "<task><id>2</id><assignee><username>bob</username></assignee></task>"
        "<task><id>3</id><assignee></assignee></task>"
        "</tasks></project></meta>"
        + "".join(
            f'<image id="0" name="a.jpg" task_id="{task}"><tag label="{label}"/></image>'
            for task, label in ((1, "cat"), (2, "dog"), (3, "cat"))
        )
        + '<image id="1" name="b.jpg" task_id="1"></image></annotations>'
    )
    export = read_cvat(project.encode(), "export.xml", skip_unchanged=False)
    assert [(each.annotator, each.labels) for each in export.annotations] == [
        ("ann", ("cat",)), ("bob", ("dog",)), (None, ("cat",)),
    ]  # fmt: skip
    assert export.unlabeled == 1
