"""Labels of another table: joined by value, with the metrics of labels in the run."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.errors import ManifestError, RequestError
from imgcls.evaluation.aggregate import AggregateSpec, aggregate_run
from imgcls.evaluation.compare import compare
from imgcls.evaluation.compute import compute_evaluation
from imgcls.evaluation.config import CompareConfig, EvaluationOptions, LabelTableConfig
from imgcls.evaluation.label_join import JOINED_COLUMN, JoinedLabels
from imgcls.metrics.confusion import ClassCounts
from imgcls.runs.committed import iter_tables, open_run
from tests.conftest import write_manifest
from tests.evaluation.runs import CLASSES, commit, drawn


@pytest.mark.parametrize("scores", [True, False])
def test_joined_labels_give_the_metrics_of_labels_in_the_run(tmp_path: Path, scores: bool) -> None:
    table = drawn(800, 3, failed=0.05, scores=scores, sharpness=1.0)
    known = compute_evaluation(
        str(commit(tmp_path / "known", table)), EvaluationOptions(), need_labels=True
    )
    blind = table.drop_columns(["label", "label_score", "label_rank"])
    folder = commit(tmp_path / "blind", blind, label_column=None)
    rows = list(zip(table["path"].to_pylist(), table["label"].to_pylist(), strict=True))
    labels_file = write_manifest(tmp_path / "late.csv", rows[::-1], ("path", "truth"))
    config = EvaluationOptions(labels=LabelTableConfig(path=str(labels_file), column="truth"))
    found = compute_evaluation(str(folder), config, need_labels=True)
    expected = {m.name: m.value for m in known.metrics}
    got = {m.name: m.value for m in found.metrics}
    if not scores:
        assert "log_loss" not in got
        assert any("--scores" in sentence for sentence in found.omitted)
        expected.pop("log_loss")
    assert len(found.omitted) == (0 if scores else 1)  # slices that are not asked for are no lack
    assert got == pytest.approx(expected, abs=1e-3)  # scores are float16
    assert got["accuracy"] == expected["accuracy"]
    assert got["top_3_accuracy"] == pytest.approx(expected["top_3_accuracy"], abs=2e-3)
    assert found.label_issues.num_rows == (known.label_issues.num_rows if scores else 0)


def test_the_rank_of_a_listed_label_is_its_place_although_rounded_scores_are_equal(
    tmp_path: Path,
) -> None:
    table = drawn(1, scores=False).drop_columns(["label", "label_score", "label_rank"])
    listed = pa.array([["eel", "dog", "cat"]])
    table = table.set_column(table.schema.get_field_index("topk_labels"), "topk_labels", listed)
    equal = pa.FixedSizeListArray.from_arrays(pa.array(np.full(5, 0.2, np.float16)), 5)
    folder = commit(tmp_path / "run", table.append_column("scores", equal), label_column=None)
    run = open_run(str(folder))
    ranks = {}
    for label in CLASSES:
        rows = [(table["path"][0].as_py(), label)]
        file = write_manifest(tmp_path / f"{label}.csv", rows, ("path", "label"))
        joined = JoinedLabels(LabelTableConfig(path=str(file)), run, "path")
        [found] = [joined.join(each) for each in iter_tables(run, run.schema.names)]
        [ranks[label]] = found["label_rank"].to_pylist()
    assert [ranks[label] for label in ("eel", "dog", "cat")] == [1, 2, 3]
    assert min(ranks["ant"], ranks["bee"]) > 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("elsewhere.jpg", "ant")], "no path of the predictions is among its 1"),
        ([("images/000001.jpg", "ant")] * 2, "'images/000001.jpg' occurs twice"),
    ],
)
def test_a_join_that_matches_nothing_or_twice_is_rejected(
    run: Path, tmp_path: Path, rows: list[tuple[str, str]], message: str
) -> None:
    labels_file = write_manifest(tmp_path / "late.csv", rows, ("path", "label"))
    with pytest.raises(RequestError, match=message):
        compute_evaluation(
            str(run),
            EvaluationOptions(labels=LabelTableConfig(path=str(labels_file))),
            need_labels=True,
        )


def test_paths_are_joined_by_the_file_that_they_name(tmp_path: Path) -> None:
    table = drawn(40, scores=False)
    place = table.schema.get_field_index("path")
    paths = [f"/images/{row}.jpg" for row in range(40)]
    run = commit(tmp_path / "run", table.set_column(place, "path", pa.array(paths)))
    rows = [(f"file://{path}", "eel") for path in paths[:20]]
    rows += [(f"/images/./{row}.jpg", "ant") for row in range(20, 40)]
    labels_file = write_manifest(tmp_path / "late.csv", rows, ("path", "label"))
    opened = open_run(str(run))
    joined = JoinedLabels(LabelTableConfig(path=str(labels_file)), opened, "path")
    tables = [joined.join(each) for each in iter_tables(opened, opened.schema.names)]
    assert pa.concat_tables(tables)["label"].to_pylist() == ["eel"] * 20 + ["ant"] * 20


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
        labels_file = tmp_path / f"{theirs}.parquet"
        pq.write_table(pa.table({"key": kinds[theirs], "truth": labels}), labels_file)
        run = open_run(runs[mine])
        config = LabelTableConfig(path=str(labels_file), column="truth")
        spec = AggregateSpec(run.classes, JOINED_COLUMN)
        found = aggregate_run(run, spec, JoinedLabels(config, run, "key"))
        support = ClassCounts.from_counts(found.counts).support
        assert dict(zip(CLASSES, support.tolist(), strict=True)) == {
            "ant": 1, "bee": 0, "cat": 0, "dog": 0, "eel": 39,
        }  # fmt: skip
        if mine != theirs:
            compared = compare(CompareConfig(run_a=runs[mine], run_b=runs[theirs], on="key"))
            assert (compared.paired.rows, compared.num_differing) == (40, 0)


def test_a_key_without_plain_values_is_rejected(tmp_path: Path, run: Path) -> None:
    labels_file = tmp_path / "late.parquet"
    pq.write_table(pa.table({"camera": [["a"]], "label": ["ant"]}), labels_file)
    for on, message in (
        ("topk_labels", "on: .* column 'topk_labels' is list"),
        ("camera", "is list<"),
    ):
        config = EvaluationOptions(labels=LabelTableConfig(path=str(labels_file)), on=on)
        with pytest.raises(RequestError, match=message):
            compute_evaluation(str(run), config, need_labels=True)


def test_a_row_without_a_key_has_no_label(tmp_path: Path) -> None:
    table = drawn(40)
    paths = [None if row % 4 == 0 else path for row, path in enumerate(table["path"].to_pylist())]
    at = table.schema.get_field_index("path")
    run = commit(tmp_path / "out", table.set_column(at, "path", pa.array(paths, pa.string())))
    rows = [(path, "ant") for path in paths if path is not None]
    labels_file = write_manifest(tmp_path / "late.csv", rows, ("path", "label"))
    found = compute_evaluation(
        str(run),
        EvaluationOptions(labels=LabelTableConfig(path=str(labels_file))),
        need_labels=True,
    )
    assert (found.aggregate.counts.labeled, found.aggregate.counts.unlabeled) == (30, 10)


def test_a_key_of_several_rows_is_rejected(run: Path, tmp_path: Path) -> None:
    labels_file = write_manifest(tmp_path / "late.csv", [("camera 1", "ant")], ("camera", "label"))
    config = EvaluationOptions(labels=LabelTableConfig(path=str(labels_file)), on="camera")
    with pytest.raises(RequestError, match="'camera 1' occurs in several rows"):
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
    joined = read(encoding="latin-1", escape="\\")
    assert joined.keys.to_pylist() == notes
    assert joined.labels.to_pylist() == ["fou\u00e9"] * 6


def test_joined_labels_make_slices(tmp_path: Path) -> None:
    table = drawn(300, 1)
    blind = table.drop_columns(["label", "label_score", "label_rank"])
    run = commit(tmp_path / "blind", blind, label_column=None)
    rows = list(zip(table["path"].to_pylist(), table["label"].to_pylist(), strict=True))
    labels_file = write_manifest(tmp_path / "late.csv", rows, ("path", "label"))
    labels = LabelTableConfig(path=str(labels_file))
    config = EvaluationOptions(labels=labels, slice_by=["label"])
    slices = compute_evaluation(str(run), config, need_labels=True).slices
    counted = dict(zip(slices["value"].to_pylist(), slices["labelled"].to_pylist(), strict=True))
    assert counted == dict(Counter(table["label"].to_pylist()))
    compared = compare(
        CompareConfig(run_a=str(run), run_b=str(run), labels=labels, slice_by=["label"])
    )
    counted = {row["value"]: row["rows"] for row in compared.slices.to_pylist()}
    assert counted == dict(Counter(table["label"].to_pylist()))
