"""Settings and metrics of a run, and a run that ends in an error, shared by the logger tests."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from imgcls.training.config import TrackConfig
from imgcls.training.loggers.base import open_loggers

SETTINGS = {"model": {"name": "resnet18", "options": {}}, "epochs": 5, "classes": ["a", "b"]}


def values(number: int) -> dict[str, float]:
    return {
        "train_loss": 1 / (number + 1),
        "val_loss": 2 / (number + 1),
        "val_accuracy": 0.5,
        "lr": math.nan if number == 0 else 1e-3,
        "images_per_second": 100.0,
        "wait_seconds": 1.5,
    }


def log_interrupted_run(
    config: TrackConfig,
    output: Path,
    numbers: Sequence[int],
    *,
    error: BaseException,
    settings: Mapping[str, Any] = SETTINGS,
    state: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A training that ends in an error after some epochs; returns the state that was kept."""
    kept: dict[str, Any] = {}

    def train() -> None:
        with open_loggers(config, str(output), state) as loggers:
            loggers.start(settings, first=numbers[0])
            for number in numbers:
                loggers.log_epoch(number, values(number))
            kept.update(json.loads(json.dumps(loggers.state)))
            raise error

    with pytest.raises(type(error)) as caught:
        train()
    assert caught.value is error
    return kept
