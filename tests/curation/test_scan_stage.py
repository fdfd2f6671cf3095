"""Scan of a chunk: one row of features for each image."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from PIL import Image

from imgcls.curation.scan_stage import scan_chunk, scan_schema
from imgcls.curation.scan_worker import ScanSpec
from imgcls.data.image_features import ImageFeatures
from imgcls.data.storage_settings import StorageConfig
from imgcls.execution.messages import ChunkTask, StageTimings
from imgcls.models.classifier import Classifier
from tests.conftest import draw
from tests.execution.runs import manifest_of, plan_at


def test_an_image_without_a_finite_embedding_is_an_error(
    tmp_path: Path, overflowing_bundle: Path
) -> None:
    classifier = Classifier.load(str(overflowing_bundle), precision="fp32", device="cpu")
    for name in ("red", "green"):
        draw(name).save(tmp_path / f"{name}.png")
    Image.new("RGB", (64, 48), "white").save(tmp_path / "white.png")
    table = pa.table({"path": ["red.png", "white.png", "absent.png", "green.png"]})
    manifest = manifest_of(tmp_path, table)
    spec = ScanSpec(
        output=str(tmp_path / "out"),
        plan=plan_at(tmp_path / "out", manifest),
        bundle_url=str(overflowing_bundle),
        bundle_sha256="",
        decode="exact",
        path_column=manifest.path_column,
        root=manifest.root,
        batch_size=2,
        max_pixels=100_000_000,
        io_concurrency=4,
        storage=StorageConfig(),
        session="a-test",
        crash_retries=1,
    )
    rows = scan_chunk(spec, classifier, table, ChunkTask(0), StageTimings()).to_pylist()
    assert [row["status"] for row in rows] == ["ok", "not_finite", "missing", "ok"]
    assert [row["embedding"] is None for row in rows] == [False, True, True, False]
    assert "outputs NaN or infinity for this image in fp32" in rows[1]["error"]


def test_features_and_columns_have_the_same_names() -> None:
    names = {field.name for field in scan_schema(None)} - {"row", "status", "error", "bytes"}
    assert names == set(ImageFeatures.__dataclass_fields__)
