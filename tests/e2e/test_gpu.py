"""Commands on a machine with a GPU: every layout, a training, and workers whose GPU fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray
import torch

from imgcls.data.cuda import exit_on_device_failure
from imgcls.models.classifier import Classifier
from tests.conftest import COLORS, draw, write_manifest
from tests.e2e.outputs import assert_exactly_once
from tests.processes import RayCluster, imgcls

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

ROWS = 60


@pytest.fixture(scope="module")
def machine() -> Iterator[RayCluster]:
    """A node with four logical CPUs and one GPU."""
    with RayCluster.start(cpus=4, gpus=1) as running:
        yield running


def mixed_manifest(folder: Path) -> Path:
    """Images of several kinds and sizes, every tenth of them damaged, and one that is missing."""
    folder.mkdir(parents=True)
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("jpg", {}), ("jpg", {"progressive": True}), ("png", {}), ("jpg", {"subsampling": 0}),
        ("webp", {}), ("jpg", {"quality": 95}),
    ]  # fmt: skip
    rows = []
    for i in range(ROWS):
        kind, options = kinds[i % len(kinds)]
        label = list(COLORS)[i % len(COLORS)]
        file = folder / f"{i}.{kind}"
        draw(label, (160 + 7 * (i % 9), 120 + 5 * (i % 7)), seed=i).save(file, **options)
        if i % 10 == 9:
            file.write_bytes(file.read_bytes()[: 200 + 10 * i])
        rows.append((file.name, label))
    (folder / "0.jpg").unlink()
    return write_manifest(folder / "manifest.csv", rows, ("path", "label"))


def predict(
    cluster: RayCluster, manifest: Path, bundle: Path, output: Path, *more: object
) -> tuple[pa.Table, str]:
    done = imgcls(
        *("predict", "--manifest", manifest, "--model", bundle, "--output", output),
        *("--max-error-rate", 1, "--scores", "--chunk-rows", 16, "--decode", "fast"),
        *("--precision", "fp32", *more),
        env=cluster.environment(),
    )
    assert done.returncode == 0, done.stderr
    return assert_exactly_once(output, ROWS), done.stdout


@pytest.fixture(scope="module")
def on_cpus(
    machine: RayCluster, color_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, pa.Table]:
    """The manifest, and its table by the layout `cpu`."""
    folder = tmp_path_factory.mktemp("layouts")
    manifest = mixed_manifest(folder / "images")
    found, _ = predict(machine, manifest, color_bundle, folder / "cpu", "--scale.layout", "cpu")
    return manifest, found


@pytest.mark.parametrize(
    ("layout", "fraction"), [("gpu", 1), ("gpu_decode", 0), ("gpu_decode", 0.5), ("auto", None)]
)
def test_every_layout_writes_the_table_of_cpus(
    machine: RayCluster, color_bundle: Path, on_cpus: tuple[Path, pa.Table], tmp_path: Path,
    layout: str, fraction: float | None,
) -> None:  # fmt: skip
    manifest, expected = on_cpus
    more = () if fraction is None else ("--scale.cpu-decode-fraction", fraction)
    found, printed = predict(
        machine, manifest, color_bundle, tmp_path / "out", "--scale.layout", layout, *more
    )
    assert "1 model worker on GPUs" in printed
    for column in ("row", "path", "label", "status", "error", "width", "height"):
        assert found[column].to_pylist() == expected[column].to_pylist()
    assert len(set(found["status"].to_pylist())) >= 3
    # a GPU rounds scores differently, and nvJPEG and its resize round pixels differently
    atol = 0.03 if layout == "gpu_decode" else 1e-3
    pairs = zip(found["scores"].to_pylist(), expected["scores"].to_pylist(), strict=True)
    for row, (here, there) in enumerate(pairs):
        assert (here is None) == (there is None)
        if here is None:
            continue
        np.testing.assert_allclose(here, there, atol=atol)
        best, second = sorted(there, reverse=True)[:2]
        if best - second > 2 * atol:
            assert found["predicted_label"][row] == expected["predicted_label"][row]


def train(
    cluster: RayCluster, folder: Path, precision: str, *more: object
) -> tuple[pd.DataFrame, str]:
    rows = []
    (folder / "images").mkdir(parents=True)
    for i in range(120):
        label = list(COLORS)[i % len(COLORS)]
        draw(label, seed=i).save(folder / "images" / f"{i}.jpg")
        rows.append((f"images/{i}.jpg", label))
    manifest = write_manifest(folder / "train.csv", rows, ("path", "label"))
    done = imgcls(
        *("train", "--data.train", manifest, "--model.name", "small_cnn", "--epochs", 4),
        *("--batch-size", 24, "--precision", precision, "--output", folder / "bundle", *more),
        env=cluster.environment(),
    )
    assert done.returncode == 0, done.stderr
    return pd.read_parquet(folder / "bundle" / "history.parquet"), done.stdout


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_bundle_that_was_trained_on_a_gpu_works_on_a_cpu(
    machine: RayCluster, tmp_path: Path, precision: str
) -> None:
    history, printed = train(machine, tmp_path, precision, "--scale.use-gpu", "true")
    assert f"training: 1 worker on cuda, {precision}" in printed
    check_bundle(history, tmp_path)


def check_bundle(history: pd.DataFrame, folder: Path) -> None:
    assert history["epoch"].tolist() == [1, 2, 3, 4]
    assert history["val_accuracy"].max() > 0.9
    held = pd.read_parquet(folder / "bundle" / "validation.parquet")
    classifier = Classifier.load(str(folder / "bundle"), precision="fp32", device="cpu")
    found = [each.label for each in classifier.predict(held["path"].tolist())]
    assert np.mean(np.array(found) == held["label"].to_numpy()) > 0.9


def test_a_worker_whose_gpu_failed_is_replaced_by_one_that_works(
    machine: RayCluster, tmp_path: Path
) -> None:
    class Worker:
        """Fails once, as after an illegal access."""

        def run(self, marker: Path) -> tuple[int, float]:
            with exit_on_device_failure():
                values = torch.arange(4.0, device="cuda")
                if not marker.exists():
                    marker.touch()
                    values[torch.tensor([7], device="cuda")].sum()
                    torch.cuda.synchronize()
                return os.getpid(), float(values.sum())

        def pid(self) -> int:
            return os.getpid()

    with machine.joined():
        actor: Any = ray.remote(num_gpus=1, max_restarts=1, max_task_retries=1)(Worker)
        worker = actor.remote()
        first = ray.get(worker.pid.remote())
        pid, total = ray.get(worker.run.remote(tmp_path / "failed"))
        assert (tmp_path / "failed").exists()
        assert pid != first
        assert total == 6.0
        ray.kill(worker)
