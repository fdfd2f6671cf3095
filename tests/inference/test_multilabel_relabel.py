"""`imgcls relabel` with any number of labels per image: by a head, or by labeled neighbors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.data.manifests.label_columns import LabelColumns
from imgcls.errors import ManifestError, RequestError
from imgcls.inference.labelers import TEMPERATURE
from imgcls.inference.relabel import relabel
from imgcls.metrics.multilabel import MultiLabelCounts
from imgcls.models import zoo
from imgcls.models.bundle import VectorScaling, load_bundle, load_bundle_weights
from imgcls.runs import layout
from imgcls.runs.committed import open_run
from tests.runs.embedded import CLASSES, OTHERS, commit_run, save_with_head

ROWS, K = 80, 7
TAGS = ["ant", "bee", "cow"]
MULTILABEL: dict[str, Any] = {"task": "multilabel", "format_version": 2, "threshold": 0.5}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return save_with_head(tmp_path / "bundle", CLASSES, head_seed=1)


def list_labels(run: Path, lists: list[list[str] | None]) -> None:
    """Give the rows of a run lists of labels, in the column `tags`, instead of a label."""
    start = 0
    success = json.loads((run / layout.SUCCESS_FILE).read_text())
    for file in sorted((run / layout.PREDICTIONS_FOLDER).iterdir()):
        table = pq.read_table(file).drop_columns(["label"])
        tags = pa.array(lists[start : start + table.num_rows], pa.list_(pa.string()))
        pq.write_table(table.add_column(1, "tags", tags), file)
        success["files"][file.name] = file.stat().st_size
        start += table.num_rows
    (run / layout.SUCCESS_FILE).write_text(json.dumps(success))
    record = json.loads((run / layout.RUN_FILE).read_text())
    record["identity"]["manifest"] |= {
        "label_column": None, "label_columns": LabelColumns("tags").to_json()
    }  # fmt: skip
    (run / layout.RUN_FILE).write_text(json.dumps(record))


def compute_expected(bundle: Path, vectors: np.ndarray) -> np.ndarray:
    """(N, C) sigmoid scores of embeddings, from the definitions."""
    made = load_bundle(str(bundle))
    network = zoo.build_network(made.spec.architecture, len(made.spec.classes))
    network.load_state_dict(load_bundle_weights(made))
    _, head = zoo.find_head(network)
    weight, bias = (each.detach().double().numpy() for each in (head.weight, head.bias))
    logits = (vectors.astype(np.float64) @ weight.T + bias) / made.spec.temperature
    assert made.spec.vector_scaling is not None
    scaling = made.spec.vector_scaling
    logits = logits * np.array(scaling.scale) + np.array(scaling.bias)
    return np.asarray(1 / (1 + np.exp(-logits)))


@pytest.mark.parametrize("listed", [True, False])
def test_scores_are_those_of_a_multilabel_head(tmp_path: Path, bundle: Path, listed: bool) -> None:
    scaling = VectorScaling(scale=[1.0, 1.4], bias=[0.2, -0.1])
    more = {"temperature": 0.3, "vector_scaling": scaling, "thresholds": {"dark": 0.6}}
    head = save_with_head(tmp_path / "head", OTHERS, 2, **MULTILABEL, **more)
    vectors = commit_run(tmp_path / "run", bundle)
    plain = [[("dark", "light", "fox", None)[row % 4]] for row in range(20)]
    truth: list[Any] = [None if names == [None] else names for names in plain]
    if listed:
        truth = [["dark", "light"], [], None, ["fox"]] * 5
        list_labels(tmp_path / "run", truth)
    result = relabel(source=str(tmp_path / "run"), model=str(head), output=str(tmp_path / "out"))
    run = open_run(str(tmp_path / "out"))
    assert (run.task, run.has_scores, run.classes) == ("multilabel", True, ("dark", "light"))
    expected = compute_expected(head, vectors)
    table = pq.read_table(tmp_path / "out" / "predictions")
    assert table.schema.names[:3] == ["path", "tags" if listed else "label", "camera"]
    for row, found in enumerate(table.to_pylist()):
        if row == 5:
            assert found["predicted_labels"] is found["scores"] is None
            assert found["accepted"] is False
            continue
        assert found["scores"] == pytest.approx(expected[row], abs=1e-6)
        chosen = [name for c, name in enumerate(OTHERS) if expected[row][c] >= (0.6, 0.5)[c]]
        assert sorted(found["predicted_labels"]) == chosen
        assert found["accepted"] == bool(chosen)
    counts = result.counts
    assert isinstance(counts, MultiLabelCounts)
    ok = [row for row in range(20) if row != 5]
    assert counts.support.tolist() == [
        sum(name in (truth[row] or []) for row in ok) for name in OTHERS
    ]
    assert counts.labeled == sum(truth[row] is not None for row in ok)
    assert counts.unknown_label == sum("fox" in (truth[row] or []) for row in ok)
    summary = pq.read_table(tmp_path / "out" / "metrics" / "summary.parquet")
    assert "f1_micro" in summary["metric"].to_pylist()


def write_labels(path: Path, targets: np.ndarray, rows: list[int], *, listed: bool) -> str:
    """A manifest of some images of the run: lists, or one column per class."""
    columns: dict[str, Any] = {"path": [f"{row}.jpg" for row in rows]}
    if listed:
        names = [[TAGS[c] for c in np.flatnonzero(targets[row] == 1)] for row in rows]
        columns["labels"] = pa.array(names, pa.list_(pa.string()))
    else:
        for c, name in enumerate(TAGS):
            own = targets[rows, c].astype(np.int64)
            columns[name] = pa.array(own, mask=own < 0)
    pq.write_table(pa.table(columns), path)
    return str(path)


def label(run: Path, labels: str, output: Path, **settings: Any) -> pa.Table:
    manifest: dict[str, Any] = {"path": labels, "root": "/"}
    if "labels" not in pq.read_schema(labels).names:
        manifest["label_columns"] = TAGS
    relabel(source=str(run), labels=manifest, output=str(output), **settings)
    return pq.read_table(output / "predictions")


def draw_targets(unknown: float) -> np.ndarray:
    rng = np.random.default_rng(3)
    targets = (rng.random((ROWS, 3)) < [0.5, 0.3, 0.2]).astype(np.int8)
    targets[rng.random(targets.shape) < unknown] = -1
    return targets


@pytest.mark.parametrize("unknown", [0.0, 0.8])
def test_a_score_is_the_weighted_share_of_the_neighbors_with_the_label(
    tmp_path: Path, bundle: Path, unknown: float
) -> None:
    vectors = commit_run(tmp_path / "run", bundle, ROWS)
    targets = draw_targets(unknown)
    used = [row for row in range(40) if row != 5 and (targets[row] >= 0).any()]  # row 5 failed
    labels = write_labels(tmp_path / "l.parquet", targets, used, listed=unknown == 0)
    found = label(tmp_path / "run", labels, tmp_path / "out", k=K)
    run = open_run(str(tmp_path / "out"))
    assert (run.task, run.classes) == ("multilabel", tuple(TAGS))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    known = targets[used] >= 0
    shares = (targets[used] == 1).sum(0) / known.sum(0)
    fallbacks = 0
    for row in range(ROWS):
        if row == 5:
            assert found["scores"][row].as_py() is None
            continue
        others = np.array([each for each in used if each != row])
        similarity = unit[others] @ unit[row]
        nearest = np.argsort(-similarity)[:K]
        weights = np.exp((similarity[nearest] - similarity.max()) / TEMPERATURE)
        of = targets[others[nearest]]
        total = weights @ (of >= 0)
        fallbacks += int((total == 0).sum())
        with np.errstate(invalid="ignore"):
            expected = np.where(total > 0, weights @ (of == 1) / total, shares)
        assert found["scores"][row].as_py() == pytest.approx(expected, abs=1e-5), row
        names = [TAGS[c] for c in np.flatnonzero(expected >= 0.5)]
        assert sorted(found["predicted_labels"][row].as_py()) == names
    assert (fallbacks > 0) == (unknown > 0)


def test_another_threshold_and_a_single_class(tmp_path: Path, bundle: Path) -> None:
    commit_run(tmp_path / "run", bundle, ROWS)
    table = {"path": [f"{row}.jpg" for row in range(6, 30)], "labels": [["ant"], []] * 12}
    pq.write_table(pa.table(table), tmp_path / "l.parquet")
    labels = str(tmp_path / "l.parquet")
    found = label(tmp_path / "run", labels, tmp_path / "out", k=K, threshold=0.9)
    scores = np.array(found["scores"].drop_null().to_pylist())[:, 0]
    called = [len(names) for names in found["predicted_labels"].drop_null().to_pylist()]
    assert called == (scores >= 0.9).astype(int).tolist()
    assert 0 < np.mean(called) < 1
    again = label(tmp_path / "run", labels, tmp_path / "out", k=K, threshold=0.9)
    assert again.equals(found)


def test_neighbors_are_measured_by_the_labels_of_the_run(tmp_path: Path, bundle: Path) -> None:
    commit_run(tmp_path / "run", bundle, ROWS)
    targets = draw_targets(0.0)
    names: list[list[str] | None] = [[TAGS[c] for c in np.flatnonzero(row == 1)] for row in targets]
    list_labels(tmp_path / "run", names)
    labels = write_labels(tmp_path / "l.parquet", targets, list(range(6, 40)), listed=True)
    label(tmp_path / "run", labels, tmp_path / "out")
    run = open_run(str(tmp_path / "out"))
    assert run.label_columns == LabelColumns("tags")
    summary = pq.read_table(tmp_path / "out" / "metrics" / "summary.parquet").to_pylist()
    assert {row["metric"]: row["value"] for row in summary}["labelled"] == ROWS - 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("1.jpg", ["a"]), ("x/../1.jpg", ["b"])], "/1.jpg has labels 'a' and 'b'"),
        ([("1.jpg", ["a"]), ("5.jpg", ["b"])], "no image of class 'b' has an embedding"),
        ([("1.jpg", [])], "has no row with a label"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(
    tmp_path: Path, bundle: Path, rows: list[tuple[str, list[str]]], message: str
) -> None:
    commit_run(tmp_path / "run", bundle, 20)
    columns = [list(column) for column in zip(*rows, strict=True)]
    table = pa.table({"path": columns[0], "labels": pa.array(columns[1], pa.list_(pa.string()))})
    pq.write_table(table, tmp_path / "l.parquet")
    with pytest.raises((ManifestError, RequestError), match=message):
        label(tmp_path / "run", str(tmp_path / "l.parquet"), tmp_path / "out")
    assert not (tmp_path / "out" / "_SUCCESS").exists()
