"""Nights on which everything happens come to what labeling the last state from scratch gives."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.config import build
from imgcls.data.manifests.manifest import Manifest, ManifestConfig, open_manifest
from imgcls.errors import OutputError
from imgcls.inference.config import SinceConfig
from imgcls.inference.history import CompactConfig, compact
from imgcls.inference.incremental import read_failed_before
from imgcls.inference.known_images import KNOWN_BAD, read_since_table
from imgcls.inference.nightly import load_planned_manifest
from imgcls.inference.nights import OutputSeries, find_past_runs
from imgcls.inference.result import PredictResult
from imgcls.inference.status import read_status
from imgcls.runs import layout
from imgcls.runs.committed import open_run
from tests.evaluation.runs import commit, drawn
from tests.inference.night_simulation import Images, Killed, Nightly


@pytest.fixture
def images(tmp_path: Path) -> Images:
    return Images(tmp_path / "images", seed=3)


@pytest.fixture
def nightly(tmp_path: Path, color_bundle: Path) -> Nightly:
    return Nightly(tmp_path, color_bundle)


def day(number: int) -> str:
    return f"2026-11-{number:02d}"


def date_folder(nightly: Nightly, number: int) -> Path:
    return nightly.labels / f"date={day(number)}"


@pytest.mark.parametrize("nights", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_any_nights_come_to_what_labeling_the_last_state_from_scratch_gives(
    nightly: Nightly, images: Images, nights: int
) -> None:
    for number in range(1, nights + 1):
        kind = number % 6
        images.day(number, new=8 if number == 1 else 3, spoilt=4 if kind == 3 else 1)
        if number % 10 == 7:
            nightly.column = lambda rows: pa.array([f"site {rows}"] * rows)  # one more column
        elif number % 10 == 9:
            nightly.column = pa.nulls  # of which one night has no value
        if kind == 5:
            images.write("kept/quiet.png")
        nightly.build(images)
        step = {2: "planned", 4: "labeled", 0: "rolled up"}.get(kind)
        clock = 1 if kind == 3 else 0
        if step is not None:
            with pytest.raises(Killed):
                nightly.predict(day(number), killed=step, clock=clock)
            if number % 4:  # else on another night, after later ones
                images.day(number, new=1)
                nightly.build(images)
        if step is None or number % 4:
            assert nightly.predict(day(number), clock=clock)
        if kind == 1:  # once more, and again after something came
            before = sorted(nightly.labels.iterdir())
            nightly.predict(day(number))
            assert sorted(nightly.labels.iterdir()) == before
            images.day(number, new=2)
            nightly.build(images)
            nightly.predict(day(number))
            assert (nightly.labels / f"date={day(number)}.2" / "_SUCCESS").exists()
        if kind == 5:  # a quiet night, then an older one is finished
            nightly.predict(day(number))
            for run in find_past_runs(str(nightly.labels)).unfinished:
                nightly.predict(run.order[1])
            left = find_past_runs(str(nightly.labels)).unfinished
            assert all(run.is_refused for run in left)
        nightly.compact()
    nightly.build(images)
    nightly.predict(day(nights))
    nightly.predict(day(nights))
    expected = nightly.from_scratch()
    assert {row["status"] for row in expected.values()} == {"ok", "not_an_image"}
    assert nightly.compact() == expected
    assert set(expected) == {str(path) for path in images.folder.rglob("*.png")}


def test_the_same_command_again_does_nothing_and_a_further_run_has_what_came_since(
    nightly: Nightly, images: Images
) -> None:
    images.day(1, new=5)
    nightly.build(images)
    first = nightly.predict(day(1))  # the first night: there is no folder of nights yet
    assert (first, nightly.labeled) == (str(date_folder(nightly, 1)), 5)
    assert (nightly.predict(day(1)), nightly.labeled) == (first, 0)
    images.write("camera-0/later.png")
    nightly.build(images)
    assert (nightly.predict(day(1)), nightly.labeled) == (f"{first}.2", 1)
    assert (nightly.predict(day(1)), nightly.labeled) == (f"{first}.2", 0)
    later = nightly.predict(day(2))  # a quiet night is committed
    assert (later, nightly.labeled) == (str(date_folder(nightly, 2)), 0)
    assert pq.read_table(f"{later}/predictions").num_rows == 0
    assert nightly.compact() == nightly.from_scratch()


def test_an_old_manifest_given_again_does_not_undo_later_nights(
    nightly: Nightly, images: Images
) -> None:
    images.day(1, new=5)
    nightly.build(images)
    old = nightly.folder / "old"
    nightly.manifest.rename(old)
    tonight, nightly.manifest = nightly.manifest, old
    with pytest.raises(Killed):
        nightly.predict(day(1), killed="labeled")
    nightly.manifest = tonight
    images.write("camera-0/01-00.png")
    nightly.build(images)
    nightly.predict(day(2))
    assert nightly.labeled == 5
    nightly.manifest = old
    nightly.predict(day(1))  # resumed with its own plan
    assert nightly.labeled == 1
    nightly.manifest = tonight
    expected = nightly.from_scratch()
    assert nightly.compact() == expected
    nightly.predict(day(3))
    assert nightly.labeled == 0


@pytest.mark.parametrize("is_built", [False, True])
def test_an_image_that_is_back_on_the_same_day_is_labeled_again(
    nightly: Nightly, images: Images, is_built: bool
) -> None:
    for at in range(3):
        images.write(f"{at}.png")
    moved, away = images.folder / "2.png", nightly.folder / "2.png"

    def predict() -> str:
        if is_built:
            nightly.build(images)
        source = nightly.manifest if is_built else images.folder
        listed = open_manifest(ManifestConfig(path=str(source)))
        return nightly.predict(day(1), manifest=listed)

    def list_history() -> list[str]:
        config = CompactConfig(
            source=str(nightly.labels), output=str(nightly.latest), overwrite=True
        )
        paths = pq.read_table(f"{compact(config)}/predictions")["path"].to_pylist()
        return sorted(Path(path).name for path in paths)

    first = predict()
    if is_built:
        shutil.copytree(nightly.manifest, nightly.folder / "old")
    moved.rename(away)
    assert (predict(), nightly.labeled) == (f"{first}.2", 0)
    assert list_history() == ["0.png", "1.png"]
    away.rename(moved)
    assert (predict(), nightly.labeled) == (f"{first}.3", 1)
    assert list_history() == ["0.png", "1.png", "2.png"]
    assert (predict(), nightly.labeled) == (f"{first}.3", 0)
    if is_built:  # the very listing of before
        shutil.rmtree(nightly.manifest)
        (nightly.folder / "old").rename(nightly.manifest)
        assert (nightly.predict(day(1)), nightly.labeled) == (first, 0)


def test_an_image_deleted_while_its_first_run_is_unfinished_does_not_come_back(
    nightly: Nightly, images: Images
) -> None:
    images.day(1, new=5)
    nightly.build(images)
    with pytest.raises(Killed):
        nightly.predict(day(1), killed="planned")
    (images.folder / "camera-0/01-00.png").unlink()
    nightly.build(images)
    nightly.predict(day(2))
    assert len(nightly.compact()) == 4
    nightly.predict(day(1))
    assert nightly.compact() == nightly.from_scratch()
    assert len(nightly.compact(keep_deleted=True)) == 5
    images.write("camera-0/01-00.png")
    nightly.build(images)
    nightly.predict(day(3))
    assert nightly.labeled == 1
    assert len(nightly.compact()) == 5


def test_a_broken_image_is_reported_once_and_carried_until_it_changes(
    nightly: Nightly, images: Images
) -> None:
    images.day(1, new=4)
    images.write("camera-0/bad.png", b"spoilt")
    bad = str(images.folder / "camera-0/bad.png")
    nightly.build(images)
    nightly.predict(day(1))
    assert nightly.compact()[bad]["status"] == "not_an_image"
    for number in (2, 3):  # quiet nights
        place = nightly.predict(day(number))
        assert nightly.labeled == 0
        assert read_since_table(place, KNOWN_BAD).to_pylist() == [
            {"path": bad, "status": "not_an_image"}
        ]
    assert nightly.compact()[bad]["status"] == "not_an_image"
    place = nightly.predict(day(4), retry_failed=True)
    assert (nightly.labeled, read_failed_before(place).tolist()) == (1, [0])
    images.write("camera-0/bad.png")
    nightly.build(images)
    place = nightly.predict(day(5))
    assert (nightly.labeled, read_failed_before(place).tolist()) == (1, [])
    assert nightly.compact()[bad]["status"] == "ok"


def test_a_night_that_the_gate_refuses_does_not_fail_the_next_ones(
    nightly: Nightly, images: Images
) -> None:
    images.day(1, new=6)
    nightly.build(images)
    nightly.predict(day(1))
    for at in range(5):
        images.write(f"camera-1/bad-{at}.png", b"spoilt")
    nightly.build(images)
    assert nightly.predict(day(2)) == "refused"
    assert nightly.predict(day(2)) == "refused"
    images.write("camera-1/good.png")
    nightly.build(images)
    place = nightly.predict(day(3))
    assert place == str(date_folder(nightly, 3))
    assert len(read_failed_before(place)) == 5  # reported by the refusal; not new
    assert nightly.compact() == nightly.from_scratch()
    images.write("camera-1/bad-0.png", b"spoilt in another way")
    for at in range(5, 9):
        images.write(f"camera-1/bad-{at}.png", b"spoilt")
    nightly.build(images)
    assert nightly.predict(day(4)) == "refused"  # five more are new


def test_rows_without_a_path_fail_one_night_only(nightly: Nightly, images: Images) -> None:
    for at in range(3):
        images.write(f"{at}.png")
    nightly.manifest.mkdir()
    table = nightly.manifest / "images.csv"

    def predict(number: int, names: str) -> str:
        rows = [images.folder / f"{name}.png" if name != "-" else "" for name in names]
        table.write_text("path,site\n" + "".join(f"{row},x\n" for row in rows))
        return nightly.predict(day(number))

    assert predict(1, "01---") == "refused"
    place = predict(2, "012---")
    assert place == str(date_folder(nightly, 2))
    assert read_failed_before(place).tolist() == [3, 4, 5]
    place = predict(3, "012---")
    assert nightly.labeled == 0
    assert read_since_table(place, KNOWN_BAD).to_pylist() == 3 * [
        {"path": None, "status": "missing"}
    ]
    place = predict(4, "-012----")
    assert (nightly.labeled, read_failed_before(place).tolist()) == (2, [])


def test_what_a_refused_run_lacks_may_be_repaired_the_same_night(
    nightly: Nightly, images: Images
) -> None:
    for at in range(5):
        images.write(f"camera-1/bad-{at}.png", b"spoilt")
    nightly.build(images)
    assert nightly.predict(day(1)) == "refused"
    for at in range(5):
        images.write(f"camera-1/bad-{at}.png")
    nightly.build(images)
    assert nightly.predict(day(1)) == f"{date_folder(nightly, 1)}.2"
    assert nightly.compact() == nightly.from_scratch()
    assert [run.url for run in find_past_runs(str(nightly.labels)).unfinished] == [
        str(date_folder(nightly, 1))
    ]


def test_a_run_of_other_settings_is_left_and_an_output_without_a_date_is_refused(
    nightly: Nightly, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    images.day(1, new=3)
    nightly.build(images)
    with pytest.raises(Killed):
        nightly.predict(day(1), killed="planned")
    place = nightly.predict(day(1), settings={"top_k": 1, "scores": False})
    assert place == f"{date_folder(nightly, 1)}.2"
    series = OutputSeries(f"{nightly.labels}/fixed", None)
    assert nightly.predict(day(2), series=series) == str(nightly.labels / "fixed")
    images.write("camera-0/new.png")
    nightly.build(images)
    with pytest.raises(OutputError, match=r"Put \{date\} in --output"):
        nightly.predict(day(3), series=series)


def test_a_start_over_that_was_interrupted_is_planned_again(
    nightly: Nightly, images: Images
) -> None:
    images.day(1, new=5)
    nightly.build(images)
    with pytest.raises(Killed):
        nightly.predict(day(1), killed="planned")
    shutil.rmtree(date_folder(nightly, 1) / "_staging" / "manifest")
    assert nightly.predict(day(1)) == str(date_folder(nightly, 1))
    assert nightly.compact() == nightly.from_scratch()


def test_a_retry_that_was_interrupted_keeps_the_rows_of_its_run(
    nightly: Nightly, images: Images
) -> None:
    images.day(1, new=5)
    nightly.build(images)
    first = nightly.predict(day(1))
    (date_folder(nightly, 1) / "_SUCCESS").unlink()  # as `--retry-errors` does before it labels
    shutil.rmtree(date_folder(nightly, 1) / "_staging", ignore_errors=True)
    (images.folder / "camera-0/01-00.png").unlink()
    nightly.build(images)
    nightly.predict(day(2))  # knows that the image is gone, though its run is not committed
    assert nightly.labeled == 4
    assert nightly.predict(day(1)) == first
    assert nightly.labeled == 0
    assert (date_folder(nightly, 1) / "_SUCCESS").exists()
    assert nightly.compact() == nightly.from_scratch()
    assert len(nightly.compact(keep_deleted=True)) == 5


def test_an_unfinished_run_is_never_given_as_a_committed_one(
    nightly: Nightly, images: Images
) -> None:
    images.day(1, new=5)
    nightly.build(images)
    with pytest.raises(Killed):
        nightly.predict(day(1), killed="labeled")
    other = {"top_k": 1, "scores": False}
    second = nightly.predict(day(2), settings=other)
    assert nightly.predict(day(1), settings=other) == second  # nothing is left to label
    assert nightly.labeled == 0
    assert nightly.predict(day(1)) == str(date_folder(nightly, 1))
    assert nightly.labeled == 1  # of 5 rows, 4 were kept


def test_files_of_other_programs_are_no_parts_of_a_run(nightly: Nightly, images: Images) -> None:
    images.day(1, new=5)
    nightly.build(images)
    with pytest.raises(Killed):
        nightly.predict(day(1), killed="rolled up")
    folder = date_folder(nightly, 1) / "predictions"
    (folder / ".DS_Store").write_bytes(b"Bud1")
    (folder / "notes.txt").write_text("looks right")
    first = nightly.predict(day(1))
    success = json.loads((date_folder(nightly, 1) / "_SUCCESS").read_text())
    assert list(success["files"]) == ["part-00000.parquet"]
    # as an earlier version committed it
    success["files"] |= {".DS_Store": 4, "notes.txt": 11}
    (date_folder(nightly, 1) / "_SUCCESS").write_text(json.dumps(success))
    (folder / "notes.txt").unlink()
    assert open_run(first).files == (str(folder / "part-00000.parquet"),)
    assert len(PredictResult(first, 5, None).to_pandas()) == 5
    nightly.predict(day(2))
    assert nightly.labeled == 0
    assert nightly.compact() == nightly.from_scratch()


def test_an_empty_mark_is_that_of_a_driver_killed_while_it_wrote_it(
    nightly: Nightly, images: Images
) -> None:
    images.day(1, new=5)
    nightly.build(images)
    first = nightly.predict(day(1))
    (date_folder(nightly, 1) / "_SUCCESS").write_text("")
    assert read_status(first)["state"] == "waiting"
    with pytest.raises(OutputError, match=r"is not committed .* rerun the same"):
        open_run(first)
    assert [run.url for run in find_past_runs(str(nightly.labels)).unfinished] == [first]
    nightly.predict(day(2))  # the other nights go on
    assert nightly.labeled == 5
    assert len(nightly.compact()) == 5
    (nightly.latest / "_SUCCESS").write_text("")
    assert len(nightly.compact(overwrite=False)) == 5
    assert nightly.predict(day(1)) == first
    assert read_status(first)["state"] == "committed"
    assert len(nightly.compact()) == 5


def test_a_refused_run_that_was_to_be_started_over_does_not_fail_the_next_nights(
    nightly: Nightly, images: Images
) -> None:
    for at in range(5):
        images.write(f"camera-1/bad-{at}.png", b"spoilt")
    nightly.build(images)
    assert nightly.predict(day(1)) == "refused"
    shutil.rmtree(date_folder(nightly, 1) / "predictions")  # `--overwrite`, killed
    assert nightly.predict(day(2)) == "refused"
    assert len(read_failed_before(str(date_folder(nightly, 2)))) == 0


def test_paths_that_are_corrected_within_a_night_are_read(nightly: Nightly, images: Images) -> None:
    for at in range(5):
        images.write(f"{at}.png")
    nightly.manifest.mkdir()
    table = nightly.manifest / "images.csv"
    table.write_text("path\n" + "".join(f"{at}.png\n" for at in range(5)))

    def listed(root: Path) -> Manifest:
        return open_manifest(ManifestConfig(path=str(table), root=str(root)))

    assert nightly.predict(day(1), manifest=listed(nightly.folder / "wrong")) == "refused"
    place = nightly.predict(day(1), manifest=listed(images.folder))
    assert place == f"{date_folder(nightly, 1)}.2"
    status = pq.read_table(f"{place}/predictions")["status"].to_pylist()
    assert status == ["ok"] * 5


def test_a_manifest_that_is_read_in_another_way_is_another_one(
    nightly: Nightly, images: Images
) -> None:
    """The rows differ, though the bytes are the same."""
    for name in ("\u00e9.png", "e.png"):
        images.write(name)
    table = nightly.folder / "images.csv"
    table.write_text("path,note\n\u00e9.png,x\ne.png,y\n", encoding="latin-1")

    def listed(**options: Any) -> Manifest:
        root = str(images.folder)
        return open_manifest(build(ManifestConfig, {"path": str(table), "root": root, **options}))

    first = nightly.predict(day(1), manifest=listed(encoding="cp437"))
    assert nightly.labeled == 2
    right = listed(encoding="latin-1")
    assert nightly.predict(day(1), manifest=right) == f"{first}.2"
    assert nightly.labeled == 1
    assert nightly.predict(day(1), manifest=right) == f"{first}.2"
    assert nightly.labeled == 0
    status = pq.read_table(f"{first}.2/predictions")["status"].to_pylist()
    assert status == ["ok"]


def test_an_unfinished_run_is_resumed_with_its_columns(nightly: Nightly, images: Images) -> None:
    images.day(1, new=5)
    nightly.build(images)
    with pytest.raises(Killed):
        nightly.predict(day(1), killed="labeled")
    config = build(ManifestConfig, {"path": str(nightly.manifest), "drop_columns": ["mtime"]})
    fewer = open_manifest(config)
    assert nightly.predict(day(1), manifest=fewer) == str(date_folder(nightly, 1))
    assert nightly.labeled == 1
    assert nightly.compact() == nightly.from_scratch()
    with pytest.raises(Killed):
        nightly.predict(day(2), killed="planned", manifest=fewer)
    assert nightly.predict(day(2)) == str(date_folder(nightly, 2))


def test_a_retry_of_a_start_over_that_was_interrupted_is_planned_again(
    nightly: Nightly, images: Images
) -> None:
    images.day(1, new=5)
    nightly.build(images)
    with pytest.raises(Killed):
        nightly.predict(day(1), killed="planned")
    shutil.rmtree(date_folder(nightly, 1) / "_staging" / "manifest")
    assert nightly.predict(day(1), retry_errors=True) == str(date_folder(nightly, 1))
    assert nightly.compact() == nightly.from_scratch()


def test_an_unfinished_run_keeps_the_version_of_the_table_that_it_was_planned_from(
    tmp_path: Path,
) -> None:
    run = commit(tmp_path / "run", drawn(3))
    manifest = open_manifest(ManifestConfig(path=str(run / "predictions" / "part-00000.parquet")))
    record = layout.load_run(str(run))
    assert record is not None
    today = dataclasses.replace(manifest, version="13")
    assert load_planned_manifest(str(run), record, today).version is None
    record["identity"]["manifest"]["version"] = "12"
    planned = load_planned_manifest(str(run), record, today)
    assert planned.describe_identity() == record["identity"]["manifest"]


@pytest.mark.parametrize("failed", [False, True])
def test_an_image_that_is_listed_twice_with_two_versions_is_labeled_once(
    nightly: Nightly, images: Images, failed: bool
) -> None:
    images.write("a.png", b"spoilt" if failed else None)
    images.write("b.png")
    nightly.manifest.mkdir()
    table = nightly.manifest / "images.csv"

    def predict(number: int, versions: str) -> int:
        names = zip("aba", versions, strict=True)
        rows = [f"{images.folder}/{name}.png,{version}\n" for name, version in names]
        table.write_text("path,version\n" + "".join(rows))
        nightly.predict(day(number))
        return nightly.labeled

    assert predict(1, "152") == 3
    assert predict(2, "152") == 0
    assert predict(3, "252") == 0  # the last row decides
    assert predict(4, "153") == 2  # and with it, the others are labeled
    assert predict(5, "153") == 0
    compact(CompactConfig(source=str(nightly.labels), output=str(nightly.latest)))
    for night in nightly.labels.iterdir():
        shutil.rmtree(night)
    nightly.latest.rename(nightly.labels / "history")
    assert predict(6, "153") == 0  # a compacted history has the version that decided
    assert predict(7, "154") == 2


@pytest.mark.parametrize("is_earlier", [False, True])
def test_other_version_columns_compare_a_manifest_again(
    nightly: Nightly, images: Images, is_earlier: bool
) -> None:
    for at in range(2):
        images.write(f"{at}.png")
    nightly.manifest.mkdir()
    table = nightly.manifest / "images.csv"
    by_revision = SinceConfig(path=str(nightly.labels), version=["rev"])

    def write(*revisions: int) -> None:
        rows = [f"{images.folder}/{at}.png,{rev}\n" for at, rev in enumerate(revisions)]
        table.write_text("path,rev\n" + "".join(rows))

    write(1, 1)
    nightly.predict(day(1))
    write(2, 1)
    second = nightly.predict(day(2))
    assert nightly.labeled == 0
    if is_earlier:  # of a version that stored them in the configuration alone
        file = Path(second, "_run.json")
        record = json.loads(file.read_text())
        del record["since"]["version"]
        record["provenance"]["config"] = {"since": {"path": "labels", "version": []}}
        file.write_text(json.dumps(record))
        assert (nightly.predict(day(2)), nightly.labeled) == (second, 0)
    assert nightly.predict(day(2), since=by_revision) == f"{second}.2"
    assert nightly.labeled == 1
    assert nightly.predict(day(2), since=by_revision) == f"{second}.2"
    assert nightly.labeled == 0
