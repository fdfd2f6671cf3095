"""The check of a data set: its request, what it drops, its result."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls import config as configuration
from imgcls.curation import check as check_module
from imgcls.curation.check import CheckResult, _check_readable, _open_manifests, check, find_dropped
from imgcls.curation.checks.findings import ISSUES, ISSUES_SCHEMA, Finding, build_issue_table
from imgcls.curation.checks.report import build_section
from imgcls.curation.config import CheckConfig, Issue, ScanConfig
from imgcls.curation.scan import ScannedManifest, _build_identity
from imgcls.data.manifests.label_columns import LabelColumns
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.errors import ConfigError, ManifestError, OutputError, RequestError
from imgcls.execution.plan import Plan
from imgcls.models import openvino_package
from imgcls.models.bundle import load_bundle
from imgcls.runs.layout import write_table
from tests.conftest import write_manifest
from tests.curation.pictures import Row, images_of, jpeg, picture


@pytest.mark.parametrize("issue", ISSUES)
def test_every_issue_can_be_dropped(issue: str) -> None:
    config = configuration.build(
        CheckConfig, {"manifest": "m.csv", "output": "o", "drop": f"tiny,{issue}"}
    )
    assert config.drop == ["tiny", issue]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fail_on": "leakage"}, "pass --against"),
        ({"drop": "leakage"}, "pass --against"),
        ({"fail_on": "label-error"}, "pass --model BUNDLE"),
        ({"drop": "similar"}, "pass --model BUNDLE"),
    ],
)
def test_an_issue_that_cannot_be_found_is_refused(
    tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    write_manifest(tmp_path / "m.csv", [("a.jpg",)], ("path",))
    with pytest.raises(ConfigError, match=message):
        check(manifest=str(tmp_path / "m.csv"), output=str(tmp_path / "out"), **settings)
    assert not (tmp_path / "out").exists()


def test_a_missing_engine_is_refused_before_ray_starts(
    tmp_path: Path, color_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_package, "is_openvino_installed", lambda: False)
    write_manifest(tmp_path / "m.csv", [("a.jpg",)], ("path",))
    places = {"manifest": str(tmp_path / "m.csv"), "output": str(tmp_path / "out")}
    with pytest.raises(RequestError, match=r"run: pip install 'imgcls\[openvino\]'"):
        check(model=str(color_bundle), engine="openvino", **places)
    assert not (tmp_path / "out").exists()


def test_the_engine_is_part_of_what_a_resumed_scan_must_match(
    tmp_path: Path, color_bundle: Path
) -> None:
    write_manifest(tmp_path / "m.csv", [("a.jpg",)], ("path",))
    manifest = open_manifest(ManifestConfig(path=str(tmp_path / "m.csv")))
    config = ScanConfig(manifest=ManifestConfig(path=str(tmp_path / "m.csv")), output="out")
    one, other, automatic = (
        _build_identity(manifest, config, load_bundle(str(color_bundle)), engine)
        for engine in ("openvino", "torch", "auto")
    )
    assert other.find_differences(asdict(one)) == ["settings.engine: 'openvino' then, 'torch' now"]
    without_engines = asdict(automatic)
    del without_engines["settings"]["engine"]
    assert automatic.find_differences(without_engines) == []


def test_overwrite_removes_no_input(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_table(str(out / "clean.parquet"), pa.table({"path": ["a.jpg"]}))
    with pytest.raises(OutputError, match=r"would remove .*clean\.parquet"):
        check(manifest=str(out / "clean.parquet"), output=str(out), overwrite=True)
    assert (out / "clean.parquet").exists()


def test_a_clean_manifest_does_not_join_the_tables_that_are_checked(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    write_table(str(folder / "part-0.parquet"), pa.table({"path": ["a.jpg"]}))
    for manifest in (folder, folder / "*.parquet"):
        with pytest.raises(OutputError, match="would have its rows twice"):
            check(manifest=str(manifest), output=str(folder / "clean.parquet"), drop=["tiny"])
    assert [each.name for each in folder.iterdir()] == ["part-0.parquet"]


def test_another_manifest_may_have_another_label_column(tmp_path: Path) -> None:
    write_manifest(tmp_path / "train.csv", [("a.jpg", "cat")], ("path", "species"))
    write_manifest(tmp_path / "test.csv", [("b.jpg", "dog")], ("path", "label"))
    config = configuration.build(
        CheckConfig,
        {
            "manifest": {"path": str(tmp_path / "train.csv"), "label_column": "species"},
            "against": [str(tmp_path / "test.csv"), str(tmp_path / "train.csv")],
            "output": str(tmp_path / "out"),
        },
    )
    assert [each.label_column for each in _open_manifests(config)] == [
        "species",
        "label",
        "species",
    ]


def describe_labels(tmp_path: Path, against: str, **labels: object) -> LabelColumns | str | None:
    """The label columns of the manifest of `against`, read by the options of train.csv."""
    config = configuration.build(
        CheckConfig,
        {
            "manifest": {"path": str(tmp_path / "train.csv"), **labels},
            "against": [str(tmp_path / against)],
            "output": str(tmp_path / "out"),
        },
    )
    _, other = _open_manifests(config)
    return other.label_columns or other.label_column


def test_another_manifest_may_have_labels_of_another_form(tmp_path: Path) -> None:
    write_manifest(tmp_path / "train.csv", [("a.jpg", "cat;dog", "1")], ("path", "tags", "cat"))
    write_manifest(tmp_path / "tags.csv", [("b.jpg", "dog")], ("path", "tags"))
    write_manifest(tmp_path / "label.csv", [("b.jpg", "dog")], ("path", "label"))
    write_manifest(tmp_path / "none.csv", [("b.jpg",)], ("path",))
    pq.write_table(pa.table({"path": ["c.jpg"], "tags": [["dog"]]}), tmp_path / "lists.parquet")
    tags = {"label_column": "tags", "label_delimiter": ";"}
    assert describe_labels(tmp_path, "tags.csv", **tags) == LabelColumns("tags", ";")
    assert describe_labels(tmp_path, "lists.parquet", **tags) == LabelColumns("tags")
    assert describe_labels(tmp_path, "label.csv", **tags) == "label"
    assert describe_labels(tmp_path, "none.csv", **tags) is None
    columns = {"label_columns": ["cat"]}
    assert describe_labels(tmp_path, "train.csv", **columns) == LabelColumns(per_class=("cat",))
    assert describe_labels(tmp_path, "label.csv", **columns) == "label"


def test_the_labels_are_no_part_of_what_a_resumed_scan_must_match(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.csv", [("a.jpg", "x", "y")], ("path", "label", "tags"))
    identities = []
    for labels in ({}, {"label_column": "tags"}, {"label_delimiter": ";"}):
        config = ManifestConfig(path=str(tmp_path / "m.csv"), **labels)
        scan = ScanConfig(manifest=config, output="out")
        identities.append(_build_identity(open_manifest(config), scan, None, "auto"))
    assert identities[0] == identities[1] == identities[2]


def test_the_summary_lists_the_classes_of_the_checked_manifest(tmp_path: Path) -> None:
    rows: list[Row] = [(f"{i}.jpg", jpeg(picture(i)), "cat;dog" if i else "cat") for i in range(4)]
    images = images_of(tmp_path, rows, [("t.jpg", jpeg(picture(9)), "fox")], delimiter=";")
    assert check_module._summarize(images, [], 1)["classes"] == [
        {"name": "cat", "issue": "no-negatives",
         "detail": "no image is known not to have it"},
        {"name": "fox", "issue": "few-positives", "detail": "0 images, fewer than 1"},
    ]  # fmt: skip
    single = images_of(tmp_path, [("a.jpg", jpeg(picture(0)), "x")])
    assert list(check_module._summarize(single, [], 1)) == ["manifests", "issues"]


def test_an_issue_has_all_classes_of_its_image_as_label(tmp_path: Path) -> None:
    rows: list[Row] = [
        (f"{i}.jpg", jpeg(picture(i)), label) for i, label in enumerate(("dog;cat", ";", None))
    ]
    images = images_of(tmp_path, rows, delimiter=";")
    finding = Finding("tiny", np.arange(3), np.ones(3, np.float32), ["small"] * 3)
    assert build_issue_table(images, [finding])["label"].to_pylist() == ["cat; dog", "", None]
    section = build_section(images, finding, 3)
    assert [item["label"] for item in section["items"]] == ["cat; dog", "", None]


def test_a_manifest_without_a_readable_image_is_scanned_again_by_the_next_run(
    tmp_path: Path,
) -> None:
    images = images_of(
        tmp_path, [("a.jpg", jpeg(picture(0)), None)], [("b.jpg", b"no image", None)]
    )
    scanned = []
    for number in range(2):
        output = tmp_path / "_looks" / str(number)
        output.mkdir(parents=True)
        manifest = open_manifest(ManifestConfig(path=str(tmp_path / f"m{number}.csv")))
        scanned.append(ScannedManifest(str(output), manifest, Plan("run", 1, 1, 1)))
    with pytest.raises(ManifestError, match=r"against .*m1\.csv: none of its images can be read"):
        _check_readable(images, scanned)
    assert [Path(each.output).exists() for each in scanned] == [True, False]


@pytest.mark.parametrize("drop", [["tiny", "near-duplicates"], ["near-duplicates", "tiny"]])
def test_the_duplicate_that_is_kept_has_no_other_dropped_issue(
    tmp_path: Path, drop: list[Issue]
) -> None:
    images = images_of(tmp_path, [(f"{i}.jpg", jpeg(picture(i)), None) for i in range(4)])
    one = np.ones(3, np.float32)
    findings = [
        Finding("near-duplicates", np.array([0, 1, 2]), one, ["", "", ""], np.array([0, 0, 0])),
        Finding("tiny", np.array([0]), one[:1], [""]),
    ]
    assert np.flatnonzero(find_dropped(images, findings, drop)).tolist() == [0, 2]


def test_the_result_shows_counts_and_the_worst_images(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a<b.jpg")
    images = images_of(tmp_path, [("a<b.jpg", jpeg(picture(0)), "x"), ("c.jpg", b"", None)])
    findings = [
        Finding("tiny", np.array([0]), np.ones(1, np.float32), ["8x8 pixels"]),
        Finding("unreadable", np.array([1]), np.ones(1, np.float32), ["empty: no bytes"]),
    ]
    sections = [build_section(images, finding, 24) for finding in findings]
    result = CheckResult(
        issues=build_issue_table(images, findings),
        counts={"tiny": 1, "unreadable": 1},
        rows=2,
        report="out/report.html",
        _sections=sections,
    )
    assert repr(result) == "CheckResult(2 rows: 1 tiny, 1 unreadable; out/report.html)"
    html = result._repr_html_()
    assert "2 rows checked" in html
    assert html.count("<img src=") == 1
    assert "a&lt;b.jpg" in html
    assert "empty: no bytes" in html
    assert pa.table(result).column("issue").to_pylist() == ["tiny", "unreadable"]
    assert result.to_pandas()["score"].tolist() == [1.0, 1.0]


def test_the_result_of_a_clean_data_set_has_no_issues() -> None:
    result = CheckResult(ISSUES_SCHEMA.empty_table(), {}, 3, "out/report.html")
    assert repr(result) == "CheckResult(3 rows: no issues; out/report.html)"
    assert "no issues found" in result._repr_html_()
