"""Out-of-distribution scores: their formulas, extreme embeddings, and their use by bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import logsumexp

from imgcls.errors import BundleError
from imgcls.models.bundle import (
    OOD_FILE,
    Bundle,
    load_bundle,
    load_bundle_weights,
    load_ood_arrays,
    load_ood_detector,
    save_bundle,
)
from imgcls.models.classifier import Classifier
from imgcls.models.embeddings import normalize_embeddings
from imgcls.models.ood import OodDetector
from imgcls.models.single_label import SINGLE_LABEL


def build_knn(rows: int, width: int = 8, neighbors: int = 3) -> OodDetector:
    vectors = np.random.default_rng(0).normal(size=(rows, width))
    unit = normalize_embeddings(vectors).astype(np.float16)
    return OodDetector("knn", {"references": unit}, neighbors)


def test_knn_is_the_distance_to_the_kth_nearest_reference() -> None:
    detector = build_knn(50)
    queries = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32) * 7
    references = detector.arrays["references"].astype(np.float64)
    unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    expected = np.sort(1 - unit @ references.T, axis=1)[:, 2]
    assert detector.compute_scores(queries) == pytest.approx(expected, abs=1e-5)
    # in any batches, and as often as asked
    parts = [detector.compute_scores(queries[i : i + 1]) for i in range(20)]
    assert np.concatenate(parts) == pytest.approx(expected, abs=1e-5)
    assert len(detector.compute_scores(queries[:0])) == 0


def test_energy_is_minus_the_log_sum_of_the_logits() -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(5, 8)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    queries = rng.normal(size=(20, 8)).astype(np.float32) * 30
    found = OodDetector("energy", {"weight": weight, "bias": bias}, 1).compute_scores(queries)
    expected = -logsumexp(queries.astype(np.float64) @ weight.T + bias, axis=1)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("method", ["knn", "energy", "joint_energy"])
def test_long_embeddings_in_float16_have_the_scores_of_float32(method: Any) -> None:
    detector = build_knn(50)
    if method != "knn":
        rng = np.random.default_rng(0)
        arrays = {"weight": rng.normal(size=(2, 8)), "bias": np.zeros(2, np.float32)}
        detector = OodDetector(method, arrays, 1)
    queries = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float16) * 300
    found = detector.compute_scores(queries)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, detector.compute_scores(queries.astype(np.float32)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("method", ["knn", "energy", "joint_energy"])
def test_an_embedding_that_is_not_finite_is_out_of_distribution(method: Any, value: float) -> None:
    detector = build_knn(50)
    if method != "knn":
        arrays = {"weight": np.ones((2, 8), np.float32), "bias": np.zeros(2, np.float32)}
        detector = OodDetector(method, arrays, 1)
    queries = np.ones((2, 8), np.float32)
    queries[0] = value
    detector.max_score = 10.0
    found = detector.classify(queries)
    assert found.values[0] == np.inf
    assert found.is_ood.tolist() == [True, False]
    assert np.isfinite(found.values[1])


def with_detector(color_bundle: Path, folder: Path, max_score: float) -> Bundle:
    """The bundle with a detector of random references."""
    plain = load_bundle(str(color_bundle))
    detector = build_knn(20, Classifier(plain, device="cpu").embedding_width)
    return save_bundle(
        str(folder),
        plain.spec.model_copy(update={"ood": detector.describe(max_score, 0.05)}),
        load_bundle_weights(plain),
        ood_arrays=detector.serialize(),
    )


def save_and_load(made: Bundle, detector: OodDetector, folder: Path) -> Bundle:
    spec = made.spec.model_copy(update={"ood": detector.describe(0.5, 0.05)})
    arrays = detector.serialize()
    save_bundle(str(folder), spec, load_bundle_weights(made), ood_arrays=arrays)
    return load_bundle(str(folder))


def test_a_bundle_keeps_its_detector_and_verifies_it(color_bundle: Path, tmp_path: Path) -> None:
    made = with_detector(color_bundle, tmp_path / "bundle", 0.5)
    detector = load_ood_detector(load_bundle(made.url))
    assert detector is not None
    assert made.spec.ood is not None
    assert (detector.method, detector.neighbors, made.spec.ood.max_rate) == ("knn", 3, 0.05)
    width = detector.arrays["references"].shape[1]
    assert (
        detector.arrays["references"].tobytes()
        == build_knn(20, width).arrays["references"].tobytes()
    )
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert (
        "Out-of-distribution detector (knn): flags 5.0% of images like the held-out ones." in card
    )
    with pytest.raises(BundleError, match="lacks the OOD detector"):
        save_bundle(str(tmp_path / "other"), made.spec, load_bundle_weights(made))
    few = build_knn(2, width, neighbors=3)
    with pytest.raises(BundleError, match="has fewer than 3 reference embeddings"):
        save_and_load(made, few, tmp_path / "few")
    file = tmp_path / "bundle" / OOD_FILE
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    for load in (load_ood_arrays, lambda each: load_bundle(each.url)):
        with pytest.raises(BundleError, match=OOD_FILE):
            load(made)
    with pytest.raises(BundleError, match=OOD_FILE):
        Classifier(made, device="cpu")


def test_an_image_out_of_distribution_is_not_accepted(color_bundle: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), dtype=np.uint8)
    plain = Classifier.load(str(color_bundle), device="cpu").predict(list(pixels))
    assert {each.is_ood for each in plain} == {None}
    none = Classifier(with_detector(color_bundle, tmp_path / "none", 2.0), device="cpu")
    every = Classifier(with_detector(color_bundle, tmp_path / "all", -1.0), device="cpu")
    for usual, kept, flagged in zip(
        plain, none.predict(list(pixels)), every.predict(list(pixels)), strict=True
    ):
        assert (kept.label, kept.confidence) == (usual.label, usual.confidence)
        assert (flagged.label, flagged.confidence) == (usual.label, usual.confidence)
        assert (kept.accepted, kept.is_ood) == (usual.accepted, False)
        assert (flagged.accepted, flagged.is_ood) == (False, True)
        assert kept.ood_score == flagged.ood_score


def test_the_columns_are_after_the_others_and_change_only_accepted() -> None:
    scores = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
    found = build_knn(50).classify(np.ones((2, 8), np.float32))
    found.is_ood[1] = True
    columns = SINGLE_LABEL.build_columns(scores, ["a", "b"], [0.0, 0.0], top_k=1, ood=found)
    assert columns["accepted"].to_pylist() == [True, False]
    assert columns["is_ood"].to_pylist() == [False, True]
    fields = SINGLE_LABEL.build_fields(has_labels=False, has_ood=True)
    assert [field.name for field in fields] == list(columns)


def test_joint_energy_is_minus_the_sum_of_the_softplus_of_the_logits() -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(5, 8)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    queries = rng.normal(size=(20, 8)).astype(np.float32) * 30
    found = OodDetector("joint_energy", {"weight": weight, "bias": bias}, 1).compute_scores(queries)
    logits = queries.astype(np.float64) @ weight.T + bias
    expected = -np.logaddexp(0, logits).sum(axis=1)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_a_multilabel_image_out_of_distribution_keeps_its_labels(
    multilabel_bundle: Path, tmp_path: Path
) -> None:
    bundle = with_detector(multilabel_bundle, tmp_path / "all", -1.0)
    (found,) = Classifier(bundle, device="cpu").predict(np.zeros((1, 48, 64, 3), np.uint8))
    assert found.labels == ["red", "blue"]
    assert (found.accepted, found.is_ood) == (False, True)
