"""Limits of a machine, measured in bare processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import limits
from benchmarks.machine import CORES
from benchmarks.workloads import make_bundle, write_manifest
from tests.conftest import draw


@pytest.mark.slow
def test_a_process_that_fails_during_the_measurement_gives_no_rate(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    draw("red").save(images / "red.png")
    rows = CORES * limits.BATCH
    job = ("decode", make_bundle(tmp_path, "small_cnn"))
    manifest = write_manifest(tmp_path, images, rows)
    assert limits.measure(*job, manifest, "fp32", "torch") > 0
    with manifest.open("a") as stream:  # after the batch that warms up
        stream.write(f"{tmp_path / 'missing.png'}\n")
    with pytest.raises(RuntimeError, match="decode: a process has failed"):
        limits.measure(*job, manifest, "fp32", "torch")
