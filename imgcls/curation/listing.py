"""Listing of a folder or a bucket into a manifest: `imgcls manifest build`.

Lists many prefixes at once and streams the images into one Parquet file per group of prefixes. The
rows of one source are in the same order every time. An interrupted listing is resumed: groups that
are complete are not listed again.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls import log
from imgcls.curation.config import ListingConfig
from imgcls.data.formats import (
    LISTING_DONE_FILE,
    LISTING_FILE,
    has_image_suffix,
    is_hidden_name,
)
from imgcls.data.manifests.discovery import format_suffix_counts, get_suffix, log_skipped_files
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import create_thread_pool, with_config_storage
from imgcls.data.storage.store import FileInfo
from imgcls.errors import OutputError, RequestError, StorageMissing
from imgcls.runs.lease import LEASE_FOLDER, Lease

_MAX_GROUPS = 64
_MAX_DEPTH = 3
_FLUSH_ROWS = 65_536
_SKIPPED_KEY = "imgcls.skipped"


@with_config_storage
def build_listing(config: ListingConfig, lease: Lease) -> int:
    """List all images below a folder; returns their number.

    Columns: path (string, absolute), size (int64, bytes), mtime (timestamp, UTC), etag (string,
    null on disks), and label with `labels`. Hidden files and files that are not images are skipped.
    The same command resumes an interrupted listing.
    Raises RequestError when there is no image, or one is next to the class folders; OutputError
    when the output has another manifest; RunFailed when the lease was lost.

    lease: of the output, or of a folder around it
    """
    started = time.monotonic()
    output = filesystem.absolute(config.output)
    source = filesystem.absolute(config.source).rstrip("/")
    groups = _plan_groups(config, source, output)
    parts = [_get_part_url(output, at) for at in range(len(groups) + 1)]
    present = set(filesystem.list_names(output))
    remaining = [at for at, part in enumerate(parts) if part.rpartition("/")[2] not in present]
    done = len(parts) - len(remaining)
    if done > 1:
        log.show(f"resume  {done:,} of {len(parts):,} groups are listed already")
    with create_thread_pool(config.list_concurrency, "list") as pool:
        tasks = [
            pool.submit(_list_group, groups[at - 1], parts[at], source, config) for at in remaining
        ]
        listed = 0
        try:
            for task in as_completed(tasks):
                listed += task.result()
                rate = listed / (time.monotonic() - started)
                log.show(f"listed  {listed:,} images ({rate:,.0f}/s)")
        except BaseException:
            for task in tasks:
                task.cancel()
            raise
    rows, skipped = _read_totals(parts)
    if rows == 0:
        for name in _list_own_files(output):
            filesystem.remove(filesystem.join(output, name))
        raise RequestError(
            f"{source}: no image below it; nothing to list"
            + (f" (skipped {format_suffix_counts(skipped)})" if skipped else "")
        )
    log_skipped_files(source, skipped, "their names are not those of images")
    lease.check()
    body = {
        "source": source,
        "rows": rows,
        "seconds": round(time.monotonic() - started, 3),
        "listed": datetime.datetime.now(datetime.UTC).isoformat(),
    }
    filesystem.write(
        filesystem.join(output, LISTING_DONE_FILE), (json.dumps(body, indent=2) + "\n").encode()
    )
    log.show(f"manifest   {rows:,} images: {output}")
    return rows


def has_other_listing(folder: str, source: str, labels: bool) -> bool:
    """Whether a folder has the listing, also an unfinished one, of another source."""
    request = _build_request(source, labels)
    try:
        stored = json.loads(filesystem.read(filesystem.join(folder, LISTING_FILE)))
    except StorageMissing:
        return False
    except ValueError:
        return True
    same: bool = {name: stored[name] for name in request} == request
    return not same


def _build_request(source: str, labels: bool) -> dict[str, Any]:
    """What a listing depends on."""
    return {"source": filesystem.absolute(source).rstrip("/"), "labels": labels}


def _plan_groups(config: ListingConfig, source: str, output: str) -> list[list[str]]:
    """Groups of folders to list recursively; an interrupted listing keeps its groups.

    The files above these folders are listed on the way down, into the first part.
    """
    request = _build_request(source, config.labels)
    url, first = filesystem.join(output, LISTING_FILE), _get_part_url(output, 0)
    ours = set(_list_own_files(output))
    if others := set(filesystem.list_names(output)) - ours - {LEASE_FOLDER}:
        raise OutputError(
            f"output {output}: contains other files ({min(others)}); pass another --output"
        )
    if config.overwrite:
        for name in (LISTING_DONE_FILE, *sorted(ours - {LISTING_DONE_FILE})):
            filesystem.remove(filesystem.join(output, name))
    elif LISTING_FILE in ours:
        stored: dict[str, Any] = json.loads(filesystem.read(url))
        same = {name: stored[name] for name in request} == request
        if not same or LISTING_DONE_FILE in ours:
            raise OutputError(
                f"output {output}: contains a manifest already; pass --overwrite, or another "
                "--output"
            )
        if first.rpartition("/")[2] in ours:
            return [list(group) for group in stored["groups"]]
    with _PartWriter.open(first, source, config.labels) as top:
        folders = _find_prefixes(top, source, config.list_concurrency)
        size = -(-len(folders) // _MAX_GROUPS) or 1
        groups = [folders[start : start + size] for start in range(0, len(folders), size)]
        # written before the first part appears, which could be read as a complete manifest
        filesystem.write(url, (json.dumps(request | {"groups": groups}) + "\n").encode())
    return groups


def _find_prefixes(top: _PartWriter, source: str, concurrency: int) -> list[str]:
    """Find enough folders to list in parallel, level by level; files above them go to `top`.

    The folders of a level are listed at once, each of several into a temporary file, so that `top`
    has their files in the order of the folders.
    """

    def list_into_part(folder: str, part: str) -> list[str]:
        with _PartWriter.open(part, source, top.has_labels) as writer:
            return _list_subfolders(folder, writer)

    folders = [source]
    for _ in range(_MAX_DEPTH):
        if len(folders) >= 2 * concurrency:
            break
        if len(folders) == 1:
            folders = sorted(_list_subfolders(folders[0], top))
            top.flush()  # before the rows of the next level
            continue
        with (
            tempfile.TemporaryDirectory() as temporary,
            create_thread_pool(concurrency, "list") as pool,
        ):
            parts = [_get_part_url(temporary, at) for at in range(len(folders))]
            found = list(pool.map(list_into_part, folders, parts))
            for part in parts:
                top.append(part)
        folders = sorted(each for below in found for each in below)
    return folders


def _list_subfolders(folder: str, writer: _PartWriter) -> list[str]:
    """Find the folders right below a folder; its files go to the writer."""
    below: list[str] = []
    bundle = False
    for page in filesystem.iter_pages(folder, deep=False):
        writer.add(page.files)
        below += [f for f in page.folders if not is_hidden_name(f.rpartition("/")[2])]
        bundle |= any(file.path.endswith("/bundle.json") for file in page.files)
    return [each for each in below if not (bundle and each.endswith("/plots"))]


def _list_group(group: Sequence[str], part: str, source: str, config: ListingConfig) -> int:
    with _PartWriter.open(part, source, config.labels) as writer:
        for folder in group:
            plots: set[str] = set()  # folders of bundles whose plots are not images of a data set
            for page in filesystem.iter_pages(folder, deep=True):
                plots |= {
                    file.path.removesuffix("bundle.json") + "plots/"
                    for file in page.files
                    if file.path.endswith("/bundle.json")
                }
                writer.add([f for f in page.files if not f.path.startswith(tuple(plots))])
    return writer.rows


class _PartWriter:
    """Writer of one Parquet file of the manifest.

    The file's metadata count the skipped files by suffix, so that a resumed listing knows them all.
    """

    def __init__(self, writer: pq.ParquetWriter, source: str) -> None:
        self.rows = 0
        self._writer, self._source = writer, source
        self._skipped: Counter[str] = Counter()
        self._pending: list[FileInfo] = []

    @classmethod
    @contextlib.contextmanager
    def open(cls, url: str, source: str, labels: bool) -> Iterator[_PartWriter]:
        label = [pa.field("label", pa.string())] if labels else []
        schema = pa.schema([*_SCHEMA, *label])
        with filesystem.open_write(url) as stream, pq.ParquetWriter(stream, schema) as writer:
            part = cls(writer, source)
            yield part
            part.flush()
            writer.add_key_value_metadata({_SKIPPED_KEY: json.dumps(part._skipped)})

    @property
    def has_labels(self) -> bool:
        return "label" in self._writer.schema.names

    def add(self, files: Sequence[FileInfo]) -> None:
        for file in files:
            path = file.path[len(self._source) :]
            if any(is_hidden_name(name) for name in path.split("/")):
                continue
            if has_image_suffix(path):
                self._pending.append(file)
            else:
                self._skipped[get_suffix(path)] += 1
        if len(self._pending) >= _FLUSH_ROWS:
            self.flush()

    def append(self, part: str) -> None:
        """Add the rows of another file that this class wrote."""
        with filesystem.open_read(part) as stream:
            file = pq.ParquetFile(stream)
            for batch in file.iter_batches(_FLUSH_ROWS):
                self._writer.write_batch(batch)
        self.rows += file.metadata.num_rows
        self._skipped.update(_read_skipped(file.metadata))

    def flush(self) -> None:
        """Write the rows that are held in memory."""
        self._writer.write_table(_build_table(self._pending, self._source, self._writer.schema))
        self.rows += len(self._pending)
        self._pending.clear()


def _get_part_url(output: str, at: int) -> str:
    return filesystem.join(output, f"part-{at:05d}.parquet")


def _list_own_files(output: str) -> list[str]:
    """The files of a listing in the output folder."""
    own = re.compile(rf"part-\d{{5}}\.parquet|{re.escape(LISTING_FILE)}|{LISTING_DONE_FILE}")
    return [name for name in filesystem.list_names(output) if own.fullmatch(name)]


def _build_table(files: Sequence[FileInfo], source: str, schema: pa.Schema) -> pa.Table:
    columns: dict[str, Any] = {
        "path": [file.path for file in files],
        "size": [file.size for file in files],
        "mtime": [file.mtime for file in files],
        "etag": [file.etag for file in files],
    }
    if "label" in schema.names:
        columns["label"] = list(_get_labels(files, source))
    return pa.table(columns, schema=schema)


def _get_labels(files: Sequence[FileInfo], source: str) -> Iterator[str]:
    for file in files:
        label, separator, _ = file.path[len(source) + 1 :].partition("/")
        if not separator:
            raise RequestError(
                f"{file.path}: is next to the class folders; move it into one, or omit --labels"
            )
        yield label


def _read_totals(parts: Sequence[str]) -> tuple[int, Counter[str]]:
    """The rows of all parts, and the files that were skipped, by suffix."""
    rows, skipped = 0, Counter[str]()
    for part in parts:
        with filesystem.open_read(part) as stream:
            metadata = pq.ParquetFile(stream).metadata
        rows += metadata.num_rows
        skipped.update(_read_skipped(metadata))
    return rows, skipped


def _read_skipped(metadata: pq.FileMetaData) -> dict[str, int]:
    return json.loads(metadata.metadata.get(_SKIPPED_KEY.encode(), b"{}"))  # type: ignore[no-any-return]


_SCHEMA = (
    pa.field("path", pa.string()),
    pa.field("size", pa.int64()),
    pa.field("mtime", pa.timestamp("us", tz="UTC")),
    pa.field("etag", pa.string()),
)
