"""Queue of images to label: the rows of a manifest, in their order."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from imgcls import log
from imgcls.data.manifests.image_urls import read_urls
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.data.manifests.options import KeyNames
from imgcls.data.storage.credentials import hide_credentials
from imgcls.errors import RequestError
from imgcls.formatting import format_count

MAX_IMAGES = 50_000
"""Maximum number of images: the decisions of an annotator are written again with each one."""
_KEYS = KeyNames("labeling.manifest")


@dataclass(frozen=True)
class LabelingQueue:
    """The images to label. An image is identified by its absolute path; `row` is its index here.

    paths:    absolute paths or URLs, each once
    names:    text of each path in the manifest, for the page
    queue_id: hash of the paths; requests with a row carry it, since the row is valid only with it
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    queue_id: str = field(init=False)
    _rows: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256("\0".join(self.paths).encode("utf-8", "surrogatepass"))
        object.__setattr__(self, "queue_id", digest.hexdigest()[:16])
        object.__setattr__(self, "_rows", {path: row for row, path in enumerate(self.paths)})

    def __len__(self) -> int:
        return len(self.paths)

    def find_row(self, path: str) -> int | None:
        """Index of an image; None for one that is not in the queue."""
        return self._rows.get(path)

    def describe(self, path: str) -> str:
        """Text of an image for the page, also of one that is not in the queue."""
        row = self.find_row(path)
        return hide_secrets(path if row is None else self.names[row])


def hide_secrets(path: str) -> str:
    """A path or a text without user names, passwords and queries, as `hide_credentials` has it.

    Of a data: URL only the media type is kept.

    >>> hide_secrets("https://ana:secret@host/a.jpg?X-Amz-Signature=1")
    'https://host/a.jpg?...'
    """
    if path[:5].lower() == "data:":
        return f"{path.partition(',')[0][:60]},..."
    return hide_credentials(path)


def read_queue(config: ManifestConfig) -> LabelingQueue:
    """Read the paths of a manifest and make them absolute.

    Rows without a path are left out, and an image that is listed twice is in the queue once.
    Raises ManifestError as `open_manifest` does, and RequestError for no images or too many.
    """
    manifest = open_manifest(config, keys=_KEYS)
    paths: dict[str, str] = {}
    rows = 0
    for batch in manifest.batches():
        rows += batch.num_rows
        names = batch.column(manifest.path_column).to_pylist()
        for path, name in zip(read_urls(manifest, batch).to_pylist(), names, strict=True):
            if name:
                paths.setdefault(path, name)
        if len(paths) > MAX_IMAGES:
            raise RequestError(
                f"labeling.manifest {config.path}: has more than {MAX_IMAGES:,} images, the limit "
                "of the labeling page. Split it, or choose rows with `imgcls select`"
            )
    if not paths:
        raise RequestError(f"labeling.manifest {config.path}: has no image to label")
    if rows > len(paths):
        log.emit(
            "note",
            f"labeling.manifest {config.path}: {format_count(rows - len(paths), 'row')} without a "
            "path, or with the path of an earlier row, left out",
        )
    return LabelingQueue(tuple(paths), tuple(paths.values()))
