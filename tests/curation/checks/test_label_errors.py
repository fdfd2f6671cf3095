"""Label errors and outliers by embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from imgcls.curation.checks import label_errors
from imgcls.curation.checks.image_table import ImageTable
from imgcls.curation.checks.label_errors import _sample_per_class
from imgcls.curation.config import LabelErrorsConfig
from tests.curation.pictures import Row, clusters, images_of, indices_by_issue, jpeg, picture


def labeled(tmp_path: Path, vectors: np.ndarray, label: np.ndarray) -> ImageTable:
    data = jpeg(picture(0))
    rows: list[Row] = [(f"{i}.jpg", data, f"class {c}") for i, c in enumerate(label.tolist())]
    return images_of(tmp_path, rows, embeddings=vectors)


def test_flipped_labels_are_ranked_first(tmp_path: Path) -> None:
    vectors, label = clusters(0, 600)
    rng = np.random.default_rng(1)
    wrong = rng.choice(600, 30, replace=False)
    given = label.copy()
    given[wrong] = (label[wrong] + 1) % 3
    images = labeled(tmp_path, vectors, given)
    (finding, *_) = label_errors.find_label_issues(images, LabelErrorsConfig())
    assert finding.issue == "label-error"
    first = finding.indices[finding.sort_worst_first()][:60]
    assert len(set(first.tolist()) & set(wrong.tolist())) >= 27
    score = finding.score[finding.sort_worst_first()]
    assert (score[:-1] >= score[1:]).all()
    assert "looks like 'class " in finding.details[0]


def test_an_image_unlike_all_others_is_an_outlier(tmp_path: Path) -> None:
    vectors, label = clusters(0, 300)
    vectors[[7, 90]] = -20 * vectors[[7, 90]] + 50 * np.eye(32)[:2]
    found = indices_by_issue(
        label_errors.find_label_issues(labeled(tmp_path, vectors, label), LabelErrorsConfig())
    )
    assert {7, 90} <= set(found["outlier"])
    assert len(found["outlier"]) < 10


def test_without_a_model_no_label_issue_is_reported(tmp_path: Path) -> None:
    images = images_of(tmp_path, [("a.jpg", jpeg(picture(0)), "x"), ("b.jpg", b"", "y")])
    assert list(label_errors.find_label_issues(images, LabelErrorsConfig())) == []


def test_the_only_image_of_a_class_is_no_label_error(tmp_path: Path) -> None:
    vectors, label = clusters(0, 90)
    label = label.copy()
    label[5] = 3
    found = list(
        label_errors.find_label_issues(labeled(tmp_path, vectors, label), LabelErrorsConfig())
    )
    assert 5 not in found[0].indices


def test_small_classes_are_sampled_completely() -> None:
    label = np.repeat([0, 1, 2], [5000, 5000, 7])
    taken = _sample_per_class(np.arange(len(label)), label, 1000, np.random.default_rng(0))
    assert np.bincount(label[taken]).tolist() == [499, 499, 7]
    assert len(np.unique(taken)) == len(taken)
