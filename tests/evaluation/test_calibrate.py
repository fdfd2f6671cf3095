"""Calibration: fitted temperatures, thresholds that reach their target, bundles that apply them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from imgcls.errors import OutputError, RequestError
from imgcls.evaluation.calibrate import (
    HeldOutScores,
    calibrate,
    compute_confidences,
    explain_undetermined,
    fit_temperature,
    fit_vector_scaling,
)
from imgcls.evaluation.config import CalibrateConfig
from imgcls.inference.history import CompactConfig, compact
from imgcls.metrics import expected_calibration_error
from imgcls.models import zoo
from imgcls.models.acceptance import NEVER_ACCEPT
from imgcls.models.bundle import (
    INT8_FILE,
    Bundle,
    BundleSpec,
    Int8Calibration,
    load_bundle,
    load_bundle_weights,
    save_bundle,
)
from imgcls.models.classifier import Classifier
from imgcls.models.label_sets import find_label_sets
from tests.evaluation.runs import CLASSES, commit, drawn


def overconfident(rows: int, factor: float, seed: int = 0) -> HeldOutScores:
    """Labels drawn from a softmax, scored by one whose logits are `factor` times as large."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, 4, generator=generator)
    label = torch.multinomial(torch.softmax(logits, 1), 1, generator=generator)[:, 0]
    return HeldOutScores(torch.log_softmax(factor * logits, 1).numpy(), label.numpy())


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_the_temperature_that_was_put_in_is_found(factor: float) -> None:
    rows = overconfident(20_000, factor)
    temperature = fit_temperature(rows)
    assert temperature == pytest.approx(factor, rel=0.04)
    confidence, predicted = compute_confidences(rows, np.array([1 / temperature], np.float32), None)
    assert expected_calibration_error(confidence, predicted == rows.label) < 0.015


def test_vector_scaling_corrects_one_class_alone() -> None:
    rows = overconfident(20_000, 1.0)
    skewed = HeldOutScores(rows.log_scores + np.array([0, 0, 2, 0], np.float32), rows.label)
    scale, bias = fit_vector_scaling(skewed)
    assert bias is not None
    assert bias[2] - bias[[0, 1, 3]].mean() == pytest.approx(-2, abs=0.15)
    confidence, predicted = compute_confidences(skewed, scale, bias)
    assert expected_calibration_error(confidence, predicted == rows.label) < 0.015


def always(rows: int, label: int) -> HeldOutScores:
    """Rows that all score class 0 best, 1 next and so on, with one label."""
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0]]).repeat(rows, 1)
    return HeldOutScores(torch.log_softmax(logits, 1).numpy(), np.full(rows, label))


@pytest.mark.parametrize("rows", [1, 20, 5000])
def test_rows_that_are_all_right_determine_no_temperature(rows: int) -> None:
    given = always(rows, 0)
    assert "predictions are correct" in str(explain_undetermined(given))
    assert fit_temperature(given) == 1.0
    scale, bias = fit_vector_scaling(given)
    assert scale.tolist() == [1.0]
    assert bias is None


def test_rows_that_are_all_wrong_get_nearly_equal_scores() -> None:
    given = always(20, 3)
    temperature = fit_temperature(given)
    assert temperature == pytest.approx(50, rel=1e-3)
    confidence, _ = compute_confidences(given, np.array([1 / temperature], np.float32), None)
    assert confidence == pytest.approx(np.full(20, 0.25), abs=0.02)


def test_one_wrong_row_among_many_determines_the_temperature() -> None:
    """The loss of n right rows and a wrong one has its minimum where the scores are n / (n + 1)."""
    logits = torch.tensor([[2.0, 0.0]]).repeat(100, 1)
    rows = HeldOutScores(torch.log_softmax(logits, 1).numpy(), np.array([1] + [0] * 99))
    assert explain_undetermined(rows) is None
    assert fit_temperature(rows) == pytest.approx(2 / np.log(99), rel=1e-3)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    architecture = zoo.resolve_architecture("small_cnn", {"width": 4})
    torch.manual_seed(0)
    spec = BundleSpec(
        architecture=architecture, classes=list(CLASSES), temperature=2.0, threshold=0.3,
        preprocess=zoo.get_default_preprocess(architecture),
    )  # fmt: skip
    network = zoo.build_network(architecture, len(CLASSES))
    return save_bundle(str(tmp_path / "bundle"), spec, network.state_dict())


def run_of(tmp_path: Path, bundle: Bundle, name: str = "out", **changes: Any) -> Path:
    table = drawn(6000, 2, sharpness=2.0, **changes)
    return commit(tmp_path / name, table, bundle_sha256=bundle.sha256)


def request(bundle: Bundle, run: Path, **changes: Any) -> CalibrateConfig:
    settings = {"model": bundle.url, "predictions": str(run), "output": f"{bundle.url}-calibrated"}
    return CalibrateConfig.model_validate(settings | changes)


def test_the_new_bundle_is_calibrated_and_records_its_source(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, bundle)
    result = calibrate(request(bundle, run))
    assert result.ece_after < 0.02 < result.ece_before
    made = load_bundle(result.bundle.url)
    assert made.spec.temperature == result.temperature != 2.0
    assert made.spec.threshold == 0.0
    assert made.spec.provenance["calibration"]["bundle_sha256"] == bundle.sha256
    assert made.weights_sha256 == bundle.weights_sha256
    out = capsys.readouterr().out
    assert f"temperature 2.0000 -> {result.temperature:.4f}" in out
    assert "the old threshold does not apply to the new confidences" in out


@pytest.mark.parametrize("method", ["temperature", "vector"])
def test_a_bundle_keeps_its_confidences_where_all_held_out_rows_are_right(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    table = drawn(200, 2, sharpness=2.0)
    right = table.set_column(
        table.schema.get_field_index("label"), "label", table["predicted_label"]
    )
    result = calibrate(
        request(bundle, commit(tmp_path / "out", right, bundle_sha256=bundle.sha256), method=method)
    )
    made = load_bundle(result.bundle.url).spec
    assert (made.temperature, made.vector_scaling, made.threshold) == (2.0, None, 0.3)
    assert result.ece_after == result.ece_before
    out = capsys.readouterr().out
    assert "note: all held-out predictions are correct, so they determine no temperature" in out
    assert "the old threshold does not apply" not in out


@pytest.mark.parametrize("method", ["temperature", "vector"])
def test_the_new_bundle_keeps_the_quantized_network_and_forgets_its_accuracy_where_it_changed(
    bundle: Bundle, tmp_path: Path, method: str
) -> None:
    data = b"a network for OpenVINO"
    int8 = Int8Calibration(
        engine="openvino", model_sha256=hashlib.sha256(data).hexdigest(), ranges={},
        calibration_images=1, judged_images=1, agreement=1,
    )  # fmt: skip
    spec = bundle.spec.model_copy(update={"int8": int8})
    weights = load_bundle_weights(bundle)
    quantized = save_bundle(str(tmp_path / "quantized"), spec, weights, int8_model=data)
    made = load_bundle(
        calibrate(request(quantized, run_of(tmp_path, quantized), method=method)).bundle.url
    )
    # a temperature keeps the order of the classes
    agreement = 1.0 if method == "temperature" else None
    assert made.spec.int8 == int8.model_copy(update={"agreement": agreement})
    assert (Path(made.url) / INT8_FILE).read_bytes() == data


def test_a_bundle_that_is_there_is_replaced_only_when_asked(bundle: Bundle, tmp_path: Path) -> None:
    run = run_of(tmp_path, bundle)
    first = calibrate(request(bundle, run)).bundle
    with pytest.raises(OutputError, match=r"already has a bundle; pass --overwrite"):
        calibrate(request(bundle, run, method="vector"))
    assert load_bundle(first.url).sha256 == first.sha256
    again = calibrate(request(bundle, run, method="vector", overwrite=True)).bundle
    assert load_bundle(first.url).sha256 == again.sha256 != first.sha256


def test_calibrating_again_goes_on_from_there(bundle: Bundle, tmp_path: Path) -> None:
    first = calibrate(request(bundle, run_of(tmp_path, bundle), method="vector")).bundle
    again = run_of(tmp_path, first, "again")
    with pytest.raises(RequestError, match="is vector-scaled already"):
        calibrate(request(first, again, method="vector"))
    rng = np.random.default_rng(0)
    batch = rng.integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)
    before = np.log(Classifier(first, precision="fp32", device="cpu").classify(batch).scores)
    second = calibrate(request(first, again)).bundle
    factor = second.spec.vector_scaling.scale[0] / first.spec.vector_scaling.scale[0]
    expected = torch.softmax(torch.from_numpy(before) * factor, 1).numpy()
    got = Classifier(second, precision="fp32", device="cpu").classify(batch).scores
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("method", ["temperature", "vector"])
def test_the_classifier_applies_the_fitted_scaling(
    bundle: Bundle, tmp_path: Path, method: str
) -> None:
    """Scores of the old bundle, scaled as fitted, are the scores of the new one."""
    rng = np.random.default_rng(0)
    batch = rng.integers(0, 256, (40, 3, 32, 32), dtype=np.uint8)
    old = Classifier(bundle, precision="fp32", device="cpu").classify(batch).scores
    result = calibrate(request(bundle, run_of(tmp_path, bundle), method=method))
    got = Classifier(result.bundle, precision="fp32", device="cpu").classify(batch).scores
    scaling = result.bundle.spec.vector_scaling
    if scaling is None:
        scaled = np.log(old) * (bundle.spec.temperature / result.temperature)
    else:
        assert result.temperature == 2.0
        scaled = np.log(old) * np.array(scaling.scale) + np.array(scaling.bias)
    expected = np.exp(scaled - scaled.max(1, keepdims=True))
    np.testing.assert_allclose(got, expected / expected.sum(1, keepdims=True), atol=2e-5)


def test_a_global_threshold_reaches_its_target_and_its_cost_is_printed(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, bundle)
    result = calibrate(request(bundle, run, target_precision=0.9))
    [chosen] = result.thresholds
    assert result.bundle.spec.threshold == chosen.threshold
    assert chosen.precision is not None
    assert chosen.precision >= 0.9
    assert 0 < chosen.coverage < 1
    assert f"{chosen.coverage:.2%} accepted" in capsys.readouterr().out


def test_per_class_thresholds_are_applied_and_hopeless_classes_are_not_accepted(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = drawn(6000, 2, sharpness=2.0)
    labels = table["label"].to_pylist()
    predicted = table["predicted_label"].to_pylist()
    # every prediction of eel is wrong
    labels = ["ant" if s == "eel" else label for label, s in zip(labels, predicted, strict=True)]
    index = table.schema.get_field_index("label")
    table = table.set_column(index, "label", pa.array(labels))
    run = commit(tmp_path / "out", table, bundle_sha256=bundle.sha256)
    changes = {"target_precision": 0.7, "per_class": True, "method": "none"}
    result = calibrate(request(bundle, run, **changes))
    thresholds = result.bundle.spec.resolve_thresholds()
    assert thresholds[CLASSES.index("eel")] == NEVER_ACCEPT > 1
    assert all(0 < t < 1 for t in thresholds[:4])
    assert result.bundle.spec.temperature == 2.0
    assert "1 of 5 classes never reach the target (eel)" in capsys.readouterr().out
    classifier = Classifier(result.bundle, precision="fp32", device="cpu")
    np.testing.assert_allclose(classifier._thresholds, thresholds)
    certain = np.eye(5, dtype=np.float32)  # a confidence of exactly 1 for each class
    accepted = [each.accepted for each in classifier.rank_scores(certain)]
    assert accepted == [True, True, True, True, False]
    # what others compare with: the strictest threshold that was reached, and valid JSON
    assert result.bundle.spec.threshold == max(thresholds[:4])
    stored = json.loads((Path(result.bundle.url) / "bundle.json").read_text())
    assert stored["thresholds"]["eel"] == NEVER_ACCEPT
    assert "never accepted: eel." in (Path(result.bundle.url) / "README.md").read_text()


def test_without_a_class_that_reaches_the_target_nothing_is_accepted(
    bundle: Bundle, tmp_path: Path
) -> None:
    table = drawn(600, 2, sharpness=2.0)
    predicted = table["predicted_label"].to_pylist()
    wrong = [CLASSES[(CLASSES.index(name) + 1) % 5] for name in predicted]
    index = table.schema.get_field_index("label")
    table = table.set_column(index, "label", pa.array(wrong, pa.string()))
    run = commit(tmp_path / "out", table, bundle_sha256=bundle.sha256)
    changes = {"target_precision": 0.9, "per_class": True, "method": "none"}
    made = calibrate(request(bundle, run, **changes)).bundle
    assert made.spec.threshold == NEVER_ACCEPT
    ranked = Classifier(made, device="cpu").rank_scores(np.eye(5, dtype=np.float32))
    assert not any(each.accepted for each in ranked)
    card = (Path(made.url) / "README.md").read_text()
    assert "acceptance threshold none: no prediction is accepted." in card


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_precision": 0.9999}, "no threshold reaches it with 30 accepted rows of 6,000"),
        ({"method": "none"}, "has no effect without --target-precision"),
    ],
)
def test_impossible_requests_are_rejected(
    bundle: Bundle, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        calibrate(request(bundle, run_of(tmp_path, bundle), **changes))
    assert not Path(f"{bundle.url}-calibrated").exists()


def test_another_models_run_no_scores_and_no_labels_are_rejected(
    bundle: Bundle, tmp_path: Path
) -> None:
    other = commit(tmp_path / "other", drawn(50), bundle_sha256="0" * 64)
    with pytest.raises(RequestError, match="was made by another bundle"):
        calibrate(request(bundle, other))
    nights = tmp_path / "nights"
    commit(nights / "date=2026-11-01", drawn(50, 1), bundle_sha256="0" * 64)
    commit(nights / "date=2026-11-02", drawn(50, 2), bundle_sha256=bundle.sha256)
    history = compact(CompactConfig(source=str(nights), output=str(tmp_path / "all")))
    with pytest.raises(RequestError, match=r"is a history of runs, not all of which .* made"):
        calibrate(request(bundle, Path(history)))
    bare = run_of(tmp_path, bundle, "bare", scores=False)
    with pytest.raises(RequestError, match="predict --scores"):
        calibrate(request(bundle, bare))
    blind = commit(tmp_path / "blind", drawn(50), bundle_sha256=bundle.sha256, label_column=None)
    with pytest.raises(RequestError, match="has no labels"):
        calibrate(request(bundle, blind))
    with pytest.raises(RequestError, match="is the input bundle"):
        calibrate(request(bundle, bare, output=bundle.url))
    linked = tmp_path / "linked"
    linked.symlink_to(bundle.url)
    with pytest.raises(RequestError, match="is the input bundle"):
        calibrate(request(bundle, bare, output=f"{linked}/", overwrite=True))


@pytest.mark.parametrize("per_class", [False, True])
def test_label_sets_cover_new_rows_as_often_as_asked(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], per_class: bool
) -> None:
    run = run_of(tmp_path, bundle)
    result = calibrate(request(bundle, run, coverage=0.9, coverage_per_class=per_class))
    spec = load_bundle(result.bundle.url).spec
    assert spec.label_sets is not None
    assert len(spec.label_sets.thresholds) == (5 if per_class else 1)
    assert spec.provenance["calibration"]["coverage"] == 0.9
    assert result.label_set_quality is not None
    assert result.label_set_quality.coverage == pytest.approx(0.9, abs=0.01)
    assert "label sets 90.00% coverage: " in capsys.readouterr().out
    card = (Path(result.bundle.url) / "README.md").read_text()
    assert "Label sets include the label with probability 0.9." in card
    # new rows, by the scores of the new bundle
    rows = drawn(6000, 7, sharpness=2.0)
    logs = np.log(np.array(rows["scores"].to_pylist(), np.float32)) * 2.0 / result.temperature
    scores = np.exp(logs) / np.exp(logs).sum(1, keepdims=True)
    ranked = Classifier(result.bundle, precision="fp32", device="cpu").rank_scores(scores)
    labels = np.array(rows["label"].to_pylist())
    covered = np.array(
        [label in (each.label_set or []) for label, each in zip(labels, ranked, strict=True)]
    )
    assert covered.mean() == pytest.approx(0.9, abs=0.015)
    if per_class:
        for name in CLASSES:
            assert covered[labels == name].mean() == pytest.approx(0.9, abs=0.03)


def test_label_sets_go_with_the_confidences_that_they_were_chosen_for(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = calibrate(request(bundle, run_of(tmp_path, bundle), coverage=0.8)).bundle
    again = commit(tmp_path / "again", drawn(6000, 3, sharpness=1.0), bundle_sha256=first.sha256)
    kept = calibrate(
        request(first, again, method="none", target_precision=0.4, output=str(tmp_path / "kept"))
    )
    assert kept.bundle.spec.label_sets == first.spec.label_sets
    capsys.readouterr()
    lost = calibrate(request(first, again, output=str(tmp_path / "lost")))
    assert lost.bundle.spec.label_sets is None
    assert "the old label sets do not apply to the new confidences" in capsys.readouterr().out


def test_classes_with_too_few_rows_are_in_every_set(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = drawn(600, 2, sharpness=2.0)
    is_eel = np.array(table["label"].to_pylist()) == "eel"
    table = table.filter(pa.array(~is_eel | (np.cumsum(is_eel) <= 8)))
    run = commit(tmp_path / "out", table, bundle_sha256=bundle.sha256)
    made = calibrate(request(bundle, run, coverage=0.9, coverage_per_class=True)).bundle
    assert "1 class with too few held-out rows: in every label set (eel)" in capsys.readouterr().out
    ranked = Classifier(made, device="cpu").rank_scores(np.eye(5, dtype=np.float32))
    assert all("eel" in (each.label_set or []) for each in ranked)


def test_label_sets_that_cannot_be_chosen_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    few = commit(tmp_path / "few", drawn(50, sharpness=1.0), bundle_sha256=bundle.sha256)
    with pytest.raises(RequestError, match="needs 99 labeled rows, found 50"):
        calibrate(request(bundle, few, coverage=0.99))
    with pytest.raises(RequestError, match="needs 99 labeled rows of each class; 5 of 5"):
        calibrate(request(bundle, few, coverage=0.99, coverage_per_class=True))
    for changes in ({"coverage_per_class": True}, {"rank_penalty": 0.1}):
        with pytest.raises(RequestError, match="has no effect without --coverage"):
            calibrate(request(bundle, few, **changes))
    assert not Path(f"{bundle.url}-calibrated").exists()


@pytest.mark.parametrize("gain", [10.0, 40.0])
def test_label_sets_of_an_overconfident_model_cover_as_often_as_asked(
    bundle: Bundle, tmp_path: Path, gain: float
) -> None:
    """Most scores underflow in float16, and many in float32."""
    rng = np.random.default_rng(0)

    def draw(rows: int, kind: str) -> tuple[pa.Table, np.ndarray, np.ndarray]:
        truth = rng.integers(0, 5, rows)
        logits = rng.normal(size=(rows, 5)).astype(np.float32)
        logits[np.arange(rows), truth] += 1.5
        logits *= gain
        scores = np.exp(logits - logits.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
        table = drawn(rows, sharpness=2.0)
        flat = pa.array(scores.astype(kind).ravel())
        column = pa.FixedSizeListArray.from_arrays(flat, 5)
        table = table.set_column(table.schema.get_field_index("scores"), "scores", column)
        labels = pa.array(np.array(CLASSES)[truth].tolist())
        return table.set_column(1, "label", labels), scores, truth

    table, *_ = draw(4000, "float32")
    run = commit(tmp_path / "run", table, bundle_sha256=bundle.sha256)
    made = calibrate(request(bundle, run, method="none", coverage=0.9)).bundle
    assert made.spec.label_sets is not None
    _, scores, truth = draw(4000, "float32")
    order, is_included = find_label_sets(scores, made.spec.label_sets)
    covered = is_included[order == truth[:, None]].mean()
    assert covered > 0.88
    # beyond, many labels have a nonconformity of exactly 1 in float32
    assert covered < 0.92 or gain > 10
    rounded, *_ = draw(4000, "float16")
    other = commit(tmp_path / "rounded", rounded, bundle_sha256=bundle.sha256)
    again = request(bundle, other, method="none", coverage=0.9, output=str(tmp_path / "again"))
    with pytest.raises(RequestError, match="are in float16, too coarse"):
        calibrate(again)


def test_label_sets_per_class_need_rows_of_most_classes(bundle: Bundle, tmp_path: Path) -> None:
    table = drawn(400, 2)
    is_common = np.isin(table["label"].to_pylist(), ["ant", "bee"])
    run = commit(tmp_path / "out", table.filter(pa.array(is_common)), bundle_sha256=bundle.sha256)
    with pytest.raises(RequestError, match="of each class; 3 of 5 classes have fewer"):
        calibrate(request(bundle, run, coverage=0.9, coverage_per_class=True))
