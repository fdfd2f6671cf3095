"""The Python functions in a process with a running event loop, as in a notebook."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = """
import asyncio, sys
import imgcls

async def cell():
    result = imgcls.train(
        data=sys.argv[1],
        model={"name": "small_cnn", "options": {"width": 8}},
        output=sys.argv[2],
        epochs=2,
        batch_size=10,
        **{"optim.lr": 0.01},
    )
    print("epochs", [epoch.epoch for epoch in result.history])
    classifier = imgcls.Classifier.load(result.bundle)
    print("classes", classifier.classes)

asyncio.run(cell())
"""


@pytest.mark.slow
def test_training_works_in_a_notebook_without_a_cluster(
    tmp_path: Path, colors: Callable[[int], Path]
) -> None:
    bundle = tmp_path / "bundle"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(colors(40)), str(bundle)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"RAY_ADDRESS": "local"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "epochs [1, 2]" in done.stdout
    assert "classes ['blue', 'green', 'red']" in done.stdout
