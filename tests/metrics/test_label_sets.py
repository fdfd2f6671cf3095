"""Coverage and size of label sets, against counting row by row."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from imgcls.metrics import PredictionCounts, tables
from imgcls.metrics.label_sets import SetCounts, build_set_columns, estimate_mean_size

CLASSES = ["ant", "bee", "cat"]


def draw(rows: int, seed: int = 0) -> tuple[list[list[str] | None], np.ndarray]:
    rng = np.random.default_rng(seed)
    sets: list[list[str] | None] = [
        [CLASSES[i] for i in rng.permutation(3)[: rng.integers(1, 4)]] for _ in range(rows)
    ]
    for row in range(0, rows, 11):
        sets[row] = None
    return sets, rng.integers(-2, 3, rows)


def test_counts_are_those_of_every_row() -> None:
    sets, label = draw(500)
    parts = [pa.array(sets[:123], pa.list_(pa.string())), pa.array(sets[123:])]
    counts = SetCounts.from_column(pa.chunked_array(parts), label, CLASSES)
    known = [(s, int(c)) for s, c in zip(sets, label, strict=True) if s is not None and c >= 0]
    for code, name in enumerate(CLASSES):
        own = [s for s, c in known if c == code]
        assert counts.labeled[code] == len(own)
        assert counts.covered[code] == sum(name in s for s in own)
        assert counts.size_sum[code] == sum(map(len, own))
    sizes = [len(s) for s in sets if s is not None]
    assert counts.sizes.tolist() == [sizes.count(n) for n in range(4)]
    halves = [
        SetCounts.from_column(
            pa.chunked_array([pa.array(sets[half], pa.list_(pa.string()))]), label[half], CLASSES
        )
        for half in (slice(0, 200), slice(200, None))
    ]
    total = halves[0] + halves[1] + SetCounts.empty(CLASSES)
    for name in ("labeled", "covered", "size_sum", "sizes"):
        assert getattr(total, name).tolist() == getattr(counts, name).tolist()
    mean, (low, high) = estimate_mean_size(counts) or (0, (0, 0))
    assert mean == pytest.approx(np.mean(sizes))
    assert low < mean < high


def test_the_metrics_of_a_run_have_them() -> None:
    sets = SetCounts.from_column(
        pa.chunked_array([[["ant"], ["bee", "ant"], ["cat", "bee"]]]), np.array([0, 0, 0]), CLASSES
    )
    metrics = {
        m.name: m.value
        for m in tables.compute_metrics(PredictionCounts.empty(CLASSES), top_k=1, sets=sets)
    }
    assert metrics["set_coverage"] == pytest.approx(2 / 3)
    assert metrics["mean_set_size"] == pytest.approx(5 / 3)
    assert metrics["single_label_sets"] == pytest.approx(1 / 3)
    columns = build_set_columns(sets)
    assert columns["set_coverage"].to_pylist() == [pytest.approx(2 / 3), None, None]
    assert columns["mean_set_size"].to_pylist() == [pytest.approx(5 / 3), None, None]
    assert estimate_mean_size(SetCounts.empty(CLASSES)) is None


def test_a_set_larger_than_the_classes_is_refused() -> None:
    column = pa.chunked_array([[["ant", "bee", "cat", "dog"]]])
    with pytest.raises(ValueError, match="has 4 labels of 3 classes"):
        SetCounts.from_column(column, np.array([0]), CLASSES)
