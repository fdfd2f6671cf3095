"""Comparison of multilabel runs: metrics, differing rows, and --fail-if-worse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.errors import RequestError, TooManyErrors
from imgcls.evaluation.compare import compare
from imgcls.evaluation.config import CompareConfig
from imgcls.evaluation.multilabel_compare import MultiLabelComparison
from tests.evaluation.drawn_cells import build_table, commit_multilabel, draw_cells
from tests.evaluation.runs import CLASSES, commit, drawn

ROWS = 900


def add_noise(logits: np.ndarray, noise: float) -> np.ndarray:
    return np.asarray(logits + noise * np.random.default_rng(7).normal(size=logits.shape))


@pytest.fixture(params=[True, False], ids=["lists", "columns"])
def tables(request: pytest.FixtureRequest) -> tuple[pa.Table, pa.Table]:
    """The second run is worse."""
    logits, targets = draw_cells(ROWS, 4, unknown=0.0 if request.param else 0.1)
    a = build_table(logits, targets, failed=0.05, listed=request.param)
    b = build_table(add_noise(logits, 1.5), targets, kind="float16", listed=request.param)
    return a, b


def run_compare(a: Path, b: Path, **changes: object) -> MultiLabelComparison:
    config = CompareConfig.model_validate({"run_a": str(a), "run_b": str(b)} | changes)
    found = compare(config)
    assert isinstance(found, MultiLabelComparison)
    return found


def read_targets(table: pa.Table) -> np.ndarray:
    if "labels" in table.schema.names:
        return np.array([[name in row for name in CLASSES] for row in table["labels"].to_pylist()])
    columns = [table[name].to_pandas().fillna(-1).to_numpy() for name in CLASSES]
    return np.stack(columns, 1).astype(int)


def read_predicted(table: pa.Table) -> np.ndarray:
    rows = table["predicted_labels"].to_pylist()
    return np.array([[name in (row or []) for name in CLASSES] for row in rows])


def test_the_result_and_every_difference_are_those_of_the_rows(
    tmp_path: Path, tables: tuple[pa.Table, pa.Table], capsys: pytest.CaptureFixture[str]
) -> None:
    from sklearn.metrics import average_precision_score, f1_score

    a, b = tables
    run_a = commit_multilabel(tmp_path / "a", a, parts=2)
    run_b = commit_multilabel(tmp_path / "b", b, parts=3)
    output = tmp_path / "compared"
    found = run_compare(run_a, run_b, slice_by=["camera"], output=str(output))
    out = capsys.readouterr().out
    targets = read_targets(a)
    ok = np.array(a["status"].to_pylist()) == "ok"
    compared = ok & (targets >= 0).any(1)
    assert found.rows == compared.sum()

    def compute_precisions(table: pa.Table, rows: np.ndarray) -> list[float]:
        values = table["scores"].filter(pa.array(rows)).to_pylist()
        scores = np.array(values).astype(np.float16)
        known = targets[rows] >= 0
        return [
            average_precision_score(targets[rows][known[:, c], c], scores[known[:, c], c])
            for c in range(5)
        ]

    expected = [compute_precisions(table, compared) for table in (a, b)]
    precision = found.metrics["mean_average_precision"]
    assert (precision.a, precision.b) == pytest.approx(np.mean(expected, axis=1))
    assert precision.upper < 0
    assert "result: A is better" in out
    assert f"B - A  mean average precision {100 * precision.difference:+.2f} points" in out
    by_class = {row["label"]: row for row in found.per_class.to_pylist()}
    for c, name in enumerate(CLASSES):
        row, known = by_class[name], compared & (targets[:, c] >= 0)
        assert row["average_precision_b"] == pytest.approx(expected[1][c])
        assert (row["rows"], row["support"]) == (known.sum(), (targets[known, c] == 1).sum())
        f1 = f1_score(targets[known, c], read_predicted(b)[known, c])
        assert row["f1_b"] == pytest.approx(f1)
    for row in found.slices.to_pylist():
        mine = compared & (np.array(a["camera"].to_pylist()) == row["value"])
        assert row["rows"] == mine.sum()
        assert row["mean_average_precision_a"] == pytest.approx(
            np.mean(compute_precisions(a, mine))
        )
    complete = compared & (targets >= 0).all(1)
    right = [(read_predicted(t) == (targets == 1)).all(1) & complete for t in (a, b)]
    assert found.paired is not None
    assert (found.paired.rows, found.paired.only_a) == (
        complete.sum(),
        (right[0] & ~right[1]).sum(),
    )
    assert found.metrics["subset_accuracy"].b == pytest.approx(right[1].sum() / complete.sum())
    differ = compared & (read_predicted(a) != read_predicted(b)).any(1)
    assert found.num_differing == differ.sum()
    rows = pq.read_table(output / "differing.parquet").to_pylist()
    assert sorted(row["row"] for row in rows) == np.flatnonzero(differ).tolist()
    for row in rows[:50]:
        at = row["row"]
        cells = (read_predicted(b)[at] != (targets[at] == 1)) & (targets[at] >= 0)
        assert row["wrong_b"] == cells.sum()
        assert set(row["predicted_a"]) == set(a["predicted_labels"][at].as_py())
        assert (row["right"] == "a") == (row["wrong_a"] == 0 < row["wrong_b"])
    assert [row["right"] for row in rows] == sorted(
        (row["right"] for row in rows), key=lambda name: {"a": 0, "b": 1}.get(name, 2)
    )
    summary = json.loads((output / "summary.json").read_text())
    assert summary["metrics"]["mean_average_precision"]["difference"] == precision.difference
    assert summary["predictions_differ"] == found.num_differing


def test_rows_are_joined_by_a_column(tmp_path: Path, tables: tuple[pa.Table, pa.Table]) -> None:
    a, b = tables
    run_a = commit_multilabel(tmp_path / "a", a)
    same = run_compare(run_a, commit_multilabel(tmp_path / "b", b))
    order = np.random.default_rng(0).permutation(ROWS)
    other = commit_multilabel(tmp_path / "c", b.take(pa.array(order)), fingerprint="e" * 32)
    with pytest.raises(RequestError, match="--on path"):
        run_compare(run_a, other)
    joined = run_compare(run_a, other, on="path")
    assert joined.metrics == same.metrics
    assert joined.num_differing == same.num_differing


def test_classes_of_both_models_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logits, targets = draw_cells(300, 1)
    run_a = commit_multilabel(tmp_path / "a", build_table(logits, targets))
    order = [3, 1, 0]
    names = [CLASSES[c] for c in order]
    smaller = build_table(logits[:, order], targets[:, order], classes=names)
    run_b = commit_multilabel(tmp_path / "b", smaller, classes=names)
    found = run_compare(run_a, run_b)
    assert sorted(found.per_class["label"].to_pylist()) == ["ant", "bee", "dog"]
    assert found.metrics["mean_average_precision"].difference == 0
    assert found.num_differing == 0
    assert found.unknown_label == targets[:, [2, 4]].any(1).sum()
    assert "have a label that is not a class of both models" in capsys.readouterr().out


def test_class_names_in_another_unicode_form_are_the_same_classes(tmp_path: Path) -> None:
    logits, targets = draw_cells(100, 1)
    runs = []
    for name, accented in (("nfd", "cafe\u0301"), ("nfc", "caf\u00e9")):
        classes = [accented, *CLASSES[1:]]
        table = build_table(logits, targets, classes=classes)
        runs.append(commit_multilabel(tmp_path / name, table, classes=classes))
    found = run_compare(*runs)
    assert found.per_class["label"].to_pylist() == ["caf\u00e9", *CLASSES[1:]]
    assert (found.num_differing, found.unknown_label) == (0, 0)


def test_joined_labels_are_compared_as_those_of_the_run(
    tmp_path: Path, tables: tuple[pa.Table, pa.Table]
) -> None:
    a, b = tables
    names = [name for name in ("labels", *CLASSES) if name in a.schema.names]
    own = run_compare(commit_multilabel(tmp_path / "a", a), commit_multilabel(tmp_path / "b", b))
    pq.write_table(a.select(["path", *names]), tmp_path / "l.parquet")
    found = run_compare(
        commit_multilabel(tmp_path / "c", a.drop_columns(names)),
        commit_multilabel(tmp_path / "d", b.drop_columns(names)),
        labels={
            "path": str(tmp_path / "l.parquet"),
            **({"column": "labels"} if len(names) == 1 else {"label_columns": names}),
        },
    )
    assert (found.metrics, found.rows) == (own.metrics, own.rows)
    assert found.differing.equals(own.differing)


def test_a_worse_run_fails(tmp_path: Path, tables: tuple[pa.Table, pa.Table]) -> None:
    a, b = (
        commit_multilabel(tmp_path / name, table) for name, table in zip("ab", tables, strict=True)
    )
    with pytest.raises(TooManyErrors, match="points worse than"):
        run_compare(a, b, fail_if_worse="0.5pt")
    run_compare(a, b, fail_if_worse="60pt")
    run_compare(b, a, fail_if_worse="0")


def test_large_runs_are_subsampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logits, targets = draw_cells(300, 1)
    table = build_table(logits, targets)
    run = commit_multilabel(tmp_path / "a", table, parts=2, group_rows=40)
    few = commit_multilabel(tmp_path / "b", table.take(pa.array(np.arange(0, 300, 3))))
    monkeypatch.setattr("imgcls.evaluation.multilabel_compare.MAX_CELLS", 500)
    found = run_compare(run, run, slice_by=["camera"])
    assert found.rows == 300
    assert "one row in 3" in capsys.readouterr().out
    monkeypatch.undo()
    assert run_compare(few, few).metrics == found.metrics
    assert found.slices["rows"].to_pylist() == [100]


def test_requests_that_cannot_be_done_are_refused(tmp_path: Path) -> None:
    logits, targets = draw_cells(30, 1)
    run = commit_multilabel(tmp_path / "a", build_table(logits, targets))
    blind = commit_multilabel(tmp_path / "b", build_table(logits, None))
    single = commit(tmp_path / "single", drawn(30))
    with pytest.raises(RequestError, match="pass two runs of one task"):
        run_compare(run, single)
    with pytest.raises(RequestError, match="has no labels"):
        run_compare(blind, run)
    others = list("vwxyz")
    other = commit_multilabel(
        tmp_path / "c", build_table(logits, targets, classes=others), classes=others
    )
    with pytest.raises(RequestError, match="no class in common"):
        run_compare(run, other)
