"""Labeling tasks: the images that people label in a tool, with a model's predictions."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from imgcls.data.containers import members
from imgcls.data.storage import filesystem
from imgcls.errors import RequestError

ToolFormat = Literal["label-studio", "cvat", "fiftyone", "csv"]
"""The tools that tasks are written for."""
ExportFormat = Literal["auto", "label-studio", "cvat", "fiftyone", "csv", "imgcls"]
"""The formats that labels are read from. imgcls: the labels table in Parquet."""


@dataclass(frozen=True)
class LabelingTask:
    """An image to label.

    path:   absolute path or URL
    labels: predicted class names, best first; empty without a prediction
    scores: of each of the labels, in [0, 1]; None where it is unknown
    width, height: of the image in pixels, if they are known
    """

    path: str
    labels: tuple[str, ...] = ()
    scores: tuple[float | None, ...] = ()
    width: int | None = None
    height: int | None = None

    @property
    def score(self) -> float | None:
        """The lowest known score of the predicted labels; None without one."""
        return min((each for each in self.scores if each is not None), default=None)


@dataclass(frozen=True)
class LabelingTasks:
    """The images to label, in order.

    classes: class names of the model
    several: images may have several labels
    model_version: name of the model, which tools show with its predictions
    image_root: folder or prefix where the tool's names of images start; None for its default
    """

    tasks: Sequence[LabelingTask]
    classes: tuple[str, ...]
    several: bool
    model_version: str
    image_root: str | None = None


def write_json(url: str, body: Any) -> None:
    """Write a JSON file of tasks, in UTF-8 and indented."""
    filesystem.write(url, (json.dumps(body, ensure_ascii=False, indent=1) + "\n").encode())


def check_tool_can_open(path: str, tool: str, schemes: Sequence[str]) -> None:
    """Raise RequestError for an image that a labeling tool cannot open.

    schemes: the kinds of URLs that it opens, besides paths on a disk
    """
    scheme = path.partition(":")[0]
    if members.is_member_url(path):
        raise RequestError(
            f"{path}: is an image within a file, which {tool} cannot open; extract the images, "
            "and predict and select with their paths"
        )
    if not filesystem.is_local(path) and scheme not in schemes:
        raise RequestError(
            f"{path}: {tool} cannot open this URL (only paths on a disk"
            f"{''.join(f', {each}:' for each in schemes)}); copy the images there, and predict "
            "and select with their paths"
        )


def find_relative_path(path: str, root: str) -> str:
    """The path of an image below `root`, separated by '/'.

    Raises RequestError where the image is not below it.
    """
    if filesystem.is_local(path):
        path = posixpath.normpath(filesystem.local_path(path))
    start = filesystem.absolute(root).rstrip("/") + "/"
    if not path.startswith(start) or path == start:
        raise RequestError(
            f"image_root: {path} is not below {root}; pass the folder that contains all images"
        )
    return path.removeprefix(start)
