"""Manifests: any table or folder of images, read as one stream of Arrow record batches.

Owns column names, labels and path resolution. `discovery` finds the files, `manifest_formats` has
the readers. Memory is bounded, rows keep the order of the files, columns their values and types,
and a ManifestError names the place. The images themselves are not read here.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from imgcls import log
from imgcls.config import Names, Section
from imgcls.data.containers import members
from imgcls.data.manifests import fingerprint
from imgcls.data.manifests.archive_listing import ArchiveOptions
from imgcls.data.manifests.archive_manifest import ArchiveTable
from imgcls.data.manifests.columns import (
    check_columns,
    check_duplicate_columns,
    check_named_column,
    find_label_column,
)
from imgcls.data.manifests.discovery import (
    ManifestFiles,
    filter_images,
    find_manifest_files,
    format_suffix_counts,
    log_skipped_files,
    walk_images,
)
from imgcls.data.manifests.image_columns import find_image_columns, leave_out_images
from imgcls.data.manifests.label_columns import LIST_NAMES, LabelColumns, find_label_columns
from imgcls.data.manifests.options import DEFAULT_KEYS, ImageColumns, KeyNames, ReadOptions
from imgcls.data.manifests.parquet_reader import READ_BATCH_ROWS
from imgcls.data.manifests.readers import (
    MANIFEST_FORMATS,
    ArchiveFormat,
    ListingFormat,
    ManifestFormat,
    TableFormat,
)
from imgcls.data.manifests.schemas import conform_table, unify_schemas
from imgcls.data.storage import filesystem
from imgcls.errors import ManifestError, StorageError, request_error
from imgcls.formatting import format_count


class ManifestConfig(Section):
    """The table or folder that lists the images, and its columns."""

    shorthand: ClassVar[str | None] = "path"

    path: str
    """CSV, Parquet, WebDataset or zip (file, folder, glob or {000..099}), a folder of images,
    delta:PATH[@VERSION] or iceberg:CATALOG.NAMESPACE.TABLE[@SNAPSHOT]."""
    format: ManifestFormat = "auto"
    """tree: a folder per class. images: unlabeled files. webdataset: tar. auto: by the name."""
    path_column: str = "path"
    """Name of the column of image paths."""
    image_column: str | None = None
    """Column of the images themselves: bytes, struct<bytes, path> (default: detected) or base64."""
    label_column: str | None = None
    """Name of the column of class names (default: `label`, if the table has it). A column of lists
    has any number of classes per image."""
    label_delimiter: str | None = None
    """Separator of several class names in the label column, such as ; (multi-label)."""
    label_columns: Names = []
    """Columns of classes, separated by commas: 1, 0, or no value where unknown (multi-label)."""
    drop_columns: Names = []
    """Columns that are not read, separated by commas: no output has them. `label`: unlabeled."""
    root: str | None = None
    """Folder where relative paths start (default: the folder of their table)."""
    delimiter: str | None = None
    """CSV delimiter, one character (default: detected in the header line)."""
    encoding: str = "utf-8"
    """CSV text encoding."""
    escape: str | None = None
    """CSV escape character before a quote inside a quoted value, such as \\ for files of Spark."""


@dataclass(frozen=True)
class Manifest:
    """An opened manifest: the schema is known, the rows are not read yet.

    schema:       Arrow schema of the columns, as in the files
    path_column:  name of the column of image paths
    label_column: name of the column of class names, None when unlabeled or multi-label
    label_columns: where the labels are, if an image may have any number of them
    files:        the tables of the manifest; empty for a folder or glob of images
    version:      of a table with versions, such as a snapshot; else None
    dropped:      the columns that are not read
    csv_options:  names and values of those that are not the default, see `ReadOptions`
    """

    source: str
    format: str
    schema: pa.Schema
    path_column: str
    label_column: str | None
    root: str
    files: tuple[str, ...]
    _read_batches: Callable[[], Iterator[pa.RecordBatch]] = field(repr=False)
    _compute_fingerprint: Callable[[], str] = field(repr=False)
    version: str | None = None
    dropped: tuple[str, ...] = ()
    label_columns: LabelColumns | None = None
    csv_options: tuple[tuple[str, str], ...] = ()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Stream the rows, in order; raises ManifestError where a row cannot be read."""
        return self._read_batches()

    def fingerprint(self) -> str:
        """BLAKE2b of the files' bytes, or of a listing of path and size for images and archives.

        Of a file with columns of images, its size, footer and other columns.
        """
        return self._compute_fingerprint()

    def describe_identity(self) -> dict[str, Any]:
        """The entries of a run's identity: fingerprint, columns, root, version, CSV options."""
        identity: dict[str, Any] = {
            "fingerprint": self.fingerprint(),
            "path_column": self.path_column,
            "label_column": self.label_column,
            "root": self.root,
        }
        if self.version is not None:
            identity["version"] = self.version
        if self.label_columns is not None:
            identity["label_columns"] = self.label_columns.to_json()
        if self.dropped:
            identity["drop_columns"] = list(self.dropped)
        return identity | dict(self.csv_options)

    def find_label_columns(self) -> LabelColumns | None:
        """The labels as those of a multi-label manifest; a column of class names has one each."""
        if self.label_columns is None and self.label_column is not None:
            return LabelColumns(self.label_column)
        return self.label_columns

    def resolve(self, path: str | None) -> str | None:
        """Resolve the path of a row: unchanged when absolute or a URL, else below `root`."""
        return resolve_path(path, self.root)


def resolve_path(path: str | None, root: str) -> str | None:
    """Resolve a path: unchanged when absolute or a URL, else below `root`; None for a null path.

    On an object store `./` and `../` are resolved here, since its keys are plain strings.
    """
    if path is None or os.path.isabs(path):
        return path
    member = members.find_member(path)
    if member is not None:
        return str(replace(member, file=resolve_path(member.file, root) or member.file))
    if filesystem.is_url(path):
        return path
    if not filesystem.is_local(root) and _DOT_SEGMENT.search(path):
        return _remove_dot_segments(path, root)
    return filesystem.join(root, path)


_DOT_SEGMENT = re.compile(r"(^|/)\.\.?(/|$)")


def _remove_dot_segments(path: str, root: str) -> str:
    scheme, _, rest = root.rstrip("/").partition("://")
    bucket, *folders = rest.split("/")
    for part in path.split("/"):
        if part == ".." and folders:
            folders.pop()
        elif part not in (".", ".."):
            folders.append(part)
    return f"{scheme}://{'/'.join([bucket, *folders])}"


def resolve_paths(paths: pa.ChunkedArray, root: str) -> pa.ChunkedArray:
    """`resolve_path` of a whole column, as large strings."""
    text = paths.cast(pa.large_string())
    has_dots = pc.any(pc.match_substring_regex(text, _DOT_SEGMENT.pattern)).as_py()
    has_members = pc.any(pc.match_substring_regex(text, _MEMBER)).as_py()
    if has_members or (has_dots and not filesystem.is_local(root)):
        return pa.chunked_array(
            [pa.array([resolve_path(path, root) for path in text.to_pylist()], pa.large_string())]
        )
    is_absolute = pc.match_substring_regex(text, _ABSOLUTE)
    start = pa.scalar(root.rstrip("/"), pa.large_string())
    below = pc.binary_join_element_wise(start, text, pa.scalar("/", pa.large_string()))
    return pc.if_else(is_absolute, text, below)


_ABSOLUTE = r"^(/|[A-Za-z0-9+]+://|data:|file:/)"
_MEMBER = f"^({'|'.join(members.CONTAINER_KINDS)})://"


def make_paths_absolute(manifest: Manifest, rows: pa.Table) -> pa.Table:
    """Rows of a manifest with absolute paths, so that they may be stored in another folder."""
    index = rows.schema.get_field_index(manifest.path_column)
    paths = resolve_paths(rows.column(manifest.path_column), manifest.root)
    return rows.set_column(index, manifest.path_column, paths)


def open_manifest(
    config: ManifestConfig, *, any_key: bool = False, keys: KeyNames = DEFAULT_KEYS
) -> Manifest:
    """Detect the format of a manifest and check its columns, without reading its rows.

    any_key: the path column is a key for a join, of any type; no path is read from it
    keys:    the configuration keys that error messages name
    Raises ManifestError when nothing is found, the format is ambiguous or a column is missing.
    """
    try:
        found = find_manifest_files(config.path, config.format, keys)
        format = MANIFEST_FORMATS[found.format]
        if isinstance(format, ArchiveFormat):
            manifest = _open_archives(config, found, format, keys)
        elif isinstance(format, ListingFormat):
            manifest = _ImageListing(config, found, format, keys).open()
        else:
            manifest = _TableFiles(config, found, format, keys).open(any_key=any_key)
        labels = find_label_columns(config, manifest.schema, keys)
        if labels is not None:
            manifest = replace(manifest, label_column=None, label_columns=labels)
        return _drop_columns(manifest, config, keys) if config.drop_columns else manifest
    except (StorageError, UnicodeDecodeError) as error:
        raise request_error(ManifestError, f"manifest {config.path}: {error}", error) from error


def _drop_columns(manifest: Manifest, config: ManifestConfig, keys: KeyNames) -> Manifest:
    dropped, option = tuple(sorted(set(config.drop_columns))), keys.option("drop_columns")
    for name in dropped:
        check_named_column(config, manifest.schema, name, option)
        if name in (manifest.path_column, config.label_column, *config.label_columns):
            raise ManifestError(
                f"manifest {config.path}: column {name!r} is read as that of the "
                f"{'paths' if name == manifest.path_column else 'labels'}; remove it from {option}"
            )
    kept = [name for name in manifest.schema.names if name not in dropped]
    labels = set(() if manifest.label_columns is None else manifest.label_columns.names)
    return replace(
        manifest,
        schema=pa.schema([manifest.schema.field(name) for name in kept]),
        label_column=None if manifest.label_column in dropped else manifest.label_column,
        label_columns=manifest.label_columns if labels <= set(kept) else None,
        _read_batches=lambda: (batch.select(kept) for batch in manifest.batches()),
        dropped=dropped,
    )


def _open_archives(
    config: ManifestConfig, found: ManifestFiles, format: ArchiveFormat, keys: KeyNames
) -> Manifest:
    options = ArchiveOptions(
        config.path_column, config.label_column, keys, tuple(config.label_columns)
    )
    table = ArchiveTable(config.path, found.files, format, options)
    return Manifest(
        source=config.path,
        format=found.format,
        schema=table.schema,
        path_column=config.path_column,
        label_column=table.label_column,
        root=filesystem.absolute(config.root or get_table_folder(found.files[0])),
        files=table.files,
        _read_batches=table.iter_batches,
        _compute_fingerprint=table.compute_fingerprint,
    )


class _TableFiles:
    """The tables of a manifest, read as one table."""

    def __init__(
        self, config: ManifestConfig, found: ManifestFiles, format: TableFormat, keys: KeyNames
    ) -> None:
        self._config, self._found, self._format, self._keys = config, found, format, keys
        self._options = ReadOptions(
            config.delimiter,
            config.encoding,
            config.escape,
            keys,
            list_labels=LIST_NAMES if config.label_column is None else (config.label_column,),
        )

    def open(self, *, any_key: bool) -> Manifest:
        files = self._found.files
        schema = unify_schemas(self._iter_schemas(), "manifest")
        images = self._find_image_columns(schema, any_key=any_key)
        self._options = replace(self._options, images=images)
        schema = images.convert_schema(schema)
        config = self._config.model_copy(
            update={"path_column": images.name or self._config.path_column}
        )
        check_columns(
            config,
            schema,
            self._keys,
            any_key=any_key,
            may_contain_images=self._found.format == "parquet",
        )
        folders = {get_table_folder(file) for file in files}
        has_own_folders = (
            config.root is None and not self._found.partitions and len(folders) > 1 and not any_key
        )
        return Manifest(
            source=config.path,
            format=self._found.format,
            schema=schema,
            path_column=config.path_column,
            label_column=find_label_column(config, schema, self._keys),
            root=filesystem.absolute(config.root or _find_root(self._found)),
            files=tuple(files),
            _read_batches=lambda: self._iter_batches(schema, config.path_column, has_own_folders),
            _compute_fingerprint=lambda: self._found.compute_fingerprint(images.contained),
            version=self._found.version_name,
            csv_options=self._options.list_csv_options() if self._found.format == "csv" else (),
        )

    def _find_image_columns(self, schema: pa.Schema, *, any_key: bool) -> ImageColumns:
        config = self._config
        if self._found.format == "parquet":
            # a column of paths that the user named must be in the table
            is_default = config.path_column == ManifestConfig.model_fields["path_column"].default
            return find_image_columns(
                schema,
                config.path,
                self._keys,
                chosen=config.image_column,
                path_column=config.path_column,
                may_detect=is_default and not any_key,
            )
        if config.image_column is not None:
            raise ManifestError(
                f"manifest {config.path}: {self._keys.option('image_column')} is for Parquet files"
                "; write the table as Parquet, or the images as data: URLs in a column of paths "
                "(data:image/jpeg;base64,...)"
            )
        return leave_out_images(schema, config.path)

    def _get_partition(self, file: str, schema: pa.Schema) -> dict[str, str | None]:
        """The values in the folder names of a file that are not columns of the file."""
        values = self._found.partitions.get(file, {})
        return {name: value for name, value in values.items() if name not in schema.names}

    def _iter_schemas(self) -> Iterator[tuple[str, pa.Schema]]:
        for file in self._found.files:
            own = self._format.read_schema(file, self._options)
            check_duplicate_columns(file, own)
            added = [pa.field(name, pa.string()) for name in self._get_partition(file, own)]
            yield file, pa.schema([*own, *added])

    def _iter_batches(
        self, schema: pa.Schema, path_column: str, has_own_folders: bool
    ) -> Iterator[pa.RecordBatch]:
        """All rows in the common schema.

        has_own_folders: relative paths start at the folder of their table
        """
        path_index = schema.get_field_index(path_column)
        for file in self._found.files:
            for batch in self._format.read_batches(file, self._options):
                if batch.schema.equals(schema) and not has_own_folders:
                    yield batch
                    continue
                table = pa.Table.from_batches([batch])
                for name, value in self._get_partition(file, batch.schema).items():
                    column = pa.array([value] * table.num_rows, pa.string())
                    table = table.append_column(name, column)
                table = conform_table(table, schema, f"manifest {file}")
                if has_own_folders:
                    table = _resolve_in_folder(table, path_index, get_table_folder(file))
                yield from table.combine_chunks().to_batches()


def get_table_folder(file: str) -> str:
    """The folder of a table, without the query of a signed URL."""
    if file.startswith(("http://", "https://")):
        file = file.partition("?")[0]
    return filesystem.parent(file)


def _find_root(found: ManifestFiles) -> str:
    if found.version is not None:
        return found.version.folder
    if found.partitions and found.folder is not None:
        return found.folder
    return get_table_folder(found.files[0])


def _resolve_in_folder(table: pa.Table, path_index: int, folder: str) -> pa.Table:
    """Make the relative paths of a table absolute, where tables are in several folders."""
    field, paths = table.schema.field(path_index), table.column(path_index)
    if pc.all(pc.match_substring_regex(paths.cast(pa.large_string()), _ABSOLUTE)).as_py():
        return table
    return table.set_column(path_index, field, resolve_paths(paths, folder).cast(field.type))


class _ImageListing:
    """Image files of a folder or glob, one row per file; the folder is listed at each pass."""

    def __init__(
        self, config: ManifestConfig, found: ManifestFiles, format: ListingFormat, keys: KeyNames
    ) -> None:
        self._config, self._found, self._keys = config, found, keys
        self._get_label = format.get_label
        self._has_logged = False

    def open(self) -> Manifest:
        """Raises ManifestError where there is no image."""
        config = self._config
        label_column = None if self._get_label is None else config.label_column or "label"
        if label_column == config.path_column:
            raise ManifestError(
                f"manifest {config.path}: {self._keys.option('path_column')} and "
                f"{self._keys.option('label_column')} are both {config.path_column!r}; name two "
                "columns"
            )
        names = [config.path_column, *([] if label_column is None else [label_column])]
        schema = pa.schema([(name, pa.string()) for name in names])
        if self._found.folder is None:
            root = filesystem.absolute(os.curdir)
        else:
            root = filesystem.absolute(config.root or config.path)
        next(self._iter_paths())
        return Manifest(
            source=config.path,
            format=self._found.format,
            schema=schema,
            path_column=config.path_column,
            label_column=label_column,
            root=root,
            files=(),
            _read_batches=lambda: self._iter_batches(schema),
            _compute_fingerprint=lambda: fingerprint.hash_listing(
                (path, resolve_path(path, root)) for path in self._iter_paths()
            ),
        )

    def _iter_paths(self) -> Iterator[str]:
        skipped: Counter[str] = Counter()
        if self._found.folder is None:
            images = filter_images(self._found.files, skipped)
        else:
            images = walk_images(self._config.path, skipped)
        first = next(images, None)
        if first is None:
            raise ManifestError(
                f"manifest {self._config.path}: contains no image"
                + (f" (skipped {format_suffix_counts(skipped)})" if skipped else "")
                + "; expected files like *.jpg or *.png, or one folder of them per class; images "
                "with other names can be listed in a CSV"
            )
        yield first
        yield from images
        if not self._has_logged:
            self._has_logged = True
            log_skipped_files(self._config.path, skipped, "their names are not those of images")

    def _iter_batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        paths = self._iter_paths()
        while chunk := list(itertools.islice(paths, READ_BATCH_ROWS)):
            columns = [pa.array(chunk, pa.string())]
            if self._get_label is not None:
                columns.append(pa.array([self._read_label(path) for path in chunk], pa.string()))
            yield pa.record_batch(columns, schema=schema)

    def _read_label(self, path: str) -> str:
        assert self._get_label is not None
        label = self._get_label(path)
        if label is None:
            raise ManifestError(
                f"manifest {self._config.path}: {path!r} is next to the class folders; move it "
                f"into one, or pass {self._keys.option('format')} images"
            )
        return label


def normalize_labels(column: pa.Array | pa.ChunkedArray, keys: KeyNames = DEFAULT_KEYS) -> pa.Array:
    """Convert a label column of any type to strings that match class names; nulls stay null.

    Whole floats lose their decimal point, since pandas turns integer labels with a gap into 3.0.
    Text is normalized to NFC, since macOS decomposes the accents of folder names, and a blank label
    is null.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_floating(array.type):
        values: list[Any] = array.to_pylist()
        return pa.array(
            [
                None if v is None or v != v else str(int(v)) if v.is_integer() else str(v)
                for v in values
            ],
            pa.string(),
        )
    try:
        text = array.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ManifestError(
            f"labels of type {array.type} cannot be read as class names; name another "
            f"{keys.option('label_column')}"
        ) from error
    is_blank = pc.equal(pc.utf8_trim_whitespace(text), "")
    return pc.if_else(is_blank, None, pc.utf8_normalize(text, form="NFC"))


def find_label_variants(counts: Mapping[str, int], classes: Iterable[str] = ()) -> list[str]:
    """Labels that differ only by case, spaces or compatibility forms, as text with their counts.

    counts:  rows by label, as `normalize_labels` returns them
    classes: classes of a model; with it, only labels that are similar to a class are returned
    """
    known = set(classes)
    groups: dict[str, set[str]] = {}
    for name in {*counts, *known}:
        key = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        groups.setdefault(key, set()).add(name)
    found = []
    for group in groups.values():
        if len(group) > 1 and (not known or (group & known and group - known)):
            shown = [
                f"{name!r} ({format_count(counts[name], 'row')})"
                if name in counts
                else f"class {name!r}"
                for name in sorted(group)
            ]
            found.append(" and ".join(shown))
    return sorted(found)


def log_label_variants(place: str, counts: Mapping[str, int], classes: Iterable[str] = ()) -> None:
    """Log labels that are probably one class written in several ways."""
    variants = find_label_variants(counts, classes)
    if variants:
        more = f", and {len(variants) - 5} more" if len(variants) > 5 else ""
        log.emit(
            "note",
            f"{place}: labels that differ only by case or spaces are different classes: "
            f"{'; '.join(variants[:5])}{more}",
        )
