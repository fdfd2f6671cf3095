"""History of labels: every annotation that was imported, next to the manifest that it is in.

The manifest and the history cannot be published at once. The history is first written under
another name, with the digest of the manifest that it belongs to. After a kill, the next import
publishes it if that manifest is there, and removes it otherwise.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgcls.curation.label_consensus import LabelNames, get_names
from imgcls.data.annotations.annotation import Annotation
from imgcls.data.annotations.labels_table import build_labels_schema
from imgcls.data.storage import filesystem
from imgcls.errors import OutputError, StorageError, StorageMissing, request_error
from imgcls.runs.layout import write_table

HISTORY_FILE = "labels_history.parquet"
PENDING_FILE = "_labels_history.pending"
"""History of a manifest that may not be published yet."""
_DECISION = ("path", "label", "annotator", "labeled_at", "tool")
_MANIFEST_KEY, _DIGEST_KEY = b"imgcls.manifest", b"imgcls.digest"


def build_history_schema(*, several: bool) -> pa.Schema:
    """The columns of the labels table, and:

    previous_label: of the manifest before the import, null without one
    used:           whether the import wrote this label to the manifest
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
    table = _read_table(url)
    if table is None:
        return schema.empty_table()
    found = table.schema.remove_metadata()
    if found == build_history_schema(several=not several):
        raise OutputError(
            f"{url}: is the history of other labels ({found.field('label').type}, not "
            f"{schema.field('label').type}); pass an --output in another folder"
        )
    if found != schema:
        columns = ", ".join(f"{each.name} {each.type}" for each in found)
        raise OutputError(
            f"{url}: is not a history of these labels (its columns: {columns}); pass an --output "
            "in another folder"
        )
    return table


def _read_table(url: str) -> pa.Table | None:
    try:
        with filesystem.open_read(url) as stream:
            return pq.read_table(stream)
    except StorageMissing:
        return None
    except StorageError as error:
        raise request_error(OutputError, f"{url}: cannot be read ({error})", error) from error
    except (pa.ArrowException, OSError) as error:
        raise OutputError(
            f"{url}: cannot be read ({error}). Move it away, or pass an --output in another folder"
        ) from error


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

    A row that changes the label of an image is new unless it is among the last rows that wrote this
    label. Another row is new unless the history has its annotation with the same `used`.
    Only the history of the images in `rows` is read into Python.
    """
    rows = list(rows)
    paths = pa.array(sorted({row["path"] for row in rows}), pa.string())
    known: dict[str, list[Mapping[str, Any]]] = {}
    for row in history.filter(pc.is_in(history["path"], value_set=paths)).to_pylist():
        known.setdefault(row["path"], []).append(row)
    added = []
    for row in rows:
        own = known.setdefault(row["path"], [])
        if not _has_row(own, row, history.schema.names):
            own.append(row)
            added.append(row)
    return pa.concat_tables([history, pa.Table.from_pylist(added, history.schema)])


def _has_row(known: list[Mapping[str, Any]], row: Mapping[str, Any], names: list[str]) -> bool:
    """Whether the history of an image, from the oldest row, has a row already."""
    if not row["used"] or row["previous_label"] == row["label"]:
        key = (*_DECISION, "used")
        return any(all(each[name] == row[name] for name in key) for each in known)
    for each in reversed(known):
        if each["used"] and each["label"] != row["label"]:
            return False
        if all(each[name] == row[name] for name in names):
            return True
    return False


def _write_history(folder: str, history: pa.Table) -> str:
    """Write the history into a folder, atomically; returns the file."""
    url = filesystem.join(folder, HISTORY_FILE)
    write_table(url, history)
    return url


class HashedStream(io.RawIOBase):
    """Writes to another stream, and hashes the bytes."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__()
        self._stream, self._hash = stream, hashlib.blake2b()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._stream.write(data)
        return len(data)

    def hexdigest(self) -> str:
        """BLAKE2b of all bytes so far."""
        return self._hash.hexdigest()


def write_pending(output: str, digest: str, history: pa.Table) -> None:
    """Write the history of a manifest that is not published yet.

    digest: BLAKE2b of the manifest's bytes
    """
    name = output.rpartition("/")[2]
    metadata = {_MANIFEST_KEY: name.encode(), _DIGEST_KEY: digest.encode()}
    url = filesystem.join(filesystem.parent(output), PENDING_FILE)
    write_table(url, history.replace_schema_metadata(metadata))


def publish_history(folder: str, history: pa.Table) -> str:
    """Publish the history of a manifest that was published now; returns the file."""
    url = _write_history(folder, history)
    filesystem.remove(filesystem.join(folder, PENDING_FILE))
    return url


def recover_history(folder: str) -> None:
    """After a kill, publish a pending history if its manifest is published, else remove it."""
    url = filesystem.join(folder, PENDING_FILE)
    pending = _read_table(url)
    if pending is None:
        return
    metadata = pending.schema.metadata or {}
    manifest = filesystem.join(folder, metadata.get(_MANIFEST_KEY, b"").decode())
    if _compute_digest(manifest) == metadata.get(_DIGEST_KEY, b"").decode():
        _write_history(folder, pending.replace_schema_metadata(None))
    filesystem.remove(url)


def _compute_digest(url: str) -> str | None:
    """BLAKE2b of a file; None without it."""
    digest = hashlib.blake2b()
    try:
        for block in filesystem.iter_blocks(url):
            digest.update(block)
    except StorageMissing:
        return None
    return digest.hexdigest()
