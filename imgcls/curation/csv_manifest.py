"""Manifests as CSV: labels of several classes as text with a separator."""

from __future__ import annotations

import contextlib

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from imgcls.data.manifests.image_columns import has_bytes
from imgcls.data.storage import filesystem
from imgcls.errors import ManifestError


def write_csv_manifest(target: str, rows: pa.Table, separator: str) -> None:
    """Write a manifest with the column `label`; lists in it become text.

    A list without a class is the separator alone, and an unlabeled row has an empty text. Raises
    ManifestError where a class name contains the separator, for other nested columns, and for bytes
    that are not UTF-8.
    """
    index = rows.schema.get_field_index("label")
    if index >= 0 and pa.types.is_list(rows.schema.field(index).type):
        column = rows.column(index).combine_chunks()
        rows = rows.set_column(
            index,
            "label",
            join_names(column, separator, f"output {target}", "pass another --csv-separator"),
        )
    rows = _convert_bytes(rows)
    for field in rows.schema:
        if pa.types.is_nested(field.type) or has_bytes(field.type):
            raise ManifestError(
                f"output {target}: column {field.name!r} is {field.type}, which CSV cannot have; "
                "remove it, or pass --output-format parquet"
            )
    with filesystem.open_write(target) as stream:
        pa_csv.write_csv(rows, stream)


def _convert_bytes(rows: pa.Table) -> pa.Table:
    """The table with text for bytes that are UTF-8."""
    for at, field in enumerate(rows.schema):
        if has_bytes(field.type):
            with contextlib.suppress(pa.ArrowInvalid):
                text = rows.column(at).cast(pa.binary()).cast(pa.string())
                rows = rows.set_column(at, field.name, text)
    return rows


def join_names(lists: pa.ListArray, separator: str, place: str, remedy: str) -> pa.Array:
    """Text of lists of class names; a list without one is the separator alone.

    Raises ManifestError with a remedy where a name contains the separator.
    """
    names = pc.unique(lists.flatten())
    has_separator = pc.match_substring(names, separator)
    if pc.any(has_separator).as_py():
        name = names.filter(has_separator)[0].as_py()
        raise ManifestError(
            f"{place}: the class name {name!r} contains the separator {separator!r}; {remedy}"
        )
    text = pc.binary_join(lists, separator)
    return pc.if_else(pc.equal(pc.list_value_length(lists), 0), separator, text)
