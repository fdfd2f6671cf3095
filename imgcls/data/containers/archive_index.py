"""Index of an archive: where the bytes of each member are, found once and kept for other processes.

An index of an archive in a store, or of a large one, is also written to a folder of the run (see
`use_index_folder`), because finding the members of a tar means reading most of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgcls.data.containers.load_cache import LoadCache
from imgcls.data.storage import filesystem
from imgcls.data.storage.error_details import shorten_url
from imgcls.data.storage.range_file import RangeFile
from imgcls.data.storage.storage_settings import current_settings
from imgcls.errors import ImageError, StorageError, StorageMissing, TruncatedImage

MIN_KEPT_MEMBERS = 10_000
"""Members of a local archive from which on its index is written: a smaller archive is indexed as
fast as its index is loaded."""
_CACHED_MEMBERS = 2_000_000
"""Maximum number of members in the indexes that a process keeps, about 100 bytes each."""
_BATCH_MEMBERS = 65_536
_FORMAT_VERSION = 2
_LINK = "link: "
_MAX_LINKS = 8


class Member(NamedTuple):
    """A file in an archive.

    name:    without a leading ./; bytes that are not UTF-8 are written as \\xNN
    offset:  of its header in the archive
    size:    bytes of the file
    stored:  bytes of it in the archive, compressed or not
    method:  compression method of a zip; 0 for none
    crc:     CRC-32 of the file in a zip, of its header in a tar
    problem: why it cannot be read, as "STATUS: TEXT"; empty for a sound member
    """

    name: str
    offset: int
    size: int
    stored: int
    method: int = 0
    crc: int = 0
    problem: str = ""


_SCHEMA = pa.schema(
    [
        ("name", pa.large_string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("stored", pa.int64()),
        ("method", pa.int32()),
        ("crc", pa.int64()),
        ("problem", pa.large_string()),
    ]
)
_ERRORS: dict[str, type[StorageError | ImageError]] = {
    "truncated": TruncatedImage,
    "missing": StorageMissing,
    "unreadable": StorageError,
}


@dataclass
class ArchiveScan:
    """The members of an archive in its order, and what else was found.

    damage: why members may be missing from the list; empty for a sound archive
    note:   what a user should know about a readable archive
    texts:  contents of small text members by name; not all of them
    """

    members: Iterator[Member]
    damage: str = ""
    note: str = ""
    texts: dict[str, bytes] | None = None


class MemberIndex:
    """The members of an archive by name; of several with one name the last one, as tar extracts.

    damage, note, texts: see `ArchiveScan`
    places:              the files in which it is kept
    """

    def __init__(
        self,
        table: pa.Table,
        damage: str = "",
        note: str = "",
        texts: dict[str, bytes] | None = None,
    ) -> None:
        """table: one row per member, with the columns of `Member`"""
        self._table = table.combine_chunks()
        self.damage, self.note, self.texts = damage, note, texts or {}
        self.places: set[str] = set()
        self._names = self._table.column("name")
        # Arrow takes 1 us for a value, numpy 0.1 us
        self._numbers = [self._table.column(at).to_numpy() for at in range(1, 6)]
        self._has_problem = pc.not_equal(self._table.column("problem"), "").to_numpy()
        hashes = _hash_names(self._names)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def find(self, name: str) -> Member | None:
        """A member by name; links are followed within the archive. None if there is none."""
        name = name.removeprefix("./")
        found = self._find_plain(name)
        for _ in range(_MAX_LINKS):
            if found is None or not found.problem.startswith(_LINK):
                return found and found._replace(name=name)
            target = found.problem.removeprefix(_LINK)
            other = self._find_plain(target)
            if other is None:
                problem = f"missing: is a link to {target!r}, which is not in the archive"
                return found._replace(name=name, problem=problem)
            found = other
        return found and found._replace(name=name, problem="missing: is a link to other links")

    def iter_members(self) -> Iterator[Member]:
        """The members in the order of the archive, without those that a later one replaces."""
        replaced = self._find_replaced()
        row = 0
        for batch in self._table.to_batches(_BATCH_MEMBERS):
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                if row not in replaced:
                    yield Member(*values)
                row += 1

    @property
    def replaced_count(self) -> int:
        """Number of members that a later one of the same name replaces."""
        return len(self._find_replaced())

    def _find_plain(self, name: str) -> Member | None:
        """The last member of a name, without following a link."""
        code = hash(name)
        at = int(self._hashes.searchsorted(code))
        found = None
        while at < len(self._hashes) and self._hashes[at] == code:
            row = int(self._order[at])
            if self._names[row].as_py() == name:
                found = row
            at += 1
        if found is None:
            return None
        offset, size, stored, method, crc = (int(values[found]) for values in self._numbers)
        problem = self._table.column("problem")[found].as_py() if self._has_problem[found] else ""
        return Member(name, offset, size, stored, method, crc, problem)

    def _find_replaced(self) -> set[int]:
        replaced = set()
        for at in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]).tolist():
            # names with one hash are few: each is compared with the later ones
            row = int(self._order[at])
            name = self._names[row].as_py()
            for later in range(at + 1, len(self._hashes)):
                if self._hashes[later] != self._hashes[at]:
                    break
                if self._names[int(self._order[later])].as_py() == name:
                    replaced.add(row)
                    break
        return replaced

    def encode(self) -> bytes:
        """The index as a Parquet file."""
        sink = io.BytesIO()
        metadata = {"damage": self.damage, "note": self.note}
        pq.write_table(self._table.replace_schema_metadata(metadata), sink, compression="zstd")
        return sink.getvalue()

    @classmethod
    def decode(cls, data: bytes) -> MemberIndex:
        """The index in a Parquet file; raises pa.ArrowException for a damaged one."""
        table = pq.read_table(io.BytesIO(data))
        found = table.schema.metadata or {}
        table = table.replace_schema_metadata(None).cast(_SCHEMA)
        return cls(table, found.get(b"damage", b"").decode(), found.get(b"note", b"").decode())


def _hash_names(names: pa.ChunkedArray) -> np.ndarray:
    parts = [names.slice(at, _BATCH_MEMBERS) for at in range(0, len(names), _BATCH_MEMBERS)]
    codes = (hash(name) for part in parts for name in part.to_pylist())
    return np.fromiter(codes, np.int64, len(names))


def build_index(scan: ArchiveScan) -> MemberIndex:
    """The index of the members that a scan finds."""
    batches = []
    while chunk := list(itertools.islice(scan.members, _BATCH_MEMBERS)):
        columns = zip(*chunk, strict=True)
        arrays = [
            pa.array(values, type) for values, type in zip(columns, _SCHEMA.types, strict=True)
        ]
        batches.append(pa.record_batch(arrays, schema=_SCHEMA))
    table = pa.Table.from_batches(batches, _SCHEMA)
    return MemberIndex(table, scan.damage, scan.note, scan.texts)


def describe_link(target: str) -> str:
    """The `problem` of a link to another member, which `MemberIndex.find` follows."""
    return _LINK + target.removeprefix("./")


def decode_name(raw: bytes) -> str:
    """The name of a member as text."""
    return raw.decode("utf-8", "backslashreplace").removeprefix("./")


def find_readable_member(index: MemberIndex, url: str, name: str) -> Member:
    """A member that can be read; raises StorageMissing, or the error of its problem."""
    found = index.find(name)
    if found is None:
        rest = f" ({index.damage})" if index.damage else ""
        raise StorageMissing(f"{shorten_url(url)}: has no member {name!r}{rest}")
    if found.problem:
        status, _, text = found.problem.partition(": ")
        raise _ERRORS[status](f"{shorten_url(url)}#{name}: {text}")
    return found


_folder: ContextVar[str | None] = ContextVar("imgcls_index_folder", default=None)


class _Process:
    folder: str | None = None


@contextlib.contextmanager
def use_index_folder(folder: str) -> Iterator[None]:
    """Within the block, in this thread, indexes are written to a folder and loaded from it."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def set_process_index_folder(folder: str | None) -> None:
    """As `use_index_folder`, for a process of one run, such as a worker; None for no folder."""
    _Process.folder = folder


def get_index_folder() -> str | None:
    """The folder that applies here; None outside of a run."""
    return _folder.get() or _Process.folder


def load_index(kind: str, file: RangeFile, scan: Callable[[], ArchiveScan]) -> MemberIndex:
    """The index of an archive, from this process, else the folder of indexes, else a scan.

    kind: of the container
    Raises StorageError where the archive, or the folder of indexes, cannot be read.
    """
    folder = get_index_folder()
    place = None
    if folder is not None and file.version is not None:
        place = filesystem.join(folder, _build_file_name(kind, file))
    key = (kind, file.url, file.version, file.size, current_settings())
    index = _indexes.get(key, lambda: _find_kept(place, scan))
    is_slow = not filesystem.is_local(file.url) or len(index) >= MIN_KEPT_MEMBERS
    if place is not None and is_slow and place not in index.places:
        filesystem.write(place, index.encode())
        index.places.add(place)
    return index


def _find_kept(place: str | None, scan: Callable[[], ArchiveScan]) -> MemberIndex:
    if place is not None:
        with contextlib.suppress(StorageMissing, pa.ArrowException):  # a damaged one is built again
            index = MemberIndex.decode(filesystem.read(place))
            index.places.add(place)
            return index
    return build_index(scan())


def _build_file_name(kind: str, file: RangeFile) -> str:
    text = "\0".join([kind, file.url, str(file.version), str(file.size)])
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return f"{digest}.v{_FORMAT_VERSION}.parquet"


def _count_members(index: MemberIndex) -> int:
    return 1 + len(index)


_indexes: LoadCache[MemberIndex] = LoadCache(_CACHED_MEMBERS, _count_members)
