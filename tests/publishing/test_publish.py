"""`imgcls publish`: each run is in the table once, whatever happens, and nothing else is."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from pyiceberg.catalog import load_catalog

from imgcls import cli
from imgcls.errors import OutputError, RequestError, RunFailed
from imgcls.publishing import rows as run_rows
from imgcls.publishing.publish import check_target, create_sink
from imgcls.publishing.rows import RunRows
from imgcls.runs import layout
from imgcls.runs.committed import iter_tables, open_run
from tests.evaluation.drawn_cells import build_table, commit_multilabel, draw_cells
from tests.evaluation.runs import commit, drawn
from tests.publishing.tables import (
    commit_again,
    count_with_duckdb,
    count_with_polars,
    publish_to,
    read,
    set_run_id,
)


@pytest.fixture(params=["delta", "iceberg"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A table that does not exist yet."""
    if request.param == "delta":
        return f"delta:{tmp_path}/table"
    return f"iceberg:{request.getfixturevalue('catalog')}.ml.labels"


def test_the_table_has_the_rows_of_the_run_and_their_origin(run: Path, target: str) -> None:
    assert publish_to(run, target).action == "published"
    found = read(target)
    wanted = pa.concat_tables(iter_tables(open_run(str(run)), open_run(str(run)).schema.names))
    for name in wanted.schema.names:
        assert found[name].to_pylist() == wanted[name].to_pylist(), name
    assert set(found["run_id"].to_pylist()) == {"drawn"}
    assert set(found["run"].to_pylist()) == {str(run)}
    assert set(found["bundle_sha256"].to_pylist()) == {"b" * 64}
    assert set(found["labelled_at"].to_pylist()) == {"2026-01-01T00:00:00"}
    assert count_with_polars(target) == count_with_duckdb(target) == (90, 90)


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_lists_of_labels_and_scores_are_published(target: str, tmp_path: Path, kind: str) -> None:
    logits, targets = draw_cells(90, 1)
    table = build_table(logits, targets, kind=kind, failed=0.1)
    run = commit_multilabel(tmp_path / "run", table, parts=3, group_rows=20)
    assert publish_to(run, target).action == "published"
    found = read(target)
    assert found["predicted_labels"].to_pylist().count([]) > 0
    for name in ("labels", "predicted_labels", "topk_labels", "topk_scores", "scores", "accepted"):
        assert found[name].to_pylist() == table[name].to_pylist(), name
    assert count_with_polars(target) == count_with_duckdb(target) == (90, 90)
    assert publish_to(run, target).action == "unchanged"


def test_runs_of_both_tasks_may_share_a_table(run: Path, target: str, tmp_path: Path) -> None:
    logits, targets = draw_cells(7, 1)
    table = build_table(logits, targets)
    many = set_run_id(commit_multilabel(tmp_path / "many", table), "many")
    publish_to(run, target)
    assert publish_to(many, target).action == "published"
    found = read(target)
    labels = found["predicted_labels"].to_pylist()
    assert labels == [None] * 90 + table["predicted_labels"].to_pylist()
    assert found["predicted_label"].to_pylist()[90:] == [None] * 7


def test_publishing_again_adds_nothing(run: Path, target: str) -> None:
    first = publish_to(run, target)
    again = publish_to(run, target)
    assert (again.action, again.version) == ("unchanged", first.version)
    assert read(target).num_rows == 90


def test_a_run_that_was_committed_again_replaces_its_rows_only(
    run: Path, target: str, tmp_path: Path
) -> None:
    other = set_run_id(commit(tmp_path / "other", drawn(7)), "other")
    publish_to(run, target)
    publish_to(other, target)
    commit_again(run, "empty")
    assert publish_to(run, target).action == "replaced"
    found = read(target)
    statuses = Counter(zip(found["run_id"].to_pylist(), found["status"].to_pylist(), strict=True))
    assert statuses == {("drawn", "empty"): 90, ("other", "ok"): 7}
    assert publish_to(run, target).action == "unchanged"


def test_of_two_publishers_of_one_run_one_adds_it(run: Path, target: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: publish_to(run, target).action, range(4)))
    assert sorted(done) == ["published", "unchanged", "unchanged", "unchanged"]
    assert count_with_polars(target) == (90, 90)


def test_publishers_of_different_runs_all_add_theirs(target: str, tmp_path: Path) -> None:
    runs = [set_run_id(commit(tmp_path / f"{i}", drawn(5, seed=i)), f"run{i}") for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda run: publish_to(run, target).action, runs))
    assert done == ["published"] * 4
    assert Counter(read(target)["run_id"].to_pylist()) == {f"run{i}": 5 for i in range(4)}


def test_new_columns_are_added_and_missing_ones_are_null(target: str, tmp_path: Path) -> None:
    table = drawn(4)
    first = commit(tmp_path / "first", table.drop_columns(["camera"]))
    site = table.append_column("the site", pa.array([1, 2, 3, 4], pa.uint16()))
    second = set_run_id(commit(tmp_path / "second", site.drop_columns(["label"])), "second")
    publish_to(first, target)
    publish_to(second, target)
    found = read(target)
    assert found["the site"].to_pylist() == [None] * 4 + [1, 2, 3, 4]
    assert found["label"].to_pylist() == table["label"].to_pylist() + [None] * 4
    assert found["camera"].to_pylist()[:4] == [None] * 4


def test_a_column_of_another_type_is_refused_by_name(target: str, tmp_path: Path) -> None:
    table = drawn(3)
    publish_to(commit(tmp_path / "first", table), target)
    at = table.schema.get_field_index("camera")
    numbers = table.set_column(at, "camera", pa.array([1, 2, 3]))
    other = set_run_id(commit(tmp_path / "other", numbers), "other")
    with pytest.raises(RequestError, match=r"column 'camera' is (large_)?string, and int64 in"):
        publish_to(other, target)
    assert read(target).num_rows == 3


def test_without_the_record_of_the_transaction_the_rows_decide(
    run: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_to(run, target)
    if target.startswith("delta:"):
        monkeypatch.setattr("deltalake.DeltaTable.transaction_version", lambda *_: None)
    else:
        monkeypatch.setattr("pyiceberg.table.snapshots.ancestors_of", lambda *_: [])
    assert publish_to(run, target).action == "unchanged"
    commit_again(run, "empty")
    assert publish_to(run, target).action == "replaced"
    assert set(read(target)["status"].to_pylist()) == {"empty"}
    assert count_with_polars(target) == (90, 90)


def test_a_partitioned_delta_table_keeps_its_partitions(run: Path, tmp_path: Path) -> None:
    table = tmp_path / "table"
    schema = pa.schema([("status", pa.string()), ("row", pa.int64())])
    DeltaTable.create(table, schema, partition_by=["status"])
    assert publish_to(run, f"delta:{table}").action == "published"
    commit_again(run, "empty")
    assert publish_to(run, f"delta:{table}").action == "replaced"
    found = DeltaTable(table)
    assert found.partitions() == [{"status": "empty"}]
    assert sorted(found.to_pyarrow_table()["row"].to_pylist()) == list(range(90))


def test_an_iceberg_table_with_partitions_or_other_required_columns_is_refused(
    run: Path, catalog: str
) -> None:
    tables = load_catalog(catalog)
    tables.create_table("ml.strict", pa.schema([pa.field("site", pa.string(), nullable=False)]))
    partitioned = tables.create_table("ml.split", pa.schema([("status", pa.string())]))
    with partitioned.update_spec() as spec:
        spec.add_identity("status")
    with pytest.raises(RequestError, match=r"column 'site' is required, and .*/run has no such"):
        publish_to(run, "iceberg:local.ml.strict")
    with pytest.raises(RequestError, match="is partitioned by status"):
        publish_to(run, "iceberg:local.ml.split")
    with pytest.raises(RequestError, match="pyiceberg --catalog local create namespace other"):
        publish_to(run, "iceberg:local.other.labels")


def test_a_delta_table_that_requires_another_column_is_refused(run: Path, tmp_path: Path) -> None:
    schema = pa.schema([pa.field("site", pa.string(), nullable=False)])
    DeltaTable.create(tmp_path / "table", schema)
    with pytest.raises(RequestError, match=r"column 'site' is required, and .*/run has no such"):
        publish_to(run, f"delta:{tmp_path}/table")


def test_a_run_that_changes_meanwhile_is_not_published(
    run: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RunRows.iter_tables

    def change(self, file, schema):  # type: ignore[no-untyped-def]
        yield from original(self, file, schema)
        if file == self.run.files[-1]:
            commit_again(run, "empty")

    publish_to(set_run_id(commit(run.parent / "other", drawn(5)), "other"), target)
    monkeypatch.setattr(RunRows, "iter_tables", change)
    with pytest.raises(RunFailed, match="was changed while it was being published"):
        publish_to(run, target)
    assert set(read(target)["run_id"].to_pylist()) == {"other"}


def test_a_run_without_rows_changes_nothing(target: str, tmp_path: Path) -> None:
    run = commit(tmp_path / "run", drawn(3).slice(0, 0))
    assert publish_to(run, target).action == "unchanged"


def test_a_run_that_is_not_committed_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / layout.SUCCESS_FILE).unlink()
    assert cli.main(["publish", str(run), "--to", f"delta:{run}/table"]) == 2
    assert "is not committed" in capsys.readouterr().err


def test_a_part_of_another_size_is_refused(run: Path, target: str) -> None:
    part = run / layout.PREDICTIONS_FOLDER / "part-00001.parquet"
    part.write_bytes(part.read_bytes() + b"!")
    with pytest.raises(OutputError, match="is not the file that was committed"):
        publish_to(run, target)


def test_columns_that_publishing_adds_are_refused(tmp_path: Path) -> None:
    table = drawn(2).append_column("Run_ID", pa.array(["a", "b"]))
    run = commit(tmp_path / "run", table)
    with pytest.raises(RequestError, match="column 'Run_ID' is a column that publishing adds"):
        RunRows.open(str(run))
    assert "run_id" in run_rows.PUBLISHED_COLUMNS


@pytest.mark.parametrize("target", ["table", "delta:", "lance:x", "s3://bucket/table"])
def test_other_targets_are_refused_with_the_known_ones(target: str) -> None:
    with pytest.raises(RequestError, match=r"delta:URL_OR_PATH, iceberg:CATALOG\.NAMESPACE\.TABLE"):
        create_sink(target)


def test_a_missing_package_is_named_with_its_extra(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = target.partition(":")[0]
    module = {"delta": "deltalake", "iceberg": "pyiceberg.catalog"}[kind]
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(RequestError, match=rf"Run pip install 'imgcls\[{kind}\]'"):
        check_target(target, pa.schema([("path", pa.string())]), "manifest m.csv")
