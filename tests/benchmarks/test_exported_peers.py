"""Programs of exported networks: the pixels of torchvision's transforms, every row in its place."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from benchmarks import exported_peers
from benchmarks.peer_jobs import Job, read_job

PREPROCESS = {
    "resize": 36, "crop": 32, "interpolation": "bilinear", "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.25, 0.3],
}  # fmt: skip


def make_job(folder: Path, *, tuned: bool) -> Job:
    description = {"architecture": {"name": "resnet18"}, "preprocess": PREPROCESS}
    (folder / "bundle.json").write_text(json.dumps(description))
    return read_job(folder, folder / "manifest.csv", folder / "out.csv", "fp32", tuned=tuned)


@pytest.mark.parametrize("size", [(61, 47), (47, 61), (50, 50), (97, 40)])
def test_pixels_are_those_of_torchvision(size: tuple[int, int], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    found = exported_peers.load_pixels(make_job(tmp_path, tuned=False), str(tmp_path / "image.png"))
    expected = v2.Compose([v2.Resize(36), v2.CenterCrop(32)])(Image.fromarray(pixels))
    np.testing.assert_array_equal(found, np.asarray(expected))


def test_tuned_programs_read_large_jpegs_at_reduced_size(tmp_path: Path) -> None:
    smooth = np.linspace(0, 255, 400 * 300 * 3, dtype=np.uint8).reshape(300, 400, 3)
    Image.fromarray(smooth).save(tmp_path / "image.jpg")
    full, reduced = (
        exported_peers.load_pixels(
            make_job(tmp_path, tuned=tuned), str(tmp_path / "image.jpg")
        ).astype(int)
        for tuned in (False, True)
    )
    assert full.shape == reduced.shape == (32, 32, 3)
    assert 0 < np.abs(full - reduced).max() <= 16


def test_batches_hold_every_image_once() -> None:
    images = [np.full((2, 2, 3), i, np.uint8) for i in range(7)]
    batches = list(exported_peers.stack_batches(iter(images), 3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(batches), np.stack(images))


def test_each_row_has_the_label_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, tuned=True)
    files = [str(tmp_path / f"{shade}.png") for shade in range(0, 220, 10)]
    for shade, file in zip(range(0, 220, 10), files, strict=True):
        Image.new("RGB", (40, 40), (shade, shade, shade)).save(file)
    job.manifest.write_text("path\n" + "".join(f"{file}\n" for file in files))
    monkeypatch.setattr(
        exported_peers,
        "load_classifier",
        lambda engine, job, *, threads: lambda batch: batch[:, 0, 0, 0].astype(int),
    )
    monkeypatch.setattr(exported_peers, "CORES", 3)
    monkeypatch.setattr(multiprocessing, "Pool", ThreadPool)  # a fork of the tests may hang
    exported_peers.classify_by_cores(job, "onnxruntime")
    assert job.output.read_text().splitlines()[1:] == [
        f"{file},{shade}" for shade, file in zip(range(0, 220, 10), files, strict=True)
    ]


class Compiled:
    def get_property(self, name: str) -> Compiled:
        assert name == "INFERENCE_PRECISION_HINT"
        return self

    def to_string(self) -> str:
        return "bf16"


def raise_error(*_: object) -> None:
    raise RuntimeError("Supported primitive descriptors list is empty")


@pytest.mark.parametrize(
    ("compile_network", "expected"),
    [(lambda *_: Compiled(), "bf16"), (raise_error, "fp32")],
    ids=["runs", "fails"],
)
def test_a_default_precision_that_fails_means_fp32(
    compile_network: Callable[..., Compiled],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with ONEDNN_MAX_CPU_ISA=AVX2 on a CPU that has bf16."""
    make_job(tmp_path, tuned=False)
    monkeypatch.setattr(exported_peers, "_compile_for_throughput", compile_network)
    assert exported_peers.find_openvino_default(tmp_path) == expected
