"""What is learnt from: labelled rows of one or two manifests, checked before anything starts.

Owns the class list, the split into training and validation rows and the errors that name a row;
promises that the split depends on the paths alone, so that it is the same on every machine. What
the paths lead to is looked at by `ingest`.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, PositiveInt, field_validator

from imgcls.config import Section
from imgcls.data.filesystem import MAX_IMAGE_BYTES
from imgcls.data.manifest import (
    ManifestConfig,
    log_label_variants,
    normalize_labels,
    open_manifest,
    resolve_path,
)
from imgcls.data.manifest_options import KeyNames
from imgcls.errors import ManifestError

_SCHEMA = pa.schema([("row", pa.int64()), ("path", pa.string()), ("label", pa.string())])


class DataConfig(Section):
    """What is learnt from, and what is held out to judge it."""

    shorthand: ClassVar[str | None] = "train"

    train: ManifestConfig
    """The training images with their labels."""
    val: ManifestConfig | None = None
    """The validation images with their labels; held out of data.train when not given."""
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of each class to hold out when there is no data.val; chosen by a hash of the path."""
    max_error_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """Images that cannot be decoded are left out; above this share of them nothing is trained."""
    sampling: Literal["natural", "balanced"] = "natural"
    """natural: every image once per epoch; balanced: as many of each class, rare ones repeated."""
    max_bytes: PositiveInt = MAX_IMAGE_BYTES
    """Maximum size of an image file, in bytes; a larger one is left out and counted as an error."""
    cache: bool | None = None
    """Decode once, into memory; if none, whenever all images fit in Ray's object store."""
    classes: list[str] | None = None
    """Class names in the order of the outputs; the sorted labels of data.train when not given."""

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, classes: list[str] | None) -> list[str] | None:
        if classes is not None:  # as labels are normalized
            classes = [unicodedata.normalize("NFC", name) for name in classes]
        if classes is not None and len(set(classes)) < len(classes):
            doubled = next(name for name in classes if classes.count(name) > 1)
            raise ValueError(f"class {doubled!r} stands there twice; class names must differ")
        return classes


@dataclass(frozen=True)
class DataSource:
    """A manifest as the provenance names it."""

    manifest: str
    fingerprint: str
    rows: int


@dataclass(frozen=True)
class Examples:
    """The rows to train and to validate on, and the classes that they are of.

    rows:    row (int64, the manifest row), url (string, null for a null path), label (int64, index
             into `classes`), held (bool, true for validation)
    sources: the manifests they came from, by config key
    """

    classes: list[str]
    rows: pa.Table
    sources: dict[str, DataSource]

    def count_per_class(self, *, held: bool) -> list[int]:
        """Rows of each class to validate on (held) or to train on."""
        split = self.rows.filter(pc.equal(self.rows.column("held"), held))
        counts = Counter(split.column("label").to_pylist())
        return [counts[code] for code in range(len(self.classes))]

    def build_manifest(self, *, held: bool) -> pa.Table:
        """path (string, as it is found from anywhere) and label (string) of one part."""
        split = self.rows.filter(pc.equal(self.rows.column("held"), held))
        names = pa.array(self.classes, pa.string())
        label = names.take(split.column("label").combine_chunks())
        return pa.table({"path": split.column("url"), "label": label})

    def count(self, *, held: bool) -> int:
        """Rows to validate on (held) or to train on."""
        total: int = pc.sum(self.rows.column("held")).as_py() or 0
        return total if held else self.rows.num_rows - total


def read_examples(config: DataConfig) -> Examples:
    """Read the manifests, settle the classes and split.

    Raises ManifestError that names the manifest and the row when a label is missing or unknown, a
    class has nothing to train on, or there is nothing to train or validate on.
    """
    train, root, source = _read_manifest(config.train, "data.train")
    counts = Counter(train.column("label").to_pylist())
    log_label_variants(f"data.train {source.manifest}", counts)
    classes = config.classes or sorted(counts)
    sources = {"data.train": source}
    if len(classes) < 2:
        raise ManifestError(
            f"data.train {source.manifest}: has only one class ({classes[0]!r}); give a manifest "
            "with a label column, or a folder that holds one folder per class"
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
            f"data.val_fraction {config.val_fraction:g}; raise it, or give data.val"
        )
    _check_every_class(examples, source)
    return examples


def _read_manifest(config: ManifestConfig, key: str) -> tuple[pa.Table, str, DataSource]:
    """A manifest's rows (row, path, label), the root of its paths, and what it is."""
    keys = KeyNames(key)
    manifest = open_manifest(config, keys=keys)
    if manifest.label_column is None:
        raise ManifestError(
            f"{key} {config.path}: no column of labels (found: "
            f"{', '.join(manifest.schema.names)}); name it with --{key}.label-column, or give one "
            "folder per class"
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
                f"label in column {manifest.label_column!r}; label it or leave it out"
            )
        numbers = pa.array(range(rows, rows + batch.num_rows), pa.int64())
        tables.append(pa.table([numbers, paths, labels], schema=_SCHEMA))
        rows += batch.num_rows
    if rows == 0:
        raise ManifestError(f"{key} {config.path}: has no row; give a manifest of labelled images")
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
    """Rows with labels as class indices and paths as the places they name."""
    codes = pc.index_in(table.column("label"), pa.array(classes, pa.string())).cast(pa.int64())
    if codes.null_count:
        unknown = codes.is_null().index(True).as_py()
        found = table.slice(unknown, 1).to_pylist()[0]
        listed = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        origin = "data.classes" if key == "data.train" else "the training classes"
        raise ManifestError(
            f"{key} {source.manifest}: row {found['row']} ({found['path']!r}) has label "
            f"{found['label']!r}, which is not among {origin} ({listed}); mend the label or add "
            "the class"
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
    """Whether each row is held out: of every class the given share, in the order of a path hash.

    All rows of one path go the same way, or the model would be judged on what it has learnt.
    """
    paths = [path or "" for path in table.column("path").to_pylist()]
    by_class: dict[str, set[str]] = defaultdict(set)
    for path, label in zip(paths, table.column("label").to_pylist(), strict=True):
        by_class[label].add(path)
    held: set[str] = set()
    for members in by_class.values():
        # at least one image of every class is left to train on
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
            + "; add some, or take it out of data.classes"
        )
