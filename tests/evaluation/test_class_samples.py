"""Samples of each predicted class: size, repeatability, parts in any order."""

from __future__ import annotations

import numpy as np

from imgcls.evaluation.class_samples import ClassSamples, list_frequent_classes


def sample(label: np.ndarray, parts: list[np.ndarray]) -> ClassSamples:
    """The sample of rows that are added part by part, and merged from two samples."""
    first, second = ClassSamples(8, 5), ClassSamples(8, 5)
    for number, rows in enumerate(parts):
        (first, second)[number % 2].add(label[rows], rows // 1000, rows % 1000)
    first.merge(second)
    return first


def test_the_sample_does_not_depend_on_how_the_rows_are_split() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 7, 4000)  # no row of class 7
    whole = sample(label, [np.arange(4000)])
    assert np.bincount(whole.label, minlength=8).tolist() == [5] * 7 + [0]
    places = 1000 * whole.file + whole.position
    assert (label[places] == whole.label).all()
    assert len(np.unique(places)) == 35
    assert len(np.unique(whole.file)) == 4  # not only the first rows
    order = rng.permutation(4000)
    parts = sample(label, np.array_split(order, 9))
    assert (1000 * parts.file + parts.position).tolist() == places.tolist()


def test_classes_are_selected_in_order() -> None:
    label = np.repeat(np.arange(8), 3)
    found = sample(label, [np.arange(24)]).select(np.array([6, 2]))
    assert found.label.tolist() == [6, 6, 6, 2, 2, 2]
    assert sorted(found.position.tolist()) == [6, 7, 8, 18, 19, 20]


def test_the_most_frequent_classes_come_first() -> None:
    assert list_frequent_classes(np.array([3, 0, 9, 3])).tolist() == [2, 0, 3]
    assert len(list_frequent_classes(np.arange(100))) == 30
