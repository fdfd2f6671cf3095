"""FiftyOne: a data set of the type FiftyOneImageClassificationDataset.

`labels.json` has the classes and the labels by sample, `data.json` the path of each sample. Of an
export without `data.json`, samples are named by their file names without suffix.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from imgcls.data.annotations.annotation import Annotation, Export, check_names
from imgcls.data.annotations.tasks import (
    LabelingTask,
    LabelingTasks,
    check_tool_can_open,
    write_json,
)
from imgcls.data.manifests.manifest import resolve_path
from imgcls.data.storage import filesystem
from imgcls.errors import RequestError

TOOL = "fiftyone"
DATASET_FOLDER = "fiftyone"
LABELS_FILE = "labels.json"
PATHS_FILE = "data.json"


def write_fiftyone(folder: str, tasks: LabelingTasks) -> list[str]:
    """Write the data set into a folder of its own; returns its files.

    The labels are a Classification, or Classifications with several labels per image. Raises
    RequestError, before anything is written, for an image that FiftyOne cannot open.
    """
    codes = {name: code for code, name in enumerate(tasks.classes)}
    labels: dict[str, Any] = {}
    paths: dict[str, str] = {}
    for number, task in enumerate(tasks.tasks):
        check_tool_can_open(task.path, "FiftyOne", ())
        # no period: FiftyOne removes the text after a period from sample names
        name = f"{number:08d}"
        paths[name] = filesystem.local_path(task.path)
        labels[name] = _build_label(task, codes, tasks)
    files = [filesystem.join(folder, DATASET_FOLDER, name) for name in (PATHS_FILE, LABELS_FILE)]
    bodies = (paths, {"classes": list(tasks.classes), "labels": labels})
    for file, body in zip(files, bodies, strict=True):
        write_json(file, body)
    return files


def _build_label(task: LabelingTask, codes: Mapping[str, int], tasks: LabelingTasks) -> Any:
    attributes = {"model_version": tasks.model_version}
    found = [
        {"label": codes[name], "confidence": score, "attributes": attributes}
        for name, score in zip(task.labels, task.scores, strict=True)
    ]
    if tasks.several:
        return found
    return found[0] if found else None


def read_fiftyone(
    body: Mapping[str, Any], paths: Any, source: str, *, skip_unchanged: bool = False
) -> Export:
    """The annotations of an export.

    body:  the content of `labels.json`
    paths: the content of `data.json`, relative to the folder of `source`; None without one
    skip_unchanged: leave out unchanged predictions

    A sample whose labels all have a confidence, or the version of a model, is an unchanged
    prediction.

    A sample without a label is null, as is one with an empty list of labels: FiftyOne exports both
    alike. They count as not labeled.
    Raises RequestError where it is none.
    """
    classes, labels = body.get("classes"), body.get("labels")
    if not isinstance(labels, dict) or not isinstance(classes, (list, type(None))):
        raise RequestError(
            f"{source}: has no object 'labels' with a list 'classes'; export it from FiftyOne as "
            "FiftyOneImageClassificationDataset"
        )
    files = _index_paths(paths, source)
    annotations, unlabeled, unchanged = [], 0, 0
    for name, value in labels.items():
        if value is None:
            unlabeled += 1
            continue
        if files is not None and name not in files:
            raise RequestError(f"{source}: sample {name!r} is not in {PATHS_FILE}; export it again")
        is_unchanged = _is_prediction(value)
        unchanged += is_unchanged
        if is_unchanged and skip_unchanged:
            unlabeled += 1
            continue
        path = name if files is None else files[name]
        names = _read_names(value, classes, f"{source}: sample {name!r}")
        annotations.append(Annotation(path, names, None, None, TOOL))
    return Export(source, annotations, unlabeled, unchanged, has_suffixes=files is not None)


def _is_prediction(value: Any) -> bool:
    """Whether all labels of a sample are those of a model."""
    labels = value if isinstance(value, list) else [value]
    return bool(labels) and all(isinstance(each, dict) and _has_model(each) for each in labels)


def _has_model(label: Mapping[str, Any]) -> bool:
    attributes = label.get("attributes")
    has_version = isinstance(attributes, dict) and bool(attributes.get("model_version"))
    return has_version or label.get("confidence") is not None


def _index_paths(paths: Any, source: str) -> dict[str, str] | None:
    """The path of each sample; FiftyOne may name it with the suffix of the file, or without."""
    if paths is None:
        return None
    if not isinstance(paths, dict) or not all(isinstance(each, str) for each in paths.values()):
        raise RequestError(f"{source}: {PATHS_FILE} is no object of paths; export it again")
    folder = filesystem.parent(source)
    files = {name: resolve_path(path, folder) or path for name, path in paths.items()}
    by_stem: dict[str, str] = {}
    for name, path in files.items():
        stem = posixpath.splitext(name)[0]
        if stem not in files and by_stem.setdefault(stem, path) != path:
            raise RequestError(
                f"{source}: sample {stem!r} may be {by_stem[stem]} or {path} of {PATHS_FILE}; "
                "rename one of the files, and export again"
            )
    return by_stem | files


def _read_names(value: Any, classes: Sequence[Any] | None, place: str) -> tuple[str, ...]:
    names = []
    for each in value if isinstance(value, list) else [value]:
        label = each.get("label") if isinstance(each, dict) else each
        if isinstance(label, int) and not isinstance(label, bool):
            if classes is None or not 0 <= label < len(classes):
                count = len(classes or ())
                raise RequestError(
                    f"{place}: has the label {label}, and there are {count} classes; export it "
                    "again"
                )
            label = classes[label]
        names.append(label)
    return check_names(names, place)
