"""What an output, or the prediction of an image, was made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from imgcls.cli import main
from imgcls.errors import RequestError
from imgcls.evaluation.overview.image_lineage import build_image_lineage, find_entry
from imgcls.evaluation.overview.lineage import LineageBuilder, LineageNode, format_tree
from imgcls.evaluation.overview.overview import list_runs
from imgcls.inference.history import CompactConfig, compact
from imgcls.metrics.formatting import format_percent
from imgcls.models.bundle import load_bundle
from imgcls.runs import layout
from tests.conftest import copied, write_manifest
from tests.evaluation.overview.outputs import (
    change_json,
    commit_night,
    train_bundle,
    write_labels,
)
from tests.evaluation.runs import commit, drawn

Made = tuple[Path, Any]


def build(folder: Path, path: str) -> LineageNode:
    runs = list_runs(folder)
    entry = find_entry(runs, path)
    assert entry is not None
    return LineageBuilder(runs).build(entry)


def child(node: LineageNode, relation: str) -> LineageNode:
    (found,) = (each for each in node.children if each.relation == relation)
    return found


def test_a_run_leads_to_its_bundle_its_training_data_and_its_annotators(made: Made) -> None:
    folder, bundles = made
    tree = build(folder, "labels/date=2026-01-01")
    model = child(tree, "model")
    assert model.title == "bundle models/old"
    facts = dict(model.facts)
    assert (facts["SHA-256"], facts["seed"], facts["git commit"]) == (
        bundles["old"].sha256, "7", "c0ffee",
    )  # fmt: skip
    data = child(model, "training data")
    assert data.title == f"manifest {folder / 'train.csv'}"
    facts = dict(data.facts)
    assert facts["unchanged"] == "yes"
    assert facts["labeled by"] == "ann 2, bob 1"
    assert facts["labeled from"] == "2026-01-01 to 2026-01-03"
    assert facts["label source"] == "imgcls 2, cvat 1"
    assert child(model, "starting weights").title == "w.pth"
    assert "not checked" in dict(child(tree, "data").facts)  # drawn.csv: in which directory?


def test_a_manifest_that_was_changed_since_is_marked(tmp_path: Path, color_bundle: Path) -> None:
    labels = write_labels(tmp_path / "train.csv")
    train_bundle(tmp_path / "model", color_bundle, labels)
    write_manifest(labels, [("images/000001.jpg", "ant")], ("path", "label"))
    facts = dict(child(build(tmp_path, "model"), "training data").facts)
    assert facts["unchanged"] == "no"
    assert facts["fingerprint now"] != facts["fingerprint"]
    assert "labeled by" not in facts


def test_a_calibrated_bundle_leads_to_its_parent_and_the_run_it_was_calibrated_on(
    tmp_path: Path, color_bundle: Path
) -> None:
    parent = train_bundle(tmp_path / "parent", color_bundle, write_labels(tmp_path / "t.csv"))
    run = commit(tmp_path / "held-out", drawn(10), bundle_sha256=parent.sha256, model=parent.url)
    record = {
        "bundle_sha256": parent.sha256,
        "manifest_fingerprint": "f" * 32,
        "predictions": str(run),
        "method": "temperature",
    }
    teacher = {"url": str(tmp_path / "gone"), "bundle_sha256": "e" * 64}
    train_bundle(tmp_path / "child", color_bundle, calibration=record, teacher=teacher)
    tree = build(tmp_path, "child")
    assert child(tree, "calibrated from").title == "bundle parent"
    assert child(child(tree, "calibrated on"), "model").title == "bundle parent"
    facts = dict(child(tree, "teacher").facts)
    assert "not found" in facts
    assert "gone" in facts["cannot be read"]


def test_a_run_that_was_replaced_is_not_taken_for_the_one_that_was_evaluated(
    made: Made, tmp_path: Path
) -> None:
    folder, bundles = copied(made[0], tmp_path / "out"), made[1]
    night = folder / "labels" / "date=2026-01-02"
    change_json(folder / "evaluated" / "summary.json", run=str(night))
    assert child(child(build(folder, "evaluated"), "run"), "model").title == "bundle models/new"
    shutil.rmtree(night)
    commit_night(night, 2, bundles["old"], seed=2)
    run = child(build(folder, "evaluated"), "run")
    old, new = (bundles[name].sha256[:12] for name in ("old", "new"))
    differs = f"bundle {old} instead of {new}"
    assert run.facts == (("another run is at this path now", differs),)
    assert run.children == ()


def test_embeddings_and_relabeled_runs_are_known_by_their_commit(
    tmp_path: Path, color_bundle: Path
) -> None:
    run = commit(tmp_path / "run", drawn(5))
    config = {"data": {"embeddings": str(run)}}
    for name, month in (("same", "01"), ("changed", "02")):
        seen = {"run_id": "drawn", "committed": f"2026-{month}-01T00:00:00"}
        known = {"data": {"data.embeddings": seen}}
        train_bundle(tmp_path / name, color_bundle, run=known, config=config)
        relabeled = commit(tmp_path / f"labels-{name}", drawn(5))
        record = json.loads((relabeled / layout.RUN_FILE).read_text())
        record["provenance"]["config"]["relabel"] = {"source": str(run)}
        record["identity"]["settings"]["relabeled"] = seen
        (relabeled / layout.RUN_FILE).write_text(json.dumps(record))
    for path, relation in (("{}", "embeddings"), ("labels-{}", "source")):
        same = child(build(tmp_path, path.format("same")), relation)
        assert "link" not in dict(same.facts)
        assert same.children
        (fact,) = child(build(tmp_path, path.format("changed")), relation).facts
        differs = "committed 2026-01-01T00:00:00 instead of 2026-02-01T00:00:00"
        assert fact == ("another run is at this path now", differs)


def test_links_that_no_hash_verifies_and_relative_paths_are_marked(
    tmp_path: Path, color_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = commit(tmp_path / "run", drawn(5))
    (tmp_path / "compared").mkdir()
    compared = {"run_a": str(run), "run_b": "run"}
    (tmp_path / "compared" / "summary.json").write_text(json.dumps(compared))
    tree = build(tmp_path, "compared")
    assert dict(child(tree, "run a").facts)["link"] == "by path, not verified"
    link = f"by path, not verified; a relative path, read in {tmp_path}"
    assert dict(child(tree, "run b").facts)["link"] == link
    train_bundle(tmp_path / "parent", color_bundle, seed=1)
    train_bundle(tmp_path / "child", color_bundle, parent={"url": str(tmp_path / "parent")})
    parent = child(build(tmp_path, "child"), "parent")
    assert dict(parent.facts)["link"] == "by path, not verified"


def test_a_manifest_with_a_relative_path_is_described_only_if_it_is_the_same(
    tmp_path: Path, color_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_labels(tmp_path / "train.csv")
    train_bundle(tmp_path / "model", color_bundle, Path("train.csv"))
    facts = dict(child(build(tmp_path, "model"), "training data").facts)
    assert facts["labeled by"] == "ann 2, bob 1"
    write_manifest(tmp_path / "train.csv", [("images/000001.jpg", "ant")], ("path", "label"))
    facts = dict(child(build(tmp_path, "model"), "training data").facts)
    assert "not checked" in facts
    assert not {"unchanged", "labeled by"} & facts.keys()


def test_a_bundle_that_cannot_be_read_and_another_one_at_its_path_are_named(
    tmp_path: Path, color_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    parents = [
        {"url": "models:/any/1", "bundle_sha256": "e" * 64},
        {"url": str(color_bundle), "bundle_sha256": "e" * 64},
    ]
    train_bundle(tmp_path / "model", color_bundle, parents=parents)
    silent, replaced = build(tmp_path, "model").children
    assert "does not answer correctly" in dict(silent.facts)["cannot be read"]
    there = load_bundle(str(color_bundle)).sha256
    assert dict(replaced.facts)["another bundle is at this path now"] == there
    assert replaced.children == ()


def test_the_registered_model_that_a_training_began_with_is_shown(
    tmp_path: Path, color_bundle: Path
) -> None:
    start = train_bundle(tmp_path / "start", color_bundle, seed=1)
    found = {"uri": "models:/m@live", "name": "m", "version": "3", "sha256": start.sha256}
    train_bundle(tmp_path / "model", color_bundle, registered_model=found)
    assert child(build(tmp_path, "model"), "starting model").title == "bundle start"


def test_credentials_and_control_characters_are_not_shown(
    tmp_path: Path, color_bundle: Path
) -> None:
    config = {
        "data": {"train": {"path": "https://me:secret@127.0.0.1:9/a.csv?sig=secret"}},
        "model": {"weights": "https://host/w.pth?X-Amz-Signature=secret"},
    }
    train_bundle(tmp_path / "model", color_bundle, config=config, git_commit="a\n\x1b[31mb")
    text = format_tree(build(tmp_path, "model"))
    assert "secret" not in text
    assert "git commit a\\n\\x1b[31mb" in text
    assert "https://host/w.pth?..." in text


def test_records_that_name_each_other_end(tmp_path: Path, color_bundle: Path) -> None:
    first = train_bundle(tmp_path / "a", color_bundle)
    train_bundle(tmp_path / "b", color_bundle, parents=[first.sha256, {"url": str(tmp_path / "a")}])
    run = commit(tmp_path / "run", drawn(5))
    config = {"model": "m", "manifest": {"path": "p"}, "relabel": {"source": str(run)}}
    change_json(run / layout.RUN_FILE, provenance={"config": config})
    assert "shown above" in dict(child(build(tmp_path, "run"), "source").facts)
    assert len([c for c in build(tmp_path, "b").children if c.relation == "parent"]) == 2


def test_a_history_leads_to_the_runs_that_it_merged(made: Made) -> None:
    tree = build(made[0], "latest")
    titles = [each.title for each in tree.children]
    assert titles == ["predictions labels/date=2026-01-02", "predictions labels/date=2026-01-01"]
    assert child(tree.children[0], "model").title == "bundle models/new"


def test_an_output_is_found_by_path_url_or_hash_of_its_bundle(made: Made) -> None:
    folder, bundles = made
    runs = list_runs(folder)
    for name in ("models/old", str(folder / "models" / "old"), bundles["old"].sha256[:10]):
        entry = find_entry(runs, name)
        assert entry is not None
        assert entry.path == "models/old"
    assert find_entry(runs, "models/none") is None


def test_an_image_has_its_newest_prediction_and_the_labels_it_was_trained_on(made: Made) -> None:
    folder, _ = made
    image = folder / "labels" / "date=2026-01-02" / "images" / "000002.jpg"
    runs = list_runs(folder)
    tree = build_image_lineage(runs, str(image))
    newest = drawn(60, 2, failed=0.1)
    facts = dict(tree.facts)
    assert facts["label"] == newest["label"][2].as_py()
    assert facts["predicted label"] == newest["predicted_label"][2].as_py()
    assert child(tree, "run").title == "predictions labels/date=2026-01-02"
    assert child(child(tree, "run"), "model").title == "bundle models/new"
    # the training manifest has images of these names, in another folder
    assert "has the image" not in format_tree(tree)


def test_an_image_is_found_in_any_row_group_of_any_part(tmp_path: Path) -> None:
    table = drawn(30)
    commit(tmp_path / "run", table, parts=3, group_rows=4)
    runs = list_runs(tmp_path)
    for row in (0, 9, 10, 17, 29):
        image = tmp_path / "run" / table["path"][row].as_py()
        facts = dict(build_image_lineage(runs, str(image)).facts)
        assert facts["predicted label"] == table["predicted_label"][row].as_py()
        assert facts["confidence"] == format_percent(table["confidence"][row].as_py())


def test_an_image_of_the_training_data_is_shown_with_its_annotator(
    tmp_path: Path, color_bundle: Path
) -> None:
    labels = write_labels(tmp_path / "train.csv")
    bundle = train_bundle(tmp_path / "model", color_bundle, labels)
    run = commit(tmp_path / "out", drawn(10), bundle_sha256=bundle.sha256)
    record = json.loads((run / layout.RUN_FILE).read_text())
    record["identity"]["manifest"]["root"] = str(tmp_path)
    (run / layout.RUN_FILE).write_text(json.dumps(record))
    tree = build_image_lineage(list_runs(tmp_path), str(tmp_path / "images" / "000002.jpg"))
    facts = dict(child(child(child(tree, "run"), "model"), "training data").facts)
    assert "label bee, labeled_by bob" in facts["has the image"]


def test_of_runs_in_several_folders_the_last_commit_has_the_newest_prediction(
    tmp_path: Path,
) -> None:
    image = str(tmp_path / "images" / "000002.jpg")
    for name, sequence, committed in (("a/1", 9, "2026-01-01"), ("b/1", 1, "2026-01-02")):
        run = commit(tmp_path / name, drawn(10))
        record = json.loads((run / layout.RUN_FILE).read_text())
        record["identity"]["manifest"]["root"] = str(tmp_path)
        (run / layout.RUN_FILE).write_text(json.dumps(record | {"sequence": sequence}))
        change_json(run / layout.SUCCESS_FILE, committed=f"{committed}T00:00:00+00:00")
    tree = build_image_lineage(list_runs(tmp_path), image)
    assert child(tree, "run").title == "predictions b/1"


def test_runs_that_cannot_be_searched_are_named_with_an_older_prediction(
    made: Made, tmp_path: Path
) -> None:
    folder = copied(made[0], tmp_path / "out")
    image = folder / "labels" / "date=2026-01-01" / "images" / "000002.jpg"
    for night in ("01", "02"):
        file = folder / "labels" / f"date=2026-01-{night}" / layout.RUN_FILE
        record = json.loads(file.read_text())
        record["identity"]["manifest"]["root"] = str(image.parent.parent)
        file.write_text(json.dumps(record))
    newest = folder / "labels" / "date=2026-01-02"
    part = newest / "predictions" / "part-00000.parquet"
    part.write_bytes(b"x" * part.stat().st_size)
    for damage in (lambda: None, lambda: (newest / layout.RUN_FILE).write_text("{")):
        damage()
        tree = build_image_lineage(list_runs(folder), str(image))
        assert child(tree, "run").title == "predictions labels/date=2026-01-01"
        assert dict(tree.facts)["not searched"].startswith("labels/date=2026-01-02: ")


def test_of_several_histories_the_one_with_the_newest_run_counts(
    made: Made, tmp_path: Path
) -> None:
    folder = copied(made[0], tmp_path / "out")
    night = made[0] / "labels" / "date=2026-01-01"  # the runs' paths begin there
    compact(CompactConfig(source=str(folder / "labels"), output=str(folder / "all")))
    shutil.rmtree(folder / "labels" / "date=2026-01-02")
    compact(CompactConfig(source=str(folder / "labels"), output=str(folder / "older")))
    change_json(folder / "older" / layout.SUCCESS_FILE, committed="2030-01-01T00:00:00+00:00")
    shutil.rmtree(folder / "labels")
    shutil.rmtree(folder / "latest")
    tree = build_image_lineage(list_runs(folder), str(night / "images" / "000002.jpg"))
    assert child(tree, "run").title == "history all"


def test_a_history_whose_merged_runs_cannot_be_ordered_is_named(made: Made, tmp_path: Path) -> None:
    folder = copied(made[0], tmp_path / "out")
    shutil.rmtree(folder / "labels")
    damaged = copied(folder / "latest", folder / "other")
    image = str(made[0] / "labels" / "date=2026-01-01" / "images" / "000002.jpg")
    for origins in ([1], {"a": 5}, {"a": ["x", "", 1, "", ""]}):
        change_json(damaged / layout.RUN_FILE, origins=origins)
        tree = build_image_lineage(list_runs(folder), image)
        assert child(tree, "run").title == "history latest"
        assert dict(tree.facts)["not searched"].startswith("other: ")


def test_an_image_that_no_run_has_is_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="none of 3 committed runs there has an image"):
        build_image_lineage(list_runs(made[0]), str(tmp_path / "none.jpg"))


def test_the_command_prints_the_tree(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(made[0]), "--lineage", "labels/date=2026-01-02"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("predictions labels/date=2026-01-02\n")
    assert "├─ model: bundle models/new\n" in text
    assert "│  └─ starting weights: w.pth\n" in text
    assert main(["runs", str(made[0]), "--lineage", "models/old", "--json-lines"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["title"] == "bundle models/old"
    assert main(["runs", str(made[0]), "--lineage", "nothing.jpg"]) == 2
