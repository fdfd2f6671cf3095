"""One schema for tables written at different times: types widened, columns gained or lost.

A column of nulls takes the type of the others, dictionary codes and string sizes do not matter,
numbers widen. Types that have no common type (an integer and a text) are refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa


def common_schema(schemas: Sequence[pa.Schema], names: Sequence[str]) -> pa.Schema:
    """The columns of all schemas, each nullable and of the narrowest type that holds them all.

    The last schema decides the order; columns that only earlier ones have follow.
    names: what to call each schema in an error
    Raises TypeError that names the column, both types and the schema that differs.
    """
    types: dict[str, pa.DataType] = {}
    for schema, name in zip(reversed(schemas), reversed(names), strict=True):
        for field in schema:
            known = types.setdefault(field.name, field.type)
            try:
                types[field.name] = common_type(known, field.type)
            except TypeError as error:
                raise TypeError(
                    f"{name}: column {field.name!r} is {field.type}, and {known} in later runs"
                ) from error
    return pa.schema([pa.field(name, kind) for name, kind in types.items()])


def common_type(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """The type that holds the values of both; raises TypeError when there is none."""
    if a.equals(b):
        return a
    if pa.types.is_null(a) or pa.types.is_null(b):
        return b if pa.types.is_null(a) else a
    if pa.types.is_dictionary(a) and pa.types.is_dictionary(b):
        return pa.dictionary(pa.int32(), common_type(a.value_type, b.value_type))
    a, b = _plain(a), _plain(b)
    try:
        merged = pa.unify_schemas(
            [pa.schema([("x", a)]), pa.schema([("x", b)])], promote_options="permissive"
        )
    except pa.ArrowException as error:
        raise TypeError(f"{a} and {b} have no common type") from error
    return merged.field(0).type


def cast_table(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table with the columns and types of `schema`; null where it lacks a column.

    Raises pa.ArrowInvalid for a value that does not fit, such as an integer above 2**53 in a column
    of floats.
    """
    return pa.table(
        [
            table[field.name].cast(field.type)
            if field.name in table.schema.names
            else pa.nulls(table.num_rows, field.type)
            for field in schema
        ],
        schema=schema,
    )


def _plain(kind: pa.DataType) -> pa.DataType:
    """Without dictionary codes, string views and time zones other than UTC."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        return pa.timestamp(kind.unit, "UTC")
    return kind
