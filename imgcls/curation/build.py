"""Manifests that say what their images are, and what a data set is made of.

`manifest build` lists a folder or takes a table in another shape, and looks at every image if asked
to; `manifest stats` counts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pydantic import Field, NonNegativeInt, PositiveInt

from imgcls.curation import listing, summary
from imgcls.curation.checks.image_table import build_image_table
from imgcls.curation.listing import ListingConfig
from imgcls.curation.scan import ScanConfig, scan_manifests
from imgcls.data import filesystem
from imgcls.data.discovery import group_tables
from imgcls.data.filesystem import MAX_IMAGE_BYTES
from imgcls.data.formats import LISTING_DONE_FILE, has_image_suffix
from imgcls.data.manifest import Manifest, ManifestConfig, make_paths_absolute, open_manifest
from imgcls.data.storage_settings import with_config_storage
from imgcls.errors import ConfigError, ManifestError, OutputError
from imgcls.execution.placement import ScaleConfig
from imgcls.log import tell
from imgcls.runs.layout import write_table

STATS_FILE = "stats.json"
STATS_PAGE = "stats.html"
MANIFEST_FILE = "manifest.parquet"
LISTING_FOLDER = "_listing"
CONTENT_COLUMNS = ("status", "bytes", "format", "width", "height", "digest")


class ManifestBuildConfig(ListingConfig):
    """List a folder or a bucket into a manifest, or take a glob or a table in another shape."""

    path_column: str = "path"
    """Of a table: the column that holds paths; it is named path in the manifest."""
    label_column: str | None = None
    """Of a table: the column that holds class names; it is named label in the manifest."""
    delimiter: str | None = None
    """Of a CSV table: its delimiter; found in the header line when not given."""
    encoding: str = "utf-8"
    """Of a CSV table: its text encoding."""
    escape: str | None = None
    """Of a CSV table: the character before a quote inside a quoted value, such as \\ (Spark)."""
    contents: bool = False
    """Read every image: status, bytes, format, width, height and digest (BLAKE2b) as columns."""
    perceptual: bool = False
    """With contents: the perceptual hash too."""
    max_pixels: int = Field(default=100_000_000, ge=1, le=178_956_970)
    """With contents: images with more pixels are refused from their header."""
    max_bytes: PositiveInt = MAX_IMAGE_BYTES
    """With contents: maximum size of an image file, in bytes; a larger one is too_large."""
    scale: ScaleConfig = ScaleConfig()
    """With contents."""


@with_config_storage
def build_manifest(config: ManifestBuildConfig) -> int:
    """Make a manifest; returns its rows.

    A folder or prefix is listed as `listing.build_manifest` does. A glob or a table (CSV, Parquet)
    comes through with its columns, whole paths, and `path` and `label` under these names. With
    `contents` every image is looked at, and what can be told of it is added.
    Raises RequestError when something is wrong with what was asked, RunFailed when it broke off
    (run it again to resume).
    """
    output = filesystem.absolute(config.output)
    listed = filesystem.is_folder(config.source) and not _is_table_folder(config.source)
    if config.perceptual and not config.contents:
        raise ConfigError("perceptual: needs every image to be read; say --contents too")
    if listed and not config.contents:
        return listing.build_listing(config)
    if config.labels and not listed:
        raise ConfigError(
            f"labels: {config.source} is no folder with one per class; give the folder, or name a "
            "table's column with --label-column"
        )
    target = filesystem.join(output, MANIFEST_FILE)
    if filesystem.exists(target) and not config.overwrite:
        raise OutputError(
            f"output {output}: holds a manifest already; say --overwrite, or give another --output"
        )
    source = config.source
    if listed:
        source = filesystem.join(output, LISTING_FOLDER)
        if config.overwrite:
            filesystem.remove(source)
        if not filesystem.exists(
            filesystem.join(source, LISTING_DONE_FILE)
        ):  # a resumed run has its own
            given = ListingConfig(**config.model_dump(include=set(ListingConfig.model_fields)))
            listing.build_listing(given.model_copy(update={"output": source, "overwrite": False}))
    try:
        manifest = open_manifest(
            ManifestConfig(
                path=source,
                path_column=config.path_column,
                label_column=config.label_column,
                delimiter=config.delimiter,
                encoding=config.encoding,
                escape=config.escape,
            )
        )
        if config.contents:
            count = _write_with_contents(config, output, manifest)
        else:
            count = _write_rows(target, manifest, _read_rows(manifest))
    except ManifestError as error:
        raise ManifestError(str(error).replace("--manifest.", "--")) from error
    filesystem.remove(filesystem.join(output, LISTING_FOLDER))
    tell("manifest", f"{count:,} images: {output}", rows=count)
    return count


class StatsConfig(ScanConfig):
    """Tell what a data set is made of: classes, sizes, formats, a contact sheet per class."""

    sheet_images: NonNegativeInt = 12
    """Images on the contact sheet of a class."""
    max_sheets: PositiveInt = 50
    """Classes that have one, the largest first."""
    seed: int = 0
    """Which images are on them."""


@with_config_storage
def compute_stats(config: StatsConfig) -> dict[str, Any]:
    """Look at every image and tell what there is; returns the numbers of stats.json.

    Raises RequestError when something is wrong with what was asked, RunFailed when it broke off
    (run it again to resume).
    """
    output = filesystem.absolute(config.output)
    manifest = open_manifest(config.manifest)
    with scan_manifests(config, output, [manifest], results=(STATS_FILE, STATS_PAGE)) as (
        [examined],
        lease,
    ):
        images = build_image_table([(manifest, examined.read_tables())])
        told = summary.summarize_images(images)
        lease.check()
        body = json.dumps(told, indent=2) + "\n"
        filesystem.write(filesystem.join(output, STATS_FILE), body.encode())
        text = summary.render_stats_page(
            images, told, shown=config.sheet_images, classes=config.max_sheets, seed=config.seed
        )
        filesystem.write(filesystem.join(output, STATS_PAGE), text.encode())
    good = told["status"].get("ok", 0)
    tell("stats", f"{told['rows']:,} rows, {good:,} images, {len(told['classes']):,} classes")
    tell("stats", filesystem.join(output, STATS_PAGE))
    return told


def _write_with_contents(config: ManifestBuildConfig, output: str, manifest: Manifest) -> int:
    """Write the rows with what can be told of their images; returns how many."""
    facts = [*CONTENT_COLUMNS, *(["hash"] if config.perceptual else [])]
    _check_columns(manifest, facts)
    look = ScanConfig(
        manifest=ManifestConfig(path=manifest.source),
        output=output,
        max_pixels=config.max_pixels,
        max_bytes=config.max_bytes,
        overwrite=config.overwrite,
        scale=config.scale,
        storage=config.storage,
    )
    tables = []
    kept = (MANIFEST_FILE,)
    with scan_manifests(look, output, [manifest], results=kept, beside=(LISTING_FOLDER,)) as (
        [examined],
        _,
    ):
        for rows, table in examined.read_tables():
            for name in facts:
                column = table.column(name)
                if pa.types.is_fixed_size_binary(column.type):
                    column = pa.chunked_array([_encode_hex(column)])
                taken = rows.schema.get_field_index(name)
                rows = rows.remove_column(taken) if taken >= 0 else rows
                rows = rows.append_column(name, column)
            tables.append(rows)
        return _write_rows(
            filesystem.join(output, MANIFEST_FILE), manifest, pa.concat_tables(tables)
        )


def _check_columns(manifest: Manifest, facts: Sequence[str]) -> None:
    """Raise a ManifestError where facts would take the place of a column of the user's own."""
    names = manifest.schema.names
    if set(CONTENT_COLUMNS) <= set(names):  # described before
        return
    written = {name.casefold() for name in facts}  # many readers ignore case
    taken = [name for name in names if name.casefold() in written]
    if taken:
        raise ManifestError(
            f"manifest {manifest.source}: has a column {taken[0]!r}, which --contents writes; "
            "rename it"
        )


def _write_rows(target: str, manifest: Manifest, rows: pa.Table) -> int:
    write_table(target, _rename_columns(manifest, rows))
    return rows.num_rows


def _read_rows(manifest: Manifest) -> pa.Table:
    return pa.Table.from_batches(manifest.batches(), manifest.schema)


def _rename_columns(manifest: Manifest, rows: pa.Table) -> pa.Table:
    """With whole paths, in a column `path`, and labels in `label`, whatever they were called."""
    rows = make_paths_absolute(manifest, rows)
    wanted = {manifest.path_column: "path", manifest.label_column: "label"}
    names = [wanted.get(name, name) for name in rows.schema.names]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ManifestError(
            f"manifest {manifest.source}: has another column {twice!r}; rename it, since the one "
            "that was asked for takes that name"
        )
    return rows.rename_columns(names)


def _encode_hex(column: pa.ChunkedArray) -> pa.Array:
    texts = [None if each is None else each.hex() for each in column.to_pylist()]
    return pa.array(texts, pa.string())


def _is_table_folder(source: str) -> bool:
    """Whether a folder holds tables and no images."""
    if not group_tables(filesystem.list_names(source)):
        return False
    pages = filesystem.iter_pages(source, deep=True)
    return not any(has_image_suffix(file.path) for page in pages for file in page.files)
