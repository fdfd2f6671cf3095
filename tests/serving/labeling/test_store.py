"""Decisions are stored exactly once: repeated, at once, after kills, on a disk and in a store."""

from __future__ import annotations

import datetime
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from imgcls.data.annotations.labels_table import build_labels_schema
from imgcls.data.storage import filesystem
from imgcls.errors import OutputError
from imgcls.serving.config import LabelingConfig
from imgcls.serving.labeling import decisions, store
from imgcls.serving.labeling.decisions import AnnotatorRecord, Decision
from imgcls.serving.labeling.labeling import Labeling
from imgcls.serving.labeling.queue import LabelingQueue
from imgcls.serving.labeling.store import DecisionStore
from imgcls.serving.problems import Problem
from tests.processes import REPOSITORY

PATHS = tuple(f"{i}.jpg" for i in range(2000))
WRITER = """
import sys, uuid
from imgcls.serving.config import LabelingConfig
from imgcls.serving.labeling.labeling import Labeling
from imgcls.serving.labeling.queue import LabelingQueue
from imgcls.serving.labeling.store import DecisionStore

output, annotator, first, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
paths = tuple(f"{i}.jpg" for i in range(2000))
queue = LabelingQueue(paths, paths)
store = DecisionStore.open(output, several=False)
labeling = Labeling(LabelingConfig(), queue, store, several=False)
print("ready", flush=True)
sys.stdin.readline()
for row in range(first, first + count):
    submission = uuid.uuid4().hex
    print("send", row, submission, flush=True)
    labeling.submit(annotator, row, ("red",), submission)
    print("done", row, submission, flush=True)
"""


def open_labeling(output: object, *, several: bool = False, annotations: int = 1) -> Labeling:
    """A replica: what it knows is in the folder."""
    config = LabelingConfig.model_construct(annotations_per_image=annotations, classes=[])
    opened = DecisionStore.open(str(output), several=several)
    return Labeling(config, LabelingQueue(PATHS, PATHS), opened, several=several)


def read_labels(output: object) -> dict[tuple[str, str], str | list[str] | None]:
    """The labels tables of a folder: one row per image and annotator."""
    found: dict[tuple[str, str], str | list[str] | None] = {}
    for name in filesystem.list_names(str(output)):
        with filesystem.open_read(filesystem.join(str(output), name)) as stream:
            for row in pq.read_table(stream).to_pylist():
                assert (row["path"], row["annotator"]) not in found
                found[row["path"], row["annotator"]] = row["label"]
    return found


def new_id() -> str:
    return uuid.uuid4().hex


def test_the_table_has_the_newest_decision_of_each_annotator(place: Path) -> None:
    a, b = open_labeling(place / "labels"), open_labeling(place / "labels")
    a.submit("ana", 0, ("red",), new_id())
    b.submit("ben", 0, ("blue",), new_id())
    b.submit("ana", 0, ("green",), new_id())  # the same annotator, by the other replica
    last = a.submit("ana", 1, None, new_id()).record.last
    assert last is not None
    output = str(place / "labels")
    assert read_labels(output) == {
        ("0.jpg", "ana"): "green", ("0.jpg", "ben"): "blue", ("1.jpg", "ana"): None,
    }  # fmt: skip
    b.undo("ana", last.submission)
    assert read_labels(output) == {("0.jpg", "ana"): "green", ("0.jpg", "ben"): "blue"}
    assert len(filesystem.list_names(f"{output}/{store.DECISIONS_FOLDER}")) == 3


@pytest.mark.parametrize("several", [False, True])
def test_the_table_has_the_schema_of_labels(tmp_path: Path, several: bool) -> None:
    labeling = open_labeling(tmp_path, several=several)
    labeling.submit("ana", 0, ("red", "blue") if several else ("red",), new_id())
    if several:
        labeling.submit("ana", 1, (), new_id())
    (file,) = tmp_path.glob("*.parquet")
    table = pq.read_table(file)
    assert table.schema.equals(build_labels_schema(several=several))
    assert table["label"].to_pylist() == ([["red", "blue"], []] if several else ["red"])
    assert set(table["tool"].to_pylist()) == {"imgcls"}
    with pytest.raises(OutputError, match=r"pass another --labeling\.output"):
        open_labeling(tmp_path, several=not several)


def test_a_repeated_request_is_stored_once_and_undone_once(tmp_path: Path) -> None:
    first, second = new_id(), new_id()
    a, b = open_labeling(tmp_path), open_labeling(tmp_path)
    for replica in (a, b, a):
        replica.submit("ana", 0, ("red",), first)
    a.submit("ana", 1, ("red",), second)
    assert len(b.assign("ana").record.decisions) == 2
    for replica in (a, b, b):
        replica.undo("ana", second)
    a.submit("ana", 1, ("red",), second)  # a late repetition does not bring it back
    assert read_labels(tmp_path) == {("0.jpg", "ana"): "red"}
    with pytest.raises(Problem, match="another decision"):
        b.submit("ana", 0, ("blue",), first)
    with pytest.raises(Problem, match="no such decision"):
        b.undo("ana", new_id())


def test_undo_restores_the_decision_before(tmp_path: Path) -> None:
    labeling, second = open_labeling(tmp_path), new_id()
    labeling.submit("ana", 0, ("red",), new_id())
    labeling.submit("ana", 0, ("blue",), second)
    record = labeling.undo("ana", second).record
    assert record.current["0.jpg"].labels == ("red",)
    assert read_labels(tmp_path) == {("0.jpg", "ana"): "red"}
    assert record.last is not None
    record = labeling.undo("ana", record.last.submission).record
    assert (record.last, record.assigned[0]) == (None, "0.jpg")
    assert read_labels(tmp_path) == {}


def test_a_replica_killed_before_the_table_is_written_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is there and the table is not: a repeated request and a new replica write it."""
    for repeats in (True, False):
        output, submission = tmp_path / str(repeats), new_id()
        labeling = open_labeling(output)
        with monkeypatch.context() as context:
            context.setattr(filesystem, "write", lambda *_: (_ for _ in ()).throw(SystemExit))
            with pytest.raises(SystemExit):
                labeling.submit("ana", 0, ("red",), submission)
        assert read_labels(output) == {}
        other = open_labeling(output)
        if repeats:
            filesystem.remove(str(next(output.glob("*.parquet"))))
            other.submit("ana", 0, ("red",), submission)
        assert read_labels(output) == {("0.jpg", "ana"): "red"}


def test_a_suspended_replica_does_not_overwrite_newer_decisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It continues when the version that it creates was superseded and removed long ago."""
    slow, other = open_labeling(tmp_path), open_labeling(tmp_path)
    slow.submit("ana", 0, ("red",), new_id())
    create, has_waited = filesystem.create, []

    def create_late(url: str, data: bytes) -> bool:
        if not has_waited:
            has_waited.append(True)
            for row in range(1, 6):
                other.submit("ana", row, ("red",), new_id())
        return create(url, data)

    monkeypatch.setattr(filesystem, "create", create_late)
    slow.submit("ana", 6, ("red",), new_id())
    assert {path for path, _ in read_labels(tmp_path)} == set(PATHS[:7])
    assert len(open_labeling(tmp_path).assign("ana").record.current) == 7


def test_old_decisions_are_dropped_only_if_undone_or_replaced() -> None:
    at = datetime.datetime.now(datetime.UTC)
    record = AnnotatorRecord("ana")
    for i in range(30):
        record = record.add(Decision(f"{i % 3}.jpg", ("red",), at, f"{i:032x}"))
        record = record.undo(f"{i:032x}") if i == 1 else record
    many = record
    for i in range(decisions.KEPT_DECISIONS):
        many = many.add(Decision("9.jpg", ("red",), at, f"{100 + i:032x}"))
    assert set(many.current) == {"0.jpg", "1.jpg", "2.jpg", "9.jpg"}
    assert len(many.decisions) == decisions.KEPT_DECISIONS + 3


def test_a_damaged_record_is_refused_with_its_path(tmp_path: Path) -> None:
    open_labeling(tmp_path).submit("ana", 0, ("red",), new_id())
    (file,) = (tmp_path / store.DECISIONS_FOLDER).glob("*.parquet")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(OutputError, match=f"{file.name}: is damaged"):
        open_labeling(tmp_path)


@pytest.mark.parametrize("metadata", ['{"annotator": "ana"}', "3", '{"assigned": null}'])
def test_a_record_with_wrong_metadata_is_refused_with_its_path(
    tmp_path: Path, metadata: str
) -> None:
    open_labeling(tmp_path).submit("ana", 0, ("red",), new_id())
    (file,) = (tmp_path / store.DECISIONS_FOLDER).glob("*.parquet")
    table = pq.read_table(file)
    if metadata.startswith('{"assigned"'):
        metadata = json.dumps(json.loads(table.schema.metadata[b"imgcls"]) | json.loads(metadata))
    pq.write_table(table.replace_schema_metadata({"imgcls": metadata}), file)
    with pytest.raises(OutputError, match=f"{file.name}: is damaged .* Stop the service"):
        open_labeling(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"labeling\.output"):
        open_labeling(tmp_path / "file" / "labels")


def test_a_disk_without_hard_links_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OutputError, match="the file system has no hard links"):
        open_labeling(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_replicas_that_write_at_once_lose_and_double_nothing(place: Path) -> None:
    """Both of them for the same annotator, and each for one of its own."""
    output = str(place / "labels")
    replicas = [open_labeling(output), open_labeling(output)]
    sent: dict[str, list[str]] = {"both": [], "own-0": [], "own-1": []}

    def write(replica: Labeling, name: str, first: int) -> None:
        for row in range(first, first + 5):
            submission = new_id()
            sent[name].append(submission)
            replica.submit(name, row, ("red",), submission)

    with ThreadPoolExecutor(4) as pool:
        writing = [
            pool.submit(write, replicas[i], name, 10 * i)
            for i in (0, 1)
            for name in ("both", f"own-{i}")
        ]
        for each in writing:
            each.result()
    expected = {(PATHS[row + 10 * i], name) for row in range(5) for i in (0, 1)
                for name in ("both", f"own-{i}")}  # fmt: skip
    assert set(read_labels(output)) == expected
    records = DecisionStore.open(output, several=False).read_all()
    found = {name: sorted(e.submission for e in each.decisions) for name, each in records.items()}
    assert found == {name: sorted(each) for name, each in sent.items()}


def start_writer(output: Path, annotator: str, first: int, count: int) -> subprocess.Popen[str]:
    arguments = [str(output), annotator, str(first), str(count)]
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_process_loses_and_doubles_no_acknowledged_decision(tmp_path: Path) -> None:
    """One of two processes that label as the same annotator is killed at random; it retries."""
    first = 0
    sent: dict[str, int] = {}
    done: dict[str, int] = {}
    for rounds in range(4):
        writers = [start_writer(tmp_path, "ana", first + 200 * i, 100) for i in (0, 1)]
        outputs: list[list[str]] = [[], []]

        def collect(process: subprocess.Popen[str], lines: list[str]) -> None:
            assert process.stdout is not None
            lines.extend(process.stdout)

        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdin is not None
            assert writer.stdout.readline() == "ready\n"
        threads = [
            threading.Thread(target=collect, args=p) for p in zip(writers, outputs, strict=True)
        ]
        for thread, writer in zip(threads, writers, strict=True):
            thread.start()
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        threads[1].join(0.1 + 0.12 * rounds)
        writers[0].send_signal(signal.SIGKILL)
        for thread, writer in zip(threads, writers, strict=True):
            thread.join()
            writer.communicate()
        for line in (*outputs[0], *outputs[1]):
            word, row, submission = line.split()
            (sent if word == "send" else done)[submission] = int(row)
        first += 100
        replica = open_labeling(tmp_path)
        labels = read_labels(tmp_path)
        assert {(PATHS[row], "ana") for row in done.values()} <= set(labels)
        for submission in sent.keys() - done.keys():  # the client retries
            replica.submit("ana", sent[submission], ("red",), submission)
        done |= sent
    record = open_labeling(tmp_path).assign("ana").record
    assert sorted(each.submission for each in record.decisions) == sorted(sent)
    assert set(read_labels(tmp_path)) == {(PATHS[row], "ana") for row in sent.values()}


def test_annotators_with_similar_names_have_files_of_their_own(tmp_path: Path) -> None:
    labeling = open_labeling(tmp_path)
    for name in ("Ana", "ana", "../ana", "Ann a", "安娜"):
        labeling.submit(name, 0, ("red",), new_id())
    assert {name for _, name in read_labels(tmp_path)} == {"Ana", "ana", "../ana", "Ann a", "安娜"}
    assert len(list(tmp_path.glob("*.parquet"))) == 5


def test_each_image_is_assigned_to_as_many_annotators_as_wanted(tmp_path: Path) -> None:
    one = open_labeling(tmp_path / "one")
    assert one.assign("ana").record.assigned == PATHS[:3]
    assert one.assign("ben").record.assigned == PATHS[3:6]
    assert one.submit("ana", 0, ("red",), new_id()).record.assigned == (*PATHS[1:3], PATHS[6])
    assert one.submit("ben", 3, None, new_id()).record.assigned == (*PATHS[4:6], PATHS[7])
    # skipped by one, it is the first for another
    assert one.submit("ana", 1, ("red",), new_id()).record.assigned == (
        PATHS[2],
        PATHS[6],
        PATHS[3],
    )
    two = open_labeling(tmp_path / "two", annotations=2)
    assert two.assign("ana").record.assigned == two.assign("ben").record.assigned == PATHS[:3]
    assert two.assign("cem").record.assigned == PATHS[3:6]


def test_an_annotator_without_a_decision_takes_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first images are reserved meanwhile, and stay the same with the first decision."""
    monkeypatch.setattr(store, "MAX_ANNOTATORS", 2)
    labeling = open_labeling(tmp_path)
    for name in ("ana", "ben", "cem"):
        labeling.assign(name)
    assert read_labels(tmp_path) == {}
    assert filesystem.list_names(str(tmp_path / store.DECISIONS_FOLDER)) == []
    assert labeling.assign("cem").record.assigned == PATHS[6:9]
    labeling.assign("ana")
    assert labeling.submit("cem", 6, ("red",), new_id()).record.assigned == PATHS[7:10]
    labeling.submit("ben", 3, None, new_id())
    with pytest.raises(OutputError, match="2 annotators already"):
        labeling.submit("ana", 0, ("red",), new_id())


def test_images_of_an_annotator_who_left_are_given_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from imgcls.serving.labeling import assignment

    labeling = open_labeling(tmp_path)
    labeling.assign("ana")
    monkeypatch.setattr(assignment, "ASSIGNMENT_S", 0.0)
    assert labeling.assign("ben").record.assigned == PATHS[:3]
