"""Labels come back from each tool to the rows of the manifest, none lost and none made up."""

from __future__ import annotations

import datetime
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.cli import main
from imgcls.curation.import_labels import import_labels
from imgcls.curation.label_history import HISTORY_FILE
from imgcls.data.annotations import cvat
from imgcls.errors import ConfigError, ManifestError, OutputError, RequestError
from imgcls.evaluation.select import select
from tests.curation.label_imports import merge, read_labels, write_labels, write_manifest
from tests.data.annotations.filled import (
    TIME,
    Labels,
    fill_csv,
    fill_cvat,
    fill_fiftyone,
    fill_label_studio,
    fill_label_studio_min,
)
from tests.evaluation.multilabel_runs import build_run_table, commit_multilabel, draw_scores
from tests.evaluation.multilabel_runs import draw_targets as draw_label_sets
from tests.evaluation.runs import CLASSES, commit, drawn

COUNT = 24
LABELED_AT = datetime.datetime.fromisoformat(TIME)

Fill = Callable[[Path, Labels], Path]
TOOLS: dict[str, tuple[str, Callable[[bool], Fill]]] = {
    "label-studio": ("label-studio", lambda several: fill_label_studio),
    "label-studio-min": ("label-studio", lambda several: fill_label_studio_min),
    "cvat": ("cvat", lambda several: fill_cvat),
    "cvat-zip": ("cvat", lambda several: lambda folder, labels: fill_cvat(
        folder, labels, archived=True
    )),
    "fiftyone": ("fiftyone", lambda several: lambda folder, labels: fill_fiftyone(
        folder, labels, several=several
    )),
    "csv": ("csv", lambda several: lambda folder, labels: fill_csv(
        folder, labels, several=several
    )),
}  # fmt: skip


def choose(tmp_path: Path, tool: str, *, several: bool = False) -> tuple[Path, list[str]]:
    """The folder of a selection with tasks for a tool, and the selected paths."""
    if several:
        targets = draw_label_sets(60)
        table = build_run_table(targets, draw_scores(targets), labels=None)
        run = commit_multilabel(tmp_path / "run", table, labels=None)
    else:
        table = drawn(60).drop_columns(["label"])
        run = commit(tmp_path / "run", table, label_column=None)
    vectors = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 8)
    part = run / "predictions" / "part-00000.parquet"
    pq.write_table(table.append_column("embedding", flat), part)
    found = select(
        run=str(run), output=str(tmp_path / "next"), count=COUNT, format=tool, max_similarity=1.0
    )
    return tmp_path / "next", found.rows["path"].to_pylist()


@pytest.mark.parametrize("tool", TOOLS)
def test_every_label_comes_back_from_the_tool(tmp_path: Path, tool: str) -> None:
    format, get_fill = TOOLS[tool]
    folder, paths = choose(tmp_path, format)
    labels: Labels = {
        path: None if number % 7 == 6 else [CLASSES[number % 5]]
        for number, path in enumerate(paths)
    }
    before: dict[str, Any] = {f"/elsewhere/{name}.jpg": name for name in CLASSES}
    before |= dict.fromkeys(paths[:8], "ant")
    onto = write_manifest(tmp_path, before)
    export = get_fill(False)(folder, labels)
    done = merge(tmp_path, export, onto, images=str(folder / "manifest.parquet"))
    expected = before | {path: names[0] for path, names in labels.items() if names is not None}
    assert read_labels(tmp_path) == expected
    assert done.labeled == 0
    assert done.replaced + done.confirmed + done.added == sum(
        v is not None for v in labels.values()
    )


@pytest.mark.parametrize("tool", TOOLS)
def test_every_list_of_labels_comes_back_from_the_tool(tmp_path: Path, tool: str) -> None:
    format, get_fill = TOOLS[tool]
    folder, paths = choose(tmp_path, format, several=True)
    rng = np.random.default_rng(3)
    labels: dict[str, Sequence[str] | None] = {
        path: [name for name in CLASSES if rng.random() < 0.4] for path in paths
    }
    labels[paths[0]] = None
    before: dict[str, Any] = {"/elsewhere/x.jpg": list(CLASSES), "/elsewhere/y.jpg": None}
    before |= {path: ["eel"] for path in paths[:6]}
    onto = write_manifest(tmp_path, before)
    merge(
        tmp_path, get_fill(True)(folder, labels), onto, images=str(folder / "manifest.parquet")
    )  # fmt: skip
    expected = dict(before)
    for path, names in labels.items():
        # these tools export an image without a class like one without a label
        if names is not None and (names or not tool.startswith(("cvat", "fiftyone"))):
            expected[path] = sorted(names)
    found = read_labels(tmp_path)
    assert {p: None if v is None else sorted(v) for p, v in found.items()} == expected


def test_who_labeled_an_image_and_when_is_kept(tmp_path: Path) -> None:
    folder, paths = choose(tmp_path, "label-studio")
    export = fill_label_studio(folder, {paths[0]: ["bee"]})
    onto = write_manifest(tmp_path, {"/a.jpg": "ant", "/b.jpg": "bee"})
    merge(tmp_path, export, onto)
    *_, row = pq.read_table(tmp_path / "out" / "new.parquet").to_pylist()
    assert row == {
        "path": paths[0], "label": "bee", "labeled_by": "ann@example.com",
        "labeled_at": LABELED_AT, "label_source": "label-studio",
    }  # fmt: skip


def test_the_same_export_twice_changes_nothing(tmp_path: Path) -> None:
    labels = [
        ("/a.jpg", "dog", "ann", 1),
        ("/b.jpg", None, "ann", 2),
        ("/c.jpg", "dog", None, None),
    ]
    export = write_labels(tmp_path, labels)
    onto = write_manifest(tmp_path, {"/a.jpg": "cat", "/b.jpg": "cat", "/d.jpg": "dog"})
    first = merge(tmp_path, export, onto)
    manifest = Path(first.output).read_bytes()
    history = Path(first.history).read_bytes()
    merge(tmp_path, export, onto, overwrite=True)  # as after a kill
    assert Path(first.output).read_bytes() == manifest
    assert Path(first.history).read_bytes() == history
    again = merge(tmp_path, export, Path(first.output), output=tmp_path / "out" / "again.parquet")
    assert pq.read_table(again.output).equals(pq.read_table(first.output))
    assert Path(again.history).read_bytes() == history
    assert (again.labeled, again.replaced, again.added, again.confirmed) == (0, 0, 0, 2)


def test_the_history_has_every_annotation_and_the_label_before(tmp_path: Path) -> None:
    onto = write_manifest(tmp_path, {"/a.jpg": "cat", "/b.jpg": "dog", "/c.jpg": "cat"})
    export = write_labels(tmp_path, [("/a.jpg", "dog", "ann", 1), ("/b.jpg", None, "bob", 2)])
    first = merge(tmp_path, export, onto)
    assert Path(first.history).name == HISTORY_FILE
    export = write_labels(tmp_path, [("/a.jpg", "cat", "bob", 3)])
    merge(tmp_path, export, Path(first.output), output=tmp_path / "out" / "second.parquet")
    rows = pq.read_table(first.history).to_pylist()
    names = ("path", "label", "annotator", "previous_label", "used")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("/a.jpg", "dog", "ann", "cat", True),
        ("/b.jpg", None, "bob", "dog", False),
        ("/a.jpg", "cat", "bob", "dog", True),
    ]
    (minute,) = {row["labeled_at"].minute for row in rows if row["annotator"] == "ann"}
    assert minute == 1


CONFLICT = [
    ("/a.jpg", "cat", "ann", 3), ("/a.jpg", "dog", "bob", 1), ("/a.jpg", "dog", "carl", 2),
    ("/b.jpg", "cat", "ann", 1), ("/b.jpg", "dog", "bob", 1),
    ("/c.jpg", "cat", "ann", 1), ("/c.jpg", "cat", "bob", 2),
]  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("majority", {"/a.jpg": "dog", "/b.jpg": None, "/c.jpg": "cat"}),
        ("newest", {"/a.jpg": "cat", "/b.jpg": None, "/c.jpg": "cat"}),
        ("skip", {"/a.jpg": None, "/b.jpg": None, "/c.jpg": "cat"}),
    ],
)
def test_a_policy_decides_where_annotators_disagree(
    tmp_path: Path, policy: str, expected: dict[str, str | None]
) -> None:
    onto = write_manifest(
        tmp_path, {"/a.jpg": None, "/b.jpg": None, "/x.jpg": "cat", "/y.jpg": "dog"}
    )
    export = write_labels(tmp_path, CONFLICT)
    done = merge(tmp_path, export, onto, on_conflict=policy)
    found = read_labels(tmp_path)
    assert {path: found[path] for path in expected} == expected
    assert (done.conflicts, done.undecided) == (2, sum(v is None for v in expected.values()))
    assert pq.read_table(done.history).num_rows == len(CONFLICT)


def test_a_disagreement_is_listed_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onto = write_manifest(tmp_path, {"/a.jpg": "cat", "/x.jpg": "dog"})
    export = write_labels(tmp_path, CONFLICT)
    output = tmp_path / "out" / "new.parquet"
    code = main(["labels", "import", str(export), "--onto", str(onto), "--output", str(output)])
    assert code == 2
    error = capsys.readouterr().err
    assert "disagree about 2 images" in error
    assert "/b.jpg: cat (ann), dog (bob)" in error
    assert not output.parent.exists()


def test_the_last_decision_of_an_annotator_counts(tmp_path: Path) -> None:
    onto = write_manifest(tmp_path, {"/a.jpg": None, "/b.jpg": "dog", "/c.jpg": "cat"})
    rows = [
        ("/a.jpg", "cat", "ann", 1), ("/a.jpg", "dog", "ann", 2),
        ("/b.jpg", "cat", "ann", 1), ("/b.jpg", None, "ann", 2),
    ]  # fmt: skip
    done = merge(tmp_path, write_labels(tmp_path, rows), onto)
    assert read_labels(tmp_path) == {"/a.jpg": "dog", "/b.jpg": "dog", "/c.jpg": "cat"}
    assert done.conflicts == 0


def test_the_agreement_of_two_annotators_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [("cat", "cat"), ("cat", "cat"), ("dog", "dog"), ("cat", "dog")]
    rows = [
        (f"/{number}.jpg", name, person, number)
        for number, pair in enumerate(names)
        for name, person in zip(pair, ("ann", "bob"), strict=True)
    ]
    onto = write_manifest(tmp_path, {"/x.jpg": "cat", "/y.jpg": "dog"})
    export, output = write_labels(tmp_path, rows), tmp_path / "out" / "new.parquet"
    command = ["labels", "import", str(export), "--onto", str(onto), "--output", str(output)]
    assert main([*command, "--on-conflict", "skip"]) == 0
    shown = capsys.readouterr().out
    # by hand: agreement 3/4, by chance 3/4 * 2/4 + 1/4 * 2/4
    assert "75.0% of 4 images" in shown
    assert "Cohen's kappa 0.500" in shown
    # by hand: observed 1/4, expected 2 * 5 * 3 / (8 * 7)
    assert "Krippendorff's alpha 0.533" in shown


@pytest.mark.parametrize(("existing", "label"), [("replace", "dog"), ("keep", "cat")])
def test_a_label_that_contradicts_the_manifest_is_counted(
    tmp_path: Path, existing: str, label: str
) -> None:
    onto = write_manifest(tmp_path, {"/a.jpg": "cat", "/b.jpg": "dog"})
    rows = [("/a.jpg", "dog", "ann", 1), ("/b.jpg", "dog", "ann", 1), ("/c.jpg", "cat", "ann", 1)]
    done = merge(tmp_path, write_labels(tmp_path, rows), onto, existing=existing)
    assert read_labels(tmp_path)["/a.jpg"] == label
    assert (done.replaced, done.kept) == ((1, 0) if existing == "replace" else (0, 1))
    assert (done.confirmed, done.added) == (1, 1)
    first = pq.read_table(done.history).to_pylist()[0]
    assert (first["previous_label"], first["used"]) == ("cat", existing == "replace")


def test_an_unknown_class_is_refused_unless_it_is_new(tmp_path: Path) -> None:
    onto = write_manifest(tmp_path, {"/a.jpg": "cat", "/b.jpg": "dog"})
    export = write_labels(tmp_path, [("/a.jpg", "Dog", "ann", 1)])
    with pytest.raises(RequestError, match=r"class 'Dog' \(1 image\).*did you mean 'dog'\?"):
        merge(tmp_path, export, onto)
    merge(tmp_path, export, onto, new_classes=True)
    assert read_labels(tmp_path)["/a.jpg"] == "Dog"


def test_a_manifest_without_labels_takes_all_classes(tmp_path: Path) -> None:
    onto = tmp_path / "train.csv"
    onto.write_text("path,camera\na.jpg,3\nb.jpg,4\n")
    export = write_labels(tmp_path, [(f"{tmp_path}/a.jpg", "cat", "ann", 1)])
    merge(tmp_path, export, onto)
    assert read_labels(tmp_path) == {f"{tmp_path}/a.jpg": "cat", f"{tmp_path}/b.jpg": None}
    several = write_labels(
        tmp_path, [(f"{tmp_path}/a.jpg", ["dog", "cat"], "ann", 1)], several=True
    )
    with pytest.raises(RequestError, match="2 labels"):
        merge(tmp_path, several, onto, overwrite=True)
    merge(tmp_path, several, onto, multilabel=True, output=tmp_path / "lists" / "new.parquet")
    table = pq.read_table(tmp_path / "lists" / "new.parquet")
    assert table["label"].to_pylist() == [["cat", "dog"], None]


def test_labels_in_a_column_per_class_stay_there(tmp_path: Path) -> None:
    onto = tmp_path / "train.csv"
    onto.write_text("path,cat,dog\n/a.jpg,1,0\n/b.jpg,,1\n")
    rows = [("/b.jpg", ["cat"], "ann", 1), ("/c.jpg", ["cat", "dog"], "ann", 1)]
    export = write_labels(tmp_path, rows, several=True)
    config = {"path": str(onto), "label_columns": "cat,dog"}
    import_labels(export=export, onto=config, output=tmp_path / "out" / "new.parquet")
    table = pq.read_table(tmp_path / "out" / "new.parquet")
    assert table["cat"].to_pylist() == ["1", "1", "1"]
    assert table["dog"].to_pylist() == ["0", "0", "1"]


@pytest.mark.parametrize(
    ("kind", "convert"),
    [
        (pa.decimal128(1, 0), Decimal),
        (pa.decimal128(5, 2), Decimal),
        (pa.bool_(), bool),
        (pa.int8(), int),
    ],
)
def test_class_columns_keep_their_type(
    tmp_path: Path, kind: pa.DataType, convert: Callable[[int], Any]
) -> None:
    columns = {
        "cat": pa.array([convert(1), None], kind),
        "dog": pa.array([convert(0), convert(1)], kind),
    }
    onto = tmp_path / "train.parquet"
    pq.write_table(pa.table({"path": ["/a.jpg", "/b.jpg"], **columns}), onto)
    export = write_labels(tmp_path, [("/b.jpg", ["cat"], "ann", 1)], several=True)
    config = {"path": str(onto), "label_columns": "cat,dog"}
    import_labels(export=export, onto=config, output=tmp_path / "out" / "new.parquet")
    table = pq.read_table(tmp_path / "out" / "new.parquet")
    assert (table["cat"].type, table["dog"].type) == (kind, kind)
    assert [table["cat"].to_pylist(), table["dog"].to_pylist()] == [[1, 1], [0, 0]]


def test_a_label_column_without_names_is_refused_by_its_option(tmp_path: Path) -> None:
    onto = tmp_path / "train.parquet"
    pq.write_table(pa.table({"path": ["/a.jpg"], "label": [{"name": "cat"}]}), onto)
    export = write_labels(tmp_path, [("/a.jpg", "cat", "ann", 1)])
    with pytest.raises(ManifestError, match=r"name another --onto\.label-column"):
        merge(tmp_path, export, onto)


def test_labels_with_a_separator_stay_text(tmp_path: Path) -> None:
    onto = tmp_path / "train.csv"
    onto.write_text("path,label\n/a.jpg,cat;dog\n/b.jpg,dog\n")
    export = write_labels(tmp_path, [("/b.jpg", ["dog", "cat"], "a", 1), ("/a.jpg", [], "a", 2)],
                          several=True)  # fmt: skip
    config = {"path": str(onto), "label_delimiter": ";"}
    import_labels(export=export, onto=config, output=tmp_path / "out" / "new.parquet")
    assert read_labels(tmp_path) == {"/a.jpg": ";", "/b.jpg": "cat;dog"}


def test_added_images_have_the_columns_of_the_selection(tmp_path: Path) -> None:
    folder, paths = choose(tmp_path, "csv")
    cameras = pq.read_table(folder / "manifest.parquet")["camera"].to_pylist()
    onto = write_manifest(
        tmp_path, {"/a.jpg": "ant", "/b.jpg": "bee"}, camera=["old", "old"], patient=[1, 2]
    )
    export = fill_csv(folder, {path: ["ant"] for path in paths}, several=False)
    merge(tmp_path, export, onto, images=str(folder / "manifest.parquet"))
    table = pq.read_table(tmp_path / "out" / "new.parquet")
    assert table["camera"].to_pylist() == ["old", "old", *cameras]
    assert table["patient"].to_pylist() == [1, 2, *[None] * COUNT]


def test_unchanged_predictions_can_be_left_out(tmp_path: Path) -> None:
    folder, paths = choose(tmp_path, "cvat")
    onto = write_manifest(tmp_path, dict.fromkeys(CLASSES) | dict.fromkeys(["/a.jpg"], "ant"))
    text = (folder / "cvat.xml").read_text()
    (folder / "export.xml").write_text(text.replace('source="auto"', 'source="manual"', 2))
    options = {"images": str(folder / "manifest.parquet"), "new_classes": True}
    every = merge(tmp_path, folder / "export.xml", onto, **options)
    assert every.added == len(paths)
    two = merge(
        tmp_path, folder / "export.xml", onto, skip_unchanged=True, overwrite=True, **options
    )
    assert two.added == 2


def test_an_output_that_exists_or_is_in_the_manifest_is_refused(tmp_path: Path) -> None:
    onto = write_manifest(tmp_path, {"/a.jpg": "cat"})
    export = write_labels(tmp_path, [("/a.jpg", "cat", "ann", 1)])
    merge(tmp_path, export, onto)
    with pytest.raises(OutputError, match="--overwrite"):
        merge(tmp_path, export, onto)
    with pytest.raises(ConfigError, match="must be a Parquet file"):
        merge(tmp_path, export, onto, output=tmp_path / "new.csv")
    folder = tmp_path / "shards"
    folder.mkdir()
    onto.rename(folder / "a.parquet")
    with pytest.raises(OutputError, match="twice"):
        merge(tmp_path, export, folder, output=folder / "b.parquet")


def test_a_column_of_another_meaning_is_refused(tmp_path: Path) -> None:
    onto = write_manifest(tmp_path, {"/a.jpg": "cat"}, labeled_at=pa.array([["x"]]))
    export = write_labels(tmp_path, [("/a.jpg", "cat", "ann", 1)])
    with pytest.raises(ManifestError, match="'labeled_at' of the type"):
        merge(tmp_path, export, onto)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_labels_tables_is_one_export(tmp_path: Path) -> None:
    folder = tmp_path / "labeled"
    folder.mkdir()
    for number, path in enumerate(("/a.jpg", "/b.jpg")):
        export = write_labels(tmp_path, [(path, "cat", "ann", number)])
        export.rename(folder / f"{number}.parquet")
    onto = write_manifest(tmp_path, {"/a.jpg": "cat", "/b.jpg": "dog"})
    done = merge(tmp_path, folder, onto)
    assert (done.confirmed, done.replaced) == (1, 1)


def damage_archive(compression: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("annotations.xml", "<annotations>" + "<image name='a.jpg'/>" * 2000)
    data = bytearray(stream.getvalue())
    data[60:120] = b"\xa5" * 60
    return bytes(data)


def damage_page() -> bytes:
    stream = io.BytesIO()
    paths = [f"/{number}.jpg" for number in range(2000)]
    pq.write_table(pa.table({"path": paths, "label": paths}), stream)
    data = bytearray(stream.getvalue())
    data[40:400] = b"\xa5" * 360
    return bytes(data)


def build_table(**columns: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"path": ["/a.jpg"], "label": ["cat"], **columns}), stream)
    return stream.getvalue()


BAD: dict[str, tuple[str | bytes, str]] = {
    "truncated.json": ('[{"id": 1, "annotations": [', "damaged JSON"),
    "deep.json": ("[" * 200_000, "damaged JSON"),
    "tasks.json": ('[{"data": {"image": "a.jpg", "path": "/a.jpg"}}]', "not the tasks"),
    "coco.json": ('{"images": [], "annotations": [], "categories": []}', "no object 'labels'"),
    "numbers.json": ("[1, 2]", "no task of Label Studio"),
    "unlabeled.json": ('[{"data": {"path": "/a.jpg"}, "annotations": []}]', "has no label"),
    "nopath.json": ('[{"data": {}, "annotations": [{"result": []}]}]', "neither 'path' nor"),
    "time.json": (
        '[{"data": {"path": "/a.jpg"}, "annotations": [{"result": [], "updated_at": "today"}]}]',
        "'today' is no time",
    ),
    "choices.json": (
        '[{"data": {"path": "/a.jpg"}, "annotations": [{"result": [{"type": "choices", '
        '"from_name": "label", "value": {"choices": [3]}}]}]}]',
        "3 is no class name",
    ),
    "bomb.xml": (
        '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]>'
        '<annotations><image name="&b;"/></annotations>',
        "document type",
    ),
    "cut.xml": ('<annotations><image id="0" name="a.jpg"><tag lab', "damaged XML"),
    "voc.xml": ("<annotation><object/></annotation>", "root <annotation>"),
    "boxes.xml": (
        '<annotations><image name="a.jpg"><box label="cat"/></image></annotations>',
        "shapes",
    ),
    "video.xml": ("<annotations><track/></annotations>", "video"),
    "bad.zip": (b"PK\x03\x04" + bytes(200), "damaged ZIP"),
    "bad.parquet": (b"PAR1" + bytes(200), "damaged Parquet"),
    "empty.csv": ("", "is empty"),
    "other.csv": ("path,klass\n/a.jpg,cat\n", "no column 'label'"),
    "labels.json": ('{"classes": ["cat"], "labels": {"a": 7}}', "the label 7"),
    "latin.csv": ("path,label\n/a.jpg,K\u00e4se\n".encode("latin-1"), "save it as CSV UTF-8"),
    "wide.csv": ("path,label\n/a.jpg,cat\n".encode("utf-16-le"), "mark; save it as CSV UTF-8"),
    "quote.csv": ('path,label\n"/a.jpg,cat\n', "/a.jpg,cat'; save it as CSV UTF-8"),
    "bz2.zip": (damage_archive(zipfile.ZIP_BZIP2), "damaged ZIP"),
    "lzma.zip": (damage_archive(zipfile.ZIP_LZMA), "damaged ZIP"),
    "encoding.xml": ('<?xml version="1.0" encoding="klingon"?><annotations/>', "damaged XML"),
    "number.json": ('[{"annotations": 5, "data": {}}]', "no list 'annotations'"),
    "result.json": ('[{"data": {"path": "/a.jpg"}, "annotations": [{"result": 5}]}]', "no list"),
    "null.json": (
        '[{"annotation_id": 1, "path": "/a.jpg", "label": {"choices": null}}]',
        "no list 'choices'",
    ),
    "year.csv": (
        "path,label,labeled_at\n/a.jpg,cat,0001-01-01T00:00:00+05:00\n",
        "+05:00' is no time",
    ),
    "host.json": (
        '[{"data": {"image": "http://[bad"}, "annotations": [{"result": []}]}]',
        "task 0: the image 'http://[bad' is not a valid URL",
    ),
    "surrogate.json": (
        '[{"annotation_id": 1, "path": "/a.jpg", "label": "\\ud800"}]',
        "task 0: '\\ud800' is no class name",
    ),
    "surrogates.json": (
        '[{"annotation_id": 1, "path": "/\\udfff.jpg", "label": "cat"}]',
        "'/\\udfff.jpg' is no valid Unicode text",
    ),
    "annotator.parquet": (build_table(annotator=[3]), "row 0: annotator 3 is not text"),
    "tool.parquet": (build_table(tool=[3]), "row 0: tool 3 is not text"),
    "page.parquet": (damage_page(), "damaged Parquet"),
    "blank.csv": ("path,label\n/a.jpg,\n", "has no label"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_export_is_refused_with_its_fault(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = BAD[name]
    export, output = tmp_path / name, tmp_path / "out" / "new.parquet"
    export.write_bytes(content if isinstance(content, bytes) else content.encode())
    onto = write_manifest(tmp_path, {"/a.jpg": "cat"})
    code = main(["labels", "import", str(export), "--onto", str(onto), "--output", str(output)])
    error = capsys.readouterr().err
    assert (code, message in error, name in error) == (2, True, True), error
    assert not output.parent.exists()


def test_a_small_archive_cannot_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cvat, "MIN_LIMIT_BYTES", 1 << 20)
    export = tmp_path / "bomb.zip"
    with zipfile.ZipFile(export, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("annotations.xml", "<annotations>" + " " * (cvat.MIN_LIMIT_BYTES + 1))
    onto = write_manifest(tmp_path, {"/a.jpg": "cat"})
    with pytest.raises(RequestError, match="compressed more than 100 times"):
        merge(tmp_path, export, onto)


def test_a_missing_export_is_named(tmp_path: Path) -> None:
    onto = write_manifest(tmp_path, {"/a.jpg": "cat"})
    with pytest.raises(RequestError, match=r"gone\.json"):
        merge(tmp_path, tmp_path / "gone.json", onto)


def test_annotations_of_a_person_without_a_name_are_kept(tmp_path: Path) -> None:
    tasks = [
        {
            "data": {"path": "/a.jpg"},
            "annotations": [
                {"completed_by": 4, "result": [], "was_cancelled": True},
                {"completed_by": 5, "result": [
                    {"type": "choices", "from_name": "kind", "value": {"choices": ["cat"]}}
                ]},
            ],
        }
    ]  # fmt: skip
    export = tmp_path / "export.json"
    export.write_text(json.dumps(tasks))
    onto = write_manifest(tmp_path, {"/a.jpg": None, "/b.jpg": "cat"})
    merge(tmp_path, export, onto)
    table = pq.read_table(tmp_path / "out" / "new.parquet")
    assert table["labeled_by"].to_pylist() == ["user 5", None]
