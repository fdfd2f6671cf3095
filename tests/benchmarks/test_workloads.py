"""The bundle of the benchmarks: its network gives each known image a class of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import peer_jobs, peers
from benchmarks.workloads import make_bundle


def test_a_bundle_recognizes_its_images_and_peers_have_its_weights(tmp_path: Path) -> None:
    import torch

    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for index in range(5):
        small = rng.integers(0, 256, (4, 6, 3), np.uint8)
        image = Image.fromarray(small).resize((300, 260), Image.Resampling.BICUBIC)
        image.save(tmp_path / "images" / f"{index}.png")
    bundle = make_bundle(tmp_path, "resnet18", tmp_path / "images")
    job = peer_jobs.read_job(bundle, Path(), Path(), "fp32", tuned=True)
    load, transform = peers.loader(job)
    images = [transform(load(str(tmp_path / "images" / f"{index}.png"))) for index in range(5)]
    assert peers.network(job)(torch.stack(images)).tolist() == [0, 1, 2, 3, 4]
