"""Table of all images of all manifests of a check, as NumPy and Arrow columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgcls.data.manifests.label_columns import POSITIVE, UNKNOWN, LabelColumns
from imgcls.data.manifests.manifest import (
    Manifest,
    log_label_variants,
    normalize_labels,
    resolve_paths,
)
from imgcls.errors import OK

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ImageTable:
    """N images, those of the checked manifest first.

    manifests:      paths or URLs of the manifests, the checked one first
    manifest_index: (N,) int64, index into `manifests`
    row:            (N,) int64, row in the manifest
    path:           absolute paths, as large strings; null where the manifest has none
    label:          (N,) int64, index into `classes`; -1 without a label
    features:       N rows with the columns of FEATURE_FIELDS, `status`, `error` and `bytes`
    embedding:      (N, E) float16, of length 1; NaN without an image, None without a model
    targets:        (N, C) int8, POSITIVE, NEGATIVE or UNKNOWN for each of the classes, if one of
                    the manifests is multi-label: then `label` is -1. None otherwise
    """

    manifests: Sequence[str]
    manifest_index: IntArray
    row: IntArray
    path: pa.ChunkedArray
    label: IntArray
    classes: Sequence[str]
    features: pa.Table
    embedding: npt.NDArray[np.float16] | None
    targets: npt.NDArray[np.int8] | None = None

    def __len__(self) -> int:
        return len(self.row)

    @property
    def is_ok(self) -> BoolArray:
        """(N,) bool: whether the image could be decoded."""
        return np.asarray(pc.equal(self.features.column("status"), OK).to_numpy())

    @property
    def is_own(self) -> BoolArray:
        """(N,) bool: whether the image is of the checked manifest, not of one of `against`."""
        is_own: BoolArray = self.manifest_index == 0
        return is_own

    @property
    def is_labeled(self) -> BoolArray:
        """(N,) bool: whether the image has a label, or any class of it is known."""
        if self.targets is None:
            return np.asarray(self.label >= 0)
        return np.asarray((self.targets != UNKNOWN).any(axis=1))

    def describe_label(self, index: int) -> str | None:
        """The class of an image, or its classes separated by `; `; None without a label."""
        if self.targets is None:
            code = int(self.label[index])
            return self.classes[code] if code >= 0 else None
        row = self.targets[index]
        if (row == UNKNOWN).all():
            return None
        return "; ".join(self.classes[code] for code in np.flatnonzero(row == POSITIVE).tolist())

    def get_numbers(self, name: str) -> FloatArray:
        """(N,) float64: a numeric feature; NaN where it is null."""
        return np.asarray(self.features.column(name).cast(pa.float64(), safe=False).to_numpy())

    def get_bytes(self, name: str, width: int) -> npt.NDArray[np.uint8]:
        """(N, width) uint8: a feature of `width` bytes; zeros where it is null."""
        column = pc.fill_null(self.features.column(name), b"\0" * width).combine_chunks()
        data = b"".join(column.to_pylist())
        return np.frombuffer(data, np.uint8).reshape(-1, width)


def build_image_table(
    sources: Iterable[tuple[Manifest, Iterable[tuple[pa.Table, pa.Table]]]],
) -> ImageTable:
    """Build the table from the rows of manifests and the features of their images, by chunk."""
    names: list[str] = []
    paths: list[pa.Array] = []
    features: list[pa.Table] = []
    embeddings: list[npt.NDArray[np.float16]] = []
    manifest_index: list[IntArray] = []
    labels: list[_LabelRows] = []
    for number, (manifest, chunks) in enumerate(sources):
        names.append(manifest.source)
        for rows, table in chunks:
            found = resolve_paths(rows.column(manifest.path_column), manifest.root)
            paths += found.chunks
            labels.append(_select_labels(manifest, rows))
            if "embedding" in table.schema.names:
                embeddings.append(_read_embeddings(table.column("embedding")))
                table = table.drop_columns("embedding")
            features.append(table)
            manifest_index.append(np.full(rows.num_rows, number))
    table = pa.concat_tables(features)
    encoded = _encode_labels(labels)
    place = ", ".join(f"manifest {name}" for name in names)
    log_label_variants(place, encoded.counts)
    return ImageTable(
        manifests=names,
        manifest_index=np.concatenate(manifest_index),
        row=table.column("row").to_numpy(),
        path=pa.chunked_array(paths),
        label=encoded.label,
        classes=encoded.classes,
        features=table,
        embedding=np.concatenate(embeddings) if embeddings else None,
        targets=encoded.targets,
    )


@dataclass(frozen=True)
class _LabelRows:
    """The label columns of some rows of a manifest; `columns` is None without labels."""

    source: str
    columns: LabelColumns | None
    is_multilabel: bool
    rows: pa.Table


@dataclass(frozen=True)
class _EncodedLabels:
    """Labels of all images, as in `ImageTable`, and the number of images of each class."""

    label: IntArray
    classes: list[str]
    targets: npt.NDArray[np.int8] | None
    counts: dict[str, int]


def _select_labels(manifest: Manifest, rows: pa.Table) -> _LabelRows:
    columns = manifest.find_label_columns()
    if columns is None:
        # a table without columns has no rows
        selected = pa.table({"": pa.nulls(rows.num_rows)})
    else:
        selected = rows.select(list(columns.names))
    return _LabelRows(manifest.source, columns, manifest.label_columns is not None, selected)


def _encode_labels(parts: Sequence[_LabelRows]) -> _EncodedLabels:
    if any(part.is_multilabel for part in parts):
        return _encode_label_sets(parts)
    label = pa.chunked_array([_read_labels(part) for part in parts], pa.string())
    encoded = label.combine_chunks().dictionary_encode()
    counts = {each["values"]: each["counts"] for each in pc.value_counts(label).to_pylist()}
    counts.pop(None, None)
    codes: IntArray = pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy()
    return _EncodedLabels(codes, encoded.dictionary.to_pylist(), None, counts)


def _encode_label_sets(parts: Sequence[_LabelRows]) -> _EncodedLabels:
    """Labels of several classes; those of a manifest with one label per image are read as lists."""
    counts: Counter[str] = Counter()
    named: dict[str, None] = {}  # in the order of the options
    for part in parts:
        if part.columns is not None:
            counts.update(part.columns.count_names(part.rows, f"manifest {part.source}"))
            named |= dict.fromkeys(part.columns.classes)
    classes = [*named, *sorted(set(counts) - set(named))]
    targets = [_read_targets(part, classes) for part in parts]
    matrix = np.concatenate(targets)
    return _EncodedLabels(np.full(len(matrix), -1), classes, matrix, dict(+counts))


def _read_targets(part: _LabelRows, classes: Sequence[str]) -> npt.NDArray[np.int8]:
    if part.columns is None:
        return np.full((part.rows.num_rows, len(classes)), UNKNOWN, np.int8)
    return part.columns.encode(part.rows, classes, f"manifest {part.source}").targets


def _read_labels(part: _LabelRows) -> pa.Array:
    if part.columns is None:
        return pa.nulls(part.rows.num_rows, pa.string())
    return normalize_labels(part.rows.column(0)).cast(pa.string())


def _read_embeddings(column: pa.ChunkedArray) -> npt.NDArray[np.float16]:
    width = column.type.list_size
    array = column.combine_chunks()
    vectors = np.full((len(array), width), np.nan, np.float16)
    valid = np.asarray(array.is_valid())
    vectors[valid] = array.flatten().to_numpy().reshape(-1, width)
    return vectors
