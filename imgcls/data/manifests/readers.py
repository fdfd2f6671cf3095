"""The table of manifest formats: how each is recognized by name, and how it is read.

A new table format is two functions, `read_schema` and `read_batches`, and a line in
`MANIFEST_FORMATS`; its name is also added to `ManifestFormat`, the values of the configuration key.
A format of tables with versions has a third one, `pin`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from imgcls.data.containers.archive import Archive
from imgcls.data.containers.tar_archive import TarArchive
from imgcls.data.containers.zip_archive import ZipArchive
from imgcls.data.manifests import (
    archive_listing,
    csv_reader,
    delta_reader,
    iceberg_reader,
    parquet_reader,
)
from imgcls.data.manifests.archive_listing import ArchiveOptions, ArchiveRows
from imgcls.data.manifests.options import KeyNames, ReadOptions
from imgcls.data.manifests.table_version import TableVersion

ManifestFormat = Literal[
    "auto", "csv", "parquet", "delta", "iceberg", "tree", "images", "webdataset", "zip"
]

_COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True)
class TableFormat:
    """A file format of tables with one row per image.

    title:              name of the format in messages
    suffixes:           in lower case, with the dot
    read_schema:        columns of a file, from as few bytes as possible
    read_batches:       streams the rows of a file, in order
    explicit_suffixes:  suffixes that count only if the file or a glob is passed: in a folder,
                        such files may be anything
    fallback_suffixes:  suffixes that are read from a folder only where no other file of the format
                        is in it
    can_be_compressed:  whether files such as table.csv.gz are read
    pin:                for tables with versions, which a prefix such as "delta:" selects: chooses
                        the version to read. The files are those names, as in `TableVersion`
    """

    title: str
    suffixes: tuple[str, ...]
    read_schema: Callable[[str, ReadOptions], pa.Schema]
    read_batches: Callable[[str, ReadOptions], Iterator[pa.RecordBatch]]
    explicit_suffixes: tuple[str, ...] = ()
    fallback_suffixes: tuple[str, ...] = ()
    can_be_compressed: bool = False
    pin: Callable[[str], TableVersion] | None = None


@dataclass(frozen=True)
class ListingFormat:
    """Image files without a table, one row per file.

    get_label: class name of an image by its path relative to the folder, None where it has none;
               None for a format without labels
    """

    get_label: Callable[[str], str | None] | None


@dataclass(frozen=True)
class ArchiveFormat:
    """Archives that contain the images, one row per image.

    title:    name of the format in messages
    suffixes: in lower case, with the dot
    open:     opens an archive by its path or URL
    list:     lists the rows of an archive
    """

    title: str
    suffixes: tuple[str, ...]
    open: Callable[[str], Archive]
    list: Callable[[Archive, ArchiveOptions], ArchiveRows]


def get_top_folder(path: str) -> str | None:
    """First folder of a relative path: the class in a tree with one folder per class."""
    folder, separator, _ = path.partition("/")
    return folder if separator else None


MANIFEST_FORMATS: dict[str, TableFormat | ListingFormat | ArchiveFormat] = {
    "csv": TableFormat(
        "CSV",
        (".csv", ".tsv", ".txt"),
        csv_reader.read_csv_schema,
        csv_reader.read_csv_batches,
        explicit_suffixes=(".txt",),
        can_be_compressed=True,
    ),
    "parquet": TableFormat(
        "Parquet",
        (".parquet", ".pq"),
        parquet_reader.read_parquet_schema,
        parquet_reader.read_parquet_batches,
        fallback_suffixes=(".pq",),
    ),
    "delta": TableFormat(
        "Delta",
        (),
        delta_reader.read_delta_schema,
        delta_reader.read_delta_batches,
        pin=delta_reader.pin_delta_table,
    ),
    "iceberg": TableFormat(
        "Iceberg",
        (),
        iceberg_reader.read_iceberg_schema,
        iceberg_reader.read_iceberg_batches,
        pin=iceberg_reader.pin_iceberg_table,
    ),
    "tree": ListingFormat(get_top_folder),
    "images": ListingFormat(None),
    "webdataset": ArchiveFormat(
        "WebDataset", (".tar", ".tgz"), TarArchive, archive_listing.list_webdataset
    ),
    "zip": ArchiveFormat("zip", (".zip",), ZipArchive, archive_listing.list_zip),
}
TABLE_FORMATS = {name: f for name, f in MANIFEST_FORMATS.items() if isinstance(f, TableFormat)}
_LISTINGS = tuple(name for name in MANIFEST_FORMATS if name not in TABLE_FORMATS)
FILE_FORMATS = {name: f for name, f in TABLE_FORMATS.items() if f.suffixes}
"""The table formats whose files have a suffix."""


def detect_table_format(path: str) -> str | None:
    """Format of a table by the suffix of its file; None for any other file."""
    if path.startswith(("http://", "https://")):
        path = path.partition("?")[0]  # the query of a signed URL
    base, suffix = os.path.splitext(path.lower())
    is_compressed = suffix in _COMPRESSION_SUFFIXES
    if is_compressed:
        suffix = os.path.splitext(base)[1]
    for name, format in TABLE_FORMATS.items():
        if suffix in format.suffixes and (format.can_be_compressed or not is_compressed):
            return name
    return None


def detect_archive_format(path: str) -> str | None:
    """Format of an archive by the suffix of its file; None for any other file.

    A compressed tar is one too: opening it raises the error with the command that converts it.
    """
    if path.startswith(("http://", "https://")):
        path = path.partition("?")[0]
    path = path.lower()
    for suffix in _COMPRESSION_SUFFIXES:
        path = path.removesuffix(suffix)
    for name, format in MANIFEST_FORMATS.items():
        if isinstance(format, ArchiveFormat) and path.endswith(format.suffixes):
            return name
    return None


def suggest_formats(keys: KeyNames, names: tuple[str, ...] = (*FILE_FORMATS, *_LISTINGS)) -> str:
    """The option and its values for an error message: "--manifest.format csv or parquet"."""
    *first, last = names
    values = f"{', '.join(first)} or {last}" if first else last
    return f"{keys.option('format')} {values}"
