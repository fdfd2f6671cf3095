"""Labeled rows of the training and validation manifests, checked before the training starts.

Resolves the task and the class list, and splits the rows. The split depends only on the paths, so
that it is the same on every machine. The images themselves are read later, by `batches`.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgcls import log
from imgcls.data.manifests.image_urls import resolve_urls
from imgcls.data.manifests.label_columns import NEGATIVE, POSITIVE, UNKNOWN, build_name_lists
from imgcls.data.manifests.manifest import (
    Manifest,
    ManifestConfig,
    log_label_variants,
    normalize_labels,
    open_manifest,
    resolve_path,
)
from imgcls.data.manifests.options import KeyNames
from imgcls.errors import ManifestError
from imgcls.formatting import format_count, format_list
from imgcls.models.bundle import TaskName
from imgcls.training.config import DataConfig, TeacherMode
from imgcls.training.data.targets import NO_LABEL, Int8Matrix, TargetTable
from imgcls.training.sampler import Int64Array

_SCHEMA = pa.schema([("row", pa.int64()), ("path", pa.string()), ("label", pa.string())])


@dataclass(frozen=True)
class DataSource:
    """A manifest in the provenance of a bundle; the fields are written as JSON keys."""

    manifest: str
    fingerprint: str
    rows: int


@dataclass(frozen=True)
class TeacherRecord:
    """The teacher in the provenance of a bundle; the fields are written as JSON keys.

    run:      the run of the teacher
    mode:     see `TeacherConfig`
    images:   number of its images that are trained on
    labeled:  number of these that have a label too
    left_out: number of its other rows, by reason
    temperature, weight: of soft targets; None where they have no effect
    not_compared: number of images, by kind, that could not be read and so not compared by content
    """

    run: str
    bundle_sha256: str
    mode: TeacherMode
    images: int
    labeled: int
    left_out: dict[str, int]
    temperature: float | None = None
    weight: float | None = None
    not_compared: dict[str, int] = field(default_factory=dict)

    @property
    def added(self) -> int:
        """Number of images that have no label."""
        return self.images - self.labeled

    def describe_targets(self) -> str:
        """How the images are trained on, in words."""
        if self.mode == "hard":
            return "labels are its accepted predictions"
        values = {"temperature": self.temperature, "weight": self.weight}
        shown = [f"{name} {value:g}" for name, value in values.items() if value is not None]
        return f"targets are its scores ({', '.join(shown)})"


@dataclass(frozen=True)
class Examples:
    """The rows to train and validate on, and their classes.

    rows:    row (int64, row in the manifest), url (string, null for a null path), label (int64,
             code in `targets`), held (bool, true for held-out validation rows)
    sources: the manifests of the rows, by configuration key
    targets: what the labels stand for: classes, or for multilabel any number of them
    teacher: the teacher whose rows are among them; None without
    """

    classes: list[str]
    rows: pa.Table
    sources: dict[str, DataSource]
    targets: TargetTable
    teacher: TeacherRecord | None = None

    def count_per_class(self, *, held: bool) -> list[int]:
        """Number of rows of each class to validate on (held) or to train on."""
        return self.count_labels(self._find_codes(held=held), POSITIVE)

    def count_negatives(self, *, held: bool) -> list[int] | None:
        """Number of rows known not to be of each class; None for one label per image."""
        if self.targets.label_sets is None:
            return None
        return self.count_labels(self._find_codes(held=held), NEGATIVE)

    def count_labels(self, codes: Int64Array, value: int = POSITIVE) -> list[int]:
        """Number of label codes that have each class, or another value of `label_sets`.

        Images that have only a teacher's scores are not counted.
        """
        sets, count = self.targets.label_sets, len(self.classes)
        codes = self.targets.find_labels(codes)
        codes = codes[codes != NO_LABEL]
        if sets is None:
            return [int(number) for number in np.bincount(codes, minlength=count)]
        by_code = np.bincount(codes, minlength=len(sets))
        return [int(by_code[column == value].sum()) for column in sets.T]

    def build_manifest(self, *, held: bool) -> pa.Table:
        """One split as a manifest: path (string, absolute) and label (string, or list of strings).

        Where classes of some rows are unknown, one column of 1, 0 and null per class instead; a
        class named path makes the column of paths path_.
        """
        split = self.rows.filter(pc.equal(self.rows.column("held"), held))
        codes, sets = split.column("label").to_numpy(), self.targets.label_sets
        path = split.column("url")
        if sets is None:
            return pa.table({"path": path, "label": pa.array(self.classes).take(pa.array(codes))})
        found = sets[codes]
        if not (found == UNKNOWN).any():
            return pa.table({"path": path, "label": build_name_lists(found, self.classes)})
        columns = [pa.array(each, mask=each == UNKNOWN) for each in found.T]
        name = "path"
        while name in self.classes:
            name += "_"
        return pa.Table.from_arrays([path, *columns], [name, *self.classes])

    def count(self, *, held: bool) -> int:
        """Number of rows to validate on (held) or to train on."""
        total: int = pc.sum(self.rows.column("held")).as_py() or 0
        return total if held else self.rows.num_rows - total

    def compute_fingerprint(self) -> str:
        """Fingerprint of the rows, their label codes and split, and of the teacher's scores."""
        digest = hashlib.blake2b(digest_size=16)
        for key, source in sorted(self.sources.items()):
            digest.update(f"{key} {source.fingerprint}\n".encode())
        for name in ("row", "label", "held"):
            digest.update(self.rows.column(name).to_numpy().tobytes())
        for url in self.rows.column("url").to_pylist():
            digest.update((url or "").encode() + b"\0")
        return digest.hexdigest()

    def _find_codes(self, *, held: bool) -> Int64Array:
        split = self.rows.filter(pc.equal(self.rows.column("held"), held))
        codes: Int64Array = split.column("label").to_numpy()
        return codes


def read_examples(config: DataConfig, task: TaskName | Literal["auto"] = "auto") -> Examples:
    """Read the manifests, resolve the classes and split the rows.

    task: auto is multilabel where the label columns of `data.train` are those of several labels
    Raises ManifestError with the manifest and the row if a label is missing or unknown, a class has
    no training row, or there is no row to train or validate on.
    """
    manifest = _open_manifest(config.train, "data.train")
    if task == "auto":
        task = "single_label" if manifest.label_columns is None else "multilabel"
    read = _read_single_label if task == "single_label" else _read_multilabel
    examples = read(config, manifest)
    source = examples.sources["data.train"]
    if examples.count(held=True) == 0:
        raise ManifestError(
            f"data.train {source.manifest}: its {source.rows} rows leave nothing to hold out at "
            f"data.val_fraction {config.val_fraction:g}; raise it, or set data.val"
        )
    _check_every_class(examples, source)
    return examples


def _open_manifest(config: ManifestConfig, key: str) -> Manifest:
    manifest = open_manifest(config, keys=KeyNames(key))
    if manifest.find_label_columns() is None:
        raise ManifestError(
            f"{key} {config.path}: no label column (found: "
            f"{', '.join(manifest.schema.names)}); set --{key}.label-column, or pass a folder "
            "with one subfolder per class"
        )
    return manifest


def _read_single_label(config: DataConfig, manifest: Manifest) -> Examples:
    train, source = _read_rows(manifest, "data.train")
    counts = Counter(train.column("label").to_pylist())
    log_label_variants(f"data.train {source.manifest}", counts)
    classes = config.classes or sorted(counts)
    sources = {"data.train": source}
    if len(classes) < 2:
        raise ManifestError(
            f"data.train {source.manifest}: has only one class ({classes[0]!r}); pass a manifest "
            "with a label column, or a folder with one subfolder per class"
        )
    if config.val is None:
        held = _choose_held_out(_unify_paths(train, manifest.root), config.val_fraction)
        rows = _encode_labels(train, manifest.root, classes, held, "data.train", source)
    else:
        val = _open_manifest(config.val, "data.val")
        other, sources["data.val"] = _read_rows(val, "data.val")
        parts = [
            _encode_labels(
                train, manifest.root, classes, [False] * len(train), "data.train", source
            ),
            _encode_labels(
                other, val.root, classes, [True] * len(other), "data.val", sources["data.val"]
            ),
        ]
        rows = pa.concat_tables(parts)
    return Examples(classes, rows, sources, TargetTable(len(classes)))


def _read_rows(manifest: Manifest, key: str) -> tuple[pa.Table, DataSource]:
    """The rows of a manifest (row, path, label), and its record."""
    keys = KeyNames(key)
    if manifest.label_column is None:
        assert manifest.label_columns is not None
        raise ManifestError(
            f"{key} {manifest.source}: {manifest.label_columns.describe()} may have several labels "
            "per image; set --task multilabel"
        )
    tables = [_SCHEMA.empty_table()]
    rows = 0
    for batch in manifest.batches():
        paths = batch.column(manifest.path_column).cast(pa.string())
        labels = normalize_labels(batch.column(manifest.label_column), keys)
        if labels.null_count:
            missing = labels.is_null().index(True).as_py()
            raise ManifestError(
                f"{key} {manifest.source}: row {rows + missing} ({paths[missing].as_py()!r}) has "
                f"no label in column {manifest.label_column!r}; add the label or remove the row"
            )
        numbers = pa.array(range(rows, rows + batch.num_rows), pa.int64())
        tables.append(pa.table([numbers, paths, labels], schema=_SCHEMA))
        rows += batch.num_rows
    _check_has_rows(key, manifest, rows)
    source = DataSource(manifest.source, manifest.fingerprint(), rows)
    return pa.concat_tables(tables), source


def _check_has_rows(key: str, manifest: Manifest, rows: int) -> None:
    if rows == 0:
        raise ManifestError(
            f"{key} {manifest.source}: has no row; pass a manifest of labeled images"
        )


def _read_multilabel(config: DataConfig, manifest: Manifest) -> Examples:
    classes = config.classes or _list_multilabel_classes(manifest)
    train, targets, source = _read_multilabel_rows(manifest, classes, "data.train")
    sources = {"data.train": source}
    if config.val is None:
        paths = _unify_paths(train, manifest.root).column("path").to_pylist()
        held = _choose_held_out_rows(paths, targets, config.val_fraction)
    else:
        other, other_targets, sources["data.val"] = _read_multilabel_rows(
            _open_manifest(config.val, "data.val"), classes, "data.val"
        )
        held = [False] * train.num_rows + [True] * other.num_rows
        train = pa.concat_tables([train, other])
        targets = np.concatenate([targets, other_targets])
    sets, codes = index_label_sets(targets)
    rows = train.select(["row", "url"])
    rows = rows.append_column("label", pa.array(codes, pa.int64()))
    rows = rows.append_column("held", pa.array(held, pa.bool_()))
    return Examples(classes, rows, sources, TargetTable(len(classes), sets))


def index_label_sets(targets: Int8Matrix) -> tuple[Int8Matrix, Int64Array]:
    """(K, C) different rows of (N, C) targets, and the index in them of each of the N.

    As strings of bytes: `np.unique` of rows takes 40 times as long.
    """
    flat = np.ascontiguousarray(targets)
    rows = flat.view(np.dtype((np.void, flat.shape[1]))).ravel()
    _, first, codes = np.unique(rows, return_index=True, return_inverse=True)
    return flat[first], codes.astype(np.int64).ravel()


def _list_multilabel_classes(manifest: Manifest) -> list[str]:
    """The classes in the order of their columns, or sorted."""
    columns = manifest.find_label_columns()
    assert columns is not None
    if columns.per_class:
        return list(columns.classes)
    place = f"data.train {manifest.source}"
    counts: Counter[str] = Counter()
    for batch in manifest.batches():
        counts += columns.count_names(batch, place)
    log_label_variants(place, counts)
    if not counts:
        raise ManifestError(f"{place}: no row has a label in {columns.describe()}; add labels")
    return sorted(counts)


def _read_multilabel_rows(
    manifest: Manifest, classes: Sequence[str], key: str
) -> tuple[pa.Table, Int8Matrix, DataSource]:
    """The rows of a manifest (row, path, url), their (N, C) targets, and its record."""
    columns, place = manifest.find_label_columns(), f"{key} {manifest.source}"
    assert columns is not None
    tables: list[pa.Table] = []
    targets = [np.zeros((0, len(classes)), np.int8)]
    rows = left_out = 0
    for batch in manifest.batches():
        stored = batch.column(manifest.path_column).cast(pa.string())
        paths = stored.to_pylist()
        found = columns.encode(batch, classes, place)
        is_unlabeled = (found.targets == UNKNOWN).all(1)
        if is_unlabeled.any():
            missing = int(is_unlabeled.argmax())
            raise ManifestError(
                f"{place}: row {rows + missing} ({paths[missing]!r}) has no label in "
                f"{columns.describe()}; add labels (an empty list if no class applies; in text the "
                "delimiter alone), or remove the row"
            )
        urls = [resolve_path(path, manifest.root) for path in paths]
        numbers = pa.array(range(rows, rows + batch.num_rows), pa.int64())
        tables.append(
            pa.table({"row": numbers, "path": stored, "url": pa.array(urls, pa.string())})
        )
        targets.append(found.targets)
        rows += batch.num_rows
        left_out += int(found.has_unknown_name.sum())
    _check_has_rows(key, manifest, rows)
    if left_out:
        origin = "data.classes" if key == "data.train" else "the training classes"
        log.emit(
            "note",
            f"{place}: {format_count(left_out, 'row')} with labels that are not among {origin}, "
            "which are left out",
        )
    source = DataSource(manifest.source, manifest.fingerprint(), rows)
    return pa.concat_tables(tables), np.concatenate(targets), source


def _choose_held_out_rows(
    stored: Sequence[str | None], targets: Int8Matrix, fraction: float
) -> list[bool]:
    """Whether each row is held out: a share of the images by a hash of the path.

    All rows of one path are in the same split. An image of each class remains to train on.
    """
    paths = [path or "" for path in stored]
    order = sorted(set(paths), key=_hash_path)
    held = set(order[: min(round(fraction * len(order)), len(order) - 1)])
    codes = {path: index for index, path in enumerate(order)}
    places = np.array([codes[path] for path in paths])
    for column in targets.T:
        members = np.unique(places[column == POSITIVE])
        if len(members) and all(order[member] in held for member in members):
            held.discard(order[members[-1]])
    return [path in held for path in paths]


def _encode_labels(
    table: pa.Table,
    root: str,
    classes: Sequence[str],
    held: Sequence[bool],
    key: str,
    source: DataSource,
) -> pa.Table:
    """Rows with labels as class indices and paths as absolute URLs."""
    codes = pc.index_in(table.column("label"), pa.array(classes, pa.string())).cast(pa.int64())
    if codes.null_count:
        unknown = codes.is_null().index(True).as_py()
        found = table.slice(unknown, 1).to_pylist()[0]
        origin = "data.classes" if key == "data.train" else "the training classes"
        raise ManifestError(
            f"{key} {source.manifest}: row {found['row']} ({found['path']!r}) has label "
            f"{found['label']!r}, which is not among {origin} ({format_list(classes, 10)}); "
            "correct the label or add the class"
        )
    urls = [resolve_path(path, root) for path in table.column("path").to_pylist()]
    return pa.table(
        {
            "row": table.column("row"),
            "url": pa.array(urls, pa.string()),
            "label": codes,
            "held": pa.array(held, pa.bool_()),
        }
    )


def _choose_held_out(table: pa.Table, fraction: float) -> list[bool]:
    """Whether each row is held out: the given share of every class, by a hash of the path.

    All rows of one path are in the same split; otherwise training images would be validated on.
    """
    paths = [path or "" for path in table.column("path").to_pylist()]
    by_class: dict[str, set[str]] = defaultdict(set)
    for path, label in zip(paths, table.column("label").to_pylist(), strict=True):
        by_class[label].add(path)
    held: set[str] = set()
    for members in by_class.values():
        # at least one image of every class remains to train on
        count = min(round(fraction * len(members)), len(members) - 1)
        held.update(sorted(members, key=_hash_path)[:count])
    return [path in held for path in paths]


def _unify_paths(table: pa.Table, root: str) -> pa.Table:
    """Rows in which an image has one path: the smallest of those that name it."""
    stored = table.column("path")
    urls, paths = resolve_urls(stored, root).to_pylist(), stored.to_pylist()
    smallest: dict[str | None, str] = {}
    for url, path in zip(urls, paths, strict=True):
        smallest[url] = min(path or "", smallest.get(url, path or ""))
    found = pa.array([smallest[url] for url in urls], pa.string())
    return table.set_column(table.schema.get_field_index("path"), "path", found)


def _hash_path(path: str) -> bytes:
    return hashlib.blake2b(path.encode(), digest_size=8).digest()


def _check_every_class(examples: Examples, source: DataSource) -> None:
    counts = examples.count_per_class(held=False)
    absent = [name for name, count in zip(examples.classes, counts, strict=True) if not count]
    if absent:
        raise ManifestError(
            f"data.train {source.manifest}: no training image for class {absent[0]!r}"
            + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
            + "; add images, or remove it from data.classes"
        )
