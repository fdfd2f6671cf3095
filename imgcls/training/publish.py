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
from imgcls.models.bundle import DESCRIPTION, BundleSpec, save_bundle
from imgcls.training.epoch_metrics import Epoch
from imgcls.training.model_card import model_card
from imgcls.training.plots import curves

HISTORY = "history.parquet"
VALIDATION = "validation.parquet"


def publish(
    url: str,
    spec: BundleSpec,
    state: Mapping[str, torch.Tensor],
    history: Sequence[Epoch],
    best: Epoch,
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
    files = {HISTORY: sink.getvalue(), VALIDATION: held_out.getvalue()}
    files |= {f"plots/{name}": data for name, data in curves(table, best.epoch).items()}
    filesystem.remove(filesystem.join(url, DESCRIPTION))
    for name, data in files.items():
        filesystem.write(filesystem.join(url, name), data)
    plots = ["plots/curves.png", samples]
    card = model_card(
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
