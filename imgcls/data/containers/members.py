"""Files that contain many images: archives, and tables with a column of image bytes.

An image in one of them is named by a member URL, KIND://FILE#MEMBER, where FILE is an absolute path
or a URL: `tar:///data/000.tar#cats/1.jpg`, `tar://s3://bucket/000.tar#cats/1.jpg`. A new kind is a
module with its reader, and a line in `CONTAINER_KINDS`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

from imgcls.data.containers import archive_index
from imgcls.data.containers.load_cache import LoadCache
from imgcls.data.containers.parquet_images import ParquetImages
from imgcls.data.containers.tar_archive import TarArchive
from imgcls.data.containers.zip_archive import ZipArchive
from imgcls.data.storage import filesystem, range_file
from imgcls.data.storage.error_details import shorten_url
from imgcls.data.storage.readahead import ReadAllowance
from imgcls.data.storage.storage_settings import current_settings
from imgcls.errors import StorageMissing

_OPEN_CONTAINERS = 16
"""Maximum number of containers that a process keeps open."""


class Container(Protocol):
    """An opened file with many images; several threads read from it at the same time."""

    def read(self, member: str, allowance: ReadAllowance) -> bytes:
        """The bytes of a member.

        Raises StorageMissing for a member that is not in the file, StorageTooLarge and BudgetFull
        before more is read than is allowed, ImageError for a member that is damaged, and
        StorageError.
        """

    def get_size(self, member: str) -> int:
        """Size of a member in bytes; raises StorageMissing and StorageError."""


@dataclass(frozen=True)
class ContainerKind:
    """A kind of file with many images.

    suffixes: of the files, in lower case with the dot
    open:     opens a file by its path or URL; raises StorageError
    """

    suffixes: tuple[str, ...]
    open: Callable[[str], Container]


CONTAINER_KINDS: dict[str, ContainerKind] = {
    "tar": ContainerKind((".tar",), TarArchive),
    "zip": ContainerKind((".zip",), ZipArchive),
    "parquet": ContainerKind((".parquet", ".pq"), ParquetImages),
}


@dataclass(frozen=True)
class MemberUrl:
    """A member of a container: `str` of it is its URL."""

    kind: str
    file: str
    member: str

    def __str__(self) -> str:
        return f"{self.kind}://{self.file}#{self.member}"


def is_member_url(url: str) -> bool:
    """Whether a URL has the protocol of a kind of container."""
    return url.partition("://")[0] in CONTAINER_KINDS and "://" in url


def find_member(url: str) -> MemberUrl | None:
    """The member that a URL names; None for other URLs, and for one of a kind without a member.

    The member starts after the first # that follows a suffix of the kind, since a path may contain
    # itself; else after the first #.
    """
    if not is_member_url(url):
        return None
    kind, _, rest = url.partition("://")
    found = _compile_member_start(kind).search(rest)
    at = found.end() - 1 if found else rest.find("#")
    return MemberUrl(kind, rest[:at], rest[at + 1 :]) if 0 < at < len(rest) - 1 else None


def parse_member_url(url: str) -> MemberUrl:
    """The member that a URL of a kind of container names; raises StorageMissing without one."""
    found = find_member(url)
    if found is None:
        kind = url.partition("://")[0]
        raise StorageMissing(
            f"{shorten_url(url)}: names no member; write it as {kind}://FILE#MEMBER"
        )
    return found


@functools.cache
def _compile_member_start(kind: str) -> re.Pattern[str]:
    suffixes = "|".join(re.escape(suffix) for suffix in CONTAINER_KINDS[kind].suffixes)
    return re.compile(f"({suffixes})#", re.IGNORECASE)


def find_file(url: str) -> str:
    """The file that holds an image's bytes: the container of a member, else the image itself."""
    member = find_member(url)
    return url if member is None else member.file


def read_member(url: str, allowance: ReadAllowance) -> bytes:
    """Read a member of a container, see `Container.read`.

    In a run, an archive in a store is opened once, and one that is replaced meanwhile is an error.
    """
    name = parse_member_url(url)
    try:
        return open_container(name.kind, name.file).read(name.member, allowance)
    except StorageMissing:
        if archive_index.get_index_folder() is not None or filesystem.is_local(name.file):
            raise
        _opened.discard(_build_key(name.kind, name.file))
        return open_container(name.kind, name.file).read(name.member, allowance)


def open_container(kind: str, file: str) -> Container:
    """Open a container, or take it from those that are open; raises StorageError.

    A local file that was replaced is opened again.
    """
    return _opened.get(_build_key(kind, file), lambda: CONTAINER_KINDS[kind].open(file))


def _build_key(kind: str, file: str) -> Hashable:
    version = range_file.get_local_version(file) if filesystem.is_local(file) else None
    return kind, file, version, current_settings(), archive_index.get_index_folder()


_opened: LoadCache[Container] = LoadCache(_OPEN_CONTAINERS, lambda container: 1)
