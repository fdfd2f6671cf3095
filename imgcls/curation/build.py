"""Build of a manifest: `imgcls manifest build`.

Lists a folder, or converts a table or a glob; with `--contents` it scans every image and adds its
status, size, format and digest as columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgcls import log
from imgcls.curation import links, listing
from imgcls.curation.config import ListingConfig, ManifestBuildConfig, ScanConfig
from imgcls.curation.csv_manifest import write_csv_manifest
from imgcls.curation.scan import HeldOutput, hold_output, scan_manifests
from imgcls.data.formats import LISTING_DONE_FILE, has_image_suffix
from imgcls.data.manifests.discovery import group_tables
from imgcls.data.manifests.label_columns import POSITIVE, UNKNOWN, LabelColumns
from imgcls.data.manifests.manifest import (
    Manifest,
    ManifestConfig,
    make_paths_absolute,
    open_manifest,
)
from imgcls.data.manifests.options import KeyNames
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import with_config_storage
from imgcls.errors import ConfigError, ManifestError, OutputError
from imgcls.formatting import format_count
from imgcls.runs.layout import write_table

MANIFEST_FILE = "manifest.parquet"
_OUTPUT_FILES = {"parquet": MANIFEST_FILE, "csv": "manifest.csv"}
LISTING_FOLDER = "_listing"
_MERGED_FOLDER = "merged"
CONTENT_COLUMNS = ("status", "bytes", "format", "width", "height", "digest")


@with_config_storage
def build_manifest(config: ManifestBuildConfig) -> int:
    """Build a manifest from a folder, a bucket or a table.

    Returns the number of its rows. A folder or prefix is listed by `listing.build_listing`.
    A glob or a table (CSV, Parquet) keeps its columns, with absolute paths in `path` and labels in
    `label`: text, or lists of several classes. With `contents` every image is scanned, and its
    features are added.
    Raises RequestError when the request is wrong, OutputLocked when another build writes to the
    output, RunFailed when the scan was interrupted (rerun to resume).
    """
    output = filesystem.absolute(config.output)
    is_listed = filesystem.is_folder(config.source) and not _is_table_folder(config.source)
    _check_request(config, is_listed)
    table = None if is_listed else _open_table(config, config.source)
    file = _OUTPUT_FILES[config.output_format]
    is_staged = config.contents or config.merge_links or file != MANIFEST_FILE
    allowed = (file, LISTING_FOLDER) if is_staged else None
    with hold_output(output, allowed) as held:
        if is_listed and not is_staged:
            rows = listing.build_listing(config, held.lease)
            _note_links(config, output)
            return rows
        target = filesystem.join(output, file)
        if filesystem.exists(target) and not config.overwrite:
            raise OutputError(
                f"output {output}: contains a manifest already; pass --overwrite, or another "
                "--output"
            )
        manifest = _open_table(config, _list_images(config, held)) if table is None else table
        if config.contents:
            rows = _write_with_contents(config, held, manifest, target)
        else:
            rows = _write_rows(target, manifest, _read_rows(manifest), config)
        filesystem.remove(filesystem.join(output, LISTING_FOLDER))
    log.emit("manifest", f"{rows:,} images: {output}", rows=rows)
    return rows


def _check_request(config: ManifestBuildConfig, is_listed: bool) -> None:
    if config.perceptual and not config.contents:
        raise ConfigError("perceptual: requires reading every image; pass --contents too")
    if config.labels and not is_listed:
        raise ConfigError(
            f"labels: {config.source} is not a folder with one folder per class; pass the folder, "
            "or name the column of a table with --label-column"
        )
    if config.merge_links and not config.labels:
        raise ConfigError("merge_links: merges the labels of class folders; pass --labels too")
    if config.merge_links and not filesystem.is_local(config.source):
        raise ConfigError(
            f"merge_links: {config.source} is not on a local disk, and has no links; omit it"
        )
    for key, value in (
        ("label_delimiter", config.label_delimiter),
        ("label_columns", config.label_columns),
    ):
        if value and is_listed:
            raise ConfigError(
                f"{key}: {config.source} is a folder of images, not a table; pass --labels for the "
                "names of its folders"
            )


def _open_table(config: ManifestBuildConfig, source: str) -> Manifest:
    """Open the source table or the listing of the source."""
    table = ManifestConfig(
        path=source,
        path_column=config.path_column,
        image_column=config.image_column,
        label_column=config.label_column,
        label_delimiter=config.label_delimiter,
        label_columns=config.label_columns,
        delimiter=config.delimiter,
        encoding=config.encoding,
        escape=config.escape,
    )
    manifest = open_manifest(table, keys=KeyNames(section=""))
    if config.contents:
        _check_columns(manifest, _list_added_columns(config))
    return manifest


def _list_added_columns(config: ManifestBuildConfig) -> tuple[str, ...]:
    """The columns that `contents` adds."""
    return (*CONTENT_COLUMNS, "hash") if config.perceptual else CONTENT_COLUMNS


def _list_images(config: ManifestBuildConfig, output: HeldOutput) -> str:
    """List the source into a folder of the output; an interrupted run keeps its listing."""
    folder = filesystem.join(output.url, LISTING_FOLDER)
    if config.overwrite or listing.has_other_listing(folder, config.source, config.labels):
        filesystem.remove(folder)
    if not filesystem.exists(filesystem.join(folder, LISTING_DONE_FILE)):
        listed = ListingConfig(**config.model_dump(include=set(ListingConfig.model_fields)))
        listed = listed.model_copy(update={"output": folder, "overwrite": False})
        listing.build_listing(listed, output.lease)
    if not config.merge_links:
        _note_links(config, folder)
        return folder
    merged = filesystem.join(folder, _MERGED_FOLDER, MANIFEST_FILE)
    if not filesystem.exists(merged):
        rows = _read_rows(open_manifest(ManifestConfig(path=folder)))
        write_table(merged, links.merge_linked_rows(rows, config.list_concurrency))
    return merged


def _note_links(config: ManifestBuildConfig, listed: str) -> None:
    """Log how many images are linked into several class folders, each of them a row.

    listed: the folder of a listing
    """
    if not config.labels or not filesystem.is_local(config.source):
        return
    batches = open_manifest(ManifestConfig(path=listed)).batches()
    source = filesystem.absolute(config.source)
    if count := links.count_linked_files(batches, source, config.list_concurrency):
        log.emit(
            "note",
            f"{source}: {format_count(count, 'file')} linked into several class folders, a row in "
            "each; pass --merge-links for one row with a list of labels",
        )


def _write_with_contents(
    config: ManifestBuildConfig, output: HeldOutput, manifest: Manifest, target: str
) -> int:
    """Write the rows with the features of their images; returns their number."""
    scan = ScanConfig(
        manifest=ManifestConfig(path=manifest.source),
        output=output.url,
        max_pixels=config.max_pixels,
        max_bytes=config.max_bytes,
        overwrite=config.overwrite,
        scale=config.scale,
        storage=config.storage,
    )
    tables = []
    with scan_manifests(scan, output, [manifest], results=tuple(_OUTPUT_FILES.values())) as [
        scanned
    ]:
        for rows, features in scanned.read_tables():
            for name in _list_added_columns(config):
                column = features.column(name)
                if pa.types.is_fixed_size_binary(column.type):
                    column = pa.chunked_array([_encode_hex(column)])
                index = rows.schema.get_field_index(name)
                rows = rows.remove_column(index) if index >= 0 else rows
                rows = rows.append_column(name, column)
            tables.append(rows)
        output.lease.check()
        return _write_rows(target, manifest, pa.concat_tables(tables), config)


def _check_columns(manifest: Manifest, added: Sequence[str]) -> None:
    """Raise a ManifestError where an added column would replace a column of the user."""
    names = manifest.schema.names
    if set(CONTENT_COLUMNS) <= set(names):  # built with contents before
        return
    added_lower = {name.casefold() for name in added}  # many readers ignore case
    replaced = [name for name in names if name.casefold() in added_lower]
    if replaced:
        raise ManifestError(
            f"manifest {manifest.source}: has a column {replaced[0]!r}, which --contents writes; "
            "rename it"
        )


def _write_rows(
    target: str, manifest: Manifest, rows: pa.Table, config: ManifestBuildConfig
) -> int:
    table = _rename_columns(manifest, rows)
    if config.output_format == "csv":
        write_csv_manifest(target, table, config.csv_separator)
    else:
        write_table(target, table)
    return int(rows.num_rows)


def _read_rows(manifest: Manifest) -> pa.Table:
    return pa.Table.from_batches(manifest.batches(), manifest.schema)


def _rename_columns(manifest: Manifest, rows: pa.Table) -> pa.Table:
    """Make the paths absolute, and name the columns of paths and labels `path` and `label`."""
    rows = make_paths_absolute(manifest, rows)
    label = manifest.label_column
    if manifest.label_columns is not None:
        rows, label = _convert_labels(manifest, manifest.label_columns, rows)
    new_names = {manifest.path_column: "path", label: "label"}
    names = [new_names.get(name, name) for name in rows.schema.names]
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ManifestError(
            f"manifest {manifest.source}: has another column {duplicate!r}; rename it, since the "
            "column of paths or labels gets that name"
        )
    return rows.rename_columns(names)


def _convert_labels(
    manifest: Manifest, columns: LabelColumns, rows: pa.Table
) -> tuple[pa.Table, str | None]:
    """Replace the labels of several classes by one column of lists; returns its name too.

    Class columns stay where a class of an image is unknown and another one is known: a list cannot
    express that. None is returned as the name then.
    """
    place = f"manifest {manifest.source}"
    if columns.per_class:
        targets = columns.encode(rows, columns.per_class, place).targets
        is_unknown = targets == UNKNOWN
        partly = int((is_unknown.any(axis=1) & ~is_unknown.all(axis=1)).sum())
        if partly:
            log.emit(
                "note",
                f"{place}: {format_count(partly, 'row')} with unknown classes, so the class "
                "columns stay; read the manifest with --manifest.label-columns "
                f"{','.join(columns.per_class)}",
            )
            return rows, None
        _note_unused_classes(place, columns.per_class, targets)
    lists = columns.read_names(rows, place)
    first = columns.names[0]
    rows = rows.set_column(rows.schema.get_field_index(first), first, lists)
    return rows.drop_columns(list(columns.names[1:])), first


def _note_unused_classes(place: str, classes: Sequence[str], targets: npt.NDArray[np.int8]) -> None:
    """Log the classes that no image has: they are in no list."""
    is_used = (targets == POSITIVE).any(axis=0)
    unused = [name for name, used in zip(classes, is_used.tolist(), strict=True) if not used]
    if unused:
        log.emit(
            "note",
            f"{place}: no image has {', '.join(map(repr, unused))}; lists of labels do not contain "
            "such classes",
        )


def _encode_hex(column: pa.ChunkedArray) -> pa.Array:
    texts = [None if each is None else each.hex() for each in column.to_pylist()]
    return pa.array(texts, pa.string())


def _is_table_folder(source: str) -> bool:
    """Whether a folder contains tables and no images."""
    if not group_tables(filesystem.list_names(source)):
        return False
    pages = filesystem.iter_pages(source, deep=True)
    return not any(has_image_suffix(file.path) for page in pages for file in page.files)
