"""FiftyOne gets a data set with predictions, and its exports are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imgcls.data.annotations.fiftyone import read_fiftyone, write_fiftyone
from imgcls.data.annotations.tasks import LabelingTask, LabelingTasks
from imgcls.errors import RequestError


@pytest.mark.parametrize("several", [False, True])
def test_a_sample_has_its_path_and_the_prediction(tmp_path: Path, several: bool) -> None:
    tasks = [
        LabelingTask("/photos/a.jpg", ("dog",), (0.75,)),
        LabelingTask("/photos/a.b.jpg"),
    ]
    write_fiftyone(str(tmp_path), LabelingTasks(tasks, ("cat", "dog"), several, "bundle@123"))
    folder = tmp_path / "fiftyone"
    paths = json.loads((folder / "data.json").read_text())
    assert paths == {"00000000": "/photos/a.jpg", "00000001": "/photos/a.b.jpg"}
    body = json.loads((folder / "labels.json").read_text())
    label = {"label": 1, "confidence": 0.75, "attributes": {"model_version": "bundle@123"}}
    assert body["classes"] == ["cat", "dog"]
    assert list(body["labels"].values()) == ([[label], []] if several else [label, None])


def test_an_image_on_a_store_is_refused(tmp_path: Path) -> None:
    tasks = LabelingTasks([LabelingTask("s3://bucket/a.jpg")], ("cat",), False, "bundle")
    with pytest.raises(RequestError, match="only paths on a disk"):
        write_fiftyone(str(tmp_path), tasks)


def test_labels_are_read_as_numbers_names_and_lists() -> None:
    labels = {
        "a": 1,
        "b": "cat",
        "c": {"label": "dog", "confidence": None},
        "d": [{"label": 0}, {"label": 1}],
        "e": [],
        "f": None,
    }
    export = read_fiftyone({"classes": ["cat", "dog"], "labels": labels}, None, "labels.json")
    found = {each.path: each.labels for each in export.annotations}
    assert found == {"a": ("dog",), "b": ("cat",), "c": ("dog",), "d": ("cat", "dog"), "e": ()}
    assert (export.unlabeled, export.has_suffixes) == (1, False)


def test_paths_are_relative_to_the_export() -> None:
    labels = {"classes": ["cat"], "labels": {"a": 0, "b": 0}}
    paths = {"a": "data/a.jpg", "b": "/photos/b.jpg"}
    export = read_fiftyone(labels, paths, "/export/labels.json")
    assert [each.path for each in export.annotations] == ["/export/data/a.jpg", "/photos/b.jpg"]


def test_a_sample_without_a_path_is_refused() -> None:
    with pytest.raises(RequestError, match=r"'b' is not in data\.json"):
        read_fiftyone({"classes": ["cat"], "labels": {"b": 0}}, {"a.jpg": "/a.jpg"}, "labels.json")


def test_predictions_that_come_back_unchanged_are_counted_and_left_out(tmp_path: Path) -> None:
    paths = ["/photos/a.jpg", "/photos/b.jpg"]
    tasks = [LabelingTask(path, ("dog",), (0.75,)) for path in paths]
    write_fiftyone(str(tmp_path), LabelingTasks(tasks, ("cat", "dog"), False, "bundle@123"))
    folder = tmp_path / "fiftyone"
    body = json.loads((folder / "labels.json").read_text())
    files = json.loads((folder / "data.json").read_text())
    every = read_fiftyone(body, files, str(folder / "labels.json"))
    assert (len(every.annotations), every.unchanged) == (2, 2)
    body["labels"]["00000001"] = {"label": 0}
    one = read_fiftyone(body, files, str(folder / "labels.json"), skip_unchanged=True)
    assert [(each.path, each.labels) for each in one.annotations] == [("/photos/b.jpg", ("cat",))]
    assert (one.unlabeled, one.unchanged) == (1, 1)


def test_two_files_of_one_sample_are_refused() -> None:
    labels, paths = {"classes": ["cat"], "labels": {"a": 0}}, {"a.jpg": "/a.jpg", "a.png": "/a.png"}
    with pytest.raises(RequestError, match=r"'a' may be /a\.jpg or /a\.png"):
        read_fiftyone(labels, paths, "labels.json")
