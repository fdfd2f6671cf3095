"""The made-up runs whose evaluation is measured are runs that `imgcls evaluate` accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

import imgcls
from benchmarks import evaluation, multilabel_evaluation

ROWS, CLASSES = 400, 5


def test_a_run_with_one_label_per_image(tmp_path: Path) -> None:
    evaluation.commit(tmp_path / "run", ROWS, CLASSES)
    found = imgcls.evaluate(predictions=str(tmp_path / "run"), thumbnails=False)
    values = {metric.name: metric.value for metric in found.metrics}
    # three of four as drawn, and one of five of the others by chance
    assert values["accuracy"] == pytest.approx(0.75 + 0.25 / CLASSES, abs=0.1)
    assert (tmp_path / "run" / "report.html").exists()


def test_a_run_with_any_number_of_labels_per_image(tmp_path: Path) -> None:
    multilabel_evaluation.commit_labels(tmp_path / "run", ROWS, CLASSES)
    found = imgcls.evaluate(predictions=str(tmp_path / "run"), thumbnails=False)
    assert found.has_labels
    assert (tmp_path / "run" / "report.html").exists()
