"""Cache of images from web servers in a local folder, by URL.

An image is stored under the hash of its URL, and read again without a request: it counts as
unchanged as long as the folder has it. Several processes may share a folder. Nothing is removed
from it. A damaged entry, also of a machine that lost power, is found by its checksum and replaced.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from typing import BinaryIO

from imgcls.data.storage.disk import temporary_name
from imgcls.data.storage.readahead import ReadAllowance, too_large_error

logger = logging.getLogger(__name__)

_MAGIC = b"imgcls http cache 1\n"
_MAX_HEADER_BYTES = 1 << 20
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class CachedImage:
    """An entry: the body of a response, and its X-Robots-Tag headers."""

    data: bytes
    robots: tuple[str, ...]


@dataclass(frozen=True)
class _Header:
    """First line of an entry, as JSON; digest: hexadecimal BLAKE2b of the `length` bytes."""

    url: str
    length: int
    digest: str
    robots: list[str]


class HttpCache:
    """A folder of images by URL; thread-safe, also between processes."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._has_failed = False

    def read(self, url: str, allowance: ReadAllowance) -> CachedImage | None:
        """The image at a URL; None where there is none, or its entry is damaged.

        Raises StorageTooLarge and BudgetFull.
        """
        try:
            with open(self._get_path(url), "rb") as stream:
                return self._read_entry(url, stream, allowance)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._log_once(f"cannot be read ({error})")
            return None

    def _read_entry(
        self, url: str, stream: BinaryIO, allowance: ReadAllowance
    ) -> CachedImage | None:
        header = _parse_header(stream)
        if header is None or header.url != url:
            return None
        if allowance.is_exceeded_by(header.length):
            raise too_large_error(url, allowance.max_bytes, header.length)
        allowance.reserve(header.length)
        data = stream.read(header.length + 1)
        if len(data) != header.length or _hash(data) != header.digest:
            allowance.release()
            return None
        return CachedImage(data, tuple(header.robots))

    def write(self, url: str, data: bytes, robots: list[str]) -> None:
        """Store the image at a URL; a folder that cannot be written is logged once."""
        path = self._get_path(url)
        temporary = temporary_name(path)
        header = _Header(url, len(data), _hash(data), robots)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            try:
                with open(temporary, "wb") as stream:
                    stream.write(_MAGIC + json.dumps(asdict(header)).encode() + b"\n")
                    stream.write(data)
                os.replace(temporary, path)
            except BaseException:
                if os.path.exists(temporary):
                    os.unlink(temporary)
                raise
        except OSError as error:
            self._log_once(f"cannot be written ({error}); later passes fetch these images again")

    def _get_path(self, url: str) -> str:
        name = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()
        return os.path.join(self._folder, name[:2], name)

    def _log_once(self, problem: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            logger.warning("the HTTP cache %s %s", self._folder, problem)


def _parse_header(stream: BinaryIO) -> _Header | None:
    """The header of an entry; None where it is damaged."""
    if stream.read(len(_MAGIC)) != _MAGIC:
        return None
    try:
        return _Header(**json.loads(stream.readline(_MAX_HEADER_BYTES)))
    except (ValueError, TypeError):
        return None


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()
