"""What the rules, the comparison of all images and the probe find, on images drawn for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from sklearn.datasets import load_digits

from imgcls import config as configuration
from imgcls.curation import build, stats
from imgcls.curation.build import ManifestBuildConfig
from imgcls.curation.check import CheckConfig, _open_manifests, check, find_dropped
from imgcls.curation.checks import duplicates, label_errors, rules
from imgcls.curation.checks.duplicates import DuplicatesConfig, find_similar_pairs
from imgcls.curation.checks.findings import ISSUES, Finding, Issue, build_issue_table
from imgcls.curation.checks.image_table import ImageTable, build_image_table
from imgcls.curation.checks.label_errors import LabelErrorsConfig, _sample_per_class
from imgcls.curation.checks.report import ISSUE_DESCRIPTIONS, build_section, render_check_report
from imgcls.curation.checks.rules import RulesConfig
from imgcls.curation.checks.similarity import normalize_embeddings
from imgcls.curation.scan_stage import scan_schema
from imgcls.data.image_features import ImageFeatures, compute_features
from imgcls.data.manifest import ManifestConfig, open_manifest
from imgcls.errors import ConfigError, ImageError, ManifestError, OutputError
from imgcls.runs.layout import write_table
from tests.conftest import write_manifest
from tests.data.pictures import drawn, encoded

Row = tuple[str, bytes, str | None]


def images_of(
    folder: Path, *manifests: list[Row], embeddings: np.ndarray | None = None
) -> ImageTable:
    """Manifests of (name, file, label), looked at as a worker does."""
    sources = []
    start = 0
    for number, rows in enumerate(manifests):
        file = write_manifest(
            folder / f"m{number}.csv", [(name, label or "") for name, _, label in rows],
            ("path", "label"),
        )  # fmt: skip
        manifest = open_manifest(ManifestConfig(path=str(file)))
        told = []
        for row, (_, data, _) in enumerate(rows):
            try:
                told.append({"row": row, "status": "ok", **compute_features(data).to_columns()})
            except ImageError as error:
                told.append({"row": row, "status": error.status, "error": str(error)})
            if embeddings is not None:
                told[-1]["embedding"] = embeddings[start + row].astype(np.float16)
        start += len(rows)
        width = None if embeddings is None else embeddings.shape[1]
        facts = pa.Table.from_pylist(told, schema=scan_schema(width))
        table = pa_csv.read_csv(
            file, convert_options=pa_csv.ConvertOptions(strings_can_be_null=True)
        )
        sources.append((manifest, [(table, facts)]))
    return build_image_table(sources)


def picture(seed: int) -> Image.Image:
    """One of many that look nothing like each other."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    return coarse.resize((320, 240), Image.Resampling.NEAREST)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    return encoded(image, "JPEG", quality=quality)


def named(findings: list[Finding]) -> dict[str, list[int]]:
    return {finding.issue: finding.indices.tolist() for finding in findings if len(finding.indices)}


def test_each_rule_finds_what_it_is_for(tmp_path: Path) -> None:
    good = drawn(320, 240)
    rows: list[Row] = [(f"good{i}.jpg", jpeg(picture(i)), None) for i in range(20)]
    bad = {
        "unreadable": ("cut.jpg", jpeg(good)[:3000]),
        "wrong-extension": ("png.jpg", encoded(good, "PNG")),
        "tiny": ("tiny.png", encoded(good.resize((12, 9)), "PNG")),
        "extreme-aspect": ("long.jpg", jpeg(drawn(900, 100))),
        "odd-size": ("huge.jpg", jpeg(drawn(2400, 1800))),
        "near-black": ("black.jpg", jpeg(Image.new("RGB", (320, 240), (4, 4, 6)))),
        "near-white": ("white.jpg", jpeg(Image.new("RGB", (320, 240), (252, 252, 252)))),
        "low-information": ("plain.jpg", jpeg(Image.new("RGB", (320, 240), (90, 140, 60)))),
        "blurry": ("blurry.jpg", jpeg(good.filter(ImageFilter.GaussianBlur(12)))),
        "greyscale": ("grey.jpg", jpeg(good.convert("L"))),
        "rotated": ("turned.jpg", encoded(drawn(240, 320), "JPEG", orientation=6)),
    }
    rows += [(name, data, None) for name, data in bad.values()]
    images = images_of(tmp_path, rows)
    found = named(list(rules.apply_rules(images, RulesConfig())))
    places = {issue: 20 + number for number, issue in enumerate(bad)}
    assert found.pop("odd-size") == [places["tiny"], places["odd-size"]]
    assert found.pop("tiny") == [places["tiny"]]
    assert found == {
        issue: [place] for issue, place in places.items() if issue not in ("odd-size", "tiny")
    }


def test_greyscale_is_no_issue_where_it_is_common(tmp_path: Path) -> None:
    rows: list[Row] = [(f"{i}.jpg", jpeg(picture(i).convert("L")), None) for i in range(10)]
    found = named(list(rules.apply_rules(images_of(tmp_path, rows), RulesConfig())))
    assert "greyscale" not in found


def test_copies_are_found_by_bytes_and_by_looks(tmp_path: Path) -> None:
    originals = [picture(i) for i in range(12)]
    rows: list[Row] = [(f"{i}.jpg", jpeg(image), None) for i, image in enumerate(originals)]
    rows += [("copy.jpg", jpeg(originals[0]), None)]
    rows += [
        ("resaved.jpg", jpeg(originals[1], 40), None),
        ("small.jpg", jpeg(originals[2].resize((160, 120))), None),
        ("mirrored.jpg", jpeg(ImageOps.mirror(originals[3])), None),
        ("copy of resaved.jpg", jpeg(originals[1], 40), None),
    ]
    rows += [("broken.jpg", b"\xff\xd8\xff", None), ("broken too.jpg", b"\xff\xd8\xff", None)]
    found = {
        f.issue: f
        for f in duplicates.find_duplicates(images_of(tmp_path, rows), DuplicatesConfig())
    }
    exact, near = found["exact-duplicates"], found["near-duplicates"]
    assert dict(zip(exact.indices.tolist(), exact.group.tolist(), strict=True)) == {  # type: ignore[union-attr]
        0: 0, 12: 0, 13: 13, 16: 13,
    }  # fmt: skip
    assert dict(zip(near.indices.tolist(), near.group.tolist(), strict=True)) == {  # type: ignore[union-attr]
        1: 1, 13: 1, 16: 1, 2: 2, 14: 2, 3: 3, 15: 3,
    }  # fmt: skip
    assert "1 of 3 in its group, of which the first is " in near.details[0]
    assert not len(found["leakage"].indices)
    assert not len(found["label-conflict"].indices)


def test_plain_pictures_are_no_copies_of_each_other(tmp_path: Path) -> None:
    rows: list[Row] = [
        (f"{i}.png", encoded(Image.new("RGB", (64, 64), (i, 2 * i, 90)), "PNG"), None)
        for i in range(10)
    ]
    assert (
        named(list(duplicates.find_duplicates(images_of(tmp_path, rows), DuplicatesConfig()))) == {}
    )


def test_what_another_manifest_has_too_is_a_leak(tmp_path: Path) -> None:
    train: list[Row] = [(f"a{i}.jpg", jpeg(picture(i)), "x") for i in range(8)]
    test: list[Row] = [("b0.jpg", jpeg(picture(3)), "x"), ("b1.jpg", jpeg(picture(5), 50), "y")]
    test += [("b2.jpg", jpeg(picture(20)), "x"), ("b3.jpg", jpeg(picture(20)), "x")]
    found = {
        f.issue: f
        for f in duplicates.find_duplicates(images_of(tmp_path, train, test), DuplicatesConfig())
    }
    leak = found["leakage"]
    assert leak.indices.tolist() == [3, 5]
    assert leak.details[0] == f"also in {tmp_path}/m1.csv: {tmp_path}/b0.jpg"
    # the same picture as x and as y
    assert found["label-conflict"].indices.tolist() == [5, 9]
    assert "'x', among copies labelled x, y" in found["label-conflict"].details[0]


def scene(steps: int) -> list[Image.Image]:
    """Frames of which each is like the next, and the first unlike the last."""
    first, last = picture(0), picture(1)
    return [Image.blend(first, last, step / (steps - 1)) for step in range(steps)]


def test_what_holds_a_scene_together_makes_no_leak_of_its_ends(tmp_path: Path) -> None:
    frames = [(f"{i}.jpg", jpeg(frame), "x") for i, frame in enumerate(scene(9))]
    images = images_of(tmp_path, frames[:8], [("end.jpg", frames[8][1], "y")])
    found = {f.issue: f for f in duplicates.find_duplicates(images, DuplicatesConfig())}
    assert found["near-duplicates"].indices.tolist() == list(range(9))
    leaked = found["leakage"].indices.tolist()
    assert 7 in leaked
    assert 0 not in leaked
    assert found["label-conflict"].indices.tolist() == [*leaked, 8]


def test_of_a_scene_stay_frames_that_are_not_alike(tmp_path: Path) -> None:
    frames = [(f"{i}.jpg", jpeg(frame), None) for i, frame in enumerate(scene(9))]
    images = images_of(tmp_path, frames)
    findings = list(duplicates.find_duplicates(images, DuplicatesConfig()))
    gone = find_dropped(images, findings, ["near-duplicates"])
    kept = np.flatnonzero(~gone)
    (near,) = (f for f in findings if f.issue == "near-duplicates")
    assert near.is_duplicate is not None
    assert 2 <= len(kept) < 9
    assert near.is_duplicate(kept, kept).sum() == len(kept)
    assert near.is_duplicate(np.flatnonzero(gone), kept).any(axis=1).all()


def test_images_of_few_pixels_are_copies_by_their_bytes_alone(tmp_path: Path) -> None:
    digits = load_digits().images[:200].astype(np.uint8) * 16
    rows: list[Row] = [
        (f"{i}.png", encoded(Image.fromarray(digit), "PNG"), None) for i, digit in enumerate(digits)
    ]
    found = named(
        list(duplicates.find_duplicates(images_of(tmp_path, rows, [rows[3]]), DuplicatesConfig()))
    )
    assert found == {"exact-duplicates": [3, 200], "leakage": [3]}


def test_drawings_with_symmetries_are_found_saved_again(tmp_path: Path) -> None:
    drawings = []
    for kind in ("ellipse", "rectangle", "line"):
        image = Image.new("RGB", (400, 400), "white")
        shape = getattr(ImageDraw.Draw(image), kind)
        shape((100, 140, 300, 260), fill="navy", **({"width": 40} if kind == "line" else {}))
        drawings.append(image)
    rows: list[Row] = [
        (f"{i}.png", encoded(image, "PNG"), None) for i, image in enumerate(drawings)
    ]
    rows += [
        (f"{i}.jpg", jpeg(image.resize((200, 200)), 50), None) for i, image in enumerate(drawings)
    ]
    found = {
        f.issue: f
        for f in duplicates.find_duplicates(images_of(tmp_path, rows), DuplicatesConfig())
    }
    near = found["near-duplicates"]
    assert dict(zip(near.indices.tolist(), near.group.tolist(), strict=True)) == {  # type: ignore[union-attr]
        0: 0, 1: 1, 2: 2, 3: 0, 4: 1, 5: 2,
    }  # fmt: skip


def clusters(seed: int, count: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings around a centre per class, and their classes."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, 32)) * 1.5
    label = np.arange(count) % classes
    return centres[label] + rng.standard_normal((count, 32)), label


def labelled(tmp_path: Path, vectors: np.ndarray, label: np.ndarray) -> ImageTable:
    data = jpeg(picture(0))
    rows: list[Row] = [(f"{i}.jpg", data, f"class {c}") for i, c in enumerate(label.tolist())]
    return images_of(tmp_path, rows, embeddings=vectors)


def test_flipped_labels_are_ranked_first(tmp_path: Path) -> None:
    vectors, label = clusters(0, 600)
    rng = np.random.default_rng(1)
    wrong = rng.choice(600, 30, replace=False)
    given = label.copy()
    given[wrong] = (label[wrong] + 1) % 3
    images = labelled(tmp_path, vectors, given)
    (finding, *_) = label_errors.find_label_issues(images, LabelErrorsConfig())
    assert finding.issue == "label-error"
    first = finding.indices[finding.sort_worst_first()][:60]
    assert len(set(first.tolist()) & set(wrong.tolist())) >= 27
    assert (
        finding.score[finding.sort_worst_first()][:-1]
        >= finding.score[finding.sort_worst_first()][1:]
    ).all()
    assert "looks like 'class " in finding.details[0]


def test_an_image_unlike_all_others_is_an_outlier(tmp_path: Path) -> None:
    vectors, label = clusters(0, 300)
    vectors[[7, 90]] = -20 * vectors[[7, 90]] + 50 * np.eye(32)[:2]
    found = named(
        list(
            label_errors.find_label_issues(labelled(tmp_path, vectors, label), LabelErrorsConfig())
        )
    )
    assert {7, 90} <= set(found["outlier"])
    assert len(found["outlier"]) < 10


def test_alike_to_the_model_is_similar(tmp_path: Path) -> None:
    vectors, _ = clusters(0, 400, classes=400)
    vectors[300] = 1.001 * vectors[5]
    rows: list[Row] = [(f"{i}.jpg", jpeg(picture(i)), None) for i in range(400)]
    images = images_of(tmp_path, rows, embeddings=vectors)
    found = named(list(duplicates.find_duplicates(images, DuplicatesConfig(min_cosine=0.97))))
    assert found == {"similar": [5, 300]}


def test_without_a_model_labels_are_not_judged(tmp_path: Path) -> None:
    images = images_of(tmp_path, [("a.jpg", jpeg(picture(0)), "x"), ("b.jpg", b"", "y")])
    assert list(label_errors.find_label_issues(images, LabelErrorsConfig())) == []


def test_the_table_has_the_worst_first_and_groups_together(tmp_path: Path) -> None:
    rows: list[Row] = [(f"{i}.jpg", jpeg(picture(i)), "x" if i else None) for i in range(5)]
    images = images_of(tmp_path, rows)
    findings = [
        Finding(
            "near-duplicates",
            np.array([0, 1, 2, 3]),
            np.array([0.2, 0.9, 0.3, 0.1], np.float32),
            ["a", "b", "c", "d"],
            np.array([0, 1, 0, 1]),
        )
    ]
    table = build_issue_table(images, findings)
    assert table.column("row").to_pylist() == [1, 3, 0, 2]
    assert table.column("group").to_pylist() == [1, 1, 0, 0]
    assert table.column("label").to_pylist() == ["x", "x", None, "x"]
    assert table.column("detail").to_pylist() == ["b", "d", "a", "c"]


def test_every_issue_is_explained_on_the_page() -> None:
    assert set(ISSUE_DESCRIPTIONS) == set(ISSUES)


def test_names_from_a_manifest_are_text_on_the_page(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>.jpg"
    images = images_of(tmp_path, [(name, b"nothing", "<b>x</b>")])
    findings = [f for f in rules.apply_rules(images, RulesConfig()) if len(f.indices)]
    summary = {"manifests": [{"manifest": "<i>m</i>", "rows": 1}]}
    sections = [build_section(images, each, 24) for each in findings]
    page = render_check_report(images, findings, summary, sections)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;.jpg" in page
    assert "<i>m</i>" not in page


def test_facts_and_columns_have_the_same_names() -> None:
    names = {field.name for field in scan_schema(None)} - {"row", "status", "error", "bytes"}
    assert names == set(ImageFeatures.__dataclass_fields__)


@pytest.mark.parametrize("issue", ISSUES)
def test_issues_can_be_named_where_rows_are_dropped(issue: str) -> None:
    config = configuration.build(
        CheckConfig, {"manifest": "m.csv", "output": "o", "drop": f"tiny,{issue}"}
    )
    assert config.drop == ["tiny", issue]


def test_the_only_image_of_a_class_is_not_judged(tmp_path: Path) -> None:
    vectors, label = clusters(0, 90)
    label = label.copy()
    label[5] = 3
    found = list(
        label_errors.find_label_issues(labelled(tmp_path, vectors, label), LabelErrorsConfig())
    )
    assert 5 not in found[0].indices


def test_every_pair_that_is_alike_is_found_in_a_crowd(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((8, 64))
    vectors = (centres[np.arange(400) % 8] + 0.33 * rng.standard_normal((400, 64))) * 3
    vectors[200:220] = vectors[:20] + 0.05 * rng.standard_normal((20, 64))
    rows: list[Row] = [(f"{i}.jpg", jpeg(picture(i)), None) for i in range(400)]
    images = images_of(tmp_path, rows, embeddings=vectors)
    (finding,) = [
        f
        for f in duplicates.find_duplicates(images, DuplicatesConfig(min_cosine=0.99))
        if len(f.indices)
    ]
    groups = dict(zip(finding.indices.tolist(), finding.group.tolist(), strict=True))  # type: ignore[union-attr]
    together = [groups.get(i) == groups.get(200 + i) is not None for i in range(20)]
    assert sum(together) >= 18


@pytest.mark.parametrize(("cosine", "wanted"), [(0.955, 0.9), (0.97, 0.95), (0.99, 0.99)])
def test_pairs_near_the_limit_are_found_whatever_all_have_in_common(
    cosine: float, wanted: float
) -> None:
    rng = np.random.default_rng(0)
    common = np.zeros(256)
    common[0] = 1
    own = rng.standard_normal((2000, 256))
    own[:, 0] = 0
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    apart = rng.standard_normal((2000, 256))
    apart[:, 0] = 0
    apart -= (apart * own).sum(axis=1, keepdims=True) * own
    apart /= np.linalg.norm(apart, axis=1, keepdims=True)
    turn = np.arccos(2 * cosine - 1)  # half of the length is common to all
    vectors = np.concatenate([common + own, common + np.cos(turn) * own + np.sin(turn) * apart])
    found = find_similar_pairs(normalize_embeddings(vectors), DuplicatesConfig(min_cosine=0.95))
    told = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert len(told & {(i, 2000 + i) for i in range(2000)}) >= wanted * 2000


def test_classes_with_few_images_are_learnt_from_whole() -> None:
    label = np.repeat([0, 1, 2], [5000, 5000, 7])
    taken = _sample_per_class(np.arange(len(label)), label, 1000, np.random.default_rng(0))
    assert np.bincount(label[taken]).tolist() == [499, 499, 7]
    assert len(np.unique(taken)) == len(taken)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"fail_on": "leakage"}, "pass --against"),
        ({"drop": "leakage"}, "pass --against"),
        ({"fail_on": "label-error"}, "pass --model BUNDLE"),
        ({"drop": "similar"}, "pass --model BUNDLE"),
    ],
)
def test_a_gate_that_could_not_see_is_refused(
    tmp_path: Path, asked: dict[str, str], words: str
) -> None:
    write_manifest(tmp_path / "m.csv", [("a.jpg",)], ("path",))
    with pytest.raises(ConfigError, match=words):
        check(manifest=str(tmp_path / "m.csv"), output=str(tmp_path / "out"), **asked)
    assert not (tmp_path / "out").exists()


def test_starting_over_removes_nothing_that_is_to_be_read(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_table(str(out / "clean.parquet"), pa.table({"path": ["a.jpg"]}))
    with pytest.raises(OutputError, match=r"would remove .*clean\.parquet"):
        check(manifest=str(out / "clean.parquet"), output=str(out), overwrite=True)
    assert (out / "clean.parquet").exists()
    (out / "clean.parquet").rename(out / "manifest.parquet")
    with pytest.raises(OutputError, match=r"would remove .*manifest\.parquet"):
        describe(source=str(out), output=str(out), contents=True, overwrite=True)
    assert (out / "manifest.parquet").exists()


def describe(**settings: object) -> int:
    return build.build_manifest(configuration.build(ManifestBuildConfig, settings))


def test_columns_of_the_users_own_are_not_replaced_by_facts(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    write_manifest(table, [("a.jpg", "sold")], ("path", "status"))
    with pytest.raises(ManifestError, match="has a column 'status', which --contents writes"):
        describe(source=str(table), output=str(tmp_path / "out"), contents=True)
    with pytest.raises(ManifestError, match="has a column 'status', which --contents writes"):
        describe(
            source=str(table), label_column="status", output=str(tmp_path / "out"), contents=True
        )


def test_labels_are_not_promised_where_there_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "a.jpg").write_bytes(jpeg(picture(0)))
    with pytest.raises(ConfigError, match="is not a folder with one folder per class"):
        describe(source=f"{tmp_path}/*/*.jpg", labels=True, output=str(tmp_path / "out"))


def test_labels_of_another_manifest_may_stand_in_another_column(tmp_path: Path) -> None:
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


def test_a_name_in_a_bucket_may_have_any_sign_in_it(tmp_path: Path) -> None:
    images = images_of(tmp_path, [("s3://b/cat #1?.png", jpeg(picture(0)), None)])
    assert named(list(rules.apply_rules(images, RulesConfig())))["wrong-extension"] == [0]


def test_large_files_and_large_classes_are_described(tmp_path: Path) -> None:
    rows: list[Row] = [(f"{i}.jpg", jpeg(picture(i)), f"c{i % 3}") for i in range(9)]
    images = images_of(tmp_path, rows)
    place = images.features.schema.get_field_index("bytes")
    sizes = pa.array([20_000_001] + [None] + [10] * 7, pa.int64())
    images = replace(images, features=images.features.set_column(place, "bytes", sizes))
    found = stats.summarize_images(images)
    assert found["total_bytes"] == 20_000_071
    shown = stats.render_stats_page(images, found, sheet_images=2, max_sheets=2, seed=0)
    assert shown.count("<li>") == 4
    assert "1 more classes are not shown" in shown


@pytest.mark.parametrize("drop", [["tiny", "near-duplicates"], ["near-duplicates", "tiny"]])
def test_of_copies_one_stays_that_has_nothing_else_wrong(tmp_path: Path, drop: list[Issue]) -> None:
    images = images_of(tmp_path, [(f"{i}.jpg", jpeg(picture(i)), None) for i in range(4)])
    one = np.ones(3, np.float32)
    findings = [
        Finding("near-duplicates", np.array([0, 1, 2]), one, ["", "", ""], np.array([0, 0, 0])),
        Finding("tiny", np.array([0]), one[:1], [""]),
    ]
    assert np.flatnonzero(find_dropped(images, findings, drop)).tolist() == [0, 2]


@pytest.mark.parametrize(("small", "tiny"), [(1, [0]), (6, [])])
def test_what_is_tiny_is_no_issue_in_a_set_of_tiny_images(
    tmp_path: Path, small: int, tiny: list[int]
) -> None:
    pictures = [
        picture(i).resize((8, 8) if i < small else (64, 48), Image.Resampling.BILINEAR)
        for i in range(7)
    ]
    files = [(f"{i}.png", encoded(each, "PNG"), None) for i, each in enumerate(pictures)]
    (found,) = (
        each
        for each in rules.apply_rules(images_of(tmp_path, files), RulesConfig())
        if each.issue == "tiny"
    )
    assert found.indices.tolist() == tiny
