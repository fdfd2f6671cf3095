"""Calibration of multilabel bundles: scores and thresholds that were put in are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from imgcls.errors import ConfigError, RequestError
from imgcls.evaluation.calibrate import calibrate
from imgcls.evaluation.config import CalibrateConfig
from imgcls.evaluation.f1_thresholds import compute_class_f1, find_best_threshold
from imgcls.evaluation.label_list_join import require_label_lists
from imgcls.evaluation.multilabel_calibration import (
    SCORE_GAPS,
    HeldOutCells,
    compute_logits,
    explain_undetermined_cells,
    fit_platt_scaling,
    fit_shared_temperature,
    load_held_out_cells,
)
from imgcls.models import zoo
from imgcls.models.acceptance import NEVER_ACCEPT
from imgcls.models.bundle import (
    Bundle,
    BundleSpec,
    Int8Calibration,
    load_bundle,
    load_bundle_weights,
    load_ood_detector,
    save_bundle,
)
from imgcls.models.classifier import Classifier
from imgcls.runs.committed import open_run
from tests.evaluation.drawn_cells import build_table, commit_multilabel, draw_cells
from tests.evaluation.runs import CLASSES, commit, drawn
from tests.evaluation.test_similar import add_embeddings


def held_out(
    rows: int, scale: Any = 1.0, bias: Any = 0.0, *, seed: int = 0, unknown: float = 0.0
) -> HeldOutCells:
    """Labels of calibrated logits, stored as other logits."""
    logits, targets = draw_cells(rows, seed, unknown=unknown)
    stored = (logits - np.asarray(bias)) / np.asarray(scale)
    return HeldOutCells(stored.T.astype(np.float32), np.ascontiguousarray(targets.T))


def load_cells(run: Path) -> HeldOutCells:
    opened = open_run(str(run))
    return load_held_out_cells(opened, *require_label_lists(opened, None, None))


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_was_put_in_is_found(temperature: float) -> None:
    cells = held_out(8_000, 1 / temperature, unknown=0.2)
    assert fit_shared_temperature(cells) == pytest.approx(temperature, rel=0.05)


def test_scale_and_bias_of_each_class_are_found_and_rare_classes_keep_the_shared_ones() -> None:
    scale, bias = np.array([0.5, 1, 2, 1, 1]), np.array([2.0, 0, -1, 0.5, -3])
    cells = held_out(20_000, scale, bias)
    rare = np.where(np.cumsum(cells.targets[4] == 1) > 9, 0, cells.targets[4])
    cells = HeldOutCells(cells.logits, np.concatenate([cells.targets[:4], rare[None]]))
    found_scale, found_bias = fit_platt_scaling(cells)
    assert found_bias is not None
    np.testing.assert_allclose(found_scale[:4], scale[:4], rtol=0.06)
    np.testing.assert_allclose(found_bias[:4], bias[:4], atol=0.12)
    assert found_scale[4] == pytest.approx(1 / fit_shared_temperature(cells))
    assert found_bias[4] == 0


def test_the_fit_of_a_class_is_that_of_scikit_learn() -> None:
    """For many rows, where neither the penalty nor Platt's smoothing matters."""
    from sklearn.linear_model import LogisticRegression

    cells = held_out(20_000, 0.7, 0.5)
    scale, bias = fit_platt_scaling(cells)
    assert bias is not None
    for c in range(len(CLASSES)):
        model = LogisticRegression(C=1e6).fit(cells.logits[c][:, None], cells.targets[c])
        assert scale[c] == pytest.approx(model.coef_[0, 0], abs=0.005)
        assert bias[c] == pytest.approx(model.intercept_[0], abs=0.01)


def test_a_class_whose_scores_fall_with_the_label_keeps_the_shared_scale() -> None:
    cells = held_out(4_000)
    turned = cells.logits.copy()
    turned[0] *= -1
    scale, bias = fit_platt_scaling(HeldOutCells(turned, cells.targets))
    assert bias is not None
    assert scale[0] > 0
    assert bias[0] == 0


def test_a_separable_class_gets_a_finite_scale() -> None:
    logits = np.linspace(-3, 3, 200, dtype=np.float32)[None].repeat(2, 0)
    targets = np.stack([logits[0] > 1, np.arange(200) % 2 == 0]).astype(np.int8)
    scale, bias = fit_platt_scaling(HeldOutCells(logits, targets))
    assert bias is not None
    assert 1 < scale[0] < 50
    assert -20 < bias[0] < 0


def test_labels_that_are_all_right_determine_no_temperature() -> None:
    logits = np.array([[2.0, -1, 3], [-2, -1, 1]], np.float32)
    cells = HeldOutCells(logits, np.array([[1, 0, 1], [0, 0, -1]], np.int8))
    assert "predicted correctly" in str(explain_undetermined_cells(cells))
    assert fit_shared_temperature(cells) == 1.0
    one_wrong = HeldOutCells(logits, np.array([[1, 0, 1], [0, 1, -1]], np.int8))
    assert explain_undetermined_cells(one_wrong) is None


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_scores_that_round_to_0_or_1_have_a_finite_logit(kind: str) -> None:
    scores = np.array([[0.0, 1.0, 0.5]], kind)
    logits = compute_logits(scores)
    assert np.isfinite(logits).all()
    assert logits[0, 2] == 0
    # the next score below 1 has a lower logit
    below = np.nextafter(scores.dtype.type(1), scores.dtype.type(0)).reshape(1, 1)
    assert logits[0, 1] == pytest.approx(-np.log(SCORE_GAPS[scores.dtype]))
    assert compute_logits(below)[0, 0] < logits[0, 1]


@pytest.mark.parametrize("seed", range(4))
def test_the_best_threshold_is_that_of_trying_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = (rng.integers(0, 20, 60) / 20).astype(np.float32)
    labels = rng.random(60) < scores
    labels[0] = True
    found = find_best_threshold(scores, labels)

    def compute_f1(threshold: float) -> float:
        return float(compute_class_f1(scores[None] >= threshold, labels[None].astype(np.int8))[0])

    best = max(compute_f1(t) for t in scores)
    assert compute_f1(found) == best
    # in the middle between two scores, and higher ones are worse
    lower, upper = scores[scores < found].max(initial=0), scores[scores >= found].min()
    assert found == pytest.approx((lower + upper) / 2)
    assert all(compute_f1(t) < best for t in scores[scores > upper])


def test_neighboring_scores_are_separated() -> None:
    low = np.float32(0.5)
    high = np.nextafter(low, np.float32(1))
    found = find_best_threshold(np.array([high, low]), np.array([True, False]))
    assert low < found <= high


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    architecture = zoo.resolve_architecture("small_cnn", {"width": 4})
    torch.manual_seed(0)
    spec = BundleSpec(
        format_version=2, task="multilabel", architecture=architecture, classes=list(CLASSES),
        preprocess=zoo.get_default_preprocess(architecture), threshold=0.3, temperature=2.0,
        int8=Int8Calibration(ranges={}, calibration_images=1, judged_images=1, agreement=1),
    )  # fmt: skip
    network = zoo.build_network(architecture, len(CLASSES))
    return save_bundle(str(tmp_path / "bundle"), spec, network.state_dict())


def overconfident(
    tmp_path: Path, bundle: Bundle, rows: int = 4_000, *, factor: float = 3.0, **changes: Any
) -> Path:
    logits, targets = draw_cells(rows, unknown=changes.pop("unknown", 0.0))
    table = build_table(factor * logits, targets, **changes)
    return commit_multilabel(tmp_path / "run", table, bundle_sha256=bundle.sha256, parts=2)


def request(bundle: Bundle, run: Path, **changes: Any) -> CalibrateConfig:
    settings = {"model": bundle.url, "predictions": str(run), "output": f"{bundle.url}-calibrated"}
    return CalibrateConfig.model_validate(settings | changes)


def compute_new_scores(old: Bundle, new: Bundle, logits: NDArray[Any]) -> NDArray[Any]:
    """Scores of a new bundle of an image whose logits in the old one are given."""
    assert old.spec.vector_scaling is None
    scaled = logits * (old.spec.temperature / new.spec.temperature)
    if new.spec.vector_scaling is not None:
        scaled = scaled * np.array(new.spec.vector_scaling.scale)
        scaled = scaled + np.array(new.spec.vector_scaling.bias)
    return np.asarray(1 / (1 + np.exp(-scaled)))


@pytest.mark.parametrize("method", ["temperature", "vector"])
@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_the_new_bundle_is_calibrated_and_its_classifier_applies_it(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, kind: str
) -> None:
    run = overconfident(tmp_path, bundle, kind=kind)
    result = calibrate(request(bundle, run, method=method))
    assert result.ece_after < 0.03 < 0.05 < result.ece_before
    spec = load_bundle(result.bundle.url).spec
    assert (spec.task, spec.threshold, spec.thresholds) == ("multilabel", 0.5, {})
    assert (spec.vector_scaling is None) == (method == "temperature")
    if method == "temperature":
        assert spec.temperature == pytest.approx(6.0, rel=0.05)
    record = spec.provenance["calibration"]
    assert (record["rows"], record["cells"]) == (4_000, 20_000)
    out = capsys.readouterr().out
    assert "held out   4,000 labeled rows, 20,000 known labels" in out
    assert "the old thresholds do not apply to the new scores and are now 0.5" in out
    batch = np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)
    before = Classifier(bundle, precision="fp32", device="cpu").classify(batch).scores
    after = Classifier(result.bundle, precision="fp32", device="cpu").classify(batch).scores
    expected = compute_new_scores(bundle, result.bundle, np.log(before / (1 - before)))
    np.testing.assert_allclose(after, expected, atol=2e-5)


def test_a_vector_scaled_bundle_is_scaled_again(bundle: Bundle, tmp_path: Path) -> None:
    first = calibrate(request(bundle, overconfident(tmp_path, bundle), method="vector")).bundle
    logits, targets = draw_cells(4_000, seed=3)
    table = build_table(logits - 1, targets)
    again = commit_multilabel(tmp_path / "again", table, bundle_sha256=first.sha256)
    second = calibrate(request(first, again, method="vector")).bundle
    assert first.spec.vector_scaling is not None
    assert second.spec.vector_scaling is not None
    change = np.array(second.spec.vector_scaling.bias) - np.array(first.spec.vector_scaling.bias)
    np.testing.assert_allclose(change, 1, atol=0.3)


def test_right_labels_leave_the_scores_and_thresholds_unchanged(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logits, _ = draw_cells(200)
    table = build_table(logits, (logits >= 0).astype(np.int8))
    run = commit_multilabel(tmp_path / "run", table, bundle_sha256=bundle.sha256)
    result = calibrate(request(bundle, run, method="vector"))
    spec = result.bundle.spec
    assert (spec.temperature, spec.vector_scaling, spec.threshold) == (2.0, None, 0.3)
    assert result.ece_after == result.ece_before
    assert "the scores are unchanged" in capsys.readouterr().out


def test_a_threshold_of_all_labels_reaches_its_precision(bundle: Bundle, tmp_path: Path) -> None:
    run = overconfident(tmp_path, bundle, unknown=0.1, listed=False)
    result = calibrate(request(bundle, run, target_precision=0.8))
    [chosen] = result.thresholds
    assert result.bundle.spec.threshold == chosen.threshold
    logits, targets = draw_cells(4_000, unknown=0.1)
    scores = compute_new_scores(bundle, result.bundle, 3 * logits)
    is_predicted = (scores >= chosen.threshold) & (targets >= 0)
    assert is_predicted.sum() == pytest.approx(chosen.support, abs=2)
    assert (targets[is_predicted] == 1).mean() == pytest.approx(chosen.precision, abs=2e-3)
    assert chosen.precision is not None
    assert 0.8 <= chosen.precision < 0.82
    # on new rows
    logits, targets = draw_cells(4_000, seed=9)
    new = compute_new_scores(bundle, result.bundle, 3 * logits) >= chosen.threshold
    assert targets[new].mean() == pytest.approx(0.8, abs=0.03)


def test_precise_thresholds_per_class_and_a_class_that_never_reaches_it(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logits, targets = draw_cells(4_000)
    targets[:, 4] = np.random.default_rng(0).random(4_000) < 0.05  # whatever its score
    run = commit_multilabel(
        tmp_path / "run", build_table(logits, targets), bundle_sha256=bundle.sha256
    )
    result = calibrate(request(bundle, run, target_precision=0.75, per_class=True, method="none"))
    spec = result.bundle.spec
    assert spec.thresholds["eel"] == NEVER_ACCEPT
    assert spec.temperature == 2.0
    assert "1 of 5 classes never reach the target (eel)" in capsys.readouterr().out
    for chosen in result.thresholds[:4]:
        c = CLASSES.index(str(chosen.label))
        called = 1 / (1 + np.exp(-logits[:, c])) >= np.float32(spec.thresholds[CLASSES[c]])
        assert targets[called, c].mean() == pytest.approx(chosen.precision, abs=1e-3)
        assert chosen.support >= 30


def test_the_best_f1_per_class(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logits, targets = draw_cells(4_000)
    rare = np.cumsum(targets[:, 4] == 1) <= 20
    targets[:, 4] *= rare
    run = commit_multilabel(
        tmp_path / "run", build_table(3 * logits - 4, targets), bundle_sha256=bundle.sha256
    )
    result = calibrate(request(bundle, run, best_f1=True, method="vector"))
    spec = result.bundle.spec
    assert set(spec.thresholds) == set(CLASSES[:4])
    assert result.thresholds[0].label is None
    assert spec.resolve_thresholds()[4] == spec.threshold == result.thresholds[0].threshold
    assert result.f1 is not None
    assert result.f1.before < result.f1.after
    out = capsys.readouterr().out
    assert f"macro F1   {result.f1.before:.4f} before, {result.f1.after:.4f} after" in out
    assert "1 of 5 classes have fewer than 30 images with the class (eel)" in out
    record = spec.provenance["calibration"]
    assert (record["best_f1"], record["f1_after"]) == (True, result.f1.after)
    # on new rows the F1 is the cross-fitted one
    logits, targets = draw_cells(20_000, seed=5)
    scores = compute_new_scores(bundle, result.bundle, 3 * logits - 4)
    is_predicted = scores >= np.array(spec.resolve_thresholds())
    f1 = compute_class_f1(is_predicted.T, np.ascontiguousarray(targets.T))
    assert f1[:4].mean() == pytest.approx(
        np.mean([result.f1.per_class[name] for name in CLASSES[:4]]), abs=0.02
    )


def test_the_best_f1_of_all_labels(bundle: Bundle, tmp_path: Path) -> None:
    run = overconfident(tmp_path, bundle)
    result = calibrate(request(bundle, run, best_f1=True, per_class=False))
    [chosen] = result.thresholds
    assert result.bundle.spec.thresholds == {}
    assert chosen.threshold == result.bundle.spec.threshold
    int8 = result.bundle.spec.int8
    assert int8 is not None
    assert "is not known since" in int8.describe_cost()
    logits, targets = draw_cells(4_000)
    scores = compute_new_scores(bundle, result.bundle, 3 * logits)

    def compute_micro_f1(threshold: float) -> float:
        called = scores >= threshold
        return float(2 * (called & (targets == 1)).sum() / (called.sum() + (targets == 1).sum()))

    assert chosen.threshold is not None
    best = max(compute_micro_f1(t) for t in np.linspace(0.02, 0.98, 97))
    assert compute_micro_f1(chosen.threshold) >= best - 1e-4


def test_a_plain_label_column_counts_as_one_label_per_image(bundle: Bundle, tmp_path: Path) -> None:
    logits, _ = draw_cells(50)
    names = pa.array([CLASSES[row % 5] if row % 10 else None for row in range(50)], pa.string())
    table = build_table(logits, None).append_column("kind", names)
    run = commit_multilabel(tmp_path / "run", table, label_column="kind")
    cells = load_cells(run)
    assert cells.rows == 45
    assert (cells.targets == 1).sum(0).tolist() == [1] * 45
    np.testing.assert_allclose(cells.logits[:, 0], logits[1], atol=1e-3)


def test_joined_labels_calibrate_as_those_of_the_run(bundle: Bundle, tmp_path: Path) -> None:
    logits, targets = draw_cells(600)
    table = build_table(3 * logits, targets)
    own = commit_multilabel(tmp_path / "own", table, bundle_sha256=bundle.sha256)
    pq.write_table(
        table.select(["path", "labels"]).take(list(range(599, -1, -1))), tmp_path / "l.parquet"
    )
    blind = table.drop_columns(["labels"])
    bare = commit_multilabel(tmp_path / "bare", blind, bundle_sha256=bundle.sha256)
    first = calibrate(request(bundle, own, output=str(tmp_path / "first")))
    labels = {"path": str(tmp_path / "l.parquet"), "column": "labels"}
    second = calibrate(request(bundle, bare, output=str(tmp_path / "second"), labels=labels))
    assert second.temperature == first.temperature
    assert second.ece_after == first.ece_after


def test_large_runs_are_subsampled(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = overconfident(tmp_path, bundle, 1_000, failed=0.1)
    every = load_cells(run)
    monkeypatch.setattr("imgcls.evaluation.multilabel_calibration.MAX_CELLS", 1_700)
    some = load_cells(run)
    assert np.array_equal(some.targets, every.targets[:, ::3])
    assert np.array_equal(some.logits, every.logits[:, ::3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coverage": 0.9}, "label sets are for one label per image"),
        ({"method": "none"}, "has no effect"),
        (
            {"target_precision": 1.0, "min_rows": 60},
            "reaches it with 60 predicted labels",
        ),
        ({"best_f1": True, "min_rows": 99_999}, "best_f1: needs 99,999 labels"),
    ],
)
def test_requests_that_cannot_be_done_are_refused(
    bundle: Bundle, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        calibrate(request(bundle, overconfident(tmp_path, bundle, 400), **changes))
    assert not Path(f"{bundle.url}-calibrated").exists()


def test_an_unlabeled_run_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    table = build_table(draw_cells(20).logits, None)
    run = commit_multilabel(tmp_path / "run", table, bundle_sha256=bundle.sha256)
    with pytest.raises(RequestError, match="has no labels; join some with --labels TABLE"):
        calibrate(request(bundle, run))


@pytest.mark.parametrize("method", ["knn", "energy"])
def test_a_detector_of_unknown_images_is_added(bundle: Bundle, tmp_path: Path, method: str) -> None:
    logits, targets = draw_cells(600)
    vectors = np.random.default_rng(2).normal(size=(600, 16)).astype(np.float16)
    table = add_embeddings(build_table(3 * logits, targets), vectors)
    run = commit_multilabel(tmp_path / "run", table, bundle_sha256=bundle.sha256)
    changes = {"max_ood_rate": 0.05, "ood_method": method, "method": "none"}
    made = calibrate(request(bundle, run, **changes)).bundle
    assert made.spec.threshold == 0.3
    detector = load_ood_detector(made)
    assert detector is not None
    is_ood = detector.classify(vectors.astype(np.float32)).is_ood
    assert is_ood.mean() == pytest.approx(0.05, abs=0.03)


def test_the_best_f1_of_a_bundle_with_one_label_per_image_is_refused(
    bundle: Bundle, tmp_path: Path
) -> None:
    spec = bundle.spec.model_copy(update={"task": "single_label", "format_version": 1})
    single = save_bundle(str(tmp_path / "single"), spec, load_bundle_weights(bundle))
    run = commit(tmp_path / "run", drawn(20), bundle_sha256=single.sha256)
    with pytest.raises(RequestError, match="best_f1: is for multilabel bundles"):
        calibrate(request(single, run, best_f1=True))


def test_two_ways_to_choose_thresholds_are_refused() -> None:
    from imgcls.config import build

    both = {"model": "b", "predictions": "p", "output": "o", "best_f1": True}
    with pytest.raises(ConfigError, match="best_f1: chooses the thresholds"):
        build(CalibrateConfig, both | {"target_precision": 0.9})
