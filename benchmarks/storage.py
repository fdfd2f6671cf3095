"""Prediction from an object store and from disk, and ways to read from a store.

    python -m benchmarks.storage [--rows 4000] [--repeats 3] [--delay 0.02]

Measured over the same photographs, in turn, in one run, and reported as medians:
  predict    `imgcls predict` after start-up, images on disk and images on the store
  reading    objects per second, and CPU milliseconds per object, of: our reads ahead; pyarrow's S3
             file system in as many threads; s3fs one by one; the disk
  listing    `imgcls manifest build` of a million objects under 100 prefixes
  planning   `--since`: rows of --nights nights of a million each, and --new new ones
The store is a small HTTP server in a process of its own that keeps the objects in memory and adds
`--delay` seconds to every answer; it speaks as much S3 as reading and listing take.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import hashlib
import multiprocessing
import os
import re
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import read_cpu
from benchmarks.programs import measure_imgcls
from benchmarks.workloads import SAMPLE, make_bundle
from tests.evaluation.runs import commit

BUCKET = "photos"
IN_FLIGHT = 16
PREFIXES = 100
A_NIGHT = 1_000_000


def main() -> None:
    options = parse()
    files = sorted(path for path in options.images.rglob("*") if path.is_file())
    size = statistics.mean(path.stat().st_size for path in files) / 1000
    print(
        f"{read_cpu()}; {len(files)} photographs of "
        f"{size:.0f} KB, {1000 * options.delay:.0f} ms added to every answer",
        flush=True,
    )
    measured: dict[str, list[float]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="imgcls-bench-") as name,
        serving(files, options) as url,
    ):
        os.environ |= {
            "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip
        folder = Path(name)
        read(files, options, measured)
        label(files, folder, options, measured)
        listing(folder)
        planning(folder, options)
    disk, store = (statistics.median(measured[f"predict from {w}"]) for w in ("disk", "store"))
    print(f"\npredict from the store / from disk   {store / disk:.2f}   (at least 0.90)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--delay", type=float, default=0.02, help="seconds added to every answer")
    parser.add_argument("--listed", type=int, default=1_000_000, help="objects to list")
    parser.add_argument("--nights", type=int, default=1, help="millions of rows that are known")
    parser.add_argument("--new", type=int, default=10_000, help="rows that are not")
    parser.add_argument("--images", type=Path, default=SAMPLE)
    options = parser.parse_args()
    if not options.images.is_dir():
        parser.error(f"no folder {options.images}; name one of photographs with --images")
    return options


def note(measured: dict[str, list[float]], name: str, value: float, more: str = "") -> None:
    measured.setdefault(name, []).append(value)
    print(f"  {name:<45} {value:8.1f} images/s{more}", flush=True)


# ---------------------------------------------------------------------------- what is measured


def read(files: list[Path], options: argparse.Namespace, measured: dict[str, list[float]]) -> None:
    from pyarrow.fs import S3FileSystem

    from imgcls.data import image_files
    from imgcls.data.storage import storage_settings

    keys = [f"{BUCKET}/{files[i % len(files)].name}" for i in range(options.rows)]
    urls: list[str | None] = [f"s3://{key}" for key in keys]
    arrow = S3FileSystem(
        access_key="key", secret_key="secret", region="us-east-1", scheme="http",
        endpoint_override=os.environ["AWS_ENDPOINT_URL"].removeprefix("http://"),
    )  # fmt: skip
    import s3fs

    plain = s3fs.S3FileSystem(use_listings_cache=False)

    def by_arrow(key: str) -> bytes:
        with arrow.open_input_stream(key) as stream:
            data: bytes = stream.read()
            return data

    def in_threads() -> None:
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            for _ in pool.map(by_arrow, keys):
                pass

    def ahead(places: list[str | None]) -> Callable[[], None]:
        def run() -> None:
            for data in image_files.read_ahead(places, IN_FLIGHT):
                assert isinstance(data, bytes)

        return run

    storage_settings.set_process_settings(storage_settings.StorageConfig())
    few = keys[: max(100, options.rows // 20)]
    on_disk: list[str | None] = [str(files[i % len(files)]) for i in range(options.rows)]
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        f"reading, imgcls, {IN_FLIGHT} in flight": (len(keys), ahead(urls)),
        f"reading, pyarrow, {IN_FLIGHT} threads": (len(keys), in_threads),
        "reading, s3fs one by one": (len(few), lambda: [plain.cat_file(key) for key in few]),
        "reading, imgcls, disk": (len(keys), ahead(on_disk)),
    }
    for _ in range(options.repeats):
        for name, (count, way) in ways.items():
            start, cpu = time.perf_counter(), time.process_time()
            way()
            spent = 1000 * (time.process_time() - cpu) / count
            note(measured, name, count / (time.perf_counter() - start), f", {spent:.2f} ms of CPU")


def label(
    files: list[Path], folder: Path, options: argparse.Namespace, measured: dict[str, list[float]]
) -> None:
    bundle = make_bundle(folder, "resnet18")
    places = {
        "disk": [str(path.absolute()) for path in files],
        "store": [f"s3://{BUCKET}/{path.name}" for path in files],
    }
    for where, paths in places.items():
        with (folder / f"{where}.csv").open("w", newline="") as stream:
            rows = ([paths[i % len(paths)]] for i in range(options.rows))
            csv.writer(stream).writerows([["path"], *rows])
    for repeat in range(options.repeats):
        for where in places:
            output = folder / f"out-{where}-{repeat}"
            _, steady = measure_imgcls(bundle, folder / f"{where}.csv", output)
            if steady is None:
                raise SystemExit("too few rows for a rate after start-up; pass more with --rows")
            note(measured, f"predict from {where}", steady)


def listing(folder: Path) -> None:
    from imgcls.curation.build import build_manifest
    from imgcls.curation.config import ManifestBuildConfig

    start = time.perf_counter()
    output = str(folder / "listed")
    count = build_manifest(ManifestBuildConfig(source=f"s3://{BUCKET}-many", output=output))
    took = time.perf_counter() - start
    print(f"  listing {count:,} objects: {took:.1f} s, {1e6 * took / count:.1f} s a million")


def planning(folder: Path, options: argparse.Namespace) -> None:
    """A manifest of the rows of `--nights` nights of a million rows each, and some new rows."""
    labels, manifest = folder / "labels", folder / "manifest"
    manifest.mkdir()
    status = pa.DictionaryArray.from_arrays(np.zeros(A_NIGHT, np.int32), ["ok"])
    label = pa.DictionaryArray.from_arrays(np.zeros(A_NIGHT, np.int32), ["cat"])
    for night in range(options.nights):
        rows = listed_rows(night * A_NIGHT, A_NIGHT)
        pq.write_table(rows, manifest / f"{night:04d}.parquet")
        labeled = rows.append_column("status", status).append_column("predicted_label", label)
        commit(labels / f"night={night:04d}", labeled, group_rows=65_536)
    pq.write_table(
        listed_rows(options.nights * A_NIGHT, options.new),
        manifest / f"{options.nights:04d}.parquet",
    )
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=plan, args=(labels, manifest, theirs))
    process.start()
    theirs.close()  # so that the end of the process ends the wait
    new, took, memory = ours.recv()
    process.join()
    print(
        f"  planning {options.nights:,} million rows, {new:,} of them new: {took:.1f} s, "
        f"{memory:,} MB of memory at most"
    )
    assert new == options.new


def plan(labels: Path, manifest: Path, connection: Connection) -> None:
    from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
    from imgcls.inference.config import SinceConfig
    from imgcls.inference.incremental import ManifestComparison, SinceRequest

    start = time.perf_counter()
    request = SinceRequest.resolve(
        open_manifest(ManifestConfig(path=str(manifest))), SinceConfig(path=str(labels)),
        output="", bundle_sha256="b" * 64, relabel=False, retry_failed=False, exclude=None,
    )  # fmt: skip
    with ManifestComparison(request) as comparison:
        new = sum(batch.num_rows for batch in comparison.manifest.batches())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
    connection.send((new, time.perf_counter() - start, memory))


def listed_rows(first: int, count: int) -> pa.Table:
    """Rows as `imgcls manifest build` writes them."""
    numbers = range(first, first + count)
    return pa.table(
        {
            "path": [f"s3://{BUCKET}-many/{n % PREFIXES:03d}/{n:09d}.jpg" for n in numbers],
            "size": pa.array(np.full(count, 110_000)),
            "mtime": pa.array(np.full(count, 1_790_000_000_000_000), pa.timestamp("us", "UTC")),
            "etag": [f"{n:032x}" for n in numbers],
        }
    )


# ---------------------------------------------------------------------------- the store


@contextmanager
def serving(files: list[Path], options: argparse.Namespace) -> Iterator[str]:
    """A store in a process of its own; its URL."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (files, options.delay, options.listed, theirs)
    process = context.Process(target=serve, args=arguments, daemon=True)
    process.start()
    theirs.close()
    yield f"http://127.0.0.1:{ours.recv()}"
    process.terminate()
    process.join()


def serve(files: list[Path], delay: float, listed: int, connection: Connection) -> None:
    objects = {}
    for path in files:
        data = path.read_bytes()
        etag = hashlib.md5(data, usedforsecurity=False).hexdigest()
        objects[f"/{BUCKET}/{path.name}"] = data, f'ETag: "{etag}"\r\n'

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                method, target, _ = head.split(b"\r\n")[0].decode().split(" ", 2)
                await asyncio.sleep(delay)
                url = urlsplit(target)
                if url.query:
                    answer = _answer(_page(parse_qs(url.query), listed).encode())
                else:
                    answer = _answer(*objects[unquote(url.path)], asked=RANGE.search(head))
                if method == "HEAD":
                    answer = answer[: answer.index(b"\r\n\r\n") + 4]
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(client, "127.0.0.1", 0, limit=1 << 20)
        connection.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


RANGE = re.compile(rb"\r\nrange: bytes=(\d+)-(\d+)", re.IGNORECASE)


def _answer(body: bytes, more: str = "", asked: re.Match[bytes] | None = None) -> bytes:
    status, whole = "200 OK", len(body)
    if asked is not None:
        start, end = int(asked[1]), min(int(asked[2]), whole - 1)
        body, status = body[start : end + 1], "206 Partial Content"
        more += f"Content-Range: bytes {start}-{end}/{whole}\r\n"
    head = (
        f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{more}"
        "Last-Modified: Mon, 02 Nov 2026 00:00:00 GMT\r\n\r\n"
    )
    return head.encode() + body


def _page(query: dict[str, list[str]], listed: int) -> str:
    """A page of ListObjectsV2 over objects that are nowhere: 100 prefixes of the same number."""
    prefix = query.get("prefix", [""])[0]
    each = listed // PREFIXES
    if "delimiter" in query:
        folders = [f"{at:03d}/" for at in range(PREFIXES)] if not prefix else []
        inner = "".join(f"<CommonPrefixes><Prefix>{f}</Prefix></CommonPrefixes>" for f in folders)
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{inner}</ListBucketResult>"
    start = int(query.get("continuation-token", ["0"])[0])
    end = min(each, start + 1000)
    inner = "".join(
        f"<Contents><Key>{prefix}{at:08d}.jpg</Key><Size>110000</Size>"
        f'<LastModified>2026-11-02T00:00:00.000Z</LastModified><ETag>"{at:032x}"</ETag></Contents>'
        for at in range(start, end)
    )
    more = f"<NextContinuationToken>{end}</NextContinuationToken>" if end < each else ""
    truncated = "true" if more else "false"
    return (
        f"<ListBucketResult><IsTruncated>{truncated}</IsTruncated>{more}{inner}</ListBucketResult>"
    )


if __name__ == "__main__":
    main()
