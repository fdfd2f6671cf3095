"""Embeddings of a backbone without classes, then a head from them, then labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from imgcls.models import zoo
from imgcls.models.classifier import Classifier
from tests.e2e.outputs import assert_exactly_once, parquet, success, table
from tests.processes import run_here


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """A bundle without classes, made of weights with a head of five."""
    torch.manual_seed(0)
    network = zoo.build_network(zoo.resolve_architecture("small_cnn", {"width": 8}), 5)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    done = run_here(
        *("model", "import", "--arch", "small_cnn", "--options", "{width: 8}"),
        *("--weights", tmp_path / "weights.pth", "--output", tmp_path / "backbone"),
    )
    assert done.returncode == 0, done.stderr
    assert "a backbone, for `imgcls embed`" in done.stdout
    return tmp_path / "backbone"


def test_images_are_embedded_then_a_head_is_trained_and_labels_them(
    joined: None, colors: Callable[..., Path], backbone: Path, tmp_path: Path
) -> None:
    manifest, output = colors(60), tmp_path / "out"
    (tmp_path / "images" / "00007.jpg").write_bytes(b"no image")
    arguments = ("embed", manifest, "--model", backbone, "--output", output)
    done = run_here(*arguments, "--max-error-rate", 0.05, "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    found = assert_exactly_once(output, 60)
    assert found.schema.names == [
        *("path", "label", "camera", "row", "embedding", "width", "height", "status", "error")
    ]
    assert success(output)["status"] == {"not_an_image": 1, "ok": 59}
    assert found["embedding"].is_null().to_pylist() == [row == 7 for row in range(60)]
    assert pa.types.is_float16(found.schema.field("embedding").type.value_type)
    classifier = Classifier.load(str(backbone), precision="fp32", device="cpu")
    paths = [tmp_path / path for path in found["path"].to_pylist()[:5]]
    stored = np.array(found["embedding"].slice(0, 5).to_pylist(), np.float32)
    np.testing.assert_allclose(stored, classifier.embed(paths), rtol=2e-3, atol=1e-3)
    assert parquet(output / "metrics" / "errors.parquet")["row"].to_pylist() == [7]
    summary = parquet(output / "metrics" / "summary.parquet")["metric"].to_pylist()
    assert set(summary) == {"rows", "ok", "status_not_an_image", "error_rate"}

    again = run_here(*arguments, "--max-error-rate", 0.05, "--precision", "fp32")
    assert "committed before" in again.stdout
    compacted = run_here("history", "compact", output, "--output", tmp_path / "history")
    assert (compacted.returncode, compacted.stderr) == (0, "")
    for words in (
        ("evaluate", "--predictions", output),
        ("calibrate", "--model", backbone, "--predictions", output, "--output", tmp_path / "c"),
        ("compare", output, output),
        ("report", output),
        ("relabel", output, "--model", backbone, "--output", tmp_path / "relabeled"),
        ("predict", manifest, "--model", backbone, "--output", tmp_path / "predicted"),
    ):
        refused = run_here(*words)
        assert refused.returncode == 2, (words, refused.stdout)
        assert "embeddings alone" in refused.stderr or "has no classes" in refused.stderr

    head = tmp_path / "head"
    trained = run_here(
        *("train", manifest, "--data.embeddings", output, "--output", head),
        *("--data.max-error-rate", 0.05, "--data.val", manifest),
    )
    assert trained.returncode == 0, trained.stderr
    labeled = run_here(
        *("relabel", output, "--model", head, "--output", tmp_path / "labels", "--embeddings")
    )
    assert labeled.returncode == 0, labeled.stderr
    reported = run_here("report", tmp_path / "labels")
    assert reported.returncode == 0, reported.stderr
    report = (tmp_path / "labels" / "report.html").read_text()
    assert "Embeddings of 59 images in two principal components" in report
    assert 'id="gallery-cluster-1"' in report
    # the colors of the images show their classes
    ranks = table(tmp_path / "labels")["label_rank"].drop_null().to_numpy()
    assert (ranks == 1).mean() >= 0.95
    # the same labels as from the images
    predicted = run_here(
        *("predict", manifest, "--model", head, "--output", tmp_path / "predicted"),
        *("--max-error-rate", 0.05, "--precision", "fp32"),
    )
    assert predicted.returncode == 0, predicted.stderr
    names = [table(tmp_path / each)["predicted_label"] for each in ("labels", "predicted")]
    assert names[0].to_pylist() == names[1].to_pylist()
    # a run with predictions is not one of embeddings alone
    refused = run_here(
        *("embed", manifest, "--model", head, "--output", tmp_path / "predicted"),
        *("--max-error-rate", 0.05, "--precision", "fp32"),
    )
    assert refused.returncode == 2
    assert "has_predictions" in refused.stderr
    similar = run_here("similar", output, "--to", tmp_path / "images" / "00000.jpg", "--k", 1)
    assert "1  1.0000  images/00000.jpg" in similar.stdout, similar.stderr
