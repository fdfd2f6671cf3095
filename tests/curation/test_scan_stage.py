"""Scan of a chunk: one row of features for each image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from imgcls.curation.scan_stage import _EmbeddingBatcher, scan_chunk, scan_schema
from imgcls.curation.scan_worker import ScanSpec
from imgcls.data.decoding.image_features import ImageFeatures
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.execution.messages import ChunkTask, StageTimings
from imgcls.models.classifier import Classifier, Scores
from tests.conftest import draw
from tests.curation.pictures import jpeg, picture
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


class LargeEmbeddings:
    """A classifier whose embeddings are finite, but too large for float16."""

    preprocess = Preprocess()

    def classify(self, batch: Any, *, embeddings: bool) -> Scores:
        assert embeddings
        assert len(batch) == 2
        vectors = np.array([[0, 6e8, 8e8], [0, 0, -5]], np.float32)
        return Scores(np.ones((2, 1), np.float32), vectors)


def test_a_large_embedding_keeps_its_direction() -> None:
    classifier: Any = LargeEmbeddings()
    batcher = _EmbeddingBatcher(classifier, 2)
    for number in range(2):
        batcher.add(jpeg(picture(number)), 10**8)
    first, second = batcher.finish()
    np.testing.assert_allclose(first, [0, 0.6, 0.8], rtol=1e-3)
    np.testing.assert_array_equal(second, [0, 0, -1])


def test_features_and_columns_have_the_same_names() -> None:
    names = {field.name for field in scan_schema(None)} - {"row", "status", "error", "bytes"}
    assert names == set(ImageFeatures.__dataclass_fields__)
