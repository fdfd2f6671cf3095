"""Queue of images to label: the rows of a manifest, in their order."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from imgcls import log
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest, resolve_path
from imgcls.data.manifests.options import KeyNames
from imgcls.errors import RequestError
from imgcls.formatting import format_count

MAX_IMAGES = 50_000
"""Maximum number of images: the decisions of an annotator are written again with each one."""
_KEYS = KeyNames("labeling.manifest")


@dataclass(frozen=True)
class LabelingQueue:
    """The images to label. An image is identified by its path; `row` is its index here.

    paths:    as in the manifest, each once
    root:     folder where relative paths start
    queue_id: hash of the paths, by which a page notices that the queue has changed
    """

    paths: tuple[str, ...]
    root: str
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

    def get_url(self, row: int) -> str:
        """Where the image is read from."""
        url = resolve_path(self.paths[row], self.root)
        assert url is not None
        return url


def read_queue(config: ManifestConfig) -> LabelingQueue:
    """Read the paths of a manifest.

    Rows without a path are left out, and an image that is listed twice is in the queue once.
    Raises ManifestError as `open_manifest` does, and RequestError for no images or too many.
    """
    manifest = open_manifest(config, keys=_KEYS)
    paths: dict[str, None] = {}
    rows = 0
    for batch in manifest.batches():
        column = batch.column(manifest.path_column).to_pylist()
        rows += len(column)
        paths.update(dict.fromkeys(path for path in column if path))
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
    return LabelingQueue(tuple(paths), manifest.root)
