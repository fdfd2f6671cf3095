"""The evaluation job: its files and printed result, and errors before prediction starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.config import build
from imgcls.errors import ConfigError, ManifestError, OutputError, RequestError
from imgcls.evaluation.compute import compute_evaluation
from imgcls.evaluation.config import EvaluateConfig, EvaluationOptions
from imgcls.evaluation.evaluate import evaluate
from tests.conftest import write_manifest
from tests.evaluation.runs import commit


def test_tables_summary_and_report_are_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "evaluated"
    found = evaluate(EvaluateConfig(predictions=str(run), output=str(output), slice_by=["camera"]))
    assert not (run / "report.html").exists()
    summary = json.loads((output / "summary.json").read_text())
    metric = found.get_metric("accuracy")
    assert metric is not None
    assert summary["metrics"]["accuracy"]["value"] == metric.value
    assert summary["metrics"]["accuracy"]["lower"] < metric.value
    tables = {p.stem: pq.read_table(p) for p in (output / "metrics").iterdir()}
    assert set(tables) == {
        "summary", "per_class", "confusion", "calibration", "coverage", "slices", "label_issues",
    }  # fmt: skip
    assert tables["summary"].num_rows == len(found.metrics)
    assert tables["coverage"]["coverage"][0].as_py() == 1.0
    assert (output / "report.html").stat().st_size < 5_000_000
    assert f"report       {output}/report.html" in capsys.readouterr().out


def test_the_folder_of_another_run_is_rejected_as_output(
    tmp_path: Path, table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (commit(tmp_path / name, table) for name in ("first", "second"))
    with pytest.raises(OutputError, match=r"second: is the folder of a run"):
        evaluate(predictions=str(first), output=str(second))
    assert not (second / "summary.json").exists()
    (tmp_path / "link").symlink_to(first)
    monkeypatch.chdir(tmp_path)
    evaluate(predictions="first", output="link/", thumbnails=False)
    assert (first / "summary.json").exists()


def test_a_run_without_labels_is_rejected_with_the_remedy(tmp_path: Path, table: pa.Table) -> None:
    blind = table.drop_columns(["label", "label_score", "label_rank"])
    folder = commit(tmp_path / "blind", blind, label_column=None)
    with pytest.raises(RequestError, match="--labels TABLE"):
        evaluate(EvaluateConfig(predictions=str(folder)))
    labels = table.select(["path"]).append_column("label", pa.array(["unknown"] * len(table)))
    pq.write_table(labels, tmp_path / "labels.parquet")
    request = {"predictions": folder, "labels": tmp_path / "labels.parquet", "output": tmp_path}
    with pytest.raises(RequestError, match="another\\); check the labels of --labels, whose names"):
        evaluate(build(EvaluateConfig, {key: str(value) for key, value in request.items()}))
    found = compute_evaluation(str(folder), EvaluationOptions(), need_labels=False)
    assert not found.has_labels
    assert found.get_metric("accuracy") is None
    assert found.get_metric("mean_confidence") is not None


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "manifest, model, output: required to predict first"),
        ({"manifest": {"path": "m.csv"}}, "model, output: required"),
        ({"predictions": "out", "model": "bundle"}, "predictions and model are both given"),
        ({"predictions": "out", "labels": "late.csv"}, "output: is required with --labels"),
        ({"predictions": "out", "on": "path"}, "on: is the key of --labels, which is missing"),
    ],
)
def test_ambiguous_requests_are_rejected(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(build(EvaluateConfig, request_))


@pytest.mark.parametrize(
    ("header", "settings", "message"),
    [
        (("path", "label"), {"slice_by": "site"}, "slice_by: .* no column 'site' .found: path, la"),
        (
            ("path", "label"),
            {"slice_by": "scores"},
            "column 'scores' of .* is fixed_size_list",
        ),
        (("path", "label"), {"labels": "l.csv", "on": "key"}, "on: .* no column 'key' .found: pa"),
        (
            ("path", "truth"),
            {},
            "no label column to evaluate against; name it with --manifest.label-col",
        ),
    ],
)
def test_invalid_requests_are_rejected_before_prediction(
    tmp_path: Path, header: tuple[str, str], settings: dict[str, Any], message: str
) -> None:
    manifest = write_manifest(tmp_path / "m.csv", [("a.jpg", "ant")], header)
    output = tmp_path / "out"
    request = {"manifest": str(manifest), "model": "no bundle", "output": str(output)}
    with pytest.raises(ManifestError, match=message):
        evaluate(build(EvaluateConfig, request | settings))
    assert not output.exists()
