"""Split of a manifest into train, validation and test, or into folds: `imgcls manifest split`.

The part of a row depends only on a hash of its image's bytes, or of its group's name: duplicates
and groups stay together, every machine makes the same split, and added rows move no earlier row.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls import log
from imgcls.curation.config import BY_CONTENT, SplitConfig
from imgcls.data import image_files
from imgcls.data.decoding.image_features import compute_digest
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

DIGEST_COLUMN = "digest"
NO_LABEL = "(no label)"


@with_config_storage
def split_manifest(config: SplitConfig) -> dict[str, int]:
    """Split a manifest into train, validation and test, or into folds.

    Returns the number of rows of each part. Columns are kept, paths are made absolute. The
    fractions are met on average, in every class: for n images the standard deviation is
    sqrt(n p (1 - p)); the result is printed. With `by: content` the digests of `manifest build
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
                counts[part].update(label for label, own in zip(labels, mask, strict=True) if own)
    if not any(count.total() for count in counts.values()):
        raise ManifestError(f"manifest {manifest.source}: has no rows; nothing to split")
    for name in stale:
        filesystem.remove(filesystem.join(output, name))
    labels_of_all = sum(counts.values(), Counter())
    del labels_of_all[NO_LABEL]
    log_label_variants(f"manifest {manifest.source}", labels_of_all)
    _log_summary(counts, shares, output)
    return {part: count.total() for part, count in counts.items()}


def assign_parts(keys: Sequence[bytes], shares: Mapping[str, float], seed: int) -> list[str]:
    """Assign a part to each key, by the position of its hash in the cumulative shares.

    The part depends only on the key, the shares and the seed.
    """
    salt = seed.to_bytes(8, "little", signed=True)
    total = sum(shares.values())
    ends, end = [], 0.0
    for part, share in shares.items():
        end += share / total
        ends.append((end, part))
    assigned = []
    for key in keys:
        digest = hashlib.blake2b(key, digest_size=8, salt=salt).digest()
        position = int.from_bytes(digest, "little") / 2**64
        assigned.append(next((part for end, part in ends if position < end), ends[-1][1]))
    return assigned


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
        digests = table.column(DIGEST_COLUMN).cast(pa.string()).to_pylist()
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


def _read_labels(manifest: Manifest, table: pa.Table) -> list[str]:
    if manifest.label_column is None:
        return [NO_LABEL] * table.num_rows
    text = normalize_labels(table.column(manifest.label_column)).to_pylist()
    return [NO_LABEL if label is None else label for label in text]


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
    counts: Mapping[str, Counter[str]], shares: Mapping[str, float], output: str
) -> None:
    total = sum(shares.values())
    rows = sum(count.total() for count in counts.values())
    for part, share in shares.items():
        name = part if not part.isdigit() else f"fold {part}"
        count = counts[part].total()
        fraction = count / rows if rows else 0.0
        log.emit(
            "split", f"{name:<8} {count:>9,} rows  {fraction:.1%} (target {share / total:.1%})"
        )
    classes = sorted({label for count in counts.values() for label in count} - {NO_LABEL})
    for label in classes:
        missing = [part for part in shares if not counts[part][label]]
        if missing:
            log.emit("note", f"class {label!r} has no image in {', '.join(missing)}")
    log.emit("split", output)
