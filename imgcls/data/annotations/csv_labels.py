"""CSV: a table of images to label, for a spreadsheet, and the table with labels."""

from __future__ import annotations

import csv
import io

import pyarrow as pa

from imgcls.data.annotations.annotation import Annotation, Export, check_names, parse_time
from imgcls.data.annotations.tasks import LabelingTasks
from imgcls.data.manifests.csv_reader import read_csv_batches, read_csv_schema
from imgcls.data.manifests.manifest import normalize_labels
from imgcls.data.manifests.options import ReadOptions
from imgcls.data.storage import filesystem
from imgcls.errors import ManifestError, RequestError

TOOL = "csv"
TASKS_FILE = "labels.csv"
SEPARATOR = ";"
"""Between several labels of an image; alone, it is the label of an image without a class."""
_COLUMNS = (
    "path",
    "label",
    "annotator",
    "labeled_at",
    "predicted_label",
    "score",
    "model_version",
)


def write_csv(folder: str, tasks: LabelingTasks) -> list[str]:
    """Write the table, whose column `label` people fill in; returns the file.

    Raises RequestError, before anything is written, where a class name contains the separator.
    """
    if tasks.several:
        for name in tasks.classes:
            if SEPARATOR in name:
                raise RequestError(
                    f"format csv: the class name {name!r} contains {SEPARATOR!r}, which separates "
                    "the labels of an image; pass another --format"
                )
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for task in tasks.tasks:
        predicted = SEPARATOR.join(task.labels)
        score = "" if task.score is None else f"{task.score:.6g}"
        writer.writerow([task.path, "", "", "", predicted, score, tasks.model_version])
    url = filesystem.join(folder, TASKS_FILE)
    filesystem.write(url, stream.getvalue().encode())
    return [url]


def read_csv(url: str, *, several: bool) -> Export:
    """The annotations of a table with the columns `path` and `label`.

    several: a label is a list of names, separated by `;`

    The columns `annotator` and `labeled_at` are read where they are. A row without a label counts
    as not labeled. Raises RequestError where a column is missing or a value cannot be read.
    """
    try:
        return _read(url, several=several)
    except ManifestError as error:
        text = str(error).removeprefix(f"manifest {url}: ")
        what, _, remedy = text.rpartition("; ")
        if "--manifest." in remedy:  # an option that an export does not have
            text = f"{what}; save it as CSV UTF-8, with the quotes inside values doubled"
        raise RequestError(f"{url}: {text}") from error


def _read(url: str, *, several: bool) -> Export:
    options = ReadOptions()
    names = read_csv_schema(url, options).names
    missing = [name for name in ("path", "label") if name not in names]
    if missing:
        raise RequestError(
            f"{url}: has no column {missing[0]!r} (found: {', '.join(names)}); rename the columns "
            "of the paths and labels to path and label"
        )
    annotations: list[Annotation] = []
    rows = 0
    for batch in read_csv_batches(url, options):
        paths = batch.column("path").to_pylist()
        labels = normalize_labels(batch.column("label")).to_pylist()
        people = _get_values(batch, "annotator")
        times = _get_values(batch, "labeled_at")
        for path, label, person, time in zip(paths, labels, people, times, strict=True):
            rows += 1
            place = f"{url}: row {rows:,}"
            if label is None:
                continue
            if not path:
                raise RequestError(f"{place}: has a label and no path; add the path")
            found = [label]
            if several:
                found = [each.strip() for each in label.split(SEPARATOR) if each.strip()]
            annotations.append(
                Annotation(
                    path, check_names(found, place), person or None, parse_time(time, place), TOOL
                )
            )
    return Export(url, annotations, rows - len(annotations))


def _get_values(batch: pa.RecordBatch, name: str) -> list[str | None]:
    if name not in batch.schema.names:
        return [None] * batch.num_rows
    values: list[str | None] = batch.column(name).to_pylist()
    return values
