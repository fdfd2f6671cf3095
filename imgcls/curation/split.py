"""A manifest into train, validation and test, or into folds: `imgcls manifest split`.

Each row's part follows from a hash of its image's bytes, or of a group's name, and from nothing
else: copies and groups stay together, the same split comes out everywhere, and data that is added
moves none of what was there.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, PositiveFloat

from imgcls.config import Section
from imgcls.data import filesystem
from imgcls.data.image_features import compute_digest
from imgcls.data.manifest import (
    Manifest,
    ManifestConfig,
    log_label_variants,
    make_paths_absolute,
    normalize_labels,
    open_manifest,
)
from imgcls.data.storage_settings import StorageConfig, with_config_storage
from imgcls.errors import (
    ConfigError,
    ManifestError,
    OutputError,
    StorageError,
    StorageMissing,
)
from imgcls.log import tell

BY_CONTENT = "content"
DIGEST_COLUMN = "digest"
NO_LABEL = "(no label)"


class SplitConfig(Section):
    """Split a manifest into parts that no copy and no group is shared between."""

    positional: ClassVar[tuple[str, ...]] = ("manifest",)

    manifest: ManifestConfig
    """What to split."""
    output: str
    """The folder to write: a Parquet file per part, which `--manifest` takes."""
    parts: dict[str, PositiveFloat] = {"train": 0.8, "val": 0.1, "test": 0.1}
    """The share of each part, by its name."""
    folds: int | None = Field(default=None, ge=2, le=100)
    """In place of parts: so many folds, each a folder with train.parquet and val.parquet."""
    by: str = BY_CONTENT
    """What stays together: content (images of the same bytes), or a column such as patient."""
    seed: int = 0
    """Another seed, another split."""
    overwrite: bool = False
    """Replace the split that is there."""
    storage: StorageConfig = StorageConfig()


@with_config_storage
def split_manifest(config: SplitConfig) -> dict[str, int]:
    """Split a manifest; returns the rows of each part.

    Columns come through as they are, paths are whole. The parts of every class have the given
    shares but for chance: a class of n images strays by about sqrt(n share (1 - share)), and what
    came of it is printed. With `by: content`, the digests that `manifest build --contents` writes
    are used where there are some, and else every image is read.
    Raises ManifestError when the column is not there or an image cannot be read, OutputError when
    the folder holds something.
    """
    output = filesystem.absolute(config.output)
    manifest = open_manifest(config.manifest)
    if config.by != BY_CONTENT and config.by not in manifest.schema.names:
        raise ManifestError(
            f"manifest {manifest.source}: no column {config.by!r} to split by (found: "
            f"{', '.join(manifest.schema.names)}); name another, or say --by content"
        )
    shares = _resolve_shares(config)
    files = list_part_files(config)
    ours = {name.partition("/")[0] for each in files.values() for name in each}
    stale = _check_output(output, ours, config.overwrite) - ours
    counts: dict[str, Counter[str]] = {part: Counter() for part in shares}
    with _PartWriters(output, files) as writers:
        for batch in manifest.batches():
            table = pa.Table.from_batches([batch])
            first = sum(count.total() for count in counts.values())
            parts = assign_parts(
                list(_compute_keys(manifest, table, first, config)), shares, config.seed
            )
            table = make_paths_absolute(manifest, table)
            labels = _read_labels(manifest, table)
            for part in shares:
                mask = [each == part for each in parts]
                writers.add(part, table.filter(pa.array(mask, pa.bool_())))
                counts[part].update(label for label, here in zip(labels, mask, strict=True) if here)
    if not any(count.total() for count in counts.values()):
        raise ManifestError(f"manifest {manifest.source}: has no row; nothing to split")
    for name in stale:
        filesystem.remove(filesystem.join(output, name))
    labels_of_all = sum(counts.values(), Counter())
    del labels_of_all[NO_LABEL]
    log_label_variants(f"manifest {manifest.source}", labels_of_all)
    _log_summary(counts, shares, output)
    return {part: count.total() for part, count in counts.items()}


def assign_parts(keys: Sequence[bytes], shares: Mapping[str, float], seed: int) -> list[str]:
    """The part of each key: where its hash falls on a line that the parts share out.

    A key's part depends on nothing but the key, the shares and the seed.
    """
    salt = seed.to_bytes(8, "little", signed=True)
    total = sum(shares.values())
    ends, end = [], 0.0
    for part, share in shares.items():
        end += share / total
        ends.append((end, part))
    found = []
    for key in keys:
        digest = hashlib.blake2b(key, digest_size=8, salt=salt).digest()
        place = int.from_bytes(digest, "little") / 2**64
        found.append(next((part for end, part in ends if place < end), ends[-1][1]))
    return found


def list_part_files(config: SplitConfig) -> dict[str, list[str]]:
    """The files that a part's rows go to, by part."""
    if config.folds is None:
        return {part: [f"{part}.parquet"] for part in config.parts}
    numbers = range(config.folds)
    return {
        str(held): [f"fold-{n}/{'val' if n == held else 'train'}.parquet" for n in numbers]
        for held in numbers
    }


def _resolve_shares(config: SplitConfig) -> dict[str, float]:
    if config.folds is not None:
        return {str(number): 1.0 for number in range(config.folds)}
    wrong = [name for name in config.parts if not name.replace("-", "").replace("_", "").isalnum()]
    if wrong or len(config.parts) < 2:
        raise ConfigError(
            f"parts: {wrong[0]!r} is no name for a file; use letters and digits"
            if wrong
            else "parts: at least two are needed, such as {train: 0.8, test: 0.2}"
        )
    return dict(config.parts)


def _compute_keys(
    manifest: Manifest, table: pa.Table, first: int, config: SplitConfig
) -> Iterator[bytes]:
    """What the rows that stay together have in common.

    first: the manifest's row that the table begins with
    """
    if config.by != BY_CONTENT:
        for row, text in enumerate(normalize_labels(table.column(config.by)).to_pylist()):
            if text is None:
                raise ManifestError(
                    f"manifest {manifest.source}: row {first + row:,} has no {config.by!r}, so it "
                    "is not known what it belongs to; fill it in, or leave the row out"
                )
            yield text.encode()
        return
    paths = table.column(manifest.path_column).cast(pa.string()).to_pylist()
    digests: list[str | None] = [None] * len(paths)
    if DIGEST_COLUMN in table.schema.names:
        digests = table.column(DIGEST_COLUMN).cast(pa.string()).to_pylist()
    unknown = [
        manifest.resolve(path)
        for path, digest in zip(paths, digests, strict=True)
        if digest is None
    ]
    blobs = zip(unknown, filesystem.read_ahead(unknown), strict=True)
    for digest in digests:
        if digest is None:
            url, blob = next(blobs)
            if isinstance(blob, StorageError):
                raise ManifestError(
                    f"manifest {manifest.source}: {url or 'a row without a path'}: {blob}; take "
                    "such rows out with `imgcls manifest check --drop unreadable`, or split --by a "
                    "column"
                )
            digest = compute_digest(blob).hex()
        yield digest.encode()


def _read_labels(manifest: Manifest, table: pa.Table) -> list[str]:
    if manifest.label_column is None:
        return [NO_LABEL] * table.num_rows
    text = normalize_labels(table.column(manifest.label_column)).to_pylist()
    return [NO_LABEL if label is None else label for label in text]


def _check_output(output: str, ours: set[str], overwrite: bool) -> set[str]:
    """Refuse a folder that holds something else; returns what an earlier split has left there."""
    there = set()
    with contextlib.suppress(StorageMissing):
        there = {path.partition("/")[0] for path in filesystem.walk(output)}
    others = sorted(name for name in there - ours if not re.fullmatch(r"fold-\d+", name))
    if others or (there and not overwrite):
        remedy = "" if others else ", or say --overwrite"
        raise OutputError(
            f"output {output}: holds {min(others or there)}; give another --output{remedy}"
        )
    return there


class _PartWriters:
    """The files of a split; on an error none of them appears."""

    def __init__(self, output: str, files: Mapping[str, Sequence[str]]) -> None:
        self._output, self._files = output, files
        self._open: dict[str, pq.ParquetWriter] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _PartWriters:
        self._stack.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    def add(self, part: str, table: pa.Table) -> None:
        for name in self._files[part]:
            if name not in self._open:
                stream = self._stack.enter_context(
                    filesystem.open_write(filesystem.join(self._output, name))
                )
                self._open[name] = self._stack.enter_context(
                    pq.ParquetWriter(stream, table.schema, compression="zstd")
                )
            self._open[name].write_table(table)


def _log_summary(
    counts: Mapping[str, Counter[str]], shares: Mapping[str, float], output: str
) -> None:
    total = sum(shares.values())
    rows = sum(count.total() for count in counts.values())
    for part, share in shares.items():
        name = part if not part.isdigit() else f"fold {part}"
        here = counts[part].total()
        got = here / rows if rows else 0.0
        tell("split", f"{name:<8} {here:>9,} rows  {got:.1%} (asked {share / total:.1%})")
    classes = sorted({label for count in counts.values() for label in count} - {NO_LABEL})
    for label in classes:
        missing = [part for part in shares if not counts[part][label]]
        if missing:
            tell("note", f"class {label!r} has no image in {', '.join(missing)}")
    tell("split", output)
