"""Exports as labeling tools write them, made from the tasks of `imgcls select` and labels.

The structures are those of Label Studio 1.2x (JSON, JSON-MIN), CVAT 2 ("CVAT for images 1.1") and
FiftyOne 1 (FiftyOneImageClassificationDataset).
"""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TIME = "2026-03-01T12:30:00.123456Z"

Labels = Mapping[str, Sequence[str] | None]
"""The labels by path; None for an image that is skipped."""


def fill_label_studio(folder: Path, labels: Labels, annotator: str = "ann@example.com") -> Path:
    """The JSON export after one person labeled the tasks."""
    tasks = json.loads((folder / "label_studio.json").read_text())
    exported = [
        _export_task(number, task, labels[task["data"]["path"]], annotator)
        for number, task in enumerate(tasks, 1)
        if task["data"]["path"] in labels
    ]
    path = folder / "export.json"
    path.write_text(json.dumps(exported))
    return path


def _export_task(
    number: int, task: dict[str, Any], names: Sequence[str] | None, annotator: str
) -> dict[str, Any]:
    result = []
    if names:
        result = [
            {
                "value": {"choices": list(names)}, "id": f"r{number}", "from_name": "label",
                "to_name": "image", "type": "choices", "origin": "manual",
            }
        ]  # fmt: skip
    annotation = {
        "id": number, "completed_by": {"id": 3, "email": annotator, "first_name": ""},
        "result": result, "was_cancelled": names is None, "ground_truth": False,
        "created_at": TIME, "updated_at": TIME, "lead_time": 3.2, "task": number,
    }  # fmt: skip
    predictions = [
        {**each, "id": number, "created_at": TIME, "task": number}
        for each in task.get("predictions", [])
    ]
    return {
        "id": number, "annotations": [annotation], "file_upload": "", "drafts": [],
        "predictions": predictions, "data": task["data"], "meta": {}, "project": 1,
    }  # fmt: skip


def fill_label_studio_min(folder: Path, labels: Labels) -> Path:
    """The JSON-MIN export, which leaves out skipped annotations."""
    exported = json.loads(fill_label_studio(folder, labels).read_text())
    records = []
    for task in exported:
        (annotation,) = task["annotations"]
        if annotation["was_cancelled"]:
            continue
        record = {**task["data"], "id": task["id"]}
        for each in annotation["result"]:
            names = each["value"]["choices"]
            record["label"] = names[0] if len(names) == 1 else {"choices": names}
        record |= {"annotator": 3, "annotation_id": annotation["id"], "lead_time": 3.2}
        records.append(record | {"created_at": TIME, "updated_at": TIME})
    path = folder / "export-min.json"
    path.write_text(json.dumps(records))
    return path


def fill_cvat(folder: Path, labels: Labels, *, archived: bool = False) -> Path:
    """The XML export after a person replaced the tags; a skipped image has none."""
    tree = ET.parse(folder / "cvat.xml")
    by_name = {path.rpartition("/")[2]: names for path, names in labels.items()}
    task = tree.getroot().find("meta/task")
    assert task is not None
    ET.SubElement(task, "id").text = "7"
    person = ET.SubElement(task, "assignee")
    ET.SubElement(person, "username").text = "bob"
    for image in list(tree.getroot().iter("image")):
        for tag in list(image):
            image.remove(tag)
        for name in by_name.get(image.attrib["name"].rpartition("/")[2]) or ():
            ET.SubElement(image, "tag", label=name, source="manual")
    text = ET.tostring(tree.getroot(), encoding="utf-8", xml_declaration=True)
    if not archived:
        path = folder / "annotations.xml"
        path.write_bytes(text)
        return path
    path = folder / "export.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("annotations.xml", text)
    return path


def fill_fiftyone(folder: Path, labels: Labels, *, several: bool) -> Path:
    """The folder that `dataset.export` writes; an empty list of labels becomes null, as there."""
    source = folder / "fiftyone"
    paths = json.loads((source / "data.json").read_text())
    classes = json.loads((source / "labels.json").read_text())["classes"]
    values: dict[str, Any] = {}
    exported: dict[str, str] = {}
    for path in paths.values():
        names = labels.get(path)
        codes = [classes.index(each) for each in names or ()]
        key = Path(path).stem  # as the exporter names samples
        exported[key] = path
        values[key] = (codes if several else codes[0]) if codes else None
    target = folder / "exported"
    target.mkdir()
    (target / "data.json").write_text(json.dumps(exported))
    (target / "labels.json").write_text(json.dumps({"classes": classes, "labels": values}))
    return target


def fill_csv(folder: Path, labels: Labels, *, several: bool) -> Path:
    """The table after a person filled in the column `label`."""
    rows = list(csv.DictReader(io.StringIO((folder / "labels.csv").read_text())))
    path = folder / "filled.csv"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        for row in rows:
            names = labels.get(row["path"])
            if names is not None:
                row["label"] = (";".join(names) or ";") if several else "".join(names)
                row["annotator"], row["labeled_at"] = "carl", TIME
            writer.writerow(row)
    return path
