"""A spreadsheet gets the images with predictions, and the labels in it are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from imgcls.data.annotations.csv_labels import read_csv, write_csv
from imgcls.data.annotations.tasks import LabelingTask, LabelingTasks
from imgcls.errors import RequestError


def test_a_row_has_the_path_the_prediction_and_an_empty_label(tmp_path: Path) -> None:
    task = LabelingTask("/photos/a, b.jpg", ("cat", "dog"), (0.75, None))
    write_csv(str(tmp_path), LabelingTasks([task], ("cat", "dog"), True, "bundle@123"))
    assert (tmp_path / "labels.csv").read_text().splitlines() == [
        "path,label,annotator,labeled_at,predicted_label,score,model_version",
        '"/photos/a, b.jpg",,,,cat;dog,0.75,bundle@123',
    ]


def test_a_class_name_with_the_separator_is_refused_for_lists_alone(tmp_path: Path) -> None:
    tasks = [LabelingTask("/a.jpg", ("a;b",), (1.0,))]
    with pytest.raises(RequestError, match="'a;b' contains ';'"):
        write_csv(str(tmp_path), LabelingTasks(tasks, ("a;b",), True, "bundle"))
    write_csv(str(tmp_path), LabelingTasks(tasks, ("a;b",), False, "bundle"))
    path = tmp_path / "filled.csv"
    path.write_text("path,label\n/a.jpg,a;b\n")
    assert read_csv(str(path), several=False).annotations[0].labels == ("a;b",)


def test_labels_of_a_spreadsheet_are_read(tmp_path: Path) -> None:
    path = tmp_path / "filled.csv"
    path.write_text("path;label;annotator\n/a.jpg;cat;ann\n/b.jpg;;ann\n/c.jpg;dog;\n")
    export = read_csv(str(path), several=False)
    assert [(each.path, each.labels, each.annotator) for each in export.annotations] == [
        ("/a.jpg", ("cat",), "ann"), ("/c.jpg", ("dog",), None),
    ]  # fmt: skip
    assert export.unlabeled == 1
    path.write_text("path,label\n/a.jpg,cat; dog\n/b.jpg,;\n")
    lists = read_csv(str(path), several=True)
    assert [each.labels for each in lists.annotations] == [("cat", "dog"), ()]
