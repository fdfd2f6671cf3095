"""Evaluation, calibration and comparison by their commands, with every file on an object store.

On disk, `test_pages.py` and `test_demo.py` run the same commands, and `tests/evaluation` tests the
functions behind them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from imgcls.evaluation.config import EvaluateConfig
from imgcls.evaluation.evaluate import evaluate
from imgcls.models.bundle import load_bundle
from tests.conftest import COLORS, write_manifest
from tests.e2e.outputs import assert_exactly_once, parquet, success, table
from tests.processes import ALONE, run_here

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_run_is_evaluated_calibrated_compared_and_evaluated_with_joined_labels(
    joined: None, place: Path, placed_bundle: Path, colors: Callable[..., Path]
) -> None:
    manifest = colors(60, place)
    (place / "images" / "00007.jpg").unlink()
    output = place / "out"
    done = run_here(
        *("evaluate", "--manifest", manifest, "--model", placed_bundle, "--output", output),
        *("--slice-by", "camera", "--max-error-rate", "0.05", *ALONE),
    )
    assert done.returncode == 0, done.stderr
    check_metrics(done.stdout, output)
    check_calibration(manifest, output, placed_bundle, place)
    check_joined_labels(output, place)


def check_metrics(printed: str, output: Path) -> None:
    """Metrics are those of the rows, written once and printed once."""
    assert_exactly_once(output, 60)
    summary = json.loads((output / "summary.json").read_text())
    rows = table(output).to_pylist()
    right = [row["predicted_label"] == row["label"] for row in rows if row["status"] == "ok"]
    assert summary["metrics"]["accuracy"]["value"] == pytest.approx(sum(right) / 59)
    assert summary["metrics"]["status_missing"]["value"] == 1
    assert "auroc_macro" in summary["metrics"]
    slices = parquet(output / "metrics" / "slices.parquet").to_pylist()
    assert {row["value"]: row["rows"] for row in slices} == {"camera 0": 30, "camera 1": 30}
    assert success(output)["rows"] == 60
    lines = [line.split("  ")[0] for line in printed.splitlines()]
    for name in ("rows", "accuracy", "macro F1", "macro AUROC", "all metrics", "report"):
        assert lines.count(name) == 1, (name, printed)


def check_calibration(manifest: Path, output: Path, bundle: Path, place: Path) -> None:
    """The chosen threshold is the one that prediction applies; accuracy stays the same."""
    calibrated = place / "calibrated"
    done = run_here(
        *("calibrate", "--model", bundle, "--predictions", output),
        *("--output", calibrated, "--target-precision", 0.3),
    )
    assert done.returncode == 0, done.stderr
    made = load_bundle(str(calibrated)).spec
    assert made.temperature != 1.0
    again = place / "again"
    done = run_here(
        *("predict", "--manifest", manifest, "--model", calibrated, "--output", again),
        *("--max-error-rate", "0.05", *ALONE),
    )
    assert done.returncode == 0, done.stderr
    for row in table(again).to_pylist():
        confident = row["confidence"] is not None and row["confidence"] >= made.threshold
        assert row["accepted"] == confident
    same = run_here("compare", output, again, "--fail-if-worse", "0.5pt")
    assert same.returncode == 0, same.stderr
    assert "no significant difference" in same.stdout


def check_joined_labels(output: Path, place: Path) -> None:
    """Labels of another table are evaluated without changing the run."""
    rows = [(r["path"], r["predicted_label"]) for r in table(output).to_pylist() if r["row"] != 7]
    others = {name: list(COLORS)[i - 1] for i, name in enumerate(COLORS)}
    correct = write_manifest(place / "correct.csv", rows, ("path", "label"))
    wrong = write_manifest(
        place / "wrong.csv", [(path, others[label]) for path, label in rows], ("path", "label")
    )
    before = (output / "summary.json").read_text()
    for labels, expected in ((correct, 1.0), (wrong, 0.0)):
        evaluated = place / labels.stem
        evaluate(EvaluateConfig(predictions=str(output), labels=str(labels), output=str(evaluated)))
        summary = json.loads((evaluated / "summary.json").read_text())
        assert summary["metrics"]["accuracy"]["value"] == expected
    assert (output / "summary.json").read_text() == before
    assert not (output / "correct").exists()
