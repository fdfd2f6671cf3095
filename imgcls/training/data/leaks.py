"""Images with the same bytes under different paths, such as a test image among training images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from imgcls.data import image_files
from imgcls.data.containers import members
from imgcls.data.decoding.image_features import compute_digest
from imgcls.data.storage.storage_settings import create_thread_pool
from imgcls.errors import ImageError, StorageCredentials, StorageError, StorageUnavailable

_IO_CONCURRENCY = 16
_UNREADABLE = -1


@dataclass(frozen=True)
class ContentMatches:
    """Images with the bytes of protected ones.

    same:                 index of each such image, and the URL of the protected one
    unreadable:           images that could not be compared, because they cannot be read
    unreadable_protected: protected images that could not be compared
    """

    same: dict[int, str]
    unreadable: frozenset[str] = frozenset()
    unreadable_protected: frozenset[str] = frozenset()


def find_same_content(
    urls: Sequence[str], protected: Sequence[str], *, max_bytes: int = image_files.MAX_IMAGE_BYTES
) -> ContentMatches:
    """Find each image with the bytes of a protected one.

    Only files of equal sizes are read. A file that cannot be read equals no other.

    max_bytes: maximum size of an image file; a larger one cannot be read
    Raises StorageCredentials and StorageUnavailable.
    """
    by_size = defaultdict(list)
    for url, size in zip(protected, _get_sizes(protected), strict=True):
        by_size[size].append(url)
    lost_protected = set(by_size.pop(_UNREADABLE, ()))
    if not by_size:
        return ContentMatches({}, unreadable_protected=frozenset(lost_protected))
    sizes = _get_sizes(urls)
    lost = {url for url, size in zip(urls, sizes, strict=True) if size == _UNREADABLE}
    candidates = [
        at
        for at, size in enumerate(sizes)
        if size != _UNREADABLE and (size is None or None in by_size or size in by_size)
    ]
    found_sizes = {sizes[at] for at in candidates}
    compared = [
        url
        for size, same_size in by_size.items()
        if size is None or None in found_sizes or size in found_sizes
        for url in same_size
    ]
    known: dict[bytes, str] = {}
    for url, digest in zip(compared, _compute_digests(compared, max_bytes), strict=True):
        if digest is None:
            lost_protected.add(url)
        else:
            known.setdefault(digest, url)
    same = {}
    digests = _compute_digests([urls[at] for at in candidates], max_bytes)
    for at, digest in zip(candidates, digests, strict=True):
        if digest is None:
            lost.add(urls[at])
        elif digest in known:
            same[at] = known[digest]
    return ContentMatches(same, frozenset(lost), frozenset(lost_protected))


def _get_sizes(urls: Sequence[str]) -> list[int | None]:
    """Size of each file in bytes, None where it is unknown, _UNREADABLE where there is no file."""
    with create_thread_pool(_IO_CONCURRENCY, "sizes") as pool:
        return list(pool.map(_find_size, urls))


def _find_size(url: str) -> int | None:
    if members.is_member_url(url):  # that of an image in base64 is not exact
        return None
    try:
        return image_files.get_size(url)
    except (StorageCredentials, StorageUnavailable):
        raise
    except (StorageError, ImageError):
        return _UNREADABLE


def _compute_digests(urls: Sequence[str], max_bytes: int) -> list[bytes | None]:
    """Digest of each file, None for one that cannot be read."""
    digests: list[bytes | None] = []
    for blob in image_files.read_ahead(urls, _IO_CONCURRENCY, max_bytes):
        if isinstance(blob, StorageUnavailable):
            raise blob
        digests.append(compute_digest(blob) if isinstance(blob, bytes) else None)
    return digests
