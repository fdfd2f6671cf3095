"""Data sets on Hugging Face: a local server with the same requests, over real HTTP."""

from __future__ import annotations

import io
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcls.errors import RequestError, StorageForbidden
from imgcls.publishing.publish import create_sink
from tests.evaluation.runs import commit, drawn
from tests.publishing.hub_server import HubServer
from tests.publishing.tables import commit_again, publish_to, set_run_id

TARGET = "hf:datasets/me/photos"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        # huggingface_hub reads HF_ENDPOINT once, when it is imported
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        # files are uploaded by LFS: the protocol of Xet is the server's own
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield server
        server.shutdown()
        thread.join()


def read(hub: HubServer) -> pa.Table:
    """All rows of the data set, in the order of its files."""
    return pa.concat_tables(
        pq.read_table(io.BytesIO(hub.files[name])) for name in sorted(hub.files)
    )


def test_a_run_is_one_commit_with_its_id_and_is_added_once(run: Path, hub: HubServer) -> None:
    first = publish_to(run, TARGET)
    assert (first.action, first.version) == ("published", hub.commits[-1]["sha"])
    assert publish_to(run, TARGET).action == "unchanged"
    assert [each["summary"] for each in hub.commits[1:]] == ["imgcls run drawn"]
    found = read(hub)
    assert found["row"].to_pylist() == list(range(90))
    assert set(found["run_id"].to_pylist()) == {"drawn"}
    assert len(hub.files) == 3


def test_a_run_that_was_committed_again_replaces_its_files_only(run: Path, hub: HubServer) -> None:
    publish_to(set_run_id(commit(run.parent / "other", drawn(7)), "other"), TARGET)
    publish_to(run, TARGET)
    commit_again(run, "empty")
    assert publish_to(run, TARGET).action == "replaced"
    assert len(hub.commits) == 4
    found = read(hub)
    statuses = Counter(zip(found["run_id"].to_pylist(), found["status"].to_pylist(), strict=True))
    assert statuses == {("drawn", "empty"): 90, ("other", "ok"): 7}


def test_a_commit_that_another_writer_precedes_is_repeated(run: Path, hub: HubServer) -> None:
    hub.lose_races = 2
    assert publish_to(run, TARGET).action == "published"
    assert read(hub).num_rows == 90


def test_a_data_set_that_does_not_exist_is_refused_with_the_command(
    run: Path, hub: HubServer
) -> None:
    with pytest.raises(RequestError, match="hf repos create me/nothing --repo-type dataset"):
        publish_to(run, "hf:datasets/me/nothing")


def test_a_refused_commit_is_an_error(
    run: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = hub.RequestHandlerClass
    monkeypatch.setattr(
        handler, "do_POST", lambda self: self._answer({"error": "read-only token"}, 403)
    )
    with pytest.raises(StorageForbidden, match="hf:datasets/me/photos: access is refused"):
        publish_to(run, TARGET)
    assert len(hub.commits) == 1


@pytest.mark.parametrize("name", ["me/photos", "datasets/photos", "datasets/me/photos/data"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match="pass hf:datasets/OWNER/NAME"):
        create_sink(f"hf:{name}")
