"""Images drawn for the tests of checks, and the table of their features."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from PIL import Image

from imgcls.curation.checks.findings import Finding
from imgcls.curation.checks.image_table import ImageTable, build_image_table
from imgcls.curation.scan_stage import scan_schema
from imgcls.data.decoding.image_features import compute_features
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.errors import ImageError
from tests.conftest import write_manifest
from tests.data.pictures import encoded

Row = tuple[str, bytes, str | None]


def images_of(
    folder: Path,
    *manifests: list[Row],
    embeddings: np.ndarray | None = None,
    delimiter: str | None = None,
) -> ImageTable:
    """Manifests of (name, file, label), scanned as a worker does.

    delimiter: of the class names in a label, for multi-label manifests
    """
    sources = []
    start = 0
    for number, rows in enumerate(manifests):
        file = write_manifest(
            folder / f"m{number}.csv", [(name, label or "") for name, _, label in rows],
            ("path", "label"),
        )  # fmt: skip
        manifest = open_manifest(ManifestConfig(path=str(file), label_delimiter=delimiter))
        results = []
        for row, (_, data, _) in enumerate(rows):
            try:
                results.append({"row": row, "status": "ok", **_compute_features(data)})
            except ImageError as error:
                results.append({"row": row, "status": error.status, "error": str(error)})
            if embeddings is not None:
                results[-1]["embedding"] = embeddings[start + row].astype(np.float16)
        start += len(rows)
        width = None if embeddings is None else embeddings.shape[1]
        features = pa.Table.from_pylist(results, schema=scan_schema(width))
        table = pa_csv.read_csv(
            file, convert_options=pa_csv.ConvertOptions(strings_can_be_null=True)
        )
        sources.append((manifest, [(table, features)]))
    return build_image_table(sources)


@functools.cache
def _compute_features(data: bytes) -> dict[str, Any]:
    """Tests scan the same images again and again."""
    return compute_features(data).to_columns()


def clusters(seed: int, count: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings around a center per class, and their classes."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((classes, 32)) * 1.5
    label = np.arange(count) % classes
    return centers[label] + rng.standard_normal((count, 32)), label


@functools.cache
def picture(seed: int) -> Image.Image:
    """One of many images that are not similar."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    return coarse.resize((320, 240), Image.Resampling.NEAREST)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    return encoded(image, "JPEG", quality=quality)


def indices_by_issue(findings: Iterable[Finding]) -> dict[str, list[int]]:
    return {finding.issue: finding.indices.tolist() for finding in findings if len(finding.indices)}
