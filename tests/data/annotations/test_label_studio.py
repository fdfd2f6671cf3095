"""Label Studio gets tasks that it can show, and every kind of export of it is read."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from imgcls.data.annotations.label_studio import (
    build_interface,
    read_label_studio,
    write_label_studio,
)
from imgcls.data.annotations.tasks import LabelingTask, LabelingTasks
from imgcls.errors import RequestError


def build(*paths: str, **options: Any) -> LabelingTasks:
    tasks = [LabelingTask(path, ("cat",), (0.75,)) for path in paths]
    return LabelingTasks(tasks, ("cat", "dog"), False, "bundle@123", **options)


def test_a_task_has_the_image_its_path_and_the_prediction(tmp_path: Path) -> None:
    write_label_studio(str(tmp_path), build("/photos/a b.jpg"))
    (task,) = json.loads((tmp_path / "label_studio.json").read_text())
    assert task == {
        "data": {"image": "/data/local-files/?d=photos/a%20b.jpg", "path": "/photos/a b.jpg"},
        "predictions": [
            {
                "model_version": "bundle@123",
                "score": 0.75,
                "result": [
                    {
                        "from_name": "label", "to_name": "image", "type": "choices",
                        "value": {"choices": ["cat"]},
                    }
                ],
            }
        ],
    }  # fmt: skip


def test_each_image_gets_a_url_that_label_studio_opens(tmp_path: Path) -> None:
    urls = {
        "s3://bucket/a.jpg": "s3://bucket/a.jpg",
        "az://box/a.jpg": "azure-blob://box/a.jpg",
        "https://host/a.jpg": "https://host/a.jpg",
        "file:///photos/a.jpg": "/data/local-files/?d=photos/a.jpg",
    }
    write_label_studio(str(tmp_path), build(*urls))
    tasks = json.loads((tmp_path / "label_studio.json").read_text())
    assert [task["data"]["image"] for task in tasks] == list(urls.values())
    write_label_studio(str(tmp_path), build("/data/photos/a.jpg", image_root="/data"))
    (task,) = json.loads((tmp_path / "label_studio.json").read_text())
    assert task["data"]["image"] == "/data/local-files/?d=photos/a.jpg"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("tar:///a.tar#x.jpg", "image within a file"),
        ("hf://datasets/a/b.jpg", "cannot open this URL"),
    ],
)
def test_an_image_that_cannot_be_opened_is_refused_first(
    tmp_path: Path, path: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        write_label_studio(str(tmp_path), build(path))
    with pytest.raises(RequestError, match="not below /photos"):
        write_label_studio(str(tmp_path), build("/other/a.jpg", image_root="/photos"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("several", [False, True])
def test_the_interface_has_every_class_as_a_choice(several: bool) -> None:
    names = ("cat", 'a "quoted" & <odd> name', "Katze äöü")
    view = ET.fromstring(build_interface(names, several=several))
    choices = view.find("Choices")
    assert choices is not None
    assert [each.attrib["value"] for each in choices] == list(names)
    assert choices.attrib["choice"] == ("multiple" if several else "single")
    assert choices.attrib["toName"] == "image"


def annotate(data: dict[str, str], name: str = "label") -> dict[str, Any]:
    result = {"type": "choices", "from_name": name, "value": {"choices": ["cat"]}}
    return {"data": data, "annotations": [{"result": [result]}]}


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("/data/local-files/?d=photos/a%20b.jpg", "photos/a b.jpg"),
        ("/ls/data/local-files/?d=photos/a.jpg", "photos/a.jpg"),
        ("/data/upload/12/3f2a9c1b-a.jpg", "a.jpg"),
        ("s3://bucket/a.jpg", "s3://bucket/a.jpg"),
        ("azure-blob://box/a.jpg", "az://box/a.jpg"),
    ],
)
def test_images_of_other_tasks_are_known_by_their_url(url: str, path: str) -> None:
    export = read_label_studio([annotate({"image": url})], "export.json")
    assert export.annotations[0].path == path


def test_a_project_with_several_choices_must_name_one_label() -> None:
    both = [annotate({"image": "/a.jpg"}, name) for name in ("kind", "quality")]
    with pytest.raises(RequestError, match="several choices \\(kind, quality\\)"):
        read_label_studio(both, "export.json")
    found = read_label_studio([*both, annotate({"image": "/b.jpg"})], "export.json")
    assert [each.labels for each in found.annotations] == [(), (), ("cat",)]


def test_a_record_with_both_names_of_the_choices_is_refused() -> None:
    record = {"path": "/a.jpg", "label": "old", "choice": "cat", "annotation_id": 3}
    with pytest.raises(RequestError, match=r"'label' and 'choice'.*export it as JSON"):
        read_label_studio([record], "export.json")


def test_another_url_on_the_server_is_no_path() -> None:
    with pytest.raises(RequestError, match="names no file"):
        read_label_studio([annotate({"image": "/tasks/resolve/?fileuri=abc"})], "export.json")
