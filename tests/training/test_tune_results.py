"""What a trial reports to Ray Tune, and the table of all trials."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from imgcls.config import build
from imgcls.training import tune
from imgcls.training.epoch_metrics import EpochMetrics, SelectionMetric
from imgcls.training.search_space import TuneConfig


def config_of(tmp_path: Path, best_by: str) -> TuneConfig:
    space = {"optim.lr": {"choice": [0.1, 0.2]}}
    settings = {"data": "x", "output": str(tmp_path), "best_by": best_by, "tune": {"space": space}}
    return build(TuneConfig, settings)


def record(by: SelectionMetric, means: list[float | None]) -> dict[str, Any]:
    trial: Any = SimpleNamespace(_best=None, _metric=by, _started_at=0.0)
    for number, mean in enumerate(means, 1):
        epoch = EpochMetrics(number, 0.4, 0.9, 1.0, 0.5, 1e-3, 1.0, 1.0, 100, 10)
        epoch = EpochMetrics(**{**vars(epoch), "val_mean_average_precision": mean})
        found = tune.Trial._record_epoch(trial, epoch)
    return found


def test_a_trial_reports_the_map_of_its_best_epoch() -> None:
    by: SelectionMetric = "val_mean_average_precision"
    found = record(by, [0.5, 0.7, 0.6])
    assert (found[by], found["best_epoch"], found["epoch"]) == (0.7, 2, 3)
    assert by not in record("val_accuracy", [None])


@pytest.mark.parametrize("is_multilabel", [True, False])
def test_the_table_has_map_for_multilabel_only(tmp_path: Path, is_multilabel: bool) -> None:
    by = "val_mean_average_precision" if is_multilabel else "val_accuracy"
    grid = [
        SimpleNamespace(
            metrics={"trial_id": str(value), by: value}, config={"optim.lr": value}, error=None
        )
        for value in (0.1, 0.2)
    ]
    table = tune._build_table(config_of(tmp_path, by), grid)
    assert table["optim.lr"].tolist() == [0.2, 0.1]
    assert ("val_mean_average_precision" in table) == is_multilabel
