"""Chunks become parts, which are counted, and retried rows replace the failed ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upath import UPath

from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.errors import RunFailed, StorageMissing
from imgcls.execution import plan as plan_module
from imgcls.execution.messages import ChunkTask
from imgcls.inference import rollup
from imgcls.runs.table_counts import TableCounter
from tests.execution.runs import CLASSES, DrawnRun, plan_at, predictions, spec_of
from tests.faults import Proxy
from tests.s3 import forget_connections, url

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def run(tmp_path: Path) -> DrawnRun:
    """100 rows: chunks of 8, parts of 24."""
    return DrawnRun.planned(tmp_path, 100, chunk_rows=8, part_rows=24)


# ------------------------------------------------------------------ rolling up and counting


@pytest.mark.parametrize("group_rows", [10, 65_536])
def test_a_part_is_its_manifest_rows_and_their_predictions_in_order(
    run: DrawnRun, monkeypatch: pytest.MonkeyPatch, group_rows: int
) -> None:
    monkeypatch.setattr(rollup, "_ROW_GROUP_ROWS", group_rows)
    run.label(wide=True)
    found = run.rolled_up()
    assert found["row"].to_pylist() == list(range(100))
    names = run.table.schema.names
    assert found.select(names).to_pylist() == run.table.to_pylist()
    assert found.select(names).schema.equals(run.table.schema)
    drawn = [predictions(run.plan.rows_of(c), c, wide=True) for c in range(run.plan.num_chunks)]
    made = pa.concat_tables(drawn)
    assert found.select(made.schema.names).to_pylist() == made.to_pylist()
    assert found.schema.field("status").type == pa.dictionary(pa.int32(), pa.string())
    metadata = pq.ParquetFile(run.part(0)).schema_arrow.metadata
    assert metadata[b"imgcls.run"] == run.plan.run_id.encode()


def test_numbers_that_never_repeat_are_not_encoded_by_dictionaries(run: DrawnRun) -> None:
    run.label(wide=True)
    run.rolled_up()
    group = pq.ParquetFile(run.part(0)).metadata.row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    encoded = {c.path_in_schema.split(".")[0]: c.has_dictionary_page for c in columns}
    without = {name for name, found in encoded.items() if not found}
    assert without == {"scores", "embedding", "accepted"}  # the last is of booleans


def test_dictionaries_of_8_bits_come_through_with_the_values_of_all_shards(tmp_path: Path) -> None:
    shards, wanted = tmp_path / "shards", []
    shards.mkdir()
    for shard in range(3):
        names = pa.array([f"site {shard}-{i}" for i in range(100)])
        codes = pa.array([i % 100 for i in range(200)], pa.int8())
        sites = pa.DictionaryArray.from_arrays(codes, names)
        wanted += sites.to_pylist()
        table = pa.table({"path": [f"{i}.jpg" for i in range(200)], "site": sites})
        pq.write_table(table, shards / f"{shard}.parquet")
    manifest = open_manifest(ManifestConfig(path=str(shards)))
    plan = plan_at(tmp_path / "out", manifest, chunk_rows=64, part_rows=512)
    run = DrawnRun(tmp_path, manifest, table, plan, spec_of(tmp_path / "out", plan, manifest, ""))
    run.label()
    for part in range(plan.num_parts):
        rollup.roll_up(run.output, plan, part, TableCounter(tuple(CLASSES)))
    assert run.read()["site"].to_pylist() == wanted


def test_a_roll_up_reads_each_chunk_by_one_request(
    run: DrawnRun, s3: Any, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output: Any = UPath(url("out"))
    plan = plan_at(output, run.manifest, chunk_rows=8)
    spec = spec_of(output, plan, run.manifest, "")
    stored = DrawnRun(run.folder, run.manifest, run.table, plan, spec)
    stored.label()
    seen: list[str] = []
    with Proxy(endpoint, respond=seen.append).running() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        forget_connections()
        assert stored.roll_up(0).rows == 100
    chunks = [head.partition(" ")[0] for head in seen if "/chunk-" in head]
    assert chunks == ["GET"] * 13


def test_the_final_files_do_not_depend_on_the_size_of_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 1,024 rows, as of a large manifest, and of 256; the same predictions."""
    monkeypatch.setattr(rollup, "_ROW_GROUP_ROWS", 4096)
    rows = 9_000
    drawn = predictions(range(rows), seed=7)
    small = DrawnRun.planned(tmp_path / "small", rows)
    monkeypatch.setattr(plan_module, "MIN_GROWN_CHUNKS", 8)
    large = DrawnRun.planned(tmp_path / "large", rows)
    assert (small.plan.chunk_rows, large.plan.chunk_rows) == (256, 1024)
    staged = []
    for run in (small, large):
        for chunk in range(run.plan.num_chunks):
            span = run.plan.rows_of(chunk)
            run.commit(chunk, drawn.slice(span.start, len(span)))
        staged.append(len(list(run.staged(0).iterdir())))
        assert run.roll_up(0).rows == rows
    assert staged == [36, 9]
    assert pq.ParquetFile(large.part(0)).metadata.num_row_groups == 3
    assert large.part(0).read_bytes() == small.part(0).read_bytes()
    assert large.read().select(large.table.column_names).equals(large.table)


def test_shards_that_were_planned_with_8_bits_are_rolled_up(tmp_path: Path) -> None:
    run = DrawnRun.planned(tmp_path, 300, chunk_rows=100, part_rows=300)
    shard = Path(run.output) / "_staging" / "manifest" / "part-00000.parquet"
    schema = pa.schema([("path", pa.string()), ("site", pa.dictionary(pa.int8(), pa.string()))])
    with pq.ParquetWriter(shard, schema) as writer:
        for group in range(3):
            names = pa.array([f"{group}-{i}" for i in range(100)])
            sites = pa.DictionaryArray.from_arrays(pa.array(range(100), pa.int8()), names)
            writer.write_table(pa.table({"path": ["a"] * 100, "site": sites}, schema=schema))
    run.label()
    rollup.roll_up(run.output, run.plan, 0, TableCounter(tuple(CLASSES)))
    wanted = [f"{group}-{i}" for group in range(3) for i in range(100)]
    assert run.read()["site"].to_pylist() == wanted


def test_counting_a_part_again_gives_the_counts_of_its_roll_up(run: DrawnRun) -> None:
    run.label()
    rolled = [run.roll_up(part) for part in range(run.plan.num_parts)]
    counter = TableCounter(tuple(CLASSES), "label")
    again = [rollup.count_part(run.output, part, counter) for part in range(run.plan.num_parts)]
    assert [c.to_dict() for c in again] == [c.to_dict() for c in rolled]
    whole = counter.count(run.read())
    merged = sum(rolled[1:], start=rolled[0])
    assert merged.rows == whole.rows == 100
    assert merged.status == whole.status
    assert merged.unknown_label == whole.unknown_label > 0
    assert merged.unlabeled == whole.unlabeled > 0
    assert (merged.confusion_count == whole.confusion_count).all()


def test_an_unlabeled_part_is_counted_by_what_was_predicted(run: DrawnRun) -> None:
    run.label()
    run.roll_up(0)
    counts = rollup.count_part(run.output, 0, TableCounter(tuple(CLASSES)))
    assert counts.rows == 24
    assert counts.predicted_counts.sum() == counts.status["ok"] == counts.unlabeled


def test_rolling_a_part_up_twice_writes_the_same_bytes(run: DrawnRun) -> None:
    run.label()
    run.roll_up(1)
    first = run.part(1).read_bytes()
    run.part(1).unlink()
    run.roll_up(1)
    assert run.part(1).read_bytes() == first


def test_a_part_with_a_chunk_missing_is_not_published(run: DrawnRun) -> None:
    run.label([3, 5])
    with pytest.raises(StorageMissing, match="chunk-00000004"):
        run.roll_up(1)
    assert list(run.part(1).parent.iterdir()) == []


def replace_run(run: DrawnRun) -> None:
    """As if another driver had started the output over."""
    path = Path(run.output) / "_run.json"
    body = json.loads(path.read_text())
    body["plan"]["run_id"] = "another"
    path.write_text(json.dumps(body))


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_run_that_was_started_over_meanwhile_publishes_nothing(
    run: DrawnRun, change: str
) -> None:
    run.label()
    run.roll_up(0)
    before = run.part(0).read_bytes()
    task = ChunkTask(1, (2, 3))
    run.commit(1, predictions([10, 11], seed=99), task.offsets)
    if change == "replaced":
        replace_run(run)
    else:
        (Path(run.output) / "_run.json").unlink()
    with pytest.raises(RunFailed, match="belongs to another run now; nothing was published"):
        run.roll_up(1)
    with pytest.raises(RunFailed, match="belongs to another run now"):
        rollup.merge_retries(run.output, run.plan, 0, [task])
    assert [path.name for path in run.part(0).parent.iterdir()] == ["part-00000.parquet"]
    assert run.part(0).read_bytes() == before


# ------------------------------------------------------------------ rows that failed


def test_failed_rows_are_the_rows_that_are_not_ok_with_their_paths_and_labels(
    run: DrawnRun,
) -> None:
    run.label()
    found = run.rolled_up()
    tasks = rollup.list_failed_rows(run.output, run.plan, ["path", "label"])
    assert [task.chunk for task in tasks] == sorted({task.chunk for task in tasks})
    named = []
    for task in tasks:
        assert task.offsets
        assert task.rows is not None
        start = run.plan.rows_of(task.chunk).start
        named += [start + offset for offset in task.offsets]
        expected = run.table.select(["path", "label"]).take(named[-len(task.offsets) :])
        assert task.rows.to_pylist() == expected.to_pylist()
    bad = [r["row"] for r in found.to_pylist() if r["status"] != "ok"]
    assert named == bad
    listed = pa.concat_tables(rollup.read_failed_rows(run.output, run.plan, "path"))
    assert listed["row"].to_pylist() == bad
    assert listed["path"].to_pylist() == [f"{row}.jpg" for row in bad]
    assert all(text.startswith("error ") for text in listed["error"].to_pylist())


def test_a_run_without_failures_has_nothing_to_retry(run: DrawnRun) -> None:
    run.label(failing=0)
    run.rolled_up()
    assert rollup.list_failed_rows(run.output, run.plan, ["path"]) == []


def test_the_rows_of_an_interrupted_retry_are_removed(run: DrawnRun) -> None:
    run.label(failing=1)
    run.rolled_up()
    run.commit(4, predictions([32], seed=5), [0])
    assert run.staged(1).exists()
    rollup.remove_retries(run.output, run.plan)
    assert not any(run.staged(part).exists() for part in range(run.plan.num_parts))


@settings(max_examples=20)
@given(
    rows=st.integers(1, 60),
    chunk_rows=st.integers(3, 40),
    chunks_per_part=st.integers(1, 6),
    group_rows=st.integers(1, 40),
    wide=st.booleans(),
    data=st.data(),
)
def test_a_retry_exchanges_just_its_rows_whatever_the_partition(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    chunk_rows: int,
    chunks_per_part: int,
    group_rows: int,
    wide: bool,
    data: st.DataObject,
) -> None:
    run = DrawnRun.planned(
        tmp_path_factory.mktemp("retry"),
        rows,
        chunk_rows=chunk_rows,
        part_rows=chunk_rows * chunks_per_part,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollup, "_ROW_GROUP_ROWS", group_rows)
        run.label(wide=wide)
        before = run.rolled_up()
        chosen = data.draw(st.sets(st.integers(0, rows - 1), min_size=1))
        by_chunk: dict[int, list[int]] = {}
        for row in sorted(chosen):
            by_chunk.setdefault(row // chunk_rows, []).append(row)
        retried = {}
        for chunk, mine in by_chunk.items():
            made = predictions(mine, seed=1000 + chunk, wide=wide, failing=0.5)
            retried.update({r["row"]: r for r in made.to_pylist()})
            start = run.plan.rows_of(chunk).start
            run.commit(chunk, made, [row - start for row in mine])
        for part in {run.plan.part_of(chunk) for chunk in by_chunk}:
            tasks = [ChunkTask(chunk) for chunk in by_chunk if run.plan.part_of(chunk) == part]
            rollup.merge_retries(run.output, run.plan, part, tasks)
            assert not run.staged(part).exists()
    after = run.read()
    expected = [row | retried.get(row["row"], {}) for row in before.to_pylist()]
    assert after.to_pylist() == expected
    assert after.schema.equals(before.schema)
