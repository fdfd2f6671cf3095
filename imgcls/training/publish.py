"""From the best checkpoint to a bundle."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd
import ray.train
from safetensors.torch import load_file

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
