"""Labeled rows of the training and validation manifests, checked before the training starts.

Resolves the class list and splits the rows. The split depends only on the paths, so that it is the
same on every machine. The images themselves are read later, by `batches`.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from imgcls.data.manifests.manifest import (
    ManifestConfig,
    log_label_variants,
    normalize_labels,
    open_manifest,
    resolve_path,
)
from imgcls.data.manifests.options import KeyNames
from imgcls.errors import ManifestError
from imgcls.training.config import DataConfig

_SCHEMA = pa.schema([("row", pa.int64()), ("path", pa.string()), ("label", pa.string())])


@dataclass(frozen=True)
class DataSource:
    """A manifest in the provenance of a bundle; the fields are written as JSON keys."""

    manifest: str
    fingerprint: str
    rows: int


@dataclass(frozen=True)
class Examples:
    """The rows to train and validate on, and their classes.

    rows:    row (int64, row in the manifest), url (string, null for a null path), label (int64,
             index into `classes`), held (bool, true for held-out validation rows)
    sources: the manifests of the rows, by configuration key
    """

    classes: list[str]
    rows: pa.Table
    sources: dict[str, DataSource]

    def count_per_class(self, *, held: bool) -> list[int]:
        """Number of rows of each class to validate on (held) or to train on."""
        split = self.rows.filter(pc.equal(self.rows.column("held"), held))
        counts = Counter(split.column("label").to_pylist())
        return [counts[code] for code in range(len(self.classes))]

    def build_manifest(self, *, held: bool) -> pa.Table:
        """One split as a manifest: path (string, absolute) and label (string)."""
        split = self.rows.filter(pc.equal(self.rows.column("held"), held))
        names = pa.array(self.classes, pa.string())
        label = names.take(split.column("label").combine_chunks())
        return pa.table({"path": split.column("url"), "label": label})

    def count(self, *, held: bool) -> int:
        """Number of rows to validate on (held) or to train on."""
        total: int = pc.sum(self.rows.column("held")).as_py() or 0
        return total if held else self.rows.num_rows - total


def read_examples(config: DataConfig) -> Examples:
    """Read the manifests, resolve the classes and split the rows.

    Raises ManifestError with the manifest and the row if a label is missing or unknown, a class has
    no training row, or there is no row to train or validate on.
    """
    train, root, source = _read_manifest(config.train, "data.train")
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
        held = _choose_held_out(train, config.val_fraction)
        rows = _encode_labels(train, root, classes, held, "data.train", source)
    else:
        other, other_root, sources["data.val"] = _read_manifest(config.val, "data.val")
        parts = [
            _encode_labels(train, root, classes, [False] * len(train), "data.train", source),
            _encode_labels(
                other, other_root, classes, [True] * len(other), "data.val", sources["data.val"]
            ),
        ]
        rows = pa.concat_tables(parts)
    examples = Examples(classes, rows, sources)
    if examples.count(held=True) == 0:
        raise ManifestError(
            f"data.train {source.manifest}: its {source.rows} rows leave nothing to hold out at "
            f"data.val_fraction {config.val_fraction:g}; raise it, or set data.val"
        )
    _check_every_class(examples, source)
    return examples


def _read_manifest(config: ManifestConfig, key: str) -> tuple[pa.Table, str, DataSource]:
    """The rows of a manifest (row, path, label), the root of its paths, and its record."""
    keys = KeyNames(key)
    manifest = open_manifest(config, keys=keys)
    if manifest.label_column is None:
        raise ManifestError(
            f"{key} {config.path}: no label column (found: "
            f"{', '.join(manifest.schema.names)}); set --{key}.label-column, or pass a folder "
            "with one subfolder per class"
        )
    tables = [_SCHEMA.empty_table()]
    rows = 0
    for batch in manifest.batches():
        paths = batch.column(manifest.path_column).cast(pa.string())
        labels = normalize_labels(batch.column(manifest.label_column), keys)
        if labels.null_count:
            missing = labels.is_null().index(True).as_py()
            raise ManifestError(
                f"{key} {config.path}: row {rows + missing} ({paths[missing].as_py()!r}) has no "
                f"label in column {manifest.label_column!r}; add the label or remove the row"
            )
        numbers = pa.array(range(rows, rows + batch.num_rows), pa.int64())
        tables.append(pa.table([numbers, paths, labels], schema=_SCHEMA))
        rows += batch.num_rows
    if rows == 0:
        raise ManifestError(f"{key} {config.path}: has no row; pass a manifest of labeled images")
    source = DataSource(config.path, manifest.fingerprint(), rows)
    return pa.concat_tables(tables), manifest.root, source


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
        listed = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        origin = "data.classes" if key == "data.train" else "the training classes"
        raise ManifestError(
            f"{key} {source.manifest}: row {found['row']} ({found['path']!r}) has label "
            f"{found['label']!r}, which is not among {origin} ({listed}); correct the label "
            "or add the class"
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


def _hash_path(path: str) -> bytes:
    return hashlib.blake2b(path.encode(), digest_size=8).digest()


def _check_every_class(examples: Examples, source: DataSource) -> None:
    train = examples.rows.filter(pc.invert(examples.rows.column("held")))
    present = set(train.column("label").unique().to_pylist())
    absent = [name for code, name in enumerate(examples.classes) if code not in present]
    if absent:
        raise ManifestError(
            f"data.train {source.manifest}: no training image for class {absent[0]!r}"
            + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
            + "; add images, or remove it from data.classes"
        )
