"""What an output, or the prediction of an image, was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from imgcls.cli import main
from imgcls.errors import RequestError
from imgcls.evaluation.overview.image_lineage import build_image_lineage, find_entry
from imgcls.evaluation.overview.lineage import LineageBuilder, LineageNode, format_tree
from imgcls.evaluation.overview.overview import list_runs
from imgcls.runs import layout
from tests.conftest import write_manifest
from tests.evaluation.overview.outputs import change_json, train_bundle, write_labels
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
    assert "cannot be opened" in dict(child(tree, "data").facts)  # drawn.csv is no file


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
    record = {"bundle_sha256": parent.sha256, "predictions": str(run), "method": "temperature"}
    teacher = {"url": str(tmp_path / "gone"), "bundle_sha256": "e" * 64}
    train_bundle(tmp_path / "child", color_bundle, calibration=record, teacher=teacher)
    tree = build(tmp_path, "child")
    assert child(tree, "calibrated from").title == "bundle parent"
    assert child(child(tree, "calibrated on"), "model").title == "bundle parent"
    assert "not found" in dict(child(tree, "teacher").facts)


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
