"""The plan: rows split without gaps, a run distinguished from others, bounded memory."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.errors import ManifestError, OutputError
from imgcls.execution import plan as plan_module
from imgcls.execution.plan import (
    DEFAULT_CHUNK_ROWS,
    MAX_PART_BYTES,
    Plan,
    RunIdentity,
    choose_sizes,
    parse_plan,
    read_shard_chunk,
    restore_shards,
)
from imgcls.runs.layout import load_run
from tests.execution.runs import identity_of, manifest_of, plan_at
from tests.processes import REPOSITORY


def numbered(rows: int) -> pa.Table:
    """A manifest table with nested columns, whose rows differ."""
    return pa.table(
        {
            "path": [f"{i:06d}.jpg" for i in range(rows)],
            "label": [("red", "green", None)[i % 3] for i in range(rows)],
            "meta": [{"site": i, "tags": ["x"] * (i % 3)} for i in range(rows)],
        },
        schema=pa.schema(
            [
                ("path", pa.string()),
                ("label", pa.string()),
                ("meta", pa.struct([("site", pa.int32()), ("tags", pa.list_(pa.string()))])),
            ]
        ),
    )


def shards(output: Path) -> list[pq.ParquetFile]:
    return [pq.ParquetFile(p) for p in sorted((output / "_staging" / "manifest").iterdir())]


# ------------------------------------------------------------------ cutting


@settings(max_examples=40)
@given(
    rows=st.integers(1, 400),
    chunk_rows=st.none() | st.integers(1, 500),
    part_rows=st.integers(1, 500),
    limit=st.none() | st.integers(1, 500),
)
def test_chunks_tile_the_rows_and_row_group_g_of_a_shard_is_its_chunk_g(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    chunk_rows: int | None,
    part_rows: int,
    limit: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    table = numbered(rows)
    manifest = manifest_of(folder, table)
    output = folder / "out"
    plan = plan_at(output, manifest, chunk_rows=chunk_rows, part_rows=part_rows, limit=limit)
    expected = table.slice(0, limit)

    assert plan.rows == expected.num_rows
    assert plan.part_rows <= part_rows
    assert plan.part_rows % plan.chunk_rows == 0
    tiled = [row for chunk in range(plan.num_chunks) for row in plan.rows_of(chunk)]
    assert tiled == list(range(plan.rows))
    by_part = [chunk for part in range(plan.num_parts) for chunk in plan.chunks_of(part)]
    assert by_part == list(range(plan.num_chunks))
    assert all(plan.part_of(c) == p for p in range(plan.num_parts) for c in plan.chunks_of(p))

    files = shards(output)
    assert len(files) == plan.num_parts
    for part, file in enumerate(files):
        assert file.metadata.num_row_groups == len(plan.chunks_of(part))
        for group, chunk in enumerate(plan.chunks_of(part)):
            span = plan.rows_of(chunk)
            wanted = expected.slice(span.start, len(span))
            assert file.read_row_group(group).equals(wanted)
    assert parse_plan(load_run(str(output)) or {}) == plan


def test_chunks_grow_with_the_manifest_and_keep_a_small_one_in_many_hands(tmp_path: Path) -> None:
    cut: dict[int, int] = {}
    for rows in (1, 100, 2000, 8191, 8192, 30_000):
        folder = tmp_path / str(rows)
        manifest = manifest_of(folder, pa.table({"path": ["a"] * rows}))
        cut[rows] = plan_at(folder / "out", manifest).chunk_rows
    assert cut == {
        1: 32, 100: 32, 2000: 64, 8191: DEFAULT_CHUNK_ROWS, 8192: DEFAULT_CHUNK_ROWS,
        30_000: DEFAULT_CHUNK_ROWS,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("workers", "cut"),
    [
        (2, {100: 32, 4000: 64, 16_383: 256, 16_384: 256}),
        (16, {4000: 32, 50_000: 128, 100_000: 224, 131_072: 256}),
        (100, {10_000: 32, 131_071: 64, 131_072: 256, 10**9: 4096}),
    ],
)
def test_the_chunks_of_a_small_manifest_keep_all_workers_busy_to_the_end(
    workers: int, cut: dict[int, int]
) -> None:
    found = {
        rows: choose_sizes(
            rows, chunk_rows=None, part_rows=1_000_000, row_bytes=128, workers=workers
        )[0]
        for rows in cut
    }
    assert found == cut


@pytest.mark.parametrize(
    ("rows", "chunk_rows", "objects"),
    [
        (1_000_000, 256, 3_911),
        (4_194_303, 256, 3_909),
        (4_194_304, 512, 1_956),
        (10_000_000, 1024, 979),
        (33_554_432, 4096, 246),
        (1_000_000_000, 4096, 246),
        (10_000_000_000, 4096, 246),
    ],
)
def test_the_objects_of_a_million_rows_become_fewer_with_the_manifest(
    rows: int, chunk_rows: int, objects: int
) -> None:
    """One object per chunk; a shard and a final file per part."""
    sizes = choose_sizes(rows, chunk_rows=None, part_rows=1_000_000, row_bytes=128)
    assert sizes == (chunk_rows, 999_424)
    plan = Plan("run", rows, *sizes)
    assert round((plan.num_chunks + 2 * plan.num_parts) / (rows / 1e6)) == objects


def test_chunks_do_not_grow_where_they_are_set_or_limited_or_parts_are_small() -> None:
    billion = 1_000_000_000
    usual: dict[str, Any] = {"chunk_rows": None, "part_rows": 1_000_000, "row_bytes": 128}
    assert choose_sizes(billion, **usual, max_chunk_rows=256) == (256, 999_424)
    assert choose_sizes(billion, **usual, max_chunk_rows=187) == (256, 999_424)
    assert choose_sizes(billion, **{**usual, "chunk_rows": 300}) == (300, 999_900)
    assert choose_sizes(billion, **{**usual, "row_bytes": 8320}) == (512, 15_360)
    assert choose_sizes(billion, **{**usual, "part_rows": 100}) == (100, 100)


def test_the_chunks_of_a_large_manifest_are_several_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "MIN_GROWN_CHUNKS", 16)
    table = numbered(20_000)
    manifest = manifest_of(tmp_path, table)
    output = tmp_path / "out"
    plan = plan_at(output, manifest, part_rows=17_000)
    assert (plan.chunk_rows, plan.part_rows, plan.num_chunks) == (1024, 16_384, 20)
    files = shards(output)
    assert [file.metadata.num_row_groups for file in files] == [64, 15]
    for chunk in range(plan.num_chunks):
        part, span = plan.part_of(chunk), plan.rows_of(chunk)
        read = read_shard_chunk(files[part], plan, chunk - plan.chunks_of(part).start)
        assert read.equals(table.slice(span.start, len(span)))
    folder = output / "_staging" / "manifest"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "part-00000.parquet").unlink()
    restore_shards(str(output), manifest, plan)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_shards_of_earlier_versions_have_row_groups_as_large_as_their_chunks(
    tmp_path: Path,
) -> None:
    """A run that was begun with 512 rows per chunk is resumed."""
    table, plan = numbered(1200), Plan("run", 1200, 512, 1024)
    for part in range(plan.num_parts):
        span = plan.rows_of_part(part)
        file = tmp_path / f"{part}.parquet"
        pq.write_table(table.slice(span.start, len(span)), file, row_group_size=512)
        shard = pq.ParquetFile(file)
        read = [read_shard_chunk(shard, plan, index) for index in range(len(plan.chunks_of(part)))]
        assert [rows.num_rows for rows in read] == [[512, 512], [176]][part]
        assert pa.concat_tables(read).equals(table.slice(span.start, len(span)))


def test_wide_rows_make_final_files_of_fewer_rows(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, numbered(3000))
    plan = plan_at(tmp_path / "out", manifest, row_bytes=MAX_PART_BYTES // 1000)
    assert plan.part_rows == 1000 // plan.chunk_rows * plan.chunk_rows
    assert plan.num_parts == -(-3000 // plan.part_rows)


def test_shards_that_are_gone_are_cut_again_as_they_were(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, numbered(100))
    output = tmp_path / "out"
    plan = plan_at(output, manifest, chunk_rows=8, part_rows=24, limit=90)
    folder = output / "_staging" / "manifest"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "part-00002.parquet").unlink()
    run = (output / "_run.json").read_bytes()
    restore_shards(str(output), manifest, plan)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert (output / "_run.json").read_bytes() == run


# ------------------------------------------------------------------ who a run is


BASE = RunIdentity(
    manifest={"fingerprint": "f", "path_column": "path", "label_column": None, "root": "/data"},
    bundle={"sha256": "s"},
    settings={"top_k": 5, "threshold": 0.0, "limit": None, "scores": False},
)
PLACES = [
    ("manifest", "fingerprint"), ("manifest", "path_column"), ("manifest", "label_column"),
    ("manifest", "root"), ("bundle", "sha256"), ("settings", "top_k"), ("settings", "threshold"),
    ("settings", "limit"), ("settings", "scores"), ("settings", "new"),
]  # fmt: skip
VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(place=st.sampled_from(PLACES), value=VALUES)
def test_runs_that_differ_in_anything_have_other_ids_and_the_difference_is_named(
    place: tuple[str, str], value: Any
) -> None:
    section, key = place
    values = getattr(BASE, section)
    other = replace(BASE, **{section: {**values, key: value}})
    stored = asdict(BASE)
    if key in values and json.dumps(value) == json.dumps(values[key]):
        assert other.compute_run_id() == BASE.compute_run_id()
        assert other.find_differences(stored) == []
        return
    assert other.compute_run_id() != BASE.compute_run_id()
    if value != values.get(key):  # 0 and False are one value in a refusal, and so is a null
        assert other.find_differences(stored) == [
            f"{section}.{key}: {values.get(key)!r} then, {value!r} now"
        ]


def test_every_difference_is_named_at_once_also_of_keys_that_came_or_went() -> None:
    stored = {
        "manifest": {**BASE.manifest, "root": "/elsewhere"},
        "settings": {"top_k": 3, "threshold": 0.0, "limit": None, "precision": "fp32"},
    }
    assert BASE.find_differences(stored) == [
        "manifest.root: '/elsewhere' then, '/data' now",
        "bundle.sha256: None then, 's' now",
        "settings.precision: 'fp32' then, None now",
        "settings.scores: None then, False now",
        "settings.top_k: 3 then, 5 now",
    ]


def test_the_order_of_the_settings_does_not_make_another_run() -> None:
    turned = replace(BASE, settings=dict(reversed(BASE.settings.items())))
    assert turned.compute_run_id() == BASE.compute_run_id()


def test_a_damaged_or_foreign_run_file_is_refused_with_the_remedy(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    assert load_run(str(output)) is None
    (output / "_run.json").write_text('{"format_version": 1, "plan"')
    with pytest.raises(OutputError, match=r"_run\.json: is damaged .* --overwrite"):
        load_run(str(output))
    (output / "_run.json").write_text('{"format_version": 99}')
    with pytest.raises(OutputError, match="another version of imgcls; start over with --overwrite"):
        load_run(str(output))


# ------------------------------------------------------------------ what cannot be planned


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_manifest_that_breaks_off_midway_leaves_no_run_behind(tmp_path: Path) -> None:
    file = tmp_path / "broken.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("path", "label"))
        writer.writerows((f"{i}" * 40, "red") for i in range(100_000))
        stream.write("one,two,three\n")
    manifest = open_manifest(ManifestConfig(path=str(file)))
    output = tmp_path / "out"
    with pytest.raises(ManifestError, match="Expected 2 columns, got 3"):
        plan_at(output, manifest, chunk_rows=1000, part_rows=10_000)
    # whole shards exist; without _run.json they belong to no run
    assert load_run(str(output)) is None
    left = list((output / "_staging" / "manifest").iterdir())
    assert left
    assert all(pq.ParquetFile(path).metadata.num_rows == 10_000 for path in left)
    assert not (output / "_run.json").exists()


def test_the_run_file_is_written_after_the_last_shard(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, numbered(100))
    output = tmp_path / "out"
    plan = plan_at(output, manifest, chunk_rows=8, part_rows=24)
    written = max(path.stat().st_mtime_ns for path in (output / "_staging" / "manifest").iterdir())
    assert (output / "_run.json").stat().st_mtime_ns >= written
    assert [file.metadata.num_rows for file in shards(output)] == [24, 24, 24, 24, 4]
    assert plan == Plan(identity_of(manifest, limit=None).compute_run_id(), 100, 8, 24)


def test_a_manifest_without_rows_is_refused(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, numbered(0))
    with pytest.raises(ManifestError, match="has no rows"):
        plan_at(tmp_path / "out", manifest)


def test_labels_of_another_model_are_refused_and_a_few_unknown_ones_are_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = manifest_of(tmp_path / "a", numbered(30))
    with pytest.raises(ManifestError, match="no label in column 'label' is a class") as caught:
        plan_at(tmp_path / "a" / "out", manifest, classes=["cat", "dog"])
    assert "found 'red', 'green'; the model has 'cat', 'dog', 2 classes)" in str(caught.value)
    assert load_run(str(tmp_path / "a" / "out")) is None
    plan_at(tmp_path / "b" / "out", manifest, classes=["green", "blue"])
    assert "note: 10 labels not among the classes of the model ('red')" in capsys.readouterr().out


def test_a_later_night_may_have_labels_of_new_classes_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = manifest_of(tmp_path, numbered(30))
    plan = plan_at(tmp_path / "out", manifest, classes=["cat", "dog"], any_labels=True)
    assert plan.rows == 30
    assert (
        "note: 20 labels not among the classes of the model ('red', 'green')"
        in capsys.readouterr().out
    )


def test_labels_like_a_class_are_named_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pa.table({"path": [*"abcde"], "label": ["Red", "red ", "Red", "cafe\u0301", "red"]})
    plan_at(tmp_path / "out", manifest_of(tmp_path, table), classes=["red", "caf\u00e9"])
    log = capsys.readouterr().out
    assert "'Red' (2 rows) and class 'red' and 'red ' (1 row)" in log
    assert "note: 3 labels not among the classes of the model ('Red', 'red ')" in log


def test_folders_that_are_no_classes_are_refused_with_the_way_to_label_them(tmp_path: Path) -> None:
    (tmp_path / "photos" / "camera 1").mkdir(parents=True)
    (tmp_path / "photos" / "camera 1" / "a.jpg").touch()
    manifest = open_manifest(ManifestConfig(path=str(tmp_path / "photos")))
    with pytest.raises(ManifestError, match=r"Pass --manifest\.format images to label all images"):
        plan_at(tmp_path / "out", manifest)


def test_labels_that_are_numbers_match_classes_by_their_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pa.table({"path": ["a", "b", "c"], "label": [1.0, 2.0, None]})
    manifest = manifest_of(tmp_path, table)
    plan_at(tmp_path / "out", manifest, classes=["1", "2"])
    assert "note:" not in capsys.readouterr().out


# ------------------------------------------------------------------ memory

PLAN_AND_WEIGH = """
import sys
from pathlib import Path
import pyarrow as pa
import pyarrow.parquet as pq
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.execution import plan
from tests.execution.runs import plan_at

folder, rows = Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir()
with pq.ParquetWriter(folder / "m.parquet", pa.schema([("path", pa.string())])) as writer:
    for start in range(0, rows, 100_000):
        names = [f"{i:08d}.jpg" for i in range(start, min(rows, start + 100_000))]
        writer.write_table(pa.table({"path": names}))
made = plan_at(folder / "out", open_manifest(ManifestConfig(path=str(folder / "m.parquet"))))
assert made.rows == rows, made
# getrusage would count what the parent held when it started this process
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def peak_bytes(folder: Path, rows: int) -> int:
    """Peak memory of a process that writes a manifest with `rows` rows and plans a run over it."""
    done = subprocess.run(
        [sys.executable, "-c", PLAN_AND_WEIGH, str(folder), str(rows)],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout) * 1024


@pytest.mark.parametrize("rows", [1_000_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
def test_a_manifest_of_millions_is_planned_in_bounded_memory(rows: int, tmp_path: Path) -> None:
    little = peak_bytes(tmp_path / "little", 10_000)
    much = peak_bytes(tmp_path / "much", rows)
    assert much - little < 300_000_000


def test_a_run_of_another_version_of_a_table_is_refused_with_the_version_to_resume() -> None:
    stored = replace(BASE, manifest={**BASE.manifest, "version": "12"})
    now = replace(BASE, manifest={**BASE.manifest, "version": "13"})
    with pytest.raises(OutputError, match=r"version: '12' then, '13' now") as caught:
        now.check_same_run("out", asdict(stored))
    assert "To resume it, append @12 to the table that is the manifest" in str(caught.value)
    stored.check_same_run("out", asdict(stored))
