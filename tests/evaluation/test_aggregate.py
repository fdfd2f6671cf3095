"""Aggregates of a table: the same for any partition and order."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgcls.errors import RequestError
from imgcls.evaluation import aggregate as aggregate_module
from imgcls.evaluation.aggregate import AggregateSpec, RunAggregate, TopRows
from tests.evaluation.runs import CLASSES, drawn

SPEC = AggregateSpec(CLASSES, "label", ("camera",), scores=True, gallery=7, issues=11)


def described(aggregate: RunAggregate) -> dict[str, Any]:
    """Contents of an aggregate, floats rounded."""
    assert aggregate.scores is not None
    return {
        "counts": rounded(aggregate.counts.to_dict()),
        "selective": aggregate.selective.counts.tolist(),
        "own": aggregate.scores.positive.tolist(),
        "other": aggregate.scores.negative.tolist(),
        "brier": round(aggregate.scores.brier_sum, 6),
        "own_score": np.round(aggregate.label_score_sum, 6).tolist(),
        "slices": {
            name: {value: rounded(c.to_dict()) for value, c in sorted(found.items())}
            for name, found in aggregate.slices.items()
        },
        "kept": [
            (kept.value.tolist(), kept.file.tolist(), kept.position.tolist())
            for kept in (aggregate.mistakes, aggregate.uncertain, aggregate.issues)
        ],
    }


def rounded(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return round(values, 6) if isinstance(values, float) else values


@settings(max_examples=30)
@given(
    cuts=st.lists(st.integers(0, 200), max_size=4),
    seed=st.integers(0, 50),
    order=st.randoms(use_true_random=False),
)
def test_any_partition_in_any_order_gives_the_same_aggregate(
    cuts: list[int], seed: int, order: Any
) -> None:
    table = drawn(200, seed, failed=0.1, unlabeled=0.1, unknown=0.1, sharpness=0.5)
    whole = RunAggregate(SPEC)
    whole.add(table, 0, 0)
    ends = [0, *sorted(cuts), 200]
    parts = []
    for start, end in itertools.pairwise(ends):
        part = RunAggregate(SPEC)
        part.add(table.slice(start, end - start), 0, start)
        parts.append(part)
    order.shuffle(parts)
    merged = RunAggregate(SPEC)
    for part in parts:
        merged.merge(part)
    assert described(merged) == described(whole)


def test_top_rows_have_the_highest_values_and_ties_go_to_the_first() -> None:
    top = TopRows(3)
    top.add(np.array([1.0, 5.0, 5.0]), np.array([0, 0, 0]), np.array([0, 1, 2]))
    top.add(np.array([5.0, 9.0]), np.array([1, 1]), np.array([0, 1]))
    assert list(zip(top.value, top.file, top.position, strict=True)) == [
        (9.0, 1, 1), (5.0, 0, 1), (5.0, 0, 2),
    ]  # fmt: skip


def test_labels_of_any_type_are_matched_by_their_text() -> None:
    table = drawn(60, classes=("0", "1", "2"), scores=False)
    numbers = pa.array([int(v) for v in table["label"].to_pylist()], pa.int64())
    index = table.schema.get_field_index("label")
    as_numbers = table.set_column(index, "label", numbers)
    found = []
    for each in (table, as_numbers):
        aggregate = RunAggregate(AggregateSpec(("0", "1", "2"), "label"))
        aggregate.add(each, 0, 0)
        found.append(aggregate.counts.to_dict())
    assert found[0] == found[1]


def test_a_column_with_too_many_values_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregate_module, "MAX_SLICES", 50)
    aggregate = RunAggregate(AggregateSpec(CLASSES, "label", ("path",)))
    with pytest.raises(
        RequestError, match=r"'path' has more than 50 values; slices are for groups"
    ):
        aggregate.add(drawn(100), 0, 0)


def test_predictions_of_other_classes_are_rejected() -> None:
    with pytest.raises(RequestError, match="come from another model"):
        RunAggregate(AggregateSpec(("ant", "bee"), "label")).add(drawn(50), 0, 0)
