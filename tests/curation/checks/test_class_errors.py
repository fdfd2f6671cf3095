"""Label errors of images with several classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from imgcls.curation.checks import class_errors, label_errors
from imgcls.curation.checks.findings import Finding
from imgcls.curation.checks.image_table import ImageTable
from imgcls.curation.config import LabelErrorsConfig
from imgcls.data.manifests.label_columns import NEGATIVE, POSITIVE, UNKNOWN
from tests.curation.pictures import Row, images_of, jpeg, picture

CLASSES = ("cat", "dog", "fox")


def sums_of_classes(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings that are the sum of a vector per class, and their targets."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((count, len(CLASSES))) < (0.5, 0.3, 0.1)).astype(np.int8)
    vectors = targets @ rng.standard_normal((len(CLASSES), 32)) * 2
    return vectors + rng.standard_normal((count, 32)) * 0.4, targets


def build_images(folder: Path, vectors: np.ndarray, targets: np.ndarray) -> ImageTable:
    data = jpeg(picture(0))
    rows: list[Row] = [(f"{i}.jpg", data, ";".join(CLASSES)) for i in range(len(targets))]
    images = images_of(folder, rows, embeddings=vectors, delimiter=";")
    assert images.classes == list(CLASSES)
    return replace(images, targets=targets)


def find_errors(images: ImageTable, **settings: float) -> Finding:
    (errors, outliers) = label_errors.find_label_issues(images, LabelErrorsConfig(**settings))
    assert (errors.issue, outliers.issue) == ("label-error", "outlier")
    return errors


def test_flipped_classes_are_ranked_first_and_named(tmp_path: Path) -> None:
    vectors, targets = sums_of_classes(0, 400)
    rng = np.random.default_rng(1)
    wrong = rng.choice(400, 16, replace=False)
    given = targets.copy()
    given[wrong, 1] = 1 - targets[wrong, 1]
    finding = find_errors(build_images(tmp_path, vectors, given))
    order = finding.sort_worst_first()
    assert len(set(wrong.tolist()) & set(finding.indices[order][:32].tolist())) >= 14
    details = dict(zip(finding.indices.tolist(), finding.details, strict=True))
    for row in sorted(set(wrong.tolist()) & set(details)):
        text = "labeled 'dog', does not look like it ("
        expected = text if given[row, 1] else "not labeled 'dog', looks like it ("
        assert expected in details[row]
    assert ((finding.score >= 0) & (finding.score <= 1)).all()


def test_unknown_classes_are_neither_fitted_nor_reported(tmp_path: Path) -> None:
    vectors, targets = sums_of_classes(0, 200)
    given = targets.copy()
    given[::2, 0] = 1 - given[::2, 0]  # half of the labels of this class are wrong
    given[::2, 0] = UNKNOWN
    given[:5] = UNKNOWN
    finding = find_errors(build_images(tmp_path, vectors, given))
    assert not set(finding.indices.tolist()) & set(range(5))
    unknown = [d for i, d in zip(finding.indices, finding.details, strict=True) if not i % 2]
    assert not any("'cat'" in detail for detail in unknown)
    scores = class_errors.predict_classes_out_of_fold(
        vectors.astype(np.float32), given, LabelErrorsConfig()
    )
    right = scores[:, 0][targets[:, 0] == POSITIVE].mean()
    assert right > 0.9 > 0.1 > scores[:, 0][targets[:, 0] == NEGATIVE].mean()


def test_classes_without_two_images_on_each_side_are_left_out(tmp_path: Path) -> None:
    vectors, targets = sums_of_classes(0, 60)
    targets[:, 0] = POSITIVE
    targets[:, 1] = NEGATIVE
    targets[0, 1] = POSITIVE
    targets[:, 2] = UNKNOWN
    assert not len(find_errors(build_images(tmp_path, vectors, targets)).indices)


def test_a_margin_leaves_fewer_errors(tmp_path: Path) -> None:
    vectors, targets = sums_of_classes(3, 200)
    targets[:10, 0] = 1 - targets[:10, 0]
    images = build_images(tmp_path, vectors, targets)
    every, some = find_errors(images), find_errors(images, min_margin=0.05)
    assert set(some.indices.tolist()) < set(every.indices.tolist())


def test_a_large_data_set_is_sampled_with_its_rare_classes(tmp_path: Path) -> None:
    targets = np.zeros((1000, 2), np.int8)
    targets[:500, 0] = POSITIVE
    targets[-4:, 1] = POSITIVE
    drawn = class_errors._sample(np.arange(1000), targets, 100, np.random.default_rng(0))
    assert 100 <= len(drawn) <= 104
    assert set(range(996, 1000)) <= set(drawn.tolist())
