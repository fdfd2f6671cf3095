"""Split of a manifest into train, validation and test, or into folds: `imgcls manifest split`.

The part of a row depends on a hash of its image's bytes, or of its group's name: duplicates and
groups stay together, every machine makes the same split, and added rows move no earlier row. A
stratified split depends on the labels of all rows too.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgcls import log
from imgcls.curation.config import BY_CONTENT, SplitConfig
from imgcls.curation.outputs import check_not_read_again
from imgcls.curation.stratification import Unit, stratify
from imgcls.data import image_files
from imgcls.data.decoding.image_features import compute_digest
from imgcls.data.manifests.image_columns import has_bytes
from imgcls.data.manifests.manifest import (
    Manifest,
    log_label_variants,
    make_paths_absolute,
    normalize_labels,
    open_manifest,
)
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import with_config_storage
from imgcls.errors import (
    ConfigError,
    ManifestError,
    OutputError,
    StorageMissing,
)
from imgcls.runs.committed import is_scalar_type

DIGEST_COLUMN = "digest"
NO_LABEL = "(no label)"


@with_config_storage
def split_manifest(config: SplitConfig) -> dict[str, int]:
    """Split a manifest into train, validation and test, or into folds.

    Returns the number of rows of each part. Columns are kept, paths are made absolute. The
    fractions are met on average, in every class: for n images the standard deviation is
    sqrt(n p (1 - p)); the result is printed. A stratified split, such as of a multi-label manifest,
    meets them as well as whole images allow. With `by: content` the digests of `manifest build
    --contents` are used where the manifest has them; otherwise every image is read.
    Raises ManifestError when the column is missing or an image cannot be read, OutputError when the
    folder contains other files.
    """
    output = filesystem.absolute(config.output)
    manifest = open_manifest(config.manifest)
    if config.by != BY_CONTENT and config.by not in manifest.schema.names:
        raise ManifestError(
            f"manifest {manifest.source}: no column {config.by!r} to split by (found: "
            f"{', '.join(manifest.schema.names)}); name another, or pass --by content"
        )
    if config.by != BY_CONTENT and not is_scalar_type(manifest.schema.field(config.by).type):
        raise ManifestError(
            f"manifest {manifest.source}: column {config.by!r} is "
            f"{manifest.schema.field(config.by).type}; rows are grouped by text, numbers or times. "
            "Pass another --by"
        )
    shares = _resolve_shares(config)
    files = list_part_files(config)
    names = itertools.chain.from_iterable(files.values())
    check_not_read_again((filesystem.join(config.output, name) for name in names), manifest)
    ours = {name.partition("/")[0] for each in files.values() for name in each}
    stale = _check_output(output, ours, config.overwrite) - ours
    _check_input(output, ours | stale, manifest)
    assigner = _choose_assigner(manifest, shares, config)
    totals = {part: _PartTotals() for part in shares}
    with _PartWriters(output, files) as writers:
        for first, table in _iter_tables(manifest):
            parts = assigner(table, first)
            labels = _read_labels(manifest, table)
            table = make_paths_absolute(manifest, table)
            for part in shares:
                mask = pa.array([each == part for each in parts], pa.bool_())
                writers.add(part, table.filter(mask))
                totals[part].add(labels.filter(mask))
    if not any(total.rows for total in totals.values()):
        raise ManifestError(f"manifest {manifest.source}: has no rows; nothing to split")
    for name in stale:
        filesystem.remove(filesystem.join(output, name))
    labels_of_all = sum((total.labels for total in totals.values()), Counter[str]())
    log_label_variants(f"manifest {manifest.source}", labels_of_all)
    _log_summary(totals, shares, output)
    return {part: total.rows for part, total in totals.items()}


def _check_input(output: str, removed: set[str], manifest: Manifest) -> None:
    """Raise an OutputError where the output would replace the manifest that is to be read."""
    folders = [filesystem.join(output, name) for name in removed]
    for file in map(filesystem.absolute, manifest.files):
        if any(file == each or file.startswith(f"{each}/") for each in folders):
            raise OutputError(
                f"output {output}: --overwrite would remove {file}, which is the manifest to "
                "split; pass another --output"
            )


@dataclass
class _PartTotals:
    """Rows of a part, and its rows of each class."""

    rows: int = 0
    labels: Counter[str] = field(default_factory=Counter)

    def add(self, labels: pa.ListArray) -> None:
        self.rows += len(labels)
        self.labels.update(labels.flatten().to_pylist())


_Assigner = Callable[[pa.Table, int], Sequence[str]]
"""Returns the part of each row of a table; called with the number of its first row too."""


def _choose_assigner(
    manifest: Manifest, shares: Mapping[str, float], config: SplitConfig
) -> _Assigner:
    """How rows get their parts: by hash, or stratified after a first pass over the manifest."""
    stratified = config.stratify
    if stratified is None:
        stratified = manifest.label_columns is not None
    if stratified and manifest.find_label_columns() is None:
        raise ConfigError(
            f"stratify: manifest {manifest.source} has no labels; name their column with "
            "--manifest.label-column"
        )
    if stratified:
        parts = _stratify_rows(manifest, shares, config)

        def look_up(table: pa.Table, first: int) -> Sequence[str]:
            found = parts[first : first + table.num_rows]
            if len(found) < table.num_rows:
                raise ManifestError(
                    f"manifest {manifest.source}: has got more rows since it was read; rerun the "
                    "command"
                )
            return found

        return look_up
    return lambda table, first: assign_parts(
        list(_compute_keys(manifest, table, first, config)), shares, config.seed
    )


def _iter_tables(manifest: Manifest) -> Iterator[tuple[int, pa.Table]]:
    """The rows of a manifest in tables, and the number of the first row of each."""
    first = 0
    for batch in manifest.batches():
        yield first, pa.Table.from_batches([batch])
        first += batch.num_rows


def _stratify_rows(
    manifest: Manifest, shares: Mapping[str, float], config: SplitConfig
) -> list[str]:
    """The part of each row of a manifest: rows with one key stay together."""
    keys: list[bytes] = []
    rows: Counter[bytes] = Counter()
    labels: dict[bytes, Counter[str]] = {}
    for first, table in _iter_tables(manifest):
        found = list(_compute_keys(manifest, table, first, config))
        for key, names in zip(found, _read_labels(manifest, table).to_pylist(), strict=True):
            own = labels.setdefault(key, Counter())
            own.update(sys.intern(name) for name in set(names))
        keys += found
        rows.update(found)
    order = sorted(rows, key=lambda key: _hash_key(key, config.seed))
    fractions = [share / sum(shares.values()) for share in shares.values()]
    parts = stratify([Unit(rows[key], labels[key]) for key in order], fractions)
    names = list(shares)
    for part, name in enumerate(names):
        if part not in parts:
            log.emit("note", f"part {name}: has no row, since there are too few rows to divide")
    part_of_key = {key: names[part] for key, part in zip(order, parts, strict=True)}
    return [part_of_key[key] for key in keys]


def assign_parts(keys: Sequence[bytes], shares: Mapping[str, float], seed: int) -> list[str]:
    """Assign a part to each key, by the position of its hash in the cumulative shares.

    The part depends only on the key, the shares and the seed.
    """
    total = sum(shares.values())
    ends, end = [], 0.0
    for part, share in shares.items():
        end += share / total
        ends.append((end, part))
    assigned = []
    for key in keys:
        position = _hash_key(key, seed) / 2**64
        assigned.append(next((part for end, part in ends if position < end), ends[-1][1]))
    return assigned


def _hash_key(key: bytes, seed: int) -> int:
    """A hash of 64 bits."""
    salt = seed.to_bytes(8, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(key, digest_size=8, salt=salt).digest(), "little")


def _read_digests(manifest: Manifest, column: pa.ChunkedArray) -> list[str | None]:
    """Digests of the images' bytes, as text or as bytes."""
    kind = column.type
    if has_bytes(kind):
        return [None if digest is None else digest.hex() for digest in column.to_pylist()]
    if not is_scalar_type(kind):
        raise ManifestError(
            f"manifest {manifest.source}: column {DIGEST_COLUMN!r} is {kind}, not a digest; rename "
            "it, or leave it out with --manifest.drop-columns"
        )
    digests: list[str | None] = column.cast(pa.string()).to_pylist()
    return digests


def list_part_files(config: SplitConfig) -> dict[str, list[str]]:
    """The output files of each part; with folds a part is in every fold, as val or train."""
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
    for name in config.parts:
        if not name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"parts: {name!r} is not a valid file name; use letters and digits")
    if len(config.parts) < 2:
        raise ConfigError("parts: pass at least two, such as {train: 0.8, test: 0.2}")
    return dict(config.parts)


def _compute_keys(
    manifest: Manifest, table: pa.Table, first: int, config: SplitConfig
) -> Iterator[bytes]:
    """The key of each row; rows with the same key stay together.

    first: number of the table's first row in the manifest
    """
    if config.by != BY_CONTENT:
        for row, text in enumerate(normalize_labels(table.column(config.by)).to_pylist()):
            if text is None:
                raise ManifestError(
                    f"manifest {manifest.source}: row {first + row:,} has no value in column "
                    f"{config.by!r} to split by; fill it in, or remove the row"
                )
            yield text.encode()
        return
    paths = table.column(manifest.path_column).cast(pa.string()).to_pylist()
    digests: list[str | None] = [None] * len(paths)
    if DIGEST_COLUMN in table.schema.names:
        digests = _read_digests(manifest, table.column(DIGEST_COLUMN))
    unknown = [
        manifest.resolve(path)
        for path, digest in zip(paths, digests, strict=True)
        if digest is None
    ]
    blobs = zip(unknown, image_files.read_ahead(unknown), strict=True)
    for digest in digests:
        if digest is None:
            url, blob = next(blobs)
            if not isinstance(blob, bytes):
                raise ManifestError(
                    f"manifest {manifest.source}: {url or 'a row without a path'}: {blob}; "
                    "remove such rows with `imgcls manifest check --drop unreadable`, or pass --by "
                    "with a column"
                )
            digest = compute_digest(blob).hex()
        yield digest.encode()


def _read_labels(manifest: Manifest, table: pa.Table) -> pa.ListArray:
    """The class names of each row; an empty list where it has none."""
    if manifest.label_columns is not None:
        names = manifest.label_columns.read_names(table, f"manifest {manifest.source}")
        return pc.fill_null(names, [])
    if manifest.label_column is None:
        text = pa.nulls(table.num_rows, pa.string())
    else:
        text = normalize_labels(table.column(manifest.label_column))
    counts = pc.cast(text.is_valid(), pa.int32()).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), text.drop_null())


def _check_output(output: str, ours: set[str], overwrite: bool) -> set[str]:
    """Refuse a folder with other files; returns the files and folders of an earlier split."""
    present = set()
    with contextlib.suppress(StorageMissing):
        present = {path.partition("/")[0] for path in filesystem.walk(output)}
    others = sorted(name for name in present - ours if not re.fullmatch(r"fold-\d+", name))
    if others or (present and not overwrite):
        fix = "" if others else ", or --overwrite"
        raise OutputError(
            f"output {output}: contains {min(others or present)}; pass another --output{fix}"
        )
    return present


class _PartWriters:
    """Writers of the files of a split; on an error none of the files appears."""

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
    totals: Mapping[str, _PartTotals], shares: Mapping[str, float], output: str
) -> None:
    total = sum(shares.values())
    rows = sum(each.rows for each in totals.values())
    for part, share in shares.items():
        name = part if not part.isdigit() else f"fold {part}"
        count = totals[part].rows
        fraction = count / rows if rows else 0.0
        log.emit(
            "split", f"{name:<8} {count:>9,} rows  {fraction:.1%} (target {share / total:.1%})"
        )
    classes = sorted({label for each in totals.values() for label in each.labels})
    for label in classes:
        missing = [part for part in shares if not totals[part].labels[label]]
        if missing:
            log.emit("note", f"class {label!r} has no image in {', '.join(missing)}")
    log.emit("split", output)
