"""Build of a manifest: `imgcls manifest build`.

Lists a folder, or converts a table or a glob; with `--contents` it scans every image and adds its
status, size, format and digest as columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from imgcls import log
from imgcls.curation import listing
from imgcls.curation.config import ListingConfig, ManifestBuildConfig, ScanConfig
from imgcls.curation.scan import HeldOutput, hold_output, scan_manifests
from imgcls.data.formats import LISTING_DONE_FILE, has_image_suffix
from imgcls.data.manifests.discovery import group_tables
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
from imgcls.runs.layout import write_table

MANIFEST_FILE = "manifest.parquet"
LISTING_FOLDER = "_listing"
CONTENT_COLUMNS = ("status", "bytes", "format", "width", "height", "digest")


@with_config_storage
def build_manifest(config: ManifestBuildConfig) -> int:
    """Build a manifest from a folder, a bucket or a table.

    Returns the number of its rows. A folder or prefix is listed by `listing.build_listing`.
    A glob or a table (CSV, Parquet) keeps its columns, with absolute paths in `path` and labels in
    `label`. With `contents` every image is scanned, and its features are added.
    Raises RequestError when the request is wrong, OutputLocked when another build writes to the
    output, RunFailed when the scan was interrupted (rerun to resume).
    """
    output = filesystem.absolute(config.output)
    is_listed = filesystem.is_folder(config.source) and not _is_table_folder(config.source)
    if config.perceptual and not config.contents:
        raise ConfigError("perceptual: requires reading every image; pass --contents too")
    if config.labels and not is_listed:
        raise ConfigError(
            f"labels: {config.source} is not a folder with one folder per class; pass the folder, "
            "or name the column of a table with --label-column"
        )
    table = None if is_listed else _open_table(config, config.source)
    allowed = (MANIFEST_FILE, LISTING_FOLDER) if config.contents else None
    with hold_output(output, allowed) as held:
        if is_listed and not config.contents:
            return listing.build_listing(config, held.lease)
        target = filesystem.join(output, MANIFEST_FILE)
        if filesystem.exists(target) and not config.overwrite:
            raise OutputError(
                f"output {output}: contains a manifest already; pass --overwrite, or another "
                "--output"
            )
        manifest = _open_table(config, _list_images(config, held)) if table is None else table
        if config.contents:
            rows = _write_with_contents(config, held, manifest)
        else:
            rows = _write_rows(target, manifest, _read_rows(manifest))
        filesystem.remove(filesystem.join(output, LISTING_FOLDER))
    log.emit("manifest", f"{rows:,} images: {output}", rows=rows)
    return rows


def _open_table(config: ManifestBuildConfig, source: str) -> Manifest:
    """Open the source table or the listing of the source."""
    table = ManifestConfig(
        path=source,
        path_column=config.path_column,
        image_column=config.image_column,
        label_column=config.label_column,
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
    if config.overwrite:
        filesystem.remove(folder)
    if not filesystem.exists(filesystem.join(folder, LISTING_DONE_FILE)):
        listed = ListingConfig(**config.model_dump(include=set(ListingConfig.model_fields)))
        listed = listed.model_copy(update={"output": folder, "overwrite": False})
        listing.build_listing(listed, output.lease)
    return folder


def _write_with_contents(
    config: ManifestBuildConfig, output: HeldOutput, manifest: Manifest
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
    with scan_manifests(scan, output, [manifest], results=(MANIFEST_FILE,)) as [scanned]:
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
        return _write_rows(
            filesystem.join(output.url, MANIFEST_FILE), manifest, pa.concat_tables(tables)
        )


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


def _write_rows(target: str, manifest: Manifest, rows: pa.Table) -> int:
    write_table(target, _rename_columns(manifest, rows))
    return int(rows.num_rows)


def _read_rows(manifest: Manifest) -> pa.Table:
    return pa.Table.from_batches(manifest.batches(), manifest.schema)


def _rename_columns(manifest: Manifest, rows: pa.Table) -> pa.Table:
    """Make the paths absolute, and name the columns of paths and labels `path` and `label`."""
    rows = make_paths_absolute(manifest, rows)
    new_names = {manifest.path_column: "path", manifest.label_column: "label"}
    names = [new_names.get(name, name) for name in rows.schema.names]
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ManifestError(
            f"manifest {manifest.source}: has another column {duplicate!r}; rename it, since the "
            "column of paths or labels gets that name"
        )
    return rows.rename_columns(names)


def _encode_hex(column: pa.ChunkedArray) -> pa.Array:
    texts = [None if each is None else each.hex() for each in column.to_pylist()]
    return pa.array(texts, pa.string())


def _is_table_folder(source: str) -> bool:
    """Whether a folder contains tables and no images."""
    if not group_tables(filesystem.list_names(source)):
        return False
    pages = filesystem.iter_pages(source, deep=True)
    return not any(has_image_suffix(file.path) for page in pages for file in page.files)
