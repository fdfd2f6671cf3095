"""How the result of a training is shown in a console and in a notebook."""

from __future__ import annotations

import base64
import math
import re
from dataclasses import replace

from imgcls.training.epoch_metrics import EpochMetrics
from imgcls.training.result import TrainResult

EPOCHS = [
    EpochMetrics(n, 0.4 / n, 0.9, 1.0 / n, 0.5 + n / 100, 1e-3, 1.0, 1.0, 100, 10, 0.25)
    for n in (1, 2, 3)
]
RESULT = TrainResult("s3://b/<bundle>", EPOCHS, EPOCHS[1], 2)


def pictures(text: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", text)]


def test_a_result_is_short_in_a_console() -> None:
    assert repr(RESULT) == (
        "TrainResult(bundle='s3://b/<bundle>', epochs=3, best='epoch 2', val_accuracy=0.5200, "
        "val_loss=0.5000, failed=2)"
    )


def test_a_notebook_shows_the_best_epoch_and_the_curves() -> None:
    text = RESULT._repr_html_()
    assert "s3://b/&lt;bundle&gt;" in text
    assert "epoch 2 of 3" in text
    assert "52.00%" in text
    assert "25.00%" in text
    assert "0.5000" in text
    (picture,) = pictures(text)
    assert picture.startswith(b"\x89PNG")


def test_the_result_of_an_lr_range_test_shows_its_curve() -> None:
    curve = tuple((10 ** (n / 10 - 5), 2.0 - math.tanh(n / 10)) for n in range(30))
    result = TrainResult("out", [], None, 0, curve)
    assert repr(result) == "TrainResult(bundle='out', lr_curve=30 steps)"
    (picture,) = pictures(result._repr_html_())
    assert picture.startswith(b"\x89PNG")
    assert pictures(replace(result, lr_curve=())._repr_html_()) == []


def test_the_result_of_a_multilabel_model_shows_its_map() -> None:
    epochs = [
        replace(epoch, val_mean_average_precision=0.6 + epoch.epoch / 100) for epoch in EPOCHS
    ]
    result = TrainResult("out", epochs, epochs[1], 0)
    assert repr(result) == (
        "TrainResult(bundle='out', epochs=3, best='epoch 2', val_mean_average_precision=0.6200, "
        "val_loss=0.5000, failed=0)"
    )
    text = result._repr_html_()
    for shown in ("validation mAP", "62.00%", "correct decisions", "52.00%"):
        assert shown in text
    assert "validation accuracy" not in text
