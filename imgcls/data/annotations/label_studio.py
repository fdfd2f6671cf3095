"""Label Studio: tasks with predictions as JSON, the labeling interface as XML, exports.

Its exports are JSON, with all annotations of each task, and JSON-MIN, with one record per
annotation. The path of an image is in the task's data under `path`, which Label Studio keeps.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import quoteattr

from imgcls.data.annotations.annotation import Annotation, Export, check_names, parse_time
from imgcls.data.annotations.tasks import (
    LabelingTask,
    LabelingTasks,
    check_tool_can_open,
    find_relative_path,
    write_json,
)
from imgcls.data.storage import filesystem
from imgcls.errors import RequestError

TOOL = "label-studio"
TASKS_FILE = "label_studio.json"
INTERFACE_FILE = "label_studio.xml"
CONTROL = "label"
"""Name of the choices in the labeling interface."""
_TEMPLATE_CONTROL = "choice"
"""Name of the choices in the templates of Label Studio."""
_SCHEMES = ("s3", "gs", "az", "http", "https", "data")
_LOCAL_FILES = "/data/local-files/"
_UPLOADED = re.compile(r"/data/upload/(?:\d+/)?(?:[0-9a-f]{8}-)?(?P<name>[^/]+)$")
_MAX_LISTED_CLASSES = 30
"""Number of classes up to which all are shown as buttons; above it, as a list to search in."""


def write_label_studio(folder: str, tasks: LabelingTasks) -> list[str]:
    """Write the tasks and the labeling interface; returns the files.

    A local image becomes `/data/local-files/?d=PATH` with its path below `image_root`, the
    LOCAL_FILES_DOCUMENT_ROOT of Label Studio (default: /, as in Label Studio).
    Raises RequestError, before anything is written, for an image that Label Studio cannot open.
    """
    body = [_build_task(each, tasks) for each in tasks.tasks]
    files = [filesystem.join(folder, name) for name in (TASKS_FILE, INTERFACE_FILE)]
    write_json(files[0], body)
    filesystem.write(files[1], build_interface(tasks.classes, several=tasks.several).encode())
    return files


def build_interface(classes: Sequence[str], *, several: bool) -> str:
    """The labeling interface: an image, and the classes as choices."""
    layout = ' layout="select"' if len(classes) > _MAX_LISTED_CLASSES else ' showInline="true"'
    choice = "multiple" if several else "single"
    required = "false" if several else "true"
    return "\n".join(
        [
            "<View>",
            '  <Image name="image" value="$image"/>',
            f'  <Choices name="{CONTROL}" toName="image" choice="{choice}" required="{required}"'
            f"{layout}>",
            *(f"    <Choice value={quoteattr(name)}/>" for name in classes),
            "  </Choices>",
            "</View>",
            "",
        ]
    )


def _build_task(task: LabelingTask, tasks: LabelingTasks) -> dict[str, Any]:
    built: dict[str, Any] = {
        "data": {"image": _build_image_url(task.path, tasks.image_root), "path": task.path}
    }
    if task.labels:
        value = {"choices": list(task.labels)}
        result = {"from_name": CONTROL, "to_name": "image", "type": "choices", "value": value}
        prediction: dict[str, Any] = {"model_version": tasks.model_version, "result": [result]}
        if task.score is not None:
            prediction["score"] = task.score
        built["predictions"] = [prediction]
    return built


def _build_image_url(path: str, image_root: str | None) -> str:
    check_tool_can_open(path, "Label Studio", _SCHEMES)
    if filesystem.is_local(path):
        return f"{_LOCAL_FILES}?d={quote(find_relative_path(path, image_root or '/'))}"
    if path.startswith("az://"):
        return f"azure-blob://{path.removeprefix('az://')}"
    return path


def read_label_studio(tasks: list[Any], source: str) -> Export:
    """The annotations of an export in JSON or JSON-MIN.

    Raises RequestError where it is none.
    """
    annotations: list[Annotation] = []
    unlabeled = 0
    _check_tasks(tasks, source)
    control = _find_control(tasks, source)
    for number, task in enumerate(tasks):
        place = f"{source}: task {number:,}"
        found = list(_read_task(task, control, place))
        unlabeled += not found
        annotations += found
    return Export(source, annotations, unlabeled)


def _read_task(task: Any, control: str, place: str) -> Iterator[Annotation]:
    if "annotation_id" in task:
        if task["annotation_id"] is not None:
            yield Annotation(
                _find_image(task, place),
                _read_minimal_choices(task.get(control), place),
                _name_annotator(task.get("annotator")),
                parse_time(task.get("updated_at") or task.get("created_at"), place),
                TOOL,
            )
        return
    for each in task["annotations"]:
        is_skipped = bool(each.get("was_cancelled"))
        yield Annotation(
            _find_image(task.get("data"), place),
            None if is_skipped else _read_choices(each, control, place),
            _name_annotator(each.get("completed_by")),
            parse_time(each.get("updated_at") or each.get("created_at"), place),
            TOOL,
        )


def _check_tasks(tasks: Sequence[Any], source: str) -> None:
    """Refuse tasks that are none of Label Studio, and records whose choices are ambiguous."""
    for number, task in enumerate(tasks):
        place = f"{source}: task {number:,}"
        if not isinstance(task, dict):
            raise RequestError(f"{place}: is no task of Label Studio ({type(task).__name__})")
        if "annotation_id" in task:
            if task["annotation_id"] is not None and {CONTROL, _TEMPLATE_CONTROL} <= set(task):
                raise RequestError(
                    f"{place}: has the keys {CONTROL!r} and {_TEMPLATE_CONTROL!r}, one of which "
                    "is a column of the task and not its choices; export it as JSON"
                )
            continue
        if not isinstance(task.get("annotations"), list):
            raise RequestError(
                f"{place}: has no list 'annotations'; pass the export of Label Studio (JSON or "
                "JSON-MIN), not the tasks that were imported into it"
            )
        for each in task["annotations"]:
            if not isinstance(each, dict):
                raise RequestError(
                    f"{place}: an annotation is a {type(each).__name__}, not an object"
                )
            if not isinstance(each.get("result"), (list, type(None))):
                raise RequestError(
                    f"{place}: the 'result' of an annotation is no list; export it again"
                )


def _find_control(tasks: Sequence[Any], source: str) -> str:
    """The name of the choices that are the labels."""
    found: set[str] = set()
    is_minimal = False
    for task in tasks:
        if task.get("annotation_id") is not None:
            is_minimal = True
            found.update({CONTROL, _TEMPLATE_CONTROL} & set(task))
        for annotation in () if "annotation_id" in task else task["annotations"]:
            found.update(str(each.get("from_name")) for each in _iter_choices(annotation))
    if is_minimal and not found:
        raise RequestError(
            f"{source}: has no key {CONTROL!r} or {_TEMPLATE_CONTROL!r} with the choices; export "
            "it as JSON, or name the choices so in the labeling interface"
        )
    if CONTROL in found:
        return CONTROL
    if len(found) > 1:
        raise RequestError(
            f"{source}: has several choices ({', '.join(sorted(found))}), none of them named "
            f"{CONTROL!r}; name the one with the class {CONTROL!r} in the labeling interface"
        )
    return next(iter(found), CONTROL)


def _iter_choices(annotation: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for each in annotation.get("result") or ():
        if isinstance(each, dict) and each.get("type") == "choices":
            yield each


def _read_choices(annotation: Any, control: str, place: str) -> tuple[str, ...]:
    names: list[Any] = []
    for each in _iter_choices(annotation):
        if each.get("from_name") == control:
            value = each.get("value")
            chosen = value.get("choices") if isinstance(value, dict) else None
            if not isinstance(chosen, list):
                raise RequestError(f"{place}: a result has no list 'choices'; export it again")
            names += chosen
    return check_names(names, place)


def _read_minimal_choices(value: Any, place: str) -> tuple[str, ...]:
    """The names of JSON-MIN: one as text, several as an object with 'choices'."""
    names: list[Any] = []
    for each in value if isinstance(value, list) else [] if value is None else [value]:
        chosen = each.get("choices") if isinstance(each, dict) else [each]
        if not isinstance(chosen, list):
            raise RequestError(f"{place}: {value!r} has no list 'choices'; export it again")
        names += chosen
    return check_names(names, place)


def _find_image(data: Any, place: str) -> str:
    """The path of ours in the data of a task; else the name of its image."""
    if isinstance(data, dict):
        path = data.get("path")
        if isinstance(path, str) and path.strip():
            return path
        image = data.get("image")
        if isinstance(image, str) and image.strip():
            return _parse_image_url(image, place)
    raise RequestError(
        f"{place}: its data has neither 'path' nor 'image'; export tasks of `imgcls select`, or "
        "with the image under the key 'image'"
    )


def _parse_image_url(url: str, place: str) -> str:
    try:
        split = urlsplit(url)
    except ValueError as error:
        raise RequestError(
            f"{place}: the image {url!r} is not a valid URL; correct the task"
        ) from error
    if split.path.endswith(_LOCAL_FILES) and (found := parse_qs(split.query).get("d")):
        return found[0].lstrip("/")
    if uploaded := _UPLOADED.search(split.path):
        return unquote(uploaded["name"])
    if url.startswith("azure-blob://"):
        return f"az://{url.removeprefix('azure-blob://')}"
    if url.startswith("/") and split.query:
        raise RequestError(
            f"{place}: the image {url} is a URL on the server of Label Studio, which names no "
            "file; add the path of each image to its task under the key 'path'"
        )
    return url


def _name_annotator(value: Any) -> str | None:
    """The email address of a user; "user 3" where the number alone is exported."""
    if isinstance(value, dict):
        value = value.get("email") or value.get("username") or value.get("id")
    if value is None or value == "":
        return None
    return f"user {value}" if isinstance(value, int) else str(value)
