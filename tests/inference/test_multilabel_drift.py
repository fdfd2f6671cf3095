"""Drift of multilabel runs: measured against a reference, which has the task of the bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from imgcls.config import build
from imgcls.errors import RequestError, TooManyErrors
from imgcls.inference.commit import check_drift
from imgcls.inference.config import PredictConfig
from imgcls.inference.requests import open_reference
from imgcls.models.bundle import TaskName, load_bundle
from imgcls.runs.committed import open_run
from tests.evaluation.drawn_cells import build_table, commit_multilabel, draw_cells
from tests.evaluation.runs import commit, drawn
from tests.runs.embedded import CLASSES, save_with_head


def test_a_run_whose_labels_have_moved_is_refused(tmp_path: Path) -> None:
    logits, targets = draw_cells(600, 1)
    then = open_run(str(commit_multilabel(tmp_path / "then", build_table(logits, targets))))
    same, moved = (build_table(draw_cells(600, 2).logits + shift, None) for shift in (0, 3))
    counter = replace(then.create_counter(), label_columns=None)
    check_drift(str(tmp_path / "out"), counter.count(same), then, 0.1)
    (row,) = pq.read_table(tmp_path / "out" / "metrics" / "drift.parquet").to_pylist()
    assert (row["of"], row["reference_rows"]) == ("predicted_labels", 600)
    with pytest.raises(TooManyErrors, match="predicted_labels has drifted from"):
        check_drift(str(tmp_path / "out"), counter.count(moved), then, 0.1)
    # the scores, which are most of a table, are not read
    assert "scores" not in counter.select_columns(then.schema)


@pytest.mark.parametrize("task", ["single_label", "multilabel"])
def test_a_reference_of_another_task_is_refused(tmp_path: Path, task: TaskName) -> None:
    logits, targets = draw_cells(20, 1)
    many = commit_multilabel(tmp_path / "many", build_table(logits, targets))
    one = commit(tmp_path / "one", drawn(20))
    version = 1 if task == "single_label" else 2
    bundle = load_bundle(
        str(save_with_head(tmp_path / "b", CLASSES, 1, task=task, format_version=version))
    )
    right, wrong = (many, one) if task == "multilabel" else (one, many)

    def build_config(reference: Path) -> PredictConfig:
        settings = {"manifest": "m.csv", "model": bundle.url, "output": "out"}
        return build(PredictConfig, settings | {"reference": str(reference)})

    found = open_reference(build_config(right), bundle)
    assert found is not None
    assert found.task == task
    with pytest.raises(RequestError, match=rf"reference \S+: was labeled .* is a {task} one"):
        open_reference(build_config(wrong), bundle)
