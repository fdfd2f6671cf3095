"""Manifests: any table or folder of images, read as one stream of Arrow record batches.

Owns column names, labels and path resolution; `discovery` finds the files, `csv_reader` and
`parquet_reader` read them. Promises bounded memory, every row in file order, columns as they came,
and a ManifestError that names the place. What the paths lead to is not looked at here.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc

from imgcls.config import Section
from imgcls.data import csv_reader, filesystem, parquet_reader
from imgcls.data.csv_reader import CsvDialect
from imgcls.data.discovery import (
    ManifestFiles,
    filter_images,
    find_manifest_files,
    format_suffix_counts,
    log_skipped_files,
    walk_images,
)
from imgcls.data.schemas import conform_table, unify_schemas
from imgcls.errors import ManifestError, StorageError, request_error
from imgcls.log import tell


class ManifestConfig(Section):
    """Where the rows come from and which columns matter."""

    shorthand: ClassVar[str | None] = "path"

    path: str
    """CSV or Parquet (file, folder or glob), a folder per class, or a folder or glob of images."""
    format: Literal["auto", "csv", "parquet", "tree", "images"] = "auto"
    """tree: one folder per class. images: unlabelled files. auto: told from the path."""
    path_column: str = "path"
    """The column that holds image paths."""
    label_column: str | None = None
    """The column that holds class names; `label` when there is one."""
    root: str | None = None
    """Where relative paths start; the folder of the table they are in when not given."""
    delimiter: str | None = None
    """CSV delimiter; told from the header line when not given."""
    encoding: str = "utf-8"
    """CSV text encoding."""
    escape: str | None = None
    """CSV escape character before a quote inside a quoted value, such as \\ for files of Spark."""


@dataclass(frozen=True)
class Manifest:
    """An opened manifest: its schema is known, its rows are not read yet.

    schema:       Arrow schema of the columns as they came
    path_column:  name of the column of image paths
    label_column: name of the column of class names, None when unlabelled
    files:        the tables that it is read from; none of a folder or glob of images
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

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Stream the rows, in order; raises ManifestError where a row cannot be read."""
        return self._read_batches()

    def fingerprint(self) -> str:
        """BLAKE2b of the files' bytes, or of the listing (path, size) for folders of images."""
        return self._compute_fingerprint()

    def resolve(self, path: str | None) -> str | None:
        """The place that a row's path names: as it is when absolute, else below `root`."""
        return resolve_path(path, self.root)


def resolve_path(path: str | None, root: str) -> str | None:
    """`path` itself when absolute or a URL, else below `root`; None for a null path.

    On a store `./` and `../` are resolved here, since a key is not a path to it.
    """
    if path is None or filesystem.is_url(path) or os.path.isabs(path):
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
    """`resolve` of a whole column of paths, as large strings."""
    text = paths.cast(pa.large_string())
    if (
        not filesystem.is_local(root)
        and pc.any(pc.match_substring_regex(text, _DOT_SEGMENT.pattern)).as_py()
    ):
        return pa.chunked_array(
            [pa.array([resolve_path(path, root) for path in text.to_pylist()], pa.large_string())]
        )
    whole = pc.match_substring_regex(text, _ABSOLUTE)
    start = pa.scalar(root.rstrip("/"), pa.large_string())
    below = pc.binary_join_element_wise(start, text, pa.scalar("/", pa.large_string()))
    return pc.if_else(whole, text, below)


_ABSOLUTE = r"^(/|[A-Za-z0-9+]+://|data:)"


def make_paths_absolute(manifest: Manifest, rows: pa.Table) -> pa.Table:
    """Rows of a manifest that may be stored elsewhere: no path begins at the manifest's folder."""
    place = rows.schema.get_field_index(manifest.path_column)
    whole = resolve_paths(rows.column(manifest.path_column), manifest.root)
    return rows.set_column(place, manifest.path_column, whole)


def open_manifest(config: ManifestConfig, *, any_key: bool = False) -> Manifest:
    """Find out what the manifest is and check its columns, without reading its rows.

    any_key: the path column is a key to join by, of any type; no path is read from it
    Raises ManifestError when there is nothing there, the format is unclear or a column is missing.
    """
    try:
        found = find_manifest_files(config.path, config.format)
        if found.format in ("tree", "images"):
            return _open_listing(config, found)
        return _open_table(config, found, any_key=any_key)
    except (StorageError, UnicodeDecodeError) as error:
        raise request_error(ManifestError, f"manifest {config.path}: {error}", error) from error


def _open_table(config: ManifestConfig, found: ManifestFiles, *, any_key: bool) -> Manifest:
    files = found.files
    dialect = CsvDialect(config.delimiter, config.encoding, config.escape)

    def own_schema(file: str) -> pa.Schema:
        if found.format == "csv":
            return csv_reader.read_csv_header(file, dialect).schema
        return parquet_reader.read_parquet_schema(file)

    def partition(file: str, schema: pa.Schema) -> dict[str, str | None]:
        """The values in the file's folder names that are no columns of its own."""
        values = found.partitions.get(file, {})
        return {name: value for name, value in values.items() if name not in schema.names}

    def file_schemas() -> Iterator[tuple[str, pa.Schema]]:
        for file in files:
            own = own_schema(file)
            _check_duplicate_columns(file, own)
            added = [pa.field(name, pa.string()) for name in partition(file, own)]
            yield file, pa.schema([*own, *added])

    schema = unify_schemas(file_schemas(), "manifest")
    _check_columns(config, schema, any_key=any_key)
    folders = {get_table_folder(file) for file in files}
    own_folders = config.root is None and not found.partitions and len(folders) > 1 and not any_key
    place = schema.get_field_index(config.path_column)

    def batches() -> Iterator[pa.RecordBatch]:
        for file in files:
            own = (
                csv_reader.read_csv_batches(file, dialect)
                if found.format == "csv"
                else parquet_reader.read_parquet_batches(file)
            )
            for batch in own:
                if batch.schema.equals(schema) and not own_folders:
                    yield batch
                    continue
                table = pa.Table.from_batches([batch])
                for name, value in partition(file, batch.schema).items():
                    column = pa.array([value] * table.num_rows, pa.string())
                    table = table.append_column(name, column)
                table = conform_table(table, schema, f"manifest {file}")
                if own_folders:
                    table = _resolve_in_folder(table, place, get_table_folder(file))
                yield from table.combine_chunks().to_batches()

    return Manifest(
        source=config.path,
        format=found.format,
        schema=schema,
        path_column=config.path_column,
        label_column=_find_label_column(config, schema),
        root=filesystem.absolute(config.root or _find_root(found)),
        files=tuple(files),
        _read_batches=batches,
        _compute_fingerprint=lambda: _hash_files(files),
    )


def get_table_folder(file: str) -> str:
    """The folder of a table; the query of a signed URL is no part of it."""
    if file.startswith(("http://", "https://")):
        file = file.partition("?")[0]
    return filesystem.parent(file)


def _find_root(found: ManifestFiles) -> str:
    if found.partitions and found.folder is not None:
        return found.folder
    return get_table_folder(found.files[0])


def _resolve_in_folder(table: pa.Table, place: int, folder: str) -> pa.Table:
    """The relative paths of a table made whole, of several whose folders differ."""
    field, paths = table.schema.field(place), table.column(place)
    if pc.all(pc.match_substring_regex(paths.cast(pa.large_string()), _ABSOLUTE)).as_py():
        return table
    return table.set_column(place, field, resolve_paths(paths, folder).cast(field.type))


def _check_duplicate_columns(file: str, schema: pa.Schema) -> None:
    names = schema.names
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ManifestError(
            f"manifest {file}: column {doubled[0]!r} stands there twice; rename one"
        )


def _check_columns(config: ManifestConfig, schema: pa.Schema, *, any_key: bool) -> None:
    names = schema.names
    for option, name in (("path", config.path_column), ("label", config.label_column)):
        if name is not None and name not in names:
            raise ManifestError(
                f"manifest {config.path}: no column {name!r} (found: {_list_columns(schema)}); "
                f"name it with --manifest.{option}-column{_suggest_fix(name, names)}"
            )
    kind = schema.field(config.path_column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any_key and not any(check(kind) for check in is_text):
        raise ManifestError(
            f"manifest {config.path}: column {config.path_column!r} is {kind}, not text; "
            "name the column of paths with --manifest.path-column"
        )


def _suggest_fix(name: str, names: list[str]) -> str:
    """What else may be meant where a column is not found."""
    if len(names) == 1 and name in re.split(r"\W+", names[0]):
        return f", or the delimiter of {names[0]!r} with --manifest.delimiter"
    spaced = next((each for each in names if each != name and each.strip() == name), None)
    return "" if spaced is None else f"; {_describe_spaces(spaced)}"


def _describe_spaces(name: str) -> str:
    return (
        f"the name {name!r} has spaces around it: remove the spaces next to the delimiters, in the "
        "header and in the rows"
    )


def _find_label_column(config: ManifestConfig, schema: pa.Schema) -> str | None:
    if config.label_column is not None:
        return config.label_column
    if "label" in schema.names:
        return "label"
    for name in schema.names:
        if name.strip() == "label":
            raise ManifestError(
                f"manifest {config.path}: {_describe_spaces(name)}; or pass "
                f"--manifest.label-column {name!r}"
            )
        if name.strip().lower() == "label":
            tell(
                "note",
                f"manifest {config.path}: column {name!r} is not read as labels; pass "
                f"--manifest.label-column {name!r} if it holds them",
            )
    return None


def _list_columns(schema: pa.Schema) -> str:
    return ", ".join(schema.names) or "none"


def _hash_files(files: tuple[str, ...]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with filesystem.open_read(file) as stream:
            while block := stream.read(4 << 20):
                digest.update(block)
        digest.update(b"\x00end of file\x00")
    return digest.hexdigest()


# Listings: a folder per class, a folder of images, or a glob of images.


def _open_listing(config: ManifestConfig, found: ManifestFiles) -> Manifest:
    labelled = found.format == "tree"
    columns = [(config.path_column, pa.string())]
    label_column = (config.label_column or "label") if labelled else None
    if label_column is not None:
        columns.append((label_column, pa.string()))
    schema = pa.schema(columns)
    if len(set(schema.names)) < len(schema.names):
        raise ManifestError(
            f"manifest {config.path}: path_column and label_column are both "
            f"{config.path_column!r}; name two columns"
        )
    here = config.path if found.folder is not None else os.curdir
    root = filesystem.absolute(config.root or here if found.folder is not None else here)
    counted = False

    def paths() -> Iterator[str]:
        nonlocal counted
        skipped: Counter[str] = Counter()
        images = (
            walk_images(config.path, skipped)
            if found.folder is not None
            else filter_images(found.files, skipped)
        )
        none = True
        for path in images:
            none = False
            yield path
        if none:
            raise ManifestError(
                f"manifest {config.path}: no image in it"
                + (f" (passed over {format_suffix_counts(skipped)})" if skipped else "")
                + "; expected files like *.jpg or *.png, or one folder of them per class; images "
                "with other names can be listed in a CSV"
            )
        if not counted:
            counted = True
            log_skipped_files(config.path, skipped, "their names are not those of images")

    def batches() -> Iterator[pa.RecordBatch]:
        listing = paths()
        while chunk := [
            path for _, path in zip(range(parquet_reader.READ_BATCH_ROWS), listing, strict=False)
        ]:
            arrays = [pa.array(chunk, pa.string())]
            if labelled:
                arrays.append(
                    pa.array([_get_class_name(config, path) for path in chunk], pa.string())
                )
            yield pa.record_batch(arrays, schema=schema)

    next(paths())
    return Manifest(
        source=config.path,
        format=found.format,
        schema=schema,
        path_column=config.path_column,
        label_column=label_column,
        root=root,
        files=(),
        _read_batches=batches,
        _compute_fingerprint=lambda: _hash_listing(paths(), root),
    )


def _get_class_name(config: ManifestConfig, path: str) -> str:
    folder, separator, _ = path.partition("/")
    if not separator:
        raise ManifestError(
            f"manifest {config.path}: {path!r} lies beside the class folders; move it into one, "
            "or say --manifest.format images"
        )
    return folder


def _hash_listing(paths: Iterator[str], root: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        place = resolve_path(path, root)
        bytes_ = _get_file_size(place) if place is not None and filesystem.is_local(place) else 0
        digest.update(f"{path}\x00{bytes_}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _get_file_size(place: str) -> int:
    try:
        return filesystem.size(place)
    except StorageError:
        return -1  # a dead link is a row, and fails as a row


def normalize_labels(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A label column of any type as strings to be matched with class names; nulls stay null.

    Whole floats lose their point, since pandas turns integer labels with a gap into 3.0. Text is
    normalized to NFC, since macOS decomposes the accents of folder names, and a label of nothing
    but spaces is null.
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
            "--manifest.label-column"
        ) from error
    blank = pc.equal(pc.utf8_trim_whitespace(text), "")
    return pc.if_else(blank, None, pc.utf8_normalize(text, form="NFC"))


def find_label_variants(counts: Mapping[str, int], classes: Iterable[str] = ()) -> list[str]:
    """Labels that differ only by case, spaces or compatibility forms, as text with their counts.

    counts:  rows by label, as `labels_as_text` gives them
    classes: of a model; given some, only labels that are not among them and are like one of them
    """
    known = set(classes)
    groups: dict[str, set[str]] = {}
    for name in {*counts, *known}:
        key = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        groups.setdefault(key, set()).add(name)
    told = []
    for group in groups.values():
        if len(group) > 1 and (not known or (group & known and group - known)):
            shown = [
                f"{name!r} ({counts[name]:,} {'row' if counts[name] == 1 else 'rows'})"
                if name in counts
                else f"class {name!r}"
                for name in sorted(group)
            ]
            told.append(" and ".join(shown))
    return sorted(told)


def log_label_variants(place: str, counts: Mapping[str, int], classes: Iterable[str] = ()) -> None:
    """Log labels that are probably one class written in several ways."""
    alike = find_label_variants(counts, classes)
    if alike:
        more = f", and {len(alike) - 5} more" if len(alike) > 5 else ""
        tell(
            "note",
            f"{place}: labels that differ only by case or spaces are different classes: "
            f"{'; '.join(alike[:5])}{more}",
        )
