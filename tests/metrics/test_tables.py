from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn import metrics as sk

from imgcls.metrics import PredictionCounts, expected_calibration_error, tables
from imgcls.metrics.formatting import format_summary

CLASSES = [f"class {i}" for i in range(9)]

# name: classes, options of make_predictions
RUNS = {
    "clean": (CLASSES, {}),
    "absent classes": (CLASSES, {"occurring": CLASSES[:4], "skill": 4.0}),
    "never predicted": (CLASSES, {"rows": 6}),
    "mixed": (CLASSES, {"failed": 0.1, "unlabeled": 0.2, "unknown": 0.1}),
    "guesses": (CLASSES, {"skill": -3.0}),
    "one class": (["only"], {}),
}


def count(table, classes=CLASSES, label_column="label"):
    return PredictionCounts.from_table(table, label_column=label_column, classes=classes)


@pytest.fixture(params=RUNS)
def run(request, make_predictions):
    """A table, its counts, and the labeled rows as a frame for scikit-learn."""
    classes, options = RUNS[request.param]
    table = make_predictions(**{"rows": 1500, "seed": 5, "classes": classes} | options)
    frame = table.to_pandas()
    frame = frame[(frame.status == "ok") & frame.label.isin(classes)]
    return table, count(table, classes), frame


@pytest.fixture(scope="module")
def unlabeled(make_predictions):
    table = make_predictions(500, CLASSES, failed=0.1)
    return count(table.drop_columns(["label", "label_score", "label_rank"]), label_column=None)


def values(counts, top_k=1):
    table = tables.compute_summary(counts, top_k=top_k)
    return dict(zip(table["metric"].to_pylist(), table["value"].to_pylist(), strict=True))


def test_the_summary_agrees_with_scikit_learn(run):
    _, counts, frame = run
    true, predicted = frame.label.to_numpy(), frame.predicted_label.to_numpy()
    got = values(counts, top_k=3)
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(true, predicted))
    present = sorted(set(true) | set(predicted))
    macro = sk.precision_recall_fscore_support(
        true, predicted, labels=present, average="macro", zero_division=0
    )
    assert [got["precision_macro"], got["recall_macro"], got["f1_macro"]] == pytest.approx(
        list(macro[:3])
    )
    weighted = sk.f1_score(true, predicted, average="weighted", zero_division=0)
    assert got["f1_weighted"] == pytest.approx(weighted)
    recalls = sk.recall_score(true, predicted, labels=sorted(set(true)), average="macro")
    assert got["balanced_accuracy"] == pytest.approx(recalls)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_balanced_accuracy_is_that_of_scikit_learn(run):
    _, counts, frame = run
    expected = sk.balanced_accuracy_score(frame.label.to_numpy(), frame.predicted_label.to_numpy())
    assert values(counts)["balanced_accuracy"] == pytest.approx(expected)


def test_top_k_accuracy_and_log_loss_follow_from_rank_and_score(run):
    _, counts, frame = run
    got = values(counts, top_k=3)
    assert got["top_3_accuracy"] == pytest.approx((frame.label_rank <= 3).mean())
    assert got["log_loss"] == pytest.approx(-np.log(frame.label_score.astype(float)).mean())
    assert got["accuracy"] <= got["top_3_accuracy"] <= values(counts, top_k=20)["top_20_accuracy"]


def test_log_loss_and_top_k_accuracy_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    scores = rng.dirichlet(np.ones(5), 400)
    true = rng.integers(0, 5, 400)
    label_score = scores[np.arange(400), true]
    names = [f"{i}" for i in range(5)]
    table = pa.table(
        {
            "label": [names[i] for i in true],
            "predicted_label": [names[i] for i in scores.argmax(axis=1)],
            "confidence": scores.max(axis=1),
            "accepted": [True] * 400,
            "label_score": label_score,
            "label_rank": 1 + (scores > label_score[:, None]).sum(axis=1),
            "status": ["ok"] * 400,
        }
    )
    got = values(count(table, names), top_k=2)
    assert got["log_loss"] == pytest.approx(sk.log_loss(true, scores))
    assert got["top_2_accuracy"] == pytest.approx(sk.top_k_accuracy_score(true, scores, k=2))


def test_the_calibration_error_is_that_of_the_rows(run):
    _, counts, frame = run
    confidence = frame.confidence.to_numpy()
    correct = (frame.label == frame.predicted_label).to_numpy()
    got = values(counts)["expected_calibration_error"]
    assert got == pytest.approx(expected_calibration_error(confidence, correct), abs=1e-12)


def test_coverage_and_accepted_accuracy_follow_the_threshold(run):
    table, counts, frame = run
    ok = table.to_pandas().query("status == 'ok'")
    got = values(counts)
    assert got["coverage"] == pytest.approx(ok.accepted.mean())
    assert got["mean_confidence"] == pytest.approx(ok.confidence.mean(), rel=1e-5)
    taken = frame[frame.accepted.astype(bool)]
    if len(taken):
        right = (taken.label == taken.predicted_label).mean()
        assert got["accepted_accuracy"] == pytest.approx(right)
    else:
        assert "accepted_accuracy" not in got


def test_failed_unlabeled_and_unknown_rows_are_distinguished(make_predictions):
    table = make_predictions(900, CLASSES, failed=0.1, unlabeled=0.2, unknown=0.1)
    counts = count(table)
    got = values(counts)
    assert got["rows"] == 900
    assert got["ok"] == counts.ok
    assert got["status_missing"] + got["status_truncated"] == counts.error_rows
    assert got["error_rate"] == counts.error_rows / 900
    assert got["labelled"] + got["unlabelled"] + got["unknown_label"] == got["ok"]


def test_what_did_not_happen_is_not_listed(make_predictions):
    got = values(count(make_predictions(50, CLASSES)))
    assert not {"unlabelled", "unknown_label", "status_missing"} & set(got)
    assert not [name for name in got if name.startswith("top_")]  # top_k is 1


def test_an_unlabeled_run_has_no_label_metrics_rather_than_nan(unlabeled):
    statuses = ["status_missing", "status_truncated"]
    without_labels = ["labelled", "unlabelled", "mean_confidence", "coverage"]
    assert list(values(unlabeled, top_k=5)) == [
        "rows",
        "ok",
        *statuses,
        "error_rate",
        *without_labels,
    ]


def test_no_rows_at_all_still_make_tables():
    empty = PredictionCounts.empty(CLASSES)
    assert values(empty) == {"rows": 0, "ok": 0, "labelled": 0}
    assert tables.build_confusion(empty).num_rows == 0
    assert tables.build_per_class(empty)["share"].null_count == len(CLASSES)
    assert tables.build_calibration(empty)["count"].to_pylist() == [0] * 15


def test_top_k_must_be_a_rank_that_counts_keep(unlabeled):
    for top_k in (0, 21):
        with pytest.raises(ValueError, match="from 1 to 20"):
            tables.compute_summary(unlabeled, top_k=top_k)


def test_no_table_holds_a_nan_and_every_schema_is_fixed(run, unlabeled, tmp_path):
    _, counts, _ = run
    for make in (
        lambda c: tables.compute_summary(c, top_k=5),
        tables.build_per_class,
        tables.build_confusion,
        tables.build_calibration,
    ):
        assert make(counts).schema == make(unlabeled).schema
        for table in (make(counts), make(unlabeled)):
            for column in table.columns:
                if pa.types.is_floating(column.type):
                    assert np.isfinite(column.drop_null().to_numpy()).all()
            pq.write_table(table, tmp_path / "table.parquet")
            assert pq.read_table(tmp_path / "table.parquet").equals(table)


def test_per_class_rates_are_those_of_scikit_learn_and_null_where_undefined(run):
    _, counts, frame = run
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        frame.label.to_numpy(),
        frame.predicted_label.to_numpy(),
        labels=list(counts.classes),
        zero_division=np.nan,
    )
    got = tables.build_per_class(counts)
    assert got["label"].to_pylist() == list(counts.classes)
    assert got["support"].to_pylist() == support.tolist()
    for name, expected in (("precision", precision), ("recall", recall), ("f1", f1)):
        np.testing.assert_allclose(got[name].to_numpy(), expected, err_msg=name)
    assert sum(got["true_positive"].to_pylist()) == counts.correct


def test_per_class_of_an_unlabeled_run_counts_predictions(unlabeled):
    got = tables.build_per_class(unlabeled)
    for name in ("support", "true_positive", "precision", "recall", "f1"):
        assert got[name].null_count == len(CLASSES), name
    assert sum(got["predicted"].to_pylist()) == unlabeled.ok
    assert sum(got["share"].to_pylist()) == pytest.approx(1)
    assert got["mean_confidence"].null_count == 0


@pytest.mark.filterwarnings("ignore:A single label was found")
def test_the_confusion_table_is_the_matrix_without_its_zeros(run):
    _, counts, frame = run
    matrix = sk.confusion_matrix(
        frame.label.to_numpy(), frame.predicted_label.to_numpy(), labels=list(counts.classes)
    )
    got = tables.build_confusion(counts)
    cells = {(row["label"], row["predicted_label"]): row["count"] for row in got.to_pylist()}
    assert cells == {
        (counts.classes[i], counts.classes[j]): matrix[i, j] for i, j in np.argwhere(matrix)
    }
    order = [(-row["count"], row["label"], row["predicted_label"]) for row in got.to_pylist()]
    assert order == sorted(order)


def test_calibration_bins_count_the_labeled_rows(run):
    _, counts, frame = run
    got = tables.build_calibration(counts).to_pandas()
    confidence = frame.confidence.to_numpy(np.float64)
    expected, edges = np.histogram(confidence, np.linspace(0, 1, 16))
    assert got["count"].tolist() == expected.tolist()
    assert [*got.bin_lower, got.bin_upper.iloc[-1]] == edges.tolist()
    filled = got[got["count"] > 0]
    assert (filled["count"] * filled.accuracy).sum() == pytest.approx(counts.correct)
    assert (filled.mean_confidence >= filled.bin_lower - 1e-9).all()
    assert (filled.mean_confidence <= filled.bin_upper + 1e-9).all()
    assert got[got["count"] == 0].accuracy.isna().all()


def test_calibration_of_an_unlabeled_run_is_its_confidence_histogram(unlabeled):
    got = tables.build_calibration(unlabeled)
    assert sum(got["count"].to_pylist()) == unlabeled.ok
    assert got["accuracy"].null_count == got.num_rows == 15


def test_every_summary_is_short_and_fits_a_terminal(run, unlabeled):
    _, counts, _ = run
    for each in (counts, unlabeled):
        lines = format_summary(tables.compute_summary(each, top_k=5)).splitlines()
        assert max(map(len, lines)) <= 100
        assert len(lines) <= 12
        assert "nan" not in "\n".join(lines)
