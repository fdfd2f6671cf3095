"""Types of columns in Delta and Iceberg tables: no value is changed, or the column is named."""

from __future__ import annotations

import decimal
from collections.abc import Callable

import pyarrow as pa
import pytest

from imgcls.errors import RequestError
from imgcls.publishing.table_types import build_table_schema, convert_table, fit_schema


@pytest.mark.parametrize(
    ("column", "stored"),
    [
        (pa.array(["a", None]).dictionary_encode(), pa.string()),
        (pa.array([[1.0, 2.0], None], pa.list_(pa.float16(), 2)), pa.list_(pa.float32())),
        (pa.array([[1.5, 2.0], None], pa.large_list(pa.float64())), pa.list_(pa.float64())),
        (pa.array([0.5, None], pa.float16()), pa.float32()),
        (pa.array([255, None], pa.uint8()), pa.int32()),
        (pa.array([2**32 - 1, None], pa.uint32()), pa.int64()),
        (pa.array(["a", None], pa.string_view()), pa.string()),
        (pa.array([b"ab", None], pa.binary(2)), pa.binary()),
        (pa.array([1, None], pa.timestamp("s", "Europe/Berlin")), pa.timestamp("us", "UTC")),
        (pa.array([1000, None], pa.timestamp("ns")), pa.timestamp("us")),
        (pa.array([{"a": 1}, None], pa.struct([("a", pa.int8())])), pa.struct([("a", pa.int32())])),
        (pa.array([86_400_000, None], pa.date64()), pa.date32()),
    ],
)
def test_columns_become_types_of_tables_with_the_same_values(
    column: pa.Array, stored: pa.DataType
) -> None:
    table = pa.table({"x": column})
    schema = build_table_schema(table.schema, "run", has_times=False)
    assert schema.field("x").type == stored
    found = convert_table(table, schema, "run")["x"]
    if pa.types.is_timestamp(stored):  # Python compares times, not units and zones
        found = found.cast(column.type)
    assert found.to_pylist() == column.to_pylist()


def test_the_largest_unsigned_integer_is_kept() -> None:
    table = pa.table({"x": pa.array([2**64 - 1], pa.uint64())})
    schema = build_table_schema(table.schema, "run", has_times=False)
    found = convert_table(table, schema, "run")["x"].to_pylist()
    assert found == [decimal.Decimal(2**64 - 1)]


def test_a_value_that_would_change_is_refused_by_name() -> None:
    table = pa.table({"taken": pa.array([2**62], pa.timestamp("s"))})
    schema = build_table_schema(table.schema, "run", has_times=False)
    with pytest.raises(RequestError, match="part: column 'taken' has a value that timestamp"):
        convert_table(table, schema, "part")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda times: times,
        lambda times: times.dictionary_encode(),
        lambda times: pa.array([[time] for time in times], pa.list_(times.type)),
        lambda times: pa.FixedSizeListArray.from_arrays(times, 1),
        lambda times: pa.StructArray.from_arrays([times, pa.array([1, 2], pa.int8())], ["t", "n"]),
        lambda times: pa.array([[("t", time)] for time in times], pa.map_(pa.string(), times.type)),
    ],
)
def test_nanoseconds_are_cut_off(wrap: Callable[[pa.Array], pa.Array]) -> None:
    exact, cut = (
        wrap(pa.array([1764556800123456000 + more, None], pa.timestamp("ns"))) for more in (789, 0)
    )
    schema = build_table_schema(pa.schema([("x", exact.type)]), "run", has_times=False)
    found, expected = (convert_table(pa.table({"x": x}), schema, "run") for x in (exact, cut))
    assert found.schema == schema
    assert found.equals(expected)


@pytest.mark.parametrize("kind", [pa.duration("s"), pa.decimal256(50, 2), pa.list_(pa.time32("s"))])
def test_a_column_that_cannot_be_stored_is_refused_by_name(kind: pa.DataType) -> None:
    with pytest.raises(RequestError, match=r"run: column 'x' is .* the table format cannot store"):
        build_table_schema(pa.schema([("x", kind)]), "run", has_times=False)


def test_times_of_day_are_stored_where_the_format_has_them() -> None:
    schema = build_table_schema(pa.schema([("x", pa.time32("s"))]), "run", has_times=True)
    assert schema.field("x").type == pa.time64("us")


def test_a_column_of_nulls_without_a_type_is_left_out() -> None:
    schema = pa.schema([("x", pa.null()), ("y", pa.string())])
    assert build_table_schema(schema, "run", has_times=False).names == ["y"]


@pytest.mark.parametrize(
    ("present", "added", "fits"),
    [
        (pa.int64(), pa.int32(), True),
        (pa.int32(), pa.int64(), False),
        (pa.float64(), pa.float32(), True),
        (pa.float32(), pa.float64(), False),
        (pa.float64(), pa.int32(), False),
        (pa.large_string(), pa.string(), True),
        (pa.string(), pa.int32(), False),
        (pa.large_list(pa.large_string()), pa.list_(pa.string()), True),
        (pa.list_(pa.float64()), pa.list_(pa.float32()), False),
    ],
)
def test_a_column_fits_if_the_table_can_hold_its_values(
    present: pa.DataType, added: pa.DataType, *, fits: bool
) -> None:
    table, run = (pa.schema([("x", kind)]) for kind in (present, added))
    if fits:
        assert fit_schema(table, run, "run", "delta:t") == table
    else:
        with pytest.raises(RequestError, match="delta:t: column 'x' is"):
            fit_schema(table, run, "run", "delta:t")


def test_names_that_differ_only_by_case_are_refused() -> None:
    table, run = pa.schema([("Camera", pa.string())]), pa.schema([("camera", pa.string())])
    with pytest.raises(RequestError, match="has a column 'Camera', and run has 'camera'"):
        fit_schema(table, run, "run", "delta:t")
