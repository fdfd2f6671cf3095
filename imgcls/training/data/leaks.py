"""Images with the same bytes under different paths, such as a test image among training images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from imgcls.data import image_files
from imgcls.data.containers import members
from imgcls.data.decoding.image_features import compute_digest
from imgcls.data.storage.storage_settings import create_thread_pool
from imgcls.errors import ImageError, StorageCredentials, StorageError

_IO_CONCURRENCY = 16


def find_same_content(
    urls: Sequence[str], protected: Sequence[str], *, max_bytes: int = image_files.MAX_IMAGE_BYTES
) -> dict[int, str]:
    """Index in `urls` of each image with the bytes of a protected one, and the URL of that one.

    Only files of equal sizes are read. A file that cannot be read equals no other.

    max_bytes: maximum size of an image file; a larger one cannot be read
    Raises StorageCredentials.
    """
    sizes, protected_sizes = _get_sizes(urls), _get_sizes(protected)
    by_size = defaultdict(list)
    for url, size in zip(protected, protected_sizes, strict=True):
        by_size[size].append(url)
    if None in by_size:
        candidates = list(range(len(urls)))
    else:
        candidates = [at for at, size in enumerate(sizes) if size is None or size in by_size]
    found_sizes = {sizes[at] for at in candidates}
    compared = (
        list(protected)
        if None in found_sizes
        else [url for size in (*found_sizes, None) for url in by_size.get(size, ())]
    )
    known: dict[bytes, str] = {}
    for url, digest in zip(compared, _compute_digests(compared, max_bytes), strict=True):
        if digest is not None:
            known.setdefault(digest, url)
    digests = _compute_digests([urls[at] for at in candidates], max_bytes)
    pairs = zip(candidates, digests, strict=True)
    return {at: known[digest] for at, digest in pairs if digest is not None and digest in known}


def _get_sizes(urls: Sequence[str]) -> list[int | None]:
    """Size of each file in bytes, None where it is unknown."""
    with create_thread_pool(_IO_CONCURRENCY, "sizes") as pool:
        return list(pool.map(_find_size, urls))


def _find_size(url: str) -> int | None:
    if members.is_member_url(url):  # that of an image in base64 is not exact
        return None
    try:
        return image_files.get_size(url)
    except StorageCredentials:
        raise
    except (StorageError, ImageError):
        return None


def _compute_digests(urls: Sequence[str], max_bytes: int) -> list[bytes | None]:
    blobs = image_files.read_ahead(urls, _IO_CONCURRENCY, max_bytes)
    return [compute_digest(blob) if isinstance(blob, bytes) else None for blob in blobs]
