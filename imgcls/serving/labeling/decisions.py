"""Decisions of one annotator: an immutable record, and the files that it is stored in."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.data.annotations.labels_table import build_labels_schema

KEPT_DECISIONS = 1_000
"""Number of the newest decisions that are kept even if undone or replaced, to undo more."""
TOOL = "imgcls"

_RECORD_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("labels", pa.list_(pa.string())),
        pa.field("labeled_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("submission", pa.string(), nullable=False),
        pa.field("is_undone", pa.bool_(), nullable=False),
    ]
)
_METADATA_KEY = b"imgcls"


@dataclass(frozen=True)
class Decision:
    """Decision of an annotator about one image.

    path:       absolute path of the image
    labels:     the classes; None if the annotator skipped the image
    submission: ID that the client chose; a repeated request has the same one
    is_undone:  the annotator has taken it back
    """

    path: str
    labels: tuple[str, ...] | None
    labeled_at: datetime.datetime
    submission: str
    is_undone: bool = False


@dataclass(frozen=True)
class AnnotatorRecord:
    """All decisions of an annotator, in order, and the images assigned to this annotator.

    assigned_at: time of the assignment, by which it expires
    version:     of the stored record; 0 if there is none
    """

    annotator: str
    decisions: tuple[Decision, ...] = ()
    assigned: tuple[str, ...] = ()
    assigned_at: datetime.datetime | None = None
    version: int = 0

    @cached_property
    def current(self) -> Mapping[str, Decision]:
        """The newest decision about each image that is not undone, by path."""
        return {each.path: each for each in self.decisions if not each.is_undone}

    @cached_property
    def labeled(self) -> frozenset[str]:
        """Paths of the images that the annotator labeled, without those skipped."""
        return frozenset(path for path, each in self.current.items() if each.labels is not None)

    @property
    def num_skipped(self) -> int:
        """Number of images that the annotator skipped."""
        return len(self.current) - len(self.labeled)

    @property
    def last(self) -> Decision | None:
        """The newest decision that is not undone."""
        return next((each for each in reversed(self.decisions) if not each.is_undone), None)

    def find(self, submission: str) -> Decision | None:
        return next((e for e in reversed(self.decisions) if e.submission == submission), None)

    def add(self, decision: Decision) -> AnnotatorRecord:
        """The record with one more decision; drops old ones that were undone or replaced."""
        added = replace(self, decisions=(*self.decisions, decision))
        is_current = {each.submission for each in added.current.values()}
        old, new = added.decisions[:-KEPT_DECISIONS], added.decisions[-KEPT_DECISIONS:]
        kept = tuple(each for each in old if each.submission in is_current)
        return added if len(kept) == len(old) else replace(added, decisions=(*kept, *new))

    def undo(self, submission: str) -> AnnotatorRecord:
        """The record with one decision undone; an earlier one about the same image holds again."""
        return replace(
            self,
            decisions=tuple(
                replace(each, is_undone=True) if each.submission == submission else each
                for each in self.decisions
            ),
        )


def encode_record(record: AnnotatorRecord, *, several: bool) -> bytes:
    """The bytes of a stored record.

    several: images may have several labels
    """
    rows = record.decisions
    columns: list[list[Any]] = [
        [each.path for each in rows],
        [each.labels for each in rows],
        [each.labeled_at for each in rows],
        [each.submission for each in rows],
        [each.is_undone for each in rows],
    ]
    assigned_at = None if record.assigned_at is None else record.assigned_at.isoformat()
    metadata = {
        "annotator": record.annotator,
        "assigned": record.assigned,
        "assigned_at": assigned_at,
        "several": several,
    }
    schema = _RECORD_SCHEMA.with_metadata({_METADATA_KEY: json.dumps(metadata).encode()})
    return _write_parquet(columns, schema)


def decode_record(data: bytes, version: int) -> tuple[AnnotatorRecord, bool]:
    """The record in a file, and whether its images may have several labels.

    Raises ValueError for a file that is not a record.
    """
    table = pq.read_table(pa.BufferReader(data))
    metadata = json.loads((table.schema.metadata or {}).get(_METADATA_KEY, b"{}"))
    if "annotator" not in metadata or table.schema.names != _RECORD_SCHEMA.names:
        raise ValueError("is not a record of decisions")
    assigned_at = metadata["assigned_at"]
    record = AnnotatorRecord(
        metadata["annotator"],
        tuple(
            Decision(path, None if labels is None else tuple(labels), *rest)
            for path, labels, *rest in zip(*(c.to_pylist() for c in table.columns), strict=True)
        ),
        tuple(metadata["assigned"]),
        None if assigned_at is None else datetime.datetime.fromisoformat(assigned_at),
        version,
    )
    return record, metadata["several"]


def encode_labels_table(record: AnnotatorRecord, *, several: bool) -> bytes:
    """The labels table of an annotator: one row per image, the newest decision, oldest first."""
    rows = sorted(record.current.values(), key=lambda each: each.labeled_at)
    columns: list[list[Any]] = [
        [each.path for each in rows],
        [each.labels if several or each.labels is None else each.labels[0] for each in rows],
        [record.annotator] * len(rows),
        [each.labeled_at for each in rows],
        [TOOL] * len(rows),
    ]
    return _write_parquet(columns, build_labels_schema(several=several))


def _write_parquet(columns: list[list[Any]], schema: pa.Schema) -> bytes:
    arrays = [pa.array(values, kind) for values, kind in zip(columns, schema.types, strict=True)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data
