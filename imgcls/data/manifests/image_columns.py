"""Columns of a Parquet manifest that contain the images themselves.

The manifest is read without them: the column of images becomes text, the member URL of each row,
see `parquet_images`.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as kinds

from imgcls import log
from imgcls.data.containers.members import MemberUrl, parse_member_url
from imgcls.data.containers.parquet_images import ParquetImages
from imgcls.data.manifests.options import ImageColumns, KeyNames
from imgcls.data.storage import filesystem
from imgcls.data.storage.error_details import shorten_url
from imgcls.errors import ManifestError, StorageError, request_error


def find_image_columns(
    schema: pa.Schema,
    source: str,
    keys: KeyNames,
    *,
    chosen: str | None,
    path_column: str,
    may_detect: bool,
) -> ImageColumns:
    """Find the columns of images of a Parquet manifest.

    chosen:      the column that the user named
    path_column: name of the column of paths, which is used where the table has it
    may_detect:  whether a column that neither of them names may be that of the images
    Raises ManifestError where several columns could be, and where the named one cannot.
    """
    structs = [field.name for field in schema if is_image_struct(field.type)]
    lists = [field.name for field in schema if _is_image_list(field.type)]
    name = chosen or (path_column if path_column in structs else None)
    is_binary_file = _has_binary_files(schema)
    if name is None and may_detect and (is_binary_file or path_column not in schema.names):
        candidates = structs or [field.name for field in schema if is_bytes(field.type)]
        if is_binary_file:
            candidates = ["content"]
        if len(candidates) > 1:
            raise ManifestError(
                f"manifest {source}: columns {' and '.join(map(repr, candidates))} may contain the "
                f"images; name one with {keys.option('image_column')}"
            )
        name = next(iter(candidates), None)
        if name is not None:
            log.emit("note", f"manifest {source}: the images are those in column {name!r}")
    if name is not None:
        _check_image_column(schema, name, source, keys, is_chosen=chosen is not None)
    left_out = tuple(each for each in (*structs, *lists) if each != name)
    for each in left_out:
        fix = f"; to read them pass {keys.option('image_column')} {each}" if each in structs else ""
        used = f" (the images are those of column {name or path_column!r})"
        log.emit("note", f"manifest {source}: column {each!r} of images is left out{used}{fix}")
    copy = f"{name}_path"
    has_copy = name in structs and copy.casefold() not in map(str.casefold, schema.names)
    return ImageColumns(name, copy if has_copy else None, left_out)


def leave_out_images(schema: pa.Schema, source: str) -> ImageColumns:
    """The columns of images of a manifest in a format whose images are not read from its rows."""
    left_out = tuple(each.name for each in schema if is_image_struct(each.type))
    for name in left_out:
        log.emit(
            "note",
            f"manifest {source}: column {name!r} of images is left out, since images are read from "
            "Parquet files only",
        )
    return ImageColumns(left_out=left_out)


def is_image_struct(type: pa.DataType) -> bool:
    """Whether a type is struct<bytes, path>, as Hugging Face `datasets` writes images."""
    if not kinds.is_struct(type) or {field.name for field in type} != {"bytes", "path"}:
        return False
    parts = {field.name: field.type for field in type}
    return is_bytes(parts["bytes"]) and (is_text(parts["path"]) or kinds.is_null(parts["path"]))


def is_pixel_struct(type: pa.DataType) -> bool:
    """Whether a type is that of Spark's image source: decoded pixels and their size."""
    names = {field.name for field in type} if kinds.is_struct(type) else set()
    return {"height", "width", "nChannels", "mode", "data"} <= names


def is_bytes(type: pa.DataType) -> bool:
    """Whether a type has bytes of any length as values."""
    if kinds.is_dictionary(type):
        type = type.value_type
    return bool(kinds.is_binary(type) or kinds.is_large_binary(type) or kinds.is_binary_view(type))


def has_bytes(type: pa.DataType) -> bool:
    """Whether a type has bytes as values, of any length or of one."""
    return is_bytes(type) or bool(kinds.is_fixed_size_binary(type))


def is_text(type: pa.DataType) -> bool:
    """Whether a type has text as values."""
    if kinds.is_dictionary(type):
        type = type.value_type
    return bool(kinds.is_string(type) or kinds.is_large_string(type) or kinds.is_string_view(type))


def _has_binary_files(schema: pa.Schema) -> bool:
    """Whether a table has the columns of Spark's binaryFile source: paths and contents of files."""
    return {"path", "modificationTime", "length", "content"} <= set(schema.names) and is_bytes(
        schema.field("content").type
    )


def _is_image_list(type: pa.DataType) -> bool:
    """Whether a type is a list of struct<bytes, path>, at any depth."""
    is_list = kinds.is_list(type) or kinds.is_large_list(type) or kinds.is_fixed_size_list(type)
    return is_list and (is_image_struct(type.value_type) or _is_image_list(type.value_type))


def _check_image_column(
    schema: pa.Schema, name: str, source: str, keys: KeyNames, *, is_chosen: bool
) -> None:
    option = keys.option("image_column")
    if name not in schema.names:
        raise ManifestError(
            f"manifest {source}: no column {name!r} (found: {', '.join(schema.names) or 'none'}); "
            f"name it with {option}"
        )
    type = schema.field(name).type
    if not (is_bytes(type) or is_image_struct(type) or (is_chosen and is_text(type))):
        raise ManifestError(
            f"manifest {source}: column {name!r} is {type}, which is not one image per row; "
            f"{option} takes binary, base64 text or struct<bytes, path>"
        )


class MemberColumn:
    """The column of images of one file as text: the member URL of each row.

    A row without bytes has the path of its struct<bytes, path>, or null.
    """

    def __init__(self, file: str, name: str) -> None:
        """Raises ManifestError where the images cannot be read."""
        path = filesystem.absolute(file)
        try:
            images = ParquetImages(path)
            self._version = images.get_version(name)
            self._nulls = images.find_null_rows(name)
        except StorageError as error:
            raise request_error(ManifestError, f"manifest {error}", error) from error
        url = MemberUrl("parquet", path, f"{name}/")
        if parse_member_url(str(url)) != url:
            raise ManifestError(
                f"manifest {shorten_url(file)}: a folder with # in its name cannot be part of the "
                "URLs of its images; rename it"
            )
        self._start = str(url)
        self._row = 0

    def build_next(self, paths: pa.Array | None, rows: int) -> pa.Array:
        """(rows,) string: the URLs of the rows that follow those of the last call.

        paths: of the struct<bytes, path>; None for a column of bytes or text
        """
        end = self._row + rows
        numbers = pa.array(np.arange(self._row, end), pa.int64()).cast(pa.string())
        urls = pc.binary_join_element_wise(self._start, numbers, f"/{self._version}", "")
        nulls = pa.array(self._nulls[self._row : end])
        self._row = end
        return pc.if_else(nulls, pa.nulls(rows, pa.string()) if paths is None else paths, urls)
