"""Images of a manifest that an export names: their absolute paths and their labels so far.

The manifest is streamed; what is held grows with the export alone. A name that is no absolute path,
such as `cats/1.jpg`, is that of the image whose path ends with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgcls.curation.label_consensus import LabelNames
from imgcls.data.manifests.manifest import Manifest, normalize_labels, resolve_paths
from imgcls.data.storage import filesystem
from imgcls.errors import RequestError
from imgcls.runs.embeddings import normalize_urls

_BATCH_ROWS = 262_144
_SUFFIX = r"\.[^./]*$"


@dataclass
class FoundImages:
    """What the manifests have of the images in an export.

    paths:  the absolute paths of each name; one of a name that is an absolute path
    labels: the labels in the manifest by absolute path; None for an image without one
    counts: rows of the manifest by class
    """

    paths: dict[str, set[str]] = field(default_factory=dict)
    labels: dict[str, LabelNames | None] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def resolve(self, name: str, source: str, manifest: str) -> str:
        """The absolute path of a name; raises RequestError where none or several images have it."""
        found = self.paths.get(name, set())
        if len(found) == 1:
            return next(iter(found))
        if found:
            shown = ", ".join(sorted(found)[:3])
            raise RequestError(
                f"export {source}: image {name!r} may be any of {len(found)} images ({shown}); "
                "pass the manifest of the images that were labeled as --images, or export longer "
                "paths"
            )
        raise RequestError(
            f"export {source}: image {name!r} is not in {manifest}; pass the manifest of the "
            "images that were labeled as --images, such as next/manifest.parquet"
        )


def is_absolute(name: str) -> bool:
    """Whether the name of an image is an absolute path or a URL."""
    return name.startswith("/") or filesystem.is_url(name)


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


def read_paths(manifest: Manifest, batch: pa.RecordBatch) -> pa.Array:
    """The absolute paths of rows, each image by one text."""
    return _normalize(pa.chunked_array([batch.column(manifest.path_column)]), manifest.root)


def _normalize(paths: pa.ChunkedArray, root: str) -> pa.Array:
    resolved = resolve_paths(paths, root)
    local = pc.replace_substring_regex(resolved, r"^file:(//)?(/)", r"\2")
    return normalize_urls(local).combine_chunks()


def read_label_sets(manifest: Manifest, batch: pa.RecordBatch) -> list[LabelNames | None]:
    """The labels of rows; None for a row without one."""
    if manifest.label_columns is not None:
        lists = manifest.label_columns.read_names(batch, f"manifest {manifest.source}").to_pylist()
        return [None if each is None else frozenset(each) for each in lists]
    if manifest.label_column is None:
        return [None] * batch.num_rows
    labels = normalize_labels(batch.column(manifest.label_column)).to_pylist()
    return [None if each is None else frozenset([each]) for each in labels]


class ImageLookup:
    """Finds the images that an export names."""

    def __init__(self, names: Iterable[str], *, has_suffixes: bool) -> None:
        unique = set(names)
        self.found = FoundImages()
        absolute = pa.array(sorted(filter(is_absolute, unique)), pa.large_string())
        paths = _normalize(pa.chunked_array([absolute]), "/")
        for name, path in zip(absolute.to_pylist(), paths.to_pylist(), strict=True):
            self.found.paths[name] = {path}
        self._by_depth: dict[int, pa.Array] = {}
        relative = sorted(name for name in unique if not is_absolute(name))
        for depth in {name.count("/") for name in relative}:
            names_of_depth = [name for name in relative if name.count("/") == depth]
            self._by_depth[depth] = pa.array(names_of_depth, pa.large_string())
        self._has_suffixes = has_suffixes

    def add_names(self, manifest: Manifest) -> None:
        """Find names of files in a manifest; its labels are not read."""
        if self._by_depth:
            for batch in iter_large_batches(manifest):
                self._find_relative(read_paths(manifest, batch))

    def add_labels(self, manifest: Manifest, *, has_names: bool) -> None:
        """Find the images in a manifest, with their labels so far.

        has_names: whether names of files are looked up in it too
        """
        known = sorted({path for paths in self.found.paths.values() for path in paths})
        wanted = pa.array(known, pa.large_string())
        for batch in iter_large_batches(manifest):
            self._count_classes(manifest, batch)
            paths = read_paths(manifest, batch)
            is_wanted = pc.fill_null(pc.is_in(paths, value_set=wanted), False)
            if has_names:
                is_wanted = pc.or_(is_wanted, self._find_relative(paths))
            rows = pc.indices_nonzero(is_wanted)
            if not len(rows):
                continue
            label_sets = read_label_sets(manifest, batch.take(rows))
            for path, names in zip(paths.take(rows).to_pylist(), label_sets, strict=True):
                if self.found.labels.get(path) is None:
                    self.found.labels[path] = names

    def _count_classes(self, manifest: Manifest, batch: pa.RecordBatch) -> None:
        if manifest.label_columns is not None:
            place = f"manifest {manifest.source}"
            self.found.counts.update(manifest.label_columns.count_names(batch, place))
        elif manifest.label_column is not None:
            labels = normalize_labels(batch.column(manifest.label_column)).drop_null()
            counted = pc.value_counts(labels).to_pylist()
            self.found.counts.update({each["values"]: each["counts"] for each in counted})

    def _find_relative(self, paths: pa.Array) -> pa.Array:
        """Note the paths of names that are no absolute paths; returns which rows have one."""
        is_named = pa.array(np.zeros(len(paths), bool))
        for depth, names in self._by_depth.items():
            pattern = rf"^.*/((?:[^/]*/){{{depth}}}[^/]*)$"
            ends = pc.replace_substring_regex(paths, pattern, r"\1")
            if not self._has_suffixes:
                ends = pc.replace_substring_regex(ends, _SUFFIX, "")
            has_name = pc.fill_null(pc.is_in(ends, value_set=names), False)
            is_named = pc.or_(is_named, has_name)
            rows = pc.indices_nonzero(has_name)
            for name, path in zip(
                ends.take(rows).to_pylist(), paths.take(rows).to_pylist(), strict=True
            ):
                self.found.paths.setdefault(name, set()).add(path)
        return is_named
