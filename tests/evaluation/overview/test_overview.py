"""The list of all outputs in a folder: kinds, states, numbers, damaged files, stores."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import imgcls
from imgcls.cli import main
from imgcls.data.storage import filesystem
from imgcls.errors import RequestError
from imgcls.evaluation.overview import records
from imgcls.evaluation.overview.entry import RunEntry
from imgcls.evaluation.overview.overview import RunList, list_runs
from imgcls.evaluation.overview.page import render_list
from imgcls.evaluation.select import select
from imgcls.runs import layout
from imgcls.runs.lease import Lease
from tests.conftest import copied
from tests.evaluation.overview.outputs import change_json, train_bundle
from tests.evaluation.runs import commit, drawn

Made = tuple[Path, Any]


def count_ok(folder: Path) -> int:
    """Rows with a prediction of the newest night, all of which have a label."""
    file = folder / "labels" / "date=2026-01-02" / layout.SUCCESS_FILE
    return int(json.loads(file.read_text())["status"]["ok"])


def by_path(runs: RunList) -> dict[str, RunEntry]:
    return {entry.path: entry for entry in runs.entries}


def test_every_kind_of_output_is_listed_with_its_own_numbers(made: Made, place: Path) -> None:
    folder, bundles = made
    runs = list_runs(str(copied(folder, place / "out")))
    found = by_path(runs)
    assert {path: (each.kind, each.state) for path, each in found.items()} == {
        "evaluated": ("evaluation", "finished"),
        "labels/date=2026-01-01": ("predictions", "committed"),
        "labels/date=2026-01-02": ("predictions", "committed"),
        "latest": ("history", "committed"),
        "models/new": ("bundle", "finished"),
        "models/old": ("bundle", "finished"),
    }
    night = found["labels/date=2026-01-02"]
    (accuracy,) = (
        row
        for row in pq.read_table(folder / night.path / "metrics" / "summary.parquet").to_pylist()
        if row["metric"] == "accuracy"
    )
    assert night.headline is not None
    assert (night.headline.value, night.headline.lower, night.headline.upper) == (
        accuracy["value"], accuracy["lower"], accuracy["upper"],
    )  # fmt: skip
    success = json.loads((folder / night.path / layout.SUCCESS_FILE).read_text())
    assert night.headline.rows == count_ok(folder)
    assert night.error_rate == pytest.approx(success["status"]["missing"] / 60)
    assert (night.rows, night.seconds, night.images_per_second) == (60, 61.0, 81.5)
    assert (night.date, night.manifest) == ("2026-01-02T03:00:00+00:00", "drawn.csv")
    assert (night.bundle_sha256, night.model_name) == (bundles["new"].sha256, "new")
    trained = found["models/old"]
    assert trained.headline is not None
    assert (trained.headline.name, trained.headline.value, trained.headline.rows) == (
        "val_accuracy", 0.75, 40,
    )  # fmt: skip
    assert trained.headline.lower is None  # none is stored
    assert (trained.rows, trained.git_commit) == (3, "c0ffee")
    assert found["evaluated"].headline == night.headline
    history = found["latest"]  # merging stores no duration and no throughput of its own
    assert (history.rows, history.seconds, history.images_per_second) == (120, None, None)


def test_the_model_of_the_newest_committed_night_is_current(made: Made) -> None:
    current = [e.path for e in list_runs(made[0]).entries if e.is_current]
    assert current == ["labels/date=2026-01-02", "models/new"]


def test_an_earlier_night_that_is_resumed_later_does_not_become_the_newest(
    made: Made, tmp_path: Path
) -> None:
    folder = copied(made[0] / "labels", tmp_path / "labels")
    late = {"committed": "2026-01-09T03:00:00+00:00"}
    change_json(folder / "date=2026-01-01" / layout.SUCCESS_FILE, **late)
    assert [e.path for e in list_runs(folder).entries if e.is_current] == ["date=2026-01-02"]


def test_the_state_of_a_run_is_that_of_its_files_and_its_lease(tmp_path: Path) -> None:
    for name in ("running", "waiting", "refused", "embedded"):
        commit(tmp_path / name, drawn(10))
        if name != "embedded":
            (tmp_path / name / layout.SUCCESS_FILE).unlink()
    change_json(tmp_path / "refused" / layout.RUN_FILE, refused="too many <b>errors</b>")
    record = json.loads((tmp_path / "embedded" / layout.RUN_FILE).read_text())
    record["identity"]["settings"]["has_predictions"] = False
    (tmp_path / "embedded" / layout.RUN_FILE).write_text(json.dumps(record))
    lease = Lease.acquire(str(tmp_path / "running"))
    try:
        found = by_path(list_runs(tmp_path))
    finally:
        lease.release()
    assert {path: (each.kind, each.state) for path, each in found.items()} == {
        "running": ("predictions", "running"),
        "waiting": ("predictions", "waiting"),
        "refused": ("predictions", "refused"),
        "embedded": ("embeddings", "committed"),
    }
    assert found["refused"].problem == "too many <b>errors</b>"
    assert found["waiting"].error_rate is None


def test_searches_unfinished_trainings_and_selections_are_listed(
    tmp_path: Path, color_bundle: Path
) -> None:
    import pandas as pd

    search = tmp_path / "search"
    best = train_bundle(search / "best", color_bundle)
    train_bundle(search / "trials" / "a", color_bundle)
    (search / "_tune.json").write_text('{"data": {"train": {"path": "t.csv"}}}{"space": {}}')
    results = pd.DataFrame({"trial": ["a", "b"], "val_accuracy": [0.9, 0.5]})
    results.to_parquet(search / "results.parquet")
    training = tmp_path / "unfinished" / "_train"
    training.mkdir(parents=True)
    settings = {"settings": {"data": {"train": {"path": "u.csv"}}}, "data": {"data.train": "ff"}}
    (training / "run.json").write_text(json.dumps(settings))
    run = commit(tmp_path / "out", drawn(40))
    select(run=str(run), output=str(tmp_path / "next"), count=5, include_labeled=True)
    found = by_path(list_runs(tmp_path))
    assert {path: (each.kind, each.state) for path, each in found.items()} == {
        "search": ("tune", "finished"),
        "search/best": ("bundle", "finished"),
        "unfinished": ("training", "waiting"),
        "out": ("predictions", "committed"),
        "next": ("selection", "finished"),
    }
    assert found["search"].headline is not None
    assert (found["search"].headline.value, found["search"].manifest) == (0.9, "t.csv")
    assert found["search"].bundle_sha256 == best.sha256
    assert (found["unfinished"].manifest, found["unfinished"].fingerprint) == ("u.csv", "ff")
    assert found["next"].rows == 5


DAMAGE = {
    "cut": (layout.RUN_FILE, '{"identity": {', "is damaged"),
    "list": (layout.RUN_FILE, "[1, 2]", "is not a record of imgcls"),
    "old": (layout.RUN_FILE, '{"format_version": 99}', "another version of imgcls"),
    "wrong": (layout.RUN_FILE, '{"format_version": 1, "plan": {"rows": "many"}}', "identity"),
    "empty": (layout.SUCCESS_FILE, "{}", "is damaged, or another tool wrote over it"),
    "deep": (layout.RUN_FILE, "[" * 100_000, "nested too deeply"),
    "endless": (layout.SUCCESS_FILE, '{"rows": 1, "status": {"ok": Infinity}}', "is damaged"),
    "text": (layout.SUCCESS_FILE, "<b>done</b>", "is damaged, or another tool wrote over it"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_is_listed_with_the_reason(name: str, tmp_path: Path) -> None:
    file, text, reason = DAMAGE[name]
    run = commit(tmp_path / "out", drawn(10))
    (run / file).write_text(text)
    (entry,) = list_runs(tmp_path).entries
    assert entry.state == "damaged"
    assert reason in str(entry.problem)


def test_damaged_bundles_metrics_and_foreign_files_are_listed_as_such(
    tmp_path: Path, made: Made
) -> None:
    broken = copied(made[0] / "models" / "old", tmp_path / "broken")
    text = (broken / "bundle.json").read_text()
    (broken / "bundle.json").write_text(text.replace('"seed": 7', '"seed": 8'))
    run = copied(made[0] / "labels" / "date=2026-01-01", tmp_path / "run")
    (run / "metrics" / "summary.parquet").write_bytes(b"PAR1 no table")
    (tmp_path / "spark").mkdir()
    (tmp_path / "spark" / "_SUCCESS").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "summary.json").write_text('{"of": "another tool"}')
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "_tune.json").write_bytes(b"\xff")
    found = by_path(list_runs(tmp_path))
    assert {path: each.state for path, each in found.items()} == {
        "broken": "damaged",
        "run": "committed",
        "search": "damaged",
        "spark": "foreign",
    }
    assert "was modified" in str(found["broken"].problem)
    assert "metrics/summary.parquet: " in str(found["run"].problem)
    assert found["run"].headline is None
    assert "without _run.json" in str(found["spark"].problem)


def test_a_search_is_finished_when_its_best_bundle_is_complete(
    tmp_path: Path, color_bundle: Path
) -> None:
    (tmp_path / "_tune.json").write_text("{}")
    pq.write_table(pa.table({"val_accuracy": [0.5]}), tmp_path / "results.parquet")
    best = tmp_path / "best"
    steps = (
        lambda: None,
        best.mkdir,
        lambda: shutil.copy(color_bundle / "model.safetensors", best),
        lambda: shutil.copy(color_bundle / "bundle.json", best),
    )
    states = []
    for step in steps:
        step()
        states.append(by_path(list_runs(tmp_path))["."].state)
    assert states == ["waiting", "waiting", "waiting", "finished"]


def test_a_damaged_file_of_a_search_or_a_selection_is_named(
    tmp_path: Path, color_bundle: Path
) -> None:
    search, chosen = tmp_path / "search", tmp_path / "next"
    for folder, marker in ((search, "_tune.json"), (chosen, "selection.parquet")):
        folder.mkdir()
        (folder / marker).write_text("{}")
    copied(color_bundle, search / "best")
    pq.write_table(pa.table({"val_accuracy": [0.5]}), search / "results.parquet")
    table = (search / "results.parquet").read_bytes()
    texts = pa.table({"val_accuracy": ["high"]})
    pq.write_table(texts, tmp_path / "texts.parquet")
    wrong = (tmp_path / "texts.parquet").read_bytes()
    for data in (b"PAR1 no table", table[:4] + bytes(len(table) - 12) + table[-8:], wrong):
        (search / "results.parquet").write_bytes(data)
        (chosen / "summary.json").write_bytes(data)
        found = by_path(list_runs(tmp_path))
        assert (found["search"].state, found["next"].state) == ("damaged", "damaged")
        assert str(found["search"].problem).startswith("results.parquet: ")
        assert str(found["next"].problem).startswith("summary.json: ")


def test_numbers_that_are_not_finite_are_named_and_not_listed(tmp_path: Path, made: Made) -> None:
    for value in ("NaN", "Infinity"):
        folder = copied(made[0] / "evaluated", tmp_path / value)
        stored = json.loads((folder / "summary.json").read_text())
        name = "accuracy" if value == "NaN" else "labelled"
        stored["metrics"][name]["value"] = float(value)
        (folder / "summary.json").write_text(json.dumps(stored))
    run = copied(made[0] / "labels" / "date=2026-01-01", tmp_path / "run")
    rows = pq.read_table(run / "metrics" / "summary.parquet").to_pylist()
    rows = [row | ({"value": math.nan} if row["metric"] == "accuracy" else {}) for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), run / "metrics" / "summary.parquet")
    found = by_path(list_runs(tmp_path))
    assert {path: each.state for path, each in found.items()} == {
        "NaN": "damaged", "Infinity": "damaged", "run": "committed",
    }  # fmt: skip
    assert "accuracy is nan" in str(found["NaN"].problem)
    assert "accuracy is nan" in str(found["run"].problem)
    for each in found.values():
        json.dumps(each.to_json(), allow_nan=False)


def test_a_record_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 100)
    commit(tmp_path / "out", drawn(5))
    (entry,) = list_runs(tmp_path).entries
    assert entry.state == "damaged"
    assert "_run.json: has 0 MB; a record of imgcls is smaller" in str(entry.problem)


def test_a_damaged_lease_is_named_and_the_run_is_not(tmp_path: Path) -> None:
    run = commit(tmp_path / "out", drawn(5))
    (run / layout.SUCCESS_FILE).unlink()
    (run / "_lease").mkdir()
    for text in ("{", '{"pid": 1}'):
        (run / "_lease" / "000001.json").write_text(text)
        (entry,) = list_runs(tmp_path).entries
        assert (entry.kind, entry.state) == ("predictions", "waiting")
        assert str(entry.problem).startswith("_lease: ")


def test_folders_of_other_tools_named_train_are_no_outputs(tmp_path: Path) -> None:
    (tmp_path / "other" / "_train").mkdir(parents=True)
    assert list_runs(tmp_path).entries == ()


def test_urls_are_listed_without_credentials(tmp_path: Path) -> None:
    url = "https://me:secret@host/model?sig=secret"
    run = commit(tmp_path / "out", drawn(5), model=url)
    record = json.loads((run / layout.RUN_FILE).read_text())
    record["provenance"]["config"]["manifest"]["path"] = url
    (run / layout.RUN_FILE).write_text(json.dumps(record))
    runs = list_runs(tmp_path)
    (entry,) = runs.entries
    assert (entry.model, entry.manifest) == ("https://host/model?...",) * 2
    shown = runs.format_table() + render_list(runs) + json.dumps(entry.to_json())
    assert "secret" not in shown


def test_nights_whose_date_is_inside_the_path_have_one_newest_run(
    made: Made, tmp_path: Path
) -> None:
    for night in ("01", "02"):
        name = f"date=2026-01-{night}"
        copied(made[0] / "labels" / name, tmp_path / "labels" / name / "out")
    current = [e.path for e in list_runs(tmp_path).entries if e.is_current]
    assert current == ["labels/date=2026-01-02/out"]


def test_a_replaced_run_has_no_report_of_the_earlier_one(made: Made, tmp_path: Path) -> None:
    run = copied(made[0] / "labels" / "date=2026-01-01", tmp_path / "run")
    assert (run / "report.html").exists()
    layout.remove_run(str(run))
    assert not any((run / name).exists() for name in ("report.html", "summary.json"))


def test_listings_and_hidden_folders_are_no_outputs(tmp_path: Path) -> None:
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed" / "_listing.json").write_text("{}")
    (tmp_path / "listed" / "_SUCCESS").touch()
    commit(tmp_path / ".hidden" / "out", drawn(5))
    commit(tmp_path / "_staging" / "out", drawn(5))
    assert list_runs(tmp_path).entries == ()


def test_the_search_is_as_deep_as_requested_and_names_what_it_leaves_out(tmp_path: Path) -> None:
    commit(tmp_path / "a" / "b" / "c", drawn(5))
    assert [e.path for e in list_runs(tmp_path, depth=3).entries] == ["a/b/c"]
    shallow = list_runs(tmp_path, depth=2)
    assert shallow.entries == ()
    assert shallow.notes == ("1 folder below --depth not searched, such as a/b/c",)
    assert [e.path for e in list_runs(tmp_path / "a" / "b" / "c", depth=0).entries] == ["."]


def test_no_table_of_predictions_is_read(made: Made, tmp_path: Path) -> None:
    folder = copied(made[0], tmp_path / "out")
    for part in folder.rglob("predictions/*.parquet"):
        part.write_bytes(b"")
    for weights in folder.rglob("model.safetensors"):
        weights.write_bytes(b"")
    found = list_runs(folder).entries
    assert [entry.to_json() | {"url": "", "model": ""} for entry in found] == [
        entry.to_json() | {"url": "", "model": ""}
        | {"date": now.date if entry.kind == "evaluation" else entry.date}
        for entry, now in zip(list_runs(made[0]).entries, found, strict=True)
    ]  # fmt: skip


def test_a_link_to_an_output_is_noted_and_not_listed_twice(made: Made, tmp_path: Path) -> None:
    copied(made[0] / "models", tmp_path / "models")
    (tmp_path / "models" / "current").symlink_to(tmp_path / "models" / "new")
    (tmp_path / "up").symlink_to(tmp_path)
    runs = list_runs(tmp_path)
    assert [entry.path for entry in runs.entries] == ["models/new", "models/old"]
    assert f"models/current is a link to {tmp_path / 'models' / 'new'}" in runs.notes


def test_a_folder_that_does_not_exist_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="does not exist; pass a folder of outputs"):
        list_runs(str(place / "gone"))
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="is a file; pass a folder of outputs"):
        list_runs(tmp_path / "file")


@pytest.mark.parametrize("command", ["runs", "report"])
def test_a_registered_model_is_no_output(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "models:/m/1"]) == 2
    assert "models:/m/1: is a registered model" in "".join(capsys.readouterr())


def test_the_table_of_python_has_a_row_per_output(made: Made, tmp_path: Path) -> None:
    frame = imgcls.list_runs(made[0]).to_pandas()
    assert list(frame["path"]) == sorted(frame["path"])
    night = frame.set_index("path").loc["labels/date=2026-01-02"]
    assert (night["metric"], night["labeled_rows"]) == ("accuracy", count_ok(made[0]))
    empty = imgcls.list_runs(tmp_path)
    assert list(empty.to_pandas().columns) == list(frame.columns)
    assert repr(empty) == f"<RunList of {tmp_path}: no outputs>"


def test_the_command_prints_a_table_or_a_json_line_per_output(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", str(made[0])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("6 outputs (bundle 2, evaluation 1, history 1, predictions 2)")
    (night,) = (line for line in lines if line.startswith("labels/date=2026-01-02"))
    assert "accuracy" in night
    assert f", n {count_ok(made[0])} " in night
    assert "current" in night
    assert main(["runs", str(made[0]), "--json-lines"]) == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["path"] for each in objects] == [e.path for e in list_runs(made[0]).entries]


def test_control_characters_in_names_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = commit(tmp_path / "\x1b[31mred\nline", drawn(5))
    change_json(run / layout.SUCCESS_FILE, committed="\x1b[5m2026")
    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b[31mred\\nline" in out


def test_many_runs_are_listed_with_few_reads_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = commit(tmp_path / "0", drawn(3))
    for number in range(1, 60):
        shutil.copytree(run, tmp_path / str(number))
    reads: list[str] = []
    read = filesystem.read
    monkeypatch.setattr(filesystem, "read", lambda url: (reads.append(url), read(url))[1])
    assert len(list_runs(tmp_path).entries) == 60
    assert len(reads) == 2 * 60  # _run.json and _SUCCESS
