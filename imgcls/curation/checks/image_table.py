"""Table of all images of all manifests of a check, as NumPy and Arrow columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

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
    """

    manifests: Sequence[str]
    manifest_index: IntArray
    row: IntArray
    path: pa.ChunkedArray
    label: IntArray
    classes: Sequence[str]
    features: pa.Table
    embedding: npt.NDArray[np.float16] | None

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
    columns: dict[str, list[pa.ChunkedArray]] = {"path": [], "label": []}
    features: list[pa.Table] = []
    embeddings: list[npt.NDArray[np.float16]] = []
    manifest_index: list[IntArray] = []
    for number, (manifest, chunks) in enumerate(sources):
        names.append(manifest.source)
        for rows, table in chunks:
            paths = rows.column(manifest.path_column)
            columns["path"].append(resolve_paths(paths, manifest.root))
            columns["label"].append(_read_labels(rows, manifest.label_column))
            if "embedding" in table.schema.names:
                embeddings.append(_read_embeddings(table.column("embedding")))
                table = table.drop_columns("embedding")
            features.append(table)
            manifest_index.append(np.full(rows.num_rows, number))
    table = pa.concat_tables(features)
    label = pa.chunked_array([c for part in columns["label"] for c in part.chunks], pa.string())
    encoded = label.combine_chunks().dictionary_encode()
    counts = {each["values"]: each["counts"] for each in pc.value_counts(label).to_pylist()}
    counts.pop(None, None)
    log_label_variants(", ".join(f"manifest {name}" for name in names), counts)
    return ImageTable(
        manifests=names,
        manifest_index=np.concatenate(manifest_index),
        row=table.column("row").to_numpy(),
        path=pa.chunked_array([c for part in columns["path"] for c in part.chunks]),
        label=pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy(),
        classes=encoded.dictionary.to_pylist(),
        features=table,
        embedding=np.concatenate(embeddings) if embeddings else None,
    )


def _read_labels(rows: pa.Table, column: str | None) -> pa.ChunkedArray:
    if column is None:
        return pa.chunked_array([pa.nulls(rows.num_rows, pa.string())])
    return pa.chunked_array([normalize_labels(rows.column(column)).cast(pa.string())])


def _read_embeddings(column: pa.ChunkedArray) -> npt.NDArray[np.float16]:
    width = column.type.list_size
    array = column.combine_chunks()
    vectors = np.full((len(array), width), np.nan, np.float16)
    valid = np.asarray(array.is_valid())
    vectors[valid] = array.flatten().to_numpy().reshape(-1, width)
    return vectors
