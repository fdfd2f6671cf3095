"""Base classes of the adapters of stores: everything that differs from one kind to another.

A new kind of store is a subclass in a module of its own, and a line in `stores`. Retries, typed
errors and the order of requests are the same for all of them, see `object_store`.
"""

from __future__ import annotations

import datetime
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from imgcls.data.storage.host_limiter import HostLimiter
from imgcls.data.storage.readahead import ReadAllowance
from imgcls.data.storage.storage_settings import StorageConfig

GET, PUT, LIST, DELETE = "s3:GetObject", "s3:PutObject", "s3:ListBucket", "s3:DeleteObject"
"""Permissions that requests need, by their S3 names."""


@dataclass(frozen=True)
class FileInfo:
    """A file in a listing: URL, bytes, modification time in UTC, version; None where unknown.

    etag: the ETag of S3 and Azure, or the generation of GCS; it changes with the content
    """

    path: str
    size: int | None
    mtime: datetime.datetime | None
    etag: str | None


@dataclass(frozen=True)
class ListingPage:
    """One page of a listing: URLs of folders, and files."""

    folders: list[str]
    files: list[FileInfo]


ReadObject = Callable[[str], Awaitable[bytes]]
"""Reads the object at a path of the file system; called once per attempt."""

ReadCached = Callable[[], Awaitable[bytes | None]]
"""Reads an object from a local cache; None where that does not have it."""

ListPage = Callable[[Any], Awaitable[tuple[ListingPage, Any]]]
"""Requests the page of a listing that a token names, the first one for None. Returns it with the
token of the next page, or None after the last one; called once per attempt."""


class Store:
    """A store reached through its fsspec driver, under the settings of one job.

    This class serves every protocol of fsspec that has no subclass: the driver reads and lists.

    protocols:          of the URLs, such as ("s3", "s3a")
    creates_atomically: whether an object can be created only where there is none
    rejects_with_401:   whether status 401 means bad credentials; that of a web server may concern
                        one page
    put_options:        arguments of the driver's methods that write, for one request per object
    """

    protocols: ClassVar[tuple[str, ...]] = ()
    creates_atomically: ClassVar[bool] = False
    rejects_with_401: ClassVar[bool] = False
    put_options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, protocol: str, settings: StorageConfig, account: str | None = None) -> None:
        self.file_system = self.build_file_system(protocol, settings, account)

    def build_file_system(self, protocol: str, settings: StorageConfig, account: str | None) -> Any:
        """The file system of fsspec, without its cache of listings.

        A cached listing would hide files that other processes have written since.
        """
        import fsspec

        return fsspec.filesystem(protocol, use_listings_cache=False)

    def get_path(self, url: str) -> str:
        """The path of a URL in the syntax of the file system."""
        path: str = self.file_system._strip_protocol(url)
        return path

    def start_read(self, url: str, allowance: ReadAllowance) -> ReadObject | None:
        """The function that reads one object on the file system's event loop.

        It raises StorageTooLarge and BudgetFull before more is read than is allowed, and
        StorageUnavailable for damaged bytes. None: the driver reads, in the calling thread.
        """
        return None

    async def read_range(self, path: str, start: int, end: int, version: str | None) -> bytes:
        """The bytes from `start` up to `end` of an object, on the file system's event loop.

        version: of the object, where it is known; a store that can compare it raises StorageChanged
            for an object of another version
        """
        data: bytes = await self.file_system._cat_file(path, start=start, end=end)
        return data

    def start_cached_read(self, url: str, allowance: ReadAllowance) -> ReadCached | None:
        """The function that reads an object without a request, before any; None without a cache.

        It raises as that of `start_read` does.
        """
        return None

    def start_listing(self, url: str, path: str, *, deep: bool) -> ListPage | None:
        """The function that lists a folder page by page, on the file system's event loop.

        deep: list all files below the folder; otherwise its own files and folders

        None: the driver lists, in one page.
        """
        return None

    def get_host_limiter(self, url: str) -> HostLimiter | None:
        """The limit of requests to a URL's host; None without one."""
        return None

    @classmethod
    def get_account(cls, url: str) -> str | None:
        """The account that a URL names, which needs a file system of its own; None without one."""
        return None

    @classmethod
    def build_url(cls, url: str, path: str) -> str:
        """The URL of a path from a listing of the file system of `url`."""
        return path if "://" in path else f"{url.partition(':')[0]}://{path}"

    @classmethod
    def describe_permission(cls, permission: str) -> str:
        """The remedy for a refused request, by the permission that it needs; empty if unknown."""
        return ""


class BucketStore(Store):
    """A store of objects in buckets or containers.

    title:            name of the store in messages
    permission_kind:  word for an entry of permission_names
    permission_names: names of GET, PUT, LIST and DELETE in the store, where they differ
    """

    creates_atomically = True
    title: ClassVar[str]
    permission_kind: ClassVar[str] = "permission"
    permission_names: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def build_url(cls, url: str, path: str) -> str:
        return cls.build_key_url(url, path.partition("/")[2])

    @classmethod
    def build_key_url(cls, url: str, key: str) -> str:
        """The URL of a key in the bucket of `url`."""
        protocol, _, rest = url.partition("://")
        return f"{protocol}://{rest.partition('/')[0]}/{key}"

    @classmethod
    def describe_permission(cls, permission: str) -> str:
        if not permission:
            return ""
        name = cls.permission_names.get(permission, permission)
        return f"; the request needs the {cls.permission_kind} {name}"
