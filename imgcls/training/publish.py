"""From the best weights to a bundle."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from imgcls.data import filesystem
from imgcls.models.bundle import BUNDLE_FILE, BundleSpec, save_bundle
from imgcls.training.epoch_metrics import EpochMetrics
from imgcls.training.model_card import build_model_card
from imgcls.training.plots import draw_curves

HISTORY_FILE = "history.parquet"
VALIDATION_FILE = "validation.parquet"


def publish_bundle(
    url: str,
    spec: BundleSpec,
    state: Mapping[str, torch.Tensor],
    history: Sequence[EpochMetrics],
    best: EpochMetrics,
    *,
    workers: str,
    seconds: float,
    class_rows: Mapping[str, tuple[int, int]],
    validation: pa.Table,
    samples: str,
) -> list[str]:
    """Write the bundle folder: history, curves, weights, model card, and `bundle.json` last.

    A bundle that was there ceases to be one before its first file changes.
    validation: the manifest of what the epochs were judged by, to label and calibrate on
    samples: the picture of augmented samples, which is there already, as a path below the bundle
    Returns the names of the files beside the bundle proper.
    """
    table = pd.DataFrame([asdict(epoch) for epoch in history])
    sink = io.BytesIO()
    table.to_parquet(sink, index=False)
    held_out = io.BytesIO()
    pq.write_table(validation, held_out)
    files = {HISTORY_FILE: sink.getvalue(), VALIDATION_FILE: held_out.getvalue()}
    files |= {f"plots/{name}": data for name, data in draw_curves(table, best.epoch).items()}
    filesystem.remove(filesystem.join(url, BUNDLE_FILE))
    for name, data in files.items():
        filesystem.write(filesystem.join(url, name), data)
    plots = ["plots/curves.png", samples]
    card = build_model_card(
        spec,
        table,
        best.epoch,
        parameters=sum(each.numel() for each in state.values()),
        workers=workers,
        seconds=seconds,
        class_rows=class_rows,
        plots=plots,
    )
    save_bundle(url, spec, state, card=card)
    return [*files, samples]
