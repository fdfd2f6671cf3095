"""What is done is what lies there; chunks become parts, and retried rows take their places."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgcls.data.manifest import Manifest, ManifestConfig, open_manifest
from imgcls.errors import RunFailed, StorageMissing
from imgcls.execution import completed
from imgcls.execution.completed import CompletedChunks
from imgcls.execution.messages import ChunkTask, PredictSpec, StageTimings
from imgcls.execution.plan import Plan
from imgcls.inference import stages
from imgcls.metrics import PredictionCounts
from tests.execution.runs import CLASSES, manifest_of, plan_at, predictions, spec_of

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


@dataclass
class Run:
    """A planned run whose predictions are drawn rather than computed."""

    folder: Path
    manifest: Manifest
    table: pa.Table
    plan: Plan
    spec: PredictSpec

    @classmethod
    def planned(cls, folder: Path, rows: int, **sizes: Any) -> Run:
        table = pa.table(
            {
                "path": [f"{i}.jpg" for i in range(rows)],
                "label": [("red", None, "green", "mauve")[i % 4] for i in range(rows)],
                "camera": pa.array([f"camera {i // 5}" for i in range(rows)]).dictionary_encode(),
                "tags": [[{"site": i}] * (i % 3) if i % 7 else None for i in range(rows)],
            }
        )
        manifest = manifest_of(folder, table)
        plan = plan_at(folder / "out", manifest, **sizes)
        return cls(folder, manifest, table, plan, spec_of(folder / "out", plan, manifest, ""))

    @property
    def output(self) -> str:
        return self.spec.output

    def commit(self, chunk: int, table: pa.Table, offsets: Sequence[int] | None = None) -> None:
        work = ChunkTask(chunk, None if offsets is None else tuple(offsets))
        stages.write_chunk(self.spec, work, table, StageTimings())

    def label(self, chunks: Sequence[int] | None = None, **options: Any) -> None:
        """Commit drawn predictions of some chunks, or of all."""
        for chunk in range(self.plan.num_chunks) if chunks is None else chunks:
            self.commit(chunk, predictions(self.plan.rows_of(chunk), seed=chunk, **options))

    def roll_up(self, part: int) -> PredictionCounts:
        return completed.roll_up(self.output, self.plan, part, "label", CLASSES)

    def part(self, part: int) -> Path:
        return Path(self.output) / "predictions" / f"part-{part:05d}.parquet"

    def staged(self, part: int) -> Path:
        return Path(self.output) / "_staging" / f"part-{part:05d}"

    def rolled_up(self) -> pa.Table:
        for part in range(self.plan.num_parts):
            self.roll_up(part)
            CompletedChunks.load(self.output, self.plan).mark_rolled_up(part)
        return self.read()

    def read(self) -> pa.Table:
        parts = [pq.read_table(self.part(part)) for part in range(self.plan.num_parts)]
        return pa.concat_tables(parts).unify_dictionaries()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """100 rows: chunks of 8, parts of 24."""
    return Run.planned(tmp_path, 100, chunk_rows=8, part_rows=24)


# ------------------------------------------------------------------ rolling up and counting


@pytest.mark.parametrize("group_rows", [10, 65_536])
def test_a_part_is_its_manifest_rows_and_their_predictions_in_order(
    run: Run, monkeypatch: pytest.MonkeyPatch, group_rows: int
) -> None:
    monkeypatch.setattr(completed, "_ROW_GROUP_ROWS", group_rows)
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
    run = Run(tmp_path, manifest, table, plan, spec_of(tmp_path / "out", plan, manifest, ""))
    run.label()
    for part in range(plan.num_parts):
        completed.roll_up(run.output, plan, part, None, CLASSES)
    assert run.read()["site"].to_pylist() == wanted


def test_shards_that_were_planned_with_8_bits_are_rolled_up(tmp_path: Path) -> None:
    run = Run.planned(tmp_path, 300, chunk_rows=100, part_rows=300)
    shard = Path(run.output) / "_staging" / "manifest" / "part-00000.parquet"
    schema = pa.schema([("path", pa.string()), ("site", pa.dictionary(pa.int8(), pa.string()))])
    with pq.ParquetWriter(shard, schema) as writer:
        for group in range(3):
            names = pa.array([f"{group}-{i}" for i in range(100)])
            sites = pa.DictionaryArray.from_arrays(pa.array(range(100), pa.int8()), names)
            writer.write_table(pa.table({"path": ["a"] * 100, "site": sites}, schema=schema))
    run.label()
    completed.roll_up(run.output, run.plan, 0, None, CLASSES)
    wanted = [f"{group}-{i}" for group in range(3) for i in range(100)]
    assert run.read()["site"].to_pylist() == wanted


def test_counting_a_part_anew_gives_the_counts_of_its_roll_up(run: Run) -> None:
    run.label()
    rolled = [run.roll_up(part) for part in range(run.plan.num_parts)]
    again = [
        completed.count_part(run.output, part, "label", CLASSES)
        for part in range(run.plan.num_parts)
    ]
    assert [c.to_dict() for c in again] == [c.to_dict() for c in rolled]
    whole = completed.count_table(run.read(), "label", CLASSES)
    merged = sum(rolled[1:], start=rolled[0])
    assert merged.rows == whole.rows == 100
    assert merged.status == whole.status
    assert merged.unknown_label == whole.unknown_label > 0
    assert merged.unlabeled == whole.unlabeled > 0
    assert (merged.confusion_count == whole.confusion_count).all()


def test_an_unlabelled_part_is_counted_by_what_was_predicted(run: Run) -> None:
    run.label()
    run.roll_up(0)
    counts = completed.count_part(run.output, 0, None, CLASSES)
    assert counts.rows == 24
    assert counts.predicted_counts.sum() == counts.status["ok"] == counts.unlabeled


def test_whoever_rolls_a_part_up_writes_the_same_bytes(run: Run) -> None:
    run.label()
    run.roll_up(1)
    first = run.part(1).read_bytes()
    run.part(1).unlink()
    run.roll_up(1)
    assert run.part(1).read_bytes() == first


def test_a_part_with_a_chunk_missing_is_not_published(run: Run) -> None:
    run.label([3, 5])
    with pytest.raises(StorageMissing, match="chunk-00000004"):
        run.roll_up(1)
    assert list(run.part(1).parent.iterdir()) == []


def replace_run(run: Run) -> None:
    """As if another driver had started the output over."""
    path = Path(run.output) / "_run.json"
    body = json.loads(path.read_text())
    body["plan"]["run_id"] = "another"
    path.write_text(json.dumps(body))


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_run_that_was_started_over_meanwhile_publishes_nothing(run: Run, change: str) -> None:
    run.label()
    run.roll_up(0)
    before = run.part(0).read_bytes()
    work = ChunkTask(1, (2, 3))
    run.commit(1, predictions([10, 11], seed=99), work.offsets)
    if change == "replaced":
        replace_run(run)
    else:
        (Path(run.output) / "_run.json").unlink()
    with pytest.raises(RunFailed, match="belongs to another run by now; nothing was published"):
        run.roll_up(1)
    with pytest.raises(RunFailed, match="belongs to another run by now"):
        completed.merge_retries(run.output, run.plan, 0, [work])
    assert [path.name for path in run.part(0).parent.iterdir()] == ["part-00000.parquet"]
    assert run.part(0).read_bytes() == before


# ------------------------------------------------------------------ what is done


def test_the_ledger_follows_chunks_into_parts(run: Run) -> None:
    book = CompletedChunks.load(run.output, run.plan)
    assert [work.chunk for work in book.list_remaining()] == list(range(13))
    assert (book.rows_done, book.list_complete_parts()) == (0, [])
    run.label([0, 2, 12])
    book = CompletedChunks.load(run.output, run.plan)
    assert [work.chunk for work in book.list_remaining()] == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert (book.rows_done, book.list_complete_parts()) == (8 + 8 + 4, [4])
    assert book.add(3) is None
    run.label([1])
    assert book.add(1) == 0
    run.roll_up(0)
    book.mark_rolled_up(0)
    assert not run.staged(0).exists()
    assert book.rows_done == 24 + 4 + 8
    again = CompletedChunks.load(run.output, run.plan)
    assert (again.parts, again.chunks) == ({0}, {4: {12}})
    assert again.rows_done == 24 + 4


def test_chunks_of_a_part_that_is_rolled_up_are_not_counted_twice(run: Run) -> None:
    run.label([0, 1, 2])
    run.roll_up(0)  # killed before the chunks were removed
    book = CompletedChunks.load(run.output, run.plan)
    assert (book.parts, book.chunks, book.rows_done) == ({0}, {}, 24)


def test_files_that_are_not_of_this_run_are_not_taken_for_its_work(run: Run) -> None:
    run.label([0])
    folder = run.staged(0)
    mine = next(folder.iterdir())
    other = mine.name.replace(run.plan.run_id, "0123456789ab")
    for name in (
        other.replace("00000000", "00000001"),  # another run's chunk
        mine.name.replace("chunk-00000000", "retry-00000001"),
        f".{mine.name}.0a1b2c3d4e5f.tmp".replace("00000000", "00000001"),
        "notes.txt",
    ):
        (folder / name).write_bytes(mine.read_bytes())
    predictions_ = Path(run.output) / "predictions"
    predictions_.mkdir()
    for name in ("part-00001.parquet.bak", ".part-00001.parquet.0a1b2c3d4e5f.tmp", "part-99999"):
        (predictions_ / name).write_bytes(b"x")
    book = CompletedChunks.load(run.output, run.plan)
    assert (book.parts, book.chunks) == (set(), {0: {0}})


# ------------------------------------------------------------------ rows that failed


def test_failed_rows_are_the_rows_that_are_not_ok_with_their_paths_and_labels(run: Run) -> None:
    run.label()
    found = run.rolled_up()
    work = completed.list_failed_rows(run.output, run.plan, ["path", "label"])
    assert [item.chunk for item in work] == sorted({item.chunk for item in work})
    named = []
    for item in work:
        assert item.offsets
        assert item.rows is not None
        start = run.plan.rows_of(item.chunk).start
        named += [start + offset for offset in item.offsets]
        expected = run.table.select(["path", "label"]).take(named[-len(item.offsets) :])
        assert item.rows.to_pylist() == expected.to_pylist()
    bad = [r["row"] for r in found.to_pylist() if r["status"] != "ok"]
    assert named == bad
    listed = pa.concat_tables(completed.read_failed_rows(run.output, run.plan, "path"))
    assert listed["row"].to_pylist() == bad
    assert listed["path"].to_pylist() == [f"{row}.jpg" for row in bad]
    assert all(text.startswith("error ") for text in listed["error"].to_pylist())


def test_a_run_without_failures_has_nothing_to_retry(run: Run) -> None:
    run.label(failing=0)
    run.rolled_up()
    assert completed.list_failed_rows(run.output, run.plan, ["path"]) == []


def test_what_a_broken_off_retry_left_behind_is_dropped(run: Run) -> None:
    run.label(failing=1)
    run.rolled_up()
    run.commit(4, predictions([32], seed=5), [0])
    assert run.staged(1).exists()
    completed.remove_retries(run.output, run.plan)
    assert not any(run.staged(part).exists() for part in range(run.plan.num_parts))


@settings(max_examples=30)
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
    run = Run.planned(
        tmp_path_factory.mktemp("retry"),
        rows,
        chunk_rows=chunk_rows,
        part_rows=chunk_rows * chunks_per_part,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(completed, "_ROW_GROUP_ROWS", group_rows)
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
            work = [ChunkTask(chunk) for chunk in by_chunk if run.plan.part_of(chunk) == part]
            completed.merge_retries(run.output, run.plan, part, work)
            assert not run.staged(part).exists()
    after = run.read()
    expected = [row | retried.get(row["row"], {}) for row in before.to_pylist()]
    assert after.to_pylist() == expected
    assert after.schema.equals(before.schema)
