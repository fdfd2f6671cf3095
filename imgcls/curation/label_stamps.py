"""Columns of a manifest with the source of each label: annotator, time and tool."""

from __future__ import annotations

import pyarrow as pa

from imgcls.data.annotations.annotation import parse_time
from imgcls.data.manifests.image_columns import is_text
from imgcls.errors import ManifestError

TIME_TYPE = pa.timestamp("us", tz="UTC")
ADDED_COLUMNS = (
    pa.field("labeled_by", pa.string()),
    pa.field("labeled_at", TIME_TYPE),
    pa.field("label_source", pa.string()),
)
"""Who gave the label, when, and with which tool; null for a label that was not imported."""


def read_stamp(table: pa.Table, field: pa.Field, source: str) -> pa.Array:
    """A column of `ADDED_COLUMNS` of rows, in its type; times without a zone are in UTC.

    source: the manifest, for messages
    Raises ManifestError for a column or time that cannot be converted.
    """
    if field.name not in table.schema.names:
        return pa.nulls(table.num_rows, field.type)
    column = table.column(field.name).combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    place = f"manifest {source}: column {field.name!r}"
    if field.type == TIME_TYPE and is_text(column.type):
        return _parse_times(column, place)
    try:
        return column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        if field.type == TIME_TYPE and pa.types.is_timestamp(column.type):
            raise _build_time_error(column, place, error) from error
        raise ManifestError(
            f"manifest {source}: has a column {field.name!r} of the type "
            f"{column.type}, which an import of labels writes as {field.type}; rename it"
        ) from error


def _parse_times(column: pa.Array, place: str) -> pa.Array:
    """Times as text in UTC; one without a zone is in UTC."""
    encoded = column.dictionary_encode()
    times = [parse_time(text, place) for text in encoded.dictionary.to_pylist()]
    return pa.array(times, TIME_TYPE).take(encoded.indices)


def _build_time_error(column: pa.Array, place: str, error: Exception) -> ManifestError:
    """The error for a time that is not one in microseconds, with the first such value."""
    numbers = column.cast(pa.int64()).to_pylist()
    value = next(
        (text for text, number in zip(column.cast(pa.string()).to_pylist(), numbers, strict=True)
         if number is not None and number % 1000),
        error,
    )  # fmt: skip
    return ManifestError(
        f"{place} has the time {value}, which is not in whole microseconds; round the column"
    )
