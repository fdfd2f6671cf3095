"""Store of decisions: a folder on a disk or an object store that all replicas share.

    labels/ana-1f3a9c0e.parquet                      labels table of an annotator, to be read
    labels/_decisions/ana-1f3a9c0e.00000042.parquet  record of an annotator, version 42

The records are the truth. Version n + 1 contains all of version n and one change, and is created
only if it does not exist: of two replicas that change a record at once one wins, and the other
reads the new version and repeats its change. No lock is needed, and a killed replica leaves nothing
behind that another one waits for.

An update is acknowledged after three steps: the version is created, the labels table is replaced,
and a listing shows that the version is the newest. The listing covers two cases. A replica that
was suspended may create a version that was superseded and removed long ago, and it may replace the
table by an older one; both times it finds a newer version and repeats its change or the table. A
replica that is killed between the steps may leave an older table; a repeated request, the next
decision, or the start of a replica replaces it.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import pyarrow as pa

from imgcls.data.storage import disk, filesystem
from imgcls.errors import OutputError, StorageError, StorageMissing, StorageUnavailable
from imgcls.runs.lease import check_create_is_exclusive
from imgcls.serving.labeling.decisions import (
    AnnotatorRecord,
    decode_record,
    encode_labels_table,
    encode_record,
)

DECISIONS_FOLDER = "_decisions"
MAX_ANNOTATORS = 100
"""Maximum number of annotators of one queue."""
_MAX_ATTEMPTS = 50
"""Attempts of an update; each one that fails is an update of the same record elsewhere."""
_KEPT_VERSIONS = 2
_TEMPORARY_FILE_AGE_S = 600.0
_RECORD_NAME = re.compile(r"(.+)\.(\d{8})\.parquet")

Change = Callable[[AnnotatorRecord, Mapping[str, AnnotatorRecord]], AnnotatorRecord | None]
"""Computes a changed record from the newest one and all records; None to change nothing."""


class DecisionStore:
    """The records and labels tables of all annotators; used by several threads.

    output:  folder or URL
    several: images may have several labels
    """

    def __init__(self, output: str, *, several: bool) -> None:
        self._output = output
        self._several = several
        self._folder = filesystem.join(output, DECISIONS_FOLDER)
        self._records: dict[str, AnnotatorRecord] = {}

    @classmethod
    def open(cls, output: str, *, several: bool) -> DecisionStore:
        """Open or create a store, and replace labels tables that a killed replica left behind.

        Raises OutputError if the folder cannot be written, has decisions of the other kind of task,
        or is on a store without create-if-absent.
        """
        store = cls(output, several=several)
        try:
            store._check_writable()
            store._repair_tables()
        except OutputError:
            raise
        except StorageError as error:
            raise OutputError(f"labeling.output {output}: {error}") from error
        return store

    def read_all(self) -> dict[str, AnnotatorRecord]:
        """The newest records, by annotator. Raises StorageError."""
        return {each.annotator: each for each in self._refresh().values()}

    def update(
        self, annotator: str, change: Change, *, publish: bool
    ) -> tuple[AnnotatorRecord, Mapping[str, AnnotatorRecord]]:
        """Apply a change to the record of an annotator, once, also if others change it meanwhile.

        change:  returns None to change nothing; the record of a new annotator is then not created
        publish: replace the labels table; also done if the change returns None, since the change
            may be that of an earlier request whose replica was killed before this step
        Returns the newest record, and those of all annotators. Raises StorageError, and OutputError
        for too many annotators.
        """
        key = _build_key(annotator)
        for attempt in range(_MAX_ATTEMPTS):
            if attempt:
                time.sleep(random.uniform(0, 0.02 * min(attempt, 10)))
            records = self.read_all()
            own = records.get(annotator, AnnotatorRecord(annotator))
            if annotator not in records and len(records) >= MAX_ANNOTATORS:
                raise OutputError(
                    f"there are {MAX_ANNOTATORS} annotators already, the maximum. Label under an "
                    "existing name"
                )
            changed = change(own, records)
            if changed is None:
                if not publish or own.version == 0 or self._publish(key, own):
                    return own, records
                continue
            changed = replace(changed, version=own.version + 1)
            data = encode_record(changed, several=self._several)
            if not filesystem.create(self._get_record_url(key, changed.version), data):
                continue
            is_newest = self._publish(key, changed) if publish else self._check_newest(key, changed)
            if is_newest:
                self._records[key] = changed
                return changed, records
        raise StorageUnavailable(
            f"{self._folder}: the decisions of {annotator} are being changed by other requests"
        )

    def _publish(self, key: str, record: AnnotatorRecord) -> bool:
        """Replace a labels table; returns whether the record is still the newest afterwards."""
        table = encode_labels_table(record, several=self._several)
        filesystem.write(self._get_table_url(key), table)
        return self._check_newest(key, record)

    def _check_newest(self, key: str, record: AnnotatorRecord) -> bool:
        """Whether a record is the newest of its annotator; if so, removes the old ones."""
        versions = self._list_versions().get(key, [0])
        if max(versions) != record.version:
            return False
        with contextlib.suppress(StorageError):  # the next update removes them
            for version in versions:
                if version <= record.version - _KEPT_VERSIONS:
                    filesystem.remove(self._get_record_url(key, version))
        return True

    def _refresh(self) -> dict[str, AnnotatorRecord]:
        """The newest records by key; reads only those that have changed."""
        while True:
            versions = self._list_versions()
            try:
                found = {
                    key: known
                    if (known := self._records.get(key)) and known.version == max(numbers)
                    else self._read_record(key, max(numbers))
                    for key, numbers in versions.items()
                }
            except StorageMissing:  # superseded and removed meanwhile
                continue
            self._records = found
            return found

    def _list_versions(self) -> dict[str, list[int]]:
        versions: dict[str, list[int]] = {}
        for name in filesystem.list_names(self._folder):
            match = _RECORD_NAME.fullmatch(name)
            if match:
                versions.setdefault(match[1], []).append(int(match[2]))
        return versions

    def _read_record(self, key: str, version: int) -> AnnotatorRecord:
        url = self._get_record_url(key, version)
        try:
            record, several = decode_record(filesystem.read(url), version)
        except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise OutputError(
                f"{url}: is damaged ({error}). Stop the service, move this file away to continue "
                "with the version before it, and start the service again"
            ) from error
        if several != self._several:
            kinds = ("one label per image", "several labels per image")
            raise OutputError(
                f"labeling.output {self._output}: has decisions with {kinds[several]}, but the "
                f"model has {kinds[self._several]}; pass another --labeling.output"
            )
        return record

    def _check_writable(self) -> None:
        """Check that files can be written and created exclusively."""
        filesystem.check_writable(self._output)
        if filesystem.is_local(self._output):
            folder = filesystem.local_path(self._output)
            if not disk.has_hard_links(folder):
                raise OutputError(
                    f"labeling.output {self._output}: the file system has no hard links, by which "
                    "files are created exclusively; pass a folder on another disk, or an s3:// URL"
                )
            for each in (self._output, self._folder):
                filesystem.remove_temporary_files(each, _TEMPORARY_FILE_AGE_S)
            return
        probe = filesystem.join(self._folder, f"_probe-{random.getrandbits(64):016x}")
        filesystem.create(probe, b"imgcls")
        try:
            check_create_is_exclusive(probe, "two replicas", "--labeling.output")
        finally:
            filesystem.remove(probe)

    def _repair_tables(self) -> None:
        for key, record in self._refresh().items():
            table = encode_labels_table(record, several=self._several)
            while record.decisions and self._read_table(key) != table:
                if self._publish(key, record):
                    break
                record = self._refresh()[key]
                table = encode_labels_table(record, several=self._several)

    def _read_table(self, key: str) -> bytes | None:
        try:
            return filesystem.read(self._get_table_url(key))
        except StorageMissing:
            return None

    def _get_record_url(self, key: str, version: int) -> str:
        return filesystem.join(self._folder, f"{key}.{version:08d}.parquet")

    def _get_table_url(self, key: str) -> str:
        return filesystem.join(self._output, f"{key}.parquet")


def _build_key(annotator: str) -> str:
    """Name of an annotator's files, also on disks that ignore case: a readable part and a hash."""
    readable = re.sub(r"[^a-z0-9]+", "-", annotator.lower()).strip("-")[:40] or "annotator"
    return f"{readable}-{hashlib.sha256(annotator.encode()).hexdigest()[:8]}"
