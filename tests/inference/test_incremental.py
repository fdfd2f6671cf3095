"""What is new since earlier nights, and what many nights come to, against plain Python."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgcls.config import build
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.data.storage import filesystem
from imgcls.errors import ManifestError, OutputError, RequestError
from imgcls.evaluation.config import EvaluateConfig
from imgcls.evaluation.evaluate import evaluate
from imgcls.inference.config import SinceConfig
from imgcls.inference.history import CompactConfig, compact
from imgcls.inference.incremental import ManifestComparison, SinceRequest
from imgcls.inference.known_images import take_rows
from imgcls.inference.nights import OutputSeries, compute_next_sequence, find_past_runs
from imgcls.inference.predict import resolve_output
from imgcls.runs.committed import open_run
from tests.evaluation.runs import commit, drawn
from tests.s3 import url

OLD, NEW = "b" * 64, "c" * 64


def night(
    folder: Path, paths: Sequence[str | None], failed: Sequence[int] = (), **columns: Any
) -> Path:
    """A committed run over these paths; `failed` rows have no prediction."""
    bundle = columns.pop("bundle_sha256", OLD)
    table = drawn(len(paths), scores=False)
    at = table.schema.get_field_index("path")
    table = table.set_column(at, "path", pa.array(paths, pa.string()))
    status = ["missing" if row in failed else "ok" for row in range(len(paths))]
    at = table.schema.get_field_index("status")
    table = table.set_column(at, "status", pa.array(status).dictionary_encode())
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    return commit(folder, table, bundle_sha256=bundle)


def manifest_of(folder: Path, paths: Sequence[str | None], **columns: Any) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "manifest.parquet"
    pq.write_table(pa.table({"path": pa.array(paths, pa.string()), **columns}), file)
    return open_manifest(ManifestConfig(path=str(file)))


def asked(
    manifest: Any,
    since: Path,
    *,
    relabel: bool = False,
    retry_failed: bool = False,
    output: Path | None = None,
    **config: Any,
) -> list[str | None]:
    folder = str(output or since / "tonight")
    request = SinceRequest.resolve(
        manifest,
        SinceConfig(path=str(since), **config),
        output=folder,
        bundle_sha256=NEW,
        relabel=relabel,
        retry_failed=retry_failed,
        exclude=folder,
    )
    with ManifestComparison(request) as comparison:
        comparison.log_summary()
        batches = comparison.manifest.batches()
        return [path for batch in batches for path in batch.column("path").to_pylist()]


# ------------------------------------------------------------------ what is new


def test_new_changed_and_failed_rows_are_labeled_again_and_no_others(tmp_path: Path) -> None:
    night(tmp_path / "out" / "date=1", ["/a", "/b", "/c", "/d"], failed=[2], etag=[*"1234"])
    manifest = manifest_of(tmp_path, ["/e", "/d", "/c", "/b", "/a"], etag=["5", "4", "3", "x", "1"])
    assert asked(manifest, tmp_path / "out") == ["/e", "/c", "/b"]


def test_the_newest_night_decides(tmp_path: Path) -> None:
    night(tmp_path / "out" / "1", ["/a", "/b"], failed=[0])
    second = night(tmp_path / "out" / "2", ["/a", "/b"], failed=[1])
    text = (second / "_SUCCESS").read_text().replace("2026-01-01", "2026-01-02")
    (second / "_SUCCESS").write_text(text)
    assert asked(manifest_of(tmp_path, ["/a", "/b"]), tmp_path / "out") == ["/b"]


def test_paths_meet_wherever_the_manifests_lie(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    night(folder, ["a.jpg", "sub/b.jpg", "s3://x/c.jpg"])  # relative to the run's own root
    manifest = manifest_of(tmp_path, ["out/a.jpg", f"{folder}/sub/b.jpg", "s3://x/c.jpg", "a.jpg"])
    assert asked(manifest, folder) == ["a.jpg"]


def test_an_image_is_known_by_its_file_whatever_its_name(tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    night(labels / "1", ["/a", "file:///b", "/x/../c", "file:/d"])
    aliases = ["file:///a", "/b", "/./c", "//d"]
    assert asked(manifest_of(tmp_path, [*aliases, "file:///e"]), labels) == ["file:///e"]
    run = committed_at(night(labels / "2", aliases), "2026-01-02T00:00:00+00:00")
    output = compact(CompactConfig(source=str(labels), output=str(tmp_path / "latest")))
    rows = pq.read_table(f"{output}/predictions")
    assert rows["path"].to_pylist() == aliases
    assert set(rows["run"].to_pylist()) == {str(run)}


def test_another_bundle_relabels_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    night(tmp_path / "out" / "1", ["/a"], bundle_sha256=OLD)
    night(tmp_path / "out" / "2", ["/b"], bundle_sha256=NEW)
    manifest = manifest_of(tmp_path, ["/a", "/b", "/c"])
    assert asked(manifest, tmp_path / "out") == ["/c"]
    assert "Set --relabel to label them again" in capsys.readouterr().out
    assert asked(manifest, tmp_path / "out", relabel=True) == ["/a", "/c"]
    assert "1 new, 1 of another bundle; 1 row unchanged" in capsys.readouterr().out


def test_rows_without_a_path_are_known_by_their_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels"
    night(labels / "1", [None, "/a", None], failed=[0, 2])
    manifest = manifest_of(tmp_path, [None, "/a", "/b", None])
    assert asked(manifest, labels) == ["/b"]
    assert "broken and unchanged, not tried again: 2 missing" in capsys.readouterr().out
    assert asked(manifest, labels, retry_failed=True) == [None, "/b", None]
    newer = committed_at(night(labels / "2", ["/b"]), "2026-01-02T00:00:00+00:00")
    record = json.loads((newer / "_run.json").read_text())
    (newer / "_run.json").write_text(json.dumps(record | {"rows_without_path": 2}))
    assert asked(manifest, labels) == []
    assert asked(manifest_of(tmp_path, [None, None, "/a", None]), labels) == [None]


def test_nights_that_labeled_all_rows_without_a_path_again_do_not_add_up(tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    for day in (1, 2, 3):  # of an earlier version, or with --retry-failed
        folder = night(labels / str(day), [None, f"/{day}", None], failed=[0, 2])
        committed_at(folder, f"2026-01-0{day}T00:00:00+00:00")
    manifest = manifest_of(tmp_path, [None, None, None, "/1", "/2", "/3", None])
    assert asked(manifest, labels) == [None, None]
    # of a newer manifest without such rows, nothing is known
    committed_at(night(labels / "4", ["/4"]), "2026-01-04T00:00:00+00:00")
    assert asked(manifest_of(tmp_path, ["/4", None]), labels) == [None]


def test_the_fingerprint_is_of_the_manifest_and_of_what_is_known(tmp_path: Path) -> None:
    night(tmp_path / "out" / "1", ["/a"])
    manifest = manifest_of(tmp_path, ["/a", "/b"])

    def fingerprint(**changes: Any) -> str:
        given: dict[str, Any] = {"exclude": "", "relabel": False} | changes
        since = SinceConfig(path=str(tmp_path / "out"))
        request = SinceRequest.resolve(
            manifest, since, output="", bundle_sha256=NEW, retry_failed=False, **given
        )
        with ManifestComparison(request) as comparison:
            return comparison.manifest.fingerprint()

    first = fingerprint()
    assert first == fingerprint() != manifest.fingerprint()
    assert fingerprint(relabel=True) != first
    night(tmp_path / "out" / "2", ["/b"])
    assert fingerprint() != first
    assert fingerprint(exclude=str(tmp_path / "out" / "2")) == first


def test_bad_requests_name_what_is_missing(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, ["/a"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError, match=r"holds no committed run\. Pass the output"):
        asked(manifest, tmp_path / "empty", output=tmp_path / "elsewhere")
    night(tmp_path / "out", ["/a"])
    with pytest.raises(ManifestError, match=r"no column 'sha' \(found: path\)"):
        asked(manifest, tmp_path / "out", version=["sha"])


def test_a_column_of_lists_is_no_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels"
    night(labels / "1", ["/a", "/b"], version=[[1], [2]], etag=[b"\xff", b"\xfe"])
    manifest = manifest_of(tmp_path, ["/a", "/b"], version=[[1], [3]], etag=[b"\xff", b"\xfd"])
    assert asked(manifest, labels) == ["/b"]
    assert "column 'version' is list<element: int64>, which is not compared" in (
        capsys.readouterr().out
    )
    with pytest.raises(ManifestError, match=r"column 'version' is list.* Pass another column"):
        asked(manifest, labels, version=["version"])
    # what a run cannot compare, it lacks
    later = manifest_of(tmp_path, ["/a", "/b"], version=["1", "3"])
    assert asked(later, labels) == []
    assert asked(later, labels, version=["version"]) == ["/a", "/b"]


states = st.lists(
    st.dictionaries(
        st.sampled_from("abcdefgh"), st.tuples(st.booleans(), st.integers(0, 2)), min_size=1
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=15)
@given(nights=states, tonight=st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 2)))
def test_any_nights_leave_what_a_dictionary_computes(
    tmp_path_factory: pytest.TempPathFactory,
    nights: list[dict[str, tuple[bool, int]]],
    tonight: dict[str, int],
) -> None:
    folder = tmp_path_factory.mktemp("nights")
    known: dict[str, tuple[bool, int]] = {}
    for number, rows in enumerate(nights):
        failed = [at for at, (good, _) in enumerate(rows.values()) if not good]
        etags = [str(version) for _, version in rows.values()]
        made = night(folder / "out" / f"{number}", [f"/{n}" for n in rows], failed, etag=etags)
        text = (made / "_SUCCESS").read_text().replace("T00:00:00", f"T00:00:0{number}")
        (made / "_SUCCESS").write_text(text)
        known |= rows
    manifest = manifest_of(
        folder, [f"/{n}" for n in tonight], etag=pa.array(map(str, tonight.values()), pa.string())
    )
    expected = [f"/{n}" for n, version in tonight.items() if known.get(n) != (True, version)]
    assert asked(manifest, folder / "out") == expected

    compact(CompactConfig(source=str(folder / "out"), output=str(folder / "latest")))
    table = pq.read_table(folder / "latest" / "predictions")
    found = {
        row["path"][1:]: (row["status"] == "ok", int(row["etag"])) for row in table.to_pylist()
    }
    assert found == known
    assert table.num_rows == len(known)
    assert asked(manifest, folder / "latest") == expected


def test_rows_are_chosen_from_any_cut_of_a_stream() -> None:
    rng = np.random.default_rng(0)
    table = pa.table({"n": np.arange(1000)})
    places = np.flatnonzero(rng.random(1000) < 0.3)
    for size, cut in ((7, 3), (1000, 5), (33, 1000)):
        tables = (table.slice(start, size) for start in range(0, 1000, size))
        pieces = (places[start : start + cut] for start in range(0, len(places), cut))
        found = [n for each in take_rows(tables, pieces) for n in each["n"].to_pylist()]
        assert found == places.tolist()


# ------------------------------------------------------------------ the history


def test_a_history_has_the_newest_row_of_each_image_and_where_it_is_from(tmp_path: Path) -> None:
    folder = tmp_path / "labels"
    night(folder / "1", ["a", "b", "b"], site=["x", "y", "z"])
    second = night(folder / "2", ["b", "c"], failed=[1], bundle_sha256=NEW)
    text = (second / "_SUCCESS").read_text().replace("2026-01-01", "2026-01-02")
    (second / "_SUCCESS").write_text(text)
    # relative paths are relative to each run's own root, so these are five images
    output = compact(CompactConfig(source=str(folder), output=str(tmp_path / "latest")))
    rows = pq.read_table(f"{output}/predictions").sort_by("path").to_pylist()
    assert [row["path"] for row in rows] == [
        f"{folder}/1/a", f"{folder}/1/b", f"{folder}/2/b", f"{folder}/2/c",
    ]  # fmt: skip
    assert [row["site"] for row in rows] == ["x", "z", None, None]
    assert [row["bundle_sha256"] for row in rows] == [OLD, OLD, NEW, NEW]
    assert [row["run"] for row in rows] == [f"{folder}/{n}" for n in (1, 1, 2, 2)]
    assert rows[3]["status"] == "missing"
    assert open_run(output).rows == 4


def test_a_history_is_evaluated_like_any_run(tmp_path: Path) -> None:
    night(tmp_path / "labels" / "1", [f"/{i}" for i in range(40)])
    output = compact(CompactConfig(source=str(tmp_path / "labels"), output=str(tmp_path / "all")))
    found = evaluate(EvaluateConfig(predictions=output, thumbnails=False))
    assert found.aggregate.counts.labeled == 40
    assert "drawn.csv" in (tmp_path / "all" / "report.html").read_text()


def test_a_predict_run_is_never_replaced_and_an_unfinished_table_is(tmp_path: Path) -> None:
    first = night(tmp_path / "labels" / "1", ["/a"])
    night(tmp_path / "labels" / "2", ["/b"])
    config = CompactConfig(source=str(tmp_path / "labels"), output=str(first), overwrite=True)
    with pytest.raises(OutputError, match="holds a predict run, not a compacted table"):
        compact(config)
    assert open_run(str(first)).rows == 1
    latest = tmp_path / "latest"
    config = CompactConfig(source=str(tmp_path / "labels"), output=str(latest))
    compact(config)
    (latest / "_SUCCESS").unlink()
    assert open_run(compact(config)).rows == 2


def test_files_of_other_tools_are_passed_over(tmp_path: Path) -> None:
    night(tmp_path / "labels [all]" / "1", ["/a"])
    (tmp_path / "labels [all]" / "spark").mkdir()
    (tmp_path / "labels [all]" / "spark" / "_SUCCESS").touch()
    assert asked(manifest_of(tmp_path, ["/a", "/b"]), tmp_path / "labels [all]") == ["/b"]


def test_images_that_are_gone_are_dropped_by_a_manifest(tmp_path: Path) -> None:
    night(tmp_path / "labels" / "1", ["/a", "/b", "/c"])
    manifest_of(tmp_path, ["/a", "/c", "/never"])
    config = build(
        CompactConfig,
        {
            "source": str(tmp_path / "labels"),
            "output": str(tmp_path / "latest"),
            "manifest": str(tmp_path / "manifest.parquet"),
        },
    )
    table = pq.read_table(f"{compact(config)}/predictions")
    assert sorted(table["path"].to_pylist()) == ["/a", "/c"]
    with pytest.raises(OutputError, match="Set --overwrite"):
        compact(config)
    assert compact(config.model_copy(update={"overwrite": True}))


def test_columns_that_do_not_fit_are_named(tmp_path: Path) -> None:
    night(tmp_path / "labels" / "1", ["/a"], site=[1])
    night(tmp_path / "labels" / "2", ["/b"], site=["x"])
    with pytest.raises(RequestError, match="column 'site' is int64, and string in"):
        compact(CompactConfig(source=str(tmp_path / "labels"), output=str(tmp_path / "latest")))


def test_the_date_of_an_output_is_written_out() -> None:
    day = datetime.date(2026, 11, 3)
    assert resolve_output("s3://b/labels/date={date}", day) == "s3://b/labels/date=2026-11-03"
    today = datetime.datetime.now(datetime.UTC).date()
    assert resolve_output("{date}", None) in {today.isoformat(), str(today + datetime.timedelta(1))}
    assert resolve_output("plain", day) == "plain"


# ------------------------------------------------------------------ the order of nights


def started(run: Path, sequence: int, **changes: Any) -> Path:
    """A run with the sequence number that it took when it was planned."""
    body = json.loads((run / "_run.json").read_text()) | {"sequence": sequence} | changes
    (run / "_run.json").write_text(json.dumps(body))
    return run


def committed_at(run: Path, time: str) -> Path:
    mark = run / "_SUCCESS"
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"committed": time}))
    return run


@pytest.mark.parametrize("numbered", [True, False])
def test_neither_clocks_nor_the_order_of_commits_decide_which_night_is_the_newest(
    tmp_path: Path, numbered: bool
) -> None:
    labels = tmp_path / "labels"
    for at, (day, etag, time) in enumerate(
        (("22", "v1", "2026-11-25T03:00:00+00:00"), ("23", "v2", "2026-11-23T03:00:00+00:00"))
    ):
        run = committed_at(night(labels / f"date=2026-11-{day}", ["/x"], etag=[etag]), time)
        if numbered:
            started(run, at + 1)
    manifest = manifest_of(tmp_path, ["/x"], etag=["v2"])
    assert asked(manifest, labels) == []
    output = compact(CompactConfig(source=str(labels), output=str(tmp_path / "latest")))
    assert pq.read_table(f"{output}/predictions")["etag"].to_pylist() == ["v2"]
    assert asked(manifest, tmp_path / "latest") == []


def test_the_number_of_a_run_decides_before_its_date(tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    started(night(labels / "date=2026-11-23", ["/x"], etag=["v1"]), 1)
    started(night(labels / "date=2026-11-22", ["/x"], etag=["v2"]), 3)  # a backfill, made later
    night(labels / "date=2026-12-24", ["/x"], etag=["v0"])  # before there were numbers
    assert asked(manifest_of(tmp_path, ["/x"], etag=["v2"]), labels) == []
    assert compute_next_sequence(str(labels / "date=2026-11-25"), find_past_runs(str(labels))) == 4
    assert compute_next_sequence(str(labels / "date=2026-11-25"), None) == 4


def test_rows_of_a_compacted_table_keep_the_place_of_their_night(tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    started(night(labels / "1", ["/x", "/y"], etag=["x1", "y1"]), 1)
    started(night(labels / "3", ["/x"], etag=["x3"]), 3)
    compact(CompactConfig(source=str(labels), output=str(labels / "latest")))
    started(night(labels / "2", ["/x", "/y"], etag=["x2", "y2"]), 2)  # finished at last
    tonight = manifest_of(tmp_path, ["/x", "/y"], etag=["x3", "y2"])
    assert asked(tonight, labels) == []
    output = compact(CompactConfig(source=str(labels), output=str(tmp_path / "all")))
    rows = {row["path"]: row for row in pq.read_table(f"{output}/predictions").to_pylist()}
    assert {path: row["etag"] for path, row in rows.items()} == {"/x": "x3", "/y": "y2"}
    assert {path: row["run"] for path, row in rows.items()} == {
        "/x": f"{labels}/3",
        "/y": f"{labels}/2",
    }


def test_rows_labeled_again_in_place_are_newer_than_their_copies_in_a_history(
    tmp_path: Path,
) -> None:
    labels = tmp_path / "labels"
    run = started(night(labels / "1", ["/x", "/y"], failed=[0], size=[1, 2]), 1)
    compact(CompactConfig(source=str(labels), output=str(labels / "latest")))
    started(night(tmp_path / "again", ["/x", "/y"], size=[1, 2]), 1)
    shutil.copy(tmp_path / "again/predictions/part-00000.parquet", run / "predictions")
    assert asked(manifest_of(tmp_path, ["/x", "/y"], size=[1, 2]), labels) == []
    output = compact(CompactConfig(source=str(labels), output=str(tmp_path / "all")))
    table = pq.read_table(f"{output}/predictions")
    assert dict(zip(table["path"].to_pylist(), table["status"].to_pylist(), strict=True)) == {
        "/x": "ok",
        "/y": "ok",
    }


def test_an_image_that_goes_back_to_an_older_version_is_labeled_again(tmp_path: Path) -> None:
    started(night(tmp_path / "labels" / "1", ["/x"], etag=["v1"]), 1)
    started(night(tmp_path / "labels" / "2", ["/x"], etag=["v2"]), 2)
    assert asked(manifest_of(tmp_path, ["/x"], etag=["v1"]), tmp_path / "labels") == ["/x"]


def test_a_row_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    night(tmp_path / "labels" / "1", ["/x"])
    file = tmp_path / "bad.csv"
    file.write_text("path,size\n/x,1\n/y,2,3\n")
    with pytest.raises(ManifestError, match=r"bad\.csv: .*Expected 2 columns, got 3"):
        asked(open_manifest(ManifestConfig(path=str(file))), tmp_path / "labels")


# ------------------------------------------------------------------ failures


@pytest.mark.parametrize("status", ["missing", "forbidden", "throttled", "unavailable"])
def test_what_may_pass_is_tried_again_and_what_is_broken_is_not(
    tmp_path: Path, status: str
) -> None:
    run = night(tmp_path / "labels" / "1", ["/a", "/b", "/c"], failed=[0, 1], size=[1, 2, 3])
    part = run / "predictions" / "part-00000.parquet"
    table = pq.read_table(part)
    at = table.schema.get_field_index("status")
    statuses = pa.array([status, "truncated", "ok"]).dictionary_encode()
    pq.write_table(table.set_column(at, "status", statuses), part)
    same = manifest_of(tmp_path, ["/a", "/b", "/c"], size=[1, 2, 3])
    assert asked(same, tmp_path / "labels") == ["/a"]
    assert asked(same, tmp_path / "labels", retry_failed=True) == ["/a", "/b"]
    repaired = manifest_of(tmp_path, ["/a", "/b", "/c"], size=[1, 20, 3])
    assert asked(repaired, tmp_path / "labels") == ["/a", "/b"]
    # no column shows whether it was repaired
    assert asked(manifest_of(tmp_path, ["/a", "/b", "/c"]), tmp_path / "labels") == ["/a", "/b"]


def test_a_version_column_that_only_some_nights_have_relabels_nothing(tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    started(night(labels / "1", ["/a"], size=[1]), 1)
    started(night(labels / "2", ["/b"], size=[2.0], etag=["e"], mtime=pa.nulls(1)), 2)
    tonight = {"size": [1, 2], "etag": ["d", "e"], "mtime": pa.array([1, 2], pa.timestamp("ns"))}
    manifest = manifest_of(tmp_path, ["/a", "/b"], **tonight)
    assert asked(manifest, labels) == []
    compact(CompactConfig(source=str(labels), output=str(tmp_path / "latest")))
    assert asked(manifest, tmp_path / "latest") == []
    # a column that was named must be there to be alike
    assert asked(manifest, labels, version=["etag"]) == ["/a"]


# ------------------------------------------------------------------ the folder of nights


def test_a_mark_of_another_tool_and_a_run_among_nights_hide_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels"
    night(labels / "1", ["/a"])
    (labels / "_SUCCESS").touch()  # Spark's, empty
    manifest = manifest_of(tmp_path, ["/a", "/b", "/c"])
    assert asked(manifest, labels) == ["/b", "/c"]
    ignored = f"note: ignored, not written by a predict run: {labels}/_SUCCESS"
    assert ignored in capsys.readouterr().out
    (labels / "_SUCCESS").unlink()
    night(labels, ["/b"])  # --output labels
    assert asked(manifest, labels) == ["/c"]
    output = compact(CompactConfig(source=str(labels), output=str(tmp_path / "latest")))
    paths = pq.read_table(f"{output}/predictions")["path"].to_pylist()
    assert sorted(paths) == ["/a", "/b"]
    (labels / "1" / "_SUCCESS").write_text("done")
    with pytest.raises(OutputError, match=r"labels/1/_SUCCESS: is damaged.*remove it and rerun"):
        asked(manifest, labels)
    capsys.readouterr()
    (labels / "1" / "_SUCCESS").write_text("")  # of a driver that was killed while it created it
    assert asked(manifest, labels) == ["/a", "/c"]
    assert f"the rows do not count as labeled: {labels}/1" in capsys.readouterr().out


# ------------------------------------------------------------------ provenance


@pytest.mark.parametrize("name", ["run", "bundle_sha256", "labelled_at", "Run"])
def test_a_manifests_column_never_stands_for_the_provenance(tmp_path: Path, name: str) -> None:
    night(tmp_path / "labels" / "1", ["/a"], bundle_sha256=NEW)
    second = night(tmp_path / "labels" / "2", ["/b"], bundle_sha256=NEW)
    part = second / "predictions" / "part-00000.parquet"
    pq.write_table(pq.read_table(part).append_column(name, [["old"]]), part)
    assert asked(manifest_of(tmp_path, ["/a", "/b"]), tmp_path / "labels", relabel=True) == []
    output = compact(
        CompactConfig(source=str(tmp_path / "labels"), output=str(tmp_path / "latest"))
    )
    table = pq.read_table(f"{output}/predictions")
    lower = [column.lower() for column in table.schema.names]
    assert len(set(lower)) == len(lower)
    assert {row["path"]: (row["run"], row["bundle_sha256"], row["labelled_at"]) for row in
            table.to_pylist()} == {
        "/a": (f"{tmp_path}/labels/1", NEW, "2026-01-01T00:00:00"),
        "/b": (f"{tmp_path}/labels/2", NEW, "2026-01-01T00:00:00"),
    }  # fmt: skip
    assert asked(manifest_of(tmp_path, ["/a", "/b"]), tmp_path / "latest", relabel=True) == []


def test_nights_with_scores_of_both_types_are_merged(tmp_path: Path) -> None:
    for number, kind in enumerate((pa.float16(), pa.float32())):
        scores = pa.array([[0.25, 0.75]], pa.list_(kind, 2))
        night(tmp_path / "labels" / str(number), [f"/{number}"], scores=scores)
    output = compact(
        CompactConfig(source=str(tmp_path / "labels"), output=str(tmp_path / "latest"))
    )
    table = pq.read_table(f"{output}/predictions")
    assert table.schema.field("scores").type == pa.list_(pa.float32(), 2)
    assert table["scores"].to_pylist() == [[0.25, 0.75], [0.25, 0.75]]


def test_a_slash_at_the_end_of_an_output_names_the_same_run(s3: Any, tmp_path: Path) -> None:
    labels = url("labels")
    local = night(tmp_path / "night", ["/a"])
    for name in ("_run.json", "_SUCCESS", "predictions/part-00000.parquet"):
        filesystem.write(f"{labels}/date=2026-11-01/{name}", (local / name).read_bytes())
    series = OutputSeries(labels + "/date={date}/", datetime.date(2026, 11, 1))
    assert series.resolve_folder(1) == f"{labels}/date=2026-11-01"
    assert series.resolve_folder(2) == f"{labels}/date=2026-11-01.2"
    assert len(find_past_runs(labels).committed) == 1
    assert find_past_runs(labels, exclude=f"{labels}/date=2026-11-01/").committed == ()
