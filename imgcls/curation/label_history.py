"""History of labels: every annotation that was imported, next to the manifest that it is in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.curation.label_consensus import LabelNames, get_names
from imgcls.data.annotations.annotation import Annotation
from imgcls.data.annotations.labels_table import build_labels_schema
from imgcls.data.storage import filesystem
from imgcls.errors import OutputError, StorageError, StorageMissing, request_error
from imgcls.runs.layout import write_table

HISTORY_FILE = "labels_history.parquet"
_DECISION = ("path", "label", "annotator", "labeled_at", "tool")


def build_history_schema(*, several: bool) -> pa.Schema:
    """The columns of the labels table, and:

    previous_label: of the manifest before the import, null without one
    used:           whether the manifest has this label now
    """
    labels = build_labels_schema(several=several)
    return labels.append(pa.field("previous_label", labels.field("label").type)).append(
        pa.field("used", pa.bool_(), nullable=False)
    )


def read_history(folder: str, *, several: bool) -> pa.Table:
    """The history in a folder; empty without one.

    Raises OutputError where it cannot be read, or is of images with another number of labels.
    """
    url, schema = filesystem.join(folder, HISTORY_FILE), build_history_schema(several=several)
    try:
        with filesystem.open_read(url) as stream:
            table = pq.read_table(stream)
    except StorageMissing:
        return schema.empty_table()
    except (pa.ArrowException, StorageError) as error:
        raise request_error(OutputError, f"{url}: cannot be read ({error})", error) from error
    if table.schema.remove_metadata() != schema:
        raise OutputError(
            f"{url}: is the history of other labels ({table.schema.field(1).type}, not "
            f"{schema.field('label').type}); pass an --output in another folder"
        )
    return table


def build_history_rows(
    annotations: Iterable[Annotation],
    previous: Mapping[str, LabelNames | None],
    used: Mapping[str, LabelNames],
    *,
    several: bool,
) -> list[dict[str, Any]]:
    """Rows of the history for annotations with absolute paths.

    previous: labels of the manifest before, by path
    used:     labels that the import writes, by path
    """

    def show(names: LabelNames | None) -> Any:
        if names is None:
            return None
        return sorted(names) if several else next(iter(names))

    return [
        {
            "path": each.path,
            "label": show(get_names(each)),
            "annotator": each.annotator,
            "labeled_at": each.labeled_at,
            "tool": each.tool,
            "previous_label": show(previous.get(each.path)),
            "used": each.labels is not None and used.get(each.path) == get_names(each),
        }
        for each in annotations
    ]


def extend_history(history: pa.Table, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """The history with the rows that are new in it.

    An annotation that is in it is added again only if it changes the label in the manifest again.
    """
    known: set[Any] = set()
    for row in history.to_pylist():
        known |= {_key(row, _DECISION), _key(row, history.schema.names)}
    added = []
    for row in rows:
        whole, decision = _key(row, history.schema.names), _key(row, _DECISION)
        is_change = row["used"] and row["previous_label"] != row["label"]
        if whole in known or (decision in known and not is_change):
            continue
        known |= {whole, decision}
        added.append(row)
    return pa.concat_tables([history, pa.Table.from_pylist(added, history.schema)])


def _key(row: Mapping[str, Any], names: Iterable[str]) -> tuple[Any, ...]:
    values = (row[name] for name in names)
    return tuple(tuple(each) if isinstance(each, list) else each for each in values)


def write_history(folder: str, history: pa.Table) -> str:
    """Write the history into a folder, atomically; returns the file."""
    url = filesystem.join(folder, HISTORY_FILE)
    write_table(url, history)
    return url
