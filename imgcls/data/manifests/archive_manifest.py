"""Manifests of archives: the rows of many archives in order, listed concurrently.

The first archive with rows decides the columns. The fingerprint is made of path, size and version
of each archive, since reading all their bytes would take as long as labeling them.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import pyarrow as pa

from imgcls import log
from imgcls.data.manifests.archive_listing import ArchiveOptions, ArchiveRows, ArchiveValue
from imgcls.data.manifests.discovery import log_skipped_files
from imgcls.data.manifests.parquet_reader import READ_BATCH_ROWS
from imgcls.data.manifests.readers import ArchiveFormat
from imgcls.data.storage import filesystem, range_file
from imgcls.data.storage.storage_settings import create_thread_pool
from imgcls.errors import ManifestError, StorageError, StorageMissing, request_error

_LISTED_AHEAD = 4
_CONCURRENT_REQUESTS = 16
_MAX_NOTES = 10


def _find_type(values: Sequence[ArchiveValue]) -> pa.DataType:
    is_list = any(isinstance(value, list) for value in values)
    return pa.list_(pa.string()) if is_list else pa.string()


class ArchiveTable:
    """The rows of several archives as one table; the archives are listed at each pass.

    schema:       of text columns, the first one the path; labels may be lists of text
    label_column: None when unlabeled
    """

    def __init__(
        self,
        source: str,
        files: tuple[str, ...],
        format: ArchiveFormat,
        options: ArchiveOptions,
    ) -> None:
        """Raises ManifestError where an archive is missing or none has an image, StorageError."""
        self._source, self._options = source, options
        self._format = format
        self.files = tuple(filesystem.absolute(file) for file in files)
        self._versions = self._find_versions()
        self._first_at, self._first = self._find_first()
        self._has_logged = False
        names = list(self._first.columns)
        self.schema = pa.schema([(n, _find_type(v)) for n, v in self._first.columns.items()])
        self.label_column = self._find_label_column(names)
        for name in options.label_columns:
            if name not in self._first.fields:
                raise self._build_missing_error(name, names, "label_columns")

    def _find_versions(self) -> list[tuple[int, str | None]]:
        """Size and version of each archive."""

        def find(url: str) -> tuple[int, str | None] | None:
            try:
                file = range_file.open_ranges(url)
            except StorageMissing:
                return None
            return file.size, file.version

        with create_thread_pool(_CONCURRENT_REQUESTS, "archives") as pool:
            found = list(pool.map(find, self.files))
        missing = [url for url, each in zip(self.files, found, strict=True) if each is None]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ManifestError(
                f"manifest {self._source}: no such file: {', '.join(missing[:3])}{more}; correct "
                "the list"
            )
        return [each for each in found if each is not None]

    def _find_first(self) -> tuple[int, ArchiveRows]:
        """The first archive with rows, and its number."""
        skipped: Counter[str] = Counter()
        for at in range(len(self.files)):
            rows = self._list_rows(at)
            if rows.count:
                return at, rows
            skipped.update(rows.skipped)
        found = f" (found {', '.join(sorted(skipped))})" if skipped else ""
        raise ManifestError(
            f"manifest {self._source}: contains no image{found}; expected members like *.jpg or "
            "*.png"
        )

    def _find_label_column(self, names: list[str]) -> str | None:
        wanted = self._options.label_column
        if wanted is None:
            return "label" if "label" in names else None
        if wanted not in names or not any(
            value is not None for value in self._first.columns[wanted]
        ):
            raise self._build_missing_error(wanted, names, "label_column")
        return wanted

    def _build_missing_error(self, name: str, names: list[str], key: str) -> ManifestError:
        found = ", ".join(each for each in names if each != name)
        fields = ", ".join(self._first.fields)
        return ManifestError(
            f"manifest {self._source}: no column {name!r} (found: {found}"
            + (f"; JSON fields: {fields}" if fields else "")
            + f"); name it with {self._options.keys.option(key)}"
        )

    def _list_rows(self, at: int) -> ArchiveRows:
        url = self.files[at]
        try:
            archive = self._format.open(url)
        except StorageError as error:
            raise request_error(
                ManifestError, f"manifest {self._source}: {error}", error
            ) from error
        if (archive.file.size, archive.file.version) != self._versions[at]:
            raise ManifestError(
                f"manifest {url}: was replaced while it was read; rerun the command"
            )
        if archive.index.damage:
            raise ManifestError(f"manifest {url}: {archive.index.damage}")
        return self._format.list(archive, self._options)

    def iter_batches(self) -> Iterator[pa.RecordBatch]:
        """All rows, in the order of the archives; raises ManifestError and StorageError."""
        skipped: Counter[str] = Counter()
        notes: list[str] = []
        for at, rows in self._iter_rows():
            skipped.update(rows.skipped)
            notes += rows.notes
            yield from self._build_table(at, rows).to_batches(READ_BATCH_ROWS)
        if not self._has_logged:
            self._has_logged = True
            for note in notes[:_MAX_NOTES]:
                log.emit("note", note)
            if len(notes) > _MAX_NOTES:
                log.emit("note", f"manifest {self._source}: {len(notes) - _MAX_NOTES} more notes")
            log_skipped_files(self._source, skipped, "they are not the images of samples")

    def _iter_rows(self) -> Iterator[tuple[int, ArchiveRows]]:
        yield self._first_at, self._first  # before threads start: many callers read no more
        waiting: collections.deque[tuple[int, Future[ArchiveRows]]] = collections.deque()
        numbers = iter(range(self._first_at + 1, len(self.files)))
        with create_thread_pool(_LISTED_AHEAD, "archives") as pool:
            try:
                while True:
                    for at in itertools.islice(numbers, _LISTED_AHEAD - len(waiting)):
                        waiting.append((at, pool.submit(self._list_rows, at)))
                    if not waiting:
                        return
                    at, listing = waiting.popleft()
                    yield at, listing.result()
            finally:
                for _, listing in waiting:
                    listing.cancel()

    def _build_table(self, at: int, rows: ArchiveRows) -> pa.Table:
        """The rows in the columns of the first archive, null where it lacks one."""
        first, here = self.files[self._first_at], self.files[at]
        pairs = [(here, name, first) for name in rows.columns if name not in self.schema.names]
        labels = (*self._options.label_columns, *([self.label_column] if self.label_column else []))
        pairs += [(first, name, here) for name in labels if name not in rows.columns]
        if pairs and rows.count:
            has, name, lacks = pairs[0]
            raise ManifestError(
                f"manifest {has}: has the column {name!r}, and {lacks} has not; pass archives with "
                "the same columns"
            )
        columns = [self._build_column(field, rows, here) for field in self.schema]
        return pa.table(columns, schema=self.schema)

    def _build_column(self, field: pa.Field, rows: ArchiveRows, url: str) -> pa.Array:
        values = rows.columns.get(field.name, [None] * rows.count)
        is_list = pa.types.is_list(field.type)
        if any(value is not None and isinstance(value, list) != is_list for value in values):
            raise ManifestError(
                f"manifest {url}: {field.name!r} is a list in some samples and one text in others; "
                "write lists in all of them"
            )
        return pa.array(values, field.type)

    def compute_fingerprint(self) -> str:
        """BLAKE2b of path, size and version of each archive."""
        digest = hashlib.blake2b(digest_size=16)
        for url, (size, version) in zip(self.files, self._versions, strict=True):
            digest.update(f"{url}\0{size}\0{version}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()
