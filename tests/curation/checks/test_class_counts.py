"""Counts of classes and pairs, and classes that a model may not learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from imgcls.curation.checks import class_counts
from imgcls.curation.checks.class_counts import count_classes, summarize_classes
from imgcls.data.manifests.label_columns import NEGATIVE, POSITIVE

matrices = st_numpy.arrays(
    np.int8, st.tuples(st.integers(0, 12), st.integers(1, 5)), elements=st.integers(-1, 1)
)


@given(matrices)
def test_each_label_is_counted_once(targets: np.ndarray) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_counts, "_BLOCK_ROWS", 3)
        counts = count_classes(targets, [f"c{i}" for i in range(targets.shape[1])])
    for one in range(targets.shape[1]):
        column = targets[:, one]
        total = counts.positives[one] + counts.negatives[one] + counts.unknown[one]
        assert total == len(targets)
        assert counts.positives[one] == np.count_nonzero(column == POSITIVE)
        for other in range(targets.shape[1]):
            both = (column == POSITIVE) & (targets[:, other] == POSITIVE)
            only = (column == POSITIVE) & (targets[:, other] == NEGATIVE)
            assert counts.together[one, other] == both.sum()
            assert counts.excluded[one, other] == only.sum()


def find_issues(targets: list[list[int]], min_positives: int = 1) -> list[tuple[str, str]]:
    array = np.array(targets, np.int8)
    counts = count_classes(array, [f"c{i}" for i in range(array.shape[1])])
    return [(each.name, each.issue) for each in counts.find_issues(min_positives)]


def test_a_class_that_is_only_positive_or_unknown_has_no_negatives() -> None:
    assert find_issues([[1, 0], [1, 1], [-1, 0]]) == [("c0", "no-negatives")]


def test_a_class_is_together_with_another_unless_an_image_has_it_alone() -> None:
    assert find_issues([[1, 1], [1, 0], [0, 0]]) == [("c1", "always-together")]
    assert find_issues([[1, 1], [1, 0], [0, 1]]) == []
    # unknown is no evidence that the class occurs alone
    assert find_issues([[1, 1], [-1, 1], [1, 0], [0, 0]]) == [("c1", "always-together")]
    assert find_issues([[0, 1], [1, -1], [0, 0]]) == []


def test_classes_with_few_positives_are_not_compared() -> None:
    assert find_issues([[1, 1], [1, 0], [1, 0], [0, 0]], 2) == [("c1", "few-positives")]
    assert find_issues([[0, 1], [0, 0]], 0) == []


def test_pairs_of_the_most_frequent_classes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_counts, "_MAX_PAIRED", 2)
    targets = [[1, 1, 0, 1], [0, 1, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]]
    counts = count_classes(np.array(targets, np.int8), ["a", "b", "c", "d"])
    assert counts.list_top_pairs() == [{"classes": ["b", "d"], "images": 2, "jaccard": 2 / 3}]
    assert find_issues(targets) == [("c3", "always-together")]


def test_a_manifest_without_labels_has_a_summary() -> None:
    found = summarize_classes(np.full((3, 2), -1, np.int8), ["a", "b"], 10)
    assert found["unlabeled"] == 3
    assert found["labels_per_image"] == {"mean": None, "distribution": {}}
    assert summarize_classes(np.zeros((3, 0), np.int8), [], 10)["classes"] == {}
