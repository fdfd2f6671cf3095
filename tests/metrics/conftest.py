"""Random tables of predictions with the columns of `imgcls predict`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

MakePredictions = Callable[..., pa.Table]


def _make_predictions(
    rows: int,
    classes: list[str],
    *,
    seed: int = 0,
    failed: float = 0.0,
    unlabeled: float = 0.0,
    unknown: float = 0.0,
    occurring: list[str] | None = None,
    skill: float = 1.0,
) -> pa.Table:
    """A table of `rows` predictions over `classes`, of which only `occurring` are true labels.

    failed, unlabeled, unknown: the chance of a row to be so
    skill: how much the score of the true class is raised; 0 guesses
    """
    rng = np.random.default_rng(seed)
    true = rng.choice([classes.index(name) for name in occurring or classes], rows)
    logits = rng.normal(size=(rows, len(classes)))
    logits[np.arange(rows), true] += skill
    scores = np.exp(logits)
    scores /= scores.sum(axis=1, keepdims=True)
    predicted, confidence = scores.argmax(axis=1), scores.max(axis=1)
    label_score = scores[np.arange(rows), true]
    label_rank = 1 + (scores > label_score[:, None]).sum(axis=1)

    fails = rng.random(rows) < failed
    no_label = rng.random(rows) < unlabeled
    foreign = rng.random(rows) < unknown
    label = np.array(classes, dtype=object)[true]
    label[foreign] = "not a class"
    hidden = fails | no_label | foreign
    status = np.where(fails, rng.choice(["missing", "truncated"], rows), "ok")
    return pa.table(
        {
            "label": pa.array(label, pa.string(), mask=no_label),
            "predicted_label": pa.array(
                np.array(classes, dtype=object)[predicted], pa.string(), mask=fails
            ),
            "confidence": pa.array(confidence.astype(np.float32), mask=fails),
            "accepted": pa.array(confidence >= 0.5, mask=fails),
            "label_score": pa.array(label_score.astype(np.float32), mask=hidden),
            "label_rank": pa.array(label_rank.astype(np.int32), mask=hidden),
            "status": pa.array(status, pa.string()).dictionary_encode(),
        }
    )


@pytest.fixture(scope="session")
def make_predictions() -> MakePredictions:
    return _make_predictions
