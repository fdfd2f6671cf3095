"""From the best checkpoint to a bundle, with what is needed to make it again."""

from __future__ import annotations

import datetime
import io
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

import pandas as pd
import ray.train
from safetensors.torch import load_file

import imgcls
from imgcls.config import Section
from imgcls.data import storage
from imgcls.models.bundle import DESCRIPTION, WEIGHTS, Bundle, BundleSpec, save_bundle
from imgcls.training.progress import Epoch

HISTORY = "history.parquet"


def publish(
    url: str, spec: BundleSpec, checkpoint: ray.train.Checkpoint, history: Sequence[Epoch]
) -> Bundle:
    """Write the bundle folder: history, weights, model card, and `bundle.json` last.

    A bundle that was there ceases to be one before its first file changes.
    """
    with checkpoint.as_directory() as folder:
        state = load_file(os.path.join(folder, WEIGHTS))
    storage.remove(storage.join(url, DESCRIPTION))
    sink = io.BytesIO()
    pd.DataFrame([asdict(epoch) for epoch in history]).to_parquet(sink, index=False)
    storage.write(storage.join(url, HISTORY), sink.getvalue())
    return save_bundle(url, spec, state)


def provenance(config: Section, data: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """With which settings, from which data, by which code and when a bundle was made."""
    resolved = config.model_dump(mode="json")
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": resolved,
        "seed": resolved["seed"],
        "data": data,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "versions": {
            name: metadata.version(name)
            for name in ("imgcls", "ray", "torch", "torchvision", "pyarrow", "pillow")
        },
    }


def _git_commit() -> str | None:
    """The commit of the package's own checkout, `-dirty` when it was changed since."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(imgcls.__file__)))
    if not os.path.exists(os.path.join(root, ".git")):
        return None  # installed, or sent along with a job
    command = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
