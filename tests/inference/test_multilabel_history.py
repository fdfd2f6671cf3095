"""Histories of multilabel runs, and of runs of both tasks, which are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from imgcls.data.manifests.label_columns import LabelColumns
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.errors import RequestError
from imgcls.evaluation.compare import compare
from imgcls.evaluation.config import CompareConfig
from imgcls.evaluation.multilabel_compare import MultiLabelComparison
from imgcls.inference.config import SinceConfig
from imgcls.inference.history import CompactConfig, compact
from imgcls.inference.incremental import SinceRequest
from imgcls.metrics.multilabel import MultiLabelCounts
from imgcls.models.bundle import TaskName
from imgcls.runs import layout
from imgcls.runs.committed import iter_tables, open_run
from imgcls.runs.table_counts import merge_counts
from tests.evaluation.drawn_cells import build_table, commit_multilabel, draw_cells
from tests.evaluation.runs import CLASSES, commit, drawn


def number(run: Path, sequence: int) -> Path:
    record = json.loads((run / layout.RUN_FILE).read_text())
    (run / layout.RUN_FILE).write_text(json.dumps(record | {"sequence": sequence}))
    return run


def compact_runs(tmp_path: Path) -> str:
    return compact(CompactConfig(source=str(tmp_path / "labels"), output=str(tmp_path / "all")))


@pytest.mark.parametrize("listed", [True, False])
def test_a_multilabel_history_is_a_multilabel_run_with_labels(tmp_path: Path, listed: bool) -> None:
    logits, targets = draw_cells(300, 1)
    first = build_table(-logits, targets, listed=listed, failed=0.1)
    second = build_table(logits, targets, listed=listed)
    number(commit_multilabel(tmp_path / "labels" / "1", first, root="/images"), 1)
    number(commit_multilabel(tmp_path / "labels" / "2", second.slice(100), root="/images"), 2)
    run = open_run(compact_runs(tmp_path))
    assert (run.task, run.rows, run.has_scores) == ("multilabel", 300, True)
    labels = LabelColumns("labels") if listed else LabelColumns(per_class=CLASSES)
    assert run.label_columns == labels
    counter = run.create_counter()
    counts = counter.empty()
    for table in iter_tables(run, counter.select_columns(run.schema)):
        counts = merge_counts(counts, counter.count(table))
    assert isinstance(counts, MultiLabelCounts)
    table = pq.read_table(f"{run.url}/predictions").sort_by("path")
    newest = second["predicted_labels"].to_pylist()[100:]
    assert table["predicted_labels"].to_pylist()[100:] == newest
    assert (
        table["predicted_labels"].to_pylist()[:100] == first["predicted_labels"][:100].to_pylist()
    )
    ok = np.array(table["status"].to_pylist()) == "ok"
    assert counts.labeled == ok.sum()
    assert counts.support.tolist() == (targets[ok] == 1).sum(0).tolist()


def test_a_history_is_compared_with_a_run(tmp_path: Path) -> None:
    logits, targets = draw_cells(60, 1)
    table = build_table(logits, targets)
    run = commit_multilabel(tmp_path / "labels" / "1", table, root="/images")
    history = compact_runs(tmp_path)
    found = compare(CompareConfig(run_a=history, run_b=history, on="path"))
    assert isinstance(found, MultiLabelComparison)
    assert found.rows == 60
    with pytest.raises(RequestError, match="have different manifests"):
        compare(CompareConfig(run_a=history, run_b=str(run)))


def test_bundles_with_other_classes_leave_lists_of_scores(tmp_path: Path) -> None:
    logits, targets = draw_cells(40, 1)
    number(commit_multilabel(tmp_path / "labels" / "1", build_table(logits, targets)), 1)
    few = build_table(logits[:20, :3], targets[:20, :3], classes=CLASSES[:3])
    number(commit_multilabel(tmp_path / "labels" / "2", few, classes=CLASSES[:3]), 2)
    run = open_run(compact_runs(tmp_path))
    assert not run.has_scores
    with pytest.raises(RequestError, match="is a history whose scores the comparison cannot"):
        compare(CompareConfig(run_a=run.url, run_b=run.url, on="path"))


def test_runs_of_both_tasks_are_refused_by_name(tmp_path: Path) -> None:
    logits, targets = draw_cells(20, 1)
    commit_multilabel(tmp_path / "labels" / "many", build_table(logits, targets))
    commit(tmp_path / "labels" / "one", drawn(20))
    with pytest.raises(RequestError, match=r"different tasks.*multilabel: \S+many.*: \S+one\)"):
        compact_runs(tmp_path)
    assert not (tmp_path / "all" / "_SUCCESS").exists()


@pytest.mark.parametrize("task", ["single_label", "multilabel"])
def test_since_refuses_runs_of_another_task(tmp_path: Path, task: TaskName) -> None:
    logits, targets = draw_cells(20, 1)
    table = build_table(logits, targets)
    commit_multilabel(tmp_path / "labels" / "many", table)
    pq.write_table(table.select(["path"]), tmp_path / "manifest.parquet")
    manifest = open_manifest(ManifestConfig(path=str(tmp_path / "manifest.parquet")))

    def resolve() -> SinceRequest:
        return SinceRequest.resolve(
            manifest,
            SinceConfig(path=str(tmp_path / "labels")),
            output=str(tmp_path / "labels" / "new"),
            bundle_sha256="c" * 64,
            relabel=False,
            retry_failed=False,
            exclude=None,
            task=task,
        )

    if task == "multilabel":
        assert len(resolve().past_runs.committed) == 1
    else:
        with pytest.raises(RequestError, match=r"since .*many, and the new run is single_label\)"):
            resolve()
