"""Labels of a multilabel run from another table: the same numbers as labels in the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.data.manifests.label_columns import LabelColumns, build_name_lists
from imgcls.errors import ManifestError, RequestError
from imgcls.evaluation.compute import compute_evaluation
from imgcls.evaluation.config import EvaluationOptions, LabelTableConfig
from imgcls.evaluation.multilabel import MultiLabelEvaluation
from tests.conftest import write_manifest
from tests.evaluation.multilabel_runs import (
    CLASSES,
    build_run_table,
    commit_multilabel,
    draw_scores,
    draw_targets,
)
from tests.evaluation.runs import commit, drawn

ROWS = 600


@pytest.fixture(scope="module")
def targets() -> np.ndarray:
    return draw_targets(ROWS)


@pytest.fixture(scope="module")
def table(targets: np.ndarray) -> pa.Table:
    return build_run_table(targets, draw_scores(targets), labels="columns", failed=0.1)


@pytest.fixture(scope="module")
def blind(table: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blind") / "out"
    return commit_multilabel(folder, table.drop_columns(list(CLASSES)), labels=None, parts=2)


def evaluate(run: Path, **labels: Any) -> MultiLabelEvaluation:
    joined = LabelTableConfig(**labels) if labels else None
    config = EvaluationOptions(labels=joined, slice_by=["camera"], thumbnails=False)
    found = compute_evaluation(str(run), config, need_labels=True)
    assert isinstance(found, MultiLabelEvaluation)
    return found


def write_labels(place: Path, form: str, targets: np.ndarray, *, reverse: bool = True) -> Path:
    """Labels in one of the forms, in another order than the run."""
    order = np.arange(ROWS)[::-1] if reverse else np.arange(ROWS)
    paths = [f"images/{i:06d}.jpg" for i in order]
    names = build_name_lists(targets, CLASSES).take(pa.array(order))
    if form == "lists":
        pq.write_table(pa.table({"path": paths, "labels": names}), place)
    elif form == "text":
        texts = [";".join(each) or ";" for each in names.to_pylist()]
        write_manifest(place, list(zip(paths, texts, strict=True)), ("path", "truth"))
    else:
        columns = {name: targets[order, code] for code, name in enumerate(CLASSES)}
        pq.write_table(pa.table({"path": paths, **columns}), place)
    return place


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("lists", {}),
        ("text", {"column": "truth", "label_delimiter": ";"}),
        ("columns", {"label_columns": list(CLASSES)}),
    ],
)
def test_joined_labels_equal_labels_in_the_run(
    form: str,
    options: dict[str, Any],
    table: pa.Table,
    targets: np.ndarray,
    blind: Path,
    tmp_path: Path,
) -> None:
    columns = LabelColumns(per_class=CLASSES)
    own = evaluate(commit_multilabel(tmp_path / "own", table, labels=columns, parts=2))
    place = write_labels(
        tmp_path / f"labels.{'csv' if form == 'text' else 'parquet'}", form, targets
    )
    joined = evaluate(blind, path=str(place), **options)
    for name, expected in own.build_tables().items():
        assert joined.build_tables()[name].equals(expected), name
    assert [(m.name, m.value) for m in joined.metrics] == [(m.name, m.value) for m in own.metrics]
    # names of a list are in the order of the list
    assert joined.mistakes.select(["row", "labels"]).equals(own.mistakes.select(["row", "labels"]))
    assert joined.issue_rows["predicted_labels"].equals(own.issue_rows["predicted_labels"])


def test_joined_labels_replace_those_of_the_run(
    table: pa.Table, targets: np.ndarray, tmp_path: Path
) -> None:
    columns = LabelColumns(per_class=CLASSES)
    run = commit_multilabel(tmp_path / "own", table, labels=columns)
    place = write_labels(tmp_path / "labels.parquet", "lists", 1 - targets)
    own, joined = evaluate(run), evaluate(run, path=str(place))
    assert joined.per_class["support"].to_pylist() != own.per_class["support"].to_pylist()


def test_rows_without_a_joined_label_are_unlabeled(
    targets: np.ndarray, blind: Path, tmp_path: Path
) -> None:
    place = write_labels(tmp_path / "labels.parquet", "lists", targets, reverse=False)
    pq.write_table(pq.read_table(place).slice(0, 200), place)
    metric = evaluate(blind, path=str(place)).get_metric("labelled")
    found = evaluate(blind, path=str(place))
    assert metric is not None
    assert metric.value == found.counts.labeled < 200
    assert found.counts.unlabeled == found.counts.ok - found.counts.labeled


def test_names_that_are_no_class_are_counted_and_shown(
    targets: np.ndarray, blind: Path, tmp_path: Path
) -> None:
    place = write_labels(tmp_path / "labels.parquet", "lists", targets)
    labels = pq.read_table(place)
    names = [[*each, "whale"] for each in labels["labels"].to_pylist()]
    pq.write_table(labels.set_column(1, "labels", pa.array(names)), place)
    found = evaluate(blind, path=str(place))
    assert found.counts.unknown_label == found.counts.ok
    assert all("whale" in row for row in found.mistakes["labels"].to_pylist())


def test_keys_must_be_unique_and_match(targets: np.ndarray, blind: Path, tmp_path: Path) -> None:
    place = write_labels(tmp_path / "labels.parquet", "lists", targets)
    labels = pq.read_table(place)
    pq.write_table(pa.concat_tables([labels, labels.slice(3, 1)]), place)
    with pytest.raises(RequestError, match="occurs twice; keep one label per key"):
        evaluate(blind, path=str(place))
    other = labels.set_column(0, "path", pa.array([f"other/{i}" for i in range(ROWS)]))
    pq.write_table(other, place)
    with pytest.raises(RequestError, match="no path of the predictions is among its 600"):
        evaluate(blind, path=str(place))


def test_tables_that_cannot_be_used(targets: np.ndarray, blind: Path, tmp_path: Path) -> None:
    place = write_labels(tmp_path / "labels.parquet", "lists", targets)
    pq.write_table(pq.read_table(place).rename_columns(["path", "truth"]), place)
    with pytest.raises(RequestError, match=r"has no column of labels \(found: path, truth\); name"):
        evaluate(blind, path=str(place))
    with pytest.raises(ManifestError, match=r"--labels\.label-delimiter; remove it"):
        evaluate(blind, path=str(place), column="truth", label_delimiter=";")
    with pytest.raises(ManifestError, match=r"no column 'ant' .*correct --labels\.label-columns"):
        evaluate(blind, path=str(place), label_columns=["ant"])
    pq.write_table(pq.read_table(place).slice(0, 0), place)
    with pytest.raises(RequestError, match="has no rows"):
        evaluate(blind, path=str(place), column="truth")


def test_a_run_of_one_label_per_image_takes_no_lists(tmp_path: Path) -> None:
    run = commit(tmp_path / "out", drawn(30))
    labels = LabelTableConfig(path="labels.csv", label_delimiter=";")
    with pytest.raises(RequestError, match=r"labels\.label_delimiter: is for several labels per"):
        compute_evaluation(str(run), EvaluationOptions(labels=labels), need_labels=True)
