"""Evaluation of a committed run: every metric against scikit-learn, and clear errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sklearn import metrics as sk

from imgcls.errors import ManifestError, OutputError, RequestError
from imgcls.evaluation import aggregate as aggregate_module
from imgcls.evaluation.aggregate import AggregateSpec, RunAggregate
from imgcls.evaluation.compute import compute_evaluation
from imgcls.evaluation.config import EvaluationOptions, LabelTableConfig
from imgcls.metrics import tables
from imgcls.metrics.intervals import wilson_interval
from imgcls.metrics.tables import Metric
from imgcls.runs import layout
from tests.conftest import write_manifest
from tests.evaluation.runs import CLASSES, commit, drawn


def labeled_rows(table: pa.Table) -> pd.DataFrame:
    frame = table.to_pandas()
    return frame[(frame.status == "ok") & frame.label.isin(CLASSES)]


def test_every_metric_equals_scikit_learns(table: pa.Table, run: Path) -> None:
    found = compute_evaluation(str(run), EvaluationOptions(thumbnails=False), need_labels=True)
    rows = labeled_rows(table)
    y, p = rows.label, rows.predicted_label
    scores = np.stack(rows.scores.to_list()).astype(np.float64)
    codes = rows.label.map(CLASSES.index).to_numpy()
    one_hot = np.eye(len(CLASSES))[codes]
    macro: dict[str, Any] = {"average": "macro", "zero_division": 0}
    expected = {
        "accuracy": sk.accuracy_score(y, p),
        "balanced_accuracy": sk.balanced_accuracy_score(y, p),
        "precision_macro": sk.precision_score(y, p, **macro),
        "recall_macro": sk.recall_score(y, p, **macro),
        "f1_macro": sk.f1_score(y, p, **macro),
        "f1_micro": sk.f1_score(y, p, average="micro"),
        "precision_weighted": sk.precision_score(y, p, average="weighted", zero_division=0),
        "f1_weighted": sk.f1_score(y, p, average="weighted"),
        "matthews_correlation": sk.matthews_corrcoef(y, p),
        "cohens_kappa": sk.cohen_kappa_score(y, p),
        "log_loss": -np.log(np.maximum(rows.label_score.astype(float), 1e-12)).mean(),
        "brier_score": ((scores - one_hot) ** 2).sum(1).mean(),
        "top_3_accuracy": sk.top_k_accuracy_score(
            codes, scores - 1e-9 * np.arange(len(CLASSES)), k=3, labels=range(len(CLASSES))
        ),
        "auroc_macro": np.mean([sk.roc_auc_score(one_hot[:, c], scores[:, c]) for c in range(5)]),
        "average_precision_macro": sk.average_precision_score(one_hot, scores, average="macro"),
    }
    got = {metric.name: metric for metric in found.metrics}
    for name, value in expected.items():
        assert got[name].value == pytest.approx(value, abs=1e-9), name
        low, high = got[name].interval or (None, None)
        assert low is not None, name
        assert low < value < high, name
    per_class = found.per_class.to_pandas().set_index("label")
    for c, name in enumerate(CLASSES):
        assert per_class.recall[name] == pytest.approx(sk.recall_score(y == name, p == name))
        assert per_class.recall_lower[name] < per_class.recall[name] < per_class.recall_upper[name]
        auroc = sk.roc_auc_score(one_hot[:, c], scores[:, c])
        assert per_class.auroc[name] == pytest.approx(auroc, abs=1e-9)
    assert (
        found.aggregate.counts.unknown_label
        == ((table.to_pandas().status == "ok") & (table.to_pandas().label == "unknown")).sum()
    )


def test_a_slice_has_the_numbers_of_its_rows_alone(table: pa.Table, run: Path) -> None:
    found = compute_evaluation(str(run), EvaluationOptions(slice_by="camera"), need_labels=True)  # type: ignore[arg-type]
    rows = labeled_rows(table)
    slices = found.slices.to_pandas()
    assert slices.accuracy.is_monotonic_increasing
    for each in slices.itertuples():
        mine = rows[rows.camera == each.value]
        assert each.labelled == len(mine)
        assert each.accuracy == pytest.approx((mine.label == mine.predicted_label).mean())
        f1 = sk.f1_score(mine.label, mine.predicted_label, average="macro")
        assert each.f1_macro == pytest.approx(f1)
    assert not slices.small.any()


def test_columns_that_labeling_adds_make_slices_too(table: pa.Table, run: Path) -> None:
    names = ["label", "predicted_label", "status", "accepted"]
    found = compute_evaluation(str(run), EvaluationOptions(slice_by=names), need_labels=True)
    slices = found.slices.to_pandas()
    rows, all_rows = labeled_rows(table), table.to_pandas()
    for name in names:
        mine = slices[slices.slice_by == name].set_index("value")
        values = all_rows[name].map(lambda v: str(v).lower() if isinstance(v, bool) else v)
        assert mine.rows.to_dict() == values.fillna("(none)").value_counts().to_dict()
        of_slice = rows.assign(value=values).groupby("value")
        accuracy = of_slice.apply(lambda part: (part.label == part.predicted_label).mean())
        assert mine.accuracy.dropna().to_dict() == pytest.approx(accuracy.to_dict())
        assert mine.labelled.to_dict() == {
            value: int((rows.assign(value=values).value == value).sum()) for value in mine.index
        }
    assert slices[slices.value == "missing"].error_rate.tolist() == [1.0]


@pytest.mark.parametrize("rows", [1, 20])
def test_intervals_of_correct_rows_only_are_possible_and_not_empty(
    tmp_path: Path, rows: int
) -> None:
    table = drawn(rows, 1, sharpness=100.0)
    found = compute_evaluation(
        str(commit(tmp_path / "out", table)), EvaluationOptions(), need_labels=True
    )
    assert found.aggregate.counts.correct == rows
    highest = {"log_loss": np.inf, "brier_score": 2.0}
    for metric in found.metrics:
        if metric.interval is not None:
            low, high = metric.interval
            lowest = -1.0 if metric.name in ("matthews_correlation", "cohens_kappa") else 0.0
            assert lowest <= low <= metric.value <= high <= highest.get(metric.name, 1.0)
            assert high - low > 1 / (rows + 100), metric.name
    area = found.get_metric("area_under_risk_coverage")
    assert area is not None
    assert area.interval == pytest.approx((0, 1 - wilson_interval(rows, rows)[0]))


def population(
    rng: np.random.Generator, rows: int, prior: list[float], skill: float
) -> RunAggregate:
    """A run of a model of some skill, classes drawn by `prior`."""
    size, names = len(prior), np.array([f"c{i}" for i in range(len(prior))])
    truth = rng.choice(size, rows, p=prior)
    logits = 2 * rng.normal(size=(rows, size))
    logits[np.arange(rows), truth] += skill
    scores = np.exp(logits - logits.max(1, keepdims=True))
    scores = (scores / scores.sum(1, keepdims=True)).astype(np.float16)
    exact = scores.astype(np.float32)
    aggregate = RunAggregate(AggregateSpec(tuple(names), "label", scores=True))
    table = pa.table(
        {
            "label": names[truth],
            "predicted_label": names[exact.argmax(1)],
            "confidence": exact.max(1),
            "accepted": np.ones(rows, bool),
            "label_score": exact[np.arange(rows), truth],
            "label_rank": pa.array(np.ones(rows), pa.int32()),
            "status": ["ok"] * rows,
            "scores": pa.FixedSizeListArray.from_arrays(pa.array(scores.ravel()), size),
        }
    )
    aggregate.add(table, 0, 0)
    return aggregate


def compute_all(aggregate: RunAggregate, resamples: int) -> list[Metric]:
    return tables.compute_metrics(
        aggregate.counts,
        top_k=1,
        selective=aggregate.selective,
        scores=aggregate.scores,
        resamples=resamples,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "prior", "skill"),
    [
        (20, [0.5, 0.5], 6.0),
        (300, [0.7, 0.3], 2.0),
        (300, [0.5, 0.3, 0.2], 3.0),
        (200, [0.95, 0.05], 6.0),
    ],
)
def test_intervals_hold_the_truth_in_nine_of_ten_runs_or_more(
    rows: int, prior: list[float], skill: float
) -> None:
    rng = np.random.default_rng(7)
    large = compute_all(population(rng, 400_000, prior, skill), 0)
    truth = {each.name: each.value for each in large}
    held: dict[str, list[bool]] = {}
    for _ in range(100):
        for each in compute_all(population(rng, rows, prior, skill), 60):
            if each.interval is not None and truth[each.name] not in (0.0, 1.0):
                low, high = each.interval
                held.setdefault(each.name, []).append(low <= truth[each.name] <= high)
    # 95% minus three standard deviations of 100 runs
    short = {name: np.mean(hits) for name, hits in held.items() if np.mean(hits) < 0.885}
    assert not short
    assert len(held) >= 15


def test_worst_mistakes_and_contradicted_labels_are_found(tmp_path: Path) -> None:
    table = drawn(2000, 5, sharpness=9.0)
    labels = table["label"].to_pylist()
    planted = list(range(0, 2000, 100))
    for i in planted:
        labels[i] = CLASSES[(CLASSES.index(labels[i]) + 1) % 5]
    codes = np.array([CLASSES.index(label) for label in labels])
    scores = np.stack(table.to_pandas().scores.to_list()).astype(np.float32)
    own = scores[np.arange(2000), codes]
    for name, values in (("label", pa.array(labels)), ("label_score", pa.array(own))):
        table = table.set_column(table.schema.get_field_index(name), name, values)
    found = compute_evaluation(
        str(commit(tmp_path / "out", table)), EvaluationOptions(), need_labels=True
    )
    rows = found.label_issues["row"].to_pylist()
    top = rows[: len(planted)]
    assert len(set(top) & set(planted)) >= 18  # of 20: a drawn model is wrong now and then
    margins = found.label_issues["margin"].to_pylist()
    assert margins == sorted(margins, reverse=True)
    wrong = table.filter(pa.array(np.array(labels) != np.array(table["predicted_label"])))
    worst = wrong.sort_by([("confidence", "descending"), ("row", "ascending")])["row"][:24]
    assert found.mistakes["row"].to_pylist() == worst.to_pylist()
    least = table.sort_by([("confidence", "ascending"), ("row", "ascending")])["row"][:24]
    assert found.uncertain["row"].to_pylist() == least.to_pylist()


def test_ray_data_counts_what_one_process_counts(
    joined: None, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EvaluationOptions(slice_by="camera")  # type: ignore[arg-type]
    here = compute_evaluation(str(run), config, need_labels=True)
    monkeypatch.setattr(aggregate_module, "MAX_LOCAL_ROWS", 0)
    monkeypatch.setattr(aggregate_module, "PIECE_ROWS", 500)
    there = compute_evaluation(str(run), config, need_labels=True)
    assert "counted 3,000 of 3,000 rows" in capsys.readouterr().out
    for one, other in zip(here.metrics, there.metrics, strict=True):
        assert one.name == other.name
        assert one.value == pytest.approx(other.value, abs=1e-12)
        assert one.interval == pytest.approx(other.interval, abs=1e-9)
    for name in ("mistakes", "uncertain", "label_issues", "per_class"):
        assert getattr(here, name).equals(getattr(there, name)), name


# ------------------------------------------------------------------ errors


def test_a_missing_or_uncommitted_run_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"\(no _run.json\)"):
        compute_evaluation(str(tmp_path), EvaluationOptions(), need_labels=True)
    folder = commit(tmp_path / "out", drawn(20))
    (folder / layout.SUCCESS_FILE).unlink()
    with pytest.raises(OutputError, match="is not committed"):
        compute_evaluation(str(folder), EvaluationOptions(), need_labels=True)


def test_a_missing_file_of_a_run_is_reported(tmp_path: Path) -> None:
    folder = commit(tmp_path / "out", drawn(20), parts=2)
    (folder / "predictions" / "part-00001.parquet").unlink()
    with pytest.raises(OutputError, match=r"lacks part-00001.parquet"):
        compute_evaluation(str(folder), EvaluationOptions(), need_labels=True)


def test_missing_columns_are_named(run: Path, tmp_path: Path) -> None:
    config = EvaluationOptions(slice_by="site")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"slice_by: .* no column 'site' \(found: path, label"):
        compute_evaluation(str(run), config, need_labels=True)
    lists = EvaluationOptions(slice_by=["topk_labels"])
    with pytest.raises(RequestError, match="'topk_labels' is list"):
        compute_evaluation(str(run), lists, need_labels=True)
    late = write_manifest(tmp_path / "late.csv", [("a", "ant")], ("file", "label"))
    with pytest.raises(ManifestError, match="no column 'path'"):
        compute_evaluation(
            str(run), EvaluationOptions(labels=LabelTableConfig(path=str(late))), need_labels=True
        )


def test_columns_of_a_manifest_that_are_named_like_new_outputs_are_no_outputs(
    tmp_path: Path,
) -> None:
    """Versions before 0.2 let a manifest have them."""
    table = drawn(50)
    table = table.append_column("is_ood", pa.array(["no"] * 50))
    table = table.append_column("label_set", pa.array(["mine"] * 50))
    run = commit(tmp_path / "run", table)
    found = compute_evaluation(str(run), EvaluationOptions(slice_by=["is_ood"]), need_labels=True)
    assert found.slices["value"].to_pylist() == ["no"]
    for name in ("ood_rate", "set_coverage"):
        assert found.get_metric(name) is None
    assert not found.run.has_ood
    assert not found.run.has_label_sets
