"""Judging a committed run: every number against scikit-learn, and clear refusals."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn import metrics as sk

from imgcls.config import build
from imgcls.errors import ConfigError, ManifestError, OutputError, RequestError
from imgcls.evaluation import count as counting
from imgcls.evaluation.aggregate import AggregateSpec, RunAggregate
from imgcls.evaluation.compare import CompareConfig, compare
from imgcls.evaluation.compute import EvaluationOptions, compute_evaluation
from imgcls.evaluation.compute import _compute_score_metrics as more_metrics
from imgcls.evaluation.evaluate import EvaluateConfig, evaluate
from imgcls.evaluation.label_join import JoinedLabels, LabelTableConfig
from imgcls.metrics import tables
from imgcls.metrics.intervals import wilson_interval
from imgcls.metrics.tables import Metric
from imgcls.runs import layout
from imgcls.runs.committed import open_run
from tests.conftest import write_manifest
from tests.evaluation.runs import CLASSES, commit, drawn


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return drawn(3000, 1, failed=0.05, unlabelled=0.1, unknown=0.05, sharpness=1.5)


@pytest.fixture(scope="module")
def run(table: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return commit(tmp_path_factory.mktemp("runs") / "out", table, parts=3, group_rows=200)


def judged(table: pa.Table) -> pd.DataFrame:
    frame = table.to_pandas()
    return frame[(frame.status == "ok") & frame.label.isin(CLASSES)]


def test_every_number_is_scikit_learns(table: pa.Table, run: Path) -> None:
    found = compute_evaluation(str(run), EvaluationOptions(thumbnails=False), need_labels=True)
    rows = judged(table)
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
        == (
            (table.to_pandas().status == "ok") & (table.to_pandas().label == "never heard of")
        ).sum()
    )


def test_a_slice_has_the_numbers_of_its_rows_alone(table: pa.Table, run: Path) -> None:
    found = compute_evaluation(str(run), EvaluationOptions(slice_by="camera"), need_labels=True)  # type: ignore[arg-type]
    rows = judged(table)
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
    rows, all_rows = judged(table), table.to_pandas()
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


def test_labels_that_came_later_make_slices(tmp_path: Path) -> None:
    table = drawn(300, 1)
    blind = table.drop_columns(["label", "label_score", "label_rank"])
    run = commit(tmp_path / "blind", blind, label_column=None)
    rows = list(zip(table["path"].to_pylist(), table["label"].to_pylist(), strict=True))
    late = write_manifest(tmp_path / "late.csv", rows, ("path", "label"))
    labels = LabelTableConfig(path=str(late))
    config = EvaluationOptions(labels=labels, slice_by=["label"])
    slices = compute_evaluation(str(run), config, need_labels=True).slices
    counted = dict(zip(slices["value"].to_pylist(), slices["labelled"].to_pylist(), strict=True))
    assert counted == dict(Counter(table["label"].to_pylist()))
    compared = compare(
        CompareConfig(run_a=str(run), run_b=str(run), labels=labels, slice_by=["label"])
    )
    counted = {row["value"]: row["rows"] for row in compared.slices.to_pylist()}
    assert counted == dict(Counter(table["label"].to_pylist()))


@pytest.mark.parametrize("rows", [1, 20])
def test_right_rows_alone_have_possible_intervals(tmp_path: Path, rows: int) -> None:
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
    tally = RunAggregate(AggregateSpec(tuple(names), "label", scores=True))
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
    tally.add(table, 0, 0)
    return tally


def of_tally(tally: RunAggregate, resamples: int) -> list[Metric]:
    return [
        *tables.compute_metrics(tally.counts, top_k=1, resamples=resamples),
        *more_metrics(tally),
    ]


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
    large = of_tally(population(rng, 400_000, prior, skill), 0)
    truth = {each.name: each.value for each in large}
    held: dict[str, list[bool]] = {}
    for _ in range(100):
        for each in of_tally(population(rng, rows, prior, skill), 60):
            if each.interval is not None and truth[each.name] not in (0.0, 1.0):
                low, high = each.interval
                held.setdefault(each.name, []).append(low <= truth[each.name] <= high)
    # 95 % less three standard deviations of 100 runs
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
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    config = EvaluationOptions(slice_by="camera")  # type: ignore[arg-type]
    here = compute_evaluation(str(run), config, need_labels=True)
    monkeypatch.setattr(counting, "MAX_LOCAL_ROWS", 0)
    monkeypatch.setattr(counting, "PIECE_ROWS", 500)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    try:
        there = compute_evaluation(str(run), config, need_labels=True)
    finally:
        ray.shutdown()
    assert "counted 3,000 of 3,000 rows" in capsys.readouterr().out
    for one, other in zip(here.metrics, there.metrics, strict=True):
        assert one.name == other.name
        assert one.value == pytest.approx(other.value, abs=1e-12)
        assert one.interval == pytest.approx(other.interval, abs=1e-9)
    for name in ("mistakes", "uncertain", "issues", "per_class"):
        assert getattr(here, name).equals(getattr(there, name)), name


# ------------------------------------------------------------------ labels that came later


@pytest.mark.parametrize("scores", [True, False])
def test_labels_that_came_later_give_the_numbers_of_labels_that_were_there(
    tmp_path: Path, scores: bool
) -> None:
    table = drawn(800, 3, failed=0.05, scores=scores, sharpness=1.0)
    known = compute_evaluation(
        str(commit(tmp_path / "known", table)), EvaluationOptions(), need_labels=True
    )
    blind = table.drop_columns(["label", "label_score", "label_rank"])
    folder = commit(tmp_path / "blind", blind, label_column=None)
    rows = list(zip(table["path"].to_pylist(), table["label"].to_pylist(), strict=True))
    late = write_manifest(tmp_path / "late.csv", rows[::-1], ("path", "truth"))
    config = EvaluationOptions(labels=LabelTableConfig(path=str(late), column="truth"))
    found = compute_evaluation(str(folder), config, need_labels=True)
    expected = {m.name: m.value for m in known.metrics}
    got = {m.name: m.value for m in found.metrics}
    if not scores:
        assert "log_loss" not in got
        assert any("--scores" in sentence for sentence in found.omitted)
        expected.pop("log_loss")
    assert got == pytest.approx(expected, abs=1e-3)  # scores are float16
    assert got["accuracy"] == expected["accuracy"]
    assert got["top_3_accuracy"] == pytest.approx(expected["top_3_accuracy"], abs=2e-3)
    assert found.label_issues.num_rows == (known.label_issues.num_rows if scores else 0)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([("elsewhere.jpg", "ant")], "no path of the predictions is among its 1"),
        ([("images/000001.jpg", "ant")] * 2, "'images/000001.jpg' stands there twice"),
    ],
)
def test_a_join_that_matches_nothing_or_twice_is_refused(
    run: Path, tmp_path: Path, rows: list[tuple[str, str]], told: str
) -> None:
    late = write_manifest(tmp_path / "late.csv", rows, ("path", "label"))
    with pytest.raises(RequestError, match=told):
        compute_evaluation(
            str(run), EvaluationOptions(labels=LabelTableConfig(path=str(late))), need_labels=True
        )


KEYS = {
    "int32": pa.array(range(40), pa.int32()),
    "uint64": pa.array(range(40), pa.uint64()),
    "double": pa.array(range(40), pa.float64()),
    "decimal": pa.array(range(40), pa.decimal128(10, 0)),
    "string": pa.array([str(i) for i in range(40)]),
    "string_view": pa.array([str(i) for i in range(40)], pa.string_view()),
    "category": pa.array([str(i) for i in range(40)]).dictionary_encode(),
}
TIMES = {
    "ms": pa.array([i * 86_400_000 for i in range(40)], pa.timestamp("ms")),
    "us": pa.array([i * 86_400_000_000 for i in range(40)], pa.timestamp("us")),
    "date": pa.array(range(40), pa.date32()),
}


@pytest.mark.parametrize("kinds", [KEYS, TIMES], ids=["numbers", "times"])
def test_keys_of_different_types_join_by_value(tmp_path: Path, kinds: dict[str, pa.Array]) -> None:
    table = drawn(40, scores=False)
    labels = ["eel"] * 39 + ["ant"]
    runs = {
        name: str(commit(tmp_path / name, table.append_column("key", keys), fingerprint=name))
        for name, keys in kinds.items()
    }
    for mine, theirs in itertools.product(kinds, kinds):
        late = tmp_path / f"{theirs}.parquet"
        pq.write_table(pa.table({"key": kinds[theirs], "truth": labels}), late)
        config = EvaluationOptions(
            labels=LabelTableConfig(path=str(late), column="truth"), on="key"
        )
        found = compute_evaluation(runs[mine], config, need_labels=True)
        support = dict(zip(CLASSES, found.per_class["support"].to_pylist(), strict=True))
        assert support == {"ant": 1, "bee": 0, "cat": 0, "dog": 0, "eel": 39}
        if mine != theirs:
            compared = compare(CompareConfig(run_a=runs[mine], run_b=runs[theirs], on="key"))
            assert (compared.paired.rows, compared.num_differing) == (40, 0)


def test_a_key_without_plain_values_is_refused(tmp_path: Path, run: Path) -> None:
    late = tmp_path / "late.parquet"
    pq.write_table(pa.table({"camera": [["a"]], "label": ["ant"]}), late)
    for on, told in (
        ("topk_labels", "on: .* column 'topk_labels' is list"),
        ("camera", "is list<"),
    ):
        config = EvaluationOptions(labels=LabelTableConfig(path=str(late)), on=on)
        with pytest.raises(RequestError, match=told):
            compute_evaluation(str(run), config, need_labels=True)


def test_a_row_without_a_key_has_no_label(tmp_path: Path) -> None:
    table = drawn(40)
    paths = [None if row % 4 == 0 else path for row, path in enumerate(table["path"].to_pylist())]
    at = table.schema.get_field_index("path")
    run = commit(tmp_path / "out", table.set_column(at, "path", pa.array(paths, pa.string())))
    rows = [(path, "ant") for path in paths if path is not None]
    late = write_manifest(tmp_path / "late.csv", rows, ("path", "label"))
    found = compute_evaluation(
        str(run), EvaluationOptions(labels=LabelTableConfig(path=str(late))), need_labels=True
    )
    assert (found.aggregate.counts.labeled, found.aggregate.counts.unlabeled) == (30, 10)


def test_a_key_that_several_rows_have_is_refused(run: Path, tmp_path: Path) -> None:
    late = write_manifest(tmp_path / "late.csv", [("camera 1", "ant")], ("camera", "label"))
    config = EvaluationOptions(labels=LabelTableConfig(path=str(late)), on="camera")
    with pytest.raises(RequestError, match="'camera 1' stands in several rows"):
        compute_evaluation(str(run), config, need_labels=True)


def test_labels_are_read_as_manifests_are(tmp_path: Path) -> None:
    table = drawn(6, failed=0.0)
    notes = [f'a "b\r\n{row}' for row in range(6)]
    run = commit(tmp_path / "out", table.append_column("note", pa.array(notes)))

    def read(**options: str) -> JoinedLabels:
        config = LabelTableConfig(path=f"{tmp_path}/late/*/labels.csv", **options)
        return JoinedLabels(config, open_run(str(run)), "note")

    for part in range(2):  # keys in two folders are no paths that start there
        keys = [note.replace('"', '\\"') for note in notes[3 * part : 3 * part + 3]]
        file = tmp_path / "late" / str(part) / "labels.csv"
        file.parent.mkdir(parents=True)
        rows = "".join(f'"{key}",fou\u00e9\n' for key in keys)
        file.write_bytes(f"note,label\n{rows}".encode("latin-1"))
    with pytest.raises(ManifestError, match=r"--labels\.encoding"):
        read()
    with pytest.raises(ManifestError, match=r"pass --labels\.escape"):
        read(encoding="latin-1")
    with pytest.raises(ManifestError, match=r"no column 'truth' .*; name it with --labels\.column"):
        read(column="truth", encoding="latin-1", escape="\\")
    late = read(encoding="latin-1", escape="\\")
    assert late.keys.to_pylist() == notes
    assert late.labels.to_pylist() == ["fou\u00e9"] * 6


# ------------------------------------------------------------------ refusals


def test_a_run_without_labels_is_refused_with_the_remedy(tmp_path: Path, table: pa.Table) -> None:
    blind = table.drop_columns(["label", "label_score", "label_rank"])
    folder = commit(tmp_path / "blind", blind, label_column=None)
    with pytest.raises(RequestError, match="--labels TABLE"):
        evaluate(EvaluateConfig(predictions=str(folder)))
    found = compute_evaluation(str(folder), EvaluationOptions(), need_labels=False)
    assert not found.has_labels
    assert found.get_metric("accuracy") is None
    assert found.get_metric("mean_confidence") is not None


def test_a_run_that_is_not_there_or_not_committed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds no labeling run"):
        compute_evaluation(str(tmp_path), EvaluationOptions(), need_labels=True)
    folder = commit(tmp_path / "out", drawn(20))
    (folder / layout.SUCCESS_FILE).unlink()
    with pytest.raises(OutputError, match="is not committed"):
        compute_evaluation(str(folder), EvaluationOptions(), need_labels=True)


def test_a_part_that_is_gone_is_missed(tmp_path: Path) -> None:
    folder = commit(tmp_path / "out", drawn(20), parts=2)
    (folder / "predictions" / "part-00001.parquet").unlink()
    with pytest.raises(OutputError, match=r"lacks part-00001.parquet"):
        compute_evaluation(str(folder), EvaluationOptions(), need_labels=True)


def test_columns_that_are_not_there_are_named(run: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        ({}, "manifest, model, output: needed to label first"),
        ({"manifest": {"path": "m.csv"}}, "model, output: needed"),
        ({"predictions": "out", "model": "bundle"}, "predictions and model are both given"),
        ({"predictions": "out", "labels": "late.csv"}, "output: is required with --labels"),
        ({"predictions": "out", "on": "path"}, "on: joins --labels, which was not given"),
    ],
)
def test_a_request_that_is_not_one_thing_is_refused(request_: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        evaluate(build(EvaluateConfig, request_))


@pytest.mark.parametrize(
    ("header", "settings", "told"),
    [
        (("path", "label"), {"slice_by": "site"}, "slice_by: .* no column 'site' .found: path, la"),
        (
            ("path", "label"),
            {"slice_by": "scores"},
            "column 'scores' of .* is fixed_size_list",
        ),
        (("path", "label"), {"labels": "l.csv", "on": "key"}, "on: .* no column 'key' .found: pa"),
        (("path", "truth"), {}, "no label column to judge by; name it with --manifest.label-col"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_is_labelled(
    tmp_path: Path, header: tuple[str, str], settings: dict[str, Any], told: str
) -> None:
    manifest = write_manifest(tmp_path / "m.csv", [("a.jpg", "ant")], header)
    output = tmp_path / "out"
    asked = {"manifest": str(manifest), "model": "no bundle", "output": str(output)}
    with pytest.raises(ManifestError, match=told):
        evaluate(build(EvaluateConfig, asked | settings))
    assert not output.exists()


# ------------------------------------------------------------------ what is written


def test_tables_summary_and_report_are_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "judged"
    found = evaluate(EvaluateConfig(predictions=str(run), output=str(output), slice_by=["camera"]))
    assert not (run / "report.html").exists()
    told = json.loads((output / "summary.json").read_text())
    metric = found.get_metric("accuracy")
    assert metric is not None
    assert told["metrics"]["accuracy"]["value"] == metric.value
    assert told["metrics"]["accuracy"]["lower"] < metric.value
    tables = {p.stem: pq.read_table(p) for p in (output / "metrics").iterdir()}
    assert set(tables) == {
        "summary", "per_class", "confusion", "calibration", "coverage", "slices", "label_issues",
    }  # fmt: skip
    assert tables["summary"].num_rows == len(found.metrics)
    assert tables["coverage"]["coverage"][0].as_py() == 1.0
    assert (output / "report.html").stat().st_size < 5_000_000
    assert f"report     {output}/report.html" in capsys.readouterr().out
