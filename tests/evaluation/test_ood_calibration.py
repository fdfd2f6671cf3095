"""The detector that `imgcls calibrate --max-ood-rate` makes, on runs with drawn embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from imgcls.errors import RequestError
from imgcls.evaluation import ood_calibration
from imgcls.evaluation.calibrate import calibrate
from imgcls.evaluation.compute import compute_evaluation
from imgcls.evaluation.config import CalibrateConfig, EvaluationOptions
from imgcls.models import zoo
from imgcls.models.bundle import (
    Bundle,
    BundleSpec,
    load_bundle,
    load_bundle_weights,
    load_ood_detector,
    save_bundle,
)
from imgcls.models.linear_head import load_linear_head
from imgcls.runs.committed import open_run
from tests.evaluation.runs import CLASSES, commit, drawn
from tests.evaluation.test_similar import add_embeddings

WIDTH = 16


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A network with embeddings of `WIDTH` numbers."""
    architecture = zoo.resolve_architecture("small_cnn", {"width": 4})
    torch.manual_seed(0)
    network = zoo.build_network(architecture, len(CLASSES))
    assert zoo.get_embedding_width(network) == WIDTH
    spec = BundleSpec(
        architecture=architecture,
        classes=list(CLASSES),
        preprocess=zoo.get_default_preprocess(architecture),
    )
    return save_bundle(str(tmp_path_factory.mktemp("b") / "bundle"), spec, network.state_dict())


def draw_embeddings(rows: int, seed: int) -> np.ndarray:
    """Around five centers, all within a quarter of the space."""
    rng = np.random.default_rng(seed)
    centers = np.abs(np.random.default_rng(99).normal(size=(5, WIDTH)))
    return (centers[rng.integers(0, 5, rows)] + 0.3 * rng.normal(size=(rows, WIDTH))).astype(
        np.float16
    )


def commit_run(path: Path, bundle: Bundle, rows: int, seed: int, **changes: Any) -> str:
    table = add_embeddings(drawn(rows, seed, sharpness=2.0), draw_embeddings(rows, seed), lost=(3,))
    settings = {"bundle_sha256": bundle.sha256, "model": bundle.url} | changes
    return str(commit(path, table, parts=2, **settings))


def request(bundle: Bundle, run: str, tmp_path: Path, **changes: Any) -> CalibrateConfig:
    settings = {"model": bundle.url, "predictions": run, "output": str(tmp_path / "made")}
    return CalibrateConfig.model_validate(settings | {"max_ood_rate": 0.05} | changes)


@pytest.mark.parametrize("case", ["itself", "reference", "energy"])
def test_new_rows_are_flagged_as_often_as_asked_and_strange_ones_always(
    bundle: Bundle, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = commit_run(tmp_path / "run", bundle, 6000, 1)
    changes: dict[str, Any] = {
        "itself": {},
        "reference": {
            "ood_reference": commit_run(tmp_path / "train", bundle, 5000, 2, fingerprint="e" * 32)
        },
        "energy": {"ood_method": "energy"},
    }[case]
    made = load_bundle(calibrate(request(bundle, run, tmp_path, **changes)).bundle.url)
    assert made.spec.provenance["calibration"]["max_ood_rate"] == 0.05
    detector = load_ood_detector(made)
    assert detector is not None
    new = draw_embeddings(20_000, 5).astype(np.float32)
    assert detector.classify(new).is_ood.mean() == pytest.approx(0.05, abs=0.01)
    out = capsys.readouterr().out
    assert "for 5.00% of " in out
    if case == "energy":
        head = load_linear_head(bundle)
        logits = torch.nn.functional.linear(torch.from_numpy(new[:5]), head.weight, head.bias)
        expected = -torch.logsumexp(logits, 1).detach().numpy()
        assert detector.compute_scores(new[:5]) == pytest.approx(expected, abs=1e-4)
        return
    strange = -new[:500]
    assert detector.classify(strange).is_ood.all()
    references = detector.arrays["references"]
    assert len(references) <= ood_calibration.MAX_REFERENCES
    assert np.linalg.norm(references.astype(np.float32), axis=1) == pytest.approx(1, abs=1e-2)
    assert f"distance to neighbor 10 of {len(references):,} embeddings" in out


def test_the_detector_stays_when_a_bundle_is_calibrated_again(
    bundle: Bundle, tmp_path: Path
) -> None:
    run = commit_run(tmp_path / "run", bundle, 600, 1)
    first = calibrate(request(bundle, run, tmp_path)).bundle
    again = commit_run(tmp_path / "again", first, 600, 2)
    config = request(first, again, tmp_path, max_ood_rate=None, output=str(tmp_path / "second"))
    second = calibrate(config).bundle
    assert second.spec.ood == first.spec.ood is not None
    assert load_ood_detector(second) is not None


def test_requests_that_cannot_succeed_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    def refuse(match: str, run: str, **changes: Any) -> None:
        with pytest.raises(RequestError, match=match):
            calibrate(request(bundle, run, tmp_path, **changes))
        assert not (tmp_path / "made").exists()

    run = commit_run(tmp_path / "run", bundle, 60, 1)
    bare = str(commit(tmp_path / "bare", drawn(50), bundle_sha256=bundle.sha256))
    refuse("bare: has no embeddings; label it", bare)
    refuse("needs 99 held-out rows besides the reference, found 29", run, max_ood_rate=0.01)
    refuse("bare: has no embeddings; label it", run, ood_reference=bare)
    other = commit_run(tmp_path / "other", bundle, 60, 1, bundle_sha256="0" * 64)
    refuse("was made by another bundle", run, ood_reference=other)
    refuse(
        "ood_method: has no effect without --max-ood-rate",
        run,
        max_ood_rate=None,
        ood_method="energy",
    )
    refuse("ood_reference: has no effect", run, max_ood_rate=None, ood_reference=run)


def test_an_evaluation_counts_them_and_shows_the_strangest(bundle: Bundle, tmp_path: Path) -> None:
    table = drawn(100, 3, failed=0.1)
    is_ok = np.array([status == "ok" for status in table["status"].to_pylist()])
    values = np.random.default_rng(0).random(100).astype(np.float32)
    table = table.append_column("ood_score", pa.array(values, mask=~is_ok))
    table = table.append_column("is_ood", pa.array(values > 0.8, mask=~is_ok))
    run = commit(tmp_path / "run", table, parts=3)
    found = compute_evaluation(str(run), EvaluationOptions(gallery=5), need_labels=True)
    metric = found.get_metric("ood_rate")
    assert metric is not None
    assert metric.value == pytest.approx((values[is_ok] > 0.8).mean())
    order = [i for i in np.argsort(-values) if is_ok[i]][:5]
    assert found.strangest["row"].to_pylist() == order
    plain = compute_evaluation(
        str(commit(tmp_path / "plain", drawn(20))), EvaluationOptions(), need_labels=True
    )
    assert plain.get_metric("ood_rate") is None
    assert plain.strangest.num_rows == 0


def test_the_energy_of_a_multilabel_model_is_the_joint_energy(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"task": "multilabel", "format_version": 2, "threshold": 0.5}
    spec = bundle.spec.model_copy(update=changes)
    made = save_bundle(str(tmp_path / "multilabel"), spec, load_bundle_weights(bundle))
    run = open_run(commit_run(tmp_path / "run", made, 400, 1))
    config = request(made, run.url, tmp_path, ood_method="energy")
    found = ood_calibration.make_detector(config, made, run)
    assert found.spec.method == "joint_energy"
    new = draw_embeddings(5_000, 5).astype(np.float32)
    assert found.detector.compute_scores(new) == pytest.approx(
        -np.logaddexp(
            0, new @ found.detector.arrays["weight"].T + found.detector.arrays["bias"]
        ).sum(1),
        rel=1e-4,
    )
    is_ood = found.detector.compute_scores(new) > found.spec.max_score
    assert is_ood.mean() == pytest.approx(0.05, abs=0.03)
    ood_calibration.log_detector(found)
    assert "ood        joint energy of the logits; score above" in capsys.readouterr().out
