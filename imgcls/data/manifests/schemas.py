"""Unification of Arrow schemas: one schema for the rows of several tables.

Used wherever files are read as one table: the shards of a manifest, the parts of a run, the runs of
a history. A column that is null in one file, a dictionary with 8-bit indices, or an int32 where
other files have an int64 is converted without loss. For types that cannot be unified, the error
names the file and the column.
"""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.types as kinds

from imgcls.errors import ManifestError


def widen_types(schema: pa.Schema) -> pa.Schema:
    """Widen the types of a schema, so that they can have the values of all files.

    8-bit and 16-bit indices of dictionaries become int32: pandas writes int8 for up to 127
    categories, and two files together may have more. A dictionary inside a list, struct or map
    becomes its plain values, since Arrow cannot unify such dictionaries. Views of text and bytes
    become plain ones, because Arrow can neither take nor filter views.
    """
    fields = []
    for field in schema:
        wide = _widen_type(field.type)
        fields.append(field if wide.equals(field.type) else field.with_type(wide))
    return pa.schema(fields)


def unify_schemas(
    schemas: Iterable[tuple[str, pa.Schema]], kind: str, *, optional: bool = False
) -> pa.Schema:
    """The schema with the columns of all tables, in the order of the first one.

    schemas:  (place, schema) of each table; errors name the place
    kind:     kind of the tables, with which errors begin, such as "manifest"
    optional: whether a column may be missing in some tables; it is then null for their rows
    Null becomes any other type; integers, floats, decimals, strings and times become the wider
    type; a dictionary becomes plain values where other tables have those.
    Raises ManifestError that names the column, both types and both places where types cannot be
    unified, or where a column is missing.
    """
    pairs = iter(schemas)
    first_place, first = next(pairs)
    common = last = widen_types(first)
    places = dict.fromkeys(common.names, first_place)
    for place, schema in pairs:
        other = widen_types(schema)
        if other.equals(last):
            continue
        last = other
        if not optional and set(other.names) != set(common.names):
            raise ManifestError(
                f"{kind} {place}: its columns ({_list_columns(other)}) differ from "
                f"({_list_columns(common)}) "
                f"in {first_place}; pass tables with the same columns"
            )
        for field in other:
            at = common.get_field_index(field.name)
            if at < 0:
                common = common.append(field.with_nullable(True))
                places[field.name] = place
                continue
            known = common.field(at)
            type = _find_common_type(known.type, field.type)
            if type is None:
                raise ManifestError(
                    f"{kind} {place}: its column {field.name!r} is {field.type}, and {known.type} "
                    f"in {places[field.name]}; write it as one type in all tables"
                )
            if kinds.is_null(known.type):
                places[field.name] = place
            nullable = known.nullable or field.nullable
            common = common.set(at, known.with_type(type).with_nullable(nullable))
        for name in set(common.names) - set(other.names):
            at = common.get_field_index(name)
            common = common.set(at, common.field(at).with_nullable(True))
    return common


def conform_table(table: pa.Table, schema: pa.Schema, place: str) -> pa.Table:
    """Convert a table to exactly the columns of a unified schema, in its order and types.

    place: name of the table in errors
    A missing column is null. Raises ManifestError where a value does not fit,
    such as an integer above 2**53 in a column that is float64 in another file.
    """
    if table.schema.equals(schema):
        return table
    columns = []
    for field in schema:
        at = table.schema.get_field_index(field.name)
        if at < 0:
            columns.append(pa.chunked_array([pa.nulls(table.num_rows, field.type)]))
            continue
        try:
            columns.append(_cast(table.column(at), field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ManifestError(
                f"{place}: column {field.name!r} is {table.schema.field(at).type} and cannot be "
                f"read as {field.type}, as other files require ({error}); write it as one type in "
                "all files"
            ) from error
    return pa.table(columns, schema=schema)


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if column.type.equals(kind):
        return column
    if kinds.is_null(column.type):
        return pa.chunked_array([pa.nulls(len(column), kind)])
    if kinds.is_dictionary(column.type) and kinds.is_dictionary(kind):
        chunks = [
            pa.DictionaryArray.from_arrays(
                chunk.indices.cast(kind.index_type),
                chunk.dictionary.cast(kind.value_type),
                ordered=kind.ordered,
            )
            for chunk in column.chunks
        ]
        return pa.chunked_array(chunks, kind)
    cast = column.cast(kind)
    if kinds.is_nested(kind):
        cast.validate(full=True)  # Arrow 26 adds some missing children of structs at a wrong length
    return cast


def _widen_type(kind: pa.DataType, *, inside: bool = False) -> pa.DataType:
    if kinds.is_dictionary(kind):
        if inside:
            return _widen_type(kind.value_type, inside=True)
        narrow = kind.index_type.bit_width < 32
        index = pa.int32() if narrow else kind.index_type
        return pa.dictionary(index, _widen_type(kind.value_type), ordered=kind.ordered)
    if kinds.is_struct(kind):
        return pa.struct([_widen_field(field) for field in kind])
    if kinds.is_map(kind):
        return pa.map_(
            _widen_field(kind.key_field), _widen_field(kind.item_field), kind.keys_sorted
        )
    if kinds.is_fixed_size_list(kind):
        return pa.list_(_widen_field(kind.value_field), kind.list_size)
    if kinds.is_large_list(kind):
        return pa.large_list(_widen_field(kind.value_field))
    if kinds.is_list(kind):
        return pa.list_(_widen_field(kind.value_field))
    if kinds.is_string_view(kind):
        return pa.string()
    if kinds.is_binary_view(kind):
        return pa.binary()
    return kind


def _widen_field(field: pa.Field) -> pa.Field:
    return field.with_type(_widen_type(field.type, inside=True))


def _find_common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """A type for the values of both without loss; None where there is none."""
    if one.equals(other):
        return one
    if kinds.is_null(one) or kinds.is_null(other):
        return other if kinds.is_null(one) else one
    if kinds.is_dictionary(one) != kinds.is_dictionary(other):
        one, other = _get_value_type(one), _get_value_type(other)
        return one if one.equals(other) else _find_common_type(one, other)
    if _is_text(one) and _is_text(other):
        large = kinds.is_large_string(one) or kinds.is_large_string(other)
        return pa.large_string() if large else pa.string()
    if _is_text(one) != _is_text(other):
        return None  # Arrow would read text as bytes
    if kinds.is_decimal(one) and kinds.is_floating(other):
        return None  # not every decimal is a float
    if kinds.is_floating(one) and kinds.is_decimal(other):
        return None
    if kinds.is_timestamp(one) and kinds.is_timestamp(other) and one.tz and other.tz:
        # an instant is the same in every time zone
        tz = one.tz if one.tz == other.tz else "UTC"
        one, other = pa.timestamp(one.unit, tz), pa.timestamp(other.unit, tz)
    if {one, other} <= _INTEGERS and pa.uint64() in (one, other) and one != other:
        signed = other if one == pa.uint64() else one
        return None if kinds.is_signed_integer(signed) else pa.uint64()
    try:
        both = [pa.schema([("column", kind)]) for kind in (one, other)]
        return pa.unify_schemas(both, promote_options="permissive").field(0).type
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return None


_INTEGERS = {
    pa.int8(), pa.int16(), pa.int32(), pa.int64(),
    pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(),
}  # fmt: skip


def _get_value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if kinds.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    values = _get_value_type(kind)
    return bool(kinds.is_string(values) or kinds.is_large_string(values))


def _list_columns(schema: pa.Schema) -> str:
    return ", ".join(schema.names)
