"""Values by which rows are selected for labeling: how uncertain a model is about each.

Every function takes a table of a run's rows and returns one value per row, higher for rows that are
more useful to label; NaN where it is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from imgcls.metrics.columns import Floats, take_scores
from imgcls.models.bundle import TaskName


@dataclass(frozen=True)
class Measure:
    """A measure of uncertainty.

    compute: called with rows that are ok, and the thresholds of the classes
    columns: the columns that it needs
    remedy:  how to get them
    """

    compute: Callable[[pa.Table, Sequence[float]], Floats]
    columns: tuple[str, ...]
    remedy: str


def _read_scores(table: pa.Table) -> NDArray[np.float32]:
    scores = take_scores(table["scores"], np.arange(table.num_rows))
    return np.asarray(scores, np.float32)


def compute_margin(table: pa.Table, thresholds: Sequence[float]) -> Floats:
    """One minus the difference of the two best scores; NaN for a row with fewer than two.

    For multilabel, one minus the smallest distance of a score from the threshold of its class.
    Source: Scheffer, Decomain, Wrobel, "Active hidden Markov models for information extraction",
    2001.

    Examples
    --------
    >>> table = pa.table({"topk_scores": [[0.6, 0.3], [0.9, 0.1]]})
    >>> compute_margin(table, []).round(2).tolist()
    [0.7, 0.2]
    """
    if "topk_scores" not in table.schema.names:
        limits = np.minimum(np.asarray(thresholds, np.float32), 1)
        distance: Floats = np.abs(_read_scores(table) - limits).min(1).astype(np.float64)
        return 1 - distance
    lists = table["topk_scores"].combine_chunks()
    has_two = pc.fill_null(pc.greater_equal(pc.list_value_length(lists), 2), False)
    first, second = (
        pc.list_element(lists.filter(has_two), place).to_numpy(zero_copy_only=False)
        for place in (0, 1)
    )
    value: Floats = np.full(len(lists), np.nan)
    value[has_two.to_numpy(zero_copy_only=False)] = 1 - (first.astype(np.float64) - second)
    return value


def compute_entropy(table: pa.Table, thresholds: Sequence[float]) -> Floats:
    """Entropy of the scores of a row, in nats.

    Examples
    --------
    >>> scores = pa.FixedSizeListArray.from_arrays(pa.array([0.5, 0.5, 1.0, 0.0], pa.float32()), 2)
    >>> compute_entropy(pa.table({"scores": scores}), []).round(3).tolist()
    [0.693, 0.0]
    """
    scores = _read_scores(table).astype(np.float64)
    found: Floats = -_x_log_x(scores).sum(1)
    return found + 0.0


def compute_binary_entropy(table: pa.Table, thresholds: Sequence[float]) -> Floats:
    """Mean over classes of the entropy of each multilabel score, in nats.

    Examples
    --------
    >>> scores = pa.FixedSizeListArray.from_arrays(pa.array([0.5, 0.5, 1.0, 0.0], pa.float32()), 2)
    >>> compute_binary_entropy(pa.table({"scores": scores}), []).round(3).tolist()
    [0.693, 0.0]
    """
    scores = np.clip(_read_scores(table).astype(np.float64), 0, 1)
    found: Floats = -(_x_log_x(scores) + _x_log_x(1 - scores)).mean(1)
    return found + 0.0


def compute_ood(table: pa.Table, thresholds: Sequence[float]) -> Floats:
    """Out-of-distribution score: how unlike the training data an image is.

    Examples
    --------
    >>> compute_ood(pa.table({"ood_score": [0.5, None]}), []).tolist()
    [0.5, nan]
    """
    found: Floats = table["ood_score"].cast(pa.float64()).to_numpy().astype(np.float64)
    return found


def compute_disagreement(left: pa.Table, right: pa.Table) -> Floats:
    """Total variation distance of the scores of two models, or its mean over multilabel classes.

    left, right: the rows of both, with scores of the same classes in the same order
    Returns values from 0 (equal) to 1.

    Examples
    --------
    >>> scores = pa.FixedSizeListArray.from_arrays(pa.array([0.5, 0.5], pa.float32()), 2)
    >>> other = pa.FixedSizeListArray.from_arrays(pa.array([1.0, 0.0], pa.float32()), 2)
    >>> compute_disagreement(pa.table({"scores": scores}), pa.table({"scores": other})).tolist()
    [0.5]
    """
    one, other = (_read_scores(table).astype(np.float64) for table in (left, right))
    distance: Floats = np.abs(one - other).sum(1)
    return distance / (one.shape[1] if "predicted_labels" in left.schema.names else 2)


def _x_log_x(values: Floats) -> Floats:
    found: Floats = values * np.log(np.where(values > 0, values, 1.0))
    return found


_SCORES = "predict again with --scores"
MEASURES: Mapping[str, Mapping[TaskName, Measure]] = MappingProxyType(
    {
        "margin": {
            "single_label": Measure(
                compute_margin, ("topk_scores",), "predict again with --top-k 2 or more"
            ),
            "multilabel": Measure(compute_margin, ("scores",), _SCORES),
        },
        "entropy": {
            "single_label": Measure(compute_entropy, ("scores",), _SCORES),
            "multilabel": Measure(compute_binary_entropy, ("scores",), _SCORES),
        },
        "ood": {
            task: Measure(
                compute_ood,
                ("ood_score",),
                "predict with a bundle of `imgcls calibrate --max-ood-rate`",
            )
            for task in ("single_label", "multilabel")
        },
    }
)
