"""CVAT: tags of images in the format "CVAT for images 1.1", and the labels of a project.

CVAT finds the images of a task by their names, which depend on how they were added: by the file
name alone if they were uploaded, by the path below the root of a connected share or cloud storage.
"""

from __future__ import annotations

import io
import lzma
import operator
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import IO
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

from imgcls.data.annotations.annotation import Annotation, Export, check_names
from imgcls.data.annotations.tasks import (
    LabelingTasks,
    check_tool_can_open,
    find_relative_path,
    write_json,
)
from imgcls.data.storage import filesystem
from imgcls.errors import RequestError

TOOL = "cvat"
ANNOTATIONS_FILE = "cvat.xml"
LABELS_FILE = "cvat_labels.json"
ARCHIVED_FILE = "annotations.xml"
"""Name of the XML file in the ZIP files of CVAT."""
_SCHEMES = ("s3", "gs", "az")
_ATTRIBUTES = ("score", "model_version")
_SHAPES = ("box", "polygon", "polyline", "points", "cuboid", "mask", "ellipse", "skeleton")
_UNITS = ("task", "job")
_UNCHANGED = "auto"
"""The source of a tag that a model made, until a person changes it."""
_BLOCK_BYTES = 1 << 20
_MAX_RATIO = 100
"""Maximum compression of an archived XML file, so that a small file does not fill the memory."""
MIN_LIMIT_BYTES = 64 << 20
"""XML up to this size is read however much it is compressed."""
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


def write_cvat(folder: str, tasks: LabelingTasks) -> list[str]:
    """Write the predictions as tags, and the labels for a project; returns the files.

    Raises RequestError, before anything is written, where two images have the same name in CVAT, or
    CVAT cannot open one.
    """
    names = _name_images(tasks)
    body = "".join(_iter_xml(tasks, names))
    if found := _NOT_XML.search(body):
        raise RequestError(
            f"CVAT cannot read the character {found.group()!r} in a path or class name; rename it"
        )
    attributes = [
        {"name": name, "input_type": "text", "mutable": False, "values": [""]}
        for name in _ATTRIBUTES
    ]
    labels = [{"name": name, "type": "tag", "attributes": attributes} for name in tasks.classes]
    files = [filesystem.join(folder, name) for name in (ANNOTATIONS_FILE, LABELS_FILE)]
    filesystem.write(files[0], body.encode())
    write_json(files[1], labels)
    return files


def _name_images(tasks: LabelingTasks) -> list[str]:
    """The name of each image in CVAT."""
    names = []
    for task in tasks.tasks:
        check_tool_can_open(task.path, "CVAT", _SCHEMES)
        root = tasks.image_root
        if root is None and not filesystem.is_local(task.path):
            root = "/".join(task.path.split("/", 3)[:3])  # a cloud storage is a bucket
        if root is None:
            names.append(task.path.rpartition("/")[2])
        else:
            names.append(find_relative_path(task.path, root))
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise RequestError(
            f"image_root: {count} selected images are named {name}, by which CVAT finds them; "
            "connect their folder to CVAT as a share or a cloud storage, and pass it as "
            "--image-root"
        )
    return names


def _iter_xml(tasks: LabelingTasks, names: list[str]) -> Iterator[str]:
    """The lines of the file, images in the order of CVAT's frames, which sorts names."""
    yield '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n'
    yield "  <meta>\n    <task>\n      <mode>annotation</mode>\n      <labels>\n"
    for name in tasks.classes:
        attributes = "".join(
            f"<attribute><name>{each}</name><mutable>False</mutable><input_type>text</input_type>"
            "<default_value></default_value><values></values></attribute>"
            for each in _ATTRIBUTES
        )
        yield (
            f"        <label><name>{escape(name)}</name><type>tag</type>"
            f"<attributes>{attributes}</attributes></label>\n"
        )
    yield "      </labels>\n    </task>\n  </meta>\n"
    images = sorted(zip(names, tasks.tasks, strict=True), key=operator.itemgetter(0))
    for frame, (name, task) in enumerate(images):
        size = (
            ""
            if task.width is None or task.height is None
            else f' width="{task.width}" height="{task.height}"'
        )
        yield f'  <image id="{frame}" name={quoteattr(name)}{size}>\n'
        for label, score in zip(task.labels, task.scores, strict=True):
            yield f'    <tag label={quoteattr(label)} source="{_UNCHANGED}">'
            if score is not None:
                yield f'<attribute name="score">{score:.6g}</attribute>'
            yield f'<attribute name="model_version">{escape(tasks.model_version)}</attribute>'
            yield "</tag>\n"
        yield "  </image>\n"
    yield "</annotations>\n"


def read_cvat(data: bytes, source: str, *, skip_unchanged: bool) -> Export:
    """The annotations of an export in "CVAT for images 1.1": its XML, or the ZIP file with it.

    skip_unchanged: leave out the images whose tags are all a model's, unchanged

    The annotator is the assignee of the task. An image without a tag counts as not labeled.
    Raises RequestError where the file is damaged or is none of CVAT.
    """
    limit = max(MIN_LIMIT_BYTES, _MAX_RATIO * len(data))
    reader = _Reader(source, limit, skip_unchanged=skip_unchanged)
    if not data.startswith(b"PK"):
        reader.read(io.BytesIO(data))
        return reader.build_export()
    try:
        with (
            zipfile.ZipFile(io.BytesIO(data)) as archive,
            _open_archived(archive, source) as stream,
        ):
            reader.read(stream)
    except (
        zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, ValueError, NotImplementedError,
        EOFError, RuntimeError,
    ) as error:  # fmt: skip
        raise RequestError(f"{source}: is a damaged ZIP file ({error}); export it again") from error
    return reader.build_export()


def _open_archived(archive: zipfile.ZipFile, source: str) -> IO[bytes]:
    names = archive.namelist()
    if ARCHIVED_FILE not in names:
        raise RequestError(
            f"{source}: is a ZIP file without {ARCHIVED_FILE}; export the task from CVAT as "
            '"CVAT for images 1.1"'
        )
    return archive.open(ARCHIVED_FILE)


class _Reader:
    """Reads the XML as a stream; no tree is built, and no entity is expanded."""

    def __init__(self, source: str, limit: int, *, skip_unchanged: bool) -> None:
        self._source, self._limit, self._skips_unchanged = source, limit, skip_unchanged
        self._path: list[str] = []
        self._text: list[str] = []
        self._assignees: dict[str | None, str] = {}
        self._task: str | None = None
        self._images: list[tuple[str, str | None]] = []
        self._tags: list[list[tuple[str, str]]] = []
        self._shapes = 0

    def read(self, stream: IO[bytes]) -> None:
        """Parse the whole stream."""
        parser = expat.ParserCreate()
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text.append
        parser.StartDoctypeDeclHandler = self._refuse_doctype
        size = 0
        try:
            while block := stream.read(_BLOCK_BYTES):
                size += len(block)
                if size > self._limit:
                    raise RequestError(
                        f"{self._source}: has XML that is compressed more than {_MAX_RATIO} times, "
                        "as no export is; export it again"
                    )
                parser.Parse(block, False)
            parser.Parse(b"", True)
        except (expat.ExpatError, LookupError, ValueError) as error:  # also unknown encodings
            raise RequestError(
                f"{self._source}: is damaged XML ({error}); export it again"
            ) from error

    def build_export(self) -> Export:
        """The annotations of what was read."""
        annotations, unlabeled, unchanged = [], 0, 0
        only = next(iter(self._assignees.values())) if len(self._assignees) == 1 else None
        for (name, task), tags in zip(self._images, self._tags, strict=True):
            is_unchanged = bool(tags) and all(source == _UNCHANGED for _, source in tags)
            unchanged += is_unchanged
            if not tags or (is_unchanged and self._skips_unchanged):
                unlabeled += 1
                continue
            labels = check_names((label for label, _ in tags), f"{self._source}: image {name}")
            annotator = self._assignees.get(task, only if task is None else None)
            annotations.append(Annotation(name, labels, annotator, None, TOOL))
        if not any(self._tags) and self._shapes:
            raise RequestError(
                f"{self._source}: has {self._shapes:,} shapes such as boxes and no tag; the labels "
                "of images are tags in CVAT"
            )
        tasks = {(name, task) for name, task in self._images}
        counts = Counter(name for name, _ in tasks)
        repeated = frozenset(name for name, count in counts.items() if count > 1)
        return Export(self._source, annotations, unlabeled, unchanged, repeated=repeated)

    def _refuse_doctype(self, *_: object) -> None:
        raise RequestError(
            f"{self._source}: declares a document type, which exports of CVAT do not have and "
            "which can define entities that exhaust memory; export it again"
        )

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if not self._path and name != "annotations":
            raise RequestError(
                f"{self._source}: is XML with the root <{name}>, not an export of CVAT "
                '(<annotations>); export the task as "CVAT for images 1.1"'
            )
        self._path.append(name)
        self._text.clear()
        if name == "task":
            self._task = None
        elif name == "track":
            raise RequestError(
                f'{self._source}: has tracks of a video; export images as "CVAT for images 1.1"'
            )
        elif name == "image":
            self._images.append((self._require(attributes, "name"), attributes.get("task_id")))
            self._tags.append([])
        elif name == "tag" and self._tags and "image" in self._path:
            source = attributes.get("source", "manual")
            self._tags[-1].append((self._require(attributes, "label"), source))
        elif name in _SHAPES:
            self._shapes += 1

    def _require(self, attributes: dict[str, str], name: str) -> str:
        if not attributes.get(name):
            raise RequestError(
                f"{self._source}: <{self._path[-1]}> {len(self._images):,} has no attribute "
                f"{name!r}; export it again"
            )
        return attributes[name]

    def _end(self, name: str) -> None:
        text = "".join(self._text).strip()
        self._text.clear()
        if self._path[-2:] == ["task", "id"]:
            self._task = text
        elif self._path[-2:] == ["assignee", "username"] and self._path[-3] in _UNITS and text:
            self._assignees[self._task] = text
        self._path.pop()
