"""The description of a trained bundle."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from imgcls.models import zoo
from imgcls.training import publish
from imgcls.training.epoch_metrics import EpochMetrics


@pytest.mark.parametrize("mean", [0.75, math.nan])
def test_a_metric_that_is_nan_is_not_in_the_description(mean: float) -> None:
    """The mAP is NaN if no class has both positives and negatives; JSON has no NaN."""
    architecture = zoo.resolve_architecture("small_cnn", {"width": 8})
    setup: Any = SimpleNamespace(
        config=SimpleNamespace(dump_settings=dict, seed=0),
        examples=SimpleNamespace(
            targets=SimpleNamespace(task="multilabel"),
            teacher=None,
            classes=["cat", "dog"],
            sources={},
            count=lambda held: 10,
        ),
        architecture=architecture,
        preprocess=zoo.get_default_preprocess(architecture),
        identity={},
        strategy="scratch",
    )
    best = EpochMetrics(
        1, 0.4, 0.9, 1.0, 0.5, 1e-3, 1.0, 1.0, 100, 10, 0.25, val_mean_average_precision=mean
    )
    outcome: Any = SimpleNamespace(precision="fp32")
    spec = publish._build_spec(setup, outcome, "1 x (1 CPU)", best, (0, 0))
    assert (spec.task, spec.format_version, spec.threshold) == ("multilabel", 2, 0.5)
    assert spec.metrics["val_accuracy"] == 0.5
    assert spec.metrics.get("val_mean_average_precision") == (None if math.isnan(mean) else mean)
