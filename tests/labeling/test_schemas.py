"""Schemas of tables written at different times become one, or are refused by name."""

from __future__ import annotations

import pyarrow as pa
import pytest

from imgcls.labeling.schemas import cast_table, common_schema, common_type

CODES = pa.dictionary(pa.int8(), pa.string())


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (pa.null(), pa.string(), pa.string()),
        (pa.null(), CODES, CODES),
        (pa.string(), pa.large_string(), pa.large_string()),
        (pa.string_view(), pa.string(), pa.string()),
        (CODES, pa.string(), pa.string()),
        (CODES, pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int32(), pa.string())),
        (pa.int32(), pa.int64(), pa.int64()),
        (pa.int64(), pa.float64(), pa.float64()),  # pandas: integers with a gap
        (pa.list_(pa.float16(), 3), pa.list_(pa.float32(), 3), pa.list_(pa.float32(), 3)),
        (pa.timestamp("us", "UTC"), pa.timestamp("ns", "+01:00"), pa.timestamp("ns", "UTC")),
        (pa.int64(), pa.string(), None),
        (pa.list_(pa.float32(), 3), pa.list_(pa.float32(), 4), pa.list_(pa.float32())),
        (pa.timestamp("us", "UTC"), pa.timestamp("us"), None),
    ],
)
def test_two_types_have_the_one_that_holds_both(
    a: pa.DataType, b: pa.DataType, expected: pa.DataType | None
) -> None:
    for first, second in ((a, b), (b, a)):
        if expected is None:
            with pytest.raises(TypeError, match="have no common type"):
                common_type(first, second)
        else:
            assert common_type(first, second) == expected


def test_tables_of_other_orders_types_and_columns_are_joined_without_loss() -> None:
    codes = pa.array(["x", None, "y"]).dictionary_encode().cast(CODES)
    first = pa.table({"a": [1, 2, 3], "note": pa.nulls(3), "site": codes})
    second = pa.table({"site": ["z"], "note": ["blurred"], "b": [0.5], "a": [1.5]})
    schema = common_schema([first.schema, second.schema], ["1", "2"])
    joined = pa.concat_tables([cast_table(table, schema) for table in (first, second)])
    assert joined.to_pydict() == {
        "site": ["x", None, "y", "z"],
        "note": [None, None, None, "blurred"],
        "b": [None, None, None, 0.5],
        "a": [1.0, 2.0, 3.0, 1.5],
    }


def test_a_column_without_a_common_type_is_named() -> None:
    schemas = [pa.schema([("site", pa.int64())]), pa.schema([("site", pa.string())])]
    with pytest.raises(TypeError, match=r"^night 1: column 'site' is int64, and string in later"):
        common_schema(schemas, ["night 1", "night 2"])
    with pytest.raises(pa.ArrowInvalid):
        cast_table(pa.table({"n": [2**53 + 1]}), pa.schema([("n", pa.float64())]))
