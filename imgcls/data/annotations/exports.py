"""Exports of labeling tools: which tool wrote a file, from its content, and its annotations."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.data.annotations.annotation import (
    Annotation,
    Export,
    check_names,
    is_unicode,
    parse_time,
)
from imgcls.data.annotations.csv_labels import read_csv, write_csv
from imgcls.data.annotations.cvat import ARCHIVED_FILE, read_cvat, write_cvat
from imgcls.data.annotations.fiftyone import (
    LABELS_FILE,
    PATHS_FILE,
    read_fiftyone,
    write_fiftyone,
)
from imgcls.data.annotations.label_studio import read_label_studio, write_label_studio
from imgcls.data.annotations.tasks import ExportFormat, LabelingTasks, ToolFormat
from imgcls.data.storage import filesystem
from imgcls.errors import RequestError, StorageError, StorageMissing, request_error

_WRITERS: Mapping[ToolFormat, Callable[[str, LabelingTasks], list[str]]] = MappingProxyType(
    {
        "label-studio": write_label_studio,
        "cvat": write_cvat,
        "fiftyone": write_fiftyone,
        "csv": write_csv,
    }
)
_RECORD_UNCHANGED = ("cvat", "fiftyone")
_HEAD_BYTES = 4096


def write_tasks(format: ToolFormat, folder: str, tasks: LabelingTasks) -> list[str]:
    """Write tasks for a labeling tool into a folder; returns the files.

    Raises RequestError, before anything is written, where the tool cannot take them.
    """
    return _WRITERS[format](folder, tasks)


def read_export(
    url: str, format: ExportFormat, *, several: bool, skip_unchanged: bool = False
) -> Export:
    """The annotations of an export: a file, or a folder of FiftyOne or of Parquet files.

    format:         auto detects it from the content
    several:        images may have several labels
    skip_unchanged: leave out unchanged predictions, where the tool records it
    Raises RequestError where the file is missing, damaged, of another tool, or without a label.
    """
    try:
        files = _find_files(url)
        head = _read_head(files[0])
        found = _detect(head) if format == "auto" else format
        if skip_unchanged and found not in _RECORD_UNCHANGED:
            raise RequestError(
                f"export {url}: skip_unchanged: has no effect on the format {found}, which does "
                "not record unchanged predictions; remove it"
            )
        if found == "imgcls":
            export = _read_tables(url, files)
        elif found == "csv":
            export = read_csv(files[0], several=several)
        elif found == "cvat":
            data = filesystem.read(files[0])
            export = read_cvat(data, files[0], skip_unchanged=skip_unchanged)
        else:
            export = _read_json(files[0], found, skip_unchanged=skip_unchanged)
    except StorageError as error:
        raise request_error(RequestError, f"export {url}: {error}", error) from error
    for each in export.annotations:
        for text in (each.path, each.annotator):
            if text is not None and not is_unicode(text):
                raise RequestError(
                    f"export {url}: {text!r} is no valid Unicode text; correct the export"
                )
    if not export.annotations:
        raise RequestError(
            f"export {url}: has no label ({export.unlabeled:,} images without one); label images, "
            "and export again"
        )
    return export


def _find_files(url: str) -> list[str]:
    """The file of an export, or all tables of a labels table."""
    if not filesystem.is_folder(url):
        return [url]
    names = filesystem.list_names(url)
    for name in (LABELS_FILE, ARCHIVED_FILE):
        if name in names:
            return [filesystem.join(url, name)]
    tables = [name for name in names if name.endswith(".parquet")]
    if not tables:
        raise RequestError(
            f"export {url}: is a folder without {LABELS_FILE} (FiftyOne), {ARCHIVED_FILE} (CVAT) "
            "or Parquet files (a labels table); pass the file that the tool exported"
        )
    return [filesystem.join(url, name) for name in tables]


def _read_head(url: str) -> bytes:
    with filesystem.open_read(url) as stream:
        head: bytes = stream.read(_HEAD_BYTES)
    if not head.strip():
        raise RequestError(f"export {url}: is empty; export it again")
    return head


def _detect(head: bytes) -> ExportFormat:
    if head.startswith(b"PAR1"):
        return "imgcls"
    if head.startswith(b"PK"):
        return "cvat"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start == b"<":
        return "cvat"
    if start == b"[":
        return "label-studio"
    return "fiftyone" if start == b"{" else "csv"


def _read_json(url: str, format: ExportFormat, *, skip_unchanged: bool) -> Export:
    body = _load_json(url)
    if format == "label-studio":
        if not isinstance(body, list):
            raise RequestError(
                f"{url}: is no list of tasks of Label Studio; export it as JSON or JSON-MIN"
            )
        return read_label_studio(body, url)
    if not isinstance(body, dict):
        raise RequestError(f"{url}: is no data set of FiftyOne; pass its {LABELS_FILE}")
    paths = None
    with contextlib.suppress(StorageMissing):
        paths = _load_json(filesystem.join(filesystem.parent(url), PATHS_FILE))
    return read_fiftyone(body, paths, url, skip_unchanged=skip_unchanged)


def _load_json(url: str) -> Any:
    try:
        return json.loads(filesystem.read(url))
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"{url}: is damaged JSON, or cut off ({error}); export it again"
        ) from error


def _read_tables(url: str, files: list[str]) -> Export:
    """The annotations of a labels table."""
    annotations: list[Annotation] = []
    for file in files:
        try:
            with filesystem.open_read(file) as stream:
                table = _truncate_times(pq.read_table(stream))
        except (pa.ArrowException, OSError) as error:
            raise RequestError(f"{file}: is a damaged Parquet file ({error})") from error
        missing = [name for name in ("path", "label") if name not in table.schema.names]
        if missing:
            raise RequestError(
                f"{file}: has no column {missing[0]!r} (found: {', '.join(table.schema.names)}); "
                "pass a labels table"
            )
        for number, row in enumerate(table.to_pylist()):
            place = f"{file}: row {number:,}"
            if not isinstance(row["path"], str) or not row["path"]:
                raise RequestError(f"{place}: has no path; remove the row")
            label = row["label"]
            names = None if label is None else label if isinstance(label, list) else [label]
            annotations.append(
                Annotation(
                    row["path"],
                    None if names is None else check_names(names, place),
                    _get_text(row, "annotator", place),
                    parse_time(row.get("labeled_at"), place),
                    _get_text(row, "tool", place) or "imgcls",
                )
            )
    return Export(url, annotations)


def _get_text(row: Mapping[str, Any], name: str, place: str) -> str | None:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise RequestError(f"{place}: {name} {value!r} is not text; correct the table")
    return value


def _truncate_times(table: pa.Table) -> pa.Table:
    """Times in microseconds; digits below are dropped."""
    index = table.schema.get_field_index("labeled_at")
    if index < 0 or not pa.types.is_timestamp(table.schema.field(index).type):
        return table
    kind = pa.timestamp("us", table.schema.field(index).type.tz)
    return table.set_column(index, "labeled_at", table.column(index).cast(kind, safe=False))
