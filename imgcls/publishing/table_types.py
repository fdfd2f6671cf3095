"""Types of lakehouse tables: the columns of a run as Delta and Iceberg tables can store them.

Neither has Arrow's dictionaries, fixed-size lists, half floats or unsigned integers. Each becomes
the narrowest common type that holds all its values. Only timestamps are changed: they are stored in
microseconds, and nanoseconds are cut off. Columns are nullable, so that runs with other columns can
be added.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.types as kinds

from imgcls.errors import RequestError

_PLAIN = {
    pa.int8(): pa.int32(),
    pa.int16(): pa.int32(),
    pa.uint8(): pa.int32(),
    pa.uint16(): pa.int32(),
    pa.uint32(): pa.int64(),
    pa.uint64(): pa.decimal128(20, 0),
    pa.float16(): pa.float32(),
    pa.large_string(): pa.string(),
    pa.string_view(): pa.string(),
    pa.large_binary(): pa.binary(),
    pa.binary_view(): pa.binary(),
    pa.date64(): pa.date32(),
    pa.time32("s"): pa.time64("us"),
    pa.time32("ms"): pa.time64("us"),
}
_UNCHANGED = {
    pa.bool_(), pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.string(), pa.binary(),
    pa.date32(), pa.time64("us"),
}  # fmt: skip


def build_table_schema(schema: pa.Schema, place: str, *, has_times: bool) -> pa.Schema:
    """The schema with which a table stores columns; columns of nulls without a type are left out.

    place:     where the columns come from, with which errors begin
    has_times: whether the table format has a type for times of day, which Delta lacks
    Raises RequestError that names a column that cannot be stored.
    """
    fields = []
    for field in schema:
        if kinds.is_null(field.type):
            continue
        stored = _convert_type(field.type)
        if stored is None or (not has_times and _contains_time(stored)):
            raise RequestError(
                f"{place}: column {field.name!r} is {field.type}, which the table format cannot "
                "store. Leave it out of the manifest, or write it as another type"
            )
        fields.append(pa.field(field.name, stored))
    return pa.schema(fields)


def fit_schema(table: pa.Schema, run: pa.Schema, place: str, target: str) -> pa.Schema:
    """The schema of a run's rows in an existing table: its columns, then those to be added.

    table: the columns of the table, as its library reads them
    run:   a schema of `build_table_schema`
    Raises RequestError that names a column whose type does not fit, that differs only by case, or
    that the table requires and the run lacks.
    """
    for field in table:
        if not field.nullable and field.name not in run.names:
            raise RequestError(
                f"{target}: column {field.name!r} is required, and {place} has no such column. "
                "Make it optional, or pass another target"
            )
    columns = {field.name.casefold(): field for field in table}
    added = []
    for field in run:
        known = columns.get(field.name.casefold())
        if known is None:
            added.append(field)
        elif known.name != field.name:
            raise RequestError(
                f"{target}: has a column {known.name!r}, and {place} has {field.name!r}, which "
                "differs only by case. Rename one of them"
            )
        elif not _holds(known.type, field.type):
            raise RequestError(
                f"{target}: column {field.name!r} is {known.type}, and {field.type} in {place}. A "
                "table is changed only by adding columns: write the column as the table's type, "
                "or pass another target"
            )
    return pa.schema([*table, *added])


def convert_table(table: pa.Table, schema: pa.Schema, place: str) -> pa.Table:
    """Convert rows to exactly the columns of a schema; a missing column is null.

    Raises RequestError that names a column with a value that its type cannot hold.
    """
    columns = []
    for field in schema:
        at = table.schema.get_field_index(field.name)
        column = table.column(at) if at >= 0 else pa.nulls(table.num_rows)
        if column.null_count and not field.nullable:
            raise RequestError(
                f"{place}: column {field.name!r} has rows without a value, which the table "
                "requires. Make the column of the table optional, or pass another target"
            )
        try:
            columns.append(_cut_nanoseconds(_decode(column)).cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise RequestError(
                f"{place}: column {field.name!r} has a value that {field.type}, its type in the "
                f"table, cannot hold ({error})"
            ) from error
    return pa.table(columns, schema=schema)


def _decode(column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    return column.cast(column.type.value_type) if kinds.is_dictionary(column.type) else column


def _cut_nanoseconds(column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """The column with timestamps in microseconds, for which a safe cast refuses nanoseconds."""
    kind = _use_microseconds(column.type)
    return column if kind.equals(column.type) else column.cast(kind, safe=False)


def _use_microseconds(kind: pa.DataType) -> pa.DataType:
    if kinds.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if kinds.is_struct(kind):
        return pa.struct([field.with_type(_use_microseconds(field.type)) for field in kind])
    if kinds.is_map(kind):
        return pa.map_(_use_microseconds(kind.key_type), _use_microseconds(kind.item_type))
    if kinds.is_list(kind):
        return pa.list_(_use_microseconds(kind.value_type))
    if kinds.is_large_list(kind):
        return pa.large_list(_use_microseconds(kind.value_type))
    if kinds.is_fixed_size_list(kind):
        return pa.list_(_use_microseconds(kind.value_type), kind.list_size)
    return kind


def _convert_type(kind: pa.DataType) -> pa.DataType | None:
    """The type that a table stores values of `kind` with; None where there is none."""
    if kind in _UNCHANGED:
        return kind
    if kind in _PLAIN:
        return _PLAIN[kind]
    if kinds.is_dictionary(kind):
        return _convert_type(kind.value_type)
    if kinds.is_timestamp(kind):
        return pa.timestamp("us", "UTC" if kind.tz else None)
    if kinds.is_decimal(kind):
        return pa.decimal128(kind.precision, kind.scale) if kind.precision <= 38 else None
    if kinds.is_fixed_size_binary(kind):
        return pa.binary()
    return _convert_nested_type(kind)


def _convert_nested_type(kind: pa.DataType) -> pa.DataType | None:
    if kinds.is_struct(kind):
        inner = [_convert_type(field.type) for field in kind]
        if None in inner:
            return None
        return pa.struct([pa.field(f.name, t) for f, t in zip(kind, inner, strict=True)])
    if kinds.is_map(kind):
        key, item = _convert_type(kind.key_type), _convert_type(kind.item_type)
        return None if key is None or item is None else pa.map_(key, item)
    if _is_list(kind):
        value = _convert_type(kind.value_type)
        return None if value is None else pa.list_(value)
    return None


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        kinds.is_list(kind)
        or kinds.is_large_list(kind)
        or kinds.is_fixed_size_list(kind)
        or kinds.is_list_view(kind)
        or kinds.is_large_list_view(kind)
    )


def _contains_time(kind: pa.DataType) -> bool:
    if kinds.is_time(kind):
        return True
    return any(_contains_time(kind.field(at).type) for at in range(kind.num_fields))


def _holds(column: pa.DataType, kind: pa.DataType) -> bool:
    """Whether a column of a table can have all values of a type of `build_table_schema`."""
    if kinds.is_integer(column) and kinds.is_integer(kind):
        return bool(column.bit_width >= kind.bit_width)
    if kinds.is_floating(column) and kinds.is_floating(kind):
        return bool(column.bit_width >= kind.bit_width)
    stored = _convert_type(column)
    return stored is not None and bool(stored.equals(kind))
