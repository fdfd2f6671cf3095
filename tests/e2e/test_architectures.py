"""Unusual networks from training to prediction: two heads, attention, layer scale."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file

from imgcls.models.bundle import load_bundle
from tests.conftest import COLORS, draw, write_manifest
from tests.e2e.outputs import assert_exactly_once
from tests.processes import RayCluster, imgcls

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("name", "size"), [("inception_v3", 299), ("vit_b_16", 224), ("convnext_tiny", 224)]
)
def test_a_network_is_trained_and_predicts(
    cluster: RayCluster, tmp_path: Path, name: str, size: int
) -> None:
    for i in range(12):
        color = list(COLORS)[i % len(COLORS)]
        draw(color, (400, 320), seed=i).save(tmp_path / f"{i}.jpg")
    rows = [(f"{i}.jpg", list(COLORS)[i % len(COLORS)]) for i in range(12)]
    train = write_manifest(tmp_path / "train.csv", rows[:9], ("path", "label"))
    held = write_manifest(tmp_path / "held.csv", rows[9:], ("path", "label"))
    bundle, output = tmp_path / "bundle", tmp_path / "out"

    trained = imgcls(
        *("train", "--data.train", train, "--data.val", held, "--model.name", name),
        *("--epochs", 2, "--batch-size", 4, "--optim.lr", 1e-4, "--output", bundle),
        env=cluster.environment(),
        timeout=600,
    )
    assert trained.returncode == 0, trained.stderr
    history = pd.read_parquet(bundle / "history.parquet")
    assert history["epoch"].tolist() == [1, 2]
    assert history["train_loss"].iloc[1] < history["train_loss"].iloc[0]
    made = load_bundle(str(bundle))
    assert made.spec.preprocess.crop == size
    weights = load_file(bundle / "model.safetensors")
    has_aux = any(key.startswith("AuxLogits.") for key in weights)
    assert has_aux == (name == "inception_v3")

    predicted = imgcls(
        *("predict", "--manifest", held, "--model", bundle, "--output", output),
        env=cluster.environment(),
        timeout=300,
    )
    assert predicted.returncode == 0, predicted.stderr
    found = assert_exactly_once(output, 3)
    assert set(found["status"].to_pylist()) == {"ok"}
    metrics = json.loads((bundle / "bundle.json").read_text())["metrics"]
    right = sum(rank == 1 for rank in found["label_rank"].to_pylist())
    assert right / 3 == pytest.approx(metrics["val_accuracy"])
