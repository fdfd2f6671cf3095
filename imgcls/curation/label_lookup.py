"""Images of a manifest that an export names: their absolute paths and their labels so far.

Manifests are streamed; memory grows with the export alone. A name that is not an absolute path,
such as `cats/1.jpg`, starts at `--image-root`, or is the image of `--images` whose path ends with
it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from imgcls.curation.label_consensus import LabelNames
from imgcls.data.annotations.annotation import Export
from imgcls.data.manifests.image_urls import read_urls, resolve_urls
from imgcls.data.manifests.manifest import Manifest, normalize_labels, resolve_path
from imgcls.data.manifests.options import KeyNames
from imgcls.data.storage import filesystem
from imgcls.errors import RequestError
from imgcls.formatting import format_count, format_list

ONTO_KEYS = KeyNames("onto")
_BATCH_ROWS = 262_144
_SUFFIX = r"\.[^./]*$"
_MAX_CANDIDATES = 4
"""Images of one name that are remembered; from the second one the name is refused."""
_SHOWN = 5


@dataclass
class FoundImages:
    """Images that an export names.

    paths:  the absolute path of each name
    labels: the labels in the manifest by absolute path; None for an image without a label, and no
            entry for an image that is not in the manifest
    counts: rows of the manifest by class
    """

    paths: dict[str, str]
    labels: dict[str, LabelNames | None] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


def find_images(
    export: Export, manifest: Manifest, images: Manifest | None, image_root: str | None
) -> FoundImages:
    """Find the images of an export, and their labels in the manifest.

    images:     the manifest of `--images`
    image_root: folder or prefix where names that are not absolute start

    Raises RequestError for a name that no image or several images have, that is not absolute
    without `images` and `image_root`, or that is in neither manifest although `images` is given.
    """
    relative = sorted({each.path for each in export.annotations if not is_absolute(each.path)})
    if relative:
        _check_relative(export, relative, images, image_root)
    paths = _resolve_absolute(export, image_root)
    absolute = list(paths.values())
    known: set[str] = set()
    if images is not None:
        lookup = _ImageLookup(
            [] if image_root is not None else relative,
            absolute,
            has_suffixes=export.has_suffixes,
        )
        lookup.add(images)
        known = lookup.known
        if image_root is None:
            paths |= {name: _choose_path(name, lookup, export, images) for name in relative}
    found = FoundImages(paths)
    _read_labels(manifest, found)
    if images is not None:
        unknown = [path for path in absolute if path not in known and path not in found.labels]
        _check_known(export, unknown, images, manifest)
    return found


def is_absolute(name: str) -> bool:
    """Whether the name of an image is an absolute path or a URL."""
    return name.startswith("/") or filesystem.is_url(name)


def _check_relative(
    export: Export, names: list[str], images: Manifest | None, image_root: str | None
) -> None:
    place = f"export {export.source}"
    if image_root is not None and not export.has_suffixes:
        raise RequestError(
            f"{place}: image_root: the names of images, such as {names[0]!r}, do not have the "
            "suffixes of the files; export it with data.json, or pass --images instead"
        )
    if image_root is not None:
        return
    if images is None:
        raise RequestError(
            f"{place}: image {names[0]!r} ({format_count(len(names), 'name')} of this kind) is not "
            "an absolute path, and may be the name of another image of the manifest; pass the "
            "manifest of the images that were labeled as --images, such as next/manifest.parquet, "
            "or the folder where the names start as --image-root"
        )
    repeated = sorted(export.repeated.intersection(names))
    if repeated:
        raise RequestError(
            f"{place}: image {repeated[0]!r} is in several tasks of the project, and may be "
            "several images; export and import one task at a time, or pass the folder where the "
            "names start as --image-root if they are the same images"
        )


def _resolve_absolute(export: Export, image_root: str | None) -> dict[str, str]:
    """The paths of names that are absolute, or start at `image_root`; each image by one text."""
    root = None if image_root is None else filesystem.absolute(image_root)
    names = sorted(
        {each.path for each in export.annotations if root is not None or is_absolute(each.path)}
    )
    absolute = [name if root is None else resolve_path(name, root) for name in names]
    paths = resolve_urls(pa.chunked_array([pa.array(absolute, pa.large_string())]), "/")
    return dict(zip(names, paths.to_pylist(), strict=True))


def _choose_path(name: str, lookup: _ImageLookup, export: Export, images: Manifest) -> str:
    found = lookup.candidates.get(name, [])
    if len(found) == 1:
        return found[0]
    if found:
        count = str(len(found)) if len(found) < _MAX_CANDIDATES else f"{_MAX_CANDIDATES} or more"
        raise RequestError(
            f"export {export.source}: image {name!r} may be any of {count} images "
            f"({', '.join(sorted(found)[:3])}); pass the folder or bucket where the names start as "
            "--image-root, or export longer paths"
        )
    raise RequestError(
        f"export {export.source}: image {name!r} is not in {images.source}; pass the manifest of "
        "the images that were labeled as --images, such as next/manifest.parquet"
    )


def _check_known(export: Export, unknown: list[str], images: Manifest, manifest: Manifest) -> None:
    if unknown:
        shown = format_list(unknown, _SHOWN)
        raise RequestError(
            f"export {export.source}: {format_count(len(unknown), 'image')} of it "
            f"{'is' if len(unknown) == 1 else 'are'} neither in {images.source} nor in "
            f"{manifest.source}: {shown}. Correct the paths, or remove --images to add these images"
        )


def iter_large_batches(manifest: Manifest) -> Iterator[pa.RecordBatch]:
    """The rows of a manifest in batches that are large enough for look-ups among many paths."""
    held: list[pa.RecordBatch] = []
    rows = 0
    for batch in manifest.batches():
        held.append(batch)
        rows += batch.num_rows
        if rows >= _BATCH_ROWS:
            yield pa.concat_batches(held)
            held, rows = [], 0
    if held:
        yield pa.concat_batches(held)


def read_label_sets(manifest: Manifest, batch: pa.RecordBatch) -> list[LabelNames | None]:
    """The labels of rows; None for a row without one."""
    if manifest.label_columns is not None:
        lists = manifest.label_columns.read_names(batch, f"manifest {manifest.source}").to_pylist()
        return [None if each is None else frozenset(each) for each in lists]
    if manifest.label_column is None:
        return [None] * batch.num_rows
    labels = normalize_labels(batch.column(manifest.label_column), ONTO_KEYS).to_pylist()
    return [None if each is None else frozenset([each]) for each in labels]


def _read_labels(manifest: Manifest, found: FoundImages) -> None:
    """Read the labels of the images from the manifest, and count the rows of each class."""
    wanted = pa.array(sorted(set(found.paths.values())), pa.large_string())
    for batch in iter_large_batches(manifest):
        _count_classes(manifest, batch, found.counts)
        paths = read_urls(manifest, batch)
        rows = pc.indices_nonzero(pc.is_in(paths, value_set=wanted))
        if not len(rows):
            continue
        label_sets = read_label_sets(manifest, batch.take(rows))
        for path, names in zip(paths.take(rows).to_pylist(), label_sets, strict=True):
            if found.labels.get(path) is None:
                found.labels[path] = names


def _count_classes(manifest: Manifest, batch: pa.RecordBatch, counts: Counter[str]) -> None:
    if manifest.label_columns is not None:
        counts.update(manifest.label_columns.count_names(batch, f"manifest {manifest.source}"))
    elif manifest.label_column is not None:
        labels = normalize_labels(batch.column(manifest.label_column), ONTO_KEYS).drop_null()
        counted = pc.value_counts(labels).to_pylist()
        counts.update({each["values"]: each["counts"] for each in counted})


class _ImageLookup:
    """Finds names and absolute paths in a manifest of images; its labels are not read.

    candidates: paths that end with each name, at most 4
    known:      absolute paths that are in the manifest
    """

    def __init__(self, relative: list[str], absolute: Iterable[str], *, has_suffixes: bool) -> None:
        self.candidates: dict[str, list[str]] = {}
        self.known: set[str] = set()
        self._absolute = pa.array(sorted(set(absolute)), pa.large_string())
        self._by_depth = {
            depth: pa.array([name for name in relative if name.count("/") == depth],
                            pa.large_string())
            for depth in {name.count("/") for name in relative}
        }  # fmt: skip
        self._has_suffixes = has_suffixes

    def add(self, manifest: Manifest) -> None:
        for batch in iter_large_batches(manifest):
            paths = read_urls(manifest, batch)
            is_known = pc.is_in(paths, value_set=self._absolute)
            self.known.update(paths.filter(is_known).to_pylist())
            for depth, names in self._by_depth.items():
                self._find_names(paths, depth, names)

    def _find_names(self, paths: pa.Array, depth: int, names: pa.Array) -> None:
        pattern = rf"^.*/((?:[^/]*/){{{depth}}}[^/]*)$"
        ends = pc.replace_substring_regex(paths, pattern, r"\1")
        if not self._has_suffixes:
            ends = pc.replace_substring_regex(ends, _SUFFIX, "")
        rows = pc.indices_nonzero(pc.is_in(ends, value_set=names))
        for name, path in zip(
            ends.take(rows).to_pylist(), paths.take(rows).to_pylist(), strict=True
        ):
            found = self.candidates.setdefault(name, [])
            if len(found) < _MAX_CANDIDATES and path not in found:
                found.append(path)
