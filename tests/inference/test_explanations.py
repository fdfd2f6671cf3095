"""Pictures of some rows of a committed run: which rows, and what an interruption leaves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from imgcls.cluster.interrupts import Interruption
from imgcls.data.formats import EXPLANATIONS_FOLDER
from imgcls.data.storage import disk
from imgcls.errors import Interrupted, RunFailed
from imgcls.inference import explanations
from imgcls.inference.explanations import explain_runs, select_rows
from imgcls.metrics.columns import limit_batch_rows
from imgcls.models.bundle import Bundle, load_bundle
from imgcls.runs.committed import open_run
from imgcls.runs.lease import Lease
from tests.conftest import COLORS
from tests.evaluation.multilabel_runs import (
    build_run_table,
    commit_multilabel,
    draw_scores,
    draw_targets,
)
from tests.evaluation.runs import commit, draw_images, drawn

ROWS = 60


@pytest.fixture
def bundle(color_bundle: Path) -> Bundle:
    return load_bundle(str(color_bundle))


@pytest.fixture
def table() -> pa.Table:
    return drawn(ROWS, 3, classes=list(COLORS), failed=0.1, unlabeled=0.1, sharpness=1.0)


@pytest.fixture
def run(bundle: Bundle, table: pa.Table, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    commit(folder, table, classes=list(COLORS), bundle_sha256=bundle.sha256, parts=2)
    draw_images(folder, ROWS, (64, 48))
    return folder


def test_the_most_confident_mistakes_are_chosen(run: Path, table: pa.Table) -> None:
    rows = [row for row in table.to_pylist() if row["status"] == "ok" and row["label"]]
    wrong = [row for row in rows if row["label"] != row["predicted_label"]]
    wrong.sort(key=lambda row: (-row["confidence"], row["row"]))
    found = select_rows(open_run(str(run)), 5).to_pylist()
    assert [row["row"] for row in found] == [row["row"] for row in wrong[:5]]
    assert [row["label"] for row in found] == [row["predicted_label"] for row in wrong[:5]]
    assert select_rows(open_run(str(run)), 1000).num_rows == len(wrong)


def test_without_labels_the_least_confident_rows_are_chosen(
    table: pa.Table, bundle: Bundle, tmp_path: Path
) -> None:
    commit(tmp_path / "run", table, classes=list(COLORS), label_column=None)
    rows = [row for row in table.to_pylist() if row["status"] == "ok"]
    rows.sort(key=lambda row: (row["confidence"], row["row"]))
    found = select_rows(open_run(str(tmp_path / "run")), 5)
    assert found["row"].to_pylist() == [row["row"] for row in rows[:5]]


def test_of_a_multilabel_run_the_wrong_labels_with_the_highest_scores_are_chosen(
    tmp_path: Path,
) -> None:
    targets = draw_targets(50, classes=3)
    scores = draw_scores(targets)
    table = build_run_table(targets, scores, classes=list(COLORS), failed=0.1)
    commit_multilabel(tmp_path / "run", table, classes=list(COLORS))
    expected = []
    for row, truth, values in zip(table.to_pylist(), targets, scores, strict=True):
        wrong = [
            (float(values[code]), name)
            for code, name in enumerate(COLORS)
            if row["predicted_labels"] and name in row["predicted_labels"] and not truth[code]
        ]
        if wrong:
            score, name = max(wrong, key=lambda each: each[0])
            expected.append((-score, row["row"], name))
    found = select_rows(open_run(str(tmp_path / "run")), 7).to_pylist()
    assert [(row["row"], row["label"]) for row in found] == [
        (row, name) for _, row, name in sorted(expected)[:7]
    ]


def test_pictures_and_their_table_are_written_and_nothing_else_changes(
    run: Path, bundle: Bundle
) -> None:
    before = read_files(run)
    explain_runs(bundle, [str(run)], 4, Interruption())
    written = pq.read_table(run / EXPLANATIONS_FOLDER / "explanations.parquet").to_pylist()
    assert [row["row"] for row in written] == select_rows(open_run(str(run)), 4)["row"].to_pylist()
    for row in written:
        with Image.open(run / EXPLANATIONS_FOLDER / row["file"]) as picture:
            assert picture.size == (192, 144)  # 64 x 48, three times as large
    after = read_files(run)
    assert {name: after[name] for name in after if EXPLANATIONS_FOLDER not in name} == before


def test_an_interrupted_explanation_is_resumed_with_the_same_files(
    run: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    explain_runs(bundle, [str(run)], 4, Interruption())
    whole = read_files(run)
    folder = run / EXPLANATIONS_FOLDER
    for path in sorted(folder.iterdir()):
        path.unlink()
    stopped = Interruption()
    draw = explanations.explain_rows

    def stop_after_two(*arguments: object) -> object:
        for number, picture in enumerate(draw(*arguments)):  # type: ignore[arg-type]
            if number == 2:
                stopped.request_stop("the test")
            yield picture

    monkeypatch.setattr(explanations, "explain_rows", stop_after_two)
    with pytest.raises(Interrupted, match=r"the test; .*run is committed.*rerun the same command"):
        explain_runs(bundle, [str(run)], 4, stopped)
    kept = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(kept) == 2
    Path(disk.temporary_name(str(folder / "x.jpg"))).touch()  # of a driver that was killed
    monkeypatch.setattr(explanations, "explain_rows", draw)
    explain_runs(bundle, [str(run)], 4, Interruption())
    assert read_files(run) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_another_number_of_rows_replaces_the_pictures(run: Path, bundle: Bundle) -> None:
    explain_runs(bundle, [str(run)], 5, Interruption())
    explain_runs(bundle, [str(run)], 2, Interruption())
    assert len(list((run / EXPLANATIONS_FOLDER).glob("*.jpg"))) == 2
    assert pq.read_table(run / EXPLANATIONS_FOLDER / "explanations.parquet").num_rows == 2


@pytest.mark.parametrize("damaged", [b"", b"PAR1 no table"])
def test_a_damaged_table_is_written_again(run: Path, bundle: Bundle, damaged: bytes) -> None:
    explain_runs(bundle, [str(run)], 2, Interruption())
    whole = read_files(run)
    (run / EXPLANATIONS_FOLDER / "explanations.parquet").write_bytes(damaged)
    explain_runs(bundle, [str(run)], 2, Interruption())
    assert read_files(run) == whole


def test_two_drivers_do_not_explain_one_run_at_once(run: Path, bundle: Bundle) -> None:
    before = read_files(run)
    other = Lease.acquire(str(run))
    try:
        with pytest.raises(RunFailed, match=r"is committed, but .* is locked by .*; rerun"):
            explain_runs(bundle, [str(run)], 2, Interruption())
    finally:
        other.release()
    assert read_files(run) == before
    explain_runs(bundle, [str(run)], 2, Interruption())
    assert len(list((run / EXPLANATIONS_FOLDER).glob("*.jpg"))) == 2


def test_a_driver_that_lost_its_lease_writes_no_picture(
    run: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = explanations.explain_rows

    def take_over_after_one(*arguments: object) -> object:
        for number, picture in enumerate(draw(*arguments)):  # type: ignore[arg-type]
            if number == 1:
                (run / "_lease" / "000009.json").write_text("{}")
            yield picture

    monkeypatch.setattr(explanations, "_MAX_LEASE_CHECK_AGE_S", 0.0)
    monkeypatch.setattr(explanations, "explain_rows", take_over_after_one)
    with pytest.raises(RunFailed, match="another driver has taken over"):
        explain_runs(bundle, [str(run)], 3, Interruption())
    assert len(list((run / EXPLANATIONS_FOLDER).iterdir())) == 1


def test_files_of_others_next_to_the_pictures_are_kept(run: Path, bundle: Bundle) -> None:
    explain_runs(bundle, [str(run)], 3, Interruption())
    names = ("notes.txt", "holiday.jpg", "000000001-0123456789ab.jpg.bak", "12-0123456789ab.jpg")
    for name in names:
        (run / EXPLANATIONS_FOLDER / name).write_text("mine")
    explain_runs(bundle, [str(run)], 2, Interruption())
    kept = {path.name for path in (run / EXPLANATIONS_FOLDER).iterdir()}
    assert kept.issuperset(names)
    assert len(kept) == len(names) + 3  # two pictures and the table


def test_an_image_that_is_gone_has_no_picture(run: Path, bundle: Bundle) -> None:
    gone = select_rows(open_run(str(run)), 3).to_pylist()[1]
    (run / gone["path"]).unlink(missing_ok=True)
    explain_runs(bundle, [str(run)], 3, Interruption())
    written = pq.read_table(run / EXPLANATIONS_FOLDER / "explanations.parquet").to_pylist()
    assert [row["file"] is None for row in written] == [False, True, False]


def test_a_run_of_another_bundle_is_not_explained(
    run: Path, multilabel_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    explain_runs(load_bundle(str(multilabel_bundle)), [str(run)], 3, Interruption())
    assert not (run / EXPLANATIONS_FOLDER).exists()
    assert "was made by another bundle; its rows are not explained" in capsys.readouterr().out


def test_a_bundle_that_was_replaced_meanwhile_fails_a_run_that_is_committed(
    run: Path, color_bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(color_bundle, tmp_path / "bundle")
    bundle = load_bundle(str(tmp_path / "bundle"))
    (tmp_path / "bundle" / "model.safetensors").write_bytes(b"another")
    with pytest.raises(RunFailed, match=r"run is committed.*model\.safetensors.*rerun the same"):
        explain_runs(bundle, [str(run)], 3, Interruption())


def test_batches_are_smaller_for_many_classes() -> None:
    assert [limit_batch_rows(count, 65_536) for count in (3, 1_000, 100_000)] == [
        65_536, 8_000, 1_024
    ]  # fmt: skip


def read_files(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, by its path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
