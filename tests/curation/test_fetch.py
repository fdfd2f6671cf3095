"""Lists of URLs into shards: every row once, the bytes of the server, resumed after a kill."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import signal
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from imgcls import cli, config
from imgcls.curation import shards
from imgcls.curation.config import FetchConfig
from imgcls.curation.fetch import fetch
from imgcls.curation.scan import hold_output
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.data.storage import filesystem
from imgcls.errors import ManifestError, OutputError, OutputLocked, StorageFull, TooManyErrors
from imgcls.inference.requests import check_output_columns
from tests import processes
from tests.web_server import Reply, Server, serving


def draw(seed: int, format: str = "JPEG", **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 56, 3)).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, format, **options)
    return sink.getvalue()


@pytest.fixture
def server() -> Iterator[Server]:
    """Images at /0.jpg to /39.jpg; every fifth is a PNG."""
    with serving() as running:
        for number in range(40):
            body = draw(number, "JPEG" if number % 5 else "PNG")
            running.replies[f"/{number}.jpg"] = [Reply(body=body)]
        yield running


def write_list(path: Path, urls: Sequence[str | None], labels: Sequence[Any] = ()) -> Path:
    columns: dict[str, Any] = {"url": pa.array(urls, pa.string()), "size": range(len(urls))}
    if len(labels):
        columns["label"] = labels
    pq.write_table(pa.table(columns), path)
    return path


def build(source: Path, output: Path, **settings: Any) -> FetchConfig:
    defaults = {"manifest.path_column": "url", "max_error_rate": 1.0, "shard_rows": 10}
    paths = {"manifest.path": str(source), "output": str(output)}
    return config.build(FetchConfig, {**defaults, **settings, **paths})


def read_shards(output: Path) -> dict[str, bytes]:
    """The bytes of all shards."""
    return {path.name: path.read_bytes() for path in sorted(output.glob("part-*"))}


def read_table(output: Path) -> list[dict[str, Any]]:
    tables = [pq.read_table(path) for path in sorted(output.glob("part-*.parquet"))]
    rows: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist()
    return rows


def read_archive(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def list_urls(server: Server, count: int = 40) -> list[str]:
    return [f"{server.url}/{number}.jpg" for number in range(count)]


# ------------------------------------------------------------------ rows


def test_every_row_is_stored_once_with_the_bytes_of_the_server(
    server: Server, tmp_path: Path
) -> None:
    labels = [f"class {number % 3}" for number in range(40)]
    source = write_list(tmp_path / "list.parquet", list_urls(server), labels)
    assert fetch(build(source, tmp_path / "out")) == {"ok": 40}
    names = [f"part-{shard:06d}.parquet" for shard in range(4)]
    assert sorted(os.listdir(tmp_path / "out")) == ["_SUCCESS", "_fetch", *names]
    assert os.listdir(tmp_path / "out" / "_fetch") == ["_run.json"]
    rows = read_table(tmp_path / "out")
    assert len(rows) == 40
    for number, row in enumerate(rows):
        body = server.replies[f"/{number}.jpg"][0].body
        assert isinstance(body, bytes)
        suffix, kind = (".jpg", "image/jpeg") if number % 5 else (".png", "image/png")
        assert row == {
            "url": f"{server.url}/{number}.jpg",
            "size": number,
            "label": f"class {number % 3}",
            "image": {"bytes": body, "path": f"{number:09d}{suffix}"},
            "fetch_row": number,
            "fetch_status": "ok",
            "fetch_error": None,
            "image_width": 56,
            "image_height": 40,
            "image_type": kind,
            "image_sha256": hashlib.sha256(body).hexdigest(),
        }
    assert sorted(server.lines) == sorted(f"/{number}.jpg" for number in range(40))


def test_every_failure_is_a_row_with_its_status_and_no_image(
    server: Server, tmp_path: Path
) -> None:
    whole = draw(99)
    opted_out = {"X-Robots-Tag": "noai"}
    server.replies |= {
        "/gone": [Reply(404)],
        "/private": [Reply(403)],
        "/loop": [Reply(302, headers={"Location": "/loop"})],
        "/broken": [Reply(body=whole, missing=500)],  # on every attempt
        "/once": [Reply(body=whole, missing=500), Reply(body=whole)],
        "/page": [Reply(body=b"<!doctype html><p>gone")],
        "/short": [Reply(body=whole[:-500])],
        "/empty": [Reply()],
        "/huge": [Reply(body=bytes(60_001))],
        "/psd": [Reply(body=b"8BPS" + bytes(40))],
        "/theirs": [Reply(body=whole, headers=opted_out)],
    }
    expected = {
        "gone": "missing", "private": "forbidden", "loop": "unreadable", "broken": "unavailable",
        "once": "ok", "page": "not_an_image", "short": "truncated", "empty": "empty",
        "huge": "too_large", "psd": "unsupported", "theirs": "opted_out",
    }  # fmt: skip
    urls = [f"{server.url}/{name}" for name in expected]
    source = write_list(tmp_path / "list.parquet", [*urls, None])
    settings = {"storage.robots_opt_outs": "noai", "storage.retry_timeout_s": 1}
    fetch(build(source, tmp_path / "out", max_bytes=60_000, **settings))
    rows = read_table(tmp_path / "out")
    assert [row["fetch_status"] for row in rows] == [*expected.values(), "missing"]
    for row in rows:
        is_ok = row["fetch_status"] == "ok"
        assert (row["image"] is not None) == is_ok
        assert (row["fetch_error"] is None) == is_ok
        assert (row["image_sha256"] is not None) == is_ok
    errors = {row["fetch_status"]: row["fetch_error"] for row in rows}
    assert "X-Robots-Tag: noai" in errors["opted_out"]
    assert "redirected more than 10 times" in errors["unreadable"]
    assert server.lines.count("/broken") > 1


def test_an_image_that_crashes_its_decoder_is_a_row(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # in the processes that decode
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "from PIL import Image\n"
        "real = Image.open\n"
        "def deadly(stream, *more, **named):\n"
        "    if b'deadly' in stream.getvalue(): os.abort()\n"
        "    return real(stream, *more, **named)\n"
        "Image.open = deadly\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    server.replies["/17.jpg"] = [Reply(body=draw(17, comment=b"deadly"))]
    source = write_list(tmp_path / "list.parquet", list_urls(server, 25))
    fetch(build(source, tmp_path / "out"))
    rows = read_table(tmp_path / "out")
    statuses = ["crashed" if number == 17 else "ok" for number in range(25)]
    assert [row["fetch_status"] for row in rows] == statuses
    assert rows[17]["image"] is None
    assert rows[17]["fetch_error"] == "the decoder was ended by SIGABRT while it was decoded"


def test_a_url_of_several_rows_is_fetched_once_per_shard(server: Server, tmp_path: Path) -> None:
    urls = [f"{server.url}/{number}.jpg" for number in (1, 2, 1, 1, 3, 1)]
    source = write_list(tmp_path / "list.parquet", urls)
    fetch(build(source, tmp_path / "out", shard_rows=4))
    rows = read_table(tmp_path / "out")
    assert [row["url"] for row in rows] == urls
    assert len({row["image_sha256"] for row in rows}) == 3
    assert Counter(server.lines) == {"/1.jpg": 2, "/2.jpg": 1, "/3.jpg": 1}


def test_files_on_a_disk_are_stored_too_under_absolute_paths(tmp_path: Path) -> None:
    (tmp_path / "a b.jpg").write_bytes(draw(1))
    source = tmp_path / "list.csv"
    with source.open("w") as stream:
        csv.writer(stream).writerows([["url"], ["a b.jpg"], ["c.jpg"]])
    fetch(build(source, tmp_path / "out"))
    rows = read_table(tmp_path / "out")
    assert [row["url"] for row in rows] == [f"{tmp_path}/a b.jpg", f"{tmp_path}/c.jpg"]
    assert [row["fetch_status"] for row in rows] == ["ok", "missing"]


def test_a_slow_host_delays_its_own_shard_only(server: Server, tmp_path: Path) -> None:
    released = threading.Event()

    def wait() -> Iterator[bytes]:
        assert released.wait(60)
        yield draw(7)

    server.replies["/slow"] = [Reply(body=wait)]
    source = write_list(tmp_path / "list.parquet", [f"{server.url}/slow", *list_urls(server, 35)])
    last = tmp_path / "out" / "part-000003.parquet"
    settings = {"storage.attempt_timeout_s": 60}
    running = threading.Thread(
        target=fetch, args=[build(source, tmp_path / "out", io_concurrency=4, **settings)]
    )
    running.start()
    try:
        processes.wait_for(last.exists, every=0.01)
        assert not (tmp_path / "out" / "part-000000.parquet").exists()
    finally:
        released.set()
        running.join()
    assert [row["fetch_status"] for row in read_table(tmp_path / "out")] == ["ok"] * 36


def test_a_fetched_table_is_a_manifest_of_predict(server: Server, tmp_path: Path) -> None:
    source = write_list(tmp_path / "list.parquet", list_urls(server, 3), ["a", "b", "c"])
    fetch(build(source, tmp_path / "out"))
    found = ManifestConfig(path=str(tmp_path / "out"), path_column="url")
    manifest = open_manifest(found)
    check_output_columns(manifest)  # raises for a column that predict writes
    (batch,) = manifest.batches()
    assert batch.column("label").to_pylist() == ["a", "b", "c"]


# ------------------------------------------------------------------ archives


def test_archives_have_the_images_that_were_found_and_tables_have_every_row(
    server: Server, tmp_path: Path
) -> None:
    server.replies["/3.jpg"] = [Reply(404)]
    labels = ["cat", None, *["dog"] * 10]
    source = write_list(tmp_path / "list.parquet", list_urls(server, 12), labels)
    fetch(build(source, tmp_path / "out", format="tar"))
    files = read_archive(tmp_path / "out" / "part-000000.tar")
    found = [number for number in range(10) if number != 3]
    assert list(files) == [f"{n:09d}.{suffix}" for n in found for suffix in ("jpg", "json", "txt")]
    for number in found:
        assert files[f"{number:09d}.jpg"] == server.replies[f"/{number}.jpg"][0].body
        label = labels[number]
        assert files[f"{number:09d}.txt"] == (label or "").encode()
        facts = json.loads(files[f"{number:09d}.json"])
        assert facts["url"] == f"{server.url}/{number}.jpg"
        assert (facts["size"], facts["label"], facts["fetch_row"]) == (number, label, number)
        assert (facts["image_width"], facts["image_height"]) == (56, 40)
    rows = read_table(tmp_path / "out")
    assert "image" not in rows[0]
    assert [row["fetch_status"] for row in rows] == ["ok"] * 3 + ["missing"] + ["ok"] * 8
    assert [row["fetch_row"] for row in rows] == list(range(12))


def test_integer_labels_are_class_files_and_values_without_json_are_written(
    server: Server, tmp_path: Path
) -> None:
    table = pa.table(
        {
            "url": list_urls(server, 2),
            "label": [7, 0],
            "share": [float("nan"), 0.5],
            "key": [b"\x00\xff", None],
            "time": pa.array([0, 1], pa.timestamp("us", tz="UTC")),
            "tags": [["a"], None],
        }
    )
    pq.write_table(table, tmp_path / "list.parquet")
    fetch(build(tmp_path / "list.parquet", tmp_path / "out", format="tar"))
    files = read_archive(tmp_path / "out" / "part-000000.tar")
    assert [files["000000000.cls"], files["000000001.cls"]] == [b"7", b"0"]
    facts = json.loads(files["000000000.json"])
    assert (facts["share"], facts["key"], facts["tags"]) == (None, "AP8=", ["a"])
    assert facts["time"] == "1970-01-01T00:00:00+00:00"
    found = pq.read_table(tmp_path / "out" / "part-000000.parquet").select(table.schema.names)
    assert found.drop_columns("share").to_pylist() == table.drop_columns("share").to_pylist()


def test_webdataset_reads_the_archives(server: Server, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    source = write_list(tmp_path / "list.parquet", list_urls(server, 12), range(12))
    fetch(build(source, tmp_path / "out", format="tar"))
    urls = str(tmp_path / "out" / "part-{000000..000001}.tar")
    samples = list(
        webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        .decode("pil")
        .to_tuple("jpg", "cls", "json")
    )
    assert [label for _, label, _ in samples] == list(range(12))
    assert [image.size for image, _, _ in samples] == [(56, 40)] * 12
    assert samples[11][2]["url"] == f"{server.url}/11.jpg"


@pytest.mark.parametrize("format", ["parquet", "tar"])
def test_hugging_face_datasets_shows_the_images(
    server: Server, tmp_path: Path, format: str
) -> None:
    datasets = pytest.importorskip("datasets")
    server.replies["/1.jpg"] = [Reply(404)]
    source = write_list(tmp_path / "list.parquet", list_urls(server, 12), ["a", "b"] * 6)
    fetch(build(source, tmp_path / "out", format=format))
    files = sorted(str(path) for path in (tmp_path / "out").glob(f"part-*.{format}"))
    kind = "webdataset" if format == "tar" else "parquet"
    found = datasets.load_dataset(
        kind, data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    images = found["jpg" if format == "tar" else "image"]
    sizes = [None if image is None else image.size for image in images]
    failed = [] if format == "tar" else [None]
    assert sizes == [(56, 40), *failed, *[(56, 40)] * 10]


# ------------------------------------------------------------------ resume and retry


def test_a_killed_fetch_is_resumed_to_the_same_bytes(server: Server, tmp_path: Path) -> None:
    server.replies["/17.jpg"] = [Reply(404)]
    source = write_list(tmp_path / "list.parquet", list_urls(server), [None, "b"] * 20)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    fetch(build(source, whole, format="tar"))
    server.pause = 0.05
    arguments = [
        source, "--manifest.path-column", "url", "--output", killed, "--format", "tar",
        "--shard-rows", 10, "--io-concurrency", 2, "--max-error-rate", 1,
    ]  # fmt: skip
    with processes.started("manifest", "fetch", *arguments) as process:
        processes.wait_for((killed / "part-000001.parquet").exists, every=0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    (killed / ".part-000003.tar.0123456789ab.tmp").write_bytes(b"of a write that was killed")
    before = set(read_shards(killed))
    assert "part-000003.parquet" not in before
    complete = [number for number in range(40) if f"part-{number // 10:06d}.parquet" in before]
    server.lines.clear()
    server.pause = 0.0
    assert fetch(build(source, killed, format="tar")) == {"ok": 39, "missing": 1}
    assert read_shards(killed) == read_shards(whole)
    assert sorted(os.listdir(killed)) == sorted(os.listdir(whole))  # nothing else is left
    assert not {f"/{number}.jpg" for number in complete} & set(server.lines)


@pytest.mark.parametrize("format", ["parquet", "tar"])
def test_a_fetch_that_failed_is_resumed_to_the_same_bytes(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    source = write_list(tmp_path / "list.parquet", list_urls(server), ["a"] * 40)
    fetch(build(source, tmp_path / "whole", format=format))
    write = shards.ShardStore.write

    def fail_in_a_row(store: Any, shard: int, rows: Any, start: int, results: Any) -> None:
        def some() -> Iterator[Any]:
            for number, result in enumerate(results):
                if shard == 2 and number == 5:
                    raise StorageFull("no space left")
                yield result

        write(store, shard, rows, start, some())

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardStore, "write", fail_in_a_row)
        with pytest.raises(StorageFull, match="rerun the same command"):
            fetch(build(source, tmp_path / "out", format=format))
    assert not [name for name in read_shards(tmp_path / "out") if name.startswith("part-000002")]
    fetch(build(source, tmp_path / "out", format=format))
    assert read_shards(tmp_path / "out") == read_shards(tmp_path / "whole")


@pytest.mark.parametrize("format", ["parquet", "tar"])
def test_failed_rows_are_fetched_again_and_no_others(
    server: Server, tmp_path: Path, format: str
) -> None:
    source = write_list(tmp_path / "list.parquet", list_urls(server), ["a"] * 40)
    fetch(build(source, tmp_path / "whole", format=format))
    bodies = {name: server.replies[name] for name in ("/0.jpg", "/5.jpg", "/19.jpg")}
    server.replies |= {name: [Reply(404)] for name in bodies}
    out = tmp_path / "out"
    assert fetch(build(source, out, format=format)) == {"ok": 37, "missing": 3}
    server.replies |= bodies
    server.replies["/5.jpg"] = [Reply(404)]
    server.lines.clear()
    assert fetch(build(source, out, format=format)) == {"ok": 37, "missing": 3}
    assert server.lines == []
    retry = {"format": format, "retry_errors": True}
    assert fetch(build(source, out, **retry)) == {"ok": 39, "missing": 1}
    assert sorted(server.lines) == ["/0.jpg", "/19.jpg", "/5.jpg"]
    server.replies |= bodies
    assert fetch(build(source, out, **retry)) == {"ok": 40}
    assert read_shards(out) == read_shards(tmp_path / "whole")


def test_a_retry_that_stops_between_archive_and_table_is_finished_by_the_next_run(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_list(tmp_path / "list.parquet", list_urls(server, 10), ["a"] * 10)
    fetch(build(source, tmp_path / "whole", format="tar"))
    body = server.replies["/4.jpg"]
    server.replies["/4.jpg"] = [Reply(404)]
    out = tmp_path / "out"
    fetch(build(source, out, format="tar"))
    server.replies["/4.jpg"] = body

    def fail(*_: object) -> None:
        raise StorageFull("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardStore, "_open_table", fail)
        with pytest.raises(StorageFull, match="rerun the same command"):
            fetch(build(source, out, format="tar", retry_errors=True))
    assert "000000004.jpg" in read_archive(out / "part-000000.tar")
    assert read_table(out)[4]["fetch_status"] == "missing"
    assert not (out / "_SUCCESS").exists()
    assert fetch(build(source, out, format="tar")) == {"ok": 10}  # without retry_errors
    assert read_shards(out) == read_shards(tmp_path / "whole")


def test_too_many_failed_rows_refuse_the_fetch_and_a_higher_limit_accepts_it(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.replies["/1.jpg"] = server.replies["/2.jpg"] = [Reply(404)]
    server.replies["/3.jpg"] = [Reply(403)]
    source = write_list(tmp_path / "list.parquet", list_urls(server, 10))
    out = tmp_path / "out"
    arguments = ["--manifest.path-column", "url", "--shard-rows", "10", "--output", str(out)]
    assert cli.main(["manifest", "fetch", str(source), *arguments]) == 3
    found = capsys.readouterr().err
    assert "3 of 10 rows failed (30.0%, allowed 1.0%)" in found
    assert "fetch_status, then rerun with --retry-errors" in found
    assert not (out / "_SUCCESS").exists()
    assert pq.read_table(out).num_rows == 10
    server.lines.clear()
    limits = {"max_error_rates.missing": 0.2, "max_error_rate": 0.05}
    with pytest.raises(TooManyErrors, match=r"1 of 10 rows failed"):
        fetch(build(source, out, **limits))
    limits["max_error_rate"] = 0.1
    assert fetch(build(source, out, **limits)) == {"ok": 7, "missing": 2, "forbidden": 1}
    assert json.loads((out / "_SUCCESS").read_text())["status"]["missing"] == 2
    assert server.lines == []


# ------------------------------------------------------------------ refusals


def test_another_list_or_other_settings_are_refused_in_the_same_output(
    server: Server, tmp_path: Path
) -> None:
    source = write_list(tmp_path / "list.parquet", list_urls(server, 10))
    other = write_list(tmp_path / "other.parquet", list_urls(server, 11))
    out = tmp_path / "out"
    fetch(build(source, out))
    before = read_shards(out)
    with pytest.raises(OutputError, match=r"holds another run:\n  manifest.fingerprint: "):
        fetch(build(other, out))
    with pytest.raises(OutputError, match=r"settings\.shard_rows: 10 then, 5 now"):
        fetch(build(source, out, shard_rows=5))
    with pytest.raises(OutputError, match=r"settings\.robots_opt_outs"):
        fetch(build(source, out, **{"storage.robots_opt_outs": "noai"}))
    assert read_shards(out) == before
    assert fetch(build(other, out, overwrite=True)) == {"ok": 11}


def test_a_second_driver_is_refused(server: Server, tmp_path: Path) -> None:
    source = write_list(tmp_path / "list.parquet", list_urls(server, 2))
    with hold_output(str(tmp_path / "out")), pytest.raises(OutputLocked, match="is locked by"):
        fetch(build(source, tmp_path / "out"))
    assert server.lines == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("photo.jpg", b""),
        ("part-000000.parquet", b"a table of the user"),
        ("_run.json", b"of a prediction run"),
    ],
)
def test_files_of_others_are_never_replaced(
    server: Server, tmp_path: Path, name: str, content: bytes
) -> None:
    source = write_list(tmp_path / "list.parquet", list_urls(server, 2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(content)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=f"contains files that no fetch wrote \\({name}\\)"):
            fetch(build(source, tmp_path / "out", overwrite=overwrite))
    assert (tmp_path / "out" / name).read_bytes() == content
    assert server.lines == []


def test_a_column_with_the_name_of_an_added_one_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["x"], "Image": ["x"]}), tmp_path / "list.parquet")
    with pytest.raises(ManifestError, match="column 'Image' is an output column of `imgcls man"):
        fetch(build(tmp_path / "list.parquet", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ politeness and cache


def test_a_host_gets_no_more_requests_than_allowed_and_none_before_its_time(
    server: Server, tmp_path: Path
) -> None:
    server.replies["/0.jpg"].insert(0, Reply(429, headers={"Retry-After": "1"}))
    source = write_list(tmp_path / "list.parquet", list_urls(server, 30))
    server.pause = 0.02
    settings = {"storage.max_requests_per_host": 3}
    assert fetch(build(source, tmp_path / "out", **settings)) == {"ok": 30}
    assert server.most_under_way == 3
    again = server.times[[i for i, line in enumerate(server.lines) if line == "/0.jpg"][1]]
    assert again - server.times[0] >= 0.9
    # the three of its slots may be under way already when the answer arrives
    paused = [time for time in server.times[4:] if time - server.times[0] < 0.9]
    assert len(paused) <= 2


def test_a_later_pass_over_the_same_urls_makes_no_request_with_a_cache(
    server: Server, tmp_path: Path
) -> None:
    source = write_list(tmp_path / "list.parquet", list_urls(server, 20))
    settings = {"storage.http_cache": str(tmp_path / "cache")}
    fetch(build(source, tmp_path / "one", **settings))
    assert len(server.lines) == 20
    fetch(build(source, tmp_path / "two", **settings))
    assert len(server.lines) == 20
    assert read_shards(tmp_path / "one") == read_shards(tmp_path / "two")
    assert filesystem.list_names(str(tmp_path / "cache")) == []  # entries are in subfolders
