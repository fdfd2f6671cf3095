"""Manifests: any table or folder of images, read as one stream of Arrow record batches.

Owns the formats (CSV, Parquet, one folder per class, a folder or glob of images), column names and
path resolution; promises bounded memory, every row in file order, columns as they came, and a
ManifestError that names the place. What the paths lead to is not looked at here.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from imgcls.config import Section
from imgcls.data import storage
from imgcls.data.formats import LISTED, LISTING, is_image_name
from imgcls.errors import ManifestError, StorageError, request_error

BATCH_ROWS = 16_384
_CSV_BLOCK_BYTES = 8 << 20
_TABLE_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}


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
    """Where relative paths start; the manifest's own folder when not given."""
    delimiter: str | None = None
    """CSV delimiter; told from the header line when not given."""
    encoding: str = "utf-8"
    """CSV text encoding."""


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
    """`path` itself when absolute or a URL, else below `root`; None for a null path."""
    if path is None or storage.is_url(path) or os.path.isabs(path):
        return path
    return storage.join(root, path)


def resolved(paths: pa.ChunkedArray, root: str) -> pa.ChunkedArray:
    """`resolve` of a whole column of paths, as large strings."""
    text = paths.cast(pa.large_string())
    whole = pc.match_substring_regex(text, r"^(/|[A-Za-z0-9+]+://|data:)")
    start = pa.scalar(root.rstrip("/"), pa.large_string())
    below = pc.binary_join_element_wise(start, text, pa.scalar("/", pa.large_string()))
    return pc.if_else(whole, text, below)


def with_whole_paths(manifest: Manifest, rows: pa.Table) -> pa.Table:
    """Rows of a manifest that may be stored elsewhere: no path begins at the manifest's folder."""
    place = rows.schema.get_field_index(manifest.path_column)
    whole = resolved(rows.column(manifest.path_column), manifest.root)
    return rows.set_column(place, manifest.path_column, whole)


def open_manifest(config: ManifestConfig) -> Manifest:
    """Find out what the manifest is and check its columns, without reading its rows.

    Raises ManifestError when there is nothing there, the format is unclear or a column is missing.
    """
    try:
        files, format = _locate(config)
        if format in ("tree", "images"):
            return _open_listing(config, format, files)
        return _open_table(config, format, files)
    except (StorageError, UnicodeDecodeError) as error:
        raise request_error(ManifestError, f"manifest {config.path}: {error}", error) from error


def _locate(config: ManifestConfig) -> tuple[list[str], str]:
    """The files of a manifest and its format."""
    url = config.path
    if storage.is_folder(url):
        return _locate_in_folder(config)
    if config.format == "tree":
        raise ManifestError(f"manifest {url}: is no folder; a tree is a folder with one per class")
    if storage.exists(url):
        return [url], _format_of(config, [url])
    if re.search(r"[*?\[]", url):
        files = storage.find(url)
        if not files:
            raise ManifestError(f"manifest {url}: no file matches; check the pattern")
        return files, _format_of(config, files)
    where = f"relative to {os.getcwd()}" if storage.is_local(url) and not os.path.isabs(url) else ""
    raise ManifestError(
        f"manifest {url}: no such file or folder {where}".rstrip()
        + "; give a CSV or Parquet file, a glob, or a folder of images"
    )


def _locate_in_folder(config: ManifestConfig) -> tuple[list[str], str]:
    url = config.path
    if config.format in ("tree", "images"):
        return [], config.format
    here = storage.names(url)
    if LISTING in here and LISTED not in here:
        raise ManifestError(
            f"manifest {url}: its listing was broken off; run `imgcls manifest build` again, which "
            "goes on where it stopped"
        )
    for suffix, format in ((".parquet", "parquet"), (".csv", "csv")):
        tables = [storage.join(url, n) for n in here if n.lower().endswith(suffix)]
        if tables and config.format in ("auto", format):
            return tables, format
    if config.format != "auto":
        raise ManifestError(f"manifest {url}: the folder holds no {config.format} file")
    top = next((name for name in here if is_image_name(name)), None)
    if top is None:
        return [], "tree"
    below = next((p for p in storage.walk(url) if "/" in p and is_image_name(p)), None)
    if below is not None:
        raise ManifestError(
            f"manifest {url}: has images beside its folders ({top!r}) and in them ({below!r}); say "
            "--manifest.format images to take all of them, unlabelled, or move those beside the "
            "folders into one for --manifest.format tree"
        )
    return [], "images"


def _format_of(config: ManifestConfig, files: list[str]) -> str:
    if config.format != "auto":
        return config.format
    suffixes = {os.path.splitext(file)[1].lower() for file in files}
    formats = {_TABLE_SUFFIXES.get(suffix) for suffix in suffixes}
    if formats == {"csv"} or formats == {"parquet"}:
        return str(formats.pop())
    if all(is_image_name(file) for file in files):
        return "images"
    raise ManifestError(
        f"manifest {config.path}: cannot tell the format from {', '.join(sorted(suffixes))!r}; "
        "say --manifest.format csv, parquet or images"
    )


def _open_table(config: ManifestConfig, format: str, files: list[str]) -> Manifest:
    read_schema = _csv_schema if format == "csv" else _parquet_schema
    read_batches = _csv_batches if format == "csv" else _parquet_batches
    schema = read_schema(config, files[0])
    for file in files[1:]:
        other = read_schema(config, file)
        if not other.equals(schema):
            raise ManifestError(
                f"manifest {file}: {_difference(other, schema)} {files[0]}; give tables of one "
                "shape"
            )
    _check_columns(config, schema)

    def batches() -> Iterator[pa.RecordBatch]:
        for file in files:
            yield from read_batches(config, file, schema)

    folder = storage.parent(files[0])
    return Manifest(
        source=config.path,
        format=format,
        schema=schema,
        path_column=config.path_column,
        label_column=_label_column(config, schema),
        root=storage.absolute(config.root or folder),
        files=tuple(files),
        _batches=batches,
        _digest=lambda: _digest_files(files),
    )


def _difference(schema: pa.Schema, first: pa.Schema) -> str:
    if schema.names != first.names:
        return f"its columns ({_listed(schema)}) differ from ({_listed(first)}) in"
    mine, theirs = next((a, b) for a, b in zip(schema, first, strict=True) if not a.equals(b))
    kinds = [f"{f.type}" if f.nullable else f"{f.type} not null" for f in (mine, theirs)]
    return f"its column {mine.name!r} is {kinds[0]}, and {kinds[1]} in"


def _check_columns(config: ManifestConfig, schema: pa.Schema) -> None:
    names = schema.names
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ManifestError(
            f"manifest {config.path}: column {doubled[0]!r} stands there twice; rename one"
        )
    for option, name in (("path", config.path_column), ("label", config.label_column)):
        if name is not None and name not in names:
            raise ManifestError(
                f"manifest {config.path}: no column {name!r} (found: {_listed(schema)}); "
                f"name it with --manifest.{option}-column"
            )
    kind = schema.field(config.path_column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(check(kind) for check in is_text):
        raise ManifestError(
            f"manifest {config.path}: column {config.path_column!r} is {kind}, not text; "
            "name the column of paths with --manifest.path-column"
        )


def _label_column(config: ManifestConfig, schema: pa.Schema) -> str | None:
    if config.label_column is not None:
        return config.label_column
    return "label" if "label" in schema.names else None


def _listed(schema: pa.Schema) -> str:
    return ", ".join(schema.names) or "none"


# CSV: every column is text as it came. Guessing types from the first block would turn 007 into 7
# and break off at the first row that does not fit the guess.


def _csv_header(config: ManifestConfig, file: str) -> tuple[list[str], str, str]:
    """Column names, delimiter and encoding."""
    with storage.open_read(file) as stream:
        head = stream.read(1 << 20)
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else config.encoding
    try:
        text = head.decode(encoding, errors="ignore" if len(head) == 1 << 20 else "strict")
    except (UnicodeDecodeError, LookupError) as error:
        raise ManifestError(
            f"manifest {file}: not {encoding} text ({error}); say --manifest.encoding"
        ) from error
    text = text.lstrip("\ufeff\r\n")
    first_line = text.partition("\n")[0]
    if not first_line.strip():
        raise ManifestError(f"manifest {file}: is empty; the first line must name the columns")
    if "\x00" in first_line:
        raise ManifestError(
            f"manifest {file}: holds binary data, not CSV; say --manifest.format parquet if it is"
        )
    delimiter = config.delimiter or _delimiter(first_line)
    if len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\r\n':
        raise ManifestError(
            f"manifest.delimiter: {delimiter!r} must be one ASCII character, as , or ; or a tab"
        )
    try:
        names = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise ManifestError(f"manifest {file}: the header cannot be read: {error}") from error
    return names, delimiter, encoding


def _delimiter(header: str) -> str:
    unquoted = re.sub(r'"[^"]*"', "", header)
    counts = {mark: unquoted.count(mark) for mark in (",", ";", "\t", "|")}
    best = max(counts, key=lambda mark: counts[mark])
    return best if counts[best] else ","


def _csv_schema(config: ManifestConfig, file: str) -> pa.Schema:
    names, _, _ = _csv_header(config, file)
    return pa.schema([(name, pa.string()) for name in names])


def _csv_batches(config: ManifestConfig, file: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    _, delimiter, encoding = _csv_header(config, file)
    place = f"manifest {file}"
    with storage.open_read(file) as stream:
        try:
            reader = pa_csv.open_csv(
                stream,
                read_options=pa_csv.ReadOptions(
                    block_size=_CSV_BLOCK_BYTES,
                    use_threads=False,
                    encoding=encoding,
                ),
                parse_options=pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=pa_csv.ConvertOptions(
                    column_types=schema,
                    null_values=[""],
                    strings_can_be_null=True,
                    quoted_strings_can_be_null=False,
                ),
            )
            last = ""
            for batch in reader:
                if batch.num_rows:
                    last = batch.column(batch.num_columns - 1)[-1].as_py() or ""
                    yield batch
        except pa.ArrowInvalid as error:
            if "Empty CSV" in str(error):
                return
            remedy = (
                "say --manifest.encoding"
                if "UTF8" in str(error)
                else "mend the row, or quote values that hold the delimiter"
            )
            raise ManifestError(f"{place}: {_tidy(error)}; {remedy}") from error
        except (UnicodeDecodeError, OSError) as error:
            raise ManifestError(f"{place}: {_tidy(error)}; say --manifest.encoding") from error
        if any(mark in last for mark in "\r\n") and not _ends_quoted(stream):
            raise ManifestError(
                f"{place}: a quote is opened and never closed before {_tidy(last)!r}; close it, or "
                "double it where it is part of a value"
            )


def _ends_quoted(stream: IO[bytes]) -> bool:
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - 64))
    return stream.read().rstrip(b"\r\n\0").endswith(b'"')  # \0: of UTF-16


def _parquet_schema(config: ManifestConfig, file: str) -> pa.Schema:
    return _open_parquet(file).schema_arrow.remove_metadata()


def _parquet_batches(
    config: ManifestConfig, file: str, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    try:
        for batch in _open_parquet(file).iter_batches(batch_size=BATCH_ROWS):
            if batch.num_rows:
                batch.validate(full=True)  # Parquet's readers let text pass that is not UTF-8
                yield batch
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"manifest {file}: {_tidy(error)}; the file is damaged") from error


def _open_parquet(file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(storage.open_read(file), pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(
            f"manifest {file}: not a Parquet file, or a damaged one ({_tidy(error)}); if it is "
            "CSV, say --manifest.format csv"
        ) from error


def _tidy(text: object) -> str:
    return " ".join(str(text).split())[:300]


def _digest_files(files: list[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with storage.open_read(file) as stream:
            while block := stream.read(4 << 20):
                digest.update(block)
        digest.update(b"\x00end of file\x00")
    return digest.hexdigest()


# Listings: a folder per class, a folder of images, or a glob of images.


def _open_listing(config: ManifestConfig, format: str, files: list[str]) -> Manifest:
    labelled = format == "tree"
    columns = [(config.path_column, pa.string())]
    label_column = (config.label_column or "label") if labelled else None
    if label_column is not None:
        columns.append((label_column, pa.string()))
    schema = pa.schema(columns)
    root = (
        storage.absolute(config.root or config.path) if not files else storage.absolute(os.curdir)
    )

    def paths() -> Iterator[str]:
        found = files or storage.walk(config.path)
        return (_as_text(config, path) for path in found if is_image_name(path))

    def batches() -> Iterator[pa.RecordBatch]:
        listing = paths()
        while chunk := [path for _, path in zip(range(BATCH_ROWS), listing, strict=False)]:
            arrays = [pa.array(chunk, pa.string())]
            if labelled:
                arrays.append(pa.array([_class_of(config, path) for path in chunk], pa.string()))
            yield pa.record_batch(arrays, schema=schema)

    if next(paths(), None) is None:
        raise ManifestError(
            f"manifest {config.path}: no image in it; expected files like *.jpg or *.png, or one "
            "folder of them per class"
        )
    return Manifest(
        source=config.path,
        format=format,
        schema=schema,
        path_column=config.path_column,
        label_column=label_column,
        root=root,
        files=(),
        _batches=batches,
        _digest=lambda: _digest_listing(paths(), root),
    )


def _as_text(config: ManifestConfig, path: str) -> str:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ManifestError(
            f"manifest {config.path}: the file name {path!r} is not UTF-8; rename it, since a "
            "table cannot hold it"
        ) from error
    return path


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
        bytes_ = _size(place) if place is not None and storage.is_local(place) else 0
        digest.update(f"{path}\x00{bytes_}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _size(place: str) -> int:
    try:
        return storage.size(place)
    except StorageError:
        return -1  # a dead link is a row, and fails as a row


def labels_as_text(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A label column of any type as strings to be matched with class names; nulls stay null.

    Whole floats lose their point, since pandas turns integer labels with a gap into 3.0.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
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
        return array.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ManifestError(
            f"labels of type {array.type} cannot be read as class names; name another "
            "--manifest.label-column"
        ) from error
