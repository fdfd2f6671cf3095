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
from imgcls.data.csv_reader import Dialect
from imgcls.data.discovery import (
    Found,
    described,
    find_manifest,
    images_among,
    images_below,
    tell_skipped,
)
from imgcls.data.schemas import conform, unify_schemas
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
    _batches: Callable[[], Iterator[pa.RecordBatch]] = field(repr=False)
    _digest: Callable[[], str] = field(repr=False)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Stream the rows, in order; raises ManifestError where a row cannot be read."""
        return self._batches()

    def fingerprint(self) -> str:
        """BLAKE2b of the files' bytes, or of the listing (path, size) for folders of images."""
        return self._digest()

    def resolve(self, path: str | None) -> str | None:
        """The place that a row's path names: as it is when absolute, else below `root`."""
        return resolve(path, self.root)


def resolve(path: str | None, root: str) -> str | None:
    """`path` itself when absolute or a URL, else below `root`; None for a null path.

    On a store `./` and `../` are resolved here, since a key is not a path to it.
    """
    if path is None or filesystem.is_url(path) or os.path.isabs(path):
        return path
    if not filesystem.is_local(root) and _DOTS.search(path):
        return _without_dots(path, root)
    return filesystem.join(root, path)


_DOTS = re.compile(r"(^|/)\.\.?(/|$)")


def _without_dots(path: str, root: str) -> str:
    scheme, _, rest = root.rstrip("/").partition("://")
    bucket, *folders = rest.split("/")
    for part in path.split("/"):
        if part == ".." and folders:
            folders.pop()
        elif part not in (".", ".."):
            folders.append(part)
    return f"{scheme}://{'/'.join([bucket, *folders])}"


def resolved(paths: pa.ChunkedArray, root: str) -> pa.ChunkedArray:
    """`resolve` of a whole column of paths, as large strings."""
    text = paths.cast(pa.large_string())
    if (
        not filesystem.is_local(root)
        and pc.any(pc.match_substring_regex(text, _DOTS.pattern)).as_py()
    ):
        return pa.chunked_array(
            [pa.array([resolve(path, root) for path in text.to_pylist()], pa.large_string())]
        )
    whole = pc.match_substring_regex(text, _WHOLE)
    start = pa.scalar(root.rstrip("/"), pa.large_string())
    below = pc.binary_join_element_wise(start, text, pa.scalar("/", pa.large_string()))
    return pc.if_else(whole, text, below)


_WHOLE = r"^(/|[A-Za-z0-9+]+://|data:)"


def with_whole_paths(manifest: Manifest, rows: pa.Table) -> pa.Table:
    """Rows of a manifest that may be stored elsewhere: no path begins at the manifest's folder."""
    place = rows.schema.get_field_index(manifest.path_column)
    whole = resolved(rows.column(manifest.path_column), manifest.root)
    return rows.set_column(place, manifest.path_column, whole)


def open_manifest(config: ManifestConfig, *, any_key: bool = False) -> Manifest:
    """Find out what the manifest is and check its columns, without reading its rows.

    any_key: the path column is a key to join by, of any type; no path is read from it
    Raises ManifestError when there is nothing there, the format is unclear or a column is missing.
    """
    try:
        found = find_manifest(config.path, config.format)
        if found.format in ("tree", "images"):
            return _open_listing(config, found)
        return _open_table(config, found, any_key=any_key)
    except (StorageError, UnicodeDecodeError) as error:
        raise request_error(ManifestError, f"manifest {config.path}: {error}", error) from error


def _open_table(config: ManifestConfig, found: Found, *, any_key: bool) -> Manifest:
    files = found.files
    dialect = Dialect(config.delimiter, config.encoding, config.escape)

    def own_schema(file: str) -> pa.Schema:
        if found.format == "csv":
            return csv_reader.read_header(file, dialect).schema
        return parquet_reader.read_schema(file)

    def partition(file: str, schema: pa.Schema) -> dict[str, str | None]:
        """The values in the file's folder names that are no columns of its own."""
        values = found.partitions.get(file, {})
        return {name: value for name, value in values.items() if name not in schema.names}

    def file_schemas() -> Iterator[tuple[str, pa.Schema]]:
        for file in files:
            own = own_schema(file)
            _check_doubled(file, own)
            added = [pa.field(name, pa.string()) for name in partition(file, own)]
            yield file, pa.schema([*own, *added])

    schema = unify_schemas(file_schemas(), "manifest")
    _check_columns(config, schema, any_key=any_key)
    folders = {folder_of(file) for file in files}
    own_folders = config.root is None and not found.partitions and len(folders) > 1 and not any_key
    place = schema.get_field_index(config.path_column)

    def batches() -> Iterator[pa.RecordBatch]:
        for file in files:
            own = (
                csv_reader.read_batches(file, dialect)
                if found.format == "csv"
                else parquet_reader.read_batches(file)
            )
            for batch in own:
                if batch.schema.equals(schema) and not own_folders:
                    yield batch
                    continue
                table = pa.Table.from_batches([batch])
                for name, value in partition(file, batch.schema).items():
                    column = pa.array([value] * table.num_rows, pa.string())
                    table = table.append_column(name, column)
                table = conform(table, schema, f"manifest {file}")
                if own_folders:
                    table = _with_own_folder(table, place, folder_of(file))
                yield from table.combine_chunks().to_batches()

    return Manifest(
        source=config.path,
        format=found.format,
        schema=schema,
        path_column=config.path_column,
        label_column=_label_column(config, schema),
        root=filesystem.absolute(config.root or _root_of(found)),
        files=tuple(files),
        _batches=batches,
        _digest=lambda: _digest_files(files),
    )


def folder_of(file: str) -> str:
    """The folder of a table; the query of a signed URL is no part of it."""
    if file.startswith(("http://", "https://")):
        file = file.partition("?")[0]
    return filesystem.parent(file)


def _root_of(found: Found) -> str:
    if found.partitions and found.folder is not None:
        return found.folder
    return folder_of(found.files[0])


def _with_own_folder(table: pa.Table, place: int, folder: str) -> pa.Table:
    """The relative paths of a table made whole, of several whose folders differ."""
    field, paths = table.schema.field(place), table.column(place)
    if pc.all(pc.match_substring_regex(paths.cast(pa.large_string()), _WHOLE)).as_py():
        return table
    return table.set_column(place, field, resolved(paths, folder).cast(field.type))


def _check_doubled(file: str, schema: pa.Schema) -> None:
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
                f"manifest {config.path}: no column {name!r} (found: {_listed(schema)}); "
                f"name it with --manifest.{option}-column{_hint(name, names)}"
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


def _hint(name: str, names: list[str]) -> str:
    """What else may be meant where a column is not found."""
    if len(names) == 1 and name in re.split(r"\W+", names[0]):
        return f", or the delimiter of {names[0]!r} with --manifest.delimiter"
    spaced = next((each for each in names if each != name and each.strip() == name), None)
    return "" if spaced is None else f"; {_spaces(spaced)}"


def _spaces(name: str) -> str:
    return (
        f"the name {name!r} has spaces around it: remove the spaces next to the delimiters, in the "
        "header and in the rows"
    )


def _label_column(config: ManifestConfig, schema: pa.Schema) -> str | None:
    if config.label_column is not None:
        return config.label_column
    if "label" in schema.names:
        return "label"
    for name in schema.names:
        if name.strip() == "label":
            raise ManifestError(
                f"manifest {config.path}: {_spaces(name)}; or pass --manifest.label-column {name!r}"
            )
        if name.strip().lower() == "label":
            tell(
                "note",
                f"manifest {config.path}: column {name!r} is not read as labels; pass "
                f"--manifest.label-column {name!r} if it holds them",
            )
    return None


def _listed(schema: pa.Schema) -> str:
    return ", ".join(schema.names) or "none"


def _digest_files(files: tuple[str, ...]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with filesystem.open_read(file) as stream:
            while block := stream.read(4 << 20):
                digest.update(block)
        digest.update(b"\x00end of file\x00")
    return digest.hexdigest()


# Listings: a folder per class, a folder of images, or a glob of images.


def _open_listing(config: ManifestConfig, found: Found) -> Manifest:
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
            images_below(config.path, skipped)
            if found.folder is not None
            else images_among(found.files, skipped)
        )
        none = True
        for path in images:
            none = False
            yield path
        if none:
            raise ManifestError(
                f"manifest {config.path}: no image in it"
                + (f" (passed over {described(skipped)})" if skipped else "")
                + "; expected files like *.jpg or *.png, or one folder of them per class; images "
                "with other names can be listed in a CSV"
            )
        if not counted:
            counted = True
            tell_skipped(config.path, skipped, "their names are not those of images")

    def batches() -> Iterator[pa.RecordBatch]:
        listing = paths()
        while chunk := [
            path for _, path in zip(range(parquet_reader.BATCH_ROWS), listing, strict=False)
        ]:
            arrays = [pa.array(chunk, pa.string())]
            if labelled:
                arrays.append(pa.array([_class_of(config, path) for path in chunk], pa.string()))
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
        _batches=batches,
        _digest=lambda: _digest_listing(paths(), root),
    )


def _class_of(config: ManifestConfig, path: str) -> str:
    folder, separator, _ = path.partition("/")
    if not separator:
        raise ManifestError(
            f"manifest {config.path}: {path!r} lies beside the class folders; move it into one, "
            "or say --manifest.format images"
        )
    return folder


def _digest_listing(paths: Iterator[str], root: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        place = resolve(path, root)
        bytes_ = _size(place) if place is not None and filesystem.is_local(place) else 0
        digest.update(f"{path}\x00{bytes_}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _size(place: str) -> int:
    try:
        return filesystem.size(place)
    except StorageError:
        return -1  # a dead link is a row, and fails as a row


def labels_as_text(column: pa.Array | pa.ChunkedArray) -> pa.Array:
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


def alike_labels(counts: Mapping[str, int], classes: Iterable[str] = ()) -> list[str]:
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


def tell_alike_labels(place: str, counts: Mapping[str, int], classes: Iterable[str] = ()) -> None:
    """Log labels that are probably one class written in several ways."""
    alike = alike_labels(counts, classes)
    if alike:
        more = f", and {len(alike) - 5} more" if len(alike) > 5 else ""
        tell(
            "note",
            f"{place}: labels that differ only by case or spaces are different classes: "
            f"{'; '.join(alike[:5])}{more}",
        )
