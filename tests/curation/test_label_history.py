"""The history has every label that was written, and none that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.curation import label_history
from imgcls.curation.import_labels import import_labels
from imgcls.errors import ConfigError, ManifestError, OutputError, OutputLocked
from tests.curation.label_imports import merge, read_labels, write_labels, write_manifest
from tests.s3 import BUCKET, keys

CONFLICT = [("/a.jpg", "dog", "ann", 1), ("/a.jpg", "cat", "bob", 2)]


def read_rows(folder: Path) -> list[tuple[Any, ...]]:
    rows = pq.read_table(folder / label_history.HISTORY_FILE).to_pylist()
    names = ("path", "label", "annotator", "previous_label", "used")
    return [tuple(row[name] for name in names) for row in rows]


def test_a_label_that_returns_is_a_new_row(tmp_path: Path) -> None:
    onto = write_manifest(tmp_path, {"/a.jpg": "cat", "/b.jpg": "dog", "/z.jpg": "cat"})
    for number, (label, person) in enumerate((("dog", "ann"), ("cat", "bob"), ("dog", "ann"))):
        export = write_labels(tmp_path, [("/a.jpg", label, person, 1)])
        onto = Path(merge(tmp_path, export, onto, output=tmp_path / f"out/{number}.parquet").output)
    assert read_rows(tmp_path / "out") == [
        ("/a.jpg", "dog", "ann", "cat", True),
        ("/a.jpg", "cat", "bob", "dog", True),
        ("/a.jpg", "dog", "ann", "cat", True),
    ]


def test_a_label_that_fills_one_row_of_an_image_was_written(tmp_path: Path) -> None:
    onto = tmp_path / "train.csv"
    onto.write_text("path,label\n/a.jpg,cat\n/a.jpg,\n/b.jpg,dog\n")
    export = write_labels(tmp_path, [("/a.jpg", "dog", "ann", 1)])
    merge(tmp_path, export, onto, existing="keep")
    table = pq.read_table(tmp_path / "out" / "new.parquet")
    assert table["label"].to_pylist() == ["cat", "dog", "dog"]
    assert read_rows(tmp_path / "out") == [("/a.jpg", "dog", "ann", "cat", True)]


def test_the_history_of_other_images_is_not_read_into_python() -> None:
    count = 20_000
    schema = label_history.build_history_schema(several=False)
    rows = {
        "path": [f"/photos/{number}.jpg" for number in range(count)], "label": ["cat"] * count,
        "annotator": ["ann"] * count, "labeled_at": [None] * count, "tool": ["cvat"] * count,
        "previous_label": [None] * count, "used": [True] * count,
    }  # fmt: skip
    history = pa.table(rows, schema)
    row = history.slice(5, 1).to_pylist()[0]
    tracemalloc.start()
    extended = label_history.extend_history(history, [row, row | {"path": "/new.jpg"}])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert extended.num_rows == count + 1
    assert peak < 50 * count  # bytes; the rows as dictionaries need 500 each


KILLED = """
import os, signal, sys
from imgcls.curation import import_labels as module
original = module.{name}
def kill(*arguments):
    if {is_after}:
        original(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
module.{name} = kill
module.import_labels(export=sys.argv[1], onto=sys.argv[2], output=sys.argv[3], on_conflict="newest")
"""


def run_killed(export: Path, onto: Path, output: Path, name: str, *, is_after: bool) -> None:
    script = KILLED.format(name=name, is_after=is_after)
    command = [sys.executable, "-c", script, str(export), str(onto), str(output)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL


def test_a_kill_before_the_manifest_is_published_leaves_no_history(tmp_path: Path) -> None:
    onto = write_manifest(tmp_path, {"/a.jpg": "cat", "/b.jpg": "dog"})
    export, output = write_labels(tmp_path, CONFLICT), tmp_path / "out" / "new.parquet"
    run_killed(export, onto, output, "write_pending", is_after=True)
    assert not output.exists()
    merge(tmp_path, export, onto, on_conflict="skip")  # with other settings
    assert read_labels(tmp_path)["/a.jpg"] == "cat"
    assert read_rows(tmp_path / "out") == [
        ("/a.jpg", "dog", "ann", "cat", False), ("/a.jpg", "cat", "bob", "cat", False),
    ]  # fmt: skip
    assert not (tmp_path / "out" / label_history.PENDING_FILE).exists()


def test_the_unfinished_manifest_of_a_killed_import_is_removed_later(tmp_path: Path) -> None:
    onto = write_manifest(tmp_path, {"/a.jpg": "cat", "/b.jpg": "dog"})
    export, output = write_labels(tmp_path, CONFLICT[:1]), tmp_path / "out" / "new.parquet"
    run_killed(export, onto, output, "write_pending", is_after=True)
    (left,) = output.parent.glob(".new.parquet.*.tmp")
    (output.parent / ".folder.tmp").mkdir()
    merge(tmp_path, export, onto)
    assert left.exists()  # a writer may be at work on it
    os.utime(left, (0, 0))
    merge(tmp_path, export, onto, overwrite=True)
    assert not left.exists()


def test_a_kill_after_the_manifest_is_published_loses_no_history(tmp_path: Path) -> None:
    onto = write_manifest(tmp_path, {"/a.jpg": "cat", "/b.jpg": "dog"})
    export, output = write_labels(tmp_path, CONFLICT[:1]), tmp_path / "out" / "new.parquet"
    run_killed(export, onto, output, "publish_history", is_after=False)
    assert read_labels(tmp_path)["/a.jpg"] == "dog"
    assert not (tmp_path / "out" / label_history.HISTORY_FILE).exists()
    with pytest.raises(OutputError, match="--overwrite"):
        merge(tmp_path, export, onto)
    assert read_rows(tmp_path / "out") == [("/a.jpg", "dog", "ann", "cat", True)]
    merge(tmp_path, export, output, output=output, overwrite=True)
    assert read_rows(tmp_path / "out") == [("/a.jpg", "dog", "ann", "cat", True)]


def test_two_imports_into_one_folder_lose_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onto = write_manifest(tmp_path, {"/a.jpg": "cat", "/b.jpg": "dog"})
    exports = []
    for number, row in enumerate((("/a.jpg", "dog", "ann", 1), ("/b.jpg", "cat", "bob", 2))):
        exports.append(tmp_path / f"{number}.parquet")
        write_labels(tmp_path, [row]).rename(exports[-1])
    is_held, may_end = threading.Event(), threading.Event()
    original = label_history.extend_history

    def wait(*arguments: Any) -> Any:
        is_held.set()
        assert may_end.wait(60)
        return original(*arguments)

    monkeypatch.setattr("imgcls.curation.import_labels.extend_history", wait)
    settings = {"export": exports[0], "onto": str(onto), "output": tmp_path / "out" / "0.parquet"}
    first = threading.Thread(target=import_labels, kwargs=settings)
    first.start()
    assert is_held.wait(60)
    with pytest.raises(OutputLocked, match="is locked by"):
        merge(tmp_path, exports[1], onto, output=tmp_path / "out" / "1.parquet")
    may_end.set()
    first.join()
    merge(tmp_path, exports[1], onto, output=tmp_path / "out" / "1.parquet")
    assert [row[2] for row in read_rows(tmp_path / "out")] == ["ann", "bob"]


def test_a_manifest_on_a_store_has_its_history_there(tmp_path: Path, s3: Any) -> None:
    onto = write_manifest(tmp_path, {"/a.jpg": "cat", "/b.jpg": "dog"})
    export = write_labels(tmp_path, [("/a.jpg", "dog", "ann", 1)])
    done = merge(tmp_path, export, onto, output=f"s3://{BUCKET}/labels/new.parquet")
    assert set(keys(s3)) == {"labels/new.parquet", "labels/labels_history.parquet"}
    s3.download_file(BUCKET, "labels/new.parquet", str(tmp_path / "copy.parquet"))
    assert pq.read_table(tmp_path / "copy.parquet")["label"].to_pylist() == ["dog", "dog"]
    again = merge(
        tmp_path, export, Path(tmp_path / "copy.parquet"),
        output=f"s3://{BUCKET}/labels/again.parquet",
    )  # fmt: skip
    assert (again.confirmed, again.history) == (1, done.history)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("2026-03-01 12:30:00", "2026-03-01T12:30:00+00:00"), ("noon", "'noon' is no time")],
)
def test_a_time_in_the_manifest_is_utc_or_named(tmp_path: Path, value: str, expected: str) -> None:
    onto = tmp_path / "train.csv"
    onto.write_text(f"path,label,labeled_at\n/a.jpg,cat,{value}\n/b.jpg,dog,\n")
    export = write_labels(tmp_path, [("/b.jpg", "cat", "ann", 1)])
    if value == "noon":
        with pytest.raises(Exception, match=expected):
            merge(tmp_path, export, onto)
        assert not (tmp_path / "out").exists()
        return
    merge(tmp_path, export, onto)
    table = pq.read_table(tmp_path / "out" / "new.parquet")
    assert table["labeled_at"][0].as_py().isoformat() == expected


def test_a_time_below_microseconds_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    times = pa.array([1_000, 1_001], pa.timestamp("ns", tz="UTC"))
    onto = write_manifest(tmp_path, {"/a.jpg": "cat", "/b.jpg": "dog"}, labeled_at=times)
    export = write_labels(tmp_path, [("/a.jpg", "dog", "ann", 1)])
    with pytest.raises(ManifestError, match=r"'labeled_at' has the time 1970-.*000001001"):
        merge(tmp_path, export, onto)
    assert not (tmp_path / "out").exists()
    table = pq.read_table(export)
    nano = table.set_column(3, "labeled_at", pa.array([1_001], pa.timestamp("ns", tz="UTC")))
    pq.write_table(nano, export)
    onto = write_manifest(tmp_path, {"/a.jpg": "cat", "/b.jpg": "dog"})
    merge(tmp_path, export, onto)
    found = pq.read_table(tmp_path / "out" / "new.parquet")["labeled_at"][0].as_py()
    assert found.microsecond == 1


def test_an_import_replaces_no_file_that_it_reads(tmp_path: Path) -> None:
    onto = write_manifest(tmp_path, {"/a.jpg": "cat", "/b.jpg": "dog"})
    export = write_labels(tmp_path, [("/a.jpg", "dog", "ann", 1)])
    with pytest.raises(ConfigError, match="history of labels"):
        merge(tmp_path, export, onto, output=tmp_path / "out" / label_history.HISTORY_FILE)
    with pytest.raises(OutputError, match="is the file of export"):
        merge(tmp_path, export, onto, output=export, overwrite=True)
    folder = tmp_path / "shards"
    folder.mkdir()
    onto.rename(folder / "a.parquet")
    (tmp_path / "link").symlink_to(folder)
    for source, output in (
        (tmp_path / "link", folder / "n.parquet"),
        (folder, tmp_path / "link" / "n.parquet"),
        (folder / "*.parquet", folder / "n.parquet"),
        (folder / "*.parquet", tmp_path / "link" / "n.parquet"),
    ):
        with pytest.raises(OutputError, match="twice"):
            merge(tmp_path, export, source, output=output)
    (folder / "a.parquet").rename(folder / label_history.HISTORY_FILE)
    with pytest.raises(OutputError, match="is the history of labels"):
        merge(tmp_path, export, folder / label_history.HISTORY_FILE, output=folder / "new.parquet")


def test_an_output_in_the_folder_of_the_export_is_refused(tmp_path: Path) -> None:
    onto = write_manifest(tmp_path, {"/a.jpg": "cat", "/b.jpg": "dog"})
    folder = tmp_path / "labels"
    folder.mkdir()
    write_labels(tmp_path, [("/a.jpg", "dog", "ann", 1)]).rename(folder / "0.parquet")
    (tmp_path / "link").symlink_to(folder)
    for export in (folder, tmp_path / "link"):
        with pytest.raises(OutputError, match="is in the folder of export"):
            merge(tmp_path, export, onto, output=folder / "new.parquet")
    assert [each.name for each in folder.iterdir()] == ["0.parquet"]


@pytest.mark.parametrize(
    ("pattern", "output", "is_refused"),
    [
        ("s*/m.parquet", "s3/m.parquet", True),
        ("s*/m.parquet", "link/m.parquet", True),
        ("lin*/m.parquet", "link/m.parquet", True),
        ("**/m.parquet", "s1/deep/er/m.parquet", True),
        ("**/m.parquet", "m.parquet", True),
        ("s*/m.parquet", "s1/deep/m.parquet", False),
        ("s*/m.parquet", "s3/n.parquet", False),
        ("**/m.parquet", "s3/xm.parquet", False),
    ],
)
def test_an_output_that_the_glob_of_the_manifest_matches_is_refused(
    tmp_path: Path, pattern: str, output: str, is_refused: bool
) -> None:
    for name in ("s1", "linked"):
        (tmp_path / name).mkdir()
        onto = write_manifest(tmp_path, {f"/{name}.jpg": "cat"})
        onto.rename(tmp_path / name / "m.parquet")
    (tmp_path / "s3").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "s3")
    export = write_labels(tmp_path, [("/s1.jpg", "cat", "ann", 1)])
    if not is_refused:
        merge(tmp_path, export, tmp_path / pattern, output=tmp_path / output)
        return
    with pytest.raises(OutputError, match="twice"):
        merge(tmp_path, export, tmp_path / pattern, output=tmp_path / output)
    assert not (tmp_path / output).exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (label_history.HISTORY_FILE, r"not a history of these labels \(its columns: path string\)"),
        (label_history.PENDING_FILE, r"cannot be read \(.*\)\. Move it away, or pass an --output"),
    ],
)
def test_another_file_in_the_place_of_the_history_is_named(
    tmp_path: Path, name: str, message: str
) -> None:
    onto = write_manifest(tmp_path, {"/a.jpg": "cat", "/b.jpg": "dog"})
    export, file = write_labels(tmp_path, [("/a.jpg", "dog", "ann", 1)]), tmp_path / "out" / name
    file.parent.mkdir()
    if name == label_history.HISTORY_FILE:
        pq.write_table(pa.table({"path": ["/a.jpg"]}), file)
    else:
        file.write_bytes(b"damaged")
    before = file.read_bytes()
    with pytest.raises(OutputError, match=rf"{name}: .*{message}"):
        merge(tmp_path, export, onto)
    assert file.read_bytes() == before
