"""Who labeled the images of a manifest, when and with which tool, as its own columns have it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from imgcls.data.manifests.image_urls import resolve_urls
from imgcls.data.manifests.manifest import Manifest, ManifestConfig, open_manifest
from imgcls.errors import ImgclsError, one_line
from imgcls.evaluation.overview.links import is_relative
from imgcls.evaluation.overview.records import get_text
from imgcls.formatting import format_count

ANNOTATOR_COLUMNS = ("labeled_by", "annotator")
TIME_COLUMNS = ("labeled_at",)
SOURCE_COLUMNS = ("label_source", "tool")
PROVENANCE_COLUMNS = (*ANNOTATOR_COLUMNS, *TIME_COLUMNS, *SOURCE_COLUMNS)
_MAX_NAMES = 10
Facts = list[tuple[str, str]]


def describe_manifest(settings: Any, fingerprint: str | None, image: str | None = None) -> Facts:
    """What a manifest has now: whether it is unchanged, and who labeled its images.

    settings:    its configuration, as a run or a bundle stored it
    fingerprint: of its rows at that time
    image:       absolute path of an image whose row is described too
    A manifest that cannot be opened has one fact, the reason. One with a relative path is described
    if it has the fingerprint: the directory of the command that stored the path is not known.
    """
    path = get_text(settings, "path")
    if path is None or not is_relative(path):
        return _describe_now(settings, fingerprint, image)
    facts = (
        [] if fingerprint is None else _describe_now(settings, fingerprint, image, needs_same=True)
    )
    if ("unchanged", "yes") in facts:
        return facts
    reason = f"a relative path, and no manifest with this fingerprint is in {os.getcwd()}"
    return [("not checked", reason if fingerprint is not None else "a relative path")]


def _describe_now(
    settings: Any, fingerprint: str | None, image: str | None, *, needs_same: bool = False
) -> Facts:
    """needs_same: describe nothing of a manifest with another fingerprint."""
    try:
        manifest = open_manifest(_parse_settings(settings))
        now = None if fingerprint is None else manifest.fingerprint()
        if needs_same and now != fingerprint:
            return []
        facts = []
        if now is not None:
            facts.append(("unchanged", "yes" if now == fingerprint else "no"))
            if now != fingerprint:
                facts.append(("fingerprint now", now))
        counted = _LabelProvenance.from_manifest(manifest)
        if counted.names or image is not None:
            for table in _iter_columns(manifest, counted.names):
                counted.add(table, manifest, image)
        return facts + counted.describe()
    except (ImgclsError, ValueError, OSError, pa.ArrowException) as error:
        return [("cannot be opened", one_line(error))]


def describe_label_row(row: Mapping[str, Any]) -> Facts:
    """Label provenance in one row, by the names of its columns."""
    found = [name for name in PROVENANCE_COLUMNS if row.get(name) is not None]
    return [(name.replace("_", " "), str(row[name])) for name in found]


def match_image(paths: pa.ChunkedArray, root: str, image: str) -> pa.ChunkedArray:
    """Whether each path of a column is that of an image; null paths are not."""
    urls = resolve_urls(paths, root)
    return pc.fill_null(pc.equal(urls, pa.scalar(image, urls.type)), False)


def _parse_settings(settings: Any) -> ManifestConfig:
    try:
        return ManifestConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"its settings are of another version ({key}: {first['msg']})") from error


def _iter_columns(manifest: Manifest, names: tuple[str, ...]) -> Iterator[pa.Table]:
    labels = manifest.find_label_columns()
    own = () if labels is None else labels.names
    wanted = list(dict.fromkeys([manifest.path_column, *own, *names]))
    for batch in manifest.batches():
        yield pa.Table.from_batches([batch]).select(wanted)


@dataclass
class _LabelProvenance:
    """Counts of the columns about labels, and the row of one image.

    names: columns of annotators, times and tools that the manifest has
    """

    names: tuple[str, ...]
    annotators: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    times: list[str] = field(default_factory=list)
    image_row: dict[str, Any] | None = None

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> _LabelProvenance:
        known = (ANNOTATOR_COLUMNS, TIME_COLUMNS, SOURCE_COLUMNS)
        found = (next((n for n in names if n in manifest.schema.names), None) for names in known)
        return cls(tuple(name for name in found if name is not None))

    def add(self, table: pa.Table, manifest: Manifest, image: str | None) -> None:
        for name in self.names:
            column = table[name]
            if name in TIME_COLUMNS:
                ends = pc.min_max(column.cast(pa.string())).as_py()
                self.times += [value for value in ends.values() if value is not None]
            else:
                counter = self.annotators if name in ANNOTATOR_COLUMNS else self.sources
                for pair in pc.value_counts(column.cast(pa.string())).to_pylist():
                    counter[pair["values"] or ""] += pair["counts"]
        if image is not None and self.image_row is None:
            found = table.filter(match_image(table[manifest.path_column], manifest.root, image))
            if found.num_rows:
                self.image_row = found.slice(0, 1).to_pylist()[0]

    def describe(self) -> Facts:
        facts: Facts = []
        if self.annotators:
            facts.append(("labeled by", _format_counts(self.annotators)))
        if self.times:
            facts.append(("labeled from", f"{min(self.times)} to {max(self.times)}"))
        if self.sources:
            facts.append(("label source", _format_counts(self.sources)))
        if self.image_row is not None:
            text = ", ".join(f"{name} {value}" for name, value in self.image_row.items())
            facts.append(("has the image", text))
        return facts


def _format_counts(counter: Counter[str]) -> str:
    """Names with their numbers of rows, the most frequent first."""
    named = [(name, count) for name, count in counter.most_common() if name]
    texts = [f"{name} {count:,}" for name, count in named[:_MAX_NAMES]]
    if len(named) > _MAX_NAMES:
        texts.append(f"{format_count(len(named) - _MAX_NAMES, 'other')}")
    if counter[""]:
        texts.append(f"not named {counter['']:,}")
    return ", ".join(texts)
