"""Manifests, labels tables, and imports of labels into a folder."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.curation.import_labels import import_labels
from imgcls.curation.label_summary import LabelImport
from imgcls.data.annotations.labels_table import build_labels_schema


def write_manifest(tmp_path: Path, labels: dict[str, Any], **columns: Any) -> Path:
    kind = pa.list_(pa.string()) if any(isinstance(v, list) for v in labels.values()) else None
    values = pa.array(list(labels.values()), kind or pa.string())
    table = pa.table({"path": list(labels), "label": values, **columns})
    path = tmp_path / "train.parquet"
    pq.write_table(table, path)
    return path


def write_labels(tmp_path: Path, rows: Sequence[tuple[Any, ...]], *, several: bool = False) -> Path:
    """A labels table of (path, label, annotator, minute) rows."""
    schema = build_labels_schema(several=several)
    start = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)
    built = [
        {
            "path": path, "label": label, "annotator": annotator, "tool": "imgcls",
            "labeled_at": None if minute is None else start + datetime.timedelta(minutes=minute),
        }
        for path, label, annotator, minute in rows
    ]  # fmt: skip
    path = tmp_path / "labels.parquet"
    pq.write_table(pa.Table.from_pylist(built, schema), path)
    return path


def merge(tmp_path: Path, export: Path, onto: Path, **settings: Any) -> LabelImport:
    output = settings.pop("output", tmp_path / "out" / "new.parquet")
    return import_labels(export=export, onto=str(onto), output=output, **settings)


def read_labels(tmp_path: Path) -> dict[str, Any]:
    table = pq.read_table(tmp_path / "out" / "new.parquet")
    return dict(zip(table["path"].to_pylist(), table["label"].to_pylist(), strict=True))
