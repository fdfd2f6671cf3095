"""Evaluation of a committed multilabel run against direct computation, and clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn import metrics as sk

import imgcls
from imgcls.data.manifests.label_columns import LabelColumns
from imgcls.errors import RequestError
from imgcls.evaluation import aggregate as aggregate_module
from imgcls.evaluation.compute import compute_evaluation
from imgcls.evaluation.config import EvaluationOptions
from imgcls.evaluation.multilabel import MultiLabelEvaluation
from imgcls.metrics.multilabel import (
    CooccurrenceCounts,
    MultiLabelCounts,
    RankingCounts,
    build_calibration_table,
    build_cooccurrence_table,
    build_multilabel_per_class,
    build_pr_curves,
)
from tests.evaluation.multilabel_runs import (
    CLASSES,
    THRESHOLDS,
    build_run_table,
    commit_multilabel,
    draw_scores,
    draw_targets,
)

ROWS = 1500


@pytest.fixture(scope="module")
def targets() -> np.ndarray:
    return draw_targets(ROWS)


@pytest.fixture(scope="module")
def scores(targets: np.ndarray) -> np.ndarray:
    return draw_scores(targets)


@pytest.fixture(scope="module")
def predicted(scores: np.ndarray) -> np.ndarray:
    return scores.astype(np.float32) >= np.array(THRESHOLDS, np.float32)


@pytest.fixture(scope="module")
def run(targets: np.ndarray, scores: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("multilabel") / "out"
    return commit_multilabel(folder, build_run_table(targets, scores), parts=3, group_rows=200)


def evaluate(run: Path, *, need_labels: bool = True, **options: object) -> MultiLabelEvaluation:
    config = EvaluationOptions.model_validate({"thumbnails": False, **options})
    found = compute_evaluation(str(run), config, need_labels=need_labels)
    assert isinstance(found, MultiLabelEvaluation)
    return found


def test_metrics_equal_scikit_learn(
    run: Path, targets: np.ndarray, scores: np.ndarray, predicted: np.ndarray
) -> None:
    found = evaluate(run)
    value = {metric.name: metric.value for metric in found.metrics}
    exact = scores.astype(np.float64)
    assert value["mean_average_precision"] == pytest.approx(
        sk.average_precision_score(targets, exact, average="macro")
    )
    assert value["auroc_macro"] == pytest.approx(sk.roc_auc_score(targets, exact))
    assert value["f1_micro"] == pytest.approx(sk.f1_score(targets, predicted, average="micro"))
    assert value["f1_macro"] == pytest.approx(sk.f1_score(targets, predicted, average="macro"))
    assert value["hamming_loss"] == pytest.approx(sk.hamming_loss(targets, predicted))
    metric = found.get_metric("mean_average_precision")
    assert metric is not None
    assert metric.interval is not None
    assert metric.interval[0] < metric.value < metric.interval[1]
    assert found.omitted == []
    assert repr(found).startswith(f"<MultiLabelEvaluation of {run}: 1,500 rows, mean_average")


def test_tables_equal_direct_computation(
    run: Path, targets: np.ndarray, scores: np.ndarray, predicted: np.ndarray
) -> None:
    found = evaluate(run)
    counts = MultiLabelCounts.from_arrays(targets, predicted, CLASSES)
    ranking = RankingCounts.from_arrays(targets, scores, CLASSES)
    pairs = CooccurrenceCounts.from_arrays(targets, predicted, CLASSES)
    assert found.per_class.equals(build_multilabel_per_class(counts, ranking))
    assert found.pr_curves.equals(build_pr_curves(ranking))
    assert found.cooccurrence.equals(build_cooccurrence_table(pairs))
    assert found.calibration.equals(build_calibration_table(ranking))


def test_mistakes_are_the_worst_of_each_class(
    run: Path, targets: np.ndarray, scores: np.ndarray, predicted: np.ndarray
) -> None:
    found = evaluate(run, gallery=12).mistakes.to_pylist()
    number = ((targets > 0) != predicted).sum(0)
    assert list(dict.fromkeys(row["label"] for row in found)) == [
        CLASSES[code] for code in np.argsort(-number, kind="stable")
    ]
    for code, name in enumerate(CLASSES):
        for given, sign in ((False, -1), (True, 1)):
            rows = [row for row in found if row["label"] == name and row["given"] == given]
            wrong = np.flatnonzero((targets[:, code] == given) & (predicted[:, code] != given))
            own = scores[wrong, code].astype(float)
            worst = wrong[np.lexsort((wrong, sign * own))][:3]
            assert [row["row"] for row in rows] == worst.tolist()
            assert [row["score"] for row in rows] == scores[worst, code].astype(float).tolist()
    first = found[0]
    assert first["labels"] == [CLASSES[c] for c in np.flatnonzero(targets[first["row"]])]
    assert set(first["predicted_labels"]) == {
        CLASSES[c] for c in np.flatnonzero(predicted[first["row"]])
    }


def test_label_issues_are_cells_that_the_scores_contradict(
    run: Path, targets: np.ndarray, scores: np.ndarray
) -> None:
    found = evaluate(run)
    exact = scores.astype(np.float64)
    expected = {}
    for code, name in enumerate(CLASSES):
        is_given = targets[:, code] > 0
        with_label, without = exact[is_given, code].mean(), exact[~is_given, code].mean()
        for row in np.flatnonzero(~is_given & (exact[:, code] >= with_label)):
            expected[row, name] = (False, with_label, 2 * exact[row, code] - 1)
        for row in np.flatnonzero(is_given & (exact[:, code] <= without)):
            expected[row, name] = (True, without, 1 - 2 * exact[row, code])
    rows = found.label_issues.to_pylist()
    assert {(row["row"], row["label"]) for row in rows} == set(expected)
    for row in rows:
        given, threshold, margin = expected[row["row"], row["label"]]
        assert row["given"] == given
        assert row["threshold"] == pytest.approx(threshold)
        assert row["margin"] == pytest.approx(margin)
    margins = [row["margin"] for row in rows]
    assert margins == sorted(margins, reverse=True)
    assert found.issue_rows["row"].to_pylist() == [row["row"] for row in rows[:24]]


def test_slices_equal_evaluations_of_their_rows(
    run: Path, targets: np.ndarray, predicted: np.ndarray
) -> None:
    found = evaluate(run, slice_by=["camera"], small_slice=501).slices
    assert found.num_rows == 3
    assert found["small"].to_pylist() == [True] * 3
    for row in found.to_pylist():
        members = np.arange(ROWS) % 3 == int(row["value"][-1])
        expected = sk.f1_score(targets[members], predicted[members], average="micro")
        assert row["f1_micro"] == pytest.approx(expected)
        assert row["f1_micro_lower"] < expected < row["f1_micro_upper"]
        assert row["rows"] == members.sum()
    assert found["f1_micro"].to_pylist() == sorted(found["f1_micro"].to_pylist())


def test_partial_labels_leave_unknown_cells_out(
    tmp_path: Path, targets: np.ndarray, scores: np.ndarray, predicted: np.ndarray
) -> None:
    rng = np.random.default_rng(3)
    partial = np.where(rng.random(targets.shape) < 0.3, -1, targets).astype(np.int8)
    table = build_run_table(partial, scores, labels="columns", scores_type="float32")
    columns = LabelColumns(per_class=CLASSES)
    found = evaluate(commit_multilabel(tmp_path / "out", table, labels=columns))
    for code, row in enumerate(found.per_class.to_pylist()):
        known = partial[:, code] >= 0
        own, called = targets[known, code], predicted[known, code]
        assert row["recall"] == pytest.approx(sk.recall_score(own, called))
        assert row["precision"] == pytest.approx(sk.precision_score(own, called))
        average = sk.average_precision_score(own, scores[known, code].astype(float))
        assert row["average_precision"] == pytest.approx(average)
    codes = {name: code for code, name in enumerate(CLASSES)}
    for row in found.label_issues.to_pylist():
        assert partial[row["row"], codes[row["label"]]] == row["given"]
    for row in found.mistakes.to_pylist():
        unknown = {CLASSES[c] for c in np.flatnonzero(partial[row["row"]] < 0)}
        assert set(row["unknown_labels"]) == unknown & set(row["predicted_labels"])


def test_failed_and_unlabeled_rows_are_counted(
    tmp_path: Path, targets: np.ndarray, scores: np.ndarray
) -> None:
    table = build_run_table(targets, scores, failed=0.1, unlabeled=0.2, ood=True)
    found = evaluate(commit_multilabel(tmp_path / "out", table), slice_by=["camera"])
    ok = np.array(table["status"].to_pylist()) == "ok"
    labeled = table["labels"].is_valid().to_numpy()
    value = {metric.name: metric.value for metric in found.metrics}
    assert value["rows"] == ROWS
    assert value["status_missing"] == (~ok).sum()
    assert value["labelled"] == (ok & labeled).sum()
    assert value["unlabelled"] == (ok & ~labeled).sum()
    assert sum(found.slices["labelled"].to_pylist()) == value["labelled"]
    ood = table["ood_score"].to_numpy(zero_copy_only=False)
    order = np.argsort(-np.where(ok, ood, -1), kind="stable")[:24]
    assert found.strangest["row"].to_pylist() == order.tolist()
    assert "given" not in found.strangest.schema.names


def test_the_metrics_on_a_cluster_are_those_of_one_process(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = evaluate(run, slice_by=["camera"])
    monkeypatch.setattr(aggregate_module, "MAX_LOCAL_ROWS", 0)
    monkeypatch.setattr(aggregate_module, "PIECE_ROWS", 500)
    cluster = evaluate(run, slice_by=["camera"])
    tables = cluster.build_tables()
    for name, table in local.build_tables().items():
        pd.testing.assert_frame_equal(tables[name].to_pandas(), table.to_pandas())
    assert cluster.mistakes.equals(local.mistakes)
    for here, there in zip(local.metrics, cluster.metrics, strict=True):
        assert there.value == pytest.approx(here.value)


def test_a_run_without_labels_has_counts_of_its_predictions(
    tmp_path: Path, targets: np.ndarray, scores: np.ndarray
) -> None:
    table = build_run_table(targets, scores, labels=None)
    run = commit_multilabel(tmp_path / "out", table, labels=None)
    found = evaluate(run, need_labels=False, slice_by=["camera"])
    assert not found.has_labels
    assert found.get_metric("f1_micro") is None
    assert found.get_metric("predicted_labels_per_row") is not None
    assert found.omitted[0].startswith("All metrics that need labels")
    for name in ("mistakes", "label_issues", "pr_curves", "cooccurrence"):
        assert getattr(found, name).num_rows == 0
    with pytest.raises(RequestError, match="has no labels; join some with --labels TABLE"):
        evaluate(run)


def test_a_run_of_no_rows(tmp_path: Path) -> None:
    targets = draw_targets(10)
    table = build_run_table(targets, draw_scores(targets)).slice(0, 0)
    run = commit_multilabel(tmp_path / "out", table)
    found = evaluate(run, need_labels=False)
    assert found.counts.rows == 0
    assert "Predictions of 0 images" in found._repr_html_()
    with pytest.raises(RequestError, match="none of its 0 predictions has a label"):
        evaluate(run)


def test_one_label_per_image_is_read_as_a_list_of_one(
    tmp_path: Path, scores: np.ndarray, predicted: np.ndarray
) -> None:
    truth = np.arange(ROWS) % len(CLASSES)
    targets = np.eye(len(CLASSES), dtype=np.int8)[truth]
    table = build_run_table(targets, scores, labels=None)
    table = table.append_column("kind", pa.array([CLASSES[code] for code in truth]))
    run = commit_multilabel(tmp_path / "out", table, labels=None)
    place = run / "_run.json"
    body = json.loads(place.read_text())
    body["identity"]["manifest"]["label_column"] = "kind"
    place.write_text(json.dumps(body))
    metric = evaluate(run).get_metric("f1_micro")
    assert metric is not None
    assert metric.value == pytest.approx(sk.f1_score(targets, predicted, average="micro"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("class", "come from another model"),
        ("scores", "column 'scores': a score is outside"),
        ("null scores", "column 'scores' is null in a row with status ok"),
        ("lists", "rows have status ok but no predicted_labels"),
        ("label", "column 'cat' has the value 7; expected 1, 0"),
    ],
)
def test_damaged_tables_are_refused(tmp_path: Path, damage: str, message: str) -> None:
    targets = draw_targets(50)
    table = build_run_table(targets, draw_scores(targets), labels="columns")
    columns = LabelColumns(per_class=CLASSES)

    def replace(name: str, column: pa.Array) -> pa.Table:
        return table.set_column(table.schema.get_field_index(name), name, column)

    if damage == "class":
        table = replace("predicted_labels", pa.array([["whale"]] * 50))
    elif damage == "scores":
        flat = pa.array(np.full(50 * 5, 1.5, np.float16))
        table = replace("scores", pa.FixedSizeListArray.from_arrays(flat, 5))
    elif damage == "null scores":
        kind = table.schema.field("scores").type
        table = replace("scores", pa.nulls(50, kind))
    elif damage == "lists":
        table = replace("predicted_labels", pa.nulls(50, pa.list_(pa.string())))
    else:
        table = replace("cat", pa.array([7] * 50))
    run = commit_multilabel(tmp_path / "out", table, labels=columns)
    with pytest.raises(RequestError, match=message):
        evaluate(run)


def test_slices_need_columns_of_single_values(run: Path) -> None:
    with pytest.raises(RequestError, match="column 'labels' is list"):
        evaluate(run, slice_by=["labels"])
    with pytest.raises(RequestError, match="has no column 'site'"):
        evaluate(run, slice_by=["site"])


def test_the_command_writes_tables_summary_and_report(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "evaluated"
    found = imgcls.evaluate(
        predictions=str(run), output=str(output), slice_by="camera", thumbnails=False
    )
    assert isinstance(found, MultiLabelEvaluation)
    names = {path.stem for path in (output / "metrics").iterdir()}
    assert names == {
        *("summary", "per_class", "pr_curves", "cooccurrence", "calibration", "slices"),
        "label_issues",
    }
    assert pq.read_table(output / "metrics" / "per_class.parquet").equals(found.per_class)
    summary = json.loads((output / "summary.json").read_text())
    metric = found.get_metric("mean_average_precision")
    assert metric is not None
    assert summary["metrics"]["mean_average_precision"]["value"] == metric.value
    assert summary["label_issues"] == found.label_issues.num_rows
    assert summary["rows"] == ROWS
    assert (output / "report.html").exists()


def test_a_history_without_scores_of_one_length_has_counts_alone(
    tmp_path: Path, targets: np.ndarray, scores: np.ndarray, predicted: np.ndarray
) -> None:
    table = build_run_table(targets, scores)
    index = table.schema.get_field_index("scores")
    lists = table["scores"].cast(pa.list_(pa.float16()))
    run = commit_multilabel(tmp_path / "out", table.set_column(index, "scores", lists))
    found = evaluate(run)
    metric = found.get_metric("f1_macro")
    assert metric is not None
    assert metric.value == pytest.approx(sk.f1_score(targets, predicted, average="macro"))
    assert found.get_metric("mean_average_precision") is None
    assert "need the scores of all classes" in found.omitted[0]
    assert found.mistakes.num_rows == found.label_issues.num_rows == 0
    assert found.cooccurrence.num_rows > 0
    assert "Co-occurrence" in found.render(in_notebook=False)


def test_the_embedding_map_shows_the_class_with_the_highest_score(
    tmp_path: Path, targets: np.ndarray, scores: np.ndarray
) -> None:
    table = build_run_table(targets, scores, failed=0.1, embedding=True)
    found = evaluate(commit_multilabel(tmp_path / "out", table)).embedding_map
    assert found is not None
    ok = table["status"].cast(pa.string()).to_numpy(zero_copy_only=False) == "ok"
    best = [CLASSES[code] for code in scores.astype(np.float32).argmax(1)[ok]]
    assert found.predicted == best
    assert {cluster.accuracy for cluster in found.clusters} == {None}
