"""The result of `imgcls.label`: a short summary for a console, a table for a notebook."""

from __future__ import annotations

from pathlib import Path

import pytest

from imgcls.execution.plan import Plan
from imgcls.inference.commit import write_metric_tables
from imgcls.inference.result import PredictResult
from imgcls.metrics import PredictionCounts
from tests.evaluation.runs import CLASSES, commit, drawn


@pytest.fixture(params=[True, False], ids=["labeled", "unlabeled"])
def result(request: pytest.FixtureRequest, tmp_path: Path) -> PredictResult:
    label_column = "label" if request.param else None
    table = drawn(50, failed=0.2)
    output = commit(tmp_path / "out", table, label_column=label_column)
    counts = PredictionCounts.from_table(table, label_column=label_column, classes=CLASSES)
    write_metric_tables(str(output), Plan("drawn", 50, 50, 50), counts, top_k=3, path_column="path")
    return PredictResult(str(output), 50, counts)


def test_the_summary_has_rows_statuses_metrics_and_the_place_of_the_table(
    result: PredictResult,
) -> None:
    text, html = repr(result), result._repr_html_()
    assert text.startswith("<PredictResult: 50 rows, ")
    assert text.endswith(f", {result.output}/predictions>")
    assert f"missing {result.status['missing']}, ok {result.status['ok']}" in text
    accuracy = result.metrics.get("accuracy")
    assert (accuracy is not None) == ("accuracy" in text) == ("accuracy" in html)
    if accuracy is not None:
        assert f"accuracy {accuracy:.1%}" in text
    assert f"{result.output}/predictions" in html
    assert len(text) < 200 + len(result.output)


def test_a_run_that_was_committed_before_has_the_same_summary(result: PredictResult) -> None:
    assert repr(PredictResult(result.output, 50, None)) == repr(result)
    assert len(result.to_pandas()) == 50


def test_a_result_whose_output_is_gone_still_has_a_summary(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    assert repr(PredictResult(gone, 1, None)) == f"<PredictResult: 1 row, {gone}/predictions>"
