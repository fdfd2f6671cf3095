"""Base class of the archives of images: a file, the index of its members, and how one is read."""

from __future__ import annotations

import abc
from typing import ClassVar

from imgcls.data.containers import archive_index
from imgcls.data.containers.archive_file import ArchiveFile
from imgcls.data.containers.archive_index import ArchiveScan, Member
from imgcls.data.storage.range_file import RangeFile
from imgcls.data.storage.readahead import ReadAllowance
from imgcls.errors import ManifestError

TEXT_SUFFIXES = (".cls", ".txt", ".json")
"""Members with text of WebDataset samples."""
_MAX_TEXT_BYTES = 16 << 20


class Archive(abc.ABC):
    """An opened archive, a container in the sense of `members.Container`.

    kind: the key of CONTAINER_KINDS
    """

    kind: ClassVar[str]

    def __init__(self, url: str) -> None:
        """Raises StorageError where the file cannot be read as an archive of this kind."""
        self.url = url
        self.file = file = ArchiveFile(url)
        self.index = archive_index.load_index(
            self.kind, file.ranges, lambda: self.scan(file.ranges)
        )

    @classmethod
    @abc.abstractmethod
    def scan(cls, file: RangeFile) -> ArchiveScan:
        """Find the members of an archive; raises StorageError."""

    @abc.abstractmethod
    def read(self, member: str, allowance: ReadAllowance) -> bytes:
        """The bytes of a member; raises as `Container.read`."""

    def get_size(self, member: str) -> int:
        """Size of a member in bytes; raises StorageMissing and StorageError."""
        return self.find_member(member).size

    def find_member(self, name: str) -> Member:
        """A member that can be read; raises StorageMissing, or the error of its problem."""
        return archive_index.find_readable_member(self.index, self.url, name)

    def read_text(self, member: str) -> str:
        """The text of a member, without the white space around it.

        Raises ManifestError where it is not UTF-8, and StorageError.
        """
        data = self.index.texts.get(member)
        if data is None:
            data = self.read(member, ReadAllowance(_MAX_TEXT_BYTES))
        try:
            return data.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ManifestError(
                f"manifest {self.url}: member {member!r} is not UTF-8 text; write it as UTF-8"
            ) from error
