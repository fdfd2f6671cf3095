"""Comparison of two runs: the result, the differing rows, and --fail-if-worse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.errors import OutputError, RequestError, TooManyErrors
from imgcls.evaluation.compare import compare
from imgcls.evaluation.compute import compute_evaluation
from imgcls.evaluation.config import (
    CompareConfig,
    EvaluationOptions,
    LabelTableConfig,
    parse_points,
)
from imgcls.inference.history import CompactConfig, compact
from tests.conftest import write_manifest
from tests.evaluation.runs import CLASSES, commit, drawn


def worse(table: pa.Table, share: float, seed: int = 0) -> pa.Table:
    """The same rows with some predictions turned to the next class."""
    rng = np.random.default_rng(seed)
    predicted_b = [
        CLASSES[(CLASSES.index(s) + 1) % 5] if s is not None and rng.random() < share else s
        for s in table["predicted_label"].to_pylist()
    ]
    index = table.schema.get_field_index("predicted_label")
    return table.set_column(index, "predicted_label", pa.array(predicted_b, pa.string()))


def runs(tmp_path: Path, share: float = 0.1) -> tuple[Path, Path, pa.Table, pa.Table]:
    a = drawn(2000, 4, failed=0.02, unlabeled=0.05, sharpness=3.0)
    b = worse(a, share)
    return commit(tmp_path / "a", a, parts=2), commit(tmp_path / "b", b, parts=3), a, b


def test_the_verdict_and_every_difference_are_those_of_the_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_a, run_b, a, b = runs(tmp_path)
    output = tmp_path / "compared"
    found = compare(
        CompareConfig(run_a=str(run_a), run_b=str(run_b), slice_by=["camera"], output=str(output))
    )
    left, right = a.to_pandas(), b.to_pandas()
    compared_rows = (left.status == "ok") & left.label.notna()
    right_a = (left.predicted_label == left.label) & compared_rows
    right_b = (right.predicted_label == left.label) & compared_rows
    assert found.paired.rows == compared_rows.sum()
    assert found.paired.only_a == (right_a & ~right_b).sum()
    assert found.paired.only_b == (right_b & ~right_a).sum()
    assert found.paired.difference == pytest.approx(
        (right_b.sum() - right_a.sum()) / compared_rows.sum()
    )
    assert found.paired.p_value < 1e-6
    assert "result: A is better" in capsys.readouterr().out
    by_class = {row["label"]: row for row in found.per_class.to_pylist()}
    for name in CLASSES:
        mine = compared_rows & (left.label == name)
        assert by_class[name]["rows"] == mine.sum()
        assert by_class[name]["accuracy_b"] == pytest.approx(right_b[mine].mean())
    by_camera = {row["value"]: row for row in found.slices.to_pylist()}
    for value, row in by_camera.items():
        mine = compared_rows & (left.camera == value)
        assert row["accuracy_a"] == pytest.approx(right_a[mine].mean())
    differ = compared_rows & (left.predicted_label != right.predicted_label)
    assert found.num_differing == differ.sum()
    rows = pq.read_table(output / "differing.parquet").to_pandas()
    assert sorted(rows.row) == sorted(left.row[differ])
    assert (rows.right == "a").sum() == found.paired.only_a
    summary = json.loads((output / "summary.json").read_text())
    assert summary["only_a"] == found.paired.only_a


def test_a_run_has_the_accuracy_that_evaluate_gives_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = drawn(1000, 5, failed=0.05, unlabeled=0.1, unknown=0.3)
    run = commit(tmp_path / "a", table)
    config = CompareConfig(
        run_a=str(run), run_b=str(run), slice_by=["camera"], output=str(tmp_path / "c")
    )
    compared = compare(config)
    evaluated = compute_evaluation(
        str(run), EvaluationOptions(slice_by=["camera"]), need_labels=True
    )
    counts = evaluated.aggregate.counts
    assert counts.unknown_label > 200
    assert compared.unknown_label == counts.unknown_label
    assert (compared.paired.rows, compared.correct_a) == (counts.labeled, counts.correct)
    assert f"note: {counts.unknown_label} more rows have a label" in capsys.readouterr().out
    stored = json.loads((tmp_path / "c" / "summary.json").read_text())
    assert stored["accuracy_a"] == pytest.approx(counts.correct / counts.labeled)
    assert stored["unknown_label"] == counts.unknown_label
    assert set(compared.per_class["label"].to_pylist()) == set(CLASSES)
    by_camera = {row["value"]: row["accuracy"] for row in evaluated.slices.to_pylist()}
    for row in compared.slices.to_pylist():
        assert row["accuracy_a"] == row["accuracy_b"] == pytest.approx(by_camera[row["value"]])


def test_models_of_different_classes_are_compared_on_their_common_classes(tmp_path: Path) -> None:
    table = drawn(600, 6)
    run_a = commit(tmp_path / "a", table)
    index = table.schema.get_field_index("predicted_label")
    predicted_b = [
        name if name != "eel" else "dog" for name in table["predicted_label"].to_pylist()
    ]
    smaller = table.set_column(index, "predicted_label", pa.array(predicted_b, pa.string()))
    run_b = commit(tmp_path / "b", smaller, classes=CLASSES[:4])
    labels = table["label"].to_pylist()
    predicted = table["predicted_label"].to_pylist()
    for pair in ((run_a, run_b), (run_b, run_a)):
        found = compare(CompareConfig(run_a=str(pair[0]), run_b=str(pair[1])))
        assert found.unknown_label == labels.count("eel")
        assert found.paired.rows == 600 - labels.count("eel")
        correct = {
            run_a: sum(p == name != "eel" for p, name in zip(predicted, labels, strict=True)),
            run_b: sum(p == name != "eel" for p, name in zip(predicted_b, labels, strict=True)),
        }
        assert [found.correct_a, found.correct_b] == [correct[run] for run in pair]


def test_the_folder_of_a_run_is_rejected_as_output(tmp_path: Path) -> None:
    table = drawn(20, 6)
    runs = [str(commit(tmp_path / name, table)) for name in ("first", "second")]
    with pytest.raises(OutputError, match="first: is the folder of a run, whose files would be"):
        compare(CompareConfig(run_a=runs[0], run_b=runs[1], output=runs[0]))
    assert not (tmp_path / "first" / "summary.json").exists()


def test_class_names_in_another_unicode_form_are_the_same_classes(tmp_path: Path) -> None:
    nfd = ["ant", "bee", "cafe\u0301", "dog", "eel"]
    table = drawn(200, 6, classes=nfd)
    runs = [commit(tmp_path / "nfd", table, classes=nfd)]
    runs.append(commit(tmp_path / "nfc", table, classes=[*nfd[:2], "caf\u00e9", *nfd[3:]]))
    found = compare(CompareConfig(run_a=str(runs[0]), run_b=str(runs[1])))
    assert (found.paired.rows, found.unknown_label) == (200, 0)


def test_fail_if_worse_fails_only_above_its_limit(tmp_path: Path) -> None:
    run_a, run_b, *_ = runs(tmp_path, share=0.03)
    found = compare(CompareConfig(run_a=str(run_a), run_b=str(run_b)))
    lost = -100 * found.paired.difference
    assert 1 < lost < 4
    request = {"run_a": str(run_a), "run_b": str(run_b)}
    compare(CompareConfig(**request, fail_if_worse=f"{lost + 0.1:.3f}pt"))
    with pytest.raises(TooManyErrors, match=r"is .* points worse than .*, allowed 0.5") as caught:
        compare(CompareConfig(**request, fail_if_worse="0.5pt"))
    assert caught.value.exit_code == 3
    compare(CompareConfig(run_a=str(run_b), run_b=str(run_a), fail_if_worse="0pt"))


def test_runs_of_other_manifests_are_joined_by_a_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_a, _, a, b = runs(tmp_path)
    shuffled = b.take(np.random.default_rng(0).permutation(2000)[:1500])
    other = commit(tmp_path / "other", shuffled, fingerprint="0" * 32)
    with pytest.raises(RequestError, match=r"have different manifests; .* --on path"):
        compare(CompareConfig(run_a=str(run_a), run_b=str(other)))
    found = compare(CompareConfig(run_a=str(run_a), run_b=str(other), on="path"))
    assert "note: 1,500 rows are in both, of 2,000 and 1,500" in capsys.readouterr().out
    left = a.to_pandas().set_index("path")
    right = shuffled.to_pandas().set_index("path")
    both = left.join(right, how="inner", rsuffix="_b")
    both = both[(both.status == "ok") & both.label.notna()]
    assert found.paired.rows == len(both)
    assert found.correct_b == (both.predicted_label_b == both.label).sum()


def test_a_history_is_not_compared_by_the_place_of_its_rows(tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    commit(labels / "date=2026-11-01", drawn(40, 1))
    night = commit(labels / "date=2026-11-02", drawn(30, 2))
    history = compact(CompactConfig(source=str(labels), output=str(tmp_path / "latest")))
    with pytest.raises(RequestError, match=r"have different manifests.*--on path"):
        compare(CompareConfig(run_a=history, run_b=str(night)))


def test_runs_are_joined_by_the_files_that_paths_name(tmp_path: Path) -> None:
    runs = []
    for name, form in (("a", "/images/{}.jpg"), ("b", "file:///images/{}.jpg")):
        table = drawn(40, scores=False)
        paths = pa.array([form.format(row) for row in range(40)])
        table = table.set_column(table.schema.get_field_index("path"), "path", paths)
        runs.append(str(commit(tmp_path / name, table, fingerprint=name)))
    assert compare(CompareConfig(run_a=runs[0], run_b=runs[1], on="path")).paired.rows == 40


def test_joined_labels_apply_to_both(tmp_path: Path) -> None:
    run_a, run_b, a, _ = runs(tmp_path)
    rows = list(zip(a["path"].to_pylist()[:500], a["label"].to_pylist()[:500], strict=True))
    rows = [row for row in rows if row[1] is not None]
    late = write_manifest(tmp_path / "late.csv", rows, ("path", "label"))
    found = compare(
        CompareConfig(run_a=str(run_a), run_b=str(run_b), labels=LabelTableConfig(path=str(late)))
    )
    ok = sum(s == "ok" and label is not None for s, label in zip(
        a["status"].to_pylist()[:500], a["label"].to_pylist()[:500], strict=True))  # fmt: skip
    assert found.paired.rows == ok


def test_a_join_that_matches_nothing_or_twice_is_rejected(tmp_path: Path) -> None:
    run_a, run_b, *_ = runs(tmp_path)
    with pytest.raises(RequestError, match="camera 'camera 0' occurs twice"):
        compare(CompareConfig(run_a=str(run_a), run_b=str(run_b), on="camera"))
    far = drawn(10).to_pandas()
    far["path"] = [f"far/{i}.jpg" for i in range(10)]
    other = drawn(10)
    index = other.schema.get_field_index("path")
    other = other.set_column(index, "path", pa.array(far["path"].tolist()))
    run = commit(tmp_path / "far", other, fingerprint="1" * 32)
    with pytest.raises(RequestError, match="share no path"):
        compare(CompareConfig(run_a=str(run_a), run_b=str(run), on="path"))
    empty = commit(tmp_path / "empty", other.slice(0, 0), fingerprint="2" * 32)
    with pytest.raises(RequestError, match="empty: has no rows to compare"):
        compare(CompareConfig(run_a=str(run_a), run_b=str(empty), on="path"))
    with pytest.raises(RequestError, match="share no path"):
        compare(CompareConfig(run_a=str(empty), run_b=str(run_a), on="path"))


def test_runs_without_labels_are_rejected(tmp_path: Path) -> None:
    blind = commit(tmp_path / "blind", drawn(20), label_column=None)
    with pytest.raises(RequestError, match="has no labels"):
        compare(CompareConfig(run_a=str(blind), run_b=str(blind)))


def test_equal_runs_show_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = commit(tmp_path / "a", drawn(100))
    found = compare(CompareConfig(run_a=str(run), run_b=str(run), fail_if_worse="0"))
    assert (found.paired.difference, found.num_differing, found.paired.p_value) == (0, 0, 1)
    assert "no significant difference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "value"), [("0.5pt", 0.005), ("2%", 0.02), ("0.01", 0.01), ("1 pp", 0.01)]
)
def test_points_are_read(text: str, value: float) -> None:
    assert parse_points(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["a bit", "-1pt", "5"])
def test_invalid_points_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"could not convert|between 0 and 100 points"):
        parse_points(text)
