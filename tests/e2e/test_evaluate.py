"""Labelling, judging, calibrating and comparing, by the commands that a user types."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from imgcls.models.bundle import load_bundle
from tests.conftest import COLOURS, write_manifest
from tests.e2e.outputs import assert_exactly_once, parquet, success, table
from tests.processes import RayCluster, imgcls

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def judged(
    cluster: RayCluster, place: Path, placed_bundle: Path, colours: Callable[..., Path]
) -> tuple[Path, Path]:
    """A manifest with one missing image, labelled and judged at once; the manifest, the output."""
    manifest = colours(60, place)
    (place / "images" / "00007.jpg").unlink()
    output = place / "out"
    done = imgcls(
        *("evaluate", "--manifest", manifest, "--model", placed_bundle, "--output", output),
        *("--slice-by", "camera", "--max-error-rate", "0.05"),
        env=cluster.environment(),
    )
    assert done.returncode == 0, done.stderr
    return manifest, output


def test_one_command_labels_and_judges_and_calibration_and_comparison_go_on_from_there(
    judged: tuple[Path, Path], cluster: RayCluster, place: Path, placed_bundle: Path
) -> None:
    manifest, output = judged
    assert_exactly_once(output, 60)
    told = json.loads((output / "summary.json").read_text())
    rows = table(output).to_pylist()
    right = [row["predicted_label"] == row["label"] for row in rows if row["status"] == "ok"]
    assert told["metrics"]["accuracy"]["value"] == pytest.approx(sum(right) / 59)
    assert told["metrics"]["status_missing"]["value"] == 1
    assert "auroc_macro" in told["metrics"]
    slices = parquet(output / "metrics" / "slices.parquet").to_pylist()
    assert {row["value"]: row["rows"] for row in slices} == {"camera 0": 30, "camera 1": 30}
    assert success(output)["rows"] == 60

    calibrated = place / "calibrated"
    done = imgcls(
        *("calibrate", "--model", placed_bundle, "--predictions", output),
        *("--output", calibrated, "--target-precision", 0.3),
    )
    assert done.returncode == 0, done.stderr
    made = load_bundle(str(calibrated)).spec
    assert made.temperature != 1.0

    # the threshold that was chosen is what labelling accepts by
    again = place / "again"
    done = imgcls(
        *("predict", "--manifest", manifest, "--model", calibrated, "--output", again),
        *("--max-error-rate", "0.05"),
        env=cluster.environment(),
    )
    assert done.returncode == 0, done.stderr
    for row in table(again).to_pylist():
        confident = row["confidence"] is not None and row["confidence"] >= made.threshold
        assert row["accepted"] == confident

    same = imgcls("compare", output, again, "--fail-if-worse", "0.5pt")
    assert same.returncode == 0, same.stderr
    assert "no difference that these rows can show" in same.stdout


def test_labels_that_come_later_judge_without_touching_the_run(
    judged: tuple[Path, Path], place: Path
) -> None:
    _, output = judged
    rows = [(r["path"], r["predicted_label"]) for r in table(output).to_pylist() if r["row"] != 7]
    others = {name: list(COLOURS)[i - 1] for i, name in enumerate(COLOURS)}
    late = write_manifest(place / "late.csv", rows, ("path", "label"))
    wrong = write_manifest(
        place / "wrong.csv", [(path, others[label]) for path, label in rows], ("path", "label")
    )
    for labels, expected in ((late, 1.0), (wrong, 0.0)):
        done = imgcls(
            *("evaluate", "--predictions", output, "--labels", labels),
            *("--output", place / labels.stem),
        )
        assert done.returncode == 0, done.stderr
        told = json.loads((place / labels.stem / "summary.json").read_text())
        assert told["metrics"]["accuracy"]["value"] == expected
    assert not (output / "late").exists()

    blind = imgcls("evaluate", "--predictions", place / "late")
    assert blind.returncode == 2
    assert "holds no labeling run" in blind.stderr
