"""Label sets and out-of-distribution scores: calibrated, predicted, gated, relabeled, evaluated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from imgcls.models.classifier import Classifier
from tests.e2e.outputs import assert_exactly_once, parquet, success
from tests.processes import run_here


def test_sets_and_ood_scores_are_the_same_everywhere(
    joined: None, colors: Callable[..., Path], color_bundle: Path, tmp_path: Path
) -> None:
    manifest, made = colors(60), tmp_path / "made"
    (tmp_path / "images" / "00007.jpg").write_bytes(b"no image")
    allow = ("--max-error-rate", 0.05, "--precision", "fp32", "--embeddings", "--scores")
    held_out = run_here(
        *("predict", manifest, "--model", color_bundle, "--output", tmp_path / "held-out", *allow)
    )
    assert held_out.returncode == 0, held_out.stderr
    calibrated = run_here(
        *("calibrate", "--model", color_bundle, "--predictions", tmp_path / "held-out"),
        *("--output", made, "--coverage", 0.8, "--max-ood-rate", 0.2),
    )
    assert calibrated.returncode == 0, calibrated.stderr
    assert "label sets 80.00% coverage" in calibrated.stdout
    assert "for 20.00% of " in calibrated.stdout

    output = tmp_path / "out"
    arguments = ("predict", manifest, "--model", made, "--output", output, *allow)
    refused = run_here(*arguments, "--max-ood-share", 0.0)
    assert refused.returncode == 3, refused.stdout + refused.stderr
    assert (
        "are unlike the training data (allowed 0.00%); the run is not committed" in refused.stderr
    )
    assert not (output / "_SUCCESS").exists()
    done = run_here(*arguments)
    assert done.returncode == 0, done.stderr
    found = assert_exactly_once(output, 60)
    assert success(output)["status"] == {"not_an_image": 1, "ok": 59}
    added = ["label_set", "ood_score", "is_ood"]
    assert [name for name in found.schema.names if name in added] == added
    rows = found.to_pylist()
    assert rows[7]["label_set"] is rows[7]["ood_score"] is rows[7]["is_ood"] is None
    assert {row["is_ood"] for row in rows} == {True, False, None}
    assert {row["accepted"] for row in rows if row["is_ood"]} == {False}

    classifier = Classifier.load(str(made), precision="fp32", device="cpu")
    alone = classifier.predict([tmp_path / row["path"] for row in rows[:5]])
    for row, each in zip(rows, alone, strict=False):
        assert row["label_set"] == each.label_set
        assert row["ood_score"] == pytest.approx(each.ood_score, abs=1e-5)
        assert row["is_ood"] == each.is_ood

    again = run_here(
        *("relabel", output, "--model", made, "--output", tmp_path / "again", "--scores")
    )
    assert again.returncode == 0, again.stderr
    relabeled = assert_exactly_once(tmp_path / "again", 60)
    for name in ("label_set", "is_ood", "predicted_label", "accepted"):
        assert relabeled[name].to_pylist() == found[name].to_pylist(), name

    report = run_here("evaluate", "--predictions", output, "--output", tmp_path / "judged")
    assert report.returncode == 0, report.stderr
    values = {
        row["metric"]: row["value"]
        for row in parquet(tmp_path / "judged" / "metrics" / "summary.parquet").to_pylist()
    }
    labeled = [row for row in rows if row["label_set"] is not None]
    covered = [row["label"] in row["label_set"] for row in labeled]
    assert values["set_coverage"] == pytest.approx(sum(covered) / 59)
    assert values["ood_rate"] == pytest.approx(sum(row["is_ood"] for row in labeled) / 59)
    assert "Unlike the training data" in (tmp_path / "judged" / "report.html").read_text()

    impossible = run_here(
        *("predict", manifest, "--model", color_bundle, "--output", tmp_path / "no"),
        *("--max-ood-share", 0.5),
    )
    assert impossible.returncode == 2
    assert "has no out-of-distribution detector" in impossible.stderr
