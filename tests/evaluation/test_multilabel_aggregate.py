"""Aggregates of a multilabel table: the same for any partition and order."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from imgcls.data.manifests.label_columns import LabelColumns
from imgcls.evaluation.label_list_join import LabelReader
from imgcls.evaluation.multilabel_aggregate import (
    MultiLabelAggregate,
    MultiLabelSettings,
    TopCells,
)
from tests.evaluation.multilabel_runs import CLASSES, build_run_table, draw_scores, draw_targets
from tests.evaluation.test_aggregate import rounded

SETTINGS = MultiLabelSettings(
    CLASSES, LabelReader(LabelColumns("labels")), ("camera",), ood=True, gallery=7, cells=9
)


def describe(aggregate: MultiLabelAggregate) -> dict[str, Any]:
    """Contents of an aggregate, floats rounded."""
    assert aggregate.pairs is not None
    assert aggregate.ranking is not None
    return {
        "counts": rounded(aggregate.counts.to_dict()),
        "pairs": (aggregate.pairs.together.tolist(), aggregate.pairs.predicted.tolist()),
        "positive": aggregate.ranking.positive.tolist(),
        "negative": aggregate.ranking.negative.tolist(),
        "sums": np.round(aggregate.ranking.ranking_sums, 6).tolist(),
        "slices": {
            value: rounded(counts.to_dict())
            for value, counts in sorted(aggregate.slices["camera"].items())
        },
        "cells": [list_cells(top) for top in (aggregate.negatives, aggregate.positives)],
        "strangest": aggregate.strangest.position.tolist(),
    }


def list_cells(top: TopCells) -> list[tuple[Any, ...]]:
    fields = (top.label, top.value, top.file, top.position, top.is_predicted)
    return list(zip(*(field.tolist() for field in fields), strict=True))


@settings(max_examples=20, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 200), max_size=4),
    seed=st.integers(0, 20),
    order=st.randoms(use_true_random=False),
)
def test_any_partition_in_any_order_gives_the_same_aggregate(
    cuts: list[int], seed: int, order: Any
) -> None:
    targets = draw_targets(200, seed)
    # few different scores, so that many are equal
    scores = np.round(draw_scores(targets, seed), 1)
    table = build_run_table(targets, scores, failed=0.1, unlabeled=0.1, ood=True)
    whole = MultiLabelAggregate(SETTINGS)
    whole.add(table, 0, 0)
    parts = []
    for start, end in itertools.pairwise([0, *sorted(cuts), 200]):
        part = MultiLabelAggregate(SETTINGS)
        part.add(table.slice(start, end - start), 0, start)
        parts.append(part)
    order.shuffle(parts)
    merged = MultiLabelAggregate(SETTINGS)
    for part in parts:
        merged.merge(part)
    assert describe(merged) == describe(whole)
    assert whole.rows == 200


def test_the_cells_of_a_large_table_are_those_of_a_full_sort() -> None:
    targets = draw_targets(900)
    scores = np.round(draw_scores(targets), 1)
    aggregate = MultiLabelAggregate(SETTINGS)
    table = build_run_table(targets, scores, ood=True)
    for start, end in ((0, 100), (100, 450), (450, 900)):
        aggregate.add(table.slice(start, end - start), 0, start)
    for code in range(len(CLASSES)):
        for top, target, sign in ((aggregate.negatives, 0, -1), (aggregate.positives, 1, 1)):
            rows = np.flatnonzero(targets[:, code] == target)
            order = np.lexsort((rows, sign * scores[rows, code].astype(float)))
            assert top.position[top.label == code].tolist() == rows[order][:9].tolist()


def test_the_highest_cells_of_each_class_are_kept_and_ties_go_to_the_first_rows() -> None:
    top = TopCells(2, 2)
    files, predicted = np.zeros(5, np.int64), np.ones(5, bool)
    label, value = np.array([0, 1, 0, 0, 1]), np.array([5, 1, 9, 5, 7])
    top.add(label, value, files, np.arange(5), predicted)
    assert list_cells(top) == [(0, 9, 0, 2, True), (0, 5, 0, 0, True), (1, 7, 0, 4, True),
                               (1, 1, 0, 1, True)]  # fmt: skip
    # later rows need a higher value, earlier ones an equal one
    assert top.find_lowest(0, 5).tolist() == [6, 2]
    assert top.find_lowest(0, 0).tolist() == [5, 1]
